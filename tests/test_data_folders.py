"""Folders that are links belong to a data set as any other, a loop of links ends, and no picture is read twice by a second name."""
import os
import shutil

import numpy as np
import pytest
from PIL import Image

import predict
from data_sets import dump, picture
from minidamage.data import load_dataset
from minidamage.data.folders import walk
from minidamage.data.objects import PictureFinder

XML = ("<annotation><filename>{}.jpg</filename><object><name>dent</name><bndbox><xmin>5</xmin><ymin>5</ymin><xmax>20</xmax><ymax>20</ymax>"
       "</bndbox></object></annotation>")


def yolo(root, name):
    write(root / "labels" / f"{name}.txt", "0 0.5 0.5 0.5 0.5\n")


def voc(root, name):
    write(root / "annotations" / f"{name}.xml", XML.format(name))


def labelme(root, name):
    shape = {"label": "dent", "shape_type": "rectangle", "points": [[5, 5], [20, 20]]}
    dump(root / "images" / f"{name}.json", {"imagePath": f"{name}.jpg", "imageWidth": 64, "imageHeight": 48, "shapes": [shape]})


def masks(root, name):
    values = np.zeros((48, 64), np.uint8)
    values[5:20, 5:20] = 255
    (root / "masks").mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(root / "masks" / f"{name}.png")


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.mark.parametrize("annotate", [yolo, voc, labelme, masks])
def test_a_linked_part_with_a_loop_in_it_is_read_once(tmp_path, annotate):
    for part, number in (("train", 3), ("val", 2)):
        for i in range(number):
            picture(tmp_path / "set" / part / "images" / f"{part}{i}.jpg", seed=i)
            annotate(tmp_path / "set" / part, f"{part}{i}")
    shutil.move(tmp_path / "set" / "val", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "val")
    os.symlink(tmp_path / "set", tmp_path / "set" / "train" / "up")
    os.symlink(tmp_path / "set" / "train", tmp_path / "set" / "again")
    data = load_dataset(tmp_path / "set", quiet=True)
    assert {part: len(records) for part, records in data.parts.items()} == {"train": 3, "val": 2} and not data.problems


def test_pictures_are_found_behind_a_link(tmp_path):
    picture(tmp_path / "store" / "a.jpg")
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "store", tmp_path / "set" / "pictures")
    os.symlink(tmp_path / "set", tmp_path / "store" / "loop")
    assert PictureFinder([], tmp_path / "set").find("a.jpg") == str(tmp_path / "set" / "pictures" / "a.jpg")
    assert predict.find_photographs([str(tmp_path / "set")], "out") == [str(tmp_path / "set" / "pictures" / "a.jpg")]


def test_what_the_caller_takes_out_is_not_entered_by_its_link(tmp_path):
    for name in ("store", "hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "set").mkdir()
    os.symlink(tmp_path / "store", tmp_path / "set" / "link")
    os.symlink(tmp_path / "hidden", tmp_path / "set" / ".link")
    entered = []
    for folder, below, _ in walk(tmp_path / "set"):
        entered.append(os.path.basename(folder))
        below[:] = [name for name in below if not name.startswith(".")]
    assert entered == ["set", "link"]


@pytest.mark.parametrize("start", ["set", "set/", "./set", "../{}/set"])
def test_depth_counts_the_folders_below_through_links_too(tmp_path, monkeypatch, start):
    (tmp_path / "set" / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "store" / "d" / "e").mkdir(parents=True)
    os.symlink(tmp_path / "store", tmp_path / "set" / "link")
    monkeypatch.chdir(tmp_path)
    start = start.format(tmp_path.name)
    reached = lambda depth: [os.path.relpath(folder, "set") for folder, _, _ in walk(start, depth=depth)]
    assert reached(0) == ["."] and reached(1) == [".", "a", "link"] and reached(2) == [".", "a", "a/b", "link", "link/d"]
    assert reached(None) == reached(3) == [".", "a", "a/b", "a/b/c", "link", "link/d", "link/d/e"]
