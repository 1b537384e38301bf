"""Pasting the small square masks of a mask head into the picture (He et al., Mask R-CNN, ICCV 2017, section 3.1).

The mask, M x M with a border of `padding` zeros, is stretched bilinearly over its box, which grows by the same factor (M + 2 padding) / M
and is cut to whole pixels, as in torchvision. With `cells` = M + 2 padding and w = x2 - x1 + 1 pixels,
    position(x) = max(0, (x - x1 + 1/2) cells / w - 1/2),   fraction = position - floor(position),
a pixel mixes its two cells along the row, then down the column; outside the box the value is 0.

Three forms of one result: `paste_masks_in_image`, the probabilities, torchvision's signature; `paste_masks_bool`, where they are greater
than the threshold (`>`, as torchvision's users write it; detectron2 writes `>=`); `paste_masks_rle`, that as COCO run lengths, without
the N x H x W array. They agree to the last bit: same arithmetic, in the same order, without fused multiply-adds.
Kernels: csrc/paste_masks.h, cpu/paste_masks.cpp, cuda/paste_masks.cu.
"""
import contextlib

import torch
import torch.nn.functional as F

from ..mask_reference import compress, runs_of_mask
from . import _extension
from ._checks import autocast_is_on, require_tensors

MAX_PADDING = 1024                                                           # cells; PASTE_MAX_PADDING of csrc/paste_masks.h


def paste_masks_in_image(masks, boxes, img_shape, padding=1):
    """The mask probabilities in the picture: [N, 1, H, W], dtype of `masks`.

    masks: [N, 1, M, M] float, probabilities. boxes: [N, 4] float, xyxy, pixels of the picture. img_shape: (H, W). A box with NaN pastes
    nothing. float16 and bfloat16 are computed in float32 and rounded once. Differentiable with respect to `masks`, not to `boxes`.
    Raises ValueError for wrong shapes.
    Memory: N H W numbers; on a CPU, pages that no box reaches are handed out as the system's zero page when they are first read.
    """
    masks, boxes, H, W = _prepare(masks, boxes, img_shape, padding)
    if masks.device.type == "cpu" and masks.dtype in (torch.float16, torch.bfloat16):
        return torch.ops.minidamage.paste_masks(masks.float(), boxes, H, W, padding).to(masks.dtype)
    return torch.ops.minidamage.paste_masks(masks, boxes, H, W, padding)


def paste_masks_bool(masks, boxes, img_shape, padding=1, threshold=0.5):
    """Exactly `paste_masks_in_image(...)[:, 0] > threshold`: bool [N, H, W]. Arguments as there; a quarter of the memory."""
    masks, boxes, H, W = _prepare(masks, boxes, img_shape, padding)
    return torch.ops.minidamage.paste_masks_bool(*_comparable(masks.detach(), boxes, H, W, padding, threshold))


def paste_masks_rle(masks, boxes, img_shape, padding=1, threshold=0.5):
    """`paste_masks_bool` as COCO run lengths: a list of N dicts {"size": [H, W], "counts": bytes}, as pycocotools writes them.

    Works column by column inside the boxes and never holds N x H x W; from a GPU it fetches the small masks (one synchronisation).
    """
    masks, boxes, H, W = _prepare(masks, boxes, img_shape, padding)
    arguments = _comparable(masks.detach().cpu(), boxes.cpu(), H, W, padding, threshold)
    text, offsets = torch.ops.minidamage.paste_masks_rle(*arguments)
    text, offsets = text.numpy().tobytes(), offsets.tolist()
    return [{"size": [H, W], "counts": text[begin:end]} for begin, end in zip(offsets, offsets[1:])]


def _prepare(masks, boxes, img_shape, padding):
    """Checked masks, the widened boxes int64 [N, 4] (both ends inclusive), H, W."""
    require_tensors("paste_masks", masks=masks, boxes=boxes)
    if masks.dim() != 4 or masks.shape[1] != 1 or not masks.is_floating_point() or 0 in masks.shape[2:]:
        raise ValueError(f"paste_masks: expected masks [N, 1, M, M] float, got {list(masks.shape)} {masks.dtype}; "
                         "select one class and keep its dimension: masks[:, c, None]")
    if boxes.shape != (masks.shape[0], 4) or not boxes.is_floating_point():
        raise ValueError(f"paste_masks: expected boxes [{masks.shape[0]}, 4] float, one for each mask, "
                         f"got {list(boxes.shape)} {boxes.dtype}")
    if boxes.device != masks.device:
        raise ValueError(f"paste_masks: masks are on {masks.device}, boxes on {boxes.device}; move them to one device")
    if len(img_shape) != 2 or min(img_shape) < 1 or not 0 <= padding <= MAX_PADDING:
        raise ValueError(f"paste_masks: expected img_shape (H, W) of at least one pixel and padding of 0 to {MAX_PADDING} cells "
                         f"(Mask R-CNN has 1), got {tuple(img_shape)}, {padding}")
    return masks, expand_boxes(boxes.detach(), masks.shape[3], padding), int(img_shape[0]), int(img_shape[1])


def expand_boxes(boxes, M, padding):
    """Boxes widened about their centre by (M + 2 padding) / M and cut (towards 0) to whole pixels: int64 [N, 4], as in torchvision."""
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    scale = (M + 2 * padding) / M
    half_size, centre = (boxes[:, 2:] - boxes[:, :2]) * 0.5, (boxes[:, 2:] + boxes[:, :2]) * 0.5
    half_size = half_size * scale
    expanded = torch.cat([centre - half_size, centre + half_size], 1)
    nowhere = ~torch.isfinite(expanded).all(1, keepdim=True)                 # such a box pastes nothing: it lies left of the picture
    return expanded.masked_fill(nowhere, -2).clamp(-2**40, 2**40).to(torch.int64)


def _comparable(masks, boxes, H, W, padding, threshold):
    """Arguments of the boolean ops. Half types become float32, with the threshold at which their rounded form changes sides."""
    if masks.dtype in (torch.float16, torch.bfloat16):
        # Rounding is monotone, so round(value) > t is value > middle, middle between t and the next number: itself included if it
        # rounds up (ties go to the even neighbour).
        t = torch.tensor(threshold, dtype=masks.dtype)
        middle = (t.float() + torch.nextafter(t, torch.tensor(float("inf"), dtype=t.dtype)).float()) / 2
        below = torch.nextafter(middle, torch.tensor(-float("inf")))
        masks, threshold = masks.float(), float(below if middle.to(t.dtype) > t else middle)
    return masks, boxes, H, W, padding, float(threshold)


# ---- the reference -----------------------------------------------------------------------------------------------------------


def paste_taps(low_end, high_end, cells, picture_size, dtype):
    """Of every pixel along one axis of every box: cells beside it, fraction between them, whether it is inside: [N, picture_size] each.

    low_end, high_end: [N] int64, the box's first and last pixel. paste_axis() and paste_tap() of csrc/paste_masks.h.
    """
    pixel = torch.arange(picture_size, device=low_end.device)[None]                             # [1, picture_size]
    size = (high_end - low_end + 1).clamp(min=1)
    cells_per_pixel = (torch.as_tensor(cells, dtype=dtype, device=low_end.device) / size.to(dtype))[:, None]      # [N, 1]
    position = (cells_per_pixel * ((pixel - low_end[:, None]).to(dtype) + 0.5) - 0.5).clamp(0, cells)
    low = position.to(torch.int64).clamp(max=cells - 1)
    inside = (pixel >= low_end[:, None]) & (pixel <= high_end[:, None])
    return low, (low + 1).clamp(max=cells - 1), position - low.to(dtype), inside


def paste_masks_reference(masks, boxes, H, W, padding):
    """The definition: arguments and result of torch.ops.minidamage.paste_masks. boxes: int64, from expand_boxes()."""
    dtype = torch.float64 if masks.dtype == torch.float64 else torch.float32
    padded = F.pad(masks[:, 0].to(dtype), (padding,) * 4)                                        # [N, cells_y, cells_x]
    N, cells_y, cells_x = padded.shape
    low, high, fraction, inside_x = paste_taps(boxes[:, 0], boxes[:, 2], cells_x, W, dtype)
    low, high = (index[:, None].expand(N, cells_y, W) for index in (low, high))
    columns = _lerp(padded.gather(2, low), padded.gather(2, high), fraction[:, None])           # [N, cells_y, W]
    low, high, fraction, inside_y = paste_taps(boxes[:, 1], boxes[:, 3], cells_y, H, dtype)
    low, high = (index[:, :, None].expand(N, H, W) for index in (low, high))
    pasted = _lerp(columns.gather(1, low), columns.gather(1, high), fraction[:, :, None])       # [N, H, W]
    return pasted.masked_fill(~(inside_y[:, :, None] & inside_x[:, None]), 0).to(masks.dtype)[:, None]


def _lerp(start, end, fraction):
    return start + fraction * (end - start)


def paste_masks_bool_reference(masks, boxes, H, W, padding, threshold):
    return paste_masks_reference(masks, boxes, H, W, padding)[:, 0] > threshold


def paste_masks_rle_reference(masks, boxes, H, W, padding, threshold):
    """(text uint8 [B], offsets int64 [N + 1]): counts of mask n are text[offsets[n]:offsets[n + 1]]."""
    counts = [compress(runs_of_mask(paste_masks_bool_reference(mask[None], box[None], H, W, padding, threshold)[0].numpy()))
              for mask, box in zip(masks, boxes)]
    offsets = torch.tensor([0, *map(len, counts)], dtype=torch.int64).cumsum(0)
    return torch.tensor(list(b"".join(counts)), dtype=torch.uint8), offsets


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_PLACE = "Tensor masks, Tensor boxes, SymInt H, SymInt W, int padding"
_extension.define(f"paste_masks({_PLACE}) -> Tensor", paste_masks_reference)
_extension.define(f"paste_masks_bool({_PLACE}, float threshold) -> Tensor", paste_masks_bool_reference)
_extension.define(f"paste_masks_rle({_PLACE}, float threshold) -> (Tensor, Tensor)", paste_masks_rle_reference)


@torch.library.register_fake("minidamage::paste_masks", lib=_extension.library())
def _(masks, boxes, H, W, padding):
    return masks.new_empty((masks.shape[0], 1, H, W))


@torch.library.register_fake("minidamage::paste_masks_bool", lib=_extension.library())
def _(masks, boxes, H, W, padding, threshold):
    return masks.new_empty((masks.shape[0], H, W), dtype=torch.bool)


@torch.library.register_fake("minidamage::paste_masks_rle", lib=_extension.library())
def _(masks, boxes, H, W, padding, threshold):
    characters = torch.library.get_ctx().new_dynamic_size()                                     # known only when it has run
    return masks.new_empty((characters,), dtype=torch.uint8), boxes.new_empty((masks.shape[0] + 1,))


def _setup_context(ctx, inputs, output):
    masks, boxes, ctx.H, ctx.W, ctx.padding = inputs
    ctx.save_for_backward(boxes)
    ctx.mask_size = masks.shape[2:]


def _backward(ctx, grad):
    """pasted = By padded Bx^T with two weights a row, so grad_padded = By^T grad Bx. Dense products: this is not a training path."""
    boxes, = ctx.saved_tensors
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    By, Bx = (_weights(*paste_taps(boxes[:, axis], boxes[:, axis + 2], size + 2 * ctx.padding, picture, dtype), size + 2 * ctx.padding)
              for axis, size, picture in ((1, ctx.mask_size[0], ctx.H), (0, ctx.mask_size[1], ctx.W)))
    device = grad.device.type
    with torch.autocast(device, enabled=False) if autocast_is_on(device) else contextlib.nullcontext():  # it would round to 16 bits
        grad_padded = By.mT @ grad[:, 0].to(dtype) @ Bx                                         # [N, cells_y, cells_x]
    p, (mask_height, mask_width) = ctx.padding, ctx.mask_size
    return grad_padded[:, None, p:p + mask_height, p:p + mask_width].to(grad.dtype), None, None, None, None


def _weights(low, high, fraction, inside, cells):
    """[N, picture_size, cells]: the weight of each cell in each pixel."""
    cell = torch.arange(cells, device=low.device)
    weights = (low[:, :, None] == cell) * (1 - fraction)[:, :, None] + (high[:, :, None] == cell) * fraction[:, :, None]
    return weights * inside[:, :, None]


torch.library.register_autograd("minidamage::paste_masks", _backward, setup_context=_setup_context, lib=_extension.library())
