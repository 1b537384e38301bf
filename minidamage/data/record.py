"""The record: what every reader returns for one picture, whatever the file format was.

Boxes and polygons are in *original, EXIF-corrected* pixels, xyxy, with x growing right, y growing down and (0, 0) at the
outer corner of the first pixel (so a box that covers the whole picture is [0, 0, width, height]).
"""
import collections
import dataclasses
import os
import re

import numpy as np

from minidamage import masks as mask_codec
from minidamage.data.folders import root_of
from minidamage.data.label_maps import LabelMapFile


@dataclasses.dataclass
class Record:
    """One picture and its objects. G objects, labels 1..K (0 is background and never stored)."""

    file: str                                 # path of the picture
    image_id: int                             # the data set's own id where it has one, else the position in the reader's order
    width: int                                # pixels, after the EXIF rotation
    height: int
    boxes: np.ndarray                         # [G, 4] float32, xyxy
    labels: np.ndarray                        # [G] int64, 1..K
    masks: list                               # G entries: a list of polygons (each [P, 2] float64), an RLE dict, or None
    crowd: np.ndarray                         # [G] bool: a crowd region is neither target nor false alarm
    area: np.ndarray                          # [G] float64, pixels: the data set's figure, or the outline's
    annotation_ids: np.ndarray                # [G] int64
    group: str = ""                           # vehicle or photograph: one group never lies in two splits; "" = not known
    label_map: LabelMapFile | None = None     # pixel labels in a file of their own; such a record has no objects (G = 0)

    @property
    def outlines(self):
        """G entries: what `masks` has of each object, or the corners of its box where that is all that is known."""
        corners = self.boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
        return [[box] if mask is None else mask for mask, box in zip(self.masks, corners)]

    def rles(self):
        """G RLE dicts: the outlines in the picture's pixels."""
        return [mask_codec.segmentation_to_rle(outline, self.height, self.width) for outline in self.outlines]

    @property
    def present(self):
        """The labels that this picture shows, ascending: those of its objects, or of its label map. Empty: undamaged."""
        return self.label_map.present if self.label_map else tuple(np.unique(self.labels[~self.crowd]).tolist())

    @property
    def undamaged(self):
        """Whether nothing is marked on this picture: no object, crowd or other, and no foreground pixel."""
        return not self.present if self.label_map else len(self.labels) == 0


def outlined(records):
    """Whether there are masks to learn or to score: some object has an outline; or there are no objects, and nothing is missing."""
    outlines = [mask is not None for record in records for mask in record.masks]
    return any(outlines) or not outlines


@dataclasses.dataclass
class Dataset:
    """What `load_dataset(path)` returns: records by part, the class names, and what was skipped and why."""

    path: str
    layout: str                               # "vehide" | "via" | "coco" | ..., as recognised
    class_names: tuple[str, ...]              # K names; label k is class_names[k - 1]
    category_ids: tuple[int, ...]             # K original ids, for results in the data set's own numbering
    parts: dict[str, list[Record]]            # "all", or the parts that the layout itself has: "train", "val", "test"
    problems: list[str]                       # one line a bad record: "<file>[, annotation <id>]: <what>; <what was done>"
    notes: list[str] = dataclasses.field(default_factory=list)     # what the reader decided: names joined, keys chosen, ...
    unnamed: bool = False                     # the one class has a name of the reader's, not of the files: any one-class model's will do
    test_share: float = 0.0                   # where the files name no test part: the share that the set's papers report on; 0: not known


def class_counts(records, num_names):
    """Objects of each class in `records`, crowd regions left out: int64 [num_names]. A label map counts as one object of each class
    that it shows."""
    labels = [np.asarray(r.present, np.int64) if r.label_map else r.labels[~r.crowd] for r in records]
    return np.bincount(np.concatenate(labels) - 1 if labels else [], minlength=num_names).astype(np.int64)


def number_of(count, one, several=None):
    """"1 mask", "2 masks"; with both forms "1 mask is", "2 masks are"."""
    return f"{count} {one if count == 1 else several or one + 's'}"


def places_of(dataset, part):
    """"3 pictures in images": how many a part has, and in which folders of the data set."""
    folders = sorted({os.path.relpath(os.path.dirname(record.file), root_of(dataset.path)) for record in dataset.parts[part]})
    return f"{number_of(len(dataset.parts[part]), 'picture')} in {', '.join(folders[:3])}{', ...' if len(folders) > 3 else ''}"


def problem_kinds(problems):
    """Problem lines gathered by what happened, numbers left out: list of (kind, count, first line), most frequent first."""
    kinds = collections.OrderedDict()
    for line in problems:
        what = line.split(": ", 1)[-1]
        kind = re.sub(r"'[^']*'|-?\d+(\.\d+)?", "#", what)
        kinds.setdefault(kind, []).append(line)
    return sorted(((k, len(v), v[0]) for k, v in kinds.items()), key=lambda item: -item[1])


def summary(dataset):
    """What was read, for people: layout, parts, the class-id map with counts, notes, and problems gathered by kind."""
    of_pixels = any(r.label_map for records in dataset.parts.values() for r in records)
    what = "all background" if of_pixels else "without objects"
    parts = "; ".join(f"{name} {number_of(len(records), 'picture')} ({sum(r.undamaged for r in records)} {what})"
                      for name, records in dataset.parts.items())
    lines = [f"data: {dataset.path} read as {dataset.layout}: {parts}"]
    counts = {name: class_counts(records, len(dataset.class_names)) for name, records in dataset.parts.items()}
    width = max((len(n) for n in dataset.class_names), default=0)
    lines.append(f"  label  {'class':<{width}}  {'value in masks' if of_pixels else 'id in the files':>15}  "
                 + "  ".join(f"{p:>7}" for p in counts) + ("  (pictures that show it)" if of_pixels else ""))
    many = len(dataset.class_names) > 30                       # then only the classes that occur
    for k, name in enumerate(dataset.class_names):
        if many and not any(c[k] for c in counts.values()):
            continue
        lines.append(f"  {k + 1:>5}  {name:<{width}}  {dataset.category_ids[k]:>15}  "
                     + "  ".join(f"{c[k]:>7}" for c in counts.values()))
    lines += [f"  note: {note}" for note in dataset.notes]
    if dataset.problems:
        lines.append(f"  {number_of(len(dataset.problems), 'problem')}:")
        for kind, count, first in problem_kinds(dataset.problems):
            lines.append(f"    {count} x {kind}" if count > 1 else f"    {first}")
            if count > 1:
                lines.append(f"        first: {first}")
    return "\n".join(lines)
