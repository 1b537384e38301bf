"""What a model does at one score threshold: its best F1, its true and false findings, its alarms on undamaged pictures.

Matches are COCO's at IoU 0.5 (the first IoU threshold; at most 100 detections of a class in a picture). They are found once, without a
threshold, and hold at every one: detections choose by decreasing score, so those below a threshold never took a truth from those above.
"""
import numpy as np

AT_IOU = 0                                                    # index of IoU 0.5 in the protocol's thresholds


def best_f1(scored, categories):
    """A list of K dicts threshold, F1, precision, recall: the lowest score to keep so that F1 = 2 TP / (2 TP + FP + FN) is best.

    The best score itself is kept (>=). NaN everywhere for a class without truth; threshold NaN and F1 0 without a true positive.
    """
    out = []
    truth_counts = np.bincount(scored.truths["category"][scored.truths["crowd"] == 0], minlength=categories)
    used = counted(scored)
    for k in range(categories):
        rows = np.flatnonzero(used & (scored.detections["category"] == k))
        rows = rows[np.argsort(-scored.detections["score"][rows], kind="stable")]
        positives, nan = int(truth_counts[k]), float("nan")
        true = np.cumsum(scored.arrays["dt_match"][AT_IOU, rows] >= 0)
        if positives == 0 or len(rows) == 0 or true[-1] == 0:
            out.append({"threshold": nan, "F1": 0.0 if positives else nan, "precision": nan, "recall": 0.0 if positives else nan})
            continue
        scores = scored.detections["score"][rows]
        f1 = 2 * true / (np.arange(1, len(rows) + 1) + positives)                            # 2 TP + FP + FN = detections + truths
        f1[:-1][scores[:-1] == scores[1:]] = -1                                              # equal scores are kept or dropped together
        best = int(np.argmax(f1))                                                            # the first: the highest of equally good scores
        out.append({"threshold": float(scores[best]), "F1": float(f1[best]), "precision": float(true[best] / (best + 1)),
                    "recall": float(true[best] / positives)})
    return out


def at_thresholds(scored, thresholds):
    """K + 1 dicts (classes, then all together): TP, FP, FN, precision, recall, F1, matched IoU of detections at or above thresholds [K]."""
    categories = len(thresholds)
    kept = counted(scored) & found(scored, thresholds)
    true = kept & (scored.arrays["dt_match"][AT_IOU] >= 0)
    per_class = lambda chosen, weights=None: np.bincount(scored.detections["category"][chosen], weights, minlength=categories)
    tp, findings = per_class(true), per_class(kept)
    iou = per_class(true, scored.arrays["dt_iou"][AT_IOU, true])
    truth = np.bincount(scored.truths["category"][scored.truths["crowd"] == 0], minlength=categories)
    rows = [_numbers(*row) for row in zip(tp, findings, truth, iou)]
    return rows + [_numbers(tp.sum(), findings.sum(), truth.sum(), iou.sum())]


def _numbers(tp, findings, truth, iou):
    ratio = lambda a, b: float(a / b) if b else float("nan")
    return {"TP": int(tp), "FP": int(findings - tp), "FN": int(truth - tp), "precision": ratio(tp, findings), "recall": ratio(tp, truth),
            "F1": ratio(2 * tp, findings + truth), "matched IoU": ratio(iou, tp)}


def errors(scored, thresholds):
    """(false [D], missed [G]), bool: which detections are findings at the thresholds [K] and fit no truth, which truths none fits."""
    kept = counted(scored) & found(scored, thresholds)
    match = scored.arrays["dt_match"][AT_IOU]
    missed = scored.truths["crowd"] == 0
    missed[match[kept & (match >= 0)]] = False
    return kept & (match < 0), missed


def errors_by_picture(scored, images, thresholds):
    """[I, 2]: false findings and missed truths of each picture at the thresholds [K]."""
    false, missed = errors(scored, thresholds)
    return np.stack([np.bincount(table["image"][wrong], minlength=images)
                     for table, wrong in ((scored.detections, false), (scored.truths, missed))], axis=1)


def errors_in_picture(scored, image, thresholds):
    """(false, missed) of one picture: bool for each of its findings, and for each of its truths, in the order that they were added in."""
    false, missed = errors(scored, thresholds)
    return false[(scored.detections["image"] == image) & found(scored, thresholds)], missed[scored.truths["image"] == image]


def found(scored, thresholds):
    """[D] bool: of a score from its class's threshold on."""
    return scored.detections["score"] >= thresholds[scored.detections["category"]]


def false_alarms(scored, images, thresholds):
    """Findings (score >= their class's threshold [K]) on pictures without any truth, crowd regions included in truth."""
    undamaged = np.ones(images, bool)
    undamaged[scored.truths["image"]] = False
    findings = found(scored, thresholds)
    per_picture = np.bincount(scored.detections["image"][findings], minlength=images)[undamaged]
    pictures = int(undamaged.sum())
    return {"pictures": pictures, "with findings": float((per_picture > 0).mean()) if pictures else float("nan"),
            "findings": float(per_picture.mean()) if pictures else float("nan")}


def counted(scored):
    """[D] bool: looked at by COCO (the 100 best of a class in a picture) and not swallowed by a crowd region."""
    return (scored.arrays["dt_rank"] < scored.limit) & (scored.arrays["dt_ignore"][AT_IOU] == 0)
