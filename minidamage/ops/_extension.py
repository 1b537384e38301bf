"""Builds and loads the kernels of csrc/, once, at the first op call; explains itself when it cannot. Importing builds nothing.

    MINIDAMAGE_KERNELS=auto      build; on failure warn once (what failed, what runs instead, what to type) and run the references
    MINIDAMAGE_KERNELS=require   build; on failure raise
    MINIDAMAGE_KERNELS=off       the readable PyTorch references, no compiler needed

Reading order: `define` (how an op meets its kernel), `load`, `_build_library`; the tools are found in _toolchain.py. Every
product of the compiler is one file whose name ends in a hash of all that went into it (source, headers, flags, compiler, torch,
processor), written beside and renamed: a product that exists is whole, a killed build leaves nothing in the way. The lock is the
operating system's (flock), so it dies with its process. Also respected: CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS,
TORCH_EXTENSIONS_DIR.
"""
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings

import torch

from . import _toolchain as tools
from ._toolchain import BuildError

MODES = ("auto", "require", "off")
_HERE = pathlib.Path(__file__).resolve()
CSRC = next((folder for folder in (_HERE.parents[1] / "csrc", _HERE.parents[2] / "csrc") if (folder / "common.h").exists()),
            _HERE.parents[2] / "csrc")

_LIBRARY = torch.library.Library("minidamage", "FRAGMENT")
_SCHEMAS = {}                                   # op name -> schema string
_loading = threading.RLock()
_results = {}                                   # "ops" | "evaluation" | "emulated" -> what load* returned
_reasons = {}                                   # "ops" | "evaluation" | "cuda" -> why there is none, for the doctor


# ---- how an op meets its kernel ------------------------------------------------------------------------------------------


def define(schema, reference):
    """Declares the op `minidamage::<schema>`; its first call builds the kernels, and `reference` runs wherever there is none.

    schema: "nms(Tensor boxes, ...) -> Tensor". reference: function of the same arguments, positional.
    The reference is registered for every device; the compiled library registers CPU and CUDA above it, so from then on
    PyTorch's dispatcher reaches the kernel directly. Returns the op, ready for register_fake and register_autograd.
    """
    name = schema.split("(")[0]
    _SCHEMAS[name] = schema
    _LIBRARY.define(schema)
    op = getattr(torch.ops.minidamage, name).default

    def without_kernel(*args):
        device = _device_of(args)
        key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
        if load() and key and torch._C._dispatch_has_kernel_for_dispatch_key(f"minidamage::{name}", key):
            return op(*args)                    # this very call built the kernels
        _announce_reference(device, kernels_mode())
        with torch.autocast(device, enabled=False) if key else contextlib.nullcontext():
            return reference(*args)             # the public function has settled the dtypes, as for the kernel

    _LIBRARY.impl(name, without_kernel, "CompositeExplicitAutograd")
    return op


def library():
    """The torch.library.Library that owns the ops: pass as `lib=` to register_fake and register_autograd."""
    return _LIBRARY


def _device_of(args):
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device.type
    return "cpu"


@functools.cache
def _announce_reference(device, mode):
    """Says once per device and mode that the references run there; the CPU's own failure was announced by load()."""
    if device == "cpu" or mode == "off" or device in (load() or ()):    # the last: an op that has no kernel for it
        return
    reason = f"no CUDA kernels: {_reasons.get('cuda', 'nothing was built')}" if device == "cuda" else f"no kernels for {device}"
    if mode == "require" and device == "cuda":
        raise BuildError(f"MINIDAMAGE_KERNELS=require, but there are {reason}")
    warnings.warn(f"minidamage: there are {reason}. The slower PyTorch references run on {device}; "
                  "`python -m minidamage.ops` shows what is missing.", stacklevel=4)


# ---- public: load, load_evaluation, load_emulated, backend ---------------------------------------------------------------


def kernels_mode():
    """MINIDAMAGE_KERNELS: "auto" (the default), "require" or "off"; raises ValueError for anything else."""
    mode = os.environ.get("MINIDAMAGE_KERNELS", "") or "auto"
    if mode not in MODES:
        raise ValueError(f"MINIDAMAGE_KERNELS={mode!r}: expected one of {', '.join(MODES)}")
    return mode


def load():
    """Builds (where needed) and loads the op kernels. Returns the devices served, ("cpu",) or ("cpu", "cuda"), or None."""
    return _once("ops", _load_ops)


def load_evaluation():
    """Builds and loads csrc/evaluation.cpp. Returns the Python module, or None where the numpy references must run."""
    return _once("evaluation", _load_evaluation)


def load_emulated():
    """For tests: builds the .cu files for the CPU (cuda_on_cpu.h) and loads them as torch.ops.minidamage_emulated.<op>."""
    with _loading:
        if "emulated" not in _results:
            if not _SCHEMAS:
                raise RuntimeError("load_emulated: import minidamage.ops first, the schemas are declared there")
            definitions = torch.library.Library("minidamage_emulated", "DEF")
            for schema in _SCHEMAS.values():
                definitions.define(schema)
            torch.ops.load_library(str(build_emulated()))
            _results["emulated"] = definitions
    return torch.ops.minidamage_emulated


def backend():
    """What runs, for the log of a run: "cuda+cpu", "cpu" or "reference". Builds the kernels if no op has been called yet."""
    devices = load()
    return "reference" if not devices else "cuda+cpu" if "cuda" in devices else "cpu"


def reason(part):
    """Why `part` ("ops", "evaluation", "cuda") is not there; "" where it is, or was not tried."""
    return _reasons.get(part, "")


def _once(part, loader):
    if kernels_mode() == "off":
        _reasons.setdefault(part, "MINIDAMAGE_KERNELS=off")
        return None
    with _loading:
        if part not in _results or (_results[part] is None and kernels_mode() == "require"):
            try:
                _results[part] = loader()
                _reasons.pop(part, None)
            except (BuildError, OSError, ImportError, RuntimeError) as error:
                _reasons[part] = str(error)
                _results[part] = None
                what = "evaluation functions" if part == "evaluation" else "kernels"
                if kernels_mode() == "require":
                    raise BuildError(f"MINIDAMAGE_KERNELS=require, but the {what} did not build: {error}") from error
                warnings.warn(f"minidamage: the compiled {what} are not available: {error}\n  The slower "
                              f"{'numpy' if part == 'evaluation' else 'PyTorch'} references run instead. Try `python -m minidamage.ops` "
                              "to see what is missing; MINIDAMAGE_KERNELS=off silences this.", stacklevel=3)
        return _results[part]


def _load_ops():
    path, devices = build_ops()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        if "cuda" not in devices:
            raise
        _reasons["cuda"] = f"they were built, but do not load: {error}"
        path, devices = _build_ops(None)
        torch.ops.load_library(str(path))
    return devices


def _load_evaluation():
    path = build_evaluation()
    spec = importlib.util.spec_from_file_location("minidamage.evaluation", path)   # PYBIND11_MODULE(evaluation, m)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- the three libraries -------------------------------------------------------------------------------------------------


def build_ops():
    """Returns (path of the torch library, the devices that it serves). What ails the CUDA half leaves the CPU's kernels alone."""
    try:
        built = _build_ops(tools.cuda_toolkit())
        _reasons.pop("cuda", None)
        return built
    except BuildError as error:
        _reasons["cuda"] = str(error)
    return _build_ops(None)


def _build_ops(cuda):
    """cuda: the toolkit, or None for the CPU alone."""
    compiler, native = tools.cxx(), tools.native_flags()
    include = ["-I", str(CSRC)] + (["-I" + str(cuda["include"]), "-DMINIDAMAGE_CUDA"] if cuda else [])
    bindings = [*compiler, *tools.OPTIMISE_BINDINGS, *tools.torch_flags(), *tools.openmp_flags()[0], *include]
    objects = [(CSRC / "bindings.cpp", bindings)]                            # first: it takes longest
    objects += [(source, [*compiler, "-std=c++17", *tools.OPTIMISE, *native]) for source in sorted((CSRC / "cpu").glob("*.cpp"))]
    link = [*compiler, "-shared", *tools.torch_libraries(), *tools.openmp_flags()[1]]
    if cuda:
        objects += [(source, tools.nvcc_command(cuda)) for source in sorted((CSRC / "cuda").glob("*.cu"))]
        link += ["-lc10_cuda", "-ltorch_cuda", *[f"-L{folder}" for folder in cuda["libraries"]], "-lcudart"]
    path = _build_library("minidamage_ops", objects, link, "CPU and CUDA kernels" if cuda else "CPU kernels")
    return path, ("cpu", "cuda") if cuda else ("cpu",)


def build_evaluation():
    """Returns the path of the pybind11 module of csrc/evaluation.cpp."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed; `python -m pip install pybind11`") from None
    flags = ["-std=c++17", *tools.OPTIMISE, *tools.native_flags(), f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = [(CSRC / "evaluation.cpp", [*tools.cxx(), *flags])]
    link = [*tools.cxx(), "-shared", "-pthread", *tools.loaded_library(r"stdc\+\+"), *tools.undefined_symbols()]
    return _build_library("evaluation", objects, link, "evaluation functions")


def build_emulated():
    """Returns the path of the torch library in which the .cu files run on the CPU (csrc/cuda_on_cpu.h)."""
    flags = ["-O1", "-fPIC", "-ffp-contract=off", "-DMINIDAMAGE_EMULATED", "-Wall", "-Wno-unknown-pragmas"]
    bindings = [*tools.cxx(), *flags, *tools.torch_flags(), *tools.openmp_flags()[0], "-I", str(CSRC)]
    objects = [(CSRC / "bindings.cpp", bindings)]
    objects += [(source, [*tools.cxx(), "-std=c++17", *flags, "-x", "c++"]) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    link = [*tools.cxx(), "-shared", *tools.torch_libraries(), *tools.openmp_flags()[1]]
    return _build_library("minidamage_emulated", objects, link, "CUDA kernels for the CPU (tests)")


def _build_library(name, objects, link, what):
    """Compiles what is not in the cache yet, in parallel, links, and returns the library's path.

    objects: list of (source, command without source and output). link: command without objects and output.
    """
    products = []                                                            # (command, source, file name of the object)
    for source, command in objects:
        if not source.exists():
            raise BuildError(f"{source} is missing: this installation is not complete")
        text = b"".join(path.name.encode() + path.read_bytes() for path in sorted(_included(source, set())))
        products.append((command, source, f"{source.stem}-{_key(text, command)}.o"))
    library_name = f"{name}-{_key(' '.join(product for _, _, product in products).encode(), link)}.so"
    for folder in _cache_folders():
        if os.path.exists(folder / library_name):                            # False, not an error, in a folder that may not be entered
            with contextlib.suppress(OSError):
                os.utime(folder / library_name)                              # in use: _locked deletes what nobody has asked for in a month
            return folder / library_name
    folder = build_folder()
    with _locked(folder):
        if (folder / library_name).exists():                                 # another process built it while we waited
            return folder / library_name
        missing = [product for product in products if not (folder / product[2]).exists()]
        number = f"{len(missing)} file{'s' * (len(missing) != 1)}"
        with _progress(f"minidamage: building the {what} ({number}, once) in {folder} ..."):
            with concurrent.futures.ThreadPoolExecutor(tools.jobs()) as pool:
                for future in [pool.submit(_produce, [*command, "-c", str(source)], folder / product, source.name)
                               for command, source, product in missing]:
                    future.result()
            inputs = [str(folder / product) for _, _, product in products]
            _produce([*link[:1], *inputs, *link[1:]] if len(link) > 1 else [*link, *inputs], folder / library_name, "linking")
    return folder / library_name


def _included(source, found):
    """A source file and our own files that it includes, directly or not."""
    found.add(source)
    for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE):
        beside = (source.parent / name).resolve()
        file = beside if beside.exists() else CSRC / name                    # as the compiler looks: beside the source, then -I csrc
        if file.exists() and file not in found:
            _included(file, found)
    return found


def _produce(command, path, what):
    """Runs the compiler with its output beside `path`, then renames: a file under its final name is always whole."""
    partial = path.with_name(f"{path.name}.partial-{os.uname().nodename}-{os.getpid()}")
    run = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if run.returncode:
        log = path.with_name(f"{path.name}.log")
        log.write_text(f"{shlex.join(command)}\n\n{run.stdout}{run.stderr}")
        partial.unlink(missing_ok=True)
        lines = (run.stderr + run.stdout).strip().splitlines()
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else f"exit status {run.returncode}")
        raise BuildError(f"{what} failed: {first.strip()} (whole output: {log})")
    os.replace(partial, path)


def _key(content, command):
    """20 hex digits over everything that decides a product. The command has paths of this machine in it, and should."""
    parts = [content, " ".join(command).encode(), tools.version_of(command[0]).encode(), torch.__version__.encode(),
             str(torch.version.git_version).encode(), sys.version.encode()]
    if any(flag.endswith("=native") for flag in command):
        parts.append(tools.cpu_features().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


# ---- where things are kept -----------------------------------------------------------------------------------------------


def _cache_folders():
    """Where products may lie, the preferred one first: TORCH_EXTENSIONS_DIR, else the user's cache; then a temporary one."""
    folders = []
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        folders.append(pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "minidamage")
    else:
        with contextlib.suppress(RuntimeError):                              # no home directory
            folders.append(pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "minidamage")
    owner = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    folders.append(pathlib.Path(tempfile.gettempdir()) / f"minidamage-{owner}")
    return [folder for folder in folders[:-1]] + [folder for folder in folders[-1:] if _is_ours(folder)]


def _is_ours(folder):
    """A folder in the shared temporary directory is trusted only if it is this user's alone (or does not exist yet)."""
    try:
        status = folder.lstat()
    except OSError:
        return True
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not folder.is_symlink() and not status.st_mode & 0o022)


def build_folder():
    """The first cache folder that can be written to; says so on stderr where that is not the preferred one."""
    problem = "no cache folder"
    for rank, folder in enumerate(_cache_folders()):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = f"cannot write to {folder} ({error.strerror or error})"
            continue
        if rank:
            print(f"minidamage: {problem}; the kernels go to {folder}", file=sys.stderr)
        return folder
    raise BuildError(f"{problem}; set TORCH_EXTENSIONS_DIR to a folder that can be written to")


@contextlib.contextmanager
def _locked(folder):
    """One builder at a time in a folder. Without file locks (some network disks) two may build: renaming keeps that safe."""
    import fcntl
    with open(folder / "lock", "w") as lock:
        locked = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"minidamage: waiting for another process that builds in {folder} ...", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            locked = False
        if locked:
            # What killed builds left, and sources that are long gone. Another machine's unfinished file may be alive: not every network
            # disk shows its lock here.
            own = f"-{os.uname().nodename}-"
            for pattern, seconds in (("*.partial*", 3600), ("*.o", 30 * 86400), ("*.so", 30 * 86400)):
                for path in folder.glob(pattern):
                    with contextlib.suppress(FileNotFoundError):             # it was renamed meanwhile
                        if time.time() - path.stat().st_mtime > seconds or ".partial" in path.name and own in path.name:
                            path.unlink()
        yield


@contextlib.contextmanager
def _progress(message):
    print(message, end="", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        yield
    except BaseException:
        print(" failed", file=sys.stderr, flush=True)
        raise
    print(f" {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
