"""Set-up that all tests share. A machine with a compiler must build the kernels: a broken build fails here, it does not skip."""
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

_compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
if os.environ.get("CI") or _compiler:
    os.environ.setdefault("MINIDAMAGE_KERNELS", "require")
os.environ.setdefault("OMP_NUM_THREADS", "1")     # tiny tensors: more threads cost more than they bring, here and in what tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")                  # cuBLAS asks for it in deterministic mode, once, at its start
HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE))                                                # tests import oracle.py by name

import pytest                                                                # noqa: E402
import torch                                                                 # noqa: E402


def pytest_collection_finish(session):
    """In a run of the whole suite everything compiles beside the first tests, on the cores that these leave idle."""
    if of_the_whole_suite(session) and SECOND not in os.environ:
        session.config._build = subprocess.Popen([sys.executable, "-c", "import test_sanitizers; test_sanitizers.build_all()"],
                                                 cwd=HERE, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_unconfigure(config):
    if hasattr(config, "_build"):
        config._build.terminate()                                            # of an interrupted run
        config._build.wait()


def of_the_whole_suite(session):
    files = {item.path.name for item in session.items}
    return {"test_emulated.py", "test_masks.py", "test_sanitizers.py"} <= files and not session.config.option.collectonly


# ---- the whole suite in two processes: one takes the files of tests from the front, a second from the back -------------------------

SECOND = "MINIDAMAGE_TESTS_SECOND"      # set in the second process: the folder in which each leaves an empty file for what it takes


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session):
    """A test keeps one core busy (OMP_NUM_THREADS above). On a GPU, whose memory some measure, they stay in one process."""
    if SECOND in os.environ:
        folder = pathlib.Path(os.environ[SECOND])
        with open(folder / "reports", "a") as reports:
            session.config.pluginmanager.register(Sender(session.config, reports))
            run_unclaimed(session, folder, backwards=True)
        return True
    if not of_the_whole_suite(session) or (os.cpu_count() or 1) < 2 or torch.cuda.is_available():
        return None                                                          # pytest's own loop
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/log", "w+") as log, open(f"{folder}/reports", "w+") as reports:
        second = subprocess.Popen([sys.executable, "-m", "pytest", *session.config.invocation_params.args], stdout=log, stderr=log,
                                  cwd=session.config.invocation_params.dir, env={**os.environ, SECOND: folder})
        try:
            run_unclaimed(session, pathlib.Path(folder), after_each=lambda: take(session.config, reports))
            status = second.wait()
            take(session.config, reports)
        finally:
            second.terminate()                                               # of an interrupted run
            second.wait()
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            log.seek(0)
            pytest.exit(f"the second process of tests ended with status {status}:\n{log.read()[-10000:]}", returncode=1)
    return True


def run_unclaimed(session, folder, backwards=False, after_each=lambda: None):
    for item, following in itertools.pairwise(itertools.chain(unclaimed(session, folder, backwards), [None])):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        after_each()
        if session.shouldfail:                                               # -x, --maxfail
            raise session.Failed(session.shouldfail)
        if session.shouldstop:
            raise session.Interrupted(session.shouldstop)


def unclaimed(session, folder, backwards):
    """The tests of one file after the other; of two processes that create its mark, one can."""
    files = list(dict.fromkeys(item.path for item in session.items))
    for path in reversed(files) if backwards else files:
        try:
            (folder / path.name).touch(exist_ok=False)
        except FileExistsError:
            continue
        yield from (item for item in session.items if item.path == path)


class Sender:
    def __init__(self, config, reports):
        self.config, self.reports = config, reports

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        print(json.dumps(data), file=self.reports, flush=True)


def take(config, reports):
    """Hands what the second process has reported to this one's hooks, as if its tests had run here."""
    while True:
        position, line = reports.tell(), reports.readline()
        if not line.endswith("\n"):                                          # none, or half written
            reports.seek(position)
            return
        report = config.hook.pytest_report_from_serializable(config=config, data=json.loads(line))
        config.hook.pytest_runtest_logreport(report=report)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def narrow():
    """What this test builds in this process has a narrow body: every part is there, and a step takes a fraction of the time."""
    from detection_cases import NARROW
    from minidamage.layers import resnet
    with mock.patch.object(resnet, "WIDTHS", NARROW):                        # not monkeypatch, which tests undo
        yield


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
