"""What a model costs: parameters, multiply-adds, time and memory for one picture, beside the crack paper's Table 7.

Counted while the network runs, from the framework's own calls: convolutions and matrix products, nothing else (batch norm, ReLU,
up-sampling and sums are left out, about 0.5 % of these networks). One multiply-add is two FLOPs: tools differ in which of the two they
print, so both are here by name. A transposed convolution multiplies each *input* pixel with the whole kernel; several counters take its
output pixels instead, which is stride x stride as many. The paper's figures fit the second rule, so that is a column of its own.
"""
import multiprocessing
import os
import re
import time

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minidamage
from minidamage import MODELS, run_folder
from minidamage.evaluation.common import without_nan, writing
from minidamage.layers.segmenter import Segmenter
from minidamage.metrics import tables
from minidamage.metrics.measure import synchronize

SIDE = 448                                                    # pixels: the paper's pictures
PASSES = 10                                                   # timed; the quickest counts, other processes only add time
# Context-CrackNet, Table 7: parameters in millions, GFLOPs, ms on an A40. PAN and PSPNet share one printed number of parameters.
PAPER = {"deeplabv3": (39.63, 251.28, 17.19), "deeplabv3plus": (26.68, 56.42, 6.72), "fpn": (26.12, 48.08, 6.35),
         "linknet": (31.18, 66.06, 6.85), "manet": (147.44, 114.48, 12.85), "pan": (24.26, 53.46, 7.01), "pspnet": (24.26, 18.14, 3.09),
         "unet": (32.52, 65.60, 7.67), "unetplusplus": (48.99, 352.68, 24.44), "context_cracknet": (82.05, 243.78, 15.63)}


def report(names, device, out=None):
    """Measures the models (none named: every segmentation model), prints the table, with `out` writes complexity.json. Returns 0."""
    names = list(names) or segmenters()
    unknown = [name for name in names if name not in segmenters()]
    if unknown:
        raise ValueError(f"--complexity: expected segmentation models ({', '.join(segmenters())}), got {', '.join(unknown)}")
    rows = {}
    for name in names:
        rows[name] = measure_apart(name, str(device))
        print(f"{name}: {rows[name]['parameters']:,} parameters, {rows[name]['ms']:.1f} ms", flush=True)
    print("\n" + tables.as_text(*table(rows, device)))
    print("\ngiven both ways: multiply-adds as executed (transposed convolutions by their input), and GFLOPs with those counted over their "
          "output, which is how the paper's figures come out")
    if out:
        about = {"command": run_folder.command_line(), "picture": f"1 x 3 x {SIDE} x {SIDE}, float32", **run_folder.environment(device)}
        with writing(out):
            run_folder.write_json(os.path.join(out, "complexity.json"), without_nan({**about, "models": rows, "paper": PAPER}))
        print(f"written: {os.path.join(out, 'complexity.json')}")
    return 0


def segmenters():
    return [name for name, (model_class, *_) in MODELS.items() if issubclass(model_class, Segmenter)]


def table(rows, device):
    """(caption, columns, rows) of {model: measurement}."""
    columns = ["model", "parameters M", "paper", "GMAC", "GFLOP", "GFLOP, output rule", "paper", "ms", "paper (A40)", "peak MB"]
    lines = []
    for name, row in rows.items():
        parameters, flops, milliseconds = PAPER.get(name, (None, None, None))
        lines.append([name, row["parameters"] / 1e6, parameters, row["multiply-adds"] / 1e9, 2 * row["multiply-adds"] / 1e9,
                      2 * row["multiply-adds, output rule"] / 1e9, flops, row["ms"], milliseconds, round(row["peak MB"])
                      if row["peak MB"] == row["peak MB"] else None])
    threads = "" if torch.device(device).type == "cuda" else f", {torch.get_num_threads()} threads"
    caption = (f"One picture {SIDE}x{SIDE}, one damage class, float32, channels_last, on {device}{threads} (quickest of {PASSES}; peak: "
               "what the model and its passes take beyond the imports)")
    return caption, columns, lines


def measure_apart(name, device):
    """`measure` in a process of its own: the memory of one model must not show in the next one's peak."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (name, device, SIDE, PASSES))


def measure(name, device, side=SIDE, passes=PASSES, **config_fields):
    """{"parameters", "multiply-adds", "multiply-adds, output rule", "ms", "peak MB"} of a model at image_size `side`, in evaluation."""
    before = resident("VmRSS")
    model = minidamage.build_model(name, num_classes=2, **config_fields).to(device).eval()
    x = torch.zeros(1, 3, side, side, device=device).to(memory_format=torch.channels_last)
    with torch.no_grad(), Counter() as counter:               # also the warm-up
        model.logits(x)
    seconds = []
    with torch.inference_mode():
        for _ in range(passes):
            synchronize(x.device)
            began = time.perf_counter()
            model.logits(x)
            synchronize(x.device)
            seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(x.device) / 2 ** 20 if x.device.type == "cuda" else resident("VmHWM") - before
    return {"parameters": sum(p.numel() for p in model.parameters()), "multiply-adds": counter.executed,
            "multiply-adds, output rule": counter.output_rule, "ms": 1000 * float(np.min(seconds)), "peak MB": peak}


def resident(key):
    """MB of this process: "VmRSS" now, "VmHWM" at most so far; NaN where the system does not say (not Linux)."""
    try:
        with open("/proc/self/status") as stream:
            return int(re.search(key + r":\s+(\d+)", stream.read())[1]) / 1024
    except (OSError, TypeError):
        return float("nan")


class Counter(TorchDispatchMode):
    """Sums the multiply-adds of the convolutions and matrix products inside `with`: `executed`, and by the `output_rule`."""

    def __init__(self):
        super().__init__()
        self.executed = self.output_rule = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        counted = RULES.get(func._schema.name)
        if counted:
            executed, output_rule = counted(args, out)
            self.executed, self.output_rule = self.executed + executed, self.output_rule + output_rule
        return out


def _convolution(args, out):
    """args: input [N, C, ...], weight [A, B, k...], bias, stride, padding, dilation, transposed, ..."""
    x, weight, transposed = args[0], args[1], args[6]
    positions = lambda t: t.shape[0] * t.shape[2:].numel()
    return (positions(x) if transposed else positions(out)) * weight.numel(), positions(out) * weight.numel()


def _product(of):
    """of: position of the left factor [..., n, m] among the arguments; every output element is a sum of m products."""
    return lambda args, out: (out.numel() * args[of].shape[-1],) * 2


def _linear_attention(args, out):
    """As the op computes it: the sequence is projected to k positions before the channels are (ops/linear_attention.py)."""
    x, w_q, E, w_o = args[0], args[1], args[7], args[10]
    (B, N, D), A, k = x.shape, w_q.shape[0], E.shape[1]
    total = B * (N * D * A + 2 * (k * N * D + k * D * A) + 2 * N * k * A + (N * A * w_o.shape[0] if w_o is not None else 0))
    return total, total


def _deform_conv2d(args, out):
    out = out[0] if isinstance(out, (tuple, list)) else out
    weight = next(t for t in args[1:] if torch.is_tensor(t) and t.dim() == 4 and t.shape[0] == out.shape[1])
    total = out.shape[0] * out.shape[2:].numel() * weight.numel()
    return total, total


RULES = {"aten::convolution": _convolution, "aten::mm": _product(0), "aten::bmm": _product(0), "aten::addmm": _product(1),
         "aten::baddbmm": _product(1), "minidamage::linear_attention": _linear_attention, "minidamage::deform_conv2d": _deform_conv2d}
