"""Records as a torch Dataset: what the model is fed, sample by sample, the same bytes for the same (seed, epoch, index)."""
import sys

import numpy as np
import torch
from PIL import Image

from minidamage.data import transforms
from minidamage.data.label_maps import IGNORE, label_map
from minidamage.data.pictures import read_image
from minidamage.data.record import outlined

MASK_FORMS = ("dense", "rle", "none")


class RecordDataset(torch.utils.data.Dataset):
    """What both tasks share: reading, what happens to a picture that cannot be read, and the random numbers of a sample.

    train=True: a picture that cannot be read is reported once and another stands in for it. train=False: nothing is changed or dropped;
    such a picture is a black one with its truth kept, so that what it shows counts as missed rather than disappears.

    Random numbers come from (seed, epoch, index) alone: any number of workers, and a resumed run, see the same samples. `set_epoch` reaches
    workers that are already running (the number lives in shared memory).
    """

    def __init__(self, records, recipe, seed, train):
        self.records, self.recipe, self.seed, self.train = list(records), recipe, int(seed), train
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._reported = set()

    def __len__(self):
        return len(self.records)

    def set_epoch(self, epoch):
        self._epoch.fill_(epoch)

    def _draw(self, index):
        rng = np.random.default_rng([self.seed, int(self._epoch), index])
        return transforms.draw(self.recipe, rng) if self.train and self.recipe else transforms.Draw()

    def _read(self, index):
        """(what `_load` gives for it, index of the record that was read, file it replaces or "")."""
        bad = ""
        for step in range(len(self.records)):
            used = (index + step) % len(self.records)
            record = self.records[used]
            try:
                return self._load(record), used, bad
            except ValueError as error:
                bad = bad or record.file
                self._report(record.file, error)
                if not self.train:
                    return self._black(record), used, bad
        raise ValueError(f"none of the {len(self.records)} pictures can be read; last: {bad}")

    def _picture(self, record, max_side=None):
        """The record's picture uint8 [H, W, 3]; ValueError when it is not the one that was listed."""
        image = read_image(record.file, max_side)
        if not max_side and image.shape[:2] != (record.height, record.width):
            raise ValueError(f"{record.file}: {image.shape[1]}x{image.shape[0]} now, {record.width}x{record.height} when the data "
                             "set was read")
        return image

    def _report(self, file, error):
        if file not in self._reported:
            self._reported.add(file)
            print(f"warning: {error}; {'another picture stands in for it' if self.train else 'scored as an empty picture'}",
                  file=sys.stderr, flush=True)


class DetectionDataset(RecordDataset):
    """Pictures and targets for a detector.

    dataset[i] -> (image uint8 [3, H, W] RGB, target) with target: boxes f32 [G, 4] xyxy px, labels i64 [G] 1..K, the masks,
    iscrowd bool [G], area f64 [G] px, image_id int, file str, index int (position in `records`), replaced str (the corrupt file
    that this sample stands in for, "" as a rule).

    mask_form: "dense", masks u8 [G, H, W]; "rle" (evaluation only), rles, G RLE dicts: twenty masks of 12 megapixels are 240 MB;
    "none". In the first two, an object without an outline is its box. Default: dense, or none where no object has an outline.

    train=True: augmented by the recipe; crowd regions and objects that vanish are no targets; pictures without objects stay. With the
    recipe's multi_scale the target has also min_size int, the pixels that the model resizes the shorter side to. The target
    also has seed int, from (seed, epoch, index): what a detector's samplers draw for the picture.
    max_side: pictures are reduced to this longest side before augmentation (training only): faster, and 12-megapixel
    masks never exist. None: original pixels.
    Raises ValueError for records with label maps: where one damage ends and the next begins is not in them.
    """

    def __init__(self, records, recipe=None, seed=0, train=False, max_side=None, mask_form=None):
        if max_side and not train:
            raise ValueError("max_side is for training: evaluation is scored in original pixels")
        if mask_form not in (None, *MASK_FORMS):
            raise ValueError(f"mask_form: expected one of {', '.join(MASK_FORMS)}, got {mask_form!r}")
        if mask_form == "rle" and train:
            raise ValueError('mask_form="rle" is for evaluation: training augments masks, and the model reads their pixels')
        super().__init__(records, recipe, seed, train)
        of_pixels = [r.file for r in self.records if r.label_map]
        if of_pixels:
            raise ValueError(f"a detector expects pictures with boxes or outlines, got {len(of_pixels)} with a mask of pixel labels "
                             f"(first: {of_pixels[0]}), which do not say what is one object and what is two. Train a segmentation "
                             "model on them, or annotate the objects")
        self.max_side, self.outlined = max_side, outlined(self.records)
        self.mask_form = mask_form or ("dense" if self.outlined else "none")

    def __getitem__(self, index):
        index = range(len(self))[index]                       # IndexError past the end, which ends `for image, target in dataset`
        image, used, replaced = self._read(index)
        record = self.records[used]
        draw = self._draw(index)
        follow = self.train and self.outlined                 # augmented boxes are those of the outlines, whoever learns the masks
        image, boxes, masks, visible = transforms.apply(image, record, draw, self.mask_form == "dense" or follow)
        keep = np.ones(len(boxes), bool)
        if self.train:
            sides = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf)
            keep = ~record.crowd & (visible >= transforms.MIN_VISIBLE) & (sides > 0)
        target = {"boxes": torch.from_numpy(boxes[keep]), "labels": torch.from_numpy(record.labels[keep]),
                  "iscrowd": torch.from_numpy(record.crowd[keep]), "area": torch.from_numpy(record.area[keep]),
                  "image_id": int(record.image_id), "file": record.file, "index": used, "replaced": replaced}
        if self.train:
            target["seed"] = int(np.random.SeedSequence([self.seed, int(self._epoch), index, 1]).generate_state(1)[0])
        if draw.shorter_side:
            target["min_size"] = draw.shorter_side
        if self.mask_form == "dense":
            target["masks"] = torch.from_numpy(masks if keep.all() else masks[keep])
        elif self.mask_form == "rle":
            target["rles"] = record.rles()
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), target

    def _load(self, record):
        return self._picture(record, self.max_side)

    def _black(self, record):
        return np.zeros((record.height, record.width, 3), np.uint8)


class SegmentationDataset(RecordDataset):
    """Pictures and label maps for a segmentation model.

    dataset[i] -> (image uint8 [3, H, W] RGB, target) with target: label_map u8 [H, W] (0 background, 1..K, 255 not judged), image_id int,
    file str, index int (position in `records`), replaced str (as in DetectionDataset).

    image_size S > 0: both are S x S, the picture bilinear (averaged where it shrinks), the label map nearest, as the papers
    have it: a crack thinner than the reduction can break into pieces, which scores at native size show. 0: the picture's own size.
    Resized first, then augmented. train=True: augmented by the recipe; what that uncovers is 255.
    Evaluation, where a mask cannot be read: a black picture and 255 everywhere.
    Raises ValueError for records with boxes alone, for a label above 254, and for training without a single foreground pixel.
    """

    def __init__(self, records, recipe=None, seed=0, train=False, image_size=0):
        super().__init__(records, recipe, seed, train)
        self.image_size = int(image_size)
        outlines = [m is not None for r in self.records for m in r.masks]
        if outlines and not any(outlines) and not any(r.label_map for r in self.records):
            raise ValueError(f"a segmentation model expects masks or outlines, got {len(outlines)} objects of which only the box is known; "
                             "train a detector on them")
        largest = max((max(r.present, default=0) for r in self.records), default=0)
        if largest >= IGNORE:
            raise ValueError(f"a segmentation model expects at most {IGNORE - 1} classes, which is what 8-bit label maps hold, got class "
                             f"number {largest}; join some, or train a detector")
        if train and self.records and not any(r.present for r in self.records):
            raise ValueError(f"expected damage to learn from, got {len(self.records)} pictures whose masks are all background; "
                             "python -m minidamage.data PATH shows which values the masks hold")

    def __getitem__(self, index):
        index = range(len(self))[index]
        (image, labels), used, replaced = self._read(index)
        record = self.records[used]
        if self.image_size:
            size = (self.image_size, self.image_size)
            if image.shape[:2] != size:
                image = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
                labels = np.array(Image.fromarray(labels).resize(size, Image.Resampling.NEAREST))
        image, labels = transforms.apply_to_label_map(image, labels, self._draw(index))
        return torch.from_numpy(image).permute(2, 0, 1).contiguous(), {
            "label_map": torch.from_numpy(labels), "image_id": int(record.image_id), "file": record.file, "index": used,
            "replaced": replaced}

    def _load(self, record):
        return self._picture(record), label_map(record)

    def _black(self, record):
        try:
            labels = label_map(record)
        except ValueError:
            labels = np.full((record.height, record.width), IGNORE, np.uint8)
        return np.zeros((record.height, record.width, 3), np.uint8), labels


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
