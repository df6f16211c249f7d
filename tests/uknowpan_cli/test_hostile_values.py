"""Values that are no measurements: scattered nodata, outliers, undeclared fill values, negatives, denormals, NaN."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import write_pair
from running import Run, write_tiny_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import uknowpan
from uknowpan.models.network import INJECTIONS
from uknowpan.surveying import survey, value_warnings
from uknowpan.tiling import open_pair


@pytest.fixture
def altered(tmp_path: Path):
    """Write a float32 pair with PAN and MS as changed by two functions; returns its paths."""

    def write(pan=lambda x: x, ms=lambda x: x, pan_nodata=None, name="scene"):
        pair = write_pair(tmp_path, name=name, ms_shape=(SIDE, SIDE), dtype="float32", noise=60, pan_nodata=pan_nodata)
        for path, change in ((pair.pan, pan), (pair.ms[0], ms)):
            with rasterio.open(path, "r+") as dataset:
                dataset.write(change(dataset.read()).astype("float32"))
        return pair.pan, pair.ms[0]

    return write


def scattered(share, value):
    def change(x):
        out = x.copy()
        out[np.random.default_rng(1).random(x.shape) < share] = value
        return out

    return change


def pixel(value):
    def change(x):
        out = x.copy()
        out[0, 100, 100] = value
        return out

    return change


SIDE = 40
"""MS pixels."""
QUICK = ("--coregister", "off", "-j", 1)


def sharpened(pair, folder, **options):
    """The image that `uknowpan.sharpen` makes of a pair."""
    report = uknowpan.sharpen(
        *pair, folder / "image.tif", overwrite=True, coregister="off", num_threads=1, output_dtype="float32", **options
    )
    with rasterio.open(report.output) as dataset:
        return dataset.read()


def facts(pan, ms):
    with open_pair(pan, ms) as pair:
        return survey(pair).statistics


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_scattered_nodata_in_the_pan(altered, share):
    """Kind: validity of samples is eroded to nothing and the scene refused."""
    clean = facts(*altered())
    holed = facts(*altered(scattered(share, 0), pan_nodata=0, name="holed"))
    np.testing.assert_allclose(holed.mean, clean.mean, rtol=0.1)
    np.testing.assert_allclose(holed.detail_std[:-1], clean.detail_std[:-1], rtol=0.1)


@pytest.mark.parametrize("value", [1e10, -3.4e38, -1e6])
@pytest.mark.parametrize("where", ["pan", "ms"])
def test_one_outlier_does_not_change_the_moments(altered, where, value):
    """Kind: one wild pixel spoils the moments of the whole scene."""
    clean = facts(*altered())
    change = pixel(value) if where == "pan" else lambda x: np.concatenate([scattered(0.0003, value)(x[:1]), x[1:]])
    wild = facts(*altered(**{where: change}, name="wild"))
    np.testing.assert_allclose(wild.mean, clean.mean, rtol=0.02)
    np.testing.assert_allclose(wild.detail_std, clean.detail_std, rtol=0.15)


@pytest.mark.parametrize("value", [0, -9999, 65535])
@pytest.mark.parametrize("where", ["pan", "ms"])
def test_an_undeclared_fill_value_is_named(altered, uknowpan: Run, tmp_path: Path, where, value):
    """Kind: a fill value that no header declares is sharpened in silence."""

    def change(x):
        out = x.copy()
        out[:, : x.shape[1] // 5, : x.shape[2] // 5] = value
        return out

    pan, ms = altered(**{where: change})
    outcome = uknowpan("sharpen", pan, ms, "--method", "bicubic", *QUICK, "-o", tmp_path / "out.tif")
    assert outcome.code == 0 and f"give --nodata {value}" in " ".join(outcome.stderr.split())


def test_one_pixel_is_no_fill_value(altered):
    """Kind: a warning about one bright pixel among few valid ones."""
    few = scattered(0.7, 0)
    pan, ms = altered(few, few, pan_nodata=0)
    with open_pair(pan, ms, nodata=0) as pair:
        assert list(value_warnings(pair, [pair.read_frame(0, 0, 20, 20)])) == []


@pytest.mark.parametrize("limit", [1250, 1e9])
def test_saturation_is_no_fill_value(altered, limit):
    """Kind: a warning where values end for another reason."""
    pan, ms = altered(lambda x: np.minimum(x, limit), lambda x: np.minimum(x, limit))
    with open_pair(pan, ms) as pair:
        assert list(value_warnings(pair, [pair.read_frame(0, 0, *pair.frame_shape)])) == []


def test_values_that_differ_by_few_steps(altered):
    """Kind: detail of values near 1e9 is lost in 32-bit floats, and a warning calls the rest fill values."""
    with open_pair(*altered(ms=lambda x: x + np.float32(1e9))) as pair:
        sentences = list(value_warnings(pair, [pair.read_frame(0, 0, *pair.frame_shape)]))
    assert len(sentences) == pair.bands and all("subtract a constant" in sentence for sentence in sentences)


def test_negative_data_in_brovey(altered, uknowpan: Run, tmp_path: Path):
    """Kind: the result of negative data is zero everywhere."""
    images = {}
    for name, sign in (("plus", 1), ("minus", -1)):
        pair = altered(lambda x, s=sign: s * x, lambda x, s=sign: s * x, name=name)
        images[name] = sharpened(pair, tmp_path, method="brovey")
    np.testing.assert_allclose(images["minus"], -images["plus"], rtol=1e-5)


@pytest.mark.parametrize(
    "change", [lambda x: -x, lambda x: -x / 100 - 5, lambda x: x - x.mean()], ids=["negative", "decibels", "mean 0"]
)
def test_a_network_takes_any_level(altered, tmp_path: Path, change):
    """Kind: the ratio to a PAN that is negative, or 0 on average, makes a network's result wild."""
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    pair = altered(change, change)
    wanted = sharpened(pair, tmp_path, method="gsa")
    image = sharpened(pair, tmp_path, model=model)
    assert (image != 0).all() and np.abs(image - wanted).std() < 0.3 * wanted.std()


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_nodata_scattered_over_both(altered, tmp_path: Path, share: float):
    """Kind: no MS pixel has all of its PAN pixels, and the scene is refused, or filled with zeros."""
    hole = scattered(share, 0)
    pan, ms = altered(hole, hole, pan_nodata=0)
    with rasterio.open(ms, "r+") as dataset:
        dataset.nodata = 0
        data = (dataset.read() != 0).all(axis=0)
    with rasterio.open(pan) as dataset:
        valid = (dataset.read(1) != 0) & data.repeat(4, 0).repeat(4, 1)
    image = sharpened((pan, ms), tmp_path, model=write_tiny_model(tmp_path / "tiny.safetensors"))
    np.testing.assert_array_equal((image != 0).all(axis=0), valid)
    assert abs(image[:, valid].mean() / 1500 - 1) < 0.1


@pytest.mark.parametrize(
    ("change", "code", "text"),
    [(lambda x: x - x.mean(), 5, "mean is about 0"), (lambda x: x * np.float32(1e-41), 3, "below 1e-30")],
    ids=["mean 0", "denormals"],
)
def test_values_that_ratios_cannot_take(altered, uknowpan: Run, tmp_path: Path, change, code, text):
    """Kind: division by about nothing gives a wild or an empty result."""
    outcome = uknowpan("sharpen", *altered(change), "--method", "brovey", *QUICK, "-o", tmp_path / "out.tif")
    assert outcome.code == code and text in " ".join(outcome.stderr.split())


def test_an_uncertainty_of_nan_leaves_nothing(altered, uknowpan: Run, tmp_path: Path):
    """Kind: sigma is NaN at valid pixels, at exit 0."""
    model = write_tiny_model(tmp_path / "tiny.safetensors")
    with safe_open(model, framework="np") as file:
        metadata = file.metadata()
    weights = load_file(model)
    weights["out.bias"].reshape(-1, 4)[INJECTIONS + 1] = np.nan  # log sigma alone
    save_file(weights, model, metadata)
    pan, ms = altered()
    before = {path.name for path in tmp_path.iterdir()}
    files = ("-o", tmp_path / "o.tif", "--uncertainty", tmp_path / "s.tif")
    outcome = uknowpan("sharpen", pan, ms, "--model", model, "--tile", 64, *QUICK, *files)
    assert outcome.code == 5 and "uncertainties that are not finite" in " ".join(outcome.stderr.split())
    assert {path.name for path in tmp_path.iterdir()} == before
