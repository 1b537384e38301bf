"""The data set doctor on masks: values, share of foreground, empty and inverted masks, copies across parts."""
import numpy as np
from PIL import Image

from data_sets import picture
from minidamage.data import load_dataset
from minidamage.data.__main__ import main as doctor
from minidamage.data.check import check
from test_data_mask_folders import MASK, mask, pairs


def findings(path, **kwargs):
    return {f.text: f for f in check(load_dataset(path, quiet=True), **kwargs)}


def only(found, text):
    matching = [f for t, f in found.items() if text in t]
    assert len(matching) == 1, (text, list(found))
    return matching[0]


def mask_set(tmp_path):
    for part, names in (("train", "abcd"), ("test", "efg")):
        pairs(tmp_path, f"{part}_img/{{}}.jpg", f"{part}_lab/{{}}.png", names)
    mask(tmp_path / "train_lab/a.png", MASK * 0)
    mask(tmp_path / "train_lab/b.png", 255 - MASK * 255)
    speck = MASK * 0
    speck[0, :2] = 255
    mask(tmp_path / "test_lab/e.png", speck)
    return tmp_path


def test_masks_are_counted_and_odd_ones_named(tmp_path):
    found = findings(mask_set(tmp_path))
    area = MASK.mean()
    note = only(found, "foreground: train")
    assert f"shares {(0 + (1 - area) + 2 * area) / 4:.2%}; test {(2 / MASK.size + 2 * area) / 3:.2%} of all pixels" in note.text
    assert only(found, "1 mask is empty").examples == ("train/a.jpg",)
    assert only(found, "1 mask has more foreground than background").examples == (f"train/b.jpg ({1 - area:.0%})",)
    assert only(found, "1 mask has fewer than 4 foreground pixels").examples == ("test/e.jpg",)
    assert "values in the 7 mask files (7 grey): 0 " in only(found, "values in the").text and ", 255 " in only(found, "values in").text
    assert not any("values in the" in t for t in findings(tmp_path, quick=True)) and not any("with outlines" in t for t in found)


def test_one_class_a_line_and_nothing_marked(tmp_path):
    values = MASK.copy()
    values[12:16, 14:20] = 2
    text = only(findings(pairs(tmp_path / "a", values=values)), "foreground: all").text
    assert f"class 1 {int((values == 1).sum()) * 3} px, class 2 72 px" in text
    assert only(findings(pairs(tmp_path / "b", values=MASK * 0)), "nothing is marked in the part that trains").level == "error"


def test_soft_masks_have_a_histogram_in_steps(tmp_path):
    soft = np.array(Image.fromarray(MASK * 255).resize((256, 192), 0).rotate(10).resize((64, 48), Image.Resampling.LANCZOS))
    text = only(findings(pairs(tmp_path, values=soft)), "values in the").text
    assert "0-15 " in text and "240-255 " in text


def test_copies_and_crops_in_two_parts_are_errors(tmp_path):
    mask_set(tmp_path)
    (tmp_path / "test_img/e.jpg").write_bytes((tmp_path / "train_img/c.jpg").read_bytes())
    for part, name in (("train", "q-1"), ("train", "q-2"), ("test", "q-3")):
        picture(tmp_path / f"{part}_img/{name}.jpg", seed=len(name) + ord(name[-1]))
        mask(tmp_path / f"{part}_lab/{name}.png")
    found = findings(tmp_path)
    copies = only(found, "across parts")
    assert copies.level == "error" and any("train/c.jpg = test/e.jpg (the same bytes)" in e for e in copies.examples)
    assert only(found, "1 vehicle or photograph lies in more than one part").examples == ("photograph q",)
    assert only(found, "1 photograph of which several crops")


def test_the_command(tmp_path, capsys):
    assert doctor([str(mask_set(tmp_path)), "--quick"]) == 0
    out = capsys.readouterr().out
    assert "read as mask folders" in out and "1 mask is empty" in out
    mask(tmp_path / "test_lab/f.png", MASK * 128)
    assert doctor([str(tmp_path)]) == 2 and "more than one way" in capsys.readouterr().err


def test_shares_of_all_pixels_and_of_pictures_are_told_apart(tmp_path):
    pairs(tmp_path, names="ab", values=MASK * 255)
    picture(tmp_path / "images/c.jpg", 640, 480)
    mask(tmp_path / "masks/c.png", np.zeros((480, 640), np.uint8))
    text = only(findings(tmp_path), "foreground: all").text
    of_all = 2 * MASK.sum() / (2 * MASK.size + 640 * 480)
    assert f"all {of_all:.2%} of all pixels, mean of the pictures' shares {2 * MASK.mean() / 3:.2%}" in text


def test_a_mask_whose_tag_says_no_damage_is_not_empty(tmp_path):
    for i, (tag, values) in enumerate((("Scratch", MASK), ("Scratch", MASK * 0), ("No Damage", 1 - MASK))):
        picture(tmp_path / f"images/{i}.jpg", seed=i)
        mask(tmp_path / f"masks/task-{i}-annotation-9-by-1-tag-{tag}-0.png", values * 255)
    found = findings(tmp_path)
    assert only(found, "1 picture is undamaged by the tag of the mask").examples == ("all/2.jpg",)
    assert only(found, "1 mask is empty").examples == ("all/1.jpg",)
    values = only(found, "values in the 2 mask files").text
    assert "without 1 undamaged by tag" in values and f"255 {MASK.mean() / 2:.2%}" in values


def test_thin_lines_that_training_at_a_small_size_loses_are_said(tmp_path):
    line = np.zeros((96, 96), np.uint8)
    line[np.arange(96), np.arange(96)[::-1]] = 255                                # its pixels 1, 4, 7, ... lie in the middle of 3 x 3
    line[40] = 255                                                                # the middle row of one: all of it stays
    line[60] = 255                                                                # the upper row of one: all of it goes
    for name in "ab":
        picture(tmp_path / f"images/{name}.jpg", 96, 96, seed=ord(name))
        mask(tmp_path / f"masks/{name}.png", line)
    reduced = line.reshape(32, 3, 32, 3)
    share = 1 - (reduced[:, 1, :, 1] > 0).sum() / (reduced.max((1, 3)) > 0).sum()
    assert f"at 32x32 px {share:.0%} of the places with damage are labelled background" in only(findings(tmp_path, size=32), "places").text
    assert not any("places with damage" in t for t in findings(tmp_path, size=96))
    wide = pairs(tmp_path / "wide", values=np.kron(MASK, np.full((4, 4), 255, np.uint8)))
    for name in "abc":
        picture(wide / f"images/{name}.jpg", 256, 192, seed=ord(name))
    assert not any("places with damage" in t for t in findings(wide, size=96))


def test_what_a_pixel_of_an_outline_is_worth_is_said(tmp_path):
    for name, rows, columns in (("a", slice(3, 5), slice(3, 5)), ("b", slice(0, 8), slice(2, 3))):     # a square of 2 x 2, a line through
        values = np.zeros((8, 8), np.uint8)
        values[rows, columns] = 255
        picture(tmp_path / f"images/{name}.jpg", 8, 8, seed=ord(name))
        mask(tmp_path / f"masks/{name}.png", values)
    # moved four ways, intersection / union: the square 2 / 6 by one pixel, 0 / 8 by two; the line along itself, where what leaves is gone,
    # 7 / 8 and 6 / 8, across 0 / 16
    one, two, wider = (4 * 2 + 2 * 7) / (4 * 6 + 2 * 8 + 2 * 16), 2 * 6 / (4 * 8 + 2 * 8 + 2 * 16), (4 + 8) / (12 + 24)
    note = only(findings(tmp_path), "outlines").text
    assert f"an IoU of {one:.3f} with themselves, by two {two:.3f}, a pixel wider on all sides {wider:.3f};" in note
    assert not any("outlines" in t for t in findings(tmp_path, quick=True))
