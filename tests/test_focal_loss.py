"""Focal losses against hand answers, their definition in exact arithmetic, stored torchvision results, and the CUDA kernels on the CPU."""
import fractions
import math

import pytest
import torch
from oracle import check_op, same, stored

from minidamage import ops
from minidamage.ops import _extension
from minidamage.ops.focal_loss import (sigmoid_focal_loss_backward_reference, sigmoid_focal_loss_reference,
                                       softmax_focal_loss_backward_reference, softmax_focal_loss_reference)

SIGMOID, SIGMOID_BACKWARD = torch.ops.minidamage.sigmoid_focal_loss, torch.ops.minidamage.sigmoid_focal_loss_backward
SOFTMAX, SOFTMAX_BACKWARD = torch.ops.minidamage.softmax_focal_loss, torch.ops.minidamage.softmax_focal_loss_backward
STORED = stored("sigmoid_focal_loss")
SETTINGS = [(0.25, 2.0), (-1.0, 2.0), (0.75, 0.0), (0.25, 1.5), (0.5, 0.5), (0.25, 5.0)]
NONE, MEAN, SUM = 0, 1, 2
nan, inf = math.nan, math.inf


def sigmoid_problem(shape, dtype=torch.float32, soft=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=dtype) * 4
    t = torch.rand(shape, generator=generator, dtype=dtype)
    return x, t if soft else (t < 0.3).to(dtype)


def softmax_problem(R, C, dtype=torch.float32, ignored=True):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(C, (R,), generator=generator)
    if ignored:
        labels[2::5] = -100
    return torch.randn(R, C, generator=generator, dtype=dtype) * 3, labels


def test_sigmoid_by_hand(device):
    x = torch.tensor([0.0, math.log(3), -math.log(3)], device=device)                 # p = 1/2, 3/4, 1/4
    one, zero, log2, log4 = torch.ones(3, device=device), torch.zeros(3, device=device), math.log(2), math.log(4)
    same(ops.sigmoid_focal_loss(x, one), torch.tensor([log2 / 16, math.log(4 / 3) / 64, log4 * 9 / 64], device=device))
    same(ops.sigmoid_focal_loss(x, zero), torch.tensor([log2 * 3 / 16, log4 * 27 / 64, math.log(4 / 3) * 3 / 64], device=device))
    same(ops.sigmoid_focal_loss(x, one, alpha=-1, gamma=0, reduction="sum"), torch.tensor(log2 + math.log(4 / 3) + log4, device=device))
    same(ops.sigmoid_focal_loss(x, zero + 0.5, alpha=-1, gamma=0)[:1], torch.tensor([log2], device=device))


def test_softmax_by_hand(device):
    logits = torch.log(torch.tensor([[1.0, 1, 2], [6, 1, 1], [5, 5, 5]], device=device))
    labels = torch.tensor([2, 1, -100], device=device)                                # p = 1/2, 1/8, ignored
    expected = torch.tensor([math.log(2) / 16, math.log(8) * 49 / 256, 0], device=device)
    same(ops.softmax_focal_loss(logits, labels), expected)
    same(ops.softmax_focal_loss(logits, labels, reduction="mean"), expected.sum() / 2)
    same(ops.softmax_focal_loss(logits, labels, alpha=-1, gamma=0, reduction="sum"),
         torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
    # d loss / dx_j = alpha (miss^2 + 2 miss p entropy) (p_j - [j = label])
    leaf = logits.clone().requires_grad_()
    ops.softmax_focal_loss(leaf, labels, alpha=1, reduction="sum").backward()
    slope = 1 / 4 + math.log(2) / 2
    same(leaf.grad[0], torch.tensor([slope / 4, slope / 4, -slope / 2], device=device))
    assert not leaf.grad[2].any()


@pytest.mark.parametrize("case", [str(name) for name in STORED["cases"]])
def test_stored_torchvision(case, device):
    alpha, gamma, kind = case.split("_")
    alpha, gamma = float(alpha[1:]), float(gamma[1:])
    x, t = STORED["logits"], STORED["soft_targets" if kind == "soft" else "targets"]
    leaf = x.to(device).clone().requires_grad_()
    loss = ops.sigmoid_focal_loss(leaf, t.to(device), alpha, gamma)
    same(loss.detach().cpu(), STORED[f"{case}_none"], 1e-13, "ours and torchvision")
    same(ops.sigmoid_focal_loss(leaf, t.to(device), alpha, gamma, "mean").detach().cpu(), STORED[f"{case}_mean"], 1e-13, "means")
    gradient, = torch.autograd.grad(ops.sigmoid_focal_loss(leaf, t.to(device), alpha, gamma, "sum"), leaf)
    same(gradient.cpu(), STORED[f"{case}_grad_sum"], 1e-13, "gradients of the sum")
    emulated = _extension.load_emulated()
    same(emulated.sigmoid_focal_loss(x, t, alpha, gamma, NONE), STORED[f"{case}_none"], 1e-13, "emulated")
    same(emulated.sigmoid_focal_loss(x, t, alpha, gamma, MEAN), STORED[f"{case}_mean"], 1e-13, "emulated mean")
    one = torch.ones((), dtype=torch.float64)
    same(emulated.sigmoid_focal_loss_backward(one, x, t, alpha, gamma, SUM), STORED[f"{case}_grad_sum"], 1e-13, "emulated gradient")


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("alpha, gamma", SETTINGS)
def test_sigmoid_equals_the_reference(alpha, gamma, reduction):
    for shape, soft in (((7, 3), False), ((5, 64), True), ((2, 3, 4, 5), False), ((), True)):
        x, t = sigmoid_problem(shape, soft=soft)
        check_op(SIGMOID, sigmoid_focal_loss_reference, (x.requires_grad_(), t, alpha, gamma, reduction), gradients=True, opcheck=False)
        grad = torch.randn(shape if reduction == NONE else ())
        check_op(SIGMOID_BACKWARD, sigmoid_focal_loss_backward_reference, (grad, x.detach(), t, alpha, gamma, reduction), opcheck=False)


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
@pytest.mark.parametrize("alpha, gamma", SETTINGS)
def test_softmax_equals_the_reference(alpha, gamma, reduction):
    for R, C in ((1, 1), (16, 2), (37, 9), (5, 91), (3, 200)):
        x, labels = softmax_problem(R, C)
        check_op(SOFTMAX, softmax_focal_loss_reference, (x.requires_grad_(), labels, alpha, gamma, reduction, -100), gradients=True,
                 opcheck=False)
        grad = torch.randn((R,) if reduction == NONE else ())
        check_op(SOFTMAX_BACKWARD, softmax_focal_loss_backward_reference, (grad, x.detach(), labels, alpha, gamma, reduction, -100),
                 opcheck=False)


def test_sizes_that_fill_blocks_and_chunks():
    """Several chunks on the CPU (of 4096 elements), several blocks on a GPU, and counts that no vector width divides."""
    for count in (1, 4095, 4097, 20001, 40000):
        x, t = sigmoid_problem((count,))
        for reduction in (NONE, SUM):
            check_op(SIGMOID, sigmoid_focal_loss_reference, (x, t, 0.25, 2.0, reduction), opcheck=False, strides=False)
            grad = torch.randn(count if reduction == NONE else ())
            check_op(SIGMOID_BACKWARD, sigmoid_focal_loss_backward_reference, (grad, x, t, 0.25, 2.0, reduction), opcheck=False,
                     strides=False)
    x, labels = softmax_problem(3001, 9)
    check_op(SOFTMAX, softmax_focal_loss_reference, (x, labels, 0.25, 2.0, MEAN, -100), opcheck=False, strides=False)


def exact_sigmoid(x, t):
    """Loss and gradient of one element, alpha 0.25, gamma 2, hard target, from a 60-digit e^-|x|: no cancellation can hide in it."""
    sign = 1 if t else -1
    e = sum((fractions.Fraction(-abs(x)) / 64) ** k / math.factorial(k) for k in range(40)) ** 64           # e^-|x|, |x| <= 40
    p_t = (1 / (1 + e)) if sign * x > 0 else e / (1 + e)
    miss = 1 - p_t
    log = math.log1p(float(e)) + (abs(x) if sign * x < 0 else 0)                                            # -log p_t
    alpha = 0.25 if t else 0.75
    loss = alpha * float(miss) ** 2 * log
    return loss, -sign * alpha * (float(miss) ** 3 + 2 * float(miss) ** 2 * float(p_t) * log)


def test_relative_accuracy_of_confident_answers():
    """Where 1 - p loses every digit, ours keeps them: within 1e-5 (float32) of the exact value, not of the largest."""
    points = [-40, -20, -12, -3, -0.5, -1e-4, 0.25, 2, 9, 14, 25, 38]
    x = torch.tensor(points, dtype=torch.float32)
    for t in (0, 1):
        leaf = x.clone().requires_grad_()
        loss = ops.sigmoid_focal_loss(leaf, torch.full_like(x, t))
        loss.sum().backward()
        for i, point in enumerate(x.tolist()):
            value, gradient = exact_sigmoid(point, t)
            if value < 1e-36:                                                                # below float32's normal numbers
                assert 0 <= float(loss[i].detach()) < 1e-35
                continue
            assert float(loss[i].detach()) == pytest.approx(value, rel=1e-5, abs=1e-37)
            assert float(leaf.grad[i]) == pytest.approx(gradient, rel=1e-5, abs=1e-37)
    # two classes with logits (x, 0) are the sigmoid of x: the softmax form must keep as many digits
    two = torch.stack([x, torch.zeros_like(x)], 1).requires_grad_()
    ops.softmax_focal_loss(two, torch.zeros(len(x), dtype=torch.int64), reduction="sum").backward()
    for i, point in enumerate(x.tolist()):
        value, gradient = exact_sigmoid(point, 1)
        assert value < 1e-36 or float(two.grad[i, 0]) == pytest.approx(gradient, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_huge_logits(gamma, device):
    x = torch.tensor([1e4, -1e4, 3e38, -3e38, 88, -88, 104, -104, 0], device=device)
    for t in (0.0, 1.0):
        leaf = x.clone().requires_grad_()
        loss = ops.sigmoid_focal_loss(leaf, torch.full_like(x, t), -1, gamma)
        loss.sum().backward()
        right = ((x > 0) == (t == 1)) & (x != 0)
        wrong = ~right & (x != 0)
        assert (loss[right] < 1e-15).all() and torch.allclose(loss[wrong], x[wrong].abs()), "0 or the logit's size"
        assert leaf.grad.isfinite().all() and torch.allclose(leaf.grad[wrong].abs(), torch.ones((), device=device))
    rows = torch.tensor([[1e4, -1e4, 0], [0, 1e4, -inf], [-3e38, 0, 3e38], [-inf, 0, 0]], device=device)
    for label, confident in ((0, [0]), (1, [1])):
        leaf = rows.clone().requires_grad_()
        loss = ops.softmax_focal_loss(leaf, torch.full((4,), label, device=device), -1, gamma)
        assert (loss[confident] == 0).all()
        loss[:2].sum().backward()
        assert leaf.grad.isfinite().all() and loss[:2].isfinite().all()
    infinite = ops.softmax_focal_loss(rows[3:].requires_grad_(), torch.zeros(1, dtype=torch.int64, device=device), -1, gamma)
    assert infinite.item() == inf                                                            # a label whose probability is 0


def test_nan_propagates():
    x, t = torch.tensor([nan, 1.0, nan, 2]), torch.tensor([1.0, nan, nan, 1])
    for gamma in (0.0, 0.5, 2.0):
        for function in (SIGMOID, _extension.load_emulated().sigmoid_focal_loss, sigmoid_focal_loss_reference):
            assert function(x, t, 0.25, gamma, NONE).isnan().tolist() == [True, True, True, False]
            assert function(x, t, 0.25, gamma, SUM).isnan()
        for function in (SIGMOID_BACKWARD, _extension.load_emulated().sigmoid_focal_loss_backward):
            assert function(torch.ones(()), x, t, 0.25, gamma, SUM).isnan().tolist() == [True, True, True, False]
        rows = torch.tensor([[nan, 1, 2], [0, nan, 2], [0, 1, 2], [nan, nan, nan], [inf, 0, 0]])
        labels = torch.tensor([0, 2, 1, -100, 0])
        for function in (SOFTMAX, _extension.load_emulated().softmax_focal_loss, softmax_focal_loss_reference):
            assert function(rows, labels, 0.25, gamma, NONE, -100).isnan().tolist() == [True, True, False, False, True]
        for function in (SOFTMAX_BACKWARD, _extension.load_emulated().softmax_focal_loss_backward):
            gradient = function(torch.ones(()), rows, labels, 0.25, gamma, SUM, -100)
            assert gradient.isnan().any(1).tolist() == [True, True, False, False, True] and not gradient[3].any()


def test_contract():
    """Derivatives in float64, opcheck, compile."""
    for alpha, gamma in SETTINGS:
        x, t = sigmoid_problem((3, 4), torch.float64, soft=True)
        logits, labels = softmax_problem(6, 4, torch.float64)
        for reduction in (NONE, MEAN, SUM):
            full = reduction == MEAN or gamma == 2
            check_op(SIGMOID, sigmoid_focal_loss_reference, (x.requires_grad_(), t, alpha, gamma, reduction), gradients=True,
                     gradcheck=True, opcheck=full, compiled=full)
            check_op(SOFTMAX, softmax_focal_loss_reference, (logits.requires_grad_(), labels, alpha, gamma, reduction, -100),
                     gradients=True, gradcheck=True, opcheck=full, compiled=full)
    strided = x.detach()[:, ::2]
    for grad, reduction in ((torch.randn(3, 4, dtype=torch.float64), NONE), (torch.randn((), dtype=torch.float64), MEAN)):
        check_op(SIGMOID_BACKWARD, sigmoid_focal_loss_backward_reference, (grad, x.detach(), t, 0.25, 2.0, reduction), compiled=True)
        rows = grad[:, 0].repeat(2) if reduction == NONE else grad
        check_op(SOFTMAX_BACKWARD, softmax_focal_loss_backward_reference, (rows, logits.detach(), labels, 0.25, 2.0, reduction, -100),
                 compiled=True)
    torch.library.opcheck(SIGMOID.default, (strided.requires_grad_(), t[:, 1::2], 0.25, 2.0, NONE))


def test_compiles_and_exports_with_gradients():
    x, t = sigmoid_problem((6, 5))
    logits, labels = softmax_problem(8, 5)

    def loss(x, t, logits):
        return ops.sigmoid_focal_loss(x, t, reduction="sum") + ops.softmax_focal_loss(logits, labels, reduction="mean")

    leaves = x.requires_grad_(), logits.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    same(torch.autograd.grad(compiled(x, t, logits), leaves), torch.autograd.grad(loss(x, t, logits), leaves))

    class Loss(torch.nn.Module):
        def forward(self, x, t, logits):
            return loss(x, t, logits)

    arguments = x.detach(), t, logits.detach()
    same(torch.export.export(Loss(), arguments).module()(*arguments), loss(*arguments))


def test_memory_formats():
    """Any dense layout is taken as it is; the loss has the layout of the inputs."""
    x, t = sigmoid_problem((2, 3, 4, 5))
    expected = ops.sigmoid_focal_loss(x, t)
    grad = torch.randn_like(x)
    expected_gradient = SIGMOID_BACKWARD(grad, x, t, 0.25, 2.0, NONE)
    last = x.contiguous(memory_format=torch.channels_last)
    for targets in (t, t.contiguous(memory_format=torch.channels_last), t[:1].expand(2, 3, 4, 5)):
        loss = ops.sigmoid_focal_loss(last, targets)
        assert loss.is_contiguous(memory_format=torch.channels_last)
    loss = ops.sigmoid_focal_loss(last, t)
    gradient = SIGMOID_BACKWARD(grad, last, t, 0.25, 2.0, NONE)
    assert torch.equal(loss, expected) and torch.equal(gradient, expected_gradient) and gradient.stride() == last.stride()
    flipped = ops.sigmoid_focal_loss(x[..., ::2], t[..., ::2])
    assert torch.equal(flipped, expected[..., ::2]) and torch.equal(ops.sigmoid_focal_loss(x.mT, t.mT), expected.mT)
    # an element's bytes do not depend on where it lies, so a view that starts off a 16-byte boundary agrees too
    emulated = _extension.load_emulated().sigmoid_focal_loss
    assert torch.equal(emulated(x.flatten()[1:], t.flatten()[1:], 0.25, 2.0, NONE), emulated(x, t, 0.25, 2.0, NONE).flatten()[1:])


def test_the_gradient_of_a_sum_is_one_number():
    """none followed by sum() hands an expanded gradient to the backward: the same bytes as a full one."""
    x, t = sigmoid_problem((50, 7))
    logits, labels = softmax_problem(50, 7)
    one = torch.full((), 0.7)
    for backward, arguments, shape in ((SIGMOID_BACKWARD, (x, t, 0.25, 2.0, NONE), x.shape),
                                       (SOFTMAX_BACKWARD, (logits, labels, 0.25, 2.0, NONE, -100), labels.shape)):
        emulated = getattr(_extension.load_emulated(), backward.__name__)
        for kernel in (backward, emulated):
            same(kernel(one.expand(shape), *arguments), kernel(one.expand(shape).contiguous(), *arguments), 1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Computed in float32, rounded once, on both machines."""
    x, t = sigmoid_problem((40, 8))
    logits, labels = softmax_problem(40, 8)
    x, logits = x.to(dtype), logits.to(dtype)
    half, emulated = torch.finfo(dtype).eps / 2 * 1.01, _extension.load_emulated()
    exact = sigmoid_focal_loss_reference(x.float(), t, 0.25, 2.0, NONE)
    rows = softmax_focal_loss_reference(logits.float(), labels, 0.25, 2.0, NONE, -100)
    for ours, expected in ((ops.sigmoid_focal_loss(x, t.to(dtype)), exact), (ops.softmax_focal_loss(logits, labels), rows),
                           (emulated.sigmoid_focal_loss(x, t.to(dtype), 0.25, 2.0, NONE), exact),
                           (emulated.sigmoid_focal_loss(x, t.to(dtype), 0.25, 2.0, SUM), exact.sum()),
                           (emulated.softmax_focal_loss(logits, labels, 0.25, 2.0, MEAN, -100), rows.sum() / (labels >= 0).sum())):
        assert ours.dtype == dtype and ((ours.float() - expected).abs() <= half * expected.abs() + 1e-6).all()
    gradient = emulated.sigmoid_focal_loss_backward(torch.ones((), dtype=dtype), x, t.to(dtype), 0.25, 2.0, SUM)
    expected = sigmoid_focal_loss_backward_reference(torch.ones(()), x.float(), t, 0.25, 2.0, SUM)
    assert gradient.dtype == dtype and ((gradient.float() - expected).abs() <= half * expected.abs() + 1e-6).all()
    gradient = emulated.softmax_focal_loss_backward(torch.ones((), dtype=dtype), logits, labels, 0.25, 2.0, SUM, -100)
    expected = softmax_focal_loss_backward_reference(torch.ones(()), logits.float(), labels, 0.25, 2.0, SUM, -100)
    assert gradient.dtype == dtype and ((gradient.float() - expected).abs() <= half * expected.abs() + 1e-6).all()
    assert ops.sigmoid_focal_loss(x, t).dtype == torch.float32                               # float32 targets: promoted, as by PyTorch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.sigmoid_focal_loss(x, t.to(dtype)).dtype == torch.float32
        leaf = logits.clone().requires_grad_()
        ops.softmax_focal_loss(leaf, labels, reduction="sum").backward()
        assert leaf.grad.dtype == dtype and leaf.grad.isfinite().all()


def test_targets_of_other_dtypes_and_with_gradients():
    x, t = sigmoid_problem((5, 4))
    expected = ops.sigmoid_focal_loss(x, t)
    for dtype in (torch.bool, torch.int64, torch.uint8):
        assert torch.equal(ops.sigmoid_focal_loss(x, t.to(dtype)), expected)
    assert ops.sigmoid_focal_loss(x, t.double()).dtype == torch.float64
    soft = torch.full_like(t, 0.3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda soft: ops.sigmoid_focal_loss(x.double(), soft), soft)


@pytest.mark.parametrize("reduction, sigmoid_mean", [("none", None), ("mean", True), ("sum", False)])
def test_empty(reduction, sigmoid_mean):
    x = torch.zeros(0, 5, requires_grad=True)
    loss = ops.sigmoid_focal_loss(x, torch.zeros(0, 5), reduction=reduction)
    assert loss.shape == (x.shape if reduction == "none" else ()) and (reduction == "none" or bool(loss.isnan()) == sigmoid_mean)
    loss.sum().backward()
    assert x.grad.shape == x.shape
    rows, labels = torch.zeros(0, 5, requires_grad=True), torch.zeros(0, dtype=torch.int64)
    loss = ops.softmax_focal_loss(rows, labels, reduction=reduction)
    loss.sum().backward()
    assert loss.shape == ((0,) if reduction == "none" else ()) and not loss.any() and rows.grad.shape == rows.shape
    ignored = torch.randn(3, 5, requires_grad=True)
    loss = ops.softmax_focal_loss(ignored, torch.full((3,), -100), reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not ignored.grad.any()
    emulated, code = _extension.load_emulated(), ops.focal_loss.REDUCTIONS[reduction]
    same(emulated.sigmoid_focal_loss(x.detach(), x.detach(), 0.25, 2.0, code),
         sigmoid_focal_loss_reference(x.detach(), x.detach(), 0.25, 2.0, code))
    check_op(SOFTMAX, softmax_focal_loss_reference, (rows.detach(), labels, 0.25, 2.0, code, -100))
    check_op(SOFTMAX, softmax_focal_loss_reference, (ignored.detach(), torch.full((3,), -100), 0.25, 2.0, code, -100))


def test_equal_bytes_on_any_number_of_threads():
    x, t = sigmoid_problem((90_001,))
    logits, labels = softmax_problem(9_001, 13)
    grad, grad_rows, threads, results = torch.randn(90_001), torch.randn(9_001), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append([SIGMOID(x, t, 0.25, 2.0, SUM), SIGMOID(x, t, 0.25, 1.5, MEAN), SIGMOID(x, t, 0.25, 2.0, NONE),
                            SIGMOID_BACKWARD(grad, x, t, 0.25, 2.0, NONE), SOFTMAX(logits, labels, 0.25, 2.0, MEAN, -100),
                            SOFTMAX(logits, labels, 0.25, 2.0, NONE, -100),
                            SOFTMAX_BACKWARD(grad_rows, logits, labels, 0.25, 2.0, NONE, -100)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    emulated = _extension.load_emulated()                                                    # no atomics: threads in another order
    assert torch.equal(emulated.sigmoid_focal_loss(x, t, 0.25, 2.0, SUM), emulated.sigmoid_focal_loss(x, t, 0.25, 2.0, SUM))


def test_a_label_that_does_not_exist():
    logits, labels = torch.randn(3, 4), torch.tensor([0, 4, 3])
    for labels in (torch.tensor([0, 4, 3]), torch.tensor([0, -1, 3])):
        for call in (lambda: ops.softmax_focal_loss(logits, labels),
                     lambda: softmax_focal_loss_reference(logits, labels, 1.0, 2.0, 0, -100),
                     lambda: SOFTMAX_BACKWARD(torch.ones(()), logits, labels, 1.0, 2.0, SUM, -100)):
            with pytest.raises(ValueError, match="row 1 has label"):
                call()
        emulated = _extension.load_emulated()                                                # a GPU cannot raise without waiting
        assert emulated.softmax_focal_loss(logits, labels, 1.0, 2.0, NONE, -100).isnan().tolist() == [False, True, False]
        gradient = emulated.softmax_focal_loss_backward(torch.ones(()), logits, labels, 1.0, 2.0, SUM, -100)
        assert gradient.isnan().all(1).tolist() == gradient.isnan().any(1).tolist() == [False, True, False]


def test_second_derivative_is_refused():
    x, t = sigmoid_problem((4,))
    gradient, = torch.autograd.grad(ops.sigmoid_focal_loss(x.requires_grad_(), t, reduction="sum"), x, create_graph=True)
    with pytest.raises(RuntimeError, match="focal_loss: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("call, message", [
    (lambda x, l: ops.sigmoid_focal_loss(x, x[0]), r"inputs' shape \[3, 4\]"),
    (lambda x, l: ops.sigmoid_focal_loss(x, x, reduction="average"), "none, mean or sum, got 'average'"),
    (lambda x, l: ops.sigmoid_focal_loss(x.long(), x), "logits as floats"),
    (lambda x, l: ops.sigmoid_focal_loss(x, x, gamma=-1), "gamma >= 0"),
    (lambda x, l: ops.sigmoid_focal_loss(x, x, gamma=nan), "gamma >= 0"),
    (lambda x, l: ops.sigmoid_focal_loss(x, x, alpha=1.5), r"alpha in 0\.\.1"),
    (lambda x, l: ops.sigmoid_focal_loss(x, x.to("meta")), "on meta"),
    (lambda x, l: ops.softmax_focal_loss(x[0], l), r"logits \[R, C\]"),
    (lambda x, l: ops.softmax_focal_loss(x, l[:2]), r"labels \[3\] int64"),
    (lambda x, l: ops.softmax_focal_loss(x, l.int()), r"labels \[3\] int64"),
    (lambda x, l: ops.softmax_focal_loss(x[:, :0], l), "at least one class"),
    (lambda x, l: ops.softmax_focal_loss(x, l, reduction=None), "none, mean or sum"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("namespace", ["minidamage", "minidamage_emulated"])
def test_the_bindings_protect_memory(namespace):
    _extension.load_emulated()
    ops_of = getattr(torch.ops, namespace)
    x, labels, one = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(())
    for call, message in ((lambda: ops_of.sigmoid_focal_loss(x, x[:2], 0.25, 2.0, 0), "targets must be"),
                          (lambda: ops_of.sigmoid_focal_loss(x, x.double(), 0.25, 2.0, 0), "targets must be"),
                          (lambda: ops_of.sigmoid_focal_loss(x.long(), x.long(), 0.25, 2.0, 0), "float32"),
                          (lambda: ops_of.sigmoid_focal_loss(x, x, 0.25, 2.0, 3), "reduction"),
                          (lambda: ops_of.sigmoid_focal_loss_backward(one, x, x, 0.25, 2.0, 0), "grad must be"),
                          (lambda: ops_of.sigmoid_focal_loss_backward(x, x, x, 0.25, 2.0, 1), "grad must be"),
                          (lambda: ops_of.softmax_focal_loss(x[0], labels, 0.25, 2.0, 0, -100), "logits must be"),
                          (lambda: ops_of.softmax_focal_loss(x[:, :0], labels, 0.25, 2.0, 0, -100), "logits must be"),
                          (lambda: ops_of.softmax_focal_loss(x, labels[:1], 0.25, 2.0, 0, -100), "labels must be"),
                          (lambda: ops_of.softmax_focal_loss_backward(x, x, labels, 0.25, 2.0, 0, -100), "grad must be")):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call()
