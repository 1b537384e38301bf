"""A training step never waits for the GPU: nothing reads a value back, no shape depends on one, no picture is copied while the CPU waits.

Without a GPU this is shown on torch's device "meta", whose tensors have shapes and no values: whatever needs a value raises. Pictures and
targets lie on the CPU, as from a loader. On a GPU the framework itself is asked (set_sync_debug_mode).
"""
import contextlib

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import minidamage
from detection_cases import small_model, two_pictures, without_masks
from minidamage.training import make_optimizer

COPIES = {torch.ops.aten._to_copy.default: lambda out, source, non_blocking=False, **_: (source, non_blocking),
          torch.ops.aten.copy_.default: lambda out, mine, source, non_blocking=False: (source, non_blocking)}
MAKERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)


class NoBlockingCopy(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in COPIES:
            source, non_blocking = COPIES[func](out, *args, **(kwargs or {}))
            assert source.device == out.device or non_blocking, f"{list(source.shape)} goes to {out.device}, and the CPU waits for it"
            assert source.device == out.device or source.dtype == out.dtype, f"{source.dtype} becomes {out.dtype} on the CPU, not pinned"
        return out


class NoNumbersFromPython(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert func not in MAKERS or out.is_cpu, f"Python's numbers go to {out.device}, and the CPU waits for them"
        return out


@contextlib.contextmanager
def nothing_waits():
    """Inside, a copy between devices that the CPU waits for is an AssertionError; to read a "meta" tensor is torch's own error."""
    with NoNumbersFromPython(), NoBlockingCopy():
        yield


@pytest.mark.parametrize("waits", [
    lambda x: x[0].item(), lambda x: x.tolist(), lambda x: bool(x[0]), lambda x: float(x[0]), lambda x: x.cpu(), lambda x: x.nonzero(),
    lambda x: x[x > 0], lambda x: torch.where(x > 0), lambda x: x.masked_select(x > 0), lambda x: torch.unique(x),
    lambda x: x.repeat_interleave(x.long()), lambda x: torch.zeros(3).to(x.device), lambda x: x.copy_(torch.zeros(3)),
    lambda x: torch.zeros(3).to(x.device, torch.int64, non_blocking=True),
    lambda x: torch.tensor([1.0, 2.0], device=x.device), lambda x: x.new_tensor([1.0])],
    ids=["item", "tolist", "bool", "float", "cpu", "nonzero", "index by a mask", "where", "masked_select", "unique", "repeat_interleave",
         "to", "copy_", "to another type", "tensor", "new_tensor"])
def test_what_waits_is_found(waits):
    """The tests below can fail."""
    with pytest.raises((RuntimeError, NotImplementedError, AssertionError)), nothing_waits():
        waits(torch.zeros(3, device="meta"))


DETECTORS = [("maskrcnn_resnet50_fpn", {}),
             ("maskrcnn_resnet50_fpn", dict(class_loss="sigmoid_focal", box_loss="ciou", mask_loss="bce+dice", proposals="gt")),
             ("maskrcnn_study_resnet50", dict(proposals="rpn", min_proposals=20)),
             ("fasterrcnn_resnet50_fpn", dict(class_loss="softmax_focal")), ("damagenet", dict(box_loss="giou")),
             ("damagenet", dict(fpn=False)), ("danet", dict(phase=5)), ("danet", dict(phase=1))]
SEGMENTERS = [("context_cracknet", dict(image_size=64, sequence_size=64)), ("unet", dict(class_weights="inverse")),
              ("deeplabv3_resnet50", {})]


def batches(model):
    """Two batches of different shapes (new anchors in the second), (images, targets) each."""
    if model.task == "detection":
        images, targets = two_pictures()
        targets = targets if model.roi_heads.mask_head is not None else without_masks(targets)
        return [(images[:1], targets[:1]), (images, targets)]
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    maps = torch.randint(0, model.num_classes, (2, 64, 64), dtype=torch.uint8)
    return [(list(images), [{"label_map": label_map} for label_map in maps])] * 2


def build(name, fields):
    if minidamage.MODELS[name][0].task == "detection":
        return small_model(name, norm="batch", **fields).train()
    return minidamage.build_model(name, 3, **fields).train()


@pytest.mark.parametrize("name, fields", DETECTORS + SEGMENTERS)
def test_a_step_on_tensors_without_values(name, fields, monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())             # there is none for "meta"
    with torch.device("meta"):
        model = build(name, fields)
    with nothing_waits():
        for images, targets in batches(model):
            losses = model(images, targets)
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(loss.is_meta for loss in losses.values())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.fixture
def refuse_to_wait():
    """A function from whose call on the framework raises where the CPU would wait for the GPU."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name, fields", DETECTORS + SEGMENTERS)
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_a_step_on_a_gpu(name, fields, amp, refuse_to_wait):
    """The step of train(), from pictures to weights; what is made once (libraries, the optimiser's state) is made in a first one."""
    model = build(name, fields).cuda()
    optimizer, (first, second) = make_optimizer(model, minidamage.MODELS[name][2]), batches(model)
    for number, (images, targets) in enumerate((first, first, second)):
        if number == 1:
            torch.cuda.synchronize()
            refuse_to_wait()
        targets = [{**target, "seed": 7} for target in targets]
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            losses = model(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(loss) for loss in losses.values())
