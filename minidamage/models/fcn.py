"""FCN (Long et al. 2015, arXiv:1411.4038) and DeepLabV3 (Chen et al. 2017, arXiv:1706.05587) as torchvision defines them: the two
published models of the car-damage segmentation project ("the project" below), which learns them from scratch.

    c5     = ResNet-50(picture), stride 8: the last two stages dilated
    FCN       logits = Conv1x1(ReLU(BN(Conv3x3(c5)))), a quarter of the width in between
    DeepLabV3 logits = Conv1x1(ReLU(BN(Conv3x3(ASPP(c5)))))                              layers/aspp.py
    each bilinear to the picture's size, whatever it is: no padding

The auxiliary head (torchvision's `aux_loss`, off in the project) reads c4 and is trained beside. Parameter names are torchvision's, so
its weights load. The project's recipes, three sets of hyper-parameters:

    A   batch 16, Adam 0.001                        RECIPE: what the project trains its best model with (FCN, section 6.1.2)
    B   batch 32, SGD 0.01, momentum 0.9            train.py ... --batch-size 32 --lr 0.01 --set optimizer=sgd
    C   batch 8, AdamW 0.001, weight decay 1e-4     train.py ... --batch-size 8 --set optimizer=adamw --set weight_decay=1e-4

Read first: layers/segmenter.py, layers/aspp.py. Read next: custom_segnets.py, custom_unets.py.
"""
import dataclasses
import types

import torch
from torch import nn
from torch.nn import functional as F

from minidamage.config import Recipe
from minidamage.layers.aspp import ASPP
from minidamage.layers.conv_blocks import init_decoder
from minidamage.layers.resnet import ResNet, conv_norm
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, crop, logit_channels


@dataclasses.dataclass(frozen=True)
class FCNConfig(SegmenterConfig):
    """The project's: pictures of 240 x 240, plain cross-entropy. With one class that is the binary one."""

    image_size: int = 240
    dice_weight: float = 0.0
    multiclass_dice_weight: float = 0.0
    class_weights: str = "none"
    aux: bool = False                               # the auxiliary head; torchvision's published weights were trained with it
    aux_weight: float = 0.5                         # of its losses; torchvision's training program


# Section 6.1, set A. Momentum of set B, set C and 240 x 240: the project's program. No augmentation and no schedule are mentioned. It
# writes Dice, IoU and accuracy of both parts after each epoch: here of as many training pictures as its validation part has, 68 (the
# document prints 68 under Test and 28 under Valid, and 5 % and 10 % above them; of 598 that is the other way round, and so taken).
SET_A = Recipe(epochs=10, batch_size=16, optimizer="adam", lr=1e-3, lr_batch_size=0, weight_decay=0.0, schedule="constant",
               warmup_iters=0, hflip=0.0, score_train=68)
SET_B = dataclasses.replace(SET_A, batch_size=32, optimizer="sgd", lr=0.01, momentum=0.9)
SET_C = dataclasses.replace(SET_A, batch_size=8, optimizer="adamw", lr=1e-3, weight_decay=1e-4)
RECIPE = SET_A

# For the drawn demo pictures on two CPU cores: a small body, small pictures.
DEMO = {
    "config": dict(body="resnet18", image_size=160),
    "recipe": dict(epochs=10, batch_size=4, lr=1e-3, schedule="cosine", warmup_iters=20, clip_grad_norm=5.0, hflip=0.5, score_train=0),
}


class FCN(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: FCNConfig. Runs in channels_last."""

    stride = 1                                                        # the logits are resized to the picture, as in torchvision
    smallest_side = 32

    def __init__(self, num_classes, config=FCNConfig(), name="fcn_resnet50"):
        super().__init__(num_classes, config, name)
        self.backbone = ResNet(config.body, output_stride=8)
        channels = logit_channels(num_classes)
        self.classifier = self.build_classifier(self.backbone.out_channels[3], channels, config)
        self.aux_classifier = FCNHead(self.backbone.out_channels[2], channels) if config.aux else None
        init_decoder(self.classifier, *([self.aux_classifier] if config.aux else []))
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        if not 0 <= config.aux_weight < float("inf"):
            raise ValueError(f"aux_weight: expected 0 or more, got {config.aux_weight}; aux=false leaves the head out")

    def build_classifier(self, in_channels, out_channels, config):
        return FCNHead(in_channels, out_channels)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, of any size. Returns [N, C, H, W]."""
        return resize(self.classifier(self.backbone(x)[-1]), x)

    def both_logits(self, x):
        """(logits, the auxiliary head's), both [N, C, H, W]."""
        _, _, c4, c5 = self.backbone(x)
        return resize(self.classifier(c5), x), resize(self.aux_classifier(c4), x)

    def compile_static(self, backend):
        super().compile_static(backend)
        self.both_logits = types.MethodType(torch.compile(type(self).both_logits, backend=backend), self)

    def losses(self, images, targets):
        """As every segmenter's; with an auxiliary head also its losses, "loss_aux_...", times aux_weight."""
        if self.aux_classifier is None:
            return super().losses(images, targets)
        batch, size = self.batch(images)
        label_maps = self.label_maps(targets, len(batch), size)
        logits, aux_logits = (crop(each, size) for each in self.both_logits(batch))
        aux_losses = self.losses_of(aux_logits, label_maps)
        return {**self.losses_of(logits, label_maps),
                **{name.replace("loss_", "loss_aux_"): self.config.aux_weight * loss for name, loss in aux_losses.items()}}


class FCNHead(nn.Sequential):
    """[N, in, h, w] -> [N, out, h, w]."""

    def __init__(self, in_channels, out_channels):
        width = in_channels // 4
        super().__init__(nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.1),
                         nn.Conv2d(width, out_channels, 1))

    def forward(self, x):
        conv, norm, _, dropout, last = self
        return last(dropout(conv_norm(x, conv, norm, relu=True)))


@dataclasses.dataclass(frozen=True)
class DeepLabV3ResNet50Config(FCNConfig):
    atrous_rates: tuple[int, ...] = (12, 24, 36)    # Chen et al., section 4.1


class DeepLabV3ResNet50(FCN):
    """FCN with atrous spatial pyramid pooling before the classifier."""

    def __init__(self, num_classes, config=DeepLabV3ResNet50Config(), name="deeplabv3_resnet50"):
        super().__init__(num_classes, config, name)

    def check_config(self, config):
        super().check_config(config)
        if not config.atrous_rates or min(config.atrous_rates) < 1:
            raise ValueError(f"atrous_rates: expected one or more numbers above 0, such as 12,24,36, got {config.atrous_rates}")

    def build_classifier(self, in_channels, out_channels, config):
        return DeepLabHead(in_channels, out_channels, config.atrous_rates)


DEMO_DEEPLABV3 = {**DEMO, "config": dict(DEMO["config"], atrous_rates=(3, 6, 9))}     # rates that fit maps of 20 x 20


class DeepLabHead(nn.Sequential):
    """[N, in, h, w] -> [N, out, h, w]."""

    def __init__(self, in_channels, out_channels, rates):
        super().__init__(ASPP(in_channels, 256, rates), nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256), nn.ReLU(),
                         nn.Conv2d(256, out_channels, 1))

    def forward(self, x):
        aspp, conv, norm, _, last = self
        return last(conv_norm(aspp(x), conv, norm, relu=True))


def resize(logits, x):
    """Logits at the size of x, bilinear, pixel centres aligned as in torchvision."""
    return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)
