"""Augmentation of one picture with its objects or its label map: flips, 90-degree turns, shift-scale-rotate, colour jitter, noise.

Geometry is one 3x3 matrix in outer-corner pixel coordinates (the first pixel covers 0..1): the corners of polygons are multiplied by it
exactly and rasterised afterwards; the picture is resampled once, bilinearly, and a label map once, by the nearest pixel, through its
inverse, at pixel centres. All
therefore meet at the same place, with no half-pixel shift (tests/test_data_transforms.py draws shapes to hold that).
What a shift, a rotation or a smaller scale uncovers is FILL in the picture and 255 (not judged) in a label map.

Large-scale jitter (Ghiasi et al. 2021, arXiv:2012.07177: factors 0.1 to 2) comes before all of it, as a step of its own: reduced by a
tenth, a picture has to be averaged, which no single lookup does. The scaled picture is a whole number of pixels, so is where it is cut.
"""
import dataclasses
import functools
import math
import statistics

import numpy as np
from PIL import Image, ImageEnhance, ImageStat

from minidamage import masks as mask_codec
from minidamage.data.label_maps import IGNORE
from minidamage.data.objects import polygon_area

FILL = (124, 116, 104)                         # what a rotation uncovers: the mean colour of ImageNet, 0 after normalisation
MIN_VISIBLE = 0.1                              # an object with less of its area left in the picture is no target. Not stated in the paper
# RGB to luma and two colour axes (NTSC's YIQ): a turn of the last two is a turn of the hue that keeps the brightness.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random numbers of one sample."""

    flip: bool = False
    angle: float = 0.0                         # degrees, positive turns the picture clockwise (y grows down)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    vflip: bool = False
    quarter_turns: int = 0                     # clockwise, 0..3, after the flips; an odd number only where the picture is a square
    shift: tuple = (0.0, 0.0)                  # shares of width and height, right and down
    scale: float = 1.0
    hue: float = 0.0                           # share of the colour circle
    noise: float = 0.0                         # standard deviation, of 0..255
    noise_seed: int = 0
    jitter: float = 1.0                        # large-scale jitter's factor
    cut: tuple = (0.0, 0.0)                    # where a picture that it made larger is cut: shares of what is left and above, 0..1
    shorter_side: int = 0                      # pixels the model resizes the picture's shorter side to; 0: as its config has it


def draw(recipe, rng):
    """One Draw from a Recipe's ranges. Every number is drawn whatever the ranges, so that switching one augmentation off leaves the
    others as they were under the same seed."""
    flip, angle, brightness, contrast, saturation = rng.random(5)                  # each 0 <= number < 1; the order is part of a seed
    moved, vflip, turned, turns, right, down, scale, hue, noise = rng.random(9)
    jitter, cut_left, cut_top, shorter_side = rng.random(4)
    either_way = lambda width, number: width * (2.0 * number - 1.0)                # -width <= result < width
    moved = moved < recipe.shift_scale_rotate
    smallest, largest = recipe.jitter_scale or (1.0, 1.0)
    return Draw(flip=bool(flip < recipe.hflip), vflip=bool(vflip < recipe.vflip),
                quarter_turns=1 + int(3 * turns) if turned < recipe.rot90 else 0,
                angle=either_way(recipe.rotate, angle) if moved else 0.0, scale=1.0 + either_way(recipe.scale, scale) if moved else 1.0,
                shift=(either_way(recipe.shift, right), either_way(recipe.shift, down)) if moved else (0.0, 0.0),
                brightness=1.0 + either_way(recipe.brightness, brightness), contrast=1.0 + either_way(recipe.contrast, contrast),
                saturation=1.0 + either_way(recipe.saturation, saturation), hue=either_way(recipe.hue, hue),
                noise=recipe.noise * noise, noise_seed=int(noise * 2 ** 53) if recipe.noise else 0,
                jitter=smallest + (largest - smallest) * jitter, cut=(cut_left, cut_top) if recipe.jitter_scale else (0.0, 0.0),
                shorter_side=recipe.multi_scale[int(shorter_side * len(recipe.multi_scale))] if recipe.multi_scale else 0)


def jitter_geometry(draw, width, height):
    """Large-scale jitter of a picture: (width, height) it is scaled to, (x, y) of the scaled picture's pixel that comes to the corner.

    Both are whole numbers: the scaled picture is cut there to the old size, or padded on the right and below.
    """
    size = max(1, round(width * draw.jitter)), max(1, round(height * draw.jitter))
    left, top = (round(share * max(0, after - before)) for share, after, before in zip(draw.cut, size, (width, height)))
    return size, (left, top)


def jitter_matrix(draw, width, height):
    """[3, 3] float64: points of the picture to points of the jittered one."""
    (w, h), (left, top) = jitter_geometry(draw, width, height)
    return np.array([[w / width, 0.0, -left], [0.0, h / height, -top], [0, 0, 1]])


def jitter(pixels, draw, fill=FILL, resample=Image.Resampling.BILINEAR):
    """A picture [H, W, 3] or a label map [H, W] scaled and cut or padded: the same size comes back. Reduced, a picture is averaged."""
    if draw.jitter == 1.0:
        return pixels
    height, width = pixels.shape[:2]
    (w, h), (left, top) = jitter_geometry(draw, width, height)
    seen = min(w, width), min(h, height)                          # pixels of the result that show the picture
    box = left * width / w, top * height / h, (left + seen[0]) * width / w, (top + seen[1]) * height / h
    box = box[0], box[1], min(box[2], width), min(box[3], height)      # rounding may pass the border by 1e-13
    source = Image.fromarray(pixels)
    canvas = Image.new(source.mode, (width, height), fill)
    canvas.paste(source.resize(seen, resample, box))
    return np.array(canvas)


def matrix_of(draw, width, height):
    """[3, 3] float64: flips, quarter turns, then scale, rotation and shift about the picture's centre; maps points of the picture to points
    of the new one, which has the same size."""
    x, y = width / 2, height / 2
    matrix = np.diag([-1.0 if draw.flip else 1.0, -1.0 if draw.vflip else 1.0, 1.0])                 # about the centre, as all below
    for _ in range(_quarter_turns(draw, width, height)):
        matrix = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]) @ matrix
    if _resampled(draw):
        c, s = draw.scale * math.cos(math.radians(draw.angle)), draw.scale * math.sin(math.radians(draw.angle))
        matrix = np.array([[c, -s, draw.shift[0] * width], [s, c, draw.shift[1] * height], [0, 0, 1]]) @ matrix
    return np.array([[1.0, 0, x], [0, 1, y], [0, 0, 1]]) @ matrix @ np.array([[1.0, 0, -x], [0, 1, -y], [0, 0, 1]])


def _quarter_turns(draw, width, height):
    """A picture that is no square keeps its shape: pictures of a batch have one size. It is turned by 180 degrees then, or not."""
    return draw.quarter_turns if width == height or draw.quarter_turns != 1 and draw.quarter_turns != 3 else 0


def _resampled(draw):
    return bool(draw.angle or draw.scale != 1.0 or any(draw.shift))


def move(pixels, draw, matrix, fill=FILL, resample=Image.Resampling.BILINEAR):
    """A picture [H, W, 3] or a label map [H, W] under a Draw whose matrix this is; flips and quarter turns are exact."""
    if _resampled(draw):
        return warp_picture(pixels, matrix, fill, resample)
    height, width = pixels.shape[:2]
    pixels = pixels[::-1 if draw.vflip else 1, ::-1 if draw.flip else 1]
    return np.ascontiguousarray(np.rot90(pixels, -_quarter_turns(draw, width, height)))              # numpy turns the other way


def warp_points(points, matrix):
    """points [P, 2] through an affine matrix [3, 3]."""
    return np.asarray(points, np.float64) @ matrix[:2, :2].T + matrix[:2, 2]


def warp_picture(image, matrix, fill=FILL, resample=Image.Resampling.BILINEAR):
    """image: uint8 [H, W, 3] or [H, W]; the same size comes back. Pillow evaluates the inverse map at pixel centres."""
    source = Image.fromarray(image)
    inverse = np.linalg.inv(matrix)
    return np.array(source.transform(source.size, Image.Transform.AFFINE, inverse[:2].ravel().tolist(), resample, fillcolor=fill))


def warp_mask(segmentation, matrix, height, width):
    """A record's segmentation through the matrix, as uint8 [height, width].

    Polygons are moved by their corners; an RLE is decoded and looked up at pixel centres.
    """
    if isinstance(segmentation, dict):
        mask = mask_codec.decode(segmentation)
        if np.array_equal(matrix, np.eye(3)) and mask.shape == (height, width):
            return mask
        inverse = np.linalg.inv(matrix)[:2].ravel().tolist()
        moved = Image.fromarray(mask * np.uint8(255)).transform((width, height), Image.Transform.AFFINE, inverse, Image.Resampling.NEAREST)
        return (np.asarray(moved) > 127).astype(np.uint8)
    moved = [warp_points(polygon, matrix) for polygon in segmentation]
    return mask_codec.decode(mask_codec.from_polygons(moved, height, width))


def warp_boxes(boxes, matrix, width, height):
    """The boxes' corners moved, then their extent, clipped to the picture. boxes: [G, 4] xyxy."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 2)
    moved = warp_points(corners, matrix).reshape(-1, 4, 2)
    out = np.concatenate([moved.min(1), moved.max(1)], axis=1) if len(boxes) else np.zeros((0, 4))
    return np.clip(out, 0, [width, height, width, height])


def boxes_of_masks(masks):
    """Tight xyxy boxes [G, 4] float64 of masks uint8 [G, H, W]; zeros for an empty mask."""
    boxes = np.zeros((len(masks), 4))
    for i, mask in enumerate(masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            boxes[i] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def recolour(image, draw):
    """Brightness, then contrast about the picture's mean grey, then saturation, as factors (1 = unchanged), hue, noise; uint8 [H, W, 3].

    The first two are one table of 256 entries a channel, the hue is one 3x3 matrix.
    """
    picture = Image.fromarray(image)
    if draw.brightness != 1.0 or draw.contrast != 1.0:
        mean = draw.brightness * ImageStat.Stat(picture.convert("L")).mean[0] if draw.contrast != 1.0 else 0.0
        table = mean + draw.contrast * (draw.brightness * np.arange(256) - mean)
        picture = picture.point(np.clip(np.rint(table), 0, 255).astype(int).tolist() * 3)
    if draw.saturation != 1.0:
        picture = ImageEnhance.Color(picture).enhance(draw.saturation)
    if draw.hue:
        picture = picture.convert("RGB", hue_matrix(draw.hue))
    return add_noise(np.array(picture), draw.noise, draw.noise_seed) if draw.noise else np.array(picture)


def hue_matrix(hue):
    """The 12 numbers, rows of [R, G, B, 1], that turn the hue by a share of the circle (1/3 takes red to about green)."""
    c, s = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    turn = np.linalg.inv(YIQ) @ np.array([[1, 0, 0], [0, c, s], [0, -s, c]]) @ YIQ
    return np.pad(turn, ((0, 0), (0, 1))).ravel().tolist()


def add_noise(image, deviation, seed):
    """uint8 [H, W, 3] with Gaussian noise of this standard deviation (0..255) on every pixel and channel, rounded and clipped.

    16 random bits a value look up a normal quantile (up to 4.2 deviations), already scaled and rounded: less than half the
    time of standard_normal, which would be rounded to the same whole numbers.
    """
    steps = np.rint(deviation * _normal_quantiles()).astype(np.int16)
    noise = steps[np.random.default_rng(seed).integers(0, len(steps), image.shape, np.uint16)]
    noise += image
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


@functools.cache
def _normal_quantiles():
    """float32 [65536]: the quantiles of a standard normal at the middles of 65536 equal shares."""
    upper = [statistics.NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    return np.array([-v for v in reversed(upper)] + upper, np.float32)


def apply(image, record, draw, with_masks=True):
    """One picture and its objects under a Draw.

    image: uint8 [H, W, 3], the record's picture, whole or reduced (then the objects are reduced with it).
    Returns (image uint8 [H, W, 3], boxes float32 [G, 4] xyxy, masks uint8 [G, H, W] or None, visible float [G]: the share
    of the object's area that is still in the picture). An object without a mask is its box.
    """
    height, width = image.shape[:2]
    matrix = matrix_of(draw, width, height)
    image = recolour(move(jitter(image, draw), draw, matrix), draw)

    jittered = jitter_matrix(draw, width, height) @ np.diag([width / record.width, height / record.height, 1.0])
    objects = matrix @ jittered
    boxes, cut = record.boxes.astype(np.float64), draw.jitter > 1.0 and _resampled(draw)      # at the jitter's border, before it moves
    if cut:
        boxes = warp_boxes(boxes, jittered, width, height)
        gone = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        boxes = np.where(gone[:, None], 0.0, warp_boxes(boxes, matrix, width, height))
    else:
        boxes = warp_boxes(boxes, objects, width, height)
    grown = abs(np.linalg.det(objects))                  # how many pixels of the sample one of the record's becomes
    full = np.prod((record.boxes[:, 2:] - record.boxes[:, :2]).astype(np.float64), axis=1) * grown
    visible = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / np.maximum(full, 1e-9)
    if not with_masks:
        return image, boxes.astype(np.float32), None, visible
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for i, outline in enumerate(record.outlines):
        masks[i] = warp_mask(outline, objects, height, width)
    if cut:
        masks &= warp_mask([np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float64)], matrix, height, width)
    pixels = masks.sum((1, 2), dtype=np.int64)
    # against the outline's own area: what the file gives as "area" may be the box's, and a thin scratch fills little of its box
    whole = np.array([_outline_area(m, r) for m, r in zip(record.masks, record.area)]) * grown
    visible = np.where(pixels > 0, pixels / np.maximum(whole, 1e-9), 0.0)
    if _resampled(draw) or draw.jitter != 1.0:
        boxes = np.where((pixels > 0)[:, None], boxes_of_masks(masks), boxes)
    return image, boxes.astype(np.float32), masks, visible


def apply_to_label_map(image, labels, draw):
    """One picture and its label map under a Draw: (image uint8 [H, W, 3], labels uint8 [H, W]); what is uncovered becomes IGNORE."""
    matrix = matrix_of(draw, image.shape[1], image.shape[0])
    labels = move(jitter(labels, draw, IGNORE, Image.Resampling.NEAREST), draw, matrix, IGNORE, Image.Resampling.NEAREST)
    return recolour(move(jitter(image, draw), draw, matrix), draw), labels


def _outline_area(segmentation, listed):
    if isinstance(segmentation, dict):
        return float(mask_codec.area([segmentation])[0])
    return sum(polygon_area(p) for p in segmentation) if segmentation is not None else listed
