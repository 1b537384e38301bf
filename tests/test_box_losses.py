"""Box losses against hand answers and stored torchvision results."""
import math

import pytest
import torch
from oracle import same, stored

from minidamage import ops

STORED = stored("box_losses")
LOSSES = {"iou": ops.box_iou_loss, "giou": ops.generalized_box_iou_loss, "diou": ops.distance_box_iou_loss,
          "ciou": ops.complete_box_iou_loss}


def test_by_hand(device):
    # two squares of 2 x 2, one shifted by (1, 1): intersection 1, union 7, hull 9, distance^2 2, diagonal^2 18
    a, b = torch.tensor([[0.0, 0, 2, 2]], device=device), torch.tensor([[1.0, 1, 3, 3]], device=device)
    for name, expected in (("iou", 6 / 7), ("giou", 6 / 7 + 2 / 9), ("diou", 6 / 7 + 2 / 18), ("ciou", 6 / 7 + 2 / 18)):
        assert LOSSES[name](a, b).item() == pytest.approx(expected, abs=1e-6)
    # 2 x 1 in 1 x 1 with one centre: iou 1/2, v = 4 / pi^2 (atan 2 - atan 1)^2
    a, b = torch.tensor([[0.0, 0, 2, 1]], device=device), torch.tensor([[0.5, 0, 1.5, 1]], device=device)
    v = 4 / math.pi ** 2 * (math.atan(2) - math.pi / 4) ** 2
    assert ops.complete_box_iou_loss(a, b).item() == pytest.approx(0.5 + v ** 2 / (0.5 + v), abs=1e-6)
    assert ops.complete_box_iou(a, b).item() == pytest.approx(0.5 - v ** 2 / (0.5 + v), abs=1e-6)
    # apart by 3: no overlap, IoU's gradient is zero, the others pull
    a, b = torch.tensor([[0.0, 0, 1, 1]], device=device), torch.tensor([[4.0, 0, 5, 1]], device=device)
    for name, loss in LOSSES.items():
        leaf = a.clone().requires_grad_()
        loss(leaf, b, "sum").backward()
        assert (leaf.grad[0, 2] < 0) == leaf.grad.any() == (name != "iou")            # the right side is pulled to the right


@pytest.mark.parametrize("name", ["giou", "diou", "ciou"])
def test_stored_torchvision(name, device):
    b1, b2 = (STORED[key].to(device).requires_grad_() for key in ("b1", "b2"))
    loss = LOSSES[name](b1, b2)
    same(loss.detach().cpu(), STORED[f"{name}_loss"], 1e-12, "losses")
    gradients = torch.autograd.grad(loss.sum(), (b1, b2))
    same([gradient.cpu() for gradient in gradients], [STORED[f"{name}_grad_b1"], STORED[f"{name}_grad_b2"]], 1e-12, "gradients")
    same(LOSSES[name](b1, b2, "sum"), loss.sum(), 1e-12)
    same(LOSSES[name](b1, b2, reduction="mean"), loss.sum() / 40, 1e-12)


@pytest.mark.parametrize("name, matrix", [("giou", ops.generalized_box_iou), ("diou", ops.distance_box_iou),
                                          ("ciou", ops.complete_box_iou)])
def test_stored_matrices(name, matrix, device):
    same(matrix(STORED["b1"].to(device), STORED["b2"].to(device)).cpu(), STORED[f"{name}_mat"], 1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_derivatives_and_dtypes(name):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2, 6, 2, generator=generator, dtype=torch.float64) * 4
    b1, b2 = torch.cat([corner, corner + 1 + torch.rand(2, 6, 2, generator=generator, dtype=torch.float64) * 4], -1)
    if name != "ciou":                                                  # its alpha is held constant: no numerical derivative
        assert torch.autograd.gradcheck(LOSSES[name], (b1.requires_grad_(), b2.requires_grad_()))
    half = LOSSES[name]((b1.detach() * 300).half(), (b2.detach() * 300).half())                # areas overflow float16
    assert half.dtype == torch.float32 and half.isfinite().all()
    same(half, LOSSES[name](b1.detach(), b2.detach()).float(), 5e-3)
    same(LOSSES[name](b1.detach().view(2, 3, 4), b2.detach().view(2, 3, 4)), LOSSES[name](b1.detach(), b2.detach()).view(2, 3), 0)
    empty = b1[:0].detach().requires_grad_()
    loss = LOSSES[name](empty, b2[:0], reduction="mean")
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 4) and LOSSES[name](empty, b2[:0]).shape == (0,)
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    same(compiled(b1, b2, "sum"), LOSSES[name](b1, b2, "sum"), 1e-12)
    bad = b1.detach().clone()
    bad[2, 1] = math.nan
    assert LOSSES[name](bad, b2).isnan().tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_mistakes_are_named(name):
    boxes = torch.rand(3, 4)
    for call, message in ((lambda: LOSSES[name](boxes, boxes[:2]), r"\[N, 4\], box i against box i, got \[3, 4\] and \[2, 4\]"),
                          (lambda: LOSSES[name](boxes[:, :3], boxes[:, :3]), r"\[N, 4\]"),
                          (lambda: LOSSES[name](boxes, boxes, reduction="average"), "none, mean or sum, got 'average'")):
        with pytest.raises(ValueError, match=message):
            call()
