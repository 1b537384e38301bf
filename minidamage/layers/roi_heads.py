"""The second stage (Girshick 2015, He et al. 2017): what is in each proposal, where exactly, and which of its pixels.

The way of the data in training: proposals are matched to objects and sampled; RoIAlign cuts a 7x7 map out of the pyramid
level that fits each box; two fully connected layers give class and box; the positives also get a 14x14 map, and four
convolutions with an upsampling give a 28x28 mask. In evaluation the boxes come first, NMS thins them out, and masks are
computed for the survivors only. Names and numbers are torchvision's.

Read first: rpn.py. Read next: detector.py, then models/mask_rcnn.py.
"""
import dataclasses
import functools
import math

import torch
from torch import nn
from torch.nn import functional as F

from minidamage import ops
from minidamage.layers.losses import class_loss_and_scores, fastrcnn_loss, maskrcnn_loss, overlap_loss, smooth_l1
from minidamage.layers.matching import (BETWEEN_THRESHOLDS, BalancedPositiveNegativeSampler, BoxCoder, Matcher, gather_rows, live_counts,
                                        live_rows, pad_boxes)

MIN_DETECTION_SIZE = 1e-2      # pixels of the resized picture: thinner detections are dropped (torchvision's value)
MASKS_AT_ONCE = 16             # of a picture's true masks that are floats at a time: 62 MB at 800 x 1216
CLASS_PRIOR = 0.01             # what K independent classes start from: else K / 2 of them are found in every RoI (RetinaNet, section 4.1)


@dataclasses.dataclass
class Samples:
    """The RoIs that one training step learns from: N pictures, S slots each, the P positive slots first."""

    boxes: torch.Tensor            # [N, S, 4] xyxy, resized pixels
    labels: torch.Tensor           # [N, S] int64, 0 background
    bbox_targets: torch.Tensor     # [N, P, 4]
    objects: torch.Tensor          # [N, P] int64: which of the picture's objects a positive belongs to
    valid: torch.Tensor            # [N, S] bool
    positive_valid: torch.Tensor   # [N, P] bool


@dataclasses.dataclass
class Detections:
    """One picture's results in resized pixels, best score first."""

    boxes: torch.Tensor            # [D, 4] float32 xyxy
    scores: torch.Tensor           # [D] float32
    labels: torch.Tensor           # [D] int64, 1..K
    masks: torch.Tensor = None     # [D, M, M] float32, probabilities inside the box


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign on the pyramid level that fits each box (Lin et al. 2017, equation 1):

        level = floor(canonical_level + log2(sqrt(area) / canonical_scale)), kept among the levels that exist
    """

    def __init__(self, strides, output_size, sampling_ratio=2, canonical_scale=224, canonical_level=4):
        super().__init__()
        self.spatial_scales = [1.0 / stride for stride in strides]
        self.first_level = strides[0].bit_length() - 1                # stride 4 is level 2
        self.output_size = output_size
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def levels(self, boxes):
        """boxes: [R, 4], resized pixels. Returns [R] int64 in 0..L-1."""
        side = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
        level = torch.floor(self.canonical_level + torch.log2(side / self.canonical_scale) + 1e-6)
        return (level - self.first_level).clamp(0, len(self.spatial_scales) - 1).to(torch.int64)

    def forward(self, features, rois):
        """features: L x [N, C, h, w], finest first (coarser ones than there are strides are ignored); rois: [R, 5] (picture, xyxy)."""
        return ops.multiscale_roi_align(features[:len(self.spatial_scales)], rois, self.levels(rois[:, 1:]), self.output_size,
                                        self.spatial_scales, self.sampling_ratio, aligned=False)


class TwoMLPHead(nn.Module):
    """[R, C, P, P] -> two fully connected layers with ReLU -> [R, representation_size]."""

    def __init__(self, in_features, representation_size):
        super().__init__()
        self.fc6 = nn.Linear(in_features, representation_size)
        self.fc7 = nn.Linear(representation_size, representation_size)

    def forward(self, x):
        return self.fc7(self.fc6(x.flatten(1)).relu_()).relu_()


class FastRCNNPredictor(nn.Module):
    """[R, C] -> class logits [R, K + 1] and box deltas [R, 4 * (K + 1)]."""

    def __init__(self, in_channels, num_classes):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes)
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)

    def forward(self, x):
        return self.cls_score(x), self.bbox_pred(x)


class MaskRCNNHeads(nn.Sequential):
    """3x3 convolutions with ReLU, same size: [R, C, 14, 14] -> [R, layers[-1], 14, 14]."""

    def __init__(self, in_channels, layers):
        blocks = []
        for channels in layers:
            blocks.append(nn.Sequential(nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU(inplace=True)))
            in_channels = channels
        super().__init__(*blocks)
        for block in blocks:
            nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(block[0].bias)


class MaskRCNNPredictor(nn.Module):
    """A transposed convolution to twice the size, then one logit a pixel and class; only the asked class's channel is computed."""

    def __init__(self, in_channels, dim_reduced, num_classes):
        super().__init__()
        self.conv5_mask = nn.ConvTranspose2d(in_channels, dim_reduced, 2, stride=2)
        self.mask_fcn_logits = nn.Conv2d(dim_reduced, num_classes, 1)
        nn.init.kaiming_normal_(self.conv5_mask.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.mask_fcn_logits.weight, std=0.001)      # Detectron's; torchvision's start grows as the classes get fewer
        for layer in (self.conv5_mask, self.mask_fcn_logits):
            nn.init.zeros_(layer.bias)

    def forward(self, x, labels):
        """x: [R, C, M / 2, M / 2], labels: [R] int64. Returns the logits of each RoI's own class, [R, M, M]."""
        x = self.conv5_mask(x).relu_()
        R, C, M, _ = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(R, M * M, C)                     # a view: x is channels_last
        weight = self.mask_fcn_logits.weight.view(-1, C)[labels]                # [R, C]
        logits = torch.bmm(pixels, weight.to(pixels.dtype)[..., None]).squeeze(2) + self.mask_fcn_logits.bias[labels][:, None]
        return logits.view(R, M, M)


class RoIHeads(nn.Module):
    """Box stage and mask stage. mask_* None: a detector without masks (Faster R-CNN). The forms of the losses: losses.py."""

    def __init__(self, box_roi_pool, box_head, box_predictor, fg_iou_thresh, bg_iou_thresh, batch_size_per_image,
                 positive_fraction, bbox_reg_weights, score_thresh, nms_thresh, detections_per_img,
                 proposals="rpn+gt", class_loss="cross_entropy", focal_alpha=0.25, focal_gamma=2.0, box_loss="smooth_l1"):
        super().__init__()
        if proposals not in ("rpn+gt", "rpn", "gt"):
            raise ValueError(f"proposals: expected rpn+gt, rpn or gt, got {proposals!r}")
        self.box_roi_pool = box_roi_pool
        self.box_head = box_head
        self.box_predictor = box_predictor
        self.mask_roi_pool = self.mask_head = self.mask_predictor = self.mask_loss_form = None    # models/mask_rcnn.py adds its branch
        self.proposal_matcher = Matcher(fg_iou_thresh, bg_iou_thresh)
        self.fg_bg_sampler = BalancedPositiveNegativeSampler(batch_size_per_image, positive_fraction)
        self.box_coder = BoxCoder(bbox_reg_weights)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img
        self.proposals = proposals
        self.class_loss, self.class_scores = class_loss_and_scores(class_loss, focal_alpha, focal_gamma)
        self.box_loss_form = box_loss
        if class_loss == "sigmoid_focal":
            nn.init.constant_(box_predictor.cls_score.bias, math.log(CLASS_PRIOR / (1 - CLASS_PRIOR)))

    # --- training ---

    def losses(self, features, proposals, targets, generator=None):
        """targets: per picture boxes [G, 4] (resized pixels), labels [G], masks [G, h, w] uint8 (resized; with a mask head).

        Returns {"loss_classifier", "loss_box_reg"} and, with a mask head, "loss_mask".
        """
        with torch.no_grad():
            samples = self.select_training_samples(proposals, targets, generator)
        rows = live_rows(samples.valid.flatten())
        rois, labels, valid = to_rois(samples.boxes)[rows], samples.labels.flatten()[rows], samples.valid.flatten()[rows]
        bbox_targets = F.pad(samples.bbox_targets, (0, 0, 0, samples.valid.shape[1] - samples.bbox_targets.shape[1]))    # [N, S, 4]
        class_logits, box_regression = self.box_predictor(self.box_head(self.box_roi_pool(features, rois)))
        loss_classifier, loss_box = fastrcnn_loss(class_logits.float(), box_regression.float(), labels,
                                                  bbox_targets.flatten(0, 1)[rows], valid, self.class_loss,
                                                  self.box_loss_of(rois[:, 1:], valid & (labels > 0)))
        losses = {"loss_classifier": loss_classifier, "loss_box_reg": loss_box}
        if self.mask_head is not None:
            losses["loss_mask"] = self.mask_loss(features, samples, targets)
        return losses

    def box_loss_of(self, boxes, positive):
        """deltas, targets [R, 4] -> [R]. boxes: [R, 4], the RoIs; an overlap is one of boxes, those of the other rows may have no size."""
        if self.box_loss_form == "smooth_l1":
            return smooth_l1
        boxes = torch.where(positive[:, None], boxes, F.pad(boxes.new_zeros(2), (0, 2), value=1.0))
        return functools.partial(overlap_loss, boxes=boxes, box_coder=self.box_coder, form=self.box_loss_form)

    def loss_counts(self, proposals, targets):
        """{"rois", "masks": how many the losses of these pictures are means over}; no matter what is drawn."""
        samples = self.select_training_samples(proposals, targets)
        return {"rois": samples.valid.sum(), "masks": samples.positive_valid.sum()}

    def mask_loss(self, features, samples, targets):
        P = samples.positive_valid.shape[1]
        valid = samples.positive_valid.flatten()
        rows = live_rows(valid)
        boxes, labels = samples.boxes[:, :P], samples.labels[:, :P].flatten()[rows]
        mask_logits = self.mask_logits(features, to_rois(boxes)[rows], labels)
        with torch.no_grad():
            mask_targets = project_masks_on_boxes([target["masks"] for target in targets], boxes, samples.objects,
                                                  samples.positive_valid, mask_logits.shape[-1])
        return maskrcnn_loss(mask_logits, mask_targets, valid[rows], self.mask_loss_form)

    def mask_logits(self, features, rois, labels):
        """[R, M, M] float32: the logits of each RoI's own class."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, rois)), labels).float()

    def select_training_samples(self, proposals, targets, generator=None):
        """Matches proposals to objects, draws the batch, and computes what each positive should have predicted."""
        gt_boxes, gt_labels = [t["boxes"] for t in targets], [t["labels"] for t in targets]
        boxes, usable = self.add_gt_proposals(proposals, gt_boxes)                                           # [N, P', 4], [N, P']
        matches = torch.stack([self.proposal_matcher(ops.box_iou(gt, b)) for gt, b in zip(gt_boxes, boxes)])
        usage = (matches >= 0).to(torch.int8).masked_fill((matches == BETWEEN_THRESHOLDS) | ~usable, -1)
        positives, positive_valid, negatives, negative_valid = self.fg_bg_sampler(usage, generator)
        objects = matches.gather(1, positives).clamp(min=0)                                                  # [N, P]
        labels = gather_rows(nn.utils.rnn.pad_sequence([F.pad(each, (0, 1)) for each in gt_labels], batch_first=True), objects)
        unit_box = F.pad(boxes.new_zeros(2), (0, 2), value=1.0)                        # x1, y1, x2, y2 = 0, 0, 1, 1, for empty slots
        positive_boxes = torch.where(positive_valid[..., None], gather_rows(boxes, positives), unit_box)
        own_object = torch.where(positive_valid[..., None], gather_rows(pad_boxes(gt_boxes), objects), unit_box)
        return Samples(
            boxes=torch.cat([positive_boxes, gather_rows(boxes, negatives)], dim=1),
            labels=torch.cat([labels * positive_valid, torch.zeros_like(negatives)], dim=1),
            bbox_targets=self.box_coder.encode(own_object, positive_boxes),
            objects=objects,
            valid=torch.cat([positive_valid, negative_valid], dim=1),
            positive_valid=positive_valid)

    def add_gt_proposals(self, proposals, gt_boxes):
        """The candidates by config field `proposals`: the RPN's and the true boxes, the RPN's alone, or the true boxes where a
        picture has any and the RPN's elsewhere."""
        if self.proposals == "rpn":
            return proposals.boxes, proposals.valid
        usable = proposals.valid
        if self.proposals == "gt":
            unlabelled = torch.tensor([[len(boxes) == 0] for boxes in gt_boxes])
            usable = usable & unlabelled.to(usable.device, non_blocking=True)
        padded = pad_boxes(gt_boxes)
        exists = torch.arange(padded.shape[1]) < torch.tensor([[len(boxes)] for boxes in gt_boxes])
        return torch.cat([proposals.boxes, padded], dim=1), torch.cat([usable, exists.to(usable.device, non_blocking=True)], dim=1)

    # --- evaluation ---

    def detect(self, features, proposals, image_sizes):
        """Returns a Detections for each picture. Reads the number of detections back once, after the box stage."""
        found = self.box_stage(features, proposals, image_sizes, live_rows(proposals.valid.flatten()), live_counts(proposals.valid))
        counts = torch.stack([count for *_, count in found]).tolist()
        detections = [Detections(boxes[:n], scores[:n], labels[:n]) for (boxes, scores, labels, _), n in zip(found, counts)]
        if self.mask_head is not None:
            self.add_masks(features, detections)
        return detections

    def box_stage(self, features, proposals, image_sizes, rows, a_picture):
        """Of each picture what `thin_out` returns. rows: the flattened slots that are looked at; a_picture: how many of them are whose."""
        rois = to_rois(proposals.boxes)[rows]
        class_logits, box_regression = self.box_predictor(self.box_head(self.box_roi_pool(features, rois)))
        bbox_deltas = box_regression.unflatten(1, (-1, 4))                                                    # [R, K + 1, 4]
        scores = self.class_scores(class_logits.float()) * proposals.valid.flatten()[rows][:, None]           # [R, K + 1]
        pictures = zip(bbox_deltas.split(a_picture), rois[:, 1:].split(a_picture), scores.split(a_picture), image_sizes)
        return [self.thin_out(*each) for each in pictures]

    def thin_out(self, bbox_deltas, proposals, scores, image_size):
        """One picture, bbox_deltas [R, K + 1, 4], proposals [R, 4], scores [R, K + 1]: drops background, weak and collapsed boxes,
        suppresses a class at a time. Returns boxes [D, 4], scores [D], labels [D] with D = detections_per_img slots, and how many count."""
        boxes = self.box_coder.decode(bbox_deltas[:, 1:], proposals[:, None], image_size).flatten(0, 1)        # [R * K, 4]
        labels = torch.arange(1, scores.shape[1], device=scores.device).expand(len(scores), -1).reshape(-1)
        scores = scores[:, 1:].reshape(-1)
        usable = (scores > self.score_thresh) & ((boxes[:, 2:] - boxes[:, :2]) >= MIN_DETECTION_SIZE).all(dim=1)
        keep, count = ops.batched_nms_padded(boxes, scores, labels, self.nms_thresh, min(self.detections_per_img, len(boxes)), usable)
        return boxes[keep], scores[keep], labels[keep], count

    def add_masks(self, features, detections):
        """Fills in the probabilities of each detection's own class, all pictures in one pass."""
        picture = torch.cat([torch.full((len(d.boxes), 1), float(i), device=d.boxes.device) for i, d in enumerate(detections)])
        rois = torch.cat([picture, torch.cat([d.boxes for d in detections])], dim=1)
        probabilities = self.mask_logits(features, rois, torch.cat([d.labels for d in detections])).sigmoid()
        for detection, masks in zip(detections, probabilities.split([len(d.boxes) for d in detections])):
            detection.masks = masks


def to_rois(boxes):
    """[N, P, 4] -> [N * P, 5]: the picture's number before each box, as RoIAlign reads them."""
    N, P, _ = boxes.shape
    picture = torch.arange(N, device=boxes.device, dtype=boxes.dtype).view(N, 1, 1).expand(N, P, 1)
    return torch.cat([picture, boxes], dim=2).view(N * P, 5)


def project_masks_on_boxes(gt_masks, boxes, objects, valid, size):
    """The mask targets: the part of each RoI's own object inside its box, as a size x size picture (RoIAlign with as many
    samples as there are pixels).

    gt_masks: N x [G_i, h_i, w_i] uint8; boxes: [N, P, 4]; objects: [N, P]; valid: [N, P] bool. Returns [R, size, size] float32
    for the live rows.
    """
    targets = []
    for i, masks in enumerate(gt_masks):
        rows = live_rows(valid[i])
        targets.append(cut_masks(masks, objects[i][rows], boxes[i][rows], size))
    return torch.cat(targets)


def cut_masks(masks, objects, boxes, size):
    """masks: [G, h, w] uint8; objects: [R] int64, whose mask is cut; boxes: [R, 4]. Returns [R, size, size] float32.

    Bytes until the last moment: as float, a crowded picture's masks would take four times their memory when a step's activations are all
    there. So it is MASKS_AT_ONCE at a time.
    """
    cut = boxes.new_zeros(len(boxes), size, size)
    for some, first in zip(masks.split(MASKS_AT_ONCE), range(0, len(masks), MASKS_AT_ONCE)):
        own = objects - first
        here = (own >= 0) & (own < len(some))
        rows = live_rows(here)
        rois = torch.cat([own.clamp(0, len(some) - 1)[:, None].to(boxes.dtype), boxes], dim=1)[rows]
        part = ops.roi_align(some[:, None].to(boxes.dtype), rois, (size, size), 1.0)[:, 0]
        cut[rows] = torch.where(here[rows][:, None, None], part, cut[rows])
    return cut
