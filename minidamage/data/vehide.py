"""VehiDE in its own layout: `0Train_via_annos.json` with `image/image/*.jpg`, `0Val_via_annos.json` with
`validation/validation/*.jpg`; each JSON is {file name: {"name": ..., "regions": [{"all_x": [...], "all_y": [...], "class": code}]}}.

Class codes are Vietnamese. A code that is not in the table is an error that lists the known ones: one public project guessed
`mop` for `mop_lom` and silently lost all 5,681 dents.

Pictures of one vehicle share a moment: names begin with DDMMYYYY_HHMMSS or YYYYMMDD_HHMMSS, and `Thumbnail<name>.jpg` is a small copy
of `<name>.jpg`. Times at most a minute apart make one group. Some groups lie in both official parts:
`python -m minidamage.data` counts them.
"""
import datetime
import difflib
import itertools
import json
import os
import re

import numpy as np

from minidamage.data.objects import PictureFinder, RawObject, find_record, read_json, unlisted_pictures, unusable
from minidamage.data.record import Dataset

# code -> English name; the position is the category id (1..7). Dents, scratches and glass first: they are DamageNet's three.
CLASSES = {"mop_lom": "dent", "tray_son": "scratch", "vo_kinh": "broken glass", "rach": "tear", "thung": "puncture",
           "mat_bo_phan": "missing part", "be_den": "broken lamp"}
FILES = {"train": ("0Train_via_annos.json", "image"), "val": ("0Val_via_annos.json", "validation")}
SESSION_GAP = datetime.timedelta(seconds=60)


def recognise(path):
    """Whether `path` is a folder with one of the two annotation files, or one of these files."""
    names = [os.path.basename(path)] if os.path.isfile(path) else os.listdir(path)
    return any(name.lower() == file.lower() for name in names for file, _ in FILES.values())


def read(path, images=None, **_):
    """Reads both parts (or the one file that `path` names). Returns a Dataset; see load_dataset for what is raised."""
    root = os.path.dirname(path) or "." if os.path.isfile(path) else path
    listing = {name.lower(): name for name in os.listdir(root)}
    found = {part: listing[file.lower()] for part, (file, _) in FILES.items() if file.lower() in listing
             and (os.path.isdir(path) or os.path.basename(path).lower() == file.lower())}
    entries = {part: _read_entries(os.path.join(root, file)) for part, file in found.items()}
    used = _used_codes(entries, found)
    label_of = {code: k + 1 for k, code in enumerate(code for code in CLASSES if code in used)}

    problems, notes, parts = [], [], {}
    picture_ids, object_ids = itertools.count(1), itertools.count(1)
    for part, listed in entries.items():
        folder = FILES[part][1]
        finder = PictureFinder([images] if images else [os.path.join(root, folder, folder), os.path.join(root, folder), root],
                               root=root, part=folder)
        parts[part] = _read_part(listed, finder, label_of, problems, picture_ids, object_ids)
        extra = sum(unlisted_pictures(f, parts[part], listed) for f in finder.folders[:1])
        if extra:
            notes.append(f"{extra} pictures in {finder.folders[0]} are not in {found[part]}: left out (not known to be undamaged)")
    absent = [name for code, name in CLASSES.items() if code not in used]
    if absent:
        notes.append(f"classes of VehiDE that this set does not have: {', '.join(absent)}")
    set_sessions([r for records in parts.values() for r in records])
    codes = list(label_of)
    return Dataset(path=str(path), layout="vehide", class_names=tuple(CLASSES[c] for c in codes),
                   category_ids=tuple(list(CLASSES).index(c) + 1 for c in codes), parts=parts, problems=problems, notes=notes)


def class_code(name):
    """The table's code for a class name as written in a file (code or English name, any letter case), or None."""
    key = re.sub(r"[\s\-]+", "_", str(name).strip()).lower()
    english = {value.replace(" ", "_"): code for code, value in CLASSES.items()}
    return key if key in CLASSES else english.get(key)


def _read_entries(file):
    listed = read_json(file)
    if not isinstance(listed, dict):
        raise ValueError(f"{file}: expected {{file name: {{'regions': [...]}}}}, got a {type(listed).__name__}")
    for name, entry in listed.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("regions"), (dict, list, type(None))):
            raise ValueError(f"{file}: {name}: expected {{'regions': [...]}}, got {str(entry)[:80]}")
    return listed


def _regions(entry):
    regions = entry.get("regions")
    return list(regions.values()) if isinstance(regions, dict) else regions or []


def _is_region(region):
    return isinstance(region, dict) and all(isinstance(region.get(key) or [], list) for key in ("all_x", "all_y"))


def _used_codes(entries, files):
    """The codes that occur; ValueError with every unknown name, where it first occurs and how often."""
    used, unknown = set(), {}
    for part, listed in entries.items():
        for name, entry in listed.items():
            for region in filter(_is_region, _regions(entry)):
                code = class_code(region.get("class", ""))
                if code is None:
                    unknown.setdefault(str(region.get("class", "")), []).append(f"{files[part]}, {name}")
                used.add(code)
    if unknown:
        lines = [f"{name!r} ({len(where)} regions, first in {where[0]}"
                 + "".join(f"; did you mean {near!r}?" for near in difflib.get_close_matches(name.lower(), CLASSES, 1, 0.4)) + ")"
                 for name, where in unknown.items()]
        raise ValueError("unknown VehiDE class: " + ", ".join(lines) + ". Known: "
                         + ", ".join(f"{c} ({n})" for c, n in CLASSES.items()) + ". Rename them in the annotation file.")
    return used


def _read_part(listed, finder, label_of, problems, picture_ids, object_ids):
    """Records of one JSON. picture_ids, object_ids: counters over both parts."""
    records = []
    for name, entry in listed.items():
        image_id, objects = next(picture_ids), []
        for region in _regions(entry):
            annotation_id = next(object_ids)
            if not _is_region(region):
                objects.append(unusable(problems, f"{name}, annotation {annotation_id}: not a region with lists all_x and all_y; dropped"))
                continue
            x, y = region.get("all_x") or [], region.get("all_y") or []
            if len(x) != len(y):
                objects.append(unusable(problems, f"{name}, annotation {annotation_id}: {len(x)} x for {len(y)} y coordinates; dropped"))
                continue
            objects.append(RawObject(annotation_id, label_of[class_code(region["class"])], [list(zip(x, y))]))
        records.append(find_record(finder, name, image_id, objects, problems))
    return [record for record in records if record is not None]


def moment(name):
    """The time in a camera's file name (DDMMYYYY_HHMMSS or YYYYMMDD_HHMMSS, `Thumbnail` in front allowed), or None."""
    match = re.match(r"(?:thumbnail)?(\d{8})_(\d{6})", os.path.basename(name), re.IGNORECASE)
    for form in ("%d%m%Y%H%M%S", "%Y%m%d%H%M%S") if match else ():
        try:
            when = datetime.datetime.strptime(match[1] + match[2], form)
        except ValueError:
            continue
        if 1990 <= when.year <= 2100:
            return when
    return None


def set_sessions(records):
    """Fills Record.group: pictures whose names carry times at most SESSION_GAP apart are taken to show one vehicle."""
    timed = sorted(((moment(r.file), i) for i, r in enumerate(records) if moment(r.file)))
    session = last = None
    for when, i in timed:
        if last is None or when - last > SESSION_GAP:
            session = when.strftime("session %Y-%m-%d %H:%M:%S")
        records[i].group, last = session, when
    return records


def write(folder, part, pictures):
    """Writes one part's annotation file. pictures: {file name: list of (English class name, polygon [P, 2])}. For synthetic.py."""
    code_of = {name: code for code, name in CLASSES.items()}
    listed = {}
    for name, objects in pictures.items():
        regions = [{"all_x": np.round(points[:, 0], 2).tolist(), "all_y": np.round(points[:, 1], 2).tolist(), "class": code_of[label]}
                   for label, points in objects]
        listed[name] = {"name": name, "regions": regions}
    with open(os.path.join(folder, FILES[part][0]), "w", encoding="utf-8") as handle:
        json.dump(listed, handle)
