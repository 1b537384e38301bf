"""What the scoring of every task shares: the job, its place on the disk, printing, notes and the report's frame."""
import contextlib
import dataclasses
import glob
import os

import torch

from minidamage import run_folder
from minidamage.config import apply_settings
from minidamage.data.folders import root_of
from minidamage.evaluation.occlusion import in_words
from minidamage.metrics import tables
from minidamage.visualize.report import Picture, Table, write_report


# Arguments of train.py that do not shape what is learned, or are told elsewhere: runs that differ in these alone are seeds of one model.
NOT_TRAINING = ("model", "data", "images", "set", "seed", "out", "device", "workers", "timeout", "keep_epochs", "compile")


@dataclasses.dataclass
class Job:
    """What evaluate.py settled: a model, the pictures to score it on, and the command line's flags."""

    args: object
    model: torch.nn.Module
    checkpoint: dict
    path: str                                 # of the checkpoint
    device: torch.device
    dataset: object                           # data.Dataset
    part: str                                 # "test", "val", ...
    records: list
    own: bool                                 # whether the data set is the one that the run was trained on

    @property
    def names(self):
        return tuple(self.checkpoint["class_names"])

    @property
    def folder(self):
        """Where the results go: --out, or evaluation-<part>/ beside the checkpoint, with the data set's name if it is another, the share
        of each finding that is covered, and what --set changes."""
        of_set = "" if self.own else "-" + os.path.splitext(os.path.basename(os.path.abspath(self.dataset.path)))[0]
        covered = f"-occluded-{self.args.occlude:g}" if self.args.occlude else ""
        name = "-".join([f"evaluation{of_set}-{self.part}{covered}", *self.args.set])
        return self.args.out or os.path.join(os.path.dirname(os.path.abspath(self.path)), name)

    @property
    def workers(self):
        return self.args.workers if self.args.workers is not None else 4 if self.device.type == "cuda" else 0

    def about(self):
        """What was scored, with what: the head of results.json."""
        run = self.checkpoint.get("run", {})
        typed = {flag: value for flag, value in run.get("args", {}).items() if flag not in NOT_TRAINING}
        return {"command": run_folder.command_line(), "task": self.model.task, "checkpoint": self.path, "model": self.checkpoint["model"],
                "trained_with": list(run.get("args", {}).get("set") or []), "trained_by": typed, "seed": run.get("seed"),
                "epoch": self.checkpoint.get("train", {}).get("epoch"),
                "data": os.path.abspath(self.dataset.path), "part": self.part, "occlusion": self.args.occlude or 0, "set": self.args.set,
                "pictures": len(self.records), **run_folder.environment(self.device)}


def relative_files(job):
    """The pictures' paths as seen from the data set's folder: what two runs on copies of one set have in common."""
    return [os.path.relpath(record.file, root_of(job.dataset.path)) for record in job.records]


@contextlib.contextmanager
def writing(folder, shown=()):
    """Makes the folder; an OSError inside then says that it was met while writing, and where. Behind it prints the sections shown,
    the summary last, where a terminal still has it: a closed pipe (| head) loses no file, and a full disk no number."""
    try:
        os.makedirs(folder, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(f"could not write the results into {folder}: {error}") from error
    finally:
        print_sections([*shown[1:], *shown[:1]])


def change_finish(model, settings):
    """The model's config with --set applied; ValueError for a field that is more than the finish of its masks."""
    for setting in settings:
        if setting.partition("=")[0] not in model.finish_fields:
            known = ", ".join(model.finish_fields) or "no field"
            raise ValueError(f"--set {setting}: a trained {model.name} takes {known} here; its other fields are settled when it "
                             "is trained (train.py --set)")
    config = apply_settings(model.config, settings)
    model.check_config(config)
    return config


def general_notes(job, unreadable):
    """[a sentence] on the demo set, and one with every file of `unreadable`."""
    notes = []
    if job.checkpoint.get("run", {}).get("args", {}).get("data") == "demo" and job.own:
        notes.append("the demo set is drawn: these numbers say nothing of real damage")
    if unreadable:
        notes.append(f"{len(unreadable)} of {len(job.records)} pictures cannot be read; each is scored as a black one, its objects missed: "
                     f"{', '.join(unreadable)}")
    return notes


def cost_text(metrics):
    return (f"{metrics['ms per picture']:.1f} ms a picture ({metrics['pictures per second']:.2f} a second; the median picture), "
            f"peak memory {metrics['peak memory MB']:.0f} MB")


def summary(lines, occlude):
    """The first section of the page, the last in a terminal: the main numbers by name, and once the share that is covered, where --occlude
    asked for it."""
    return ("Summary", [*lines, *([f"{in_words(occlude)} by a patch in the picture, the truth left whole"] if occlude else [])])


def print_sections(shown):
    """Prints [(heading, [table or text, ...]), ...]; a table is (caption, columns, rows)."""
    for heading, blocks in shown:
        are_texts = isinstance(blocks[0], str)
        print("\n" + ("\n" if are_texts else "\n\n").join(f"{heading}: {b}" if are_texts else tables.as_text(*b) for b in blocks))


def write_page(folder, shown, about, plots, pictures):
    """Writes report.html: the printed tables, plots ((heading, [Picture, ...]) is added to that section), the worst predictions
    ([(path, caption), ...]) and how it was made. Worst predictions of an earlier evaluation go."""
    for path in set(glob.glob(os.path.join(glob.escape(folder), "worst-*.jpg"))) - {path for path, _ in pictures}:
        os.remove(path)
    as_block = lambda block: block if isinstance(block, str) else Table(block[1], block[2], block[0])
    blocks = [(heading, [as_block(block) for block in content]) for heading, content in shown]
    for heading, drawn in plots:
        next(content for name, content in blocks if name == heading).extend(drawn)
    if pictures:
        blocks.append(("Worst predictions", [Picture(path, caption, wide=True, titled=True) for path, caption in pictures]))
    covered = f", {in_words(about['occlusion'])}" if about["occlusion"] else ""
    facts = {name: str(value) for name, value in about.items() if not isinstance(value, dict)}
    blocks.append(("How this was made", [facts, *(part for name, value in about.items() if isinstance(value, dict) and value
                                                  for part in (f"{name.replace('_', ' ').capitalize()}:", value))]))
    write_report(os.path.join(folder, "report.html"), f"{about['model']} on {about['part']} of {os.path.basename(about['data'])}", blocks,
                 f"{about['pictures']} pictures{covered}, `{about['checkpoint']}`")


def without_nan(value):
    """NaN is not JSON: None instead."""
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value
