"""Several evaluations side by side: one table, mean and spread over data sets, and whether a difference could be chance.

    python evaluate.py --compare runs/context_cracknet-cfd-001 runs/unet-cfd-001 runs/context_cracknet-deepcrack-001 ...

The first model named is held against each other one. On one data set: the paired difference of a segmenter's pooled metric or of a
detector's AP with its bootstrap interval, whole pictures drawn again for both. Over data sets: Wilcoxon's signed-rank test, a value a set,
as in the crack paper's Table 5; n sets cannot give a p below 2 / 2**n, so with fewer than six none is below .05. Both p-values also with
Holm's correction for the number of models.

Runs that differ in nothing but their seed are one model: its numbers, in every draw too, are the mean over them.
"""
import collections
import dataclasses
import difflib
import glob
import json
import os
import re

import numpy as np

from minidamage import run_folder
from minidamage.data.record import number_of
from minidamage.evaluation.common import without_nan, writing
from minidamage.metrics import tables
from minidamage.metrics.segmentation import MEANS, NAMES, quotients
from minidamage.metrics.statistics import bootstrap, chance, holm, mean_std, percentiles, wilcoxon
from minidamage.visualize.canvas import padded_limits
from minidamage.visualize.plots import Series, bar_plot, beside, box_plot, line_plot, read_metrics, series_colour
from minidamage.visualize.report import Picture, Table, write_report

COLUMNS = {"segmentation": ("IoU", "Dice", "recall", "precision"),                        # the order of the paper's Table 3
           "detection": ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50")}
DRAWN = {"segmentation": ("IoU", "Dice", "recall"), "detection": ("segm/AP", "bbox/AP")}
CHOSEN = " (chosen on validation)"
MOST = 0.9                                                    # of the pixels: what calls more of them damage has learned nothing
ROW, BAR = 1200, 24                                           # pixels: width of a row of bars, and of a bar with its share of the gaps


@dataclasses.dataclass
class Evaluation:
    """One results.json, or several that differ in the seed alone.

    model: its name, and once `name_apart` has seen all of them what it was trained otherwise; settings: what --set changed in its
    training; trained_by: its other arguments (None: an older evaluation, which did not keep them); data: the set's name and part; folder:
    its path; stats: {metric: number}, the mean over S seeds, and spread: {metric: their sample standard deviation}; of the N pictures,
    where they are known: files, their names, counts: int64 [N, S, 4] (segmentation), and draws: {metric: [S, B]}, what it is in B bootstrap
    draws (a detector's AP, and the means over classes)."""

    paths: list
    task: str
    model: str
    settings: list
    trained_by: dict | None
    seeds: list
    data: str
    folder: str
    scored: str
    stats: dict
    spread: dict = dataclasses.field(default_factory=dict)
    counts: np.ndarray | None = None
    draws: dict | None = None
    files: list | None = None

    @property
    def path(self):
        return self.paths[0]


def compare(runs, metric, size, at, draws, out):
    """Prints the comparison; with `out` writes comparison.json and report.html there. Returns 0; ValueError for what cannot be compared."""
    evaluations = [load(path, size, at) for path in runs]
    notes = name_apart(evaluations)
    check(evaluations)
    evaluations = join_seeds(evaluations)
    task = evaluations[0].task
    columns = [name for name in COLUMNS[task] if any(name in e.stats for e in evaluations)]
    metric = metric or columns[0] if task == "segmentation" else metric or ("segm/AP" if "segm/AP" in columns else columns[0])
    if any(f"pixel/{metric}" in e.stats for e in evaluations) and all(metric not in e.stats for e in evaluations):       # mIoU
        metric = f"pixel/{metric}"
    for e in evaluations:
        if metric not in e.stats:
            near = difflib.get_close_matches(metric, e.stats, 3, cutoff=0.5)
            raise ValueError(f"--metric {metric}: no number of that name in {e.path}; "
                             + (f"did you mean {' or '.join(near)}? " if near else "") + f"It has {', '.join(sorted(e.stats))}")
    if metric not in columns:
        columns.append(metric)
    shown = [all_table(evaluations, columns)]
    by_model = collections.defaultdict(dict)                  # model -> {data: Evaluation}
    for e in evaluations:
        by_model[e.model][e.data] = e
    sets = list(dict.fromkeys(e.data for e in evaluations))
    if max(map(len, by_model.values())) > 1:
        shown.append(spread_table(by_model, columns))
    notes += [*blind(evaluations), *trained_otherwise(evaluations), *not_shared(by_model), *other_pictures(by_model),
              *other_folders(evaluations), *other_pixels(evaluations), *other_thresholds(evaluations)]
    paired = paired_table(by_model, metric, draws) if draws else None
    tested = signed_rank_table(by_model, metric, notes)
    shown += [table for table in (paired, tested) if table]
    print("\n\n".join(tables.as_text(*table, digits=4) for table in shown))
    if metric.removeprefix("pixel/") in MEANS and not paired and draws:
        notes.append(f"no test of {metric}: it takes what evaluate.py draws of it (mIoU, since this version); evaluate the runs again")
    notes += ["interval and p are over the pictures: what another seed would change is not in them"] * bool(paired)
    for note in notes:
        print(f"note: {note}")
    if out:
        write(out, shown, notes, by_model, sets, metric, evaluations)
    else:
        print("\nnothing is written: --out DIR keeps the tables, with pictures, as DIR/report.html")
    return 0


# ---------------------------------------------------------------------------------------------------------- reading

def load(path, size, at):
    """The Evaluation at `path`: a results.json, an evaluation folder, or a run folder with one evaluation of its test part."""
    file = results_file(path)
    beside = os.path.join(os.path.dirname(file), "pictures.json")
    try:
        pictures = read_json(beside) if os.path.isfile(beside) else None
        return from_results(file, read_json(file), pictures, size, at)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected results.json of evaluate.py ({type(error).__name__}: {error}); evaluate the run "
                         "again") from None


def read_json(path):
    with open(path, encoding="utf-8") as stream:
        return json.load(stream)


def from_results(path, content, pictures, size="model", at="chosen"):
    """The Evaluation of what stands in a results.json, and in the pictures.json beside it (None: there is none)."""
    part = "" if content["part"] in ("test", "all") else f" ({content['part']})"
    part += f" (occluded {content['occlusion']:g})" if content.get("occlusion") else ""
    data, files = os.path.splitext(os.path.basename(content["data"]))[0] + part, pictures and pictures["files"]
    model = " ".join([content["model"], *content.get("set", [])])
    known = {"paths": [path], "model": model, "settings": list(content.get("trained_with", [])), "data": data,
             "trained_by": content.get("trained_by"), "seeds": [content.get("seed")], "folder": content["data"], "files": files}
    if content.get("task") != "segmentation":
        stats = numbers_of({**content.get("pixels", {}), **content["stats"]})
        return Evaluation(task="detection", scored="", stats=stats, draws=pictures and samples_of(pictures["draws"]), **known)
    size = size if size in content["sizes"] else "native"             # pictures of the model's own size are scored once
    scored, points = content["sizes"][size], list(content["sizes"][size]["points"])
    point = points[-1] if at == "chosen" else points[0]
    stats = numbers_of(scored["points"][point]["stats"])
    stats = {**{name: stats[f"pixel/{name}"] for name in NAMES}, **stats}
    counts = pictures and np.array(pictures["counts"][size][point], np.int64)[:, None]
    draws = pictures and samples_of(pictures.get("draws", {}).get(size, {}).get(point, {}))
    return Evaluation(task="segmentation", scored=f"{scored['pixels']}, {point}", stats=stats, counts=counts, draws=draws, **known)


def samples_of(draws):
    """{metric: [1, B]} of the draws that a pictures.json has, {metric: B numbers, null where one has none}."""
    return {name: np.array([row], np.float64) for name, row in draws.items()}


def numbers_of(stats):
    return {name: as_number(value) for name, value in stats.items()}


def results_file(path):
    if os.path.isfile(path):
        return path
    if os.path.isfile(os.path.join(path, "results.json")):
        return os.path.join(path, "results.json")
    found = sorted(glob.glob(os.path.join(glob.escape(path), "evaluation-*", "results.json")))
    preferred = [file for file in found if os.path.basename(os.path.dirname(file)) == "evaluation-test"]
    if len(preferred or found) != 1:
        what = ", ".join(found) if found else "a folder without one" if os.path.isdir(path) else "a path where nothing is"
        raise ValueError(f"--compare {path}: expected one evaluation, got {what}; run evaluate.py --checkpoint on it first, or name its "
                         "folder")
    return (preferred or found)[0]


def name_apart(evaluations):
    """Adds the settings that not all were trained with to each model's name, and the other arguments in which models of one name on one
    data set differ; [a sentence] on the settings that all share, [] without any."""
    shared = [s for s in evaluations[0].settings if len(evaluations) > 1 and all(s in e.settings for e in evaluations)]
    for e in evaluations:
        e.model = " ".join([e.model, *(s for s in e.settings if s not in shared)])
    for group in grouped(evaluations):
        known = [e.trained_by for e in group if e.trained_by is not None]
        differing = [name for name in {name: None for each in known for name in each}
                     if len(known) == len(group) and any(each.get(name) != known[0].get(name) for each in known)]
        for e in group:
            own = [name for name in differing if name in e.trained_by]
            e.model = " ".join([e.model, *(f"{name}={os.path.basename(str(e.trained_by[name]))}" for name in own)])
    return [f"all were trained with {' '.join(shared)}"] if shared else []


def check(evaluations):
    if len({e.task for e in evaluations}) > 1:
        raise ValueError("--compare: expected detectors or segmenters, got both: "
                         + ", ".join(f"{e.path} ({e.task})" for e in evaluations))
    seen = {}
    for e in evaluations:
        key = e.model, e.data, *e.seeds
        if key in seen:
            seed = "" if e.seeds == [None] else f" of the same seed {e.seeds[0]}"
            raise ValueError(f"--compare: {e.path} and {seen[key]} are the same model ({e.model}) on the same data ({e.data}){seed}; "
                             "name each once")
        seen[key] = e.path


def join_seeds(evaluations):
    """The Evaluations of one model on one data set made one, in the order of their first. Raises ValueError for those that do not say that
    they differ in the seed alone, and for seeds that were scored on different pictures."""
    return [joined(group) if len(group) > 1 else group[0] for group in grouped(evaluations)]


def grouped(evaluations):
    """[those of one model on one data set], in the order of their first."""
    groups = collections.defaultdict(list)
    for e in evaluations:
        groups[e.model, e.data].append(e)
    return list(groups.values())


def joined(group):
    first, paired = group[0], all(e.files is not None for e in group)
    for e in group[1:]:
        check_seeds(first, e)
    names = [name for name in first.stats if all(name in e.stats for e in group)]
    pairs = {name: mean_std([e.stats[name] for e in group]) for name in names}
    counts = np.concatenate([e.counts for e in group], axis=1) if paired and first.counts is not None else None
    draws = paired and first.draws and {name: np.concatenate([e.draws[name] for e in group]) for name in first.draws
                             if all(len(e.draws.get(name, [()])[0]) == first.draws[name].shape[1] for e in group)}
    return dataclasses.replace(
        first, paths=[e.path for e in group], seeds=[seed for e in group for seed in e.seeds],
        scored=scored_alike(group),
        stats={name: mean for name, (mean, _) in pairs.items()}, spread={name: std for name, (_, std) in pairs.items()},
        counts=counts, draws=draws or None, files=first.files if paired else None)


def scored_alike(group):
    """"448x448, at 0.3, 0.4 (chosen on validation)": how several seeds were scored."""
    parts = [e.scored.removesuffix(CHOSEN).partition(", ") for e in group]
    chosen = CHOSEN * all(e.scored.endswith(CHOSEN) for e in group)
    sizes, points = (", ".join(sorted({part[i] for part in parts})) for i in (0, 2))
    return f"{sizes}, {points}{chosen}" if points else sizes


def check_seeds(first, other):
    """Raises ValueError unless the two are known to be trainings that differ in their seed alone, scored on the same pictures."""
    both = f"--compare: {other.path} and {first.path} are one model ({other.model}) on the same data ({other.data})"
    if None in (first.trained_by, other.trained_by):
        raise ValueError(f"{both}, and an older evaluation does not say how it was trained and from which seed; evaluate it again, or name "
                         "one of them")
    if None not in (first.files, other.files) and first.files != other.files:
        raise ValueError(f"{both}, scored on different pictures: expected one split; train them with the same --split-seed, and evaluate "
                         "both again")


# ---------------------------------------------------------------------------------------------------------- tables

def all_table(evaluations, columns):
    scored = sorted({e.scored for e in evaluations})
    caption = "Pooled over pictures" if evaluations[0].task == "segmentation" else "COCO"
    one = f", {scored[0]}" * (len(scored) == 1 and bool(scored[0]))
    several = any(len(e.seeds) > 1 for e in evaluations)
    cell = lambda e, name: f"{e.stats[name]:.4f} ± {e.spread[name]:.4f}" if name in e.spread else e.stats.get(name)
    rows = [[e.model, e.data, *([len(e.seeds)] if several else []), *([e.scored] if len(scored) > 1 else []),
             *(cell(e, c) for c in columns)] for e in sorted(evaluations, key=lambda e: [x.data for x in evaluations].index(e.data))]
    return (f"{caption}{one}{'; mean ± sample standard deviation over seeds' * several}",
            ["model", "data", *(["seeds"] if several else []), *(["scored"] if len(scored) > 1 else []), *columns], rows)


def spread_table(by_model, columns):
    rows = []
    for model, found in by_model.items():
        pairs = [mean_std([as_number(e.stats.get(c)) for e in found.values()]) for c in columns]
        rows.append([model, len(found), *(f"{mean:.4f} ± {std:.4f}" if std == std else mean for mean, std in pairs)])
    return "Mean ± sample standard deviation over data sets", ["model", "sets", *columns], rows


def not_shared(by_model):
    """[a sentence] on the models that share no data set with the first, and so are not tested against it; [] where all do."""
    (first, own), *others = by_model.items()
    seeds = max(len(e.seeds) for e in own.values())
    if not others and seeds > 1:
        return [f"nothing to test: these {seeds} runs differ in their seed alone and are one model, {first}"]
    apart = [f"{model} ({', '.join(found)})" for model, found in others if not own.keys() & found.keys()]
    return [f"nothing to test: {first} ({', '.join(own)}) shares no data set with {'; '.join(apart)}"] if apart else []


def trained_otherwise(evaluations):
    """[a sentence] for each data set whose models were trained with other arguments (epochs, rate, start weights): not the model alone."""
    said = []
    for data in dict.fromkeys(e.data for e in evaluations):
        known = {e.model: e.trained_by for e in evaluations if e.data == data and e.trained_by is not None}
        differing = [name for name in dict.fromkeys(name for each in known.values() for name in each)
                     if len({str(each.get(name)) for each in known.values()}) > 1 and not any(f" {name}=" in model for model in known)]
        typed = lambda each, name: os.path.basename(str(each[name])) if name in each else "not given"
        words = [f"--{name.replace('_', '-')} " + ", ".join(f"{typed(each, name)} ({model})" for model, each in known.items())
                 for name in differing]
        said += [f"{data}: trained otherwise, so a difference is not the model's alone: {'; '.join(words)}"] * bool(words)
    return said


def other_pictures(by_model):
    """[a sentence] for each model and data set where other pictures were scored than the first model's."""
    (first, own), *others = by_model.items()
    listed = [(model, data, own[data].files, e.files) for model, found in others for data, e in found.items() if data in own]
    listed = [each for each in listed if None not in each[2:] and each[2] != each[3]]
    order = [f"{data}: {model} was scored on the pictures of {first} in another order, so the two are not paired; evaluate both again"
             for model, data, ours, theirs in listed if sorted(ours) == sorted(theirs)]
    shared = lambda ours, theirs: f"{len(theirs)} and {len(ours)}, {len({*ours} & {*theirs})} of them shared"
    return order + [f"{data}: {model} was scored on other pictures than {first} ({shared(ours, theirs)}), so the two are not paired, and "
                    "part of any difference is the pictures'; evaluate both on one split (--split, --split-seed of train.py)"
                    for model, data, ours, theirs in listed if sorted(ours) != sorted(theirs)]


def other_folders(evaluations):
    """[a sentence] for each data set that lay in several places."""
    folders = collections.defaultdict(dict)
    for e in evaluations:
        folders[e.data][e.folder] = True
    return [f"{data}: read from {' and '.join(found)}; pictures of one name are taken for the same picture"
            for data, found in folders.items() if len(found) > 1]


def other_pixels(evaluations):
    """[a sentence] for each data set on which the models were scored at different sizes."""
    sizes = collections.defaultdict(lambda: collections.defaultdict(list))                # data -> {"448x448": models}
    for e in evaluations:
        for size in re.findall(r"\d+x\d+", e.scored)[:1]:
            sizes[e.data][size].append(e.model)
    listed = lambda found: "; ".join(f"{size} ({', '.join(models)})" for size, models in found.items())
    return [f"{data}: scored at {listed(found)}, which are other pixels; "
            "--size native scores all at the pictures' own" for data, found in sizes.items() if len(found) > 1]


def blind(evaluations):
    """[a sentence] for each model that calls all or nothing damage."""
    found = []
    for e in evaluations:
        if e.counts is not None:
            tp, fp, fn, tn = e.counts.sum((0, 1)).tolist()
            share = (tp + fp) / max(1, tp + fp + fn + tn)
            if share > MOST or tp + fp == 0:
                found.append(f"{e.model} on {e.data} calls {share:.1%} of the pixels damage: it has not learned enough yet, whatever its "
                             "rank")
    return found


def other_thresholds(evaluations):
    """[a sentence] for each data set on which the models were scored at different thresholds."""
    points = collections.defaultdict(dict)                                                # data -> {model: "at 0.3 (chosen on ...)"}
    for e in evaluations:
        if e.scored:
            points[e.data][e.model] = e.scored.partition(", ")[2]
    listed = lambda found: "; ".join(f"{model} {point}" for model, point in found.items())
    return [f"{data}: scored at each model's own threshold ({listed(found)}); --at 0.5 scores all at 0.5"
            for data, found in points.items() if len(set(found.values())) > 1]


def paired_table(by_model, metric, draws):
    """First model minus each other one on every set that both were scored on, same pictures; None where there is none."""
    (first, own), *others = by_model.items()
    rows = [[f"{first} - {model}", data, len(own[data].files), len(drawn.samples), drawn.value, drawn.low, drawn.high, p, adjusted]
            for data in own
            for model, drawn, p, adjusted in paired_tests(own[data], {m: sets[data] for m, sets in others if data in sets}, metric, draws)]
    if not rows:
        return None
    return (f"Differences in {metric.removeprefix('pixel/')} on the same pictures (above 0: {first} scores higher): 95 % interval of the "
            "paired bootstrap draws, p of no difference, two-sided",
            ["models", "data", "pictures", "draws", "difference", "low", "high", "p", "p, Holm"], rows)


def paired_tests(first, others, metric, draws):
    """[(name, Interval of first's metric minus the other's, p of no difference, p by Holm for as many others)] of those that were scored on
    the same pictures. others: {name: Evaluation}."""
    found = {name: paired_difference(first, other, metric, draws) for name, other in others.items()}
    found = {name: drawn for name, drawn in found.items() if drawn is not None}
    chances = [chance(drawn) for drawn in found.values()]
    return [(name, drawn, p, adjusted) for (name, drawn), p, adjusted in zip(found.items(), chances, holm(chances).tolist())]


def paired_difference(a, b, metric, draws):
    """The Interval of Evaluation a's metric minus b's, the same pictures drawn for both; over the means of their seeds. draws: how many
    (of a detector, and of means over classes: what was drawn in its evaluation, and draws is not looked at). None where that is not known
    of the same pictures."""
    name = metric.removeprefix("pixel/")
    if a.files is None or a.files != b.files or a.data != b.data:                         # data: not the same, with damage covered in one
        return None
    if a.counts is not None and b.counts is not None and name in NAMES:
        pooled = lambda drawn: float(quotients(drawn.sum(0))[name].mean())                                            # [S, 4] -> [S]
        return bootstrap(a.counts, pooled, other=b.counts, samples=draws)
    if not (a.draws and b.draws) or any(metric not in e.draws for e in (a, b)):
        return None
    ours, theirs = (e.draws[metric].mean(0) for e in (a, b))
    return percentiles(a.stats[metric] - b.stats[metric], ours - theirs) if ours.shape == theirs.shape else None


def signed_rank_table(by_model, metric, notes):
    """Wilcoxon's test of the first model against each other one over the sets they share; None with fewer than two sets."""
    (first, own), *others = by_model.items()
    tests = []
    for model, found in others:
        shared = [d for d in own if d in found]
        pairs = [(as_number(own[d].stats[metric]), as_number(found[d].stats[metric])) for d in shared]
        pairs = [pair for pair in pairs if np.isfinite(pair).all()]
        if len(pairs) > 1:
            tests.append((model, len(pairs), sum(a > b for a, b in pairs), wilcoxon(*zip(*pairs))))
    if not tests:
        return None
    adjusted = holm([test.p for *_, test in tests])
    rows = [[model, n, better, test.statistic, test.p, float(p), test.method] for (model, n, better, test), p in zip(tests, adjusted)]
    fewest = min(n for _, n, *_ in tests)
    if fewest < 6:
        notes.append(f"{fewest} data sets cannot give a p below {2 / 2 ** fewest:g}: six at least are needed for .05")
    return (f"{first} against each model over data sets, {metric}: Wilcoxon signed-rank test, two-sided",
            ["model", "sets", "first is better on", "rank sum", "p", "p, Holm", "how"], rows)


def as_number(value):
    return float("nan") if value is None else float(value)


# ---------------------------------------------------------------------------------------------------------- files

def write(out, shown, notes, by_model, sets, metric, evaluations):
    """comparison.json, and report.html with bars a data set (Fig. 6 of the crack paper), boxes over data sets (Fig. 7) and the runs' own
    curves."""
    def values_of(name):
        return {model: [as_number(found[d].stats.get(name)) if d in found else float("nan") for d in sets]
                for model, found in by_model.items()}

    def spread_of(name):
        return {model: [found[d].spread.get(name, 0.0) if d in found else 0.0 for d in sets] for model, found in by_model.items()}

    values = values_of(metric)
    drawn = list(dict.fromkeys([metric, *DRAWN[evaluations[0].task]]))
    drawn = [name for name in drawn if np.isfinite(list(values_of(name).values())).any()]
    pictures = [Picture(bars(sets, values_of(name), name, spread_of(name)), f"{name} by data set", wide=True, titled=True)
                for name in drawn]
    if len(sets) > 1:
        size = (min(max(720, 90 * len(values)), 1800), 460)
        pictures += [Picture(box_plot(values_of(name), f"{name} over {len(sets)} data sets", name, size=size), f"{name} over data sets",
                             titled=True) for name in drawn[:2]]
    caption = "validation on {} by epoch, of the evaluations that lie in their run's folder"
    pictures += [Picture(picture, caption.format(data), wide=True, titled=True) for data, picture in curves(evaluations, drawn).items()]
    numbers = {"command": run_folder.command_line(), "metric": metric, "evaluations": [path for e in evaluations for path in e.paths],
               "values": {model: dict(zip(sets, row)) for model, row in values.items()},
               "tables": [{"caption": c, "columns": cols, "rows": rows} for c, cols, rows in shown], "notes": notes}
    with writing(out):
        run_folder.write_json(os.path.join(out, "comparison.json"), without_nan(numbers))
        blocks = [Table(columns, rows, caption, digits=4) for caption, columns, rows in shown]
        write_report(os.path.join(out, "report.html"), f"{number_of(len(by_model), 'model')} on {number_of(len(sets), 'data set')}",
                     [("Comparison", [*blocks, *notes]), ("Pictures", pictures), ("How this was made", [{"command": numbers["command"]}])])
    print(f"\nwritten: {os.path.join(out, 'report.html')}, comparison.json")


def curves(evaluations, names):
    """{data: picture}: validation loss and metrics by epoch of the runs whose evaluation lies in their folder, a curve a run; a model's
    seeds have one colour (the car-damage segmentation project compares its runs so)."""
    drawn = collections.defaultdict(lambda: collections.defaultdict(list))                # data -> {"val/loss": [Series]}
    models = list(dict.fromkeys(e.model for e in evaluations))
    for e in evaluations:
        files = [os.path.join(os.path.dirname(path), os.pardir, "metrics.csv") for path in e.paths]
        for file in filter(os.path.isfile, files):
            try:
                columns = read_metrics(file)
            except (ValueError, OSError):                             # another program's
                continue
            for name in dict.fromkeys(("val/loss", *(f"val/{prefix}{name.removeprefix('pixel/')}" for name in names
                                                     for prefix in ("", "pixel/")))):
                if name in columns:
                    label = "" if e.model in (curve.name for curve in drawn[e.data][name]) else e.model
                    drawn[e.data][name].append(Series(label, columns["epoch"], columns[name], series_colour(models.index(e.model))))
    return {data: beside([line_plot(series, f"{name.removeprefix('val/')} on validation", "epoch", name.removeprefix("val/"))
                          for name, series in found.items()], columns=2) for data, found in drawn.items()}


def bars(sets, values, name, spread):
    """Bars of all models for each data set, in as many rows as keep them readable, all on one scale. values: {model: a number a set};
    spread: the same, their standard deviation over seeds."""
    known = [v + s for model, row in values.items() for v, s in zip(row, spread[model]) if v == v]
    limits = padded_limits([*known, 0.0], 0.10, zero=True)
    in_row = max(1, ROW // (BAR * (len(values) + 1)))
    rows = [slice(first, first + in_row) for first in range(0, len(sets), in_row)]
    width = max(720, min(ROW, BAR * (len(values) + 1) * min(len(sets), in_row) + 80))
    form = "{:.2f}" if len(values) * min(len(sets), in_row) <= 24 and len(values) <= 4 else ""
    return beside([bar_plot(sets[row], {model: v[row] for model, v in values.items()}, f"{name} by data set", name,
                            {model: s[row] for model, s in spread.items()} if any(map(any, spread.values())) else None, value_format=form,
                            y_limits=limits, size=(width, 420)) for row in rows], columns=1)
