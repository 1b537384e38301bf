"""The tools that a build needs, found and asked: C++ compiler, processor, torch, OpenMP, nvcc. See _extension.py for the build.

Respects CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS. Everything that is missing is a BuildError that says what to type.
"""
import contextlib
import functools
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys

import torch

# -ffp-contract=off: sums and products are rounded as they are written, the same on every processor and in the references; the
# multiply-adds of gemm.h alone are fused, where the processor has them.
OPTIMISE = ["-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
# bindings.cpp, the longest to compile, checks and launches and does no arithmetic: 25 s of a core where -O3 takes 33, a call as quick
OPTIMISE_BINDINGS = ["-O1", *OPTIMISE[1:]]


class BuildError(RuntimeError):
    """A kernel library could not be built; the message says what failed and what to do."""


def cxx():
    """The C++ compiler as a command: $CXX, else g++, c++ or clang++. Raises BuildError naming what to install."""
    if os.environ.get("CXX"):
        command = shlex.split(os.environ["CXX"])
        if not command or not shutil.which(command[0]):
            raise BuildError(f"CXX={os.environ['CXX']!r} is not a program; unset CXX, or set it to a C++17 compiler such as g++")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name):
            return [name]
    raise BuildError("no C++ compiler (g++, c++, clang++) on PATH; `apt install g++`, or set CXX")


@functools.cache
def version_of(program):
    try:
        run = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:
        raise BuildError(f"{program} cannot be run: {error.strerror or error}") from None
    return f"{shutil.which(program)} {run.stdout}"


def native_flags():
    return {"x86_64": ["-march=native"], "amd64": ["-march=native"], "aarch64": ["-mcpu=native"]}.get(platform.machine().lower(), [])


@functools.cache
def cpu_features():
    """The processor's feature string: a library built with -march=native must not meet another processor (shared home folders)."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line.split(":", 1)[1].strip()
    return platform.machine() + platform.processor()


def torch_flags():
    include = pathlib.Path(torch.__file__).parent / "include"
    # c++20: the standard that recent torch headers are written in. -isystem: their warnings are not ours.
    return ["-std=c++20", "-isystem", str(include), f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]


def undefined_symbols():
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []


def torch_libraries():
    """The C++ library that torch runs with comes first: a compiler set up to link its own statically (-static-libstdc++) would give ours a
    second copy, and an error message that begins in one and ends in the other is lost, or a crash."""
    return [*loaded_library(r"stdc\+\+"), f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", *undefined_symbols()]


@functools.cache
def loaded_library(names):
    """[path] of the library of this name (a regular expression: "gomp|omp") that this process runs with, [] where that is not known.
    Of several, torch's own: another package may have brought one of the same name."""
    found = []
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
            path = line.split(maxsplit=5)[-1]                                # the sixth field, which may hold spaces
            if re.search(rf"/lib({names})[^/]*\.so", path) and not path.endswith(" (deleted)"):
                found.append(path)
    return sorted(found, key=lambda path: not path.startswith(f"{pathlib.Path(torch.__file__).parent}{os.sep}"))[:1]


def openmp_flags():
    """(compile, link) flags that run at::parallel_for on PyTorch's own OpenMP runtime: a second one would fight over the cores."""
    library = loaded_library("gomp|omp|iomp5")
    if any("libgomp" in path for path in library) and "clang" in version_of(cxx()[0]).lower():
        return [], []                                                        # clang's threads need a runtime of another name: one thread
    return ["-fopenmp"] * len(library), library


@functools.cache
def cuda_toolkit():
    """{"nvcc", "include", "libraries", "version"}; raises BuildError with the reason why there are no CUDA kernels."""
    if not torch.version.cuda:
        raise BuildError(f"torch {torch.__version__} was built without CUDA" +
                         (" (ROCm is not supported)" if torch.version.hip else ""))
    if torch.cuda._is_in_bad_fork():
        raise BuildError("this process was forked from one that uses the GPU; start it with multiprocessing's \"spawn\"")
    if not torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        raise BuildError("torch sees no GPU; to build for a GPU elsewhere, set TORCH_CUDA_ARCH_LIST, for example \"8.0;9.0\"")
    toolkit = find_nvcc()
    if toolkit["version"].split(".")[0] != torch.version.cuda.split(".")[0]:
        raise BuildError(f"nvcc is CUDA {toolkit['version']}, torch was built with CUDA {torch.version.cuda}; "
                         f"install the CUDA {torch.version.cuda} toolkit and set CUDA_HOME to it")
    return toolkit


def find_nvcc():
    """Asks nvcc itself where its headers and libraries are: a wrapper in /usr/local/bin says nothing by its own path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin")) if home else shutil.which("nvcc")
    if not nvcc and not home and os.path.exists("/usr/local/cuda/bin/nvcc"):
        nvcc = "/usr/local/cuda/bin/nvcc"
    if not nvcc:
        raise BuildError(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "no nvcc on PATH; install the CUDA toolkit, or set CUDA_HOME")
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, errors="replace",
                         stdin=subprocess.DEVNULL).stderr
    folders = {line.split("=")[0][3:]: re.findall(r'"-[IL]([^"]+)"', line) for line in dry.splitlines() if line.startswith("#$ ")}
    release = re.search(r"release (\d+\.\d+)", version_of(nvcc))
    if not release or not folders.get("INCLUDES"):
        raise BuildError(f"{nvcc} does not answer like nvcc: {(dry.strip().splitlines() or ['no output'])[0]}")
    return {"nvcc": nvcc, "include": folders["INCLUDES"][0], "libraries": folders.get("LIBRARIES", []), "version": release.group(1)}


def nvcc_command(toolkit):
    """nvcc with the flags of every .cu file; $CXX is its host compiler too (nvcc refuses a default g++ newer than it knows)."""
    host = ["-ccbin", [word for word in cxx() if not word.startswith("-")][-1]] if os.environ.get("CXX") else []   # of "ccache g++": g++
    return [toolkit["nvcc"], *host, "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden",
            *arch_flags(toolkit["nvcc"])]


def arch_flags(nvcc):
    """-gencode flags: TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else the GPUs that are here, else 8.0 and 9.0 with PTX for newer ones."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if text:
        archs = re.split(r"[;,\s]+", text.strip())
    elif torch.cuda.is_available():
        archs = sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
        if len(archs) > 1:                                                   # an old card beside the one that is meant
            known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout.split()
            archs = [arch for arch in archs if f"compute_{arch.replace('.', '')}" in known] or archs
    else:
        archs = ["8.0", "9.0+PTX"]
    flags = []
    for arch in archs:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", arch)
        if not match:
            raise BuildError(f"TORCH_CUDA_ARCH_LIST={text!r}: expected numbers such as \"8.0;9.0+PTX\", got {arch!r}")
        number = match[1] + match[2]
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        if match[3]:
            flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def jobs():
    """Compilers at a time: MAX_JOBS, else the number of cores."""
    text = os.environ.get("MAX_JOBS", "")
    return int(text) if text.isdigit() and int(text) else os.cpu_count() or 1
