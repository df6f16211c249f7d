"""Windows of a scene: details of the MS bands, and of the PAN blurred as the MS is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.ndimage import correlate1d, uniform_filter1d

from uknowpan.models.registration.field import Array
from uknowpan.models.registration.splines import Floats, coefficients

Bools = npt.NDArray[np.bool_]

DETAIL = 5
"""MS pixels over which the local mean is taken off."""


@dataclass(frozen=True)
class Sample:
    """A part of the scene: windows, with `margin_of` MS pixels of context on every side of them."""

    row: int
    """MS pixel of the frame at which the part begins, context included."""
    col: int
    pan: Array | Floats
    """(ratio h, ratio w)"""
    ms: Array | Floats
    """(C, h, w)"""
    valid_pan: Bools | None = None
    """(ratio h, ratio w)"""
    valid_ms: Bools | None = None
    """(h, w)"""
    places: Sequence[tuple[int, int]] = ((0, 0),)
    """MS pixels of the part at which windows begin, context included."""
    size: int | None = None
    """MS pixels along a window's side, at most; None: the part is one window."""


def margin_of(ratio: int, sigma: float, max_shift: int) -> int:
    """MS pixels of context that a window needs on every side."""
    return math.ceil(max_shift / ratio) + DETAIL // 2 + math.ceil(3 * sigma / ratio + 0.5)


def whole_sample(
    pan: Array, ms: Array, ratio: int, valid_pan: Bools | None, valid_ms: Bools | None, size: int, margin: int
) -> Sample:
    """A scene, with context added, and windows of `size` MS pixels on the lattice of `starts`."""
    valid_ms = np.ones(ms.shape[-2:], bool) if valid_ms is None else valid_ms
    valid_pan = np.ones(pan.shape, bool) if valid_pan is None else valid_pan
    rim, big = (((n, n), (n, n)) for n in (margin, margin * ratio))
    places = [(row, col) for row in starts(ms.shape[-2], size) for col in starts(ms.shape[-1], size)]
    return Sample(
        -margin, -margin, np.pad(pan, big, mode="edge"), np.pad(ms, ((0, 0), *rim), mode="edge"),
        np.pad(valid_pan, big), np.pad(valid_ms, rim), places, size,
    )  # fmt: skip


def starts(length: int, size: int, most: int = 10) -> list[int]:
    """Starts of at most `most` windows along one side of the scene, half overlapping where there is no more."""
    if length <= size:
        return [0]
    count = min(most, math.ceil(2 * (length - size) / size) + 1)
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Pixels:
    """The n windows of a scene, side by side."""

    pan: Floats
    """(n, H, W) details of the blurred PAN"""
    spline: Floats
    """(n, H, W) coefficients of its cubic B-spline"""
    pan_valid: Bools
    """(n, H, W)"""
    ms: Floats
    """(n, C, h, w) the bands"""
    wide: Floats
    """(n, C, h + 2 margin, w + 2 margin) details of the bands"""
    valid: Bools
    """(n, h, w) where the details of the bands are measured"""
    place: Array
    """(n, 2) PAN pixel of the frame in the middle of each window's first MS pixel"""

    def where(self, keep: Bools) -> Pixels:
        """Some of the windows."""
        return self if keep.all() else Pixels(*(getattr(self, f.name)[keep] for f in fields(self)))


def pixels_of(samples: Iterable[Sample], ratio: int, sigma: float, margin: int, rim: int) -> Pixels | None:
    """The windows of all samples, with `rim` MS pixels of the PAN around each; None: there is no window."""
    parts = [_pixels(sample, ratio, sigma, margin, rim) for sample in samples]
    if not parts:
        return None
    whole = Pixels(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Pixels)))
    for arrays in ((whole.pan, whole.spline), (whole.wide,)):  # of one size, so that no square overflows
        scale = float(np.abs(arrays[0]).max())
        for array in arrays:
            array /= scale or 1.0
    return whole


def _pixels(sample: Sample, ratio: int, sigma: float, margin: int, rim: int) -> Pixels:
    """The windows of one sample."""
    h, w = sample.ms.shape[-2:]
    pan, blurred_valid = _blurred(sample.pan.astype(np.float32), sample.valid_pan, ratio, sigma)
    pan, pan_valid = _details(pan, blurred_valid, ratio)
    valid = np.ones((h, w), bool) if sample.valid_ms is None else sample.valid_ms
    details = [_details(band.astype(np.float32), valid, 1) for band in sample.ms]
    wide, valid = np.stack([d[0] for d in details]), details[0][1]
    height, width = (min(n - 2 * margin, sample.size or n) for n in (h, w))

    def cut(x: Any, around: int, step: int = 1) -> npt.NDArray[Any]:
        """The windows' part of an image, and `around` MS pixels on every side, `step` pixels each."""
        tall, broad = ((n + 2 * around) * step for n in (height, width))
        corners = [((r + margin - around) * step, (c + margin - around) * step) for r, c in sample.places]
        return np.stack([x[..., r : r + tall, c : c + broad] for r, c in corners])

    places = np.array(sample.places, float) + np.array([sample.row + margin, sample.col + margin])
    return Pixels(
        cut(pan, rim, ratio), cut(coefficients(pan), rim, ratio), cut(pan_valid, rim, ratio),
        cut(sample.ms, 0).astype(np.float32), cut(wide, margin), cut(valid, 0), places * ratio + (ratio - 1) / 2,
    )  # fmt: skip


def _blurred(pan: Floats, valid: Bools | None, ratio: int, sigma: float) -> tuple[Floats, Bools]:
    """The PAN by a Gaussian, at places half a pixel on where the ratio is even, and where it is measured."""
    half = math.ceil(3 * sigma)
    even = ratio % 2 == 0
    offsets = np.arange(-half + 0.5, half) if even else np.arange(-half, half + 1.0)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    taps /= taps.sum()

    def blur(x: Any, axis: int) -> Any:
        return correlate1d(x, taps, axis, mode="nearest", origin=-1 if even else 0)

    if valid is None or valid.all():
        return blur(blur(pan, 0), 1), np.ones(pan.shape, bool)
    rows, cols = (valid.any(axis).astype(np.float32) for axis in (1, 0))
    if valid.sum() == rows.sum() * cols.sum():  # a rectangle, as at the border of a scene
        share = blur(rows, 0)[:, None] * blur(cols, 0)
    else:
        share = blur(blur(valid.astype(np.float32), 0), 1)
    level = pan[valid].mean() if valid.any() else 0.0
    return blur(blur(np.where(valid, pan - level, 0), 0), 1) / np.maximum(share, 0.05), share > 0.9


def _details(x: Floats, valid: Bools, step: int) -> tuple[Floats, Bools]:
    """(h, w) less the mean of `DETAIL` x `DETAIL` valid pixels `step` apart, 0 elsewhere."""
    shape = x.shape
    blocks = (shape[0] // step, step * shape[1]), (shape[0], shape[1] // step, step)

    def mean(values: Any, mode: Literal["nearest", "constant"]) -> Any:
        for axis, block in enumerate(blocks):
            values = uniform_filter1d(values.reshape(block), DETAIL, axis, mode=mode)
        return values.reshape(shape)

    if valid.all():
        return x - mean(x, "nearest"), valid
    share = mean(valid.astype(np.float32), "constant")
    local = mean(np.where(valid, x, np.float32(0)), "constant") / np.maximum(share, np.float32(0.01))
    keep = valid & (share > 0.55)
    return np.where(keep, x - local, np.float32(0)), keep
