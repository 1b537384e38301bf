"""Set-up that all tests share. A machine with a compiler must build the kernels: a broken build fails here, it does not skip."""
import os
import pathlib
import shutil
import subprocess
import sys

_compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
if os.environ.get("CI") or _compiler:
    os.environ.setdefault("MINIDAMAGE_KERNELS", "require")
os.environ.setdefault("OMP_NUM_THREADS", "1")     # tiny tensors: more threads cost more than they bring, here and in what tests start
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))                                                # tests import oracle.py by name

import pytest                                                                # noqa: E402
import torch                                                                 # noqa: E402


def pytest_collection_finish(session):
    """In a run of the whole suite everything compiles beside the first tests, on the cores that these leave idle."""
    files = {item.path.name for item in session.items}
    if {"test_emulated.py", "test_masks.py", "test_sanitizers.py"} <= files and not session.config.option.collectonly:
        session.config._build = subprocess.Popen([sys.executable, "-c", "import test_sanitizers; test_sanitizers.build_all()"],
                                                 cwd=HERE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_unconfigure(config):
    if hasattr(config, "_build"):
        config._build.terminate()                                            # of an interrupted run
        config._build.wait()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))])
def device(request):
    """GPU tests are the CPU tests with another device."""
    return request.param


@pytest.fixture(scope="session")
def real_data():
    """The folder of real photographs, from MINIDAMAGE_DATA."""
    folder = os.environ.get("MINIDAMAGE_DATA", "")
    if not os.path.isdir(folder):
        pytest.skip("MINIDAMAGE_DATA is not set: no real data here")
    return pathlib.Path(folder)
