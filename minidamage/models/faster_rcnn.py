"""Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) with a feature pyramid (Lin et al. 2017): classes and boxes, no masks. Parameter
names are torchvision's, so its weights load.

    pictures -> resize, normalise, batch          layers/detector.py
             -> c2..c5                            layers/resnet.py
             -> p2..p6                            layers/fpn.py
             -> proposals                         layers/rpn.py
             -> boxes, classes                    layers/roi_heads.py
             -> the pictures' own pixels          layers/detector.py

Training: model(images, targets) -> dict of losses. Evaluation: model(images) -> list of dicts boxes, labels, scores.

Read first: layers/, in the order above. Read next: mask_rcnn.py, which adds the mask branch; danet.py.
"""
import dataclasses
import math
import re

import torch
from torch import nn

from minidamage.config import Recipe
from minidamage.layers.anchors import AnchorGenerator
from minidamage.layers.detector import (IMAGE_MEAN, IMAGE_STD, GeneralizedRCNNTransform, check_images, check_targets, refill_statistics,
                                        resize_boxes, to_original)
from minidamage.layers.fpn import Backbone, FeaturePyramidNetwork
from minidamage.layers.losses import BOX_LOSSES, CLASS_LOSSES
from minidamage.layers.resnet import ResNet
from minidamage.layers.roi_heads import FastRCNNPredictor, MultiScaleRoIAlign, RoIHeads, TwoMLPHead
from minidamage.layers.rpn import RegionProposalNetwork, RPNHead


@dataclasses.dataclass(frozen=True)
class FasterRCNNConfig:
    """The architecture; travels in the checkpoint. "torchvision": the value of its published weights. "study": of the Mask R-CNN study
    on COCO, which mask_rcnn.py follows."""

    # body and pyramid
    body: str = "resnet50"                          # study: resnet50 and resnet101; resnet18 and resnet34 for small machines
    norm: str = "frozen"                            # torchvision; study: "batch", nothing frozen. From scratch: batch or group
    norm_eps: float = 1e-5                          # beside the body's running variances; torchvision's published COCO detectors: 0
    frozen_stages: int = 0                          # study: whole body fine-tuned; torchvision freezes 2 (stem, layer1)
    fpn: bool = True                                # False: no pyramid, one map of stride 16 (see build_backbone)
    fpn_channels: int = 256                         # torchvision
    # picture
    min_size: int = 800                             # pixels of the shorter side; torchvision
    max_size: int = 1333                            # pixels of the longer side at most; torchvision
    image_mean: tuple[float, ...] = IMAGE_MEAN      # of ImageNet, RGB in 0..1; study: "normalisation"
    image_std: tuple[float, ...] = IMAGE_STD
    # anchors: one size a level (all sizes on the one map without a pyramid)
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)     # side in pixels; torchvision
    anchor_scales: tuple[float, ...] = (1.0,)       # sizes a level, times anchor_sizes; study: 9 anchors = three scales x three ratios
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)          # height / width
    # region proposals
    rpn_channels: int = 256                         # torchvision; study: 512 filters
    rpn_pre_nms_top_n_train: int = 2000             # a level; torchvision, here and below
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 2000            # a picture
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_thresh: float = 0.0
    min_proposals: int = 0                          # study: 15, better 30; NMS then leaves at least as many (0: as it comes)
    proposals: str = "rpn+gt"                       # candidates in training: rpn+gt (torchvision) | rpn | gt (study, section 2.2)
    # box stage
    box_pool_size: int = 7                          # study
    box_head_channels: int = 1024                   # study: two layers of 1024
    box_score_thresh: float = 0.05                  # torchvision, here and below
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_fg_iou_thresh: float = 0.5
    box_bg_iou_thresh: float = 0.5
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25
    bbox_reg_weights: tuple[float, ...] = (10.0, 10.0, 5.0, 5.0)
    # RoIAlign
    sampling_ratio: int = 2                         # study
    canonical_scale: int = 224                      # a box of this side, in pixels, belongs to level 4 (Lin et al. 2017)
    # losses of the box stage, layers/losses.py; study: the first of each, or sigmoid_focal and iou
    class_loss: str = "cross_entropy"               # | sigmoid_focal | softmax_focal
    focal_alpha: float = 0.25                       # Lin et al. 2017; the study states no values, here and below
    focal_gamma: float = 2.0
    box_loss: str = "smooth_l1"                     # | iou | giou | diou | ciou
    loss_weight_cls: float = 1.0
    loss_weight_reg: float = 1.0


# torchvision's detection reference: 26 epochs, SGD 0.02 for 16 pictures, rate / 10 at 16 and 22, flips.
RECIPE = Recipe(epochs=26, batch_size=16, optimizer="sgd", lr=0.02, lr_batch_size=16, momentum=0.9, weight_decay=1e-4, schedule="step",
                milestones=(16, 22), gamma=0.1, warmup_iters=1000, hflip=0.5, select_by="bbox/AP")

# For the drawn demo pictures on two CPU cores: everything small, trained from scratch in minutes.
DEMO = {
    "config": dict(body="resnet18", norm="batch", min_size=192, max_size=256, fpn_channels=64, rpn_channels=64,
                   anchor_sizes=(16, 32, 64, 128, 256), canonical_scale=112,
                   rpn_pre_nms_top_n_train=200, rpn_pre_nms_top_n_test=200, rpn_post_nms_top_n_train=200, rpn_post_nms_top_n_test=100,
                   rpn_batch_size_per_image=128, box_head_channels=256, box_batch_size_per_image=64, box_detections_per_img=20),
    "recipe": dict(epochs=10, batch_size=4, optimizer="adamw", lr=1e-3, lr_batch_size=0, weight_decay=1e-4, schedule="cosine",
                   warmup_iters=50, clip_grad_norm=5.0, hflip=0.5, rotate=0.0, brightness=0.1, contrast=0.0, saturation=0.0),
}


class FasterRCNN(nn.Module):
    """The detector. num_classes: classes + 1, label 0 is background. config: FasterRCNNConfig. Runs in channels_last."""

    task = "detection"
    iou_types = ("bbox",)                           # what it is scored by
    finish_fields = ()                              # config fields that are read after the network: they may change once it is trained

    def __init__(self, num_classes, config=FasterRCNNConfig(), name="fasterrcnn_resnet50_fpn"):
        super().__init__()
        self.check_config(config)
        self.name = name
        self.num_classes = num_classes
        self.config = config
        self.transform = GeneralizedRCNNTransform(config.min_size, config.max_size, config.image_mean, config.image_std)
        self.backbone = self.build_backbone(config)
        for norm in (module for module in self.backbone.body.modules() if hasattr(module, "running_var")):
            norm.eps = config.norm_eps
        self.rpn = self.build_rpn(config)
        self.roi_heads = self.build_roi_heads(config, self.backbone.strides, num_classes)
        self.to(memory_format=torch.channels_last)
        self.is_made_on_meta = self.transform.image_mean.is_meta
        self.register_load_state_dict_post_hook(refill_statistics)

    def check_config(self, config):
        """ValueError for a value that the model cannot have; a model with fields of its own adds their checks."""
        check_config(config)

    @staticmethod
    def anchor_strides(config):
        """Pixels between the anchors of each entry of config.anchor_sizes: one a level, p2..p6, or all on the one map."""
        return (4, 8, 16, 32, 64) if config.fpn else 16

    def build_backbone(self, config):
        """The body and its pyramid: c2..c5 -> p2..p6. Without a pyramid (`fpn=False`): c4 (stride 16, layer4 left out, as in the
        C4 network of He et al.) through the same 1x1 and 3x3 convolutions, so that the heads are those of the full model."""
        body = self.build_body(config)
        if config.fpn:
            return Backbone(body, self.build_fpn(config, body.out_channels, (2, 3, 4, 5), extra_level=True), strides=(4, 8, 16, 32))
        return LastMapBackbone(body, self.build_fpn(config, body.out_channels[-1:], (4,), extra_level=False), strides=(16,))

    def build_body(self, config):
        return ResNet(config.body, config.norm, config.frozen_stages, with_layer4=config.fpn)

    def build_fpn(self, config, in_channels, levels, extra_level):
        """levels: the pyramid level of each of the body's maps that come in."""
        return FeaturePyramidNetwork(in_channels, config.fpn_channels, extra_level)

    def build_rpn(self, config):
        anchors = AnchorGenerator(anchor_sizes_of_levels(config), config.aspect_ratios)
        return RegionProposalNetwork(
            anchors, RPNHead(config.fpn_channels, anchors.num_anchors_per_location()[0], config.rpn_channels),
            config.rpn_fg_iou_thresh, config.rpn_bg_iou_thresh, config.rpn_batch_size_per_image, config.rpn_positive_fraction,
            {"training": config.rpn_pre_nms_top_n_train, "testing": config.rpn_pre_nms_top_n_test},
            {"training": config.rpn_post_nms_top_n_train, "testing": config.rpn_post_nms_top_n_test},
            config.rpn_nms_thresh, config.rpn_score_thresh, config.min_proposals)

    def build_roi_heads(self, config, strides, num_classes):
        return RoIHeads(
            self.build_roi_pool(config, strides, config.box_pool_size),
            TwoMLPHead(config.fpn_channels * config.box_pool_size ** 2, config.box_head_channels),
            FastRCNNPredictor(config.box_head_channels, num_classes),
            config.box_fg_iou_thresh, config.box_bg_iou_thresh, config.box_batch_size_per_image, config.box_positive_fraction,
            config.bbox_reg_weights, config.box_score_thresh, config.box_nms_thresh, config.box_detections_per_img,
            proposals=config.proposals, class_loss=config.class_loss, focal_alpha=config.focal_alpha, focal_gamma=config.focal_gamma,
            box_loss=config.box_loss)

    def build_roi_pool(self, config, strides, size):
        return MultiScaleRoIAlign(strides, (size, size), config.sampling_ratio, config.canonical_scale)

    def compile_static(self, backend):
        """Gives torch.compile what has shapes that follow from the pictures' sizes alone: all before the first box."""
        self.backbone.compile(backend=backend)
        self.rpn.head.compile(backend=backend)

    def forward(self, images, targets=None):
        """images: list of [3, H, W] uint8 or float in 0..1, sizes may differ.

        Training: targets, a list of dicts boxes [G, 4] float xyxy, labels [G] int64 1..K (G may be 0), with a mask branch also masks
        [G, H, W] uint8 (or rles, G RLE dicts), all in the pictures' own pixels; returns {"loss_classifier", "loss_box_reg",
        "loss_objectness", "loss_rpn_box_reg"} and, with a mask branch, "loss_mask".
        Evaluation: returns a list of dicts boxes [D, 4], labels [D], scores [D], with a mask branch also masks [D, 1, H, W] float,
        without gradients. Raises ValueError for pictures or targets that do not fit, naming the picture.
        """
        return self.losses(images, targets) if self.training else self.detect(images)

    def losses(self, images, targets, generator=None):
        """The training losses. generator: torch.Generator for the samplers; None takes one for each picture, seeded by its target's
        "seed" (what is drawn for a picture then hangs on nothing else), or the global one where there is none."""
        generator = generator or picture_generators(targets, self.transform.image_mean.device)
        batch, targets = self.prepare(images, targets)
        features = self.backbone(batch.tensors)
        return self.losses_of(features, batch, targets, generator)[0]

    @torch.no_grad()
    def loss_counts(self, images, targets):
        """What the losses of these pictures are divided by, {name: tensor}: body and RPN are run for the proposals. Running statistics
        stay as they are, the global random generator does not."""
        batch, targets = self.prepare(images, targets)
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d) and module.training]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        features = self.backbone(batch.tensors)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
        proposals, _ = self.rpn(features, batch.tensors.shape[-2:], batch.sizes)
        return {**self.rpn.loss_counts(features, batch.tensors.shape[-2:], targets), **self.roi_heads.loss_counts(proposals, targets)}

    def prepare(self, images, targets):
        """Checked and resized: (ImageBatch, targets in its pixels)."""
        check_images(images)
        targets = check_targets(images, targets, self.num_classes, masks=self.roi_heads.mask_head is not None)
        return self.transform(images, targets)

    def losses_of(self, features, batch, targets, generator):
        proposals, rpn_losses = self.rpn(features, batch.tensors.shape[-2:], batch.sizes, targets, generator)
        roi_losses = self.roi_heads.losses(features, proposals, targets, generator)
        return self.weigh({**roi_losses, **rpn_losses}), proposals

    def weigh(self, losses):
        """The RoI heads' losses times their weights; the region proposal network's keep weight 1."""
        return {name: loss * self.loss_weight(name) for name, loss in losses.items()}

    def loss_weight(self, name):
        return {"loss_classifier": self.config.loss_weight_cls, "loss_box_reg": self.config.loss_weight_reg}.get(name, 1.0)

    @torch.no_grad()
    def detect(self, images, mask_form="probability", stages=False):
        """As model(images) in evaluation, with the masks, where there is a mask branch, in another form: "probability" [D, 1, H, W]
        float, "bool" [D, H, W], "rle" (list of D COCO RLE dicts, the cheap one for many large pictures) or "raw" [D, 1, 28, 28].

        stages=True: returns (results, stages), stages a list of dicts for the strip of DamageNet's figure 6, see `stages_of`.
        """
        if self.training:
            raise ValueError("detect: expected the model in evaluation mode, got training; call model.eval() first")
        check_images(images)
        batch, _ = self.transform(images)
        features = self.backbone(batch.tensors)
        proposals, _ = self.rpn(features, batch.tensors.shape[-2:], batch.sizes)
        detections = self.roi_heads.detect(features, proposals, batch.sizes)
        results = self.finish(detections, batch, mask_form)
        return (results, self.stages_of(features, proposals, detections, batch)) if stages else results

    def finish(self, detections, batch, mask_form):
        """Detections in resized pixels -> a list of dicts in the pictures' own pixels."""
        return to_original(detections, batch, mask_form, threshold=None)

    @torch.no_grad()
    def losses_and_detections(self, images, targets, mask_form="rle", seed=0):
        """Validation in one pass: (dict of losses, list of detections), in evaluation mode. The samplers draw from `seed`, so the
        losses of two epochs are comparable and the training's random numbers are untouched."""
        if self.training:
            raise ValueError("losses_and_detections: expected the model in evaluation mode, got training; call model.eval() first")
        batch, targets = self.prepare(images, targets)
        features = self.backbone(batch.tensors)
        generator = torch.Generator(batch.tensors.device).manual_seed(seed)
        losses, proposals = self.losses_of(features, batch, targets, generator)
        detections = self.roi_heads.detect(features, proposals, batch.sizes)
        return losses, self.finish(detections, batch, mask_form)

    def stages_of(self, features, proposals, detections, batch):
        """What each stage made of each picture, a dict a picture:

        proposals [P, 4] (original pixels) and objectness [P], in the order of `Proposals`; features {"p2": [C, h, w], ...}, the pyramid
        cut to the picture; boxes [D, 4], labels [D], scores [D].
        """
        found = to_original(detections, batch, "raw", threshold=None)
        stages = []
        for i, (size, original_size) in enumerate(zip(batch.sizes, batch.original_sizes)):
            maps = {}
            for stride, feature in zip(self.backbone.strides, features):
                h, w = -(-size[0] // stride), -(-size[1] // stride)                    # rounded up: a border cell still sees the picture
                maps[f"p{stride.bit_length() - 1}"] = feature[i, :, :h, :w]
            valid = proposals.valid[i]
            stages.append({"proposals": resize_boxes(proposals.boxes[i][valid], size, original_size),
                           "objectness": proposals.scores[i][valid], "features": maps,
                           **{name: found[i][name] for name in ("boxes", "labels", "scores")}})
        return stages

    def load_state_dict(self, state_dict, strict=True, assign=False):
        """As in every module; names from before torchvision 0.13, which its published COCO weights still carry, are translated. (Those
        weights are used with norm_eps=0 there.)"""
        return super().load_state_dict({modern_name(key): value for key, value in state_dict.items()}, strict, assign)


def picture_generators(targets, device):
    """[a torch.Generator a picture], or None unless every target has a "seed"."""
    if not targets or not all("seed" in target for target in targets):
        return None
    return [torch.Generator(device).manual_seed(target["seed"]) for target in targets]


def modern_name(key):
    """backbone.fpn.inner_blocks.0.weight -> ...0.0.weight, rpn.head.conv.weight -> ...conv.0.0.weight, mask_fcn1.weight -> 0.0.weight."""
    key = re.sub(r"(fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
    key = re.sub(r"(rpn\.head\.conv)\.(weight|bias)$", r"\1.0.0.\2", key)
    return re.sub(r"mask_head\.mask_fcn(\d)\.", lambda match: f"mask_head.{int(match[1]) - 1}.0.", key)


class LastMapBackbone(Backbone):
    """Only the body's coarsest map goes on."""

    def forward(self, x):
        return self.fpn(self.body(x)[-1:])


SHARES = ("rpn_nms_thresh", "rpn_fg_iou_thresh", "rpn_bg_iou_thresh", "rpn_positive_fraction", "rpn_score_thresh", "box_score_thresh",
          "box_nms_thresh", "box_fg_iou_thresh", "box_bg_iou_thresh", "box_positive_fraction")
COUNTS = ("fpn_channels", "min_size", "max_size", "rpn_channels", "rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test",
          "rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test", "rpn_batch_size_per_image", "box_pool_size", "box_head_channels",
          "box_detections_per_img", "box_batch_size_per_image", "canonical_scale")
LISTS = {"anchor_sizes": None, "anchor_scales": None, "aspect_ratios": None, "bbox_reg_weights": 4, "image_std": 3}


def check_config(config):
    """ValueError for the first field whose value no detector can have; what depends on two fields is checked where it is used."""
    check_ranges(config, SHARES, COUNTS, LISTS)
    if config.max_size < config.min_size:
        raise ValueError(f"max_size: expected at least min_size = {config.min_size}, got {config.max_size}")
    if len(config.image_mean) != 3:
        raise ValueError(f"image_mean: expected 3 numbers, for red, green and blue, got {config.image_mean}")
    for field in ("norm_eps", "sampling_ratio", "min_proposals", "focal_gamma", "loss_weight_cls", "loss_weight_reg"):
        if not 0 <= getattr(config, field) < math.inf:
            raise ValueError(f"{field}: expected 0 or more, got {getattr(config, field)}")
    if not 0 < config.focal_alpha <= 1:
        raise ValueError(f"focal_alpha: expected above 0, at most 1, got {config.focal_alpha}")
    check_choice(config, class_loss=CLASS_LOSSES, box_loss=BOX_LOSSES)
    for stage in ("rpn", "box"):
        low, high = getattr(config, f"{stage}_bg_iou_thresh"), getattr(config, f"{stage}_fg_iou_thresh")
        if low > high:
            raise ValueError(f"{stage}_bg_iou_thresh: expected at most {stage}_fg_iou_thresh = {high}, got {low}")


def check_ranges(config, shares=(), counts=(), lists=None):
    """ValueError for the first field out of its range. shares: from 0 to 1; counts: 1 or more; lists: {field: length, None for any}."""
    for field in shares:
        if not 0 <= getattr(config, field) <= 1:
            raise ValueError(f"{field}: expected from 0 to 1, got {getattr(config, field)}")
    for field in counts:
        if getattr(config, field) < 1:
            raise ValueError(f"{field}: expected 1 or more, got {getattr(config, field)}")
    for field, length in (lists or {}).items():
        values = getattr(config, field)
        if len(values) != (length or len(values)) or not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"{field}: expected {length or 'one or more'} numbers above 0, such as "
                             f"{','.join(map(str, getattr(type(config), field)))}, got {','.join(map(str, values)) or 'none'}")


def check_choice(config, **known):
    """ValueError for the first field whose value is not one of those known."""
    for field, values in known.items():
        if getattr(config, field) not in values:
            raise ValueError(f"{field}: expected {', '.join(values[:-1])} or {values[-1]}, got {getattr(config, field)!r}")


def anchor_sizes_of_levels(config):
    """((sizes of p2), ..., (sizes of p6)), or ((all sizes),) without a pyramid."""
    if not config.fpn:
        return (tuple(size * scale for size in config.anchor_sizes for scale in config.anchor_scales),)
    if len(config.anchor_sizes) != 5:
        raise ValueError(f"anchor_sizes: expected five sizes, one for each of p2..p6, got {config.anchor_sizes}")
    return tuple(tuple(size * scale for scale in config.anchor_scales) for size in config.anchor_sizes)
