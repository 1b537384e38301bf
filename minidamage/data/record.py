"""The record: what every reader returns for one picture, whatever the file format was.

Boxes and polygons are in *original, EXIF-corrected* pixels, xyxy, with x growing right, y growing down and (0, 0) at the
outer corner of the first pixel (so a box that covers the whole picture is [0, 0, width, height]).
"""
import dataclasses

import numpy as np


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
    area: np.ndarray                          # [G] float64, pixels: the data set's figure, or the mask's
    annotation_ids: np.ndarray                # [G] int64
    group: str = ""                           # vehicle or photograph: one group never lies in two splits; "" = not known


@dataclasses.dataclass
class Dataset:
    """What `load_dataset(path)` returns: records by part, the class names, and what was skipped and why."""

    path: str
    layout: str                               # "vehide" | "via" | "coco" | ..., as recognised
    class_names: tuple[str, ...]              # K names; label k is class_names[k - 1]
    category_ids: tuple[int, ...]             # K original ids, for results in the data set's own numbering
    parts: dict[str, list[Record]]            # "all", or the parts that the layout itself has: "train", "val", "test"
    problems: list[str]                       # one line a bad record: file, annotation id, what, what was done
