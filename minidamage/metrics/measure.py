"""Runs a model over pictures and scores it: what evaluate.py and the training's validation share."""
import resource
import sys
import time

import numpy as np


def evaluate_model(model, samples, class_names, iou_types=("bbox", "segm"), on_picture=None):
    """Returns (metrics dict, CocoEvaluator).

    samples: iterable of (image [3, H, W], truth dict), or of (list of images, list of truths) as a DataLoader with `collate` gives. A truth has
    boxes [G, 4] xyxy, labels [G], and, where known, rles (G RLE dicts) or masks [G, H, W], iscrowd, area, image_id.
    metrics: the evaluator's stats, "ms per picture" (median over pictures, first one left out: it warms up), "pictures per second",
    "peak memory MB" (of the GPU if the model is there, else of the process). on_picture(image, truth, detection) is called for each.
    The model is put in evaluation mode for the time, and back.
    """
    import torch

    from minidamage.metrics.detection import CocoEvaluator

    evaluator, seconds = CocoEvaluator(class_names, iou_types), []
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    was_training = model.training
    model.eval()
    try:
        for images, truths in samples:
            images, truths = (images, truths) if isinstance(images, (list, tuple)) else ([images], [truths])
            began = time.perf_counter()
            detections = model.detect(list(images), mask_form="rle")
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds += [(time.perf_counter() - began) / len(images)] * len(images)
            for image, truth, detection in zip(images, truths, detections):
                add_picture(evaluator, len(evaluator._truth), image, truth, detection)
                if on_picture is not None:
                    on_picture(image, truth, detection)
    finally:
        model.train(was_training)
    metrics = {**evaluator.evaluate().stats, **speed(seconds), "peak memory MB": peak_memory(device)}
    return metrics, evaluator


def add_picture(evaluator, position, image, truth, detection):
    """Adds one picture's truth and detection to the evaluator; masks [G, H, W] are compressed on the way."""
    from minidamage import masks

    image_id = truth.get("image_id", position)
    height, width = image.shape[-2:]
    rles = truth.get("rles")
    if rles is None and truth.get("masks") is not None:
        rles = masks.encode(np.asarray(truth["masks"].cpu() if hasattr(truth["masks"], "cpu") else truth["masks"]))
    evaluator.add_truth(image_id, truth["boxes"], truth["labels"], rles, truth.get("iscrowd"), truth.get("area"), height, width)
    evaluator.add_detections(image_id, detection["boxes"], detection["scores"], detection["labels"], detection.get("masks"))


def speed(seconds):
    """ms per picture (median) and pictures per second; the first picture only counts when it is alone."""
    used = np.array(seconds[1:] or seconds or [float("nan")])
    return {"ms per picture": float(np.median(used) * 1000), "pictures per second": float(1 / np.mean(used))}


def peak_memory(device):
    """MB: of the GPU's allocator where the model is there, else the process's largest resident size."""
    if device.type == "cuda":
        import torch
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
