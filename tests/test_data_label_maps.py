"""Label maps from objects and from files, and the samples that a segmentation model is fed."""
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data_sets import counts_of
from minidamage import masks
from minidamage.config import Recipe
from minidamage.data import DetectionDataset, SegmentationDataset, mat, transforms
from minidamage.data.label_maps import IGNORE, LabelMapFile, label_map, read_seg, read_values, table_of
from minidamage.data.record import Record

SQUARES = {"large": [2, 2, 22, 22], "small": [8, 8, 12, 14]}


def ring(x0, y0, x1, y1):
    return np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], np.float64)


def record_of(segmentations, labels, crowd=None, width=32, height=24, file="a.png", boxes=None, **more):
    count = len(segmentations)
    boxes = np.array(boxes if boxes is not None else [[0, 0, 1, 1]] * count, np.float32).reshape(-1, 4)
    return Record(file=str(file), image_id=1, width=width, height=height, boxes=boxes, labels=np.array(labels, np.int64),
                  masks=list(segmentations), crowd=np.array(crowd or [False] * count, bool), area=np.ones(count),
                  annotation_ids=np.arange(count), **more)


# ---- from objects ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("order", [("large", "small"), ("small", "large")])
def test_the_smaller_object_lies_on_top_whatever_the_order(order):
    label = {"large": 1, "small": 2}
    labels = label_map(record_of([[ring(*SQUARES[n])] for n in order], [label[n] for n in order]))
    assert labels.dtype == np.uint8 and labels.shape == (24, 32)
    expected = np.zeros((24, 32), np.uint8)
    expected[2:22, 2:22] = 1
    expected[8:14, 8:12] = 2
    np.testing.assert_array_equal(labels, expected)


def test_holes_stay_and_parts_of_one_object_are_one_label():
    mask = np.zeros((24, 32), np.uint8)
    mask[2:22, 2:22] = 1
    mask[6:18, 6:18] = 0
    rle = masks.encode(mask)
    parts = [ring(24, 2, 28, 6), ring(24, 10, 28, 14)]
    labels = label_map(record_of([rle, parts], [3, 1]))
    expected = mask * 3
    expected[2:6, 24:28] = expected[10:14, 24:28] = 1
    np.testing.assert_array_equal(labels, expected)


def test_crowd_is_not_judged_and_lies_under_the_objects():
    labels = label_map(record_of([[ring(8, 8, 12, 14)], [ring(2, 2, 22, 22)]], [2, 1], crowd=[False, True]))
    assert (labels == 2).sum() == 24 and (labels == IGNORE).sum() == 400 - 24 and (labels[8:14, 8:12] == 2).all()
    small_crowd = label_map(record_of([[ring(2, 2, 22, 22)], [ring(8, 8, 12, 14)]], [2, 1], crowd=[False, True]))
    assert (small_crowd == 2).sum() == 400 and not (small_crowd == IGNORE).any()


def test_an_object_of_which_only_the_box_is_known_is_not_judged():
    labels = label_map(record_of([None, [ring(2, 2, 6, 6)]], [1, 1], boxes=[[4, 4, 10, 10], [2, 2, 6, 6]]))
    assert (labels[2:6, 2:6] == 1).all() and (labels == IGNORE).sum() == 36 - 4
    with pytest.raises(ValueError, match="expects masks or outlines, got 1 objects of which only the box is known"):
        SegmentationDataset([record_of([None], [1])])


def test_a_picture_without_objects_is_all_background():
    assert not label_map(record_of([], [])).any()


# ---- from files ------------------------------------------------------------------------------------------------------------------

def save(path, values, mode=None):
    Image.fromarray(values, mode).save(path) if mode else Image.fromarray(values).save(path)
    return path


def test_read_values_of_every_kind_of_picture(tmp_path):
    values = np.zeros((6, 8), np.uint8)
    values[2:4, 3:6] = 1
    palette = Image.fromarray(values, "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    palette.save(tmp_path / "p.png")
    Image.fromarray(values > 0).save(tmp_path / "bits.png")
    save(tmp_path / "grey.png", values * 255)
    save(tmp_path / "rgb.png", np.stack([values] * 3, -1))
    save(tmp_path / "rgba.png", np.stack([values * 255] * 3 + [np.full_like(values, 7)], -1))
    save(tmp_path / "deep.png", values.astype(np.uint16))
    for name, kind, top in (("p", "palette", 1), ("bits", "1-bit", 255), ("grey", "grey", 255), ("rgb", "grey", 1), ("rgba", "grey", 255),
                            ("deep", "grey", 1)):
        read, found = read_values(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read, values * top, err_msg=name)
        assert found == kind and read.dtype == np.uint8
    Image.fromarray(np.stack([values * 255, values * 255], -1), "LA").save(tmp_path / "la.png")
    Image.fromarray(values * 255).convert("CMYK").save(tmp_path / "cmyk.tif")
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tif")
    for name, top in (("la.png", 255), ("cmyk.tif", 255), ("float.tif", 1)):
        np.testing.assert_array_equal(read_values(tmp_path / name)[0], values * top, err_msg=name)
    smooth = np.kron(values * 255, np.ones((16, 16), np.uint8))
    save(tmp_path / "lossy.jpg", smooth)
    read, found = read_values(tmp_path / "lossy.jpg")
    assert found == "lossy" and ((read > 127) == (smooth > 127)).all()
    save(tmp_path / "wide.png", values.astype(np.uint16) * 300)
    save(tmp_path / "colour.png", np.stack([values * 200, values, values], -1))
    with pytest.raises(ValueError, match="from 0 to 300; expected class ids"):
        read_values(tmp_path / "wide.png")
    with pytest.raises(ValueError, match=r"a mask in colours: \(0, 0, 0\) \(42 px\), \(200, 1, 1\) \(6 px\).*palette PNG"):
        read_values(tmp_path / "colour.png")


def test_tables_layers_turns_and_renumbering(tmp_path):
    values = np.zeros((6, 8), np.uint8)
    values[1, 2:5] = 2
    values[3, 3] = 4
    first = save(tmp_path / "a.png", values)
    over = save(tmp_path / "b.png", np.where(np.arange(8) == 7, 255, 0).astype(np.uint8)[None].repeat(6, 0))
    one = LabelMapFile(str(first), table_of(((2, 1), (4, 1))))
    assert set(np.unique(one.read())) == {0, 1} and one.read().sum() == 4
    two = LabelMapFile(str(first), table_of(((2, 1), (4, 1))), counts=((1, 4),),
                       layers=(LabelMapFile(str(over), table_of(((255, 3),)), counts=((3, 6),)),))
    assert two.present == (1, 3) and (two.read()[:, 7] == 3).all() and (two.read()[1, 2:5] == 1).all()
    assert counts_of(two.read()) == ((1, 4), (3, 6))
    other = two.renumbered([0, 5, 0, 2])
    assert other.present == (2, 5) and (other.read()[:, 7] == 2).all() and (other.read()[1, 2:5] == 5).all()
    turned = LabelMapFile(str(first), turn=6).read()
    np.testing.assert_array_equal(turned, np.rot90(values, -1))


def test_a_mask_of_another_size_or_cut_short_is_named(tmp_path):
    file = save(tmp_path / "m.png", np.zeros((6, 8), np.uint8))
    with pytest.raises(ValueError, match=r"m.png: the mask is 8x6, the picture a.png is 32x24"):
        label_map(record_of([], [], label_map=LabelMapFile(str(file))))
    noise = np.random.default_rng(0).integers(0, 2, (64, 64), np.uint8)
    whole = save(tmp_path / "n.png", noise).read_bytes()
    (tmp_path / "n.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="n.png: the mask is damaged or cut short"):
        read_values(tmp_path / "n.png")


# ---- CrackForest's two files -----------------------------------------------------------------------------------------------------

def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def matrix(name, values, kind=6, stored=9):
    """A miMATRIX element as MATLAB writes it: flags, dimensions, name, numbers in column order."""
    code = {9: "<f8", 2: "<u1"}[stored]
    body = (element(6, struct.pack("<II", kind, 0)) + element(5, struct.pack("<ii", *values.shape)) + element(1, name)
            + element(stored, values.astype(code).tobytes("F")))
    return element(14, body)


def mat_file(path, segmentation, compressed=True, stored=9):
    names = b"Segmentation\0".ljust(32, b"\0") + b"Boundaries".ljust(32, b"\0")
    small = struct.pack("<HHI", 5, 4, 32)                             # the field names' length, in the four-byte form
    body = (element(6, struct.pack("<II", 2, 0)) + element(5, struct.pack("<ii", 1, 1)) + element(1, b"groundTruth") + small
            + element(1, names) + matrix(b"", segmentation, stored=stored) + matrix(b"", segmentation > 1, kind=9, stored=2))
    whole = element(14, body)
    if compressed:
        packed = zlib.compress(whole)
        whole = struct.pack("<II", 15, len(packed)) + packed          # compressed elements are not padded
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x100) + b"IM" + whole)
    return path


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("stored", [9, 2])
def test_mat_5(tmp_path, compressed, stored):
    values = np.array([[1, 1, 2, 1], [1, 4, 2, 3], [1, 1, 1, 1]])
    file = mat_file(tmp_path / "a.mat", values, compressed, stored)
    read = mat.load(file)["groundTruth"]
    np.testing.assert_array_equal(read["Segmentation"], values)
    assert read["Segmentation"].dtype == np.float64 and read["Boundaries"].dtype == np.uint8
    np.testing.assert_array_equal(mat.segmentation(file), values)
    content = file.read_bytes()
    for cut in (60, 130, len(content) - 9):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="a.mat"):
            mat.segmentation(file)
    file.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 200)
    with pytest.raises(ValueError, match="version 7.3.*'-v6'"):
        mat.segmentation(file)


def test_mat_damaged_anywhere_is_a_value_error(tmp_path):
    content = bytearray(mat_file(tmp_path / "a.mat", np.arange(1, 13).reshape(3, 4), compressed=False).read_bytes())
    rng = np.random.default_rng(0)
    for at in range(128, len(content), 2):
        for value in rng.integers(0, 256, 3).tolist():
            damaged = bytearray(content)
            damaged[at] = value
            (tmp_path / "b.mat").write_bytes(damaged)
            try:
                values = mat.segmentation(tmp_path / "b.mat")
            except ValueError as error:
                assert "b.mat" in str(error)
                continue
            assert values.dtype == np.uint8 and values.ndim == 2


def test_seg_runs(tmp_path):
    head = "format ascii cr\nimage C:\\a b.jpg\nwidth 4\nheight 2\nsegments 2\ndata\n"
    file = tmp_path / "a.seg"
    file.write_text(head + "0 0 0 1\n1 0 2 3\n0 1 0 3\n")
    np.testing.assert_array_equal(read_seg(file), [[0, 0, 1, 1], [0, 0, 0, 0]])
    for runs, said in (("0 0 0 1\n", "6 pixels are in no run"), ("0 0 0 4\n", "outside the 4x2 picture"), ("0 0 0\n", "not a .seg file")):
        file.write_text(head + runs)
        with pytest.raises(ValueError, match="a.seg: .*" + said):
            read_seg(file)


# ---- SegmentationDataset ---------------------------------------------------------------------------------------------------------

RECIPE = Recipe(hflip=0.5, vflip=0.5, rot90=0.5, rotate=30, shift=0.1, scale=0.2, shift_scale_rotate=0.7, brightness=0.2, contrast=0.2,
                saturation=0.2, hue=0.05, noise=5)


@pytest.fixture
def records(tmp_path):
    """Five pictures 40 x 40 whose light pixels are their foreground."""
    out = []
    for i in range(5):
        values = np.zeros((40, 40), np.uint8)
        values[4 + i:20, 6:16 + i] = 1
        save(tmp_path / f"{i}.png", np.stack([values * 255] * 3, -1))
        save(tmp_path / f"{i}_mask.png", values)
        out.append(record_of([], [], width=40, height=40, file=tmp_path / f"{i}.png",
                             label_map=LabelMapFile(str(tmp_path / f"{i}_mask.png"), counts=counts_of(values))))
        out[-1].image_id = i
    return out


def test_sample_contract_and_sizes(records):
    image, target = SegmentationDataset(records)[2]
    assert image.shape == (3, 40, 40) and image.dtype == torch.uint8 and image.is_contiguous()
    assert target["label_map"].shape == (40, 40) and target["label_map"].dtype == torch.uint8
    assert (target["image_id"], target["index"], target["file"], target["replaced"]) == (2, 2, records[2].file, "")
    assert torch.equal(image[0] > 127, target["label_map"] == 1)
    image, target = SegmentationDataset(records, image_size=80)[2]
    assert image.shape == (3, 80, 80) and target["label_map"].shape == (80, 80)
    np.testing.assert_array_equal(target["label_map"], label_map(records[2]).repeat(2, 0).repeat(2, 1))
    assert torch.equal(image[0] > 127, target["label_map"] == 1)                   # resized to the same place
    image, target = SegmentationDataset(records, image_size=20)[2]
    assert torch.equal(image[0] > 127, target["label_map"] == 1)


def test_resizing_makes_no_label_that_was_not_there(records):
    record = record_of([[ring(4, 4, 20, 30)]], [6], width=40, height=40, file=records[0].file)
    labels = SegmentationDataset([record], image_size=33)[0][1]["label_map"].numpy()
    assert set(np.unique(labels)) == {0, 6} and labels.shape == (33, 33)
    centres = ((np.arange(33) + 0.5) * 40 / 33).astype(int)
    np.testing.assert_array_equal(labels, label_map(record)[np.ix_(centres, centres)])           # the pixel under each new pixel's centre


def test_outlines_feed_the_same_dataset(records):
    record = record_of([[ring(4, 4, 20, 30)]], [2], width=40, height=40, file=records[0].file)
    target = SegmentationDataset([record])[0][1]
    assert (target["label_map"] == 2).sum() == 16 * 26


def test_samples_depend_on_seed_epoch_and_index_alone(records):
    dataset = SegmentationDataset(records, RECIPE, seed=3, train=True, image_size=48)
    dataset.set_epoch(2)
    first = [dataset[i] for i in range(5)]
    again = SegmentationDataset(records, RECIPE, seed=3, train=True, image_size=48)
    again.set_epoch(2)
    for i in (4, 0, 2):
        image, target = again[i]
        assert torch.equal(image, first[i][0]) and torch.equal(target["label_map"], first[i][1]["label_map"])
    again.set_epoch(3)
    assert not all(torch.equal(again[i][0], first[i][0]) for i in range(5))


def test_an_unreadable_picture_or_mask_is_replaced_in_training_and_kept_in_evaluation(records, capsys):
    for path in (records[1].file, records[2].label_map.file):
        with open(path, "r+b") as handle:
            handle.truncate(60)
    train = SegmentationDataset(records, RECIPE, train=True)
    assert train[1][1]["replaced"] == records[1].file and train[1][1]["file"] == records[3].file
    assert capsys.readouterr().err.count("warning: ") == 2
    image, target = SegmentationDataset(records)[1]
    assert image.max() == 0 and (target["label_map"] == 1).any() and target["replaced"] == records[1].file
    image, target = SegmentationDataset(records)[2]
    assert image.max() == 0 and (target["label_map"] == IGNORE).all()


def test_nothing_to_learn_is_refused_in_training_alone(records):
    empty = [record_of([], [], width=40, height=40, file=r.file, label_map=LabelMapFile(r.label_map.file)) for r in records]
    with pytest.raises(ValueError, match="5 pictures whose masks are all background"):
        SegmentationDataset(empty, RECIPE, train=True)
    assert len(SegmentationDataset(empty)) == 5


def test_a_detector_refuses_label_maps(records):
    with pytest.raises(ValueError, match="expects pictures with boxes or outlines, got 5 with a mask.*segmentation model"):
        DetectionDataset(records)


# ---- augmentation: picture and label map stay together ---------------------------------------------------------------------------

def blocks(height, width, seed=0):
    """A label map of blocks five pixels wide, so that a nearest and a bilinear lookup agree away from their borders."""
    cells = np.random.default_rng(seed).integers(0, 2, (height // 5, width // 5), np.uint8)
    return np.kron(cells, np.ones((5, 5), np.uint8))


@pytest.mark.parametrize("draw", [
    transforms.Draw(), transforms.Draw(flip=True), transforms.Draw(vflip=True), transforms.Draw(quarter_turns=1),
    transforms.Draw(quarter_turns=2), transforms.Draw(flip=True, quarter_turns=3)])
@pytest.mark.parametrize("height, width", [(40, 40), (30, 50)])
def test_flips_and_quarter_turns_move_picture_and_label_map_exactly(draw, height, width):
    labels = blocks(height, width)
    image, moved = transforms.apply_to_label_map(np.stack([labels * 255] * 3, -1), labels, draw)
    assert moved.shape == labels.shape
    np.testing.assert_array_equal(image[..., 0] > 127, moved == 1)
    expected = labels[:, ::-1] if draw.flip else labels
    expected = expected[::-1] if draw.vflip else expected
    turns = draw.quarter_turns if height == width or draw.quarter_turns == 2 else 0
    np.testing.assert_array_equal(moved, np.rot90(expected, -turns))


@pytest.mark.parametrize("draw", [
    transforms.Draw(angle=17.0), transforms.Draw(shift=(0.11, -0.07)), transforms.Draw(scale=1.3), transforms.Draw(scale=0.8),
    transforms.Draw(angle=-33.0, shift=(-0.1, 0.05), scale=1.15, flip=True, quarter_turns=1),
    transforms.Draw(angle=45.0, scale=0.7, vflip=True, brightness=1.1, contrast=0.9, hue=0.1, noise=4.0, noise_seed=1)])
@pytest.mark.parametrize("height, width", [(100, 100), (80, 120)])
def test_shift_scale_rotate_keeps_picture_and_label_map_aligned_to_the_pixel(draw, height, width):
    labels = blocks(height, width)
    image, moved = transforms.apply_to_label_map(np.stack([labels * 255] * 3, -1), labels, draw)
    seen = moved != IGNORE
    assert 0.3 < seen.mean() <= 1
    light = image.astype(float).mean(-1) > 127
    assert (light != (moved == 1))[seen].mean() < 0.045                               # bilinear corners of the blocks round off, no more
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (-1, -1)):                 # one pixel beside, it fits far worse
        beside = np.roll(light, (dy, dx), (0, 1))
        assert (beside != (moved == 1))[seen].mean() > 0.08
    uncovered = transforms.warp_picture(np.zeros((height, width), np.uint8), transforms.matrix_of(draw, width, height), 1, 0)
    np.testing.assert_array_equal(seen, uncovered == 0)


def test_what_is_uncovered_is_filled_and_not_judged():
    draw = transforms.Draw(shift=(0.25, 0))
    image, moved = transforms.apply_to_label_map(np.zeros((40, 40, 3), np.uint8), np.ones((40, 40), np.uint8), draw)
    assert (moved[:, :10] == IGNORE).all() and (moved[:, 10:] == 1).all()
    assert (image[:, :10] == transforms.FILL).all() and not image[:, 10:].any()


def test_matrices_by_hand():
    point = lambda draw, x, y: transforms.warp_points([[x, y]], transforms.matrix_of(draw, 80, 80))[0].tolist()
    assert point(transforms.Draw(vflip=True), 10, 5) == [10, 75]
    assert point(transforms.Draw(quarter_turns=1), 10, 5) == [75, 10]                     # clockwise: the top edge becomes the right one
    assert point(transforms.Draw(shift=(0.1, 0.2)), 10, 5) == [18, 21]
    assert point(transforms.Draw(scale=2.0), 30, 40) == [20, 40]
    assert np.allclose(transforms.warp_points([[10, 5]], transforms.matrix_of(transforms.Draw(shift=(0.1, 0.2)), 80, 60)), [[18, 17]])
    assert transforms.warp_points([[10, 5]], transforms.matrix_of(transforms.Draw(quarter_turns=1), 80, 60))[0].tolist() == [10, 5]


def test_polygons_boxes_and_masks_follow_the_new_transforms():
    star = np.array([[10.0, 10], [30, 12], [24, 30]])
    record = record_of([[star]], [1], width=40, height=40, boxes=[[10, 10, 30, 30]])
    image = np.repeat(masks.decode(masks.from_polygons([star], 40, 40))[..., None] * 255, 3, 2).astype(np.uint8)
    for draw in (transforms.Draw(vflip=True), transforms.Draw(quarter_turns=1), transforms.Draw(quarter_turns=3, flip=True),
                 transforms.Draw(scale=0.8, shift=(0.1, -0.1), angle=20)):
        light, boxes, moved, visible = transforms.apply(image, record, draw)
        assert ((light[..., 0] > 127) != (moved[0] > 0))[(light != transforms.FILL).any(-1)].sum() <= 0.1 * moved[0].sum()
        np.testing.assert_allclose(boxes[0], transforms.boxes_of_masks(moved)[0], atol=1.0)
        assert visible[0] > 0.9


def test_hue_keeps_grey_and_brightness_and_noise_has_its_deviation():
    grey = np.full((4, 4, 3), 90, np.uint8)
    assert np.abs(transforms.recolour(grey, transforms.Draw(hue=0.2)).astype(int) - 90).max() <= 1
    red = np.full((4, 4, 3), (150, 90, 90), np.uint8)
    turned = transforms.recolour(red, transforms.Draw(hue=1 / 3))[0, 0].astype(float)
    assert turned.argmax() == 1 and turned @ [0.299, 0.587, 0.114] == pytest.approx(108, abs=1.5)
    back = transforms.recolour(transforms.recolour(red, transforms.Draw(hue=0.2)), transforms.Draw(hue=-0.2))
    assert np.abs(back.astype(int) - red).max() <= 2
    flat = np.full((200, 200, 3), 128, np.uint8)
    noisy = transforms.recolour(flat, transforms.Draw(noise=6.0, noise_seed=3)).astype(float)
    assert noisy.std() == pytest.approx(6, rel=0.03) and noisy.mean() == pytest.approx(128, abs=0.1)
    np.testing.assert_array_equal(noisy, transforms.recolour(flat, transforms.Draw(noise=6.0, noise_seed=3)))


def test_draws_of_the_new_fields():
    recipe = Recipe(hflip=0, vflip=0.5, rot90=0.5, rotate=30, shift=0.1, scale=0.2, shift_scale_rotate=0.6, hue=0.1, noise=5)
    draws = [transforms.draw(recipe, np.random.default_rng(i)) for i in range(600)]
    assert 0.43 < np.mean([d.vflip for d in draws]) < 0.57 and 0.43 < np.mean([d.quarter_turns > 0 for d in draws]) < 0.57
    assert {d.quarter_turns for d in draws} == {0, 1, 2, 3}
    still = [d for d in draws if not d.angle]
    assert 0.33 < len(still) / 600 < 0.47 and all(d.scale == 1 and d.shift == (0, 0) for d in still)
    for values, low, high in (([d.scale for d in draws], 0.8, 1.2), ([d.shift[0] for d in draws], -0.1, 0.1),
                              ([d.shift[1] for d in draws], -0.1, 0.1), ([d.hue for d in draws], -0.1, 0.1),
                              ([d.noise for d in draws], 0, 5)):
        spare = 0.02 * (high - low)
        assert low <= min(values) < low + spare and high - spare < max(values) <= high
    plain = Recipe(hflip=0, rotate=30)
    assert all(transforms.draw(plain, np.random.default_rng(i)) == transforms.Draw(
        angle=transforms.draw(plain, np.random.default_rng(i)).angle) for i in range(50))
