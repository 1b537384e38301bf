"""MATLAB's MAT-file, version 5 (MathWorks, "MAT-File Format", R2023a): numbers, text, cells and structs; compressed or not.

    128 bytes: text, version, "IM" (little endian) or "MI"; then elements {type u32, bytes u32, data padded to 8}. An element of at most
    four bytes is one word {type u16, bytes u16, data 4}. miCOMPRESSED (15) holds one zlib-packed element, miMATRIX (14) a variable.

Sparse matrices, objects and function handles are refused by name; so are version 7.3 files, which are HDF5.
"""
import struct
import zlib

import numpy as np

NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
COMPRESSED, MATRIX, TEXT = 15, 14, {16: "utf-8", 17: "utf-16", 18: "utf-32"}
CELL, STRUCT, CHAR = 1, 2, 4
REFUSED = {3: "an object", 5: "a sparse matrix", 16: "a function handle", 17: "an opaque object"}
LARGEST = 1 << 28                              # bytes that one packed element may unpack to: far over any mask's, and an end to zip bombs


def load(file):
    """{variable: value}: arrays in MATLAB's shape (at least 2-D), structs as dicts (arrays of structs: lists), cells as lists, text as str.

    Raises ValueError naming the file for anything that is no such file, or breaks off.
    """
    with open(file, "rb") as handle:
        content = handle.read()
    if content[:8] == b"\x89HDF\r\n\x1a\n" or content[:10] == b"MATLAB 7.3":
        raise ValueError(f"{file}: a version 7.3 MAT-file (HDF5); expected version 5. In MATLAB: save(name, '-v6')")
    if len(content) < 128 or content[126:128] not in (b"IM", b"MI"):
        raise ValueError(f"{file}: not a version 5 MAT-file (no \"IM\" in its header)")
    order = "<" if content[126:128] == b"IM" else ">"
    variables = {}
    try:
        for kind, data in _elements(content[128:], order):
            if kind == COMPRESSED:
                unpacked = zlib.decompressobj().decompress(data, LARGEST)
                (kind, data), *_ = _elements(unpacked, order)
            if kind == MATRIX:
                name, value = _matrix(data, order)
                variables[name] = value
    except (struct.error, zlib.error, LookupError, ValueError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise ValueError(f"{file}: the MAT-file is damaged, cut short or of a kind that is not read ({error})") from error
    return variables


def segmentation(file):
    """CrackForest's `groundTruth.Segmentation` as uint8 [H, W]; ValueError when the file has none."""
    truth = load(file).get("groundTruth")
    truth = truth[0] if isinstance(truth, list) and truth else truth                  # BSDS keeps a cell of several annotators
    values = truth.get("Segmentation") if isinstance(truth, dict) else None
    if not isinstance(values, np.ndarray) or values.ndim != 2:
        raise ValueError(f"{file}: expected a struct groundTruth with a matrix Segmentation, as in CrackForest")
    if values.min(initial=0) < 0 or values.max(initial=0) > 255:
        raise ValueError(f"{file}: Segmentation has values {values.min()} to {values.max()}; expected region numbers 0..255")
    return np.ascontiguousarray(values).astype(np.uint8)


def _elements(data, order):
    """(type, bytes) of each element; a stream that ends inside one raises ValueError."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:                                                # the small form: size and type share the first word
            kind, size, start, step = kind & 0xffff, kind >> 16, at + 4, 8
        else:
            start, step = at + 8, 8 + (size if kind == COMPRESSED else -(-size // 8) * 8)
        if start + size > len(data):
            raise ValueError(f"an element of {size} bytes at {at} ends after the data")
        yield kind, data[start:start + size]
        at += step


def _matrix(data, order):
    """(name, value) of a miMATRIX element: flags, dimensions, name, then what its class needs."""
    parts = list(_elements(data, order))
    if not parts:
        return "", np.zeros((0, 0))                                   # how an empty field is written
    flags = struct.unpack_from(order + "I", parts[0][1])[0]
    kind, shape = flags & 0xff, tuple(_numbers(*parts[1], order).tolist())
    name = parts[2][1].decode("ascii")
    if kind in REFUSED:
        raise ValueError(f"{name or 'a field'} is {REFUSED[kind]}")
    if kind == CELL:
        return name, [_matrix(part, order)[1] for _, part in parts[3:]]
    if kind == STRUCT:
        return name, _struct(parts[3:], order)
    if kind == CHAR:
        return name, _text(*parts[3], order)
    values = _numbers(*parts[3], order).astype(CLASSES[kind])         # small integers are stored in fewer bytes than their class has
    if flags & 0x800:
        values = values + 1j * _numbers(*parts[4], order)
    return name, values.reshape(shape, order="F")


def _struct(parts, order):
    width = int(_numbers(*parts[0], order)[0])
    names = [parts[1][1][i:i + width].split(b"\0")[0].decode("ascii") for i in range(0, len(parts[1][1]), width)]
    values = [_matrix(data, order)[1] for _, data in parts[2:]]
    items = [dict(zip(names, values[i:i + len(names)])) for i in range(0, len(values), max(1, len(names)))]
    return items[0] if len(items) == 1 else items


def _numbers(kind, data, order):
    return np.frombuffer(data, order + NUMBERS[kind])


def _text(kind, data, order):
    if kind in TEXT:
        return data.decode(TEXT[kind] + ("" if kind == 16 else "-le" if order == "<" else "-be"))
    return "".join(map(chr, _numbers(kind, data, order)))
