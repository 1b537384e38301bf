"""Mask folders in the layouts that real sets have; values understood or refused; every loss named."""
import os
import struct

import numpy as np
import pytest
from PIL import Image

from data_sets import picture
from minidamage.data import SegmentationDataset, label_map, load_dataset, split, summary
from minidamage.data.mask_folders import folders_of_masks, photograph
from test_data_label_maps import mat_file

MASK = np.zeros((48, 64), np.uint8)
MASK[10:20, 12:40] = 1
MASK[30:40, 5:9] = 1


def load(path, **kwargs):
    return load_dataset(path, quiet=True, **kwargs)


def mask(path, values=MASK * 255, **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **save)
    return path


def pairs(root, images="images/{}.jpg", masks="masks/{}.png", names=("a", "b", "c"), values=MASK * 255, **save):
    for i, name in enumerate(names):
        picture(root / images.format(name), seed=i + sum(map(ord, images)))
        mask(root / masks.format(name), values[i] if isinstance(values, list) else values, **save)
    return root


def counts(data):
    return {part: len(records) for part, records in data.parts.items()}


# ---- layouts ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("images, masks", [
    ("images/{}.jpg", "masks/{}.png"), ("img/{}.jpg", "gt/{}_mask.png"), ("{}.jpg", "{}_mask.png"), ("{}.jpg", "masks/{}.bmp"),
    ("photos/{}.jpg", "SegmentationClass/{}.png"), ("Images/{}.JPG", "Labels/{}_lab.PNG"), ("input/{}_img.jpg", "target/{}_gt.png"),
    ("images/{}.jpg", "ground_truth/mask_{}.png"), ("images/{}.jpg", "masks/{}.tif")])
def test_one_part(tmp_path, images, masks):
    data = load(pairs(tmp_path, images, masks))
    assert data.layout == "mask folders" and counts(data) == {"all": 3} and not data.problems, data.problems
    assert data.class_names == ("damage",) and data.category_ids == (255,) and data.unnamed and data.test_share == 0.2
    record = data.parts["all"][1]
    assert record.present == (1,) and record.labels.shape == (0,) and record.boxes.shape == (0, 4) and record.masks == []
    assert record.label_map.counts == ((1, int(MASK.sum())),)
    np.testing.assert_array_equal(label_map(record), MASK)
    assert "3 masks hold 0 and 255" in summary(data) and "value in masks" in summary(data)


@pytest.mark.parametrize("images, masks", [
    ("{part}_img/{{}}.jpg", "{part}_lab/{{}}.png"), ("{part}/images/{{}}.jpg", "{part}/masks/{{}}.png"),
    ("images/{part}/{{}}.jpg", "masks/{part}/{{}}.png"), ("{part}/{{}}.jpg", "{part}_masks/{{}}_mask.gif"),
    ("JPEGImages/{part}/x/{{}}.jpg", "annotations/{part}/x/{{}}.png"), ("{part}/{{}}.jpg", "{part}/{{}}_label.png")])
def test_parts_by_folder(tmp_path, images, masks):
    for part, names in (("train", "abcde"), ("valid", "fg"), ("test", "hij")):
        pairs(tmp_path, images.format(part=part), masks.format(part=part), names)
    data = load(tmp_path)
    assert counts(data) == {"train": 5, "val": 2, "test": 3} and not data.problems and data.test_share == 0.0
    ids = [r.image_id for records in data.parts.values() for r in records]
    assert sorted(ids) == list(range(1, 11))


def test_a_set_without_parts_is_split_80_20_then_a_tenth(tmp_path):
    data = load(pairs(tmp_path, names=[f"p{i:03d}" for i in range(50)]))
    assert {name: len(records) for name, records in split.three_parts(data).items()} == {"train": 36, "val": 4, "test": 10}


def test_a_folder_of_masks_with_the_pictures_named(tmp_path):
    pairs(tmp_path, "here/{}.jpg", "there/truth/{}.png")
    assert counts(load(tmp_path / "there/truth", images=tmp_path / "here")) == {"all": 3}
    with pytest.raises(ValueError, match="got a folder of masks; give the folder above"):
        load(tmp_path / "there/truth")


def test_label_studio_names_and_tags(tmp_path):
    for i, tag in ((5, "Severe Damages"), (6, "Scratch"), (7, "No Damage")):
        picture(tmp_path / f"images/{i}.jpg", seed=i)
        mask(tmp_path / f"masks/task-{i}-annotation-9-by-1-tag-{tag}-0.png")
    small = np.zeros_like(MASK)
    small[12:14, 14:18] = 255
    mask(tmp_path / "masks/task-5-annotation-9-by-1-tag-Scratch-0.png", small)
    data = load(tmp_path)
    assert data.class_names == ("Scratch", "Severe Damages") and any("'No Damage' is background" in n for n in data.notes)
    five, six, seven = data.parts["all"]
    assert five.present == (1, 2) and six.present == (1,) and seven.present == () and seven.undamaged
    expected = MASK * 2
    expected[12:14, 14:18] = 1                                                            # the smaller on top
    np.testing.assert_array_equal(label_map(five), expected)
    assert not label_map(seven).any()


def test_folders_of_masks_are_those_beside_their_pictures():
    assert folders_of_masks(["images", "masks", "more"]) == ["masks"]
    assert folders_of_masks(["train_img", "train_lab", "test_lab"]) == ["test_lab", "train_lab"]
    assert [folders_of_masks(names) for names in (["masks", "more"], ["masks"], ["photos", "my"])] == [[], [], []]


def test_two_folders_of_masks_are_refused(tmp_path):
    pairs(tmp_path)
    pairs(tmp_path, masks="labels/{}.png")
    with pytest.raises(ValueError, match="expected one folder of masks, got labels, masks.*--images"):
        load(tmp_path)


def test_nothing_pairs(tmp_path):
    pairs(tmp_path)
    for file in (tmp_path / "masks").iterdir():
        file.rename(file.with_name("zz" + file.name))
    with pytest.raises(ValueError, match=r"no mask has the name of a picture: pictures a.jpg, b.jpg, ...; masks zza.png"):
        load(tmp_path)


def test_unpaired_doubled_and_odd_sized_files_are_named(tmp_path):
    pairs(tmp_path, names="abcdefg")
    (tmp_path / "masks/a.png").unlink()
    (tmp_path / "images/b.jpg").unlink()
    mask(tmp_path / "masks/c_mask.png")
    mask(tmp_path / "masks/d.png", MASK[:40] * 255)
    (tmp_path / "images/e.jpg").write_bytes(b"")
    (tmp_path / "masks/f.png").write_bytes(b"no picture")
    data = load(tmp_path)
    assert [r.file[-5:] for r in data.parts["all"]] == ["g.jpg"]
    for said in ("a.jpg: no mask of its name in", "b.png: a mask without a picture", "c.jpg: several masks of its name (c.png, c_mask.png)",
                 "d.jpg: the mask is 64x40, the picture 64x48; picture left out", "e.jpg: the file is empty", "f.png: not a picture"):
        assert sum(p.startswith(said) for p in data.problems) == 1, (said, data.problems)
    assert len(data.problems) == 6


def test_a_mask_drawn_before_the_exif_rotation_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(tmp_path / "images/a.jpg", 64, 48, exif=exif)
    mask(tmp_path / "masks/a.png")
    picture(tmp_path / "images/b.jpg", 64, 48, exif=exif)
    mask(tmp_path / "masks/b.png", np.ascontiguousarray(np.rot90(MASK * 255, -1)))
    data = load(tmp_path)
    assert len(data.problems) == 1 and data.problems[0].startswith("a.jpg: its mask was drawn before the picture's EXIF rotation (6)")
    for record in data.parts["all"]:
        np.testing.assert_array_equal(label_map(record), np.rot90(MASK, -1))


# ---- values ------------------------------------------------------------------------------------------------------------------------

def test_0_1_and_1_bit_and_mixed_with_jpeg(tmp_path):
    pairs(tmp_path, values=[MASK, MASK > 0, MASK])
    mask(tmp_path / "masks/d.jpg", MASK * 255, quality=95)
    picture(tmp_path / "images/d.png", seed=9)
    data = load(tmp_path)
    assert data.category_ids == (1,) and any("2 masks hold 0 and 1; 1 JPEG masks cut at 127; 1 1-bit masks" in n for n in data.notes)
    for record in data.parts["all"]:
        np.testing.assert_array_equal(label_map(record), MASK)


def test_soft_grey_masks_are_cut_at_127(tmp_path):
    big = Image.fromarray(MASK * 255).resize((256, 192), Image.Resampling.NEAREST)
    soft = np.array(big.rotate(10, Image.Resampling.BICUBIC).resize((64, 48), Image.Resampling.LANCZOS))
    data = load(pairs(tmp_path, values=soft))
    assert any("3 grey masks" in n and "cut at 127" in n for n in data.notes)
    np.testing.assert_array_equal(label_map(data.parts["all"][0]), soft > 127)


def test_class_ids_with_and_without_names(tmp_path):
    values = MASK.copy()
    values[12:16, 14:20] = 2
    values[0] = 255
    data = load(pairs(tmp_path / "a", values=values))
    assert data.class_names == ("class 1", "class 2") and not data.unnamed and any("255 is not judged (192 px)" in n for n in data.notes)
    np.testing.assert_array_equal(label_map(data.parts["all"][0]), values)
    assert data.parts["all"][0].present == (1, 2)
    pairs(tmp_path / "b", values=values)
    (tmp_path / "b/classes.txt").write_text("background\ncrack\nspalling\nrust\n")
    data = load(tmp_path / "b")
    assert data.class_names == ("crack", "spalling", "rust") and data.category_ids == (1, 2, 3)
    data = load(tmp_path / "b", class_names=("rust", "spalling", "crack"))
    np.testing.assert_array_equal(label_map(data.parts["all"][0]), np.array([0, 3, 2] + [0] * 252 + [255])[values])
    assert data.parts["all"][0].present == (2, 3)
    with pytest.raises(ValueError, match="has objects of 'crack', which the model does not know"):
        load(tmp_path / "b", class_names=("spalling", "rust"))


def test_palette_masks_keep_their_indices_and_voc_borders_are_not_judged(tmp_path):
    values = MASK.copy()
    values[9] = 255
    pairs(tmp_path)
    for name in "abc":
        image = Image.fromarray(values, "P")
        image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 759 + [224, 224, 192])
        image.save(tmp_path / f"masks/{name}.png")
    data = load(tmp_path)
    assert data.class_names == ("class 1",)
    np.testing.assert_array_equal(label_map(data.parts["all"][0]), values)


@pytest.mark.parametrize("levels, said", [
    ((0, 1, 255), r"0 \(.* px\), 1 \(.* px\), 255 \(.* px\)"), ((0, 2), r"2 \(480 px\)"), ((0, 128), r"128 \(480 px\)"), ((0, 1, 5), "5 "),
    (tuple(range(0, 250, 25)), "and 2 more values")])
def test_ambiguous_values_are_refused_with_the_fix(tmp_path, levels, said):
    values = np.zeros((48, 64), np.uint8)
    for i, level in enumerate(levels[1:]):
        values[4 * i:4 * i + 4, :40] = level
    with pytest.raises(ValueError, match=f"more than one way: .*{said}.*classes.txt"):
        load(pairs(tmp_path, values=values))


def test_colours_and_grey_jpegs_are_refused(tmp_path):
    pairs(tmp_path / "a", values=np.stack([MASK * 200, MASK, MASK], -1))
    with pytest.raises(ValueError, match=r"none of the 3 masks can be read; first: .*a mask in colours: \(0, 0, 0\)"):
        load(tmp_path / "a")
    pairs(tmp_path / "b", masks="masks/{}.jpg", values=MASK * 90)
    with pytest.raises(ValueError, match="JPEG masks are no black and white pictures"):
        load(tmp_path / "b")


def test_unexpected_values_in_a_few_masks_are_listed_and_left_out(tmp_path):
    odd = MASK.copy()
    odd[0, :3] = 77
    values = [odd if i == 4 else MASK for i in range(12)]
    data = load(pairs(tmp_path / "a", names="abcdefghijkl", values=values))
    assert counts(data) == {"all": 11} and data.problems == ["e.png: unexpected values 77 (3 px); picture left out"]
    pairs(tmp_path / "b", names="abcdefghijkl", values=values)
    (tmp_path / "b/classes.txt").write_text("crack\nrust\n")
    assert load(tmp_path / "b").problems == ["e.png: unexpected values 77 (3 px); picture left out"]
    pairs(tmp_path / "c", values=odd)
    (tmp_path / "c/classes.txt").write_text("crack\nrust\n")
    with pytest.raises(ValueError, match=r"expected values 0 to 2 \(crack, rust\).*got .*77 \(9 px\) in 3 of 3 masks"):
        load(tmp_path / "c")


def test_a_rare_class_is_no_unexpected_value(tmp_path):
    values = [MASK * (1 + (i == 4)) for i in range(12)]
    data = load(pairs(tmp_path, names="abcdefghijkl", values=values))
    assert data.class_names == ("class 1", "class 2") and counts(data) == {"all": 12} and not data.problems


def test_all_background_says_so_and_cannot_train(tmp_path):
    data = load(pairs(tmp_path, values=MASK * 0))
    assert any("every mask is all background" in n for n in data.notes) and "3 all background" in summary(data)
    with pytest.raises(ValueError, match="all background"):
        SegmentationDataset(data.parts["all"], train=True)
    assert any("are the masks inverted" in n for n in load(pairs(tmp_path / "i", values=255 - MASK * 255)).notes)


def test_classes_txt_itself(tmp_path):
    pairs(tmp_path)
    (tmp_path / "classes.txt").write_text("dent\nDent\n")
    with pytest.raises(ValueError, match="classes.txt: expected one class name a line, each once"):
        load(tmp_path)
    (tmp_path / "classes.txt").write_text("dent\n")
    data = load(tmp_path)
    assert data.class_names == ("dent",) and not data.unnamed
    with pytest.raises(ValueError, match="does not know"):
        load(tmp_path, class_names=("crack",))


def test_an_unnamed_class_is_the_models_one_class(tmp_path):
    data = load(pairs(tmp_path), class_names=("spalling",))
    assert data.class_names == ("spalling",) and any("taken as the model's, spalling" in n for n in data.notes)
    with pytest.raises(ValueError, match="'damage', which the model does not know"):
        load(tmp_path, class_names=("dent", "scratch"))
    assert load(pairs(tmp_path / "deep_crack")).class_names == ("crack",)


def test_a_mask_that_is_left_out_does_not_say_what_the_others_mean(tmp_path):
    """Grey rims of a mask that was resized would make 128 among 0 and 255 damage, without a word."""
    soft = np.rint(np.linspace(0, 255, 32 * 24)).astype(np.uint8).reshape(24, 32)
    doubtful = MASK * 128
    pairs(tmp_path, names=("a", "b", "c", "d"), values=[MASK * 255, MASK * 255, doubtful, MASK * 255])
    with pytest.raises(ValueError) as refused:
        load(tmp_path)
    picture(tmp_path / "images/e.jpg")
    mask(tmp_path / "masks/e.png", soft)
    with pytest.raises(ValueError) as again:
        load(tmp_path)
    assert str(again.value) == str(refused.value)


def test_numbered_pictures_of_a_small_set_are_not_crops_of_one(tmp_path):
    data = load(pairs(tmp_path, names=[f"crack-{i}" for i in range(6)]))
    assert not any(r.group for r in data.parts["all"]) and any("6 pictures could be crops of 1 photograph, which" in n for n in data.notes)
    assert [len(part) for part in split.three_parts(data).values()] == [4, 1, 1]


# ---- sets by prefix, crops of one photograph ------------------------------------------------------------------------------------------

def test_one_of_several_sets_by_the_beginning_of_the_names(tmp_path):
    pairs(tmp_path, names=["Volker_1", "Volker_2", "Volkers_1", "Volkers_2", "GAPS384_7", "GAPS384_8", "GAPS384_9"])
    assert any("GAPS384 3, Volker 2, Volkers 2" in n for n in load(tmp_path).notes)
    data = load(f"{tmp_path}:Volker")
    assert counts(data) == {"all": 2} and data.path == f"{tmp_path}:Volker"
    assert counts(load(f"{tmp_path}:Volker,GAPS384")) == {"all": 5}
    assert data.notes[0].startswith("only 2 pictures of ") and all(note.startswith("of all ") for note in data.notes[1:])
    names = split.names_of({"test": data.parts["all"]}, data.path)
    assert [r.file for r in split.from_names(load(f"{tmp_path}:Volker"), names)["test"]] == [r.file for r in data.parts["all"]]
    beside = {"test": [os.path.relpath(r.file, tmp_path) for r in data.parts["all"]]}
    assert names == beside == split.names_of({"test": data.parts["all"]}, f"{tmp_path}/:Volker") == split.names_of(
        {"test": data.parts["all"]}, str(tmp_path))                                                   # however the set is called
    with pytest.raises(ValueError, match=r"begins with Volk; they begin with GAPS384 \(3\), Volker \(2\), Volkers \(2\)"):
        load(f"{tmp_path}:Volk")
    with pytest.raises(ValueError, match="no such file"):
        load(f"{tmp_path}x:Volker")


@pytest.mark.parametrize("stem, name", [
    ("11122-3", "11122"), ("11122", "11122"), ("IMG_6469-1", "IMG_6469"), ("CRACK500_20160222_115828_641_1", "CRACK500_20160222_115828"),
    ("CRACK500_IMG_2931_1297_485", "CRACK500_IMG_2931"), ("GAPS384_train_0449_1_1", "GAPS384_train_0449"),
    ("Volker_DSC01653_120_360_1526_1294", "Volker_DSC01653"), ("Eugen_Muller_8980a_25_22_747_752", "Eugen_Muller_8980a"),
    ("Eugen_Muller_9360_7_26_751_632", "Eugen_Muller_9360"), ("Rissbilder_9S6A2826_0_0_3840_5760", "Rissbilder_9S6A2826"),
    ("forest_003", "forest_003"), ("cracktree200_6201", "cracktree200_6201"), ("Sylvie_noGT_ESAR_21a", "Sylvie_noGT_ESAR_21a"),
    ("001", "001"), ("12_34", "12_34")])
def test_the_photograph_of_a_crop(stem, name):
    assert photograph(stem) == name


def test_crops_of_one_photograph_stay_together_and_numbering_is_no_photograph(tmp_path):
    names = [f"p{k}-{i}" for k in range(10) for i in range(3)] + ["p0", "lone"]
    data = load(pairs(tmp_path / "a", names=names))
    groups = {r.file.split("/")[-1][:-4]: r.group for r in data.parts["all"]}
    assert groups["p0-1"] == groups["p0"] == "photograph p0" and groups["lone"] == "" and len(set(groups.values())) == 11
    parts = split.three_parts(data)
    where = {}
    for part, records in parts.items():
        for r in records:
            where.setdefault(r.group, set()).add(part)
    assert all(len(p) == 1 for g, p in where.items() if g)
    data = load(pairs(tmp_path / "b", names=[f"frame-{i}" for i in range(20)]))
    assert {r.group for r in data.parts["all"]} == {""}


# ---- CrackForest ----------------------------------------------------------------------------------------------------------------------

REGIONS = np.ones((48, 64), np.uint8)
REGIONS[10:30, 10:30] = 2
REGIONS[14:26, 14:26] = 3
REGIONS[40, 5:50] = 4
CRACK = (REGIONS == 2) | (REGIONS == 4)


def seg_file(path, values):
    runs = [f"{values[y, x] - 1} {y} {x} {x}" for y in range(values.shape[0]) for x in range(values.shape[1])]
    path.write_text(f"format ascii cr\nwidth {values.shape[1]}\nheight {values.shape[0]}\ndata\n" + "\n".join(runs) + "\n")


def crackforest(root, mat=True, seg=True):
    for folder, wanted in (("groundTruth", mat), ("seg", seg)):
        if wanted:
            (root / folder).mkdir(parents=True)
    for i in range(4):
        picture(root / f"image/{i:03d}.jpg", seed=i)
        if mat and i < 3:
            mat_file(root / f"groundTruth/{i:03d}.mat", REGIONS)
        if seg and i < 3:
            seg_file(root / f"seg/{i:03d}.seg", REGIONS)
    return root


@pytest.mark.parametrize("mat, seg", [(True, True), (True, False), (False, True)])
def test_crackforest_regions_that_cracks_enclose_are_road(tmp_path, mat, seg):
    data = load(crackforest(tmp_path, mat, seg))
    assert data.layout == "crackforest" and counts(data) == {"all": 3} and data.class_names == ("crack",) and data.test_share == 0.2
    np.testing.assert_array_equal(label_map(data.parts["all"][0]), CRACK)
    assert data.parts["all"][0].label_map.counts == ((1, int(CRACK.sum())),)
    assert any("1 pictures without ground truth left out (003.jpg" in n for n in data.notes)
    assert any(("regions 2 and 4" if mat else "regions 1 and 3") in n for n in data.notes)
    assert load(tmp_path, class_names=("damage",)).class_names == ("damage",)


def test_crackforest_bad_files_are_named(tmp_path):
    crackforest(tmp_path, seg=False)
    mat_file(tmp_path / "groundTruth/000.mat", np.where(REGIONS == 3, 9, REGIONS))
    mat_file(tmp_path / "groundTruth/001.mat", REGIONS[:40])
    mat_file(tmp_path / "groundTruth/777.mat", REGIONS)
    content = (tmp_path / "groundTruth/002.mat").read_bytes()
    (tmp_path / "groundTruth/003.mat").write_bytes(content[:200] + struct.pack("<I", 3) * 9)
    data = load(tmp_path)
    assert counts(data) == {"all": 1}
    for said in ("000.jpg: unexpected regions 9 in 000.mat (expected 1 to 4)", "001.jpg: the mask is 64x40, the picture 64x48",
                 "777.mat: ground truth without a picture", "003.mat: the MAT-file is damaged"):
        assert sum(p.startswith(said) for p in data.problems) == 1, (said, data.problems)
