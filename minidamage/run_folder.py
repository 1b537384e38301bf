"""The run folder: everything a training run leaves behind, so that a table can be traced to a command a year later.

    runs/damagenet-demo-001/
        config.json          model config, recipe, command line, seed, commit, versions, kernels, hardware
        split.json           which picture trained, which chose, which is kept for the report
        metrics.csv          one row an epoch: lr, train and val losses, AP or IoU     curves.png  the same, drawn
        first_batch.png      what the model is fed: the first batch after augmentation, truth drawn on it
        val_predictions.png  validation pictures of the best epoch, truth beside prediction
        best.pt  last.pt     checkpoints (minidamage/checkpoint.py); with --keep-epochs epoch-001.pt, ... as well
"""
import contextlib
import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys

import torch


def new_run_folder(out, model, data):
    """Makes and returns `out/<model>-<data>-NNN`, one above the highest number there is.

    mkdir either makes the folder or fails, so two processes that start together get two folders.
    """
    name = re.sub(r"[^A-Za-z0-9_.]+", "_", os.path.basename(os.path.normpath(os.fspath(data)))).strip("_") or "data"
    os.makedirs(out, exist_ok=True)
    pattern = re.compile(re.escape(f"{model}-{name}-") + r"(\d+)")
    taken = [int(found[1]) for found in map(pattern.fullmatch, os.listdir(out)) if found]
    number = max(taken, default=0) + 1
    while True:
        folder = os.path.join(out, f"{model}-{name}-{number:03d}")
        try:
            os.mkdir(folder)
            return folder
        except FileExistsError:
            number += 1


def claim(folder):
    """Holds a run folder until it is closed (`with`), so that two trainings never write into one. ValueError where another process has it.

    A lock of the operating system: it goes with its process, however that ends. Where there is none (Windows), nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        return contextlib.nullcontext()
    lock, held = os.open(folder, os.O_RDONLY), contextlib.ExitStack()
    held.callback(os.close, lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        raise ValueError(f"{folder}: another process is training this run; stop it first (Ctrl-C there), or start another run") from None
    except OSError:                                           # some network disks have no locks
        pass
    return held


def newest_run(out, file):
    """The run folder under `out` whose `file` (best.pt, last.pt) was written last; ValueError when there is none."""
    folders = [os.path.join(out, entry) for entry in os.listdir(out)] if os.path.isdir(out) else []
    files = [path for path in (os.path.join(folder, file) for folder in folders) if os.path.isfile(path)]
    if not files:
        raise ValueError(f"expected a run with {file} under {out}/, found none; train one first (python train.py) or name the run")
    return os.path.dirname(max(files, key=os.path.getmtime))


def find_checkpoint(run, out, file):
    """The checkpoint path of `run`: a .pt file, a run folder (its `file` is taken), or "" for the newest run under `out`."""
    if not run:
        return os.path.join(newest_run(out, file), file)
    if os.path.isdir(run):
        path = os.path.join(run, file)
        if not os.path.isfile(path):
            if file == "best.pt" and os.path.isfile(os.path.join(run, "last.pt")):
                raise ValueError(f"{run}: the run has not finished an epoch (no best.pt); go on with "
                                 f"`python train.py --resume {shlex.quote(os.fspath(run))}`")
            found = ", ".join(sorted(os.listdir(run))[:8]) or "an empty folder"
            raise ValueError(f"{run}: expected a run folder with {file}, found {found}")
        return path
    if not os.path.isfile(run):
        raise ValueError(f"{run}: no such file or folder, expected a run folder or a .pt file")
    return run


def write_json(path, value, indent=1):
    """Writes JSON beside `path` and renames it; what JSON does not know (paths, devices) becomes a string. indent None: one line.
    A file's name that is no UTF-8 comes out in JSON's own escapes, and back as it was."""
    partial = f"{path}.partial"
    with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(value, file, indent=indent, ensure_ascii=False, default=str)
        file.write("\n")
    os.replace(partial, path)


def write_metrics(path, history):
    """Writes metrics.csv: one row an epoch from a list of {column: number}, columns in order of first appearance.

    The whole file is written each time from the list that the checkpoint carries: after a kill and a resume it has every
    epoch once.
    """
    columns = list(dict.fromkeys(column for row in history for column in row))
    partial = f"{path}.partial"
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in history)
    os.replace(partial, path)


def command_line():
    """The command that started this process, as one would type it."""
    return shlex.join(["python", *sys.argv])


def environment(device):
    """What the numbers were made with: commit, versions, kernels, hardware. Plain JSON."""
    from minidamage.ops import _extension

    device = torch.device(device)
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {"commit": git_commit(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                         **{name: _version(name) for name in ("numpy", "pillow", "minidamage")}},
            "kernels": {"mode": _extension.kernels_mode(), "backend": _extension.backend()},
            "hardware": {"device": str(device), "gpu": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" if gpu else None,
                         "cpu": _cpu_name(), "cpus": os.cpu_count(), "threads": torch.get_num_threads(), "system": platform.platform()}}


def git_commit():
    """The commit of this source tree, with "+changes" when files differ from it, but for what runs left in results/<run>/; None outside git
    or without git."""
    here = os.path.dirname(os.path.abspath(__file__))

    def git(*words):
        return subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)results/*/*")
        return git("rev-parse", "HEAD") + "+changes" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package):
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
