"""Pictures: band choice, stretch, labels, panels, error maps and PNG files."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

from uknowpan import pictures
from uknowpan.pictures import add_inset, enlarge, error_map, panels, preview_png, rgb_bands, stretch_from, write_png

RNG = np.random.default_rng(3)


def read_png(path: Path) -> np.ndarray:
    with rasterio.open(path) as png:
        assert png.driver == "PNG"
        return png.read()


@pytest.mark.parametrize(
    ("descriptions", "interpretation", "count", "expected"),
    [
        (("blue", "green", "red", "nir"), (), 4, (2, 1, 0)),
        (("Red", "GREEN", "Blue"), (), 3, (0, 1, 2)),
        (("B2 blue", "B3 green", "B4 red", "B5 red edge"), (), 4, (2, 1, 0)),
        (("B5 red edge", "B4 red", "B3 green", "B2 blue"), (), 4, (1, 2, 3)),
        (("coastal_blue", "blue", "green_i", "green", "yellow", "red", "rededge", "nir"), (), 8,
         (5, 3, 1)),
        (("near red", "red", "green", "blue"), (), 4, (1, 2, 3)),
        ((None, None, None, None), ("gray", "blue", "green", "red"), 4, (3, 2, 1)),
        # descriptions come before GDAL's guess for 4 bands of bytes
        (("blue", "green", "red", "nir"), ("red", "green", "blue", "alpha"), 4, (2, 1, 0)),
        (("B2", "B3", "B4", "B8"), ("gray", "undefined", "undefined", "undefined"), 4, (2, 1, 0)),
        ((None,) * 8, ("gray",) + ("undefined",) * 7, 8, (4, 2, 1)),
        (("red", "green", None), (), 3, (0, 1, 2)),
        ((None,), ("gray",), 1, (0, 0, 0)),
        ((None, None), (), 2, (0, 0, 0)),
    ],
)  # fmt: skip
def test_rgb_bands(descriptions, interpretation, count, expected):
    assert rgb_bands(descriptions, interpretation, count) == expected


def test_stretch_maps_its_percentiles_to_black_and_white():
    image = RNG.uniform(100, 1500, (4, 60, 50))
    stretch = stretch_from(image)
    rgb = stretch.apply(image)
    assert rgb.dtype == np.uint8 and rgb.shape == (3, 60, 50)
    for shown, band in zip(rgb, image[[2, 1, 0]], strict=True):
        low, high = np.percentile(band, [1, 99])
        assert (shown[band <= low] == 0).all() and (shown[band >= high] == 255).all()
        np.testing.assert_allclose(
            255 * (shown[(band > low) & (band < high)] / 255) ** pictures.GAMMA,
            255 * (band[(band > low) & (band < high)] - low) / (high - low),
            atol=0.9,
        )


def test_stretch_gives_equal_values_equal_colours_in_another_image():
    image = RNG.uniform(100, 1500, (4, 40, 40))
    stretch = stretch_from(image)
    darker = np.concatenate([image[:, :20], image[:, :20] / 3], axis=1)
    np.testing.assert_array_equal(stretch.apply(darker)[:, :20], stretch.apply(image)[:, :20])
    assert stretch.apply(darker)[:, 20:].mean() < 0.6 * stretch.apply(image)[:, :20].mean()


def test_stretch_leaves_invalid_pixels_out():
    image = RNG.uniform(100, 1500, (3, 40, 40))
    valid = np.ones((40, 40), bool)
    valid[:20] = False
    spoiled = image.copy()
    spoiled[:, :20] = -9999
    spoiled[:, 20, 0] = np.nan
    clean = image[:, 20:].copy()
    clean[:, 0, 0] = np.nan
    assert stretch_from(spoiled, valid) == stretch_from(clean)
    drawn = stretch_from(clean).apply(clean)
    assert tuple(drawn[:, 0, 0]) == pictures.INVALID


@pytest.mark.parametrize("value", [0.0, 700.0, np.nan])
def test_stretch_of_a_flat_image(value):
    image = np.full((1, 5, 6), value)
    with np.errstate(all="raise"):
        rgb = stretch_from(image).apply(image)
    assert rgb.shape == (3, 5, 6) and len(np.unique(rgb[0])) == 1


def test_stretch_refuses_an_image_without_its_bands():
    with pytest.raises(ValueError, match=r"\(1, 5, 5\)"):
        stretch_from(np.ones((4, 5, 5))).apply(np.ones((1, 5, 5)))


def test_panels_place_pictures_of_different_sizes():
    red, blue = (np.zeros((3, *size), np.uint8) for size in ((20, 30), (10, 50)))
    red[0], blue[2] = 200, 200
    sheet = panels([[("", red), ("", blue)], [("", blue)]], gap=4)
    assert sheet.shape == (3, 4 + 20 + 4 + 10 + 4, 4 + 50 + 4 + 50 + 4)
    assert tuple(sheet[:, 0, 0]) == pictures.BACKGROUND
    np.testing.assert_array_equal(sheet[:, 4:24, 14:44], red)  # centred in its column
    np.testing.assert_array_equal(sheet[:, 9:19, 58:108], blue)  # centred in its row
    np.testing.assert_array_equal(sheet[:, 28:38, 4:54], blue)


@pytest.mark.parametrize(
    ("size", "words"), [((40, 200), "PAN, 0.5 m"), ((4, 60), "a long caption 1.23"), ((9, 4), "PAN")]
)
def test_captions_stand_above_and_fit_the_width(size, words):
    grey = np.full((3, *size), 100, np.uint8)
    sheet = panels([[(words, grey)]], gap=4, text=20)
    assert sheet.shape == (3, size[0] + 32 + 8, size[1] + 8)
    np.testing.assert_array_equal(sheet[:, 36:-4, 4:-4], grey)
    ink = (sheet[:, 4:36, 4:-4] != np.array(pictures.BACKGROUND)[:, None, None]).any(0)
    assert ink.any() and not (sheet[:, :4] != np.array(pictures.BACKGROUND)[:, None, None]).any()


def test_inset_enlarges_a_part_in_the_corner():
    picture = RNG.integers(0, 200, (3, 60, 80), np.uint8)
    drawn = add_inset(picture, (5, 6, 7, 8), 3)
    np.testing.assert_array_equal(drawn[:, -23:-2, -26:-2], enlarge(picture[:, 5:12, 6:14], 3))
    np.testing.assert_array_equal(drawn[:, 5:12, 6:14], picture[:, 5:12, 6:14])
    assert (drawn[:, 4, 5:15] == pictures.CAPTION[0]).all()  # the frame around the part


def test_panels_without_pictures():
    with pytest.raises(ValueError, match="at least one picture"):
        panels([[], []])


def test_enlarge_repeats_pixels():
    picture = RNG.integers(0, 255, (3, 4, 5), np.uint8)
    large = enlarge(picture, 3)
    assert large.shape == (3, 12, 15)
    np.testing.assert_array_equal(large[:, 1::3, 1::3], picture)


def test_error_map_brightens_with_the_error():
    truth = np.zeros((4, 1, 101), np.float32)
    fused = truth.copy()
    fused[:2, 0] = np.linspace(0, 40, 101)  # half of the bands are wrong
    drawn = error_map(fused, truth, limit=20).astype(float)
    luminance = np.tensordot([0.2126, 0.7152, 0.0722], drawn, axes=1)[0]
    assert luminance[0] == 0 and luminance[-1] > 230
    assert (np.diff(luminance) >= 0).all() and (np.diff(luminance[::4]) > 0).all()
    np.testing.assert_array_equal(drawn, error_map(-fused, truth, limit=20))
    clipped = error_map(fused, truth, limit=10)
    assert (clipped[:, :, 50:] == clipped[:, :, -1:]).all()


def test_error_map_draws_missing_pixels_grey_and_refuses_nonsense():
    fused = np.array([[[np.nan, 0.0]]])
    drawn = error_map(fused, np.zeros((1, 1, 2)), 1)
    assert tuple(drawn[:, 0, 0]) == pictures.INVALID and (drawn[:, 0, 1] == 0).all()
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
        error_map(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)), 1)
    with pytest.raises(ValueError, match="limit is 0"):
        error_map(np.zeros((1, 2, 2)), np.zeros((1, 2, 2)), 0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_write_png_is_lossless_and_leaves_nothing_else(tmp_path, count):
    picture = RNG.integers(0, 255, (count, 17, 23), np.uint8)
    path = tmp_path / "look.png"
    path.write_text("an older file is replaced")
    write_png(path, picture)
    np.testing.assert_array_equal(read_png(path), picture)
    assert [p.name for p in tmp_path.iterdir()] == ["look.png"]


def test_write_png_fails_without_traces(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        write_png(tmp_path / "a.png", np.zeros((3, 4, 4)))

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(pictures.os, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_png(tmp_path / "a.png", np.zeros((3, 4, 4), np.uint8))
    assert list(tmp_path.iterdir()) == []


def write_raster(path: Path, values: np.ndarray, nodata: float | None, **creation) -> None:
    count, height, width = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=values.dtype,
        nodata=nodata,
        crs="EPSG:32631",
        transform=from_origin(5e5, 5e6, 0.5, 0.5),
        **creation,
    ) as raster:
        raster.write(values)
        raster.descriptions = ("blue", "green", "red", "nir")[:count]
        raster.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (count - 1)


def test_preview_is_decimated_with_nodata_transparent(tmp_path):
    values = RNG.integers(200, 900, (4, 120, 200)).astype(np.uint16)
    values[2, :, 100:] += 1000  # the eastern half is red
    values[:, :40] = 0
    write_raster(tmp_path / "scene.tif", values, nodata=0)
    assert preview_png(tmp_path / "scene.tif", tmp_path / "p.png", max_size=50) == (30, 50)
    drawn = read_png(tmp_path / "p.png")
    assert drawn.shape == (4, 30, 50)
    assert (drawn[3, :10] == 0).all() and (drawn[3, 10:] == 255).all()
    assert drawn[0, 10:, 25:].min() > drawn[0, 10:, :25].max()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "scene.tif"]


def test_preview_of_a_small_full_raster_keeps_size_and_has_no_alpha(tmp_path):
    values = RNG.uniform(0, 1, (1, 30, 20)).astype(np.float32)
    write_raster(tmp_path / "pan.tif", values, nodata=None)
    assert preview_png(tmp_path / "pan.tif", tmp_path / "p.png") == (30, 20)
    drawn = read_png(tmp_path / "p.png")
    assert drawn.shape == (3, 30, 20)
    np.testing.assert_array_equal(drawn[0], drawn[2])
    np.testing.assert_array_equal(drawn, stretch_from(values).apply(values))


def test_preview_of_nan_and_of_a_raster_without_any_data(tmp_path):
    values = np.full((3, 8, 8), np.nan, np.float32)
    write_raster(tmp_path / "empty.tif", values, nodata=float("nan"))
    preview_png(tmp_path / "empty.tif", tmp_path / "p.png")
    assert (read_png(tmp_path / "p.png")[3] == 0).all()
