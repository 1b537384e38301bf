"""COCO and VOC numbers: equal to stored pycocotools results to 1e-9 (data/cocoeval*.{npz,json}), small cases by hand, faults named."""
import copy
import json
import os

import numpy as np
import pytest

from minidamage import masks
from minidamage.metrics import coco, coco_files
from minidamage.metrics.detection import CocoEvaluator, evaluate_coco_files
from minidamage.metrics.voc import average_precision

DATA = os.path.join(os.path.dirname(__file__), "data")
TRUTH, FOUND = os.path.join(DATA, "coco_gt.json"), os.path.join(DATA, "coco_dt.json")
with open(TRUTH) as stream:
    TRUTH_CONTENT = json.load(stream)
with open(FOUND) as stream:
    FOUND_CONTENT = json.load(stream)
CASES = [(iou_type, use_cats) for iou_type in ("bbox", "segm") for use_cats in (True, False)]


@pytest.fixture(params=["numpy", "native"])
def body(request, monkeypatch):
    """Runs a test on the numpy reference and on the C++ twin."""
    if request.param == "numpy":
        monkeypatch.setattr(masks, "native_module", lambda: None)
    elif masks.native_module() is None:
        pytest.skip("no compiler, or MINIDAMAGE_KERNELS=off: no C++ to compare")        # a broken build raises before (conftest.py)
    return request.param


def test_what_a_picture_is_refused_for_leaves_nothing_of_it():
    import torch
    evaluator = CocoEvaluator(("dent",))
    truth = {"boxes": [[0, 0, 4, 4]], "labels": [1], "masks": np.ones((1, 8, 8), np.uint8)}
    found = {"boxes": [[0, 0, 4, 4]], "labels": [1], "scores": [0.9], "masks": torch.ones(1, 1, 8, 8)}
    with pytest.raises(ValueError, match="expected masks as RLE dicts, got Tensor; a detector gives them with model.detect"):
        evaluator.add_picture(torch.tensor(3), truth, found, (8, 8))
    found["masks"] = masks.encode(np.ones((1, 8, 8), np.uint8))
    evaluator.add_picture(torch.tensor(3), truth, found, (8, 8))
    evaluator.add_detections(np.int64(3), [[1, 1, 2, 2]], [0.1], [1], found["masks"])
    assert evaluator.evaluate().stats["segm/AP"] == pytest.approx(1) and json.dumps(evaluator.coco_truth())
    with pytest.raises(ValueError, match="picture 3 was added before"):
        evaluator.add_truth(3, [], [])


# ---- oracle ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("iou_type, use_cats", CASES)
def test_equals_pycocotools(body, iou_type, use_cats):
    stored, name = np.load(os.path.join(DATA, "cocoeval.npz")), iou_type + ("" if use_cats else "_nocats")
    result = evaluate_coco_files(TRUTH, FOUND, iou_type, use_cats)
    for array in ("precision", "recall", "scores"):
        np.testing.assert_allclose(result.arrays[iou_type][array], stored[f"{name}_{array}"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(list(result.stats.values()), stored[f"{name}_stats"], rtol=0, atol=1e-9)
    for number, stored_name in (("AP", "per_class_ap"), ("AP50", "per_class_ap50")):
        ours = np.nan_to_num([numbers[f"{iou_type}/{number}"] for numbers in result.per_class.values()], nan=-1)
        np.testing.assert_allclose(ours, stored[f"{name}_{stored_name}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("iou_type, use_cats", CASES)
def test_matches_equal_pycocotools(body, iou_type, use_cats):
    """Which truth each detection took, at each threshold, in each picture: the same ties, broken by the order in the file."""
    with open(os.path.join(DATA, "cocoeval_matches.json")) as stream:
        stored = json.load(stream)[iou_type + ("" if use_cats else "_nocats") + "_matches_all_area"]
    truths, image_ids, categories, annotation_ids, images = coco_files.read_truth(TRUTH_CONTENT, "truth", iou_type)
    found = coco_files.read_detections(FOUND_CONTENT, "found", iou_type, image_ids, categories, images)
    category_ids = [c["id"] for c in categories]
    if not use_cats:
        order = np.argsort(truths["category"], kind="stable")
        annotation_ids, category_ids = annotation_ids[order], [-1]
        from minidamage.metrics.detection import _without_categories
        truths, found = _without_categories(truths), _without_categories(found)
    arrays = coco.evaluate(truths, found, len(image_ids), len(category_ids), keep_matches=True)
    assert len(stored) > 30
    for image, category, scores, matches, ignored, truth_ignored in stored:
        i, k = image_ids.index(image), category_ids.index(category)
        rows = np.flatnonzero((found["image"] == i) & (found["category"] == k))
        rows = rows[np.argsort(arrays["dt_rank"][rows])][:100]
        assert found["score"][rows].tolist() == scores
        match = arrays["dt_match"][:, rows]
        assert np.where(match >= 0, annotation_ids[match], 0).tolist() == matches
        assert arrays["dt_ignore"][:, rows].tolist() == ignored
        crowd = truths["crowd"][(truths["image"] == i) & (truths["category"] == k)]
        assert sorted(crowd.tolist()) == truth_ignored


def test_numpy_equals_native_on_crowded_pictures(monkeypatch):
    """Many ties, crowds, empty masks and groups over the limits of 1, 10, 100."""
    if masks.native_module() is None:
        pytest.skip("no compiler, or MINIDAMAGE_KERNELS=off: no C++ to compare")
    rng = np.random.RandomState(0)
    n, m, images, categories = 120, 700, 6, 3
    xy, wh = rng.randint(0, 50, (n + m, 2)), rng.randint(0, 30, (n + m, 2))
    box = np.concatenate([xy, wh], 1).astype(float)
    rles = [masks.from_polygons([[x, y, x + w, y, x + w, y + h, x, y + h]], 80, 90) for x, y, w, h in box]
    table = {"image": rng.randint(0, images, n + m).astype(np.int32), "category": rng.randint(0, categories, n + m).astype(np.int32),
             "score": rng.randint(0, 12, n + m) / 12.0, "crowd": (rng.rand(n + m) < 0.15).astype(np.uint8),
             "area": masks.area(rles).astype(float) * 3}
    table["image"][n:][rng.rand(m) < 0.5] = 2                                        # one picture gets half of them: over 100 of a class
    forms = {"bbox": {"box": box}, "segm": {"counts": [r["counts"] for r in rles], "size": np.tile(np.int32([80, 90]), (n + m, 1))}}
    protocol = coco.Protocol(area_ranges=((0, 1e10), (0, 500), (500, 1500), (1500, 1e10)))
    for form in forms.values():
        whole = {**table, **form}
        truths, found = ({key: value[part] for key, value in whole.items()} for part in (slice(0, n), slice(n, None)))
        found["area"] = None if "counts" in form else found["area"]
        fast = coco.evaluate(truths, found, images, categories, protocol, keep_matches=True)
        with monkeypatch.context() as patch:
            patch.setattr(masks, "native_module", lambda: None)
            slow = coco.evaluate(truths, found, images, categories, protocol, keep_matches=True)
        assert (fast["dt_rank"] >= 100).any() and (fast["dt_match"] >= 0).any()
        for name in slow:
            assert np.array_equal(fast[name], slow[name]), name


# ---- the evaluator -----------------------------------------------------------------------------------------------------------------

def streamed(content_truth, content_found, names, iou_types=("bbox", "segm")):
    """The oracle's files fed picture by picture, in an order of their own."""
    evaluator = CocoEvaluator(names, iou_types)
    ids = [c["id"] for c in sorted(content_truth["categories"], key=lambda c: c["id"])]
    for image in reversed(content_truth["images"]):
        pick = lambda objects: [o for o in objects if o["image_id"] == image["id"]]
        truth, found = pick(content_truth["annotations"]), pick(content_found)
        corners = lambda objects: np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4) @ CORNERS
        rles = lambda objects: [masks.segmentation_to_rle(o["segmentation"], image["height"], image["width"]) for o in objects]
        labels = lambda objects: [ids.index(o["category_id"]) + 1 for o in objects]
        evaluator.add_truth(image["id"], corners(truth), labels(truth), rles(truth), [o["iscrowd"] for o in truth],
                            [o["area"] for o in truth], image["height"], image["width"])
        evaluator.add_detections(image["id"], corners(found), [o["score"] for o in found], labels(found), rles(found))
    return evaluator


CORNERS = np.array([[1, 0, 1, 0], [0, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 1]], np.float64)      # x, y, w, h -> x0, y0, x1, y1


def test_streaming_equals_files():
    names = [c["name"] for c in TRUTH_CONTENT["categories"]]
    evaluator = streamed(TRUTH_CONTENT, FOUND_CONTENT, names)
    result = evaluator.evaluate()
    for iou_type in ("bbox", "segm"):
        files = evaluate_coco_files(TRUTH, FOUND, iou_type)
        for name, value in files.stats.items():
            assert result.stats[name] == pytest.approx(value, abs=1e-9)
    again = json.loads(json.dumps([evaluator.coco_truth([c["id"] for c in TRUTH_CONTENT["categories"]]),
                                   evaluator.coco_detections([c["id"] for c in TRUTH_CONTENT["categories"]])]))
    for iou_type in ("bbox", "segm"):
        written = evaluate_coco_files(*again, iou_type)                              # what is written scores the same
        for name, value in written.stats.items():
            assert result.stats[name] == pytest.approx(value, abs=1e-12, nan_ok=True)


def square(x, y, side, size=200):
    box = [x, y, x + side, y + side]
    return box, masks.from_polygons([[x, y, x + side, y, x + side, y + side, x, y + side]], size, size)


def by_hand(found, truth=((10, 10, 50, 1), (100, 100, 50, 1)), undamaged=2):
    """The result of a damaged picture (squares x, y, side, label) and undamaged ones. found: {picture: [(x, y, side, label, score)]}"""
    evaluator = CocoEvaluator(["dent", "scratch"])
    for picture in range(undamaged + 1):
        objects, findings = truth if picture == 0 else (), found.get(picture, [])
        shapes = [square(*o[:3]) for o in objects]
        evaluator.add_truth(picture, [b for b, _ in shapes], [o[3] for o in objects], [r for _, r in shapes], height=200, width=200)
        shapes, scores = [square(*f[:3]) for f in findings], [f[4] for f in findings]
        evaluator.add_detections(picture, [b for b, _ in shapes], scores, [f[3] for f in findings], [r for _, r in shapes])
    return evaluator.evaluate()


def test_ap_by_hand(body):
    result = by_hand({0: [(10, 10, 50, 1, 0.9), (150, 10, 40, 1, 0.8), (100, 100, 50, 1, 0.7)], 1: [(0, 0, 50, 1, 0.6)]})
    expected = (51 * 1 + 50 * 2 / 3) / 101                   # recall 0 .. 0.5 at precision 1, 0.51 .. 1 at 2 / 3
    for iou_type in ("bbox", "segm"):
        assert result.stats[f"{iou_type}/AP50"] == pytest.approx(expected)
        assert result.stats[f"{iou_type}/AR1"] == 0.5 and result.stats[f"{iou_type}/AR100"] == 1
        assert np.isnan(result.stats[f"{iou_type}/APs"]) and np.isnan(result.stats[f"{iou_type}/ARl"])
        assert result.stats[f"{iou_type}/ARm"] == 1
        voc = result.voc_ap(iou_type)
        assert voc["all-point"]["dent"] == pytest.approx(0.5 + 0.5 * 2 / 3)
        assert voc["11-point"]["mean"] == pytest.approx((6 + 5 * 2 / 3) / 11)
        assert np.isnan(voc["11-point"]["scratch"])
    assert result.per_class["dent"]["truths"] == 2 and result.per_class["dent"]["detections"] == 4
    assert any("scratch is n/a" in cause for cause in result.causes)


def test_voc_counts_a_second_box_on_a_taken_truth_as_false(body):
    """Two truths side by side, both detections nearest to the first: COCO gives the second truth to the second detection, VOC does not."""
    truth = ((10, 10, 50, 1), (20, 10, 50, 1))
    result = by_hand({0: [(10, 10, 50, 1, 0.9), (14, 10, 50, 1, 0.8)]}, truth)
    assert result.stats["bbox/AR100"] > 0.5
    assert result.voc_ap("bbox")["all-point"]["dent"] == pytest.approx(0.5)


def test_average_precision_methods():
    recall, precision = [0.5, 0.5, 1.0], [1.0, 0.5, 2 / 3]
    assert average_precision(recall, precision) == pytest.approx(0.5 + 1 / 3)
    assert average_precision(recall, precision, "11-point") == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert average_precision([], []) == average_precision([], [], "11-point") == 0
    with pytest.raises(ValueError, match="all-point"):
        average_precision(recall, precision, "12-point")


def test_thresholds_findings_and_alarms(body):
    result = by_hand({0: [(10, 10, 50, 1, 0.9), (150, 10, 40, 1, 0.5), (100, 100, 48, 1, 0.5)],
                      1: [(0, 0, 50, 1, 0.6), (9, 9, 30, 2, 0.2)]})
    best = result.best_f1()["dent"]                          # at 0.9: 2 / 3; at 0.6: 2 / 4; at 0.5 (two at once): 4 / 6
    assert best == pytest.approx({"threshold": 0.9, "F1": 2 / 3, "precision": 1, "recall": 0.5})
    assert result.best_thresholds() == {"dent": 0.9, "scratch": 0.5}
    at_half = result.at_thresholds({"dent": 0.5, "scratch": 0.1})
    assert at_half["dent"] == pytest.approx({"TP": 2, "FP": 2, "FN": 0, "precision": 0.5, "recall": 1, "F1": 2 / 3,
                                             "matched IoU": (1 + 48 ** 2 / 50 ** 2) / 2})
    assert at_half["scratch"]["FP"] == 1 and at_half["all"]["FP"] == 3
    assert result.false_alarms(0.5) == {"pictures": 2, "with findings": 0.5, "findings": 0.5}
    assert result.false_alarms({"dent": 0.1, "scratch": 0.1}) == {"pictures": 2, "with findings": 0.5, "findings": 1.0}
    assert result.false_alarms(0.7)["with findings"] == 0
    false, missed = result.errors_in_picture(0, {"dent": 0.5, "scratch": 0.1})
    assert false.tolist() == [False, True, False] and missed.tolist() == [False, False]
    false, missed = result.errors_in_picture(0, 0.7)                                   # of the findings in use alone
    assert false.tolist() == [False] and missed.tolist() == [False, True]
    assert [wrong.tolist() for wrong in result.errors_in_picture(1, {"dent": 0.5, "scratch": 0.1})] == [[True, True], []]
    assert result.errors_by_picture({"dent": 0.5, "scratch": 0.1}).tolist() == [[1, 0], [2, 0], [0, 0]]


def test_interval_of_ap():
    result = evaluate_coco_files(TRUTH, FOUND, ("bbox", "segm"))
    for name in ("bbox/AP", "segm/AP", "bbox/AP50", "segm/AP75"):
        interval = result.interval(name, samples=60)
        assert interval.value == pytest.approx(result.stats[name], abs=1e-12)        # weights of 1 are the data as they are
        assert interval.low < interval.value < interval.high and interval.high - interval.low < 0.5
        assert result.interval(name, samples=60) == interval                         # seeded
    sure = by_hand({0: [(10, 10, 50, 1, 0.9), (100, 100, 50, 1, 0.8)]}, undamaged=0).interval("segm/AP50", samples=20)
    assert sure.low == pytest.approx(1) and sure.high == pytest.approx(1)
    assert np.isnan(by_hand({}, truth=()).interval("bbox/AP", samples=5).value)
    with pytest.raises(ValueError, match="AP50"):
        result.interval("bbox/AR100")


def test_interval_weights_are_copies_of_pictures():
    """A draw with every picture twice is the evaluation of a set that holds every picture twice."""
    from minidamage.metrics.intervals import _ap, _class_curve
    names = [c["name"] for c in TRUTH_CONTENT["categories"]]
    twice = copy.deepcopy(TRUTH_CONTENT)
    copies = lambda objects, key: objects + [dict(o, **{key: o[key] + 10 ** 6}) for o in objects]
    twice["images"], twice["annotations"] = copies(twice["images"], "id"), copies(twice["annotations"], "image_id")
    found = [dict(d, score=d["score"] + 1e-6 * i / len(FOUND_CONTENT)) for i, d in enumerate(FOUND_CONTENT)]     # no ties between pictures
    once, both = streamed(TRUTH_CONTENT, found, names).evaluate(), streamed(twice, copies(found, "image_id"), names).evaluate()
    curves = [c for k in range(3) if (c := _class_curve(once.scored["bbox"], k)) is not None]
    weighted = _ap(curves, np.full(len(once.image_ids), 2), once.protocol, np.ones(10, bool))
    assert weighted == pytest.approx(both.stats["bbox/AP"], abs=0.01)                # copies count at once, not one after the other


# ---- nothing there -----------------------------------------------------------------------------------------------------------------

def test_empty_evaluations_say_why(body):
    nothing = CocoEvaluator(["dent"]).evaluate()
    assert len(nothing.stats) == 24 and all(np.isnan(v) for v in nothing.stats.values())
    assert "no picture has a truth object" in nothing.causes[0]
    silent = by_hand({})
    assert silent.stats["bbox/AP"] == 0 and "not one detection" in silent.causes[0]
    assert silent.false_alarms()["with findings"] == 0
    assert silent.voc_ap("segm")["all-point"]["dent"] == 0
    only_undamaged = by_hand({0: [(0, 0, 9, 1, 0.9)]}, truth=())
    assert np.isnan(only_undamaged.stats["bbox/AP"]) and only_undamaged.false_alarms(0.5)["with findings"] == pytest.approx(1 / 3)


def test_wrong_class_scale_and_form_are_told():
    shifted = by_hand({0: [(10, 10, 50, 2, 0.9), (100, 100, 50, 2, 0.8)]})
    assert any("wrong class" in c and "+1" in c for c in shifted.causes)
    small = by_hand({0: [(1, 1, 5, 1, 0.9), (10, 10, 5, 1, 0.8)]})
    assert any("multiplied by 10 in x and 10 in y: boxes in another scale" in c for c in small.causes)
    normalised = by_hand({0: [(0.05, 0.05, 0.25, 1, 0.9), (0.5, 0.5, 0.25, 1, 0.8)]})
    assert any("normalised to 0..1" in c for c in normalised.causes)
    shrunk = [dict(d, bbox=(np.array(d["bbox"]) * 0.4).tolist()) for d in FOUND_CONTENT]
    assert any("in another scale" in c for c in evaluate_coco_files(TRUTH, shrunk, "bbox").causes)
    corners = [dict(a, score=0.9, bbox=(np.array(a["bbox"]) @ CORNERS).tolist()) for a in TRUTH_CONTENT["annotations"]]
    assert any("x1, y1, x2, y2" in c for c in evaluate_coco_files(TRUTH, corners, "bbox").causes)
    in_memory = by_hand({0: [(100, 100, 150, 1, 0.9)]}, truth=((100, 100, 50, 1),))   # 50 px wide, were it corners: no file, no mistake
    assert not any("x1, y1, x2, y2" in c for c in in_memory.causes)
    apart = by_hand({1: [(10, 10, 50, 1, 0.9)]})
    assert any("do not belong together" in c for c in apart.causes)
    untrained = by_hand({0: [(60, 60, 50, 1, 0.9)]})
    assert any("not learned enough" in c for c in untrained.causes)


@pytest.mark.parametrize("truth_side", (6, 40))
def test_an_untrained_model_is_not_told_that_its_scale_is_wrong(truth_side):
    """Boxes of all sizes up to the picture's edge, small truth in one corner of it: their reach differs by far, their scale does not."""
    rng, evaluator = np.random.RandomState(0), CocoEvaluator(["dent"], ("bbox",))
    for image in range(8):
        at = rng.uniform(0, 150 - truth_side, (2, 2))
        evaluator.add_truth(image, np.concatenate([at, at + truth_side], 1), [1, 1])
        low, side = rng.uniform(0, 400, (20, 2)), rng.uniform(60, 640, (20, 2))
        evaluator.add_detections(image, np.concatenate([low, np.minimum(low + side, 640)], 1), rng.uniform(0, 0.1, 20), np.ones(20, int))
    causes = evaluator.evaluate().causes
    assert any("not learned enough" in c for c in causes) and not any("scale (" in c or "another scale" in c for c in causes)


# ---- mistakes ----------------------------------------------------------------------------------------------------------------------

HUGE = 10 ** 400                                                                    # JSON has no largest number, floats have


def changed(content, change):
    content = copy.deepcopy(content)
    change(content)
    return content


@pytest.mark.parametrize("truth, found, iou_type, message", [
    (FOUND_CONTENT, TRUTH_CONTENT, "bbox", "swapped"),
    ({"images": [], "categories": []}, [], "bbox", "annotations"),
    ({"images": [], "annotations": [], "categories": []}, [], "bbox", "at least one picture"),
    (TRUTH_CONTENT, TRUTH_CONTENT, "bbox", "swapped"),
    (changed(TRUTH_CONTENT, lambda c: c["images"][1].pop("id")), [], "bbox", "images.*id"),
    (changed(TRUTH_CONTENT, lambda c: c["categories"][1].pop("id")), [], "bbox", "categories.*id"),
    (TRUTH_CONTENT, {"a": 1}, "bbox", "list of detections"),
    (TRUTH_CONTENT, [{"image_id": 1}], "bbox", "each detection to be like"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(image_id="7")), "bbox", "1 of 460 are not among"),
    (TRUTH_CONTENT, [dict(d, image_id=10 ** 6) for d in FOUND_CONTENT], "bbox", "none of them is"),
    (TRUTH_CONTENT, [dict(d, category_id=99) for d in FOUND_CONTENT], "bbox", "unknown category_id \\[99\\]"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(score=float("nan"))), "bbox", "detection 3 has score nan"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].pop("bbox")), "bbox", "detection 3"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(bbox=[5, 5, -3, 2])), "bbox", "x1, y1"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(segmentation={"size": [9, 9], "counts": "123"})), "segm", "size|add up"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(segmentation=[[1, 2, 3]])), "segm", "detection 3"),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].pop("segmentation")), FOUND_CONTENT, "segm", "annotation 2"),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].pop("category_id")), FOUND_CONTENT, "bbox", "category_id"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(image_id=[7])), "bbox", '"image_id" and "category_id"'),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(bbox=["x", 5, 3, 2])), "bbox", "detection 3, got"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(bbox=[5, 5, HUGE, 2])), "bbox", "detection 3, got"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(score=HUGE)), "bbox", 'a number as "score" of every detection'),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(score=None)), "bbox", "detection 3 has score nan"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(score={})), "bbox", 'a number as "score" of every detection'),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(segmentation=[[HUGE] * 6])), "segm", "detection 3"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(segmentation={"size": [HUGE, 9], "counts": "1"})), "segm", "detection 3"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(segmentation={"size": [9, 9], "counts": [HUGE]})), "segm", "detection 3"),
    (TRUTH_CONTENT, changed(FOUND_CONTENT, lambda c: c[3].update(segmentation={"size": [None, 9], "counts": "1"})), "segm", "detection 3"),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].update(segmentation={"size": [], "counts": [1]})), [], "segm", "annotation 2"),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].update(area=HUGE)), [], "bbox", '"area" of every annotation'),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].update(area=float("inf"))), [], "bbox", '"area" of every annotation'),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].update(id=HUGE)), [], "bbox", '"id" of every annotation'),
    (changed(TRUTH_CONTENT, lambda c: c["annotations"][2].update(id={})), [], "bbox", '"id" of every annotation'),
    (changed(TRUTH_CONTENT, lambda c: c["images"].insert(0, None)), [], "bbox", '"images" to have an "id", got None'),
    (changed(TRUTH_CONTENT, lambda c: c["images"][0].update(width=float("inf"))), FOUND_CONTENT, "segm", "of picture .* got inf"),
    (changed(TRUTH_CONTENT, lambda c: c["images"][0].update(width="wide")), FOUND_CONTENT, "segm", "of picture .* got 'wide'"),
    ("no/such/file.json", FOUND_CONTENT, "bbox", "there is none"),
    (TRUTH_CONTENT, FOUND_CONTENT, "keypoints", "bbox or segm"),
])
def test_faults_of_files_are_named(truth, found, iou_type, message):
    with pytest.raises(ValueError, match=message):
        evaluate_coco_files(truth, found, iou_type)


def test_sides_in_text_and_areas_of_null_are_understood():
    written = lambda c: [image.update(width=str(image["width"]), height=str(image["height"])) for image in c["images"]]
    assert evaluate_coco_files(changed(TRUTH_CONTENT, written), FOUND, "segm").stats == evaluate_coco_files(TRUTH, FOUND, "segm").stats
    null, none = (changed(TRUTH_CONTENT, lambda c: [change(a) for a in c["annotations"]]) for change in
                  (lambda a: a.update(area=None), lambda a: a.pop("area")))
    assert evaluate_coco_files(null, FOUND, "bbox").stats == evaluate_coco_files(none, FOUND, "bbox").stats


def test_broken_json_is_named(tmp_path):
    broken = tmp_path / "half.json"
    broken.write_text('{"images": [')
    with pytest.raises(ValueError, match="half.json: expected JSON"):
        evaluate_coco_files(str(broken), FOUND)


@pytest.mark.parametrize("call, message", [
    (lambda e: e.add_truth(1, [[0, 0, 2, 2]], [3], [None]), "labels 1..2"),
    (lambda e: e.add_truth(1, [[0, 0, 2, 2]], [0], [None]), "0 is background"),
    (lambda e: e.add_truth(1, [[0, 0, 2, 2]], [1, 1]), "1 boxes"),
    (lambda e: e.add_truth(1, [[0, 0, 2, 2]], [1]), "expected 1 RLEs"),
    (lambda e: (e.add_truth(1, [], []), e.add_truth(1, [], [])), "each picture once"),
    (lambda e: e.add_detections(1, [[0, 0, 2, 2]], [float("inf")], [1], [{"size": [1, 1], "counts": [1]}]), "diverge"),
    (lambda e: (e.add_detections(9, [], [], []), e.evaluate()), "without truth: \\[9\\]"),
])
def test_faults_of_calls_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(CocoEvaluator(["dent", "scratch"]))


def test_masks_of_another_size_are_named(body):
    evaluator = CocoEvaluator(["dent"])
    evaluator.add_truth(1, [[0, 0, 2, 2]], [1], [{"size": [4, 5], "counts": [0, 20]}])
    evaluator.add_detections(1, [[0, 0, 2, 2]], [0.5], [1], [{"size": [5, 4], "counts": [0, 20]}])
    with pytest.raises(ValueError, match="size"):
        evaluator.evaluate()
