"""Box coding against hand answers, stored torchvision results, its reference, and the CUDA kernels on the CPU."""
import math

import pytest
import torch
from oracle import check_op, same, stored

from minidamage import ops
from minidamage.ops import _extension
from minidamage.ops.box_coding import (BBOX_XFORM_CLIP, decode_boxes_backward_reference, decode_boxes_reference, encode_boxes_reference)

ENCODE, DECODE, BACKWARD = (getattr(torch.ops.minidamage, name) for name in ("encode_boxes", "decode_boxes", "decode_boxes_backward"))
STORED = stored("box_coder")
W10, W1 = [10.0, 10.0, 5.0, 5.0], [1.0, 1.0, 1.0, 1.0]
CLIP = BBOX_XFORM_CLIP
nan, inf = math.nan, math.inf


def boxes_of(*shape, dtype=torch.float32, seed=1):
    """Boxes of 4 to 60 pixels, some of them partly or wholly outside a picture of 100 x 80."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(*shape, 2, generator=generator, dtype=dtype) * 160 - 40
    return torch.cat([corner, corner + 4 + torch.rand(*shape, 2, generator=generator, dtype=dtype) * 56], -1)


def deltas_of(*shape, dtype=torch.float32):
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(2), dtype=dtype)


def test_by_hand(device):
    boxes = torch.tensor([[0.0, 0, 10, 20]], device=device)                                  # centre (5, 10), 10 x 20
    deltas = torch.tensor([[1.0, 0.5, 5 * math.log(2), 0]], device=device)
    moved = ops.decode_boxes(deltas, boxes, (1, 0.5, 5, 5))                                  # centre (15, 30), 20 x 20
    same(moved, torch.tensor([[5.0, 20, 25, 40]], device=device))
    same(ops.decode_boxes(deltas, boxes, (1, 0.5, 5, 5), size=(30, 22)), torch.tensor([[5.0, 20, 22, 30]], device=device))
    same(ops.encode_boxes(moved, boxes, (1, 0.5, 5, 5)), deltas)
    wild = ops.decode_boxes(torch.full((1, 4), 100.0, device=device), boxes, size=(5000, 5000))
    assert wild.tolist()[0][::2] == pytest.approx([1005 - 312.5, 1005 + 312.5])              # 62.5 times as wide
    # d x1 / d d_x = w_a / w_x; d x1 / d d_w = -w / 2 / w_w; the far edge is cut, so y2 gives nothing
    leaf = deltas.clone().requires_grad_()
    ops.decode_boxes(leaf, boxes, (1, 0.5, 5, 5), size=(30, 22)).backward(torch.tensor([[1.0, 1, 1, 1]], device=device))
    same(leaf.grad, torch.tensor([[10.0, 40, -2, -2]], device=device))


@pytest.mark.parametrize("case, weights", [("w10", W10), ("w1", W1)])
def test_stored_torchvision(case, weights, device):
    put = {key: value.to(device) for key, value in STORED.items() if isinstance(value, torch.Tensor)}
    assert float(STORED["bbox_xform_clip"]) == CLIP
    emulated = _extension.load_emulated()
    same(ops.encode_boxes(put["reference"], put["proposals"], weights).cpu(), STORED[f"{case}_encode"], 1e-12)
    same(ops.decode_boxes(put["codes"], put["proposals"], weights).cpu(), STORED[f"{case}_decode"], 1e-12)
    three = ops.decode_boxes(put["codes3"].unflatten(1, (3, 4)), put["proposals"][:, None], weights)
    same(three.flatten(1).cpu(), STORED[f"{case}_decode3"], 1e-12)
    same(emulated.encode_boxes(STORED["reference"], STORED["proposals"], weights), STORED[f"{case}_encode"], 1e-12)
    same(emulated.decode_boxes(STORED["codes"], STORED["proposals"], weights, CLIP, None), STORED[f"{case}_decode"], 1e-12)


@pytest.mark.parametrize("weights", [W10, W1, [10.0, 8.0, 5.0, 2.5]])
def test_equals_the_reference(weights):
    for shape in ((1,), (7,), (3, 5), (), (2, 3, 4)):
        boxes = boxes_of(*shape)
        check_op(ENCODE, encode_boxes_reference, (boxes_of(*shape, seed=3), boxes, weights), opcheck=False)
        for size in (None, [100, 80]):
            deltas = deltas_of(*shape).requires_grad_()
            check_op(DECODE, decode_boxes_reference, (deltas, boxes, weights, CLIP, size), gradients=True, opcheck=False)
            check_op(BACKWARD, decode_boxes_backward_reference, (deltas_of(*shape) * 3, deltas.detach(), boxes, weights, CLIP, size),
                     opcheck=False)


@pytest.mark.parametrize("of_deltas, of_boxes", [((5, 3), (5, 1)), ((2, 5), (5,)), ((2, 5), (1, 5)), ((4, 3, 5), (4, 1, 5)),
                                                 ((4, 3, 5), (3, 1)), ((2, 3, 4, 5), (2, 1, 4, 1)), ((6,), (1,)), ((0, 3), (0, 1)),
                                                 ((3,), ())])
def test_one_box_for_many_deltas(of_deltas, of_boxes):
    """By the public function also the other way round, many boxes for one delta; gradients are summed over what was repeated."""
    deltas, boxes = deltas_of(*of_deltas).requires_grad_(), boxes_of(*of_boxes)
    check_op(DECODE, decode_boxes_reference, (deltas, boxes, W10, CLIP, [100, 80]), gradients=bool(deltas.numel()), opcheck=False)
    check_op(BACKWARD, decode_boxes_backward_reference, (deltas_of(*of_deltas) * 2, deltas.detach(), boxes, W10, CLIP, None), opcheck=False)
    check_op(ENCODE, encode_boxes_reference, (boxes_of(*of_deltas), boxes, W10), opcheck=False)
    few, many = deltas_of(*of_boxes).requires_grad_(), boxes_of(*of_deltas)
    moved = ops.decode_boxes(few, many, W10)
    expected = decode_boxes_reference(few, many, W10, CLIP, None)
    same(moved, expected)
    grad = torch.randn_like(moved)
    same(torch.autograd.grad(moved, few, grad), torch.autograd.grad(expected, few, grad), 1e-5)


def test_views_are_read_in_place():
    """Boxes inside RoIs, the classes without the background, transposed and reversed order: the bytes of the copies."""
    for T in (torch.float32, torch.float64):
        rois = torch.cat([torch.zeros(20, 1, dtype=T), boxes_of(20, dtype=T)], 1)
        deltas, grad = deltas_of(20, 4, dtype=T), deltas_of(20, 3, dtype=T)
        views = (deltas[:, 1:], rois[:, None, 1:]), (deltas.transpose(0, 1), rois[:, 1:]), (deltas[::2, ::3], rois[::2, None, 1:])
        for some, boxes in views:
            copies = some.contiguous(), boxes.expand(some.shape).contiguous()
            for kernels in (torch.ops.minidamage, _extension.load_emulated()):
                moved = kernels.decode_boxes(some, boxes, W10, CLIP, [100, 80])
                assert torch.equal(moved, kernels.decode_boxes(*copies, W10, CLIP, [100, 80])) and moved.is_contiguous()
                assert torch.equal(kernels.encode_boxes(moved, boxes, W10), kernels.encode_boxes(moved, copies[1], W10))
        # a gradient that is one number, as that of a sum is, and one that starts off a 16-byte boundary
        for slope in (torch.ones((), dtype=T).expand(20, 3, 4), torch.cat([grad.new_zeros(1), grad.flatten()])[1:].view_as(grad)):
            for kernels in (torch.ops.minidamage, _extension.load_emulated()):
                same(kernels.decode_boxes_backward(slope, deltas[:, 1:], rois[:, None, 1:], W10, CLIP, None),
                     kernels.decode_boxes_backward(slope.clone(), deltas[:, 1:].clone(), rois[:, None, 1:].clone(), W10, CLIP, None), 0)


def test_rounds_as_the_reference_does():
    """Centres to the last bit where the size is not in the result, sizes within 2 units in the last place of e^x, logarithms of log x."""
    boxes, deltas = boxes_of(4001), deltas_of(4001)
    eps = torch.finfo(torch.float32).eps
    codes, expected = ops.encode_boxes(boxes_of(4001, seed=3), boxes, W10), encode_boxes_reference(boxes_of(4001, seed=3), boxes, W10)
    assert torch.equal(codes[:, :2], expected[:, :2])
    assert ((codes - expected).abs() <= 4 * eps * (expected.abs() + 1e-3)).all()
    at_rest = ops.decode_boxes(torch.cat([deltas[:, :2], torch.zeros(4001, 2)], 1), boxes, W10, size=(100, 80))
    assert torch.equal(at_rest, decode_boxes_reference(torch.cat([deltas[:, :2], torch.zeros(4001, 2)], 1), boxes, W10, CLIP, (100, 80)))
    moved, exact = ops.decode_boxes(deltas, boxes, W1), decode_boxes_reference(deltas.double(), boxes.double(), W1, CLIP, None)
    room = exact.abs().amax(1, keepdim=True) + (exact[:, 2:] - exact[:, :2]).amax(1, keepdim=True)
    assert ((moved - exact).abs() <= 4 * eps * room).all()


def test_sizes_that_fill_blocks():
    """Several blocks of 128 boxes and several threads on the CPU, several blocks on a GPU; and the 64-bit indices are the same op."""
    for count in (127, 129, 1000, 20_001):
        deltas, boxes = deltas_of(count), boxes_of(count)
        check_op(DECODE, decode_boxes_reference, (deltas, boxes, W10, CLIP, [100, 80]), opcheck=False, strides=False)
        check_op(BACKWARD, decode_boxes_backward_reference, (boxes / 50, deltas, boxes, W10, CLIP, None), opcheck=False, strides=False)
        check_op(ENCODE, encode_boxes_reference, (boxes.flip(0), boxes, W10), opcheck=False, strides=False)
    deltas, boxes = deltas_of(701, 9), boxes_of(701, 1)
    check_op(DECODE, decode_boxes_reference, (deltas, boxes, W10, CLIP, [100, 80]), opcheck=False)


def test_equal_bytes_on_any_number_of_threads():
    deltas, boxes, threads, results = deltas_of(30_001), boxes_of(30_001), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([DECODE(deltas, boxes, W10, CLIP, [100, 80]), ENCODE(boxes.flip(0), boxes, W10),
                            BACKWARD(boxes, deltas, boxes, W10, CLIP, None)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_odd_boxes_and_deltas():
    """NaN, infinite, empty, inverted; deltas above the clip. As the reference, in value and gradient."""
    odd = [[0.0, 0, 10, 10], [nan, 0, 5, 5], [0, 0, inf, 9], [9, 9, 1, 1], [4, 4, 4, 4], [-1e30, 0, 1e30, 5], [-50, -50, -40, -40]]
    moves = [[0.0, 0, 0, 0], [nan, 0, 0, nan], [0, inf, inf, -inf], [1, 1, 4.2, 4.0], [0, 0, -200, 300], [1e30, -1e30, 0, 0]]
    boxes, deltas = torch.tensor(odd)[:, None], torch.tensor(moves)[None].expand(len(odd), -1, -1)
    for size in (None, [100, 80]):
        for kernels in (torch.ops.minidamage, _extension.load_emulated()):
            same(kernels.decode_boxes(deltas, boxes, W1, CLIP, size), decode_boxes_reference(deltas, boxes, W1, CLIP, size), 1e-6)
            grad = torch.ones(deltas.shape)
            same(kernels.decode_boxes_backward(grad, deltas, boxes, W1, CLIP, size),
                 decode_boxes_backward_reference(grad, deltas, boxes, W1, CLIP, size), 1e-6)
    flat = torch.tensor(odd)
    for kernels in (torch.ops.minidamage, _extension.load_emulated()):
        same(kernels.encode_boxes(flat[:, None].expand(-1, 7, -1), flat, W10), encode_boxes_reference(flat[:, None], flat, W10), 1e-6)


def test_contract():
    """Derivatives in float64, opcheck, compile."""
    deltas, boxes = deltas_of(6, dtype=torch.float64), boxes_of(6, dtype=torch.float64)
    for weights, size in ((W10, None), (W1, [100, 80])):
        check_op(DECODE, decode_boxes_reference, (deltas.requires_grad_(), boxes, weights, CLIP, size), gradients=True, gradcheck=True,
                 compiled=True)
        check_op(BACKWARD, decode_boxes_backward_reference, (boxes / 9, deltas.detach(), boxes, weights, CLIP, size), compiled=True)
        check_op(ENCODE, encode_boxes_reference, (boxes.flip(0), boxes, weights), compiled=True)
    torch.library.opcheck(DECODE.default, (deltas_of(3, 5)[:, 1:].requires_grad_(), boxes_of(3, 1), W10, CLIP, [100, 80]))


def test_compiles_and_exports_with_gradients():
    deltas, boxes, truth = deltas_of(6, 3).requires_grad_(), boxes_of(6), boxes_of(6, seed=3)

    def loss(deltas, boxes, truth):
        moved = ops.decode_boxes(deltas, boxes[:, None], W10, size=(100, 80))
        return moved.pow(2).mean() + ops.encode_boxes(truth, boxes, W10).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    same(torch.autograd.grad(compiled(deltas, boxes, truth), deltas), torch.autograd.grad(loss(deltas, boxes, truth), deltas))

    class Decode(torch.nn.Module):
        def forward(self, deltas, boxes):
            return ops.decode_boxes(deltas, boxes[:, None], W10, size=(100, 80))

    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(Decode(), (deltas.detach(), boxes), dynamic_shapes=({0: rows}, {0: rows}))
    more = deltas_of(11, 3), boxes_of(11)
    same(program.module()(*more), Decode()(*more))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Computed in float32, rounded once; narrow deltas of float32 boxes give float32 boxes, on a GPU without a copy of them."""
    deltas, boxes = deltas_of(40).to(dtype), boxes_of(40)
    exact = decode_boxes_reference(deltas.float(), boxes, W10, CLIP, [100, 80])
    assert ops.decode_boxes(deltas, boxes, W10, size=(100, 80)).dtype == torch.float32
    same(ops.decode_boxes(deltas, boxes, W10, size=(100, 80)), exact, 1e-6)
    emulated = _extension.load_emulated()
    same(emulated.decode_boxes(deltas, boxes, W10, CLIP, [100, 80]), exact, 1e-6)
    gradient = emulated.decode_boxes_backward(boxes, deltas, boxes, W10, CLIP, None)
    assert gradient.dtype == dtype
    same(gradient, decode_boxes_backward_reference(boxes, deltas.float(), boxes, W10, CLIP, None).to(dtype), 1e-2)
    narrow = boxes.to(dtype)
    assert torch.equal(ops.decode_boxes(deltas, narrow, W10), ops.decode_boxes(deltas.float(), narrow.float(), W10).to(dtype))
    codes = ops.encode_boxes(narrow.flip(0).float(), narrow.float(), W10)
    assert torch.equal(ops.encode_boxes(narrow.flip(0), narrow, W10), codes.to(dtype))
    leaf = deltas.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ops.decode_boxes(leaf, boxes, W10).sum().backward()
    assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()
    assert ops.decode_boxes(deltas.double(), boxes, W10).dtype == torch.float64
    same(ops.decode_boxes(deltas.float(), boxes.long(), W10), decode_boxes_reference(deltas.float(), boxes.long().float(), W10, CLIP, None))


def test_gradients_of_the_other_arguments():
    """Boxes, and both arguments of encode_boxes: the plain form runs."""
    deltas, boxes = deltas_of(4, dtype=torch.float64), boxes_of(4, dtype=torch.float64).requires_grad_()
    others = boxes_of(4, dtype=torch.float64, seed=3)
    assert torch.autograd.gradcheck(lambda boxes: ops.decode_boxes(deltas, boxes, W1), boxes)
    assert torch.autograd.gradcheck(lambda boxes: ops.encode_boxes(others, boxes, W1), boxes)
    assert torch.autograd.gradcheck(lambda boxes: ops.encode_boxes(boxes, others, W1), boxes)


def test_derivatives_that_are_refused():
    deltas, boxes = deltas_of(4).requires_grad_(), boxes_of(4).requires_grad_()
    gradient, = torch.autograd.grad(ops.decode_boxes(deltas, boxes.detach(), W1).pow(2).sum(), deltas, create_graph=True)
    with pytest.raises(RuntimeError, match="decode_boxes: second derivatives"):
        gradient.sum().backward()
    for call, message in ((lambda: DECODE(deltas, boxes, W1, CLIP, None), "with respect to boxes"),
                          (lambda: ENCODE(boxes, boxes, W1), "encode_boxes: derivatives")):
        with pytest.raises(RuntimeError, match=message):
            call().sum().backward()


def test_empty_and_meta():
    for shape in ((0,), (0, 3), (3, 0), (0, 0)):
        deltas, boxes = torch.zeros(*shape, 4, requires_grad=True), torch.zeros(*shape, 4)
        moved = ops.decode_boxes(deltas, boxes, W10, size=(10, 10))
        moved.sum().backward()
        assert moved.shape == deltas.grad.shape == ops.encode_boxes(boxes, boxes, W10).shape == boxes.shape
        check_op(DECODE, decode_boxes_reference, (deltas, boxes, W10, CLIP, None))
    deltas = torch.zeros(5, 3, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    moved = ops.decode_boxes(deltas, torch.zeros(5, 1, 4, device="meta"), W10, size=(10, 10))
    moved.sum().backward()
    assert moved.is_meta and moved.shape == deltas.shape and moved.dtype == torch.float32 and deltas.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("call, message", [
    (lambda d, b: ops.decode_boxes([0], b), "expected bbox_deltas as a tensor, got list"),
    (lambda d, b: ops.decode_boxes(d.flatten(1), b), r"expected bbox_deltas \[..., 4\] of real numbers, got \[3, 8\].*unflatten"),
    (lambda d, b: ops.decode_boxes(d, b), r"\[3, 2, 4\] and \[3, 4\]; one box for the deltas of all classes: boxes\[:, None\]"),
    (lambda d, b: ops.decode_boxes(d, b[:, None], (1, 1, 1)), "weights as four numbers"),
    (lambda d, b: ops.decode_boxes(d, b[:, None], W1, None), "bbox_xform_clip as a number"),
    (lambda d, b: ops.decode_boxes(d, b[:, None], W1, nan), "bbox_xform_clip as a number"),
    (lambda d, b: ops.decode_boxes(d, b[:, None], size=(10, 10, 3)), r"size as \(height, width\)"),
    (lambda d, b: ops.decode_boxes(d, b[:, None], size=(10, -1)), r"size as \(height, width\)"),
    (lambda d, b: ops.decode_boxes(d, b[:, None].to("meta")), "expected boxes on cpu"),
    (lambda d, b: ops.encode_boxes(b, b[:2]), r"that broadcast, got \[3, 4\] and \[2, 4\]"),
    (lambda d, b: ops.encode_boxes(b, b.to(torch.complex64)), "of real numbers"),
    (lambda d, b: ops.encode_boxes(b, b[:, :3]), r"expected proposals \[..., 4\]"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 2, 4), torch.zeros(3, 4))


@pytest.mark.parametrize("namespace", ["minidamage", "minidamage_emulated"])
def test_the_bindings_protect_memory(namespace):
    _extension.load_emulated()
    ops_of = getattr(torch.ops, namespace)
    d, b = torch.zeros(3, 2, 4), torch.zeros(3, 1, 4)
    for call, message in ((lambda: ops_of.decode_boxes(d, b[:2], W1, CLIP, None), "must be"),
                          (lambda: ops_of.decode_boxes(d[:, 0], b, W1, CLIP, None), "must be"),
                          (lambda: ops_of.decode_boxes(d, b[..., :3], W1, CLIP, None), "must be"),
                          (lambda: ops_of.decode_boxes(d.double(), b, W1, CLIP, None), "expected Float"),
                          (lambda: ops_of.decode_boxes(d, b.half(), W1, CLIP, None), "must be float32 or float64"),
                          (lambda: ops_of.decode_boxes(d, b, W1[:3], CLIP, None), "four numbers"),
                          (lambda: ops_of.decode_boxes(d, b, W1, CLIP, [3]), "height, width"),
                          (lambda: ops_of.decode_boxes_backward(d[:2], d, b, W1, CLIP, None), "grad must be"),
                          (lambda: ops_of.decode_boxes_backward(d.double(), d, b, W1, CLIP, None), "grad must be"),
                          (lambda: ops_of.encode_boxes(b, d, W1), "must be"),
                          (lambda: ops_of.encode_boxes(b.half(), b, W1), "expected Float"),
                          (lambda: ops_of.encode_boxes(b, b, []), "four numbers")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
