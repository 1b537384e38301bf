"""Greedy non-maximum suppression: keep the best-scored box, drop what overlaps it by more than a threshold, repeat.

    kept = {}; for i in order of decreasing score:  keep i  unless  IoU(k, i) > iou_threshold for a kept k (of i's group)

Results equal torchvision's bit for bit: IoU in float32 (float64 for float64 boxes), compared with the threshold in double;
equal scores keep their input order. Groups are compared, not moved apart by adding an offset to the coordinates, so nothing is rounded.
NaN scores come first, as in torch.sort; a NaN box neither suppresses nor is suppressed. Not differentiable (indices).
Kernels: csrc/nms.h, cpu/nms.cpp (a grid over the kept boxes), cuda/nms.cu (bit mask, reduced on the device).
"""
import torch

from . import _extension
from ._checks import require_tensors
from .boxes import box_area


def nms(boxes, scores, iou_threshold):
    """Indices of the boxes that survive, best first.

    boxes: [N, 4] float, xyxy. scores: [N] float. iou_threshold: overlap above which the lower-scored box is dropped.
    Returns int64 [K]. Synchronises once with a GPU, because K depends on the data; `nms_padded` never does.
    Raises ValueError for wrong shapes.
    """
    _check(boxes, scores)
    return torch.ops.minidamage.nms(boxes, scores, None, float(iou_threshold))


def batched_nms(boxes, scores, idxs, iou_threshold):
    """`nms` within each group of boxes (class, level or picture): boxes of different groups do not suppress one another.

    idxs: [N] int64, the group of each box. The rest as in `nms`; the result is ordered by score over all groups.
    """
    _check(boxes, scores, idxs)
    return torch.ops.minidamage.nms(boxes, scores, idxs.to(torch.int64), float(iou_threshold))


def nms_padded(boxes, scores, iou_threshold, max_keep, valid=None):
    """`nms` with an output of fixed length, which never synchronises with a GPU.

    max_keep: length of the result; suppression stops when so many are kept. valid: [N] bool, boxes to consider (all).
    Returns (keep int64 [max_keep], count int64 scalar): indices best first, 0 past `count`.
    """
    _check(boxes, scores, None, valid, max_keep)
    return torch.ops.minidamage.nms_padded(boxes, scores, None, float(iou_threshold), max_keep, valid)


def batched_nms_padded(boxes, scores, idxs, iou_threshold, max_keep, valid=None):
    """`batched_nms` with an output of fixed length: arguments and result as in `nms_padded`."""
    _check(boxes, scores, idxs, valid, max_keep)
    return torch.ops.minidamage.nms_padded(boxes, scores, idxs.to(torch.int64), float(iou_threshold), max_keep, valid)


def _check(boxes, scores, idxs=None, valid=None, max_keep=0):
    require_tensors("nms", boxes=boxes, scores=scores, **{name: t for name, t in (("idxs", idxs), ("valid", valid)) if t is not None})
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"nms: expected boxes [N, 4] in xyxy, got {list(boxes.shape)}")
    for name, tensor in (("scores", scores), ("idxs", idxs), ("valid", valid)):
        if tensor is not None and (tensor.dim() != 1 or tensor.shape[0] != boxes.shape[0]):
            raise ValueError(f"nms: expected {name} [{boxes.shape[0]}], one for each box, got {list(tensor.shape)}")
        if tensor is not None and tensor.device != boxes.device:
            raise ValueError(f"nms: boxes are on {boxes.device}, {name} on {tensor.device}; move them to one device")
    if not (boxes.is_floating_point() and scores.is_floating_point()):
        raise ValueError(f"nms: expected floating-point boxes and scores, got {boxes.dtype} and {scores.dtype}; use .float()")
    if valid is not None and valid.dtype != torch.bool:
        raise ValueError(f"nms: expected valid as bool, got {valid.dtype}; use .bool()")
    if max_keep < 0:
        raise ValueError(f"nms: expected max_keep >= 0, got {max_keep}")


# ---- the reference -------------------------------------------------------------------------------------------------------


def nms_reference(boxes, scores, idxs, iou_threshold):
    """The definition, in plain PyTorch: arguments and result of torch.ops.minidamage.nms (idxs may be None)."""
    keep, count = nms_padded_reference(boxes, scores, idxs, iou_threshold, boxes.shape[0], None)
    return keep[:int(count)].clone()


def nms_padded_reference(boxes, scores, idxs, iou_threshold, max_keep, valid):
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    order = scores.sort(stable=True, descending=True).indices
    if valid is not None:
        order = order[valid[order]]
    area, kept = box_area(boxes), []
    while len(order) and len(kept) < max_keep:
        best, order = order[0], order[1:]
        kept.append(best)
        top_left = torch.maximum(boxes[best, :2], boxes[order, :2])
        bottom_right = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        w, h = (bottom_right - top_left).clamp(min=0).unbind(1)                     # [V]
        intersection = w * h
        iou = intersection / (area[best] + area[order] - intersection)
        suppressed = iou.double() > iou_threshold                                   # False for NaN
        if idxs is not None:
            suppressed &= idxs[order] == idxs[best]
        order = order[~suppressed]
    keep = torch.zeros(max_keep, dtype=torch.int64, device=boxes.device)
    if kept:
        keep[:len(kept)] = torch.stack(kept)
    return keep, torch.tensor(len(kept), device=boxes.device)


# ---- schema, fake --------------------------------------------------------------------------------------------------------

_nms = _extension.define("nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold) -> Tensor", nms_reference)
_nms_padded = _extension.define(
    "nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt max_keep, Tensor? valid) -> (Tensor, Tensor)",
    nms_padded_reference)


@torch.library.register_fake("minidamage::nms", lib=_extension.library())
def _(boxes, scores, idxs, iou_threshold):
    kept = torch.library.get_ctx().new_dynamic_size()                               # known only when it has run
    return boxes.new_empty([kept], dtype=torch.int64)


@torch.library.register_fake("minidamage::nms_padded", lib=_extension.library())
def _(boxes, scores, idxs, iou_threshold, max_keep, valid):
    return boxes.new_empty([max_keep], dtype=torch.int64), boxes.new_empty([], dtype=torch.int64)
