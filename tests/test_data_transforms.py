"""Augmentation moves pixels, outlines, RLE and boxes to the same place; samples depend on (seed, epoch, index) alone."""
import multiprocessing

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from data_sets import picture, vehide_set
from minidamage import masks
from minidamage.config import Recipe
from minidamage.data import DetectionDataset, SegmentationDataset, collate, limit, load_dataset
from minidamage.data import transforms
from minidamage.data.record import Record

STAR = np.array([[20.0, 14], [52, 22], [60, 50], [38, 40], [16, 58]])


def record_of(outlines, width=80, height=72, labels=None, file="a.png", **changes):
    boxes = [[*p.min(0), *p.max(0)] for p in outlines]
    areas = [abs(np.dot(p[:, 0], np.roll(p[:, 1], -1)) - np.dot(p[:, 1], np.roll(p[:, 0], -1))) / 2 for p in outlines]
    values = dict(file=str(file), image_id=1, width=width, height=height, boxes=np.array(boxes, np.float32).reshape(-1, 4),
                  labels=np.array(labels or [1] * len(outlines), np.int64), masks=[[p] for p in outlines],
                  crowd=np.zeros(len(outlines), bool), area=np.array(areas), annotation_ids=np.arange(len(outlines)))
    return Record(**{**values, **changes})


def drawn(outline, width, height, sharp=8):
    """A picture of the shape, antialiased by drawing it `sharp` times larger: an oracle that knows no affine matrix."""
    big = Image.new("L", (width * sharp, height * sharp))
    ImageDraw.Draw(big).polygon([(x * sharp - 0.5, y * sharp - 0.5) for x, y in outline], fill=255)
    return np.asarray(big.reduce(sharp))[..., None].repeat(3, 2)


def centroid(weights):
    y, x = np.mgrid[:weights.shape[0], :weights.shape[1]] + 0.5
    return np.array([(x * weights).sum(), (y * weights).sum()]) / weights.sum()


@pytest.mark.parametrize("flip, angle", [(False, 0.0), (True, 0.0), (False, 15.0), (True, -15.0), (False, 7.3), (False, 90.0)])
def test_picture_and_mask_meet_without_a_half_pixel_shift(flip, angle):
    image = drawn(STAR, 80, 72)
    draw = transforms.Draw(flip=flip, angle=angle)
    out, boxes, moved, visible = transforms.apply(image, record_of([STAR]), draw)
    light = out[..., 0].astype(float)
    light[light == transforms.FILL[0]] = 0                                       # corners that the rotation uncovers
    assert ((light > 127) != (moved[0] > 0)).sum() <= 0.02 * moved[0].sum()      # the rim alone may round differently
    np.testing.assert_allclose(centroid(light), centroid(moved[0].astype(float)), atol=0.12)
    np.testing.assert_allclose(boxes[0], transforms.boxes_of_masks(moved)[0], atol=1.0)
    assert visible[0] == pytest.approx(1, abs=0.05)


def test_rotation_turns_clockwise_about_the_centre_by_hand():
    matrix = transforms.matrix_of(transforms.Draw(angle=90.0), 80, 80)
    np.testing.assert_allclose(transforms.warp_points([[40, 0], [80, 40], [40, 40]], matrix), [[80, 40], [40, 80], [40, 40]], atol=1e-9)
    np.testing.assert_allclose(transforms.warp_points([[0, 5]], transforms.matrix_of(transforms.Draw(flip=True), 80, 80)), [[80, 5]])


def test_flip_is_exact_in_pixels_masks_and_boxes():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (72, 80, 3), np.uint8)
    out, boxes, moved, _ = transforms.apply(image, record_of([STAR]), transforms.Draw(flip=True))
    np.testing.assert_array_equal(out, image[:, ::-1])
    plain = masks.decode(masks.from_polygons([STAR], 72, 80))
    assert (moved[0] != plain[:, ::-1]).sum() <= 4                               # the rasteriser rounds .5 one way
    np.testing.assert_allclose(boxes[0], [20, 14, 64, 58])


@pytest.mark.parametrize("flip, angle", [(True, 0.0), (False, 12.0), (True, -9.0)])
def test_rle_moves_like_polygons(flip, angle):
    rle = masks.from_polygons([STAR], 72, 80)
    draw = transforms.Draw(flip=flip, angle=angle)
    image = np.zeros((72, 80, 3), np.uint8)
    by_outline = transforms.apply(image, record_of([STAR]), draw)[2][0]
    by_rle = transforms.apply(image, record_of([STAR], masks=[rle]), draw)[2][0]
    union = (by_outline | by_rle).sum()
    assert (by_outline & by_rle).sum() / union > 0.95


def test_boxes_without_masks_and_reduced_pictures():
    record = record_of([STAR], masks=[None])
    image = np.zeros((36, 40, 3), np.uint8)                                       # half of 80 x 72
    _, boxes, moved, _ = transforms.apply(image, record, transforms.Draw())
    np.testing.assert_allclose(boxes[0], [8, 7, 30, 29])
    assert moved[0].sum() == 22 * 22
    _, boxes, moved, _ = transforms.apply(image, record, transforms.Draw(angle=90.0), with_masks=False)
    assert moved is None and boxes.shape == (1, 4)


def test_recolour_keeps_1_and_scales():
    image = np.full((4, 4, 3), 100, np.uint8)
    np.testing.assert_array_equal(transforms.recolour(image, transforms.Draw()), image)
    assert transforms.recolour(image, transforms.Draw(brightness=1.5))[0, 0, 0] == 150
    assert transforms.recolour(np.uint8([[[200, 100, 0]]]), transforms.Draw(saturation=0.0))[0, 0].std() < 1


def test_draws_stay_in_range_and_do_not_depend_on_each_other():
    full, no_turn = Recipe(rotate=15, brightness=0.2), Recipe(rotate=0, brightness=0.2)
    draws = [transforms.draw(full, np.random.default_rng(i)) for i in range(300)]
    angles = [d.angle for d in draws]
    assert -15 <= min(angles) < -14 and 14 < max(angles) <= 15 and 0.8 <= min(d.brightness for d in draws) < 0.82
    assert 0.4 < np.mean([d.flip for d in draws]) < 0.6
    assert [d.brightness for d in draws] == [transforms.draw(no_turn, np.random.default_rng(i)).brightness for i in range(300)]


# ---- DetectionDataset ---------------------------------------------------------------------------------------------------------------

RECIPE = Recipe(hflip=0.5, rotate=15, brightness=0.2, contrast=0.2, saturation=0.2)


@pytest.fixture
def records(tmp_path):
    files = [picture(tmp_path / f"{i}.png", 80, 72, seed=i) for i in range(6)]
    return [record_of([STAR, STAR * 0.4 + 3], file=f, image_id=i, labels=[1, 2]) for i, f in enumerate(files[:5])] \
        + [record_of([], file=files[5], image_id=5)]


def test_sample_contract(records):
    image, target = DetectionDataset(records)[2]
    assert image.shape == (3, 72, 80) and image.dtype == torch.uint8 and image.is_contiguous()
    for key, shape, dtype in (("boxes", (2, 4), torch.float32), ("labels", (2,), torch.int64), ("masks", (2, 72, 80), torch.uint8),
                              ("iscrowd", (2,), torch.bool), ("area", (2,), torch.float64)):
        assert target[key].shape == shape and target[key].dtype == dtype, key
    assert (target["image_id"], target["index"], target["file"], target["replaced"]) == (2, 2, records[2].file, "")
    empty = DetectionDataset(records, RECIPE, train=True)[5][1]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 72, 80) and empty["labels"].dtype == torch.int64
    images, targets = collate([DetectionDataset(records)[i] for i in (0, 5)])
    assert len(images) == len(targets) == 2


def test_same_seed_epoch_and_index_give_the_same_bytes_whatever_the_workers(records):
    def epoch_of(dataset, number, workers):
        dataset.set_epoch(number)
        loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=workers, collate_fn=collate,
                                             multiprocessing_context=multiprocessing.get_context("fork") if workers else None)
        return [(i, t) for images, targets in loader for i, t in zip(images, targets)]

    def same(a, b):
        return all(torch.equal(x, y) and all(torch.equal(t[k], u[k]) for k in ("boxes", "labels", "masks")) for (x, t), (y, u) in zip(a, b))

    first = epoch_of(DetectionDataset(records, RECIPE, seed=3, train=True), 4, 0)
    assert same(first, epoch_of(DetectionDataset(records, RECIPE, seed=3, train=True), 4, 2))
    assert not same(first, epoch_of(DetectionDataset(records, RECIPE, seed=3, train=True), 5, 0))
    assert not same(first, epoch_of(DetectionDataset(records, RECIPE, seed=4, train=True), 4, 0))


def test_set_epoch_reaches_running_workers(records):
    dataset = DetectionDataset(records, RECIPE, train=True)
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True,
                                         multiprocessing_context=multiprocessing.get_context("fork"))
    seen = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        seen.append([image.clone() for image, _ in loader])
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        assert all(torch.equal(image, dataset[i][0]) for i, image in enumerate(seen[epoch]))


def test_crowd_and_vanished_objects_are_no_targets(records):
    outside = np.array([[0.0, 0], [4, 0], [4, 3], [0, 3]])                        # a corner that a rotation cuts off
    record = record_of([STAR, STAR, outside], file=records[0].file, crowd=np.array([False, True, False]))
    recipe = Recipe(hflip=0.0, rotate=8.0)
    seen = set()
    for epoch in range(12):
        dataset = DetectionDataset([record], recipe, train=True)
        dataset.set_epoch(epoch)
        target = dataset[0][1]
        assert not target["iscrowd"].any() and len(target["labels"]) in (1, 2)
        assert (target["masks"].flatten(1).sum(1) > 0).all() and (target["boxes"][:, 2:] > target["boxes"][:, :2]).all()
        seen.add(len(target["labels"]))
    assert seen == {1, 2}
    assert DetectionDataset([record])[0][1]["iscrowd"].tolist() == [False, True, False]


def test_a_thin_scratch_whose_listed_area_is_its_box_stays_a_target(records):
    thin = np.array([[10.0, 10], [70, 60], [70, 62.5], [10, 12.5]])
    record = record_of([thin], file=records[0].file, area=np.array([60 * 52.5 * 2]))
    assert len(DetectionDataset([record], Recipe(hflip=0.0), train=True)[0][1]["labels"]) == 1


def test_a_corrupt_picture_is_replaced_in_training_and_black_in_evaluation(records, capsys):
    whole = open(records[1].file, "rb").read()
    open(records[1].file, "wb").write(whole[:len(whole) // 2])
    train = DetectionDataset(records, RECIPE, train=True)
    for _ in range(2):
        image, target = train[1]
        assert target["replaced"] == records[1].file and target["file"] == records[2].file and target["image_id"] == 2
    assert capsys.readouterr().err.count("damaged or cut short") == 1
    image, target = DetectionDataset(records)[1]
    assert image.max() == 0 and target["image_id"] == 1 and len(target["labels"]) == 2 and target["replaced"] == records[1].file
    for record in records:
        open(record.file, "wb").close()
    with pytest.raises(ValueError, match="none of the 6 pictures can be read"):
        train[0]


def test_a_picture_that_changed_size_since_it_was_listed_is_not_used(records):
    picture(__import__("pathlib").Path(records[0].file), 40, 36)
    assert DetectionDataset(records, train=True)[0][1]["replaced"] == records[0].file


def test_max_side_in_training_only(records):
    image, target = DetectionDataset(records, RECIPE, train=True, max_side=40)[0]
    assert image.shape == (3, 36, 40) and target["masks"].shape[1:] == (36, 40) and target["boxes"].max() <= 40
    with pytest.raises(ValueError, match="original pixels"):
        DetectionDataset(records, max_side=40)


def test_a_dataset_is_walked_to_its_end(records):
    dataset = DetectionDataset(records)
    assert [target["index"] for _, target in dataset] == list(range(6)) and dataset[-1][1]["index"] == 5
    pixels = SegmentationDataset(records, image_size=32)
    assert [target["index"] for _, target in pixels] == list(range(6))
    with pytest.raises(IndexError):
        dataset[6]


def test_masks_as_run_lengths_are_those_of_the_pixels(records):
    records[0].masks[1] = None                                                       # an object of which the box is known
    dense, coded = DetectionDataset(records), DetectionDataset(records, mask_form="rle")
    for i in range(len(records)):
        want, got = dense[i][1], coded[i][1]
        pixels = want.pop("masks").numpy()
        assert got.pop("rles") == (masks.encode(pixels) if len(pixels) else [])
        assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in ("boxes", "labels", "area", "iscrowd"))
    with pytest.raises(ValueError, match="is for evaluation"):
        DetectionDataset(records, train=True, mask_form="rle")
    with pytest.raises(ValueError, match="expected one of dense, rle, none, got 'pixels'"):
        DetectionDataset(records, mask_form="pixels")


def test_boxes_follow_the_outlines_where_masks_are_not_learned(records):
    """A box detector's boxes are those of a mask detector, in every augmented sample; it gets no masks."""
    dense, none = (DetectionDataset(records, RECIPE, train=True, mask_form=form) for form in ("dense", "none"))
    for i in range(len(records)):
        want, got = dense[i][1], none[i][1]
        assert "masks" not in got and want.keys() - got.keys() == {"masks"} and torch.equal(want["boxes"], got["boxes"])


def test_box_only_sets_have_no_masks(records):
    for record in records:
        record.masks = [None] * len(record.masks)
    assert not {"masks", "rles"} & DetectionDataset(records)[0][1].keys()
    boxes = DetectionDataset(records, mask_form="dense")[0][1]                       # asked for: an object is its box
    x0, y0, x1, y1 = map(int, boxes["boxes"][0])
    assert boxes["masks"][0].sum() == boxes["masks"][0, y0:y1, x0:x1].sum() == (y1 - y0) * (x1 - x0)


def test_limit(records):
    assert [r.image_id for r in limit(records, 0.5, 1)] == [r.image_id for r in limit(records, 0.5, 1)]
    assert len(limit(records, 0.5)) == 3 and len(limit(records, 0.01)) == 1 and limit(records, 1.0) == records
    ids = [r.image_id for r in limit(records, 0.5, 2)]
    assert ids == sorted(ids)
    for bad in (0, 1.5, -1):
        with pytest.raises(ValueError, match="--limit"):
            limit(records, bad)


def test_loaded_set_feeds_a_detector(tmp_path):
    data = load_dataset(vehide_set(tmp_path, [("tray_son", [10, 30, 30, 10], [5, 5, 25, 25])]), quiet=True)
    target = DetectionDataset(data.parts["train"], RECIPE, train=True)[0][1]
    assert target["labels"].tolist() == [1] and target["masks"].sum() > 200
