"""Region proposal network (Ren et al. 2015, arXiv:1506.01497): which boxes of the picture are worth a second look.

The way of the data: a small convolutional head scores and moves every anchor of every pyramid level; the best
`pre_nms_top_n` of each level are decoded to boxes, clipped, thinned by non-maximum suppression; the best `post_nms_top_n`
of the picture are the proposals. Names and numbers are torchvision's.

Proposals have a fixed number of slots a picture (`valid` says which are filled), so nothing here waits for a GPU.

Read first: matching.py. Read next: roi_heads.py.
"""
import dataclasses

import torch
from torch import nn
from torch.nn import functional as F

from minidamage import ops
from minidamage.layers.losses import binary_cross_entropy, rpn_loss
from minidamage.layers.matching import BETWEEN_THRESHOLDS, BalancedPositiveNegativeSampler, BoxCoder, Matcher, gather_rows, pad_boxes

MIN_BOX_SIZE = 1e-3           # pixels: anything thinner is a collapsed prediction (torchvision's value)


@dataclasses.dataclass
class Proposals:
    """N pictures, P slots each; the filled slots come first, best score first. With min_proposals in two runs, best first each: what NMS
    left, then what the number was filled up with."""

    boxes: torch.Tensor       # [N, P, 4] float32 xyxy, pixels of the resized picture; zeros in empty slots
    scores: torch.Tensor      # [N, P] float32, sigmoid of the objectness
    valid: torch.Tensor       # [N, P] bool


class RPNHead(nn.Module):
    """A 3x3 convolution with ReLU, then 1x1 convolutions for one logit and four offsets an anchor; the same for every level."""

    def __init__(self, in_channels, num_anchors, conv_channels):
        super().__init__()
        # conv.0.0: torchvision's name
        self.conv = nn.Sequential(nn.Sequential(nn.Conv2d(in_channels, conv_channels, 3, padding=1), nn.ReLU(inplace=True)))
        self.cls_logits = nn.Conv2d(conv_channels, num_anchors, 1)
        self.bbox_pred = nn.Conv2d(conv_channels, num_anchors * 4, 1)
        for layer in (self.conv[0][0], self.cls_logits, self.bbox_pred):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features):
        """Returns per level the objectness logits [N, h * w * A] and the deltas [N, h * w * A, 4], in the anchors' order."""
        objectness, bbox_deltas = [], []
        for feature in features:
            hidden = self.conv(feature)
            # channels_last: the permuted map is what lies in memory, so both reshapes are views
            objectness.append(self.cls_logits(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1))
            bbox_deltas.append(self.bbox_pred(hidden).permute(0, 2, 3, 1).reshape(len(feature), -1, 4))
        return objectness, bbox_deltas

    def at(self, features, anchors):
        """The same outputs for some anchors only: anchors [N, S] int64, counted over all levels. Returns logits [N, S], deltas [N, S, 4].

        The losses see a few hundred of some hundred thousand anchors. Run on the 3x3 windows below those, with gradients, and over the
        whole maps without, the head needs no dense backward: an eighth of a ResNet-50's training step, and its largest map.
        """
        conv, A = self.conv[0][0], self.cls_logits.out_channels
        cell, own = anchors // A, (anchors % A)[..., None]                                                     # own: which of the cell's A
        weight = conv.weight.permute(2, 3, 1, 0).flatten(0, 2)                                                 # [9 C, channels]
        hidden = (windows_around(features, cell) @ weight + conv.bias).relu_()                                 # [N, S, channels]
        objectness = F.linear(hidden, self.cls_logits.weight.flatten(1), self.cls_logits.bias)                 # [N, S, A]
        bbox_deltas = F.linear(hidden, self.bbox_pred.weight.flatten(1), self.bbox_pred.bias).unflatten(2, (A, 4))
        return objectness.gather(2, own).squeeze(2), bbox_deltas.gather(2, own[..., None].expand(-1, -1, 1, 4)).squeeze(2)


def windows_around(features, cell):
    """The 3x3 cells that a padded convolution sees around each of cell [N, S], counted over all levels: [N, S, 9 C]."""
    N, C = features[0].shape[:2]
    levels = [feature.permute(0, 2, 3, 1).reshape(N, -1, C) for feature in features]
    cells = torch.cat([*levels, levels[0].new_zeros(N, 1, C)], dim=1)                  # the last one is the padding around every level
    y, x, h, w = cell_places(features)[cell][..., None, None].unbind(2)                # [N, S, 1, 1]
    step = torch.arange(-1, 2, device=cell.device)
    near_y, near_x = y + step[:, None], x + step                                       # [N, S, 3, 1], [N, S, 1, 3]
    inside = (near_y >= 0) & (near_y < h) & (near_x >= 0) & (near_x < w)               # [N, S, 3, 3]
    near = torch.where(inside, cell[..., None, None] + step[:, None] * w + step, cells.shape[1] - 1)
    return gather_rows(cells, near.flatten(1)).view(N, -1, 9 * C)


def cell_places(features):
    """Where every cell of every level stands: [cells, 4] int64, row and column, height and width of its level."""
    places = []
    for feature in features:
        h, w = feature.shape[-2:]
        cell = torch.arange(h * w, device=feature.device)
        places.append(torch.stack([cell // w, cell % w, torch.full_like(cell, h), torch.full_like(cell, w)], dim=1))
    return torch.cat(places)


class RegionProposalNetwork(nn.Module):
    """Proposes boxes and learns to. The thresholds' meaning is in the model's config, which holds a line for each."""

    def __init__(self, anchor_generator, head, fg_iou_thresh, bg_iou_thresh, batch_size_per_image, positive_fraction,
                 pre_nms_top_n, post_nms_top_n, nms_thresh, score_thresh=0.0, min_proposals=0):
        super().__init__()
        self.anchor_generator = anchor_generator
        self.head = head
        self.box_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = Matcher(fg_iou_thresh, bg_iou_thresh, allow_low_quality_matches=True)
        self.fg_bg_sampler = BalancedPositiveNegativeSampler(batch_size_per_image, positive_fraction)
        self.pre_nms_top_n = pre_nms_top_n              # {"training": n, "testing": n}, a level
        self.post_nms_top_n = post_nms_top_n            # {"training": n, "testing": n}, a picture
        self.nms_thresh = nms_thresh
        self.score_thresh = score_thresh
        self.min_proposals = min_proposals
        self.objectness_loss = binary_cross_entropy     # models/danet.py may put the focal one here

    def forward(self, features, batch_size_px, image_sizes, targets=None, generator=None):
        """features: per level [N, C, h, w]; batch_size_px: (H, W) of the padded batch; image_sizes: [(h, w)] inside it.

        targets: per picture a dict with boxes [G, 4] in resized pixels, or None. Returns (Proposals, losses); losses is {} without
        targets, else {"loss_objectness", "loss_rpn_box_reg"}. The proposals carry no gradient.
        """
        anchors = self.anchor_generator([f.shape[-2:] for f in features], batch_size_px, features[0].device)
        with torch.no_grad():
            proposals = self.propose(*self.head(features), anchors, image_sizes)
        if targets is None:
            return proposals, {}
        return proposals, self.losses(features, torch.cat(anchors), [target["boxes"] for target in targets], generator)

    def loss_counts(self, features, batch_size_px, targets):
        """{"anchors": how many the losses of these pictures are means over}: hangs on anchors and truth alone, not on what is drawn."""
        anchors = torch.cat(self.anchor_generator([f.shape[-2:] for f in features], batch_size_px, features[0].device))
        _, _, positive_valid, _, negative_valid = self.sample(anchors, [target["boxes"] for target in targets])
        return {"anchors": positive_valid.sum() + negative_valid.sum()}

    def propose(self, objectness, bbox_deltas, anchors, image_sizes):
        mode = "training" if self.training else "testing"
        best_deltas, best_anchors, scores, levels = self.best_of_each_level(objectness, bbox_deltas, anchors, self.pre_nms_top_n[mode])
        kept = [self.thin_out(best_deltas[i], best_anchors[i], scores[i], levels, image_sizes[i], self.post_nms_top_n[mode])
                for i in range(len(scores))]
        return Proposals(*(torch.stack(parts) for parts in zip(*kept)))

    def best_of_each_level(self, objectness, bbox_deltas, anchors, top_n):
        """Only what can still become a proposal is decoded. Returns deltas and anchors [N, T, 4], scores [N, T], levels [T]."""
        scores, best_deltas, best_anchors, levels = [], [], [], []
        for level, (logits, deltas, level_anchors) in enumerate(zip(objectness, bbox_deltas, anchors)):
            logits, index = logits.float().topk(min(top_n, logits.shape[1]), dim=1)
            scores.append(logits)
            best_deltas.append(gather_rows(deltas, index))
            best_anchors.append(level_anchors[index])
            levels.append(torch.full((index.shape[1],), level, dtype=torch.int64, device=index.device))
        return torch.cat(best_deltas, dim=1), torch.cat(best_anchors, dim=1), torch.cat(scores, dim=1).sigmoid(), torch.cat(levels)

    def thin_out(self, bbox_deltas, anchors, scores, levels, image_size, top_n):
        """One picture: decode, clip, drop collapsed and hopeless boxes, suppress. Returns boxes [P, 4], scores and valid [P], P = top_n."""
        boxes = self.box_coder.decode(bbox_deltas, anchors, image_size)
        usable = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_BOX_SIZE).all(dim=1) & (scores >= self.score_thresh)
        top_n = min(top_n, len(boxes))
        keep, count = ops.batched_nms_padded(boxes, scores, levels, self.nms_thresh, top_n, usable)
        if self.min_proposals:
            keep, count = self.fill_up(keep, count, scores, usable)
        valid = torch.arange(top_n, device=boxes.device) < count
        return boxes[keep].masked_fill(~valid[:, None], 0), scores[keep].masked_fill(~valid, 0), valid      # NaN * 0 would stay NaN

    def fill_up(self, keep, count, scores, usable):
        """Raises the number of proposals to `min_proposals` with the best of those that NMS suppressed, behind those that it left."""
        slot = torch.arange(len(keep), device=keep.device)
        survived = torch.zeros_like(scores).index_add_(0, keep, (slot < count).to(scores.dtype))
        rank = (scores + 2 * survived.clamp(max=1)).masked_fill(~usable, -1)            # survivors first, then by score
        keep = rank.topk(len(keep)).indices
        return keep, torch.maximum(count, usable.sum().clamp(max=min(self.min_proposals, len(keep))))

    def sample(self, anchors, gt_boxes, generator=None):
        """(matches [N, A], and what the sampler returns); anchors: [A, 4], gt_boxes: N x [G_i, 4]."""
        matches = torch.stack([self.proposal_matcher(ops.box_iou(boxes, anchors)) for boxes in gt_boxes])
        labels = (matches >= 0).to(torch.int8).masked_fill(matches == BETWEEN_THRESHOLDS, -1)         # 1 object, 0 background, -1 neither
        return matches, *self.fg_bg_sampler(labels, generator)

    def losses(self, features, anchors, gt_boxes, generator):
        """anchors: [A, 4], gt_boxes: N x [G_i, 4]. Only sampled anchors are touched."""
        with torch.no_grad():
            matches, positives, positive_valid, negatives, negative_valid = self.sample(anchors, gt_boxes, generator)
            own_anchors = anchors[positives]                                                                       # [N, P, 4]
            own_object = gather_rows(pad_boxes(gt_boxes), matches.gather(1, positives).clamp(min=0))
            own_object = torch.where(positive_valid[..., None], own_object, own_anchors)    # empty slots: any box with a size
            bbox_targets = self.box_coder.encode(own_object, own_anchors)
        objectness, bbox_deltas = self.head.at(features, torch.cat([positives, negatives], dim=1))
        loss_objectness, loss_box = rpn_loss(objectness.float(), bbox_deltas[:, :positives.shape[1]].float(), bbox_targets, positive_valid,
                                             torch.cat([positive_valid, negative_valid], dim=1), self.objectness_loss)
        return {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_box}
