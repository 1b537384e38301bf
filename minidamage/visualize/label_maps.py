"""Pictures of pixel labels: errors over the photograph, cracks that stay visible on a large one, attention maps, the map as a file.

`overlay.draw_label_map` draws a truth or a prediction; this file has what only segmentation needs beyond it.
"""
import os

import numpy as np
from PIL import Image

from minidamage.skeleton import squared_distances
from minidamage.visualize.overlay import (NOT_JUDGED, class_colours, enlarged, enlargement, grid, line_width, paint_mask, repeated,
                                          to_picture, with_label, with_legend, write_beside)
from minidamage.visualize.stages import heat

# Right, too much, missed: no damage's colours; yellow is far lighter than the others, and these differ in blue: colour-blind readers too.
RIGHT, FALSE, MISSED = (0, 145, 75), (255, 225, 50), (170, 90, 255)
DIMMED = 0.45                                                 # of the photograph's brightness under the errors
SHOWN_AT = 900                                                # pixels: the longer side at which people look at a picture on a screen
ATTENTION_TITLES = {"rfem3": "RFEM, stride 16", "rfem2": "RFEM, stride 8", "rfem1": "RFEM, stride 4", "rfem0": "RFEM, stride 2",
                    "cagm": "CAGM: what enters the others"}


def draw_errors(image, truth, prediction, enlarge=False, longest=None):
    """Returns the dimmed photograph with right (green), falsely found (yellow) and missed (violet) pixels, opaque: every pixel shows.

    image: as in `draw_detections`. truth, prediction: [H, W] integers, 0 background, 255 in the truth is not judged (grey). A damage
    taken for another class is drawn half and half: missed and false, in stripes. longest: a larger picture is reduced, by a whole
    number, to at most this longer side; a block then has the colour of most of its marked pixels, among equals that of the error, so
    that a crack of one pixel stays whole. Raises ValueError where sizes differ.
    """
    image, truth, prediction = to_picture(image), np.asarray(truth), np.asarray(prediction)
    if not truth.shape == prediction.shape == image.shape[:2]:
        raise ValueError(f"draw_errors expects maps of the picture's size {list(image.shape[:2])}, got {list(truth.shape)} and "
                         f"{list(prediction.shape)}")
    factor = enlargement(*truth.shape) if enlarge else 1
    canvas = (enlarged(image, factor) * DIMMED).astype(np.uint8)
    judged = truth != 255
    stripes = np.indices(truth.shape).sum(0) // 4 % 2 == 0
    other = (truth > 0) & (prediction > 0) & (truth != prediction) & judged
    layers = ((~judged, NOT_JUDGED), ((truth > 0) & (truth == prediction) & judged, RIGHT),
              (((truth == 0) & (prediction > 0) & judged) | (other & stripes), FALSE),
              (((truth > 0) & (prediction == 0) & judged) | (other & ~stripes), MISSED))
    reduction = -(-max(truth.shape) // longest) if longest else 1
    if reduction > 1:
        canvas, layers = np.array(Image.fromarray(canvas).reduce(reduction)), reduced(layers, reduction)
    for where, colour in layers:
        canvas[repeated(where, factor)] = colour
    return canvas


def reduced(layers, reduction):
    """[(bool [h, w], colour)] of layers [(bool [H, W], colour)], the last on top: blocks of reduction x reduction pixels, what is not
    judged under the others, of these the one with most pixels in the block."""
    H, W = layers[0][0].shape
    rows, columns = np.arange(0, H, reduction), np.arange(0, W, reduction)
    counts = np.stack([np.add.reduceat(np.add.reduceat(where.astype(np.int32), rows), columns, axis=1) for where, _ in layers])
    most = len(layers) - 1 - counts[:0:-1].argmax(0)                                         # [h, w]: among equals the upper layer
    return [(counts[0] > 0, layers[0][1]), *(((counts[k] > 0) & (most == k), layers[k][1]) for k in range(1, len(layers)))]


def draw_cracks(image, label_map, class_names):
    """Returns a copy of the photograph with each class's pixels tinted and outlined, thin ones with a halo that survives the screen; a tag
    says where nothing is found.

    image: uint8 [H, W, 3]; label_map: [H, W] integers 0..K. A crack of 3 pixels on a 12-megapixel photograph is less than one pixel
    wide on a screen: pixels around it, up to about one on the screen to each side, get a translucent halo of its colour. The
    pixels of the map itself are tinted as everywhere else, so zooming in shows exactly what was found.
    """
    canvas = to_picture(image).copy()
    H, W, _ = canvas.shape
    factor = enlargement(H, W)
    canvas, colours = enlarged(canvas, factor), class_colours(class_names)
    if not label_map.any():
        return with_label(canvas, "nothing found")
    halo = round(1.5 * max(H, W) / SHOWN_AT) if factor == 1 else 0
    for label in np.unique(label_map[label_map > 0]).tolist():
        mask, colour = label_map == label, colours[class_names[label - 1]]
        if halo > 1:
            wide = (squared_distances(mask) <= halo * halo) & (label_map == 0)
            canvas[wide] = (canvas[wide] * 0.35 + np.array(colour) * 0.65).astype(np.uint8)
        paint_mask(canvas, repeated(mask, factor), colour, max(1, line_width(*canvas.shape[:2]) // 2))
    return with_legend(canvas, repeated(label_map, factor), class_names)


def draw_attention(image, maps, label_map=None, class_names=(), cell=480):
    """Returns the strip of Context-CrackNet's Fig. 8: the picture, its prediction, and each attention map as heat over the picture.

    image: uint8 [H, W, 3]. maps: {"rfem3": [H, W], ...} as model.attention_maps gives them for one picture. RFEM's gates are shown on
    the common scale 0 to 1; CAGM's influence, which has none, from its own lowest to its highest value, printed in the title.
    """
    image = to_picture(image)
    H, W, _ = image.shape
    views = {f"picture, {W} x {H}": image}
    if label_map is not None:
        views["prediction"] = draw_cracks(image, np.asarray(label_map), class_names)
    scale = min(cell / max(H, W), 1.0)                        # heat is drawn at its final size: a large photograph costs no more
    size = max(1, round(W * scale)), max(1, round(H * scale))
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    for name, values in maps.items():
        values = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float32)
        low, high = (0.0, 1.0) if name.startswith("rfem") else (float(values.min()), float(values.max()))
        title = f"{ATTENTION_TITLES.get(name, name)}  ({values.min():.2f} to {values.max():.2f})"
        values = np.asarray(Image.fromarray((values - low) / max(high - low, 1e-9)).resize(size, Image.Resampling.BILINEAR))
        views[title] = heat_over(small, values)
    return grid(list(views.values()), list(views), columns=min(4, len(views)), cell=cell)


def heat_over(image, values, opacity=0.62):
    """The picture in grey with values [H, W] in 0..1 over it, dark blue to yellow."""
    grey = image.astype(np.float32).mean(axis=2, keepdims=True)
    return (grey * (1 - opacity) + heat(np.clip(values, 0, 1)).astype(np.float32) * opacity).astype(np.uint8)


def save_label_map(path, label_map, class_names):
    """Writes labels 0..K as an 8-bit palette PNG: readers of masks find the numbers, people see colours. Returns the path."""
    colours = class_colours(class_names)
    palette = np.zeros((256, 3), np.uint8)
    for k, name in enumerate(class_names, 1):
        palette[k] = colours[name]
    palette[255] = NOT_JUDGED
    picture = Image.fromarray(np.ascontiguousarray(label_map, np.uint8), "P")
    picture.putpalette(palette.ravel().tolist())
    write_beside(os.fspath(path), lambda stream: picture.save(stream, format="PNG", optimize=True))
    return path
