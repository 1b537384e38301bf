"""A whole detector as one graph: it runs in a process that knows the ops alone, and finds what the model finds."""
import os
import subprocess
import sys

import pytest
import torch

from detection_cases import overfit, small_model, two_pictures, without_masks
from minidamage import checkpoint, export
from minidamage.export import export_detector, exportable


def trained(name, **fields):
    """A detector that finds some things, and not as many as it has slots."""
    images, targets = two_pictures()
    model = small_model(name, **{"box_score_thresh": 0.3, **fields})
    overfit(model, images, targets if model.roi_heads.mask_head is not None else without_masks(targets), steps=25)
    return model.eval()


def pictures(height=90, width=120):
    """[2, 3, height, width] uint8 of one size, which the model resizes."""
    images, _ = two_pictures()
    return torch.stack([torch.nn.functional.interpolate(image[None].float(), (height, width))[0].to(torch.uint8) for image in images])


def assert_equal(found, want, slots):
    """Slot by slot what detect(images, "raw") gives, zeros behind."""
    assert found["boxes"].shape == (2, slots, 4) and sum(len(result["boxes"]) for result in want) > 0
    for i, result in enumerate(want):
        n = len(result["boxes"])
        assert found["valid"][i].tolist() == [True] * n + [False] * (slots - n)
        assert torch.equal(found["labels"][i][:n], result["labels"])
        for key in set(result) - {"labels"}:
            torch.testing.assert_close(found[key][i][:n], result[key], rtol=1e-5, atol=1e-5)
            assert not found[key][i][n:].any()


CASES = {"maskrcnn_resnet50_fpn": {}, "damagenet": dict(class_loss="sigmoid_focal", norm="batch"),
         "danet": dict(phase=5, box_score_thresh=0.1)}
ELSEWHERE = """
import sys, torch, minidamage.ops, minidamage
def refuse(*_, **__):
    raise AssertionError("the model's code ran")
torch.nn.Conv2d.forward = torch.nn.Linear.forward = refuse
minidamage.build_model = minidamage.ops.multiscale_roi_align = refuse
for folder in sys.argv[1:]:
    program = torch.export.load(folder + "/detector.pt2").module()
    torch.save(program(torch.load(folder + "/images.pt")), folder + "/found.pt")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{name: (model, images, what its program finds in a process where the model's code does not run)}, one process for all."""
    torch.manual_seed(0)
    models = {name: trained(name, **fields) for name, fields in CASES.items()}
    folders = {name: tmp_path_factory.mktemp(name) for name in CASES}
    for name, folder in folders.items():
        export_detector(models[name], folder / "detector.pt2", 90, 120, batch_size=2)
        assert os.listdir(folder) == ["detector.pt2"]
        torch.save(pictures(), folder / "images.pt")
    subprocess.run([sys.executable, "-c", ELSEWHERE, *map(str, folders.values())], check=True)
    return {name: (models[name], pictures(), torch.load(folders[name] / "found.pt")) for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_the_program_runs_with_the_ops_alone(exported, name):
    model, images, found = exported[name]
    want = model.detect(list(images), "raw")
    assert_equal(exportable(model, 90, 120, 2)(images), want, 8)
    assert_equal(found, want, 8)
    other = model.detect(list(pictures(60, 100)), "raw")                    # and the model is as it was: anchors of other sizes too
    assert len(other) == 2 and all(torch.isfinite(result["boxes"]).all() for result in other)


def test_nothing_found_leaves_every_slot_empty():
    found = exportable(small_model(box_score_thresh=0.99).eval(), 96, 96)(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    assert not any(value.any() for value in found.values()) and found["masks"].shape == (1, 8, 1, 28, 28)


def test_from_a_checkpoint_on_the_command_line(tmp_path, capsys, narrow):
    model = small_model("fasterrcnn_resnet50_fpn").eval()
    checkpoint.save_checkpoint(tmp_path / "best.pt", {"model": model.name, "config": vars(model.config), "num_classes": 3,
                                                      "class_names": ["a", "b"], "weights": model.state_dict()})
    out = tmp_path / "detector.pt2"
    assert export.main([str(tmp_path / "best.pt"), str(out), "--height", "64", "--width", "80", "--device", "cpu"]) == 0
    assert "fasterrcnn_resnet50_fpn for 1 x 3 x 64 x 80" in capsys.readouterr().out
    images = torch.randint(0, 256, (1, 3, 64, 80), dtype=torch.uint8)
    found, want = torch.export.load(out).module()(images), model.detect(list(images))[0]
    torch.testing.assert_close(found["boxes"][0][found["valid"][0]], want["boxes"], rtol=1e-5, atol=1e-5)
    whole = (tmp_path / "best.pt").read_bytes()
    for code, wrong in ((2, "best.pt"), (1, "no/detector.pt2")):
        assert export.main([str(tmp_path / "best.pt"), str(tmp_path / wrong), "--height", "64", "--width", "80"]) == code
    assert (tmp_path / "best.pt").read_bytes() == whole and sorted(os.listdir(tmp_path)) == ["best.pt", "detector.pt2"]
    assert export.main([str(tmp_path / "none.pt"), str(out), "--height", "64", "--width", "80"]) == 2
    assert export.main([str(tmp_path / "best.pt"), str(out), "--height", "0", "--width", "80"]) == 2


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="a detector in evaluation mode, got MaskRCNN in training; call model.eval"):
        exportable(small_model(), 64, 64)
    with pytest.raises(ValueError, match="expected a detector"):
        exportable(torch.nn.Linear(2, 2).eval(), 64, 64)
    with pytest.raises(ValueError, match=r"expected \[N, 3, 64, 64\], got \[1, 3, 64, 80\]; resize them"):
        exportable(small_model().eval(), 64, 64)(torch.zeros(1, 3, 64, 80))
