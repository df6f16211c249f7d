"""An MS that does not lie on its PAN: how much of it the student bears, and what is regained."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from affine import Affine
from rasterio.windows import Window
from running import Run

from uknowpan.datasets.synthetic import load_demo_scene, write_scene
from uknowpan.models.metrics.indices import ergas

OFF = 2
"""PAN pixels down and right, half an MS pixel: the worst place to interpolate at."""
SIZE, RIM = 240, 32
"""PAN pixels: of the PAN, and how far the MS reaches beyond it, so that no side of it is lost."""
REGAINED = 1.4
"""Bound of ERGAS after the shift is removed, over ERGAS of the scene in its place."""

Pair = tuple[Path, Path, Path]
"""PAN, MS and truth."""


def write_pair(folder: Path, off: int) -> Pair:
    """The demo scene, its PAN and truth taken `off` pixels beyond the place that they claim."""
    paths = write_scene(load_demo_scene(SIZE + 2 * RIM), folder)
    for path in (paths.pan, paths.truth):
        with rasterio.open(path) as whole:
            profile, window = whole.profile, Window(RIM + off, RIM + off, SIZE, SIZE)
            values = whole.read(window=window)
            place = whole.transform @ Affine.translation(RIM, RIM)
        profile |= {"transform": place, "width": SIZE, "height": SIZE}
        with rasterio.open(path, "w", **profile) as dataset:
            dataset.write(values)
    return paths.pan, paths.ms, paths.truth


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    """The scene in its place, and with PAN and MS off each other."""
    folder = tmp_path_factory.mktemp("pairs")
    return write_pair(folder / "good", 0), write_pair(folder / "bad", OFF)


def error(uknowpan: Run, pair: Pair, *words: str) -> tuple[float, dict[str, Any]]:
    """ERGAS against the truth, the border left out, and the report."""
    pan, ms, truth = pair
    target = pan.with_name("out.tif")
    outcome = uknowpan("sharpen", pan, ms, "-o", target, *words, "--overwrite", "--json")
    assert outcome.code == 0, outcome.stderr
    images = []
    for path in (target, truth):
        with rasterio.open(path) as dataset:
            images.append(torch.from_numpy(dataset.read().astype(float))[:, 16:-16, 16:-16])
    return float(ergas(*images)), json.loads(outcome.stdout)


def test_coregistration_regains_most_of_it(uknowpan: Run, pairs: tuple[Pair, Pair]) -> None:
    good, bad = pairs
    whole, _ = error(uknowpan, good, "--coregister", "shift")
    lost, report = error(uknowpan, bad, "--coregister", "off")
    regained, moved = error(uknowpan, bad, "--coregister", "shift")
    assert report["applied_shift"] == [0, 0]
    assert np.abs(np.array(moved["shift"]) - OFF).max() < 0.25
    assert lost > 1.15 * whole
    assert regained < min(REGAINED * whole, 0.95 * lost)


def test_the_student_bears_it_better_than_classical_methods(uknowpan: Run, pairs: tuple[Pair, Pair]) -> None:
    """In ERGAS, and in what the shift adds to it."""
    good, bad = pairs
    grown = {}
    for words in ((), ("--method", "gsa"), ("--method", "brovey")):
        before, _ = error(uknowpan, good, *words, "--coregister", "off")
        after, _ = error(uknowpan, bad, *words, "--coregister", "off")
        grown[words] = (after, after - before)
    student = grown.pop(())
    for classical in grown.values():
        assert student[0] < 0.85 * classical[0]
        assert student[1] < 0.9 * classical[1]
