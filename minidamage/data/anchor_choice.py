"""Anchors from the data: sizes and aspect ratios that fit the training boxes, by k-means with 1 - IoU as the distance (Redmon and Farhadi
2017, arXiv:1612.08242). `train.py --anchors auto` prints and keeps them.

Every position of a map has all sizes in all ratios, so the centres are no free boxes but a grid of sizes and ratios: boxes go
to the centre of largest IoU, then each size moves to the middle of the boxes in its row, each ratio to that of its column.

On NEU-DET the default anchors of Faster R-CNN, scaled to the pictures, reach a mean best IoU of 0.63, the chosen ones 0.71.
"""
import dataclasses

import numpy as np

STARTS = 8                                     # the best of so many seeded starts is taken
ROUNDS = 100                                   # of assigning and moving; it settles within twenty or so


@dataclasses.dataclass(frozen=True)
class AnchorChoice:
    sizes: tuple[int, ...]                     # square roots of the areas, pixels of the resized picture, ascending
    ratios: tuple[float, ...]                  # height / width, ascending
    mean_iou: float                            # of each training box with the best anchor on the same centre
    recall: float                              # share of the boxes whose best IoU is 0.5 or more


def training_sides(records, min_size, max_size):
    """[G, 2] float64: width and height of every object of the records in the pictures that the model sees, crowds left out."""
    sides = []
    for record in records:
        short, long = min(record.width, record.height), max(record.width, record.height)
        boxes = record.boxes[~record.crowd].astype(np.float64)
        sides.append((boxes[:, 2:] - boxes[:, :2]) * min(min_size / short, max_size / long))
    return np.concatenate(sides) if sides else np.zeros((0, 2))


def choose_anchors(sides, sizes=5, ratios=3, seed=0):
    """The AnchorChoice of so many sizes and ratios for boxes [G, 2] (width, height). The same seed gives the same choice.

    Raises ValueError for fewer boxes than there are sizes or ratios.
    """
    sides = np.asarray(sides, np.float64).reshape(-1, 2)
    sides = sides[(sides > 0).all(1)]
    if len(sides) < max(sizes, ratios):
        raise ValueError(f"anchors: expected at least {max(sizes, ratios)} training boxes to choose {sizes} sizes and {ratios} ratios "
                         f"from, got {len(sides)}; keep the config's anchors")
    rng = np.random.default_rng([seed, 2])
    settled = [_settle(sides, *_start(sides, sizes, ratios, rng if start else None)) for start in range(STARTS)]
    best = max(settled, key=lambda found: found[2])
    whole = np.maximum(np.rint(best[0]), 1)
    for i in range(1, sizes):                                    # two sizes of one value would be one anchor twice
        whole[i] = max(whole[i], whole[i - 1] + 1)
    rounded = tuple(float(f"{ratio:.3g}") for ratio in best[1])
    return fit_of(sides, tuple(int(size) for size in whole), rounded)


def fit_of(sides, sizes, ratios):
    """The AnchorChoice of given sizes and ratios: how well they fit boxes [G, 2]."""
    iou = _iou(sides, np.asarray(sizes, np.float64), np.asarray(ratios, np.float64)).max((1, 2))
    return AnchorChoice(tuple(sizes), tuple(ratios), float(iou.mean()), float((iou >= 0.5).mean()))


def _start(sides, sizes, ratios, rng):
    """Evenly spaced quantiles; with a generator, of a random tenth of the boxes."""
    if rng is not None:
        sides = sides[rng.integers(0, len(sides), max(sizes, ratios, len(sides) // 10))]
    middle = lambda values, count: np.quantile(values, (np.arange(count) + 0.5) / count)
    return middle(np.sqrt(sides.prod(1)), sizes), middle(sides[:, 1] / sides[:, 0], ratios)


def _settle(sides, sizes, ratios):
    """(sizes, ratios, mean IoU) after moving the grid until it fits no better."""
    side, ratio = np.sqrt(sides.prod(1)), sides[:, 1] / sides[:, 0]
    best = (sizes, ratios, -1.0)
    for _ in range(ROUNDS):
        iou = _iou(sides, sizes, ratios)                                                   # [G, sizes, ratios]
        fit = float(iou.max((1, 2)).mean())
        if fit <= best[2] + 1e-9:
            break
        best = (sizes, ratios, fit)
        row, column = np.unravel_index(iou.reshape(len(sides), -1).argmax(1), iou.shape[1:])
        sizes = np.sort([_middle(side[row == i], old) for i, old in enumerate(sizes)])
        ratios = np.sort([_middle(ratio[column == i], old) for i, old in enumerate(ratios)])
    return best


def _middle(values, old):
    """The geometric mean, sizes and ratios being factors; where no box chose the centre, what it was."""
    return float(np.exp(np.log(values).mean())) if len(values) else float(old)


def _iou(sides, sizes, ratios):
    """IoU of boxes [G, 2] with every anchor on the same centre: [G, sizes, ratios]."""
    width, height = sizes[:, None] / np.sqrt(ratios), sizes[:, None] * np.sqrt(ratios)     # [sizes, ratios]
    inner = np.minimum(sides[:, 0, None, None], width) * np.minimum(sides[:, 1, None, None], height)
    return inner / (sides.prod(1)[:, None, None] + width * height - inner)
