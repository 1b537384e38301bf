"""The losses of the segmenters: cross-entropy for every pixel, Dice for the damage as a whole (Context-CrackNet, section 3.5).

    one class         L = alpha BCE + beta Dice          eq. 18      binary_cross_entropy eq. 20, dice_loss eq. 19
    several classes   L = gamma CE + delta Dice          eq. 21      cross_entropy eq. 24,        dice_loss eq. 22 and 23

Plain cross-entropy (the car-damage project's models): dice_weight=0, multiclass_dice_weight=0, class_weights=none.

A pixel labelled 255 counts nowhere. Everything is computed in float32 at least, under autocast too: a sum over 200,000
pixels does not fit the 11 bits of a half.

Read first: nothing. Read next: segmenter.py.
"""
import torch
from torch.nn import functional as F

from minidamage.distributed import normaliser, total

IGNORE = 255                  # the label of a pixel that counts nowhere
DICE_SMOOTHING = 1.0          # epsilon of eq. 19 and 22, in pixels. Not stated: we use 1
CLASS_WEIGHTS = ("inverse", "none")


def segmentation_losses(logits, label_maps, config):
    """{"loss_bce", "loss_dice"} for one class, {"loss_ce", "loss_dice"} for several: scalars, already weighted, to be added up.

    logits: [N, 1, H, W] (one class, before the sigmoid) or [N, K + 1, H, W] (before the softmax, channel 0 background), any float
    dtype. label_maps: [N, H, W] uint8 or int64, 0 background, 1..K, 255 counts nowhere. config: with bce_weight (alpha), dice_weight
    (beta), ce_weight (gamma), multiclass_dice_weight (delta) and class_weights ("inverse" | "none"). A term of weight 0 is left out.
    Raises ValueError where the sizes differ.
    """
    N, C, H, W = logits.shape
    if label_maps.shape != (N, H, W):
        raise ValueError(f"label_maps: expected [{N}, {H}, {W}], as the logits {list(logits.shape)}, got {list(label_maps.shape)}; "
                         "resize pictures and label maps together")
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        label_maps = label_maps.long()
        valid = label_maps != IGNORE                                  # [N, H, W]
        if C == 1:
            weights = {"loss_bce": config.bce_weight, "loss_dice": config.dice_weight}
            terms = {"loss_bce": lambda: binary_cross_entropy(logits, label_maps, valid),
                     "loss_dice": lambda: dice_loss(logits.sigmoid(), (label_maps == 1)[:, None], valid)}
        else:
            weights = {"loss_ce": config.ce_weight, "loss_dice": config.multiclass_dice_weight}
            terms = {"loss_ce": lambda: cross_entropy(logits, label_maps, valid, config.class_weights),
                     "loss_dice": lambda: dice_loss(logits.softmax(1), one_hot(label_maps, C), valid)}
        return {name: weights[name] * term() for name, term in terms.items() if weights[name] > 0}


def binary_cross_entropy(logits, label_maps, valid):
    """Eq. 20, mean over the pixels of the batch that count. logits: [N, 1, H, W]; label_maps: [N, H, W]; valid: bool [N, H, W]."""
    entropy = F.binary_cross_entropy_with_logits(logits[:, 0], (label_maps == 1).to(logits.dtype), reduction="none")
    return (entropy * valid).sum() / normaliser("pixels", valid.sum())


def cross_entropy(logits, label_maps, valid, class_weights="inverse"):
    """Eq. 24: -1/N sum_i sum_k w_k S_ki log S^_ki, N the pixels that count. logits: [N, C, H, W]; label_maps, valid: [N, H, W].

    "Derived from the inverse class frequency" is all that the paper says of w_k. Not stated: we count the classes in the batch
    and scale the weights to a mean of 1 over its pixels, so that a term's size does not depend on how rare damage is.
    """
    # by a mask: F.cross_entropy over maps has no deterministic form on a GPU. Pixels that do not count are of no class
    of_the_truth = torch.where(one_hot(label_maps, logits.shape[1]), logits.log_softmax(1), 0.0)
    if class_weights == "inverse":
        weights = inverse_frequency(label_maps, valid, logits.shape[1])
        of_the_truth = of_the_truth * weights.to(logits.dtype).view(1, -1, 1, 1)
    return -of_the_truth.sum() / normaliser("pixels", valid.sum())


def inverse_frequency(label_maps, valid, num_classes):
    """w [num_classes]: w_k = pixels / (classes present * pixels of class k); 0 for a class that the batch does not have."""
    pixels = total("pixels a class", class_pixels(label_maps, valid, num_classes)).double()
    present = (pixels > 0).sum().clamp(min=1)
    return torch.where(pixels > 0, pixels.sum() / (present * pixels.clamp(min=1)), 0.0)


def class_pixels(label_maps, valid, num_classes):
    """[num_classes] int64: pixels of each class."""
    # compared and summed: bincount would wait for the GPU, and has no deterministic form there
    return torch.stack([((label_maps == k) & valid).sum() for k in range(num_classes)])


def loss_counts(label_maps, num_classes):
    """What the losses divide by, {name: tensor}, see distributed.py. label_maps: [N, H, W]; num_classes with the background."""
    valid = label_maps != IGNORE
    return {"pixels": valid.sum(), "pixels a class": class_pixels(label_maps, valid, num_classes), "pictures": pictures(label_maps)}


def pictures(batch):
    """How many pictures there are, as a tensor where they are."""
    return torch.full((), len(batch), device=batch.device)


def dice_loss(probabilities, truth, valid):
    """Eq. 19 (C = 1) and eq. 22, 23: 1 - (2 sum(p t) + eps) / (sum(p) + sum(t) + eps), the mean over classes.

    probabilities, truth: [N, C, H, W], of several classes the background first among them ("each class, including the background",
    section 3.5.2); valid: bool [N, H, W]. The sums run over one picture's pixels, as the equations have them. Not
    stated: the mean over the batch's pictures, and that a picture none of whose pixels counts adds 0.
    """
    truth = truth.to(probabilities.dtype) * valid[:, None]
    probabilities = probabilities * valid[:, None]
    overlap = (probabilities * truth).sum((2, 3))                     # [N, C]
    both = probabilities.sum((2, 3)) + truth.sum((2, 3))
    a_picture = (1 - (2 * overlap + DICE_SMOOTHING) / (both + DICE_SMOOTHING)).mean(1)                     # [N]
    return a_picture.sum() / normaliser("pictures", pictures(truth))


def one_hot(label_maps, num_classes):
    """[N, H, W] -> bool [N, num_classes, H, W]; a pixel labelled 255 is of no class."""
    return label_maps[:, None] == torch.arange(num_classes, device=label_maps.device).view(1, -1, 1, 1)
