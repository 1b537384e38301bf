"""The detectors' losses to choose from: each by hand, in training and in what it makes of the scores, and what is refused."""
import math

import pytest
import torch

from detection_cases import no_objects, overfit_until_found, small_model, two_pictures, without_masks
from minidamage.layers import roi_heads
from minidamage.layers.losses import (BOX_LOSSES, class_loss_and_scores, fastrcnn_loss, maskrcnn_loss, overlap_loss, sigmoid_focal,
                                      smooth_l1)
from minidamage.layers.matching import BoxCoder

STUDY = dict(class_loss="sigmoid_focal", box_loss="iou", mask_loss="dice")


def log(p):
    return -math.log(p)


# ---- by hand ----------------------------------------------------------------------------------------------------------------------

def test_sigmoid_focal_asks_one_question_a_class():
    """Logits 0 and log 3: probabilities 1/2 and 3/4. alpha 0.25 for yes, 0.75 for no, gamma 2. Column 0 is not asked."""
    logits = torch.tensor([[50.0, 0.0, math.log(3)]]).double().expand(3, 3).clone().requires_grad_()
    loss = sigmoid_focal(logits, torch.tensor([0, 1, 2]))
    no, yes = [0.75 * 0.5 ** 2 * log(0.5), 0.75 * 0.75 ** 2 * log(0.25)], [0.25 * 0.5 ** 2 * log(0.5), 0.25 * 0.25 ** 2 * log(0.75)]
    assert loss.tolist() == pytest.approx([no[0] + no[1], yes[0] + no[1], no[0] + yes[1]])
    loss.sum().backward()
    assert not logits.grad[:, 0].any() and logits.grad[:, 1:].all()


def test_softmax_focal_by_hand():
    """Probabilities 1/4 and 3/4 of two answers."""
    loss, scores = class_loss_and_scores("softmax_focal", alpha=0.5, gamma=1.0)
    logits = torch.tensor([[0.0, math.log(3)]]).double().expand(2, 2)
    assert loss(logits, torch.tensor([0, 1])).tolist() == pytest.approx([0.5 * 0.75 * log(0.25), 0.5 * 0.25 * log(0.75)])
    assert scores(logits)[0].tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("form, want", [
    # a 4 x 2 box against the same moved right by 2: overlap 4, union 12; hull 6 x 2 = 12, its diagonal^2 40, centres 2 apart; equal shapes
    ("iou", 2 / 3), ("giou", 2 / 3), ("diou", 2 / 3 + 4 / 40), ("ciou", 2 / 3 + 4 / 40)])
def test_overlaps_are_those_of_the_boxes_that_the_offsets_make(form, want):
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    boxes = torch.tensor([[10.0, 20, 14, 22]]).double()
    moved = coder.encode(boxes + torch.tensor([2.0, 0, 2, 0]), boxes)
    deltas = torch.zeros(1, 4).double().requires_grad_()
    loss = overlap_loss(deltas, moved, boxes, coder, form)
    assert loss.item() == pytest.approx(want, abs=1e-6)
    loss.backward()
    assert deltas.grad[0, 0] < 0 and loss.shape == (1,)                    # to the right is better


def test_dice_by_hand():
    """Probabilities 1/2 on four pixels, two of them true: 1 - (2 * 1 + 1) / (2 + 2 + 1)."""
    logits, valid = torch.zeros(2, 2, 2).double(), torch.tensor([True, False])
    truth = torch.tensor([[1.0, 1], [0, 0]]).double().expand(2, 2, 2)
    assert maskrcnn_loss(logits, truth, valid, "dice").item() == pytest.approx(0.4)
    assert maskrcnn_loss(logits, truth, valid, "bce+dice").item() == pytest.approx(0.4 + math.log(2))
    assert maskrcnn_loss(logits, truth, valid).item() == pytest.approx(math.log(2))
    perfect = maskrcnn_loss(torch.full((1, 2, 2), -40.0), torch.zeros(1, 2, 2), torch.ones(1, dtype=torch.bool), "dice")
    assert perfect.item() == pytest.approx(0, abs=1e-6)                    # nothing there, nothing found


def test_rows_without_a_target_neither_count_nor_break():
    """A negative, and an empty slot whose box has no size at all, beside one positive; what the empty slot predicts is wild."""
    heads = small_model("fasterrcnn_resnet50_fpn", box_loss="ciou").roi_heads
    boxes = torch.tensor([[0.0, 0, 10, 20], [5, 5, 9, 9], [0, 0, 0, 0]])
    labels, valid = torch.tensor([1, 0, 0]), torch.tensor([True, True, False])
    regression = torch.zeros(3, 12)
    regression[2] = 1e4
    regression.requires_grad_()
    _, loss = fastrcnn_loss(torch.zeros(3, 3), regression, labels, torch.tensor([[1.0, 0, 0, 0]] + [[0.0] * 4] * 2), valid,
                            box_loss=heads.box_loss_of(boxes, valid & (labels > 0)))
    # moved right by 1 of 10: overlap 9 x 20 of 11 x 20; centres 1 apart, diagonal^2 11^2 + 20^2; over two samples
    assert loss.item() == pytest.approx((1 - 9 / 11 + 1 / 521) / 2, rel=1e-5)
    loss.backward()
    assert torch.isfinite(regression.grad).all() and regression.grad[0, 4:8].any()
    assert not regression.grad[1:].any() and not regression.grad[0, :4].any() and not regression.grad[0, 8:].any()


def test_scores_are_those_that_the_loss_trains():
    logits = torch.tensor([[9.0, 0.0, math.log(3)]])
    for name, want in (("sigmoid_focal", [0.5, 0.75]), ("cross_entropy", logits.softmax(1)[0, 1:].tolist())):
        model = small_model("fasterrcnn_resnet50_fpn", class_loss=name)
        assert model.roi_heads.class_scores(logits)[0, 1:].tolist() == pytest.approx(want)


def test_two_classes_can_be_found_at_one_place():
    """Independent classes: both may be likely. The score of column 0 is in no detection."""
    images, _ = two_pictures()
    model = small_model("fasterrcnn_resnet50_fpn", class_loss="sigmoid_focal", box_score_thresh=0.5, box_detections_per_img=50).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.zero_()
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([20.0, 1.0, 2.0]))
    for result in model(images):
        scores = torch.tensor([1.0, 2.0]).sigmoid()[result["labels"] - 1]
        assert set(result["labels"].tolist()) == {1, 2}
        torch.testing.assert_close(result["scores"], scores)


def test_independent_classes_start_unlikely():
    """With its prior the first loss does not grow with the classes: 80 of 1/2 each would give some 80 * 0.75 * 0.25 * log 2 = 10."""
    images, targets = two_pictures()
    model = small_model("fasterrcnn_resnet50_fpn", num_classes=81, class_loss="sigmoid_focal").train()
    assert model.roi_heads.box_predictor.cls_score.bias.sigmoid().allclose(torch.tensor(0.01))
    assert model(images, without_masks(targets))["loss_classifier"].item() < 1


# ---- in a model -------------------------------------------------------------------------------------------------------------------

def test_the_usual_losses_are_the_default():
    model = small_model()
    assert (model.config.class_loss, model.config.box_loss, model.config.mask_loss) == ("cross_entropy", "smooth_l1", "bce")
    assert model.roi_heads.box_loss_of(None, None) is smooth_l1


@pytest.mark.parametrize("name, fields, steps", [
    ("maskrcnn_resnet50_fpn", dict(STUDY, loss_weight_cls=4.0, loss_weight_reg=8.0), 120),
    ("damagenet", dict(class_loss="softmax_focal", box_loss="giou", mask_loss="bce+dice", loss_weight_cls=4.0, loss_weight_reg=8.0), 90),
    ("fasterrcnn_resnet50_fpn", dict(box_loss="diou", loss_weight_reg=8.0), 80),
    ("fasterrcnn_resnet50_fpn", dict(box_loss="ciou", loss_weight_reg=8.0), 80)])
def test_overfits_two_pictures(name, fields, steps):
    images, targets = two_pictures()
    model = small_model(name, **fields)
    masks = model.roi_heads.mask_head is not None
    first, last = overfit_until_found(model, images, targets if masks else without_masks(targets), steps)
    assert last < 0.5 * first
    for result, target in zip(model.detect(images, "bool"), targets if masks else []):
        for label, mask in zip(target["labels"], target["masks"].bool()):
            overlaps = [(m & mask).sum() / (m | mask).sum() for m, own in zip(result["masks"], result["labels"]) if own == label]
            assert max(overlaps) > 0.7


@pytest.mark.parametrize("box_loss", BOX_LOSSES)
def test_pictures_without_objects_fixed_slots_and_autocast(box_loss, monkeypatch):
    """Nothing to overlap with: 0, and a gradient for every parameter. With the fixed slots of a GPU the same losses."""
    images, targets = two_pictures()
    values = []
    for slots in (False, True):
        if slots:
            monkeypatch.setattr(roi_heads, "live_rows", lambda valid: slice(None))
        model = small_model(**{**STUDY, "box_loss": box_loss}).train()
        empty = model(images, [no_objects(image) for image in images])
        assert empty["loss_box_reg"] == 0 and empty["loss_mask"] == 0
        sum(empty.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            losses = model(images, [targets[0], no_objects(images[1])])
        values.append({key: loss.item() for key, loss in losses.items()})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(loss.dtype == torch.float32 and torch.isfinite(loss) for loss in model(images, targets).values())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_the_paper_s_switch_of_danet_is_the_same_field():
    for fields, focal, class_loss in ((dict(phase=4), False, "cross_entropy"), (dict(phase=5), True, "softmax_focal"),
                                      (dict(phase=4, focal=True), True, "softmax_focal"),
                                      (dict(phase=5, class_loss="cross_entropy"), False, "cross_entropy"),
                                      (dict(phase=3, class_loss="sigmoid_focal"), True, "sigmoid_focal")):
        config = small_model("danet", **fields).config
        assert (config.focal, config.class_loss) == (focal, class_loss)
    with pytest.raises(ValueError, match="focal: expected True beside class_loss=softmax_focal, got False"):
        small_model("danet", focal=False, class_loss="softmax_focal")


@pytest.mark.parametrize("fields, message", [
    (dict(class_loss="focal"), "class_loss: expected cross_entropy, sigmoid_focal or softmax_focal, got 'focal'"),
    (dict(box_loss="l1"), "box_loss: expected smooth_l1, iou, giou, diou or ciou, got 'l1'"),
    (dict(mask_loss="bce,dice"), r"mask_loss: expected bce, dice or bce\+dice"), (dict(focal_alpha=1.5), "focal_alpha"),
    (dict(focal_gamma=-1.0), "focal_gamma"), (dict(loss_weight_reg=float("inf")), "loss_weight_reg"),
    (dict(loss_weight_mask=-1.0), "loss_weight_mask")])
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small_model(**fields)
