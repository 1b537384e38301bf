"""U-Net++ (Zhou et al. 2018, arXiv:1807.10165): a U-Net whose skips are filled with nodes, each fed by all before it of its size.

    c5    c4    c3    c2    c1    -           a column a size, from stride 32 to the picture's own
      x_0_0 x_1_1 x_2_2 x_3_3                 node = UpBlock(the map left of it, [nodes of its size so far..., the encoder's map])
         x_0_1 x_1_2 x_2_3
            x_0_2 x_1_3
               x_0_3
                  x_0_4                       the last step has no encoder map
    logits = Conv3x3(x_0_4)

Names, widths and the order within the concatenations are those of segmentation_models.pytorch's UnetPlusPlus. Differs from Zhou et
al.: no deep supervision, as in the Context-CrackNet paper's baseline.

Read first: unet.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.conv_blocks import SegmentationHead, UpBlock, init_decoder
from minidamage.layers.resnet import ResNet
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import context_cracknet
from minidamage.models.unet import check_decoder_channels


@dataclasses.dataclass(frozen=True)
class UnetPlusPlusConfig(SegmenterConfig):
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32, 16)      # of x_0_0 .. x_0_4; segmentation_models.pytorch


RECIPE = context_cracknet.RECIPE                    # the paper trains its baselines as its own model

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {"config": dict(body="resnet18", image_size=160, decoder_channels=(128, 64, 32, 16, 16)),
        "recipe": context_cracknet.DEMO["recipe"]}


class UnetPlusPlus(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: UnetPlusPlusConfig. Runs in channels_last."""

    def __init__(self, num_classes, config=UnetPlusPlusConfig(), name="unetplusplus"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body)
        self.decoder = UnetPlusPlusDecoder(self.encoder.map_channels, config.decoder_channels)
        self.segmentation_head = SegmentationHead(config.decoder_channels[-1], logit_channels(num_classes))
        init_decoder(self.decoder, self.segmentation_head)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_decoder_channels(config)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 32. Returns [N, C, H, W]."""
        return self.segmentation_head(self.decoder(self.encoder.maps(x)))


class UnetPlusPlusDecoder(nn.Module):
    """[c1..c5] -> [N, out_channels[-1], H, W]. Node x_r_s: s is its column (0 makes stride 16 from 32), r its start; r = s stands
    beside the encoder, r = 0 is the U-Net's own decoder and has its width, all others have their skip's."""

    def __init__(self, encoder_channels, out_channels):
        super().__init__()
        c1, c2, c3, c4, c5 = encoder_channels
        self.blocks = nn.ModuleDict()
        skips = (c4, c3, c2, c1)
        for s, skip in enumerate(skips):
            for r in range(s + 1):
                if r == s:
                    below = (c5, c4, c3, c2)[s]
                else:
                    below = out_channels[s - 1] if r == 0 else skips[s - 1]
                beside = skip * (s - r + 1)                           # nodes x_{r+1}_s .. x_s_s, and the encoder's map
                self.blocks[f"x_{r}_{s}"] = UpBlock(below, beside, out_channels[s] if r == 0 else skip)
        self.blocks["x_0_4"] = UpBlock(out_channels[3], 0, out_channels[4])

    def forward(self, maps):
        encoder = maps[::-1]                                          # c5, c4, c3, c2, c1
        column = []                                                   # x_0_s .. x_s_s
        for s in range(4):
            below, beside, column = [*column, encoder[s]], [encoder[s + 1]], []
            for r in range(s, -1, -1):
                node = self.blocks[f"x_{r}_{s}"](below[r], torch.cat(beside, dim=1))
                column.insert(0, node)
                beside.insert(0, node)
        return self.blocks["x_0_4"](column[0])
