"""Trains any model of minidamage on any data set it reads. One visible loop: `train()`, with `backward()` in the middle of it.

    python train.py                                                    the drawn demo set, DamageNet, a laptop, minutes
    python train.py --model damagenet --data vehide/ --pretrained resnet50.pth
    python train.py --model context_cracknet --data deepcrack/         pictures and masks
    python train.py --resume                                           the newest run, from where it stopped
    torchrun --nproc-per-node 8 train.py --data coco/                  eight GPUs (minidamage/distributed.py)

Read top to bottom: the loop, validation, the learning rate, then how a run is set up from the command line. Every run
writes a folder of its own under runs/ (minidamage/run_folder.py says what is in it).
"""
import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time

import numpy as np
import torch

from minidamage import MODELS, distributed, run_folder
from minidamage.checkpoint import load_checkpoint, rng_state, save_checkpoint
from minidamage.command_line import Parser, ended
from minidamage.data import collate
from minidamage.data.flags import add_reading_flags
from minidamage.data.record import number_of
from minidamage.layers.segmenter import label_map_of
from minidamage.progress import Progress, StopSignal, clock, ignore_signals, memory
from minidamage.training import DEFAULTS, is_out_of_memory, set_up, what_broke, write_identity
from minidamage.tuning import score_mask_thresholds, score_pixel_thresholds, take_mask_threshold, take_pixel_threshold
from minidamage.validation import add_picture, evaluator_of, metrics_of, predict
from minidamage.visualize.plots import curves_from_csv
from minidamage.visualize.training import draw_first_batch, draw_predictions

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FEW_STEPS = 20                                                        # of a whole run: below, a network learns next to nothing
FEW_PICTURES = 10                                                     # of the validation part: below, chance chooses
PICTURES_SHOWN = 6                                                    # rows of val_predictions.png
HEADLINES = ("bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50", "pixel/IoU", "pixel/Dice", "pixel/mIoU")  # of an epoch's line


class NonFiniteLoss(ValueError):
    """A loss term became NaN or infinite."""


# ---------------------------------------------------------------------------------------------------------- the loop

def train(run, stop):
    """Trains until the last epoch, `patience` or a signal. Returns True when training came to its end."""
    recipe, state, model, device = run.recipe, run.state, run.model, run.device
    steps_per_epoch = math.ceil(len(run.train_set) / recipe.batch_size)
    progress = Progress(recipe.epochs * steps_per_epoch, state.epoch * steps_per_epoch + state.step, device)
    autocast = torch.autocast(device.type, AMP_DTYPES.get(run.args.amp), enabled=run.args.amp != "off")
    replica = distributed.replicate(model)                            # the model itself, unless torchrun started several processes

    while state.epoch < recipe.epochs and not out_of_patience(run):
        model.train()
        tick = time.perf_counter()
        for parts in training_batches(run):                           # one part; --accumulate N: the batch in N
            step = state.epoch * steps_per_epoch + state.step
            for group in run.optimizer.param_groups:
                group["lr"] = lr_at(step, steps_per_epoch, recipe) * state.lr_scale
            if step == 0:
                keep(run, "first_batch.png", lambda path: draw_first_batch(path, *parts[0][:2], run.identity["class_names"]))
            distributed.seed_step(run.args.seed, step)

            run.optimizer.zero_grad(set_to_none=True)
            batch, read = distributed.Batch(replica, parts), []
            for images, targets, counts in parts:
                with autocast, batch.part(counts):
                    losses = replica(images, targets)                 # {"loss_...": scalar}; the model moves its inputs
                    loss = sum(losses.values())
                read.append(read_losses(losses, stop))                # starts the copy; the GPU goes on working
                run.scaler.scale(loss).backward()                     # <- a breakpoint here sees images, targets, losses
            values, asked = check_losses([values() for values in read], [targets for _, targets, _ in parts], run)
            if recipe.clip_grad_norm > 0:
                run.scaler.unscale_(run.optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            if run.ema is not None:
                run.ema.update(model)

            state.step += 1
            state.sums = {name: state.sums.get(name, 0.0) + value for name, value in values.items()}
            now = time.perf_counter()
            state.seconds, tick = state.seconds + now - tick, now
            progress.step(step + 1, pictures_of(run, state.step),
                          f"epoch {state.epoch + 1}/{recipe.epochs}  {state.step}/{steps_per_epoch}", values)
            # Several processes have to decide alike: as it was when the losses were read. One alone sees a signal that came since.
            stopping = asked if distributed.world() > 1 else stop.requested
            if stopping:
                break
        else:
            stopping = distributed.any_of(stop.requested)             # a signal behind the last step
        metrics = None if stopping else validate(run, stop, progress)
        trained = None if metrics is None else score_training(run, stop, progress)
        if trained is None:                                           # Ctrl-C or SIGTERM, in training or in validation
            progress.clear()
            return False
        state.seconds += time.perf_counter() - tick
        finish_epoch(run, metrics, trained, progress)
    return True


def out_of_patience(run):
    """Whether the metric has not improved for --patience epochs; says so. Asked before each epoch, so a resumed run stops alike."""
    if not run.args.patience or run.state.epoch - 1 - run.state.best_epoch < run.args.patience:
        return False
    print(f"stopped early: {run.recipe.select_by} has not improved for {run.args.patience} epoch{'s' * (run.args.patience > 1)} "
          f"(--patience; to go on all the same: python train.py --resume {shlex.quote(run.folder)} --patience 0)")
    return True


def training_batches(run):
    """The batches of this epoch that are still to be done, in an order that depends on the seed and the epoch alone.

    Each is this process's share of it, in parts: a list of (images, targets, whether they count, see distributed.shares). How many
    processes there are changes who does what, not what is done: a run resumes with more or fewer of them.
    """
    state, size = run.state, run.recipe.batch_size
    order = np.random.default_rng([run.args.seed, state.epoch]).permutation(len(run.train_set)).tolist()
    batches = [distributed.shares(order[i:i + size], run.args.accumulate) for i in range(state.step * size, len(order), size)]
    run.train_set.set_epoch(state.epoch)                              # augmentation draws from (seed, epoch, picture)
    loaded = iter(loader(run, run.train_set, [indices for parts in batches for indices, _ in parts]))
    for parts in batches:
        yield [(*next(loaded), counts) for _, counts in parts]


def pictures_of(run, done):
    """Pictures in the batch that was the done-th of its epoch, all processes together: the last one may be smaller."""
    return min(run.recipe.batch_size, len(run.train_set) - (done - 1) * run.recipe.batch_size)


def loader(run, dataset, batches):
    """A DataLoader over lists of indices, one a dataset: its --workers live as long as the run, for starting them takes longer than a small
    epoch. Its own generator: torch's global one belongs to the model, for exact resumes."""
    if dataset not in run.loaders:
        run.loaders[dataset] = torch.utils.data.DataLoader(
            dataset, batch_sampler=[], collate_fn=collate, num_workers=run.args.workers, worker_init_fn=ignore_signals,
            pin_memory=run.device.type == "cuda", generator=torch.Generator(), persistent_workers=run.args.workers > 0)
    run.loaders[dataset].batch_sampler[:] = batches
    return run.loaders[dataset]


def read_losses(losses, stop):
    """Starts copying the loss terms to the CPU; the function that comes back waits for them and returns ({term: float}, the same of this
    process's pictures alone, whether any process was asked to stop).

    On a GPU the wait is for the forward pass alone: backward is queued meanwhile, and the GPU never idles. Several processes have one
    loss, and so one decision on it: the mean of theirs. NaN anywhere is NaN everywhere.
    """
    own = torch.stack([*(value.detach().float() for value in losses.values())])
    asked = torch.full((1,), float(stop.requested), device=own.device)
    stacked = torch.cat([distributed.summed(torch.cat([own, asked])) / distributed.world(), own])
    copied = torch.cuda.Event() if stacked.is_cuda else None
    stacked = stacked.to("cpu", non_blocking=True)
    if copied is not None:
        copied.record()

    def values():
        if copied is not None:
            copied.synchronize()
        *means, asked = stacked[:len(losses) + 1].tolist()
        return dict(zip(losses, means)), dict(zip(losses, stacked[len(losses) + 1:].tolist())), asked > 0
    return values


def check_losses(read, targets, run):
    """({term: float} of the whole step, whether any process was asked to stop). read: what `read_losses` gave for each part; targets: each
    part's.

    Raises NonFiniteLoss, in every process, before weights are touched or saved.
    """
    values = {name: sum(means[name] for means, _, _ in read) for name in read[0][0]}
    if not are_finite(values):                                        # in every process, or in none: the means are of all
        refuse(values, [own for _, own, _ in read], targets, run, validating=False)
    return values, any(asked for *_, asked in read)


def check_validated(losses, targets, run):
    """Raises NonFiniteLoss, in every process, where the last picture that one of them validated has no finite losses. losses, targets: of
    this process's picture; both empty where it has none."""
    if distributed.any_of(not are_finite(losses)):                    # each process has pictures of its own
        refuse(losses, [losses], [targets], run, validating=True)


def are_finite(losses):
    return all(map(math.isfinite, losses.values()))


def refuse(values, own, targets, run, validating):
    """Raises NonFiniteLoss that names the term, the files and what to type. values: {term: float} of the whole step; own: this process's
    for each part; targets: each part's. In every process at once: they tell each other which parts are broken."""
    broken = [(losses, [str(target["file"]) for target in part]) for losses, part in zip(own, targets) if not are_finite(losses)]
    raise NonFiniteLoss(explain_losses(values, distributed.gather(broken), run, validating))


def explain_losses(values, reports, run, validating):
    """The message of NonFiniteLoss; saves last.pt where the weights are still whole. reports: [each process's [(terms, files)]]."""
    state, recipe = run.state, run.recipe
    finite = all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values() if tensor.is_floating_point())
    whole = all(distributed.gather(finite))                           # running statistics are each process's own
    saved = save(run, "last.pt", {}) if whole and not validating else False       # else: the last.pt of before is the good one
    rate, whole_rate = run.optimizer.param_groups[0]["lr"], base_rate(recipe) * state.lr_scale      # of this step; before its schedule
    found = [(f" in process {rank}" if len(reports) > 1 else "", terms, files)
             for rank, parts in enumerate(reports) for terms, files in parts]
    where, terms, _ = found[0] if found else ("", values, [])
    broken = ", ".join(f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value))
    files = ";  ".join(f"{', '.join(files)}{where}" for where, _, files in found)
    return (
        f"{broken} in epoch {state.epoch + 1}, {'validation' if validating else f'step {state.step + 1}'}{where and f',{where}'}.\n"
        f"  all terms   {', '.join(f'{name} {value:.4g}' for name, value in terms.items())};  lr {rate:.3g}\n"
        f"  files       {files}\n"
        f"  weights     {'finite' if whole else 'no longer finite'};  "
        f"{run.path('last.pt')} is {'from just before this step' if saved else 'the one saved before, with finite weights'}\n"
        f"  try         a lower rate or clipping: {command()} --resume {shlex.quote(run.folder)} --lr {whole_rate / 4:.3g} "
        f"--clip {recipe.clip_grad_norm or 10:g}{' --amp off' if run.args.amp != 'off' else ''}\n"
        f"              and if it is always these files: python -m minidamage.data {shlex.quote(run.args.data)}")


# -------------------------------------------------------------------------------------------------------- validation

@torch.no_grad()
def validate(run, stop, progress):
    """Returns {"loss": ..., "bbox/AP": ..., ...} of the validation part and draws val_predictions.png when it is the best so far.

    None when a signal came. Takes nothing from the global random generators, so training goes on as if it had not happened.
    """
    stopped, gathered = look_at(run, run.val_set, stop, progress, "validation")
    if stopped:
        return None
    names = run.identity["class_names"]
    metrics, chosen = distributed.on_main(lambda: score_validation(gathered, run, progress))
    run.identity.update(chosen)
    if is_better(metrics, run):
        scores = ", ".join(f"{name} {score:.2f}" for name, score in run.identity["thresholds"].items())
        above = (f"; findings from this epoch's scores: {scores}" * bool(scores) if run.model.task == "detection" else
                 ", probability above 0.5" * (len(names) == 1))
        title = f"Validation, epoch {run.state.epoch + 1}{above}"
        keep(run, "val_predictions.png", lambda path: draw_predictions(path, in_order(gathered), names, run.identity["thresholds"], title))
    return metrics


@torch.no_grad()
def look_at(run, dataset, stop, progress, what):
    """Runs the model over a dataset, each process over its share: (whether a signal came, what all processes found).

    That is a list of (rows of losses, evaluator, pictures to show), one a process, in process 0, and None in the others."""
    model = run.model if run.ema is None else run.ema.model
    model.eval()
    distributed.copy_buffers(run.model, model if run.ema else None)
    records, evaluator = dataset.records, evaluator_of(model, run.identity["class_names"])
    shown_ones, rows, shown = pictures_to_show(records), [], []
    row, targets = {}, []                                             # of the last picture; of several processes one may have none
    for images, targets in loader(run, dataset, [[i] for i in distributed.shard(len(records))]):           # one at a time: any size
        if stop.requested:
            break
        image, target = images[0], targets[0]
        progress.note(f"epoch {run.state.epoch + 1}/{run.recipe.epochs}  {what} {target['index'] + 1}/{len(records)}")
        with uncompiled(run):
            losses, prediction = predict(model, images, targets)
        row = dict(zip(losses, torch.stack([*losses.values()]).tolist()))
        rows.append(row)
        if not are_finite(row):
            break
        add_picture(evaluator, target, prediction, image.shape[-2:])
        if target["index"] in shown_ones:
            shown.append((target["index"], image, target, prediction))
    check_validated(row, targets, run)
    if distributed.any_of(stop.requested):
        return True, None
    return False, distributed.gather_to_main((rows, evaluator, shown))


def uncompiled(run):
    """Inside, --compile has no effect: pictures to validate come one at a time, in any size."""
    return torch.compiler.set_stance("force_eager") if run.args.compile else contextlib.nullcontext()


def score_training(run, stop, progress):
    """{"train/bbox/AP": ...}: the metrics of validation on some training pictures, unaugmented; {} without the recipe's score_train.

    None when a signal came. How far it is above validation's says how much was learned by heart.
    """
    if run.scored_set is None:
        return {}
    stopped, gathered = look_at(run, run.scored_set, stop, progress, "scoring training picture")
    if stopped:
        return None
    evaluators = lambda: [evaluator for _, evaluator, _ in gathered]
    metrics = distributed.on_main(lambda: metrics_of(type(gathered[0][1]).joined(evaluators()).evaluate()))
    return {f"train/{name}": value for name, value in metrics.items()}


def in_order(gathered):
    """The pictures to show, (image, target, prediction), of all processes."""
    return [each[1:] for each in sorted((each for _, _, shown in gathered for each in shown), key=lambda each: each[0])]


def score_validation(gathered, run, progress):
    """(metrics, {"thresholds", "measured"} of the checkpoint) of what the processes found, each in its share of the pictures: the numbers
    of one process alone.

    A loss is the mean over pictures of each one's own, where training's is divided by counts over the batch: a picture without objects
    adds 0 to loss_box_reg and loss_mask, class weights of a cross-entropy are one picture's. Compare it with other epochs' alone.
    """
    rows = distributed.interleave([rows for rows, _, _ in gathered])
    result = type(gathered[0][1]).joined([evaluator for _, evaluator, _ in gathered]).evaluate()
    detects = run.model.task == "detection"
    means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    metrics = {"loss": sum(means.values()), **means, **metrics_of(result)}
    if math.isnan(metrics[run.recipe.select_by]):
        causes = result.causes if detects else ["no damage in the validation part"]
        progress.line("\n".join([f"{run.recipe.select_by} is not a number:", *causes]))
    if not detects:
        return metrics, {"measured": result.measured()}
    thresholds = result.best_thresholds()                             # per class, best F1 on this part; never on test
    return metrics, {"thresholds": thresholds, "measured": result.measured(thresholds)}


def pictures_to_show(records):
    """Indices of the pictures in val_predictions.png: spread over those with damage, and the last one without any."""
    damaged = [i for i, record in enumerate(records) if not record.undamaged]
    whole = [i for i, record in enumerate(records) if record.undamaged][-1:]
    spread = np.linspace(0, len(damaged) - 1, min(PICTURES_SHOWN - len(whole), len(damaged))).round().astype(int)
    return {damaged[i] for i in spread} | set(whole)


@torch.no_grad()
def tune_threshold(run, stop):
    """Chooses the probability from which a pixel is damage on the validation part (tuning.py) and writes it into best.pt; a segmenter's
    val_predictions.png is drawn again with it. Returns what say_goodbye says of it, "" where nothing was changed.

    `--set mask_threshold=...` is kept as it is. best.pt is marked as tuned either way: a run that is killed before resumes here.
    """
    model, checkpoint = load_checkpoint(run.path("best.pt"), run.device)
    checkpoint["train"]["tuned"] = True
    batches, names = loader(run, run.val_set, [[i] for i in distributed.shard(len(run.val_set))]), checkpoint["class_names"]
    words, stopped = "", f"{run.path('best.pt')} keeps {{}}; choose it with\n  python train.py --resume {shlex.quote(run.folder)}"
    if "segm" in model.iou_types and not any(setting.startswith("mask_threshold=") for setting in run.args.set):
        results = score_mask_thresholds(model, batches, names, stop)
        if results is None:
            print(f"stopped before the mask threshold was chosen: {stopped.format(model.config.mask_threshold)}")
            return ""
        if distributed.is_main():
            words = take_mask_threshold(checkpoint, results, model.config.mask_threshold)
    elif model.task == "segmentation" and len(names) == 1:
        result = score_pixel_thresholds(model, batches, stop)
        if result is None:
            print(f"stopped before the pixel threshold was chosen: {stopped.format(0.5)}")
            return ""
        if distributed.is_main():
            words = take_pixel_threshold(checkpoint, result, [record.file for record in run.val_set.records])
        keep(run, "val_predictions.png", lambda path: draw_at_threshold(path, run, model, checkpoint))
    keep(run, "best.pt", lambda path: save_checkpoint(path, checkpoint))
    return words


def draw_at_threshold(path, run, model, checkpoint):
    """val_predictions.png of best.pt, at the threshold that best.pt carries."""
    names, shown = checkpoint["class_names"], []
    threshold = checkpoint["thresholds"].get(names[0], 0.5)
    for image, target in (run.val_set[i] for i in sorted(pictures_to_show(run.val_set.records))):
        label_map = label_map_of(model.probabilities([image], at="model")[0], threshold).cpu()
        shown.append((image, target, {"label_map": label_map}))
    draw_predictions(path, shown, names, {}, f"Validation, epoch {checkpoint['train']['epoch']}, probability above {threshold:g}")


def is_better(metrics, run):
    """Whether an epoch beats the best so far by the chosen metric. Between equals (AP 0 and AP 0) a detector's AP of boxes at IoU 0.5
    decides, which rises first, and then the validation loss.

    Losses fall, everything else rises; a NaN never wins over a number, and between two of them the loss decides.
    """
    value, sign = metrics[run.recipe.select_by], -1 if "loss" in run.recipe.select_by else 1
    best, boxes, best_boxes = run.state.best, box_ap(metrics), run.state.best_box_ap
    if best is None or math.isnan(best) and not math.isnan(value):
        return True
    if math.isnan(best):
        return metrics["loss"] < run.state.best_loss
    if value != best:
        return sign * value > sign * best
    return boxes > best_boxes or boxes == best_boxes and metrics["loss"] < run.state.best_loss


def box_ap(metrics):
    """A detector's AP of boxes at IoU 0.5; 0 for a segmenter, and where it is NaN."""
    value = metrics.get("bbox/AP50", 0.0)
    return 0.0 if math.isnan(value) else value


def finish_epoch(run, metrics, trained, progress):
    """metrics, trained: of `validate` and `score_training`.

    Writes metrics.csv, curves.png, best.pt, last.pt, with --keep-epochs epoch-001.pt; returns whether it is the best so far."""
    state, select_by = run.state, run.recipe.select_by
    steps = max(state.step, 1)
    train_losses = {f"train/{name}": value / steps for name, value in state.sums.items()}
    row = {"epoch": state.epoch + 1, "lr": run.optimizer.param_groups[0]["lr"], "train/loss": sum(train_losses.values()), **train_losses,
           **{f"val/{name}": value for name, value in metrics.items()}, **trained, "seconds": round(state.seconds, 2)}
    better, before = is_better(metrics, run), (state.best, state.best_loss, state.best_epoch, state.best_box_ap)
    if better:
        state.best, state.best_loss, state.best_epoch = metrics[select_by], metrics["loss"], state.epoch
        state.best_box_ap = box_ap(metrics)
    state.history.append(row)
    state.epoch, state.step, state.sums, state.seconds = state.epoch + 1, 0, {}, 0.0
    watch_plateau(state, run.recipe, metrics["loss"])
    keep(run, "metrics.csv", lambda path: run_folder.write_metrics(path, state.history))
    keep(run, "curves.png", lambda path: curves_from_csv(run.path("metrics.csv"), path, select_by=select_by))
    if better and not save(run, "best.pt", metrics):                  # a full disk: what best.pt does not hold is not to be beaten
        better, (state.best, state.best_loss, state.best_epoch, state.best_box_ap) = False, before
    if run.args.keep_epochs:
        save(run, f"epoch-{state.epoch:03d}.pt", metrics)
    save(run, "last.pt", metrics)                                     # last: a kill between the two repeats the epoch, and its best.pt
    progress.line(f"epoch {state.epoch}/{run.recipe.epochs}  train loss {row['train/loss']:.4f}  val loss {metrics['loss']:.4f}  "
                  f"{'  '.join(f'{name} {metrics[name]:.3f}' for name in HEADLINES if name in metrics)}  "
                  f"{clock(row['seconds'])}{f'  best {select_by}' if better else ''}")
    return better


def save(run, file, metrics):
    """Writes last.pt (all that a resume needs), or best.pt or epoch-001.pt (what evaluate.py and predict.py need)."""
    return keep(run, file, lambda path: save_checkpoint(path, contents(run, file, metrics)))


def contents(run, file, metrics):
    """The checkpoint dict of a file."""
    weights = run.model.state_dict()
    averaged = weights if run.ema is None else run.ema.model.state_dict()
    state = {**run.identity, "weights": averaged, "metrics": metrics, "train": {"epoch": run.state.epoch}}
    if file == "last.pt":
        state["train"] = {**dataclasses.asdict(run.state), "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(),
                          "rng": rng_state(), "ema_updates": run.ema.updates if run.ema else 0, "raw_weights": weights if run.ema else None}
    return state


def keep(run, file, write):
    """Calls write(path of a file in the run folder), in process 0. A full disk is no reason to lose a training: it warns and returns
    False, everywhere."""
    def written():
        try:
            write(run.path(file))
        except OSError as error:
            run.unsaved.add(file)
            print(f"\nWARNING: {file}: {error.strerror or error}\n"
                  "         Free some space: training goes on, the next try is after the next epoch.", file=sys.stderr)
            return False
        run.unsaved.discard(file)
        return True
    return distributed.on_main(written)


# ------------------------------------------------------------------------------------- learning rate, command line

def lr_at(step, steps_per_epoch, recipe):
    """The learning rate of a step (counted over the whole run, from 0): linear scaling with the batch, warm-up, schedule."""
    total, lr = recipe.epochs * steps_per_epoch, base_rate(recipe)
    warmup = warmup_of(recipe, total)
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if recipe.schedule in ("constant", "plateau"):                    # plateau: watch_plateau scales it, from what was measured
        return lr
    if recipe.schedule == "cosine":
        return lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
    return lr * recipe.gamma ** sum(step >= milestone * steps_per_epoch for milestone in recipe.milestones)      # "step"


def base_rate(recipe):
    """The rate that warm-up ends at and the schedule begins from. Goyal et al. 2017: `recipe.lr` is for `recipe.lr_batch_size` pictures a
    step (0: taken as it stands)."""
    return recipe.lr * (recipe.batch_size / recipe.lr_batch_size if recipe.lr_batch_size else 1.0)


def warmup_of(recipe, total):
    """Steps of warm-up in a run of `total` steps: at most a third of it."""
    return min(recipe.warmup_iters, total // 3)


def watch_plateau(state, recipe, loss):
    """Schedule "plateau", after each epoch: `plateau_patience` epochs without a lower validation loss scale the rate by `plateau_factor`.

    Context-CrackNet, section 4.2.1. torch's ReduceLROnPlateau waits for one epoch more, and for a loss that is lower by 1e-4.
    """
    if recipe.schedule != "plateau":
        return
    if state.lowest_loss is None or loss < state.lowest_loss:
        state.lowest_loss, state.epochs_on_plateau = loss, 0
        return
    state.epochs_on_plateau += 1
    if state.epochs_on_plateau >= recipe.plateau_patience:
        state.lr_scale, state.epochs_on_plateau = state.lr_scale * recipe.plateau_factor, 0


def parse_arguments(argv=None):
    """Returns {flag: value} of the flags that were typed, so that a resumed run knows what is meant to change."""
    parser = Parser(description="Trains a damage model; without arguments, DamageNet on a drawn demo set.",
                    argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--model", help=f"one of {', '.join(MODELS)} (default: {DEFAULTS['model']})")
    add("--data", metavar="PATH", help="data set folder or annotation file, any known layout; 'demo' draws one (default: demo)")
    add_reading_flags(parser)
    add("--epochs", type=int, help="passes over the training part (default: the model's recipe; the demo has its own)")
    add("--batch-size", type=int, help="pictures a step (default: recipe)")
    add("--size", type=int, help="pixels of the resized picture: both sides (segmenters; 0: each picture's own size), or the shorter, and "
        "the limit of the longer with it (default: config)")
    add("--lr", type=float, help="learning rate at this batch size, as it stands (default: the recipe's, scaled linearly with the batch)")
    add("--seed", type=int, help=f"of weights, order and augmentation (default: {DEFAULTS['seed']})")
    add("--split-seed", type=int, help=f"of split and --limit, which runs of several --seed share (default: {DEFAULTS['split_seed']})")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU when there is one)")
    add("--accumulate", type=int, metavar="N", help="parts that a batch goes through a GPU in, its gradients added up: less memory, the "
        "same batch (default: 1)")
    add("--sync-bn", action="store_true", help="several processes: batch normalisation over the pictures of all of them")
    add("--timeout", type=float, metavar="MINUTES", help="several processes: how long one waits for the others before it stops "
        f"(default: {DEFAULTS['timeout']:g})")
    add("--workers", type=int, help="processes that load pictures, so many for training and for "
        "validation each (default: 0 on a CPU, up to 8 with a GPU)")
    add("--amp", choices=("off", *AMP_DTYPES), help="mixed precision; fp16 scales its gradients (default: off)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile what has the pictures' shape (a detector's body, pyramid "
        "and RPN head; a segmenter): a minute or more at the start, again for other sizes; validation stays as it is")
    add("--deterministic", action="store_true", help="equal bytes from run to run on a GPU too; slower there")
    add("--ema", type=float, metavar="DECAY", help="average the weights, e.g. 0.999; the average is validated and kept (default: recipe)")
    add("--clip", type=float, metavar="NORM", help="largest gradient norm, 0 = off (default: recipe)")
    add("--patience", type=int, metavar="EPOCHS", help="stop when the metric has not improved for so many epochs, 0 = never (default)")
    add("--select", metavar="METRIC", help="what chooses best.pt, a val/ column of metrics.csv such as segm/AP50 or loss (default: recipe)")
    add("--keep-epochs", action="store_true", help="keep every epoch's weights (epoch-001.pt, ...), for evaluate.py --test-epochs")
    add("--limit", type=float, metavar="SHARE", help="train and validate on a seeded share, such as 0.4; test stays whole (default: 1)")
    add("--split", metavar="A/B/C", help="pool all and split train/val/test by vehicle, such as 70/15/15 (default: the set's own parts)")
    add("--anchors", choices=("config", "auto"), help="auto: sizes and ratios chosen from the training boxes (default: the config's)")
    add("--pretrained", metavar="FILE", help="start weights: a ResNet (torchvision, timm), detector or checkpoint; says what is left out")
    add("--resume", nargs="?", const="", metavar="RUN", help="go on with a run folder or its last.pt (default: the newest run under --out)")
    add("--set", action="append", metavar="FIELD=VALUE", help="change one field of the model config or the recipe; may be repeated")
    add("--out", metavar="FOLDER", help=f"where run folders go (default: {DEFAULTS['out']})")
    return vars(parser.parse_args(argv))


def introduce(run):
    """Prints what is about to happen, in the words that can be typed to change it."""
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    record = run.identity["run"]
    plain, threads = type(run.model.config)(), record["hardware"]["threads"]
    asked = {setting.partition("=")[0] for setting in run.args.set}
    changed = [f"{name}={value}" for name, value in vars(run.model.config).items() if value != getattr(plain, name)
               and (name in asked or getattr(plain, name) is not None)]              # None: the model settles it itself
    steps = run.recipe.epochs * math.ceil(len(run.train_set) / run.recipe.batch_size)
    chooses = len(run.val_set.records)
    if "resume" in vars(run.args):
        print(f"resuming {run.folder} after epoch {run.state.epoch}, step {run.state.step}, of {run.recipe.epochs} "
              f"epoch{'s' * (run.recipe.epochs > 1)}")
    print(f"{run.args.model}, {parameters / 1e6:.2f} M parameters, on {record['hardware']['gpu'] or record['hardware']['cpu']} "
          f"({threads} thread{'s' * (threads != 1)}, kernels {record['kernels']['backend']}, amp {run.args.amp})")
    print(f"pictures: {', '.join(f'{name} {len(files)}' for name, files in run.identity['split'].items())} "
          "(train: what trains, val: what chooses, test: kept for evaluate.py)")
    if chooses < FEW_PICTURES:
        remedy = "a larger --limit" if run.args.limit < 1 else "more data, or another share of it (--split 70/15/15)"
        print(f"WARNING: {chooses} picture{'s choose' if chooses > 1 else ' chooses'} best.pt and its thresholds: expected {FEW_PICTURES} "
              f"or more, or chance chooses; {remedy}")
    if steps < FEW_STEPS:
        print(f"WARNING: {number_of(steps, 'step')} in all, {len(run.train_set)} pictures in batches of {run.recipe.batch_size}: next to "
              "nothing is learned in so few; more --epochs, or a smaller --batch-size")
    if run.recipe.schedule == "step" and not any(0 < milestone < run.recipe.epochs for milestone in run.recipe.milestones):
        better = f"; for example --set milestones={run.recipe.epochs * 2 // 3}" if run.recipe.epochs > 1 else ""
        print(f"WARNING: schedule=step, and no milestone lies within its {number_of(run.recipe.epochs, 'epoch')} (milestones: "
              f"{', '.join(map(str, run.recipe.milestones)) or 'none'}): the rate never falls{better}")
    whose = " of the demo set" if run.args.data == "demo" else ""
    print(f"config{whose}, where it differs from the paper's: {' '.join(changed) or 'nowhere'}")
    print(f"recipe{whose}: {' '.join(f'{name}={value}' for name, value in in_use(run.recipe).items())}")
    if warmup_of(run.recipe, steps) < run.recipe.warmup_iters:
        print(f"warm-up: shortened from {run.recipe.warmup_iters} to {warmup_of(run.recipe, steps)} steps, a third of this run's {steps}")
    print(f"run folder: {run.folder} (every field stands in its config.json)\n", flush=True)


def in_use(recipe):
    """{field: value} of the recipe, without what is off and what another choice leaves without effect."""
    idle = (() if recipe.optimizer == "sgd" else ("momentum",)) + (() if recipe.schedule == "step" else ("milestones", "gamma"))
    idle += () if recipe.schedule == "plateau" else ("plateau_patience", "plateau_factor")
    idle += () if recipe.rotate or recipe.shift or recipe.scale else ("shift_scale_rotate",)
    return {name: value for name, value in dataclasses.asdict(recipe).items() if value and name not in idle}


def say_goodbye(run, seconds, tuned):
    """Says how it went, where the pictures are and what to type next. tuned: words on the threshold, of `tune_threshold`."""
    checkpoint, state, select_by = run.path("best.pt"), run.state, run.recipe.select_by
    at, then = (" at 0.5" * select_by.startswith(("pixel/", "any-damage/")), f"; {tuned}, which best.pt uses") if tuned else ("", "")
    print(f"\ndone in {clock(seconds)}, {memory(run.device)}; best {select_by} {state.best:.3f}{at} in epoch {state.best_epoch + 1}{then}: "
          f"{checkpoint}")
    if state.best == 0 and not tuned and "loss" not in select_by:
        print(f"WARNING: nothing was learned yet ({select_by} is 0): train longer, a new run with --epochs {4 * run.recipe.epochs} or so")
    print(f"pictures: {', '.join(run.path(name) for name in ('first_batch.png', 'val_predictions.png', 'curves.png'))}")
    part = "" if run.identity["split"].get("test") else " --part val    # there is no test part: these pictures chose best.pt"
    print(f"next:     python evaluate.py --checkpoint {shlex.quote(checkpoint)}{part}\n"
          f"          python predict.py {shlex.quote(run.example)} --checkpoint {shlex.quote(checkpoint)}")
    if run.args.keep_epochs:
        print(f"          python evaluate.py --test-epochs {shlex.quote(run.folder)}")
    if run.args.data == "demo":
        print("note:     this model has seen drawings only; for real photographs, train on real ones (--data)")
    if run.unsaved:
        print(f"WARNING: not written, the disk was full: {', '.join(sorted(run.unsaved))}", file=sys.stderr)


def main(argv=None):
    """Exit code: 0 done, 1 stopped by an error in training, 2 a mistake in the command, 130 Ctrl-C, 143 SIGTERM."""
    given = parse_arguments(argv)
    try:
        distributed.start(given.get("timeout", DEFAULTS["timeout"]))
        with distributed.quiet():
            run = set_up(given)
        claim = run_folder.claim(run.folder) if distributed.is_main() else contextlib.nullcontext()
        distributed.on_main(lambda: write_identity(run))              # not before: another training may hold the folder
    except BrokenPipeError:                                           # | head: `ended`
        raise
    except (ValueError, OSError) as error:
        if distributed.first_to_say(str(error), seconds=5):
            print(f"train.py: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        return lost(error)
    with claim, distributed.quiet():
        try:
            code = perform(run)
        except RuntimeError as error:
            return lost(error, run)
    # An error may be this process's alone: to leave together it would wait for the others, and they for it.
    if code != 1:
        distributed.end()
    return code


def lost(error, run=None):
    """Another process has ended, or hangs: says so, once for all that are left, and how to go on. Any other error is raised."""
    if not distributed.is_lost(error):
        raise error
    if distributed.first_to_say("lost"):
        place = f" in epoch {run.state.epoch + 1}, step {run.state.step + 1}" if run else ""
        resume = (f"\n  saved  {run.path('last.pt')} is good: the run as it was last saved\n"
                  f"  try    {command()} --resume {shlex.quote(run.folder)}" if run else "")
        print(f"\ntrain.py: process {distributed.rank()} of {distributed.world()} has lost another one{place}: it has ended (its own "
              f"message says why) or has not answered within --timeout.\n  {str(error).strip().splitlines()[0]}{resume}",
              file=sys.stderr, flush=True)
    return 1


def command():
    """How this training is typed."""
    return ("python train.py" if distributed.world() == 1
            else f"torchrun --nproc-per-node {distributed.local('LOCAL_WORLD_SIZE', 1)} train.py")


def perform(run):
    """Trains a run from its set-up to its last words; returns main's exit code."""
    if "resume" not in vars(run.args) and not save(run, "last.pt", {}):       # a run killed in its first epoch resumes too,
        return 1                                                              # and a full disk shows now
    introduce(run)
    start = time.perf_counter()
    with StopSignal() as stop:
        try:
            finished = train(run, stop)
        except NonFiniteLoss as error:                                # in every process
            if distributed.is_main():
                print(f"\ntrain.py: the loss is no longer finite: {error}", file=sys.stderr)
            return 1
        except (ValueError, MemoryError, RuntimeError) as error:      # any other RuntimeError is a fault of this code
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            print(f"\ntrain.py: {what_broke(error, run)}", file=sys.stderr)
            return 1
        if not finished:
            exactly = save(run, "last.pt", {})
            print(f"stopped in epoch {run.state.epoch + 1}, step {run.state.step}; go on "
                  f"{'from exactly here' if exactly else 'from the last epoch that was saved'} with\n"
                  f"  {command()} --resume {shlex.quote(run.folder)}")
            run.loaders.clear()
            return max(distributed.gather(stop.exit_code))
        if not os.path.isfile(run.path("best.pt")):
            print(f"\ntrain.py: {run.path('best.pt')} could not be written in any epoch; free some space, and train one more:\n"
                  f"  {command()} --resume {shlex.quote(run.folder)} --epochs {run.recipe.epochs + 1}", file=sys.stderr)
            return 1
        tuned = tune_threshold(run, stop)
        run.loaders.clear()                                           # ends their workers in torch's order; StopSignal's is for errors
    say_goodbye(run, time.perf_counter() - start, tuned)
    return max(distributed.gather(stop.exit_code or (1 if run.unsaved else 0)))


if __name__ == "__main__":
    try:
        sys.exit(ended(main))
    except KeyboardInterrupt:                                         # while data and model were being set up: nothing to save yet
        sys.exit("train.py: stopped before training began")
