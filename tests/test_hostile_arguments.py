"""The ops called directly, past the public functions' checks, with arguments that are wrong: every call raises or answers, none crashes.

Each op's small example (of the doctor, minidamage/ops/__main__.py) with one argument at a time exchanged: tensors of another shape, dtype,
device or none of their numbers, sizes negative or huge, lists too short, too long or empty. In a process of its own, because a crash would
take the suite with it. The kernels behind the bindings are fuzzed in sanitize_fuzz.cpp.
"""
import os
import subprocess
import sys

import minidamage.ops
from minidamage.ops import _extension

CHILD = """
import sys
import torch
from minidamage.ops import _extension
from minidamage.ops.__main__ import examples

def wrong(value):
    if isinstance(value, torch.Tensor):
        yield from (value[None], value.flatten(), value.to("meta"), value.to(torch.complex64), value.to(torch.int8), value.bool(),
                    value.double() if value.dtype != torch.float64 else value.float(), value.half(), torch.full_like(value, -7),
                    torch.empty(0), None, 3)
        if value.dim():
            yield from (value[:0], value[..., :0], value[:1], value[..., :-1], value.expand(3, *value.shape))
        if value.is_floating_point():
            yield torch.full_like(value, float("nan"))
            yield torch.full_like(value, 1e30)
        else:
            yield torch.full_like(value, 2 ** 31 - 1 if value.dtype == torch.int32 else 2 ** 62) if value.dtype != torch.bool else ~value
    elif isinstance(value, bool):
        yield None
    elif isinstance(value, int):
        yield from (-1, 0, -2 ** 62, 2 ** 62, 2 ** 40, None, "text")
    elif isinstance(value, float):
        yield from (float("nan"), -1e30, 1e30, None)
    elif isinstance(value, (list, tuple)):
        yield from ([], list(value) * 2, list(value) * 9, list(value)[:-1], None)
        for i, part in enumerate(value):
            for other in wrong(part):
                yield [*value[:i], other, *value[i + 1:]]

def smaller(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(smaller, value))
    if isinstance(value, torch.Tensor):
        return value[tuple(slice({1024: 24, 64: 16, 16: 6}.get(size, size)) for size in value.shape)].clone()
    return value

raised = answered = 0
_extension.load_emulated()
for name, (_, args) in examples().items():
    for namespace in (torch.ops.minidamage, torch.ops.minidamage_emulated):
        op = getattr(namespace, name)
        if namespace is not torch.ops.minidamage and ("deform" in name or "attention" in name):
            args = smaller(args)                        # the emulator is slow
        op(*args)
        for i, value in enumerate(args):
            for other in wrong(value):
                print(name, namespace.name if hasattr(namespace, "name") else "", i, type(other).__name__, file=sys.stderr, flush=True)
                try:
                    op(*args[:i], other, *args[i + 1:])
                    answered += 1
                except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError, MemoryError):
                    raised += 1
print(raised, answered)

# What no exchange of one argument makes: no channels of very many pictures, and more bins than a launch has blocks.
rois, levels = torch.tensor([[0, 1, 1, 9, 9.]]), torch.zeros(1, dtype=torch.int64)
for namespace in (torch.ops.minidamage, torch.ops.minidamage_emulated):
    empty = torch.zeros(1, 0, 7, 7)
    assert namespace.multiscale_roi_align_backward(empty, rois, levels, 2 ** 40, [8], [8], [1.], 2, False, False)[0].numel() == 0
    for call in (lambda: namespace.multiscale_roi_align([torch.zeros(1, 1, 8, 8)], rois, levels, [2, 2], [1.], 257, False),
                 lambda: namespace.multiscale_roi_align_backward(empty + 1, rois, levels, 1, [8], [8], [1.], 2 ** 40, False, False)):
        try:
            call()
        except ValueError as error:
            assert "sampling_ratio must be at most 256" in str(error), error
        else:
            assert False, "a sampling ratio without a limit"
many = torch.zeros(1, 1, 8, 8), rois.expand(2 ** 31, 5), levels.expand(2 ** 31)
try:
    torch.ops.minidamage_emulated.multiscale_roi_align([many[0]], *many[1:], [1, 1], [1.], 2, False)
    assert False, "a grid of 2^31 blocks"
except ValueError as error:
    assert "blocks of work" in str(error), error
"""


def test_wrong_arguments_raise_and_never_crash():
    environment = {**os.environ, "PYTHONPATH": str(_extension.CSRC.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, env=environment)
    assert run.returncode == 0, f"exit status {run.returncode} after: {run.stderr[-600:]}"
    raised, answered = map(int, run.stdout.split())
    assert raised > 300 and raised > answered, (raised, answered)
