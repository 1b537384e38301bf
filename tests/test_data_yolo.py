"""YOLO text labels: both forms, the layouts and data.yaml files of the tools, every bad line counted, and written labels read back."""
import os
import shutil

import numpy as np
import pytest

from data_sets import coco_set, picture, vehide_set
from minidamage import masks
from minidamage.data import label_map, load_dataset
from minidamage.data import yolo
from minidamage.data.split import three_parts

RING = "0 0.25 0.25 0.75 0.25 0.5 0.75"
BOX = "1 0.5 0.5 0.5 0.25"


def load(path, **kwargs):
    return load_dataset(path, quiet=True, **kwargs)


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def yolo_set(root, images="images/{}.jpg", labels="labels/{}.txt", names="ab", content=RING + "\n" + BOX + "\n"):
    for i, name in enumerate(names):
        picture(root / images.format(name), seed=i)
        text(root / labels.format(name), content)
    return root


def test_rings_and_boxes_by_hand(tmp_path):
    text(tmp_path / "classes.txt", "dent\nscratch\n")
    data = load(yolo_set(tmp_path))
    assert data.layout == "yolo" and data.class_names == ("dent", "scratch") and data.category_ids == (0, 1) and not data.problems
    record = data.parts["all"][0]
    assert record.labels.tolist() == [1, 2] and record.masks[1] is None
    np.testing.assert_allclose(record.boxes, [[16, 12, 48, 36], [16, 18, 48, 30]])
    np.testing.assert_allclose(record.masks[0][0], [[16, 12], [48, 12], [32, 36]])
    np.testing.assert_allclose(record.area, [32 * 24 / 2, 32 * 12])


@pytest.mark.parametrize("images, labels", [
    ("images/{part}/{{}}.jpg", "labels/{part}/{{}}.txt"), ("{part}/images/{{}}.jpg", "{part}/labels/{{}}.txt"),
    ("images/{part}2017/{{}}.jpg", "labels/{part}2017/{{}}.txt"), ("{part}/{{}}.jpg", "{part}/{{}}.txt")])
def test_layouts_with_parts(tmp_path, images, labels):
    for part, names in (("train", "abc"), ("valid", "d")):
        yolo_set(tmp_path, images.format(part=part), labels.format(part=part), names)
    data = load(tmp_path)
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 3, "val": 1} and not data.problems
    assert data.class_names == ("class 0", "class 1") and any("numbered 0 to 1" in n for n in data.notes)


def test_labels_beside_or_below_the_pictures(tmp_path):
    assert len(load(yolo_set(tmp_path / "a", "{}.jpg", "{}.txt")).parts["all"]) == 2
    assert len(load(yolo_set(tmp_path / "b", "{}.jpg", "labels/{}.txt")).parts["all"]) == 2
    yolo_set(tmp_path / "c", "far/{}.jpg", "near/{}.txt")
    assert len(load(yolo_set(tmp_path / "d", "x/{}.jpg", "x/labels/{}.txt")).parts["all"]) == 2


@pytest.mark.parametrize("content, names", [
    ("names: ['dent', \"scratch, long\"]\n", ("dent", "scratch, long")),
    ("nc: 2\nnames:\n- dent\n- scratch  # thin\n", ("dent", "scratch")),
    ("names:\n  0: dent\n  1: 'scratch'\n", ("dent", "scratch")),
    ("# Roboflow\ntrain: ../train/images\nnames: {0: dent, 1: scratch}\nroboflow:\n  url: https://x/y\n", ("dent", "scratch"))])
def test_data_yaml(tmp_path, content, names):
    text(yolo_set(tmp_path) / "data.yaml", content)
    assert load(tmp_path).class_names == names
    assert load(tmp_path / "data.yaml").class_names == names


@pytest.mark.parametrize("content, names", [
    ("names:\n  '0': dent\n  \"1\": scratch\n", ("dent", "scratch")), ("names: {'0': dent, \"1\": '2'}\n", ("dent", "2")),
    ("names: ['dent # 1', \"scratch #2\"]  # all\n", ("dent # 1", "scratch #2")),
    ("names:  # 'two'\n- 'dent # 1'  # it's one\n- driver's # door's\n", ("dent # 1", "driver's")),
    ("names: ['it''s # 5', b]\n", ("it''s # 5", "b")),
    ("names:\n  0: \"a \\\" # b\"\n  1: c#d\n", ('a \\" # b', "c#d"))])
def test_data_yaml_with_quotes(tmp_path, content, names):
    text(yolo_set(tmp_path) / "data.yaml", content)
    assert load(tmp_path).class_names == names


def test_data_yaml_says_the_parts(tmp_path):
    yolo_set(tmp_path, "images/one/{}.jpg", "labels/one/{}.txt", "abc")
    yolo_set(tmp_path, "images/two/{}.jpg", "labels/two/{}.txt", "de")
    text(tmp_path / "list.txt", "images/one/c.jpg\n")
    text(tmp_path / "data.yaml", "path: .\ntrain: images/one\nval: images/one\ntest: [images/two, list.txt]\nnames: [dent, scratch]\n")
    data = load(tmp_path)
    assert {part: [r.file[-5] for r in records] for part, records in data.parts.items()} == {"train": ["a", "b"], "test": ["c", "d", "e"]}


@pytest.mark.parametrize("line", ["images/{}/0.jpg", "./images/{}/0.jpg", "images\\{}\\0.jpg", "{root}/images/{}/0.jpg"])
def test_lists_tell_pictures_of_one_name_apart(tmp_path, line):
    for folder in "abc":
        yolo_set(tmp_path, f"images/{folder}/{{}}.jpg", f"labels/{folder}/{{}}.txt", "0")
    text(tmp_path / "train.txt", line.format("a", root=tmp_path) + "\n")
    text(tmp_path / "val.txt", line.format("b", root=tmp_path) + "\n")
    text(tmp_path / "data.yaml", "train: train.txt\nval: val.txt\nnames: [dent, scratch]\n")
    data = load(tmp_path)
    assert {part: [r.file.split("/")[-2] for r in records] for part, records in data.parts.items()} == {"train": ["a"], "val": ["b"]}
    assert data.problems == ["0.jpg: in none of the parts that data.yaml names; picture left out"]


@pytest.mark.parametrize("place", ["copy", "link"])
def test_lists_name_pictures_of_the_set_before_it_was_copied_or_linked(tmp_path, place):
    first = yolo_set(tmp_path / "first", "images/train/{}.jpg", "labels/train/{}.txt", "abcd")
    text(first / "test.txt", f"{first}/images/train/c.jpg\n{first}/images/train/d.jpg\n")
    text(first / "data.yaml", "train: images/train\nval: images/train\ntest: test.txt\nnames: [dent, scratch]\n")
    (shutil.copytree if place == "copy" else os.symlink)(first, tmp_path / place)
    assert {part: len(records) for part, records in load(tmp_path / place).parts.items()} == {"train": 2, "test": 2}


def test_pictures_of_a_declared_place_that_is_not_there_are_not_left_out(tmp_path):
    for folder, names in (("foo", "abc"), ("val", "d")):
        yolo_set(tmp_path, f"images/{folder}/{{}}.jpg", f"labels/{folder}/{{}}.txt", names)
    text(tmp_path / "data.yaml", "train: /nowhere/images/foo\nval: images/val\nnames: [dent, scratch]\n")
    assert {part: len(records) for part, records in load(tmp_path).parts.items()} == {"train": 3, "val": 1}


def test_lists_made_elsewhere_go_by_the_pictures_names(tmp_path):
    yolo_set(tmp_path, names="abc")
    text(tmp_path / "train.txt", "C:\\data\\a.jpg\n/home/me/b.jpg\n")
    text(tmp_path / "val.txt", "/home/me/c.jpg\n")
    text(tmp_path / "data.yaml", "train: train.txt\nval: val.txt\nnames: [dent, scratch]\n")
    assert {part: [r.file[-5] for r in records] for part, records in load(tmp_path).parts.items()} == {"train": ["a", "b"], "val": ["c"]}


def test_pictures_outside_of_the_declared_folders_do_not_pool_the_parts(tmp_path):
    for folder, names in (("train", "ab"), ("val", "c"), ("extra", "d")):
        yolo_set(tmp_path, f"images/{folder}/{{}}.jpg", f"labels/{folder}/{{}}.txt", names)
    with pytest.raises(ValueError, match=r"expected every picture in train, val or test \(there are train 2, val 1\), got 1 picture in "
                                         "images/extra, which no name puts there"):
        three_parts(load(tmp_path))
    assert sum(map(len, three_parts(load(tmp_path), (0.5, 0.0, 0.5)).values())) == 4                # --split pools them all
    text(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [dent, scratch]\n")
    data = load(tmp_path)
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 2, "val": 1}
    assert data.problems == ["d.jpg: in none of the parts that data.yaml names; picture left out"]


def test_pictures_without_a_part_beside_a_test_part_are_what_trains(tmp_path):
    yolo_set(tmp_path, names="abc")
    yolo_set(tmp_path, "test/images/{}.jpg", "test/labels/{}.txt", "de")
    data = load(tmp_path)
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 3, "test": 2}
    assert "3 pictures in images, in no part by any name, taken as train" in data.notes


def test_other_yaml_files_and_text_blocks_in_data_yaml(tmp_path):
    text(yolo_set(tmp_path) / "augment.yaml", "steps:\n  - flip: 0.5\n    p: 1\n  - crop\nnames_of: x\n")
    text(tmp_path / "data.yaml", "names:\n  0: dent\n  1: scratch\ndownload: |\n  from x import y\n  urls = ['a:b']  # more\n  - 1\n")
    assert load(tmp_path).class_names == ("dent", "scratch")
    assert yolo.read_yaml(tmp_path / "augment.yaml")["steps"] == ["flip: 0.5", "crop"]


def test_names_beside_the_labels_and_two_pictures_of_one_stem(tmp_path):
    text(yolo_set(tmp_path) / "labels/classes.txt", "dent\nscratch\n")
    picture(tmp_path / "images/a.png")
    data = load(tmp_path)
    assert data.class_names == ("dent", "scratch") and [r.file[-5:] for r in data.parts["all"]] == ["a.jpg", "b.jpg"]
    assert any("1 pictures have no .txt (first: a.png)" in n for n in data.notes)


def test_data_yaml_that_is_none_and_missing_names(tmp_path):
    with pytest.raises(ValueError, match=r"x.yaml, line 2: expected `key: value`"):
        yolo.read_yaml(text(tmp_path / "x.yaml", "names: [a]\nwhat\n"))
    text(yolo_set(tmp_path / "a") / "data.yaml", "names: [dent]\n")
    with pytest.raises(ValueError, match=r"a.txt, line 2: class 1, but data.yaml has 1 names, 0 to 0 \(dent\); add the missing names"):
        load(tmp_path / "a")


@pytest.mark.parametrize("line, said", [
    ("dent 0.5 0.5 0.5 0.5", "expected a class number"), ("-1 0.5 0.5 0.5 0.5", "expected a class number"),
    ("0.5 0.5 0.5 0.5 0.5", "expected a class number"), ("0 0.5 0.5 0.5", "3 numbers after the class"),
    ("0 0.1 0.1 0.5 0.5 0.9 0.1 0.3", "7 numbers after the class"), ("0 0.5 0.5 0.2 0.2 0.9", "5 numbers after the class"),
    ("0 320 200 40 40", "from 40 to 320 are no shares"), ("0 nan 0.5 0.1 0.1", "are no shares"), ("0 0.5 0.5 0 0.1", "has no size"),
    ("99999999999 0.5 0.5 0.1 0.1", "expected a class number"), ("0 0.1 0.1 0.5 0.5 0.9 0.9", "polygon without area"),
    ("inf 0.5 0.5 0.1 0.1", "expected a class number")])
def test_bad_lines_are_dropped_with_file_and_line(tmp_path, line, said):
    data = load(yolo_set(tmp_path, names="a", content=f"{RING}\n{line}\n\n{BOX}\n"))
    assert data.parts["all"][0].labels.tolist() == [1, 2]
    assert any(said in p and p.startswith("a.") for p in data.problems), data.problems


@pytest.mark.parametrize("content, message", [
    ("names: [dent, scratch\nnc: 2\n", r"data.yaml: expected \] at the end of names"),
    ("names: dent\n", "data.yaml: names: expected a list such as .*, got 'dent'"),
    ("names:\n  - dent\n  what\n nc 2\n:\n", "data.yaml, line")])
def test_a_broken_data_yaml_is_an_error_and_not_another_list_of_names(tmp_path, content, message):
    text(yolo_set(tmp_path) / "data.yaml", content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("file, content", [("data.yaml", "names: [Delle, Schäden]\n"), ("classes.txt", "Delle\nSchäden\n")])
def test_names_that_are_not_utf8_are_an_error_and_not_numbers(tmp_path, file, content):
    (yolo_set(tmp_path) / file).write_bytes(content.encode("cp1252"))
    with pytest.raises(ValueError, match=rf"{file}: expected text in UTF-8, got b'\\xe4'; save it as UTF-8"):
        load(tmp_path)


def test_names_over_several_lines_and_a_wrong_count(tmp_path):
    text(yolo_set(tmp_path) / "data.yaml", "names: ['dent',\n  'scratch']\nnc: 3\n")
    data = load(tmp_path)
    assert data.class_names == ("dent", "scratch") and any("says nc: 3, and names 2 classes" in n for n in data.notes)


def test_empty_absent_and_orphaned_label_files(tmp_path):
    yolo_set(tmp_path, names="abc")
    text(tmp_path / "labels/b.txt", "")
    (tmp_path / "labels/c.txt").unlink()
    text(tmp_path / "labels/z.txt", RING)
    (tmp_path / "images/a.jpg").write_bytes(b"")
    data = load(tmp_path)
    assert [len(r.labels) for r in data.parts["all"]] == [0] and data.parts["all"][0].undamaged
    assert any("1 pictures have no .txt (first: c.jpg)" in n for n in data.notes)
    assert sorted(p.split(":")[0] for p in data.problems) == ["a.jpg", "z.txt"]


def test_a_fold_of_two_rings_over_a_bridge():
    outer = np.array([[0.0, 0], [20, 0], [20, 20], [0, 20]])
    hole = np.array([[5.0, 5], [5, 15], [15, 15], [15, 5]])
    apart = np.array([[30.0, 4], [40, 4], [40, 12], [30, 12]])
    joined = yolo.join_rings([outer, hole, apart])
    mask = masks.decode(masks.from_polygons([joined], 24, 44))
    expected = np.zeros((24, 44), np.uint8)
    expected[:20, :20] = 1
    expected[5:15, 5:15] = 0
    expected[4:12, 30:40] = 1
    assert (mask != expected).sum() <= 6                                              # the bridges' own pixels


@pytest.mark.parametrize("boxes", [False, True])
def test_written_labels_read_back(tmp_path, boxes):
    hole = np.zeros((48, 64), np.uint8)
    hole[5:40, 8:50] = 1
    hole[15:30, 20:40] = 0
    hole[42:46, 2:6] = 1
    rle = masks.encode(hole)
    rle["counts"] = rle["counts"].decode()
    crowd = {"segmentation": {"size": [48, 64], "counts": [5, 48 * 64 - 5]}, "iscrowd": 1}
    source = load(coco_set(tmp_path / "coco", [{"bbox": [8, 5, 40, 30]}, {"segmentation": rle, "category_id": 2}, crowd]))
    assert yolo.write(source, tmp_path / "yolo", boxes) == ["1 crowd regions left out: YOLO labels have no form for them"]
    data = load(tmp_path / "yolo")
    assert data.class_names == source.class_names and not data.problems
    record, = data.parts["train"]
    assert record.labels.tolist() == [1, 2] and open(record.file, "rb").read() == open(source.parts["all"][0].file, "rb").read()
    np.testing.assert_allclose(record.boxes, source.parts["all"][0].boxes[:2], atol=1e-3)
    assert (record.masks[1] is None) == boxes
    if not boxes:
        read = masks.decode(masks.from_polygons(record.masks[1], 48, 64))
        assert (read != hole).sum() <= 30                                             # bridges, and corners that the rasteriser rounds


def test_polygons_survive_writing_to_a_thousandth(tmp_path):
    source = load(vehide_set(tmp_path / "v", [("tray_son", [10.25, 30, 30, 10], [5, 5.5, 25, 25]), ("mop_lom", [1.5, 9, 4], [2, 2, 8])]))
    yolo.write(source, tmp_path / "y")
    data = load(tmp_path / "y")
    assert {part: len(r) for part, r in data.parts.items()} == {"train": 1, "val": 1} and data.parts["val"][0].undamaged
    for mine, theirs in zip(source.parts["train"][0].masks, data.parts["train"][0].masks):
        np.testing.assert_allclose(mine[0], theirs[0], atol=1e-3)
    assert set(np.unique(label_map(data.parts["train"][0]))) == {0, 1, 2}


def test_any_text_loads_or_says_why_not(tmp_path):
    rng = np.random.default_rng(0)
    tokens = ["0", "1", "0.5", "-1", "1e9", "nan", "x", "1.0", "0.25", "", "\u00fc", "99999999999999999999"]
    for i in range(200):
        lines = [" ".join(rng.choice(tokens, rng.integers(0, 9))) for _ in range(3)]
        yolo_set(tmp_path, names="a", content=RING + "\n" + "\n".join(lines))
        try:
            data = load(tmp_path)
        except ValueError:
            continue
        record, = data.parts["all"]
        assert np.isfinite(record.boxes).all() and (record.boxes[:, 2:] > record.boxes[:, :2]).all()
