"""MAnet (Fan et al. 2020, doi:10.1109/ACCESS.2020.3025372): a U-Net with attention between all positions at the bottom, and between
channels at each skip.

    D_5 = PAB(c5): every position receives the others' values, weighted by how they agree, and a residual
    D_l = UpBlock'(D_{l+1}, c_l),  l = 4, 3, 2, 1: MFAB, the channels of the decoder's map scaled by SE(D) + SE(c_l)
    D_0 = UpBlock(D_1);   logits = Conv3x3(D_0)

Parameter names, widths and outputs are those of segmentation_models.pytorch's MAnet, the baseline of the Context-CrackNet paper. Two of
its habits differ from Fan et al. and are kept, because its weights were trained with them: the softmax of the position attention runs
over all pairs of positions at once, and the attended values [H W, C] are laid out again as [C, H, W] without a transpose.

Read first: unet.py.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from minidamage.layers.conv_blocks import ConvNormReLU, SegmentationHead, UpBlock, init_decoder
from minidamage.layers.resnet import ResNet
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet
from minidamage.models.unet import check_decoder_channels


@dataclasses.dataclass(frozen=True)
class MAnetConfig(SegmenterConfig):
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)      # coarsest first; segmentation_models.pytorch, here and below
    position_channels: int = 64                                     # in which positions are compared
    squeeze_ratio: int = 16                                         # of the channel attention


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160), "recipe": context_cracknet.DEMO["recipe"]}


class MAnet(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: MAnetConfig. Runs in channels_last."""

    def __init__(self, num_classes, config=MAnetConfig(), name="manet"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body)
        self.decoder = MAnetDecoder(self.encoder.map_channels, config)
        self.segmentation_head = SegmentationHead(config.decoder_channels[-1], logit_channels(num_classes))
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_decoder_channels(config)
        for field in ("position_channels", "squeeze_ratio"):
            if getattr(config, field) < 1:
                raise ValueError(f"{field}: expected 1 or more, got {getattr(config, field)}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 32. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder.maps(x)))


class MAnetDecoder(nn.Module):
    """[c1..c5] -> [N, decoder_channels[-1], H, W] in five steps."""

    def __init__(self, encoder_channels, config):
        super().__init__()
        c1, c2, c3, c4, c5 = encoder_channels
        in_channels = [c5, *config.decoder_channels[:-1]]
        steps = list(zip(in_channels, (c4, c3, c2, c1), config.decoder_channels))
        self.center = PositionAttention(c5, config.position_channels)
        self.blocks = nn.ModuleList([*(MultiScaleFusion(*channels, config.squeeze_ratio) for channels in steps),
                                     UpBlock(in_channels[-1], 0, config.decoder_channels[-1])])

    def forward(self, maps):
        c5, *skips = maps[::-1]
        x = self.center(c5)
        for block, skip in zip(self.blocks, [*skips, None]):
            x = block(x, skip)
        return x


class PositionAttention(nn.Module):
    """PAB: [N, C, H, W] -> the same."""

    def __init__(self, channels, position_channels):
        super().__init__()
        self.top_conv = nn.Conv2d(channels, position_channels, 1)
        self.center_conv = nn.Conv2d(channels, position_channels, 1)
        self.bottom_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.out_conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        N, C, H, W = x.shape
        keys = self.top_conv(x).flatten(2)                            # [N, P, HW]
        queries = self.center_conv(x).flatten(2).transpose(1, 2)      # [N, HW, P]
        values = self.bottom_conv(x).flatten(2).transpose(1, 2)       # [N, HW, C]
        agreement = (queries @ keys).flatten(1).softmax(1)            # over all pairs; Fan et al.: over keys
        attended = agreement.view(N, H * W, H * W) @ values           # [N, HW, C]
        return self.out_conv(x + attended.reshape(N, C, H, W))        # no transpose; Fan et al.: [C, HW]


class MultiScaleFusion(nn.Module):
    """MFAB: [N, in, H, W] and a skip [N, skip, 2H, 2W] -> [N, out, 2H, 2W]. hl: the high-level map, ll: the low-level skip."""

    def __init__(self, in_channels, skip_channels, out_channels, squeeze_ratio):
        super().__init__()
        self.hl_conv = nn.Sequential(ConvNormReLU(in_channels, in_channels), ConvNormReLU(in_channels, skip_channels, 1))
        self.SE_ll = ChannelAttention(skip_channels, squeeze_ratio)
        self.SE_hl = ChannelAttention(skip_channels, squeeze_ratio)
        self.conv1 = ConvNormReLU(2 * skip_channels, out_channels)
        self.conv2 = ConvNormReLU(out_channels, out_channels)

    def forward(self, x, skip):
        x = self.hl_conv(x)
        x = x * (self.SE_hl(x) + self.SE_ll(skip))                    # before the up-sampling: nearest repeats pixels, their mean stays
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv2(self.conv1(torch.cat([x, skip], dim=1)))


class ChannelAttention(nn.Sequential):
    """Squeeze and excitation (Hu et al. 2018): [N, C, H, W] -> [N, C, 1, 1] in 0..1."""

    def __init__(self, channels, ratio):
        width = max(1, channels // ratio)
        super().__init__(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1), nn.Sigmoid())
