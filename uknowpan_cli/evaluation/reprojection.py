"""Indices by reprojection: the second judge of `evaluate`, for rasters and for images of test files."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uknowpan.evaluation.reading import Scene
from uknowpan.models.blur import Psf, estimate_psf
from uknowpan.models.metrics.images import Images, gaussian_kernel, mtf_kernel, whole_images
from uknowpan.models.metrics.reprojection import Displacement, Published, Registered, find_phases, measure
from uknowpan.models.registration import register
from uknowpan.models.registration.field import Registration
from uknowpan.surveying import Survey, survey
from uknowpan.tiling.raster import Raster

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SecondJudge:
    """Scores of a result by reprojection, in up to three ways."""

    scores: dict[str, dict[str, float]]
    """Way -> index -> value; a way has no entry for an index that it does not define.

    "published": phases 0 to 3, MTF of the sensor. "registered": the measured displacement, the scene's own blur.
    "registered_nominal": the measured displacement, MTF of the sensor.
    """
    phases: list[list[int]] | None
    """(row, column) of each band in the published way; None where that way is left out."""
    sigma: float | None
    """Blur of the MS against the PAN, PAN pixels; None where the scene does not show it."""
    shift: list[float] | None
    """(dy, dx) of the MS against the PAN, PAN pixels, + is down and right; None where not measured."""

    def facts(self) -> dict[str, Any]:
        """All as JSON has it."""
        return {**self.scores, **self.place()}

    def place(self) -> dict[str, Any]:
        """The measured place and blur of the MS as JSON has them."""
        return {"phases": self.phases, "sigma_pan_pixels": self.sigma, "shift_pan_pixels": self.shift}


@dataclass(frozen=True)
class Ways:
    """The ways to bring results onto their PAN and MS; the same for all results of a scene."""

    modes: dict[str, Published | Registered]
    psf: Psf | None
    """Blur and shift of the scene; None where they cannot be measured."""

    def judge(
        self, images: Images, d_lambda_k: float | None = None, on_progress: Progress | None = None
    ) -> SecondJudge:
        """Scores of a result.

        Args:
            images: result, PAN and MS.
            d_lambda_k: Khan's D_lambda of the result; None: there is no RQNR.
            on_progress: called with (regions done, regions).

        Raises:
            ValueError: an MS of fewer than 32 x 32 pixels, or nothing left to measure.
        """
        scores = {}
        measured = measure(images, list(self.modes.values()), on_progress=on_progress)
        for name, result in zip(self.modes, measured, strict=True):
            values = asdict(result) | {"rqnr_align": result.rqnr_align}
            if d_lambda_k is not None:
                values["rqnr"] = result.rqnr(d_lambda_k)
            del values["phases"]
            scores[name] = {index: value for index, value in values.items() if not math.isnan(value)}
        published = self.modes.get("published")
        phases = [list(phase) for phase in published.phases] if isinstance(published, Published) else None
        shift = None if self.psf is None else [-value for value in self.psf.shift]
        return SecondJudge(scores, phases, None if self.psf is None else self.psf.sigma, shift)


def ways_of_image(pan: Tensor, ms: Tensor, gains: Sequence[float], *, brief: bool = False) -> Ways:
    """The ways for an image of a test file, whose blur and displacement are measured on the image itself.

    Args:
        pan, ms: (1, H, W) and (C, h, w), digital numbers.
        gains: MTF gain of each band.
        brief: see `second_judge`.
    """
    images = whole_images(pan, pan, ms)
    psf = estimate_psf([(pan.float(), ms.float())], images.ratio)
    taken = register(pan.float().numpy(), ms.float().numpy(), images.ratio)
    field = None if taken.model == "none" else _field(taken, [0, 0])
    return _ways(images, gains, psf if psf.correlation > 0 else None, field, brief=brief)


def second_judge(
    scene: Scene,
    fused: Raster,
    gains: Sequence[float],
    d_lambda_k: float,
    known: Survey | None = None,
    *,
    brief: bool = False,
    on_progress: Progress | None = None,
) -> SecondJudge:
    """Scores of a raster by reprojection.

    Args:
        scene: PAN and MS.
        fused: the result, on the PAN's grid.
        gains: MTF gain of each band.
        d_lambda_k: Khan's D_lambda of the result, for RQNR.
        known: survey of the scene with the displacement that was taken out; None: it is made.
        brief: the registered way alone, by the scene's own blur where that is measured.
        on_progress: called with (regions done, regions) in all passes together.

    Raises:
        ValueError: an MS of fewer than 32 x 32 pixels, or nothing left to measure.
    """
    passes = 1 if brief else 2

    def stage(number: int) -> Progress:
        def show(done: int, total: int) -> None:
            if on_progress is not None:
                on_progress(number * total + done, passes * total)

        return show

    images = scene.images(fused)
    look = known or survey(scene.pair, coregister="auto")
    first = [o * scene.pair.ratio + inner for o, inner in zip(scene.pair.origin, scene.pair.offset, strict=True)]
    field = None if look.field is None else _field(look.field, first)
    ways = _ways(images, gains, look.measured, field, brief=brief, on_progress=stage(0))
    return ways.judge(images, d_lambda_k, stage(passes - 1))


def _ways(
    images: Images,
    gains: Sequence[float],
    psf: Psf | None,
    field: Displacement | None,
    *,
    brief: bool = False,
    on_progress: Progress | None = None,
) -> Ways:
    """Published, by the scene's own blur, and by the sensor's MTF; without a field the shift counts."""
    modes: dict[str, Published | Registered] = {}
    if field is None and psf is not None:
        field = _constant(-psf.shift[0], -psf.shift[1])
    if not brief:
        modes["published"] = Published(gains, find_phases(images, gains[0], on_progress=on_progress)[0])
    if psf is not None:
        modes["registered"] = Registered([gaussian_kernel(psf.sigma)] * len(gains), field)
    if not brief or psf is None:
        modes["registered_nominal"] = Registered([mtf_kernel(gain, images.ratio) for gain in gains], field)
    return Ways(modes, psf)


def _field(taken: Registration, first: Sequence[int]) -> Displacement:
    """A displacement at pixels of a part of its frame that begins at `first`."""
    bands: list[int | None] = list(range(len(taken.bands))) if taken.own_bands else [None]

    def field(rows: Tensor, cols: Tensor) -> Tensor:
        down, across = (x.double().cpu().numpy() + start for x, start in zip((rows, cols), first, strict=True))
        return torch.from_numpy(np.stack([taken.at(down[:, None], across[None, :], band) for band in bands]))

    return field


def _constant(dy: float, dx: float) -> Displacement:
    """The same displacement everywhere."""

    def field(rows: Tensor, cols: Tensor) -> Tensor:
        return torch.tensor([dy, dx], dtype=torch.float64)[None, :, None, None].expand(1, 2, len(rows), len(cols))

    return field
