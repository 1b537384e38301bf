"""Focal loss (Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5): cross-entropy that easy examples hardly enter.

    loss = alpha_t miss^gamma entropy,   miss = 1 - p_t, the probability given to everything but the truth

`sigmoid_focal_loss`, torchvision's signature and numbers: every logit is a yes-no question; target t in 0..1, p = sigmoid(x), q = 1 - p,
    entropy = -t log p - (1 - t) log q,   miss = p (1 - t) + q t,   alpha_t = alpha t + (1 - alpha) (1 - t).
`softmax_focal_loss`: a row of logits is one question with C answers; entropy = -log p_label, miss = 1 - p_label, alpha_t = alpha.

One kernel forward and one backward, which recomputes the probabilities instead of keeping them: nothing is saved but the inputs. Under
"mean" and "sum" the losses themselves are never in memory. Both hold for |x| up to 1e4 and beyond: p and q are computed apart, never as
1 - p. Deterministic on both machines, on any number of threads. Kernels: csrc/exp_log.h, focal_loss.h, cpu/focal_loss.cpp,
cuda/focal_loss.cu. Differs from torchvision: for gamma below 1 and p_t = 1 the gradient is its limit 0 (torchvision: NaN); targets may be
of another dtype, integers and booleans too.
"""
import torch
import torch.nn.functional as F

from . import _extension
from ._checks import autocast_is_on, require_tensors

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}                                       # Reduction of csrc/focal_loss.h


def sigmoid_focal_loss(inputs, targets, alpha=0.25, gamma=2, reduction="none"):
    """The loss of every element, in the shape of `inputs` ("none"), or their "mean" or "sum": a scalar.

    inputs: float, any shape, logits. targets: the same shape, 0..1 (soft targets allowed). alpha: weight of the positive targets in 0..1,
    1 - alpha of the negative ones; below 0: none. gamma >= 0: 0 is binary cross-entropy. NaN in either gives NaN. The mean of nothing is
    NaN, as in torchvision.
    float16 and bfloat16 are computed in float32 and rounded once; autocast returns float32. Differentiable once with respect to `inputs`;
    where `targets` requires a gradient, the plain PyTorch form runs. Raises ValueError for other shapes, dtypes or settings.
    """
    require_tensors("sigmoid_focal_loss", inputs=inputs, targets=targets)
    code = _check(inputs, alpha, gamma, reduction, "sigmoid_focal_loss")
    if alpha > 1:
        raise ValueError(f"sigmoid_focal_loss: expected alpha in 0..1, or below 0 for none, got {alpha}")
    if targets.shape != inputs.shape or targets.device != inputs.device:
        raise ValueError(f"sigmoid_focal_loss: expected targets of inputs' shape {list(inputs.shape)} on {inputs.device}, got "
                         f"{list(targets.shape)} on {targets.device}; targets[..., None] adds a dimension, one_hot() a class each")
    dtype, compute = _dtypes(inputs, targets)
    if inputs.dtype != compute:
        inputs = inputs.to(compute)
    if targets.dtype != compute:
        targets = targets.to(compute)
    if targets.requires_grad and torch.is_grad_enabled():
        loss = sigmoid_focal_loss_reference(inputs, targets, float(alpha), float(gamma), code)
    else:
        loss = torch.ops.minidamage.sigmoid_focal_loss(inputs, targets, float(alpha), float(gamma), code)
    return loss if loss.dtype == dtype else loss.to(dtype)


def softmax_focal_loss(logits, labels, alpha=0.25, gamma=2, reduction="none", ignore_index=-100):
    """The loss of every row, [R] ("none"), or their "mean" over the rows that are not ignored, or "sum": a scalar.

    logits: [R, C] float. labels: [R] int64 in 0..C - 1, or ignore_index: such a row gives 0 and no gradient. alpha: one weight for all;
    below 0: none. gamma >= 0: 0 is cross-entropy. A NaN logit makes its row NaN. The mean over no row is 0 (F.cross_entropy: NaN), so that
    a batch without labels does not end a training.
    float16 and bfloat16 as in `sigmoid_focal_loss`. Differentiable once with respect to `logits`. Raises ValueError for wrong shapes or
    settings and, on a CPU, for a label that does not exist (on a GPU such a row gives NaN).
    """
    require_tensors("softmax_focal_loss", logits=logits, labels=labels)
    code = _check(logits, alpha, gamma, reduction, "softmax_focal_loss")
    if not isinstance(ignore_index, int):
        raise ValueError(f"softmax_focal_loss: expected ignore_index as an int, got {ignore_index!r}")
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"softmax_focal_loss: expected logits [R, C] of at least one class, got {list(logits.shape)}; "
                         "maps [N, C, H, W]: logits.permute(0, 2, 3, 1).flatten(0, 2)")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64 or labels.device != logits.device:
        raise ValueError(f"softmax_focal_loss: expected labels [{logits.shape[0]}] int64 on {logits.device}, got {list(labels.shape)} "
                         f"{labels.dtype} on {labels.device}; class numbers, not one-hot rows")
    dtype, compute = _dtypes(logits, logits)
    if logits.dtype != compute:
        logits = logits.to(compute)
    loss = torch.ops.minidamage.softmax_focal_loss(logits, labels, float(alpha), float(gamma), code, ignore_index)
    return loss if loss.dtype == dtype else loss.to(dtype)


def _check(inputs, alpha, gamma, reduction, name):
    """The code of the reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: expected reduction none, mean or sum, got {reduction!r}")
    if not inputs.is_floating_point():
        raise ValueError(f"{name}: expected logits as floats, got {inputs.dtype}; pass what comes before the sigmoid or softmax")
    if not all(isinstance(value, (int, float)) for value in (alpha, gamma)) or not 0 <= gamma < float("inf") or alpha != alpha:
        raise ValueError(f"{name}: expected a number gamma >= 0 and a number alpha, got {gamma!r} and {alpha!r}")
    return REDUCTIONS[reduction]


def _dtypes(inputs, targets):
    """(dtype of the result, dtype that the kernel is given)."""
    dtype = inputs.dtype
    if dtype == torch.float32 and targets.dtype == torch.float32:                   # the usual case, first
        return dtype, dtype
    if targets.dtype != dtype and targets.is_floating_point():
        dtype = torch.promote_types(dtype, targets.dtype)
    if dtype in (torch.float16, torch.bfloat16):
        device = inputs.device.type
        if autocast_is_on(device):
            return torch.float32, torch.float32
        return dtype, torch.float32 if device == "cpu" else dtype
    return dtype, dtype


# ---- the references ----------------------------------------------------------------------------------------------------------


def _power(miss, gamma):
    """miss^gamma with the gradient 0 at miss = 0, where PyTorch's has Inf for gamma < 1."""
    return torch.where(miss > 0, torch.where(miss > 0, miss, 1) ** gamma, 1.0 if gamma == 0 else 0.0 * miss.detach())


def _power_below(miss, gamma):
    """miss^(gamma - 1), 0 at miss = 0: its factor is 0 there too, and faster."""
    return torch.where(miss > 0, torch.where(miss > 0, miss, 1) ** (gamma - 1), miss)


def _reduce(loss, reduction):
    return (loss, loss.mean(), loss.sum())[reduction]


def _compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def sigmoid_focal_loss_reference(inputs, targets, alpha, gamma, reduction):
    """The definition: arguments and result of torch.ops.minidamage.sigmoid_focal_loss."""
    x, t = inputs.to(_compute_dtype(inputs.dtype)), targets.to(_compute_dtype(inputs.dtype))
    entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    miss = torch.sigmoid(x) * (1 - t) + torch.sigmoid(-x) * t
    alpha_t = 1 if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)
    return _reduce(alpha_t * _power(miss, gamma) * entropy, reduction).to(inputs.dtype)


def sigmoid_focal_loss_backward_reference(grad, inputs, targets, alpha, gamma, reduction):
    """The derivative written out in csrc/focal_loss.h: arguments and result of torch.ops.minidamage.sigmoid_focal_loss_backward."""
    x, t = inputs.to(_compute_dtype(inputs.dtype)), targets.to(_compute_dtype(inputs.dtype))
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    entropy = F.binary_cross_entropy_with_logits(x, t, reduction="none")
    miss = p * (1 - t) + q * t
    alpha_t = 1 if alpha < 0 else alpha * t + (1 - alpha) * (1 - t)
    slope = gamma * _power_below(miss, gamma) * (1 - 2 * t) * p * q * entropy
    counted = inputs.numel() if reduction == REDUCTIONS["mean"] else 1
    return (grad / counted * alpha_t * (_power(miss, gamma) * (p * (1 - t) - q * t) + slope)).to(inputs.dtype)


def softmax_focal_loss_reference(logits, labels, alpha, gamma, reduction, ignore_index):
    """The definition: arguments and result of torch.ops.minidamage.softmax_focal_loss."""
    C = logits.shape[1]
    counted = labels != ignore_index
    wrong = (counted & ((labels < 0) | (labels >= C))).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(f"softmax_focal_loss: row {wrong[0]} has label {int(labels[wrong[0]])}, but there are {C} classes, 0 to {C - 1}, "
                         f"and ignore_index is {ignore_index}")
    x, label = logits.to(_compute_dtype(logits.dtype)), torch.where(counted, labels, 0)
    entropy = F.cross_entropy(x, label, reduction="none")
    others = F.one_hot(label, C) == 0
    miss = (F.softmax(x, 1) * others).sum(1)                                        # not 1 - p: right for p near 1
    alpha = 1.0 if alpha < 0 else alpha
    loss = torch.where(counted, alpha * _power(miss, gamma) * entropy, 0)           # [R]
    if reduction == REDUCTIONS["mean"]:
        return (loss.sum() / counted.sum().clamp(min=1)).to(logits.dtype)
    return _reduce(loss, reduction).to(logits.dtype)


def softmax_focal_loss_backward_reference(grad, logits, labels, alpha, gamma, reduction, ignore_index):
    """The derivative written out in csrc/focal_loss.h: arguments and result of torch.ops.minidamage.softmax_focal_loss_backward."""
    counted = labels != ignore_index
    x, label = logits.to(_compute_dtype(logits.dtype)), torch.where(counted, labels, 0)
    entropy, p = F.cross_entropy(x, label, reduction="none"), F.softmax(x, 1)
    truth = F.one_hot(label, logits.shape[1])
    miss = (p * (1 - truth)).sum(1)
    of_row = _power(miss, gamma) + gamma * _power_below(miss, gamma) * (p * truth).sum(1) * entropy
    difference = torch.where(truth == 1, -miss[:, None], p)                         # p_j - [j = label]
    rows = counted.sum().clamp(min=1) if reduction == REDUCTIONS["mean"] else 1
    grad = torch.where(counted, grad / rows * (1.0 if alpha < 0 else alpha), 0)
    return (torch.where(counted, of_row, 0) * grad)[:, None].mul(torch.where(counted[:, None], difference, 0)).to(logits.dtype)


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_SIGMOID = "Tensor inputs, Tensor targets, float alpha, float gamma, int reduction"
_SOFTMAX = "Tensor logits, Tensor labels, float alpha, float gamma, int reduction, int ignore_index"
_extension.define(f"sigmoid_focal_loss({_SIGMOID}) -> Tensor", sigmoid_focal_loss_reference)
_extension.define(f"sigmoid_focal_loss_backward(Tensor grad, {_SIGMOID}) -> Tensor", sigmoid_focal_loss_backward_reference)
_extension.define(f"softmax_focal_loss({_SOFTMAX}) -> Tensor", softmax_focal_loss_reference)
_extension.define(f"softmax_focal_loss_backward(Tensor grad, {_SOFTMAX}) -> Tensor", softmax_focal_loss_backward_reference)


@torch.library.register_fake("minidamage::sigmoid_focal_loss", lib=_extension.library())
def _(inputs, targets, alpha, gamma, reduction):
    return inputs.new_empty(()) if reduction else torch.empty_like(inputs)


@torch.library.register_fake("minidamage::sigmoid_focal_loss_backward", lib=_extension.library())
def _(grad, inputs, targets, alpha, gamma, reduction):
    return torch.empty_like(inputs)


@torch.library.register_fake("minidamage::softmax_focal_loss", lib=_extension.library())
def _(logits, labels, alpha, gamma, reduction, ignore_index):
    return logits.new_empty(() if reduction else (logits.shape[0],))


@torch.library.register_fake("minidamage::softmax_focal_loss_backward", lib=_extension.library())
def _(grad, logits, labels, alpha, gamma, reduction, ignore_index):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, *ctx.settings = inputs
    ctx.save_for_backward(logits, targets)


def _sigmoid_backward(ctx, grad):
    return torch.ops.minidamage.sigmoid_focal_loss_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


def _softmax_backward(ctx, grad):
    return torch.ops.minidamage.softmax_focal_loss_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("focal_loss: second derivatives are not implemented; use sigmoid_focal_loss_reference or "
                       "softmax_focal_loss_reference under autograd")


for _name, _backward in (("sigmoid_focal_loss", _sigmoid_backward), ("softmax_focal_loss", _softmax_backward)):
    torch.library.register_autograd(f"minidamage::{_name}", _backward, setup_context=_setup_context, lib=_extension.library())
    torch.library.register_autograd(f"minidamage::{_name}_backward", _no_second_derivative, lib=_extension.library())
