"""Results as tables: (caption, columns, rows), printed on the terminal and written into the report alike."""
import math

KINDS = {"bbox": "box", "segm": "mask"}
PIXEL_ROWS = ("IoU", "Dice", "F1", "precision", "recall", "accuracy", "two-class IoU", "two-class Dice")


def coco_tables(result):
    """The 12 COCO numbers for boxes and masks: one table of AP, one of AR."""
    rows = lambda names: [[KINDS[t], *(result.stats[f"{t}/{name}"] for name in names)] for t in result.scored]
    precision, recall = ("AP", "AP50", "AP75", "APs", "APm", "APl"), ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    return [("COCO average precision (mean over IoU .50:.95, 101 points, 100 detections; s < 32², l > 96² pixels)",
             ["", *precision], rows(precision)),
            ("COCO average recall (1, 10, 100 detections a class in a picture; small, medium, large objects)", ["", *recall], rows(recall))]


def interval_table(intervals, pictures):
    """intervals: {"bbox/AP50": Interval, ...} over so many pictures."""
    rows = [[f"{KINDS[name.split('/')[0]]} {name.split('/')[1]}", i.value, i.low, i.high] for name, i in intervals.items()]
    draws = len(next(iter(intervals.values())).samples)
    return f"95 % intervals ({draws} bootstrap draws of the {pictures} pictures)", ["", "value", "low", "high"], rows


def class_table(result):
    """AP and AP50 of each class, COCO and VOC."""
    types = list(result.scored)
    voc = {t: result.voc_ap(t) for t in types}
    columns = ["class", "objects", "detections", *(f"{KINDS[t]} {n}" for t in types for n in ("AP", "AP50", "VOC AP50", "VOC 11-point"))]

    def row(name, numbers):
        return [name, numbers["truths"], numbers["detections"], *(value for t in types for value in (
            numbers[f"{t}/AP"], numbers[f"{t}/AP50"], voc[t]["all-point"][name], voc[t]["11-point"][name]))]
    rows = [row(name, numbers) for name, numbers in result.per_class.items()]
    total = {"truths": sum(r[1] for r in rows), "detections": sum(r[2] for r in rows), **result.stats}
    for t in types:
        voc[t] = {method: {**values, "all": values["mean"]} for method, values in voc[t].items()}
    return "By class (VOC: IoU 0.5, a detection looks at its nearest truth only)", columns, [*rows, row("all", total)]


def operating_table(result, thresholds):
    """What is found at the thresholds in use, and what the best ones would be on these pictures."""
    found, best = result.at_thresholds(thresholds), result.best_f1()
    columns = ["class", "threshold", "true", "false", "missed", "precision", "recall", "F1", "matched IoU", "best F1 here", "at score"]
    counts = ("TP", "FP", "FN", "precision", "recall", "F1", "matched IoU")
    in_use, none = {**{name: 0.5 for name in best}, **thresholds}, {"F1": None, "threshold": None}
    rows = [[name, in_use.get(name), *(numbers[c] for c in counts), best.get(name, none)["F1"], best.get(name, none)["threshold"]]
            for name, numbers in found.items()]
    kind = KINDS["segm" if "segm" in result.scored else "bbox"]
    return f"At the thresholds in use ({kind} IoU 0.5; matched IoU: mean over the true ones)", columns, rows


def pixel_tables(pixels):
    """Damage against background pooled and per picture, and the classes' pooled numbers."""
    whole = [[name, pixels.stats[f"pixel/{name}"], pixels.stats[f"pixel/image/{name}"]] for name in PIXEL_ROWS]
    shown = ("IoU", "Dice", "precision", "recall")
    classes = [[name, *(numbers[f"pixel/{m}"] for m in shown), numbers["pixel/image/IoU"]] for name, numbers in pixels.per_class.items()]
    return [("Pixels, damage against background (per picture: mean over pictures where the quotient exists)",
             ["", "pooled", "per picture"], whole),
            ("Pixels by class", ["class", *(f"{m}, pooled" for m in shown), "IoU per picture"], classes)]


def as_text(caption, columns, rows, digits=3):
    """The table for a terminal: names left, numbers right."""
    cells = [list(columns), *([_cell(value, digits) for value in row] for row in rows)]
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:]))]).rstrip() for line in cells]
    return "\n".join([caption, *(f"  {line}" for line in lines)])


def _cell(value, digits):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
