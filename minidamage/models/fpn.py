"""FPN for segmentation (Kirillov et al. 2019, arXiv:1901.02446, "Panoptic FPN", section 3.1; the pyramid: Lin et al. 2017).

    p5     = Conv1x1(c5);   p_l = Conv1x1(c_l) + 2x p_{l+1}, nearest,   l = 4, 3, 2
    s_l    = p_l through (Conv3x3, GroupNorm, ReLU, 2x bilinear) until it has stride 4: three times for p5, once without 2x for p2
    logits = bilinear(Conv1x1(s_5 + s_4 + s_3 + s_2)), from stride 4

Parameter names and widths are those of segmentation_models.pytorch's FPN, the baseline of the Context-CrackNet paper. The detectors'
pyramid, layers/fpn.py, has one more convolution a level and torchvision's names.

Read first: layers/segmenter.py, layers/conv_blocks.py.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from minidamage.layers.conv_blocks import ConvNormReLU, SegmentationHead, init_decoder, upsample
from minidamage.layers.resnet import ResNet
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet

GROUPS = 32                     # of the group normalisation (Wu and He 2018)


@dataclasses.dataclass(frozen=True)
class FPNConfig(SegmenterConfig):
    pyramid_channels: int = 256                     # Lin et al.
    segmentation_channels: int = 128                # Kirillov et al.; a multiple of 32, 64 or more
    dropout: float = 0.2                            # of whole channels, before the head; segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160, pyramid_channels=64, segmentation_channels=64),
        "recipe": context_cracknet.DEMO["recipe"]}


class FPN(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: FPNConfig. Runs in channels_last."""

    def __init__(self, num_classes, config=FPNConfig(), name="fpn"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body)
        self.decoder = FPNDecoder(self.encoder.out_channels, config)
        self.segmentation_head = SegmentationHead(config.segmentation_channels, logit_channels(num_classes), kernel_size=1, upsampling=4)
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        if config.pyramid_channels < 1:
            raise ValueError(f"pyramid_channels: expected 1 or more, got {config.pyramid_channels}")
        if config.segmentation_channels < 2 * GROUPS or config.segmentation_channels % GROUPS:       # one value a group has no variance
            raise ValueError(f"segmentation_channels: expected a multiple of {GROUPS} (groups of the norm), {2 * GROUPS} or more, got "
                             f"{config.segmentation_channels}")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout: expected from 0 to below 1, got {config.dropout}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 32. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder(x)))


class FPNDecoder(nn.Module):
    """[c2, c3, c4, c5] -> [N, segmentation_channels, H / 4, W / 4]."""

    def __init__(self, encoder_channels, config):
        super().__init__()
        c2, c3, c4, c5 = encoder_channels
        self.p5 = nn.Conv2d(c5, config.pyramid_channels, 1)
        self.p4 = TopDown(c4, config.pyramid_channels)
        self.p3 = TopDown(c3, config.pyramid_channels)
        self.p2 = TopDown(c2, config.pyramid_channels)
        self.seg_blocks = nn.ModuleList(ToStride4(config.pyramid_channels, config.segmentation_channels, steps) for steps in (3, 2, 1, 0))
        self.dropout = nn.Dropout2d(config.dropout)

    def forward(self, maps):
        c2, c3, c4, c5 = maps
        p5 = self.p5(c5)
        p4 = self.p4(p5, c4)
        p3 = self.p3(p4, c3)
        p2 = self.p2(p3, c2)
        s5, s4, s3, s2 = (block(p) for block, p in zip(self.seg_blocks, (p5, p4, p3, p2)))
        return self.dropout(s5 + s4 + s3 + s2)


class TopDown(nn.Module):
    """p_l = Conv1x1(c_l) + 2x p_{l+1}."""

    def __init__(self, skip_channels, channels):
        super().__init__()
        self.skip_conv = nn.Conv2d(skip_channels, channels, 1)

    def forward(self, coarser, skip):
        return self.skip_conv(skip) + F.interpolate(coarser, scale_factor=2, mode="nearest")


class ToStride4(nn.Module):
    """`steps` times a convolution and twice the size; one convolution alone for 0 steps."""

    def __init__(self, in_channels, out_channels, steps):
        super().__init__()
        widths = [in_channels, *[out_channels] * max(1, steps)]
        self.block = nn.Sequential(*(ConvGroupNorm(*pair, factor=2 if steps else 1) for pair in zip(widths, widths[1:])))

    def forward(self, x):
        return self.block(x)


class ConvGroupNorm(nn.Module):
    def __init__(self, in_channels, out_channels, factor):
        super().__init__()
        self.block = ConvNormReLU(in_channels, out_channels, norm=nn.GroupNorm(GROUPS, out_channels))
        self.factor = factor

    def forward(self, x):
        return upsample(self.block(x), self.factor)
