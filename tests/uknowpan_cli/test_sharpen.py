"""`uknowpan sharpen` from file to file: kinds of scenes, options, messages."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio._env import get_gdal_config
from rasterio.enums import ColorInterp
from rasters import observed, textured
from running import MakePair, Outcome, Run, read, spawn, write_tiny_model

import uknowpan
from uknowpan import loading, surveying

Sharpen = Callable[..., Outcome]


def test_grid_metadata_and_tags(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    names = ["blue", "green", "red", "nir"]
    colours = [ColorInterp.blue, ColorInterp.green, ColorInterp.red, ColorInterp.undefined]
    pair = make_pair(nodata=0, descriptions=names, colorinterp=colours, tags={"ACQUIRED": "2024-06-01"})
    with rasterio.open(pair.ms[0], "r+") as dataset:
        dataset.scales, dataset.offsets = (0.0001,) * 4, (-0.1,) * 4
        dataset.units = ["reflectance"] * 4
        dataset.update_tags(2, WAVELENGTH="560")
    sharpen(pair, "--tile", 64, "--seed", 11, "--steps", 2, "--co", "COMPRESS=ZSTD,ZSTD_LEVEL=3")
    with rasterio.open(tmp_path / "out.tif") as out, rasterio.open(pair.pan) as pan, rasterio.open(pair.ms[0]) as ms:
        assert (out.crs, out.transform, out.shape) == (pan.crs, pan.transform, pan.shape)
        assert out.dtypes == ms.dtypes
        assert out.descriptions == tuple(names)
        assert out.colorinterp == ms.colorinterp
        assert (out.scales, out.offsets, out.units) == (ms.scales, ms.offsets, ms.units)
        assert out.nodata == 0
        assert out.tags(2)["WAVELENGTH"] == "560"
        assert out.compression.name == "zstd"
        tags = out.tags()
    assert tags["ACQUIRED"] == "2024-06-01"
    assert tags["UKNOWPAN_MODEL"] == "tiny"
    assert len(tags["UKNOWPAN_SHA256"]) == 64
    assert (tags["UKNOWPAN_SEED"], tags["UKNOWPAN_STEPS"]) == ("11", "2")
    assert (tags["UKNOWPAN_RATIO"], tags["UKNOWPAN_APPLIED_SHIFT"]) == ("4", "0.000 0.000")
    assert tags["UKNOWPAN_PAN"] == "scene_pan.tif"
    assert float(tags["UKNOWPAN_SCALE_MS"]) > 0
    assert tags["UKNOWPAN_VERSION"]


def test_json_report(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(dtype="float32", nodata=float("nan"), ms_shape=(24, 24))
    outcome = sharpen(pair, "--tile", 48, "--json", "--max-value", 4000)
    report = json.loads(outcome.stdout, parse_constant=pytest.fail)
    assert report["output"] == str(tmp_path / "out.tif")
    assert (report["width"], report["height"], report["bands"], report["ratio"]) == (96, 96, 4, 4)
    assert (report["tiles"], report["method"], report["uncertainty"]) == (4, "tiny", None)
    assert report["scale"] == {"pan": 4000.0, "ms": 4000.0, "source": "option"}


def test_uncertainty_and_preview(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    holes = np.zeros((24, 20), bool)
    holes[:6, :5] = True
    sigma, preview = tmp_path / "sigma.tif", tmp_path / "look.png"
    sharpen(make_pair(nodata=0, holes=holes), "--tile", 64, "--uncertainty", sigma, "--preview", preview)
    with rasterio.open(sigma) as dataset, rasterio.open(tmp_path / "out.tif") as image:
        assert dataset.dtypes == ("float32",) * 4
        assert (dataset.transform, dataset.crs) == (image.transform, image.crs)
        values, valid = dataset.read(), image.read()[0] != 0
    assert (values[:, valid] > 0).all()
    assert np.isfinite(values[:, valid]).all()
    assert np.isnan(values[:, ~valid]).all()
    assert (~valid).sum() == holes.sum() * 16
    with rasterio.open(preview) as picture:
        assert (picture.driver, picture.shape) == ("PNG", (96, 80))


def test_uncertainty_scales_with_digital_numbers(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """1-sigma is in the units of the output: ten times the numbers, ten times the sigma."""
    pair = make_pair(dtype="float32")
    sigmas = []
    for factor in (1, 10):
        for path in (pair.pan, pair.ms[0]):
            with rasterio.open(path, "r+") as dataset:
                dataset.write(dataset.read() * factor)
        sigma = tmp_path / f"sigma{factor}.tif"
        sharpen(pair, "--uncertainty", sigma, "--overwrite")
        sigmas.append(read(sigma))
    np.testing.assert_allclose(sigmas[1], 10 * sigmas[0], rtol=1e-3)


def test_coverage(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """90 % intervals are as many 1-sigmas wide as the model's card declares, and the file declares them."""
    pair, written = make_pair(noise=30), {}
    model = write_tiny_model(tmp_path / "wide.safetensors", sigmas_90=2.5)
    for coverage in (68, 90):
        path = tmp_path / f"{coverage}.tif"
        words = ("--model", model, "--uncertainty", path, "--coverage", coverage, "--consistency", 1)
        sharpen(pair, *words, output=tmp_path / f"image{coverage}.tif")
        with rasterio.open(path) as dataset:
            written[coverage] = dataset.read(), dataset.descriptions[0], dataset.tags()["UKNOWPAN_COVERAGE"]
    np.testing.assert_allclose(written[90][0], 2.5 * written[68][0], rtol=1e-6)
    assert [w[1:] for w in written.values()] == [("band 1 1-sigma", "68"), ("band 1 half-width 90 %", "90")]
    assert read(tmp_path / "image68.tif").tobytes() == read(tmp_path / "image90.tif").tobytes()
    other = uknowpan.sharpen_array(pair.pan_values, pair.ms_values, model=model, uncertainty=True, coverage=90)[1]
    assert other.shape == written[90][0].shape


@pytest.mark.parametrize("method", ["bicubic", "brovey", "gsa", "mtf-glp", "awlp"])
def test_every_method(method: str, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    sharpen(pair, "--method", method, "--tile", 64)
    with rasterio.open(tmp_path / "out.tif") as dataset:
        values, tags = dataset.read().astype(float), dataset.tags()
    assert tags["UKNOWPAN_METHOD"] == method
    means = values.reshape(4, 24, 4, 20, 4).mean((2, 4))
    assert np.abs(means / pair.ms_values - 1).mean() < 0.05


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
@pytest.mark.parametrize("with_nodata", [False, True])
def test_dtypes(dtype: str, with_nodata: bool, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    nodata = {"uint8": 0, "uint16": 0, "int16": -9999, "float32": -3.4e38}[dtype]
    holes, pan_holes = np.zeros((24, 20), bool), np.zeros((96, 80), bool)
    holes[8:12, 3:9] = pan_holes[90:, 70:] = True
    options = {"nodata": nodata, "holes": holes, "pan_nodata": nodata, "pan_holes": pan_holes} if with_nodata else {}
    pair = make_pair(dtype=dtype, **options)
    sharpen(pair, "--tile", 64)
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.dtypes == (dtype,) * 4
        values = dataset.read().astype(float)
        masked = dataset.read_masks() == 0
    expected = (holes.repeat(4, 0).repeat(4, 1) | pan_holes) & with_nodata
    assert (masked == expected).all()
    # Valid values stay near the MS: nodata has not bled into them.
    near = pair.ms_values.astype(float).repeat(4, 1).repeat(4, 2)
    good = ~expected
    assert np.abs(values[:, good] / near[:, good] - 1).max() < 0.6
    assert np.isfinite(values[:, good]).all()


@pytest.mark.parametrize("bands", [1, 3, 8])
def test_band_counts(bands: int, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    sharpen(make_pair(bands=bands), "--tile", 64)
    assert read(tmp_path / "out.tif").shape == (bands, 96, 80)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6])
def test_ratios(ratio: int, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(ratio=ratio, ms_shape=(17, 13))
    sharpen(pair, "--tile", 64)
    values = read(tmp_path / "out.tif").astype(float)
    assert values.shape == (4, 17 * ratio, 13 * ratio)
    means = values.reshape(4, 17, ratio, 13, ratio).mean((2, 4))
    assert np.abs(means / pair.ms_values - 1).max() < 0.25


def test_separate_files_and_band_choice(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """Bands in separate files, a stack, and a stack with --bidx give the same pixels."""
    stack, files = make_pair(name="a"), make_pair(name="b", separate=True)
    spellings: dict[str, Sequence[str]] = {
        "bidx": [*stack.ms, "--bidx", "3,1"],
        "specs": [f"{stack.ms[0]},band=3", f"{stack.ms[0]},band=1"],
        "files": [files.ms[2], files.ms[0]],
    }
    results = {}
    for name, words in spellings.items():
        output = tmp_path / f"{name}.tif"
        outcome = uknowpan("sharpen", stack.pan, *words, "-o", output, "--model", tiny_model, "--tile", 64)
        assert outcome.code == 0, outcome.stderr
        results[name] = read(output)
    assert results["bidx"].shape[0] == 2
    assert (results["bidx"] == results["specs"]).all()
    assert (results["bidx"] == results["files"]).all()


def test_output_options(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    sharpen(make_pair(), "-f", "cog", "--output-dtype", "float32", "--co", "COMPRESS=LZW", "--nodata", "-1")
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert (dataset.compression.name, dataset.nodata, dataset.dtypes[0]) == ("lzw", -1, "float32")
        assert (dataset.read() % 1 > 0).any()


def test_max_value_clips(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    for words in (("--max-value", 1023), ("--bit-depth", 10)):
        sharpen(pair, *words, "--overwrite")
        assert read(tmp_path / "out.tif").max() == 1023


def test_max_value_keeps_negative_data(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """Reflectance over water is below 0 after atmospheric correction."""
    pair = make_pair(dtype="float32")
    with rasterio.open(pair.ms[0], "r+") as dataset:
        dataset.write(-dataset.read())
    sharpen(pair, "--max-value", 4000)
    assert read(tmp_path / "out.tif").max() < 0


@pytest.mark.parametrize(
    ("dtype", "factor", "wanted", "warning"),
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
    dtype: str, factor: float, wanted: str, warning: str | None, sharpen: Sharpen, make_pair: MakePair
) -> None:
    pair = make_pair(dtype=dtype, photometric="MINISBLACK")  # or four 8-bit bands are RGBA
    if factor != 1:
        with rasterio.open(pair.ms[0], "r+") as dataset:
            dataset.write((dataset.read() * factor).astype(dtype))
    messages = sharpen(pair, "--output-dtype", wanted).messages
    assert re.fullmatch("" if warning is None else rf"uknowpan: WARNING: .*{warning}.*\n", messages)


def test_guesses_are_warned_of_and_remarks_are_not(sharpen: Sharpen, make_pair: MakePair) -> None:
    guessed = make_pair(name="a", georeferenced=(False, False))
    assert re.match(r"uknowpan: WARNING: \S", sharpen(guessed).stderr)
    assert sharpen(make_pair(name="b", ratio=4.5), "--overwrite").messages == ""


def test_options_without_effect_on_a_method(
    sharpen: Sharpen, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that pick a model are refused (test_bad_inputs), but its variable is no choice."""
    monkeypatch.setenv("UKNOWPAN_MODEL", "generic")
    pair, common = make_pair(), ("--method", "gsa", "--overwrite")
    assert sharpen(pair, *common, "--device", "cpu").messages == sharpen(pair, *common).messages == ""
    outcome = sharpen(pair, *common, "--seed", 3, "--dtype", "bf16", "--softness", "ms")
    assert outcome.messages.splitlines() == [
        f"uknowpan: WARNING: {option} changes nothing for --method gsa"
        for option in ("--seed", "--softness", "--dtype")
    ]


def test_softness(uknowpan: Run, sharpen: Sharpen, tmp_path: Path) -> None:
    pair = observed(textured(256), 4, tmp_path)
    facts = json.loads(uknowpan("info", pair.pan, *pair.ms, "--json").stdout)
    assert 0.2 < facts["softness_ms_pixels"] < 0.9
    sharpness, tags = {}, {}
    for softness in ("0.25", "0.8", "ms", None):
        words = [] if softness is None else ["--softness", softness]
        sharpen(pair, "--model", "generic", *words, "--overwrite")
        with rasterio.open(tmp_path / "out.tif") as out:
            tags[softness] = out.tags()
            sharpness[softness] = np.abs(np.diff(out.read().astype(float))).mean()
    assert sharpness["0.25"] > sharpness[None] > sharpness["0.8"]
    assert sharpness["0.25"] >= sharpness["ms"] >= sharpness["0.8"]
    tagged = {softness: t["UKNOWPAN_SOFTNESS"] for softness, t in tags.items()}
    assert tagged == {"0.25": "0.25", "0.8": "0.8", "ms": "ms", None: "0.3"}
    assert [s for s in tags if "UKNOWPAN_MS_SOFTNESS" in tags[s]] == ["ms"]  # others do not pay for it
    measured = float(tags["ms"]["UKNOWPAN_MS_SOFTNESS"])
    assert measured == pytest.approx(facts["softness_ms_pixels"], abs=1e-3)


def test_gdal_keeps_few_blocks(
    uknowpan: Run, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GDAL's default is 5 % of the machine's memory, which no forecast includes."""
    seen = []
    survey = surveying.scene_scale

    def watched(*arguments: object) -> surveying.SceneScale:
        seen.append(get_gdal_config("GDAL_CACHEMAX"))
        return survey(*arguments)

    monkeypatch.setattr(surveying, "scene_scale", watched)
    pair = make_pair()
    sharpen(pair)
    assert uknowpan("info", pair.pan, *pair.ms).code == 0
    assert uknowpan("demo", "--out", tmp_path / "demo", "--size", 128, "-q").code == 0
    assert len(seen) >= 3
    assert set(seen) == {16 * 2**20}


def test_batch_size_by_the_memory_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, batch in ((None, 1), (10**11, 60), (10**12, 64), (10**8, 1)):  # None: no GPU
        monkeypatch.setattr(loading, "free_memory", lambda device, free=free: free)
        assert loading.tiles_at_once("any", 10**9) == batch
    monkeypatch.undo()
    assert loading.free_memory("cpu") is None


def test_model_from_the_environment(
    uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, output = make_pair(), tmp_path / "out.tif"
    monkeypatch.setenv("UKNOWPAN_MODEL", str(tiny_model))
    for words, name in (((), "tiny"), (("-m", "generic"), "generic")):
        assert uknowpan("sharpen", pair.pan, *pair.ms, "-o", output, *words, "--overwrite").code == 0
        with rasterio.open(output) as dataset:
            assert dataset.tags()["UKNOWPAN_MODEL"] == name


def test_seed_changes_only_the_noise(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair, results = make_pair(), []
    for seed in (0, 0, 2**63 + 7, -1):
        sharpen(pair, "--overwrite", "--output-dtype", "float32", "--seed", seed)
        results.append(read(tmp_path / "out.tif"))
    assert results[0].tobytes() == results[1].tobytes()
    assert (results[0] != results[2]).any()
    assert (results[2] != results[3]).any()


def test_no_torch_without_a_network(make_pair: MakePair, tmp_path: Path) -> None:
    """Fault: PyTorch's two seconds were paid where no network runs."""
    pair = make_pair()
    scene = (pair.pan, *pair.ms)
    method = ("sharpen", *scene, "--method", "mtf-glp", "-o", tmp_path / "out.tif")
    for command in (("info", *scene), (*method, "--dry-run"), method):
        done = spawn(*command, before="import sys\nsys.modules['torch'] = None")
        assert (done.code, done.messages.count("rror")) == (0, 0), done
