"""Picture files: their size from the header alone, and their pixels as 8-bit RGB whatever the file holds.

Cameras store a photograph as the sensor saw it and the rotation as an EXIF tag. Every size and every pixel that leaves this
file has that rotation applied, so that records, boxes and pictures agree.
"""
import os
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif", ".mpo")
ORIENTATION_TAG = 0x0112
# What each EXIF orientation asks for (JEITA CP-3451, tag 274); 5..8 exchange width and height.
TURN = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90}
# Pillow refuses "decompression bombs" above 179 million pixels with its own error; panoramas up to that size are fine here.
READ_ERRORS = (OSError, SyntaxError, ValueError, EOFError, ZeroDivisionError, IndexError, TypeError, KeyError,
               MemoryError, Image.DecompressionBombError)


def is_picture_name(name):
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith(".")


def picture_header(path):
    """Reads the header only: (width, height after the EXIF rotation, orientation 1..8).

    Raises ValueError naming the file when it is missing, empty or no picture. Truncated pixel data is not seen here.
    """
    with open_picture(path) as image:
        turn = orientation(image)
        width, height = image.size
    return (height, width, turn) if turn >= 5 else (width, height, turn)


def read_image(path, max_side=None):
    """The picture as uint8 [H, W, 3] RGB, EXIF rotation applied; 1-bit, palette, grey, 16-bit, alpha, CMYK are converted.

    max_side: None, or the longest side in pixels above which the picture is reduced (JPEG decodes straight to a smaller
    size, which is several times faster on 12-megapixel photographs).
    Transparent pixels are laid over black, as every JPEG converter does. 16-bit pictures are scaled by their own type's
    range (65535), not by their brightest pixel, so that two pictures of one series keep their relation.
    Raises ValueError naming the file, and what is wrong, for a missing, truncated or non-image file.
    """
    with open_picture(path) as image:
        turn = orientation(image)
        try:
            if max_side and max(image.size) > max_side:
                image.draft(None, _fit(image.size, max_side))              # JPEG only: DCT scaling, never below the target
            image.load()
        except READ_ERRORS as error:
            raise ValueError(f"{path}: the picture is damaged or cut short ({_first_line(error)}); "
                             "copy it again or take it out of the data set") from error
        rgb = to_rgb(image)
    if max_side and max(rgb.size) > max_side:
        rgb = rgb.resize(_fit(rgb.size, max_side), Image.Resampling.BOX)
    if turn in TURN:
        rgb = rgb.transpose(TURN[turn])
    return np.array(rgb)


def _fit(size, max_side):
    scale = max_side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def open_picture(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")            # Pillow's notes on odd EXIF blocks and large pictures
            return Image.open(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise ValueError(f"{path}: {_why_no_picture(path)}") from None
    except READ_ERRORS as error:
        raise ValueError(f"{path}: cannot be read as a picture ({_first_line(error)})") from error


def _why_no_picture(path):
    if os.path.getsize(path) == 0:
        return "the file is empty (0 bytes)"
    with open(path, "rb") as handle:
        head = handle.read(16)
    if head[4:8] == b"ftyp" and head[8:11] in (b"hei", b"hev", b"mif", b"avi"):
        return "HEIC/AVIF picture; save it as JPEG or PNG first"
    return "not a picture that Pillow knows"


def orientation(image):
    """EXIF orientation 1..8 from the header. PNG's own getexif would decode the pixels, hence the base class's; Pillow
    turns TIFF by itself."""
    if image.format == "TIFF":
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            turn = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)
    except READ_ERRORS:
        return 1
    return turn if turn in TURN else 1


def to_rgb(image):
    mode = image.mode
    if mode in ("I", "I;16", "I;16B", "I;16L", "I;16N", "F"):
        values = np.asarray(image).astype(np.float64)
        brightest = values.max(initial=0)                 # I and F, 32 bits a pixel, have no range of their own
        top = 65535.0 if mode.startswith("I;16") or brightest > 255 else 1.0 if mode == "F" and brightest <= 1.0 else 255.0
        grey = Image.fromarray(np.clip(np.rint(np.nan_to_num(values) * (255.0 / top)), 0, 255).astype(np.uint8))
        return grey.convert("RGB")
    if "transparency" in image.info and mode in ("P", "RGB", "L", "1") or mode in ("LA", "La", "PA", "RGBa"):
        image = image.convert("RGBA")
    if image.mode == "RGBA":
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


