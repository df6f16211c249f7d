"""A window's PAN moved onto its MS, and the bands onto each other: for moments and blur, never for a result."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

from uknowpan.models.registration.field import Array, Registration
from uknowpan.models.registration.splines import Floats, coefficients, shifted

Bools = npt.NDArray[np.bool_]

STEP = 8
"""MS pixels between the places that are computed; the field is linear between them."""


def moved_window(
    field: Registration, pan: Floats, ms: Floats, valid_pan: Bools, row: int, col: int, ratio: int, margin: int
) -> tuple[Floats, Floats, Bools]:
    """PAN, MS and validity of the PAN with the displacement taken out, without the margin.

    Args:
        field: displacement of the MS.
        pan: (ratio h, ratio w).
        ms: (C, h, w).
        valid_pan: (ratio h, ratio w).
        row, col: MS pixel of the frame at which the window begins.
        ratio: PAN pixels per MS pixel.
        margin: MS pixels on every side that are cut off; they hold what the displacement brings in.
    """
    h, w = (n - 2 * margin for n in ms.shape[1:])
    at = _places(field, (row + margin) * ratio, (col + margin) * ratio, h * ratio, w * ratio, STEP * ratio)
    at -= np.array([row * ratio, col * ratio], float).reshape(2, 1, 1)
    spline = coefficients(pan)
    if field.model == "shift":
        moved = shifted(spline, at[0, 0, 0], at[1, 0, 0], h * ratio, w * ratio)
    else:
        moved = map_coordinates(spline, at, order=3, mode="mirror", output=np.float32, prefilter=False)
    valid = np.ones(moved.shape, bool)
    if not valid_pan.all():
        near = (np.clip(np.rint(x).astype(np.intp), 0, n - 1) for x, n in zip(at, pan.shape, strict=True))
        valid = valid_pan[tuple(near)]
    if field.own_bands:
        places = margin + (field.bands - field.bands.mean(0)) / ratio
        planes = [shifted(coefficients(x), row, col, h, w) for x, (row, col) in zip(ms, places, strict=True)]
        return moved, np.stack(planes), valid
    return moved, ms[:, margin : margin + h, margin : margin + w], valid


def _places(field: Registration, row: int, col: int, height: int, width: int, step: int) -> Array:
    """(2, height, width) places on the PAN that the MS shows at PAN pixels, between some of them linear."""
    rows, cols = (np.linspace(a, a + n - 1, max(2, n // step + 1)) for a, n in ((row, height), (col, width)))
    down, across = (_between(len(some), n) for some, n in ((rows, height), (cols, width)))
    places: Array = down @ field.pan_places(rows[:, None], cols[None, :]) @ across.T
    return places


def _between(some: int, count: int) -> Array:
    """(count, some) weights that interpolate linearly between `some` values spread over `count` places."""
    away = np.linspace(0, some - 1, count)[:, None] - np.arange(some)
    weights: Array = np.clip(1 - np.abs(away), 0, None)
    return weights
