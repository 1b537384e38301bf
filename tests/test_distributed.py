"""Several processes train one model: two of them, over gloo on a CPU, against one. Equal losses and gradients however a batch is cut,
resumes across world sizes, one NaN and one signal for all, pictures without objects, a process that dies or hangs, evaluation in shares."""
import contextlib
import csv
import io
import json
import math
import multiprocessing.connection
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch

import evaluate
import minidamage
import train
from minidamage import distributed, training
from minidamage.checkpoint import read_checkpoint
from minidamage.data.synthetic import make_demo
from minidamage.layers.sync_batch_norm import SyncBatchNorm2d
from minidamage.progress import Progress, StopSignal
from test_train import REPOSITORY, only_run
from test_train import SMALL as DETECTOR

FROZEN = tuple(setting for setting in DETECTOR if setting != "norm=batch") + ("norm=frozen",)
SEGMENTER = ("body=resnet18", "image_size=64", "sequence_size=64", "attention_rank=4", "attention_heads=2", "feed_forward=8",
             "warmup_iters=0", "dropout=0", "lr=0.003", "optimizer=sgd")
MODELS = {"damagenet": FROZEN, "context_cracknet": SEGMENTER}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """14 drawn pictures of 64 x 48 pixels: 8 to train, 3 to choose, 3 to report."""
    return make_demo(str(tmp_path_factory.mktemp("demo") / "cars"), images=14, size=64, seed=3, val_fraction=0.42)


@pytest.fixture
def command(data, tmp_path):
    """command("--epochs", 2, model="damagenet") -> the argument list of a tiny run into tmp_path."""
    def arguments(*more, model="damagenet"):
        sets = [word for setting in MODELS[model] for word in ("--set", setting)]
        return [str(word) for word in ("--model", model, "--data", data, "--out", tmp_path, "--device", "cpu",
                                       "--batch-size", 4, *sets, *more)]
    return arguments


# --- two processes that wait for work: started once, they import once

def serve(rank, work):
    """In each of the two: functions come in, (what they return, what they print to stdout, stderr) goes out."""
    torch.set_num_threads(1)
    for function, arguments, port in iter(lambda: pickle.loads(work.recv_bytes()), None):
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                result = function(*arguments)
            except BaseException as error:
                result = error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        work.send_bytes(pickle.dumps((result, out.getvalue(), err.getvalue())))      # send() would hand tensors over in shared memory


@pytest.fixture(scope="module")
def both():
    """both(function, *arguments) -> [(result, stdout, stderr)] of the two processes; an exception in one of them is raised."""
    ends, processes = [], []                                          # no children of multiprocessing: a run ends those, for its loaders
    for rank in range(2):
        here, there = socket.socketpair()
        program = (f"import sys; sys.path[:0] = {[REPOSITORY, os.path.dirname(os.path.abspath(__file__))]!r}\n"
                   "import multiprocessing.connection, test_distributed\n"
                   f"test_distributed.serve({rank}, multiprocessing.connection.Connection({there.fileno()}))")
        processes.append(subprocess.Popen([sys.executable, "-c", program], pass_fds=[there.fileno()]))
        there.close()
        ends.append(multiprocessing.connection.Connection(here.detach()))

    def run(function, *arguments):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for here in ends:
            here.send_bytes(pickle.dumps((function, arguments, port)))
        deadline, answers = time.monotonic() + 120, []
        for here in ends:
            assert here.poll(max(deadline - time.monotonic(), 0)), "a process hangs"
            answers.append(pickle.loads(here.recv_bytes()))
        for result, *_ in answers:
            if isinstance(result, BaseException):
                raise result
        return answers
    yield run
    for here, process in zip(ends, processes):
        here.send_bytes(pickle.dumps(None))
        process.wait(20)


# --- one batch, however it is cut

@contextlib.contextmanager
def without_objects(indices):
    """Inside, these pictures of a detection set have no objects."""
    getitem = minidamage.data.DetectionDataset.__getitem__

    def emptied(self, index):
        image, target = getitem(self, index)
        none = {key: target[key][:0] for key in ("boxes", "labels", "iscrowd", "area", "masks")}
        return image, {**target, **none} if index in indices else target
    with mock.patch.object(minidamage.data.DetectionDataset, "__getitem__", emptied):
        yield


def one_step(arguments, epoch=0, empty=(), freeze=True):
    """(losses, {name: gradient}, running statistics) of the first batch of an epoch, as train() computes them."""
    distributed.start()
    with distributed.quiet(), without_objects(empty):
        run = training.set_up(train.parse_arguments(arguments))
        run.state.epoch = epoch
        run.model.train()
        for module in run.model.modules():
            if freeze and isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        replica = distributed.replicate(run.model)
        parts = next(train.training_batches(run))
        batch, read = distributed.Batch(replica, parts), []
        for images, targets, counts in parts:
            with batch.part(counts):
                losses = replica(images, targets)
            read.append(train.read_losses(losses, StopSignal())())
            sum(losses.values()).backward()
        losses, _ = train.check_losses(read, [targets for _, targets, _ in parts], run)
    gradients = {name: parameter.grad.clone() for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    return losses, gradients, {name: buffer.clone() for name, buffer in run.model.named_buffers()}


def assert_same_step(one, other, tolerance=2e-5):
    assert one[0].keys() == other[0].keys() and one[1].keys() == other[1].keys()
    for name, value in one[0].items():
        assert other[0][name] == pytest.approx(value, rel=tolerance), name
    whole = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in one[1].values()))
    for name, gradient in one[1].items():
        assert float((gradient - other[1][name]).norm()) <= tolerance * (float(gradient.norm()) + 1e-3 * whole), name


@pytest.mark.parametrize("model, empty", [("damagenet", ()), ("damagenet", (0, 2, 4, 6)), ("context_cracknet", ())])
def test_one_batch_has_one_loss_and_one_gradient_however_it_is_cut(command, both, model, empty):
    whole = one_step(command(model=model), 0, empty)
    assert_same_step(whole, one_step(command("--accumulate", 2, model=model), 0, empty))
    for more in ((), ("--accumulate", 2)):
        for step, *_ in both(one_step, command(*more, model=model), 0, empty):
            assert_same_step(whole, step)


def test_what_each_would_divide_by_alone_is_another_loss(command, monkeypatch):
    """The test above can fail: without the counts of the whole batch, two parts do not have its gradients."""
    whole = one_step(command())
    monkeypatch.setattr(distributed, "normaliser", lambda name, count: 2 * count.clamp(min=1))
    monkeypatch.setattr("minidamage.layers.losses.normaliser", distributed.normaliser)
    with pytest.raises(AssertionError):
        assert_same_step(whole, one_step(command("--accumulate", 2)))


@pytest.mark.parametrize("model", MODELS)
def test_pictures_without_any_object_give_every_parameter_a_gradient(command, both, model):
    """DistributedDataParallel waits for each of them; the second batch has every picture of one process, or of both, empty."""
    for empty in (range(8), (0, 1, 2, 3)) if model == "damagenet" else ((),):
        for losses, gradients, _ in (step for step, *_ in both(one_step, command(model=model), 1, tuple(empty))):
            assert all(map(math.isfinite, losses.values())) and all(gradient.isfinite().all() for gradient in gradients.values())
        assert losses.get("loss_mask", 0) == 0 or len(empty) < 8


def normalise(x, target):
    """(out, gradients of x, weight and bias, running statistics) of this process's half of x through a SyncBatchNorm2d, the loss a mean of
    squares over all of x."""
    distributed.start()
    norm = SyncBatchNorm2d.of(torch.nn.BatchNorm2d(x.shape[1]).double())
    x = x[distributed.rank()::distributed.world()].clone().requires_grad_()
    out = norm(x)
    (out - target[distributed.rank()::distributed.world()]).square().mean().backward()
    return out.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var


def test_sync_bn_by_torch(both):
    torch.manual_seed(0)
    x, target = 3 + torch.randn(6, 4, 3, 5, dtype=torch.float64), torch.randn(6, 4, 3, 5, dtype=torch.float64)
    halves = [result for result, *_ in both(normalise, x, target)]
    norm, x = torch.nn.BatchNorm2d(4).double(), x.requires_grad_()
    out = norm(x)
    (out - target).square().mean().backward()
    for rank, half in enumerate(halves):
        assert torch.allclose(half[0], out[rank::2]) and torch.allclose(half[1] / 2, x.grad[rank::2])      # each half: a mean over half
        assert torch.allclose(half[4], norm.running_mean) and torch.allclose(half[5], norm.running_var)
    for k, gradient in ((2, norm.weight.grad), (3, norm.bias.grad)):
        assert torch.allclose((halves[0][k] + halves[1][k]) / 2, gradient)


def test_sync_bn_normalises_over_all_processes(command, both):
    """Through a whole network, whose rounding 40 such layers of a few values each carry on."""
    arguments = command("--sync-bn", model="context_cracknet")
    whole = one_step(arguments, 0, (), False)
    for step, *_ in both(one_step, arguments, 0, (), False):
        assert_same_step(whole, step, tolerance=2e-2)
        for name, buffer in whole[2].items():
            assert torch.allclose(buffer, step[2][name], rtol=1e-4, atol=1e-6), name
    alone = both(one_step, command(model="context_cracknet"), 0, (), False)[0][0]
    with pytest.raises(AssertionError):
        assert_same_step(whole, alone, tolerance=5e-2)


def test_sync_bn_alone_is_batch_norm():
    norm = torch.nn.BatchNorm2d(3)
    synchronised, x = SyncBatchNorm2d.of(norm), torch.randn(2, 3, 4, 4)
    assert synchronised.state_dict().keys() == norm.state_dict().keys() and torch.equal(synchronised(x), norm(x))


# --- sharing out

def as_process(monkeypatch, rank, world):
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world", lambda: world)


def test_shares_by_hand(monkeypatch):
    def shares(batch, accumulate, world):
        found = []
        for rank in range(world):
            as_process(monkeypatch, rank, world)
            found.append(distributed.shares(batch, accumulate))
        return found
    assert shares([7, 1, 4, 9], 1, 1) == [[([7, 1, 4, 9], True)]]
    assert shares([7, 1, 4, 9], 2, 1) == [[([7, 4], True), ([1, 9], True)]]
    assert shares([7, 1, 4, 9], 1, 2) == [[([7, 4], True)], [([1, 9], True)]]
    assert shares([7, 1, 4, 9], 2, 2) == [[([7], True), ([4], True)], [([1], True), ([9], True)]]
    assert shares([7], 2, 2) == [[([7], True)], [([7], False)]]        # the second joins in, but does not count
    for world in (1, 2, 3, 4):                                        # whatever is left at the end of an epoch: each picture once
        for left in range(1, 13):
            everything = [index for parts in shares(list(range(left)), 12 // world, world) for indices, counts in parts if counts
                          for index in indices]
            assert sorted(everything) == list(range(left))


def test_a_batch_that_cannot_be_shared_evenly(command, monkeypatch, capsys):
    as_process(monkeypatch, 0, 4)
    with pytest.raises(ValueError, match=r"--batch-size 6: expected a multiple of 4 \(4 processes: .*got 6; type --batch-size 8, or .* "
                                         r"\(1, 2, 3, 6\)"):
        distributed.check_batch(6, 1)
    with pytest.raises(ValueError, match=r"multiple of 8 \(4 processes x --accumulate 2"):
        distributed.check_batch(12, 2)
    distributed.check_batch(16, 2)
    monkeypatch.undo()
    assert train.main(command("--accumulate", 3)) == 2
    assert "--batch-size 4: expected a multiple of 3 (--accumulate 3: " in capsys.readouterr().err


def test_interleave_undoes_shard(monkeypatch):
    for count in (0, 1, 5, 6):
        lists = []
        for rank in range(3):
            as_process(monkeypatch, rank, 3)
            lists.append(list(distributed.shard(count)))
        assert distributed.interleave(lists) == list(range(count))


# --- whole runs

def train_main(arguments, stop_in=None, at_step=0):
    """train.main; process `stop_in` asks itself to stop in its at_step-th step."""
    check_losses, steps = train.check_losses, []

    def counted(*given):
        steps.append(1)
        if len(steps) == at_step and os.environ.get("RANK", "0") == str(stop_in):
            os.kill(os.getpid(), signal.SIGTERM)
        return check_losses(*given)
    with mock.patch.object(train, "check_losses", counted):
        return train.main(arguments)


def test_a_run_that_changes_its_number_of_processes(command, tmp_path, both):
    """Two processes, stopped by a signal to the second alone; one; two again: the run of one process from end to end."""
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    more = ("--epochs", 3, "--batch-size", 6, "--set", "schedule=constant")          # 8 pictures: the second batch has two
    assert train.main(command(*more, "--out", straight)) == 0
    (first, said, _), (second, silent, _) = both(train_main, command(*more, "--out", changing), 1, 1)
    assert (first, second) == (143, 143) and silent == "" and said.count("stopped in epoch 1, step 2") == 1
    folder = only_run(changing)
    assert f"torchrun --nproc-per-node 2 train.py --resume {folder}" in said
    assert read_checkpoint(os.path.join(folder, "last.pt"))["train"]["step"] == 2
    assert train_main(["--resume", folder], 0, 2) == 143              # a validation, then a step and a half of the next epoch
    assert [result for result, *_ in both(train_main, ["--resume", folder])] == [0, 0]
    one, other = (read_checkpoint(os.path.join(path, "last.pt")) for path in (only_run(straight), folder))
    assert len(one["train"]["history"]) == len(other["train"]["history"]) == 3
    for a, b in zip(one["train"]["history"], other["train"]["history"]):
        assert all(a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6, nan_ok=True) for key in a if key != "seconds")
    for name, tensor in one["weights"].items():
        assert torch.allclose(tensor, other["weights"][name], rtol=1e-3, atol=1e-5), name
    assert sorted(os.listdir(folder)) == sorted(os.listdir(only_run(straight)))
    assert [json.load(open(os.path.join(path, "config.json")))["run"]["processes"] for path in (only_run(straight), folder)] == [1, 2]
    assert [row["epoch"] for row in csv.DictReader(open(os.path.join(folder, "metrics.csv")))] == ["1", "2", "3"]


def train_with_nan(arguments, whole):
    """train.main with a loss that is NaN in process 1, in its third step, and, not whole, in its running statistics; with the files of
    that step."""
    forward, calls = minidamage.MODELS["damagenet"][0].forward, []

    def broken(self, images, targets=None):
        losses = forward(self, images, targets)
        calls.append([target["file"] for target in targets])
        factor = math.nan if len(calls) == 3 and distributed.rank() == 1 else 1
        if not whole:
            next(buffer for name, buffer in self.named_buffers() if name.endswith("running_mean")).mul_(factor)
        return {**losses, "loss_mask": losses["loss_mask"] * factor}
    with mock.patch.object(minidamage.MODELS["damagenet"][0], "forward", broken):
        return train.main(arguments), calls[2]


@pytest.mark.parametrize("whole", [True, False])
def test_nan_in_one_process_stops_both(command, tmp_path, both, whole):
    ((one, healthy), _, said), ((other, files), _, silent) = both(train_with_nan, command("--epochs", 2), whole)
    assert one == other == 1 and silent == "" and "loss_mask = nan in epoch 2, step 1, in process 1." in said
    assert f"weights     {'finite' if whole else 'no longer finite'};" in said
    line = next(line for line in said.splitlines() if line.startswith("  files"))
    assert all(file in line for file in files) and not any(file in line for file in healthy) and "in process 1" in line
    state = read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))
    assert (state["train"]["epoch"], state["train"]["step"]) == (1, 0)
    assert all(tensor.isfinite().all() for tensor in state["weights"].values())


def train_with_broken_validation(arguments):
    """train.main whose process 1 comes to validation with weights that are NaN."""
    validate = train.validate

    def broken(run, *rest):
        if distributed.rank() == 1:
            torch.nn.init.constant_(run.model.roi_heads.box_predictor.cls_score.weight, math.nan)
        return validate(run, *rest)
    with mock.patch.object(train, "validate", broken):
        return train.main(arguments)


def test_nan_in_the_validation_of_one_process_stops_both(command, tmp_path, both):
    (one, _, said), (other, _, silent) = both(train_with_broken_validation, command("--epochs", 1))
    assert one == other == 1 and silent == "" and "loss_classifier = nan in epoch 1, validation, in process 1." in said
    assert "weights     no longer finite;" in said and "the one saved before" in said
    assert read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]["epoch"] == 0


def train_slowly(arguments):
    """train.main whose process 1 sleeps in the second step, longer than the other waits."""
    check_losses, steps = train.check_losses, []

    def slow(*given):
        steps.append(1)
        time.sleep(6 if len(steps) == 2 and distributed.rank() == 1 else 0)
        return check_losses(*given)
    with mock.patch.object(train, "check_losses", slow):
        return train.main(arguments)


def test_a_process_that_hangs_is_given_up_after_the_timeout(command, tmp_path, both):
    (one, _, said), (other, _, also) = both(train_slowly, command("--epochs", 2, "--timeout", 0.03))
    assert one == other == 1 and "process 0 of 2 has lost another one in epoch 1, step" in said
    assert f"torchrun --nproc-per-node 2 train.py --resume {only_run(tmp_path)}" in said
    assert "optimizer" in read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]


DIES = f"""
import os, signal, sys
sys.path.insert(0, {REPOSITORY!r})
import train
check_losses, steps = train.check_losses, []
def dying(*given):
    steps.append(1)
    if len(steps) == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return check_losses(*given)
train.check_losses = dying
sys.exit(train.main(sys.argv[1:]))
"""


def test_a_process_that_dies_ends_the_command_with_the_reason(command, tmp_path):
    program = tmp_path / "dies.py"
    program.write_text(DIES)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(program)]
    ended = subprocess.run([*torchrun, *command("--epochs", 50)], capture_output=True, text=True, timeout=100,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 1 and "process 0 of 2 has lost another one in epoch 1, step" in ended.stderr, ended.stderr
    assert "optimizer" in read_checkpoint(os.path.join(only_run(tmp_path), "last.pt"))["train"]


def train_on_a_full_disk(arguments, from_epoch):
    """train.main that has no room for last.pt from an epoch on; -1: from the start."""
    save = train.save

    def full(run, file, metrics):
        if distributed.is_main() and run.state.epoch > from_epoch and file == "last.pt":
            os.symlink("/dev/full", run.path("last.pt.partial"))
        return save(run, file, metrics)
    with mock.patch.object(train, "save", full):
        return train.main(arguments)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_one_decision(command, tmp_path, both):
    answers = both(train_on_a_full_disk, command("--epochs", 1, "--out", tmp_path / "start"), -1)
    assert [result for result, *_ in answers] == [1, 1] and "No space left" in answers[0][2] and answers[1][2] == ""
    answers = both(train_on_a_full_disk, command("--epochs", 1, "--out", tmp_path / "later"), 0)
    assert [result for result, *_ in answers] == [1, 1] and "last.pt is whole" in answers[0][2]           # trained on, said at the end
    assert read_checkpoint(os.path.join(only_run(tmp_path / "later"), "last.pt"))["train"]["epoch"] == 0


def test_a_mistake_is_said_once(command, both):
    answers = both(train_main, command("--model", "damagent"))
    assert [result for result, *_ in answers] == [2, 2]
    assert "".join(err for *_, err in answers).count("did you mean 'damagenet'") == 1
    answers = both(train_main, command("--batch-size", 5))
    assert [result for result, *_ in answers] == [2, 2]
    assert "".join(err for *_, err in answers).count("expected a multiple of 2 (2 processes") == 1


def test_several_processes_without_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE=4 asks for several processes: expected RANK, .* start with torchrun"):
        distributed.start()


# --- evaluation in shares

def validate_once(arguments):
    """The metrics and thresholds of a validation."""
    distributed.start()
    with distributed.quiet():
        run = training.set_up(train.parse_arguments(arguments))
        return train.validate(run, StopSignal(), Progress(1)), run.identity["thresholds"]


def evaluate_main(arguments):
    return evaluate.main(arguments)


def equal(one, other):
    """Equal to the last bit, NaN to NaN."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.parametrize("model, files", [("damagenet", ("detections.json", "truth.json", "pictures.json")),
                                          ("context_cracknet", ("pictures.json",))])
def test_evaluation_in_shares_has_the_numbers_of_one_process(command, tmp_path, both, model, files):
    more = ("--set", "box_score_thresh=0", "--set", "rpn_score_thresh=0") if model == "damagenet" else ()
    assert train.main(command("--epochs", 1, *more, model=model)) == 0
    folder = only_run(tmp_path)
    resumed = ["--resume", folder, "--epochs", "2"]
    metrics, thresholds = validate_once(resumed)
    for (shared, shared_thresholds), *_ in both(validate_once, resumed):
        assert equal(metrics, shared) and equal(thresholds, shared_thresholds)
    score = ["--score", "0.01"] if model == "damagenet" else []
    arguments = ["--checkpoint", folder, "--part", "all", *score, "--draws", "10", "--device", "cpu", "--out"]
    assert evaluate.main([*arguments, str(tmp_path / "one")]) == 0
    assert [result for result, *_ in both(evaluate_main, [*arguments, str(tmp_path / "two")])] == [0, 0]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    measured = {"command", "ms_per_picture", "pictures_per_second", "peak_memory_MB"}
    assert equal(*({key: value for key, value in each.items() if key not in measured} for each in (one, two)))
    if model == "damagenet":
        found = json.loads((tmp_path / "one" / "detections.json").read_text())
        assert len({entry["image_id"] for entry in found}) > 2        # else nothing was shared out


def test_joined_evaluators_where_a_class_is_in_one_share_alone():
    from minidamage.metrics.detection import CocoEvaluator
    rng = np.random.default_rng(0)

    def evaluator(indices):
        filled = CocoEvaluator(["dent", "scratch"], ("bbox",))
        for i in indices:
            boxes = rng_boxes[i]
            filled.add_truth(i, boxes, [1 + (i == 3)] * len(boxes), None, height=50, width=50)          # scratches in picture 3 alone
            filled.add_detections(i, boxes + 1, scores[i], [1 + (i == 3)] * len(boxes))
        return filled
    rng_boxes = [np.sort(rng.uniform(0, 50, (i % 3, 2, 2)), axis=1).reshape(-1, 4) for i in range(7)]
    scores = [rng.uniform(0, 1, len(boxes)) for boxes in rng_boxes]
    whole = evaluator(range(7))
    joined = CocoEvaluator.joined([evaluator(range(0, 7, 3)), evaluator(range(1, 7, 3)), evaluator(range(2, 7, 3))])
    assert equal(whole.evaluate().stats, joined.evaluate().stats) and equal(whole.coco_detections(), joined.coco_detections())
    assert list(joined._truth) == list(range(7))
