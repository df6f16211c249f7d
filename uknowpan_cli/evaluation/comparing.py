"""Several methods on one window of a scene, scored and ready to be shown side by side.

Two judges score them without a truth (`evaluate_without`). The third makes a truth as sharp as its PAN of the ground
around the window, and sharpens the pair that a coarser sensor would give (`sharp_pair`).
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import numpy as np
import rasterio
from scipy.ndimage import uniform_filter

from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.rasters import METHOD, evaluate_without
from uknowpan.evaluation.sharp import SharpPair, sharp_pair, sharp_result, sharp_scores
from uknowpan.loading import load_for
from uknowpan.models.checkpoints import find_checkpoint, read_card
from uknowpan.models.errors import ModelMismatch
from uknowpan.options import Method, SharpenOptions
from uknowpan.pictures import rgb_bands
from uknowpan.scenes import open_scene, prepared
from uknowpan.sharpening import sharpen_scene
from uknowpan.surveying import Survey, survey
from uknowpan.tiling import IncompatiblePair, ScenePair, Window, sample_windows
from uknowpan.tiling.raster import bounded_gdal_cache

log = logging.getLogger("uknowpan")

SIDE = 384
"""PAN pixels along a side of the window that is chosen."""

STEP = 32
"""Sides of the window are multiples of it: the tiles of Khan's D_lambda."""

BLOCK = 16
"""PAN pixels along a side of the blocks by which structure is judged."""

CANDIDATES = 25
"""Number of windows that are looked at."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Entry:
    """A result on the window."""

    name: str
    hrms: np.ndarray
    """(C, H, W) float32, NaN where invalid."""
    seconds: float
    """Seconds of the window, with the survey of the scene."""
    scores: dict[str, float]
    """Index -> value: HQNR, the indices by reprojection in the registered mode; where the ground allows a coarse
    twin, the scores on it, whose names begin with `sharp_`."""


@dataclass(frozen=True)
class Comparison:
    """PAN and results of several methods on one window of a scene."""

    scene: str
    pan: np.ndarray
    """(1, H, W) float32, NaN where invalid."""
    entries: list[Entry]
    bands: list[str]
    rgb: tuple[int, int, int]
    """Bands to show as red, green and blue, from 0."""
    ratio: int
    shift: tuple[float, float] | None
    """(dy, dx) of the MS against the PAN in PAN pixels, + is down and right; None: not measured."""
    bounds: tuple[float, float, float, float]
    """(left, bottom, right, top) of the window in the PAN's CRS."""
    truth: dict[str, float]
    """Scores of the coarse twin's truth; empty without a twin."""


def choose_window(pair: ScenePair, side: int = SIDE) -> Window:
    """The window of the output grid with the most fine detail.

    The score of a window is the median, over blocks of `BLOCK` PAN pixels, of the standard deviation of the PAN less
    its mean of 3 x 3 pixels, over the block's mean. Buildings and fields win; clouds are bright and rough but soft,
    and one bright roof does not decide.
    """
    height, width = (min(side, n) // STEP * STEP or n for n in pair.grid.shape)
    best, chosen = -1.0, Window(0, 0, height, width)
    size = max(side // pair.ratio, BLOCK)
    for sample in sample_windows(pair, CANDIDATES, size):
        tile = pair.read_frame(*sample)
        rows, cols = (n // BLOCK * BLOCK for n in tile.pan.shape[1:])
        pan = tile.pan[0]
        whole, fine = (
            x[:rows, :cols].reshape(rows // BLOCK, BLOCK, cols // BLOCK, BLOCK)
            for x in (pan, pan - uniform_filter(pan, 3))
        )
        detail = fine.std((1, 3)) / np.maximum(np.abs(whole.mean((1, 3))), 1e-12)
        score = float(np.median(detail)) * float(tile.valid.mean())
        if score > best:
            start = (sample.row * pair.ratio - pair.offset[0], sample.col * pair.ratio - pair.offset[1])
            row, col = (
                min(max(s, 0), n - part) for s, n, part in zip(start, pair.grid.shape, (height, width), strict=True)
            )
            best, chosen = score, Window(row, col, height, width)
    return chosen


def compare(
    pan: str, ms: Sequence[str], options: SharpenOptions, models: Sequence[str], on_progress: Progress
) -> Comparison:
    """Sharpen one window with every classical method and the models, and score the results without a truth.

    Args:
        pan, ms: the rasters.
        options: `bounds` is the window; without it `choose_window` decides.
        models: names of bundled models or checkpoint files.
        on_progress: called with (name of the method, methods done, methods).

    Raises:
        Error: see `uknowpan.sharpen`.
    """
    names = [read_card(find_checkpoint(model)).name for model in models]  # a wrong name costs no time
    with bounded_gdal_cache(), open_scene(pan, list(ms), options) as pair:
        if options.bounds is None:
            options = replace(options, bounds=tuple(pair.grid.cut(choose_window(pair)).bounds))
    todo = [(name, replace(options, method=name, model=None)) for name in get_args(Method)]
    todo += [(name, replace(options, method=None, model=model)) for name, model in zip(names, models, strict=True)]
    with bounded_gdal_cache(), open_scene(pan, list(ms), options) as pair, TemporaryDirectory() as folder:
        height, width = pair.frame_shape
        tile = pair.read_frame(0, 0, height, width)
        _, shown = pair.to_output(0, np.where(tile.pan_valid, tile.pan, np.nan))
        look = survey(pair, coregister="auto")
        twin = _twin(pair, look)
        entries = []
        for done, (name, wanted) in enumerate(todo):
            on_progress(name, done, len(todo))
            entries.append(_entry(pan, ms, name, wanted, str(Path(folder) / f"{done}.tif"), look, twin))
        on_progress("", len(todo), len(todo))
        descriptions = [text or f"band {number}" for number, text in enumerate(pair.meta.descriptions, 1)]
        colours = [c.name for c in pair.meta.colorinterp]
        return Comparison(
            Path(pan).name,
            shown,
            entries,
            descriptions,
            rgb_bands(pair.meta.descriptions, colours, pair.bands),
            pair.ratio,
            look.shift,
            pair.grid.bounds,
            {} if twin is None else _as_sharp(sharp_scores(twin.truth, twin)),
        )


def _twin(pair: ScenePair, look: Survey) -> SharpPair | None:
    """The coarse twin; None where the ground does not allow one."""
    try:
        return sharp_pair(pair, look)
    except IncompatiblePair as error:
        log.info("there is no coarse twin: %s", error)
        return None


def _as_sharp(scores: dict[str, float]) -> dict[str, float]:
    return {f"sharp_{index}": value for index, value in scores.items()}


def _entry(
    pan: str,
    ms: Sequence[str],
    name: str,
    options: SharpenOptions,
    target: str,
    look: Survey,
    twin: SharpPair | None,
) -> Entry:
    """A method's result on the window with its scores."""
    with prepared(pan, list(ms), target, options, partial(load_for, options)) as scene:
        report = sharpen_scene(scene)
    sharp = {}
    if twin is not None:
        with suppress(ModelMismatch):  # the method may not serve the twin's ratio
            sharp = _as_sharp(sharp_scores(sharp_result(scene.sharpener, twin), twin))
    with rasterio.open(target) as dataset:
        hrms = dataset.read(masked=True).astype(np.float32).filled(np.nan)
    bounds: Any = options.bounds
    same = {name: getattr(options, name) for name in ("pan_bidx", "bidx", "nodata", "ratio")}
    wanted = EvaluateOptions(**same, reprojection=True)
    results, judge = evaluate_without(target, pan, list(ms), wanted, bounds=bounds, known=look, brief=True)
    scores = {**sharp, "hqnr": results.mean(METHOD, "hqnr")}
    if judge is not None:
        scores |= next(iter(judge.scores.values()))
    return Entry(name, hrms, report.seconds, scores)
