"""Classical pansharpening of whole scenes, without a network.

All methods take moments of the whole scene, so that tiles agree; names as in Vivone et al., "A New
Benchmark Based on Recent Advances in Multispectral Pansharpening", IEEE GRSM 2021. The methods of
`uknowpan.models.metrics.baselines` are others: they follow the toolbox bit for bit. They take its
filters, the moments of one image, an equal-weight Brovey and a least-squares GSA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from uknowpan.models.errors import ModelMismatch
from uknowpan.models.geometry import Geometry, displacement_reach
from uknowpan.models.resample import UPSAMPLE_REACH, degrade_reach
from uknowpan.models.statistics import SceneStatistics

Method = Callable[[Tensor, Tensor, SceneStatistics, Geometry], Tensor]


def classical_reach(statistics: SceneStatistics) -> int:
    """MS pixels around an output pixel that it depends on, with any of these methods."""
    psf = statistics.psf
    return UPSAMPLE_REACH + degrade_reach(psf.sigma, psf.shift, statistics.ratio) + displacement_reach(statistics)


def _bands(values: Tensor, like: Tensor) -> Tensor:
    """(C,) to (1, C, 1, 1) in the dtype of `like`."""
    return values.to(like).view(1, -1, 1, 1)


def _intensity_weights(statistics: SceneStatistics) -> tuple[Tensor, Tensor]:
    """Regression of the degraded PAN on the MS bands: weights (C,) and intercept."""
    covariance, mean = statistics.covariance, statistics.mean
    ms = covariance[:-1, :-1]
    ridge = 1e-6 * ms.diagonal().mean().clamp_min(1e-30)
    weights = torch.linalg.solve(ms + ridge * torch.eye(len(ms), dtype=ms.dtype), covariance[:-1, -1])
    return weights, mean[-1] - weights @ mean[:-1]


def _intensity(lms: Tensor, weights: Tensor, intercept: Tensor) -> Tensor:
    """I = sum_b w_b lms_b + intercept, (B, 1, H, W)."""
    return (lms * _bands(weights, lms)).sum(1, keepdim=True) + float(intercept)


def bicubic(pan: Tensor, ms: Tensor, statistics: SceneStatistics, geometry: Geometry) -> Tensor:
    """MS interpolated, PAN unused (EXP of the toolbox, with a cubic kernel)."""
    return geometry.enlarged(ms)


def brovey(pan: Tensor, ms: Tensor, statistics: SceneStatistics, geometry: Geometry) -> Tensor:
    """Weighted Brovey: lms * pan / intensity, the weights by regression on the degraded PAN."""
    lms = geometry.enlarged(ms)
    intensity = _intensity(lms, *_intensity_weights(statistics))
    if not statistics.pan_sign:
        raise ModelMismatch("brovey divides by the PAN's level, and this PAN's mean is about 0; use gsa or mtf-glp.")
    floor = 0.02 * abs(float(statistics.mean[-1])) + 1e-9
    if statistics.pan_sign < 0:
        pan, intensity = -pan, -intensity
    return lms * (pan / intensity.clamp_min(floor)).clamp(0.0, 10.0)


def gsa(pan: Tensor, ms: Tensor, statistics: SceneStatistics, geometry: Geometry) -> Tensor:
    """Gram-Schmidt adaptive (Aiazzi et al. 2007): lms + g_b (pan - intensity)."""
    lms = geometry.enlarged(ms)
    weights, intercept = _intensity_weights(statistics)
    ms_covariance = statistics.covariance[:-1, :-1]
    variance = (weights @ ms_covariance @ weights).clamp_min(1e-30)
    gains = ms_covariance @ weights / variance
    return lms + _bands(gains, lms) * (pan - _intensity(lms, weights, intercept))


def mtf_glp(pan: Tensor, ms: Tensor, statistics: SceneStatistics, geometry: Geometry) -> Tensor:
    """MTF-matched generalised Laplacian pyramid with regression gains (MTF-GLP-CBD, global).

    Aiazzi et al. 2006: lms + g_b (pan - pan_low), g_b = cov(ms_b, pan_low) / var(pan_low).
    """
    lms = geometry.enlarged(ms)
    pan_low = geometry.enlarged(geometry.degraded(pan))
    covariance = statistics.covariance
    gains = covariance[:-1, -1] / covariance[-1, -1].clamp_min(1e-30)
    return lms + _bands(gains, lms) * (pan - pan_low)


def awlp(pan: Tensor, ms: Tensor, statistics: SceneStatistics, geometry: Geometry) -> Tensor:
    """Proportional additive injection with haze correction (AWLP-H).

    Vivone, Alparone, Garzelli and Lolli, Remote Sens. 2019, 11(19):2315, with the pyramid of `mtf_glp`:
    lms + (lms_b - haze_b) / (pan_low - haze_pan) (pan - pan_low). The PAN's haze is the bands' haze in the regression
    of the degraded PAN on the bands.
    """
    lms = geometry.enlarged(ms)
    pan_low = geometry.enlarged(geometry.degraded(pan))
    haze = torch.zeros_like(statistics.mean[:-1]) if statistics.haze is None else statistics.haze
    weights, intercept = _intensity_weights(statistics)
    haze_pan = float(weights @ haze + intercept)
    spread = float(statistics.covariance[-1, -1].clamp_min(0).sqrt())
    level = max(float(statistics.mean[-1]) - haze_pan, 0.1 * spread, 1e-9)
    mean_gain = _bands((statistics.mean[:-1] - haze) / level, lms)
    above = pan_low - haze_pan
    lit = above > 0.05 * level  # darker places get the gain of the whole scene
    gain = torch.where(lit, (lms - _bands(haze, lms)) / torch.where(lit, above, 1.0), mean_gain)
    return lms + gain * (pan - pan_low)


CLASSICAL_METHODS: dict[str, Method] = {
    "bicubic": bicubic,
    "brovey": brovey,
    "gsa": gsa,
    "mtf-glp": mtf_glp,
    "awlp": awlp,
}
"""Name -> function(pan (B, 1, H, W), ms (B, C, h, w), statistics, geometry) -> hrms (B, C, H, W)."""
