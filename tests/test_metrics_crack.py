"""Threshold sweeps, tolerant F1, recall by width, the any-damage rule: answers by hand, and the plainest loops."""
import numpy as np
import pytest
import torch

from minidamage.metrics.crack import CrackEvaluator, pixel_widths
from minidamage.metrics.segmentation import PixelEvaluator, quotients
from minidamage.metrics.thresholds import THRESHOLDS, ThresholdSweep

NAN = float("nan")


# ---- thresholds --------------------------------------------------------------------------------------------------------------------

def test_sweep_equals_a_pass_a_threshold():
    rng = np.random.RandomState(0)
    sweep, counts = ThresholdSweep(), []
    for _ in range(4):
        truth = rng.randint(0, 3, (13, 17))
        probability = np.clip(0.3 * (truth > 0) + rng.rand(13, 17), 0, 1).astype(np.float32)
        probability[:3] = np.float32(0.01) * rng.randint(0, 101, (3, 17))                 # exactly on the thresholds: not above them
        ignore = rng.rand(13, 17) > 0.9
        sweep.add(torch.from_numpy(probability), truth, ignore)
        loop = [[((probability > np.float32(t)) == p)[((truth > 0) == d) & ~ignore].sum() for p, d in ((1, 1), (1, 0), (0, 1), (0, 0))]
                for t in THRESHOLDS]
        counts.append(loop)
    result = sweep.evaluate()
    np.testing.assert_array_equal(result.counts, counts)
    f1 = quotients(np.sum(counts, 0))["F1"]
    assert result.stats["ODS F1"] == pytest.approx(f1.max()) == result.best()["F1"]
    assert f1[int(round(result.best()["threshold"] * 100)) - 1] == f1.max()
    each = quotients(np.array(counts))["F1"]
    assert result.stats["OIS F1, mean over pictures"] == pytest.approx(each.max(1).mean())
    own_best = [max(range(99), key=lambda k: (row[k], -abs(k - 49))) for row in each]
    assert result.stats["OIS F1"] == pytest.approx(quotients(np.array(counts)[np.arange(4), own_best].sum(0))["F1"])


def test_ods_and_ois_by_hand():
    """Two pictures of two pixels: one separable between .2 and .3, the other between .6 and .7."""
    sweep = ThresholdSweep()
    sweep.add(torch.tensor([[0.30, 0.20]]), torch.tensor([[1, 0]]))
    sweep.add(torch.tensor([[0.70, 0.60]]), torch.tensor([[1, 0]]))
    result = sweep.evaluate()
    assert result.stats["OIS F1"] == 1 and result.stats["OIS F1, mean over pictures"] == 1
    assert result.stats["ODS F1"] == pytest.approx(2 * 2 / (2 * 2 + 1))                    # at .2 to .29: both found, one false
    assert result.stats["ODS threshold"] == pytest.approx(0.29)                            # of these the nearest to one half
    recall, precision = result.curve()
    assert recall[0] <= recall[-1] == 1 and precision[-1] == 0.5


def test_ois_can_lie_below_ods():
    """The second picture alone does best with everything, two false pixels for one right: in the sum that costs more than it gives."""
    sweep = ThresholdSweep()
    sweep.add(torch.tensor([[0.8, 0.8]]), torch.tensor([[1, 1]]))
    sweep.add(torch.tensor([[0.4, 0.2, 0.2]]), torch.tensor([[0, 1, 0]]))
    stats = sweep.evaluate().stats
    assert stats["ODS F1"] == pytest.approx(4 / 5) and stats["OIS F1"] == pytest.approx(6 / 8)
    assert stats["OIS F1, mean over pictures"] == pytest.approx((1 + 1 / 2) / 2)


def test_pictures_without_damage():
    sweep = ThresholdSweep()
    sweep.add(torch.tensor([[0.9, 0.1]]), torch.tensor([[0, 0]]))
    none = sweep.evaluate()
    assert none.best()["F1"] == 0 and np.isnan(none.stats["OIS F1, mean over pictures"])
    sweep.add(torch.tensor([[0.8, 0.1]]), torch.tensor([[1, 0]]))
    both = sweep.evaluate()                                        # the undamaged one at .9, where nothing is found in it
    assert both.stats["OIS F1"] == 1 and both.stats["ODS F1"] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="expects probabilities 0..1, got NaN"):
        ThresholdSweep().add(torch.tensor([[0.1, float("nan")]]), torch.zeros(1, 2))
    empty = ThresholdSweep().evaluate()
    assert empty.best()["threshold"] == 0.5 and np.isnan(empty.stats["ODS F1"])
    with pytest.raises(ValueError, match="one size, got .1, 2. and .2, 1"):
        sweep.add(torch.zeros(1, 2), torch.zeros(2, 1))


# ---- tolerance ---------------------------------------------------------------------------------------------------------------------

def test_tolerance_by_hand():
    truth, prediction = np.zeros((9, 20), int), np.zeros((9, 20), int)
    truth[2, 3:13] = 1
    prediction[4, 3:13] = 1                                            # the same line two pixels lower
    prediction[8, 18:20] = 1                                           # and something of its own, far away
    evaluator = CrackEvaluator()
    evaluator.add(truth, prediction)
    result = evaluator.evaluate()
    at = lambda t: [result.stats[f"tolerance {t} px/{name}"] for name in ("precision", "recall", "F1")]
    assert at(0) == [0, 0, 0]
    assert at(2) == pytest.approx([10 / 12, 1, 2 * (10 / 12) / (10 / 12 + 1)]) == at(5)
    assert result.counts.tolist() == [[[0, 12, 0, 10], [10, 12, 10, 10], [10, 12, 10, 10]]]


def test_tolerance_is_a_disc_not_a_square():
    truth, prediction = np.zeros((9, 9), int), np.zeros((9, 9), int)
    truth[4, 4] = prediction[6, 6] = 1                                 # 2.83 pixels away
    evaluator = CrackEvaluator((2, 3))
    evaluator.add(truth, prediction)
    stats = evaluator.evaluate().stats
    assert stats["tolerance 2 px/F1"] == 0 and stats["tolerance 3 px/F1"] == 1


def test_no_tolerance_is_the_plain_f1():
    rng = np.random.RandomState(1)
    crack, plain = CrackEvaluator(), PixelEvaluator(["crack"])
    for _ in range(6):
        truth, prediction, ignore = rng.rand(3, 20, 30) > 0.7
        crack.add(truth, prediction, ignore)
        plain.add_label_maps(truth.astype(int), prediction.astype(int), ignore)
    ours, theirs = crack.evaluate().stats, plain.evaluate().stats
    for name in ("F1", "precision", "recall", "image/F1"):
        assert ours[f"tolerance 0 px/{name}"] == pytest.approx(theirs[f"pixel/{name}"])
    assert ours["tolerance 0 px/F1"] < ours["tolerance 2 px/F1"] <= ours["tolerance 5 px/F1"]


def test_empty_pictures_of_the_tolerance():
    evaluator = CrackEvaluator()
    evaluator.add(np.zeros((4, 4)), np.zeros((4, 4)))                  # no quotient
    evaluator.add(np.eye(4), np.zeros((4, 4)))                         # missed: F1 0, and in the mean over pictures precision 0
    stats = evaluator.evaluate().stats
    assert stats["tolerance 2 px/image/F1"] == stats["tolerance 2 px/image/precision"] == stats["tolerance 2 px/recall"] == 0
    assert np.isnan(stats["tolerance 2 px/precision"])
    evaluator.add(np.eye(4), np.eye(4))
    assert evaluator.evaluate().stats["tolerance 2 px/image/precision"] == 1 / 2           # the empty one is left out


# ---- width -------------------------------------------------------------------------------------------------------------------------

def bars(*widths):
    truth = np.zeros((60, 120), bool)
    for k, width in enumerate(widths):
        truth[4 + 20 * k:4 + 20 * k + width, 10:110] = True
    return truth


def test_recall_by_width_in_pixels():
    truth = bars(1, 4, 13)
    prediction = truth.copy()
    prediction[4] = False                                              # the thin one is missed
    prediction[24:26] = False                                          # half of the middle one
    evaluator = CrackEvaluator()
    evaluator.add(truth, prediction)
    by_width = evaluator.evaluate().by_width
    assert list(by_width) == ["under 3 px", "3 to 6 px", "6 to 12 px", "12 to 24 px", "24 px and more"]
    assert by_width["under 3 px"] == {"recall": 0, "pixels": 100, "share": 100 / 1800}
    assert by_width["3 to 6 px"]["recall"] == 0.5 and by_width["3 to 6 px"]["pixels"] == 400
    assert by_width["12 to 24 px"] == {"recall": 1, "pixels": 1300, "share": 1300 / 1800}
    assert by_width["6 to 12 px"]["pixels"] == 0 and np.isnan(by_width["6 to 12 px"]["recall"])


def test_recall_by_width_in_millimetres():
    evaluator = CrackEvaluator(mm_per_px=0.25)
    truth = bars(3, 4, 13)                                             # 0.75, 1, 3.25 mm
    evaluator.add(truth, truth & (np.arange(60) < 20)[:, None])
    by_width = evaluator.evaluate().by_width
    assert {name: (row["recall"], row["pixels"]) for name, row in by_width.items()} == {
        "tiny, under 1 mm": (1, 300), "small, 1 to 3 mm": (0, 400), "wide, 3 mm and more": (0, 1300)}


def test_every_pixel_has_the_width_of_its_own_crack():
    truth = bars(2, 5, 12)
    widths = np.zeros(truth.shape)
    widths[truth] = pixel_widths(truth)
    assert set(widths[4:6].ravel()) == {0, 2} and set(widths[24:29].ravel()) == {0, 5} and set(widths[44:56].ravel()) == {0, 12}


@pytest.mark.parametrize("arguments, message", [({"mm_per_px": 0}, "mm_per_px: expected millimetres a pixel above 0, got 0"),
                                                ({"tolerances": (-1,)}, "0 or more pixels")])
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        CrackEvaluator(**arguments)
    with pytest.raises(ValueError, match="one size"):
        CrackEvaluator().add(np.zeros((2, 2)), np.zeros((2, 3)))


# ---- the rule of the car-damage segmentation project --------------------------------------------------------------------------------

def test_any_damage_by_hand():
    evaluator = PixelEvaluator(["dent", "scratch"])
    evaluator.add_label_maps(np.array([[1, 1, 0, 0]]), np.array([[2, 2, 2, 0]]))          # IoU 2/3, Dice 4/5, one pixel of the right class
    evaluator.add_label_maps(np.zeros((1, 4), int), np.zeros((1, 4), int))                # nothing there, nothing found: 1
    result = evaluator.evaluate()
    assert result.any_damage() == pytest.approx({"any-damage/IoU": (2 / 3 + 1) / 2, "any-damage/Dice": (4 / 5 + 1) / 2,
                                                 "any-damage/accuracy": (1 / 4 + 1) / 2})
