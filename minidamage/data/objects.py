"""From what an annotation file says to a clean Record: the one place where bad boxes, polygons and masks are dealt with.

Readers (vehide.py, via.py, coco.py, ...) only translate their file into `RawObject`s; `make_record` clips, drops and counts.
Nothing here raises for a bad object: each becomes one line in `problems`, with file and annotation id.
"""
import contextlib
import dataclasses
import json
import os
import unicodedata

import numpy as np

from minidamage import masks as mask_codec
from minidamage.data.folders import walk
from minidamage.data.pictures import is_picture_name, picture_header
from minidamage.data.record import Record


DEPTH = 4                                      # folders below the data set's in which a picture is sought
MIN_SIDE = 0.01                                # pixels; at large coordinates float32 boxes cannot hold less


@dataclasses.dataclass
class RawObject:
    """One object as the file has it, before any check."""

    annotation_id: int
    label: int                                # 1..K
    segmentation: list | dict | None          # list of [P, 2] polygons, an RLE dict {"size": [h, w], "counts": ...}, or None
    box: tuple | None = None                  # xyxy, or None: taken from the polygons
    crowd: bool = False
    area: float | None = None                 # pixels, or None: taken from the outline


def read_json(file):
    """The content of a JSON file; ValueError that names it where it is none, or breaks off."""
    try:
        with open(file, encoding="utf-8-sig") as handle:              # some Windows tools write a byte order mark
            return json.load(handle)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error}); was it cut short?") from None


@contextlib.contextmanager
def not_utf8(file):
    """Inside, bytes of a text file that are no UTF-8 are a ValueError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8, got {error.object[error.start:error.end]!r}; save it as UTF-8 (Windows' "
                         "\"ANSI\" is another)") from None


def read_lines(file):
    """The lines of a text file that hold something, without the space around them; ValueError where it is not UTF-8."""
    with not_utf8(file), open(file, encoding="utf-8-sig") as handle:
        return [line.strip() for line in handle if line.strip()]


def unusable(problems, text):
    """None, which stands for what cannot be used: an object, a picture, a value. `problems` gets the text, a line that says so."""
    problems.append(text)
    return None


def find_record(finder, name, image_id, objects, problems):
    """`make_record` of the picture that an annotation file calls `name`; None, and a line in `problems`, when it is not there."""
    file = finder.find(name)
    if file is None:
        return unusable(problems, f"{name}: the annotation file names it but it is not there; picture left out ({len(objects)} objects)")
    return make_record(file, image_id, objects, problems)


def make_record(file, image_id, objects, problems, listed_size=None):
    """A Record, or None when the picture itself cannot be used; every loss is written to `problems`.

    objects: RawObjects, and None for each that the reader could make nothing of (and named). A picture of whose objects none can be used
    is left out: without them it would pass for an undamaged one, and teach a model to overlook its damage.
    listed_size: (width, height) that the annotation file claims, or None. When it is the size *before* the EXIF rotation, or (where
    none is claimed) the outlines fit that size alone, the annotations were drawn on the unrotated picture and are turned with
    it (of a square picture nobody can tell); any other disagreement leaves the picture out: its boxes would be in another scale.
    """
    name = os.path.basename(file)
    try:
        width, height, turn = picture_header(file)
    except ValueError as error:
        return unusable(problems, f"{name}: {str(error).removeprefix(str(file) + ': ')}; picture left out")
    marked, objects = len(objects), [obj for obj in objects if obj is not None]
    unturned = (height, width)
    if turn >= 5 and width != height and (listed_size == unturned if listed_size else _fits_only(objects, unturned, (width, height))):
        objects = [turn_object(obj, turn, height, width) for obj in objects]
        problems.append(f"{name}: annotated before its EXIF rotation ({turn}); annotations turned with the picture")
    elif listed_size and listed_size != (width, height):
        return unusable(problems, f"{name}: the annotation file says {listed_size[0]}x{listed_size[1]}, the picture is {width}x{height}; "
                        "picture left out")
    kept = []
    for obj in objects:
        try:
            clean = _clean(obj, width, height, name, problems)
        except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:      # what nobody foresaw, without losing the rest
            clean = unusable(problems, f"{name}, annotation {obj.annotation_id}: cannot be read ({error}); dropped")
        if clean is not None:
            kept.append(clean)
    if marked and not kept:
        return unusable(problems, f"{name}: none of its {marked} objects can be used; picture left out")
    return Record(
        file=str(file), image_id=image_id, width=width, height=height,
        boxes=np.array([k.box for k in kept], np.float32).reshape(-1, 4),
        labels=np.array([k.label for k in kept], np.int64),
        masks=[k.segmentation for k in kept],
        crowd=np.array([k.crowd for k in kept], bool),
        area=np.array([k.area for k in kept], np.float64),
        annotation_ids=np.array([k.annotation_id for k in kept], np.int64))


def _fits_only(objects, size, other):
    """Whether all outlines lie within `size` (width, height) and some leave `other` by more than a pixel."""
    try:
        points = np.concatenate([np.asarray(p, np.float64).reshape(-1, 2) for o in objects for p in o.segmentation or ()])
    except (TypeError, ValueError):                      # no outlines, RLE, or numbers that _clean will name
        return False
    return bool((points.max(0) <= np.add(size, 1)).all() and (points.max(0) > np.add(other, 1)).any())


def _clean(obj, width, height, name, problems):
    """The object with polygons and box inside the picture, or None; says what was done."""
    def say(text):
        problems.append(f"{name}, annotation {obj.annotation_id}: {text}")

    def dropped(why):
        return unusable(problems, f"{name}, annotation {obj.annotation_id}: {why}; dropped")

    segmentation, box, area = obj.segmentation, obj.box, obj.area
    if isinstance(segmentation, dict):
        fault = rle_fault(segmentation, height, width)
        if fault:
            return dropped(fault)
        if box is None or area is None:
            tight, pixels = rle_extent(segmentation)
            box, area = (tight if box is None else box), (pixels if area is None else area)
    elif segmentation is not None:
        segmentation = _clean_polygons(segmentation, width, height, say) or None
        if segmentation is None and box is None:
            return dropped("no usable outline")
    if isinstance(segmentation, list):
        points = np.concatenate(segmentation)
        if box is not None and not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
            say(f"box {np.round(box, 1).tolist()} has no size; taken from its outline")
            box = None
        box = box if box is not None else (*points.min(0), *points.max(0))
        area = area if area is not None else sum(polygon_area(p) for p in segmentation)
    if box is None:
        return dropped("neither box nor outline")
    box = np.asarray(box, np.float64)
    if box.shape != (4,) or not np.isfinite(box).all():
        return dropped(f"box {box.tolist()} is not four numbers")
    inside = np.clip(box, 0, [width, height, width, height])
    if box[2] <= box[0] or box[3] <= box[1]:
        return dropped(f"box {np.round(box, 1).tolist()} has no size")
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        return dropped(f"box {np.round(box, 1).tolist()} lies outside the {width}x{height} picture")
    if min(inside[2] - inside[0], inside[3] - inside[1]) < MIN_SIDE:
        return dropped(f"box {np.round(inside, 3).tolist()} is thinner than {MIN_SIDE} px inside the picture")
    if segmentation is None and obj.segmentation is not None:
        say("no usable outline; taken as its box")
    if np.abs(inside - box).max() > 0.5:                 # half a pixel is how exporters round, not worth a line
        say(f"box leaves the picture by {np.abs(inside - box).max():.1f} px; clipped")
    area = (inside[2] - inside[0]) * (inside[3] - inside[1]) if area is None else area
    return RawObject(obj.annotation_id, obj.label, segmentation, tuple(inside), obj.crowd, float(area))


def _clean_polygons(polygons, width, height, say):
    """The usable polygons [P, 2] float64, clipped to the picture."""
    kept = []
    for polygon in polygons:
        try:
            points = np.asarray(polygon, np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            say("an outline is not a list of x, y numbers; outline dropped")
            continue
        if len(points) < 3:
            say(f"polygon with {len(points)} points; outline dropped")
        elif not np.isfinite(points).all():
            say("polygon with coordinates that are no numbers; outline dropped")
        elif polygon_area(points) < 1e-6 and not self_crossing(points):
            say("polygon without area; outline dropped")
        elif points.min() >= 0 and points[:, 0].max() <= width and points[:, 1].max() <= height:
            kept.append(points)
        else:
            low, high = points.min(0), points.max(0)
            over = max(-low.min(), high[0] - width, high[1] - height)
            clipped = clip_polygon(points, width, height)
            if len(clipped) < 3 or (polygon_area(clipped) < 1e-6 and not self_crossing(clipped)):
                say(f"polygon lies outside the {width}x{height} picture; outline dropped")
                continue
            if over > 0.5:
                say(f"polygon leaves the picture by {over:.1f} px; clipped")
            kept.append(clipped)
    return kept


def polygon_area(points):
    """Area inside a ring [P, 2] by the shoelace formula, pixels."""
    x, y = points[:, 0], points[:, 1]
    return abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2


def clip_polygon(points, width, height):
    """The ring [P, 2] cut to the picture, one side after another (Sutherland and Hodgman 1974)."""
    for axis, sign, limit in ((0, 1, 0.0), (0, -1, -float(width)), (1, 1, 0.0), (1, -1, -float(height))):
        if len(points) == 0:
            return points
        after = np.roll(points, -1, axis=0)
        d0, d1 = sign * points[:, axis] - limit, sign * after[:, axis] - limit       # >= 0 is inside
        out = []
        for p, q, a, b in zip(points, after, d0, d1):
            if a >= 0:
                out.append(p)
            if (a >= 0) != (b >= 0):
                out.append(p + (q - p) * (a / (a - b)))
        points = np.array(out, np.float64).reshape(-1, 2)
    return np.clip(points, 0, [width, height])


def self_crossing(points):
    """Whether two edges of a ring [P, 2] properly cross (a shared or repeated corner is no crossing)."""
    return bool(_crossings(np.asarray(points, np.float64)[None])[0])


def count_self_crossing(records, problems):
    """Adds one problem line for each object whose outline crosses itself. Such outlines are kept and filled by the rule of the
    COCO rasteriser (even-odd), so a figure of eight keeps both lobes. Rings of equal length are tested together: 36,000
    outlines take about a second."""
    rings = {}
    for record in records:
        for i, mask in enumerate(record.masks):
            for polygon in mask if isinstance(mask, list) else ():
                rings.setdefault(len(polygon), []).append((record, i, polygon))
    for length, entries in sorted(rings.items()):
        if length > 3000:                                # [P, P] would not fit; nobody draws these by hand
            continue
        step = max(1, 4_000_000 // length ** 2)
        for start in range(0, len(entries), step):
            chunk = entries[start:start + step]
            crossed = _crossings(np.stack([polygon for _, _, polygon in chunk]))
            for record, i, _ in (e for e, hit in zip(chunk, crossed) if hit):
                problems.append(f"{os.path.basename(record.file)}, annotation {record.annotation_ids[i]}: "
                                "outline crosses itself; kept, filled even-odd")


def _crossings(rings):
    """rings: [n, P, 2]. Edge i crosses edge j where the ends of each lie on opposite sides of the other. Returns [n] bool."""
    edge = np.roll(rings, -1, axis=1) - rings                                            # [n, P, 2]
    x, y = rings[..., 0], rings[..., 1]
    side = (edge[:, :, None, 0] * (y[:, None, :] - y[:, :, None])                        # [n, P edges, P points]
            - edge[:, :, None, 1] * (x[:, None, :] - x[:, :, None]))
    apart = side * np.roll(side, -1, axis=2) < 0
    return (apart & apart.transpose(0, 2, 1)).any(axis=(1, 2))


def turn_points(points, turn, width, height):
    """Points [P, 2] of an unrotated width x height picture in the coordinates after EXIF orientation `turn` (1..8)."""
    x, y = points[..., 0], points[..., 1]
    return np.stack({1: (x, y), 2: (width - x, y), 3: (width - x, height - y), 4: (x, height - y),
                     5: (y, x), 6: (height - y, x), 7: (height - y, width - x), 8: (y, width - x)}[turn], axis=-1)


def turn_object(obj, turn, width, height):
    """A RawObject drawn on the unrotated width x height picture, turned as its EXIF orientation turns the pixels."""
    segmentation, box = obj.segmentation, obj.box
    if isinstance(segmentation, dict):
        if rle_fault(segmentation, height, width) is None:
            segmentation = _turn_rle(segmentation, turn)
    elif segmentation is not None:
        segmentation = [turn_points(np.asarray(p, np.float64).reshape(-1, 2), turn, width, height) for p in segmentation]
    if box is not None:
        corners = turn_points(np.asarray(box, np.float64).reshape(2, 2), turn, width, height)
        box = (*corners.min(0), *corners.max(0))
    return dataclasses.replace(obj, segmentation=segmentation, box=box)


def _turn_rle(rle, turn):
    mask = mask_codec.decode(rle)
    flip_rows, flip_columns = mask[::-1], mask[:, ::-1]
    turned = {2: flip_columns, 3: mask[::-1, ::-1], 4: flip_rows, 5: mask.T, 6: flip_rows.T, 7: mask[::-1, ::-1].T,
              8: flip_columns.T}[turn]
    return mask_codec.encode(np.ascontiguousarray(turned))


def rle_fault(rle, height, width):
    """What is wrong with an RLE dict for a height x width picture, in words, or None."""
    size = rle.get("size")
    if size is None or list(size) != [height, width]:
        return f"RLE of size {size}, the picture is {height}x{width} (height x width)"
    try:
        mask_codec.area([rle])
    except (ValueError, TypeError, KeyError, IndexError) as error:
        return f"RLE cannot be read ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


def rle_extent(rle):
    """(xyxy box, area in pixels) of a sound RLE dict."""
    return tuple(mask_codec.to_boxes([rle])[0]), float(mask_codec.area([rle])[0])


class PictureFinder:
    """Finds the files that an annotation file names: as a path, by name in the given folders, then anywhere near the data.

    folders: searched in order. root: walked once (DEPTH folders deep) when a name is in none of them. Letter case may differ,
    and how an accent is written (a Mac writes it apart from its letter).
    """

    def __init__(self, folders, root=None, part=""):
        self.folders = [f for f in dict.fromkeys(map(str, folders)) if os.path.isdir(f)]
        self.root, self.part = (str(root) if root else None), part
        self._listing, self._walked = {}, None

    def find(self, name):
        """The file's path, or None (missing, or only in several other folders at once). Windows' \\ between folders is understood."""
        for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
            for path in (os.path.join(folder, spelled) for folder in self.folders):
                if os.path.isfile(path):
                    return path
        key = _spelled_alike(os.path.basename(name.replace("\\", "/")))
        for folder in self.folders:
            if key in self._names(folder):
                return os.path.join(folder, self._names(folder)[key])
        found = self._walk().get(key, [])
        if len(found) > 1 and self.part:
            found = [p for p in found if self.part in os.path.dirname(os.path.relpath(p, self.root)).lower()]
        return found[0] if len(found) == 1 else None

    def _names(self, folder):
        if folder not in self._listing:
            self._listing[folder] = {_spelled_alike(n): n for n in os.listdir(folder) if is_picture_name(n)}
        return self._listing[folder]

    def _walk(self):
        if self._walked is None:
            self._walked = {}
            for folder, _, names in walk(self.root, depth=DEPTH) if self.root else ():
                for n in filter(is_picture_name, names):
                    self._walked.setdefault(_spelled_alike(n), []).append(os.path.join(folder, n))
        return self._walked


def _spelled_alike(name):
    return unicodedata.normalize("NFC", name).lower()


def unlisted_pictures(folder, records, missing=()):
    """How many pictures of a folder no record names (they are not labelled, so not known to be undamaged)."""
    if not os.path.isdir(folder):
        return 0
    used = {os.path.basename(r.file) for r in records} | set(missing)
    return sum(is_picture_name(n) and n not in used for n in os.listdir(folder))
