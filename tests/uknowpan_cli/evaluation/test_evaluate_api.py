"""`uknowpan.evaluate`: files, open datasets and arrays of any kind give the same indices."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import xarray
from affine import Affine
from rasters import ORIGIN, write_raster

import uknowpan
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.rasters import METHOD, evaluate_against, evaluate_without
from uknowpan.models.metrics.sensors import find_sensor

GRID = Affine.translation(*ORIGIN) @ Affine.scale(0.5, -0.5)
REDUCED = ["q2n", "q", "sam", "ergas", "scc", "psnr", "ssim"]
FULL = ["d_lambda_k", "d_s", "hqnr", "d_lambda", "qnr", "reprojection"]
JUDGED = {"max_value": 2047, "cut": 5, "reprojection": True}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:128, :160]
    field = 900 + 400 * np.sin(rows / 13) * np.cos(cols / 17)
    truth = np.rint(np.linspace(0.7, 1.3, 4)[:, None, None] * field + 60 * rng.normal(size=(4, 128, 160)))
    result = truth + rng.integers(0, 60, truth.shape)
    ms = np.rint(truth.reshape(4, 32, 4, 40, 4).mean((2, 4)))
    images = {"result": result, "reference": truth, "pan": np.rint(truth.mean(0, keepdims=True)), "ms": ms}
    return {name: image.astype("uint16") for name, image in images.items()}


@pytest.fixture(scope="module")
def files(arrays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rasters")
    grids = {"ms": GRID @ Affine.scale(4)}
    return {
        name: Path(write_raster(folder / f"{name}.tif", image, grids.get(name, GRID)))
        for name, image in arrays.items()
    }  # fmt: skip


def without(given, *names):
    return {name: value for name, value in given.items() if name not in names}


@pytest.fixture(scope="module")
def expected(files):
    paths = {name: str(path) for name, path in files.items()}
    options = EvaluateOptions(**JUDGED)
    against = evaluate_against(paths["result"], paths["reference"], options)
    lone, judge = evaluate_without(paths["result"], paths["pan"], [paths["ms"]], options)
    scores = {index: float(value) for results in (against, lone) for index, value in results.scores[METHOD].items()}
    return scores | {"reprojection": judge.facts()}


def assert_near(scores, expected):
    ways = scores["reprojection"], expected["reprojection"]
    assert without(scores, "reprojection") == pytest.approx(without(expected, "reprojection"), rel=1e-9)
    for way in ("published", "registered", "registered_nominal"):
        assert ways[0][way] == pytest.approx(ways[1][way], rel=1e-6)


def test_files(files, expected):
    scores = uknowpan.evaluate(**files, **JUDGED)
    assert list(scores) == REDUCED + FULL and scores == expected
    assert all(type(scores[index]) is float for index in REDUCED)
    assert list(scores["reprojection"]) == [
        *("published", "registered", "registered_nominal", "phases", "sigma_pan_pixels", "shift_pan_pixels")
    ]
    against = uknowpan.evaluate(files["result"], reference=str(files["reference"]), max_value=2047, cut=5)
    assert against == {index: expected[index] for index in REDUCED}
    bands = [f"{files['ms']},band={band}" for band in (1, 2, 3, 4)]
    lone = uknowpan.evaluate(str(files["result"]), pan=files["pan"], ms=bands)
    assert lone == {index: expected[index] for index in FULL[:-1]}  # the second judge is not asked


def test_open_datasets_stay_open(files, expected):
    opened = {name: rasterio.open(path) for name, path in files.items()}
    assert uknowpan.evaluate(**opened, **JUDGED) == expected
    for dataset in opened.values():
        assert not dataset.closed
        dataset.close()


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x,
        lambda x: x[0] if len(x) == 1 else x,
        lambda x: x.astype("float64"),
        lambda x: torch.from_numpy(x.astype("float32")),
        lambda x: xarray.DataArray(x, dims=("band", "y", "x")),
    ],
    ids=["uint16", "2-D PAN", "float64", "torch", "xarray"],
)
def test_arrays(arrays, expected, kind):
    scores = uknowpan.evaluate(**{name: kind(x) for name, x in arrays.items()}, **JUDGED)
    assert_near(scores, expected)


@pytest.mark.parametrize("name", ["result", "reference", "pan", "ms"])
def test_an_array_beside_files(arrays, files, expected, name):
    assert_near(uknowpan.evaluate(**{**files, name: arrays[name]}, **JUDGED), expected)


def test_a_file_beside_arrays(arrays, files, expected):
    for name in ("ms", "pan"):
        assert_near(uknowpan.evaluate(**{**arrays, name: files[name]}, **JUDGED), expected)


def test_nan_masked_and_nodata_pixels_do_not_count(arrays):
    bad = np.zeros((128, 160), bool)
    bad[50:60, 60:66] = True
    result = np.where(bad, 0, arrays["result"])
    options = {"reference": arrays["reference"], "max_value": 2047, "cut": 0}
    scores = [
        uknowpan.evaluate(np.where(bad, np.nan, result), **options),
        uknowpan.evaluate(np.ma.MaskedArray(result, np.broadcast_to(bad, result.shape)), **options),
        uknowpan.evaluate(result, nodata=0, **options),
    ]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0] != uknowpan.evaluate(arrays["result"], **options)
    assert scores[0]["ergas"] < 10


def test_options(arrays, files):
    lone = without(files, "reference")
    qb, generic = uknowpan.evaluate(**lone, sensor="QuickBird"), uknowpan.evaluate(**lone)
    assert qb["d_lambda_k"] != generic["d_lambda_k"] and qb["d_s"] == generic["d_s"]
    against = without(arrays, "pan", "ms")
    half, quarter = (uknowpan.evaluate(**against, cut=0, ratio=ratio, sensor="QB") for ratio in (2, 4))
    assert half["ergas"] == pytest.approx(2 * quarter["ergas"]) and half["psnr"] == quarter["psnr"]
    assert quarter["psnr"] == uknowpan.evaluate(**against, cut=0, max_value=find_sensor("QB").max_value)["psnr"]


def test_warnings_are_python_s(arrays, files):
    with pytest.warns(uknowpan.UknowpanWarning, match="for full scale"):
        uknowpan.evaluate(arrays["result"], reference=files["reference"])


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"reference": None, "pan": None, "ms": None}, "either the reference, or both pan and ms"),
        ({"reference": None, "ms": None}, "either the reference, or both pan and ms"),
        ({"sensor": "Hubble"}, "no sensor is called 'Hubble'"),
        ({"max_value": -1}, "is no full scale"),
        ({"cut": 70}, "A border of 70 leaves nothing"),
        ({"result": "nowhere.tif"}, "nowhere.tif cannot be opened"),
        ({"result": 7}, "The result is a numpy array, a torch tensor or a DataArray, not int"),
        ({"result": np.zeros((4, 100, 160))}, "160 x 100 pixels"),
        ({"reference": np.ones((3, 128, 160))}, "has 4 bands and .* has 3"),
        ({"pan": np.ones((2, 128, 160))}, "The PAN has 2 bands"),
        ({"result": np.full((4, 128, 160), np.nan)}, "no .* without nodata"),
        ({"ms": np.ones((4, 2, 2)) * 9}, "."),
    ],
)
def test_bad_input_is_one_sentence(arrays, change, sentence):
    given = {**arrays, "max_value": 2047, "cut": 5} | change
    with pytest.raises(uknowpan.Error, match=sentence) as caught:
        uknowpan.evaluate(**given)
    assert "\n" not in str(caught.value) and caught.value.exit_code in (2, 3)


def test_nothing_is_printed_and_typer_is_not_imported(files):
    code = (
        "import sys, warnings, uknowpan\n"
        "warnings.simplefilter('ignore')\n"
        "uknowpan.evaluate(sys.argv[1], reference=sys.argv[2])\n"
        "assert 'typer' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, files["result"], files["reference"]], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
