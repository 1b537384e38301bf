"""What a model costs: parameters, multiply-adds, time and memory for one picture, beside the crack paper's Table 7.

Counted while the network runs, from the framework's own calls: convolutions and matrix products, nothing else (batch norm, ReLU,
up-sampling and sums are left out, about 0.5 % of these networks). One multiply-add is two FLOPs: tools differ in which of the two they
print, so both are here by name. A transposed convolution multiplies each *input* pixel with the whole kernel; several counters take its
output pixels instead, which is stride x stride as many. The paper's figures fit the second rule, so that is a column of its own.

A detector's cost hangs on what it finds, so the numbers of boxes are fixed: body, pyramid with its context, RPN with its NMS, box stage on
rpn_post_nms_top_n_test proposals (1,000) with its NMS, masks on box_detections_per_img of them (100). Boxes of seeded places and sizes
stand in for the proposals. RoIAlign and NMS are timed, not counted; neither timed nor counted are resizing, pasting, and DamageNet's repair
of masks. DamageNet comes with its context in three widths, with fewer rates and on fewer levels, and the context's blocks (four, on c2 to
c5, where no row says otherwise) are measured alone as well.
"""
import multiprocessing
import os
import re
import time

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minidamage
from minidamage import MODELS, run_folder
from minidamage.evaluation.common import without_nan, writing
from minidamage.layers.roi_heads import to_rois
from minidamage.layers.rpn import Proposals
from minidamage.layers.segmenter import Segmenter
from minidamage.metrics import tables
from minidamage.metrics.measure import synchronize
from minidamage.models.damagenet import DamageNetConfig, DilatedContextBlock

SIDE = 448                                                    # pixels: the crack paper's pictures
DETECTOR_SIDE = 1024                                          # DamageNet, section III.C
DETECTORS = ("damagenet", "maskrcnn_resnet50_fpn")            # measured when no model is named: with the context, and without
WIDTHS = (1, 32, 256)                                         # context_groups: full convolutions, in between, depthwise
CONTEXTS = (*({"context_groups": groups} for groups in WIDTHS), {"context_rates": (1, 2, 4)}, {"context_levels": (4, 5)})
CONTEXT = "dilated context"                                   # DamageNet's blocks alone
PASSES = 10                                                   # timed; the quickest counts, other processes only add time
PAPER_CONTEXT_MS = 12                                         # DamageNet, section V: above Mask R-CNN, an image; hardware not stated
# Context-CrackNet, Table 7: parameters in millions, GFLOPs, ms on an A40. PAN and PSPNet share one printed number of parameters.
PAPER = {"deeplabv3": (39.63, 251.28, 17.19), "deeplabv3plus": (26.68, 56.42, 6.72), "fpn": (26.12, 48.08, 6.35),
         "linknet": (31.18, 66.06, 6.85), "manet": (147.44, 114.48, 12.85), "pan": (24.26, 53.46, 7.01), "pspnet": (24.26, 18.14, 3.09),
         "unet": (32.52, 65.60, 7.67), "unetplusplus": (48.99, 352.68, 24.44), "context_cracknet": (82.05, 243.78, 15.63)}


def report(names, device, out=None):
    """Measures the models (none named: every segmentation model, DamageNet and Mask R-CNN), prints the tables, with `out` writes
    complexity.json. Returns 0."""
    names = list(names) or [*segmenters(), *DETECTORS]
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise ValueError(f"--complexity: expected models ({', '.join(MODELS)}), got {', '.join(unknown)}")
    rows = {"models": {}, "detectors": {}, "context": {}}
    for kind, row, name, fields in what_is_measured(names):
        side = SIDE if kind == "models" else DETECTOR_SIDE
        rows[kind][row] = measure_apart(name, str(device), side, fields)
        print(f"{row}: {rows[kind][row]['parameters']:,} parameters, {rows[kind][row]['ms']:.1f} ms", flush=True)
    shown = [table(rows["models"], device)] * bool(rows["models"])
    shown += [detector_table(rows["detectors"], rows["context"], device)] * bool(rows["detectors"])
    print("\n" + "\n\n".join(tables.as_text(*each) for each in shown))
    if rows["models"]:
        print("\ngiven both ways: multiply-adds as executed (transposed convolutions by their input), and GFLOPs with those counted over "
              "their output, which is how the paper's figures come out")
    if out:
        about = {"command": run_folder.command_line(), "picture": f"1 x 3 x {SIDE} x {SIDE}, float32",
                 "detector picture": f"1 x 3 x {DETECTOR_SIDE} x {DETECTOR_SIDE}, float32", **run_folder.environment(device)}
        with writing(out):
            run_folder.write_json(os.path.join(out, "complexity.json"), without_nan(
                {**about, **rows, "paper": PAPER, "paper context ms": PAPER_CONTEXT_MS}))
        print(f"written: {os.path.join(out, 'complexity.json')}")
    return 0


def segmenters():
    return [name for name, (model_class, *_) in MODELS.items() if issubclass(model_class, Segmenter)]


def what_is_measured(names):
    """[(kind: "models" for segmenters, "detectors" or "context", row, name for `measure`, config fields)]."""
    listed = []
    for name in names:
        if name != "damagenet":
            listed.append(("models" if name in segmenters() else "detectors", name, name, {}))
            continue
        contexts = {typed(fields): fields for fields in CONTEXTS}
        listed += [("detectors", f"damagenet, {context}", name, fields) for context, fields in contexts.items()]
        listed += [("context", context, CONTEXT, fields) for context, fields in contexts.items()]
    return listed


def typed(fields):
    """"context_rates=1,2,4": config fields as --set takes them."""
    return " ".join(f"{field}={','.join(map(str, value)) if isinstance(value, tuple) else value}" for field, value in fields.items())


def table(rows, device):
    """(caption, columns, rows) of {segmenter: measurement}."""
    columns = ["model", "parameters M", "paper", "GMAC", "GFLOP", "GFLOP, output rule", "paper", "ms", "paper (A40)", "peak MB"]
    lines = []
    for name, row in rows.items():
        parameters, flops, milliseconds = PAPER.get(name, (None, None, None))
        lines.append([name, row["parameters"] / 1e6, parameters, row["multiply-adds"] / 1e9, 2 * row["multiply-adds"] / 1e9,
                      2 * row["multiply-adds, output rule"] / 1e9, flops, row["ms"], milliseconds, whole(row["peak MB"])])
    caption = (f"One picture {SIDE}x{SIDE}, one damage class, float32, channels_last, on {where(device)} (quickest of {PASSES}; peak: "
               "what the model and its passes take beyond the imports)")
    return caption, columns, lines


def detector_table(detectors, context, device):
    """(caption, columns, rows) of {detector: measurement}, and of the context blocks alone."""
    columns = ["model", "parameters M", "GMAC", "GFLOP", "ms", "ms above Mask R-CNN", "peak MB"]
    plain = detectors.get(DETECTORS[1], {}).get("ms")
    lines = []
    for name, row in [*detectors.items(), *((f"context alone, {width}", row) for width, row in context.items())]:
        above = row["ms"] - plain if plain is not None and name.startswith("damagenet") else None
        lines.append([name, row["parameters"] / 1e6, row["multiply-adds"] / 1e9, 2 * row["multiply-adds"] / 1e9, row["ms"], above,
                      whole(row["peak MB"])])
    caption = (f"One picture {DETECTOR_SIDE}x{DETECTOR_SIDE}, one damage class, fixed numbers of boxes, float32, channels_last, on "
               f"{where(device)} (quickest of {PASSES}; DamageNet's paper: its dilated context costs {PAPER_CONTEXT_MS} ms)")
    return caption, columns, lines


def where(device):
    return str(device) if torch.device(device).type == "cuda" else f"{device}, {torch.get_num_threads()} threads"


def whole(number):
    """Rounded; None for NaN."""
    return round(number) if number == number else None


def measure_apart(name, device, side, config_fields):
    """`measure` in a process of its own: the memory of one model must not show in the next one's peak."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, (name, device, side, PASSES), config_fields)


def measure(name, device, side=SIDE, passes=PASSES, **config_fields):
    """{"parameters", "multiply-adds", "multiply-adds, output rule", "ms", "peak MB"} for one picture of side x side, in evaluation.
    name: a model's, or CONTEXT."""
    before = resident("VmRSS")
    device = torch.device(device)
    prepare = context_alone if name == CONTEXT else segmenter if name in segmenters() else detector
    model, forward = prepare(name, device, side, config_fields)
    with torch.no_grad(), Counter() as counter:               # also the warm-up
        forward()
    seconds = []
    with torch.inference_mode():
        for _ in range(passes):
            synchronize(device)
            began = time.perf_counter()
            forward()
            synchronize(device)
            seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) / 2 ** 20 if device.type == "cuda" else resident("VmHWM") - before
    return {"parameters": sum(p.numel() for p in model.parameters()), "multiply-adds": counter.executed,
            "multiply-adds, output rule": counter.output_rule, "ms": 1000 * float(np.min(seconds)), "peak MB": peak}


def segmenter(name, device, side, config_fields):
    """(the model, what runs it once)."""
    model = minidamage.build_model(name, num_classes=2, **config_fields).to(device).eval()
    x = torch.zeros(1, 3, side, side, device=device).to(memory_format=torch.channels_last)
    return model, lambda: model.logits(x)


def detector(name, device, side, config_fields):
    """(the model, what runs it once with fixed numbers of boxes)."""
    model = minidamage.build_model(name, num_classes=2, **config_fields).to(device).eval()
    heads, size = model.roi_heads, (side, side)
    generator = torch.Generator().manual_seed(0)
    # noise, not zeros: scores that are all equal would give the RPN's NMS another amount of work
    x = torch.randn(1, 3, side, side, generator=generator).to(device, memory_format=torch.channels_last)
    P = model.rpn.post_nms_top_n["testing"]
    centre, octaves = torch.rand(2, P, 2, generator=generator)                                   # sides from that of the picture to a 32nd
    half = 2 ** (-5 * octaves) / 2
    boxes = side * torch.cat([centre - half, centre + half], dim=1).clamp(0, 1).to(device)
    proposals = Proposals(boxes[None], torch.ones(1, P, device=device), torch.ones(1, P, dtype=torch.bool, device=device))
    rois = to_rois(proposals.boxes)[:heads.detections_per_img]
    labels = torch.ones(len(rois), dtype=torch.int64, device=device)

    def forward():
        features = model.backbone(x)
        model.rpn(features, size, [size])                     # its own proposals are not used: their number is not fixed
        heads.box_stage(features, proposals, [size], slice(None), [P])
        if heads.mask_head is not None:
            heads.mask_logits(features, rois, labels)

    return model, forward


def context_alone(name, device, side, config_fields):
    """(DamageNet's context blocks, what runs each on its level's lateral once)."""
    config = DamageNetConfig(**config_fields)
    blocks = nn.ModuleList(DilatedContextBlock(config.fpn_channels, config.context_rates, config.context_groups)
                           for _ in config.context_levels).to(device, memory_format=torch.channels_last).eval()
    laterals = [torch.zeros(1, config.fpn_channels, side >> level, side >> level, device=device).to(memory_format=torch.channels_last)
                for level in config.context_levels]           # level l has stride 2**l

    def forward():
        for block, lateral in zip(blocks, laterals):
            block(lateral)

    return blocks, forward


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
