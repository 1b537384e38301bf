"""The real sets, where MINIDAMAGE_DATA names their folder: counts as their README states them, and no silent loss."""
import json

import numpy as np
import pytest

from data_sets import counts_of
from minidamage.data import DetectionDataset, SegmentationDataset, class_counts, label_map, load_dataset
from minidamage.data import split
from minidamage.data.label_maps import read_seg, read_values


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


def test_yolo_seg(real_data):
    data = load(real_data / "yolo_seg")
    assert data.layout == "yolo" and len(data.parts["all"]) == 24 and sum(len(r.labels) for r in data.parts["all"]) == 156
    assert all("outline crosses itself; kept" in p for p in data.problems) and data.class_names[45] == "class 45"
    first = data.parts["all"][0]
    assert first.labels.tolist() == [46, 46, 51, 46, 50, 50, 50, 50] and all(isinstance(m, list) for m in first.masks)


# ---- label maps -----------------------------------------------------------------------------------------------------------------------

def foreground(record):
    return (label_map(record) == 1).mean()


def test_deepcrack(real_data):
    data = load(real_data / "deepcrack")
    assert data.layout == "mask folders" and {p: len(r) for p, r in data.parts.items()} == {"train": 300, "test": 237}
    assert data.class_names == ("crack",) and data.category_ids == (255,) and not data.problems
    bits = [r for r in data.parts["test"] if read_values(r.label_map.file)[1] == "1-bit"]
    assert len(bits) == 47 and all(foreground(r) > 0.001 for r in bits)
    assert all(r.label_map.counts == counts_of(label_map(r)) for r in bits + data.parts["train"][:40])
    parts = split.three_parts(data)
    assert {p: len(r) for p, r in parts.items()} == {"train": 270, "val": 30, "test": 237}
    assert not {r.group for r in parts["train"]} & {r.group for r in parts["val"]} - {""}


def test_crackforest(real_data):
    data = load(real_data / "cfd")
    assert data.layout == "crackforest" and len(data.parts["all"]) == 118 and not data.problems
    assert any("37 pictures without ground truth" in n for n in data.notes)
    record = next(r for r in data.parts["all"] if r.file.endswith("101.jpg"))
    regions = read_values(record.label_map.file)[0]
    assert (regions > 1).mean() > 0.35 and foreground(record) == pytest.approx(0.0577, abs=1e-3)       # not flooded
    for record in data.parts["all"]:
        runs = read_seg(record.label_map.file.replace("groundTruth", "seg").replace(".mat", ".seg"))
        np.testing.assert_array_equal(label_map(record), np.isin(runs, (1, 3)))
    assert {p: len(r) for p, r in split.three_parts(data).items()} == {"train": 85, "val": 9, "test": 24}


def test_cracks448_and_its_sets(real_data):
    data = load(real_data / "cracks448")
    assert len(data.parts["all"]) == 204 and sum(r.undamaged for r in data.parts["all"]) == 3 and not data.problems
    for name, count in {"CRACK500": 30, "GAPS384": 30, "Rissbilder": 30, "Volker": 30, "cracktree200": 30, "Sylvie": 28, "forest": 18,
                        "Eugen": 8}.items():
        assert len(load(f"{real_data / 'cracks448'}:{name}").parts["all"]) == count
    groups = {r.file.split("/")[-1]: r.group for r in data.parts["all"]}
    assert groups["CRACK500_20160328_153706_1281_1.jpg"] == groups["CRACK500_20160328_153706_1921_1.jpg"] == \
        "photograph CRACK500_20160328_153706"
    assert groups["Eugen_Muller_8980_79_365_456_521.jpg"] != groups["Eugen_Muller_8980a_25_22_747_752.jpg"]
    parts = split.three_parts(data)
    where = {r.file.split("/")[-1]: part for part, records in parts.items() for r in records}
    assert all(where[f"Sylvie_Chambon_{n}.jpg"] == where[f"forest_{n}.jpg"] for n in ("006", "022", "038"))       # the same bytes


def test_own_photographs_with_soft_masks(real_data):
    data = load(real_data / "own_photos_masks")
    assert len(data.parts["all"]) == 9 and data.class_names == ("Severe Damages",) and not data.problems
    assert [r.file.split("/")[-1] for r in data.parts["all"] if r.undamaged] == ["8.jpg"]
    five = next(r for r in data.parts["all"] if r.file.endswith("/5.jpg"))
    assert foreground(five) == pytest.approx(0.4315, abs=1e-3)


@pytest.mark.parametrize("folder, classes", [("car_vehide_layout", 5), ("car_vehide_layout/coco", 8), ("car_via_damage", 1),
                                             ("coco_tiny", 80)])
def test_sets_with_outlines_feed_segmentation(real_data, folder, classes):
    data = load(real_data / folder)
    records = data.parts["train"][:12]
    dataset = SegmentationDataset(records, image_size=320)
    for i, record in enumerate(records):
        labels = label_map(record)
        assert labels.shape == (record.height, record.width) and set(np.unique(labels)) <= {0, *range(1, classes + 1), 255}
        whole = record.area[~record.crowd].sum()
        assert (labels > 0).sum() <= labels.size and ((labels > 0) & (labels < 255)).sum() <= 1.1 * whole + 50
        image, target = dataset[i]
        assert tuple(image.shape) == (3, 320, 320) and tuple(target["label_map"].shape) == (320, 320) and target["replaced"] == ""
        assert abs(((target["label_map"] > 0).float().mean() - (labels > 0).mean())) < 0.01
