"""Every training run behind a table of this project, as data, and the tables: what stands in their columns, and the papers' numbers."""
import dataclasses

import published


@dataclasses.dataclass(frozen=True)
class Run:
    """One training and the table rows that come from it."""

    name: str
    table: str
    train: str                          # arguments of train.py; {data} is MINIDAMAGE_DATA
    rows: dict                          # row of the table -> further arguments of evaluate.py; {run} is the run's folder
    hardware: str                       # "cpu": fits two cores; "gpu": waits for a card
    minutes: tuple = (None, None)       # expected on two CPU cores, on an H100-class GPU; None: not known yet
    peer: str = ""                      # the package whose model it is, trained through results/peers.py; "": ours


@dataclasses.dataclass(frozen=True)
class Table:
    """paper: where the paper has it, "" where it prints no table of it.
    columns: heading -> where the number lies in evaluate.py's results.json, or an interval (low, high).
    printed: row -> the paper's numbers, in the columns' order.
    waits: what else it waits for than a GPU.
    tested: metrics in which the first row is held against each other one on the same pictures, as by evaluate.py --compare;
    rivals: the rows that this is about, the first among them, and that Holm's correction counts; (): all."""

    title: str
    columns: dict
    paper: str = ""
    printed: dict = dataclasses.field(default_factory=dict)
    percent: bool = False               # the paper prints hundredths
    note: str = ""
    waits: str = ""
    tested: tuple = ()
    rivals: tuple = ()


def seeded(name, seed):
    return name if seed == 0 else f"{name}-seed{seed}"


# ---- cars: DamageNet's ablation ----------------------------------------------------------------------------------------------------

# A reduced schedule that fits two CPU cores, the same for every row: ResNet-18 body (ImageNet weights without the last stage), pictures
# at 320 px, narrow heads, bfloat16. The paper's is 280 epochs at 1024 px on 3,640 pictures, the body not stated.
CARS_SMALL = ("--size 320 --batch-size 4 --epochs 14 --lr 3e-4 --clip 5 --amp bf16 --split 70/15/15 --select segm/AP50 "
              "--pretrained {data}/weights/resnet18_bnfolded_conv1_to_layer3_fp16.pth "
              "--set optimizer=adamw --set schedule=cosine --set warmup_iters=100 "
              "--set body=resnet18 --set fpn_channels=128 --set rpn_channels=128 --set box_head_channels=512 --set mask_layers=128,128 "
              "--set mask_dim_reduced=128 --set anchor_sizes=16,32,64,128,256 --set canonical_scale=112 --set box_batch_size_per_image=64 "
              "--set rpn_pre_nms_top_n_train=300 --set rpn_post_nms_top_n_train=300 "
              "--set rpn_pre_nms_top_n_test=300 --set rpn_post_nms_top_n_test=300")
# The same comparison at the paper's size, from the AugNet ResNet-50 body (trained without labels; the paper's weights are not stated).
CARS_FULL = ("--size 1024 --batch-size 8 --epochs 48 --amp bf16 --split 70/15/15 --pretrained {data}/weights/resnet50_augnet.pth "
             "--set norm=frozen --set warmup_iters=200")
NO_POST = "--set fill_holes=false --set remove_islands=false --set mask_threshold=0.5"
# The paper's claim under occlusion: patches over a share of each finding, see evaluation/occlusion.py.
OCCLUDED = {"a tenth occluded": "--occlude 0.1", "a quarter occluded": "--occlude 0.25"}


# What the paper leaves open in its context (section III.A), and what each choice gains; `evaluate.py --complexity` says what it costs.
CONTEXTS = {"depthwise": ("depthwise context", "--set context_groups=256"), "rates-124": ("rates 1, 2, 4", "--set context_rates=1,2,4"),
            "levels-45": ("context on c4 and c5", "--set context_levels=4,5")}


def car_runs(prefix, schedule, hardware, data, seeds, minutes, contexts=()):
    """DamageNet's ablation (the paper's section V) on a car set: three trainings a seed, nine rows; and one more for each of CONTEXTS."""
    runs = []
    for seed in seeds:
        base = f"--data {data} {schedule} --seed {seed}"
        runs += [Run(seeded(f"{prefix}-damagenet", seed), prefix, f"--model damagenet {base}",
                     {"DamageNet": "", "DamageNet, no post-processing": NO_POST,
                      **{f"DamageNet, {what}": flags for what, flags in OCCLUDED.items()}}, hardware, minutes),
                 Run(seeded(f"{prefix}-no-dilation", seed), prefix, f"--model damagenet {base} --set context=false",
                     {"no dilation": "", "Mask R-CNN (no dilation, no post-processing)": NO_POST,
                      **{f"Mask R-CNN, {what}": f"{NO_POST} {flags}" for what, flags in OCCLUDED.items()}}, hardware, minutes),
                 Run(seeded(f"{prefix}-no-fpn", seed), prefix, f"--model damagenet {base} --set fpn=false",
                     {"no FPN": ""}, hardware, minutes),
                 *(Run(seeded(f"{prefix}-{name}", seed), prefix, f"--model damagenet {base} {CONTEXTS[name][1]}", {CONTEXTS[name][0]: ""},
                       hardware, minutes) for name in contexts)]
    return runs


CAR_COLUMNS = {"box AP": "stats/bbox/AP", "box AP50": "stats/bbox/AP50", "mask AP": "stats/segm/AP", "mask AP50": "stats/segm/AP50",
               "mean IoU of correct findings": "at_thresholds/all/matched IoU", "mask F1 at the scores in use": "at_thresholds/all/F1",
               "mIoU over classes": "pixels/pixel/mIoU", "small-object recall (mask ARs)": "stats/segm/ARs",
               "pixel IoU, any damage": "pixels/pixel/IoU",
               "undamaged with a finding": "false_alarms/with findings",     # no time: benchmark.py measures it, on a quiet machine
               "mask AP, 95 % over pictures": "intervals/segm/AP"}
CAR_TESTED = ("segm/AP", "pixel/mIoU")

# ---- steel: DANet's phases ---------------------------------------------------------------------------------------------------------

# The paper's schedule (30 epochs, batch 4, SGD 0.02, steps at 20 and 28) at our 400 px, from the AugNet body: the paper's was trained on
# COCO, which is not at hand.
NEU = "--model danet --data {data}/neu_det"
NEU_FULL = f"{NEU} --amp bf16 --pretrained {{data}}/weights/resnet50_augnet.pth"
# Reduced to fit two CPU cores: the same parts at 192 px with fewer candidates, 5 epochs with the steps near their shares of the run. The
# anchors fit the boxes on the grid of their level (mean best IoU .64; 8 to 128, one octave a level, .53, and phase 5 stood still).
NEU_SMALL = (f"{NEU} --size 192 --epochs 5 --amp bf16 --pretrained {{data}}/weights/resnet50_augnet.pth --set milestones=3,4 "
             "--set anchor_sizes=24,40,64,96,144 --set canonical_scale=56 --set warmup_iters=200 --set frozen_stages=2 "
             "--set box_batch_size_per_image=64 "
             "--set rpn_pre_nms_top_n_train=300 --set rpn_post_nms_top_n_train=300 --set rpn_pre_nms_top_n_test=300 "
             "--set rpn_post_nms_top_n_test=150 --clip 10")
# Between the two, minutes on a GPU: the paper's size, 12 epochs of 162 steps, the rate at the paper's batch.
NEU_SHORT = (f"{NEU_FULL} --epochs 12 --batch-size 8 --lr 0.02 --clip 10 --set milestones=8,11 --set warmup_iters=200")
# Ours: DCNv2, anchors from the boxes, the cosine, twice the epochs, averaged weights, both flips.
NEU_BEST = (f"{NEU} --size 512 --epochs 60 --batch-size 8 --amp bf16 --anchors auto --ema 0.9995 --set dcn_modulated=true "
            "--set schedule=cosine --set vflip=0.5 --set loss_weight_cls=4")
PHASES = {1: "1 Faster R-CNN", 2: "2 + FPN", 3: "3 + DCN", 4: "4 + CBAM", 5: "5 DANet (+ focal loss)"}


# The focal loss of phase 5 is a mean over the candidates times alpha = 0.25; without a factor the classifier would learn four times slower.
# No document says so: the note of each table does.
FOCAL = {5: " --set loss_weight_cls=4"}


def steel_runs(prefix, schedule, hardware, phases, seeds, minutes):
    return [Run(seeded(f"{prefix}-phase{phase}", seed), prefix, f"{schedule} --seed {seed} --set phase={phase}{FOCAL.get(phase, '')}",
                {PHASES[phase]: ""}, hardware, minutes) for seed in seeds for phase in phases]


STEEL_COLUMNS = {**{name: f"per_class/{name}/bbox/AP50" for name in published.DANET_CLASSES}, "mean AP50": "stats/bbox/AP50",
                 "AP50, VOC all points": "voc/bbox/all-point/mean", "AP .5:.95": "stats/bbox/AP",
                 "mean AP50, 95 % over pictures": "intervals/bbox/AP50"}
STEEL_PRINTED = {PHASES[phase]: numbers for phase, numbers in published.DANET.items()}

# The text's Pascal VOC row: "a subset of 2000 images", year and split not stated. Here VOC2007's own lists (its trainval and its test
# archive unpacked into one folder): 2,001 of train's 2,501, and all 4,952 of test. Size and anchors as Faster R-CNN had them there.
VOC_FULL = ("--model danet --data {data}/VOC2007 --limit 0.8 --amp bf16 --pretrained {data}/weights/resnet50_augnet.pth "
            "--set min_size=600 --set max_size=1000 --set anchor_sizes=32,64,128,256,512 --set aspect_ratios=0.5,1,2 "
            "--set canonical_scale=224")
VOC_COLUMNS = {"mean AP50": "stats/bbox/AP50", "AP50, VOC all points": "voc/bbox/all-point/mean", "AP .5:.95": "stats/bbox/AP"}
VOC_PRINTED = {PHASES[phase]: (number,) for phase, number in published.DANET_VOC.items()}

# ---- cracks ------------------------------------------------------------------------------------------------------------------------

BASELINES = ("deeplabv3", "deeplabv3plus", "fpn", "linknet", "manet", "pan", "pspnet", "unet", "unetplusplus")
CRACK_SETS = {"cfd": ("{data}/cfd", "CFD"), "deepcrack": ("{data}/deepcrack", "DeepCrack"),
              "cracks448": ("{data}/cracks448", "eight more sets, 204 pictures, pooled")}
LEADING = ("context_cracknet", "unet", "unetplusplus")               # the three that no comparison leaves out
# One schedule for all ten models, equal in steps: the paper's 1,000 epochs of ten models do not fit.
CRACKS_FULL = "--epochs 60 --batch-size 8 --amp bf16 --set schedule=cosine"
# Minutes on a GPU, 660 (CFD) and 680 steps of eight pictures at the models' own 448 px; the rate of the quick rows below.
CRACKS_SHORT = "--batch-size 8 --amp bf16 --lr 1e-3 --set schedule=cosine --set warmup_iters=20"
SHORT_EPOCHS = {"cfd": 60, "deepcrack": 20}
CRACKS_SMALL = "--size 256 --epochs 30 --batch-size 4 --amp bf16 --lr 2e-4 --set schedule=cosine --set warmup_iters=20"
# Short enough for all thirteen on two CPU cores: some 150 steps, the same for every model of a set. The rate is from U-Net's validation
# part of CrackForest after 7 epochs (IoU .37 at 1e-3, .22 at 4e-4).
CRACKS_QUICK = "--size 224 --batch-size 4 --amp bf16 --lr 1e-3 --set schedule=cosine --set warmup_iters=20"
QUICK_EPOCHS = {"cfd": 7, "deepcrack": 2, "cracks448": 4}
LONGER = 4                                                           # times DeepCrack's, for the leading three: what the schedule is worth
FROM_AUGNET = "--pretrained {data}/weights/resnet50_augnet.pth"
CRACK_NAMES = {"context_cracknet": "Context-CrackNet", "deeplabv3": "DeepLabV3", "deeplabv3plus": "DeepLabV3+", "fpn": "FPN",
               "linknet": "LinkNet", "manet": "MAnet", "pan": "PAN", "pspnet": "PSPNet", "unet": "U-Net", "unetplusplus": "U-Net++"}
ABLATION = {"no-rfem": ("without RFEM", "--set rfem=false"), "no-cagm": ("without CAGM", "--set cagm=false"),
            "neither": ("without either", "--set rfem=false --set cagm=false")}


def crack_runs(prefix, schedule, hardware, which, models, seeds, minutes, ablation=False, scratch=False):
    """The ten models, or some, on one set; with the ablation of Table 6, and the leading models from random weights too."""
    data, _ = CRACK_SETS[which]
    runs = []
    for seed in seeds:
        base = f"--data {data} {schedule} {FROM_AUGNET} --seed {seed}"
        runs += [Run(seeded(f"{prefix}-{which}-{model.replace('_', '-')}", seed), f"{prefix}-{which}", f"--model {model} {base}",
                     {CRACK_NAMES[model]: ""}, hardware, minutes) for model in models]
        if scratch:
            runs += [Run(seeded(f"{prefix}-{which}-{model.replace('_', '-')}-scratch", seed), f"{prefix}-{which}",
                         f"--model {model} {base.replace(f' {FROM_AUGNET}', '')}", {f"{CRACK_NAMES[model]}, from scratch": ""}, hardware,
                         minutes) for model in LEADING]
        if ablation:
            runs += [Run(seeded(f"{prefix}-{which}-{name}", seed), f"{prefix}-{which}", f"--model context_cracknet {base} {switches}",
                         {f"Context-CrackNet, {what}": ""}, hardware, minutes) for name, (what, switches) in ABLATION.items()]
    return runs


# At the model's size and the threshold chosen on validation, as the paper's numbers seem to be; then the same otherwise. {in_use}: that
# threshold's name in results.json.
AT = "sizes/model/points/{in_use}/stats/pixel/"
CRACK_COLUMNS = {"IoU": AT + "IoU", "Dice": AT + "Dice", "recall": AT + "recall", "precision": AT + "precision",
                 "IoU at 0.5": "sizes/model/points/at 0.5/stats/pixel/IoU", "IoU, native size": AT.replace("model", "native") + "IoU",
                 "F1 within 2 px, native": "sizes/native/points/{in_use}/stats/tolerance 2 px/F1",
                 "IoU, 95 % over pictures": AT.replace("stats/", "intervals/") + "IoU", "epoch": "epoch"}
CRACK_NOTE = ("Bodies start from AugNet weights (trained without labels), where a row does not say \"from scratch\"; the paper's from "
              "ImageNet's. The tested rows are the nine baselines; the paper's ablation, on another set (IoU): "
              + ", ".join(f"{what} {number:.4f}" for what, number in published.CRACKS_ABLATION.items()) + ".")
QUICK_NOTE = (" The epoch is the one that validation chose: on DeepCrack that of the lowest loss. CFD's rows (but U-Net++'s from scratch) "
              "and ours of the pooled sets are older and have that of the highest pooled IoU at 0.5: in seven of them an earlier one.")
DEEPCRACK_NOTE = " DeepCrack's published split is kept; three of its photographs stand in both parts."

# ---- the car-damage project's seven segmenters -------------------------------------------------------------------------------------

# Its set B is not the data at hand; ours is the Roboflow car set with eight classes, at its 240x240, each model with the set of
# hyper-parameters that its file names, for as many epochs as fit.
SMALL_SEGMENTERS = {"fcn_resnet50": "FCN-ResNet50", "deeplabv3_resnet50": "DeepLabV3-ResNet50", "custom_segnet1": "CustomSegNet1",
                    "custom_segnet2": "CustomSegNet2", "custom_segnet3": "CustomSegNet3", "custom_unet": "CustomUNet",
                    "custom_unet2": "CustomUNet2"}


# The project's own rule first, which its document prints: any damage against background, the mean over pictures.
ANY_DAMAGE = "sizes/model/points/{in_use}/stats/any-damage/"
SEGMENTER_COLUMNS = {"any damage: Dice": ANY_DAMAGE + "Dice", "any damage: IoU": ANY_DAMAGE + "IoU",
                     "accuracy, right class": ANY_DAMAGE + "accuracy", "Dice, pooled": AT + "Dice", "IoU, pooled": AT + "IoU",
                     "IoU, pooled, native size": AT.replace("model", "native") + "IoU", "mIoU, by class": AT + "mIoU"}
SEGMENTER_PRINTED = {SMALL_SEGMENTERS[model]: numbers for model, numbers in published.SEGMENTERS.items()}


# Short enough for two CPU cores. Plain cross-entropy, as the project has it, finds next to nothing within so few steps (IoU below .06 in
# five models tried): the reduced rows weigh the classes.
SEGMENTERS_SMALL = "--size 120 --epochs 4 --batch-size 4 --amp bf16 --limit 0.3 --set class_weights=inverse"
BY_ANY_DAMAGE = "--select pixel/IoU"                                 # the project's numbers are blind to the class, and so is its choice


def segmenter_runs(prefix, schedule, hardware, seeds, minutes):
    """The seven models; the two with a ResNet-50 from AugNet's body."""
    data = "{data}/car_vehide_layout/coco"
    return [Run(seeded(f"{prefix}-{model.replace('_', '-')}", seed), prefix,
                f"--model {model} --data {data} {schedule} {BY_ANY_DAMAGE} --seed {seed}" + f" {FROM_AUGNET}" * model.endswith("resnet50"),
                {name: ""}, hardware, minutes)
            for seed in seeds for model, name in SMALL_SEGMENTERS.items()]


# ---- sixteen pictures of COCO, learned by heart ------------------------------------------------------------------------------------

# Not a result but a proof that everything is wired: the last weights, scored on the very pictures that they were trained on, against what
# perfect masks of 28 x 28 pixels would score there. No augmentation. Validation's choice of an epoch has no meaning here.
OVERFIT = ("--model maskrcnn_resnet50_fpn --data {data}/coco_tiny --amp bf16 --lr 2e-4 --clip 5 --set warmup_iters=100 --set hflip=0 "
           "--set brightness=0 --set contrast=0 --set saturation=0 --set weight_decay=0")
BY_HEART = "--part train --checkpoint {run}/last.pt --ceiling"
FROM_RESNET18 = "--pretrained {data}/weights/resnet18_bnfolded_conv1_to_layer3_fp16.pth"
OVERFIT_RUNS = [
    Run("coco-tiny-overfit", "coco-tiny-overfit", f"{OVERFIT} {FROM_AUGNET} --epochs 250 --batch-size 2",
        {"Mask R-CNN, 16 pictures": BY_HEART}, "gpu"),
    Run("coco-tiny-overfit-4", "coco-tiny-overfit",
        f"{OVERFIT.replace('--lr 2e-4', '--lr 4e-4')} {FROM_RESNET18} --epochs 400 --batch-size 2 --limit 0.25 --size 320 "
        "--set body=resnet18 --set fpn_channels=128 --set rpn_channels=128 --set box_head_channels=512 --set mask_layers=128,128 "
        "--set mask_dim_reduced=128 --set anchor_sizes=16,32,64,128,256 --set canonical_scale=112 --set rpn_pre_nms_top_n_train=500 "
        "--set rpn_post_nms_top_n_train=500 --set rpn_post_nms_top_n_test=300 --set box_batch_size_per_image=128",
        {"Mask R-CNN (ResNet-18, 320 px), 4 pictures": BY_HEART}, "cpu")]
OVERFIT_COLUMNS = {"box AP": "stats/bbox/AP", "box AP50": "stats/bbox/AP50", "mask AP": "stats/segm/AP", "mask AP50": "stats/segm/AP50",
                   "mask AP, of perfect 28x28 masks": "ceiling/segm/AP"}

# ---- the Mask R-CNN study: its losses at three sizes of data, and where its proposals come from ------------------------------------

# The study's model and recipe, on cars. The loss rows have equal numbers of steps: with fewer pictures, each is seen more often.
STUDY_FULL = f"--model maskrcnn_study_resnet50 --amp bf16 --size 800 --set warmup_iters=200 {FROM_AUGNET}"
# Reduced: CARS_SMALL's body and heads at 256 px; the norms of its folded weights have nothing to learn from a batch.
STUDY_SMALL = (CARS_SMALL.replace("--size 320", "--model maskrcnn_study_resnet50 --set norm=frozen --size 256").replace("--epochs 14 ", "")
               .replace("--split 70/15/15 --select segm/AP50 ", ""))
STUDY_CARS = "--data {data}/car_vehide_layout/coco --split 70/15/15 --select segm/AP50"
STUDY_LOSSES = {"usual": ("cross-entropy + smooth L1 + BCE", ""),
                "alternative": ("sigmoid focal + IoU + Dice", "--set class_loss=sigmoid_focal --set box_loss=iou --set mask_loss=dice "
                                                              "--set loss_weight_cls=4 --set loss_weight_reg=8")}
STUDY_SHARES = {"quarter": ("a quarter", 0.25), "half": ("half", 0.5), "all": ("all", 1)}
STUDY_PROPOSALS = {"rpn": ("RPN", "rpn", 0), "rpn-15": ("RPN, 15 or more", "rpn", 15), "rpn-30": ("RPN, 30 or more", "rpn", 30),
                   "rpn-gt": ("RPN and true boxes", "rpn+gt", 0), "gt": ("true boxes", "gt", 0),
                   "gt-15": ("true boxes, 15 or more in evaluation", "gt", 15),
                   "gt-30": ("true boxes, 30 or more in evaluation (the study's)", "gt", 30)}


def study_loss_runs(prefix, schedule, epochs, hardware, seeds, minutes, evaluation=""):
    """Both loss sets on a quarter, half and all of the training pictures. epochs: over all of them."""
    return [Run(seeded(f"{prefix}-{losses}-{share}", seed), prefix,
                f"{schedule} {flags} --epochs {round(epochs / limit)} --limit {limit} --seed {seed}".replace("  ", " "),
                {f"{what}, {of}": evaluation}, hardware, minutes)
            for seed in seeds for losses, (what, flags) in STUDY_LOSSES.items() for share, (of, limit) in STUDY_SHARES.items()]


def study_proposal_runs(prefix, schedule, hardware, which, seeds, minutes, evaluation=""):
    return [Run(seeded(f"{prefix}-{name}", seed), prefix, f"{schedule} --set proposals={mode} --set min_proposals={least} --seed {seed}",
                {row: evaluation}, hardware, minutes)
            for seed in seeds for name, (row, mode, least) in STUDY_PROPOSALS.items() if name in which]


# On COCO's sixteen pictures, or four of them, learned by heart as above. Behind the schedules' own flags: the last of a kind counts.
STUDY_TINY = ("--data {data}/coco_tiny --batch-size 2 --lr 2e-4 --clip 5 --set norm=frozen --set warmup_iters=100 --set hflip=0 "
              "--set brightness=0 --set contrast=0 --set saturation=0 --set weight_decay=0")
STUDY_REDUCED = ("rpn", "rpn-gt", "gt", "gt-30")
STUDY_RUNS = [
    *study_loss_runs("study-losses", f"{STUDY_SMALL} {STUDY_CARS}", 6, "cpu", (0,), (10, None)),
    *study_proposal_runs("study-proposals", f"{STUDY_SMALL} {STUDY_CARS} --epochs 6", "cpu", STUDY_REDUCED, (0,), (10, None)),
    *study_proposal_runs("study-proposals-coco", f"{STUDY_SMALL} {STUDY_TINY} --epochs 200 --limit 0.25", "cpu", STUDY_REDUCED, (0,),
                         (10, None), BY_HEART),
    *study_loss_runs("study-losses-full", f"{STUDY_FULL} {STUDY_CARS}", 48, "gpu", (0, 1, 2), (None, None)),
    *study_proposal_runs("study-proposals-full", f"{STUDY_FULL} {STUDY_CARS} --epochs 48", "gpu", STUDY_PROPOSALS, (0, 1, 2),
                         (None, None)),
    *study_loss_runs("study-losses-coco-full", f"{STUDY_FULL} {STUDY_TINY}", 100, "gpu", (0, 1, 2), (None, None), BY_HEART),
    *study_proposal_runs("study-proposals-coco-full", f"{STUDY_FULL} {STUDY_TINY} --epochs 250", "gpu", STUDY_PROPOSALS, (0, 1, 2),
                         (None, None), BY_HEART)]
STUDY_NOTE = ("The study claims that the alternative losses help with few pictures and stall with more, and that a minimum of 30 proposals "
              "helps; it prints no table of either, but \"accuracy\" by a rule that it does not state, training / validation: "
              f"{'; '.join(f'{what}: {numbers}' for what, numbers in published.STUDY_ACCURACY.items())}.")
STUDY_COLUMNS = {**{name: CAR_COLUMNS[name] for name in ("box AP", "box AP50", "mask AP", "mask AP50")},
                 "mask AP50, 95 % over pictures": "intervals/segm/AP50", "epoch": "epoch"}

# ---- the list ----------------------------------------------------------------------------------------------------------------------

RUNS = [Run("demo", "demo", "", {"DamageNet": ""}, "cpu", (3, None)),
        *car_runs("cars", CARS_SMALL, "cpu", "{data}/car_vehide_layout", (0,), (45, None)),
        *car_runs("cars-coco", CARS_SMALL.replace("--epochs 14", "--epochs 8"), "cpu", "{data}/car_vehide_layout/coco", (0,),
                  (30, None))[:2],
        # Is the schedule what the cars lack? Twice the epochs, and nothing else changed.
        *(run for run in car_runs("cars-longer", CARS_SMALL.replace("--epochs 14", "--epochs 28"), "cpu", "{data}/car_vehide_layout",
                                  (0, 1, 2), (90, None)) if "-no-fpn" not in run.name),
        *steel_runs("steel", NEU_SMALL, "cpu", (1, 5), (0,), (45, None)),
        *crack_runs("cracks", CRACKS_SMALL, "cpu", "cfd", ("context_cracknet", "unet"), (0, 1, 2), (40, None)),
        *(run for which, epochs in QUICK_EPOCHS.items()
          for run in crack_runs("cracks-quick", f"{CRACKS_QUICK} --epochs {epochs}", "cpu", which,
                                LEADING if which == "cracks448" else ("context_cracknet", *BASELINES), (0,), (5, None),
                                ablation=which != "cracks448", scratch=which == "cfd")),
        *crack_runs("cracks", f"{CRACKS_QUICK} --epochs {LONGER * QUICK_EPOCHS['deepcrack']}", "cpu", "deepcrack", LEADING, (0, 1, 2),
                    (30, None)),
        # Does the rate, chosen on U-Net, hold Context-CrackNet back? Its paper's is 1e-4, at batches of 32.
        Run("cracks-quick-deepcrack-context-cracknet-slower", "cracks-quick-deepcrack",
            f"--model context_cracknet --data {{data}}/deepcrack {CRACKS_QUICK.replace('--lr 1e-3', '--lr 3e-4')} "
            f"--epochs {QUICK_EPOCHS['deepcrack']} {FROM_AUGNET} --seed 0", {"Context-CrackNet, rate 3e-4": ""}, "cpu", (8, None)),
        *segmenter_runs("segmenters", SEGMENTERS_SMALL, "cpu", (0,), (5, None)),
        *car_runs("cars-short", CARS_FULL.replace("--epochs 48", "--epochs 12"), "gpu", "{data}/car_vehide_layout", (0, 1, 2),
                  (None, None)),
        *steel_runs("steel-short", NEU_SHORT, "gpu", (1, 2, 3, 4, 5), (0, 1, 2), (None, None)),
        *(run for which, epochs in SHORT_EPOCHS.items()
          for run in crack_runs("cracks-short", f"{CRACKS_SHORT} --epochs {epochs}", "gpu", which, ("context_cracknet", *BASELINES),
                                (0, 1, 2), (None, None), ablation=True)),
        *car_runs("cars-full", CARS_FULL, "gpu", "{data}/car_vehide_layout", (0, 1, 2), (None, None), CONTEXTS),
        *car_runs("cars-coco-full", CARS_FULL, "gpu", "{data}/car_vehide_layout/coco", (0, 1, 2), (None, None)),
        *steel_runs("steel-full", NEU_FULL, "gpu", (1, 2, 3, 4, 5), (0, 1, 2), (None, None)),
        *(Run(seeded(f"steel-full-best{start}", seed), "steel-full", f"{NEU_BEST} --seed {seed}{weights}", {f"ours, {what}": ""}, "gpu")
          for seed in (0, 1, 2)
          for start, what, weights in (("", "from AugNet", f" {FROM_AUGNET}"), ("-scratch", "from scratch", " --set norm=batch"))),
        *steel_runs("voc-full", VOC_FULL, "gpu", (1, 5), (0,), (None, None)),
        *(run for which in CRACK_SETS
          for run in crack_runs("cracks-full", CRACKS_FULL, "gpu", which, ("context_cracknet", *BASELINES), (0, 1, 2), (None, None),
                                True, True)
          if which != "cracks448"),
        *crack_runs("cracks-full", CRACKS_FULL, "gpu", "cracks448", LEADING, (0, 1, 2), (None, None)),
        *segmenter_runs("segmenters-full", "--epochs 10 --amp bf16", "gpu", (0, 1, 2), (None, None)), *OVERFIT_RUNS, *STUDY_RUNS]

# ---- peers: their model, our script ------------------------------------------------------------------------------------------------

# Which of our runs a peer's model repeats: with the same data, start weights, recipe and seeds. What changes in the arguments is the
# model's name, and what leads to the very same config and recipe from there (tests/test_results.py asks that it does).
AS_NO_DILATION = ("--set max_size=1024 --set optimizer=sgd --set lr=0.02 --set schedule=step --set milestones=34,43 --clip 0 "
                  "--set rotate=15 --set contrast=0 --set saturation=0")
# DANet's second phase with torchvision's nearest up-sampling in the pyramid, in our Faster R-CNN's words. Without mixed precision, ours
# too: under it torchvision rounds its boxes.
STEEL_TWIN = ("--model fasterrcnn_resnet50_fpn --data {data}/neu_det --size 400 --epochs 30 --batch-size 4 --select bbox/AP50 "
              "--pretrained {data}/weights/resnet50_augnet.pth --set lr_batch_size=4 --set milestones=20,28 --set warmup_iters=500 "
              "--set max_size=400 --set anchor_sizes=32,64,96,160,256 --set aspect_ratios=0.33,1,3 --set canonical_scale=112")
RUNS += [Run(seeded("steel-full-fasterrcnn", seed), "steel-full", f"{STEEL_TWIN} --seed {seed}",
             {"2 with nearest up-sampling, float32": ""}, "gpu") for seed in (0, 1, 2)]
# The same twin reduced until three seeds of both fit two CPU cores: a ResNet-18 body with narrow heads, 192 px, 3 epochs.
STEEL_TWIN_SMALL = (f"--model fasterrcnn_resnet50_fpn --data {{data}}/neu_det --size 192 --epochs 3 --batch-size 4 --select bbox/AP50 "
                    f"{FROM_RESNET18} --clip 10 --set lr_batch_size=4 --set milestones=2 --set warmup_iters=200 --set max_size=192 "
                    "--set body=resnet18 --set frozen_stages=2 --set fpn_channels=128 --set rpn_channels=128 --set box_head_channels=512 "
                    "--set anchor_sizes=24,40,64,96,144 --set aspect_ratios=0.33,1,3 --set canonical_scale=56 "
                    "--set box_batch_size_per_image=64 --set rpn_pre_nms_top_n_train=300 --set rpn_post_nms_top_n_train=300 "
                    "--set rpn_pre_nms_top_n_test=300 --set rpn_post_nms_top_n_test=150")
RUNS += [Run(seeded("steel-twins-fasterrcnn", seed), "steel-twins", f"{STEEL_TWIN_SMALL} --seed {seed}", {"Faster R-CNN": ""}, "cpu",
             (10, None)) for seed in (0, 1, 2)]


@dataclasses.dataclass(frozen=True)
class Twin:
    """A peer's model in place of ours in some runs."""

    tables: tuple                       # the first words of their names
    ours: str                           # our run's name, without its table and seed
    theirs: str
    changes: dict                       # text in the arguments -> what stands there instead
    peer: str
    row: str
    evaluate: str = ""                  # arguments of evaluate.py

    def of(self, run):
        """The peer's run, or None where our run is none that it repeats."""
        name, dash, seed = run.name.partition("-seed")
        if not run.table.startswith(self.tables) or name != f"{run.table}-{self.ours}":
            return None
        train = run.train
        for old, new in self.changes.items():
            train = train.replace(old, new)
        return dataclasses.replace(run, name=f"{run.table}-{self.theirs}{dash}{seed}", train=train, rows={self.row: self.evaluate},
                                   peer=self.peer)


TWINS = (Twin(("cracks-quick", "cracks-short", "cracks-full"), "unet", "smp-unet", {"--model unet": "--model smp_unet"},
              "segmentation_models_pytorch", "segmentation_models_pytorch's U-Net"),
         Twin(("cars-full",), "no-dilation", "torchvision-maskrcnn",
              {"--model damagenet": "--model torchvision_maskrcnn_resnet50_fpn", "--set context=false": AS_NO_DILATION, " --amp bf16": ""},
              "torchvision", "torchvision's Mask R-CNN", "--set mask_threshold=0.5"),
         Twin(("steel-full", "steel-twins"), "fasterrcnn", "torchvision-fasterrcnn",
              {"--model fasterrcnn_resnet50_fpn": "--model torchvision_fasterrcnn_resnet50_fpn"},
              "torchvision", "torchvision's Faster R-CNN"))
RUNS += [made for twin in TWINS for run in RUNS if (made := twin.of(run))]


# What a reader wants to know first: (what, the paper's number, our run and its row, where the number lies, whether it is in percent, our
# schedule, the paper's).
CRACK_SCHEDULE = "448 px, up to 1,000 epochs of batch 32, a body from ImageNet"
GLANCE = (
    ("DamageNet, cars: box AP50 (the paper: \"box mAP\" on other pictures)", published.DAMAGENET["box mAP"], "cars-longer-damagenet", "DamageNet",
     "stats/bbox/AP50", True, "320 px, 28 epochs, ResNet-18",
     "1024 px, 280 epochs, a body not stated, seven times the pictures"),
    ("DANet, steel: AP50", published.DANET[5][-1], "steel-short-phase5", PHASES[5], "stats/bbox/AP50", True, "400 px, 12 epochs",
     "30 epochs, a body from COCO"),
    *((f"{CRACK_NAMES[model]}, {name}: IoU", published.CRACKS[name][model][0], run, CRACK_NAMES[model], AT + "IoU", False, ours,
       CRACK_SCHEDULE)
      for model, name, run, ours in (
          ("context_cracknet", "DeepCrack", "cracks-deepcrack-context-cracknet", "224 px, 8 epochs of batch 4"),
          ("unet", "DeepCrack", "cracks-deepcrack-unet", "224 px, 8 epochs of batch 4"),
          ("unetplusplus", "DeepCrack", "cracks-deepcrack-unetplusplus", "224 px, 8 epochs of batch 4"),
          ("context_cracknet", "CFD", "cracks-cfd-context-cracknet", "256 px, 30 epochs of batch 4"),
          ("unet", "CFD", "cracks-cfd-unet", "256 px, 30 epochs of batch 4"))),
    ("FCN-ResNet50, cars: any damage, IoU (the document: other pictures)", published.SEGMENTERS["fcn_resnet50"][1],
     "segmenters-fcn-resnet50", "FCN-ResNet50", ANY_DAMAGE + "IoU", False, "120 px, 164 steps", "240 px, 5 epochs of batch 16"))

DAMAGENET = "DamageNet, the ablation in its section V's text"
# What each table says again: where data, start weights and schedule are not the paper's.
listed = lambda numbers: ", ".join(f"{what} {number}" for what, number in numbers.items())
CAR_NOTE = (f"The paper: {listed(published.DAMAGENET)} on 5,200 VehiDE pictures that are not public as such, 280 epochs at 1024 px, the body "
            f"not stated; in points, Mask R-CNN {listed(published.DAMAGENET_MASK_RCNN)}, {listed(published.DAMAGENET_ABLATION)}. Its Table I "
            "prints a Jaccard index above its own precision and recall, which no one rule gives: no agreement with it is claimed. On the "
            f"whole public VehiDE an independent run of a modern segmenter has a mask AP50 of {published.VEHIDE_ELSEWHERE}. Here: 700 public "
            "photographs in VehiDE's layout, 490 / 105 / 105 by vehicle, split seed 0")
CAR_SMALL_NOTE = f"{CAR_NOTE}; a ResNet-18 (ImageNet weights without its last stage), 320 px, narrow heads"
CAR_FULL_NOTE = f"{CAR_NOTE}; 48 epochs of a ResNet-50 from AugNet weights at 1024 px."
FOCAL_NOTE = ("Phase 5's classification loss is weighted by 4, for the paper's alpha divides it by 4: beside phase 4 it has that change "
              "too.")
STEEL_NOTE = ("NEU-DET's 1,800 pictures split 1,296 / 144 / 360 by our seed (the paper's 1,440 / 360 are not listed by name); the body "
              f"starts from AugNet weights, trained without labels (the paper's: COCO). {FOCAL_NOTE} The paper's Table 4: "
              f"{listed(published.DANET_PEERS)}. An independent run of a strong one-stage detector has {published.NEU_DET_ELSEWHERE}, the "
              f"highest published on NEU-DET is {' to '.join(map(str, published.NEU_DET_BEST))}.")
SEGMENTER_NOTE = ("The printed rows are of the document's own car set's validation part; ours are of the Roboflow car set with eight "
                  "classes, test part. The two with a ResNet-50 start from AugNet weights.")

TABLES = {
    "demo": Table("The drawn demo set", CAR_COLUMNS,
                  note="Drawn pictures: it shows that everything is wired, and says nothing of real damage."),
    "cars": Table("DamageNet's ablation on cars, reduced", CAR_COLUMNS, DAMAGENET, tested=CAR_TESTED, note=f"{CAR_SMALL_NOTE}, 14 epochs."),
    "cars-coco": Table("DamageNet's ablation on cars, COCO labels, reduced", CAR_COLUMNS, DAMAGENET, tested=CAR_TESTED,
                       note=f"{CAR_SMALL_NOTE}, 8 epochs; eight classes of a COCO export."),
    "cars-longer": Table("DamageNet's ablation on cars, reduced, 28 epochs", CAR_COLUMNS, DAMAGENET, tested=CAR_TESTED,
                         note=f"{CAR_SMALL_NOTE}, 28 epochs."),
    "cars-short": Table("DamageNet's ablation on cars, 12 epochs", CAR_COLUMNS, DAMAGENET, tested=CAR_TESTED,
                        note=CAR_FULL_NOTE.replace("48 epochs", "12 epochs")),
    "cars-full": Table("DamageNet's ablation on cars", CAR_COLUMNS, DAMAGENET, tested=CAR_TESTED, note=CAR_FULL_NOTE),
    "cars-coco-full": Table("DamageNet's ablation on cars, COCO labels", CAR_COLUMNS, DAMAGENET, tested=CAR_TESTED, note=CAR_FULL_NOTE),
    "steel": Table("DANet on NEU-DET, reduced", STEEL_COLUMNS, "DANet, Table 3", STEEL_PRINTED, percent=True, tested=("bbox/AP50",),
                   note=f"{STEEL_NOTE} 192 px and 5 epochs, fewer candidates; the paper: 30 epochs, size not stated."),
    "steel-short": Table("DANet on NEU-DET, 12 epochs", STEEL_COLUMNS, "DANet, Table 3", STEEL_PRINTED, percent=True, tested=("bbox/AP50",),
                         note=f"{STEEL_NOTE} 400 px, 12 epochs of 162 steps of eight pictures; the paper: 30 epochs of four."),
    "steel-full": Table("DANet on NEU-DET, the paper's schedule", STEEL_COLUMNS, "DANet, Table 3", STEEL_PRINTED, percent=True,
                        tested=("bbox/AP50",), note=f"{STEEL_NOTE} 400 px, the paper's 30 epochs; \"ours\" has recipes of its own."),
    "steel-twins": Table("Ours and torchvision's Faster R-CNN by one script, NEU-DET, reduced", STEEL_COLUMNS, percent=True,
                         tested=("bbox/AP50",),
                         note="A ResNet-18 body without its last stage's weights, narrow heads, 192 px, 3 epochs, float32; start weights "
                              "and the order of pictures are the same seed by seed, what is sampled is not."),
    "voc-full": Table("DANet on Pascal VOC 2007", VOC_COLUMNS, "DANet, section IV.D", VOC_PRINTED, percent=True,
                      note="The set is not at hand: the runs wait for `VOC2007` (JPEGImages, Annotations, ImageSets) under "
                           f"MINIDAMAGE_DATA. The paper does not state its IoU. {FOCAL_NOTE}", waits=" and for the data"),
    "coco-tiny-overfit": Table("Sixteen pictures of COCO, or four of them, learned by heart", OVERFIT_COLUMNS,
                               note="Scored on the very pictures that were trained on: a proof that everything is wired, no result."),
    **{f"study-{kind}{where}{size}": Table(f"The Mask R-CNN study: {what} {scored}{reduced}", columns, f"the study, section {section}",
                                           note=STUDY_NOTE, tested=("segm/AP50",) * (kind == "proposals" and not where))
       for kind, what, section in (("losses", "loss sets by share of the training pictures, at equal steps,", "3.2"),
                                   ("proposals", "where proposals come from,", "2.2"))
       for where, scored, columns in (("", "on cars", STUDY_COLUMNS),
                                      ("-coco", "COCO's sixteen pictures learned by heart", OVERFIT_COLUMNS))
       for size, reduced in (("", ", reduced (four pictures)" if where else ", reduced"), ("-full", ""))
       if any(run.table == f"study-{kind}{where}{size}" for run in RUNS)},
    "segmenters": Table("Seven small segmenters on cars, reduced", SEGMENTER_COLUMNS, "the project, section 6.1.1", SEGMENTER_PRINTED,
                        note=f"{SEGMENTER_NOTE} 164 steps of four pictures at 120 px, equal for all, with weighted classes; the document "
                             "trains at 240 px with batches of 16 and plain cross-entropy."),
    "segmenters-full": Table("Seven small segmenters on cars", SEGMENTER_COLUMNS, "the project, section 6.1.1", SEGMENTER_PRINTED,
                             note=f"{SEGMENTER_NOTE} 10 epochs, else as the document has it."),
    **{f"{kind}-{which}": Table(f"Cracks: {name}{reduced}", CRACK_COLUMNS, "Context-CrackNet, Table 3; its ablation: Table 6",
                                {CRACK_NAMES[model]: numbers for model, numbers in published.CRACKS.get(name, {}).items()},
                                note=CRACK_NOTE + DEEPCRACK_NOTE * (which == "deepcrack") + QUICK_NOTE * (kind == "cracks-quick"),
                                tested=("IoU",), rivals=tuple(CRACK_NAMES.values()))
       for which, (_, name) in CRACK_SETS.items()
       for kind, reduced in (("cracks", ", reduced"), ("cracks-quick", ", some 150 steps"), ("cracks-short", ", some 670 steps"),
                             ("cracks-full", ""))
       if any(run.table == f"{kind}-{which}" for run in RUNS)}}
