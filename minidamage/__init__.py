"""minidamage: damage and defect detection and segmentation, one file a paper.

`build_model(name, num_classes=K + 1, **config_fields)` makes a model, `MODELS` lists them, `load_checkpoint(path)` reads a
trained one back. Importing this builds nothing and touches no GPU.

To add a model: its file in models/, one line in MODELS, one row in tests/test_models.py.
"""
import dataclasses
import difflib
import numbers

from minidamage import config as _config
from minidamage.models import (context_cracknet, custom_segnets, custom_unets, damagenet, danet, deeplabv3, deeplabv3plus,
                               faster_rcnn, fcn, fpn, linknet, manet, mask_rcnn, pan, pspnet, unet, unetplusplus)

# name: (model class, config class, the paper's recipe, the changes that `--data demo` makes)
MODELS = {
    "damagenet": (damagenet.DamageNet, damagenet.DamageNetConfig, damagenet.RECIPE, damagenet.DEMO),
    "maskrcnn_resnet50_fpn": (mask_rcnn.MaskRCNN, mask_rcnn.MaskRCNNConfig, mask_rcnn.RECIPE, mask_rcnn.DEMO),
    "maskrcnn_resnet101_fpn": (mask_rcnn.MaskRCNN, mask_rcnn.MaskRCNNResNet101Config, mask_rcnn.RECIPE_RESNET101, mask_rcnn.DEMO),
    "maskrcnn_study_resnet50": (mask_rcnn.MaskRCNN, mask_rcnn.StudyConfig, mask_rcnn.RECIPE, mask_rcnn.DEMO),
    "maskrcnn_study_resnet101": (mask_rcnn.MaskRCNN, mask_rcnn.StudyResNet101Config, mask_rcnn.RECIPE_RESNET101, mask_rcnn.DEMO),
    "danet": (danet.DANet, danet.DANetConfig, danet.RECIPE, danet.DEMO),
    "fasterrcnn_resnet50_fpn": (faster_rcnn.FasterRCNN, faster_rcnn.FasterRCNNConfig, faster_rcnn.RECIPE, faster_rcnn.DEMO),
    "context_cracknet": (context_cracknet.ContextCrackNet, context_cracknet.ContextCrackNetConfig, context_cracknet.RECIPE,
                         context_cracknet.DEMO),
    "unet": (unet.Unet, unet.UnetConfig, unet.RECIPE, unet.DEMO),
    "unetplusplus": (unetplusplus.UnetPlusPlus, unetplusplus.UnetPlusPlusConfig, unetplusplus.RECIPE, unetplusplus.DEMO),
    "deeplabv3": (deeplabv3.DeepLabV3, deeplabv3.DeepLabV3Config, deeplabv3.RECIPE, deeplabv3.DEMO),
    "deeplabv3plus": (deeplabv3plus.DeepLabV3Plus, deeplabv3plus.DeepLabV3PlusConfig, deeplabv3plus.RECIPE, deeplabv3plus.DEMO),
    "fpn": (fpn.FPN, fpn.FPNConfig, fpn.RECIPE, fpn.DEMO),
    "pspnet": (pspnet.PSPNet, pspnet.PSPNetConfig, pspnet.RECIPE, pspnet.DEMO),
    "linknet": (linknet.Linknet, linknet.LinknetConfig, linknet.RECIPE, linknet.DEMO),
    "manet": (manet.MAnet, manet.MAnetConfig, manet.RECIPE, manet.DEMO),
    "pan": (pan.PAN, pan.PANConfig, pan.RECIPE, pan.DEMO),
    "fcn_resnet50": (fcn.FCN, fcn.FCNConfig, fcn.RECIPE, fcn.DEMO),
    "deeplabv3_resnet50": (fcn.DeepLabV3ResNet50, fcn.DeepLabV3ResNet50Config, fcn.RECIPE, fcn.DEMO_DEEPLABV3),
    "custom_segnet1": (custom_segnets.CustomSegNet1, custom_segnets.CustomConfig, custom_segnets.RECIPE, custom_segnets.DEMO_SEGNET1),
    "custom_segnet2": (custom_segnets.CustomSegNet2, custom_segnets.CustomConfig, custom_segnets.RECIPE, custom_segnets.DEMO),
    "custom_segnet3": (custom_segnets.CustomSegNet3, custom_segnets.CustomConfig, custom_segnets.RECIPE, custom_segnets.DEMO),
    "custom_unet": (custom_unets.CustomUNet, custom_segnets.CustomConfig, custom_unets.RECIPE, custom_unets.DEMO),
    "custom_unet2": (custom_unets.CustomUNet2, custom_unets.CustomUNet2Config, custom_unets.RECIPE, custom_unets.DEMO),
}


def build_model(name, num_classes, **config_fields):
    """A model with fresh weights.

    name: a key of MODELS. num_classes: classes + 1, label 0 is background. config_fields: fields of the model's config; the others
    keep the paper's values. Raises ValueError for an unknown name or field, with the nearest known one, and a value of another type.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(str(name), MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}; did you mean {near!r}?")
    if not isinstance(num_classes, numbers.Integral) or num_classes < 2:
        raise ValueError(f"num_classes: expected classes + 1 (background counts), so at least 2, got {num_classes!r}")
    model_class, config_class, _, _ = MODELS[name]
    fields = [field.name for field in dataclasses.fields(config_class)]
    for key in config_fields:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)[0]
            raise ValueError(f"{name} has no config field {key!r}; did you mean {near!r}? Fields: {', '.join(fields)}")
    return model_class(num_classes, _config.from_dict(config_class, config_fields), name)


def load_checkpoint(path, device="cpu"):
    """(model in evaluation mode, the checkpoint's dict) of a file that train.py wrote; see minidamage/checkpoint.py."""
    from minidamage.checkpoint import load_checkpoint
    return load_checkpoint(path, device)
