"""Which pictures show the same thing: by name, by moment, by bytes, and by a 256-bit difference hash of the pixels.

The hash (dHash, N. Krawetz 2013): grey, 17 x 16 cells, one bit for "brighter than the right neighbour". Re-saved, resized and slightly
recoloured copies differ in a few bits; unrelated photographs in about half of them. Textures under one lamp (steel, asphalt) share nothing
but its gradient, which fills the hash: 1,417 pairs of NEU-DET's pictures are near, thirteen of them alike. So a near pair also has to
agree in its detail, what is finer than an eighth of the picture.
"""
import collections
import functools
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from minidamage.data.pictures import READ_ERRORS, TURN, open_picture, orientation, to_rgb

HASH_BITS = 256
NEAR_BITS = 48                                 # of 256. On 700 photographs of cars every pair up to 56 showed one scene, none from 67 on
MIN_CONTRAST = 2.0                             # grey levels: a flat picture has no pattern to compare
DETAIL_SIDE, COARSE_SIDE = 64, 8               # detail is the picture at the first size less the picture at the second
DETAIL_AGREES = 0.4                            # correlation of detail. Cars: every near pair is above 0.45; textures: unrelated below 0.3


def picture_hash(path):
    """bool [256], or None for a picture without contrast. ValueError when it cannot be read. JPEGs are decoded at an eighth."""
    with open_picture(path) as image:
        turn = orientation(image)
        try:
            image.draft("L", (136, 128))
            grey = to_rgb(image).convert("L").resize((68, 64), Image.Resampling.BOX)
        except READ_ERRORS as error:
            raise ValueError(f"{path}: the picture is damaged or cut short ({error})") from error
    if turn in TURN:
        grey = grey.transpose(TURN[turn])
    cells = np.asarray(grey.resize((17, 16), Image.Resampling.BOX), np.int16)
    if cells.std() < MIN_CONTRAST:
        return None
    return (cells[:, :-1] > cells[:, 1:]).ravel()


def picture_hashes(files, threads=None):
    """[n] list of hashes (None: unreadable or flat). Pillow decodes outside Python's lock, so threads help."""
    def one(file):
        try:
            return picture_hash(file)
        except ValueError:
            return None
    with ThreadPoolExecutor(threads or min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, files))


def near_pairs(hashes, max_bits=NEAR_BITS, block=1024):
    """Pairs (i, j, differing bits), i < j, at most max_bits apart, as they are or with one of them mirrored; one after the other, for all
    pictures of one camera that stands still are near each other.

    Bits as +-1 make the distance a matrix product: 14,000 hashes against each other take two or three seconds.
    """
    known = [i for i, h in enumerate(hashes) if h is not None]
    if len(known) < 2:
        return
    bits = np.stack([hashes[i] for i in known])
    mirrored = ~bits.reshape(-1, 16, 16)[:, :, ::-1].reshape(len(bits), -1)       # "brighter than the right neighbour", seen in a mirror
    signs, mirrored = (np.where(b, 1.0, -1.0).astype(np.float32) for b in (bits, mirrored))
    for start in range(0, len(known), block):
        rows = signs[start:start + block]
        differ = (HASH_BITS - np.maximum(rows @ signs[start:].T, rows @ mirrored[start:].T)) / 2
        for a, b in zip(*np.nonzero(differ <= max_bits + 0.25)):
            if b > a:
                yield known[start + a], known[start + b], int(round(float(differ[a, b])))


def near_copies(files, skip=lambda i, j: False):
    """near_pairs of files, those whose detail agrees as well: (i, j, differing bits), one after the other. skip(i, j): whether a pair is
    of no interest."""
    detail = functools.cache(lambda i: _detail(files[i]))
    agree = lambda a, b: max(float((a * b).mean()), float((a * b[:, ::-1]).mean())) > DETAIL_AGREES
    for i, j, bits in near_pairs(picture_hashes(files)):
        if not skip(i, j) and agree(detail(i), detail(j)):
            yield i, j, bits


def _detail(path):
    """float32 [64, 64], mean 0 and standard deviation 1: the picture without what is coarser than an eighth of it."""
    with open_picture(path) as image:
        turn = orientation(image)
        image.draft("L", (2 * DETAIL_SIDE, 2 * DETAIL_SIDE))
        grey = to_rgb(image).convert("L")
    fine = Image.fromarray(np.asarray(grey.resize((DETAIL_SIDE, DETAIL_SIDE), Image.Resampling.BOX), np.float32))
    coarse = fine.resize((COARSE_SIDE, COARSE_SIDE), Image.Resampling.BOX).resize(fine.size, Image.Resampling.BICUBIC)
    detail = np.asarray(fine) - np.asarray(coarse)
    detail = (detail - detail.mean()) / (detail.std() + 1e-6)
    picture = Image.fromarray(detail)
    return np.asarray(picture.transpose(TURN[turn]) if turn in TURN else picture)


def content_digest(path):
    """SHA-1 of the file's bytes: equal for exact copies."""
    with open(path, "rb") as handle:
        return hashlib.sha1(handle.read()).hexdigest()


def original_name(file):
    """The photograph's own name: Roboflow's `X_jpg.rf.<hash>.jpg` and VehiDE's `ThumbnailX.jpg` come from X."""
    stem = os.path.splitext(os.path.basename(file))[0]
    stem = re.sub(r"_(?:jpe?g|png|bmp|webp|tiff?)\.rf\.[0-9a-zA-Z]+$", "", stem, flags=re.IGNORECASE)
    return re.sub(r"^thumbnail", "", stem, flags=re.IGNORECASE) or stem


class DisjointSets:
    """0..n-1, each in a set of its own until sets are joined."""

    def __init__(self, n):
        self._parent = list(range(n))

    def find(self, i):
        """The number that stands for i's set."""
        parent = self._parent
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def join(self, i, j):
        self._parent[self.find(i)] = self.find(j)


def group_of_each(records, near=True):
    """An int per record: equal numbers may not be put into different splits.

    Records join by Record.group (a vehicle), by original_name, and, where no vehicle is known, by near-duplicate pixels.
    """
    sets, first = DisjointSets(len(records)), {}
    for i, record in enumerate(records):
        keys = [("name", os.path.dirname(record.file), original_name(record.file))] + ([("group", record.group)] if record.group else [])
        for key in keys:
            sets.join(i, first.setdefault(key, i))
    unknown = [i for i, record in enumerate(records) if not record.group]
    if near and len(unknown) > 1:
        together = lambda a, b: sets.find(unknown[a]) == sets.find(unknown[b])
        for a, b, _ in near_copies([records[i].file for i in unknown], skip=together):
            sets.join(unknown[a], unknown[b])
    return [sets.find(i) for i in range(len(records))]


def groups_of_copies(files):
    """Files that show the same thing, by bytes or by pixels: [(places in `files`, bits)], groups of two or more, the surest first.

    bits: the most bits of the hash that differ between two of the group that were joined; -1 where all have the same bytes.

    Copies of copies are in one group, and only what joins two groups is kept: of n pictures of a camera that stands still fewer than n
    links, where there are n (n - 1) / 2 pairs.
    """
    sets, links, first = DisjointSets(len(files)), [], {}
    for i, file in enumerate(files):
        links.append((i, first.setdefault(content_digest(file), i), -1))
        sets.join(*links[-1][:2])
    for i, j, bits in near_copies(files, skip=lambda i, j: sets.find(i) == sets.find(j)):
        links.append((i, j, bits))
        sets.join(i, j)
    members, furthest = collections.defaultdict(list), collections.defaultdict(lambda: -1)
    for i in range(len(files)):
        members[sets.find(i)].append(i)
    for i, _, bits in links:
        furthest[sets.find(i)] = max(furthest[sets.find(i)], bits)
    return sorted(((group, furthest[name]) for name, group in members.items() if len(group) > 1), key=lambda found: (found[1], found[0]))
