"""Pixels: every mode that a camera or an editor writes, EXIF rotation, damaged files."""
import numpy as np
import pytest
from PIL import Image

from data_sets import picture
from minidamage.data.objects import turn_points
from minidamage.data.pictures import picture_header, read_image

RAMP = np.linspace(0, 255, 32).astype(np.uint8)[None].repeat(24, 0)                         # [24, 32] grey


def read_saved(tmp_path, image, name="a.png", **save):
    image.save(tmp_path / name, **save)
    return read_image(tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "LA", "RGBA", "1", "I;16", "I", "F"])
def test_modes_give_the_same_grey(tmp_path, mode):
    grey = Image.fromarray(RAMP)
    if mode in ("I;16", "I"):
        image = Image.fromarray(RAMP.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
    elif mode == "F":
        image = Image.fromarray(RAMP.astype(np.float32) / 255)
    else:
        image = grey.convert("RGB").quantize(256) if mode == "P" else grey.convert(mode)
    out = read_saved(tmp_path, image, "a.tif" if mode in "IF" else "a.png")
    assert out.shape == (24, 32, 3) and out.dtype == np.uint8 and out.flags["C_CONTIGUOUS"]
    if mode == "1":
        assert set(np.unique(out)) == {0, 255}
    else:
        np.testing.assert_allclose(out.astype(int), RAMP[..., None].repeat(3, 2), atol=2)


def test_dim_16_bit_pictures_keep_their_scale(tmp_path):
    out = read_saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 64))                # a quarter of the range
    np.testing.assert_allclose(out[..., 0], RAMP.astype(float) * 64 / 257, atol=1)
    assert read_saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16))).max() == 1         # as dark as that: still its type's range


def test_cmyk_alpha_and_palette_transparency(tmp_path):
    colour = Image.new("RGB", (32, 24), (200, 40, 90))
    np.testing.assert_allclose(read_saved(tmp_path, colour.convert("CMYK"), "a.jpg", quality=98)[5, 5], (200, 40, 90), atol=6)
    clear = Image.new("RGBA", (32, 24), (255, 255, 255, 0))
    assert read_saved(tmp_path, clear, "b.png").max() == 0
    palette = Image.new("P", (32, 24), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert read_saved(tmp_path, palette, "c.png", transparency=0)[3, 3].tolist() == [10, 200, 30]
    for colour, clear in (((9, 8, 7), (9, 8, 7)), (9, 9)):                                  # one colour stands for "nothing here"
        seen = read_saved(tmp_path, Image.new("RGB" if clear != 9 else "L", (32, 24), colour), "d.png", transparency=clear)
        assert not seen.any()


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
def test_exif_rotation_of_pixels_sizes_and_points(tmp_path, turn, name):
    pixels = np.zeros((24, 40, 3), np.uint8)
    pixels[4:12, 8:16] = 255                                                                # an 8x8 JPEG block, so that edges stay sharp
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, **({"quality": 100} if name.endswith("jpg") else {}))
    out = read_image(tmp_path / name)
    width, height, stored = picture_header(tmp_path / name)
    assert out.shape[:2] == (height, width) == ((40, 24) if turn >= 5 else (24, 40))
    corners = turn_points(np.array([[8.0, 4], [16, 12]]), turn, 40, 24)
    (x0, y0), (x1, y1) = corners.min(0).astype(int), corners.max(0).astype(int)
    seen = out[..., 0] > 127
    assert seen[y0:y1, x0:x1].all() and seen.sum() == 64
    assert stored == (1 if name.endswith("tif") else turn)


def test_truncated_missing_and_foreign_files_name_themselves(tmp_path):
    path = picture(tmp_path / "a.jpg", 200, 150)
    path.write_bytes(path.read_bytes()[:1500])
    assert picture_header(path)[:2] == (200, 150)                                           # the header alone is whole
    with pytest.raises(ValueError, match=r"a\.jpg: the picture is damaged or cut short"):
        read_image(path)
    with pytest.raises(ValueError, match="no such file"):
        read_image(tmp_path / "b.jpg")
    (tmp_path / "c.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"c\.png: not a picture"):
        read_image(tmp_path / "c.png")


def test_max_side_reduces_without_moving(tmp_path):
    pixels = np.zeros((1200, 1600, 3), np.uint8)
    pixels[400:800, 800:1200] = 255
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    out = read_image(tmp_path / "a.jpg", max_side=400)
    assert out.shape == (300, 400, 3)
    expected = np.zeros((300, 400), bool)
    expected[100:200, 200:300] = True
    assert ((out[..., 0] > 127) == expected).mean() > 0.9999


def test_twelve_megapixels(tmp_path):
    picture(tmp_path / "a.jpg", 4032, 3024, quality=60)
    assert read_image(tmp_path / "a.jpg").shape == (3024, 4032, 3)
