"""Weights both ways: what others load, under their names; what comes from others; and what happens to a head that does not fit."""
import json
import os
import pathlib

import numpy as np
import pytest
import torch

import minidamage
from detection_cases import small_fields, small_model, two_pictures
from minidamage import checkpoint
from minidamage.layers.resnet import ResNet
from test_resnet import generated_weights

DATA = pathlib.Path(__file__).parent / "data"


def saved(folder, model):
    """best.pt of a model, as train.py leaves it."""
    names = [f"class{k}" for k in range(1, model.num_classes)]
    checkpoint.save_checkpoint(folder / "best.pt", {"model": model.name, "config": vars(model.config), "num_classes": model.num_classes,
                                                    "class_names": names, "weights": model.state_dict()})
    return folder / "best.pt"


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn"])
def test_an_exported_file_has_torchvisions_names_and_shapes(name, tmp_path, capsys):
    file = "state_dicts_detection.json" if name.startswith("mask") else "state_dict_fasterrcnn.json"
    want = {key: shape for key, shape, _ in json.loads((DATA / file).read_text())[name]["keys"]}
    model = minidamage.build_model(name, 91, norm="batch")
    out = tmp_path / "weights.pth"
    assert checkpoint.main(["export", str(saved(tmp_path, model)), str(out)]) == 0
    assert f"{len(want)} tensors of {name}, 91 classes" in capsys.readouterr().out
    weights = torch.load(out, weights_only=True)
    assert type(weights) is dict and {key: list(value.shape) for key, value in weights.items()} == want
    assert all(value.is_contiguous() and torch.equal(value, model.state_dict()[key]) for key, value in weights.items())
    assert sorted(os.listdir(tmp_path)) == ["best.pt", "weights.pth"]       # written beside and renamed


@pytest.mark.parametrize("name, fields", [
    *((name, small_fields(name)) for name in ("maskrcnn_resnet50_fpn", "damagenet", "danet")),
    ("fcn_resnet50", dict(body="resnet18", image_size=64, aux=True)), ("deeplabv3_resnet50", dict(body="resnet18", image_size=64)),
    ("unet", dict(body="resnet18", image_size=64))])
def test_what_is_exported_comes_back_whole(name, fields, tmp_path):
    torch.manual_seed(0)
    source = minidamage.build_model(name, 3, **fields)
    checkpoint.export_weights(saved(tmp_path, source), tmp_path / "weights.pth")
    torch.manual_seed(1)
    twin = minidamage.build_model(name, 3, **fields)
    report = checkpoint.load_pretrained(twin, tmp_path / "weights.pth")
    assert not report["missing"] + report["unexpected"] + report["mismatched"]
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in source.state_dict().items())


def test_the_body_alone_equals_torchvisions_classifier_below_its_last_layer(tmp_path):
    """From a detector to the classifier's names: torchvision's stored ResNet-50 output comes out again."""
    model = minidamage.build_model("fasterrcnn_resnet50_fpn", 2, norm="batch")
    whole = ResNet("resnet50", num_classes=1000).eval()
    whole.load_state_dict(generated_weights(whole))
    model.backbone.body.load_state_dict({key: value for key, value in whole.state_dict().items() if not key.startswith("fc.")})
    assert checkpoint.main(["export", "--body", str(saved(tmp_path, model)), str(tmp_path / "body.pth")]) == 0
    names = json.loads((DATA / "state_dicts_detection.json").read_text())["resnet50"]["keys"]
    weights = torch.load(tmp_path / "body.pth", weights_only=True)
    assert set(weights) == {key for key, *_ in names if not key.startswith("fc.")}
    fresh = ResNet("resnet50", num_classes=1000).eval()
    fresh.load_state_dict({**weights, "fc.weight": whole.fc.weight, "fc.bias": whole.fc.bias})
    stored = np.load(DATA / "model_forward_detection.npz")
    with torch.no_grad():
        out = fresh(torch.from_numpy(stored["x"])).numpy()
    np.testing.assert_allclose(out, stored["resnet50"], atol=1e-5 * np.abs(stored["resnet50"]).max())


def test_frozen_and_trained_norms_take_each_others_files(tmp_path, narrow):
    """A file of frozen norms has no counters, one of trained norms has; both load everywhere, and the numbers are the same."""
    images, _ = two_pictures()
    frozen = small_model(norm="frozen", seed=1).eval()
    frozen.load_state_dict(generated_weights(frozen))
    checkpoint.export_weights(saved(tmp_path, frozen), tmp_path / "frozen.pth")
    trained = small_model(norm="batch", seed=2).eval()
    trained.load_state_dict(torch.load(tmp_path / "frozen.pth", weights_only=True))              # strict
    report = checkpoint.load_pretrained(small_model(norm="batch"), tmp_path / "frozen.pth")
    assert not report["unexpected"] + report["mismatched"] and all(key.endswith("num_batches_tracked") for key in report["missing"])
    for a, b in zip(frozen(images), trained(images)):
        torch.testing.assert_close(a["scores"], b["scores"])
    checkpoint.export_weights(saved(tmp_path, trained), tmp_path / "trained.pth")
    report = checkpoint.load_pretrained(small_model(norm="frozen"), tmp_path / "trained.pth")
    assert not report["missing"] + report["mismatched"] and all(key.endswith("num_batches_tracked") for key in report["unexpected"])


def test_a_head_of_other_classes_is_named_and_everything_else_is_kept(tmp_path):
    """COCO's 91 classes into ours, the old file's names too: class, box and mask outputs keep their start, the other tensors load."""
    source, model = small_model(num_classes=91, seed=1), small_model(num_classes=4, seed=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    old = {key.replace("mask_head.0.0.", "mask_head.mask_fcn1.").replace("rpn.head.conv.0.0.", "rpn.head.conv."): value
           for key, value in source.state_dict().items()}
    torch.save(old, tmp_path / "coco.pth")
    report = checkpoint.load_pretrained(model, tmp_path / "coco.pth")
    layers = "box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits"
    heads = {f"roi_heads.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert {entry.split()[0] for entry in report["mismatched"]} == heads and not report["missing"] + report["unexpected"]
    assert "roi_heads.box_predictor.cls_score.bias (91,) for (4,)" in report["mismatched"]
    assert set(report["loaded"]) == set(before) - heads
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in heads else source.state_dict()[key]), key


def test_mistakes(tmp_path, capsys):
    assert checkpoint.main(["export", str(tmp_path / "none.pt"), str(tmp_path / "out.pth")]) == 2
    path = saved(tmp_path, small_model("fasterrcnn_resnet50_fpn"))
    whole = path.read_bytes()
    assert checkpoint.main(["export", str(path), str(path)]) == 2 and path.read_bytes() == whole
    assert "no such file or folder" in capsys.readouterr().err
    path = saved(tmp_path, minidamage.build_model("custom_segnet2", 2, image_size=64))
    assert checkpoint.main(["export", "--body", str(path), str(tmp_path / "out.pth")]) == 2
    assert "custom_segnet2, which has no ResNet body" in capsys.readouterr().err
    assert checkpoint.main(["export", str(path), str(tmp_path / "gone/out.pth")]) == 1 and not (tmp_path / "out.pth").exists()
