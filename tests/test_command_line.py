"""The scripts' end where nobody reads what they print: `| head` closes the pipe, and no traceback comes of it; and a setting that
all of them read."""
import os
import subprocess
import sys

import pytest

import evaluate
import predict
import train
from data_sets import coco_content, coco_set, dump
from minidamage.data import __main__ as doctor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOX = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}


@pytest.mark.parametrize("command, unbuffered", [                      # the closed pipe shows at the end, or at the first line
    (["-m", "minidamage.data", "set"], ""), (["-m", "minidamage.data", "set"], "1"),
    (["evaluate.py", "--truth", "gt.json", "--detections", "dt.json"], ""),
    (["train.py", "--data", "set", "--device", "cpu"], "1")])
def test_a_closed_pipe_ends_a_script_quietly(tmp_path, command, unbuffered):
    coco_set(tmp_path / "set", [BOX])
    dump(tmp_path / "gt.json", coco_content([BOX]))
    dump(tmp_path / "dt.json", [{"image_id": 7, "category_id": 1, "score": 0.9, **BOX}])
    command = [os.path.join(ROOT, word) if word.endswith(".py") else word for word in command]
    process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": unbuffered})
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


@pytest.mark.parametrize("main, arguments", [(train.main, []), (evaluate.main, []), (predict.main, ["a.jpg"]), (doctor.main, ["set"])])
def test_an_unknown_kernel_mode_is_one_line_before_anything_is_done(tmp_path, monkeypatch, capsys, main, arguments):
    monkeypatch.setenv("MINIDAMAGE_KERNELS", "bogus")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.endswith("MINIDAMAGE_KERNELS='bogus': expected one of auto, require, off\n")
    assert err.count("\n") == 1 and os.listdir(tmp_path) == []
