"""Scores a trained model, or anybody's COCO results.

    python evaluate.py                                                   the newest run's best.pt on that run's own test part
    python evaluate.py --checkpoint runs/damagenet-demo-001 --part val
    python evaluate.py --checkpoint best.pt --data other/                another data set, same class names
    python evaluate.py --truth gt.json --detections dt.json              two COCO files, no model

With a model, writes `evaluation-<part>/` into the run's folder: results.json (every number), detections.json and truth.json (COCO; the
last command on them gives the same numbers), report.html, and the pictures of the worst predictions.
"""
import argparse
import contextlib
import os
import sys

import numpy as np
import torch

from minidamage import masks, run_folder
from minidamage.checkpoint import choose_device, load_checkpoint, score_thresholds
from minidamage.config import apply_settings
from minidamage.data import DetectionDataset, load_dataset
from minidamage.data.split import from_names
from minidamage.metrics import tables
from minidamage.metrics.detection import evaluate_coco_files, evaluate_model
from minidamage.metrics.segmentation import PixelEvaluator
from minidamage.progress import Progress
from minidamage.training import iou_types
from minidamage.visualize.overlay import draw_detections, draw_truth, grid, save_picture
from minidamage.visualize.plots import precision_recall_plot
from minidamage.visualize.report import Picture, Table, write_report


def main(argv=None):
    """Returns the exit code: 0, 1 where something could not be read or written, 2 for a mistake in what was asked."""
    args = parse_arguments(argv)
    try:
        check_numbers(args)
        if args.truth or args.detections:
            return score_files(args)
        return score_model(args)
    except ValueError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def writing(folder):
    """Makes the folder; an OSError inside then says that it was met while writing, and where."""
    try:
        os.makedirs(folder, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(f"could not write the results into {folder}: {error}") from error


def check_numbers(args):
    for flag, meaning in (("draws", "0 (no intervals) or more draws"), ("worst", "0 or more pictures"), ("workers", "0 or more processes")):
        value = getattr(args, flag)
        if value is not None and value < 0:
            raise ValueError(f"--{flag}: expected {meaning}, got {value}")


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description="Score a trained model on a data set, or two COCO files.")
    add = parser.add_argument
    add("--checkpoint", default="", metavar="F", help="a .pt file or a run folder (default: best.pt of the newest run under runs/)")
    add("--data", metavar="D", help="data set to score on (default: the one the run was trained on)")
    add("--part", choices=("test", "val", "train", "all"), 
        help="which part of it (default: test; of another data set without parts, all of it)")
    add("--score", type=float, metavar="S", help="lowest score of a finding for pixel metrics, alarms and pictures, 0 to 1 (default: the "
        "checkpoint's threshold of each class, chosen on its validation part)")
    add("--draws", type=int, default=500, metavar="N", 
        help="bootstrap draws of pictures for the intervals of AP, 0 = none (default: %(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change how the checkpoint's masks are finished, for example "
        "fill_holes=false remove_islands=false mask_threshold=0.5; fields that shape its weights stay")
    add("--worst", type=int, default=8, metavar="N", help="how many of the worst predictions to draw (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--workers", type=int, help="processes that read pictures (default: 0 on a CPU, 4 with a GPU)")
    add("--out", metavar="DIR", help="folder for the results (default: evaluation-<part>/ beside the checkpoint; files: none)")
    add("--truth", metavar="GT.JSON", help="COCO ground truth: score --detections against it, without a model")
    add("--detections", metavar="DT.JSON", help="COCO results, a list of detections")
    add("--iou-type", choices=("bbox", "segm"), help="score only boxes or only masks of the files (default: what they hold)")
    add("--no-categories", action="store_true", help="files: ignore categories, as for proposals")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------------------- two files

def score_files(args):
    """Prints (and with --out writes) the numbers of --truth and --detections."""
    if not (args.truth and args.detections):
        raise ValueError("expected both --truth gt.json and --detections dt.json, got only one of them")
    result = evaluate_coco_files(args.truth, args.detections, args.iou_type or "auto", not args.no_categories)
    print("\n\n".join(tables.as_text(*table) for table in (*tables.coco_tables(result), *tables.class_tables(result))))
    for cause in result.causes:
        print(f"note: {cause}")
    if args.out:
        numbers = {"command": run_folder.command_line(), "truth": args.truth, "detections": args.detections, "stats": result.stats,
                   "per_class": result.per_class, "voc": {t: result.voc_ap(t) for t in result.scored}, "notes": result.causes}
        with writing(args.out):
            run_folder.write_json(os.path.join(args.out, "results.json"), without_nan(numbers))
        print(f"written: {os.path.join(args.out, 'results.json')}")
    return 0


# ---------------------------------------------------------------------------------------------------------- a model

def score_model(args):
    """Runs the checkpoint over the part, prints the tables and writes the evaluation folder."""
    device = choose_device(args.device)
    path = run_folder.find_checkpoint(args.checkpoint, "runs", "best.pt")
    model, checkpoint = load_checkpoint(path, device)
    if model.task != "detection":
        raise ValueError(f"{path}: expected a detection model, got {checkpoint['model']} ({model.task})")
    if args.set:
        model.config = change_finish(model, args.set)
    names, thresholds = tuple(checkpoint["class_names"]), score_thresholds(checkpoint, args.score)
    dataset, part, records, own = choose_pictures(args, checkpoint, path)
    outlines = [mask is not None for record in records for mask in record.masks]
    with_masks = "segm" in iou_types(model) and (any(outlines) or not outlines)
    print(f"{checkpoint['model']} from {path} on {device}, {len(records)} pictures ({part} of {dataset.path})")

    samples, pixels, judged, unreadable = Samples(records, with_masks), PixelEvaluator(names), [], []
    progress = Progress(len(samples), device=device)

    def on_picture(image, truth, detection):
        kept = confident(detection, thresholds, names)
        if with_masks:
            outlines, crowds = ([r for r, c in zip(truth["rles"], truth["iscrowd"]) if c == crowd] for crowd in (False, True))
            pixels.add_instances(truth["labels"][~truth["iscrowd"]], outlines, kept["labels"], kept["masks"], *image.shape[-2:], crowds)
        judged.append((truth["index"], kept))
        unreadable.extend([truth["unreadable"]] if truth["unreadable"] else [])
        progress.note(f"{len(judged)}/{len(samples)} pictures")

    workers = args.workers if args.workers is not None else 4 if device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(samples, batch_size=None, num_workers=workers)
    metrics, result, evaluator = evaluate_model(model, loader, names, ("bbox", "segm") if with_masks else ("bbox",), on_picture)
    progress.clear()
    pixel_result = pixels.evaluate() if with_masks else None

    wanted = [f"{iou_type}/{number}" for iou_type in result.scored for number in ("AP", "AP50")] if args.draws else []
    intervals = {name: result.interval(name, samples=args.draws) for name in wanted}

    notes = [*unreadable_note(unreadable, len(records)), *result.causes]
    shown = show(result, pixel_result, thresholds, metrics, intervals, notes)
    of_set = "" if own else "-" + os.path.splitext(os.path.basename(os.path.abspath(dataset.path)))[0]
    folder = args.out or os.path.join(os.path.dirname(os.path.abspath(path)), f"evaluation{of_set}-{part}")
    numbers = {**collect(result, pixel_result, thresholds, metrics, intervals, notes), "unreadable": unreadable}
    about = {"command": run_folder.command_line(), "checkpoint": path, "model": checkpoint["model"],
             "epoch": checkpoint.get("train", {}).get("epoch"), "data": os.path.abspath(dataset.path), "part": part, "set": args.set,
             "pictures": len(records), **run_folder.environment(device)}
    files = {samples.image_id(i): r.file for i, r in enumerate(records)}
    with writing(folder):
        run_folder.write_json(os.path.join(folder, "results.json"), without_nan({**about, **numbers}))
        run_folder.write_json(os.path.join(folder, "detections.json"), evaluator.coco_detections(dataset.category_ids), indent=None)
        run_folder.write_json(os.path.join(folder, "truth.json"), evaluator.coco_truth(dataset.category_ids, files), indent=None)
        pictures = draw_worst(folder, samples, judged, result, pixel_result, thresholds, names, args.worst)
        report(folder, shown, result, about, pictures)
    print(f"\nwritten: {os.path.join(folder, 'report.html')}, results.json, detections.json, truth.json"
          + f" and {len(pictures)} pictures of the worst predictions" * bool(pictures))
    return 0


class Samples(torch.utils.data.Dataset):
    """Pictures and their truth in original pixels, masks as run lengths (never dense: a 12-megapixel picture with 20 objects is 240 MB)."""

    def __init__(self, records, with_masks):
        self.records, self.with_masks, self.pictures = records, with_masks, DetectionDataset(records)
        self.pictures.with_masks = False
        ids = [r.image_id for r in records]
        self.ids = ids if len(set(ids)) == len(ids) else list(range(1, len(ids) + 1))        # parts of two files may share ids

    def __len__(self):
        return len(self.records)

    def image_id(self, index):
        return self.ids[index]

    def __getitem__(self, index):
        record, (image, target) = self.records[index], self.pictures[index]
        truth = {"boxes": record.boxes, "labels": record.labels, "iscrowd": np.asarray(record.crowd, bool), "area": record.area,
                 "image_id": self.ids[index], "index": index, "file": record.file, "unreadable": target["replaced"]}
        if self.with_masks:
            outlines = [[box[[0, 1, 2, 1, 2, 3, 0, 3]]] if mask is None else mask for mask, box in zip(record.masks, record.boxes)]
            truth["rles"] = [masks.segmentation_to_rle(outline, record.height, record.width) for outline in outlines]
        return image, truth


def change_finish(model, settings):
    """The model's config with --set applied; ValueError for a field that is more than the finish of its masks."""
    for setting in settings:
        if setting.partition("=")[0] not in model.finish_fields:
            raise ValueError(f"--set {setting}: a trained {model.name} takes {', '.join(model.finish_fields)} here; its other fields are "
                             "settled when it is trained (train.py --set)")
    config = apply_settings(model.config, settings)
    model.check_config(config)
    return config


def choose_pictures(args, checkpoint, path):
    """(Dataset, part's name, records, whether the set is the run's own). The run's split where it is; else the set's own parts."""
    trained_on = checkpoint.get("run", {}).get("data")
    where = args.data or trained_on
    if not where:
        raise ValueError(f"{path} does not say what it was trained on; name the data set with --data")
    if not args.data and not os.path.exists(where):
        raise ValueError(f"{where}: the data set that {path} was trained on is not there any more; name its new place, or another set, "
                         "with --data")
    dataset = load_dataset(where, class_names=checkpoint["class_names"])
    split, own = checkpoint.get("split") or {}, False
    if split and (not args.data or is_own(dataset, split, trained_on)):
        parts, own = from_names(dataset, split), True
    else:
        parts = dataset.parts
    parts = {name: records for name, records in parts.items() if records}
    part = args.part or ("test" if own or "test" in parts else "val" if "val" in parts else "all")
    if part == "all":
        return dataset, part, [r for records in parts.values() for r in records], own
    if part not in parts:
        raise ValueError(f"--part {part}: {where} has {', '.join(f'{name} ({len(r)})' for name, r in parts.items())}"
                         f"{'' if own else '; it is not the set the run was split from'}; take one of these, or --part all")
    return dataset, part, parts[part], own


def is_own(dataset, split, trained_on):
    """Whether a data set given by --data is the one that the run was split from, at its own place, moved or copied. Equal file names
    alone do not say so (every VehiDE-like set has an image/1.jpg): while the run's own set is there, its files must be of equal size."""
    try:
        records = [record for part in from_names(dataset, split).values() for record in part]
    except ValueError:
        return False
    folder = lambda path: os.path.realpath(path if os.path.isdir(path) else os.path.dirname(path) or ".")
    if not trained_on or not os.path.exists(trained_on):
        print(f"note: {dataset.path} has every picture of the run's split by name: taken for the run's own set in a new place")
        return True
    here, there = folder(dataset.path), folder(trained_on)
    places = [(record.file, os.path.join(there, os.path.relpath(os.path.realpath(record.file), here))) for record in records]
    return here == there or all(os.path.isfile(old) and os.path.getsize(old) == os.path.getsize(new) for new, old in places)


def confident(detection, thresholds, names):
    """The detections at or above their class's threshold, as numpy."""
    scores, labels = detection["scores"].float().cpu().numpy(), detection["labels"].cpu().numpy()
    kept = np.flatnonzero(scores >= np.array([thresholds[name] for name in names])[labels - 1])
    return {"boxes": detection["boxes"].float().cpu().numpy()[kept], "scores": scores[kept], "labels": labels[kept],
            "masks": [detection["masks"][i] for i in kept] if "masks" in detection else None}


# ---------------------------------------------------------------------------------------------------------- what comes out

def unreadable_note(files, pictures):
    """[a sentence with every file], or [] where all pictures could be read."""
    return [f"{len(files)} of {pictures} pictures cannot be read; each is scored as a black one, its objects missed: {', '.join(files)}"] \
        if files else []


def show(result, pixels, thresholds, metrics, intervals, notes):
    """Prints all tables and returns them for the report: [(heading, [table or text])]."""
    alarms = result.false_alarms(thresholds)
    alarm_text = (f"{alarms['with findings']:.1%} of the {alarms['pictures']} pictures without damage have a finding, "
                  f"{alarms['findings']:.2f} findings a picture") if alarms["pictures"] else "no undamaged picture in this part"
    cost = (f"{metrics['ms per picture']:.1f} ms a picture ({metrics['pictures per second']:.2f} a second; the median picture), "
            f"peak memory {metrics['peak memory MB']:.0f} MB")
    accuracy = [*tables.coco_tables(result), *tables.class_tables(result)]
    if intervals:
        accuracy.insert(2, tables.interval_table(intervals, len(result.image_ids)))
    shown = [("Accuracy", accuracy), ("In use", [tables.operating_table(result, thresholds)]), ("False alarms", [alarm_text])]
    if pixels:
        shown.append(("Pixels", tables.pixel_tables(pixels)))
    shown.append(("Speed and memory", [cost]))
    if notes:
        shown.append(("Notes", notes))
    for heading, blocks in shown:
        are_texts = isinstance(blocks[0], str)
        print("\n" + ("\n" if are_texts else "\n\n").join(f"{heading}: {b}" if are_texts else tables.as_text(*b) for b in blocks))
    return shown


def collect(result, pixels, thresholds, metrics, intervals, notes):
    """Every number, for results.json."""
    cost = {name.replace(" ", "_"): metrics[name] for name in ("ms per picture", "pictures per second", "peak memory MB")}
    return {"stats": result.stats, "intervals": {name: (i.low, i.high) for name, i in intervals.items()}, "per_class": result.per_class,
            "voc": {t: result.voc_ap(t) for t in result.scored}, "thresholds": thresholds,
            "at_thresholds": result.at_thresholds(thresholds), "best_f1": result.best_f1(), "false_alarms": result.false_alarms(thresholds),
            "pixels": pixels.stats if pixels else {}, "pixels_per_class": pixels.per_class if pixels else {}, **cost, "notes": notes}


def draw_worst(folder, samples, judged, result, pixels, thresholds, names, count):
    """Writes worst-01.jpg ... (truth beside prediction) and returns their paths and captions: most wrong findings and misses first,
    among equals the smaller overlap."""
    wrong = result.errors_by_picture(thresholds)
    position = {image_id: i for i, image_id in enumerate(result.image_ids)}
    overlap = np.nan_to_num(pixels.per_image("IoU"), nan=0.0) if pixels else np.zeros(len(judged))
    order = sorted(range(len(judged)), key=lambda j: (-sum(wrong[position[samples.image_id(judged[j][0])]]), overlap[j], j))
    drawn = []
    for rank, j in enumerate(order[:count], 1):
        index, kept = judged[j]
        false, missed = wrong[position[samples.image_id(index)]]
        if false + missed == 0:
            break
        image, truth = samples[index]
        left = draw_truth(image, truth["boxes"], truth["labels"], truth.get("rles"), names, truth["iscrowd"])
        right = draw_detections(image, kept["boxes"], kept["labels"], kept["scores"], kept["masks"], names)
        caption = f"{os.path.basename(truth['file'])}: {false} false, {missed} missed"
        path = os.path.join(folder, f"worst-{rank:02d}.jpg")
        save_picture(path, grid([left, right], ["truth", "prediction"], columns=2, title=caption))
        drawn.append((path, caption))
    return drawn


def report(folder, shown, result, about, pictures):
    """Writes report.html: the printed tables, precision over recall, the worst predictions, how it was made."""
    as_block = lambda block: block if isinstance(block, str) else Table(block[1], block[2], block[0])
    blocks = [(heading, [as_block(block) for block in content]) for heading, content in shown]
    for iou_type in result.scored:
        precision = result.arrays[iou_type]["precision"][0, :, :, 0, -1]                     # IoU 0.5, all sizes: [R, K]
        recall = result.protocol.recall_thresholds
        curves = {name: (recall, precision[:, k]) for k, name in enumerate(result.class_names) if precision[0, k] > -1}
        if curves:
            title = f"Precision and recall, {tables.KINDS[iou_type]} IoU 0.5"
            blocks[0][1].append(Picture(precision_recall_plot(curves, title), title))
    if pictures:
        blocks.append(("Worst predictions", [Picture(path, caption, wide=True) for path, caption in pictures]))
    facts = {name: str(value) for name, value in about.items() if not isinstance(value, dict)}
    blocks.append(("How this was made", [facts, *(value for value in about.values() if isinstance(value, dict))]))
    write_report(os.path.join(folder, "report.html"), f"{about['model']} on {about['part']} of {os.path.basename(about['data'])}", blocks,
                 f"{about['pictures']} pictures, `{about['checkpoint']}`")


def without_nan(value):
    """NaN is not JSON: None instead."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped, nothing was written", file=sys.stderr)
        sys.exit(130)
