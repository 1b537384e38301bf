"""How the folders of a data set, or of photographs, are gone through."""
import os


def walk(path, onerror=None, depth=None):
    """os.walk from the top, with the folders that links lead to: each real folder once, under its own name rather than a link's, so that
    a link to a folder above ends and a second name for a part doubles nothing. Linked ones come last. depth: folders farther below
    `path` than so many are left out; None: none is."""
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
