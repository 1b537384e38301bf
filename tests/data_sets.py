"""Small data sets that the data tests write into tmp_path: one function a layout."""
import json

import numpy as np
from PIL import Image


def picture(path, width=64, height=48, seed=0, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path, **save)
    return path


def counts_of(labels):
    """((label, pixels), ...) of a label map, background and "not judged" left out: what LabelMapFile.counts holds."""
    values, pixels = np.unique(labels, return_counts=True)
    return tuple((int(value), int(n)) for value, n in zip(values, pixels) if 0 < value < 255)


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def vehide_set(root, regions, val=None, name="a.jpg"):
    """VehiDE with one training picture a.jpg holding `regions` [(class, xs, ys)] and one undamaged validation picture b.jpg."""
    entry = lambda n, rs: {"name": n, "regions": [{"all_x": x, "all_y": y, "class": c} for c, x, y in rs]}
    picture(root / "image/image" / name, seed=1)
    picture(root / "validation/validation/b.jpg", seed=2)
    dump(root / "0Train_via_annos.json", {name: entry(name, regions)})
    dump(root / "0Val_via_annos.json", {"b.jpg": entry("b.jpg", val or [])})
    return root


def via_region(shape, key="class", value="dent", **values):
    return {"shape_attributes": {"name": shape, **values}, "region_attributes": {key: value} if key else {}}


SQUARE = {"all_points_x": [10, 20, 20, 10], "all_points_y": [10, 10, 20, 20]}


def via_set(folder, regions, project=False, file="via.json", name="a.png"):
    picture(folder / name, seed=3)
    entries = {name + "123": {"filename": name, "size": 123, "regions": regions, "file_attributes": {}}}
    return dump(folder / file, {"_via_settings": {}, "_via_img_metadata": entries, "_via_attributes": {}} if project else entries)


def coco_content(annotations, categories=((1, "dent"), (2, "scratch")), images=((7, "a.jpg", 64, 48),)):
    return {"images": [{"id": i, "file_name": f, "width": w, "height": h} for i, f, w, h in images],
            "annotations": [{"id": 100 + k, "iscrowd": 0, "image_id": 7, "category_id": 1, **a} for k, a in enumerate(annotations)],
            "categories": [{"id": c[0], "name": c[1], "supercategory": c[2] if len(c) > 2 else "none"} for c in categories]}


def coco_set(root, annotations, **kwargs):
    content = coco_content(annotations, **kwargs)
    for image in content["images"]:
        picture(root / image["file_name"], seed=image["id"])
    dump(root / "annotations.json", content)
    return root
