"""The line inside a crack: exact distances, thinning, and what they measure (length, local width).

    line = thin(mask)                           bool [H, W], one pixel wide, connected as the mask is
    width = local_widths(mask, line)            at each pixel of the line, in pixels
    cracks = measure(mask)                      for each connected piece: length, mean and largest width, area

Distances, nearest pixels and thinning have two bodies: the plain numpy reference at the end of this file (read that to learn the rule)
and its twin in `csrc/skeleton.h`, used when the extension is built; both give the same pixels, exactly. Sources: Z. Guo, R. Hall,
Parallel thinning with two-subiteration algorithms, CACM 1989; A. Meijster et al., A general algorithm for computing distance
transforms in linear time, 2000.
"""
import dataclasses

import numpy as np

from minidamage import masks

NONE = 2 ** 31 - 1                                            # squared distance where no pixel is set
LONGEST_SIDE = 32767                                          # pixels: squared distances then fit an int32
DIAGONAL = 2 ** 0.5


@dataclasses.dataclass(frozen=True)
class Piece:
    """One connected piece of a mask. Lengths and widths in pixels, area in pixels; box xyxy, outer corners.

    length: steps of 1 and sqrt(2) along its skeleton, and half the local width at each free end, where thinning stops that far before
    the end of the shape: a bar of 5 x 100 pixels is 100 long. A ring has no free end, a single pixel is 1 long. mean_width, max_width:
    of the local widths along the skeleton. ends: free ends; loops: the skeleton's closed rounds (cells of an alligator crack).
    """

    label: int
    box: tuple
    area: int
    length: float
    mean_width: float
    max_width: float
    ends: int
    loops: int


def squared_distances(mask):
    """int32 [H, W]: squared Euclidean distance between pixel centres to the nearest set pixel of mask [H, W]; NONE where none is set."""
    return _squared_distances(_as_bytes(mask, "squared_distances"))


def _squared_distances(mask):
    native = masks.native_module()
    return native.squared_distances(mask) if native is not None else squared_distances_reference(mask)


def nearest_pixels(mask):
    """int32 [H, W]: the nearest set pixel, as row * W + column; -1 where none is set. Which one of several equally near is not settled."""
    mask, native = _as_bytes(mask, "nearest_pixels"), masks.native_module()
    return native.nearest_pixels(mask) if native is not None else nearest_pixels_reference(mask)


def thin(mask):
    """bool [H, W]: the mask thinned to lines one pixel wide (Guo-Hall), 8-connected, with the mask's pieces and holes."""
    mask, native = _as_bytes(mask, "thin"), masks.native_module()
    return (native.thin(mask) if native is not None else thin_reference(mask)).view(bool)


def local_widths(mask, line):
    """float64 [n]: the width of mask [H, W] at the n pixels of line [H, W] (in raster order), pixels.

    Twice the largest distance to the background inside the pixel, measured on a grid of half pixels: exact for bars of any width, odd or
    even, along the axes. What lies outside the picture counts as background, as in `thin`: a mask at the border is as wide as is seen.
    """
    mask, line = np.asarray(mask) != 0, np.asarray(line) != 0
    rows, columns = np.nonzero(line)
    if not len(rows):
        return np.zeros(0)
    top, bottom, left, right = _bounds(mask)
    background = _as_bytes(~np.pad(mask, 1)[top:bottom + 2, left:right + 2], "local_widths", LONGEST_SIDE + 2)
    halves = _squared_distances(background.repeat(2, axis=0).repeat(2, axis=1))           # none is farther than half of the shorter side
    y, x = 2 * (rows - top + 1), 2 * (columns - left + 1)
    largest = np.max([halves[y + dy, x + dx] for dy in (0, 1) for dx in (0, 1)], axis=0)
    return np.sqrt(largest.astype(np.float64))


def links(line):
    """The steps between neighbouring pixels of a line [H, W]: (a [L], b [L], length [L]); a, b count the line's pixels in raster order.

    A diagonal step counts only where no two straight steps lead round its corner, so that a staircase is not counted twice.
    """
    line = np.asarray(line) != 0
    number = np.cumsum(line).reshape(line.shape) - 1
    starts, ends, lengths = [], [], []
    right, down = line[:, :-1] & line[:, 1:], line[:-1] & line[1:]
    falling = line[:-1, :-1] & line[1:, 1:] & ~line[:-1, 1:] & ~line[1:, :-1]
    rising = line[1:, :-1] & line[:-1, 1:] & ~line[:-1, :-1] & ~line[1:, 1:]
    for there, a, b, step in ((right, number[:, :-1], number[:, 1:], 1.0), (down, number[:-1], number[1:], 1.0),
                              (falling, number[:-1, :-1], number[1:, 1:], DIAGONAL), (rising, number[1:, :-1], number[:-1, 1:], DIAGONAL)):
        starts.append(a[there])
        ends.append(b[there])
        lengths.append(np.full(int(there.sum()), step))
    return np.concatenate(starts), np.concatenate(ends), np.concatenate(lengths)


def length(line):
    """The steps of a line [H, W], summed: 1 straight, sqrt(2) diagonal, between pixel centres (a line of n pixels has n - 1 steps)."""
    return float(links(line)[2].sum())


def without_spurs(line, widths):
    """The line [H, W] without the short side branches that thinning grows towards every bump of a wide shape's border.

    widths: float [n], local_widths at its pixels. A branch from a free end to a fork goes if its tip (half the local width beyond its last
    pixel) is at most the fork's own width away from the fork; the fork stays, so no piece is lost.
    """
    a, b, steps = links(line)
    degree = np.bincount(np.concatenate([a, b]), minlength=len(widths))
    if not (degree > 2).any():
        return line
    order = np.argsort(np.concatenate([a, b]), kind="stable")
    to, by = np.concatenate([b, a])[order], np.concatenate([steps, steps])[order]         # the links of pixel i: first[i] .. first[i + 1]
    first = np.concatenate([[0], np.cumsum(degree)])
    gone = np.zeros(len(widths), bool)
    for end in np.flatnonzero(degree == 1).tolist():
        branch, before, here, reach = [], -1, end, widths[end] / 2
        while degree[here] <= 2:
            branch.append(here)
            ahead = [k for k in range(first[here], first[here + 1]) if to[k] != before]
            if not ahead:                                     # the other free end: a line without a fork
                break
            before, here, reach = here, int(to[ahead[0]]), reach + by[ahead[0]]
        if degree[here] > 2 and reach <= widths[here]:
            gone[branch] = True
    kept = line.copy()
    kept[line] = ~gone
    return kept


def measure(mask, min_area=1):
    """A Piece for each 8-connected piece of mask [H, W] with at least `min_area` pixels, the largest first."""
    mask = np.asarray(mask) != 0
    labels, n = masks.connected_components(mask)
    if n == 0:
        return []
    line = thin(mask)
    line = without_spurs(line, local_widths(mask, line))
    piece = labels[line] - 1                                  # of each skeleton pixel
    width = local_widths(mask, line)
    a, b, steps = links(line)
    degree = np.bincount(np.concatenate([a, b]), minlength=len(piece))
    ends = np.select([degree == 0, degree == 1], [2, 1], 0)   # of a single pixel both
    sums = lambda of, weights=None: np.bincount(of, weights, minlength=n)
    total = sums(piece[a], steps) + sums(piece, ends * width / 2)
    count, mean = sums(piece), sums(piece, width) / np.maximum(sums(piece), 1)
    largest = np.zeros(n)
    np.maximum.at(largest, piece, width)
    area, boxes = np.bincount(labels.ravel(), minlength=n + 1)[1:], _boxes(labels, n)
    square = line[1:, 1:] & line[:-1, 1:] & line[1:, :-1] & line[:-1, :-1]                # where lines cross: four steps round no hole
    loops = sums(piece[a]) - count + 1 - sums(labels[1:, 1:][square] - 1)                 # a tree has one step less than pixels
    free = sums(piece, ends)
    pieces = [Piece(k + 1, tuple(map(int, boxes[k])), int(area[k]), float(total[k]), float(mean[k]), float(largest[k]), int(free[k]),
                    int(loops[k])) for k in range(n) if area[k] >= min_area]
    return sorted(pieces, key=lambda p: (-p.area, p.label))


def _boxes(labels, n):
    """[n, 4] xyxy of the labels 1..n."""
    rows, columns = np.nonzero(labels)
    of = labels[rows, columns] - 1
    boxes = np.empty((n, 4), np.int64)
    boxes[:, :2], boxes[:, 2:] = max(labels.shape), 0
    np.minimum.at(boxes[:, 0], of, columns)
    np.minimum.at(boxes[:, 1], of, rows)
    np.maximum.at(boxes[:, 2], of, columns + 1)
    np.maximum.at(boxes[:, 3], of, rows + 1)
    return boxes


def _bounds(mask):
    """(top, bottom, left, right) of the set pixels."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], rows[-1] + 1, columns[0], columns[-1] + 1


def _as_bytes(mask, name, longest=LONGEST_SIDE):
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"{name} expects one mask [H, W], got shape {list(mask.shape)}; call it for each mask")
    if max(mask.shape) > longest:
        raise ValueError(f"{name} expects a picture of at most {LONGEST_SIDE} pixels a side, got {list(mask.shape)}; cut it into several")
    return np.ascontiguousarray(mask != 0).view(np.uint8)


# ---- the rules, in plain numpy ---------------------------------------------------------------------------------------------------

def nearest_pixels_reference(mask):
    """Columns first: the nearest set row within each column. Then along the rows: the columns 1, 2, ... further left and right, until
    that step alone is as long as the longest distance so far; in a thin crack that is soon."""
    H, W = mask.shape
    if not np.any(mask):
        return np.full((H, W), -1, np.int32)
    far = 4 * (H + W)
    rows, columns = np.indices((H, W), np.int32)
    above = np.maximum.accumulate(np.where(mask, rows, -far), axis=0)
    below = np.minimum.accumulate(np.where(mask, rows, far + H)[::-1], axis=0)[::-1]
    row = np.where(below - rows < rows - above, below, above)                             # [H, W] of the nearest in the column
    known = (row >= 0) & (row < H)
    within = np.where(known, (rows - row).astype(np.int64) ** 2, NONE)                    # squared distance inside the column
    site, squared = row * W + columns, within.copy()
    nearest = site.copy()
    for step in range(1, W):
        if step * step >= squared.max():
            break
        for here, there in ((np.s_[:, step:], np.s_[:, :-step]), (np.s_[:, :-step], np.s_[:, step:])):
            through = within[there] + step * step
            nearer = through < squared[here]
            squared[here][nearer], nearest[here][nearer] = through[nearer], site[there][nearer]
    return nearest.astype(np.int32)


def squared_distances_reference(mask):
    nearest = nearest_pixels_reference(mask)
    rows, columns = np.indices(mask.shape)
    squared = (rows - nearest // mask.shape[1]) ** 2 + (columns - nearest % mask.shape[1]) ** 2 if mask.size else nearest
    return np.where(nearest < 0, NONE, squared).astype(np.int32)


def thin_reference(mask):
    """Two sub-iterations in turn, each deleting all its pixels at once, until neither deletes any.

    p2..p9 are the neighbours, north first, clockwise. A pixel goes if it is the end of exactly one branch (C = 1), no end of a line (N = 2
    or 3), and on the sub-iteration's side (m = 0).
    """
    pixels = np.pad(np.asarray(mask) != 0, 1)
    idle, rule = 0, 0
    while idle < 2:
        p2, p3, p4, p5, p6, p7, p8, p9 = (np.roll(pixels, shift, (0, 1)) for shift in
                                          ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1)))
        C = ((~p2 & (p3 | p4)).astype(np.uint8) + (~p4 & (p5 | p6)) + (~p6 & (p7 | p8)) + (~p8 & (p9 | p2)))
        N1 = (p9 | p2).astype(np.uint8) + (p3 | p4) + (p5 | p6) + (p7 | p8)
        N2 = (p2 | p3).astype(np.uint8) + (p4 | p5) + (p6 | p7) + (p8 | p9)
        N = np.minimum(N1, N2)
        m = (p2 | p3 | ~p5) & p4 if rule else (p6 | p7 | ~p9) & p8
        delete = pixels & (C == 1) & (N >= 2) & (N <= 3) & ~m
        pixels &= ~delete
        idle, rule = 0 if delete.any() else idle + 1, 1 - rule
    return np.ascontiguousarray(pixels[1:-1]).view(np.uint8)[:, 1:-1]
