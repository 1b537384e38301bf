"""YOLO text labels (Ultralytics, Darknet, Roboflow, CVAT): one .txt a picture, one object a line, shares of the picture's width and height.

    class x_center y_center width height                a box (detection)
    class x1 y1 x2 y2 x3 y3 ...                         one ring (segmentation); parts and holes are joined to it by bridges of no width

    images/train/ labels/train/    train/images/ train/labels/    images/ labels/    or .txt beside the pictures
    data.yaml: names, and train, val, test: folders of pictures or lists of them;    classes.txt, obj.names: one name a line

Classes count from 0 in the files, labels from 1. A picture with an empty .txt is undamaged; one without a .txt is left out, because nobody
said that it is. Five numbers are a box: a ring needs seven or more. `write` writes both forms.
"""
import codecs
import itertools
import os
import re
import shutil

import numpy as np

from minidamage import masks as mask_codec
from minidamage.data.folders import PARTS, part_of, walk
from minidamage.data.objects import RawObject, make_record, not_utf8, read_lines, unusable
from minidamage.data.pictures import is_picture_name, picture_header
from minidamage.data.record import Dataset

NAME_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt", "predefined_classes.txt")
NO_LABELS = {*NAME_FILES, "readme.txt", "requirements.txt", "license.txt", "readme.dataset.txt", "readme.roboflow.txt"}
DEPTH = 5                                      # folders below the data set's that are looked at
LARGEST_CLASS = 9999                           # a larger number is a slip, and would make as many classes
OUTSIDE = 0.01                                 # share of the picture; farther out, the numbers are no shares


def recognise(path):
    """Whether `path` is a folder with YOLO labels, or its data.yaml."""
    if os.path.isfile(path):
        return _is_yaml(path)
    return any(_is_label(os.path.join(folder, name)) for folder, names in _label_folders(path) for name in names[:20])


def read(path, images=None, **_):
    """Reads every part. images: folder of the pictures, when it is none of the usual places."""
    root = os.path.dirname(path) or "." if os.path.isfile(path) else path
    yaml = next(filter(_is_yaml, [path] if os.path.isfile(path) else [os.path.join(root, n) for n in sorted(os.listdir(root))]), None)
    declared = read_yaml(yaml) if yaml else {}
    notes, problems = [], []
    files, unlabelled = _files_of_parts(root, images, _part_finder(root, declared, images), problems)
    for _, picture in files.pop("", ()):
        problems.append(f"{os.path.basename(picture)}: in none of the parts that {os.path.basename(yaml)} names; picture left out")
    lines = {part: [(label, picture, _lines(label)) for label, picture in listed] for part, listed in files.items()}
    names = _class_names(root, declared, lines, notes)
    parts, picture_ids, object_ids = {}, itertools.count(1), itertools.count(1)
    for part in ("all", *PARTS):
        if part in lines:
            parts[part] = _read_part(lines[part], problems, picture_ids, object_ids)
    if unlabelled:
        notes.append(f"{len(unlabelled)} pictures have no .txt (first: {unlabelled[0]}): left out (not known to be undamaged; an empty "
                     ".txt says so)")
    return Dataset(path=str(path), layout="yolo", class_names=tuple(names), category_ids=tuple(range(len(names))), parts=parts,
                   problems=problems, notes=notes)


# ---- files and parts

def _is_yaml(file):
    if not os.path.isfile(file) or not file.lower().endswith((".yaml", ".yml")):
        return False
    try:
        return "names" in read_yaml(file)
    except ValueError:                          # it is meant to be one where it has a line of names: `read` then says what is wrong
        with open(file, "rb") as handle:
            return any(line.removeprefix(codecs.BOM_UTF8).startswith(b"names:") for line in handle)


def _label_folders(path):
    """[(folder, names of .txt files)] for `path` and below; files that hold class names or remarks are no labels."""
    found = []
    for folder, below, names in walk(os.path.abspath(path), depth=DEPTH):
        below[:] = sorted(n for n in below if not n.startswith("."))
        texts = sorted(n for n in names if n.lower().endswith(".txt") and n.lower() not in NO_LABELS and not n.startswith("."))
        pictures = _pictures_for(folder, path)
        texts = [n for n in texts if os.path.splitext(n)[0] in pictures or _in_labels(folder)]
        if texts and pictures:
            relative = os.path.relpath(folder, os.path.abspath(path))
            found.append((os.path.join(path, relative) if relative != "." else path, texts))
    return found


def _in_labels(folder):
    return "labels" in [step.lower() for step in os.path.abspath(folder).split(os.sep)]


def _pictures_for(folder, root):
    """{stem: picture} for a folder of labels: its twin with `images` in place of the last `labels`, else the pictures beside them."""
    steps = os.path.abspath(folder).split(os.sep)
    places = [folder]
    for i in range(len(steps) - 1, len(os.path.abspath(root).split(os.sep)) - 1, -1):
        if steps[i].lower() == "labels":
            places = [os.sep.join([*steps[:i], name, *steps[i + 1:]]) for name in ("images", "Images", "IMAGES", "obj_train_data")]
            places += [os.sep.join(steps[:i]), folder]
            break
    for place in places:
        found = _stems(place)
        if found:
            return found
    return {}


def _stems(folder):
    found = {}
    for name in sorted(filter(is_picture_name, os.listdir(folder))) if os.path.isdir(folder) else ():
        stem = os.path.splitext(name)[0]
        found[stem if stem not in found else name] = os.path.join(folder, name)            # a.png beside a.jpg has no a.txt
    return found


def _is_label(file):
    """Whether the file's first line, if any, looks like an object."""
    try:
        with open(file, encoding="utf-8-sig") as handle:
            first = handle.readline(1_000_000).split()
        return len(first) >= 5 and first[0].isdigit() and all(np.isfinite(float(v)) for v in first)
    except (ValueError, OSError):
        return False


def _files_of_parts(root, images, part_for, problems):
    """({part: [(label file, picture)]}, names of pictures without a label file)."""
    files, unlabelled, used = {}, [], set()
    folders = [(root, sorted(n for n in os.listdir(root) if n.lower().endswith(".txt")))] if images else _label_folders(root)
    for folder, texts in folders:
        pictures = _stems(images) if images else _pictures_for(folder, root)
        for name in texts:
            picture = pictures.get(os.path.splitext(name)[0])
            if picture is None:
                problems.append(f"{name}: labels without a picture of that name; left out")
                continue
            used.add(os.path.abspath(picture))
            files.setdefault(part_for(picture), []).append((os.path.join(folder, name), picture))
        unlabelled += [p for p in pictures.values() if os.path.abspath(p) not in used]
    return files, sorted({os.path.basename(p) for p in unlabelled if os.path.abspath(p) not in used})


def _part_finder(root, declared, images):
    """picture -> part: as data.yaml declares (folders, or lists of pictures), else as the folders' names say, else "all", or "" where
    data.yaml declares others, all of which are there. Lists that were made elsewhere go by the pictures' names, as far as these differ."""
    folders, listed, by_name, absent = [], {}, {}, []
    bases, real_root = (os.path.join(root, str(declared.get("path") or "")), root), os.path.realpath(root)
    for part, keys in (("train", ("train",)), ("val", ("val", "valid")), ("test", ("test",))):
        for place in [p for key in keys for p in _as_list(declared.get(key))]:
            near = [os.path.join(base, place) for base in bases]
            near += [os.path.join(root, re.sub(r"^(\.\./)+", "", place))]                       # Roboflow writes ../train/images
            found = next((p for p in near if os.path.exists(p)), None)
            absent += [] if found else [place]
            if found and os.path.isdir(found):
                folders.append((os.path.abspath(found), part))
            elif found:
                for line in (line.replace("\\", "/") for line in read_lines(found)):
                    here = (os.path.realpath(os.path.join(base, line)) for base in (*bases, os.path.dirname(found)))
                    picture = next((path for path in here if path.startswith(real_root + os.sep) and os.path.isfile(path)), None)
                    lines = listed if picture else by_name.setdefault(os.path.basename(line), {})
                    lines.setdefault(picture or line, part)

    def part_for(picture):
        folder = os.path.dirname(os.path.abspath(picture))
        inside = [(len(f), part) for f, part in folders if folder == f or folder.startswith(f + os.sep)]
        elsewhere, real = by_name.get(os.path.basename(picture), {}), os.path.realpath(picture)
        if real in listed or len(elsewhere) == 1:
            return listed.get(real) or next(iter(elsewhere.values()))
        steps = os.path.relpath(folder, os.path.abspath(root)).split(os.sep)
        unnamed = "" if (folders or listed or by_name) and not (images or absent) else "all"
        return max(inside, key=lambda entry: entry[0])[1] if inside else next((p for p in map(part_of, reversed(steps)) if p), unnamed)
    return part_for


def _as_list(value):
    return [] if not value else [str(v) for v in value] if isinstance(value, list) else [str(value)]


def read_yaml(file):
    """The top level of a data.yaml: text, numbers, lists and one level of `key: value`; enough for what YOLO tools write, no more.

    Raises ValueError naming the line that is none of these.
    """
    out, key, begun = {}, None, ""                        # begun: a list or mapping in brackets that goes on in the next line
    with not_utf8(file), open(file, encoding="utf-8-sig") as handle:
        for number, raw in enumerate(handle, 1):
            line = _without_comment(raw)
            if not line.strip() or line.strip() == "---":
                continue
            if begun:
                begun = f"{begun} {line.strip()}"
                if _is_closed(begun):
                    out[key], begun = _flow(begun), ""
                continue
            inner = re.match(r"(?:\s+|(?=-\s))(?:-\s+(?P<item>.*)|(?P<key>[^:]+):\s*(?P<value>.*))$", line)
            outer = re.match(r"(?P<key>[^\s:][^:]*):\s*(?P<value>.*)$", line)
            if inner and key is not None:
                if inner["item"] is not None and isinstance(out[key], (list, type(None))):
                    out[key] = [*(out[key] or []), _scalar(inner["item"])]
                elif inner["key"] and isinstance(out[key], (dict, type(None))):     # deeper ones and lines of text say nothing
                    out[key] = {**(out[key] or {}), _key(inner["key"]): _scalar(inner["value"])}
            elif outer and not line[0].isspace():
                key = outer["key"].strip("\"'")
                begun = outer["value"].strip()
                if _is_closed(begun):
                    out[key], begun = _flow(begun), ""
            elif not (line[0].isspace() and key is not None):
                raise ValueError(f"{file}, line {number}: expected `key: value` or `- item`, got {line.strip()!r}")
    if begun:
        raise ValueError(f"{file}: expected {']' if begun[0] == '[' else '}'} at the end of {key}: {begun[:60]}")
    return out


def _without_comment(line):
    """The line up to a # at its start or behind a space; one in quotes is none. Quotes begin a key, a value or an item, not mid-word."""
    return re.match(r"""(?:(?<![^\s\[{,:])(?:'(?:[^']|'')*'|"(?:[^"\\]|\\.)*")|(?<=\S)#|[^#])*""", line)[0].rstrip()


def _is_closed(text):
    """False for a list or mapping in brackets whose end is not there yet."""
    return text[:1] not in ("[", "{") or text[-1:] == {"[": "]", "{": "}"}[text[0]]


def _flow(text):
    """A value on the key's own line: a scalar, [a, b] or {0: a, 1: b}."""
    if text[:1] == "[" and text[-1:] == "]":
        return [_scalar(v) for v in _split(text[1:-1])]
    if text[:1] == "{" and text[-1:] == "}":
        return {_key(k): _scalar(v) for k, _, v in (item.partition(":") for item in _split(text[1:-1]))}
    return _scalar(text)


def _split(text):
    """The items between commas, commas in quotes left alone."""
    return [item.strip() for item in re.findall(r"(?:'[^']*'|\"[^\"]*\"|[^,])+", text) if item.strip()]


def _scalar(text):
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return text[1:-1]
    return int(text) if re.fullmatch(r"-?\d+", text) else text or None


def _key(text):
    """A key; of digits, in quotes too, a number."""
    key = _scalar(text)
    return int(key) if re.fullmatch(r"\d+", str(key)) else key


# ---- classes

def _class_names(root, declared, lines, notes):
    """K names by class number; ValueError where labels use a number that has none."""
    names, source = declared.get("names"), "data.yaml"
    if isinstance(names, dict):
        names = [names.get(i, f"class {i}") for i in range(max((i for i in names if isinstance(i, int)), default=-1) + 1)]
    if names is not None and not isinstance(names, list):
        raise ValueError(f"{source}: names: expected a list such as [dent, scratch] or one `- name` a line, got {names!r}")
    if names and isinstance(declared.get("nc"), int) and declared["nc"] != len(names):
        notes.append(f"data.yaml says nc: {declared['nc']}, and names {len(names)} classes: the names are taken")
    places = [root, *sorted({os.path.dirname(label) for listed in lines.values() for label, _, _ in listed})]
    for file in (os.path.join(place, name) for place in places for name in NAME_FILES) if not names else ():
        if os.path.isfile(file):
            source, names = os.path.relpath(file, root), read_lines(file)
            break
    used = {}
    for listed in lines.values():
        for label, _, objects in listed:
            for number, values in objects:
                if values is not None:
                    used.setdefault(values[0], f"{os.path.basename(label)}, line {number}")
    if not names:
        names = [f"class {i}" for i in range(int(max(used, default=-1)) + 1)]
        notes.append(f"no data.yaml, classes.txt or obj.names with the classes' names: numbered 0 to {len(names) - 1}")
    names = [str(n) for n in names]
    lost = sorted(c for c in used if not c < len(names))
    if lost:
        raise ValueError(f"{used[lost[0]]}: class {lost[0]:g}, but {source} has {len(names)} names, 0 to {len(names) - 1} "
                         f"({', '.join(names[:8])}{', ...' if len(names) > 8 else ''}); add the missing names")
    return names


# ---- objects

def _lines(file):
    """[(line number, [class, numbers...] or None where the line is none)]."""
    out = []
    with open(file, encoding="utf-8-sig", errors="replace") as handle:
        for number, line in enumerate(handle, 1):
            fields = line.split()
            if fields:
                try:
                    values = [float(v) for v in fields]
                    out.append((number, values if 0 <= values[0] <= LARGEST_CLASS and values[0] == int(values[0]) else None))
                except (ValueError, OverflowError):
                    out.append((number, None))
    return out


def _read_part(listed, problems, picture_ids, object_ids):
    """Records of one part. picture_ids, object_ids: counters over all parts."""
    records = []
    for label, picture, lines in listed:
        image_id, name = next(picture_ids), os.path.basename(label)
        try:
            width, height, _ = picture_header(picture)
        except ValueError as error:
            problems.append(f"{os.path.basename(picture)}: {str(error).removeprefix(str(picture) + ': ')}; picture left out")
            continue
        objects = []
        for number, values in lines:
            annotation_id = next(object_ids)
            try:
                objects.append(_raw_object(annotation_id, values, width, height))
            except ValueError as error:
                objects.append(unusable(problems, f"{name}, annotation {annotation_id}: line {number}: {error}; dropped"))
        record = make_record(picture, image_id, objects, problems)
        if record is not None:
            records.append(record)
    return records


def _raw_object(annotation_id, values, width, height):
    if values is None:
        raise ValueError("expected a class number from 0 and coordinates")
    label, shares = int(values[0]) + 1, np.array(values[1:])
    if len(shares) == 4:
        x, y, w, h = shares
        corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    elif len(shares) >= 6 and len(shares) % 2 == 0:
        corners = shares
    else:
        raise ValueError(f"{len(shares)} numbers after the class; expected 4 (a box) or x, y pairs of at least 3 points")
    if not np.isfinite(shares).all() or shares.max() > 1 + OUTSIDE or shares.min() < -OUTSIDE:
        raise ValueError(f"coordinates from {shares.min():g} to {shares.max():g} are no shares of the picture (0 to 1)")
    scaled = corners.reshape(-1, 2) * (width, height)
    return RawObject(annotation_id, label, None, tuple(scaled.ravel())) if len(shares) == 4 else RawObject(annotation_id, label, [scaled])


# ---- writing

def write(dataset, folder, boxes=False):
    """Writes a Dataset as images/<part>/, labels/<part>/ and data.yaml; pictures are copied. Returns notes on what YOLO cannot hold.

    boxes: detection lines instead of rings. An object without an outline is a box line either way. Parts and holes of one object are joined
    by bridges of no width, as YOLO tools do; crowd regions have no form and are left out.
    """
    crowd, taken, notes = 0, {}, []
    for part, records in dataset.parts.items():
        if any(r.label_map for r in records):
            raise ValueError(f"{dataset.path}: YOLO labels hold objects, got masks of pixel labels, which do not say where one ends")
        for kind in ("images", "labels"):
            os.makedirs(os.path.join(folder, kind, part), exist_ok=True)
        for record in records:
            stem, extension = os.path.splitext(os.path.basename(record.file))
            count = taken[part, stem] = taken.get((part, stem), 0) + 1
            stem += f"_{count}" if count > 1 else ""
            shutil.copyfile(record.file, os.path.join(folder, "images", part, stem + extension))
            crowd += int(record.crowd.sum())
            with open(os.path.join(folder, "labels", part, stem + ".txt"), "w", encoding="utf-8") as handle:
                handle.writelines(f"{line}\n" for line in lines_of(record, boxes))
    with open(os.path.join(folder, "data.yaml"), "w", encoding="utf-8") as handle:
        handle.writelines(f"{part if part != 'all' else 'train'}: images/{part}\n" for part in dataset.parts)
        handle.write(f"nc: {len(dataset.class_names)}\nnames:\n")
        handle.writelines(f"  {k}: {_quoted(name)}\n" for k, name in enumerate(dataset.class_names))
    if crowd:
        notes.append(f"{crowd} crowd regions left out: YOLO labels have no form for them")
    return notes


def _quoted(name):
    return f'"{name}"' if '"' not in name else f"'{name}'"


def lines_of(record, boxes=False):
    """The lines of a record's .txt, crowd regions left out; six decimals, a thousandth of a pixel."""
    lines, size = [], np.array([record.width, record.height], np.float64)
    for box, label, mask, crowd in zip(record.boxes, record.labels, record.masks, record.crowd):
        if crowd:
            continue
        if boxes or mask is None:
            x0, y0, x1, y1 = np.asarray(box, np.float64)
            shares = np.array([x0 + x1, y0 + y1, 2 * (x1 - x0), 2 * (y1 - y0)]) / 2 / np.tile(size, 2)
        else:
            rings = mask if isinstance(mask, list) else [ring for outer, holes in mask_codec.to_polygons(mask) for ring in (outer, *holes)]
            shares = (join_rings(rings) / size).ravel()
        lines.append(" ".join([str(int(label) - 1), *(f"{v:.6f}".rstrip("0").rstrip(".") for v in shares)]))
    return lines


def join_rings(rings):
    """One ring [P, 2] of several: each is entered and left at the corner nearest to what is joined already, over the same bridge."""
    joined = np.asarray(rings[0], np.float64)
    for ring in rings[1:]:
        ring = np.asarray(ring, np.float64)
        apart = ((joined[:, None] - ring[None]) ** 2).sum(-1)                                   # [P, Q]
        i, j = np.unravel_index(int(apart.argmin()), apart.shape)
        joined = np.concatenate([joined[:i + 1], ring[j:], ring[:j + 1], joined[i:]])
    return joined
