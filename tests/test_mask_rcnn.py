"""Mask R-CNN, end to end, against torchvision's stored run of a tiny model: every stage, every loss, every gradient."""
import json
import pathlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minidamage
from detection_cases import SMALL, no_objects, overfit, small_model, two_pictures
from minidamage import masks as rle_masks
from minidamage.layers import detector, roi_heads
from minidamage.layers.fpn import Backbone, FeaturePyramidNetwork
from minidamage.layers.matching import gather_rows
from minidamage.layers.roi_heads import MultiScaleRoIAlign
from minidamage.layers.rpn import RPNHead
from test_resnet import generated_weights

DATA = pathlib.Path(__file__).parent / "data"


# ---- torchvision's tiny model ---------------------------------------------------------------------------------------------------

class TinyBody(nn.Module):
    """The stored model's body: four convolutions with ReLU, strides 4, 8, 16, 32."""

    def __init__(self):
        super().__init__()
        self.c1 = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.c2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.c3 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.c4 = nn.Conv2d(8, 8, 3, stride=2, padding=1)

    def forward(self, x):
        maps = []
        for conv in (self.c1, self.c2, self.c3, self.c4):
            x = F.relu(conv(x))
            maps.append(x)
        return maps


@pytest.fixture(scope="module")
def stored():
    return {k: torch.from_numpy(v) for k, v in np.load(DATA / "tiny_maskrcnn.npz").items()}


@pytest.fixture
def tiny(stored):
    """Our model with the stored weights; the samplers take everything, so nothing is random."""
    model = minidamage.build_model(
        "maskrcnn_resnet50_fpn", num_classes=4, body="resnet18", fpn_channels=8, rpn_channels=8, min_size=128, max_size=192,
        anchor_sizes=(16, 32, 64, 128, 256),
        rpn_pre_nms_top_n_train=300, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100,
        rpn_batch_size_per_image=10 ** 6, box_batch_size_per_image=10 ** 6, box_detections_per_img=30, box_head_channels=32,
        mask_layers=(8, 8), mask_dim_reduced=8)
    model.backbone = Backbone(TinyBody(), FeaturePyramidNetwork([8] * 4, 8), strides=(4, 8, 16, 32))
    model.load_state_dict({k[3:]: v for k, v in stored.items() if k.startswith("sd/")})
    return model.to(memory_format=torch.channels_last)


def tiny_inputs(stored):
    images = [stored["img0"], stored["img1"]]
    targets = [{"boxes": stored[f"gt_boxes{i}"], "labels": stored[f"gt_labels{i}"], "masks": stored[f"gt_masks{i}"]} for i in range(2)]
    return images, targets


def close(got, want, tolerance=1e-5):
    """Relative to the largest value of the whole tensor."""
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item()
    assert error <= tolerance, f"relative error {error:.2e}"


def test_every_stage_of_inference_equals_torchvisions(tiny, stored):
    tiny.eval()
    images, _ = tiny_inputs(stored)
    with torch.no_grad():
        batch, _ = tiny.transform(images)
        close(batch.tensors, stored["batched"])
        assert batch.sizes == [tuple(size) for size in stored["image_sizes"].tolist()]
        features = tiny.backbone(batch.tensors)
        for feature, name in zip(features, ("0", "1", "2", "3", "pool")):
            close(feature, stored[f"feat/{name}"])
        objectness, deltas = tiny.rpn.head(features)
        for level in range(5):
            N, A, h, w = stored[f"rpn_obj{level}"].shape
            close(objectness[level].view(N, h, w, A).permute(0, 3, 1, 2), stored[f"rpn_obj{level}"])
            close(deltas[level].view(N, h, w, 4 * A).permute(0, 3, 1, 2), stored[f"rpn_reg{level}"])
        proposals, _ = tiny.rpn(features, batch.tensors.shape[-2:], batch.sizes)
        for i in range(2):
            close(proposals.boxes[i][proposals.valid[i]], stored[f"proposals{i}"])
        rois = torch.cat([F.pad(stored[f"proposals{i}"], (1, 0), value=i) for i in range(2)])
        box_features = tiny.roi_heads.box_roi_pool(features, rois)
        close(box_features[:8], stored["box_features_first8"])
        logits, regression = tiny.roi_heads.box_predictor(tiny.roi_heads.box_head(box_features))
        close(logits, stored["class_logits"])
        close(regression, stored["box_regression"])


def test_detections_equal_torchvisions(tiny, stored):
    results = tiny.eval()(tiny_inputs(stored)[0])
    for i, result in enumerate(results):
        close(result["boxes"], stored[f"out{i}/boxes"])
        close(result["scores"], stored[f"out{i}/scores"])
        assert torch.equal(result["labels"], stored[f"out{i}/labels"])
        assert (result["masks"] - stored[f"out{i}/masks"].float()).abs().max() < 1e-3          # stored as float16


def test_losses_and_every_gradient_equal_torchvisions(tiny, stored):
    tiny.train()
    losses = tiny(*tiny_inputs(stored))
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(stored[f"loss/{name}"].item(), rel=1e-5), name
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in tiny.named_parameters()}
    assert set(gradients) == {k[5:] for k in stored if k.startswith("grad/")}
    for name, gradient in gradients.items():
        close(gradient, stored[f"grad/{name}"])


def test_the_heads_sparse_form_equals_its_dense_form():
    """Values and gradients at chosen anchors, corners and borders of every level among them."""
    head = RPNHead(4, num_anchors=3, conv_channels=5).double()
    for p in head.parameters():
        torch.nn.init.normal_(p)
    features = [torch.randn(2, 4, h, w, dtype=torch.float64).contiguous(memory_format=torch.channels_last).requires_grad_()
                for h, w in ((5, 7), (3, 4), (1, 1))]
    total = 3 * (35 + 12 + 1)
    anchors = torch.stack([torch.randperm(total), torch.arange(total)])            # every anchor, one row shuffled
    dense = [gather_rows(torch.cat(parts, dim=1), anchors) for parts in head(features)]
    sparse = head.at(features, anchors)
    leaves = [*features, *head.parameters()]
    go = [torch.randn_like(out) for out in dense]
    for a, b in zip(sparse, dense):
        torch.testing.assert_close(a, b)
    for a, b in zip(torch.autograd.grad(sparse, leaves, go), torch.autograd.grad(dense, leaves, go)):
        torch.testing.assert_close(a, b)


# ---- names, counts and published weights ----------------------------------------------------------------------------------------

def test_state_dict_is_torchvisions():
    want = json.loads((DATA / "state_dicts_detection.json").read_text())["maskrcnn_resnet50_fpn"]
    with torch.device("meta"):                                             # names and shapes, no values
        model = minidamage.build_model("maskrcnn_resnet50_fpn", num_classes=91, norm="batch")
        frozen = minidamage.build_model("maskrcnn_resnet50_fpn", num_classes=91)
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: shape for k, shape, _ in want["keys"]}
    assert sum(p.numel() for p in model.parameters()) == want["params"]
    # the published weights were trained with frozen norms, the default: their affine maps are constants there
    assert sum(p.numel() for p in frozen.parameters()) == 44_401_393
    frozen.load_state_dict(model.state_dict())                             # and take either file


def test_old_torchvision_names_load():
    """The names inside torchvision's published COCO file."""
    model = small_model()
    old = {}
    for key, value in model.state_dict().items():
        for new_part, old_part in (("_blocks.0.0.", "_blocks.0."), ("_blocks.1.0.", "_blocks.1."), ("_blocks.2.0.", "_blocks.2."),
                                   ("_blocks.3.0.", "_blocks.3."), ("rpn.head.conv.0.0.", "rpn.head.conv."),
                                   ("mask_head.0.0.", "mask_head.mask_fcn1."), ("mask_head.1.0.", "mask_head.mask_fcn2.")):
            key = key.replace(new_part, old_part)
        old[key] = value + 1 if value.is_floating_point() else value
    assert "backbone.fpn.inner_blocks.3.weight" in old and "roi_heads.mask_head.mask_fcn2.bias" in old
    model.load_state_dict(old)
    assert torch.equal(model.rpn.head.conv[0][0].bias, old["rpn.head.conv.bias"])


def test_pyramid_of_the_full_model_equals_torchvisions():
    stored = np.load(DATA / "model_forward_detection.npz")
    model = minidamage.build_model("maskrcnn_resnet50_fpn", num_classes=91, norm="batch").eval()
    model.load_state_dict(generated_weights(model))
    with torch.no_grad():
        features = model.backbone(torch.from_numpy(stored["x_fpn"]).contiguous(memory_format=torch.channels_last))
    for feature, name in zip(features, ("0", "1", "2", "3", "pool")):
        want = torch.from_numpy(stored[f"maskrcnn_resnet50_fpn/{name}"])
        close(feature[:, :want.shape[1]], want)


def test_levels_of_boxes_equal_torchvisions():
    stored = np.load(DATA / "multiscale_roi_align.npz")
    boxes = torch.from_numpy(np.concatenate([stored["boxes0"], stored["boxes1"]]))
    for scale in (224, 56):
        pool = MultiScaleRoIAlign((4, 8, 16, 32), (7, 7), canonical_scale=scale)
        assert np.array_equal(pool.levels(boxes).numpy(), stored[f"cs{scale}_levels"])


# ---- training -------------------------------------------------------------------------------------------------------------------

def test_overfits_two_pictures():
    images, targets = two_pictures()
    model = small_model()
    first, last = overfit(model, images, targets)
    assert last < 0.35 * first
    for result, target in zip(model.detect(images, "bool"), targets):
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"].bool()):
            best = max((iou(m, mask) for m, l, s in zip(result["masks"], result["labels"], result["scores"]) if l == label and s > 0.5),
                       default=0.0)
            assert best > 0.7, f"label {label.item()} {box.tolist()}: best mask IoU {best:.2f}"


def iou(a, b):
    return ((a & b).sum() / (a | b).sum()).item()


def test_pictures_without_objects_train():
    images, targets = two_pictures()
    for case in ([no_objects(images[0]), targets[1]], [no_objects(image) for image in images]):
        model = small_model().train()
        losses = model(images, case)
        assert all(torch.isfinite(loss) for loss in losses.values()), losses
        sum(losses.values()).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())      # None would stall many GPUs
        assert model.roi_heads.box_head.fc6.weight.grad.abs().sum() > 0 and model.backbone.body.conv1.weight.grad.abs().sum() > 0


def test_autocast_trains_and_detects():
    images, targets = two_pictures()
    model = small_model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values()) and all(loss.dtype == torch.float32 for loss in losses.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = model.eval().detect(images, "rle")
    assert all(result["boxes"].dtype == torch.float32 for result in results)


def test_the_same_seed_gives_the_same_losses():
    images, targets = two_pictures()
    runs = []
    for _ in range(2):
        model = small_model().train()
        torch.manual_seed(3)
        runs.append({name: loss.item() for name, loss in model(images, targets).items()})
    assert runs[0] == runs[1]


def test_validation_gives_losses_and_detections_and_changes_nothing():
    images, targets = two_pictures()
    model = small_model(norm="batch").eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random_state = torch.get_rng_state()
    losses, results = model.losses_and_detections(images, targets)
    again, _ = model.losses_and_detections(images, targets)
    assert losses == again and set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for result, want in zip(results, model.detect(images, "rle")):
        assert torch.equal(result["boxes"], want["boxes"]) and result["masks"] == want["masks"]
    with pytest.raises(ValueError, match="model.eval"):
        model.train().losses_and_detections(images, targets)


def test_fixed_slots_and_live_rows_give_the_same_losses_and_gradients(monkeypatch):
    images, targets = two_pictures()
    gradients, values = [], []
    for slots in (False, True):
        if slots:
            monkeypatch.setattr(roi_heads, "live_rows", lambda valid: slice(None))
        model = small_model().train()
        torch.manual_seed(1)
        losses = model(images, [targets[0], no_objects(images[1])])
        sum(losses.values()).backward()
        values.append({name: loss.item() for name, loss in losses.items()})
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    close(gradients[0], gradients[1])


def test_crowd_regions_are_no_targets():
    images, targets = two_pictures()
    plain = [{k: v[:1] for k, v in target.items()} for target in targets]
    crowd = [{**target, "iscrowd": torch.tensor([False, True])} for target in targets]
    model = small_model().eval()
    assert model.losses_and_detections(images, plain)[0] == model.losses_and_detections(images, crowd)[0]


@pytest.mark.parametrize("min_size", [96, 50])
def test_masks_as_run_lengths_have_the_same_losses(min_size):
    images, targets = two_pictures()
    targets[0]["iscrowd"], targets[1] = torch.tensor([False, True]), {**targets[1], "iscrowd": torch.tensor([False, False])}
    coded = [{**{k: v for k, v in t.items() if k != "masks"}, "rles": rle_masks.encode(t["masks"].numpy())} for t in targets]
    model = small_model(min_size=min_size).eval()
    want = model.losses_and_detections(images, targets)[0]
    assert want["loss_mask"] > 0 and model.losses_and_detections(images, coded)[0] == want
    assert torch.equal(*(model.transform(images, each)[1][1]["masks"] for each in (targets, coded)))
    with pytest.raises(ValueError, match=r"expected 2 rles of size \[50, 112\].*, got 2 of \[\(96, 112\)\]"):
        model.losses_and_detections([images[0][:, :50], images[1]], coded)
    with pytest.raises(ValueError, match=r"expected 2 rles of size \[96, 112\] \(the picture's\), got 1"):
        model.losses_and_detections(images, [{**t, "rles": t["rles"][:1]} for t in coded])
    nothing = [{**no_objects(image), "rles": []} for image in images]
    assert model.losses_and_detections(images, nothing)[0] == model.losses_and_detections(images, [*map(no_objects, images)])[0]


def test_targets_without_crowds_stay_where_the_loader_put_them():
    """In pinned memory, with a GPU: a copy would be another megabyte an object, and waited for."""
    images, targets = two_pictures()
    checked = detector.check_targets(images, [{**target, "iscrowd": torch.zeros(2, dtype=torch.bool)} for target in targets], 3)
    assert all(one[key] is other[key] for one, other in zip(checked, targets) for key in ("boxes", "labels", "masks"))


@pytest.mark.parametrize("proposals", ["rpn+gt", "rpn", "gt"])
def test_candidates_of_the_box_stage(proposals):
    images, targets = two_pictures()
    targets[1] = no_objects(images[1])
    model = small_model(proposals=proposals).train()
    batch, resized = model.transform(images, targets)
    found, _ = model.rpn(model.backbone(batch.tensors), batch.tensors.shape[-2:], batch.sizes)
    boxes, usable = model.roi_heads.add_gt_proposals(found, [t["boxes"] for t in resized])
    rpn = found.valid.sum(1).tolist()
    assert usable.sum(1).tolist() == {"rpn+gt": [rpn[0] + 2, rpn[1]], "rpn": rpn, "gt": [2, rpn[1]]}[proposals]
    assert proposals == "rpn" or torch.equal(boxes[0][usable[0]][-2:], resized[0]["boxes"])
    sum(model(images, targets).values()).backward()


def test_min_proposals_fills_up_what_suppression_left():
    images, _ = two_pictures()
    kept = {}
    for minimum in (0, 25):
        model = small_model(rpn_nms_thresh=0.0, min_proposals=minimum, anchor_sizes=(48, 64, 96, 128, 160)).eval()
        batch, _ = model.transform(images)
        proposals, _ = model.rpn(model.backbone(batch.tensors), batch.tensors.shape[-2:], batch.sizes)
        kept[minimum] = [boxes[valid] for boxes, valid in zip(proposals.boxes, proposals.valid)]
    for few, more in zip(kept[0], kept[25]):
        assert len(few) < 25 and len(more) == 25
        assert torch.equal(more[:len(few)], few)                       # the survivors first, then the best of the others


@pytest.mark.parametrize("fields", [
    dict(fpn=False), dict(body="resnet34"), dict(body="resnet50"), dict(norm="batch"), dict(norm="frozen"), dict(frozen_stages=2),
    dict(anchor_scales=(1.0, 1.26, 1.59), rpn_channels=32)])
def test_configurations_train_and_detect(fields):
    images, targets = two_pictures()
    model = small_model(**fields).train()
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    results = model.eval()(images)
    assert all(r["masks"].shape == (len(r["boxes"]), 1, *image.shape[-2:]) for r, image in zip(results, images))


def test_without_a_pyramid_there_is_one_map_of_stride_16():
    model = small_model(fpn=False).eval()
    features = model.backbone(torch.zeros(1, 3, 96, 128))
    assert [tuple(f.shape) for f in features] == [(1, 16, 6, 8)]
    assert model.rpn.head.cls_logits.out_channels == 15 and model.backbone.body.layer4 is None


# ---- inference ------------------------------------------------------------------------------------------------------------------

def test_forms_of_masks_agree():
    images, targets = two_pictures()
    model = small_model(box_score_thresh=0.0).eval()
    probability, boolean, rles, raw = (model.detect(images, form) for form in ("probability", "bool", "rle", "raw"))
    for i, image in enumerate(images):
        assert len(probability[i]["boxes"]) > 0 and probability[i]["masks"].shape[1:] == (1, *image.shape[-2:])
        assert raw[i]["masks"].shape[1:] == (1, 28, 28)
        mask = boolean[i]["masks"]
        assert mask.dtype == torch.bool and torch.equal(mask, probability[i]["masks"][:, 0] > 0.5)
        assert np.array_equal(rle_masks.decode(rles[i]["masks"]), mask.numpy())
    with pytest.raises(ValueError, match="mask_form: expected one of"):
        model.detect(images, "polygon")


def test_uint8_and_float_pictures_give_the_same_and_batches_do_not_mix():
    images, _ = two_pictures()
    model = small_model().eval()
    as_bytes, as_float = model(images), model([image.float() / 255 for image in images])
    for a, b in zip(as_bytes, as_float):
        torch.testing.assert_close(a["boxes"], b["boxes"], rtol=1e-4, atol=1e-2)
    alone = [model([image])[0] for image in images]
    for a, b in zip(as_bytes, alone):
        assert len(a["boxes"]) == len(b["boxes"])


def test_boxes_come_back_in_the_pictures_own_pixels():
    images, _ = two_pictures()
    large = [F.interpolate(image[None].float(), scale_factor=3, mode="nearest")[0].to(torch.uint8) for image in images]
    for image, result in zip(large, small_model(box_score_thresh=0.0).eval().detect(large, "raw")):
        boxes = result["boxes"]
        assert (boxes >= 0).all() and (boxes[:, 2] <= image.shape[2] + 1e-3).all() and (boxes[:, 3] <= image.shape[1] + 1e-3).all()
        assert boxes.max() > 120                                     # beyond the resized picture's 112 pixels


def test_no_detections_is_a_result():
    images, _ = two_pictures()
    for form, kind in (("probability", torch.Tensor), ("bool", torch.Tensor), ("rle", list), ("raw", torch.Tensor)):
        result = small_model(box_score_thresh=0.99).eval().detect(images[:1], form)[0]
        assert result["boxes"].shape == (0, 4) and isinstance(result["masks"], kind) and len(result["masks"]) == 0


def test_resizing_follows_torchvisions_rule():
    transform = minidamage.build_model("maskrcnn_resnet50_fpn", 2, **{**SMALL, "min_size": 800, "max_size": 1333}).transform
    # min side to 800 unless the long side would pass 1333; sizes rounded down
    assert transform.resized_size(600, 800) == (800, 1066)
    assert transform.resized_size(480, 1600) == (399, 1333)
    assert transform.resized_size(1, 5000) == (1, 1333)


# ---- mistakes -------------------------------------------------------------------------------------------------------------------

def broken(images, targets, **change):
    return images, [{**targets[0], **change}, targets[1]]


@pytest.mark.parametrize("change, message", [
    (dict(labels=torch.tensor([0, 1])), r"targets\[0\] \(picture car.jpg\): expected labels 1..2 \(0 is background\), got 0"),
    (dict(labels=torch.tensor([1, 3])), "got 3 for object 1"),
    (dict(labels=torch.tensor([1])), r"expected boxes \[G, 4\] and labels \[G\]"),
    (dict(boxes=torch.tensor([[1.0, 2, 1, 9], [0, 0, 5, 5]])), r"x2 > x1 and y2 > y1, got \[1.0, 2.0, 1.0, 9.0\]"),
    (dict(boxes=torch.tensor([[1.0, 2, float("nan"), 9], [0, 0, 5, 5]])), "x2 > x1"),
    (dict(masks=torch.zeros(2, 5, 5, dtype=torch.uint8)), r"expected masks \[2, 96, 112\]"),
    (dict(labels=torch.tensor([1.0, 2.0])), "expected labels as whole numbers, got torch.float32"),
    (dict(labels=[1, 2]), "expected labels as a tensor, got list"), (dict(iscrowd=[0, 1]), "expected iscrowd as a tensor, got list"),
    (dict(boxes=np.zeros((2, 4))), "expected boxes as a tensor, got ndarray; convert it with torch.as_tensor"),
])
def test_wrong_targets_name_the_picture_and_the_fix(change, message):
    images, targets = two_pictures()
    with pytest.raises(ValueError, match=message):
        small_model().train()(*broken(images, targets, file="car.jpg", **change))


def test_missing_targets_and_wrong_pictures_are_refused():
    images, targets = two_pictures()
    model = small_model().train()
    with pytest.raises(ValueError, match="expected one dict for each of the 2 pictures"):
        model(images)
    with pytest.raises(ValueError, match=r"targets\[1\]: expected a dict of boxes, labels and masks, got NoneType"):
        model(images, [targets[0], None])
    with pytest.raises(ValueError, match="detect: expected the model in evaluation mode, got training"):
        model.detect(images)
    with pytest.raises(ValueError, match="missing: masks"):
        model(images, [{k: v for k, v in t.items() if k != "masks"} for t in targets])
    model.eval()
    for wrong, message in ((torch.zeros(2, 3, 8, 8), "wrap a single picture"), ([], "non-empty list"),
                           ([torch.zeros(8, 8, 3)], "channels first"), ([torch.zeros(3, 8, 8, dtype=torch.int32)], "expected uint8")):
        with pytest.raises(ValueError, match=message):
            model(wrong)
