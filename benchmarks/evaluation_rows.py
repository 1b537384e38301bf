"""COCO evaluation: evaluate + accumulate on generated truth and detections, beside pycocotools and faster-coco-eval."""
import contextlib
import io
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.timing import peer
from minidamage import masks
from minidamage.metrics import detection


HEIGHT, WIDTH = 480, 640
VAL2017 = dict(images=5000, truths=36_781, detections=36_781, classes=80)        # the size of COCO's val2017, and as many detections


def generated_coco(images, truths, detections, classes, seed=0):
    """Truth and detections in COCO's JSON, so many in all, spread over the pictures at random: boxes from 12 to 250 pixels a side,
    detections jittered from the truth of their picture or of another class, masks are ellipses."""
    rng = np.random.default_rng(seed)
    truth, found = [], []
    truths_of, detections_of = (rng.multinomial(total, np.full(images, 1 / images)) for total in (truths, detections))
    for image, (G, D) in enumerate(zip(np.maximum(truths_of, 1), detections_of), 1):
        size = np.minimum(np.exp(rng.uniform(np.log(12), np.log(250), (G, 2))), 240)
        boxes = np.concatenate([rng.uniform(0, 1, (G, 2)) * ([WIDTH, HEIGHT] - size), size], 1).round(1)
        labels = rng.integers(1, classes + 1, G)
        source = rng.integers(0, G, D)
        jitter = boxes[source] + rng.normal(0, 0.15, (D, 4)) * boxes[source][:, [2, 3, 2, 3]]
        jitter[:, 2:] = np.maximum(jitter[:, 2:], 4)
        jitter[:, :2] = np.clip(jitter[:, :2], 0, [WIDTH - 8, HEIGHT - 8])
        guesses = np.where(rng.random(D) < 0.6, labels[source], rng.integers(1, classes + 1, D))
        for box, label in zip(boxes, labels) if truths_of[image - 1] else ():
            segment, area = ellipse(box)
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": int(label), "bbox": box.tolist(), "iscrowd": 0,
                          "area": area, "segmentation": segment})
        for box, label, score in zip(jitter, guesses, rng.random(D)):
            found.append({"image_id": image, "category_id": int(label), "bbox": box.round(1).tolist(), "score": float(score),
                          "segmentation": ellipse(box)[0]})
    gt = {"images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)],
          "categories": [{"id": k, "name": f"class{k}"} for k in range(1, classes + 1)], "annotations": truth}
    return gt, found


def ellipse(box):
    """(RLE of the ellipse in an xywh box, its area), cut off at the picture's edge."""
    x1, x2, y1, y2 = (int(v) for v in (max(0, box[0]), min(WIDTH, box[0] + box[2] + 1), max(0, box[1]), min(HEIGHT, box[1] + box[3] + 1)))
    y, x = np.mgrid[y1:y2, x1:x2] + 0.5
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[y1:y2, x1:x2] = ((x - box[0] - box[2] / 2) / (box[2] / 2)) ** 2 + ((y - box[1] - box[3] / 2) / (box[3] / 2)) ** 2 <= 1
    segment = masks.encode(mask)
    return {"size": segment["size"], "counts": segment["counts"].decode()}, float(mask.sum())


def benchmark_eval(table):
    """evaluate + accumulate on loaded data, as users wait for it; loading the JSON is outside on all sides."""
    images = table.args.eval_images
    sizes = [(f"{images} pictures x 100 detections", dict(images=images, truths=7 * images, detections=100 * images, classes=80), (80, 3)),
             ("val2017's size (5000 pictures, 36781 truths and detections)", VAL2017, (80,)),
             ("10 pictures x 10 detections", dict(images=10, truths=50, detections=100, classes=80), (80, 3))]
    for what, size, class_counts in sizes:
        names = {(classes, iou_type): f"COCO {iou_type}, {what}, {classes} classes"
                 for classes in class_counts for iou_type in ("bbox", "segm")}
        if any(table.wants(name) for name in names.values()):
            benchmark_generated(table, names, *generated_coco(**size))


def benchmark_generated(table, names, gt, dt):
    """names: {(classes, iou_type): row}; fewer classes than the set has: taken modulo."""
    for (classes, iou_type), name in names.items():
        for each in (*gt["annotations"], *dt):
            each["category_id"] = (each["category_id"] - 1) % classes + 1
        gt["categories"] = gt["categories"][:classes]
        prepared = detection.load_coco(gt, dt, iou_type)
        table.add(name, prepared.evaluate,
                  {"pycocotools": cocoeval(peer("pycocotools.coco"), peer("pycocotools.cocoeval"), "COCOeval", gt, dt, iou_type),
                   "faster-coco-eval": cocoeval(peer("faster_coco_eval"), peer("faster_coco_eval"), "COCOeval_faster", gt, dt, iou_type)})


def cocoeval(coco_module, eval_module, class_name, gt, dt, iou_type):
    """A callable that evaluates with a peer on data it has loaded, or None where it is not installed."""
    if coco_module is None or eval_module is None:
        return None
    other = "segmentation" if iou_type == "bbox" else "bbox"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "gt.json")
        path.write_text(json.dumps(gt))
        coco = coco_module.COCO(str(path))
        results = coco.loadRes([{key: value for key, value in found.items() if key != other} for found in dt])

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = getattr(eval_module, class_name)(coco, results, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation
    return run
