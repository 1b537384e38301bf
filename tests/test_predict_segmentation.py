"""predict.py for segmenters: a model whose probability is the red of each pixel; lengths and widths that are known; tiles without seams."""
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import minidamage
import predict
from minidamage import tiling
from minidamage.layers.segmenter import Segmenter, SegmenterConfig
from minidamage.tiling import tiled_probabilities
from minidamage.visualize.label_maps import FALSE, MISSED, RIGHT, draw_attention, draw_cracks, draw_errors


class RedSegmenter(Segmenter):
    """Red for label 1, where there is a second class green for 2; the probability is the channel's value."""

    def __init__(self, classes=1, image_size=0):
        super().__init__(classes + 1, SegmenterConfig(image_size=image_size), "red")
        self.weight, self.sizes = nn.Parameter(torch.zeros(1)), []
        self.eval()

    def logits(self, x):
        self.sizes.append(tuple(x.shape))
        red, green, _ = (x * self.image_std + self.image_mean).clamp(1e-4, 1 - 1e-4).unbind(1)
        if self.num_classes == 2:
            return torch.logit(red)[:, None]
        return torch.stack([torch.full_like(red, 0.3), red, green], 1).log()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder where the model of best.pt is RedSegmenter."""
    (tmp_path / "best.pt").write_bytes(b"")
    checkpoint = {"model": "red", "class_names": ("crack",), "thresholds": {"crack": 0.4}}
    model = RedSegmenter()
    monkeypatch.setattr(predict, "load_checkpoint", lambda path, device: (model, checkpoint))
    monkeypatch.chdir(tmp_path)
    return tmp_path, model, checkpoint


def run(*arguments):
    return predict.main(["--checkpoint", "best.pt", "--device", "cpu", *map(str, arguments)])


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def photograph(path, height=90, width=160):
    """Two cracks: 100 x 4 pixels of red .8, and 3 x 40 of .5; a speck of .3 that is below the threshold."""
    pixels = np.full((height, width, 3), 20, np.uint8)
    pixels[20:24, 30:130, 0] = 204
    pixels[40:80, 50:53, 0] = 128
    pixels[70:75, 100:105, 0] = 76
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("writes", ["write_json", "save_label_map", "save_picture"])
def test_a_photograph_that_was_stopped_leaves_what_was_there(folder, monkeypatch, writes):
    path, _, _ = folder

    def stopped(*arguments):
        raise KeyboardInterrupt

    def contents():
        return {file.name: file.read_bytes() for file in (path / "predictions").iterdir()}

    photograph(path / "wall.png")
    assert run("wall.png") == 0
    before = contents()
    assert sorted(before) == ["wall.json", "wall.mask.png", "wall.overlay.jpg"]
    monkeypatch.setattr(predict, writes, stopped)
    with pytest.raises(KeyboardInterrupt):
        run("wall.png", "--min-area", "200")
    assert contents() == before


def test_lengths_and_widths_by_hand(folder, capsys):
    path, _, _ = folder
    photograph(path / "wall.png")
    assert run("wall.png", "--mm-per-px", "0.5") == 0
    result = read(path / "predictions" / "wall.json")
    first, second = result["pieces"]
    assert first["box"] == [30, 20, 130, 24] and first["area_px"] == 400 and first["class"] == "crack"
    assert (first["length_px"], first["mean_width_px"], first["max_width_px"]) == (100, 4, 4)
    assert (first["length_mm"], first["mean_width_mm"], first["area_mm2"]) == (50, 2, 100)
    assert (second["length_px"], second["max_width_px"], second["free_ends"], second["loops"]) == (40, 3, 2, 0)
    assert first["mean_probability"] == pytest.approx(0.8, abs=1e-3) and second["mean_probability"] == pytest.approx(0.502, abs=1e-3)
    assert result["totals"] == {"crack": {
        "pieces": 2, "area_px": 520, "length_px": 140, "mean_width_px": round((4 * 100 + 3 * 40) / 140, 2), "max_width_px": 4,
        "length_mm": 70, "mean_width_mm": 1.857, "max_width_mm": 2, "area_mm2": 130}}
    assert result["area_share"] == {"crack": 520 / (90 * 160)} and result["score_thresholds"] == {"crack": 0.4}
    with Image.open(path / "predictions" / "wall.mask.png") as mask:
        assert np.asarray(mask).sum() == 520 and mask.size == (160, 90)
    with Image.open(path / "predictions" / "wall.overlay.jpg") as overlay:
        assert overlay.size == (640, 360)
    assert "2 pieces, 70 mm long together, at most 2.0 mm wide, 3.61% of the picture" in capsys.readouterr().out


def test_score_nothing_found_and_a_second_run(folder, capsys):
    path, _, _ = folder
    photograph(path / "wall.png")
    for _ in range(2):
        assert run("wall.png", "--score", "0.9") == 0
    assert sorted(p.name for p in (path / "predictions").iterdir()) == ["wall.json", "wall.mask.png", "wall.overlay.jpg"]
    result = read(path / "predictions" / "wall.json")
    assert result["pieces"] == [] and result["totals"]["crack"]["length_px"] == 0 == result["totals"]["crack"]["pieces"]
    assert "nothing found (highest probability 0.80)" in capsys.readouterr().out
    with Image.open(path / "predictions" / "wall.overlay.jpg") as picture:
        corner, rest = np.asarray(picture)[:12, :60], np.asarray(picture)[300:]
    assert (corner[:, :, 1:] > 40).mean() > 0.9 and rest[:, :, 1:].max() < 30   # the label, and the photograph as it is


def test_small_pieces_are_left_out_on_request(folder):
    path, _, _ = folder
    photograph(path / "wall.png")
    assert run("wall.png", "--score", "0.2", "--min-area", "26") == 0
    assert [p["area_px"] for p in read(path / "predictions" / "wall.json")["pieces"]] == [400, 120]
    with Image.open(path / "predictions" / "wall.mask.png") as mask:
        assert np.asarray(mask).sum() == 520
    assert run("wall.png", "--score", "0.2", "--min-area", "25") == 0
    assert [p["area_px"] for p in read(path / "predictions" / "wall.json")["pieces"]] == [400, 120, 25]


def test_many_specks_come_with_advice(folder, capsys):
    path, _, _ = folder
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[::4, ::4] = 255
    Image.fromarray(pixels).save(path / "noise.png")
    assert run("noise.png") == 0
    assert "225 pieces: --min-area 50 leaves out" in capsys.readouterr().out


def test_several_classes_take_the_likeliest(folder):
    path, _, checkpoint = folder
    predict.load_checkpoint = lambda *_: (RedSegmenter(2), {**checkpoint, "class_names": ("crack", "moss"), "thresholds": {}})
    pixels = photograph(path / "wall.png")
    pixels[60:70, 5:25, 1] = 200
    Image.fromarray(pixels).save(path / "wall.png")
    assert run("wall.png") == 0
    pieces = read(path / "predictions" / "wall.json")["pieces"]
    assert [(p["class"], p["area_px"]) for p in pieces] == [("crack", 400), ("moss", 200), ("crack", 120)]


def test_tiles_are_suggested_and_used(folder, capsys):
    path, model, _ = folder
    model.config = SegmenterConfig(image_size=64)
    photograph(path / "wall.png", 200, 300)
    assert run("wall.png") == 0
    assert "--tile 64 looks at it in 24 tiles, unreduced, 64 px" in capsys.readouterr().out
    model.sizes.clear()
    assert run("wall.png", "--tile", "64") == 0
    assert sum(size[0] for size in model.sizes) == 24 and {size[2:] for size in model.sizes} == {(64, 64)}
    result = read(path / "predictions" / "wall.json")
    assert [p["length_px"] for p in result["pieces"]] == [100, 40] and (result["tile"], result["overlap"]) == (64, 16)
    assert "tile 64" not in capsys.readouterr().out


def test_the_suggested_tile_is_as_large_as_the_training_pictures_and_said_once(folder, capsys):
    path, model, checkpoint = folder
    model.config = SegmenterConfig(image_size=64)
    checkpoint["run"] = {"picture_side": 100}
    photograph(path / "small.png", 150, 150)                          # reduced no more than the training pictures, nearly
    photograph(path / "wall.png", 200, 300), photograph(path / "yard.png", 200, 300)
    assert run("small.png", "wall.png", "yard.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [k for k, line in enumerate(lines) if "--tile" in line] == [3]
    assert "--tile 100 looks at it in 12 tiles, as large as the training pictures (100 px)" in lines[3] and "wall.png" in lines[2]


def test_a_patch_is_no_crack_and_says_so(folder, capsys):
    path, _, _ = folder
    pixels = np.full((60, 90, 3), 255, np.uint8)
    pixels[0, 0] = 0                                                   # all but a corner is positive
    Image.fromarray(pixels).save(path / "patch.png")
    photograph(path / "wall.png")
    assert run("patch.png", "wall.png") == 0
    [patch], thin = (read(path / "predictions" / f"{name}.json")["pieces"] for name in ("patch", "wall"))
    assert not patch["thin"] and all(piece["thin"] for piece in thin) and patch["max_width_px"] <= 60
    assert capsys.readouterr().out.count("1 piece is not thin") == 1


def test_explain_without_attention_maps_predicts_all_the_same(folder, capsys):
    path, _, _ = folder
    photograph(path / "wall.png")
    assert run("wall.png", "--explain") == 0
    out = capsys.readouterr().out
    assert "note: --explain: red has no attention maps" in out and "2 pieces" in out and "attention.png" not in out


def test_masks_beside_pictures_are_no_photographs(folder, capsys):
    path, _, _ = folder
    for name in ("images", "masks", "train_img", "train_lab", "masks of paper"):
        (path / "set" / name).mkdir(parents=True)
        photograph(path / "set" / name / "wall.png")
    assert run("set") == 0
    out = capsys.readouterr().out
    assert "2 photographs:" in out and f"passed over {os.path.join('set', 'masks')}, " in out
    (path / "only" / "masks").mkdir(parents=True)
    photograph(path / "only" / "masks" / "wall.png")
    assert run("only") == 0 and run("set/masks") == 0


@pytest.mark.parametrize("arguments, message", [
    (["--tile", "8"], "at least 16 pixels"), (["--tile", "64", "--overlap", "40"], "0 to half a tile"),
    (["--overlap", "8"], "expected --tile SIDE"), (["--min-area", "-1"], "--min-area: expected 0 or more"),
    (["--min-area", "1" + 30 * "0"], "--min-area: expected 0 or more pixels, fewer than")])
def test_mistakes_end_with_2(folder, capsys, arguments, message):
    photograph(folder[0] / "wall.png")
    assert run("wall.png", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_scale_that_is_none_is_refused_before_the_model_is_loaded(folder, monkeypatch, capsys, value):
    photograph(folder[0] / "wall.png")
    monkeypatch.setattr(predict, "load_checkpoint", lambda *_: pytest.fail("loaded"))
    assert run("wall.png", "--mm-per-px", value) == 2
    assert "--mm-per-px: expected millimetres a pixel above 0, got" in capsys.readouterr().err


def test_attention_maps_of_context_cracknet(folder):
    path, _, checkpoint = folder
    model = minidamage.build_model("context_cracknet", num_classes=2, image_size=64, sequence_size=64).eval()
    predict.load_checkpoint = lambda *_: (model, checkpoint)
    photograph(path / "wall.png")
    assert run("wall.png", "--explain") == 0
    with Image.open(path / "predictions" / "wall.attention.png") as picture:
        assert picture.width > 4 * 400 and picture.height > 2 * 200


# ---- tiles -------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, tile, overlap", [((90, 160), 32, 8), ((90, 160), 64, 32), ((33, 200), 32, 0), ((20, 25), 32, 8),
                                                 ((64, 64), 64, 16)])
def test_tiles_of_a_pointwise_model_give_the_picture(size, tile, overlap):
    """A model that looks at single pixels must not see the tiles at all."""
    model, image = RedSegmenter(), torch.randint(0, 256, (3, *size), dtype=torch.uint8)
    torch.testing.assert_close(tiled_probabilities(model, image, tile, overlap), model.probabilities([image])[0], rtol=0, atol=1e-5)


def test_every_pixel_is_in_a_tile_and_neighbours_overlap():
    for length in (5, 64, 65, 100, 448, 1000):
        for tile, overlap in ((64, 0), (64, 16), (64, 32)):
            starts = tiling.starts(max(length, tile), tile, overlap)
            assert starts[0] == 0 and starts[-1] + tile == max(length, tile)
            assert all(b - a <= tile - overlap for a, b in zip(starts, starts[1:]))


def test_the_blend_fades_instead_of_jumping():
    """Two tiles that disagree (0 and 1) meet in a ramp: no step is larger than one pixel's share of the overlap."""
    class Disagrees(RedSegmenter):
        def probabilities(self, images, at):
            return [torch.full((1, *image.shape[-2:]), float(image[0, 0, 0] > 0)) for image in images]
    image = torch.zeros(3, 64, 112, dtype=torch.uint8)
    image[:, :, 48:] = 255
    row = tiled_probabilities(Disagrees(), image, 64, 16)[0, 30]
    assert row[0] == 0 and row[-1] == 1 and (row.diff() >= 0).all() and row.diff().max() < 0.09


# ---- pictures ----------------------------------------------------------------------------------------------------------------------

def test_errors_are_coloured_by_hand():
    truth, found = np.array([[1, 1, 0, 0, 255]]), np.array([[1, 0, 1, 0, 1]])
    picture = draw_errors(np.full((1, 5, 3), 100, np.uint8), truth, found)
    assert picture.tolist() == [[list(RIGHT), list(MISSED), list(FALSE), [45, 45, 45], [128, 128, 128]]]
    other = draw_errors(np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 1), np.full((8, 8), 2))
    assert {tuple(c) for c in other.reshape(-1, 3).tolist()} == {FALSE, MISSED}
    line, nothing = np.eye(12, dtype=np.uint8), np.zeros((12, 12), np.uint8)
    small = draw_errors(np.full((12, 12, 3), 100, np.uint8), line, nothing, longest=5)           # a diagonal, blocks of 3 x 3
    assert small.shape == (4, 4, 3) and [[tuple(c) == MISSED for c in row] for row in small.tolist()] == np.eye(4, dtype=bool).tolist()
    half = np.where(np.arange(12) % 3 < 2, line, 0)                                              # two of the block's three are found
    assert tuple(draw_errors(np.zeros((12, 12, 3), np.uint8), line, half, longest=4)[0, 0]) == RIGHT
    other = draw_errors(np.zeros((12, 13, 3), np.uint8), np.pad(line, ((0, 0), (0, 1))), np.pad(half[::-1], ((0, 0), (0, 1))), longest=4)
    assert other.shape == (3, 4, 3)
    with pytest.raises(ValueError, match="picture's size .4, 4., got .1, 5"):
        draw_errors(np.zeros((4, 4, 3), np.uint8), truth, found)


def test_a_thin_crack_on_a_large_photograph_stays_visible_when_reduced():
    image, label_map = np.full((2400, 3200, 3), 120, np.uint8), np.zeros((2400, 3200), np.uint8)
    label_map[1200:1202, 200:3000] = 1
    drawn = draw_cracks(image, label_map, ["crack"])
    small = np.asarray(Image.fromarray(drawn).resize((800, 600), Image.Resampling.BOX)).astype(int)
    column = small[295:305, 400]
    assert (column[:, 0] - column[:, 1]).max() > 60                    # clearly red on a screen
    assert (drawn[1150] == 120).all() and (image == 120).all()


def test_attention_is_drawn_on_its_scale():
    image = np.full((40, 60, 3), 128, np.uint8)
    picture = draw_attention(image, {"rfem3": torch.zeros(40, 60), "cagm": torch.linspace(-3, 5, 2400).reshape(40, 60)})
    assert picture.dtype == np.uint8 and picture.shape[1] > 3 * 400
