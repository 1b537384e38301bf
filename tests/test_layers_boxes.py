"""Anchors, matcher, box coder and sampler: cases by hand, and torchvision's stored results."""
import math
import pathlib

import numpy as np
import pytest
import torch

from minidamage.layers.anchors import AnchorGenerator, cell_anchors
from minidamage.layers.matching import BalancedPositiveNegativeSampler, BoxCoder, Matcher

DATA = pathlib.Path(__file__).parent / "data"


@pytest.mark.parametrize("kind, sizes", [
    ("fpn", ((32,), (64,), (128,), (256,), (512,))),
    ("retina", tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512)))])
def test_anchors_equal_torchvisions(kind, sizes):
    stored = np.load(DATA / "anchors.npz")
    for level, level_sizes in enumerate(sizes):
        assert np.array_equal(cell_anchors(level_sizes, (0.5, 1.0, 2.0)).numpy(), stored[f"{kind}_cell{level}"])
    generator = AnchorGenerator(sizes)
    grids = [tuple(int(v) for v in grid) for grid in stored[f"{kind}_grid"]] if stored[f"{kind}_grid"].ndim == 2 else None
    anchors = generator(grids, (128, 160), torch.device("cpu"))
    assert np.array_equal(torch.cat(anchors).numpy(), stored[kind])
    assert [len(a) for a in anchors] == [h * w * n for (h, w), n in zip(grids, generator.num_anchors_per_location())]


def test_anchors_by_hand():
    anchors = AnchorGenerator(((8,),), aspect_ratios=(1.0,))([(1, 2)], (16, 32), torch.device("cpu"))[0]
    assert anchors.tolist() == [[-4, -4, 4, 4], [12, -4, 20, 4]]


def test_anchors_refuse_another_number_of_levels():
    with pytest.raises(ValueError, match="expected 5 feature maps"):
        AnchorGenerator()([(4, 4)], (64, 64), torch.device("cpu"))


@pytest.mark.parametrize("case, high, low, low_quality", [("rpn", 0.7, 0.3, True), ("roi", 0.5, 0.5, False), ("retina", 0.5, 0.4, True)])
def test_matcher_equals_torchvisions(case, high, low, low_quality):
    stored = np.load(DATA / "matcher.npz")
    matches = Matcher(high, low, low_quality)(torch.from_numpy(stored["quality"]))
    assert np.array_equal(matches.numpy(), stored[case])


def test_matcher_by_hand():
    quality = torch.tensor([[0.8, 0.4, 0.2, 0.0], [0.1, 0.35, 0.25, 0.0]])
    assert Matcher(0.7, 0.3)(quality).tolist() == [0, -2, -1, -1]
    # object 1 overlaps candidate 1 the most, so candidate 1 is used, for the object that *it* overlaps the most: 0
    assert Matcher(0.7, 0.3, allow_low_quality_matches=True)(quality).tolist() == [0, 0, -1, -1]


def test_matcher_without_objects_and_with_one_that_touches_nothing():
    assert Matcher(0.7, 0.3, True)(torch.zeros(0, 3)).tolist() == [-1, -1, -1]
    assert Matcher(0.7, 0.3, True)(torch.zeros(1, 3)).tolist() == [-1, -1, -1]
    with pytest.raises(ValueError, match="low_threshold <= high_threshold"):
        Matcher(0.3, 0.7)


@pytest.mark.parametrize("case, weights", [("w10", (10, 10, 5, 5)), ("w1", (1, 1, 1, 1))])
def test_box_coder_equals_torchvisions(case, weights):
    stored = {k: torch.from_numpy(v) for k, v in np.load(DATA / "box_coder.npz").items()}
    coder = BoxCoder(weights)
    assert coder.bbox_xform_clip == pytest.approx(float(stored["bbox_xform_clip"]))
    torch.testing.assert_close(coder.encode(stored["reference"], stored["proposals"]), stored[f"{case}_encode"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(coder.decode(stored["codes"], stored["proposals"]), stored[f"{case}_decode"], rtol=1e-12, atol=1e-9)
    three = coder.decode(stored["codes3"].view(-1, 3, 4), stored["proposals"][:, None])
    torch.testing.assert_close(three.flatten(1), stored[f"{case}_decode3"], rtol=1e-12, atol=1e-9)


def test_box_coder_by_hand():
    coder = BoxCoder((1, 1, 1, 1))
    proposal, box = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 10, 25, 30]])
    deltas = coder.encode(box, proposal)
    torch.testing.assert_close(deltas, torch.tensor([[1.0, 0.5, math.log(2), 0.0]]))
    torch.testing.assert_close(coder.decode(deltas, proposal), box)
    wild = coder.decode(torch.tensor([[0.0, 0, 100, 100]]), proposal)
    assert torch.isfinite(wild).all() and (wild[0, 2] - wild[0, 0]).item() == pytest.approx(625, rel=1e-5)


def test_sampler_takes_what_it_may_and_no_more():
    labels = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, -1, -1], [1, 0, 0, 0, 0, 0, 0, 0, 0, -1], [0, -1, -1, -1, -1, -1, -1, -1, -1, -1]])
    positives, positive_valid, negatives, negative_valid = BalancedPositiveNegativeSampler(6, 0.5)(labels, torch.Generator().manual_seed(1))
    assert positive_valid.sum(1).tolist() == [3, 1, 0] and negative_valid.sum(1).tolist() == [3, 5, 1]
    for row in range(3):
        chosen_positives, chosen_negatives = positives[row][positive_valid[row]], negatives[row][negative_valid[row]]
        assert (labels[row][chosen_positives] == 1).all() and (labels[row][chosen_negatives] == 0).all()
        assert len(set(chosen_positives.tolist())) == len(chosen_positives) and len(set(chosen_negatives.tolist())) == len(chosen_negatives)


def test_sampler_is_uniform_and_seeded():
    labels = torch.tensor([[1] * 4 + [0] * 6])
    sampler = BalancedPositiveNegativeSampler(4, 0.5)
    counts = torch.zeros(10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        positives, positive_valid, negatives, negative_valid = sampler(labels, generator)
        counts[positives[positive_valid]] += 1
        counts[negatives[negative_valid]] += 1
    assert counts[:4].tolist() == pytest.approx([300] * 4, abs=60) and counts[4:].tolist() == pytest.approx([200] * 6, abs=55)
    again = [sampler(labels, torch.Generator().manual_seed(7))[0].tolist() for _ in range(2)]
    assert again[0] == again[1]
