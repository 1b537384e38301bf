"""Masks as run lengths (COCO RLE) and polygons: what the annotations hold, what the metrics compare, what predict.py writes.

An RLE is COCO's dict {"size": [height, width], "counts": bytes}. The runs alternate background, foreground, background ... and walk
the picture *column by column*. `counts` is the compressed text form (bytes or str) or the plain list of runs. Every function here
gives the numbers of pycocotools' mask module, to the bit, and raises ValueError where the runs do not add up to height * width.

Each function has two bodies: the plain numpy one in `mask_reference.py` (read that to learn the rule) and a C++ twin in
`csrc/rle.h`, used when the extension is built. Coordinates: (0, 0) is the outer corner of the first pixel, x right, y down.
"""
import math

import numpy as np

from minidamage import mask_reference as reference
from minidamage.ops import _extension

MAX_SIDE = 1 << 24            # pixels of a picture; a dozen characters of run lengths could ask for the memory of billions of columns
MAX_COORDINATE = 1e6        # pixels; a polygon point farther out is a mistake in the file, and would cost memory by its length


def native_module():
    """The C++ twin (csrc/evaluation.cpp) or None: then the numpy reference runs."""
    return _extension.load_evaluation()


# ---- dense <-> RLE ---------------------------------------------------------------------------------------------------------------

def encode(mask):
    """Returns the RLE of a mask [H, W] (bool or integer, non-zero = foreground), or the list of N RLEs of a stack [N, H, W]."""
    mask = np.asarray(mask)
    if mask.ndim not in (2, 3):
        raise ValueError(f"encode expects a mask [H, W] or a stack [N, H, W], got shape {list(mask.shape)}; squeeze or split it first")
    stack = _as_bytes(mask.reshape((-1, *mask.shape[-2:])) if mask.ndim == 3 else mask[None])       # [N, H, W]
    native, size = native_module(), [int(mask.shape[-2]), int(mask.shape[-1])]
    if native is not None:
        counts = native.encode(stack)
    else:
        counts = [reference.compress(reference.runs_of_mask(m)) for m in stack]
    rles = [{"size": list(size), "counts": c} for c in counts]
    return rles if mask.ndim == 3 else rles[0]


def decode(rles):
    """Returns the mask [H, W] uint8 (0 or 1) of an RLE, or the stack [N, H, W] of a list of N >= 1 RLEs of one size."""
    counts, sizes = unpack(rles)
    if len(counts) == 0:
        raise ValueError("decode expects at least one RLE, got an empty list: the picture's size is not known")
    height, width = _one_size(sizes, "decode")
    native = native_module()
    if native is not None:
        stack = native.decode(counts, height, width)
    else:
        stack = np.stack([reference.mask_of_runs(r, height, width) for r in _runs(counts, sizes)])
    return stack[0] if isinstance(rles, dict) else stack


def from_polygons(polygons, height, width, even_odd=False):
    """Returns one RLE for a list of polygons: their union, as pycocotools' frPyObjects + merge.

    polygons: list of [P, 2] arrays or flat lists x0, y0, x1, y1, ...; pixels, (0, 0) the outer corner of the first pixel. Parts outside
    the picture are cut off. even_odd=True: a pixel is inside if an odd number of rings cover it, so holes are rings like any other
    (the form that `to_polygons` returns). Raises ValueError for odd lists, non-finite or absurdly far points.
    """
    rings = [_ring(p) for p in polygons]
    native = native_module()
    if native is not None:
        counts = native.from_polygons(rings, int(height), int(width), bool(even_odd))
    else:
        counts = reference.compress(reference.runs_of_polygons(rings, height, width, even_odd))
    return {"size": [int(height), int(width)], "counts": counts}


def segmentation_to_rle(segmentation, height, width):
    """Returns the RLE of a stored segmentation: a list of polygons (holes are not part of COCO's polygon form) or an RLE dict.

    Raises ValueError if there is no segmentation, or if the RLE's size is not (height, width).
    """
    if isinstance(segmentation, dict):
        counts, sizes = unpack(segmentation)
        if tuple(sizes[0]) != (height, width):
            raise ValueError(f"segmentation_to_rle expects an RLE of size [{height}, {width}] (height, width of the picture), got "
                             f"{list(map(int, sizes[0]))}; check whether the two are swapped or the picture was resized")
        area(segmentation)                                                      # raises if the runs do not add up
        return {"size": [int(height), int(width)], "counts": counts[0]}
    if segmentation is None or len(segmentation) == 0:
        raise ValueError("segmentation_to_rle expects a list of polygons or an RLE dict, got none; the object has only a box")
    if np.isscalar(segmentation[0]):
        segmentation = [segmentation]                                           # one flat polygon without the outer list
    return from_polygons(segmentation, height, width)


# ---- numbers of RLEs -------------------------------------------------------------------------------------------------------------

def merge(rles, intersect=False):
    """Returns the union (or intersection) of a list of N >= 1 RLEs of one size, as one RLE."""
    counts, sizes = unpack(rles)
    if len(counts) == 0:
        raise ValueError("merge expects at least one RLE, got an empty list: the picture's size is not known")
    height, width = _one_size(sizes, "merge")
    native = native_module()
    if native is not None:
        merged = native.merge(counts, height, width, bool(intersect))
    else:
        merged = reference.compress(reference.merge_runs(_runs(counts, sizes), intersect))
    return {"size": [height, width], "counts": merged}


def area(rles):
    """Returns the number of foreground pixels: int64 [N] for a list, an int for one RLE."""
    counts, sizes = unpack(rles)
    native = native_module()
    if native is not None:
        areas = native.area(counts, sizes)
    else:
        areas = np.array([r[1::2].sum() for r in _runs(counts, sizes)], np.int64)
    return int(areas[0]) if isinstance(rles, dict) else areas


def to_boxes(rles):
    """Returns the tight boxes of the foreground, float64 [N, 4] xyxy (outer corners); zeros for an empty mask; [4] for one RLE."""
    counts, sizes = unpack(rles)
    native = native_module()
    if native is not None:
        boxes = native.boxes(counts, sizes)
    else:
        boxes = np.array([reference.box_of_runs(r, s[0]) for r, s in zip(_runs(counts, sizes), sizes)], np.float64).reshape(-1, 4)
    return boxes[0] if isinstance(rles, dict) else boxes


def iou(dt, gt, iscrowd=None):
    """Returns the mask IoU of every detection with every truth, float64 [D, G].

    iscrowd: [G] bool; for a crowd column the denominator is the detection's own area (COCO: a detection inside a crowd region fits it).
    Raises ValueError if the masks are not all of one size.
    """
    dt_counts, dt_sizes = unpack(dt)
    gt_counts, gt_sizes = unpack(gt)
    crowd = np.zeros(len(gt_counts), np.uint8) if iscrowd is None else np.ascontiguousarray(iscrowd, np.uint8)
    if crowd.shape != (len(gt_counts),):
        raise ValueError(f"iou expects iscrowd with one entry for each of the {len(gt_counts)} truths, got shape {list(crowd.shape)}")
    if len(dt_counts) == 0 or len(gt_counts) == 0:
        return np.zeros((len(dt_counts), len(gt_counts)))
    _one_size(np.concatenate([dt_sizes, gt_sizes]), "iou")
    native = native_module()
    if native is not None:
        return native.iou(dt_counts, dt_sizes, gt_counts, gt_sizes, crowd)
    return reference.iou_of_runs(_runs(dt_counts, dt_sizes), _runs(gt_counts, gt_sizes), crowd)


# ---- shapes ----------------------------------------------------------------------------------------------------------------------

def to_polygons(mask):
    """Returns the outlines of a mask [H, W]: a list of (outer ring [P, 2] float64, list of hole rings [Q, 2]).

    One entry for each 8-connected component, in raster order. Rings run along pixel edges, clockwise as seen on the screen (holes the
    other way), vertices only where the direction changes, so nothing is lost: `from_polygons([outer, *holes], H, W, even_odd=True)` of
    all entries gives the mask back, and so does any even-odd fill.
    """
    mask = _as_bytes(_one_mask(mask, "to_polygons"))
    native = native_module()
    x0, y0, x1, y1 = to_boxes(encode(mask)).astype(int)
    mask = np.ascontiguousarray(mask[y0:y1, x0:x1])                             # the walk costs time by the picture's size
    rings = native.trace(mask) if native is not None else reference.trace_rings(mask)
    rings = [(ring + (x0, y0), label, is_hole) for ring, label, is_hole in rings]
    outlines = {label: (ring, []) for ring, label, is_hole in rings if not is_hole}
    for ring, label, is_hole in rings:
        if is_hole:
            outlines[label][1].append(ring)
    return [outlines[label] for label in sorted(outlines)]


def connected_components(mask, connectivity=8):
    """Returns (labels int32 [H, W], n): 0 background, components 1..n in raster order of their first pixel. connectivity: 4 or 8."""
    if connectivity not in (4, 8):
        raise ValueError(f"connected_components expects connectivity 4 or 8, got {connectivity}")
    mask = _as_bytes(_one_mask(mask, "connected_components"))
    native = native_module()
    return native.components(mask, connectivity) if native is not None else reference.label_components(mask, connectivity)


def fill_holes(masks):
    """Returns the masks with their holes filled: background that no 4-connected path joins to the picture's border becomes foreground.

    masks: bool or integer [H, W] or [N, H, W] (bool comes back), or one RLE, or a list of RLEs (the same comes back). On RLEs the cost
    goes with the number of runs, not of pixels. Source: DamageNet's post-processing.
    """
    return _transform(masks, "fill_holes", 0)


def remove_islands(masks, min_area):
    """Returns the masks without their 8-connected components of fewer than `min_area` pixels. Forms as in `fill_holes`."""
    return _transform(masks, "remove_islands", math.ceil(min_area))


def _transform(masks, name, min_area):
    native = native_module()
    if isinstance(masks, dict) or (isinstance(masks, (list, tuple)) and all(isinstance(m, dict) for m in masks)):
        counts, sizes = unpack(masks)
        if native is not None:
            new = native.fill_holes(counts, sizes) if name == "fill_holes" else native.remove_islands(counts, sizes, min_area)
        else:
            new = [reference.compress(_transform_runs(r, int(h), int(w), name, min_area))
                   for r, (h, w) in zip(_runs(counts, sizes), sizes)]
        rles = [{"size": [int(h), int(w)], "counts": c} for c, (h, w) in zip(new, sizes)]
        return rles[0] if isinstance(masks, dict) else rles
    masks = np.asarray(masks)
    if masks.ndim not in (2, 3):
        raise ValueError(f"{name} expects masks [H, W] or [N, H, W] or RLEs, got shape {list(masks.shape)}")
    stack = _as_bytes(masks.reshape((-1, *masks.shape[-2:])) if masks.ndim == 3 else masks[None])
    if native is not None:
        new = native.fill_holes_dense(stack) if name == "fill_holes" else native.remove_islands_dense(stack, min_area)
    else:
        h, w = stack.shape[1:]
        new = np.array([reference.mask_of_runs(_transform_runs(reference.runs_of_mask(m), h, w, name, min_area), h, w) for m in stack],
                       np.uint8).reshape(stack.shape)
    return new.reshape(masks.shape).view(bool)


def _transform_runs(runs, height, width, name, min_area):
    if name == "fill_holes":
        return reference.fill_holes_in_runs(runs, height, width)
    return reference.remove_islands_from_runs(runs, height, width, min_area)


# ---- checks ----------------------------------------------------------------------------------------------------------------------

def _as_bytes(mask):
    """A C-contiguous uint8 array of zeros and ones; a bool array is reinterpreted, not copied."""
    mask = np.ascontiguousarray(mask)
    return mask.view(np.uint8) if mask.dtype == bool else (mask != 0).view(np.uint8)


def _one_mask(mask, name):
    mask = decode(mask) if isinstance(mask, dict) else np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"{name} expects one mask [H, W], got shape {list(mask.shape)}; call it for each mask")
    return mask


def _ring(points):
    points = np.asarray(points, np.float64)
    if points.ndim == 1 and points.size % 2 or points.ndim == 2 and points.shape[1] != 2 or points.ndim > 2 or points.ndim == 0:
        raise ValueError(f"from_polygons expects rings [P, 2] or flat lists x0, y0, x1, y1, ..., got shape {list(points.shape)}")
    points = np.ascontiguousarray(points.reshape(-1, 2))
    if not (np.abs(points) <= MAX_COORDINATE).all():                            # false for NaN too
        raise ValueError(f"from_polygons expects finite points within {MAX_COORDINATE:g} pixels, got {points.min()} to {points.max()}; "
                         "check the annotation's coordinates")
    return points


def unpack(rles):
    """(list of compressed counts, sizes int64 [N, 2]) of an RLE or a list of RLEs."""
    rles = [rles] if isinstance(rles, dict) else list(rles)
    try:
        counts = [r["counts"] for r in rles]
        sizes = np.array([r["size"] for r in rles], np.int64).reshape(-1, 2)
        if len(sizes) != len(counts):
            raise ValueError
    except (TypeError, KeyError, ValueError, OverflowError):
        raise ValueError('an RLE is a dict {"size": [height, width], "counts": bytes, str or list of runs}, got '
                         f"{next((r for r in rles if not _is_rle(r)), None)!r:.120}") from None
    if len(sizes) and not 0 <= sizes.min() <= sizes.max() <= MAX_SIDE:
        wrong = next(size for size in sizes.tolist() if not 0 <= min(size) <= max(size) <= MAX_SIDE)
        raise ValueError(f"an RLE's size is [height, width], from 0 to {MAX_SIDE} pixels a side, got {wrong}")
    return [c if isinstance(c, bytes) else c.encode("ascii", "replace") if isinstance(c, str) else _compress_list(c) for c in counts], sizes


def _is_rle(value):
    try:
        return "counts" in value and np.array(value["size"], np.int64).shape == (2,)
    except (TypeError, KeyError, ValueError, OverflowError):
        return False


def _compress_list(runs):
    runs = np.asarray(runs, np.int64)
    if runs.ndim != 1 or (runs < 0).any():
        raise ValueError(f"an uncompressed RLE's counts are a flat list of runs >= 0, got {runs.tolist()!r:.80}")
    native = native_module()
    return native.compress(runs) if native is not None else reference.compress(runs)


def _runs(counts, sizes):
    """The runs of each RLE (int64 arrays), for the numpy reference; raises if they do not add up to the size."""
    runs = [reference.expand(c) for c in counts]
    for i, (r, (h, w)) in enumerate(zip(runs, sizes)):
        if r.sum() != h * w or (r < 0).any():
            raise ValueError(f"RLE {i}: its runs add up to {int(r.sum())} pixels, expected height * width = {int(h)} * {int(w)} = "
                             f"{int(h * w)}; the size or the counts belong to another picture")
    return runs


def _one_size(sizes, name):
    if (sizes != sizes[0]).any():
        raise ValueError(f"{name} expects RLEs of one size, got {sorted({tuple(map(int, s)) for s in sizes})[:4]} (height, width)")
    return int(sizes[0, 0]), int(sizes[0, 1])
