"""A whole detector as one graph (torch.export) for pictures of one size, that runs without the model's code.

    python -m minidamage.export runs/damagenet-demo-001/best.pt detector.pt2 --height 480 --width 640

    import torch, minidamage.ops                                  # the ops' names and kernels; nothing else of this package is called
    detector = torch.export.load("detector.pt2").module()
    with torch.no_grad():
        found = detector(images)                                  # [N, 3, 480, 640] uint8 -> boxes, scores, labels, valid, masks

Resizing, normalisation, NMS and the mask head are inside; everything has a fixed number of slots, of which `valid` says which count.

What cannot be exported, because its length depends on the data: lists without empty slots (`found["boxes"][i][found["valid"][i]]` makes
them), masks at the picture's size (`minidamage.ops.paste_masks_bool(masks, boxes, (H, W))` pastes a picture's masks), run lengths and what
works on them, such as DamageNet's hole filling. One program is for one size, batch and device; training is not exported.
"""
import argparse
import os
import sys

import torch
from torch import nn

from minidamage.checkpoint import check_out, choose_device, load_checkpoint
from minidamage.layers.detector import resize_boxes
from minidamage.layers.roi_heads import to_rois


class FixedSizeDetector(nn.Module):
    """A detector with slots in place of lists: images [N, 3, height, width], uint8 or float 0..1 -> dict of

    boxes [N, D, 4] xyxy in these pictures' pixels, scores [N, D], labels [N, D] int64 1..K, valid [N, D] bool, and with a mask branch
    masks [N, D, 1, M, M], the probabilities inside the boxes. D is the config's box_detections_per_img; the valid slots come first, best
    score first, the others hold zeros. The numbers are those of `model.detect(images, "raw")`.
    """

    def __init__(self, model, height, width):
        super().__init__()
        self.model, self.height, self.width = model, height, width

    def forward(self, images):
        if tuple(images.shape[1:]) != (3, self.height, self.width):
            raise ValueError(f"images: expected [N, 3, {self.height}, {self.width}], got {list(images.shape)}; resize them, or export "
                             "the model at this size")
        model, heads = self.model, self.model.roi_heads
        batch, _ = model.transform(list(images.unbind()))
        features = model.backbone(batch.tensors)
        proposals, _ = model.rpn(features, batch.tensors.shape[-2:], batch.sizes)
        N, slots = proposals.valid.shape
        found = heads.box_stage(features, proposals, batch.sizes, slice(None), [slots] * N)
        boxes, scores, labels, counts = (torch.stack(parts) for parts in zip(*found))
        valid = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        boxes, scores, labels = boxes.masked_fill(~valid[..., None], 0), scores.masked_fill(~valid, 0), labels.masked_fill(~valid, 0)
        boxes_in_picture = resize_boxes(boxes, batch.sizes[0], (self.height, self.width))
        result = {"boxes": boxes_in_picture, "scores": scores, "labels": labels, "valid": valid}
        if heads.mask_head is not None:
            masks = heads.mask_logits(features, to_rois(boxes), labels.flatten()).sigmoid()                # [N * D, M, M]
            result["masks"] = masks.view(*valid.shape, 1, *masks.shape[1:]).masked_fill(~valid[..., None, None, None], 0)
        return result


@torch.no_grad()
def exportable(model, height, width, batch_size=1):
    """A FixedSizeDetector, ready for torch.export.export(it, (images,)) with images [batch_size, 3, height, width].

    model: a detector in evaluation mode, on the device where the program will run. Raises ValueError for anything else.
    """
    if getattr(model, "task", "") != "detection" or model.training:
        raise ValueError(f"exportable: expected a detector in evaluation mode, got {type(model).__name__}"
                         f"{' in training; call model.eval() first' if model.training else ''}")
    if min(height, width, batch_size) < 1:
        raise ValueError(f"exportable: expected a height, a width and a batch of 1 or more, got {height}, {width} and {batch_size}")
    fixed = FixedSizeDetector(model, height, width).eval()
    fixed(torch.zeros(batch_size, 3, height, width, dtype=torch.uint8, device=model.transform.image_mean.device))   # anchors of this size
    return fixed


def export_detector(model, path, height, width, batch_size=1, dtype=torch.uint8):
    """Writes the program to `path` (.pt2) and returns it. dtype: of the pictures. The file is written beside and renamed."""
    fixed = exportable(model, height, width, batch_size)
    images = torch.zeros(batch_size, 3, height, width, dtype=dtype, device=model.transform.image_mean.device)
    with torch.no_grad():
        program = torch.export.export(fixed, (images,))
    partial = f"{path}.partial.pt2"                                   # torch warns of another ending
    try:
        torch.export.save(program, partial)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):                                   # a full disk, Ctrl-C
            os.remove(partial)
    return program


def main(argv=None):
    """Exit code: 0, 1 where the program could not be written, 2 for a mistake in what was asked."""
    parser = argparse.ArgumentParser(prog="python -m minidamage.export", description="A detector as one graph for one picture size.")
    add = parser.add_argument
    add("checkpoint", metavar="BEST.PT", help="a checkpoint that train.py wrote")
    add("out", metavar="OUT.PT2", help="the program; torch.export.load reads it")
    add("--height", type=int, required=True, help="pixels of the pictures that it will be given")
    add("--width", type=int, required=True, help="pixels of the pictures that it will be given")
    add("--batch-size", type=int, default=1, help="pictures a call (default: %(default)s)")
    add("--device", default="auto", help="where the program will run: cpu, cuda (default: cuda where there is one, else cpu)")
    args = parser.parse_args(argv)
    try:
        check_out(args.checkpoint, args.out)
        device = choose_device(args.device)
        model, _ = load_checkpoint(args.checkpoint, device)
        export_detector(model, args.out, args.height, args.width, args.batch_size)
    except (ValueError, OSError) as error:
        print(f"minidamage.export: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"{args.out}: {model.name} for {args.batch_size} x 3 x {args.height} x {args.width} uint8 on {device}; needs torch and "
          f"minidamage.ops ({os.path.getsize(args.out) / 2 ** 20:.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
