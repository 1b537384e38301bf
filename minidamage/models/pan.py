"""PAN, pyramid attention network (Li et al. 2018, arXiv:1805.10180): the coarsest map weighted by a pyramid of itself, then global
means that decide which channels of the finer maps pass.

    x5     = FPA(c5): Conv1x1(c5) * pyramid(c5; 7x7, 5x5, 3x3 convolutions at 1/2, 1/4, 1/8) + Conv1x1(mean of c5)
    x_l    = GAU(c_l, x_{l+1}): 2x x_{l+1} + Conv3x3(c_l) * sigmoid(Conv1x1(mean of x_{l+1})),  l = 4, 3, 2
    logits = bilinear(Conv3x3(x_2)), from stride 4

c5 has stride 16 (the last stage is dilated), so the first GAU keeps the size. The pyramid halves it three times: pictures are padded to
128 pixels at least. Parameter names and widths are those of segmentation_models.pytorch's PAN, the baseline of the Context-CrackNet
paper; its pyramid has one channel (Li et al. do not say).

Read first: layers/segmenter.py, layers/conv_blocks.py.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from minidamage.layers.conv_blocks import SegmentationHead, init_decoder
from minidamage.layers.resnet import ResNet, conv_norm
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet


@dataclasses.dataclass(frozen=True)
class PANConfig(SegmenterConfig):
    decoder_channels: int = 32                      # segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160), "recipe": context_cracknet.DEMO["recipe"]}


class PAN(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: PANConfig. Runs in channels_last."""

    stride = 16
    smallest_side = 128

    def __init__(self, num_classes, config=PANConfig(), name="pan"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body, output_stride=self.stride, dilate_first=True)
        self.decoder = PANDecoder(self.encoder.out_channels, config.decoder_channels)
        self.segmentation_head = SegmentationHead(config.decoder_channels, logit_channels(num_classes), upsampling=4)
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        if config.decoder_channels < 1:
            raise ValueError(f"decoder_channels: expected 1 or more, got {config.decoder_channels}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 16, 128 or more. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder(x)))


class PANDecoder(nn.Module):
    """[c2, c3, c4, c5] -> [N, channels, H / 4, W / 4]."""

    def __init__(self, encoder_channels, channels):
        super().__init__()
        c2, c3, c4, c5 = encoder_channels
        self.fpa = FeaturePyramidAttention(c5, channels)
        self.gau3 = GlobalAttentionUpsample(c4, channels)
        self.gau2 = GlobalAttentionUpsample(c3, channels)
        self.gau1 = GlobalAttentionUpsample(c2, channels)

    def forward(self, maps):
        c2, c3, c4, c5 = maps
        x = self.gau3(c4, self.fpa(c5))
        x = self.gau2(c3, x)
        return self.gau1(c2, x)


class FeaturePyramidAttention(nn.Module):
    """[N, in, h, w] -> [N, out, h, w], h and w 8 or more."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.branch1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNorm(in_channels, out_channels, 1))
        self.mid = nn.Sequential(ConvNorm(in_channels, out_channels, 1))
        self.down1 = nn.Sequential(nn.MaxPool2d(2), ConvNorm(in_channels, 1, 7))
        self.down2 = nn.Sequential(nn.MaxPool2d(2), ConvNorm(1, 1, 5))
        self.down3 = nn.Sequential(nn.MaxPool2d(2), ConvNorm(1, 1, 3), ConvNorm(1, 1, 3))
        self.conv2 = ConvNorm(1, 1, 5)
        self.conv1 = ConvNorm(1, 1, 7)

    def forward(self, c5):
        down1 = self.down1(c5)                                        # [N, 1, h / 2, w / 2]
        down2 = self.down2(down1)                                     # [N, 1, h / 4, w / 4]
        down3 = self.down3(down2)                                     # [N, 1, h / 8, w / 8]
        weights = self.conv2(down2) + resize(down3, down2)
        weights = self.conv1(down1) + resize(weights, down1)
        return self.mid(c5) * resize(weights, c5) + self.branch1(c5)


class GlobalAttentionUpsample(nn.Module):
    """skip [N, C, H, W] and the coarser x [N, out, h, w] -> [N, out, H, W]."""

    def __init__(self, skip_channels, out_channels):
        super().__init__()
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNorm(out_channels, out_channels, 1, relu=False), nn.Sigmoid())
        self.conv2 = ConvNorm(skip_channels, out_channels, 3)

    def forward(self, skip, x):
        return self.conv2(skip) * self.conv1(x) + resize(x, skip)


class ConvNorm(nn.Module):
    """A convolution with bias, batch normalisation, ReLU."""

    def __init__(self, in_channels, out_channels, kernel_size, relu=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = relu

    def forward(self, x):
        return conv_norm(x, self.conv, self.bn, self.relu)


def resize(x, like):
    """x at the size of `like`, bilinear, corner to corner."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)
