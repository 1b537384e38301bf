"""Context-CrackNet (Kyem, Asamoah, Aboah, 2025): thin cracks, found with the whole picture in view.

    F0..F4            = ResNet-50(picture), strides 2..32                                             eq. 2
    F3'               = CAGM(F3): every position attends to 256 mixtures of all positions             eq. 3, 6-11
    D4                = F4;   U_l = transposed convolution(D_{l+1}), twice the size
    psi_l             = sigmoid(Conv1x1(ReLU(Conv1x1(U_l) + Conv1x1(F_l))))                           eq. 12-14
    D_l               = two Conv-BN-ReLU of [psi_l * F_l, U_l],   l = 3, 2, 1, 0                      eq. 15-17
    logits            = bilinear(Conv1x1(D_0)), from half the picture's size

Differs from the paper, where it cannot be built as printed (each as in the authors' released code):
- Algorithm 1 starts the decoder from CAGM(F3), whose size and channels do not fit, and leaves F4 unused. D4 is F4, and CAGM(F3)
  takes the place of F3 beside it.
- Eq. 8 writes K E; the sizes fit E^T K alone. Algorithm 2 concatenates [A, X]; we follow eq. 10 and 11, which do not.
- Section 3.3 has one head and no more; here CAGM is a transformer block: eight heads, residuals, a feed-forward layer.

E and F have a row for each position of F3, which ties them to one picture size; for others they are interpolated over the picture.

Ablations (Table 6): --set rfem=false (plain concatenation), --set cagm=false (F3 itself).

Read first: layers/segmenter.py, ops/linear_attention.py. Read next: layers/segmentation_losses.py.
"""
import dataclasses
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from minidamage import ops
from minidamage.config import Recipe
from minidamage.layers.resnet import ResNet, conv_norm
from minidamage.layers.segmenter import Segmenter, SegmenterConfig, check_pictures, logit_channels

CAGM_STRIDE = 16                # of F3


@dataclasses.dataclass(frozen=True)
class ContextCrackNetConfig(SegmenterConfig):
    """The defaults give the paper's 82.05 M parameters. "released code": not in the paper, taken from the authors' program."""

    rfem: bool = True                               # gates on the skip connections; Table 6 switches them off
    cagm: bool = True                               # linear attention on F3; Table 6 switches it off
    sequence_size: int = 448                        # pixels: E and F have a row for each of (448 / 16)^2 positions; `--size` sets it too
    attention_rank: int = 256                       # k of eq. 8, columns of E and F; released code
    attention_heads: int = 8                        # released code
    feed_forward: int = 2048                        # width of the block's second half; released code
    dropout: float = 0.1                            # in the attention block; released code


# Section 4.2.1: AdamW, rate 1e-4, halved after 5 epochs without a better validation loss, weight decay 1e-5, batch 32, 1,000 epochs.
# Section 4.1: flips, turns by 90 degrees, shift-scale-rotate, Gaussian noise, jitter of brightness, contrast, saturation and hue. Their
# strengths and probabilities are not stated. Nor is the epoch that is kept: the one of the lowest validation loss, which the schedule
# watches too. It is a mean over pictures; the pooled IoU of a small validation part can hang on one of them (of DeepCrack's thirty, false
# pixels in IMG74.jpg outweighed all that five more epochs gained).
RECIPE = Recipe(epochs=1000, batch_size=32, optimizer="adamw", lr=1e-4, lr_batch_size=0, weight_decay=1e-5, schedule="plateau",
                plateau_patience=5, plateau_factor=0.5, warmup_iters=0, hflip=0.5, vflip=0.5, rot90=0.75,
                shift=0.0625, scale=0.1, rotate=45.0, shift_scale_rotate=0.5,
                noise=7.0, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1, select_by="loss")

# For the drawn demo pictures on two CPU cores: a small body, small pictures, minutes. Cars have an up and a down.
DEMO = {
    "config": dict(body="resnet18", image_size=160, sequence_size=160, attention_rank=32, attention_heads=4, feed_forward=512),
    "recipe": dict(epochs=10, batch_size=4, lr=1e-3, schedule="cosine", warmup_iters=20, clip_grad_norm=5.0, vflip=0.0, rot90=0.0,
                   shift=0.0, scale=0.0, rotate=0.0, noise=0.0, brightness=0.1, contrast=0.0, saturation=0.0, hue=0.0),
}


class ContextCrackNet(Segmenter):
    """The segmenter. num_classes: classes + 1, label 0 is background. config: ContextCrackNetConfig. Runs in channels_last."""

    def __init__(self, num_classes, config=ContextCrackNetConfig(), name="context_cracknet"):
        super().__init__(num_classes, config, name)
        self.encoder = ResNet(config.body, norm="batch")
        widths = self.encoder.map_channels                            # of F0..F4
        self.cagm = CAGM(widths[3], config) if config.cagm else None
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, skip, 2, stride=2) for skip, deep in zip(widths[:4], widths[1:]))       # l = 0..3
        self.rfem = nn.ModuleList(AttentionGate(skip, skip, skip // 2) for skip in widths[:4]) if config.rfem else None
        self.conv = nn.ModuleList(ConvBlock(2 * skip, skip) for skip in widths[:4])
        self.head = nn.Conv2d(widths[0], logit_channels(num_classes), 1)
        self.to(memory_format=torch.channels_last)

    def check_config(self, config):
        super().check_config(config)
        for field in ("attention_rank", "attention_heads", "feed_forward"):
            if getattr(config, field) < 1:
                raise ValueError(f"{field}: expected 1 or more, got {getattr(config, field)}")
        if config.sequence_size < self.stride or config.sequence_size % self.stride:
            raise ValueError(f"sequence_size: expected a multiple of {self.stride} pixels, got {config.sequence_size}; the size of the "
                             "training pictures, such as 448, rounded up")
        if not 0 <= config.dropout < 1:
            raise ValueError(f"dropout: expected from 0 to below 1, got {config.dropout}")

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, H and W multiples of 32. Returns [N, C, H, W]."""
        features = self.encoder.maps(x)                              # F0..F4, strides 2..32
        if self.cagm is not None:
            features[3] = self.cagm(features[3])
        return self.decode(features, x.shape[-2:])

    def decode(self, features, size, maps=None):
        """Logits of `size` (h, w) from [F0, ..., F4], which it empties: a map is freed once it has been read.

        maps: a dict that receives psi_l [N, 1, h, w] as "rfem3".. "rfem0", or None.
        """
        x = features.pop()
        for level in (3, 2, 1, 0):
            x, skip = self.up[level](x), features.pop()
            if self.rfem is not None:
                psi = self.rfem[level](x, skip)
                skip = psi * skip                                     # eq. 15
                if maps is not None:
                    maps[f"rfem{level}"] = psi
            x = self.conv[level](torch.cat([skip, x], dim=1))         # eq. 16, 17
        return F.interpolate(self.head(x), size=size, mode="bilinear", align_corners=False)

    @torch.no_grad()
    def attention_maps(self, images):
        """Where the network looked: a list, one a picture, of {"rfem3", "rfem2", "rfem1", "rfem0", "cagm": [h, w]}, float, h and w the
        picture's own. A module that is switched off has no map.

        rfem3 to rfem0: psi of eq. 14 (figure 8), the share of the encoder's features at strides 16, 8, 4, 2 that was let through, 0..1.
        cagm: how much each position enters the others, N times the mean of A F^T over heads and positions; F is no softmax, so it may
        be negative. images: as for `probabilities`, resized likewise; maps are interpolated bilinearly.
        """
        self.check_evaluating("attention_maps")
        check_pictures(images)
        results = []
        for image in images:
            batch, (h, w) = self.batch_at_model_size([image])
            maps, features = {}, self.encoder.maps(batch)
            if self.cagm is not None:
                maps["cagm"] = self.cagm.influence(features[3])
                features[3] = self.cagm(features[3])
            self.decode(features, batch.shape[-2:], maps)
            for name, values in maps.items():                         # to the batch, without its padding, to the picture
                values = F.interpolate(values.float(), size=batch.shape[-2:], mode="bilinear", align_corners=False)[:, :, :h, :w]
                maps[name] = F.interpolate(values, size=image.shape[-2:], mode="bilinear", align_corners=False)[0, 0]
            results.append(maps)
        return results


class AttentionGate(nn.Module):
    """RFEM's attention, eq. 12 to 14: what of the encoder's map passes, judged by the decoder's. BN: released code."""

    def __init__(self, decoder_channels, encoder_channels, channels):
        super().__init__()
        self.conv_g = nn.Conv2d(decoder_channels, channels, 1)
        self.bn_g = nn.BatchNorm2d(channels)
        self.conv_x = nn.Conv2d(encoder_channels, channels, 1)
        self.bn_x = nn.BatchNorm2d(channels)
        self.psi = nn.Conv2d(channels, 1, 1)

    def forward(self, decoded, encoded):
        """decoded: [N, C_d, H, W], up-sampled; encoded: [N, C_e, H, W]. Returns psi [N, 1, H, W] in 0..1."""
        G = conv_norm(decoded, self.conv_g, self.bn_g)
        X = conv_norm(encoded, self.conv_x, self.bn_x)
        return self.psi(G.add_(X).relu_()).sigmoid()


class ConvBlock(nn.Module):
    """Two Conv-BN-ReLU, gamma of eq. 17."""

    def __init__(self, in_channels, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        x = conv_norm(x, self.conv1, self.bn1, relu=True)
        return conv_norm(x, self.conv2, self.bn2, relu=True)


class CAGM(nn.Module):
    """The context-aware global module, eq. 6 to 11, in a pre-norm transformer block: attention, then feed-forward, each with a residual.

    x: [B, C, H, W] -> the same. Learned for N = (sequence_size / 16)^2 positions; other maps interpolate E and F, said once.
    Not stated: E and F start with variance 1 / N, so that the sums over the positions keep the size of what they add up.
    """

    def __init__(self, channels, config):
        super().__init__()
        if channels % config.attention_heads:
            raise ValueError(f"attention_heads: expected a divisor of {channels}, the channels of F3, got {config.attention_heads}")
        self.heads = config.attention_heads
        self.side = config.sequence_size // CAGM_STRIDE
        N = self.side ** 2
        self.norm1 = nn.LayerNorm(channels)
        self.query = nn.Linear(channels, channels)
        self.key = nn.Linear(channels, channels)
        self.value = nn.Linear(channels, channels)
        self.E = nn.Parameter(torch.randn(N, config.attention_rank) / N ** 0.5)
        self.F = nn.Parameter(torch.randn(N, config.attention_rank) / N ** 0.5)
        self.output = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.linear1 = nn.Linear(channels, config.feed_forward)
        self.linear2 = nn.Linear(config.feed_forward, channels)
        self.dropout = nn.Dropout(config.dropout)
        self.has_said = False

    def forward(self, x):
        B, C, H, W = x.shape
        X = x.flatten(2).transpose(1, 2)                              # eq. 6, [B, N, C]: channels_last memory as it lies
        E, F = self.projections(H, W)
        Z = ops.linear_attention(                                     # eq. 7 to 11
            self.norm1(X), self.query.weight, self.query.bias, self.key.weight, self.key.bias, self.value.weight, self.value.bias, E, F,
            self.heads, self.output.weight, self.output.bias)
        X = X + self.dropout(Z)
        X = X + self.dropout(self.linear2(self.dropout(self.linear1(self.norm2(X)).relu_())))
        return X.transpose(1, 2).view(B, C, H, W)

    def projections(self, H, W):
        """E, F [H * W, k] for a map of H x W positions: the learned ones, or these interpolated over the picture (bilinear, antialiased).

        Scaled by learned / actual positions: a sum over more positions stays what it was, and so does the softmax's temperature.
        """
        if (H, W) == (self.side, self.side):
            return self.E, self.F
        if not self.has_said:
            self.has_said = True
            learned = self.side * CAGM_STRIDE
            warnings.warn(f"Context-CrackNet: E and F were learned for pictures of {learned}x{learned} px; for {W * CAGM_STRIDE}x"
                          f"{H * CAGM_STRIDE} px, and other sizes, they are interpolated. Best is image_size={learned} (said once)")
        return interpolate_rows(self.E, self.side, H, W), interpolate_rows(self.F, self.side, H, W)

    @torch.no_grad()
    def influence(self, x):
        """[B, 1, H, W]: N times the mean of A F^T over heads and positions, the weight with which each position enters the others."""
        B, _, H, W = x.shape
        X, (E, F) = self.norm1(x.flatten(2).transpose(1, 2)), self.projections(H, W)
        A = ops.linear_attention_maps(X, self.query.weight, self.query.bias, self.key.weight, self.key.bias, E, self.heads)
        return (A.mean((1, 2)) @ F.mT * (H * W)).view(B, 1, H, W)     # A: [B, heads, N, k]


def interpolate_rows(projection, side, H, W):
    """projection: [side * side, k], a row a position -> [H * W, k], scaled so that the sum of the rows stays."""
    rows = projection.T.unflatten(1, (side, side))[None]              # [1, k, side, side]
    rows = F.interpolate(rows, size=(H, W), mode="bilinear", align_corners=False, antialias=True)
    return rows[0].flatten(1).T * (side * side / (H * W))
