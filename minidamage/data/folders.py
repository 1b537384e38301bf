"""How the folders of a data set, or of photographs, are gone through, and which part a name says."""
import os

# part: the words that name it
PARTS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "dev"), "test": ("test", "testing")}


def walk(path, onerror=None, depth=None):
    """os.walk from the top, with the folders that links lead to: each real folder once, under its own name rather than a link's, so that
    a link to a folder above ends and a second name for a part doubles nothing. Linked ones come last. depth: the walk ends that
    many folders below `path`; None: nowhere."""
    seen, tops = set(), [path]
    for top in tops:
        for folder, below, names in os.walk(top, onerror=onerror):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            if depth is not None and _steps(folder, path) >= depth:
                below.clear()
            yield folder, below, names                                # the caller may sort `below` and take folders out of it
            tops += [inside for inside in (os.path.join(folder, name) for name in below) if os.path.islink(inside)]


def _steps(folder, path):
    """How many folders below `path` a folder in it lies."""
    relative = os.path.relpath(folder, path)
    return 0 if relative == os.curdir else relative.count(os.sep) + 1


def part_of(name):
    """"train", "val" or "test" for a folder or file name that says so, else None."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    return next((part for part, known in PARTS.items() if any(w in known for w in words)), None)
