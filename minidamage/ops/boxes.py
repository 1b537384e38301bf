"""Boxes as [N, 4] tensors, xyxy: (0, 0) is the outer corner of the first pixel, so a box over one pixel is [0, 0, 1, 1].

Names and semantics are torchvision's (torchvision.ops.boxes). Plain PyTorch on any device, differentiable.
"""
import torch


def box_area(boxes):
    """Areas (x2 - x1) * (y2 - y1). boxes: [N, 4]. Returns [N]; half precision is computed in float32, integers stay integers."""
    boxes = _at_least_float32(boxes)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def box_iou(boxes1, boxes2):
    """Intersection over union of every pair. boxes1: [N, 4], boxes2: [M, 4]. Returns [N, M] in 0..1; NaN for two empty boxes."""
    intersection, union = _intersection_union(boxes1, boxes2)
    return intersection / union


def generalized_box_iou(boxes1, boxes2):
    """GIoU of every pair: IoU - (hull - union) / hull, hull the smallest box around both (Rezatofighi et al., CVPR 2019, alg. 1).

    boxes1: [N, 4], boxes2: [M, 4]. Returns [N, M] in -1..1.
    """
    intersection, union = _intersection_union(boxes1, boxes2)
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    top_left = torch.minimum(boxes1[:, None, :2], boxes2[:, :2])                    # [N, M, 2]
    bottom_right = torch.maximum(boxes1[:, None, 2:], boxes2[:, 2:])
    w, h = (bottom_right - top_left).clamp(min=0).unbind(-1)
    hull = w * h
    return intersection / union - (hull - union) / hull


def _intersection_union(boxes1, boxes2):
    area1, area2 = box_area(boxes1), box_area(boxes2)
    boxes1, boxes2 = _at_least_float32(boxes1), _at_least_float32(boxes2)
    top_left = torch.maximum(boxes1[:, None, :2], boxes2[:, :2])                    # [N, M, 2]
    bottom_right = torch.minimum(boxes1[:, None, 2:], boxes2[:, 2:])
    w, h = (bottom_right - top_left).clamp(min=0).unbind(-1)
    intersection = w * h
    return intersection, area1[:, None] + area2 - intersection


def _at_least_float32(boxes):
    """An area of a 1024 x 1024 picture overflows float16 and int16; products need room."""
    if boxes.is_floating_point():
        return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()
    return boxes if boxes.dtype in (torch.int32, torch.int64) else boxes.int()


def clip_boxes_to_image(boxes, size):
    """Boxes cut at the picture's border. boxes: [..., 4]; size: (height, width) in pixels. A box outside becomes a line or a point."""
    height, width = size
    x = boxes[..., 0::2].clamp(min=0, max=width)
    y = boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack((x, y), dim=-1).reshape(boxes.shape)


def remove_small_boxes(boxes, min_size):
    """Indices, int64 [K], of the boxes at least `min_size` pixels wide and high. boxes: [N, 4]."""
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return torch.where((w >= min_size) & (h >= min_size))[0]


_TO_XYXY = {"xyxy": lambda a, b, c, d: (a, b, c, d),
            "xywh": lambda x, y, w, h: (x, y, x + w, y + h),                        # COCO files
            "cxcywh": lambda cx, cy, w, h: (cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h)}
_FROM_XYXY = {"xyxy": lambda a, b, c, d: (a, b, c, d),
              "xywh": lambda x1, y1, x2, y2: (x1, y1, x2 - x1, y2 - y1),
              "cxcywh": lambda x1, y1, x2, y2: ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)}


def box_convert(boxes, in_fmt, out_fmt):
    """Boxes from one form to another: "xyxy" (corners), "xywh" (corner and size) or "cxcywh" (centre and size). boxes: [..., 4].

    Raises ValueError for another form.
    """
    for form in (in_fmt, out_fmt):
        if form not in _TO_XYXY:
            raise ValueError(f"box_convert: expected one of {', '.join(_TO_XYXY)}, got {form!r}")
    if in_fmt == out_fmt:
        return boxes.clone()
    corners = _TO_XYXY[in_fmt](*boxes.unbind(-1))
    return torch.stack(_FROM_XYXY[out_fmt](*corners), dim=-1)
