"""benchmark.py's whole models: the sides that ours is timed against do the same work, and run what their names say."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minidamage
from benchmarks import model_rows, timing
from minidamage.models.context_cracknet import CAGM, ContextCrackNetConfig

SMALL = dict(body="resnet18", image_size=64, sequence_size=64, attention_rank=6, attention_heads=4, feed_forward=32, dropout=0.0)


def test_the_stock_attention_block_gives_what_ours_gives():
    torch.manual_seed(0)
    block = CAGM(32, ContextCrackNetConfig(sequence_size=64, attention_rank=6, attention_heads=4, feed_forward=16, dropout=0.0))
    x = torch.randn(2, 32, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    weights, found = torch.randn(2, 32, 4, 4), []
    for kind in (CAGM, model_rows.StockCAGM):
        block.__class__ = kind
        out = block(x)
        found.append((out, *torch.autograd.grad((out * weights).sum(), [x, *block.parameters()])))
    for ours, stock in zip(*found):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5)


def test_every_side_of_a_row_runs_in_both_modes():
    fields = tuple((name, value) for name, value in SMALL.items() if name != "image_size")
    for training in (False, True):
        case = model_rows.ModelCase("context_cracknet", 64, training, 2, "cpu", "float32", fields)
        for side in ("ours", "stock", "contiguous", "bfloat16"):
            model_rows.model_call(case, side)()                          # ends: what each gives is test_segmenters' and the test above's


def test_the_contiguous_side_has_no_map_in_channels_last():
    model = minidamage.build_model("context_cracknet", 2, **SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        with Convolutions() as before:
            expected = model(images)
        model_rows.make_contiguous(model)
        with Convolutions() as after:
            torch.testing.assert_close(model(images), expected, rtol=1e-3, atol=1e-4)
    assert all(form == "channels_last" for form in before.forms) and all(form == "contiguous" for form in after.forms)
    assert len(before.forms) == len(after.forms) > 20


def test_short_calls_on_a_gpu_are_timed_several_in_a_row(monkeypatch):
    asked = []

    def seconds(function, device, calls=1):
        asked.append(calls)
        return function()
    monkeypatch.setattr(timing, "seconds", seconds)
    result = timing.paired(lambda: 0.001, {"other": lambda: 0.02}, "cuda", budget=1.0, most=5)
    assert asked == [1, 1, 1, 1] + [6, 1] * 5                          # a turn lasts 5 ms at least
    assert result["ours"] == 1 and result["other"]["ratio"] == 20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_on_a_gpu_is_what_a_call_takes_above_what_lay_there():
    class Rows:
        @staticmethod
        def call(megabytes):
            kept = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda")
            return lambda: torch.empty(2 * len(kept), dtype=torch.uint8, device="cuda")
    other = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    for extra, expected in ((False, 24), (True, 16)):
        assert timing.gpu_memory(lambda rows: rows.call(8), Rows, extra) == pytest.approx(expected * 1.048576, abs=3)
    assert len(other)


class Convolutions(TorchDispatchMode):
    """In which memory format the maps of wide convolutions come and go; two of their sides say it, a side of 1 pixel or channel none."""

    def __init__(self):
        super().__init__()
        self.forms = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._schema.name == "aten::convolution" and min(*out.shape[1:], *args[0].shape[1:]) > 1:
            is_contiguous = [t.is_contiguous() for t in (args[0], out)]
            is_last = [t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], out)]
            self.forms.append("contiguous" if all(is_contiguous) else "channels_last" if all(is_last) else "mixed")
        return out
