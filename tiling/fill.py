"""Arrays of one tile: validity, filling of invalid pixels, reflection at raster edges.

Everything here is a function of absolute position only, never of the tile that asks. So a pixel comes out the same
however the scene was cut.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
DoubleArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]

FILL_REACH = 4
"""The reach: MS pixels (times ratio on the PAN grid) that valid values spread into invalid areas."""

_NEIGHBOURS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


@dataclass(frozen=True)
class TileArrays:
    """The input of a model for one tile; H = h * ratio, W = w * ratio; values in input units (DN).

    Every value is finite. Pixels outside a raster are its reflection, invalid ones are filled. float64 input is rounded
    to float32 and nothing is subtracted: data with an offset larger than about 2**24 times its noise lose precision.
    """

    pan: FloatArray
    """(1, H, W)"""
    ms: FloatArray
    """(C, h, w)"""
    pan_valid: BoolArray
    """(H, W): inside the PAN and not nodata"""
    ms_valid: BoolArray
    """(h, w): inside the MS (every file of it) and no band is nodata"""
    valid: BoolArray
    """(H, W): pixels of the output that deserve a value, see `output_valid`"""
    band_valid: BoolArray | None = None
    """(C, H, W): the same for each band; None: `valid` holds for all of them"""


def reflected_indices(start: int, count: int, size: int) -> tuple[npt.NDArray[np.intp], BoolArray]:
    """Indices into 0..size-1 for positions start..start+count-1, symmetric about both edges, and which are inside.

    The edge pixel is repeated (..., 1, 0, 0, 1, ..., n-1, n-1, n-2, ...), as often as needed.
    """
    position = np.arange(start, start + count)
    index = position % (2 * size)
    return np.where(index < size, index, 2 * size - 1 - index), (position >= 0) & (position < size)


def fill_invalid(values: FloatArray, valid: BoolArray, passes: int, constants: FloatArray) -> FloatArray:
    """Fill invalid pixels from their neighbours, `passes` pixels deep, then with a constant.

    values (C, H, W), valid (H, W), constants (C,). In each pass an invalid pixel with known 3x3 neighbours takes their
    mean and is known from then on. A pixel at least `passes` away from the border of the arrays therefore does not
    depend on what lies outside of them.
    """
    if valid.all():
        return values.astype(np.float32, copy=False)
    filled = np.where(valid, values, constants[:, None, None]).astype(np.float32)
    if not valid.any():
        return filled
    padded = np.pad(filled, ((0, 0), (1, 1), (1, 1)))
    known = np.pad(valid, 1)
    for _ in range(passes):
        front = _dilate(known) & ~known
        rows, cols = np.nonzero(front[1:-1, 1:-1])
        if rows.size == 0:
            break
        rows, cols = rows + 1, cols + 1
        total = np.zeros((values.shape[0], rows.size), np.float32)
        count = np.zeros(rows.size, np.float32)
        for dr, dc in _NEIGHBOURS:
            near = known[rows + dr, cols + dc]
            total += np.where(near, padded[:, rows + dr, cols + dc], np.float32(0))
            count += near
        padded[:, rows, cols] = total / count
        known[rows, cols] = True
    return np.ascontiguousarray(padded[:, 1:-1, 1:-1])


def _dilate(mask: BoolArray) -> BoolArray:
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    wide = grown.copy()
    wide[:, 1:] |= grown[:, :-1]
    wide[:, :-1] |= grown[:, 1:]
    return wide


def output_valid(pan_valid: BoolArray, ms_valid: BoolArray, ratio: int, off: DoubleArray | None = None) -> BoolArray:
    """(H, W): the PAN is valid and so is the MS pixel that holds what the PAN pixel shows.

    `ms_valid` (h, w) may count reflected pixels as valid where the output is allowed to extrapolate:
    `ScenePair.read_frame` does so up to half an MS pixel outside of the MS. `off` (2, H, W) is the displacement of
    the MS in PAN pixels, None for none; beyond the window its nearest pixel counts.
    """
    if off is None or ms_valid.all():
        return pan_valid & ms_valid.repeat(ratio, axis=0).repeat(ratio, axis=1)
    rows, cols = (
        np.clip((np.floor(np.arange(n * ratio).reshape(line) + 0.5 + d) // ratio).astype(np.intp), 0, n - 1)
        for d, n, line in zip(off, ms_valid.shape, ((-1, 1), (1, -1)), strict=True)
    )
    valid: BoolArray = pan_valid & ms_valid[rows, cols]
    return valid
