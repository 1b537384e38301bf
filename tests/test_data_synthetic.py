"""The drawn demo set: same bytes for the same seed, no vehicle twice, outlines exactly on what was drawn."""
import os

import numpy as np
import pytest

from minidamage import masks
from minidamage.data import duplicates, load_dataset, read_image, split
from minidamage.data import synthetic
from minidamage.data import synthetic_paint as paint
from minidamage.data.synthetic import draw_picture, make_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return make_demo(str(tmp_path_factory.mktemp("demo")), images=40, size=128, seed=1)


def test_layout_counts_and_controls(demo):
    data = load_dataset(demo, quiet=True)
    assert data.layout == "vehide" and data.class_names == ("dent", "scratch", "broken glass") and data.problems == []
    assert {name: len(records) for name, records in data.parts.items()} == {"train": 32, "val": 8}
    everything = [r for records in data.parts.values() for r in records]
    assert sum(len(r.labels) == 0 for r in everything) == 4                        # every tenth
    assert all((r.width, r.height) == (128, 96) for r in everything)
    assert all(len(r.labels) <= 3 and (r.boxes.min() >= 0 if len(r.labels) else True) for r in everything)


def test_no_vehicle_repeats(demo):
    data = load_dataset(demo, quiet=True)
    everything = [r for records in data.parts.values() for r in records]
    assert len({r.group for r in everything}) == 40
    assert not list(duplicates.near_pairs(duplicates.picture_hashes([r.file for r in everything])))
    parts = split.three_parts(data)
    assert [len(parts[n]) for n in split.NAMES] == [32, 4, 4]


def test_seed_decides_and_a_finished_set_is_kept(demo, tmp_path):
    again = make_demo(str(tmp_path), images=40, size=128, seed=1)
    name = sorted(os.listdir(os.path.join(demo, "image/image")))[0]
    one, two = (read_image(os.path.join(folder, "image/image", name)) for folder in (demo, again))
    np.testing.assert_array_equal(one, two)
    before = os.stat(os.path.join(again, "image/image", name)).st_mtime_ns
    make_demo(str(tmp_path), images=40, size=128, seed=1)
    assert os.stat(os.path.join(again, "image/image", name)).st_mtime_ns == before
    assert not np.array_equal(np.asarray(draw_picture(128, [2, 0])[0]), one)
    with pytest.raises(ValueError, match="at least 2 pictures"):
        make_demo(str(tmp_path / "x"), images=1)


def test_another_set_replaces_the_old_and_foreign_folders_are_not_touched(tmp_path):
    folder = make_demo(str(tmp_path / "demo"), images=4, size=64)
    make_demo(folder, images=3, size=64, seed=2)
    assert sum(len(r) for r in load_dataset(folder, quiet=True).parts.values()) == 3
    assert len(os.listdir(os.path.join(folder, "image/image"))) + len(os.listdir(os.path.join(folder, "validation/validation"))) == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "0Train_via_annos.json").write_text("{}")
    with pytest.raises(ValueError, match="is not empty and holds no demo set"):
        make_demo(str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "0Train_via_annos.json").read_text() == "{}"


def test_a_set_that_was_interrupted_is_finished(tmp_path, monkeypatch):
    folder = str(tmp_path / "demo")
    real, drawn = synthetic.draw_picture, []

    def stop_at_three(*args, **kwargs):
        drawn.append(1)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(synthetic, "draw_picture", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        make_demo(folder, images=4, size=64)
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    make_demo(folder, images=4, size=64)
    assert sum(len(r) for r in load_dataset(folder, quiet=True).parts.values()) == 4


def test_of_two_that_draw_at_once_the_first_to_finish_is_used_by_both(tmp_path, monkeypatch):
    folder, real, written = str(tmp_path / "demo"), synthetic.draw_picture, []
    times = lambda: {os.path.join(here, name): os.stat(os.path.join(here, name)).st_mtime_ns for here, _, names in os.walk(folder)
                     for name in names}

    def beside_another(*args, **kwargs):
        monkeypatch.setattr(synthetic, "draw_picture", real)
        make_demo(folder, images=4, size=64)                                        # starts later, ends before
        written.append(times())
        return real(*args, **kwargs)

    monkeypatch.setattr(synthetic, "draw_picture", beside_another)
    make_demo(folder, images=4, size=64)
    assert times() == written[0] and len(written[0]) == 4 + 2 + 1 and os.listdir(tmp_path) == ["demo"]
    (tmp_path / "demo" / "mine.txt").write_text("kept")
    monkeypatch.setattr(synthetic, "draw_picture", beside_another)
    make_demo(folder, images=4, size=64, seed=1)
    assert written[1] != written[0] and (tmp_path / "demo" / "mine.txt").read_text() == "kept" and os.listdir(tmp_path) == ["demo"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_cannot_be_put_in_place_leaves_what_was_there(tmp_path, monkeypatch, error):
    folder, rename = make_demo(str(tmp_path / "demo"), images=4, size=64), os.rename
    (tmp_path / "demo" / "mine.txt").write_text("kept")

    def fails_at_the_new_one(source, target):
        if os.path.basename(source) == "new":
            raise error
        rename(source, target)

    monkeypatch.setattr(synthetic.os, "rename", fails_at_the_new_one)
    with pytest.raises(type(error)):
        make_demo(folder, images=4, size=64, seed=1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["demo"] and (tmp_path / "demo" / "mine.txt").read_text() == "kept"
    assert sum(len(r) for r in load_dataset(folder, quiet=True).parts.values()) == 4


@pytest.mark.parametrize("number", range(12))
def test_damage_lies_inside_its_outline(number, monkeypatch):
    """The same picture drawn without the damage's paint differs inside the outlines and nowhere else (noise apart)."""
    image, objects = draw_picture(192, [5, number])
    monkeypatch.setattr(paint, "draw_scratch", lambda rng, *a: None)
    monkeypatch.setattr(paint, "draw_glass", lambda rng, *a: None)
    monkeypatch.setattr(paint, "dent_slopes", lambda dent, x, y: (np.zeros_like(x), np.zeros_like(x)))
    steady = paint.photograph
    monkeypatch.setattr(paint, "photograph", lambda rng, *a: steady(np.random.default_rng(0), *a))
    bare = np.asarray(draw_picture(192, [5, number])[0]).astype(float)
    monkeypatch.undo()
    monkeypatch.setattr(paint, "photograph", lambda rng, *a: steady(np.random.default_rng(0), *a))
    full, again = draw_picture(192, [5, number])
    differ = np.abs(np.asarray(full).astype(float) - bare).max(-1) > 6
    inside = np.zeros(differ.shape, bool)
    for _, outline in objects:
        one = masks.decode(masks.from_polygons([outline], *differ.shape)) > 0
        assert differ[one].mean() > 0.25, "this damage cannot be seen"
        inside |= one
    grown = inside.copy()                                                           # a reduced edge pixel is half in, half out
    grown[1:] |= inside[:-1]; grown[:-1] |= inside[1:]; grown[:, 1:] |= inside[:, :-1]; grown[:, :-1] |= inside[:, 1:]
    assert (differ & ~grown).sum() <= 0.02 * max(inside.sum(), 1)
