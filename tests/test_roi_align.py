"""RoIAlign against hand answers, its loop-form definition, stored torchvision results, and the CUDA kernels on the CPU."""
import math

import numpy
import pytest
import torch
from oracle import check_op, same, stored

from minidamage import ops
from minidamage.ops import _extension
from minidamage.ops.roi_align import roi_align_backward_reference, roi_align_reference

OP, BACKWARD = torch.ops.minidamage.multiscale_roi_align, torch.ops.minidamage.multiscale_roi_align_backward
STORED, STORED_LEVELS = stored("roi_align"), stored("multiscale_roi_align")
CASES = [str(name) for name in STORED["cases"]] + ["inverted_sr2_al1", "inverted_sr2_al0", "inverted_sr0_al0"]
nan, inf = math.nan, math.inf
# batch index, box: whole and partly outside, far outside, sub-pixel, no area, inverted, huge, not finite
NASTY = [[0, 2, 3, 30, 25], [1, -20, -10, 12, 9], [0, 40, 30, 80, 90], [1, 200, 200, 220, 220], [0, 10.2, 10.3, 10.6, 10.4],
         [1, 7, 7, 7, 7], [0, 30, 20, 4, 6], [1, -1e4, -1e4, 1e4, 1e4], [0, -1e30, 0, 1e30, 20], [1, nan, 1, 9, 9], [0, 1, 1, inf, 9],
         [1, -inf, -inf, inf, inf], [0, 0, 0, 48, 40], [1, -2.5, 37.5, 3, 45]]


def problem(channels=6, dtype=torch.float32, count=10, seed=0, size=(20, 24), nasty=True):
    """Features [2, C, H, W] and rois [R, 5] in picture pixels at scale 1/2."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, channels, *size, generator=generator, dtype=dtype)
    corner = torch.rand(count, 2, generator=generator) * 40 - 4
    boxes = torch.cat([torch.arange(count)[:, None] % 2, corner, corner + torch.rand(count, 2, generator=generator) * 30], 1)
    rois = torch.cat([boxes, torch.tensor(NASTY)]) if nasty else boxes
    return features, rois.to(torch.float64 if dtype == torch.float64 else torch.float32)


def arguments(features, rois, output_size=(3, 5), sampling_ratio=2, aligned=True):
    return [features], rois, torch.zeros(len(rois), dtype=torch.int64), list(output_size), [0.5], sampling_ratio, aligned


def roi_align_loops(features, rois, output_size, spatial_scale, sampling_ratio, aligned):
    """The definition, one sample at a time."""
    N, C, H, W = features.shape
    output = torch.zeros(len(rois), C, *output_size, dtype=features.dtype)
    for r, (n, *box) in enumerate(rois.tolist()):
        if not all(map(math.isfinite, box)):
            continue
        x1, y1, x2, y2 = (value * spatial_scale - (0.5 if aligned else 0) for value in box)
        size = [y2 - y1, x2 - x1] if aligned else [max(y2 - y1, 1), max(x2 - x1, 1)]
        bins = [size[0] / output_size[0], size[1] / output_size[1]]
        grid = [sampling_ratio if sampling_ratio > 0 else math.ceil(b) for b in bins]
        for p in range(output_size[0]):
            for q in range(output_size[1]):
                for i in range(grid[0]):
                    for j in range(grid[1]):
                        y, x = y1 + bins[0] * (p + (i + 0.5) / grid[0]), x1 + bins[1] * (q + (j + 0.5) / grid[1])
                        if y < -1 or y > H or x < -1 or x > W:
                            continue
                        y, x = min(max(y, 0), H - 1), min(max(x, 0), W - 1)
                        top, left = math.floor(y), math.floor(x)
                        for row, weight_y in ((top, 1 - (y - top)), (min(top + 1, H - 1), y - top)):
                            for column, weight_x in ((left, 1 - (x - left)), (min(left + 1, W - 1), x - left)):
                                output[r, :, p, q] += weight_y * weight_x * features[int(n), :, row, column] / max(grid[0] * grid[1], 1)
    return output


def test_by_hand(device):
    ramp = (10.0 * torch.arange(6)[:, None] + torch.arange(8))[None, None].to(device)          # value 10 y + x: bilinear is exact
    roi = torch.tensor([[0, 2, 1, 6, 3.0]], device=device)
    # old form: bins of 1 x 2 pixels from (1, 2), centres at y = 1.5, 2.5 and x = 3, 5
    assert ops.roi_align(ramp, roi, 2, 1.0, 2).flatten().tolist() == [18, 20, 28, 30]
    # aligned: everything half a pixel up and left, 5.5 less
    assert ops.roi_align(ramp, roi, 2, 1.0, 2, aligned=True).flatten().tolist() == [12.5, 14.5, 22.5, 24.5]
    assert ops.roi_align(ramp, roi * torch.tensor([1, 4, 4, 4, 4], device=device), 2, 0.25, 2).flatten().tolist() == [18, 20, 28, 30]
    # one sample, at (-0.75, -0.75): within a pixel of the border, takes the corner; at (-1.25, ...) it is outside
    assert ops.roi_align(ramp + 7, torch.tensor([[0, -1.25, -1.25, -0.25, -0.25]], device=device), 1, 1.0, 1).item() == 7
    assert ops.roi_align(ramp + 7, torch.tensor([[0, -1.75, -1.25, -0.75, -0.25]], device=device), 1, 1.0, 1).item() == 0
    # a list of boxes, one tensor for each picture
    two = torch.cat([ramp, -ramp])
    assert ops.roi_align(two, [roi[:0, 1:], roi[:, 1:]], 2, 1.0, 2).flatten().tolist() == [-18, -20, -28, -30]
    assert torch.equal(ops.RoIAlign((2, 2), 1.0, 2)(ramp, roi), ops.roi_align(ramp, roi, (2, 2), 1.0, 2))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_stored_torchvision(case, memory_format, device):
    settings = case.split("_")
    sampling_ratio, aligned = int(settings[1][2:]), settings[2] == "al1"
    output_size = (3, 5) if settings[0] == "inverted" else tuple(map(int, settings[0][1:].split("x")))
    rois = STORED["rois_inverted" if settings[0] == "inverted" else "rois"]
    x = STORED["x"].to(device).clone(memory_format=memory_format).requires_grad_()
    output = ops.roi_align(x, rois.to(device), output_size, float(STORED["spatial_scale"]), sampling_ratio, aligned)
    grad = torch.from_numpy(numpy.random.RandomState(2).randn(*output.shape))
    output.backward(grad.to(device))
    same(output.cpu(), STORED[f"{case}_out"], 1e-12, "ours and torchvision")
    same(x.grad.cpu(), STORED[f"{case}_grad_x"], 1e-12, "gradients")
    assert output.is_contiguous(memory_format=memory_format) and x.grad.is_contiguous(memory_format=memory_format)
    kernels = _extension.load_emulated()
    levels = torch.zeros(len(rois), dtype=torch.int64)
    geometry = ([float(STORED["spatial_scale"])], sampling_ratio, aligned)
    same(kernels.multiscale_roi_align([STORED["x"]], rois, levels, output_size, *geometry), STORED[f"{case}_out"], 1e-12, "emulated")
    same(emulated_gradients(grad, rois, levels, [STORED["x"]], geometry), [STORED[f"{case}_grad_x"]] * 2, 1e-12, "emulated gradients")


def emulated_gradients(grad, rois, levels, features, geometry):
    """Of the atomic and of the deterministic CUDA backward, all levels of one after all levels of the other."""
    kernels = _extension.load_emulated()
    results = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            results += kernels.multiscale_roi_align_backward(grad, rois, levels, features[0].shape[0], [f.shape[2] for f in features],
                                                             [f.shape[3] for f in features], *geometry, True)
        finally:
            torch.use_deterministic_algorithms(False)
    return results


@pytest.mark.parametrize("scale", ["cs224", "cs56"])
def test_stored_torchvision_pyramid(scale, device):
    features = [STORED_LEVELS[f"f{l}"].to(device).clone().requires_grad_() for l in range(4)]
    boxes = [STORED_LEVELS["boxes0"], STORED_LEVELS["boxes1"]]
    rois = torch.cat([torch.cat([torch.full((len(b), 1), float(n), dtype=b.dtype), b], 1) for n, b in enumerate(boxes)])
    levels, scales = STORED_LEVELS[f"{scale}_levels"], STORED_LEVELS[f"{scale}_scales"].tolist()
    output = ops.multiscale_roi_align(features, rois.to(device), levels.to(device), 7, scales, 2)
    grad = torch.from_numpy(numpy.random.RandomState(4).randn(*output.shape))
    output.backward(grad.to(device))
    same(output.cpu(), STORED_LEVELS[f"{scale}_out"], 1e-12, "ours and torchvision")
    expected = [STORED_LEVELS[f"{scale}_grad_f{l}"] for l in range(4)]
    same([feature.grad.cpu() for feature in features], expected, 1e-12, "gradients")
    plain = [feature.detach().cpu() for feature in features]
    check_op(OP, roi_align_reference, (plain, rois, levels, [7, 7], scales, 2, False), opcheck=False)
    same(emulated_gradients(grad, rois, levels, plain, (scales, 2, False)), expected * 2, 1e-12, "emulated gradients")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 3])
def test_loop_definition(sampling_ratio, aligned):
    features, rois = problem(2, torch.float64, nasty=False)
    rois = torch.cat([rois, torch.tensor(NASTY)[[1, 2, 3, 4, 5, 6, 9, 10, 13]].double()])
    expected = roi_align_loops(features, rois, (3, 2), 0.5, sampling_ratio, aligned)
    same(ops.roi_align(features, rois, (3, 2), 0.5, sampling_ratio, aligned), expected, 1e-12, "kernel and loops")
    same(roi_align_reference(*arguments(features, rois, (3, 2), sampling_ratio, aligned)), expected, 1e-12, "reference and loops")


@pytest.mark.parametrize("channels", [1, 4, 30, 71])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_kernels_equal_the_reference(channels, sampling_ratio, aligned):
    features, rois = problem(channels)
    check_op(OP, roi_align_reference, arguments(features.requires_grad_(), rois, (3, 5), sampling_ratio, aligned), gradients=True,
             opcheck=False)
    grad = torch.randn(len(rois), channels, 3, 5)
    backward = (grad, rois, torch.zeros(len(rois), dtype=torch.int64), 2, [20], [24], [0.5], sampling_ratio, aligned, channels > 1)
    expected = roi_align_backward_reference(*backward)
    same(BACKWARD(*backward), expected, what="gradient of the CPU kernel and of the reference")
    same(emulated_gradients(grad, rois, backward[2], [features], ([0.5], sampling_ratio, aligned)), expected * 2, what="emulated gradients")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """CUDA kernels take half types and add up in float32: equal to the float32 result, rounded once."""
    features, rois = problem(16)
    halves, levels = features.to(dtype), torch.zeros(len(rois), dtype=torch.int64)
    exact = roi_align_reference(*arguments(halves.float(), rois))
    ours = _extension.load_emulated().multiscale_roi_align(*arguments(halves, rois))
    assert ours.dtype == dtype and ((ours.float() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 0.51 + 1e-6).all()
    grad = torch.randn(len(rois), 16, 3, 5).to(dtype)
    expected, = roi_align_backward_reference(grad.float(), rois, levels, 2, [20], [24], [0.5], 2, True, True)
    for ours in emulated_gradients(grad, rois, levels, [halves], ([0.5], 2, True)):
        assert ours.dtype == dtype and ((ours.float() - expected).abs() <= torch.finfo(dtype).eps * expected.abs() * 0.51 + 1e-5).all()
    on_cpu = ops.roi_align(halves, rois, (3, 5), 0.5, 2, True)
    assert on_cpu.dtype == dtype and torch.equal(on_cpu, ops.roi_align(halves.float(), rois, (3, 5), 0.5, 2, True).to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("channels", [30, 64])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_on_cuda(dtype, deterministic, channels):
    """What the emulator cannot run: atomic adds that meet, and on sm_90 four of them in one instruction."""
    features, rois = problem(channels)
    grad, levels = torch.randn(len(rois), channels, 3, 5).to(dtype), torch.zeros(len(rois), dtype=torch.int64)
    geometry = (2, [20], [24], [0.5], 2, True, True)
    expected, = roi_align_backward_reference(grad.float(), rois, levels, *geometry)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, second = (BACKWARD(grad.cuda(), rois.cuda(), levels.cuda(), *geometry)[0] for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert first.dtype == dtype and (torch.equal(first, second) or not deterministic)
    same(first.float().cpu(), expected, {torch.float32: 2e-5}.get(dtype, torch.finfo(dtype).eps), "GPU and reference")


def test_autocast_on_a_cpu_gives_float32():
    features, rois = problem(8)
    features.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ops.roi_align(torch.nn.functional.conv2d(features, torch.randn(4, 8, 1, 1)), rois, 3, 0.5, 2)
    assert output.dtype == torch.float32
    output.sum().backward()
    assert features.grad.isfinite().all()


def test_contract():
    """Derivatives in float64, opcheck, compile: on what a training step passes."""
    features, rois = problem(3, torch.float64, count=4, nasty=False, size=(6, 7))
    pyramid = [features.requires_grad_(), torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)]
    for sampling_ratio, aligned in ((2, False), (0, True)):
        check_op(OP, roi_align_reference, (pyramid, rois, torch.tensor([0, 1, 1, 0]), [2, 3], [0.5, 0.25], sampling_ratio, aligned),
                 gradients=True, gradcheck=True, compiled=True)
    grad = torch.randn(4, 3, 2, 3, dtype=torch.float64)
    for channels_last in (True, False):
        check_op(BACKWARD, roi_align_backward_reference, (grad, rois, torch.tensor([0, 1, 1, 0]), 2, [6, 3], [7, 4], [0.5, 0.25], 2, True,
                                                          channels_last), compiled=True)


def test_compiles_and_exports_with_gradients():
    features, rois = problem(4, nasty=False)
    features.requires_grad_()
    compiled = torch.compile(lambda f, r: ops.roi_align(f, [r[:5, 1:], r[5:, 1:]], 3, 0.5, 2).square().sum(), fullgraph=True,
                             backend="aot_eager", dynamic=True)
    expected, = torch.autograd.grad(ops.roi_align(features, [rois[:5, 1:], rois[5:, 1:]], 3, 0.5, 2).square().sum(), features)
    same(torch.autograd.grad(compiled(features, rois), features)[0], expected)
    program = torch.export.export(ops.RoIAlign(3, 0.5, 2), (features.detach(), rois))
    same(program.module()(features.detach(), rois), ops.roi_align(features, rois, 3, 0.5, 2).detach())


@pytest.mark.parametrize("channels, count, output_size",
                         [(4, 0, (3, 5)), (1, 1, (1, 1)), (0, 3, (2, 2)), (5, 3, (1, 40)), (4, 2, (14, 14))])
def test_sizes(channels, count, output_size):
    features, rois = problem(channels, count=count, nasty=False)
    check_op(OP, roi_align_reference, arguments(features, rois, output_size))
    grad, levels = torch.randn(count, channels, *output_size), torch.zeros(count, dtype=torch.int64)
    for size in ((20, 24), (1, 1)):                                                   # a level of one pixel, too
        backward = (grad, rois, levels, 2, [size[0]], [size[1]], [0.5], 2, True, True)
        check_op(BACKWARD, roi_align_backward_reference, backward, strides=False)
        same(emulated_gradients(grad, rois, levels, [features[:, :, :size[0], :size[1]]], ([0.5], 2, True)),
             roi_align_backward_reference(*backward) * 2)
    check_op(OP, roi_align_reference, arguments(features[:, :, :1, :1], rois, output_size), opcheck=False)


def test_many_taps_a_bin():
    """Adaptive bins wider than the CUDA kernels' table of taps (16 pixels): they go sample by sample."""
    features = torch.randn(1, 4, 50, 60)
    rois = torch.tensor([[0, 1, 2, 110, 95], [0, -1e3, 4, 1e3, 30], [0, 60, 1, 70, 99.0]])
    check_op(OP, roi_align_reference, arguments(features, rois, (2, 2), 0), opcheck=False)
    grad, levels = torch.randn(3, 4, 2, 2), torch.zeros(3, dtype=torch.int64)
    expected = roi_align_backward_reference(grad, rois, levels, 1, [50], [60], [0.5], 0, True, True)
    same(emulated_gradients(grad, rois, levels, [features], ([0.5], 0, True)), expected * 2)


def test_a_huge_box_takes_no_longer_than_the_picture():
    features, _ = problem(4)
    rois = torch.tensor([[0, -1e9, -1e9, 1e9, 1e9], [1, -1e36, -1e36, 1e36, 1e36], [1, 0, 0, 3e38, 3e38]], dtype=torch.float64)
    check_op(OP, roi_align_reference, arguments(features.double(), rois, (7, 7), 0), opcheck=False)
    check_op(OP, roi_align_reference, arguments(features, rois[1:].float(), (7, 7), 0), opcheck=False)
    assert ops.roi_align(features, rois.float(), 7, 0.5).abs().max() < 5              # float32 cannot place these samples, but stays sane


def test_equal_bytes_on_any_number_of_threads():
    features, rois = problem(64, count=300)
    grad, threads = torch.randn(len(rois), 64, 7, 7), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            leaf = features.clone().requires_grad_()
            output = ops.roi_align(leaf, rois, 7, 0.5, 2)
            output.backward(grad)
            results.append((output.detach(), leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for output, gradient in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(gradient, results[0][1])


def test_a_picture_that_does_not_exist():
    features, _ = problem(4)
    for bad in ([2, 0, 0, 9, 9], [-1, 0, 0, 9, 9], [nan, 0, 0, 9, 9]):
        rois = torch.tensor([[0, 0, 0, 9, 9], bad], dtype=torch.float32)
        with pytest.raises(ValueError, match="RoI 1 asks for picture"):
            ops.roi_align(features, rois, 2)
        with pytest.raises(ValueError, match="RoI 1 asks for picture"):
            roi_align_reference(*arguments(features, rois))
        output = _extension.load_emulated().multiscale_roi_align(*arguments(features, rois))
        assert output[0].isfinite().all() and output[1].isnan().all()                 # a GPU cannot raise without waiting


def test_second_derivative_is_refused():
    features, rois = problem(2, nasty=False)
    gradient, = torch.autograd.grad(ops.roi_align(features.requires_grad_(), rois, 2, 0.5, 2).square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="roi_align: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("call, message", [
    (lambda f, r: ops.roi_align(f[0], r, 2), r"features \[N, C, H, W\]"),
    (lambda f, r: ops.roi_align(f.long(), r, 2), "expected float features"),
    (lambda f, r: ops.roi_align(f[:, :, :0], r, 2), "no pixels"),
    (lambda f, r: ops.roi_align(f, r[:, 1:], 2), r"rois \[R, 5\]"),
    (lambda f, r: ops.roi_align(f, [r], 2), r"\[R_n, 4\]"),
    (lambda f, r: ops.roi_align(f, r, (2, 2, 2)), "output_size"),
    (lambda f, r: ops.roi_align(f, r, 0), "output_size"),
    (lambda f, r: ops.roi_align(f, r, 2, sampling_ratio=2 ** 40), "sampling_ratio of at most 256"),
    (lambda f, r: ops.multiscale_roi_align([f, f], r, torch.zeros(len(r), dtype=torch.int64), 2, [1.0]), "spatial_scales"),
    (lambda f, r: ops.multiscale_roi_align([f], r, torch.zeros(len(r)), 2, [1.0]), r"levels \[24\] int64"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem(2))


@pytest.mark.parametrize("namespace", ["minidamage", "minidamage_emulated"])
def test_the_bindings_protect_memory(namespace):
    """The public functions check first; a direct call of the ops must not read outside either."""
    _extension.load_emulated()
    forward, backward = (getattr(getattr(torch.ops, namespace), op.__name__) for op in (OP, BACKWARD))
    features, rois = problem(nasty=False)
    levels, grad = torch.zeros(len(rois), dtype=torch.int64), torch.zeros(len(rois), 6, 3, 5)
    for call, message in ((lambda: forward([], rois, levels, [3, 5], [], 2, True), "no features"),
                          (lambda: forward([features], rois, levels, [3], [0.5], 2, True), "output_size"),
                          (lambda: forward([features.to(torch.float8_e4m3fn)], rois, levels, [3, 5], [0.5], 2, True), "float32"),
                          (lambda: backward(grad[:3], rois, levels, 2, [20], [24], [0.5], 2, True, False), "grad must be"),
                          (lambda: backward(grad, rois, levels, 2, [20], [], [0.5], 2, True, False), "widths"),
                          (lambda: backward(grad, rois, levels, 2, [20], [0], [0.5], 2, True, False), "pixels a side"),
                          (lambda: forward([features], rois, levels, [3, 5], [0.5], 257, True), "sampling_ratio must be at most 256"),
                          (lambda: backward(grad, rois, levels, 2 ** 50, [20], [24], [0.5], 2, True, False), "no memory")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
