"""A window's PAN moved onto its MS, and the bands onto each other: for moments and blur, never for a result."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates, shift

from uknowpan.models.registration.field import Array, Registration

Floats = npt.NDArray[np.float32]
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
    moved = map_coordinates(pan, at, order=3, mode="mirror", output=np.float32)
    near = [np.clip(np.rint(x).astype(int), 0, n - 1) for x, n in zip(at, pan.shape, strict=True)]
    if field.own_bands:
        beyond = -(field.bands - field.bands.mean(0)) / ratio
        ms = np.stack([shift(plane, by, order=3, mode="nearest") for plane, by in zip(ms, beyond, strict=True)])
    inner = slice(margin, margin + h), slice(margin, margin + w)
    return moved, ms[:, *inner], valid_pan[near[0], near[1]]


def _places(field: Registration, row: int, col: int, height: int, width: int, step: int) -> Array:
    """(2, height, width) places on the PAN that the MS shows at PAN pixels, between some of them linear."""
    rows, cols = (np.linspace(a, a + n - 1, max(2, n // step + 1)) for a, n in ((row, height), (col, width)))
    coarse = field.pan_places(rows[:, None], cols[None, :])
    down = np.linspace(0, len(rows) - 1, height)[:, None]
    across = np.linspace(0, len(cols) - 1, width)[None, :]
    at = np.stack(np.broadcast_arrays(down, across))
    return np.stack([map_coordinates(plane, at, order=1) for plane in coarse])
