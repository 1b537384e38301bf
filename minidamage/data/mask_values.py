"""What the numbers in mask files mean: 0/1, 0/255, class ids, or grey levels to be cut at 127.

Every mask is read once and its values are counted; the decision is taken over all of them together, said in the notes, and refused when
they can be read in two ways. A classes.txt beside the masks settles it: values 1..K are then its names, 255 is "not judged".
"""
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from minidamage.data.label_maps import IGNORE, LabelMapFile, read_values, table_of

GREY_CUT = 127                                 # grey masks: foreground is above
BETWEEN = (32, 223)                            # grey levels of rims
RIMS = 0.75                                    # rim pixels for one white pixel, at most
MANY_RIMS = 3.0                                # the same where more values occur than class ids would: thin cracks are mostly rim
MOST = 0.9                                     # share of the masks that settles what the others should have been
LARGEST_ID = 63
COUNTED = 1 << 20                              # pixels at once
CUT = table_of(tuple((v, 1) for v in range(GREY_CUT + 1, 256)))


@dataclasses.dataclass(frozen=True)
class MaskStats:
    """One mask file as it is: kind as read_values says, size (width, height), and how many pixels have each value [256]."""

    file: str
    kind: str
    size: tuple
    pixels: np.ndarray

    @property
    def values(self):
        return frozenset(np.flatnonzero(self.pixels).tolist())


@dataclasses.dataclass(frozen=True)
class Meaning:
    """names, ids: the classes and the values that stand for them. tables: {kind: table}. expected: the values that may occur, or None."""

    names: tuple
    ids: tuple
    tables: dict
    expected: frozenset | None
    tags: tuple = ()

    def fits(self, stats):
        return stats.kind in self.tables and (self.expected is None or stats.kind in ("lossy", "1-bit") or stats.values <= self.expected)

    def label_of(self, tag):
        return self.tags.index(tag) + 1 if tag in self.tags else 1

    def label_map(self, stats, label=1):
        """The LabelMapFile of a mask; label: what its foreground is, where every mask has one class."""
        table = self.tables[stats.kind]
        if self.tags or label != 1:
            table = bytes(label if v == 1 else v for v in table)
        pixels = np.bincount(np.frombuffer(table, np.uint8), weights=stats.pixels, minlength=256).astype(np.int64)
        return LabelMapFile(stats.file, table, tuple((k, int(pixels[k])) for k in range(1, IGNORE) if pixels[k]))


def count_values(values):
    """int64 [256]: how often each value of a uint8 array occurs. np.bincount makes int64 of what it counts: a little at a time."""
    values = values.ravel()
    return sum((np.bincount(values[start:start + COUNTED], minlength=256) for start in range(0, values.size, COUNTED)),
               np.zeros(256, np.int64))


def scan(files, problems):
    """{file: MaskStats}, None for those that cannot be read (named in `problems`). Pillow decodes outside Python's lock: threads help."""
    def one(file):
        try:
            values, kind = read_values(file)
        except ValueError as error:
            return error
        return MaskStats(file, kind, (values.shape[1], values.shape[0]), count_values(values))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = dict(zip(files, pool.map(one, files)))
    faults = [(file, s) for file, s in found.items() if isinstance(s, ValueError)]
    if faults and len(faults) == len(files):
        raise ValueError(f"none of the {len(files)} masks can be read; first: {faults[0][1]}")
    for file, error in faults:
        problems.append(f"{os.path.basename(file)}: {str(error).removeprefix(str(file) + ': ')}; picture left out")
        found[file] = None
    return found


def decide(path, stats, names, one_each, notes, problems):
    """The Meaning of a set's masks. names: of classes.txt, or None. one_each: each mask is one class, which `names` lists by tag.

    Raises ValueError, with the values that were found, where they are ambiguous.
    """
    exact = [s for s in stats if s.kind in ("grey", "palette")]
    lossy = [s for s in stats if s.kind == "lossy"]
    values = frozenset().union(*(s.values for s in exact))
    if names is not None and not one_each and (len(names) > 1 or {1, 255} <= values):
        return _named_ids(path, stats, names, notes, problems)
    one = (names[0] if names else "crack" if "crack" in os.path.basename(os.path.abspath(path)).lower() else "damage",)
    meaning = lambda low, expected, table: Meaning(
        tuple(names) if one_each else one, tuple(range(1, len(names) + 1)) if one_each else (low,),
        {"1-bit": CUT, "lossy": CUT, "grey": table, "palette": table}, expected, tuple(names) if one_each else ())
    how = [f"{len(lossy)} JPEG masks cut at {GREY_CUT}"] * bool(lossy)
    how += [f"{count} 1-bit masks" for count in [sum(s.kind == "1-bit" for s in stats)] if count]
    if lossy and not _two_levels(lossy):
        raise ValueError(f"{path}: the JPEG masks are no black and white pictures: {_listed(lossy)}; expected damage near 255 on 0. "
                         "Class ids do not survive JPEG: save masks as PNG")
    for low in (255, 1):
        if values <= {0, low}:
            notes.append("; ".join([f"{len(exact)} masks hold 0 and {low}"] * bool(exact) + how))
            return meaning(low, frozenset((0, low)), table_of(((low, 1),)))
    if all(s.kind == "grey" for s in exact) and len(values) > 8 and max(values) > BETWEEN[1] and _two_levels(exact):
        notes.append("; ".join([f"{len(exact)} grey masks ({len(values)} values, soft rims) cut at {GREY_CUT}", *how]))
        return meaning(255, None, CUT)
    ids = values - {0, IGNORE}
    no_gaps = ids == frozenset(range(1, max(ids, default=0) + 1)) and len(ids) <= LARGEST_ID
    sure = IGNORE not in values or len(ids) > 1 or all(s.kind == "palette" for s in exact)             # 0, 1 and 255: which is damage?
    if no_gaps and sure and names is None:
        return _named_ids(path, stats, [f"class {k}" for k in sorted(ids)], notes, problems)
    for low in (255, 1):
        odd = [s for s in exact if not s.values <= {0, low}]
        if len(odd) <= (1 - MOST) * len(exact) and any(low in s.values for s in exact):
            _name_odd(odd, {0, low}, problems)
            notes.append("; ".join([f"{len(exact) - len(odd)} masks hold 0 and {low}", *how]))
            return meaning(low, frozenset((0, low)), table_of(((low, 1),)))
    raise ValueError(f"{path}: the masks' values can be read in more than one way: {_listed(exact)}. Expected 0 and 1, 0 and 255, soft "
                     "grey masks, or class ids 1, 2, ... without gaps; write the class names, from value 1 on, into a classes.txt in that "
                     "folder (one a line), or save the masks as class ids")


def _named_ids(path, stats, names, notes, problems):
    """Values 1..K are the names; 255 is not judged."""
    known = frozenset(range(len(names) + 1)) | {IGNORE}
    odd = [s for s in stats if s.kind in ("lossy", "1-bit") or not s.values <= known]
    if len(odd) > len(stats) / 2:
        raise ValueError(f"{path}: expected values 0 to {len(names)} ({', '.join(names)}) and 255 for \"not judged\", got {_listed(odd)} "
                         f"in {len(odd)} of {len(stats)} masks (first: {os.path.basename(odd[0].file)}, {odd[0].kind}); save them as class "
                         "ids in PNG, or put the missing names into classes.txt")
    _name_odd(odd, known, problems)
    ignored = sum(int(s.pixels[IGNORE]) for s in stats)
    notes.append(f"{len(stats) - len(odd)} masks of class ids 1 to {len(names)}" + f", 255 is not judged ({ignored} px)" * bool(ignored))
    table = table_of(tuple((k, k) for k in range(len(names) + 1)), IGNORE)
    return Meaning(tuple(names), tuple(range(1, len(names) + 1)), {"grey": table, "palette": table}, known)


def _two_levels(stats):
    """Whether grey masks are black and white with soft rims: what lies between is less than the white. JPEG smears black up to BETWEEN."""
    pixels = sum(s.pixels for s in stats)
    first = BETWEEN[0] if stats[0].kind == "lossy" else 1
    most = MANY_RIMS if np.count_nonzero(pixels) > LARGEST_ID else RIMS
    return pixels[first:BETWEEN[1] + 1].sum() <= most * pixels[BETWEEN[1] + 1:].sum()


def _name_odd(odd, known, problems):
    for s in odd:
        said = f"unexpected values {_listed([s], known)}" if s.kind not in ("lossy", "1-bit") else f"a {s.kind} mask among class ids"
        problems.append(f"{os.path.basename(s.file)}: {said}; picture left out")


def _listed(stats, known=frozenset()):
    """"7 (12 px), 9 (3 px)": the values that are not known, most frequent first."""
    pixels = sum((s.pixels for s in stats), np.zeros(256, np.int64))
    order = [v for v in np.argsort(-pixels, kind="stable").tolist() if pixels[v] and v not in known]
    return ", ".join(f"{v} ({int(pixels[v])} px)" for v in order[:8]) + (f" and {len(order) - 8} more values" if len(order) > 8 else "")
