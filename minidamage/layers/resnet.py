"""ResNet-18, 34, 50 and 101 (He et al. 2016, arXiv:1512.03385): the body of the detectors and segmenters, with torchvision's
parameter names.

The stride of a bottleneck sits in its 3x3 convolution (as in torchvision, "v1.5"; the paper has it in the first 1x1).

What differs from torchvision is how a normalisation that is not learning its statistics runs: it is an affine map a channel,
so it is folded into the convolution before it, conv(x, w * scale, bias), which gives the same numbers and the same gradients
and saves two passes over every feature map (see `conv_norm`). The parameters and their names stay as they are in the file.

Read first: nothing. Read next: fpn.py.
"""
import platform

import torch
from torch import nn
from torch.nn import functional as F

NORMS = ("batch", "frozen", "group")
ONEDNN = torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
WIDTHS = (64, 128, 256, 512)                     # of the stages' 3x3 convolutions; the stem has the first
LAYERS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class ResNet(nn.Module):
    """A residual network.

    name: resnet18 | resnet34 | resnet50 | resnet101. norm: batch | frozen (statistics and affine map never change) | group.
    frozen_stages: how many of (stem, layer1, layer2, layer3, layer4), counted from the picture, are not trained.
    num_classes: with it, the classifier `fc` of the published weights exists and the output is logits [N, num_classes];
    without it the output is the list of feature maps c2..c5, [N, C, H / 2**l, W / 2**l] for level l.
    with_layer4: False leaves the last stage out, and c4 (stride 16) is the coarsest map.
    output_stride: 32, or 16 or 8: the last one or two stages then keep the size, and their 3x3 convolutions are dilated 2 and 4 times
    in place of the strides (Chen et al. 2017, arXiv:1706.05587). dilate_first: whether a stage's first block, which had the stride, is
    dilated as the rest of its stage (segmentation_models.pytorch) or as the stage before (torchvision).
    Raises ValueError for an unknown name or norm.
    """

    def __init__(self, name="resnet50", norm="batch", frozen_stages=0, num_classes=None, with_layer4=True, output_stride=32,
                 dilate_first=False):
        super().__init__()
        if name not in LAYERS:
            raise ValueError(f"body: expected one of {', '.join(LAYERS)}, got {name!r}")
        if norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
        if not 0 <= frozen_stages <= 5:
            raise ValueError(f"frozen_stages: expected 0 (train everything) to 5 (stem and layer1..4 frozen), got {frozen_stages}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride: expected 8, 16 or 32, got {output_stride}")
        block = BasicBlock if name in ("resnet18", "resnet34") else Bottleneck
        depth, grow = LAYERS[name], block.expansion
        widths, stem = WIDTHS, WIDTHS[0]
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = make_norm(norm, stem)
        plan2, plan3, plan4 = stage_plans(output_stride, dilate_first)
        self.layer1 = make_stage(block, stem, widths[0], depth[0], norm)
        self.layer2 = make_stage(block, widths[0] * grow, widths[1], depth[1], norm, *plan2)
        self.layer3 = make_stage(block, widths[1] * grow, widths[2], depth[2], norm, *plan3)
        self.layer4 = make_stage(block, widths[2] * grow, widths[3], depth[3], norm, *plan4) if with_layer4 else None
        self.out_channels = [width * grow for width in widths][:len(self.stages())]
        self.map_channels = [stem, *self.out_channels]                # of `maps`
        self.fc = nn.Linear(self.out_channels[-1], num_classes) if num_classes else None
        self.init_weights(norm)
        self.frozen_stages = frozen_stages
        for module in self.frozen_modules():
            module.requires_grad_(False)

    def forward(self, x):
        """x: [N, 3, H, W] float, normalised. Returns [c2, c3, c4, c5], or logits where there is a classifier."""
        features = self.residual_stages(self.pool(self.stem(x)))
        if self.fc is not None:
            return self.fc(features[-1].mean((2, 3)))
        return features

    def maps(self, x, levels=5):
        """The first `levels` of [c1, c2, c3, c4, c5], as the segmenters need them: c1 [N, C, H / 2, W / 2] is the stem's, before
        the pooling. The stages above are not run."""
        c1 = self.stem(x)
        return [c1, *self.residual_stages(self.pool(c1), levels - 1)]

    def stem(self, x):
        return conv_norm(x, self.conv1, self.bn1, relu=True)

    def pool(self, c1):
        return F.max_pool2d(c1, kernel_size=3, stride=2, padding=1)

    def residual_stages(self, x, count=4):
        """The first `count` of [c2, c3, c4, c5] from the pooled stem."""
        features = []
        for stage in self.stages()[:count]:
            x = stage(x)
            features.append(x)
        return features

    def train(self, mode=True):
        """As in every module, except that a frozen stage keeps its running statistics: it stays in evaluation mode."""
        super().train(mode)
        for module in self.frozen_modules():
            module.eval()
        return self

    def init_weights(self, norm):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if norm == "frozen":
            # before weights are loaded a frozen norm normalises nothing: residual branches start at zero, so that c5 stays bounded
            for block in (block for stage in self.stages() for block in stage):
                nn.init.zeros_((block.conv3 if isinstance(block, Bottleneck) else block.conv2).weight)

    def stages(self):
        return [stage for stage in (self.layer1, self.layer2, self.layer3, self.layer4) if stage is not None]

    def frozen_modules(self):
        stem_and_stages = [[self.conv1, self.bn1]] + [[stage] for stage in self.stages()]
        return [module for stage in stem_and_stages[:self.frozen_stages] for module in stage]


def stage_plans(output_stride, dilate_first):
    """(stride, dilation of the first block, dilation of the others) of layer2, layer3 and layer4."""
    plans, dilation = [], 1
    for stage_stride in (8, 16, 32):                                  # of the maps, undilated
        before, dilation = dilation, max(1, stage_stride // output_stride)
        plans.append((1 if stage_stride > output_stride else 2, dilation if dilate_first else before, dilation))
    return plans


def make_stage(block, in_channels, width, depth, norm, stride=1, first_dilation=1, dilation=1):
    """`depth` residual blocks; the first one changes size and channels."""
    first = block(in_channels, width, stride, norm, first_dilation)
    return nn.Sequential(first, *(block(width * block.expansion, width, 1, norm, dilation) for _ in range(depth - 1)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut (ResNet-18 and 34)."""

    expansion = 1

    def __init__(self, in_channels, width, stride, norm, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = make_norm(norm, width)
        self.downsample = make_shortcut(in_channels, width, stride, norm)
        self.attention = None                        # a module over the branch, before the addition, in models that have one (DANet)

    def forward(self, x):
        out = conv_norm(x, self.conv1, self.bn1, relu=True)
        out = conv_norm(out, self.conv2, self.bn2)
        return add_shortcut(out, x, self)


class Bottleneck(nn.Module):
    """1x1 down to `width`, 3x3, 1x1 up to 4 * width, and the shortcut (ResNet-50 and deeper)."""

    expansion = 4

    def __init__(self, in_channels, width, stride, norm, dilation=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = make_norm(norm, width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = make_norm(norm, width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = make_norm(norm, 4 * width)
        self.downsample = make_shortcut(in_channels, 4 * width, stride, norm)
        self.attention = None

    def forward(self, x):
        out = conv_norm(x, self.conv1, self.bn1, relu=True)
        out = conv_norm(out, self.conv2, self.bn2, relu=True)
        out = conv_norm(out, self.conv3, self.bn3)
        return add_shortcut(out, x, self)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine map are constants (buffers, so no optimiser touches them).

    On a GPU scale and shift are kept from call to call: what writes to a buffer's `.data` there, which leaves no trace, has to be
    followed by train() or eval().
    """

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self._known = None                                            # the constants, their versions, and (scale, shift) made from them

    def affine(self):
        """scale, shift of affine_of(): made once, and anew when the constants were written, loaded or moved. A body has 53 of them, five
        small operations each, which a GPU would wait for in every step."""
        constants = self.weight, self.bias, self.running_mean, self.running_var
        if torch.compiler.is_compiling() or not self.is_worth_keeping() or any(tensor.is_inference() for tensor in constants):
            return make_affine(self)
        versions = [self.eps, *(tensor._version for tensor in constants)]
        if self._known is None or versions != self._known[1] or any(a is not b for a, b in zip(constants, self._known[0])):
            with torch.inference_mode(False):                         # a training step may use them later
                self._known = constants, versions, make_affine(self)
        return self._known[2]

    def is_worth_keeping(self):
        return self.weight.is_cuda

    def train(self, mode=True):
        self._known = None
        return super().train(mode)

    def forward(self, x):
        scale, shift = affine_of(self)
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)          # a trained BatchNorm2d has it, a frozen one has no use for it
        super()._load_from_state_dict(state_dict, prefix, *args)


def make_norm(norm, channels):
    """norm: batch | frozen | group (32 groups, Wu and He 2018; fewer where the channels do not divide)."""
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    if norm == "frozen":
        return FrozenBatchNorm2d(channels)
    return nn.GroupNorm(next(groups for groups in (32, 16, 8, 4, 2, 1) if channels % groups == 0), channels)


def make_shortcut(in_channels, out_channels, stride, norm):
    """None where the shortcut is the identity, else the 1x1 convolution and norm that fit its size."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), make_norm(norm, out_channels))


def add_shortcut(out, x, block):
    """The end of a block: its branch's map `out`, through the attention where there is one, plus its input; then ReLU."""
    if block.attention is not None:
        out = block.attention(out)
    return out.add_(x if block.downsample is None else conv_norm(x, block.downsample[0], block.downsample[1])).relu_()


def affine_of(norm):
    """scale, shift [C] of a normalisation with constant statistics: norm(x) = x * scale + shift."""
    return norm.affine() if isinstance(norm, FrozenBatchNorm2d) else make_affine(norm)


def make_affine(norm):
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def conv_norm(x, conv, norm, relu=False):
    """norm(conv(x)), optionally through ReLU. norm: BatchNorm2d, FrozenBatchNorm2d or GroupNorm.

    Where the norm's statistics are constants and the weights are no larger than the map that comes out, both are folded into one
    convolution; larger weights (deep stages of small pictures) cost more to scale than the map does.
    """
    constant = isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, nn.BatchNorm2d) and not norm.training)
    positions = x.shape[0] * x.shape[2] * x.shape[3] // (conv.stride[0] * conv.stride[1])             # of the map that comes out
    if constant and conv.weight[0].numel() <= positions:
        scale, shift = affine_of(norm)
        if conv.bias is not None:
            shift = shift + conv.bias * scale
        out = convolve(x, conv, conv.weight * scale.view(-1, 1, 1, 1), shift)
    else:
        out = convolve(x, conv, conv.weight, conv.bias)
        out = normalise_as_constant(out, norm) if constant or is_one_value(out, norm) else norm(out)
    return out.relu_() if relu else out          # in place: no backward above needs the values before the ReLU


def convolve(x, conv, weight, bias):
    """conv(x) with these weights.

    On a CPU a 1x1 convolution asks for a dilation, to which it is blind: with one thread torch would run it by a kernel of its own, here
    it takes oneDNN's, 1.7 to 3 times as fast (28x28 and 112x112, 64 to 2048 channels). With more threads torch takes that in any case.
    """
    if ONEDNN and type(conv) is nn.Conv2d and conv.kernel_size == (1, 1) and x.device.type == "cpu" and x.dtype == torch.float32:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, 2, conv.groups)
    return conv._conv_forward(x, weight, bias)                        # a deformable convolution has its own


def is_one_value(x, norm):
    """Whether batch normalisation would meet a single value a channel, which has no variance: one picture, pooled to 1 x 1."""
    return type(norm) is nn.BatchNorm2d and x.shape[0] * x.shape[2] * x.shape[3] == 1


def normalise_as_constant(x, norm):
    """The norm with its running statistics, in training too."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def load_body(model, path):
    """Loads a ResNet state_dict file into the body of `model`, a detector's or a segmenter's (or into `model` if that is a ResNet).

    path: a torchvision or timm file (their ResNets share the names), also wrapped as {"state_dict": ...}, {"model": ...},
    {"model_state_dict": ...} or {"weights": ...} (a checkpoint of ours), also with the prefixes module., model., backbone., body.,
    backbone.body., encoder..
    Returns {"loaded": [...], "missing": [...], "unexpected": [...], "mismatched": ["key: file [..], model [..]", ...]}: what is
    missing or mismatched keeps its initial values, so the caller has to show the report. The file's own classifier (fc.*) and
    counters (num_batches_tracked) are no surprise and are not listed. Raises ValueError, and loads nothing, for a file of another depth
    or kind, or for a model without such a body.
    """
    body = next((module for module in model.modules() if isinstance(module, ResNet)), None)
    if body is None:
        name = getattr(model, "name", type(model).__name__)
        raise ValueError(f"{path}: expected a model with a ResNet body, got {name}, which has none; "
                         "give it a checkpoint of its own kind, or train it from scratch")
    state = _read_state_dict(path)
    own = body.state_dict()
    report = {"loaded": [], "missing": [], "unexpected": [], "mismatched": []}
    for key, value in state.items():
        if key in own and own[key].shape == value.shape and own[key].is_floating_point() == value.is_floating_point():
            report["loaded"].append(key)
        elif key in own:
            report["mismatched"].append(f"{key}: file {list(value.shape)} {value.dtype}, model {list(own[key].shape)} {own[key].dtype}")
        elif not key.startswith("fc.") and not key.endswith("num_batches_tracked"):
            report["unexpected"].append(key)
    report["missing"] = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    convolutions = [key for key in report["loaded"] if own[key].dim() == 4]
    if len(convolutions) <= len(report["mismatched"]):
        wrong = report["mismatched"][0] if report["mismatched"] else f"keys such as {', '.join(list(state)[:3])}"
        raise ValueError(f"{path}: expected a ResNet state_dict that fits this body, got {wrong}: only {len(convolutions)} convolutions "
                         "fit. Give the file of the same depth (config field `body`), with float weights")
    with torch.no_grad():
        for key in report["loaded"]:
            own[key].copy_(state[key])
    return report


def _read_state_dict(path):
    """The tensors of a file under torchvision's names, wrappers and prefixes taken off."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: expected a file written by torch.save with a ResNet state_dict, got one that does not load "
                         f"({reason}); download it again, or convert it with torch.save(model.state_dict(), file)") from None
    for wrapper in ("weights", "state_dict", "model", "model_state_dict"):                     # "weights": of our own checkpoints
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict of tensors, got {type(state).__name__}")
    clean = {}
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            stripping = True
            while stripping:
                stripping = False
                for prefix in ("module.", "model.", "backbone.", "body.", "encoder."):
                    if key.startswith(prefix):
                        key, stripping = key[len(prefix):], True
            clean[key] = value
    return clean
