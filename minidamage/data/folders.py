"""What the path of a data set says, how its folders, or those of photographs, are gone through, and which part a name says."""
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


def selection(path):
    """("PATH", ["NAME", ...]) of "PATH:NAME,NAME"; ("PATH", []) of a path as it stands."""
    folder, colon, names = path.rpartition(":")
    return (folder, [n for n in names.split(",") if n]) if colon and not os.path.exists(path) and os.path.exists(folder) else (path, [])


def root_of(path):
    """The folder of the data set that `path` names: itself, that of an annotation file, PATH of PATH:NAME."""
    place, _ = selection(path)
    return place if os.path.isdir(place) else os.path.dirname(place) or "."


def part_of(name):
    """"train", "val" or "test" for a folder or file name that says so, else None."""
    words = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    return next((part for part, known in PARTS.items() if any(w in known for w in words)), None)
