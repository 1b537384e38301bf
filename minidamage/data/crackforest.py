"""CrackForest (Shi et al. 2016): `image/*.jpg`, ground truth in `groundTruth/*.mat` (version 5) or `seg/*.seg`; 480x320, 118 labelled.

`groundTruth.Segmentation` numbers regions: 1 the road, 2 crack, 3 road *enclosed by* cracks, 4 a faint crack. So a crack is 2 or 4; taking
everything above 1 floods what a crack encloses (30 % of picture 101). `.seg` files hold the same numbers less one.
The set has no parts; the crack papers train on four fifths of it.
"""
import os

from minidamage.data import mask_values
from minidamage.data.label_maps import LabelMapFile, table_of
from minidamage.data.mask_folders import TEST_SHARE
from minidamage.data.objects import make_record, unusable
from minidamage.data.pictures import is_picture_name
from minidamage.data.record import Dataset

TRUTHS = (("groundtruth", ".mat", (2, 4)), ("seg", ".seg", (1, 3)))                  # folder, ending, the values that are crack
IMAGE_FOLDERS = ("image", "images", "img")
REGIONS = 4
WRONG_TRUTH = "042"                                                                  # seen by looking at it: the crack lies elsewhere


def recognise(path):
    """Whether `path` is a folder with pictures and CrackForest's ground truth."""
    return os.path.isdir(path) and _image_folder(path) is not None and bool(_truths(path))


def read(path, images=None, **_):
    """Reads the one part, "all". Pictures without ground truth are counted and left out. Raises ValueError when none has any."""
    folder = images or _image_folder(path)
    truths, problems, notes, unlabelled = _truths(path), [], [], []
    names = sorted(filter(is_picture_name, os.listdir(folder)))
    of_name = {name: next((t[stem] for t in truths if stem in t), None) for name in names
               for stem in [os.path.splitext(name)[0].lower()]}
    stats = mask_values.scan([file for file in of_name.values() if file], problems)
    records = []
    for i, (name, file) in enumerate(of_name.items()):
        if file is None:
            unlabelled.append(name)
            continue
        record = _record(os.path.join(folder, name), i + 1, stats[file], problems) if stats[file] else None
        if record is not None:
            records.append(record)
    if unlabelled:
        notes.append(f"{len(unlabelled)} pictures without ground truth left out ({unlabelled[0]} to {unlabelled[-1]})")
    alone = set(truths[0].values()) - set(of_name.values())
    problems += [f"{os.path.basename(file)}: ground truth without a picture; left out" for file in sorted(alone)]
    crack, flooded = _shares(records, stats)
    wrong = [r for r in records if os.path.splitext(os.path.basename(r.file))[0].lower() == WRONG_TRUTH]
    if wrong:
        notes.append(f"the truth of {os.path.basename(wrong[0].file)} belongs to another picture, as the set is published; it is kept")
    from_mat = any(r.label_map.file.lower().endswith(".mat") for r in records)
    notes.append(f"regions {'2 and 4' if from_mat else '1 and 3'} are crack ({crack:.2%} of all pixels); what cracks enclose "
                 f"({flooded:.2%}) is road")
    return Dataset(path=str(path), layout="crackforest", class_names=("crack",), category_ids=(2,), parts={"all": records},
                   problems=problems, notes=notes, unnamed=True, test_share=TEST_SHARE)


def _image_folder(path):
    listing = {name.lower(): os.path.join(path, name) for name in sorted(os.listdir(path))}
    found = (listing.get(name) for name in IMAGE_FOLDERS)
    return next((f for f in found if f and os.path.isdir(f) and any(map(is_picture_name, os.listdir(f)))), None)


def _truths(path):
    """[{stem: file}] of each folder of ground truth, MATLAB's first."""
    listing = {name.lower(): os.path.join(path, name) for name in sorted(os.listdir(path))}
    found = []
    for name, ending, _ in TRUTHS:
        folder = listing.get(name)
        files = sorted(n for n in os.listdir(folder) if n.lower().endswith(ending)) if folder and os.path.isdir(folder) else []
        found += [{os.path.splitext(n)[0].lower(): os.path.join(folder, n) for n in files}] if files else []
    return found


def _record(picture, image_id, seen, problems):
    name = os.path.basename(picture)
    cracks, first = next((values, values[0] - 1) for _, ending, values in TRUTHS if seen.file.lower().endswith(ending))
    odd = sorted(v for v in seen.values if not first <= v < first + REGIONS)
    if odd:
        return unusable(problems, f"{name}: unexpected regions {', '.join(map(str, odd))} in {os.path.basename(seen.file)} (expected "
                        f"{first} to {first + REGIONS - 1}); picture left out")
    record = make_record(picture, image_id, [], problems)
    if record is None:
        return None
    if seen.size != (record.width, record.height):
        return unusable(problems, f"{name}: the mask is {seen.size[0]}x{seen.size[1]}, the picture {record.width}x{record.height}; picture "
                        "left out")
    pixels = int(seen.pixels[list(cracks)].sum())
    record.label_map = LabelMapFile(seen.file, table_of(tuple((v, 1) for v in cracks)), ((1, pixels),) if pixels else ())
    return record


def _shares(records, stats):
    """(share of crack pixels, share of pixels that cracks enclose) over all records."""
    used = [stats[r.label_map.file] for r in records]
    total = max(1, sum(int(s.pixels.sum()) for s in used))
    enclosed = sum(int(s.pixels[3 if s.kind == "mat" else 2]) for s in used)
    return sum(n for r in records for _, n in r.label_map.counts) / total, enclosed / total
