"""PSPNet (Zhao et al. 2017, arXiv:1612.01105): the map beside its own means over 1, 4, 9 and 36 regions of the picture.

    c3     = ResNet(picture) up to layer2, stride 8
    q_s    = bilinear(ReLU(BN(Conv1x1(mean of c3 over s x s regions)))),  s = 1, 2, 3, 6
    logits = bilinear(Conv3x3(ReLU(BN(Conv1x1([q_1, q_2, q_3, q_6, c3]))))), from stride 8

Parameter names and widths are those of segmentation_models.pytorch's PSPNet, the baseline of the Context-CrackNet paper. Differs from
Zhao et al.: the body ends at layer2 (theirs is dilated and runs whole). layer3 and layer4 exist, as in the published files and the
paper's 24 M parameters, but are neither run nor trained. q_1 has a bias and no norm: one value a channel has no variance.

Read first: layers/segmenter.py, layers/conv_blocks.py.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from minidamage.layers.conv_blocks import ConvNormReLU, SegmentationHead, init_decoder
from minidamage.layers.resnet import ResNet
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet


@dataclasses.dataclass(frozen=True)
class PSPNetConfig(SegmenterConfig):
    decoder_channels: int = 512                     # segmentation_models.pytorch
    pool_sizes: tuple[int, ...] = (1, 2, 3, 6)      # section 3.2
    dropout: float = 0.2                            # of whole channels, before the head; segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160, decoder_channels=128), "recipe": context_cracknet.DEMO["recipe"]}


class PSPNet(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: PSPNetConfig. Runs in channels_last."""

    stride = 8

    def __init__(self, num_classes, config=PSPNetConfig(), name="pspnet"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body)
        self.encoder.layer3.requires_grad_(False)                     # not run: an optimiser or DDP would wait for its gradients
        self.encoder.layer4.requires_grad_(False)
        self.decoder = PSPDecoder(self.encoder.out_channels[1], config)
        self.segmentation_head = SegmentationHead(config.decoder_channels, logit_channels(num_classes), upsampling=8)
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        if config.decoder_channels < 1:
            raise ValueError(f"decoder_channels: expected 1 or more, got {config.decoder_channels}")
        if not config.pool_sizes or min(config.pool_sizes) < 1:
            raise ValueError(f"pool_sizes: expected one or more numbers above 0, such as 1,2,3,6, got {config.pool_sizes}")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout: expected from 0 to below 1, got {config.dropout}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 8. Returns [N, C, H, W]."""
        c3 = self.encoder.maps(x, levels=3)[-1]
        return self.segmentation_head(self.decoder(c3))


class PSPDecoder(nn.Module):
    """c3 [N, C3, H / 8, W / 8] -> [N, decoder_channels, H / 8, W / 8]."""

    def __init__(self, in_channels, config):
        super().__init__()
        self.psp = PyramidPooling(in_channels, config.pool_sizes)
        self.conv = ConvNormReLU(self.psp.out_channels, config.decoder_channels, 1)
        self.dropout = nn.Dropout2d(config.dropout)

    def forward(self, c3):
        return self.dropout(self.conv(self.psp(c3)))


class PyramidPooling(nn.Module):
    """[N, C, H, W] -> [N, C + len(sizes) * (C // len(sizes)), H, W]: the map behind its means over s x s regions."""

    def __init__(self, channels, sizes):
        super().__init__()
        width = channels // len(sizes)
        self.blocks = nn.ModuleList(PooledRegions(channels, width, size) for size in sizes)
        self.out_channels = channels + width * len(sizes)

    def forward(self, x):
        return torch.cat([*(block(x) for block in self.blocks), x], dim=1)


class RegionMeans(nn.AdaptiveAvgPool2d):
    """[N, C, H, W] -> [N, C, size, size]. In deterministic mode as two products: a GPU's gradient of the framework's own adds up in any
    order, and is refused there."""

    def forward(self, x):
        if self.output_size == 1 or not torch.are_deterministic_algorithms_enabled():
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):            # sums in float32, as the framework's own
            rows, columns = (shares_of_regions(side, self.output_size, x.device) for side in x.shape[-2:])
            return (rows @ x.float() @ columns.T).to(x.dtype)


def shares_of_regions(side, regions, device):
    """float32 [regions, side], every row's sum 1: which cells AdaptiveAvgPool2d averages, those that touch the region's share of the
    side."""
    region, cell = torch.arange(regions, device=device)[:, None], torch.arange(side, device=device)
    inside = (cell >= region * side // regions) & (cell * regions < (region + 1) * side)
    return inside / inside.sum(1, keepdim=True)


class PooledRegions(nn.Module):
    def __init__(self, in_channels, out_channels, size):
        super().__init__()
        conv = ConvNormReLU(in_channels, out_channels, 1)
        if size == 1:
            conv = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1), nn.ReLU())
        self.pool = nn.Sequential(RegionMeans(size), conv)

    def forward(self, x):
        return F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=True)
