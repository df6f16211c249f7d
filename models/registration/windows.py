"""Windows of a scene: the MS bands against the PAN, blurred and sampled as the MS is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import (
    binary_dilation,
    binary_opening,
    correlate1d,
    map_coordinates,
    shift,
    spline_filter,
    uniform_filter,
)

from uknowpan.models.registration.consensus import Vote
from uknowpan.models.registration.field import Array

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

PARTS = 4
"""Quarters of a window that vote by themselves when looked at again."""
DETAIL = 5
"""MS pixels over which the local mean is taken off."""
LEAST_CORRELATION = 0.45
"""Multiple correlation of a window below which it has no vote."""
CLOUD = 1.0
"""A cloud is brighter in all bands than the median by so many times what the median lies over the darkest 5 %."""
BRIGHT = 50.0
"""Percentile of each band beyond which a place may be a thin cloud."""
MOST_CLOUD = 0.5
"""Share of bright pixels above which they are the scene."""


@dataclass(frozen=True)
class Sample:
    """A window of the scene with `margin_of` MS pixels of context on every side."""

    row: int
    """MS pixel of the frame at which the MS patch begins."""
    col: int
    pan: Array | Floats
    """(ratio h, ratio w)"""
    ms: Array | Floats
    """(C, h, w)"""
    valid_pan: Bools | None = None
    """(ratio h, ratio w)"""
    valid_ms: Bools | None = None
    """(h, w)"""


def gain_to_sigma(gain: float, ratio: int) -> float:
    """Gaussian sigma, PAN pixels, whose transfer at the MS Nyquist frequency is `gain`."""
    return ratio * math.sqrt(-2.0 * math.log(gain)) / math.pi


def margin_of(ratio: int, sigma: float, max_shift: int) -> int:
    """MS pixels of context that a window needs on every side."""
    return math.ceil(max_shift / ratio) + DETAIL // 2 + math.ceil(3 * sigma / ratio + 0.5)


def cut_samples(
    pan: Array,
    ms: Array,
    ratio: int,
    valid_pan: Bools | None,
    valid_ms: Bools | None,
    size: int,
    margin: int,
    most: int = 10,
) -> Iterator[Sample]:
    """Windows of `size` MS pixels on a lattice of at most `most` x `most`, half overlapping where there is no more."""
    h, w = ms.shape[-2:]
    vm = np.ones((h, w), bool) if valid_ms is None else valid_ms
    vp = np.ones(pan.shape, bool) if valid_pan is None else valid_pan
    rim = ((margin, margin), (margin, margin))
    big = tuple((margin * ratio, margin * ratio) for _ in range(2))
    ms = np.pad(ms, ((0, 0), *rim), mode="edge")
    pan, vp, vm = np.pad(pan, big, mode="edge"), np.pad(vp, big), np.pad(vm, rim)
    side = size + 2 * margin
    for row in lattice(h, size, most):
        for col in lattice(w, size, most):
            small = (slice(row, row + side), slice(col, col + side))
            large = tuple(slice(s.start * ratio, s.stop * ratio) for s in small)
            if vm[small].any():
                yield Sample(row - margin, col - margin, pan[large], ms[:, *small], vp[large], vm[small])


def lattice(length: int, size: int, most: int) -> list[int]:
    """Starts of windows along one side of the scene."""
    if length <= size:
        return [0]
    count = min(most, math.ceil(2 * (length - size) / size) + 1)
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


@dataclass(frozen=True)
class Explained:
    """A window's PAN as the bands explain it."""

    left: Array
    """(3, N) what is left of details and slopes"""
    trust: Array
    """(N,) weights of the pixels"""
    noise: float
    """mean square of what stays unexplained"""
    value: float
    """squared multiple correlation"""


class Window:
    """One window: details of the MS bands, and those of the blurred PAN around them as a spline."""

    def __init__(self, sample: Sample, ratio: int, sigma: float, reach: int):
        self.ratio, self.reach = ratio, reach
        margin = margin_of(ratio, sigma, reach)
        self.margin = margin
        pan, pan_valid = _blurred(sample.pan, sample.valid_pan, ratio, sigma)
        h, w = sample.ms.shape[-2:]
        phases = pan.reshape(h, ratio, w, ratio).transpose(1, 3, 0, 2)
        valid = pan_valid.reshape(h, ratio, w, ratio).transpose(1, 3, 0, 2)
        phases, valid = _details(phases, valid)
        self.pan = phases.transpose(2, 0, 3, 1).reshape(h * ratio, w * ratio)
        self.pan_valid = valid.transpose(2, 0, 3, 1).reshape(h * ratio, w * ratio)
        ms_valid = np.ones((h, w), bool) if sample.valid_ms is None else sample.valid_ms
        bands, ms_ok = _details(sample.ms.astype(np.float32), np.broadcast_to(ms_valid, sample.ms.shape))
        inner = (slice(margin, h - margin), slice(margin, w - margin))
        self.ms, self.wide, self.valid = sample.ms[:, *inner], bands, ms_ok[0][inner]
        self.bands = bands[:, *inner]
        self.size = self.valid.shape
        self.row, self.col = (float(x + margin) * ratio + (ratio - 1) / 2 for x in (sample.row, sample.col))
        self.start = margin * ratio + (ratio - 1) // 2
        self._spline: Array | None = None
        self.trust(np.ones(self.size, bool))

    def trust(self, ground: Bools) -> None:
        """Leave out pixels of the MS that are not ground."""
        valid = self.valid & ground
        self.samples = int(valid.sum())
        power = uniform_filter((self.bands**2).mean(0), DETAIL, mode="nearest")
        # Weak texture counts nearly as much as strong: no single roof decides.
        self.mask = np.where(valid, 1 / (power + power.mean() + 1e-20), 0)
        self.mask *= self.samples / max(float(self.mask.sum()), 1e-30)
        self.usable = self.samples > 0.4 * valid.size and float(power.max()) > 0 and float(self.pan_valid.mean()) > 0.25
        x = self.bands.reshape(len(self.bands), -1).astype(np.float64)
        self.weighted = x * self.mask.ravel()
        gram = self.weighted @ x.T
        self.gram = gram + (1e-4 * np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))

    def surface(self) -> Array:
        """(2 reach + 1, 2 reach + 1) squared multiple correlation by (dy, dx)."""
        n, (h, w), r = 2 * self.reach + 1, self.size, self.ratio
        first = self.start - self.reach

        def shifted(x: Array) -> Array:
            a, b = x.strides
            view = np.lib.stride_tricks.as_strided(x[first:, first:], (n, n, h, w), (a, b, a * r, b * r))
            return view.reshape(n * n, h * w)

        pan = shifted(np.ascontiguousarray(self.pan))
        mask = self.mask.ravel().astype(np.float32)
        cross = pan @ self.weighted.T.astype(np.float32)
        power = (pan * pan) @ mask
        explained = np.einsum("nc,cd,nd->n", cross, np.linalg.inv(self.gram), cross)
        value = explained / (power + 1e-6 * power.max() + 1e-30)
        if not self.pan_valid.all():
            seen = shifted(np.ascontiguousarray(self.pan_valid.astype(np.float32))) @ mask / mask.sum()
            # The bands' own power is that of the pixels that the PAN covers.
            value = np.where(seen > 0.6, value / np.maximum(seen, 0.6), 0.0)
        squared: Array = np.clip(value, 0, 0.9999).astype(np.float64)
        return squared.reshape(n, n)[::-1, ::-1]

    def peaks(self, index: int, most: int = 3) -> list[Vote]:
        """The best maxima inside of the search that are high, and sharp in both directions."""
        surface = self.surface()
        inner = surface[1:-1, 1:-1]
        around = [surface[1 + i : surface.shape[0] - 1 + i, 1 + j : surface.shape[1] - 1 + j] for i, j in _NEAR]
        chance = 4.0 * len(self.bands) / self.samples
        high = np.argwhere(np.all([inner >= a for a in around], 0) & (inner > LEAST_CORRELATION**2 + chance))
        tops = sorted(high, key=lambda t: -inner[t[0], t[1]])[:most]
        votes = []
        for k, (i, j) in enumerate(tops):
            cut = surface[i : i + 3, j : j + 3]
            gradient = np.array([cut[2, 1] - cut[0, 1], cut[1, 2] - cut[1, 0]]) / 2
            mixed = (cut[2, 2] - cut[2, 0] - cut[0, 2] + cut[0, 0]) / 4
            curves = [cut[2, 1] - 2 * cut[1, 1] + cut[0, 1], cut[1, 2] - 2 * cut[1, 1] + cut[1, 0]]
            hessian = np.array([[curves[0], mixed], [mixed, curves[1]]])
            weak, sharp = np.linalg.eigvalsh(-hessian)
            if weak <= 0.05 * sharp:
                continue
            shift = np.array([i + 1, j + 1]) - self.reach + np.clip(np.linalg.solve(-hessian, gradient), -1, 1)
            value = float(inner[i, j])
            information = -hessian * self.samples / 8 / (1 - value)
            if 1 / information.diagonal().min() > 1.0:
                continue
            rival = value / float(inner[tuple(tops[0])])
            votes.append(self._vote(index, shift, information, value if k == 0 else value * rival**4 * 0.7))
        return votes

    def _vote(self, index: int, shift: Array, information: Array, weight: float) -> Vote:
        row = self.row + (self.size[0] - 1) / 2 * self.ratio - shift[0]
        col = self.col + (self.size[1] - 1) / 2 * self.ratio - shift[1]
        return Vote(index, row, col, shift, information, weight)

    def sampled(self, place: Array) -> tuple[Array, Array, Array] | None:
        """The PAN's details at places of the MS pixels, (N,), their slopes, (2, N), and the weights, (N,)."""
        at = place - np.array([self.row - self.start, self.col - self.start]).reshape(2, 1, 1)
        limits = np.array(self.pan.shape).reshape(2, 1, 1) - 2.0
        inside = np.all((at >= 1) & (at <= limits), 0)
        whole = np.clip(np.round(at).astype(int), 0, np.array(self.pan.shape).reshape(2, 1, 1) - 1)
        mask = (self.mask * inside * self.pan_valid[whole[0], whole[1]]).ravel()
        if mask.astype(bool).mean() < 0.4:
            return None
        if self._spline is None:
            self._spline = spline_filter(self.pan.astype(np.float64), 3, mode="mirror").astype(np.float32)
        steps = np.array([(0, 0), (0.5, 0), (-0.5, 0), (0, 0.5), (0, -0.5)]).reshape(5, 2, 1, 1)
        points = np.moveaxis(at + steps, 1, 0)
        values = map_coordinates(self._spline, points, order=3, mode="nearest", prefilter=False).reshape(5, -1)
        values = values.astype(np.float64)
        return values[0], np.stack([values[1] - values[2], values[3] - values[4]]), mask

    def aligned(self, bands: Array) -> Array:
        """(C, N) details of the bands, each taken back by its own shift (C, 2) in PAN pixels."""
        m = self.margin
        planes = [
            plane if not beyond.any() else shift(plane, -beyond / self.ratio, order=3, mode="nearest")
            for plane, beyond in zip(self.wide, bands, strict=True)
        ]
        return np.stack([p[m : m + self.size[0], m : m + self.size[1]] for p in planes]).astype(np.float64)

    def explained(self, look: tuple[Array, Array, Array], x: Array) -> Explained | None:
        """The PAN's details and slopes less what the bands (C, N) explain; None where that is little."""
        target, slopes, mask = look
        trust, stack = mask, np.vstack([target, slopes])
        for _ in range(3):  # what does not belong to both, as a car that moved, loses its weight
            gram = (x * trust) @ x.T
            gram += (1e-4 * np.trace(gram) / len(gram) + 1e-30) * np.eye(len(gram))
            gains = np.linalg.solve(gram, (x * trust) @ stack.T).T
            left = stack - gains @ x
            step = np.linalg.solve((left[1:] * trust) @ left[1:].T + 1e-30 * np.eye(2), (left[1:] * trust) @ left[0])
            rest = (left[0] - step @ left[1:]) ** 2
            trust = mask / (1 + rest / (4 * np.median(rest[mask > 0]) + 1e-30)) ** 2
        power, error = (float((trust * v).sum()) for v in (target**2, rest))
        if 1 - error / (power + 1e-30) < LEAST_CORRELATION**2:
            return None
        noise = error / (trust > 0).sum() + 1e-6 * power / trust.size
        return Explained(left, trust, noise, 1 - error / power)

    def band_equations(self, own: Array, likeness: Array, trust: Array) -> tuple[Array, Array]:
        """Normal equations (2, 2) and (2,) of a band's own shift from what it looks like by the PAN and the others."""
        image = likeness.reshape(self.size)
        slopes = np.stack([np.gradient(image, axis=k).ravel() for k in (0, 1)]) / self.ratio
        rest = likeness - own
        noise = float((trust * rest**2).sum()) / (trust > 0).sum() + 1e-30
        return (slopes * trust) @ slopes.T / (4 * noise), (slopes * trust) @ rest / (4 * noise)

    def votes(self, index: int, middle: Array, parts: Explained) -> list[Vote]:
        """Displacements about `middle` (2, h, w) in the window's quarters, by one step on the slopes."""
        left, trust, noise = parts.left, parts.trust, parts.noise
        votes: list[Vote] = []
        for rows, cols in self.quarters():
            inside = np.zeros(self.size, bool)
            inside[rows, cols] = True
            weights = trust * inside.ravel()
            normal = (left[1:] * weights) @ left[1:].T
            low, high = np.linalg.eigvalsh(normal)
            if low <= 0.03 * high or (weights > 0).sum() < 0.4 * inside.sum():
                continue
            step = np.clip(np.linalg.solve(normal, (left[1:] * weights) @ left[0]), -1.5, 1.5)
            information = normal / noise / 4
            if 1 / np.linalg.eigvalsh(information)[0] > 1.0:
                continue
            near = middle[:, rows, cols].mean((1, 2))
            place = [((k.start + k.stop - 1) / 2) * self.ratio for k in (rows, cols)]
            row, col = self.row + place[0] - near[0], self.col + place[1] - near[1]
            votes.append(Vote(PARTS * index + len(votes), row, col, near + step, information, parts.value))
        return votes

    def quarters(self) -> list[tuple[slice, slice]]:
        """Parts of the window that vote by themselves."""
        ends = [(slice(0, n // 2), slice(n // 2, n)) for n in self.size]
        return [(a, b) for a in ends[0] for b in ends[1]]

    def corners(self) -> Array:
        """(2, 2, 2) PAN indices of the outermost MS pixels."""
        ends = [(start, start + (n - 1) * self.ratio) for start, n in zip((self.row, self.col), self.size, strict=True)]
        return np.stack(np.meshgrid(*ends, indexing="ij"))

    def spread(self, corners: Array) -> Array:
        """(2, h, w) between values at the corners, (2, 2, 2)."""
        a, b = (np.linspace(0, 1, n) for n in self.size)
        rows = corners[:, :1] * (1 - a[:, None]) + corners[:, 1:] * a[:, None]
        return rows[:, :, :1] * (1 - b) + rows[:, :, 1:] * b


_NEAR = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]


def _blurred(pan: Array | Floats, valid: Bools | None, ratio: int, sigma: float) -> tuple[Array, Bools]:
    """The PAN by a Gaussian, at places half a pixel on where the ratio is even, and where it is measured."""
    half = math.ceil(3 * sigma)
    even = ratio % 2 == 0
    offsets = np.arange(-half + 0.5, half) if even else np.arange(-half, half + 1.0)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    taps = (taps / taps.sum()).astype(np.float32)

    def blur(x: Any) -> Any:
        for axis in (0, 1):
            x = correlate1d(x, taps, axis, mode="nearest", origin=-1 if even else 0)
        return x

    pan = pan.astype(np.float32)
    if valid is None or valid.all():
        return blur(pan), np.ones(pan.shape, bool)
    share = blur(valid.astype(np.float32))
    level = pan[valid].mean() if valid.any() else 0.0
    return blur(np.where(valid, pan - level, 0)) / np.maximum(share, 0.05), share > 0.9


def _details(x: Array, valid: Bools) -> tuple[Array, Bools]:
    """The last two axes less their local mean over valid pixels, 0 elsewhere."""
    size = (1,) * (x.ndim - 2) + (DETAIL, DETAIL)
    if valid.all():
        return x - uniform_filter(x, size, mode="nearest"), valid
    share = uniform_filter(valid.astype(np.float32), size, mode="constant")
    mean = uniform_filter(np.where(valid, x, 0), size, mode="constant") / np.maximum(share, 0.01)
    keep = valid & (share > 0.55)
    return np.where(keep, x - mean, 0), keep


def leave_clouds(windows: Sequence[Window]) -> None:
    """Leave out large places that are bright in all bands against the scene: clouds lie elsewhere than the ground."""
    low, middle = _levels(windows, 5, 50)
    limit = middle + CLOUD * (middle - low)
    clouds = [binary_opening((w.ms > limit).all(0), np.ones((5, 5), bool)) for w in windows]
    if sum(c.sum() for c in clouds) > MOST_CLOUD * sum(c.size for c in clouds):
        return
    for window, cloud in zip(windows, clouds, strict=True):
        if cloud.any():
            window.trust(~binary_dilation(cloud, np.ones((7, 7), bool)))


def leave_bright(windows: Sequence[Window]) -> None:
    """Leave out places that are bright in all bands, thin clouds and their rims among them."""
    (limit,) = _levels(windows, BRIGHT)
    for window in windows:
        bright = binary_opening((window.ms > limit).all(0), np.ones((3, 3), bool))
        window.trust(~binary_dilation(bright, np.ones((5, 5), bool)))


def _levels(windows: Sequence[Window], *percentiles: float) -> Array:
    """(n, C, 1, 1) percentiles of the bands over all windows."""
    valid = [w.ms[:, w.valid] for w in windows if w.valid.any()]
    if not valid:
        return np.zeros((len(percentiles), 1, 1, 1))
    levels: Array = np.percentile(np.concatenate(valid, 1), percentiles, axis=1)
    return levels[..., None, None]
