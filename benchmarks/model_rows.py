"""Whole models, one forward pass or one training step: ours, the peer's model of the same name with the same weights, and variants.

Other sides of a row. torchvision, smp: their model. plain: our model without the part that the row is about (Mask R-CNN beside DamageNet,
Faster R-CNN beside DANet). stock: our model with its own ops replaced by the framework's parts.
contiguous: ours in NCHW. bfloat16: ours under autocast.
"""
import dataclasses
import gc

import torch
from torch.nn import functional as F

import minidamage
from benchmarks.op_rows import random_boxes
from benchmarks.timing import DTYPES, peer
from minidamage.evaluation.complexity import CONTEXTS, typed
from minidamage.layers.segmenter import Segmenter
from minidamage.models import context_cracknet
from minidamage.ops.linear_attention import split_heads

SMP = {"unet": "Unet", "unetplusplus": "UnetPlusPlus", "deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3Plus", "fpn": "FPN",
       "pspnet": "PSPNet", "linknet": "Linknet", "manet": "MAnet", "pan": "PAN"}
PLAIN = {"damagenet": "maskrcnn_resnet50_fpn", "danet": "fasterrcnn_resnet50_fpn"}


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """One row: what is run, on pictures of size x size."""

    name: str
    size: int
    training: bool
    batch: int
    device: str
    dtype: str                                                          # bfloat16, float16: under autocast
    config: tuple = ()                                                  # ((field, value), ...) that differ from the model's defaults

    def label(self):
        what = "training step" if self.training else "inference"
        fields = f" {typed(dict(self.config))}" if self.config else ""
        return f"{self.name}{fields} {what} {self.size}x{self.size}, batch {self.batch}, {self.dtype}"


def benchmark_models(table):
    args = table.args
    sizes = ((1024, False), (1024, True)) if args.device == "cuda" else ((512, False), (1024, False), (512, True))
    detectors = [("maskrcnn_resnet50_fpn", (), ["torchvision"], sizes), ("fasterrcnn_resnet50_fpn", (), ["torchvision"], sizes)]
    detectors += [("damagenet", tuple(fields.items()), ["plain"], sizes) for fields in CONTEXTS]
    detectors += [("danet", (("phase", phase),), ["plain"], ((256, True), (256, False))) for phase in (2, 3, 4, 5)]
    segmenters = [(name, (), ["smp"], ((448, False), (448, True))) for name in SMP]
    segmenters += [(name, (), ["torchvision"], ((448, False), (448, True))) for name in ("fcn_resnet50", "deeplabv3_resnet50")]
    segmenters.append(("context_cracknet", (), ["stock", "contiguous", "bfloat16"], ((448, False), (448, True))))
    for name, config, sides, cases in detectors + segmenters:
        for size, training in cases:
            # segmenters' pooled norms need two
            batch = max(2, args.batch) if training and model_class(name).task == "segmentation" else args.batch
            case = ModelCase(name, size, training, batch, args.device, args.dtype, config)
            if not table.wants(case.label()):
                continue
            others = {side: model_call(case, side) for side in sides if table.against(side)}
            row = table.add(case.label(), model_call(case, "ours"), others)
            table.add_memory(row, "peak", **{side: f"benchmarks.model_rows:model_call(rows.{case!r}, {side!r})"
                                             for side in ("ours", *sides)})
            del others
            gc.collect()                                                # models hold gigabytes
    benchmark_cagm(table)


def model_call(case, which):
    """A callable of one forward pass or one training step; None where there is no such peer."""
    model = build(case, which)
    if model is None:
        return None
    is_detector = model_class(case.name).task == "detection"
    images, targets = (detector_inputs if is_detector else segmenter_inputs)(case)
    if which == "contiguous":
        make_contiguous(model)
    dtype = DTYPES["bfloat16" if which == "bfloat16" else case.dtype]
    autocast = torch.autocast(case.device, dtype, enabled=dtype in (torch.bfloat16, torch.float16))

    @torch.no_grad()
    def infer():
        with autocast:
            return model(images)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = sum(model(images, [dict(target) for target in targets]).values())
        loss.backward()
        optimizer.step()

    if not case.training:
        return infer
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5, momentum=0.9)
    return step


def make_contiguous(model):
    """The segmenter in NCHW: weights and pictures, for a convolution runs in channels_last where either of the two is."""
    batch = model.to(memory_format=torch.contiguous_format).batch

    def contiguous_batch(images):
        pictures, size = batch(images)
        return pictures.contiguous(), size
    model.batch = contiguous_batch


def model_class(name):
    return minidamage.MODELS[name][0]


def build(case, which):
    """One side's model with weights of one seed; None where there is no such peer. Detectors have 4 classes, segmenters one and
    background."""
    torch.manual_seed(0)
    if model_class(case.name).task == "detection":
        if which == "plain":
            case = dataclasses.replace(case, name=PLAIN[case.name], config=())
        ours = minidamage.build_model(case.name, num_classes=4, min_size=case.size, max_size=case.size, **dict(case.config))
        model = torchvision_detector(case, ours) if which == "torchvision" else ours
    else:
        ours = minidamage.build_model(case.name, num_classes=2, image_size=case.size, **dict(case.config))
        model = {"smp": smp_segmenter, "torchvision": torchvision_segmenter,
                 "stock": stock_cracknet}.get(which, lambda case, ours: ours)(case, ours)
    return model and model.to(case.device).train(case.training)


def torchvision_detector(case, ours):
    tv = peer("torchvision")
    if tv is None or not hasattr(tv.models.detection, case.name):
        return None
    # Training: frozen as ours and as theirs with published weights; without weights they would learn their norms, which is more work.
    # Evaluation: the same numbers either way, and the framework's own norm is the faster.
    norm = tv.ops.FrozenBatchNorm2d if case.training else torch.nn.BatchNorm2d
    backbone = tv.models.detection.backbone_utils.resnet_fpn_backbone(backbone_name=case.name.split("_")[1], weights=None,
                                                                      trainable_layers=5, norm_layer=norm)
    kind = tv.models.detection.MaskRCNN if case.name.startswith("maskrcnn") else tv.models.detection.FasterRCNN
    theirs = kind(backbone, 4, min_size=case.size, max_size=case.size)
    theirs.load_state_dict(ours.state_dict())                           # the names are the same: both do the same work
    return theirs


def detector_inputs(case):
    generator = torch.Generator().manual_seed(3)
    images, targets = [], []
    for _ in range(case.batch):
        images.append(torch.rand(3, case.size, case.size, generator=generator).to(case.device))
        boxes = random_boxes(8, case.size, generator, case.size / 16, case.size / 2)
        masks = torch.zeros(8, case.size, case.size, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist()):
            mask[y1:y2, x1:x2] = 1
        target = {"boxes": boxes, "labels": torch.arange(8) % 3 + 1, "masks": masks}
        targets.append({key: value.to(case.device) for key, value in target.items()})
    return images, targets


class PeerSegmenter(Segmenter):
    """A peer's network behind our contract: the same batch in, the same losses out. In channels_last, the faster layout for them too."""

    def __init__(self, ours, theirs):
        super().__init__(ours.num_classes, ours.config, ours.name)
        self.stride, self.theirs = ours.stride, theirs.to(memory_format=torch.channels_last)

    def logits(self, x):
        result = self.theirs(x)
        return result["out"] if isinstance(result, dict) else result


def smp_segmenter(case, ours):
    smp = peer("segmentation_models_pytorch")
    if smp is None:
        return None
    theirs = getattr(smp, SMP[case.name])(encoder_name="resnet50", encoder_weights=None, classes=1)
    theirs.load_state_dict(ours.state_dict())                           # here too
    return PeerSegmenter(ours, theirs)


def torchvision_segmenter(case, ours):
    tv = peer("torchvision")
    if tv is None:
        return None
    theirs = getattr(tv.models.segmentation, case.name)(weights=None, weights_backbone=None, num_classes=1, aux_loss=False)
    theirs.load_state_dict(ours.state_dict())
    return PeerSegmenter(ours, theirs)


def segmenter_inputs(case):
    generator = torch.Generator().manual_seed(4)
    images = [torch.rand(3, case.size, case.size, generator=generator).to(case.device) for _ in range(case.batch)]
    maps = [(torch.rand(case.size, case.size, generator=generator) < 0.03).to(torch.uint8).to(case.device) for _ in range(case.batch)]
    return images, [{"label_map": label_map} for label_map in maps]


# ---- CAGM, the attention block of Context-CrackNet ---------------------------------------------------------------------------------

class StockCAGM(context_cracknet.CAGM):
    """The same parameters and mathematics as its users write it: linear layers, K and V projected along the sequence,
    scaled_dot_product_attention."""

    def forward(self, x):
        B, C, H, W = x.shape
        X = x.flatten(2).transpose(1, 2)
        E, F_ = self.projections(H, W)
        normed = self.norm1(X)
        Q = split_heads(self.query(normed), self.heads)
        K = split_heads(E.mT @ self.key(normed), self.heads)                   # [B, heads, k, d]
        V = split_heads(F_.mT @ self.value(normed), self.heads)
        Z = F.scaled_dot_product_attention(Q, K, V).transpose(1, 2).flatten(2)
        X = X + self.dropout(self.output(Z))
        X = X + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(self.norm2(X))))))
        return X.transpose(1, 2).view(B, C, H, W)


def stock_cracknet(case, ours):
    ours.cagm.__class__ = StockCAGM                                     # the parameters stay
    return ours


def cagm_call(batch, training, stock, device, dtype):
    """A callable of the block alone, forward or forward and backward, on F3 of 448x448 pictures: 784 positions of 1,024 channels."""
    torch.manual_seed(0)
    block = (StockCAGM if stock else context_cracknet.CAGM)(1024, context_cracknet.ContextCrackNetConfig()).to(device).train(training)
    x = torch.randn(batch, 1024, 28, 28, device=device).to(memory_format=torch.channels_last)
    autocast = torch.autocast(device, DTYPES[dtype], enabled=dtype in ("bfloat16", "float16"))
    grad = torch.randn_like(x)

    def run():
        with autocast, torch.set_grad_enabled(training):
            out = block(x)
        if training:
            block.zero_grad(set_to_none=True)
            x.grad = None
            out.backward(grad)
    return run if not training else (x.requires_grad_(), run)[1]


def benchmark_cagm(table):
    args = table.args
    for batch in (1, 4):
        for training in (False, True):
            name = f"CAGM block {'forward+backward' if training else 'forward'} 448x448, batch {batch}, {args.dtype}"
            if table.wants(name):
                table.add(name, cagm_call(batch, training, False, args.device, args.dtype),
                          {"stock": cagm_call(batch, training, True, args.device, args.dtype)})
