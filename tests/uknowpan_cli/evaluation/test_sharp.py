"""`uknowpan evaluate --protocol sharp`: truths as sharp as the PAN, made of a pair."""

import json
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from rasters import write_raster
from running import Run
from scipy.ndimage import gaussian_filter

from uknowpan.evaluation.sharp import SharpPair, sharp_pair, sharp_result, sharp_scores
from uknowpan.models.sharpeners import ClassicalSharpener
from uknowpan.surveying import survey
from uknowpan.tiling import open_pair


def _write(folder: Path, pan: np.ndarray, bands: list[np.ndarray], nodata: float | None = None) -> list[str]:
    """A pair of ratio 4."""
    write_raster(folder / "pan.tif", pan[None].astype(np.float32), Affine(1, 0, 0, 0, -1, 0), nodata=nodata)
    write_raster(folder / "ms.tif", np.stack(bands).astype(np.float32), Affine(4, 0, 0, 0, -4, 0))
    return [str(folder / "pan.tif"), str(folder / "ms.tif")]


def _pair(folder: Path, side: int = 1280, blur: float = 2.0, hole: bool = False) -> list[str]:
    """Ground whose second band is twice the first, and an MS of that blur in PAN pixels."""
    ground = gaussian_filter(np.random.default_rng(1).normal(size=(side, side)), 3) * 1000 + 500
    low = gaussian_filter(ground, blur).reshape(side // 4, 4, side // 4, 4).mean((1, 3))
    if hole:
        ground[:200, :200] = -9999
    return _write(folder, ground, [low, 2 * low], -9999 if hole else None)


def _twin(files: list[str]) -> SharpPair:
    with open_pair(*files) as pair:
        return sharp_pair(pair, survey(pair))


def test_methods_and_a_model_stand_beside_the_truth(tmp_path: Path, uknowpan: Run) -> None:
    """Bands that are multiples of the PAN: GSA comes close to the truth, an enlarged MS does not."""
    run = ("evaluate", "--protocol", "sharp", *_pair(tmp_path))
    outcome = uknowpan(*run, "--csv", tmp_path / "t.csv", "--json")
    assert outcome.code == 0, outcome.stderr
    said = json.loads(outcome.stdout)
    scores = {method: {index: one["mean"] for index, one in own.items()} for method, own in said["scores"].items()}
    assert list(scores) == ["truth", "bicubic", "brovey", "gsa", "mtf-glp", "awlp", "generic"]
    assert scores["truth"]["ergas"] == 0 < scores["gsa"]["ergas"] < 0.2 * scores["bicubic"]["ergas"]
    assert scores["truth"]["d_rho"] < scores["bicubic"]["d_rho"]
    assert said["kind"] == "sharp" and min(said["truth_size"]) >= 144
    assert (tmp_path / "t.csv").read_text().startswith("method,image,ergas,sam,d_rho,d_rho_excess,colour_grain\n")
    text = uknowpan(*run, "-m", "generic", "--softness", 0.5).stdout
    assert "against a truth as sharp as the PAN" in text and "(best truth's)" in text


def test_a_hole_leaves_the_largest_rectangle_without_it(tmp_path: Path) -> None:
    """The ground without the hole gives a truth; before, compare showed no twin of such a scene."""
    twin = _twin(_pair(tmp_path, hole=True))
    assert float(twin.truth.min()) > 0 and float(twin.pan.min()) > 0
    scores = {name: sharp_scores(sharp_result(ClassicalSharpener(name), twin), twin) for name in ("gsa", "bicubic")}
    assert scores["gsa"]["ergas"] < 0.2 * scores["bicubic"]["ergas"]


@pytest.mark.parametrize(
    ("side", "blur", "sentence"),
    [
        (160, 2.0, "gives no truth as sharp as its PAN: it is too small"),
        (384, 2.0, "fewer than 48 along a side; give a larger scene"),
        (640, 6.0, "its MS is too soft: its blur is 0.94 MS pixels or more"),
    ],
)
def test_a_pair_that_gives_no_truth(tmp_path: Path, uknowpan: Run, side: int, blur: float, sentence: str) -> None:
    outcome = uknowpan("evaluate", "--protocol", "sharp", *_pair(tmp_path, side, blur))
    assert outcome.code == 3 and outcome.stdout == ""
    assert outcome.stderr.count("\n") == 1 and sentence in outcome.stderr


def test_unlike_images_give_no_truth(tmp_path: Path, uknowpan: Run) -> None:
    rng = np.random.default_rng(0)
    files = _write(tmp_path, rng.uniform(1, 9, (512, 512)), [rng.uniform(1, 9, (128, 128))])
    outcome = uknowpan("evaluate", "--protocol", "sharp", *files)
    assert outcome.code == 3 and "resemble each other too little to make a truth" in outcome.stderr


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--protocol", "sharp", "p.tif"], "needs a pair: uknowpan evaluate --protocol sharp PAN MS"),
        (["--protocol", "sharp", "p.tif", "m.tif", "--cut", "3"], "--cut does not go with --protocol sharp"),
        (["p.tif", "m.tif"], "One TARGET can be scored at a time, not 2"),
    ],
)
def test_what_does_not_go_together(uknowpan: Run, words: list[str], sentence: str) -> None:
    outcome = uknowpan("evaluate", *words)
    assert outcome.code == 2 and sentence in outcome.stderr
