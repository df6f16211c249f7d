"""Cubic B-splines of images: coefficients, taps, and an image shifted by a part of a pixel."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import spline_filter1d

Floats = npt.NDArray[np.float32]


def coefficients(x: Floats, mode: Literal["mirror", "nearest"] = "mirror") -> Floats:
    """The spline through the last two axes of images."""
    for axis in (-2, -1):
        x = spline_filter1d(x, 3, axis, np.float32, mode)
    return x


def taps(x: Any) -> tuple[Any, ...]:
    """Weights of the coefficients at -1, 0, 1 and 2 for places from 0 to 1."""
    y = 1 - x
    return y**3 / 6, (4 - 6 * x**2 + 3 * x**3) / 6, (4 - 6 * y**2 + 3 * y**3) / 6, x**3 / 6


def slopes(x: Any) -> tuple[Any, ...]:
    """Derivatives of `taps`."""
    y = 1 - x
    return -(y**2) / 2, (3 * x**2 - 4 * x) / 2, (4 * y - 3 * y**2) / 2, x**2 / 2


def shifted(spline: Floats, row: float, col: float, height: int, width: int) -> Floats:
    """(..., height, width) values from (row, col) on; all taps must lie within."""
    for first, count, axis in ((row, height, -2), (col, width, -1)):
        whole = int(np.floor(first))
        lines = np.moveaxis(spline, axis, 0)
        parts = [np.float32(t) * lines[whole + k : whole + k + count] for k, t in enumerate(taps(first - whole), -1)]
        spline = np.moveaxis(parts[0] + parts[1] + parts[2] + parts[3], 0, axis)
    return spline
