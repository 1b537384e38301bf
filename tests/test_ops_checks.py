"""Arguments of a wrong kind end in a ValueError that names the argument, before any kernel."""
import numpy as np
import pytest
import torch

from minidamage import ops

X, ROIS, LOGITS = torch.zeros(1, 4, 6, 6), torch.zeros(1, 5), torch.zeros(3, 2)
LABELS, OFFSET, WEIGHT = torch.zeros(3, dtype=torch.int64), torch.zeros(1, 18, 6, 6), torch.zeros(2, 4, 3, 3)
W, E = torch.zeros(4, 4), torch.zeros(5, 2)


def attention(**changes):
    arguments = dict(x=torch.zeros(1, 5, 4), w_q=W, b_q=None, w_k=W, b_k=None, w_v=W, b_v=None, E=E, F=E, num_heads=2)
    return ops.linear_attention(**{**arguments, **changes})


@pytest.mark.parametrize("call, message", [
    (lambda: ops.roi_pool([1], ROIS, 2), "expected input as a tensor, got list"),
    (lambda: ops.roi_pool(X, ROIS, 2.5), "expected output_size as a positive int or a pair of them, below 1073741824, got 2.5"),
    (lambda: ops.roi_pool(X, ROIS, (2.5, 1)), "expected output_size as a positive int"),
    (lambda: ops.roi_align(X, ROIS, 0), "expected output_size as a positive int"),
    (lambda: ops.decode_boxes(ROIS[:, 1:], [0]), "expected boxes as a tensor, got list"),
    (lambda: ops.encode_boxes(ROIS[:, 1:], ROIS[:, 1:], "4"), "expected weights as four numbers, got '4'"),
    (lambda: ops.sigmoid_focal_loss(LOGITS, [0, 1]), "expected targets as a tensor, got list"),
    (lambda: ops.sigmoid_focal_loss(LOGITS, LOGITS, gamma="2"), "expected a number gamma >= 0 and a number alpha, got '2'"),
    (lambda: ops.softmax_focal_loss(LOGITS, np.zeros(3)), "expected labels as a tensor, got ndarray"),
    (lambda: ops.softmax_focal_loss(LOGITS, LABELS, ignore_index=None), "expected ignore_index as an int, got None"),
    (lambda: attention(x=[1]), "expected x as a tensor, got list"),
    (lambda: attention(w_q=None), "expected w_q as a tensor, got NoneType"),
    (lambda: attention(w_k=np.zeros((4, 4))), "expected w_k as a tensor, got ndarray"),
    (lambda: ops.deform_conv2d(X, OFFSET, WEIGHT, padding=2 ** 30), "expected padding as an int of 0 or more or a pair of them, below"),
    (lambda: ops.deform_conv2d(X, OFFSET, WEIGHT, stride=2 ** 40), "expected stride as a positive int or a pair of them, below")])
def test_wrong_kinds_are_named(call, message):
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace("+", "\\+")):
        call()


def test_meta_tensors_have_no_autocast():
    x, offset, weight = (t.to("meta") for t in (X, OFFSET, WEIGHT))
    assert ops.deform_conv2d(x, offset, weight, padding=1).shape == (1, 2, 6, 6)
    assert ops.sigmoid_focal_loss(LOGITS.to("meta").half(), LOGITS.to("meta").half()).shape == (3, 2)


def test_a_backward_pass_inside_autocast_is_not_rounded():
    """The bindings of a GPU, emulated: forward outside autocast, backward inside it, equal bytes."""
    from minidamage.ops import _extension
    emulated = _extension.load_emulated()
    torch.manual_seed(1)
    x, offset, weight = torch.randn(1, 4, 6, 6), torch.randn(1, 18, 6, 6), torch.randn(2, 4, 3, 3)
    settings = ([1, 1], [1, 1], [1, 1], 1, 1)
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            results.append([emulated.deform_conv2d(x, offset, None, weight, None, *settings),
                            *emulated.deform_conv2d_backward_input(torch.ones(1, 2, 6, 6), x, offset, None, weight, *settings)])
    for plain, cast in zip(*results):
        assert torch.equal(plain, cast)
