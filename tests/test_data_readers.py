"""Every layout gives the same record; every bad object is one counted line and never an exception later on."""
import json
import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

from data_sets import SQUARE, coco_content, coco_set, dump, picture, vehide_set, via_region, via_set
from minidamage import masks
from minidamage.data import load_dataset, summary
from minidamage.data.objects import PictureFinder


def load(path, **kwargs):
    return load_dataset(path, quiet=True, **kwargs)


# ---- VehiDE -----------------------------------------------------------------------------------------------------------------------

def test_vehide_record(tmp_path):
    vehide_set(tmp_path, [("tray_son", [10, 30, 30, 10], [5, 5, 25, 25]), ("mop_lom", [1.5, 9, 4], [2, 2, 8])])
    data = load(tmp_path)
    assert data.layout == "vehide" and data.class_names == ("dent", "scratch") and data.category_ids == (1, 2) and not data.problems
    record, = data.parts["train"]
    assert (record.width, record.height, record.labels.tolist()) == (64, 48, [2, 1])
    np.testing.assert_allclose(record.boxes, [[10, 5, 30, 25], [1.5, 2, 9, 8]])
    np.testing.assert_allclose(record.area, [400, 22.5])
    assert record.boxes.dtype == np.float32 and record.labels.dtype == np.int64 and not record.crowd.any()
    undamaged, = data.parts["val"]
    assert undamaged.boxes.shape == (0, 4) and undamaged.masks == [] and undamaged.image_id != record.image_id
    assert "scratch" in summary(data) and "1 without objects" in summary(data)


def test_vehide_names_in_any_case_but_never_unknown(tmp_path):
    vehide_set(tmp_path, [("Tray_Son", [1, 9, 9], [1, 1, 9]), ("MOP LOM", [1, 9, 9], [1, 1, 9]), ("Broken glass", [1, 9, 9], [1, 1, 9])])
    assert load(tmp_path).class_names == ("dent", "scratch", "broken glass")
    vehide_set(tmp_path / "bad", [("mop", [1, 9, 9], [1, 1, 9])])
    with pytest.raises(ValueError, match=r"unknown VehiDE class: 'mop' \(1 regions.*did you mean 'mop_lom'.*Known: .*tray_son \(scratch\)"):
        load(tmp_path / "bad")


def test_vehide_times_group_vehicles_and_thumbnails(tmp_path):
    names = ["01022020_101500image1.jpg", "Thumbnail01022020_101540image2.jpg", "20200201_101630image3.jpg", "01022020_120000image4.jpg",
             "99992020_101500image5.jpg"]
    for i, name in enumerate(names):
        picture(tmp_path / "image/image" / name, seed=i)
    dump(tmp_path / "0Train_via_annos.json", {n: {"name": n, "regions": []} for n in names})
    groups = [r.group for r in load(tmp_path).parts["train"]]
    assert groups[0] == groups[1] == groups[2] != "" and groups[3] not in ("", groups[0]) and groups[4] == ""


def test_vehide_without_inner_folder_and_missing_picture(tmp_path):
    vehide_set(tmp_path, [("tray_son", [1, 9, 9], [1, 1, 9])])
    (tmp_path / "image/image/a.jpg").rename(tmp_path / "image/A.JPG")
    (tmp_path / "validation/validation/b.jpg").unlink()
    data = load(tmp_path)
    assert len(data.parts["train"]) == 1 and data.parts["val"] == []
    assert data.problems == ["b.jpg: the annotation file names it but it is not there; picture left out (0 objects)"]


# ---- bad objects, whatever the layout -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("xs, ys, said", [
    ([5, 9], [5, 9], "polygon with 2 points"),
    ([5, 9, 13], [5, 9, 13], "polygon without area"),
    ([100, 120, 120], [5, 5, 15], "lies outside the 64x48 picture"),
    ([5, 9, float("nan")], [5, 9, 1], "no numbers"),
    ([5, 9, 9], [5, 9], "3 x for 2 y coordinates"),
])
def test_unusable_outlines_are_dropped_and_said(tmp_path, xs, ys, said):
    data = load(vehide_set(tmp_path, [("tray_son", xs, ys), ("tray_son", [1, 9, 9], [1, 1, 9])]))
    assert len(data.parts["train"][0].labels) == 1
    assert any(said in p and p.startswith("a.jpg, annotation 1: ") for p in data.problems), data.problems


def test_outlines_that_leave_the_picture_are_clipped(tmp_path):
    data = load(vehide_set(tmp_path, [("tray_son", [50, 80, 80, 50], [-10, -10, 20, 20])]))
    record, = data.parts["train"]
    np.testing.assert_allclose(record.boxes, [[50, 0, 64, 20]])
    assert record.area[0] == 14 * 20 and "leaves the picture by 16.0 px; clipped" in data.problems[0]
    mask = masks.decode(masks.from_polygons(record.masks[0], 48, 64))
    assert mask.sum() == 14 * 20


def test_self_crossing_outline_is_kept_and_said(tmp_path):
    data = load(vehide_set(tmp_path, [("tray_son", [10, 30, 30, 10], [10, 30, 10, 30])]))           # a bow tie: signed area 0
    assert len(data.parts["train"][0].labels) == 1
    assert data.problems == ["a.jpg, annotation 1: outline crosses itself; kept, filled even-odd"]


def test_touching_corners_are_no_crossing(tmp_path):
    data = load(vehide_set(tmp_path, [("tray_son", [10, 30, 30, 10, 10, 10], [10, 10, 30, 30, 10, 10])]))
    assert data.problems == []


@pytest.mark.parametrize("content, said", [(b"", "empty (0 bytes)"), (b"no picture at all", "not a picture"),
                                           (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC")])
def test_files_that_are_no_pictures_are_left_out(tmp_path, content, said):
    vehide_set(tmp_path, [("tray_son", [1, 9, 9], [1, 1, 9])])
    (tmp_path / "image/image/a.jpg").write_bytes(content)
    data = load(tmp_path)
    assert data.parts["train"] == [] and said in data.problems[0] and "picture left out" in data.problems[0]


def test_empty_unknown_and_broken_sets(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no known annotation layout.*Known: VehiDE"):
        load(tmp_path)
    dump(tmp_path / "0Train_via_annos.json", {})
    with pytest.raises(ValueError, match="data set is empty"):
        load(tmp_path)
    (tmp_path / "0Train_via_annos.json").write_text("{\"a.jpg\": {")
    with pytest.raises(ValueError, match="not valid JSON.*cut short"):
        load(tmp_path)
    (tmp_path / "0Train_via_annos.json").write_bytes(b'{"a\xff.jpg": {}}')
    with pytest.raises(ValueError, match="0Train_via_annos.json: not valid JSON"):
        load(tmp_path)
    dump(tmp_path / "0Train_via_annos.json", {"a.jpg": {"regions": []}, "b.jpg": 5})
    with pytest.raises(ValueError, match="0Train_via_annos.json: b.jpg: expected .*'regions'.* got 5"):
        load(tmp_path)


JUNK = [None, "x", -1, 1e9, float("nan"), [], {}, [None], "12", True, [[]], {"a": 1}, 0, [1, 2, 3]]


def places(content, path=()):
    yield path
    for key in content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ():
        yield from places(content[key], path + (key,))


@pytest.mark.parametrize("layout", ["vehide", "via", "coco"])
def test_any_value_of_a_file_may_be_junk(tmp_path, layout):
    """Every value in turn becomes every kind of junk: the set loads, with the loss counted, or a ValueError says why not."""
    if layout == "vehide":
        file = vehide_set(tmp_path, [("tray_son", [1, 9, 9], [1, 1, 9])]) / "0Train_via_annos.json"
    elif layout == "via":
        file = via_set(tmp_path, [via_region("polygon", **SQUARE), via_region("circle", cx=10, cy=10, r=4)])
    else:
        crowd = {"segmentation": {"size": [48, 64], "counts": [5, 48 * 64 - 5]}, "iscrowd": 1}
        file = coco_set(tmp_path, [BOX, crowd]) / "annotations.json"
    text = file.read_text()
    for path in list(places(json.loads(text)))[1:]:
        for junk in JUNK:
            content = json.loads(text)
            parent = content
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = junk
            file.write_text(json.dumps(content))
            try:
                data = load(tmp_path)
            except ValueError:
                continue
            assert all(np.isfinite(r.boxes).all() and (r.boxes[:, 2:] > r.boxes[:, :2]).all() for p in data.parts.values() for r in p)


def test_the_summary_gathers_problems_by_kind(tmp_path):
    outside = [("tray_son", [50 + i, 80, 80], [1, 1, 20]) for i in range(5)]
    text = summary(load(vehide_set(tmp_path, outside)))
    assert "5 problems:" in text and "5 x polygon leaves the picture by # px; clipped" in text and "first: a.jpg, annotation 1: " in text


def test_unlisted_pictures_are_not_called_undamaged(tmp_path):
    vehide_set(tmp_path, [("tray_son", [1, 9, 9], [1, 1, 9])])
    picture(tmp_path / "image/image/extra.jpg", seed=9)
    data = load(tmp_path)
    assert len(data.parts["train"]) == 1 and any("1 pictures" in n and "not known to be undamaged" in n for n in data.notes)


def test_labels_follow_a_models_class_list(tmp_path):
    vehide_set(tmp_path, [("tray_son", [1, 9, 9], [1, 1, 9])])
    data = load(tmp_path, class_names=("broken glass", "scratch", "dent"))
    assert data.class_names == ("broken glass", "scratch", "dent") and data.parts["train"][0].labels.tolist() == [2]
    assert data.category_ids[1] == 2 and len(set(data.category_ids)) == 3
    with pytest.raises(ValueError, match="'scratch', which the model does not know; it knows dent"):
        load(tmp_path, class_names=("dent",))


# ---- VIA ------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("as_dict", [False, True])
def test_via_regions_as_list_or_dict_and_projects(tmp_path, project, as_dict):
    regions = [via_region("polygon", **SQUARE), via_region("polygon", value="scratch", **SQUARE)]
    via_set(tmp_path, {str(i): r for i, r in enumerate(regions)} if as_dict else regions, project)
    data = load(tmp_path)
    assert data.layout == "via" and data.class_names == ("dent", "scratch") and list(data.parts) == ["all"]
    np.testing.assert_allclose(data.parts["all"][0].boxes, [[10, 10, 20, 20]] * 2)


@pytest.mark.parametrize("shape, values, box, area", [
    ("polygon", SQUARE, [10, 10, 20, 20], 100),
    ("polyline", SQUARE, [10, 10, 20, 20], 100),
    ("rect", dict(x=3, y=4, width=10, height=6), [3, 4, 13, 10], 60),
    ("circle", dict(cx=30, cy=20, r=8), [22, 12, 38, 28], np.pi * 64),
    ("ellipse", dict(cx=30, cy=20, rx=10, ry=5), [20, 15, 40, 25], np.pi * 50),
    ("ellipse", dict(cx=30, cy=20, rx=10, ry=5, theta=np.pi / 2), [25, 10, 35, 30], np.pi * 50),
])
def test_via_shapes(tmp_path, shape, values, box, area):
    via_set(tmp_path, [via_region(shape, **values)])
    record, = load(tmp_path).parts["all"]
    np.testing.assert_allclose(record.boxes[0], box, atol=0.02)
    assert record.area[0] == pytest.approx(area, rel=0.01)


def test_via_points_and_unknown_shapes_are_counted(tmp_path):
    via_set(tmp_path, [via_region("point", cx=3, cy=4), via_region("spline", x=1), via_region("rect", x=1, y=2, width=3),
                       via_region("rect", **dict(x=3, y=4, width=0, height=6)), via_region("polygon", **SQUARE)])
    data = load(tmp_path)
    assert len(data.parts["all"][0].labels) == 1 and len(data.problems) == 5                # the flat rectangle says two things
    for said in ("a point has no area", "unknown shape 'spline'", "rect without 'height'", "polygon without area"):
        assert any(said in p for p in data.problems), said


@pytest.mark.parametrize("key", ["name", "class", "Class Name", "damage-type", "anything"])
def test_via_class_attribute_is_detected_and_said(tmp_path, key):
    regions = [via_region("polygon", key, "dent", **SQUARE)]
    regions[0]["region_attributes"]["remark"] = ""
    via_set(tmp_path, regions)
    data = load(tmp_path)
    assert data.class_names == ("dent",) and repr(key) in data.notes[0]


def test_via_attribute_of_each_part_and_classes_joined(tmp_path):
    via_set(tmp_path / "train", {"0": via_region("polygon", "name", "Dent", **SQUARE)})
    via_set(tmp_path / "val", [via_region("polygon", "Class Name", name, **SQUARE) for name in ("dent", "hail")])
    picture(tmp_path / "test/c.jpg")
    data = load(tmp_path)
    assert set(data.parts) == {"train", "val"} and data.class_names == ("Dent", "hail")
    assert any("'Dent', 'dent' are one class" in n for n in data.notes)
    assert any("'hail' occurs in val but not in train" in n for n in data.notes)
    assert any("1 pictures in" in n and "no annotation file" in n for n in data.notes)
    ids = [i for records in data.parts.values() for r in records for i in r.annotation_ids]
    assert len(set(ids)) == 3


def test_via_without_attributes_checkboxes_and_forced_key(tmp_path):
    via_set(tmp_path / "a", [via_region("polygon", None, **SQUARE)])
    assert load(tmp_path / "a").class_names == ("object",)
    via_set(tmp_path / "b", [via_region("polygon", "kind", {"dent": True, "rust": False}, **SQUARE),
                             via_region("polygon", "kind", {"dent": True, "rust": True}, **SQUARE)])
    data = load(tmp_path / "b")
    assert data.class_names == ("dent",) and "no single class in attribute 'kind'; dropped" in data.problems[0]
    regions = [via_region("polygon", "name", "left door", **SQUARE)]
    regions[0]["region_attributes"]["fault"] = "rust"
    via_set(tmp_path / "c", regions)
    assert load(tmp_path / "c", attribute="fault").class_names == ("rust",)
    with pytest.raises(ValueError, match="no region has an attribute 'colour'; the regions have 'fault', 'name'"):
        load(tmp_path / "c", attribute="colour")


def test_via_listed_twice_and_via3(tmp_path):
    picture(tmp_path / "a.png")
    entry = {"filename": "a.png", "size": 1, "regions": [via_region("polygon", **SQUARE)]}
    dump(tmp_path / "via.json", {"a.png1": entry, "a.png2": entry})
    data = load(tmp_path)
    assert len(data.parts["all"]) == 1 and len(data.parts["all"][0].labels) == 2 and "listed twice" in data.problems[0]
    dump(tmp_path / "three" / "p.json", {"project": {"pid": "x"}, "metadata": {}, "file": {}})
    with pytest.raises(ValueError, match="VIA 3 project"):
        load(tmp_path / "three")


# ---- COCO -----------------------------------------------------------------------------------------------------------------------------

BOX = {"bbox": [10, 5, 20, 20], "area": 400, "segmentation": [[10, 5, 30, 5, 30, 25, 10, 25]]}


def test_coco_polygons_parts_and_gaps_in_ids(tmp_path):
    coco_set(tmp_path, [BOX, {**BOX, "category_id": 90, "segmentation": [[1, 1, 9, 1, 9, 9], [20, 20, 30, 20, 30, 30]]}],
             categories=((3, "dent"), (90, "scratch"), (1, "rust")))
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["annotations"][0]["category_id"] = 3
    dump(tmp_path / "annotations.json", content)
    data = load(tmp_path)
    assert data.layout == "coco" and data.category_ids == (1, 3, 90) and data.class_names == ("rust", "dent", "scratch")
    record, = data.parts["all"]
    assert record.image_id == 7 and record.labels.tolist() == [2, 3] and record.annotation_ids.tolist() == [100, 101]
    assert len(record.masks[1]) == 2 and record.area.tolist() == [400, 400]
    assert any("rust" in n for n in data.notes)


def test_coco_rle_compressed_uncompressed_and_crowd(tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[5:15, 8:20] = 1
    rle = masks.encode(mask)
    runs = [8 * 48 + 5] + [10, 38] * 11 + [10, 33 + 44 * 48 - 0]
    runs[-1] = 48 * 64 - sum(runs[:-1])
    compressed = {"size": [48, 64], "counts": rle["counts"].decode()}
    coco_set(tmp_path, [{"segmentation": compressed, "bbox": [8, 5, 12, 10], "area": 120},
                        {"segmentation": {"size": [48, 64], "counts": runs}, "iscrowd": 1}])
    record, = load(tmp_path).parts["all"]
    assert record.crowd.tolist() == [False, True] and record.area.tolist() == [120, 120]
    np.testing.assert_allclose(record.boxes, [[8, 5, 20, 15]] * 2)
    for stored in record.masks:
        np.testing.assert_array_equal(masks.decode(stored), mask)


@pytest.mark.parametrize("annotation, said", [
    ({"segmentation": {"size": [64, 48], "counts": [64 * 48]}, "bbox": [1, 1, 5, 5]}, "RLE of size"),
    ({"segmentation": {"size": [48, 64], "counts": [5, 5]}, "bbox": [1, 1, 5, 5]}, "RLE cannot be read"),
    ({"bbox": [10, 5, 0, 20]}, "has no size"),
    ({"bbox": [10, 5, -4, 20]}, "has no size"),
    ({"bbox": [100, 5, 10, 20]}, "lies outside"),
    ({"bbox": [1, 2, 3]}, "is not [x, y, width, height]"),
    ({}, "neither box nor outline"),
    ({"segmentation": [[1, 1, 9, 1, 9]]}, "odd number"),
    ({"segmentation": [[1, 1, 9, 9]]}, "polygon with 2 points"),
    ({"segmentation": [[1, 1, 9, 9]], "bbox": [1, 1, 0, 5]}, "has no size"),
])
def test_coco_bad_objects_are_dropped_with_their_id(tmp_path, annotation, said):
    data = load(coco_set(tmp_path, [annotation, BOX]))
    assert data.parts["all"][0].annotation_ids.tolist() == [101]
    assert any(p.startswith("a.jpg, annotation 100: ") and said in p for p in data.problems), data.problems


@pytest.mark.parametrize("change, said", [
    ({"bbox": [0, 0, 0, 0]}, "box [0, 0, 0, 0] has no size; taken from its outline"),
    ({"bbox": [20, 15, -12, -10]}, "has no size; taken from its outline"),
    ({"bbox": [float("nan"), 5, 12, 10]}, "has no size; taken from its outline"),
    ({"area": "x"}, "area 'x' is no number of pixels; taken from its outline"),
    ({"area": float("nan")}, "area nan is no number of pixels"),
])
def test_coco_objects_with_a_sound_outline_survive_a_broken_box_or_area(tmp_path, change, said):
    outline = {"segmentation": [[8, 5, 20, 5, 20, 15, 8, 15]], "bbox": [8, 5, 12, 10], "area": 120}
    data = load(coco_set(tmp_path, [{**outline, **change}]))
    record, = data.parts["all"]
    assert record.boxes.tolist() == [[8, 5, 20, 15]] and record.area.tolist() == [120]
    assert len(data.problems) == 1 and said in data.problems[0]


def test_coco_boxes_outside_are_clipped_and_box_only_objects_kept(tmp_path):
    data = load(coco_set(tmp_path, [{"bbox": [50, -5, 30, 20]}]))
    record, = data.parts["all"]
    np.testing.assert_allclose(record.boxes, [[50, 0, 64, 15]])
    assert record.masks == [None] and record.area[0] == 14 * 15 and "clipped" in data.problems[0]


def test_coco_unknown_category_and_label_0(tmp_path):
    coco_set(tmp_path, [{**BOX, "category_id": 0}])
    with pytest.raises(ValueError, match=r"annotation 100 has category_id 0.*background.*Known: 1 dent, 2 scratch"):
        load(tmp_path)


def test_coco_category_0_is_a_class_when_it_has_objects(tmp_path):
    coco_set(tmp_path, [{**BOX, "category_id": 0}], categories=((0, "dent"), (1, "scratch")))
    data = load(tmp_path)
    assert data.category_ids == (0, 1) and data.parts["all"][0].labels.tolist() == [1]


@pytest.mark.parametrize("parent", ["damage", "dent"])
def test_roboflow_parent_category_is_left_out(tmp_path, parent):
    categories = ((0, parent, "none"), (1, "dent", parent), (2, "scratch", parent))
    for part in ("train", "valid"):
        picture(tmp_path / part / "a.jpg")
        dump(tmp_path / part / "_annotations.coco.json", coco_content([BOX], categories=categories))
    data = load(tmp_path)
    assert set(data.parts) == {"train", "val"} and data.class_names == ("dent", "scratch") and data.category_ids == (1, 2)
    assert data.parts["train"][0].labels.tolist() == [1] and any("0 " + parent in n for n in data.notes)


def test_coco_categories_join_by_name_across_parts(tmp_path):
    for part, categories, used in (("train", ((1, "dent"), (2, "scratch")), 2), ("val", ((5, "Scratch"), (9, "dent")), 5)):
        picture(tmp_path / f"{part}2017" / "a.jpg")
        dump(tmp_path / "annotations" / f"instances_{part}2017.json", coco_content([{**BOX, "category_id": used}], categories=categories))
    dump(tmp_path / "annotations" / "captions_train2017.json", {"images": [], "annotations": []})
    data = load(tmp_path)
    assert data.class_names == ("dent", "scratch") and [data.parts[p][0].labels.tolist() for p in ("train", "val")] == [[2], [2]]
    assert data.parts["val"][0].file.endswith("val2017/a.jpg") and any("joined by name" in n for n in data.notes)


def test_coco_sides_in_text_and_numbers_beyond_a_float(tmp_path):
    root = coco_set(tmp_path, [{"bbox": [5, 5, 20, 20]}, {"bbox": [1.5, 5, 10 ** 400, 20]}, {"bbox": [5, 5, 20, 20], "area": 10 ** 400}])
    content = json.loads((root / "annotations.json").read_text())
    content["images"][0].update(width="64", height=48.0)
    dump(root / "annotations.json", content)
    data = load_dataset(root, quiet=True)
    assert len(data.parts["all"][0].labels) == 1 and len(data.problems) == 2 and all("too large" in line for line in data.problems)


def test_coco_files_beside_the_picture_folders(tmp_path):
    picture(tmp_path / "pics/one/a.jpg")
    picture(tmp_path / "validation/validation/a.jpg", seed=5)
    dump(tmp_path / "coco/train.json", coco_content([BOX], images=((7, "a.jpg", 64, 48),)))
    with pytest.raises(ValueError, match="data set is empty"):                             # two files of that name: neither is guessed
        load(tmp_path / "coco")
    (tmp_path / "validation/validation/a.jpg").unlink()
    assert load(tmp_path / "coco").parts["train"][0].file.endswith("pics/one/a.jpg")
    assert load(tmp_path / "coco/train.json", images=tmp_path / "pics/one").parts["all"]


def test_coco_orphans_double_ids_and_wrong_sizes(tmp_path):
    coco_set(tmp_path, [BOX, {**BOX, "image_id": 99}], images=((7, "a.jpg", 64, 48), (7, "b.jpg", 64, 48), (8, "c.jpg", 128, 96)))
    data = load(tmp_path)
    assert len(data.parts["all"]) == 1
    for said in ("given twice", "a picture that is not listed", "says 128x96, the picture is 64x48"):
        assert any(said in p for p in data.problems), (said, data.problems)


@pytest.mark.parametrize("outline", [[[]], [[1, 2, 3]], [[10, 5, 30, 25]], [[5, 5, 5, 5, 5, 5]], []])
def test_coco_a_box_without_a_usable_outline_is_kept(tmp_path, outline):
    data = load(coco_set(tmp_path, [BOX, {**BOX, "segmentation": outline}]))
    [record] = data.parts["all"]
    assert record.boxes.tolist() == [[10, 5, 30, 25]] * 2 and record.masks[1] is None and record.area.tolist() == [400, 400]
    assert not outline or any("annotation 101" in problem and "outline" in problem for problem in data.problems)


def test_coco_paths_written_on_windows(tmp_path):
    coco_set(tmp_path, [BOX, {**BOX, "image_id": 8}], images=((7, "a/1.jpg", 64, 48), (8, "b/1.jpg", 64, 48)))
    file = tmp_path / "annotations.json"
    file.write_text(file.read_text().replace("/1.jpg", "\\\\1.jpg"))
    assert [r.file[-7:] for r in load(tmp_path).parts["all"]] == ["a/1.jpg", "b/1.jpg"]


def test_coco_pictures_that_another_part_lists_are_not_left_out(tmp_path):
    for seed, name in enumerate("abcde"):
        picture(tmp_path / f"images/{name}.jpg", seed=seed)
    for part, names in (("train", "ab"), ("val", "c"), ("test", "d")):
        images = tuple((k, f"{name}.jpg", 64, 48) for k, name in enumerate(names, 7))
        dump(tmp_path / f"annotations/instances_{part}.json", coco_content([BOX], images=images))
    assert [note for note in load(tmp_path).notes if "left out" in note] == [
        f"1 pictures in {tmp_path}/images are not in instances_train.json, instances_val.json, instances_test.json: left out"]


def test_coco_ids_of_mixed_types_are_one(tmp_path):
    """1, 1.0 and "1" are one id; an id beyond 64 bits is counted anew; "0" is no crowd."""
    coco_set(tmp_path, [{**BOX, "iscrowd": "0"}, {**BOX, "iscrowd": "1"}, BOX])
    content = json.loads((tmp_path / "annotations.json").read_text())
    kinds = (str, float, lambda number: number)
    for kind, annotation in zip(kinds, content["annotations"]):
        annotation.update(image_id=kind(annotation["image_id"]), category_id=kind(annotation["category_id"]), id=2 ** 70 + annotation["id"])
    dump(tmp_path / "annotations.json", content)
    data = load(tmp_path)
    [record] = data.parts["all"]
    assert record.crowd.tolist() == [False, True, False] and record.annotation_ids.tolist() == [1, 2, 3] and not data.problems


def test_coco_a_picture_listed_twice_has_the_objects_of_both(tmp_path):
    coco_set(tmp_path, [BOX, {**BOX, "image_id": 8, "bbox": [1, 1, 9, 9], "segmentation": []}],
             images=((7, "a.jpg", 64, 48), (8, "a.jpg", 64, 48)))
    data = load(tmp_path)
    [record] = data.parts["all"]
    assert record.image_id == 7 and record.boxes.tolist() == [[10, 5, 30, 25], [1, 1, 10, 10]]
    assert any("listed twice, as image 7 and 8; objects joined" in problem for problem in data.problems)


def test_coco_ids_that_are_text(tmp_path):
    coco_set(tmp_path, [BOX, BOX])
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["images"][0]["id"] = "seven"
    for i, annotation in enumerate(content["annotations"]):
        annotation.update(id=f"a{i}", image_id="seven")
    dump(tmp_path / "annotations.json", content)
    data = load(tmp_path)
    assert data.parts["all"][0].image_id == 1 and data.parts["all"][0].annotation_ids.tolist() == [1, 2] and len(data.notes) == 3


def test_outlines_that_fit_the_unturned_picture_alone_are_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    vehide_set(tmp_path, [("tray_son", [50, 62, 62, 50], [5, 5, 15, 15])])
    picture(tmp_path / "image/image/a.jpg", 64, 48, exif=exif)
    data = load(tmp_path)
    np.testing.assert_allclose(data.parts["train"][0].boxes, [[33, 50, 43, 62]])
    assert "annotated before its EXIF rotation" in data.problems[0]


def test_boxes_of_a_square_picture_are_not_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    coco_set(tmp_path, [BOX], images=((7, "a.jpg", 48, 48),))
    picture(tmp_path / "a.jpg", 48, 48, exif=exif)
    data = load(tmp_path)
    assert data.parts["all"][0].boxes.tolist() == [[10, 5, 30, 25]] and not data.problems


def test_annotations_made_before_the_exif_rotation_are_turned(tmp_path):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[5:15, 8:20] = 255                                                               # the damage, on the unturned picture
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    rle = masks.encode(pixels[..., 0])
    dump(tmp_path / "x.json", coco_content([
        {"bbox": [8, 5, 12, 10], "segmentation": [[8, 5, 20, 5, 20, 15, 8, 15]]},
        {"bbox": [8, 5, 12, 10], "segmentation": {"size": [48, 64], "counts": rle["counts"].decode()}}], images=((7, "a.png", 64, 48),)))
    data = load(tmp_path)
    record, = data.parts["all"]
    assert (record.width, record.height) == (48, 64) and "annotated before its EXIF rotation" in data.problems[0]
    turned = np.asarray(Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_270))[..., 0] > 0
    np.testing.assert_array_equal(masks.decode(masks.from_polygons(record.masks[0], 64, 48)) > 0, turned)
    np.testing.assert_array_equal(masks.decode(record.masks[1]) > 0, turned)
    np.testing.assert_allclose(record.boxes, [[33, 8, 43, 20]] * 2)


def test_a_picture_whose_objects_are_all_unusable_is_no_undamaged_one(tmp_path):
    """In every layout: two objects of which none can be used, beside a sound picture; left out, counted and named."""
    vehide = vehide_set(tmp_path / "vehide", [("mop_lom", [1, 2], [3, 4]), ("mop_lom", [1, 2, 3], [3, 4])])
    via = via_set(tmp_path / "via", [via_region("point", cx=3, cy=4), via_region("polygon", value="", **SQUARE)], name="a.jpg").parent
    content = json.loads((via / "via.json").read_text())
    dump(via / "via.json", {**content, "b": {"filename": "b.jpg", "regions": [via_region("polygon", **SQUARE)]}})
    picture(via / "b.jpg")
    coco = coco_set(tmp_path / "coco", [{"bbox": [10, 5, 0, 20]}, {"bbox": [70, 5, 9, 9]}, {"bbox": [8, 5, 9, 9], "image_id": 8}],
                    images=((7, "a.jpg", 64, 48), (8, "b.jpg", 64, 48)))
    voc, yolo, labelme = (tmp_path / name for name in ("voc", "yolo", "labelme"))
    corners = "<xmin>{}</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
    for name, left in (("a", 20), ("b", 1)):
        for folder in (voc, yolo, labelme):
            picture(folder / f"{name}.jpg")
        boxes = "".join(f"<object><name>dent</name><bndbox>{corners.format(left)}</bndbox></object>" for _ in range(2))
        (voc / f"{name}.xml").write_text(f"<annotation><filename>{name}.jpg</filename>{boxes}</annotation>")
        (yolo / f"{name}.txt").write_text("0 0.5 0.5 0.5 0.5\n" if left == 1 else "0 0.5 0.5 0.5 nan\n0 0.5 0.5 3 3\n")
        kind = "polygon" if left == 1 else "point"
        shapes = [{"label": "dent", "shape_type": kind, "points": [[1, 1], [9, 1], [9, 9]]}] * 2
        dump(labelme / f"{name}.json", {"imagePath": f"{name}.jpg", "imageWidth": 64, "imageHeight": 48, "shapes": shapes})
    for path in (vehide, via, coco, voc, yolo, labelme):
        data = load(path)
        assert data.layout == path.name
        assert [r.file.rsplit("/", 1)[1] for records in data.parts.values() for r in records] == ["b.jpg"], path.name
        assert "a.jpg: none of its 2 objects can be used; picture left out" in data.problems, path.name
        assert not any("left out (not known" in note for note in data.notes), path.name


def test_a_wrong_folder_of_pictures_and_a_single_file_say_what_to_give(tmp_path):
    coco = coco_set(tmp_path / "coco", [{"bbox": [8, 5, 9, 9]}])
    picture(tmp_path / "others/z.jpg")
    (tmp_path / "empty").mkdir()
    for wrong, got in (("nowhere", "a path where nothing is"), ("others/z.jpg", "a file"), ("empty", "one without a picture")):
        with pytest.raises(ValueError, match=f"--images .*{wrong}: expected the folder that the pictures of .*coco lie in, got {got}"):
            load(coco, images=str(tmp_path / wrong))
    (coco / "a.jpg").rename(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="the data set is empty .*The pictures were sought in --images .*others: is it their folder?"):
        load(coco, images=str(tmp_path / "others"))
    (tmp_path / "voc/annotations").mkdir(parents=True)
    picture(tmp_path / "voc/images/1.jpg")
    for file in ("voc/annotations/1.xml", "voc/annotations/1.mat"):
        (tmp_path / file).write_text("<annotation/>")
        with pytest.raises(ValueError, match="expected a data set, got the file of one picture; give the folder .*, such as .*/voc$"):
            load(tmp_path / file)
    with pytest.raises(ValueError, match="got the file of one picture; give the folder that holds all pictures and annotations$"):
        load(tmp_path / "others/z.jpg")


def test_an_accent_written_apart_from_its_letter_is_the_same_name(tmp_path):
    """Archives made on a Mac hold "a" and a combining mark where the JSON has one letter."""
    picture(tmp_path / unicodedata.normalize("NFD", "Schäden.jpg"))
    for finder in (PictureFinder([tmp_path]), PictureFinder([], tmp_path)):
        assert os.path.isfile(finder.find("schäden.JPG"))
