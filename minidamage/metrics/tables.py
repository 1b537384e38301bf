"""Results as tables: (caption, columns, rows), printed on the terminal and written into the report alike."""
import math

from minidamage.metrics.segmentation import MEANS

KINDS = {"bbox": "box", "segm": "mask"}
PIXEL_ROWS = ("IoU", "Dice", "F1", "precision", "recall", "accuracy", "two-class IoU", "two-class Dice")
MEAN = "mean of those in the truth"                           # over classes


def coco_tables(result):
    """The 12 COCO numbers for boxes and masks: one table of AP, one of AR."""
    rows = lambda names: [[KINDS[t], *(result.stats[f"{t}/{name}"] for name in names)] for t in result.scored]
    precision, recall = ("AP", "AP50", "AP75", "APs", "APm", "APl"), ("AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    return [("COCO average precision (mean over IoU .50:.95, 101 points, 100 detections; s < 32², l > 96² pixels)",
             ["", *precision], rows(precision)),
            ("COCO average recall (1, 10, 100 detections a class in a picture; small, medium, large objects)", ["", *recall], rows(recall))]


def interval_table(intervals, pictures):
    """intervals: {"bbox/AP50": Interval, ...} over so many pictures."""
    rows = [[f"{KINDS.get(kind, kind)} {number}", i.value, i.low, i.high]
            for (kind, _, number), i in ((name.partition("/"), i) for name, i in intervals.items())]
    draws = len(next(iter(intervals.values())).samples)
    return f"95 % intervals ({draws} bootstrap draws of the {pictures} pictures)", ["", "value", "low", "high"], rows


def class_tables(result):
    """AP and AP50 of each class: COCO's in one table, VOC's in another (side by side they are wider than a page)."""
    types, names = list(result.scored), list(result.per_class)
    shown = [f"{t}/{number}" for t in types for number in ("AP", "AP50")]
    rows = [[name, numbers["truths"], numbers["detections"], *(numbers[s] for s in shown)] for name, numbers in result.per_class.items()]
    rows.append(["all", sum(r[1] for r in rows), sum(r[2] for r in rows), *(result.stats[s] for s in shown)])
    coco_columns = ["class", "objects", "detections", *(f"{KINDS[t]} {number}" for t in types for number in ("AP", "AP50"))]

    voc = [result.voc_ap(t)[method] for t in types for method in ("all-point", "11-point")]
    voc_rows = [[name, *(values[name] for values in voc)] for name in names] + [["all", *(values["mean"] for values in voc)]]
    voc_columns = ["class", *(f"{KINDS[t]} {method}" for t in types for method in ("all-point", "11-point"))]
    return [("By class", coco_columns, rows),
            ("By class, AP50 by the rules of Pascal VOC (a detection looks at its nearest truth only)", voc_columns, voc_rows)]


MOST_COLUMNS = 10                                             # classes side by side; more do not fit a page


def rules_table(result):
    """AP of each class in per cent as the detection papers print it, a column a class, the counting rule in the row's name. Boxes."""
    voc, per_class = result.voc_ap("bbox"), result.per_class
    rules = [("COCO, IoU 0.5, 101 points", [numbers["bbox/AP50"] for numbers in per_class.values()], result.stats["bbox/AP50"]),
             *((f"Pascal VOC, IoU 0.5, {method}", [values[name] for name in per_class], values["mean"]) for method, values in voc.items()),
             ("COCO, IoU .50:.95", [numbers["bbox/AP"] for numbers in per_class.values()], result.stats["bbox/AP"])]
    per_cent = lambda value: None if math.isnan(value) else f"{100 * value:.2f}"
    rows = [[rule, *map(per_cent, values), per_cent(mean)] for rule, values, mean in rules]
    return "Box AP by class and rule, per cent", ["rule", *per_class, "mAP"], rows


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
    if len(classes) > 1:
        classes.append([MEAN, *over_classes(pixels, shown), None])
    return [("Pixels, damage against background (per picture: mean of the per-picture scores)",
             ["", "pooled", "per picture"], whole),
            ("Pixels by class", ["class", *(f"{m}, pooled" for m in shown), "IoU per picture"], classes)]


def over_classes(pixels, shown):
    """The last row of a table of classes: those of the shown numbers that have a mean over classes, None for the others."""
    means = {of: pixels.stats[f"pixel/{name}"] for name, of in MEANS.items()}
    return [means.get(name) for name in shown]


POINT_COLUMNS = ("IoU", "Dice", "precision", "recall", "accuracy", "two-class IoU", "two-class Dice")


def segmentation_tables(sizes):
    """sizes: {name: evaluation.segmentation.SizeScores}, evaluated. Pooled, per picture, by class, over all thresholds, any damage."""
    points = [(f"{s.title}, {point}", s.pixel[point]) for s in sizes.values() for point in s.points]
    columns = ["", *POINT_COLUMNS]
    out = [("Pixels, damage against background, pooled over pictures (Dice is F1)", columns,
            [[name, *(r.stats[f"pixel/{m}"] for m in POINT_COLUMNS)] for name, r in points]),
           ("Pixels, mean of the per-picture scores", columns,
            [[name, *(r.stats[f"pixel/image/{m}"] for m in POINT_COLUMNS)] for name, r in points])]
    if len(points[0][1].per_class) > 1:
        shown = ("IoU", "Dice", "precision", "recall")
        rows = [[label, name, *(numbers[f"pixel/{m}"] for m in shown), numbers["pixel/image/IoU"]]
                for name, r in points for label, numbers in r.per_class.items()]
        rows += [[MEAN, name, *over_classes(r, shown), None] for name, r in points]
        out.append(("By class", ["class", "", *(f"{m}, pooled" for m in shown), "IoU per picture"], rows))
    out += _interval_tables(sizes)
    swept = ("ODS F1", "ODS threshold", "OIS F1", "OIS F1, mean over pictures")
    out.append(("Damage over all thresholds (chosen on these very pictures: what one could reach; ODS one for all, OIS one a picture, "
                "which can be less when pooled)",
                ["", *swept], [[s.title, *(s.swept.stats[m] for m in swept)] for s in sizes.values()]))
    any_damage = ("Dice", "IoU", "accuracy")
    out.append(("Dice and IoU of any damage against background, accuracy of pixels of the right class; mean over pictures, empty ones "
                "count 1 (the rule of the car-damage segmentation project)",
                ["", "Dice", "IoU", "accuracy, right class"],
                [[name, *(r.any_damage()[f"any-damage/{m}"] for m in any_damage)] for name, r in points]))
    return out


def _interval_tables(sizes):
    intervals = [(f"{s.title}, {point}, {name.removeprefix('pixel/').replace('image/', 'per picture ')}", interval)
                 for s in sizes.values() for point, found in s.intervals.items() for name, interval in found.items()]
    if not intervals:
        return []
    draws = len(intervals[0][1].samples)
    return [(f"95 % intervals ({draws} bootstrap draws of whole pictures)", ["", "value", "low", "high"],
             [[name, i.value, i.low, i.high] for name, i in intervals])]


def crack_tables(sizes):
    """F1 with a tolerance at the border, and recall by the width of the truth."""
    points = [(f"{s.title}, {point}", s.crack[point]) for s in sizes.values() for point in s.points]
    shown = ("precision", "recall", "F1", "image/F1")
    tolerant = [[name, f"{t} px", *(r.stats[f"tolerance {t} px/{m}"] for m in shown)] for name, r in points for t in r.tolerances]
    out = [("With a tolerance (pixels of the size that is scored, both sides, Euclidean)",
            ["", "tolerance", "precision", "recall", "F1", "F1 per picture"], tolerant)]
    for s in sizes.values():
        results = [s.crack[point] for point in s.points]
        rows = [[name, numbers["pixels"], numbers["share"], *(r.by_width[name]["recall"] for r in results)]
                for name, numbers in results[0].by_width.items()]
        out.append((f"Recall by the local width of the truth, {s.title}", ["width", "damaged pixels", "share",
                                                                          *(f"recall {point}" for point in s.points)], rows))
    return out


def in_short(name, stats, prefix, metrics):
    """"native, at 0.3: IoU 0.512, Dice 0.677": a line for the summary."""
    return f"{name}: " + ", ".join(f"{metric} {_cell(stats[prefix + metric], 3)}" for metric in metrics if prefix + metric in stats)


def as_text(caption, columns, rows, digits=3):
    """The table for a terminal: names left, numbers right."""
    cells = [list(columns), *([_cell(value, digits) for value in row] for row in rows)]
    widths = [max(len(line[c]) for line in cells) for c in range(len(columns))]
    lines = ["  ".join([line[0].ljust(widths[0]), *(text.rjust(w) for text, w in zip(line[1:], widths[1:]))]).rstrip() for line in cells]
    return "\n".join([caption, *(f"  {line}" for line in lines)])


def _cell(value, digits):
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "n/a"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
