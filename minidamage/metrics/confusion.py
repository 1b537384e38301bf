"""The confusion matrix of a detector at the score thresholds in use: what each object was taken for, and what each finding was.

Two steps, so that the diagonal is what the other tables call true: first COCO's matches at IoU 0.5 within the classes; then, among
the objects and findings that are left, pairs of two classes, by falling IoU down to 0.5.
Every object is counted once, in its row, and every finding once, in its column: an object that no finding covers is missed, a finding
that covers no free object is a false alarm. Crowd regions, and findings that they swallow, are in neither.
"""
import numpy as np

from minidamage.metrics.coco import pair_iou
from minidamage.metrics.operating import AT_IOU, counted

IOU = 0.5


def confusion_matrix(scored, thresholds):
    """int64 [K + 1, K + 1]: rows are the objects' classes and last "nothing there", columns the findings' classes and last "missed".

    scored: a metrics.detection.Scored; thresholds: [K], the lowest score of a finding. The corner, nothing taken for nothing, is 0.
    """
    categories = len(thresholds)
    truths, detections, match = scored.truths, scored.detections, scored.arrays["dt_match"][AT_IOU]
    kept = counted(scored) & (detections["score"] >= thresholds[detections["category"]])
    matrix = np.zeros((categories + 1, categories + 1), np.int64)
    true = kept & (match >= 0)
    np.add.at(matrix, (truths["category"][match[true]], detections["category"][true]), 1)
    free = truths["crowd"] == 0
    free[match[true]] = False
    rest = kept & ~true
    for g, d in _left_over(truths, detections, free, rest):
        matrix[truths["category"][g], detections["category"][d]] += 1
        free[g] = rest[d] = False
    np.add.at(matrix, (truths["category"][free], categories), 1)
    np.add.at(matrix, (categories, detections["category"][rest]), 1)
    return matrix


def _left_over(truths, detections, free, rest):
    """Pairs (truth row, detection row) of one picture, each row once, best overlap first."""
    pairs = []
    for image in np.intersect1d(truths["image"][free], detections["image"][rest]):
        g, d = np.flatnonzero(free & (truths["image"] == image)), np.flatnonzero(rest & (detections["image"] == image))
        overlaps = pair_iou(truths, detections, g, d)                                        # [d, g]
        while overlaps.size and overlaps.max() >= IOU:
            row, column = np.unravel_index(overlaps.argmax(), overlaps.shape)
            pairs.append((g[column], d[row]))
            overlaps[row], overlaps[:, column] = -1.0, -1.0
    return pairs


def confusion_table(matrix, class_names):
    """The matrix as a table for terminal and report: an object's class a row, with how many there are."""
    rows = [[name, *matrix[k].tolist(), int(matrix[k].sum())] for k, name in enumerate((*class_names, "false alarm"))]
    rows[-1][-2] = None                                                  # nothing taken for nothing is not counted
    rows.append(["all", *matrix.sum(0).tolist(), int(matrix.sum())])
    return ("Confusion at the thresholds in use (rows: what is there, columns: what it was taken for; IoU 0.5, each object and each "
            "finding counted once)", ["", *class_names, "missed", "all"], rows)
