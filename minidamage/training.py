"""From a command line to a `Run`: the data, the model, the recipe and the counters that `train()` in train.py works on.

A run starts fresh (`fresh`) or goes on where an earlier one stopped (`gone_on_with`, `restore`). Every user's
mistake is found here, before the first step, and raised as a ValueError that says what was expected, what came, what to type.
"""
import argparse
import copy
import dataclasses
import difflib
import importlib.util
import math
import os
import random
import shlex
import shutil

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn

import minidamage
from minidamage import MODELS, distributed, run_folder
from minidamage.checkpoint import (build_from_checkpoint, choose_device, load_pretrained, load_weights, read_checkpoint,
                                   set_rng_state)
from minidamage.config import Recipe, apply_settings, from_dict
from minidamage.data import DetectionDataset, SegmentationDataset, limit, load_dataset
from minidamage.data.anchor_choice import choose_anchors, fit_of, training_sides
from minidamage.data.flags import reading
from minidamage.data.record import outlined
from minidamage.data.split import from_names, names_of, parse_fractions, shared_by, three_parts
from minidamage.data.synthetic import make_demo
from minidamage.layers.sync_batch_norm import synchronise_norms
from minidamage.validation import default_metric, metric_names, validation_set

DEFAULTS = {"model": "damagenet", "data": "demo", "seed": 0, "split_seed": 0, "out": "runs", "limit": 1.0, "amp": "off",
            "deterministic": False, "keep_epochs": False, "patience": 0, "set": [], "split": None,
            "voc_boxes": "pixels", "voc_difficult": "ignore", "anchors": "config", "accumulate": 1, "sync_bn": False, "timeout": 10.0,
            "compile": False}
CHANGES_ON_RESUME = {"resume", "data", "images", "out", "epochs", "lr", "clip", "patience", "device", "workers", "amp", "keep_epochs",
                     "accumulate", "timeout", "compile"}
COMPILER = "inductor"                                                 # torch.compile's backend
OPTIMIZERS, SCHEDULES = ("sgd", "adam", "adamw"), ("step", "cosine", "constant", "plateau")


@dataclasses.dataclass
class State:
    """Where a run stands. It travels in last.pt, so a resumed run goes on as if it had never stopped."""

    epoch: int = 0
    step: int = 0                                                     # steps done in this epoch; all of them: validation is next
    sums: dict = dataclasses.field(default_factory=dict)              # loss term -> sum over the steps of this epoch
    seconds: float = 0.0                                              # spent in this epoch
    history: list = dataclasses.field(default_factory=list)           # one {column: value} a finished epoch: metrics.csv
    best: float | None = None                                         # of recipe.select_by
    best_loss: float | None = None                                    # validation loss of that epoch
    best_box_ap: float = 0.0                                          # bbox/AP50 of that epoch
    best_epoch: int = -1
    lr_scale: float = 1.0                                             # schedule "plateau": product of its steps so far
    lowest_loss: float | None = None                                  # ... lowest validation loss so far
    epochs_on_plateau: int = 0                                        # ... epochs since then, or since the last step


@dataclasses.dataclass
class Run:
    """All that `train` works on; `set_up` builds it."""

    folder: str
    args: argparse.Namespace
    recipe: Recipe
    device: torch.device
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_set: DetectionDataset | SegmentationDataset
    val_set: DetectionDataset | SegmentationDataset
    scored_set: DetectionDataset | SegmentationDataset | None         # training pictures that are scored too
    identity: dict                                                    # the checkpoint's keys that never change in a run
    example: str                                                      # a picture to predict on: of the test part, which chose nothing
    ema: "Ema | None" = None
    state: State = dataclasses.field(default_factory=State)
    unsaved: set = dataclasses.field(default_factory=set)             # files whose last write met a full disk
    loaders: dict = dataclasses.field(default_factory=dict)           # dataset -> its DataLoader, once it was asked for

    def path(self, file):
        """Path of a file in the run folder."""
        return os.path.join(self.folder, file)


def set_up(given):
    """Builds the Run of a command line, new or resumed. given: {flag: value} of the flags that were typed.

    Raises ValueError for every user's mistake, before anything is written.
    """
    args, checkpoint, path = what_is_asked(given)
    make_repeatable(args)
    dataset = open_data(args)
    if checkpoint is None:
        model, parts, recipe = fresh(args, dataset)
    else:
        model, parts, recipe = gone_on_with(checkpoint, path, given, dataset)
    recipe = dataclasses.replace(recipe, select_by=recipe.select_by or default_metric(model))
    check_recipe(recipe, metric_names(model))
    check_batches(model, parts["train"], recipe, args)
    put_in_place(model, args)
    train_set, val_set = make_datasets(model, parts, recipe, args.seed, dataset.path)

    run = Run(folder=folder_of(args, path), args=args, recipe=recipe, device=torch.device(args.device), model=model,
              optimizer=make_optimizer(model, recipe), scaler=torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16"),
              train_set=train_set, val_set=val_set, scored_set=scored_set(train_set, val_set, recipe.score_train),
              ema=Ema(model, recipe.ema_decay) if recipe.ema_decay else None,
              identity=identity(model, dataset, parts, recipe, args, checkpoint), example=(parts.get("test") or parts["val"])[0].file)
    if checkpoint is not None:
        restore(run, checkpoint, path)
        if "lr" in given:                                             # as it stands: not times what plateaus made of the rate before
            run.state.lr_scale = 1.0
    if args.compile:                                                  # last: the averaged copy above stays as it is
        model.compile_static(COMPILER)
    return run


def what_is_asked(given):
    """(all arguments, checked; the checkpoint to go on with and its path, None and None for a fresh run)."""
    args, checkpoint, path = argparse.Namespace(**{**DEFAULTS, **given}), None, None
    if "resume" in given:
        path = distributed.on_main(lambda: run_folder.find_checkpoint(given["resume"], args.out, "last.pt"))
        checkpoint = read_checkpoint(path)
        args = resumed_arguments(given, checkpoint, path)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")   # cuBLAS asks for it; read when CUDA starts, so before the device
    check_arguments(args)                                             # is tried
    return args, checkpoint, path


def make_repeatable(args):
    """Seeds every random generator, and for --deterministic settles the order in which a GPU adds up."""
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    if args.deterministic:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False   # every new tensor, with NaN: nothing here reads what it did not write
        torch.backends.cudnn.benchmark = False


def fresh(args, dataset):
    """(model, {part: records}, Recipe) of a run that starts."""
    config, recipe = settle(args)
    parts = split_parts(dataset, args)
    if args.anchors == "auto":
        config = with_chosen_anchors(config, parts["train"], args)
    model = minidamage.build_model(args.model, num_classes=len(dataset.class_names) + 1, **vars(config))
    if "pretrained" in vars(args):
        print_report(load_pretrained(model, args.pretrained), args.pretrained)
    elif getattr(config, "norm", "") == "frozen":
        print("note: norm=frozen expects loaded statistics; without --pretrained nothing is normalised, --set norm=batch learns better")
    elif getattr(config, "frozen_stages", 0):
        print(f"note: frozen_stages={config.frozen_stages} expects loaded weights; without --pretrained these stages stay at their random "
              "start, --set frozen_stages=0 trains them")
    return model, parts, recipe


def gone_on_with(checkpoint, path, given, dataset):
    """(model, {part: records}, Recipe) of a run that stopped; `restore` puts its state back once all is built."""
    follow_classes(dataset, checkpoint, path)
    recipe = override(from_dict(Recipe, checkpoint["run"]["recipe"]), given)
    parts = from_names(dataset, checkpoint["split"])
    return build_from_checkpoint(checkpoint, path), parts, recipe


def check_batches(model, records, recipe, args):
    """ValueError for batches that the processes cannot share evenly, or whose pictures do not fit together."""
    distributed.check_batch(recipe.batch_size, args.accumulate)
    if getattr(model.config, "image_size", None) == 0:
        check_own_sizes(records, recipe.batch_size // (args.accumulate * distributed.world()))


def put_in_place(model, args):
    """Moves the model to its device, its norms over all processes where --sync-bn asks for it."""
    if args.sync_bn and distributed.world() > 1:
        print(f"batch normalisation over all processes: {synchronise_norms(model)} layers")
    if args.device.startswith("cuda:"):                               # "cuda" is the current one as it is
        torch.cuda.set_device(args.device)                            # the streams and events of all that follows are this GPU's
    model.to(args.device)


def folder_of(args, path):
    """The run folder: of the checkpoint at `path`, or a new one. Raises ValueError in a process that does not see it."""
    folder = os.path.dirname(os.path.abspath(path)) if path is not None else distributed.on_main(
        lambda: run_folder.new_run_folder(args.out, args.model, args.data))
    if not os.path.isdir(folder):
        raise ValueError(f"{os.path.abspath(folder)}: process {distributed.rank()} does not see the folder that process 0 made; give --out "
                         "on a disk that all machines share")
    return folder


def write_identity(run):
    """config.json and split.json."""
    keys = ("model", "config", "num_classes", "class_names", "category_ids", "run")
    run_folder.write_json(run.path("config.json"), {key: run.identity[key] for key in keys})
    run_folder.write_json(run.path("split.json"), run.identity["split"])


def check_own_sizes(records, at_once):
    """ValueError where image_size is 0 and the pictures that go through the network at once are not all of one size."""
    sizes = sorted({(record.width, record.height) for record in records})
    if at_once > 1 and len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sizes[:4]) + f" and {len(sizes) - 4} more" * (len(sizes) > 4)
        raise ValueError(f"--size 0 (image_size 0, each picture at its own size): expected pictures of one size in batches of {at_once}, "
                         f"got {listed}; type --batch-size 1, or a --size in pixels")


def make_datasets(model, parts, recipe, seed, path):
    """(what trains, what chooses) as the model's task needs them: outlines, or label maps at the model's size."""
    if model.task == "segmentation":
        if recipe.multi_scale:
            raise ValueError(f"multi_scale: {model.name} takes pictures of one size (--size); jitter_scale varies what they show")
        train_set = SegmentationDataset(parts["train"], recipe, seed=seed, train=True, image_size=model.config.image_size)
        return train_set, validation_set(model, parts["val"])
    of_pixels = {name: sum(bool(record.label_map) for record in parts[name]) for name in ("train", "val")}
    if any(of_pixels.values()):
        counts = " and ".join(f"{number} of {len(parts[name])} in the {name} part" for name, number in of_pixels.items())
        raise ValueError(f"{path}: expected objects with boxes or outlines, because {model.name} is a detector, got pictures with masks of "
                         f"pixel labels: {counts}; train a segmentation model on them, such as --model unet")
    learns_masks = "segm" in model.iou_types
    if learns_masks and not outlined(parts["train"]):
        raise ValueError(f"{path}: expected objects with outlines, because {model.name} learns masks, got boxes alone")
    train_set = DetectionDataset(parts["train"], recipe, seed=seed, train=True, max_side=max(2 * model.config.max_size, 1600),
                                 mask_form="dense" if learns_masks else "none")
    return train_set, validation_set(model, parts["val"])


def scored_set(train_set, val_set, count):
    """`count` pictures of the training part as the validation part is read, spread over it, the same in every epoch; None for 0."""
    if not count:
        return None
    records = train_set.records
    chosen = sorted(set(np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int).tolist()))
    scored = copy.copy(val_set)
    scored.records = [records[i] for i in chosen]
    return scored


def restore(run, checkpoint, path):
    """Puts weights, optimiser, averages, random generators and counters back, exactly as they were."""
    train = checkpoint["train"]
    run.state = State(**{field.name: train[field.name] for field in dataclasses.fields(State) if field.name in train})
    if run.state.epoch >= run.recipe.epochs and is_tuned(run):
        done, asked = run.state.epoch, run.recipe.epochs
        raise ValueError(f"{path}: this run has done its {done} epoch{'s' * (done != 1)}{f', --epochs asks for {asked}' * (asked < done)}; "
                         f"to go on, give it more: --epochs {2 * done}")
    if run.state.best is not None and not os.path.isfile(run.path("best.pt")):
        print(f"note: {run.path('best.pt')} is not there any more; the next epoch is the best so far")
        run.state.best = None
    if run.ema is not None:                                           # the model was built with the averaged weights
        load_weights(run.model, train["raw_weights"], path)
        run.ema.updates = train["ema_updates"]
    run.optimizer.load_state_dict(train["optimizer"])
    if train["scaler"]:
        run.scaler.load_state_dict(train["scaler"])
    set_rng_state(train["rng"])


def is_tuned(run):
    """Whether best.pt carries the mark of train.py's last act, the choice of the threshold: a kill may come between the two."""
    return os.path.isfile(run.path("best.pt")) and bool(read_checkpoint(run.path("best.pt"))["train"].get("tuned"))


def identity(model, dataset, parts, recipe, args, checkpoint):
    """The checkpoint's keys that stay the same from epoch to epoch."""
    earlier = checkpoint["run"] if checkpoint else {"commands": [], "commits": []}
    here = run_folder.environment(args.device)                        # of this process; "commits" keeps those of the ones before it
    typed = {key: value for key, value in vars(args).items() if key != "resume"}
    side = round(float(np.median([(record.width * record.height) ** 0.5 for record in parts["train"]])))      # for predict.py's --tile
    return {"model": args.model, "config": vars(model.config), "num_classes": len(dataset.class_names) + 1,
            "class_names": list(dataset.class_names), "category_ids": list(dataset.category_ids),
            "thresholds": checkpoint["thresholds"] if checkpoint else {}, "measured": checkpoint.get("measured", {}) if checkpoint else {},
            "split": names_of(parts, dataset.path),
            "run": {"commands": [*earlier["commands"], run_folder.command_line()],
                    "commits": [*earlier.get("commits", []), here["commit"]], "args": typed, "recipe": dataclasses.asdict(recipe),
                    "data": os.path.abspath(dataset.path), "picture_side": side, "layout": dataset.layout, "seed": args.seed,
                    "processes": distributed.world(), **here}}


def open_data(args):
    """The Dataset of --data; "demo" is drawn first, once, into a folder under --out."""
    path = distributed.on_main(lambda: make_demo(os.path.join(args.out, "demo-data"))) if args.data == "demo" else args.data
    return load_dataset(path, **reading(args))


def split_parts(dataset, args):
    """{"train": records, "val": ..., "test": ...} by the protocol of minidamage/data/split.py, train and val cut by --limit.

    Runs of several seeds share their pictures: the split has a seed of its own, or their mean would be one over different test parts.
    """
    parts = three_parts(dataset, args.split and parse_fractions(args.split), seed=args.split_seed)
    shared = shared_by(parts)
    if shared:
        print(f"note: the set's own parts share {len(shared)} vehicles or pictures ({', '.join(shared[:3])}): what is reported was in "
              "part trained on, or chosen by. --split 70/15/15 keeps them together; near-duplicates too: "
              f"python -m minidamage.data {shlex.quote(dataset.path)}")
    if args.limit < 1.0:                                              # a quick trial; test stays whole, so results compare
        parts = {name: records if name == "test" else limit(records, args.limit, seed=args.split_seed) for name, records in parts.items()}
    for name in ("train", "val"):
        if not parts[name]:
            counts = ", ".join(f"{key} {len(value)}" for key, value in parts.items())
            raise ValueError(f"{dataset.path}: expected pictures in the {name} part, got none ({counts}); add pictures, or give another "
                             "--split or --limit")
    number = len(parts["train"])
    if not any(record.present for record in parts["train"]):
        raise ValueError(f"{dataset.path}: expected damage to learn from in the train part, got {number} picture{'s' * (number != 1)} "
                         f"without any; what is wrong with them: python -m minidamage.data {shlex.quote(dataset.path)}")
    return parts


def settle(args):
    """(model config, Recipe): the model file's own, changed by DEMO for the demo set, then by the flags, then by --set."""
    model_class, config_class, recipe, demo = MODELS[args.model]
    config = config_class()
    if args.data == "demo":
        config, recipe = dataclasses.replace(config, **demo["config"]), dataclasses.replace(recipe, **demo["recipe"])
    in_epochs = recipe.epochs
    recipe = override(recipe, vars(args))
    if hasattr(args, "size"):
        config = resized(config, args.size)
    fields = {which: {field.name for field in dataclasses.fields(which)} for which in (config_class, Recipe)}
    for setting in args.set:
        key = setting.partition("=")[0]
        if key in fields[config_class]:
            config = apply_settings(config, [setting])
        elif key in fields[Recipe] or "=" not in setting:
            recipe = apply_settings(recipe, [setting])
        else:
            known = sorted(fields[config_class] | fields[Recipe])
            raise ValueError(f"--set {setting}: neither {config_class.__name__} nor the recipe has a field {key!r}; did you mean "
                             f"{difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]!r}? Fields: {', '.join(known)}")
    if not any(setting.partition("=")[0] == "milestones" for setting in args.set):     # a longer or shorter run keeps its schedule's shape
        milestones = tuple(round(milestone * recipe.epochs / in_epochs) for milestone in recipe.milestones)
        recipe = dataclasses.replace(recipe, milestones=milestones)
    return config, recipe


def with_chosen_anchors(config, records, args):
    """The config with anchors chosen from the training boxes at training size, and a line that says so (data/anchor_choice.py). They
    hang on the split's seed, not on the run's: runs of several --seed share their anchors."""
    if not hasattr(config, "anchor_sizes"):
        raise ValueError(f"--anchors auto: {args.model} has no anchors; leave the flag out")
    typed = [setting for setting in args.set if setting.partition("=")[0] in ("anchor_sizes", "aspect_ratios")]
    if typed:
        raise ValueError(f"--anchors auto chooses what --set {typed[0]} states; leave one of them out")
    sides = training_sides(records, config.min_size, config.max_size)
    strides = MODELS[args.model][0].anchor_strides(config)
    before = fit_of(sides, config.anchor_sizes, config.aspect_ratios, strides, config.anchor_scales)
    chosen = choose_anchors(sides, len(config.anchor_sizes), len(config.aspect_ratios), args.split_seed, strides, config.anchor_scales)
    print(f"anchors of {len(sides)} training boxes: sizes {', '.join(map(str, chosen.sizes))} px, height / width "
          f"{', '.join(map(str, chosen.ratios))}; mean best IoU {chosen.mean_iou:.3f} (the config's: {before.mean_iou:.3f}), "
          f"0.5 or more for {chosen.recall:.1%} ({before.recall:.1%})")
    return dataclasses.replace(config, anchor_sizes=chosen.sizes, aspect_ratios=chosen.ratios)


def resized(config, size):
    """The config for pictures of another size, everything that goes with it included. 0, of a segmenter: each picture's own size."""
    if not hasattr(config, "image_size"):                             # a detector's
        if size == 0:
            raise ValueError("--size: expected 32 pixels or more, got 0; each picture at its own size is for segmentation models")
        return dataclasses.replace(config, min_size=size, max_size=round(size * config.max_size / config.min_size))
    config = dataclasses.replace(config, image_size=size)
    if size and hasattr(config, "sequence_size"):                     # Context-CrackNet: E and F are learned for the padded picture
        config = dataclasses.replace(config, sequence_size=math.ceil(size / 32) * 32)
    return config


def override(recipe, given):
    """The recipe with the flags that were typed. --lr is the rate itself: no scaling with the batch."""
    fields = {"epochs": "epochs", "batch_size": "batch_size", "lr": "lr", "clip": "clip_grad_norm", "ema": "ema_decay"}
    changes = {field: given[flag] for flag, field in fields.items() if flag in given}
    if "select" in given:
        changes["select_by"] = given["select"].removeprefix("val/")   # as the column of metrics.csv is called
    return dataclasses.replace(recipe, **changes, **({"lr_batch_size": 0} if "lr" in given else {}))


def resumed_arguments(given, checkpoint, path):
    """The arguments of the run that is resumed, with the flags that may change; ValueError for one that would make it another run."""
    if "optimizer" not in checkpoint.get("train", {}):
        raise ValueError(f"{path}: holds weights for use, not the state of a training; resume from last.pt beside it, "
                         f"or start a new run from it: --pretrained {shlex.quote(path)}")
    saved = {**DEFAULTS, **checkpoint["run"]["args"]}
    for flag, value in given.items():
        if flag not in CHANGES_ON_RESUME and value != saved.get(flag):
            allowed = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(CHANGES_ON_RESUME - {"resume"}))
            raise ValueError(f"--{flag.replace('_', '-')} {value}: {path} was trained with {saved.get(flag, 'the recipe of its model')}, "
                             f"and a resumed run keeps it (it may change {allowed}). For another run, start one from these weights: "
                             f"--pretrained {shlex.quote(path)}")
    if saved["data"] != "demo":
        saved["data"] = checkpoint["run"]["data"]                     # absolute: a run may be resumed from another folder
    return argparse.Namespace(**{**saved, **given})


def follow_classes(dataset, checkpoint, path):
    """Calls the one class of masks, which has its name from the folder, what the run calls it. ValueError when the data set's classes are
    not the ones that the run was started with, in the same order."""
    if dataset.unnamed and len(checkpoint["class_names"]) == 1:
        dataset.class_names = tuple(checkpoint["class_names"])
    trained, found = list(checkpoint["class_names"]), list(dataset.class_names)
    if trained != found:
        raise ValueError(f"{dataset.path}: expected the {len(trained)} classes of {path} ({', '.join(trained)}), got {len(found)} "
                         f"({', '.join(found)}); resume with the run's own data, or start a new run: --pretrained {shlex.quote(path)}")


def check_arguments(args):
    """ValueError for the flags whose values cannot be; fills in what depends on the machine (device, workers).

    The recipe's own flags are checked with the recipe (`check_recipe`), because --set reaches them too."""
    if args.model not in MODELS:
        near = difflib.get_close_matches(args.model, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"--model {args.model}: there is no such model; did you mean {near!r}? Known: {', '.join(MODELS)}")
    if os.path.isfile(getattr(args, "out", "")):
        raise ValueError(f"--out {args.out}: expected a folder, this is a file")
    ranges = {"size": (lambda v: v >= 32 or v == 0, "32 pixels or more, or of a segmenter 0 (each picture's own size)"),
              "limit": (lambda v: 0 < v <= 1, "a fraction above 0, at most 1"),
              "patience": (lambda v: v >= 0, "0 (off) or more epochs"), "accumulate": (lambda v: v >= 1, "1 or more parts"),
              "timeout": (lambda v: 0 < v < math.inf, "minutes above 0"), "workers": (lambda v: v >= 0, "0 or more processes"),
              "seed": (lambda v: v >= 0, "0 or more"), "split_seed": (lambda v: v >= 0, "0 or more")}
    for name, (fits, expected) in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not fits(value):
            raise ValueError(f"--{name.replace('_', '-')}: expected {expected}, got {value}")
    device = choose_device(distributed.device_name(getattr(args, "device", None) or "auto"))
    args.device, kind = str(device), device.type
    if args.amp == "fp16" and kind != "cuda":
        raise ValueError(f"--amp fp16 needs a GPU (its gradient scaler), got --device {args.device}; use --amp bf16 or off")
    if args.compile and COMPILER == "inductor":
        needed, there = (("Triton", importlib.util.find_spec("triton")) if kind == "cuda" else
                         ("a C++ compiler", shutil.which(os.environ.get("CXX", "g++"))))
        if not there:
            raise ValueError(f"--compile: expected {needed}, which torch.compile builds with, got none; install it (CXX names a compiler), "
                             "or leave --compile out (--no-compile on a resumed run)")
    if getattr(args, "workers", None) is None:
        cores = (os.cpu_count() or 1) // distributed.local("LOCAL_WORLD_SIZE", 1)
        args.workers = 0 if kind == "cpu" else max(1, min(8, cores))  # on a CPU, training needs every core itself


def check_recipe(recipe, names):
    """ValueError for recipe values (from --set, or a flag) that the loop does not know. names: the metrics that can choose."""
    not_negative, share = (lambda v: 0 <= v < math.inf, "0 or more"), (lambda v: 0 <= v <= 1, "from 0 to 1")
    above_zero, one_or_more = (lambda v: 0 < v < math.inf, "a number above 0"), (lambda v: v >= 1, "1 or more")
    ranges = {"epochs": one_or_more, "batch_size": one_or_more, "lr": above_zero, "lr_batch_size": not_negative,
              "momentum": (lambda v: 0 <= v < 1, "from 0 to below 1"), "weight_decay": not_negative, "gamma": above_zero,
              "warmup_iters": not_negative, "score_train": not_negative, "clip_grad_norm": (not_negative[0], "0 (off) or a gradient norm"),
              "ema_decay": (lambda v: 0 <= v < 1, "0 (off) or a decay below 1, such as 0.999"), "hflip": share,
              "rotate": (lambda v: 0 <= v <= 180, "0 to 180 degrees"), "brightness": share, "contrast": share, "saturation": share,
              "vflip": share, "rot90": share, "shift": share, "scale": (lambda v: 0 <= v < 1, "from 0 to below 1"),
              "shift_scale_rotate": share, "hue": (lambda v: 0 <= v <= 0.5, "from 0 to 0.5, half the colour circle"),
              "noise": (lambda v: 0 <= v <= 255, "0 to 255 grey levels"), "plateau_patience": one_or_more,
              "plateau_factor": (lambda v: 0 < v < 1, "above 0 and below 1")}
    for field, (fits, expected) in ranges.items():
        value = getattr(recipe, field)
        if not fits(value):
            raise ValueError(f"{field}: expected {expected}, got {value}")
    if recipe.jitter_scale and not (len(recipe.jitter_scale) == 2 and 0 < recipe.jitter_scale[0] <= recipe.jitter_scale[1] <= 10):
        raise ValueError(f"jitter_scale: expected the smallest and the largest factor, such as 0.1,2.0, got {recipe.jitter_scale}")
    if any(milestone < 0 for milestone in recipe.milestones):
        raise ValueError(f"milestones: expected epochs of 0 or more, such as 16,22, got {recipe.milestones}")
    if any(side < 32 for side in recipe.multi_scale):
        raise ValueError(f"multi_scale: expected shorter sides of 32 pixels or more, such as 480,512,544, got {recipe.multi_scale}")
    for field, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("select_by", names)):
        value = getattr(recipe, field)
        if value not in known:
            near = difflib.get_close_matches(value, known, n=1, cutoff=0.0)[0]
            flag = "--select" if field == "select_by" else field
            raise ValueError(f"{flag}: there is no {value!r}; did you mean {near!r}? Known: {', '.join(known)}")


def print_report(report, path):
    """Says what of a weight file went in and what did not, name by name: a head that starts at random is never a surprise."""
    print(f"{path}: {len(report['loaded'])} tensors loaded into the model")
    for what, meaning in (("missing", "not in the file; they keep their random start"),
                          ("unexpected", "in the file, not in the model; not used"),
                          ("mismatched", "of another shape; they keep their random start")):
        names = [str(name) for name in report.get(what, [])]
        if names:
            print(f"  {len(names)} {meaning}: {', '.join(names[:12])}{f' and {len(names) - 12} more' if len(names) > 12 else ''}")


def is_out_of_memory(error):
    """Of the GPU, of the machine, or of a process that loads pictures; torch has a type of its own for the first alone."""
    signs = ("out of memory", "can't allocate memory", "not enough memory", "DataLoader worker (pid", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)


def what_broke(error, run):
    """Training ended by something that is not the model's fault: what, which checkpoint is good, and what to type."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = lines[-1] if lines[0].startswith("Caught ") else lines[0]             # a worker's error comes with its traceback
    memory_lacks, resume = is_out_of_memory(error), f"python train.py --resume {shlex.quote(run.folder)}"
    args, size = run.args, getattr(run.model.config, "image_size", None) or getattr(run.model.config, "min_size", "...")
    less = [f"{resume} --workers 0"] * (args.workers > 0) + [f"{resume} --amp bf16"] * (args.amp == "off")
    advice = [*less, f"a new run with smaller pictures or batches than its --size {size} --batch-size {run.recipe.batch_size}"]
    if not memory_lacks:
        advice = [f"python -m minidamage.data {shlex.quote(args.data)}   (what is wrong with the pictures)",
                  f"{resume}   (once it is mended)"]
    return (f"{'out of memory' if memory_lacks else 'training cannot go on'} in epoch {run.state.epoch + 1}, step {run.state.step + 1}: "
            f"{reason}\n  saved  {run.path('last.pt')} is good: the run as it was last saved, after {run.state.epoch} epochs or later\n"
            + "\n".join(f"  {'try ' if i == 0 else 'or  '}   {line}" for i, line in enumerate(advice)))


class Ema:
    """An exponential moving average of a model's weights: what validation, best.pt and predictions use when it is on."""

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        """The decay grows to its value, so that the random start is forgotten within the first few dozen steps."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(self.model.state_dict().values(), model.state_dict().values()))
        averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(decay)(*zip(*averaged), None)            # a few launches on a GPU, not one a tensor
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)                                    # counters


def make_optimizer(model, recipe):
    """The recipe's optimiser over all trainable parameters; weight decay falls on every one of them, as in torchvision's recipe.

    fused: one pass over the weights a step, where the framework's own form makes one an operation."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, fused=True)
        # A first step that skips an overflow would leave the fused form's momentum unwritten. From 0 the arithmetic is the same.
        for parameter in parameters if recipe.momentum else ():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(parameters, lr=recipe.lr, weight_decay=recipe.weight_decay, fused=True)
