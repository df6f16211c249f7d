"""`uknowpan sharpen` from file to file."""

import errno
import json
import os
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio._env import get_gdal_config
from rasterio.enums import ColorInterp
from rasters import ORIGIN, write_raster
from running import STOPPING, MakePair, Run, spawn

from uknowpan import forecast as estimate
from uknowpan import loading, scenes, surveying
from uknowpan import sharpening as pipeline
from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig
from uknowpan.sharpening import TileRow
from uknowpan.tiling import Tile


def read(path: Path | str) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read()


def textured(size: int, seed: int = 3) -> np.ndarray:
    """(3, size, size) float64 around 600: 1/f noise with roofs, in bands that differ."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    frequency[0, 0] = 1

    def field() -> np.ndarray:
        values = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(size, size))) / frequency**1.2)
        return values / values.std()

    shared = field()
    scene = np.stack([shared + 0.4 * field() for _ in range(3)])
    for _ in range(60):
        (row, col), (height, width) = rng.integers(size, size=2), rng.integers(3, 24, size=2)
        scene[:, row : row + height, col : col + width] += 2 * rng.normal()
    return 600 + 60 * scene


def observed(truth: np.ndarray, ratio: int, folder: Path, shift: tuple[int, int] = (0, 0)) -> tuple[str, str]:
    """Write PAN and MS of a truth; the MS content lies `shift` PAN pixels down and right of
    where it belongs."""
    pan = truth.mean(0, keepdims=True)
    moved = np.roll(truth, shift, (1, 2))
    h, w = (n // ratio for n in truth.shape[1:])
    ms = moved.reshape(-1, h, ratio, w, ratio).mean((2, 4))
    corner = Affine.translation(*ORIGIN)
    return (
        write_raster(folder / "t_pan.tif", pan.round().astype("uint16"), corner @ Affine.scale(1, -1)),
        write_raster(folder / "t_ms.tif", ms.round().astype("uint16"), corner @ Affine.scale(ratio, -ratio)),
    )


# The file that comes out ----------------------------------------------------------------------


def test_grid_metadata_and_tags(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    names = ["blue", "green", "red", "nir"]
    colours = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    pair = make_pair(nodata=0, descriptions=names, colorinterp=colours, tags={"ACQUIRED": "2024-06-01"})
    with rasterio.open(pair.ms[0], "r+") as dataset:
        dataset.scales, dataset.offsets = (0.0001,) * 4, (-0.1,) * 4
        dataset.units = ["reflectance"] * 4
        dataset.update_tags(2, WAVELENGTH="560")
    output = tmp_path / "out.tif"
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model),
        *("--tile", 64, "--seed", 11, "--steps", 2, "--co", "COMPRESS=ZSTD,ZSTD_LEVEL=3"),
    )
    assert outcome.code == 0, outcome.stderr
    with (
        rasterio.open(output) as out,
        rasterio.open(pair.pan) as pan,
        rasterio.open(pair.ms[0]) as ms,
    ):
        assert (out.crs, out.transform, out.shape) == (pan.crs, pan.transform, pan.shape)
        assert out.dtypes == ms.dtypes
        assert out.descriptions == tuple(names)
        assert out.colorinterp == ms.colorinterp
        assert (out.scales, out.offsets, out.units) == (ms.scales, ms.offsets, ms.units)
        assert out.nodata == 0
        assert out.tags()["ACQUIRED"] == "2024-06-01"
        assert out.tags(2)["WAVELENGTH"] == "560"
        assert out.compression.name == "zstd"
        tags = out.tags()
    assert tags["UKNOWPAN_MODEL"] == "tiny"
    assert len(tags["UKNOWPAN_SHA256"]) == 64
    assert (tags["UKNOWPAN_SEED"], tags["UKNOWPAN_STEPS"]) == ("11", "2")
    assert (tags["UKNOWPAN_RATIO"], tags["UKNOWPAN_APPLIED_SHIFT"]) == ("4", "0.000 0.000")
    assert tags["UKNOWPAN_PAN"] == "scene_pan.tif"
    assert float(tags["UKNOWPAN_SCALE_MS"]) > 0
    assert tags["UKNOWPAN_VERSION"]


def test_json_report(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(dtype="float32", nodata=float("nan"), ms_shape=(24, 24))
    output = tmp_path / "out.tif"
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model),
        *("--tile", 48, "--json", "--max-value", 4000),
    )
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout, parse_constant=pytest.fail)
    assert report["output"] == str(output)
    assert (report["width"], report["height"], report["bands"], report["ratio"]) == (96, 96, 4, 4)
    assert report["tiles"] == 4
    assert report["method"] == "tiny"
    assert report["scale"] == {"pan": 4000.0, "ms": 4000.0, "source": "option"}
    assert report["uncertainty"] is None


def test_dry_run_writes_nothing(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    arguments = (
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        *("--tile", 32, "--dry-run"),
    )
    before = sorted(tmp_path.iterdir())
    outcome = uknowpan(*arguments)
    assert outcome.code == 0, outcome.stderr
    for word in ("80 x 96 pixels, 4 bands", "ratio 4", "tiles", "memory", "time"):
        assert word in outcome.stdout
    forecast = json.loads(uknowpan(*arguments, "--json").stdout)
    assert (forecast["width"], forecast["height"], forecast["tiles"]) == (80, 96, 9)
    assert forecast["output_mb"] == pytest.approx(80 * 96 * 4 * 2 / 1e6, abs=0.1)
    assert sorted(tmp_path.iterdir()) == before


def test_uncertainty_and_preview(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    holes = np.zeros((24, 20), bool)
    holes[:6, :5] = True
    pair = make_pair(nodata=0, holes=holes, descriptions=["b", "g", "r", "n"])
    output, sigma, preview = (tmp_path / name for name in ("out.tif", "sigma.tif", "look.png"))
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--tile", 64),
        *("--uncertainty", sigma, "--preview", preview),
    )
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(sigma) as dataset, rasterio.open(output) as image:
        assert dataset.dtypes == ("float32",) * 4
        assert (dataset.transform, dataset.crs) == (image.transform, image.crs)
        values, valid = dataset.read(), image.read()[0] != 0
    assert (values[:, valid] > 0).all()
    assert np.isfinite(values[:, valid]).all()
    assert np.isnan(values[:, ~valid]).all()
    assert (~valid).sum() == holes.sum() * 16
    with rasterio.open(preview) as picture:
        assert picture.driver == "PNG"
        assert picture.shape == (96, 80)


def test_uncertainty_scales_with_digital_numbers(
    uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path
) -> None:
    """1-sigma is in the units of the output: ten times the numbers, ten times the sigma."""
    pair = make_pair(dtype="float32")
    found = []
    for factor in (1, 10):
        for path in (pair.pan, pair.ms[0]):
            with rasterio.open(path, "r+") as dataset:
                dataset.write(dataset.read() * (1 if factor == 1 else 10))
        sigma = tmp_path / f"sigma{factor}.tif"
        outcome = uknowpan(
            *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / f"out{factor}.tif"),
            *("--model", tiny_model, "--uncertainty", sigma),
        )
        assert outcome.code == 0, outcome.stderr
        found.append(read(sigma))
    np.testing.assert_allclose(found[1], 10 * found[0], rtol=1e-3)


# Kinds of scenes --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bicubic", "brovey", "gsa", "mtf-glp"])
def test_every_method(method: str, uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    output = tmp_path / "out.tif"
    outcome = uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", output, "--method", method, "--tile", 64))
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(output) as dataset:
        values, tags = dataset.read().astype(float), dataset.tags()
    assert tags["UKNOWPAN_METHOD"] == method
    means = values.reshape(4, 24, 4, 20, 4).mean((2, 4))
    assert np.abs(means / pair.ms_values - 1).mean() < 0.05


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("with_nodata", [False, True])
def test_dtypes(
    dtype: str,
    with_nodata: bool,
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    nodata = {"uint8": 0, "uint16": 0, "int16": -9999, "float32": -3.4e38}[dtype]
    holes = np.zeros((24, 20), bool)
    holes[8:12, 3:9] = True
    pan_holes = np.zeros((96, 80), bool)
    pan_holes[90:, 70:] = True
    options = {"nodata": nodata, "holes": holes, "pan_nodata": nodata, "pan_holes": pan_holes} if with_nodata else {}
    pair = make_pair(dtype=dtype, **options)
    output = tmp_path / "out.tif"
    outcome = uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--tile", 64))
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(output) as dataset:
        assert dataset.dtypes == (dtype,) * 4
        values = dataset.read().astype(float)
        masked = dataset.read_masks() == 0
    expected = np.zeros((96, 80), bool)
    if with_nodata:
        expected = holes.repeat(4, 0).repeat(4, 1) | pan_holes
    assert (masked == expected).all()
    # What is valid stays near the MS; nodata has not bled into it.
    near = pair.ms_values.astype(float).repeat(4, 1).repeat(4, 2)
    good = ~expected
    assert np.abs(values[:, good] / near[:, good] - 1).max() < 0.6
    assert np.isfinite(values[:, good]).all()


@pytest.mark.parametrize("bands", [1, 3, 4, 8])
def test_band_counts(bands: int, uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(bands=bands)
    output = tmp_path / "out.tif"
    outcome = uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--tile", 64))
    assert outcome.code == 0, outcome.stderr
    assert read(output).shape == (bands, 96, 80)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6])
def test_ratios(ratio: int, uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(ratio=ratio, ms_shape=(17, 13))
    output = tmp_path / "out.tif"
    outcome = uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--tile", 64))
    assert outcome.code == 0, outcome.stderr
    values = read(output).astype(float)
    assert values.shape == (4, 17 * ratio, 13 * ratio)
    means = values.reshape(4, 17, ratio, 13, ratio).mean((2, 4))
    assert np.abs(means / pair.ms_values - 1).max() < 0.25


def test_separate_files_and_band_choice(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """Bands in separate files, a stack, and a stack with --bidx give the same pixels."""
    stack, files = make_pair(name="a"), make_pair(name="b", separate=True)
    common = ("--model", tiny_model, "--tile", 64)
    spellings: dict[str, Sequence[str]] = {
        "bidx": [*stack.ms, "--bidx", "3,1"],
        "specs": [f"{stack.ms[0]},band=3", f"{stack.ms[0]},band=1"],
        "files": [files.ms[2], files.ms[0]],
    }
    results = {}
    for name, words in spellings.items():
        output = tmp_path / f"{name}.tif"
        outcome = uknowpan("sharpen", stack.pan, *words, "-o", output, *common)
        assert outcome.code == 0, outcome.stderr
        results[name] = read(output)
    assert results["bidx"].shape[0] == 2
    assert (results["bidx"] == results["specs"]).all()
    assert (results["bidx"] == results["files"]).all()


def test_output_options(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    output = tmp_path / "out.tif"
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "-f", "cog"),
        *("--output-dtype", "float32", "--co", "COMPRESS=LZW", "--nodata", "-1"),
    )
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(output) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.compression.name == "lzw"
        assert dataset.nodata == -1
        assert dataset.dtypes[0] == "float32"
        assert (dataset.read() % 1 > 0).any()


def test_max_value_clips(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    for words in (("--max-value", 1023), ("--bit-depth", 10)):
        output = tmp_path / "out.tif"
        outcome = uknowpan(
            *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--overwrite"),
            *words,
        )
        assert outcome.code == 0, outcome.stderr
        assert read(output).max() == 1023


def test_max_value_keeps_negative_data(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """Reflectance over water is below 0 after atmospheric correction."""
    pair = make_pair(dtype="float32")
    with rasterio.open(pair.ms[0], "r+") as dataset:
        dataset.write(-dataset.read())
    output = tmp_path / "out.tif"
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model),
        *("--max-value", 4000),
    )
    assert outcome.code == 0, outcome.stderr
    assert read(output).max() < 0


@pytest.mark.parametrize(
    ("dtype", "factor", "wanted", "says"),
    [
        ("uint16", 1, "uint8", r"reach about \d+: uint8 ends at 255, .* clipped, not rescaled"),
        ("float32", 50, "int16", r"int16 ends at 32767, .* clipped, not rescaled"),
        ("float32", 0.001, "uint16", r"reach about [12]\.\d+: uint16 rounds them to whole numbers"),
        ("uint16", 1, "float32", None),
        ("uint16", 1, "int16", None),
        ("uint8", 1, "uint8", None),
    ],
)
def test_output_dtype_that_loses_the_data(
    dtype: str,
    factor: float,
    wanted: str,
    says: str | None,
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    pair = make_pair(dtype=dtype, photometric="MINISBLACK")  # or four 8-bit bands are RGBA
    if factor != 1:
        with rasterio.open(pair.ms[0], "r+") as dataset:
            dataset.write((dataset.read() * factor).astype(dtype))
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        *("--output-dtype", wanted),
    )
    assert outcome.code == 0, outcome.stderr
    if says is None:
        assert outcome.messages == ""
    else:
        assert re.fullmatch(rf"uknowpan: WARNING: .*{says}.*\n", outcome.messages)


# Messages ---------------------------------------------------------------------------------------


def test_guesses_are_warned_of_and_remarks_are_not(
    uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path
) -> None:
    guessed = make_pair(name="a", georeferenced=(False, False))
    resampled = make_pair(name="b", ratio=4.5)
    common = ("--model", tiny_model, "-o", tmp_path / "out.tif", "--overwrite")
    outcome = uknowpan("sharpen", guessed.pan, *guessed.ms, *common)
    assert outcome.code == 0, outcome.stderr
    assert re.match(r"uknowpan: WARNING: \S", outcome.stderr)
    assert uknowpan("sharpen", resampled.pan, *resampled.ms, *common).messages == ""


def test_options_without_effect_on_a_method(
    uknowpan: Run, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that pick a model are refused (test_bad_inputs), but its variable is no choice."""
    monkeypatch.setenv("UKNOWPAN_MODEL", "generic")
    pair = make_pair()
    common = (
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--method", "gsa"),
        "--overwrite",
    )
    assert uknowpan(*common, "--device", "cpu").messages == uknowpan(*common).messages == ""
    outcome = uknowpan(*common, "--seed", 3, "--dtype", "bf16", "--softness", "ms")
    assert outcome.code == 0
    assert outcome.messages.splitlines() == [
        f"uknowpan: WARNING: {option} changes nothing for --method gsa"
        for option in ("--seed", "--softness", "--dtype")
    ]


def test_softness(uknowpan: Run, tmp_path: Path) -> None:
    pan, ms = observed(textured(256), 4, tmp_path)
    facts = json.loads(uknowpan("info", pan, ms, "--json").stdout)
    assert 0.2 < facts["softness_ms_pixels"] < 0.9
    sharpness, tags = {}, {}
    for softness in ("0.25", "0.8", "ms", None):
        words = [] if softness is None else ["--softness", softness]
        output = tmp_path / f"{softness}.tif"
        outcome = uknowpan("sharpen", pan, ms, "-o", output, *words)
        assert outcome.code == 0, outcome.stderr
        with rasterio.open(output) as out:
            tags[softness] = out.tags()
            sharpness[softness] = np.abs(np.diff(out.read().astype(float))).mean()
    assert sharpness["0.25"] > sharpness[None] > sharpness["0.8"]
    assert sharpness["0.25"] >= sharpness["ms"] >= sharpness["0.8"]
    told = {softness: t["UKNOWPAN_SOFTNESS"] for softness, t in tags.items()}
    assert told == {"0.25": "0.25", "0.8": "0.8", "ms": "ms", None: "0.45"}
    assert [s for s in tags if "UKNOWPAN_MS_SOFTNESS" in tags[s]] == ["ms"]  # who asks pays
    measured = float(tags["ms"]["UKNOWPAN_MS_SOFTNESS"])
    assert measured == pytest.approx(facts["softness_ms_pixels"], abs=1e-3)


# Resources --------------------------------------------------------------------------------------


def test_gdal_keeps_few_blocks(
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its default is 5 % of the machine's memory, which no forecast knows of."""
    seen = []
    survey = surveying.scene_scale

    def watched(*arguments: object) -> surveying.SceneScale:
        seen.append(get_gdal_config("GDAL_CACHEMAX"))
        return survey(*arguments)

    monkeypatch.setattr(surveying, "scene_scale", watched)
    pair = make_pair()
    words = (pair.pan, *pair.ms, "--model", tiny_model)
    assert uknowpan("sharpen", *words, "-o", tmp_path / "out.tif").code == 0
    assert uknowpan("info", *words).code == 0
    assert uknowpan("demo", "--out", tmp_path / "demo", "--size", 128, "-q").code == 0
    assert len(seen) >= 3
    assert set(seen) == {16 * 2**20}


def forecast_of(uknowpan: Run, *words: object) -> dict:
    outcome = uknowpan("sharpen", *words, "--dry-run", "--json")
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


def test_forecast_follows_the_options(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(64, 64))
    words = (
        *(pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model, "--tile", 64),
        *("-q", "--output-dtype"),
    )
    values = 256 * 256 * 4 / 1e6
    plain = forecast_of(uknowpan, *words, "int16")
    assert plain["output_mb"] == pytest.approx(2 * values, abs=0.1)
    assert plain["disk_mb"] == pytest.approx(4 * values, abs=0.1)
    many = forecast_of(
        *(uknowpan, *words, "float64", "--batch-size", 4),
        *("--uncertainty", tmp_path / "sigma.tif", "-f", "cog"),
    )
    assert many["output_mb"] == pytest.approx(8 * values, abs=0.1)
    assert many["disk_mb"] == pytest.approx((8 + 4) * 2 * values + 8 * values, abs=0.1)
    assert many["memory_mb"] > 3 * plain["memory_mb"]
    # 110 values for each band and pixel of a tile with its margin.
    side = 64 + 2 * plain["margin_pan_pixels"]
    assert plain["memory_mb"] > side**2 * 4 * 110 * 4 / 1e6


def test_forecast_times_a_tile_with_data(
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The middle of the scene is empty; the tile that is timed is not."""
    holes = np.zeros((48, 48), bool)
    holes[8:40, 8:40] = True
    pair = make_pair(ms_shape=(48, 48), nodata=0, holes=holes)
    timed: list[np.ndarray] = []
    sharpen_row = estimate.sharpen_row

    def watched(*arguments: object) -> TileRow:
        row = sharpen_row(*arguments)
        timed.extend(row.valid)
        return row

    monkeypatch.setattr(estimate, "sharpen_row", watched)
    words = (pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model)
    forecast_of(uknowpan, *words, "--tile", 32, "--batch-size", 3)
    assert len(timed) >= 2
    assert all(valid is not None and valid.all() for valid in timed)


# Independence of the cut ------------------------------------------------------------------------


def assert_equal_but_for_rounding(a: np.ndarray, b: np.ndarray) -> None:
    """At most 1 DN apart on a few values (batched convolutions add up in another order).

    tests/benchmarks/invariance.py holds a real scene to 1 pixel in 10 000. Here white noise of
    high contrast comes in tiny images, where a handful of values is a larger share.
    """
    difference = np.abs(a.astype(float) - b.astype(float))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 5e-4


@pytest.mark.parametrize("steps", [1, 2])
def test_tiles_and_batches_do_not_show(steps: int, uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """With the bundled model."""
    pair = make_pair(ms_shape=(33, 31), noise=40)
    results = []
    for tile, batch in ((64, 1), (64, 4), (96, 2), (1024, 1)):
        output = tmp_path / f"{tile}-{batch}.tif"
        outcome = uknowpan(
            *("sharpen", pair.pan, *pair.ms, "-o", output, "--coregister", "off"),
            *("--tile", tile, "--batch-size", batch, "--steps", steps),
        )
        assert outcome.code == 0, outcome.stderr
        results.append(read(output))
    for other in results[1:]:
        assert_equal_but_for_rounding(results[0], other)


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: strips are made by a thread, results fetched a batch late."""
    monkeypatch.setattr(scenes, "computes_beside", lambda sharpener: True)


def test_overlapping_does_not_show(
    uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path, request
) -> None:
    pair = make_pair(ms_shape=(40, 36), noise=40)
    common = (
        *("sharpen", pair.pan, *pair.ms, "--model", tiny_model, "--tile", 32),
        *("--batch-size", 2, "--json", "-o"),
    )
    plain = uknowpan(*common, tmp_path / "plain.tif")
    request.getfixturevalue("overlapped")
    late = uknowpan(*common, tmp_path / "late.tif", "--uncertainty", tmp_path / "sigma.tif")
    assert (plain.code, late.code) == (0, 0), late.stderr
    np.testing.assert_array_equal(read(tmp_path / "plain.tif"), read(tmp_path / "late.tif"))
    assert np.isfinite(read(tmp_path / "sigma.tif")).all()
    assert json.loads(plain.stdout)["tiles"] == json.loads(late.stdout)["tiles"] > 10


@pytest.mark.parametrize("row", [0, 2, 4])
def test_error_of_the_thread_beside(
    row: int,
    overlapped: None,
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of the last row, after which nothing is sharpened."""
    pair = make_pair(ms_shape=(40, 36))
    put = pipeline.StripStore.put

    def full(store: pipeline.StripStore, index: int, *rest: object) -> None:
        if index == row:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(store, index, *rest)

    monkeypatch.setattr(pipeline.StripStore, "put", full)
    output = tmp_path / "out.tif"
    words = ("sharpen", pair.pan, *pair.ms, "--model", tiny_model, "--tile", 32, "-o", output)
    outcome = uknowpan(*words)
    assert outcome.code != 0 and "No space left" in outcome.stderr
    assert not output.exists()
    monkeypatch.setattr(pipeline.StripStore, "put", put)
    assert uknowpan(*words, "--resume").code == 0


def test_batch_size_by_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(free: int | None, tile: int) -> int:
        monkeypatch.setattr(loading, "free_memory", lambda device: free)
        return loading.tiles_at_once("any", tile)

    assert batch(None, 10**9) == 1  # no GPU
    assert batch(10**11, 10**9) == 60
    assert batch(10**12, 10**9) == 64
    assert batch(10**8, 10**9) == 1
    monkeypatch.undo()
    assert loading.free_memory("cpu") is None


def test_order_of_tiles_does_not_show(
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of tiles and the tiles within them in any order: the same file."""
    pair = make_pair(ms_shape=(40, 36), noise=40)
    arguments = (
        *("sharpen", pair.pan, *pair.ms, "--model", tiny_model, "--tile", 32, "-o"),
    )  # fmt: skip
    assert uknowpan(*arguments, tmp_path / "straight.tif").code == 0
    seen: list[Tile] = []
    sharpen_row, rows_needed = pipeline.sharpen_row, pipeline.tile_rows_needed
    chance = random.Random(5)

    def shuffled(items: Iterable) -> list:
        return chance.sample(list(items), k=len(list(items)))

    def permuted(scene: pipeline.Scene, tiles: Sequence[Tile], *more: object) -> TileRow:
        order = shuffled(range(len(tiles)))
        seen.extend(tiles[i] for i in order)
        row = sharpen_row(scene, [tiles[i] for i in order], *more)
        back = [order.index(i) for i in range(len(tiles))]
        return TileRow(*([part[k] for k in back] for part in (row.hrms, row.valid, row.sigma)))

    monkeypatch.setattr(pipeline, "sharpen_row", permuted)
    monkeypatch.setattr(
        pipeline,
        "tile_rows_needed",
        lambda missing, overlap: shuffled(rows_needed(missing, overlap)),
    )
    assert uknowpan(*arguments, tmp_path / "mixed.tif").code == 0
    assert seen != sorted(seen, key=lambda tile: (tile.row, tile.col))
    assert read(tmp_path / "straight.tif").tobytes() == read(tmp_path / "mixed.tif").tobytes()


@pytest.mark.parametrize("ratio", [3, 4])
def test_bounds_give_a_part_of_the_whole(
    ratio: int, uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path
) -> None:
    pair = make_pair(ms_shape=(40, 36), ratio=ratio, offset=(1, 2), noise=40)
    arguments = ("sharpen", pair.pan, *pair.ms, "--model", tiny_model, "--tile", 48, "-o")
    whole, part = tmp_path / "whole.tif", tmp_path / "part.tif"
    assert uknowpan(*arguments, whole).code == 0
    size = 0.5 * ratio  # metres of an MS pixel; the part begins beyond the first 12 of them
    left, top = ORIGIN[0] + 14.3 * size, ORIGIN[1] - 15.6 * size
    bounds = f"{left},{top - 14.1 * size},{left + 17.4 * size},{top}"
    outcome = uknowpan(*arguments, part, "--bounds", bounds)
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(part) as dataset, rasterio.open(whole) as full:
        window = full.window(*dataset.bounds).round_lengths().round_offsets()
        assert (window.width, window.height) == (dataset.width, dataset.height)
        assert dataset.bounds.left <= left < dataset.bounds.left + 0.5
        assert dataset.bounds.top - 0.5 < top <= dataset.bounds.top
        assert_equal_but_for_rounding(dataset.read(), full.read(window=window))


# Interruptions ----------------------------------------------------------------------------------


def test_killed_again_and_again(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 after one strip, and after two more; the rest of the run gives the same bytes."""
    pair = make_pair(ms_shape=(40, 20), noise=40)
    arguments = (
        *("sharpen", pair.pan, *pair.ms, "--model", tiny_model, "--tile", 32, "--coregister"),
        *("off", "-o"),
    )
    output, undisturbed = tmp_path / "out.tif", tmp_path / "other.tif"
    sigma, other_sigma = tmp_path / "sigma.tif", tmp_path / "other_sigma.tif"
    assert uknowpan(*arguments, undisturbed, "--uncertainty", other_sigma).code == 0
    resumed = (*arguments, output, "--uncertainty", sigma, "--resume")
    for strips, finished in ((1, 1), (2, 3)):
        killed = spawn(*resumed, before=STOPPING.format(strips=strips, name="SIGKILL"))
        assert killed.code == -9
        assert not output.exists()
        assert len(list((tmp_path / "out.tif.part").glob("image-*.npy"))) == finished
    outcome = uknowpan(*resumed)
    assert outcome.code == 0, outcome.stderr
    assert read(output).tobytes() == read(undisturbed).tobytes()
    assert read(sigma).tobytes() == read(other_sigma).tobytes()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        *("scene_pan.tif", "scene_ms.tif", "out.tif", "other.tif"),
        *("sigma.tif", "other_sigma.tif"),
    }


def test_strips_that_are_dropped_are_told_of(
    uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path
) -> None:
    pair = make_pair()
    arguments = (
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        *("--tile", 32),
    )
    for words, says in (
        ((), r"WARNING: 2 strips of an interrupted run .*--resume"),
        (("--resume",), ""),
    ):
        assert spawn(*arguments, before=STOPPING.format(strips=2, name="SIGKILL")).code == -9
        outcome = uknowpan(*arguments, *words, "--overwrite")
        assert outcome.code == 0
        assert re.match(rf"uknowpan: {says}", outcome.messages) if says else outcome.messages == ""
        (tmp_path / "out.tif").unlink()


def test_own_strips_are_dropped_in_silence(
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Memory runs out in the second row of tiles: smaller ones start anew, nobody else's loss."""
    pair = make_pair(ms_shape=(64, 64))
    sharpen_row = pipeline.sharpen_row

    def greedy(*arguments: object) -> TileRow:
        tiles = arguments[1]
        if tiles[0].height * 4 > 64 and tiles[0].row > 0:
            raise MemoryError
        return sharpen_row(*arguments)

    monkeypatch.setattr(pipeline, "sharpen_row", greedy)
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        *("--tile", 128),
    )
    assert outcome.code == 0, outcome.stderr
    assert "memory is short" in outcome.stderr
    assert "dropped" not in outcome.stderr


def test_sigterm_from_outside(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    outcome = spawn(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        *("--tile", 32),
        before=STOPPING.format(strips=2, name="SIGTERM"),
    )
    assert outcome.code == 130
    assert outcome.stderr.startswith("uknowpan: error: Interrupted; 2 of 3 strips are kept in ")
    assert "Traceback" not in outcome.stderr


# Registration -----------------------------------------------------------------------------------


def test_coregistration_moves_the_ms(uknowpan: Run, tiny_model: Path, tmp_path: Path) -> None:
    """An MS that lies (3, -2) PAN pixels off is found and brought back."""
    truth = textured(192)
    pan, ms = observed(truth, 4, tmp_path, (3, -2))
    inner = (slice(None), slice(24, -24), slice(24, -24))
    errors = {}
    for mode in ("off", "check", "shift"):
        output = tmp_path / f"{mode}.tif"
        outcome = uknowpan(*("sharpen", pan, ms, "-o", output, "--coregister", mode, "--method", "mtf-glp"))
        assert outcome.code == 0, outcome.stderr
        warned = re.search(r"lies \+3\.\d+ rows and -[12]\.\d+ columns.*--coregister shift", outcome.stderr)
        assert (warned is not None) == (mode == "check")
        errors[mode] = np.abs(read(output).astype(float) - truth)[inner].mean()
        with rasterio.open(output) as dataset:
            tags = dataset.tags()
        # One sign: + is down and right, for where the MS lies and for how it was moved.
        applied = np.array(tags["UKNOWPAN_APPLIED_SHIFT"].split(), float)
        assert np.abs(applied - ((-3, 2) if mode == "shift" else (0, 0))).max() < 0.3
        assert ("UKNOWPAN_MEASURED_SHIFT" in tags) == (mode != "off")
        if mode != "off":
            measured = np.array(tags["UKNOWPAN_MEASURED_SHIFT"].split(), float)
            assert np.abs(measured - (3, -2)).max() < 0.3
    assert (applied == -np.round(measured)).all()  # whole pixels: nothing is resampled
    assert errors["check"] == errors["off"]
    assert errors["shift"] < 0.8 * errors["off"]


def test_resumed_with_a_shift(uknowpan: Run, tiny_model: Path, tmp_path: Path) -> None:
    """The shift that is measured anew is the one of the strips, and the tags still tell it."""
    pan, ms = observed(textured(128), 4, tmp_path, (3, -2))
    common = ("sharpen", pan, ms, "--model", tiny_model, "--tile", 32, "--coregister", "shift")
    unbroken, broken = tmp_path / "unbroken.tif", tmp_path / "broken.tif"
    assert uknowpan(*common, "-o", unbroken).code == 0
    before = STOPPING.format(strips=1, name="SIGKILL")
    assert spawn(*common, "-o", broken, before=before).code == -9
    outcome = uknowpan(*common, "-o", broken, "--resume")
    assert outcome.code == 0, outcome.stderr
    with rasterio.open(unbroken) as one, rasterio.open(broken) as other:
        assert one.read().tobytes() == other.read().tobytes()
        assert one.tags() == other.tags()
        assert "UKNOWPAN_MEASURED_SHIFT" in one.tags()


def test_one_sign_in_all_reports(uknowpan: Run, tiny_model: Path, tmp_path: Path) -> None:
    pan, ms = observed(textured(192), 4, tmp_path, (3, -2))
    output = tmp_path / "out.tif"
    facts = json.loads(uknowpan("info", pan, ms, "--model", tiny_model, "--json").stdout)
    assert np.abs(np.array(facts["shift_pan_pixels"]) - (3, -2)).max() < 0.3
    for words in (("--model", tiny_model, "--coregister", "off"), ("--method", "gsa")):
        common = ("sharpen", pan, ms, "-o", output, *words, "--overwrite", "--json")
        report = json.loads(uknowpan(*common).stdout)
        assert report["shift"] == facts["shift_pan_pixels"]
        assert report["correlation"] == facts["correlation"]
        assert report["applied_shift"] == [0, 0]
    report = json.loads(uknowpan(*common, "--coregister", "off").stdout)
    assert (report["shift"], report["correlation"]) == (None, None)
    report = json.loads(uknowpan(*common, "--coregister", "shift").stdout)
    assert report["shift"] == facts["shift_pan_pixels"]
    assert report["applied_shift"] == [round(-v) for v in report["shift"]]


def test_shift_that_nothing_tells(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(8, 8))
    arguments = (*("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif"), "--json")
    outcome = uknowpan(*arguments, "--model", tiny_model)
    assert json.loads(outcome.stdout)["shift"] is None
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert "UKNOWPAN_MEASURED_SHIFT" not in dataset.tags()


def test_shift_too_small_to_resample_for(uknowpan: Run, tmp_path: Path) -> None:
    pan, ms = observed(textured(192), 4, tmp_path)
    common = ("sharpen", pan, ms, "--method", "gsa", "-v", "-o")
    outcome = uknowpan(*common, tmp_path / "shift.tif", "--coregister", "shift")
    assert re.search(r"INFO: the MS lies .* too little to resample it for", outcome.stderr)
    assert uknowpan(*common, tmp_path / "off.tif", "--coregister", "off").code == 0
    assert (read(tmp_path / "shift.tif") == read(tmp_path / "off.tif")).all()


@pytest.mark.parametrize(("mode", "surveys"), [("off", 1), ("check", 1), ("shift", 2)])
@pytest.mark.parametrize("words", [("--method", "gsa"), ("--method", "gsa", "--dry-run"), ()])
def test_one_survey_is_enough(
    mode: str,
    surveys: int,
    words: tuple[str, ...],
    uknowpan: Run,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pan, ms = observed(textured(96), 4, tmp_path, (3, -2))
    calls = []
    scale = surveying.scene_scale
    monkeypatch.setattr(surveying, "scene_scale", lambda *a: calls.append(a) or scale(*a))
    arguments = (*("sharpen", pan, ms, "-o", tmp_path / "out.tif"), *words, "--coregister", mode)
    outcome = uknowpan(*arguments, *(() if words else ("--model", tiny_model)))
    assert outcome.code == 0, outcome.stderr
    assert len(calls) == surveys


def test_registered_pair_is_left_alone(uknowpan: Run, tmp_path: Path) -> None:
    pan, ms = observed(textured(192), 4, tmp_path)
    outcome = uknowpan("sharpen", pan, ms, "-o", tmp_path / "out.tif", "--method", "gsa")
    assert outcome.code == 0
    assert outcome.messages == ""


# Streams and settings ---------------------------------------------------------------------------


def test_stdout_is_the_path(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    output = tmp_path / "out.tif"
    common = ("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--overwrite")
    for words in ((), ("-v",), ("-vv",), ("-q",)):
        outcome = uknowpan(*common, *words)
        assert outcome.code == 0
        assert outcome.stdout == f"{output}\n"
        assert words != ("-q",) or outcome.stderr == ""


def test_progress_without_a_terminal(
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain lines, not a bar, and none with -q."""
    from uknowpan import console

    monkeypatch.setattr(console._plain_lines, "__defaults__", (0.0,))
    pair = make_pair()
    common = (
        *("sharpen", pair.pan, *pair.ms, "--tile", 32, "--model", tiny_model, "--overwrite"),
        *("-o", tmp_path / "out.tif"),
    )
    lines = uknowpan(*common).stderr.splitlines()
    assert lines[0].startswith("survey: ")
    assert lines[-2].startswith("sharpen: 0.008064/0.008064 Mpx, ")  # tiles overhang the scene
    assert re.search(r"out.tif: 80 x 96 pixels, 4 bands, by tiny in [\d.]+ s, [\d.e-]+ Mpx/s$", lines[-1])
    assert uknowpan(*common, "-q").stderr == ""


def test_log_json(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(ratio=4.5)
    log = tmp_path / "log.jsonl"
    common = (
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        *("--log-json", log, "-q"),
    )
    assert uknowpan(*common).code == 0
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(e["level"] == "info" and "4.5000" in e["message"] for e in entries)
    assert all(set(e) == {"time", "level", "message"} for e in entries)
    # The second run finds the output there, and the log says so too.
    assert uknowpan(*common).code == 4
    last = json.loads(log.read_text().splitlines()[-1])
    assert "exists and is kept" in last["message"]


def test_reader_that_goes_away(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """`uknowpan sharpen ... | true`: the result is there and nothing is complained about."""
    pair = make_pair()
    reading, writing = os.pipe()
    os.close(reading)
    outcome = spawn(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        before=f"import os\nos.dup2({writing}, 1)",
        inherited=(writing,),
    )
    os.close(writing)
    assert outcome.messages == ""
    assert read(tmp_path / "out.tif").shape == (4, 96, 80)


def test_model_from_the_environment(
    uknowpan: Run,
    make_pair: MakePair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = make_pair()
    output = tmp_path / "out.tif"
    monkeypatch.setenv("UKNOWPAN_MODEL", str(tiny_model))
    assert uknowpan("sharpen", pair.pan, *pair.ms, "-o", output).code == 0
    with rasterio.open(output) as dataset:
        assert dataset.tags()["UKNOWPAN_MODEL"] == "tiny"
    outcome = uknowpan("sharpen", pair.pan, *pair.ms, "-o", output, "-m", "generic", "--overwrite")
    assert outcome.code == 0
    with rasterio.open(output) as dataset:
        assert dataset.tags()["UKNOWPAN_MODEL"] == "generic"


def test_seed_changes_only_the_noise(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    results = []
    for seed in (0, 0, 2**63 + 7, -1):
        output = tmp_path / "out.tif"
        outcome = uknowpan(
            *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model, "--overwrite"),
            *("--output-dtype", "float32", "--seed", seed),
        )
        assert outcome.code == 0, outcome.stderr
        results.append(read(output))
    assert results[0].tobytes() == results[1].tobytes()
    assert (results[0] != results[2]).any()
    assert (results[2] != results[3]).any()


# A student of the published form ----------------------------------------------------------------


def write_paper_model(path: Path, bands: int, **changes: object) -> Path:
    """Random weights; windows matter to each other as in the published widths."""
    torch.manual_seed(1)
    config = StudentConfig(bands=bands, width=8, blocks=1, heads=2)
    card = {
        "name": "paper", "architecture": "fsa-s", "config": asdict(config), "stage": "fsa-s",
        "bands": bands, "ratios": [4], "registration": "pancollection",
        "residual_std": [0.05] * bands, "max_value": 2047.0,
    }  # fmt: skip
    save_checkpoint(path, FSAStudent(config), Card(**(card | changes)))
    return path


def test_paper_form_from_file_to_file(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Several tiles, odd sizes, nodata in both: as for the local model, and one warning."""
    holes, pan_holes = np.zeros((35, 27), bool), np.zeros((140, 108), bool)
    holes[8:12, 3:9] = pan_holes[130:, 90:] = True
    pair = make_pair(ms_shape=(35, 27), noise=40, nodata=0, holes=holes, pan_nodata=0, pan_holes=pan_holes)
    model = write_paper_model(tmp_path / "paper.safetensors", 4, residual_std=[1e-3] * 4)
    output = tmp_path / "out.tif"
    outcome = uknowpan(
        *("sharpen", pair.pan, *pair.ms, "-o", output, "--model", model, "--tile", 64, "--json"),
        *("--coregister", "off"),
    )
    assert outcome.code == 0, outcome.stderr
    said = outcome.messages
    assert re.fullmatch(
        r"uknowpan: WARNING: the result of model paper depends on how the scene is cut, here into "
        r"12 tiles that overlap by 32 PAN pixels \(--tile, --overlap\)\n",
        said,
    )
    assert json.loads(outcome.stdout)["tiles"] == 12
    with rasterio.open(output) as out, rasterio.open(pair.pan) as pan:
        assert (out.crs, out.transform, out.shape) == (pan.crs, pan.transform, pan.shape)
        assert out.dtypes == ("uint16",) * 4
        assert out.tags()["UKNOWPAN_MODEL"] == "paper"
        values, masked = out.read().astype(float), out.read_masks() == 0
    expected = holes.repeat(4, 0).repeat(4, 1) | pan_holes
    assert (masked == expected).all()
    near = pair.ms_values.astype(float).repeat(4, 1).repeat(4, 2)
    assert np.abs(values[:, ~expected] / near[:, ~expected] - 1).mean() < 0.05


def test_paper_form_shows_no_seams(uknowpan: Run, tmp_path: Path) -> None:
    """The mean step across a border of tiles, beyond what one tile would show, is no larger than
    elsewhere; without overlap it stands out."""
    truth = textured(256)
    truth[:, :, 128:] += 150  # tiles differ in their statistics
    pan, ms = observed(truth, 4, tmp_path)
    model = write_paper_model(tmp_path / "paper.safetensors", 3)
    images = {}
    for name, words in {
        "whole": ("--tile", 256),
        "cut": ("--tile", 128, "--overlap", 0),
        "blended": ("--tile", 128),
    }.items():
        outcome = uknowpan(
            *("sharpen", pan, ms, "-o", tmp_path / f"{name}.tif", "--model", model, *words),
            *("--output-dtype", "float32", "--coregister", "off"),
        )
        assert outcome.code == 0, outcome.stderr
        assert bool(outcome.messages) == (name != "whole")
        images[name] = read(tmp_path / f"{name}.tif").astype(float)

    def steps(name: str) -> np.ndarray:
        """From each column to the next, but for the edges of the scene."""
        change = np.diff(images[name] - images["whole"], axis=2)
        return np.abs(change.mean(1)).max(0)[8:-8]

    cut, blended = steps("cut"), steps("blended")
    borders = np.isin(np.arange(8, 247) + 1, [96, 128, 192, 224])
    assert cut[127 - 8] > 3 * np.delete(cut, 127 - 8).max()
    assert 0 < blended[borders].max() < 1.5 * blended[~borders].max()
    assert blended.max() < cut.max() / 2


def test_paper_form_killed_and_resumed(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Strips that blend into each other are finished as if nothing had happened."""
    pair = make_pair(ms_shape=(40, 12), noise=40)
    model = write_paper_model(tmp_path / "paper.safetensors", 4)
    arguments = ("sharpen", pair.pan, *pair.ms, "--model", model, "--tile", 64, "-o")
    unbroken, broken = tmp_path / "unbroken.tif", tmp_path / "broken.tif"
    assert uknowpan(*arguments, unbroken).code == 0
    before = STOPPING.format(strips=2, name="SIGKILL")
    assert spawn(*arguments, broken, before=before).code == -9
    outcome = uknowpan(*arguments, broken, "--resume")
    assert outcome.code == 0, outcome.stderr
    assert read(broken).tobytes() == read(unbroken).tobytes()


@pytest.mark.parametrize("ms_shape", [(1, 1), (2, 7), (9, 5)])
def test_paper_form_on_tiny_scenes(
    ms_shape: tuple[int, int], uknowpan: Run, make_pair: MakePair, tmp_path: Path
) -> None:
    pair = make_pair(ms_shape=ms_shape)
    model = write_paper_model(tmp_path / "paper.safetensors", 4)
    output = tmp_path / "out.tif"
    for words in ((), ("--tile", 16)):
        outcome = uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", output, "--model", model, "--overwrite"), *words)
        assert outcome.code == 0, outcome.stderr
        assert read(output).shape == (4, 4 * ms_shape[0], 4 * ms_shape[1])


@pytest.mark.parametrize(
    ("dtype", "words", "expected"),
    [
        ("uint16", (), {"ms": 4095, "source": "model"}),
        ("uint16", ("--bit-depth", 13), {"ms": 8191, "source": "option"}),
        ("uint8", (), {"source": "model"}),
    ],
)
def test_paper_form_has_a_full_scale(
    dtype: str,
    words: tuple[object, ...],
    expected: dict[str, object],
    uknowpan: Run,
    make_pair: MakePair,
    tmp_path: Path,
) -> None:
    """Values of the training data's bit depth count as there; others fill half of full scale."""
    pair = make_pair(dtype=dtype, photometric="MINISBLACK")
    model = write_paper_model(tmp_path / "paper.safetensors", 4, max_value=4095.0)
    output = tmp_path / "out.tif"
    outcome = uknowpan(*("sharpen", pair.pan, *pair.ms, "-o", output, "--model", model, "--json", *words))
    assert outcome.code == 0, outcome.stderr
    scale = json.loads(outcome.stdout)["scale"]
    assert scale | expected == scale
    assert scale["pan"] == scale["ms"]
    if dtype == "uint8":
        high = np.percentile(pair.ms_values, 99.5)
        assert scale["ms"] == pytest.approx(2 * high, rel=0.02)
    with rasterio.open(output) as dataset:
        assert dataset.tags()["UKNOWPAN_SCALE_MS"] == f"{scale['ms']:g}"
    if not words:
        facts = uknowpan("info", pair.pan, *pair.ms, "--model", model, "--json")
        assert json.loads(facts.stdout)["scale"] == scale


def test_paper_form_in_the_other_commands(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    model = write_paper_model(tmp_path / "paper.safetensors", 4)
    words = (pair.pan, *pair.ms, "--model", model)
    for command in (("models", "show"), ("info",)):
        shown = uknowpan(*command, model)
        assert shown.code == 0, shown.stderr
        assert "architecture: fsa-s\n" in shown.stdout
        assert "registration: pancollection\n" in shown.stdout
    assert uknowpan("models", "verify", model).code == 0
    forecast = uknowpan("sharpen", *words, "-o", tmp_path / "out.tif", "--dry-run")
    assert forecast.code == 0, forecast.stderr
    assert "1 of 96 x 80 PAN pixels, 40 pixels of context" in forecast.stdout
    outcome = uknowpan("sharpen", *words, "-o", tmp_path / "out.tif", "--uncertainty", tmp_path / "sigma.tif")
    assert outcome.code == 2
    assert "--uncertainty: paper has none; use a model of the form fsa-s-lite" in outcome.stderr
    outcome = uknowpan("sharpen", *words, "-o", tmp_path / "out.tif", "--bidx", "3,2,1")
    assert outcome.code == 5
    assert "the MS has 3 bands, but model paper was trained for 4" in outcome.stderr
    facts = json.loads(uknowpan("info", *words, "--bidx", "1,2", "--json").stdout)
    assert facts["model"]["fits"] is False


def test_teacher_is_told_from_student(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    model = write_paper_model(tmp_path / "teacher.safetensors", 4, architecture="fsa-t")
    outcome = uknowpan("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "o.tif", "--model", model)
    assert outcome.code == 5
    assert re.fullmatch(
        r"uknowpan: error: model paper is a teacher \(fsa-t\); distil a student .*\n",
        outcome.stderr,
    )
