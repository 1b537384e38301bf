"""Box coding (Girshick et al., CVPR 2014, appendix C): the four numbers that take one box to another, which a box head learns, and back.

    encode   t_x = w_x (x - x_a) / w_a,      t_w = w_w log(w / w_a)
    decode   x = d_x / w_x w_a + x_a,        w = w_a e^min(d_w / w_w, clip)

and the same for y, h, with (x, y) the centres, (w, h) the sizes, `a` the box that is moved. torchvision's BoxCoder, one kernel each way and
one backward, where the framework's own operations are a few dozen passes. The cut at the picture's border is part of the decoding; boxes
may be read out of RoIs and one box may serve the deltas of all classes, without a copy. Kernels: csrc/exp_log.h, box_coding.h,
cpu/box_coding.cpp, cuda/box_coding.cu. They round as the reference does, but for e^x and log x: 2 units in the last place each.
"""
import math

import torch

from . import _extension
from ._checks import require_tensors

BBOX_XFORM_CLIP = math.log(1000.0 / 16)        # a box never grows more than 62.5-fold: exp() of a wild prediction stays finite


def encode_boxes(reference_boxes, proposals, weights=(1.0, 1.0, 1.0, 1.0)):
    """What takes proposals to reference_boxes: [..., 4] (t_x, t_y, t_w, t_h).

    Both: [..., 4] xyxy, floats, of positive sizes; leading dimensions broadcast. weights: (w_x, w_y, w_w, w_h) scale the four numbers to
    about unit variance. float16 and bfloat16 are computed in float32 and rounded once. Where one of the two requires a gradient, the plain
    PyTorch form runs. Raises ValueError for other shapes or kinds.
    """
    reference_boxes, proposals, dtype, compute = _check("encode_boxes", weights, reference_boxes=reference_boxes, proposals=proposals)
    reference_boxes, proposals = reference_boxes.to(compute), proposals.to(compute)
    differentiable = torch.is_grad_enabled() and (reference_boxes.requires_grad or proposals.requires_grad)
    encode = encode_boxes_reference if differentiable else torch.ops.minidamage.encode_boxes
    return encode(reference_boxes, proposals, [float(weight) for weight in weights]).to(dtype)


def decode_boxes(bbox_deltas, boxes, weights=(1.0, 1.0, 1.0, 1.0), bbox_xform_clip=BBOX_XFORM_CLIP, size=None):
    """Moves boxes by bbox_deltas. Returns [..., 4] xyxy in the boxes' pixels.

    bbox_deltas: [..., 4] float; boxes: [..., 4] xyxy; leading dimensions broadcast ([R, K, 4] and [R, 1, 4]: the deltas of K classes).
    weights: as in `encode_boxes`. bbox_xform_clip: upper bound of d_w / w_w and d_h / w_h. size: (height, width) of the picture at whose
    border the boxes are cut (a box outside becomes a line or a point), or None. NaN gives NaN.
    float16 and bfloat16 are computed in float32; the result has the wider type of the two. Differentiable once with respect to bbox_deltas;
    where `boxes` requires a gradient, the plain PyTorch form runs. Raises ValueError for other shapes or kinds.
    """
    bbox_deltas, boxes, dtype, compute = _check("decode_boxes", weights, bbox_deltas=bbox_deltas, boxes=boxes)
    if size is not None and (len(size) != 2 or not all(isinstance(side, (int, torch.SymInt)) and side >= 0 for side in size)):
        raise ValueError(f"decode_boxes: expected size as (height, width), two ints of 0 or more, got {size!r}")
    if not isinstance(bbox_xform_clip, (int, float)) or bbox_xform_clip != bbox_xform_clip:
        raise ValueError(f"decode_boxes: expected bbox_xform_clip as a number, got {bbox_xform_clip!r}")
    if compute == torch.float64 or bbox_deltas.is_cpu or bbox_deltas.dtype not in (torch.float16, torch.bfloat16):
        bbox_deltas = bbox_deltas.to(compute)                                       # a GPU reads 16-bit types as they are
    differentiable = torch.is_grad_enabled() and boxes.requires_grad
    decode = decode_boxes_reference if differentiable else torch.ops.minidamage.decode_boxes
    return decode(bbox_deltas, boxes.to(compute), [float(weight) for weight in weights], float(bbox_xform_clip), size).to(dtype)


def _check(op, weights, **pair):
    """(the first tensor, expanded where the second has more boxes; the second; dtype of the result; dtype that is computed in)."""
    require_tensors(op, **pair)
    (a_name, a), (b_name, b) = pair.items()
    if len(weights) != 4 or not all(isinstance(weight, (int, float)) for weight in weights):
        raise ValueError(f"{op}: expected weights as four numbers, got {weights!r}")
    for name, tensor in pair.items():
        if tensor.shape[-1:] != (4,) or tensor.is_complex():
            raise ValueError(f"{op}: expected {name} [..., 4] of real numbers, got {list(tensor.shape)} {tensor.dtype}; deltas "
                             "[R, 4 * K] of K classes: unflatten(1, (-1, 4))")
    if a.device != b.device:
        raise ValueError(f"{op}: expected {b_name} on {a.device}, where {a_name} is, got {b.device}")
    if a.shape != b.shape:
        a = _expanded(op, a_name, a, b_name, b)
    dtype = a.dtype if a.dtype == b.dtype else torch.promote_types(a.dtype, b.dtype)
    if not dtype.is_floating_point:
        dtype = torch.float32
    return a, b, dtype, torch.float64 if dtype == torch.float64 else torch.float32


def _expanded(op, a_name, a, b_name, b):
    sizes = list(a.shape)
    sizes[:0] = [1] * (b.dim() - a.dim())
    for d in range(-b.dim(), 0):
        if sizes[d] != b.shape[d] and sizes[d] != 1 and b.shape[d] != 1:
            raise ValueError(f"{op}: expected {a_name} and {b_name} [..., 4] that broadcast, got {list(a.shape)} and {list(b.shape)}; "
                             f"one box for the deltas of all classes: {b_name}[:, None]")
        sizes[d] = b.shape[d] if sizes[d] == 1 else sizes[d]
    return a.expand(sizes)


# ---- the references ----------------------------------------------------------------------------------------------------------


def _centre_and_size(boxes):
    x1, y1, x2, y2 = boxes.unbind(-1)
    w, h = x2 - x1, y2 - y1
    return x1 + 0.5 * w, y1 + 0.5 * h, w, h


def encode_boxes_reference(reference_boxes, proposals, weights):
    """The definition: arguments and result of torch.ops.minidamage.encode_boxes."""
    x_a, y_a, w_a, h_a = _centre_and_size(proposals)
    x, y, w, h = _centre_and_size(reference_boxes)
    w_x, w_y, w_w, w_h = weights
    return torch.stack([w_x * (x - x_a) / w_a, w_y * (y - y_a) / h_a, w_w * torch.log(w / w_a), w_h * torch.log(h / h_a)], dim=-1)


def decode_boxes_reference(bbox_deltas, boxes, weights, bbox_xform_clip, size):
    """The definition: arguments and result of torch.ops.minidamage.decode_boxes."""
    x_a, y_a, w_a, h_a = _centre_and_size(boxes)
    t_x, t_y, t_w, t_h = (delta / weight for delta, weight in zip(bbox_deltas.to(boxes.dtype).unbind(-1), weights))
    x, y = t_x * w_a + x_a, t_y * h_a + y_a
    half_w = 0.5 * t_w.clamp(max=bbox_xform_clip).exp() * w_a
    half_h = 0.5 * t_h.clamp(max=bbox_xform_clip).exp() * h_a
    corners = [x - half_w, y - half_h, x + half_w, y + half_h]
    if size is not None:
        corners = [corner.clamp(0, size[1 - k % 2]) for k, corner in enumerate(corners)]
    return torch.stack(corners, dim=-1)


def decode_boxes_backward_reference(grad, bbox_deltas, boxes, weights, bbox_xform_clip, size):
    """The derivative written out in csrc/box_coding.h: arguments and result of torch.ops.minidamage.decode_boxes_backward."""
    corners = decode_boxes_reference(bbox_deltas, boxes, weights, bbox_xform_clip, None).unbind(-1)
    grads = list(grad.unbind(-1))
    if size is not None:                                                            # it stops at the border, as through clamp()
        grads = [torch.where((corner >= 0) & (corner <= size[1 - k % 2]), each, 0) for k, (each, corner) in enumerate(zip(grads, corners))]
    (g_x1, g_y1, g_x2, g_y2), (_, _, w_a, h_a) = grads, _centre_and_size(boxes)
    w_x, w_y, w_w, w_h = weights
    t_w, t_h = bbox_deltas[..., 2].to(boxes.dtype) / w_w, bbox_deltas[..., 3].to(boxes.dtype) / w_h
    half_w = 0.5 * t_w.clamp(max=bbox_xform_clip).exp() * w_a
    half_h = 0.5 * t_h.clamp(max=bbox_xform_clip).exp() * h_a
    return torch.stack([(g_x1 + g_x2) * w_a / w_x, (g_y1 + g_y2) * h_a / w_y,
                        torch.where(t_w <= bbox_xform_clip, (g_x2 - g_x1) * half_w / w_w, 0),
                        torch.where(t_h <= bbox_xform_clip, (g_y2 - g_y1) * half_h / w_h, 0)], dim=-1).to(bbox_deltas.dtype)


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_DECODE = "Tensor bbox_deltas, Tensor boxes, float[] weights, float bbox_xform_clip, int[]? size"
_extension.define("encode_boxes(Tensor reference_boxes, Tensor proposals, float[] weights) -> Tensor", encode_boxes_reference)
_extension.define(f"decode_boxes({_DECODE}) -> Tensor", decode_boxes_reference)
_extension.define(f"decode_boxes_backward(Tensor grad, {_DECODE}) -> Tensor", decode_boxes_backward_reference)


@torch.library.register_fake("minidamage::encode_boxes", lib=_extension.library())
def _(reference_boxes, proposals, weights):
    return proposals.new_empty(reference_boxes.shape)


@torch.library.register_fake("minidamage::decode_boxes", lib=_extension.library())
def _(bbox_deltas, boxes, weights, bbox_xform_clip, size):
    return boxes.new_empty(bbox_deltas.shape)


@torch.library.register_fake("minidamage::decode_boxes_backward", lib=_extension.library())
def _(grad, bbox_deltas, boxes, weights, bbox_xform_clip, size):
    return bbox_deltas.new_empty(bbox_deltas.shape)


def _setup_context(ctx, inputs, output):
    bbox_deltas, boxes, *ctx.settings = inputs
    ctx.save_for_backward(bbox_deltas, boxes)


def _backward(ctx, grad):
    if ctx.needs_input_grad[1]:
        raise RuntimeError("decode_boxes: the gradient with respect to boxes is not implemented; use decode_boxes_reference under autograd")
    return torch.ops.minidamage.decode_boxes_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _no_derivative(ctx, *grads):
    raise RuntimeError("encode_boxes: derivatives are not implemented; use encode_boxes_reference under autograd")


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("decode_boxes: second derivatives are not implemented; use decode_boxes_reference under autograd")


torch.library.register_autograd("minidamage::encode_boxes", _no_derivative, lib=_extension.library())
torch.library.register_autograd("minidamage::decode_boxes", _backward, setup_context=_setup_context, lib=_extension.library())
torch.library.register_autograd("minidamage::decode_boxes_backward", _no_second_derivative, lib=_extension.library())
