"""ResNet against torchvision's stored names, shapes, counts and outputs; the folded norms against plain batch normalisation."""
import copy
import json
import pathlib
import zlib

import numpy as np
import pytest
import torch

from minidamage.layers import resnet
from minidamage.layers.resnet import FrozenBatchNorm2d, ResNet, conv_norm, convolve, load_body

DATA = pathlib.Path(__file__).parent / "data"


def generated_weights(module):
    """The weights of the stored outputs, made from the key names alone (the rule is the oracle's)."""
    new = {}
    for key, value in module.state_dict().items():
        if not value.is_floating_point():
            new[key] = value
            continue
        r, shape = np.random.RandomState(zlib.crc32(key.encode()) % 2 ** 31), tuple(value.shape)
        if key.endswith("running_var"):
            a = r.uniform(0.5, 1.5, shape)
        elif key.endswith("running_mean"):
            a = r.uniform(-0.2, 0.2, shape)
        elif value.dim() >= 2:
            a = r.standard_normal(shape) * np.sqrt(1 / max(1, np.prod(shape[1:])))
        elif key.endswith("weight"):
            a = r.uniform(0.5, 1.2, shape)
        else:
            a = r.uniform(-0.1, 0.1, shape)
        new[key] = torch.tensor(a, dtype=torch.float32)
    return new


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_names_shapes_count_and_output_are_torchvisions(name):
    want = json.loads((DATA / "state_dicts_detection.json").read_text())[name]
    model = ResNet(name, num_classes=1000).eval()
    assert {k: list(v.shape) for k, v in model.state_dict().items()} == {k: shape for k, shape, _ in want["keys"]}
    assert sum(p.numel() for p in model.parameters()) == want["params"]
    model.load_state_dict(generated_weights(model))
    stored = np.load(DATA / "model_forward_detection.npz")
    with torch.no_grad():
        out = model.to(memory_format=torch.channels_last)(torch.from_numpy(stored["x"]))
    scale = np.abs(stored[name]).max()
    np.testing.assert_allclose(out.numpy() / scale, stored[name] / scale, atol=1e-5)


@pytest.mark.parametrize("name, params", [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_published_counts_of_the_small_bodies(name, params):
    assert sum(p.numel() for p in ResNet(name, num_classes=1000).parameters()) == params


@pytest.mark.parametrize("name, channels", [("resnet18", [64, 128, 256, 512]), ("resnet50", [256, 512, 1024, 2048])])
def test_feature_maps_have_strides_4_to_32(name, channels):
    maps = ResNet(name).eval()(torch.zeros(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(1, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32))]
    assert len(ResNet(name, with_layer4=False).eval()(torch.zeros(1, 3, 64, 96))) == 3


@pytest.mark.parametrize("kind", ["frozen", "evaluation"])
@pytest.mark.parametrize("size, bias", [((9, 8), False), ((19, 16), False), ((19, 16), True)], ids=["not_folded", "folded", "with_bias"])
def test_constant_norm_equals_batch_norm_in_values_and_gradients(kind, size, bias):
    generator = torch.Generator().manual_seed(0)
    def rand(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)
    conv = torch.nn.Conv2d(5, 7, 3, stride=2, padding=1, bias=bias).double()
    norm = (FrozenBatchNorm2d(7) if kind == "frozen" else torch.nn.BatchNorm2d(7).eval()).double()
    for key, value in norm.state_dict().items():
        if value.is_floating_point():
            value.copy_(rand(7) + 0.5)
    x = rand(2, 5, *size).requires_grad_()
    leaves = [x, *conv.parameters()] + ([norm.weight, norm.bias] if kind == "evaluation" else [])
    y = conv(x)
    shape = (1, -1, 1, 1)
    plain = ((y - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt() * norm.weight.view(shape)
             + norm.bias.view(shape)).relu()
    go = rand(*plain.shape)
    want = torch.autograd.grad((plain * go).sum(), leaves)
    got_value = conv_norm(x, conv, norm, relu=True)
    got = torch.autograd.grad((got_value * go).sum(), leaves)
    torch.testing.assert_close(got_value, plain)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("stride, bias, dtype", [(1, False, torch.float32), (2, True, torch.float32), (2, True, torch.float64)])
def test_a_1x1_convolution_is_blind_to_the_dilation_it_asks_for(stride, bias, dtype):
    conv = torch.nn.Conv2d(5, 7, 1, stride=stride, bias=bias).to(dtype)
    x = torch.randn(2, 5, 9, 8, dtype=dtype).requires_grad_()
    got, want = convolve(x, conv, conv.weight, conv.bias), conv(x)
    torch.testing.assert_close(got, want)
    go, leaves = torch.randn_like(want), [x, *conv.parameters()]
    for a, b in zip(torch.autograd.grad(got, leaves, go), torch.autograd.grad(want, leaves, go)):
        torch.testing.assert_close(a, b)


def test_a_frozen_norm_makes_its_scale_and_shift_once_and_again_when_its_constants_change(monkeypatch):
    made, norm, x = [], resnet.FrozenBatchNorm2d(3), torch.randn(2, 3, 4, 4)
    make = resnet.make_affine
    monkeypatch.setattr(resnet, "make_affine", lambda norm: (made.append(1), make(norm))[1])
    monkeypatch.setattr(resnet.FrozenBatchNorm2d, "is_worth_keeping", lambda norm: True)                  # as on a GPU

    def check(times, norm=norm, x=x):
        shape = (1, -1, 1, 1)
        expected = (x - norm.running_mean.view(shape)) / (norm.running_var.view(shape) + norm.eps).sqrt() * norm.weight.view(shape)
        torch.testing.assert_close(norm(x), expected + norm.bias.view(shape))
        assert len(made) == times
    with torch.inference_mode():
        check(1)
    leaf = x.clone().requires_grad_()
    check(1, x=leaf)
    torch.autograd.grad(norm(leaf).sum(), leaf)                                       # what inference mode made can be kept for a gradient
    norm.load_state_dict({name: torch.rand(3) + 0.5 for name in norm.state_dict()})
    check(2)
    norm.running_var.mul_(2)
    check(3)
    norm.eps = 0.1
    check(4)
    norm.bias = torch.ones(3)
    check(5)
    copy.deepcopy(norm).weight.fill_(7)
    check(5)
    norm.weight.data.copy_(torch.tensor([5.0, 6.0, 7.0]))                             # leaves no trace
    norm.eval()
    check(6)
    norm.double()
    check(7, x=x.double())
    assert set(norm.state_dict()) == {"weight", "bias", "running_mean", "running_var"}


def test_a_norm_that_meets_one_value_a_channel_uses_its_running_statistics():
    conv, norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4).train()
    norm.running_mean.fill_(0.5)
    norm.running_var.fill_(4.0)
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(conv_norm(x, conv, norm), (conv(x) - 0.5) / (4.0 + norm.eps) ** 0.5)
    assert norm.running_mean.eq(0.5).all()
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(conv(x))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("output_stride, dilate_first, sizes, dilations", [
    (32, False, [32, 16, 8, 4, 2], [1, 1, 1, 1]), (16, True, [32, 16, 8, 4, 4], [1, 1, 2, 2]),
    (8, True, [32, 16, 8, 8, 8], [2, 2, 4, 4]), (8, False, [32, 16, 8, 8, 8], [1, 2, 2, 4])])
def test_dilation_in_place_of_strides(name, output_stride, dilate_first, sizes, dilations):
    """dilations: of the 3x3 convolution of layer3's first and second block, then of layer4's."""
    model = ResNet(name, output_stride=output_stride, dilate_first=dilate_first).eval()
    maps = model.maps(torch.zeros(1, 3, 64, 64))
    assert [m.shape[-1] for m in maps] == sizes
    assert [stage[i].conv2.dilation[0] for stage in (model.layer3, model.layer4) for i in (0, 1)] == dilations
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ResNet(name).state_dict().items()}
    assert len(model.maps(torch.zeros(1, 3, 64, 64), levels=3)) == 3


def test_training_batch_norm_learns_statistics_and_frozen_stages_do_not():
    model = ResNet("resnet18", frozen_stages=2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))[-1].sum().backward()
    changed = {k for k, v in model.state_dict().items() if k.endswith("running_mean") and not torch.equal(v, before[k])}
    assert changed and not any(k.startswith(("bn1", "layer1")) for k in changed)
    trained = {k.split(".")[0] for k, p in model.named_parameters() if p.grad is not None}
    assert trained == {"layer2", "layer3", "layer4"}


def test_pretrained_files_in_every_wrapping(tmp_path):
    source = ResNet("resnet18", num_classes=1000)
    source.load_state_dict(generated_weights(source))
    state = source.state_dict()
    files = {
        "plain": state,
        "wrapped": {"state_dict": {"module." + k: v for k, v in state.items()}, "epoch": 3},
        "model": {"model": {"backbone.body." + k: v for k, v in state.items()}},
        "a_run's best.pt": {"model": "unet", "weights": {"encoder." + k: v for k, v in state.items()}},
        "without_counters": {k: v for k, v in state.items() if "num_batches" not in k},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        for norm in ("batch", "frozen"):
            body = ResNet("resnet18", norm=norm)
            report = load_body(body, tmp_path / f"{name}.pth")
            assert not report["missing"] and not report["unexpected"] and not report["mismatched"], (name, norm, report)
            for key, value in body.state_dict().items():
                if "num_batches" not in key:
                    assert torch.equal(value, state[key]), (name, key)


def test_pretrained_report_lists_what_does_not_fit(tmp_path):
    state = ResNet("resnet18").state_dict()
    state["layer1.0.conv1.weight"] = torch.zeros(8, 8, 3, 3)
    del state["layer2.0.conv1.weight"]
    state["surprise"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pth")
    report = load_body(ResNet("resnet18"), tmp_path / "odd.pth")
    assert report["missing"] == ["layer2.0.conv1.weight"] and report["unexpected"] == ["surprise"]
    assert report["mismatched"] == [
        "layer1.0.conv1.weight: file [8, 8, 3, 3] torch.float32, model [64, 64, 3, 3] torch.float32"]


def test_files_that_are_no_resnet_are_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match="expected a ResNet state_dict"):
        load_body(ResNet("resnet18"), tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not load"):
        load_body(ResNet("resnet18"), tmp_path / "text.pth")


@pytest.mark.parametrize("other", ["another depth", "integers"])
def test_files_of_another_depth_or_type_change_nothing(tmp_path, other):
    state = ResNet("resnet50").state_dict() if other == "another depth" else {
        k: (v * 100).to(torch.int8) if v.dim() == 4 else v for k, v in ResNet("resnet18").state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    body = ResNet("resnet18")
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with pytest.raises(ValueError, match="of the same depth"):
        load_body(body, tmp_path / "other.pth")
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="expected one of resnet18"):
        ResNet("resnet19")
    with pytest.raises(ValueError, match="expected one of batch, frozen, group"):
        ResNet("resnet18", norm="layer")
    with pytest.raises(ValueError, match="expected 8, 16 or 32, got 4"):
        ResNet("resnet18", output_stride=4)
