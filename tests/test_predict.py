"""predict.py: what lands in the JSON equals what the model saw, in the photograph's own upright pixels; mistakes are said plainly.

Most tests use `RedFinder`, which finds red pixels: its masks are known without the code under test. The last ones run an
untrained DamageNet from a checkpoint file.
"""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

import minidamage
import predict
from minidamage import masks as mask_codec
from minidamage.checkpoint import save_checkpoint
from minidamage.visualize.stages import draw_stages, heat

NAMES = ("dent", "scratch")
UPRIGHT = (60, 40)                                            # height, width of the drawn photograph
RED_MASK = np.zeros(UPRIGHT, bool)
RED_MASK[6:30, 4:24] = True
RED_MASK[12:20, 10:16] = False                                # a hole
RED_MASK[50:55, 30:38] = True                                 # and a second part


class RedFinder(torch.nn.Module):
    """Two findings a picture with any red: a dent (score 0.9) with the red pixels, a scratch (0.45) with the upper half of them."""

    task, name = "detection", "red"
    config = minidamage.MODELS["damagenet"][1]()

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def detect(self, images, mask_form, stages):
        assert mask_form == "rle" and not stages and len(images) == 1 and images[0].dtype == torch.uint8
        red, green, blue = images[0].numpy().astype(int)
        mask = (red > 180) & (green < 90) & (blue < 90)
        upper = mask & (np.arange(len(mask)) < len(mask) // 2)[:, None]
        found = [(mask, 0.9, 1), (upper, 0.45, 2)] if mask.any() else []
        rles = [mask_codec.encode(m) for m, _, _ in found]
        boxes = mask_codec.to_boxes(rles) if rles else np.zeros((0, 4))
        return [{"boxes": torch.tensor(boxes, dtype=torch.float32), "scores": torch.tensor([s for _, s, _ in found]),
                 "labels": torch.tensor([label for _, _, label in found], dtype=torch.int64), "masks": rles}]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder where the model of every checkpoint is RedFinder, and best.pt is there."""
    (tmp_path / "best.pt").write_bytes(b"")
    checkpoint = {"model": "red", "class_names": NAMES, "thresholds": {"dent": 0.5, "scratch": 0.6}}
    monkeypatch.setattr(predict, "load_checkpoint", lambda path, device: (RedFinder(), checkpoint))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def photograph(mask=RED_MASK):
    pixels = np.full((*mask.shape, 3), (40, 160, 90), np.uint8)
    pixels[mask] = (230, 30, 30)
    return Image.fromarray(pixels)


def run(*arguments):
    return predict.main(["--checkpoint", "best.pt", "--device", "cpu", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rasterised(polygons, height, width):
    rings = [np.array(ring, float) for p in polygons for ring in [p["outer"], *p["holes"]]]
    return mask_codec.decode(mask_codec.from_polygons(rings, height, width, even_odd=True)).astype(bool)


TURNS = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE",
         8: "ROTATE_270"}


@pytest.mark.parametrize("orientation", TURNS)
def test_json_is_in_upright_pixels_for_every_exif_rotation(folder, orientation):
    """The stored pixels are turned the opposite way of what the tag asks for."""
    picture = photograph()
    stored = picture.transpose(getattr(Image.Transpose, TURNS[orientation])) if TURNS[orientation] else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "car.jpg", quality=98, subsampling=0, exif=exif)
    assert run("car.jpg") == 0
    result = read(folder / "predictions" / "car.json")
    assert (result["height"], result["width"]) == UPRIGHT
    [finding] = result["detections"]                                   # the scratch is below its class's threshold
    mask = mask_codec.decode(finding["rle"]).astype(bool)
    np.testing.assert_array_equal(mask, RED_MASK)
    np.testing.assert_array_equal(rasterised(finding["polygons"], *UPRIGHT), RED_MASK)
    assert finding["class"] == "dent" and finding["label"] == 1 and finding["score"] == pytest.approx(0.9)
    assert finding["box"] == [4, 6, 38, 55] and finding["area"] == RED_MASK.sum()
    assert finding["area_share"] == RED_MASK.sum() / RED_MASK.size
    assert sorted(len(p["holes"]) for p in finding["polygons"]) == [0, 1]
    assert Image.open(folder / "predictions" / "car.overlay.jpg").size == (10 * UPRIGHT[1], 10 * UPRIGHT[0])


@pytest.mark.parametrize("ending, mode", [("png", "RGBA"), ("bmp", "RGB"), ("tif", "RGB"), ("webp", "RGB"), ("png", "P")])
def test_picture_formats(folder, ending, mode):
    picture = photograph().convert(mode)
    picture.save(folder / f"car.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert run(f"car.{ending}") == 0
    np.testing.assert_array_equal(mask_codec.decode(read(folder / "predictions" / "car.json")["detections"][0]["rle"]), RED_MASK)


def test_score_replaces_the_thresholds_and_the_json_says_what_was_used(folder):
    photograph().save(folder / "car.png")
    assert run("car.png", "--score", "0.4", "--out", "a") == 0
    result = read(folder / "a" / "car.json")
    assert [f["class"] for f in result["detections"]] == ["dent", "scratch"]
    assert result["score_thresholds"] == {"dent": 0.4, "scratch": 0.4} and result["checkpoint"] == "best.pt" and result["model"] == "red"
    assert "not of the car" in result["notes"]["area_share"] and result["mask_threshold"] == 0.5
    assert run("car.png", "--score", "0.95", "--out", "b") == 0
    assert read(folder / "b" / "car.json")["detections"] == []


def test_what_findings_are_worth_is_said_unless_the_score_is_another(folder, monkeypatch, capsys):
    measured = {"dent": {"precision": 0.45, "recall": 2 / 3}, "scratch": {"precision": float("nan"), "recall": 0.0}}
    checkpoint = {"model": "red", "class_names": NAMES, "thresholds": {"dent": 0.5, "scratch": 0.6}, "measured": measured}
    monkeypatch.setattr(predict, "load_checkpoint", lambda path, device: (RedFinder(), checkpoint))
    photograph().save(folder / "car.png")
    assert run("car.png", "--out", "a") == 0
    said = ("validation part, which chose this checkpoint too (expect less elsewhere): dent 67% found, 45% of its findings right; "
            "scratch 0% found, n/a of its findings right\n")
    assert said in capsys.readouterr().out
    assert read(folder / "a" / "car.json")["measured_on_validation"] == {"dent": {"precision": 0.45, "recall": 0.6667},
                                                                        "scratch": {"precision": None, "recall": 0.0}}
    assert run("car.png", "--out", "b", "--score", 0.5) == 0
    assert "validation part" not in capsys.readouterr().out and "measured_on_validation" not in read(folder / "b" / "car.json")


def test_models_beside_each_other(folder, monkeypatch, capsys):
    photograph().save("car.png")
    for run in ("runs/a", "runs/b"):
        os.makedirs(run)
        (folder / run / "best.pt").write_bytes(b"")
    shown = []
    monkeypatch.setattr(predict, "grid", lambda views, titles, columns: shown.append((views, titles)) or views[0])
    assert predict.main(["car.png", "--checkpoint", "runs/a", "--beside", "runs/b", "--beside", "best.pt"]) == 0
    [(views, titles)], printed = shown, capsys.readouterr().out
    assert printed.count("lowest score of a finding: dent 0.50, scratch 0.60") == 3 and "beside each other: predictions/*.beside.jpg" in printed
    assert titles == ["photograph", "red, runs/a", "red, runs/b", "red, best.pt"] and (views[0] == np.asarray(photograph())).all()
    assert (views[1] == views[2]).all() and (views[1] == views[3]).all() and views[1].shape != views[0].shape     # enlarged overlays
    assert os.path.isfile("predictions/car.beside.jpg")
    assert predict.titles_of([{"model": "unet", "checkpoint": f"runs/{run}/best.pt"} for run in ("x", "y")]) == ["unet, x", "unet, y"]
    assert predict.main(["car.png", "--checkpoint", "runs/a", "--beside", "runs/none"]) == 2
    assert "runs/none: no such file or folder" in capsys.readouterr().err


def test_flags_of_segmenters_are_refused(folder, capsys):
    photograph().save(folder / "car.png")
    for flag, value in (("--tile", 448), ("--overlap", 8), ("--mm-per-px", 0.5), ("--min-area", 9)):
        assert run("car.png", flag, value) == 2
        assert f"{flag} is for segmentation models, the checkpoint holds red (detection)" in capsys.readouterr().err


def test_twelve_megapixels(folder):
    mask = np.zeros((3000, 4000), bool)
    mask[1000:2000, 500:3500] = True
    photograph(mask).save(folder / "large.jpg", quality=90, subsampling=0)
    assert run("large.jpg") == 0
    result = read(folder / "predictions" / "large.json")
    assert (result["width"], result["height"]) == (4000, 3000)
    assert result["detections"][0]["area"] == pytest.approx(3e6, rel=1e-3)
    assert Image.open(folder / "predictions" / "large.overlay.jpg").size == (4000, 3000)


def test_same_stem_from_two_folders_keeps_both_and_a_second_run_replaces_its_own(folder):
    for name in ("front", "rear"):
        (folder / name).mkdir()
        photograph().save(folder / name / "1.png")
    photograph().save(folder / "front" / "1.jpg")
    for _ in range(2):
        assert run("front", "rear") == 0
        written = sorted(p.name for p in (folder / "predictions").glob("*.json"))
        assert written == ["1-2.json", "1-3.json", "1.json"]
    assert len({read(p)["photograph"] for p in (folder / "predictions").glob("*.json")}) == 3
    assert run("rear") == 0                                            # alone: it still finds its own earlier name
    assert len(list((folder / "predictions").glob("*.json"))) == 3


def test_nothing_of_the_users_is_written_over(folder):
    photograph().save(folder / "car.png")
    (folder / "out").mkdir()
    (folder / "out" / "car.overlay.jpg").write_bytes(b"mine")
    before = (folder / "car.png").read_bytes()
    assert run("car.png", "--out", "out") == 0
    assert (folder / "out" / "car.overlay.jpg").read_bytes() == b"mine" and (folder / "car.png").read_bytes() == before
    assert (folder / "out" / "car-2.json").exists()
    (folder / "out" / "car-2.mask.png").write_bytes(b"mine")                  # of no name that a detector writes
    assert run("car.png", "--out", "out") == 0
    assert (folder / "out" / "car-2.mask.png").read_bytes() == b"mine" and not (folder / "out" / "car-3.json").exists()
    assert read(folder / "out" / "car-2.json")["files"] == ["car-2.json", "car-2.overlay.jpg"]
    assert run("car.png", "--out", ".") == 2 and run(".", "--out", ".") == 2


def test_a_folder_is_searched_to_any_depth_but_not_its_own_results(folder, capsys):
    (folder / "shoot" / "day 1").mkdir(parents=True)
    photograph().save(folder / "shoot" / "day 1" / "a [ 1 ].png")
    photograph(np.zeros(UPRIGHT, bool)).save(folder / "shoot" / "clean.png")
    (folder / "shoot" / "notes.txt").write_text("no picture")
    for _ in range(2):
        assert run("shoot", "shoot/clean.png", "--out", "shoot/found") == 0
        assert "2 photographs: 1 with findings, 1 without (findings: dent 1)" in capsys.readouterr().out
    assert read(folder / "shoot" / "found" / "a [ 1 ].json")["photograph"].endswith("a [ 1 ].png")


def test_results_of_another_run_are_no_photographs_and_photographs_in_the_output_folder_are_said(folder, capsys):
    (folder / "shoot" / "day").mkdir(parents=True)
    photograph().save(folder / "shoot" / "a.png")
    for out in ("one", "two"):
        assert run("shoot", "--out", f"shoot/{out}") == 0
        assert capsys.readouterr().out.count(" -> ") == 1                                    # the photograph, no picture of run one
    photograph().save(folder / "shoot" / "day" / "b.overlay.jpg")                            # a name does not make it a result
    assert run("shoot", "--out", "shoot/day") == 2
    assert "expected a folder without photographs, got shoot/day/b.overlay.jpg in it; move it away" in capsys.readouterr().err
    assert run("shoot", "--out", "three") == 0 and (folder / "three" / "b.overlay.json").exists()


def test_a_picture_too_long_is_skipped_alone(folder, capsys):
    Image.new("L", (65_501, 2)).save(folder / "long.png")
    photograph().save(folder / "car.png")
    assert run("long.png", "car.png") == 0
    assert "long.png: 65501x2, expected at most 65500 pixels a side; cut it into several" in capsys.readouterr().err


def test_photographs_of_other_formats_and_closed_folders_are_named(folder, monkeypatch, capsys):
    for name in ("a.heic", "b.CR2", "c.nef", "d.dng", "notes.txt", ".hidden.heic"):
        (folder / "shoot" / name).parent.mkdir(exist_ok=True)
        (folder / "shoot" / name).write_bytes(b"")
    (folder / "shoot" / "closed").mkdir()
    scandir = os.scandir

    def refused(path):
        if isinstance(path, str) and os.path.basename(path) == "closed":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)                        # rights alone do not stop root
    assert run("shoot") == 2
    err = capsys.readouterr().err
    assert "WARNING: passed over 4 photographs in formats that are not read: shoot/a.heic, shoot/b.CR2, shoot/c.nef and 1 more; " in err
    assert "WARNING: passed over 1 folder that cannot be listed (Permission denied): shoot/closed" in err and "found none" in err
    photograph().save(folder / "shoot" / "car.png")
    assert run("shoot") == 0
    assert "4 photographs in formats" in capsys.readouterr().err


def test_unreadable_files_are_named_counted_and_skipped(folder, capsys):
    photograph().save(folder / "good.png")
    (folder / "bad.jpg").write_bytes(b"no picture at all")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    (folder / "empty.jpg").write_bytes(b"")
    assert run("good.png", "bad.jpg", "cut.png", "empty.jpg") == 0
    out, err = capsys.readouterr()
    assert "3 could not be read" in out and all(name in err for name in ("bad.jpg", "cut.png", "empty.jpg"))
    assert run("bad.jpg", "--out", "other") == 1
    assert os.listdir(folder / "other") == []


@pytest.mark.parametrize("arguments, words", [
    (["missing.jpg"], "no such file"), (["nothing"], "found none"), (["car.png", "--score", "7"], "from 0 to 1"),
    (["car.png", "--device", "abacus"], "--device abacus"),
    (["car.png", "--out", "car.png"], "--out car.png: expected a folder, this is a file"),
    (["car.png", "--checkpoint", "none.pt"], "none.pt: no such file or folder"),
    (["car.png", "--checkpoint", "begun"], "has not finished an epoch (no best.pt); go on with `python train.py --resume begun`"),
    (["car.png", "--checkpoint", ""], "train")])
def test_mistakes_exit_with_2_and_one_line(folder, capsys, arguments, words):
    photograph().save(folder / "car.png")
    (folder / "nothing").mkdir(), (folder / "begun").mkdir()
    (folder / "begun" / "last.pt").write_bytes(b"")
    assert run(*arguments) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("arguments, words", [
    (["car.png", "--score", "--tyle", "5"], "--score: expected one argument"),
    (["car.png", "--checkpiont", "best.pt"], "unrecognized arguments: --checkpiont best.pt; did you mean --checkpoint?"),
    (["car.png", "--xyzzy"], "unrecognized arguments: --xyzzy (--help"), ([], "required: PHOTO_OR_FOLDER")])
def test_a_mistyped_flag_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        predict.main(arguments)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and words in printed and printed.count("\n") == 1 and printed.endswith("(--help lists every flag)\n")


def test_a_full_disk_says_so_and_leaves_no_half_file(folder, monkeypatch, capsys):
    photograph().save(folder / "car.png")

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(predict, "write_json", full)
    assert run("car.png") == 1
    assert "No space left" in capsys.readouterr().err and not (folder / "predictions" / "car.json").exists()


def test_a_name_too_long_for_its_results_fails_alone(folder, capsys):
    long = "x" * 248                                                   # with .png and .json a name, with .overlay.jpg too long for one
    photograph().save(folder / f"{long}.png")
    photograph().save(folder / "z.png")
    assert run(f"{long}.png", "z.png") == 0
    out, err = capsys.readouterr()
    assert f"1/2 skipped  {long}.png: the names of its results are too long for --out predictions" in err and "shorter name" in err
    assert "1 could not be read or written" in out
    assert sorted(os.listdir(folder / "predictions")) == ["z.json", "z.overlay.jpg"]
    assert run(f"{long}.png") == 1


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("writes", ["write_json", "save_picture"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_photograph_has_all_its_results_of_one_run_or_those_of_the_one_before(folder, monkeypatch, writes, error):
    def fails(*arguments):
        raise error

    def fail(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(predict, writes, fails)
            if isinstance(error, OSError):
                return run("car.png", *arguments) == 1
            with pytest.raises(KeyboardInterrupt):
                run("car.png", *arguments)
            return True

    photograph().save(folder / "car.png")
    assert fail() and contents(folder / "predictions") == {}
    assert run("car.png") == 0
    before = contents(folder / "predictions")
    assert sorted(before) == ["car.json", "car.overlay.jpg"]
    photograph(np.rot90(RED_MASK)).save(folder / "car.png")
    assert fail("--score", "0.4") and contents(folder / "predictions") == before
    assert run("car.png", "--score", "0.4") == 0
    after = contents(folder / "predictions")
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in after)


def test_what_a_killed_run_left_makes_way(folder, monkeypatch):
    """Between two of its renames: the JSON has its place first, without it nothing says whose the others are."""
    placed, replace = [], os.replace

    def killed(source, target):
        if os.path.dirname(target) == "predictions":
            placed.append(os.path.basename(target))
            if len(placed) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    photograph().save(folder / "car.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        run("car.png")
    assert placed == ["car.json", "car.overlay.jpg"] and os.listdir(folder / "predictions") == ["car.json"]
    assert run("car.png") == 0 and sorted(os.listdir(folder / "predictions")) == ["car.json", "car.overlay.jpg"]


def test_what_this_run_does_not_make_goes(folder):
    """A picture of other findings beside the new JSON would pass for its own."""
    photograph().save(folder / "car.png")
    assert run("car.png", "--beside", "best.pt") == 0 and (folder / "predictions" / "car.beside.jpg").exists()
    (folder / "predictions" / "car.txt").write_text("mine")
    assert run("car.png") == 0
    assert sorted(os.listdir(folder / "predictions")) == ["car.json", "car.overlay.jpg", "car.txt"]


def test_json_keeps_lists_of_numbers_on_one_line_and_names_as_they_are():
    value = {"name": "a [ 1,  2 ]\n[\n3 ]", "box": [1.5, -2, 3e-9], "rings": [[[0, 0], [1, 0]], []], "objects": [{"x": [1]}, {}]}
    text = predict.json_text(value)
    assert json.loads(text) == value and '"box": [1.5, -2, 3e-09]' in text and '"rings": [[[0, 0], [1, 0]], []]' in text


# ---------------------------------------------------------------------------------------------- with a real model

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained DamageNet of the demo's size; its scores are near 1/3, so a low --score finds much."""
    torch.manual_seed(0)
    _, _, _, demo = minidamage.MODELS["damagenet"]
    fields = {**demo["config"], "box_detections_per_img": 8}
    model = minidamage.build_model("damagenet", num_classes=3, **fields)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(path, {"model": "damagenet", "config": vars(model.config), "num_classes": 3, "class_names": NAMES,
                           "category_ids": (1, 2), "thresholds": {}, "weights": model.state_dict(), "train": {}, "run": {}, "split": {},
                           "metrics": {}})
    return path


def test_an_untrained_damagenet_end_to_end(checkpoint, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (150, 210, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    arguments = [str(tmp_path / "noise.png"), "--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--score", "0", "--explain"]
    assert predict.main([*arguments, "--device", "cpu"]) == 0
    result = read(tmp_path / "out" / "noise.json")
    assert result["model"] == "damagenet" and len(result["detections"]) == 8
    scores = [finding["score"] for finding in result["detections"]]
    assert scores == sorted(scores, reverse=True)
    for finding in result["detections"]:
        x1, y1, x2, y2 = finding["box"]
        assert 0 <= x1 < x2 <= 210 and 0 <= y1 < y2 <= 150
        mask = mask_codec.decode(finding["rle"])
        np.testing.assert_array_equal(rasterised(finding["polygons"], 150, 210), mask)
        assert finding["area"] == mask.sum() and finding["area_share"] == pytest.approx(mask.mean())
    strip = Image.open(tmp_path / "out" / "noise.stages.png")
    assert strip.width > strip.height > 400


def test_stages_of_a_picture_without_findings(checkpoint):
    model, _ = minidamage.load_checkpoint(checkpoint)
    image = np.zeros((90, 120, 3), np.uint8)
    _, [stages] = model.detect([torch.from_numpy(image).permute(2, 0, 1)], "rle", stages=True)
    strip = draw_stages(image, stages, NAMES, kept=[])
    assert strip.dtype == np.uint8 and strip.shape[2] == 3


def test_heat_runs_from_dark_to_light():
    colours = heat(np.linspace(0, 1, 50)).sum(axis=1)
    assert (np.diff(colours) >= 0).mean() > 0.9 and colours[0] < 30 and colours[-1] > 600
    assert heat(np.float32(2.0)).shape == (3,)
