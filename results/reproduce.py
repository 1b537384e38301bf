"""Every training run behind a table of this project, as data: one command each, resumable; the tables are made from what the runs wrote.

    python results/reproduce.py --list
    python results/reproduce.py --run cars-damagenet cars-no-dilation      # trains (or goes on), evaluates, keeps the numbers
    python results/reproduce.py --table                                    # results/<table>.md and the README's tables, from the JSON

The data sets are found through the environment variable MINIDAMAGE_DATA. A run works in runs/reproduce/<name>/; what is kept lies in
results/<name>/: summary.json (every number, command, seed, commit, hardware), metrics.csv and curves.png.
"""
import argparse
import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "runs" / "reproduce"


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and the table rows that come from it."""

    name: str
    table: str
    train: str                          # arguments of train.py; {data} is MINIDAMAGE_DATA
    rows: dict[str, str]                # row of the table -> further arguments of evaluate.py
    hardware: str                       # "cpu": fits two cores; "gpu": waits for a card


# A reduced schedule that fits two CPU cores, the same for every row: ResNet-18 body (ImageNet weights without the last stage), pictures
# at 320 px, narrow heads, bfloat16. The paper's is 280 epochs of ResNet-50 at 1024 px on 3,640 pictures.
SMALL = ("--size 320 --batch-size 4 --epochs 14 --lr 3e-4 --clip 5 --amp bf16 --split 70/15/15 --select segm/AP50 "
         "--pretrained {data}/weights/resnet18_bnfolded_conv1_to_layer3_fp16.pth "
         "--set optimizer=adamw --set schedule=cosine --set warmup_iters=100 "
         "--set body=resnet18 --set fpn_channels=128 --set rpn_channels=128 --set box_head_channels=512 --set mask_layers=128,128 "
         "--set mask_dim_reduced=128 --set anchor_sizes=16,32,64,128,256 --set canonical_scale=112 --set box_batch_size_per_image=64 "
         "--set rpn_pre_nms_top_n_train=300 --set rpn_post_nms_top_n_train=300 "
         "--set rpn_pre_nms_top_n_test=300 --set rpn_post_nms_top_n_test=300")
# The same comparison at the paper's size, from the AugNet ResNet-50 body (trained without labels; the paper's weights are not stated).
FULL = ("--size 1024 --batch-size 8 --epochs 48 --amp bf16 --split 70/15/15 --pretrained {data}/weights/resnet50_augnet.pth "
        "--set norm=frozen --set warmup_iters=200")
NO_POST = "--set fill_holes=false --set remove_islands=false --set mask_threshold=0.5"


def car_runs(prefix, schedule, hardware, data, table, seeds):
    """DamageNet's ablation (the paper's section IV) on a car set: three trainings a seed, five rows."""
    runs = []
    for seed in seeds:
        base = f"--data {data} {schedule} --seed {seed}"
        of_seed = "" if seed == 0 else f"-seed{seed}"
        runs += [Run(f"{prefix}-damagenet{of_seed}", table, f"--model damagenet {base}",
                     {"DamageNet": "", "DamageNet, no post-processing": NO_POST}, hardware),
                 Run(f"{prefix}-no-dilation{of_seed}", table, f"--model damagenet {base} --set context=false",
                     {"no dilation": "", "Mask R-CNN (no dilation, no post-processing)": NO_POST}, hardware),
                 Run(f"{prefix}-no-fpn{of_seed}", table, f"--model damagenet {base} --set fpn=false", {"no FPN": ""}, hardware)]
    return runs


RUNS = [Run("demo", "demo", "", {"DamageNet": ""}, "cpu"),
        *car_runs("cars", SMALL, "cpu", "{data}/car_vehide_layout", "cars", seeds=(0,)),
        *car_runs("cars-coco", SMALL.replace("--epochs 14", "--epochs 8"), "cpu", "{data}/car_vehide_layout/coco", "cars-coco", (0,))[:2],
        *car_runs("cars-full", FULL, "gpu", "{data}/car_vehide_layout", "cars-full", seeds=(0, 1, 2)),
        *car_runs("cars-coco-full", FULL, "gpu", "{data}/car_vehide_layout/coco", "cars-coco-full", seeds=(0, 1, 2))]

COLUMNS = {"box AP": "stats/bbox/AP", "box AP50": "stats/bbox/AP50", "mask AP": "stats/segm/AP", "mask AP50": "stats/segm/AP50",
           "small-object recall (mask ARs)": "stats/segm/ARs", "pixel IoU, any damage": "pixels/pixel/IoU",
           "undamaged with a finding": "false_alarms/with findings"}         # no time: benchmark.py measures it, on a quiet machine


def data_folder():
    if not os.environ.get("MINIDAMAGE_DATA"):
        sys.exit("reproduce.py: MINIDAMAGE_DATA is not set; expected the folder that holds the data sets, for example "
                 "MINIDAMAGE_DATA=~/data python results/reproduce.py --run cars-damagenet")
    return os.environ["MINIDAMAGE_DATA"]


def script(name, arguments):
    """Runs a script of the project and passes its output on; stops with it when it fails."""
    command = [sys.executable, str(ROOT / name), *arguments]
    print(f"\n$ python {name} {' '.join(map(shlex.quote, arguments))}", flush=True)
    code = subprocess.run(command, cwd=ROOT).returncode
    if code:
        sys.exit(code)


def perform(run):
    """Trains (or goes on with) a run, evaluates its rows, and writes results/<name>/."""
    data, out = data_folder() if "{data}" in run.train else "", WORK / run.name
    started = sorted(out.glob("*/last.pt"))
    if not started:
        script("train.py", [*shlex.split(run.train.format(data=data)), "--out", str(out)])
    elif epochs_done(started[-1].parent) < planned_epochs(started[-1].parent):
        script("train.py", ["--resume", str(started[-1].parent)])
    folder = sorted(out.glob("*/last.pt"))[-1].parent
    kept = HERE / run.name
    kept.mkdir(exist_ok=True)
    summary = {"name": run.name, "table": run.table, "train": f"python train.py {run.train}".strip().replace("{data}", "$MINIDAMAGE_DATA"),
               "run": without_paths(json.loads((folder / "config.json").read_text())["run"], data), "rows": {}}
    for number, (row, arguments) in enumerate(run.rows.items()):
        target = folder / f"evaluation-{number}"
        script("evaluate.py", ["--checkpoint", str(folder / "best.pt"), "--out", str(target), *shlex.split(arguments)])
        summary["rows"][row] = without_paths(json.loads((target / "results.json").read_text()), data)
    for name in ("metrics.csv", "curves.png"):
        shutil.copyfile(folder / name, kept / name)
    partial = kept / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(kept / "summary.json")


def epochs_done(folder):
    return len((folder / "metrics.csv").read_text().splitlines()) - 1 if (folder / "metrics.csv").exists() else 0


def planned_epochs(folder):
    return json.loads((folder / "config.json").read_text())["run"]["recipe"]["epochs"]


def without_paths(value, data):
    """The folders of this machine replaced, so that what is kept reads the same everywhere."""
    if isinstance(value, dict):
        return {key: without_paths(item, data) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, data) for item in value]
    if isinstance(value, str):
        for folder in (os.path.abspath(data), data) if data else ():
            value = value.replace(folder, "$MINIDAMAGE_DATA")
        return value.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")
    return value


def look_up(numbers, path):
    """"stats/bbox/AP" in nested dicts whose keys may hold slashes themselves; None where it is not there."""
    head, _, rest = path.partition("/")
    value = numbers.get(head)
    return value.get(rest) if isinstance(value, dict) and rest else value


def short(commit):
    """Seven digits of a commit, and still whether the tree differed from it."""
    digits, changes, _ = commit.partition("+")
    return f"{digits[:7]}{' with uncommitted changes' if changes else ''}"


def table_text(table):
    """A Markdown table of all rows of a table, runs that are missing marked as such, and what the numbers were made with."""
    lines = ["| row | seed | " + " | ".join(COLUMNS) + " | command |", "|---|--:|" + "--:|" * len(COLUMNS) + "---|"]
    made_with = {}
    for run in [run for run in RUNS if run.table == table]:
        path = HERE / run.name / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else None
        for row in run.rows:
            command = f"`python results/reproduce.py --run {run.name}`"
            if summary is None:
                lines.append(f"| {row} | | " + " | ".join(["not run"] + [""] * (len(COLUMNS) - 1)) + f" | {command} |")
                continue
            numbers = summary["rows"][row]
            values = [look_up(numbers, path) for path in COLUMNS.values()]
            cells = ["-" if value is None else f"{value:.3f}" for value in values]
            lines.append(f"| {row} | {summary['run']['seed']} | " + " | ".join(cells) + f" | {command} |")
            commits = ", ".join(short(commit) for commit in dict.fromkeys(summary["run"]["commits"]) if commit)
            hardware = summary["run"]["hardware"]
            where = f"{hardware['gpu'] or hardware['cpu']}, {hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
            made_with[f"{numbers['pictures']} test pictures; {where}; torch {summary['run']['versions']['torch']}; commit {commits}"] = None
    return "\n".join([*lines, "", *(f"{each}." for each in made_with)]).strip()


# The rows of the speed table that the README shows; results/speed.md has all of them.
SHOWN = ("nms 20000 boxes, IoU 0.5", "batched_nms 5 x 1000", "7x7 sr 2 forward", "multiscale_roi_align", "paste_masks",
         "maskrcnn_resnet50_fpn", "damagenet", "COCO")


def speed_text(shown=("",)):
    """A Markdown table of results/benchmark-*.json (python benchmark.py --json): ours, each peer, and the ratio in paired runs."""
    files = [HERE / f"benchmark-{part}.json" for part in ("ops", "models", "eval")]
    if not all(path.exists() for path in files):
        return "not run: `for p in ops models eval; do python benchmark.py --$p --json results/benchmark-$p.json; done`"
    measured = [json.loads(path.read_text()) for path in files]
    lines = ["| what | ours, ms | peer | peer, ms | ratio (smallest to largest of the pairs) | peak MB, ours / peer |",
             "|---|--:|---|--:|--:|--:|"]
    for row in [row for run in measured for row in run["rows"] if any(words in row["name"] for words in shown)]:
        peers = [(name, value) for name, value in row.items() if isinstance(value, dict)] or [("", None)]
        for name, value in peers:
            cells = ["", "", ""]
            if value:
                cells = [name, f"{value['ms']:.4g}", f"{value['ratio']:.2f} ({value['ratio_min']:.2f} to {value['ratio_max']:.2f})"]
            peak = " / ".join(f"{row[key]:.0f}" for key in ("peak_MB_ours", "peak_MB_torchvision") if key in row)
            lines.append(f"| {row['name']} | {row['ours']:.4g} | " + " | ".join(cells) + f" | {peak} |")
    for run in measured:
        hardware, versions = run["hardware"], {"torch": run["versions"]["torch"], **run["peers"]}
        lines.append(f"\n`{run['command']}`, {hardware['gpu'] or hardware['cpu']}, {hardware['threads']} threads, copy bandwidth "
                     f"{run['copy_GB/s']:.0f} GB/s, " + ", ".join(f"{name} {version}" for name, version in versions.items())
                     + f", commit {short(run['commit'] or 'unknown')}.")
    return "\n".join(lines)


def write_tables():
    """results/<table>.md for every table, and the README's parts between <!-- table: NAME --> and <!-- end -->."""
    texts = {table: table_text(table) for table in dict.fromkeys(run.table for run in RUNS)}
    for table, text in {**texts, "speed": speed_text()}.items():
        (HERE / f"{table}.md").write_text(text + "\n")
    readme = (ROOT / "README.md").read_text()
    for table, text in {**texts, "speed": speed_text(SHOWN)}.items():
        begin, end = f"<!-- table: {table} -->", "<!-- end -->"
        if begin in readme:
            before, _, rest = readme.partition(begin)
            readme = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    (ROOT / "README.md").write_text(readme)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="the runs, and which are done")
    parser.add_argument("--run", nargs="+", metavar="NAME", help="runs to make, in this order; one that was cut goes on")
    parser.add_argument("--table", action="store_true", help="write the tables from the kept numbers")
    args = parser.parse_args()
    by_name = {run.name: run for run in RUNS}
    if args.list or not (args.run or args.table):
        for run in RUNS:
            done = "done" if (HERE / run.name / "summary.json").exists() else "    "
            print(f"{done}  {run.hardware}  {run.name:32s} {', '.join(run.rows)}")
    for name in args.run or []:
        if name not in by_name:
            sys.exit(f"reproduce.py: no run {name!r}; expected one of {', '.join(by_name)}")
        perform(by_name[name])
    if args.table:
        write_tables()


if __name__ == "__main__":
    main()
