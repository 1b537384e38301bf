"""Large pictures through a segmenter in overlapping tiles, blended so that no seam shows.

A segmenter resizes what it gets to its own size (448 x 448 in the crack paper): on a photograph of 4000 x 3000 a crack of 5 pixels is then
half a pixel wide, and gone. A tile as large as the pictures it was trained on keeps it at the scale that the network knows; a smaller one
shows everything larger, and grain then looks like cracks. Each tile counts most in its middle, where the network sees context on all
sides, and fades linearly over the overlap.
"""
import math

import numpy as np
import torch

TILES_AT_ONCE = 4
MUCH_LARGER = 2.0                                             # times the model's size: from here on tiles are worth a word


def tiled_probabilities(model, image, tile, overlap):
    """float32 [C, H, W] of one picture of any size, as model.probabilities gives for a small one, worked out tile by tile.

    model: a segmenter in evaluation mode. image: [3, H, W] uint8 or float 0..1. tile: side of a square tile in the picture's pixels, each
    resized to the model's own size if that is another; overlap: pixels that neighbours share, at most half a tile. A picture
    smaller than a tile is continued by its border pixels, and cut back. Raises ValueError for sides that do not fit together.
    """
    check_tile(tile, overlap)
    H, W = image.shape[-2:]
    padded = pad_to(image, max(H, tile), max(W, tile))
    weight = torch.from_numpy(np.outer(ramp(tile, overlap), ramp(tile, overlap))).float().to(next(model.parameters()).device)
    places = [(y, x) for y in starts(padded.shape[-2], tile, overlap) for x in starts(padded.shape[-1], tile, overlap)]
    summed = weights = None
    for first in range(0, len(places), TILES_AT_ONCE):
        group = places[first:first + TILES_AT_ONCE]
        found = model.probabilities([padded[:, y:y + tile, x:x + tile] for y, x in group], at="native")
        if summed is None:
            summed = torch.zeros(found[0].shape[0], *padded.shape[-2:], device=weight.device)
            weights = torch.zeros(padded.shape[-2:], device=weight.device)
        for (y, x), probabilities in zip(group, found):
            summed[:, y:y + tile, x:x + tile] += probabilities.float() * weight
            weights[y:y + tile, x:x + tile] += weight
    return (summed / weights)[:, :H, :W]


def starts(length, tile, overlap):
    """Where tiles begin along a side: evenly spread, neighbours sharing at least `overlap` pixels, the last one flush with the end."""
    count = 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))
    return [round(k * (length - tile) / max(count - 1, 1)) for k in range(count)]


def ramp(tile, overlap):
    """[tile]: weights rising linearly from the border over `overlap` pixels, then 1; never 0, so that a lone tile counts everywhere."""
    edge = np.minimum(np.arange(tile), np.arange(tile)[::-1]) + 1
    return np.minimum(edge / (overlap + 1), 1.0)


def pad_to(image, height, width):
    """[3, height, width]: the picture continued below and to the right by its last row and column."""
    below, right = height - image.shape[-2], width - image.shape[-1]
    if not (below or right):
        return image
    rows = torch.arange(height).clamp(max=image.shape[-2] - 1)
    columns = torch.arange(width).clamp(max=image.shape[-1] - 1)
    return image[:, rows][:, :, columns]


def check_tile(tile, overlap):
    if tile < 16:
        raise ValueError(f"--tile {tile}: expected a side of at least 16 pixels, such as the model's own size")
    if not 0 <= overlap <= tile // 2:
        raise ValueError(f"--overlap {overlap}: expected 0 to half a tile ({tile // 2} pixels)")


def suggestion(height, width, image_size, trained_side=None):
    """What to type where a picture is much larger than those of the training; "" where it is not, or the model takes any size.

    trained_side: side of the training pictures before they were reduced to image_size; None: not known, taken as image_size.
    """
    tile = trained_side or image_size
    if not image_size or max(height, width) < MUCH_LARGER * tile:
        return ""
    rows, columns = (len(starts(side, tile, tile // 4)) for side in (height, width))
    how = f"as large as the training pictures ({tile} px)" if trained_side else f"unreduced, {tile} px"
    return (f"{width}x{height} is reduced to the model's {image_size}x{image_size}, thin damage may vanish; --tile {tile} looks at it in "
            f"{rows * columns} tiles, {how}")
