"""U-Net (Ronneberger et al. 2015, arXiv:1505.04597) on a ResNet: each map of the encoder returns beside the decoder's of its size.

    c1..c5 = ResNet(picture), strides 2..32
    D4     = c5;   D_{l-1} = two Conv-BN-ReLU of [2x D_l, skip],  skips c4, c3, c2, c1 and none      layers/conv_blocks.py
    logits = Conv3x3(D_{-1}), at the picture's own size

Widths and parameter names are those of segmentation_models.pytorch's Unet, the baseline of the Context-CrackNet paper (Table 3 and 7).
Differs from Ronneberger et al.: padded convolutions with batch normalisation, nearest-neighbour up-sampling, a pre-trainable encoder.

Read first: layers/segmenter.py, layers/conv_blocks.py. Read next: unetplusplus.py, manet.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.conv_blocks import SegmentationHead, UpBlock, init_decoder
from minidamage.layers.resnet import ResNet
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet


@dataclasses.dataclass(frozen=True)
class UnetConfig(SegmenterConfig):
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)      # coarsest first; segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160), "recipe": context_cracknet.DEMO["recipe"]}


class Unet(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: UnetConfig. Runs in channels_last."""

    def __init__(self, num_classes, config=UnetConfig(), name="unet"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body)
        self.decoder = UnetDecoder(self.encoder.map_channels, config.decoder_channels)
        self.segmentation_head = SegmentationHead(config.decoder_channels[-1], logit_channels(num_classes))
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_decoder_channels(config)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 32. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder.maps(x)))


class UnetDecoder(nn.Module):
    """[c1..c5] -> [N, out_channels[-1], H, W] in five steps."""

    def __init__(self, encoder_channels, out_channels):
        super().__init__()
        c1, c2, c3, c4, c5 = encoder_channels
        in_channels = [c5, *out_channels[:-1]]
        self.blocks = nn.ModuleList(UpBlock(*channels) for channels in zip(in_channels, (c4, c3, c2, c1, 0), out_channels))

    def forward(self, maps):
        x, *skips = maps[::-1]
        for block, skip in zip(self.blocks, [*skips, None]):
            x = block(x, skip)
        return x


def check_decoder_channels(config):
    if len(config.decoder_channels) != 5 or min(config.decoder_channels) < 1:
        raise ValueError(f"decoder_channels: expected 5 numbers above 0, such as 256,128,64,32,16, got {config.decoder_channels}")
