"""Blur and shift of the MS against the PAN, estimated from the scene itself.

A degraded PAN is close to a linear combination of the MS bands. The blur and the shift that make
the multiple correlation of the two largest, on details (local mean removed), are those of the MS.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.ndimage import maximum_filter

from uknowpan.models.resample import Array, Image, box_mean, crop, cubic, decimate, degrade, upsample

DETAIL_WINDOW = 5
"""MS pixels of the local mean; a detail is a value less its local mean."""

MAX_SHIFT_MS = 2.5
"""Largest PAN/MS shift looked for, in MS pixels."""

OUTLIER, MOST_OUTLYING = 5.0, 2 / 3
"""Robust standard deviations beyond which what the bands leave of the PAN is an outlier, and the share of its power
from which on outliers are objects that moved: they are left out. Still scenes have 0.64 and less."""

LEAST_CORRELATION = 0.3
"""Multiple correlation below which the blur cannot be measured."""

Window = tuple[npt.ArrayLike, npt.ArrayLike]
"""One sample of a scene: pan (1, H, W) and ms (C, h, w), arrays or tensors in the memory of the CPU."""


@dataclass(frozen=True)
class Psf:
    """Blur and shift of the MS against the PAN, both in PAN pixels."""

    sigma: float
    """Standard deviation of the Gaussian that blurs PAN to the MS's sharpness."""
    shift: tuple[float, float]
    """(dy, dx): MS pixel i shows what PAN shows `shift` further down and right."""
    correlation: float
    """Multiple correlation (0 to 1) of degraded PAN and MS bands on details."""


def gain_to_sigma(gain: float, ratio: float) -> float:
    """Spatial sigma (PAN pixels) of a Gaussian whose MTF at the MS Nyquist frequency is `gain`.

    exp(-2 pi^2 sigma^2 f^2) at f = 1 / (2 ratio).
    """
    return ratio * math.sqrt(-2.0 * math.log(gain)) / math.pi


def default_psf(ratio: int) -> Psf:
    """Assumed blur of a scene where none can be measured: MTF gain 0.3, no shift."""
    return Psf(gain_to_sigma(0.3, ratio), (0.0, 0.0), 0.0)


def in_arrays(windows: Sequence[Window]) -> list[tuple[Array, Array]]:
    """The samples as float32 arrays."""
    return [(np.asarray(pan, np.float32), np.asarray(ms, np.float32)) for pan, ms in windows]


def _detail(x: Array, window: int = DETAIL_WINDOW, border: int = DETAIL_WINDOW // 2) -> Array:
    return crop(x - box_mean(x, window), border)


class _CoarseShift:
    """Whole-pixel shift by cross-correlation on the PAN grid (its peak within +-MAX_SHIFT_MS)."""

    def __init__(self, windows: Sequence[tuple[Array, Array]], ratio: int):
        self.ratio, self.reach, self.large = ratio, int(MAX_SHIFT_MS * ratio), 2 * ratio + 1
        sigma = gain_to_sigma(0.3, ratio)
        self.parts = []
        for pan, ms in windows:
            smooth = self._detail(degrade(pan[None], 1, sigma))
            if min(smooth.shape) > 2 * self.reach + 1:
                self.parts.append((ms, smooth.shape, np.fft.rfft2(smooth), float(np.linalg.norm(smooth))))

    def _detail(self, x: Array) -> Array:
        detail: Array = _detail(x, self.large, self.large)[0, 0]
        return detail

    def __call__(self, weights: Array) -> tuple[float, float]:
        """(dy, dx) of the smoothed PAN against the interpolated sum of the bands with these weights (C,)."""
        side = 2 * self.reach + 1
        total = np.zeros((side, side))
        for ms, shape, spectrum, norm in self.parts:
            intensity = np.tensordot(weights.astype(np.float32), ms, 1)[None, None]
            a = self._detail(upsample(intensity, self.ratio))
            surface = np.fft.irfft2(spectrum * np.fft.rfft2(a).conj(), shape)
            surface = np.roll(surface, (self.reach, self.reach), (0, 1))
            total += surface[:side, :side] / (float(np.linalg.norm(a)) * norm + 1e-12)
        best = int(total.argmax())
        return float(best // side - self.reach), float(best % side - self.reach)


class _Fit:
    """Multiple correlation of degraded PAN and MS bands as a function of (sigma, dy, dx)."""

    def __init__(self, windows: Sequence[tuple[Array, Array]], ratio: int, kept: Sequence[Array] | None = None):
        self.windows, self.ratio, self.kept = windows, ratio, kept
        self.details = [_detail(ms[None])[0].reshape(len(ms), -1).astype(np.float64) for _, ms in windows]
        if kept is not None:
            self.details = [d * keep.ravel() for d, keep in zip(self.details, kept, strict=True)]
        gram = np.sum([d @ d.T for d in self.details], 0)
        self.scale = max(float(gram.diagonal().mean()), 1e-30)
        self.gram = gram / self.scale + 1e-6 * np.eye(len(gram))

    def __call__(self, sigma: float, dy: float, dx: float) -> tuple[float, Array]:
        """(correlation, weights (C,))."""
        cross, power = np.zeros(len(self.gram)), 1e-30
        for low, ms in zip(self._low(sigma, dy, dx), self.details, strict=True):
            low = low.ravel()
            cross += ms @ low / self.scale
            power += float(low @ low) / self.scale
        weights = np.linalg.solve(self.gram, cross)
        explained = float(cross @ weights) / power
        return math.sqrt(min(max(explained, 0.0), 1.0)), weights

    def _low(self, sigma: float, dy: float, dx: float) -> Iterator[Array]:
        """(h, w) details of each sample's degraded PAN, 0 where they are left out."""
        for number, (pan, _) in enumerate(self.windows):
            low = _detail(degrade(pan[None], self.ratio, sigma, (dy, dx)))[0, 0].astype(np.float64)
            yield low if self.kept is None else low * self.kept[number]

    def still(self, sigma: float, dy: float, dx: float) -> list[Array] | None:
        """(h, w) bool per sample: details that no moved object touches. None: no outliers, or nearly all are."""
        weights = self(sigma, dy, dx)[1]
        left = [
            low - (weights @ ms).reshape(low.shape)
            for low, ms in zip(self._low(sigma, dy, dx), self.details, strict=True)
        ]
        size = np.abs(np.concatenate([x.ravel() for x in left]))
        limit = OUTLIER * 1.4826 * float(np.median(size))
        if (size[size > limit] ** 2).sum() <= MOST_OUTLYING * (size**2).sum():
            return None
        kept = [maximum_filter(np.abs(x), DETAIL_WINDOW) <= limit for x in left]
        return kept if 2 * sum(k.sum() for k in kept) > size.size else None


def _parabola_peak(left: float, middle: float, right: float) -> float:
    """The place at which three equally spaced values peak, in steps from the middle, within +-1."""
    curvature = left - 2 * middle + right
    if curvature >= 0:
        return 1.0 if right > left else -1.0
    return min(max(0.5 * (left - right) / curvature, -1.0), 1.0)


def estimate_psf(windows: Sequence[Window], ratio: int) -> Psf:
    """Blur and shift of the MS against the PAN, from samples of one scene.

    Args:
        windows: samples, each pan (1, H, W) and ms (C, h, w) with H = ratio * h, any gain.
        ratio: PAN pixels per MS pixel.

    Returns:
        The best `Psf`, or `default_psf` where the details of PAN and MS hardly correlate.
    """
    usable = [w for w in in_arrays(windows) if min(w[1].shape[-2:]) >= 16]
    if not usable:
        return default_psf(ratio)
    fit = _Fit(usable, ratio)
    psf = _fitted(fit, _CoarseShift(usable, ratio))
    kept = fit.still(psf.sigma, *psf.shift) if psf.correlation > 0 else None
    return psf if kept is None else _fitted(_Fit(usable, ratio, kept), lambda _: psf.shift)


def _fitted(fit: _Fit, coarse: Callable[[Array], tuple[float, float]]) -> Psf:
    """The best blur and shift; `coarse` gives a shift to begin with, for weights (C,) of the bands."""
    ratio = fit.ratio
    sigma = gain_to_sigma(0.3, ratio)
    (best, weights), (dy, dx) = fit(sigma, 0.0, 0.0), (0.0, 0.0)
    # At a wrong place the regression's weights are chance: the plain sum of the bands is tried, too.
    # The third trial has the weights that belong to the best place so far.
    equal = 1 / np.sqrt(fit.gram.diagonal())
    for tried in (weights, equal, None):
        shift = coarse(weights if tried is None else tried)
        value, fitted = fit(sigma, *shift)
        if value > best:
            best, (dy, dx), weights = value, shift, fitted
    # Coordinate ascent with a parabola per axis; sigma moves on a logarithmic scale.
    point = [math.log(sigma), dy, dx]
    steps = [0.35, 0.25 * ratio, 0.25 * ratio]
    low, high = math.log(0.15 * ratio), math.log(0.95 * ratio)
    for _ in range(5):
        for axis in (1, 2, 0):
            values = []
            for sign in (-1, 1):
                trial = list(point)
                trial[axis] += sign * steps[axis]
                trial[0] = min(max(trial[0], low), high)
                values.append(fit(math.exp(trial[0]), trial[1], trial[2])[0])
            move = _parabola_peak(values[0], best, values[1])
            trial = list(point)
            trial[axis] += move * steps[axis]
            trial[0] = min(max(trial[0], low), high)
            value = fit(math.exp(trial[0]), trial[1], trial[2])[0]
            if value >= best:
                best, point = value, trial
        steps = [s * 0.5 for s in steps]
    limit = (MAX_SHIFT_MS + 0.5) * ratio
    # Few samples correlate by chance, more so with more bands; the factor 8 was measured on
    # unrelated images.
    samples = sum(d.shape[1] for d in fit.details) if fit.kept is None else sum(k.sum() for k in fit.kept)
    chance = math.sqrt(8 * (len(fit.gram) + 2) / samples)
    if best < max(LEAST_CORRELATION, chance) or max(abs(point[1]), abs(point[2])) > limit:
        return default_psf(ratio)
    return Psf(math.exp(point[0]), (point[1], point[2]), best)


def pan_on_ms_grid(pan: Image, ratio: int, shift: tuple[float, float]) -> Image:
    """PAN (1, H, W) sampled at the MS pixels (1, h, w) by an antialiased cubic kernel.

    The result is about as sharp as pixels of that size can be.
    """
    reduced: Image = decimate(pan[None], ratio, cubic(ratio), shift, 6)[0]
    return reduced


def softness_of_ms(windows: Sequence[Window], ratio: int, shift: tuple[float, float]) -> float | None:
    """Softness of the MS against the PAN on the MS's own grid: sigma of a Gaussian, MS pixels.

    Truths in training have the same softness against their PAN. None: not measurable.
    """
    psf = estimate_psf([(pan_on_ms_grid(pan, ratio, shift), ms) for pan, ms in in_arrays(windows)], 1)
    return psf.sigma if psf.correlation > 0 else None
