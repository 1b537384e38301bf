"""CustomUNet and CustomUNet2 of the car-damage segmentation project, section 6.2 (its second part, printed as "6.1.2"):
a U-Net of three steps, without and with skips.

    encoder1, 2, 3        two Conv-BN-ReLU, then half the size by maximum:   3-64-64, 64-128-128, 128-256-256
    bottleneck            two Conv-BN-ReLU:                                  256-512-512
    decoder3, 2, 1        two Conv-BN-ReLU, then twice the size:             512-256-256, 256-128-128, 128-64-64
    final_conv            1x1, to the logits

CustomUNet2 puts beside each decoder's input the encoder's output of the same size, which is the *pooled* one (512 + 256, 256 + 128,
128 + 64 channels in), and drops whole channels of the bottleneck (0.5) in training. Differs from U-Net (Ronneberger et al. 2015), as the
project does: no skip has the picture's own size.

The hyper-parameter sets A, B and C are in fcn.py. Which one these networks were trained with is not stated; we use A, the one that the
document prefers, for 10 epochs as in figure 18.

Read first: custom_segnets.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.conv_blocks import init_decoder
from minidamage.layers.segmenter import Segmenter, logit_channels
from minidamage.models import fcn
from minidamage.models.custom_segnets import CustomConfig, check_no_body, conv_norm_relus, double

RECIPE = dataclasses.replace(fcn.SET_A, epochs=10)

# For the drawn demo pictures on two CPU cores: small pictures.
DEMO = {"config": dict(image_size=96), "recipe": fcn.DEMO["recipe"]}


@dataclasses.dataclass(frozen=True)
class CustomUNet2Config(CustomConfig):
    dropout: float = 0.5                            # of whole channels of the bottleneck; the project's program


class CustomUNet(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: CustomConfig. Runs in channels_last."""

    stride = 8
    skips = False

    def __init__(self, num_classes, config=CustomConfig(), name="custom_unet"):
        super().__init__(num_classes, config, name)
        skip1, skip2, skip3 = (64, 128, 256) if self.skips else (0, 0, 0)
        self.encoder1 = nn.Sequential(*two_convolutions(3, 64), nn.MaxPool2d(2))
        self.encoder2 = nn.Sequential(*two_convolutions(64, 128), nn.MaxPool2d(2))
        self.encoder3 = nn.Sequential(*two_convolutions(128, 256), nn.MaxPool2d(2))
        self.bottleneck = nn.Sequential(*two_convolutions(256, 512))
        self.decoder3 = nn.Sequential(*two_convolutions(512 + skip3, 256), double())
        self.decoder2 = nn.Sequential(*two_convolutions(256 + skip2, 128), double())
        self.decoder1 = nn.Sequential(*two_convolutions(128 + skip1, 64), double())
        self.final_conv = nn.Conv2d(64, logit_channels(num_classes), 1)
        init_decoder(self)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_no_body(self, config)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 8. Returns [N, C, H, W]."""
        x = self.bottleneck(self.encoder3(self.encoder2(self.encoder1(x))))
        return self.final_conv(self.decoder1(self.decoder2(self.decoder3(x))))


class CustomUNet2(CustomUNet):
    """CustomUNet with skips. config: CustomUNet2Config."""

    skips = True

    def __init__(self, num_classes, config=CustomUNet2Config(), name="custom_unet2"):
        super().__init__(num_classes, config, name)
        self.dropout = nn.Dropout2d(config.dropout)

    def check_config(self, config):
        super().check_config(config)
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout: expected from 0 to below 1, got {config.dropout}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 8. Returns [N, C, H, W]."""
        encoded1 = self.encoder1(x)                                   # [N, 64, H / 2, W / 2]
        encoded2 = self.encoder2(encoded1)                            # [N, 128, H / 4, W / 4]
        encoded3 = self.encoder3(encoded2)                            # [N, 256, H / 8, W / 8]
        x = self.dropout(self.bottleneck(encoded3))
        x = self.decoder3(torch.cat([x, encoded3], dim=1))
        x = self.decoder2(torch.cat([x, encoded2], dim=1))
        return self.final_conv(self.decoder1(torch.cat([x, encoded1], dim=1)))


def two_convolutions(in_channels, out_channels):
    return conv_norm_relus(in_channels, [(out_channels, 3), (out_channels, 3)])
