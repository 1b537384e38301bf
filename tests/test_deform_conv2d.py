"""Deformable convolution against hand answers, its loop-form definition, stored torchvision results, and the CUDA kernels on the CPU."""
import math
import os
import subprocess
import sys

import pytest
import torch
from oracle import check_op, same, stored
from torch.nn.functional import conv2d

from minidamage import ops
from minidamage.ops import _extension
from minidamage.ops.deform_conv2d import (deform_conv2d_backward_input_reference, deform_conv2d_backward_weight_reference,
                                          deform_conv2d_reference)

OP = torch.ops.minidamage.deform_conv2d
BACKWARD_INPUT, BACKWARD_WEIGHT = torch.ops.minidamage.deform_conv2d_backward_input, torch.ops.minidamage.deform_conv2d_backward_weight
STORED = stored("deform_conv2d")
CASES = [str(name) for name in STORED["cases"]]
nan, inf = math.nan, math.inf


def problem(channels=6, outputs=4, kernel=(3, 3), size=(7, 8), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, offset_groups=1,
            masked=True, biased=True, batch=2, dtype=torch.float32, spread=1.5, seed=0):
    """Arguments of OP. Offsets of `spread` pixels (standard deviation): some samples lie outside, wholly or in part."""
    generator = torch.Generator().manual_seed(seed)
    OH, OW = (((size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1) for i in range(2))
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)          # noqa: E731
    taps = kernel[0] * kernel[1]
    positions = torch.float64 if dtype == torch.float64 else torch.float32
    return (random(batch, channels, *size), (random(batch, 2 * offset_groups * taps, OH, OW) * spread).to(positions),
            random(batch, offset_groups * taps, OH, OW).to(positions) if masked else None,
            random(outputs, channels // groups, *kernel) / math.sqrt(channels // groups * taps), random(outputs) if biased else None,
            list(stride), list(padding), list(dilation), groups, offset_groups)


def backward_problem(args, seed=3):
    """Arguments of the two backward ops from those of OP."""
    input, offset, mask, weight, _, *geometry = args
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(input.shape[0], weight.shape[0], *offset.shape[2:], generator=generator, dtype=torch.float64).to(input.dtype)
    return grad, input, offset, mask, weight, *geometry


def check_everything(args, tolerance=None, **options):
    """OP and both backward ops beside their references: on this machine, emulated (both forms of the backward pass), on a GPU."""
    check_op(OP, deform_conv2d_reference, args, tolerance=tolerance, **options)
    backward = backward_problem(args)
    check_op(BACKWARD_INPUT, deform_conv2d_backward_input_reference, backward, tolerance=tolerance, **options)
    check_op(BACKWARD_WEIGHT, deform_conv2d_backward_weight_reference, backward, tolerance=tolerance, **options)
    if options.get("emulated", True):
        same(emulated_deterministic(backward), deform_conv2d_backward_input_reference(*backward), tolerance, "deterministic, emulated")


def emulated_deterministic(backward):
    torch.use_deterministic_algorithms(True)
    try:
        return _extension.load_emulated().deform_conv2d_backward_input(*backward)
    finally:
        torch.use_deterministic_algorithms(False)


def deform_conv2d_loops(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
    """The definition, one product at a time."""
    (N, C, H, W), (O, group_channels, KH, KW), (OH, OW) = input.shape, weight.shape, offset.shape[2:]
    output = torch.zeros(N, O, OH, OW, dtype=input.dtype)
    for n in range(N):
        for oy in range(OH):
            for ox in range(OW):
                for o in range(O):
                    total = 0.0 if bias is None else bias[o].item()
                    for ky in range(KH):
                        for kx in range(KW):
                            for j in range(group_channels):
                                c, k = o // (O // groups) * group_channels + j, ky * KW + kx
                                pair = (c // (C // offset_groups)) * KH * KW + k
                                y = oy * stride[0] - padding[0] + ky * dilation[0] + offset[n, 2 * pair, oy, ox].item()
                                x = ox * stride[1] - padding[1] + kx * dilation[1] + offset[n, 2 * pair + 1, oy, ox].item()
                                if not (math.isfinite(y) and math.isfinite(x)):
                                    continue
                                for row in (math.floor(y), math.floor(y) + 1):
                                    for column in (math.floor(x), math.floor(x) + 1):
                                        if 0 <= row < H and 0 <= column < W:
                                            factor = (1 - abs(y - row)) * (1 - abs(x - column)) * weight[o, j, ky, kx].item()
                                            factor *= 1 if mask is None else mask[n, pair, oy, ox].item()
                                            total += factor * input[n, c, row, column].item()
                    output[n, o, oy, ox] = total
    return output


def test_by_hand(device):
    ramp = (10.0 * torch.arange(4)[:, None] + torch.arange(5))[None, None].to(device)          # value 10 y + x: bilinear is exact
    weight = torch.ones(1, 1, 1, 1, device=device)
    offset = torch.zeros(1, 2, 4, 5, device=device)
    offset[0, 0], offset[0, 1] = 0.5, 0.25                                                     # y first: 5 + 0.25 further
    output = ops.deform_conv2d(ramp, offset, weight)
    assert output[0, 0, :3, :4].tolist() == (ramp[0, 0, :3, :4] + 5.25).tolist()
    assert output[0, 0, 3, 1].item() == 0.5 * 31.25                                            # half of it lies below the picture
    assert output[0, 0, 1, 4].item() == 0.75 * 19                                              # a quarter beside it
    # v2: a mask scales the sample; the bias comes on top
    mask = torch.full((1, 1, 4, 5), 3.0, device=device)
    assert ops.deform_conv2d(ramp, offset, weight, torch.tensor([7.0], device=device), mask=mask)[0, 0, 1, 1].item() == 3 * 16.25 + 7
    # no offset: the convolution itself
    kernel = torch.randn(2, 1, 3, 3, device=device)
    same(ops.deform_conv2d(ramp, torch.zeros(1, 18, 2, 3, device=device), kernel, None, 2, 1).cpu(),
         conv2d(ramp.cpu(), kernel.cpu(), None, 2, 1), 1e-5)                                   # not cuDNN's, which may take TF32


@pytest.mark.parametrize("settings", [
    dict(channels=4, outputs=6, kernel=(2, 3), size=(4, 5), padding=(1, 0), groups=2, offset_groups=4, batch=2),
    dict(channels=2, outputs=2, kernel=(3, 1), size=(5, 4), stride=(2, 1), dilation=(1, 3), padding=(2, 2), masked=False, batch=1),
    dict(channels=6, outputs=3, kernel=(2, 2), size=(3, 4), offset_groups=2, groups=3, biased=False, spread=6)])
def test_the_definition(settings):
    """Rows of the kernel and columns, groups and offset groups that cut each other, in loops that share nothing with the op."""
    args = problem(dtype=torch.float64, **settings)
    args[1][0, :2, 0] = torch.tensor([nan, inf])[:, None]
    expected = deform_conv2d_loops(*args)
    same(deform_conv2d_reference(*args), expected, 1e-12, "reference and definition")
    same(OP(*args), expected, 1e-12, "kernel and definition")
    same(_extension.load_emulated().deform_conv2d(*args), expected, 1e-12, "emulated kernel and definition")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_stored_torchvision(case, memory_format, device):
    """Values and all gradients; v1_integer_offsets and v1_zero_offsets stand on kinks."""
    array = lambda name: STORED.get(f"{case}_{name}")                                          # noqa: E731
    conf = array("conf").tolist()
    leaves = [t if t is None else t.to(device).contiguous(memory_format=memory_format if t.dim() == 4 else torch.contiguous_format)
              .detach().requires_grad_() for t in map(array, ("x", "offset", "weight", "bias", "mask"))]
    input, offset, weight, bias, mask = leaves
    output = ops.deform_conv2d(input, offset, weight, bias, conf[:2], conf[2:4], conf[4:6], mask)
    same(output.cpu(), array("out"), 1e-12, "ours and torchvision")
    assert output.is_contiguous(memory_format=memory_format)
    output.backward(array("go").to(device))
    for name, leaf in zip(("x", "offset", "weight", "bias", "mask"), leaves):
        if leaf is not None:
            same(leaf.grad.cpu(), array(f"grad_{name}"), 1e-12, f"gradient of {name}")
            assert leaf.dim() != 4 or leaf.grad.is_contiguous(memory_format=memory_format)
    kernels, geometry = _extension.load_emulated(), (conf[:2], conf[2:4], conf[4:6], *conf[6:])
    tensors = [array(name) for name in ("x", "offset", "mask", "weight")]
    same(kernels.deform_conv2d(*tensors, array("bias"), *geometry), array("out"), 1e-12, "emulated")
    backward = (array("go"), *tensors, *geometry)
    expected = [array("grad_x"), array("grad_offset"), array("grad_mask") if mask is not None else torch.zeros(0).double()]
    same(kernels.deform_conv2d_backward_input(*backward), expected, 1e-12, "emulated gradients, atomic")
    same(emulated_deterministic(backward), expected, 1e-12, "emulated gradients, deterministic")
    same(kernels.deform_conv2d_backward_weight(*backward), array("grad_weight"), 1e-12, "emulated gradient of weight")


@pytest.mark.parametrize("settings", [
    dict(), dict(masked=False, biased=False), dict(stride=(2, 1), padding=(0, 2), dilation=(2, 1), size=(9, 10)),
    dict(groups=3, offset_groups=2, outputs=9), dict(channels=30, outputs=71, spread=4), dict(channels=71, outputs=1),
    dict(channels=1, outputs=1, kernel=(1, 1), size=(1, 1), padding=(0, 0), batch=1),
    dict(channels=140, outputs=3, offset_groups=4, size=(5, 6)),
    dict(channels=3, outputs=600, size=(3, 4), batch=1),            # the weight pass takes the taps in two parts
    dict(channels=140, outputs=600, offset_groups=2, size=(2, 3), batch=1),
    dict(channels=8, outputs=8, groups=8, offset_groups=8), dict(channels=16, outputs=70, kernel=(5, 2), padding=(2, 0), batch=3),
    dict(spread=30), dict(spread=0), dict(size=(12, 17), batch=3, channels=8)])
def test_kernels_and_reference(settings):
    check_everything(problem(**settings), opcheck=False)


@pytest.mark.parametrize("settings", [dict(), dict(masked=False), dict(biased=False)])
def test_empty_batch(settings, device):
    args = problem(batch=0, **settings)
    check_everything(args)
    input, offset, mask, weight, bias = (t if t is None else t.to(device).requires_grad_() for t in args[:5])
    output = ops.deform_conv2d(input, offset, weight, bias, 1, 1, 1, mask)
    assert output.shape == (0, 4, 7, 8)
    output.sum().backward()
    assert weight.grad.abs().max() == 0 and input.grad.shape == input.shape and offset.grad.shape == offset.shape


def test_contract():
    """Derivatives in float64, opcheck, compile: on what a training step passes."""
    for settings in (dict(channels=4, groups=2, offset_groups=2), dict(channels=3, outputs=2, masked=False, biased=False, stride=(2, 1))):
        args = problem(size=(4, 5), kernel=(2, 3), batch=1, dtype=torch.float64, **settings)
        for tensor in args[:5]:
            if tensor is not None:
                tensor.requires_grad_()
        check_op(OP, deform_conv2d_reference, args, gradients=True, gradcheck=True, compiled=True)
        backward = backward_problem(tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in args))
        check_op(BACKWARD_INPUT, deform_conv2d_backward_input_reference, backward, compiled=True)
        check_op(BACKWARD_WEIGHT, deform_conv2d_backward_weight_reference, backward, compiled=True)
    for channels_last in (False, True):                                               # what an offset convolution in channels_last gives
        args = [t.contiguous(memory_format=torch.channels_last) if channels_last and isinstance(t, torch.Tensor) and t.dim() == 4 else t
                for t in problem()]
        check_everything(tuple(args), strides=False)


def test_gradients_of_a_subset():
    """A frozen weight, or a frozen input, costs no gradient and changes no other."""
    args = problem(dtype=torch.float64)
    gradients = {}
    for wanted in (("input", "offset", "weight", "bias", "mask"), ("weight",), ("offset", "mask"), ("bias",)):
        tensors = dict(zip(("input", "offset", "mask", "weight", "bias"), (t.detach().clone() for t in args[:5])))
        for name in wanted:
            tensors[name].requires_grad_()
        ops.deform_conv2d(padding=1, **tensors).square().sum().backward()
        for name, tensor in tensors.items():
            assert (tensor.grad is not None) == (name in wanted)
            if tensor.grad is not None:
                assert torch.equal(gradients.setdefault(name, tensor.grad), tensor.grad)


@pytest.mark.parametrize("bad", [nan, inf, -inf, 1e30, -1e30, 3e9, -1.0])
def test_offsets_that_are_no_number(bad):
    """Such a sample is outside: zero, with zero gradients; nothing is read beyond the input."""
    args = problem(channels=5, spread=0.3)
    args[1][0, ::2] = bad                                                              # y of all taps, picture 0
    args[1][1, 3] = bad                                                                # x of one tap, picture 1
    check_everything(args, opcheck=False)
    output, backward = OP(*args), BACKWARD_INPUT(*backward_problem(args))
    if bad != -1.0:
        assert torch.equal(output[0], args[4][:, None, None].expand_as(output[0]))     # the bias alone
        assert not backward[0][0].any() and not backward[1][0].any() and not backward[2][0].any()
    assert output.isfinite().all() and all(gradient.isfinite().all() for gradient in backward)


def test_values_that_are_no_number():
    """NaN in the input or the mask reaches the outputs that look at it, and no others."""
    args = problem(channels=4, outputs=2, spread=0.3, batch=1)
    args[0][0, 1, 3, 3] = nan
    args[2][0, 4, 0, 0] = nan
    output = OP(*args)
    same(output, deform_conv2d_reference(*args), None, "kernel and reference")
    assert output[0, :, 0, 0].isnan().all() and output[0, :, 6, 7].isfinite().all() and output.isnan().any(1).sum() < 36
    same(_extension.load_emulated().deform_conv2d(*args), output, None, "emulated")


def test_a_mask_of_infinity_at_the_border_is_no_nan():
    """Corners outside the picture are zero whatever the mask: of the four, one pixel of 1 a quarter of the way is left."""
    args = (torch.ones(1, 1, 3, 3), torch.full((1, 2, 3, 3), -0.5), torch.full((1, 1, 3, 3), inf), torch.ones(1, 1, 1, 1), None, [1, 1],
            [0, 0], [1, 1], 1, 1)
    for result in (OP(*args), deform_conv2d_reference(*args), _extension.load_emulated().deform_conv2d(*args)):
        assert (result == inf).all()


def test_a_bias_is_added_before_the_sum_is_rounded():
    """256 + 1 + 1 in bfloat16, whose next number is 258."""
    args = (torch.tensor([256.0, 1.0]).view(1, 2, 1, 1).bfloat16(), torch.zeros(1, 2, 1, 1), None, torch.ones(1, 2, 1, 1).bfloat16(),
            torch.ones(1).bfloat16(), [1, 1], [0, 0], [1, 1], 1, 1)
    twice = (args[0].repeat(1, 2, 1, 1), args[1], None, args[3].repeat(2, 1, 1, 1), args[4].repeat(2), *args[5:8], 2, 1)
    for arguments in (args, twice):
        assert (_extension.load_emulated().deform_conv2d(*arguments) == 258).all()
        if torch.cuda.is_available():
            assert (OP(*(t.cuda() if isinstance(t, torch.Tensor) else t for t in arguments)) == 258).all()


@pytest.mark.parametrize("masked", [False, True])
def test_tiles_that_end_inside_a_picture(masked):
    """The emulated build takes 75 positions at a time here, a picture has 56: the deterministic gather looks at two pictures a tile."""
    backward = backward_problem(problem(batch=4, offset_groups=2, masked=masked))
    expected = deform_conv2d_backward_input_reference(*backward)
    same(emulated_deterministic(backward), expected, 1e-4, "gathered")
    same(_extension.load_emulated().deform_conv2d_backward_input(*backward), expected, 1e-4, "atomic")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """On a CPU in float32, rounded once; the CUDA kernels read and write halves and sum in float32."""
    args = problem(channels=16, outputs=8, dtype=dtype, groups=2, offset_groups=2)
    exact = tuple(t.float() if isinstance(t, torch.Tensor) else t for t in args)
    expected = deform_conv2d_reference(*exact)
    input, offset, mask, weight, bias, *geometry = args
    output = ops.deform_conv2d(input.requires_grad_(), offset, weight, bias, 1, 1, 1, mask)
    assert output.dtype == dtype
    same(output.float(), expected, torch.finfo(dtype).eps)
    output.sum().backward()
    assert input.grad.dtype == dtype
    input = input.detach()
    kernels, tolerance = _extension.load_emulated(), 4 * torch.finfo(dtype).eps        # the columns are rounded too
    ours = kernels.deform_conv2d(input, offset, mask, weight, bias, *geometry)
    assert ours.dtype == dtype
    same(ours.float(), expected, tolerance)
    backward, backward_exact = backward_problem(args), backward_problem(exact)
    backward_exact = (backward[0].float(), *backward_exact[1:])
    for gradients in (kernels.deform_conv2d_backward_input(*backward), emulated_deterministic(backward)):
        assert gradients[0].dtype == dtype and gradients[1].dtype == gradients[2].dtype == torch.float32
        same([g.float() for g in gradients], deform_conv2d_backward_input_reference(*backward_exact), tolerance)
    weights = kernels.deform_conv2d_backward_weight(*backward)
    assert weights.dtype == dtype
    same(weights.float(), deform_conv2d_backward_weight_reference(*backward_exact), tolerance)
    with pytest.raises(ValueError, match="float32 or float64 on a CPU"):
        OP(input, *args[1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gpu(dtype, deterministic, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    args = problem(channels=64, outputs=32, size=(20, 24), dtype=dtype)
    backward = backward_problem(args)
    on_gpu = tuple(t.cuda() if isinstance(t, torch.Tensor) else t for t in backward)
    torch.use_deterministic_algorithms(deterministic)
    try:
        runs = [[g.cpu() for g in (*BACKWARD_INPUT(*on_gpu), BACKWARD_WEIGHT(*on_gpu))] for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    expected = [*deform_conv2d_backward_input_reference(*backward), deform_conv2d_backward_weight_reference(*backward)]
    for run in runs:
        same([g.float() for g in run], [g.float() for g in expected], 8 * max(torch.finfo(dtype).eps, 1e-5))
        assert not deterministic or all(torch.equal(a, b) for a, b in zip(run, runs[0]))


def test_autocast_on_a_cpu_gives_float32():
    input, offset, mask, weight, bias, *_ = problem(channels=8)
    convolution, input = torch.nn.Conv2d(8, 18, 3, padding=1), input.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        offset = convolution(input)
        assert offset.dtype == torch.bfloat16
        output = ops.deform_conv2d(input.bfloat16(), offset, weight, bias, 1, 1, 1, mask)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert input.grad.isfinite().all() and convolution.weight.grad.isfinite().all()


def test_equal_bytes_on_any_number_of_threads():
    args = problem(channels=96, outputs=80, size=(20, 21), offset_groups=2)
    backward, threads, results = backward_problem(args), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append([OP(*args), *BACKWARD_INPUT(*backward), BACKWARD_WEIGHT(*backward)])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_module():
    torch.manual_seed(0)
    module = ops.DeformConv2d(6, 8, 3, padding=1, groups=2)
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(6, 8, 3, padding=1, groups=2)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), plain.state_dict().values()))
    assert list(module.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 6, 5, 7)
    same(module(x, torch.zeros(2, 18, 5, 7)), plain(x), 1e-5)
    same(module(x, torch.zeros(2, 18, 5, 7), torch.full((2, 9, 5, 7), 0.5)), (plain(x) + plain.bias[:, None, None]) / 2, 1e-5)
    assert ops.DeformConv2d(6, 8, (1, 3), bias=False).bias is None and "kernel_size=(3, 3)" in repr(module)
    with pytest.raises(ValueError, match="divisible by groups"):
        ops.DeformConv2d(6, 8, 3, groups=4)


def test_compiles_and_exports_with_gradients():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.offset, self.deform = torch.nn.Conv2d(4, 27, 3, padding=1), ops.DeformConv2d(4, 5, 3, padding=1)

        def forward(self, x):
            offset, mask = self.offset(x).split([18, 9], 1)
            return self.deform(x, offset, mask.sigmoid())

    block, x = Block(), torch.randn(2, 4, 6, 7, requires_grad=True)
    expected = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
    torch._dynamo.reset()
    for dynamic in (False, True):
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        same(torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()]), list(expected), 1e-5)
    program = torch.export.export(block, (x.detach(),))
    same(program.module()(x.detach()), block(x).detach(), 1e-6)


def test_second_derivative_is_refused():
    input, offset, mask, weight, *_ = problem()
    output = ops.deform_conv2d(input.requires_grad_(), offset, weight.requires_grad_(), None, 1, 1, 1, mask).square().sum()
    for leaf in (input, weight):
        gradient, = torch.autograd.grad(output, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="deform_conv2d: second derivatives"):
            gradient.sum().backward()


PEAK = """
import torch
from minidamage import ops
torch.set_num_threads(2)
def status(field): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
def tensors(C, S): return [t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in
                           (torch.randn(2, C, S, S), torch.randn(2, 18, S, S), torch.randn(C, C, 3, 3), torch.randn(2, 9, S, S))]
def run(x, offset, weight, mask, grad):
    output = ops.deform_conv2d(x, offset, weight, None, 1, 1, 1, mask)
    output.backward(grad)
run(*tensors(256, 8), torch.randn(2, 256, 8, 8))
leaves, grad = tensors(256, 64), torch.randn(2, 256, 64, 64).contiguous(memory_format=torch.channels_last)
results = grad.nbytes + sum(leaf.nbytes for leaf in leaves)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
run(*leaves, grad)
print(status("VmHWM") - before - results)
"""


def test_memory_stays_below_a_quarter_of_the_columns():
    """Forward and backward at [2, 256, 64, 64], 3 x 3: what is used beyond the results themselves. All columns would be 75 MB."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc/self/clear_refs: the peak of the resident memory cannot be read here")
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, cwd=_extension.CSRC.parent,
                         env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert int(run.stdout) < 2 * 64 * 64 * 9 * 256 * 4 / 4


@pytest.mark.parametrize("change, message", [
    (dict(input=lambda t: t[0]), r"input \[N, C, H, W\]"),
    (dict(input=lambda t: t.long()), "expected input as a floating-point tensor, got torch.int64"),
    (dict(offset=lambda t: t.long()), "expected offset as a floating-point"),
    (dict(weight=lambda t: t.numpy()), "expected weight as a floating-point tensor, got ndarray"),
    (dict(input=lambda t: t[:, :5]), "5 input channels and 4 outputs cannot be divided into groups of 6"),
    (dict(weight=lambda t: t[:, :2]), "6 input channels and 4 outputs cannot be divided"),
    (dict(input=lambda t: t[:, :, :0]), "is empty"),
    (dict(weight=lambda t: t[..., :0]), "is empty"),
    (dict(offset=lambda t: t[:, :17]), r"expected offset \[2, 18 offset_groups, 7, 8\].*got \[2, 17, 7, 8\]"),
    (dict(offset=lambda t: t.repeat(1, 4, 1, 1)), "dividing the 6 input channels"),
    (dict(offset=lambda t: t[..., :-1]), r"got \[2, 18, 7, 7\]"),
    (dict(offset=lambda t: t[:1]), r"got \[1, 18, 7, 8\]"),
    (dict(mask=lambda t: t[:, :8]), r"expected mask \[2, 9, 7, 8\]"),
    (dict(bias=lambda t: t[:3]), r"expected bias \[4\]"),
    (dict(weight=lambda t: t.double()), "convert them to one dtype"),
    (dict(bias=lambda t: t.half()), "convert them to one dtype"),
    (dict(weight=lambda t: t.to("meta")), "move them to one device"),
    (dict(mask=lambda t: t.to("meta")), "cpu and meta"),
    (dict(padding=-1), "expected padding"), (dict(stride=0), "expected stride as a positive int"), (dict(dilation=(1, 2, 3)), "dilation"),
    (dict(stride=1.5), "expected stride"), (dict(padding=0, dilation=4), "larger than the input"),
])
def test_mistakes_are_named(change, message):
    settings = dict(zip(("input", "offset", "mask", "weight", "bias"), problem()), padding=1)
    for name, value in change.items():
        settings[name] = value(settings[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        ops.deform_conv2d(**settings)


@pytest.mark.parametrize("namespace", ["minidamage", "minidamage_emulated"])
def test_the_bindings_protect_memory(namespace):
    """The public function checks first; a direct call of the ops must not read outside either."""
    _extension.load_emulated()
    forward = getattr(torch.ops, namespace).deform_conv2d
    backwards = [getattr(getattr(torch.ops, namespace), op.__name__) for op in (BACKWARD_INPUT, BACKWARD_WEIGHT)]
    args = problem()
    names = ("input", "offset", "mask", "weight", "bias", "stride", "padding", "dilation", "groups", "offset_groups")
    changes = [("input", args[0][0], "4 dimensions"), ("input", args[0][:, :3], "weight"), ("input", args[0].double(), "offset must be"),
               ("input", args[0][:, :, :0], "empty"), ("offset", args[1][:, :4], "offset must be"), ("offset", args[1].double(), "offset"),
               ("offset", args[1][..., 1:], "offset must be"), ("mask", args[2][:, 1:], "mask must be"), ("stride", [1], "pairs"),
               ("stride", [0, 1], "stride"), ("padding", [-1, 0], "padding"), ("padding", [2 ** 40, 0], "padding"),
               ("dilation", [40, 1], "larger than the padded input"), ("groups", 4, "groups"), ("groups", 0, "groups"),
               ("offset_groups", 5, "offset groups"), ("offset_groups", 2, "offset must be"), ("weight", args[3].double(), "weight")]
    for name, value, message in changes:
        changed = [value if name == other else old for other, old in zip(names, args)]
        for op, arguments in ((forward, changed), *((op, (torch.zeros(2, 4, 7, 8), *changed[:4], *changed[5:])) for op in backwards)):
            with pytest.raises((ValueError, RuntimeError), match=message):
                op(*arguments)
    with pytest.raises(RuntimeError, match="bias must be"):
        forward(*args[:4], args[4][1:], *args[5:])
    for op in backwards:
        with pytest.raises(RuntimeError, match="grad must be"):
            op(torch.zeros(2, 4, 7, 7), *args[:4], *args[5:])
