"""One row a model: its size, its task, that it trains, predicts and travels through its config. A new model adds its row."""
import dataclasses

import pytest
import torch

import minidamage
from detection_cases import small_fields, two_pictures
from minidamage.config import Recipe, apply_settings

# name, classes + 1, parameters at the default configuration. The 50-layer Mask and Faster R-CNN have torchvision's published counts; a
# ResNet-101 has 18,992,128 parameters more than a ResNet-50, 52,224 of them in norms, which are frozen here; four classes save
# 87 * (1025 * 5 + 257) = 468,234 in the predictors, and four context blocks add 4 * (4 * 9 * 256 * 256 + 4) = 9,437,200.
ROWS = [
    ("maskrcnn_resnet50_fpn", 91, 44_401_393),
    ("maskrcnn_resnet101_fpn", 91, 63_341_297),
    # the study's RPN: 512 filters, nine anchors of five numbers; the 53,120 affine numbers of a ResNet-50's norms are trained
    ("maskrcnn_study_resnet50", 91, 44_401_393 + 2305 * 256 + 513 * 45 - 257 * 15 + 53_120),
    ("maskrcnn_study_resnet101", 91, 63_341_297 + 2305 * 256 + 513 * 45 - 257 * 15 + 53_120 + 52_224),
    ("damagenet", 4, 53_370_359),
    ("fasterrcnn_resnet50_fpn", 91, 41_755_286),
    ("danet", 7, 44_422_140),                       # by its parts in test_danet.py
]
# segmenters: name, classes + 1, parameters, and the fields that make it small
SEGMENTERS = [
    ("context_cracknet", 2, 82_050_597, dict(body="resnet18", image_size=96, sequence_size=96, attention_rank=8, attention_heads=2,
                                             feed_forward=16)),
    # segmentation_models.pytorch's counts
    ("unet", 2, 32_521_105, dict(body="resnet18", image_size=64)),
    ("unetplusplus", 2, 48_985_745, dict(body="resnet18", image_size=64, decoder_channels=(64, 32, 16, 16, 16))),
    ("deeplabv3", 2, 39_633_729, dict(body="resnet18", image_size=64, decoder_channels=32, atrous_rates=(1, 2))),
    ("deeplabv3plus", 2, 26_677_585, dict(body="resnet18", image_size=64, decoder_channels=32, atrous_rates=(1, 2))),
    ("fpn", 2, 26_116_033, dict(body="resnet18", image_size=64, pyramid_channels=32, segmentation_channels=64)),
    ("pspnet", 2, 24_300_993, dict(body="resnet18", image_size=64, decoder_channels=64)),
    ("linknet", 2, 31_177_777, dict(body="resnet18", image_size=64)),
    ("manet", 2, 147_439_993, dict(body="resnet18", image_size=64)),
    ("pan", 2, 24_259_816, dict(body="resnet18", image_size=128)),
    # torchvision's counts, without the auxiliary head
    ("fcn_resnet50", 21, 32_957_013, dict(body="resnet18", image_size=64)),
    ("deeplabv3_resnet50", 21, 39_638_869, dict(body="resnet18", image_size=64, atrous_rates=(1, 2))),
    # by hand, for four classes: a k x k convolution from a to b channels, with bias and norm, has k k a b + 3 b, the last one k k a b + b
    ("custom_segnet1", 4, 46_821_772, dict(image_size=32)),
    ("custom_segnet2", 4, 743_236, dict(image_size=64)),
    ("custom_segnet3", 4, 1_518_724, dict(image_size=64)),
    ("custom_unet", 4, 7_014_596, dict(image_size=64)),
    ("custom_unet2", 4, 7_788_740, dict(image_size=64)),
]
SMALL_FIELDS = {**{name: small_fields(name) for name, *_ in ROWS}, **{name: small for name, _, _, small in SEGMENTERS}}


def test_every_model_has_its_row():
    assert set(SMALL_FIELDS) == set(minidamage.MODELS)


@pytest.mark.parametrize("name, num_classes, params", [*ROWS, *(row[:3] for row in SEGMENTERS)])
def test_size_and_contract(name, num_classes, params):
    with torch.device("meta"):                                        # counted, not filled
        model = minidamage.build_model(name, num_classes=num_classes)
    assert sum(p.numel() for p in model.parameters()) == params
    assert model.name == name and model.num_classes == num_classes and model.task in ("detection", "segmentation")
    model_class, config_class, recipe, demo = minidamage.MODELS[name]
    assert type(model) is model_class and type(model.config) is config_class and isinstance(recipe, Recipe)
    dataclasses.replace(recipe, **demo["recipe"])
    assert dataclasses.replace(model.config, **demo["config"]) != model.config


def pictures_for(model):
    """(images, targets) of the model's task; a segmenter's are of one size, with a label map."""
    images, targets = two_pictures()
    if model.task == "detection":
        return images, targets
    size = tuple(min(sides) for sides in zip(*(image.shape[-2:] for image in images)))
    images = [image[:, :size[0], :size[1]] for image in images]
    labels = [(target["masks"] * target["labels"].view(-1, 1, 1).to(torch.uint8)).amax(0) for target in targets]
    return images, [{"label_map": label[:size[0], :size[1]]} for label in labels]


@pytest.mark.parametrize("name", SMALL_FIELDS)
def test_config_rebuilds_the_model(name, narrow):
    model = minidamage.build_model(name, 3, **SMALL_FIELDS[name]).eval()
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(model.config).items()}       # as JSON brings it
    twin = minidamage.build_model(name, 3, **fields).eval()
    assert twin.config == model.config
    twin.load_state_dict(model.state_dict())
    images, _ = pictures_for(model)
    for a, b in zip(model(images), twin(images)):
        same = [torch.equal(a[key], b[key]) for key in a] if model.task == "detection" else [torch.equal(a, b)]
        assert all(same)


@pytest.mark.filterwarnings("ignore:Context-CrackNet. E and F")
@pytest.mark.parametrize("name", SMALL_FIELDS)
def test_demo_configuration_trains_a_step(name, narrow):
    config = minidamage.MODELS[name][3]["config"]
    model = minidamage.build_model(name, 4, **config).train()
    images, targets = pictures_for(model)
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())


def test_settings_reach_the_config():
    config = minidamage.MODELS["damagenet"][1]()
    changed = apply_settings(config, ["rpn_nms_thresh=0.6", "context_rates=1,2", "fpn=off"])
    assert (changed.rpn_nms_thresh, changed.context_rates, changed.fpn) == (0.6, (1, 2), False)


@pytest.mark.parametrize("fields, message", [
    (dict(mask_threshold=7.0), "mask_threshold: expected from 0 to 1, got 7.0"),
    (dict(rpn_nms_thresh=float("nan")), "rpn_nms_thresh: expected from 0 to 1, got nan"),
    (dict(anchor_sizes=()), "anchor_sizes: expected one or more numbers above 0, such as 32,64,.*, got none"),
    (dict(aspect_ratios=(1.0, -1.0)), "aspect_ratios: expected one or more numbers above 0"),
    (dict(bbox_reg_weights=(1.0, 1.0)), "bbox_reg_weights: expected 4 numbers above 0"),
    (dict(image_mean=(0.5,)), "image_mean: expected 3 numbers"),
    (dict(mask_layers=()), "mask_layers: expected one or more"),
    (dict(box_detections_per_img=0), "box_detections_per_img: expected 1 or more, got 0"),
    (dict(min_size=900, max_size=800), "max_size: expected at least min_size = 900, got 800"),
    (dict(sampling_ratio=-1), "sampling_ratio: expected 0 or more, got -1"),
    (dict(box_bg_iou_thresh=0.6), "box_bg_iou_thresh: expected at most box_fg_iou_thresh = 0.5, got 0.6"),
])
@pytest.mark.parametrize("name", [name for name, *_ in ROWS])
def test_values_that_no_detector_can_have(name, fields, message):
    if not fields.keys() <= {field.name for field in dataclasses.fields(minidamage.MODELS[name][1])}:
        message = "has no config field"                          # a detector without a mask branch says so
    with pytest.raises(ValueError, match=message):
        minidamage.build_model(name, 3, **fields)


@pytest.mark.parametrize("field, value", [("island_share", 1.5), ("loss_weight_mask", -1.0), ("loss_weight_cls", float("nan"))])
def test_values_that_no_damagenet_can_have(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        minidamage.build_model("damagenet", 3, **{field: value})


def test_mistakes_name_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'damagenet'"):
        minidamage.build_model("damage_net", 3)
    with pytest.raises(ValueError, match="did you mean 'rpn_nms_thresh'"):
        minidamage.build_model("damagenet", 3, rpn_nms_tresh=0.5)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        minidamage.build_model("damagenet", 1)


@pytest.mark.parametrize("fields, message", [
    (dict(min_size=(480, 512)), r"min_size: expected int, got \(480, 512\) \(tuple\)"), (dict(min_size=480.5), "min_size: expected int"),
    (dict(fpn="false"), "fpn: expected bool, got 'false'"), (dict(fill_holes=2), "fill_holes: expected bool"),
    (dict(box_nms_thresh="0.5"), "box_nms_thresh: expected float"), (dict(anchor_sizes=32), r"anchor_sizes: expected tuple\[int"),
    (dict(anchor_sizes=(32, 64.5)), "anchor_sizes: expected"), (dict(body=None), "body: expected str"),
    (dict(num_classes="3"), "num_classes: expected classes . 1 .* got '3'"), (dict(minsize=3), "did you mean 'min_size'")])
def test_a_value_of_another_type_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        minidamage.build_model("damagenet", **{"num_classes": 3, **fields})
