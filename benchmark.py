"""Times every op, whole models, COCO evaluation and the input pipeline: ours, our reference, and a peer where one is importable.

    python benchmark.py                      everything, on the CPU with the threads torch has
    python benchmark.py --ops --device cuda  the ops on a GPU
    python benchmark.py --ops --only nms --against torchvision reference --json results/benchmark.json

How it is measured (benchmarks/timing.py). Callables run in turn, A B A B ..., in one process; the table holds each side's median and
the median of the ratios pair by pair with their smallest and largest: a ratio of 2 means that ours is twice as fast. Peers are
torchvision (ops, detectors), segmentation_models_pytorch (segmenters), pycocotools and faster-coco-eval (COCO evaluation): installed
beside minidamage in an environment of their own, never needed by it. "stock" is the same mathematics from the framework's own
parts, "reference" our readable one. The share of the roofline is the time that the least bytes, or the plain algorithm's operations,
would need at the copy bandwidth and the rate of large products in the same run.
"""
import argparse
import sys

import torch

from benchmarks.data_rows import benchmark_data
from benchmarks.evaluation_rows import benchmark_eval
from benchmarks.model_rows import benchmark_models
from benchmarks.op_rows import benchmark_ops
from benchmarks.timing import DTYPES, PEERS, Table, peer
from minidamage.command_line import Parser

SIDES = ("peer", "torchvision", "smp", "pycocotools", "faster-coco-eval", "stock", "cheap-order", "full-attention", "conv2d", "conv2d NCHW",
         "plain", "contiguous", "bfloat16", "fast", "reference", "none")
MODULES = {"smp": "segmentation_models_pytorch", "faster-coco-eval": "faster_coco_eval"}


def main():
    args = parse_arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"benchmark.py: --device cuda: this machine has no GPU that torch {torch.__version__} can use; leave --device out, or "
                 "install a CUDA build of torch (pytorch.org)")
    for side in args.against:
        module = MODULES.get(side, side)
        if module in PEERS and peer(module) is None:
            sys.exit(f"benchmark.py: --against {side}: {module} is not installed here; pip install it beside minidamage, in an environment "
                     "of its own, or choose another side")
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


def parse_arguments():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("ops", "models", "eval", "data"):
        parser.add_argument(f"--{part}", action="store_true", help=f"time the {part} (default: all four)")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only rows whose name holds one of these words")
    parser.add_argument("--against", nargs="+", default=["peer"], choices=SIDES, metavar="SIDE",
                        help="who runs beside ours: peer (all there are; the default), reference, none, or names of single sides: "
                        + ", ".join(SIDES[1:-2]))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the ops and models run")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES), help="of the ops' inputs; of the models' autocast")
    parser.add_argument("--batch", type=int, default=1, help="pictures a step of the models")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch's default)")
    parser.add_argument("--budget", type=float, default=6.0, help="seconds a row, all its sides together (at least 5 pairs, slow ones 3)")
    parser.add_argument("--eval-images", type=int, default=2000, help="pictures in the generated COCO set")
    parser.add_argument("--data-path", help="data set for --data (default: drawn pictures, 640x640)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows, the machine and the versions to FILE, after every row")
    return parser.parse_args()


if __name__ == "__main__":
    main()
