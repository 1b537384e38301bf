"""minidamage/visualize: where each pixel's colour comes from, ticks at round numbers, one whole HTML file."""
import html.parser
import io
import math
import os

import numpy as np
import pytest
import torch
from PIL import Image

from minidamage import masks as mask_codec
from minidamage.visualize import overlay, plots, report
from minidamage.visualize.canvas import log_ticks, nice_ticks, padded_limits

NAMES = ("dent", "scratch", "broken glass")
GREY = np.full((120, 160, 3), 128, np.uint8)


def disc(height, width, y, x, radius):
    rows, columns = np.ogrid[:height, :width]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius ** 2


# ---------------------------------------------------------------------------------------------- overlay

def test_mask_tints_inside_outlines_its_border_and_leaves_the_rest():
    mask = disc(120, 160, 60, 80, 30)
    canvas = GREY.copy()
    overlay.paint_mask(canvas, mask, (36, 107, 235), line=2)
    assert tuple(canvas[60, 80]) == tuple(int(128 + (c - 128) * overlay.MASK_OPACITY + 0.5) for c in (36, 107, 235))
    assert tuple(canvas[31, 80]) == (36, 107, 235)                     # inside, on the border
    assert (canvas[29, 80] > 180).all()                                # the seam just outside, light around a dark colour
    assert (canvas[27, 80] == 128).all() and (canvas[0] == 128).all()
    overlay.paint_mask(canvas, mask, (250, 220, 90), line=2)
    assert (canvas[29, 80] < 120).all()                                # dark around a light one


@pytest.mark.parametrize("mask", [np.ones((5, 7), bool), np.zeros((5, 7), bool), np.eye(5, 7, dtype=bool)])
def test_masks_at_the_picture_border_and_tiny_pictures(mask):
    canvas = np.zeros((5, 7, 3), np.uint8)
    overlay.paint_mask(canvas, mask, (200, 100, 50), line=3)
    assert (canvas[mask] == (200, 100, 50)).all(axis=1).sum() >= min(mask.sum(), 5)
    assert not mask.any() and not canvas.any() or mask.any()


def test_dilation_is_a_square_window_of_the_radius():
    generator = np.random.default_rng(0)
    for radius in (1, 2, 3, 5, 8):
        mask = generator.random((23, 31)) < 0.02
        expected = np.zeros_like(mask)
        for y, x in zip(*np.nonzero(mask)):
            expected[max(y - radius, 0):y + radius + 1, max(x - radius, 0):x + radius + 1] = True
        np.testing.assert_array_equal(overlay._dilated(mask, radius), expected)


def test_box_covers_the_pixels_of_its_outer_corners():
    drawn = overlay.draw_detections(GREY, [[20, 40, 60, 90]], [1], None, None, NAMES)
    blue = (drawn == overlay.NAMED_COLOURS["dent"]).all(axis=2)
    assert blue[40:90, 20].all() and blue[40:90, 59].all() and blue[89, 20:60].all()
    assert not blue[40:90, 60].any() and not blue[90].any()


def test_forms_of_masks_and_pictures_draw_alike():
    stack = np.stack([disc(120, 160, 40, 50, 20), disc(120, 160, 80, 100, 25)])
    boxes = mask_codec.to_boxes(mask_codec.encode(stack))
    arguments = (boxes, [1, 2], [0.9, 0.4])
    expected = overlay.draw_detections(GREY, *arguments, stack, NAMES)
    torch = pytest.importorskip("torch")
    for masks in (mask_codec.encode(stack), stack[:, None], stack.astype(np.float32), torch.from_numpy(stack)):
        np.testing.assert_array_equal(overlay.draw_detections(GREY, *arguments, masks, NAMES), expected)
    tensor = torch.from_numpy(GREY).permute(2, 0, 1)
    np.testing.assert_array_equal(overlay.draw_detections(tensor, *arguments, stack, NAMES), expected)
    np.testing.assert_array_equal(overlay.draw_detections(tensor / 255, *arguments, stack, NAMES), expected)
    assert (GREY == 128).all()


def test_a_small_picture_is_enlarged_with_its_mask_and_box_pixel_by_pixel():
    mask = np.zeros((120, 160), bool)
    mask[50:70, 30:90] = True
    drawn = overlay.draw_detections(GREY, [[30, 50, 90, 70]], [1], None, mask[None], NAMES, enlarge=True)
    assert drawn.shape == (480, 640, 3)
    blue = (drawn == overlay.NAMED_COLOURS["dent"]).all(axis=2)
    rows, columns = np.nonzero(blue[200:])                            # from the box's upper edge: the tag is above it
    assert (columns.min(), columns.max() + 1, rows.max() + 201) == (4 * 30, 4 * 90, 4 * 70)
    assert [overlay.enlargement(*size) for size in ((192, 192), (192, 256), (321, 10), (3000, 4000))] == [3, 2, 1, 1]


def test_a_label_map_tints_each_class_and_greys_what_is_not_judged():
    image, label_map = np.full((400, 400, 3), 200, np.uint8), np.zeros((400, 400), np.uint8)
    label_map[20:60, 20:60], label_map[100:140, 20:60], label_map[200:240] = 1, 2, 255
    drawn = overlay.draw_label_map(image, torch.from_numpy(label_map), ["dent", "scratch"]).astype(int)
    dent, scratch, grey = drawn[40, 40], drawn[120, 40], drawn[220, 200]
    assert dent[2] > dent[0] + 40 and scratch[0] > scratch[2] + 40 and len(set(grey.tolist())) == 1 and grey[0] < 200
    assert (drawn[20, 40] == overlay.NAMED_COLOURS["dent"]).all() and (drawn[300, 300] == 200).all()
    assert (image == 200).all()
    tags = drawn[:42, 399]                                            # the first corner free of labels is the upper right one
    assert [tuple(tags[y]) for y in (7, 21, 35)] == [overlay.NAMED_COLOURS["dent"], overlay.NAMED_COLOURS["scratch"], overlay.NOT_JUDGED]
    assert (drawn[:, 399][42:199] == 200).all()
    assert overlay.draw_label_map(image[:100, :100], label_map[:100, :100], ["dent"], enlarge=True).shape == (600, 600, 3)
    with pytest.raises(ValueError, match=r"expected a label map of the picture's size \[400, 400\], got \[40, 400\]"):
        overlay.draw_label_map(image, label_map[:40], ["dent", "scratch"])


def test_truth_from_polygons_says_crowd():
    polygon = [np.array([[10.0, 30], [60, 30], [60, 80], [10, 80]])]
    plain = overlay.draw_truth(GREY, [[10, 30, 60, 80]], [2], [polygon], NAMES)
    crowd = overlay.draw_truth(GREY, [[10, 30, 60, 80]], [2], [polygon], NAMES, crowd=[True])
    assert (plain[55, 35] != 128).any() and (plain != crowd).any()


def test_remarks_end_the_tags():
    one = [[10, 30, 150, 100]], [1], [0.5], None, NAMES
    drawn = [overlay.draw_detections(GREY, *one, remarks=remarks) for remarks in (None, [""], ["false"])]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[2] != drawn[0]).any()
    with pytest.raises(ValueError, match="zip"):
        overlay.draw_truth(GREY, [[10, 30, 150, 100]], [1], None, NAMES, remarks=["missed", "missed"])


def test_a_picture_with_nothing_on_it_says_so():
    nothing, boxes = np.zeros((120, 160), np.uint8), np.zeros((0, 4))
    found, undamaged = overlay.with_label(GREY, "nothing found"), overlay.with_label(GREY, "no damage")
    np.testing.assert_array_equal(overlay.draw_detections(GREY, boxes, [], [], np.zeros((0, 120, 160), bool), NAMES), found)
    np.testing.assert_array_equal(overlay.draw_truth(GREY, boxes, [], None, NAMES), undamaged)
    np.testing.assert_array_equal(overlay.draw_label_map(GREY, nothing, NAMES), undamaged)
    np.testing.assert_array_equal(overlay.draw_label_map(GREY, nothing, NAMES, empty="nothing found"), found)


def test_a_label_on_the_whole_picture_is_a_tag_in_its_corner():
    photo = np.full((200, 300, 3), 220, np.uint8)
    labelled = overlay.with_label(photo, "nothing found")
    changed = np.argwhere((labelled != photo).any(2))
    assert changed.min(0).tolist() == [0, 0] and changed.max(0)[0] < 20 and 40 < changed.max(0)[1] < 120 and photo.min() == 220
    assert overlay.with_label(photo[:8, :8], "nothing found").shape == (8, 8, 3)


def test_boxes_outside_or_not_finite_do_not_break_the_drawing():
    boxes = [[-50, -50, 400, 400], [500, 500, 600, 600], [np.nan, 0, 10, 10], [5, 5, 5, 5]]
    assert overlay.draw_detections(GREY, boxes, [1, 2, 3, 7], [0.5] * 4, None, NAMES).shape == GREY.shape


def test_lengths_that_differ_are_named():
    with pytest.raises(ValueError, match="2 boxes, 1 labels"):
        overlay.draw_detections(GREY, np.zeros((2, 4)), [1], [0.5], None, NAMES)
    with pytest.raises(ValueError, match=r"\[120, 160\]"):
        overlay.draw_detections(GREY, [[0, 0, 9, 9]], [1], [0.5], np.ones((1, 9, 9), bool), NAMES)


@pytest.mark.parametrize("side", [192, 640, 3000])
def test_tags_stay_inside_and_keep_clear_of_each_other(side):
    generator = np.random.default_rng(1)
    corner = generator.random((12, 2)) * side * 0.9
    boxes = np.concatenate([corner, corner + side * 0.15], axis=1)
    font = overlay.ImageFont.load_default(overlay.font_size(side, side))
    draw = overlay.ImageDraw.Draw(Image.new("RGB", (side, side)))
    placed = []
    for box in boxes:
        text, size = overlay._fitted(draw, "broken glass 0.93", font, side)
        spot, covered = overlay._tag_place(box, size, placed, side, side)
        assert 0 <= spot[0] and spot[2] <= side and 0 <= spot[1] and spot[3] <= side
        if covered <= 0.12:
            placed.append(spot)
    assert len(placed) >= 8


def test_a_tag_wider_than_the_picture_is_shortened_and_keeps_its_score():
    font = overlay.ImageFont.load_default(10)
    draw = overlay.ImageDraw.Draw(Image.new("RGB", (64, 64)))
    text, (width, _) = overlay._fitted(draw, "a very long class name 0.93", font, 64)
    assert text.endswith("… 0.93") and width <= 64


def test_colours_are_the_papers_stable_and_distinct():
    colours = overlay.class_colours(["dent", "Broken-Glass", "tray_son", "x"])
    assert colours["dent"][2] > 200 and colours["tray_son"] == overlay.NAMED_COLOURS["scratch"]
    assert colours["Broken-Glass"] == overlay.NAMED_COLOURS["broken glass"]
    assert overlay.class_colours(["x"])["x"] == colours["x"]
    many = overlay.class_colours([f"class {k}" for k in range(80)])
    assert len(set(many.values())) == 80


def test_grid_holds_every_picture_and_refuses_none():
    pictures = [np.full((100, 50, 3), 250, np.uint8), np.full((30, 90, 3), 10, np.uint8), np.zeros((3, 40, 40), np.float32)]
    sheet = overlay.grid(pictures, ["one", "two " * 40, None], columns=2, title="all")
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 2 * 120
    with pytest.raises(ValueError, match="at least one"):
        overlay.grid([])
    with pytest.raises(ValueError, match="one title a picture"):
        overlay.grid(pictures, ["one"])


def test_a_failed_write_leaves_the_older_file_and_no_rest(tmp_path):
    path = tmp_path / "a.png"
    overlay.save_picture(path, GREY)
    older = path.read_bytes()

    def fail(stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        overlay.write_beside(path, fail)
    assert path.read_bytes() == older and os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError, match=".png or .jpg"):
        overlay.save_picture(tmp_path / "a.gif", GREY)


# ---------------------------------------------------------------------------------------------- plots

@pytest.mark.parametrize("low, high, texts", [
    (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]), (0, 0.013, ["0.000", "0.005", "0.010"]),
    (-3, 3, ["-2", "0", "2"]), (0, 12000, ["0", "2,500", "5,000", "7,500", "10,000"])])
def test_ticks_are_round(low, high, texts):
    assert [text for _, text in nice_ticks(low, high)] == texts


def test_whole_number_ticks_for_epochs():
    assert [value for value, _ in nice_ticks(0.9, 3.1, 7, integers=True)] == [1, 2, 3]
    assert all(value == int(value) for value, _ in nice_ticks(1, 12, 7, integers=True))
    assert nice_ticks(4, 4) == [(4, "4")]


def test_log_ticks_and_limits():
    assert [text for _, text in log_ticks(0.01, 10)] == ["0.01", "0.1", "1", "10"]
    assert [text for _, text in log_ticks(1, 10)] == ["1", "2", "5", "10"]
    assert padded_limits([]) == (0.0, 1.0) and padded_limits([math.nan], log=True) == (0.1, 1.0)
    low, high = padded_limits([3.0])
    assert low < 3 < high


def test_line_plot_draws_its_colours_breaks_at_nan_and_survives_odd_input():
    picture = plots.line_plot({"a": ([1, 2, 3], [1, math.nan, 3]), "b": ([1, 2, 3], [2, 2, 2])}, "t", "x", "y")
    assert picture.shape == (plots.SIZE[1], plots.SIZE[0], 3)
    assert ((picture == plots.SERIES[1]).all(axis=2)).sum() > 100
    for series in ({"a": ([], [])}, {"a": ([1], [5])}, {"a": ([1, 2], [math.nan, math.nan])}, {"a": ([1, 2], [-1, 0])}):
        for log_y in (False, True):
            plots.line_plot(series, log_y=log_y)
    with pytest.raises(ValueError, match="as many x as y"):
        plots.line_plot({"a": ([1, 2], [1])})


def test_bar_heights_are_proportional():
    picture = plots.bar_plot(["one", "two"], {"v": [1.0, 0.5]}, value_format="")
    blue = (picture == plots.SERIES[0]).all(axis=2)
    half = picture.shape[1] // 2
    tall, short = blue[:, :half].any(axis=1).sum(), blue[:, half:].any(axis=1).sum()
    assert abs(tall - 2 * short) <= 3
    plots.bar_plot([f"a long name {k}" for k in range(20)], {"v": [math.nan] * 20, "w": [-1.0] * 20}, errors={"w": [0.1] * 20})
    with pytest.raises(ValueError, match="one a group"):
        plots.bar_plot(["one"], {"v": [1, 2]})


def test_box_plot_takes_empty_and_constant_samples():
    colours = {"empty": (200, 0, 0), "one": (0, 200, 0), "same": (0, 0, 200), "some": (200, 0, 200)}
    drawn = plots.box_plot({"empty": [], "one": [0.5], "same": [1, 1, 1], "some": [0, 1, 2, 30, math.nan]}, "t", "IoU", colours=colours)
    assert [bool((drawn == colour).all(axis=2).any()) for colour in colours.values()] == [False, True, True, True]


def test_precision_recall_names_the_area(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "line_plot", lambda series, *arguments, **named: drawn.extend(series))
    recall = np.linspace(0, 1, 101)
    precision = np.where(recall <= 0.5, 1.0, 0.0)
    plots.precision_recall_plot({"dent": (recall, precision), "none": (recall, np.full(101, -1.0))})
    assert [(series.name, series.y) for series in drawn] == [("dent: area 0.505", [1.0] * 51), ("none: area n/a", [])]


CSV = """epoch,lr,train/loss,train/loss_mask,val/loss,val/loss_mask,val/segm/AP,val/bbox/AP50
1,0.01,2.0,1.0,2.1,1.1,0.1,0.2
2,0.01,1.5,0.8,,,,
2,0.01,1.4,0.7,1.8,1.0,0.2,nan
3,0.001,1.0,0.5,1.7,0.9,0.3,0.5
"""


def test_curves_from_csv(tmp_path):
    (tmp_path / "metrics.csv").write_text(CSV)
    columns = plots.read_metrics(tmp_path / "metrics.csv")
    assert columns["epoch"] == [1, 2, 3] and columns["train/loss"] == [2.0, 1.4, 1.0] and math.isnan(columns["val/bbox/AP50"][1])
    assert plots.curves_from_csv(tmp_path / "metrics.csv", tmp_path / "curves.png") == str(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (2 * plots.SIZE[0], 2 * plots.SIZE[1])
    (tmp_path / "equal.csv").write_text("epoch,val/segm/AP,val/bbox/AP\n1,0.1,0.1\n2,0.3,0.3\n")
    counts = {}
    for name in ("segm/AP", "bbox/AP"):                                # two equal curves: the one that chooses lies on top
        plots.curves_from_csv(tmp_path / "equal.csv", tmp_path / "equal.png", select_by=name)
        plot = np.asarray(Image.open(tmp_path / "equal.png"))[120:]
        counts[name] = [(plot == plots.SERIES[k]).all(2).sum() for k in (0, 1)]
    assert counts["segm/AP"][0] > 5 * counts["segm/AP"][1] and counts["bbox/AP"][1] > 5 * counts["bbox/AP"][0]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="'epoch' column"):
        plots.curves_from_csv(tmp_path / "other.csv", tmp_path / "x.png")


# ---------------------------------------------------------------------------------------------- report

class Balanced(html.parser.HTMLParser):
    """Collects what was opened and closed out of order, and every address that the page would load."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.addresses = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_report_is_one_valid_file_with_everything_inside(tmp_path):
    stream = io.BytesIO()
    Image.fromarray(GREY).save(stream, "JPEG")
    path = report.write_report(tmp_path / "report.html", "A <title> & more", [
        ("Numbers", ["Says `code`, <b>not</b> HTML.", {"seed": 0, "checkpoint": "best.pt", "AP": 0.5},
                     report.Table(["class", "AP50", "n"], [["dent", 0.61234, 1200], ["scratch", math.nan, None]], "Per class"),
                     report.Table(["rule", "in text"], [["VOC", "61.30"], ["COCO", "0.52 ± 0.03"]])]),
        ("Pictures", [report.Picture(GREY, "array"), report.Picture(stream.getvalue(), 'bytes "quoted"', wide=True),
                      report.Picture(GREY, "its own title", titled=True)]),
        ("Empty", "one text")], subtitle="test")
    page = open(path, encoding="utf-8").read()
    parser = Balanced()
    parser.feed(page)
    assert not parser.wrong and not parser.open
    assert all(address.startswith(("#", "data:image/")) for address in parser.addresses)
    for part in ("&lt;b&gt;not&lt;/b&gt;", "<code>code</code>", "0.612", "1,200", "prefers-color-scheme: dark", "data:image/png;base64",
                 "data:image/jpeg;base64"):
        assert part in page
    assert page.count("n/a") == 2 and '<th scope="col" class="number">in text' in page
    assert 'alt="its own title"' in page and "<figcaption>its own title" not in page and "<figcaption>array" in page


def test_report_refuses_what_it_cannot_show(tmp_path):
    for blocks, message in (([report.Table(["a"], [[1, 2]])], "1 cells a row"), ([report.Picture(b"GIF89a")], "PNG or JPEG"),
                            ([3], "got int")):
        with pytest.raises(ValueError, match=message):
            report.write_report(tmp_path / "r.html", "t", [("s", blocks)])
    assert not os.listdir(tmp_path)
