"""Makes every training run behind a table of this project, one command each, resumable; the tables are made from what the runs wrote.

    python results/reproduce.py --list                                     # all of them, by table; --list steel: those, and their commands
    python results/reproduce.py --run cars-damagenet cars-no-dilation      # trains (or goes on), evaluates, keeps the numbers
    python results/reproduce.py --budget 25 --hardware gpu                 # what is missing most, until 25 minutes are over
    python results/reproduce.py --table                                    # results/<table>.md and the README's tables, from the JSON

The runs are data, in runs.py; tables.py makes the tables. The data sets are found through the environment variable MINIDAMAGE_DATA. A
run works in runs/reproduce/<name>/; what is kept lies in results/<name>/: summary.json (every number, command, seed, commit, hardware),
pictures.json (what rows are tested against each other with), metrics.csv and curves.png. A run that is stopped, by Ctrl-C, a kill or the
budget, goes on where it was.
"""
import argparse
import csv
import difflib
import glob
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

from runs import RUNS, TABLES
from tables import DRAWS, write_tables

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent
WORK = ROOT / "runs" / "reproduce"
STOP_EARLY = 40                         # seconds before the end of a budget: train.py saves and ends within them


class OutOfTime(Exception):
    """The budget is spent; what was running has been saved."""


def data_folder():
    if not os.environ.get("MINIDAMAGE_DATA"):
        sys.exit("reproduce.py: MINIDAMAGE_DATA is not set; expected the folder that holds the data sets, for example "
                 "MINIDAMAGE_DATA=~/data python results/reproduce.py --run cars-damagenet")
    return os.environ["MINIDAMAGE_DATA"]


def typed(run, which):
    """How a run's train.py or evaluate.py is typed, without its arguments: a peer's model is known to results/peers.py alone."""
    return ["results/peers.py", which] if run.peer else [f"{which}.py"]


def typed_out(run):
    """The whole command that trains a run."""
    return f"python {' '.join(typed(run, 'train'))} {run.train}".strip().replace("{data}", "$MINIDAMAGE_DATA")


def script(words, deadline=None):
    """Runs a script of the project and passes its output on; stops with it when it fails. deadline: time.monotonic() at which it is asked
    to save and end (SIGTERM); raises OutOfTime then."""
    print(f"\n$ python {' '.join(map(shlex.quote, words))}", flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], cwd=ROOT)
    try:
        code = process.wait(None if deadline is None else max(0.0, deadline - STOP_EARLY - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise OutOfTime from None
    if code:
        sys.exit(code)


def perform(run, deadline=None):
    """Trains (or goes on with) a run, evaluates its rows, and writes results/<name>/. Raises OutOfTime at the deadline."""
    data, out = data_folder() if "{data}" in run.train else "", WORK / run.name
    started = sorted(out.glob("*/last.pt"))
    if not started:
        script([*typed(run, "train"), *shlex.split(run.train.format(data=data)), "--out", str(out)], deadline)
    elif len(epochs_of(started[-1].parent)) < planned_epochs(started[-1].parent):
        script([*typed(run, "train"), "--resume", str(started[-1].parent)], deadline)
    folder = sorted(out.glob("*/last.pt"))[-1].parent
    kept = HERE / run.name
    kept.mkdir(exist_ok=True)
    trained = json.loads((folder / "config.json").read_text())["run"]
    tree = pathlib.Path(trained["args"]["out"]).parents[2]                        # runs/reproduce/NAME: the tree may have moved since
    summary = {"name": run.name, "table": run.table, "train": typed_out(run),
               "peer": f"{run.peer} {metadata.version(run.peer)}" if run.peer else "",
               "run": without_paths(trained, data, tree), "rows": {}}
    pictures = {}
    for number, (row, arguments) in enumerate(run.rows.items()):
        target = folder / f"evaluation-{number}"
        script([*typed(run, "evaluate"), "--checkpoint", str(folder / "best.pt"), "--out", str(target), "--draws", str(DRAWS),
                *shlex.split(arguments.format(run=folder))], deadline)
        summary["rows"][row] = without_paths(json.loads((target / "results.json").read_text()), data)
        pictures[row] = json.loads((target / "pictures.json").read_text())
    for name in ("metrics.csv", "curves.png"):
        shutil.copyfile(folder / name, kept / name)
    write_whole(kept / "pictures.json", json.dumps(pictures, separators=(",", ":")))
    write_whole(kept / "summary.json", json.dumps(summary, indent=1))                     # last: it says that the run is done


def write_whole(path, text):
    """Beside it first: a kill leaves the file of before, or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(f"{text}\n")
    partial.replace(path)


def epochs_of(folder):
    """[{column: value}], a finished epoch each."""
    if not (folder / "metrics.csv").exists():
        return []
    with open(folder / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def planned_epochs(folder):
    return json.loads((folder / "config.json").read_text())["run"]["recipe"]["epochs"]


def without_paths(value, data, tree=ROOT):
    """The folders of this machine replaced, so that what is kept reads the same everywhere. tree: where it was made."""
    if isinstance(value, dict):
        return {key: without_paths(item, data, tree) for key, item in value.items()}
    if isinstance(value, list):
        return [without_paths(item, data, tree) for item in value]
    if isinstance(value, str):
        for folder in (os.path.abspath(data), data) if data else ():
            value = value.replace(folder, "$MINIDAMAGE_DATA")
        return value.replace(f"{tree}{os.sep}", "").replace(str(tree), ".")
    return value


def is_done(run):
    return (HERE / run.name / "summary.json").exists()


def has_all_rows(run):
    """Whether a kept run was scored for every row of the list, which may have grown since."""
    return set(run.rows) <= set(json.loads((HERE / run.name / "summary.json").read_text())["rows"])


def lacks(run):
    """What is not there of a run's data set (or MINIDAMAGE_DATA), start weights and peer; else "": a run of the list may wait."""
    if run.peer and importlib.util.find_spec(run.peer) is None:
        return f"the package {run.peer}"
    words = shlex.split(run.train.format(data=os.environ.get("MINIDAMAGE_DATA", "$MINIDAMAGE_DATA")))
    paths = [path.partition(":")[0] for flag, path in zip(words, words[1:]) if flag in ("--data", "--pretrained")]
    missing = [path for path in paths if not os.path.exists(path)]
    packed = missing and glob.glob(f"{glob.escape(missing[0].removesuffix('.pth'))}_int8.pth")
    unpack = f" (in {os.path.dirname(missing[0])}: python unpack.py {os.path.basename(missing[0])})" if packed else ""
    return missing[0] + unpack if missing else ""


def share_done(run):
    """Of a run's epochs: 0 for one that has not begun, 1 for one that is kept."""
    if is_done(run):
        return 1.0
    started = sorted((WORK / run.name).glob("*/last.pt"))
    return len(epochs_of(started[-1].parent)) / planned_epochs(started[-1].parent) if started else 0.0


def missing_most(runs):
    """The runs that are not done, in the order that fills the tables best: begun ones first, then first seeds, then tables with the
    smallest share of rows, then the list's order."""
    kept = {}
    for run in runs:
        kept.setdefault(run.table, []).append(is_done(run))
    share = {table: sum(done) / len(done) for table, done in kept.items()}
    waiting = [run for run in runs if not is_done(run)]
    return sorted(waiting, key=lambda run: (share_done(run) == 0, "-seed" in run.name, share[run.table]))


def spend(minutes, runs):
    """Makes run after run until the minutes are over; what is unfinished then has been saved."""
    deadline = time.monotonic() + 60 * minutes
    for run in missing_most(runs):
        if time.monotonic() > deadline - 2 * STOP_EARLY:
            break
        if lacks(run):
            print(f"reproduce.py: {run.name} waits for {lacks(run)}", flush=True)
            continue
        try:
            perform(run, deadline)
        except OutOfTime:
            print(f"reproduce.py: the budget of {minutes:g} minutes is spent; {run.name} is saved at {share_done(run):.0%} of its epochs "
                  "and goes on with the next --budget or --run", flush=True)
            break


def show_list(words=()):
    """The rows by table, those of several seeds by their first one; with words, every run whose name has one of them, and its command."""
    print("done: kept (2/3: of its seeds NAME, NAME-seed1, NAME-seed2), part: kept without some of its rows, 40%: begun, -: its data, start "
          "weights or peer is not there; cpu, gpu: what it was meant for")
    shown = [run for run in RUNS if not words or any(word in run.name for word in words)]
    if not shown:
        sys.exit(f"reproduce.py: no run has {' or '.join(map(repr, words))} in its name; the tables: {', '.join(TABLES)}")
    seeds = {}
    for run in shown:
        seeds.setdefault(run.name if words else first_seed(run.name), []).append(run)
    for table in TABLES:
        rows = {name: runs for name, runs in seeds.items() if runs[0].table == table}
        if rows:
            print(f"\n{table}: {TABLES[table].title}" + f" ({TABLES[table].paper})" * bool(TABLES[table].paper))
        for name, runs in rows.items():
            cpu, gpu = runs[0].minutes
            expected = ", ".join(f"{minutes} min on {where}" for minutes, where in ((cpu, "two CPU cores"), (gpu, "a GPU")) if minutes)
            each = " each" * (len(runs) > 1)
            print(f"{state(runs):5s} {runs[0].hardware}  {name:38s} {', '.join(runs[0].rows)}" + f"   ({expected}{each})" * bool(expected))
            if words:
                print(f"           {typed_out(runs[0])}")


def first_seed(name):
    return re.sub(r"-seed\d+$", "", name)


def state(runs):
    """In a word or a number, how far the seeds of a row are."""
    shares = [share_done(run) for run in runs]
    if min(shares) == 1:
        return "done" if all(map(has_all_rows, runs)) else "part"
    if 1 in shares:
        return f"{shares.count(1)}/{len(runs)}"
    return f"{max(shares):.0%}" if max(shares) else "-" * bool(lacks(runs[0]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", nargs="*", metavar="WORD", help="the runs by table, and which are done; -: its data, or its peer, is not "
                        "there. With words: the runs whose name has one of them, and their commands")
    parser.add_argument("--run", nargs="+", metavar="NAME", help="runs to make, in this order; one that was cut goes on")
    parser.add_argument("--resume", action="store_true", help="go on with every run that was begun and not finished")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="stop, and save, when so many minutes are over; without --run: "
                        "what is missing most first")
    parser.add_argument("--hardware", choices=("cpu", "gpu"), default="cpu", help="which runs --budget chooses from (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="write the tables from the kept numbers")
    args = parser.parse_args()
    by_name = {run.name: run for run in RUNS}
    for name in args.run or []:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 3)
            sys.exit(f"reproduce.py: no run {name!r}; {f'did you mean {chr(32).join(near)}?' if near else '--list shows all of them'}")
    chosen = [by_name[name] for name in args.run or []]
    if args.resume:
        chosen += [run for run in RUNS if 0 < share_done(run) < 1 and run not in chosen]
    for run in chosen:
        if lacks(run):
            sys.exit(f"reproduce.py: {run.name} waits for {lacks(run)}")
    if args.budget is not None:
        spend(args.budget, chosen or [run for run in RUNS if run.hardware == args.hardware])
    else:
        for run in chosen:
            perform(run)
    if args.table:
        write_tables()
    if args.list is not None or not (args.run or args.resume or args.budget is not None or args.table):
        show_list(args.list or ())


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:                                           # --list | head
        sys.stderr.close()
