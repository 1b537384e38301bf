"""DeepLabV3+ (Chen et al. 2018, arXiv:1802.02611): DeepLabV3's pyramid at stride 16, refined by the encoder's map of stride 4.

    c2, c5 = ResNet(picture), strides 4 and 16: the last stage dilated
    x      = Separable3x3(ASPP(c5)), rates 12, 24, 36, separable                        layers/aspp.py
    x      = Separable3x3([4x x, Conv1x1(c2)])
    logits = bilinear(Conv1x1(x)), from stride 4                   every convolution but the last with BN and ReLU

Parameter names are those of segmentation_models.pytorch's DeepLabV3Plus, the baseline of the Context-CrackNet paper. Differs from Chen
et al.: rates 12, 24, 36 at stride 16 (theirs: 6, 12, 18), one separable convolution after the concatenation (theirs: two).

Read first: deeplabv3.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.aspp import ASPP
from minidamage.layers.conv_blocks import ConvNormReLU, SegmentationHead, SeparableConv2d, SeparableConvNormReLU, init_decoder, upsample
from minidamage.layers.resnet import ResNet, conv_norm
from minidamage.layers.segmenter import Segmenter, logit_channels
from minidamage.models import context_cracknet
from minidamage.models.deeplabv3 import DeepLabV3Config, check_atrous


@dataclasses.dataclass(frozen=True)
class DeepLabV3PlusConfig(DeepLabV3Config):
    skip_channels: int = 48                         # of c2's 1x1 convolution; Chen et al., section 4.1


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures, rates that fit their 10 x 10 maps.
DEMO = {"config": dict(body="resnet18", image_size=160, decoder_channels=64, atrous_rates=(2, 4, 6)),
        "recipe": context_cracknet.DEMO["recipe"]}


class DeepLabV3Plus(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: DeepLabV3PlusConfig. Runs in channels_last."""

    stride = 16

    def __init__(self, num_classes, config=DeepLabV3PlusConfig(), name="deeplabv3plus"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body, output_stride=self.stride, dilate_first=True)
        self.decoder = DeepLabV3PlusDecoder(self.encoder.out_channels, config)
        self.segmentation_head = SegmentationHead(config.decoder_channels, logit_channels(num_classes), kernel_size=1, upsampling=4)
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_atrous(config)
        if config.skip_channels < 1:
            raise ValueError(f"skip_channels: expected 1 or more, got {config.skip_channels}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 16. Returns [N, C, H, W]."""
        c2, _, _, c5 = self.encoder(x)
        return self.segmentation_head(self.decoder(c2, c5))


class DeepLabV3PlusDecoder(nn.Module):
    """c2 [N, C2, H / 4, W / 4] and c5 [N, C5, H / 16, W / 16] -> [N, decoder_channels, H / 4, W / 4]."""

    def __init__(self, encoder_channels, config):
        super().__init__()
        c2, _, _, c5 = encoder_channels
        channels = config.decoder_channels
        self.aspp = nn.Sequential(ASPP(c5, channels, config.atrous_rates, separable=True, dropout=config.dropout),
                                  SeparableConv2d(channels, channels), nn.BatchNorm2d(channels), nn.ReLU())
        self.block1 = ConvNormReLU(c2, config.skip_channels, 1)
        self.block2 = SeparableConvNormReLU(channels + config.skip_channels, channels)

    def forward(self, c2, c5):
        pyramid, (depthwise, pointwise), norm, _ = self.aspp
        x = conv_norm(depthwise(pyramid(c5)), pointwise, norm, relu=True)
        return self.block2(torch.cat([upsample(x, 4), self.block1(c2)], dim=1))
