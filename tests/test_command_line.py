"""The scripts' end where nobody reads what they print: `| head` closes the pipe, and no traceback comes of it."""
import os
import subprocess
import sys

import pytest

from data_sets import coco_content, coco_set, dump

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BOX = {"bbox": [10, 10, 20, 20], "area": 400, "segmentation": [[10, 10, 30, 10, 30, 30, 10, 30]]}


@pytest.mark.parametrize("unbuffered", ["", "1"])                      # the closed pipe shows at the end, or at the first line
@pytest.mark.parametrize("command", [["-m", "minidamage.data", "set"], ["predict.py", "--help"],
                                     ["evaluate.py", "--truth", "gt.json", "--detections", "dt.json"]])
def test_a_closed_pipe_ends_a_script_quietly(tmp_path, command, unbuffered):
    coco_set(tmp_path / "set", [BOX])
    dump(tmp_path / "gt.json", coco_content([BOX]))
    dump(tmp_path / "dt.json", [{"image_id": 7, "category_id": 1, "score": 0.9, **BOX}])
    command = [os.path.join(ROOT, word) if word.endswith(".py") else word for word in command]
    process = subprocess.Popen([sys.executable, *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env={**os.environ, "PYTHONPATH": ROOT, "PYTHONUNBUFFERED": unbuffered})
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (0, 141)                              # 0: argparse lets its own go
