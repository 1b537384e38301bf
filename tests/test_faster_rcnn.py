"""Faster R-CNN: Mask R-CNN's boxes without its masks, torchvision's names, and every script's path without a mask."""
import json
import pathlib

import numpy as np
import pytest
import torch

import minidamage
import evaluate
import predict
import train
from data_sets import picture
from detection_cases import no_objects, overfit_until_found, small_model, two_pictures, without_masks
from minidamage.layers.fpn import Backbone, FeaturePyramidNetwork
from minidamage.visualize.stages import draw_stages
from test_data_voc import annotation
from test_mask_rcnn import TinyBody, close
from test_resnet import generated_weights

DATA = pathlib.Path(__file__).parent / "data"
LOSSES = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


# ---- torchvision ------------------------------------------------------------------------------------------------------------------

def test_state_dict_is_torchvisions():
    want = json.loads((DATA / "state_dict_fasterrcnn.json").read_text())["fasterrcnn_resnet50_fpn"]
    with torch.device("meta"):                                              # names and shapes, no values
        model = minidamage.build_model("fasterrcnn_resnet50_fpn", num_classes=91, norm="batch")
        frozen = minidamage.build_model("fasterrcnn_resnet50_fpn", num_classes=91)               # the published weights' norms
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: shape for k, shape, _ in want["keys"]}
    assert sum(p.numel() for p in model.parameters()) == want["params"]
    assert sum(p.numel() for p in frozen.parameters()) == 41_755_286
    frozen.load_state_dict(model.state_dict())
    with torch.device("meta"):
        for norm in ("batch", "frozen"):
            published = minidamage.build_model("fasterrcnn_resnet50_fpn", num_classes=91, norm=norm, norm_eps=0.0).backbone.body
            assert {module.eps for module in published.modules() if hasattr(module, "running_var")} == {0.0}
    with pytest.raises(ValueError, match="norm_eps: expected 0 or more, got -1"):
        minidamage.build_model("fasterrcnn_resnet50_fpn", num_classes=2, norm_eps=-1.0)


def test_pyramid_of_the_full_model_equals_torchvisions():
    stored = np.load(DATA / "model_forward_detection.npz")             # torchvision's two detectors have one backbone, with equal names
    model = minidamage.build_model("fasterrcnn_resnet50_fpn", num_classes=91, norm="batch").eval()
    model.load_state_dict(generated_weights(model))
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(stored["x_fpn"]).contiguous(memory_format=torch.channels_last))
    for feature, name in zip(features, ("0", "1", "2", "3", "pool")):
        want = torch.from_numpy(stored[f"maskrcnn_resnet50_fpn/{name}"])
        close(feature[:, :want.shape[1]], want)


@pytest.fixture(scope="module")
def stored():
    return {k: torch.from_numpy(v) for k, v in np.load(DATA / "tiny_maskrcnn.npz").items()}


@pytest.fixture
def tiny(stored):
    """Ours with the weights of torchvision's stored tiny Mask R-CNN, less its mask branch."""
    model = minidamage.build_model(
        "fasterrcnn_resnet50_fpn", num_classes=4, body="resnet18", fpn_channels=8, rpn_channels=8, min_size=128, max_size=192,
        anchor_sizes=(16, 32, 64, 128, 256), rpn_pre_nms_top_n_train=300, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_train=200,
        rpn_post_nms_top_n_test=100, rpn_batch_size_per_image=10 ** 6, box_batch_size_per_image=10 ** 6, box_detections_per_img=30,
        box_head_channels=32)
    model.backbone = Backbone(TinyBody(), FeaturePyramidNetwork([8] * 4, 8), strides=(4, 8, 16, 32))
    model.load_state_dict({k[3:]: v for k, v in stored.items() if k.startswith("sd/") and ".mask_" not in k})
    return model.to(memory_format=torch.channels_last)


def test_losses_and_detections_equal_torchvisions(tiny, stored):
    images = [stored["img0"], stored["img1"]]
    targets = [{"boxes": stored[f"gt_boxes{i}"], "labels": stored[f"gt_labels{i}"]} for i in range(2)]
    losses = tiny.train()(images, targets)
    assert set(losses) == LOSSES
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(stored[f"loss/{name}"].item(), rel=1e-5), name
    for i, result in enumerate(tiny.eval()(images)):
        assert set(result) == {"boxes", "labels", "scores"} and torch.equal(result["labels"], stored[f"out{i}/labels"])
        close(result["boxes"], stored[f"out{i}/boxes"])
        close(result["scores"], stored[f"out{i}/scores"])


# ---- training and use -------------------------------------------------------------------------------------------------------------

def test_overfits_two_pictures():
    images, targets = two_pictures()
    model = small_model("fasterrcnn_resnet50_fpn")
    first, last = overfit_until_found(model, images, without_masks(targets))
    assert last < 0.35 * first


def test_pictures_without_objects_train_and_masks_are_ignored():
    images, targets = two_pictures()
    model = small_model("fasterrcnn_resnet50_fpn").train()
    losses = model(images, [no_objects(images[0]), targets[1]])
    assert set(losses) == LOSSES and all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_mask_form_gives_boxes_alone_and_the_stages_are_drawn():
    images, targets = two_pictures()
    model = small_model("fasterrcnn_resnet50_fpn", box_score_thresh=0.0).eval()
    for form in ("probability", "bool", "rle", "raw"):
        assert all(set(result) == {"boxes", "labels", "scores"} for result in model.detect(images, form))
    results, stages = model.detect(images, "rle", stages=True)
    assert set(stages[0]) == {"proposals", "objectness", "features", "boxes", "labels", "scores"}
    strip = draw_stages(images[0], stages[0], ["a", "b"], context=False)
    assert strip.shape[1] > 3 * strip.shape[0]                              # four pictures in a row
    losses, detections = model.losses_and_detections(images, without_masks(targets))
    assert set(losses) == LOSSES and torch.equal(detections[0]["boxes"], results[0]["boxes"])


def voc_set(root, count=10):
    """Pictures of a bright rectangle with its VOC XML, six classes of NEU-DET being none of theirs."""
    rng = np.random.default_rng(0)
    from PIL import Image
    for i in range(count):
        path = picture(root / "images" / f"{i}.png", 64, 48, seed=i)
        x, y = int(rng.integers(1, 30)), int(rng.integers(1, 20))
        pixels = np.array(Image.open(path))
        pixels[y - 1:y + 19, x - 1:x + 23] = 250
        Image.fromarray(pixels).save(path)
        annotation(root / "annotations" / f"{i}.xml", [("dent", (x, y, x + 23, y + 19))])
    return root


def test_every_script_works_without_masks(tmp_path, capsys):
    """Train, evaluate and predict on a set of boxes: no mask metric, threshold or picture is expected anywhere."""
    fields = dict(body="resnet18", norm="group", min_size=64, max_size=96, fpn_channels=8, rpn_channels=8, anchor_sizes="8,16,24,32,48",
                  rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10, box_head_channels=16, box_batch_size_per_image=16)
    settings = [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "runs"
    command = ["--model", "fasterrcnn_resnet50_fpn", "--data", str(voc_set(tmp_path / "set")), "--epochs", "1", "--device", "cpu",
               "--out", str(out), *settings]
    assert train.main(command) == 0
    run, = (path for path in out.iterdir() if path.is_dir() and (path / "best.pt").is_file())
    header = (run / "metrics.csv").read_text().splitlines()[0]
    assert "val/bbox/AP" in header and "segm" not in header and "loss_mask" not in header
    assert evaluate.main(["--checkpoint", str(run / "best.pt"), "--device", "cpu", "--draws", "5"]) == 0
    results = json.loads((run / "evaluation-test/results.json").read_text())
    assert "bbox/AP50" in results["stats"] and not [name for name in results["stats"] if name.startswith("segm")]
    photograph = tmp_path / "set/images/0.png"
    assert predict.main([str(photograph), "--checkpoint", str(run / "best.pt"), "--out", str(tmp_path / "found"), "--score", "0.05",
                         "--explain", "--device", "cpu"]) == 0
    found = json.loads((tmp_path / "found/0.json").read_text())
    assert found["mask_threshold"] is None and all("rle" not in finding for finding in found["detections"])
    assert (tmp_path / "found/0.stages.png").is_file()
