"""results/peers.py: a peer behind our contract starts from our weights and, where nothing is left to chance, computes what ours computes.

Where torchvision or segmentation_models_pytorch is not installed, the tests that need it skip by that name. One's own environment for them:
this project's packages and both of the two, then python -m pytest tests/test_peers.py.
"""
import copy
import csv
import json
import os
import pathlib
import sys

import numpy as np
import pytest
import torch
from detection_cases import no_objects, small_fields, two_pictures, without_masks
from PIL import Image

import minidamage
from minidamage import masks
from minidamage.checkpoint import load_checkpoint
from minidamage.data.synthetic import make_demo
from test_train import only_run

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "results"))
import peers                                                                                             # noqa: E402

sys.path.pop(0)
# every anchor and every candidate is in the losses, and validation's candidates are training's: nothing is drawn
EXHAUSTIVE = dict(rpn_batch_size_per_image=10**6, rpn_positive_fraction=1.0, box_batch_size_per_image=10**6, box_positive_fraction=1.0,
                  rpn_post_nms_top_n_train=10**4, rpn_post_nms_top_n_test=10**4)
# what the defaults of both would hide
UNUSUAL = dict(min_size=80, image_mean=(0.4, 0.5, 0.3), image_std=(0.2, 0.3, 0.25), anchor_scales=(1.0, 1.4), aspect_ratios=(0.4, 1.0, 2.2),
               rpn_nms_thresh=0.6, rpn_fg_iou_thresh=0.6, rpn_bg_iou_thresh=0.25, box_pool_size=5, box_fg_iou_thresh=0.45,
               box_bg_iou_thresh=0.4, bbox_reg_weights=(8.0, 8.0, 4.0, 4.0), sampling_ratio=1, box_nms_thresh=0.4, box_score_thresh=0.02,
               rpn_score_thresh=0.5, mask_pool_size=10)
DETECTORS = ("maskrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """The peers' names in MODELS, for the time of a test."""
    for name, entry in peers.PEERS.items():
        monkeypatch.setitem(minidamage.MODELS, name, entry)


def pair(name, prefix, num_classes=3, **fields):
    """(ours, the peer's) of one seed, in training mode, with equal weights and no random number drawn more than by the other."""
    models, states = [], []
    for each in (name, prefix + name):
        torch.manual_seed(0)
        models.append(minidamage.build_model(each, num_classes, **fields))
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and same_state(*models, tolerance=0)
    return models


def detectors(name, **fields):
    pytest.importorskip("torchvision")
    fields = {key: value for key, value in fields.items() if hasattr(minidamage.MODELS[name][1], key)}       # one without masks has fewer
    return pair(name, "torchvision_", **{**small_fields(name), **EXHAUSTIVE, **fields})


def unets(**fields):
    pytest.importorskip("segmentation_models_pytorch")
    return pair("unet", "smp_", **{"body": "resnet18", "image_size": 64, **fields})


def same_state(a, b, tolerance):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    return all((a[key].double() - b[key].double()).abs().max() <= tolerance for key in a)


def same_training_step(ours, theirs, batch):
    """Losses, all gradients, and what the step leaves in the norms' running statistics.

    Rounding may put a ReLU's input on the other side of 0, and with norms over two pictures one such input moves gradients by hundredths.
    So where they differ, ours with its weights moved by their last digit has to give the peer's gradients in one of eight trials.
    """
    start, found = copy.deepcopy(ours), [model(*batch) for model in (ours, theirs)]
    assert found[0].keys() == found[1].keys()
    torch.testing.assert_close(*({key: value.detach() for key, value in each.items()} for each in found), rtol=1e-5, atol=1e-7)
    for each in found:
        sum(each.values()).backward()
    assert same_state(ours, theirs, tolerance=1e-5)
    differs = first_difference(ours, theirs)
    for seed in range(8):
        if not differs:
            break
        moved, generator = copy.deepcopy(start), torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in moved.parameters():
                weight *= 1 + 1e-7 * torch.randn(weight.shape, generator=generator)
        sum(moved(*batch).values()).backward()
        differs = first_difference(moved, theirs)
    assert not differs, differs


def first_difference(ours, theirs):
    """The name of a parameter whose gradients differ by over a thousandth of the largest, "" where there is none."""
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters()):
        assert (a.grad is None) == (b.grad is None) == (not a.requires_grad), name
        if a.grad is not None and not (a.grad - b.grad).abs().max() <= 1e-3 * a.grad.abs().max() + 1e-9:
            return name
    return ""


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("fields", [dict(norm="frozen", frozen_stages=2), dict(norm="batch", loss_weight_cls=4.0),
                                    dict(norm="group", **UNUSUAL)])
def test_a_training_step_of_torchvisions_detectors_is_ours(name, fields):
    images, targets = two_pictures()
    ours, theirs = detectors(name, **fields)
    same_training_step(ours, theirs, (images, targets if name.startswith("mask") else without_masks(targets)))


def test_a_picture_without_damage_and_crowds_reach_torchvision_as_they_reach_ours():
    images, targets = two_pictures()
    targets[0]["iscrowd"] = torch.tensor([True, False])
    same_training_step(*detectors(DETECTORS[0]), (images, [targets[0], no_objects(images[1])]))


@pytest.mark.parametrize("name", DETECTORS)
def test_torchvisions_detections_and_validation_losses_are_ours(name):
    images, targets = two_pictures()
    ours, theirs = (model.eval() for model in detectors(name, norm="batch", **UNUSUAL))
    before, (losses, found) = torch.get_rng_state(), theirs.losses_and_detections(images, targets)
    assert torch.equal(torch.get_rng_state(), before) and same_state(ours, theirs, tolerance=0)        # validation leaves no trace
    torch.testing.assert_close(losses, ours.losses_and_detections(images, targets)[0], rtol=1e-5, atol=1e-7)
    forms = ("probability", "bool", "raw", "rle") if name.startswith("mask") else ("probability",)
    for form in forms:
        for a, b in zip(ours.detect(images, form), theirs.detect(images, form)):
            assert len(a["boxes"]) == 8 and a.keys() == b.keys()
            if form == "rle":
                assert (masks.iou(a.pop("masks"), b.pop("masks"), [False] * 8).diagonal() > 0.999).all()
            elif form == "bool":
                assert (a.pop("masks") != b.pop("masks")).float().mean() < 1e-4                        # a probability of 0.5, rounded
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert [len(each["boxes"]) for each in found] == [8, 8]


@pytest.mark.parametrize("num_classes", [2, 4])
def test_a_training_step_and_the_logits_of_smps_unet_are_ours(num_classes):
    ours, theirs = unets(num_classes=num_classes)
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    targets = [{"label_map": torch.randint(0, num_classes, (64, 64))} for _ in images]
    same_training_step(ours, theirs, (images, targets))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_what_torchvision_has_not_is_named():
    pytest.importorskip("torchvision")
    build = lambda **fields: minidamage.build_model("torchvision_maskrcnn_resnet50_fpn", 3, **{**small_fields(DETECTORS[0]), **fields})
    for fields in (dict(fpn=False), dict(mask_loss="dice"), dict(rpn_channels=8), dict(norm="batch", frozen_stages=2)):
        with pytest.raises(ValueError, match=f"{list(fields)[-1]}: expected .* torchvision"):
            build(**fields)
    images, targets = two_pictures()
    with pytest.raises(ValueError, match="--accumulate 1"):
        build().loss_counts(images, targets)
    with pytest.raises(ValueError, match="multi_scale"):
        build()(images, [{**target, "min_size": 64} for target in targets])


def run_and_evaluate(arguments, tmp_path):
    """Two steps by train.py, the second one after a resume; returns (run folder, the numbers of evaluate.py)."""
    assert peers.main(["train", *map(str, arguments), "--out", str(tmp_path), "--device", "cpu", "--epochs", "1"]) == 0
    folder = only_run(tmp_path)
    assert peers.main(["train", "--resume", folder, "--epochs", "2"]) == 0
    assert peers.main(["evaluate", "--checkpoint", folder, "--draws", "0", "--worst", "1"]) == 0
    return folder, json.load(open(os.path.join(folder, "evaluation-test", "results.json"), encoding="utf-8"))


def test_torchvisions_mask_rcnn_is_trained_and_scored_by_our_scripts(tmp_path, capsys):
    ours, theirs = detectors(DETECTORS[0], norm="batch")
    body = tmp_path / "body.pth"
    torch.save(minidamage.build_model(DETECTORS[0], 3, body="resnet18").backbone.body.state_dict(), body)
    data = make_demo(str(tmp_path / "sets" / "cars"), images=10, size=64, seed=3, val_fraction=0.4)      # 6 to train: one step an epoch
    fields = {**{key: value for key, value in theirs.config.__dict__.items() if key in small_fields(DETECTORS[0])}, "warmup_iters": 0}
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    sets = [word for key, value in fields.items() for word in ("--set", f"{key}={text(value)}")]
    folder, numbers = run_and_evaluate(["--model", "torchvision_maskrcnn_resnet50_fpn", "--data", data, "--batch-size", 6, "--ema", 0.9,
                                        "--pretrained", body, *sets], tmp_path / "runs")
    model, checkpoint = load_checkpoint(os.path.join(folder, "best.pt"))
    assert isinstance(model, peers.TorchvisionMaskRCNN) and checkpoint["model"] == "torchvision_maskrcnn_resnet50_fpn"
    assert {"segm/AP", "bbox/AP"} <= numbers["stats"].keys() and numbers["pictures"] == 2
    printed = capsys.readouterr().out
    assert f"{body}: " in printed and "type results/peers.py train" in printed and "type results/peers.py evaluate" in printed


def test_smps_unet_is_trained_as_ours_is(tmp_path):
    """The same losses in two steps and the same weights after them, so the same scores: the one loop saw the same pictures."""
    pytest.importorskip("segmentation_models_pytorch")
    folder, rng = tmp_path / "cracks", np.random.default_rng(1)
    (folder / "images").mkdir(parents=True), (folder / "masks").mkdir()
    for i in range(12):                                                                                 # 9 to train: one step an epoch
        mask = np.zeros((64, 64), np.uint8)
        mask[rng.integers(8, 56):][:3] = 255
        Image.fromarray(np.where(mask[..., None], 20, rng.integers(90, 160, (64, 64, 3))).astype(np.uint8)).save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
    weights, losses, numbers = {}, {}, {}
    for name in ("unet", "smp_unet"):
        arguments = ["--model", name, "--data", folder, "--batch-size", 9, "--size", 64, "--lr", 0.05, "--set", "body=resnet18",
                     "--set", "warmup_iters=0", "--set", "optimizer=sgd"]
        run, numbers[name] = run_and_evaluate(arguments, tmp_path / name)
        weights[name] = load_checkpoint(os.path.join(run, "last.pt"))[0]
        rows = list(csv.DictReader(open(os.path.join(run, "metrics.csv"), encoding="utf-8")))
        losses[name] = [float(row["train/loss"]) for row in rows]
    assert isinstance(weights["smp_unet"], peers.SmpUnet) and same_state(*weights.values(), tolerance=1e-3)
    assert losses["unet"] == pytest.approx(losses["smp_unet"], rel=1e-3) and losses["unet"][1] < losses["unet"][0] - 0.05
    stats = [each["sizes"]["native"]["points"]["at 0.5"]["stats"]["pixel/IoU"] for each in numbers.values()]
    assert stats[0] == pytest.approx(stats[1], abs=0.01)


def test_a_peer_that_is_not_installed_and_a_script_that_is_none_are_mistakes(capsys):
    with pytest.raises(ValueError, match="pip install no_such_package"):
        peers.skeleton("no_such_package", dict)
    assert peers.main([]) == peers.main(["predict", "a.jpg"]) == 2
    assert "expected train or evaluate" in capsys.readouterr().err
