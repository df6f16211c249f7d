"""Where the MS pixels of a window lie on the PAN: nested, or displaced by a measured field.

A displacement is part of the geometry. The MS is interpolated at x + d(x) for the PAN pixel x, and the PAN is blurred
and sampled at the places that the MS pixels show. Nothing is resampled twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from uknowpan.models.blur import Psf
from uknowpan.models.registration.field import Array, Registration
from uknowpan.models.resample import KERNELS, Image, crop, degrade, upsample, upsample_small
from uknowpan.models.statistics import SceneStatistics

Origins = Sequence[tuple[int, int]]
"""(row, col) of each core in PAN pixels of the scene's frame, multiples of `Sharpener.multiple`.
They fix the noise."""


@dataclass(frozen=True)
class Nested:
    """MS pixels of ratio x ratio PAN pixels each, `offset` PAN pixels beyond them; see `upsample`."""

    ratio: int
    psf: Psf
    offset: float = 0.0
    spare: int = 0
    """MS pixels on every side that `enlarged` does not look at"""
    rim: int = 0
    """PAN pixels on every side that are cut off what is then enlarged"""
    kernel: str = "keys"
    """A name of `KERNELS`."""

    @property
    def left_out(self) -> int:
        """PAN pixels on every side that `enlarged` leaves out."""
        return self.spare * self.ratio + self.rim

    def enlarged(self, x: Image) -> Image:
        """(B, C, h, w) interpolated at the PAN pixels, without the `spare` and the `rim`."""
        x = crop(x, self.spare)
        if self.rim and not isinstance(x, np.ndarray) and self.kernel == "keys":
            return crop(upsample_small(x, self.ratio, self.offset), self.rim)
        return crop(upsample(x, self.ratio, self.offset, self.kernel), self.rim)

    def degraded(self, pan: Image) -> Image:
        """The PAN, or any (B, C, ratio h, ratio w), blurred and sampled at the MS pixels."""
        return degrade(pan, self.ratio, self.psf.sigma, self.psf.shift)

    @staticmethod
    def without(border: int, ratio: int, psf: Psf, offset: float, kernel: str = "keys") -> Nested:
        """One that leaves out `border` PAN pixels on every side."""
        spare = max(border // ratio - KERNELS[kernel][1], 0)
        return Nested(ratio, psf, offset, spare, border - spare * ratio, kernel)


Floats = npt.NDArray[np.float32]
WindowTaps = tuple[Array, Array, Any, Any]
"""First row and column of the taps of each pixel, (N,), and their weights along both axes, (N, K)."""

Taps = tuple[Any, Any]
"""(N, K) int32 places in a table of pixels, and their weights, (N, K) float32; arrays or tensors, as the windows."""


class Displaced:
    """MS pixels that lie off the PAN by a field.

    Args:
        statistics: of the scene, with the field.
        origins: place of each window's core, see `Origins`.
        margin: MS pixels around the core.
        shape: (h, w) of the windows in MS pixels.
        rim: PAN pixels on every side that `enlarged` leaves out.
        kernel: a name of `KERNELS`. One of many taps first doubles the MS; cubic convolution places the doubled one.
    """

    spare = 0

    def __init__(
        self,
        statistics: SceneStatistics,
        origins: Origins,
        margin: int,
        shape: tuple[int, int],
        rim: int = 0,
        kernel: str = "keys",
    ):
        assert statistics.field is not None
        self.kernel, self.finer = kernel, 1 if kernel == "keys" else 2
        self.field: Registration = statistics.field
        self.ratio, self.sigma = statistics.ratio, statistics.psf.sigma
        self.starts = [(row // self.ratio - margin, col // self.ratio - margin) for row, col in origins]
        self.shape, self.rim, self.left_out = shape, rim, rim
        # One field serves bands that lie on each other.
        self.bands: list[int | None] = list(range(len(self.field.bands))) if self.field.own_bands else [None]
        self._up: dict[int | None, Taps] = {}
        self._down: dict[int | None, Taps] = {}

    def enlarged(self, x: Image) -> Image:
        """(B, C, h, w) interpolated at the PAN pixels, each band at its own places, without the `rim`."""
        height, width = (n * self.ratio - 2 * self.rim for n in self.shape)
        shape = (self.shape[0] * self.finer, self.shape[1] * self.finer)
        if self.finer > 1:
            x = upsample(x, self.finer, 0.0, self.kernel)
        parts: list[Image] = []
        for k, band in enumerate(self.bands):
            if self._is_separable(x):
                parts.append(self._along(self._ms_taps, x[:, k :: len(self.bands)], band, height, width))
                continue
            if band not in self._up:
                taps = [self._ms_taps(start, band, height, width) for start in self.starts]
                self._up[band] = _joined(taps, shape, x)
            parts.append(_gathered(x[:, k :: len(self.bands)], self._up[band], height, width))
        return _interleaved(parts)

    def degraded(self, pan: Image) -> Image:
        """The PAN, or any (B, C, ratio h, ratio w), blurred and sampled at the places of the MS pixels.

        A PAN has one channel, (B, 1, h, w), where the bands lie on each other, else one for each band.
        """
        shape = (self.shape[0] * self.ratio, self.shape[1] * self.ratio)
        parts: list[Image] = []
        for k, band in enumerate(self.bands):
            own = pan if pan.shape[1] == 1 else pan[:, k :: len(self.bands)]
            if self._is_separable(pan):
                parts.append(self._along(self._pan_taps, own, band, *self.shape))
                continue
            if band not in self._down:
                taps = [self._pan_taps(start, band, *self.shape) for start in self.starts]
                self._down[band] = _joined(taps, shape, pan)
            parts.append(_gathered(own, self._down[band], *self.shape))
        return _interleaved(parts)

    def _is_separable(self, x: Image) -> bool:
        """Whether all pixels lie off alike, so that an array is interpolated along one axis after the other."""
        even = self.field.nodes is None and not self.field.coefficients[:, 1:].any()
        return even and isinstance(x, np.ndarray)

    def _along(self, taps: Callable[..., WindowTaps], x: Any, band: int | None, height: int, width: int) -> Any:
        """(B, C, height, width) weighted sums of pixels of arrays, along the columns' axis first."""
        done = []
        for window, start in zip(x, self.starts, strict=True):
            (row, _, down, _), (_, col, _, across) = taps(start, band, height, 1), taps(start, band, 1, width)
            done.append(_lines(_lines(window.swapaxes(1, 2), col, across).swapaxes(1, 2), row, down))
        return np.stack(done)

    def _ms_taps(self, start: tuple[int, int], band: int | None, height: int, width: int) -> WindowTaps:
        """The 4 x 4 taps on the MS, as fine as it was made, of each PAN pixel of a window without the `rim`."""
        ratio, finer = self.ratio, self.finer
        row, col = (k * ratio + self.rim for k in start)
        off = self.field.over(row, col, height, width, band)
        lines = row + np.arange(height, dtype=float)[:, None], col + np.arange(width, dtype=float)[None, :]
        # In the frame, not in the window, or rounding would depend on the cut.
        at = [(x + d - (ratio - 1) / 2) / ratio for x, d in zip(lines, off, strict=True)]
        if finer > 1:
            at = [x * finer + (finer - 1) / 2 for x in at]
        whole = [np.floor(x) for x in at]
        down, across = (_keys((x - n).ravel()) for x, n in zip(at, whole, strict=True))
        first = [n * finer + 1 for n in start]
        return whole[0].ravel() - first[0], whole[1].ravel() - first[1], down, across

    def _pan_taps(self, start: tuple[int, int], band: int | None, height: int, width: int) -> WindowTaps:
        """The taps of the Gaussian around the place of each MS pixel on the PAN."""
        half = math.ceil(3 * self.sigma) + 1
        places = self.field.places(*start, height, width, self.ratio, band)
        whole, weights = [], []
        for x, first in zip(places, start, strict=True):
            n = np.floor(x)
            taps = np.exp(-0.5 * (((x - n).reshape(-1, 1) - np.arange(1 - half, half + 1)) / self.sigma) ** 2)
            weights.append(taps / taps.sum(1, keepdims=True))
            whole.append(n.ravel() - first * self.ratio + 1 - half)
        return whole[0], whole[1], weights[0], weights[1]


def _joined(taps: list[WindowTaps], shape: tuple[int, int], x: Image) -> Taps:
    """Taps into a table of the pixels of all windows, of the kind of `x`; pixels beyond a window are its border's."""
    index, weights = [], []
    for number, (row, col, *sides) in enumerate(taps):
        down, across = (_kept(side, np.float32, x) for side in sides)
        count, (height, width) = np.arange(down.shape[1]), shape
        beyond = (
            np.minimum(n, 0).any() or n.max() + len(count) > side for n, side in zip((row, col), shape, strict=True)
        )
        if any(beyond):
            first, steps = (_kept(n, np.int32, x) for n in (np.stack([row, col]), count))
            rows, cols = ((n[:, None] + steps).clip(0, side - 1) for n, side in zip(first, shape, strict=True))
            places = ((rows + number * height) * width)[:, :, None] + cols[:, None, :]
        else:  # one sum of whole rows takes a quarter of the time
            first = (row + number * height) * width + col
            first, steps = (_kept(n, np.int32, x) for n in (first, (count[:, None] * width + count).ravel()))
            places = first[:, None] + steps
        index.append(places.reshape(len(row), -1))
        if isinstance(x, np.ndarray):
            products = np.einsum("ni,nj->nij", down, across)  # half the time of a product with short rows
        else:
            products = down[:, :, None] * across[:, None, :]
        weights.append(products.reshape(len(row), -1))
    if len(taps) == 1:
        return index[0], weights[0]
    if isinstance(x, np.ndarray):
        return np.concatenate(index), np.concatenate(weights)
    import torch

    return torch.cat(index), torch.cat(weights)


def _kept(values: Array, dtype: type, x: Any) -> Any:
    """Values as an array or a tensor, as `x` is one, where it is, in their own dtype."""
    values = values.astype(dtype, copy=False)
    if isinstance(x, np.ndarray):
        return values
    import torch

    return torch.from_numpy(values).to(x.device)


def _gathered(x: Image, taps: Taps, height: int, width: int) -> Image:
    """(B, C, height, width) weighted sums of pixels of (B, C, h, w)."""
    index, weights = taps
    if isinstance(x, np.ndarray):
        from scipy.sparse import csr_array

        table = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).reshape(-1, x.shape[1])
        ends = np.arange(0, index.size + 1, index.shape[1], dtype=np.int32)
        matrix = csr_array((weights.ravel(), index.ravel(), ends), (len(index), len(table)))
        sums = (matrix @ table).reshape(len(x), height, width, -1)
        return np.ascontiguousarray(sums.transpose(0, 3, 1, 2))
    import torch

    # A fresh copy: the strides of a view choose another order of the sums.
    pixels = x.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format).view(-1, x.shape[1])
    bags = torch.nn.functional.embedding_bag(index, pixels, mode="sum", per_sample_weights=weights)
    return bags.view(len(x), height, width, -1).permute(0, 3, 1, 2).contiguous()


def _lines(x: Any, first: Array, weights: Any) -> Any:
    """(C, N, W) weighted sums of rows of (C, h, W), from `first` (N,) on; rows beyond the array are its border's."""
    from scipy.sparse import csr_array

    (channels, height, width), (count, taps) = x.shape, weights.shape
    index = (first[:, None] + np.arange(taps)).clip(0, height - 1).astype(np.int32)
    ends = np.arange(0, index.size + 1, taps, dtype=np.int32)
    matrix = csr_array((weights.astype(np.float32).ravel(), index.ravel(), ends), (count, height))
    sums = matrix @ x.swapaxes(0, 1).reshape(height, channels * width)
    return np.ascontiguousarray(sums.reshape(count, channels, width).swapaxes(0, 1))


def _interleaved(parts: list[Image]) -> Image:
    """(B, C, H, W) of every n-th channel in each of n parts."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], np.ndarray):
        return np.stack(parts, 2).reshape(len(parts[0]), -1, *parts[0].shape[2:])
    import torch

    return torch.stack(parts, 2).flatten(1, 2)


def _keys(x: Array) -> Floats:
    """(N, 4) weights of the taps at -1, 0, 1 and 2 for places x (N,) from 0 to 1 (Keys 1981, a = -1/2)."""
    x2 = x * x
    x3 = x2 * x
    weights = np.empty((len(x), 4), np.float32)
    for k, taps in enumerate((x2 - (x + x3) / 2, 1 - 2.5 * x2 + 1.5 * x3, x / 2 + 2 * x2 - 1.5 * x3, (x3 - x2) / 2)):
        weights[:, k] = taps
    return weights


Geometry = Nested | Displaced


def geometry_of(
    statistics: SceneStatistics,
    origins: Origins,
    margin: int,
    ms: Image,
    rim: int = 0,
    offset: float = 0.0,
    kernel: str = "keys",
) -> Geometry:
    """The geometry of windows (B, C, h, w) of a scene that leaves out `rim` PAN pixels on every side."""
    if statistics.field is None:
        return Nested.without(rim, statistics.ratio, statistics.psf, offset, kernel)
    h, w = ms.shape[-2:]
    return Displaced(statistics, origins, margin, (h, w), rim, kernel)


def displacement_reach(statistics: SceneStatistics) -> int:
    """MS pixels that a displacement adds to the surroundings of a pixel."""
    return 0 if statistics.field is None else math.ceil(statistics.field.bound / statistics.ratio) + 1
