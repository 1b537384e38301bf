"""The segmenters' losses against cases worked by hand, against the equations as loops, and at their edges."""
import math
import types

import pytest
import torch

from minidamage.layers.segmentation_losses import (DICE_SMOOTHING, binary_cross_entropy, cross_entropy, dice_loss, inverse_frequency,
                                                   segmentation_losses)


def weights(bce=1.0, dice=1.0, ce=1.0, multiclass_dice=1.0, class_weights="inverse"):
    return types.SimpleNamespace(bce_weight=bce, dice_weight=dice, ce_weight=ce, multiclass_dice_weight=multiclass_dice,
                                 class_weights=class_weights)


def logit(p):
    return math.log(p / (1 - p))


def test_binary_by_hand():
    """Two by two pixels: damage predicted with .8 and .6, truth the first and the third."""
    logits = torch.tensor([logit(0.8), logit(0.6), logit(0.5), logit(0.1)]).view(1, 1, 2, 2)
    truth = torch.tensor([[[1, 0], [1, 0]]], dtype=torch.uint8)
    losses = segmentation_losses(logits, truth, weights(bce=0.5, dice=2.0))
    bce = -(math.log(0.8) + math.log(0.4) + math.log(0.5) + math.log(0.9)) / 4
    dice = 1 - (2 * (0.8 + 0.5) + 1) / ((0.8 + 0.6 + 0.5 + 0.1) + 2 + 1)
    assert list(losses) == ["loss_bce", "loss_dice"]
    assert losses["loss_bce"].item() == pytest.approx(0.5 * bce, rel=1e-6)
    assert losses["loss_dice"].item() == pytest.approx(2.0 * dice, rel=1e-6)


def test_multiclass_by_hand():
    """One row of four pixels, labels 0 0 0 1 of three classes: weights 4 / (2 * 3) and 4 / (2 * 1), none for the absent class."""
    probabilities = torch.tensor([[0.7, 0.6, 0.5, 0.2], [0.2, 0.1, 0.3, 0.7], [0.1, 0.3, 0.2, 0.1]])
    truth = torch.tensor([[[0, 0, 0, 1]]])
    losses = segmentation_losses(probabilities.log().view(1, 3, 1, 4), truth, weights())
    ce = -(2 / 3 * (math.log(0.7) + math.log(0.6) + math.log(0.5)) + 2 * math.log(0.7)) / 4
    dice = [1 - (2 * 1.8 + 1) / (2.0 + 3 + 1), 1 - (2 * 0.7 + 1) / (1.3 + 1 + 1), 1 - 1 / (0.7 + 0 + 1)]
    assert list(losses) == ["loss_ce", "loss_dice"]
    assert losses["loss_ce"].item() == pytest.approx(ce, rel=1e-5)
    assert losses["loss_dice"].item() == pytest.approx(sum(dice) / 3, rel=1e-5)
    plain = segmentation_losses(probabilities.log().view(1, 3, 1, 4), truth, weights(multiclass_dice=0.0, class_weights="none"))
    assert list(plain) == ["loss_ce"]
    assert plain["loss_ce"].item() == pytest.approx(-math.log(0.7 * 0.6 * 0.5 * 0.7) / 4, rel=1e-5)


def test_inverse_frequency_by_hand():
    labels = torch.tensor([[[0, 0, 0, 0], [0, 0, 2, 255]]])
    found = inverse_frequency(labels, labels != 255, 4)
    assert found.tolist() == pytest.approx([7 / (2 * 6), 0, 7 / 2, 0])
    assert (found[labels.clamp(max=3)] * (labels != 255)).sum().item() / 7 == pytest.approx(1.0)          # a mean of 1 over the pixels
    assert not inverse_frequency(torch.full((1, 2, 2), 255), torch.zeros(1, 2, 2, dtype=torch.bool), 3).any()


@pytest.mark.parametrize("channels", [1, 4])
def test_equations_as_loops(channels):
    """Eq. 19 to 24 term by term in Python, over the pixels that count."""
    N, H, W = 2, 3, 5
    logits = torch.randn(N, channels, H, W, dtype=torch.float64) * 3
    labels = torch.randint(0, max(channels, 2), (N, H, W))
    labels[0, 0, :2] = 255
    entropy, pixels, dice, omega = 0.0, 0, [], inverse_frequency(labels, labels != 255, max(channels, 2)).tolist()
    for n in range(N):
        sums = [[0.0, 0.0, 0.0] for _ in range(channels)]             # overlap, sum of p, sum of t
        for i in range(H):
            for j in range(W):
                truth = labels[n, i, j].item()
                if truth == 255:
                    continue
                row = logits[n, :, i, j]
                p = [torch.sigmoid(row[0]).item()] if channels == 1 else (row.exp() / row.exp().sum()).tolist()
                entropy -= math.log(p[0] if truth else 1 - p[0]) if channels == 1 else omega[truth] * math.log(p[truth])
                pixels += 1
                for k in range(channels):
                    t = float(truth == (1 if channels == 1 else k))
                    sums[k] = [sums[k][0] + p[k] * t, sums[k][1] + p[k], sums[k][2] + t]
        dice += [1 - (2 * a + DICE_SMOOTHING) / (b + c + DICE_SMOOTHING) for a, b, c in sums]
    losses = segmentation_losses(logits, labels, weights())
    assert losses["loss_bce" if channels == 1 else "loss_ce"].item() == pytest.approx(entropy / pixels, rel=1e-9)
    assert losses["loss_dice"].item() == pytest.approx(sum(dice) / len(dice), rel=1e-9)


@pytest.mark.parametrize("channels", [1, 3])
def test_ignored_pixels_count_nowhere(channels):
    logits = torch.randn(2, channels, 4, 6, requires_grad=True)
    labels = torch.randint(0, 2, (2, 4, 6), dtype=torch.uint8)
    labels[:, :, 3:] = 255
    whole = segmentation_losses(logits, labels, weights())
    half = segmentation_losses(logits[..., :3], labels[..., :3], weights())
    for name in whole:
        torch.testing.assert_close(whole[name], half[name])
    sum(whole.values()).backward()
    assert not logits.grad[..., 3:].any() and logits.grad[..., :3].any()


@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_counts(channels):
    logits = torch.randn(1, channels, 2, 2, requires_grad=True)
    losses = segmentation_losses(logits, torch.full((1, 2, 2), 255, dtype=torch.uint8), weights())
    sum(losses.values()).backward()
    assert all(loss.item() == 0 for loss in losses.values()) and not logits.grad.any()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_confident_and_half_precision_stay_finite(channels, dtype):
    """Logits of +-30,000 on the wrong and on the right side, and sums that a half cannot hold (65,504 at most)."""
    logits = torch.full((1, channels, 300, 300), 30000.0).to(dtype).requires_grad_()
    with torch.no_grad():
        logits[:, 1:] = -30000.0
    for label in (0, 1):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = segmentation_losses(logits, torch.full((1, 300, 300), label), weights(class_weights="none"))
        assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
        gradient, = torch.autograd.grad(sum(losses.values()), logits)
        assert gradient.isfinite().all()
    right = segmentation_losses(logits, torch.full((1, 300, 300), int(channels == 1)), weights())
    assert sum(right.values()).item() == pytest.approx(0, abs=1e-4)


def test_gradients_are_those_of_the_numbers():
    labels = torch.tensor([[[0, 1, 255], [2, 1, 0]]])
    valid = labels != 255
    logits = torch.randn(1, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, valid), logits)
    assert torch.autograd.gradcheck(lambda x: dice_loss(x.softmax(1), labels[:, None] == torch.arange(3).view(1, 3, 1, 1), valid), logits)
    one = torch.randn(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: binary_cross_entropy(x, labels.clamp(max=1), valid), one)


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"label_maps: expected \[1, 4, 4\].*got \[1, 4, 5\]"):
        segmentation_losses(torch.zeros(1, 1, 4, 4), torch.zeros(1, 4, 5), weights())
