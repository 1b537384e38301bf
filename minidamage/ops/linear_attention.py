"""Linear attention (Linformer: Wang et al., 2020; the CAGM of Context-CrackNet, eq. 6-11): self-attention over k learned summaries of
the N positions, so that its cost grows with N k in place of N^2.

    Q = X W_q^T + b_q,   K = E^T (X W_k^T + b_k),   V = F^T (X W_v^T + b_v),   X [N, D], E and F [N, k]
    out = softmax(Q_h K_h^T / sqrt(d)) V_h of every head h, d = A / num_heads channels, side by side: [N, A];   then out W_o^T + b_o

K and V of length N never exist: E^T (X W_k^T + 1 b_k^T) = (E^T X) W_k^T + (E^T 1) b_k^T is the same and takes N / k times fewer
operations. The [N, k] scores never exist either: rows are taken a tile at a time, forward and again backward from the saved
log-sum-exp. Memory is O(N D + k D). `linear_attention` is the whole; `linear_attention_maps` gives the softmax alone, to look at.
Kernels: csrc/linear_attention.h, gemm.h, cpu/{gemm,linear_attention}.cpp, cuda/{linear,fused}_attention.cu. Differs from the paper's
eq. 8, which writes K E where only E^T K fits.
"""
import math

import torch

from . import _extension
from ._checks import autocast_is_on, require_tensors

OPTIONAL = ("b_q", "b_k", "b_v", "w_o", "b_o")
DIFFERENTIABLE = (*range(9), 10, 11)                                       # of the op's arguments: all but num_heads and keep


def linear_attention(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o=None, b_o=None):
    """Attention of every position over k projected positions: [B, N, A], or [B, N, D_o] where an output projection w_o is given.

    x: [B, N, D] float. w_q, w_k, w_v: [A, D], b_q, b_k, b_v: [A] or None, as nn.Linear holds them. E, F: [N, k], the projections of keys
    and of values along the sequence, shared by the heads. num_heads: divides A; head h has the channels h d ... (h + 1) d - 1 with
    d = A / num_heads. w_o: [D_o, A], b_o: [D_o] or None. All of one dtype and device. As the body of an nn.Module with its layers:
        linear_attention(x, query.weight, query.bias, key.weight, key.bias, value.weight, value.bias, E, F, 8, output.weight, output.bias)
    There is no dropout inside. float16 and bfloat16: softmax and sums in float32; on a CPU the whole is computed in float32, which autocast
    also returns; autocast on a GPU casts the inputs to its dtype.
    Differentiable once with respect to every tensor; a gradient that none needs is not computed. Deterministic: equal bytes in every
    run; on a CPU on any number of threads (with k = 1 but for the biases of keys and values, the framework's sums), on a GPU as far as the
    framework's matrix products are. NaN and Inf in x spread over their
    picture, as the formula says, and reach no other.
    Raises ValueError for wrong shapes, dtypes or devices.
    """
    tensors = {"x": x, "w_q": w_q, "b_q": b_q, "w_k": w_k, "b_k": b_k, "w_v": w_v, "b_v": b_v, "E": E, "F": F, "w_o": w_o, "b_o": b_o}
    require_tensors("linear_attention", **{name: tensor for name, tensor in tensors.items() if tensor is not None or name not in OPTIONAL})
    _check(tensors, num_heads)
    device = x.device.type
    autocast = autocast_is_on(device)
    dtype = torch.get_autocast_dtype(device) if autocast and device == "cuda" and x.dtype != torch.float64 else x.dtype
    compute = torch.float32 if device == "cpu" and dtype in (torch.float16, torch.bfloat16) else dtype
    x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, w_o, b_o = (None if t is None else t.to(compute) for t in tensors.values())
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    output, *_ = torch.ops.minidamage.linear_attention(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o, keep)
    return output if autocast else output.to(dtype)


def linear_attention_maps(x, w_q, b_q, w_k, b_k, E, num_heads):
    """The softmax of `linear_attention`: [B, num_heads, N, k], rows adding up to 1. Plain PyTorch, for pictures: here N k numbers exist."""
    query = torch.nn.functional.linear(x, w_q, b_q)
    keys = project_sequence(x, E, w_k, b_k)[1]
    return attention_scores(query, keys, num_heads).softmax(-1)


def _check(tensors, num_heads):
    x, w_q, E, w_o, b_o = (tensors[name] for name in ("x", "w_q", "E", "w_o", "b_o"))
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"linear_attention: expected x [B, N, D] float, got {list(x.shape)} {x.dtype}; flatten a map [B, D, H, W] with "
                         "x.flatten(2).transpose(1, 2)")
    if w_q.dim() != 2 or E.dim() != 2:
        raise ValueError(f"linear_attention: expected w_q [A, D] and E [N, k], got {list(w_q.shape)} and {list(E.shape)}")
    B, N, D = x.shape
    A, k = w_q.shape[0], E.shape[1]
    if not isinstance(num_heads, int) or num_heads < 1 or A == 0 or A % num_heads:
        raise ValueError(f"linear_attention: expected num_heads, a positive int, to divide the {A} channels of w_q, got {num_heads}")
    if E.shape[0] != N:
        raise ValueError(f"linear_attention: E is for {E.shape[0]} positions, x has {N}; interpolate E and F along their first axis, or "
                         "resize the picture to the size they were made for")
    if k == 0:
        raise ValueError("linear_attention: E has no columns (k = 0): a softmax over nothing")
    if w_o is None and b_o is not None:
        raise ValueError("linear_attention: b_o is given without w_o")
    D_o = 0 if w_o is None or w_o.dim() == 0 else w_o.shape[0]
    shapes = {"w_q": (A, D), "b_q": (A,), "w_k": (A, D), "b_k": (A,), "w_v": (A, D), "b_v": (A,), "E": (N, k), "F": (N, k), "w_o": (D_o, A),
              "b_o": (D_o,)}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor is None and name in OPTIONAL:
            continue
        if tensor is None or tuple(tensor.shape) != shape:
            raise ValueError(f"linear_attention: expected {name} {list(shape)} to go with x {[B, N, D]}, w_q {[A, D]} and E {[N, k]}, got "
                             f"{None if tensor is None else list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"linear_attention: x is on {x.device}, {name} on {tensor.device}; move them to one device")
        if tensor.dtype != x.dtype and not autocast_is_on(x.device.type):
            raise ValueError(f"linear_attention: x is {x.dtype}, {name} is {tensor.dtype}; convert one of them, or use torch.autocast")


# ---- the reference -----------------------------------------------------------------------------------------------------------


def project_sequence(x, E, weight, bias):
    """E^T X, [B, k, D], and the keys (or values) E^T (X weight^T + 1 bias^T), [B, k, A], in the cheap order."""
    projected = E.t() @ x
    keys = projected @ weight.t()
    return projected, keys if bias is None else keys + E.sum(0)[:, None] * bias


def split_heads(x, num_heads):
    """[B, N, A] -> [B, H, N, d]"""
    B, N, A = x.shape
    return x.view(B, N, num_heads, A // num_heads).transpose(1, 2)


def attention_scores(query, keys, num_heads):
    """Q_h K_h^T / sqrt(d): [B, H, N, k]"""
    scale = 1 / math.sqrt(query.shape[2] // num_heads)
    return split_heads(query, num_heads) @ split_heads(keys, num_heads).transpose(2, 3) * scale


def linear_attention_reference(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o, keep):
    """output, then what the backward wants to find again, empty where `keep` is False: query [B, N, A], projected [2, B, k, D] (E^T X and
    F^T X), keys_values [2, B, k, A], attended [B, N, A] (empty without w_o: it is the output), log_sum_exp [B, H, N]."""
    query = torch.nn.functional.linear(x, w_q, b_q)
    x_e, keys = project_sequence(x, E, w_k, b_k)
    x_f, values = project_sequence(x, F, w_v, b_v)
    scores = attention_scores(query, keys, num_heads)
    attended = (scores.softmax(-1) @ split_heads(values, num_heads)).transpose(1, 2).flatten(2)
    output = attended if w_o is None else torch.nn.functional.linear(attended, w_o, b_o)
    if not keep:
        return output, *(x.new_empty(0) for _ in range(5))
    return (output, query, torch.stack([x_e, x_f]), torch.stack([keys, values]), x.new_empty(0) if w_o is None else attended,
            scores.to(torch.promote_types(x.dtype, torch.float32)).logsumexp(-1))


def linear_attention_backward_reference(grad, x, w_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, attended, query, projected, keys_values,
                                        log_sum_exp, needed=(True,) * 11):
    """The gradients of x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, w_o, b_o; empty where not `needed`, those of w_o and b_o without w_o too."""
    B, N, D = x.shape
    A, k = w_q.shape[0], E.shape[1]
    scale = 1 / math.sqrt(A // num_heads)
    keys, values = keys_values
    grad_attended = grad if w_o is None else grad @ w_o
    grad_heads = split_heads(grad_attended, num_heads)                                        # [B, H, N, d]
    P = (attention_scores(query, keys, num_heads) - log_sum_exp[..., None]).exp().to(x.dtype)  # [B, H, N, k]
    grad_P = grad_heads @ split_heads(values, num_heads).transpose(2, 3)
    mean = (grad_heads * split_heads(attended, num_heads)).sum(-1, keepdim=True)              # = (P * grad_P).sum(-1)
    grad_S = P * (grad_P - mean) * scale
    grad_query = (grad_S @ split_heads(keys, num_heads)).transpose(1, 2).reshape(B, N, A)
    grad_keys = (grad_S.transpose(2, 3) @ split_heads(query, num_heads)).transpose(1, 2).reshape(B, k, A)
    grad_values = (P.transpose(2, 3) @ grad_heads).transpose(1, 2).reshape(B, k, A)
    grad_x = grad_query @ w_q
    grad_projections = []
    for projection, part, weight, bias, grad_part in ((E, projected[0], w_k, b_k, grad_keys), (F, projected[1], w_v, b_v, grad_values)):
        grad_projected = grad_part @ weight                                                   # [B, k, D]
        grad_x = grad_x + projection @ grad_projected
        grad_projection = (x @ grad_projected.transpose(1, 2)).sum(0)                         # [N, k]
        if bias is not None:
            grad_projection = grad_projection + grad_part.sum(0) @ bias                       # from the sum of each column
        grad_projections.append((torch.einsum("bka,bkd->ad", grad_part, part), projection.sum(0) @ grad_part.sum(0), grad_projection))
    (grad_w_k, grad_b_k, grad_E), (grad_w_v, grad_b_v, grad_F) = grad_projections
    grad_w_q, grad_b_q = torch.einsum("bna,bnd->ad", grad_query, x), grad_query.sum((0, 1))
    grad_w_o = x.new_empty(0) if w_o is None else torch.einsum("bno,bna->oa", grad, attended)
    grad_b_o = x.new_empty(0) if w_o is None else grad.sum((0, 1))
    grads = (grad_x, grad_w_q, grad_b_q, grad_w_k, grad_b_k, grad_w_v, grad_b_v, grad_E, grad_F, grad_w_o, grad_b_o)
    return tuple(part if wanted else x.new_empty(0) for part, wanted in zip(grads, needed))


# ---- schema, fake, autograd ----------------------------------------------------------------------------------------------------

_extension.define("linear_attention(Tensor x, Tensor w_q, Tensor? b_q, Tensor w_k, Tensor? b_k, Tensor w_v, Tensor? b_v, Tensor E, "
                  "Tensor F, int num_heads, Tensor? w_o, Tensor? b_o, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                  linear_attention_reference)
_extension.define("linear_attention_backward(Tensor grad, Tensor x, Tensor w_q, Tensor w_k, Tensor? b_k, Tensor w_v, Tensor? b_v, "
                  "Tensor E, Tensor F, int num_heads, Tensor? w_o, Tensor attended, Tensor query, Tensor projected, Tensor keys_values, "
                  "Tensor log_sum_exp, bool[11] needed=True) -> "
                  "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
                  linear_attention_backward_reference)


@torch.library.register_fake("minidamage::linear_attention", lib=_extension.library())
def _(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o, keep):
    B, N, D = x.shape
    A, k = w_q.shape[0], E.shape[1]
    output = x.new_empty((B, N, A if w_o is None else w_o.shape[0]))
    if not keep:
        return output, *(x.new_empty(0) for _ in range(5))
    statistics = torch.promote_types(x.dtype, torch.float32)
    return (output, x.new_empty((B, N, A)), x.new_empty((2, B, k, D)), x.new_empty((2, B, k, A)),
            x.new_empty(0 if w_o is None else (B, N, A)), x.new_empty((B, num_heads, N), dtype=statistics))


@torch.library.register_fake("minidamage::linear_attention_backward", lib=_extension.library())
def _(grad, x, w_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, attended, query, projected, keys_values, log_sum_exp, needed=(True,) * 11):
    layer = (w_q.shape, w_q.shape[:1])
    outer = ((0,), (0,)) if w_o is None else (w_o.shape, w_o.shape[:1])
    shapes = (x.shape, *layer, *layer, *layer, E.shape, F.shape, *outer)
    return tuple(x.new_empty(shape if wanted else 0) for shape, wanted in zip(shapes, needed))


def _setup_context(ctx, inputs, output):
    x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, ctx.num_heads, w_o, b_o, ctx.keep = inputs
    result, query, projected, keys_values, attended, log_sum_exp = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_q, w_k, b_k, w_v, b_v, E, F, w_o, result if w_o is None else attended, query, projected, keys_values,
                          log_sum_exp)


def _backward(ctx, grad, *_):
    if not ctx.keep:
        raise RuntimeError("linear_attention: called with keep=False, nothing was kept for a backward pass")
    if grad is None:
        return (None,) * 13
    x, w_q, w_k, b_k, w_v, b_v, E, F, w_o, *kept = ctx.saved_tensors
    needed = [ctx.needs_input_grad[i] for i in DIFFERENTIABLE]
    grads = torch.ops.minidamage.linear_attention_backward(grad, x, w_q, w_k, b_k, w_v, b_v, E, F, ctx.num_heads, w_o, *kept, needed)
    grads = [part if wanted else None for part, wanted in zip(grads, needed)]
    return *grads[:9], None, *grads[9:], None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("linear_attention: second derivatives are not implemented; use linear_attention_reference under autograd")


torch.library.register_autograd("minidamage::linear_attention", _backward, setup_context=_setup_context, lib=_extension.library())
torch.library.register_autograd("minidamage::linear_attention_backward", _no_second_derivative, lib=_extension.library())
