"""Losses of one box against its target, pair by pair, and the two matrices behind them. Read boxes.py first.

    IoU   1 - iou
    GIoU  1 - iou + (hull - union) / hull                        Rezatofighi et al., CVPR 2019; hull: area of the smallest box around both
    DIoU  1 - iou + distance^2 / diagonal^2                      Zheng et al., AAAI 2020; between the centres, and the hull's diagonal
    CIoU  DIoU + alpha v,  v = 4 / pi^2 (atan w2 / h2 - atan w1 / h1)^2,  alpha = v / (1 - iou + v), a constant for the gradient

Names, signatures and numbers are torchvision's, with `eps` in every denominator as there. Plain PyTorch on any device, differentiable
in both boxes, any number of times. A box of no area has an IoU of 0 and, under CIoU, where its height is 0 too, no aspect: NaN.
"""
import math

import torch

from .boxes import _at_least_float32, box_iou


def box_iou_loss(boxes1, boxes2, reduction="none", eps=1e-7):
    """1 - IoU of each pair: [N]. boxes1, boxes2: [N, 4] xyxy (any leading dimensions); reduction: none, mean or sum.

    No gradient where the boxes do not overlap: one of the other three pulls them together. Raises ValueError for other shapes or names.
    """
    boxes1, boxes2 = _pair(boxes1, boxes2, "box_iou_loss")
    intersection, union = _intersection_union(boxes1, boxes2)
    return _reduce(1 - intersection / (union + eps), reduction)


def generalized_box_iou_loss(boxes1, boxes2, reduction="none", eps=1e-7):
    """1 - GIoU of each pair, 0..2. Arguments as in `box_iou_loss`."""
    boxes1, boxes2 = _pair(boxes1, boxes2, "generalized_box_iou_loss")
    intersection, union = _intersection_union(boxes1, boxes2)
    w, h = _hull_size(boxes1, boxes2)
    hull = w * h
    return _reduce(1 - (intersection / (union + eps) - (hull - union) / (hull + eps)), reduction)


def distance_box_iou_loss(boxes1, boxes2, reduction="none", eps=1e-7):
    """1 - DIoU of each pair, 0..2. Arguments as in `box_iou_loss`."""
    boxes1, boxes2 = _pair(boxes1, boxes2, "distance_box_iou_loss")
    iou = _iou(boxes1, boxes2, eps)
    return _reduce(1 - iou + _distance_penalty(boxes1, boxes2, eps), reduction)


def complete_box_iou_loss(boxes1, boxes2, reduction="none", eps=1e-7):
    """1 - CIoU of each pair. Arguments as in `box_iou_loss`. boxes2 is the target (v is symmetric all the same)."""
    boxes1, boxes2 = _pair(boxes1, boxes2, "complete_box_iou_loss")
    iou = _iou(boxes1, boxes2, eps)
    return _reduce(1 - iou + _distance_penalty(boxes1, boxes2, eps) + _aspect_penalty(boxes1, boxes2, iou, eps), reduction)


def distance_box_iou(boxes1, boxes2, eps=1e-7):
    """DIoU of every pair. boxes1: [N, 4], boxes2: [M, 4] xyxy. Returns [N, M] in -1..1; NaN for two empty boxes, as in box_iou."""
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    return box_iou(boxes1, boxes2) - _distance_penalty(boxes1[:, None], boxes2, eps)


def complete_box_iou(boxes1, boxes2, eps=1e-7):
    """CIoU of every pair, [N, M]. Arguments as in `distance_box_iou`."""
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    iou = box_iou(boxes1, boxes2)
    return iou - _distance_penalty(boxes1[:, None], boxes2, eps) - _aspect_penalty(boxes1[:, None], boxes2, iou, eps)


# ---- the parts, of boxes [..., 4] that broadcast ------------------------------------------------------------------------------


def _pair(boxes1, boxes2, name):
    if boxes1.shape != boxes2.shape or boxes1.shape[-1:] != (4,):
        raise ValueError(f"{name}: expected two tensors [N, 4], box i against box i, got {list(boxes1.shape)} and {list(boxes2.shape)}; "
                         "for every pair there are the matrices, complete_box_iou and its like")
    return _at_least_float32(boxes1), _at_least_float32(boxes2)


def _intersection_union(boxes1, boxes2):
    w, h = (torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])).unbind(-1)
    intersection = torch.where((w > 0) & (h > 0), w * h, 0)
    areas = [(boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]) for boxes in (boxes1, boxes2)]
    return intersection, areas[0] + areas[1] - intersection


def _iou(boxes1, boxes2, eps):
    intersection, union = _intersection_union(boxes1, boxes2)
    return intersection / (union + eps)


def _hull_size(boxes1, boxes2):
    """Width and height of the smallest box around both."""
    return (torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])).unbind(-1)


def _distance_penalty(boxes1, boxes2, eps):
    """Squared distance of the centres over the squared diagonal of the hull."""
    w, h = _hull_size(boxes1, boxes2)
    dx, dy = ((boxes1[..., :2] + boxes1[..., 2:]) / 2 - (boxes2[..., :2] + boxes2[..., 2:]) / 2).unbind(-1)
    return (dx ** 2 + dy ** 2) / (w ** 2 + h ** 2 + eps)


def _aspect_penalty(boxes1, boxes2, iou, eps):
    angle1, angle2 = (torch.atan((boxes[..., 2] - boxes[..., 0]) / (boxes[..., 3] - boxes[..., 1])) for boxes in (boxes1, boxes2))
    v = 4 / math.pi ** 2 * (angle2 - angle1) ** 2
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return alpha * v


def _reduce(loss, reduction):
    """The mean of nothing is 0, as in torchvision."""
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"box losses: expected reduction none, mean or sum, got {reduction!r}")
    return loss if reduction == "none" else loss.sum() if reduction == "sum" or loss.numel() == 0 else loss.mean()
