"""Numbers printed in the papers, to stand beside ours: each dict says its table. Nothing here was measured by this project."""

# DANet, Table 3: AP50 in percent by class, and their mean. Rows are the phases of Table 2.
DANET_CLASSES = ("crazing", "inclusion", "patches", "pitted_surface", "rolled-in_scale", "scratches")
DANET = {
    1: (34.10, 73.40, 80.93, 75.29, 49.93, 91.95, 67.60),
    2: (36.91, 74.49, 84.79, 77.32, 59.31, 97.66, 71.74),
    3: (46.89, 75.57, 88.92, 80.28, 63.23, 97.33, 75.47),
    4: (52.11, 79.60, 87.19, 83.40, 63.08, 97.35, 77.12),
    5: (51.42, 79.49, 92.43, 81.04, 68.22, 96.93, 78.27),
}

# DANet, Table 4: AP50 in percent of other detectors on NEU-DET.
DANET_PEERS = {"YOLO-v5": 63.36, "RetinaNet": 59.69, "CenterNet": 51.83, "DETR": 76.82, "FCOS": 73.9, "TridentNet": 77.0}

# AP50 in percent that others have published on NEU-DET: the highest, from to, and an independent run of a strong one-stage detector.
NEU_DET_BEST = (81, 83)
NEU_DET_ELSEWHERE = 77.0

# DANet, section IV.D, in the text: mAP in percent on 2,000 pictures of Pascal VOC, phases 1 and 5; at which IoU is not stated.
DANET_VOC = {1: 37.2, 5: 57.4}

# Context-CrackNet, Table 3: IoU, Dice, recall, precision by data set and model.
CRACKS = {
    "CFD": {
        "deeplabv3": (0.3194, 0.4842, 0.5065, 0.4638),
        "deeplabv3plus": (0.3848, 0.5558, 0.5039, 0.6195),
        "fpn": (0.4187, 0.5902, 0.5033, 0.7134),
        "linknet": (0.4664, 0.6362, 0.5951, 0.6833),
        "manet": (0.5174, 0.6819, 0.6901, 0.6740),
        "pan": (0.3904, 0.5616, 0.4614, 0.7173),
        "pspnet": (0.3558, 0.5244, 0.4084, 0.7322),
        "unet": (0.1562, 0.2703, 0.8370, 0.1611),
        "unetplusplus": (0.5257, 0.6891, 0.6653, 0.7147),
        "context_cracknet": (0.5668, 0.7235, 0.8989, 0.6054),
    },
    "CRACK500": {
        "deeplabv3": (0.6420, 0.7817, 0.7612, 0.8035),
        "deeplabv3plus": (0.6376, 0.7784, 0.7529, 0.8060),
        "fpn": (0.6317, 0.7740, 0.7460, 0.8047),
        "linknet": (0.6450, 0.7839, 0.7855, 0.7827),
        "manet": (0.6341, 0.7757, 0.7408, 0.8142),
        "pan": (0.6231, 0.7674, 0.7271, 0.8132),
        "pspnet": (0.6197, 0.7649, 0.7058, 0.8356),
        "unet": (0.6397, 0.7800, 0.7496, 0.8133),
        "unetplusplus": (0.6444, 0.7835, 0.7714, 0.7960),
        "context_cracknet": (0.6733, 0.8046, 0.7967, 0.8129),
    },
    "CrackTree200": {
        "deeplabv3": (0.3174, 0.4819, 0.4305, 0.5471),
        "deeplabv3plus": (0.2789, 0.4361, 0.3823, 0.5077),
        "fpn": (0.2958, 0.4566, 0.3736, 0.5869),
        "linknet": (0.4807, 0.6493, 0.6063, 0.5770),
        "manet": (0.4197, 0.5913, 0.6063, 0.5770),
        "pan": (0.2765, 0.4333, 0.3532, 0.5602),
        "pspnet": (0.2927, 0.4528, 0.3757, 0.5697),
        "unet": (0.4857, 0.6539, 0.7022, 0.6118),
        "unetplusplus": (0.4257, 0.5972, 0.6179, 0.5778),
        "context_cracknet": (0.5375, 0.6992, 0.9386, 0.5571),
    },
    "DeepCrack": {
        "deeplabv3": (0.6813, 0.8102, 0.8246, 0.7963),
        "deeplabv3plus": (0.6639, 0.7977, 0.7570, 0.8433),
        "fpn": (0.6783, 0.8081, 0.7706, 0.8387),
        "linknet": (0.7047, 0.8267, 0.8402, 0.8137),
        "manet": (0.7007, 0.8238, 0.8502, 0.7991),
        "pan": (0.6353, 0.7902, 0.7444, 0.8421),
        "pspnet": (0.6582, 0.7936, 0.7761, 0.8120),
        "unet": (0.7061, 0.8275, 0.8231, 0.8320),
        "unetplusplus": (0.7168, 0.8349, 0.8324, 0.8374),
        "context_cracknet": (0.7401, 0.8505, 0.9175, 0.7926),
    },
    "Eugen Miller": {
        "deeplabv3": (0.6312, 0.7739, 0.8696, 0.6971),
        "deeplabv3plus": (0.6051, 0.7540, 0.7717, 0.7371),
        "fpn": (0.4763, 0.6452, 0.5366, 0.8091),
        "linknet": (0.6024, 0.7519, 0.7473, 0.7565),
        "manet": (0.5887, 0.7411, 0.6777, 0.8176),
        "pan": (0.5794, 0.7337, 0.7198, 0.7482),
        "pspnet": (0.6058, 0.7545, 0.7311, 0.7794),
        "unet": (0.6323, 0.7747, 0.7728, 0.7767),
        "unetplusplus": (0.7060, 0.8277, 0.8689, 0.7902),
        "context_cracknet": (0.6627, 0.7971, 0.9434, 0.6901),
    },
    "Forest": {
        "deeplabv3": (0.4826, 0.6510, 0.6151, 0.6915),
        "deeplabv3plus": (0.4616, 0.6316, 0.5473, 0.7465),
        "fpn": (0.4356, 0.6069, 0.5352, 0.7007),
        "linknet": (0.4857, 0.6538, 0.6664, 0.6417),
        "manet": (0.5170, 0.6816, 0.6650, 0.6990),
        "pan": (0.4579, 0.6281, 0.5605, 0.7143),
        "pspnet": (0.3848, 0.5557, 0.4687, 0.6825),
        "unet": (0.5390, 0.7005, 0.6723, 0.7311),
        "unetplusplus": (0.5457, 0.7061, 0.6896, 0.7234),
        "context_cracknet": (0.5699, 0.7261, 0.8758, 0.6201),
    },
    "GAPs": {
        "deeplabv3": (0.3704, 0.5405, 0.4694, 0.6393),
        "deeplabv3plus": (0.3153, 0.4785, 0.4142, 0.5679),
        "fpn": (0.3071, 0.4699, 0.3729, 0.6353),
        "linknet": (0.4007, 0.5721, 0.5430, 0.6050),
        "manet": (0.3832, 0.5540, 0.5196, 0.5937),
        "pan": (0.2758, 0.4323, 0.3200, 0.6668),
        "pspnet": (0.2898, 0.4491, 0.3518, 0.6237),
        "unet": (0.3837, 0.5545, 0.4809, 0.6548),
        "unetplusplus": (0.3927, 0.5637, 0.4894, 0.6669),
        "context_cracknet": (0.4743, 0.6433, 0.7838, 0.5456),
    },
    "Rissbilder": {
        "deeplabv3": (0.5965, 0.7471, 0.7442, 0.7502),
        "deeplabv3plus": (0.5653, 0.7221, 0.7057, 0.7395),
        "fpn": (0.5819, 0.7356, 0.7153, 0.7572),
        "linknet": (0.6068, 0.7552, 0.7632, 0.7476),
        "manet": (0.6365, 0.7777, 0.8104, 0.7477),
        "pan": (0.5416, 0.7024, 0.6403, 0.7783),
        "pspnet": (0.5042, 0.6700, 0.6146, 0.7381),
        "unet": (0.6456, 0.7845, 0.8105, 0.7602),
        "unetplusplus": (0.6568, 0.7926, 0.8233, 0.7644),
        "context_cracknet": (0.6553, 0.7916, 0.8469, 0.7432),
    },
    "Sylvie": {
        "deeplabv3": (0.6642, 0.7982, 0.7377, 0.8696),
        "deeplabv3plus": (0.6505, 0.7882, 0.6964, 0.9079),
        "fpn": (0.5966, 0.7474, 0.6570, 0.8666),
        "linknet": (0.6449, 0.7842, 0.7481, 0.8238),
        "manet": (0.6263, 0.7702, 0.6899, 0.8718),
        "pan": (0.6074, 0.7558, 0.6869, 0.8401),
        "pspnet": (0.5481, 0.7081, 0.5841, 0.8989),
        "unet": (0.6577, 0.7935, 0.7622, 0.8275),
        "unetplusplus": (0.6718, 0.8037, 0.7804, 0.8284),
        "context_cracknet": (0.6846, 0.8128, 0.8429, 0.7847),
    },
    "Volker": {
        "deeplabv3": (0.7209, 0.8378, 0.8280, 0.8479),
        "deeplabv3plus": (0.6872, 0.8146, 0.8046, 0.8249),
        "fpn": (0.7028, 0.8254, 0.7994, 0.8534),
        "linknet": (0.7233, 0.8394, 0.8841, 0.7990),
        "manet": (0.7422, 0.8520, 0.8543, 0.8497),
        "pan": (0.6796, 0.8092, 0.7720, 0.8504),
        "pspnet": (0.6870, 0.8144, 0.7905, 0.8400),
        "unet": (0.7464, 0.8548, 0.8574, 0.8523),
        "unetplusplus": (0.7641, 0.8663, 0.8983, 0.8365),
        "context_cracknet": (0.7668, 0.8680, 0.9002, 0.8381),
    },
}

# Context-CrackNet, Table 6: IoU without and with its two modules; which set is not said, the numbers are Table 3's of GAPs.
CRACKS_ABLATION = {"neither": 0.4259, "RFEM alone": 0.4355, "CAGM alone": 0.4263, "both": 0.4743}

# DamageNet, section V: its numbers on 5,200 VehiDE pictures, and in points what each part is worth.
DAMAGENET = {"box mAP": 85.7, "mask mIoU": 82.3}
DAMAGENET_MASK_RCNN = {"box mAP": -6.2, "mask mIoU": -7.8}
DAMAGENET_ABLATION = {"mIoU without dilation": -4.5, "recall of small damage without the pyramid": -5.7,
                      "mask F without post-processing": -3.2, "mIoU under extreme occlusion": -2.8}

# Mask AP50 in percent of an independent run of a modern segmenter on the public VehiDE, all 13,945 pictures.
VEHIDE_ELSEWHERE = 44.8

# The Mask R-CNN study: "accuracy" in percent, by a rule that it does not state, training / validation, by body, pictures and epochs.
STUDY_ACCURACY = {"ResNet-50, 20,000 pictures, 30 epochs": "40 / 38", "50,000, 50": "48 / 45", "50,000, 100": "54 / 46",
                  "80,000, 100": "55 / 46", "ResNet-101": "43 / 40, 49 / 46, 53 / 47"}

# The car-damage segmentation project, sections 6.1.1.1 and 6.1.1.2: Dice, IoU and accuracy on its validation part after 5 epochs with the
# first set of hyper-parameters (A in models/fcn.py) on 40 % of the training pictures.
SEGMENTERS = {
    "fcn_resnet50": (0.4201, 0.3321, 0.7491),
    "deeplabv3_resnet50": (0.3987, 0.3405, 0.7811),
}
