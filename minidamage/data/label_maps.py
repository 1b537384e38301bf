"""Label maps: one uint8 number a pixel, 0 background, 1..K the classes, 255 "not judged" (no loss, no metric).

A record has either a file of its own for them (mask folders, CrackForest: `LabelMapFile`) or objects, whose outlines are
rasterised here. `label_map(record)` serves both, so that every set feeds a segmentation model.
"""
import dataclasses
import functools

import numpy as np
from PIL import Image

from minidamage import masks as mask_codec
from minidamage.data import mat
from minidamage.data.pictures import READ_ERRORS, TURN, open_picture

IGNORE = 255                                   # the label of pixels that are not judged
IDENTITY = bytes(range(256))


@dataclasses.dataclass(frozen=True)
class LabelMapFile:
    """A mask file and how its stored values become labels. The reader of the set has looked at every value once.

    table: 256 bytes, the label of each stored value (a threshold, class ids and CrackForest's {2, 4} are all tables).
    turn: EXIF orientation of a picture whose mask was drawn before the rotation; the mask's own tag, if any, is not looked at.
    layers: further masks of the same picture, painted over this one where they are not background.
    """

    file: str
    table: bytes = IDENTITY
    counts: tuple = ()                         # ((label, pixels), ...) without background and IGNORE: what the reader counted
    turn: int = 1
    layers: tuple = ()

    @property
    def present(self):
        """The labels 1..K that occur, ascending."""
        return tuple(sorted({label for label, _ in self.counts} | {label for layer in self.layers for label in layer.present}))

    def read(self):
        """uint8 [H, W], 0..K and IGNORE. Raises ValueError naming the file when it is missing, damaged or holds values over 255."""
        values, _ = read_values(self.file)
        labels = values if self.table == IDENTITY else np.frombuffer(self.table, np.uint8)[values]
        if self.turn in TURN:
            labels = np.array(Image.fromarray(labels).transpose(TURN[self.turn]))
        for layer in self.layers:
            over = layer.read()
            labels = np.where(over > 0, over, labels)
        return labels

    def renumbered(self, table):
        """The same file with label k called table[k]; table: K + 1 numbers. IGNORE stays."""
        full = np.arange(256, dtype=np.uint8)
        full[:len(table)] = table
        full[IGNORE] = IGNORE
        return dataclasses.replace(
            self, table=full[np.frombuffer(self.table, np.uint8)].tobytes(), layers=tuple(l.renumbered(table) for l in self.layers),
            counts=tuple((int(full[label]), n) for label, n in self.counts if full[label]))


def read_values(file):
    """What a mask file stores: (uint8 [H, W], kind), before any table.

    kind: "grey", "1-bit" (0 and 255), "palette" (the indices), "lossy" (JPEG: values are rough), "mat" or "seg" (CrackForest). Colour masks
    whose channels agree are grey. ValueError for other colours, values over 255 and files that cannot be read.
    """
    name = str(file).lower()
    if name.endswith(".mat"):
        return mat.segmentation(file), "mat"
    if name.endswith(".seg"):
        return read_seg(file), "seg"
    with open_picture(file) as image:
        try:
            image.load()
        except READ_ERRORS as error:
            raise ValueError(f"{file}: the mask is damaged or cut short ({error}); copy it again or take it out") from error
        mode, lossy = image.mode, image.format in ("JPEG", "MPO", "WEBP")
        if mode == "1":
            return np.array(image.convert("L")), "1-bit"
        if mode == "PA":
            mode, image = "P", image.getchannel("P")
        if mode in ("RGBA", "LA"):                                    # what an alpha channel hides is still the mask
            mode, image = mode[:-1], image.convert(mode[:-1])
        elif len(image.getbands()) > 1 and mode != "RGB":             # CMYK, LAB, ...
            mode, image = "RGB", image.convert("RGB")
        values = np.array(image)
    if mode == "P":
        return values, "palette"
    if mode == "RGB":
        values = _one_channel(values, file, lossy)
    elif mode != "L":
        if values.min(initial=0) < 0 or values.max(initial=0) > 255 or (values != np.rint(values)).any():
            raise ValueError(f"{file}: mask values run from {values.min()} to {values.max()}; expected class ids or grey levels 0..255. "
                             "Save it as an 8-bit picture")
        values = values.astype(np.uint8)
    return values, "lossy" if lossy else "grey"


def _one_channel(values, file, lossy):
    first = values[..., 0]
    apart = max(int(np.abs(values[..., k].astype(np.int16) - first).max(initial=0)) for k in (1, 2))
    if apart <= (16 if lossy else 0):                                 # JPEG moves the channels a little apart
        return np.ascontiguousarray(first)
    colours, counts = np.unique(values.reshape(-1, 3), axis=0, return_counts=True)
    most = ", ".join(f"{tuple(colours[i].tolist())} ({counts[i]} px)" for i in np.argsort(-counts)[:6])
    raise ValueError(f"{file}: a mask in colours: {most}; expected class ids 0, 1, 2, ... or 0 and 255 in one channel, "
                     "or a palette PNG. Save each colour as its class id")


def read_seg(file):
    """Region numbers uint8 [H, W] of a `.seg` file (the Berkeley segmentation format): a header of "key value" lines up to "data", then a
    run a line, `region row first_column last_column`. ValueError naming the file where runs are missing or lie outside."""
    with open(file, encoding="latin-1") as handle:
        lines = handle.read().splitlines()
    try:
        start = lines.index("data")
        header = dict(line.split(None, 1) for line in lines[:start] if len(line.split(None, 1)) == 2)
        height, width = int(header["height"]), int(header["width"])
        runs = np.array([line.split() for line in lines[start + 1:] if line.strip()], np.int64).reshape(-1, 4)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file}: not a .seg file (header with width and height, \"data\", then four numbers a line): {error}") from None
    region, row, first, last = runs.T
    if len(runs) and (runs.min() < 0 or region.max() >= IGNORE or row.max() >= height or last.max() >= width or (first > last).any()):
        raise ValueError(f"{file}: a run lies outside the {width}x{height} picture that the header gives")
    out = np.full((height, width), IGNORE, np.uint8)
    for value, y, x0, x1 in runs.tolist():
        out[y, x0:x1 + 1] = value
    if (out == IGNORE).any():
        raise ValueError(f"{file}: {int((out == IGNORE).sum())} pixels are in no run; was the file cut short?")
    return out


def label_map(record):
    """uint8 [H, W] of a record, in the pixels of its picture: 0 background, 1..K, 255 not judged.

    From the record's own file, or painted from its objects: large ones first, so that a small damage on a large one stays visible; holes
    stay holes. Crowd regions, and objects of which only the box is known, are 255 where no outline lies over them.
    Raises ValueError when the file cannot be read or has another size than the picture.
    """
    if record.label_map is not None:
        labels = record.label_map.read()
        if labels.shape != (record.height, record.width):
            raise ValueError(f"{record.label_map.file}: the mask is {labels.shape[1]}x{labels.shape[0]}, the picture {record.file} is "
                             f"{record.width}x{record.height}; export it again at the picture's size")
        return labels
    return paint(record.masks, record.labels, record.crowd, record.boxes, record.height, record.width)


def paint(masks, labels, crowd, boxes, height, width):
    """uint8 [height, width] of objects; see label_map. masks: G entries, polygons [P, 2] or RLE dicts or None."""
    out = np.zeros((height, width), np.uint8)
    outlined = []
    for mask, label, is_crowd, box in zip(masks, labels, crowd, boxes):
        if mask is None:
            x0, y0, x1, y1 = np.rint(box).astype(int)
            out[y0:y1, x0:x1] = IGNORE
        else:
            outlined.append((mask if isinstance(mask, dict) else mask_codec.from_polygons(mask, height, width), label, is_crowd))
    if not outlined:
        return out
    areas = mask_codec.area([rle for rle, _, _ in outlined])
    order = sorted(range(len(outlined)), key=lambda i: (not outlined[i][2], -areas[i]))            # crowd lies under everything
    for rle, label, is_crowd in (outlined[i] for i in order):
        x0, y0, x1, y1 = mask_codec.to_boxes(rle).astype(int)
        inside = mask_codec.decode(rle)[y0:y1, x0:x1]
        out[y0:y1, x0:x1][inside > 0] = IGNORE if is_crowd else label
    return out


@functools.lru_cache(maxsize=64)
def table_of(pairs, default=0):
    """The 256-byte table of ((stored value, label), ...); every other value becomes `default`."""
    table = np.full(256, default, np.uint8)
    for value, label in pairs:
        table[value] = label
    return table.tobytes()
