"""Time and memory of a model at work."""
import sys

import numpy as np
import torch

try:
    import resource
except ImportError:                                                   # Windows
    resource = None


def speed(seconds):
    """{"ms per picture", "pictures per second"}, one the inverse of the other: of the median picture, which a busy moment of the
    machine does not move. seconds: spent on each picture; the first one warms up and is left out."""
    median = float(np.median(seconds[1:] or seconds or [float("nan")]))
    return {"ms per picture": median * 1000, "pictures per second": 1 / median}


def peak_memory(device):
    """MB: of the GPU's allocator where the model is there, else the process's largest resident size (imports included), NaN on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if resource is None:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss         # kilobytes on Linux, bytes on macOS
    return peak / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def synchronize(device):
    """Waits for the GPU, so that a clock read next has its work inside."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
