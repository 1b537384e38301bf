"""RoI max pooling against hand answers, its loop-form definition, stored torchvision results, and the CUDA kernels on the CPU."""
import math

import numpy
import pytest
import torch
from oracle import check_op, same, stored

from minidamage import ops
from minidamage.ops import _extension
from minidamage.ops.roi_pool import roi_pool_backward_reference, roi_pool_reference

OP, BACKWARD = torch.ops.minidamage.roi_pool, torch.ops.minidamage.roi_pool_backward
STORED = stored("roi_pool")
nan, inf = math.nan, math.inf
# batch index, box: whole and partly outside, far outside, sub-pixel, no area, inverted, huge, not finite
NASTY = [[0, 2, 3, 30, 25], [1, -20, -10, 12, 9], [0, 40, 30, 80, 90], [1, 200, 200, 220, 220], [0, 10.2, 10.3, 10.6, 10.4],
         [1, 7, 7, 7, 7], [0, 30, 20, 4, 6], [1, -1e4, -1e4, 1e4, 1e4], [0, -1e30, 0, 1e30, 20], [1, nan, 1, 9, 9], [0, 1, 1, inf, 9],
         [1, -inf, -inf, inf, inf], [0, 0, 0, 48, 40], [1, -3, 37, 3, 45], [0, 1, 1, 3, 3], [1, -1e8, -1e8, 1e8, 1e8]]


def problem(channels=6, dtype=torch.float32, count=10, seed=0, size=(20, 24), nasty=True):
    """Features [2, C, H, W] and rois [R, 5] in picture pixels at scale 1/2; halves of pixels, so that rounding is put to the test."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, channels, *size, generator=generator, dtype=dtype)
    corner = torch.randint(-4, 40, (count, 2), generator=generator).to(dtype)
    extent = torch.randint(0, 30, (count, 2), generator=generator)
    boxes = torch.cat([torch.arange(count)[:, None] % 2, corner, corner + extent], 1)
    rois = torch.cat([boxes, torch.tensor(NASTY)]) if nasty else boxes
    return features, rois.to(torch.float64 if dtype == torch.float64 else torch.float32)


def c_round(x):
    return math.copysign(math.floor(abs(x) + 0.5), x)


def roi_pool_loops(features, rois, output_size, spatial_scale):
    """The definition, one pixel at a time: (output, argmax)."""
    N, C, H, W = features.shape
    output = torch.zeros(len(rois), C, *output_size, dtype=features.dtype)
    argmax = torch.full(output.shape, -1, dtype=torch.int32)
    for r, (n, *box) in enumerate(rois.tolist()):
        if not all(abs(value * spatial_scale) < 2 ** 30 for value in box):                    # NaN, too
            continue
        x1, y1, x2, y2 = (int(c_round(value * spatial_scale)) for value in box)
        h, w = max(1, y2 - y1 + 1), max(1, x2 - x1 + 1)
        for p in range(output_size[0]):
            for q in range(output_size[1]):
                rows = range(max(0, y1 + p * h // output_size[0]), min(H, y1 - -(p + 1) * h // output_size[0]))
                columns = range(max(0, x1 + q * w // output_size[1]), min(W, x1 - -(q + 1) * w // output_size[1]))
                for c in range(C):
                    best = None
                    for i in rows:
                        for j in columns:
                            value = float(features[int(n), c, i, j])
                            if best is None or value > best or (math.isnan(value) and not math.isnan(best)):
                                best = value
                                output[r, c, p, q], argmax[r, c, p, q] = value, i * W + j
    return output, argmax


def test_by_hand(device):
    ramp = (10.0 * torch.arange(6)[:, None] + torch.arange(8))[None, None].to(device)          # value 10 y + x
    # rows 1..3, columns 2..6, both inclusive: bins of 1.5 x 2.5 pixels overlap, [1, 2] [2, 3] and [2..4] [4..6]
    assert ops.roi_pool(ramp, torch.tensor([[0, 2, 1, 6, 3.0]], device=device), 2).flatten().tolist() == [24, 26, 34, 36]
    # halves are rounded away from zero: 0.5 -> 1, 2.5 -> 3
    assert ops.roi_pool(ramp, torch.tensor([[0, 1, 1, 5, 5.0]], device=device), 1, 0.5).item() == 33
    # two thirds outside: the bins there have no pixels
    assert ops.roi_pool(ramp, torch.tensor([[0, -6, 0, 2, 0.0]], device=device), (1, 3)).flatten().tolist() == [0, 0, 2]
    leaf = ramp.clone().requires_grad_()
    ops.roi_pool(leaf, torch.tensor([[0, 2, 1, 6, 3.0], [0, 6, 3, 6, 3]], device=device), 1).sum().backward()
    assert leaf.grad[0, 0, 3, 6] == 2 and leaf.grad.sum() == 2
    # of equal pixels the first one has the gradient
    flat = torch.ones(1, 1, 4, 4, device=device).requires_grad_()
    ops.roi_pool(flat, torch.tensor([[0, 1, 1, 3, 3.0]], device=device), 1).sum().backward()
    assert flat.grad[0, 0, 1, 1] == 1 and flat.grad.sum() == 1
    two = torch.cat([ramp, -ramp])
    assert ops.roi_pool(two, [torch.zeros(0, 4, device=device), torch.tensor([[1, 1, 2, 2.0]], device=device)], 1).item() == -11
    rois = torch.tensor([[0, 2, 1, 6, 3.0]], device=device)
    assert torch.equal(ops.RoIPool((2, 2), 1.0)(ramp, rois), ops.roi_pool(ramp, rois, (2, 2), 1.0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_stored_torchvision(memory_format, device):
    x = STORED["x"].to(device).clone(memory_format=memory_format).requires_grad_()
    rois, scale = STORED["rois"], float(STORED["spatial_scale"])
    output = ops.roi_pool(x, rois.to(device), (3, 5), scale)
    grad = torch.from_numpy(numpy.random.RandomState(2).randn(*output.shape))
    output.backward(grad.to(device))
    same(output.cpu(), STORED["out"], 0, "ours and torchvision")
    same(x.grad.cpu(), STORED["grad_x"], 1e-14, "gradients")
    assert output.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)
    pooled, argmax = _extension.load_emulated().roi_pool(STORED["x"], rois, [3, 5], scale)
    same(pooled, STORED["out"], 0, "emulated")
    same(emulated_gradients(grad, argmax, rois, STORED["x"], scale), [STORED["grad_x"]] * 2, 1e-14, "emulated gradients")


def emulated_gradients(grad, argmax, rois, features, scale=0.5):
    """Of the atomic and of the deterministic CUDA backward."""
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            results.append(_extension.load_emulated().roi_pool_backward(grad, argmax, rois, features.shape[0], *features.shape[2:], scale,
                                                                        True))
        finally:
            torch.use_deterministic_algorithms(False)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("output_size", [(3, 2), (1, 1), (7, 7)])
def test_loop_definition(output_size, dtype):
    features, rois = problem(2, dtype)
    rois = torch.cat([rois[:10], rois[10:][[0, 1, 2, 3, 4, 5, 6, 9, 10, 12, 13, 14]]])          # the huge ones round in another way
    features[0, 0, 5, 6:9], features[1, 1, :3] = nan, -inf
    features[0, 1] = (features[0, 1] * 2).round()                                             # ties
    expected = roi_pool_loops(features, rois, output_size, 0.5)
    same(OP(features, rois, output_size, 0.5), expected, 0, "kernel and loops")
    same(roi_pool_reference(features, rois, output_size, 0.5), expected, 0, "reference and loops")
    same(_extension.load_emulated().roi_pool(features, rois, output_size, 0.5), expected, 0, "emulated and loops")


@pytest.mark.parametrize("channels", [1, 4, 30, 71])
def test_kernels_equal_the_reference(channels):
    features, rois = problem(channels)
    check_op(OP, roi_pool_reference, (features.requires_grad_(), rois, [3, 5], 0.5), gradients=True, opcheck=False)
    _, argmax = OP(features.detach(), rois, [3, 5], 0.5)
    grad = torch.randn(len(rois), channels, 3, 5)
    backward = (grad, argmax, rois, 2, 20, 24, 0.5, channels > 1)
    expected = roi_pool_backward_reference(*backward)
    same(BACKWARD(*backward), expected, what="gradient of the CPU kernel and of the reference")
    same(emulated_gradients(grad, argmax, rois, features), [expected] * 2, what="emulated gradients")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    features, rois = problem(16)
    halves = features.to(dtype)
    exact, argmax = roi_pool_reference(halves.float(), rois, [3, 5], 0.5)
    ours = _extension.load_emulated().roi_pool(halves, rois, [3, 5], 0.5)
    assert ours[0].dtype == dtype and torch.equal(ours[0].float(), exact) and torch.equal(ours[1], argmax)
    on_cpu = ops.roi_pool(halves, rois, (3, 5), 0.5)
    assert on_cpu.dtype == dtype and torch.equal(on_cpu.float(), exact)
    grad = torch.randn(len(rois), 16, 3, 5).to(dtype)
    expected = roi_pool_backward_reference(grad.float(), argmax, rois, 2, 20, 24, 0.5, True)
    for gradient in emulated_gradients(grad, argmax, rois, halves):
        allowed = torch.finfo(dtype).eps * expected.abs() * 0.51 + 1e-5
        assert gradient.dtype == dtype and ((gradient.float() - expected).abs() <= allowed).all()


def test_contract():
    """Derivatives in float64, opcheck, compile: on what a training step passes."""
    features, rois = problem(3, torch.float64, count=4, nasty=False, size=(6, 7))
    for form in (torch.contiguous_format, torch.channels_last):
        leaf = features.contiguous(memory_format=form).requires_grad_()
        check_op(OP, roi_pool_reference, (leaf, rois, [2, 3], 0.25), gradients=True, gradcheck=True, compiled=True)
    _, argmax = OP(features, rois, [2, 3], 0.25)
    grad = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    for last in (True, False):
        check_op(BACKWARD, roi_pool_backward_reference, (grad, argmax, rois, 2, 6, 7, 0.25, last), compiled=True, strides=False)


def test_compiles_and_exports_with_gradients():
    features, rois = problem(4, nasty=False)
    features.requires_grad_()
    compiled = torch.compile(lambda f, r: ops.roi_pool(f, [r[:5, 1:], r[5:, 1:]], 3, 0.5).square().sum(), fullgraph=True,
                             backend="aot_eager", dynamic=True)
    expected, = torch.autograd.grad(ops.roi_pool(features, [rois[:5, 1:], rois[5:, 1:]], 3, 0.5).square().sum(), features)
    same(torch.autograd.grad(compiled(features, rois), features)[0], expected)
    program = torch.export.export(ops.RoIPool(3, 0.5), (features.detach(), rois))
    same(program.module()(features.detach(), rois), ops.roi_pool(features, rois, 3, 0.5).detach())


@pytest.mark.parametrize("channels, count, output_size",
                         [(4, 0, (3, 5)), (1, 1, (1, 1)), (0, 3, (2, 2)), (5, 3, (1, 40)), (4, 2, (14, 14))])
def test_sizes(channels, count, output_size):
    for size in ((20, 24), (1, 1)):                                                           # a map of one pixel, too
        features, rois = problem(channels, count=count, nasty=False, size=size)
        check_op(OP, roi_pool_reference, (features, rois, output_size, 0.5), strides=count > 0)
        _, argmax = OP(features, rois, output_size, 0.5)
        grad = torch.randn(count, channels, *output_size)
        backward = (grad, argmax, rois, 2, *size, 0.5, True)
        check_op(BACKWARD, roi_pool_backward_reference, backward, strides=False)
        same(emulated_gradients(grad, argmax, rois, features), [roi_pool_backward_reference(*backward)] * 2)


def test_equal_bytes_on_any_number_of_threads():
    features, rois = problem(150, count=300)
    grad, threads, results = torch.randn(len(rois), 150, 7, 7), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaf = features.clone().requires_grad_()
            output = ops.roi_pool(leaf, rois, 7, 0.5)
            output.backward(grad)
            results.append((output.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_on_cuda(dtype, deterministic):
    """What the emulator cannot run: atomic adds that meet."""
    features, rois = problem(64)
    grad = torch.randn(len(rois), 64, 3, 5).to(dtype)
    _, argmax = OP(features, rois, [3, 5], 0.5)
    expected = roi_pool_backward_reference(grad.float(), argmax, rois, 2, 20, 24, 0.5, True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, second = (BACKWARD(grad.cuda(), argmax.cuda(), rois.cuda(), 2, 20, 24, 0.5, True) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.dtype == dtype and (torch.equal(first, second) or not deterministic)
    same(first.float().cpu(), expected, {torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps), "GPU and reference")


def test_a_picture_that_does_not_exist():
    features, _ = problem(4)
    for bad in ([2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [nan, 0, 0, 9, 9]):
        rois = torch.tensor([[0, 0, 0, 9, 9], bad], dtype=torch.float32)
        for call in (lambda: ops.roi_pool(features, rois, 2), lambda: roi_pool_reference(features, rois, [2, 2], 1.0)):
            with pytest.raises(ValueError, match="RoI 1 asks for picture"):
                call()
        output, argmax = _extension.load_emulated().roi_pool(features, rois, [2, 2], 1.0)      # a GPU cannot raise without waiting
        assert output[0].isfinite().all() and output[1].isnan().all() and (argmax[1] == -1).all()
        gradient, other = emulated_gradients(torch.ones(2, 4, 2, 2), argmax.clamp(min=0), rois, features, 1.0)
        assert gradient.isfinite().all() and other.isfinite().all() and not gradient[1].any()


def test_second_derivative_is_refused():
    features, rois = problem(2, nasty=False)
    gradient, = torch.autograd.grad(ops.roi_pool(features.requires_grad_(), rois, 2, 0.5).square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="roi_pool: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("call, message", [
    (lambda f, r: ops.roi_pool(f[0], r, 2), r"features \[N, C, H, W\]"),
    (lambda f, r: ops.roi_pool(f.long(), r, 2), "expected float features"),
    (lambda f, r: ops.roi_pool(f[:, :, :0], r, 2), "no pixels"),
    (lambda f, r: ops.roi_pool(f, r[:, 1:], 2), r"boxes \[R, 5\]"),
    (lambda f, r: ops.roi_pool(f, [r], 2), r"roi_pool: expected boxes .*\[R_n, 4\]"),
    (lambda f, r: ops.roi_pool(f, r, (2, 2, 2)), "output_size"),
    (lambda f, r: ops.roi_pool(f, r, 0), "output_size"),
    (lambda f, r: ops.roi_pool(f, r.to("meta"), 2), "boxes on meta"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem(2))


@pytest.mark.parametrize("namespace", ["minidamage", "minidamage_emulated"])
def test_the_bindings_protect_memory(namespace):
    """A direct call must not read or write outside, whatever argmax holds."""
    _extension.load_emulated()
    forward, backward = (getattr(getattr(torch.ops, namespace), op.__name__) for op in (OP, BACKWARD))
    features, rois = problem(nasty=False)
    grad, argmax = torch.ones(len(rois), 6, 3, 5), torch.zeros(len(rois), 6, 3, 5, dtype=torch.int32)
    for call, message in ((lambda: forward(features[0], rois, [3, 5], 0.5), "input must be"),
                          (lambda: forward(features, rois[:, :4], [3, 5], 0.5), "rois must be"),
                          (lambda: forward(features, rois, [3], 0.5), "output_size"),
                          (lambda: forward(features[:, :, :0], rois, [3, 5], 0.5), "pixels a picture"),
                          (lambda: forward(features.to(torch.float8_e4m3fn), rois, [3, 5], 0.5), "float32"),
                          (lambda: backward(grad[:3], argmax, rois, 2, 20, 24, 0.5, True), "grad must be"),
                          (lambda: backward(grad, argmax[:3], rois, 2, 20, 24, 0.5, True), "argmax must be"),
                          (lambda: backward(grad, argmax.long(), rois, 2, 20, 24, 0.5, True), "argmax must be"),
                          (lambda: backward(grad, argmax, rois, 2, -20, 24, 0.5, True), "pixels a picture")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
    for position in (-2 ** 31, -5, 20 * 24, 2 ** 31 - 1):
        assert not backward(grad, torch.full_like(argmax, position), rois, 2, 20, 24, 0.5, True).any()
