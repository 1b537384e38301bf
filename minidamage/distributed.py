"""Many processes that train one model: who they are, what they share, and what a loss of theirs is divided by.

    torchrun --nproc-per-node 8 train.py --data coco/                   eight GPUs of one machine
    torchrun --nnodes 2 --node-rank 0 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500 train.py --data coco/

torchrun starts one process a GPU and tells each its number (`rank`, 0 to world - 1) in environment variables. Every process holds the whole
model and its share of each batch; DistributedDataParallel averages their gradients during backward(). Process 0 alone prints and writes.

Without torchrun nothing here does anything: world() is 1, and every function hands back what it was given.

**One batch, however it is cut.** A loss is a sum over pictures, anchors or pixels, divided by how many there are, and how many there are in
the *whole* batch only all processes (and all parts, where the gradients of several are accumulated) know together. `normaliser` adds the
counts up, so that 1 process x 8 pictures, 2 x 4 and 1 x (4 + 4) have one loss and one gradient, to rounding. `Batch` switches that on.

Read next: train(), in train.py.
"""
import contextlib
import datetime
import math
import os
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket Timeout", "gloo", "NCCL",
        "ProcessGroup", "connect() timed out", "Application timeout caused pair closure")                  # of torch's RuntimeErrors


# ------------------------------------------------------------------------------------------------------- who is there

def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process's number, from 0."""
    return dist.get_rank() if world() > 1 else 0


def is_main():
    """Whether this is process 0, which prints and writes."""
    return rank() == 0


def local(variable, default):
    """A number that torchrun counts on each machine for itself: LOCAL_RANK, LOCAL_WORLD_SIZE; `default` without torchrun."""
    return int(os.environ.get(variable, default)) if world() > 1 else default


def start(minutes=10.0):
    """Joins the processes that torchrun started; nothing where there is one. Output of all but process 0 is dropped, errors stay.

    minutes: how long a process waits for the others before it gives them up. CPU tensors travel by gloo, GPU tensors by NCCL.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) <= 1 or world() > 1:
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not dist.is_available():
        raise ValueError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes: expected {', '.join(missing)} in the "
                         "environment as well, and a torch with torch.distributed; start with torchrun, or unset WORLD_SIZE")
    if not 0 < minutes < math.inf:
        raise ValueError(f"--timeout: expected minutes above 0, got {minutes}")
    own_gpu = int(os.environ["LOCAL_RANK"])
    if own_gpu < torch.cuda.device_count():
        torch.cuda.set_device(own_gpu)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))


@contextlib.contextmanager
def quiet():
    """Inside, nothing but process 0 writes to the standard output."""
    with contextlib.ExitStack() as stack:
        if not is_main():
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def end():
    """Leaves the group."""
    if world() > 1:
        dist.destroy_process_group()


def device_name(name):
    """The --device of this process: "cuda" and "auto" mean the GPU of its own number. Raises ValueError where there is none."""
    kind = name.split(":")[0]
    if world() == 1 or kind == "cpu" or not torch.cuda.is_available():
        return name
    if local("LOCAL_RANK", 0) >= torch.cuda.device_count():
        raise ValueError(f"expected a GPU for each of the {local('LOCAL_WORLD_SIZE', 1)} processes of this machine, got "
                         f"{torch.cuda.device_count()}; type torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu")
    return f"cuda:{local('LOCAL_RANK', 0)}"


def is_lost(error):
    """Whether an error says that another process has ended, or has not answered within the timeout."""
    return world() > 1 and isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST))


def first_to_say(text, seconds=0.0):
    """Whether no other process has said this before: all meet the same mistake, and one message is enough.

    seconds: how long process 0, in which the others may ask, waits for them to have asked: before it ends.
    """
    if world() == 1:
        return True
    try:
        store = dist.distributed_c10d._get_default_store()
        first, end = store.add(f"said {text}", 1) == 1, time.monotonic() + seconds
        while is_main() and time.monotonic() < end and store.add(f"said {text}", 0) < world():
            time.sleep(0.05)
        return first
    except RuntimeError:                                              # the store went with its process
        return True


# --------------------------------------------------------------------------------------------------- what they share

def on_main(function):
    """What function() returns in process 0, where alone it runs; an exception in it is raised in every process."""
    if world() == 1:
        return function()
    answer = [None, None]
    if is_main():
        try:
            answer[0] = function()
        except Exception as error:                                    # raised below, here too
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gather(value):
    """[each process's value], in every process."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


def gather_to_main(value):
    """[each process's value] in process 0, None in the others."""
    if world() == 1:
        return [value]
    values = [None] * world() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values


def any_of(flag):
    """Whether the flag is set in any process."""
    return any(gather(bool(flag)))


def shard(count):
    """The pictures of this process out of `count`: every world-th, from its own number on. `interleave` undoes it."""
    return range(rank(), count, world())


def interleave(lists):
    """One list in the pictures' order out of each process's list for its shard: [a0, a1, ...], [b0, b1, ...] -> a0, b0, a1, b1, ..."""
    longest = max(map(len, lists))
    return [each[k] for k in range(longest) for each in lists if k < len(each)]


def summed(tensor):
    """The sum of a tensor over all processes; the others' shapes have to be equal. Queued on a GPU, nothing waits."""
    if world() == 1:
        return tensor
    tensor = tensor.detach().clone()
    dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def copy_buffers(*models):
    """Every process takes process 0's running statistics: what is validated is then what is saved. None is passed over."""
    for model in models if world() > 1 else ():
        for buffer in model.buffers() if model is not None else ():
            dist.broadcast(buffer, src=0)


# ------------------------------------------------------------------------------------------------------- one batch

def shares(batch, accumulate):
    """This process's part of a batch: [(what the part holds, whether it counts)], at most `accumulate` of them, as many in each process.

    batch: a list. Where it is too small for all (the last one of an epoch), a process without an own picture takes the first one, which
    then does not count: it has to take part in the exchange of gradients.
    """
    parts = min(accumulate, math.ceil(len(batch) / world()))
    own = [batch[part * world() + rank()::parts * world()] for part in range(parts)]
    return [(part or batch[:1], bool(part)) for part in own]


def check_batch(batch_size, accumulate):
    """ValueError for a batch that the processes, and the parts of each, cannot share evenly."""
    ways = world() * accumulate
    if batch_size % ways:
        least = math.ceil(batch_size / ways) * ways
        reason = " x ".join([f"{world()} processes"] * (world() > 1) + [f"--accumulate {accumulate}"] * (accumulate > 1))
        fits = ", ".join(str(n) for n in range(1, batch_size + 1) if batch_size % (n * accumulate) == 0)
        raise ValueError(f"--batch-size {batch_size}: expected a multiple of {ways} ({reason}: it is the whole batch, which they share "
                         f"evenly), got {batch_size}; type --batch-size {least}, or take a number of processes that divides it "
                         f"({fits or f'none with --accumulate {accumulate}'})")


def replicate(model):
    """The model whose backward() leaves the mean of all processes' gradients; the model itself where there is one process.

    Every parameter takes part in every step, pictures without objects included (their RoIs are none, their gradients zeros), so that no
    search for unused ones is needed (find_unused_parameters would walk the graph in every step). Pictures stay where they are: the
    model moves them. Running statistics are each process's own during an epoch, see `copy_buffers`.
    """
    if world() == 1:
        return model
    # a 1x1 convolution's gradient has channels_last strides or plain ones, both the same memory: nothing that costs
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)                # torch 2.13 renames broadcast_buffers, older ones have no other
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def seed_step(*numbers):
    """Seeds dropout from numbers that name the step and from the rank: each process draws its own, a resumed run the same again. One
    process alone goes on with the generator's state, which its checkpoints hold."""
    if world() > 1:
        torch.manual_seed(int(np.random.SeedSequence([*numbers, rank()]).generate_state(1, np.uint32)[0]))


_batch = None                                                         # the Batch whose losses are being computed


class Batch:
    """The losses of one batch, in parts and in processes: inside `part()`, `normaliser` counts over all of them.

    How a count travels: a loss, far down in the model and without a word of processes, asks normaliser(name, the count in hand). While
    `part()` lasts, `_batch` is this Batch, and its `counts` answer for the whole batch; a name that is not there yet is added up over the
    processes, which all ask for the same names in the same order. Outside of a `part()` the count in hand is the answer.

        batch = Batch(replica, parts)                       # parts: [(images, targets, counts)]
        for images, targets, counts in parts:
            with batch.part(counts):
                losses = replica(images, targets)
            backward()

    With several parts the counts have to be known before the first one's gradients: `count()` has `model.loss_counts` find them. A
    segmenter's are in the label maps; a detector's need its proposals, so body and RPN run once more, without gradients.
    Gradients are exchanged in the last part's backward() alone.
    """

    def __init__(self, model, parts):
        self.model, self.parts, self.done = model, parts, 0           # done: parts that were begun
        self.counts, self.counted = {}, True                          # of the whole batch, by name; whether the present part counts
        self.plain = world() == 1 and len(parts) == 1                 # then the count in hand is the whole batch's

    @contextlib.contextmanager
    def part(self, counts):
        """counts: whether its pictures do; those that only keep the exchange going have a loss of 0, and so have their gradients."""
        global _batch
        if self.plain:
            yield
            return
        if self.done == 0 and len(self.parts) > 1:
            self.count()
        self.done, self.counted = self.done + 1, counts
        wait = world() > 1 and self.done < len(self.parts)
        with self.model.no_sync() if wait else contextlib.nullcontext():
            _batch = self
            try:
                yield
            finally:
                _batch = None

    @torch.no_grad()
    def count(self):
        """Fills `counts` from all parts of all processes."""
        model = self.model.module if world() > 1 else self.model
        found = [{name: count * counts for name, count in model.loss_counts(images, targets).items()}
                 for images, targets, counts in self.parts]
        self.counts = {name: summed(sum(each[name] for each in found)) for name in found[0]}


def total(name, count):
    """How many there are in the whole batch. name: of what ("rois"); count: tensor, those in hand, which it is outside a `Batch`."""
    if _batch is None:
        return count
    if name not in _batch.counts:                                     # a second head with the same truth counts it no second time
        _batch.counts[name] = summed(count * _batch.counted)
    return _batch.counts[name]


def normaliser(name, count):
    """What a sum is divided by to be this process's part of a mean over the whole batch; at least 1 in all.

    The gradients of all processes are averaged, not added, hence count / world. For pictures that do not count it is infinite.
    """
    if _batch is None:
        return count.clamp(min=1)
    return total(name, count).clamp(min=1) / (world() if _batch.counted else 0.0)
