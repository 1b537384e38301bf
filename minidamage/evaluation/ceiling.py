"""What perfect masks of M x M pixels would score: the truth itself, put through the mask head's resolution and pasted back.

A Mask R-CNN that found every class and box and learned its 28 x 28 targets to the last bit would get this AP: small, thin and ragged
outlines are lost in the head's grid, and in the pasting, whose boxes are cut to whole pixels (ops/paste_masks.py). What an overfitted model
scores is to be compared with this, not with 1.
"""
import os

import torch

from minidamage import masks, ops, run_folder
from minidamage.data import load_dataset
from minidamage.evaluation.common import without_nan, writing
from minidamage.layers.roi_heads import project_masks_on_boxes
from minidamage.metrics import tables
from minidamage.metrics.detection import CocoEvaluator


LARGEST = 1024                                                # pixels a side: of one mask the head's own numbers take 4 MB


def check_size(size):
    """ValueError for a --ceiling that no mask head has."""
    if not 2 <= size <= LARGEST:
        raise ValueError(f"--ceiling: expected the mask head's resolution, 2 to {LARGEST} pixels a side such as 28, got {size}")


def mask_ceiling(records, class_names, size=28):
    """A CocoEvaluator that holds the truth, and as detections its own masks, sampled to size x size inside their boxes as in training and
    pasted back, all of score 1. records: with outlines; crowd regions are truth, and no detection is made of them.

    At the pictures' own size: training targets are cut from the resized picture's masks, which loses more where that is smaller. Raises
    ValueError without outlines.
    """
    if not any(mask is not None for record in records for mask in record.masks):
        raise ValueError(f"the ceiling of masks expects objects with outlines, got none in {len(records)} pictures")
    evaluator, ids = CocoEvaluator(class_names, ("bbox", "segm")), [record.image_id for record in records]
    for i, record in zip(ids if len(set(ids)) == len(ids) else range(len(ids)), records):      # parts of two files may share ids
        rles = record.rles()
        evaluator.add_truth(i, record.boxes, record.labels, rles, record.crowd, record.area, record.height, record.width)
        single = [k for k, crowd in enumerate(record.crowd) if not crowd]
        pasted = [through_the_head(rles[k], record.boxes[k], (record.height, record.width), size) for k in single]
        evaluator.add_detections(i, record.boxes[single], [1.0] * len(single), record.labels[single], pasted)
    return evaluator


def through_the_head(rle, box, picture_size, size):
    """One mask as an RLE, sampled to size x size inside its box [4] xyxy and pasted back at threshold 0.5: an RLE again."""
    dense = torch.from_numpy(masks.decode(rle))[None]                                                      # [1, H, W]
    box = torch.as_tensor(box, dtype=torch.float32)[None]                                                  # [1, 4]
    first, valid = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    small = project_masks_on_boxes([dense], box[None], first, valid, size)                                 # [1, size, size]
    return ops.paste_masks_rle(small[:, None], box, picture_size)[0]


def report(size, data, part, out, **reading):
    """Prints (and with `out` writes) the ceiling of a data set's parts, or of one of them: what evaluate.py --ceiling does."""
    dataset = load_dataset(data, **reading)
    parts = {name: records for name, records in dataset.parts.items() if records}
    if part not in (None, "all", *parts):
        raise ValueError(f"--part {part}: {data} has {', '.join(f'{name} ({len(records)})' for name, records in parts.items())}; "
                         "take one of these, or leave --part out")
    parts = parts if part is None else {"all": sum(parts.values(), [])} if part == "all" else {part: parts[part]}
    results = {name: mask_ceiling(records, dataset.class_names, size).evaluate() for name, records in parts.items()}
    columns = ("part", "pictures", "objects", "mask AP", "AP50", "AP75", "small", "medium", "large")
    rows = [(name, len(parts[name]), sum(int((~record.crowd).sum()) for record in parts[name]),
             *(f"{result.stats[f'segm/{number}']:.3f}" for number in ("AP", "AP50", "AP75", "APs", "APm", "APl")))
            for name, result in results.items()]
    caption = f"The truth's own masks at {size}x{size}, pasted back: what a perfect mask head would score"
    print("\n" + tables.as_text(caption, columns, rows))
    if out:
        with writing(out):
            run_folder.write_json(os.path.join(out, "results.json"), without_nan(
                {"command": run_folder.command_line(), "data": data, "ceiling": size, "parts": {n: r.stats for n, r in results.items()}}))
        print(f"written: {os.path.join(out, 'results.json')}")
    return 0
