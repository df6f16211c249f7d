"""Pictures of `evaluate`: PAN, LMS, results, truth; error maps and uncertainty with a legend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from uknowpan.pictures import enlarge, error_map, panels, rgb_bands, stretch_from

if TYPE_CHECKING:
    from torch import Tensor

    from uknowpan.models.metrics.evaluation import Scored
    from uknowpan.models.metrics.sensors import Sensor


SHOWN = 256
"""Small images are enlarged, pixel by pixel, to about so many pixels."""
LEGEND_HEIGHT = 44
LIMIT_PERCENTILE = 99
"""Of the LMS's error, which is shown brightest."""


def evaluation_sheet(scored: Scored, sigmas: Mapping[str, Tensor | None], sensor: Sensor) -> np.ndarray:
    """uint8 (3, H, W): PAN, LMS, every method and the truth; below the error of each; below that
    the 1-sigma of methods that tell one; a legend of their common scale.

    Args:
        scored: an image in DN.
        sigmas: method -> (1, C, H, W) in DN, or None.
        sensor: names the bands.
    """
    pan, lms = _array(scored.patch.pan), _array(scored.patch.lms)
    gt = None if scored.patch.gt is None else _array(scored.patch.gt)
    fused = {name: _array(x) for name, x in scored.fused.items() if name != "EXP"}
    known = {name: _array(x) for name, x in sigmas.items() if x is not None}
    look = stretch_from(lms if gt is None else gt, bands=_shown(sensor, len(lms)))
    top = [
        ("PAN", stretch_from(pan, bands=(0, 0, 0)).apply(pan)),
        ("LMS (EXP)", look.apply(lms)),
        *((name, look.apply(x)) for name, x in fused.items()),
    ]
    blank = np.full_like(top[0][1], BLANK)
    rows = [top]
    largest = _limit(lms, gt, known)
    if gt is not None:
        top.append(("TRUTH", look.apply(gt)))
        errors = {"LMS (EXP)": lms, **fused}
        rows.append([("", blank), *((f"ERROR {n}", error_map(x, gt, largest)) for n, x in errors.items())])
    if known:
        cells = [
            (f"1 SIGMA {n}", error_map(known[n], np.zeros_like(known[n]), largest)) if n in known else ("", blank)
            for n in fused
        ]
        rows.append([("", blank), ("", blank), *cells])
    factor = max(1, round(SHOWN / lms.shape[-1]))
    sheet = [[(text, enlarge(x, factor)) for text, x in row] for row in rows]
    if len(rows) > 1:
        sheet.append([_legend(largest, sum(x.shape[2] + 6 for _, x in sheet[0]) - 6)])
    return _stacked(sheet)


BLANK = np.array((24, 26, 30), np.uint8)[:, None, None]


def _stacked(sheet: list[list[tuple[str, np.ndarray]]]) -> np.ndarray:
    """The rows below each other; the legend, one wide cell, must not widen the first column."""
    parts = [panels([row]) for row in sheet]
    width = max(part.shape[2] for part in parts)
    whole = [np.concatenate([p, np.broadcast_to(BLANK, (3, p.shape[1], width - p.shape[2]))], axis=2) for p in parts]
    return np.concatenate(whole, axis=1)


def _array(x: Tensor) -> np.ndarray:
    return x[0].float().cpu().numpy()


def _shown(sensor: Sensor, bands: int) -> tuple[int, int, int]:
    """Bands for red, green and blue."""
    try:
        return sensor.for_bands(bands).rgb
    except ValueError:
        return rgb_bands((), (), bands)


def _limit(lms: np.ndarray, gt: np.ndarray | None, sigmas: Mapping[str, np.ndarray]) -> float:
    """DN that the maps show brightest."""
    values = [np.abs(lms - gt).mean(0)] if gt is not None else [s.mean(0) for s in sigmas.values()]
    largest = max((float(np.percentile(v, LIMIT_PERCENTILE)) for v in values), default=0.0)
    return max(largest, 1e-6)


def _legend(largest: float, width: int) -> tuple[str, np.ndarray]:
    """The colours of the maps from 0 to the largest, left to right."""
    ramp = np.broadcast_to(np.linspace(0, largest, width, dtype=np.float32), (LEGEND_HEIGHT, width))
    bar = error_map(ramp[None], np.zeros_like(ramp)[None], largest)
    return f"0 (LEFT) TO {largest:.3g} DN (RIGHT), MEAN OF BANDS", bar
