"""How much a model loses when part of each damage is out of sight (DamageNet, section V: about 2.8 points of mIoU under "extreme occlusion
by accessories or background clutter"; on which pictures is not stated).

Of every finding of the truth one patch hides a share, in the picture alone: boxes, masks and label maps stay whole, so that what lies
under the patch is still to be found. The patch is a rectangle with the aspect of the finding's tight box, centred on a random pixel of its
mask and grown inside the box until it covers round(share x area) pixels of the mask. The line that is reached last is drawn only as far as
that number needs, which makes the share exact to half a pixel. It has the picture's mean colour: the same picture for every model.

The centre hangs on (seed, picture, finding) and not on the share: every model sees the same patches, and the patch of a quarter holds that
of a tenth. Neighbours that overlap may lie under each other's patches, and then lose more than the share.
"""
import numpy as np
import torch

from minidamage import masks
from minidamage.data.label_maps import IGNORE, label_map

SEED = 0


def check_share(share):
    """ValueError unless 0 < share < 1."""
    if not 0 < share < 1:                                     # false for NaN too
        raise ValueError(f"--occlude: expected the share of each finding to cover, above 0 and below 1 such as 0.1, got {share}; without "
                         "the flag nothing is covered")


def in_words(share):
    return f"{share:g} of each finding covered"


def occluded(dataset, share, seed=SEED):
    """The data set with patches over its pictures, or as it is where share is None. dataset: a RecordDataset for evaluation."""
    return dataset if share is None else Occluded(dataset, share, seed)


class Occluded(torch.utils.data.Dataset):
    """A RecordDataset's samples with a share of each finding covered; the targets are passed on untouched."""

    def __init__(self, dataset, share, seed=SEED):
        check_share(share)
        self.dataset, self.share, self.seed = dataset, share, seed

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        if target["replaced"]:                                # a picture that cannot be read is black already
            return image, target
        return occlude(image, self.dataset.records[index], self.share, self.seed), target


def occlude(image, record, share, seed=SEED):
    """A copy of the picture with one patch a finding. image: uint8 [3, H, W] in the record's own pixels."""
    check_share(share)
    image = image.clone()
    colour = (image.sum(dim=(1, 2), dtype=torch.int64) / image[0].numel()).round().to(torch.uint8)        # before any patch: [3]
    for number, ((x, y), inside) in enumerate(findings(record)):
        rng = np.random.default_rng([seed, record.image_id % 2 ** 63, number])
        h, w = inside.shape
        view = image[:, y:y + h, x:x + w]
        view[:, torch.from_numpy(patch_of(inside, share, rng))] = colour[:, None]
    return image


def patch_of(inside, share, rng):
    """bool [h, w]: the patch over a finding. inside: bool [h, w], its mask in its tight box; rng draws the centre."""
    wanted = int(share * np.count_nonzero(inside) + 0.5)
    if wanted == 0:                                           # a finding of a few pixels
        return np.zeros_like(inside)
    h, w = inside.shape
    cy, cx = np.argwhere(inside)[rng.integers(np.count_nonzero(inside))]
    # the growth at which the rectangle reaches each pixel: 0 at the centre, 1 at the far end of the box
    reached = np.maximum(np.abs(np.arange(h) - cy)[:, None] / h, np.abs(np.arange(w) - cx) / w)           # [h, w]
    last = np.partition(reached[inside], wanted - 1)[wanted - 1]
    patch = reached < last
    line = np.flatnonzero(reached == last)                    # what is reached together, from the top left to the bottom right
    missing = wanted - np.count_nonzero(patch & inside)
    patch.flat[line[np.cumsum(inside.flat[line]) <= missing]] = True
    return patch


def findings(record):
    """[((x, y), inside)]: the upper left corner of each finding's tight box and its mask bool [h, w] there.

    An object's outline, or its box where that is all that is known; crowd regions are no findings. Of a label map, each connected piece
    of a class.
    """
    if record.label_map is not None:
        return pieces(label_map(record))
    found = []
    for rle, crowd in zip(record.rles(), record.crowd):
        if crowd:
            continue
        x0, y0, x1, y1 = masks.to_boxes(rle).astype(int)
        found.append(((x0, y0), masks.decode(rle)[y0:y1, x0:x1] > 0))
    return found


def pieces(labels):
    """[((x, y), inside)] of a label map [H, W]: classes ascending, pieces (8-connected) in raster order of their first pixel."""
    found = []
    for k in np.setdiff1d(labels, (0, IGNORE)):
        numbers, _ = masks.connected_components(labels == k)
        ys, xs = np.nonzero(numbers)
        order = np.argsort(numbers[ys, xs], kind="stable")
        ends = np.flatnonzero(np.diff(numbers[ys, xs][order])) + 1
        for own in np.split(order, ends):
            y, x = ys[own], xs[own]
            inside = np.zeros((np.ptp(y) + 1, np.ptp(x) + 1), bool)
            inside[y - y.min(), x - x.min()] = True
            found.append(((int(x.min()), int(y.min())), inside))
    return found
