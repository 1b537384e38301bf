"""Linear attention against hand answers, the definition in loops, the paper's order of products, and the CUDA kernels on the CPU."""
import math

import pytest
import torch
from oracle import check_op, map_tensors, non_contiguous, same
from torch.nn import functional

from minidamage import ops
from minidamage.ops import _extension
from minidamage.ops.linear_attention import linear_attention_backward_reference, linear_attention_reference

OP, BACKWARD = torch.ops.minidamage.linear_attention, torch.ops.minidamage.linear_attention_backward
nan, inf = math.nan, math.inf


def problem(B=2, N=30, D=10, heads=2, d=13, k=71, D_o=7, dtype=torch.float32, bias=True, outer=True, seed=0):
    """The arguments of linear_attention: x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, size=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype)

    A = heads * d
    layers = [part for _ in range(3) for part in (random(A, D, size=1.5 * max(D, 1) ** -0.5), random(A) if bias else None)]
    last = (random(D_o, A, size=A ** -0.5), random(D_o) if bias else None) if outer else (None, None)
    return (random(B, N, D), *layers, random(N, k, size=max(N, 1) ** -0.5), random(N, k, size=max(N, 1) ** -0.5), heads, *last)


def with_gradients(args):
    return map_tensors(lambda t: t.clone().requires_grad_(), args)


def in_the_papers_order(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o=None, b_o=None):
    """Keys and values of length N first, then E^T and F^T, then the framework's attention."""
    B, N, _ = x.shape

    def heads(t):
        return t.view(B, t.shape[1], num_heads, -1).transpose(1, 2)

    query, key, value = functional.linear(x, w_q, b_q), functional.linear(x, w_k, b_k), functional.linear(x, w_v, b_v)
    attended = functional.scaled_dot_product_attention(heads(query), heads(E.t() @ key), heads(F.t() @ value))
    attended = attended.transpose(1, 2).reshape(B, N, -1)
    return attended if w_o is None else functional.linear(attended, w_o, b_o)


def in_loops(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o):
    """The definition, one number at a time."""
    x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, w_o, b_o = (t.tolist() for t in (x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, w_o, b_o))
    output = []
    for picture in x:
        def layer(weight, bias):
            return [[sum(w * v for w, v in zip(row, position)) + b for row, b in zip(weight, bias)] for position in picture]

        def project(columns, rows):
            return [[sum(column[j] * row[c] for column, row in zip(columns, rows)) for c in range(len(rows[0]))]
                    for j in range(len(columns[0]))]

        query, keys, values = layer(w_q, b_q), project(E, layer(w_k, b_k)), project(F, layer(w_v, b_v))
        d = len(w_q) // num_heads
        rows = []
        for q in query:
            attended = []
            for h in range(num_heads):
                part = range(h * d, (h + 1) * d)
                powers = [math.exp(sum(q[c] * key[c] for c in part) / math.sqrt(d)) for key in keys]
                attended += [sum(p * value[c] for p, value in zip(powers, values)) / sum(powers) for c in part]
            rows.append([sum(w * a for w, a in zip(row, attended)) + b for row, b in zip(w_o, b_o)])
        output.append(rows)
    return torch.tensor(output, dtype=torch.float64)


def backward_arguments(args):
    """A gradient and all that linear_attention_backward takes."""
    x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, b_o = args
    output, query, projected, keys_values, attended, log_sum_exp = linear_attention_reference(*args, True)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(output)
    return (grad, x, w_q, w_k, b_k, w_v, b_v, E, F, num_heads, w_o, output if w_o is None else attended, query, projected, keys_values,
            log_sum_exp)


def test_by_hand(device):
    one, eye = torch.ones(1, 1, device=device), torch.eye(2, device=device)
    a = math.sqrt(math.log(3))
    x = torch.tensor([[[0.0], [a]]], device=device)
    # E = F = 1: ordinary attention with q = k = v = x. Row 0: weights 1/2, 1/2. Row 1: exp(0) and exp(a^2) = 3: weights 1/4, 3/4
    output = ops.linear_attention(x, one, None, one, None, one, None, eye, eye, 1)
    torch.testing.assert_close(output.flatten().cpu(), torch.tensor([a / 2, a * 3 / 4]))
    maps = ops.linear_attention_maps(x, one, None, one, None, eye, 1)
    torch.testing.assert_close(maps.cpu(), torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]))
    # k = 1: every weight is 1, so the output is the one value, sum_n F_n (x_n w_v + b_v) = 3 (0 + 5) + 4 (2 a + 5)
    F = torch.tensor([[3.0], [4.0]], device=device)
    output = ops.linear_attention(x, one, one[0], one, None, 2 * one, 5 * one[0], F, F, 1, w_o=10 * one, b_o=one[0])
    torch.testing.assert_close(output.flatten().cpu(), torch.tensor([10 * (35 + 8 * a) + 1] * 2))


def test_loop_definition():
    args = problem(N=5, D=3, heads=2, d=2, k=4, D_o=3, dtype=torch.float64)
    expected = in_loops(*args)
    same(ops.linear_attention(*args), expected, 1e-12, "kernel and loops")
    same(linear_attention_reference(*args, False)[0], expected, 1e-12, "reference and loops")


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_cheap_order_is_exact(bias, outer, device):
    args = with_gradients(map_tensors(lambda t: t.to(device), problem(dtype=torch.float64, bias=bias, outer=outer)))
    leaves = [t for t in args if isinstance(t, torch.Tensor)]
    output, expected = ops.linear_attention(*args), in_the_papers_order(*args)
    same(output.detach(), expected.detach(), 1e-12, "ours and the paper's order")
    grad = torch.randn_like(output)
    for ours, theirs in zip(torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad)):
        same(ours, theirs, 1e-11, "gradient of ours and of the paper's order")


SIZES = [dict(), dict(k=64, d=32, N=130, D=33), dict(heads=1, d=1, D=1, k=1, N=1, B=1, D_o=1), dict(heads=3, d=5, k=600, N=20),
         dict(B=1, heads=1, d=130, k=33, N=70, D=300), dict(B=3, heads=4, d=16, k=256, N=57, D=64, D_o=129), dict(N=1, k=500, d=4)]


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels_equal_the_reference(sizes, outer):
    args = problem(**sizes, outer=outer)
    check_op(OP, linear_attention_reference, (*args, True), opcheck=False, tolerance=1e-4)
    check_op(OP, linear_attention_reference, (*args, False), opcheck=False, tolerance=1e-4)
    check_op(BACKWARD, linear_attention_backward_reference, backward_arguments(args), opcheck=False, tolerance=1e-4)
    args = problem(**sizes, outer=outer, bias=False, dtype=torch.float64)
    check_op(OP, linear_attention_reference, (*args, True), opcheck=False)
    check_op(BACKWARD, linear_attention_backward_reference, backward_arguments(args), opcheck=False)


def test_more_rows_than_a_segment():
    """1,500 rows, on the CPU in two or more segments, in tiles, the last of each cut."""
    args = problem(B=1, N=1500, D=20, heads=1, d=20, k=100)
    check_op(OP, linear_attention_reference, (*args, True), opcheck=False, strides=False, tolerance=1e-4)
    check_op(BACKWARD, linear_attention_backward_reference, backward_arguments(args), opcheck=False, strides=False, tolerance=1e-4)


@pytest.mark.parametrize("sizes", [dict(B=3, N=150), dict(B=2, N=450)], ids=str)
def test_chunks_of_scores_on_a_gpu(sizes):
    """More scores than one chunk holds: two pictures and one; 436 rows of a picture and 14."""
    args = problem(**sizes, D=4, heads=16, d=2, k=600)
    kernels = _extension.load_emulated()
    same(kernels.linear_attention(*args, True), linear_attention_reference(*args, True), 1e-4, "emulated")
    backward = backward_arguments(args)
    same(kernels.linear_attention_backward(*backward), linear_attention_backward_reference(*backward), 1e-4, "emulated gradients")


@pytest.mark.parametrize("sizes", [dict(B=0), dict(N=0), dict(D=0), dict(D_o=0), dict(B=0, bias=False), dict(B=0, outer=False)], ids=str)
def test_empty(sizes):
    args = problem(**{"k": 4, "d": 3, **sizes})
    check_op(OP, linear_attention_reference, (*args, True))
    check_op(BACKWARD, linear_attention_backward_reference, backward_arguments(args))
    args = with_gradients(args)
    output = ops.linear_attention(*args)
    assert output.shape == (*args[0].shape[:2], args[1].shape[0] if args[10] is None else args[10].shape[0])
    output.sum().backward()
    for leaf in (t for t in args if isinstance(t, torch.Tensor)):
        assert leaf.grad.shape == leaf.shape and leaf.grad.isfinite().all() and (output.numel() or not leaf.grad.any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outer", [True, False])
def test_half_precision(dtype, outer):
    """The CUDA half keeps scores and sums in float32: as near to the exact result as roundings of Q, K, V and P allow."""
    args = map_tensors(lambda t: t.to(dtype), problem(B=2, N=40, D=32, heads=2, d=16, k=24, outer=outer))
    exact = map_tensors(lambda t: t.double(), args)
    tolerance = 4 * torch.finfo(dtype).eps
    expected = linear_attention_reference(*exact, True)
    ours = _extension.load_emulated().linear_attention(*args, True)
    assert ours[0].dtype == dtype and ours[5].dtype == torch.float32
    same(map_tensors(lambda t: t.double(), ours), expected, tolerance, "emulated and exact")
    backward = backward_arguments(exact)
    rounded = map_tensors(lambda t: t.to(dtype), backward[:-1]) + (backward[-1].float(),)
    ours = _extension.load_emulated().linear_attention_backward(*rounded)
    assert all(t.dtype == dtype for t in ours)
    same(map_tensors(lambda t: t.double(), ours), linear_attention_backward_reference(*backward), 2 * tolerance,
         "emulated gradients and exact")
    on_cpu = ops.linear_attention(*args)
    assert on_cpu.dtype == dtype and torch.equal(on_cpu, ops.linear_attention(*map_tensors(lambda t: t.float(), args)).to(dtype))


FUSED = [dict(B=2, N=57, heads=3, d=16, k=64), dict(B=1, N=16, heads=1, d=16, k=16), dict(B=1, N=100, heads=2, d=32, k=256),
         dict(B=2, N=33, heads=1, d=16, k=512), dict(B=1, N=150, heads=2, d=32, k=48), dict(B=1, N=31, heads=2, d=64, k=32),
         dict(B=1, N=650, heads=1, d=16, k=16)]                                            # of its ten segments of rows the last is empty
NOT_FUSED = [dict(k=20), dict(d=8), dict(d=48), dict(N=15), dict(k=528), dict(dtype=torch.float32), dict(dtype=torch.float64)]


def batched_products(function, *args):
    """How often the function asks the framework for a batched product, and what it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        result = function(*args)
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::bmm", "aten::baddbmm_")), result


def check_half(args, forward_products, backward_products):
    """Emulated kernels against float64, forward and backward, twice; equal bytes, and so many batched products of the framework."""
    kernels, dtype = _extension.load_emulated(), args[0].dtype
    exact = map_tensors(lambda t: t.double(), args)
    tolerance = 6 * max(torch.finfo(dtype).eps, 1e-6)
    products, ours = batched_products(kernels.linear_attention, *args, True)
    assert products == forward_products and ours[0].dtype == dtype
    same(map_tensors(lambda t: t.double(), ours), linear_attention_reference(*exact, True), tolerance, "emulated and exact")
    assert all(torch.equal(a, b) for a, b in zip(ours, kernels.linear_attention(*args, True)))
    assert torch.equal(ours[0], kernels.linear_attention(*args, False)[0])
    backward = backward_arguments(exact)
    rounded = map_tensors(lambda t: t.to(dtype), backward[:-1]) + (backward[-1].to(ours[5].dtype),)
    products, ours = batched_products(kernels.linear_attention_backward, *rounded)
    assert products == backward_products and all(t.dtype == dtype for t in ours)
    same(map_tensors(lambda t: t.double(), ours), linear_attention_backward_reference(*backward), 2 * tolerance,
         "emulated gradients and exact")
    assert all(torch.equal(a, b) for a, b in zip(ours, kernels.linear_attention_backward(*rounded)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", FUSED, ids=str)
def test_fused_core(sizes, dtype):
    """Tensor cores on the CPU: rows that fill no tile, several heads and pictures, rows in two segments; E^T X, F^T X and their
    gradients are the only batched products left to the framework."""
    check_half(problem(D=9, D_o=5, dtype=dtype, **sizes), 2, 2)
    if sizes is FUSED[0]:
        check_half(problem(D=9, dtype=dtype, outer=False, bias=False, **sizes), 2, 2)


@pytest.mark.parametrize("sizes", NOT_FUSED, ids=str)
def test_what_the_fused_core_cannot_takes_chunks(sizes):
    """B = 1, one chunk: two products more forward, five backward."""
    check_half(problem(**{**dict(B=1, N=40, D=9, heads=2, d=16, k=32, D_o=5, dtype=torch.bfloat16), **sizes}), 4, 7)


def test_fused_core_reads_only_what_is_aligned():
    """A query or a gradient that begins off the 32 bytes takes chunks."""
    args = backward_arguments(problem(B=1, N=40, D=9, heads=2, d=16, k=32, dtype=torch.bfloat16, outer=False))
    expected = _extension.load_emulated().linear_attention_backward(*args)
    for position in (0, 12, 14):                                                      # grad, query, keys_values
        moved = list(args)
        moved[position] = torch.cat([args[position].new_zeros(3), args[position].flatten()])[3:].view(args[position].shape)
        products, ours = batched_products(_extension.load_emulated().linear_attention_backward, *moved)
        assert products == 7
        same(ours, expected, 0.03)


@pytest.mark.parametrize("value", [nan, inf])
def test_fused_core_keeps_what_is_not_finite_apart(value):
    """Of a picture, or of a head: the others give the same bytes."""
    forward = _extension.load_emulated().linear_attention
    args = list(problem(B=2, N=40, D=16, heads=2, d=16, k=32, dtype=torch.bfloat16, outer=False))
    clean = forward(*args, False)[0]
    x, b_q = args[0].clone(), args[2].clone()
    x[1, 4, 2], b_q[3] = value, value
    of_picture, of_head = forward(x, *args[1:], False)[0], forward(*args[:2], b_q, *args[3:], False)[0]
    assert of_picture[1].isnan().all() and torch.equal(of_picture[0], clean[0])
    assert of_head[..., :16].isnan().all() and torch.equal(of_head[..., 16:], clean[..., 16:])


def test_large_scores():
    """Scores of a thousand and more: the softmax is a choice, and nothing overflows."""
    x, w_q, *rest = problem(heads=2, d=8, k=20)
    args = (x, w_q * 1000, *rest)
    check_op(OP, linear_attention_reference, (*args, True), opcheck=False, tolerance=1e-4)
    assert ops.linear_attention(*args).isfinite().all()


def test_backward_has_forwards_weights_at_large_scores():
    """Where F averages, the gradient of b_v is that of the output times the weights of each row, which sum to 1 whatever the scores: to
    rounding, if backward finds the scores that forward had."""
    x, w_q, b_q, w_k, b_k, w_v, b_v, E, F, heads, *_ = problem(N=200, k=16, heads=1, d=32, outer=False)
    b_v = b_v.requires_grad_()
    ops.linear_attention(x, w_q * 1000, b_q, w_k, b_k, w_v, b_v, E, torch.full_like(F, 1 / 200), heads).sum().backward()
    torch.testing.assert_close(b_v.grad, torch.full_like(b_v, x.shape[0] * 200.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [nan, inf, -inf])
@pytest.mark.parametrize("outer", [True, False])
def test_not_finite_input_stays_in_its_picture(value, outer, device):
    args = map_tensors(lambda t: t.to(device), problem(B=3, outer=outer))
    clean = ops.linear_attention(*args)
    args[0][1, 4, 2] = value
    output = ops.linear_attention(*args)
    assert output[1].isnan().all()                                                    # every key and value has a part of it
    torch.testing.assert_close(output[[0, 2]], clean[[0, 2]])
    emulated = _extension.load_emulated().linear_attention(*map_tensors(lambda t: t.cpu(), args), False)[0]
    assert emulated[1].isnan().all() and emulated[[0, 2]].isfinite().all()


def test_a_query_that_is_not_finite_stays_in_its_row():
    x, *rest = problem(heads=1, d=13)
    E, F = rest[6].clone(), rest[7].clone()
    E[3], F[3] = 0, 0                                                                 # 0 x NaN is NaN: keys and values are hit too
    x[0, 3] = nan
    assert ops.linear_attention(x, *rest[:6], E, F, *rest[8:])[0].isnan().all()
    b_q = rest[1].clone()
    b_q[0] = inf                                                                      # of one head: scores +-inf, as in the definition
    args = (problem(heads=2)[0], *problem(heads=2)[1:2], torch.cat([b_q, b_q[:0], torch.zeros(13)]), *problem(heads=2)[3:10], None, None)
    expected = linear_attention_reference(*args, False)[0]
    same(ops.linear_attention(*args), expected, 1e-4)
    assert expected[..., 13:].isfinite().all() and not expected[..., :13].isfinite().all()


@pytest.mark.parametrize("outer", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_contract(bias, outer):
    """Derivatives in float64 of every tensor, opcheck, compile."""
    args = with_gradients(problem(B=2, N=5, D=3, heads=2, d=2, k=4, D_o=3, dtype=torch.float64, bias=bias, outer=outer))
    tensors = [i for i, t in enumerate(args) if isinstance(t, torch.Tensor)]

    def function(*leaves):
        new = list(args)
        for i, leaf in zip(tensors, leaves):
            new[i] = leaf
        return ops.linear_attention(*new)

    assert torch.autograd.gradcheck(function, [args[i] for i in tensors], nondet_tol=0.0)
    check_op(OP, linear_attention_reference, (*args, True), compiled=True)
    check_op(BACKWARD, linear_attention_backward_reference, backward_arguments(map_tensors(lambda t: t.detach(), args)), compiled=True)


class Attention(torch.nn.Module):
    def __init__(self, D=12, heads=2, N=9, k=4):
        super().__init__()
        self.query, self.key, self.value, self.output = (torch.nn.Linear(D, D) for _ in range(4))
        self.E, self.F, self.heads = torch.nn.Parameter(torch.randn(N, k) / 3), torch.nn.Parameter(torch.randn(N, k) / 3), heads

    def forward(self, x):
        q, k, v, o = self.query, self.key, self.value, self.output
        return ops.linear_attention(x, q.weight, q.bias, k.weight, k.bias, v.weight, v.bias, self.E, self.F, self.heads, o.weight, o.bias)


def test_compiles_and_exports_with_gradients():
    torch._dynamo.reset()
    module, x = Attention(), torch.randn(3, 9, 12)
    leaves = list(module.parameters())
    expected = torch.autograd.grad(module(x).square().sum(), leaves)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    same(torch.autograd.grad(compiled(x).square().sum(), leaves), expected)
    with torch.no_grad():
        same(compiled(x), module(x))
        program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=16)},))
        many = torch.randn(7, 9, 12)
        same(program.module()(many), module(many))


def test_only_some_tensors_require_a_gradient():
    args = problem(heads=2, d=4, k=6)
    w_v = args[5].clone().requires_grad_()
    gradient, = torch.autograd.grad(ops.linear_attention(*args[:5], w_v, *args[6:]).square().sum(), w_v)
    expected, = torch.autograd.grad(in_the_papers_order(*args[:5], w_v, *args[6:]).square().sum(), w_v)
    same(gradient, expected, 1e-4)
    assert not ops.linear_attention(*args).requires_grad


@pytest.mark.parametrize("sizes", [dict(), dict(outer=False), dict(bias=False), dict(B=0)], ids=str)
def test_gradients_that_none_needs_stay_empty(sizes):
    backward = backward_arguments(problem(N=9, D=5, heads=2, d=3, k=4, **sizes))
    masks = [[i == j for j in range(11)] for i in range(11)] + [[i % 3 == 0 for i in range(11)], [False] * 11]
    everything = linear_attention_backward_reference(*backward)
    for needed in masks:
        expected = [gradient if wanted else gradient.new_empty(0) for gradient, wanted in zip(everything, needed)]
        same(BACKWARD(*backward, needed), expected, 1e-4, "kernel")
        same(_extension.load_emulated().linear_attention_backward(*backward, needed), expected, 1e-4, "emulated")
        same(linear_attention_backward_reference(*backward, needed), expected)
    check_op(BACKWARD, linear_attention_backward_reference, (*backward, masks[-2]), tolerance=1e-4)


def test_autograd_asks_for_what_it_needs():
    asked = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is BACKWARD.default:
                asked.append(args[16])
            return function(*args, **(kwargs or {}))

    args = list(problem(bias=False))
    args[0], args[7], args[10] = (args[i].requires_grad_() for i in (0, 7, 10))              # x, E, w_o
    output = ops.linear_attention(*args).sum()
    with Watch():
        output.backward()
    assert asked == [[i in (0, 7, 9) for i in range(11)]]
    assert all(args[i].grad.shape == args[i].shape for i in (0, 7, 10))


def test_expanded_and_strided_tensors():
    """A map [B, D, H, W] flattened without a copy, weights that are views, a gradient of stride 0: same values, same gradients."""
    x, *rest = problem(B=2, N=30, D=10)
    channels_first = x.transpose(1, 2).contiguous().view(2, 10, 5, 6).requires_grad_()
    leaf = x.clone().requires_grad_()
    strided = ops.linear_attention(channels_first.flatten(2).transpose(1, 2), *map_tensors(non_contiguous, tuple(rest)))
    plain = ops.linear_attention(leaf, *rest)
    same(strided.detach(), plain.detach())
    strided.sum().backward()                                                          # the gradient is one number, expanded
    plain.sum().backward()
    same(channels_first.grad.flatten(2).transpose(1, 2), leaf.grad)


def test_equal_bytes_on_any_number_of_threads():
    args = with_gradients(problem(B=1, N=1300, D=40, heads=2, d=16, k=50))
    leaves, threads, results = [t for t in args if isinstance(t, torch.Tensor)], torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            output = ops.linear_attention(*args)
            results.append([output.detach(), *torch.autograd.grad(output.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for tensors in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(tensors, results[0]))


def test_autocast_on_a_cpu_gives_float32():
    module, x = Attention(), torch.randn(2, 9, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(torch.nn.functional.linear(x, torch.eye(12)))
    assert output.dtype == torch.float32
    output.sum().backward()
    assert x.grad.isfinite().all() and module.E.grad.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_cuda(dtype):
    args = map_tensors(lambda t: t.cuda().to(dtype), problem(B=2, N=784, D=64, heads=4, d=16, k=256))
    exact = map_tensors(lambda t: t.double(), args)
    tolerance = {torch.float32: 1e-3}.get(dtype, 8 * torch.finfo(dtype).eps)           # float32 products may run in TF32
    same(ops.linear_attention(*args).double(), linear_attention_reference(*exact, False)[0], tolerance, "GPU and exact")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert ops.linear_attention(*map_tensors(lambda t: t.float(), args)).dtype == torch.bfloat16
    backward = backward_arguments(exact)
    rounded = map_tensors(lambda t: t.to(dtype), backward[:-1]) + (backward[-1].float(),)
    first, second = BACKWARD(*rounded), BACKWARD(*rounded)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    same(map_tensors(lambda t: t.double(), first), linear_attention_backward_reference(*backward), tolerance, "GPU gradients and exact")


def test_memory_grows_with_n_not_with_n_k():
    """Forward and backward of 20,000 rows and k = 512: 41 MB of scores a head would show, 8 heads of them more so."""
    args = with_gradients(problem(B=1, N=20000, D=16, heads=8, d=2, k=512, outer=False))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.linear_attention(*args).sum().backward()
    total = sum(event.self_cpu_memory_usage for event in profile.key_averages() if event.self_cpu_memory_usage > 0)
    E_and_F = 4 * 2 * 20000 * 512                                                     # their gradients are of this size
    assert total < E_and_F + 4 * 20000 * 16 * 12, total


def test_second_derivative_is_refused():
    args = with_gradients(problem(heads=2, d=3, k=4))
    gradient, = torch.autograd.grad(ops.linear_attention(*args).square().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_attention: second derivatives"):
        gradient.sum().backward()


def changed(**new):
    names = ("x", "w_q", "b_q", "w_k", "b_k", "w_v", "b_v", "E", "F", "num_heads", "w_o", "b_o")
    args = dict(zip(names, problem(heads=2, d=13, k=71)))
    return tuple({**args, **{name: change(args[name]) for name, change in new.items()}}.values())


@pytest.mark.parametrize("args, message", [
    (changed(x=lambda t: t[0]), r"x \[B, N, D\] float, got \[30, 10\]"),
    (changed(x=lambda t: t.long()), "float"),
    (changed(x=lambda t: t[:, :29]), "E is for 30 positions, x has 29; interpolate"),
    (changed(num_heads=lambda h: 3), "divide the 26 channels"),
    (changed(num_heads=lambda h: 0), "positive int"),
    (changed(num_heads=lambda h: 2.0), "positive int"),
    (changed(w_q=lambda t: t[0]), r"w_q \[A, D\]"),
    (changed(w_k=lambda t: t.t()), r"expected w_k \[26, 10\].*got \[10, 26\]"),
    (changed(w_v=lambda t: None), "expected w_v as a tensor, got NoneType"),
    (changed(b_v=lambda t: t[:3]), r"expected b_v \[26\].*got \[3\]"),
    (changed(F=lambda t: t[:, :70]), r"expected F \[30, 71\].*got \[30, 70\]"),
    (changed(E=lambda t: t[:, :0], F=lambda t: t[:, :0]), "k = 0"),
    (changed(w_o=lambda t: t[:, :5]), r"expected w_o \[7, 26\]"),
    (changed(w_o=lambda t: None), "b_o is given without w_o"),
    (changed(b_q=lambda t: t.double()), "x is torch.float32, b_q is torch.float64; convert"),
    (changed(E=lambda t: t.to("meta")), "x is on cpu, E on meta"),
    (tuple(t.to("meta", torch.float64 if i else torch.bfloat16) if isinstance(t, torch.Tensor) else t for i, t in enumerate(problem())),
     "x is torch.bfloat16, w_q is torch.float64; convert"),
])
def test_mistakes_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(*args)


@pytest.mark.parametrize("namespace", ["minidamage", "minidamage_emulated"])
def test_the_bindings_protect_memory(namespace):
    """The public function checks first; a direct call of the ops must not read outside either."""
    _extension.load_emulated()
    forward, backward = (getattr(getattr(torch.ops, namespace), op.__name__) for op in (OP, BACKWARD))
    good = backward_arguments(problem(heads=2, d=3, k=4))
    for position, message in ((0, "grad must be"), (11, "attended must be"), (12, "query must be"), (13, "projected must be"),
                              (14, "keys_values must be"), (15, "log_sum_exp must be"), (4, "b_q, b_k, b_v must be"), (8, "E, F must be")):
        bad = list(good)
        bad[position] = bad[position][..., :-1]
        with pytest.raises(ValueError, match=message):
            backward(*bad)
        bad[position] = good[position].double()
        with pytest.raises(ValueError, match=message):
            backward(*bad)
    args = list(problem(heads=2, d=3, k=4))
    for position, value, message in ((0, args[0][0], "x must be"), (9, 4, "4 heads do not divide"), (3, args[3][1:], "w_q, w_k, w_v must"),
                                     (10, args[10][0], "w_o must be"), (10, None, "b_o without w_o"), (11, args[11][1:], "b_o must be")):
        bad = [*args, True]
        bad[position] = value
        with pytest.raises(ValueError, match=message):
            forward(*bad)
