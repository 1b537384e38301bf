"""The real sets, where MINIDAMAGE_DATA names their folder: counts as their README states them, and no silent loss."""
import json

import numpy as np
import pytest

from minidamage.data import DetectionDataset, class_counts, load_dataset
from minidamage.data import split


def load(path):
    return load_dataset(path, quiet=True)


def objects(data, part):
    return dict(zip(data.class_names, class_counts(data.parts[part], len(data.class_names)).tolist()))


def test_vehide_layout(real_data):
    data = load(real_data / "car_vehide_layout")
    assert data.layout == "vehide" and {p: len(r) for p, r in data.parts.items()} == {"train": 540, "val": 160}
    assert objects(data, "train") == {"scratch": 501, "missing part": 345, "dent": 240, "broken glass": 71, "broken lamp": 67}
    assert objects(data, "val") == {"scratch": 104, "missing part": 112, "dent": 72, "broken glass": 21, "broken lamp": 18}
    assert [sum(len(r.labels) == 0 for r in data.parts[p]) for p in ("train", "val")] == [47, 12]
    assert all("outline crosses itself; kept" in p for p in data.problems)
    parts = split.three_parts(data)
    assert {p: len(r) for p, r in parts.items()} == {"train": 540, "val": 80, "test": 80}


def test_the_same_photographs_as_coco(real_data):
    data = load(real_data / "car_vehide_layout" / "coco")
    assert data.layout == "coco" and {p: len(r) for p, r in data.parts.items()} == {"train": 540, "val": 160}
    assert data.category_ids == tuple(range(1, 9)) and "car" not in data.class_names and any("0 car" in n for n in data.notes)
    assert sum(objects(data, "train").values()) == 1384 and sum(objects(data, "val").values()) == 381
    same = load(real_data / "car_vehide_layout")
    boxes = {r.file.split("/")[-1]: r.boxes for r in same.parts["val"]}
    for record in data.parts["val"][:40]:                                     # every VehiDE box is one of the COCO boxes, to a pixel
        for box in boxes[record.file.split("/")[-1]]:
            assert np.abs(record.boxes - box).max(1).min() < 1.5


def test_via_2_list_and_missing_pictures(real_data):
    data = load(real_data / "car_via_scratch_dent")
    assert data.layout == "via" and len(data.parts["train"]) == 132 and len(data.parts["val"]) == 8
    lost = [p for p in data.problems if "it is not there" in p]
    gone = sum(int(p.rsplit("(", 1)[1].split()[0]) for p in lost)
    assert len(lost) == 3 and sum(objects(data, "train").values()) + gone == 294


def test_via_1_dict_and_its_two_attribute_keys(real_data):
    data = load(real_data / "car_via_damage")
    assert {p: len(r) for p, r in data.parts.items()} == {"train": 64, "val": 15} and data.class_names == ("damage",)
    assert objects(data, "train") == {"damage": 87} and objects(data, "val") == {"damage": 19}
    assert sum(len(r.labels) == 0 for r in data.parts["train"]) == 13 and "'Class Name' (val)" in data.notes[0]


def test_coco_tiny_crowds_and_gaps(real_data):
    data = load(real_data / "coco_tiny")
    assert {p: len(r) for p, r in data.parts.items()} == {"train": 16, "val": 16} and len(data.class_names) == 80
    assert data.category_ids[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13) and data.category_ids[-1] == 90
    for part, name in (("train", "instances_train2017.json"), ("val", "instances_val2017.json")):
        listed = json.loads((real_data / "coco_tiny/annotations" / name).read_text())["annotations"]
        records = data.parts[part]
        assert sum(len(r.labels) for r in records) == len(listed)
        assert sum(r.crowd.sum() for r in records) == sum(a["iscrowd"] for a in listed)
        ids = {int(i): int(r.labels[k]) for r in records for k, i in enumerate(r.annotation_ids)}
        assert all(data.category_ids[ids[a["id"]] - 1] == a["category_id"] for a in listed)


@pytest.mark.parametrize("folder", ["car_vehide_layout", "car_via_scratch_dent", "car_via_damage", "coco_tiny"])
def test_pictures_and_masks_agree_with_records(real_data, folder):
    data = load(real_data / folder)
    for records in data.parts.values():
        dataset = DetectionDataset(records[:8])
        for i in range(len(dataset)):
            image, target = dataset[i]
            record = records[i]
            assert tuple(image.shape[1:]) == (record.height, record.width) and target["replaced"] == ""
            pixels = target["masks"].sum((1, 2)).numpy()
            large = record.area > 400
            np.testing.assert_allclose(pixels[large], record.area[large], rtol=0.12)
