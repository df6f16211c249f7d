"""Classical methods of the field's benchmarks, whose scores a model's are compared with.

They follow their papers, with the toolbox's filters and resampling (Vivone et al., "A Critical Comparison Among
Pansharpening Algorithms", IEEE TGRS 2015; "A New Benchmark Based on Recent Advances in Multispectral Pansharpening",
IEEE GRSM 2021). All statistics are those of one image: `classical` has the methods for whole scenes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uknowpan.models.metrics.sensors import UNKNOWN_PAN_GAIN
from uknowpan.models.metrics.toolbox import interp23tap, mtf_filter
from uknowpan.models.pancollection.protocol import registration_of, wald_lms, wald_ms
from uknowpan.models.types import PatchBatch

MAX_MODULATION = 10.0
"""Largest quotient that a method multiplies by: dark pixels divide by about 0."""


@dataclass(frozen=True)
class _Image:
    """One image, float64."""

    pan: Tensor
    """(H, W)"""
    ms: Tensor
    """(C, h, w)"""
    lms: Tensor
    """(C, H, W)"""
    gains: tuple[float, ...]
    """MTF gain of each band."""
    pan_gain: float
    ratio: int

    @property
    def mean_gain(self) -> float:
        """Gain of one filter for all bands, which takes the PAN to the MS's resolution."""
        return sum(self.gains) / len(self.gains)

    def pan_on_ms_grid(self, gain: float) -> Tensor:
        """PAN (h, w) filtered and sampled on the MS grid."""
        return wald_ms(self.pan[None], [gain], self.ratio)[0]

    def pan_low(self) -> Tensor:
        """PAN (C, H, W) at the resolution of each band: filtered, sampled, enlarged.

        Borders wrap around, as in the toolbox; patches of 64 pixels scored without a cut show the effect.
        """
        small = wald_ms(self.pan.expand_as(self.lms), self.gains, self.ratio)
        if registration_of(self.ratio) == "area":
            return wald_lms(small, self.ratio)
        return interp23tap(small, self.ratio)


@dataclass(frozen=True)
class Baseline:
    """A method that sharpens each image by its own statistics."""

    method: Callable[[_Image], Tensor]

    def __call__(
        self, patches: PatchBatch, gains: Sequence[float], ratio: int, pan_gain: float = UNKNOWN_PAN_GAIN
    ) -> Tensor:
        """Sharpened images (B, C, H, W), float64, in the unit of the patches, not clipped.

        Args:
            patches: images in any unit with their `lms`.
            gains: MTF gains of the MS bands, or one for all.
            ratio: PAN pixels per MS pixel along one axis.
            pan_gain: MTF gain of the PAN; only BDSD-PC uses it.

        Raises:
            ValueError: sizes or the number of gains do not fit.
        """
        bands, height, width = patches.ms.shape[1:]
        if len(gains) not in (1, bands):
            raise ValueError(f"{len(gains)} MTF gains for an image of {bands} bands; give one per band, or one")
        if any(x.shape[-2:] != (ratio * height, ratio * width) for x in (patches.pan, patches.lms)):
            raise ValueError(
                f"an MS of {height} x {width} pixels at ratio {ratio} needs PAN and LMS of"
                f" {ratio * height} x {ratio * width}, not {tuple(patches.pan.shape[-2:])} and"
                f" {tuple(patches.lms.shape[-2:])}; check the ratio"
            )
        each = tuple(gains) if len(gains) > 1 else tuple(gains) * bands
        wide = patches.to(torch.float64)
        images = zip(wide.pan[:, 0], wide.ms, wide.lms, strict=True)
        return torch.stack([self.method(_Image(*image, each, pan_gain, ratio)) for image in images])


def _mean(x: Tensor) -> Tensor:
    """Mean (..., 1, 1) of each band of (..., H, W)."""
    return x.mean((-2, -1), keepdim=True)


def _covariance(x: Tensor, y: Tensor) -> Tensor:
    """Covariance (..., 1, 1) of the bands of two images (..., H, W)."""
    return _mean((x - _mean(x)) * (y - _mean(y)))


def _slope(covariance: Tensor, variance: Tensor) -> Tensor:
    """Slope of a regression; 0 where nothing varies."""
    return torch.where(variance != 0, covariance / variance, 0.0)


def _modulation(sharp: Tensor, blurred: Tensor) -> Tensor:
    """Quotient of the two, from 0 to `MAX_MODULATION`; 1 where both are 0."""
    quotient = torch.where((sharp == 0) & (blurred == 0), 1.0, sharp / blurred)
    return quotient.clamp(0.0, MAX_MODULATION)


def _brovey(image: _Image) -> Tensor:
    """Brovey transform: lms * P / I, the intensity I being the mean of the bands.

    P is the PAN with the mean and contrast of I, the contrast compared at the MS's resolution (Alparone, Garzelli,
    Vivone, "Intersensor Statistical Matching for Pansharpening", TGRS 2017). Haze stays in, unlike in BT-H.
    """
    intensity = image.lms.mean(0)
    low = mtf_filter(image.pan[None], [image.mean_gain], image.ratio)[0]
    contrast = _slope(_covariance(intensity, intensity), _covariance(low, low)).sqrt()
    matched = (image.pan - _mean(image.pan)) * contrast + _mean(intensity)
    return image.lms * _modulation(matched, intensity)


def _gsa(image: _Image) -> Tensor:
    """Gram-Schmidt adaptive: lms + g_b (P - I), g_b = cov(lms_b, I) / var(I).

    The intensity I is the linear combination of the bands nearest to the PAN on the MS grid (Aiazzi, Baronti, Selva,
    "Improving Component Substitution Pansharpening Through Multivariate Regression of MS + Pan Data", TGRS 2007).
    """
    bands = (image.ms - _mean(image.ms)).flatten(1)
    low = image.pan_on_ms_grid(image.mean_gain)
    weights = torch.linalg.pinv(bands @ bands.T, hermitian=True) @ (bands @ low.flatten())
    intensity = torch.einsum("c,chw->hw", weights, image.lms)
    detail = (image.pan - _mean(image.pan)) - (intensity - _mean(intensity))
    gains = _slope(_covariance(image.lms, intensity), _covariance(intensity, intensity))
    return image.lms + gains * detail


def _mtf_glp_fs(image: _Image) -> Tensor:
    """MTF-GLP with full-scale regression: lms + g_b (P - P_b), g_b = cov(lms_b, P) / cov(P_b, P).

    P_b is the PAN at the resolution of band b (Vivone, Restaino, Chanussot, "Full Scale Regression-Based Injection
    Coefficients for Panchromatic Sharpening", IEEE TIP 2018).
    """
    low = image.pan_low()
    gains = _slope(_covariance(image.lms, image.pan), _covariance(low, image.pan))
    return image.lms + gains * (image.pan - low)


def _mtf_glp_hpm_r(image: _Image) -> Tensor:
    """MTF-GLP with regression-based high-pass modulation: lms (g_b P + c_b) / (g_b P_b + c_b).

    g_b and c_b are the regression of lms_b on P_b, the PAN at the resolution of band b (Vivone, Restaino, Chanussot,
    "A Regression-Based High-Pass Modulation Pansharpening Approach", TGRS 2018).
    """
    low = image.pan_low()
    slope = _slope(_covariance(image.lms, low), _covariance(low, low))
    offset = _mean(image.lms) - slope * _mean(low)
    return image.lms * _modulation(slope * image.pan + offset, slope * low + offset)


def _bdsd_pc(image: _Image) -> Tensor:
    """Band-dependent spatial detail, physically constrained: lms_b + g_b P - sum_i w_bi lms_i.

    All g and w are non-negative least squares one resolution below, where the MS is the truth (Vivone, "Robust
    Band-Dependent Spatial-Detail Approaches for Panchromatic Sharpening", TGRS 2019; BDSD of Garzelli, Nencini,
    Capobianco, TGRS 2008). The PAN is blurred by its own MTF there.
    """
    low_ms = mtf_filter(image.ms, image.gains, image.ratio)
    low_pan = image.pan_on_ms_grid(image.pan_gain)
    below = torch.cat([-low_ms, low_pan[None]]).flatten(1).T
    weights = _nonnegative_least_squares(below, (image.ms - low_ms).flatten(1).T).to(image.lms)
    here = torch.cat([-image.lms, image.pan[None]])
    return image.lms + torch.einsum("kc,khw->chw", weights, here)


def _nonnegative_least_squares(a: Tensor, y: Tensor) -> Tensor:
    """x >= 0, (K, C) on the CPU, that minimises |a x - y| for each column of y; a is (M, K), y (M, C)."""
    # The triangle of K rows has the same solutions and, unlike a.T @ a, the same conditioning.
    q, r = torch.linalg.qr(a)
    small, targets = r.cpu(), (q.T @ y).cpu()
    return torch.stack([_active_set(small, column) for column in targets.T], 1)


def _active_set(a: Tensor, y: Tensor) -> Tensor:
    """Solution for one column (Lawson and Hanson, "Solving Least Squares Problems", chapter 23)."""
    x = a.new_zeros(a.shape[1])
    free = torch.zeros_like(x, dtype=torch.bool)
    tolerance = 1e-12 * float(a.norm() * y.norm())
    for _ in range(3 * len(x)):  # without rounding errors the loop ends before this bound
        slope = (a.T @ (y - a @ x)).masked_fill(free, -torch.inf)
        if float(slope.max()) <= tolerance:
            break
        free[slope.argmax()] = True
        x = _back_into_bounds(a, y, x, free)
    return x


def _back_into_bounds(a: Tensor, y: Tensor, x: Tensor, free: Tensor) -> Tensor:
    """Best x on the free columns; columns that would turn negative are bound, which changes `free`."""
    while bool(free.any()):
        best = torch.zeros_like(x)
        best[free] = torch.linalg.lstsq(a[:, free], y, driver="gelsd").solution
        negative = free & (best <= 0)
        if not bool(negative.any()):
            return best
        # 0 / 0 is a column that was freed just now and does not help.
        steps = torch.where(negative, (x / (x - best)).nan_to_num(0.0), torch.inf)
        x = x + steps.min() * (best - x)
        free &= steps > steps.min()
        x = torch.where(free, x, 0.0)
    return torch.zeros_like(x)


BASELINES: dict[str, Baseline] = {
    "Brovey": Baseline(_brovey),
    "GSA": Baseline(_gsa),
    "MTF-GLP-FS": Baseline(_mtf_glp_fs),
    "MTF-GLP-HPM-R": Baseline(_mtf_glp_hpm_r),
    "BDSD-PC": Baseline(_bdsd_pc),
}
"""Methods by their names in the benchmarks' tables; EXP, the LMS itself, is not among them."""
