"""LabelMe (Wada 2016): one JSON a picture, {"imagePath": ..., "imageWidth": ..., "shapes": [{"label", "shape_type", "points", ...}]}.

Polygon, rectangle, circle and mask shapes are objects; points and lines have no area and are counted and dropped. Its conventions:
shapes of one label with one `group_id` are parts of one object; a shape `_background_` is a hole in what was drawn before it (as
LabelMe's own export paints it); `__ignore__` is a region that is not judged, kept as a crowd region. Folders may be named train, val, test.
"""
import base64
import binascii
import collections
import io
import itertools
import math
import os

import numpy as np
from PIL import Image

from minidamage import masks as mask_codec
from minidamage.data.folders import PARTS, part_of, walk
from minidamage.data.objects import PictureFinder, RawObject, make_record, read_json, read_lines, unlisted_pictures, unusable
from minidamage.data.pictures import READ_ERRORS
from minidamage.data.record import Dataset
from minidamage.data.via import ARC_POINTS

HOLE, IGNORED = "_background_", "__ignore__"
NO_AREA = ("point", "points", "line", "linestrip")
LARGEST = 1 << 28                              # pixels; a larger picture is a slip in the file, and would cost memory
DEPTH = 4                                      # folders below the data set's that are looked at


def recognise(path):
    """Whether `path` is a LabelMe JSON, or a folder with some in it or below it."""
    return _is_labelme(path) if os.path.isfile(path) else any(_is_labelme(f) for _, files in _folders(path) for f in files[:5])


def read(path, images=None, **_):
    """Reads every part. images: folder of the pictures, where they are not beside their JSON and imagePath does not lead to them."""
    found = [(os.path.dirname(path) or ".", [path])] if os.path.isfile(path) else _folders(path)
    problems, notes, loaded = [], [], collections.defaultdict(list)
    for folder, files in found:
        steps = os.path.relpath(folder, path).split(os.sep) if os.path.isdir(path) else []
        part = next((p for p in map(part_of, reversed(steps)) if p), "all")
        for file in files:
            content = _load(file, problems)
            if content is not None:
                loaded[part].append((file, content))
    names = _class_names(path, loaded, notes)
    label_of = {name.lower(): k + 1 for k, name in enumerate(names)}
    parts, seen, picture_ids, object_ids = {}, {}, itertools.count(1), itertools.count(1)
    for part in ("all", *PARTS):
        if part in loaded:
            parts[part] = _read_part(path, loaded[part], label_of, images, part, problems, picture_ids, object_ids, seen)
    records = [r for listed in parts.values() for r in listed]
    for folder in sorted({os.path.dirname(r.file) for r in records}):
        extra = unlisted_pictures(folder, records, [os.path.basename(picture) for picture in seen])
        if extra:
            notes.append(f"{extra} pictures in {folder} have no JSON that was read: left out (not known to be undamaged)")
    return Dataset(path=str(path), layout="labelme", class_names=tuple(names), category_ids=tuple(range(1, len(names) + 1)), parts=parts,
                   problems=problems, notes=notes)


def _folders(path):
    """[(folder, its JSON files)] for `path` and below."""
    found = []
    for folder, below, names in walk(path, depth=DEPTH):
        below[:] = sorted(n for n in below if not n.startswith("."))
        files = [os.path.join(folder, n) for n in sorted(names) if n.lower().endswith(".json") and not n.startswith(".")]
        if files:
            found.append((folder, files))
    return found


def _is_labelme(file):
    try:
        content = read_json(file)
    except (ValueError, OSError):
        return False
    return isinstance(content, dict) and isinstance(content.get("shapes"), list) and "imagePath" in content


def _load(file, problems):
    """The content of one JSON; None, and a line in `problems`, when it is no LabelMe file."""
    try:
        content = read_json(file)
    except ValueError as error:
        return unusable(problems, f"{os.path.basename(file)}: {str(error).removeprefix(file + ': ')}; picture left out")
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        return unusable(problems, f"{os.path.basename(file)}: not a LabelMe file (no list \"shapes\"); left out")
    content["imageData"] = bool(content.get("imageData"))             # the picture itself, megabytes: all files are read before any record
    return content


def _class_names(path, loaded, notes):
    """Names by labels.txt where there is one, then sorted; spellings that differ in letter case alone are one class."""
    spelled = {}
    for listed in loaded.values():
        for _, content in listed:
            for shape in content["shapes"]:
                label = _label(shape)
                if label and label not in (HOLE, IGNORED):
                    spelled.setdefault(label.lower(), collections.Counter())[label] += 1
    ordered, file = [], os.path.join(path, "labels.txt")
    if os.path.isdir(path) and os.path.isfile(file):
        ordered = [line for line in read_lines(file) if line not in (HOLE, IGNORED)]
        notes.append("classes in the order of labels.txt")
    names = ordered + [min(spelled[key], key=lambda name: (-spelled[key][name], name)) for key in sorted(spelled)
                       if key not in {n.lower() for n in ordered}]
    notes += [f"{', '.join(map(repr, sorted(spelling)))} are one class" for spelling in spelled.values() if len(spelling) > 1]
    return names


def _label(shape):
    """The shape's class name, or None."""
    label = shape.get("label") if isinstance(shape, dict) else None
    return str(label).strip() or None if isinstance(label, (str, int)) else None


def _read_part(path, listed, label_of, images, part, problems, picture_ids, object_ids, seen):
    """Records of one part. Over all parts run picture_ids and object_ids, counters, and seen: {picture: its JSON}."""
    records = []
    root = path if os.path.isdir(path) else os.path.dirname(path) or "."
    finders = {}
    for file, content in listed:
        folder = os.path.dirname(file) or "."
        if folder not in finders:
            places = [images] if images else [folder, os.path.join(folder, "images")]            # never beside the set: another's pictures
            finders[folder] = PictureFinder(places, root=None if images else root, part=part if part != "all" else "")
        image_id = next(picture_ids)
        name = os.path.basename(str(content.get("imagePath") or "").replace("\\", "/")) or os.path.basename(file)
        picture = finders[folder].find(str(content.get("imagePath") or "")) if content.get("imagePath") else None
        size = tuple(content.get(k) for k in ("imageWidth", "imageHeight"))
        size = size if all(isinstance(v, int) and v > 0 for v in size) and size[0] * size[1] <= LARGEST else None
        objects = _objects(content["shapes"], size, label_of, name, problems, object_ids)
        if picture is None:
            embedded = "; the copy inside the JSON is not unpacked, save it beside" if content.get("imageData") else ""
            problems.append(f"{name}: {os.path.basename(file)} names it but it is not there{embedded}; picture left out "
                            f"({len(objects)} objects)")
        elif os.path.abspath(picture) in seen:
            problems.append(f"{os.path.basename(file)}: its picture, {name}, is also that of {seen[os.path.abspath(picture)]}; left out")
        else:
            seen[os.path.abspath(picture)] = os.path.basename(file)
            record = make_record(picture, image_id, objects, problems, listed_size=size)
            records += [record] if record is not None else []
    return records


def _objects(shapes, size, label_of, name, problems, object_ids):
    """RawObjects of one picture, None for each shape that cannot be used: shapes joined by group, holes cut.

    size: (width, height) of the JSON, or None (then holes are dropped).
    """
    objects, group_at = [], {}
    for shape in shapes:
        annotation_id = next(object_ids)
        dropped = lambda why: unusable(problems, f"{name}, annotation {annotation_id}: {why}; dropped")
        label = _label(shape)
        if label is None:
            objects.append(dropped("a shape without a label"))
            continue
        try:
            segmentation = _segmentation(shape, size)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            objects += [dropped(error)] * (label != HOLE)
            continue
        if label == HOLE:
            if size is None:
                dropped("a hole in a picture whose JSON does not say its size")
            else:
                objects = [o for o in objects if o is None or _cut(o, segmentation, size)]
            continue
        group = (label.lower(), shape["group_id"]) if isinstance(shape.get("group_id"), int) else None
        whole = group_at.get(group) if group else None
        if whole is not None and any(o is whole for o in objects):
            whole.segmentation = _joined(whole.segmentation, segmentation, size)
        elif label != IGNORED or label_of:
            objects.append(RawObject(annotation_id, label_of.get(label.lower(), 1), segmentation, crowd=label == IGNORED))
            group_at[group] = objects[-1]
    return objects


def _segmentation(shape, size):
    """A shape as [polygon] or, where it is a mask, as an RLE dict; ValueError in words when it has no area or is not known."""
    kind = shape.get("shape_type") or "polygon"
    if kind in NO_AREA:
        raise ValueError(f"a {kind} has no area")
    points = np.asarray(shape["points"], np.float64).reshape(-1, 2)
    if not np.isfinite(points).all():
        raise ValueError("coordinates that are no numbers")
    if kind == "polygon":
        return [points]
    if kind not in ("rectangle", "circle", "mask"):
        raise ValueError(f"unknown shape {kind!r}")
    if len(points) < 2:
        raise ValueError(f"a {kind} with {len(points)} points; expected 2")
    if kind == "circle":                                              # its centre, and a point of the rim
        radius, turn = math.dist(points[0], points[1]), 2 * np.pi * np.arange(ARC_POINTS) / ARC_POINTS
        return [points[0] + radius * np.stack([np.cos(turn), np.sin(turn)], axis=1)]
    low, high = points.min(0), points.max(0)
    if kind == "rectangle":
        return [np.array([low, [high[0], low[1]], high, [low[0], high[1]]])]
    return _pasted(shape.get("mask"), low, size)


def _pasted(text, corner, size):
    """A mask shape: a PNG in base64, whose first pixel lies at `corner`, as the RLE of the whole picture."""
    if size is None or not isinstance(text, str):
        raise ValueError("a mask without its pixels, or in a picture whose JSON does not say its size")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            pixels = np.array(image.convert("L")) > 0
    except (*READ_ERRORS, binascii.Error):
        raise ValueError("a mask whose pixels cannot be read") from None
    x, y = np.rint(corner).astype(int).tolist()
    whole = np.zeros((size[1], size[0]), np.uint8)
    if not (0 <= x and 0 <= y and y + pixels.shape[0] <= size[1] and x + pixels.shape[1] <= size[0] and pixels.any()):
        raise ValueError(f"a mask of {pixels.shape[1]}x{pixels.shape[0]} pixels at {x}, {y} is empty or leaves the {size[0]}x{size[1]} "
                         "picture")
    whole[y:y + pixels.shape[0], x:x + pixels.shape[1]] = pixels
    return mask_codec.encode(whole)


def _rle(segmentation, size):
    return segmentation if isinstance(segmentation, dict) else mask_codec.from_polygons(segmentation, size[1], size[0])


def _cut(obj, hole, size):
    """Takes the hole out of an object that it overlaps; False when nothing is left of the object."""
    mine, other = _rle(obj.segmentation, size), _rle(hole, size)
    common = mask_codec.area(mask_codec.merge([mine, other], intersect=True))
    if common:
        left = mask_codec.decode(mine) & (1 - mask_codec.decode(other))
        obj.segmentation = mask_codec.encode(left)
    return not common or mask_codec.area(obj.segmentation) > 0


def _joined(first, second, size):
    """Two parts of one object: rings side by side, or one RLE where either is one."""
    if isinstance(first, list) and isinstance(second, list):
        return first + second
    return mask_codec.merge([_rle(first, size), _rle(second, size)])
