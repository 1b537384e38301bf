"""The rules behind `masks.py`, in plain numpy: run lengths, COCO's polygon fill, components. `csrc/rle.h` does the same, faster.

A mask is held as its runs: int64 lengths, background first, walking the picture column by column. Two views of the runs recur:
`bounds`, the sorted positions where the value changes (the cumulated runs), and `segments`, the foreground pieces of single
columns. Source of the rules: the COCO API's mask format (T.-Y. Lin et al., Microsoft COCO, 2014).
"""
import numpy as np


# ---- runs and their text form ----------------------------------------------------------------------------------------------------

def runs_of_mask(mask):
    """Runs of a mask [H, W]; the first run is background and may be 0."""
    flat = np.asarray(mask).ravel(order="F") != 0
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff(np.concatenate([[0], changes, [flat.size]]))


def mask_of_runs(runs, height, width):
    """The mask [H, W] uint8, C-contiguous."""
    flat = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs)
    return np.ascontiguousarray(flat.reshape(width, height).T)


def compress(runs):
    """COCO's text form: each run from the fourth on as its difference to the run two before, in 5-bit groups, low first.

    A character is 48 + group + (32 if more groups follow); bit 4 of the last group is the sign.
    """
    text = bytearray()
    for i, run in enumerate(map(int, runs)):
        value = run - int(runs[i - 2]) if i > 2 else run
        more = True
        while more:
            group, value = value & 31, value >> 5                    # arithmetic shift: -1 stays -1
            more = value != (-1 if group & 16 else 0)
            text.append(48 + group + 32 * more)
    return bytes(text)


def expand(counts):
    """The runs of a text form, int64. Raises ValueError for characters outside 48..111 or a cut-off number."""
    runs, value, shift = [], 0, 0
    for char in counts:
        if not 48 <= char <= 111 or shift > 55:
            raise ValueError(f"RLE counts: expected characters '0'..'o', got {chr(char)!r}; is this another encoding of the mask?")
        group = char - 48
        value |= (group & 31) << shift
        shift += 5
        if not group & 32:
            value -= (1 << shift) if group & 16 else 0
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    if shift:
        raise ValueError("RLE counts: the last number is cut off; the text was shortened")
    return np.array(runs, np.int64)


def runs_of_toggles(positions, total):
    """Runs from positions where the value changes, in any order; a position named twice changes nothing."""
    positions, times = np.unique(np.asarray(positions, np.int64), return_counts=True)
    bounds = positions[times % 2 == 1]
    return np.diff(np.concatenate([[0], bounds[bounds < total], [total]]))


# ---- polygons --------------------------------------------------------------------------------------------------------------------

UPSAMPLE = 5        # COCO draws the outline on a grid five times finer and keeps the crossings of pixel-centre columns


def runs_of_polygons(rings, height, width, even_odd):
    """Runs of the union (or even-odd fill) of rings [P, 2] float64."""
    total = height * width
    toggles = [column_crossings(ring, height, width) for ring in rings]
    if even_odd or len(rings) <= 1:
        return runs_of_toggles(np.concatenate([[], *toggles]), total)
    return merge_runs([runs_of_toggles(t, total) for t in toggles], intersect=False)


def column_crossings(ring, height, width):
    """Positions (x * height + y) at which the outline of a ring [P, 2] crosses the centres of the pixel columns.

    On the fine grid an edge is drawn with one point a step along its longer axis. Where it steps between the fine columns 5x + 2 and
    5x + 3, that is across the centre of pixel column x, everything in this column from row ceil((v + .5) / 5 - .5) on changes sides;
    v is the upper of the two fine points.
    """
    points = np.trunc(UPSAMPLE * ring + 0.5).astype(np.int64)
    crossings = []
    for (xs, ys), (xe, ye) in zip(points, np.roll(points, -1, axis=0)):
        dx, dy = abs(xe - xs), abs(ye - ys)
        if dx == 0:
            continue                                                 # a vertical edge crosses no column
        if dx >= dy:
            if xs > xe:
                xs, ys, xe, ye = xe, ye, xs, ys
            t = np.arange(dx + 1)
            u, v = xs + t, np.trunc(ys + ((ye - ys) / dx) * t + 0.5)
        else:
            if ys > ye:
                xs, ys, xe, ye = xe, ye, xs, ys
            t = np.arange(dy + 1)
            u, v = np.trunc(xs + ((xe - xs) / dy) * t + 0.5), ys + t
        steps = np.flatnonzero(u[1:] != u[:-1])
        column = np.minimum(u[steps], u[steps + 1])
        row = np.minimum(v[steps], v[steps + 1])
        x = (column - UPSAMPLE // 2) / UPSAMPLE
        y = np.ceil(np.clip((row + 0.5) / UPSAMPLE - 0.5, 0, height))
        keep = (x == np.floor(x)) & (x >= 0) & (x <= width - 1)
        crossings.append((x * height + y)[keep].astype(np.int64))
    return np.concatenate([np.zeros(0, np.int64), *crossings])


# ---- set algebra -----------------------------------------------------------------------------------------------------------------

def merge_runs(many_runs, intersect):
    """Runs of the union or intersection: count how many masks cover each stretch between two bounds of any of them."""
    total = int(many_runs[0].sum())
    positions = np.concatenate([np.cumsum(r)[:2 * (len(r) // 2)] for r in many_runs])        # start, end, start, end, ...
    steps = np.concatenate([np.tile([1, -1], len(r) // 2) for r in many_runs])
    order = np.argsort(positions, kind="stable")
    positions, cover = positions[order], np.cumsum(steps[order])
    last = np.append(positions[1:] != positions[:-1], True)[:len(positions)]                 # the cover after all steps at a position
    inside = cover[last] >= (len(many_runs) if intersect else 1)
    return runs_of_toggles(positions[last][np.diff(inside, prepend=False)], total)


def iou_of_runs(dt_runs, gt_runs, crowd):
    """IoU [D, G] float64; crowd [G]: the denominator is the detection's area."""
    ious = np.zeros((len(dt_runs), len(gt_runs)))
    for d, dt in enumerate(dt_runs):
        bounds = np.concatenate([[0], np.cumsum(dt)])
        covered = np.concatenate([[0], np.cumsum(np.where(np.arange(len(dt)) % 2, dt, 0))])   # pixels of dt before each bound
        dt_area = covered[-1]
        for g, gt in enumerate(gt_runs):
            gt_bounds = np.cumsum(gt)[:2 * (len(gt) // 2)]
            before = np.interp(gt_bounds, bounds, covered)           # slopes are 0 or 1: exact
            intersection = (before[1::2] - before[::2]).sum()
            union = dt_area if crowd[g] else dt_area + gt[1::2].sum() - intersection
            ious[d, g] = intersection / union if intersection > 0 else 0.0
    return ious


def box_of_runs(runs, height):
    """Tight box xyxy of the foreground; zeros for an empty mask."""
    column, start, end = column_segments(runs, int(height))
    if len(column) == 0:
        return [0, 0, 0, 0]
    return [column.min(), start.min(), column.max() + 1, end.max()]


# ---- components ------------------------------------------------------------------------------------------------------------------

def column_segments(runs, height):
    """(column, start, end) int64 arrays: the foreground cut at the columns, pixels start <= y < end, in the order of the runs."""
    bounds = np.cumsum(runs)[:2 * (len(runs) // 2)]
    starts, ends = bounds[::2], bounds[1::2]
    starts, ends = starts[ends > starts], ends[ends > starts]
    first = starts // height
    pieces = (ends - 1) // height - first + 1
    run = np.repeat(np.arange(len(starts)), pieces)
    column = first[run] + np.arange(len(run)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return column, np.maximum(starts[run] - column * height, 0), np.minimum(ends[run] - column * height, height)


def runs_of_segments(column, start, end, height, width):
    return runs_of_toggles(np.concatenate([column * height + start, column * height + end]), height * width)


def label_segments(column, start, end, connectivity):
    """Component of each segment, 0..n-1 in order of first appearance: union-find over segments that touch in neighbouring columns."""
    parent = list(range(len(column)))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    column, start, end = column.tolist(), start.tolist(), end.tolist()
    reach = 1 if connectivity == 8 else 0                            # 8: a shared corner is enough
    left = 0                                                         # first segment of the column before that may still touch
    for i in range(len(column)):
        while left < i and (column[left] < column[i] - 1 or (column[left] == column[i] - 1 and end[left] + reach <= start[i])):
            left += 1
        j = left
        while j < i and column[j] == column[i] - 1 and start[j] < end[i] + reach:
            a, b = root(i), root(j)
            parent[max(a, b)] = min(a, b)
            j += 1
    roots = np.array([root(i) for i in range(len(column))], np.int64)
    return np.unique(roots, return_inverse=True)[1].reshape(-1)      # the smallest member is the first: sorted roots = first appearance


def label_components(mask, connectivity):
    """(labels int32 [H, W], n). Rows take the place of columns, so that labels follow the raster order."""
    height, width = mask.shape
    row, start, end = column_segments(runs_of_mask(mask.T), width)
    labels = label_segments(row, start, end, connectivity)
    out = np.zeros((height, width), np.int32)
    for y, x0, x1, label in zip(row, start, end, labels):
        out[y, x0:x1] = label + 1
    return out, int(labels.max()) + 1 if len(labels) else 0


def fill_holes_in_runs(runs, height, width):
    """Background that does not reach the border over shared edges becomes foreground."""
    column, start, end = column_segments(np.concatenate([[0], runs]), height)                # one empty run in front swaps the roles
    if len(column) == 0:
        return runs
    labels = label_segments(column, start, end, 4)
    at_border = (column == 0) | (column == width - 1) | (start == 0) | (end == height)
    open_label = np.bincount(labels, weights=at_border) > 0
    outside = open_label[labels]
    inverse = runs_of_segments(column[outside], start[outside], end[outside], height, width)
    return inverse[1:] if inverse[0] == 0 and len(inverse) > 1 else np.concatenate([[0], inverse])


def remove_islands_from_runs(runs, height, width, min_area):
    """8-connected components of fewer than min_area pixels become background."""
    column, start, end = column_segments(runs, height)
    labels = label_segments(column, start, end, 8)
    keep = (np.bincount(labels, weights=end - start) >= min_area)[labels] if len(labels) else np.zeros(0, bool)
    return runs_of_segments(column[keep], start[keep], end[keep], height, width)


# ---- outlines --------------------------------------------------------------------------------------------------------------------

HEADINGS = ((1, 0), (0, 1), (-1, 0), (0, -1))                        # east, south, west, north (y down): + 1 is a right turn


def trace_rings(mask):
    """List of (ring [P, 2] float64, component label 1..n, is_hole): every boundary of the mask, along pixel edges, foreground on the right.

    Where two foreground pixels share only a corner the walk turns left, which keeps them in one ring (8-connected foreground).
    """
    height, width = mask.shape
    padded = np.pad(np.asarray(mask, np.int8), 1)
    labels = label_components(mask, 8)[0]
    below = padded[1:, 1:-1] - padded[:-1, 1:-1]                     # [H + 1, W]: 1 where only the lower pixel is foreground
    right = padded[1:-1, 1:] - padded[1:-1, :-1]                     # [H, W + 1]
    edges = {(x, y, 0) for y, x in np.argwhere(below == 1).tolist()} | {(x + 1, y, 2) for y, x in np.argwhere(below == -1).tolist()}
    edges |= {(x, y, 1) for y, x in np.argwhere(right == -1).tolist()} | {(x, y + 1, 3) for y, x in np.argwhere(right == 1).tolist()}
    rings, walked = [], set()
    for first in sorted(edges, key=lambda e: (e[1], e[0], e[2])):
        if first in walked:
            continue
        x, y, heading = first
        pixel_x, pixel_y = x - (heading in (1, 2)), y - (heading in (2, 3))                  # the foreground pixel on the right
        ring = []
        while (x, y, heading) not in walked:
            walked.add((x, y, heading))
            x, y = x + HEADINGS[heading][0], y + HEADINGS[heading][1]
            turns = [(heading + turn) % 4 for turn in (3, 0, 1)]                             # left, straight on, right
            onward = next(h for h in turns if (x, y, h) in edges)
            if onward != heading:
                ring.append((x, y))
            heading = onward
        ring = np.array(ring, np.float64)
        doubled_area = (ring[:, 0] * np.roll(ring[:, 1], -1) - np.roll(ring[:, 0], -1) * ring[:, 1]).sum()
        rings.append((ring, int(labels[pixel_y, pixel_x]), bool(doubled_area < 0)))
    return rings
