"""A peer's row in a table: its model, trained and scored by this project's own scripts.

    python results/peers.py train --model smp_unet --data cfd/ ...                       every argument of train.py
    python results/peers.py evaluate --checkpoint runs/smp_unet-cfd-001 ...              every argument of evaluate.py

torchvision_maskrcnn_resnet50_fpn, torchvision_fasterrcnn_resnet50_fpn (torchvision) and smp_unet (segmentation_models_pytorch) are added to
minidamage.MODELS here, and nowhere else: the package knows no peer. Each is our model of the same name, with its config, recipe, parameters
and start weights (the same for the same seed), whose forward pass is the peer's: a skeleton of the peer's modules without weights of their
own is called with ours, for both have the same names. Reader, augmentation, loop, optimiser, choice of the epoch and of thresholds, and the
scores are therefore the very same code; a difference in accuracy comes from the network's.

torchvision's are resizing, normalisation, body, pyramid, anchors, matching, sampling, the losses, post-processing and the pasting of masks.
Ours: uint8 to float, crowd regions left out, run lengths of its probabilities above mask_threshold, the losses' weights (loss_weight_...).
What differs from our model, and so may move a number:
- The samplers draw from torch's global generator; ours draws for each picture from a seed of its own.
- The validation loss is computed with the number of candidates of training, ours with evaluation's. (It tells apart epochs of equal AP.)
- An object that no anchor touches claims every anchor that does not touch it; ours claims none.
- Under --amp bf16 its boxes, candidates and targets alike, are rounded to bfloat16 (4 pixels at 512 to 1024): not a fair twin, so its runs
  here have --amp off.
- The choice of mask_threshold pastes its 28 x 28 masks by our kernel, as the network runs once for all thresholds.
segmentation_models_pytorch's are encoder, decoder and head: pictures and losses are the table's, the same for all its models.
"""
import importlib.util
import pathlib
import sys

import torch
from torch.func import functional_call

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import evaluate                                                                                          # noqa: E402
import minidamage                                                                                        # noqa: E402
import train                                                                                             # noqa: E402
from minidamage import distributed, masks                                                                # noqa: E402
from minidamage.layers.detector import check_images, check_targets, resize_boxes                         # noqa: E402
from minidamage.layers.segmenter import logit_channels                                                   # noqa: E402
from minidamage.models import faster_rcnn, mask_rcnn, unet                                               # noqa: E402

# The fields of a detector's config that torchvision has no parameter for, and what it does.
FIXED = {"fpn": True, "min_proposals": 0, "proposals": "rpn+gt", "class_loss": "cross_entropy", "box_loss": "smooth_l1", "mask_loss": "bce"}


def skeleton(package, build, *arguments):
    """[build(*arguments)] on the meta device: modules that own no memory. In a list, so that it is no part of the model's own tree.
    Raises ValueError where the peer is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed here: expected it beside this project's packages; pip install {package}")
    with torch.device("meta"):
        return [build(*arguments)]


def with_pixels(image, target):
    """The target with masks [G, H, W] where it has rles, which torchvision's models do not take."""
    if "masks" in target or "rles" not in target:
        return target
    found = [torch.from_numpy(masks.decode(rle)) for rle in target["rles"]]
    return {**target, "masks": torch.stack(found) if found else torch.zeros((0, *image.shape[-2:]), dtype=torch.uint8)}


class TorchvisionDetector:
    """What comes before FasterRCNN or MaskRCNN of ours among a class's parents: torchvision computes, our parameters learn."""

    def __init__(self, num_classes, config, name):
        super().__init__(num_classes, config, name)
        self.peer = skeleton("torchvision", build_torchvision, num_classes, config)

    def check_config(self, config):
        super().check_config(config)
        fixed = {**{field: value for field, value in FIXED.items() if hasattr(config, field)}, "rpn_channels": config.fpn_channels}
        if config.norm == "batch":
            fixed["frozen_stages"] = 0                  # there a frozen stage of learned norms goes on updating its statistics
        for field, value in fixed.items():
            if getattr(config, field) != value:
                raise ValueError(f"{field}: expected {value}, which is what torchvision's model has, got {getattr(config, field)}")

    def call(self, images, targets=None):
        """The peer on our weights, in whatever mode it is. images: as our models take them."""
        check_images(images)
        device = self.transform.image_mean.device
        images = [image.to(device) for image in images]
        images = [image if image.is_floating_point() else image.float() / 255 for image in images]
        if targets is not None:
            with_masks = self.roi_heads.mask_head is not None
            if any("min_size" in target for target in targets):
                raise ValueError("multi_scale: expected () with torchvision's model, whose sizes are drawn by itself")
            targets = [{key: target[key].to(device) for key in ("boxes", "labels", "masks")[:2 + with_masks]}
                       for target in map(with_pixels, images, check_targets(images, targets, self.num_classes, with_masks))]
        return functional_call(self.peer[0], self.state_dict(keep_vars=True), (images, targets), strict=True)

    def losses(self, images, targets, generator=None):
        if distributed.world() > 1:
            self.loss_counts(images, targets)
        self.peer[0].train()
        return self.weigh(self.call(images, targets))

    def loss_counts(self, images, targets):
        raise ValueError("torchvision's losses are means over the pictures in hand: expected one process and --accumulate 1")

    @torch.no_grad()
    def detect(self, images, mask_form="probability"):
        """As our models' `detect`, without stages."""
        peer = self.peer[0].eval()
        peer.transform.training = mask_form == "raw"                    # its way to leave boxes and masks as the heads gave them
        results = self.call(images)
        for image, result in zip(images, results):
            size = tuple(image.shape[-2:])
            if mask_form == "raw":
                result["boxes"] = resize_boxes(result["boxes"], self.transform.resized_size(*size), size)
            elif "masks" in result and mask_form != "probability":
                found = result["masks"][:, 0] > self.config.mask_threshold
                result["masks"] = masks.encode(found.cpu().numpy().astype("uint8")) if mask_form == "rle" else found
        return results

    @torch.no_grad()
    def losses_and_detections(self, images, targets, mask_form="rle", seed=0):
        """As our models', in two passes: what the peer computes is either the one or the other."""
        detections = self.detect(images, mask_form)
        peer = self.peer[0].eval()
        for part in (peer, peer.rpn, peer.roi_heads):                   # not what they are made of: norms keep their statistics
            part.training = True
        device = self.transform.image_mean.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            return self.weigh(self.call(images, targets)), detections


def build_torchvision(num_classes, config):
    """torchvision's model of a FasterRCNNConfig or MaskRCNNConfig, from its own parts."""
    from torchvision.models import detection, resnet
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

    norms = {"frozen": FrozenBatchNorm2d, "batch": torch.nn.BatchNorm2d, "group": lambda channels: torch.nn.GroupNorm(32, channels)}
    body = getattr(resnet, config.body)(weights=None, norm_layer=norms[config.norm])
    widths = [body.inplanes // 8 * grow for grow in (1, 2, 4, 8)]
    backbone = BackboneWithFPN(body, {f"layer{i + 1}": str(i) for i in range(4)}, widths, config.fpn_channels)
    sizes = faster_rcnn.anchor_sizes_of_levels(config)
    pool = lambda size: MultiScaleRoIAlign(["0", "1", "2", "3"], size, config.sampling_ratio, canonical_scale=config.canonical_scale)
    as_named = ("min_size", "max_size", "image_mean", "image_std", "rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test",
                "rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test", "rpn_nms_thresh", "rpn_fg_iou_thresh", "rpn_bg_iou_thresh",
                "rpn_batch_size_per_image", "rpn_positive_fraction", "rpn_score_thresh", "box_score_thresh", "box_nms_thresh",
                "box_detections_per_img", "box_fg_iou_thresh", "box_bg_iou_thresh", "box_batch_size_per_image", "box_positive_fraction",
                "bbox_reg_weights")
    parts = {name: getattr(config, name) for name in as_named}
    parts["rpn_anchor_generator"] = detection.anchor_utils.AnchorGenerator(sizes, (config.aspect_ratios,) * len(sizes))
    parts["box_roi_pool"] = pool(config.box_pool_size)
    parts["box_head"] = detection.faster_rcnn.TwoMLPHead(config.fpn_channels * config.box_pool_size ** 2, config.box_head_channels)
    parts["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(config.box_head_channels, num_classes)
    if not isinstance(config, mask_rcnn.MaskRCNNConfig):
        return detection.FasterRCNN(backbone, **parts)
    parts["mask_roi_pool"] = pool(config.mask_pool_size)
    parts["mask_head"] = detection.mask_rcnn.MaskRCNNHeads(config.fpn_channels, config.mask_layers, 1)
    parts["mask_predictor"] = detection.mask_rcnn.MaskRCNNPredictor(config.mask_layers[-1], config.mask_dim_reduced, num_classes)
    return detection.MaskRCNN(backbone, **parts)


class TorchvisionFasterRCNN(TorchvisionDetector, faster_rcnn.FasterRCNN):
    """torchvision's FasterRCNN behind our contract."""


class TorchvisionMaskRCNN(TorchvisionDetector, mask_rcnn.MaskRCNN):
    """torchvision's MaskRCNN behind our contract."""


class SmpUnet(unet.Unet):
    """segmentation_models_pytorch's Unet behind our contract."""

    def __init__(self, num_classes, config, name):
        super().__init__(num_classes, config, name)
        self.peer = skeleton("segmentation_models_pytorch", build_smp, num_classes, config)

    def logits(self, x):
        return functional_call(self.peer[0].train(self.training), self.state_dict(keep_vars=True), (x,), strict=True)


def build_smp(num_classes, config):
    import segmentation_models_pytorch as smp

    return smp.Unet(config.body, encoder_weights=None, decoder_channels=config.decoder_channels, classes=logit_channels(num_classes))


PEERS = {"torchvision_maskrcnn_resnet50_fpn": (TorchvisionMaskRCNN, *minidamage.MODELS["maskrcnn_resnet50_fpn"][1:]),
         "torchvision_fasterrcnn_resnet50_fpn": (TorchvisionFasterRCNN, *minidamage.MODELS["fasterrcnn_resnet50_fpn"][1:]),
         "smp_unet": (SmpUnet, *minidamage.MODELS["unet"][1:])}


def main(words):
    """Returns the exit code of the script that is named first."""
    scripts = {"train": train.main, "evaluate": evaluate.main}
    if not words or words[0] not in scripts:
        print(f"peers.py: expected train or evaluate and its arguments, got {' '.join(words) or 'nothing'}; models: {', '.join(PEERS)}",
              file=sys.stderr)
        return 2
    minidamage.MODELS.update(PEERS)
    print(f"a peer's model may be named: where a line below says {words[0]}.py, type results/peers.py {words[0]}")
    return scripts[words[0]](words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
