"""skeleton.py: shapes measured by hand, distances against all pairs, topology kept, and numpy = C++ pixel by pixel."""
import numpy as np
import pytest

from minidamage import masks, skeleton


@pytest.fixture(params=["numpy", "native"], autouse=True)
def body(request, monkeypatch):
    """Every test runs on the numpy reference and on the C++ twin."""
    if request.param == "numpy":
        monkeypatch.setattr(masks, "native_module", lambda: None)
    elif masks.native_module() is None:
        pytest.skip("no compiler, or MINIDAMAGE_KERNELS=off: no C++ to compare")        # a broken build raises before (conftest.py)
    return request.param


def random_masks(n, seed=0, largest=40):
    rng = np.random.RandomState(seed)
    for _ in range(n):
        noise = rng.rand(*rng.randint(1, largest, 2))
        for _ in range(rng.randint(0, 5)):                            # smoothed: from speckle to blobs with holes
            noise = (noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1) + np.roll(noise, -1, 0) + np.roll(noise, -1, 1)) / 5
        yield noise > np.quantile(noise, rng.rand())


def turned_bar(angle, width, length=200, side=300):
    y, x = np.mgrid[:side, :side] - side / 2
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return (abs(y * cos - x * sin) <= width / 2) & (abs(x * cos + y * sin) <= length / 2)


# ---- distances ---------------------------------------------------------------------------------------------------------------------

def test_distances_by_hand():
    mask = np.zeros((3, 4), bool)
    mask[0, 0] = mask[2, 3] = True
    assert skeleton.squared_distances(mask).tolist() == [[0, 1, 4, 4], [1, 2, 2, 1], [4, 4, 1, 0]]
    assert skeleton.nearest_pixels(mask)[0, 1] == 0 and skeleton.nearest_pixels(mask)[2, 2] == 11
    assert (skeleton.squared_distances(np.zeros((2, 3), bool)) == skeleton.NONE).all()
    assert (skeleton.nearest_pixels(np.zeros((2, 3), bool)) == -1).all()
    assert skeleton.squared_distances(np.zeros((0, 3), bool)).shape == (0, 3)


def test_distances_are_the_smallest_over_all_pairs():
    for mask in random_masks(60, largest=14):
        sites = np.argwhere(mask)
        at = np.argwhere(np.ones_like(mask))
        if not len(sites):
            continue
        all_pairs = ((at[:, None] - sites[None]) ** 2).sum(-1).min(1).reshape(mask.shape)
        np.testing.assert_array_equal(skeleton.squared_distances(mask), all_pairs)
        nearest = skeleton.nearest_pixels(mask)
        rows, columns = np.divmod(nearest, mask.shape[1])
        assert mask[rows, columns].all()
        np.testing.assert_array_equal((rows - np.indices(mask.shape)[0]) ** 2 + (columns - np.indices(mask.shape)[1]) ** 2, all_pairs)


def test_a_picture_with_a_side_too_long_is_named():
    with pytest.raises(ValueError, match="at most 32767 pixels a side, got .1, 40000"):
        skeleton.thin(np.zeros((1, 40000), bool))
    with pytest.raises(ValueError, match="one mask .H, W., got shape .2, 3, 4"):
        skeleton.squared_distances(np.zeros((2, 3, 4)))


# ---- thinning ----------------------------------------------------------------------------------------------------------------------

def test_thinning_by_hand():
    bar = np.zeros((5, 9), bool)
    bar[1:4, 1:8] = True
    assert np.argwhere(skeleton.thin(bar)).tolist() == [[2, x] for x in range(2, 7)]
    one = np.eye(3, dtype=bool)
    assert (skeleton.thin(one) == one).all() and skeleton.thin(np.ones((2, 2), bool)).sum() == 1
    assert skeleton.thin(np.zeros((3, 0), bool)).shape == (3, 0)


def pieces_and_holes(mask):
    return masks.connected_components(mask, 8)[1], masks.connected_components(np.pad(~mask, 1, constant_values=True), 4)[1]


def test_thinning_keeps_pieces_and_holes_and_ends():
    for mask in random_masks(150):
        line = skeleton.thin(mask)
        assert pieces_and_holes(line) == pieces_and_holes(mask) and not (line & ~mask).any()
        assert (skeleton.thin(line) == line).all()
        assert sum(p.loops for p in skeleton.measure(mask)) == pieces_and_holes(mask)[1] - 1


def test_numpy_and_native_are_equal(body):
    if body == "numpy":
        pytest.skip("compared once, in the native round")
    for mask in random_masks(200, seed=1, largest=60):
        data = mask.view(np.uint8)
        np.testing.assert_array_equal(skeleton.squared_distances(mask), skeleton.squared_distances_reference(data))
        np.testing.assert_array_equal(skeleton.thin(mask), skeleton.thin_reference(data).astype(bool))


# ---- lengths and widths ------------------------------------------------------------------------------------------------------------

def test_steps_by_hand():
    line = np.array([[1, 0, 0, 0], [1, 0, 0, 1], [1, 1, 0, 1], [0, 0, 1, 0]], bool)       # down 2, right 1, two diagonals, up 1
    assert skeleton.length(line) == pytest.approx(4 + 2 * 2 ** 0.5)                       # the corner is no third, diagonal step
    assert skeleton.length(np.ones((1, 1), bool)) == 0 and skeleton.length(np.zeros((4, 4), bool)) == 0


@pytest.mark.parametrize("width", range(1, 9))
def test_bars_along_the_axes_are_exact(width):
    mask = np.zeros((30, 140), bool)
    mask[8:8 + width, 20:120] = True
    for turned in (mask, mask.T):
        [piece] = skeleton.measure(turned)
        assert (piece.length, piece.mean_width, piece.max_width, piece.area) == (100, width, width, 100 * width)
        assert piece.ends == 2 and piece.loops == 0
    assert skeleton.measure(mask)[0].box == (20, 8, 120, 8 + width)


@pytest.mark.parametrize("angle, width", [(45, 2), (45, 12), (20, 3), (30, 8), (60, 12), (80, 5)])
def test_turned_bars_to_the_error_of_their_steps(angle, width):
    """Steps of 1 and sqrt(2) are at most 8.2 % too long (at 22.5 degrees), and right at 0 and 45."""
    [piece] = skeleton.measure(turned_bar(angle, width))
    assert 198 < piece.length < 200 * 1.09 and (angle != 45 or piece.length < 202)
    assert abs(piece.mean_width - width) < 0.9 and piece.max_width < width + 1 and piece.ends == 2


@pytest.mark.parametrize("length, width, angle", [(60, 3, 28), (60, 3, 68), (200, 3, 68), (60, 10, 22)])
def test_blunt_ends_add_up_to_half_a_width_each(length, width, angle):
    """Where the skeleton of a turned bar runs into a corner and gets half a width more there: 60 x 3 at 28 degrees is 12 % too long."""
    [piece] = skeleton.measure(turned_bar(angle, width, length))
    assert length < piece.length < 1.0824 * length + width


def test_a_crack_longer_than_half_the_longest_side():
    mask = np.zeros((9, 20000), bool)
    mask[3:6] = True
    [piece] = skeleton.measure(mask)
    assert (piece.length, piece.mean_width, piece.max_width) == (20000, 3, 3)


def test_spurs_of_a_wide_bar_are_dropped_and_real_branches_stay():
    bar = turned_bar(10, 12)
    line = skeleton.thin(bar)
    assert skeleton.without_spurs(line, skeleton.local_widths(bar, line)).sum() < line.sum()
    fork = bar.copy()
    fork[60:150, 148:153] = True                                       # a branch of 84 pixels, seven times as long as the bar is wide
    [piece] = skeleton.measure(fork)
    assert piece.ends == 3 and piece.length > 200 + 75


def test_rings_pixels_borders_and_no_mask():
    y, x = np.mgrid[:101, :101] - 50.0
    radius = np.hypot(y, x)
    [ring] = skeleton.measure((radius > 37) & (radius < 43))
    assert ring.loops == 1 and ring.ends == 0 and ring.length == pytest.approx(2 * np.pi * 40, rel=0.06)
    single = np.zeros((5, 5), bool)
    single[2, 3] = True
    assert skeleton.measure(single)[0] == skeleton.Piece(1, (3, 2, 4, 3), 1, 1.0, 1.0, 1.0, 2, 0)
    assert skeleton.measure(np.zeros((4, 4), bool)) == []
    [whole] = skeleton.measure(np.ones((6, 40), bool))                 # no background at all
    assert whole.max_width == 6
    edge = np.zeros((20, 60), bool)
    edge[0:5] = True                                                   # runs along the border: as wide as is seen of it
    assert skeleton.measure(edge)[0].max_width == 5


def test_a_mask_that_leaves_the_picture_is_as_wide_as_is_seen():
    crossing = np.zeros((40, 60), bool)
    crossing[17:22] = True                                             # from border to border
    [piece] = skeleton.measure(crossing)
    assert (piece.length, piece.mean_width, piece.max_width) == (60, 5, 5)
    assert skeleton.measure(~crossing)[0].max_width <= 18              # nearly all of the picture: never wider than it
    slanted = turned_bar(30, 8)[60:150]
    [piece] = skeleton.measure(slanted)
    assert abs(piece.mean_width - 8) < 0.9 and piece.max_width < 9.5
    nearly_all = np.ones((320, 480), bool)
    nearly_all[0, 0] = False
    assert skeleton.measure(nearly_all)[0].max_width <= 320


def test_pieces_by_size_and_the_small_ones_left_out():
    mask = np.zeros((40, 60), bool)
    mask[5:7, 5:50] = mask[20:23, 10:20] = mask[35, 35] = True
    pieces = skeleton.measure(mask)
    assert [p.area for p in pieces] == [90, 30, 1] and [p.length for p in pieces] == [45, 10, 1]
    assert [p.label for p in skeleton.measure(mask, min_area=30)] == [1, 2]
