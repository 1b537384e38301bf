"""DANet: CBAM and deformable convolution by hand and at their start, the switches of the five phases, and what each part adds."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minidamage
from detection_cases import no_objects, overfit_until_found, small_model, two_pictures, without_masks
from minidamage import ops
from minidamage.config import apply_settings
from minidamage.layers.resnet import load_body
from minidamage.models.danet import CBAM, DANetConfig, DeformableConv2d, MultiScaleRoIPool
from test_faster_rcnn import LOSSES

BASE = 41_755_286 - 84 * 1025 * 5                               # torchvision's Faster R-CNN, its 91 classes cut to 7
OFFSETS = 18 * 9 * (4 * 128 + 6 * 256 + 3 * 512) + 18 * 13      # 3x3 convolutions to 18 maps, on 4, 6 and 3 blocks, with biases
MLPS = 2 * (3 * 256 * 16 + 4 * 512 * 32 + 6 * 1024 * 64 + 3 * 2048 * 128)
ATTENTION = MLPS + 16 * 2 * 49                                  # and a 7x7 convolution of two maps in each of 16 blocks


# ---- CBAM -------------------------------------------------------------------------------------------------------------------------

def test_cbam_by_hand():
    """Two channels, two positions; equations 3 to 6 as printed."""
    block = CBAM(2, ratio=2, slope=0.5, gain=1.0).double()
    block.w0.weight.data = torch.tensor([[1.0, -2.0]]).double()
    block.w1.weight.data = torch.tensor([[1.0], [2.0]]).double()
    kernel = torch.zeros(1, 2, 7, 7).double()
    kernel[0, 0, 3, 3], kernel[0, 1, 3, 4] = 1.0, 1.0            # the mean here plus the largest value one step to the right
    block.spatial.weight.data = kernel
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, 0.0]]]]).double()    # means 2, 1: 2 - 2 = 0; largest 3, 2: 3 - 4 = -1, LeakyReLU -0.5
    a, b = 1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(1.0))      # W1 (0 - 0.5) = -0.5, -1
    torch.testing.assert_close(block.channel_attention(x).flatten(), torch.tensor([a, b]).double())
    left, right = (a + 2 * b) / 2 + 3 * a, 3 * a / 2             # positions: mean, plus the right neighbour's largest
    left, right = (1 / (1 + math.exp(-v)) for v in (left, right))
    want = torch.tensor([[[[a * left, 3 * a * right]], [[2 * b * left, 0.0]]]]).double()
    torch.testing.assert_close(block(x), want)


def test_cbam_starts_as_nothing_and_learns():
    block = CBAM(32)
    x = torch.randn(2, 32, 9, 7).contiguous(memory_format=torch.channels_last)
    assert torch.equal(block(x), x) and torch.allclose(CBAM(32, gain=1.0)(x), x / 4)
    block(x).square().sum().backward()
    assert block.w1.weight.grad.abs().sum() > 0 and block.spatial.weight.grad.abs().sum() > 0
    assert CBAM(8, ratio=16).w0.out_features == 1


# ---- deformable convolution -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("modulated", [False, True])
def test_a_deformable_convolution_starts_as_the_plain_one(modulated):
    plain = nn.Conv2d(5, 6, 3, stride=2, padding=2, dilation=2, bias=False)
    bent = DeformableConv2d.of(plain, modulated)
    x = torch.randn(2, 5, 11, 9)
    torch.testing.assert_close(bent(x), plain(x), rtol=1e-5, atol=1e-5)
    assert bent.offset.out_channels == (27 if modulated else 18)
    bent(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in bent.parameters())


def test_offsets_move_the_samples():
    """Every sample one row down and two columns to the right: a plain convolution of the moved picture."""
    bent = DeformableConv2d(3, 4, 3, padding=1, bias=False)
    bent.offset.bias.data = torch.tensor([1.0, 2.0]).repeat(9)
    x = torch.randn(1, 3, 10, 12)
    moved = F.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]
    got, want = bent(x), F.conv2d(moved, bent.weight, padding=1)
    torch.testing.assert_close(got[:, :, 1:-1, 1:-1], want[:, :, 1:-1, 1:-1], rtol=1e-5, atol=1e-5)


# ---- phases -----------------------------------------------------------------------------------------------------------------------

def parts_of(model):
    """What a model is really made of."""
    blocks = [block for stage in model.backbone.body.stages() for block in stage]
    return {"fpn": len(model.backbone.strides) == 4, "dcn": any(isinstance(block.conv2, DeformableConv2d) for block in blocks),
            "cbam": all(block.attention is not None for block in blocks),
            "focal": getattr(model.roi_heads.class_loss, "func", None) is ops.softmax_focal_loss,
            "roi_op": "pool" if isinstance(model.roi_heads.box_roi_pool, MultiScaleRoIPool) else "align"}


@pytest.mark.parametrize("phase, fpn, dcn, cbam, focal, roi_op", [
    (1, False, False, False, False, "pool"), (2, True, False, False, False, "align"), (3, True, True, False, False, "align"),
    (4, True, True, True, False, "align"), (5, True, True, True, True, "align")])
def test_a_phase_is_a_row_of_table_2(phase, fpn, dcn, cbam, focal, roi_op):
    model = small_model("danet", phase=phase)
    assert parts_of(model) == dict(fpn=fpn, dcn=dcn, cbam=cbam, focal=focal, roi_op=roi_op)
    assert {name: getattr(model.config, name) for name in parts_of(model)} == parts_of(model)
    images, targets = two_pictures()
    losses = model.train()(images, [targets[0], no_objects(images[1])])
    assert set(losses) == LOSSES and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(set(result) == {"boxes", "labels", "scores"} for result in model.eval()(images))


def test_a_switch_of_ones_own_wins_over_the_phase():
    config = apply_settings(DANetConfig(), ["phase=3", "dcn=false", "focal=true", "roi_op=pool"])
    made = small_model("danet", **{name: getattr(config, name) for name in ("phase", "fpn", "dcn", "cbam", "focal", "roi_op")})
    assert parts_of(made) == dict(fpn=True, dcn=False, cbam=False, focal=True, roi_op="pool")
    again = minidamage.build_model("danet", 3, **vars(made.config))            # as a checkpoint rebuilds it: settled, whatever the phase
    assert again.config == made.config and again.state_dict().keys() == made.state_dict().keys()


@pytest.mark.parametrize("phase, parameters", [
    # c4's body, one lateral and one output convolution, the RPN with 15 anchors a position, two layers of 1024, seven classes
    (1, 23_454_912 - 14_942_208 + 1025 * 256 + 2305 * 256 + 2305 * 256 + 257 * 75 + 12545 * 1024 + 1025 * 1024 + 1025 * 35),
    (2, BASE), (3, BASE + OFFSETS), (4, BASE + OFFSETS + ATTENTION), (5, BASE + OFFSETS + ATTENTION)])
def test_parameters_of_every_phase(phase, parameters):
    with torch.device("meta"):                                        # counted, not filled
        model = minidamage.build_model("danet", 7, phase=phase)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_phase_with_a_pyramid_starts_as_phase_2():
    """Zero offsets and gates of 1: with the same weights in the parts that all have, losses and detections are those of phase 2."""
    images, targets = two_pictures()
    targets = without_masks(targets)
    plain = small_model("danet", phase=2, box_score_thresh=0.0).eval()
    want, found = plain.losses_and_detections(images, targets)
    for fields in (dict(phase=3), dict(phase=4), dict(phase=4, dcn_modulated=True)):
        model = small_model("danet", **fields, box_score_thresh=0.0).eval()
        report = model.load_state_dict(plain.state_dict(), strict=False)
        assert not report.unexpected_keys and all(".offset." in key or ".attention." in key for key in report.missing_keys)
        got, detections = model.losses_and_detections(images, targets)
        for name in want:
            assert got[name].item() == pytest.approx(want[name].item(), rel=1e-4), name
        for a, b in zip(detections, found):
            torch.testing.assert_close(a["scores"], b["scores"], rtol=1e-3, atol=1e-5)


def test_a_published_body_loads(tmp_path):
    body = small_model("fasterrcnn_resnet50_fpn").backbone.body
    torch.save({f"module.{key}": value for key, value in body.state_dict().items()}, tmp_path / "body.pth")
    model = small_model("danet", seed=7)
    report = load_body(model, tmp_path / "body.pth")
    assert set(report["loaded"]) == set(body.state_dict()) and not report["unexpected"] and not report["mismatched"]
    assert all(".offset." in key or ".attention." in key for key in report["missing"])
    assert torch.equal(model.backbone.body.layer3[0].conv2.weight, body.layer3[0].conv2.weight)


@pytest.mark.parametrize("fields", [
    dict(body="resnet50"), dict(norm="batch"), dict(norm="frozen"), dict(frozen_stages=4), dict(fpn_upsample="nearest"),
    dict(dcn_stages=(5,), dcn_modulated=True), dict(phase=1, dcn=True, cbam=True), dict(roi_op="pool"), dict(focal_objectness=True),
    dict(phase=3, norm="frozen"), dict(phase=3, norm="frozen", body="resnet50")])       # ReLU and addition in place on an op's output
def test_configurations_train_and_detect(fields):
    images, targets = two_pictures()
    model = small_model("danet", **fields).train()
    losses = model(images, without_masks(targets))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if "frozen_stages" in fields:
        assert not [name for name in trained if ".body.layer3" in name] and any(".body.layer4.0.attention" in name for name in trained)
    model.eval()(images)


def test_autocast_trains():
    images, targets = two_pictures()
    model = small_model("danet").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, without_masks(targets))
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses.values())


def test_the_focal_loss_is_the_classifiers():
    """Equation 10 from the same logits, by its formula; the other terms are those of cross-entropy."""
    images, targets = two_pictures()
    targets = without_masks(targets)
    plain, focal = (small_model("danet", phase=phase).eval() for phase in (4, 5))
    rows = []
    plain.roi_heads.class_loss = lambda logits, labels: rows.append((logits, labels)) or F.cross_entropy(logits, labels, reduction="none")
    before, _ = plain.losses_and_detections(images, targets)
    after, _ = focal.losses_and_detections(images, targets)
    logits, labels = rows[0]
    p = logits.softmax(1)[torch.arange(len(labels)), labels]
    assert after["loss_classifier"].item() == pytest.approx((-0.25 * (1 - p) ** 2 * p.log()).mean().item(), rel=1e-4)
    for name in LOSSES - {"loss_classifier"}:
        assert after[name].item() == pytest.approx(before[name].item(), rel=1e-6), name
    weighted, _ = small_model("danet", loss_weight_cls=3.0).eval().losses_and_detections(images, targets)
    assert weighted["loss_classifier"].item() == pytest.approx(3 * after["loss_classifier"].item(), rel=1e-6)


def test_pooling_takes_each_box_from_its_own_level():
    features = [torch.randn(1, 2, 32 // 2 ** level, 32 // 2 ** level) for level in range(4)]
    pool = MultiScaleRoIPool((4, 8, 16, 32), (3, 3), canonical_scale=56)
    rois = torch.tensor([[0.0, 3, 5, 20, 22], [0, 0, 0, 110, 120], [0, 10, 10, 60, 70]])
    levels = pool.levels(rois[:, 1:]).tolist()
    assert len(set(levels)) == 3
    for got, roi, level in zip(pool(features, rois), rois, levels):
        assert torch.equal(got, ops.roi_pool(features[level], roi[None], (3, 3), 1 / (4 * 2 ** level))[0])


@pytest.mark.parametrize("phase, steps", [(1, 100), (5, 80)])             # one map of stride 16 learns such small objects more slowly
def test_overfits_two_pictures(phase, steps):
    images, targets = two_pictures()
    model = small_model("danet", phase=phase, loss_weight_cls=4.0 if phase == 5 else 1.0)
    first, last = overfit_until_found(model, images, without_masks(targets), steps, lr=4e-3)
    assert last < 0.4 * first


@pytest.mark.parametrize("fields, message", [
    (dict(phase=6), "phase: expected 1 to 5"), (dict(dcn_stages=(1,)), "dcn_stages: expected stages"),
    (dict(dcn_stages=()), "dcn_stages: expected stages"), (dict(cbam_ratio=0), "cbam_ratio: expected 1 or more"),
    (dict(roi_op="crop"), "roi_op: expected align or pool"), (dict(fpn_upsample="cubic"), "fpn_upsample: expected nearest or bilinear"),
    (dict(focal_alpha=0.0), "focal_alpha"), (dict(focal_gamma=-1.0), "focal_gamma"), (dict(cbam_gain=0.0), "cbam_gain")])
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small_model("danet", **fields)
