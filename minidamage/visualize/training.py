"""The two pictures a training run draws: what the model is fed, and what it makes of the validation part."""
from minidamage.visualize.overlay import draw_detections, draw_label_map, draw_truth, grid, save_picture


def draw_first_batch(path, images, targets, class_names):
    """Draws a training batch as the model receives it: after augmentation, with boxes and masks, or with label maps.

    images: list of uint8 or float [3, H, W]. targets: dicts of boxes [G, 4], labels [G], masks [G, H, W], or of label_map [H, W]; and file.
    """
    drawn = [_draw_target(image, target, class_names) for image, target in zip(images, targets)]
    titles = [f"{_file_name(target['file'])}  {_what_is_there(target)}" for target in targets]
    return save_picture(path, grid(drawn, titles, title="First training batch, after augmentation"))


def draw_predictions(path, shown, class_names, thresholds, title):
    """Draws truth beside prediction, a row a picture.

    shown: list of (image uint8 [3, H, W], target dict with rles, masks or neither, detection dict with masks as RLEs or absent, or dict
    of label_map [H, W]).
    thresholds: {class name: score}; detections below their class's threshold are left out, as they would be in use.
    """
    pictures, titles = [], []
    for image, target, prediction in shown:
        if "label_map" in prediction:
            found = draw_label_map(image, prediction["label_map"], class_names, enlarge=True, empty="nothing found")
        else:
            found = _draw_detections(image, prediction, class_names, thresholds)
        pictures += [_draw_target(image, target, class_names), found]
        titles += [f"{_file_name(target['file'])}: truth", "prediction"]
    return save_picture(path, grid(pictures, titles, columns=2, title=title))


def _draw_target(image, target, class_names):
    if "label_map" in target:
        return draw_label_map(image, target["label_map"].cpu(), class_names, enlarge=True)
    return draw_truth(image, target["boxes"].cpu(), target["labels"].cpu(), _masks(target), class_names, target.get("iscrowd"),
                      enlarge=True)


def _draw_detections(image, detection, class_names, thresholds):
    labels, scores = detection["labels"].cpu(), detection["scores"].cpu()
    lowest = [thresholds.get(class_names[label - 1], 0.5) for label in labels.tolist()]
    keep = [k for k, score in enumerate(scores.tolist()) if score >= lowest[k]]
    masks = [detection["masks"][k] for k in keep] if detection.get("masks") is not None else None
    return draw_detections(image, detection["boxes"].cpu()[keep], labels[keep], scores[keep], masks, class_names, enlarge=True)


def _what_is_there(target):
    if "label_map" in target:
        damage = ((target["label_map"] > 0) & (target["label_map"] < 255)).float().mean().item()
        return f"{damage:.1%} damage"
    return f"{len(target['labels'])} object{'s' * (len(target['labels']) != 1)}"


def _masks(target):
    return target["masks"].cpu().numpy().astype(bool) if "masks" in target else target.get("rles")


def _file_name(file):
    return str(file).replace("\\", "/").rsplit("/", 1)[-1]
