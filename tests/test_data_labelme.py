"""LabelMe JSON: shapes, groups, holes, folders; every bad shape counted."""
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from data_sets import dump, picture
from minidamage import masks
from minidamage.data import label_map, labelme, load_dataset
from test_data_readers import JUNK, places

SQUARE = [[10, 10], [30, 10], [30, 30], [10, 30]]


def load(path, **kwargs):
    return load_dataset(path, quiet=True, **kwargs)


def shape(points, label="dent", kind="polygon", **more):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def labelme_set(folder, shapes, name="a", seed=1, **changes):
    picture(folder / f"{name}.jpg", seed=seed)
    content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"{name}.jpg", "imageData": None, "imageHeight": 48,
               "imageWidth": 64, **changes}
    dump(folder / f"{name}.json", content)
    return folder


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


@pytest.mark.parametrize("kind, points, box, area", [
    ("polygon", SQUARE, [10, 10, 30, 30], 400), ("rectangle", [[30, 30], [10, 10]], [10, 10, 30, 30], 400),
    ("circle", [[30, 20], [30, 28]], [22, 12, 38, 28], np.pi * 64), (None, SQUARE, [10, 10, 30, 30], 400)])
def test_shapes(tmp_path, kind, points, box, area):
    data = load(labelme_set(tmp_path, [shape(points, kind=kind)]))
    record, = data.parts["all"]
    assert data.layout == "labelme" and data.class_names == ("dent",) and not data.problems
    np.testing.assert_allclose(record.boxes[0], box, atol=0.02)
    assert record.area[0] == pytest.approx(area, rel=0.01)


def test_a_mask_shape_lies_where_its_corner_says(tmp_path):
    pixels = np.zeros((6, 9), np.uint8)
    pixels[1:5, 2:8] = 255
    data = load(labelme_set(tmp_path, [shape([[20, 12], [28, 17]], kind="mask", mask=png(pixels))]))
    expected = np.zeros((48, 64), np.uint8)
    expected[13:17, 22:28] = 1
    np.testing.assert_array_equal(label_map(data.parts["all"][0]), expected)


def test_groups_are_parts_and_background_cuts_holes_in_what_lies_below(tmp_path):
    later = [[40, 5], [50, 5], [50, 15], [40, 15]]
    shapes = [shape(SQUARE, group_id=3), shape(later, group_id=3), shape(SQUARE, "scratch", group_id=3),
              shape([[15, 15], [25, 15], [25, 25], [15, 25]], "_background_"), shape([[18, 18], [22, 18], [22, 22], [18, 22]], "scratch")]
    data = load(labelme_set(tmp_path, shapes))
    record, = data.parts["all"]
    assert data.class_names == ("dent", "scratch") and record.labels.tolist() == [1, 2, 2] and record.area.tolist() == [400, 300, 16]
    hole = np.zeros((48, 64), np.uint8)
    hole[10:30, 10:30] = 1
    hole[15:25, 15:25] = 0
    np.testing.assert_array_equal(masks.decode(record.masks[1]), hole)
    labels = label_map(record)
    assert not labels[15:18, 15:25].any() and (labels[18:22, 18:22] == 2).all() and (labels[5:15, 40:50] == 1).all()


def test_an_object_that_a_hole_swallows_is_gone_and_untouched_ones_keep_their_polygons(tmp_path):
    away = [[40, 35], [50, 35], [50, 45]]
    record, = load(labelme_set(tmp_path, [shape(SQUARE), shape(away), shape(SQUARE, "_background_")])).parts["all"]
    assert len(record.labels) == 1 and isinstance(record.masks[0], list)


def test_the_picture_inside_a_json_is_not_kept(tmp_path):
    labelme_set(tmp_path, [shape(SQUARE)], imageData="abc")
    assert labelme._load(str(tmp_path / "a.json"), [])["imageData"] is True


def test_ignored_regions_are_crowd(tmp_path):
    record, = load(labelme_set(tmp_path, [shape(SQUARE, "__ignore__"), shape([[12, 12], [20, 12], [20, 20]])])).parts["all"]
    assert record.crowd.tolist() == [True, False]
    labels = label_map(record)
    assert labels[28, 28] == 255 and labels[13, 17] == 1


@pytest.mark.parametrize("bad, said", [
    (shape([[5, 5]], kind="point"), "a point has no area"), (shape([[5, 5], [9, 9]], kind="linestrip"), "a linestrip has no area"),
    (shape(SQUARE, kind="spline"), "unknown shape 'spline'"), (shape(SQUARE, label=None), "a shape without a label"),
    (shape([[1, 1]], kind="circle"), "a circle with 1 points"), (shape([[1, 1], [5, 5]]), "polygon with 2 points"),
    (shape([[1, float("nan")], [5, 5], [9, 1]]), "no numbers"), (shape([[1, 1], [5, 5]], kind="mask"), "without its pixels"),
    (shape([[60, 40], [64, 48]], kind="mask", mask=png(np.ones((9, 9), np.uint8))), "leaves the 64x48 picture"),
    (shape([[1, 1], [5, 5]], kind="mask", mask="####"), "pixels cannot be read")])
def test_bad_shapes_are_dropped_and_said(tmp_path, bad, said):
    data = load(labelme_set(tmp_path, [bad, shape(SQUARE)]))
    assert len(data.parts["all"][0].labels) == 1
    assert any(said in p and p.startswith("a.jpg, annotation 1: ") for p in data.problems), data.problems


def test_folders_parts_names_and_pictures_elsewhere(tmp_path):
    labelme_set(tmp_path / "train", [shape(SQUARE, "Dent")], "a", 1)
    labelme_set(tmp_path / "train", [], "b", 2)
    labelme_set(tmp_path / "val", [shape(SQUARE, "dent"), shape(SQUARE, "hail")], "c", 3, imagePath="..\\pics\\c.jpg")
    picture(tmp_path / "train/unlisted.jpg", seed=9)
    data = load(tmp_path)
    assert {part: len(r) for part, r in data.parts.items()} == {"train": 2, "val": 1} and data.class_names == ("Dent", "hail")
    assert data.parts["train"][1].undamaged and any("1 pictures in" in n and "not known to be undamaged" in n for n in data.notes)
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\nhail\ndent\n")
    assert load(tmp_path).class_names == ("hail", "dent")
    labelme_set(tmp_path / "x/json", [shape(SQUARE)])
    (tmp_path / "x/json/a.jpg").rename(tmp_path / "x/a.jpg")
    assert load(tmp_path / "x").parts["all"] and load(tmp_path / "x/json", images=tmp_path / "x").parts["all"]
    assert load(tmp_path / "train/a.json").parts["all"][0].labels.tolist() == [1]


def test_missing_pictures_wrong_sizes_doubles_and_broken_files(tmp_path):
    labelme_set(tmp_path, [shape(SQUARE)], "a")
    labelme_set(tmp_path, [shape(SQUARE)], "b", imageData="abc")
    (tmp_path / "b.jpg").unlink()
    labelme_set(tmp_path, [shape(SQUARE)], "c", imageWidth=100)
    labelme_set(tmp_path, [shape(SQUARE)], "d", imagePath="a.jpg")
    (tmp_path / "e.json").write_text("{\"shapes\": [")
    dump(tmp_path / "f.json", [1])
    data = load(tmp_path)
    assert len(data.parts["all"]) == 1
    for said in ("b.jpg: b.json names it but it is not there; the copy inside the JSON", "c.jpg: the annotation file says 100x48",
                 "d.json: its picture, a.jpg, is also that of a.json", "e.json: not valid JSON", "f.json: not a LabelMe file"):
        assert sum(p.startswith(said) for p in data.problems) == 1, (said, data.problems)


def test_any_value_may_be_junk(tmp_path):
    pixels = np.full((4, 4), 255, np.uint8)
    pasted = shape([[1, 1], [5, 5]], kind="mask", mask=png(pixels))
    labelme_set(tmp_path, [shape(SQUARE, group_id=1), pasted, shape(SQUARE, "_background_")])
    labelme_set(tmp_path, [shape(SQUARE)], "z", 3)
    file = tmp_path / "a.json"
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


def test_a_set_whose_first_files_are_broken_is_still_one(tmp_path):
    for name in "abcde":
        labelme_set(tmp_path, [shape(SQUARE)], name=name)
    for name in "abcd":
        (tmp_path / f"{name}.json").write_text("{")
    data = load(tmp_path)
    assert data.layout == "labelme" and len(data.parts["all"]) == 1 and len(data.problems) == 4
