"""COCO's detection protocol on flat tables: matching, precision over recall, the 12 numbers. Equal to pycocotools to the last digit.

Read `match_reference` and `accumulate_reference` to learn the rule; `csrc/coco_match.h` is their C++ twin and runs when it is built.

A *table* is a dict of arrays, one row an object, in file order (ties in score are broken by it):
    image     int32 [n]        position of the picture among the sorted image ids
    category  int32 [n]        0 .. K - 1
    score     float64 [n]      detections only
    crowd     uint8 [n]        truths only: a crowd region neither counts as missed nor makes a detection false
    area      float64 [n]      pixels; decides small, medium, large. None for detections with masks: the mask's own
    box       float64 [n, 4]   x, y, width, height; or, for masks,
    counts    list of bytes [n] and size int32 [n, 2]: compressed RLE
Source: T.-Y. Lin et al., Microsoft COCO, 2014; the COCO API's COCOeval.
Differs from pycocotools: an annotation with id 0 can be matched (there, its detection counts as false).
"""
import dataclasses

import numpy as np

from minidamage import masks

EPSILON = np.spacing(1)                                       # keeps 0 / 0 from happening where nothing counts yet


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is varied; the defaults are COCO's and the names of the 12 numbers hold for them only."""

    iou_thresholds: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())           # T
    recall_thresholds: tuple[float, ...] = tuple(np.linspace(0.0, 1.0, 101).tolist())        # R
    area_ranges: tuple[tuple[float, float], ...] = ((0, 1e10), (0, 32 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e10))  # A: all, s, m, l
    max_dets: tuple[int, ...] = (1, 10, 100)                                                 # M, per picture and category


COCO = Protocol()

# name: (precision or recall, IoU threshold or all, area range, limit of detections), in pycocotools' order
TWELVE = {"AP": ("precision", None, 0, 2), "AP50": ("precision", 0, 0, 2), "AP75": ("precision", 5, 0, 2),
          "APs": ("precision", None, 1, 2), "APm": ("precision", None, 2, 2), "APl": ("precision", None, 3, 2),
          "AR1": ("recall", None, 0, 0), "AR10": ("recall", None, 0, 1), "AR100": ("recall", None, 0, 2),
          "ARs": ("recall", None, 1, 2), "ARm": ("recall", None, 2, 2), "ARl": ("recall", None, 3, 2)}


def evaluate(truths, detections, images, categories, protocol=COCO, keep_matches=False):
    """Returns a dict of arrays: what COCOeval.evaluate() and .accumulate() give.

    truths, detections: tables as above; images, categories: how many there are.
    precision, scores float64 [T, R, K, A, M] and recall [T, K, A, M]; -1 where a category has no truth in the area range.
    dt_rank int32 [D]: place by score within picture and category; detections from max_dets[-1] on are not looked at.
    With keep_matches, for the first area range: dt_match int32 [T, D] (row of the matched truth, -1 none), dt_ignore uint8 [T, D]
    (matched to a crowd, or unmatched and out of the range), dt_iou float64 [T, D] (IoU with the matched truth).
    Raises ValueError where a detection's mask has another size than its picture's truth.
    """
    native = masks.native_module()
    if native is not None:
        return native.evaluate(truths, detections, images, categories, [side for pair in protocol.area_ranges for side in pair],
                               list(protocol.iou_thresholds), list(protocol.recall_thresholds), list(protocol.max_dets), keep_matches)
    outcome = match_reference(truths, detections, protocol)
    result = accumulate_reference(truths, detections, categories, protocol, outcome)
    return result if keep_matches else {name: result[name] for name in ("precision", "recall", "scores", "dt_rank")}


def summarize(result, prefix=""):
    """{"AP": ..., "AP50": ..., ...}: the 12 numbers; NaN where pycocotools prints -1 (no truth)."""
    return {prefix + name: mean_of_known(result[kind][..., area, limit] if iou is None else result[kind][iou, ..., area, limit])
            for name, (kind, iou, area, limit) in TWELVE.items()}


def mean_of_known(values):
    """Mean over the entries that are not -1, as pycocotools; NaN if there is none."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else float("nan")


def box_iou_xywh(dt, gt, crowd):
    """IoU [D, G] of boxes x, y, width, height (float64 [D, 4], [G, 4]); crowd [G]: over the detection's own area."""
    left_top = np.maximum(dt[:, None, :2], gt[None, :, :2])
    right_bottom = np.minimum(dt[:, None, 2:] + dt[:, None, :2], gt[None, :, 2:] + gt[None, :, :2])
    width, height = np.moveaxis(right_bottom - left_top, 2, 0)
    both = np.where((width > 0) & (height > 0), width * height, 0.0)
    dt_area, gt_area = dt[:, 2] * dt[:, 3], gt[:, 2] * gt[:, 3]
    either = np.where(np.asarray(crowd, bool)[None], dt_area[:, None], dt_area[:, None] + gt_area[None] - both)
    return np.divide(both, either, out=np.zeros_like(both), where=both > 0)


def pair_iou(truths, detections, g, d):
    """IoU [len(d), len(g)] of rows d of the detections with rows g of the truths, boxes or masks, whichever the tables hold."""
    crowd = truths["crowd"][g]
    if "box" in truths:
        return box_iou_xywh(detections["box"][d], truths["box"][g], crowd)
    return masks.iou(_rles(detections, d), _rles(truths, g), crowd)


def _rles(table, rows):
    return [{"size": table["size"][i].tolist(), "counts": table["counts"][i]} for i in rows]


def rows_by_group(table):
    """{(category, image): rows in file order}."""
    order = np.lexsort((table["image"], table["category"]))
    keys = np.stack([table["category"][order], table["image"][order]], axis=1)
    cuts = np.flatnonzero((np.diff(keys, axis=0) != 0).any(1)) + 1
    return {tuple(keys[rows[0]].tolist()): order[rows] for rows in np.split(np.arange(len(order)), cuts) if len(rows)}


# ---- the reference -----------------------------------------------------------------------------------------------------------------

def match_reference(truths, detections, protocol):
    """matched, ignored bool [A, T, D], match int [T, D], iou [T, D], rank [D]: the outcome of every detection.

    Within picture and category, detections choose in order of their score. A detection takes the free truth of highest IoU, at least the
    threshold; a truth that counts is preferred to an ignored one (crowd, or out of the area range) whatever the IoU; at equal IoU
    the later truth is taken; a crowd is never used up.
    """
    A, T, D = len(protocol.area_ranges), len(protocol.iou_thresholds), len(detections["image"])
    outcome = {"matched": np.zeros((A, T, D), bool), "ignored": np.zeros((A, T, D), bool), "rank": np.zeros(D, np.int32),
               "match": np.full((T, D), -1, np.int32), "iou": np.zeros((T, D))}
    truth_rows = rows_by_group(truths)
    for group, d in rows_by_group(detections).items():
        d = d[np.argsort(-detections["score"][d], kind="stable")]
        outcome["rank"][d] = np.arange(len(d))
        d, g = d[:protocol.max_dets[-1]], truth_rows.get(group, np.zeros(0, np.int64))
        ious = pair_iou(truths, detections, g, d)                                            # [d, g]
        areas = detections["area"][d] if detections.get("area") is not None else masks.area(_rles(detections, d))
        for a, (low, high) in enumerate(protocol.area_ranges):
            ignored_truth = (truths["crowd"][g] != 0) | (truths["area"][g] < low) | (truths["area"][g] > high)
            for t, threshold in enumerate(protocol.iou_thresholds):
                _match_group(ious, ignored_truth, truths["crowd"][g] != 0, min(threshold, 1 - 1e-10), d, g, a, t, outcome)
            outside = (areas < low) | (areas > high)
            outcome["ignored"][a][:, d] |= ~outcome["matched"][a][:, d] & outside
    return outcome


def _match_group(ious, ignored_truth, crowd, threshold, d, g, a, t, outcome):
    free = np.ones(len(g), bool)
    for i, row in enumerate(d):
        for ignored in (False, True):
            candidates = np.flatnonzero((free | crowd) & (ignored_truth == ignored) & (ious[i] >= threshold))
            if len(candidates):
                best = candidates[len(candidates) - 1 - np.argmax(ious[i, candidates][::-1])]             # the last of the highest
                free[best] = False
                outcome["matched"][a, t, row], outcome["ignored"][a, t, row] = True, ignored
                if a == 0:
                    outcome["match"][t, row], outcome["iou"][t, row] = g[best], ious[i, best]
                break


def accumulate_reference(truths, detections, categories, protocol, outcome):
    """Precision at the recall thresholds. Detections of a category are lined up over all pictures by decreasing score, ties in the
    pictures' order; precision is made non-increasing from the right (its best value at this recall or more)."""
    T, R, K = len(protocol.iou_thresholds), len(protocol.recall_thresholds), categories
    A, M = len(protocol.area_ranges), len(protocol.max_dets)
    precision, recall, scores = -np.ones((T, R, K, A, M)), -np.ones((T, K, A, M)), -np.ones((T, R, K, A, M))
    in_order = np.lexsort((outcome["rank"], detections["image"]))
    for k in range(K):
        rows = in_order[detections["category"][in_order] == k]
        rows = rows[np.argsort(-detections["score"][rows], kind="stable")]
        truth = truths["category"] == k
        for a, (low, high) in enumerate(protocol.area_ranges):
            area = truths["area"][truth]
            positives = int(((truths["crowd"][truth] == 0) & (area >= low) & (area <= high)).sum())
            if positives == 0:
                continue
            for m, limit in enumerate(protocol.max_dets):
                kept = rows[outcome["rank"][rows] < limit]
                counts = ~outcome["ignored"][a][:, kept]                                     # [T, n]
                tp = np.cumsum(counts & outcome["matched"][a][:, kept], axis=1, dtype=np.float64)
                fp = np.cumsum(counts & ~outcome["matched"][a][:, kept], axis=1, dtype=np.float64)
                for t in range(T):
                    reached = tp[t] / positives
                    envelope = np.maximum.accumulate((tp[t] / (fp[t] + tp[t] + EPSILON))[::-1])[::-1]
                    at = np.searchsorted(reached, protocol.recall_thresholds, side="left")
                    found = at < len(kept)
                    recall[t, k, a, m] = reached[-1] if len(kept) else 0
                    precision[t, :, k, a, m] = scores[t, :, k, a, m] = 0
                    precision[t, found, k, a, m] = envelope[at[found]]
                    scores[t, found, k, a, m] = detections["score"][kept][at[found]]
    return {"precision": precision, "recall": recall, "scores": scores, "dt_rank": outcome["rank"], "dt_match": outcome["match"],
            "dt_ignore": outcome["ignored"][0].astype(np.uint8), "dt_iou": outcome["iou"]}
