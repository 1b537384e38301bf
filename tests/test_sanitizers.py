"""ASan and UBSan over all kernels, CPU and emulated CUDA, as stand-alone programs (tests/sanitize*.cpp): no Python to preload."""
import os
import subprocess

import pytest
from oracle import DATA

from minidamage.ops import _extension, _toolchain

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


PROGRAMS = {"sanitize": "kernels under sanitizers (tests)", "sanitize_fuzz": "random cases under sanitizers (tests)"}


@pytest.fixture(scope="session", name="compiler")
def compiler_fixture():
    return sanitizing_compiler()


def sanitizing_compiler():
    """g++ or clang++ with the sanitizers' runtime, which some distributions package apart."""
    probe = subprocess.run([*_toolchain.cxx(), *SANITIZE, "-x", "c++", "-", "-o", os.devnull], input="int main() {}", capture_output=True,
                           text=True)
    if probe.returncode and "san" in probe.stderr:
        pytest.skip("the compiler has no sanitizer runtime (libasan, libubsan)")
    return [*_toolchain.cxx(), *SANITIZE, "-O0", "-g1", "-fno-omit-frame-pointer", "-std=c++17", "-ffp-contract=off",
            "-Wno-unknown-pragmas"]


def build_all():
    """What the suite compiles, in the order in which its tests ask; conftest.py runs it beside them."""
    _extension.build_ops()
    _extension.build_evaluation()
    _extension.build_emulated()
    for name in PROGRAMS:
        kernels_under_sanitizers(sanitizing_compiler(), name)


def kernels_under_sanitizers(compiler, name):
    """Builds tests/<name>.cpp with all kernels, CPU and emulated CUDA; returns its path. The programs share the kernels' objects."""
    csrc, emulated = _extension.CSRC, ["-DMINIDAMAGE_EMULATED"]
    native = _toolchain.native_flags()                                       # the vectors that the kernels really have
    objects = [(source, [*compiler, *native]) for source in sorted((csrc / "cpu").glob("*.cpp"))]
    objects += [(source, [*compiler, *emulated, "-x", "c++"]) for source in sorted((csrc / "cuda").glob("*.cu"))]
    objects += [(DATA.parent / f"{name}.cpp", [*compiler, *emulated, "-I", str(csrc)])]
    return _extension._build_library(name, objects, [*_toolchain.cxx(), *SANITIZE], PROGRAMS[name])


def expect_clean(program):
    options = {"ASAN_OPTIONS": "detect_stack_use_after_return=0:strict_init_order=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    run = subprocess.run([program], capture_output=True, text=True, timeout=300, env={**os.environ, **options})
    assert run.returncode == 0 and run.stdout.strip() == "clean", run.stdout + run.stderr


def test_all_kernels_are_clean(compiler):
    expect_clean(kernels_under_sanitizers(compiler, "sanitize"))


def test_ten_thousand_random_cases_are_clean(compiler):
    expect_clean(kernels_under_sanitizers(compiler, "sanitize_fuzz"))


@pytest.mark.parametrize("body, words", [
    ("MD_DYNAMIC_SHARED(int, x); x[threadIdx.x + 1] = 1; __syncthreads();", "heap-buffer-overflow"),
    ("int own[4]; int* volatile x = own; __syncthreads(); for (int i = 0; i <= 4; i++) x[i] = 1;", "stack-buffer-overflow")],
    ids=["shared memory", "its own array"])
def test_the_sanitizers_would_see_it(compiler, tmp_path, body, words):
    """A kernel that writes one element past its dynamic shared memory, or past an array of its own after a barrier, ends the program."""
    source = tmp_path / "overrun.cpp"
    source.write_text(f'#include "common.h"\n__global__ void overrun() {{ {body} }}\n'
                      "int main() { MD_LAUNCH(overrun, 1, 32, 32 * sizeof(int), nullptr); }\n")
    program = tmp_path / "overrun"
    subprocess.run([*compiler, "-DMINIDAMAGE_EMULATED", "-I", str(_extension.CSRC), str(source), "-o", str(program)], check=True)
    run = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert run.returncode and words in run.stderr


def test_masks_and_matching_are_clean(compiler):
    """Run lengths, polygons, components and COCO matching (no Tensor, no Python) on random and broken input."""
    objects = [(DATA.parent / "sanitize_masks.cpp", [*compiler, "-I", str(_extension.CSRC)])]
    link = [*_toolchain.cxx(), *SANITIZE, "-pthread"]
    program = _extension._build_library("sanitize_masks", objects, link, "masks under sanitizers (tests)")
    run = subprocess.run([program], capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "4"})
    assert run.returncode == 0 and run.stdout.strip() == "ok", run.stdout + run.stderr
