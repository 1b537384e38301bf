"""What stands before and behind every detector: pictures in, batch out; detections in resized pixels in, results in the
pictures' own pixels out. The rules of size and rounding are torchvision's GeneralizedRCNNTransform.

Read first: roi_heads.py. Read next: models/mask_rcnn.py.
"""
import collections.abc
import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F

from minidamage import masks as rle_masks
from minidamage import ops

IMAGE_MEAN = (0.485, 0.456, 0.406)      # ImageNet, RGB, of values in 0..1: what the published bodies were trained with
IMAGE_STD = (0.229, 0.224, 0.225)
SIZE_DIVISIBLE = 32                     # the coarsest body stride: every level then halves exactly
MASK_FORMS = ("probability", "bool", "rle", "raw")


@dataclasses.dataclass
class ImageBatch:
    """N pictures as the body sees them."""

    tensors: torch.Tensor                # [N, 3, H, W] of the model's dtype, channels_last, normalised, zeros right of and below a picture
    sizes: list                          # [(h, w)] of each picture inside the batch
    original_sizes: list                 # [(h, w)] of each picture as it came


class GeneralizedRCNNTransform(nn.Module):
    """Resizes so that the shorter side is `min_size`, or the longer one `max_size` where that comes first; normalises; batches.

    Differs from torchvision: uint8 pictures are welcome (divided by 255), the resized picture is normalised instead of the
    original (the same numbers up to rounding, fewer pixels), and the batch is channels_last.
    """

    def __init__(self, min_size, max_size, image_mean=IMAGE_MEAN, image_std=IMAGE_STD):
        super().__init__()
        self.min_size = min_size
        self.max_size = max_size
        # buffers move with the model; not persistent: torchvision's state_dict has no such entries
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)

    def forward(self, images, targets=None):
        """images: list of [3, H, W], uint8 or float in 0..1; targets: list of dicts or None; both may lie on the CPU. A target may have a
        min_size of its own, int pixels, for its picture (multi-scale training).

        Returns (ImageBatch, targets with boxes [G, 4] and masks [G, h, w] resized, or None), on the model's device.
        """
        device, dtype = self.image_mean.device, self.image_mean.dtype
        images = [image.to(device, non_blocking=True) for image in images]
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        shorter = [target.get("min_size", self.min_size) for target in targets] if targets else [self.min_size] * len(images)
        sizes = [self.resized_size(*size, min_size) for size, min_size in zip(original_sizes, shorter)]
        H, W = (math.ceil(max(side) / SIZE_DIVISIBLE) * SIZE_DIVISIBLE for side in zip(*sizes))
        batch = torch.zeros((len(images), H, W, 3), dtype=dtype, device=device).permute(0, 3, 1, 2)   # channels_last
        for i, (image, (h, w)) in enumerate(zip(images, sizes)):
            full_scale = 1.0 if image.is_floating_point() else 255.0
            if image.shape[-2:] != (h, w):
                image = F.interpolate(image[None].float(), size=(h, w), mode="bilinear", align_corners=False)[0]
            batch[i, :, :h, :w].copy_(image).sub_(self.image_mean * full_scale).div_(self.image_std * full_scale)
        if targets is not None:
            targets = [resize_target(*each, device) for each in zip(targets, original_sizes, sizes)]
        return ImageBatch(batch, sizes, original_sizes), targets

    def resized_size(self, h, w, min_size=None):
        """(height, width) of a picture resized. min_size: in place of the model's own; max_size then grows or shrinks as it does."""
        min_size = min_size or self.min_size
        scale = min(min_size / min(h, w), self.max_size * min_size / self.min_size / max(h, w))
        return max(1, math.floor(h * scale)), max(1, math.floor(w * scale))


def refill_statistics(model, _):
    """After load_state_dict, of a model that was made on the meta device: the pictures' mean and deviation from the config, beside the
    weights. They are no part of a state_dict, and neither to_empty nor load_state_dict(assign=True) knows them."""
    if not model.is_made_on_meta:
        return
    owner, weight, model.is_made_on_meta = getattr(model, "transform", model), next(model.parameters()), False
    for name in ("image_mean", "image_std"):
        setattr(owner, name, torch.tensor(getattr(model.config, name), dtype=weight.dtype, device=weight.device).view(3, 1, 1))


def resize_target(target, original_size, size, device):
    """One picture's boxes, labels and masks in resized pixels; masks by nearest neighbour, made of rles one by one where it has those."""
    resized = {"boxes": resize_boxes(target["boxes"].float(), original_size, size).to(device, non_blocking=True),
               "labels": target["labels"].to(device, non_blocking=True)}
    if "masks" in target:
        masks = target["masks"].to(device, torch.uint8, non_blocking=True)
        if len(masks) == 0:
            masks = masks.new_zeros(0, *size)
        elif masks.shape[-2:] != size:
            masks = F.interpolate(masks[:, None], size=size, mode="nearest")[:, 0]
        resized["masks"] = masks
    elif "rles" in target:
        masks = torch.zeros((len(target["rles"]), *size), dtype=torch.uint8)
        for mask, rle in zip(masks, target["rles"]):
            mask.copy_(F.interpolate(torch.from_numpy(rle_masks.decode(rle))[None, None], size=size, mode="nearest")[0, 0])
        resized["masks"] = masks.to(device, non_blocking=True)
    return resized


def resize_boxes(boxes, from_size, to_size):
    """boxes: [..., 4] xyxy in a picture of from_size (h, w); returns them in one of to_size."""
    ratio_y, ratio_x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1 * ratio_x, y1 * ratio_y, x2 * ratio_x, y2 * ratio_y], dim=-1)


def check_images(images):
    """Raises ValueError with expected, got and the fix where `images` is not what the model takes."""
    if isinstance(images, torch.Tensor) or not isinstance(images, (list, tuple)) or len(images) == 0:
        got = f"a tensor of shape {list(images.shape)}" if isinstance(images, torch.Tensor) else f"{type(images).__name__} {images!r:.60}"
        raise ValueError(f"images: expected a non-empty list of [3, H, W] tensors (sizes may differ), got {got}; "
                         "wrap a single picture as [image]")
    for i, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            got = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"images[{i}]: expected a tensor [3, H, W] (RGB, channels first), got {got}; "
                             "for a numpy picture [H, W, 3] use torch.from_numpy(picture).permute(2, 0, 1)")
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise ValueError(f"images[{i}]: expected uint8 in 0..255 or float in 0..1, got {image.dtype}; convert with .to(torch.uint8)")


def check_targets(images, targets, num_classes, masks=True):
    """Returns the targets without crowd regions. Raises ValueError that names the picture where a target would break the training.

    Checks shapes, labels 1..K, boxes with a positive size. Values are read only while they lie on the CPU: on a GPU that would
    stall, so check (or load) there before moving.
    """
    if targets is None or len(targets) != len(images):
        raise ValueError(f"targets: expected one dict for each of the {len(images)} pictures in training, got "
                         f"{None if targets is None else len(targets)}; a picture without objects has boxes of shape [0, 4]")
    checked = []
    for i, (image, target) in enumerate(zip(images, targets)):
        if not isinstance(target, collections.abc.Mapping):
            raise ValueError(f"targets[{i}]: expected a dict of boxes, labels{' and masks' * masks}, got {type(target).__name__}")
        where = f"targets[{i}] (picture {target.get('file', target.get('image_id', i))})"
        form = "rles" if "rles" in target and "masks" not in target else "masks"
        needed = ("boxes", "labels", form) if masks else ("boxes", "labels")
        absent = [key for key in needed if key not in target]
        if absent:
            raise ValueError(f"{where}: expected the keys {', '.join(needed)}, got {', '.join(target)}; missing: {', '.join(absent)}")
        for key in (*(key for key in needed if key != "rles"), *["iscrowd"] * (target.get("iscrowd") is not None)):
            if not isinstance(target[key], torch.Tensor):
                raise ValueError(f"{where}: expected {key} as a tensor, got {type(target[key]).__name__}; convert it with torch.as_tensor")
        boxes, labels = target["boxes"], target["labels"]
        G = len(boxes)
        if labels.is_floating_point():
            raise ValueError(f"{where}: expected labels as whole numbers, got {labels.dtype}; convert with .to(torch.int64)")
        if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != (G,):
            raise ValueError(f"{where}: expected boxes [G, 4] and labels [G], got {list(boxes.shape)} and {list(labels.shape)}; "
                             "without objects, torch.zeros(0, 4) and torch.zeros(0, dtype=torch.int64)")
        if "rles" in needed:
            sizes = [tuple(rle["size"]) for rle in target["rles"]]
            if sizes != [tuple(image.shape[-2:])] * G:
                raise ValueError(f"{where}: expected {G} rles of size {list(image.shape[-2:])} (the picture's), got {len(sizes)} of "
                                 f"{sorted(set(sizes))}; resize pictures and masks together")
        elif masks and G and tuple(target["masks"].shape) != (G, *image.shape[-2:]):
            raise ValueError(f"{where}: expected masks [{G}, {image.shape[-2]}, {image.shape[-1]}] (the picture's size), got "
                             f"{list(target['masks'].shape)}; resize pictures and masks together")
        if boxes.is_cpu and G:
            check_values(where, boxes, labels, num_classes)
        crowd = target.get("iscrowd")
        if crowd is not None and G and (not crowd.is_cpu or crowd.any()):      # else as they are: a copy would leave pinned memory
            keep = ~crowd.bool()
            target = {**target, **{key: only(target[key], keep) for key in needed}}
        checked.append(target)
    return checked


def only(values, keep):
    """The entries of a tensor or a list where keep [G] bool is set."""
    return [value for value, kept in zip(values, keep.tolist()) if kept] if isinstance(values, list) else values[keep.to(values.device)]


def check_values(where, boxes, labels, num_classes):
    wrong = ((labels < 1) | (labels >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(f"{where}: expected labels 1..{num_classes - 1} (0 is background), got {labels[wrong[0]].item()} for object "
                         f"{wrong[0]}; number the classes from 1, or build the model with num_classes = classes + 1")
    bad = (~((boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1))).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"{where}: expected boxes x1, y1, x2, y2 with x2 > x1 and y2 > y1, got {boxes[bad[0]].tolist()} for object "
                         f"{bad[0]}; drop it, or convert from x, y, width, height")


def to_original(detections, batch, mask_form, threshold, refine=None):
    """Results in each picture's own pixels: a list of dicts boxes [D, 4], labels [D], scores [D], masks.

    detections: N x roi_heads.Detections. mask_form: "probability" [D, 1, H, W] float (torchvision's), "bool" [D, H, W],
    "rle" (list of D COCO RLE dicts, never more than one mask in memory), "raw" [D, 1, M, M] as the head gave them.
    threshold: probability above which a pixel is foreground. refine: takes and returns a list of RLE dicts, or None.
    """
    if mask_form not in MASK_FORMS:
        raise ValueError(f"mask_form: expected one of {', '.join(MASK_FORMS)}, got {mask_form!r}")
    results = []
    for detection, size, original_size in zip(detections, batch.sizes, batch.original_sizes):
        boxes = resize_boxes(detection.boxes, size, original_size)
        result = {"boxes": boxes, "labels": detection.labels, "scores": detection.scores}
        if detection.masks is not None:
            result["masks"] = masks_in_form(detection.masks[:, None], boxes, original_size, mask_form, threshold, refine)
        results.append(result)
    return results


def masks_in_form(masks, boxes, size, mask_form, threshold, refine):
    """masks: [D, 1, M, M] probabilities, boxes: [D, 4] in a picture of `size` (h, w)."""
    if mask_form == "raw":
        return masks
    if mask_form == "probability":
        return ops.paste_masks_in_image(masks, boxes, size)
    if mask_form == "bool" and refine is None:
        return ops.paste_masks_bool(masks, boxes, size, threshold=threshold).view(-1, *size)
    rles = ops.paste_masks_rle(masks, boxes, size, threshold=threshold)
    if refine is not None:
        rles = refine(rles)
    return rles if mask_form == "rle" else decode_masks(rles, size).to(boxes.device)


def decode_masks(rles, size):
    """D RLE dicts -> bool [D, h, w]."""
    if len(rles) == 0:
        return torch.zeros((0, *size), dtype=torch.bool)
    return torch.from_numpy(rle_masks.decode(rles)).bool()
