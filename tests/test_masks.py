"""masks.py against stored results of pycocotools (data/rle.json, data/mask_iou.npz), against definitions in loop form, and numpy = C++."""
import json
import os

import numpy as np
import pytest

from minidamage import masks

DATA = os.path.join(os.path.dirname(__file__), "data")
with open(os.path.join(DATA, "rle.json")) as file:
    ORACLE = json.load(file)
HEIGHT, WIDTH = ORACLE["size"]


@pytest.fixture(params=["numpy", "native"], autouse=True)
def body(request, monkeypatch):
    """Every test runs on the numpy reference and on the C++ twin."""
    if request.param == "numpy":
        monkeypatch.setattr(masks, "native_module", lambda: None)
    elif masks.native_module() is None:
        pytest.skip("no compiler, or MINIDAMAGE_KERNELS=off: no C++ to compare")        # a broken build raises before (conftest.py)
    return request.param


def oracle_rles():
    return [{"size": [HEIGHT, WIDTH], "counts": p["counts"]} for p in ORACLE["polygons"]]


def random_masks(n=40, seed=0):
    """Masks of many textures: speckle, smooth blobs with holes, stripes, full, empty, one pixel."""
    rng = np.random.RandomState(seed)
    out = [np.zeros((7, 5), bool), np.ones((7, 5), bool), np.eye(6, dtype=bool), np.ones((1, 1), bool), ~np.eye(6, dtype=bool)]
    for _ in range(n):
        h, w = rng.randint(1, 40, 2)
        noise = rng.rand(h, w)
        if rng.rand() < 0.6:                                         # smooth it: larger shapes
            for _ in range(rng.randint(1, 4)):
                noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, -1, 0) + np.roll(noise, -1, 1)) / 5
        out.append(noise > np.quantile(noise, rng.rand()))
    return out


# ---- by hand ---------------------------------------------------------------------------------------------------------------------

def test_encode_by_hand():
    mask = np.array([[0, 1], [1, 1], [0, 0]])                        # columns 0 1 0 | 1 1 0 -> runs 1 1 1 2 1
    rle = masks.encode(mask)
    assert rle == {"size": [3, 2], "counts": b"11110"}               # from the fourth run on: difference to the run two before
    assert masks.area(rle) == 3
    assert masks.to_boxes(rle).tolist() == [0, 0, 2, 2]
    assert np.array_equal(masks.decode({"size": [3, 2], "counts": [1, 1, 1, 2, 1]}), mask)


def test_square_polygon_by_hand():
    mask = masks.decode(masks.from_polygons([[1, 2, 4, 2, 4, 5, 1, 5]], 7, 6))
    expected = np.zeros((7, 6), np.uint8)
    expected[2:5, 1:4] = 1
    assert np.array_equal(mask, expected)


def test_fill_holes_and_remove_islands_by_hand():
    ring = np.zeros((7, 8), bool)
    ring[1:6, 1:6] = True
    ring[2:5, 2:5] = False
    ring[3, 7] = True
    filled = masks.fill_holes(ring)
    assert filled.dtype == bool and filled.sum() == 25 + 1
    assert masks.remove_islands(filled, 2).sum() == 25
    ring[1, 1] = False                                               # a corner: background is joined over edges only, still a hole
    assert masks.fill_holes(ring).sum() == 24 + 1
    ring[1, 2] = False                                               # an edge: open
    assert masks.fill_holes(ring).sum() == ring.sum()


# ---- oracle ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", ORACLE["polygons"], ids=lambda c: c["name"])
def test_polygon_rle_equals_pycocotools(case):
    rle = masks.from_polygons(case["polygons"], HEIGHT, WIDTH)
    assert rle["counts"].decode() == case["counts"]
    assert masks.area(rle) == case["area"]
    x0, y0, x1, y1 = masks.to_boxes(rle)
    assert [x0, y0, x1 - x0, y1 - y0] == case["bbox"]
    assert masks.encode(masks.decode(rle)) == rle
    assert masks.merge([{"size": [HEIGHT, WIDTH], "counts": case["runs"]}])["counts"].decode() == case["counts"]


def test_dense_rle_equals_pycocotools():
    for case in ORACLE["encode"]:
        mask = np.array(case["mask"], np.uint8)
        rle = masks.encode(mask)
        assert rle["counts"].decode() == case["counts"], case["name"]
        assert np.array_equal(masks.decode(rle), mask), case["name"]
    big = ORACLE["encode_big"]
    mask = np.zeros(big["size"], bool)
    mask[slice(*big["rect_rows"]), slice(*big["rect_cols"])] = True
    mask[big["hole_row"], slice(*big["hole_cols"])] = False
    assert masks.encode(mask)["counts"].decode() == big["counts"]
    assert masks.area(masks.encode(mask)) == big["area"]
    for case in ORACLE["bbox_to_rle"]:
        x, y, w, h = case["bbox"]
        rle = masks.from_polygons([[x, y, x, y + h, x + w, y + h, x + w, y]], HEIGHT, WIDTH)
        assert rle["counts"].decode() == case["counts"] and masks.area(rle) == case["area"]


def test_iou_and_merge_equal_pycocotools():
    stored, rles = np.load(os.path.join(DATA, "mask_iou.npz")), oracle_rles()
    assert np.array_equal(masks.iou(rles, rles), stored["iou_plain"])
    assert np.array_equal(masks.iou(rles, rles, stored["iscrowd"]), stored["iou_crowd"])
    assert np.array_equal(masks.decode(masks.merge(rles[:20])), stored["union_all"])
    assert np.array_equal(masks.decode(masks.merge([rles[3], rles[4]], intersect=True)), stored["inter_3"])


# ---- definitions -----------------------------------------------------------------------------------------------------------------

def test_round_trip_area_box():
    for mask in random_masks():
        rle = masks.encode(mask)
        assert np.array_equal(masks.decode(rle), mask)
        assert masks.area([rle]).tolist() == [mask.sum()]
        y, x = np.nonzero(mask)
        expected = [x.min(), y.min(), x.max() + 1, y.max() + 1] if len(x) else [0, 0, 0, 0]
        assert masks.to_boxes([rle]).tolist() == [expected]


def test_stack_equals_one_by_one():
    stack = np.random.RandomState(1).rand(9, 13, 70) > 0.4
    rles = masks.encode(stack)
    assert rles == [masks.encode(m) for m in stack]
    assert np.array_equal(masks.decode(rles), stack)
    assert masks.encode(np.asfortranarray(stack[0])) == rles[0]
    assert masks.encode(stack[0].astype(np.int64) * 7) == rles[0]


def test_merge_and_iou_are_set_operations():
    rng = np.random.RandomState(2)
    stack = rng.rand(6, 17, 23) > 0.5
    rles = masks.encode(stack)
    assert np.array_equal(masks.decode(masks.merge(rles[:3])), stack[:3].any(0))
    assert np.array_equal(masks.decode(masks.merge(rles[:3], intersect=True)), stack[:3].all(0))
    both = (stack[:4, None] & stack[None, 4:]).sum((2, 3))
    either = (stack[:4, None] | stack[None, 4:]).sum((2, 3))
    assert np.array_equal(masks.iou(rles[:4], rles[4:]), both / either)
    crowd = masks.iou(rles[:4], rles[4:], iscrowd=[1, 0])
    assert np.array_equal(crowd[:, 0], both[:, 0] / stack[:4].sum((1, 2)))
    assert masks.iou([], rles).shape == (0, 6) and masks.iou(rles, []).shape == (6, 0)


def flood(mask, connectivity):
    """Components by breadth-first search, raster order: the definition."""
    labels, n = np.zeros(mask.shape, np.int32), 0
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if connectivity == 8 else [])
    for seed in np.argwhere(mask):
        if labels[tuple(seed)]:
            continue
        n += 1
        labels[tuple(seed)], queue = n, [tuple(seed)]
        while queue:
            y, x = queue.pop()
            for dy, dx in steps:
                p = y + dy, x + dx
                if 0 <= p[0] < mask.shape[0] and 0 <= p[1] < mask.shape[1] and mask[p] and not labels[p]:
                    labels[p] = n
                    queue.append(p)
    return labels, n


def test_components_holes_islands_against_flood_fill():
    for mask in random_masks(30, seed=3):
        for connectivity in (4, 8):
            labels, n = masks.connected_components(mask, connectivity)
            expected, expected_n = flood(mask, connectivity)
            assert n == expected_n and labels.dtype == np.int32 and np.array_equal(labels, expected)
        background, n = flood(np.pad(~mask, 1, constant_values=True), 4)
        filled = (background != 1)[1:-1, 1:-1]                       # label 1 is the padding's component
        assert np.array_equal(masks.fill_holes(mask), filled)
        assert masks.fill_holes(masks.encode(mask)) == masks.encode(filled)
        labels, n = flood(mask, 8)
        for min_area in (1, 2, 5, 30):
            kept = mask & (np.bincount(labels.ravel(), minlength=n + 1) >= min_area)[labels]
            assert np.array_equal(masks.remove_islands(mask, min_area), kept)
            assert masks.remove_islands([masks.encode(mask)], min_area) == [masks.encode(kept)]


def test_transform_keeps_form():
    stack = np.random.RandomState(4).rand(5, 9, 11) > 0.4
    assert np.array_equal(masks.fill_holes(stack), np.stack([masks.fill_holes(m) for m in stack]))
    assert masks.fill_holes(stack[:0]).shape == (0, 9, 11)
    assert masks.remove_islands([], 4) == []
    assert masks.fill_holes(stack[0].astype(np.uint8)).dtype == bool


def test_outlines_give_the_mask_back():
    for mask in random_masks(40, seed=5):
        outlines = masks.to_polygons(mask)
        assert len(outlines) == flood(mask, 8)[1]
        rings = [ring for outer, holes in outlines for ring in (outer, *holes)]
        again = masks.decode(masks.from_polygons(rings, *mask.shape, even_odd=True))
        assert np.array_equal(again, mask)
        for outer, holes in outlines:
            signed = [(r[:, 0] * np.roll(r[:, 1], -1) - np.roll(r[:, 0], -1) * r[:, 1]).sum() / 2 for r in (outer, *holes)]
            assert signed[0] > 0 and all(s < 0 for s in signed[1:])
            alone = masks.from_polygons([outer, *holes], *mask.shape, even_odd=True)
            assert masks.area(alone) == sum(signed)                  # shoelace area = pixels
            steps = np.abs(np.roll(outer, -1, 0) - outer)
            assert ((steps == 0).sum(1) == 1).all()                  # along pixel edges, no repeated point
            assert (np.sign(np.roll(steps, 1, 0)) != np.sign(steps)).all()                # no collinear point


# ---- both bodies, far from the oracle's cases -------------------------------------------------------------------------------------

def test_polygons_numpy_equals_native(body, monkeypatch):
    if body == "numpy":
        return                                                       # compares the two bodies: once is enough
    rng = np.random.RandomState(6)
    for case in range(400):
        h, w = rng.randint(1, 60, 2)
        rings = [rng.uniform(-40, 100, (rng.randint(1, 9), 2)) for _ in range(rng.randint(1, 4))]
        if case % 3 == 0:
            rings = [np.round(r * 2) / 2 for r in rings]
        if case % 11 == 0:
            rings = [r * 30 for r in rings]                          # most of it far outside
        if case % 7 == 0:
            rings[0] = np.repeat(rings[0], 2, axis=0)
        for even_odd in (False, True):
            fast = masks.from_polygons(rings, h, w, even_odd)
            with monkeypatch.context() as patch:
                patch.setattr(masks, "native_module", lambda: None)
                slow = masks.from_polygons(rings, h, w, even_odd)
            assert fast == slow
            assert masks.encode(masks.decode(fast)) == fast          # canonical


# ---- mistakes --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, message", [
    (lambda: masks.area({"size": [3, 3], "counts": [1, 1, 1]}), "height \\* width = 3 \\* 3"),
    (lambda: masks.decode({"size": [3, 2], "counts": b"1111"}), "height \\* width"),
    (lambda: masks.area({"size": [3, 2], "counts": "11 21"}), "characters"),
    (lambda: masks.area({"size": [3, 2], "counts": b"1112P"}), "cut off"),
    (lambda: masks.area({"size": [3, 2], "counts": [-1, 7]}), "runs >= 0"),
    (lambda: masks.area([{"counts": b"11"}]), "an RLE is a dict"),
    (lambda: masks.area(["11"]), "an RLE is a dict"),
    (lambda: masks.decode({"size": [2 ** 31 + 100, 1], "counts": b"ZPPPPP2d0V2"}), "from 0 to 16777216 pixels a side"),
    (lambda: masks.iou([{"size": [3, 2], "counts": [6]}], [{"size": [2, 3], "counts": [6]}]), "one size"),
    (lambda: masks.merge([]), "at least one"),
    (lambda: masks.decode([]), "at least one"),
    (lambda: masks.encode(np.zeros(4)), "\\[H, W\\]"),
    (lambda: masks.from_polygons([[1, 2, 3]], 5, 5), "flat lists"),
    (lambda: masks.from_polygons([[1, 2, 3, np.nan]], 5, 5), "finite"),
    (lambda: masks.from_polygons([[1, 2, 3e12, 4, 5, 6]], 5, 5), "finite"),
    (lambda: masks.segmentation_to_rle({"size": [4, 5], "counts": [20]}, 5, 4), "swapped"),
    (lambda: masks.segmentation_to_rle([], 5, 4), "got none"),
    (lambda: masks.connected_components(np.zeros((3, 3)), 6), "4 or 8"),
])
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_segmentation_forms():
    square = [1, 1, 4, 1, 4, 3, 1, 3]
    rle = masks.segmentation_to_rle([square], 5, 6)
    assert masks.segmentation_to_rle(square, 5, 6) == rle
    assert masks.segmentation_to_rle([np.reshape(square, (4, 2))], 5, 6) == rle
    assert masks.segmentation_to_rle({"size": [5, 6], "counts": rle["counts"].decode()}, 5, 6) == rle
    assert masks.segmentation_to_rle({"size": [5, 6], "counts": [6, 2, 3, 2, 3, 2, 12]}, 5, 6) == rle
    assert masks.area(masks.from_polygons([], 5, 6)) == 0
