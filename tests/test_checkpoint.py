"""A checkpoint is whole or not there; a file that is something else says so; random generators come back exactly."""
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from minidamage import checkpoint


def state(**more):
    return {"model": "damagenet", "config": {"min_size": 64}, "num_classes": 4, "class_names": ["a", "b", "c"],
            "weights": {"w": torch.arange(1000.0)}, **more}


def test_round_trip(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, state(thresholds={"a": 0.5}, train={"epoch": 3, "history": [{"epoch": 1, "val/loss": 0.25}]}))
    read = checkpoint.read_checkpoint(path)
    assert read["format"] == "minidamage" and read["version"] == 1 and read["train"]["history"][0]["val/loss"] == 0.25
    assert torch.equal(read["weights"]["w"], torch.arange(1000.0))
    assert os.listdir(tmp_path) == ["last.pt"]                        # nothing left beside it


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_full_disk_leaves_the_older_file_whole(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, state(metrics={"epoch": 1}))
    os.symlink("/dev/full", tmp_path / "last.pt.partial")             # every write to it fails with "No space left on device"
    with pytest.raises(OSError, match="No space left.*older .*last.pt is whole"):
        checkpoint.save_checkpoint(path, state(metrics={"epoch": 2}))
    assert checkpoint.read_checkpoint(path)["metrics"]["epoch"] == 1
    checkpoint.save_checkpoint(path, state(metrics={"epoch": 3}))     # space again
    assert checkpoint.read_checkpoint(path)["metrics"]["epoch"] == 3


def test_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError, match="could not write .*There was no older file"):
        checkpoint.save_checkpoint(tmp_path / "gone" / "last.pt", state())


def size_of(path):
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def test_killed_while_writing_leaves_the_older_file_whole(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, state(metrics={"epoch": 1}))
    writer = textwrap.dedent(f"""
        import torch
        from minidamage.checkpoint import save_checkpoint
        big = {{"model": "m", "config": {{}}, "num_classes": 2, "class_names": ["a"], "weights": {{"w": torch.zeros(8_000_000)}}}}
        print("ready", flush=True)
        while True:
            save_checkpoint({str(tmp_path / 'other.pt')!r}, big)
            save_checkpoint({str(path)!r}, {{**big, "metrics": {{"epoch": 2}}}})
    """)
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and size_of(tmp_path / "last.pt.partial") < 1_000_000:
        pass                                                          # until it is in the middle of a write
    assert size_of(tmp_path / "last.pt.partial") > 0 or time.monotonic() < deadline
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert checkpoint.read_checkpoint(path)["metrics"]["epoch"] in (1, 2)


def test_half_written_file(tmp_path):
    whole, half = tmp_path / "whole.pt", tmp_path / "half.pt"
    checkpoint.save_checkpoint(whole, state())
    data = whole.read_bytes()
    half.write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match="half.pt: half-written or not a checkpoint"):
        checkpoint.read_checkpoint(half)
    half.write_bytes(b"")
    with pytest.raises(ValueError, match=r"half-written or not a checkpoint \(0 bytes"):
        checkpoint.read_checkpoint(half)


def test_damaged_inside(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save_checkpoint(path, state())
    data = bytearray(path.read_bytes())
    at = data.index(b"damagenet")
    data[at - 40:at + 40] = bytes(80)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="last.pt: (damaged|expected a checkpoint)"):
        checkpoint.read_checkpoint(path)


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        checkpoint.read_checkpoint(tmp_path / "none.pt")
    with pytest.raises(ValueError, match="is a folder, expected a checkpoint file; a run folder holds best.pt"):
        checkpoint.read_checkpoint(tmp_path)
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(ValueError, match="--pretrained"):
        checkpoint.read_checkpoint(tmp_path / "resnet.pth")
    torch.save({"format": "minidamage", "version": 99, **state()}, tmp_path / "newer.pt")
    with pytest.raises(ValueError, match="version 99"):
        checkpoint.read_checkpoint(tmp_path / "newer.pt")
    torch.save({"format": "minidamage", "version": 1, "model": "damagenet"}, tmp_path / "lacks.pt")
    with pytest.raises(ValueError, match="lacks config, num_classes, class_names, weights"):
        checkpoint.read_checkpoint(tmp_path / "lacks.pt")


def test_pretrained_of_another_model_is_named(tmp_path):
    model = torch.nn.Linear(2, 2)
    model.name = "line"
    for weights in ({"decoder.0.weight": torch.zeros(2)}, {"conv1.weight": torch.zeros(2)}):
        checkpoint.save_checkpoint(tmp_path / "other.pt", {**state(), "model": "unet", "weights": weights})
        with pytest.raises(ValueError, match="; it is a checkpoint of unet, this model is line"):
            checkpoint.load_pretrained(model, tmp_path / "other.pt")


@pytest.mark.parametrize("content", [b"", b"{}", b"half"])
def test_pretrained_files_that_torch_cannot_read(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content == b"half":
        torch.save({"conv1.weight": torch.zeros(1000)}, path)
        content = path.read_bytes()[:2500]
    path.write_bytes(content)
    with pytest.raises(ValueError, match="--pretrained .*weights.pth: not a torch file of plain tensors, or half of one") as error:
        checkpoint.load_pretrained(torch.nn.Linear(2, 2), path)
    assert "weights_only" not in str(error.value)


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_strangers_code_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": "minidamage", "version": 1, **state(metrics=Evil())}, "evil.pt")
    with pytest.raises(ValueError, match="more than plain tensors"):
        checkpoint.read_checkpoint("evil.pt")
    assert not os.path.exists("pwned")


def test_weights_of_another_shape_or_name():
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=r"1 unexpected \(extra\); 1 of another shape \(weight \(2, 4\) for \(2, 3\)\)"):
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 4), "bias": torch.zeros(2), "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"1 missing \(bias\)"):
        checkpoint.load_weights(model, {"weight": torch.zeros(2, 3)})
    assert torch.equal(model.weight, before)                          # all or nothing


def test_random_generators_come_back(tmp_path):
    path = tmp_path / "rng.pt"
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    np.random.standard_normal()                                       # leaves a second gaussian waiting inside
    checkpoint.save_checkpoint(path, state(train={"rng": checkpoint.rng_state()}))
    expected = random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    checkpoint.set_rng_state(checkpoint.read_checkpoint(path)["train"]["rng"])
    assert (random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()) == expected
