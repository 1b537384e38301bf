"""Pixel metrics, each under the name of its rule: pooled over all pictures or averaged over pictures, foreground or two-class.

    evaluator = PixelEvaluator(class_names)
    evaluator.add_label_maps(truth [H, W], prediction [H, W])                    # 0 background, 1..K
    evaluator.add_instances(truth_labels, truth_rles, labels, rles, height, width)   # unions of instance masks, never decoded
    result = evaluator.evaluate()
    result.stats["pixel/IoU"], result.stats["pixel/image/IoU"], result.per_class["dent"]["pixel/IoU"]

With TP, FP, FN, TN pixels of damage (any class) against background:
    IoU TP / (TP + FP + FN)    Dice = F1 2 TP / (2 TP + FP + FN)    precision TP / (TP + FP)    recall TP / (TP + FN)
    accuracy (TP + TN) / all (97 % for a model that finds nothing on a set with 3 % damage: never read it alone)
    two-class IoU, two-class Dice: the mean of damage and background. Pooled counts are summed over pictures first ("pixel/..."), per image
they are divided first and the quotients averaged ("pixel/image/..."). A picture where a quotient is 0 / 0 (no damage there, none
found) is left out of that mean, or counts as `empty`; the pooled numbers do not depend on it. Of damage where nothing is found the
precision is 0 in that mean: left out, a model that is silent on hard pictures would look precise.

All of these are blind to a scratch that is called a dent. With several classes there are also
    mIoU, mDice: the mean over the classes of their pooled IoU and Dice (Context-CrackNet, eq. 25 and 26), without the background, and
    without classes that the truth does not have.
"""
import dataclasses

import numpy as np

from minidamage import masks
from minidamage.distributed import interleave
from minidamage.metrics.statistics import bootstrap

NAMES = ("IoU", "Dice", "F1", "precision", "recall", "accuracy", "two-class IoU", "two-class Dice")
MEANS = {"mIoU": "IoU", "mDice": "Dice"}                      # over classes
TP, FP, FN, TN = range(4)                                     # columns of the counts


def quotients(counts, empty=float("nan")):
    """{name: [...]} of counts [..., 4] (TP, FP, FN, TN); 0 / 0 is `empty`."""
    tp, fp, fn, tn = np.moveaxis(np.asarray(counts, np.float64), -1, 0)

    def ratio(a, b):
        return np.divide(a, b, out=np.full(np.shape(a), float(empty)), where=b > 0)

    iou, dice = ratio(tp, tp + fp + fn), ratio(2 * tp, 2 * tp + fp + fn)
    background_iou, background_dice = ratio(tn, tn + fp + fn), ratio(2 * tn, 2 * tn + fp + fn)
    return {"IoU": iou, "Dice": dice, "F1": dice, "precision": ratio(tp, tp + fp), "recall": ratio(tp, tp + fn),
            "accuracy": ratio(tp + tn, tp + fp + fn + tn), "two-class IoU": (iou + background_iou) / 2,
            "two-class Dice": (dice + background_dice) / 2}


def pooled_intervals(result, draws, names):
    """{"pixel/IoU": Interval} of a PixelResult's pooled numbers, and of several classes "pixel/mIoU": whole pictures drawn again, so that
    pixels of one stay together."""
    pooled = lambda name: lambda rows: float(quotients(rows.sum(0))[name])
    found = {f"pixel/{name}": bootstrap(result.counts[:, 0], pooled(name), samples=draws) for name in names}
    if "pixel/mIoU" in result.stats:
        found["pixel/mIoU"] = bootstrap(result.counts, mean_over_classes, samples=draws)
    return found


def of_pictures(counts, empty=float("nan")):
    """`quotients` of pictures, each for itself; precision 0 where there is damage and nothing is found."""
    images = quotients(counts, empty)
    silent = (counts[..., TP] + counts[..., FP] == 0) & (counts[..., FN] > 0)
    return {**images, "precision": np.where(silent, 0.0, images["precision"])}


def mean_over_classes(counts, name="mIoU"):
    """One of MEANS of counts int64 [N, K + 1, 4], row 0 of K + 1 damage as a whole; NaN without any damage in the truth."""
    pooled = counts.sum(0)[1:]
    return _mean(quotients(pooled[pooled[:, TP] + pooled[:, FN] > 0])[MEANS[name]])


def ignored(mask, shape):
    """bool [H, W] of a mask of pixels that count nowhere, of any kind (array or tensor); ValueError where it has another size."""
    mask = np.asarray(mask.detach().cpu() if hasattr(mask, "detach") else mask).astype(bool)
    if mask.shape != tuple(shape):
        raise ValueError(f"ignore: expected a mask of the maps' size {list(shape)}, got {list(mask.shape)}")
    return mask


class PixelEvaluator:
    """Sums pixel counts of pictures for damage as a whole and for each class. class_names: K names, label k is class_names[k - 1].

    empty: what a 0 / 0 of one picture counts as in the means over pictures: NaN (left out, the default) or, as some code does it, 1; the
    precision of damage of which nothing is found is 0 with either.
    """

    def __init__(self, class_names, empty=float("nan")):
        self.class_names, self.empty = tuple(class_names), empty
        self._counts = []                                     # one int64 [K + 1, 4] a picture; row 0: damage as a whole

    def add_label_maps(self, truth, prediction, ignore=None):
        """truth, prediction: [H, W] integers 0..K. ignore: [H, W] bool, pixels that count nowhere."""
        truth, prediction = np.asarray(truth), np.asarray(prediction)
        if truth.shape != prediction.shape or truth.ndim != 2:
            raise ValueError(f"add_label_maps expects two maps [H, W] of one size, got {list(truth.shape)} and {list(prediction.shape)}; "
                             "resize the prediction to the truth, not the truth to the prediction")
        if ignore is not None:
            judged = ~ignored(ignore, truth.shape)
            truth, prediction = truth[judged], prediction[judged]
        K = len(self.class_names)
        largest = max(truth.max(initial=0), prediction.max(initial=0))
        if largest > K or min(truth.min(initial=0), prediction.min(initial=0)) < 0:
            raise ValueError(f"add_label_maps expects labels 0..{K} (0 background, {', '.join(self.class_names)}), got up to {largest}; is "
                             "the map a picture with 0 and 255?")
        confusion = np.bincount(truth.ravel().astype(np.int64) * (K + 1) + prediction.ravel(), minlength=(K + 1) ** 2).reshape(K + 1, K + 1)
        same, in_truth, in_prediction, total = np.diag(confusion), confusion.sum(1), confusion.sum(0), confusion.sum()
        counts = np.stack([same, in_prediction - same, in_truth - same, total - in_truth - in_prediction + same], axis=1)    # [K + 1, 4]
        tn = confusion[0, 0]                                  # as a whole: damage of one class taken for another is damage found
        fp, fn = in_truth[0] - tn, in_prediction[0] - tn
        counts[0] = total - tn - fp - fn, fp, fn, tn
        self._counts.append(counts.astype(np.int64))

    def add_instances(self, truth_labels, truth_rles, labels, rles, height, width, ignore=()):
        """The union of the instance masks of each class, and of all. labels: 1..K; rles: RLE dicts of size [height, width]; ignore: RLE
        dicts too (crowd regions), whose pixels count nowhere.

        Give the detections that count (a score threshold is the caller's choice). Instances of two classes may overlap: such a
        pixel belongs to both.
        """
        truth_labels, labels = np.asarray(truth_labels, np.int64), np.asarray(labels, np.int64)
        truth_rles, rles, ignore, height, width = list(truth_rles), list(rles), list(ignore), int(height), int(width)
        for name, values, rles_of in (("truth", truth_labels, truth_rles), ("detections", labels, rles)):
            if len(values) != len(rles_of) or not ((values >= 1) & (values <= len(self.class_names))).all():
                raise ValueError(f"add_instances expects a label 1..{len(self.class_names)} and an RLE for each object, got of the {name} "
                                 f"{len(rles_of)} RLEs and the labels {sorted(set(values.tolist()))[:10]} ({len(values)})")
        sizes = {tuple(rle["size"]) for rle in (*truth_rles, *rles, *ignore)} - {(height, width)}
        if sizes:
            raise ValueError(f"add_instances expects RLEs of the picture's size {[height, width]}, got {sorted(map(list, sizes))[:3]}")
        counts = np.zeros((len(self.class_names) + 1, 4), np.int64)
        ignore = masks.merge(ignore) if ignore else None
        for k in range(len(self.class_names) + 1):
            truth = [r for r, label in zip(truth_rles, truth_labels) if k in (0, label)]
            found = [r for r, label in zip(rles, labels) if k in (0, label)]
            counts[k] = _union_counts(truth, found, ignore, height * width)
        self._counts.append(counts)

    @classmethod
    def joined(cls, evaluators):
        """One of several, each with every n-th picture (distributed.shard), in the pictures' order. The first one is made it."""
        evaluators[0]._counts = interleave([evaluator._counts for evaluator in evaluators])
        return evaluators[0]

    def evaluate(self):
        """Returns the PixelResult of all pictures so far."""
        counts = np.stack(self._counts) if self._counts else np.zeros((0, len(self.class_names) + 1, 4), np.int64)
        pooled = {name: values for name, values in quotients(counts.sum(0)).items()}
        images = of_pictures(counts, self.empty)              # name: [N, K + 1]
        stats = [{**{f"pixel/{name}": float(pooled[name][k]) for name in NAMES},
                  **{f"pixel/image/{name}": _mean(images[name][:, k]) for name in NAMES}} for k in range(len(self.class_names) + 1)]
        if len(self.class_names) > 1:
            stats[0] |= {f"pixel/{name}": mean_over_classes(counts, name) for name in MEANS}
        return PixelResult(stats[0], dict(zip(self.class_names, stats[1:])), counts)


@dataclasses.dataclass
class PixelResult:
    """stats: damage as a whole; per_class: {name: the same numbers}; counts int64 [N, K + 1, 4]: TP, FP, FN, TN a picture, row 0 whole."""

    stats: dict
    per_class: dict
    counts: np.ndarray

    def per_image(self, name="IoU", k=0, empty=float("nan")):
        """[N]: one metric of each picture, for intervals and paired tests (statistics.py). k: 0 as a whole, else the label."""
        return of_pictures(self.counts[:, k], empty)[name]

    def measured(self):
        """{name: {"precision", "recall"}} of its pixels, pooled."""
        return {name: {key: numbers[f"pixel/{key}"] for key in ("precision", "recall")} for name, numbers in self.per_class.items()}

    def any_damage(self):
        """{"any-damage/IoU", "any-damage/Dice", "any-damage/accuracy"} by the rule of the car-damage segmentation project's code.

        IoU and Dice of damage of any class against background, each picture for itself, then the mean; a picture where neither the truth
        nor the prediction has damage counts as 1 (its smoothed quotient). A scratch taken for a dent is right there, and an empty
        picture lifts the mean: read it beside "pixel/IoU", never instead. Accuracy is the share of pixels with the right class.
        Differs from the project: it averages batches, we average pictures, so that the batch size changes nothing.
        """
        images = quotients(self.counts[:, 0], empty=1.0)
        right = self.counts[:, 0, TN] + self.counts[:, 1:, TP].sum(1)
        return {"any-damage/IoU": _mean(images["IoU"]), "any-damage/Dice": _mean(images["Dice"]),
                "any-damage/accuracy": _mean(right / np.maximum(self.counts[:, 0].sum(-1), 1))}


def _union_counts(truth, found, ignore, total):
    truth = masks.merge(truth) if truth else None
    found = masks.merge(found) if found else None

    def area(*rles):
        """Of what all of them share, outside `ignore`."""
        if not all(rles):
            return 0
        inside = masks.area(masks.merge([*rles, ignore], intersect=True)) if ignore else 0
        return masks.area(masks.merge(list(rles), intersect=True)) - inside

    in_truth, in_found, both = area(truth), area(found), area(truth, found)
    total -= masks.area(ignore) if ignore else 0
    return both, in_found - both, in_truth - both, total - in_truth - in_found + both


def _mean(values):
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
