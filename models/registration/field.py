"""The displacement field that a registration is: a shift, an affine map or a smooth field, and shifts of the bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

Array = npt.NDArray[np.float64]

MODELS = ("none", "shift", "affine", "local")


@dataclass(frozen=True)
class Registration:
    """Displacement of the MS against the PAN, in PAN pixels; see the module for its sign."""

    model: str
    """One of `MODELS`: the simplest that the scene supports."""
    own_bands: bool
    """Whether the bands have shifts of their own."""
    bands: Array
    """(C, 2) shift of each band beyond the common field; zeros without `own_bands`."""
    coefficients: Array
    """(2, 3) of the affine map: constant, per row and per column of `unit` pixels from `centre`."""
    nodes: Array | None
    """(2, n, m) B-spline coefficients of the local field, added to the affine map."""
    centre: tuple[float, float]
    unit: float
    """PAN pixels of half the longer side of the scene."""
    span: tuple[float, float]
    """PAN pixels (height, width) over which the nodes are spread."""
    share: float = 0.0
    """Share of the windows with a peak that agree with the field."""
    confidence: float = 0.0
    """0 to 1: share times the part of all windows that have a peak, saturating at a half."""
    residual: float = math.nan
    """Rms of the agreeing windows about the field, PAN pixels."""
    windows: int = 0
    """Windows that agree."""
    voters: int = 0
    """Windows with a peak."""
    measured: str = "none"
    """The model before small displacements are left alone."""
    votes: Array = field(default_factory=lambda: np.zeros((0, 5)))
    """(n, 5): row, column, dy, dx and weight (0 to 1) of each window with a peak."""

    @property
    def shift(self) -> tuple[float, float]:
        """(dy, dx) at the scene's centre, PAN pixels, mean of the bands."""
        (dy,), (dx,) = self.at(np.array([self.centre[0]]), np.array([self.centre[1]]))
        return float(dy), float(dx)

    def at(self, rows: Array, cols: Array, band: int | None = None) -> Array:
        """(2, ...) displacement at PAN indices that broadcast; None: the bands' common field."""
        rows, cols = np.broadcast_arrays(np.asarray(rows, float), np.asarray(cols, float))
        if self.model == "none":
            return np.zeros((2, *rows.shape))
        u, v = (rows - self.centre[0]) / self.unit, (cols - self.centre[1]) / self.unit
        a = self.coefficients
        result: Array = np.stack([a[k, 0] + a[k, 1] * u + a[k, 2] * v for k in (0, 1)])
        if self.nodes is not None:
            axes = zip((rows, cols), self.centre, self.span, self.nodes.shape[1:], strict=True)
            at = np.stack([node_of(*axis) for axis in axes])
            result += np.stack([map_coordinates(n, at, order=3, mode="nearest", prefilter=False) for n in self.nodes])
        beyond = self.bands[band] if band is not None else self.bands.mean(0)
        result += beyond.reshape(2, *[1] * rows.ndim)
        return result

    def pan_places(self, rows: Array, cols: Array, band: int | None = None) -> Array:
        """(2, ...) places on the PAN that the MS shows at PAN indices (rows, cols): x with x + d(x) = (rows, cols)."""
        target = np.stack(np.broadcast_arrays(np.asarray(rows, float), np.asarray(cols, float)))
        place = target - self.at(target[0], target[1], band)
        for _ in range(3):
            place = target - self.at(place[0], place[1], band)
        return place


def node_of(x: Array, middle: float, span: float, nodes: int) -> Array:
    """Places among the nodes of a cubic B-spline; the scene lies between the second and the last but one."""
    return np.clip((x - middle) / span + 0.5, 0, 1) * (nodes - 3) + 1


def spline_weights(none: Registration, rows: Array, cols: Array, nodes: Sequence[int]) -> Array:
    """(n, nodes) products of the weights of each node."""
    weights = []
    for x, middle, span, count in zip((rows, cols), none.centre, none.span, nodes, strict=True):
        away = np.abs(node_of(x, middle, span, count)[:, None] - np.arange(count))
        near = (4 - 6 * away**2 + 3 * away**3) / 6
        weights.append(np.where(away < 1, near, np.clip(2 - away, 0, None) ** 3 / 6))
    products: Array = weights[0][:, :, None] * weights[1][:, None, :]
    return products.reshape(len(rows), -1)
