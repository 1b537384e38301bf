"""Where nvcc is, no GPU needed: every .cu compiles for sm_80 and sm_90 without a warning and can start; the CUDA half of bindings
compiles too."""
import os
import re
import subprocess

import pytest
import torch

from minidamage.ops import _extension, _toolchain

SOURCES = sorted((_extension.CSRC / "cuda").glob("*.cu"))
BINDINGS = sorted((_extension.CSRC / "bindings").glob("*.cpp"))
REGISTERS = 65536                                                            # of a block, sm_80 and sm_90
THREADS = {"nms_reduce": 1024, "roi_align_backward_tiles": 512}              # the kernels that start with more than 256


@pytest.fixture(scope="module")
def toolkit():
    try:
        return _toolchain.find_nvcc()
    except _toolchain.BuildError as error:
        pytest.skip(f"nvcc is absent: {error}")


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_kernel_compiles_without_a_warning(toolkit, source, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
    command = [*_toolchain.nvcc_command(toolkit), "-Werror", "all-warnings", "-Xcompiler", "-Wall", "-Xptxas", "-v",
               "-c", str(source), "-o", str(tmp_path / "kernel.o")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_\d+'.*?Used (\d+) registers", run.stderr, re.DOTALL)
    assert kernels, run.stderr
    for kernel, registers in kernels:                                        # with too many, the launch fails: only a GPU would tell
        threads = next((count for name, count in THREADS.items() if name in kernel), 256)
        assert -(-int(registers) // 8) * 8 * threads <= REGISTERS, f"{kernel}: {registers} registers a thread, {threads} threads"


@pytest.mark.parametrize("source", BINDINGS, ids=lambda path: path.name)
def test_cuda_half_of_the_bindings_compiles(toolkit, source, tmp_path):
    """A CPU-only torch ships the CUDA headers but not the macro file of libc10_cuda: one stub stands for it. Nothing is linked."""
    stub = tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS 1\n")
    shipped = os.path.join(os.path.dirname(torch.__file__), "include", "c10", "cuda", "impl", "cuda_cmake_macros.h")
    stubs = [] if os.path.exists(shipped) else ["-I", str(tmp_path)]
    command = [*_toolchain.cxx(), "-fsyntax-only", "-DMINIDAMAGE_CUDA", "-Wall", "-Werror", *stubs, *_toolchain.torch_flags(),
               *_toolchain.openmp_flags()[0], "-isystem", toolkit["include"], "-I", str(_extension.CSRC),
               str(source)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
