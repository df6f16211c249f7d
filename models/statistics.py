"""Numbers of a whole scene that every tile shares: moments, blur, shift, scale.

Samples spread over the scene give them once, so that no result depends on its tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from uknowpan.models.blur import DETAIL_WINDOW, Psf, Window, estimate_psf, in_arrays, softness_of_ms
from uknowpan.models.registration.field import Registration
from uknowpan.models.resample import Array, box_mean, degrade, degrade_reach

USUAL_SOFTNESS = 0.3
"""Default softness: sigma, in PAN pixels, of the blur that makes the PAN as soft as the result.
The result is as sharp as the PAN: truths made so (kind `sharp` of `uknowpan pack`) have 0.25 to 0.29. MS against
their PAN, pixel for pixel, have 0.25 (QuickBird) to 0.8 (SPOT-6)."""
LEAST_SOFTNESS, MOST_SOFTNESS = 0.25, 0.9
"""Range of softness in training, about."""

HAZE_SHARE = 0.01
"""Share of a band's pixels that are as dark as haze alone, as in dark-object subtraction (Chavez 1988)."""

PSF_WINDOWS = 4
"""Samples, spread over the scene, for the estimate of blur and shift; more only cost time."""

LEAST_SHARE = 0.05
"""Share of valid MS pixels in a sample for its blur to be estimated from filled values."""

LEAST_MEAN = 0.1
"""Mean of the PAN, in its standard deviations, below which ratios to it mean nothing."""


@dataclass(frozen=True)
class SceneStatistics:
    """First and second moments of the MS bands and of PAN degraded to the MS grid.

    Index C (the last) of every array is the degraded PAN.
    """

    ratio: int
    psf: Psf
    mean: Array
    """(C + 1,) float64."""
    covariance: Array
    """(C + 1, C + 1) float64, covariance of the values."""
    detail: Array
    """(C + 1, C + 1) float64, covariance of the values less their local mean."""
    softness: float | None = None
    """Sigma, in MS pixels, of the MS against the PAN on the MS's own grid; None: not measured, or
    not measurable."""
    haze: Array | None = None
    """(C,) float64, `HAZE_SHARE` quantile of each band: the light that haze adds. None: 0."""
    field: Registration | None = None
    """Displacement of the MS that is taken out; the shift of `psf` is 0 then. None: nothing is moved."""
    weights: Array | None = None
    """(C,) proportions of the bands in an intensity; None: by regression."""

    @property
    def softness_of_result(self) -> float:
        """Sigma, in PAN pixels, of a result that is as soft, pixel for pixel, as the MS."""
        own = USUAL_SOFTNESS if self.softness is None else self.softness
        return min(max(own, LEAST_SOFTNESS), MOST_SOFTNESS)

    @property
    def bands(self) -> int:
        return len(self.mean) - 1

    @property
    def pan_sign(self) -> int:
        """Sign of the PAN's level, 1 or -1; 0 where its mean is so near 0 that ratios to it mean nothing."""
        mean = float(self.mean[-1])
        if abs(mean) < LEAST_MEAN * math.sqrt(max(float(self.covariance[-1, -1]), 0.0)):
            return 0
        return -1 if mean < 0 else 1

    @property
    def detail_std(self) -> Array:
        """(C + 1,) standard deviation of details, kept away from zero on flat scenes."""
        floor = 1e-4 * (np.abs(self.mean) + np.sqrt(self.covariance.diagonal().clip(0))) + 1e-12
        std: Array = np.maximum(np.sqrt(self.detail.diagonal().clip(0)), floor)
        return std

    @property
    def detail_gain(self) -> Array:
        """(C,) regression of a band's details on those of the degraded PAN."""
        gain: Array = self.detail[:-1, -1] / self.detail_std[-1] ** 2
        return gain

    @property
    def likeness(self) -> float:
        """Multiple correlation (0 to 1) of the details of the degraded PAN with those of the bands."""
        bands, cross, power = self.detail[:-1, :-1], self.detail[:-1, -1], float(self.detail[-1, -1])
        ridge = 1e-6 * bands.diagonal().mean() + 1e-30
        explained = cross @ np.linalg.solve(bands + ridge * np.eye(len(bands)), cross)
        return math.sqrt(min(max(float(explained) / (power + 1e-30), 0.0), 1.0))

    def select(self, bands: Sequence[int]) -> SceneStatistics:
        """The statistics of a subset (or another order) of the bands."""
        index = [*bands, self.bands]
        return replace(
            self,
            mean=self.mean[index],
            covariance=self.covariance[index][:, index],
            detail=self.detail[index][:, index],
            haze=None if self.haze is None else self.haze[index[:-1]],
            field=None if self.field is None else replace(self.field, bands=self.field.bands[list(bands)]),
        )

    def as_dict(self) -> dict[str, Any]:
        """The statistics for JSON, as `--resume` compares and `info` prints them."""
        return {
            "ratio": self.ratio,
            "sigma": self.psf.sigma,
            "shift": list(self.psf.shift),
            "correlation": self.psf.correlation,
            "mean": self.mean.tolist(),
            "covariance": self.covariance.tolist(),
            "detail": self.detail.tolist(),
            "softness": self.softness,
            "haze": None if self.haze is None else self.haze.tolist(),
            "field": None if self.field is None else self.field.as_dict(),
        }

    @staticmethod
    def from_dict(data: dict[str, Any]) -> SceneStatistics:
        """The inverse of `as_dict`."""
        moments = {k: np.array(data[k], np.float64) for k in ("mean", "covariance", "detail")}
        psf = Psf(data["sigma"], tuple(data["shift"]), data["correlation"])
        haze = None if data["haze"] is None else np.array(data["haze"], np.float64)
        field = None if data["field"] is None else Registration.from_dict(data["field"])
        return SceneStatistics(
            ratio=data["ratio"], psf=psf, softness=data["softness"], haze=haze, field=field, **moments
        )


def scene_statistics(
    windows: Sequence[Window],
    ratio: int,
    psf: Psf | None = None,
    valid: Sequence[npt.ArrayLike] | None = None,
    *,
    soft: bool = False,
) -> SceneStatistics:
    """Statistics of a scene from samples.

    Args:
        windows: samples, each pan (1, H, W) and ms (C, h, w), H = ratio * h.
        ratio: PAN pixels per MS pixel.
        psf: the blur and shift, if known; else they are estimated from the samples.
        valid: (h, w) bool per sample; invalid MS pixels (and what touches them) are left out. Where something
            touches every pixel, the values filled in around the valid ones are trusted.
        soft: also measure the softness of the MS.

    Raises:
        ValueError: no valid pixel in any sample.
    """
    samples = in_arrays(windows)
    if valid is None:
        valid = [np.ones(ms.shape[-2:], np.bool_) for _, ms in samples]
    masks = [np.asarray(mask, np.bool_) for mask in valid]
    clean = [w for w, m in zip(samples, masks, strict=True) if m.all()]
    clean = clean[:: max(1, -(-len(clean) // PSF_WINDOWS))]
    estimated = psf is None
    if psf is None:
        psf = estimate_psf(clean, ratio)
    softness = softness_of_ms(clean, ratio, psf.shift) if soft and psf.correlation > 0 else None
    reach = DETAIL_WINDOW // 2 + degrade_reach(psf.sigma, psf.shift, ratio)
    values, details, keeps = [], [], []
    for (pan, ms), mask in zip(samples, masks, strict=True):
        both = np.concatenate([ms, degrade(pan[None], ratio, psf.sigma, psf.shift)[0]])[None]
        detail = both - box_mean(both, DETAIL_WINDOW)
        whole = box_mean(mask[None, None].astype(np.float32), 2 * reach + 1) > 1 - 1e-4
        keep = whole[0, 0] if min(mask.shape) > 2 * reach else mask
        values.append(both[0])
        details.append(detail[0])
        keeps.append(keep)
    if not any(keep.any() for keep in keeps) and any(mask.any() for mask in masks):
        by_share = sorted(zip(samples, masks, strict=True), key=lambda item: -float(item[1].mean()))
        usable = [w for w, m in by_share if m.mean() > LEAST_SHARE][:PSF_WINDOWS]
        if estimated and not clean:
            return scene_statistics(samples, ratio, estimate_psf(usable, ratio), masks, soft=soft)
        keeps = masks
    value = np.concatenate([v[:, k] for v, k in zip(values, keeps, strict=True)], 1, dtype=np.float64)
    detail = np.concatenate([d[:, k] for d, k in zip(details, keeps, strict=True)], 1, dtype=np.float64)
    if value.shape[1] == 0:
        raise ValueError("the samples of the scene hold no pixel where PAN and all MS bands are valid")
    mean = value.mean(1)
    centred = value - mean[:, None]
    n = value.shape[1]
    covariances = centred @ centred.T / n, detail @ detail.T / n
    rank = int(HAZE_SHARE * (n - 1))
    haze = np.partition(value[:-1], rank, 1)[:, rank]
    return SceneStatistics(ratio, psf, mean, *covariances, softness, haze)
