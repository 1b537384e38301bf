"""Scores every kept epoch of a run on its validation part and names the best (the car-damage segmentation project, section 6, figures 10,
11, 15 and 18: every epoch tested). The project picks on its test pictures; a number picked there is no result any more, so here it is
always the validation part."""
import copy
import os
import re
import shlex

import torch

from minidamage import run_folder
from minidamage.checkpoint import load_checkpoint
from minidamage.data import collate
from minidamage.evaluation.common import writing
from minidamage.evaluation.selection import choose_pictures
from minidamage.metrics import tables
from minidamage.progress import Progress
from minidamage.validation import add_picture, default_metric, evaluator_of, metrics_of, predict, validation_set

SHOWN = {"segmentation": ("pixel/IoU", "pixel/Dice", "pixel/mIoU", "pixel/accuracy", "any-damage/Dice", "any-damage/IoU"),
         "detection": ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")}


def score(run, device, args):
    """Prints a row an epoch, writes test-epochs.csv into the run, says which is best and how to use it. Returns 0.

    Raises ValueError where no epoch was kept.
    """
    kept = kept_epochs(run)
    args = copy.copy(args)
    args.part = "val"
    rows, select_by = [], None
    for path in kept:
        model, checkpoint = load_checkpoint(path, device)
        if select_by is None:
            dataset, _, records, own = choose_pictures(args, checkpoint, path)
            select_by = checkpoint.get("run", {}).get("recipe", {}).get("select_by") or default_metric(model)
            if not own:
                raise ValueError(f"{dataset.path} is not the set that {run} was split from; its epochs are judged on their own validation "
                                 "part")
            print(f"{checkpoint['model']} from {run} on {device}: {len(kept)} epochs, {len(records)} pictures (val of {dataset.path})")
        numbers = score_epoch(model, checkpoint["class_names"], records, device)
        epoch = int(re.search(r"epoch-(\d+)\.pt$", path)[1])
        rows.append({"epoch": epoch, **numbers})
        print(f"epoch {epoch}: loss {numbers['loss']:.4f}  " + "  ".join(f"{name} {numbers[name]:.4f}" for name in SHOWN[model.task]
                                                                         if name in numbers), flush=True)
    return finish(run, rows, select_by, SHOWN[model.task])


def kept_epochs(run):
    """Paths of epoch-001.pt, epoch-002.pt, ... in order."""
    if not os.path.isdir(run):
        raise ValueError(f"--test-epochs {run}: expected a run folder, there is none of that name")
    found = sorted((name for name in os.listdir(run) if re.fullmatch(r"epoch-\d+\.pt", name)), key=lambda name: int(name[6:-3]))
    if not found:
        raise ValueError(f"--test-epochs {run}: expected epoch-001.pt, epoch-002.pt, ... in it, found none; train with --keep-epochs")
    return [os.path.join(run, name) for name in found]


@torch.inference_mode()
def score_epoch(model, names, records, device):
    """{"loss", "pixel/IoU", ...} on the records, at the size that the model trains at, at 0.5; as train.py validates."""
    dataset, evaluator = validation_set(model, records), evaluator_of(model, names)
    total, progress = 0.0, Progress(len(dataset), device=device)
    for images, targets in torch.utils.data.DataLoader(dataset, batch_size=1, collate_fn=collate):
        losses, prediction = predict(model, images, targets)
        total += sum(float(value) for value in losses.values())
        add_picture(evaluator, targets[0], prediction, images[0].shape[-2:])
        progress.note(f"{targets[0]['index'] + 1}/{len(dataset)} pictures")
    progress.clear()
    return {"loss": total / max(len(records), 1), **metrics_of(evaluator.evaluate())}


def finish(run, rows, select_by, shown):
    shown = [name for name in shown if name in rows[0]]
    shown += [select_by] * (select_by not in (*shown, "loss"))
    print("\n" + tables.as_text("On the validation part, at the size it trains at", ["epoch", "loss", *shown],
                                [[row["epoch"], row["loss"], *(row[name] for name in shown)] for row in rows], digits=4))
    with writing(run):
        run_folder.write_metrics(os.path.join(run, "test-epochs.csv"), rows)
    known = [row for row in rows if row[select_by] == row[select_by]]
    if not known:
        raise ValueError(f"{run}: {select_by} is not a number in any epoch: the validation part has no damage to find")
    sign = -1 if select_by == "loss" else 1
    best = max(known, key=lambda row: (sign * row[select_by], -row["loss"]))
    path = os.path.join(run, f"epoch-{best['epoch']:03d}.pt")
    print(f"\nbest by {select_by}: epoch {best['epoch']} ({best[select_by]:.4f}); on the pictures kept for the report:\n"
          f"  python evaluate.py --checkpoint {shlex.quote(path)} --part test\nwritten: {os.path.join(run, 'test-epochs.csv')}")
    return 0
