"""Deformable convolution, v1 (Dai et al., Deformable Convolutional Networks, ICCV 2017, section 2.1) and v2 with a mask (Zhu et al.,
Deformable ConvNets v2, CVPR 2019, section 3.2): a convolution whose taps look where `offset` tells them.

For output pixel p, tap k of the KH x KW kernel, and offset group q, which is C / offset_groups neighbouring channels,
    y = p_y stride_y - padding_y + k_y dilation_y + offset[p, q, k, 0],   x alike with offset[p, q, k, 1],
    columns[p, k, c] = mask[p, q, k] input[y, x, c], bilinear,
    output[p, o] = bias[o] + sum_k sum_c weight[o, k, c] columns[p, k, c].
Pixels outside the picture are zero, and so is a whole sample unless -1 <= y < H and -1 <= x < W. `deform_conv2d` has torchvision's
signature and results; on a kink (y or x an integer) the derivative is torchvision's too, the one towards larger y or x. Kernels:
csrc/deform_conv2d.h, gemm.h, cpu/{gemm,deform_conv2d}.cpp, cuda/deform_conv2d.cu. channels_last tensors are read as they are; others
are converted first. Differs from torchvision: a sample at NaN or infinity counts as outside (torchvision reads outside the input); the
backward pass is deterministic on request; under autocast on a GPU the product runs in the autocast dtype, positions in float32
(torchvision: all in float32).
"""
import math

import torch
from torch import nn

from . import _extension
from ._checks import autocast_is_on, two_ints
from ._layout import memory_format_of


def deform_conv2d(input, offset, weight, bias=None, stride=(1, 1), padding=(0, 0), dilation=(1, 1), mask=None):
    """The deformable convolution of `input`: [N, O, OH, OW], in the memory format of `input`.

    input: [N, C, H, W] float. offset: [N, 2 offset_groups KH KW, OH, OW] float, pixels of the input: for each offset group and tap, in
    row-major order, y then x. weight: [O, C / groups, KH, KW]. bias: [O] or None. mask: [N, offset_groups KH KW, OH, OW] float factors
    (v2), or None for v1. stride, padding, dilation: int or (vertical, horizontal). groups and offset_groups follow from the shapes.
    input, weight and bias share a dtype; offset and mask may have another, they are read in float32 (float64 beside a float64 input).
    float16 and bfloat16 are accumulated in float32; on a CPU they are computed in float32, which autocast also returns.
    A sample at NaN or infinity counts as outside: zero, with zero gradients (times a mask of NaN: NaN).
    Differentiable once with respect to all tensors. Deterministic on a CPU, the same bytes on any number of threads (but the gradient of
    a lone bias, O = 1, which is the framework's sum); on a GPU under torch.use_deterministic_algorithms(True).
    Raises ValueError for shapes, dtypes or devices that do not belong together.
    """
    stride, dilation = two_ints(stride, "stride", "deform_conv2d"), two_ints(dilation, "dilation", "deform_conv2d")
    padding = two_ints(padding, "padding", "deform_conv2d", least=0)
    tensors = {"input": input, "offset": offset, "weight": weight, "bias": bias, "mask": mask}
    for name, tensor in tensors.items():
        if tensor is not None and not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
            got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"deform_conv2d: expected {name} as a floating-point tensor, got {got}; convert it, e.g. with .float()")
    on_cpu = input.device.type == "cpu"
    autocast = autocast_is_on(input.device.type)
    if autocast:
        lower = torch.float32 if on_cpu else torch.get_autocast_dtype(input.device.type)
        input, weight, bias = (t if t is None or t.dtype == torch.float64 else t.to(lower) for t in (input, weight, bias))
    groups, offset_groups = _check(input, offset, weight, bias, stride, padding, dilation, mask)
    dtype = input.dtype
    compute = torch.float32 if on_cpu and dtype in (torch.float16, torch.bfloat16) else dtype
    positions = torch.float64 if dtype == torch.float64 else torch.float32
    input, weight, bias = (t if t is None else t.to(compute) for t in (input, weight, bias))
    offset, mask = (t if t is None else t.to(positions) for t in (offset, mask))
    output = torch.ops.minidamage.deform_conv2d(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups)
    return output.to(dtype)


class DeformConv2d(nn.Module):
    """`deform_conv2d` with weight and bias of its own, named and initialised as in nn.Conv2d; forward(input, offset, mask=None)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=True):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"DeformConv2d: expected in_channels and out_channels divisible by groups, got {in_channels}, {out_channels} "
                             f"and groups={groups}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = (two_ints(value, name, "DeformConv2d") for value, name in (
            (kernel_size, "kernel_size"), (stride, "stride"), (dilation, "dilation")))
        self.padding = two_ints(padding, "padding", "DeformConv2d", least=0)
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *self.kernel_size))
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, input, offset, mask=None):
        return deform_conv2d(input, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)

    def extra_repr(self):
        return (f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
                f"dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}")


def _check(input, offset, weight, bias, stride, padding, dilation, mask):
    """Returns groups and offset_groups."""
    if input.dim() != 4 or weight.dim() != 4:
        raise ValueError(f"deform_conv2d: expected input [N, C, H, W] and weight [O, C / groups, KH, KW], got {list(input.shape)} and "
                         f"{list(weight.shape)}")
    N, C, H, W = input.shape
    O, group_channels, KH, KW = weight.shape
    if min(C, H, W, O, group_channels, KH, KW) == 0:
        raise ValueError(f"deform_conv2d: input {list(input.shape)} or weight {list(weight.shape)} is empty; only N may be 0")
    groups = C // group_channels
    if C % group_channels or O % groups:
        raise ValueError(f"deform_conv2d: {C} input channels and {O} outputs cannot be divided into groups of {group_channels} channels, "
                         f"which weight {list(weight.shape)} asks for; expected weight [O, C / groups, KH, KW]")
    OH, OW = (size + 2 * pad - step * (kernel - 1) - 1 for size, pad, step, kernel in zip((H, W), padding, dilation, (KH, KW)))
    if OH < 0 or OW < 0:
        raise ValueError(f"deform_conv2d: a kernel of {KH} x {KW} with dilation {dilation} is larger than the input of {H} x {W} with "
                         f"padding {padding}; increase padding")
    OH, OW = OH // stride[0] + 1, OW // stride[1] + 1
    offset_groups = offset.shape[1] // (2 * KH * KW) if offset.dim() == 4 else 0
    if offset_groups < 1 or list(offset.shape) != [N, 2 * offset_groups * KH * KW, OH, OW] or C % offset_groups:
        raise ValueError(f"deform_conv2d: expected offset [{N}, {2 * KH * KW} offset_groups, {OH}, {OW}] (y and x of each of the {KH * KW} "
                         f"taps) with offset_groups dividing the {C} input channels, got {list(offset.shape)}; the convolution that "
                         "makes it needs this one's kernel size, stride, padding and dilation")
    if mask is not None and list(mask.shape) != [N, offset_groups * KH * KW, OH, OW]:
        raise ValueError(f"deform_conv2d: expected mask [{N}, {offset_groups * KH * KW}, {OH}, {OW}], one factor for every pair of offset "
                         f"channels, got {list(mask.shape)}")
    if bias is not None and list(bias.shape) != [O]:
        raise ValueError(f"deform_conv2d: expected bias [{O}], one for each output channel, got {list(bias.shape)}")
    if weight.dtype != input.dtype or bias is not None and bias.dtype != input.dtype:
        raise ValueError(f"deform_conv2d: input is {input.dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}; "
                         "convert them to one dtype, or run under torch.autocast")
    devices = {str(t.device) for t in (input, offset, weight, bias, mask) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"deform_conv2d: tensors are on {' and '.join(sorted(devices))}; move them to one device")
    return groups, offset_groups


# ---- the reference -----------------------------------------------------------------------------------------------------------


def sample_positions(offset, kernel, stride, padding, dilation, offset_groups):
    """Where every tap looks: y and x, each [N, offset_groups, K, OH, OW], pixels of the input."""
    N, _, OH, OW = offset.shape
    offset = offset.reshape(N, offset_groups, kernel[0] * kernel[1], 2, OH, OW)
    positions = []
    for axis, size in enumerate((OH, OW)):
        taps = torch.arange(kernel[axis], device=offset.device) * dilation[axis] - padding[axis]
        taps = taps.repeat_interleave(kernel[1]) if axis == 0 else taps.repeat(kernel[0])                        # [K], row-major
        pixels = torch.arange(size, device=offset.device) * stride[axis]
        pixels = pixels[:, None] if axis == 0 else pixels[None, :]
        positions.append((taps[:, None, None] + pixels).to(offset.dtype) + offset[:, :, :, axis])
    return positions


def sample_corners(offset, size, kernel, stride, padding, dilation, offset_groups):
    """Of every sample the four pixels around it: a list of (pixel [..] int64, inside [..] bool, weight, d weight / dy, d weight / dx),
    each [N, offset_groups, K, OH, OW]. pixel = y W + x, 0 where it is not inside the picture."""
    H, W = size
    y, x = sample_positions(offset, kernel, stride, padding, dilation, offset_groups)
    near = (y >= -1) & (y < H) & (x >= -1) & (x < W)                                          # NaN is not
    y, x = torch.where(near, y, 0), torch.where(near, x, 0)
    below, right = y - y.detach().floor(), x - x.detach().floor()
    corners = []
    for i in range(4):
        row, column = y.detach().floor().long() + i // 2, x.detach().floor().long() + i % 2
        inside = near & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        weight_y, slope_y = (below, 1) if i // 2 else (1 - below, -1)
        weight_x, slope_x = (right, 1) if i % 2 else (1 - right, -1)
        corners.append((torch.where(inside, row * W + column, 0), inside, weight_y * weight_x, slope_y * weight_x, slope_x * weight_y))
    return corners


def _pixels(input, corner, offset_groups):
    """The input at one corner of every sample: [N, offset_groups, C / offset_groups, K, OH, OW], zero outside."""
    pixel, inside = corner[:2]
    N, C = input.shape[:2]
    rows = input.reshape(N, offset_groups, C // offset_groups, input.shape[2] * input.shape[3])
    values = rows.gather(3, pixel.flatten(2)[:, :, None].expand(-1, -1, C // offset_groups, -1))
    return torch.where(inside[:, :, None], values.unflatten(3, pixel.shape[2:]), 0)


def _columns(input, corners, mask, offset_groups):
    """[N, C, K, OH, OW]."""
    columns = sum(corner[2][:, :, None] * _pixels(input, corner, offset_groups) for corner in corners)
    if mask is not None:
        columns = columns * mask.unflatten(1, (offset_groups, -1))[:, :, None]
    return columns.flatten(1, 2)


def _corners_of(input, offset, weight, stride, padding, dilation, offset_groups):
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    return sample_corners(offset.to(compute), input.shape[2:], weight.shape[2:], stride, padding, dilation, offset_groups), compute


def deform_conv2d_reference(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
    """The definition: arguments and result of torch.ops.minidamage.deform_conv2d. Differentiable by autograd."""
    corners, compute = _corners_of(input, offset, weight, stride, padding, dilation, offset_groups)
    columns = _columns(input.to(compute), corners, mask, offset_groups).unflatten(1, (groups, -1))
    weight = weight.to(compute).flatten(2).unflatten(0, (groups, -1))
    output = torch.einsum("ngckyx,gock->ngoyx", columns, weight).flatten(1, 2)
    if bias is not None:
        output = output + bias.to(compute)[:, None, None]
    return output.to(input.dtype).contiguous(memory_format=memory_format_of(input))


def deform_conv2d_backward_input_reference(grad, input, offset, mask, weight, stride, padding, dilation, groups, offset_groups):
    """Gradients of input, offset and mask ([0] without a mask): arguments and result of deform_conv2d_backward_input."""
    N, C, H, W = input.shape
    corners, compute = _corners_of(input, offset, weight, stride, padding, dilation, offset_groups)
    grad_columns = torch.einsum("ngoyx,gock->ngckyx", grad.to(compute).unflatten(1, (groups, -1)),
                                weight.to(compute).flatten(2).unflatten(0, (groups, -1)))
    grad_columns = grad_columns.flatten(1, 2).unflatten(1, (offset_groups, -1))               # [N, offset_groups, channels, K, OH, OW]
    scale = torch.ones((), dtype=compute, device=input.device) if mask is None else mask.unflatten(1, (offset_groups, -1))
    grad_input = torch.zeros((N, offset_groups, C // offset_groups, H * W), dtype=compute, device=input.device)
    grad_mask, grad_y, grad_x = 0, 0, 0
    for corner in corners:
        pixel, inside, weight_i, slope_y, slope_x = corner
        dots = (grad_columns * _pixels(input.to(compute), corner, offset_groups)).sum(2)     # [N, offset_groups, K, OH, OW]
        grad_mask, grad_y, grad_x = grad_mask + weight_i * dots, grad_y + scale * slope_y * dots, grad_x + scale * slope_x * dots
        part = torch.where(inside[:, :, None], grad_columns * (scale * weight_i)[:, :, None], 0)
        grad_input.scatter_add_(3, pixel.flatten(2)[:, :, None].expand(-1, -1, C // offset_groups, -1), part.flatten(3))
    grad_offset = torch.stack([grad_y, grad_x], 3).flatten(1, 3)
    grad_mask = offset.new_empty(0) if mask is None else grad_mask.flatten(1, 2).contiguous(memory_format=memory_format_of(mask))
    return (grad_input.view(N, C, H, W).to(input.dtype).contiguous(memory_format=memory_format_of(input)),
            grad_offset.contiguous(memory_format=memory_format_of(offset)), grad_mask)


def deform_conv2d_backward_weight_reference(grad, input, offset, mask, weight, stride, padding, dilation, groups, offset_groups):
    """The gradient of weight: arguments and result of deform_conv2d_backward_weight."""
    corners, compute = _corners_of(input, offset, weight, stride, padding, dilation, offset_groups)
    columns = _columns(input.to(compute), corners, mask, offset_groups).unflatten(1, (groups, -1))
    grad_weight = torch.einsum("ngoyx,ngckyx->gock", grad.to(compute).unflatten(1, (groups, -1)), columns)
    return grad_weight.reshape(weight.shape).to(weight.dtype).contiguous(memory_format=memory_format_of(weight))


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_GEOMETRY = "int[] stride, int[] padding, int[] dilation, int groups, int offset_groups"
_PROBLEM = f"Tensor input, Tensor offset, Tensor? mask, Tensor weight, {_GEOMETRY}"
_extension.define(f"deform_conv2d(Tensor input, Tensor offset, Tensor? mask, Tensor weight, Tensor? bias, {_GEOMETRY}) -> Tensor",
                  deform_conv2d_reference)
_extension.define(f"deform_conv2d_backward_input(Tensor grad, {_PROBLEM}) -> (Tensor, Tensor, Tensor)",
                  deform_conv2d_backward_input_reference)
_extension.define(f"deform_conv2d_backward_weight(Tensor grad, {_PROBLEM}) -> Tensor", deform_conv2d_backward_weight_reference)


@torch.library.register_fake("minidamage::deform_conv2d", lib=_extension.library())
def _(input, offset, mask, weight, bias, stride, padding, dilation, groups, offset_groups):
    shape = (input.shape[0], weight.shape[0], *offset.shape[2:])
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _empty_like(tensor):
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=memory_format_of(tensor))


@torch.library.register_fake("minidamage::deform_conv2d_backward_input", lib=_extension.library())
def _(grad, input, offset, mask, weight, stride, padding, dilation, groups, offset_groups):
    return _empty_like(input), _empty_like(offset), offset.new_empty(0) if mask is None else _empty_like(mask)


@torch.library.register_fake("minidamage::deform_conv2d_backward_weight", lib=_extension.library())
def _(grad, input, offset, mask, weight, stride, padding, dilation, groups, offset_groups):
    return _empty_like(weight)


def _setup_context(ctx, inputs, output):
    input, offset, mask, weight, bias, *ctx.geometry = inputs
    ctx.save_for_backward(input, offset, mask, weight)


def _backward(ctx, grad):
    problem = (*ctx.saved_tensors, *ctx.geometry)
    grad_input = grad_offset = grad_mask = grad_weight = grad_bias = None
    if any(ctx.needs_input_grad[:3]):
        grad_input, grad_offset, grad_mask = torch.ops.minidamage.deform_conv2d_backward_input(grad, *problem)
    if ctx.needs_input_grad[3]:
        grad_weight = torch.ops.minidamage.deform_conv2d_backward_weight(grad, *problem)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.sum((0, 2, 3))
    return grad_input, grad_offset, grad_mask if ctx.needs_input_grad[2] else None, grad_weight, grad_bias, *[None] * 5


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("deform_conv2d: second derivatives are not implemented; detach its output or use deform_conv2d_reference under "
                       "autograd")


torch.library.register_autograd("minidamage::deform_conv2d", _backward, setup_context=_setup_context, lib=_extension.library())
for _name in ("deform_conv2d_backward_input", "deform_conv2d_backward_weight"):
    torch.library.register_autograd(f"minidamage::{_name}", _no_second_derivative, lib=_extension.library())
