"""Boxes, masks and tags drawn over a photograph, and pictures laid out in a grid.

Start with `draw_detections`. Everything works on uint8 [H, W, 3] RGB arrays and returns a new one; the picture handed in is
never changed. Line widths and text grow with the picture, from a 192-pixel thumbnail to a 12-megapixel photograph. Colours
are the paper's where it names them (DamageNet, section III.C and Fig. 3: blue dents, red scratches, brown glass).
"""
import os
import re
import tempfile
import zlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minidamage import masks as mask_codec

# The three colours of DamageNet's figures, then the other names of VehiDE, then colours for any other class name.
NAMED_COLOURS = {
    "dent": (36, 107, 235), "scratch": (226, 40, 52), "broken glass": (146, 88, 36),
    "tear": (139, 61, 190), "puncture": (15, 157, 132), "missing part": (240, 140, 0), "broken lamp": (214, 51, 154),
    "damage": (226, 40, 52), "crack": (226, 40, 52)}
PALETTE = ((31, 150, 74), (14, 165, 190), (240, 140, 0), (139, 61, 190), (214, 51, 154), (112, 168, 20), (76, 79, 214),
           (202, 160, 0), (15, 157, 132), (235, 105, 140), (110, 110, 40), (92, 107, 122))
ALIASES = {"mop lom": "dent", "mop": "dent", "tray son": "scratch", "vo kinh": "broken glass", "glass": "broken glass",
           "glass shatter": "broken glass", "rach": "tear", "thung": "puncture", "mat bo phan": "missing part",
           "be den": "broken lamp", "lamp broken": "broken lamp"}
MASK_OPACITY = 0.38
SEAM_OPACITY = 0.5
NOT_JUDGED = (128, 128, 128)                                           # of the pixels that a label map leaves out
LABEL = (52, 56, 62)                                                   # of a tag on the whole picture


def draw_detections(image, boxes, labels, scores, masks, class_names, enlarge=False, remarks=None):
    """Returns a copy of the photograph with the detections drawn over it.

    image: uint8 [H, W, 3] RGB (a [3, H, W] tensor, uint8 or float 0..1, is converted). boxes: [D, 4] xyxy, pixels of the
    image. labels: [D] int, 1..K. scores: [D] or None. masks: bool [D, H, W] (or [D, 1, H, W]), a list of RLE dicts, a list of
    polygon lists, or None. class_names: K names, label k is class_names[k - 1]. enlarge: draw a small picture 2, 3, ... times as large
    (`enlargement`), so that tags hide less of it; the picture that comes back is then larger than the one handed in. remarks: D words at
    the ends of the tags, or None. Without any detection a tag says so. Raises ValueError where lengths or sizes do not agree.
    """
    image = to_picture(image)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    names = [_class_name(label, class_names) for label in np.asarray(labels).reshape(-1).tolist()]
    if scores is None:
        order, texts = np.arange(len(boxes)), names
    else:
        scores = np.asarray(scores, dtype=np.float64).reshape(-1)
        order, texts = np.argsort(-scores, kind="stable"), [f"{n} {s:.2f}" for n, s in zip(names, scores)]
    return _draw_objects(image, boxes, names, _with(texts, remarks), masks, order, class_names, enlarge, "nothing found")


def draw_truth(image, boxes, labels, masks, class_names, crowd=None, enlarge=False, remarks=None):
    """Returns a copy of the photograph with the annotated objects drawn over it; arguments as in `draw_detections`.

    crowd: [G] bool or None; crowd regions say so in their tags, since they are neither target nor false alarm. Of an undamaged picture a
    tag says that.
    """
    image = to_picture(image)
    boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    names = [_class_name(label, class_names) for label in np.asarray(labels).reshape(-1).tolist()]
    crowd = np.zeros(len(names), bool) if crowd is None else np.asarray(crowd).reshape(-1)
    texts = [f"{name} (crowd)" if flag else name for name, flag in zip(names, crowd)]
    return _draw_objects(image, boxes, names, _with(texts, remarks), masks, np.arange(len(boxes)), class_names, enlarge, "no damage")


def draw_label_map(image, label_map, class_names, enlarge=False, empty="no damage"):
    """Returns a copy of the photograph with each class's pixels tinted and outlined, in the colours that its objects would have.

    image: as in `draw_detections`. label_map: [H, W] integers (array or CPU tensor), 0 background, 1..K, 255 not judged (grey).
    Of several classes, tags in a corner name those on the picture; where there is none, a tag says `empty`. Raises ValueError where the
    sizes differ.
    """
    image, label_map = to_picture(image), np.asarray(label_map)
    if label_map.shape != image.shape[:2]:
        raise ValueError(f"expected a label map of the picture's size {list(image.shape[:2])}, got {list(label_map.shape)}")
    factor = enlargement(*label_map.shape) if enlarge else 1
    canvas, colours = enlarged(image, factor), class_colours(class_names)
    line = max(1, line_width(*canvas.shape[:2]) // 2)                  # thin: a crack is hardly wider than an outline
    for label in np.unique(label_map[label_map > 0]).tolist():
        colour = NOT_JUDGED if label == 255 else colours.get(_class_name(label, class_names), NOT_JUDGED)
        paint_mask(canvas, repeated(label_map == label, factor), colour, line)
    if not label_map.any():
        return with_label(canvas, empty)
    return with_legend(canvas, repeated(label_map, factor), class_names)


def _with(texts, remarks):
    return [f"{text} {remark}".rstrip() for text, remark in zip(texts, remarks, strict=True)] if remarks else texts


def _draw_objects(image, boxes, names, texts, masks, order, class_names, enlarge, empty):
    """Masks first (large ones below small ones), then boxes, then tags, so that nothing hides a tag."""
    H, W, _ = image.shape
    _check_lengths(boxes, names, texts, masks)
    factor = enlargement(H, W) if enlarge else 1
    canvas, boxes = enlarged(image, factor), boxes * factor
    if len(boxes) == 0:
        return with_label(canvas, empty)
    colours = class_colours(list(class_names) + names)
    line = line_width(H * factor, W * factor)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    if masks is not None:
        for i in np.argsort(-areas, kind="stable"):
            mask = mask_array(masks[i], H, W)
            if mask is not None:
                paint_mask(canvas, repeated(mask, factor), colours[names[i]], line)
    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    for i in reversed(order):
        if np.isfinite(boxes[i]).all():
            _draw_box(draw, boxes[i], colours[names[i]], line, H * factor, W * factor)
    _draw_tags(picture, boxes, names, texts, colours, order)
    return np.array(picture)


def _check_lengths(boxes, names, texts, masks):
    counts = {"boxes": len(boxes), "labels": len(names), "scores": len(texts)}
    if masks is not None:
        counts["masks"] = len(masks)
    if len(set(counts.values())) > 1:
        raise ValueError("expected as many labels, scores and masks as boxes, got "
                         + ", ".join(f"{n} {name}" for name, n in counts.items()))


# ---------------------------------------------------------------------------------------------- what is drawn with

def to_picture(image):
    """uint8 [H, W, 3] RGB from that, from a grey [H, W] picture, or from a [3, H, W] tensor (uint8, or float 0..1)."""
    image = np.asarray(image)
    if image.ndim == 3 and image.shape[2] != 3 and image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    if image.ndim == 2:
        image = np.repeat(image[:, :, None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected a picture [H, W, 3], [3, H, W] or [H, W], got shape {list(image.shape)}")
    if image.dtype != np.uint8:
        image = (np.clip(image.astype(np.float32), 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(image)


def mask_array(mask, height, width):
    """bool [H, W] from a bool or 0/1 array [H, W] or [1, H, W], an RLE dict or a list of polygons; None stays None."""
    if mask is None:
        return None
    if isinstance(mask, dict):
        mask = mask_codec.decode(mask)
    elif isinstance(mask, (list, tuple)):
        mask = mask_codec.decode(mask_codec.segmentation_to_rle(mask, height, width))
    mask = np.asarray(mask)
    mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
    mask = mask >= 0.5 if mask.dtype.kind == "f" else mask.astype(bool)
    if mask.shape != (height, width):
        raise ValueError(f"expected a mask of the picture's size [{height}, {width}], got {list(mask.shape)}")
    return mask


def enlargement(height, width):
    """Whole factor that brings a small picture near 640 pixels on its longer side: 3 at 192, 2 at 256, 1 from 321."""
    return max(1, 640 // max(height, width))


def enlarged(image, factor):
    """A new picture [factor H, factor W, 3], smoothly enlarged; a plain copy where the factor is 1."""
    if factor == 1:
        return image.copy()
    H, W, _ = image.shape
    return np.array(Image.fromarray(image).resize((W * factor, H * factor), Image.Resampling.LANCZOS))


def repeated(mask, factor):
    """The mask with every pixel repeated factor x factor times: enlarged, but still exactly its pixels."""
    return mask if factor == 1 else mask.repeat(factor, axis=0).repeat(factor, axis=1)


def line_width(height, width):
    """Outline width in pixels: 1 up to 384 pixels of (geometric mean) side, 2 at 640, 3 at 1024, 8 at 12 megapixels."""
    return max(1, round((height * width) ** 0.5 / 400))


def font_size(height, width):
    """Tag text size in pixels: 10 up to 384 pixels of side, 14 at 640, 20 at 1024, 68 at 12 megapixels."""
    return max(10, round((height * width) ** 0.5 / 51))


def class_colours(class_names):
    """dict name -> (r, g, b). A name keeps its colour from picture to picture; two names of one list differ.

    Names that the palette does not know start at a place given by a checksum of the name and move on when it is taken.
    """
    colours, taken = {}, set()
    for name in dict.fromkeys(class_names):
        known = _canonical(name)
        if known in NAMED_COLOURS and NAMED_COLOURS[known] not in taken:
            colours[name] = NAMED_COLOURS[known]
            taken.add(NAMED_COLOURS[known])
    for name in dict.fromkeys(class_names):
        if name not in colours:
            start = zlib.crc32(_canonical(name).encode()) % len(PALETTE)
            ring = PALETTE[start:] + PALETTE[:start]
            free = [colour for colour in ring if colour not in taken]
            colours[name] = free[0] if free else _spread_colour(len(taken))
            taken.add(colours[name])
    return colours


def _canonical(name):
    words = re.sub(r"[\s_\-]+", " ", str(name)).strip().lower()
    return ALIASES.get(words, words)


def _spread_colour(index):
    """Colours past the palette's end: hues a golden angle apart, three brightnesses in turn."""
    hue, value = (index * 0.61803) % 1.0, (0.85, 0.62, 0.72)[index % 3]
    rgb = [abs((hue * 6 + shift) % 6 - 3) - 1 for shift in (0, 4, 2)]
    return tuple(int(255 * value * (0.2 + 0.8 * min(max(part, 0), 1))) for part in rgb)


def _class_name(label, class_names):
    return class_names[label - 1] if 1 <= label <= len(class_names) else f"class {label}"


def text_colour(background):
    """White or near-black, whichever is easier to read on the background (relative luminance, W3C)."""
    linear = [(c / 255) ** 2.2 for c in background]
    return (255, 255, 255) if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.36 else (20, 20, 20)


# ---------------------------------------------------------------------------------------------- masks and boxes

def paint_mask(canvas, mask, colour, line, opacity=MASK_OPACITY):
    """Tints the mask's pixels and draws its outline, in place. canvas: uint8 [H, W, 3]; mask: bool [H, W].

    The outline runs just inside the mask's border, so it claims no pixel that the mask does not, with a thin seam outside, light around
    a dark colour and dark around a light one, that keeps it visible on paint of its own colour.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    seam = max(1, line // 2)
    top, bottom = max(rows[0] - seam, 0), rows[-1] + 1 + seam
    left, right = max(columns[0] - seam, 0), columns[-1] + 1 + seam
    part = mask[top:bottom, left:right]                       # only the mask's own rectangle is touched: 12 MP stay quick
    view = canvas[top:bottom, left:right]
    padded = np.pad(part, line)
    outer = _dilated(part, seam) & ~part
    outline = part & _dilated(~padded, line)[line:-line, line:-line]
    _blend(view, part & ~outline, colour, opacity)
    _blend(view, outer, text_colour(colour), SEAM_OPACITY)
    _blend(view, outline, colour, 1.0)


def _dilated(mask, radius):
    """mask [h, w] grown by `radius` pixels in every direction (a square window), both axes by doubling steps."""
    grown = mask.copy()
    for plane in (grown, grown.T):
        for towards in (plane, plane[::-1]):
            reached = 0
            while reached < radius:                           # 1, 2, 4, ... pixels: log2(radius) passes, not radius
                step = min(max(reached, 1), radius - reached)
                towards[step:] |= towards[:-step].copy()
                reached += step
    return grown


def _blend(view, where, colour, opacity):
    """Mixes the colour into the pixels of view [h, w, 3] where `where` [h, w] is true, through a table a channel."""
    levels = np.arange(256, dtype=np.float32)
    for channel, value in enumerate(colour):
        table = (levels + (value - levels) * opacity + 0.5).astype(np.uint8)
        plane = view[:, :, channel]
        np.copyto(plane, table[plane], where=where)


def _draw_box(draw, box, colour, line, height, width):
    """The rectangle's pixels are the ones that the box covers: xyxy in outer-corner coordinates, kept inside the picture."""
    x1, y1 = min(max(round(box[0]), 0), width - 1), min(max(round(box[1]), 0), height - 1)
    x2, y2 = min(max(round(box[2]) - 1, x1), width - 1), min(max(round(box[3]) - 1, y1), height - 1)
    draw.rectangle([x1, y1, x2, y2], outline=colour, width=line)


# ---------------------------------------------------------------------------------------------- tags

def _draw_tags(picture, boxes, names, texts, colours, order):
    """Tags in order of score. One that finds no free place keeps only its score, and then gives way altogether."""
    W, H = picture.size
    font = ImageFont.load_default(font_size(H, W))
    draw = ImageDraw.Draw(picture)
    placed = []
    for i in order:
        if not np.isfinite(boxes[i]).all():
            continue
        short = texts[i].rsplit(" ", 1)[-1] if texts[i] != names[i] else texts[i]
        for text, allowed in ((texts[i], 0.12), (short, 0.25)):
            text, size = _fitted(draw, text, font, W)
            spot, covered = _tag_place(boxes[i], size, placed, H, W)
            if covered <= allowed:
                placed.append(spot)
                _draw_tag(draw, spot, text, font, colours[names[i]])
                break


def _fitted(draw, text, font, width):
    """The text, shortened with an ellipsis where the picture is narrower, and its tag's size [w, h]."""
    pad = _tag_padding(font)
    ascent, descent = font.getmetrics()
    if font.size < 13:
        text = "  ".join(text.rsplit(" ", 1))                 # below 13 pixels the font's hinting closes the gap
    room = width - 2 * pad
    if draw.textlength(text, font=font) > room:
        head, _, tail = text.rpartition(" ")
        while head and draw.textlength(f"{head}… {tail}", font=font) > room:
            head = head[:-1]
        text = f"{head}… {tail}" if head else tail
    return text, (int(np.ceil(draw.textlength(text, font=font))) + 2 * pad, ascent + descent + max(1, pad // 2))


def _tag_padding(font):
    return max(2, round(font.size * 0.3))


def _tag_place(box, size, placed, height, width):
    """The best rectangle for a tag, and the share of it that other tags cover.

    Tried in order: above the box, inside its upper edge, below it, inside its lower edge, each flush left, then right, then
    rows further down and up. All are moved inside the picture first.
    """
    w, h = size
    x1, y1, x2, y2 = box
    rows = [y1 - h, y1, y2, y2 - h] + [y1 + k * (h + 1) for k in (1, 2, 3, 4)] + [y1 - k * (h + 1) for k in (2, 3)]
    best, best_cost = None, np.inf
    for place, top in enumerate(rows):
        for flush, left in enumerate((x1, x2 - w)):
            spot_left = int(min(max(round(left), 0), max(width - w, 0)))
            spot_top = int(min(max(round(top), 0), max(height - h, 0)))
            spot = (spot_left, spot_top, spot_left + w, spot_top + h)
            covered = sum(_intersection(spot, other) for other in placed) / (w * h)
            cost = 20 * covered + place + 0.5 * flush + abs(spot_top - top) / h
            if cost < best_cost:
                best, best_cost, best_covered = spot, cost, covered
    return best, best_covered


def _intersection(a, b):
    return max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)


def with_label(image, text):
    """Returns a copy of the picture with a tag in its upper left corner, dark grey as no class is."""
    picture = Image.fromarray(to_picture(image))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size(picture.height, picture.width))
    text, (width, height) = _fitted(draw, text, font, picture.width)
    _draw_tag(draw, (0, 0, width, height), text, font, LABEL)
    return np.array(picture)


def with_legend(image, label_map, class_names):
    """Returns the picture with a tag for each class on it, in the corner where they hide fewest of its pixels; of one class, none.

    image: uint8 [H, W, 3]. label_map: [H, W] integers, 0 background, 1..K, 255 not judged.
    """
    names = {label: "not judged" if label == 255 else _class_name(label, class_names) for label in np.unique(label_map).tolist() if label}
    if len(class_names) < 2 or not names:
        return image
    picture, colours = Image.fromarray(image), class_colours(class_names)
    W, H = picture.size
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(font_size(H, W))
    tags = [(*_fitted(draw, name, font, W), colours.get(name, NOT_JUDGED)) for name in names.values()]
    width, height = max(size[0] for _, size, _ in tags), sum(size[1] for _, size, _ in tags)
    corners = [(top, left) for top in (0, max(H - height, 0)) for left in (0, max(W - width, 0))]
    top, left = min(corners, key=lambda corner: np.count_nonzero(label_map[corner[0]:corner[0] + height, corner[1]:corner[1] + width]))
    for text, size, colour in tags:
        _draw_tag(draw, (left, top, left + width, top + size[1]), text, font, colour)
        top += size[1]
    return np.array(picture)


def _draw_tag(draw, spot, text, font, colour):
    x1, y1, x2, y2 = spot
    draw.rectangle([x1, y1, x2 - 1, y2 - 1], fill=colour)
    draw.text((x1 + _tag_padding(font), (y1 + y2) / 2), text, font=font, fill=text_colour(colour), anchor="lm")


# ---------------------------------------------------------------------------------------------- several pictures

def grid(images, titles=None, columns=None, cell=None, title=None):
    """Returns one picture with all pictures side by side, each under its title.

    images: list of [H, W, 3] (or anything `to_picture` takes), of any sizes. titles: one string each or None; a long one
    wraps. columns: default near a square. cell: longest side of one picture in pixels, default the largest picture's, at
    most 640 and at least 240 (small pictures are enlarged so that their titles fit). title: over the whole, wrapped too.
    """
    images = [to_picture(image) for image in images]
    if not images:
        raise ValueError("expected at least one picture for the grid, got none")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"expected one title a picture, got {len(titles)} titles for {len(images)} pictures")
    columns = min(columns or int(np.ceil(len(images) ** 0.5)), len(images))
    cell = cell or min(max(max(max(image.shape[:2]) for image in images), 240), 640)
    images = [_scaled_to(image, cell) for image in images]
    gap, font = max(6, cell // 48), ImageFont.load_default(max(12, round(cell / 32)))
    lines = [_wrapped(text or "", font, cell) for text in titles] if titles is not None else [[]] * len(images)
    row_height = sum(font.getmetrics()) + 1
    cell_w = max(image.width for image in images)
    starts = range(0, len(images), columns)
    heights = [max(image.height for image in images[s:s + columns]) for s in starts]
    captions = [max(len(text) for text in lines[s:s + columns]) * row_height for s in starts]
    head, width = ImageFont.load_default(round(font.size * 1.3)), columns * (cell_w + gap) + gap
    head_lines, head_height = _wrapped(title or "", head, width - 2 * gap), sum(head.getmetrics())
    y = gap + (head_height * len(head_lines) + gap if title else 0)
    sheet = Image.new("RGB", (width, y + sum(heights) + sum(captions) + gap * len(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for k, line in enumerate(head_lines):
        draw.text((gap, gap + k * head_height), line, font=head, fill=(20, 20, 20))
    for row, start in enumerate(starts):
        for column, (image, text) in enumerate(zip(images[start:start + columns], lines[start:start + columns])):
            x = gap + column * (cell_w + gap)
            for k, line in enumerate(text):
                draw.text((x, y + captions[row] - (len(text) - k) * row_height), line, font=font, fill=(20, 20, 20))
            sheet.paste(image, (x, y + captions[row]))
        y += captions[row] + heights[row] + gap
    return np.array(sheet)


def _scaled_to(image, longest):
    height, width = image.shape[:2]
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image)
    return picture if size == picture.size else picture.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text, font, width):
    """Lines of at most `width` pixels; a single word that is longer is cut."""
    lines = []
    for paragraph in text.splitlines():
        current = ""
        for word in paragraph.split():
            while font.getlength(word) > width and len(word) > 2:
                word = word[:-2] + "…"
            joined = f"{current} {word}".strip()
            if current and font.getlength(joined) > width:
                lines.append(current)
                joined = word
            current = joined
        lines.append(current)
    return lines


def save_picture(path, image, quality=92):
    """Writes a picture beside its place and renames it there, so that no reader ever sees half a file. Returns the path."""
    path = os.fspath(path)
    kind = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}.get(os.path.splitext(path)[1].lower())
    if kind is None:
        raise ValueError(f"expected a file name that ends in .png or .jpg, got {path!r}")
    picture = Image.fromarray(to_picture(image))
    # PNG (JPEG has no levels): 2 takes a quarter to a third of 6's time for files a seventh larger (two grids of a training run)
    write_beside(path, lambda stream: picture.save(stream, format=kind, quality=quality, subsampling=0, compress_level=2))
    return path


def write_beside(path, write):
    """Calls write(binary stream) on a new file in the same folder, then renames it to `path`; a failure leaves no rest."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, beside = tempfile.mkstemp(prefix=".writing-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def _umask():
    value = os.umask(0)
    os.umask(value)
    return value
