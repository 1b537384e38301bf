"""Where nvcc is, no GPU needed: every .cu compiles for sm_80 and sm_90 without a warning and can start; the CUDA half of bindings
compiles too."""
import concurrent.futures
import os
import re
import subprocess

import pytest
import torch

from minidamage.ops import _extension, _toolchain

SOURCES = sorted((_extension.CSRC / "cuda").glob("*.cu"))
BINDINGS = _extension.CSRC / "bindings.cpp"
REGISTERS = 65536                                                            # of a block, sm_80 and sm_90
THREADS = {"nms_reduce": 1024, "roi_align_backward_tiles": 512, "attention_add_bias": 1024}   # the kernels that start with more than 256


@pytest.fixture(scope="module")
def toolkit():
    try:
        return _toolchain.find_nvcc()
    except _toolchain.BuildError as error:
        pytest.skip(f"nvcc is absent: {error}")


@pytest.fixture(scope="module")
def compiled(toolkit, tmp_path_factory):
    """{source: the compiler's run}: all of them at once, as many side by side as there are processors."""
    folder = tmp_path_factory.mktemp("nvcc")
    commands = {**{source: kernel_command(toolkit, source, folder) for source in SOURCES},
                BINDINGS: bindings_command(toolkit, BINDINGS, folder)}
    run = lambda command: subprocess.run(command, capture_output=True, text=True, timeout=600)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(commands, pool.map(run, commands.values())))


def kernel_command(toolkit, source, folder):
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")
        return [*_toolchain.nvcc_command(toolkit), "-Werror", "all-warnings", "-Xcompiler", "-Wall", "-Xptxas", "-v",
                "-c", str(source), "-o", str(folder / f"{source.stem}.o")]


def bindings_command(toolkit, source, folder):
    """A CPU-only torch ships the CUDA headers but not the macro file of libc10_cuda: one stub stands for it. Nothing is linked."""
    stub = folder / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True, exist_ok=True)
    stub.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS 1\n")
    shipped = os.path.join(os.path.dirname(torch.__file__), "include", "c10", "cuda", "impl", "cuda_cmake_macros.h")
    stubs = [] if os.path.exists(shipped) else ["-I", str(folder)]
    return [*_toolchain.cxx(), "-fsyntax-only", "-DMINIDAMAGE_CUDA", "-Wall", "-Werror", *stubs, *_toolchain.torch_flags(),
            *_toolchain.openmp_flags()[0], "-isystem", toolkit["include"], "-I", str(_extension.CSRC), str(source)]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_kernel_compiles_without_a_warning(compiled, source):
    run = compiled[source]
    assert run.returncode == 0, run.stderr
    kernels = re.findall(r"Compiling entry function '(\w+)' for 'sm_\d+'.*?Used (\d+) registers", run.stderr, re.DOTALL)
    assert kernels, run.stderr
    for kernel, registers in kernels:                                        # with too many, the launch fails: only a GPU would tell
        threads = next((count for name, count in THREADS.items() if name in kernel), 256)
        assert -(-int(registers) // 8) * 8 * threads <= REGISTERS, f"{kernel}: {registers} registers a thread, {threads} threads"


def test_cuda_half_of_the_bindings_compiles(compiled):
    assert compiled[BINDINGS].returncode == 0, compiled[BINDINGS].stderr
