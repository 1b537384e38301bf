"""train.py, evaluate.py and the data set doctor on boxes alone: how they are read and what is wrong in them, by the command line."""
import json
import os

import numpy as np
import pytest

import evaluate
import train
from minidamage.checkpoint import read_checkpoint
from minidamage.data.__main__ import main as check
from test_data_voc import annotation, pair

TINY = ("body=resnet18", "norm=batch", "min_size=48", "max_size=64", "anchor_sizes=8,12,16,24,32", "fpn_channels=8", "rpn_channels=8",
        "rpn_pre_nms_top_n_train=20", "rpn_pre_nms_top_n_test=20", "rpn_post_nms_top_n_train=20", "rpn_post_nms_top_n_test=10",
        "rpn_batch_size_per_image=16", "box_head_channels=16", "box_batch_size_per_image=8", "cbam_ratio=4", "warmup_iters=2")


@pytest.fixture
def voc(tmp_path):
    """Six pictures in VOC's layout, three parts of two, each with an object and a difficult one, whose boxes begin at 0."""
    for i in range(6):
        objects = [("dent", (0, 0, 20, 20)), ("dent", (30, 10, 60, 40), 1)]
        pair(tmp_path / "voc/JPEGImages", tmp_path / "voc/Annotations", f"{i:02d}", objects, seed=i)
    (tmp_path / "voc/ImageSets/Main").mkdir(parents=True)
    for part, first in (("train", 0), ("val", 2), ("test", 4)):
        (tmp_path / f"voc/ImageSets/Main/{part}.txt").write_text(f"{first:02d}\n{first + 1:02d}\n")
    return str(tmp_path / "voc")


def arguments(data, out, *more, model="danet"):
    return ["--model", model, "--data", str(data), "--out", str(out), "--device", "cpu", "--epochs", "1", "--batch-size", "2",
            *(word for setting in TINY for word in ("--set", setting)), *more]


def test_how_the_boxes_were_read_goes_from_the_training_to_the_evaluation(voc, tmp_path, capsys):
    assert train.main(arguments(voc, tmp_path / "runs", "--voc-boxes", "corners", "--voc-difficult", "count")) == 0
    printed = capsys.readouterr().out
    assert "boxes are taken as corners" in printed and "6 difficult objects count as the others do" in printed
    run = str(tmp_path / "runs/danet-voc-001")
    saved = read_checkpoint(os.path.join(run, "best.pt"))["run"]["args"]
    assert saved["voc_boxes"] == "corners" and saved["voc_difficult"] == "count"

    def truth(*more):
        out = ["--draws", "0", "--worst", "0", "--out", str(tmp_path / "out")]
        assert evaluate.main(["--checkpoint", run, "--device", "cpu", *out, *more]) == 0
        with open(tmp_path / "out/truth.json", encoding="utf-8") as stream:
            found = json.load(stream)["annotations"]
        return found[0]["bbox"], [a["iscrowd"] for a in found]

    for same in ((), ("--data", voc)):
        assert truth(*same) == ([0, 0, 20, 20], [0, 0, 0, 0])
    box, crowd = truth("--voc-boxes", "pixels", "--voc-difficult", "ignore")
    np.testing.assert_allclose(box, [0, 0, 20, 20])                                   # from -1, clipped
    assert crowd == [0, 1, 0, 1]
    assert train.main(["--resume", run, "--epochs", "2", "--voc-difficult", "ignore"]) == 2
    assert "--voc-difficult ignore: " in capsys.readouterr().err
    assert train.main(["--resume", run, "--epochs", "2"]) == 0


def test_a_bad_data_set_is_refused_or_named_before_training(voc, tmp_path, capsys):
    folder = os.path.join(voc, "Annotations")
    (tmp_path / "voc/Annotations/00.xml").write_text("<annotation><filename>00.jpg")
    annotation(tmp_path / "voc/Annotations/01.xml", [("dent", (20, 1, 3, 9)), ("dent", (1, 1, 9, 9))])
    pair(tmp_path / "voc/JPEGImages", tmp_path / "voc/Annotations", "03", [("dent", (1, 1, 9, 9))], size=(640, 480))
    assert train.main(arguments(voc, tmp_path / "runs")) == 0
    printed = capsys.readouterr().out
    for words in ("not valid XML", "its minimum is not below its maximum", "the annotation file says 640x480, the picture is 64x48"):
        assert words in printed
    assert check([voc]) in (0, 1) and "not valid XML" in capsys.readouterr().out
    for name in os.listdir(folder):
        (tmp_path / "voc/Annotations" / name).write_text("<annotation")
    assert train.main(arguments(voc, tmp_path / "runs")) == 2
    assert "no known annotation layout found among its 6 .jpg, 6 .xml, 3 .txt; where these" in capsys.readouterr().err
