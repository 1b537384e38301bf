"""Mask R-CNN (He et al. 2017, arXiv:1703.06870): Faster R-CNN with a mask branch, and the training recipe of the Mask R-CNN study on
COCO that this project compares with ("the study" below and in faster_rcnn.py). Parameter names are torchvision's, so its weights load.

The study as a whole, `StudyConfig` and RECIPE, and its other loss set (section 3.2):

    python train.py --model maskrcnn_study_resnet50 --data coco/ --pretrained resnet50.pth --amp fp16
    ... --set class_loss=sigmoid_focal --set box_loss=iou --set mask_loss=dice --set loss_weight_cls=4 --set loss_weight_reg=8

The two weights are ours: focal loss and IoU are several times smaller than what they replace. With --set score_train=64 some training
pictures are scored each epoch too, and curves.png has loss and AP of both parts (its Fig. 4: loss, and an accuracy that it does not
define). Not the study's, for large data: --set jitter_scale=0.1,2.0, --set multi_scale=640,672,704,736,768,800.

Training: model(images, targets) -> dict of losses. Evaluation: model(images) -> list of dicts boxes, labels, scores, masks.

Read first: faster_rcnn.py. Read next: damagenet.py.
"""
import dataclasses
import math

from minidamage.config import Recipe
from minidamage.layers.detector import to_original
from minidamage.layers.losses import MASK_LOSSES
from minidamage.layers.roi_heads import MaskRCNNHeads, MaskRCNNPredictor
from minidamage.models import faster_rcnn


@dataclasses.dataclass(frozen=True)
class MaskRCNNConfig(faster_rcnn.FasterRCNNConfig):
    # mask stage
    mask_pool_size: int = 14                        # masks come out at twice this size; torchvision
    mask_layers: tuple[int, ...] = (256, 256, 256, 256)         # study: four 3x3 convolutions of 256
    mask_dim_reduced: int = 256                     # torchvision
    mask_threshold: float = 0.5                     # probability above which a pixel is foreground; not stated
    mask_loss: str = "bce"                          # | dice | bce+dice; study: bce, or dice
    loss_weight_mask: float = 1.0


@dataclasses.dataclass(frozen=True)
class MaskRCNNResNet101Config(MaskRCNNConfig):
    body: str = "resnet101"


@dataclasses.dataclass(frozen=True)
class StudyConfig(MaskRCNNConfig):
    """Where the study differs from torchvision's published model.

    Differs from the study: its mask head (sections 2.3, 2.5, 2.6) pools 7x7 and ends in one layer to K masks of that size; here the head is
    Mask R-CNN's, 14x14 up to 28x28, because masks of 7x7 pixels cap the mask AP that a table could show.
    """

    norm: str = "batch"                             # section 2.1: the whole body is fine-tuned, nothing frozen
    rpn_channels: int = 512                         # section 2.6, here and below
    anchor_scales: tuple[float, ...] = (1.0, 1.26, 1.59)        # 9 anchors a position; the scales (thirds of an octave) are not stated
    proposals: str = "gt"                           # section 2.2; the RPN learns all the same, or evaluation would run an untrained one
    min_proposals: int = 30                         # section 3.2: 15, better 30. Beside "gt": in evaluation, and in training for pictures
                                                    # without objects; where there are any, the heads see none of the RPN's boxes


@dataclasses.dataclass(frozen=True)
class StudyResNet101Config(StudyConfig):
    body: str = "resnet101"


# Study, section 3.2: AdamW, cosine annealing, batch 16, 30-100 epochs, gradient clipping; 3.1: flip, colour jitter. Mixed precision with
# gradient scaling is --amp fp16. The strength of the jitter, the clipping norm and the warm-up are not stated.
RECIPE = Recipe(epochs=50, batch_size=16, optimizer="adamw", lr=5e-4, lr_batch_size=16, weight_decay=1e-4, schedule="cosine",
                warmup_iters=500, clip_grad_norm=1.0, hflip=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
RECIPE_RESNET101 = dataclasses.replace(RECIPE, epochs=100, lr=1e-4)        # study, Table 2: 7e-4 for 30 and 50 epochs, 1e-4 for 100

# For the drawn demo pictures on two CPU cores.
DEMO = {
    "config": dict(faster_rcnn.DEMO["config"], mask_layers=(64, 64), mask_dim_reduced=64),
    "recipe": dict(faster_rcnn.DEMO["recipe"]),
}


class MaskRCNN(faster_rcnn.FasterRCNN):
    """The detector. num_classes: classes + 1, label 0 is background. config: MaskRCNNConfig. Runs in channels_last."""

    iou_types = ("bbox", "segm")
    finish_fields = ("mask_threshold",)

    def __init__(self, num_classes, config=MaskRCNNConfig(), name="maskrcnn_resnet50_fpn"):
        super().__init__(num_classes, config, name)

    def check_config(self, config):
        super().check_config(config)
        faster_rcnn.check_ranges(config, ("mask_threshold",), ("mask_pool_size", "mask_dim_reduced"), {"mask_layers": None})
        faster_rcnn.check_choice(config, mask_loss=MASK_LOSSES)
        if not 0 <= config.loss_weight_mask < math.inf:
            raise ValueError(f"loss_weight_mask: expected 0 or more, got {config.loss_weight_mask}")

    def build_roi_heads(self, config, strides, num_classes):
        heads = super().build_roi_heads(config, strides, num_classes)
        heads.mask_roi_pool = self.build_roi_pool(config, strides, config.mask_pool_size)
        heads.mask_head = MaskRCNNHeads(config.fpn_channels, config.mask_layers)
        heads.mask_predictor = MaskRCNNPredictor(config.mask_layers[-1], config.mask_dim_reduced, num_classes)
        heads.mask_loss_form = config.mask_loss
        return heads

    def loss_weight(self, name):
        return self.config.loss_weight_mask if name == "loss_mask" else super().loss_weight(name)

    refine_masks = None        # a model that repairs thresholded masks defines it: list of RLE dicts -> list of RLE dicts

    def finish(self, detections, batch, mask_form):
        return to_original(detections, batch, mask_form, self.config.mask_threshold, self.refine_masks)

    def stages_of(self, features, proposals, detections, batch):
        """And of the mask branch: masks_raw [D, 1, M, M] probabilities inside the boxes; masks_threshold and masks_final, lists of D
        RLE dicts (the same without post-processing)."""
        stages = super().stages_of(features, proposals, detections, batch)
        thresholded = to_original(detections, batch, "rle", self.config.mask_threshold)
        final = self.finish(detections, batch, "rle")
        for i, stage in enumerate(stages):
            stage.update(masks_raw=detections[i].masks[:, None], masks_threshold=thresholded[i]["masks"], masks_final=final[i]["masks"])
        return stages
