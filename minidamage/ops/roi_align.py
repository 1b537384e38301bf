"""RoIAlign (He et al., Mask R-CNN, ICCV 2017, section 3): a fixed-size window of features for every box, without rounding the box.

A box is cut into PH x PW bins, a bin is the mean of grid_h x grid_w bilinear samples. Bilinear weights and the grid are separable, so
    out[r, c, p, q] = sum_i sum_j Ay[r, p, i] Ax[r, q, j] features[n_r, c, i, j],
    Ay[r, p, i] = 1 / grid_h sum_k max(0, 1 - |clamp(y_k, 0, H - 1) - i|),   y_k = start_h + (p + (k + 1/2) / grid_h) bin_h,
over the samples with -1 <= y_k <= H (those outside count as zero); Ax alike. The gradient is the transpose of the same two matrices.
`multiscale_roi_align` does so over the levels of a feature pyramid in one call; `roi_align` is its single-level case, with torchvision's
signature and results. Kernels: csrc/bilinear.h, roi_align.h, cpu/roi_align.cpp, cuda/roi_align.cu. channels_last features are read as they
are; others are converted first. Differs from torchvision: a box with NaN or Inf, or beyond 2^30 feature pixels, gives zeros, and so does
an inverted box where the number of samples is adaptive (torchvision reads outside the features, or raises); on a CPU a batch index that
does not exist raises (torchvision reads outside the features).
"""
import torch
from torch import nn

from . import _extension
from ._checks import two_ints
from ._layout import is_channels_last, memory_format, memory_format_of, to_rois

MAX_LEVELS = 8  # MAX_FEATURE_LEVELS of csrc/roi_align.h
MAX_SAMPLES = 256  # a bin and axis; ROI_ALIGN_MAX_SAMPLES of csrc/roi_align.h
FARTHEST = 2 ** 30  # feature pixels; is_finite_axis() of csrc/roi_align.h


def roi_align(input, boxes, output_size, spatial_scale=1.0, sampling_ratio=-1, aligned=False):
    """The features of each box, resampled to output_size: [R, C, PH, PW], in the memory format of `input`.

    input: [N, C, H, W] float. boxes: [R, 5] float (index in the batch, x1, y1, x2, y2), or a list of N tensors [R_n, 4], in pixels of the
    picture. output_size: int or (PH, PW). spatial_scale: feature pixels per picture pixel. sampling_ratio: samples a bin and axis, at most
    256; <= 0: ceil(bin size), so that every pixel is seen. aligned: True shifts by half a pixel (pixel centres at .5), False is the older
    form, in which a box is at least one feature pixel in size.
    float16 and bfloat16 are accumulated in float32; on a CPU they are computed in float32, which autocast also returns.
    Differentiable once with respect to `input`, not to `boxes`. Deterministic on a CPU; on a GPU under
    torch.use_deterministic_algorithms(True). Raises ValueError for wrong shapes or, on a CPU, a batch index that does not exist (on a GPU
    such a box gives NaN).
    """
    rois = to_rois(boxes, input, "roi_align")
    levels = torch.zeros(rois.shape[0], dtype=torch.int64, device=rois.device)
    return multiscale_roi_align([input], rois, levels, output_size, [spatial_scale], sampling_ratio, aligned)


def multiscale_roi_align(features, rois, levels, output_size, spatial_scales, sampling_ratio=-1, aligned=False):
    """`roi_align` with the features of RoI r taken from features[levels[r]], all levels in one call: [R, C, PH, PW].

    features: list of [N, C, H_l, W_l], up to 8 levels. rois: [R, 5] float, batch index and xyxy in picture pixels. levels: [R] int64.
    spatial_scales: one for each level. No synchronisation with a GPU. The rest as in `roi_align`.
    """
    output_size = two_ints(output_size, "output_size", "roi_align")
    _check(features, rois, levels, spatial_scales, sampling_ratio)
    dtype = features[0].dtype
    for feature in features:
        dtype = torch.promote_types(dtype, feature.dtype)
    on_cpu = features[0].device.type == "cpu"
    compute = torch.float32 if on_cpu and dtype in (torch.float16, torch.bfloat16) else dtype
    rois = rois.detach().to(torch.float64 if compute == torch.float64 else torch.float32)
    output = torch.ops.minidamage.multiscale_roi_align([feature.to(compute) for feature in features], rois, levels, list(output_size),
                                                       [float(scale) for scale in spatial_scales], sampling_ratio, aligned)
    return output if on_cpu and torch.is_autocast_enabled("cpu") else output.to(dtype)


class RoIAlign(nn.Module):
    """`roi_align` as a module; arguments as there."""

    def __init__(self, output_size, spatial_scale, sampling_ratio, aligned=False):
        super().__init__()
        self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned = output_size, spatial_scale, sampling_ratio, aligned

    def forward(self, input, rois):
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self):
        return (f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, sampling_ratio={self.sampling_ratio}, "
                f"aligned={self.aligned}")


def _check(features, rois, levels, spatial_scales, sampling_ratio):
    if not 1 <= len(features) <= MAX_LEVELS or len(spatial_scales) != len(features):
        raise ValueError(f"roi_align: expected 1 to {MAX_LEVELS} feature levels and as many spatial_scales, got {len(features)} and "
                         f"{len(spatial_scales)}")
    first = features[0]
    for feature in features:
        if feature.dim() != 4 or feature.shape[:2] != first.shape[:2] or not feature.is_floating_point() or feature.device != first.device:
            raise ValueError(f"roi_align: expected float features [N, C, H, W], N, C and device the same on every level, got "
                             f"{[(list(f.shape), f.dtype, str(f.device)) for f in features]}")
        if feature.shape[2] == 0 or feature.shape[3] == 0:
            raise ValueError(f"roi_align: a feature level has no pixels: {list(feature.shape)}; the picture is smaller than the stride")
    if rois.dim() != 2 or rois.shape[1] != 5 or not rois.is_floating_point():
        raise ValueError(f"roi_align: expected rois [R, 5] float (batch index, x1, y1, x2, y2), got {list(rois.shape)} {rois.dtype}")
    if levels.shape != rois.shape[:1] or levels.dtype != torch.int64:
        raise ValueError(f"roi_align: expected levels [{rois.shape[0]}] int64, got {list(levels.shape)} {levels.dtype}")
    if rois.device != first.device or levels.device != first.device:
        raise ValueError(f"roi_align: features are on {first.device}, rois on {rois.device}, levels on {levels.device}; "
                         "move them to one device")
    if sampling_ratio > MAX_SAMPLES:
        raise ValueError(f"roi_align: expected a sampling_ratio of at most {MAX_SAMPLES} samples a bin and axis, got {sampling_ratio}; "
                         "2 is usual, and 0 takes one sample for each pixel")


# ---- the reference -----------------------------------------------------------------------------------------------------------


def roi_axis(low, high, spatial_scale, bins, sampling_ratio, aligned):
    """One axis of all RoIs: start, bin, grid, [R] each: feature pixels, and samples a bin. roi_axis() of csrc/roi_align.h."""
    offset = 0.5 if aligned else 0.0
    start = low * spatial_scale - offset
    size = (high * spatial_scale - offset) - start
    if not aligned:
        size = size.clamp(min=1)
    bin = size / torch.full_like(size, bins)                      # a GPU multiplies by the reciprocal of a Python number
    grid = torch.full_like(bin, sampling_ratio) if sampling_ratio > 0 else bin.ceil()
    return start, bin, grid


def sample_range(start, bin, grid, bins, size):
    """[first, last), [R] int64 each: a RoI's samples that can touch the picture, and a few more, numbered through all its bins from 0 to
    bins grid - 1. Most samples of a box far larger than the picture do not; a box that is not finite has none."""
    sane = (start.abs() < FARTHEST) & (bin.abs() < FARTHEST) & (grid >= 1)
    start, step, last = start.double(), (bin / grid).double(), grid.double() * bins
    enter, leave = (-1 - start) / step - 3, (size - start) / step + 2
    last = torch.where(step > 0, torch.minimum(leave, last), last)
    first = torch.minimum(torch.where(step > 0, enter, 0), last)
    return tuple(torch.where(sane, end, 0).ceil().clamp(min=0).long() for end in (first, last))


def sample_positions(start, bin, grid, k):
    """Where samples k [R, K] stand: p, their bin, and y, in feature pixels; [R, K] each. sample_position() of csrc/roi_align.h."""
    start, bin, grid = start[:, None], bin[:, None], grid[:, None]
    p, i = k // grid.long(), (k % grid.long()).to(start.dtype)
    return p, start + p.to(start.dtype) * bin + (i + 0.5) * bin / grid


def clamped_taps(y, size):
    """Of positions y: whether they count, the pixels low and high beside them, the weight of high. clamped_taps() of csrc/bilinear.h."""
    inside = (y >= -1) & (y <= size)                                                          # false for NaN
    y = torch.where(inside, y, 0).clamp(0, size - 1)
    low = y.long()
    return inside, low, (low + 1).clamp(max=size - 1), y - low.to(y.dtype)


def axis_weights(start, bin, grid, bins, size):
    """Ay (or Ax) of all RoIs, [R, bins, size], without the division by the number of samples: a bin's bilinear weights added up."""
    first, last = sample_range(start, bin, grid, bins, size)
    K = int((last - first).max()) if len(start) else 0
    k = first[:, None] + torch.arange(K, device=start.device)                                 # [R, K], of the longest range
    p, y = sample_positions(start, bin, torch.where(last > first, grid, 1), k)
    inside, low, high, weight_high = clamped_taps(y, size)
    inside &= k < last[:, None]
    weights = start.new_zeros((len(start), bins * size))
    for pixel, weight in ((low, 1 - weight_high), (high, weight_high)):
        weights.scatter_add_(1, torch.where(inside, p * size + pixel, 0), torch.where(inside, weight, 0))
    return weights.view(len(start), bins, size)


def _windows(rois, levels, N, sizes, output_size, spatial_scales, sampling_ratio, aligned):
    """Yields (r, level, picture, rows, columns, Ay [PH, rows], Ax [PW, columns]) for every RoI that touches its picture, r increasing
    within a level. rows and columns are the slices of the features with a weight."""
    pictures = _pictures(rois, levels, N, len(sizes))
    for level, (H, W) in enumerate(sizes):
        members = (levels == level).nonzero()[:, 0]
        _, x1, y1, x2, y2 = rois[members].unbind(1)
        axis_y = roi_axis(y1, y2, spatial_scales[level], output_size[0], sampling_ratio, aligned)
        axis_x = roi_axis(x1, x2, spatial_scales[level], output_size[1], sampling_ratio, aligned)
        count = (axis_y[2] * axis_x[2]).clamp(min=1)[:, None, None]
        Ay, Ax = axis_weights(*axis_y, output_size[0], H) / count, axis_weights(*axis_x, output_size[1], W)
        rows, columns = _extents(Ay), _extents(Ax)
        for m, r in enumerate(members.tolist()):
            if rows[m].stop > rows[m].start and columns[m].stop > columns[m].start:
                yield r, level, pictures[r], rows[m], columns[m], Ay[m, :, rows[m]], Ax[m, :, columns[m]]


def _extents(weights):
    """Of weights [R, bins, size]: for each RoI the slice of pixels with a weight."""
    used = (weights != 0).any(1).long()                                                       # [R, size]
    begin = used.argmax(1).tolist()
    end = (used.shape[1] - used.flip(1).argmax(1)).tolist()
    return [slice(b, e if u else b) for b, e, u in zip(begin, end, used.any(1).tolist())]


def roi_align_reference(features, rois, levels, output_size, spatial_scales, sampling_ratio, aligned):
    """The definition: arguments and result of torch.ops.minidamage.multiscale_roi_align. Two small products for each RoI."""
    dtype, compute = features[0].dtype, torch.float64 if features[0].dtype == torch.float64 else torch.float32
    N, C = features[0].shape[:2]
    windows = [features[0].new_zeros((C, *output_size), dtype=compute)] * len(rois)
    for r, level, n, rows, columns, Ay, Ax in _windows(rois.to(compute), levels, N, [f.shape[2:] for f in features], output_size,
                                                       spatial_scales, sampling_ratio, aligned):
        windows[r] = Ay @ features[level][n, :, rows, columns].to(compute) @ Ax.T                                     # [C, PH, PW]
    output = torch.stack(windows) if windows else features[0].new_zeros((0, C, *output_size))
    return output.to(dtype).contiguous(memory_format=memory_format_of(features[0]))


def roi_align_backward_reference(grad, rois, levels, N, heights, widths, spatial_scales, sampling_ratio, aligned, channels_last):
    """The transpose: arguments and result of torch.ops.minidamage.multiscale_roi_align_backward."""
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    grad_features = [torch.zeros((N, grad.shape[1], H, W), dtype=compute, device=grad.device) for H, W in zip(heights, widths)]
    for r, level, n, rows, columns, Ay, Ax in _windows(rois.to(compute), levels, N, list(zip(heights, widths)), grad.shape[2:],
                                                       spatial_scales, sampling_ratio, aligned):
        grad_features[level][n, :, rows, columns] += Ay.T @ grad[r].to(compute) @ Ax
    return [g.to(grad.dtype).contiguous(memory_format=memory_format(channels_last)) for g in grad_features]


def _pictures(rois, levels, N, level_count):
    """The picture of each RoI, as a list of ints; raises ValueError for one that does not exist."""
    for r, (n, l) in enumerate(zip(rois[:, 0].tolist(), levels.tolist())):
        if not (0 <= n < N and 0 <= l < level_count):
            raise ValueError(f"roi_align: RoI {r} asks for picture {n} of level {l}, but there are {N} pictures and {level_count} levels")
    return [int(n) for n in rois[:, 0].tolist()]


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_GEOMETRY = "float[] spatial_scales, int sampling_ratio, bool aligned"
_extension.define(f"multiscale_roi_align(Tensor[] features, Tensor rois, Tensor levels, int[] output_size, {_GEOMETRY}) -> Tensor",
                  roi_align_reference)
_extension.define("multiscale_roi_align_backward(Tensor grad, Tensor rois, Tensor levels, SymInt N, SymInt[] heights, SymInt[] widths, "
                  f"{_GEOMETRY}, bool channels_last) -> Tensor[]", roi_align_backward_reference)


@torch.library.register_fake("minidamage::multiscale_roi_align", lib=_extension.library())
def _(features, rois, levels, output_size, spatial_scales, sampling_ratio, aligned):
    shape = (rois.shape[0], features[0].shape[1], *output_size)
    return torch.empty(shape, dtype=features[0].dtype, device=features[0].device, memory_format=memory_format_of(features[0]))


@torch.library.register_fake("minidamage::multiscale_roi_align_backward", lib=_extension.library())
def _(grad, rois, levels, N, heights, widths, spatial_scales, sampling_ratio, aligned, channels_last):
    return [torch.empty((N, grad.shape[1], H, W), dtype=grad.dtype, device=grad.device, memory_format=memory_format(channels_last))
            for H, W in zip(heights, widths)]


def _setup_context(ctx, inputs, output):
    features, rois, levels, _, *ctx.geometry = inputs
    ctx.save_for_backward(rois, levels)
    ctx.N, ctx.heights, ctx.widths = features[0].shape[0], [f.shape[2] for f in features], [f.shape[3] for f in features]
    ctx.channels_last = is_channels_last(features[0])


def _backward(ctx, grad):
    rois, levels = ctx.saved_tensors
    grad_features = torch.ops.minidamage.multiscale_roi_align_backward(grad, rois, levels, ctx.N, ctx.heights, ctx.widths, *ctx.geometry,
                                                                       ctx.channels_last)
    return grad_features, None, None, None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("roi_align: second derivatives are not implemented; detach its output or use roi_align_reference under autograd")


torch.library.register_autograd("minidamage::multiscale_roi_align", _backward, setup_context=_setup_context, lib=_extension.library())
torch.library.register_autograd("minidamage::multiscale_roi_align_backward", _no_second_derivative, lib=_extension.library())
