"""DamageNet: the context block's equations, its start, the loss weights, the post-processing, and every ablation switch."""
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from detection_cases import overfit, small_model, two_pictures
from minidamage import masks as rle_masks
from minidamage.models.damagenet import DilatedContextBlock


def test_context_block_is_equations_9_and_10():
    torch.manual_seed(0)
    block = DilatedContextBlock(3, rates=(1, 2, 4)).double()
    for p in block.parameters():
        p.data = torch.randn_like(p)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    alpha = block.alpha_logits.exp() / block.alpha_logits.exp().sum()
    out = torch.zeros_like(x)
    for a, conv, rate in zip(alpha, block.convs, (1, 2, 4)):
        padded = F.pad(x, (rate,) * 4)
        for i in range(3):                                                 # the definition: nine shifted maps, `rate` apart
            for j in range(3):
                shifted = padded[:, :, i * rate:i * rate + 9, j * rate:j * rate + 8]
                out += a * torch.einsum("oc,nchw->nohw", conv.weight[:, :, i, j], shifted)
    torch.testing.assert_close(block(x), out)
    assert block.alpha().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_context_block_starts_near_the_identity_and_learns(groups):
    torch.manual_seed(0)
    block = DilatedContextBlock(16, groups=groups)
    x = torch.randn(2, 16, 24, 24)
    out = block(x)
    assert ((out - x).std() / x.std()).item() < 0.1
    out.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in block.parameters())


def test_rate_one_alone_starts_as_the_identity():
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(DilatedContextBlock(8, rates=(1,))(x), x)


def test_cost_of_the_context_block():
    """256 channels, four rates, four levels: the 9.4 M parameters that the full form adds; depthwise adds next to nothing."""
    def added(groups):
        blocks = [DilatedContextBlock(256, groups=groups) for _ in range(4)]
        return sum(p.numel() for block in blocks for p in block.parameters())
    assert added(1) == 4 * (4 * 9 * 256 * 256 + 4) and added(256) == 4 * (4 * 9 * 256 + 4)


def test_overfits_two_pictures():
    images, targets = two_pictures()
    model = small_model("damagenet")
    first, last = overfit(model, images, targets)
    assert last < 0.35 * first
    for result, target in zip(model.detect(images, "bool"), targets):
        for label, mask in zip(target["labels"], target["masks"].bool()):
            best = max((((m & mask).sum() / (m | mask).sum()).item()
                        for m, l, s in zip(result["masks"], result["labels"], result["scores"]) if l == label and s > 0.5), default=0.0)
            assert best > 0.7


@pytest.mark.parametrize("fields", [dict(context=False), dict(fpn=False), dict(fpn=False, context=False), dict(context_rates=(1, 3)),
                                    dict(context_levels=(3, 5)), dict(context_groups=16), dict(fill_holes=False, remove_islands=False)])
def test_every_ablation_trains_and_detects(fields):
    images, targets = two_pictures()
    model = small_model("damagenet", **fields).train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.eval().detect(images, "rle")


def test_context_off_is_mask_rcnn_to_the_parameter():
    plain = small_model("maskrcnn_resnet50_fpn")
    off = small_model("damagenet", context=False)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in off.state_dict().items()}
    on = small_model("damagenet")
    added = {k for k in on.state_dict() if k not in off.state_dict()}
    assert added and all(k.startswith("backbone.fpn.context_blocks.") for k in added)


def test_loss_weights_of_equation_13():
    images, targets = two_pictures()
    plain = small_model("damagenet").eval().losses_and_detections(images, targets)[0]
    weights = dict(loss_weight_cls=2.0, loss_weight_reg=3.0, loss_weight_mask=0.5)
    weighted = small_model("damagenet", **weights).eval().losses_and_detections(images, targets)[0]
    factors = {"loss_classifier": 2.0, "loss_box_reg": 3.0, "loss_mask": 0.5, "loss_objectness": 1.0, "loss_rpn_box_reg": 1.0}
    for name, factor in factors.items():
        assert weighted[name].item() == pytest.approx(factor * plain[name].item(), rel=1e-6), name


def test_the_dashes_of_a_broken_scratch_stay():
    mask = np.zeros((64, 96), np.uint8)
    for i in range(16):
        mask[10 + i:13 + i, 6 * (i % 15):6 * (i % 15) + 3] = 1                   # sixteen parts, each a sixteenth of the mask
    rle = rle_masks.encode(mask)
    assert small_model("damagenet").refine_masks([rle]) == [rle]


@pytest.mark.parametrize("fill, islands, area", [(True, True, 400), (True, False, 404), (False, True, 375), (False, False, 379)])
def test_post_processing_by_hand(fill, islands, area):
    mask = np.zeros((40, 50), np.uint8)
    mask[5:25, 5:25] = 1                  # 400 pixels
    mask[10:15, 10:15] = 0                # with a hole of 25
    mask[30:32, 40:42] = 1                # and an island of 4
    model = small_model("damagenet", fill_holes=fill, remove_islands=islands)
    refined = model.refine_masks([rle_masks.encode(mask)])
    assert rle_masks.area(refined).tolist() == [area]
    assert model.refine_masks([]) == []


def test_post_processing_reaches_every_thresholded_form_and_leaves_probabilities_alone():
    images, _ = two_pictures()
    model = small_model("damagenet", box_score_thresh=0.0).eval()
    probability, boolean, rles = (model.detect(images, form) for form in ("probability", "bool", "rle"))
    for p, b, r in zip(probability, boolean, rles):
        thresholded = rle_masks.encode((p["masks"][:, 0] > model.config.mask_threshold).numpy())
        want = rle_masks.decode(model.refine_masks(thresholded))
        assert np.array_equal(b["masks"].numpy(), want) and np.array_equal(rle_masks.decode(r["masks"]), want)


def test_stages_for_the_strip_of_figure_6():
    images, _ = two_pictures()
    model = small_model("damagenet", box_score_thresh=0.0).eval()
    results, stages = model.detect(images, "rle", stages=True)
    for image, result, stage in zip(images, results, stages):
        D = len(result["boxes"])
        assert D > 0 and len(stage["masks_threshold"]) == D and stage["masks_final"] == result["masks"]
        assert stage["masks_raw"].shape == (D, 1, 28, 28) and torch.equal(stage["boxes"], result["boxes"])
        assert len(stage["proposals"]) == len(stage["objectness"]) > 0
        assert (stage["objectness"].diff() <= 0).all() and stage["proposals"].max() <= max(image.shape[-2:]) + 1e-3
        assert list(stage["features"]) == ["p2", "p3", "p4", "p5"]
        assert all(abs(m.shape[1] * s - image.shape[1]) <= s for m, s in zip(stage["features"].values(), (4, 8, 16, 32)))


@pytest.mark.parametrize("fields, message", [
    (dict(context_rates=()), "context_rates: expected one or more"), (dict(context_levels=(1,)), "context_levels: expected levels"),
    (dict(context_groups=3), "context_groups: expected a divisor of fpn_channels = 16")])
def test_wrong_context_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        small_model("damagenet", **fields)
