"""Pixel metrics and bootstrap intervals: by hand, and the two ways of feeding them against each other."""
import numpy as np
import pytest
import torch

from minidamage import masks
from minidamage.metrics.crack import CrackEvaluator
from minidamage.metrics.segmentation import PixelEvaluator
from minidamage.metrics.statistics import bootstrap
from minidamage.metrics.thresholds import ThresholdSweep

NAN = float("nan")


def test_by_hand():
    evaluator = PixelEvaluator(["dent", "scratch"])
    evaluator.add_label_maps(np.array([[1, 1, 0], [2, 0, 0]]), np.array([[1, 2, 2], [2, 0, 0]]))      # TP 3 FP 1 FN 0 TN 2
    evaluator.add_label_maps(np.array([[1, 0]]), np.array([[0, 0]]))                                  # TP 0 FP 0 FN 1 TN 1
    evaluator.add_label_maps(np.zeros((2, 2), int), np.zeros((2, 2), int))                            # TN 4
    result = evaluator.evaluate()
    pooled = {"IoU": 3 / 5, "Dice": 6 / 8, "F1": 6 / 8, "precision": 3 / 4, "recall": 3 / 4, "accuracy": 10 / 12,
              "two-class IoU": (3 / 5 + 7 / 9) / 2, "two-class Dice": (6 / 8 + 14 / 16) / 2}
    image = {"IoU": (3 / 4 + 0) / 2, "Dice": 6 / 7 / 2, "F1": 6 / 7 / 2, "precision": (3 / 4 + 0) / 2, "recall": 1 / 2,
             "accuracy": (5 / 6 + 1 / 2 + 1) / 3, "two-class IoU": ((3 / 4 + 2 / 3) / 2 + (0 + 1 / 2) / 2) / 2,
             "two-class Dice": ((6 / 7 + 4 / 5) / 2 + (0 + 2 / 3) / 2) / 2}
    expected = {**{f"pixel/{k}": v for k, v in pooled.items()}, **{f"pixel/image/{k}": v for k, v in image.items()}}
    expected |= {"pixel/mIoU": (1 / 3 + 1 / 3) / 2, "pixel/mDice": (2 / 4 + 2 / 4) / 2}
    assert result.stats == pytest.approx(expected)
    assert result.per_class["dent"]["pixel/IoU"] == pytest.approx(1 / 3)             # TP 1, FN 1 + 1
    assert result.per_class["scratch"]["pixel/IoU"] == pytest.approx(1 / 3)          # TP 1, FP 2
    assert result.per_image("IoU").tolist() == pytest.approx([0.75, 0, NAN], nan_ok=True)


def test_mean_over_classes_leaves_out_what_the_truth_does_not_have():
    evaluator = PixelEvaluator(["dent", "scratch", "glass"])
    assert np.isnan(evaluator.evaluate().stats["pixel/mIoU"])
    evaluator.add_label_maps(np.array([[1, 1, 2, 2, 0]]), np.array([[1, 0, 1, 2, 3]]))
    result = evaluator.evaluate()
    assert result.per_class["glass"]["pixel/IoU"] == 0                               # found where there is none
    assert result.stats["pixel/mIoU"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result.stats["pixel/mDice"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert result.stats["pixel/IoU"] == pytest.approx(3 / 5)                         # blind to which class
    assert "pixel/mIoU" not in PixelEvaluator(["dent"]).evaluate().stats             # it is the IoU


def test_empty_pictures_count_as_told():
    evaluator = PixelEvaluator(["dent"], empty=1.0)
    evaluator.add_label_maps(np.zeros((2, 2), int), np.zeros((2, 2), int))
    evaluator.add_label_maps(np.ones((2, 2), int), np.zeros((2, 2), int))
    assert evaluator.evaluate().stats["pixel/image/IoU"] == 0.5
    assert evaluator.evaluate().stats["pixel/IoU"] == 0


def test_a_model_that_is_silent_is_not_precise():
    """Ten damaged pictures, one of them found: precision .1 a picture, 1 pooled; an undamaged picture with nothing found is left out."""
    evaluator = PixelEvaluator(["crack"])
    for i in range(10):
        evaluator.add_label_maps(np.eye(4, dtype=int), np.eye(4, dtype=int) * (i == 0))
    evaluator.add_label_maps(np.zeros((4, 4), int), np.zeros((4, 4), int))
    result = evaluator.evaluate()
    assert result.stats["pixel/image/precision"] == result.stats["pixel/image/recall"] == pytest.approx(0.1)
    assert result.stats["pixel/precision"] == 1 and np.isnan(result.per_image("precision")[10])


def test_instances_equal_label_maps():
    rng = np.random.RandomState(0)
    by_map, by_instance = PixelEvaluator(["a", "b"]), PixelEvaluator(["a", "b"])
    for _ in range(5):
        truth, found = rng.randint(0, 3, (2, 11, 17))
        ignore = rng.rand(2, 11, 17) > 0.8                                           # two crowd regions
        by_map.add_label_maps(truth, found, ignore.any(0))
        pieces = []
        for labels_map in (truth, found):                                            # each class cut in two overlapping instances
            halves = [(k, (labels_map == k) & np.indices(truth.shape)[0].__ge__(low) & (np.indices(truth.shape)[0] < high))
                      for k in (1, 2) for low, high in ((0, 7), (5, 11))]
            pieces += [[k for k, _ in halves], masks.encode(np.stack([m for _, m in halves]))]
        by_instance.add_instances(*pieces, *truth.shape, ignore=masks.encode(ignore))
    assert np.array_equal(by_map.evaluate().counts, by_instance.evaluate().counts)
    by_instance.add_instances([], [], [1], [masks.encode(np.ones((2, 3), bool))], 2, 3)
    assert by_instance.evaluate().counts[-1].tolist() == [[0, 6, 0, 0], [0, 6, 0, 0], [0, 0, 0, 6]]


@pytest.mark.parametrize("kind", [bool, np.uint8, np.int64, torch.tensor])
def test_a_mask_of_ignored_pixels_may_be_of_any_kind(kind):
    rng = np.random.default_rng(0)
    truth, found, ignore = rng.integers(0, 2, (20, 30)), rng.integers(0, 2, (20, 30)), rng.random((20, 30)) < 0.2
    evaluator, sweep = PixelEvaluator(["dent"]), ThresholdSweep()
    evaluator.add_label_maps(truth, found, kind(ignore) if kind is torch.tensor else ignore.astype(kind))
    assert evaluator.evaluate().counts[0].sum(1).tolist() == [(~ignore).sum()] * 2
    sweep.add(rng.random((20, 30)), truth, kind(ignore) if kind is torch.tensor else ignore.astype(kind))
    assert (sweep.evaluate().counts.sum(-1) == (~ignore).sum()).all()
    for add in (evaluator.add_label_maps, sweep.add, CrackEvaluator().add):
        with pytest.raises(ValueError, match=r"ignore: expected a mask of the maps' size \[20, 30\], got \[20, 29\]"):
            add(truth * 0.5 if add == sweep.add else truth, found, ignore[:, 1:])


def test_mistakes_with_instances_and_probabilities_are_named():
    rle, evaluator = masks.encode(np.ones((4, 6), np.uint8)), PixelEvaluator(["dent"])
    for arguments, message in ((([1], [rle], [], [], 10, 10), r"RLEs of the picture's size \[10, 10\], got \[\[4, 6\]\]"),
                               (([3], [rle], [], [], 4, 6), r"a label 1..1 and an RLE for each object, got of the truth 1 RLEs .*\[3\]"),
                               (([], [], [1, 1], [rle], 4, 6), r"got of the detections 1 RLEs and the labels \[1\] \(2\)")):
        with pytest.raises(ValueError, match=message):
            evaluator.add_instances(*arguments)
    truth = np.ones((4, 6), np.uint8)
    for saved, words in ((np.full((4, 6), 200, np.uint8), "torch.uint8 from 200"), (np.full((4, 6), 2.5), "from 2.5 to 2.5")):
        with pytest.raises(ValueError, match=f"expects probabilities 0..1 as floats, got .*{words}"):
            ThresholdSweep().add(saved, truth)


def test_ignored_pixels_and_no_pictures():
    evaluator = PixelEvaluator(["a"])
    assert np.isnan(evaluator.evaluate().stats["pixel/IoU"])
    evaluator.add_label_maps(np.array([[1, 0]]), np.array([[1, 1]]), ignore=np.array([[False, True]]))
    assert evaluator.evaluate().stats["pixel/IoU"] == 1


@pytest.mark.parametrize("truth, found, message", [(np.zeros((2, 2), int), np.zeros((2, 3), int), "one size"),
                                                   (np.zeros((2, 2), int), np.full((2, 2), 255), "0 and 255")])
def test_mistakes_are_named(truth, found, message):
    with pytest.raises(ValueError, match=message):
        PixelEvaluator(["a"]).add_label_maps(truth, found)


def test_bootstrap_interval_of_a_mean():
    values = np.random.RandomState(1).normal(3, 2, 400)
    interval = bootstrap(values, np.mean)
    standard_error = values.std() / 20
    assert interval.value == values.mean()
    assert interval.low == pytest.approx(values.mean() - 1.96 * standard_error, abs=0.3 * standard_error)
    assert interval.high == pytest.approx(values.mean() + 1.96 * standard_error, abs=0.3 * standard_error)
    assert bootstrap(values, np.mean) == interval                                    # seeded


def test_bootstrap_paired_is_narrower():
    rng = np.random.RandomState(2)
    hard = rng.normal(0, 1, 200)                                                     # what makes a picture hard is common to both
    a, b = hard + 0.1 + rng.normal(0, 0.05, 200), hard + rng.normal(0, 0.05, 200)
    paired = bootstrap(a, np.mean, other=b)
    assert paired.low > 0 and paired.high - paired.low < 0.03
    assert bootstrap(a - b.mean(), np.mean).low < 0
    with pytest.raises(ValueError, match="same pictures"):
        bootstrap(a, np.mean, other=b[:-1])
    with pytest.raises(ValueError, match="one row"):
        bootstrap([], np.mean)
