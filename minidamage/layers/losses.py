"""The losses of the two-stage detectors (Ren et al. 2015, He et al. 2017). All take slots with a `valid` mask, see matching.py.

The RoI heads' three terms have forms to choose from (config fields class_loss, box_loss, mask_loss). The first of each is the usual one
and torchvision's; the Mask R-CNN study's other set is sigmoid_focal + iou + dice, section 3.2:

    class   cross_entropy | sigmoid_focal | softmax_focal     focal_alpha, focal_gamma: Lin et al. 2017
    box     smooth_l1, of the four offsets | iou | giou | diou | ciou, of the box that they make
    mask    bce | dice | bce+dice

Read first: matching.py.
"""
import functools

import torch
from torch.nn import functional as F

from minidamage import ops
from minidamage.distributed import normaliser

CLASS_LOSSES = ("cross_entropy", "sigmoid_focal", "softmax_focal")
OVERLAP_LOSSES = {"iou": ops.box_iou_loss, "giou": ops.generalized_box_iou_loss, "diou": ops.distance_box_iou_loss,
                  "ciou": ops.complete_box_iou_loss}
BOX_LOSSES = ("smooth_l1", *OVERLAP_LOSSES)
MASK_LOSSES = ("bce", "dice", "bce+dice")
SMOOTH_L1_BETA = 1 / 9        # where the box loss turns from square to linear; torchvision's value, Detectron's sigma = 3
DICE_SMOOTHING = 1.0          # pixels: a mask without any, predicted as such, is right; not stated in the study


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


def fastrcnn_loss(class_logits, box_regression, labels, bbox_targets, valid, class_loss=cross_entropy, box_loss=smooth_l1):
    """The loss over the classes, and that on the box of the true class.

    class_logits: [R, K + 1]; box_regression: [R, 4 * (K + 1)]; labels: [R] int64, 0 background; bbox_targets: [R, 4], read where
    the label is positive; valid: [R] bool. class_loss: logits, labels -> [R]. box_loss: deltas, targets [R, 4] -> [R], finite in
    the other rows too. Returns (classification loss, box loss), both divided by the number of samples, whatever their forms.
    """
    R = len(labels)
    samples = normaliser("rois", valid.sum())
    entropy = class_loss(class_logits, labels)
    own_box = box_regression.unflatten(1, (-1, 4)).gather(1, labels.view(R, 1, 1).expand(R, 1, 4)).squeeze(1)
    box = box_loss(own_box, bbox_targets)
    return (entropy * valid).sum() / samples, (box * (valid & (labels > 0))).sum() / samples


def class_loss_and_scores(name, alpha=0.25, gamma=2.0):
    """(loss: logits [R, K + 1], labels [R] -> [R]; scores: logits -> [R, K + 1], the probabilities that it trains)."""
    if name == "sigmoid_focal":
        return functools.partial(sigmoid_focal, alpha=alpha, gamma=gamma), torch.sigmoid
    if name == "softmax_focal":
        return functools.partial(ops.softmax_focal_loss, alpha=alpha, gamma=gamma), functools.partial(torch.softmax, dim=1)
    return cross_entropy, functools.partial(torch.softmax, dim=1)


def sigmoid_focal(logits, labels, alpha=0.25, gamma=2.0):
    """K yes-no questions a RoI, one for each class, summed: [R, K + 1], [R] int64 -> [R].

    Background is the answer no to all of them, not a class of its own (as in RetinaNet). Column 0, which stays so that the layer has the
    shape of published weights, is not asked: it has no gradient, and its score means nothing.
    """
    targets = labels[:, None] == torch.arange(1, logits.shape[1], device=labels.device)
    return ops.sigmoid_focal_loss(logits[:, 1:], targets.to(logits.dtype), alpha=alpha, gamma=gamma).sum(1)


def overlap_loss(bbox_deltas, bbox_targets, boxes, box_coder, form):
    """1 - IoU, or another of OVERLAP_LOSSES, between the boxes that both make of `boxes`: [R, 4] each -> [R].

    boxes: xyxy, of a positive width and height in every row (what a row without a target holds does not matter otherwise).
    """
    return OVERLAP_LOSSES[form](box_coder.decode(bbox_deltas, boxes), box_coder.decode(bbox_targets, boxes))


def maskrcnn_loss(mask_logits, mask_targets, valid, form="bce"):
    """Mean over the valid RoIs. mask_logits, mask_targets: [R, M, M]; valid: [R] bool.

    form: bce, binary cross-entropy a pixel; dice, 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) over a RoI's pixels; bce+dice, their sum.
    mask_logits hold the channel of each RoI's true class only: the other classes' masks do not compete (He et al., section 3).
    """
    loss = 0
    if "bce" in form:
        loss = loss + F.binary_cross_entropy_with_logits(mask_logits, mask_targets, reduction="none").mean((1, 2))
    if "dice" in form:
        probabilities = mask_logits.sigmoid()
        overlap, total = (probabilities * mask_targets).sum((1, 2)), (probabilities + mask_targets).sum((1, 2))
        loss = loss + 1 - (2 * overlap + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    return (loss * valid).sum() / normaliser("masks", valid.sum())
