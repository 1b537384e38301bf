"""Feature pyramid network (Lin et al. 2017, arXiv:1612.03144), with torchvision's parameter names.

    sum_l = Conv1x1(c_l) + Upsample(sum_{l+1}),   p_l = Conv3x3(sum_l),   p6 = p5 at every second position (for the RPN)

Read first: resnet.py. Read next: anchors.py.
"""
from torch import nn
from torch.nn import functional as F


class FeaturePyramidNetwork(nn.Module):
    """in_channels: channels of the body's maps, finest first. out_channels: of every map that comes out.

    extra_level: also return the sub-sampled coarsest map (torchvision's "pool", the paper's P6). upsample: "nearest" | "bilinear".
    """

    def __init__(self, in_channels, out_channels, extra_level=True, upsample="nearest"):
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(c, out_channels, 1)) for c in in_channels)
        self.layer_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(out_channels, out_channels, 3, padding=1)) for _ in in_channels)
        self.extra_level = extra_level
        self.upsample = upsample
        self.out_channels = out_channels
        for blocks in (self.inner_blocks, self.layer_blocks):
            for block in blocks:
                nn.init.kaiming_uniform_(block[0].weight, a=1)
                nn.init.zeros_(block[0].bias)

    def laterals(self, features):
        """The 1x1 convolutions: [c_l] -> [lateral_l], all of `out_channels` channels. A model with more to say here overrides it."""
        return [block(feature) for block, feature in zip(self.inner_blocks, features)]

    def forward(self, features):
        """features: list of [N, C_l, H_l, W_l], finest first. Returns a list of [N, out_channels, H_l, W_l], p2 first."""
        laterals = self.laterals(features)
        merged = laterals[-1]
        pyramid = [self.layer_blocks[-1](merged)]
        for lateral, block in zip(laterals[-2::-1], list(self.layer_blocks)[-2::-1]):
            merged = lateral + F.interpolate(merged, size=lateral.shape[-2:], mode=self.upsample)
            pyramid.insert(0, block(merged))
        if self.extra_level:
            pyramid.append(pyramid[-1][:, :, ::2, ::2])
        return pyramid


class Backbone(nn.Module):
    """body, then pyramid: [N, 3, H, W] -> list of feature maps, finest first.

    strides: pixels of the picture a step on each map.
    """

    def __init__(self, body, fpn, strides):
        super().__init__()
        self.body = body
        self.fpn = fpn
        self.strides = tuple(strides)
        self.out_channels = fpn.out_channels

    def forward(self, x):
        return self.fpn(self.body(x))
