"""MINIDAMAGE_KERNELS=off: every public op answers with its readable reference, forward and backward, and what it answers is the kernel's.

Here no kernel stands above an op's backward, so a reference that leaned on autograd inside the op would raise or lose its gradient. One
process with the kernels off runs all cases (this file, as a program), the test runs the same ones with kernels and compares.
"""
import os
import subprocess
import sys

import torch

from minidamage import ops
from minidamage.ops import _extension

TOLERANCE = 2e-5                                                             # of the largest number; the order of summation differs


def cases():
    """name -> (function of the tensors, tensors that get a gradient where they ask for one)."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random).requires_grad_()

    corner = torch.rand(40, 2, generator=random) * 30
    boxes = torch.cat([corner, corner + 1 + torch.rand(40, 2, generator=random) * 20], 1)
    scores, idxs = torch.rand(40, generator=random), torch.arange(40) % 3
    rois = torch.cat([(torch.arange(40) % 2)[:, None], boxes], 1)
    features, coarse = normal(2, 12, 16, 20), normal(2, 12, 8, 10)
    masks = torch.rand(40, 1, 14, 14, generator=random).requires_grad_()
    offset, factors = normal(2, 2 * 18, 8, 10), normal(2, 2 * 9, 8, 10)
    weight, bias = normal(8, 6, 3, 3), normal(8)
    attention = [normal(2, 30, 8), *(parameter for _ in range(3) for parameter in (normal(8, 8), normal(8))), normal(30, 5), normal(30, 5)]
    targets, logits = torch.rand(2, 12, 16, 20, generator=random), normal(30, 4)
    labels = torch.where(torch.arange(30) % 7 == 0, -100, torch.arange(30) % 4)
    table = {
        "encode_boxes": (lambda *a: ops.encode_boxes(*a, (10, 10, 5, 5)), (boxes.flip(0), boxes)),
        "decode_boxes": (lambda d, r: ops.decode_boxes(d, r[:, None, 1:], (10, 10, 5, 5), size=(30, 40)), (normal(40, 3, 4), rois)),
        "nms": (lambda *a: ops.nms(*a, 0.3), (boxes, scores)),
        "batched_nms": (lambda *a: ops.batched_nms(*a, 0.3), (boxes, scores, idxs)),
        "nms_padded": (lambda *a: ops.nms_padded(*a, 0.3, 9), (boxes, scores)),
        "batched_nms_padded": (lambda *a: ops.batched_nms_padded(*a, 0.3, 50, scores > 0.2), (boxes, scores, idxs)),
        "roi_align": (lambda *a: ops.roi_align(*a, (3, 4), 0.5, 2, True), (features, rois)),
        "multiscale_roi_align": (lambda f, c, r: ops.multiscale_roi_align([f, c], r, torch.arange(40) % 2, 3, [0.5, 0.25]),
                                 (features, coarse, rois)),
        "roi_pool": (lambda *a: ops.roi_pool(*a, (3, 2), 0.5), (features, rois)),
        "deform_conv2d": (lambda *a: ops.deform_conv2d(*a, stride=2, padding=1), (features, offset[:, :18], normal(8, 12, 3, 3))),
        "deform_conv2d, mask and groups": (lambda x, o, w, b, m: ops.deform_conv2d(x, o, w, b, 2, 1, 1, m),
                                           (features, offset, weight, bias, factors)),
        "paste_masks_in_image": (lambda *a: ops.paste_masks_in_image(*a, (50, 60)), (masks, boxes)),
        "paste_masks_bool": (lambda *a: ops.paste_masks_bool(*a, (50, 60)), (masks, boxes)),
        "paste_masks_rle": (lambda *a: [torch.tensor(list(mask["counts"])) for mask in ops.paste_masks_rle(*a, (50, 60))], (masks, boxes)),
        "linear_attention": (lambda *a: ops.linear_attention(*a, 2), attention),
        "linear_attention with an output": (lambda *a: ops.linear_attention(*a[:9], 4, *a[9:]), (*attention, normal(6, 8), normal(6))),
    }
    for reduction in ("none", "mean", "sum"):
        settings = {"reduction": reduction}
        table[f"sigmoid_focal_loss, {reduction}"] = (lambda *a, s=settings: ops.sigmoid_focal_loss(*a, **s), (features, targets))
        table[f"softmax_focal_loss, {reduction}"] = (lambda x, s=settings: ops.softmax_focal_loss(x, labels, **s), (logits,))
    return table


def results():
    """name with memory format, or "autocast" -> values, gradients, and which of them are channels_last."""
    found = {}
    for name, (function, tensors) in cases().items():
        for how, form in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last),
                          ("autocast", torch.contiguous_format)):
            arguments = [t.detach().contiguous(memory_format=form if t.dim() == 4 else torch.contiguous_format)
                         .requires_grad_(t.requires_grad) for t in tensors]
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                values = function(*arguments)
            values = [values] if isinstance(values, torch.Tensor) else list(values)
            wanted = [t for t in arguments if t.requires_grad and values[0].requires_grad]
            if wanted:
                values[0].mul(torch.linspace(-1, 1, values[0].numel()).view_as(values[0])).sum().backward()
            values = [t.detach() for t in values] + [t.grad for t in wanted]
            layouts = [t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in values]
            found[f"{name}, {how}"] = values, layouts
    return found


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    """The names of the ops of minidamage that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "minidamage":
            self.names.add(function._opname)
        return function(*args, **(kwargs or {}))


def test_every_op_and_gradient_without_kernels_equals_the_kernels(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(_extension.CSRC.parent), "MINIDAMAGE_KERNELS": "off", "OMP_NUM_THREADS": "1",
                   "CXX": "/nowhere/g++"}
    run = subprocess.run([sys.executable, __file__, str(tmp_path / "results")], capture_output=True, text=True, timeout=120,
                         env=environment)
    assert run.returncode == 0 and run.stdout == "reference\n", run.stdout + run.stderr
    references = torch.load(tmp_path / "results")
    with Called() as called:
        kernels = results()
    assert called.names == set(_extension._SCHEMAS), f"no case calls {set(_extension._SCHEMAS) - called.names}"
    assert references.keys() == kernels.keys()
    for name, (values, layouts) in kernels.items():
        expected, expected_layouts = references[name]
        assert len(values) == len(expected) and layouts == expected_layouts, name
        for i, (ours, plain) in enumerate(zip(values, expected)):
            atol = TOLERANCE * max(1.0, float(plain.abs().max())) if plain.is_floating_point() else 0
            torch.testing.assert_close(ours, plain, rtol=0, atol=atol, msg=lambda message: f"{name}, result {i}: {message}")


if __name__ == "__main__":
    torch.save(results(), sys.argv[1])
    print(_extension.backend())
