"""Anchors from boxes: known clusters come back, the fit is never worse than the start, and the seed decides."""
import numpy as np
import pytest

from minidamage.data.anchor_choice import choose_anchors, fit_of, training_sides
from test_data_split import record


def clusters(sizes, ratios, each=60, spread=0.03, seed=0):
    rng = np.random.default_rng(seed)
    rows = [(size / ratio ** 0.5, size * ratio ** 0.5) for size in sizes for ratio in ratios for _ in range(each)]
    return np.array(rows) * np.exp(rng.normal(0, spread, (len(rows), 2)))


@pytest.mark.parametrize("sizes, ratios", [((12, 40, 150), (0.2, 1.0, 5.0)), ((20, 60), (1.0,)), ((10, 30, 80, 200, 400), (0.4, 2.5))])
def test_known_clusters_come_back(sizes, ratios):
    sides = clusters(sizes, ratios)
    found = choose_anchors(np.random.default_rng(1).permutation(sides), len(sizes), len(ratios))
    np.testing.assert_allclose(found.sizes, sizes, rtol=0.05)
    np.testing.assert_allclose(found.ratios, ratios, rtol=0.05)
    assert found.mean_iou > 0.93 and found.recall == 1.0


def test_fit_by_hand():
    """A 10 x 40 box: with the 20 x 20 anchor 200 px in common of 600; with the 10 x 40 one (ratio 4) everything."""
    assert fit_of(np.array([[10.0, 40.0]]), (20,), (1.0,)).mean_iou == pytest.approx(200 / 600)
    assert fit_of(np.array([[10.0, 40.0], [10, 40], [20, 20]]), (20,), (1.0,)).recall == pytest.approx(1 / 3)
    assert fit_of(np.array([[10.0, 40.0]]), (20,), (4.0,)).mean_iou == pytest.approx(1.0)


def test_an_anchor_stands_on_its_grid():
    """A 20 x 20 box and anchor, stride 16: 4 px apart on both axes, 16 x 16 in common of 400 + 400 - 256. A grid of 64 px has nothing
    nearer than 16 px on average: 4 x 4 in common. The larger size on the coarser grid is chosen larger or not at all."""
    box = np.array([[20.0, 20.0]])
    assert fit_of(box, (20,), (1.0,), 16).mean_iou == pytest.approx(256 / 544)
    assert fit_of(box, (20, 21), (1.0,), (64, 4)).mean_iou == pytest.approx(19.5 ** 2 / (400 + 441 - 19.5 ** 2))
    sides = clusters((40, 60, 80, 110), (1.0,), spread=0.1)
    strides = (4, 8, 16, 32, 64)
    on_grid, on_centres = choose_anchors(sides, 5, 1, strides=strides), choose_anchors(sides, 5, 1)
    assert on_grid.mean_iou > fit_of(sides, on_centres.sizes, on_centres.ratios, strides).mean_iou


def test_scales_multiply_every_size():
    """A 40 x 40 box with sizes 20, 32 times 1 and 2 has an anchor of its own; clusters come back as the sizes that make them."""
    assert fit_of(np.array([[40.0, 40.0]]), (20, 32), (1.0,), scales=(1.0, 2.0)).mean_iou == pytest.approx(1.0)
    sides = clusters((10, 15, 60, 90), (1.0,))
    found = choose_anchors(sides, 2, 1, scales=(1.0, 1.5))
    np.testing.assert_allclose(found.sizes, (10, 60), rtol=0.05)
    assert found.mean_iou > 0.93 > fit_of(sides, found.sizes, found.ratios).mean_iou


def test_the_seed_decides_and_the_chosen_fit_better_than_the_defaults():
    rng = np.random.default_rng(0)
    sides = np.exp(rng.normal((3.4, 4.2), (0.8, 0.9), (400, 2)))
    one = choose_anchors(sides, seed=1)
    assert one == choose_anchors(sides, seed=1)
    assert one.mean_iou > fit_of(sides, (16, 32, 64, 128, 256), (0.5, 1.0, 2.0)).mean_iou
    assert list(one.sizes) == sorted(set(one.sizes)) and all(isinstance(size, int) for size in one.sizes)


def test_equal_boxes_and_too_few():
    equal = choose_anchors(np.tile([[30.0, 30.0]], (20, 1)))
    assert len(set(equal.sizes)) == 5 and equal.sizes[0] == 30
    with pytest.raises(ValueError, match="at least 5 training boxes .* got 2"):
        choose_anchors(np.ones((2, 2)))


def test_sides_are_those_that_the_model_sees():
    small, crowded = record("a.jpg", objects=2), record("b.jpg", objects=1)
    crowded.crowd[:] = True                                      # 64 x 48 pictures with boxes 8 x 8
    np.testing.assert_allclose(training_sides([small, crowded], 96, 1000), [[16, 16], [16, 16]])
    np.testing.assert_allclose(training_sides([small], 96, 96), [[12, 12], [12, 12]])      # the longer side's limit comes first
    assert training_sides([], 96, 96).shape == (0, 2)


def test_neu_det(real_data):
    from minidamage.data import load_dataset
    sides = training_sides(load_dataset(real_data / "neu_det", quiet=True).parts["all"], 400, 400)
    found, default = choose_anchors(sides), fit_of(sides, (16, 32, 64, 128, 256), (0.5, 1.0, 2.0))
    assert found.mean_iou > default.mean_iou + 0.05 and found.recall > default.recall
