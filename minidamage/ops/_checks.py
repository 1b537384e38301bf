"""What the public functions of several ops check before anything else."""
import torch


def require_tensors(op, **arguments):
    """ValueError for the first argument that is no tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{op}: expected {name} as a tensor, got {type(value).__name__}; convert it with torch.as_tensor")


def autocast_is_on(device):
    """Whether autocast is on for tensors of that device type; False for types that have none (meta)."""
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)


def two_ints(value, name, op, least=1, below=2 ** 30):
    """An int, or a pair of them, as a tuple of two; ValueError outside [least, below), past which no picture reaches."""
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(part, int) for part in pair) or not least <= min(pair) <= max(pair) < below:
        kind = "a positive int" if least == 1 else f"an int of {least} or more"
        raise ValueError(f"{op}: expected {name} as {kind} or a pair of them, below {below}, got {value}")
    return pair
