"""What stands before and behind every segmenter: pictures in, batch out; logits in, losses or probabilities in the pictures' own
pixels out. A model file subclasses `Segmenter` and says one thing, `logits(x)`.

    pictures -> normalise, batch, pad to the stride        here
             -> logits [N, C, H, W]                        models/unet.py, models/context_cracknet.py, ...
             -> crop                                       here
             -> losses                                     layers/segmentation_losses.py
             or probabilities, label maps                  here

Channels: one damage class has one logit a pixel (sigmoid), K > 1 classes have K + 1 (softmax, channel 0 is background).

Read first: resnet.py. Read next: segmentation_losses.py, models/unet.py.
"""
import collections.abc
import dataclasses
import math
import types

import torch
from torch import nn
from torch.nn import functional as F

from minidamage.layers.detector import IMAGE_MEAN, IMAGE_STD, refill_statistics
from minidamage.layers.segmentation_losses import CLASS_WEIGHTS, IGNORE, loss_counts, segmentation_losses

RESOLUTIONS = ("native", "model")


@dataclasses.dataclass(frozen=True)
class SegmenterConfig:
    """What every segmenter has; travels in the checkpoint. A model's config derives from it and adds its own fields."""

    body: str = "resnet50"                          # of the encoder; resnet18 and resnet34 for small machines, resnet101
    # picture
    image_size: int = 448                           # pixels a side, for training and for `probabilities`; 0: each picture's own size
    image_mean: tuple[float, ...] = IMAGE_MEAN      # of ImageNet, RGB in 0..1
    image_std: tuple[float, ...] = IMAGE_STD
    # losses, layers/segmentation_losses.py; the crack paper gives alpha, beta, gamma and delta no value: 1
    bce_weight: float = 1.0                         # alpha, one class
    dice_weight: float = 1.0                        # beta, one class
    ce_weight: float = 1.0                          # gamma, several classes
    multiclass_dice_weight: float = 1.0             # delta, several classes
    class_weights: str = "inverse"                  # of the cross-entropy: inverse (of the class's frequency, crack paper) | none


class Segmenter(nn.Module):
    """The contract of the segmentation models. num_classes: classes + 1, label 0 is background. config: a SegmenterConfig.

    A model derives from it, creates its layers after `super().__init__`, ends its `__init__` with `self.to(memory_format=
    torch.channels_last)` and defines `logits`. Its parameters sit directly on it: their names are the published weights'.
    """

    task = "segmentation"
    iou_types = ()                                  # what a detector is scored by: pixels are no instances
    finish_fields = ()                              # config fields that are read after the network: they may change once it is trained
    stride = 32                                     # `logits` takes heights and widths that are multiples of it
    smallest_side = 1                               # ... and at least this, where the network needs more than one stride

    def __init__(self, num_classes, config, name):
        super().__init__()
        self.check_config(config)
        self.name = name
        self.num_classes = num_classes
        self.config = config
        # buffers move with the model; not persistent: the published state_dicts have no such entries
        self.register_buffer("image_mean", torch.tensor(config.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(config.image_std).view(3, 1, 1), persistent=False)
        self.is_made_on_meta = self.image_mean.is_meta
        self.register_load_state_dict_post_hook(refill_statistics)

    def check_config(self, config):
        """ValueError for a value that the model cannot have; a model with fields of its own adds their checks."""
        check_config(config)

    def logits(self, x):
        """x: [N, 3, H, W] float, normalised, channels_last; H and W multiples of `stride`. Returns [N, C, H, W] float."""
        raise NotImplementedError(f"{type(self).__name__} has to define logits(x)")

    def compile_static(self, backend):
        """Gives torch.compile what has shapes that follow from the pictures' sizes alone: the whole network."""
        self.logits = types.MethodType(torch.compile(type(self).logits, backend=backend), self)

    def forward(self, images, targets=None):
        """images: list of [3, H, W], or one tensor [N, 3, H, W]; uint8, or float in 0..1; all of one size.

        Training: targets, a list of dicts with label_map [H, W] uint8 or int64 (0 background, 1..K, 255 neither trains nor counts);
        returns {"loss_...": scalar}. Evaluation: returns logits [N, C, H, W] at the pictures' size (padded to the stride, then
        cropped back; nothing is resized). Raises ValueError for pictures or targets that do not fit, naming the picture.
        """
        if self.training:
            return self.losses(images, targets)
        batch, size = self.batch(images)
        return crop(self.logits(batch), size)

    def losses(self, images, targets):
        """The training losses, {"loss_...": scalar}."""
        batch, size = self.batch(images)
        label_maps = self.label_maps(targets, len(batch), size)
        return self.losses_of(crop(self.logits(batch), size), label_maps)

    def loss_counts(self, images, targets):
        """What the losses of these pictures are divided by, {name: tensor}; the network is not run."""
        return loss_counts(self.label_maps(targets, len(images), tuple(images[0].shape[-2:])), self.num_classes)

    def losses_of(self, logits, label_maps):
        """logits: [N, C, H, W]; label_maps: [N, H, W] int64. A model with more outputs than one overrides `losses`."""
        return segmentation_losses(logits, label_maps, self.config)

    @torch.no_grad()
    def probabilities(self, images, at="native"):
        """Returns a list of [C, h, w] float in 0..1, one a picture; C = 1 (sigmoid) or K + 1 (softmax, the sum over C is 1).

        images: list of [3, H, W] of any sizes. Each is resized to config.image_size x config.image_size (bilinear, antialiased; 0
        leaves it as it is) and run. at: "native", h and w are the picture's own (the *logits* are interpolated, bilinearly, so an
        edge is as sharp as the network knows it), or "model", h and w are those that the network saw.
        """
        self.check_evaluating("probabilities")
        if at not in RESOLUTIONS:
            raise ValueError(f"at: expected one of {', '.join(RESOLUTIONS)}, got {at!r}")
        check_pictures(images)
        results = []
        for group in self.batches_of_one_size(images):
            for image, logits in zip(group, self.logits_at_model_size(group).float()):
                if at == "native" and logits.shape[-2:] != image.shape[-2:]:
                    logits = F.interpolate(logits[None], size=image.shape[-2:], mode="bilinear", align_corners=False)[0]
                results.append(probabilities_of(logits))
        return results

    def batches_of_one_size(self, images):
        """The pictures as lists that can be stacked: all together once resized, one by one where they keep sizes that differ."""
        if self.config.image_size or all(image.shape[-2:] == images[0].shape[-2:] for image in images):
            return [list(images)]
        return [[image] for image in images]

    def logits_at_model_size(self, images):
        batch, size = self.batch_at_model_size(images)
        return crop(self.logits(batch), size)

    def batch_at_model_size(self, images):
        """`batch` of the pictures resized to config.image_size."""
        side = self.config.image_size
        return self.batch([resize_picture(image.to(self.image_mean.device, non_blocking=True), (side, side)) if side else image
                           for image in images])

    @torch.no_grad()
    def losses_and_probabilities(self, images, targets):
        """Validation in one pass, in evaluation mode, of pictures that are at the model's size already: (dict of losses, list of
        [C, h, w] probabilities)."""
        self.check_evaluating("losses_and_probabilities")
        batch, size = self.batch(images)
        label_maps = self.label_maps(targets, len(batch), size)
        logits = crop(self.logits(batch), size).float()
        return self.losses_of(logits, label_maps), [probabilities_of(each) for each in logits]

    def check_evaluating(self, name):
        if self.training:
            raise ValueError(f"{name}: expected the model in evaluation mode, got training; call model.eval() first")

    def batch(self, images):
        """(batch [N, 3, H, W] of the model's dtype, channels_last, normalised, zeros right of and below the pictures; (h, w) of the
        pictures)."""
        check_pictures(images)
        sizes = [tuple(image.shape[-2:]) for image in images]
        if any(size != sizes[0] for size in sizes):           # no set: sizes may be symbols (torch.export)
            odd = next(i for i, size in enumerate(sizes) if size != sizes[0])
            raise ValueError(f"images: expected pictures of one size, got images[0] {list(sizes[0])} and images[{odd}] {list(sizes[odd])}; "
                             "set the config field image_size, take batches of one picture, or call model.probabilities(images)")
        h, w = sizes[0]
        H, W = (self.padded_side(side) for side in (h, w))
        device = self.image_mean.device
        batch = torch.zeros((len(images), H, W, 3), dtype=self.image_mean.dtype, device=device).permute(0, 3, 1, 2)   # channels_last
        for i, image in enumerate(images):
            full_scale = 1.0 if image.is_floating_point() else 255.0
            image = image.to(device, non_blocking=True)
            batch[i, :, :h, :w].copy_(image).sub_(self.image_mean * full_scale).div_(self.image_std * full_scale)
        return batch, (h, w)

    def padded_side(self, side):
        return math.ceil(max(side, self.smallest_side) / self.stride) * self.stride

    def label_maps(self, targets, count, size):
        """The targets' label maps as one tensor [N, H, W] int64 on the model's device; ValueError that names the picture."""
        if targets is None or len(targets) != count:
            raise ValueError(f"targets: expected one dict with label_map for each of the {count} pictures, got "
                             f"{None if targets is None else len(targets)}")
        for i, target in enumerate(targets):
            if not isinstance(target, collections.abc.Mapping):
                raise ValueError(f"targets[{i}]: expected a dict with label_map, got {type(target).__name__}; wrap a label map as "
                                 '{"label_map": label_map}')
            check_label_map(f"targets[{i}] (picture {target.get('file', target.get('image_id', i))})", target, size, self.num_classes)
        device = self.image_mean.device
        return torch.stack([target["label_map"].to(device, non_blocking=True).long() for target in targets])


def logit_channels(num_classes):
    """Channels of the logits: 1 for one damage class (num_classes 2), else num_classes."""
    return 1 if num_classes == 2 else num_classes


def probabilities_of(logits):
    """logits: [..., C, h, w] -> probabilities of the same shape: sigmoid where C is 1, else softmax over C."""
    return logits.sigmoid() if logits.shape[-3] == 1 else logits.softmax(-3)


def label_map_of(probabilities, threshold=0.5):
    """probabilities: [C, h, w]. Returns uint8 [h, w]: one class (C = 1) where its probability is above `threshold`; several: the
    likeliest, whatever the threshold."""
    if probabilities.shape[0] == 1:
        return (probabilities[0] > threshold).to(torch.uint8)
    return probabilities.argmax(0).to(torch.uint8)


def resize_picture(image, size):
    """image: [3, H, W] uint8 or float in 0..1; returns it at size (h, w), float in 0..1: bilinear, antialiased where it shrinks."""
    image = image.float() if image.is_floating_point() else image.float() / 255
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True)[0]


def crop(x, size):
    """x: [N, C, H, W] without the padding: [N, C, h, w] for size (h, w)."""
    return x[:, :, :size[0], :size[1]]


def check_config(config):
    """ValueError with field, expected, got and the fix, for what no segmenter can have."""
    if config.image_size < 0:
        raise ValueError(f"image_size: expected pixels a side, or 0 for each picture's own size, got {config.image_size}; "
                         "the crack paper has 448")
    for field in ("image_mean", "image_std"):
        values = getattr(config, field)
        if len(values) != 3 or not all(math.isfinite(v) for v in values) or (field == "image_std" and min(values) <= 0):
            raise ValueError(f"{field}: expected 3 numbers{' above 0' if field == 'image_std' else ''}, one a colour, got {values}")
    for field in ("bce_weight", "dice_weight", "ce_weight", "multiclass_dice_weight"):
        if not 0 <= getattr(config, field) < math.inf:
            raise ValueError(f"{field}: expected 0 or more, got {getattr(config, field)}; 0 switches the term off")
    if config.class_weights not in CLASS_WEIGHTS:
        raise ValueError(f"class_weights: expected one of {', '.join(CLASS_WEIGHTS)}, got {config.class_weights!r}")


def check_pictures(images):
    """Raises ValueError with expected, got and the fix where `images` is not what a segmenter takes."""
    if isinstance(images, torch.Tensor) and images.dim() != 4:
        raise ValueError(f"images: expected a list of [3, H, W] tensors or one tensor [N, 3, H, W], got a tensor of shape "
                         f"{list(images.shape)}; wrap a single picture as [image]")
    if not isinstance(images, (list, tuple, torch.Tensor)) or len(images) == 0:
        raise ValueError("images: expected a non-empty list of [3, H, W] tensors or one tensor [N, 3, H, W], got "
                         f"{'none' if isinstance(images, (list, tuple, torch.Tensor)) else type(images).__name__}")
    for i, image in enumerate(images):
        if not isinstance(image, torch.Tensor) or image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            got = list(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"images[{i}]: expected a tensor [3, H, W] (RGB, channels first), got {got}; "
                             "for a numpy picture [H, W, 3] use torch.from_numpy(picture).permute(2, 0, 1)")
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise ValueError(f"images[{i}]: expected uint8 in 0..255 or float in 0..1, got {image.dtype}; convert with .to(torch.uint8)")


def check_label_map(where, target, size, num_classes):
    """One picture's label map: present, of the picture's size, whole numbers, labels that the model has. Values are read only while
    they lie on the CPU: on a GPU that would stall, so check (or load) there before moving."""
    if "label_map" not in target:
        raise ValueError(f"{where}: expected the key label_map, got {', '.join(target) or 'no keys'}")
    label_map = target["label_map"]
    if not isinstance(label_map, torch.Tensor):
        raise ValueError(f"{where}: expected label_map as a tensor, got {type(label_map).__name__}; convert it with torch.as_tensor")
    if tuple(label_map.shape) != tuple(size):
        raise ValueError(f"{where}: expected a label_map of the picture's size {list(size)}, got {list(label_map.shape)}; "
                         "resize picture and label map together")
    if label_map.dtype not in (torch.uint8, torch.int64):
        raise ValueError(f"{where}: expected a label_map of uint8 or int64, got {label_map.dtype}; convert with .to(torch.int64)")
    if not label_map.is_cpu:
        return
    unknown = (label_map != IGNORE) & ((label_map >= num_classes) | (label_map < 0))
    if unknown.any():
        values = label_map[unknown].unique()[:5].tolist()
        raise ValueError(f"{where}: expected labels 0 (background) to {num_classes - 1} and {IGNORE} (ignore), got {values}; "
                         "map the mask's values to labels first (python -m minidamage.data PATH lists them)")
