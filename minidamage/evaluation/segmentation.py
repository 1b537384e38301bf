"""Scores a segmenter: at the size it works at and at the pictures' own, at 0.5 and at the threshold chosen on validation, each named.

Every picture goes through the network once. Its probabilities are scored against the truth at the model's size (nearest label) and,
interpolated, against the truth at the picture's own size; the first is what papers print, the second is what a user gets.
"""
import collections
import os
import time

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from minidamage import distributed, run_folder
from minidamage.checkpoint import score_thresholds
from minidamage.data import SegmentationDataset
from minidamage.data.label_maps import IGNORE
from minidamage.data.record import number_of
from minidamage.evaluation.common import (change_finish, cost_text, general_notes, relative_files, summary, without_nan, write_page,
                                          writing)
from minidamage.evaluation.occlusion import in_words, occluded
from minidamage.layers.segmenter import label_map_of, probabilities_of
from minidamage.metrics import tables
from minidamage.metrics.crack import CrackEvaluator, pixel_widths
from minidamage.metrics.measure import peak_memory, speed, synchronize
from minidamage.metrics.segmentation import PixelEvaluator, pooled_intervals
from minidamage.metrics.statistics import bootstrap
from minidamage.metrics.thresholds import ThresholdSweep
from minidamage.progress import Progress
from minidamage.visualize.label_maps import draw_errors, save_label_map
from minidamage.visualize.overlay import draw_label_map, grid, save_picture
from minidamage.visualize.plots import Series, line_plot
from minidamage.visualize.report import Picture

STATED = "at 0.5"                                             # of one class; several classes: the likeliest, whatever its probability
LIKELIEST = "likeliest class"
ERRORS_AT = 640                                               # pixels: the longer side of a picture of errors
IN_SHORT = ("IoU", "Dice", "precision", "recall", "mIoU")     # the summary
FEW, MOST = 0.01, 0.9                                         # shares of the damage found, and of the background called damage


def score(job):
    """Runs the segmenter over the job's pictures, prints the tables and writes the evaluation folder.

    Several processes: each runs its share of the pictures (and writes their maps), process 0 scores what all of them found.
    """
    if job.args.set:
        change_finish(job.model, job.args.set)                # raises: nothing of a segmenter is settled after training
    points, records = operating_points(job), job.records
    dataset = occluded(SegmentationDataset(records), job.args.occlude)
    sizes = {name: SizeScores(name, job.names, points, job.args.mm_per_px if name == "native" else None) for name in sizes_of(job)}
    unreadable, seconds, progress = [], [], Progress(len(dataset), device=job.device)
    maps = os.path.join(job.folder, "maps") if job.args.save_maps else None
    map_names = names_of_maps(records)

    loader = torch.utils.data.DataLoader(dataset, batch_size=None, sampler=distributed.shard(len(dataset)), num_workers=job.workers)
    for image, target in loader:
        synchronize(job.device)
        began = time.perf_counter()
        probabilities = at_both_sizes(job.model, image)
        synchronize(job.device)
        seconds.append(time.perf_counter() - began)
        truth = target["label_map"].numpy()
        for name, scores in sizes.items():
            scores.add(truth if name == "native" else nearest(truth, probabilities[name].shape[-2:]), probabilities[name])
        unreadable.append(target["replaced"])
        if maps:
            with writing(maps):
                label_map = label_map_of(probabilities["native"], list(points.values())[-1]).cpu().numpy()
                save_label_map(os.path.join(maps, f"{map_names[target['index']]}.png"), label_map, job.names)
        progress.note(f"{target['index'] + 1}/{len(dataset)} pictures")
    progress.clear()
    gathered = distributed.gather_to_main((sizes, unreadable, seconds))
    if gathered is None:
        return
    sizes = {name: SizeScores.joined([each[name] for each, _, _ in gathered]) for name in sizes}
    unreadable, seconds = (distributed.interleave(lists) for lists in list(zip(*gathered))[1:])
    unreadable = [file for file in unreadable if file]
    finish(job, sizes, points, {**speed(seconds), "peak memory MB": peak_memory(job.device)}, unreadable)


def operating_points(job):
    """{name: threshold}: 0.5, and the one in use where it is another: --score, or the checkpoint's, chosen on validation."""
    thresholds = score_thresholds(job.checkpoint, job.args.score, job.model.task)
    if len(job.names) > 1:
        return {LIKELIEST: 0.5}
    threshold = thresholds[job.names[0]]
    source = "--score" if job.args.score is not None else "chosen on validation"
    return {STATED: 0.5} if threshold == 0.5 else {STATED: 0.5, f"at {threshold:g} ({source})": threshold}


def sizes_of(job):
    """("model", "native"), or ("native",) alone where all pictures have the model's size, or the model takes each at its own."""
    side = job.model.config.image_size
    return ("native",) if not side or all(r.height == r.width == side for r in job.records) else ("model", "native")


def at_both_sizes(model, image):
    """{"model", "native": [C, h, w]}: what model.probabilities gives at either size, from one pass. image: uint8 [3, H, W]."""
    with torch.inference_mode():
        logits = model.logits_at_model_size([image]).float()
        native = logits if logits.shape[-2:] == image.shape[-2:] else F.interpolate(logits, size=image.shape[-2:], mode="bilinear",
                                                                                    align_corners=False)
        return {"model": probabilities_of(logits)[0], "native": probabilities_of(native)[0]}


def nearest(labels, size):
    """The label map [H, W] at another size (h, w), as it is for training."""
    return labels if labels.shape == tuple(size) else np.asarray(Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST))


def names_of_maps(records):
    """A name for each picture's map, all different: the picture's without its ending, with a number where an earlier one has that."""
    taken, numbers, names = set(), collections.Counter(), []
    for record in records:
        stem = name = os.path.splitext(os.path.basename(record.file))[0]
        while name.lower() in taken:                          # some file systems do not tell A.png from a.png
            numbers[stem.lower()] += 1
            name = f"{stem}-{numbers[stem.lower()] + 1}"
        taken.add(name.lower())
        names.append(name)
    return names


class SizeScores:
    """All metrics at one of the two sizes. points: {name: threshold}."""

    def __init__(self, size, names, points, mm_per_px):
        self.size, self.points = size, points
        self.pixels = {point: PixelEvaluator(names) for point in points}
        self.cracks = {point: CrackEvaluator(mm_per_px=mm_per_px) for point in points}
        self.sweep = ThresholdSweep()
        self.shapes = set()

    @classmethod
    def joined(cls, several):
        """One of several, each with every n-th picture (distributed.shard), in the pictures' order. The first one is made it."""
        first = several[0]
        for point in first.points:
            PixelEvaluator.joined([scores.pixels[point] for scores in several])
            CrackEvaluator.joined([scores.cracks[point] for scores in several])
        ThresholdSweep.joined([scores.sweep for scores in several])
        first.shapes = set().union(*(scores.shapes for scores in several))
        return first

    def add(self, truth, probabilities):
        """truth: uint8 [h, w], 255 is not judged; probabilities: [C, h, w]."""
        ignore = truth == IGNORE
        judged = np.where(ignore, 0, truth)
        damaged = judged > 0
        widths = pixel_widths(damaged) if damaged.any() else None
        self.sweep.add(probabilities[0] if len(probabilities) == 1 else 1 - probabilities[0], judged, ignore)
        for point, threshold in self.points.items():
            found = label_map_of(probabilities, threshold).cpu().numpy()
            self.pixels[point].add_label_maps(judged, found, ignore)
            self.cracks[point].add(judged, found, ignore, widths)
        self.shapes.add(truth.shape)

    def evaluate(self, draws):
        self.pixel = {point: evaluator.evaluate() for point, evaluator in self.pixels.items()}
        self.crack = {point: evaluator.evaluate() for point, evaluator in self.cracks.items()}
        self.swept = self.sweep.evaluate()
        self.intervals = {point: intervals_of(result, draws) for point, result in self.pixel.items()} if draws else {}

    @property
    def title(self):
        """What was scored: "448x448", or "native" with the pictures' size where they have one."""
        (height, width), *others = sorted(self.shapes)
        if others:
            return self.size
        return f"{width}x{height}" if self.size == "model" else f"native ({width}x{height})"

    def numbers(self):
        """Everything, for results.json."""
        points = {point: {"threshold": threshold, "stats": {**self.pixel[point].stats, **self.crack[point].stats,
                                                            **self.pixel[point].any_damage()},
                          "per_class": self.pixel[point].per_class, "by_width": self.crack[point].by_width,
                          "intervals": {name: (i.low, i.high) for name, i in self.intervals.get(point, {}).items()}}
                  for point, threshold in self.points.items()}
        return {"pixels": self.title, "points": points, "sweep": {**self.swept.stats, "note": "chosen on these very pictures"}}


def intervals_of(result, draws):
    """{"pixel/IoU", "pixel/Dice", "pixel/mIoU" of several classes, "pixel/image/IoU": Interval}."""
    found, per_picture = pooled_intervals(result, draws, ("IoU", "Dice")), result.per_image("IoU")
    if np.isfinite(per_picture).any():
        mean = lambda rows: float(np.nanmean(rows)) if np.isfinite(rows).any() else float("nan")
        found["pixel/image/IoU"] = bootstrap(per_picture, mean, samples=draws)
    return found


# ---------------------------------------------------------------------------------------------------------- what comes out

def finish(job, sizes, points, metrics, unreadable):
    """Writes results.json, pictures.json, report.html and the worst predictions; prints the tables."""
    for scores in sizes.values():
        scores.evaluate(job.args.draws)
    in_use = list(points)[-1]
    notes = [*general_notes(job, unreadable), *explain(sizes, in_use, job)]
    shown = [summary([tables.in_short(f"{s.title}, {in_use}", s.pixel[in_use].stats, "pixel/", IN_SHORT) for s in sizes.values()],
                     job.args.occlude),
             ("Accuracy", tables.segmentation_tables(sizes)), ("Thin damage", tables.crack_tables(sizes)),
             ("Speed and memory", [cost_text(metrics)]), *([("Notes", notes)] if notes else [])]
    about, folder = job.about(), job.folder
    numbers = {**about, "in_use": in_use, "sizes": {name: scores.numbers() for name, scores in sizes.items()},
               **{name.replace(" ", "_"): value for name, value in metrics.items()}, "notes": notes, "unreadable": unreadable}
    counts = {name: {point: result.counts[:, 0].tolist() for point, result in scores.pixel.items()} for name, scores in sizes.items()}
    draws = {name: {point: {"pixel/mIoU": found["pixel/mIoU"].samples.round(6).tolist()} for point, found in scores.intervals.items()
                    if "pixel/mIoU" in found} for name, scores in sizes.items()}              # the counts are of any damage alone
    maps = {"maps": [f"maps/{name}.png" for name in names_of_maps(job.records)]} if job.args.save_maps else {}
    with writing(folder, shown):
        run_folder.write_json(os.path.join(folder, "results.json"), without_nan(numbers))
        of_pictures = {"columns": ["TP", "FP", "FN", "TN"], "files": relative_files(job), **maps, "counts": counts, "draws": draws}
        run_folder.write_json(os.path.join(folder, "pictures.json"), without_nan(of_pictures), indent=None)
        pictures = draw_worst(job, sizes["native"].pixel[in_use], points[in_use])
        write_page(folder, shown, about, [("Accuracy", curves(sizes))], pictures)
    print(f"\nwritten: {os.path.join(folder, 'report.html')}, results.json, pictures.json"
          + f", {number_of(len(pictures), 'picture')} of the worst predictions" * bool(pictures) + ", maps/*.png" * job.args.save_maps)


def explain(sizes, in_use, job):
    """Why a number is what it is: sentences."""
    notes, first = [], next(iter(sizes.values()))
    counts = first.pixel[in_use].counts[:, 0].sum(0)
    tp, fp, fn, tn = counts.tolist()
    if tp + fn == 0:
        notes.append("there is no damaged pixel in these pictures: IoU and recall say nothing, every finding is false")
    elif tp < FEW * (tp + fn) or (tp > MOST * (tp + fn) and fp > MOST * (fp + tn)):
        share = (tp + fn) / counts.sum()
        blind = first.swept.stats["ODS F1"] < 2 * share / (1 + share) + 0.1                # at every threshold
        cause = "the model has not learned enough yet" if blind else "the threshold in use does not suit the model"
        notes.append(f"{cause}: it calls {(tp + fp) / counts.sum():.1%} of the pixels damage, the truth has {share:.1%}")
    if tp + fn and tp + fp == 0:
        notes.append(f"not one pixel is predicted; the accuracy of {tn / counts.sum():.1%} is the share of the background. Another "
                     f"threshold would reach F1 {first.swept.stats['ODS F1']:.3f} here, at {first.swept.stats['ODS threshold']:g}")
    if "model" not in sizes:
        side = job.model.config.image_size
        notes.append(f"all pictures are {side}x{side}, the model's size: nothing is resized" if side else
                     "image_size is 0: each picture goes through the network at its own size")
    return notes


def curves(sizes):
    """Precision over recall of the pooled pixels, one curve a size, the points in use marked by their numbers in the legend."""
    series = []
    for scores in sizes.values():
        recall, precision = scores.swept.curve()
        known = np.isfinite(recall) & np.isfinite(precision)
        name = f"{scores.title}  best F1 {scores.swept.stats['ODS F1']:.3f} at {scores.swept.stats['ODS threshold']:g}"
        series.append(Series(name, recall[known].tolist(), precision[known].tolist()))
    if not any(curve.x for curve in series):
        return []
    title = "Precision and recall of pixels, thresholds .99 to .01"
    return [Picture(line_plot(series, title, "recall", "precision", x_limits=(0.0, 1.0), y_limits=(0.0, 1.03)), title, titled=True)]


def draw_worst(job, result, threshold):
    """Writes worst-01.jpg ... (photograph, truth, prediction, errors) and returns [(path, caption)]: the lowest IoU first, among equals
    the most wrong pixels."""
    iou, wrong = result.per_image("IoU"), result.counts[:, 0, 1:3].sum(1)
    order = sorted(np.flatnonzero((wrong > 0) & np.isfinite(iou)), key=lambda i: (iou[i], -wrong[i], i))
    dataset, drawn = occluded(SegmentationDataset(job.records), job.args.occlude), []
    covered = f", {in_words(job.args.occlude)}" if job.args.occlude else ""
    for rank, index in enumerate(order[:job.args.worst], 1):
        image, target = dataset[index]
        truth = target["label_map"].numpy()
        found = label_map_of(at_both_sizes(job.model, image)["native"], threshold).cpu().numpy()
        views = [image, draw_label_map(image, truth, job.names, enlarge=True),
                 draw_label_map(image, found, job.names, enlarge=True, empty="nothing found"),
                 draw_errors(image, truth, found, enlarge=True, longest=ERRORS_AT)]
        tp, fp, fn, _ = result.counts[index, 0].tolist()
        undamaged = "" if tp + fn else " (undamaged)"
        caption = f"{os.path.basename(target['file'])}{undamaged}: IoU {iou[index]:.3f}, {fp:,} px too many, {fn:,} px missed{covered}"
        path = os.path.join(job.folder, f"worst-{rank:02d}.jpg")
        titles = ["photograph", "truth", "prediction", "green right, yellow too much, violet missed"]
        save_picture(path, grid(views, titles, columns=2, title=caption))
        drawn.append((path, caption))
    return drawn
