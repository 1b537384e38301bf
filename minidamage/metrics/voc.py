"""Average precision as Pascal VOC counts it. Source: M. Everingham et al., IJCV 2010; the VOC development kit's VOCevaldet.

The rule, where it differs from COCO's: a detection looks at the truth of *highest* IoU in its picture, taken or not. IoU >= 0.5 and not
taken yet: true positive; taken: false (a second box on one object is an error, even if another object lies near); a crowd ("difficult")
truth: ignored. There is no limit of detections. Boxes are continuous here; the VOC kit counts a box's last pixel in (+ 1).
"""
import numpy as np

from minidamage.metrics.coco import pair_iou, rows_by_group

METHODS = ("all-point", "11-point")


def average_precision(recall, precision, method="all-point"):
    """AP of a curve in order of decreasing score. recall, precision: [n].

    "all-point": area under the precision made non-increasing (VOC 2010 on). "11-point": its mean at recall 0, 0.1, ..., 1 (VOC 2007).
    """
    recall, precision = np.asarray(recall, np.float64), np.asarray(precision, np.float64)
    if method == "11-point":
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in np.arange(11) / 10]))
    if method != "all-point":
        raise ValueError(f"average_precision expects method {' or '.join(METHODS)}, got {method!r}")
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(recall, prepend=0.0) * envelope).sum())


def voc_ap(truths, detections, categories, iou_threshold=0.5):
    """{"all-point": [K], "11-point": [K]}: AP of each category, NaN without truth. Tables as in coco.py, boxes or masks."""
    out = {method: [] for method in METHODS}
    true, false = match(truths, detections, iou_threshold)
    for k in range(categories):
        rows = np.flatnonzero(detections["category"] == k)
        rows = rows[np.lexsort((detections["image"][rows], -detections["score"][rows]))]
        positives = int(((truths["category"] == k) & (truths["crowd"] == 0)).sum())
        tp, fp = np.cumsum(true[rows]), np.cumsum(false[rows])
        for method in METHODS:
            curve = tp / max(positives, 1), tp / np.maximum(tp + fp, 1)
            out[method].append(average_precision(*curve, method) if positives else float("nan"))
    return out


def match(truths, detections, iou_threshold):
    """(true, false) bool [D]; a detection on a crowd truth is neither."""
    true, false = np.zeros(len(detections["image"]), bool), np.ones(len(detections["image"]), bool)
    truth_rows = rows_by_group(truths)
    for group, d in rows_by_group(detections).items():
        g = truth_rows.get(group)
        if g is None:
            continue
        d = d[np.argsort(-detections["score"][d], kind="stable")]
        ious = pair_iou({**truths, "crowd": np.zeros_like(truths["crowd"])}, detections, g, d)
        nearest = ious.argmax(1)
        taken = set()
        for row, truth, overlap in zip(d, nearest, ious[np.arange(len(d)), nearest]):
            if overlap < iou_threshold:
                continue
            crowd = truths["crowd"][g[truth]] != 0
            true[row] = not crowd and truth not in taken
            false[row] = not crowd and truth in taken
            taken.add(truth)
    return true, false
