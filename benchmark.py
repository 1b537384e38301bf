"""Times every op, whole models, COCO evaluation and the input pipeline: ours, our reference, and a peer where one is importable.

    python benchmark.py                      everything, on the CPU with the threads torch has
    python benchmark.py --ops --device cuda  the ops on a GPU
    python benchmark.py --ops nms --json results/benchmark.json

How it is measured. Two callables run in turn, A B A B ..., in one process; the table holds each side's median and the
median of the ratios pair by pair with their smallest and largest. A peer is torchvision (ops, models), pycocotools and
faster-coco-eval (COCO evaluation): installed beside minidamage in an environment of their own, never needed by it.
Peers get their own best layout (NCHW); ours is timed with the layout conversion outside ("channels_last") and inside
("from NCHW"). Bytes are the least that must move (each input read once, each output written once); GB/s stands beside
the copy bandwidth measured in the same run.
"""
import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import minidamage
from minidamage import ops
from minidamage.ops.nms import nms_reference
from minidamage.ops.roi_align import roi_align_reference
from minidamage.run_folder import environment

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def peer(name):
    """The peer module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def seconds(function, device):
    """Wall time of one call; on a GPU with the queue drained before and after."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def paired(ours, others, device, budget=6.0, least=5, most=60):
    """Runs ours and every other in turn until the budget (seconds) is spent.

    Returns {"ours": ms, name: {"ms", "ratio", "ratio_min", "ratio_max"}, "pairs": n}; a ratio is other / ours: 2 is twice as fast as it.
    """
    everyone = {"ours": ours, **others}
    once = sum(seconds(function, device) for function in everyone.values())     # warm-up: build, allocator, threads
    least = 3 if once > budget else least                               # slow peers: COCO evaluation in Python takes half a minute
    times = {name: [] for name in everyone}
    start = time.perf_counter()
    while len(times["ours"]) < least or (time.perf_counter() - start < budget and len(times["ours"]) < most):
        for name, function in everyone.items():
            times[name].append(seconds(function, device))
    result = {"ours": 1e3 * statistics.median(times["ours"]), "pairs": len(times["ours"])}
    for name in others:
        ratios = [b / a for a, b in zip(times["ours"], times[name])]
        result[name] = {"ms": 1e3 * statistics.median(times[name]), "ratio": statistics.median(ratios),
                        "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return result


class Table:
    """Collects rows, prints each as it comes, and keeps them for --json."""

    def __init__(self, args):
        self.args, self.rows = args, []
        self.bandwidth = copy_bandwidth(args.device)
        print(f"copy bandwidth {self.bandwidth:.1f} GB/s (read + write), {args.device}, {torch.get_num_threads()} threads, {args.dtype}")

    def add(self, name, ours, others, moved=None, note=""):
        """Times one row. others: {name: callable or None}; moved: least bytes to move."""
        if self.args.only and not any(word in name for word in self.args.only):
            return
        row = {"name": name, "note": note, **paired(ours, {k: f for k, f in others.items() if f}, self.args.device)}
        if moved:
            row["GB/s"] = moved / row["ours"] / 1e6
            row["share_of_copy"] = row["GB/s"] / self.bandwidth
        self.rows.append(row)
        cells = [f"{name:58s} {row['ours']:10.2f} ms"]
        for other in others:
            if other in row:
                r = row[other]
                cells.append(f"{other} {r['ms']:.2f} ms = {r['ratio']:.2f}x [{r['ratio_min']:.2f}, {r['ratio_max']:.2f}]")
        if moved:
            cells.append(f"{row['GB/s']:.1f} GB/s = {100 * row['share_of_copy']:.0f}% of copy")
        print("  ".join(cells + [note] if note else cells), flush=True)
        self.keep()

    def keep(self):
        """Writes the rows so far to --json: a run that is stopped has not been for nothing."""
        if self.args.json:
            write_json(self.args, self)


def copy_bandwidth(device):
    """GB/s of a large device-to-device copy, bytes read plus bytes written: the roofline of memory-bound kernels."""
    a = torch.rand(64 << 20, device=device)                             # 256 MiB: far over every cache
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / min(seconds(lambda: b.copy_(a), device) for _ in range(8)) / 1e9


def random_boxes(count, extent, generator, smallest=8, largest=256):
    corner = torch.rand(count, 2, generator=generator) * (extent - smallest)
    size = smallest + torch.rand(count, 2, generator=generator) * (largest - smallest)
    return torch.cat([corner, (corner + size).clamp(max=extent)], dim=1)


# ---------------------------------------------------------------------------------------------------- ops

def benchmark_ops(table):
    tv = peer("torchvision")
    benchmark_nms(table, tv)
    benchmark_roi_align(table, tv)
    benchmark_paste_masks(table, tv)


def benchmark_nms(table, tv):
    device, generator = table.args.device, torch.Generator().manual_seed(0)
    for count in (1000, 5000, 20000):
        boxes, scores = random_boxes(count, 1024, generator).to(device), torch.rand(count, generator=generator).to(device)
        for iou in (0.5, 0.7):
            reference = (lambda: nms_reference(boxes, scores, None, iou)) if count <= 5000 else None
            table.add(f"nms {count} boxes, IoU {iou}", lambda: ops.nms(boxes, scores, iou),
                      {"reference": reference, "torchvision": tv and (lambda: tv.ops.nms(boxes, scores, iou))})
    for groups, each in ((5, 1000), (80, 12)):
        count = groups * each
        boxes, scores = random_boxes(count, 1024, generator).to(device), torch.rand(count, generator=generator).to(device)
        idxs = torch.arange(groups).repeat_interleave(each).to(device)
        table.add(f"batched_nms {groups} x {each}, IoU 0.7", lambda: ops.batched_nms(boxes, scores, idxs, 0.7),
                  {"torchvision": tv and (lambda: tv.ops.batched_nms(boxes, scores, idxs, 0.7))})


def forward_backward(function, inputs, grad):
    def run():
        for x in inputs:
            x.grad = None
        function().backward(grad)
    return run


def in_float32(function, device, dtype):
    """`function` of torchvision, which has no bfloat16 kernels: under autocast, as in training, it converts and computes in float32."""
    def run():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return function()
    return run


def benchmark_roi_align(table, tv):
    device, dtype, generator = table.args.device, DTYPES[table.args.dtype], torch.Generator().manual_seed(1)
    nchw = torch.randn(2, 256, 200, 200, generator=generator).to(device, dtype)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(512)[:, None], random_boxes(1024, 800, generator)], 1).to(device, dtype)
    for size in (7, 14):
        for ratio in (2, -1):
            arguments = (rois, size, 0.25, ratio)
            outputs = 1024 * 256 * size * size
            moved = (nchw.numel() + outputs) * nchw.element_size()
            name = f"roi_align (2,256,200,200) 1024 rois {size}x{size} sr {ratio if ratio > 0 else 'adaptive'}"
            level = torch.zeros(1024, dtype=torch.int64, device=device)
            reference = lambda: roi_align_reference([nhwc], rois, level, (size, size), [0.25], ratio, False)
            rivals = {"reference": reference if table.args.reference else None,
                      "torchvision": tv and in_float32(lambda: tv.ops.roi_align(nchw, *arguments), device, dtype)}
            table.add(name + " forward", lambda: ops.roi_align(nhwc, *arguments), rivals, moved)
            table.add(name + " forward, from NCHW", lambda: ops.roi_align(nchw, *arguments), rivals, moved)
            a, b = nhwc.detach().clone().requires_grad_(), nchw.detach().clone().requires_grad_()
            grad = torch.randn(1024, 256, size, size, generator=generator).to(device, dtype)
            grad_nhwc = grad.contiguous(memory_format=torch.channels_last)
            theirs = tv and forward_backward(in_float32(lambda: tv.ops.roi_align(b, *arguments), device, dtype), [b], grad)
            table.add(name + " forward+backward", forward_backward(lambda: ops.roi_align(a, *arguments), [a], grad_nhwc),
                      {"torchvision": theirs}, 2 * moved)
            table.add(name + " forward+backward, from NCHW", forward_backward(lambda: ops.roi_align(b, *arguments), [b], grad),
                      {"torchvision": theirs}, 2 * moved)
    benchmark_multiscale(table, tv, generator)


def benchmark_multiscale(table, tv, generator):
    """Four pyramid levels of a 1024x1024 picture, 1,000 RoIs: what the heads of Mask R-CNN call."""
    device, dtype = table.args.device, DTYPES[table.args.dtype]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    nchw = {str(i): torch.randn(1, 256, int(1024 * s), int(1024 * s), generator=generator).to(device, dtype) for i, s in enumerate(scales)}
    nhwc = [x.contiguous(memory_format=torch.channels_last) for x in nchw.values()]
    boxes = random_boxes(1000, 1024, generator, 8, 700).to(device, dtype)
    rois = torch.cat([boxes.new_zeros(1000, 1), boxes], 1)
    levels = (4 + torch.log2((boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 224 + 1e-6)).floor().clamp(2, 5).long() - 2
    for size in (7, 14):
        pooler = tv and tv.ops.MultiScaleRoIAlign(list(nchw), size, 2)
        table.add(f"multiscale_roi_align 4 levels, 1000 rois, {size}x{size} forward",
                  lambda: ops.multiscale_roi_align(nhwc, rois, levels, size, scales, 2),
                  {"torchvision": tv and in_float32(lambda: pooler(nchw, [boxes], [(1024, 1024)]), device, dtype)})
        ours = [x.detach().clone().requires_grad_() for x in nhwc]
        theirs = {k: x.detach().clone().requires_grad_() for k, x in nchw.items()}
        grad = torch.randn(1000, 256, size, size, generator=generator).to(device, dtype)
        grad_nhwc = grad.contiguous(memory_format=torch.channels_last)
        pooled = in_float32(lambda: pooler(theirs, [boxes], [(1024, 1024)]), device, dtype)
        table.add(f"multiscale_roi_align 4 levels, 1000 rois, {size}x{size} forward+backward",
                  forward_backward(lambda: ops.multiscale_roi_align(ours, rois, levels, size, scales, 2), ours, grad_nhwc),
                  {"torchvision": tv and forward_backward(pooled, theirs.values(), grad)})


def benchmark_paste_masks(table, tv):
    device, generator = table.args.device, torch.Generator().manual_seed(2)
    masks = torch.rand(100, 1, 28, 28, generator=generator).to(device)
    boxes = random_boxes(100, 1024, generator, 16, 400).to(device)
    theirs = None
    if tv:
        from torchvision.models.detection.roi_heads import paste_masks_in_image as theirs_paste
        theirs = lambda: theirs_paste(masks, boxes, (1024, 1024))
    size = (1024, 1024)
    table.add("paste_masks 100 masks 28x28 into 1024x1024, float", lambda: ops.paste_masks_in_image(masks, boxes, size),
              {"torchvision": theirs}, 100 * 1024 * 1024 * 4)
    thresholded = theirs and (lambda: theirs() > 0.5)
    table.add("paste_masks 100 masks, bool", lambda: ops.paste_masks_bool(masks, boxes, size), {"torchvision": thresholded},
              100 * 1024 * 1024)
    table.add("paste_masks 100 masks, RLE", lambda: ops.paste_masks_rle(masks, boxes, size), {"torchvision": thresholded},
              note="(the peer stops at bool)")


# ---------------------------------------------------------------------------------------------------- models

@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One row: what is run, on pictures of size x size."""

    name: str
    size: int
    training: bool
    batch: int
    device: str
    dtype: str                                                          # bfloat16, float16: under autocast

    def label(self):
        what = "training step" if self.training else "inference"
        return f"{self.name} {what} {self.size}x{self.size}, batch {self.batch}, {self.dtype}"


def build_detector(case, which):
    """Ours or torchvision's detector with weights of one seed; None where there is no such peer. 4 classes."""
    torch.manual_seed(0)
    ours = minidamage.build_model(case.name, num_classes=4, min_size=case.size, max_size=case.size)
    tv = peer("torchvision")
    if which == "ours":
        return ours.to(case.device).train(case.training)
    if tv is None or not hasattr(tv.models.detection, case.name):
        return None
    # Training: frozen as ours and as theirs with published weights; without weights they would learn their norms, which is more work.
    # Evaluation: the same numbers either way, and the framework's own norm is the faster.
    norm = tv.ops.FrozenBatchNorm2d if case.training else torch.nn.BatchNorm2d
    backbone = tv.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name=case.name.split("_")[1], weights=None,
                                                                      trainable_layers=5, norm_layer=norm)
    theirs = tv.models.detection.MaskRCNN(backbone, 4, min_size=case.size, max_size=case.size)
    theirs.load_state_dict(ours.state_dict())                           # the names are the same: both do the same work
    return theirs.to(case.device).train(case.training)


def detector_inputs(case):
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for _ in range(case.batch):
        images.append(torch.rand(3, case.size, case.size, generator=generator).to(case.device))
        boxes = random_boxes(8, case.size, generator, case.size / 16, case.size / 2)
        masks = torch.zeros(8, case.size, case.size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist()):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.arange(8) % 3 + 1, "masks": masks}
        targets.append({key: value.to(case.device) for key, value in target.items()})
    return images, targets


def model_call(case, which):
    """A callable of one forward pass or one training step; None where there is no such peer."""
    model = build_detector(case, which)
    if model is None:
        return None
    images, targets = detector_inputs(case)
    autocast = torch.autocast(case.device, DTYPES[case.dtype], enabled=case.dtype in ("bfloat16", "float16"))

    @torch.no_grad()
    def infer():
        with autocast:
            return model(images)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = sum(model(images, [dict(target) for target in targets]).values())
        loss.backward()
        optimizer.step()

    if not case.training:
        return infer
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
    return step


def benchmark_models(table):
    args = table.args
    sizes = ((512, False), (1024, False), (512, True)) + (((1024, True),) if args.device == "cuda" else ())
    for name in ("maskrcnn_resnet50_fpn", "damagenet"):
        for size, training in sizes:
            case = ModelCase(name, size, training, args.batch, args.device, args.dtype)
            if args.only and not any(word in case.label() for word in args.only):
                continue
            table.add(case.label(), model_call(case, "ours"), {"torchvision": model_call(case, "torchvision")})
            row = table.rows[-1]
            for which in ("ours", "torchvision"):
                if which == "ours" or "torchvision" in row:
                    row[f"peak_MB_{which}"] = peak_memory(case, which)
            table.keep()
            print(" " * 58, "peak MB", {k[8:]: round(v) for k, v in row.items() if k.startswith("peak_MB")}, flush=True)


def peak_memory(case, which):
    """Peak memory of two calls in a process of its own: resident set on a CPU (the imports included), allocator on a GPU. MB.

    VmHWM and not getrusage: Linux hands a parent's largest resident set on to a child that it starts.
    """
    code = (f"import benchmark, re, torch; torch.set_num_threads({torch.get_num_threads()}); "
            f"call = benchmark.model_call(benchmark.{case!r}, {which!r}); call(); call(); "
            f"print(torch.cuda.max_memory_allocated() / 1e6 if {case.device!r} == 'cuda' else "
            "int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1e3)")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


# ---------------------------------------------------------------------------------------------------- COCO evaluation

def generated_coco(images, detections, classes, seed=0):
    """Truth and detections in COCO's JSON: 7 objects a picture, detections jittered from them or of another class, masks are ellipses."""
    from minidamage import masks as rle
    rng = np.random.default_rng(seed)
    height, width = 480, 640
    y, x = np.mgrid[:height, :width]

    def shape(box):
        cx, cy, w, h = box[0] + box[2] / 2, box[1] + box[3] / 2, box[2], box[3]
        x1, x2, y1, y2 = (int(v) for v in (max(0, box[0]), min(width, box[0] + w + 1), max(0, box[1]), min(height, box[1] + h + 1)))
        mask = np.zeros((height, width), np.uint8)
        mask[y1:y2, x1:x2] = ((x[y1:y2, x1:x2] + 0.5 - cx) / (w / 2)) ** 2 + ((y[y1:y2, x1:x2] + 0.5 - cy) / (h / 2)) ** 2 <= 1
        return rle.encode(mask)

    truth, found = [], []
    for image in range(1, images + 1):
        size = np.exp(rng.uniform(np.log(12), np.log(250), (7, 2)))
        boxes = np.concatenate([rng.uniform(0, 1, (7, 2)) * ([width, height] - np.minimum(size, 240)), np.minimum(size, 240)], 1).round(1)
        labels = rng.integers(1, classes + 1, 7)
        for box, label in zip(boxes, labels):
            segment = shape(box)
            truth.append({"id": len(truth) + 1, "image_id": image, "category_id": int(label), "bbox": box.tolist(), "iscrowd": 0,
                          "area": float(rle.area([segment])[0]),
                          "segmentation": {"size": segment["size"], "counts": segment["counts"].decode()}})
        source = rng.integers(0, 7, detections)
        jitter = boxes[source] + rng.normal(0, 0.15, (detections, 4)) * boxes[source][:, [2, 3, 2, 3]]
        jitter[:, 2:] = np.maximum(jitter[:, 2:], 4)
        jitter[:, :2] = np.clip(jitter[:, :2], 0, [width - 8, height - 8])
        for k in range(detections):
            label = labels[source[k]] if rng.random() < 0.6 else rng.integers(1, classes + 1)
            segment = shape(jitter[k])
            found.append({"image_id": image, "category_id": int(label), "bbox": jitter[k].round(1).tolist(),
                          "score": float(rng.random()),
                          "segmentation": {"size": segment["size"], "counts": segment["counts"].decode()}})
    gt = {"images": [{"id": i, "height": height, "width": width} for i in range(1, images + 1)],
          "categories": [{"id": k, "name": f"class{k}"} for k in range(1, classes + 1)], "annotations": truth}
    return gt, found


def benchmark_eval(table):
    """evaluate + accumulate on loaded data, as users wait for it; loading the JSON is outside on all sides."""
    from minidamage.metrics import detection
    images, detections = table.args.eval_images, 100
    gt, dt = generated_coco(images, detections, 80)
    for classes in (80, 3):
        for each in (*gt["annotations"], *dt):
            each["category_id"] = (each["category_id"] - 1) % classes + 1
        gt["categories"] = gt["categories"][:classes]
        for iou_type in ("bbox", "segm"):
            prepared = detection.load_coco(gt, dt, iou_type)
            rivals = {"pycocotools": cocoeval(peer("pycocotools.coco"), peer("pycocotools.cocoeval"), "COCOeval", gt, dt, iou_type),
                      "faster-coco-eval": cocoeval(peer("faster_coco_eval"), peer("faster_coco_eval"), "COCOeval_faster", gt, dt, iou_type)}
            table.add(f"COCO {iou_type}, {images} pictures x {detections} detections, {classes} classes",
                      lambda: prepared.evaluate(), rivals)


def cocoeval(coco_module, eval_module, class_name, gt, dt, iou_type):
    """A callable that evaluates with a peer on data it has loaded, or None where it is not installed."""
    if coco_module is None or eval_module is None:
        return None
    other = "segmentation" if iou_type == "bbox" else "bbox"
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "gt.json")
        path.write_text(json.dumps(gt))
        coco = coco_module.COCO(str(path))
        results = coco.loadRes([{key: value for key, value in found.items() if key != other} for found in dt])

    def run():
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = getattr(eval_module, class_name)(coco, results, iou_type)
            evaluation.evaluate()
            evaluation.accumulate()
        return evaluation
    return run


# ---------------------------------------------------------------------------------------------------- input pipeline

def benchmark_data(table):
    """Decode + augment + masks of one picture on one core, in images/s: what the training step has to be fed with."""
    from minidamage.data import DetectionDataset, load_dataset, synthetic
    from minidamage.models.damagenet import RECIPE
    with tempfile.TemporaryDirectory() as folder:
        path = table.args.data_path or synthetic.make_demo(Path(folder, "demo"), images=32, size=640)
        parts = load_dataset(path).parts
        records = next(iter(parts.values()))[:32]
        for name, recipe, train in (("decode + masks", None, False), ("decode + augment + masks", RECIPE, True)):
            dataset = DetectionDataset(records, recipe=recipe, train=train)
            label = f"data: {name}, {len(records)} pictures {records[0].width}x{records[0].height}"
            table.add(label, lambda: [dataset[i] for i in range(len(records))], {})
            if table.rows and table.rows[-1]["name"] == label:
                table.rows[-1]["images/s"] = 1e3 * len(records) / table.rows[-1]["ours"]
                print(" " * 58, f"{table.rows[-1]['images/s']:.0f} images/s a core")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("ops", "models", "eval", "data"):
        parser.add_argument(f"--{part}", action="store_true", help=f"time the {part} (default: all four)")
    parser.add_argument("--only", nargs="*", metavar="WORD", help="only rows whose name holds one of these words")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the ops and models run")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of roi_align's input; of the models' autocast")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step of the models")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--reference", action="store_true", help="time the slow reference of roi_align as well")
    parser.add_argument("--eval-images", type=int, default=2000, help="pictures in the generated COCO set")
    parser.add_argument("--data-path", help="data set for --data (default: drawn pictures, 640x640)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows, the machine and the versions to FILE")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"benchmark.py: --device cuda: this machine has no GPU that torch {torch.__version__} can use; leave --device out, or "
                 "install a CUDA build of torch (pytorch.org)")
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table(args)
    parts = {"ops": benchmark_ops, "models": benchmark_models, "eval": benchmark_eval, "data": benchmark_data}
    for part in [part for part in parts if getattr(args, part)] or parts:
        parts[part](table)
    if not table.rows:
        sys.exit(f"benchmark.py: --only {' '.join(args.only)}: no row's name holds that; run without --only to see the names")
    if args.json:
        print(f"wrote {args.json}")


def write_json(args, table):
    versions = {name: getattr(module, "__version__", "?") for name in ("torch", "torchvision", "numpy", "faster_coco_eval")
                if (module := peer(name))}
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), **environment(args.device), "peers": versions,
                                  "copy_GB/s": table.bandwidth, "rows": table.rows}, indent=1))
    beside.replace(path)


if __name__ == "__main__":
    main()
