"""Anchors from the data: sizes and aspect ratios that fit the training boxes, by k-means with 1 - IoU as the distance (Redmon and Farhadi
2017, arXiv:1612.08242). `train.py --anchors auto` prints and keeps them.

Every position of a map has all sizes in all ratios, so the centres are no free boxes but a grid of sizes and ratios: boxes go
to the centre of largest IoU, then each size moves to the middle of the boxes in its row, each ratio to that of its column.

An anchor stands where its level's grid has a point, a quarter of the stride beside the box on either axis on average: IoU is taken there,
or a size on a coarse level would look better than it can be.
"""
import dataclasses

import numpy as np

STARTS = 8                                     # the best of so many seeded starts is taken
ROUNDS = 100                                   # of assigning and moving; it settles within twenty or so


@dataclasses.dataclass(frozen=True)
class AnchorChoice:
    sizes: tuple[int, ...]                     # square roots of the areas, pixels of the resized picture, ascending
    ratios: tuple[float, ...]                  # height / width, ascending
    mean_iou: float                            # of each training box with the best anchor, a quarter of its stride away on both axes
    recall: float                              # share of the boxes whose best IoU is 0.5 or more


def training_sides(records, min_size, max_size):
    """[G, 2] float64: width and height of every object of the records in the pictures that the model sees, crowds left out."""
    sides = []
    for record in records:
        short, long = min(record.width, record.height), max(record.width, record.height)
        boxes = record.boxes[~record.crowd].astype(np.float64)
        sides.append((boxes[:, 2:] - boxes[:, :2]) * min(min_size / short, max_size / long))
    return np.concatenate(sides) if sides else np.zeros((0, 2))


def choose_anchors(sides, sizes=5, ratios=3, seed=0, strides=0, scales=(1.0,)):
    """The AnchorChoice of so many sizes and ratios for boxes [G, 2] (width, height). The same seed gives the same choice.

    strides: pixels between two anchors of each size, ascending like the sizes, or one number for all; 0: on the boxes' own centres.
    scales: the factors by which every size stands at each position. Raises ValueError for fewer boxes than there are sizes or ratios.
    """
    sides = np.asarray(sides, np.float64).reshape(-1, 2)
    sides = sides[(sides > 0).all(1)]
    if len(sides) < max(sizes, ratios):
        raise ValueError(f"anchors: expected at least {max(sizes, ratios)} training boxes to choose {sizes} sizes and {ratios} ratios "
                         f"from, got {len(sides)}; keep the config's anchors")
    rng, strides = np.random.default_rng([seed, 2]), np.broadcast_to(np.asarray(strides, np.float64), sizes)
    scales = np.asarray(scales, np.float64)
    settled = [_settle(sides, *_start(sides, sizes, ratios, rng if start else None), strides, scales) for start in range(STARTS)]
    best = max(settled, key=lambda found: found[2])
    whole = np.maximum(np.rint(best[0]), 1)
    for i in range(1, sizes):                                    # two sizes of one value would be one anchor twice
        whole[i] = max(whole[i], whole[i - 1] + 1)
    rounded = tuple(float(f"{ratio:.3g}") for ratio in best[1])
    return fit_of(sides, tuple(int(size) for size in whole), rounded, strides, scales)


def fit_of(sides, sizes, ratios, strides=0, scales=(1.0,)):
    """The AnchorChoice of given sizes and ratios: how well they fit boxes [G, 2]."""
    strides = np.broadcast_to(np.asarray(strides, np.float64), len(sizes))
    iou = _iou(sides, *(np.asarray(values, np.float64) for values in (sizes, ratios, strides, scales))).max((1, 2, 3))
    return AnchorChoice(tuple(sizes), tuple(ratios), float(iou.mean()), float((iou >= 0.5).mean()))


def _start(sides, sizes, ratios, rng):
    """Evenly spaced quantiles; with a generator, of a random tenth of the boxes."""
    if rng is not None:
        sides = sides[rng.integers(0, len(sides), max(sizes, ratios, len(sides) // 10))]
    middle = lambda values, count: np.quantile(values, (np.arange(count) + 0.5) / count)
    return middle(np.sqrt(sides.prod(1)), sizes), middle(sides[:, 1] / sides[:, 0], ratios)


def _settle(sides, sizes, ratios, strides, scales):
    """(sizes, ratios, mean IoU) after moving the grid until it fits no better."""
    side, ratio = np.sqrt(sides.prod(1)), sides[:, 1] / sides[:, 0]
    best = (sizes, ratios, -1.0)
    for _ in range(ROUNDS):
        iou = _iou(sides, sizes, ratios, strides, scales)                                  # [G, sizes, scales, ratios]
        fit = float(iou.max((1, 2, 3)).mean())
        if fit <= best[2] + 1e-9:
            break
        best = (sizes, ratios, fit)
        row, scale, column = np.unravel_index(iou.reshape(len(sides), -1).argmax(1), iou.shape[1:])
        sizes = np.sort([_middle((side / scales[scale])[row == i], old) for i, old in enumerate(sizes)])
        ratios = np.sort([_middle(ratio[column == i], old) for i, old in enumerate(ratios)])
    return best


def _middle(values, old):
    """The geometric mean, sizes and ratios being factors; where no box chose the centre, what it was."""
    return float(np.exp(np.log(values).mean())) if len(values) else float(old)


def _iou(sides, sizes, ratios, strides, scales):
    """IoU of boxes [G, 2] with every anchor, a quarter of its stride away on both axes: [G, sizes, scales, ratios]."""
    side = (sizes[:, None] * scales)[:, :, None]
    width, height = side / np.sqrt(ratios), side * np.sqrt(ratios)                         # [sizes, scales, ratios]
    away, (wide, high) = strides[:, None, None] / 4, sides.T[:, :, None, None, None]

    def shared(box, anchor):
        """Of two intervals whose middles are `away` from each other."""
        return np.clip((box + anchor) / 2 - away, 0, np.minimum(box, anchor))
    inner = shared(wide, width) * shared(high, height)
    return inner / (wide * high + width * height - inner)
