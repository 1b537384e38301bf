"""Non-maximum suppression against hand answers, stored torchvision results, its reference, and the CUDA kernels on the CPU."""
import pytest
import torch
from oracle import check_op, stored

from minidamage import ops
from minidamage.ops.nms import nms_padded_reference, nms_reference

NMS, PADDED = torch.ops.minidamage.nms, torch.ops.minidamage.nms_padded
STORED, STORED_BATCHED = stored("nms"), stored("batched_nms")


def random_boxes(n, size=60.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator, dtype=dtype) * 300 - 20
    return torch.cat([corner, corner + torch.rand(n, 2, generator=generator, dtype=dtype) * size], 1), \
        (torch.rand(n, generator=generator) * 50).round() / 50                       # many ties


def test_by_hand(device):
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [1, 0, 11, 10], [20, 20, 30, 30.]], device=device)
    scores = torch.tensor([.6, .9, .9, .1], device=device)
    # ties: box 1 first. IoU(1, 2) = 45 / 105, IoU(2, 0) = 90 / 110 removes 0; IoU(1, 0) = 50 / 100 is not above 0.5
    assert ops.nms(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert ops.nms(boxes, scores, 0.49).tolist() == [1, 2, 3]
    assert ops.nms(boxes[:2], scores[:2], 0.5).tolist() == [1, 0]
    assert ops.nms(boxes[:2], scores[:2], 0.49).tolist() == [1]
    assert ops.batched_nms(boxes, scores, torch.tensor([0, 0, 1, 1], device=device), 0.49).tolist() == [1, 2, 3]
    keep, count = ops.nms_padded(boxes, scores, 0.5, 6)
    assert keep.tolist() == [1, 2, 3, 0, 0, 0] and int(count) == 3
    keep, count = ops.nms_padded(boxes, scores, 0.5, 2, valid=torch.tensor([True, False, True, True], device=device))
    assert keep.tolist() == [2, 3] and int(count) == 2


@pytest.mark.parametrize("case", [str(name) for name in STORED["cases"]])
def test_stored_torchvision(case, device):
    boxes, scores, threshold, keep = (STORED[f"{case}_{part}"] for part in ("boxes", "scores", "thr", "keep"))
    assert torch.equal(ops.nms(boxes.to(device), scores.to(device), float(threshold)).cpu(), keep)
    check_op(NMS, nms_reference, (boxes, scores, None, float(threshold)), opcheck=False)


@pytest.mark.parametrize("case", [str(name) for name in STORED_BATCHED["cases"]])
def test_stored_torchvision_batched(case, device):
    boxes, scores, idxs, threshold, keep = (STORED_BATCHED[f"{case}_{part}"] for part in ("boxes", "scores", "idxs", "thr", "keep"))
    ours = ops.batched_nms(boxes.to(device), scores.to(device), idxs.to(device), float(threshold)).cpu()
    assert set(ours.tolist()) == set(keep.tolist()) and (scores[ours].diff() <= 0).all()
    check_op(NMS, nms_reference, (boxes, scores, idxs, float(threshold)), opcheck=False)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.1, 0.3, 0.5, 0.7, 1.0, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_threshold(threshold, dtype):
    boxes, scores = random_boxes(500, dtype=dtype)
    boxes[::50] *= 4                                                                 # some that cover many cells of the grid
    idxs = torch.arange(500) % 3 * 10**12 - 5
    check_op(NMS, nms_reference, (boxes, scores, None, threshold), opcheck=False)
    check_op(PADDED, nms_padded_reference, (boxes, scores.to(dtype), idxs, threshold, 100, torch.arange(500) % 7 > 0), opcheck=False)


def test_nasty_boxes():
    """NaN, infinite, inverted, zero-area, huge, subnormal and far-away boxes, among ordinary ones so that the grid is in use."""
    inf, nan, tiny = float("inf"), float("nan"), 1e-23
    nasty = torch.tensor([[nan, 0, 10, 10], [0, 0, nan, nan], [nan] * 4, [0, 0, inf, inf], [-inf, -inf, inf, inf], [inf, inf, inf, inf],
                          [10, 10, 0, 0], [10, 0, 0, 10], [5, 5, 5, 5], [5, 5, 5, 9], [-1e30, -1e30, 1e30, 1e30], [-3e38, 0, 3e38, 1],
                          [0, 0, tiny, tiny], [0, 0, tiny * 1.4, tiny], [1e7, 1e7, 1e7 + 2, 1e7 + 2], [1e7, 1e7, 1e7 + 1, 1e7 + 2],
                          [1e7, 1e7, 1e7 + 3, 1e7 + 2]])
    ordinary, _ = random_boxes(200)
    boxes = torch.cat([nasty, ordinary, nasty])
    scores = torch.rand(len(boxes))
    scores[::17], scores[::19], scores[::23], scores[1], scores[2] = nan, inf, -inf, 0.0, -0.0
    for threshold in (0.0, 0.3, 0.5, 0.9):
        check_op(NMS, nms_reference, (boxes, scores, None, threshold), opcheck=False)
        check_op(NMS, nms_reference, (nasty, scores[:len(nasty)], None, threshold), opcheck=False)


def test_rounding_at_the_threshold():
    """Pairs whose IoU is the threshold, or a rounding away, all over the coordinate range: the grid must never skip one."""
    corner = torch.rand(400, 2) * torch.tensor([10.0, 1e3, 1e5, 1e6]).repeat(100)[:, None]
    size = (torch.rand(400, 2) * 64).ceil()
    first = torch.cat([corner, corner + size], 1)
    second = first.clone()
    second[:, 2] = first[:, 0] + size[:, 0] / 2                                      # exactly half of it, before rounding
    boxes = torch.cat([first, second])
    for threshold in (0.5, 0.4999999, 0.5000001):
        check_op(NMS, nms_reference, (boxes, torch.rand(800), None, threshold), opcheck=False, strides=False, emulated=False)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 130])
def test_sizes_and_contract(n):
    boxes, scores = random_boxes(n)
    check_op(NMS, nms_reference, (boxes, scores, None, 0.5))
    check_op(PADDED, nms_padded_reference, (boxes, scores, torch.arange(n) % 2, 0.3, n // 2, torch.arange(n) % 3 > 0))
    check_op(PADDED, nms_padded_reference, (boxes, scores, None, 0.3, n + 5, None), compiled=True)
    check_op(PADDED, nms_padded_reference, (boxes, scores, None, 0.3, 0, None), opcheck=False)


def test_many_rows_of_the_mask():
    """More boxes than the GPU's mask holds rows at a time (4096): the second batch sees what the first removed."""
    boxes, scores = random_boxes(4300)
    check_op(PADDED, nms_padded_reference, (boxes, scores, None, 0.2, 2500, None), opcheck=False, strides=False)


def test_groups_on_several_threads_are_the_groups_one_by_one():
    boxes, scores = random_boxes(12000)
    idxs = torch.arange(12000) % 4
    groups = [torch.where(idxs == k)[0] for k in range(4)]
    expected = torch.cat([members[ops.nms(boxes[members], scores[members], 0.5)] for members in groups])
    kept = ops.batched_nms(boxes, scores, idxs, 0.5)
    assert torch.equal(kept.sort().values, expected.sort().values)
    assert torch.equal(kept, kept[scores[kept].sort(stable=True, descending=True).indices])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_compared_in_float32(dtype):
    boxes, scores = random_boxes(200)
    check_op(NMS, nms_reference, (boxes.to(dtype), scores.to(dtype), None, 0.5), opcheck=False)


def test_compiles_with_an_output_of_unknown_length():
    boxes, scores = random_boxes(100)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda b, s: ops.nms(b, s, 0.5), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(boxes, scores), nms_reference(boxes, scores, None, 0.5))


def test_exports():
    class Keep(torch.nn.Module):
        def forward(self, boxes, scores):
            return ops.nms_padded(boxes, scores, 0.5, 20)

    boxes, scores = random_boxes(100)
    program = torch.export.export(Keep(), (boxes, scores))
    assert torch.equal(program.module()(boxes, scores)[0], ops.nms_padded(boxes, scores, 0.5, 20)[0])


@pytest.mark.parametrize("call, message", [
    (lambda b, s: ops.nms(b[:, :3], s, 0.5), r"boxes \[N, 4\]"),
    (lambda b, s: ops.nms(b, s[:-1], 0.5), r"scores \[5\]"),
    (lambda b, s: ops.nms(b.long(), s, 0.5), "floating-point"),
    (lambda b, s: ops.batched_nms(b, s, torch.zeros(4), 0.5), r"idxs \[5\]"),
    (lambda b, s: ops.nms_padded(b, s, 0.5, -1), "max_keep"),
    (lambda b, s: ops.nms_padded(b, s, 0.5, 3, torch.ones(5)), "bool"),
])
def test_mistakes_are_named(call, message):
    boxes, scores = random_boxes(5)
    with pytest.raises(ValueError, match=message):
        call(boxes, scores)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("count", [40, 5000, 40000])
def test_many_boxes_on_cuda(count):
    """The reduction starts with 128, 512 or 1024 threads, by the number of boxes."""
    boxes, scores = random_boxes(count, 20.0)
    assert torch.equal(ops.nms(boxes.cuda(), scores.cuda(), 0.5).cpu(), ops.nms(boxes, scores, 0.5))
