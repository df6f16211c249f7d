"""`uknowpan sharpen` with a student of the published form, which is not local and knows its sensor."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasters import observed, textured
from running import STOPPING, MakePair, Outcome, Run, read, spawn

from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig

Sharpen = Callable[..., Outcome]


def write_paper_model(folder: Path, bands: int = 4, **changes: object) -> Path:
    """Random weights; windows influence each other as in the published widths."""
    torch.manual_seed(1)
    config = StudentConfig(bands=bands, width=8, blocks=1, heads=2)
    card = {
        "name": "paper", "architecture": "fsa-s", "config": asdict(config), "stage": "fsa-s",
        "bands": bands, "ratios": [4], "registration": "pancollection",
        "residual_std": [0.05] * bands, "max_value": 2047.0,
    }  # fmt: skip
    path = folder / "paper.safetensors"
    save_checkpoint(path, FSAStudent(config), Card(**(card | changes)))
    return path


def test_from_file_to_file(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """Several tiles, odd sizes, nodata in both: as for the local model, and one warning."""
    holes, pan_holes = np.zeros((35, 27), bool), np.zeros((140, 108), bool)
    holes[8:12, 3:9] = pan_holes[130:, 90:] = True
    pair = make_pair(ms_shape=(35, 27), noise=40, nodata=0, holes=holes, pan_nodata=0, pan_holes=pan_holes)
    model = write_paper_model(tmp_path, residual_std=[1e-3] * 4)
    outcome = sharpen(pair, "--model", model, "--tile", 64, "--json", "--coregister", "off")
    assert re.fullmatch(
        r"uknowpan: WARNING: the result of model paper depends on how the scene is cut, here into "
        r"12 tiles that overlap by 32 PAN pixels \(--tile, --overlap\)\n",
        outcome.messages,
    )
    assert json.loads(outcome.stdout)["tiles"] == 12
    with rasterio.open(tmp_path / "out.tif") as out, rasterio.open(pair.pan) as pan:
        assert (out.crs, out.transform, out.shape) == (pan.crs, pan.transform, pan.shape)
        assert out.dtypes == ("uint16",) * 4
        assert out.tags()["UKNOWPAN_MODEL"] == "paper"
        values, masked = out.read().astype(float), out.read_masks() == 0
    expected = holes.repeat(4, 0).repeat(4, 1) | pan_holes
    assert (masked == expected).all()
    near = pair.ms_values.astype(float).repeat(4, 1).repeat(4, 2)
    assert np.abs(values[:, ~expected] / near[:, ~expected] - 1).mean() < 0.05


def test_no_seams(sharpen: Sharpen, tmp_path: Path) -> None:
    """The mean step across a border of tiles, beyond that of one whole tile, is as elsewhere.

    Without overlap it stands out.
    """
    truth = textured(256)
    truth[:, :, 128:] += 150  # tiles differ in their statistics
    pair, model = observed(truth, 4, tmp_path), write_paper_model(tmp_path, 3)
    images = {}
    cuts = {"whole": ("--tile", 256), "cut": ("--tile", 128, "--overlap", 0), "blended": ("--tile", 128)}
    for name, words in cuts.items():
        output = tmp_path / f"{name}.tif"
        common = ("--model", model, "--output-dtype", "float32", "--coregister", "off")
        assert bool(sharpen(pair, *common, *words, output=output).messages) == (name != "whole")
        images[name] = read(output).astype(float)

    def steps(name: str) -> np.ndarray:
        """Steps from each column to the next, but for the edges of the scene."""
        change = np.diff(images[name] - images["whole"], axis=2)
        return np.abs(change.mean(1)).max(0)[8:-8]

    cut, blended = steps("cut"), steps("blended")
    borders = np.isin(np.arange(8, 247) + 1, [96, 128, 192, 224])
    assert cut[127 - 8] > 3 * np.delete(cut, 127 - 8).max()
    assert 0 < blended[borders].max() < 1.5 * blended[~borders].max()
    assert blended.max() < cut.max() / 2


def test_killed_and_resumed(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """Strips that blend into each other are finished as if nothing had happened."""
    pair = make_pair(ms_shape=(40, 12), noise=40)
    common = ("--model", write_paper_model(tmp_path), "--tile", 64)
    unbroken, broken = tmp_path / "unbroken.tif", tmp_path / "broken.tif"
    sharpen(pair, *common, output=unbroken)
    stop = STOPPING.format(strips=2, name="SIGKILL")
    assert spawn("sharpen", pair.pan, *pair.ms, "-o", broken, *common, before=stop).code == -9
    sharpen(pair, *common, "--resume", output=broken)
    assert read(broken).tobytes() == read(unbroken).tobytes()


@pytest.mark.parametrize("ms_shape", [(1, 1), (2, 7), (9, 5)])
def test_tiny_scenes(ms_shape: tuple[int, int], sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair, model = make_pair(ms_shape=ms_shape), write_paper_model(tmp_path)
    for words in ((), ("--tile", 16)):
        sharpen(pair, "--model", model, "--overwrite", *words)
        assert read(tmp_path / "out.tif").shape == (4, 4 * ms_shape[0], 4 * ms_shape[1])


@pytest.mark.parametrize(
    ("dtype", "words", "expected"),
    [
        ("uint16", (), {"ms": 4095, "source": "model"}),
        ("uint16", ("--bit-depth", 13), {"ms": 8191, "source": "option"}),
        ("uint8", (), {"source": "model"}),
    ],
)
def test_full_scale(
    dtype: str, words: tuple, expected: dict, uknowpan: Run, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path
) -> None:
    """Values of the training data's bit depth count as there; others fill half of full scale."""
    pair = make_pair(dtype=dtype, photometric="MINISBLACK")
    model = write_paper_model(tmp_path, max_value=4095.0)
    scale = json.loads(sharpen(pair, "--model", model, "--json", *words).stdout)["scale"]
    assert scale | expected == scale
    assert scale["pan"] == scale["ms"]
    if dtype == "uint8":
        assert scale["ms"] == pytest.approx(2 * np.percentile(pair.ms_values, 99.5), rel=0.02)
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.tags()["UKNOWPAN_SCALE_MS"] == f"{scale['ms']:g}"
    if not words:
        facts = uknowpan("info", pair.pan, *pair.ms, "--model", model, "--json")
        assert json.loads(facts.stdout)["scale"] == scale


def test_other_commands(uknowpan: Run, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair, model = make_pair(), write_paper_model(tmp_path)
    for command in (("models", "show"), ("info",)):
        shown = uknowpan(*command, model)
        assert shown.code == 0, shown.stderr
        assert "architecture: fsa-s\n" in shown.stdout
        assert "registration: pancollection\n" in shown.stdout
    assert uknowpan("models", "verify", model).code == 0
    forecast = sharpen(pair, "--model", model, "--dry-run")
    assert "1 of 96 x 80 PAN pixels, 72 pixels of context" in forecast.stdout
    sharpen(pair, "--model", model, "--uncertainty", tmp_path / "sigma.tif", code=2).fails(
        2, "--uncertainty: paper has none; use a model of the form fsa-s-lite"
    )
    sharpen(pair, "--model", model, "--bidx", "3,2,1", code=5).fails(
        5, "the MS has 3 bands, but model paper was trained for 4"
    )
    facts = uknowpan("info", pair.pan, *pair.ms, "--model", model, "--bidx", "1,2", "--json")
    assert json.loads(facts.stdout)["model"]["fits"] is False


def test_teacher_is_no_student(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    model = write_paper_model(tmp_path, architecture="fsa-t")
    sharpen(make_pair(), "--model", model, code=5).fails(5, r"model paper is a teacher \(fsa-t\); distil a student ")
