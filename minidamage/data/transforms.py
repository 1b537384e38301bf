"""Augmentation of one picture with its objects: horizontal flip, rotation, brightness (DamageNet's three), contrast, saturation.

Geometry is one 3x3 matrix in outer-corner pixel coordinates (the first pixel covers 0..1): the corners of polygons are multiplied by it
exactly and rasterised afterwards; the picture is resampled once, through its inverse, at pixel centres. Both
therefore meet at the same place, with no half-pixel shift (tests/test_data_transforms.py draws shapes to hold that).
"""
import dataclasses
import math

import numpy as np
from PIL import Image, ImageEnhance, ImageStat

from minidamage import masks as mask_codec
from minidamage.data.objects import polygon_area

FILL = (124, 116, 104)                         # what a rotation uncovers: the mean colour of ImageNet, 0 after normalisation
MIN_VISIBLE = 0.1                              # an object with less of its area left in the picture is no target. Not stated in the paper


@dataclasses.dataclass(frozen=True)
class Draw:
    """The random numbers of one sample."""

    flip: bool = False
    angle: float = 0.0                         # degrees, positive turns the picture clockwise (y grows down)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


def draw(recipe, rng):
    """One Draw from a Recipe's ranges. Every number is drawn whatever the ranges, so that switching one augmentation off leaves the
    others as they were under the same seed."""
    u = rng.random(5)
    spread = lambda width, v: 1.0 + width * (2.0 * v - 1.0)
    return Draw(flip=bool(u[0] < recipe.hflip), angle=recipe.rotate * (2.0 * u[1] - 1.0), brightness=spread(recipe.brightness, u[2]),
                contrast=spread(recipe.contrast, u[3]), saturation=spread(recipe.saturation, u[4]))


def matrix_of(flip, angle, width, height):
    """[3, 3] float64: flips, then turns about the picture's centre; maps points of the picture to points of the new one."""
    matrix = np.eye(3)
    if flip:
        matrix = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])
    if angle:
        c, s, x, y = math.cos(math.radians(angle)), math.sin(math.radians(angle)), width / 2, height / 2
        matrix = np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]]) @ matrix
    return matrix


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
    """Brightness, then contrast about the picture's mean grey, then saturation, as factors (1 = unchanged) on uint8 [H, W, 3].

    The first two are one table of 256 entries a channel.
    """
    picture = Image.fromarray(image)
    if draw.brightness != 1.0 or draw.contrast != 1.0:
        mean = draw.brightness * ImageStat.Stat(picture.convert("L")).mean[0] if draw.contrast != 1.0 else 0.0
        table = mean + draw.contrast * (draw.brightness * np.arange(256) - mean)
        picture = picture.point(np.clip(np.rint(table), 0, 255).astype(int).tolist() * 3)
    if draw.saturation != 1.0:
        picture = ImageEnhance.Color(picture).enhance(draw.saturation)
    return np.array(picture)


def apply(image, record, draw, with_masks=True):
    """One picture and its objects under a Draw.

    image: uint8 [H, W, 3], the record's picture, whole or reduced (then the objects are reduced with it).
    Returns (image uint8 [H, W, 3], boxes float32 [G, 4] xyxy, masks uint8 [G, H, W] or None, visible float [G]: the share
    of the object's area that is still in the picture). An object without a mask is its box.
    """
    height, width = image.shape[:2]
    matrix = matrix_of(draw.flip, draw.angle, width, height)
    if draw.angle:
        image = warp_picture(image, matrix)
    elif draw.flip:
        image = np.ascontiguousarray(image[:, ::-1])
    image = recolour(image, draw)

    scale = np.diag([width / record.width, height / record.height, 1.0])
    objects = matrix @ scale
    boxes = warp_boxes(record.boxes.astype(np.float64), objects, width, height)
    full = np.prod((record.boxes[:, 2:] - record.boxes[:, :2]).astype(np.float64), axis=1) * scale[0, 0] * scale[1, 1]
    visible = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) / np.maximum(full, 1e-9)
    if not with_masks:
        return image, boxes.astype(np.float32), None, visible
    masks = np.zeros((len(boxes), height, width), np.uint8)
    for i, segmentation in enumerate(record.masks):
        outline = segmentation if segmentation is not None else [record.boxes[i][[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)]
        masks[i] = warp_mask(outline, objects, height, width)
    pixels = masks.sum((1, 2), dtype=np.int64)
    # against the outline's own area: what the file gives as "area" may be the box's, and a thin scratch fills little of its box
    whole = np.array([_outline_area(m, r) for m, r in zip(record.masks, record.area)]) * scale[0, 0] * scale[1, 1]
    visible = np.where(pixels > 0, pixels / np.maximum(whole, 1e-9), 0.0)
    if draw.angle:
        boxes = np.where((pixels > 0)[:, None], boxes_of_masks(masks), boxes)
    return image, boxes.astype(np.float32), masks, visible


def _outline_area(segmentation, listed):
    if isinstance(segmentation, dict):
        return float(mask_codec.area([segmentation])[0])
    return sum(polygon_area(p) for p in segmentation) if segmentation is not None else listed
