"""Three parts, always: what trains, what chooses (best.pt, thresholds), what is reported. No vehicle lies in two of them.

Pictures that may show one vehicle form a group (duplicates.py) and stay together. The same seed gives the same split, whatever the order
of the annotation file; `names_of` writes it into the run and `from_names` reads it back.
"""
import os

import numpy as np

from minidamage.data.duplicates import group_of_each
from minidamage.data.folders import root_of
from minidamage.data.record import places_of

NAMES = ("train", "val", "test")
FRACTIONS = (0.70, 0.15, 0.15)                 # DamageNet: 3,640 / 780 / 780 of 5,200
CHOOSING_SHARE = 0.10                          # of train, where a set has only train and test


def three_parts(dataset, fractions=None, seed=0):
    """{"train": [...], "val": [...], "test": [...]} of Records.

    fractions: None follows the parts that the set has: all three are kept; train + val halves val by group into val and
    test; train + test takes a seeded tenth of train, by group, as val; a set without parts whose papers report on a share of it
    (Dataset.test_share) is split so first; anything else is split 70/15/15. Three numbers
    (`--split 70/15/15`) pool everything and split by group. Raises ValueError where a part would be empty, for val + test, which are
    not there to be trained on, and for pictures that no name puts into a part beside a train part.
    """
    have = {name: records for name, records in dataset.parts.items() if records}
    if fractions is None and set(have) == {"val", "test"}:
        raise ValueError(f"{dataset.path}: expected pictures in the train part, got none (val {len(have['val'])}, test {len(have['test'])})"
                         "; is its folder complete? To train on some of these, split them anew: --split 70/15/15")
    if fractions is None and {"all", "train"} <= have.keys():
        others = ", ".join(f"{name} {len(records)}" for name, records in have.items() if name != "all")
        raise ValueError(f"{dataset.path}: expected every picture in train, val or test (there are {others}), got "
                         f"{places_of(dataset, 'all')}, which no name puts there; rename the folder, move it away, give one folder, or "
                         "split all anew: --split 70/15/15")
    if fractions is None and set(have) == set(NAMES):
        return {name: list(have[name]) for name in NAMES}
    if fractions is None and set(have) == {"train", "val"}:
        halves = split_records(have["val"], (0.5, 0.5), seed, names=("val", "test"))
        return {"train": list(have["train"]), **halves}
    if fractions is None and set(have) == {"all"} and dataset.test_share:
        have = split_records(_pool(have), (1 - dataset.test_share, dataset.test_share), seed, names=("train", "test"))
    if fractions is None and set(have) == {"train", "test"}:
        parts = split_records(have["train"], (1 - CHOOSING_SHARE, CHOOSING_SHARE), seed, names=("train", "val"))
        return {**parts, "test": list(have["test"])}
    return split_records(_pool(have), fractions or FRACTIONS, seed)


def shared_by(parts):
    """The groups (Record.group: a vehicle, a photograph) with pictures in more than one part, and the pictures that more than one part
    lists, sorted: parts that a set came with may have them, a split of ours never does."""
    parts_of = {}
    for name, records in parts.items():
        for record in records:
            parts_of.setdefault(record.group or os.path.realpath(record.file), set()).add(name)
    return sorted(os.path.basename(shared) for shared, names in parts_of.items() if len(names) > 1)


def split_records(records, fractions=FRACTIONS, seed=0, names=NAMES):
    """Splits by group: {name: records in their own order}, close to `fractions` (which are scaled to sum 1).

    Groups without any object are dealt out apart from the others, so that every part has its share of undamaged pictures.
    Raises ValueError for fractions that are negative or sum to 0, and for too few groups to fill every part.
    """
    shares = np.asarray(fractions, np.float64)
    if len(shares) != len(names) or (shares < 0).any() or shares.sum() <= 0:
        raise ValueError(f"expected {len(names)} shares like {'/'.join(['70', '15', '15'][:len(names)])}, got {fractions}")
    shares = shares / shares.sum()
    order = sorted(range(len(records)), key=lambda i: (os.path.basename(records[i].file), records[i].file))
    group = group_of_each([records[i] for i in order])
    members = {}
    for i, g in zip(order, group):
        members.setdefault(g, []).append(i)
    rng = np.random.default_rng([int(seed), 1])
    shuffled = [list(members.values())[k] for k in rng.permutation(len(members))]
    undamaged = [m for m in shuffled if all(records[i].undamaged for i in m)]
    damaged = [m for m in shuffled if not all(records[i].undamaged for i in m)]
    chosen = [[] for _ in names]
    for stratum in (damaged, undamaged):           # the second evens out what the first could not divide
        _deal(stratum, shares, chosen)
    empty = [name for name, share, part in zip(names, shares, chosen) if share > 0 and not part]
    if empty:
        raise ValueError(f"{len(records)} pictures in {len(members)} groups (vehicles or near-duplicates) are too few: nothing is left for "
                         f"{', '.join(empty)}. Add pictures, or give other shares (--split)")
    return {name: [records[i] for i in sorted(part)] for name, part in zip(names, chosen)}


def _deal(groups, shares, chosen):
    """Hands each group, large ones first, to the part that lacks most of its share; the last ones to parts that are still empty."""
    filled = np.array([len(part) for part in chosen], np.float64)
    total = filled.sum() + sum(map(len, groups))
    for left, members in zip(range(len(groups), 0, -1), sorted(groups, key=len, reverse=True)):
        empty = (shares > 0) & (filled == 0)
        lack = np.where(empty if empty.sum() >= left else shares > 0, shares * total - filled, -np.inf)
        part = int(np.argmax(lack))
        chosen[part].extend(members)
        filled[part] += len(members)


def _pool(parts):
    """All records of all parts; picture ids may repeat between the parts."""
    return [r for name in sorted(parts) for r in parts[name]]


def parse_fractions(text):
    """"70/15/15" -> (0.7, 0.15, 0.15); ValueError with an example otherwise."""
    try:
        numbers = [float(v) for v in text.replace(",", "/").split("/")]
    except ValueError:
        numbers = []
    if len(numbers) != 3 or min(numbers) < 0 or sum(numbers) <= 0:
        raise ValueError(f"--split expects three shares like 70/15/15, got {text!r}")
    return tuple(v / sum(numbers) for v in numbers)


def names_of(parts, root):
    """{part: [picture paths relative to the folder of the data set `root`]}: what the run writes."""
    base = root_of(root)
    return {name: [os.path.relpath(r.file, base).replace(os.sep, "/") for r in records] for name, records in parts.items()}


def from_names(dataset, names):
    """The parts that names_of wrote, from a data set read again, under the picture ids of its files. ValueError when pictures have gone."""
    base = root_of(dataset.path)
    known = {os.path.relpath(r.file, base).replace(os.sep, "/"): r for records in dataset.parts.values() for r in records}
    gone = [n for listed in names.values() for n in listed if n not in known]
    if gone:
        raise ValueError(f"{len(gone)} pictures of the saved split are not in {dataset.path} (first: {gone[0]}): is it the same data set?")
    return {part: [known[n] for n in listed] for part, listed in names.items()}
