"""Where the MS lies: across 180 degrees, without a place, on the PAN's own grid, or in the PAN itself."""

from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.warp import Resampling, reproject, transform
from rasters import UTM, textured, with_alpha, write_raster

from uknowpan.tiling import IncompatiblePair, open_pair
from uknowpan.tiling.enlarged import interpolated_by
from uknowpan.tiling.raster import Remarks, open_raster, select_bands

DEGREES = 1.5 / 111_320
"""A PAN pixel of 1.5 m at the equator."""


def ground(cols, rows):
    return (1000 + 300 * np.sin(cols / 9) + 200 * np.cos(rows / 11)).astype("float32")


def grid(size):
    """(cols, rows) of pixel centres."""
    rows, cols = np.mgrid[:size, :size] + 0.5
    return cols, rows


@pytest.mark.parametrize("turn", [-360, 0, 360])
@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:32601", "EPSG:32660"])
def test_an_ms_across_180_degrees(tmp_path: Path, crs: str, turn: int) -> None:
    """Kind: longitudes jump by 360 degrees inside the scene, and half of it is lost."""
    if crs == "EPSG:4326":
        step, (x, y) = DEGREES, (-180.0, 0.5)
    else:
        step, ((x,), (y,)) = 1.5, transform("EPSG:4326", crs, [-180.0], [0.5])
    pan_place = Affine.translation(x - 64 * step, y + 64 * step) @ Affine.scale(step, -step)
    pan = write_raster(tmp_path / "pan.tif", ground(*grid(128))[None], pan_place, crs=crs)
    place = Affine.translation(turn + 180 - 92 * DEGREES, 0.5 + 92 * DEGREES) @ Affine.scale(4 * DEGREES, -4 * DEGREES)
    cols, rows = grid(46)
    lon, lat = place @ (cols, rows)
    if crs == "EPSG:4326":
        lon = lon - 360 * np.round((lon + 180) / 360)
        xs, ys = lon, lat
    else:
        xs, ys = (np.reshape(v, cols.shape) for v in transform("EPSG:4326", crs, lon.ravel(), lat.ravel()))
    ms = write_raster(tmp_path / "ms.tif", ground(*(~pan_place @ (xs, ys)))[None], place, crs="EPSG:4326")
    with open_pair(pan, ms, ratio=4) as pair:
        tile = pair.read_frame(0, 0, *pair.frame_shape)
    assert tile.valid.all()
    cols, rows = grid(32)
    np.testing.assert_allclose(tile.ms[0], ground(4 * cols, 4 * rows), atol=2)


@pytest.mark.parametrize("mark", ["none", "nodata", "mask", "alpha"])
@pytest.mark.parametrize("crs", ["EPSG:4326", "off grid", "EPSG:32601"])
@pytest.mark.parametrize("west", [-180.0, 0.0])
def test_an_ms_around_the_globe(tmp_path: Path, crs: str, west: float, mark: str) -> None:
    """Kind: the edge of an MS around the globe cuts the scene, and half of it is lost."""
    height, step, middle = 24, 0.25, 180.0 if west else 0.0
    rows, cols = np.mgrid[:height, :1440]
    waves = [np.sin(2 * np.pi * cols / n + rows / 5) for n in (12, 480)]  # whole ones around the globe
    values = (500 + 300 * np.stack(waves)).astype("uint16")
    hole = np.zeros((height, 1440), bool)
    hole[10:12, [0, 1, -1]] = mark != "none"  # across the edge
    place = Affine.translation(west, 2 + height / 2 * step) @ Affine.scale(step, -step)
    marks: dict[str, object] = {}
    if mark == "nodata":
        values[:, hole], marks = 0, {"nodata": 0}
    elif mark == "mask":
        marks = {"mask": np.where(hole, 0, 255).astype("uint8")}
    elif mark == "alpha":
        values = with_alpha(values, np.where(hole, 0, 255))
        marks = {"colorinterp": [ColorInterp.gray, ColorInterp.undefined, ColorInterp.alpha]}
    ms = write_raster(tmp_path / "ms.tif", values, place, crs="EPSG:4326", **marks)
    name = crs if crs.startswith("EPSG:32") else "EPSG:4326"
    size, (x, y) = step / 4, (middle - 2, 4.0)
    if name != "EPSG:4326":
        name = name if west else "EPSG:32631"
        xs, ys = transform("EPSG:4326", name, [middle, middle], [4.0, 3.0])
        size, (x, y) = (ys[0] - ys[1]) * size, (xs[0] - 32 * (ys[0] - ys[1]) * size, ys[0])
        if not west:
            name, x = "EPSG:3395", -32 * size
    elif crs == "off grid":
        x += 0.1
    pan_place = Affine.translation(x, y) @ Affine.scale(size, -size)
    pan = write_raster(tmp_path / "pan.tif", np.full((1, 48, 64), 500, "uint16"), pan_place, crs=name)
    # The oracle: the same raster, wrapped by whole columns, through GDAL's own warp.
    wide = np.roll(values[:2], 720, 2)[:, :, 600:840].astype("float32")
    wide[:, np.roll(hole, 720, 1)[:, 600:840]] = np.nan
    wanted = np.full((2, 12, 16), np.nan, "float32")
    centred = Affine.translation(middle - 120 * step, place.f) @ Affine.scale(step, -step)
    source = "EPSG:4326" if name == "EPSG:4326" else f"+proj=longlat +datum=WGS84 +lon_wrap={middle}"
    reproject(
        wide, wanted, src_transform=centred, src_crs=source, src_nodata=np.nan, dst_nodata=np.nan,
        dst_transform=pan_place @ Affine.scale(4), dst_crs=name, resampling=Resampling.cubic,
    )  # fmt: skip
    with open_pair(pan, ms, ratio=4) as pair:
        assert pair.nested is (crs == "EPSG:4326")
        tile = pair.read_frame(0, 0, *pair.frame_shape)
    known = np.isfinite(wanted).all(0)
    assert tile.ms_valid.mean() == known.mean() == (1.0 if mark == "none" else known.mean()) > 0.9
    np.testing.assert_array_equal(tile.ms_valid, known)
    np.testing.assert_allclose(tile.ms[:, known], wanted[:, known], atol=2)  # positions of `reproject` are rounded


def test_a_pan_in_degrees_and_an_ms_in_metres(tmp_path: Path) -> None:
    """Kind: the same jump, in the CRS of the PAN."""
    place = Affine.translation(180 - 64 * DEGREES, 0.5) @ Affine.scale(DEGREES, -DEGREES)
    pan = write_raster(tmp_path / "pan.tif", ground(*grid(128))[None], place, crs="EPSG:4326")
    (x,), (y,) = transform("EPSG:4326", "EPSG:32601", [180.0], [0.5 - 64 * DEGREES])
    ms_place = Affine.translation(x - 150, y + 150) @ Affine.scale(6, -6)
    ms = write_raster(tmp_path / "ms.tif", ground(*grid(50))[None], ms_place, crs="EPSG:32601")
    with open_pair(pan, ms, ratio=4) as pair:
        assert pair.read_frame(0, 0, *pair.frame_shape).valid.all()


@pytest.mark.parametrize("both", [True, False])
def test_a_crs_alone_places_nothing(make_pair, both: bool) -> None:
    """Kind: a CRS without a transform counts as georeferenced."""
    files = make_pair()
    ms = write_raster(Path(files.ms[0]).with_name("lost.tif"), files.ms_values, Affine.identity(), crs=UTM)
    pan = files.pan
    if both:
        pan = write_raster(Path(pan).with_name("lost_pan.tif"), files.pan_values[None], Affine.identity(), crs=UTM)
        with open_pair(pan, ms) as pair:
            assert pair.ratio == 4 and pair.nested and "Neither raster is georeferenced" in pair.assumptions[0]
    else:
        with pytest.raises(IncompatiblePair, match="has no georeferencing"):
            open_pair(pan, ms)


@pytest.mark.parametrize("how", ["path", "link", "open", "band"])
def test_pan_and_ms_are_one_file(tmp_path: Path, how: str) -> None:
    """Kind: a scene is sharpened with itself."""
    values = np.random.default_rng(0).integers(1, 99, (3, 64, 64)).astype("uint16")
    path = write_raster(tmp_path / "a.tif", values[:1] if how != "band" else values, Affine.scale(2, -2))
    pan, ms = {"path": (path, path), "band": (f"{path},band=2", path)}.get(how, (path, str(tmp_path / "b.tif")))
    if how == "link":
        Path(ms).symlink_to(path)
    with open_raster(path) as opened, pytest.raises(IncompatiblePair, match="is given as PAN and as MS"):
        open_pair(opened if how == "open" else pan, opened if how == "open" else ms)
    if how == "band":
        with open_pair(pan, path, ms_bands=[1, 3], ratio=4) as pair:
            assert pair.bands == 2


def enlarged(tmp_path: Path, factor: float, kernel: Resampling, side: int = 480, crs: str = UTM) -> str:
    """A textured MS that was enlarged and lies on a PAN's grid."""
    ms, place = textured(256)[:1], Affine.translation(5e5, 5e6) @ Affine.scale(8, -8)
    image = np.zeros((1, side, side), "float32")
    fine = place @ Affine.translation(2, 2) @ Affine.scale(1 / factor)
    reproject(ms, image, src_transform=place, src_crs=crs, dst_transform=fine, dst_crs=crs, resampling=kernel)
    return write_raster(tmp_path / "ms.tif", image.round().astype("uint16"), fine)


def factor_of(path: str) -> int | None:
    with open_raster(path) as dataset:
        return interpolated_by(select_bands(dataset, path, [1], None, Remarks()))


@pytest.mark.parametrize("kernel", [Resampling.bilinear, Resampling.cubic, Resampling.lanczos])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_an_enlarged_ms_shows_its_ratio(tmp_path: Path, factor: int, kernel: Resampling) -> None:
    """Kind: the ratio of an MS on the PAN's grid is guessed."""
    assert factor_of(enlarged(tmp_path, factor, kernel)) == factor


def test_an_enlarged_ms_shows_a_broken_ratio(tmp_path: Path) -> None:
    """Kind: the same, where the factor is no whole number."""
    assert factor_of(enlarged(tmp_path, 4.3, Resampling.bilinear)) == 4


def test_an_ms_on_the_pan_grid(tmp_path: Path) -> None:
    """Kind: the ratio of an MS on the PAN's grid is guessed; where it cannot be measured, it must be given."""
    path = enlarged(tmp_path, 2, Resampling.cubic)
    with open_raster(path) as dataset:
        values, place = dataset.read(), dataset.transform
    pan = write_raster(tmp_path / "pan.tif", values, place)
    with open_pair(pan, path) as pair:
        assert pair.ratio == 2 and pair.assumptions == [note for note in pair.notes if "enlarged by 2" in note] != []
        assert any("average" in note for note in pair.notes)
        means = values.reshape(1, 240, 2, 240, 2).mean(axis=(2, 4))
        np.testing.assert_allclose(pair.read_frame(0, 0, 240, 240).ms, means, rtol=1e-5)
    plain = write_raster(tmp_path / "plain.tif", textured(480)[:1].astype("uint16"), place)
    with pytest.raises(IncompatiblePair, match=r"cannot be measured; give the ratio .*--ratio N"):
        open_pair(pan, plain)
    with open_pair(pan, plain, ratio=3) as pair:
        assert pair.ratio == 3


@pytest.mark.parametrize("place", [Affine(0, 1, 5, 0, 1, 5), Affine(np.nan, 0, 5, 0, -1, 5)])
def test_pixels_without_area(make_pair, place: Affine) -> None:
    """Kind: a damaged geotransform that cannot be inverted."""
    files = make_pair()
    with open_raster(files.pan) as dataset:
        values = dataset.read()
    pan = write_raster(Path(files.pan).with_name("flat.tif"), values, place)
    with pytest.raises(IncompatiblePair, match="no area"):
        open_pair(pan, files.ms)
