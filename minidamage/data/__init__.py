"""Data sets: one call reads any layout into one record type; reading order: record, vehide, objects, label_maps, transforms,
dataset, split.

    dataset = load_dataset("vehide/")                      # recognised, checked, printed with its class-id map
    parts = split.three_parts(dataset)                     # what trains, what chooses, what is reported
    train = DetectionDataset(parts["train"], recipe, seed=0, train=True)                   # boxes and masks of objects, or
    train = SegmentationDataset(parts["train"], recipe, seed=0, train=True, image_size=448)            # a label for every pixel
"""
import collections
import glob
import itertools
import os
import re

import numpy as np

from minidamage.data import coco, crackforest, labelme, mask_folders, vehide, via, voc, yolo
from minidamage.data.dataset import DetectionDataset, SegmentationDataset, collate, limit
from minidamage.data.folders import PARTS, selection, walk
from minidamage.data.label_maps import label_map
from minidamage.data.objects import count_self_crossing
from minidamage.data.pictures import EXTENSIONS, is_picture_name, read_image
from minidamage.data.record import Dataset, Record, class_counts, number_of, places_of, problem_kinds, summary

MOST_FOLDERS, MOST_NEAR = 1000, 20             # that are looked through for an error message; and tried as a data set
OF_ONE_PICTURE = (".xml", ".txt", ".mat", ".seg", *EXTENSIONS)        # files that annotate, or are, a picture: never a whole set

__all__ = ["load_dataset", "read_image", "label_map", "DetectionDataset", "SegmentationDataset", "collate", "limit", "Dataset", "Record",
           "summary", "class_counts", "problem_kinds", "LAYOUTS"]

# Tried in this order. A layout is a module with recognise(path) -> bool and read(path, images=, attribute=, voc_boxes=, voc_difficult=)
# -> Dataset; a new format is one file, which turns what its annotations say into objects.RawObject or label_maps.LabelMapFile, and one
# row here.
LAYOUTS = (("VehiDE (0Train_via_annos.json, image/image)", vehide),
           ("LabelMe JSON", labelme),
           ("COCO JSON", coco),
           ("VGG Image Annotator 1 or 2", via),
           ("Pascal VOC XML", voc),
           ("YOLO text labels (boxes or polygons)", yolo),
           ("CrackForest (image, groundTruth or seg)", crackforest),
           ("pictures and masks (images, masks; train_img, train_lab; a.jpg, a_mask.png)", mask_folders))


def load_dataset(path, images=None, attribute=None, class_names=None, quiet=False, voc_boxes="pixels", voc_difficult="ignore"):
    """Reads a data set, whatever its layout, and prints what it took with the class-id map.

    path: folder or annotation file; PATH:NAME,NAME keeps the pictures whose names begin so (one of the sets pooled in a folder).
    images: folder of the pictures, where the annotation file does not say it.
    attribute: VIA only, the region attribute with the class. class_names: labels follow this list (a checkpoint's), so that
    a set with fewer classes, or in another order, fits the model. quiet: print nothing (`summary(dataset)` returns the text).
    voc_boxes: Pascal VOC only, "pixels" (numbers of pixels from 1, as VOC has them) | "corners" (coordinates as they stand).
    voc_difficult: Pascal VOC only, objects marked so: "ignore" (neither targets nor false alarms, VOC's rule) | "count".

    Bad objects and pictures are dropped, clipped or kept as Dataset.problems says, one line each. Raises ValueError for a path
    that is missing or in no known layout, an unknown class name (listing the known), broken JSON and a set without pictures.
    """
    asked, (path, beginnings) = os.fspath(path), selection(os.fspath(path))
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file or folder")
    if images is not None and not _has_pictures(images):
        got = "one without a picture" if os.path.isdir(images) else "a file" if os.path.isfile(images) else "a path where nothing is"
        raise ValueError(f"--images {images}: expected the folder that the pictures of {path} lie in, got {got}")
    for _, layout in LAYOUTS:
        if layout.recognise(path):
            break
    else:
        raise ValueError(_no_layout(path))
    try:
        dataset = layout.read(path, images=images, attribute=attribute, voc_boxes=voc_boxes, voc_difficult=voc_difficult)
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError, RecursionError) as error:
        name = layout.__name__.rsplit(".", 1)[-1]
        raise ValueError(f"{path}: read as {name}, but its structure is not what that format has "
                         f"({type(error).__name__}: {error})") from error
    if beginnings:
        _keep(dataset, asked, beginnings)
    _name_all(dataset)
    records = [r for part in dataset.parts.values() for r in part]
    if not records:
        why = f"; first of {len(dataset.problems)} problems: {dataset.problems[0]}" if dataset.problems else ""
        why += f". The pictures were sought in --images {images}: is it their folder?" if images else ""
        raise ValueError(f"{path}: the data set is empty (no usable picture){why}")
    alike = [name for name in dataset.class_names if [other.lower() for other in dataset.class_names].count(name.lower()) > 1]
    if alike:                                  # a checkpoint's names are found again whatever their case
        raise ValueError(f"{path}: expected classes whose names differ by more than letter case, got {', '.join(map(repr, alike))}; rename "
                         "or join them")
    count_self_crossing(records, dataset.problems)
    if class_names is not None:
        _follow(dataset, tuple(class_names))
    if not quiet:
        print(summary(dataset), flush=True)
    return dataset


def _no_layout(path):
    """The message for a path that no reader knows: what is there, and what to give."""
    if os.path.isfile(path) and path.lower().endswith(OF_ONE_PICTURE):
        above = os.path.dirname(os.path.abspath(path))
        near = next(filter(_has_pictures, (above, os.path.dirname(above), os.path.dirname(os.path.dirname(above)))), None)
        return (f"{path}: expected a data set, got the file of one picture; give the folder that holds all pictures and annotations"
                + f", such as {near}" * bool(near and not is_picture_name(path)))
    known = "; ".join(name for name, _ in LAYOUTS)
    folders = sorted(glob.glob(os.path.join(glob.escape(path), "*", "")))[:MOST_NEAR]
    near = [folder for folder in folders if any(layout.recognise(folder) for _, layout in LAYOUTS)]
    if near:
        return f"{path}: no known annotation layout found{_what_is_there(path)}; did you mean {' or '.join(near)}?"
    return (f"{path}: no known annotation layout found{_what_is_there(path)}. Known: {known}. Give the folder that holds the annotation "
            "file, or the file itself (of formats with a file a picture, the folder)")


def _has_pictures(folder):
    """Whether there is a picture in the folder or below it."""
    return any(is_picture_name(name) for _, _, names in itertools.islice(walk(folder), MOST_FOLDERS) for name in names)


def _what_is_there(path):
    """" in 30 .jpg, 30 .xml (...)": the endings of the files, so that one sees whether it is the right folder."""
    if not os.path.isdir(path):
        return ""
    names = [n for _, _, names in itertools.islice(walk(path), MOST_FOLDERS) for n in names if not n.startswith(".")]
    endings = collections.Counter(os.path.splitext(n)[1].lower() or "without an ending" for n in names)
    counts = ", ".join(f"{count} {ending}" for ending, count in endings.most_common(5))
    broken = sum(endings[e] for e in (".xml", ".json", ".txt"))
    if not counts:
        return ": it is empty"
    return f" among its {counts}" + ("; where these are its annotations, the first of them cannot be read" if broken else "")


def _name_all(dataset):
    """Pictures that no name puts into a part are, beside a val or test part, what trains. (Beside a train part: split.three_parts.)"""
    parts = {part: records for part, records in dataset.parts.items() if records}
    if "all" in parts and len(parts) > 1 and "train" not in parts:
        dataset.notes.append(f"{places_of(dataset, 'all')}, in no part by any name, taken as train")
        dataset.parts = {part: parts["all" if part == "train" else part] for part in PARTS if part in parts or part == "train"}


def _keep(dataset, asked, beginnings):
    """Keeps the pictures whose names begin with one of the words, which end there ("Volker" is not "Volkers_1.jpg")."""
    first_word = lambda record: re.match(r"[^_\W]*", os.path.basename(record.file))[0]
    begins = lambda record: [b for b in beginnings if re.match(re.escape(b) + r"(?![^_\W])", os.path.basename(record.file))]
    lacking = set(beginnings) - {b for records in dataset.parts.values() for r in records for b in begins(r)}
    if lacking:
        words = collections.Counter(first_word(r) for records in dataset.parts.values() for r in records)
        raise ValueError(f"{asked}: no picture's name begins with {', '.join(sorted(lacking))}; they begin with "
                         + ", ".join(f"{w} ({n})" for w, n in words.most_common(12)) + (", ..." if len(words) > 12 else ""))
    everyone = sum(map(len, dataset.parts.values()))
    dataset.parts = {part: kept for part, records in dataset.parts.items() for kept in [[r for r in records if begins(r)]] if kept}
    dataset.path = asked
    kept = number_of(sum(map(len, dataset.parts.values())), "picture")
    dataset.notes = [f"only {kept} of {everyone}, those whose names begin with {' or '.join(beginnings)}",
                     *(f"of all {everyone}: {note}" for note in dataset.notes)]


def _follow(dataset, class_names):
    """Renumbers the labels by a given list of names; ValueError when the set has objects of a class that is not in it."""
    if dataset.unnamed and len(class_names) == 1:
        if dataset.class_names != class_names:
            dataset.notes.append(f"the one class is taken as the model's, {class_names[0]}")
        dataset.class_names = class_names
        return
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
