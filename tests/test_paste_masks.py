"""Pasting masks against hand answers, stored torchvision results, its reference bit by bit, and the CUDA kernels on the CPU."""
import math

import pytest
import torch
from oracle import check_op, same, stored

from minidamage import ops
from minidamage.mask_reference import compress, runs_of_mask
from minidamage.ops import _extension
from minidamage.ops.paste_masks import expand_boxes, paste_masks_bool_reference, paste_masks_reference, paste_masks_rle_reference

PASTE, BOOL, RLE = torch.ops.minidamage.paste_masks, torch.ops.minidamage.paste_masks_bool, torch.ops.minidamage.paste_masks_rle
STORED = stored("paste_masks")
nan, inf = math.nan, math.inf


def problem(size, dtype=torch.float32, seed=0, count=8):
    """Masks [N, 1, size, size] whose values are often exactly 0, 1/2 or 1, boxes [N, 4] in and around a 70 x 90 picture."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(count, 1, size, size, generator=generator)
    masks[::2] = (masks[::2] * 3).floor() / 2
    corner = torch.rand(count, 2, generator=generator) * torch.tensor([110.0, 90.0]) - 20
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=generator) ** 2 * 90], 1)
    return masks.to(dtype), boxes


NASTY_BOXES = torch.tensor([[nan, 0, 9, 9], [0, 0, inf, 9], [-inf, -inf, inf, inf], [30, 20, 10, 5], [5, 5, 5, 5], [5.4, 5.2, 5.6, 5.3],
                            [-1e9, -1e9, 1e9, 1e9], [1e30, 0, 2e30, 9], [-50, -50, -20, -20], [200, 10, 220, 30], [-3, 2, 400, 60],
                            [0, 0, 89, 69], [89, 69, 300, 300]])


def all_forms_agree(masks, boxes, shape, padding, threshold):
    """Float form = reference, bit by bit; the others = float form > threshold; the CUDA kernels alike."""
    pasted = ops.paste_masks_in_image(masks, boxes, shape, padding)
    whole = expand_boxes(boxes, masks.shape[3], padding)
    assert torch.equal(pasted.nan_to_num(nan=7), paste_masks_reference(masks, whole, *shape, padding).nan_to_num(nan=7))
    expected = pasted[:, 0] > threshold
    assert torch.equal(ops.paste_masks_bool(masks, boxes, shape, padding, threshold), expected)
    rles = ops.paste_masks_rle(masks, boxes, shape, padding, threshold)
    assert rles == [{"size": list(shape), "counts": compress(runs_of_mask(mask.numpy()))} for mask in expected]
    kernels = _extension.load_emulated()
    assert torch.equal(kernels.paste_masks(masks, whole, *shape, padding).nan_to_num(nan=7), pasted.nan_to_num(nan=7))
    if masks.dtype in (torch.float32, torch.float64):
        assert torch.equal(kernels.paste_masks_bool(masks, whole, *shape, padding, threshold), expected)


def test_by_hand(device):
    """2 x 2 cells in a border of zeros, 4 x 4 cells, over a box of 4 x 4 pixels: one cell a pixel, whose centres meet."""
    masks = torch.tensor([[[[.25, .5], [.75, 1]]]], device=device)
    boxes = torch.tensor([[2, 1, 3.5, 2.5]], device=device)                   # widened by 2: [1.25, 0.25, 4.25, 3.25], cut to [1, 0, 4, 3]
    pasted = ops.paste_masks_in_image(masks, boxes, (5, 6))
    expected = torch.zeros(5, 6)
    expected[1:3, 2:4] = torch.tensor([[.25, .5], [.75, 1]])
    assert torch.equal(pasted.cpu(), expected[None, None])
    assert torch.equal(ops.paste_masks_bool(masks, boxes, (5, 6)).cpu(), expected[None] > 0.5)              # .5 itself is out
    # column by column: 12 zeros, then (row 2, column 2), 4 zeros, rows 1 and 2 of column 3 less .5: one, 12 zeros
    assert runs_of_mask((expected > 0.5).numpy()).tolist() == [12, 1, 4, 1, 12]
    assert ops.paste_masks_rle(masks, boxes, (5, 6)) == [{"size": [5, 6], "counts": compress([12, 1, 4, 1, 12])}]
    # ones over 8 x 8 pixels, half a cell each: pixel x lies at cell x / 2 - 1/4
    pasted = ops.paste_masks_in_image(torch.ones(1, 1, 2, 2, device=device), torch.tensor([[2, 2, 5.9, 5.9]], device=device), (12, 12))
    along = [0, .25, .75, 1, 1, .75, .25, 0, 0, 0, 0, 0]
    assert pasted[0, 0].tolist() == [[y * x for x in along] for y in along]


def test_stored_torchvision(device):
    masks, boxes = STORED["masks"].float().to(device), STORED["boxes"].float().to(device)
    pasted = ops.paste_masks_in_image(masks, boxes, (64, 80))
    same(pasted.cpu(), STORED["pasted"], 2e-6, "ours and torchvision")
    away = (STORED["pasted"] - 0.5).abs() > 2e-6                              # a rounding from the threshold either answer is right
    assert torch.equal(ops.paste_masks_bool(masks, boxes, (64, 80)).cpu() & away[:, 0], (STORED["pasted"] > 0.5)[:, 0] & away[:, 0])


@pytest.mark.parametrize("size", [1, 14, 28])
@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_forms_agree_to_the_last_bit(size, padding, dtype):
    masks, boxes = problem(size, dtype)
    for shape in ((70, 90), (33, 64), (1, 1), (1, 90), (70, 1)):
        for threshold in (0.5, 0.3):
            all_forms_agree(masks, boxes, shape, padding, threshold)
    for threshold in (0.0, 1.0, -0.1, 0.25, 0.75, nan):
        all_forms_agree(masks, boxes, (33, 64), padding, threshold)


def test_nasty_boxes_and_masks():
    masks, _ = problem(28, count=len(NASTY_BOXES))
    all_forms_agree(masks, NASTY_BOXES, (70, 90), 1, 0.5)
    masks[:, 0, 3, 4], masks[:, 0, 20, 6], masks[:, 0, 9, 9] = nan, inf, -inf
    all_forms_agree(masks, NASTY_BOXES, (70, 90), 1, 0.5)
    masks, boxes = problem(28)
    masks[:, 0, 3, 4], masks[:, 0, 20, 6], masks[:, 0, 9, 9] = nan, inf, 1e38
    all_forms_agree(masks, boxes, (70, 90), 1, 0.5)


def test_masks_flat_at_the_threshold():
    """Cells a rounding above and below 1/2: the run-length form may not judge a stretch by its ends there."""
    masks = torch.full((1, 1, 28, 28), 0.5)
    steps = torch.randint(-2, 3, (64, 1, 28, 28))
    masks = masks + steps * torch.finfo(torch.float32).eps / 4
    boxes = torch.rand(64, 2) * 20
    all_forms_agree(masks, torch.cat([boxes, boxes + torch.rand(64, 2) * 90 + 1], 1), (70, 90), 1, 0.5)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_contract(count):
    masks, boxes = problem(5, torch.float64, count=max(count, 1))
    masks, boxes = masks[:count].requires_grad_(), expand_boxes(boxes[:count], 5, 1)
    check_op(PASTE, paste_masks_reference, (masks, boxes, 12, 15, 1), gradients=True, gradcheck=count > 0, compiled=True)
    check_op(BOOL, paste_masks_bool_reference, (masks.detach(), boxes, 12, 15, 1, 0.5), compiled=True)
    check_op(RLE, paste_masks_rle_reference, (masks.detach(), boxes, 12, 15, 1, 0.5))
    if count:
        assert torch.autograd.gradgradcheck(lambda m: PASTE(m, boxes, 12, 15, 1), (masks,))


def test_autocast_does_not_round_the_gradient():
    masks, boxes = problem(14)
    grad, gradients = torch.randn(len(masks), 1, 70, 90, generator=torch.Generator().manual_seed(0)), []
    for enabled in (False, True):
        leaf = masks.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            ops.paste_masks_in_image(leaf, boxes, (70, 90)).backward(grad)
        gradients.append(leaf.grad)
    assert gradients[1].dtype == torch.float32 and torch.equal(*gradients)


def test_compiles_and_exports():
    masks, boxes = problem(14)
    compiled = torch.compile(lambda m, b: (ops.paste_masks_in_image(m, b, (70, 90)), ops.paste_masks_bool(m, b, (70, 90))), fullgraph=True,
                             backend="aot_eager", dynamic=True)
    same(compiled(masks, boxes), (ops.paste_masks_in_image(masks, boxes, (70, 90)), ops.paste_masks_bool(masks, boxes, (70, 90))))

    class Paste(torch.nn.Module):
        def forward(self, masks, boxes):
            return ops.paste_masks_bool(masks, boxes, (70, 90))

    program = torch.export.export(Paste(), (masks, boxes))
    assert torch.equal(program.module()(masks, boxes), ops.paste_masks_bool(masks, boxes, (70, 90)))


def test_large_pictures_share_nothing():
    """Past a megabyte the zeros are the system's own pages: two results must still be two memories, aligned, writable."""
    masks, boxes = problem(28)
    first, second = (ops.paste_masks_in_image(masks, boxes, (700, 900)) for _ in range(2))
    assert first.data_ptr() % 64 == 0 and torch.equal(first, second)
    first.fill_(3)
    assert not (second == 3).any() and torch.equal(second, paste_masks_reference(masks, expand_boxes(boxes, 28, 1), 700, 900, 1))


def test_non_square_masks_and_wide_boxes():
    masks = torch.rand(3, 1, 7, 11)
    boxes = expand_boxes(torch.tensor([[3, 4, 50, 30], [-10, 5, 100, 9], [20, 0, 22, 69.0]]), 11, 1)
    check_op(PASTE, paste_masks_reference, (masks, boxes, 70, 90, 1), tolerance=0, opcheck=False)
    check_op(BOOL, paste_masks_bool_reference, (masks, boxes, 70, 90, 1, 0.5), opcheck=False)
    check_op(RLE, paste_masks_rle_reference, (masks, boxes, 70, 90, 1, 0.5), opcheck=False)


@pytest.mark.parametrize("call, message", [
    (lambda m, b: ops.paste_masks_in_image(m[:, 0], b, (9, 9)), r"masks \[N, 1, M, M\]"),
    (lambda m, b: ops.paste_masks_bool(m.bool(), b, (9, 9)), r"masks \[N, 1, M, M\] float"),
    (lambda m, b: ops.paste_masks_rle(m, b[:3], (9, 9)), r"boxes \[8, 4\]"),
    (lambda m, b: ops.paste_masks_in_image(m, b.long(), (9, 9)), "float"),
    (lambda m, b: ops.paste_masks_in_image(m, b, (0, 9)), "at least one pixel"),
    (lambda m, b: ops.paste_masks_in_image(m, b, (9, 9), -1), "padding"),
    (lambda m, b: ops.paste_masks_bool(m, b, (9, 9), 2 ** 40), "padding of 0 to 1024"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem(14))
