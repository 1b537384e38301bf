"""VGG Image Annotator, versions 1 and 2 (Dutta and Zisserman 2019): a JSON beside the pictures, or one in each of train/ val/ test/.

    {key: {"filename": ..., "regions": {"0": region, ...} | [region, ...]}}           VIA 1 writes a dict, VIA 2 a list
    {"_via_img_metadata": {key: ...}, "_via_settings": ..., ...}                       a saved VIA 2 project
    region = {"shape_attributes": {"name": "polygon", "all_points_x": [...], ...}, "region_attributes": {key: class name}}

Polygon, polyline (closed), rect, circle and ellipse become polygons; a point has no area and is counted and dropped.
Which attribute holds the class differs from file to file (`name`, `class`, `Class Name`, ...): it is detected, and said.
"""
import collections
import itertools
import os

import numpy as np

from minidamage.data.folders import PARTS, part_of
from minidamage.data.objects import PictureFinder, RawObject, find_record, read_json, unlisted_pictures, unusable
from minidamage.data.record import Dataset

CLASS_KEYS = ("class", "name", "class_name", "label", "category", "type", "damage", "damage_type", "object", "defect")
ARC_POINTS = 64                                # corners of the polygon that stands for a circle or an ellipse
NO_ATTRIBUTE = "object"                        # the one class of a file whose regions carry no attribute at all


def recognise(path):
    """Whether `path` is a VIA JSON, a folder with one, or a folder with one in train/, val/ or test/."""
    return bool(_find_files(path))


def read(path, images=None, attribute=None, **_):
    """Reads every part. attribute: the region attribute that holds the class; None: detected in each file."""
    files = _find_files(path)
    several = len(files) > 1
    entries = {part: entries_of(read_json(file)) for part, file in files.items()}
    keys, notes, problems = {}, [], []
    if attribute:
        found = {key for listed in entries.values() for _, regions in listed for r in regions for key in r["region_attributes"]}
        if attribute not in found:
            raise ValueError(f"{path}: no region has an attribute {attribute!r}; the regions have "
                             f"{', '.join(sorted(map(repr, found))) or 'none'}")
    for part, listed in entries.items():
        keys[part] = attribute or class_attribute([r for _, regions in listed for r in regions])
    notes.append("class read from region attribute " + ", ".join(
        (repr(key) if key else f"none (one class, {NO_ATTRIBUTE!r})") + (f" ({part})" if several else "") for part, key in keys.items()))
    names = _class_names(entries, keys, notes)
    label_of = {name.lower(): k + 1 for k, name in enumerate(names)}

    parts, picture_ids, object_ids = {}, itertools.count(1), itertools.count(1)
    for part, file in files.items():
        folder = os.path.dirname(file) or "."
        finder = PictureFinder([images] if images else [folder, os.path.join(folder, "images")], root=folder, part=part)
        parts[part] = _read_part(entries[part], keys[part], label_of, finder, problems, picture_ids, object_ids)
        extra = unlisted_pictures(finder.folders[0], parts[part], [name for name, _ in entries[part]]) if finder.folders else 0
        if extra:
            notes.append(f"{extra} pictures in {finder.folders[0]} are not in {os.path.basename(file)}: left out "
                         "(not known to be undamaged)")
    if os.path.isdir(path):
        notes += _folders_without_file(path, files)
    return Dataset(path=str(path), layout="via", class_names=tuple(names), category_ids=tuple(range(1, len(names) + 1)),
                   parts=parts, problems=problems, notes=notes)


def entries_of(loaded):
    """[(file name, list of regions)] of a loaded JSON, or None when it is not VIA 1 or 2. Pictures listed twice keep both entries."""
    if isinstance(loaded, dict) and "_via_img_metadata" in loaded:
        loaded = loaded["_via_img_metadata"]
    if not isinstance(loaded, dict) or not loaded:
        return None
    values = list(loaded.values())
    if not all(isinstance(v, dict) and "filename" in v and isinstance(v.get("regions", 0), (dict, list, type(None))) for v in values):
        return None
    return [(str(v["filename"]), [_whole(r) for r in _listed(v["regions"])]) for v in values]


def _listed(regions):
    return list(regions.values()) if isinstance(regions, dict) else regions or []


def _whole(region):
    """The region with both its dicts; one that is no region becomes an empty one, which is counted and dropped later."""
    region = region if isinstance(region, dict) else {}
    return {key: region[key] if isinstance(region.get(key), dict) else {} for key in ("shape_attributes", "region_attributes")}


def class_attribute(regions):
    """The attribute key that holds the class: a usual name first, else the one that most regions fill; None without any."""
    filled = collections.Counter(key for region in regions for key, value in region["region_attributes"].items()
                                 if _class_value(value) is not None)
    if not filled:
        return None
    usual = {name: i for i, name in enumerate(CLASS_KEYS)}
    spelled = lambda key: key.strip().lower().replace(" ", "_").replace("-", "_")
    return min(filled, key=lambda key: (filled[key] < 0.5 * len(regions), usual.get(spelled(key), len(usual)), -filled[key], key))


def _class_value(value):
    """The class name in an attribute's value: text, or a VIA 2 checkbox {name: true} with one tick. None otherwise."""
    if isinstance(value, dict):
        ticked = [name for name, on in value.items() if on]
        return ticked[0] if len(ticked) == 1 else None
    text = str(value).strip() if isinstance(value, (str, int)) else ""
    return text or None


def outline(shape):
    """A VIA shape as a polygon [P, 2] float64; ValueError in words when it has no area or is not known."""
    kind = shape.get("name")
    try:
        if kind in ("polygon", "polyline"):
            x, y = shape["all_points_x"], shape["all_points_y"]
            if len(x) != len(y):
                raise ValueError(f"{len(x)} x for {len(y)} y coordinates")
            return np.stack([np.asarray(x, np.float64), np.asarray(y, np.float64)], axis=1).reshape(-1, 2)
        if kind == "rect":
            x, y, w, h = (float(shape[k]) for k in ("x", "y", "width", "height"))
            return np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])
        if kind in ("circle", "ellipse"):
            rx, ry = (shape["r"], shape["r"]) if kind == "circle" else (shape["rx"], shape["ry"])
            angle, theta = np.linspace(0, 2 * np.pi, ARC_POINTS, endpoint=False), float(shape.get("theta", 0.0))
            u, v = float(rx) * np.cos(angle), float(ry) * np.sin(angle)
            return np.stack([float(shape["cx"]) + u * np.cos(theta) - v * np.sin(theta),
                             float(shape["cy"]) + u * np.sin(theta) + v * np.cos(theta)], axis=1)
    except KeyError as error:
        raise ValueError(f"{kind} without {error}") from None
    except (TypeError, ValueError) as error:
        if "coordinates" in str(error):
            raise
        raise ValueError(f"{kind} with coordinates that are no numbers") from None
    raise ValueError("a point has no area" if kind == "point" else f"unknown shape {kind!r}")


def _find_files(path):
    """{part: VIA JSON}: the file itself as "all", or one in the folder, or one in each of its part folders."""
    if os.path.isfile(path):
        return {"all": path} if _is_via(path) else {}
    here = [os.path.join(path, n) for n in sorted(os.listdir(path)) if n.lower().endswith(".json")]
    here = [file for file in here if _is_via(file)]
    if here:
        found = {}
        for file in here:
            part = part_of(os.path.splitext(os.path.basename(file))[0]) if len(here) > 1 else "all"
            if part is None or part in found:
                raise ValueError(f"{path}: several VIA files ({', '.join(map(os.path.basename, here))}) and their names do not say "
                                 "which is train, val or test; give one file, or rename them")
            found[part] = file
        return found
    found = {}
    for name in sorted(os.listdir(path)):
        folder, part = os.path.join(path, name), part_of(name)
        if part is None or not os.path.isdir(folder):
            continue
        files = [f for f in (os.path.join(folder, n) for n in sorted(os.listdir(folder)) if n.lower().endswith(".json")) if _is_via(f)]
        if len(files) > 1:
            raise ValueError(f"{folder}: {len(files)} VIA files ({', '.join(map(os.path.basename, files))}); keep the one to use")
        if files:
            found[part] = files[0]
    return {part: found[part] for part in PARTS if part in found}


def _is_via(file):
    try:
        loaded = read_json(file)
    except ValueError:
        return False
    if isinstance(loaded, dict) and isinstance(loaded.get("project"), dict) and "metadata" in loaded:
        raise ValueError(f"{file}: a VIA 3 project; expected VIA 1 or 2 JSON. Export it as COCO, or annotate with VIA 2")
    return entries_of(loaded) is not None


def _class_names(entries, keys, notes):
    """Sorted class names over all parts; spellings that differ in letter case alone are one class, and a note says so."""
    spelled, where = {}, {}
    for part, listed in entries.items():
        for _, regions in listed:
            for region in regions:
                value = _class_value(region["region_attributes"].get(keys[part])) if keys[part] else NO_ATTRIBUTE
                if value is not None:
                    spelled.setdefault(value.lower(), collections.Counter())[value] += 1
                    where.setdefault(value.lower(), set()).add(part)
    names = []
    for key in sorted(spelled):
        best = min(spelled[key], key=lambda name: (-spelled[key][name], name))
        names.append(best)
        if len(spelled[key]) > 1:
            notes.append(f"{', '.join(map(repr, sorted(spelled[key])))} are one class, {best!r}")
        if "train" in entries and "train" not in where[key]:
            notes.append(f"class {best!r} occurs in {', '.join(sorted(where[key]))} but not in train")
    return names


def _read_part(listed, key, label_of, finder, problems, picture_ids, object_ids):
    """Records of one file. picture_ids, object_ids: counters over all parts."""
    by_name = {}
    for name, regions in listed:
        if name in by_name:
            problems.append(f"{name}: listed twice; regions joined")
        by_name.setdefault(name, []).extend(regions)
    records = []
    for name, regions in by_name.items():
        image_id, objects = next(picture_ids), []
        for region in regions:
            annotation_id = next(object_ids)
            value = _class_value(region["region_attributes"].get(key)) if key else NO_ATTRIBUTE
            if value is None:
                objects.append(unusable(problems, f"{name}, annotation {annotation_id}: no single class in attribute {key!r}; dropped"))
                continue
            try:
                objects.append(RawObject(annotation_id, label_of[value.lower()], [outline(region["shape_attributes"])]))
            except ValueError as error:
                objects.append(unusable(problems, f"{name}, annotation {annotation_id}: {error}; dropped"))
        records.append(find_record(finder, name, image_id, objects, problems))
    return [record for record in records if record is not None]


def _folders_without_file(path, files):
    used = {os.path.dirname(os.path.abspath(file)) for file in files.values()}
    notes = []
    for name in sorted(os.listdir(path)):
        folder = os.path.join(path, name)
        if part_of(name) and os.path.isdir(folder) and os.path.abspath(folder) not in used:
            count = unlisted_pictures(folder, [])
            if count:
                notes.append(f"{count} pictures in {folder} have no annotation file: left out")
    return notes
