"""Scores of probability maps over all thresholds at once: which one to ship, ODS and OIS.

    sweep = ThresholdSweep()
    sweep.add(probability [H, W], truth [H, W])               # one picture; a histogram is kept, not the map
    result = sweep.evaluate()
    result.best()["threshold"]                                # choose it on validation pictures, never on those that are reported
    result.stats["ODS F1"], result.stats["OIS F1"]

Each picture is read once: its pixels fall into the 100 bins between the thresholds .01, .02, ..., .99, apart for damage and background,
and sums from the right give TP and FP at every threshold. A pixel is predicted where its probability is *above* the threshold, as in
layers/segmenter.py.

ODS (optimal data set scale): the best F1 of the pooled counts, one threshold for all pictures. OIS (optimal image scale): each picture at
its own best threshold, counts pooled; many crack papers average the pictures' best F1 instead: "OIS F1, mean over pictures". Pooled, OIS
can lie below ODS: what is best for each picture is not always best for their sum. Both look at the truth to choose, so they say what a
threshold could reach, not what the model reaches. Source: P. Arbelaez et al., Contour detection
and hierarchical image segmentation, PAMI 2011.
"""
import numpy as np
import torch

from minidamage.distributed import interleave
from minidamage.metrics.segmentation import ignored, quotients

THRESHOLDS = np.arange(1, 100) / 100
ROUNDING = 1e-3                                               # of probabilities, in 16 bits


class ThresholdSweep:
    """Histograms of pictures, damage of any class against background."""

    def __init__(self):
        self._counts = []                                     # int64 [99, 4] a picture: TP, FP, FN, TN at each threshold

    def add(self, probability, truth, ignore=None):
        """probability: [H, W] float in 0..1 (tensor, or array), of damage; truth: [H, W], non-zero is damage; ignore: [H, W] bool.
        Raises ValueError for maps of two sizes, and for NaN, which no threshold would be above or below."""
        probability, truth = torch.as_tensor(probability), torch.as_tensor(truth)
        if probability.shape != truth.shape or truth.dim() != 2:
            raise ValueError("ThresholdSweep.add expects two maps [H, W] of one size, got "
                             f"{list(probability.shape)} and {list(truth.shape)}; give the channel of the damage class, or 1 minus the "
                             "background's")
        if probability.isnan().any():
            raise ValueError("ThresholdSweep.add expects probabilities 0..1, got NaN: the model's weights or the precision that it works "
                             "in have overflowed; try another checkpoint")
        low, high = (probability.min(), probability.max()) if probability.numel() else (0, 0)
        if not probability.is_floating_point() or low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(f"ThresholdSweep.add expects probabilities 0..1 as floats, got {probability.dtype} from {low:g} to {high:g}; "
                             "divide a saved picture by 255, take the sigmoid of logits")
        thresholds = torch.as_tensor(THRESHOLDS, dtype=probability.dtype, device=probability.device)
        above = torch.bucketize(probability.contiguous(), thresholds)                     # number of thresholds below the probability
        states = above + (truth.to(above.device) != 0) * (len(THRESHOLDS) + 1)
        if ignore is not None:
            states = states[~torch.as_tensor(ignored(ignore, truth.shape), device=above.device)]
        bins = torch.bincount(states.flatten(), minlength=2 * (len(THRESHOLDS) + 1)).cpu().numpy().reshape(2, -1)
        background, damage = (side[::-1].cumsum()[::-1] for side in bins)                 # [100]: pixels in this bin or above
        tp, fp = damage[1:], background[1:]
        self._counts.append(np.stack([tp, fp, damage[0] - tp, background[0] - fp], axis=1))

    @classmethod
    def joined(cls, sweeps):
        """One of several, each with every n-th picture (distributed.shard), in the pictures' order. The first one is made it."""
        sweeps[0]._counts = interleave([sweep._counts for sweep in sweeps])
        return sweeps[0]

    def evaluate(self):
        """Returns the SweepResult of all pictures so far."""
        return SweepResult(np.stack(self._counts) if self._counts else np.zeros((0, len(THRESHOLDS), 4), np.int64))


class SweepResult:
    """counts: int64 [N, 99, 4]: TP, FP, FN, TN of each picture at each threshold. stats: ODS and OIS, NaN without any damage."""

    def __init__(self, counts):
        self.counts, self.pooled = counts, quotients(counts.sum(0))
        images = quotients(counts)["F1"]                                                  # [N, 99], NaN: nothing there, nothing found
        own_best = _argbest(np.nan_to_num(images, nan=1.0))
        at_own_best = counts[np.arange(len(counts)), own_best]                            # [N, 4]
        reached = images[np.arange(len(counts)), own_best]
        known = ~np.isnan(reached)
        best = self.best()
        self.stats = {"ODS F1": best["F1"], "ODS threshold": best["threshold"], "OIS F1": float(quotients(at_own_best.sum(0))["F1"]),
                      "OIS F1, mean over pictures": float(reached[known].mean()) if known.any() else float("nan")}

    def best(self):
        """{"threshold", "F1", "IoU", "precision", "recall"} where the pooled F1 (and so the pooled IoU) is highest; among equals the
        threshold nearest 0.5, which is also the answer where there is no damage (F1 NaN)."""
        k = int(_argbest(np.nan_to_num(self.pooled["F1"], nan=-1.0)[None])[0])
        return {"threshold": float(THRESHOLDS[k]), **{name: float(self.pooled[name][k]) for name in ("F1", "IoU", "precision", "recall")}}

    def best_without(self):
        """[N]: the threshold of `best()` if each picture in turn were not there: how far the choice hangs on one of them."""
        others = quotients(self.counts.sum(0) - self.counts)["F1"]                        # [N, 99]
        return THRESHOLDS[_argbest(np.nan_to_num(others, nan=-1.0))]

    def curve(self):
        """(recall [99], precision [99]) of the pooled counts, by falling threshold."""
        return self.pooled["recall"][::-1], self.pooled["precision"][::-1]


def _argbest(values):
    """[N]: column of the largest value of each row [N, 99], among equals the threshold nearest 0.5."""
    nearness = -np.abs(THRESHOLDS - 0.5)
    return np.where(values == values.max(axis=1, keepdims=True), nearness, -np.inf).argmax(axis=1)
