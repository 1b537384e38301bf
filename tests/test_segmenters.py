"""Segmenters: names, shapes, counts and outputs against those stored of segmentation_models.pytorch 0.6.0 and torchvision 0.29.2
(tests/data/*_segmentation.*, outputs at every second pixel), the contract around `logits`, and that each model learns."""
import json
import pathlib

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import minidamage
from minidamage.checkpoint import load_pretrained
from minidamage.config import apply_settings
from minidamage.layers.resnet import ResNet, load_body
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, label_map_of, logit_channels, probabilities_of, resize_picture
from minidamage.models import custom_segnets, custom_unets, fcn, pspnet
from test_models import SEGMENTERS
from test_resnet import generated_weights

DATA = pathlib.Path(__file__).parent / "data"
STORED = json.loads((DATA / "state_dicts_segmentation.json").read_text())
SMALL = {name: fields for name, _, _, fields in SEGMENTERS if name != "context_cracknet"}


def small_model(name, num_classes=2, **fields):
    return minidamage.build_model(name, num_classes, **{**SMALL[name], **fields})


# --- against the published implementations

@pytest.mark.parametrize("name", STORED)
def test_names_shapes_count_and_output_are_the_published_ones(name):
    want, aux = STORED[name], name.endswith("_aux")
    fields = dict(num_classes=21, aux=aux) if "resnet50" in name else dict(num_classes=2)
    model = minidamage.build_model(name.removesuffix("_aux"), **fields).eval()
    own = {key: [list(value.shape), str(value.dtype).removeprefix("torch.")] for key, value in model.state_dict().items()}
    place = "backbone." if "resnet50" in name else "encoder."
    body = {key: entry for key, *entry in json.loads((DATA / "state_dicts_detection.json").read_text())["resnet50"]["keys"]}
    assert {key.removeprefix(place): entry for key, entry in own.items() if key.startswith(place)} == {
        key: [shape, dtype.removeprefix("torch.")] for key, (shape, dtype) in body.items() if not key.startswith("fc.")}
    assert {key: entry for key, entry in own.items() if not key.startswith(place)} == {
        key: [shape, dtype.removeprefix("torch.")] for key, shape, dtype in want["keys"]}
    assert sum(p.numel() for p in model.parameters()) == want["params"]

    model.load_state_dict(generated_weights(model))
    stored = np.load(DATA / "model_forward_segmentation.npz")
    seed, side = (17, 128) if name == "pan" else (15, 64)
    x = torch.from_numpy(np.random.RandomState(seed).rand(1, 3, side, side).astype(np.float32))
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        got = {name: model.logits(x)}
        if aux:
            got[name], got[name + "/aux"] = model.both_logits(x)
            torch.testing.assert_close(got[name], model.logits(x))
    for key, logits in got.items():
        scale = np.abs(stored[key]).max()
        np.testing.assert_allclose(logits[:, :3, ::2, ::2].numpy() / scale, stored[key] / scale, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("custom")])
def test_other_bodies(name):
    fields = {key: value for key, value in SMALL[name].items() if key != "body"}
    for body, deep in (("resnet34", 512), ("resnet101", 2048)):
        with torch.device("meta"):
            model = minidamage.build_model(name, 2, body=body, **fields)
        encoder = getattr(model, "encoder", None) or model.backbone
        assert encoder.out_channels[-1] == deep
        assert model.logits(torch.zeros(1, 3, 128, 128, device="meta")).shape == (1, 1, 128, 128)


# --- learning

def drawn(size, num_classes=2, count=2):
    """(images, targets): a rectangle a class, each of its colour, over noise."""
    rng = np.random.default_rng(0)
    images, targets = [], []
    for i in range(count):
        picture = rng.integers(60, 120, (3, size, size), dtype=np.uint8)
        label_map = np.zeros((size, size), np.uint8)
        for label in range(1, num_classes):
            y, x = size * (label - 1) // (num_classes - 1) + 2 + i, size // 4 + 3 * i
            region = np.s_[y:y + size // (num_classes - 1) - 4, x:x + size // 2]
            label_map[region] = label
            picture[(label - 1) % 3][region] = 250
        images.append(torch.from_numpy(picture))
        targets.append({"label_map": torch.from_numpy(label_map), "file": f"picture{i}.png"})
    return images, targets


@pytest.mark.parametrize("name, num_classes", [*((name, 2) for name in SMALL), ("unet", 4), ("fcn_resnet50", 4), ("custom_unet2", 4)])
def test_overfits_two_pictures(name, num_classes, narrow):
    model = without_dropout(small_model(name, num_classes)).train()
    size = {"pan": 128, "fcn_resnet50": 64, "custom_segnet1": 32}.get(name, 48)      # fcn draws squares of eight pixels
    images, targets = drawn(size, num_classes)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    steps = 10 if name == "custom_segnet1" else 20                    # its 47 million parameters take half a second a step
    history = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)                   # falling, so that the end is no matter of one step's luck
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    assert np.mean(history[-3:]) < 0.5 * history[0], history
    with torch.no_grad():
        probabilities = probabilities_of(model.logits(model.batch(images)[0])[:, :, :size, :size])
    truth, got = (torch.stack(maps) for maps in ([t["label_map"] for t in targets], [label_map_of(p) for p in probabilities]))
    iou = ((got == truth) & (truth > 0)).sum() / ((got > 0) | (truth > 0)).sum()
    assert iou > 0.7


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, (torch.nn.Dropout, torch.nn.Dropout2d)):
            module.p = 0.0
    return model


@pytest.mark.parametrize("name", SMALL)
def test_every_trained_parameter_gets_a_gradient_and_a_batch_of_one_trains(name):
    """Parameters without one would stop a training on several GPUs; one picture pooled to 1 x 1 has no variance."""
    model = small_model(name, 3, **({"aux": True} if name in ("fcn_resnet50", "deeplabv3_resnet50") else {})).train()
    images, targets = drawn(model.config.image_size, 3, count=1)
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    without = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and (name == "pspnet") == any(not p.requires_grad for p in model.parameters())


def test_auxiliary_losses_are_the_heads_own_times_their_weight():
    model = without_dropout(small_model("fcn_resnet50", 3, aux=True, aux_weight=0.25)).train()
    images, targets = drawn(64, 3)
    losses = model(images, targets)
    assert set(losses) == {"loss_ce", "loss_aux_ce"}
    _, aux_logits = model.both_logits(model.batch(images)[0])
    truth = torch.stack([target["label_map"] for target in targets]).long()
    torch.testing.assert_close(losses["loss_aux_ce"], 0.25 * F.cross_entropy(aux_logits, truth), rtol=1e-4, atol=1e-6)
    assert set(small_model("fcn_resnet50", 2, aux=True).train()(*drawn(64))) == {"loss_bce", "loss_aux_bce"}


# --- the contract around logits

class Thresholding(Segmenter):
    """Logits that can be worked out by hand: the normalised red value, of one stride of 8."""

    stride = 8

    def __init__(self, num_classes=2, **fields):
        super().__init__(num_classes, SegmenterConfig(**{"image_mean": (0.0,) * 3, "image_std": (1.0,) * 3, **fields}), "thresholding")
        self.seen = []

    def logits(self, x):
        self.seen.append(x)
        return x[:, :1].repeat(1, logit_channels(self.num_classes), 1, 1)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(45, 70), (5, 3)], ids=["no_multiple_of_the_stride", "smaller_than_the_stride"])
@torch.no_grad()
def test_any_size_is_padded_and_cropped_back(name, size):
    model = small_model(name, 2).eval()
    image = torch.rand(3, *size)
    got = model([image])
    H, W = (max(-(-side // model.stride) * model.stride, model.smallest_side) for side in size)
    x = torch.zeros(1, 3, H, W)
    x[0, :, :size[0], :size[1]] = (image - model.image_mean) / model.image_std
    assert got.shape == (1, 1, *size)
    torch.testing.assert_close(got, model.logits(x)[:, :, :size[0], :size[1]], rtol=1e-3, atol=1e-4)


def test_pictures_are_padded_to_the_stride_with_the_mean_and_run_channels_last():
    model = Thresholding(image_mean=(0.5, 0.25, 0.0), image_std=(0.5, 0.25, 1.0)).eval()
    images = [torch.full((3, 9, 12), 255, dtype=torch.uint8), torch.zeros(3, 9, 12)]
    logits = model(images)
    x = model.seen[0]
    assert x.shape == (2, 3, 16, 16) and x.is_contiguous(memory_format=torch.channels_last)
    assert x[:, :, 9:].abs().max() == 0 and x[:, :, :, 12:].abs().max() == 0
    torch.testing.assert_close(x[:, :, 0, 0], torch.tensor([[1.0, 3.0, 1.0], [-1.0, -1.0, 0.0]]))
    assert logits.shape == (2, 1, 9, 12)
    assert torch.equal(model(torch.stack([images[0].float() / 255, images[1]])), logits)              # a tensor; float is uint8 / 255


@pytest.mark.parametrize("name", [name for name in SMALL if name != "custom_segnet1"])
def test_every_convolution_keeps_channels_last(name):
    """One convolution on a contiguous map would convert it, there and back."""
    model = small_model(name, 3).eval()
    layouts = {}
    for key, module in model.named_modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.MaxPool2d, torch.nn.Dropout2d)):
            module.register_forward_pre_hook(lambda module, x, key=key: layouts.__setitem__(key, x[0]))
    side = 128 if name == "pan" else 96
    with torch.no_grad():
        logits = model(torch.rand(2, 3, side, side))
    assert logits.is_contiguous(memory_format=torch.channels_last)
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in layouts.values())


def test_one_class_has_one_logit_and_several_have_one_each_and_the_background():
    assert [logit_channels(n) for n in (2, 3, 4)] == [1, 3, 4]
    image = torch.rand(3, 40, 40)
    for name in ("unet", "fcn_resnet50", "custom_unet"):
        assert [small_model(name, n).eval()([image]).shape[1] for n in (2, 4)] == [1, 4]
    model = small_model("unet", 4).eval()
    probabilities, = model.probabilities([image])
    torch.testing.assert_close(probabilities.sum(0), torch.ones(40, 40))
    assert torch.equal(label_map_of(probabilities), probabilities.argmax(0).to(torch.uint8))


def test_probabilities_are_interpolated_as_logits_and_thresholded_strictly():
    model = Thresholding(image_size=16).eval()
    images = [torch.rand(3, 33, 20), torch.randint(0, 256, (3, 8, 50), dtype=torch.uint8)]
    at_model = model.probabilities(images, at="model")
    native = model.probabilities(images)
    assert [p.shape for p in at_model] == [(1, 16, 16)] * 2 and [p.shape for p in native] == [(1, 33, 20), (1, 8, 50)]
    for image, small, large in zip(images, at_model, native):
        red = resize_picture(image, (16, 16))[:1]
        torch.testing.assert_close(small, red.sigmoid())
        red = F.interpolate(red[None], size=image.shape[-2:], mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(large, red.sigmoid())
    own_size = Thresholding(image_size=0).eval().probabilities(images)
    assert [p.shape for p in own_size] == [p.shape for p in native]
    torch.testing.assert_close(own_size[0], images[0][:1].sigmoid())
    assert label_map_of(torch.tensor([[[0.5, 0.6]]])).tolist() == [[0, 1]]
    assert label_map_of(torch.tensor([[[0.5, 0.6]]]), threshold=0.4).tolist() == [[1, 1]]


def test_validation_in_one_pass_equals_its_two_halves():
    model = small_model("unet").eval()
    images, targets = drawn(50)
    targets[1]["label_map"][:10] = 255
    losses, probabilities = model.losses_and_probabilities(images, targets)
    with torch.no_grad():
        logits = model(images)
        truth = torch.stack([target["label_map"] for target in targets])
        valid = truth != 255
        torch.testing.assert_close(losses["loss_bce"], F.binary_cross_entropy_with_logits(logits[:, 0][valid], truth[valid].float()))
    for got, want in zip(probabilities, logits.sigmoid()):
        torch.testing.assert_close(got, want)


# --- mistakes

@pytest.mark.parametrize("images, message", [
    ([], "non-empty list"), (torch.rand(3, 8, 8), "wrap a single picture"), ([torch.rand(8, 8, 3)], "permute"), ("picture.png", "got str"),
    ([torch.zeros(3, 8, 8, dtype=torch.int32)], "uint8 in 0..255"), ([torch.rand(3, 8, 8), torch.rand(3, 8, 9)], "of one size"),
    ([torch.rand(3, 0, 8)], r"got \[3, 0, 8\]"), (torch.rand(0, 3, 8, 8), "non-empty list")])
def test_pictures_that_no_segmenter_takes(images, message):
    with pytest.raises(ValueError, match=message):
        Thresholding().eval()(images)


@pytest.mark.parametrize("targets, message", [
    (None, "got None"), ([], "for each of the 1 pictures"), ([torch.zeros(8, 8)], "expected a dict with label_map, got Tensor"),
    ([{"label_map": np.zeros((8, 8), np.uint8)}], "expected label_map as a tensor, got ndarray"), ([{"masks": 0}], "expected the key label_map, got masks"),
    ([{"label_map": torch.zeros(8, 9, dtype=torch.uint8)}], r"picture's size \[8, 8\], got \[8, 9\]"),
    ([{"label_map": torch.zeros(8, 8)}], "uint8 or int64, got torch.float32"),
    ([{"label_map": torch.full((8, 8), 2, dtype=torch.uint8), "file": "crack7.png"}],
     r"crack7.png\): expected labels 0 .* to 1 and 255 .* got \[2\]"),
    ([{"label_map": torch.full((8, 8), -1)}], r"got \[-1\]")])
def test_targets_that_would_break_the_training(targets, message):
    with pytest.raises(ValueError, match=message):
        Thresholding().train()([torch.rand(3, 8, 8)], targets)


def test_weights_load_into_a_model_of_the_meta_device():
    """The pictures' mean and deviation are no part of a state_dict: they come from the config then, beside the weights."""
    model, picture = small_model("custom_unet").eval(), torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    with torch.device("meta"):
        empty, assigned = small_model("custom_unet").eval(), small_model("custom_unet").eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assigned.load_state_dict(model.state_dict(), assign=True)
    for other in (empty, assigned):
        assert torch.equal(other.probabilities([picture])[0], model.probabilities([picture])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_and_a_gradient_of_the_picture(dtype):
    model = small_model("custom_unet", image_size=0).eval().to(dtype)
    picture = torch.rand(3, 32, 32, dtype=dtype, requires_grad=True)
    model.logits(model.batch([picture])[0]).sum().backward()
    assert picture.grad.dtype == dtype and picture.grad.abs().sum() > 0


def test_probabilities_ask_for_evaluation_mode():
    with pytest.raises(ValueError, match="call model.eval"):
        Thresholding().train().probabilities([torch.rand(3, 8, 8)])
    with pytest.raises(ValueError, match="call model.eval"):
        Thresholding().train().losses_and_probabilities(*drawn(8))
    with pytest.raises(ValueError, match="at: expected one of native, model, got 'full'"):
        Thresholding().eval().probabilities([torch.rand(3, 8, 8)], at="full")


@pytest.mark.parametrize("name, fields, message", [
    ("unet", dict(image_size=-1), "image_size: expected"), ("unet", dict(image_mean=(0.5,)), "image_mean: expected 3 numbers"),
    ("unet", dict(image_std=(0.0, 1.0, 1.0)), "above 0"), ("unet", dict(bce_weight=-1.0), "bce_weight: expected 0 or more"),
    ("unet", dict(dice_weight=float("nan")), "dice_weight: expected 0 or more"),
    ("unet", dict(class_weights="median"), "class_weights: expected one of"),
    ("unet", dict(body="vgg16"), "body: expected one of resnet18"),
    ("unet", dict(decoder_channels=(64, 32)), "decoder_channels: expected 5"),
    ("manet", dict(squeeze_ratio=0), "squeeze_ratio: expected 1"), ("manet", dict(position_channels=0), "position_channels: expected 1"),
    ("unetplusplus", dict(decoder_channels=(1, 2, 3, 4, 0)), "decoder_channels: expected 5"),
    ("deeplabv3", dict(atrous_rates=()), "atrous_rates: expected"), ("deeplabv3plus", dict(skip_channels=0), "skip_channels: expected 1"),
    ("deeplabv3plus", dict(dropout=1.0), "dropout: expected"),
    ("fpn", dict(segmentation_channels=80), "a multiple of 32"), ("fpn", dict(segmentation_channels=32), "64 or more"),
    ("pspnet", dict(pool_sizes=(0,)), "pool_sizes: expected"), ("linknet", dict(decoder_channels=0), "decoder_channels: expected 1"),
    ("pan", dict(decoder_channels=0), "decoder_channels: expected 1"), ("fcn_resnet50", dict(aux_weight=-1.0), "aux_weight: expected"),
    ("deeplabv3_resnet50", dict(atrous_rates=(0,)), "atrous_rates: expected"), ("custom_unet2", dict(dropout=2.0), "dropout: expected"),
    ("custom_segnet2", dict(body="resnet18"), "CustomSegNet2 has an encoder of its own")])
def test_values_that_no_segmenter_can_have(name, fields, message):
    with pytest.raises(ValueError, match=message):
        minidamage.build_model(name, 2, **fields)


# --- what a GPU asks for

@pytest.mark.parametrize("name", ["unet", "context_cracknet", "fcn_resnet50"])
def test_torch_compile_takes_every_convolution(name):
    fields = next(fields for known, _, _, fields in SEGMENTERS if known == name)
    model, side, graphs = minidamage.build_model(name, 2, **fields), fields["image_size"], []
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())            # each runs once
    model.compile_static(lambda graph, inputs: graphs.append(graph) or graph.forward)
    torch._dynamo.reset()                                                           # it keeps what other tests compiled
    model.train()([torch.rand(3, side, side)] * 2, [{"label_map": torch.ones(side, side, dtype=torch.int64)}] * 2)
    assert sum("conv2d" in str(node.target) for graph in graphs for node in graph.graph.nodes) == convolutions


@pytest.mark.parametrize("size", [(12, 12), (7, 10), (2, 5)])
def test_means_of_regions_as_products(size):
    x = torch.randn(2, 3, *size).requires_grad_()
    for count in (2, 3, 6):
        found = []
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                means = pspnet.RegionMeans(count)(x)
                found.append((means, *torch.autograd.grad(means.square().sum(), x)))
            finally:
                torch.use_deterministic_algorithms(False)
        torch.testing.assert_close(*found)


# --- weights from elsewhere

@pytest.mark.parametrize("name", ["unet", "deeplabv3plus", "pspnet", "fcn_resnet50"])
def test_a_pretrained_body_loads(tmp_path, name):
    source = ResNet("resnet18", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "body.pth")
    for load in (load_body, load_pretrained):
        model = small_model(name)
        report = load(model, tmp_path / "body.pth")
        assert not report["missing"] and not report["mismatched"] and not report["unexpected"]
        body = getattr(model, "encoder", None) or model.backbone
        for key, value in body.state_dict().items():
            if "num_batches" not in key:
                assert torch.equal(value, source.state_dict()[key])


def test_a_body_file_is_refused_where_there_is_no_body(tmp_path):
    torch.save(ResNet("resnet18").state_dict(), tmp_path / "body.pth")
    with pytest.raises(ValueError, match="custom_unet, which has none"):
        load_pretrained(small_model("custom_unet"), tmp_path / "body.pth")


@pytest.mark.parametrize("name", ["unet", "fcn_resnet50", "custom_segnet2", "custom_unet2"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_whole_checkpoint_loads_and_what_does_not_fit_is_reported(tmp_path, name, wrapped):
    source = small_model(name, 2)
    state = source.state_dict()
    file = {"state_dict": {f"model.{key}": value for key, value in state.items()}, "epoch": 3} if wrapped else state
    torch.save(file, tmp_path / "whole.pth")
    twin = small_model(name, 2)
    report = load_pretrained(twin, tmp_path / "whole.pth")
    assert set(report["loaded"]) == set(twin.state_dict()) and not report["missing"] + report["unexpected"] + report["mismatched"]
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in twin.state_dict().items())
    more_classes = small_model(name, 4)
    report = load_pretrained(more_classes, tmp_path / "whole.pth")
    last = list(dict(source.named_parameters()))[-2:]
    assert sorted(entry.split()[0] for entry in report["mismatched"]) == sorted(last) and not report["missing"] + report["unexpected"]


def test_published_weights_with_an_auxiliary_head_report_it(tmp_path):
    torch.save(small_model("fcn_resnet50", 3, aux=True).state_dict(), tmp_path / "aux.pth")
    report = load_pretrained(small_model("fcn_resnet50", 3), tmp_path / "aux.pth")
    assert report["unexpected"] and all(key.startswith("aux_classifier.") for key in report["unexpected"]) and not report["missing"]


# --- recipes

def test_the_commands_of_the_hyper_parameter_sets():
    """The sets of the document's section 6.1, and that the flags in fcn.py's docstring make them."""
    assert [(s.batch_size, s.optimizer, s.lr) for s in (fcn.SET_A, fcn.SET_B, fcn.SET_C)] == [
        (16, "adam", 1e-3), (32, "sgd", 0.01), (8, "adamw", 1e-3)]
    assert fcn.SET_B.momentum == 0.9 and fcn.SET_C.weight_decay == 1e-4
    assert apply_settings(fcn.RECIPE, ["batch_size=32", "lr=0.01", "optimizer=sgd"]) == fcn.SET_B
    assert apply_settings(fcn.RECIPE, ["batch_size=8", "optimizer=adamw", "weight_decay=1e-4"]) == fcn.SET_C
    assert (custom_segnets.RECIPE.epochs, custom_unets.RECIPE.epochs, fcn.RECIPE.epochs) == (8, 10, 10)
