"""The part of the data set doctor (check.py) that looks at masks of pixel labels: what they store, how much of it is damage."""
import collections
import os

import numpy as np
from PIL import Image

from minidamage.data.label_maps import IGNORE
from minidamage.data.mask_values import scan
from minidamage.data.record import number_of

INVERTED = 0.5                                 # share of foreground above which a mask is probably the wrong way round
SIZE = 448                                     # pixels a side: what segmenters train at, as the crack papers (--size of train.py)
LOST = 0.25                                    # share of the places with damage that may be empty after the resize
SPECK = 4                                      # pixels of foreground; fewer are a slip of the brush, or compression


def check_masks(everything, class_names, quick=False, size=SIZE):
    """[(level, text, examples)] for the records with label maps among [(part, record)]; nothing where there are none. size: pixels a side
    that they will be resized to for training."""
    marked = [(part, r) for part, r in everything if r.label_map]
    if not marked:
        return []
    share = np.array([sum(n for _, n in _counts(r)) / (r.width * r.height) for _, r in marked])
    name = lambda i: f"{marked[i][0]}/{os.path.basename(marked[i][1].file)}"
    out = [_foreground(marked, share, class_names)]
    by_tag = [i for i, (_, r) in enumerate(marked) if all(map(_is_background, _layers(r)))]
    if by_tag:
        out.append(("note", f"{number_of(len(by_tag), 'picture is', 'pictures are')} undamaged by the tag of the mask, whatever it marks",
                    tuple(map(name, by_tag))))
    empty = [i for i in np.flatnonzero(share == 0) if i not in by_tag]
    if empty:
        out.append(("note", f"{number_of(len(empty), 'mask is', 'masks are')} empty: taken as undamaged; look at a few",
                    tuple(map(name, empty))))
    specks = [i for i in np.flatnonzero(share) if share[i] * marked[i][1].width * marked[i][1].height < SPECK]
    if specks:
        out.append(("warning", f"{number_of(len(specks), 'mask has', 'masks have')} fewer than {SPECK} foreground pixels",
                    tuple(map(name, specks))))
    inverted = np.flatnonzero(share > INVERTED)
    if len(inverted):
        out.append(("warning", f"{number_of(len(inverted), 'mask has', 'masks have')} more foreground than background: inverted, or "
                    "pictures taken from very near", tuple(f"{name(i)} ({share[i]:.0%})" for i in inverted)))
    if not quick:
        out += _values([r for _, r in marked]) + _thin([r for _, r in marked], size) + _exactness([r for _, r in marked])
    return out


def _layers(record):
    return (record.label_map, *record.label_map.layers)


def _counts(record):
    return [pair for layer in _layers(record) for pair in layer.counts]


def _is_background(layer):
    """Whether no value of a mask file stands for damage: its name's tag says that there is none."""
    return set(layer.table) <= {0, IGNORE}


def _foreground(marked, share, class_names):
    parts, areas = np.array([part for part, _ in marked]), np.array([r.width * r.height for _, r in marked])
    said = "; ".join(f"{part} {np.average(share[own], weights=areas[own]):.2%} of all pixels, mean of the pictures' shares "
                     f"{share[own].mean():.2%}" for part in dict.fromkeys(parts.tolist()) for own in [parts == part])
    of_class = collections.Counter()
    for _, record in marked:
        for label, pixels in _counts(record):
            of_class[label] += pixels
    classes = "; by class: " + ", ".join(f"{n} {of_class[k + 1]} px" for k, n in enumerate(class_names)) if len(class_names) > 1 else ""
    low, middle, high = np.percentile(share, (0, 50, 100))
    return ("note", f"foreground: {said}; a picture {low:.2%} to {high:.2%}, half of them under {middle:.2%}{classes}", ())


def _values(records):
    """What the files store: their kinds, and a histogram of the values. Those that a tag makes background say nothing of damage."""
    layers = [layer for r in records for layer in _layers(r)]
    files = [layer.file for layer in layers if not _is_background(layer)]
    if not files:
        return []
    stats = [s for s in scan(files, []).values() if s]
    kinds = collections.Counter(s.kind for s in stats)
    pixels = sum(s.pixels for s in stats)
    order = np.flatnonzero(pixels).tolist()
    if len(order) > 12:                        # grey: sixteen steps say more than two hundred lines
        steps = pixels.reshape(16, 16).sum(1)
        listed = ", ".join(f"{16 * k}-{16 * k + 15} {steps[k] / pixels.sum():.2%}" for k in range(16) if steps[k])
    else:
        listed = ", ".join(f"{v} {pixels[v] / pixels.sum():.2%}" for v in order)
    of_kind = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
    without = f", without {len(layers) - len(files)} undamaged by tag" * (len(files) < len(layers))
    return [("note", f"values in the {number_of(len(stats), 'mask file')} ({of_kind}{without}): {listed}", ())]


def _thin(records, size):
    """What the resize to size x size does to thin damage: one pixel of the mask stands for many, and a line falls between them."""
    held = kept = 0
    for record in (r for r in records if max(r.width, r.height) > size and r.present):
        damage = record.label_map.read()
        damage = Image.fromarray(((damage > 0) & (damage != IGNORE)).astype(np.uint8) * np.uint8(255)).convert("F")       # exact means
        touched = np.asarray(damage.resize((size, size), Image.Resampling.BOX)) > 0
        held += np.count_nonzero(touched)
        kept += np.count_nonzero(touched & (np.asarray(damage.resize((size, size), Image.Resampling.NEAREST)) > 0))
    if held == 0 or kept >= (1 - LOST) * held:
        return []
    return [("warning", f"at {size}x{size} px {1 - kept / held:.0%} of the places with damage are labelled background: thin lines fall "
             "between the pixels that are kept; train larger (train.py --size N)", ())]


def _exactness(records):
    """What a pixel of an outline is worth: how the truth would score one or two pixels beside itself, or one wider on all sides. Pooled."""
    one, two, wider = np.zeros((3, 2), np.int64)                                          # intersection, union
    for record in (r for r in records if r.present):
        damage = record.label_map.read()
        damage = (damage > 0) & (damage != IGNORE)
        framed = np.pad(damage, 2)                                                        # nothing comes in at the other side
        moved = lambda pixels: [np.roll(framed, step, axis)[2:-2, 2:-2] for axis in (0, 1) for step in (-pixels, pixels)]
        for sums, pixels in ((one, 1), (two, 2)):
            for each in moved(pixels):
                sums += np.count_nonzero(damage & each), np.count_nonzero(damage | each)
        wider += np.count_nonzero(damage), np.count_nonzero(np.logical_or.reduce([damage, *moved(1)]))
    if not wider[0]:
        return []
    return [("note", f"outlines: the masks moved by one pixel have an IoU of {one[0] / one[1]:.3f} with themselves, by two "
             f"{two[0] / two[1]:.3f}, a pixel wider on all sides {wider[0] / wider[1]:.3f}; a score near one of these is that exact", ())]
