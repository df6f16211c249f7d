"""A pixel is valid where the PAN and every asked band are: no other one, however the MS is placed and marked."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasters import ORIGIN, UTM, reproject_transform, write_raster

from uknowpan.tiling import open_pair
from uknowpan.tiling.assembly import assembled

SIZE, RATIO = 20, 4
LOWEST = float(np.finfo(np.float32).min)
OFFSETS = [(0.0, 0.0), (0.5, -0.5)]
"""Places of the MS, in PAN pixels: nested and resampled."""
HOLES = np.zeros((3, SIZE, SIZE), bool)
HOLES[0, 4:7, 4:7] = True
HOLES[1, 12, :] = True
HOLES[2, 9:11, 15:18] = True


def scene(folder, *, holes=HOLES, nodata=0.0, fill=None, dtype="uint16", declare=True, offset=(0.0, 0.0), alpha=None,
          mask=None, pan_holes=None, crs=UTM):  # fmt: skip
    """Paths of a PAN and an MS with holes (C, h, w) per band; `alpha` is the full value of an alpha band."""
    rng = np.random.default_rng(3)
    place = Affine.translation(*ORIGIN) @ Affine.scale(1, -1)
    pan = rng.integers(400, 900, (1, SIZE * RATIO, SIZE * RATIO)).astype("uint16")
    if pan_holes is not None:
        pan[0, pan_holes] = 0
    ms = rng.integers(100, 200, holes.shape).astype(dtype)
    ms[holes] = nodata if fill is None else fill
    ms_place = place @ Affine.translation(offset[1], offset[0]) @ Affine.scale(RATIO)
    if crs != UTM:
        ms_place = reproject_transform(ms_place, UTM, crs, RATIO)
    marks = {}
    if alpha is not None:
        ms = np.concatenate([ms, np.where(holes.any(axis=0), 0, alpha).astype(dtype)[None]])
        marks["colorinterp"] = [ColorInterp.gray, *[ColorInterp.undefined] * (len(ms) - 2), ColorInterp.alpha]
    if mask is not None:
        marks["mask"] = np.where(mask, 0, 255).astype("uint8")
    return (
        write_raster(folder / "pan.tif", pan, place, nodata=None if pan_holes is None else 0),
        write_raster(folder / "ms.tif", ms, ms_place, nodata=nodata if declare else None, crs=crs, **marks),
    )


def read(pan, ms, **options):
    with open_pair(pan, ms, **options) as pair:
        return pair.read_frame(0, 0, *pair.frame_shape)


def stacked(folder, ms, bands, nodata=()):
    """A VRT of bands with a dtype and a nodata each, where the MS lies."""
    names = {"uint8": "Byte", "uint16": "UInt16", "int16": "Int16", "int64": "Int64", "float32": "Float32"}
    with rasterio.open(ms) as dataset:
        place, crs = dataset.transform, dataset.crs.to_wkt()
    parts = ""
    for number, band in enumerate(bands, 1):
        path = write_raster(folder / f"b{number}.tif", band[None], place)
        fill = f"<NoDataValue>{nodata[number - 1]}</NoDataValue>" if nodata else ""
        parts += (
            f'<VRTRasterBand dataType="{names[band.dtype.name]}" band="{number}">{fill}<SimpleSource><SourceFilename>'
            f"{path}</SourceFilename><SourceBand>1</SourceBand></SimpleSource></VRTRasterBand>"
        )
    (folder / "stack.vrt").write_text(
        f'<VRTDataset rasterXSize="{SIZE}" rasterYSize="{SIZE}"><SRS>{crs}</SRS><GeoTransform>'
        f"{', '.join(map(str, place.to_gdal()))}</GeoTransform>{parts}</VRTDataset>"
    )
    return str(folder / "stack.vrt")


MARKS = {
    "nodata": {},
    "float nodata": {"dtype": "float32", "nodata": -9999.0},
    "float64 nodata": {"dtype": "float64", "nodata": -1e300},
    "infinite nodata": {"dtype": "float32", "nodata": np.inf},
    "undeclared NaN": {"dtype": "float32", "fill": np.nan, "declare": False},
    "NaN beside a nodata": {"dtype": "float32", "fill": np.nan, "nodata": -9999.0},
    "undeclared infinity": {"dtype": "float32", "fill": -np.inf, "declare": False},
    "undeclared lowest float": {"dtype": "float32", "fill": LOWEST, "declare": False},
    "float64 beyond float32": {"dtype": "float64", "fill": 1e300, "declare": False},
}
WHOLE = {
    "alpha 0 and 1": {"dtype": "uint8", "alpha": 1, "declare": False, "fill": 77},
    "alpha 255 of 16 bits": {"alpha": 255, "declare": False, "fill": 77},
    "alpha 1.0": {"dtype": "float32", "alpha": 1, "declare": False, "fill": 77},
    "mask beside a nodata": {"mask": HOLES.any(axis=0), "fill": 77, "nodata": 1.0},
}


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("marks", [*MARKS.values(), *WHOLE.values()], ids=[*MARKS, *WHOLE])
def test_a_hole_in_some_bands_is_a_hole(tmp_path, marks, offset):
    """Kind: a hole in some bands, or marked in an unusual way, passes for data where the MS is resampled."""
    tile = read(*scene(tmp_path, offset=offset, **marks))
    # The centres of the moved pixels lie in the source pixels of the same index.
    np.testing.assert_array_equal(tile.ms_valid[:SIZE, :SIZE][2:-2, 2:-2], ~HOLES.any(axis=0)[2:-2, 2:-2])
    assert tile.ms.min() >= 95 and tile.ms.max() <= 205  # cubic overshoot, but no fill value


@pytest.mark.parametrize("offset", OFFSETS)
def test_each_band_has_its_own_nodata(tmp_path, offset):
    """Kind: the nodata of the first band is taken for that of all bands."""
    fills = (0, 65535, 9999)
    pan, ms = scene(tmp_path, nodata=0, declare=False, offset=offset)
    with rasterio.open(ms) as dataset:
        values = dataset.read()
    for band, fill in enumerate(fills):
        values[band][HOLES[band]] = fill
    tile = read(pan, stacked(tmp_path, ms, values, fills))
    np.testing.assert_array_equal(tile.ms_valid[2:-2, 2:-2], ~HOLES.any(axis=0)[2:-2, 2:-2])
    assert tile.ms.min() >= 95 and tile.ms.max() <= 205


def test_nodata_of_64_bits(tmp_path):
    """Kind: NetCDF's fill of 64-bit integers comes rounded, and its pixels pass for data."""
    fill = 2 - 2**63
    pan, ms = scene(tmp_path, declare=False)
    with rasterio.open(ms) as dataset:
        values = np.where(HOLES, fill, dataset.read().astype("int64"))
    np.testing.assert_array_equal(read(pan, stacked(tmp_path, ms, values, [fill] * 3)).ms_valid, ~HOLES.any(axis=0))


@pytest.mark.parametrize("offset", OFFSETS)
def test_each_band_has_its_own_mask(tmp_path, offset):
    """Kind: masks of single bands count for nothing, or the first one for all bands."""
    pan, ms = scene(tmp_path, fill=77, declare=False, offset=offset)
    with rasterio.open(ms) as dataset:
        values, place = dataset.read(), dataset.transform
    masks = np.where(HOLES, 0, 255).astype("uint8")
    paths = [write_raster(tmp_path / f"{b}.tif", values[b : b + 1], place, mask=masks[b]) for b in range(3)]
    tile = read(pan, assembled("ms", [[(path, 1) for path in paths]]))
    np.testing.assert_array_equal(tile.ms_valid[2:-2, 2:-2], ~HOLES.any(axis=0)[2:-2, 2:-2])
    assert tile.ms.min() >= 95


@pytest.mark.parametrize("offset", OFFSETS)
def test_every_alpha_band_counts(tmp_path, offset):
    """Kind: of two alpha bands the second one masks nothing."""
    pan, ms = scene(tmp_path, fill=77, declare=False, offset=offset)
    with rasterio.open(ms) as dataset:
        values, place = dataset.read(), dataset.transform
    alphas = np.where([HOLES[0], HOLES[1:].any(axis=0)], 0, 65535).astype("uint16")
    colours = [ColorInterp.gray, ColorInterp.undefined, ColorInterp.undefined, ColorInterp.alpha, ColorInterp.alpha]
    path = write_raster(tmp_path / "a.tif", np.concatenate([values, alphas]), place, colorinterp=colours)
    tile = read(pan, path)
    np.testing.assert_array_equal(tile.ms_valid[2:-2, 2:-2], ~HOLES.any(axis=0)[2:-2, 2:-2])
    assert tile.ms.min() >= 95


@pytest.mark.parametrize("offset", OFFSETS)
def test_only_asked_bands_count(tmp_path, offset):
    """Kind: a hole in a band that no one asked for."""
    tile = read(*scene(tmp_path, offset=offset), ms_bands=[3, 1])
    np.testing.assert_array_equal(tile.ms_valid[2:-2, 2:-2], ~(HOLES[0] | HOLES[2])[2:-2, 2:-2])


@pytest.mark.parametrize("offset", OFFSETS)
def test_valid_any_keeps_the_bands_that_are_there(tmp_path, offset):
    """Kind: one dead line in one band blanks all bands."""
    paths = scene(tmp_path, offset=offset)
    tile = read(*paths, valid="any")
    each = tile.band_valid[:, ::RATIO, ::RATIO]
    np.testing.assert_array_equal(each[:, 2:-2, 2:-2], ~HOLES[:, 2:-2, 2:-2])
    np.testing.assert_array_equal(tile.valid, tile.band_valid.any(axis=0))
    np.testing.assert_array_equal(tile.ms_valid, read(*paths).ms_valid)
    assert tile.ms.min() >= 95
    with open_pair(*paths, valid="any") as pair, open_pair(*paths) as strict:
        assert not pair.is_empty(12, 0, 1, SIZE) and strict.is_empty(12, 0, 1, SIZE)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("kinds", [("uint8", "uint16", "int16", "float32"), ("uint16", "uint8"), ("float32", "uint8")])
def test_bands_of_different_dtypes(tmp_path, kinds, offset):
    """Kind: bands are clipped to the range of the first one, or cannot be read at all."""
    pan, ms = scene(tmp_path, holes=np.zeros((len(kinds), SIZE, SIZE), bool), offset=offset)
    gains = {"uint8": 1, "uint16": 100, "int16": -50, "float32": 0.01}
    with rasterio.open(ms) as dataset:
        wanted = [
            (gains[kind] * values).astype(kind)
            for kind, values in zip(kinds, dataset.read().astype(float), strict=True)
        ]
    tile = read(pan, stacked(tmp_path, ms, wanted))
    inner = np.s_[2 : SIZE - 2, 2 : SIZE - 2]
    assert tile.ms_valid[inner].all()
    for got, want in zip(tile.ms, wanted, strict=True):
        if offset == (0.0, 0.0):
            np.testing.assert_array_equal(got, want)
        assert abs(got[inner].mean() / want[inner].mean() - 1) < 0.01
        assert np.abs(got[inner]).max() <= 1.2 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["warped", "memory", "overview"])
def test_open_datasets_without_a_file(tmp_path, kind):
    """Kind: an open dataset with holes that its name does not open again."""
    pan, ms = scene(tmp_path, offset=(0.5, -0.5))
    expected = read(pan, ms)
    with rasterio.open(ms) as source, MemoryFile() as memory:
        if kind == "warped":
            with WarpedVRT(source) as opened:
                tile = read(pan, opened)
        elif kind == "memory":
            with memory.open(**source.profile) as opened:
                opened.write(source.read())
            with memory.open() as opened:
                tile = read(pan, opened)
        else:
            with rasterio.open(tmp_path / "none.mem", "w+", **source.profile | {"driver": "MEM"}) as opened:
                opened.write(source.read())
                tile = read(pan, opened)
    np.testing.assert_array_equal(tile.ms, expected.ms)
    np.testing.assert_array_equal(tile.ms_valid, expected.ms_valid)


KERNEL = 2
"""MS pixels that a cubic kernel reaches."""


def near(flags, reach):
    """True where a flag (h, w) is within `reach` pixels."""
    wide = np.pad(flags, reach)
    views = [wide[r : r + flags.shape[0], c : c + flags.shape[1]] for r in range(2 * reach + 1)
             for c in range(2 * reach + 1)]  # fmt: skip
    return np.logical_or.reduce(views)


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_valid_is_where_pan_and_every_asked_band_are(tmp_path, data):
    """Kind: all of the above at random: to the pixel where the MS nests, within the kernel otherwise; never a fill."""
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**16), "seed"))
    dtype = draw(st.sampled_from(["uint8", "uint16", "int16", "int32", "float32", "float64"]), "dtype")
    floating = dtype.startswith("f")
    nodata = draw(st.sampled_from([0.0, 255.0, 50.0] + [np.nan, -9999.0, LOWEST] * floating), "nodata")
    fill = draw(st.sampled_from([None] + [np.nan, np.inf, LOWEST] * floating), "fill")
    alpha = draw(st.sampled_from([None, None, 1, 255 if floating else np.iinfo(dtype).max]), "alpha")
    offset = draw(st.sampled_from([(0.0, 0.0), (4.0, -8.0), (0.5, 0.25), (-1.5, 2.0)]), "offset")
    crs = draw(st.sampled_from([UTM, UTM, UTM, "EPSG:4326"]), "crs")
    mode = draw(st.sampled_from(["all", "any"]), "valid")
    bands = draw(st.sampled_from([[1, 2, 3], [2], [3, 1]]), "bands")
    share = draw(st.sampled_from([0.0, 0.02, 0.2, 1.0]), "share")
    holes = rng.random((3, SIZE, SIZE)) < share
    pan_holes = rng.random((SIZE * RATIO, SIZE * RATIO)) < draw(st.sampled_from([0.0, 0.01]), "PAN share")
    mask = rng.random((SIZE, SIZE)) < 0.05 if alpha is None and draw(st.booleans(), "mask") else None
    pan, ms = scene(
        tmp_path, holes=holes, nodata=nodata, fill=fill, dtype=dtype, offset=offset, alpha=alpha, mask=mask,
        pan_holes=pan_holes, crs=crs,
    )  # fmt: skip
    tile = read(pan, ms, ms_bands=bands, valid=mode)
    invalid = holes[np.array(bands) - 1]
    if alpha is not None:
        invalid = invalid | holes.any(axis=0)
    if mask is not None:
        invalid = invalid | mask
    if mode == "all":
        invalid = np.repeat(invalid.any(axis=0)[None], len(bands), 0)
    got = np.repeat(tile.valid[None], len(bands), 0) if mode == "all" else tile.band_valid
    assert np.isfinite(tile.ms).all() and np.isfinite(tile.pan).all()
    # A cubic kernel that lost much of its weight to holes overshoots; it does not reach a fill value.
    low, high = (60, 240) if share < 0.1 else (-3000, 3000)
    values = tile.ms[:, tile.ms_valid]
    assert values.min(initial=150) >= low and values.max(initial=150) <= high
    if crs != UTM:
        return
    for have, gone in zip(got, invalid, strict=True):
        nested = offset[0] % 1 == 0 and offset[1] % 1 == 0
        for row in range(2, SIZE * RATIO - 2, 3):
            for col in range(2, SIZE * RATIO - 2, 3):
                y, x = int((row + 0.5 - offset[0]) // RATIO), int((col + 0.5 - offset[1]) // RATIO)
                if not (KERNEL <= y < SIZE - KERNEL and KERNEL <= x < SIZE - KERNEL):
                    continue
                around = gone[y - 1 : y + 2, x - 1 : x + 2]
                if pan_holes[row, col] or (gone[y, x] if nested else around.all()):
                    assert not have[row, col]
                elif nested or not around.any():
                    assert have[row, col]
