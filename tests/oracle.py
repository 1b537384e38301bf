"""One check for every op, and the stored results of other implementations in tests/data.

check_op(op, reference, args) holds an op of torch.ops.minidamage to its readable reference: values and gradients, strides,
float64 gradcheck, opcheck, torch.compile, and the CUDA kernel of the same name, run on the CPU by csrc/cuda_on_cpu.h (and on a
GPU where there is one). The caller picks the inputs: by hand, empty, one element, odd channel counts, boxes outside, NaN.
"""
import pathlib

import numpy
import torch

from minidamage.ops import _extension

DATA = pathlib.Path(__file__).parent / "data"
# rounding of the results themselves; the arithmetic is float32 (float64 for float64)
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def stored(name):
    """Arrays of tests/data/<name>.npz as a dict of tensors (strings stay numpy)."""
    with numpy.load(DATA / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key].copy()) if arrays[key].dtype.kind in "fiub" else arrays[key] for key in arrays.files}


def check_op(op, reference, args, *, tolerance=None, gradients=False, gradcheck=False, opcheck=True, compiled=False, strides=True,
             emulated=True):
    """Holds `op` to `reference` on one set of arguments.

    op: torch.ops.minidamage.<name> (an overload packet). args: its positional arguments; tensors, lists of tensors, numbers, None.
    gradients: compare gradients of all floating-point tensors that require grad (set requires_grad on those that should have one).
    gradcheck: numerically too; give float64 and small inputs. strides: repeat with non-contiguous and channels_last inputs.
    emulated: run the CUDA kernel of the same name on the CPU. compiled: torch.compile(fullgraph=True).
    """
    plain = map_tensors(lambda t: t.detach(), args)
    expected = reference(*plain)
    same(op(*plain), expected, tolerance, "kernel and reference")
    if gradients:
        check_gradients(op, reference, args, tolerance)
    if gradcheck:
        check_gradcheck(op, args)
    if strides:
        for form, change in (("non-contiguous", non_contiguous), ("channels_last", channels_last)):
            same(op(*map_tensors(change, plain)), expected, tolerance, f"{form} inputs and reference")
    if opcheck:
        torch.library.opcheck(op.default, args, raise_exception=True)
    if compiled:
        torch._dynamo.reset()                                                        # the lambda below is one code object for all tests
        same(torch.compile(lambda *a: op(*a), fullgraph=True, backend="aot_eager")(*plain), expected, tolerance, "compiled and reference")
    if emulated:
        check_emulated(op, plain, expected, tolerance)
    if torch.cuda.is_available():
        on_gpu = op(*map_tensors(lambda t: t.cuda(), plain))
        same(map_tensors(lambda t: t.cpu(), tuple(outputs(on_gpu))), expected, tolerance, "GPU and reference")


def check_emulated(op, args, expected, tolerance=None):
    """The CUDA kernels of `op`, run on the CPU."""
    kernels = _extension.load_emulated()
    name = op.default._schema.name.split("::")[1]
    result = getattr(kernels, name)(*args)
    same(result, expected, tolerance, "emulated CUDA kernel and reference")
    first = outputs(result)[0]
    assert not (first.is_floating_point() and first._is_view()), "autograd forbids in-place work on an output that is a view"


def check_gradients(op, reference, args, tolerance=None):
    """Gradients of a random combination of the outputs, of the op and through the reference's own autograd."""
    results = []
    for function in (op, reference):
        leaves = []
        result = function(*map_tensors(lambda t: leaf(t, leaves), args))
        floating = [t for t in outputs(result) if t.requires_grad]
        assert floating, "no output depends on an input that requires grad"
        generator = torch.Generator().manual_seed(2)
        weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in floating]
        results.append(torch.autograd.grad(floating, leaves, weights, allow_unused=True))
    for ours, expected in zip(*results):
        expected = torch.zeros_like(ours) if expected is None else expected
        same(ours, expected, tolerance, "gradient of the kernel and of the reference")


def check_gradcheck(op, args):
    leaves = []
    double = map_tensors(lambda t: leaf(t.double() if t.is_floating_point() else t, leaves), args)

    def function(*new):
        remaining = iter(new)
        return op(*map_tensors(lambda t: next(remaining) if t.requires_grad else t, double))

    assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0)


# ---- the parts -----------------------------------------------------------------------------------------------------------


def same(ours, expected, tolerance=None, what=""):
    """Equal structure, shape, dtype and values (NaN equals NaN); integers exactly, floats to `tolerance` of the expected's scale."""
    ours, expected = outputs(ours), outputs(expected)
    assert len(ours) == len(expected), f"{what}: {len(ours)} and {len(expected)} outputs"
    for a, b in zip(ours, expected):
        assert a.shape == b.shape, f"{what}: shapes {list(a.shape)} and {list(b.shape)}"
        assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
        if not b.is_floating_point():
            assert torch.equal(a, b), f"{what} differ: {(a != b).sum()} of {b.numel()} entries"
            continue
        allowed = TOLERANCE[b.dtype] if tolerance is None else tolerance
        finite = b[b.isfinite()]
        scale = max(1.0, float(finite.detach().abs().max())) if finite.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=allowed * scale, equal_nan=True, msg=lambda m: f"{what}: {m}")


def outputs(result):
    """All tensors of a result: a tensor, or tuples and lists of them."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [tensor for part in result for tensor in outputs(part)]


def map_tensors(function, value):
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, part) for part in value)
    return value


def leaf(tensor, leaves):
    """A fresh leaf with the same values and strides; those that require grad are collected."""
    fresh = tensor.detach().clone().requires_grad_(tensor.requires_grad)
    if fresh.requires_grad:
        leaves.append(fresh)
    return fresh


def non_contiguous(tensor):
    """The same values, every second element of a buffer that holds NaN (or -1) between them."""
    filler = float("nan") if tensor.is_floating_point() else True if tensor.dtype == torch.bool else -1 if tensor.dtype.is_signed else 255
    buffer = torch.full([*tensor.shape, 2], filler, dtype=tensor.dtype, device=tensor.device)
    buffer[..., 0] = tensor
    return buffer[..., 0]


def channels_last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
