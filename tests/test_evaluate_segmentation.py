"""evaluate.py for segmenters: a model whose probability is the red of each pixel, real networks end to end, comparisons, costs, epochs."""
import functools
import json
import os
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import evaluate
import minidamage
from minidamage.checkpoint import save_checkpoint
from minidamage.evaluation import comparison, complexity, epochs, selection
from minidamage.evaluation.segmentation import at_both_sizes, names_of_maps
from minidamage.layers.segmenter import Segmenter, SegmenterConfig
from minidamage.metrics.statistics import bootstrap
from minidamage.visualize.plots import SIZE, series_colour


def read(path):
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


class RedSegmenter(Segmenter):
    """The probability of a crack is the red of the pixel, times `gain`."""

    def __init__(self, image_size=0, gain=1.0):
        super().__init__(2, SegmenterConfig(image_size=image_size), "red")
        self.gain = gain
        self.weight = nn.Parameter(torch.zeros(1))
        self.eval()

    def logits(self, x):
        red = (x[:, :1] * self.image_std[0] + self.image_mean[0]) * self.gain
        return torch.logit(red.clamp(1e-4, 1 - 1e-4))


# (x, y, width, height, red in percent, whether it is annotated) on 64 x 64: a crack found at .9, one found above .4 alone, a reflection
# at .35 on an undamaged picture, and nothing
PICTURES = [[(4, 10, 50, 3, 90, True)], [(4, 20, 40, 2, 40, True), (4, 40, 10, 8, 80, True)], [(8, 8, 10, 10, 35, False)], []]


def draw_set(folder, pictures=PICTURES, side=64, names=("crack",)):
    os.makedirs(folder / "images")
    content = {"images": [], "annotations": [], "categories": [{"id": k + 1, "name": name} for k, name in enumerate(names)]}
    for i, objects in enumerate(pictures):
        pixels = np.full((side, side, 3), 10, np.uint8)
        content["images"].append({"id": i + 1, "file_name": f"{i}.png", "height": side, "width": side})
        for n, (x, y, w, h, red, is_damage) in enumerate(objects):
            pixels[y:y + h, x:x + w, 0] = round(2.55 * red)
            if is_damage:
                content["annotations"].append({"id": len(content["annotations"]) + 1, "image_id": i + 1, "category_id": n % len(names) + 1,
                                               "iscrowd": 0, "area": w * h, "bbox": [x, y, w, h],
                                               "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def red_run(tmp_path, monkeypatch):
    """runs/red-001/best.pt, whose model is RedSegmenter, trained on the drawn set, threshold .3 chosen on validation."""
    folder = draw_set(tmp_path / "cracks")
    files = [f"images/{i}.png" for i in range(4)]
    checkpoint = {"model": "red", "class_names": ("crack",), "thresholds": {"crack": 0.3}, "train": {"epoch": 3},
                  "run": {"data": str(folder)}, "split": {"train": [], "val": [], "test": files}}
    os.makedirs(tmp_path / "runs" / "red-001")
    (tmp_path / "runs" / "red-001" / "best.pt").write_bytes(b"")
    model = types.SimpleNamespace(make=RedSegmenter)
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, device: (model.make(), checkpoint))
    monkeypatch.chdir(tmp_path)
    return types.SimpleNamespace(path=tmp_path, data=folder, checkpoint=checkpoint, model=model,
                                 out=tmp_path / "runs" / "red-001" / "evaluation-test")


def test_both_thresholds_by_hand(red_run, capsys):
    assert evaluate.main(["--device", "cpu", "--draws", "50", "--save-maps"]) == 0
    results, printed = read(red_run.out / "results.json"), capsys.readouterr().out
    assert list(results["sizes"]) == ["native"] and results["sizes"]["native"]["pixels"] == "native (64x64)"
    points = results["sizes"]["native"]["points"]
    assert list(points) == ["at 0.5", "at 0.3 (chosen on validation)"] and results["in_use"] == "at 0.3 (chosen on validation)"
    half, chosen = (point["stats"] for point in points.values())
    assert half["pixel/IoU"] == pytest.approx((150 + 80) / (150 + 160)) and half["pixel/precision"] == 1
    assert chosen["pixel/IoU"] == pytest.approx(310 / (310 + 100)) and chosen["pixel/recall"] == 1
    assert chosen["pixel/image/IoU"] == pytest.approx((1 + 1 + 0) / 3)                 # the fourth picture has no quotient
    assert chosen["any-damage/IoU"] == pytest.approx((1 + 1 + 0 + 1) / 4)              # and counts 1 by the project's rule
    assert half["tolerance 2 px/recall"] == half["tolerance 5 px/recall"] == pytest.approx(230 / 310)
    widths = points["at 0.5"]["by_width"]
    assert widths["under 3 px"] == {"recall": 0, "pixels": 80, "share": 80 / 310} and widths["3 to 6 px"]["recall"] == 1
    sweep = results["sizes"]["native"]["sweep"]
    assert sweep["ODS F1"] == pytest.approx(1) and 0.35 <= sweep["ODS threshold"] < 0.4
    assert sweep["OIS F1"] == 1 and "these very pictures" in sweep["note"]
    low, high = points["at 0.5"]["intervals"]["pixel/IoU"]
    assert 0.4 <= low <= half["pixel/IoU"] <= high <= 1
    assert results["ms_per_picture"] > 0 and results["peak_memory_MB"] > 0 and results["task"] == "segmentation"
    assert "at its own size" in results["notes"][0] and "0.742" in printed and "95 % intervals (50" in printed
    content = read(red_run.out / "pictures.json")
    assert content["files"] == [f"images/{i}.png" for i in range(4)]
    assert content["counts"]["native"]["at 0.5"][0] == [150, 0, 0, 64 * 64 - 150]
    with Image.open(red_run.out / "maps" / "0.png") as saved:
        assert saved.mode == "P" and np.asarray(saved).sum() == 150 and saved.convert("RGB").getpixel((5, 11)) == (226, 40, 52)
    page = (red_run.out / "report.html").read_text(encoding="utf-8")
    assert "Worst predictions" in page and "Precision and recall of pixels" in page
    assert sorted(f for f in os.listdir(red_run.out) if f.startswith("worst")) == ["worst-01.jpg"]      # only the reflection is wrong


def test_the_main_numbers_stand_last_in_a_terminal_and_first_on_the_page(red_run, capsys):
    assert evaluate.main(["--device", "cpu", "--draws", "0", "--worst", "0"]) == 0
    *_, last, written = [line for line in capsys.readouterr().out.splitlines() if line]
    assert last == "Summary: native (64x64), at 0.3 (chosen on validation): IoU 0.756, Dice 0.861, precision 0.756, recall 1.000"
    assert written.startswith("written: ")
    page = (red_run.out / "report.html").read_text(encoding="utf-8")
    assert 0 < page.index(">Summary<") < page.index(">Accuracy<")


@pytest.mark.parametrize("gain, score, expected", [
    (1.0, "0.3", None), (0.0, "0.5", "the model has not learned enough yet: it calls 0.0% of the pixels damage, the truth has 1.9%"),
    (0.0, "0", "the model has not learned enough yet: it calls 100.0% of the pixels damage, the truth has 1.9%"),
    (1.0, "0.95", "the threshold in use does not suit the model: it calls 0.0% of the pixels damage, the truth has 1.9%")])
def test_a_model_that_calls_all_or_nothing_damage_is_said_to_have_learned_nothing(red_run, gain, score, expected):
    red_run.model.make = lambda: RedSegmenter(gain=gain)
    assert evaluate.main(["--device", "cpu", "--draws", "0", "--worst", "0", "--score", score]) == 0
    notes = [note for note in read(red_run.out / "results.json")["notes"] if "the truth has" in note]
    assert notes == [expected] * bool(expected)


def test_score_replaces_the_chosen_threshold(red_run):
    assert evaluate.main(["--device", "cpu", "--draws", "0", "--worst", "0", "--score", "0.85"]) == 0
    points = read(red_run.out / "results.json")["sizes"]["native"]["points"]
    assert list(points) == ["at 0.5", "at 0.85 (--score)"]
    assert points["at 0.85 (--score)"]["stats"]["pixel/recall"] == pytest.approx(150 / 310)
    assert points["at 0.5"]["intervals"] == {}


def test_the_model_s_size_and_the_native_one_are_scored_apart(red_run, capsys):
    red_run.model.make = lambda: RedSegmenter(image_size=32)
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 0
    sizes = read(red_run.out / "results.json")["sizes"]
    assert {name: size["pixels"] for name, size in sizes.items()} == {"model": "32x32", "native": "native (64x64)"}
    pixels = {name: sum(row["pixels"] for row in size["points"]["at 0.5"]["by_width"].values()) for name, size in sizes.items()}
    assert pixels == {"native": 310, "model": 25 + 20 + 20}                            # every second row and column: one line of three
    assert "32x32, at 0.5" in capsys.readouterr().out
    counts = read(red_run.out / "pictures.json")["counts"]
    assert sum(counts["model"]["at 0.5"][0]) == 32 * 32 and sum(counts["native"]["at 0.5"][0]) == 64 * 64


def test_millimetres(red_run):
    assert evaluate.main(["--device", "cpu", "--draws", "0", "--worst", "0", "--mm-per-px", "0.4"]) == 0
    by_width = read(red_run.out / "results.json")["sizes"]["native"]["points"]["at 0.5"]["by_width"]
    assert {name: row["pixels"] for name, row in by_width.items()} == {"tiny, under 1 mm": 80, "small, 1 to 3 mm": 150,
                                                                      "wide, 3 mm and more": 80}


def test_ignored_pixels_count_nowhere(red_run):
    content = read(red_run.data / "annotations.json")
    crowd = {"id": 9, "image_id": 3, "category_id": 1, "iscrowd": 1, "area": 400, "bbox": [4, 4, 20, 20],
             "segmentation": [[4, 4, 24, 4, 24, 24, 4, 24]]}
    (red_run.data / "annotations.json").write_text(json.dumps({**content, "annotations": [*content["annotations"], crowd]}))
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 0
    stats = read(red_run.out / "results.json")["sizes"]["native"]["points"]["at 0.3 (chosen on validation)"]["stats"]
    assert stats["pixel/precision"] == 1                                               # the reflection lies in the crowd region


def test_nothing_found_and_nothing_there_are_explained(red_run, capsys):
    red_run.model.make = lambda: RedSegmenter(gain=0.0)
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 0
    printed = capsys.readouterr().out
    assert "not one pixel is predicted; the accuracy of 98.1% is the share of the background" in printed
    content = read(red_run.data / "annotations.json")
    (red_run.data / "annotations.json").write_text(json.dumps({**content, "annotations": []}))
    assert evaluate.main(["--device", "cpu"]) == 0
    assert "no damaged pixel in these pictures" in capsys.readouterr().out


def test_a_picture_that_cannot_be_read_is_named(red_run, monkeypatch, capsys):
    load = selection.load_dataset

    def truncated(*arguments, **options):
        dataset = load(*arguments, **options)
        (red_run.data / "images" / "0.png").write_bytes((red_run.data / "images" / "0.png").read_bytes()[:60])
        return dataset
    monkeypatch.setattr(selection, "load_dataset", truncated)
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 0
    results = read(red_run.out / "results.json")
    assert [os.path.basename(file) for file in results["unreadable"]] == ["0.png"]
    assert "1 of 4 pictures cannot be read" in results["notes"][0]
    assert results["sizes"]["native"]["points"]["at 0.5"]["stats"]["pixel/recall"] == pytest.approx(80 / 310)


def test_mistakes_end_with_2(red_run, capsys):
    for arguments, message in ((["--set", "mask_threshold=0.4"], "--set mask_threshold=0.4: a trained red"),
                               (["--score", "2"], "from 0 to 1"),
                               (["--mm-per-px", "0"], "--mm-per-px: expected millimetres a pixel above 0, got 0"),
                               (["--mm-per-px", "nan"], "--mm-per-px: expected millimetres a pixel above 0, got nan"),
                               (["--ceiling", "--checkpoint", "runs/red-001"], "--ceiling is for detection models, the checkpoint holds"),
                               (["--compare", "nowhere"], "a path where nothing is"),
                               (["--compare", "runs/red-001"], "got a folder without one"),
                               (["--test-epochs", "runs/red-001"], "train with --keep-epochs"),
                               (["--test-epochs", "x"], "none of that name"),
                               (["--complexity", "unnet"], "got unnet"), (["--complexity", "unet", "damagenets"], "expected models")):
        assert evaluate.main(arguments if "--compare" in arguments else ["--device", "cpu", *arguments]) == 2
        assert message in capsys.readouterr().err


def test_flags_of_segmenters_are_refused_for_a_detector(red_run, capsys):
    detector = types.SimpleNamespace(task="detection", name="danet")
    red_run.model.make = lambda: detector
    for flags in (["--mm-per-px", "0.5"], ["--save-maps"]):
        assert evaluate.main(["--device", "cpu", *flags]) == 2
        assert f"{flags[0]} is for segmentation models, the checkpoint holds danet (detection)" in capsys.readouterr().err


def test_maps_of_equal_names_stay_apart_whatever_the_others_are_called():
    files = ("a/1.jpg", "b/1.png", "b/1-2.jpg", "c/1.jpg", "c/A.jpg", "d/a.jpg", "e/7.jpg")
    assert names_of_maps([types.SimpleNamespace(file=file) for file in files]) == ["1", "1-2", "1-2-2", "1-3", "A", "a-2", "7"]


def test_one_pass_gives_what_the_model_gives_at_either_size():
    model = minidamage.build_model("unet", num_classes=2, body="resnet18", image_size=64).eval()
    image = torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8)
    found = at_both_sizes(model, image)
    for size in ("model", "native"):
        torch.testing.assert_close(found[size], model.probabilities([image], at=size)[0])
    assert found["native"].shape == (1, 50, 90) and found["model"].shape == (1, 64, 64)


def test_a_real_network_with_three_classes(tmp_path, capsys):
    names = ("dent", "scratch", "tear")
    data = draw_set(tmp_path / "cars", [[(4, 10, 20, 12, 90, True), (30, 30, 9, 9, 50, True), (2, 50, 8, 8, 50, True)]] * 2, names=names)
    model = minidamage.build_model("custom_segnet2", num_classes=4, image_size=32)
    path = tmp_path / "run" / "best.pt"
    path.parent.mkdir()
    save_checkpoint(path, {"model": "custom_segnet2", "config": vars(model.config), "num_classes": 4, "class_names": names,
                           "weights": model.state_dict(), "thresholds": {}, "run": {"data": str(data)}})
    assert evaluate.main(["--checkpoint", str(path), "--device", "cpu", "--part", "all", "--draws", "10", "--save-maps"]) == 0
    folder = path.parent / "evaluation-cars-all"
    sizes = read(folder / "results.json")["sizes"]
    assert list(sizes["model"]["points"]) == ["likeliest class"]
    per_class = sizes["native"]["points"]["likeliest class"]["per_class"]
    assert set(per_class) == set(names) and all(0 <= numbers["pixel/accuracy"] <= 1 for numbers in per_class.values())
    assert sorted(os.listdir(folder / "maps")) == ["0.png", "1.png"]
    assert read(folder / "pictures.json")["maps"] == ["maps/0.png", "maps/1.png"]
    assert evaluate.main(["--checkpoint", str(path), "--device", "cpu", "--score", "0.2"]) == 2
    assert "--score 0.2: is for detectors and for segmenters of one class; this one has 3" in capsys.readouterr().err


# ---- --compare ---------------------------------------------------------------------------------------------------------------------

# Context-CrackNet, Table 3: IoU of three models on the ten sets
SETS = ("CFD", "CRACK500", "CrackTree200", "DeepCrack", "Eugen", "Forest", "GAPs", "Rissbilder", "Sylvie", "Volker")
TABLE_3 = {"context_cracknet": (.5668, .6733, .5375, .7401, .6627, .5699, .4743, .6553, .6846, .7668),
           "unetplusplus": (.5257, .6444, .4257, .7168, .7060, .5457, .3927, .6568, .6718, .7641),
           "unet": (.1562, .6397, .4857, .7061, .6323, .5390, .3837, .6456, .6577, .7464)}


def stored(folder, model, data, counts, trained_with=(), side=448, chosen=0.4, seed=0, old=False, **trained_by):
    """An evaluation folder as evaluate.py writes it, with the counts [TP, FP, FN, TN] of each picture."""
    os.makedirs(folder)
    tp, fp, fn, tn = np.sum(counts, 0)
    stats = {f"pixel/{name}": 0.0 for name in ("F1", "accuracy", "two-class IoU", "two-class Dice")}
    stats |= {"pixel/IoU": tp / (tp + fp + fn), "pixel/Dice": 2 * tp / (2 * tp + fp + fn), "pixel/precision": tp / (tp + fp),
              "pixel/recall": tp / (tp + fn)}
    points = {point: {"stats": stats} for point in ("at 0.5", f"at {chosen:g} (chosen on validation)")}
    content = {"model": model, "seed": seed, "trained_with": list(trained_with), "trained_by": None if old else trained_by,
               "task": "segmentation", "data": f"/d/{data}", "part": "test",
               "sizes": {"native": {"pixels": f"native ({side}x{side})", "points": points}}}
    (folder / "results.json").write_text(json.dumps(content))
    counts = {"native": {point: np.asarray(counts).tolist() for point in points}}
    files = [f"{i}.png" for i in range(len(counts["native"]["at 0.5"]))]
    (folder / "pictures.json").write_text(json.dumps({"files": files, "counts": counts}))
    return str(folder)


def test_compare_repeats_the_crack_paper_s_tables(tmp_path, capsys):
    runs = [stored(tmp_path / f"{model}-{data}", model, data, [[round(1e6 * iou), round(1e6 * (1 - iou)), 0, 1]])
            for model, ious in TABLE_3.items() for data, iou in zip(SETS, ious)]
    assert evaluate.main(["--compare", *runs, "--draws", "0", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "0.6331 ± 0.0929" in printed and "0.0645" in printed                         # Tables 4 and 5
    tests = next(t for t in read(tmp_path / "out" / "comparison.json")["tables"] if "Wilcoxon" in t["caption"])
    rows = {row[0]: dict(zip(tests["columns"], row)) for row in tests["rows"]}
    assert rows["unetplusplus"]["p"] == pytest.approx(0.064453125) and rows["unetplusplus"]["p, Holm"] == pytest.approx(0.064453125)
    assert rows["unet"]["p"] == pytest.approx(2 / 1024) and rows["unet"]["p, Holm"] == pytest.approx(4 / 1024)
    assert rows["unet"]["first is better on"] == 10 and rows["unetplusplus"]["first is better on"] == 8
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") == 5 and "recall by data set" in page


def test_compare_pairs_the_pictures_of_one_set(tmp_path, capsys):
    rng = np.random.RandomState(0)
    hard = rng.randint(100, 2000, 40)                                                   # damaged pixels of each picture
    make = lambda share: np.stack([(hard * share).astype(int), hard // 10, hard - (hard * share).astype(int), hard * 0 + 9999], 1)
    a, b = stored(tmp_path / "a", "unet", "cfd", make(0.9)), stored(tmp_path / "b", "unet", "cfd", make(0.7), ["body=resnet18"])
    assert evaluate.main(["--compare", a, b, "--metric", "recall", "--draws", "100", "--out", str(tmp_path / "out")]) == 0
    table = next(t for t in read(tmp_path / "out" / "comparison.json")["tables"] if "paired bootstrap" in t["caption"])
    row = dict(zip(table["columns"], *table["rows"]))
    assert (row["models"], row["data"], row["pictures"], row["draws"]) == ("unet - unet body=resnet18", "cfd", 40, 100)
    assert row["difference"] == pytest.approx(0.2, abs=0.01) and row["low"] < row["difference"] < row["high"] < 0.21
    assert row["p"] == row["p, Holm"] == pytest.approx(2 / 101)                         # none of 100 draws is on the other side of 0
    assert "Wilcoxon" not in (printed := capsys.readouterr().out) and "nothing is written" not in printed       # one set: nothing to rank
    assert "above 0: unet scores higher" in table["caption"]
    assert "2 models on 1 data set</title>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


class TwoClasses(RedSegmenter):
    """Red pixels above a level are the second class, or with mistaken the first one, which the truth has elsewhere."""

    def __init__(self, mistaken=False):
        super().__init__()
        self.num_classes, self.mistaken = 3, mistaken

    def logits(self, x):
        red = x[:, :1] * self.image_std[0] + self.image_mean[0]
        found = [red - 0.6, torch.full_like(red, -9)]
        return torch.cat([torch.zeros_like(red), *(found if self.mistaken else found[::-1])], 1) * 20


def test_means_over_classes_are_tested_with_what_each_evaluation_drew(red_run, capsys):
    """The pictures' kept counts are of any damage, which both models find alike; their classes are not."""
    pictures = [[(4, 10, 50, 3, 90, True), (4, 30, 20 + 4 * i, 6, 90, True)] for i in range(6)]
    data = draw_set(red_run.path / "two", pictures, names=("dent", "scratch"))
    red_run.checkpoint.update(class_names=("dent", "scratch"), thresholds={}, run={"data": str(data)},
                              split={"train": [], "val": [], "test": [f"images/{i}.png" for i in range(6)]})
    for name, mistaken in (("a", False), ("b", True)):
        red_run.model.make, red_run.checkpoint["model"] = functools.partial(TwoClasses, mistaken), name
        assert evaluate.main(["--device", "cpu", "--draws", "60", "--worst", "0", "--out", name]) == 0
    assert read(red_run.path / "a" / "pictures.json")["counts"] == read(red_run.path / "b" / "pictures.json")["counts"]
    assert evaluate.main(["--compare", "a", "b", "--metric", "mIoU", "--out", "out"]) == 0
    [table] = [t for t in read(red_run.path / "out" / "comparison.json")["tables"] if "paired bootstrap draws" in t["caption"]]
    row = dict(zip(table["columns"], *table["rows"]))
    sizes = np.array([(150, 6 * (20 + 4 * i)) for i in range(6)])                       # dent and scratch of each picture
    share = lambda drawn, k: sizes[drawn, k].sum() / sizes[drawn].sum() / 2             # mIoU of a model that calls all of it class k
    wanted = bootstrap(np.arange(6), lambda drawn: share(drawn, 1) - share(drawn, 0), samples=60)
    assert (row["pictures"], row["draws"]) == (6, 60)
    assert (row["difference"], row["low"], row["high"]) == pytest.approx((wanted.value, wanted.low, wanted.high), abs=1e-5)
    for name in ("a", "b"):                                                             # kept by an older version
        content = read(red_run.path / name / "pictures.json")
        del content["draws"]
        (red_run.path / name / "pictures.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert evaluate.main(["--compare", "a", "b", "--metric", "mIoU"]) == 0
    printed = capsys.readouterr().out
    assert "no test of pixel/mIoU: it takes what evaluate.py draws of it" in printed and "p, Holm" not in printed


def test_other_pictures_and_other_folders_are_said(tmp_path, capsys):
    a, b = stored(tmp_path / "a", "unet", "cfd", [[1, 1, 1, 1]] * 3), stored(tmp_path / "b", "pan", "cfd", [[2, 1, 1, 1]] * 2)
    assert evaluate.main(["--compare", a, b]) == 0
    assert "note: cfd: pan was scored on other pictures than unet (2 and 3, 2 of them shared)" in (printed := capsys.readouterr().out)
    assert "paired bootstrap" not in printed and "read from" not in printed
    c = stored(tmp_path / "c", "pan", "old/cfd", [[2, 1, 1, 1]] * 3)
    assert evaluate.main(["--compare", a, c]) == 0
    assert "note: cfd: read from /d/cfd and /d/old/cfd; pictures of one name" in (printed := capsys.readouterr().out)
    assert "paired bootstrap" in printed and "other pictures" not in printed


def test_models_that_were_trained_otherwise_are_said_and_seeds_of_one_model_are_no_comparison(tmp_path, capsys):
    a = [stored(tmp_path / f"a{seed}", "unet", "cfd", [[2, 1, 1, 1]] * 3, seed=seed, epochs=2) for seed in (0, 1)]
    b = stored(tmp_path / "b", "pan", "cfd", [[3, 1, 1, 1]] * 3, epochs=1, pretrained="/w/resnet50.pth")
    assert evaluate.main(["--compare", *a, b]) == 0
    printed = capsys.readouterr().out
    assert ("note: cfd: trained otherwise, so a difference is not the model's alone: --epochs 2 (unet), 1 (pan); "
            "--pretrained not given (unet), resnet50.pth (pan)\n") in printed
    assert "note: interval and p are over the pictures: what another seed would change" in printed
    assert evaluate.main(["--compare", *a]) == 0
    assert "note: nothing to test: these 2 runs differ in their seed alone and are one model, unet" in capsys.readouterr().out


def test_compare_draws_the_runs_by_epoch(tmp_path, monkeypatch):
    for seed, model, start in ((0, "unet", 0.1), (1, "unet", 0.2), (0, "pan", 0.5)):
        stored(tmp_path / f"{model}{seed}" / "evaluation-test", model, "cfd", [[2, 1, 1, 1]], seed=seed)
        (tmp_path / f"{model}{seed}" / "metrics.csv").write_text(f"epoch,val/loss,val/pixel/IoU\n1,{start},{start}\n2,0.4,0.3\n")
    evaluations = comparison.join_seeds([comparison.load(str(tmp_path / name), "model", "chosen") for name in ("unet0", "unet1", "pan0")])
    assert [len(e.paths) for e in evaluations] == [2, 1]
    for name in ("pixel/IoU", "IoU"):                                                   # one curve a run, a name a model
        drawn = []
        monkeypatch.setattr(comparison, "line_plot", lambda series, *words: drawn.append([s.name for s in series]) or np.zeros((9, 9, 3)))
        comparison.curves(evaluations, [name])
        assert drawn == [["unet", "", "pan"]] * 2
    monkeypatch.undo()
    (tmp_path / "pan0" / "metrics.csv").write_text("a,b\n1,2\n")                        # another program's
    assert list(comparison.curves(evaluations[1:], ["IoU"])) == []
    (tmp_path / "pan0" / "metrics.csv").write_text("epoch,val/loss,val/pixel/IoU\n1,0.5,0.5\n2,0.4,0.3\n")
    [(data, picture)] = comparison.curves(evaluations, ["IoU", "Dice"]).items()
    assert data == "cfd" and picture.shape == (SIZE[1], 2 * SIZE[0], 3)                 # the loss and the IoU; Dice was not kept
    for half in (picture[:, :SIZE[0]], picture[:, SIZE[0]:]):
        for k in (0, 1):
            assert (half == series_colour(k)).all(-1).sum() > 100


def test_seeds_are_one_model_whose_metric_is_their_mean(tmp_path, capsys):
    rng = np.random.RandomState(1)
    counts = {(model, seed): rng.randint(50, 500, (12, 4)) for model in ("pan", "unet", "fpn") for seed in (0, 1, 2)}
    counts = {key: np.roll(value, -1, 1) if key[0] == "fpn" else value for key, value in counts.items()}
    runs = [stored(tmp_path / f"{model}{seed}", model, "cfd", value, seed=seed) for (model, seed), value in counts.items()]
    assert evaluate.main(["--compare", *runs, "--draws", "60", "--out", str(tmp_path / "out")]) == 0
    content = read(tmp_path / "out" / "comparison.json")
    whole, paired = content["tables"]
    ious = {model: [tp / (tp + fp + fn) for (name, _), value in counts.items() if name == model for tp, fp, fn, _ in [value.sum(0)]]
            for model in ("pan", "unet", "fpn")}
    assert "sample standard deviation over seeds" in whole["caption"] and len(content["evaluations"]) == 9
    rows = {row[0]: dict(zip(whole["columns"], row)) for row in whole["rows"]}
    for model, values in ious.items():
        assert rows[model]["seeds"] == 3 and rows[model]["IoU"] == f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"

    draw, drawn = np.random.default_rng(0), []                                          # the definition, draw by draw
    for _ in range(60):
        pictures = draw.integers(0, 12, 12)
        pooled = lambda model, seed: counts[model, seed][pictures].sum(0)
        means = [np.mean([tp / (tp + fp + fn) for seed in range(3) for tp, fp, fn, _ in [pooled(model, seed)]])
                 for model in ("pan", "unet")]
        drawn.append(means[0] - means[1])
    row = dict(zip(paired["columns"], paired["rows"][0]))
    assert row["difference"] == pytest.approx(np.mean(ious["pan"]) - np.mean(ious["unet"]))
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))
    smaller = min(sum(value <= 0 for value in drawn), sum(value >= 0 for value in drawn))
    assert row["p"] == pytest.approx(min(1, 2 * (smaller + 1) / 61))
    p_values = sorted(dict(zip(paired["columns"], each))["p"] for each in paired["rows"])
    assert sorted(dict(zip(paired["columns"], each))["p, Holm"] for each in paired["rows"]) == pytest.approx(
        [min(1, 2 * p_values[0]), max(min(1, 2 * p_values[0]), p_values[1])])
    capsys.readouterr()
    others = {"scored on different pictures: expected one split; train them with the same --split-seed": dict(seed=7),
              "an older evaluation does not say how it was trained and from which seed": dict(seed=7, old=True)}
    for i, (message, different) in enumerate(others.items()):
        other = stored(tmp_path / f"other{i}", "pan", "cfd", counts["pan", 0][:5], **different)
        assert evaluate.main(["--compare", runs[0], other]) == 2
        assert message in capsys.readouterr().err
    other = stored(tmp_path / "faster", "pan", "cfd", counts["pan", 0], seed=7, lr=0.1, pretrained="/w/resnet50.pth")
    assert evaluate.main(["--compare", runs[0], other]) == 0                            # not a seed: another training
    assert "pan - pan lr=0.1 pretrained=resnet50.pth" in capsys.readouterr().out
    os.remove(os.path.join(runs[1], "pictures.json"))                                   # evaluated before detectors had one: no pairing
    assert evaluate.main(["--compare", *runs]) == 0 and "paired" not in capsys.readouterr().out


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    a = stored(tmp_path / "a", "unet", "cfd", [[1, 1, 1, 1]])
    b = stored(tmp_path / "b", "unet", "cfd", [[2, 1, 1, 1]])
    os.makedirs(tmp_path / "d")
    (tmp_path / "d" / "results.json").write_text(json.dumps({"model": "damagenet", "data": "x", "part": "test", "stats": {"segm/AP": 0.5}}))
    (tmp_path / "broken.json").write_text("{}")
    for arguments, message in (([a, b], "the same model (unet) on the same data (cfd)"), ([a, str(tmp_path / "d")], "got both"),
                               ([a, "--metric", "mIoU"], "--metric mIoU"), ([str(tmp_path / "broken.json")], "evaluate the run again")):
        assert evaluate.main(["--compare", *arguments]) == 2
        assert message in capsys.readouterr().err
    for path, got in ((tmp_path / "nosuch", "a path where nothing is"), (tmp_path, "a folder without one")):
        assert evaluate.main(["--compare", str(path)]) == 2 and f"expected one evaluation, got {got}; run" in capsys.readouterr().err
    c = stored(tmp_path / "c", "pan", "cfd", [[2, 1, 1, 1]])
    e, f = (stored(tmp_path / name, name, "deepcrack", [[3, 1, 1, 1]]) for name in ("unet", "pan"))
    assert evaluate.main(["--compare", a, c, e, f]) == 0
    assert "2 data sets cannot give a p below 0.5" in (printed := capsys.readouterr().out) and "nothing to test" not in printed
    assert "nothing is written: --out DIR" in printed and "threshold" not in printed
    assert evaluate.main(["--compare", a, c, e]) == 0
    assert "0.3333 ±" not in (printed := capsys.readouterr().out) and "±" in printed and "nan" not in printed      # pan, on one set
    assert evaluate.main(["--compare", a, f]) == 0
    printed = capsys.readouterr().out
    assert "nothing to test: unet (cfd) shares no data set with pan (deepcrack)" in printed and "±" not in printed


def test_settings_that_all_share_are_said_once_and_other_sizes_too(tmp_path, capsys):
    a = stored(tmp_path / "a", "unet", "cfd", [[1, 1, 1, 1]], ["schedule=cosine", "body=resnet18"])
    b = stored(tmp_path / "b", "pan", "cfd", [[2, 1, 1, 1]], ["schedule=cosine"], side=256, chosen=0.3)
    assert evaluate.main(["--compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert "note: all were trained with schedule=cosine\n" in printed and printed.count("schedule=cosine") == 1
    assert "unet body=resnet18" in printed
    assert "note: cfd: scored at 448x448 (unet body=resnet18); 256x256 (pan), which are other pixels; --size native" in printed
    assert "trained otherwise" not in printed
    own = "unet body=resnet18 at 0.4 (chosen on validation); pan at 0.3 (chosen on validation)"
    assert f"note: cfd: scored at each model's own threshold ({own}); --at 0.5 scores all at 0.5" in printed
    assert evaluate.main(["--compare", a, b, "--at", "0.5"]) == 0 and "threshold" not in capsys.readouterr().out
    assert evaluate.main(["--compare", a]) == 0 and "unet schedule=cosine body=resnet18" in capsys.readouterr().out


def test_detectors_are_compared_by_their_ap(tmp_path, capsys):
    for name, ap in (("damagenet", 0.4), ("maskrcnn_resnet50_fpn", 0.3)):
        os.makedirs(tmp_path / name)
        (tmp_path / name / "results.json").write_text(json.dumps({"model": name, "data": "cars", "part": "test", "task": "detection",
                                                                  "stats": {"bbox/AP": ap, "segm/AP": ap - 0.1, "segm/AP50": None}}))
    runs = [str(tmp_path / "damagenet"), str(tmp_path / "maskrcnn_resnet50_fpn")]
    assert evaluate.main(["--compare", *runs]) == 0
    printed = capsys.readouterr().out
    assert "0.4000" in printed and "0.2000" in printed and "paired" not in printed
    for name, drawn in (("damagenet", [0.30, 0.32, None, 0.28]), ("maskrcnn_resnet50_fpn", [0.2, 0.25, 0.2, 0.29])):
        (tmp_path / name / "pictures.json").write_text(json.dumps({"files": ["a.jpg", "b.jpg"], "draws": {"segm/AP": drawn}}))
    assert evaluate.main(["--compare", *runs, "--out", str(tmp_path / "out")]) == 0
    [table] = [t for t in read(tmp_path / "out" / "comparison.json")["tables"] if "paired bootstrap draws" in t["caption"]]
    row = dict(zip(table["columns"], *table["rows"]))
    assert row["difference"] == pytest.approx(0.1) and row["pictures"] == 2 and row["draws"] == 4
    assert (row["low"], row["high"]) == pytest.approx(tuple(np.quantile([0.1, 0.07, -0.01], [0.025, 0.975])))
    assert row["p"] == pytest.approx(2 * 2 / 4)                                         # one of the three known draws is below 0


# ---- --test-epochs -----------------------------------------------------------------------------------------------------------------

def test_every_kept_epoch_is_scored_on_validation(red_run, monkeypatch, capsys):
    run = red_run.path / "runs" / "red-001"
    gains = {"epoch-001.pt": 0.0, "epoch-002.pt": 1.0, "epoch-010.pt": 0.6}
    for name in gains:
        (run / name).write_bytes(b"")
    files = [f"images/{i}.png" for i in range(4)]
    red_run.checkpoint["split"] = {"train": [], "val": files, "test": []}
    load = lambda path, device: (RedSegmenter(image_size=64, gain=gains[os.path.basename(path)]), red_run.checkpoint)
    monkeypatch.setattr(epochs, "load_checkpoint", load)
    assert evaluate.main(["--test-epochs", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "best by pixel/IoU: epoch 2 (0.7419)" in printed
    assert f"--checkpoint {run / 'epoch-002.pt'} --part test" in printed
    lines = (run / "test-epochs.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,loss,pixel/IoU") and [line.split(",")[0] for line in lines[1:]] == ["1", "2", "10"]


# ---- --complexity ------------------------------------------------------------------------------------------------------------------

def test_multiply_adds_by_hand():
    x = torch.zeros(2, 4, 6, 6)
    cases = ((nn.Conv2d(4, 8, 3, padding=1), x, 2 * 36 * 8 * 4 * 9, None),
             (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), x, 2 * 9 * 8 * 2 * 9, None),
             (nn.ConvTranspose2d(4, 8, 2, stride=2), x, 2 * 36 * 4 * 8 * 4, 2 * 144 * 4 * 8 * 4),
             (nn.Linear(5, 7), torch.zeros(3, 5), 3 * 5 * 7, None),
             (lambda t: t @ t.transpose(1, 2), torch.zeros(2, 3, 5), 2 * 3 * 3 * 5, None),
             (lambda t: torch.baddbmm(torch.zeros(3), t, t.transpose(1, 2)), torch.zeros(2, 3, 5), 2 * 3 * 3 * 5, None),
             (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), x, 0, None))
    for module, given, executed, output_rule in cases:
        with torch.no_grad(), complexity.Counter() as counter:
            module(given)
        assert (counter.executed, counter.output_rule) == (executed, executed if output_rule is None else output_rule)


def test_the_linear_attention_op_is_counted():
    from minidamage.ops import linear_attention
    B, N, D, A, k, D_o = 1, 10, 6, 4, 3, 5
    w = [torch.zeros(A, D), None] * 3
    with torch.no_grad(), complexity.Counter() as counter:
        linear_attention(torch.zeros(B, N, D), *w, torch.zeros(N, k), torch.zeros(N, k), 2, torch.zeros(D_o, A), None)
    assert counter.executed == N * D * A + 2 * (k * N * D + k * D * A) + 2 * N * k * A + N * A * D_o


def test_counts_equal_the_framework_s_own_counter():
    from torch.utils.flop_counter import FlopCounterMode
    model = minidamage.build_model("manet", num_classes=2, body="resnet18").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as theirs, complexity.Counter() as ours:
        model.logits(torch.zeros(1, 3, 64, 64))
    assert 2 * ours.executed == theirs.get_total_flops()


def test_complexity_prints_the_paper_s_row_beside_ours(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(complexity, "SIDE", 64)
    monkeypatch.setattr(complexity, "PASSES", 1)
    assert evaluate.main(["--complexity", "pspnet", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content, printed = read(tmp_path / "complexity.json"), capsys.readouterr().out
    row = content["models"]["pspnet"]
    assert row["parameters"] == 24_300_993 and row["ms"] > 0 and "18.140" in printed and "24.260" in printed
    assert 2 * row["multiply-adds"] / 1e9 == pytest.approx(17.83 / 49, rel=0.02)                       # 448 is seven times 64
    if os.path.exists("/proc/self/status"):
        assert 80 < row["peak MB"] < 1500                                                              # the weights alone are 97 MB
