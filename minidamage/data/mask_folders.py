"""Pictures in one folder, masks in another (or beside them, with a suffix): how most crack and damage sets come.

    images/ masks/      train_img/ train_lab/ test_img/ test_lab/      train/images/ train/masks/      images/train/ masks/train/
    train/ train_masks/      a.jpg a_mask.png in one folder      classes.txt: one class name a line, from value 1 on

A mask has its picture's name, whatever the extension, with or without a word like `_mask`, `_lab` or `_gt`; Label Studio's
`task-10-annotation-24-by-1-tag-Severe Damages-0.png` belongs to `10.jpg`, and its tag is the class ("No Damage" is background).
What the values mean is found out over all masks together (mask_values.py) and printed. Crops of one photograph (`11122-3.jpg`,
`DSC01653_120_360_1526_1294.jpg`: a number, or two or four coordinates) make one group, so that a split keeps them together.
"""
import collections
import itertools
import os
import re

from minidamage.data import mask_values
from minidamage.data.folders import PARTS, part_of, walk
from minidamage.data.label_maps import LabelMapFile
from minidamage.data.objects import make_record, read_lines
from minidamage.data.pictures import is_picture_name, picture_header
from minidamage.data.record import Dataset, number_of

IMAGE_WORDS = {"image", "images", "img", "imgs", "picture", "pictures", "photo", "photos", "input", "inputs", "original", "originals",
               "jpeg", "rgb"}
MASK_WORDS = {"mask", "masks", "lab", "labs", "label", "labels", "gt", "gts", "truth", "groundtruth", "annotation", "annotations", "anno",
              "annos", "segmentation", "segmentations", "seg", "segs", "target", "targets"}
FILLERS = {"class", "ground", "png", "jpg", "raw"}            # "SegmentationClass", "ground_truth", "masks_png"
WORDS = r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+"           # "SegmentationClass", "train_lab", "JPEGImages"
MASK_ENDING = re.compile(r"[ _\-.]*(masks?|labels?|lab|gt|ground_?truth|seg|segmentation|annotation|anno|target)$", re.IGNORECASE)
MASK_BEGINNING = re.compile(r"^(masks?|labels?|gt|seg)[ _\-.]+", re.IGNORECASE)
IMAGE_ENDING = re.compile(r"[ _\-.]+(images?|imgs?|rgb|input)$", re.IGNORECASE)
LABEL_STUDIO = re.compile(r"^task-(?P<task>\d+)-annotation-\d+-by-.+?-tag-(?P<tag>.+)-\d+$")
UNDAMAGED = re.compile(r"^(no|non|not|un)[ _\-]*damaged?s?$|^background$|^undamaged$", re.IGNORECASE)
DEPTH = 5                                      # folders below the data set's that are looked at
LARGEST_GROUP = 0.25                           # of the pictures: "frame-1" to "frame-500" are numbered, not cut from one photograph
FEWEST = 3                                     # photographs that a split needs: one a part
TEST_SHARE = 0.2                               # a set without parts: the crack papers train on four fifths


def recognise(path):
    """Whether `path` is a folder with pictures and masks of theirs in one of the forms above, or one of masks, by its name."""
    return os.path.isdir(path) and (_is_mask_folder(path) or any(_has_masks(group) for group in _groups(path).values()))


def read(path, images=None, **_):
    """Reads every part. images: folder of the pictures; `path` is then the folder of their masks.

    Raises ValueError where nothing pairs up, where two folders could hold the masks, and where values are ambiguous (mask_values.py).
    """
    if not images and _is_mask_folder(path) and not any(_has_masks(group) for group in _groups(path).values()):
        raise ValueError(f"{path}: expected pictures and their masks, got a folder of masks; give the folder above, or the pictures' "
                         "folder as --images")
    groups = _groups(path) if not images else {("", None): {"image": [images], "mask": [path]}}
    problems, notes, pairs = [], [], collections.defaultdict(list)
    for (words, part), group in sorted(groups.items(), key=lambda item: (item[0][0], item[0][1] or "")):
        if _has_masks(group) or images:
            pairs[part or "all"] += _pairs(path, group, problems)
    everything = [pair for listed in pairs.values() for pair in listed]
    names = class_list(path)
    tags = sorted({tag for _, masks in everything for _, tag in masks if tag and not UNDAMAGED.match(tag)})
    if tags and names is None:
        names = tags
        background = sorted({tag for _, masks in everything for _, tag in masks if tag and UNDAMAGED.match(tag)})
        notes.append("classes are the tags of the masks' names" + "".join(f"; {tag!r} is background" for tag in background))
    stats = mask_values.scan([mask for _, masks in everything for mask, _ in masks], problems)
    voters = [stats[mask] for picture, masks in everything for mask, _ in masks if stats[mask] and _is_of_the_size(picture, stats[mask])]
    voters = voters or [s for s in stats.values() if s]               # of masks that are left out none says what the others mean
    meaning = mask_values.decide(path, voters, names, one_each=bool(tags), notes=notes, problems=problems)

    parts, picture_ids = {}, itertools.count(1)
    for part in ("all", *PARTS):
        if part in pairs:
            parts[part] = _records(pairs[part], stats, meaning, problems, picture_ids)
    pooled = [r for records in parts.values() for r in records]
    _group_crops(pooled, notes)
    _note_sets(pooled, notes)
    foreground = sum(n for r in pooled for layer in (r.label_map, *r.label_map.layers) for _, n in layer.counts)
    share = foreground / max(1, sum(r.width * r.height for r in pooled))
    if share > 0.5:
        notes.append(f"{share:.0%} of all pixels are foreground: are the masks inverted? Expected damage light, the rest 0")
    if pooled and not share:
        notes.append("every mask is all background: nothing can be learned from this set")
    return Dataset(path=str(path), layout="mask folders", class_names=meaning.names, category_ids=meaning.ids, parts=parts,
                   problems=problems, notes=notes, unnamed=len(meaning.names) == 1 and class_list(path) is None,
                   test_share=TEST_SHARE if set(parts) == {"all"} else 0.0)


def class_list(path):
    """The names in classes.txt (or labels.txt) of the data set's folder, background first line left out; None without such a file."""
    for name in ("classes.txt", "labels.txt", "class_names.txt"):
        file = os.path.join(path, name)
        if os.path.isfile(file):
            names = read_lines(file)
            names = names[1:] if names and names[0].lower().strip("_") in ("background", "bg") else names
            if not names or len({n.lower() for n in names}) < len(names):
                raise ValueError(f"{file}: expected one class name a line, each once, got {names}")
            return names
    return None


# ---- folders

def folders_of_masks(names):
    """Those of the folders in one place that hold the masks of another one's pictures: masks, train_lab beside images, train_img."""
    words = {name: set(_words(name)) for name in names}
    pictures = {name for name in names if words[name] & IMAGE_WORDS and not words[name] & MASK_WORDS}
    return sorted(name for name in names if pictures and words[name] & MASK_WORDS)


def _words(name):
    return [word.lower() for word in re.findall(WORDS, name)]


def _groups(path):
    """{(words of the folders' names, part): {"image": folders, "mask": folders, "either": folders}}: what belongs together."""
    groups = collections.defaultdict(lambda: {"image": [], "mask": [], "either": []})
    base = os.path.abspath(path)
    for folder, below, names in walk(base, depth=DEPTH):
        below[:] = sorted(n for n in below if not n.startswith("."))
        relative = os.path.relpath(folder, base)
        steps = [] if relative == "." else relative.split(os.sep)
        if not any(map(is_picture_name, names)):
            continue
        words = [_words(step) for step in steps]
        kinds = [k for k in ("mask" if MASK_WORDS & set(w) else "image" if IMAGE_WORDS & set(w) else None for w in words) if k]
        part = next((p for p in map(part_of, reversed(steps)) if p), None)
        known = IMAGE_WORDS | MASK_WORDS | FILLERS | {w for listed in PARTS.values() for w in listed}
        rest = "/".join(filter(None, ("_".join(w for w in re.split(r"[^0-9a-z]+", "_".join(ws)) if w and w not in known)
                                      for ws in ([*w, *re.findall(r"\d+", s)] for w, s in zip(words, steps)))))
        groups[rest, part][kinds[-1] if kinds else "either"].append(os.path.join(path, relative) if steps else str(path))
    return groups


def _is_mask_folder(path):
    words = _words(os.path.basename(os.path.abspath(path)))
    return bool(MASK_WORDS.intersection(words)) and any(map(is_picture_name, os.listdir(path)))


def _has_masks(group):
    if group["mask"]:
        return bool(group["image"] or group["either"])
    return any(_beside(folder) for folder in group["image"] + group["either"])


def _beside(folder):
    """Whether a folder holds masks beside their pictures: a_mask.png next to a.jpg."""
    stems = {os.path.splitext(n)[0].lower() for n in os.listdir(folder) if is_picture_name(n)}
    return any(_mask_stem(s) != s and _mask_stem(s) in stems for s in stems)


def _mask_stem(stem):
    """The stem of the picture that a mask's stem, in lower case, speaks of."""
    return MASK_BEGINNING.sub("", MASK_ENDING.sub("", stem)) or stem


# ---- pairs

def _pairs(path, group, problems):
    """[(picture, [(mask, Label Studio tag or "")])] of a group, sorted by name; what stays alone is named in `problems`."""
    if not group["mask"]:
        return [pair for folder in group["image"] + group["either"] if _beside(folder) for pair in _pairs_beside(folder, problems)]
    images, masks = group["image"] or group["either"], group["mask"]
    for kind, folders in (("pictures", images), ("masks", masks)):
        if len(folders) > 1:
            raise ValueError(f"{path}: expected one folder of {kind}, got {', '.join(os.path.relpath(f, path) for f in folders)}, which go "
                             "with the same part; move all but one away, or give the masks' folder as the path and the pictures' as "
                             "--images")
    pictures = _listing(images[0])
    found = _match(pictures, _listing(masks[0]))
    if pictures and not any(found.values()):
        some = lambda folder: ", ".join(sorted(_listing(folder).values())[:2])
        raise ValueError(f"{path}: no mask has the name of a picture: pictures {some(images[0])}, ...; masks {some(masks[0])}, ... . "
                         "Expected a.jpg with a.png, a_mask.png or the like; rename them")
    return _paired(images[0], masks[0], pictures, found, problems)


def _pairs_beside(folder, problems):
    listed = _listing(folder)
    masks = {stem: name for stem, name in listed.items() if _mask_stem(stem) != stem}
    pictures = {stem: name for stem, name in listed.items() if stem not in masks}
    return _paired(folder, folder, pictures, _match(pictures, masks), problems)


def _listing(folder):
    """{stem in lower case: file name}; a second file of one stem keeps its whole name, and so pairs with nothing but its like."""
    listed = {}
    for name in sorted(filter(is_picture_name, os.listdir(folder))):
        stem = os.path.splitext(name)[0].lower()
        listed[stem if stem not in listed else name.lower()] = name
    return listed


def _match(pictures, masks):
    """{mask name: picture stem or None}: the same stem first, then without the words that say "mask" or "image", then Label Studio's."""
    plain = {IMAGE_ENDING.sub("", stem): stem for stem in pictures}
    found = {}
    for stem, name in masks.items():
        studio = LABEL_STUDIO.match(stem)
        candidates = (stem, _mask_stem(stem), plain.get(_mask_stem(stem)), studio and studio["task"])
        found[name] = next((c for c in candidates if c in pictures), None)
    return found


def _paired(image_folder, mask_folder, pictures, found, problems):
    masks = collections.defaultdict(list)
    for name, stem in found.items():
        if stem is None:
            problems.append(f"{name}: a mask without a picture of its name in {image_folder}; left out")
            continue
        studio = LABEL_STUDIO.match(os.path.splitext(name)[0])
        masks[stem].append((os.path.join(mask_folder, name), studio["tag"] if studio else ""))
    out = []
    for stem, name in pictures.items():
        several = [m for m, tag in masks[stem] if not tag]
        if not masks[stem]:
            problems.append(f"{name}: no mask of its name in {mask_folder}; picture left out")
        elif len(several) > 1:
            problems.append(f"{name}: several masks of its name ({', '.join(map(os.path.basename, several))}); picture left out")
        else:
            out.append((os.path.join(image_folder, name), masks[stem]))
    return out


# ---- records

def _is_of_the_size(picture, seen):
    """Whether a mask has its picture's size, before or after the EXIF rotation."""
    try:
        size = picture_header(picture)[:2]
    except ValueError:                                                # said where the record is made
        return False
    return seen.size in (size, size[::-1])


def _records(pairs, stats, meaning, problems, picture_ids):
    """Records of the pairs whose masks can be read and fit their picture. picture_ids: a counter over all parts."""
    records = []
    for picture, masks in pairs:
        image_id, name, layers = next(picture_ids), os.path.basename(picture), []
        for mask, tag in masks:
            seen = stats[mask]
            if seen is not None and meaning.fits(seen):                # the others have been named already
                layers.append(meaning.label_map(seen, meaning.label_of(tag) if not UNDAMAGED.match(tag) else 0))
        if len(layers) < len(masks):
            continue
        record = make_record(picture, image_id, [], problems)
        if record is None:
            continue
        turn = picture_header(picture)[2]
        sizes = {stats[mask].size for mask, _ in masks}
        if sizes == {(record.height, record.width)} and turn >= 5 and record.width != record.height:
            layers = [LabelMapFile(l.file, l.table, l.counts, turn) for l in layers]
            problems.append(f"{name}: its mask was drawn before the picture's EXIF rotation ({turn}); turned with it")
        elif sizes != {(record.width, record.height)}:
            listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes))
            problems.append(f"{name}: the mask is {listed}, the picture {record.width}x{record.height}; picture left out")
            continue
        layers.sort(key=lambda l: -sum(n for _, n in l.counts))                       # the smaller on top
        record.label_map = LabelMapFile(layers[0].file, layers[0].table, layers[0].counts, layers[0].turn, tuple(layers[1:]))
        records.append(record)
    return records


def photograph(stem):
    """What a crop's name says of the photograph it is from: `a-3` is of `a`; `a_120_360` and `a_120_360_1526_1294` are too (coordinates
    have no leading zero and at most five digits). The stem itself where it says nothing."""
    dashed = re.fullmatch(r"(.*[^\W_])-\d{1,3}", stem)
    if dashed:
        return dashed[1]
    run = re.search(r"(?:_(?:0|[1-9]\d{0,4}))+$", stem)
    numbers = run[0].count("_") if run and run.start() else 0
    keep = 4 if numbers >= 4 else 2 if numbers >= 2 else 0
    return stem.rsplit("_", keep)[0] if keep else stem


def _group_crops(records, notes):
    """Fills Record.group where several pictures are named as crops of one photograph."""
    members = collections.defaultdict(list)
    for record in records:
        members[photograph(os.path.splitext(os.path.basename(record.file))[0])].append(record)
    limit = max(8, LARGEST_GROUP * len(records))
    groups = {name: listed for name, listed in members.items() if 1 < len(listed) <= limit}
    apart = len(groups) + len(records) - sum(map(len, groups.values()))
    if groups and apart < FEWEST:
        notes.append(f"by their names {number_of(len(records), 'picture')} could be crops of {number_of(apart, 'photograph')}, which no "
                     "split can keep together in three parts: taken as pictures of their own")
        return
    for name, listed in groups.items():
        for record in listed:
            record.group = f"photograph {name}"
    if groups:
        first = next(iter(groups.items()))
        notes.append(f"{sum(map(len, groups.values()))} pictures are crops of {len(groups)} photographs by their names (as {first[0]}: "
                     f"{len(first[1])}); a split keeps them together")


def _note_sets(records, notes):
    """Says which sets are pooled in the folder, where every file name begins with a word of its set."""
    words = collections.Counter(re.match(r"[A-Za-z][A-Za-z0-9]*(?=_)|", os.path.basename(r.file))[0] for r in records)
    if "" not in words and 2 <= len(words) <= 30 and min(words.values()) > 1:
        notes.append("sets by the first word of the file names: " + ", ".join(f"{w} {n}" for w, n in sorted(words.items()))
                     + f"; one or some of them alone: PATH:{min(words)}")
