"""Metrics for thin damage: F1 with a tolerance at the border, and recall by the width of the crack.

    evaluator = CrackEvaluator()
    evaluator.add(truth [H, W], prediction [H, W])
    result = evaluator.evaluate()
    result.stats["tolerance 2 px/F1"], result.by_width["tiny, under 1 mm"]["recall"]

Tolerance t: a predicted pixel is right where damage lies within t pixels of it, a damaged pixel is found where a prediction lies within t
pixels (Euclidean, between centres, on both sides); t = 0 are the plain numbers. Annotators differ by a pixel or two along a crack,
and on a crack of four pixels that alone costs half the IoU. DeepCrack and CrackForest report 2 and 5 pixels; a bigger picture of
the same crack needs a bigger t, so the size that was scored belongs beside the number.

Width: each damaged pixel has the local width of the truth at the nearest pixel of its skeleton (skeleton.py, side branches dropped).
"""
import dataclasses

import numpy as np

from minidamage import skeleton
from minidamage.distributed import interleave
from minidamage.metrics.segmentation import ignored

TOLERANCES = (0, 2, 5)                                        # pixels
PIXEL_EDGES = (3.0, 6.0, 12.0, 24.0)                          # bounds between the classes of width, pixels
MM_EDGES, MM_NAMES = (1.0, 3.0), ("tiny, under 1 mm", "small, 1 to 3 mm", "wide, 3 mm and more")      # Context-CrackNet, section 1
_, PREDICTED, _, DAMAGED = range(4)                           # columns of the tolerance's counts, see CrackResult


class CrackEvaluator:
    """Sums over pictures, damage of any class against background. mm_per_px: millimetres a pixel of the maps; classes of width
    are then those of the crack paper, else (None) in pixels."""

    def __init__(self, tolerances=TOLERANCES, mm_per_px=None):
        if mm_per_px is not None and not 0 < mm_per_px < float("inf"):
            raise ValueError(f"mm_per_px: expected millimetres a pixel above 0, got {mm_per_px}")
        if any(t < 0 for t in tolerances):
            raise ValueError(f"tolerances: expected distances of 0 or more pixels, got {tolerances}")
        self.tolerances, self.mm_per_px = tuple(tolerances), mm_per_px
        self.edges = np.asarray(PIXEL_EDGES if mm_per_px is None else MM_EDGES)
        self._tolerant, self._widths = [], []

    def add(self, truth, prediction, ignore=None, widths=None):
        """truth, prediction: [H, W], non-zero is damage; ignore: [H, W] bool, pixels that are neither judged nor near to anything.

        widths: `pixel_widths` of the judged truth, where the caller has them already (several predictions of one picture).
        """
        truth, prediction = np.asarray(truth) != 0, np.asarray(prediction) != 0
        if truth.shape != prediction.shape or truth.ndim != 2:
            raise ValueError("CrackEvaluator.add expects two maps [H, W] of one size, got "
                             f"{list(truth.shape)} and {list(prediction.shape)}")
        if ignore is not None:
            judged = ~ignored(ignore, truth.shape)
            truth, prediction = truth & judged, prediction & judged
        to_truth, to_prediction = skeleton.squared_distances(truth)[prediction], skeleton.squared_distances(prediction)[truth]
        self._tolerant.append([[(to_truth <= t * t).sum(), len(to_truth), (to_prediction <= t * t).sum(), len(to_prediction)]
                               for t in self.tolerances])
        self._widths.append(self._by_width(truth, prediction, widths))

    def _by_width(self, truth, prediction, widths):
        """int64 [bins, 2]: damaged pixels of each class of width, found and all."""
        counts = np.zeros((len(self.edges) + 1, 2), np.int64)
        if truth.any():
            widths = pixel_widths(truth) if widths is None else widths
            bins = np.searchsorted(self.edges, widths * (self.mm_per_px or 1), side="right")
            counts[:, 0] = np.bincount(bins, prediction[truth], len(counts))
            counts[:, 1] = np.bincount(bins, minlength=len(counts))
        return counts

    @classmethod
    def joined(cls, evaluators):
        """One of several, each with every n-th picture (distributed.shard), in the pictures' order. The first one is made it."""
        for field in ("_tolerant", "_widths"):
            setattr(evaluators[0], field, interleave([getattr(evaluator, field) for evaluator in evaluators]))
        return evaluators[0]

    def evaluate(self):
        """Returns the CrackResult of all pictures so far."""
        tolerant = np.asarray(self._tolerant, np.int64).reshape(-1, len(self.tolerances), 4)
        widths = np.asarray(self._widths, np.int64).reshape(-1, len(self.edges) + 1, 2)
        pooled, images = tolerant_scores(tolerant.sum(0)), tolerant_scores(tolerant)
        silent = (tolerant[..., PREDICTED] == 0) & (tolerant[..., DAMAGED] > 0)
        images["precision"][silent] = 0                       # as in segmentation.py
        stats = {}
        for i, t in enumerate(self.tolerances):
            stats |= {f"tolerance {t} px/{name}": float(values[i]) for name, values in pooled.items()}
            stats |= {f"tolerance {t} px/image/{name}": _mean(values[:, i]) for name, values in images.items()}
        found, damaged = widths.sum(0).T
        shares = damaged / max(damaged.sum(), 1)
        by_width = {name: {"recall": float(found[k] / damaged[k]) if damaged[k] else float("nan"), "pixels": int(damaged[k]),
                           "share": float(shares[k])} for k, name in enumerate(self.width_names())}
        return CrackResult(stats, by_width, tolerant, self.tolerances)

    def width_names(self):
        if self.mm_per_px is not None:
            return MM_NAMES
        texts = [f"{edge:g}" for edge in self.edges]
        return (f"under {texts[0]} px", *(f"{a} to {b} px" for a, b in zip(texts, texts[1:])), f"{texts[-1]} px and more")


@dataclasses.dataclass
class CrackResult:
    """stats: {"tolerance 2 px/F1", "tolerance 2 px/image/F1", ... precision, recall}; by_width: {name: {"recall", "pixels", "share"}}.

    counts: int64 [N, T, 4], pixels of each picture at each tolerance: predicted near damage, predicted, damaged near a prediction, damaged.
    """

    stats: dict
    by_width: dict
    counts: np.ndarray
    tolerances: tuple


def tolerant_scores(counts):
    """{"precision", "recall", "F1"} of counts [..., 4]; NaN where a quotient is 0 / 0. F1 is 0 where only one side has pixels."""
    found, predicted, reached, damaged = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    ratio = lambda a, b: np.divide(a, b, out=np.full(np.shape(a), np.nan), where=b > 0)
    precision, recall = ratio(found, predicted), ratio(reached, damaged)
    p, r = np.nan_to_num(precision), np.nan_to_num(recall)
    f1 = np.where(predicted + damaged > 0, np.divide(2 * p * r, p + r, out=np.zeros(np.shape(p)), where=p + r > 0), np.nan)
    return {"precision": precision, "recall": recall, "F1": f1}


def pixel_widths(mask):
    """float64 [n]: for each set pixel of mask [H, W], in raster order, the mask's local width at the nearest skeleton pixel, in pixels."""
    line = skeleton.thin(mask)
    line = skeleton.without_spurs(line, skeleton.local_widths(mask, line))
    at_pixel = np.zeros(mask.size)
    at_pixel[np.flatnonzero(line)] = skeleton.local_widths(mask, line)
    return at_pixel[skeleton.nearest_pixels(line)[mask]]


def _mean(values):
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
