"""How a model is validated, picture by picture: train.py after each epoch, evaluate.py --test-epochs for those that were kept.

    dataset, evaluator = validation_set(model, records), evaluator_of(model, class_names)
    losses, prediction = predict(model, [image], [target])            # of dataset; one at a time: any size
    add_picture(evaluator, target, prediction, image.shape[-2:])
    metrics_of(evaluator.evaluate())[default_metric(model)]
"""
import torch

from minidamage.data import DetectionDataset, SegmentationDataset
from minidamage.layers.segmenter import IGNORE, label_map_of
from minidamage.metrics.detection import CocoEvaluator
from minidamage.metrics.segmentation import PixelEvaluator, PixelResult


def validation_set(model, records):
    """The pictures as they are validated: a segmenter's at the size it is trained at, a detector's at their own."""
    if model.task == "segmentation":
        return SegmentationDataset(records, image_size=model.config.image_size)
    return DetectionDataset(records, mask_form="rle" if "segm" in model.iou_types else "none")


def evaluator_of(model, class_names):
    """What scores the model: a PixelEvaluator, or a CocoEvaluator of boxes and of the masks that it has."""
    return PixelEvaluator(class_names) if model.task == "segmentation" else CocoEvaluator(class_names, model.iou_types)


def predict(model, images, targets):
    """({"loss_...": scalar}, what is predicted) of one picture, in lists of one. A detector's: its detections in the picture's own pixels,
    masks as run lengths, on the CPU. A segmenter's: {"label_map": [H, W]}; of one class: where its probability is above 0.5."""
    if model.task == "segmentation":
        losses, (probabilities,) = model.losses_and_probabilities(images, targets)
        return losses, {"label_map": label_map_of(probabilities).cpu()}
    losses, (detections,) = model.losses_and_detections(images, targets, mask_form="rle")
    return losses, {name: found.cpu() if isinstance(found, torch.Tensor) else found for name, found in detections.items()}


def add_picture(evaluator, target, prediction, size):
    """Gives one picture's truth and prediction to the evaluator of its task: with label_map [h, w] to a PixelEvaluator, else, as
    CocoEvaluator.add_picture takes them, to that one. size: (h, w) of the picture."""
    if "label_map" in target:
        truth = target["label_map"].numpy()
        evaluator.add_label_maps(truth, prediction["label_map"].numpy(), ignore=truth == IGNORE)
    else:
        evaluator.add_picture(target["index"], target, prediction, size)


def metrics_of(result):
    """{name: number} of an evaluator's result; of a segmenter also those of the car-damage segmentation project ("any-damage/...")."""
    return {**result.stats, **(result.any_damage() if isinstance(result, PixelResult) else {})}


def metric_names(model):
    """Names of the metrics that may choose best.pt, without their val/ in metrics.csv."""
    names = [f"class {label}" for label in range(1, model.num_classes)]
    return ["loss", *metrics_of(evaluator_of(model, names).evaluate())]


def default_metric(model):
    """What picks best.pt where the recipe leaves it open: a segmenter's pooled IoU of the damage, of several classes the mean of theirs; a
    detector's AP of masks, or of boxes where there are none."""
    if model.task == "segmentation":
        return "pixel/mIoU" if model.num_classes > 2 else "pixel/IoU"
    return f"{model.iou_types[-1]}/AP"
