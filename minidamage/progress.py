"""What a long run tells the person who watches it (`Progress`), and what that person may tell the run (`StopSignal`)."""
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch

from minidamage import distributed
from minidamage.metrics.measure import peak_memory


END_WORKER = getattr(signal, "SIGUSR1", None)                         # None on Windows, where a process cannot refuse to end


class Progress:
    """One line that is rewritten on a terminal; a plain line every `interval` seconds in a log file.

    total_steps: steps of the whole run. first_step: those already done when a run is resumed. The time to go is the
    elapsed wall time (validation included) per step of this process, times the steps left.
    """

    def __init__(self, total_steps, first_step=0, device="cpu", interval=15.0, stream=None):
        self.total_steps, self.first_step = total_steps, first_step
        self.device = torch.device(device)
        self.stream = stream or sys.stdout
        self.terminal = self.stream.isatty()
        self.interval = 0.2 if self.terminal else interval
        self.start = time.perf_counter()
        self.shown_at = -float("inf")
        self.images = 0                                               # since `shown_at`, for images/s
        self.width = 0                                                # characters of the line on the terminal

    def step(self, done, images, where, losses):
        """Called after each step. done: steps of the run so far; images: pictures in the batch; where: "epoch 3/12  5/40"."""
        self.images += images
        now = time.perf_counter()
        since = now - max(self.shown_at, self.start)
        if now - self.shown_at < self.interval and done < self.total_steps:
            return
        left = (now - self.start) / max(done - self.first_step, 1) * (self.total_steps - done)
        terms = "  ".join(f"{name.removeprefix('loss_')} {value:.3f}" for name, value in losses.items())
        self._show(f"{where}  {self.images / max(since, 1e-9):.1f} img/s  {clock(left)} to go  {memory(self.device)}  "
                   f"loss {sum(losses.values()):.3f}  ({terms})")
        self.shown_at, self.images = now, 0

    def note(self, text):
        """What goes on besides training steps (validation); on a terminal only, the next line replaces it."""
        if self.terminal:
            self._show(text)

    def line(self, text):
        """A line that stays, such as the result of an epoch."""
        self.clear()
        print(text, file=self.stream, flush=True)
        self.images, self.shown_at = 0, time.perf_counter()           # images/s leaves validation out

    def clear(self):
        if self.terminal and self.width:
            print("\r" + " " * self.width + "\r", end="", file=self.stream, flush=True)
            self.width = 0

    def _show(self, text):
        if not self.terminal:
            print(text, file=self.stream, flush=True)
            return
        text = text[:max(terminal_width() - 1, 20)]                   # a wrapped line cannot be rewritten
        print("\r" + text.ljust(self.width), end="", file=self.stream, flush=True)
        self.width = len(text)


class StopSignal:
    """Ctrl-C or SIGTERM asks the loop to stop after the step it is in; a second Ctrl-C exits at once.

        with StopSignal() as stop:
            for batch in batches:
                ...
                if stop.requested: save and leave; exit with stop.exit_code (130 for Ctrl-C, 143 for SIGTERM)
    """

    def __init__(self):
        self.signum = None
        self.previous = {}

    requested = property(lambda self: self.signum is not None)
    exit_code = property(lambda self: 128 + self.signum if self.signum is not None else 0)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():     # Python delivers signals to the main thread only
            self.previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        for process in multiprocessing.active_children() if END_WORKER else ():      # loaders that an error left behind: they ignore
            os.kill(process.pid, END_WORKER)                          # SIGTERM, by which Python would end them at exit, and wait for ever
            process.join(timeout=5)

    def _receive(self, signum, frame):
        if signum == signal.SIGINT and self.requested:
            os.write(2, b"\nstopped at once; last.pt is the one written before\n")
            os._exit(128 + signum)                                    # nothing to tidy: files are written beside, then renamed
        first, self.signum = not self.requested, signum               # before the write: the next Ctrl-C may come right behind it
        if first and distributed.is_main():
            os.write(2, b"\nstopping after this step and saving; Ctrl-C once more exits at once\n")


def ignore_signals(worker_id):
    """DataLoader worker_init_fn: Ctrl-C reaches the workers too, but it is the loop that decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if END_WORKER:
        signal.signal(END_WORKER, lambda signum, frame: os._exit(0))  # any other end is a crash to torch, which raises in the loop


def clock(seconds):
    """4:05 or 2:04:05."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def memory(device="cpu"):
    """Peak memory so far, in words: of the GPU's allocator on a GPU, of the process elsewhere."""
    device = torch.device(device)
    gigabytes = peak_memory(device) / 2**10
    return f"{gigabytes:.1f} GiB{' GPU' if device.type == 'cuda' else ''}" if gigabytes == gigabytes else "memory not known"


def terminal_width():
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):
        return 120
