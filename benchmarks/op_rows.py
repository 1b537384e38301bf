"""The ops: ours, their references, and torchvision's, or what a careful user would build from the framework's own parts ("stock").

Peers get their own best layout (NCHW); ours is timed with the layout conversion outside ("channels_last" tensors in) and, where peers
take NCHW, inside ("from NCHW").
"""
import contextlib
import math

import torch
from torch.nn import functional as F

from benchmarks.timing import DTYPES, forward_backward, peer
from minidamage import ops
from minidamage.ops.box_coding import BBOX_XFORM_CLIP, decode_boxes_reference, encode_boxes_reference
from minidamage.ops.deform_conv2d import deform_conv2d_reference
from minidamage.ops.nms import nms_reference
from minidamage.ops.roi_align import roi_align_reference


def benchmark_ops(table):
    """Ops that training runs in float32 whatever the dtype are timed in float32 alone."""
    tv = peer("torchvision")
    for part in (benchmark_roi_align, benchmark_deform_conv2d, benchmark_linear_attention):
        part(table, tv)
    if table.args.dtype == "float32":
        for part in (benchmark_nms, benchmark_box_coding, benchmark_roi_pool, benchmark_paste_masks, benchmark_focal_loss,
                     benchmark_deterministic):
            part(table, tv)


@contextlib.contextmanager
def deterministic(on=True):
    """torch.use_deterministic_algorithms for a while; without its filling of every new tensor, which is for finding bugs."""
    before, filled = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled


def random_boxes(count, extent, generator, smallest=8, largest=256):
    corner = torch.rand(count, 2, generator=generator) * (extent - smallest)
    size = smallest + torch.rand(count, 2, generator=generator) * (largest - smallest)
    return torch.cat([corner, (corner + size).clamp(max=extent)], dim=1)


def leaves(*tensors):
    return [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in tensors]


def benchmark_nms(table, tv):
    device, generator = table.args.device, torch.Generator().manual_seed(0)
    for count in (1000, 5000, 20000):
        boxes, scores = random_boxes(count, 1024, generator).to(device), torch.rand(count, generator=generator).to(device)
        for iou in (0.5, 0.7):
            reference = (lambda: nms_reference(boxes, scores, None, iou)) if count <= 5000 else None
            table.add(f"nms {count} boxes, IoU {iou}", lambda: ops.nms(boxes, scores, iou),
                      {"reference": reference, "torchvision": tv and (lambda: tv.ops.nms(boxes, scores, iou))})
    for groups, each in ((5, 1000), (80, 12)):
        count = groups * each
        boxes, scores = random_boxes(count, 1024, generator).to(device), torch.rand(count, generator=generator).to(device)
        idxs = torch.arange(groups).repeat_interleave(each).to(device)
        table.add(f"batched_nms {groups} x {each}, IoU 0.7", lambda: ops.batched_nms(boxes, scores, idxs, 0.7),
                  {"torchvision": tv and (lambda: tv.ops.batched_nms(boxes, scores, idxs, 0.7))})


def benchmark_box_coding(table, tv):
    """5,000: an image's candidates; 250,000: every anchor of a large one. stock: the reference, as the framework's own operations."""
    device, generator, weights = table.args.device, torch.Generator().manual_seed(12), (10.0, 10.0, 5.0, 5.0)
    if tv:
        from torchvision.models.detection._utils import BoxCoder
        coder = BoxCoder(weights)
    for count in (5000, 250_000):
        boxes = random_boxes(count, 1024, generator).to(device)
        truth, deltas = boxes.flip(0), torch.randn(count, 4, generator=generator).to(device)
        table.add(f"encode_boxes {count}", lambda: ops.encode_boxes(truth, boxes, weights),
                  {"torchvision": tv and (lambda: coder.encode_single(truth, boxes)),
                   "stock": lambda: encode_boxes_reference(truth, boxes, weights)}, count * 48)
        stock = lambda deltas: decode_boxes_reference(deltas, boxes, weights, BBOX_XFORM_CLIP, None)
        cut = lambda moved: tv.ops.clip_boxes_to_image(moved, (1024, 1024))
        table.add(f"decode_boxes {count} forward", lambda: ops.decode_boxes(deltas, boxes, weights),
                  {"torchvision": tv and (lambda: coder.decode_single(deltas, boxes)), "stock": lambda: stock(deltas)}, count * 48)
        table.add(f"decode_boxes {count} forward, cut at the border", lambda: ops.decode_boxes(deltas, boxes, weights, size=(1024, 1024)),
                  {"torchvision": tv and (lambda: cut(coder.decode_single(deltas, boxes))),
                   "stock": lambda: ops.clip_boxes_to_image(stock(deltas), (1024, 1024))}, count * 48)
        (a,), (b,), (c,), grad = leaves(deltas), leaves(deltas), leaves(deltas), torch.ones_like(deltas)
        table.add(f"decode_boxes {count} forward+backward", forward_backward(lambda: ops.decode_boxes(a, boxes, weights), [a], grad),
                  {"torchvision": tv and forward_backward(lambda: coder.decode_single(b, boxes), [b], grad),
                   "stock": forward_backward(lambda: stock(c), [c], grad)}, count * 112)


def in_float32(function, device, dtype):
    """`function` of torchvision, which has no bfloat16 kernels: under autocast, as in training, it converts and computes in float32."""
    def run():
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return function()
    return run


def benchmark_roi_align(table, tv):
    device, dtype, generator = table.args.device, DTYPES[table.args.dtype], torch.Generator().manual_seed(1)
    nchw = torch.randn(2, 256, 200, 200, generator=generator).to(device, dtype)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(512)[:, None], random_boxes(1024, 800, generator)], 1).to(device, dtype)
    for size in (7, 14):
        for ratio in (2, -1):
            arguments = (rois, size, 0.25, ratio)
            outputs = 1024 * 256 * size * size
            moved = (nchw.numel() + outputs) * nchw.element_size()
            name = f"roi_align (2,256,200,200) 1024 rois {size}x{size} sr {ratio if ratio > 0 else 'adaptive'}"
            level = torch.zeros(1024, dtype=torch.int64, device=device)
            reference = lambda: roi_align_reference([nhwc], rois, level, (size, size), [0.25], ratio, False)
            rivals = {"reference": reference,
                      "torchvision": tv and in_float32(lambda: tv.ops.roi_align(nchw, *arguments), device, dtype)}
            table.add(name + " forward", lambda: ops.roi_align(nhwc, *arguments), rivals, moved)
            table.add(name + " forward, from NCHW", lambda: ops.roi_align(nchw, *arguments), rivals, moved)
            a, b = nhwc.detach().clone().requires_grad_(), nchw.detach().clone().requires_grad_()
            grad = torch.randn(1024, 256, size, size, generator=generator).to(device, dtype)
            grad_nhwc = grad.contiguous(memory_format=torch.channels_last)
            theirs = tv and forward_backward(in_float32(lambda: tv.ops.roi_align(b, *arguments), device, dtype), [b], grad)
            table.add(name + " forward+backward", forward_backward(lambda: ops.roi_align(a, *arguments), [a], grad_nhwc),
                      {"torchvision": theirs}, 2 * moved)
            table.add(name + " forward+backward, from NCHW", forward_backward(lambda: ops.roi_align(b, *arguments), [b], grad),
                      {"torchvision": theirs}, 2 * moved)
    benchmark_multiscale(table, tv, generator)


def benchmark_multiscale(table, tv, generator):
    """Four pyramid levels of a 1024x1024 picture, 1,000 RoIs: what the heads of Mask R-CNN call."""
    device, dtype = table.args.device, DTYPES[table.args.dtype]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    nchw = {str(i): torch.randn(1, 256, int(1024 * s), int(1024 * s), generator=generator).to(device, dtype) for i, s in enumerate(scales)}
    nhwc = [x.contiguous(memory_format=torch.channels_last) for x in nchw.values()]
    boxes = random_boxes(1000, 1024, generator, 8, 700).to(device, dtype)
    rois = torch.cat([boxes.new_zeros(1000, 1), boxes], 1)
    levels = (4 + torch.log2((boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 224 + 1e-6)).floor().clamp(2, 5).long() - 2
    for size in (7, 14):
        pooler = tv and tv.ops.MultiScaleRoIAlign(list(nchw), size, 2)
        table.add(f"multiscale_roi_align 4 levels, 1000 rois, {size}x{size} forward",
                  lambda: ops.multiscale_roi_align(nhwc, rois, levels, size, scales, 2),
                  {"torchvision": tv and in_float32(lambda: pooler(nchw, [boxes], [(1024, 1024)]), device, dtype)})
        ours = [x.detach().clone().requires_grad_() for x in nhwc]
        theirs = {k: x.detach().clone().requires_grad_() for k, x in nchw.items()}
        grad = torch.randn(1000, 256, size, size, generator=generator).to(device, dtype)
        grad_nhwc = grad.contiguous(memory_format=torch.channels_last)
        pooled = in_float32(lambda: pooler(theirs, [boxes], [(1024, 1024)]), device, dtype)
        table.add(f"multiscale_roi_align 4 levels, 1000 rois, {size}x{size} forward+backward",
                  forward_backward(lambda: ops.multiscale_roi_align(ours, rois, levels, size, scales, 2), ours, grad_nhwc),
                  {"torchvision": tv and forward_backward(pooled, theirs.values(), grad)})


def benchmark_paste_masks(table, tv):
    device, generator = table.args.device, torch.Generator().manual_seed(2)
    masks = torch.rand(100, 1, 28, 28, generator=generator).to(device)
    boxes = random_boxes(100, 1024, generator, 16, 400).to(device)
    theirs = None
    if tv:
        from torchvision.models.detection.roi_heads import paste_masks_in_image as theirs_paste
        theirs = lambda: theirs_paste(masks, boxes, (1024, 1024))
    size = (1024, 1024)
    table.add("paste_masks 100 masks 28x28 into 1024x1024, float", lambda: ops.paste_masks_in_image(masks, boxes, size),
              {"torchvision": theirs}, 100 * 1024 * 1024 * 4)
    thresholded = theirs and (lambda: theirs() > 0.5)
    table.add("paste_masks 100 masks, bool", lambda: ops.paste_masks_bool(masks, boxes, size), {"torchvision": thresholded},
              100 * 1024 * 1024)
    table.add("paste_masks 100 masks, RLE", lambda: ops.paste_masks_rle(masks, boxes, size), {"torchvision": thresholded},
              note="(the peer stops at bool)")


def benchmark_roi_pool(table, tv):
    device, generator = table.args.device, torch.Generator().manual_seed(5)
    nchw = torch.randn(2, 256, 100, 100, generator=generator).to(device)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    rois = torch.cat([torch.arange(2.0).repeat_interleave(256)[:, None], random_boxes(512, 800, generator)], 1).to(device)
    grad = torch.randn(512, 256, 7, 7, generator=generator).to(device)
    moved = (nchw.numel() + grad.numel()) * 4
    name = "roi_pool (2,256,100,100) 512 rois 7x7"
    table.add(f"{name} forward", lambda: ops.roi_pool(nhwc, rois, 7, 0.125),
              {"torchvision": tv and (lambda: tv.ops.roi_pool(nchw, rois, 7, 0.125))}, moved)
    (a,), (b,) = leaves(nhwc), leaves(nchw)
    theirs = tv and forward_backward(lambda: tv.ops.roi_pool(b, rois, 7, 0.125), [b], grad)
    table.add(f"{name} forward+backward", forward_backward(lambda: ops.roi_pool(a, rois, 7, 0.125), [a],
                                                           grad.contiguous(memory_format=torch.channels_last)),
              {"torchvision": theirs}, 2 * moved)
    (a,), (b,) = leaves(nhwc[:1, :4, :4, :4]), leaves(nchw[:1, :4, :4, :4])
    one = torch.ones(1, 4, 1, 1, device=device)
    table.add("roi_pool (1,4,4,4) 1 roi 1x1 forward+backward, the call alone",
              forward_backward(lambda: ops.roi_pool(a, rois[:1], 1, 0.125), [a], one),
              {"torchvision": tv and forward_backward(lambda: tv.ops.roi_pool(b, rois[:1], 1, 0.125), [b], one)})


# ---- deformable convolution --------------------------------------------------------------------------------------------------------

DEFORM_SHAPES = ((2, 256, 64, 64), (2, 512, 32, 32))                    # as many channels out as in, 3x3


def deform_inputs(shape, modulated, device="cpu", dtype=torch.float32):
    """input, offset, weight, bias and mask (None in version 1): offsets of one pixel's spread, as after some training; they and the mask
    in float32."""
    N, C, H, W = shape
    generator = torch.Generator().manual_seed(6)
    draw = lambda *size: torch.randn(*size, generator=generator).to(device)
    mask = draw(N, 9, H, W).sigmoid() if modulated else None
    return draw(N, C, H, W).to(dtype), draw(N, 18, H, W), (draw(C, C, 3, 3) / math.sqrt(9 * C)).to(dtype), draw(C).to(dtype), mask


def deform_call(shape, modulated, backward, which, device="cpu", dtype="float32", graph=False):
    """A callable of one deformable convolution ("ours", "torchvision", "reference") or of the plain one ("conv2d"), on channels_last
    tensors but for torchvision and sides that end in " NCHW". graph: (output, its gradient) instead of a callable."""
    x, offset, weight, bias, mask = deform_inputs(shape, modulated, device, DTYPES[dtype])
    nhwc = which != "torchvision" and not which.endswith(" NCHW")
    if nhwc:
        x, offset, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, offset, weight))
        mask = mask if mask is None else mask.contiguous(memory_format=torch.channels_last)
    tensors = [t for t in (x, offset, weight, bias, mask) if t is not None]
    if backward or graph:
        tensors = leaves(*tensors)
        x, offset, weight, bias, mask = *tensors[:4], (tensors[4] if modulated else None)
    theirs = lambda: peer("torchvision").ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
    function = {"ours": lambda: ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask),
                "reference": lambda: deform_conv2d_reference(x, offset, mask, weight, bias, [1, 1], [1, 1], [1, 1], 1, 1),
                "torchvision": in_float32(theirs, device, DTYPES[dtype]),
                "conv2d": lambda: F.conv2d(x, weight, bias, padding=1)}[which.removesuffix(" NCHW")]
    if not (backward or graph):
        return torch.no_grad()(function)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(device)
    if nhwc:
        grad = grad.contiguous(memory_format=torch.channels_last)
    output = function()
    grad = grad.to(output.dtype)
    return (output, grad) if graph else forward_backward(function, tensors, grad)


def benchmark_deform_conv2d(table, tv):
    """Beside torchvision, and beside the plain convolution in both layouts: the floor, since all sampling comes on top of its product."""
    device, dtype = table.args.device, table.args.dtype
    for shape in DEFORM_SHAPES:
        for modulated in (False, True):
            for backward in (False, True):
                row = f"deform_conv2d {'v2' if modulated else 'v1'} {shape} 3x3 {'forward+backward' if backward else 'forward'}"
                for ours in ("ours", "ours NCHW"):
                    name = row + ", from NCHW" * (ours != "ours")
                    if table.wants(name):
                        deform_row(table, tv, name, ours, shape, modulated, backward, device, dtype)


def deform_row(table, tv, name, ours, shape, modulated, backward, device, dtype):
    N, C, H, W = shape
    sides = ["torchvision"] * bool(tv)
    if ours == "ours":
        sides += ["conv2d", "conv2d NCHW"] + ["reference"] * (not backward)
    moved = (2 * N * C * H * W + 9 * C * C) * DTYPES[dtype].itemsize + (27 if modulated else 18) * N * H * W * 4
    passes = 3 if backward else 1
    call = lambda side: deform_call(shape, modulated, backward, side, device, dtype)
    row = table.add(name, call(ours), {side: call(side) for side in sides if table.against(side)}, passes * moved,
                    passes * 2 * 9 * C * C * N * H * W)
    if row and ours == "ours":
        text = f"benchmarks.op_rows:deform_call({shape}, {modulated}, {backward}, {{!r}}, {device!r}, {dtype!r})"
        table.add_memory(row, "extra", **{side: text.format(side) for side in ("ours", "torchvision")})
        row["full_columns_MB"] = 9 * C * N * H * W * DTYPES[dtype].itemsize / 1e6
        table.keep()


# ---- linear attention --------------------------------------------------------------------------------------------------------------

LINEAR_WIDTH, LINEAR_HEADS = 256, 8


def linear_inputs(N, k, device="cpu", dtype=torch.float32, B=2):
    """x [B, N, 256], then what linear_attention takes, in its order."""
    generator, D = torch.Generator().manual_seed(10), LINEAR_WIDTH
    draw = lambda *size: torch.randn(*size, generator=generator).to(device, dtype)
    weight = lambda: draw(D, D) / math.sqrt(D)
    return [draw(B, N, D), weight(), draw(D), weight(), draw(D), weight(), draw(D), draw(N, k) / math.sqrt(N), draw(N, k) / math.sqrt(N),
            weight(), draw(D)]


def heads_of(X):
    return X.unflatten(-1, (LINEAR_HEADS, -1)).transpose(1, 2)


def stock_linear_attention(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F_, w_o, b_o, cheap):
    """linear_attention from the framework's parts. cheap: E^T X first, as ours; else the usual order, E^T (X W_K)."""
    if cheap:
        keys, values = (F.linear(P.mT @ x, w) + P.sum(0)[:, None] * b for P, w, b in ((E, w_k, b_k), (F_, w_v, b_v)))
    else:
        keys, values = E.mT @ F.linear(x, w_k, b_k), F_.mT @ F.linear(x, w_v, b_v)
    attended = F.scaled_dot_product_attention(heads_of(F.linear(x, w_q, b_q)), heads_of(keys), heads_of(values))
    return F.linear(attended.transpose(1, 2).flatten(2), w_o, b_o)


def full_attention(x, w_q, b_q, w_k, b_k, w_v, b_v, E, F_, w_o, b_o):
    """Every position attends to every other: what linear attention stands in for."""
    attended = F.scaled_dot_product_attention(*(heads_of(F.linear(x, w, b)) for w, b in ((w_q, b_q), (w_k, b_k), (w_v, b_v))))
    return F.linear(attended.transpose(1, 2).flatten(2), w_o, b_o)


def linear_call(N, k, backward, which, device="cpu", dtype="float32"):
    """A callable of one linear attention: "ours", "stock" (usual order), "cheap-order" or "full-attention"."""
    tensors = linear_inputs(N, k, device, DTYPES[dtype])
    if backward:
        tensors = leaves(*tensors)
    function = {"ours": lambda: ops.linear_attention(*tensors[:9], LINEAR_HEADS, *tensors[9:]),
                "stock": lambda: stock_linear_attention(*tensors, cheap=False),
                "cheap-order": lambda: stock_linear_attention(*tensors, cheap=True),
                "full-attention": lambda: full_attention(*tensors)}[which]
    if not backward:
        return torch.no_grad()(function)
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(11)).to(device, DTYPES[dtype])
    return forward_backward(function, tensors, grad)


def benchmark_linear_attention(table, tv):
    """With its projections: three of X, two along the sequence, one of the output. stock: matmul and scaled_dot_product_attention."""
    device, dtype, D, B = table.args.device, table.args.dtype, LINEAR_WIDTH, 2
    for k in (64, 256):
        for N in (784, 3136, 12544, 50176):
            for what, backward in (("forward", False), ("forward+backward", True)):
                name = f"linear_attention (2, {N}, {D}) k {k}, {LINEAR_HEADS} heads {what}"
                if not table.wants(name):
                    continue
                sides = ["stock", "cheap-order"] * (N < 50176) + ["full-attention"] * (N <= 3136)
                flops = (3 if backward else 1) * 2 * B * (2 * N * D * D + 2 * k * D * D + 4 * N * k * D)
                moved = (3 if backward else 1) * (2 * B * N * D + 2 * N * k + 4 * D * D) * DTYPES[dtype].itemsize
                row = table.add(name, linear_call(N, k, backward, "ours", device, dtype),
                                {side: linear_call(N, k, backward, side, device, dtype) for side in sides}, moved, flops)
                table.add_memory(row, "extra",
                                 **{side: f"benchmarks.op_rows:linear_call({N}, {k}, {backward}, {side!r}, {device!r}, {dtype!r})"
                                    for side in ("ours", "stock")})


# ---- focal losses ------------------------------------------------------------------------------------------------------------------

def benchmark_focal_loss(table, tv):
    device, generator = table.args.device, torch.Generator().manual_seed(8)
    for shape in ((536_000, 1), (1000, 91)):
        logits = torch.randn(shape, generator=generator).to(device)
        targets = (torch.rand(shape, generator=generator) < 0.05).float().to(device)
        for reduction in ("none", "sum"):
            theirs = tv and (lambda: tv.ops.sigmoid_focal_loss(logits, targets, reduction=reduction))
            moved = logits.numel() * (12 if reduction == "none" else 8)
            table.add(f"sigmoid_focal_loss {shape} {reduction} forward",
                      lambda: ops.sigmoid_focal_loss(logits, targets, reduction=reduction),
                      {"torchvision": theirs}, moved)
            (a,), (b,) = leaves(logits), leaves(logits)
            grad = torch.ones_like(logits) if reduction == "none" else torch.ones((), device=device)
            table.add(f"sigmoid_focal_loss {shape} {reduction} forward+backward",
                      forward_backward(lambda: ops.sigmoid_focal_loss(a, targets, reduction=reduction), [a], grad),
                      {"torchvision": tv and forward_backward(lambda: tv.ops.sigmoid_focal_loss(b, targets, reduction=reduction), [b],
                                                              grad)},
                      moved + logits.numel() * 12)
    logits, labels = torch.randn(1000, 91, generator=generator).to(device), torch.randint(0, 91, (1000,), generator=generator).to(device)
    (a,), (b,) = leaves(logits), leaves(logits)

    def stock(x):
        log_p = F.log_softmax(x, 1).gather(1, labels[:, None])[:, 0]
        return (-0.25 * (1 - log_p.exp()) ** 2 * log_p).sum()
    one = torch.ones((), device=device)
    table.add("softmax_focal_loss (1000, 91) sum forward", lambda: ops.softmax_focal_loss(logits, labels, reduction="sum"),
              {"stock": lambda: stock(logits)})
    table.add("softmax_focal_loss (1000, 91) sum forward+backward",
              forward_backward(lambda: ops.softmax_focal_loss(a, labels, reduction="sum"), [a], one),
              {"stock": forward_backward(lambda: stock(b), [b], one)})


# ---- what equal bytes in every run cost --------------------------------------------------------------------------------------------

def benchmark_deterministic(table, tv):
    """The deterministic backward pass alone beside the fast one: "fast" is the other side here, so 1 / ratio is what determinism costs."""
    device, generator = table.args.device, torch.Generator().manual_seed(9)
    (x,) = leaves(torch.randn(2, 256, 200, 200, generator=generator).to(device).contiguous(memory_format=torch.channels_last))
    rois = torch.cat([torch.arange(2.0).repeat_interleave(512)[:, None], random_boxes(1024, 800, generator)], 1).to(device)
    grad = torch.randn(1024, 256, 7, 7, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    graphs = {"roi_align (2,256,200,200) 1024 rois 7x7": lambda: (ops.roi_align(x, rois, 7, 0.25, 2), grad)}
    for shape in DEFORM_SHAPES:
        graphs[f"deform_conv2d v2 {shape}"] = lambda shape=shape: deform_call(shape, True, True, "ours", device, graph=True)
    for name, graph in graphs.items():
        if table.wants(f"deterministic {name} backward"):
            output, gradient = graph()
            call = lambda: output.backward(gradient, retain_graph=True)
            table.add(f"deterministic {name} backward", deterministic()(call), {"fast": deterministic(False)(call)})
