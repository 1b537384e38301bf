"""The tables of results/ and of the README, made from results/<run>/summary.json, results/benchmark-*.json and
results/complexity/complexity.json: no number is typed.

A row's seeds are put together: mean, and in brackets the smallest and the largest. What the papers print stands in a row of its own
above ours. Below most tables their first row is tested against each other one (paired bootstrap over the test pictures, Holm's correction).
"""
import csv
import json
import pathlib
import statistics
import sys

from runs import CRACK_NAMES, GLANCE, RUNS, SMALL_SEGMENTERS, TABLES

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from minidamage.evaluation import comparison                                                             # noqa: E402

DRAWS = 2000                            # bootstrap draws of the test pictures, here and in reproduce.py's evaluations


def look_up(numbers, path):
    """"stats/bbox/AP" in nested dicts whose keys may hold slashes themselves; None where it is not there. {in_use}: see runs.py. What was
    scored at one size alone has no "model": then its native size is it."""
    path = path.replace("{in_use}", str(numbers.get("in_use")))
    if path.startswith("sizes/model/") and "model" not in numbers.get("sizes", {}):
        path = path.replace("sizes/model/", "sizes/native/", 1)
    return find(numbers, path)


def find(numbers, path):
    if not isinstance(numbers, dict):
        return None
    if path in numbers:
        return numbers[path]
    heads = [path[:i] for i, character in enumerate(path) if character == "/"]
    for head in heads:
        if head in numbers and (value := find(numbers[head], path[len(head) + 1:])) is not None:
            return value
    return None


def short(commit):
    """Seven digits of a commit, and still whether the tree differed from it."""
    digits, changes, _ = commit.partition("+")
    return f"{digits[:7]}{' with uncommitted changes' if changes else ''}"


def table_text(name):
    """A Markdown table of all rows of a table, the papers' numbers above ours, runs that are missing marked as such, and what the numbers
    were made with."""
    table, rows = TABLES[name], {}
    for run in [run for run in RUNS if run.table == name]:
        for row in run.rows:
            rows.setdefault(row, []).append(run)
    lines = [line("row", "seeds", *table.columns, "run"), f"|---|{'--:|' * (1 + len(table.columns))}---|"]
    made_with = {}
    for row, runs in rows.items():
        if row in table.printed:
            cells = [f"{value:.2f}" if table.percent else f"{value:.4f}" for value in table.printed[row]]
            lines.append(line(f"{row}, paper", "", *cells, *[""] * (len(table.columns) - len(cells)), ""))
        lines.append(our_row(row, runs, table, made_with))
    tested = tests_of(rows, table) if table.tested else []
    ways = [f"{way}." if len(made_with) == 1 else f"{way}: {', '.join(runs)}." for way, runs in made_with.items()]
    return "\n\n".join(["\n".join(lines), *(["\n".join(tested)] if tested else []), *([table.note] if table.note else []),
                        "\n".join(["A row again: `python results/reproduce.py --run RUN`.", *ways])])


def line(*cells):
    return f"| {' | '.join(cells)} |"


def our_row(row, runs, table, made_with):
    """One line of ours over its seeds; made_with, {what numbers were made with: {run}}, receives its runs."""
    found = kept(row, runs)
    cells = ["not run", *[""] * (len(table.columns) - 1)]
    if found:
        numbers = [summary["rows"][row] for _, summary in found]
        cells = [cell([look_up(each, path) for each in numbers], form_of(path, table)) for path in table.columns.values()]
    for run, summary in found:
        numbers, hardware = summary["rows"][row], summary["run"]["hardware"]
        trained = dict.fromkeys(commit for commit in summary["run"]["commits"] if commit)
        scored = dict.fromkeys(each.get("commit") for each in summary["rows"].values())
        scored = [commit for commit in scored if commit and commit not in trained]
        commits = ", ".join(map(short, trained)) + (f", scored at {', '.join(map(short, scored))}" if scored else "")
        where = f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
        made_with.setdefault(
            f"{numbers['pictures']} {numbers.get('part', 'test')} pictures; {where}; torch {summary['run']['versions']['torch']}"
            f"{', ' * bool(run.peer)}{summary.get('peer', '')}; commit {commits}", {})[run.name] = None
    seeds = ", ".join(str(summary["run"]["seed"]) for _, summary in found)
    return line(label_of(row, runs), seeds, *cells, f"`{in_braces([run.name for run in runs])}`")


def in_braces(names):
    """The names of a run's seeds as a shell writes them out: name{,-seed1,-seed2}."""
    first, *others = names
    return f"{first}{{,{','.join(name.removeprefix(first) for name in others)}}}" if others else first


def label_of(row, runs):
    return f"{row}, trained by the same script" if runs[0].peer else row


def kept(row, runs):
    """[(run, its summary)] of those that are done and were scored for this row, which may be younger than the run."""
    found = [(run, json.loads(path.read_text())) for run in runs if (path := HERE / run.name / "summary.json").exists()]
    return [(run, summary) for run, summary in found if row in summary["rows"]]


def tests_of(rows, table):
    """The lines of more tables, one a metric: the first row minus each of its rivals on the same pictures, each the mean over its seeds; []
    where what that takes was not kept of every seed. Where the first row's later seeds alone were drawn in a metric: of those. rows: {row:
    runs}."""
    first, *others = [row for row in rows if not table.rivals or row in table.rivals]
    text = (lambda value: f"{100 * value:+.2f}") if table.percent else (lambda value: f"{value:+.3f}")
    lines = []
    for metric in table.tested:
        found = {row: drawn_in(metric, row, rows[row]) for row in (first, *others)}
        whole = {row: len(seeds) == len(kept(row, rows[row])) for row, seeds in found.items()}
        every = whole[first]
        evaluations = {row: comparison.join_seeds([comparison.from_results(*each) for each in seeds.values()])[0]
                       for row, seeds in found.items() if seeds and (whole[row] if every else seeds.keys() == found[first].keys())}
        tested = first in evaluations and comparison.paired_tests(evaluations.pop(first), evaluations, metric, DRAWS)
        if tested:
            of_seeds = "" if every else f" (seed{'s' * (len(found[first]) > 1)} {', '.join(map(str, found[first]))})"
            lines += ["", f"| {first} minus{of_seeds} | {name_of(metric)} | 95 % interval over pictures | p | p, Holm |",
                      "|---|--:|--:|--:|--:|",
                      *(f"| {label_of(row, rows[row])} | {text(drawn.value)} | {text(drawn.low)} to {text(drawn.high)} | {p:.4f} | "
                        f"{adjusted:.4f} |" for row, drawn, p, adjusted in tested)]
    return [*lines[1:], "\nInterval and p are over the test pictures: what another seed would change is not in them."] if lines else []


def drawn_in(metric, row, runs):
    """{seed: arguments of comparison.from_results} of the runs whose pictures of this row were kept, and drawn in the metric: counts of
    pixels can be at any time."""
    found = {}
    for run, summary in kept(row, runs):
        pictures = pictures_of(run).get(row) or {}
        if "counts" in pictures or metric in pictures.get("draws", ()):
            found[summary["run"]["seed"]] = run.name, summary["rows"][row], pictures
    return found


def name_of(metric):
    """"mask AP" of "segm/AP"."""
    return metric.replace("bbox/", "box ").replace("segm/", "mask ").replace("pixel/mIoU", "mIoU over classes")


def pictures_of(run):
    path = HERE / run.name / "pictures.json"
    return json.loads(path.read_text()) if path.exists() else {}


def form_of(path, table):
    """How a column's numbers are written."""
    if path == "epoch":
        return "{:.0f}".format
    return (lambda value: f"{100 * value:.2f}") if table.percent else "{:.3f}".format


def cell(values, text):
    """A number over its seeds; of one seed, an interval (low, high) too. text: writes one number."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    if isinstance(values[0], list):
        return " to ".join(map(text, values[0])) if len(values) == 1 else ""
    mean = text(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ({text(min(values))} to {text(max(values))})"


def glance_text():
    """The first table of the README: what each paper's main number is here, of all seeds that were run."""
    lines = [line("what", "the paper", "ours, reduced (smallest to largest seed)", "one seed: 95 % over pictures", "our schedule",
                  "the paper's"), "|---|--:|--:|--:|---|---|"]
    for what, paper, name, row, path, percent, ours, theirs in GLANCE:
        seeds = [summary["rows"][row] for _, summary in kept(row, [run for run in RUNS if run.name.partition("-seed")[0] == name])]
        form = (lambda value: f"{100 * value:.1f} %") if percent else "{:.3f}".format
        cells = [cell([look_up(numbers, where) for numbers in seeds], form) for where in (path, path.replace("stats/", "intervals/"))]
        cells = cells if seeds else ["not run", ""]
        lines.append(line(what, f"{paper:.1f} %" if percent else f"{paper:.3f}", *cells, ours, theirs))
    return "\n".join(lines)


def ranks_text():
    """The short crack runs in brief, best on DeepCrack first: IoU on both sets with its interval over the pictures, beside the paper's."""
    rows = dict.fromkeys(row for run in RUNS if run.table.startswith("cracks-quick-") for row in run.rows)
    numbers = {(run.table, row): summary["rows"][row] for row in rows for run, summary in kept(row, RUNS)
               if run.table.startswith("cracks-quick-")}
    sets, path = ("CFD", "DeepCrack"), TABLES["cracks-quick-cfd"].columns["IoU"]

    def cells(row, name):
        ours = numbers.get((f"cracks-quick-{name.lower()}", row))
        paper = TABLES[f"cracks-quick-{name.lower()}"].printed.get(row)
        if ours is None:
            return [f"{paper[0]:.4f}" if paper else "", "not run", ""]
        low, high = look_up(ours, path.replace("stats/", "intervals/"))
        return [f"{paper[0]:.4f}" if paper else "", f"{look_up(ours, path):.3f}", f"{low:.3f} to {high:.3f}"]

    worth = lambda row: -(look_up(numbers.get(("cracks-quick-deepcrack", row), {}), path) or 0)
    headings = [heading for name in sets for heading in (f"{name}, paper", f"{name}, IoU", "95 % over pictures")]
    return "\n".join([line("row", *headings), f"|---|{'--:|' * len(headings)}",
                      *(line(row, *cells(row, "CFD"), *cells(row, "DeepCrack")) for row in sorted(rows, key=worth))])


def learning_text():
    """A Markdown table of every kept run: how far training came."""
    lines = [line("run", "epochs", "training loss, last epoch", "validation loss, last epoch", "chosen by", "half-way", "last epoch",
                  "best"), "|---|--:|--:|--:|---|--:|--:|--:|"]
    for run in RUNS:
        if not (HERE / run.name / "summary.json").exists() or run.table.startswith("coco-tiny"):    # learned by heart: nothing to validate
            continue
        select_by = json.loads((HERE / run.name / "summary.json").read_text())["run"]["recipe"]["select_by"]
        with open(HERE / run.name / "metrics.csv", newline="") as stream:
            epochs = list(csv.DictReader(stream))
        values = [float(epoch[f"val/{select_by}"]) for epoch in epochs]
        best = (min if "loss" in select_by else max)(values)
        losses = (f"{float(epochs[-1][f'{part}/loss']):.3f}" for part in ("train", "val"))
        shown = (f"{value:.3f}" for value in (values[len(values) // 2 - 1], values[-1], best))
        lines.append(line(f"`{run.name}`", str(len(epochs)), *losses, f"validation {select_by}", *shown))
    return "\n".join([*lines, "", "A training loss as high as validation's says that next to nothing was learned by heart yet. (Training "
                      "pictures are augmented, which alone raises their loss.)"])


BENCHMARKS = ("ops", "models", "epyc-ops", "epyc-models", "epyc-segmenters", "val2017", "eval", "data", "chunked-attention",
              "call-torch2.11", "call-torch2.14")
# The rows that results/README.md shows; results/speed.md has all of them, and what they were measured with.
SHOWN = ("roi_align (2,256,200,200) 1024 rois 7x7 sr 2 forward", "roi_align (2,256,200,200) 1024 rois 7x7 sr 2 forward+backward",
         "nms 20000 boxes, IoU 0.5", "decode_boxes 250000 forward, cut at the border",
         "roi_pool (2,256,100,100) 512 rois 7x7 forward+backward",
         "paste_masks 100 masks 28x28 into 1024x1024, float", "paste_masks 100 masks, RLE",
         "deform_conv2d v2 (2, 256, 64, 64) 3x3 forward", "deform_conv2d v2 (2, 256, 64, 64) 3x3 forward+backward",
         "deform_conv2d v2 (2, 512, 32, 32) 3x3 forward+backward", "linear_attention (2, 3136, 256) k 64, 8 heads forward",
         "linear_attention (2, 3136, 256) k 64, 8 heads forward+backward", "sigmoid_focal_loss (536000, 1) sum forward+backward",
         "softmax_focal_loss (1000, 91) sum forward+backward", "maskrcnn_resnet50_fpn inference 512x512, batch 1, float32",
         "maskrcnn_resnet50_fpn inference 1024x1024, batch 1, float32", "maskrcnn_resnet50_fpn training step 512x512, batch 1, float32",
         "fasterrcnn_resnet50_fpn training step 512x512, batch 1, float32", "danet phase=5 training step 256x256, batch 1, float32",
         "unet training step 448x448, batch 2, float32", "fpn inference 448x448, batch 1, float32",
         "context_cracknet inference 448x448, batch 1, float32", "context_cracknet training step 448x448, batch 2, float32",
         "CAGM block forward+backward 448x448, batch 4, float32",
         "COCO bbox, val2017's size (5000 pictures, 36781 truths and detections), 80 classes",
         "COCO segm, val2017's size (5000 pictures, 36781 truths and detections), 80 classes",
         "data: decode + augment + instance masks, 32 pictures 640x640")


def benchmarks():
    """The kept measurements, in the order of BENCHMARKS, then those on a GPU."""
    some_rows_last = lambda path: (path.stem.count("-"), path.name)   # benchmark-gpu-models-unet-float32: measured anew of some rows
    files = [HERE / f"benchmark-{part}.json" for part in BENCHMARKS] + sorted(HERE.glob("benchmark-gpu-*.json"), key=some_rows_last)
    return [json.loads(path.read_text()) for path in files if path.exists()]


def cpu_rows():
    """{name: row}; of a name in several measurements the first of BENCHMARKS."""
    return {row["name"]: row for run in reversed(benchmarks()) if run["hardware"]["device"] == "cpu" for row in run["rows"]}


def speed_summary():
    """The rows SHOWN, on a CPU: ours, and how many times longer the others take."""
    rows = cpu_rows()
    lines = ["| what | ours, ms | the others take, times ours (smallest to largest pair) |", "|---|--:|---|"]
    for name in SHOWN:
        if name in rows:
            lines.append(line(name, f"{rows[name]['ours']:.4g}", ratios(rows[name]) or beside(rows[name])))
    return "\n".join(lines)


# The same of the GPU's, float32 and bfloat16 beside each other: a row's name is that of either, without its dtype.
SHOWN_GPU = ("roi_align (2,256,200,200) 1024 rois 7x7 sr 2 forward", "roi_align (2,256,200,200) 1024 rois 7x7 sr 2 forward+backward",
             "multiscale_roi_align 4 levels, 1000 rois, 14x14 forward+backward", "nms 20000 boxes, IoU 0.5",
             "batched_nms 5 x 1000, IoU 0.7", "decode_boxes 250000 forward, cut at the border",
             "roi_pool (2,256,100,100) 512 rois 7x7 forward", "roi_pool (2,256,100,100) 512 rois 7x7 forward+backward",
             "paste_masks 100 masks 28x28 into 1024x1024, float",
             "paste_masks 100 masks, RLE", "deform_conv2d v2 (2, 256, 64, 64) 3x3 forward",
             "deform_conv2d v2 (2, 256, 64, 64) 3x3 forward+backward", "linear_attention (2, 784, 256) k 256, 8 heads forward",
             "linear_attention (2, 12544, 256) k 64, 8 heads forward",
             "linear_attention (2, 12544, 256) k 64, 8 heads forward+backward", "sigmoid_focal_loss (536000, 1) sum forward+backward",
             "maskrcnn_resnet50_fpn inference 1024x1024, batch 4", "maskrcnn_resnet50_fpn training step 1024x1024, batch 4",
             "fasterrcnn_resnet50_fpn inference 1024x1024, batch 4", "fasterrcnn_resnet50_fpn training step 1024x1024, batch 4",
             "damagenet context_groups=1 inference 1024x1024, batch 4", "damagenet context_groups=1 training step 1024x1024, batch 4",
             "damagenet context_groups=256 inference 1024x1024, batch 4", "damagenet context_groups=256 training step 1024x1024, batch 4")


def gpu_rows():
    """{(name without its dtype, dtype): row}"""
    rows = {}
    for path in sorted(HERE.glob("benchmark-gpu-*.json")):
        dtype = path.stem.rpartition("-")[2]
        rows |= {(row["name"].removesuffix(f", {dtype}"), dtype): row for row in json.loads(path.read_text())["rows"]}
    return rows


def gpu_summary():
    """The rows SHOWN_GPU, float32 and bfloat16 beside each other."""
    rows = gpu_rows()
    lines = ["| what | float32: ours, ms | the others take, times ours | MB | bfloat16: ours, ms | the others | MB |",
             "|---|--:|---|--:|--:|---|--:|"]
    for name in SHOWN_GPU:
        if not any((name, dtype) in rows for dtype in ("float32", "bfloat16")):
            continue
        cells = []
        for dtype in ("float32", "bfloat16"):
            row = rows.get((name, dtype))
            cells += ["", "", ""] if row is None else [f"{row['ours']:.4g}", ratios(row), memory(row)]
        lines.append(line(name, *cells))
    return "\n".join(lines)


# What the project's README shows: (what, beside what, the row of the CPU, of the GPU; "": none is kept).
SPEED_GLANCE = (
    ("RoIAlign, 1,024 boxes, with gradient", "torchvision", *["roi_align (2,256,200,200) 1024 rois 7x7 sr 2 forward+backward"] * 2),
    ("RoIPool, 512 boxes, with gradient", "torchvision", *["roi_pool (2,256,100,100) 512 rois 7x7 forward+backward"] * 2),
    ("NMS, 20,000 boxes", "torchvision", *["nms 20000 boxes, IoU 0.5"] * 2),
    ("decoding of 250,000 boxes", "torchvision", *["decode_boxes 250000 forward, cut at the border"] * 2),
    ("pasting of 100 masks", "torchvision", *["paste_masks 100 masks 28x28 into 1024x1024, float"] * 2),
    ("deformable convolution (v2), with gradient", "torchvision", *["deform_conv2d v2 (2, 256, 64, 64) 3x3 forward+backward"] * 2),
    ("linear attention, 3,136 positions, with gradient", "stock",
     *["linear_attention (2, 3136, 256) k 64, 8 heads forward+backward"] * 2),
    ("linear attention, 784 positions, k 256, forward", "stock", *["linear_attention (2, 784, 256) k 256, 8 heads forward"] * 2),
    ("sigmoid focal loss, 536,000 logits, with gradient", "torchvision", *["sigmoid_focal_loss (536000, 1) sum forward+backward"] * 2),
    ("Mask R-CNN, inference at 1024 px", "torchvision", "maskrcnn_resnet50_fpn inference 1024x1024, batch 1, float32",
     "maskrcnn_resnet50_fpn inference 1024x1024, batch 4"),
    ("Mask R-CNN, training step (CPU: 512 px)", "torchvision", "maskrcnn_resnet50_fpn training step 512x512, batch 1, float32",
     "maskrcnn_resnet50_fpn training step 1024x1024, batch 4"),
    ("Faster R-CNN, training step (CPU: 512 px)", "torchvision", "fasterrcnn_resnet50_fpn training step 512x512, batch 1, float32",
     "fasterrcnn_resnet50_fpn training step 1024x1024, batch 4"),
    ("DamageNet beside Mask R-CNN, training step", "plain", "", "damagenet context_groups=1 training step 1024x1024, batch 4"),
    ("DANet's fifth phase beside Faster R-CNN, training step", "plain", "danet phase=5 training step 256x256, batch 1, float32", ""),
    ("Context-CrackNet, training step", "stock", "context_cracknet training step 448x448, batch 2, float32", ""),
    ("U-Net, training step", "smp", "unet training step 448x448, batch 2, float32", ""),
    ("COCO evaluation of boxes, val2017's size", "pycocotools",
     "COCO bbox, val2017's size (5000 pictures, 36781 truths and detections), 80 classes", ""))


def speed_glance():
    """SPEED_GLANCE: how many times longer the other one takes."""
    cpu, gpu = cpu_rows(), gpu_rows()
    lines = [line("what", "beside", "CPU", "H200, float32", "H200, bfloat16"), "|---|---|--:|--:|--:|"]
    for what, peer, on_cpu, on_gpu in SPEED_GLANCE:
        rows = cpu.get(on_cpu, {}), *(gpu.get((on_gpu, dtype), {}) for dtype in ("float32", "bfloat16"))
        lines.append(line(what, peer, *(ratio(row[peer], row.get("pairs")) if peer in row else "" for row in rows)))
    return "\n".join(lines)


def speed_text():
    """Markdown tables of results/benchmark-*.json (python benchmark.py --json), one a run: ours, the others, and the ratios in pairs."""
    parts = []
    for run in benchmarks():
        tf32 = run["hardware"]["device"] == "cuda" and "bfloat16" not in run["command"]
        hardware, versions = run["hardware"], {"torch": run["versions"]["torch"], **run["peers"]}
        rates = f"copy bandwidth {run['copy_GB/s']:.0f} GB/s" + (
            f", products {run['product_GFLOP/s']:.0f} GFLOP/s" + " (convolutions in TF32)" * tf32 if "product_GFLOP/s" in run else "")
        where = hardware["gpu"] or f"{hardware['cpu']}, {hardware['threads']} threads"
        made = ", ".join(f"{name} {version}" for name, version in versions.items())
        lines = [f"`{run['command']}`, {where}, {rates}, {made}, commit {short(run['commit'] or 'unknown')}.", "",
                 line("what", "ours, ms", "beside it: ms, times ours (smallest to largest of the pairs)", "share of the roofline",
                      "MB, ours / others"), "|---|--:|---|--:|--:|"]
        lines += [line(row["name"], f"{row['ours']:.4g}", beside(row), share(row), memory(row)) for row in run["rows"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def others_of(row):
    return {name: value for name, value in row.items() if isinstance(value, dict)}


def ratios(row):
    """How many times longer each of the others takes than ours."""
    return ", ".join(f"{name} {ratio(value)}" for name, value in others_of(row).items())


def ratio(value, pairs=None):
    return f"**{value['ratio']:.2f}** ({value['ratio_min']:.2f} to {value['ratio_max']:.2f}{f'; {pairs}' if pairs else ''})"


def beside(row):
    """The peers of a row; of the input pipeline, which has none, how many pictures a second it makes."""
    if "images/s" in row:
        return f"{row['images/s']:.0f} images/s a core"
    return "; ".join(f"{name} {value['ms']:.4g}, {ratio(value)}" for name, value in others_of(row).items())


def share(row):
    return f"{row['share_of_roofline']:.0%}" if "share_of_roofline" in row else ""


def memory(row):
    """Of the whole process, on a GPU of the model and its step ("peak"), or above what lay there before the call ("extra")."""
    for kind in ("peak", "extra"):
        found = [f"{row[key]:.0f}" for key in (f"{kind}_MB_ours", *(f"{kind}_MB_{name}" for name in others_of(row))) if key in row]
        if found:
            return " / ".join(found) + (" extra" if kind == "extra" else "")
    return ""


COMPLEXITY = "python evaluate.py --complexity --out results/complexity"


def complexity_text():
    """Two Markdown tables of results/complexity/complexity.json: the segmenters beside Context-CrackNet's Table 7, and DamageNet's cost."""
    path = HERE / "complexity" / "complexity.json"
    if not path.exists():
        return f"not run: `{COMPLEXITY}`"
    measured = json.loads(path.read_text())
    hardware = measured["hardware"]
    return "\n".join([
        *segmenters_cost(measured["models"], measured["paper"]),
        f"\nDamageNet's cost. Its paper: the dilated context takes {measured['paper context ms']} ms a picture more than Mask R-CNN.\n",
        *detectors_cost(measured["detectors"], measured["context"]),
        f"\n`{measured['command']}`; segmenters: {measured['picture']}, detectors: {measured['detector picture']}; one damage class, "
        f"quickest pass, {hardware['gpu'] or hardware['cpu']}, {hardware['threads']} thread{'s' * (hardware['threads'] > 1)}, "
        f"torch {measured['versions']['torch']}, commit {short(measured['commit'] or 'unknown')}."])


def segmenters_cost(models, paper):
    lines = ["| model | parameters, M | paper | GFLOPs, transposed convolutions by their input | by their output | paper | ms | paper, A40 "
             "| peak MB |", "|---|" + "--:|" * 8]
    for name, row in models.items():
        parameters, flops, milliseconds = (f"{value:.2f}" for value in paper[name]) if name in paper else ("", "", "")
        lines.append(f"| {CRACK_NAMES.get(name) or SMALL_SEGMENTERS.get(name, name)} | {row['parameters'] / 1e6:.2f} | {parameters} "
                     f"| {2 * row['multiply-adds'] / 1e9:.2f} | {2 * row['multiply-adds, output rule'] / 1e9:.2f} | {flops} "
                     f"| {row['ms']:.1f} | {milliseconds} | {whole(row['peak MB'])} |")
    return lines


def detectors_cost(detectors, context):
    lines = ["| model | parameters, M | multiply-adds, G | above Mask R-CNN | ms | above Mask R-CNN | peak MB |", "|---|" + "--:|" * 6]
    plain = detectors.get("maskrcnn_resnet50_fpn")
    for name, row in [*detectors.items(), *((f"the context blocks alone, {width}", row) for width, row in context.items())]:
        more = {key: f"{(row[key] - plain[key]) / unit:.1f}" if plain and name.startswith("damagenet") else ""
                for key, unit in (("multiply-adds", 1e9), ("ms", 1))}
        lines.append(f"| {name} | {row['parameters'] / 1e6:.2f} | {row['multiply-adds'] / 1e9:.1f} | {more['multiply-adds']} "
                     f"| {row['ms']:.1f} | {more['ms']} | {whole(row['peak MB'])} |")
    return lines


def whole(value):
    return "" if value is None else f"{value:.0f}"


OTHERS = {"complexity": ("What models cost", complexity_text), "learning": ("How far every run came", learning_text),
          "speed": ("Speed", speed_text)}


def kept_rows(run):
    """The names of a run's rows that are kept; none before it is done."""
    path = HERE / run.name / "summary.json"
    return set(json.loads(path.read_text())["rows"]) if path.exists() else set()


def index_text():
    """Two Markdown tables of the tables, those with results and those without: what stands in each, how many of its runs are done."""
    with_results, waiting = [], []
    for name, table in TABLES.items():
        runs = [run for run in RUNS if run.table == name]
        rows = {run.name: (run, found) for run in runs if (found := kept_rows(run))}
        parts = " (some rows missing)" if any(set(run.rows) - found for run, found in rows.values()) else ""
        waits = "" if len(rows) == len(runs) or any(run.hardware == "cpu" for run in runs) else f", wait for a GPU{table.waits}"
        (with_results if rows else waiting).append(
            line(f"[{name}]({name}.md)", table.title, table.paper, f"{len(rows)} of {len(runs)}{parts}{waits}"))
    with_results += [line(f"[{name}]({name}.md)", title, "", "") for name, (title, _) in OTHERS.items()]
    heads = [line("table", "what", "the paper's", "runs done"), "|---|---|---|--:|"]
    return "\n".join([*heads, *with_results, "", "Nothing yet, the command is there:", "", *heads, *waiting])


def write_tables():
    """results/<table>.md for every table, and the parts of the README and of results/README.md between <!-- table: NAME --> and
    <!-- end -->."""
    texts = {name: (table.title + f" ({table.paper})" * bool(table.paper), table_text(name)) for name, table in TABLES.items()}
    texts |= {name: (title, write()) for name, (title, write) in OTHERS.items()}
    for name, (title, text) in texts.items():
        (HERE / f"{name}.md").write_text(f"# {title}\n\n{text}\n")
    parts = {**{name: text for name, (_, text) in texts.items()}, "speed": speed_summary(), "speed-gpu": gpu_summary(),
             "speed-glance": speed_glance(), "cracks-quick": ranks_text(), "glance": glance_text(), "index": index_text()}
    for path in (ROOT / "README.md", HERE / "README.md"):
        page = path.read_text()
        for name, text in parts.items():
            begin, end = f"<!-- table: {name} -->", "<!-- end -->"
            if begin in page:
                before, _, rest = page.partition(begin)
                page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
        path.write_text(page)
