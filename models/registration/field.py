"""The displacement field that a registration is: a shift, an affine map or a smooth field, and shifts of the bands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import map_coordinates

Array = npt.NDArray[np.float64]

MODELS = ("none", "shift", "affine", "local")
STEPS = 256
"""Displacements of pixels are multiples of 1 / STEPS PAN pixels, so that no rounding depends on the window."""


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

    def over(self, row: int, col: int, height: int, width: int, band: int | None = None) -> Array:
        """(2, height, width) displacement of the PAN pixels of a window, in whole steps of 1 / `STEPS`.

        The sums have one order for any window: a pixel's displacement does not depend on the cut.
        """
        rows, cols = row + np.arange(height, dtype=float), col + np.arange(width, dtype=float)
        u, v = ((x - middle) / self.unit for x, middle in zip((rows, cols), self.centre, strict=True))
        beyond = self.bands[band] if band is not None else self.bands.mean(0)
        a = self.coefficients
        result: Array = np.stack([(a[k, 0] + beyond[k] + a[k, 1] * u)[:, None] + a[k, 2] * v for k in (0, 1)])
        if self.nodes is not None:
            down, across = (
                axis_weights(x, middle, span, count)
                for x, middle, span, count in zip(
                    (rows, cols), self.centre, self.span, self.nodes.shape[1:], strict=True
                )
            )
            for k, nodes in enumerate(self.nodes):
                for j in range(nodes.shape[1]):
                    line = sum(down[:, i] * nodes[i, j] for i in range(nodes.shape[0]))
                    result[k] += np.asarray(line)[:, None] * across[:, j]
        return np.round(result * STEPS) / STEPS

    def places(self, row: int, col: int, height: int, width: int, ratio: int, band: int | None = None) -> Array:
        """(2, height, width) places on the PAN of the MS pixels of a window, in whole steps of 1 / `STEPS`.

        Row and column are MS pixels of the frame.
        """
        rows, cols = (
            (k + np.arange(n, dtype=float)) * ratio + (ratio - 1) / 2 for k, n in ((row, height), (col, width))
        )
        result: Array = np.round(self.pan_places(rows[:, None], cols[None, :], band) * STEPS) / STEPS
        return result

    @property
    def bound(self) -> float:
        """PAN pixels that no displacement exceeds along an axis, up to a tenth of the scene beyond it."""
        u, v = (0.6 * span / self.unit for span in self.span)
        a = np.abs(self.coefficients)
        most = a[:, 0] + a[:, 1] * u + a[:, 2] * v + np.abs(self.bands).max(0)
        if self.nodes is not None:
            most = most + np.abs(self.nodes).max((1, 2))
        return float(most.max())

    @property
    def largest(self) -> float:
        """Largest length of a displacement in the scene, PAN pixels."""
        rows, cols = self._lattice()
        lengths = [np.hypot(*self.at(rows, cols, band)).max() for band in range(len(self.bands))]
        return float(max(lengths))

    @property
    def size(self) -> float:
        """Rms of the displacement over the scene and the bands, PAN pixels."""
        rows, cols = self._lattice()
        squares = [(self.at(rows, cols, band) ** 2).sum(0).mean() for band in range(len(self.bands))]
        return math.sqrt(float(np.mean(squares)))

    def _lattice(self) -> tuple[Array, Array]:
        places = (m + np.linspace(-0.5, 0.5, 9) * n for m, n in zip(self.centre, self.span, strict=True))
        rows, cols = places
        return rows[:, None], cols[None, :]

    def as_dict(self) -> dict[str, Any]:
        """The field for JSON, without the votes."""
        data = asdict(self)
        del data["votes"]
        return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in data.items()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Registration:
        """The inverse of `as_dict`."""
        arrays = {k: np.array(data[k], float) for k in ("bands", "coefficients")}
        nodes = None if data["nodes"] is None else np.array(data["nodes"], float)
        pairs = {k: tuple(data[k]) for k in ("centre", "span")}
        return Registration(**{**data, **arrays, **pairs, "nodes": nodes})

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


def axis_weights(x: Array, middle: float, span: float, nodes: int) -> Array:
    """(n, nodes) weights of the nodes of a cubic B-spline along one axis."""
    away = np.abs(node_of(x, middle, span, nodes)[:, None] - np.arange(nodes))
    near = (4 - 6 * away**2 + 3 * away**3) / 6
    weights: Array = np.where(away < 1, near, np.clip(2 - away, 0, None) ** 3 / 6)
    return weights


def spline_weights(none: Registration, rows: Array, cols: Array, nodes: Sequence[int]) -> Array:
    """(n, nodes) products of the weights of each node."""
    axes = zip((rows, cols), none.centre, none.span, nodes, strict=True)
    weights = [axis_weights(*axis) for axis in axes]
    products: Array = weights[0][:, :, None] * weights[1][:, None, :]
    return products.reshape(len(rows), -1)
