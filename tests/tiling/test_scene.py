"""Geometry: wherever the MS comes from, its pixels lie over the right PAN pixels."""

import os
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT
from rasters import ORIGIN, centres, gain, ground, write_raster
from scipy.ndimage import binary_erosion

from uknowpan.tiling import IncompatiblePair, InputUnreadable, open_pair, parse_band_spec, sample_windows
from uknowpan.tiling.raster import Source

PLACE = Affine(0.5, 0, ORIGIN[0], 0, -0.5, ORIGIN[1])
EDGE = 30
"""DN: less than one PAN pixel at the steepest slope of the landscape (34 per pixel)"""


def whole(pair, margin=0):
    return pair.read_frame(0, 0, *pair.frame_shape, margin)


def assert_aligned(pair, tolerance, res=0.5, edge=None):
    """Each valid MS pixel equals the landscape at the centre of its ratio x ratio PAN pixels.

    edge: tolerance for the two outermost valid pixels, where GDAL's kernels are cut off.
    """
    tile = whole(pair)
    corner = pair.grid.transform @ Affine.translation(-pair.offset[1], -pair.offset[0])
    expected = ground(*centres(corner @ Affine.scale(pair.ratio), pair.frame_shape), res)
    assert tile.ms_valid.mean() > 0.25
    inner = binary_erosion(tile.ms_valid, np.ones((3, 3)), 2)
    for band, values in enumerate(tile.ms):
        difference = np.abs(values / gain(band) - expected)
        assert difference[inner].max() < tolerance
        assert difference[tile.ms_valid].max() < (edge or tolerance)
    # And the PAN, on its own pixels.
    assert np.abs(tile.pan[0] - ground(*centres(corner, tile.pan.shape[1:]), res))[tile.pan_valid].max() < 0.51


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 8])
def test_nested_ratios(make_pair, ratio):
    files = make_pair(ratio=ratio, ms_shape=(12, 10))
    with open_pair(files.pan, files.ms, ratio=ratio) as pair:
        assert (pair.ratio, pair.nested, pair.offset) == (ratio, True, (0, 0))
        assert pair.frame_shape == (12, 10) and pair.notes == []
        tile = whole(pair)
        np.testing.assert_array_equal(tile.ms, files.ms_values)
        np.testing.assert_array_equal(tile.pan[0], files.pan_values)
        assert tile.valid.all() and not pair.may_have_invalid
        assert tile.pan.dtype == tile.ms.dtype == np.float32
        assert_aligned(pair, 0.51)


@pytest.mark.parametrize("offset", [(1, 3), (-2, -5), (4, -8), (-40, -36)])
def test_whole_pixel_offsets_are_read_as_they_are(make_pair, offset):
    files = make_pair(offset=offset, pan_shape=(96, 83))
    with open_pair(files.pan, files.ms) as pair:
        assert pair.nested
        assert pair.offset == (-offset[0] % 4, -offset[1] % 4)
        assert pair.frame_shape == (-(-(96 + pair.offset[0]) // 4), -(-(83 + pair.offset[1]) // 4))
        assert_aligned(pair, 0.51)
        # The native MS pixels, not resampled ones.
        row, col = (offset[0] + pair.offset[0]) // 4, (offset[1] + pair.offset[1]) // 4
        tile = pair.read_frame(row, col, *files.ms_values.shape[1:])
        assert tile.ms_valid.all()
        np.testing.assert_array_equal(tile.ms, files.ms_values)


@pytest.mark.parametrize(
    ("ratio", "offset", "rotation"),
    [(4, (0.5, 0.5), 0), (2, (-0.5, -0.5), 0), (4, (1.5, -2.25), 0), (4.02, (0, 0), 0), (3.9, (-3, -2), 0),
     (4, (0.5, 0.5), 20)],
)  # fmt: skip
def test_what_does_not_nest_is_resampled(make_pair, ratio, offset, rotation):
    files = make_pair(ratio=ratio, offset=offset, rotation=rotation, dtype="float32")
    with open_pair(files.pan, files.ms) as pair:
        assert not pair.nested and pair.offset == (0, 0)
        assert "cubic" in pair.notes[0] and pair.assumptions == []
        assert_aligned(pair, 3.0, edge=EDGE)


@pytest.mark.parametrize("ms_crs", ["EPSG:32630", "EPSG:3857", "EPSG:4326"])
def test_another_crs(make_pair, ms_crs):
    files = make_pair(ms_crs=ms_crs, dtype="float32", ms_shape=(40, 40), pan_shape=(100, 100))
    with open_pair(files.pan, files.ms, ratio=4) as pair:
        assert not pair.nested and ms_crs in pair.notes[0]
        assert_aligned(pair, 4.0, edge=EDGE)


def test_holes_at_the_rim_of_another_crs_are_announced(make_pair):
    """Integers without nodata: the header is written before the first hole is met."""
    files = make_pair(ms_crs="EPSG:32632", ms_shape=(24, 20))
    with open_pair(files.pan, files.ms, ratio=4) as pair:
        assert pair.may_have_invalid and not pair.to_output(0, whole(pair).valid)[1].all()


def test_same_rotation_nests_another_is_refused(make_pair):
    files = make_pair(rotation=20)
    with open_pair(files.pan, files.ms) as pair:
        assert pair.nested
        assert_aligned(pair, 0.51)
    straight = make_pair(name="straight")
    with pytest.raises(IncompatiblePair, match="rotated"):
        open_pair(straight.pan, files.ms)


def test_south_up_ms(make_pair, tmp_path):
    files = make_pair(dtype="float32")
    with rasterio.open(files.ms[0]) as dataset:
        place = dataset.transform @ Affine.translation(0, dataset.height) @ Affine.scale(1, -1)
    flipped = write_raster(tmp_path / "flipped.tif", files.ms_values[:, ::-1], place)
    with open_pair(files.pan, [flipped]) as pair:
        assert_aligned(pair, 1.0)


def test_no_georeferencing_at_all(make_pair):
    files = make_pair(georeferenced=(False, False))
    with open_pair(files.pan, files.ms) as pair:
        assert pair.ratio == 4 and pair.nested and "same corner" in pair.notes[0]
        assert pair.assumptions == pair.notes
        assert pair.grid.crs is None and pair.grid.transform.is_identity
        np.testing.assert_array_equal(whole(pair).ms, files.ms_values)
    odd = make_pair(georeferenced=(False, False), pan_shape=(96, 81), name="odd")
    with pytest.raises(IncompatiblePair, match="81 x 96"):
        open_pair(odd.pan, odd.ms)


@pytest.mark.parametrize("which", [(True, False), (False, True)])
def test_one_without_georeferencing_is_refused(make_pair, which):
    files = make_pair(georeferenced=which)
    with pytest.raises(IncompatiblePair, match="no georeferencing"):
        open_pair(files.pan, files.ms)


def test_missing_crs_is_assumed(make_pair, tmp_path):
    files = make_pair(dtype="float32", offset=(0.5, 0.5))
    with rasterio.open(files.ms[0]) as dataset:
        place = dataset.transform
    bare = write_raster(tmp_path / "bare.tif", files.ms_values, place, crs=None)
    with open_pair(files.pan, [bare]) as pair:
        # That it is resampled is no guess.
        assert len(pair.notes) == 2 and pair.assumptions == pair.notes[:1]
        assert "no CRS" in pair.assumptions[0]
        assert_aligned(pair, 3.0, edge=EDGE)
    bare_pan = write_raster(tmp_path / "bare_pan.tif", files.pan_values[None], PLACE, crs=None)
    with open_pair(bare_pan, [bare]) as pair:
        assert pair.grid.crs is None
        assert "names a CRS" in pair.assumptions[0] and len(pair.assumptions) == 1
        assert_aligned(pair, 3.0, edge=EDGE)


def test_separate_files_equal_one_file(make_pair):
    one = make_pair(dtype="int16")
    many = make_pair(dtype="int16", separate=True, name="many")
    with open_pair(one.pan, one.ms) as a, open_pair(many.pan, many.ms) as b:
        np.testing.assert_array_equal(a.read_frame(3, 2, 9, 8, 5).ms, b.read_frame(3, 2, 9, 8, 5).ms)
        assert b.meta.descriptions == ("many_ms1", "many_ms2", "many_ms3", "many_ms4")
        assert b.inputs == [many.pan, *many.ms]


def test_separate_files_on_grids_of_their_own(make_pair):
    """Ratio 4 and ratio 2 bands, one of them off by half a pixel, on one frame."""
    fine = make_pair(name="fine", ratio=2, ms_shape=(48, 40), dtype="float32", bands=1)
    off = make_pair(name="off", offset=(1, 2.5), dtype="float32", bands=1)
    base = make_pair(name="base", dtype="float32", bands=1)
    with open_pair(base.pan, [*base.ms, *off.ms, *fine.ms]) as pair:
        assert pair.ratio == 4 and pair.bands == 3
        tile = whole(pair)
        inner = binary_erosion(tile.ms_valid, np.ones((3, 3)), 2)
        for band in (1, 2):
            assert np.abs(tile.ms[band] - tile.ms[0])[inner].max() < 3
        assert tile.ms_valid.mean() > 0.8


def test_band_specs(make_pair, tmp_path):
    assert parse_band_spec("a.tif,band=2") == ("a.tif", 2)
    assert parse_band_spec("a,b.tif") == ("a,b.tif", None)
    odd = tmp_path / "x,band=3"
    odd.write_bytes(b"")
    assert parse_band_spec(str(odd)) == (str(odd), None)
    with pytest.raises(IncompatiblePair, match="number from 1"):
        parse_band_spec("a.tif,band=x")

    files = make_pair()
    ms = files.ms[0]
    with open_pair(files.pan, [f"{ms},band=3", f"{ms},band=1"]) as pair:
        np.testing.assert_array_equal(whole(pair).ms, files.ms_values[[2, 0]])
    with open_pair(files.pan, [ms], ms_bands=[4, 2, 2]) as pair:
        np.testing.assert_array_equal(whole(pair).ms, files.ms_values[[3, 1, 1]])
    with pytest.raises(IncompatiblePair, match="no band 9; it has bands 1 to 4"):
        open_pair(files.pan, [f"{ms},band=9"])
    with pytest.raises(IncompatiblePair, match="band 5 does not exist; there are bands 1 to 4"):
        open_pair(files.pan, [ms], ms_bands=[5])


@pytest.mark.parametrize("kind", ["path", "dataset", "memory", "mixed"])
def test_a_raster_is_a_path_or_an_open_dataset(make_pair, kind):
    """Datasets of the caller stay open, those in memory too; one MS file needs no list."""
    files = make_pair(offset=(0.5, 0.5) if kind == "memory" else (0, 0), dtype="uint8")
    with ExitStack() as stack, open_pair(files.pan, files.ms) as expected:
        if kind == "path":
            pan, ms = Path(files.pan), Path(files.ms[0])
        elif kind == "dataset":
            pan, ms = (stack.enter_context(rasterio.open(path)) for path in (files.pan, files.ms[0]))
        elif kind == "memory":
            memory = [stack.enter_context(MemoryFile(Path(path).read_bytes())) for path in (files.pan, files.ms[0])]
            pan, ms = (stack.enter_context(file.open()) for file in memory)
        else:
            pan, ms = files.pan, (f"{files.ms[0]},band={b}" for b in (1, 2, 3))
            ms = [*ms, stack.enter_context(WarpedVRT(stack.enter_context(rasterio.open(files.ms[0]))))]
        options = {"ms_bands": [1, 2, 3, 7]} if kind == "mixed" else {}
        with open_pair(pan, ms, **options) as pair:
            tile, wanted = (p.read_frame(0, 0, *p.frame_shape, 2) for p in (pair, expected))
            assert pair.bands == 4 and pair.nested == expected.nested
            for name in ("pan", "ms", "valid"):
                np.testing.assert_array_equal(getattr(tile, name), getattr(wanted, name))
        if kind in ("dataset", "memory"):
            assert not pan.closed and not ms.closed and pan.read().any()
            assert pair.inputs == [pan.name, ms.name]
    for wrong in (5, files.pan.encode(), None):
        with pytest.raises(IncompatiblePair, match="a path or an open rasterio dataset"):
            open_pair(files.pan, wrong)


def test_pan_band_is_asked_for(make_pair, tmp_path):
    files = make_pair()
    both = write_raster(tmp_path / "both.tif", np.stack([files.pan_values // 2, files.pan_values]), PLACE)
    with pytest.raises(IncompatiblePair, match="band=N"):
        open_pair(both, files.ms)
    with open_pair(f"{both},band=2", files.ms) as a, open_pair(both, files.ms, pan_band=2) as b:
        for pair in (a, b):
            np.testing.assert_array_equal(whole(pair).pan[0], files.pan_values)


@pytest.mark.parametrize("offset", [(0, 0), (-3, 2), (0.4, -1.3)])
@pytest.mark.parametrize("box", [(13, 9, 51, 62), (0, 0, 96, 80), (60, 70, 61, 71)])
def test_bounds_show_the_full_scene(make_pair, offset, box):
    top, left, bottom, right = box
    files = make_pair(offset=offset, ms_shape=(30, 26), pan_shape=(96, 80), noise=50,
                      dtype="float32")  # fmt: skip
    bounds = (*(PLACE @ (left + 0.2, bottom - 0.2)), *(PLACE @ (right - 0.2, top + 0.2)))
    with open_pair(files.pan, files.ms) as full, open_pair(files.pan, files.ms, bounds=bounds) as part:
        assert (part.grid.height, part.grid.width) == (bottom - top, right - left)
        assert part.grid.transform @ (0, 0) == full.grid.transform @ (left, top)
        assert part.origin[0] % 12 == 0 and part.origin[1] % 12 == 0
        assert part.full_shape == full.full_shape
        margin = 7
        a = whole(part, margin)
        b = full.read_frame(*part.origin, *part.frame_shape, margin)
        for name in ("pan", "ms", "pan_valid", "ms_valid", "valid"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        m = margin * part.ratio
        row, pan = part.to_output(0, a.pan[:, m:-m, m:-m])
        assert row == 0
        np.testing.assert_array_equal(pan[0], files.pan_values[top:bottom, left:right])
        # Statistics are taken at the same places of the scene.
        assert [part.frame.in_scene(window) for window in sample_windows(part, 4, 8)] == sample_windows(full, 4, 8)


@pytest.mark.parametrize("bounds", [(0, 0, 1, 1), (1, 1, 1, 2), (5, 5, 0, 0)])
def test_bounds_without_pixels(make_pair, bounds):
    files = make_pair()
    with pytest.raises(IncompatiblePair, match="Bounds"):
        open_pair(files.pan, files.ms, bounds=bounds)


@pytest.mark.parametrize("case", ["nested", "warped", "holes"])
def test_a_pixel_does_not_depend_on_the_tile(make_pair, case):
    """Reflection beyond edges and filling of holes are functions of position only."""
    holes = np.zeros((23, 18), bool)
    if case == "holes":
        holes[5:19, 3:15] = True
        holes[0, :4] = holes[20:, 17] = True
    files = make_pair(
        ms_shape=(23, 18), noise=50, nodata=0, holes=holes, pan_nodata=0,
        pan_holes=holes.repeat(4, 0).repeat(4, 1) if case == "holes" else None,
        offset=(0.3, -0.6) if case == "warped" else (-2, 3), pan_shape=(92, 72),
    )  # fmt: skip
    with open_pair(files.pan, files.ms) as pair:
        big = pair.read_frame(-30, -25, 90, 75)
        assert np.isfinite(big.ms).all() and np.isfinite(big.pan).all()
        for row, col, h, w, margin in [
            (0, 0, 5, 6, 0), (-20, -20, 9, 7, 2), (7, 6, 4, 4, 0), (6, 2, 3, 5, 9),
            (21, 15, 8, 8, 3),
        ]:  # fmt: skip
            tile = pair.read_frame(row, col, h, w, margin)
            top, left = row - margin + 30, col - margin + 25
            ms = np.s_[..., top : top + h + 2 * margin, left : left + w + 2 * margin]
            pan = np.s_[..., 4 * top : 4 * (top + h + 2 * margin), 4 * left : 4 * (left + w + 2 * margin)]
            np.testing.assert_array_equal(tile.ms, big.ms[ms])
            np.testing.assert_array_equal(tile.ms_valid, big.ms_valid[ms])
            np.testing.assert_array_equal(tile.pan, big.pan[pan])
            np.testing.assert_array_equal(tile.pan_valid, big.pan_valid[pan])
            np.testing.assert_array_equal(tile.valid, big.valid[pan])


def test_reflection_repeats_in_tiny_scenes(make_pair):
    files = make_pair(ms_shape=(3, 2), bands=1)
    with open_pair(files.pan, files.ms) as pair:
        tile = pair.read_frame(0, 0, 3, 2, margin=8)
    np.testing.assert_array_equal(tile.ms[0], np.pad(files.ms_values[0], 8, mode="symmetric"))
    np.testing.assert_array_equal(tile.pan[0], np.pad(files.pan_values, 32, mode="symmetric"))
    assert tile.ms_valid.sum() == 6 and tile.pan_valid.sum() == 96


@pytest.mark.parametrize(
    ("offset", "shape", "left_out"),
    # Whole PAN pixels of the first/last rows that get no value: more than half an MS pixel away.
    [((1, 0), (24, 20), (0, 0)), ((2, 0), (24, 20), (0, 0)), ((3, 0), (24, 20), (1, 0)),
     ((0, 0), (23, 20), (0, 2)), ((0.5, 0), (24, 20), (0, 0)), ((2.5, 0), (24, 20), (0, 0)),
     ((-2.5, 0), (24, 20), (0, 0)), ((-2.6, 0), (24, 20), (0, 1))],
)  # fmt: skip
def test_edges_are_extrapolated_by_half_an_ms_pixel(make_pair, offset, shape, left_out):
    files = make_pair(offset=offset, ms_shape=shape, pan_shape=(96, 80))
    with open_pair(files.pan, files.ms) as pair:
        tile = whole(pair)
        _, valid = pair.to_output(0, tile.valid)
        good = np.flatnonzero(valid.all(axis=1))
        assert (good[0], 95 - good[-1]) == left_out
        assert good.size == 96 - sum(left_out)
        assert pair.may_have_invalid == (left_out != (0, 0))


def test_partial_overlap(make_pair):
    files = make_pair(offset=(40, -20))
    with open_pair(files.pan, files.ms) as pair:
        _, valid = pair.to_output(0, whole(pair).valid)
        assert pair.may_have_invalid
        # Covered: rows 40 to 96 and columns 0 to 60, and 2 more on open sides.
        assert valid[38:, :62].all() and valid.sum() == 58 * 62


REFUSALS = {
    "swapped": lambda f: {"pan": f"{f.ms[0]},band=1", "ms": [f.pan]},
    "is outside": lambda f: {"ratio": 9},
    "unknown": lambda f: {"resampling": "magic"},
    "No MS": lambda f: {"ms": []},
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refused_arguments(make_pair, words):
    files = make_pair()
    with pytest.raises(IncompatiblePair, match=words):
        open_pair(**{"pan": files.pan, "ms": files.ms, **REFUSALS[words](files)})


def test_refused_places(make_pair):
    files = make_pair()
    far = make_pair(name="far", offset=(1000, 0))
    with pytest.raises(IncompatiblePair, match=r"do not overlap.*4999500"):
        open_pair(files.pan, far.ms)
    elsewhere = make_pair(name="utm30", ms_crs="EPSG:32630", offset=(9000, 0))
    with pytest.raises(IncompatiblePair, match=r"do not overlap.*EPSG:32630"):
        open_pair(files.pan, elsewhere.ms)


GCPS = [rasterio.control.GroundControlPoint(r, c, ORIGIN[0] + c, ORIGIN[1] - r) for r, c in [(0, 0), (0, 19), (19, 0)]]
RPCS = rasterio.rpc.RPC(
    height_off=0, height_scale=1, lat_off=45, lat_scale=1, long_off=3, long_scale=1, line_off=10, line_scale=10,
    samp_off=10, samp_scale=10, line_num_coeff=[1.0] * 20, line_den_coeff=[1.0] * 20, samp_num_coeff=[1.0] * 20,
    samp_den_coeff=[1.0] * 20,
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "dtype", "scale", "extra"),
    [
        ("4 x 2 PAN pixels", "uint8", (2, 4), {}),
        ("20 x 20", "uint8", (20, 20), {}),
        ("complex", "complex64", (4, 4), {}),
        ("gdalwarp -tps", "uint8", None, {"gcps": GCPS}),
        ("gdalwarp -rpc", "uint8", None, {"rpcs": RPCS}),
    ],
)
def test_refused_ms(make_pair, tmp_path, words, dtype, scale, extra):
    place = PLACE @ Affine.scale(*scale) if scale else None
    odd = write_raster(tmp_path / "odd.tif", np.ones((1, 20, 20), dtype), place, **extra)
    with pytest.raises(IncompatiblePair, match=words) as caught:
        open_pair(make_pair().pan, odd)
    assert str(caught.value).endswith((".", "?"))


def test_files_that_are_no_rasters(make_pair, tmp_path):
    files, text = make_pair(), tmp_path / "text.tif"
    text.write_text("hello")
    for pan, ms in [(files.pan, tmp_path / "none.tif"), (text, files.ms)]:
        with pytest.raises(InputUnreadable, match="cannot be opened"):
            open_pair(pan, ms)


def test_truncated_file_is_named(make_pair):
    files = make_pair(ms_shape=(200, 200))
    os.truncate(files.ms[0], os.path.getsize(files.ms[0]) // 2)
    with pytest.raises(InputUnreadable, match=r"scene_ms\.tif"), open_pair(files.pan, files.ms) as pair:
        pair.read_frame(0, 0, 200, 200)


def test_truncated_file_with_a_band_marked_alpha(make_pair):
    """A failed look at that band leaves an error in GDAL, which any later call may raise."""
    files = make_pair(ms_shape=(200, 200), dtype="uint8")
    os.truncate(files.ms[0], os.path.getsize(files.ms[0]) // 3)
    with pytest.raises(InputUnreadable, match=r"scene_ms\.tif cannot be read"):
        open_pair(files.pan, files.ms)


def test_closing_waits_for_a_read(make_pair, monkeypatch):
    files = make_pair()
    pair = open_pair(files.pan, files.ms)
    reading, go_on, tiles, closed = threading.Event(), threading.Event(), [], []
    read = Source.read

    def slow(source, *window):
        reading.set()
        assert go_on.wait(10)
        return read(source, *window)

    def let_it_read():
        closed.append(pair.pan_source.raster.dataset.closed)
        go_on.set()

    monkeypatch.setattr(Source, "read", slow)
    reader = threading.Thread(target=lambda: tiles.append(whole(pair)))
    reader.start()
    assert reading.wait(10)
    threading.Timer(0.2, let_it_read).start()
    pair.close()
    reader.join(10)
    assert closed == [False]
    np.testing.assert_array_equal(tiles[0].ms, files.ms_values)
    with pytest.raises(InputUnreadable, match="closed"):
        whole(pair)


def test_sample_windows(make_pair):
    holes = np.ones((60, 60), bool)
    holes[40:, 40:] = False
    files = make_pair(ms_shape=(60, 60), nodata=0, holes=holes, bands=1)
    with open_pair(files.pan, files.ms) as pair:
        windows = sample_windows(pair, 9, 12)
        assert windows and all(pair.valid_fraction(*w) >= 0.5 for w in windows)
        assert windows == sample_windows(pair, 9, 12)
        assert np.isclose(pair.fill_values[1], files.ms_values[0][40:, 40:].mean(), rtol=0.1)
    plain = make_pair(ms_shape=(60, 60), bands=1, name="plain")
    with open_pair(plain.pan, plain.ms) as pair:
        windows = sample_windows(pair, 7, 10)
        assert len(windows) == 7
        # Spread: every third of the scene is looked at.
        assert {r // 20 for r, *_ in windows} == {c // 20 for _, c, *_ in windows} == {0, 1, 2}
        # A window larger than the scene is the scene.
        assert sample_windows(pair, 7, 100) == [(0, 0, 60, 60)]


def test_identity_follows_inputs(make_pair):
    files = make_pair()
    with open_pair(files.pan, files.ms) as a, open_pair(files.pan, files.ms) as b:
        assert a.identity() == b.identity()
    narrow = make_pair(name="narrow", dtype="uint8", pan_dtype="uint16")
    with open_pair(narrow.pan, narrow.ms) as plain, open_pair(narrow.pan, narrow.ms, nodata=4000) as given:
        assert plain.meta.nodata is given.meta.nodata is None
        assert plain.identity() != given.identity()  # the PAN's holes differ
    with rasterio.open(files.ms[0], "r+") as dataset:
        dataset.update_tags(x="y")
    with open_pair(files.pan, files.ms) as d:
        assert d.identity() != a.identity()


@pytest.mark.parametrize("repeats", [2, 3])
def test_ms_enlarged_by_repetition_is_averaged_back(tmp_path, repeats):
    rng = np.random.default_rng(3)
    small = rng.integers(100, 900, (2, 40, 44)).astype(np.uint16)
    big = small.repeat(repeats, axis=1).repeat(repeats, axis=2)
    pan = rng.integers(100, 900, (1, 80 * repeats, 88 * repeats)).astype(np.uint16)
    corner = Affine(2.0, 0, ORIGIN[0], 0, -2.0, ORIGIN[1])
    ms_path = write_raster(tmp_path / "ms.tif", big, corner)
    pan_path = write_raster(tmp_path / "pan.tif", pan, corner @ Affine.scale(0.5))
    with open_pair(pan_path, [ms_path]) as pair:
        assert pair.ratio == 2 * repeats
        assert any(f"repeating every pixel {repeats} times" in note for note in pair.assumptions)
        assert set(pair.assumptions) < set(pair.notes)
        np.testing.assert_allclose(pair.read_frame(0, 0, 40, 44).ms, small, atol=1e-3)
    with open_pair(pan_path, [ms_path], ratio=2) as pair:
        assert pair.ratio == 2 and pair.nested


def test_files_in_strips_want_a_row_of_tiles_cached(make_pair):
    files = make_pair()
    with open_pair(files.pan, files.ms) as pair:
        pan, ms = rasterio.open(files.pan), rasterio.open(files.ms[0])
        assert pan.block_shapes[0][1] == pan.width
        expected = (10 * 4 + 2 * pan.block_shapes[0][0]) * pan.width * 2
        expected += (10 + 2 * ms.block_shapes[0][0]) * ms.width * ms.count * 2
        assert pair.bytes_across(10) == expected
    for path in (files.pan, files.ms[0]):
        with rasterio.open(path) as old:
            profile, values = old.profile, old.read()
        profile.update(tiled=True, blockxsize=16, blockysize=16)
        with rasterio.open(path, "w", **profile) as new:
            new.write(values)
    with open_pair(files.pan, files.ms) as pair:
        assert pair.bytes_across(10) == 0
