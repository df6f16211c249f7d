"""Classical pansharpening of whole scenes, without a network.

All methods take moments of the whole scene, so that tiles agree; names as in Vivone et al., "A New
Benchmark Based on Recent Advances in Multispectral Pansharpening", IEEE GRSM 2021. The methods of
`uknowpan.models.metrics.baselines` are others: they follow the toolbox bit for bit. They take its
filters, the moments of one image, an equal-weight Brovey and a least-squares GSA.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from uknowpan.models.errors import ModelMismatch
from uknowpan.models.geometry import Geometry, displacement_reach
from uknowpan.models.resample import UPSAMPLE_REACH, Array, degrade_reach
from uknowpan.models.statistics import SceneStatistics

Method = Callable[[Array, Array, SceneStatistics, Geometry], Array]


def classical_reach(statistics: SceneStatistics) -> int:
    """MS pixels around an output pixel that it depends on, with any of these methods."""
    psf = statistics.psf
    return UPSAMPLE_REACH + degrade_reach(psf.sigma, psf.shift, statistics.ratio) + displacement_reach(statistics)


def _intensity_weights(statistics: SceneStatistics) -> tuple[Array, float]:
    """Weights (C,) and intercept of the intensity that is nearest to the degraded PAN, in given proportions or any."""
    covariance, mean = statistics.covariance, statistics.mean
    ms = covariance[:-1, :-1]
    weights: Array
    if (given := statistics.weights) is not None:
        weights = given * (given @ covariance[:-1, -1] / max(float(given @ ms @ given), 1e-30))
    else:
        ridge = 1e-6 * max(float(ms.diagonal().mean()), 1e-30)
        weights = np.linalg.solve(ms + ridge * np.eye(len(ms)), covariance[:-1, -1])
    return weights, float(mean[-1] - weights @ mean[:-1])


def _intensity(lms: Array, weights: Array, intercept: float) -> Array:
    """I = sum_b w_b lms_b + intercept, (B, 1, H, W)."""
    b, c, height, width = lms.shape
    intensity: Array = weights.astype(np.float32) @ lms.reshape(b, c, -1)
    intensity += np.float32(intercept)
    return intensity.reshape(b, 1, height, width)


def _injected(lms: Array, gains: Array, detail: Array) -> Array:
    """lms + g_b detail, in the memory of lms."""
    for band, gain in enumerate(gains.astype(np.float32)):
        lms[:, band] += gain * detail[:, 0 if detail.shape[1] == 1 else band]
    return lms


def bicubic(pan: Array, ms: Array, statistics: SceneStatistics, geometry: Geometry) -> Array:
    """MS interpolated, PAN unused (EXP of the toolbox, with a cubic kernel)."""
    return geometry.enlarged(ms)


def brovey(pan: Array, ms: Array, statistics: SceneStatistics, geometry: Geometry) -> Array:
    """Weighted Brovey: lms * pan / intensity, the weights by regression on the degraded PAN."""
    lms = geometry.enlarged(ms)
    gain = _intensity(lms, *_intensity_weights(statistics))
    sign = statistics.pan_sign
    if not sign:
        raise ModelMismatch("brovey divides by the PAN's level, and this PAN's mean is about 0; use gsa or mtf-glp.")
    floor = 0.02 * abs(float(statistics.mean[-1])) + 1e-9
    np.maximum(sign * gain, floor, out=gain)
    np.divide(sign * pan, gain, out=gain)
    lms *= gain.clip(0, 10, out=gain)
    return lms


def gsa(pan: Array, ms: Array, statistics: SceneStatistics, geometry: Geometry) -> Array:
    """Gram-Schmidt adaptive (Aiazzi et al. 2007): lms + g_b (pan - intensity)."""
    lms = geometry.enlarged(ms)
    weights, intercept = _intensity_weights(statistics)
    ms_covariance = statistics.covariance[:-1, :-1]
    gains = ms_covariance @ weights / max(float(weights @ ms_covariance @ weights), 1e-30)
    return _injected(lms, gains, pan - _intensity(lms, weights, intercept))


def mtf_glp(pan: Array, ms: Array, statistics: SceneStatistics, geometry: Geometry) -> Array:
    """MTF-matched generalised Laplacian pyramid with regression gains (MTF-GLP-CBD, global).

    Aiazzi et al. 2006: lms + g_b (pan - pan_low), g_b = cov(ms_b, pan_low) / var(pan_low).
    """
    covariance = statistics.covariance
    gains = covariance[:-1, -1] / max(float(covariance[-1, -1]), 1e-30)
    return _injected(geometry.enlarged(ms), gains, pan - geometry.enlarged(geometry.degraded(pan)))


def awlp(pan: Array, ms: Array, statistics: SceneStatistics, geometry: Geometry) -> Array:
    """Proportional additive injection with haze correction (AWLP-H).

    Vivone, Alparone, Garzelli and Lolli, Remote Sens. 2019, 11(19):2315, with the pyramid of `mtf_glp`:
    lms + (lms_b - haze_b) / (pan_low - haze_pan) (pan - pan_low). The PAN's haze is the bands' haze in the regression
    of the degraded PAN on the bands.
    """
    lms = geometry.enlarged(ms)
    pan_low = geometry.enlarged(geometry.degraded(pan))
    haze = np.zeros(statistics.bands) if statistics.haze is None else statistics.haze
    weights, intercept = _intensity_weights(statistics)
    haze_pan = float(weights @ haze) + intercept
    spread = math.sqrt(max(float(statistics.covariance[-1, -1]), 0.0))
    level = max(float(statistics.mean[-1]) - haze_pan, 0.1 * spread, 1e-9)
    mean_gain, haze = (x.astype(np.float32).reshape(1, -1, 1, 1) for x in ((statistics.mean[:-1] - haze) / level, haze))
    above = pan_low - np.float32(haze_pan)
    lit = above > 0.05 * level  # darker places get the gain of the whole scene
    gain = np.where(lit, (lms - haze) / np.where(lit, above, np.float32(1)), mean_gain)
    hrms: Array = lms + gain * (pan - pan_low)
    return hrms


CLASSICAL_METHODS: dict[str, Method] = {
    "bicubic": bicubic,
    "brovey": brovey,
    "gsa": gsa,
    "mtf-glp": mtf_glp,
    "awlp": awlp,
}
"""Name -> function(pan (B, 1, H, W), ms (B, C, h, w), statistics, geometry) -> hrms (B, C, H, W)."""
