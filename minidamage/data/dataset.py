"""Records as a torch Dataset: what the model is fed, sample by sample, the same bytes for the same (seed, epoch, index)."""
import sys

import numpy as np
import torch

from minidamage.data import transforms
from minidamage.data.pictures import read_image


class DetectionDataset(torch.utils.data.Dataset):
    """Pictures and targets for a detector.

    dataset[i] -> (image uint8 [3, H, W] RGB, target) with target: boxes f32 [G, 4] xyxy px, labels i64 [G] 1..K, masks u8 [G, H, W],
    iscrowd bool [G], area f64 [G] px, image_id int, file str, index int (position in `records`), replaced str (the corrupt file
    that this sample stands in for, "" as a rule). Sets without any outline (boxes only) have no "masks".

    train=True: augmented by the recipe; crowd regions and objects that vanish are no targets; pictures without objects stay.
    A picture that cannot be read is reported once and another stands in for it. train=False: nothing is changed or dropped; such a
    picture is a black one with its truth kept, so that its objects count as missed rather than disappear.

    Random numbers come from (seed, epoch, index) alone: any number of workers, and a resumed run, see the same samples. `set_epoch` reaches
    workers that are already running (the number lives in shared memory).
    max_side: pictures are reduced to this longest side before augmentation (training only): faster, and 12-megapixel
    masks never exist. None: original pixels.
    """

    def __init__(self, records, recipe=None, seed=0, train=False, max_side=None):
        if max_side and not train:
            raise ValueError("max_side is for training: evaluation is scored in original pixels")
        self.records, self.recipe, self.seed, self.train, self.max_side = list(records), recipe, int(seed), train, max_side
        self.with_masks = any(m is not None for r in self.records for m in r.masks) or not any(len(r.masks) for r in self.records)
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reported = set()

    def __len__(self):
        return len(self.records)

    def set_epoch(self, epoch):
        self._epoch.fill_(epoch)

    def __getitem__(self, index):
        image, used, replaced = self._read(index)
        record = self.records[used]
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        draw = transforms.draw(self.recipe, rng) if self.train and self.recipe else transforms.Draw()
        image, boxes, masks, visible = transforms.apply(image, record, draw, self.with_masks)
        keep = np.ones(len(boxes), bool)
        if self.train:
            sides = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf)
            keep = ~record.crowd & (visible >= transforms.MIN_VISIBLE) & (sides > 0)
        target = {"boxes": torch.from_numpy(boxes[keep]), "labels": torch.from_numpy(record.labels[keep]),
                  "iscrowd": torch.from_numpy(record.crowd[keep]), "area": torch.from_numpy(record.area[keep]),
                  "image_id": int(record.image_id), "file": record.file, "index": used, "replaced": replaced}
        if masks is not None:
            target["masks"] = torch.from_numpy(masks if keep.all() else masks[keep])
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), target

    def _read(self, index):
        """(picture, index of the record it belongs to, file it replaces or "")."""
        bad = ""
        for step in range(len(self.records)):
            used = (index + step) % len(self.records)
            record = self.records[used]
            try:
                image = read_image(record.file, self.max_side)
                if not self.max_side and image.shape[:2] != (record.height, record.width):
                    raise ValueError(f"{record.file}: {image.shape[1]}x{image.shape[0]} now, {record.width}x{record.height} when the data "
                                     "set was read")
                return image, used, bad
            except ValueError as error:
                bad = bad or record.file
                self._report(record.file, error)
                if not self.train:
                    return np.zeros((record.height, record.width, 3), np.uint8), used, bad
        raise ValueError(f"none of the {len(self.records)} pictures can be read; last: {bad}")

    def _report(self, file, error):
        if file not in self._reported:
            self._reported.add(file)
            print(f"warning: {error}; {'another picture stands in for it' if self.train else 'scored as an empty picture'}",
                  file=sys.stderr, flush=True)


def collate(batch):
    """list of (image, target) -> (list of images, list of targets): pictures keep their own sizes until the model batches them."""
    images, targets = zip(*batch)
    return list(images), list(targets)


def limit(records, fraction, seed=0):
    """A seeded share of the records, at least one, in their own order (`--limit 0.4`). ValueError outside (0, 1]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"--limit expects a share of the training pictures above 0 and up to 1, got {fraction}")
    if not records:
        return []
    count = max(1, round(fraction * len(records)))
    chosen = np.random.default_rng([seed, 0]).permutation(len(records))[:count]
    return [records[i] for i in sorted(chosen)]
