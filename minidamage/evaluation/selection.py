"""Which pictures a checkpoint is scored on: the part of its own split, or of another data set."""
import os

from minidamage.data import load_dataset
from minidamage.data.flags import OF_A_KIND, READING, reading
from minidamage.data.folders import root_of, selection
from minidamage.data.record import number_of
from minidamage.data.split import from_names, names_of


def choose_pictures(args, checkpoint, path):
    """(Dataset, part's name, records, whether the set is the run's own). The run's split where it is; else the set's own parts."""
    trained_on = checkpoint.get("run", {}).get("data")
    where = args.data or trained_on
    if not where:
        raise ValueError(f"{path} does not say what it was trained on; name the data set with --data")
    if not args.data and not os.path.exists(selection(where)[0]):
        raise ValueError(f"{where}: the data set that {path} was trained on is not there any more; name its new place, or another set, "
                         "with --data")
    as_trained = reading(checkpoint.get("run", {}).get("args", {}), OF_A_KIND if args.data else READING)
    dataset = load_dataset(where, class_names=checkpoint["class_names"], **{**as_trained, **reading(args)})
    split, own = checkpoint.get("split") or {}, False
    if split and (not args.data or is_own(dataset, split, trained_on)):
        parts, own = from_names(dataset, split), True
    else:
        parts = dataset.parts
    parts = {name: records for name, records in parts.items() if records}
    part = args.part or ("test" if own or "test" in parts else "val" if "val" in parts else "all")
    if part == "all":
        return dataset, part, [r for records in parts.values() for r in records], own
    if part not in parts:
        raise ValueError(f"--part {part}: {where} has {', '.join(f'{name} ({len(r)})' for name, r in parts.items())}"
                         f"{'' if own else '; it is not the set the run was split from'}; take one of these, or --part all")
    return dataset, part, parts[part], own


def is_own(dataset, split, trained_on):
    """Whether a data set given by --data is the one that the run was split from, at its own place, moved or copied. Equal file names
    alone do not say so (every VehiDE-like set has an image/1.jpg): while the run's own set is there, its files must be of equal size.
    Raises ValueError where it lies at its own place and pictures have gone. Says how many pictures of another set have trained names."""
    its_place = bool(trained_on) and _real(dataset.path) == _real(trained_on)
    try:
        records = [record for part in from_names(dataset, split).values() for record in part]
    except ValueError:
        if its_place:
            raise
        records = []
    if records and not (trained_on and os.path.exists(selection(trained_on)[0])):
        print(f"note: {dataset.path} has every picture of the run's split by name: taken for the run's own set in a new place")
        return True
    here, there = (os.path.realpath(root_of(path)) for path in (dataset.path, trained_on or ""))
    places = [(record.file, os.path.join(there, os.path.relpath(os.path.realpath(record.file), here))) for record in records]
    if records and all(os.path.isfile(old) and os.path.getsize(old) == os.path.getsize(new) for new, old in places):
        return True
    trained = set(split.get("train", ()))
    seen = [name for names in names_of(dataset.parts, dataset.path).values() for name in names if name in trained]
    if seen:
        print(f"note: {dataset.path} is not the set that the run was split from, but {number_of(len(seen), 'picture')} of it (first: "
              f"{seen[0]}) have names that it trained on: if they are the same ones, these numbers are not those of new pictures")
    return False


def _real(path):
    """(path without links, [NAME, ...]) of PATH:NAME,NAME."""
    place, names = selection(path)
    return os.path.realpath(place), names
