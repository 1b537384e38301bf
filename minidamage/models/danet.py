"""DANet: Faster R-CNN for small steel defects, whose body bends its convolutions to the defect and attends to it.

    y(p0) = sum_n w(p_n) x(p0 + p_n + dp_n)                         eq. 2, deformable convolution; DCNv2 also weighs each sample
    F'  = M_c(F) F,   M_c = s(MLP(mean F) + MLP(max F))             eq. 3, 5, channels; mean and max over the padded picture
    F'' = M_s(F') F', M_s = s(conv7x7([mean F'; max F']))           eq. 4, 6, positions; mean and max over the channels
    FL(p_t) = -alpha (1 - p_t)^gamma log(p_t)                       eq. 10

`phase` 1..5 is a row of the paper's Table 2: 1 Faster R-CNN on c4 with RoIPool, 2 with the pyramid and RoIAlign, 3 with deformable
convolutions, 4 with CBAM, 5 with the focal loss: DANet. A switch of one's own (`--set dcn=false`) wins over the phase.

Not stated in the paper, and what we take:
- Which stages are deformed: c3, c4, c5 (Dai et al. deform c5 alone, Zhu et al. c3 to c5). Offsets come from a 3x3 convolution that starts
  at zero, so that a deformable convolution starts as the one whose weights it takes.
- The body of phase 1 ("ResNet50+FPN" is crossed out there): c4 through one 1x1 and one 3x3 convolution to 256 channels, with the heads of
  the full model, so that the phases differ in what Table 2 names alone. RoIAlign comes with phase 2.
- Where the focal loss goes, alpha and gamma: the RoI classifier (softmax; `focal_objectness` for the proposals' too), 0.25 and 2.
- Picture size, anchors, augmentation: 400x400, twice the 200x200 of NEU-DET, with anchors from 32 to 256 pixels; flips.
- The ratio of the MLP: 16, as Woo et al. have it.

Differs from the paper:
- The sigmoids s of CBAM are doubled (`cbam_gain=1`: as printed) and their last layers start at zero: a block then starts as if it had no
  attention. Halved twice in each of 16 blocks, the features of a pre-trained body would not survive.
- Section III.C goes from lateral to lateral and ends there; the pyramid keeps Lin et al.'s 3x3 convolution on every merged map, and a p6
  for the largest anchors.
- M_c's mean and max go over the batch as it is padded, with the zeros right of and below a picture: 400 pixels become 416, the next
  multiple of 32, or more beside larger pictures, on which what is found then hangs a little. NEU-DET's are all of one size.
- The body is not pre-trained on COCO (no such weights are at hand): whatever --pretrained gives.

Read first: faster_rcnn.py.
"""
import dataclasses
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from minidamage import ops
from minidamage.config import Recipe
from minidamage.layers.fpn import FeaturePyramidNetwork
from minidamage.layers.roi_heads import MultiScaleRoIAlign
from minidamage.models import faster_rcnn

# Table 2. RoIAlign is not in it: with phase 2, not stated.
PHASES = {1: dict(fpn=False, dcn=False, cbam=False, focal=False, roi_op="pool"),
          2: dict(fpn=True, dcn=False, cbam=False, focal=False, roi_op="align"),
          3: dict(fpn=True, dcn=True, cbam=False, focal=False, roi_op="align"),
          4: dict(fpn=True, dcn=True, cbam=True, focal=False, roi_op="align"),
          5: dict(fpn=True, dcn=True, cbam=True, focal=True, roi_op="align")}


@dataclasses.dataclass(frozen=True)
class DANetConfig(faster_rcnn.FasterRCNNConfig):
    phase: int = 5                                  # 1..5, Table 2: decides every switch of the next five that is left at none
    fpn: bool | None = None                         # the pyramid; without it one map of stride 16
    dcn: bool | None = None                         # deformable convolutions
    cbam: bool | None = None                        # attention in every residual block
    focal: bool | None = None                       # the paper's word for class_loss=softmax_focal, else cross_entropy
    class_loss: str | None = None                   # one of the box stage's; where it is given, focal follows it
    roi_op: str | None = None                       # align | pool
    # the parts
    dcn_stages: tuple[int, ...] = (3, 4, 5)         # c3, c4, c5: each block's conv2 in layer2, layer3, layer4 (a bottleneck's one 3x3, the
                                                    # second of two in resnet18 and resnet34); not stated
    dcn_modulated: bool = False                     # DCNv2 (Zhu et al. 2019): a weight 0..1 on each sample; the paper cites the first
    cbam_ratio: int = 16                            # r of the MLP; not stated
    cbam_slope: float = 0.01                        # of the MLP's LeakyReLU; 0: ReLU. "instead of ReLU", section III.E; not stated
    cbam_gain: float = 2.0                          # factor on both sigmoids; the paper's 1, see above
    fpn_upsample: str = "bilinear"                  # section III.C; nearest: torchvision
    focal_objectness: bool = False                  # focal_alpha and focal_gamma for the region proposal network's objectness, too
    # 200x200 pictures
    min_size: int = 400                             # not stated
    max_size: int = 400
    anchor_sizes: tuple[int, ...] = (32, 64, 96, 160, 256)      # not stated; train.py --anchors auto chooses them from the boxes
    aspect_ratios: tuple[float, ...] = (0.33, 1.0, 3.0)         # not stated; scratches and inclusions are long
    canonical_scale: int = 112                      # half of the pyramid paper's, as the anchors are


# Section IV.B: SGD 0.02 at batch 4, momentum 0.9, weight decay 1e-4, 30 epochs, rate / 10 at 20 and 28. The factor and the warm-up are not
# stated.
RECIPE = Recipe(epochs=30, batch_size=4, optimizer="sgd", lr=0.02, lr_batch_size=4, momentum=0.9, weight_decay=1e-4, schedule="step",
                milestones=(20, 28), gamma=0.1, warmup_iters=500, hflip=0.5, select_by="bbox/AP50")

DEMO = {"config": dict(faster_rcnn.DEMO["config"], cbam_ratio=8), "recipe": dict(faster_rcnn.DEMO["recipe"])}


class DANet(faster_rcnn.FasterRCNN):
    """The detector of any phase. Its config has every switch settled: none is left at None."""

    def __init__(self, num_classes, config=DANetConfig(), name="danet"):
        super().__init__(num_classes, settled(config), name)

    def check_config(self, config):
        super().check_config(config)
        check_parts(config)

    @staticmethod
    def anchor_strides(config):
        return faster_rcnn.FasterRCNN.anchor_strides(settled(config))

    def build_body(self, config):
        body = super().build_body(config)
        if config.dcn:
            for level in config.dcn_stages:
                for block in body.stages()[level - 2] if level - 2 < len(body.stages()) else ():      # without a pyramid there is no c5
                    block.conv2 = DeformableConv2d.of(block.conv2, config.dcn_modulated)
        if config.cbam:
            for block in (block for stage in body.stages() for block in stage):
                width = (block.conv3 if hasattr(block, "conv3") else block.conv2).out_channels
                block.attention = CBAM(width, config.cbam_ratio, config.cbam_slope, config.cbam_gain)
        for module in body.frozen_modules():                    # a frozen stage's new parts are frozen with it
            module.requires_grad_(False)
        return body

    def build_fpn(self, config, in_channels, levels, extra_level):
        return FeaturePyramidNetwork(in_channels, config.fpn_channels, extra_level, config.fpn_upsample)

    def build_rpn(self, config):
        rpn = super().build_rpn(config)
        if config.focal_objectness:
            rpn.objectness_loss = functools.partial(ops.sigmoid_focal_loss, alpha=config.focal_alpha, gamma=config.focal_gamma)
        return rpn

    def build_roi_pool(self, config, strides, size):
        kind = MultiScaleRoIPool if config.roi_op == "pool" else MultiScaleRoIAlign
        return kind(strides, (size, size), config.sampling_ratio, config.canonical_scale)


def settled(config):
    """The config with every switch that is None set as its phase has it."""
    if config.phase not in PHASES:
        raise ValueError(f"phase: expected 1 to 5, a row of the paper's Table 2, got {config.phase}")
    if config.focal is None and config.class_loss is not None:
        config = dataclasses.replace(config, focal=config.class_loss != "cross_entropy")
    open_switches = {switch: value for switch, value in PHASES[config.phase].items() if getattr(config, switch) is None}
    config = dataclasses.replace(config, **open_switches)
    if config.class_loss is None:
        return dataclasses.replace(config, class_loss="softmax_focal" if config.focal else "cross_entropy")
    if config.focal != (config.class_loss != "cross_entropy"):
        raise ValueError(f"focal: expected {not config.focal} beside class_loss={config.class_loss}, got {config.focal}; leave one out")
    return config


def check_parts(config):
    faster_rcnn.check_ranges(config, counts=("cbam_ratio",))
    if not config.dcn_stages or not set(config.dcn_stages) <= {2, 3, 4, 5}:
        raise ValueError(f"dcn_stages: expected stages out of 2, 3, 4, 5, got {config.dcn_stages}; dcn=false turns them all off")
    faster_rcnn.check_choice(config, fpn_upsample=("nearest", "bilinear"), roi_op=("align", "pool"))
    if not 0 <= config.cbam_slope < math.inf:
        raise ValueError(f"cbam_slope: expected 0 or more, got {config.cbam_slope}")
    if not 0 < config.cbam_gain < math.inf:
        raise ValueError(f"cbam_gain: expected a number above 0, got {config.cbam_gain}")


class DeformableConv2d(nn.Conv2d):
    """A convolution that reads where its input tells it to (eq. 2; Dai et al. 2017, arXiv:1703.06211).

    `offset`, a convolution of the same geometry, gives dy, dx of every sample at every position; modulated (Zhu et al. 2019,
    arXiv:1811.11168) also a logit whose sigmoid, doubled, weighs the sample. It starts at zero: offsets 0, weights 1, a plain convolution.
    `weight` and `bias` keep their names, so that a published body loads.
    Differs from DCNv2: the sigmoid is doubled, or taken-over weights would start at half their strength.
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, bias=True, modulated=False):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias)
        samples = self.kernel_size[0] * self.kernel_size[1]
        self.modulated = modulated
        self.offset = nn.Conv2d(in_channels, (3 if modulated else 2) * samples, kernel_size, stride, padding, dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    @classmethod
    def of(cls, conv, modulated):
        """A deformable convolution with the geometry and the weights of a plain one (without groups)."""
        made = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
                   conv.bias is not None, modulated)
        made.load_state_dict(conv.state_dict(), strict=False)
        return made

    def forward(self, x):
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x, weight, bias):
        """With other weights than its own, as a folded normalisation asks for (layers/resnet.py, conv_norm)."""
        read = self.offset(x)
        samples = self.kernel_size[0] * self.kernel_size[1]
        modulation = 2 * read[:, 2 * samples:].sigmoid() if self.modulated else None
        return ops.deform_conv2d(x, read[:, :2 * samples], weight, bias, self.stride, self.padding, self.dilation, modulation)


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al. 2018, arXiv:1807.06521; eq. 3-6): which channels count, then which positions.

    ratio: the MLP's hidden layer has channels / ratio units, at least one. slope: of its LeakyReLU. gain: factor on both sigmoids. No
    biases and no normalisation, as printed. The last layer of both starts at zero: both maps start as gain / 2.
    """

    def __init__(self, channels, ratio=16, slope=0.01, gain=2.0):
        super().__init__()
        hidden = max(1, channels // ratio)
        self.w0 = nn.Linear(channels, hidden, bias=False)
        self.w1 = nn.Linear(hidden, channels, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.slope, self.gain = slope, gain
        nn.init.kaiming_normal_(self.w0.weight, a=slope, nonlinearity="leaky_relu")
        nn.init.zeros_(self.w1.weight)
        nn.init.zeros_(self.spatial.weight)

    def channel_attention(self, x):
        """M_c of eq. 5, [N, C, 1, 1]. W1 is linear, so the hidden layers are summed before it."""
        hidden = F.leaky_relu(self.w0(x.mean((2, 3))), self.slope) + F.leaky_relu(self.w0(x.amax((2, 3))), self.slope)      # [N, C / r]
        return self.gain * self.w1(hidden).sigmoid()[:, :, None, None]

    def spatial_attention(self, x):
        """M_s of eq. 6, [N, 1, H, W]."""
        return self.gain * self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)).sigmoid()

    def forward(self, x):
        """[N, C, H, W] -> the same shape."""
        x = x * self.channel_attention(x)
        return x * self.spatial_attention(x)


class MultiScaleRoIPool(MultiScaleRoIAlign):
    """RoIPool (Girshick 2015) in RoIAlign's place: the largest value of each whole-pixel cell.

    Every level pools every box, and the box's own level is taken: without a pyramid, where the paper has it, there is one.
    """

    def forward(self, features, rois):
        levels = self.levels(rois[:, 1:])
        pooled = None
        for level, (feature, scale) in enumerate(zip(features, self.spatial_scales)):
            here = ops.roi_pool(feature, rois, self.output_size, scale)                                    # [R, C, P, P]
            pooled = here if pooled is None else torch.where((levels == level)[:, None, None, None], here, pooled)
        return pooled
