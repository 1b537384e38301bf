"""Large-scale jitter and multi-scale sizes: pixels, outlines and boxes meet, by hand and on a drawn shape; sizes come from the seed."""
import dataclasses

import numpy as np
import pytest
import torch

import minidamage
from data_sets import vehide_set
from detection_cases import small_model, two_pictures
from minidamage import masks
from minidamage.config import Recipe, apply_settings
from minidamage.data import DetectionDataset, load_dataset, transforms
from minidamage.data.label_maps import IGNORE
from minidamage.training import check_recipe, make_datasets
from test_data_transforms import STAR, centroid, drawn, record_of

OFF = Recipe(hflip=0.0)


def test_a_block_of_pixels_by_hand():
    """Doubled, and cut at three quarters of what is left: pixel (x, y) becomes the square 2x - 6 .. 2x - 4, 2y - 3 .. 2y - 1."""
    image = np.zeros((6, 8, 3), np.uint8)
    image[3, 5] = 200
    record = record_of([np.array([[5.0, 3], [6, 3], [6, 4], [5, 4]])], width=8, height=6)
    draw = transforms.Draw(jitter=2.0, cut=(0.75, 0.5))
    assert transforms.jitter_geometry(draw, 8, 6) == ((16, 12), (6, 3))
    _, boxes, moved, visible = transforms.apply(image, record, draw)
    assert boxes.tolist() == [[4, 3, 6, 5]] and moved[0].sum() == 4 and visible[0] == 1
    labels = transforms.apply_to_label_map(image, (image[..., 0] > 0).astype(np.uint8), draw)[1]
    assert np.array_equal(labels, moved[0])


def test_half_the_size_is_averaged_and_the_rest_is_fill():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (8, 12, 3)).astype(np.uint8)
    record = record_of([np.array([[0.0, 0], [12, 0], [12, 8], [0, 8]])], width=12, height=8)
    out, boxes, moved, visible = transforms.apply(image, record, transforms.Draw(jitter=0.5))
    assert (out[4:] == transforms.FILL).all() and (out[:, 6:] == transforms.FILL).all()
    weights = np.array([1, 3, 3, 1]) / 8                                   # a triangle over the four pixels 2 i - 1 to 2 i + 2
    want = [[sum(weights[a] * weights[b] * image[2 * i - 1 + a, 2 * j - 1 + b].astype(float) for a in range(4) for b in range(4))
             for j in range(1, 5)] for i in range(1, 3)]
    np.testing.assert_allclose(out[1:3, 1:5], want, atol=1)
    assert boxes.tolist() == [[0, 0, 6, 4]] and moved[0].sum() == 24 and visible[0] == 1
    labels = transforms.apply_to_label_map(image, np.ones((8, 12), np.uint8), transforms.Draw(jitter=0.5))[1]
    assert (labels[:4, :6] == 1).all() and (labels[4:] == IGNORE).all() and (labels[:, 6:] == IGNORE).all()


@pytest.mark.parametrize("factor, cut, flip, angle", [
    (0.5, (0.0, 0.0), False, 0.0), (0.73, (0.9, 0.9), True, 0.0), (1.37, (0.2, 0.4), False, 0.0), (1.9, (0.3, 0.5), True, 0.0),
    (1.2, (0.5, 0.5), False, 15.0)])
def test_picture_and_outline_meet(factor, cut, flip, angle):
    image, record = drawn(STAR, 80, 72), record_of([STAR])
    out, boxes, moved, visible = transforms.apply(image, record, transforms.Draw(jitter=factor, cut=cut, flip=flip, angle=angle))
    light = out[..., 0].astype(float)
    if factor < 1 or angle:
        light[light == transforms.FILL[0]] = 0
    assert moved[0].sum() > 200 and ((light > 127) != (moved[0] > 0)).sum() <= 0.03 * moved[0].sum()
    np.testing.assert_allclose(centroid(light), centroid(moved[0].astype(float)), atol=0.25)       # a rim rounds; half a pixel shows
    np.testing.assert_allclose(boxes[0], transforms.boxes_of_masks(moved)[0], atol=1.0)
    assert visible[0] == pytest.approx(moved[0].sum() / (record.area[0] * factor ** 2), rel=0.03)


def test_run_lengths_move_as_their_outline():
    record = record_of([STAR])
    rle = masks.from_polygons([STAR], 72, 80)
    for draw in (transforms.Draw(jitter=1.6, cut=(0.3, 0.6)), transforms.Draw(jitter=0.4)):
        image = np.zeros((72, 80, 3), np.uint8)
        outline = transforms.apply(image, record, draw)[2][0]
        runs = transforms.apply(image, dataclasses.replace(record, masks=[rle]), draw)[2][0]
        assert (outline != runs).sum() <= 0.1 * outline.sum()


@pytest.mark.parametrize("motion", [dict(shift=(0.0, 0.3)), dict(scale=0.7), dict(angle=40.0, flip=True)])
def test_what_the_jitter_cut_off_is_no_target_after_another_motion(motion):
    """A bar as high as the picture, doubled and cut, then moved: where the picture is filled its mask and box end, as its label map does."""
    image, bar = np.zeros((90, 100, 3), np.uint8), np.array([[46.0, 0], [54, 0], [54, 90], [46, 90]])
    image[:, 46:54] = 255
    draw = transforms.Draw(jitter=2.0, cut=(0.5, 0.5), **motion)
    _, boxes, moved, visible = transforms.apply(image, record_of([bar], width=100, height=90), draw)
    labels = transforms.apply_to_label_map(image, (image[..., 0] > 0).astype(np.uint8), draw)[1] == 1
    assert ((moved[0] > 0) != labels).sum() < 0.06 * labels.sum() and 0.3 < visible[0] < 0.55
    np.testing.assert_allclose(boxes[0], transforms.boxes_of_masks(labels[None].astype(np.uint8))[0], atol=1.5)
    alone = transforms.apply(image, record_of([bar], width=100, height=90), draw, with_masks=False)[1][0]
    assert (alone[:2] <= boxes[0, :2] + 1).all() and (alone[2:] >= boxes[0, 2:] - 1).all()
    corner = record_of([np.array([[0.0, 0], [8, 0], [8, 8], [0, 8]])], width=100, height=90)             # wholly cut off
    for with_masks in (False, True):
        assert transforms.apply(image, corner, draw, with_masks)[3][0] == 0


def test_draws_are_in_range_and_leave_the_others_alone():
    recipe = dataclasses.replace(Recipe(rotate=10.0, brightness=0.2), jitter_scale=(0.1, 2.0), multi_scale=(480, 512, 544))
    draws = [transforms.draw(recipe, np.random.default_rng([0, i])) for i in range(300)]
    without = [transforms.draw(Recipe(rotate=10.0, brightness=0.2), np.random.default_rng([0, i])) for i in range(300)]
    factors = [draw.jitter for draw in draws]
    assert 0.1 <= min(factors) < 0.2 and 1.9 < max(factors) <= 2.0 and abs(np.mean(factors) - 1.05) < 0.1
    assert {draw.shorter_side for draw in draws} == {480, 512, 544}
    assert all((a.flip, a.angle, a.brightness) == (b.flip, b.angle, b.brightness) for a, b in zip(draws, without))
    assert all(b.jitter == 1.0 and b.shorter_side == 0 and b.cut == (0.0, 0.0) for b in without)
    assert apply_settings(Recipe(), ["jitter_scale=0.1,2.0", "multi_scale=480,512"]).multi_scale == (480, 512)


@pytest.fixture
def samples(tmp_path):
    root = vehide_set(tmp_path, [("rach", [10, 30, 30, 10], [10, 10, 30, 30])])
    return load_dataset(str(root)).parts["train"]


def test_objects_that_the_cut_leaves_out_are_no_targets_and_the_sample_is_the_seed_s(samples):
    recipe = dataclasses.replace(OFF, jitter_scale=(3.0, 3.0), multi_scale=(48, 64, 96))
    counts, sizes = set(), set()
    for epoch in range(12):
        dataset = DetectionDataset(samples, recipe, seed=1, train=True)
        dataset.set_epoch(epoch)
        image, target = dataset[0]
        again = dataset[0]
        assert torch.equal(image, again[0]) and again[1]["min_size"] == target["min_size"] and image.shape == (3, 48, 64)
        counts.add(len(target["boxes"])), sizes.add(target["min_size"])
        assert (target["masks"].flatten(1).sum(1) > 0).all()
    assert counts == {0, 1} and sizes == {48, 64, 96}
    assert "min_size" not in DetectionDataset(samples)[0][1]


def test_the_model_resizes_each_picture_to_its_own_side():
    images, targets = two_pictures()                                        # 96 x 112 and 100 x 96
    model = small_model(min_size=96, max_size=256).train()
    small, large = dict(targets[0], min_size=48, iscrowd=torch.tensor([False, True])), dict(targets[1], min_size=192)
    batch, resized = model.prepare(images, [small, large])
    assert batch.sizes == [(48, 56), (200, 192)]
    torch.testing.assert_close(resized[0]["boxes"], targets[0]["boxes"][:1] / 2)
    torch.testing.assert_close(resized[1]["boxes"], targets[1]["boxes"] * 2)
    assert resized[1]["masks"].shape == (2, 200, 192)
    assert model.prepare(images, targets)[0].sizes == [(96, 112), (100, 96)]
    transform = small_model(min_size=96, max_size=96).transform              # the longer side's limit goes with the shorter's
    assert [transform.resized_size(300, 400, side) for side in (48, 96, 192)] == [(36, 48), (72, 96), (144, 192)]


@pytest.mark.parametrize("fields, message", [
    (dict(jitter_scale=(0.1,)), "jitter_scale: expected the smallest and the largest factor"),
    (dict(jitter_scale=(0.0, 2.0)), "jitter_scale"), (dict(jitter_scale=(2.0, 0.1)), "jitter_scale"),
    (dict(milestones=(-1, 3)), "milestones: expected epochs of 0 or more"),
    (dict(multi_scale=(480, 8)), "multi_scale: expected shorter sides of 32")])
def test_wrong_settings_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        check_recipe(dataclasses.replace(Recipe(select_by="loss"), **fields), ["loss"])


def test_a_segmenter_has_one_size(samples):
    model = minidamage.build_model("custom_segnet2", 2, image_size=64)
    with pytest.raises(ValueError, match="multi_scale: custom_segnet2 takes pictures of one size"):
        make_datasets(model, {"train": samples, "val": samples}, dataclasses.replace(Recipe(), multi_scale=(64, 96)), 0, "set")
