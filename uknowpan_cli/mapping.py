"""A result as 8-bit RGB for maps: a linear stretch with the statistics of the whole scene."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from uknowpan.options import pair_of
from uknowpan.tiling import Grid, MsMeta
from uknowpan.tiling.fill import AnyArray
from uknowpan.tiling.output import is_valid

COUNTED = 1_000_000
"""Pixels, about, that shares are taken from; they lie on a lattice over the scene."""


@dataclass(frozen=True)
class EightBit:
    """The rule by which values become 1 to 255; 0 marks invalid pixels."""

    bands: tuple[int, ...]
    """Bands shown as red, green and blue, or as grey (0-based)."""
    low: tuple[float, ...]
    high: tuple[float, ...]
    nodata: float | None
    """Value of invalid pixels; None: all are valid."""

    def __call__(self, rows: AnyArray) -> AnyArray:
        """Encoded rows (C, n, W) as uint8 (3 or 1, n, W)."""
        shown = rows[list(self.bands)]
        valid = is_valid(shown, self.nodata)
        low, high = (np.array(limit).reshape(-1, 1, 1) for limit in (self.low, self.high))
        unit = np.clip((np.where(valid, shown, low) - low) / (high - low), 0, 1)
        return np.where(valid, np.rint(1 + 254 * unit), 0).astype(np.uint8)

    @property
    def tag(self) -> str:
        """Limits of each shown band, for the header."""
        return ", ".join(
            f"band {band + 1}: {low:g} to {high:g}"
            for band, low, high in zip(self.bands, self.low, self.high, strict=True)
        )


def eight_bit(
    strips: Iterable[tuple[int, int, AnyArray]], grid: Grid, meta: MsMeta, nodata: float | None, wanted: str
) -> EightBit:
    """The stretch of a scene.

    Args:
        strips: (row, column, encoded values (C, n, w)) of the parts of the output.
        grid: of the output.
        meta: of the bands, whose names and colours choose red, green and blue.
        nodata: value of invalid pixels; None: there are none.
        wanted: "LOW,HIGH" in digital numbers, or "LOW%,HIGH%" of the valid pixels of each band.
    """
    from uknowpan.pictures import rgb_bands  # Pillow takes time to import

    bands = tuple(
        dict.fromkeys(rgb_bands(meta.descriptions, [c.name for c in meta.colorinterp], len(meta.descriptions)))
    )
    low, high = pair_of(wanted)
    if "%" not in wanted:
        return EightBit(bands, (low,) * len(bands), (high,) * len(bands), nodata)
    step = max(1, math.ceil(math.sqrt(grid.width * grid.height / COUNTED)))
    parts: list[list[AnyArray]] = [[] for _ in bands]
    for row, col, values in strips:
        lattice = values[list(bands), -row % step :: step, -col % step :: step]
        valid = is_valid(lattice, nodata)
        for part, shown, known in zip(parts, lattice, valid, strict=True):
            part.append(shown[known])
    limits = [
        np.percentile(values, [low, high]) if (values := np.concatenate(part)).size else np.array([0.0, 1.0])
        for part in parts
    ]
    lows = tuple(float(limit[0]) for limit in limits)
    highs = tuple(float(limit[1]) if limit[1] > limit[0] else float(limit[0]) + 1 for limit in limits)
    return EightBit(bands, lows, highs, nodata)
