"""DamageNet: Mask R-CNN whose feature pyramid sees wider context through parallel dilated convolutions, for damage on cars.

    D_r = Conv3x3_{rate d_r}(C)                                    eq. 9
    C~  = sum_r alpha_r D_r,  sum_r alpha_r = 1                    eq. 10
    p_l = Conv3x3(Conv1x1(c_l) + Upsample(p_{l+1}))                eq. 11
    L   = lambda_1 L_cls + lambda_2 L_reg + lambda_3 L_mask        eq. 13: config fields loss_weight_cls, _reg, _mask; values not stated
    mask = remove islands(fill holes(M > tau))                    section III.A, figures 6 and 7

Differs from the paper:
- The block stands on the 256-channel lateral Conv1x1(c_l), not on c_l itself: on c5's 2048 channels four 3x3 convolutions would
  hold 150 M parameters.
- Eq. 11, read literally, carries the map after its 3x3 convolution down the pyramid; we carry the sum before it, as torchvision
  and its weights do.
- The heads are Mask R-CNN's: two fully connected layers shared by class and box, K masks and 4 (K + 1) offsets a RoI, and a
  transposed convolution before the masks (the paper has one mask and four offsets a RoI and no upsampling).

Ablations (`--set`): context=false, fpn=false, fill_holes=false, remove_islands=false, mask_threshold=...
Its figures: 4, curves of both parts, `train.py --set score_train=64`; 5, photograph, truth and prediction, evaluate.py's worst pictures; 6,
stage by stage, `predict.py --explain`; 7, ablations side by side, `predict.py --beside RUN`.

Read first: mask_rcnn.py.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from minidamage import masks as rle_masks
from minidamage.config import Recipe
from minidamage.layers.fpn import FeaturePyramidNetwork
from minidamage.models import mask_rcnn


@dataclasses.dataclass(frozen=True)
class DamageNetConfig(mask_rcnn.MaskRCNNConfig):
    min_size: int = 1024                            # section III.C: 1024x1024 (we keep the aspect ratio of other pictures)
    max_size: int = 1024
    context: bool = True                            # the dilated context block; off is the paper's "without dilation"
    context_rates: tuple[int, ...] = (1, 2, 4, 8)   # d_r of eq. 9; not stated
    context_levels: tuple[int, ...] = (2, 3, 4, 5)  # the levels that get a block; not stated ("an intermediate feature map")
    context_groups: int = 1                         # 1: full convolutions, fpn_channels: depthwise (1/256 of the cost); not stated
    fill_holes: bool = True                         # post-processing: close holes in a mask
    remove_islands: bool = True                     # post-processing: drop small separate parts of a mask
    island_share: float = 0.1                       # ... smaller than this share of the mask's area; not stated


# Section IV: 280 epochs; section III.C: horizontal flip, rotation by up to 15 degrees, brightness. The optimiser, its rate and schedule and
# the batch are not stated: SGD as in Mask R-CNN. Nor are the probability of a flip and the strength of the brightness.
RECIPE = Recipe(epochs=280, batch_size=16, optimizer="sgd", lr=0.02, lr_batch_size=16, momentum=0.9, weight_decay=1e-4,
                schedule="step", milestones=(200, 250), gamma=0.1, warmup_iters=500, hflip=0.5, rotate=15.0, brightness=0.2)

DEMO = {"config": dict(mask_rcnn.DEMO["config"], context_rates=(1, 2, 4)), "recipe": dict(mask_rcnn.DEMO["recipe"])}


class DilatedContextBlock(nn.Module):
    """Eq. 9 and 10: R parallel 3x3 convolutions of different rates over one map, averaged with learned weights.

    alpha is the softmax of R learned logits, so it always sums to 1. No normalisation, activation, bias or residual, as printed.
    Not stated in the paper: the start. We start as the identity (rate 1 passes the map through, the others add a tenth of the
    usual random start), so that a pre-trained lateral is not destroyed at step 0.
    """

    def __init__(self, channels, rates=(1, 2, 4, 8), groups=1):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=groups, bias=False) for rate in rates)
        self.alpha_logits = nn.Parameter(torch.zeros(len(rates)))
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            with torch.no_grad():
                conv.weight.mul_(0.1)
        with torch.no_grad():
            first = self.convs[0].weight.zero_()                               # [C, C / groups, 3, 3]
            own_input = torch.arange(channels) % (channels // groups)
            first[torch.arange(channels), own_input, 1, 1] = len(rates)       # times alpha = 1 / R: the identity

    def alpha(self):
        """[R], sums to 1."""
        return self.alpha_logits.softmax(dim=0)

    def forward(self, x):
        """[N, C, H, W] -> the same shape. alpha multiplies the weights instead of the maps: the same, and cheaper."""
        fused = None
        for alpha, conv in zip(self.alpha().unbind(), self.convs):
            dilated = F.conv2d(x, conv.weight * alpha, None, 1, conv.padding, conv.dilation, conv.groups)
            fused = dilated if fused is None else fused.add_(dilated)
        return fused


class ContextPyramid(FeaturePyramidNetwork):
    """A feature pyramid with a context block on the laterals of some levels, before the top-down sum.

    levels: the pyramid level of each map that comes in; context_levels: those that get a block.
    """

    def __init__(self, in_channels, out_channels, extra_level, levels, context_levels, rates, groups):
        super().__init__(in_channels, out_channels, extra_level)
        self.context_blocks = nn.ModuleList(
            DilatedContextBlock(out_channels, rates, groups) if level in context_levels else nn.Identity() for level in levels)

    def laterals(self, features):
        return [block(lateral) for block, lateral in zip(self.context_blocks, super().laterals(features))]


class DamageNet(mask_rcnn.MaskRCNN):
    """Mask R-CNN with the context pyramid and repaired masks.

    The repair works on thresholded masks: detect(images, "bool") and "rle" have it; the probabilities of model(images) are before both.
    """

    finish_fields = ("mask_threshold", "fill_holes", "remove_islands", "island_share")

    def __init__(self, num_classes, config=DamageNetConfig(), name="damagenet"):
        super().__init__(num_classes, config, name)

    def check_config(self, config):
        super().check_config(config)
        if not 0 <= config.island_share <= 1:
            raise ValueError(f"island_share: expected from 0 to 1, a share of the mask's area, got {config.island_share}")

    def build_fpn(self, config, in_channels, levels, extra_level):
        if not config.context:
            return super().build_fpn(config, in_channels, levels, extra_level)
        check_context(config)
        return ContextPyramid(in_channels, config.fpn_channels, extra_level, levels, config.context_levels, config.context_rates,
                              config.context_groups)

    def refine_masks(self, rles):
        """Post-processing of thresholded masks: holes are filled, then separate parts below `island_share` of the mask dropped. Where all
        are below it, as the dashes of a broken scratch may be, none is an island of another, and all stay."""
        if self.config.fill_holes and rles:
            rles = rle_masks.fill_holes(rles)
        if self.config.remove_islands:
            without = [rle_masks.remove_islands(rle, self.config.island_share * rle_masks.area(rle)) for rle in rles]
            rles = [new if rle_masks.area(new) else rle for new, rle in zip(without, rles)]
        return rles


def check_context(config):
    if not config.context_rates or min(config.context_rates) < 1:
        raise ValueError(f"context_rates: expected one or more rates >= 1, got {config.context_rates}; context=false turns the block off")
    if not set(config.context_levels) <= {2, 3, 4, 5}:
        raise ValueError(f"context_levels: expected levels out of 2, 3, 4, 5, got {config.context_levels}")
    if config.context_groups < 1 or config.fpn_channels % config.context_groups:
        raise ValueError(f"context_groups: expected a divisor of fpn_channels = {config.fpn_channels}, got {config.context_groups}")
