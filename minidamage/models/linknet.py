"""LinkNet (Chaurasia and Culurciello 2017, arXiv:1707.03718): a light decoder to which the encoder's maps are *added*.

    D_5 = c5;   D_{l-1} = c_{l-1} + Conv1x1(TransposedConv4x4(Conv1x1(D_l))), each with BN and ReLU, a quarter of the width inside
    logits = Conv1x1(D_0), at the picture's own size (c_0 does not exist: nothing is added there)

Parameter names and widths are those of segmentation_models.pytorch's Linknet, the baseline of the Context-CrackNet paper. Differs from
Chaurasia and Culurciello: the decoder ends with a fifth step in place of their full convolutions, on a deeper body.

Read first: layers/segmenter.py, layers/conv_blocks.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.conv_blocks import ConvNormReLU, SegmentationHead, init_decoder
from minidamage.layers.resnet import ResNet
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet


@dataclasses.dataclass(frozen=True)
class LinknetConfig(SegmenterConfig):
    decoder_channels: int = 32                      # of the last map; segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160), "recipe": context_cracknet.DEMO["recipe"]}


class Linknet(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: LinknetConfig. Runs in channels_last."""

    def __init__(self, num_classes, config=LinknetConfig(), name="linknet"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body)
        self.decoder = LinknetDecoder(self.encoder.map_channels, config.decoder_channels)
        self.segmentation_head = SegmentationHead(config.decoder_channels, logit_channels(num_classes), kernel_size=1)
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        if config.decoder_channels < 1:
            raise ValueError(f"decoder_channels: expected 1 or more, got {config.decoder_channels}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 32. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder.maps(x)))


class LinknetDecoder(nn.Module):
    """[c1..c5] -> [N, out_channels, H, W] in five steps."""

    def __init__(self, encoder_channels, out_channels):
        super().__init__()
        widths = [*encoder_channels[::-1], out_channels]
        self.blocks = nn.ModuleList(LinkBlock(*pair) for pair in zip(widths, widths[1:]))

    def forward(self, maps):
        x, *skips = maps[::-1]
        for block, skip in zip(self.blocks, [*skips, None]):
            x = block(x)
            if skip is not None:
                x = x + skip
        return x


class LinkBlock(nn.Module):
    """[N, in, H, W] -> [N, out, 2H, 2W]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        width = in_channels // 4
        self.block = nn.Sequential(ConvNormReLU(in_channels, width, 1), TransposedNormReLU(width), ConvNormReLU(width, out_channels, 1))

    def forward(self, x):
        return self.block(x)


class TransposedNormReLU(nn.Sequential):
    """Twice the size by a transposed 4x4 convolution of stride 2."""

    def __init__(self, channels):
        super().__init__(nn.ConvTranspose2d(channels, channels, 4, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
