"""evaluate.py --occlude: the covered share to a pixel, the same patches each time, the truth left whole, on drawn and real pictures."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from test_evaluate import draw_set, read, red_run                            # noqa: F401  (red_run is a fixture)

import evaluate
from minidamage import masks
from minidamage.data import DetectionDataset, SegmentationDataset, load_dataset
from minidamage.data.label_maps import label_map
from minidamage.data.record import Record
from minidamage.evaluation.detection import Samples
from minidamage.evaluation.occlusion import Occluded, findings, occlude, occluded, patch_of

SHARES = (0.03, 0.1, 0.25, 0.5, 0.99)


def record_of(outlines, boxes=None, crowd=None, size=(90, 120), image_id=7):
    """A record of (h, w) pixels without a file; outlines: polygons, RLEs or None."""
    boxes = np.zeros((len(outlines), 4), np.float32) if boxes is None else np.asarray(boxes, np.float32)
    G = len(outlines)
    return Record("none.png", image_id, size[1], size[0], boxes, np.ones(G, np.int64), list(outlines),
                  np.zeros(G, bool) if crowd is None else np.asarray(crowd), np.zeros(G), np.arange(G))


def noise(size=(90, 120)):
    """A picture in whose colours the mean does not occur: every changed pixel shows."""
    return torch.from_numpy(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, *size)))


def covered_by(record, share, image=None, **seed):
    """bool [H, W]: which pixels of the picture were changed."""
    image = noise((record.height, record.width)) if image is None else image
    return (occlude(image, record, share, **seed) != image).any(dim=0).numpy()


DIAGONAL = [np.array([[10.0, 12.0], [16, 10], [60, 70], [55, 76]])]          # thin: most of its box is background
RING = masks.encode(np.pad(np.pad(np.zeros((9, 15), bool), 8, constant_values=True), ((20, 45), (70, 19))))


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("outline", [DIAGONAL, RING], ids=["diagonal", "ring"])
def test_the_share_is_covered_to_a_pixel(outline, share):
    for image_id in range(20):                                               # twenty centres
        record = record_of([outline], image_id=image_id)
        rle = masks.segmentation_to_rle(outline, 90, 120)
        inside, changed = masks.decode(rle) > 0, covered_by(record, share)
        assert abs(np.count_nonzero(changed & inside) - share * np.count_nonzero(inside)) <= 0.5
        x0, y0, x1, y1 = masks.to_boxes(rle).astype(int)
        assert not changed[:y0].any() and not changed[y1:].any() and not changed[:, :x0].any() and not changed[:, x1:].any()


def test_a_patch_is_a_rectangle_but_for_its_last_line():
    for seed in range(50):
        patch = patch_of(np.ones((30, 50), bool), 0.2, np.random.default_rng(seed))
        ys, xs = np.nonzero(patch)
        sides = np.ptp(ys) + 1, np.ptp(xs) + 1
        assert np.count_nonzero(patch) == 300
        core = patch[ys.min() + 1:ys.max(), xs.min() + 1:xs.max()]           # without the outermost lines it is full
        assert core.all() and 300 > core.size > 300 - 2 * sum(sides)


def test_by_hand():
    """A row of ten pixels: half of it is the centre and two on each side, as far as the box goes."""
    for seed in range(20):
        centre = int(np.random.default_rng(seed).integers(10))
        patch = patch_of(np.ones((1, 10), bool), 0.5, np.random.default_rng(seed))[0]
        low = min(max(centre - 2, 0), 5)
        assert np.flatnonzero(patch).tolist() == list(range(low, low + 5))


def test_the_same_each_time_and_another_for_another_seed_picture_and_finding():
    record = record_of([DIAGONAL, RING])
    first = covered_by(record, 0.1)
    assert np.array_equal(first, covered_by(record, 0.1))
    assert not np.array_equal(first, covered_by(record, 0.1, seed=1))
    assert not np.array_equal(first, covered_by(record_of([DIAGONAL, RING], image_id=8), 0.1))
    twice = record_of([DIAGONAL, DIAGONAL])                                  # the same outline as a second finding: another centre
    assert np.count_nonzero(covered_by(twice, 0.1)) > np.count_nonzero(covered_by(record_of([DIAGONAL]), 0.1))


def test_a_larger_share_covers_what_a_smaller_one_covers():
    record = record_of([DIAGONAL, RING])
    for less, more in zip(SHARES, SHARES[1:]):
        assert (covered_by(record, more) | ~covered_by(record, less)).all()


def test_the_colour_is_the_picture_s_mean_and_the_picture_given_is_left_alone():
    image = noise()
    image[0] = 40
    before, record = image.clone(), record_of([RING])
    patched = occlude(image, record, 0.25)
    assert torch.equal(image, before)
    colours = patched[:, torch.from_numpy(covered_by(record, 0.25))].unique(dim=1)
    assert colours.flatten().tolist() == [round(before[c].double().mean().item()) for c in range(3)]


def test_crowds_are_no_findings_a_box_is_its_own_mask_and_specks_stay():
    box = [20, 30, 60, 50]
    record = record_of([RING, None], [[0, 0, 1, 1], box], crowd=[True, False])
    changed = covered_by(record, 0.25)
    assert np.count_nonzero(changed) == 200 and changed[30:50, 20:60].sum() == 200
    assert not covered_by(record_of([[np.array([[5.0, 5], [7, 5], [7, 7], [5, 7]])]]), 0.1).any()         # a tenth of four pixels
    assert not covered_by(record_of([]), 0.5).any()


def test_pieces_of_a_label_map_are_findings(tmp_path):
    labels = np.zeros((40, 50), np.uint8)
    labels[5:25, 4:6], labels[30:32, 10:40], labels[24:26, 6:8] = 1, 2, 1    # the third touches the first at a corner: one piece
    labels[0, 0] = 255
    for kind, content in (("images", np.full((40, 50, 3), 7, np.uint8)), ("masks", labels)):
        os.makedirs(tmp_path / "set" / kind)
        Image.fromarray(content).save(tmp_path / "set" / kind / "a.png")
    (tmp_path / "set" / "classes.txt").write_text("crack\ntear\n")
    record = next(iter(load_dataset(str(tmp_path / "set"), quiet=True).parts.values()))[0]
    found = {corner: inside for corner, inside in findings(record)}
    assert {corner: int(inside.sum()) for corner, inside in found.items()} == {(4, 5): 44, (10, 30): 60}
    dataset = SegmentationDataset([record])
    patched, target = Occluded(dataset, 0.5)[0]
    assert np.array_equal(target["label_map"].numpy(), label_map(record)) and occluded(dataset, None) is dataset
    changed = covered_by(record, 0.5)
    assert np.count_nonzero(changed & (labels == 1)) == 22 and np.count_nonzero(changed & (labels == 2)) == 30
    assert torch.equal(patched, dataset[0][0])                               # of one colour: its mean hides nothing


def test_the_truth_is_unchanged(tmp_path):
    records = next(iter(load_dataset(str(draw_set(tmp_path / "squares")), quiet=True).parts.values()))
    for index, record in enumerate(records):
        (image, truth), (patched, same) = Samples(records, True)[index], Samples(records, True, 0.25)[index]
        assert truth.keys() == same.keys() and all(np.array_equal(truth[key], same[key]) for key in truth)
        assert torch.equal(image, patched) == (len(record.labels) == 0)


def test_a_picture_that_cannot_be_read_stays_black(tmp_path):
    records = next(iter(load_dataset(str(draw_set(tmp_path / "squares")), quiet=True).parts.values()))
    with open(records[0].file, "r+b") as file:
        file.truncate(100)
    image, target = Occluded(DetectionDataset(records), 0.5)[0]
    assert target["replaced"] and not image.any()


@pytest.mark.parametrize("share", ["0", "1", "-1", "nan", "inf"])
def test_bad_shares_end_with_2(share, red_run, capsys):                      # noqa: F811
    assert evaluate.main(["--occlude", share]) == 2
    assert f"--occlude: expected the share of each finding to cover, above 0 and below 1 such as 0.1, got {float(share)}" \
        in capsys.readouterr().err
    with pytest.raises(ValueError, match="above 0 and below 1"):
        Occluded([], float(share))


def test_what_has_no_model_has_nothing_to_cover(capsys):
    assert evaluate.main(["--occlude", "0.1", "--compare", "a", "b"]) == 2
    assert "--occlude: --compare has no use for it" in capsys.readouterr().err


def test_evaluate_says_it_everywhere_and_the_finder_loses_the_covered_pixels(red_run, capsys):                # noqa: F811
    assert evaluate.main(["--device", "cpu", "--draws", "0"]) == 0
    capsys.readouterr()
    assert evaluate.main(["--device", "cpu", "--occlude", "0.25"]) == 0
    whole, printed = read(red_run.out / "results.json"), capsys.readouterr().out
    covered = read(red_run.out.parent / "evaluation-test-occluded-0.25" / "results.json")
    page = (red_run.out.parent / "evaluation-test-occluded-0.25" / "report.html").read_text(encoding="utf-8")
    assert whole["occlusion"] == 0 and covered["occlusion"] == 0.25
    assert read(red_run.out / "truth.json") == read(red_run.out.parent / "evaluation-test-occluded-0.25" / "truth.json")
    assert "Summary: 0.25 of each finding covered by a patch" in printed and printed.count("0.25 of each finding covered") == 2
    assert "0.25 of each finding covered by a patch" in page and "missed, 0.25 of each finding covered\"" in page
    # red squares of 40 and 30, a reflection of 20, and a scratch of 50 below its threshold: the colour finder loses what is covered
    seen, truth = 1600 + 900 - (400 + 225), 1600 + 900 + 2500
    assert whole["pixels"]["pixel/recall"] == pytest.approx(2500 / truth)
    assert covered["pixels"]["pixel/recall"] == pytest.approx(seen / truth)
    assert evaluate.main(["--compare", str(red_run.out), str(red_run.out.parent / "evaluation-test-occluded-0.25")]) == 0
    assert "(occluded 0.25)" in capsys.readouterr().out


def test_a_segmenter_is_scored_on_covered_pictures(tmp_path, monkeypatch):
    import test_evaluate_segmentation as segmentation
    data = segmentation.draw_set(tmp_path / "cracks")
    checkpoint = {"model": "red", "class_names": ("crack",), "thresholds": {"crack": 0.3}, "run": {"data": str(data)}, "split": {}}
    (tmp_path / "best.pt").write_bytes(b"")
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda path, device: (segmentation.RedSegmenter(), checkpoint))
    for share in (None, 0.5):
        flags = ["--occlude", str(share)] if share else []
        assert evaluate.main(["--checkpoint", str(tmp_path / "best.pt"), "--device", "cpu", "--part", "all", "--out",
                              str(tmp_path / str(share)), *flags]) == 0
    recall = [json.loads((tmp_path / str(share) / "results.json").read_text())["sizes"]["native"]["points"]["at 0.3 (chosen on validation)"]
              ["stats"]["pixel/recall"] for share in (None, 0.5)]
    page = (tmp_path / "0.5" / "report.html").read_text(encoding="utf-8")
    assert "px missed, 0.5 of each finding covered\"" in page
    assert recall == pytest.approx([1, 0.5])                                 # each crack's area is even


def test_on_the_real_car_set(real_data):
    records = load_dataset(str(real_data / "car_vehide_layout"), quiet=True).parts["train"]
    records = [record for record in records if 0 < len(record.labels)][:12]
    dataset = DetectionDataset(records, mask_form="none")
    for record, (image, _) in zip(records, (dataset[i] for i in range(len(records)))):
        for number, (_, inside) in enumerate(findings(record)):
            rng = np.random.default_rng([0, record.image_id, number])
            assert abs(np.count_nonzero(patch_of(inside, 0.1, rng) & inside) - 0.1 * inside.sum()) <= 0.5
        assert not torch.equal(occlude(image, record, 0.1), image)
