"""The loader: three modes, broken tools, killed builds, two processes at once, a read-only cache. Each case is a process of its
own with a cache of its own; a stand-in compiler that copies the library built before keeps a case below a few seconds."""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch

from minidamage.ops import _extension, _toolchain

ROOT = pathlib.Path(__file__).parents[1]
KEEP_ONE = """
import torch
from minidamage import ops
boxes = torch.tensor([[0, 0, 10, 10.], [0, 0, 10, 9.]])
print("kept", ops.nms(boxes, torch.tensor([.9, .8]), 0.5).tolist())
from minidamage.ops import _extension, _toolchain
print("backend", _extension.backend())
"""


@pytest.fixture
def place(processes, tmp_path):
    """Environment of a fresh user: an empty cache, and a compiler that takes `DELAY` seconds and writes a line per call to `log`."""
    built, _ = _extension.build_ops()
    compiler = tmp_path / "stand-in-compiler"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *--version*) echo stand-in 1.0; exit;; esac
echo "$*" >> {tmp_path}/log
echo half > "$(echo "$*" | sed 's/.* -o //')"
sleep ${{DELAY:-0}}
case "$*" in *-shared*) cp {built} "$(echo "$*" | sed 's/.* -o //')";; esac
""")
    compiler.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MINIDAMAGE", "TORCH", "XDG", "CUDA"))}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), "CXX": str(compiler), "PYTHONPATH": str(ROOT), "CUDA_HOME": "/nowhere",
                    "TMPDIR": str(tmp_path), "PYTHONWARNINGS": "always", "OMP_NUM_THREADS": "1"}
    processes.environment = environment
    return processes


class Processes:
    """Starts processes that have imported minidamage.ops and nothing more: one that has imports, then forks, so a case takes no second."""

    FORKS = """
import json, os, sys, tempfile
import minidamage.ops
for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
    try:
        exec(request["code"], {})
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        self.server = subprocess.Popen([sys.executable, "-c", self.FORKS], cwd="/", text=True, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE,
                                       env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "always", "OMP_NUM_THREADS": "1"})

    def ask(self, **request):
        print(json.dumps(request), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def run(self, code=KEEP_ONE, without=(), **changes):
        """(exit status, standard output, standard error) of a process with these changes to the environment of `place`."""
        return self.finish(self.start(code, without, **changes))

    def start(self, code=KEEP_ONE, without=(), **changes):
        """Returns a handle for finish()."""
        self.count += 1
        environment = {name: value for name, value in (self.environment | changes).items() if name not in without}
        files = {name: str(self.folder / f"{self.count}.{name}") for name in ("out", "err")}
        return self.ask(code=code, environment=environment, **files), files

    def finish(self, handle):
        """(exit status, standard output, standard error)"""
        pid, files = handle
        status = self.ask(wait=pid)
        return status, *(pathlib.Path(files[name]).read_text() for name in ("out", "err"))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    processes = Processes(tmp_path_factory.mktemp("processes"))
    yield processes
    processes.server.stdin.close()
    processes.server.wait()


def compilations(tmp_path):
    return (tmp_path / "log").read_text().splitlines() if (tmp_path / "log").exists() else []


def test_importing_builds_and_prints_nothing(place, tmp_path):
    run = subprocess.run([sys.executable, "-c", "import minidamage, minidamage.ops"], env=place.environment, cwd="/", text=True,
                         capture_output=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "") and not (tmp_path / "cache").exists() and not compilations(tmp_path)


def test_first_call_builds_once_in_one_line(place, tmp_path):
    code, out, err = place.run()
    assert code == 0 and out == "kept [0]\nbackend cpu\n"
    assert re.fullmatch(r"minidamage: building the CPU kernels \(\d+ files, once\) in \S+/cache/minidamage \.\.\. \d+ s\n", err)
    calls = len(compilations(tmp_path))
    assert place.run() == (0, out, "") and len(compilations(tmp_path)) == calls


def test_off_needs_no_compiler_and_says_nothing(place, tmp_path):
    code, out, err = place.run(MINIDAMAGE_KERNELS="off", CXX="/nowhere/g++")
    assert (code, out, err) == (0, "kept [0]\nbackend reference\n", "") and not compilations(tmp_path)


def test_no_compiler(place, tmp_path):
    empty = {"without": ["CXX"], "PATH": str(tmp_path)}
    code, out, err = place.run(**empty)
    assert code == 0 and out == "kept [0]\nbackend reference\n"
    assert err.count("UserWarning") == 1 and "no C++ compiler" in err and "apt install g++" in err and "references run instead" in err
    code, out, err = place.run(**empty, MINIDAMAGE_KERNELS="require")
    assert code and "MINIDAMAGE_KERNELS=require" in err and "no C++ compiler" in err


def test_broken_compiler_shows_its_first_error(place, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\ncase \"$*\" in *--version*) echo broken 1.0; exit;; esac\n"
                      "echo 'In file included' >&2; echo 'x.h:1:1: fatal error: omp.h: No such file' >&2; exit 1\n")
    broken.chmod(0o755)
    code, out, err = place.run(CXX=str(broken))
    assert code == 0 and "kept [0]" in out and err.count("UserWarning") == 1
    assert "fatal error: omp.h: No such file" in err and "python -m minidamage.ops" in err and "MINIDAMAGE_KERNELS=off" in err
    log = re.search(r"whole output: (\S+\.log)", err)[1]
    assert "In file included" in pathlib.Path(log).read_text()
    code, out, err = place.run(CXX=str(broken), MINIDAMAGE_KERNELS="require")
    assert code and "BuildError" in err and "omp.h" in err
    assert place.run(MINIDAMAGE_KERNELS="require")[0] == 0           # repaired: the failure was not remembered


def test_wrong_settings_are_named(place):
    code, _, err = place.run(MINIDAMAGE_KERNELS="always")
    assert code and "expected one of auto, require, off" in err
    code, _, err = place.run(CXX="/nowhere/g++")
    assert code == 0 and "CXX='/nowhere/g++' is not a program" in err


def test_a_killed_build_leaves_nothing_in_the_way(place, tmp_path):
    process = place.start(DELAY="30")
    while not compilations(tmp_path):
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process[0], signal.SIGKILL)
    assert place.finish(process)[0] == -signal.SIGKILL
    assert list((tmp_path / "cache" / "minidamage").glob("*.partial*"))
    code, out, err = place.run()
    assert code == 0 and "backend cpu" in out and "waiting" not in err
    assert not list((tmp_path / "cache" / "minidamage").glob("*.partial*"))


def test_the_library_of_a_process_is_torchs_own_and_may_lie_in_a_folder_with_spaces(monkeypatch):
    folder = pathlib.Path(torch.__file__).parent / "lib"
    lines = ["7f0-7f1 r-xp 00000000 08:01 12   /usr/lib/libgomp.so.1", "7f1-7f2 rw-p 00000000 00:00 0",
             "7f2-7f3 r-xp 00000000 08:01 13   /my venv/lib/libgomp-a34b.so.1",
             f"7f3-7f4 r-xp 00000000 08:01 15   {folder}/libgomp.so.1 (deleted)", f"7f3-7f4 r-xp 00000000 08:01 14   {folder}/libgomp.so.1"]
    found = []
    for text in (lines, lines[2:3], lines[1:2]):
        monkeypatch.setattr(_toolchain.pathlib.Path, "read_text", lambda _, text=text: "\n".join(text))
        found += _toolchain.loaded_library.__wrapped__("gomp|omp")
    assert found == [f"{folder}/libgomp.so.1", "/my venv/lib/libgomp-a34b.so.1"]


def test_another_machines_unfinished_files_may_be_alive(tmp_path):
    own, young, old = (tmp_path / f"a.o.partial-{host}-7" for host in (os.uname().nodename, "elsewhere", "gone"))
    for path in (own, young, old):
        path.touch()
    os.utime(old, (0, 0))
    with _extension._locked(tmp_path):
        assert not own.exists() and young.exists() and not old.exists()


def test_two_processes_build_once(place, tmp_path):
    results = [place.finish(process) for process in [place.start(DELAY="1"), place.start(DELAY="1")]]
    assert all(code == 0 and "backend cpu" in out for code, out, _ in results)
    assert sum("building" in err for _, _, err in results) == 1 and sum("waiting for another process" in err for _, _, err in results) == 1
    assert sum("-shared" in line for line in compilations(tmp_path)) == 1


def test_cache_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    code, out, err = place.run(TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    assert code == 0 and "backend cpu" in out and "cannot write to" in err and f"the kernels go to {tmp_path}" in err
    code, out, err = place.run(TORCH_EXTENSIONS_DIR=str(tmp_path / "file"))
    assert code == 0 and "backend cpu" in out and err == ""                    # found again, no second build
    code, out, err = place.run(TORCH_EXTENSIONS_DIR=str(tmp_path / "file"), HOME=str(tmp_path / "file"))
    assert code == 0 and "backend cpu" in out


def test_temporary_folder_of_somebody_else_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = tmp_path / f"minidamage-{os.getuid()}"
    assert folder in _extension._cache_folders()
    folder.mkdir()
    folder.chmod(0o777)
    assert folder not in _extension._cache_folders()


def test_the_doctor_finds_every_op_right(capsys):
    from minidamage.ops import __main__ as doctor
    assert set(doctor.examples()) == set(_extension._SCHEMAS)
    assert doctor.main() == 0
    zeros, nans = torch.zeros(2), torch.full((2,), float("nan"))
    for ours in ((zeros, nans), (nans, zeros), nans):                                       # in whichever output: not right
        assert not doctor.largest_difference(ours, (zeros,) * len(ours) if isinstance(ours, tuple) else zeros) <= doctor.TOLERANCE
    text = capsys.readouterr().out
    for words in ("C++ compiler", "cache folder", "nvcc", "evaluation", "nms_padded", "multiscale_roi_align_backward"):
        assert words in text
    assert "WRONG" not in text


# ---- CUDA decisions, without CUDA ----------------------------------------------------------------------------------------


@pytest.fixture
def no_memory(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    _toolchain.cuda_toolkit.cache_clear()
    yield
    _toolchain.cuda_toolkit.cache_clear()


def fake_nvcc(folder, version="13.0"):
    (folder / "bin").mkdir(exist_ok=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ncase \"$*\" in *--version*) echo 'Cuda compilation tools, release {version}, V1';;\n"
                    "*--list-gpu-arch*) echo compute_80; echo compute_90;;\n"
                    "*) echo '#$ INCLUDES=\"-I/opt/cuda/include\"' >&2; echo '#$ LIBRARIES=  \"-L/opt/a\" \"-L/opt/b\"' >&2;; esac\n")
    nvcc.chmod(0o755)


def test_cpu_torch_wants_no_cuda(no_memory, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(_toolchain.BuildError, match="was built without CUDA"):
        _toolchain.cuda_toolkit()


def test_no_gpu(no_memory, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    with pytest.raises(_toolchain.BuildError, match="torch sees no GPU; .* set TORCH_CUDA_ARCH_LIST"):
        _toolchain.cuda_toolkit()


def test_no_nvcc(no_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(_toolchain.BuildError, match="no nvcc in .* \\(CUDA_HOME\\)"):
        _toolchain.cuda_toolkit()


def test_nvcc_is_asked_where_it_lives(no_memory, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    fake_nvcc(tmp_path)
    toolkit = _toolchain.cuda_toolkit()
    assert toolkit["include"] == "/opt/cuda/include" and toolkit["libraries"] == ["/opt/a", "/opt/b"] and toolkit["version"] == "13.0"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    _toolchain.cuda_toolkit.cache_clear()
    with pytest.raises(_toolchain.BuildError, match="nvcc is CUDA 13.0, torch was built with CUDA 12.8"):
        _toolchain.cuda_toolkit()


def test_references_on_another_device_are_announced_once(monkeypatch):
    monkeypatch.setattr(_extension, "load", lambda: ("cpu",))
    monkeypatch.setitem(_extension._reasons, "cuda", "no nvcc on PATH")
    _extension._announce_reference.cache_clear()
    with pytest.warns(UserWarning, match="no CUDA kernels: no nvcc on PATH.*references run on cuda"):
        _extension._announce_reference("cuda", "auto")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _extension._announce_reference("cuda", "auto")
    with pytest.warns(UserWarning, match="no kernels for mps"):
        _extension._announce_reference("mps", "auto")
    _extension._announce_reference.cache_clear()
    with pytest.raises(_toolchain.BuildError, match="no nvcc on PATH"):
        _extension._announce_reference("cuda", "require")


def test_what_ails_the_cuda_half_leaves_the_kernels_of_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "_reasons", {})
    toolkit = {"nvcc": str(tmp_path / "bin" / "nvcc"), "include": "/opt/cuda/include", "libraries": [], "version": "13.0"}
    fake_nvcc(tmp_path)
    monkeypatch.setattr(_toolchain, "cuda_toolkit", lambda: toolkit)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    built = _extension.build_ops()
    assert built[1] == ("cpu",) and "expected numbers such as" in _extension.reason("cuda")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_extension, "build_ops", lambda: (broken, ("cpu", "cuda")))
    assert _extension._load_ops() == ("cpu",) and "do not load" in _extension.reason("cuda")


def test_a_forked_process_leaves_its_parents_gpu_alone(no_memory, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with pytest.raises(_toolchain.BuildError, match="forked from one that uses the GPU"):
        _toolchain.cuda_toolkit()


def test_the_host_compiler_behind_a_launcher(monkeypatch, tmp_path):
    for name in ("ccache", "g++-x"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "ccache g++-x -m64")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    command = _toolchain.nvcc_command({"nvcc": "nvcc"})
    assert command[command.index("-ccbin") + 1] == "g++-x"


def test_a_compiler_that_links_its_own_libstdcxx_gives_no_second_one(tmp_path):
    """g++ -static-libstdc++, as some machines set it up: a message begun by one copy and ended by torch's crashed on one of them."""
    static = [*_toolchain.cxx(), "-static-libstdc++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none"]
    source = b"#include <sstream>\nstd::string text(int n) { std::ostringstream out; out << n; return out.str(); }"

    def links_shared(*libraries):
        run = subprocess.run([*static, *libraries, "-o", str(tmp_path / "library.so")], input=source, capture_output=True)
        return None if run.returncode else b"libstdc++.so" in (tmp_path / "library.so").read_bytes()
    if sys.platform != "linux" or not _toolchain.loaded_library(r"stdc\+\+") or links_shared() is not False:
        pytest.skip("no compiler here that links libstdc++ statically")
    assert links_shared(*_toolchain.torch_libraries())


def test_a_card_too_old_for_nvcc_is_left_out_beside_another(monkeypatch, tmp_path):
    fake_nvcc(tmp_path)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((6, 1), (9, 0))[index])
    assert _toolchain.arch_flags(str(tmp_path / "bin" / "nvcc")) == ["-gencode", "arch=compute_90,code=sm_90"]


def test_arch_list(monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0a+PTX")
    assert _toolchain.arch_flags("nvcc") == ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a",
                                       "-gencode", "arch=compute_90a,code=compute_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(_toolchain.BuildError, match="expected numbers such as"):
        _toolchain.arch_flags("nvcc")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "arch=compute_90,code=compute_90" in _toolchain.arch_flags("nvcc")         # no GPU, no list: no IndexError


def test_key_follows_what_decides_the_product(monkeypatch, tmp_path):
    key = _extension._key(b"source", ["g++", "-march=native"])
    assert _extension._key(b"source", ["g++", "-march=native"]) == key
    assert _extension._key(b"other", ["g++", "-march=native"]) != key
    assert _extension._key(b"source", ["g++", "-march=native", "-O1"]) != key
    monkeypatch.setattr(_toolchain, "cpu_features", lambda: "another processor")
    assert _extension._key(b"source", ["g++", "-march=native"]) != key
    headers = {path.name for path in _extension._included(_extension.CSRC / "cuda" / "nms.cu", set())}
    assert headers == {"nms.cu", "nms.h", "common.h", "cuda_on_cpu.h"}
    bindings = _extension._included(_extension.CSRC / "bindings.cpp", set())
    assert bindings >= {*(_extension.CSRC / "bindings").glob("*.cpp"), _extension.CSRC / "tensors.h"}


def test_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert _toolchain.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    assert _toolchain.jobs() == os.cpu_count()


def test_an_installation_has_every_package():
    listed = set(re.findall(r'"(minidamage[\w.]*)"', (ROOT / "setup.py").read_text())) - {"minidamage.csrc"}
    assert listed == {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "minidamage").rglob("__init__.py")}
