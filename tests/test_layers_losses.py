"""The detector's losses and mask targets against torchvision's stored results, and what empty slots do (nothing)."""
import pathlib

import numpy as np
import pytest
import torch

from minidamage import ops
from minidamage.layers import roi_heads
from minidamage.layers.losses import fastrcnn_loss, maskrcnn_loss, rpn_loss
from minidamage.layers.roi_heads import project_masks_on_boxes

DATA = pathlib.Path(__file__).parent / "data"


@pytest.fixture
def stored():
    return {k: torch.from_numpy(v) for k, v in np.load(DATA / "roi_losses.npz").items()}


def with_empty_slots(x, slots=3):
    return torch.cat([x, torch.full((slots, *x.shape[1:]), 7, dtype=x.dtype)])


@pytest.mark.parametrize("padded", [False, True])
def test_fastrcnn_loss(stored, padded):
    pad = with_empty_slots if padded else lambda x: x
    logits, boxes = pad(stored["cls_logits"]).requires_grad_(), pad(stored["box_reg"]).requires_grad_()
    labels, valid = pad(stored["labels"]).clamp(max=3), torch.arange(len(pad(stored["labels"]))) < 10
    loss_cls, loss_box = fastrcnn_loss(logits, boxes, labels, pad(stored["reg_targets"]), valid)
    torch.testing.assert_close(loss_cls, stored["loss_cls"], rtol=1e-10, atol=0)
    torch.testing.assert_close(loss_box, stored["loss_box"], rtol=1e-10, atol=0)
    (loss_cls + loss_box).backward()
    torch.testing.assert_close(logits.grad[:10], stored["grad_cls"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(boxes.grad[:10], stored["grad_box"], rtol=1e-8, atol=1e-12)
    assert not logits.grad[10:].any() and not boxes.grad[10:].any()


def test_mask_targets_and_mask_loss(stored):
    valid = torch.ones(1, 10, dtype=torch.bool)
    targets = project_masks_on_boxes([stored["gt_masks"]], stored["boxes"].float()[None], stored["matched"][None], valid, 28)
    torch.testing.assert_close(targets, stored["target28"], rtol=1e-5, atol=1e-5)
    logits = stored["mask_logits"].clone().requires_grad_()
    own = logits[torch.arange(10), stored["mask_gt_labels"][stored["matched"]]]
    loss = maskrcnn_loss(own, targets, valid[0])
    torch.testing.assert_close(loss, stored["loss_mask"], rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, stored["grad_mask"], rtol=1e-4, atol=1e-8)


def test_mask_targets_of_a_picture_without_objects():
    objects, valid = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.bool)
    targets = project_masks_on_boxes([torch.zeros(0, 8, 8, dtype=torch.uint8)], torch.zeros(1, 2, 4), objects, valid, 28)
    assert targets.shape == (0, 28, 28)


@pytest.mark.parametrize("slots", [False, True])
def test_mask_targets_of_a_crowd_are_cut_a_few_masks_at_a_time(slots, monkeypatch):
    """Forty masks, as floats never more than sixteen of them; each RoI has its own object's part, as from one mask alone."""
    if slots:
        monkeypatch.setattr(roi_heads, "live_rows", lambda valid: slice(None))
    torch.manual_seed(0)
    masks, objects = (torch.rand(40, 30, 50) < 0.5).to(torch.uint8), torch.randint(0, 40, (25,))
    low = torch.rand(25, 2) * 20
    boxes = torch.cat([low, low + 3 + 20 * torch.rand(25, 2)], dim=1)
    alone = [ops.roi_align(masks[k][None, None].float(), [box[None]], (28, 28), 1.0)[0, 0] for k, box in zip(objects, boxes)]
    seen, roi_align = [], ops.roi_align
    monkeypatch.setattr(ops, "roi_align", lambda pictures, *rest: seen.append(len(pictures)) or roi_align(pictures, *rest))
    targets = project_masks_on_boxes([masks], boxes[None], objects[None], torch.ones(1, 25, dtype=torch.bool), 28)
    assert torch.equal(targets, torch.stack(alone)) and targets.any() and seen == [16, 16, 8]


def test_rpn_loss_by_hand():
    objectness = torch.tensor([[0.0, 5.0, 0.0]])                          # a positive, an empty slot, a negative
    valid = torch.tensor([[True, False, True]])
    deltas, targets = torch.tensor([[[1.0, 0, 0, 0], [9.0, 9, 9, 9]]]), torch.zeros(1, 2, 4)
    loss_objectness, loss_box = rpn_loss(objectness, deltas, targets, valid[:, :2], valid)
    assert loss_objectness.item() == pytest.approx(np.log(2))              # both logits are 0: log 2 each
    assert loss_box.item() == pytest.approx((1 - 1 / 18) / 2)              # linear part of smooth L1: |d| - beta / 2, over two samples


def test_no_samples_give_zero_and_finite_gradients():
    logits = torch.randn(2, 4, requires_grad=True)
    labels, valid = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    losses = fastrcnn_loss(logits, torch.randn(2, 16), labels, torch.zeros(2, 4), valid)
    mask_logits = torch.randn(0, 28, 28, requires_grad=True)
    total = sum(losses) + maskrcnn_loss(mask_logits, torch.zeros(0, 28, 28), torch.zeros(0, dtype=torch.bool))
    total.backward()
    assert total.item() == 0 and not logits.grad.any()
