"""Pascal VOC (Everingham et al. 2010): one XML a picture, with boxes and class names; the layout of NEU-DET too.

    JPEGImages/ Annotations/ ImageSets/Main/{train,val,trainval,test}.txt       VOC itself; the lists are the parts
    IMAGES/ ANNOTATIONS/ Validation_Images/ Validation_Annotations/             NEU-DET; a folder's name says its part
    train/annotations/ train/images/<class>/ validation/...                     the same, another way round
    one folder with both, as LabelImg leaves it                                 one part, "all"

Boxes are numbers of pixels: the first is 1 and the last one counts, so xmin 1, xmax 200 is the whole of a picture 200 wide, here
[0, 200]. Tools that write corners (0 to 200) are read with voc_boxes="corners". `difficult` objects are neither targets nor false
alarms, as VOC has it; with voc_difficult="count" they are objects like the others. (NEU-DET marks 81 of its 4,189 so. Its papers do not
say what they did; tools that turn VOC into COCO often forget the mark, and so count them.) They are kept as COCO's crowd regions: in the
COCO numbers, AP50 among them, a finding that lies in one counts nowhere however small it is, where VOC's own AP (metrics/voc.py) asks for
an IoU of 0.5. A detector trains on them, as on all crowd regions, as background; a segmenter's pixels there count nowhere.
The picture of an XML is the one of the XML's own name; <filename>, often wrong, is asked where there is none.
"""
import collections
import difflib
import itertools
import operator
import os
import re
import xml.etree.ElementTree as ElementTree

from minidamage.data.folders import PARTS, part_of, walk
from minidamage.data.objects import PictureFinder, RawObject, make_record, read_lines, unlisted_pictures, unusable
from minidamage.data.pictures import EXTENSIONS, is_picture_name
from minidamage.data.record import Dataset

VOC_BOXES, VOC_DIFFICULT = ("pixels", "corners"), ("ignore", "count")
DEPTH = 5                                      # folders below the data set's in which XML files are sought
KNOWN_SETS = {
    "NEU-DET": ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches"),       # the paper's order
    "Pascal VOC": ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
                   "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")}
MOSTLY = 0.95                                  # share of the objects whose names make a set one of these; the others are then misspelt
NEU_TEST_SHARE = 0.2                           # NEU-DET's papers train on 1,440 pictures and report on 360


def recognise(path):
    """Whether `path` is a folder with VOC annotations in it or below it."""
    return os.path.isdir(path) and bool(_xml_folders(path))


def read(path, images=None, voc_boxes="pixels", voc_difficult="ignore", **_):
    """Reads every part. images: folder of the pictures. voc_boxes: "pixels" (numbers of pixels, from 1) | "corners" (as they stand).
    voc_difficult: "ignore" (neither targets nor false alarms) | "count" (objects like the others)."""
    for option, value, known in (("voc_boxes", voc_boxes, VOC_BOXES), ("voc_difficult", voc_difficult, VOC_DIFFICULT)):
        if value not in known:
            raise ValueError(f"{option}: expected {' or '.join(known)}, got {value!r}")
    notes, problems, picture_ids, object_ids = [], [], itertools.count(1), itertools.count(1)
    files = _files_of_parts(path, notes, problems)
    parsed = {part: [(file, root) for file in listed for root in [_parse(file, problems)] if root is not None]
              for part, listed in files.items()}
    names, label_of = _class_map(path, [entry for listed in parsed.values() for entry in listed], notes)
    tally, parts = collections.Counter(), {}
    for part, listed in parsed.items():
        parts[part] = _read_part(path, part, listed, label_of, images, (voc_boxes, voc_difficult), problems, picture_ids, object_ids,
                                 tally)
    _add_notes(notes, tally, voc_boxes, voc_difficult, parts,
               {part: [os.path.basename(f) for f in listed] for part, listed in files.items()})
    dataset = Dataset(path=str(path), layout="voc", class_names=names, category_ids=tuple(range(1, len(names) + 1)), parts=parts,
                      problems=problems, notes=notes)
    if names == KNOWN_SETS["NEU-DET"]:
        _neu_protocol(dataset)
    return dataset


def _add_notes(notes, tally, voc_boxes, voc_difficult, parts, files):
    """What was decided while reading, and how often."""
    if tally["from 0"] and voc_boxes == "pixels":
        notes.append(f"{tally['from 0']} boxes begin at 0, and VOC counts pixels from 1: if the tool wrote corners, "
                     "read with voc_boxes=\"corners\" (--voc-boxes corners)")
    if voc_boxes == "corners":
        notes.append("boxes are taken as corners, from 0")
    fate = ("are neither targets nor false alarms (voc_difficult=\"count\", --voc-difficult count: objects like the others)"
            if voc_difficult == "ignore" else "count as the others do")
    for key, text in (("named", "XML files name another picture in <filename>; the one with the XML's own name is taken"),
                      ("difficult", f"difficult objects {fate}"),
                      ("above", "pictures were found outside the folder, beside it or above it: give the folder that holds both if they "
                                "are not its own")):
        if tally[key]:
            notes.append(f"{tally[key]} {text}")
    for part, records in parts.items():
        stems = {os.path.splitext(name)[0] for name in files[part]}
        for folder in sorted({os.path.dirname(r.file) for r in records}):
            own = [n for n in os.listdir(folder) if os.path.splitext(n)[0] in stems]
            everyone = [r for other in parts.values() for r in other if os.path.dirname(r.file) == folder]
            extra = unlisted_pictures(folder, everyone, own)
            if extra:
                notes.append(f"{extra} pictures in {folder} are in no XML that was read: left out (not known to be undamaged)")
    notes[:] = list(dict.fromkeys(notes))


# ---- files and parts

def _xml_folders(path):
    """Folders, `path` or below, that hold XML with <annotation> as its root; the first readable file of each is looked at."""
    found = []
    for folder, below, names in walk(os.path.abspath(path), depth=DEPTH):
        below.sort()
        if any(_is_voc(os.path.join(folder, n)) for n in sorted(filter(_is_xml_name, names))[:5]):
            found.append(os.path.join(path, os.path.relpath(folder, os.path.abspath(path))) if folder != os.path.abspath(path) else path)
    return found


def _is_xml_name(name):
    return name.lower().endswith(".xml") and not name.startswith(".")


def _is_voc(file):
    try:
        for _, element in ElementTree.iterparse(file, events=("start",)):
            return element.tag == "annotation"
    except (ElementTree.ParseError, OSError, ValueError):
        pass
    return False


def _xml_files(folder):
    return [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if _is_xml_name(name)]


def _files_of_parts(path, notes, problems):
    """{part: XML files}: by the lists in ImageSets/Main where there are any, else by the names of the folders."""
    parts, unnamed = collections.defaultdict(list), []
    for folder in _xml_folders(path):
        lists = _image_sets(folder)
        if lists:
            for part, listed in _listed_files(folder, lists, problems).items():
                parts[part] += listed
            continue
        relative = os.path.relpath(folder, path)
        part = next((p for p in map(part_of, reversed(relative.split(os.sep))) if p), None)
        parts[part or "all"] += _xml_files(folder)
        unnamed += [] if part else [relative]
    if len(parts) > 1 and "all" in parts:                     # a part without a name beside others that have one
        if "train" in parts:
            raise ValueError(f"{path}: {', '.join(unnamed)} does not say whether it is train, val or test, and another folder is train; "
                             "rename it, or give one folder")
        parts["train"] = parts.pop("all")
        notes.append(f"{', '.join(unnamed)} taken as train")
    return {part: parts[part] for part in ("all", *PARTS) if part in parts}


def _image_sets(folder):
    """{"train": list file, ...} of ImageSets/Main beside an annotation folder; trainval stands in where there is no train."""
    main = os.path.join(os.path.dirname(os.path.abspath(folder)), "ImageSets", "Main")
    found = {name: os.path.join(main, name + ".txt") for name in ("train", "val", "trainval", "test")
             if os.path.isfile(os.path.join(main, name + ".txt"))}
    both = found.pop("trainval", None)
    return {"train": both, **found} if both and "train" not in found and "val" not in found else found


def _listed_files(folder, lists, problems):
    have = {os.path.splitext(os.path.basename(file))[0]: file for file in _xml_files(folder)}
    parts = {}
    for part, file in lists.items():
        names = [line if line in have else re.sub(r"\s+-?[01]$", "", line) for line in read_lines(file)]      # "name", "name -1"
        for name in (n for n in names if n not in have):
            problems.append(f"{name}: listed in {os.path.basename(file)}, but it has no XML; picture left out")
        parts[part] = [have[name] for name in dict.fromkeys(names) if name in have]
    return parts


def _parse(file, problems):
    """The root element, or None and a problem line."""
    name = os.path.basename(file)
    try:
        root = ElementTree.parse(file).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:           # LookupError: an encoding that nobody knows
        return unusable(problems, f"{name}: not valid XML ({error}); picture left out")
    return root if root.tag == "annotation" else unusable(problems, f"{name}: <{root.tag}> instead of <annotation>; picture left out")


# ---- classes

def _key(name):
    return re.sub(r"[\s\-]+", "_", name.strip()).lower()


def _name(element):
    return " ".join((element.findtext("name") or "").split())


def _class_map(path, parsed, notes):
    """(class names, {spelling key: label}). The full list of a known set, else the names found, sorted.

    ValueError for a few foreign names in a known set: they are misspelt, and leaving them out would lose objects silently.
    """
    spelled, where = collections.defaultdict(collections.Counter), {}
    for file, root in parsed:
        for element in root.findall("object"):
            if _name(element):
                spelled[_key(_name(element))][_name(element)] += 1
                where.setdefault(_key(_name(element)), os.path.basename(file))
    counts = {key: sum(counter.values()) for key, counter in spelled.items()}
    for title, known in KNOWN_SETS.items():
        own = {_key(name): k + 1 for k, name in enumerate(known)}
        inside = sum(count for key, count in counts.items() if key in own)
        if 2 * len(own.keys() & counts.keys()) < len(own):
            continue
        if inside < MOSTLY * sum(counts.values()):
            others = sorted(next(iter(spelled[key])) for key in counts.keys() - own.keys())
            notes.append(f"some class names are those of {title}, but {', '.join(map(repr, others))} are not: taken as a set of its own")
            continue
        foreign = sorted(counts.keys() - own.keys())
        if foreign:
            raise ValueError(f"{path}: unknown {title} class: " + ", ".join(_foreign(spelled[key], where[key], known) for key in foreign)
                             + f". Known: {', '.join(known)}. Rename them in the XML files")
        notes.append(f"class list of {title}")
        return known, own
    names = [min(spelled[key], key=lambda name: (-spelled[key][name], name)) for key in sorted(spelled)]
    for key, name in zip(sorted(spelled), names):
        if len(spelled[key]) > 1:
            notes.append(f"{', '.join(map(repr, sorted(spelled[key])))} are one class, {name!r}")
    return tuple(names), {key: k + 1 for k, key in enumerate(sorted(spelled))}


def _foreign(counter, file, known):
    name = next(iter(counter))
    near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
    return f"{name!r} ({sum(counter.values())} objects, first in {file}{f'; did you mean {near[0]!r}?' if near else ''})"


# ---- pictures and objects

def _read_part(path, part, parsed, label_of, images, options, problems, picture_ids, object_ids, tally):
    """Records of one part. options: (voc_boxes, voc_difficult). picture_ids, object_ids: counters over all parts."""
    records, taken, finders = [], {}, {}
    for file, root in parsed:
        folder, xml = os.path.dirname(file), os.path.basename(file)
        if folder not in finders:
            finders[folder] = PictureFinder([images] if images else _picture_folders(folder, path, part), root=images or path,
                                            part="" if part == "all" else part)
        picture = _find_picture(finders[folder], os.path.splitext(xml)[0], root.findtext("filename") or "", tally)
        elements, said = root.findall("object"), []
        image_id = next(picture_ids)
        numbers = {next(object_ids): number for number, _ in enumerate(elements, 1)}              # VOC's objects have none but their order
        if picture is None:
            problems.append(f"{xml}: its picture is not there; picture left out ({len(elements)} objects)")
            continue
        tally["above"] += not images and not _is_below(picture, path)
        first = taken.setdefault(os.path.realpath(picture), xml)
        if first != xml:
            problems.append(f"{xml}: its picture, {os.path.basename(picture)}, is also that of {first}; this XML left out")
            continue
        objects = [_raw_object(element, annotation_id, label_of, options, os.path.basename(picture), said, tally)
                   for annotation_id, element in zip(numbers, elements)]
        record = make_record(picture, image_id, objects, said, listed_size=_size(root))
        in_file = lambda match: f", object {numbers.get(int(match[1]), match[1])}:"
        problems += [re.sub(r", annotation (\d+):", in_file, line) for line in said]
        if record is not None:
            records.append(record)
    return records


def _picture_folders(folder, path, part):
    """Where the pictures of an annotation folder may lie: in it, beside it (folders of the same part first), above it.

    Where it is itself what was asked for, what lies beside it may be another data set: only folders of pictures, by their names, and
    only if it has no picture of its own.
    """
    parent, alone = os.path.dirname(os.path.abspath(folder)), os.path.abspath(folder) == os.path.abspath(path)
    if alone and any(map(is_picture_name, os.listdir(folder))):
        return [folder]
    beside = [name for name in sorted(os.listdir(parent)) if os.path.isdir(os.path.join(parent, name))]
    own = part_of(os.path.basename(os.path.abspath(folder))) or part
    same_part = lambda name: (part_of(name) or part) == own
    of_pictures = lambda name: any(word in name.lower() for word in ("image", "img", "jpeg", "picture", "photo"))
    beside = [name for name in sorted(beside, key=lambda n: (not same_part(n), not of_pictures(n), n)) if of_pictures(name) or not alone]
    return [folder, *(os.path.join(parent, name) for name in beside), parent]


def _is_below(file, path):
    return os.path.abspath(file).startswith(os.path.abspath(path) + os.sep)


def _find_picture(finder, stem, listed, tally):
    """The picture with the XML's own name, whatever its ending; else the one that <filename> says. None where neither is there."""
    listed = os.path.basename(listed.strip().replace("\\", "/"))
    listed_stem, ending = os.path.splitext(listed)
    for extension in dict.fromkeys(([ending] if ending.lower() in EXTENSIONS else []) + list(EXTENSIONS)):
        found = finder.find(stem + extension)
        if found:
            tally["named"] += bool(listed) and listed_stem.lower() != stem.lower()
            return found
    return finder.find(listed) if listed else None


def _size(root):
    """(width, height), or None where the XML has none, or zeros."""
    try:
        width, height = (int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height"))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _raw_object(element, annotation_id, label_of, options, file, problems, tally):
    voc_boxes, voc_difficult = options

    def dropped(why):
        return unusable(problems, f"{file}, annotation {annotation_id}: {why}; dropped")

    name, bounds = _name(element), element.find("bndbox")
    if not name:
        return dropped("no class name")
    if bounds is None:
        return dropped("no <bndbox>")
    corners = [bounds.findtext(side) for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        xmin, ymin, xmax, ymax = (float(corner) for corner in corners)
    except (TypeError, ValueError):
        return dropped(f"box {corners} is not four numbers")
    has_no_size = operator.gt if voc_boxes == "pixels" else operator.ge            # from a pixel to itself is one pixel wide
    if has_no_size(xmin, xmax) or has_no_size(ymin, ymax):
        return dropped(f"box {[xmin, ymin, xmax, ymax]} has no size: its minimum is not below its maximum")
    tally["from 0"] += min(xmin, ymin) <= 0
    difficult = (element.findtext("difficult") or "0").strip().lower() in ("1", "true")
    tally["difficult"] += difficult
    first = 1.0 if voc_boxes == "pixels" else 0.0
    return RawObject(annotation_id, label_of[_key(name)], None, (xmin - first, ymin - first, xmax, ymax),
                     crowd=difficult and voc_difficult == "ignore")


def _neu_protocol(dataset):
    """NEU-DET is distributed as 1,770 + 30 pictures or as 1,440 + 360; its papers train on 1,440 and report on 360.

    A second part of a tenth or more is the one to report on; a smaller one is pooled, and a seeded fifth of all is reported on.
    """
    parts = dataset.parts
    everyone = sum(len(records) for records in parts.values())
    if set(parts) == {"train", "val"} and len(parts["val"]) >= 0.1 * everyone:
        parts["test"] = parts.pop("val")
        dataset.notes.append(f"its second part ({len(parts['test'])} pictures) is the one that its papers report on: taken as test")
    elif "test" not in parts:
        dataset.notes[:] = [note for note in dataset.notes if not note.endswith(" taken as train")]          # all are pooled
        counts = " + ".join(str(len(records)) for records in parts.values())
        dataset.parts = {"all": [record for records in parts.values() for record in records]}
        dataset.test_share = NEU_TEST_SHARE
        dataset.notes.append(f"{counts} pictures pooled; a seeded {NEU_TEST_SHARE:.0%} of them is reported on, as in its papers "
                             "(1,440 / 360), near-duplicates in one part")
