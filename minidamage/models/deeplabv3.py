"""DeepLabV3 (Chen et al. 2017, arXiv:1706.05587): a body that keeps stride 8 by dilation, and atrous spatial pyramid pooling.

    c5     = ResNet(picture), stride 8: the last two stages dilated 2 and 4 times
    x      = ASPP(c5), rates 12, 24, 36                                                 layers/aspp.py
    logits = bilinear(Conv1x1(ReLU(BN(Conv3x3(x))))), from stride 8

This one has the parameter names of segmentation_models.pytorch's DeepLabV3, the baseline of the Context-CrackNet paper. The same
network under torchvision's names, `deeplabv3_resnet50`, is in fcn.py.

Read first: layers/segmenter.py, layers/aspp.py. Read next: deeplabv3plus.py, fcn.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.aspp import ASPP
from minidamage.layers.conv_blocks import SegmentationHead, init_decoder
from minidamage.layers.resnet import ResNet, conv_norm
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet


@dataclasses.dataclass(frozen=True)
class DeepLabV3Config(SegmenterConfig):
    decoder_channels: int = 256                     # section 3.3
    atrous_rates: tuple[int, ...] = (12, 24, 36)    # for stride 8, section 4.1
    dropout: float = 0.5                            # after the ASPP; segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures, rates that fit their 20 x 20 maps.
DEMO = {"config": dict(body="resnet18", image_size=160, decoder_channels=64, atrous_rates=(3, 6, 9)),
        "recipe": context_cracknet.DEMO["recipe"]}


class DeepLabV3(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: DeepLabV3Config. Runs in channels_last."""

    stride = 8

    def __init__(self, num_classes, config=DeepLabV3Config(), name="deeplabv3"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body, output_stride=self.stride, dilate_first=True)
        self.decoder = DeepLabV3Decoder(self.encoder.out_channels[-1], config)
        self.segmentation_head = SegmentationHead(config.decoder_channels, logit_channels(num_classes), kernel_size=1, upsampling=8)
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_atrous(config)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 8. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder(x)[-1]))


class DeepLabV3Decoder(nn.Module):
    """c5 [N, in, H / 8, W / 8] -> [N, decoder_channels, H / 8, W / 8]."""

    def __init__(self, in_channels, config):
        super().__init__()
        channels = config.decoder_channels
        self.aspp = ASPP(in_channels, channels, config.atrous_rates, dropout=config.dropout)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, c5):
        return conv_norm(self.aspp(c5), self.conv, self.bn, relu=True)


def check_atrous(config):
    """ValueError for widths, rates or a dropout that no pyramid of atrous convolutions can have."""
    if config.decoder_channels < 1:
        raise ValueError(f"decoder_channels: expected 1 or more, got {config.decoder_channels}")
    if not config.atrous_rates or min(config.atrous_rates) < 1:
        raise ValueError(f"atrous_rates: expected one or more numbers above 0, such as 12,24,36, got {config.atrous_rates}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout: expected from 0 to below 1, got {config.dropout}")
