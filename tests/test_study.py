"""The Mask R-CNN study's model as a whole: its shape, its proposals, its recipe; and that true boxes as proposals starve nobody."""
import pytest
import torch

import minidamage
import train
from detection_cases import no_objects, overfit_until, overfit_until_found, small_model, two_pictures
from minidamage.models import mask_rcnn
from minidamage.visualize.plots import read_metrics
from test_faster_rcnn import voc_set


@pytest.mark.parametrize("name, body, lr", [("maskrcnn_study_resnet50", "resnet50", 5e-4), ("maskrcnn_study_resnet101", "resnet101", 1e-4)])
def test_the_study_as_its_document_has_it(name, body, lr):
    _, config_class, recipe, _ = minidamage.MODELS[name]
    with torch.device("meta"):
        model = minidamage.build_model(name, 91)
    assert model.config == config_class() and model.config.body == body
    assert all(parameter.requires_grad for parameter in model.parameters())                      # nothing frozen, norms neither
    assert sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules()) > 50
    head = model.rpn.head
    assert head.conv[0][0].out_channels == 512 and head.cls_logits.out_channels == 9 and head.bbox_pred.out_channels == 36
    assert model.roi_heads.box_head.fc6.out_features == model.roi_heads.box_head.fc7.out_features == 1024
    assert [block[0].out_channels for block in model.roi_heads.mask_head] == [256] * 4
    assert model.roi_heads.box_roi_pool.sampling_ratio == 2 and model.roi_heads.box_roi_pool.output_size == (7, 7)
    assert (recipe.optimizer, recipe.schedule, recipe.lr, recipe.weight_decay, recipe.batch_size) == ("adamw", "cosine", lr, 1e-4, 16)
    assert recipe.clip_grad_norm > 0 and recipe.hflip == 0.5 and min(recipe.brightness, recipe.contrast, recipe.saturation) > 0
    assert model.config.proposals == "gt" and model.config.min_proposals == 30
    assert recipe == (mask_rcnn.RECIPE if body == "resnet50" else mask_rcnn.RECIPE_RESNET101)


def test_true_boxes_as_proposals_leave_the_rpn_its_own_losses():
    """The RoI heads see true boxes alone, and nothing but its own two losses reaches the RPN: it has them, and learns."""
    images, targets = two_pictures()
    model = small_model("maskrcnn_study_resnet50", proposals="gt").train()
    losses = model(images, targets)
    heads = sum(value for key, value in losses.items() if key not in ("loss_objectness", "loss_rpn_box_reg"))
    assert not any(grad is not None and grad.any() for grad in
                   torch.autograd.grad(heads, list(model.rpn.parameters()), allow_unused=True, retain_graph=True))
    assert losses["loss_objectness"] > 0 and losses["loss_rpn_box_reg"] > 0
    sum(losses.values()).backward()
    assert all(parameter.grad.any() for parameter in model.rpn.parameters())
    samples = model.roi_heads.select_training_samples(*candidates(model, images, targets))
    assert samples.valid.sum(1).tolist() == [2, 2] and (samples.labels[samples.valid] > 0).all()  # no background but of the RPN's boxes


def candidates(model, images, targets):
    batch, resized = model.prepare(images, targets)
    proposals, _ = model.rpn(model.backbone(batch.tensors), batch.tensors.shape[-2:], batch.sizes)
    return proposals, resized


def test_where_a_picture_has_no_boxes_the_rpn_steps_in():
    images, targets = two_pictures()
    model = small_model("maskrcnn_study_resnet50").train()
    proposals, resized = candidates(model, images, [targets[0], no_objects(images[1])])
    samples = model.roi_heads.select_training_samples(proposals, resized)
    assert samples.valid[0].sum() == 2 and samples.valid[1].sum() == min(32, proposals.valid[1].sum()) and not samples.labels[1].any()


def test_rpn_finds_in_evaluation_what_it_learned_beside_true_boxes():
    """Evaluation never sees truth: after training on true boxes the proposals have to be the RPN's own, and cover the objects."""
    images, targets = two_pictures()
    model = small_model("maskrcnn_study_resnet50", proposals="gt")

    def proposed():
        """The RPN's boxes of each picture, and each object's best overlap with one of them."""
        batch, resized = model.prepare(images, targets)
        found, _ = model.rpn(model.backbone(batch.tensors), batch.tensors.shape[-2:], batch.sizes)
        boxes = [boxes[valid] for boxes, valid in zip(found.boxes, found.valid)]
        return boxes, [minidamage.ops.box_iou(target["boxes"], own).amax(1).min() for target, own in zip(resized, boxes)]

    first, last, covered = overfit_until(lambda: min(proposed()[1]) > 0.6, model, images, targets, steps=70)
    assert last < 0.6 * first
    boxes, best = proposed()
    assert covered, best
    assert all(len(own) >= 30 for own in boxes)                       # min_proposals, all that a picture has slots for here


def test_the_usual_proposals_overfit_the_same_model():
    images, targets = two_pictures()
    model = small_model("maskrcnn_study_resnet50", proposals="rpn+gt")
    overfit_until_found(model, images, targets)


def test_train_and_validation_metrics_stand_side_by_side(tmp_path):
    """The study's curves, loss and accuracy of both parts: --set score_train=N adds train/ metrics and changes nothing else."""
    columns = {}
    fields = dict(body="resnet18", norm="group", min_size=64, max_size=96, fpn_channels=8, rpn_channels=8, anchor_sizes="8,16,24,32,48",
                  rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10, box_head_channels=16, box_batch_size_per_image=16)
    data = voc_set(tmp_path / "set")
    for count in (0, 3):
        settings = [word for key, value in {**fields, "score_train": count}.items() for word in ("--set", f"{key}={value}")]
        out = tmp_path / f"runs-{count}"
        assert train.main(["--model", "fasterrcnn_resnet50_fpn", "--data", str(data), "--epochs", "2", "--device", "cpu", "--out", str(out),
                           *settings]) == 0
        run, = (path for path in out.iterdir() if (path / "metrics.csv").is_file())
        columns[count] = read_metrics(run / "metrics.csv")
        assert (run / "curves.png").is_file()
    added = set(columns[3]) - set(columns[0])
    assert {"train/bbox/AP", "train/bbox/AP50"} <= added and all(name.startswith("train/bbox/") for name in added)
    for name in columns[0]:
        assert name == "seconds" or columns[0][name] == pytest.approx(columns[3][name], nan_ok=True), name
