"""From boxes to training targets: which anchor or proposal belongs to which object, which of them are used, and what the
box regression should predict for them (Girshick et al. 2014, Ren et al. 2015; torchvision's arithmetic).

Everything here keeps its shape whatever the data (slots and a `valid` mask instead of shorter lists), so that on a GPU no
step waits for the device.

Read first: anchors.py. Read next: rpn.py.
"""
import math

import torch
from torch import nn

from minidamage import ops
from minidamage.ops.box_coding import BBOX_XFORM_CLIP

BELOW_LOW_THRESHOLD, BETWEEN_THRESHOLDS = -1, -2               # what a match says that is no object's index: background, neither
KEYS_AT_ONCE = 4096            # random numbers are drawn in multiples of it, see draw_keys


class Matcher:
    """Assigns each candidate box to the object that it overlaps most, to background, or to nobody.

    high_threshold: an IoU from here on is a match. low_threshold: below it, background; between the two, neither.
    allow_low_quality_matches: each object also takes the candidates that overlap it as much as any other candidate does,
    however little that is (RPN), so that no object goes unlearned.
    """

    def __init__(self, high_threshold, low_threshold, allow_low_quality_matches=False):
        if low_threshold > high_threshold:
            raise ValueError(f"Matcher: expected low_threshold <= high_threshold, got {low_threshold} > {high_threshold}")
        self.high_threshold = high_threshold
        self.low_threshold = low_threshold
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, match_quality):
        """match_quality: [G, A] IoU of G objects and A candidates.

        Returns [A] int64: the object's index, BELOW_LOW_THRESHOLD (background) or BETWEEN_THRESHOLDS. With G = 0 all are background.
        Differs from torchvision: an object that touches no candidate at all takes none (there it takes every candidate that
        does not touch it), and G = 0 is allowed.
        """
        G, A = match_quality.shape
        if G == 0:
            return torch.full((A,), BELOW_LOW_THRESHOLD, dtype=torch.int64, device=match_quality.device)
        best_iou, best_object = match_quality.max(dim=0)                          # [A]
        matches = best_object.masked_fill(best_iou < self.high_threshold, BETWEEN_THRESHOLDS)
        matches = matches.masked_fill(best_iou < self.low_threshold, BELOW_LOW_THRESHOLD)
        if self.allow_low_quality_matches:
            highest = match_quality.amax(dim=1, keepdim=True)                      # [G, 1]
            claimed = ((match_quality == highest) & (highest > 0)).any(dim=0)      # [A]
            matches = torch.where(claimed, best_object, matches)
        return matches


class BalancedPositiveNegativeSampler:
    """A random subset with a bounded share of positives, the same number of slots for every picture.

    batch_size_per_image: how many are taken; positive_fraction: at most this share of them is positive, the rest is filled up
    with negatives as far as there are any.
    """

    def __init__(self, batch_size_per_image, positive_fraction):
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction

    def __call__(self, labels, generator=None):
        """labels: [N, A], >= 1 positive, 0 negative, -1 not to be used. generator: torch.Generator, or a list of N, one a picture (what
        is drawn for it then does not depend on the others in the batch); None takes the global one.

        Returns (positives, positive_valid, negatives, negative_valid): indices [N, P] and [N, B] int64 into A, and bool masks of
        the same shapes; only valid slots count. Each row's valid positives come first.
        """
        N, A = labels.shape
        keys = draw_keys(N, A, labels.device, generator)
        # the largest random keys among the eligible ones are a uniform draw without replacement; -1 marks the others
        max_positives = min(int(self.batch_size_per_image * self.positive_fraction), A)
        positive_keys, positives = keys.masked_fill(labels < 1, -1).topk(max_positives, dim=1)
        negative_keys, negatives = keys.masked_fill(labels != 0, -1).topk(min(self.batch_size_per_image, A), dim=1)
        positive_valid = positive_keys >= 0
        room = self.batch_size_per_image - positive_valid.sum(dim=1, keepdim=True)
        slot = torch.arange(negatives.shape[1], device=labels.device)
        return positives, positive_valid, negatives, (negative_keys >= 0) & (slot < room)


def draw_keys(N, A, device, generator=None):
    """[N, A] uniform in 0..1. generator: as in the sampler."""
    if not isinstance(generator, list):
        return torch.rand((N, A), device=device, generator=generator)
    # A hangs on the batch (its picture with the most objects). On a GPU the first numbers of a longer draw are others: equal lengths
    length = math.ceil(A / KEYS_AT_ONCE) * KEYS_AT_ONCE
    return torch.stack([torch.rand(length, device=device, generator=each) for each in generator])[:, :A]


class BoxCoder:
    """Box regression targets and back, with one head's weights: see ops/box_coding.py."""

    def __init__(self, weights, bbox_xform_clip=BBOX_XFORM_CLIP):
        self.weights = tuple(weights)
        self.bbox_xform_clip = bbox_xform_clip

    def encode(self, reference_boxes, proposals):
        """What takes proposals to reference_boxes; both [..., 4] xyxy with positive sizes. Returns [..., 4] (t_x, t_y, t_w, t_h)."""
        return ops.encode_boxes(reference_boxes, proposals, self.weights)

    def decode(self, bbox_deltas, boxes, size=None):
        """Moves boxes by bbox_deltas: [..., 4] each, leading dimensions broadcast. Returns [..., 4] xyxy in the boxes' pixels, cut at the
        border of a picture of `size` (height, width)."""
        return ops.decode_boxes(bbox_deltas, boxes, self.weights, self.bbox_xform_clip, size)


def gather_rows(values, index):
    """values: [N, A, ...], index: [N, K] int64. Returns [N, K, ...]: each picture's own rows."""
    index = index.view(*index.shape, *(1,) * (values.dim() - 2)).expand(*index.shape, *values.shape[2:])
    return values.gather(1, index)


def live_rows(valid):
    """Rows worth computing, to index flattened slots with. valid: [R] bool.

    On a CPU the rows that are valid. On a GPU all of them: reading the count back would stall the device, and the empty slots
    are cheaper than that; the losses weigh them with 0.
    """
    return valid.nonzero().squeeze(1) if valid.is_cpu else slice(None)


def live_counts(valid):
    """How many of each picture's slots `live_rows` keeps. valid: [N, P] bool. Returns N ints."""
    return valid.sum(dim=1).tolist() if valid.is_cpu else [valid.shape[1]] * len(valid)


def pad_boxes(boxes):
    """[[G_i, 4]] -> [N, max(G_i, 1), 4], zeros where a picture has fewer."""
    return nn.utils.rnn.pad_sequence([torch.cat([b, b.new_zeros(1, 4)]) if len(b) == 0 else b for b in boxes], batch_first=True)
