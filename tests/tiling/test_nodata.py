"""Invalid pixels are found in every form they come in, and never bleed into valid ones."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasters import gain

from uknowpan.tiling import FILL_REACH, open_pair, output_valid
from uknowpan.tiling.fill import fill_invalid, reflected_indices

HOLES = np.zeros((24, 20), bool)
HOLES[5:9, 7:12] = True
HOLES[15, 3] = True

KINDS = {
    "uint8 0": {"dtype": "uint8", "nodata": 0},
    "uint16 0": {"dtype": "uint16", "nodata": 0},
    "uint16 65535": {"dtype": "uint16", "nodata": 65535},
    "int16 -9999": {"dtype": "int16", "nodata": -9999},
    "float -3.4e38": {"dtype": "float32", "nodata": -3.3999999521443642e38},
    "float min": {"dtype": "float32", "nodata": -3.402823466e38},
    "float nan": {"dtype": "float32", "nodata": float("nan")},
    "float64": {"dtype": "float64", "nodata": -1e300},
    "mask": {"dtype": "uint16", "mask": "mask"},
    "alpha": {"dtype": "uint16", "mask": "alpha"},
    "float alpha": {"dtype": "float32", "mask": "alpha"},
}


@pytest.fixture(params=KINDS, ids=list(KINDS))
def kind(request):
    return dict(KINDS[request.param])


def test_native_holes(make_pair, kind):
    files = make_pair(holes=HOLES, **kind)
    with open_pair(files.pan, files.ms) as pair:
        assert pair.nested and pair.may_have_invalid
        assert pair.bands == len(files.ms_values)
        tile = pair.read_frame(0, 0, 24, 20)
    np.testing.assert_array_equal(tile.ms_valid, ~HOLES)
    np.testing.assert_array_equal(tile.valid, ~HOLES.repeat(4, 0).repeat(4, 1))
    np.testing.assert_array_equal(tile.ms[:, ~HOLES], files.ms_values[:, ~HOLES].astype(np.float32))
    # Filled from the neighbours: in the range of what surrounds the hole.
    ring = np.s_[:, 4:10, 6:13]
    around = files.ms_values[ring][:, ~HOLES[ring[1:]]]
    filled = tile.ms[:, 5:9, 7:12].reshape(len(around), -1)
    assert (filled.min(axis=1) >= around.min(axis=1)).all()
    assert (filled.max(axis=1) <= around.max(axis=1)).all()


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_the_largest_integer_as_nodata(make_pair, dtype):
    """Kind of fault: rasterio has no such number, so that holes became data."""
    files = make_pair(holes=HOLES, dtype=dtype, nodata=2**60)
    largest = np.iinfo(dtype).max
    with rasterio.open(files.ms[0], "r+") as dataset:
        dataset.write(np.where(HOLES, largest, dataset.read()))
    content, text = Path(files.ms[0]).read_bytes(), b"1.152921504606847e+18"
    assert content.count(text) == 1
    Path(files.ms[0]).write_bytes(content.replace(text, str(largest).encode().ljust(len(text), b"\0")))
    with open_pair(files.pan, files.ms) as pair:
        assert pair.may_have_invalid
        np.testing.assert_array_equal(pair.read_frame(0, 0, 24, 20).ms_valid, ~HOLES)


@pytest.mark.parametrize("offset", [(0, 0), (0.5, -0.5)])
def test_empty_windows_are_those_where_nothing_is_valid(make_pair, kind, offset):
    files = make_pair(holes=HOLES, **kind, offset=offset)
    counts = {True: 0, False: 0}
    with open_pair(files.pan, files.ms) as pair:
        for row in range(0, 24, 2):
            for col in range(0, 20, 2):
                empty = pair.is_empty(row, col, 2, 2)
                assert empty == (not pair.read_frame(row, col, 2, 2).valid.any())
                counts[empty] += 1
    assert counts[True] >= 2 and counts[False] > 100


@pytest.mark.parametrize("ms_crs", [None, "EPSG:3857"])
def test_resampled_holes_do_not_bleed(make_pair, kind, ms_crs):
    place = {"offset": (0.5, -0.5)} if ms_crs is None else {"ms_crs": ms_crs, "ms_shape": (24, 20)}
    holed = make_pair(holes=HOLES, **kind, **place)
    whole = make_pair(name="whole", dtype=kind["dtype"], **place)
    options = {"ratio": 4} if ms_crs else {}
    with open_pair(holed.pan, holed.ms, **options) as a, open_pair(whole.pan, whole.ms, **options) as b:
        assert not a.nested
        x, y = (p.read_frame(0, 0, *p.frame_shape) for p in (a, b))
    lost = y.ms_valid & ~x.ms_valid
    # The holes are there, and hardly larger than they were.
    assert 0.7 * HOLES.sum() <= lost.sum() <= 2.2 * HOLES.sum()
    # What stayed valid shows the landscape, not a mixture with nodata.
    difference = np.abs(x.ms - y.ms)[:, x.ms_valid & y.ms_valid]
    assert difference.max() < (12 if kind["dtype"] == "uint8" else 60)
    assert np.isfinite(x.ms).all()


@pytest.mark.parametrize(
    ("dtype", "nodata", "marks"),
    [("float32", None, {(1, 3, 4): np.nan, (0, 8, 8): np.inf, (2, 20, 0): -np.inf}), ("uint16", 0, {(2, 5, 6): 0})],
)
def test_one_invalid_band_makes_the_pixel_invalid(make_pair, dtype, nodata, marks):
    """NaN and infinity need no declaration."""
    files = make_pair(dtype=dtype, nodata=nodata)
    with rasterio.open(files.ms[0], "r+") as dataset:
        values = dataset.read()
        for place, value in marks.items():
            values[place] = value
        dataset.write(values)
    with open_pair(files.pan, files.ms) as pair:
        assert pair.may_have_invalid and pair.meta.nodata == nodata
        tile = pair.read_frame(0, 0, 24, 20)
    assert sorted(zip(*np.nonzero(~tile.ms_valid), strict=True)) == sorted(place[1:] for place in marks)
    assert np.isfinite(tile.ms).all()


def test_nodata_given_by_the_user(make_pair):
    files = make_pair(holes=HOLES, nodata=0, dtype="uint16")
    with open_pair(files.pan, files.ms, nodata=12345) as pair:
        assert pair.meta.nodata == 12345
        assert pair.read_frame(0, 0, 24, 20).ms_valid.all()
    hidden = make_pair(name="hidden", holes=HOLES, nodata=0)
    for path in hidden.ms:
        with rasterio.open(path, "r+") as dataset:
            dataset.nodata = None
    with open_pair(hidden.pan, hidden.ms) as pair:
        assert pair.read_frame(0, 0, 24, 20).ms_valid.all()
    with open_pair(hidden.pan, hidden.ms, nodata=0) as pair:
        np.testing.assert_array_equal(pair.read_frame(0, 0, 24, 20).ms_valid, ~HOLES)


def test_nodata_that_no_pixel_can_hold_is_no_nodata(make_pair):
    files = make_pair(dtype="float32")
    with open_pair(files.pan, files.ms) as pair:
        assert pair.meta.nodata is None
    narrow = make_pair(name="narrow", dtype="uint16")
    with open_pair(narrow.pan, narrow.ms, nodata=-9999) as pair:
        assert pair.meta.nodata is None and pair.read_frame(0, 0, 24, 20).valid.all()


def test_nodata_that_fits_one_file_only(make_pair):
    """The other file keeps its own."""
    pan_holes = np.zeros((96, 80), bool)
    pan_holes[33:50, 20:31] = True
    files = make_pair(pan_dtype="uint8", pan_nodata=0, pan_holes=pan_holes, nodata=65535, holes=HOLES)
    with rasterio.open(files.ms[0], "r+") as dataset:
        dataset.nodata = None
    with open_pair(files.pan, files.ms, nodata=65535) as pair:
        tile = pair.read_frame(0, 0, 24, 20)
        assert pair.pan_meta.nodata == 0 and pair.meta.nodata == 65535
        assert any("65535 does not fit" in note and "its own, 0," in note for note in pair.notes)
    np.testing.assert_array_equal(tile.pan_valid, ~pan_holes)
    np.testing.assert_array_equal(tile.ms_valid, ~HOLES)
    narrow = make_pair(name="narrow", dtype="uint8", pan_dtype="uint16", nodata=0, holes=HOLES)
    with open_pair(narrow.pan, narrow.ms, nodata=65535) as pair:
        assert pair.pan_meta.nodata == 65535 and pair.meta.nodata == 0
        np.testing.assert_array_equal(pair.read_frame(0, 0, 24, 20).ms_valid, ~HOLES)


def test_pan_holes(make_pair):
    pan_holes = np.zeros((96, 80), bool)
    pan_holes[33:50, 20:31] = True
    files = make_pair(pan_nodata=0, pan_holes=pan_holes)
    with open_pair(files.pan, files.ms) as pair:
        tile = pair.read_frame(0, 0, 24, 20)
        assert pair.meta.nodata is None and pair.pan_meta.nodata == 0
    np.testing.assert_array_equal(tile.pan_valid, ~pan_holes)
    np.testing.assert_array_equal(tile.valid, ~pan_holes)
    assert tile.ms_valid.all() and tile.pan.min() > 500


@pytest.mark.parametrize("offset", [(0, 0), (0.5, 0.5)])
def test_image_band_marked_alpha_is_data(make_pair, offset):
    """GDAL marks the fourth of four bands alpha by itself when they are 8-bit."""
    files = make_pair(dtype="uint8", offset=offset)
    with rasterio.open(files.ms[0]) as dataset:
        assert dataset.colorinterp[3] == ColorInterp.alpha
    inner = np.s_[2:-2, 2:-2]
    with open_pair(files.pan, files.ms) as default, open_pair(files.pan, files.ms, ms_bands=[1, 2, 3, 4]) as named:
        assert any("holds an image" in note for note in default.assumptions)
        assert set(default.assumptions) <= set(default.notes)
        assert not any("is marked alpha" in note for note in named.notes)
        for pair in (default, named):
            assert pair.bands == 4 and ColorInterp.alpha not in pair.meta.colorinterp
            tile = pair.read_frame(0, 0, *pair.frame_shape)
            assert tile.ms_valid[inner].all()
            np.testing.assert_allclose(tile.ms[3][inner] / gain(3), tile.ms[0][inner] / gain(0), atol=1.5)


def test_alpha_is_data_if_named(make_pair):
    files = make_pair(mask="alpha", holes=HOLES)
    with open_pair(files.pan, files.ms) as pair:
        assert pair.bands == 4 and any("masks the others" in note for note in pair.notes)
        assert pair.assumptions == []
    with open_pair(files.pan, files.ms, ms_bands=[1, 5]) as pair:
        tile = pair.read_frame(0, 0, 24, 20)
        assert tile.ms_valid.all()
        np.testing.assert_array_equal(tile.ms[1] == 0, HOLES)


def test_everything_invalid(make_pair):
    files = make_pair(holes=np.ones((24, 20), bool), nodata=0)
    with open_pair(files.pan, files.ms) as pair:
        tile = pair.read_frame(0, 0, 24, 20, 3)
        assert not tile.valid.any() and not tile.ms_valid.any() and np.isfinite(tile.ms).all()
        assert pair.valid_fraction(0, 0, 24, 20) == 0


def test_fill_reach_and_constant():
    values = np.full((1, 1, 30), 7, np.float32)
    valid = np.zeros((1, 30), bool)
    valid[0, :3] = True
    filled = fill_invalid(values, valid, FILL_REACH, np.array([100], np.float32))
    expected = np.where(np.arange(30) < 3 + FILL_REACH, 7, 100)
    np.testing.assert_array_equal(filled[0, 0], expected)


def test_reflected_indices_are_those_of_numpy():
    for size in (1, 2, 5):
        padded = np.pad(np.arange(size), 13, mode="symmetric")
        indices, inside = reflected_indices(-13, size + 26, size)
        np.testing.assert_array_equal(indices, padded)
        assert np.flatnonzero(inside).tolist() == list(range(13, 13 + size))


def test_output_valid_is_pan_and_ms():
    pan = np.ones((4, 6), bool)
    pan[3, 5] = False
    ms = np.array([[True, False, True], [True, True, True]])
    expected = np.array([[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [1] * 6, [1, 1, 1, 1, 1, 0]])
    np.testing.assert_array_equal(output_valid(pan, ms, 2), expected.astype(bool))
