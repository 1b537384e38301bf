"""The doctor: `python -m minidamage.ops` says which tools are here, what was built and where, and tries every op.

For each op and device: what serves it (kernel or reference) and why, the largest difference from the readable reference, and
the time of one call on a small input. Exits with 1 where a kernel disagrees with its reference.
"""
import argparse
import platform
import sys
import time
import warnings

import torch

from . import _extension, _toolchain
from .box_coding import decode_boxes_backward_reference, decode_boxes_reference, encode_boxes_reference
from .deform_conv2d import (deform_conv2d_backward_input_reference, deform_conv2d_backward_weight_reference,
                            deform_conv2d_reference)
from .focal_loss import (sigmoid_focal_loss_backward_reference, sigmoid_focal_loss_reference, softmax_focal_loss_backward_reference,
                         softmax_focal_loss_reference)
from .linear_attention import linear_attention_backward_reference, linear_attention_reference
from .nms import nms_padded_reference, nms_reference
from .paste_masks import expand_boxes, paste_masks_bool_reference, paste_masks_reference, paste_masks_rle_reference
from .roi_align import roi_align_backward_reference, roi_align_reference
from .roi_pool import roi_pool_backward_reference, roi_pool_reference

TOLERANCE = 1e-3                                # of results of size 1; a wrong kernel is off by far more


def examples():
    """op name -> (reference, arguments): small inputs of the usual kind."""
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(400, 2, generator=random) * 200
    boxes = torch.cat([corner, corner + 8 + torch.rand(400, 2, generator=random) * 56], 1)
    scores, idxs = torch.rand(400, generator=random), torch.arange(400) % 5
    features = [torch.randn(2, 64, 256 // stride, 256 // stride, generator=random).contiguous(memory_format=torch.channels_last)
                for stride in (4, 8)]
    rois = torch.cat([(torch.arange(100) % 2)[:, None], boxes[:100]], 1)
    levels, scales = torch.arange(100) % 2, [1 / 4, 1 / 8]
    grad = torch.randn(100, 64, 7, 7, generator=random)
    masks, places = torch.rand(20, 1, 28, 28, generator=random), expand_boxes(boxes[:20], 28, 1)
    sizes = [feature.shape[2] for feature in features]
    small, shifts = features[1][:, :, :16, :16], torch.randn(2, 18, 16, 16, generator=random)
    factors, kernel = torch.rand(2, 9, 16, 16, generator=random), torch.randn(64, 64, 3, 3, generator=random) / 24
    deform = (small, shifts, factors, kernel, [1, 1], [1, 1], [1, 1], 1, 1)
    positions, (layer, projection) = features[1].flatten(2).transpose(1, 2), torch.randn(2, 1024, 64, generator=random) / 32
    attention = (positions, layer[:64], layer[64], layer[65:129], None, layer[129:193], None, projection, projection.flip(0), 4, None, None)
    attended, *kept = linear_attention_reference(*attention, True)
    sigmoid, softmax = (grad, grad.sigmoid(), 0.25, 2.0, 0), (features[0][0, 0, :5].T.contiguous(), idxs[:64], 0.25, 2.0, 1, -100)
    weights = [10.0, 10.0, 5.0, 5.0]
    moves = (torch.randn(400, 3, 4, generator=random), boxes[:, None], weights, 4.135, [256, 256])
    largest = roi_pool_reference(features[0], rois, [7, 7], 1 / 4)[1]
    return {
        "encode_boxes": (encode_boxes_reference, (boxes.flip(0), boxes, weights)),
        "decode_boxes": (decode_boxes_reference, moves),
        "decode_boxes_backward": (decode_boxes_backward_reference, (moves[0].flip(0), *moves)),
        "nms": (nms_reference, (boxes, scores, idxs, 0.5)),
        "nms_padded": (nms_padded_reference, (boxes, scores, idxs, 0.5, 100, scores > 0.1)),
        "multiscale_roi_align": (roi_align_reference, (features, rois, levels, [7, 7], scales, 2, False)),
        "multiscale_roi_align_backward": (roi_align_backward_reference, (grad, rois, levels, 2, sizes, sizes, scales, 2, False, True)),
        "deform_conv2d": (deform_conv2d_reference, (*deform[:4], None, *deform[4:])),
        "deform_conv2d_backward_input": (deform_conv2d_backward_input_reference, (small / 10, *deform)),
        "deform_conv2d_backward_weight": (deform_conv2d_backward_weight_reference, (small / 10, *deform)),
        "linear_attention": (linear_attention_reference, (*attention, True)),
        "linear_attention_backward": (linear_attention_backward_reference, (attended, *attention[:2], *attention[3:11], attended, *kept[:3],
                                                                            kept[4])),
        "roi_pool": (roi_pool_reference, (features[0], rois, [7, 7], 1 / 4)),
        "roi_pool_backward": (roi_pool_backward_reference, (grad, largest, rois, 2, sizes[0], sizes[0], 1 / 4, True)),
        "paste_masks": (paste_masks_reference, (masks, places, 256, 256, 1)),
        "paste_masks_bool": (paste_masks_bool_reference, (masks, places, 256, 256, 1, 0.5)),
        "paste_masks_rle": (paste_masks_rle_reference, (masks, places, 256, 256, 1, 0.5)),
        "sigmoid_focal_loss": (sigmoid_focal_loss_reference, sigmoid),
        "sigmoid_focal_loss_backward": (sigmoid_focal_loss_backward_reference, (grad, *sigmoid)),
        "softmax_focal_loss": (softmax_focal_loss_reference, softmax),
        "softmax_focal_loss_backward": (softmax_focal_loss_backward_reference, (grad[0, 0, 0, 0], *softmax)),
    }


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors(part)] if isinstance(value, (tuple, list)) else []


def to_device(value, device):
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(part, device) for part in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value


def largest_difference(ours, expected):
    """Over all outputs; infinite where shapes differ, NaN where a difference is."""
    ours, expected = tensors(ours), tensors(expected)
    if [t.shape for t in ours] != [t.shape for t in expected]:
        return float("inf")
    differences = [(a.cpu().double() - b.cpu().double()).abs().max() for a, b in zip(ours, expected) if b.numel()]
    return float(torch.stack(differences).max()) if differences else 0.0            # unlike Python's, torch's max keeps a NaN


def seconds(function, device, calls):
    """The best of some calls."""
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def answer(function):
    """What a search found, or why it found nothing."""
    try:
        return str(function())
    except (_toolchain.BuildError, ValueError) as error:
        return f"none: {error}"


def print_machine():
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    rows = [("python", f"{platform.python_version()} on {platform.machine()}"),
            ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}, {torch.get_num_threads()} threads, GPU: {gpus}"),
            ("mode", f"{answer(_extension.kernels_mode)} (MINIDAMAGE_KERNELS=auto | require | off)"),
            ("C++ compiler", answer(lambda: _toolchain.version_of(_toolchain.cxx()[0]).splitlines()[0])),
            ("processor", " ".join(_toolchain.native_flags()) or "generic code"),
            ("OpenMP", answer(lambda: (_toolchain.openmp_flags()[1] or ["none: kernels run on one thread"])[0])),
            ("nvcc", answer(lambda: "{nvcc}, CUDA {version}".format(**_toolchain.find_nvcc()))),
            ("GPU code for", answer(lambda: " ".join(_toolchain.arch_flags(_toolchain.find_nvcc()["nvcc"])[1::2]))),
            ("sources", _extension.CSRC), ("cache folder", answer(_extension.build_folder))]
    for name, value in rows:
        print(f"{name:16}{value}")


def print_libraries():
    """Builds, with the reasons where that failed. The warnings would say the same twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print(f"{'ops':16}{answer(_extension.backend)}")
        evaluation = answer(_extension.load_evaluation)
    for part, name in (("ops", "why no kernels"), ("cuda", "why not CUDA")):
        if _extension.reason(part):
            print(f"{name:16}{_extension.reason(part)}")
    print(f"{'evaluation':16}{'compiled' if evaluation.startswith('<module') else _extension.reason('evaluation') or evaluation}")


def check_op(name, device, reference, args):
    """Prints one row; returns whether the op agrees with its reference."""
    op = getattr(torch.ops.minidamage, name)
    args = to_device(args, device)
    served = torch._C._dispatch_has_kernel_for_dispatch_key(f"minidamage::{name}", device.upper())
    difference = largest_difference(op(*args), reference(*args))
    ours, plain = seconds(lambda: op(*args), device, 5), seconds(lambda: reference(*args), device, 1)
    right = difference <= TOLERANCE
    print(f"{name:32}{device:6}{'kernel' if served else 'reference':12}{difference:12.1e}{ours * 1e3:12.3f}{plain * 1e3:14.3f}"
          f"{'' if right else '   WRONG'}")
    return right


def main(argv=()):
    argparse.ArgumentParser(prog="python -m minidamage.ops", description="The kernels' doctor: versions, compilers, cache folder; then "
                            "every op on every device: what serves it, its largest difference from the reference, its time. Builds what "
                            "is missing. Exit code 1: a kernel is wrong, or required and not there.").parse_args(argv)
    print_machine()
    print_libraries()
    print(f"\n{'op':32}{'device':6} {'served by':11}{'difference':>12}{'ms':>12}{'reference ms':>14}")
    right = True
    try:
        for name, (reference, args) in examples().items():
            for device in ("cpu", "cuda") if torch.cuda.is_available() and name != "paste_masks_rle" else ("cpu",):
                right &= check_op(name, device, reference, args)
    except (_toolchain.BuildError, ValueError) as error:                     # require, and no kernel; or an unknown mode
        print(f"\nNo op runs: {error}")
        return 1
    if not right:
        print("\nA kernel disagrees with its reference. MINIDAMAGE_KERNELS=off runs the references; please report the lines above.")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
