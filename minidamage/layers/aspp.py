"""Atrous spatial pyramid pooling (Chen et al. 2017, arXiv:1706.05587, section 3.3): one map seen through convolutions of several
dilations and through its mean. The parameter names are torchvision's, which are segmentation_models.pytorch's too.

Read first: conv_blocks.py. Read next: models/deeplabv3.py, models/deeplabv3plus.py, models/fcn.py.
"""
import torch
from torch import nn

from minidamage.layers.conv_blocks import ConvNormReLU, SeparableConvNormReLU
from minidamage.layers.resnet import conv_norm


class ASPP(nn.Module):
    """[N, in, H, W] -> [N, out, H, W]. rates: dilations of the 3x3 branches; beside them stand a 1x1 and the picture's mean.

    separable: the 3x3 convolutions are depthwise separable (DeepLabV3+).
    """

    def __init__(self, in_channels, out_channels, rates, separable=False, dropout=0.5):
        super().__init__()
        branch = SeparableConvNormReLU if separable else ConvNormReLU
        self.convs = nn.ModuleList([ConvNormReLU(in_channels, out_channels, 1),
                                    *(branch(in_channels, out_channels, dilation=rate) for rate in rates),
                                    PooledBranch(in_channels, out_channels)])
        self.project = ConvNormReLU(len(self.convs) * out_channels, out_channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.project(torch.cat([branch(x) for branch in self.convs], dim=1)))


class PooledBranch(nn.Sequential):
    """The mean over the picture through a 1x1 convolution, the same at every position.

    In training a batch of one picture has one value a channel here, and no variance: the running statistics normalise it (torchvision
    and segmentation_models.pytorch raise an error).
    """

    def __init__(self, in_channels, out_channels):
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        super().__init__(nn.AdaptiveAvgPool2d(1), conv, nn.BatchNorm2d(out_channels), nn.ReLU())

    def forward(self, x):
        pool, conv, norm, _ = self
        return conv_norm(pool(x), conv, norm, relu=True).expand(-1, -1, *x.shape[-2:])
