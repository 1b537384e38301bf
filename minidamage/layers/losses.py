"""The losses of the two-stage detectors (Ren et al. 2015, He et al. 2017). All take slots with a `valid` mask, see matching.py.

Read first: matching.py.
"""
from torch.nn import functional as F

from minidamage.distributed import normaliser

SMOOTH_L1_BETA = 1 / 9        # where the box loss turns from square to linear; torchvision's value, Detectron's sigma = 3


def smooth_l1(prediction, target, beta=SMOOTH_L1_BETA):
    """Summed over the last dimension (the four numbers of a box): [..., 4] -> [...]."""
    return F.smooth_l1_loss(prediction, target, beta=beta, reduction="none").sum(-1)


def cross_entropy(logits, labels):
    """[R, C], [R] int64 -> [R]."""
    return F.cross_entropy(logits, labels, reduction="none")


def binary_cross_entropy(logits, targets):
    """Equal shapes, targets 0..1."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def rpn_loss(objectness, bbox_deltas, bbox_targets, positive_valid, valid, objectness_loss=binary_cross_entropy):
    """The RPN's two losses over the sampled anchors.

    objectness: [N, S] logits of S slots, positives first; bbox_deltas, bbox_targets: [N, P, 4] of the P <= S positive slots;
    positive_valid: [N, P]; valid: [N, S] bool. objectness_loss: logits, targets -> a loss each (DANet has another). Returns
    (objectness loss, box loss), both divided by the number of samples.
    """
    samples = normaliser("anchors", valid.sum())
    labels = valid.new_zeros(valid.shape)
    labels[:, :positive_valid.shape[1]] = positive_valid
    entropy = objectness_loss(objectness, labels.to(objectness.dtype))
    box = smooth_l1(bbox_deltas, bbox_targets)
    return (entropy * valid).sum() / samples, (box * positive_valid).sum() / samples


def fastrcnn_loss(class_logits, box_regression, labels, bbox_targets, valid, class_loss=cross_entropy):
    """Cross-entropy over the classes, smooth L1 on the box of the true class.

    class_logits: [R, K + 1]; box_regression: [R, 4 * (K + 1)]; labels: [R] int64, 0 background; bbox_targets: [R, 4], read where
    the label is positive; valid: [R] bool. class_loss: logits, labels -> [R] (DANet has another). Returns (classification loss, box
    loss), both divided by the number of samples.
    """
    R = len(labels)
    samples = normaliser("rois", valid.sum())
    entropy = class_loss(class_logits, labels)
    own_box = box_regression.unflatten(1, (-1, 4)).gather(1, labels.view(R, 1, 1).expand(R, 1, 4)).squeeze(1)
    box = smooth_l1(own_box, bbox_targets)
    return (entropy * valid).sum() / samples, (box * (valid & (labels > 0))).sum() / samples


def maskrcnn_loss(mask_logits, mask_targets, valid):
    """Binary cross-entropy a pixel, mean over the valid RoIs. mask_logits, mask_targets: [R, M, M]; valid: [R] bool.

    mask_logits hold the channel of each RoI's true class only: the other classes' masks do not compete (He et al., section 3).
    """
    entropy = F.binary_cross_entropy_with_logits(mask_logits, mask_targets, reduction="none")
    return (entropy.mean((1, 2)) * valid).sum() / normaliser("masks", valid.sum())
