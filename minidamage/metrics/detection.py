"""Detection metrics: feed pictures to a `CocoEvaluator`, or two files to `evaluate_coco_files`; a `DetectionResult` answers the rest.

    evaluator = CocoEvaluator(class_names)
    evaluator.add_truth(image_id, boxes, labels, rles, crowd, area, height, width)
    evaluator.add_detections(image_id, boxes, scores, labels, rles)
    result = evaluator.evaluate()
    result.stats["segm/AP50"], result.per_class["dent"]["bbox/AP"], result.best_thresholds(), result.false_alarms(), result.voc_ap("bbox")

Read first: coco.py (the protocol). Masks stay compressed run lengths from the model to the score: 100 masks of a 12-megapixel picture
are kilobytes here, not 1.2 GB.
"""
import dataclasses
import functools

import numpy as np

from minidamage import masks
from minidamage.distributed import interleave
from minidamage.metrics import coco, coco_files, confusion, diagnosis, intervals, operating, voc
from minidamage.metrics.coco import COCO

IOU_TYPES = ("bbox", "segm")


class CocoEvaluator:
    """Collects truth and detections of pictures, in any order, and scores them by COCO's rules.

    class_names: K names, label k is class_names[k - 1]. iou_types: what is scored, "bbox", "segm" or both.
    """

    def __init__(self, class_names, iou_types=IOU_TYPES):
        self.class_names, self.iou_types = tuple(map(str, class_names)), tuple(iou_types)
        unknown = set(self.iou_types) - set(IOU_TYPES)
        if unknown or not self.iou_types:
            raise ValueError(f"CocoEvaluator expects iou_types out of {IOU_TYPES}, got {iou_types!r}")
        if len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"CocoEvaluator expects different class names, got {list(class_names)}")
        self._truth, self._detections = {}, {}                # image id -> dict of arrays

    def add_truth(self, image_id, boxes, labels, rles=None, crowd=None, area=None, height=None, width=None):
        """One picture's truth; a picture without objects has empty boxes [0, 4] and counts too (its detections are false).

        boxes: [G, 4] xyxy, pixels; labels: [G], 1..K; rles: G RLE dicts (needed for "segm"); crowd: [G] bool; area: [G], decides small,
        medium, large (default: the mask's pixels, else the box's). height, width: pixels of the picture, for the files written.
        """
        image_id = _plain(image_id)
        row = self._row(image_id, "add_truth", boxes, labels, rles)
        if image_id in self._truth:
            raise ValueError(f"add_truth: picture {image_id!r} was added before; expected each picture once")
        n = len(row["labels"])
        row["crowd"] = _array(np.zeros(n) if crowd is None else crowd, np.uint8)
        if area is None:
            row["area"] = masks.area(row["rles"]).astype(np.float64) if row["rles"] is not None else _box_area(row["xywh"])
        else:
            row["area"] = _array(area, np.float64)
        if len(row["crowd"]) != n or len(row["area"]) != n:
            raise ValueError(f"add_truth, picture {image_id!r}: expected a crowd flag and an area for each of {n} boxes, got "
                             f"{len(row['crowd'])} and {len(row['area'])}")
        row["size"] = (height, width)
        self._truth[image_id] = row

    def add_detections(self, image_id, boxes, scores, labels, rles=None):
        """One picture's detections, in any order: boxes [D, 4] xyxy, scores [D], labels [D] 1..K, rles: D RLE dicts for "segm".

        May be called several times for a picture. COCO looks at the 100 best of each class in a picture.
        """
        image_id = _plain(image_id)
        row = self._row(image_id, "add_detections", boxes, labels, rles)
        row["scores"] = _array(scores, np.float64)
        if row["scores"].shape != row["labels"].shape:
            raise ValueError(f"add_detections, picture {image_id!r}: {len(row['labels'])} boxes, but scores of shape "
                             f"{list(row['scores'].shape)}; expected one each")
        if not np.isfinite(row["scores"]).all():
            raise ValueError(f"add_detections, picture {image_id!r}: expected finite scores, got {row['scores'].min()}; did the training "
                             "diverge?")
        self._detections.setdefault(image_id, []).append(row)

    def add_picture(self, image_id, truth, detection, size):
        """One picture's truth and detections, as a detector's data set and `detect` give them. size: (h, w).

        truth: dict of boxes, labels, rles or masks [G, h, w] where there are any, iscrowd and area where known; detection: dict of boxes,
        scores, labels, and masks as RLEs (`detect(images, "rle")`). Of a picture that is refused nothing is kept.
        """
        rles = truth.get("rles")
        if rles is None and truth.get("masks") is not None:
            rles = masks.encode(_array(truth["masks"], np.uint8))
        self.add_truth(image_id, truth["boxes"], truth["labels"], rles, truth.get("iscrowd"), truth.get("area"), *map(int, size))
        try:
            self.add_detections(image_id, detection["boxes"], detection["scores"], detection["labels"], detection.get("masks"))
        except (ValueError, KeyError, TypeError):
            del self._truth[_plain(image_id)]
            raise

    @classmethod
    def joined(cls, evaluators):
        """One of several, each with truth and detections of every n-th picture (distributed.shard), in the pictures' order. The first one
        is made it."""
        for field in ("_truth", "_detections"):
            setattr(evaluators[0], field, dict(interleave([list(getattr(evaluator, field).items()) for evaluator in evaluators])))
        return evaluators[0]

    def _row(self, image_id, name, boxes, labels, rles):
        boxes, labels = _array(boxes, np.float64).reshape(-1, 4), _array(labels, np.int64)
        if labels.shape != (len(boxes),):
            raise ValueError(f"{name}, picture {image_id!r}: {len(boxes)} boxes, but labels of shape {list(labels.shape)}")
        if len(labels) and not (1 <= labels.min() and labels.max() <= len(self.class_names)):
            known = f"1..{len(self.class_names)} ({', '.join(self.class_names[:8])})"
            raise ValueError(f"{name}, picture {image_id!r}: expected labels {known}, got {sorted(set(labels.tolist()))[:10]}; 0 is "
                             "background, and category ids of a file must be mapped to labels first")
        if rles is None and len(boxes) == 0:
            rles = []
        if "segm" in self.iou_types and (rles is None or len(rles) != len(boxes) or any(r is None for r in rles)):
            raise ValueError(f"{name}, picture {image_id!r}: expected {len(boxes)} RLEs, got {'none' if rles is None else len(rles)}; "
                             'a set or a model without masks is scored with iou_types=("bbox",)')
        are_rles = rles is not None and all(isinstance(rle, dict) for rle in rles)
        if "segm" in self.iou_types and not are_rles:
            raise ValueError(f"{name}, picture {image_id!r}: expected masks as RLE dicts, got {type(rles[0]).__name__}; a detector gives "
                             'them with model.detect(images, "rle"), minidamage.masks.encode makes them')
        x0, y0, x1, y1 = boxes.T
        return {"xywh": np.stack([x0, y0, x1 - x0, y1 - y0], axis=1), "labels": labels, "rles": rles if are_rles else None}

    def tables(self, iou_type):
        """(truths, detections, image_ids): the tables of metrics/coco.py."""
        image_ids = sorted(self._truth)
        unknown = [i for i in self._detections if i not in self._truth]
        if unknown:
            raise ValueError(f"detections of pictures without truth: {unknown[:5]}{' ...' if len(unknown) > 5 else ''}; expected ids among "
                             f"the {len(image_ids)} added by add_truth: {image_ids[:5]}{' ...' if len(image_ids) > 5 else ''}")
        truth_rows = [(i, self._truth[image_id]) for i, image_id in enumerate(image_ids)]
        dt_rows = [(i, row) for i, image_id in enumerate(image_ids) for row in self._detections.get(image_id, ())]
        truths, detections = _table(truth_rows, iou_type), _table(dt_rows, iou_type)
        truths["crowd"] = _join([row["crowd"] for _, row in truth_rows], np.uint8)
        truths["area"] = _join([row["area"] for _, row in truth_rows], np.float64)
        detections["score"] = _join([row["scores"] for _, row in dt_rows], np.float64)
        detections["area"] = _box_area(detections["box"]) if iou_type == "bbox" else None
        return truths, detections, image_ids

    def evaluate(self):
        """Returns the DetectionResult of everything added so far."""
        scored = {}
        for iou_type in self.iou_types:
            truths, detections, image_ids = self.tables(iou_type)
            arrays = coco.evaluate(truths, detections, len(image_ids), len(self.class_names), keep_matches=True)
            scored[iou_type] = Scored(truths, detections, arrays)
        return DetectionResult(self.class_names, image_ids, scored)

    def coco_detections(self, category_ids=None):
        """The detections as COCO's list of dicts, in the numbering of `category_ids` (default 1..K); they score the same as files."""
        category_ids = category_ids or range(1, len(self.class_names) + 1)
        out = []
        for image_id, rows in self._detections.items():
            for row in rows:
                for k in range(len(row["labels"])):
                    entry = {"image_id": image_id, "category_id": int(category_ids[row["labels"][k] - 1]), "bbox": row["xywh"][k].tolist(),
                             "score": float(row["scores"][k])}
                    if row["rles"] is not None:
                        entry["segmentation"] = _json_rle(row["rles"][k])
                    out.append(entry)
        return out

    def coco_truth(self, category_ids=None, files=None):
        """The truth as COCO's dict. files: {image id: file name}."""
        category_ids = category_ids or range(1, len(self.class_names) + 1)
        annotations = []
        for image_id, row in self._truth.items():
            for k in range(len(row["labels"])):
                entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": int(category_ids[row["labels"][k] - 1]),
                         "bbox": row["xywh"][k].tolist(), "area": float(row["area"][k]), "iscrowd": int(row["crowd"][k])}
                if row["rles"] is not None:
                    entry["segmentation"] = _json_rle(row["rles"][k])
                annotations.append(entry)
        images = [{"id": i, "file_name": str((files or {}).get(i, i)), "height": row["size"][0], "width": row["size"][1]}
                  for i, row in self._truth.items()]
        return {"images": images, "annotations": annotations,
                "categories": [{"id": int(c), "name": n} for c, n in zip(category_ids, self.class_names)]}


@dataclasses.dataclass
class Scored:
    """Boxes or masks, scored: the two tables and the arrays of `coco.evaluate(..., keep_matches=True)`."""

    truths: dict
    detections: dict
    arrays: dict
    limit: int = COCO.max_dets[-1]                            # detections of a class in a picture that were looked at


class DetectionResult:
    """Numbers of one evaluation.

    stats: {"bbox/AP": ..., "segm/ARl": ...}, COCO's 12 for each IoU type; NaN where there is no truth. per_class: {name: {"truths",
    "detections", "bbox/AP", "bbox/AP50", "bbox/AP75", "bbox/AR100", ...}}. arrays: {"bbox": {"precision" [T, R, K, A, M], "recall",
    "scores"}, ...} as in pycocotools, -1 where there is no truth. causes: why a number is NaN or 0, in words. of_files: whether boxes
    were read from files, which may hold them in another form.
    """

    protocol = COCO                                           # by which it was scored

    def __init__(self, class_names, image_ids, scored, of_files=False):
        self.class_names, self.image_ids, self.scored, self.of_files = tuple(class_names), image_ids, scored, of_files
        self.arrays = {t: {name: s.arrays[name] for name in ("precision", "recall", "scores")} for t, s in scored.items()}
        self.stats = {name: value for t, s in scored.items() for name, value in coco.summarize(s.arrays, f"{t}/").items()}

    @functools.cached_property
    def per_class(self):
        return {name: self._class_numbers(k) for k, name in enumerate(self.class_names)}

    def _class_numbers(self, k):
        numbers = {}
        for iou_type, s in self.scored.items():
            truth = s.truths["category"] == k
            numbers.update(truths=int((truth & (s.truths["crowd"] == 0)).sum()), detections=int((s.detections["category"] == k).sum()))
            precision, recall = s.arrays["precision"][:, :, k, 0, -1], s.arrays["recall"][:, k, 0, -1]
            numbers[f"{iou_type}/AP"] = coco.mean_of_known(precision)
            for threshold in (0.5, 0.75):
                at = np.isclose(self.protocol.iou_thresholds, threshold)
                numbers[f"{iou_type}/AP{round(100 * threshold)}"] = coco.mean_of_known(precision[at])
            numbers[f"{iou_type}/AR{self.protocol.max_dets[-1]}"] = coco.mean_of_known(recall)
        return numbers

    @functools.cached_property
    def causes(self):
        """Why numbers are NaN or 0: a list of sentences, empty when there is nothing to explain."""
        return diagnosis.explain(self)

    def interval(self, name="segm/AP", samples=500):
        """The 95 % bootstrap Interval over pictures of "bbox/AP", "segm/AP50" and the like (intervals.py)."""
        iou_type, _, number = name.partition("/")
        if number[:2] != "AP" or (number[2:] and not number[2:].isdigit()):
            raise ValueError(f"interval expects bbox/AP, segm/AP50 and the like, got {name!r}")
        threshold = float(number[2:]) / 100 if number[2:] else None
        scored = self.scored[self._type(iou_type)]
        return intervals.ap_interval(scored, len(self.image_ids), len(self.class_names), self.protocol, threshold, samples)

    @property
    def deciding(self):
        """The Scored of masks if there are masks, else of boxes: what thresholds are chosen by, and what is right or wrong at them."""
        return self.scored["segm" if "segm" in self.scored else "bbox"]

    def best_f1(self):
        """{name: {"threshold", "F1", "precision", "recall"}} where F1 at IoU 0.5 is best; threshold NaN for a class never found."""
        return dict(zip(self.class_names, operating.best_f1(self.deciding, len(self.class_names))))

    def best_thresholds(self):
        """{name: score} of the best F1, 0.5 where there is none: what to ship."""
        best = {name: numbers["threshold"] for name, numbers in self.best_f1().items()}
        return {name: 0.5 if np.isnan(threshold) else threshold for name, threshold in best.items()}

    def at_thresholds(self, thresholds):
        """{name: {"precision", "recall", "F1", "TP", "FP", "FN", "matched IoU"}} and the same under "all", for detections whose score is at
        least their class's threshold; match at IoU 0.5. "matched IoU" is the mean IoU of the true positives' masks (or boxes)."""
        rows = operating.at_thresholds(self.deciding, self._threshold_list(thresholds))
        return dict(zip((*self.class_names, "all"), rows))

    def measured(self, thresholds):
        """{name: {"precision", "recall"}} of `at_thresholds`: how often a finding of the class is right, how much of it is found."""
        rows = self.at_thresholds(thresholds)
        return {name: {key: rows[name][key] for key in ("precision", "recall")} for name in self.class_names}

    def errors_by_picture(self, thresholds=0.5):
        """int [I, 2]: false findings and missed truths of each picture (in the order of image_ids), at IoU 0.5."""
        return operating.errors_by_picture(self.deciding, len(self.image_ids), self._threshold_list(thresholds))

    def errors_in_picture(self, image_id, thresholds=0.5):
        """(false [F], missed [G]), bool: which of a picture's findings fit no truth, which of its truths no finding, at IoU 0.5, each in
        the order that they were added in."""
        return operating.errors_in_picture(self.deciding, self.image_ids.index(image_id), self._threshold_list(thresholds))

    def confusion(self, thresholds=0.5):
        """int [K + 1, K + 1] at the thresholds: the objects' classes by the findings', last row false alarms, last column missed."""
        return confusion.confusion_matrix(self.deciding, self._threshold_list(thresholds))

    def false_alarms(self, thresholds=0.5):
        """{"pictures": undamaged pictures, "with findings": share of them with one at least, "findings": per such picture}."""
        s = next(iter(self.scored.values()))
        return operating.false_alarms(s, len(self.image_ids), self._threshold_list(thresholds))

    def voc_ap(self, iou_type="bbox", iou_threshold=0.5):
        """{"all-point": {name: AP, ..., "mean"}, "11-point": {...}} by the rules of Pascal VOC (voc.py)."""
        s = self.scored[self._type(iou_type)]
        found = voc.voc_ap(s.truths, s.detections, len(self.class_names), iou_threshold)
        return {method: {**dict(zip(self.class_names, values)), "mean": coco.mean_of_known(np.nan_to_num(np.array(values), nan=-1))}
                for method, values in found.items()}

    def _type(self, iou_type):
        if iou_type not in self.scored:
            raise ValueError(f"this evaluation scored {', '.join(self.scored)}, not {iou_type!r}; ask the evaluator for it by iou_types")
        return iou_type

    def _threshold_list(self, thresholds):
        if np.isscalar(thresholds):
            return np.full(len(self.class_names), float(thresholds))
        return np.array([thresholds.get(name, 0.5) for name in self.class_names], np.float64)


def evaluate_coco_files(truth, detections, iou_type="bbox", use_cats=True, area_from_boxes=False):
    """Returns the DetectionResult of two COCO files (or their parsed content), as pycocotools' COCOeval.

    iou_type: "bbox", "segm", both in a tuple, or "auto" for what the files hold. use_cats=False: categories are ignored, as for
    proposals; the result then has the one class "all". area_from_boxes: see coco_files.py. Raises ValueError with expected and got for
    every fault of the files.
    """
    return load_coco(truth, detections, iou_type, use_cats, area_from_boxes).evaluate()


@dataclasses.dataclass
class CocoFiles:
    """Two COCO files as tables, checked and ready to score. tables: {iou_type: (truths, detections)}."""

    class_names: list
    image_ids: list
    tables: dict

    def evaluate(self):
        """Returns the DetectionResult."""
        scored = {iou_type: Scored(*pair, coco.evaluate(*pair, len(self.image_ids), len(self.class_names), keep_matches=True))
                  for iou_type, pair in self.tables.items()}
        return DetectionResult(self.class_names, self.image_ids, scored, of_files=True)


def load_coco(truth, detections, iou_type="bbox", use_cats=True, area_from_boxes=False):
    """Returns the CocoFiles of two files (or their parsed content); arguments as in `evaluate_coco_files`."""
    iou_types = (iou_type,) if isinstance(iou_type, str) else tuple(iou_type)
    if not iou_types or set(iou_types) - {*IOU_TYPES, "auto"}:
        raise ValueError(f"expected iou_type bbox or segm (or auto), got {iou_type!r}")
    truth, detections, loaded = coco_files.read_json(truth), coco_files.read_json(detections), {}
    for iou_type in coco_files.types_in(truth[0], detections[0]) if "auto" in iou_types else iou_types:
        truths, image_ids, categories, _, images = coco_files.read_truth(*truth, iou_type)
        found = coco_files.read_detections(*detections, iou_type, image_ids, categories, images, area_from_boxes)
        names = [str(c.get("name", c["id"])) for c in categories]
        names = [name if names.count(name) == 1 else f"{name} ({c['id']})" for name, c in zip(names, categories)]
        loaded[iou_type] = (truths, found) if use_cats else (_without_categories(truths), _without_categories(found))
    return CocoFiles(names if use_cats else ["all"], image_ids, loaded)


def _without_categories(table):
    """One category; objects in order of their old one, which is how COCOeval lines them up (it matters for ties)."""
    order = np.argsort(table["category"], kind="stable")
    pick = lambda value: [value[i] for i in order] if isinstance(value, list) else value[order]
    new = {key: None if value is None else pick(value) for key, value in table.items()}
    return {**new, "category": np.zeros(len(order), np.int32)}


def _table(rows, iou_type):
    """image, category and boxes or masks of [(picture position, row)]."""
    table = {"image": np.repeat(np.array([i for i, _ in rows], np.int32), [len(row["labels"]) for _, row in rows]),
             "category": _join([row["labels"] - 1 for _, row in rows], np.int32)}
    if iou_type == "bbox":
        table["box"] = _join([row["xywh"] for _, row in rows], np.float64).reshape(-1, 4)
    else:
        rles = [rle for _, row in rows for rle in row["rles"]]
        counts, sizes = masks.unpack(rles)
        table["counts"], table["size"] = counts, sizes.astype(np.int32)
    return table


def _plain(image_id):
    """An id as Python has it, of a tensor or numpy's too: as a key, and in JSON."""
    return image_id.item() if hasattr(image_id, "item") else image_id


def _array(values, dtype):
    """numpy array of a list, an array or a CPU tensor."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values).astype(dtype)


def _join(arrays, dtype):
    return np.concatenate([np.zeros((0, *arrays[0].shape[1:]) if arrays else 0, dtype), *arrays]).astype(dtype)


def _box_area(xywh):
    return xywh[:, 2] * xywh[:, 3]


def _json_rle(rle):
    counts = rle["counts"]
    return {"size": [int(side) for side in rle["size"]], "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
