"""RoI max pooling (Girshick, Fast R-CNN, ICCV 2015, section 2.1): a fixed-size window of features for every box, the box rounded.

A box is rounded to whole feature pixels, both ends inclusive, size = max(1, last - first + 1), and cut into PH x PW bins:
    out[r, c, p, q] = max over i, j of input[n_r, c, i, j],   first + floor(p size / PH) <= i < first + ceil((p + 1) size / PH),
j alike, inside the picture; 0 for a bin without pixels. The gradient goes to the pixel that was the largest, the first one of equals.
The older sibling of roi_align, which does not round; torchvision's signature and results. Kernels: csrc/roi_pool.h, cpu/roi_pool.cpp,
cuda/roi_pool.cu. channels_last features are read as they are; others are converted first. Differs from torchvision: NaN features give
NaN (torchvision passes over them), -Inf stays -Inf; a box with NaN or Inf, or beyond 2^30 feature pixels, gives zeros (torchvision casts it
to some integer); on a CPU a batch index that does not exist raises (torchvision reads outside the features).
"""
import torch
from torch import nn

from . import _extension
from ._checks import require_tensors, two_ints
from ._layout import is_channels_last, memory_format, memory_format_of, to_rois

FARTHEST = 2 ** 30                                                                  # feature pixels; pool_axis() of csrc/roi_pool.h


def roi_pool(input, boxes, output_size, spatial_scale=1.0):
    """The largest features of each bin of each box: [R, C, PH, PW], in the memory format of `input`.

    input: [N, C, H, W] float. boxes: [R, 5] float (index in the batch, x1, y1, x2, y2), or a list of N tensors [R_n, 4], in pixels of the
    picture. output_size: int or (PH, PW). spatial_scale: feature pixels per picture pixel.
    float16 and bfloat16 lose nothing (a maximum is no sum); their boxes are computed in float32. Differentiable once with respect to
    `input`, not to `boxes`. Deterministic on a CPU; on a GPU under torch.use_deterministic_algorithms(True). Raises ValueError for wrong
    shapes or, on a CPU, a batch index that does not exist (on a GPU such a box gives NaN).
    """
    require_tensors("roi_pool", input=input)
    output_size = two_ints(output_size, "output_size", "roi_pool")
    if input.dim() != 4 or not input.is_floating_point():
        raise ValueError(f"roi_pool: expected float features [N, C, H, W], got {list(input.shape)} {input.dtype}")
    if input.shape[2] == 0 or input.shape[3] == 0:
        raise ValueError(f"roi_pool: the features have no pixels: {list(input.shape)}; the picture is smaller than the stride")
    rois = to_rois(boxes, input, "roi_pool").detach()
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.is_floating_point():
        raise ValueError(f"roi_pool: expected boxes [R, 5] float (batch index, x1, y1, x2, y2), got {list(rois.shape)} {rois.dtype}")
    if rois.device != input.device:
        raise ValueError(f"roi_pool: features are on {input.device}, boxes on {rois.device}; move them to one device")
    half = input.device.type == "cpu" and input.dtype in (torch.float16, torch.bfloat16)
    rois = rois.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    output, _ = torch.ops.minidamage.roi_pool(input.float() if half else input, rois, list(output_size), float(spatial_scale))
    return output.to(input.dtype)


class RoIPool(nn.Module):
    """`roi_pool` as a module; arguments as there."""

    def __init__(self, output_size, spatial_scale):
        super().__init__()
        self.output_size, self.spatial_scale = output_size, spatial_scale

    def forward(self, input, rois):
        return roi_pool(input, rois, self.output_size, self.spatial_scale)

    def extra_repr(self):
        return f"output_size={self.output_size}, spatial_scale={self.spatial_scale}"


# ---- the reference -----------------------------------------------------------------------------------------------------------


def pool_axis(low, high, spatial_scale, bins, extent):
    """One axis of all RoIs: (begin, end) int64 [R, bins], the pixels of each bin inside a picture of `extent` pixels."""
    first, last = (_round(position * spatial_scale) for position in (low, high))
    sane = (first.abs() < FARTHEST) & (last.abs() < FARTHEST)                                  # False for NaN
    first, last = (torch.where(sane, position, 0).long() for position in (first, last))
    size = (last - first + 1).clamp(min=1)
    bin = (size / torch.full_like(low, bins))[:, None]            # [R, 1]; a GPU multiplies by the reciprocal of a Python number
    p = torch.arange(bins, device=low.device, dtype=low.dtype)
    begin, end = (p * bin).floor().long() + first[:, None], ((p + 1) * bin).ceil().long() + first[:, None]
    return torch.where(sane[:, None], begin.clamp(0, extent), 0), torch.where(sane[:, None], end.clamp(0, extent), 0)


def _round(x):
    """Halves away from zero, as in C (torch.round: to even)."""
    return x.trunc() + torch.where((x - x.trunc()).abs() >= 0.5, x.sign(), 0)


def roi_pool_reference(input, rois, output_size, spatial_scale):
    """The definition: arguments and result (output, argmax) of torch.ops.minidamage.roi_pool. One window with padding for each RoI."""
    N, C, H, W = input.shape
    R, (PH, PW) = len(rois), output_size
    rois = rois.to(torch.float64 if input.dtype == torch.float64 else torch.float32)
    pictures = _pictures(rois, N)
    y_begin, y_end = pool_axis(rois[:, 2], rois[:, 4], spatial_scale, PH, H)
    x_begin, x_end = pool_axis(rois[:, 1], rois[:, 3], spatial_scale, PW, W)
    outputs, positions = [], []
    for r in range(R):
        y, row = _window(y_begin[r], y_end[r])                                                # [PH, Ky]: pixels, and which of them count
        x, column = _window(x_begin[r], x_end[r])                                             # [PW, Kx]
        pixel = (y.clamp(max=H - 1)[:, None, :, None] * W + x.clamp(max=W - 1)[None, :, None, :]).flatten(2)     # [PH, PW, Ky Kx]
        counts = (row[:, None, :, None] & column[None, :, None, :]).flatten(2)
        values = input[pictures[r]].flatten(1)[:, pixel]                                      # [C, PH, PW, Ky Kx]
        best = _first_largest(values, counts)                                                 # [C, PH, PW, 1]
        empty = ~counts.any(-1)                                                               # [PH, PW]
        outputs.append(torch.where(empty, 0, values.gather(-1, best).squeeze(-1)))
        positions.append(torch.where(empty, -1, pixel.expand(C, -1, -1, -1).gather(-1, best).squeeze(-1)))
    output = torch.stack(outputs) if R else input.new_zeros((0, C, PH, PW))
    argmax = torch.stack(positions).int() if R else torch.zeros((0, C, PH, PW), dtype=torch.int32, device=input.device)
    return output.contiguous(memory_format=memory_format_of(input)), argmax.contiguous(memory_format=torch.channels_last)


def _window(begin, end):
    """Pixels [bins, K] from each bin's first one on, and whether they belong to the bin; K is the largest bin's size, at least 1."""
    pixel = begin[:, None] + torch.arange(max(1, int((end - begin).max())), device=begin.device)
    return pixel, pixel < end[:, None]


def _first_largest(values, counts):
    """The index of the largest value that counts along the last dimension, NaN above all, the first of equals; keepdim."""
    K = values.shape[-1]
    nan = values.isnan() & counts
    ranked = torch.where(counts, values, -torch.inf).masked_fill(nan.any(-1, keepdim=True), -torch.inf).masked_fill(nan, torch.inf)
    largest = (ranked == ranked.amax(-1, keepdim=True)) & counts                              # -Inf features tie with what does not count
    return torch.where(largest, torch.arange(K, device=values.device), K - 1).amin(-1, keepdim=True)


def roi_pool_backward_reference(grad, argmax, rois, N, H, W, spatial_scale, channels_last):
    """The transpose: arguments and result of torch.ops.minidamage.roi_pool_backward."""
    R, C = grad.shape[:2]
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_input = torch.zeros((N, C, H * W), dtype=compute, device=grad.device)
    pictures = torch.tensor(_pictures(rois, N), dtype=torch.int64, device=grad.device)[:, None, None]
    pixel = argmax.flatten(2).long()                                                          # [R, C, PH PW]
    channel = torch.arange(C, device=grad.device)[:, None]
    values = torch.where(pixel >= 0, grad.flatten(2).to(compute), 0)
    grad_input.index_put_((pictures, channel, pixel.clamp(min=0)), values, accumulate=True)
    return grad_input.view(N, C, H, W).to(grad.dtype).contiguous(memory_format=memory_format(channels_last))


def _pictures(rois, N):
    """The picture of each RoI, as a list of ints; raises ValueError for one that does not exist."""
    for r, n in enumerate(rois[:, 0].tolist()):
        if not 0 <= n < N:
            raise ValueError(f"roi_pool: RoI {r} asks for picture {n}, but there are {N} pictures")
    return [int(n) for n in rois[:, 0].tolist()]


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_extension.define("roi_pool(Tensor input, Tensor rois, int[] output_size, float spatial_scale) -> (Tensor, Tensor)", roi_pool_reference)
_extension.define("roi_pool_backward(Tensor grad, Tensor argmax, Tensor rois, SymInt N, SymInt H, SymInt W, float spatial_scale, "
                  "bool channels_last) -> Tensor", roi_pool_backward_reference)


@torch.library.register_fake("minidamage::roi_pool", lib=_extension.library())
def _(input, rois, output_size, spatial_scale):
    shape = (rois.shape[0], input.shape[1], *output_size)
    output = torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))
    return output, torch.empty(shape, dtype=torch.int32, device=input.device, memory_format=torch.channels_last)


@torch.library.register_fake("minidamage::roi_pool_backward", lib=_extension.library())
def _(grad, argmax, rois, N, H, W, spatial_scale, channels_last):
    return torch.empty((N, grad.shape[1], H, W), dtype=grad.dtype, device=grad.device, memory_format=memory_format(channels_last))


def _setup_context(ctx, inputs, output):
    input, rois, _, ctx.spatial_scale = inputs
    ctx.save_for_backward(output[1], rois)
    ctx.mark_non_differentiable(output[1])
    ctx.N, _, ctx.H, ctx.W = input.shape
    ctx.channels_last = is_channels_last(input)


def _backward(ctx, grad, _):
    argmax, rois = ctx.saved_tensors
    grad_input = torch.ops.minidamage.roi_pool_backward(grad, argmax, rois, ctx.N, ctx.H, ctx.W, ctx.spatial_scale, ctx.channels_last)
    return grad_input, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("roi_pool: second derivatives are not implemented; detach its output or use roi_pool_reference under autograd")


torch.library.register_autograd("minidamage::roi_pool", _backward, setup_context=_setup_context, lib=_extension.library())
torch.library.register_autograd("minidamage::roi_pool_backward", _no_second_derivative, lib=_extension.library())
