"""The data set doctor: what is wrong with a data set, before a GPU spends a night on it.

`check(dataset)` returns findings; `python -m minidamage.data PATH` prints them. An "error" makes results wrong or training fail
(corrupt files, one photograph in two parts, a class that is scored but never trained); a "warning" is worth a look; a "note" is a fact.
"""
import collections
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minidamage import masks as mask_codec
from minidamage.data import duplicates
from minidamage.data.check_masks import SIZE, check_masks
from minidamage.data.pictures import picture_header, read_image
from minidamage.data.record import class_counts, number_of

TINY_SIDE = 8                                  # pixels in a picture reduced to TRAINING_SIDE: two cells of the finest map, p2
TRAINING_SIDE = 1024                           # DamageNet's pictures
RARE = 20                                      # objects in train; fewer are seldom learned
BOX_AGREES = 0.5                               # IoU of the file's box with the mask's own
MOST_COPIES = 4                                # of one group, by name


@dataclasses.dataclass(frozen=True)
class Finding:
    level: str                                 # "error" | "warning" | "note"
    text: str                                  # what, how often, what to do
    examples: tuple = ()                       # files or ids, some or all


def check(dataset, quick=False, size=SIZE):
    """All findings of a Dataset. quick: headers and annotations only, no picture is decoded, no duplicates are sought. size: pixels a
    side that masks will be trained at."""
    everything = [(part, r) for part, records in dataset.parts.items() for r in records]
    findings = _problems(dataset) + _sizes(everything) + _ids(dataset) + _classes(dataset)
    findings += [Finding(*line) for line in check_masks(everything, dataset.class_names, quick, size)]
    if any(not r.label_map for _, r in everything):
        findings += _objects(everything, dataset.layout)
    if not quick:
        findings += _decoding(everything) + _copies(everything)
    findings += _vehicles(everything)
    order = {"error": 0, "warning": 1, "note": 2}
    return sorted(findings, key=lambda f: order[f.level])


def _problems(dataset):
    left_out = [p for p in dataset.problems if "picture left out" in p]
    rest = len(dataset.problems) - len(left_out)
    out = []
    if left_out:
        out.append(Finding("warning", f"{number_of(len(left_out), 'picture')} left out when reading", tuple(left_out)))
    if rest:
        out.append(Finding("warning", f"{number_of(rest, 'other problem')} when reading: objects dropped, clipped or doubtful, masks "
                           "without a picture and the like (listed above)"))
    return out


def _sizes(everything):
    widths, heights = (np.array([getattr(r, key) for _, r in everything]) for key in ("width", "height"))
    sizes = collections.Counter(zip(widths.tolist(), heights.tolist()))
    most, count = sizes.most_common(1)[0]
    text = f"{number_of(len(everything), 'picture')}, " + (f"all {most[0]}x{most[1]}" if len(sizes) == 1 else (
        f"{len(sizes)} sizes, {widths.min()}x{heights.min()} to {widths.max()}x{heights.max()}, most often {most[0]}x{most[1]} ({count})"))
    turned = [r.file for _, r in everything if picture_header(r.file)[2] != 1]
    out = [Finding("note", text)]
    if turned:
        out.append(Finding("note", f"{number_of(len(turned), 'picture carries', 'pictures carry')} an EXIF rotation, which is applied; "
                                   "look at one overlay to see that their annotations were drawn on the turned picture", tuple(turned)))
    return out


def _ids(dataset):
    out = []
    for part, records in dataset.parts.items():
        for what, ids in (("image", [r.image_id for r in records]), ("annotation", [int(i) for r in records for i in r.annotation_ids])):
            twice = [i for i, n in collections.Counter(ids).items() if n > 1]
            if twice:
                out.append(Finding("error", f"{part}: {number_of(len(twice), what + ' id is', what + ' ids are')} used more than once",
                                   tuple(map(str, twice))))
    return out


def _classes(dataset):
    out, names = [], np.array(dataset.class_names)
    what = "pictures" if any(r.label_map for records in dataset.parts.values() for r in records) else "objects"
    counts = {part: class_counts(records, len(names)) for part, records in dataset.parts.items()}
    learned = counts.get("train", counts.get("all"))
    for part, count in counts.items():
        unseen = names[(count > 0) & (learned == 0)] if learned is not None else []
        if len(unseen):
            out.append(Finding("error", f"{part} has objects of classes that train lacks: they can only be missed", tuple(unseen)))
    if learned is not None and not learned.any():
        out.append(Finding("error", "nothing is marked in the part that trains: there is nothing to learn"))
    if learned is not None:
        rare = [f"{n} ({c})" for n, c in zip(names, learned) if 0 < c < RARE]
        if rare:
            out.append(Finding("warning", f"{number_of(len(rare), 'class has', 'classes have')} fewer than {RARE} training {what}",
                               tuple(rare)))
    empty = {part: sum(r.undamaged for r in records) for part, records in dataset.parts.items()}
    out.append(Finding("note", "pictures without objects, kept as undamaged: "
                       + ", ".join(f"{part} {n} of {len(dataset.parts[part])}" for part, n in empty.items())))
    return out


def _objects(everything, layout):
    """Crowd and RLE counts, tiny boxes, outlines thinner than a pixel, boxes that disagree with their mask, doubled objects."""
    tally, found = collections.Counter(), collections.defaultdict(list)
    for _, r in everything:
        where = [f"{os.path.basename(r.file)}, " + (f"object at x {x:g}, y {y:g}" if layout == "voc" else f"annotation {i}")
                 for i, (x, y, *_) in zip(r.annotation_ids, r.boxes)]              # VOC's objects have no numbers
        scale = TRAINING_SIDE / max(r.width, r.height)
        for i in np.flatnonzero((r.boxes[:, 2:] - r.boxes[:, :2]).min(1, initial=np.inf) * scale < TINY_SIDE):
            found["tiny"].append(where[i])
        seen = {}
        for i in range(len(r.labels)):
            key = (int(r.labels[i]), bool(r.crowd[i]), *np.round(r.boxes[i], 2).tolist())
            if key in seen:
                found["double"].append(where[i])
            seen[key] = i
            mask = r.masks[i]
            tally["objects"] += 1
            tally["crowd"] += bool(r.crowd[i])
            tally["rle" if isinstance(mask, dict) else "outline" if mask is not None else "box only"] += 1
            if mask is None:
                continue
            tight = _mask_box(r, mask)
            if tight is None:
                found["thin"].append(where[i])
            elif _iou(tight, r.boxes[i]) < BOX_AGREES and min(tight[2] - tight[0], tight[3] - tight[1]) > 2:
                found["apart"].append(where[i])
    out = [Finding("note", f"{number_of(tally['objects'], 'object')}: {tally['outline']} with outlines, {tally['rle']} with RLE, "
                           f"{tally['box only']} with a box only; {tally['crowd']} not judged "
                           f"({'difficult' if layout == 'voc' else 'crowd regions'})")]
    if tally["box only"] and tally["box only"] < tally["objects"]:
        out.append(Finding("warning", f"{number_of(tally['box only'], 'object has', 'objects have')} a box but no outline, "
                                      "among others that do: the box becomes the mask"))
    for key, level, one, several, text in (
            ("tiny", "warning", "box has", "boxes have", f"a side under {TINY_SIDE} px in {TRAINING_SIDE} px pictures: expect misses, or "
             "train larger"),
            ("thin", "warning", "outline is", "outlines are", "thinner than a pixel: the mask is empty, and training leaves it out"),
            ("apart", "error", "box does not fit its", "boxes do not fit their", "own mask (IoU under 0.5): another scale, or xywh read "
             "as xyxy?"),
            ("double", "warning", "object repeats", "objects repeat", "another of the same class and box in the same picture")):
        if found[key]:
            out.append(Finding(level, f"{number_of(len(found[key]), one, several)} {text}", tuple(found[key])))
    return out


def _mask_box(record, mask):
    if isinstance(mask, dict):
        rle = mask
    else:
        rle = mask_codec.from_polygons(mask, record.height, record.width)
    if int(mask_codec.area([rle])[0]) == 0:
        return None
    return mask_codec.to_boxes([rle])[0]


def _iou(a, b):
    inner = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return inner / max(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inner, 1e-9)


def _decoding(everything):
    def fault(file):
        try:
            read_image(file)
        except ValueError as error:
            return str(error)
        return None
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        bad = [f for f in pool.map(fault, [r.file for _, r in everything]) if f]
    return [Finding("error", f"{number_of(len(bad), 'picture')} cannot be decoded: copy them again, or remove them",
                    tuple(bad))] if bad else []


def _copies(everything):
    """Exact copies by bytes and near-duplicates by hash, within a part and across parts, a line for each group of them."""
    names = [f"{part}/{os.path.basename(r.file)}" for part, r in everything]
    across, within = [], []
    for group, bits in duplicates.groups_of_copies([r.file for _, r in everything]):
        listed = " = ".join(names[i] for i in group[:MOST_COPIES]) + f" and {len(group) - MOST_COPIES} more" * (len(group) > MOST_COPIES)
        line = f"{listed} ({'the same bytes' if bits < 0 else f'up to {bits} of {duplicates.HASH_BITS} bits differ'})"
        (across if len({everything[i][0] for i in group}) > 1 else within).append(line)
    out = []
    if across:
        out.append(Finding("error", f"{number_of(len(across), 'group')} of copies or near-duplicates across parts: what is reported was "
                                    "trained on. --split 70/15/15 keeps them together", tuple(across)))
    if within:
        out.append(Finding("note", f"{number_of(len(within), 'group')} of copies or near-duplicates within one part; a split "
                           "keeps them together", tuple(within)))
    return out


def _vehicles(everything):
    parts_of = collections.defaultdict(set)
    for part, r in everything:
        if r.group:
            parts_of[r.group].add(part)
        parts_of["photograph " + duplicates.original_name(r.file) + " in " + os.path.dirname(r.file)].add(part)
    straddling = sorted(g for g, parts in parts_of.items() if len(parts) > 1)
    groups = {r.group for _, r in everything if r.group}
    cut = sum(g.startswith("photograph ") for g in groups)
    out = [Finding("note", f"{number_of(len(groups) - cut, 'vehicle')} known by the time in the file names")] if len(groups) > cut else []
    out += [Finding("note", f"{number_of(cut, 'photograph')} of which several crops are in the set, by the file names")] if cut else []
    if straddling:
        out.append(Finding("error", f"{number_of(len(straddling), 'vehicle or photograph lies', 'vehicles or photographs lie')} in "
                                    "more than one part; --split 70/15/15 keeps them together", tuple(straddling)))
    return out


def report(findings, examples=3):
    """The findings as text, most serious first; `examples` of each."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:>7}: {finding.text}")
        lines += [f"           {e}" for e in finding.examples[:examples]]
        if len(finding.examples) > examples > 0:
            lines.append(f"           ... and {len(finding.examples) - examples} more (--examples {len(finding.examples)})")
    count = collections.Counter(f.level for f in findings)
    lines.append("check: " + (f"{number_of(count['error'], 'error')}, {number_of(count['warning'], 'warning')}"
                              if count["error"] or count["warning"] else "nothing to complain about"))
    return "\n".join(lines)
