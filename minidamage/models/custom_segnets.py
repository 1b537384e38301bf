"""CustomSegNet1, 2 and 3 of the car-damage segmentation project, section 6.2.1: small encoder-decoders after SegNet (Badrinarayanan
et al. 2017, arXiv:1511.00561).

    layer1, layer2, layer3   convolutions, then half the size by maximum
    layer4, layer5, layer6   twice the size (bilinear, corner to corner), then convolutions; the last one gives the logits

    1    3x3 where nothing stands: 7x7 3-64, 5x5 64-128 | 5x5 128-256, 256-512, 512-512 | 512-1024, 1024-1024, 1024-1024
         5x5 1024-512, 5x5 512-256, 7x7 256-128 | 7x7 128-64, 9x9 64-32, 11x11 32-16 | 11x11 16-8, 13x13 8-C
    2    3-64 | 64-128 | 128-256            256-128 | 128-64 | 64-C
    3    as 2, with a second convolution in each of the first three layers

Every convolution has a bias, batch normalisation and ReLU, but the last, which has the bias alone. The layers of the first network are
from the project's program; its document gives those of the others.
Differs from the project: the output is logits. Theirs ends in a softmax that their cross-entropy applies once more.

The hyper-parameter sets A, B and C are in fcn.py. Which one these networks were trained with is not stated; we use A, the one that the
document prefers, for 8 epochs as in figure 14.

Read first: layers/segmenter.py. Read next: custom_unets.py.
"""
import dataclasses

import torch
from torch import nn

from minidamage.layers.conv_blocks import init_decoder
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, logit_channels
from minidamage.models import fcn

NO_BODY = "none"


@dataclasses.dataclass(frozen=True)
class CustomConfig(SegmenterConfig):
    """The project's: pictures of 240 x 240, plain cross-entropy. With one class that is the binary one."""

    body: str = NO_BODY                             # the encoder is the network's own
    image_size: int = 240
    dice_weight: float = 0.0
    multiclass_dice_weight: float = 0.0
    class_weights: str = "none"


RECIPE = dataclasses.replace(fcn.SET_A, epochs=8)

# For the drawn demo pictures on two CPU cores: small pictures, smaller ones for the first network: its 13x13 convolutions are slow.
DEMO = {"config": dict(image_size=96), "recipe": fcn.DEMO["recipe"]}
DEMO_SEGNET1 = {**DEMO, "config": dict(image_size=48)}


class CustomSegNet(Segmenter):
    """What the three share; each says its `down` and `up` convolutions: for each layer a list of (out_channels, kernel_size).

    num_classes: classes + 1, label 0 is background. config: CustomConfig. Runs in channels_last.
    """

    stride = 8
    down, up, last_kernel_size = (), (), 3

    def __init__(self, num_classes, config=CustomConfig(), name="custom_segnet"):
        super().__init__(num_classes, config, name)
        layers, channels = [], 3
        for convolutions in self.down:
            layers.append(nn.Sequential(*conv_norm_relus(channels, convolutions), nn.MaxPool2d(2)))
            channels = convolutions[-1][0]
        for convolutions in self.up:
            layers.append(nn.Sequential(double(), *conv_norm_relus(channels, convolutions)))
            channels = convolutions[-1][0] if convolutions else channels
        last = nn.Conv2d(channels, logit_channels(num_classes), self.last_kernel_size, padding=self.last_kernel_size // 2)
        layers[-1].append(last)
        self.layer1, self.layer2, self.layer3, self.layer4, self.layer5, self.layer6 = layers
        init_decoder(self)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        check_no_body(self, config)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 8. Returns [N, C, H, W]."""
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.layer6(self.layer5(self.layer4(x)))


class CustomSegNet1(CustomSegNet):
    down = ([(64, 7), (128, 5)], [(256, 5), (512, 3), (512, 3)], [(1024, 3), (1024, 3), (1024, 3)])
    up = ([(512, 5), (256, 5), (128, 7)], [(64, 7), (32, 9), (16, 11)], [(8, 11)])
    last_kernel_size = 13


class CustomSegNet2(CustomSegNet):
    down = ([(64, 3)], [(128, 3)], [(256, 3)])
    up = ([(128, 3)], [(64, 3)], [])


class CustomSegNet3(CustomSegNet2):
    down = ([(64, 3), (64, 3)], [(128, 3), (128, 3)], [(256, 3), (256, 3)])


def conv_norm_relus(in_channels, convolutions):
    """The modules of a row of convolutions (out_channels, kernel_size), each with batch normalisation and ReLU; the size stays."""
    modules = []
    for out_channels, kernel_size in convolutions:
        modules += [nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2), nn.BatchNorm2d(out_channels),
                    nn.ReLU(inplace=True)]
        in_channels = out_channels
    return modules


def double():
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


def check_no_body(model, config):
    if config.body != NO_BODY:
        raise ValueError(f"body: expected {NO_BODY}, got {config.body!r}: {type(model).__name__} has an encoder of its own; "
                         "leave the field out")
