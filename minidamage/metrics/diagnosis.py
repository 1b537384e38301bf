"""Why a number is NaN or 0, in words: the questions that every thread about "AP is -1" or "all results are 0" ends in."""
import numpy as np

from minidamage.metrics import coco

SUSPICIOUS = 0.02                                             # AP50 below this with detections at hand calls for an explanation


def explain(result):
    """Sentences about a DetectionResult; empty when every number speaks for itself."""
    sentences = []
    for iou_type, scored in result.scored.items():
        what = {"bbox": "boxes", "segm": "masks"}[iou_type]
        truths, detections = scored.truths, scored.detections
        counted = truths["category"][truths["crowd"] == 0]
        if len(counted) == 0:
            sentences.append(f"{what}: every AP is NaN, because no picture has a truth object that counts ({len(truths['image'])} crowd regions)")
        elif len(detections["image"]) == 0:
            sentences.append(f"{what}: every AP is 0, because there is not one detection: nothing scored above the model's lowest score, or an empty file")
        else:
            sentences += _about_classes(result, scored, what, counted)
            if result.stats[f"{iou_type}/AP50"] < SUSPICIOUS:
                sentences += _about_fit(result, scored, what)
    return list(dict.fromkeys(sentences))


def _about_classes(result, scored, what, counted):
    names = result.class_names
    without = [n for k, n in enumerate(names) if not (counted == k).any()]
    silent = [n for k, n in enumerate(names) if (counted == k).any() and not (scored.detections["category"] == k).any()]
    out = []
    if without:
        out.append(f"{what}: AP of {_listed(without)} is NaN and left out of the mean, because these pictures have no truth of the class")
    if silent:
        out.append(f"{what}: AP of {_listed(silent)} is 0, because there is no detection of the class at any score")
    missing = [(letter, name) for letter, name in (("s", "small (under 32 x 32 pixels)"), ("m", "medium"), ("l", "large (over 96 x 96 pixels)"))
               if np.isnan(result.stats[("bbox/AP" if what == "boxes" else "segm/AP") + letter])]
    for letter, name in missing:
        out.append(f"{what}: AP{letter} and AR{letter} are NaN, because no truth object is {name}")
    return out


def _about_fit(result, scored, what):
    """Near-zero AP50 with truth and detections there: wrong place, wrong scale or wrong class?"""
    truths, detections = scored.truths, scored.detections
    shared = np.intersect1d(truths["image"], detections["image"])
    if len(shared) == 0:
        return [f"{what}: no picture has both truth and detections; the image ids of the two do not belong together"]
    blind = coco.evaluate({**truths, "category": np.zeros_like(truths["category"])}, {**detections, "category": np.zeros_like(detections["category"])},
                          len(result.image_ids), 1, result.protocol, keep_matches=True)
    match = blind["dt_match"][0]
    matched = match >= 0
    recall = coco.mean_of_known(blind["recall"][0, :, 0, -1])
    out = []
    if recall > 0.1:
        right = (detections["category"][matched] == truths["category"][match[matched]]).mean()
        if right < 0.5:
            shift = np.bincount(detections["category"][matched] - truths["category"][match[matched]] + len(result.class_names))
            by = int(shift.argmax()) - len(result.class_names)
            off = f", most often off by {by:+d}" if shift.max() > 0.7 * matched.sum() and by else ""
            out.append(f"{what}: they lie on the truth (recall {recall:.2f} when classes are ignored) but carry the wrong class in {1 - right:.0%} of the "
                       f"cases{off}; check the label map (0 is background, category ids may have gaps)")
    elif "box" in truths:
        extent = lambda table: np.max(table["box"][:, :2] + table["box"][:, 2:])
        ratio = extent(detections) / max(extent(truths), 1e-9)
        if not 0.5 < ratio < 2:
            out.append(f"{what}: detections reach to {extent(detections):.4g}, the truth to {extent(truths):.4g} pixels: boxes in another scale "
                       "(normalised, or of the resized picture)?")
        else:
            corners = {**detections, "box": np.concatenate([detections["box"][:, :2], detections["box"][:, 2:] - detections["box"][:, :2]], axis=1)}
            corners["box"][:, 2:] = np.maximum(corners["box"][:, 2:], 0)
            again = coco.evaluate({**truths, "category": np.zeros_like(truths["category"])}, {**corners, "category": np.zeros_like(truths["category"][:1])
                                  .repeat(len(detections["image"]))}, len(result.image_ids), 1, result.protocol)
            if coco.mean_of_known(again["recall"][0, :, 0, -1]) > max(0.1, 2 * recall):
                out.append(f"{what}: they fit when read as x1, y1, x2, y2; COCO files hold x, y, width, height")
    if not out:
        out.append(f"{what}: AP50 is {result.stats[('bbox' if what == 'boxes' else 'segm') + '/AP50']:.3f} with ids, scale and classes in order "
                   f"(recall {recall:.2f} at IoU 0.5 when classes are ignored): the model has not learned enough yet")
    return out


def _listed(names, most=8):
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
