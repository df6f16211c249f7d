"""Indices by reprojection of a result raster: the second judge of `evaluate` without a reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uknowpan.evaluation.reading import Scene
from uknowpan.models.metrics.images import gaussian_kernel, mtf_kernel
from uknowpan.models.metrics.reprojection import Displacement, Published, Registered, find_phases, measure
from uknowpan.models.registration.field import Registration
from uknowpan.surveying import Survey, survey
from uknowpan.tiling import ScenePair
from uknowpan.tiling.raster import Raster

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SecondJudge:
    """Scores by reprojection in three ways."""

    scores: dict[str, dict[str, float]]
    """Way -> index -> value; a way has no entry for an index that it does not define.

    "published": phases 0 to 3, MTF of the sensor. "registered": the measured displacement, the scene's own blur.
    "registered_nominal": the measured displacement, MTF of the sensor.
    """
    phases: list[list[int]]
    """(row, column) of each band in the published way."""
    sigma: float | None
    """Blur of the MS against the PAN, PAN pixels; None where the scene does not show it."""
    shift: list[float] | None
    """(dy, dx) of the MS against the PAN, PAN pixels, + is down and right; None where not measured."""

    def facts(self) -> dict[str, Any]:
        """All as JSON has it."""
        return {**self.scores, "phases": self.phases, "sigma_pan_pixels": self.sigma, "shift_pan_pixels": self.shift}


def second_judge(
    scene: Scene,
    fused: Raster,
    gains: Sequence[float],
    d_lambda_k: float,
    known: Survey | None = None,
    on_progress: Progress | None = None,
) -> SecondJudge:
    """Scores by reprojection.

    Args:
        scene: PAN and MS.
        fused: the result, on the PAN's grid.
        gains: MTF gain of each band.
        d_lambda_k: Khan's D_lambda of the result, for RQNR.
        known: survey of the scene with the displacement that was taken out; None: it is made.
        on_progress: called with (regions done, regions) in both passes together.

    Raises:
        ValueError: an MS of fewer than 32 x 32 pixels, or nothing left to measure.
    """
    images, ratio = scene.images(fused), scene.pair.ratio
    look = known or survey(scene.pair, coregister="auto")
    measured, taken = look.measured, look.field

    def stage(number: int) -> Progress:
        def show(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(number * total + done, 2 * total)

        return show

    phases, _ = find_phases(images, gains[0], on_progress=stage(0))
    nominal = [mtf_kernel(gain, ratio) for gain in gains]
    field = None if measured is None else _constant(-measured.shift[0], -measured.shift[1])
    if taken is not None:
        field = _field(taken, scene.pair)
    ways: dict[str, Published | Registered] = {"published": Published(gains, phases)}
    if measured is not None:
        ways["registered"] = Registered([gaussian_kernel(measured.sigma)] * len(gains), field)
    ways["registered_nominal"] = Registered(nominal, field)
    scores = {}
    for name, result in zip(ways, measure(images, list(ways.values()), on_progress=stage(1)), strict=True):
        values = asdict(result) | {"rqnr": result.rqnr(d_lambda_k), "rqnr_align": result.rqnr_align}
        del values["phases"]
        scores[name] = {index: value for index, value in values.items() if not math.isnan(value)}
    shift = None if measured is None else [-measured.shift[0], -measured.shift[1]]
    return SecondJudge(scores, [list(phase) for phase in phases], None if measured is None else measured.sigma, shift)


def _field(taken: Registration, pair: ScenePair) -> Displacement:
    """A displacement of the full scene's frame at the pixels of the pair's output."""
    first = [o * pair.ratio + inner for o, inner in zip(pair.origin, pair.offset, strict=True)]
    bands: list[int | None] = list(range(pair.bands)) if taken.own_bands else [None]

    def field(rows: Tensor, cols: Tensor) -> Tensor:
        down, across = (x.double().cpu().numpy() + start for x, start in zip((rows, cols), first, strict=True))
        return torch.from_numpy(np.stack([taken.at(down[:, None], across[None, :], band) for band in bands]))

    return field


def _constant(dy: float, dx: float) -> Displacement:
    """The same displacement everywhere."""

    def field(rows: Tensor, cols: Tensor) -> Tensor:
        return torch.tensor([dy, dx], dtype=torch.float64)[None, :, None, None].expand(1, 2, len(rows), len(cols))

    return field
