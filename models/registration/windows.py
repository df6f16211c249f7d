"""Windows of a scene, looked at together: the MS bands against the PAN, blurred and sampled as the MS is.

n windows, C bands, N MS pixels in a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.ndimage import binary_dilation, binary_opening, uniform_filter

from uknowpan.models.registration.consensus import Votes
from uknowpan.models.registration.field import Array
from uknowpan.models.registration.samples import DETAIL, Bools, Pixels
from uknowpan.models.registration.splines import Floats, coefficients, shifted, slopes, taps

PARTS = 4
"""Quarters of a window that vote by themselves when looked at again."""
MOST_PEAKS = 3
"""Votes of a window at the first look."""
LEAST_CORRELATION = 0.45
"""Multiple correlation of a window below which it has no vote."""
LEAST_SEEN = 0.4
"""Share of a window's pixels that must be seen."""
CLOUD = 1.0
"""A cloud is brighter in all bands than the median by so many times what the median lies over the darkest 5 %."""
BRIGHT = 50.0
"""Percentile of each band beyond which a place may be a thin cloud."""
MOST_CLOUD = 0.5
"""Share of bright pixels above which they are the scene."""
BAND_RIDGE = 0.02
BAND_PRIOR = 1.0
"""PAN pixels by which bands lie off each other before anything is seen."""


@dataclass(frozen=True)
class Look:
    """The PAN in the places of a field, as the bands explain it, in those of the windows where they do."""

    index: Array
    """(m,) of the windows"""
    images: Floats
    """(m, C + 1, N) details of the bands and of the PAN"""
    left: Floats
    """(m, 3, N) what is left of the PAN's details and slopes"""
    trust: Floats
    """(m, N) weights of the pixels"""
    noise: Array
    """(m,) mean square of what stays unexplained"""
    value: Array
    """(m,) squared multiple correlation"""


class Windows:
    """The windows of a scene that can be compared.

    Args:
        pixels: all windows.
        ratio: PAN pixels per MS pixel.
        reach: PAN pixels that are searched on every side.
        ground: (n, h, w); pixels of the MS that are no ground are left out. None: all are.
    """

    def __init__(self, pixels: Pixels, ratio: int, reach: int, ground: Bools | None = None):
        self.ratio, self.reach = ratio, reach
        valid = pixels.valid if ground is None else pixels.valid & ground
        bands, power = _inner(pixels)
        usable = valid.mean((1, 2)) > LEAST_SEEN
        usable &= (power.max((1, 2)) > 0) & (pixels.pan_valid.mean((1, 2)) > 0.25)
        self.pixels, self.size = pixels.where(usable), pixels.valid.shape[1:]
        valid, bands, power = valid[usable], bands[usable], power[usable]
        # Weak texture counts nearly as much as strong: no single roof decides.
        mask = np.where(valid, 1 / (power + power.mean((1, 2), keepdims=True) + 1e-20), 0)
        self.samples: Array = valid.sum((1, 2)).astype(float)
        mask *= (self.samples / np.maximum(mask.sum((1, 2)), 1e-30))[:, None, None]
        self.mask: Floats = mask.reshape(len(mask), self.size[0] * self.size[1]).astype(np.float32)
        """(n, N) weights of the pixels"""
        self.bands: Floats = bands.reshape(*bands.shape[:2], self.size[0] * self.size[1])
        """(n, C, N)"""
        self._spline: Floats | None = None
        """of the bands with their margins"""

    def __len__(self) -> int:
        return len(self.mask)

    def without_clouds(self) -> Windows:
        """Without large places that are bright in all bands against the scene: clouds lie elsewhere than the ground."""
        low, middle = _levels(self.pixels, 5, 50)
        clouds = _opened(self.pixels, middle + CLOUD * (middle - low), 5)
        if not clouds.any() or clouds.mean() > MOST_CLOUD:
            return self
        return Windows(self.pixels, self.ratio, self.reach, ~binary_dilation(clouds, np.ones((1, 7, 7), bool)))

    def without_bright(self) -> Windows:
        """Without places that are bright in all bands, thin clouds and their rims among them."""
        bright = _opened(self.pixels, _levels(self.pixels, BRIGHT)[0], 3)
        return Windows(self.pixels, self.ratio, self.reach, ~binary_dilation(bright, np.ones((1, 5, 5), bool)))

    def surfaces(self) -> Array:
        """(n, 2 reach + 1, 2 reach + 1) squared multiple correlation by (dy, dx)."""
        n, (h, w), r = 2 * self.reach + 1, self.size, self.ratio
        first = (self.pixels.pan.shape[1] - h * r) // 2 + (r - 1) // 2 - self.reach

        def shifted(x: Floats) -> Floats:
            a, b = x.strides
            view = np.lib.stride_tricks.as_strided(x[first:, first:], (n, n, h, w), (a, b, a * r, b * r))
            return view.reshape(n * n, h * w)

        weighted = self.bands * self.mask[:, None]
        inverse = np.linalg.inv(_ridged(weighted @ self.bands.swapaxes(1, 2)))
        surfaces = np.zeros((len(self), n * n))
        for k, pixels in enumerate(self.pixels.pan):
            pan, mask = shifted(pixels), self.mask[k]
            cross = pan @ weighted[k].T
            power = np.square(pan, out=pan) @ mask
            value = np.einsum("nc,cd,nd->n", cross, inverse[k], cross) / (power + 1e-6 * power.max() + 1e-30)
            valid = self.pixels.pan_valid[k]
            if not valid.all():
                seen = shifted(valid.astype(np.float32)) @ mask / mask.sum()
                # The bands' own power is that of the pixels that the PAN covers.
                value = np.where(seen > 0.6, value / np.maximum(seen, 0.6), 0.0)
            surfaces[k] = np.clip(value, 0, 0.9999)
        return surfaces.reshape(-1, n, n)[:, ::-1, ::-1]

    def peaks(self) -> Votes:
        """The best maxima inside of the search that are high, and sharp in both directions."""
        surfaces = self.surfaces()
        side = surfaces.shape[1] - 2
        near = {(i, j): surfaces[:, i : i + side, j : j + side] for i in range(3) for j in range(3)}
        inner = near[1, 1]
        chance = 4.0 * self.bands.shape[1] / self.samples[:, None, None]
        high = np.all([inner >= x for x in near.values()], 0) & (inner > LEAST_CORRELATION**2 + chance)
        window, i, j = np.nonzero(high)
        order = np.lexsort((-inner[high], window))
        window, i, j = window[order], i[order], j[order]
        first = np.searchsorted(window, window)
        rank = np.arange(len(window)) - first
        cut = {place: x[window, i, j] for place, x in near.items()}
        value, best = cut[1, 1], cut[1, 1][first]
        gradient = np.stack([cut[2, 1] - cut[0, 1], cut[1, 2] - cut[1, 0]], 1) / 2
        mixed = (cut[2, 2] - cut[2, 0] - cut[0, 2] + cut[0, 0]) / 4
        curves = [2 * value - cut[2, 1] - cut[0, 1], 2 * value - cut[1, 2] - cut[1, 0]]
        bowl = np.stack([np.stack([curves[0], -mixed], 1), np.stack([-mixed, curves[1]], 1)], 1)
        weak, sharp = np.linalg.eigvalsh(bowl).T
        information = bowl * (self.samples[window] / 8 / (1 - value))[:, None, None]
        keep = (rank < MOST_PEAKS) & (weak > 0.05 * sharp) & (information[:, [0, 1], [0, 1]].min(1) >= 1.0)
        step = np.zeros_like(gradient)
        step[keep] = np.clip(np.linalg.solve(bowl[keep], gradient[keep][..., None])[..., 0], -1, 1)
        shift = np.stack([i, j], 1) + 1 - self.reach + step
        weight = np.where(rank == 0, value, value * (value / best) ** 4 * 0.7)
        middle = (np.array(self.size) - 1) / 2 * self.ratio
        place = self.pixels.place[window] + middle - shift
        return Votes(*(x[keep] for x in (window, place, shift, information, weight)))

    def corners(self) -> Array:
        """(2, n, 2, 2) PAN indices of the outermost MS pixels."""
        far = (np.array(self.size) - 1) * self.ratio
        rows, cols = (np.stack([x, x + length], 1) for x, length in zip(self.pixels.place.T, far, strict=True))
        return np.stack(np.broadcast_arrays(rows[:, :, None], cols[:, None, :]))

    def spread(self, corners: Array) -> Array:
        """(2, n, h, w) between values at the corners, (2, n, 2, 2)."""
        down, across = (np.linspace((1.0, 0.0), (0.0, 1.0), count) for count in self.size)
        values: Array = down @ corners @ across.T
        return values

    def look(self, places: Array, beyond: Array) -> Look | None:
        """The PAN at places of the MS pixels, (2, n, h, w), as bands explain it that lie off by (C, 2) PAN pixels.

        None: no window has its PAN explained.
        """
        stack, mask = self._sampled(places)
        index = np.flatnonzero((mask > 0).mean(1) >= LEAST_SEEN)
        bands, stack, mask = self._aligned(beyond)[index], stack[index], mask[index]
        trust, seen = mask, (mask > 0).sum(1)
        middle = (seen - 1) // 2, seen // 2
        for _ in range(3):  # what does not belong to both, as a car that moved, loses its weight
            weighted = bands * trust[:, None]
            moments: Array = (weighted @ stack.swapaxes(1, 2)).astype(float)
            gains = np.linalg.solve(_ridged(weighted @ bands.swapaxes(1, 2)), moments).astype(np.float32)
            left = stack - gains.swapaxes(1, 2) @ bands
            step = _solved((left[:, 1:] * trust[:, None]) @ left.swapaxes(1, 2))
            rest = (left[:, 0] - np.einsum("nk,nkx->nx", step.astype(np.float32), left[:, 1:])) ** 2
            ordered = np.sort(np.where(mask > 0, rest, np.inf), 1)
            median = np.mean([np.take_along_axis(ordered, k[:, None], 1) for k in middle], 0)
            trust = mask / (1 + rest / (4 * median + 1e-30)) ** 2
        power, error = ((trust * v).sum(1, dtype=float) for v in (stack[:, 0] ** 2, rest))
        value = 1 - error / (power + 1e-30)
        keep = value >= LEAST_CORRELATION**2
        if not keep.any():
            return None
        noise = error / seen + 1e-6 * power / trust.shape[1]
        images = np.concatenate([bands, stack[:, :1]], 1)
        return Look(*(x[keep] for x in (index, images, left, trust, noise, value)))

    def _sampled(self, places: Array) -> tuple[Floats, Floats]:
        """(n, 3, N) details of the PAN and their slopes down and right at places (2, n, h, w), and weights (n, N)."""
        n, height, width = self.pixels.spline.shape
        rim = (height - self.size[0] * self.ratio) // 2 + (self.ratio - 1) // 2
        at = places - (self.pixels.place.T - rim)[:, :, None, None]
        limits = np.array([height, width]).reshape(2, 1, 1, 1) - 2
        inside = np.all((at >= 1) & (at <= limits), 0)
        whole = np.clip(at.astype(np.intp), 1, limits - 1)
        first = np.arange(n)[:, None, None] * (height * width) + whole[0] * width + whole[1]
        down, across = ((at[k] - whole[k]).astype(np.float32).ravel() for k in (0, 1))
        nearest = first + (at[0] - whole[0] >= 0.5) * width + (at[1] - whole[1] >= 0.5)
        mask = self.mask * (inside & self.pixels.pan_valid.ravel()[nearest]).reshape(n, -1)
        flat, corner = self.pixels.spline.ravel(), first.ravel() - width - 1
        values, rows, cols = np.zeros((3, first.size), np.float32)
        rise, run = zip(taps(down), slopes(down), strict=True), list(zip(taps(across), slopes(across), strict=True))
        for i, (weight, change) in enumerate(rise):
            line, slope = np.zeros((2, first.size), np.float32)
            for j, (along, turn) in enumerate(run):
                pixels = flat[i * width + j :][corner]
                line += along * pixels
                slope += turn * pixels
            values += weight * line
            rows += change * line
            cols += weight * slope
        return np.stack([x.reshape(n, -1) for x in (values, rows, cols)], 1), mask

    def _aligned(self, beyond: Array) -> Floats:
        """(n, C, N) details of the bands, each taken back by its own shift (C, 2) in PAN pixels."""
        if not beyond.any():
            return self.bands
        if self._spline is None:
            self._spline = coefficients(self.pixels.wide)
        margin = (self._spline.shape[2] - self.size[0]) // 2
        off = margin + np.clip(beyond / self.ratio, 1 - margin, margin - 2.001)
        planes = [shifted(self._spline[:, band], row, col, *self.size) for band, (row, col) in enumerate(off)]
        return np.stack(planes, 1).reshape(self.bands.shape)

    def votes(self, look: Look, middle: Array) -> Votes:
        """Displacements about `middle` (2, n, h, w) in the windows' quarters, by one step on the slopes."""
        count, (h, w) = len(look.index), self.size
        left, trust = look.left.reshape(count, 3, h, w), look.trust.reshape(count, h, w)
        ends = [(slice(0, n // 2), slice(n // 2, n)) for n in self.size]
        parts = []
        for number, (rows, cols) in enumerate((a, b) for a in ends[0] for b in ends[1]):
            part, weights = left[:, :, rows, cols].reshape(count, 3, -1), trust[:, rows, cols].reshape(count, -1)
            moments = (part[:, 1:] * weights[:, None]) @ part.swapaxes(1, 2)
            low, high = np.linalg.eigvalsh(moments[:, :, 1:].astype(float)).T
            keep = (low > 0.03 * high) & ((weights > 0).mean(1) >= LEAST_SEEN)
            spread = 4 * look.noise / np.maximum(low, 1e-30)
            keep &= spread <= 1.0
            step = np.clip(_solved(moments), -1.5, 1.5)
            near = middle[:, look.index, rows, cols].mean((2, 3)).T
            centre = [((k.start + k.stop - 1) / 2) * self.ratio for k in (rows, cols)]
            place = self.pixels.place[look.index] + centre - near
            information = moments[:, :, 1:] / (4 * look.noise)[:, None, None]
            parts.append([x[keep] for x in (PARTS * look.index + number, place, near + step, information, look.value)])
        window, *rest = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(window)
        return Votes(window[order], *(x[order] for x in rest))

    def band_steps(self, look: Look) -> tuple[Array, Array]:
        """(C, 2) steps of the bands' own shifts, by what each looks like by the PAN and the others; their errors."""
        images, trust = look.images, look.trust
        count = images.shape[1] - 1
        step, doubt = np.zeros((count, 2)), np.full((count, 2), math.inf)
        gram = ((images * trust[:, None]) @ images.swapaxes(1, 2)).sum(0, dtype=float)
        for band in range(count) if count > 1 else ():
            others = [k for k in range(count + 1) if k != band]
            power = gram[np.ix_(others, others)]
            gains = np.linalg.solve(power + np.diag(BAND_RIDGE * power.diagonal() + 1e-30), gram[others, band])
            likeness = np.einsum("k,nkx->nx", gains.astype(np.float32), images[:, others])
            image = likeness.reshape(len(images), *self.size)
            rest = likeness - images[:, band]
            slopes = [np.gradient(image, axis=k).reshape(rest.shape) / self.ratio for k in (1, 2)]
            stack = np.stack([*slopes, rest], 1)
            weights = trust / (4 * (trust * rest**2).sum(1) / (trust > 0).sum(1) + 1e-30)[:, None]
            moments = ((stack[:, :2] * weights[:, None]) @ stack.swapaxes(1, 2)).sum(0, dtype=float)
            normal = moments[:, :2] + np.eye(2) / BAND_PRIOR**2
            step[band] = np.linalg.solve(normal, moments[:, 2])
            doubt[band] = np.sqrt(np.linalg.inv(normal).diagonal())
        return np.clip(step, -0.7, 0.7), doubt


def _inner(pixels: Pixels) -> tuple[Floats, Floats]:
    """(n, C, h, w) details of the bands without the margin, and (n, h, w) their local mean square."""
    margin = (pixels.wide.shape[2] - pixels.valid.shape[1]) // 2
    bands = np.ascontiguousarray(pixels.wide[:, :, margin:-margin, margin:-margin])
    power: Floats = uniform_filter((bands**2).mean(1), (1, DETAIL, DETAIL), mode="nearest")
    return bands, power


def _opened(pixels: Pixels, limits: Array, side: int) -> Bools:
    """(n, h, w) places of `side` x `side` pixels in which all bands exceed their limits (C, 1, 1)."""
    bright = np.all(pixels.ms > limits, axis=1)
    opened: Bools = binary_opening(bright, np.ones((1, side, side), bool))
    return opened


def _levels(pixels: Pixels, *percentiles: float) -> Array:
    """(n, C, 1, 1) percentiles of the bands over all windows."""
    valid = pixels.ms.swapaxes(0, 1)[:, pixels.valid]
    if not valid.size:
        return np.zeros((len(percentiles), 1, 1, 1))
    levels: Array = np.percentile(valid, percentiles, axis=1)
    return levels[..., None, None]


def _ridged(gram: Any) -> Array:
    """(n, C, C) a little larger on the diagonal, so that it can be solved."""
    power = np.trace(gram, axis1=1, axis2=2).astype(float) / gram.shape[1]
    ridged: Array = gram + (1e-4 * power + 1e-30)[:, None, None] * np.eye(gram.shape[1])
    return ridged


def _solved(moments: Any) -> Array:
    """(n, 2) solutions of normal equations; moments (n, 2, 3) of two slopes with the rest and with each other."""
    normal = moments[:, :, 1:].astype(float) + 1e-30 * np.eye(2)
    solved: Array = np.linalg.solve(normal, moments[:, :, :1].astype(float))[..., 0]
    return solved
