"""How sure an AP is: its bootstrap interval over pictures, without matching anything again.

Drawing pictures with replacement gives each picture a weight 0, 1, 2, ...; matches lie within pictures, so they stay, and only the
curves are summed again with the weights. (Copies of a picture tie in score; they count at once here.)
"""
import numpy as np

from minidamage.metrics.coco import EPSILON
from minidamage.metrics.statistics import bootstrap, percentiles


def ap_interval(scored, images, categories, protocol, iou_threshold=None, samples=500):
    """The 95 % Interval of AP (iou_threshold None: the mean over the protocol's) or of AP at one threshold; all sizes, most detections.

    Two models scored on the same pictures are drawn alike: the difference of their `samples` is paired.
    """
    curves = [_class_curve(scored, k) for k in range(categories)]
    curves = [c for c in curves if c is not None]
    chosen = np.ones(len(protocol.iou_thresholds), bool) if iou_threshold is None else np.isclose(protocol.iou_thresholds, iou_threshold)
    if not chosen.any():
        raise ValueError(f"ap_interval expects an IoU threshold among {protocol.iou_thresholds}, got {iou_threshold}")
    if not curves:
        return percentiles(float("nan"), np.full(samples, np.nan))
    ap_of = lambda drawn: _ap(curves, np.bincount(drawn, minlength=images), protocol, chosen)
    return bootstrap(np.arange(images), ap_of, samples=samples)


def _class_curve(scored, k):
    """(pictures of the truths [G], pictures of the detections by decreasing score [n], true [T, n], false [T, n]) of one class."""
    truth = scored.truths["image"][(scored.truths["category"] == k) & (scored.truths["crowd"] == 0)]
    if len(truth) == 0:
        return None
    rows = np.flatnonzero((scored.detections["category"] == k) & (scored.arrays["dt_rank"] < scored.limit))
    rows = rows[np.lexsort((scored.arrays["dt_rank"][rows], scored.detections["image"][rows], -scored.detections["score"][rows]))]
    matched, counts = scored.arrays["dt_match"][:, rows] >= 0, scored.arrays["dt_ignore"][:, rows] == 0
    return truth, scored.detections["image"][rows], matched & counts, ~matched & counts


def _ap(curves, weights, protocol, chosen):
    """Mean AP over classes (those with truth in the draw) with a weight [I] for each picture."""
    values = []
    for truth, image, true, false in curves:
        positives = weights[truth].sum()
        if positives == 0:
            continue
        weight = weights[image]
        for t in np.flatnonzero(chosen):
            tp, fp = np.cumsum(weight * true[t]), np.cumsum(weight * false[t])
            at = np.searchsorted(tp / positives, protocol.recall_thresholds, side="left")
            envelope = np.maximum.accumulate((tp / (tp + fp + EPSILON))[::-1])[::-1]
            values.append(np.append(envelope, 0.0)[at].mean())
    return float(np.mean(values)) if values else float("nan")
