"""Blocks that two or more segmenters are built from, with the parameter names of segmentation_models.pytorch.

    ConvNormReLU            convolution, norm, ReLU                          "0" and "1"
    SeparableConvNormReLU   the same, a depthwise and a 1x1 convolution      "0.0", "0.1" and "1"
    UpBlock                 twice the size, beside a skip, two ConvNormReLU  "conv1" and "conv2"
    SegmentationHead        the last convolution, up to the picture's size   "0"

Read first: resnet.py. Read next: aspp.py, models/unet.py.
"""
import torch
from torch import nn
from torch.nn import functional as F

from minidamage.layers.resnet import conv_norm


class ConvNormReLU(nn.Sequential):
    """[N, in, H, W] -> [N, out, H, W], size kept. norm: a module; None is batch normalisation."""

    def __init__(self, in_channels, out_channels, kernel_size=3, dilation=1, norm=None):
        padding = dilation * (kernel_size // 2)
        super().__init__(nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
                         nn.BatchNorm2d(out_channels) if norm is None else norm, nn.ReLU())

    def forward(self, x):
        return conv_norm(x, self[0], self[1], relu=True)


class SeparableConv2d(nn.Sequential):
    """A 3x3 convolution a channel, then a 1x1 over the channels; neither has a bias (Chollet 2017, arXiv:1610.02357)."""

    def __init__(self, in_channels, out_channels, dilation=1):
        super().__init__(nn.Conv2d(in_channels, in_channels, 3, padding=dilation, dilation=dilation, groups=in_channels, bias=False),
                         nn.Conv2d(in_channels, out_channels, 1, bias=False))


class SeparableConvNormReLU(nn.Sequential):
    """[N, in, H, W] -> [N, out, H, W], size kept."""

    def __init__(self, in_channels, out_channels, dilation=1):
        super().__init__(SeparableConv2d(in_channels, out_channels, dilation), nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, x):
        depthwise, pointwise = self[0]
        return conv_norm(depthwise(x), pointwise, self[1], relu=True)


class UpBlock(nn.Module):
    """A step of a U-Net's decoder: [N, in, H, W] and a skip [N, skip, 2H, 2W] (or None) -> [N, out, 2H, 2W]."""

    def __init__(self, in_channels, skip_channels, out_channels):
        super().__init__()
        self.conv1 = ConvNormReLU(in_channels + skip_channels, out_channels)
        self.conv2 = ConvNormReLU(out_channels, out_channels)

    def forward(self, x, skip=None):
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        if skip is not None:
            x = torch.cat([x, skip], dim=1)
        return self.conv2(self.conv1(x))


class SegmentationHead(nn.Sequential):
    """The last convolution, and bilinear interpolation (corner to corner) where the decoder stops `upsampling` times too small."""

    def __init__(self, in_channels, out_channels, kernel_size=3, upsampling=1):
        super().__init__(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))
        self.upsampling = upsampling

    def forward(self, x):
        return upsample(self[0](x), self.upsampling)


def upsample(x, factor):
    """`factor` times the size, bilinear, the corners' centres kept in place (align_corners)."""
    return x if factor == 1 else F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)


def init_decoder(*modules):
    """Fresh weights for all that is not the body: He initialisation (2015), zero biases. (segmentation_models.pytorch starts its DeepLabs
    and LinkNet's transposed convolutions, and torchvision its FCN and DeepLab, from the framework's default, 2.45 times smaller.)"""
    for top in modules:
        for module in top.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_uniform_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
