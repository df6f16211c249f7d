"""Blur and shift of the MS against the PAN, estimated from the scene itself.

A degraded PAN is close to a linear combination of the MS bands. The blur and the shift that make
the multiple correlation of the two largest, on details (local mean removed), are those of the MS.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uknowpan.models.resample import box_mean, crop, cubic, decimate, degrade, upsample

DETAIL_WINDOW = 5
"""MS pixels of the local mean; a detail is a value less its local mean."""

MAX_SHIFT_MS = 2.5
"""Largest PAN/MS shift looked for, in MS pixels."""

LEAST_CORRELATION = 0.3
"""Multiple correlation below which the blur cannot be measured."""

Window = tuple[Tensor, Tensor]
"""One sample of a scene: pan (1, H, W) and ms (C, h, w)."""


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


def _detail(x: Tensor) -> Tensor:
    return crop(x - box_mean(x, DETAIL_WINDOW), DETAIL_WINDOW // 2)


def _coarse_shift(windows: Sequence[Window], weights: Tensor, ratio: int) -> tuple[float, float]:
    """Whole-pixel shift by cross-correlation on the PAN grid (its peak within +-MAX_SHIFT_MS)."""
    reach = int(MAX_SHIFT_MS * ratio)
    total = torch.zeros(2 * reach + 1, 2 * reach + 1)
    sigma = gain_to_sigma(0.3, ratio)
    for pan, ms in windows:
        intensity = torch.einsum("c,chw->hw", weights, ms)[None, None]
        # A smoothed PAN against the interpolated intensity, both without their local means.
        a = upsample(intensity, ratio)
        b = degrade(pan[None], 1, sigma, (0.0, 0.0))
        big = 2 * ratio + 1
        a, b = (crop(x - box_mean(x, big), big)[0, 0] for x in (a, b))
        spectrum = torch.fft.rfft2(b) * torch.fft.rfft2(a).conj()
        surface = torch.fft.irfft2(spectrum, s=a.shape)
        if min(surface.shape) <= 2 * reach + 1:
            continue
        surface = torch.roll(surface, (reach, reach), (0, 1))
        total += surface[: 2 * reach + 1, : 2 * reach + 1] / (a.norm() * b.norm() + 1e-12)
    best = int(total.argmax())
    return float(best // (2 * reach + 1) - reach), float(best % (2 * reach + 1) - reach)


class _Fit:
    """Multiple correlation of degraded PAN and MS bands as a function of (sigma, dy, dx)."""

    def __init__(self, windows: Sequence[Window], ratio: int):
        self.windows, self.ratio = windows, ratio
        self.details = [_detail(ms[None])[0].flatten(1).double() for _, ms in windows]
        gram = torch.stack([d @ d.T for d in self.details]).sum(0)
        scale = gram.diagonal().mean().clamp_min(1e-30)
        self.gram = gram / scale + 1e-6 * torch.eye(len(gram), dtype=gram.dtype)
        self.scale = scale

    def __call__(self, sigma: float, dy: float, dx: float) -> tuple[float, Tensor]:
        """(correlation, weights (C,))."""
        cross, power = torch.zeros(len(self.gram), dtype=torch.float64), 1e-30
        for (pan, _), ms in zip(self.windows, self.details, strict=True):
            low = _detail(degrade(pan[None], self.ratio, sigma, (dy, dx)))[0].flatten().double()
            cross += ms @ low / self.scale
            power += float(low @ low) / float(self.scale)
        weights = torch.linalg.solve(self.gram, cross)
        explained = float(cross @ weights) / power
        return math.sqrt(min(max(explained, 0.0), 1.0)), weights


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
    usable = [w for w in windows if min(w[1].shape[-2:]) >= 16]
    if not usable:
        return default_psf(ratio)
    fit = _Fit(usable, ratio)
    sigma = gain_to_sigma(0.3, ratio)
    (best, weights), (dy, dx) = fit(sigma, 0.0, 0.0), (0.0, 0.0)
    # At a wrong place the regression's weights are chance: the plain sum of the bands is tried, too.
    # The third trial has the weights that belong to the best place so far.
    equal = fit.gram.diagonal().rsqrt()
    for tried in (weights, equal, None):
        shift = _coarse_shift(usable, (weights if tried is None else tried).float(), ratio)
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
    samples = sum(d.shape[1] for d in fit.details)
    chance = math.sqrt(8 * (len(fit.gram) + 2) / samples)
    if best < max(LEAST_CORRELATION, chance) or max(abs(point[1]), abs(point[2])) > limit:
        return default_psf(ratio)
    return Psf(math.exp(point[0]), (point[1], point[2]), best)


def pan_on_ms_grid(pan: Tensor, ratio: int, shift: tuple[float, float]) -> Tensor:
    """PAN (1, H, W) sampled at the MS pixels (1, h, w) by an antialiased cubic kernel.

    The result is about as sharp as pixels of that size can be.
    """
    return decimate(pan[None], ratio, cubic(ratio), shift, 6)[0]


def softness_of_ms(windows: Sequence[Window], ratio: int, shift: tuple[float, float]) -> float | None:
    """Softness of the MS against the PAN on the MS's own grid: sigma of a Gaussian, MS pixels.

    Truths in training have the same softness against their PAN. None: not measurable.
    """
    reduced = [(pan_on_ms_grid(pan, ratio, shift), ms) for pan, ms in windows]
    psf = estimate_psf(reduced, 1)
    return psf.sigma if psf.correlation > 0 else None
