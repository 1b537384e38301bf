"""COCO JSON (Lin et al. 2014): {"images": [...], "annotations": [...], "categories": [...]}.

Found as `annotations/instances_<part>*.json` with `<part>*/` beside it, as Roboflow's `<part>/_annotations.coco.json`, as
`<part>.json` next to or one folder below the pictures, or as one file. Segmentations may be polygons (several = parts of one
object), RLE with counts as a list or as COCO's compressed text, or missing. Labels are 1..K without gaps; the ids of the files stay in
Dataset.category_ids. Categories are joined over the parts by name, never by id.
"""
import math
import os

from minidamage.data.folders import PARTS, part_of
from minidamage.data.objects import PictureFinder, RawObject, make_record, read_json, unlisted_pictures, unusable
from minidamage.data.record import Dataset


def recognise(path):
    """Whether `path` is a COCO JSON or a folder in one of the layouts above."""
    found = bool(_find_files(path))
    if not found:
        _loaded.clear()
    return found


def read(path, images=None, **_):
    """Reads every part. images: folder of the pictures, when it is none of the usual places."""
    files = _find_files(path)
    loaded = {part: _load(file) for part, file in files.items()}
    for part, content in loaded.items():
        _check_fields(files[part], content)
    _loaded.clear()
    notes, problems = [], []
    for part, content in loaded.items():
        _number_text_ids(content, part, notes)
    names, ids, label_of = _class_map(files, loaded, notes)
    parts = {}
    for part, file in files.items():
        finder = _finder(path, part, file, images)
        parts[part] = _read_part(loaded[part], label_of[part], finder, problems)
    for folder in dict.fromkeys(os.path.dirname(records[0].file) for records in parts.values() if records):
        of_it = [part for part, records in parts.items() if records and os.path.dirname(records[0].file) == folder]
        listed = [os.path.basename(image["file_name"]) for part in of_it for image in loaded[part]["images"]]
        extra = unlisted_pictures(folder, [record for part in of_it for record in parts[part]], listed)
        if extra:
            notes.append(f"{extra} pictures in {folder} are not in {', '.join(os.path.basename(files[part]) for part in of_it)}: left out")
    return Dataset(path=str(path), layout="coco", class_names=tuple(names), category_ids=tuple(ids), parts=parts,
                   problems=problems, notes=notes)


def _find_files(path):
    """{part: COCO JSON}; a single file without a part in its name is "all"."""
    if os.path.isfile(path):
        return {"all": path} if _is_coco(path) else {}
    places = [path, os.path.join(path, "annotations"), os.path.join(path, "coco")]
    places += [os.path.join(path, n) for n in sorted(os.listdir(path)) if part_of(n)]
    for group in (places[:1], places[1:2], places[2:3], places[3:]):
        found = [os.path.join(folder, n) for folder in group if os.path.isdir(folder) for n in sorted(os.listdir(folder))
                 if n.lower().endswith(".json")]
        instances = [f for f in found if os.path.basename(f).startswith("instances")]
        found = [f for f in (instances or found) if _is_coco(f)]
        if found:
            return _name_parts(path, found)
    return {}


def _name_parts(path, found):
    """The part that each file's name, or its folder inside `path`, says. One file that says nothing is "all"."""
    named = {}
    for file in found:
        stem, folder = os.path.splitext(os.path.basename(file))[0], os.path.relpath(os.path.dirname(file), path)
        part = part_of(stem) or part_of(folder) or ("all" if len(found) == 1 else None)
        if part is None or part in named:
            raise ValueError(f"{path}: several COCO files ({', '.join(os.path.relpath(f, path) for f in found)}) and their names do not "
                             "say which is train, val or test; give one file, or rename them")
        named[part] = file
    return {part: named[part] for part in ("all", *PARTS) if part in named}


def _is_coco(file):
    """Looks at the whole JSON: the keys may come in any order."""
    try:
        content = _load(file)
    except ValueError:
        return False
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


_loaded = {}                                   # (path, size, time) -> content: recognise and read need the same large file


def _load(file):
    stat = os.stat(file)
    key = (os.path.abspath(file), stat.st_size, stat.st_mtime_ns)
    if key not in _loaded:
        while len(_loaded) >= 3:
            _loaded.pop(next(iter(_loaded)))
        _loaded[key] = read_json(file)
    return _loaded[key]


def _plain_number(value):
    """1 for 1, 1.0 and "1", which some exporters mix; anything else as it is."""
    if isinstance(value, str) and value.isdecimal() and str(int(value)) == value:
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number_text_ids(content, part, notes):
    """Some exporters write ids as text, or as numbers beyond 64 bits; pictures and annotations are then counted from 1, in the file's
    order. Changes `content`."""
    for key, fields in (("images", ("id",)), ("annotations", ("id", "image_id", "category_id")), ("categories", ("id",))):
        for entry in content[key]:
            entry.update({field: _plain_number(entry[field]) for field in fields})
    for key, refers in (("images", "annotations"), ("annotations", None)):
        if all(isinstance(entry["id"], int) and abs(entry["id"]) < 2 ** 63 for entry in content[key]):
            continue
        number = {}
        for entry in content[key]:
            entry["id"] = number.setdefault(str(entry["id"]), len(number) + 1)
        for entry in content[refers] if refers else ():
            entry["image_id"] = number.get(str(entry["image_id"]), -1)
        notes.append(f"{part}: {key} have ids that are text, or no 64-bit numbers; numbered 1 to {len(number)}")


def _check_fields(file, content):
    if not content.get("categories"):
        raise ValueError(f"{file}: no \"categories\"; expected a list of {{'id': ..., 'name': ...}}")
    needed = {"images": ("id", "file_name"), "annotations": ("id", "image_id", "category_id"), "categories": ("id", "name")}
    for key, fields in needed.items():
        for i, entry in enumerate(content[key]):
            absent = [f for f in fields if f not in entry]
            if absent:
                raise ValueError(f"{file}: {key}[{i}] has no {', '.join(absent)}")


def _class_map(files, loaded, notes):
    """(K names, K ids, {part: {category id in that file: label}}); ValueError for annotations with ids of no category."""
    used, names, ids = {}, [], []
    for part, content in loaded.items():
        used[part] = {a["category_id"] for a in content["annotations"]}
        known = {c["id"]: c["name"] for c in content["categories"]}
        lost = sorted(used[part] - known.keys(), key=str)
        if lost:
            first = next((a for a in content["annotations"] if a["category_id"] not in known), None)
            raise ValueError(f"{files[part]}: annotation {first['id']} has category_id {lost[0]}, which is no category"
                             + (f" (nor are {lost[1:]})" if lost[1:] else "") + (" (0 is the background)" if lost[0] == 0 else "")
                             + f". Known: {', '.join(f'{i} {n}' for i, n in sorted(known.items()))}")
    objects_of = {(c["name"].lower(), c["id"]) for part, content in loaded.items() for c in content["categories"] if c["id"] in used[part]}
    used_names = {name for name, _ in objects_of}
    # Roboflow lists the project's name as category 0 and as everyone's supercategory, sometimes with a real class's name.
    parents = {(str(c["supercategory"]).lower(), c["id"]) for content in loaded.values() for c in content["categories"]
               if c.get("supercategory")}
    is_parent = lambda c: any(name == c["name"].lower() and child != c["id"] for name, child in parents)
    dropped, spelled, labels, moved = {}, {}, {}, set()
    for part, content in loaded.items():
        labels[part] = {}
        for category in sorted(content["categories"], key=lambda c: c["id"]):
            key = category["name"].lower()
            if (key, category["id"]) not in objects_of and is_parent(category):
                dropped[category["id"]] = category["name"]
                continue
            if key not in spelled:
                spelled[key] = len(names) + 1
                names.append(category["name"])
                ids.append(category["id"])
            label = spelled[key]
            labels[part][category["id"]] = label
            if names[label - 1] != category["name"]:
                notes.append(f"{category['name']!r} and {names[label - 1]!r} are one class")
            if ids[label - 1] != category["id"]:
                moved.add(f"{category['name']!r} is {category['id']} in {part}, {ids[label - 1]} in the map")
    if dropped:
        notes.append("parent categories without objects left out: " + ", ".join(f"{i} {n}" for i, n in sorted(dropped.items())))
    if moved:
        notes.append("ids differ between the files, joined by name: " + "; ".join(sorted(moved)))
    unused = [n for n in names if n.lower() not in used_names]
    if unused:
        notes.append(f"{len(unused)} classes without objects are kept: {', '.join(unused[:8])}{', ...' if len(unused) > 8 else ''}")
    return names, ids, labels


def _finder(path, part, file, images):
    folder = os.path.dirname(os.path.abspath(file))
    parent = os.path.dirname(folder)
    stem = os.path.splitext(os.path.basename(file))[0].removeprefix("instances_")
    places = [folder, os.path.join(folder, "images"), os.path.join(folder, stem)]
    for base in (folder, parent):
        for name in (stem, *PARTS.get(part, ())):
            places += [os.path.join(base, name), os.path.join(base, "images", name), os.path.join(base, name, "images")]
        places.append(os.path.join(base, "images"))
    inside = os.path.abspath(path) if os.path.isdir(path) else folder
    nested = os.path.basename(folder).lower() in ("coco", "annotations", "annos", "labels", "json")
    return PictureFinder([images] if images else places, root=None if images else parent if nested else inside, part=part)


def _read_part(content, label_of, finder, problems):
    by_image = {}
    for annotation in content["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    records, seen, entries = [], set(), {}                     # entries: {file: (its image, annotations)}
    for image in content["images"]:
        name, annotations = os.path.basename(image["file_name"]), by_image.pop(image["id"], [])
        if image["id"] in seen:
            problems.append(f"{name}: image id {image['id']} is given twice; this entry left out")
            continue
        seen.add(image["id"])
        file = finder.find(image["file_name"])
        if file is None:
            problems.append(f"{name}: the annotation file names it but it is not there; picture left out ({len(annotations)} objects)")
            continue
        if file in entries:                                    # as merged files have it
            problems.append(f"{name}: listed twice, as image {entries[file][0]['id']} and {image['id']}; objects joined")
            entries[file][1].extend(annotations)
        else:
            entries[file] = image, annotations
    for file, (image, annotations) in entries.items():
        name, objects = os.path.basename(image["file_name"]), []
        size = (_plain_number(image["width"]), _plain_number(image["height"])) if image.get("width") and image.get("height") else None
        for annotation in annotations:
            try:
                objects.append(_raw_object(annotation, label_of, name, problems))
            except (TypeError, AttributeError, IndexError, OverflowError) as error:
                objects.append(unusable(problems, f"{name}, annotation {annotation['id']}: cannot be read ({error}); dropped"))
        record = make_record(file, image["id"], objects, problems, listed_size=size)
        if record is not None:
            records.append(record)
    for image_id, annotations in by_image.items():
        problems.append(f"image id {image_id}: {len(annotations)} annotations of a picture that is not listed; dropped")
    return records


def _raw_object(annotation, label_of, name, problems):
    segmentation, box = annotation.get("segmentation"), annotation.get("bbox")
    if isinstance(segmentation, list):
        if segmentation and not isinstance(segmentation[0], (list, tuple)):            # one flat ring, as some exporters write
            segmentation = [segmentation]
        odd = [s for s in segmentation if len(s) % 2 and not isinstance(s[0], (list, tuple))]
        if odd:
            problems.append(f"{name}, annotation {annotation['id']}: an outline has an odd number of coordinates; outline dropped")
            segmentation = [s for s in segmentation if s not in odd]
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
        segmentation = {"size": segmentation.get("size"), "counts": segmentation["counts"].encode()}
    if box is not None:
        if len(box) != 4 or not all(isinstance(v, (int, float)) for v in box):
            return unusable(problems, f"{name}, annotation {annotation['id']}: bbox {box} is not [x, y, width, height]; dropped")
        box = (box[0], box[1], box[0] + box[2], box[1] + box[3])
    area = annotation.get("area")
    if area is not None and not (isinstance(area, (int, float)) and 0 <= area < math.inf):
        area = unusable(problems, f"{name}, annotation {annotation['id']}: area {area!r:.40} is no number of pixels; taken from its "
                        "outline")
    return RawObject(annotation["id"], label_of[annotation["category_id"]], segmentation or None, box,
                     str(annotation.get("iscrowd") or 0).lower() not in ("0", "0.0", "false"), area)
