"""The data set doctor finds what was planted, and only that."""
import json
import subprocess
import sys

import numpy as np
import pytest

from data_sets import coco_set, dump, picture, vehide_set
from minidamage.data import load_dataset
from minidamage.data.__main__ import main
from minidamage.data.check import check, report

SQUARE = ("tray_son", [10, 30, 30, 10], [5, 5, 25, 25])


def findings(path, **kwargs):
    return check(load_dataset(path, quiet=True), **kwargs)


def one(found, level, words):
    hits = [f for f in found if f.level == level and words in f.text]
    assert len(hits) == 1, report(found)
    return hits[0]


def clean_set(root, count=24):
    """Twenty-four training pictures, so that no class is rare, and four others."""
    for folder, part, n, first in (("image", "Train", count, 0), ("validation", "Val", 4, 100)):
        listed = {}
        for i in range(n):
            name = f"{first + i}.png"
            picture(root / folder / folder / name, 64, 48, seed=first + i)
            listed[name] = {"name": name, "regions": [{"all_x": SQUARE[1], "all_y": SQUARE[2], "class": "tray_son"}]}
        dump(root / f"0{part}_via_annos.json", listed)
    return root


def test_a_sound_set_has_nothing_but_notes(tmp_path):
    found = findings(clean_set(tmp_path))
    assert {f.level for f in found} == {"note"}, report(found)
    assert "nothing to complain about" in report(found) and main([str(tmp_path)]) == 0


def test_corrupt_pictures_and_copies_across_parts(tmp_path, capsys):
    clean_set(tmp_path)
    whole = (tmp_path / "image/image/3.png").read_bytes()
    (tmp_path / "image/image/3.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "validation/validation/100.png").write_bytes((tmp_path / "image/image/5.png").read_bytes())
    found = findings(tmp_path)
    assert "3.png" in one(found, "error", "cannot be decoded").examples[0]
    assert "train/5.png = val/100.png (the same bytes)" in one(found, "error", "1 group of copies or near-duplicates across").examples[0]
    errors = sum(f.level == "error" for f in found)
    capsys.readouterr()
    assert main([str(tmp_path), "--examples", "1"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("  error: ") == errors == 2 and printed.rstrip().endswith("check: 2 errors, 0 warnings")
    assert not [f for f in findings(tmp_path, quick=True) if f.level == "error"]


def test_classes_that_train_lacks_tiny_thin_and_double_objects(tmp_path):
    thin = ("tray_son", [10.4, 40.4, 40.4, 10.4], [5.01, 5.01, 5.06, 5.06])
    vehide_set(tmp_path, [SQUARE, SQUARE, thin], val=[("vo_kinh", [1, 40, 40], [1, 1, 40])])
    found = findings(tmp_path)
    assert one(found, "error", "train lacks").examples == ("broken glass",)
    assert one(found, "warning", "fewer than 20").examples == ("scratch (3)",)
    one(found, "warning", "1 object repeats")
    one(found, "warning", "1 outline is thinner than a pixel")
    assert one(found, "warning", "1 box has a side under").examples == ("a.jpg, annotation 3",)


def test_a_set_of_undamaged_pictures_alone_is_an_error(tmp_path):
    clean_set(tmp_path)
    for part in ("Train", "Val"):
        file = tmp_path / f"0{part}_via_annos.json"
        dump(file, {name: {"name": name, "regions": []} for name in json.loads(file.read_text())})
    one(findings(tmp_path, quick=True), "error", "nothing to learn")


def test_boxes_in_another_scale_and_ids(tmp_path):
    outline = [[10, 5, 30, 5, 30, 25, 10, 25]]
    coco_set(tmp_path, [{"bbox": [10, 5, 20, 20], "segmentation": outline}, {"bbox": [20, 10, 40, 38], "segmentation": outline},
                        {"bbox": [1, 1, 9, 9]}])
    content = json.loads((tmp_path / "annotations.json").read_text())
    content["annotations"][1]["id"] = 100
    dump(tmp_path / "annotations.json", content)
    found = findings(tmp_path)
    assert one(found, "error", "1 box does not fit its own mask").examples == ("a.jpg, annotation 100",)
    one(found, "error", "annotation id is used more than once")
    one(found, "warning", "1 object has a box but no outline")


def test_vehicles_in_two_parts_and_exif(tmp_path):
    clean_set(tmp_path)
    from PIL import Image
    exif = Image.Exif()
    exif[0x0112] = 3
    for folder, part, name in (("image", "Train", "01022020_101500image1.jpg"), ("validation", "Val", "01022020_101530image2.jpg")):
        picture(tmp_path / folder / folder / name, 64, 48, seed=len(name + part), exif=exif)
        listed = json.loads((tmp_path / f"0{part}_via_annos.json").read_text())
        dump(tmp_path / f"0{part}_via_annos.json", {**listed, name: {"name": name, "regions": []}})
    found = findings(tmp_path)
    assert "session 2020-02-01" in one(found, "error", "1 vehicle or photograph lies in more than one part").examples[0]
    assert len(one(found, "note", "2 pictures carry an EXIF rotation").examples) == 2


def test_the_command(tmp_path):
    run = lambda *args: subprocess.run([sys.executable, "-m", "minidamage.data", *map(str, args)], capture_output=True, text=True)
    done = run(clean_set(tmp_path), "--quick")
    assert done.returncode == 0 and "scratch" in done.stdout and "check: nothing" in done.stdout, done.stderr
    done = run(tmp_path / "nothing")
    assert done.returncode == 2 and done.stderr.startswith("python -m minidamage.data: ") and "no such file" in done.stderr


def test_classes_of_vehide_that_are_absent_have_english_names(tmp_path):
    [note] = load_dataset(vehide_set(tmp_path, [SQUARE]), quiet=True).notes
    assert note == "classes of VehiDE that this set does not have: dent, broken glass, tear, puncture, missing part, broken lamp"


def test_crowd_and_rle_are_counted(tmp_path):
    coco_set(tmp_path, [{"segmentation": {"size": [48, 64], "counts": [100, 50, 48 * 64 - 150]}, "iscrowd": 1}])
    assert "1 with RLE" in one(findings(tmp_path), "note", "1 not judged (crowd regions)").text


@pytest.mark.parametrize("size", [(64, 48), (48, 64)])
def test_sizes_are_named(tmp_path, size):
    vehide_set(tmp_path, [SQUARE])
    picture(tmp_path / "validation/validation/b.jpg", *np.multiply(size, 2).tolist())
    assert "2 pictures, 2 sizes" in one(findings(tmp_path), "note", "sizes").text
    picture(tmp_path / "validation/validation/b.jpg", 64, 48)
    assert not [f for f in findings(tmp_path) if "sizes" in f.text]
