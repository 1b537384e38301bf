"""Scores a trained model, or anybody's COCO results; compares runs; counts what a model costs.

    python evaluate.py                                                   the newest run's best.pt on that run's own test part
    python evaluate.py --checkpoint runs/damagenet-demo-001 --part val
    python evaluate.py --checkpoint best.pt --data other/                another data set, same class names
    python evaluate.py --occlude 0.1                                     with a tenth of each damage covered in the pictures
    python evaluate.py --truth gt.json --detections dt.json              two COCO files, no model
    python evaluate.py --ceiling --data coco/                            what perfect masks of 28x28 pixels would score, no model
    python evaluate.py --compare runs/context_cracknet-cfd-001 runs/unet-cfd-001 ...       tables, spread over sets, paired tests
    python evaluate.py --test-epochs runs/unet-cfd-001                   every kept epoch on the validation part
    torchrun --nproc-per-node 8 evaluate.py --checkpoint best.pt         the pictures shared out to eight GPUs, the same numbers
    python evaluate.py --complexity unet context_cracknet                parameters, multiply-adds, time, memory (no name: all of them)

With a model, writes `evaluation-<part>/` into the run's folder: results.json (every number), report.html, the pictures of the worst
predictions, and for --compare pictures.json (a segmenter's counts of each picture; a detector's AP, and the means over classes, in every
bootstrap draw of them); of a detector also detections.json and truth.json (COCO; --truth and --detections give the same numbers on them),
of a segmenter with --save-maps its label maps.

What is scored, and how: minidamage/evaluation/.
"""
import os
import sys

from minidamage import distributed, run_folder
from minidamage.checkpoint import choose_device, load_checkpoint
from minidamage.command_line import Parser, ended
from minidamage.data.flags import READING, add_reading_flags, reading
from minidamage.data.folders import root_of
from minidamage.evaluation import ceiling, comparison, complexity, detection, epochs, occlusion, segmentation
from minidamage.evaluation.common import Job, without_nan, writing
from minidamage.evaluation.selection import choose_pictures
from minidamage.metrics import tables
from minidamage.metrics.detection import evaluate_coco_files

# What is done: the flags that it takes, beside those of the machine, which change no number.
OF_A_SET, OF_THE_MACHINE = {"data", "part", "out", *READING}, {"device", "workers"}
USES = {"--truth with --detections": {"truth", "detections", "iou_type", "no_categories", "out"},
        "--ceiling without a model": {"ceiling", *OF_A_SET},
        "--compare": {"compare", "metric", "size", "at", "draws", "out"},
        "--complexity": {"complexity", "out"},
        "--test-epochs": {"test_epochs", "data", *READING},
        "one model": {"checkpoint", "ceiling", "score", "draws", "set", "occlude", "worst", "mm_per_px", "save_maps", *OF_A_SET}}


def main(argv=None):
    """Returns the exit code: 0, 1 where something could not be read or written, 2 for a mistake in what was asked."""
    args = parse_arguments(argv)
    try:
        distributed.start()
        with distributed.quiet():
            code = answer(args)
        distributed.end()
        return code
    except BrokenPipeError:                                   # | head: `ended`
        raise
    except (ValueError, OSError) as error:
        if distributed.first_to_say(str(error), seconds=5):
            print(f"evaluate.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except RuntimeError as error:
        if not distributed.is_lost(error):
            raise
        if distributed.first_to_say("lost"):
            print(f"evaluate.py: process {distributed.rank()} of {distributed.world()} has lost another one, nothing was written: "
                  f"{str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def answer(args):
    """Does what was asked; returns the exit code. Of several processes all score a model, process 0 alone does the rest."""
    check_numbers(args)
    task = task_of(args)
    for flag in sorted(args.typed - USES[task] - OF_THE_MACHINE):
        raise ValueError(f"--{flag.replace('_', '-')}: {task} has no use for it; leave it out")
    if task != "one model" and not distributed.is_main():
        return 0
    if task == "--truth with --detections":
        return score_files(args)
    if task == "--ceiling without a model":
        if not args.data:
            raise ValueError("--ceiling is a data set's: name it with --data")
        return ceiling.report(args.ceiling, args.data, args.part, args.out, **reading(args))
    if task == "--compare":
        return comparison.compare(args.compare, args.metric, args.size, args.at, args.draws, args.out)
    if task == "--complexity":
        return complexity.report(args.complexity, choose_device(args.device), args.out)
    if task == "--test-epochs":
        return epochs.score(args.test_epochs, choose_device(args.device), args)
    return score_model(args)


def task_of(args):
    """The key of USES that is asked for."""
    if args.truth or args.detections:
        return "--truth with --detections"
    if args.ceiling is not None and not args.checkpoint:
        return "--ceiling without a model"
    if args.complexity is not None:
        return "--complexity"
    return "--compare" if args.compare else "--test-epochs" if args.test_epochs else "one model"


def check_numbers(args):
    for flag, meaning in (("draws", "0 (no intervals) or more draws"), ("worst", "0 or more pictures"), ("workers", "0 or more processes")):
        value = getattr(args, flag)
        if value is not None and value < 0:
            raise ValueError(f"--{flag}: expected {meaning}, got {value}")
    if args.mm_per_px is not None and not 0 < args.mm_per_px < float("inf"):
        raise ValueError(f"--mm-per-px: expected millimetres a pixel above 0, got {args.mm_per_px}")
    if args.ceiling is not None:
        ceiling.check_size(args.ceiling)
    if args.occlude is not None:
        occlusion.check_share(args.occlude)


def parse_arguments(argv):
    parser = Parser(description="Score a trained model on a data set, or two COCO files; compare runs; count costs.")
    add = parser.add_argument
    add("--checkpoint", default="", metavar="F", help="a .pt file or a run folder (default: best.pt of the newest run under runs/)")
    add("--data", metavar="D", help="data set to score on (default: the one the run was trained on)")
    add_reading_flags(parser)                 # default: as the run was trained
    add("--part", choices=("test", "val", "train", "all"),
        help="which part of it (default: test; of another data set without parts, all of it)")
    add("--score", type=float, metavar="S", help="lowest score of a finding (or probability of a damaged pixel) for pixel metrics, alarms "
        "and pictures, 0 to 1 (default: the checkpoint's threshold of each class, chosen on its validation part)")
    add("--draws", type=int, default=500, metavar="N",
        help="bootstrap draws of pictures for the intervals, 0 = none (default: %(default)s)")
    add("--set", action="append", default=[], metavar="FIELD=VALUE", help="change how the checkpoint's masks are finished, for example "
        "fill_holes=false remove_islands=false mask_threshold=0.5; fields that shape its weights stay")
    add("--occlude", type=float, metavar="SHARE", help="cover this share of each finding of the truth with a patch in the pictures, for "
        "example 0.1; the truth stays whole (default: nothing is covered)")
    add("--worst", type=int, default=8, metavar="N", help="how many of the worst predictions to draw (default: %(default)s)")
    add("--mm-per-px", type=float, metavar="MM", help="segmentation: millimetres a pixel of the pictures; recall is then told apart for "
        "cracks under 1 mm, 1 to 3 mm and wider (default: by width in pixels)")
    add("--save-maps", action="store_true", help="segmentation: also write each picture's label map at its own size, as a palette PNG")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where there is one, else cpu)")
    add("--workers", type=int, help="processes that read pictures (default: 0 on a CPU, 4 with a GPU)")
    add("--out", metavar="DIR", help="folder for the results (default: evaluation-<part>/ beside the checkpoint; files, --compare and "
        "--complexity: none)")
    files = parser.add_argument_group("two COCO files")
    files.add_argument("--truth", metavar="GT.JSON", help="COCO ground truth: score --detections against it, without a model")
    files.add_argument("--detections", metavar="DT.JSON", help="COCO results, a list of detections")
    files.add_argument("--iou-type", choices=("bbox", "segm"), help="score only boxes or only masks of the files (default: what they hold)")
    files.add_argument("--no-categories", action="store_true", help="files: ignore categories, as for proposals")
    add("--ceiling", nargs="?", type=int, const=28, metavar="M", help="the mask AP of the truth itself at the mask head's M x M pixels "
        "(28): what a perfect head would score on --data, without a model, or beside what --checkpoint scores")
    several = parser.add_argument_group("several models")
    several.add_argument("--compare", nargs="+", metavar="RUN", help="results of several evaluations (run or evaluation folders, or their "
                         "results.json): one table, mean and spread over data sets, the first model tested against each other one; runs "
                         "that differ in their --seed alone count as one model")
    several.add_argument("--metric", metavar="NAME", help="--compare: what is tested and drawn (default: IoU, or the AP of detectors)")
    several.add_argument("--size", choices=("model", "native"), default="model", help="--compare: pixels scored at the model's size, "
                         "or at the pictures' own (default: %(default)s)")
    several.add_argument("--at", choices=("chosen", "0.5"), default="chosen", help="--compare: at the threshold chosen on validation, "
                         "or at 0.5 (default: %(default)s)")
    several.add_argument("--complexity", nargs="*", metavar="MODEL", help="parameters, multiply-adds, FLOPs, time and memory of these "
                         "models, or of every segmentation model, beside the crack paper's Table 7, and of DamageNet and Mask R-CNN")
    several.add_argument("--test-epochs", metavar="RUN", help="score every epoch-NNN.pt of a run (train.py --keep-epochs) on its "
                         "validation part and name the best")
    args = parser.parse_args(argv)
    args.typed = {flag for flag, value in vars(args).items() if value != parser.get_default(flag)}
    return args


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
    device = choose_device(distributed.device_name(args.device))
    path = run_folder.find_checkpoint(args.checkpoint, "runs", "best.pt")
    model, checkpoint = load_checkpoint(path, device)
    check_task(args, model)
    dataset, part, records, own = choose_pictures(args, checkpoint, path)
    check_out_folder(args.out, dataset.path)
    covered = f", {occlusion.in_words(args.occlude)}" if args.occlude else ""
    print(f"{checkpoint['model']} from {path} on {device}, {len(records)} pictures ({part} of {dataset.path}){covered}")
    job = Job(args, model, checkpoint, path, device, dataset, part, records, own)
    {"detection": detection.score, "segmentation": segmentation.score}[model.task](job)
    return 0


def check_out_folder(out, data):
    """ValueError where the results would lie among a data set's own files, some of which have the same names."""
    folder = os.path.realpath(root_of(data))
    if out and os.path.isdir(folder) and os.path.commonpath([folder, os.path.realpath(out)]) == folder:
        raise ValueError(f"--out {out}: expected a folder outside of the data set ({folder}), whose files truth.json and the like would "
                         "replace")


def check_task(args, model):
    """ValueError for a flag that the model's task has no use for."""
    typed = {"detection": [("--ceiling", args.ceiling is not None)],
             "segmentation": [("--mm-per-px", args.mm_per_px is not None), ("--save-maps", args.save_maps)]}
    for task, flags in typed.items():
        for flag in [flag for flag, is_typed in flags if is_typed and task != model.task]:
            raise ValueError(f"{flag} is for {task} models, the checkpoint holds {model.name} ({model.task}); leave it out")


if __name__ == "__main__":
    try:
        sys.exit(ended(main))
    except KeyboardInterrupt:
        print("\nevaluate.py: stopped, nothing was written", file=sys.stderr)
        sys.exit(130)
