"""The output: metadata, rounding, nodata, and never half a file."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasters import plain_grid as grid
from rasters import plain_meta as meta
from rasters import write_rows

from uknowpan.tiling import (
    Encoding,
    OutputError,
    OutputExists,
    OutputOptions,
    SceneWriter,
    check_output,
    encode,
    open_pair,
    output_encoding,
    uncertainty_meta,
)
from uknowpan.tiling.errors import InvalidResult

RED, GREEN, BLUE = ColorInterp.red, ColorInterp.green, ColorInterp.blue


def image(bands=4, height=70, width=50, seed=0):
    return np.random.default_rng(seed).uniform(1, 250, (bands, height, width)).astype(np.float32)


def write(path, values, its_meta, options=None, tags=None, valid=None, its_grid=None, step=13):
    its_grid = its_grid or grid(values.shape[1], values.shape[2])
    valid = np.ones(values.shape[1:], bool) if valid is None else valid
    invalid = not valid.all()
    with SceneWriter(str(path), its_grid, its_meta, options, tags, may_have_invalid=invalid) as out:
        for row in range(0, values.shape[1], step):
            write_rows(out, row, values[:, row : row + step], valid[row : row + step])
    return path


def leftovers(folder: Path, *expected: str) -> list[str]:
    return sorted(set(os.listdir(folder)) - set(expected))


@pytest.mark.parametrize("cog", [False, True], ids=["gtiff", "cog"])
@pytest.mark.parametrize(
    ("dtype", "colours"),
    [
        ("uint16", (RED, GREEN, BLUE, ColorInterp.undefined)),
        ("uint8", (ColorInterp.gray, *[ColorInterp.undefined] * 3)),
        ("uint8", (BLUE, GREEN, RED, ColorInterp.undefined)),
        ("int16", (ColorInterp.gray, *[ColorInterp.undefined] * 3)),
        ("float32", (BLUE, GREEN, RED, ColorInterp.undefined)),
    ],
)
def test_every_metadata_item_comes_through(tmp_path, dtype, colours, cog):
    path = tmp_path / "out.tif"
    kept = {"SENSOR": "X <1>", "TIFFTAG_IMAGEDESCRIPTION": "scene"}
    its_meta = meta(
        dtype=dtype,
        nodata=7.0,
        descriptions=("blue", None, "rouge é", "nir"),
        colorinterp=colours,
        scales=(0.0001, 0.0002, 1.0, 2.0),
        offsets=(-0.1, 0.0, 0.0, 3.0),
        units=("W/m2/sr/um", None, "1", "DN"),
        band_tags=({"WAVELENGTH": "485", "STATISTICS_MEAN": "3"}, {}, {"STATISTICS_MAXIMUM": "9"}, {"a b": "c=d"}),
        tags={**kept, "TIFFTAG_XRESOLUTION": "1", "AREA_OR_POINT": "Area"},
    )
    values = image()
    tags = {"UKNOWPAN_SEED": "3"}
    options = OutputOptions(format="cog" if cog else "gtiff")
    write(path, values, its_meta, options, tags, its_grid=grid(area_or_point="Point"))
    assert leftovers(tmp_path) == ["out.tif"]  # one file, no side-cars
    with rasterio.open(path) as out:
        assert (out.crs, out.transform) == (grid().crs, grid().transform)
        assert out.shape == (70, 50) and set(out.dtypes) == {dtype}
        assert set(out.nodatavals) == {7.0}
        assert out.descriptions == its_meta.descriptions
        assert out.colorinterp == colours
        assert out.scales == its_meta.scales and out.offsets == its_meta.offsets
        assert tuple(u or None for u in out.units) == its_meta.units
        assert out.tags(1)["WAVELENGTH"] == "485" and out.tags(4)["a b"] == "c=d"
        assert not any("STATISTICS" in key for band in out.indexes for key in out.tags(band))
        tags = {k: v for k, v in out.tags().items() if k != "OVR_RESAMPLING_ALG"}
        assert tags == {**kept, "AREA_OR_POINT": "Point", "UKNOWPAN_SEED": "3"}
        structure = out.tags(ns="IMAGE_STRUCTURE")
        assert structure["COMPRESSION"] == "DEFLATE"
        assert (structure.get("LAYOUT") == "COG") == cog
        whole = values if dtype == "float32" else np.rint(values)
        whole = np.where(whole == 7, 8, whole)
        np.testing.assert_array_equal(out.read(), whole.astype(dtype))


def test_metadata_from_a_pair_to_the_output(make_pair, tmp_path):
    files = make_pair(dtype="int16", nodata=-9999, descriptions=("b", "g", "r", "n"), tags={"ID": "42"})
    path = tmp_path / "out.tif"
    with open_pair(files.pan, files.ms) as pair:
        tile = pair.read_frame(0, 0, *pair.frame_shape)
        writer = SceneWriter(
            str(path), pair.grid, pair.meta, inputs=pair.inputs,
            may_have_invalid=pair.may_have_invalid,
        )  # fmt: skip
        with writer:
            row, values = pair.to_output(0, np.repeat(tile.pan, 4, axis=0))
            write_rows(writer, row, values, pair.to_output(0, tile.valid)[1])
        with pytest.raises(OutputError, match="one of the inputs"):
            SceneWriter(files.ms[0], pair.grid, pair.meta, OutputOptions(overwrite=True), inputs=pair.inputs)
    with rasterio.open(path) as out, rasterio.open(files.pan) as pan:
        assert out.transform == pan.transform and out.crs == pan.crs and out.shape == pan.shape
        assert out.descriptions == ("b", "g", "r", "n") and out.tags()["ID"] == "42"
        assert out.nodata == -9999 and out.dtypes[0] == "int16"
        np.testing.assert_array_equal(out.read(3), files.pan_values)


@pytest.mark.parametrize(
    ("dtype", "nodata", "invalid", "expected"),
    [
        ("uint16", None, False, None),
        ("uint16", None, True, 0),
        ("int16", None, True, -32768),
        ("float32", None, True, np.nan),
        ("uint16", -9999, True, 0),
        ("uint16", -9999, False, None),
        ("uint8", 255, False, 255),
        ("float64", -1e300, True, -1e300),
    ],
)
def test_nodata_decision(dtype, nodata, invalid, expected):
    found = output_encoding(meta(dtype=dtype, nodata=nodata), may_have_invalid=invalid).nodata
    assert found == expected or (np.isnan(found) and np.isnan(expected))


def test_nodata_and_dtype_on_request():
    source = meta(dtype="uint16", nodata=0, nbits=11)
    assert output_encoding(source) == Encoding("uint16", 0, 0, 2047)
    assert output_encoding(source, dtype="uint8") == Encoding("uint8", 0, 0, 255)
    assert output_encoding(source, nodata=65535).nodata == 65535
    for wrong in ({"nodata": -1}, {"nodata": 0.5}, {"dtype": "complex64"}, {"dtype": "thing"}):
        with pytest.raises(OutputError):
            output_encoding(source, **wrong)


@given(
    st.sampled_from(["uint8", "uint16", "int16", "int32", "uint32", "float32", "float64"]),
    st.integers(0, 3),
    st.lists(
        st.floats(width=32) | st.sampled_from([0, 0.5, 1.5, 2.5, -9999, 254.6, 65535, 2**31]), min_size=1, max_size=12
    ),
)
def test_valid_pixels_never_get_nodata(dtype, which, values):
    kind = np.dtype(dtype)
    if kind.kind == "f":
        nodata = [0.0, -9999.0, float(np.finfo(np.float32).min), float("nan")][which]
    else:
        info = np.iinfo(kind)
        nodata = [info.min, info.max, 0, 1][which]
    encoding = output_encoding(meta(dtype=dtype, nodata=nodata))
    array = np.array(values, np.float32).reshape(1, 1, -1)
    valid = np.ones(array.shape[1:], bool)
    valid[0, ::3] = False
    if not np.isfinite(array[0][valid]).all():
        with pytest.raises(InvalidResult, match="no finite"):
            encode(array, valid, encoding)
    valid &= np.isfinite(array[0])
    out = encode(array, valid, encoding)
    assert out.dtype == kind
    is_nodata = np.isnan(out) if np.isnan(nodata) else out == kind.type(nodata)
    expected = ~valid
    np.testing.assert_array_equal(is_nodata[0], expected)
    if kind.kind != "f":
        exact = np.clip(np.rint(array.astype(float)), encoding.low, encoding.high)
        assert (np.abs(out.astype(float) - exact)[0][~expected] <= 1).all()


def test_rounding_is_half_to_even():
    array = np.array([0.5, 1.5, 2.5, -3.7, 300], np.float32).reshape(1, 1, -1)
    valid = np.ones((1, 5), bool)
    out = encode(array, valid, Encoding("uint8", None, 0, 255))
    assert out.ravel().tolist() == [0, 2, 2, 0, 255]


def test_gdal_agrees_that_valid_pixels_are_valid(tmp_path):
    """Kind: its comparison with float nodata has a tolerance, and it reads -9.2e18 as -9."""
    kinds = [("float32", -9999.0), ("float32", 1e-7), ("float32", 0.0), ("float32", np.inf)]
    for i, (dtype, nodata) in enumerate([*kinds, ("int64", None), ("int64", -(2.0**63))]):
        values = np.full((1, 20, 20), nodata if nodata in (-9999.0, 1e-7, 0.0) else -9, np.float32)
        valid = np.arange(400).reshape(20, 20) % 3 > 0
        path = write(tmp_path / f"{i}.tif", values, meta(1, dtype, nodata), valid=valid)
        with rasterio.open(path) as out:
            np.testing.assert_array_equal(out.read_masks(1) > 0, valid)


@pytest.mark.parametrize("options", [
    OutputOptions(creation={"COMPRESS": "ZSTD", "predictor": "1"}),
    OutputOptions(creation={"TILED": "NO"}),
    OutputOptions(creation={"BLOCKXSIZE": "256", "BLOCKYSIZE": "128", "INTERLEAVE": "BAND"}),
    OutputOptions(creation={"COMPRESS": "NONE"}, num_threads=2),
    OutputOptions(overviews=True),
    OutputOptions(format="cog", creation={"COMPRESS": "LZW", "BLOCKSIZE": "256"}),
])  # fmt: skip
@pytest.mark.parametrize("step", [64, 700])
def test_layouts(tmp_path, options, step):
    values = np.rint(image(2, 700, 610))
    path = write(tmp_path / "o.tif", values, meta(2), options, step=step)
    assert leftovers(tmp_path) == ["o.tif"]
    with rasterio.open(path) as out:
        np.testing.assert_array_equal(out.read(), values)
        structure = out.tags(ns="IMAGE_STRUCTURE")
        wanted = options.creation.get("COMPRESS", "DEFLATE")
        assert structure.get("COMPRESSION", "NONE") == wanted
        if "BLOCKYSIZE" in options.creation:
            assert out.block_shapes[0] == (128, 256)
        if options.overviews:
            assert out.overviews(1) == [2, 4]
            with rasterio.open(path, overview_level=0) as small:
                means = values[0].reshape(350, 2, 305, 2).mean(axis=(1, 3))
                assert np.abs(small.read(1) - means).max() <= 0.5


def test_blocks_are_written_once(tmp_path):
    """Strips that do not fit the blocks must not be compressed twice."""
    values = np.rint(image(2, 1100, 600))
    odd = write(tmp_path / "odd.tif", values, meta(2), step=37).stat().st_size
    whole = write(tmp_path / "whole.tif", values, meta(2), step=1100).stat().st_size
    assert odd == whole


def test_lossy_compression_is_allowed(tmp_path):
    values = np.full((3, 64, 64), 90, np.float32)
    options = OutputOptions(creation={"COMPRESS": "JPEG"})
    path = write(tmp_path / "o.tif", values, meta(3, "uint8"), options)
    with rasterio.open(path) as out:
        assert np.abs(out.read() - 90.0).max() <= 2


def test_uncertainty_meta(tmp_path):
    source = meta(2, "uint16", 0, descriptions=("red", None), scales=(0.1, 1.0), offsets=(5.0, 0.0), nbits=11)
    its_meta = uncertainty_meta(source)
    valid = np.ones((70, 50), bool)
    valid[3] = False
    path = write(tmp_path / "u.tif", image(2), its_meta, valid=valid)
    with rasterio.open(path) as out:
        assert out.descriptions == ("red 1-sigma", "band 2 1-sigma")
        assert out.scales == (0.1, 1.0) and out.offsets == (0.0, 0.0)
        assert np.isnan(out.read(1)[3]).all() and np.isfinite(out.read(2)[4:]).all()


def test_refused_outputs(tmp_path):
    kept = tmp_path / "kept.tif"
    kept.write_text("precious")
    with pytest.raises(OutputExists, match="--overwrite"):
        SceneWriter(str(kept), grid(), meta())
    assert kept.read_text() == "precious"
    link = tmp_path / "link.tif"
    link.symlink_to(kept)
    with pytest.raises(OutputError, match="one of the inputs"):
        check_output(str(link), [str(kept)], overwrite=True)
    for path, match in [
        (tmp_path / "none" / "o.tif", "does not exist"),
        (tmp_path, "is a folder"),
        ("/vsimem/o.tif", "no local file"),
    ]:
        with pytest.raises(OutputError, match=match):
            check_output(str(path))
    with pytest.raises(OutputError, match="gtiff or cog"):
        SceneWriter(str(tmp_path / "o.tif"), grid(), meta(), OutputOptions(format="png"))
    with pytest.raises(OutputError, match="cannot be written"):
        bad = OutputOptions(creation={"COMPRESS": "JPEG"})
        write(tmp_path / "o.tif", image(), meta(dtype="float32"), bad)
    assert leftovers(tmp_path) == ["kept.tif", "link.tif"]


@pytest.mark.parametrize("fmt", ["gtiff", "cog"])
def test_overwriting_replaces_file_and_side_cars(tmp_path, fmt):
    """Overviews and mask of the old file would be shown over the new one."""
    path = tmp_path / "o.tif"
    path.write_text("old")
    for end in ("aux.xml", "msk", "msk.ovr", "ovr"):
        (tmp_path / f"o.tif.{end}").write_text("old")
    (tmp_path / "o.tif.txt").write_text("notes")
    write(path, image(), meta(), OutputOptions(fmt, overwrite=True))
    assert leftovers(tmp_path) == ["o.tif", "o.tif.txt"]


@pytest.mark.parametrize("there", [True, False], ids=["file", "dangling"])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, there):
    store, here = tmp_path / "store", tmp_path / "here"
    store.mkdir()
    here.mkdir()
    target, link = store / "real.tif", here / "link.tif"
    link.symlink_to(target)
    if there:
        target.write_text("old")
    for old in (store / "real.tif.ovr", here / "link.tif.ovr"):
        old.write_text("old")
    values = np.rint(image())
    write(link, values, meta(), OutputOptions(overwrite=True))
    assert link.is_symlink() and not target.is_symlink()
    assert leftovers(here) == ["link.tif"] and leftovers(store) == ["real.tif"]
    with rasterio.open(target) as out:
        np.testing.assert_array_equal(out.read(), values)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        (OutputOptions(), 1),
        (OutputOptions(overviews=True), 1),
        (OutputOptions("cog"), 2),  # once before it is copied
    ],
)
def test_the_file_is_read_back_no_more_than_needed(tmp_path, monkeypatch, options, passes):
    verified = []
    verify = SceneWriter._verify

    def counted(writer, path, exactly):
        verified.append(path)
        verify(writer, path, exactly)

    monkeypatch.setattr(SceneWriter, "_verify", counted)
    write(tmp_path / "o.tif", image(2, 300, 280), meta(2), options)
    assert len(verified) == passes


@pytest.mark.parametrize("when", ["early", "late", "incomplete", "abort"])
@pytest.mark.parametrize("fmt", ["gtiff", "cog"])
def test_a_failed_run_leaves_nothing(tmp_path, when, fmt):
    path = tmp_path / "o.tif"
    values = image(4, 1200, 50)
    valid = np.ones((1200, 50), bool)
    options = OutputOptions(format=fmt)
    if when == "abort":
        out = SceneWriter(str(path), grid(1200), meta(), options)
        write_rows(out, 0, values, valid)
        out.abort()
        out.abort()
    else:
        with (
            pytest.raises(ValueError if when == "incomplete" else KeyboardInterrupt),
            SceneWriter(str(path), grid(1200), meta(), options) as out,
        ):
            n = {"early": 10, "late": 1200, "incomplete": 1100}[when]
            write_rows(out, 0, values[:, :n], valid[:n])
            if when != "incomplete":
                raise KeyboardInterrupt
    assert leftovers(tmp_path) == []


def test_rows_must_follow_each_other(tmp_path):
    with SceneWriter(str(tmp_path / "o.tif"), grid(8), meta(1)) as out:
        rows, valid = image(1, 4), np.ones((4, 50), bool)
        write_rows(out, 0, rows, valid)
        with pytest.raises(ValueError, match="row 5"):
            write_rows(out, 5, rows, valid)
        with pytest.raises(ValueError, match="float32"):
            out.write_encoded(4, rows)
        write_rows(out, 4, rows[:, :0], valid[:0])
        write_rows(out, 4, rows, valid)


def test_temporary_files_of_dead_runs_are_removed(tmp_path):
    writer = SceneWriter(str(tmp_path / "o.tif"), grid(), meta())
    (temp,) = leftovers(tmp_path)
    writer.abort()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    for pid in (dead, "1"):
        (tmp_path / temp.replace(f".{os.getpid()}.", f".{pid}.")).mkdir()
    write(tmp_path / "o.tif", image(), meta())
    assert leftovers(tmp_path) == [temp.replace(f".{os.getpid()}.", ".1."), "o.tif"]


DISK_FULL = """
import resource, signal, sys
import numpy as np
limit, fmt, path, kind = int(sys.argv[1]), *sys.argv[2:5]
sys.path.insert(0, sys.argv[5])
from rasters import plain_grid, plain_meta, write_rows
from uknowpan.tiling import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
values = np.random.default_rng(0).uniform(0, 4000, (1, 1100, 600)).astype("float32")
valid = np.ones((1100, 600), bool)
grid, meta = plain_grid(1100, 600), plain_meta(1)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    if kind == "strips":
        store = StripStore(path, {}, ["image"], 1)
        store.put(0, {"image": encode(values, valid, output_encoding(meta))})
    else:
        options = OutputOptions(format=fmt, overviews=kind == "overviews")
        with SceneWriter(path, grid, meta, options) as out:
            write_rows(out, 0, values, valid)
except OutputError as error:
    print(error)
    sys.exit(3)
"""


def full_disk(tmp_path, limit, fmt, kind):
    script = tmp_path.parent / "disk_full.py"
    script.write_text(DISK_FULL)
    path = tmp_path / "o.tif"
    command = [sys.executable, script, str(limit), fmt, path, kind, Path(__file__).parents[1]]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def complete_size(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full") / "out"
    folder.mkdir()
    assert full_disk(folder, 10**9, "gtiff", "plain").returncode == 0
    return (folder / "o.tif").stat().st_size


@pytest.mark.parametrize(
    ("fmt", "kind", "share", "extra"),
    # 1 byte short: GDAL notices only while closing, and keeps it to itself.
    [("gtiff", "plain", 0.3, 0), ("gtiff", "plain", 1, -1), ("gtiff", "overviews", 1, 2000),
     ("cog", "plain", 1, 60000), ("cog", "plain", 1, 15000)],
)  # fmt: skip
def test_full_disk(tmp_path, complete_size, fmt, kind, share, extra):
    """A disk that fills up: one sentence, also where GDAL names no error."""
    done = full_disk(tmp_path, int(complete_size * share) + extra, fmt, kind)
    assert done.returncode == 3, done.stderr
    assert "MiB are free" in done.stdout or "disk full" in done.stdout
    assert leftovers(tmp_path) == []


def test_full_disk_while_keeping_strips(tmp_path):
    done = full_disk(tmp_path, 50_000, "gtiff", "strips")
    assert done.returncode == 3, done.stderr
    assert "make room and resume" in done.stdout
    assert sorted(os.listdir(tmp_path / "o.tif.part")) == ["state.json"]
