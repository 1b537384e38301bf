"""COCO's two files, annotations and detections, as the tables of `metrics/coco.py`; every mistake in them is named.

As pycocotools' loadRes, the first detection decides what a file holds: without a "bbox", boxes are those of the masks; without a
"segmentation", masks are the boxes.
Differs from loadRes: when masks are scored, small / medium / large go by the mask's area even if the file has boxes too (as detectron2
and torchvision do by removing the boxes first); `area_from_boxes=True` is loadRes to the letter.
"""
import json
import os

import numpy as np

from minidamage import masks

EXAMPLE = ('{"image_id": 7, "category_id": 1, "score": 0.9, "bbox": [x, y, width, height] and / or "segmentation": {"size": [h, w], '
           '"counts": "..."}}')


def read_json(file):
    """(content, name for messages) of a JSON file; a list or dict is passed through, so that callers may hold the content already."""
    if isinstance(file, (dict, list)):
        return file, "the given content"
    file = os.fspath(file)
    if not os.path.isfile(file):
        raise ValueError(f"{file}: expected a COCO JSON file, there is none")
    try:
        with open(file, encoding="utf-8-sig") as stream:              # some Windows tools write a byte order mark
            return json.load(stream), file
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, but it breaks off or is something else ({error}); was it written to the end?") from None


def types_in(truth, found):
    """("bbox", "segm") where the first detection and the truth have masks, else boxes alone."""
    first = found[0] if isinstance(found, list) and found else {}
    annotations = truth.get("annotations") if isinstance(truth, dict) else None
    with_masks = bool(first.get("segmentation")) if isinstance(first, dict) else False
    with_masks = with_masks and isinstance(annotations, list) and all(isinstance(a, dict) and a.get("segmentation") for a in annotations)
    return ("bbox", "segm") if with_masks else ("bbox",)


def read_truth(content, name, iou_type):
    """(table, image_ids [I] sorted, categories: dicts sorted by id, annotation ids [n], {image id: image dict}) of a truth file's content.

    iou_type "segm" reads polygons and RLEs as masks, "bbox" the boxes. Raises ValueError with what is wrong.
    """
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in ("images", "annotations", "categories")):
        got = f"a dict with {_listed(list(content)) or 'nothing'}" if isinstance(content, dict) else f"a {type(content).__name__}"
        hint = "; a list is what a detections file holds: swapped --truth and --detections?" if isinstance(content, list) else ""
        raise ValueError(f'{name}: expected COCO ground truth, a dict with the lists "images", "annotations" and "categories", got {got}'
                         f'{hint}')
    if not content["images"]:
        raise ValueError(f"{name}: expected at least one picture in \"images\", got none")
    for key in ("images", "categories"):
        broken = [o for o in content[key] if not isinstance(o, dict) or not _is_id(o.get("id"))]
        if broken:
            raise ValueError(f'{name}: expected every entry of "{key}" to have an "id", got {broken[0]!r:.120}')
        kinds = {type(entry["id"]).__name__ for entry in content[key]}
        if len(kinds) > 1:
            raise ValueError(f'{name}: expected the ids of "{key}" to be of one type, got {" and ".join(sorted(kinds))}')
    images = {image["id"]: image for image in content["images"]}
    categories = sorted(content["categories"], key=lambda c: c["id"])
    known = [c["id"] for c in categories]
    annotations = content["annotations"]
    table = _common(annotations, sorted(images), known, name, "annotation", "annotations")
    table["crowd"] = np.array([bool(a.get("iscrowd", 0)) for a in annotations], np.uint8)                 # COCOeval ignores "ignore" too
    if iou_type == "bbox":
        table["box"] = _boxes(annotations, name, "annotation")
    else:
        table["counts"], table["size"] = _masks(annotations, images, name, "annotation")
    missing_area = any(a.get("area") is None for a in annotations)
    table["area"] = (_areas(table) if missing_area else
                     _numbers([a["area"] for a in annotations], "area", name, "annotation", what="a number of pixels"))
    if not np.isfinite(table["area"]).all():
        row = int(np.flatnonzero(~np.isfinite(table["area"]))[0])
        raise ValueError(f'{name}: expected a number of pixels as "area" of every annotation, got {table["area"][row]} in annotation {row}')
    ids = _numbers([a.get("id", i + 1) for i, a in enumerate(annotations)], "id", name, "annotation", np.int64)
    return table, sorted(images), categories, ids, images


def read_detections(content, name, iou_type, image_ids, categories, images, area_from_boxes=False):
    """The table of a detections file's content (a list of dicts). Raises ValueError with what is wrong."""
    if isinstance(content, dict) and isinstance(content.get("annotations"), list) and not all("score" in a for a in content["annotations"]):
        raise ValueError(f"{name}: expected detections, a list of dicts with scores, got ground truth (a dict with \"annotations\"); "
                         "swapped --truth and --detections?")
    if not isinstance(content, list):
        raise ValueError(f"{name}: expected a list of detections such as [{EXAMPLE}, ...], got a {type(content).__name__}")
    broken = next((d for d in content if not isinstance(d, dict) or not {"image_id", "category_id", "score"} <= d.keys()), None)
    if broken is not None:
        raise ValueError(f"{name}: expected each detection to be like {EXAMPLE}, got {broken!r:.120}")
    table = _common(content, image_ids, [c["id"] for c in categories], name, "detection", "detections")
    table["score"] = _numbers([d["score"] for d in content], "score", name, "detection")
    if not np.isfinite(table["score"]).all():
        row = int(np.flatnonzero(~np.isfinite(table["score"]))[0])
        raise ValueError(f"{name}: detection {row} has score {table['score'][row]}; a score is a finite number")
    with_boxes = bool(content) and bool(content[0].get("bbox"))
    table["area"] = None
    if iou_type == "bbox":
        if with_boxes:
            table["box"] = _boxes(content, name, "detection")
        else:
            counts, size = _masks(content, images, name, "detection")
            corners = masks.to_boxes([{"size": s, "counts": c} for c, s in zip(counts, size)]) if counts else np.zeros((0, 4))
            table["box"] = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
            table["area"] = _areas({"counts": counts, "size": size})
            return table
        table["area"] = table["box"][:, 2] * table["box"][:, 3]
    else:
        if with_boxes and area_from_boxes:
            box = _boxes(content, name, "detection")
            table["area"] = box[:, 2] * box[:, 3]
        table["counts"], table["size"] = _masks(content, images, name, "detection", with_boxes)
    return table


def _common(objects, image_ids, category_ids, name, kind, plural):
    """Image and category positions; ids that are not in the truth are an error that shows both sides."""
    position = {image_id: i for i, image_id in enumerate(image_ids)}
    try:
        image = np.array([position.get(o["image_id"], -1) for o in objects], np.int32)
        category_position = {c: k for k, c in enumerate(category_ids)}
        category = np.array([category_position.get(o["category_id"], -1) for o in objects], np.int32)
    except (KeyError, TypeError):
        keys = ("image_id", "category_id")
        broken = next((o for o in objects if not isinstance(o, dict) or not all(key in o and _is_id(o[key]) for key in keys)), None)
        raise ValueError(f'{name}: expected every {kind} to have "image_id" and "category_id", got {broken!r:.120}') from None
    if (image < 0).any():
        unknown = list(dict.fromkeys(o["image_id"] for o, i in zip(objects, image) if i < 0))
        how_many = "none of them is" if (image < 0).all() else f"{int((image < 0).sum())} of {len(objects)} are not"
        raise ValueError(f"{name}: {plural} of pictures whose id is not in the truth: {_listed(unknown)}; {how_many} among the truth's "
                         f"{len(image_ids)} ids ({_listed(image_ids)}). Detections must carry the ids of the truth file (same number and "
                         "type)")
    if (category < 0).any():
        unknown = sorted({o["category_id"] for o, k in zip(objects, category) if k < 0}, key=str)
        raise ValueError(f"{name}: {plural} of unknown category_id {unknown[:8]}; the truth has {category_ids[:20]}"
                         f"{' ...' if len(category_ids) > 20 else ''}. Labels 1..K must be mapped back to the data set's own ids")
    return {"image": image, "category": category}


def _is_id(value):
    return not isinstance(value, (list, dict, type(None)))


def _numbers(values, key, name, kind, dtype=np.float64, what="a number"):
    """One array of a field's values; ValueError where one is none, or larger than the type holds (JSON has no largest number)."""
    try:
        return np.array(values, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f'{name}: expected {what} as "{key}" of every {kind} ({error})') from None


def _listed(values, most=6):
    return ", ".join(map(repr, values[:most])) + (", ..." if len(values) > most else "")


def _boxes(objects, name, kind):
    try:
        box = np.array([o["bbox"] for o in objects], np.float64).reshape(len(objects), 4)
    except (KeyError, ValueError, TypeError, OverflowError):
        row = next(i for i, o in enumerate(objects) if not _is_box(o.get("bbox")))
        hint = "; it has a segmentation: score masks only (--iou-type segm)" if "segmentation" in objects[row] else ""
        got = objects[row].get("bbox")
        raise ValueError(f'{name}: expected "bbox": [x, y, width, height] in {kind} {row}, got {got!r:.80}{hint}') from None
    if not np.isfinite(box).all() or (box[:, 2:] < 0).any():
        row = int(np.flatnonzero(~np.isfinite(box).all(1) | (box[:, 2:] < 0).any(1))[0])
        raise ValueError(f"{name}: {kind} {row} has box {box[row].tolist()}; expected x, y, width, height, finite, sides >= 0. Is it "
                         "x1, y1, x2, y2?")
    return box


def _is_box(value):
    try:
        return np.shape(np.array(value, np.float64)) == (4,)
    except (ValueError, TypeError, OverflowError):
        return False


def _masks(objects, images, name, kind, or_box=False):
    """(list of counts, size int32 [n, 2]); polygons are filled, RLEs taken as they are."""
    counts, sizes = [], np.zeros((len(objects), 2), np.int32)
    for i, o in enumerate(objects):
        segmentation = o.get("segmentation")
        try:
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], (str, bytes)):
                rle = {"size": segmentation["size"], "counts": segmentation["counts"]}
                rle["counts"] = rle["counts"].encode("ascii", "replace") if isinstance(rle["counts"], str) else rle["counts"]
            else:
                if not segmentation and or_box and "bbox" in o:
                    x, y, w, h = o["bbox"]
                    segmentation = [[x, y, x, y + h, x + w, y + h, x + w, y]]
                image = images[o["image_id"]]
                rle = masks.segmentation_to_rle(segmentation, _side(image, "height"), _side(image, "width"))
            sizes[i] = rle["size"]
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            what = f"picture {o['image_id']} has no {error} in the truth file" if isinstance(error, KeyError) else error
            raise ValueError(f"{name}: {kind} {i} (picture {o['image_id']!r}): {what}") from None
        counts.append(rle["counts"])
    return counts, sizes


def _side(image, key):
    """The picture's height or width, which some exporters write as text."""
    try:
        return int(image[key])
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f'expected a number of pixels as "{key}" of picture {image["id"]!r} in the truth file, got '
                         f"{image[key]!r:.60}") from None


def _areas(table):
    if "box" in table:
        return table["box"][:, 2] * table["box"][:, 3]
    return masks.area([{"size": s, "counts": c} for c, s in zip(table["counts"], table["size"])]).astype(np.float64)
