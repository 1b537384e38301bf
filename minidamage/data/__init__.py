"""Data sets: one call reads any layout into one record type; reading order: record, vehide, objects, transforms, dataset, split.

    dataset = load_dataset("vehide/")                      # recognised, checked, printed with its class-id map
    parts = split.three_parts(dataset)                     # what trains, what chooses, what is reported
    train = DetectionDataset(parts["train"], recipe, seed=0, train=True)
"""
import os

import numpy as np

from minidamage.data import coco, vehide, via, voc
from minidamage.data.dataset import DetectionDataset, SegmentationDataset, collate, limit
from minidamage.data.label_maps import label_map
from minidamage.data.objects import count_self_crossing
from minidamage.data.pictures import read_image
from minidamage.data.record import Dataset, Record, class_counts, problem_kinds, summary

__all__ = ["load_dataset", "read_image", "label_map", "DetectionDataset", "SegmentationDataset", "collate", "limit", "Dataset", "Record",
           "summary", "class_counts", "problem_kinds", "LAYOUTS"]

# Tried in this order. A layout is a module with recognise(path) -> bool and read(path, images=, attribute=, voc_boxes=) -> Dataset; a
# new format is one file, which turns what its annotations say into objects.RawObject, and one row here.
LAYOUTS = (("VehiDE (0Train_via_annos.json, image/image)", vehide),
           ("COCO JSON", coco),
           ("VGG Image Annotator 1 or 2", via),
           ("Pascal VOC XML", voc))


def load_dataset(path, images=None, attribute=None, class_names=None, quiet=False, voc_boxes="pixels"):
    """Reads a data set, whatever its layout, and prints what it took with the class-id map.

    path: folder or annotation file. images: folder of the pictures, where the annotation file does not say it.
    attribute: VIA only, the region attribute with the class. class_names: labels follow this list (a checkpoint's), so that
    a set with fewer classes, or in another order, fits the model. quiet: print nothing (`summary(dataset)` returns the text).
    voc_boxes: Pascal VOC only, "pixels" (numbers of pixels from 1, as VOC has them) | "corners" (coordinates as they stand).

    Bad objects and pictures are dropped, clipped or kept as Dataset.problems says, one line each. Raises ValueError for a path
    that is missing or in no known layout, an unknown class name (listing the known), broken JSON and a set without pictures.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    for _, layout in LAYOUTS:
        if layout.recognise(path):
            break
    else:
        known = "; ".join(name for name, _ in LAYOUTS)
        raise ValueError(f"{path}: no known annotation layout found. Known: {known}. Give the folder that holds the annotation "
                         "file, or the file itself")
    try:
        dataset = layout.read(path, images=images, attribute=attribute, voc_boxes=voc_boxes)
    except (TypeError, AttributeError, KeyError, IndexError) as error:
        name = layout.__name__.rsplit(".", 1)[-1]
        raise ValueError(f"{path}: read as {name}, but its structure is not what that format has "
                         f"({type(error).__name__}: {error})") from error
    records = [r for part in dataset.parts.values() for r in part]
    if not records:
        why = f"; first of {len(dataset.problems)} problems: {dataset.problems[0]}" if dataset.problems else ""
        raise ValueError(f"{path}: the data set is empty (no usable picture){why}")
    count_self_crossing(records, dataset.problems)
    if class_names is not None:
        _follow(dataset, tuple(class_names))
    if not quiet:
        print(summary(dataset), flush=True)
    return dataset


def _follow(dataset, class_names):
    """Renumbers the labels by a given list of names; ValueError when the set has objects of a class that is not in it."""
    position = {name.lower(): k + 1 for k, name in enumerate(class_names)}
    records = [r for part in dataset.parts.values() for r in part]
    counts = class_counts(records, len(dataset.class_names))
    foreign = [n for n, c in zip(dataset.class_names, counts) if c and n.lower() not in position]
    if foreign:
        raise ValueError(f"{dataset.path} has objects of {', '.join(map(repr, foreign))}, which the model does not know; it knows "
                         f"{', '.join(class_names)}. Train on this set, or rename the classes")
    table = np.array([0] + [position.get(n.lower(), 0) for n in dataset.class_names])
    for record in records:
        record.labels = table[record.labels].astype(np.int64)
        record.label_map = record.label_map and record.label_map.renumbered(table)
    old = {n.lower(): i for n, i in zip(dataset.class_names, dataset.category_ids)}
    spare = iter(range(max(dataset.category_ids, default=0) + 1, 10 ** 9))
    dataset.category_ids = tuple(old[n.lower()] if n.lower() in old else next(spare) for n in class_names)
    absent = [n for n in class_names if n.lower() not in old]
    if absent:
        dataset.notes.append(f"labels follow the model's list; the set has no {', '.join(absent)}")
    dataset.class_names = class_names
