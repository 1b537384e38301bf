"""Why a number is n/a (NaN) or 0, in words: the questions that every thread about "AP is -1" or "all results are 0" ends in."""
import numpy as np

from minidamage.metrics import coco

FEW = 1                                                       # of the protocol's numbers of detections a picture: 1, 10, 100
SUSPICIOUS = 0.02                                             # AP50 below this with detections at hand calls for an explanation


def explain(result):
    """Sentences about a DetectionResult; empty when every number speaks for itself."""
    sentences = []
    for iou_type, scored in result.scored.items():
        what = {"bbox": "boxes", "segm": "masks"}[iou_type]
        truths, detections = scored.truths, scored.detections
        counted = truths["category"][truths["crowd"] == 0]
        if len(counted) == 0:
            sentences.append(f"{what}: every AP is n/a, because no picture has a truth object that counts ({len(truths['image'])} crowd "
                             "regions)")
        elif len(detections["image"]) == 0:
            sentences.append(f"{what}: every AP is 0, because there is not one detection: nothing scored above the model's lowest score, "
                             "or an empty file")
        else:
            sentences += _about_classes(result, scored, what, counted)
            if result.stats[f"{iou_type}/AP50"] < SUSPICIOUS:
                sentences += _about_fit(result, scored, what)
    about = {}                                                # what is said of boxes and of masks alike is said once
    for sentence in sentences:
        what, _, text = sentence.partition(": ")
        about.setdefault(text, []).append(what)
    return [f"{' and '.join(what)}: {text}" for text, what in about.items()]


def _about_classes(result, scored, what, counted):
    names = result.class_names
    without = [n for k, n in enumerate(names) if not (counted == k).any()]
    silent = [n for k, n in enumerate(names) if (counted == k).any() and not (scored.detections["category"] == k).any()]
    out = []
    if without:
        out.append(f"{what}: AP of {_listed(without)} is n/a and left out of the mean, because these pictures have no truth of the class")
    if silent:
        out.append(f"{what}: AP of {_listed(silent)} is 0, because there is no detection of the class at any score")
    for letter, name in (("s", "small (under 32 x 32 pixels)"), ("m", "medium"), ("l", "large (over 96 x 96 pixels)")):
        if np.isnan(result.stats[("bbox/AP" if what == "boxes" else "segm/AP") + letter]):
            out.append(f"{what}: AP{letter} and AR{letter} are n/a, because no truth object is {name}")
    return out


def _about_fit(result, scored, what):
    """Near-zero AP50 with truth and detections there: wrong ids, form, class or scale?"""
    truths, detections = scored.truths, scored.detections
    if len(np.intersect1d(truths["image"], detections["image"])) == 0:
        return [f"{what}: no picture has both truth and detections; the image ids of the two do not belong together"]
    blind = _without_classes(result, truths, detections)
    recall = coco.mean_of_known(blind["recall"][0, :, 0, -1])
    if "box" in truths:
        x0, y0, x1, y1 = detections["box"].T
        corners = {**detections, "box": np.stack([x0, y0, np.maximum(x1 - x0, 0), np.maximum(y1 - y0, 0)], axis=1)}
        if result.of_files and coco.mean_of_known(_without_classes(result, truths, corners)["recall"][0, :, 0, -1]) > max(0.1, 2 * recall):
            return [f"{what}: they fit when read as x1, y1, x2, y2; COCO files hold x, y, width, height"]
        reach_found, reach_truth = (_reach(table["box"]).max() for table in (detections, truths))
        if reach_found < 2 and reach_truth > 20:
            return [f"{what}: detections reach to {reach_found:.4g}, the truth to {reach_truth:.4g} pixels: boxes in another scale "
                    "(normalised to 0..1)"]
        factor = _typical_factor(truths, detections)
        scaled = {**detections, "box": detections["box"] * np.tile(factor, 2)}
        few = _without_classes(result, truths, scaled)["recall"][0, :, 0, FEW]        # of the best detections: of all, some fit by chance
        if coco.mean_of_known(few) > max(0.5, 2 * recall):
            return [f"{what}: they fit when multiplied by {factor[0]:.3g} in x and {factor[1]:.3g} in y: boxes in another scale (of the "
                    "resized picture?)"]
    match = blind["dt_match"][0]
    found = match >= 0
    off = detections["category"][found] - truths["category"][match[found]]
    if recall > 0.1 and (off == 0).mean() < 0.5:
        values, counts = np.unique(off, return_counts=True)
        common = int(values[counts.argmax()])
        by = f", most often off by {common:+d}" if common and counts.max() > 0.7 * len(off) else ""
        return [f"{what}: they lie on the truth (recall {recall:.2f} when classes are ignored) but carry the wrong class in "
                f"{(off != 0).mean():.0%} of the cases{by}; check the label map (0 is background, category ids may have gaps)"]
    ap50 = result.stats[("bbox" if what == "boxes" else "segm") + "/AP50"]
    return [f"{what}: AP50 is {ap50:.3f} with ids and classes in order (recall {recall:.2f} at IoU 0.5 when classes are ignored): "
            "the model has not learned enough yet"]


def _reach(box):
    """[2]: the largest x and y of boxes [N, 4] xywh."""
    return (box[:, :2] + box[:, 2:]).max(0)


def _typical_factor(truths, detections, pictures=200):
    """[2], x and y: the median picture's reach of the truth over that of as many detections, the best ones. Whether it means anything
    shows when the boxes are multiplied by it: an untrained model's, which lie all over the picture, fit no better then."""
    factors = []
    for image in np.intersect1d(truths["image"], detections["image"])[:pictures]:
        truth, rows = truths["box"][truths["image"] == image], np.flatnonzero(detections["image"] == image)
        best = rows[np.argsort(-detections["score"][rows], kind="stable")[:len(truth)]]
        factors.append(_reach(truth) / np.maximum(_reach(detections["box"][best]), 1e-9))
    return np.median(factors, axis=0)


def _without_classes(result, truths, detections):
    """The evaluation with every object in one class."""
    one_class = [{**table, "category": np.zeros_like(table["category"])} for table in (truths, detections)]
    return coco.evaluate(*one_class, len(result.image_ids), 1, result.protocol, keep_matches=True)


def _listed(names, most=8):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
