"""Context-CrackNet: its size by parts, its equations against a twin of stock parts, other sizes, maps, and that it learns a crack."""
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minidamage
from minidamage.models.context_cracknet import CAGM, ContextCrackNetConfig, interpolate_rows

SMALL = dict(body="resnet18", image_size=64, sequence_size=64, attention_rank=6, attention_heads=4, feed_forward=32)


def small_model(num_classes=2, **fields):
    torch.manual_seed(0)
    model = minidamage.build_model("context_cracknet", num_classes, **{**SMALL, **fields})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):                        # statistics that a forgotten norm would not match
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5), nn.init.uniform_(module.bias, -0.2, 0.2)
    return model


def cracks(size=64, count=2, seed=0):
    """(images, targets): a bright line, one to three pixels wide, across noise."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for i in range(count):
        y, x = np.mgrid[:size, :size]
        mask = np.abs(y - (0.2 + 0.3 * i) * size - (0.6 - i) * x / 2) < 1.5
        picture = rng.integers(100, 140, (3, size, size)).astype(np.uint8)
        picture[:, mask] = 30
        images.append(torch.from_numpy(picture))
        targets.append({"label_map": torch.from_numpy(mask.astype(np.uint8)), "file": f"crack{i}.png"})
    return images, targets


# --- size

def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_by_parts():
    """The paper: 82.05 M. By hand: CAGM has four projections, E and F, the feed-forward layer and two norms; a gate of widths D and D / 2
    two convolutions with bias and norm, and psi; a block 9 (in out + out^2) + 4 out."""
    with torch.device("meta"):                                        # counted, not filled
        model = minidamage.build_model("context_cracknet", 2)
    parts = {name: count(part) for name, part in model.named_children()}
    assert parts == {"encoder": 23_508_032, "cagm": 8_801_280, "up": 11_077_440, "rfem": 1_386_852, "conv": 37_276_928, "head": 65}
    assert sum(parts.values()) == count(model) == 82_050_597
    assert parts["cagm"] == 4 * (1024 ** 2 + 1024) + 2 * 784 * 256 + 2 * 1024 * 2048 + 3072 + 2 * 2048
    assert parts["rfem"] == sum(2 * (D * D // 2 + D // 2 + D) + D // 2 + 1 for D in (1024, 512, 256, 64))
    assert parts["conv"] == sum(9 * (2 * D * D + D * D) + 4 * D for D in (1024, 512, 256, 64))


@pytest.mark.parametrize("fields", [{"rfem": False}, {"cagm": False}, {"rfem": False, "cagm": False}], ids=" and ".join)
def test_ablations(fields):
    whole, model = small_model(), small_model(**fields)
    assert count(whole) - count(model) == sum(count(getattr(whole, name)) for name in fields)
    images, targets = cracks()
    model.train()(images, targets)["loss_bce"].backward()
    assert set(model.eval().attention_maps(images[:1])[0]) == \
        ({"cagm"} if fields.get("cagm", True) else set()) | ({f"rfem{i}" for i in range(4)} if fields.get("rfem", True) else set())


# --- the equations

class Twin(nn.Module):
    """The same network from stock parts and equations 6 to 17 as they are printed (E^T K for eq. 8), without dropout."""

    def __init__(self, model):
        super().__init__()
        self.model, self.relu = model, nn.ReLU()

    def attention(self, X):
        cagm, (B, N, C) = self.model.cagm, X.shape
        Q, K, V = cagm.query(X), cagm.key(X), cagm.value(X)                                            # eq. 7
        K_proj, V_proj = cagm.E.T @ K, cagm.F.T @ V                                                    # eq. 8
        d, heads = C // cagm.heads, []
        for h in range(cagm.heads):
            mine = slice(h * d, (h + 1) * d)
            A = torch.softmax(Q[..., mine] @ K_proj[..., mine].transpose(1, 2) / math.sqrt(d), dim=-1)            # eq. 9
            heads.append(A @ V_proj[..., mine])                                                        # eq. 10
        return cagm.output(torch.cat(heads, dim=-1))                                                   # eq. 11

    def global_context(self, x):
        cagm, (B, C, H, W) = self.model.cagm, x.shape
        X = torch.stack([x[:, :, i, j] for i in range(H) for j in range(W)], dim=1)                    # eq. 6
        X = X + self.attention(cagm.norm1(X))
        X = X + cagm.linear2(self.relu(cagm.linear1(cagm.norm2(X))))
        return torch.stack([torch.stack([X[:, i * W + j] for j in range(W)], -1) for i in range(H)], -2)

    def forward(self, x):
        m, body = self.model, self.model.encoder
        F0 = self.relu(body.bn1(body.conv1(x)))
        features, x = [F0], F.max_pool2d(F0, 3, 2, 1)
        for stage in (body.layer1, body.layer2, body.layer3, body.layer4):
            x = stage(x)
            features.append(x)
        features[3] = self.global_context(features[3])
        D = features[4]
        for l in (3, 2, 1, 0):
            up, gate, block = m.up[l](D), m.rfem[l], m.conv[l]
            Y = torch.relu(gate.bn_g(gate.conv_g(up)) + gate.bn_x(gate.conv_x(features[l])))           # eq. 12, 13
            psi = 1 / (1 + torch.exp(-gate.psi(Y)))                                                    # eq. 14
            D = torch.cat([psi * features[l], up], 1)                                                  # eq. 15, 16
            D = self.relu(block.bn1(block.conv1(D)))
            D = self.relu(block.bn2(block.conv2(D)))                                                   # eq. 17
        return F.interpolate(m.head(D), scale_factor=2, mode="bilinear")


@pytest.mark.parametrize("training", [False, True])
def test_equals_the_twin(training):
    model = small_model(3, dropout=0.0).double().train(training)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    ours, theirs = model.logits(x), Twin(model)(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    parameters = dict(model.named_parameters())
    weights = torch.randn_like(ours)
    ours = torch.autograd.grad((ours * weights).sum(), parameters.values())
    theirs = torch.autograd.grad((theirs * weights).sum(), parameters.values())
    for name, a, b in zip(parameters, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


# --- other sizes

def test_rows_interpolated_by_hand():
    """Two by two positions to four by four: at a quarter and three quarters between the old ones, a quarter of the weight each."""
    rows = torch.tensor([[0.0], [4.0], [8.0], [12.0]])
    line = torch.tensor([0.0, 1.0, 3.0, 4.0])
    expected = (line[None] + 2 * line[:, None]) / 4
    torch.testing.assert_close(interpolate_rows(rows, 2, 4, 4), expected.reshape(16, 1))
    torch.testing.assert_close(interpolate_rows(rows, 2, 2, 2), rows)
    torch.testing.assert_close(interpolate_rows(rows, 2, 1, 1), torch.tensor([[24.0]]))          # one position carries all the weight
    assert interpolate_rows(torch.randn(16, 5), 4, 3, 7).shape == (21, 5)


def test_other_sizes_attend_to_the_same_scene():
    """A smooth map at twice the size gives the same context at twice the size, because the sums over the positions keep their size."""
    torch.manual_seed(0)
    cagm = CAGM(32, ContextCrackNetConfig(sequence_size=256, attention_rank=8, attention_heads=4, feed_forward=16)).eval()
    with torch.no_grad():
        for projection in (cagm.E, cagm.F):                           # smooth too: a white-noise projection has nothing between its rows
            projection.copy_(interpolate_rows(torch.randn(16, 8), 4, 16, 16))
    coarse = F.interpolate(torch.randn(1, 32, 4, 4), size=(16, 16), mode="bicubic")
    fine = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.no_grad():
            context, twice, _ = cagm(coarse) - coarse, cagm(fine) - fine, cagm(F.interpolate(coarse, size=(16, 20), mode="bilinear"))
    assert len(said) == 1 and "learned for pictures of 256x256 px; for 512x512 px" in str(said[0].message)
    difference = (F.avg_pool2d(twice, 2) - context).norm() / context.norm()
    assert difference < 0.05


def test_any_size_comes_back_at_its_size():
    model = small_model().eval()
    images = [torch.randint(0, 255, (3, h, w), dtype=torch.uint8) for h, w in ((64, 64), (40, 90), (7, 5))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                # resized to 64 x 64: E and F fit
        for image, found in zip(images, model.probabilities(images)):
            assert found.shape == (1, *image.shape[-2:]) and found.isfinite().all()
    own = small_model(image_size=0).eval()
    with pytest.warns(UserWarning, match="for 96x64 px"):
        found = own.probabilities(images)
    assert [p.shape[-2:] for p in found] == [image.shape[-2:] for image in images]
    torch.testing.assert_close(found[0], model.probabilities(images[:1])[0])


# --- attention maps

def test_attention_maps():
    model = small_model().eval()
    images = [torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), torch.randint(0, 255, (3, 50, 30), dtype=torch.uint8)]
    maps = model.attention_maps(images)
    for image, found in zip(images, maps):
        assert list(found) == ["cagm", "rfem3", "rfem2", "rfem1", "rfem0"]
        assert all(values.shape == image.shape[-2:] and values.isfinite().all() for values in found.values())
        assert all(0 <= found[f"rfem{l}"].min() and found[f"rfem{l}"].max() <= 1 for l in range(4))
    assert found["rfem0"].std() > 0
    with torch.no_grad():
        model.rfem[0].psi.weight.zero_(), model.rfem[0].psi.bias.fill_(math.log(3))                  # sigmoid 3 / 4
        model.cagm.F.fill_(1 / 16)                                    # every position has the same share
    found = model.attention_maps(images[1:])[0]
    torch.testing.assert_close(found["rfem0"], torch.full((50, 30), 0.75))
    torch.testing.assert_close(found["cagm"], torch.ones(50, 30))
    with pytest.raises(ValueError, match="attention_maps: expected the model in evaluation mode"):
        model.train().attention_maps(images)


def test_maps_of_a_padded_picture_leave_the_padding_out():
    model = small_model(image_size=0).eval()
    image = torch.randint(0, 255, (3, 40, 64), dtype=torch.uint8)
    batch, size = model.batch([image])
    assert batch.shape[-2:] == (64, 64) and size == (40, 64)
    maps, features = {}, model.encoder.maps(batch)
    features[3] = model.cagm(features[3])
    model.decode(features, (64, 64), maps)
    expected = F.interpolate(maps["rfem0"], size=(64, 64), mode="bilinear")[0, 0, :40]
    torch.testing.assert_close(model.attention_maps([image])[0]["rfem0"], expected.detach())


# --- learning

@pytest.mark.parametrize("num_classes", [2, 3])
def test_overfits_two_cracks(num_classes, narrow):
    model = small_model(num_classes, dropout=0.0)
    images, targets = cracks()
    if num_classes == 3:
        targets[1]["label_map"] *= 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    for step in range(40):
        loss = sum(model.train()(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for target, found in zip(targets, model.train().eval().probabilities(images)):
        truth = target["label_map"]
        prediction = found[0] > 0.5 if num_classes == 2 else found.argmax(0)
        overlap = ((prediction == truth) & (truth > 0)).sum() / ((prediction > 0) | (truth > 0)).sum()
        assert overlap > 0.7


@pytest.mark.parametrize("field, value, message", [
    ("sequence_size", 60, "sequence_size: expected a multiple of 32 pixels, got 60"), ("attention_rank", 0, "expected 1 or more"),
    ("attention_heads", 3, "attention_heads: expected a divisor of 256"), ("dropout", 1.0, "dropout: expected from 0 to below 1"),
    ("body", "resnet19", "body: expected one of"), ("image_size", -1, "image_size: expected")])
def test_values_that_it_cannot_have(field, value, message):
    with pytest.raises(ValueError, match=message):
        small_model(**{field: value})
