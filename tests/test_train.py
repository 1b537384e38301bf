"""train.py: a run leaves what it promises, stop + resume equals a straight run bit by bit, and mistakes get a sentence, not a traceback."""
import argparse
import concurrent.futures
import csv
import io
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import evaluate
import minidamage
import train
from minidamage import run_folder, training, tuning
from minidamage.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint
from minidamage.config import Recipe
from minidamage.data import load_dataset
from minidamage.data.split import three_parts
from minidamage.data.synthetic import make_demo
from minidamage.models.danet import settled
from minidamage.progress import Progress, clock
from minidamage.visualize.plots import read_metrics

pytestmark = pytest.mark.usefixtures("narrow")
REPOSITORY = os.path.dirname(os.path.abspath(train.__file__))
SMALL = ("body=resnet18", "norm=batch", "min_size=48", "max_size=64", "fpn=false", "fpn_channels=8", "rpn_channels=8",
         "anchor_sizes=8,16,32", "rpn_pre_nms_top_n_train=20", "rpn_pre_nms_top_n_test=20", "rpn_post_nms_top_n_train=20",
         "rpn_post_nms_top_n_test=10",
         "rpn_batch_size_per_image=16", "box_head_channels=16", "box_batch_size_per_image=8", "box_detections_per_img=5",
         "mask_layers=8", "mask_dim_reduced=8", "context_rates=1,2", "warmup_iters=2", "lr=0.02", "lr_batch_size=0", "optimizer=sgd")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Ten drawn pictures of 64 x 48 pixels in VehiDE's layout: 6 to train, 2 to choose, 2 to report."""
    return make_demo(str(tmp_path_factory.mktemp("demo") / "cars"), images=10, size=64, seed=3, val_fraction=0.4)


@pytest.fixture
def command(data, tmp_path):
    """command("--epochs", 2) -> the argument list of a tiny run into tmp_path."""
    def arguments(*more, settings=SMALL):
        sets = [word for setting in settings for word in ("--set", setting)]
        return [str(word) for word in ("--data", data, "--out", tmp_path, "--device", "cpu", "--batch-size", 2, *sets, *more)]
    return arguments


def only_run(tmp_path):
    folders = [entry.path for entry in os.scandir(tmp_path) if entry.is_dir() and os.path.exists(os.path.join(entry.path, "config.json"))]
    assert len(folders) == 1
    return folders[0]


# --- a run

def test_a_run_leaves_everything(command, data, tmp_path, capsys):
    assert train.main(command("--epochs", 2)) == 0
    folder = only_run(tmp_path)
    assert os.path.basename(folder) == "damagenet-cars-001"
    assert sorted(os.listdir(folder)) == ["best.pt", "config.json", "curves.png", "first_batch.png", "last.pt", "metrics.csv", "split.json",
                                          "val_predictions.png"]
    config = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))
    assert config["model"] == "damagenet" and config["config"]["fpn_channels"] == 8 and config["run"]["recipe"]["lr"] == 0.02
    assert {"commands", "args", "seed", "commit", "versions", "kernels", "hardware", "data", "layout"} <= config["run"].keys()
    split = json.load(open(os.path.join(folder, "split.json"), encoding="utf-8"))
    files = [file for part in ("train", "val", "test") for file in split[part]]
    assert len(files) == len(set(files)) == 10 and not os.path.isabs(files[0])
    rows = list(csv.DictReader(open(os.path.join(folder, "metrics.csv"), encoding="utf-8")))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"lr", "train/loss", "train/loss_mask", "val/loss", "val/loss_mask", "val/bbox/AP", "val/segm/AP50", "seconds"} <= rows[0].keys()
    terms = [float(value) for name, value in rows[0].items() if name.startswith("train/loss_")]
    assert float(rows[0]["train/loss"]) == pytest.approx(sum(terms), rel=1e-4)

    model, checkpoint = load_checkpoint(os.path.join(folder, "best.pt"))
    assert not model.training and checkpoint["class_names"] == config["class_names"] and checkpoint["split"] == split
    assert set(checkpoint["thresholds"]) <= set(checkpoint["class_names"]) and "optimizer" not in checkpoint["train"]
    assert checkpoint["config"]["mask_threshold"] in tuning.MASK_THRESHOLDS
    assert all(numbers.keys() == {"precision", "recall"} for numbers in checkpoint["measured"].values())
    assert list(checkpoint["measured"]) == list(checkpoint["class_names"])
    assert isinstance(model([torch.zeros(3, 48, 64, dtype=torch.uint8)])[0]["boxes"], torch.Tensor)
    printed = capsys.readouterr().out
    example = os.path.join(load_dataset(data, quiet=True).path, split["test"][0])                  # of pictures that chose nothing
    assert "python evaluate.py" in printed and f"python predict.py {example} --checkpoint" in printed and "val_predictions.png" in printed


def test_kept_epochs_are_scored_again_as_they_were_validated(command, tmp_path):
    assert train.main(command("--epochs", 2, "--keep-epochs")) == 0
    folder = only_run(tmp_path)
    assert evaluate.main(["--test-epochs", folder, "--device", "cpu"]) == 0
    validated, again = (read_metrics(os.path.join(folder, name)) for name in ("metrics.csv", "test-epochs.csv"))
    assert len(again["epoch"]) == 2 and {"loss", "bbox/AP", "segm/AP50"} <= again.keys()
    for name, values in again.items():
        assert values == pytest.approx(validated[name if name == "epoch" else f"val/{name}"], nan_ok=True), name


def test_what_is_typed_next_works_without_a_test_part(command, tmp_path, capsys):
    assert train.main(command("--epochs", 1, "--split", "60/40/0")) == 0
    typed = next(line for line in capsys.readouterr().out.splitlines() if "python evaluate.py" in line)
    assert typed.endswith("--part val    # there is no test part: these pictures chose best.pt")
    words = shlex.split(typed.partition("evaluate.py")[2], comments=True)
    assert evaluate.main([*words, "--device", "cpu", "--draws", "0"]) == 0


def test_limit_patience_and_select(command, data, tmp_path, monkeypatch, capsys):
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda run, *more: {**validate(run, *more), "loss": 1.0 + run.state.epoch})
    assert train.main(command("--epochs", 6, "--limit", 0.5, "--patience", 2, "--select", "val/loss")) == 0
    folder = only_run(tmp_path)
    split = json.load(open(os.path.join(folder, "split.json"), encoding="utf-8"))
    whole = three_parts(load_dataset(data, quiet=True), seed=0)
    assert len(split["train"]) == 3 and len(split["test"]) == len(whole["test"])          # test is never cut
    history = read_checkpoint(os.path.join(folder, "last.pt"))["train"]["history"]
    assert read_checkpoint(os.path.join(folder, "best.pt"))["train"]["epoch"] == 1            # none after the first had a lower loss
    assert len(history) == 3 and "stopped early" in capsys.readouterr().out


def test_anchors_from_the_boxes_are_said_kept_and_resumed(command, tmp_path, capsys):
    settings = [setting for setting in SMALL if not setting.startswith("anchor_sizes")]
    assert train.main(command("--epochs", 1, "--anchors", "auto", settings=settings)) == 0
    folder = only_run(tmp_path)
    kept = json.load(open(os.path.join(folder, "config.json"), encoding="utf-8"))["config"]
    said = capsys.readouterr().out
    assert f"sizes {', '.join(map(str, kept['anchor_sizes']))} px" in said and "mean best IoU" in said
    assert kept["anchor_sizes"] != list(minidamage.MODELS["damagenet"][1]().anchor_sizes) and len(kept["aspect_ratios"]) == 3
    model, _ = load_checkpoint(os.path.join(folder, "best.pt"))
    assert list(model.rpn.anchor_generator.sizes[0]) == kept["anchor_sizes"]
    assert train.main(["--resume", folder, "--epochs", "2"]) == 0
    assert read_checkpoint(os.path.join(folder, "last.pt"))["config"]["anchor_sizes"] == tuple(kept["anchor_sizes"])


@pytest.mark.parametrize("more, message", [
    (("--anchors", "auto"), "--anchors auto chooses what --set anchor_sizes=8,16,32 states"),
    (("--anchors", "auto", "--model", "unet"), "--anchors auto: unet has no anchors")])
def test_anchors_that_cannot_be_chosen(command, capsys, more, message):
    settings = SMALL if "unet" not in more else ()
    assert train.main(command(*more, settings=settings)) == 2 and message in capsys.readouterr().err


def test_another_seed_keeps_the_split_and_another_split_seed_does_not(command, tmp_path):
    def split(*more):
        run = training.set_up(train.parse_arguments(command("--split", "50/25/25", "--limit", "0.8", *more)))
        return run.identity["split"], run.model.state_dict()["roi_heads.box_predictor.cls_score.weight"]
    (first, weights), (same_split, other_weights), (other, _) = split(), split("--seed", 1), split("--split-seed", 1)
    assert first == same_split != other and not torch.equal(weights, other_weights)


# --- stop and resume

@pytest.fixture
def determinism_ends():
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def same(a, b):
    """Equal bit by bit, through nested dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a if key != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b or (a != a and b != b)                              # NaN: AP of a class without truth


def stop_at(monkeypatch, steps, validations=()):
    """Sends SIGTERM to this process in the n-th step or the n-th validation picture, counted over all runs of the test."""
    counts = {"step": 0, "picture": 0}
    check_losses, add_picture = train.check_losses, train.add_picture

    def counted(kind, where, function):
        def call(*arguments):
            counts[kind] += 1
            if counts[kind] in where:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)
        return call
    monkeypatch.setattr(train, "check_losses", counted("step", steps, check_losses))
    for module in (train, tuning):
        monkeypatch.setattr(module, "add_picture", counted("picture", validations, add_picture))


@pytest.mark.parametrize("steps, validations, more", [
    ((2,), (), ()),                                                   # in the middle of an epoch
    ((3,), (), ("--ema", "0.9")),                                     # after an epoch's last step, before its validation
    ((1, 5), (), ("--set", "optimizer=adamw", "--set", "rotate=10", "--workers", "1")),
    ((), (1, 4), ("--set", "schedule=cosine", "--clip", "1")),        # during validation
    ((2,), (), ("--amp", "bf16", "--deterministic")),
], ids=["mid-epoch", "ema, last step", "twice, adamw, worker", "validation", "bf16, deterministic"])
@pytest.mark.usefixtures("determinism_ends")
def test_stop_and_resume_equals_a_straight_run(command, tmp_path, monkeypatch, capsys, steps, validations, more):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert train.main(command("--epochs", 2, *more, "--out", straight)) == 0
    stop_at(monkeypatch, steps, validations)
    assert train.main(command("--epochs", 2, *more, "--out", stopped)) == 143
    assert f"python train.py --resume {only_run(stopped)}" in capsys.readouterr().out
    stops = 1
    while train.main(["--resume", "--out", str(stopped)]) == 143:
        stops += 1
    assert stops == len(steps) + len(validations)
    for file in ("last.pt", "best.pt"):
        one, other = (read_checkpoint(os.path.join(only_run(folder), file)) for folder in (straight, stopped))
        assert all(same(one[key], other[key]) for key in ("weights", "metrics", "thresholds", "config"))
        one["train"].pop("rng", None), other["train"].pop("rng", None)               # numpy and Python are not drawn from
        assert same(one["train"], other["train"])


@pytest.mark.parametrize("model, settings", [("damagenet", SMALL), ("unet", ("body=resnet18", "image_size=64"))])
def test_a_compiled_run_is_the_same_run(command, tmp_path, monkeypatch, model, settings):
    """Through torch.compile with a backend that runs the graphs as they are; weights, numbers and names are those of a plain run."""
    graphs, trained = [], []
    monkeypatch.setattr(training, "COMPILER", lambda graph, inputs: graphs.append(graph) or graph.forward)
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *arguments: trained.append(len(graphs)) or validate(*arguments))
    arguments = ("--model", model, "--epochs", 1)
    assert train.main(command(*arguments, "--out", tmp_path / "plain", settings=settings)) == 0 and not graphs
    assert train.main(command(*arguments, "--compile", "--out", tmp_path / "compiled", settings=settings)) == 0
    assert len(graphs) == trained[1] > 0                              # validation compiled nothing
    one, other = (read_checkpoint(os.path.join(only_run(tmp_path / name), "last.pt")) for name in ("plain", "compiled"))
    assert same(one["weights"], other["weights"]) and same(one["train"]["history"], other["train"]["history"])


def test_compile_without_a_compiler_is_a_sentence(command, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert train.main(command("--epochs", 1, "--compile")) == 2
    assert "--compile: expected a C++ compiler, which torch.compile builds with, got none" in capsys.readouterr().err


def test_a_stop_while_the_mask_threshold_is_chosen_is_said(command, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, (), (3,))                                    # two pictures are validated, the third is the first to tune on
    assert train.main(command("--epochs", 1)) == 143
    folder = only_run(tmp_path)
    assert f"best.pt keeps 0.5; choose it with\n  python train.py --resume {folder}" in capsys.readouterr().out


@pytest.mark.parametrize("more", [(), ("--set", "mask_threshold=0.6"), ("--patience", 1, "--set", "lr=1e-12", "--epochs", 9)],
                         ids=["chosen", "given", "stopped early"])
def test_a_run_killed_before_the_mask_threshold_resumes_there(command, tmp_path, monkeypatch, capsys, more):
    tune = train.tune_threshold
    monkeypatch.setattr(train, "tune_threshold", lambda *arguments: sys.exit("killed"))
    with pytest.raises(SystemExit, match="killed"):
        train.main(command("--epochs", 1, *more))
    folder = only_run(tmp_path)
    epochs = read_checkpoint(os.path.join(folder, "last.pt"))["train"]["epoch"]
    assert epochs < 9
    monkeypatch.setattr(train, "tune_threshold", tune)
    capsys.readouterr()
    assert train.main(["--resume", folder]) == 0
    printed = capsys.readouterr().out
    assert f"epoch {epochs + 1}/" not in printed and "python evaluate.py --checkpoint" in printed          # not a step more
    assert read_checkpoint(os.path.join(folder, "best.pt"))["train"]["tuned"] is True
    assert read_checkpoint(os.path.join(folder, "last.pt"))["train"]["epoch"] == epochs
    if "--patience" not in more:
        assert train.main(["--resume", folder]) == 2
        assert "has done its 1 epoch;" in capsys.readouterr().err


def test_mask_threshold_by_hand(capsys):
    def result(ap):
        return argparse.Namespace(stats={"segm/AP": ap}, best_thresholds=lambda: {"dent": ap}, measured=lambda thresholds: (ap, thresholds))
    checkpoint = {"config": {"mask_threshold": 0.5}, "thresholds": {}, "metrics": {"loss": 1.0, "segm/AP": 0.1}}
    tuning.take_mask_threshold(checkpoint, {0.3: result(0.0), 0.4: result(0.25), 0.5: result(0.1), 0.7: result(0.25)}, default=0.5)
    assert checkpoint == {"config": {"mask_threshold": 0.4}, "thresholds": {"dent": 0.25}, "measured": (0.25, {"dent": 0.25}),
                          "metrics": {"loss": 1.0, "segm/AP": 0.25}}
    assert "mask threshold 0.4, " in (printed := capsys.readouterr().out) and "0.3 0.0000, 0.4 0.2500, 0.5 0.1000, 0.7 0.2500" in printed
    tuning.take_mask_threshold(checkpoint, {0.3: result(0.0), 0.5: result(math.nan)}, default=0.5)
    assert checkpoint["config"]["mask_threshold"] == 0.4 and "as it was" in capsys.readouterr().out


def test_resume_from_another_folder(command, data, tmp_path, monkeypatch):
    monkeypatch.chdir(os.path.dirname(data))
    assert train.main(command("--epochs", 1, "--data", os.path.basename(data))) == 0
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume", only_run(tmp_path), "--epochs", "2"]) == 0


def test_resume_at_the_end_of_an_epoch_with_more_epochs(command, tmp_path):
    constant = ("--set", "schedule=constant", "--set", "warmup_iters=0")
    assert train.main(command("--epochs", 2, *constant, "--out", tmp_path / "a")) == 0
    assert train.main(command("--epochs", 1, *constant, "--out", tmp_path / "b")) == 0
    assert train.main(["--resume", only_run(tmp_path / "b"), "--epochs", "2"]) == 0
    one, other = (read_checkpoint(os.path.join(only_run(tmp_path / name), "last.pt")) for name in "ab")
    assert same(one["weights"], other["weights"]) and same(one["train"]["history"], other["train"]["history"])
    assert len(other["run"]["commands"]) == len(other["run"]["commits"]) == 2


SLOW_TO_SAVE = f"""
import sys, time
sys.path.insert(0, {REPOSITORY!r})
import train
save = train.save
train.save = lambda run, *rest: (time.sleep(100) if run.state.step else None) or save(run, *rest)   # the save that Ctrl-C asks for
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_trainings_never_write_into_one_run(command, tmp_path, capsys):
    assert train.main(command("--epochs", 1)) == 0
    folder = only_run(tmp_path)
    with run_folder.claim(folder):
        assert train.main(["--resume", folder, "--epochs", "2"]) == 2
        with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
            assert json.load(file)["run"]["recipe"]["epochs"] == 1            # of the training that holds it
        assert "another process is training this run" in capsys.readouterr().err
    assert train.main(["--resume", folder, "--epochs", "2"]) == 0
    assert f"resuming {folder} after epoch 1, step 0, of 2 epochs" in capsys.readouterr().out


def start(arguments, tmp_path, program=(os.path.join(REPOSITORY, "train.py"),)):
    """train.py in a process of its own, past its first step."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *program, *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path)
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch 1/"):
            return process, lines
    raise AssertionError("".join(lines))


def test_ctrl_c_saves_and_says_how_to_go_on(command, tmp_path):
    process, _ = start(command("--epochs", 500), tmp_path)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 130, printed
    assert "stopping after this step" in printed and "Traceback" not in printed
    assert f"python train.py --resume {only_run(tmp_path)}" in printed
    assert "optimizer" in read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]


def test_second_ctrl_c_exits_at_once_and_last_pt_stays_whole(command, tmp_path):
    process, _ = start(command("--epochs", 500), tmp_path, ("-c", SLOW_TO_SAVE))
    process.send_signal(signal.SIGINT)
    next(line for line in process.stdout if line.startswith("stopping after this step"))          # two at once may arrive as one
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "stopped at once" in printed and "Traceback" not in printed and "go on" not in printed
    assert "optimizer" in read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]


# --- things that break in the middle

def test_loss_that_is_not_finite(command, tmp_path, monkeypatch, capsys):
    forward, calls = minidamage.MODELS["damagenet"][0].forward, []

    def broken(self, images, targets=None):
        losses = forward(self, images, targets)
        if self.training:
            calls.append([target["file"] for target in targets])
            if len(calls) == 5:
                losses["loss_mask"] = losses["loss_mask"] * math.nan
        return losses
    monkeypatch.setattr(minidamage.MODELS["damagenet"][0], "forward", broken)
    assert train.main(command("--epochs", 3)) == 1
    printed = capsys.readouterr().err
    assert "loss_mask = nan in epoch 2, step 2" in printed and all(file in printed for file in calls[4])
    state = read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))
    lower = train.base_rate(Recipe(**state["run"]["recipe"])) / 4                   # what the schedule begins from, not a step's rate
    assert f" --resume {only_run(tmp_path)} --lr {lower:.3g} --clip" in printed
    assert state["train"]["epoch"] == 1 and state["train"]["step"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in state["weights"].values())
    monkeypatch.undo()
    assert train.main(["--resume", only_run(tmp_path), "--lr", "0.001", "--clip", "10"]) == 0


def test_weights_that_break_in_the_last_step_of_an_epoch_are_never_saved(command, tmp_path, monkeypatch, capsys):
    validate = train.validate

    def poisoned(run, *arguments):
        if run.state.epoch == 1:
            with torch.no_grad():
                run.model.roi_heads.box_predictor.cls_score.weight.fill_(math.nan)
        return validate(run, *arguments)
    monkeypatch.setattr(train, "validate", poisoned)
    assert train.main(command("--epochs", 3)) == 1
    printed = capsys.readouterr().err
    assert "loss_classifier = nan in epoch 2, validation" in printed and "the one saved before" in printed
    for file in ("last.pt", "best.pt"):
        state = read_checkpoint(os.path.join(only_run(tmp_path), file))
        assert state["train"]["epoch"] == 1 and all(torch.isfinite(tensor).all() for tensor in state["weights"].values())


def test_weights_that_are_broken_already_leave_the_older_checkpoint(command, tmp_path, monkeypatch, capsys):
    forward, calls = minidamage.MODELS["damagenet"][0].forward, []

    def poisoned(self, images, targets=None):
        if self.training:
            calls.append(1)
            if len(calls) == 5:
                with torch.no_grad():
                    self.roi_heads.box_predictor.cls_score.weight.fill_(math.inf)
        return forward(self, images, targets)
    monkeypatch.setattr(minidamage.MODELS["damagenet"][0], "forward", poisoned)
    assert train.main(command("--epochs", 3)) == 1
    assert "weights     no longer finite" in capsys.readouterr().err
    state = read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))
    assert state["train"]["epoch"] == 1 and state["train"]["step"] == 0
    assert all(torch.isfinite(tensor).all() for tensor in state["weights"].values())


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand a page more"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_out_of_memory_says_how_to_go_on(command, tmp_path, monkeypatch, capsys, error):
    forward, calls = minidamage.MODELS["damagenet"][0].forward, []

    def greedy(self, images, targets=None):
        calls.append(self.training)
        if sum(calls) == 5:
            raise error
        return forward(self, images, targets)
    monkeypatch.setattr(minidamage.MODELS["damagenet"][0], "forward", greedy)
    assert train.main(command("--epochs", 2)) == 1
    printed, folder = capsys.readouterr().err, only_run(tmp_path)
    assert "out of memory in epoch 2, step 2" in printed and "a page more" not in printed and f"{folder}/last.pt is good" in printed
    assert f"--resume {folder} --amp bf16" in printed and "--size 48 --batch-size 2" in printed and "--workers" not in printed
    monkeypatch.undo()
    assert train.main(["--resume", folder, "--amp", "bf16"]) == 0


def test_workers_end_with_the_run(command, monkeypatch):
    """In torch's own order, before StopSignal ends those that an error left behind."""
    left, end = [], train.StopSignal.__exit__
    monkeypatch.setattr(train.StopSignal, "__exit__",
                        lambda self, *exception: (left.append(multiprocessing.active_children()), end(self, *exception))[1])
    assert train.main(command("--epochs", 2, "--workers", 1)) == 0
    assert left == [[]]


@pytest.mark.parametrize("workers", (0, 1))
def test_pictures_that_go_away_during_a_run(command, data, tmp_path, monkeypatch, capsys, workers):
    shutil.copytree(data, tmp_path / "mine")
    introduce = train.introduce

    def lose(run):
        introduce(run)
        for record in run.train_set.records:
            open(record.file, "wb").close()
    monkeypatch.setattr(train, "introduce", lose)
    assert train.main(command("--epochs", 1, "--data", tmp_path / "mine", "--workers", workers)) == 1
    printed = capsys.readouterr().err
    assert "training cannot go on in epoch 1, step 1: " in printed and "none of the 6 pictures can be read" in printed
    assert f"python train.py --resume {only_run(tmp_path)}" in printed and "Traceback" not in printed


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")                     # a loader that torch takes for crashed
def test_a_fault_of_the_code_is_not_dressed_up_and_leaves_no_process(command, monkeypatch):
    monkeypatch.setattr(train, "check_losses", lambda *arguments: exec("raise RuntimeError('mat1 and mat2 shapes cannot be multiplied')"))
    with pytest.raises(RuntimeError, match="mat1"):
        train.main(command("--epochs", 1, "--workers", 1))
    assert not multiprocessing.active_children()                      # they ignore SIGTERM: Python would wait for them at exit


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk_in_mid_run_keeps_training_and_the_older_file(command, tmp_path, monkeypatch, capsys):
    finish_epoch = train.finish_epoch

    def full_disk(run, *arguments):
        if run.state.epoch == 1:
            os.symlink("/dev/full", run.path("last.pt.partial"))      # "No space left on device" for one save
        return finish_epoch(run, *arguments)
    monkeypatch.setattr(train, "finish_epoch", full_disk)
    assert train.main(command("--epochs", 3)) == 0
    printed = capsys.readouterr().err
    assert "No space left" in printed and "last.pt is whole" in printed
    assert len(read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]["history"]) == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_best_epoch_that_found_no_room_is_not_called_the_best(command, tmp_path, monkeypatch, capsys):
    """In the first two epochs best.pt cannot be written; the third, worse than they are, is what is kept and said."""
    finish_epoch, validate = train.finish_epoch, train.validate

    def full_disk(run, *arguments):
        partial = run.path("best.pt.partial")
        if run.state.epoch < 2:
            os.symlink("/dev/full", partial)
        return finish_epoch(run, *arguments)
    monkeypatch.setattr(train, "finish_epoch", full_disk)
    monkeypatch.setattr(train, "validate", lambda run, *rest: {**validate(run, *rest), "loss": 1.0 + run.state.epoch})
    assert train.main(command("--epochs", 3, "--select", "loss")) == 0
    checkpoint = read_checkpoint(os.path.join(only_run(tmp_path), "best.pt"))
    printed = capsys.readouterr().out
    assert checkpoint["train"]["epoch"] == 3 and "best loss 3.000 in epoch 3" in printed
    lines = [line for line in printed.splitlines() if "  val loss " in line]
    assert [line.endswith("  best loss") for line in lines] == [False, False, True]


def test_a_best_pt_that_is_gone_is_said_and_made_again(command, tmp_path, capsys):
    assert train.main(command("--epochs", 1)) == 0
    best = os.path.join(only_run(tmp_path), "best.pt")
    os.remove(best)
    assert train.main(["--resume", os.path.dirname(best), "--epochs", "2", "--lr", "1e-9"]) == 0
    assert "best.pt is not there any more" in capsys.readouterr().out and read_checkpoint(best)["train"]["epoch"] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk_at_the_start_is_found_before_training(command, tmp_path, monkeypatch, capsys):
    new_run_folder = run_folder.new_run_folder

    def on_a_full_disk(*arguments):
        folder = new_run_folder(*arguments)
        os.symlink("/dev/full", os.path.join(folder, "last.pt.partial"))
        return folder
    monkeypatch.setattr(run_folder, "new_run_folder", on_a_full_disk)
    assert train.main(command("--epochs", 1)) == 1
    assert "No space left" in capsys.readouterr().err


# --- mistakes in the command

@pytest.mark.parametrize("more, message", [
    (("--model", "damagent"), "did you mean 'damagenet'"),
    (("--data", "/no/such/folder"), "no such file or folder"),
    (("--limit", "1.5"), "--limit: expected a fraction above 0, at most 1, got 1.5"),
    (("--limit", "0"), "--limit: expected a fraction above 0"),
    (("--epochs", "0"), "epochs: expected 1 or more, got 0"),
    (("--batch-size", "-1"), "batch_size: expected 1 or more"),
    (("--set", "batch_size=0"), "batch_size: expected 1 or more, got 0"),
    (("--set", "lr=nan"), "lr: expected a number above 0, got nan"),
    (("--ema", "1.5"), "ema_decay: expected 0 (off) or a decay below 1"),
    (("--set", "hflip=3"), "hflip: expected from 0 to 1"),
    (("--split", "70/15"), "--split expects three shares like 70/15/15"),
    (("--split", "70/0/30"), "expected pictures in the val part, got none"),
    (("--amp", "fp16"), "--amp fp16 needs a GPU"),
    (("--device", "gpu"), "--device gpu: expected cpu, or cuda or cuda:N"),
    (("--device", "cuda:99"), "--device cuda:99: expected cpu, or cuda or cuda:N"),
    (("--select", "segm/AP5"), "did you mean 'segm/AP"),
    (("--set", "rpn_nms_tresh=0.5"), "did you mean 'rpn_nms_thresh'"),
    (("--set", "gama=0.5"), "did you mean 'gamma'"),
    (("--set", "rpn_nms_thresh"), "expects field=value"),
    (("--set", "rpn_nms_thresh=high"), "expected float, got 'high'"),
    (("--set", "anchor_sizes="), "anchor_sizes: expected one or more numbers above 0"),
    (("--set", "schedule=cosin"), "did you mean 'cosine'"),
    (("--set", "optimizer=sdg"), "did you mean 'sgd'"),
    (("--pretrained", "resnet50.pth"), "torchvision's ResNet-50: https://download.pytorch.org/models/resnet50-11ad3fa6.pth"),
    (("--out", __file__), "test_train.py: expected a folder, this is a file"),
    (("--resume", "no-such-run"), "no such file or folder, expected a run folder or a .pt file"),
    (("--resume",), "expected a run with last.pt"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_mistakes_in_the_command(command, tmp_path, capsys, more, message):
    given = ["--out", str(tmp_path), *more] if "--resume" in more else command(*more)
    assert train.main(given) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.startswith("train.py: ")
    assert not any(entry.name.startswith("damagenet") for entry in os.scandir(tmp_path))                  # nothing was begun


def test_a_set_without_objects_is_refused(command, tmp_path, capsys):
    pictures = make_demo(str(tmp_path / "cars"), images=4, size=64, val_fraction=0.5)
    for name in ("0Train_via_annos.json", "0Val_via_annos.json"):
        content = json.load(open(os.path.join(pictures, name), encoding="utf-8"))
        with open(os.path.join(pictures, name), "w", encoding="utf-8") as file:
            json.dump({key: {**entry, "regions": []} for key, entry in content.items()}, file)
    assert train.main(command("--data", pictures)) == 2
    assert "expected damage to learn from in the train part, got 2 pictures without any" in capsys.readouterr().err


def test_boxes_without_outlines(command, data, tmp_path, capsys):
    """Alone they cannot teach masks, and that is said before the first step; in the val part, beside outlines, they are their masks."""
    pictures = os.path.join(data, "image", "image")
    names = sorted(os.listdir(pictures))[:6]

    def coco(part, files, outline):
        shape = {"bbox": [10, 10, 30, 20], **({"segmentation": [[10, 10, 40, 10, 40, 30, 10, 30]]} if outline else {})}
        content = {"images": [{"id": i, "file_name": os.path.join(pictures, name), "width": 64, "height": 48} for i, name in files],
                   "annotations": [{"id": i + 1, "image_id": i, "category_id": 1, **shape} for i, _ in files],
                   "categories": [{"id": 1, "name": "dent"}]}
        (tmp_path / "set" / f"{part}.json").write_text(json.dumps(content), encoding="utf-8")
    numbered = list(enumerate(names))
    os.makedirs(tmp_path / "set")
    for outline in (False, True):
        for part, files in (("train", numbered[:2]), ("val", numbered[2:4]), ("test", numbered[4:])):
            coco(part, files, outline and part == "train")
        code = train.main(command("--epochs", 1, "--data", tmp_path / "set"))
        printed = capsys.readouterr()
        assert code == (0 if outline else 2), printed.err
        assert outline or "learns masks, got boxes alone" in printed.err


def test_mistakes_in_a_resume(command, data, tmp_path, capsys):
    assert train.main(command("--epochs", 1)) == 0
    folder = only_run(tmp_path)

    def refused(*arguments):
        capsys.readouterr()
        assert train.main([str(argument) for argument in arguments]) == 2
        return capsys.readouterr().err
    assert "has done its 1 epoch; to go on, give it more: --epochs 2" in refused("--resume", folder)
    assert "was trained with damagenet" in refused("--resume", folder, "--model", "maskrcnn_resnet50_fpn", "--epochs", 2)
    assert "--batch-size 4" in refused("--resume", folder, "--batch-size", 4, "--epochs", 2)
    assert "--keep-epochs, --lr" in refused("--resume", folder, "--batch-size", 4)
    assert "resume from last.pt beside it" in refused("--resume", os.path.join(folder, "best.pt"), "--epochs", 2)
    other = make_demo(str(tmp_path / "others"), images=4, size=64, seed=9, val_fraction=0.5)
    assert "pictures of the saved split are not in" in refused("--resume", folder, "--data", other, "--epochs", 2)
    coco = tmp_path / "coco.json"
    pictures = os.path.join(data, "image", "image")
    image = {"id": 1, "file_name": os.path.join(pictures, os.listdir(pictures)[0]), "width": 64, "height": 48}
    coco.write_text(json.dumps({"images": [image], "annotations": [], "categories": [{"id": 1, "name": "dent"}]}), encoding="utf-8")
    assert "got 1 (dent); resume with" in refused("--resume", folder, "--data", coco, "--epochs", 2)
    path = os.path.join(folder, "last.pt")
    further = read_checkpoint(path)
    further["train"]["epoch"] = 4
    save_checkpoint(path, further)
    assert "has done its 4 epochs, --epochs asks for 2; to go on, give it more: --epochs 8" in refused("--resume", folder, "--epochs", 2)
    whole = open(path, "rb").read()
    with open(path, "wb") as file:
        file.write(whole[:len(whole) // 2])
    assert "half-written" in refused("--resume", folder, "--epochs", 2)


def test_pretrained_lists_what_does_not_fit(command, tmp_path, capsys):
    assert train.main(command("--epochs", 1, "--out", tmp_path / "first")) == 0
    best = os.path.join(only_run(tmp_path / "first"), "best.pt")
    capsys.readouterr()
    assert train.main(command("--epochs", 1, "--pretrained", best, "--set", "box_head_channels=24", "--out", tmp_path / "second")) == 0
    printed = capsys.readouterr().out
    assert "tensors loaded into the model" in printed and "of another shape" in printed and "roi_heads.box_head.fc6.weight" in printed


# --- the parts, by hand

def words_of(act, capsys, *more, chooses=1, **changes):
    """What introduce or say_goodbye print of a run of DANet that is made of its numbers alone."""
    config = settled(minidamage.MODELS["danet"][1](**changes))
    record = {"hardware": {"gpu": None, "cpu": "a CPU", "threads": 1}, "kernels": {"backend": "native"}}
    run = argparse.Namespace(
        folder="runs/x", path="runs/x/{}".format, device=torch.device("cpu"), unsaved=(), state=training.State(best=0.0, best_epoch=0),
        model=argparse.Namespace(config=config, parameters=lambda: [], task="detection"), train_set=[None] * 10,
        val_set=argparse.Namespace(records=[None] * chooses), example="a.jpg",
        recipe=Recipe(epochs=3, batch_size=2, select_by="segm/AP"),
        identity={"run": record, "split": {"train": range(10), "val": range(1)}},
        args=argparse.Namespace(model="danet", amp="off", data="cars", limit=1.0, keep_epochs=False,
                                set=[f"{k}={v}" for k, v in changes.items()]))
    act(run, *more)
    return capsys.readouterr().out


def test_what_is_introduced_is_what_the_user_changed(capsys):
    plain = words_of(train.introduce, capsys)
    assert "it differs from the paper's: nowhere\n" in plain and "(1 thread, kernels native" in plain
    assert "WARNING: 1 picture chooses best.pt and its thresholds: expected 10 or more, or chance chooses; more data" in plain
    assert "WARNING: schedule=step, and no milestone lies within its 3 epochs (milestones: none): the rate never falls; for exa" in plain
    assert "WARNING: 9 pictures choose best.pt" in words_of(train.introduce, capsys, chooses=9)
    assert "best.pt" not in words_of(train.introduce, capsys, chooses=10)
    assert "warm-up: shortened from 500 to 5 steps, a third of this run's 15\n" in plain
    assert "it differs from the paper's: phase=2\n" in words_of(train.introduce, capsys, phase=2)
    assert "it differs from the paper's: dcn=False\n" in words_of(train.introduce, capsys, dcn=False)


def test_a_best_of_zero_is_said_plainly(capsys):
    words = words_of(train.say_goodbye, capsys, 9.0, "")
    assert "best segm/AP 0.000 in epoch 1: runs/x/best.pt" in words
    assert "nothing was learned yet (segm/AP is 0): train longer, a new run with --epochs 12" in words
    words = words_of(train.say_goodbye, capsys, 9.0, "segm/AP 0.300 at mask threshold 0.4")
    assert "in epoch 1; segm/AP 0.300 at mask threshold 0.4, which best.pt uses: runs/x/best.pt" in words and "nothing" not in words


def test_equal_epochs_are_told_apart_by_boxes_and_then_by_the_loss():
    state = training.State(best=0.0, best_loss=1.0, best_box_ap=0.1)
    run = argparse.Namespace(recipe=Recipe(select_by="segm/AP"), state=state)
    better = lambda ap, boxes, loss: train.is_better({"segm/AP": ap, "bbox/AP50": boxes, "loss": loss}, run)
    assert better(0.0, 0.11, 2.0) and not better(0.0, 0.09, 0.5)
    assert better(0.0, 0.1, 0.9) and not better(0.0, 0.1, 1.0) and not better(0.0, math.nan, 0.1)
    assert better(0.01, 0.0, 9.0) and not better(math.nan, 0.9, 0.1)
    state.best = math.nan                                     # nothing to find in the validation part: a number wins, then the loss
    assert better(0.0, 0.0, 9.0) and better(math.nan, 0.0, 0.9) and not better(math.nan, 0.0, 1.0)
    state.best, run.recipe, state.best_box_ap = 0.0, Recipe(select_by="loss"), 0.0
    assert train.is_better({"loss": -1.0}, run) and not train.is_better({"loss": 0.5}, run)            # losses fall


def test_learning_rate():
    recipe = Recipe(epochs=10, batch_size=4, lr=0.02, lr_batch_size=16, schedule="step", milestones=(6, 8), gamma=0.1, warmup_iters=4)
    rates = [train.lr_at(step, 10, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.001) and rates[3] == pytest.approx(0.004) and rates[4:60] == [0.005] * 56
    assert rates[60] == pytest.approx(0.0005) and rates[80] == rates[99] == pytest.approx(0.00005)
    cosine = Recipe(epochs=10, lr=1.0, lr_batch_size=0, schedule="cosine", warmup_iters=0)
    rates = [train.lr_at(step, 1, cosine) for step in range(10)]
    assert rates[0] == 1.0 and rates[5] == pytest.approx(0.5) and rates[9] == pytest.approx(0.5 + 0.5 * math.cos(0.9 * math.pi))
    short = Recipe(epochs=3, lr=1.0, lr_batch_size=0, schedule="constant", warmup_iters=500)
    assert [train.lr_at(step, 2, short) for step in range(6)] == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])      # warm-up: a third at most


def test_flags_go_into_config_and_recipe(command):
    given = train.parse_arguments(command("--epochs", 140, "--lr", "0.3", "--size", 512, settings=("rpn_nms_thresh=0.6", "momentum=0.8")))
    config, recipe = training.settle(argparse.Namespace(**{**training.DEFAULTS, **given}))
    assert (config.min_size, config.max_size, config.rpn_nms_thresh) == (512, 512, 0.6)
    assert (recipe.epochs, recipe.lr, recipe.lr_batch_size, recipe.momentum, recipe.batch_size) == (140, 0.3, 0, 0.8, 2)
    assert recipe.milestones == (100, 125)                            # of 280 epochs: 200, 250
    for settings, milestones in ((("epochs=28",), (20, 25)), (("epochs=28", "milestones=9,19"), (9, 19))):
        given = train.parse_arguments(command(settings=settings))
        assert training.settle(argparse.Namespace(**{**training.DEFAULTS, **given}))[1].milestones == milestones
    paper = minidamage.MODELS["damagenet"][2]
    assert recipe.rotate == paper.rotate and recipe.optimizer == paper.optimizer


def test_an_overflow_in_the_first_step_leaves_no_momentum(determinism_ends):
    torch.use_deterministic_algorithms(True)                          # what is not written holds NaN
    found = []
    for first in (math.inf, None):                                    # None: no step before
        layer = torch.nn.Linear(2, 2, bias=False)
        torch.nn.init.ones_(layer.weight)
        optimizer, scaler = training.make_optimizer(layer, Recipe(lr=0.1)), torch.amp.GradScaler("cpu", init_scale=4.0)
        for gradient in (first, 1.0, 2.0):
            if gradient is not None:
                scaler.scale(torch.zeros(()))
                layer.weight.grad = torch.full_like(layer.weight, gradient * scaler.get_scale())
                scaler.step(optimizer), scaler.update()
        found.append(layer.weight.detach())
    assert torch.equal(*found) and found[0].isfinite().all()


def test_ema_by_hand():
    model = torch.nn.BatchNorm1d(2)
    ema = training.Ema(model, 0.9)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.num_batches_tracked.fill_(7)
    ema.update(model)                                                 # decay 2/11 in the first update
    assert torch.allclose(ema.model.weight, torch.full((2,), 1.0 * 2 / 11 + 3.0 * 9 / 11)) and ema.model.num_batches_tracked == 7
    for _ in range(200):
        ema.update(model)
    assert torch.allclose(ema.model.weight, torch.full((2,), 3.0))


def test_run_folders_are_never_shared(tmp_path):
    os.makedirs(tmp_path / "damagenet-cars-007")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: run_folder.new_run_folder(tmp_path, "damagenet", "some/where/cars/"), range(24)))
    assert sorted(os.path.basename(folder) for folder in folders) == [f"damagenet-cars-{n:03d}" for n in range(8, 32)]


def test_progress_in_a_log_and_on_a_terminal():
    log = io.StringIO()
    progress = Progress(10, stream=log, interval=1000)
    for done in range(1, 11):
        progress.step(done, 2, f"epoch 1/1  {done}/10", {"loss_mask": 1.0, "loss_classifier": 0.5})
    lines = log.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith("epoch 1/1  1/10") and "\r" not in log.getvalue()
    for part in ("img/s", "to go", "loss 1.500  (mask 1.000  classifier 0.500)"):
        assert part in lines[1]
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    progress = Progress(10, stream=terminal)
    progress.step(10, 2, "epoch 1/1  10/10", {"loss_mask": 1.0})
    progress.line("epoch 1 done")
    assert terminal.getvalue().startswith("\repoch") and terminal.getvalue().endswith("\repoch 1 done\n")
    assert clock(59.6) == "1:00" and clock(3725) == "1:02:05"


def test_order_is_a_permutation_that_a_resume_skips_exactly(command, data):
    run = training.set_up(train.parse_arguments(command("--epochs", 2)))
    def order():
        return [target["index"] for parts in train.training_batches(run) for _, targets, _ in parts for target in targets]
    whole = order()
    run.state.step = 2
    rest = order()
    assert sorted(whole) == list(range(6)) and rest == whole[4:]
    run.state.epoch, run.state.step = 1, 0
    assert order() != whole
    assert np.random.default_rng([0, 0]).permutation(6).tolist() == whole
