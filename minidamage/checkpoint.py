"""Checkpoints: one file that holds everything `evaluate.py`, `predict.py` and `train.py --resume` need.

    model, checkpoint = load_checkpoint("runs/damagenet-demo-001/best.pt")      # rebuilt, weights in, eval mode

The file is a `torch.save` of one plain dict (tensors, numbers, strings, lists, tuples), so it loads with
`weights_only=True`: opening a stranger's checkpoint runs none of his code. Keys:

    format        "minidamage"            version       1
    model         name, as in MODELS      config        dict: the fields of the model's config dataclass
    num_classes   K + 1, 0 = background   class_names   K names        category_ids  K ids of the data set
    thresholds    {class name: score}, the best F1 on the validation part
    measured      {class name: {"precision", "recall"}} there, at these: of objects at IoU 0.5, or of pixels
    weights       state_dict; the averaged weights when EMA is on (the raw ones are then train["raw_weights"])
    train         what a resume needs: epoch, step, optimizer, scaler, rng, losses so far, metrics of past epochs;
                  of best.pt: epoch, tuned (whether the mask threshold has been chosen)
    run           args, recipe, data path, layout, seed, commit, versions, kernels
    split         {"train": [file, ...], "val": [...], "test": [...]}          metrics  {name: value} of this epoch

A file is never written in place: the new one is written beside, flushed to the disk and renamed, so whatever kills the
process (a second Ctrl-C, a full disk, a power cut) leaves the older file whole.

For other programs, the weights alone, under the names that torchvision (ResNet, Faster and Mask R-CNN, FCN, DeepLabV3), timm (ResNet) and
segmentation_models.pytorch (its nine segmenters) give them:

    python -m minidamage.checkpoint export runs/maskrcnn-coco-001/best.pt weights.pth
    python -m minidamage.checkpoint export --body best.pt resnet.pth          the ResNet body alone
    torchvision.models.detection.maskrcnn_resnet50_fpn(num_classes=4).load_state_dict(torch.load("weights.pth"))

What comes back goes in by train.py --pretrained.
"""
import argparse
import os
import pickle
import random
import re
import sys
import zipfile

import numpy as np
import torch

from minidamage.config import from_dict

FORMAT, VERSION = "minidamage", 1
RESNET50 = "https://download.pytorch.org/models/resnet50-11ad3fa6.pth"                   # named in messages, never fetched
REQUIRED_KEYS = ("model", "config", "num_classes", "class_names", "weights")


def save_checkpoint(path, state):
    """Writes a checkpoint dict to `path`, whole or not at all (see `write_whole`). Adds `format` and `version`."""
    write_whole(path, {"format": FORMAT, "version": VERSION, **state})


def write_whole(path, content):
    """torch.save of a plain dict, whole or not at all.

    Raises OSError when the disk is full or the folder cannot be written; the older file, if there was one, is then untouched and the
    half-written one is removed.
    """
    path = os.fspath(path)
    partial = path + ".partial"                                       # same folder: a rename cannot cross file systems
    try:
        with open(partial, "wb") as file:
            torch.save(plain(content), file)
            file.flush()
            os.fsync(file.fileno())                                   # on the disk before the name points to it
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:                          # torch reports a short write as a RuntimeError
        _remove(partial)
        cause = _os_error_behind(error)
        if cause is None:
            raise
        older = f"The older {path} is whole." if os.path.exists(path) else "There was no older file."
        raise OSError(cause.errno, f"could not write {path}: {cause.strerror or cause}. {older}") from error


def plain(value):
    """A copy of nested dicts, lists and tuples in which every leaf is what `weights_only=True` reads back: tensors as they are,
    numpy numbers and str subclasses (torch.__version__ is one) as Python's own. Raises TypeError for anything else."""
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(plain(item) for item in value)
    if isinstance(value, torch.Tensor) or value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):
        return str.__str__(value)
    raise TypeError(f"a checkpoint holds tensors, numbers, strings, lists and dicts, not {type(value).__name__}: {value!r:.80}")


def read_checkpoint(path):
    """Returns the checkpoint dict of a file that `save_checkpoint` wrote, tensors on the CPU.

    Raises ValueError that says what is wrong: no such file, half-written, not one of ours, from a newer version.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: {'is a folder' if os.path.isdir(path) else 'no such file or folder'}, expected a checkpoint file; a run "
                         "folder holds best.pt and last.pt")
    if not zipfile.is_zipfile(path):                                  # torch.save writes a zip whose index comes last
        raise ValueError(f"{path}: half-written or not a checkpoint ({os.path.getsize(path):,} bytes, and the zip index that "
                         "ends a torch file is missing); copy it again, or take the run's other file (best.pt, last.pt)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged, or it holds more than plain tensors and numbers ({_reason(error)})") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        keys = ", ".join(map(str, list(state)[:3])) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path}: expected a checkpoint written by train.py, got another torch file ({keys}, ...); "
                         "backbone weights go to train.py --pretrained FILE")
    if state["version"] > VERSION:
        raise ValueError(f"{path}: written by checkpoint version {state['version']}, this code reads up to {VERSION}; update minidamage")
    missing = [key for key in REQUIRED_KEYS if key not in state]
    if missing:
        raise ValueError(f"{path}: the checkpoint lacks {', '.join(missing)}; it was not written by train.py")
    return state


def load_checkpoint(path, device="cpu"):
    """Returns (model in eval mode on `device`, checkpoint dict), the model rebuilt from the name and config in the file.

    Raises ValueError as `read_checkpoint`, and when the weights do not fit the model of that name.
    """
    checkpoint = read_checkpoint(path)
    model = build_from_checkpoint(checkpoint, path)
    return model.to(device).eval(), checkpoint


def choose_device(name):
    """The torch.device of a script's --device, "auto" for a GPU where there is one; ValueError where this torch cannot use it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: expected cpu, or cuda or cuda:N where torch {torch.__version__} has that GPU, got: "
                         f"{str(error).splitlines()[0]}; type --device cpu, or install a CUDA build of torch and the driver") from None
    return device


def score_thresholds(checkpoint, score, task):
    """{class name: lowest score of a finding}: --score for all, else the checkpoint's own (chosen on val), else 0.5. ValueError for a
    score that is none, and for any where a segmenter of several classes takes each pixel's likeliest."""
    if score is not None and not 0 <= score <= 1:
        raise ValueError(f"--score {score}: expected a number from 0 to 1")
    if score is not None and task == "segmentation" and len(checkpoint["class_names"]) > 1:
        raise ValueError(f"--score {score}: is for detectors and for segmenters of one class; this one has "
                         f"{len(checkpoint['class_names'])}, and each pixel is of the likeliest: leave it out")
    own = checkpoint.get("thresholds") or {}
    return {name: float(own.get(name, 0.5) if score is None else score) for name in checkpoint["class_names"]}


def build_from_checkpoint(checkpoint, path="checkpoint", **changes):
    """Returns the model of a checkpoint dict, on the CPU, in training mode; `changes` replace fields of its config."""
    import minidamage                                                 # here: minidamage/__init__.py imports this file

    name = checkpoint["model"]
    if name not in minidamage.MODELS:
        raise ValueError(f"{path}: holds model {name!r}, which this version does not have; known: {', '.join(minidamage.MODELS)}")
    config_class = minidamage.MODELS[name][1]
    config = from_dict(config_class, {**checkpoint["config"], **changes})
    model = minidamage.build_model(name, num_classes=checkpoint["num_classes"], **vars(config))
    load_weights(model, checkpoint["weights"], path)
    return model


def load_weights(model, weights, path="checkpoint"):
    """Loads a state_dict into `model`, every tensor or none; raises ValueError that lists what does not fit."""
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}"
              for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    problems = [f"{len(items)} {what} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
                for what, items in (("missing", missing), ("unexpected", unexpected), ("of another shape", sorted(shapes))) if items]
    if problems:
        raise ValueError(f"{path}: the weights do not fit the model {getattr(model, 'name', type(model).__name__)}: {'; '.join(problems)}. "
                         "It is a checkpoint of another model, config or class list.")
    model.load_state_dict(weights)


def load_pretrained(model, path):
    """Starts `model` from a weight file: a checkpoint of ours, a whole detector or segmenter (torchvision, segmentation_models.pytorch),
    or a ResNet body (torchvision, timm).

    Returns {"loaded": [...], "missing": [...], "unexpected": [...], "mismatched": [...]}, names of tensors: a whole model
    loads where name and shape agree (another number of classes leaves the last layers random). Raises ValueError when the
    file cannot be read or nothing in it fits.
    """
    from minidamage.layers.resnet import load_body
    from minidamage.models.faster_rcnn import modern_name

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"--pretrained {path}: there is no such file; minidamage downloads nothing, fetch the weights first, such as "
                         f"torchvision's ResNet-50: {RESNET50}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:      # OSError: half a zip
        raise ValueError(f"--pretrained {path}: not a torch file of plain tensors, or half of one "
                         f"({_reason(error)})") from error
    if not isinstance(weights, dict):
        raise ValueError(f"--pretrained {path}: expected a state_dict, got {type(weights).__name__}")
    of = f"; it is a checkpoint of {weights.get('model')}, this model is {model.name}" if weights.get("format") == FORMAT else ""
    weights = next((weights[key] for key in ("weights", "state_dict", "model") if isinstance(weights.get(key), dict)), weights)
    weights = {modern_name(key.removeprefix("module.").removeprefix("model.")): value for key, value in weights.items()
               if torch.is_tensor(value)}
    if not is_whole_model(weights, model):
        try:
            return load_body(model, path)
        except ValueError as error:
            raise ValueError(f"{error}{of}") from None
    own = model.state_dict()
    fits = [key for key in weights if key in own and weights[key].shape == own[key].shape]
    if not fits:
        raise ValueError(f"--pretrained {path}: none of its {len(weights)} tensors has the name and shape of one in the model "
                         f"({', '.join(list(weights)[:3])}, ...){of}")
    model.load_state_dict({key: weights[key] for key in fits}, strict=False)
    return {"loaded": fits, "missing": [key for key in own if key not in weights], "unexpected": [key for key in weights if key not in own],
            "mismatched": [f"{key} {tuple(weights[key].shape)} for {tuple(own[key].shape)}" for key in weights
                           if key in own and weights[key].shape != own[key].shape]}


def is_whole_model(weights, model):
    """Whether a state_dict holds more than a body: tensors that `model` has outside of its ResNet, or a known model's heads."""
    from minidamage.layers.resnet import ResNet

    prefixes = tuple(f"{name}." if name else "" for name, module in model.named_modules() if isinstance(module, ResNet))
    return (any(key.startswith(("rpn.", "roi_heads.", "decoder.", "classifier.")) for key in weights)
            or any(key in weights and not key.startswith(prefixes) for key in model.state_dict()))


def export_weights(path, out, body=False):
    """Writes the weights of a checkpoint of ours as a plain state_dict that others load; returns (model, the tensors written).

    body: the ResNet body alone, under torchvision's and timm's names (conv1.weight, layer1.0..., no classifier). Raises ValueError for a
    file that is no checkpoint, or has no such body; OSError where `out` cannot be written.
    """
    from minidamage.layers.resnet import ResNet

    model = build_from_checkpoint(read_checkpoint(path), path)
    part = model
    if body:
        part = next((module for module in model.modules() if isinstance(module, ResNet)), None)
        if part is None:
            raise ValueError(f"--body: {path} holds {model.name}, which has no ResNet body; leave --body out")
    weights = {key: value.contiguous() for key, value in part.state_dict().items()}      # channels_last is ours: others see plain tensors
    write_whole(out, weights)
    return model, weights


def rng_state():
    """The state of every random generator that training draws from (Python, numpy, torch, each GPU), as plain data."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    """Puts back what `rng_state` returned; GPU states only where the number of GPUs is the same."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def check_out(path, out):
    """ValueError where what is made of a checkpoint would be written over it, OSError where it can't be written at all."""
    if os.path.exists(path) and os.path.exists(out) and os.path.samefile(path, out):
        raise ValueError(f"{out}: expected another file to write than the checkpoint itself: its thresholds and class names would be gone")
    if os.path.isdir(out) or not os.path.isdir(os.path.dirname(os.path.abspath(out))):
        raise OSError(f"{out}: expected a file to write, in a folder that is there")


def _reason(error):
    """One line of torch's page-long message when a file does not load."""
    foreign = re.search(r"Unsupported \w+: (?:GLOBAL )?([\w.]+)", str(error))
    if foreign:
        return f"it refers to {foreign[1]}"
    if "Weights only load failed" in str(error):                      # what follows advises to load it unsafely
        return "torch cannot read it"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _remove(path):
    try:
        os.remove(path)
    except OSError:
        pass


def _os_error_behind(error):
    """The OSError in a chain of exceptions, or a stand-in for torch's own write errors; None when it is no write error."""
    link = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    if "write" in str(error):                                         # "PytorchStreamWriter failed writing file ..."
        return OSError(None, str(error).splitlines()[0])
    return None


def main(argv=None):
    """python -m minidamage.checkpoint export. Returns the exit code: 0, 1 where it could not be written, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m minidamage.checkpoint", description="Checkpoints of minidamage for other programs.")
    export = parser.add_subparsers(dest="command", required=True).add_parser(
        "export", help="the weights alone, under torchvision's, timm's and segmentation_models.pytorch's names")
    export.add_argument("checkpoint", metavar="BEST.PT", help="a checkpoint that train.py wrote")
    export.add_argument("out", metavar="OUT.PTH", help="the file to write; one that is there is replaced as a whole")
    export.add_argument("--body", action="store_true", help="the ResNet body alone")
    args = parser.parse_args(argv)
    try:
        check_out(args.checkpoint, args.out)
        model, weights = export_weights(args.checkpoint, args.out, args.body)
    except (ValueError, OSError) as error:
        print(f"minidamage.checkpoint: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    print(f"{args.out}: {len(weights)} tensors of {model.name}{' (its body)' if args.body else ''}, {model.num_classes} classes with the "
          f"background; first {next(iter(weights))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
