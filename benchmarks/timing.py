"""How a row of the benchmark is measured: callables in turn, the roofline of the same run, peak memory."""
import dataclasses
import gc
import importlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from minidamage.run_folder import command_line, environment

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
PEERS = ("torchvision", "segmentation_models_pytorch", "pycocotools", "faster_coco_eval")
TURN = 0.005                                                            # seconds: on a GPU, of one side's calls in a row
ROOT = Path(__file__).resolve().parents[1]


def peer(name):
    """The peer module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def seconds(function, device, calls=1):
    """Wall time of one call, of so many in a row; on a GPU with the queue drained before and after them."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def paired(ours, others, device, budget=6.0, least=5, most=60):
    """Runs ours and every other in turn until the budget (seconds) is spent; on a GPU, a turn of short calls is several in a row, as a
    training queues them, so that what is timed is the work and not the wait for its end.

    Returns {"ours": ms, name: {"ms", "ratio", "ratio_min", "ratio_max"}, "pairs": n}; a ratio is other / ours: 2 is twice as fast as it.
    """
    everyone = {"ours": ours, **others}
    once = sum(seconds(function, device) for function in everyone.values())     # warm-up: build, allocator, threads
    least = 3 if once > budget else least                               # slow peers: COCO evaluation in Python takes half a minute
    turn = {name: 1 for name in everyone}
    if device == "cuda":
        turn = {name: min(100, 1 + int(TURN / seconds(function, device))) for name, function in everyone.items()}
    times = {name: [] for name in everyone}
    start = time.perf_counter()
    while len(times["ours"]) < least or (time.perf_counter() - start < budget and len(times["ours"]) < most):
        for name, function in everyone.items():
            times[name].append(seconds(function, device, turn[name]))
    result = {"ours": 1e3 * statistics.median(times["ours"]), "pairs": len(times["ours"])}
    for name in others:
        ratios = [b / a for a, b in zip(times["ours"], times[name])]
        result[name] = {"ms": 1e3 * statistics.median(times[name]), "ratio": statistics.median(ratios),
                        "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return result


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What this machine can do, measured in the same run."""

    bandwidth: float                                                    # GB/s of a large copy, bytes read plus bytes written
    product: float                                                      # GFLOP/s in the run's dtype: a large matmul or convolution

    @classmethod
    def measure(cls, device, dtype):
        a = torch.rand(64 << 20, device=device)                         # 256 MiB: far over every cache
        b = torch.empty_like(a)
        copy = min(seconds(lambda: b.copy_(a), device) for _ in range(8))
        n = 8192 if device == "cuda" else 2048
        x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rates = [2 * n ** 3 / min(seconds(lambda: x @ y, device) for _ in range(5))]
        picture = torch.randn(8, 512, 64, 64, device=device).to(dtype).to(memory_format=torch.channels_last)
        weight = torch.randn(512, 512, 3, 3, device=device).to(dtype).to(memory_format=torch.channels_last)
        # some CPUs multiply faster in their convolution library than in their matrix library: the faster one is what can be done
        rates.append(2 * 9 * 512 * picture.numel()
                     / min(seconds(lambda: torch.conv2d(picture, weight, padding=1), device) for _ in range(5)))
        return cls(2 * a.numel() * 4 / copy / 1e9, max(rates) / 1e9)

    def share(self, ms, moved, flops):
        """Of the time that the least bytes, or the operations, whichever takes longer here, would need at full speed."""
        return max(moved / self.bandwidth, flops / self.product) / 1e6 / ms


class Table:
    """Collects rows, prints each as it comes, and keeps them for --json."""

    def __init__(self, args):
        self.args, self.rows = args, []
        self.roofline = Roofline.measure(args.device, DTYPES[args.dtype])
        print(f"copy bandwidth {self.roofline.bandwidth:.1f} GB/s (read + write), products {self.roofline.product:.0f} GFLOP/s, "
              f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}")

    def wants(self, name):
        """Whether --only asks for a row of this name."""
        return not self.args.only or any(word in name for word in self.args.only)

    def against(self, name):
        """Whether --against asks for this other side: all peers as a rule, the slow references only by name."""
        wanted = self.args.against
        if "peer" in wanted and name != "reference":
            return True
        return name in wanted

    def add(self, name, ours, others, moved=0, flops=0, note=""):
        """Times one row and returns it (None where it is not wanted).

        others: {name: callable or None}; moved: the least bytes that must move (each input read once, each output written once);
        flops: twice the multiply-adds of the plain algorithm.
        """
        if not self.wants(name):
            return None
        others = {other: function for other, function in others.items() if function and self.against(other)}
        row = {"name": name, "note": note, **paired(ours, others, self.args.device, self.args.budget)}
        if moved:
            row["bytes"], row["GB/s"] = moved, moved / row["ours"] / 1e6
        if flops:
            row["flops"], row["GFLOP/s"] = flops, flops / row["ours"] / 1e6
        if moved or flops:
            row["share_of_roofline"] = self.roofline.share(row["ours"], moved, flops)
        self.rows.append(row)
        self.show(row, others, note)
        self.keep()
        return row

    def show(self, row, others, note):
        cells = [f"{row['name']:64s} {row['ours']:10.3f} ms"]
        for other in others:
            r = row[other]
            cells.append(f"{other} {r['ms']:.3f} ms = {r['ratio']:.2f}x [{r['ratio_min']:.2f}, {r['ratio_max']:.2f}]")
        cells += [f"{row[unit]:.1f} {unit}" for unit in ("GB/s", "GFLOP/s") if unit in row]
        if "share_of_roofline" in row:
            cells.append(f"{100 * row['share_of_roofline']:.0f}% of the roofline")
        print("  ".join([*cells, note] if note else cells), flush=True)

    def add_memory(self, row, what, **calls):
        """Puts the peak memory of each side into a row. calls: {side: "module:function(arguments)"}, the text of a call that returns the
        callable to measure; see peak_memory. what: "peak" (the whole process) or "extra" (above what lay there before the call)."""
        if row is None:
            return
        for side, call in calls.items():
            if side == "ours" or side in row:
                row[f"{what}_MB_{side}"] = peak_memory(call, self.args.device, extra=what == "extra")
        self.keep()
        print(" " * 64, f"{what} MB", {key.split("_MB_")[1]: round(value, 1) for key, value in row.items() if key.startswith(f"{what}_MB")},
              flush=True)

    def keep(self):
        """Writes the rows so far to --json: a run that is stopped has not been for nothing."""
        if not self.args.json:
            return
        versions = {name: getattr(module, "__version__", "?") for name in ("torch", *PEERS) if (module := peer(name))}
        path = Path(self.args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps({"command": command_line(), **environment(self.args.device), "peers": versions,
                                      "copy_GB/s": self.roofline.bandwidth,
                                      "product_GFLOP/s": self.roofline.product, "rows": self.rows}, indent=1))
        beside.replace(path)


def peak_memory(call, device, extra=False):
    """MB of two calls of what `call` builds ("benchmarks.op_rows:deform_call(1, 2)").

    On a GPU the allocator's figure, above what lay there before it was built; on a CPU the resident set of a process of its own (imports
    included). extra: what one call takes above what lay there before it, its inputs and warm-up included.
    """
    module, _, expression = call.partition(":")
    if device == "cuda":
        return gpu_memory(eval(f"lambda rows: rows.{expression}"), importlib.import_module(module), extra)
    return resident_memory(module, expression, extra)


def gpu_memory(build, module, extra):
    gc.collect()
    torch.cuda.empty_cache()                                            # a block that is kept for later may be larger than what it is for
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call = build(module)
    call()                                                              # extra: kernels built and loaded, workspaces allocated
    if extra:
        getattr(call, "clear", lambda: None)()                          # the gradients are results: they count
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def resident_memory(module, expression, extra):
    """VmHWM and not getrusage: Linux hands a parent's largest resident set on to its children."""
    code = f"""
import ctypes, re, torch, {module} as rows
torch.set_num_threads({torch.get_num_threads()})
call, extra = rows.{expression}, {extra}
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
before = 0
call()                                                                  # extra: kernels built and loaded, threads started
if extra:
    getattr(call, "clear", lambda: None)()                              # the gradients are results: they count
    ctypes.CDLL(None).malloc_trim(0)                                    # what the allocator keeps for later is not in use
    open("/proc/self/clear_refs", "w").write("5"); before = status("VmRSS")
call()
print(status("VmHWM") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def forward_backward(function, inputs, grad):
    """A callable of one forward and one backward pass; gradients start empty each time."""
    inputs = list(inputs)

    def clear():
        for x in inputs:
            x.grad = None

    def run():
        clear()
        function().backward(grad)
    run.clear = clear
    return run
