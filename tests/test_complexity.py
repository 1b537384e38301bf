"""evaluate.py --complexity on detectors: DamageNet's context block, and all stages with fixed numbers of boxes, against sums by hand. What
it counts of single layers and segmenters: test_evaluate_segmentation.py."""
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import evaluate
import minidamage
from minidamage.evaluation import complexity
from minidamage.models.damagenet import DilatedContextBlock
from minidamage.ops import deform_conv2d

SMALL = {"body": "resnet18", "rpn_post_nms_top_n_test": 50, "box_detections_per_img": 10, "box_head_channels": 32}
C, RATES = 256, 4
PARAMETERS = {1: 9_437_200, 32: 294_928, 256: 36_880}                       # of four blocks: 4 x (4 x 256 x 256 / groups x 9 + 4)


def counted(name, side, **fields):
    return complexity.measure(name, "cpu", side, 1, **fields)


def cells(side, levels=(2, 3, 4, 5)):
    return sum((side >> level) ** 2 for level in levels)


@pytest.mark.parametrize("groups", complexity.WIDTHS)
def test_one_context_block_by_hand(groups):
    block = DilatedContextBlock(C, groups=groups)
    with torch.no_grad(), complexity.Counter() as counter:
        block(torch.zeros(1, C, 5, 7))
    assert sum(p.numel() for p in block.parameters()) == RATES * C * C // groups * 9 + RATES == PARAMETERS[groups] / 4
    assert counter.executed == counter.output_rule == 5 * 7 * RATES * C * C // groups * 9


@pytest.mark.parametrize("groups", complexity.WIDTHS)
def test_the_context_alone_by_hand(groups):
    found = counted(complexity.CONTEXT, 64, context_groups=groups)
    assert found["parameters"] == PARAMETERS[groups] and found["ms"] > 0
    assert found["multiply-adds"] == cells(64) * RATES * C * C // groups * 9


def test_fewer_rates_and_fewer_levels_cost_their_share():
    assert counted(complexity.CONTEXT, 64, context_rates=(1, 2, 4))["multiply-adds"] == cells(64) * 3 * C * C * 9
    assert counted(complexity.CONTEXT, 64, context_levels=(4, 5))["multiply-adds"] == cells(64, (4, 5)) * RATES * C * C * 9


def test_at_the_documented_size_the_full_context_is_205_billion():
    """What 1,024 x 1,024 pixels cost is known without running them: all four maps shrink with the picture."""
    assert complexity.DETECTOR_SIDE == 1024 and cells(1024) == 87_040 and cells(1024) == 256 * cells(64)
    assert 256 * counted(complexity.CONTEXT, 64)["multiply-adds"] == 205_353_123_840


def stages_by_hand(side, proposals, detections, hidden, masks=True, K=2):
    """Multiply-adds of all that stands on the body's maps, ResNet-18: laterals, pyramid, RPN, box stage, masks."""
    laterals = sum((side >> level) ** 2 * channels * C for level, channels in zip((2, 3, 4, 5), (64, 128, 256, 512)))
    pyramid = cells(side) * C * C * 9
    rpn = cells(side, (2, 3, 4, 5, 6)) * (C * C * 9 + C * 3 + C * 12)
    boxes = proposals * (C * 49 * hidden + hidden * hidden + hidden * 5 * K)
    head = detections * (14 * 14 * (4 * C * C * 9 + C * C * 4) + 28 * 28 * C)          # four convolutions, the transposed one, one class
    return laterals + pyramid + rpn + boxes + head * masks


@pytest.mark.parametrize("name, masks", [("maskrcnn_resnet50_fpn", True), ("fasterrcnn_resnet50_fpn", False)])
def test_a_whole_detector_by_hand(name, masks):
    found = counted(name, 64, **SMALL)
    model = minidamage.build_model(name, num_classes=2, **SMALL)
    with torch.no_grad(), FlopCounterMode(display=False) as body:
        model.backbone.body(torch.zeros(1, 3, 64, 64))
    assert found["multiply-adds"] == body.get_total_flops() // 2 + stages_by_hand(64, 50, 10, 32, masks)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["multiply-adds, output rule"] - found["multiply-adds"] == masks * 10 * 3 * 14 * 14 * C * C * 4


@pytest.mark.parametrize("groups", complexity.WIDTHS)
def test_damagenet_is_mask_rcnn_and_its_context(groups):
    plain, whole = counted("maskrcnn_resnet50_fpn", 64, **SMALL), counted("damagenet", 64, context_groups=groups, **SMALL)
    alone = counted(complexity.CONTEXT, 64, context_groups=groups)
    for number in ("parameters", "multiply-adds"):
        assert whole[number] == plain[number] + alone[number]


def test_what_the_rpn_finds_does_not_change_the_count():
    first, other_weights = (counted("maskrcnn_resnet50_fpn", 64, **SMALL)["multiply-adds"] for _ in range(2))
    one_more = counted("maskrcnn_resnet50_fpn", 64, **{**SMALL, "rpn_post_nms_top_n_test": 51})["multiply-adds"]
    assert first == other_weights == one_more - (C * 49 * 32 + 32 * 32 + 32 * 10)


def test_danet_s_deformable_convolutions_are_counted():
    with torch.no_grad(), complexity.Counter() as counter:
        deform_conv2d(torch.zeros(2, 4, 6, 6), torch.zeros(2, 18, 6, 6), torch.zeros(8, 4, 3, 3), padding=1)
    assert counter.executed == counter.output_rule == 2 * 36 * 8 * 4 * 9
    assert counted("danet", 64, body="resnet18", rpn_post_nms_top_n_test=20, box_head_channels=32)["multiply-adds"] > 0


def test_damagenet_comes_with_five_contexts_and_each_alone(tmp_path, monkeypatch, capsys):
    measured = []

    def measure_apart(name, device, side, fields):
        measured.append((name, side, fields))
        return {"parameters": 1, "multiply-adds": 2e9, "multiply-adds, output rule": 3e9, "ms": 10.0 + len(measured),
                "peak MB": float("nan")}
    monkeypatch.setattr(complexity, "measure_apart", measure_apart)
    assert evaluate.main(["--complexity", "damagenet", "maskrcnn_resnet50_fpn", "unet", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content, printed = json.loads((tmp_path / "complexity.json").read_text()), capsys.readouterr().out
    names = [*(f"context_groups={groups}" for groups in (1, 32, 256)), "context_rates=1,2,4", "context_levels=4,5"]
    assert list(content["models"]) == ["unet"] and list(content["context"]) == names
    assert list(content["detectors"]) == [*(f"damagenet, {name}" for name in names), "maskrcnn_resnet50_fpn"]
    fields = [*({"context_groups": groups} for groups in (1, 32, 256)), {"context_rates": (1, 2, 4)}, {"context_levels": (4, 5)}]
    assert measured == [*(("damagenet", 1024, each) for each in fields), *((complexity.CONTEXT, 1024, each) for each in fields),
                        ("maskrcnn_resnet50_fpn", 1024, {}), ("unet", 448, {})]
    assert content["paper context ms"] == 12 and content["detector picture"] == "1 x 3 x 1024 x 1024, float32"
    line = next(line.split() for line in printed.splitlines() if "damagenet, context_groups=1 " in line)
    assert line[-2:] == ["-10.000", "n/a"]
    assert [line.split()[-2:] for line in printed.splitlines() if "alone" in line] == [["n/a", "n/a"]] * 5
    assert "1024x1024" in printed and "448x448" in printed
    every = [row for _, row, _, _ in complexity.what_is_measured([*complexity.segmenters(), *complexity.DETECTORS])]
    assert set(every) > {*complexity.PAPER, "maskrcnn_resnet50_fpn", "damagenet, context_groups=256"}


def test_a_detector_is_measured_in_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(complexity, "DETECTOR_SIDE", 64)
    monkeypatch.setattr(complexity, "PASSES", 1)
    assert evaluate.main(["--complexity", "fasterrcnn_resnet50_fpn", "--device", "cpu", "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "complexity.json").read_text())
    row = content["detectors"]["fasterrcnn_resnet50_fpn"]
    assert row["parameters"] == 41_755_286 - 89 * 5 * (1024 + 1) and row["ms"] > 0 and content["models"] == {}
    assert "64x64" in capsys.readouterr().out
