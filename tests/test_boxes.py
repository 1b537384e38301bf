"""Boxes: hand answers and torchvision's stored matrices."""
import pytest
import torch
from oracle import stored

from minidamage import ops

A = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 5, 5.]])


def test_by_hand():
    assert ops.box_area(A).tolist() == [4, 4, 0]
    iou = ops.box_iou(A, A)
    assert iou[0, 0] == 1 and iou[0, 1] == pytest.approx(1 / 7) and iou[0, 2] == 0 and iou[2, 2].isnan()
    assert ops.generalized_box_iou(A, A)[0, 1] == pytest.approx(1 / 7 - 2 / 9)      # hull 9, union 7
    assert ops.clip_boxes_to_image(torch.tensor([[-5, -5, 50, 9.], [12, 3, 15, 4]]), (8, 10)).tolist() == [[0, 0, 10, 8], [10, 3, 10, 4]]
    assert ops.remove_small_boxes(torch.tensor([[0, 0, 2, 2], [0, 0, 2, 1.9], [3, 0, 0, 3]]), 2).tolist() == [0]


def test_stored_torchvision():
    data = stored("box_losses")
    torch.testing.assert_close(ops.box_iou(data["b1"], data["b2"]), data["iou"], rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(ops.generalized_box_iou(data["b1"], data["b2"]), data["giou_mat"], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("form, box", [("xyxy", [1, 2, 5, 10]), ("xywh", [1, 2, 4, 8]), ("cxcywh", [3, 6, 4, 8])])
def test_convert(form, box):
    xyxy, other = torch.tensor([[1, 2, 5, 10.]]), torch.tensor([box], dtype=torch.float32)
    assert torch.equal(ops.box_convert(other, form, "xyxy"), xyxy)
    assert torch.equal(ops.box_convert(xyxy, "xyxy", form), other)
    assert torch.equal(ops.box_convert(ops.box_convert(other, form, "cxcywh"), "cxcywh", form), other)


def test_convert_names_the_forms():
    with pytest.raises(ValueError, match="xyxy, xywh, cxcywh"):
        ops.box_convert(A, "xyxy", "yxyx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int16, torch.uint8])
def test_small_types_do_not_overflow(dtype):
    box = torch.tensor([[0, 0, 200, 250]]).to(dtype)
    assert ops.box_area(box).item() == pytest.approx(50000, rel=0.01) and ops.box_iou(box, box).item() == 1


def test_empty():
    none = torch.zeros(0, 4)
    assert ops.box_iou(none, A).shape == (0, 3) and ops.generalized_box_iou(A, none).shape == (3, 0)
    assert ops.clip_boxes_to_image(none, (5, 5)).shape == (0, 4) and ops.remove_small_boxes(none, 1).shape == (0,)
