"""Small detectors and pictures that several test files share."""
import dataclasses
from unittest import mock

import numpy as np
import torch

import minidamage
from minidamage.layers import resnet

NARROW = (48, 72, 80, 96)                                                   # for resnet.WIDTHS: all different, as in the real body

# a detector that runs in milliseconds: every part is there, nothing is wide
SMALL = dict(body="resnet18", norm="group", min_size=96, max_size=128, fpn_channels=16, rpn_channels=16, anchor_sizes=(16, 24, 32, 48, 64),
             canonical_scale=56, rpn_pre_nms_top_n_train=60, rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_train=60,
             rpn_post_nms_top_n_test=30, rpn_batch_size_per_image=64, box_head_channels=64, box_batch_size_per_image=32,
             box_detections_per_img=8, mask_layers=(16, 16), mask_dim_reduced=16)


def small_fields(name):
    """SMALL without the fields that a model does not have."""
    known = {field.name for field in dataclasses.fields(minidamage.MODELS[name][1])}
    return {key: value for key, value in SMALL.items() if key in known}


def small_model(name="maskrcnn_resnet50_fpn", num_classes=3, seed=0, **fields):
    """With a narrow body: a training step takes a fraction of a ResNet-18's time. A test that builds it again from what
    it saved takes the fixture `narrow`."""
    torch.manual_seed(seed)
    with mock.patch.object(resnet, "WIDTHS", NARROW):
        return minidamage.build_model(name, num_classes, **{**small_fields(name), **fields})


def without_masks(targets):
    """Targets as a set with boxes alone gives them."""
    return [{key: value for key, value in target.items() if key != "masks"} for target in targets]


def two_pictures(seed=0):
    """(images, targets): a bright rectangle (class 1) and a dark ellipse (class 2) on noise, two sizes, uint8."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for height, width, boxes in ((96, 112, [(10, 20, 50, 60), (60, 30, 104, 80)]), (100, 96, [(30, 15, 80, 50), (12, 55, 50, 95)])):
        picture = rng.integers(90, 130, (3, height, width)).astype(np.uint8)
        y, x = np.mgrid[:height, :width] + 0.5
        masks = []
        for label, (x1, y1, x2, y2) in enumerate(boxes, start=1):
            if label == 1:
                mask = (x > x1) & (x < x2) & (y > y1) & (y < y2)
            else:
                mask = ((2 * x - x1 - x2) / (x2 - x1)) ** 2 + ((2 * y - y1 - y2) / (y2 - y1)) ** 2 < 1
            picture[:, mask] = 230 if label == 1 else 20
            masks.append(mask)
        images.append(torch.from_numpy(picture))
        targets.append({"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor([1, 2]),
                        "masks": torch.from_numpy(np.stack(masks)).to(torch.uint8)})
    return images, targets


def no_objects(image):
    """The target of a picture without damage."""
    return {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64),
            "masks": torch.zeros(0, *image.shape[-2:], dtype=torch.uint8)}


def overfit(model, images, targets, steps=90, lr=2e-3):
    """Trains on the same pictures, the rate falling to 0; returns (first total loss, mean of the last five) and leaves the model in
    evaluation mode. The samplers draw anew each step, so one step's loss alone is a matter of luck."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)
    model.train()
    history = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
    model.eval()
    return history[0], sum(history[-5:]) / 5


def overfit_until(reached, model, images, targets, steps=90, lr=2e-3, rounds=4):
    """Trains in rounds of `steps` until reached(), four rounds at most: that it learns is asked, not the luck of one round, which is
    another one on every processor. Returns (first total loss, mean of the last five of the last round, what reached() said last)."""
    first, last = overfit(model, images, targets, steps, lr)
    for _ in range(rounds - 1):
        if reached():
            break
        last = overfit(model, images, targets, steps, lr)[1]
    return first, last, reached()


def overfit_until_found(model, images, targets, steps=90, lr=2e-3, iou=0.7):
    """`overfit_until` every object is found; raises AssertionError with what was found instead. Returns the two losses."""
    first, last, found = overfit_until(lambda: all_found(model, images, targets, iou), model, images, targets, steps, lr)
    assert found, (model(images), [target["boxes"] for target in targets])
    return first, last


def all_found(model, images, targets, iou):
    """Whether every object has a detection of its class with score 0.5 and this IoU or more."""
    for result, target in zip(model(images), targets):
        ious = minidamage.ops.box_iou(target["boxes"], result["boxes"])
        fits = (result["labels"] == target["labels"][:, None]) & (result["scores"] > 0.5)
        if ious.shape[1] == 0 or (ious * fits).amax(1).min() <= iou:
            return False
    return True
