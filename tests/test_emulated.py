"""The emulator itself (csrc/cuda_on_cpu.h): right kernels give right results, wrong ones are caught and named."""
import subprocess

import pytest
import torch
from oracle import DATA

from minidamage.ops import _extension, _toolchain
import minidamage.ops                                                        # noqa: F401  (declares the ops)


@pytest.fixture(scope="session")
def cases():
    flags = ["-std=c++17", "-O1", "-g", "-DMINIDAMAGE_EMULATED", "-Wno-unknown-pragmas", "-I", str(_extension.CSRC)]
    program = _extension._build_library("emulator_cases", [(DATA.parent / "emulator_cases.cpp", [*_toolchain.cxx(), *flags])],
                                        _toolchain.cxx(), "emulator's test kernels")
    return lambda *names: subprocess.run([program, *names], capture_output=True, text=True, check=True, timeout=60).stdout


def test_shuffles_shared_memory_and_atomics(cases):
    assert int(cases("sum")) == sum(i % 7 for i in range(200 * 256))
    assert cases("reverse") == "right\n" and cases("early_exit") == "41 41\n"
    odd, half, any_, all_, third, before, counts = cases("ballots").split()
    assert (odd, half, any_, all_) == ("aaaaaaaa", "7", "1", "1")
    assert (third, before, counts) == ("100", "11", "510")                   # lane 10's value, lane 11's, 5 threads / some / not every


def test_tiles_are_multiplied(cases):
    assert cases("tiles") == "right\n"


def test_half_types_round_to_nearest_even(cases):
    first, second = cases("halves").splitlines()
    assert first.split() == ["0", "7bff", "7c00", "3c00", "0", "8001"]
    assert second.split() == ["3f80", "3f82", "7f80"]


@pytest.mark.parametrize("case, words", [
    ("no_barrier", ["wrong"]),
    ("uninitialised", ["nan"]),
    ("divergent_barrier", ["error: emulated kernel divergent_barrier", "__syncthreads at line 48", "__syncthreads at line 49"]),
    ("missing_lane", ["divergent barrier or deadlock", "thread (5,0,0) waits in __syncthreads", "__shfl_sync"]),
    ("two_sums", ["divergent barrier or deadlock", "waits in __shfl_xor_sync at line 56", "waits in __shfl_xor_sync at line 57"]),
    ("foreign_mask", ["the calling lane is not in the mask"]),
    ("dead_lane", ["reads lane 3, which is not there"]),
    ("too_many_threads", ["a block of 1025 threads"]),
    ("tiles_no_barrier", ["wrong"]),
    ("tiles_off", ["load_matrix_sync at line", "rows 24 elements apart, or a tile off the 32 bytes"]),
    ("tile_of_some_lanes", ["divergent barrier or deadlock", "load_matrix_sync", "__syncwarp"]),
])
def test_bugs_are_caught(cases, case, words):
    answer = cases(case)
    for word in words:
        assert word in answer
    assert cases(case, "sum").splitlines()[-1] == cases("sum").strip()       # and the next launch is unharmed


def test_every_op_has_a_cuda_kernel():
    _extension.load_emulated()
    missing = [name for name in _extension._SCHEMAS
               if not torch._C._dispatch_has_kernel_for_dispatch_key(f"minidamage_emulated::{name}", "CPU")]
    assert not missing, f"no CUDA kernel in csrc/bindings for {missing}"


def test_errors_reach_python():
    with pytest.raises(RuntimeError, match="boxes must be"):
        torch.ops.minidamage_emulated.nms(torch.zeros(3, 5), torch.zeros(3), None, 0.5)
