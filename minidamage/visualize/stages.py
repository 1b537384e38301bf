"""A photograph on its way through the detector, stage by stage (DamageNet, Fig. 6 A-G; A-D without a mask branch), from
`model.detect(images, stages=True)`.

Also the way to see where a model goes wrong: no proposal on the damage (B), a context map that is blind to it (C), a box
that slipped (D), a mask that is faint (E) or that post-processing spoils (F, G).
"""
import numpy as np
import torch
from PIL import Image

from minidamage import ops
from minidamage.visualize.overlay import (class_colours, draw_detections, enlarged, enlargement, grid, line_width, mask_array, paint_mask,
                                          repeated, to_picture, with_label)

PROPOSALS_SHOWN = 60
FILLED = (255, 214, 0)                        # pixels that hole filling added
# Dark to bright in even steps of lightness, readable in grey too (nine colours of the "inferno" map).
HEAT = np.array([(0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
                 (249, 201, 50), (252, 255, 164)], np.float32)


def draw_stages(image, stages, class_names, kept=None, context=True, cell=480):
    """Returns the strip: seven captioned pictures in two rows, or four without a mask branch, uint8 [H', W', 3].

    image: uint8 [H, W, 3]. stages: one picture's dict, as the models' `stages_of` makes it: proposals [P, 4] and objectness [P];
    features {level name: [C, h, w]}; boxes [D, 4], labels [D], scores [D]; with a mask branch masks_raw [D, 1, M, M] probabilities
    inside the boxes, masks_threshold and masks_final, D RLE dicts each. Boxes and masks are in pixels of `image`.
    kept: indices of the D that are findings (those above their score thresholds), None for all. context: whether the pyramid has
    the dilated context block; it only names picture C. cell: longest side of one picture, pixels.
    """
    image = to_picture(image)
    H, W, _ = image.shape
    stages = {name: value.detach().float().cpu() if isinstance(value, torch.Tensor) else value for name, value in stages.items()}
    kept = np.arange(len(stages["boxes"])) if kept is None else np.asarray(kept, dtype=np.int64)
    boxes, scores, labels = (stages[name].numpy()[kept] for name in ("boxes", "scores", "labels"))
    labels = labels.astype(np.int64)
    scale = cell / max(H, W)                                  # B, C and E are drawn in their final size
    size = max(1, round(W * scale)), max(1, round(H * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    proposals, levels = stages["proposals"], list(stages["features"])
    shown = min(PROPOSALS_SHOWN, len(proposals))
    span = levels[0] if len(levels) == 1 else f"{levels[0]} to {levels[-1]}"
    pictures = {
        f"A  picture, {W} x {H}": image,
        f"B  proposals, the best {shown} of {len(proposals)}": _draw_proposals(small, proposals * scale, stages["objectness"]),
        f"C  features {'with' if context else 'without'} dilated context, {span}; scale: this picture's":
            _draw_map(small, stages["features"]),
        f"D  aligned and refined boxes: {len(kept)}": draw_detections(image, boxes, labels, scores, None, class_names, enlarge=True)}
    if "masks_raw" in stages:
        raw = _draw_probability(small, stages["masks_raw"][kept], stages["boxes"][kept] * scale)
        pictures["E  raw mask, probability"] = raw if len(kept) else with_label(raw, "nothing found")
        _add_masks(pictures, image, labels, boxes, scores, stages, kept, class_names)
    return grid(list(pictures.values()), list(pictures), columns=4, cell=cell)


def _add_masks(pictures, image, labels, boxes, scores, stages, kept, class_names):
    """Pictures F and G: what the threshold left and filling added, what dropping islands took away."""
    H, W, _ = image.shape
    before = [mask_array(stages["masks_threshold"][i], H, W) for i in kept]
    final = [mask_array(stages["masks_final"][i], H, W) for i in kept]
    filled = [old | new for old, new in zip(before, final)]
    added, canvas = _draw_change(image, labels, filled, [new & ~old for old, new in zip(before, final)], FILLED, class_names)
    pictures["F  threshold and filling" + f": {added:,} px filled (yellow)" * bool(added)] = canvas
    removed = sum(int((old & ~new).sum()) for old, new in zip(before, final))
    pictures["G  final" + f": {removed:,} px of islands removed" * bool(removed)] = draw_detections(
        image, boxes, labels, scores, final, class_names, enlarge=True)


def _draw_proposals(image, proposals, objectness):
    """The best proposals, faint ones below, over image: uint8 [H, W, 3]."""
    proposals = np.asarray(proposals, np.float64)
    order = np.argsort(-np.asarray(objectness, np.float64), kind="stable")[:PROPOSALS_SHOWN]
    canvas = image.astype(np.float32)
    for rank, i in reversed(list(enumerate(order))):
        share = 1 - rank / max(len(order), 2)                 # 1: the best
        colour, opacity = heat(np.array(0.35 + 0.6 * share)), 0.25 + 0.7 * share
        x1, y1, x2, y2 = proposals[i].round().astype(int)
        x1, x2 = np.clip((x1, x2 - 1), 0, canvas.shape[1] - 1)
        y1, y2 = np.clip((y1, y2 - 1), 0, canvas.shape[0] - 1)
        for edge in (np.s_[y1, x1:x2 + 1], np.s_[y2, x1:x2 + 1], np.s_[y1:y2 + 1, x1], np.s_[y1:y2 + 1, x2]):
            canvas[edge] += (colour - canvas[edge]) * opacity
    return (canvas + 0.5).astype(np.uint8)


def _draw_map(image, levels):
    """How unlike the rest of the picture each place looks to the model, over the grey picture.

    Each level: distance of a position's features from their mean over the picture, scaled to 0..1; then the mean of the levels.
    """
    H, W, _ = image.shape
    strength = np.zeros((H, W), np.float32)
    for features in levels.values():
        features = features.detach().float()
        length = (features - features.mean(dim=(1, 2), keepdim=True)).norm(dim=0).cpu().numpy()                # [h, w]
        low, high = np.percentile(length, (2, 99.5))
        length = np.clip((length - low) / max(high - low, 1e-12), 0, 1)
        strength += np.asarray(Image.fromarray(length).resize((W, H), Image.Resampling.BICUBIC)) / len(levels)
    return _mixed(_grey(image), heat(np.clip(strength, 0, 1)), 0.68)


def _draw_probability(image, masks, boxes):
    """Each pixel's largest mask probability as heat over the grey picture; nothing where it is near 0.

    masks: [D, 1, M, M] float inside boxes: [D, 4]; pasted one at a time, so that one map is needed, not D.
    """
    H, W, _ = image.shape
    largest = np.zeros((H, W), np.float32)
    for mask, box in zip(masks, boxes):
        pasted = ops.paste_masks_in_image(mask[None], box[None], (H, W))                            # [1, 1, H, W]
        np.maximum(largest, pasted[0, 0].numpy(), out=largest)
    return _mixed(_grey(image), heat(largest), np.clip(largest * 4, 0, 0.85)[..., None])


def _draw_change(image, labels, masks, changed, colour, class_names):
    """(number of changed pixels, picture): the masks, and over them the pixels that the step changed."""
    H, W, _ = image.shape
    factor, colours = enlargement(H, W), class_colours(list(class_names))
    canvas = enlarged(image, factor)
    for label, mask, change in zip(labels, masks, changed):
        paint_mask(canvas, repeated(mask, factor), colours[class_names[label - 1]], line_width(H * factor, W * factor))
        canvas[repeated(change, factor)] = colour
    canvas = canvas if len(labels) else with_label(canvas, "nothing found")
    return sum(int(change.sum()) for change in changed), canvas


def heat(values):
    """float32 [..., 3] colours, 0..255, of values 0..1: black, violet, red, orange, pale yellow."""
    place = np.clip(np.asarray(values, np.float32), 0, 1) * (len(HEAT) - 1)
    low = np.minimum(place.astype(np.int64), len(HEAT) - 2)
    return HEAT[low] + (HEAT[low + 1] - HEAT[low]) * (place - low)[..., None]


def _grey(image):
    grey = np.asarray(Image.fromarray(image).convert("L"))
    return np.repeat(grey[:, :, None], 3, axis=2)


def _mixed(below, above, opacity):
    below = below.astype(np.float32)
    return (below + (above - below) * opacity + 0.5).astype(np.uint8)
