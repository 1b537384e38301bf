"""Scores a detector: COCO and VOC numbers, what is found at the thresholds in use, false alarms, pixels, intervals, worst pictures."""
import os
import time

import numpy as np
import torch

from minidamage import distributed, run_folder
from minidamage.checkpoint import score_thresholds
from minidamage.data import DetectionDataset
from minidamage.data.record import number_of, outlined
from minidamage.evaluation.ceiling import mask_ceiling
from minidamage.evaluation.common import (change_finish, cost_text, general_notes, relative_files, summary, without_nan, write_page,
                                          writing)
from minidamage.evaluation.occlusion import in_words, occluded
from minidamage.metrics import tables
from minidamage.metrics.confusion import confusion_table
from minidamage.metrics.detection import CocoEvaluator
from minidamage.metrics.measure import peak_memory, speed, synchronize
from minidamage.metrics.segmentation import PixelEvaluator, pooled_intervals
from minidamage.progress import Progress
from minidamage.visualize.matrix import matrix_plot
from minidamage.visualize.overlay import draw_detections, draw_truth, grid, save_picture
from minidamage.visualize.plots import precision_recall_plot
from minidamage.visualize.report import Picture


def score(job):
    """Runs the detector over the job's pictures, prints the tables and writes the evaluation folder.

    Several processes: each runs its share of the pictures, process 0 scores what all of them found and writes.
    """
    model, records, names = job.model, job.records, job.names
    if job.args.set:
        model.config = change_finish(model, job.args.set)
    thresholds = score_thresholds(job.checkpoint, job.args.score, model.task)
    with_masks = "segm" in model.iou_types and outlined(records)
    samples, pixels, judged, unreadable = Samples(records, with_masks, job.args.occlude), PixelEvaluator(names), [], []
    progress = Progress(len(samples), device=job.device)

    def on_picture(image, truth, detection):
        kept = confident(detection, thresholds, names)
        if with_masks:
            outlines, crowds = ([r for r, c in zip(truth["rles"], truth["iscrowd"]) if c == crowd] for crowd in (False, True))
            pixels.add_instances(truth["labels"][~truth["iscrowd"]], outlines, kept["labels"], kept["masks"], *image.shape[-2:], crowds)
        judged.append((truth["index"], kept))
        unreadable.append(truth["unreadable"])
        progress.note(f"{len(judged)}/{len(samples)} pictures")

    loader = torch.utils.data.DataLoader(samples, batch_size=None, sampler=distributed.shard(len(samples)), num_workers=job.workers)
    evaluator = CocoEvaluator(names, ("bbox", "segm") if with_masks else ("bbox",))
    seconds = run_model(model, loader, evaluator, on_picture)
    progress.clear()
    gathered = distributed.gather_to_main((evaluator, pixels, judged, unreadable, seconds))
    if gathered is None:
        return
    evaluators, several_pixels, *lists = zip(*gathered)
    evaluator, pixels = CocoEvaluator.joined(evaluators), PixelEvaluator.joined(several_pixels)
    judged, unreadable, seconds = map(distributed.interleave, lists)
    unreadable, result = [file for file in unreadable if file], evaluator.evaluate()
    metrics = {**result.stats, **speed(seconds), "peak memory MB": peak_memory(job.device)}
    pixel_result = pixels.evaluate() if with_masks else None

    wanted = [f"{iou_type}/{number}" for iou_type in result.scored for number in ("AP", "AP50")] if job.args.draws else []
    intervals = {name: result.interval(name, samples=job.args.draws) for name in wanted}
    if pixel_result and job.args.draws:
        intervals |= pooled_intervals(pixel_result, job.args.draws, ("IoU",))

    notes = [*general_notes(job, unreadable), *result.causes]
    ceiling = mask_ceiling(records, names, job.args.ceiling).evaluate().stats if with_masks and job.args.ceiling else None
    if job.args.ceiling and not with_masks:
        notes.append("no ceiling of masks: there are none to score, of the model or of the data set")
    if ceiling:
        notes.append(f"perfect masks of {job.args.ceiling}x{job.args.ceiling} pixels would score a mask AP of {ceiling['segm/AP']:.3f} "
                     f"here, AP50 {ceiling['segm/AP50']:.3f}")
    shown = show(result, pixel_result, thresholds, metrics, intervals, notes, job.args.occlude)
    numbers = {**collect(result, pixel_result, thresholds, metrics, intervals, notes), "unreadable": unreadable, "ceiling": ceiling or {}}
    about, folder = job.about(), job.folder
    files = {samples.image_id(i): r.file for i, r in enumerate(records)}
    draws = {name: [round(value, 6) for value in interval.samples.tolist()] for name, interval in intervals.items()}
    with writing(folder, shown):
        run_folder.write_json(os.path.join(folder, "results.json"), without_nan({**about, **numbers}))
        of_pictures = without_nan({"files": relative_files(job), "draws": draws})
        run_folder.write_json(os.path.join(folder, "pictures.json"), of_pictures, indent=None)
        run_folder.write_json(os.path.join(folder, "detections.json"), evaluator.coco_detections(job.dataset.category_ids), indent=None)
        run_folder.write_json(os.path.join(folder, "truth.json"), evaluator.coco_truth(job.dataset.category_ids, files), indent=None)
        pictures = draw_worst(folder, samples, judged, result, pixel_result, thresholds, names, job.args.worst)
        write_page(folder, shown, about, [("Accuracy", curves(result)), ("In use", confusion_picture(result, thresholds))], pictures)
    print(f"\nwritten: {os.path.join(folder, 'report.html')}, results.json, pictures.json, detections.json, truth.json"
          + f" and {number_of(len(pictures), 'picture')} of the worst predictions" * bool(pictures))


@torch.inference_mode()
def run_model(model, samples, evaluator, on_picture):
    """Runs a detector over (picture, truth) pairs into the evaluator, and calls on_picture(image, truth, detection) after each, masks as
    run lengths; returns the seconds that the model took for each."""
    seconds, device = [], next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for image, truth in samples:
        synchronize(device)
        began = time.perf_counter()
        (detection,) = model.detect([image], mask_form="rle")
        synchronize(device)
        seconds.append(time.perf_counter() - began)
        evaluator.add_picture(truth["image_id"], truth, detection, image.shape[-2:])
        on_picture(image, truth, detection)
    return seconds


class Samples(torch.utils.data.Dataset):
    """Pictures and their truth in original pixels, masks as run lengths (never dense: a 12-megapixel picture with 20 objects is 240 MB).
    occlude: the share of each object that a patch hides in the picture, or None (occlusion.py)."""

    def __init__(self, records, with_masks, occlude=None):
        self.records, self.occlude = records, occlude
        self.pictures = occluded(DetectionDataset(records, mask_form="rle" if with_masks else "none"), occlude)
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
        return image, truth | ({"rles": target["rles"]} if "rles" in target else {})


def confident(detection, thresholds, names):
    """The detections at or above their class's threshold, as numpy."""
    scores, labels = detection["scores"].float().cpu().numpy(), detection["labels"].cpu().numpy()
    kept = np.flatnonzero(scores >= np.array([thresholds[name] for name in names])[labels - 1])
    return {"boxes": detection["boxes"].float().cpu().numpy()[kept], "scores": scores[kept], "labels": labels[kept],
            "masks": [detection["masks"][i] for i in kept] if "masks" in detection else None}


# ---------------------------------------------------------------------------------------------------------- what comes out

def show(result, pixels, thresholds, metrics, intervals, notes, occlude=None):
    """All tables, to print and for the report: [(heading, [table or text])]."""
    alarms = result.false_alarms(thresholds)
    alarm_text = (f"{alarms['with findings']:.1%} of the {alarms['pictures']} pictures without damage have a finding, "
                  f"{alarms['findings']:.2f} findings a picture") if alarms["pictures"] else "no undamaged picture in this part"
    few = len(result.class_names) <= tables.MOST_COLUMNS
    accuracy = [*tables.coco_tables(result), *([tables.rules_table(result)] if few and "bbox" in result.scored else []),
                *tables.class_tables(result)]
    if intervals:
        accuracy.insert(2, tables.interval_table(intervals, len(result.image_ids)))
    in_use = [tables.operating_table(result, thresholds)]
    if few:
        in_use.append(confusion_table(result.confusion(thresholds), result.class_names))
    lines = [tables.in_short(tables.KINDS[t], result.stats, f"{t}/", ("AP", "AP50")) for t in result.scored]
    shown = [summary(lines, occlude), ("Accuracy", accuracy), ("In use", in_use), ("False alarms", [alarm_text])]
    if pixels:
        shown.append(("Pixels", tables.pixel_tables(pixels)))
    shown.append(("Speed and memory", [cost_text(metrics)]))
    if notes:
        shown.append(("Notes", notes))
    return shown


def collect(result, pixels, thresholds, metrics, intervals, notes):
    """Every number, for results.json."""
    cost = {name.replace(" ", "_"): metrics[name] for name in ("ms per picture", "pictures per second", "peak memory MB")}
    return {"stats": result.stats, "intervals": {name: (i.low, i.high) for name, i in intervals.items()}, "per_class": result.per_class,
            "voc": {t: result.voc_ap(t) for t in result.scored}, "thresholds": thresholds,
            "at_thresholds": result.at_thresholds(thresholds), "best_f1": result.best_f1(), "false_alarms": result.false_alarms(thresholds),
            "confusion": {"rows": [*result.class_names, "false alarm"], "columns": [*result.class_names, "missed"],
                          "counts": result.confusion(thresholds).tolist()},
            "pixels": pixels.stats if pixels else {}, "pixels_per_class": pixels.per_class if pixels else {}, **cost, "notes": notes}


def draw_worst(folder, samples, judged, result, pixels, thresholds, names, count):
    """Writes worst-01.jpg ... (photograph, truth and prediction, DamageNet's Fig. 5) and returns their paths and captions: most wrong
    findings and misses first, among equals the smaller overlap."""
    wrong = result.errors_by_picture(thresholds)
    position = {image_id: i for i, image_id in enumerate(result.image_ids)}
    overlap = np.nan_to_num(pixels.per_image("IoU"), nan=0.0) if pixels else np.zeros(len(judged))
    order = sorted(range(len(judged)), key=lambda j: (-sum(wrong[position[samples.image_id(judged[j][0])]]), overlap[j], j))
    drawn, covered = [], f", {in_words(samples.occlude)}" if samples.occlude else ""
    for rank, j in enumerate(order[:count], 1):
        index, kept = judged[j]
        false, missed = wrong[position[samples.image_id(index)]]
        if false + missed == 0:
            break
        image, truth = samples[index]
        is_false, is_missed = result.errors_in_picture(samples.image_id(index), thresholds)
        views = [image, draw_truth(image, truth["boxes"], truth["labels"], truth.get("rles"), names, truth["iscrowd"], enlarge=True,
                                   remarks=["missed" if each else "" for each in is_missed]),
                 draw_detections(image, kept["boxes"], kept["labels"], kept["scores"], kept["masks"], names, enlarge=True,
                                 remarks=["false" if each else "" for each in is_false])]
        caption = f"{os.path.basename(truth['file'])}: {false} false, {missed} missed" + covered
        path = os.path.join(folder, f"worst-{rank:02d}.jpg")
        save_picture(path, grid(views, ["photograph", "truth", "prediction"], columns=3, title=caption))
        drawn.append((path, caption))
    return drawn


def curves(result):
    """Precision over recall at IoU 0.5, all sizes: pictures for the report."""
    drawn = []
    for iou_type in result.scored:
        precision, recall = result.arrays[iou_type]["precision"][0, :, :, 0, -1], result.protocol.recall_thresholds          # [R, K]
        known = {name: (recall, precision[:, k]) for k, name in enumerate(result.class_names) if precision[0, k] > -1}
        if known:
            title = f"Precision and recall, {tables.KINDS[iou_type]} IoU 0.5"
            drawn.append(Picture(precision_recall_plot(known, title), title, titled=True))
    return drawn


def confusion_picture(result, thresholds):
    """The confusion matrix at the thresholds in use, for the report."""
    matrix = result.confusion(thresholds)
    matrix[-1, -1] = -1                                       # nothing taken for nothing: not counted, left blank
    title = "Confusion at the thresholds in use, IoU 0.5 (colour: share of its row)"
    drawn = matrix_plot(matrix, [*result.class_names, "false alarm"], [*result.class_names, "missed"], title)
    return [Picture(drawn, title, titled=True)] if len(result.class_names) <= tables.MOST_COLUMNS else []
