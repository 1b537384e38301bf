"""Builds and loads the kernels of csrc/, once, at the first op call; explains itself when it cannot. Importing builds nothing.

    MINIDAMAGE_KERNELS=auto      build; on failure warn once (what failed, what runs instead, what to type) and run the references
    MINIDAMAGE_KERNELS=require   build; on failure raise
    MINIDAMAGE_KERNELS=off       the readable PyTorch references, no compiler needed

Reading order: `define` (how an op meets its kernel), `load`, `_build_library`, then the tools. Every product of the compiler is one
file whose name ends in a hash of all that went into it (source, headers, flags, compiler, torch, processor), written beside
and renamed: a product that exists is whole, a killed build leaves nothing in the way. The lock is the operating system's
(flock), so it dies with its process. Also respected: CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, TORCH_EXTENSIONS_DIR.
"""
import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.util
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import warnings

import torch

MODES = ("auto", "require", "off")
_HERE = pathlib.Path(__file__).resolve()
CSRC = next((folder for folder in (_HERE.parents[1] / "csrc", _HERE.parents[2] / "csrc") if (folder / "common.h").exists()),
            _HERE.parents[2] / "csrc")
# -ffp-contract=off: sums and products are rounded as they are written, the same on every processor and in the references.
OPTIMISE = ["-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]

_LIBRARY = torch.library.Library("minidamage", "FRAGMENT")
_SCHEMAS = {}                                   # op name -> schema string
_loading = threading.RLock()
_results = {}                                   # "ops" | "evaluation" | "emulated" -> what load* returned
_reasons = {}                                   # "ops" | "evaluation" | "cuda" -> why there is none, for the doctor


class BuildError(RuntimeError):
    """A kernel library could not be built; the message says what failed and what to do."""


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
        _announce_reference(device)
        return reference(*args)

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
def _announce_reference(device):
    """Says once per device that the reference runs; the CPU's own failure was announced by load()."""
    if device == "cpu" or kernels_mode() == "off":
        return
    reason = _reasons.get("cuda", "no kernels were built") if device == "cuda" else f"there are no kernels for {device}"
    if kernels_mode() == "require" and device == "cuda":
        raise BuildError(f"MINIDAMAGE_KERNELS=require, but there are no CUDA kernels: {reason}")
    warnings.warn(f"minidamage: {reason}; the slower PyTorch references run on {device}. "
                  "`python -m minidamage.ops` shows the details.", stacklevel=4)


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
    """Returns (path of the torch library, the devices that it serves)."""
    compiler, native = cxx(), native_flags()
    cuda = None
    try:
        cuda = cuda_toolkit()
        _reasons.pop("cuda", None)
    except BuildError as error:
        _reasons["cuda"] = str(error)
    include = ["-I", str(CSRC)] + (["-I" + str(cuda["include"]), "-DMINIDAMAGE_CUDA"] if cuda else [])
    objects = [(CSRC / "bindings.cpp", [*compiler, *OPTIMISE, *torch_flags(), *openmp_flags()[0], *include])]
    objects += [(source, [*compiler, "-std=c++17", *OPTIMISE, *native]) for source in sorted((CSRC / "cpu").glob("*.cpp"))]
    link = [*compiler, "-shared", *torch_libraries(), *openmp_flags()[1]]
    if cuda:
        objects += [(source, nvcc_command(cuda)) for source in sorted((CSRC / "cuda").glob("*.cu"))]
        link += ["-lc10_cuda", "-ltorch_cuda", *[f"-L{folder}" for folder in cuda["libraries"]], "-lcudart"]
    path = _build_library("minidamage_ops", objects, link, "CPU and CUDA kernels" if cuda else "CPU kernels")
    return path, ("cpu", "cuda") if cuda else ("cpu",)


def build_evaluation():
    """Returns the path of the pybind11 module of csrc/evaluation.cpp."""
    try:
        import pybind11
    except ImportError:
        raise BuildError("pybind11 is not installed; `python -m pip install pybind11`") from None
    flags = ["-std=c++17", *OPTIMISE, *native_flags(), f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    objects = [(CSRC / "evaluation.cpp", [*cxx(), *flags])]
    return _build_library("evaluation", objects, [*cxx(), "-shared", "-pthread", *_undefined_symbols()], "evaluation functions")


def build_emulated():
    """Returns the path of the torch library in which the .cu files run on the CPU (csrc/cuda_on_cpu.h)."""
    flags = ["-O2", "-fPIC", "-ffp-contract=off", "-DMINIDAMAGE_EMULATED", "-Wall", "-Wno-unknown-pragmas"]
    objects = [(CSRC / "bindings.cpp", [*cxx(), *flags, *torch_flags(), *openmp_flags()[0], "-I", str(CSRC)])]
    objects += [(source, [*cxx(), "-std=c++17", *flags, "-x", "c++"]) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    return _build_library("minidamage_emulated", objects, [*cxx(), "-shared", *torch_libraries(), *openmp_flags()[1]],
                          "CUDA kernels for the CPU (tests)")


def _build_library(name, objects, link, what):
    """Compiles what is not in the cache yet, in parallel, links, and returns the library's path.

    objects: list of (source, command without source and output). link: command without objects and output.
    """
    headers = b"".join(header.name.encode() + header.read_bytes() for header in sorted(CSRC.glob("*.h")))
    products = []                                                            # (command, source, file name of the object)
    for source, command in objects:
        text = source.read_bytes() + headers
        products.append((command, source, f"{source.stem}-{_key(text, command)}.o"))
    library_name = f"{name}-{_key(' '.join(product for _, _, product in products).encode(), link)}.so"
    for folder in _cache_folders():
        if (folder / library_name).exists():
            return folder / library_name
    folder = build_folder()
    with _locked(folder):
        if (folder / library_name).exists():                                 # another process built it while we waited
            return folder / library_name
        missing = [product for product in products if not (folder / product[2]).exists()]
        with _progress(f"minidamage: building the {what} ({len(missing)} files, once) in {folder} ..."):
            with concurrent.futures.ThreadPoolExecutor(_jobs()) as pool:
                for future in [pool.submit(_produce, [*command, "-c", str(source)], folder / product, source.name)
                               for command, source, product in missing]:
                    future.result()
            inputs = [str(folder / product) for _, _, product in products]
            _produce([*link[:1], *inputs, *link[1:]] if len(link) > 1 else [*link, *inputs], folder / library_name, "linking")
    return folder / library_name


def _produce(command, path, what):
    """Runs the compiler with its output beside `path`, then renames: a file under its final name is always whole."""
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
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
    parts = [content, " ".join(command).encode(), _version_of(command[0]).encode(), torch.__version__.encode(),
             str(torch.version.git_version).encode(), sys.version.encode()]
    if any(flag.endswith("=native") for flag in command):
        parts.append(cpu_features().encode())
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
            for leftover in folder.glob("*.partial*"):                       # of a build that was killed
                leftover.unlink(missing_ok=True)
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


def _jobs():
    jobs = os.environ.get("MAX_JOBS", "")
    return int(jobs) if jobs.isdigit() and int(jobs) else os.cpu_count() or 1


# ---- the tools -----------------------------------------------------------------------------------------------------------


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
def _version_of(program):
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


def _undefined_symbols():
    return ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []


def torch_libraries():
    return [f"-L{pathlib.Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", *_undefined_symbols()]


@functools.cache
def openmp_flags():
    """(compile, link) flags that run at::parallel_for on PyTorch's own OpenMP runtime: a second one would fight over the cores."""
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/self/maps").read_text().splitlines():
            path = line.split()[-1]
            if re.search(r"/lib(gomp|omp|iomp5)[^/]*\.so", path):
                return ["-fopenmp"], [path]
    return [], []


@functools.cache
def cuda_toolkit():
    """{"nvcc", "include", "libraries", "version"}; raises BuildError with the reason why there are no CUDA kernels."""
    if not torch.version.cuda:
        raise BuildError(f"torch {torch.__version__} was built without CUDA" +
                         (" (ROCm is not supported)" if torch.version.hip else ""))
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
    release = re.search(r"release (\d+\.\d+)", _version_of(nvcc))
    if not release or not folders.get("INCLUDES"):
        raise BuildError(f"{nvcc} does not answer like nvcc: {(dry.strip().splitlines() or ['no output'])[0]}")
    return {"nvcc": nvcc, "include": folders["INCLUDES"][0], "libraries": folders.get("LIBRARIES", []), "version": release.group(1)}


def nvcc_command(toolkit):
    return [toolkit["nvcc"], "-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xcompiler", "-fvisibility=hidden", *arch_flags()]


def arch_flags():
    """-gencode flags: TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), else the GPUs that are here, else 8.0 and 9.0 with PTX for newer ones."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if text:
        archs = re.split(r"[;,\s]+", text.strip())
    elif torch.cuda.is_available():
        archs = sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
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
