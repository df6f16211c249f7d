"""`import uknowpan`: files and arrays in, files and arrays out, without a command line."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from running import MakePair, Run

import uknowpan
from uknowpan.options import SharpenOptions

# Drawn noise and small arrays show no shift that means something; its warning would fill the run's summary.
pytestmark = pytest.mark.filterwarnings("ignore::uknowpan.UknowpanWarning")

ALONE = """
import sys, time
began = time.monotonic()
sys.modules["typer"] = None
import uknowpan
assert time.monotonic() - began < {limit} and not {{"torch", "rasterio", "rich"}} & set(sys.modules)
report = uknowpan.sharpen({pan!r}, {ms!r}, {out!r}, method="gsa", overwrite=True)
model = uknowpan.load("generic", device="cpu")
with uknowpan.open_pair({pan!r}, {ms!r}) as pair:
    print(uknowpan.survey(pair).shift)
try:
    uknowpan.sharpen("nowhere.tif", {ms!r}, {out!r}, model=model)
except uknowpan.Error as error:
    print(error.exit_code)
"""


def read(path: Path | str) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read()


def test_without_typer(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    code = ALONE.format(pan=pair.pan, ms=pair.ms[0], out=str(tmp_path / "out.tif"), limit=2.0)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "3" and done.stderr == ""
    assert read(tmp_path / "out.tif").shape == (4, 96, 80)


def test_files_of_all_kinds(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """Text, paths and open datasets, one MS or a list, give the pixels of the command line."""
    import uknowpan as api

    pair, cut = make_pair(), make_pair(name="cut", separate=True)
    common = {"model": api.load(tiny_model), "tile": 64}
    report = api.sharpen(pair.pan, pair.ms[0], tmp_path / "a.tif", uncertainty=tmp_path / "sigma.tif", **common)
    assert (report.width, report.method, report.uncertainty) == (80, "tiny", str(tmp_path / "sigma.tif"))
    api.sharpen(Path(pair.pan), [Path(ms) for ms in cut.ms], str(tmp_path / "b.tif"), **common)
    with rasterio.open(pair.pan) as pan, rasterio.open(pair.ms[0]) as ms:
        api.sharpen(pan, ms, tmp_path / "c.tif", **common)
        assert not pan.closed
    command = ("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "d.tif", "--model", tiny_model, "--tile", 64)
    assert uknowpan(*command).code == 0
    for name in "bcd":
        assert read(tmp_path / f"{name}.tif").tobytes() == read(tmp_path / "a.tif").tobytes()


def test_warnings_are_python_warnings(
    make_pair: MakePair, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("uknowpan"), "handlers", [])  # of commands that ran here
    pair = make_pair(georeferenced=(False, False))
    with pytest.warns(uknowpan.UknowpanWarning, match="Neither raster is georeferenced") as caught:
        uknowpan.sharpen(pair.pan, pair.ms, tmp_path / "out.tif", method="gsa")
    assert [w.filename for w in caught if w.category is uknowpan.UknowpanWarning] == [__file__]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "code", "text"),
    [
        ({"tile": 4}, 2, "--tile must be a whole number of at least 16, not 4"),
        ({"tile": "512"}, 2, "--tile must be a whole number"),
        ({"format": "bmp"}, 2, "--format takes gtiff or cog, not 'bmp'"),
        ({"method": "magic"}, 2, "--method takes bicubic, brovey, gsa, mtf-glp or awlp"),
        ({"method": "gsa", "model": "generic"}, 2, "--method and --model exclude each other"),
        ({"bands": 3}, 2, "There is no option 'bands'; the options are bidx, "),
        ({"softness": 2}, 2, "--softness is ms or a number from 0.2 to 1, not 2"),
        ({"bounds": (1, 2, 3)}, 2, "--bounds takes 4 numbers"),
        ({"bidx": 3}, 2, "--bidx takes numbers"),
        ({"creation": {"QUALITI": "9"}}, 2, "QUALITI"),
        ({"max_value": -1.0}, 2, "--max-value must be above 0"),
        ({"model": 7}, 2, "model is a name, a file or the result of uknowpan.load, not int"),
        ({"model": "nowhere"}, 5, "no model 'nowhere'"),
        ({"device": "tpu"}, 2, "--device takes auto"),
    ],
)
def test_bad_options(options: dict[str, object], code: int, text: str, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    with pytest.raises(uknowpan.Error) as failure:
        uknowpan.sharpen(pair.pan, pair.ms, tmp_path / "out.tif", **options)
    assert failure.value.exit_code == code
    assert text in str(failure.value) and "\n" not in str(failure.value)
    assert not (tmp_path / "out.tif").exists()


def test_options_are_declared_once() -> None:
    wanted = SharpenOptions(bidx=[3, 1], bounds="0,1,2,3", creation=["A=1,B=2"], bit_depth=11, softness="0.5")
    assert (wanted.bidx, wanted.bounds, wanted.softness) == ((3, 1), (0.0, 1.0, 2.0, 3.0), 0.5)
    assert (wanted.creation, wanted.max_value, wanted.bit_depth) == ({"A": "1", "B": "2"}, 2047.0, None)


def test_options_of_other_types() -> None:
    """Kind: a number of NumPy's is refused, or ends in JSON's TypeError, and text for a number in NumPy's."""
    wanted = SharpenOptions(ratio=np.int64(4), max_value=np.float32(9), nodata=np.uint16(0))
    assert [(type(v), v) for v in (wanted.ratio, wanted.max_value, wanted.nodata)] == [(int, 4), (float, 9), (int, 0)]
    with pytest.raises(uknowpan.Error, match="--nodata must be a number, not 'x'"):
        SharpenOptions(nodata="x")
    assert SharpenOptions(coverage="90").coverage == 90
    with pytest.raises(uknowpan.Error, match="--coverage takes 68 or 90, not 95"):
        SharpenOptions(coverage=95)


@pytest.fixture
def arrays(make_pair: MakePair) -> tuple[np.ndarray, np.ndarray]:
    pair = make_pair(noise=30)
    return pair.pan_values, pair.ms_values


def test_arrays_take_the_road_of_files(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair, model = make_pair(noise=30), uknowpan.load(tiny_model)
    sigma = tmp_path / "sigma.tif"
    uknowpan.sharpen(pair.pan, pair.ms, tmp_path / "out.tif", model=model, tile=48, uncertainty=sigma)
    hrms, spread = uknowpan.sharpen_array(pair.pan_values, pair.ms_values, model=model, tile=48, uncertainty=True)
    assert hrms.dtype == np.uint16 and type(hrms) is np.ndarray
    np.testing.assert_array_equal(hrms, read(tmp_path / "out.tif"))
    np.testing.assert_array_equal(spread, read(sigma))


@pytest.mark.parametrize("dtype", ["uint8", "int16", ">u2", "int64", "float16", "float32", "float64", ">f8"])
def test_dtypes(dtype: str, arrays: tuple[np.ndarray, np.ndarray]) -> None:
    pan, ms = (values / 16 for values in arrays)
    plain = uknowpan.sharpen_array(np.rint(pan), np.rint(ms), method="gsa")
    pan, ms = (np.rint(values).astype(dtype) for values in (pan, ms))
    hrms = uknowpan.sharpen_array(pan[None], ms, method="gsa")
    assert (hrms.dtype, hrms.shape) == (np.dtype(dtype), (4, 96, 80))
    tolerance = 0.5 if np.dtype(dtype).kind in "iu" else 1e-3 * plain.max()
    assert np.abs(hrms.astype(float) - plain).max() <= tolerance


def test_tensors_and_data_arrays(arrays: tuple[np.ndarray, np.ndarray]) -> None:
    xarray = pytest.importorskip("xarray")
    pan, ms = (values.astype("float32") for values in arrays)
    wanted = uknowpan.sharpen_array(pan, ms, method="gsa")
    tensor = uknowpan.sharpen_array(torch.from_numpy(pan), torch.from_numpy(ms), method="gsa")
    assert isinstance(tensor, torch.Tensor) and (tensor.numpy() == wanted).all()
    half = uknowpan.sharpen_array(torch.from_numpy(pan).bfloat16(), torch.from_numpy(ms).bfloat16(), method="gsa")
    assert half.dtype == torch.bfloat16
    y, x = np.arange(96) * -0.5, np.arange(80) * 0.5
    bands = ["b", "g", "r", "n"]
    image = uknowpan.sharpen_array(
        xarray.DataArray(pan[None], dims=("band", "y", "x"), coords={"band": [1], "y": y, "x": x}),
        xarray.DataArray(ms, dims=("band", "y", "x"), coords={"band": bands}, name="ms", attrs={"units": "DN"}),
        method="gsa",
    )
    assert (image.values == wanted).all() and image.dims == ("band", "y", "x")
    assert (image.y == y).all() and (image.x == x).all() and list(image.band.values) == bands
    assert (image.name, image.attrs) == ("ms", {"units": "DN"})


def test_marks_of_invalid_pixels(arrays: tuple[np.ndarray, np.ndarray], tiny_model: Path) -> None:
    """NaN, nodata and masks of the same pixels give the same bits, and come back as they came."""
    model = uknowpan.load(tiny_model)
    pan, ms = (values.astype("float32") for values in arrays)
    hole = np.zeros(ms.shape[1:], bool)
    hole[4:9, 6:12] = True
    gone = hole.repeat(4, 0).repeat(4, 1)
    results = {}
    for name, mark in (("nan", np.nan), ("inf", np.inf), ("nodata", -9999.0)):
        given = {"nodata": -9999.0} if name == "nodata" else {}
        results[name] = uknowpan.sharpen_array(pan, np.where(hole, np.float32(mark), ms), model=model, **given)
    assert np.isnan(results["nan"][:, gone]).all() and np.isfinite(results["nan"][:, ~gone]).all()
    assert (results["nodata"][:, gone] == -9999).all()
    for name in ("inf", "nodata"):
        assert (results[name][:, ~gone] == results["nan"][:, ~gone]).all()
    whole = [values.astype("uint16") for values in (pan, ms)]
    masked = uknowpan.sharpen_array(whole[0], np.ma.MaskedArray(whole[1], np.broadcast_to(hole, ms.shape)), model=model)
    assert masked.dtype == np.uint16 and (masked.mask == gone).all()
    filled = uknowpan.sharpen_array(whole[0], np.where(hole, np.uint16(0), whole[1]), model=model, nodata=0)
    assert (filled[:, gone] == 0).all() and (filled[:, ~gone] == masked.data[:, ~gone]).all()


def test_holes_do_not_move_other_pixels(tiny_model: Path) -> None:
    """A hole that no sample of the survey meets leaves all pixels beyond its reach as they were."""
    rng = np.random.default_rng(0)
    ms = rng.uniform(100, 900, (3, 300, 300)).astype("float32")
    pan = ms.mean(0).repeat(4, 0).repeat(4, 1) + rng.uniform(-50, 50, (1200, 1200)).astype("float32")
    spoiled = ms.copy()
    spoiled[:, :12, :12] = np.nan
    model = uknowpan.load(tiny_model)
    before, after = (uknowpan.sharpen_array(pan, values, model=model, coregister="off") for values in (ms, spoiled))
    far = np.ones((1200, 1200), bool)
    far[:320, :320] = False
    assert np.isnan(after[:, :48, :48]).all() and np.isfinite(after[:, far]).all()
    assert (before[:, far] == after[:, far]).all()


@pytest.mark.parametrize(
    ("pan", "ms", "options", "text"),
    [
        (np.ones((8, 8)), np.ones((8, 8)), {}, "The MS must have the shape (bands, h, w), not (8, 8)"),
        (np.ones((3, 8, 8)), np.ones((3, 2, 2)), {}, "The PAN has 3 bands, not one"),
        (np.ones((9, 8)), np.ones((3, 2, 2)), {}, "9 x 8 pixels are no whole multiple"),
        (np.ones((8, 8)), np.ones((0, 2, 2)), {}, "The MS must have the shape"),
        (np.ones((8, 8)), np.ones((3, 2, 2), complex), {}, "The MS holds complex128, not real numbers"),
        (np.ones((8, 8)), [[1]], {}, "a numpy array, a torch tensor or a DataArray, not list"),
        (np.ones((8, 8)), np.ones((3, 2, 2), "uint8"), {"nodata": -9999}, "Nodata -9999 does not fit into uint8"),
        (np.full((8, 8), np.nan), np.ones((3, 2, 2)), {}, "No pixel is valid in both PAN and MS"),
        (np.ones((8, 8)), np.ones((3, 2, 2)), {"preview": "p.png"}, "There is no option 'preview'"),
        (np.ones((8, 8)), np.ones((3, 2, 2)), {"uncertainty": True}, "--uncertainty: gsa has none"),
    ],
)
def test_bad_arrays(pan: np.ndarray, ms: object, options: dict[str, object], text: str) -> None:
    with warnings.catch_warnings(), pytest.raises(uknowpan.Error) as failure:
        uknowpan.sharpen_array(pan, ms, method="gsa", **options)
    assert text in str(failure.value) and "\n" not in str(failure.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("rotation", [0, 20])
def test_nothing_deprecated_is_used(make_pair, tmp_path, rotation):
    """Kind of fault: with `python -W error` and affine 3 no pair could be opened."""
    pair = make_pair(ms_shape=(16, 16), rotation=rotation)
    uknowpan.sharpen(pair.pan, pair.ms, tmp_path / "out.tif", method="brovey")


def test_values_of_another_kind_are_named():
    """Kind of fault: a TypeError of Python's, which names nothing."""
    pan, ms = np.ones((1, 32, 32)), np.ones((2, 8, 8))
    with pytest.raises(uknowpan.Error, match="nodata is a number, not 'x'"):
        uknowpan.sharpen_array(pan, ms, nodata="x", method="brovey")
    for name in ("model", "uncertainty"):
        with pytest.raises(uknowpan.Error, match=f"--{name} takes the name of a file, not 5"):
            SharpenOptions(**{name: 5})
    with pytest.raises(uknowpan.Error, match="not 5"):
        uknowpan.load(5)
