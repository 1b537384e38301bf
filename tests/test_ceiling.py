"""What the truth itself scores at the mask head's resolution: whole squares everything, a thin line little; and COCO's ids on the way."""
import json

import numpy as np
import pytest

import evaluate
from data_sets import coco_content, coco_set, dump
from detection_cases import small_model
from minidamage import masks
from minidamage.checkpoint import save_checkpoint
from minidamage.data import load_dataset
from minidamage.evaluation.ceiling import mask_ceiling, through_the_head
from minidamage.metrics.detection import evaluate_coco_files

SQUARE = [10.0, 8, 38, 8, 38, 36, 10, 36]                                 # 28 x 28: every cell of the head is one pixel
LINE = [2.0, 2, 3, 2, 62, 45, 61, 45]                                    # a pixel wide, across the picture
CROWD = {"size": [48, 64], "counts": [0, 480, 64 * 48 - 480]}            # ten columns, uncompressed


def outlines(*annotations):
    return [{"segmentation": s if isinstance(s, dict) else [s], "bbox": [0, 0, 1, 1], "area": 1, **more} for s, more in annotations]


def boxed(points):
    x, y = points[::2], points[1::2]
    return {"bbox": [min(x), min(y), max(x) - min(x), max(y) - min(y)], "area": 100}


@pytest.fixture
def drawn(tmp_path):
    """One square, one line, one crowd region."""
    content = outlines((SQUARE, boxed(SQUARE)), (LINE, {"category_id": 2, **boxed(LINE)}),
                       (CROWD, {"iscrowd": 1, "bbox": [0, 0, 10, 48], "area": 480}))
    return coco_set(tmp_path / "set", content)


def test_a_square_is_kept_and_a_line_is_lost(drawn):
    dataset = load_dataset(str(drawn))
    records = [record for part in dataset.parts.values() for record in part]
    result = mask_ceiling(records, dataset.class_names).evaluate()
    assert result.per_class["dent"]["segm/AP"] == pytest.approx(1) and result.per_class["scratch"]["segm/AP"] < 0.5
    assert result.stats["bbox/AP"] == pytest.approx(1)                    # the boxes are the truth's; the crowd is nobody's miss
    fine = mask_ceiling(records, dataset.class_names, 112).evaluate()
    assert fine.per_class["scratch"]["segm/AP"] > result.per_class["scratch"]["segm/AP"]


def test_one_mask_by_hand():
    """Two by two cells over a box of 8 x 8 whose left half is filled: the left half comes back."""
    dense = np.zeros((1, 12, 16), np.uint8)
    dense[0, 2:10, 4:8] = 1
    pasted = masks.decode([through_the_head(masks.encode(dense)[0], [4, 2, 12, 10], (12, 16), 2)])[0]
    assert pasted[4:8, 5:8].all() and not pasted[:, 9:].any() and not pasted[:, :3].any()       # but for what the pasting's rounding costs


def test_on_the_command_line(drawn, tmp_path, capsys):
    assert evaluate.main(["--ceiling", "--data", str(drawn), "--out", str(tmp_path / "out")]) == 0
    assert "28x28" in capsys.readouterr().out
    written = json.loads((tmp_path / "out/results.json").read_text())
    assert written["ceiling"] == 28 and 0.4 < written["parts"]["all"]["segm/AP"] < 1
    assert evaluate.main(["--ceiling", "56", "--data", str(drawn), "--part", "test"]) == 2
    assert evaluate.main(["--ceiling"]) == 2 and evaluate.main(["--ceiling", "1", "--data", str(drawn)]) == 2


def test_beside_a_model(drawn, tmp_path, capsys, narrow):
    """With a checkpoint the ceiling stands beside what the model scores, of the same pictures."""
    dataset, model = load_dataset(str(drawn)), small_model(num_classes=3).eval()
    save_checkpoint(tmp_path / "best.pt", {"model": model.name, "config": vars(model.config), "num_classes": 3,
                                           "class_names": list(dataset.class_names), "weights": model.state_dict()})
    command = ["--checkpoint", str(tmp_path / "best.pt"), "--data", str(drawn), "--draws", "0", "--device", "cpu"]
    assert evaluate.main([*command, "--ceiling", "--out", str(tmp_path / "out")]) == 0
    assert "perfect masks of 28x28 pixels would score a mask AP of 0.5" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/results.json").read_text())["ceiling"]["segm/AP"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("size", ["1", "-28", "0", "1025", "1" + 30 * "0"])
@pytest.mark.parametrize("what", [["--data", "nowhere"], ["--checkpoint", "none.pt"]])
def test_a_size_that_no_head_has_is_refused_first(capsys, what, size):
    assert evaluate.main(["--ceiling", size, *what]) == 2
    assert f"--ceiling: expected the mask head's resolution, 2 to 1024 pixels a side such as 28, got {size}\n" in capsys.readouterr().err


def test_boxes_alone_have_no_ceiling(tmp_path, capsys):
    content = coco_content([{"bbox": [1, 1, 20, 20], "area": 400, "segmentation": []}])
    root = coco_set(tmp_path, [])
    dump(root / "annotations.json", content)
    assert evaluate.main(["--ceiling", "--data", str(root)]) == 2 and "outlines" in capsys.readouterr().err


@pytest.mark.parametrize("part, ap, small", [("train", 0.878, 0.738), ("val", 0.841, 0.705)])
def test_the_ceiling_of_coco_and_its_ids(real_data, part, ap, small):
    """Sparse category ids, crowd run lengths, outlines of several parts: the detections, under COCO's own picture and category ids, score
    against COCO's own file what they score here."""
    data = load_dataset(str(real_data / "coco_tiny"))
    evaluator = mask_ceiling(data.parts[part], data.class_names)
    result = evaluator.evaluate()
    assert result.stats["segm/AP"] == pytest.approx(ap, abs=0.005) and result.stats["segm/APs"] == pytest.approx(small, abs=0.01)
    assert result.stats["segm/AP50"] > 0.99 and result.stats["bbox/AP"] == pytest.approx(1)
    detections = evaluator.coco_detections(data.category_ids)
    file = json.loads((real_data / f"coco_tiny/annotations/instances_{part}2017.json").read_text())
    assert {d["image_id"] for d in detections} <= {image["id"] for image in file["images"]}
    assert {d["category_id"] for d in detections} <= {a["category_id"] for a in file["annotations"]}
    scored = evaluate_coco_files(file, detections, ("bbox", "segm"))
    for name in ("segm/AP", "segm/AP50", "segm/APs", "segm/APl", "bbox/AP", "bbox/AR100"):
        assert scored.stats[name] == pytest.approx(result.stats[name], abs=1e-6), name
