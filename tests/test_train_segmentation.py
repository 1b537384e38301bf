"""train.py with a segmenter: what a run leaves, exact resumes on a plateau schedule, signals, the threshold, every epoch kept, mistakes."""
import argparse
import csv
import json
import os
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import minidamage
import train
from minidamage import training, tuning, validation
from minidamage.checkpoint import load_checkpoint, read_checkpoint
from minidamage.config import Recipe
from minidamage.data.synthetic import make_demo
from minidamage.metrics.thresholds import ThresholdSweep
from test_train import only_run, same, start, stop_at

SMALL = ("body=resnet18", "image_size=64", "sequence_size=64", "attention_rank=4", "attention_heads=2", "feed_forward=8", "warmup_iters=0",
         "lr=0.003")
pytestmark = pytest.mark.usefixtures("narrow")
FILES = ["best.pt", "config.json", "curves.png", "first_batch.png", "last.pt", "metrics.csv", "split.json", "val_predictions.png"]


@pytest.fixture(scope="module")
def cracks(tmp_path_factory):
    """Twelve pictures of 72 x 56 pixels with a dark line on noise, and their masks: 9 to train, 1 to choose, 2 to report."""
    folder, rng = tmp_path_factory.mktemp("sets") / "cracks", np.random.default_rng(1)
    (folder / "images").mkdir(parents=True), (folder / "masks").mkdir()
    for i in range(12):
        y, x = np.mgrid[:56, :72]
        mask = np.abs(y - rng.uniform(10, 46) - rng.uniform(-0.5, 0.5) * (x - 36)) < 2
        picture = rng.integers(90, 160, (56, 72, 3), dtype=np.uint8)
        picture[mask] = 20
        Image.fromarray(picture).save(folder / "images" / f"road{i:02d}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"road{i:02d}.png")
    return folder


@pytest.fixture
def command(cracks, tmp_path):
    """command("--epochs", 2) -> the argument list of a tiny run into tmp_path."""
    def arguments(*more):
        sets = [word for setting in SMALL for word in ("--set", setting)]
        return [str(word) for word in ("--model", "context_cracknet", "--data", cracks, "--out", tmp_path, "--device", "cpu",
                                       "--batch-size", 3, *sets, *more)]
    return arguments


def test_a_run_leaves_everything(command, tmp_path, capsys):
    assert train.main(command("--epochs", 3, "--keep-epochs")) == 0
    folder, printed = only_run(tmp_path), capsys.readouterr().out
    assert os.path.basename(folder) == "context_cracknet-cracks-001" and f"python evaluate.py --test-epochs {folder}\n" in printed
    assert sorted(os.listdir(folder)) == sorted([*FILES, "epoch-001.pt", "epoch-002.pt", "epoch-003.pt"])
    assert all(Image.open(os.path.join(folder, name)).size[0] > 100 for name in FILES if name.endswith(".png"))
    rows = list(csv.DictReader(open(os.path.join(folder, "metrics.csv"), encoding="utf-8")))
    assert {"train/loss_bce", "train/loss_dice", "val/loss_dice", "val/pixel/IoU", "val/pixel/image/IoU"} <= rows[0].keys()
    assert float(rows[0]["val/loss"]) == pytest.approx(float(rows[0]["val/loss_bce"]) + float(rows[0]["val/loss_dice"]), rel=1e-4)
    config = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
    assert config["run"]["recipe"]["select_by"] == "loss" and config["run"]["recipe"]["schedule"] == "plateau"

    model, checkpoint = load_checkpoint(os.path.join(folder, "best.pt"))
    assert checkpoint["train"]["tuned"] and checkpoint["class_names"] == ["crack"] and model.config.image_size == 64
    threshold = checkpoint["thresholds"]["crack"]
    assert 0 < threshold < 1 and f"pixel threshold {threshold}, chosen on the validation part" in printed
    best = min(range(3), key=lambda k: float(rows[k]["val/loss"]))
    assert checkpoint["metrics"]["pixel/IoU"] == pytest.approx(float(rows[best]["val/pixel/IoU"]), rel=1e-4)
    assert f"best loss {float(rows[best]['val/loss']):.3f} in epoch {best + 1}; pixel/IoU 0." in printed
    assert f" at {threshold:g}, which best.pt uses: " in printed and "WARNING: 1 picture chooses best.pt" in printed
    assert "WARNING: 9 steps in all, 9 pictures in batches of 3: next to nothing is learned in so few; more --epochs" in printed
    assert "it differs from the paper's: body=resnet18 " in printed and "warm-up:" not in printed
    for k in range(3):
        kept, state = load_checkpoint(os.path.join(folder, f"epoch-{k + 1:03d}.pt"))
        assert state["train"] == {"epoch": k + 1} and state["metrics"]["loss"] == pytest.approx(float(rows[k]["val/loss"]), rel=1e-4)
        for mine, other in ((best, "best.pt"), (2, "last.pt")):
            if k == mine:
                assert same(kept.state_dict(), read_checkpoint(os.path.join(folder, other))["weights"])


def test_it_learns_and_the_numbers_are_the_evaluators(command, tmp_path):
    """Trained without augmentation for 12 epochs: the line is found on pictures that it has not seen."""
    plain = [word for field in ("hflip", "vflip", "rot90", "shift_scale_rotate", "noise", "brightness", "contrast", "saturation", "hue")
             for word in ("--set", f"{field}=0")]
    assert train.main(command("--epochs", 12, *plain, "--set", "dropout=0")) == 0
    folder = only_run(tmp_path)
    model, checkpoint = load_checkpoint(os.path.join(folder, "best.pt"))
    run = training.set_up(train.parse_arguments(command("--epochs", 1)))
    counts = np.zeros(3)
    for image, target in (run.val_set[i] for i in range(len(run.val_set))):
        assert image.shape == (3, 64, 64) and target["label_map"].shape == (64, 64)
        found = model.probabilities([image])[0][0] > 0.5
        truth = target["label_map"] == 1
        counts += [(found & truth).sum(), (found & ~truth).sum(), (~found & truth).sum()]
    assert checkpoint["metrics"]["pixel/IoU"] == pytest.approx(counts[0] / counts.sum()) and counts[0] / counts.sum() > 0.5


def test_several_classes(command, tmp_path, capsys):
    data = make_demo(str(tmp_path / "sets" / "cars"), images=10, size=64, seed=3, val_fraction=0.4)
    assert train.main(command("--epochs", 1, "--data", data, "--select", "any-damage/IoU", "--set", "score_train=1")) == 0
    folder, printed = only_run(tmp_path), capsys.readouterr().out
    assert "threshold " not in printed and "; best any-damage/IoU 0." in printed
    [row] = csv.DictReader(open(os.path.join(folder, "metrics.csv"), encoding="utf-8"))
    assert {"train/loss_ce", "val/any-damage/IoU", "train/any-damage/Dice"} <= row.keys()
    model, checkpoint = load_checkpoint(os.path.join(folder, "best.pt"))
    assert checkpoint["thresholds"] == {} and checkpoint["train"]["tuned"]
    assert validation.default_metric(model) == "pixel/mIoU"
    assert {"pixel/mIoU", "pixel/mDice", "any-damage/accuracy"} <= set(validation.metric_names(model)) & checkpoint["metrics"].keys()
    assert list(checkpoint["measured"]) == list(checkpoint["class_names"])
    assert model.head.out_channels == len(checkpoint["class_names"]) + 1 > 2


# --- stop and resume

@pytest.mark.parametrize("steps, validations, more", [
    ((2,), (), ()),                                                   # in the middle of an epoch
    ((5, 8), (2,), ("--ema", "0.9", "--workers", "1")),
], ids=["mid-epoch", "thrice, ema, worker"])
def test_stop_and_resume_on_a_plateau_equals_a_straight_run(command, tmp_path, monkeypatch, steps, validations, more):
    watch = train.watch_plateau
    monkeypatch.setattr(train, "watch_plateau", lambda state, recipe, loss: watch(state, recipe, 1.0))         # never a lower loss
    plateau = ("--epochs", 4, "--set", "plateau_patience=1", *more)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main(command(*plateau, "--out", straight)) == 0
    stop_at(monkeypatch, steps, validations)
    assert train.main(command(*plateau, "--out", stopped)) == 143
    stops = 1
    while train.main(["--resume", "--out", str(stopped)]) == 143:
        stops += 1
    assert stops == len(steps) + len(validations)
    for file in ("last.pt", "best.pt"):
        one, other = (read_checkpoint(os.path.join(only_run(folder), file)) for folder in (straight, stopped))
        assert all(same(one[key], other[key]) for key in ("weights", "metrics", "thresholds", "config"))
        one["train"].pop("rng", None), other["train"].pop("rng", None)
        assert same(one["train"], other["train"])
    history = read_checkpoint(os.path.join(only_run(stopped), "last.pt"))["train"]["history"]
    assert [row["lr"] for row in history] == [0.003, 0.003, 0.0015, 0.00075]


def test_plateau_by_hand():
    """Two epochs without a lower loss halve the rate; counting starts again then, and at each lower loss. An equal loss is not lower."""
    state, recipe, scales = training.State(), Recipe(schedule="plateau", plateau_patience=2, plateau_factor=0.5), []
    for loss in (1.0, 0.9, 0.9, 0.95, 0.95, 0.8, 0.85, 0.85, 0.82):
        train.watch_plateau(state, recipe, loss)
        scales.append(state.lr_scale)
    assert scales == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25] and state.lowest_loss == 0.8
    assert train.lr_at(7, 2, Recipe(schedule="plateau", lr=0.2, lr_batch_size=0, warmup_iters=0)) == 0.2
    train.watch_plateau(state, Recipe(schedule="constant"), 9.0)
    assert state.lr_scale == 0.25 and state.epochs_on_plateau == 1


def test_a_stop_while_the_threshold_is_chosen_is_said_and_resumed(command, tmp_path, monkeypatch, capsys):
    add, seen = ThresholdSweep.add, []

    def add_and_stop(self, *arguments, **named):
        seen.append(1)
        if len(seen) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, *arguments, **named)
    monkeypatch.setattr(ThresholdSweep, "add", add_and_stop)
    assert train.main(command("--epochs", 1, "--split", "50/25/25")) == 143
    folder = only_run(tmp_path)
    assert f"best.pt keeps 0.5; choose it with\n  python train.py --resume {folder}" in capsys.readouterr().out
    assert read_checkpoint(os.path.join(folder, "best.pt"))["thresholds"] == {}
    assert train.main(["--resume", folder]) == 0
    assert "epoch 2/" not in capsys.readouterr().out and read_checkpoint(os.path.join(folder, "best.pt"))["train"]["tuned"]


def test_ctrl_c_saves_and_says_how_to_go_on(command, tmp_path):
    process, _ = start(command("--epochs", 500), tmp_path)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130 and "Traceback" not in printed and f"python train.py --resume {only_run(tmp_path)}" in printed
    assert "optimizer" in read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]


def test_a_run_of_an_older_version_resumes_without_the_plateaus_counters(command, tmp_path):
    assert train.main(command("--epochs", 1)) == 0
    path = os.path.join(only_run(tmp_path), "last.pt")
    older = torch.load(path, weights_only=True)
    for name in ("lr_scale", "lowest_loss", "epochs_on_plateau"):
        del older["train"][name]
    torch.save(older, path)
    assert train.main(["--resume", path, "--epochs", "2"]) == 0
    fallen = read_checkpoint(path)
    assert fallen["train"]["lr_scale"] == 1.0
    fallen["train"]["lr_scale"] = 0.25
    for more, scale in ((["--epochs", "3"], 0.25), (["--epochs", "4", "--lr", "0.001"], 1.0)):        # a rate that is typed stands
        torch.save({**fallen, "train": {**fallen["train"], "lr_scale": 0.25}}, path)
        assert train.main(["--resume", path, *more]) == 0
        assert read_checkpoint(path)["train"]["lr_scale"] == scale


def test_a_copy_of_masks_under_another_name_resumes(command, cracks, tmp_path, capsys):
    """Of masks alone the one class is called after the folder: crack in cracks/, damage elsewhere."""
    assert train.main(command("--epochs", 1)) == 0
    folder, moved = only_run(tmp_path), shutil.copytree(cracks, tmp_path / "moved")
    assert train.main(["--resume", folder, "--epochs", "2", "--data", str(moved)]) == 0
    assert list(read_checkpoint(os.path.join(folder, "last.pt"))["class_names"]) == ["crack"]
    chosen = f"{cracks}/:" + ",".join(f"road{i:02d}" for i in range(11))
    assert train.main([*command("--epochs", 1, "--out", tmp_path / "chosen"), "--data", chosen]) == 0
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", only_run(tmp_path / "chosen"), "--draws", "0", "--worst", "0", "--device", "cpu"]) == 0
    assert f"test of {chosen}" in capsys.readouterr().out
    assert evaluate.main(["--checkpoint", only_run(tmp_path / "chosen"), "--draws", "0", "--device", "cpu", "--data", str(cracks)]) == 0
    assert f"test of {cracks}" in capsys.readouterr().out                                                     # the run's own pictures
    with pytest.raises(ValueError, match="expected a folder outside of the data set"):
        evaluate.check_out_folder(str(cracks / "out"), chosen)
    evaluate.check_out_folder(str(tmp_path / "out"), f"{cracks}:road")


# --- the threshold

def test_pixel_threshold_by_hand(capsys):
    sweep = ThresholdSweep()
    sweep.add(torch.tensor([[0.305, 0.4, 0.2, 0.1]]), torch.tensor([[1, 1, 0, 0]]))
    checkpoint = {"class_names": ["crack"], "thresholds": {}, "metrics": {"pixel/IoU": 0.0}}
    tuning.take_pixel_threshold(checkpoint, sweep.evaluate())
    assert checkpoint["thresholds"] == {"crack": 0.3} and "IoU 1.0000, against 0.0000 at 0.5" in capsys.readouterr().out
    assert checkpoint["measured"] == {"crack": {"precision": 1.0, "recall": 1.0}}
    empty = ThresholdSweep()
    empty.add(torch.zeros(1, 4), torch.tensor([[0, 0, 0, 1]]))
    tuning.take_pixel_threshold(checkpoint, empty.evaluate())
    assert checkpoint["thresholds"] == {"crack": 0.3} and "0.5, as it was" in capsys.readouterr().out
    everywhere = ThresholdSweep()
    everywhere.add(torch.full((1, 40), 0.475), torch.tensor([[1] * 3 + [0] * 37]))
    assert tuning.take_pixel_threshold(checkpoint, everywhere.evaluate()) == "pixel/IoU 0.075 at 0.47"
    assert "the model has not learned: at this threshold 100% of the pixels are positive, 7.5% are damage" in capsys.readouterr().out


def test_a_threshold_that_hangs_on_one_picture_says_so(capsys):
    sweep = ThresholdSweep()
    for _ in range(2):                                                                  # good from 0.3 on: below, four false pixels
        sweep.add(torch.tensor([[0.45] * 4 + [0.25] * 4]), torch.tensor([[1] * 4 + [0] * 4]))
    calm = sweep.evaluate()
    sweep.add(torch.full((1, 90), 0.85), torch.tensor([[0] * 90]))                      # a wall, all of it above what the cracks have
    sweep.add(torch.tensor([[0.95] * 9]), torch.tensor([[1] * 9]))
    result = sweep.evaluate()
    assert result.best()["threshold"] == 0.85 and calm.best()["threshold"] == 0.44      # nearest 0.5 among equals: 0.25 to 0.44
    assert result.best_without().tolist() == [0.85, 0.85, 0.44, 0.44]                   # without c.png nothing is above 0.85
    checkpoint = {"class_names": ["crack"], "thresholds": {}, "metrics": {"pixel/IoU": 0.0}}
    tuning.take_pixel_threshold(checkpoint, result, ["a.png", "b.png", "wall.png", "c.png"])
    assert "WARNING: the threshold hangs on one picture: without wall.png it would be 0.44; look at it" in capsys.readouterr().out
    tuning.take_pixel_threshold(checkpoint, calm, ["a.png", "b.png"])
    assert "hangs on" not in capsys.readouterr().out


def test_the_pictures_are_drawn_again_at_the_threshold_of_best_pt(command, tmp_path, monkeypatch):
    drawn, draw = [], train.draw_predictions
    monkeypatch.setattr(train, "draw_predictions", lambda path, shown, *more: (drawn.append((shown, more[-1])), draw(path, shown, *more)))
    assert train.main(command("--epochs", 1)) == 0
    model, checkpoint = load_checkpoint(os.path.join(only_run(tmp_path), "best.pt"))
    threshold = checkpoint["thresholds"]["crack"]
    assert [title for _, title in drawn] == [f"Validation, epoch 1, probability above {value}" for value in (0.5, threshold)]
    (before, _), (after, _) = drawn
    for (image, target, prediction), (_, again, _) in zip(after, before, strict=True):
        assert target["file"] == again["file"]
        torch.testing.assert_close(prediction["label_map"].bool(), model.probabilities([image], at="model")[0][0] > threshold)


# --- settings and mistakes

def test_size_moves_what_goes_with_it(command):
    config, _ = training.settle(argparse.Namespace(model="context_cracknet", data="x", set=[], size=240))
    assert (config.image_size, config.sequence_size) == (240, 256)
    config, _ = training.settle(argparse.Namespace(model="context_cracknet", data="x", set=[], size=0))
    assert (config.image_size, config.sequence_size) == (0, 448)
    config, recipe = training.settle(argparse.Namespace(model="context_cracknet", data="demo", set=[]))
    assert config.image_size == config.sequence_size == 160 and recipe.schedule == "cosine" and recipe.vflip == 0


def test_size_0_takes_each_picture_at_its_own_size(cracks, tmp_path, capsys):
    """In batches as long as all pictures have one size, else one at a time."""
    def run(data, out, batch_size):
        return train.main(["--model", "unet", "--data", str(data), "--out", str(out), "--device", "cpu", "--epochs", "1", "--size", "0",
                           "--batch-size", str(batch_size), "--set", "body=resnet18", "--set", "warmup_iters=0"])
    assert run(cracks, tmp_path / "a", 3) == 0
    model, checkpoint = load_checkpoint(os.path.join(only_run(tmp_path / "a"), "best.pt"))
    assert model.config.image_size == 0
    shutil.copytree(cracks, tmp_path / "cracks")
    for part in ("images", "masks"):
        for file in sorted((tmp_path / "cracks" / part).iterdir())[::2]:
            Image.open(file).crop((0, 0, 40, 56)).save(file)
    assert run(tmp_path / "cracks", tmp_path / "b", 3) == 2
    assert "expected pictures of one size in batches of 3, got 40x56, 72x56; type --batch-size 1" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "b") and run(tmp_path / "cracks", tmp_path / "b", 1) == 0


def test_out_of_memory_names_the_size(command, tmp_path, monkeypatch, capsys):
    def greedy(self, images, targets=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(minidamage.MODELS["context_cracknet"][0], "forward", greedy)
    assert train.main(command("--epochs", 1)) == 1
    assert "--size 64 --batch-size 3" in capsys.readouterr().err


@pytest.mark.parametrize("more, message", [
    (("--select", "pixel/IuO"), "did you mean 'pixel/IoU'"),
    (("--select", "segm/AP"), "there is no 'segm/AP'"),
    (("--set", "schedule=plateu"), "did you mean 'plateau'"),
    (("--set", "plateau_factor=1"), "plateau_factor: expected above 0 and below 1, got 1.0"),
    (("--set", "plateau_patience=0"), "plateau_patience: expected 1 or more"),
    (("--set", "hue=0.9"), "hue: expected from 0 to 0.5"),
    (("--size", "16"), "--size: expected 32 pixels or more, or of a segmenter 0 (each picture's own size), got 16"),
    (("--model", "danet", "--size", "0"), "--size: expected 32 pixels or more, got 0; each picture at its own size is for segmentation"),
    (("--set", "sequence_size=50"), "sequence_size: expected a multiple of 32"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_in_the_command(command, tmp_path, capsys, more, message):
    arguments = command(*more)
    assert train.main(arguments) == 2
    assert message in (printed := capsys.readouterr().err) and "Traceback" not in printed
    assert [name for name in os.listdir(tmp_path) if name.startswith(("context", "damagenet"))] == []


def test_odd_names_train_and_are_typed_as_a_shell_wants_them(command, cracks, tmp_path, capfd):
    """Spaces and quotes in the commands to type next; a name that is no UTF-8, as old archives unpack, from split.json to the report."""
    data = tmp_path / 'my "data"'
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
        for file in (cracks / folder).iterdir():
            (data / folder / os.fsdecode(file.stem.encode() + b" caf\xe9.png")).write_bytes(file.read_bytes())
    assert train.main(command("--data", data, "--epochs", 1)) == 0
    folder, printed = only_run(tmp_path), capfd.readouterr().out
    best, picture = os.path.join(folder, "best.pt"), next(line for line in printed.splitlines() if "python predict.py" in line)
    assert shlex.split(picture)[-2:] == ["--checkpoint", best] and "my \"data\"/images/" in shlex.split(picture)[2]
    with open(os.path.join(folder, "split.json"), encoding="utf-8") as file:
        assert all(name.endswith("\udce9.png") for name in json.load(file)["train"])
    assert evaluate.main(["--checkpoint", best, "--device", "cpu"]) == 0


def test_a_detector_wants_objects(cracks, tmp_path, capsys):
    assert train.main(["--data", str(cracks), "--out", str(tmp_path), "--device", "cpu"]) == 2
    printed = capsys.readouterr().err
    assert "9 of 9 in the train part and 1 of 1 in the val part; train a segmentation model on them, such as --model unet" in printed


def test_masks_that_are_all_background(command, cracks, tmp_path, capsys):
    dark = tmp_path / "sets" / "dark"
    for name in ("images", "masks"):
        (dark / name).mkdir(parents=True)
    for i in range(6):
        (dark / "images" / f"{i}.png").write_bytes((cracks / "images" / f"road{i:02d}.png").read_bytes())
        Image.fromarray(np.zeros((56, 72), np.uint8)).save(dark / "masks" / f"{i}.png")
    assert train.main(command("--data", dark, "--split", "40/30/30")) == 2
    printed = capsys.readouterr().err
    assert "expected damage to learn from in the train part, got 2 pictures without any" in printed and "Traceback" not in printed
