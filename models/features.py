"""The condition of the `generic` student: dimensionless features of a scene, band by band.

All features are divided by the scene's own detail contrast r_b, so that gain, offset and bit depth
have no influence. They offer the network what classical methods would inject, made with the blur
and shift of the scene (`uknowpan.models.blur`). The network weighs them at each pixel.

Band features (F = 7), in units of r_b:
    0 global injection  g_b (pan - pan_low)             g_b: regression of details, whole scene
    1 local injection   g_b(x) (pan - pan_low)          `local_gain`
    2 ratio injection   lms_b / pan_low (pan - pan_low) `ratio_gain`, high-pass modulation; as 0 where the PAN's mean
                        is about 0
    3 own detail        lms_b - local mean
    4 unexplained       own detail - g_b(x) detail of the degraded PAN
    5 correlation       `local_correlation`, -1 to 1
    6 back-projection   `back_projection`: MS less the local injection, blurred and sampled
PAN features (P = 3), in units of PAN's detail contrast: pan - pan_low, pan - 5 x 5 box mean
(the high-pass of U-Know-DiffPAN), pan_low - local mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from uknowpan.models.architectures import TIMESTEPS
from uknowpan.models.blur import DETAIL_WINDOW
from uknowpan.models.geometry import Geometry, Nested, displacement_reach
from uknowpan.models.resample import (
    UPSAMPLE_REACH,
    Array,
    Image,
    box_mean,
    crop,
    degrade,
    degrade_reach,
    filtered,
    joined,
    like,
    upsample,
)
from uknowpan.models.statistics import USUAL_SOFTNESS, SceneStatistics
from uknowpan.models.types import Condition

BAND_FEATURES, PAN_FEATURES, SCENE_FEATURES = 7, 3, 6
INJECTIONS = 5
"""Number of leading band features that are details, which the network may mix into its answer."""
BACK_PROJECTION = 6
"""Index of the band feature that is one more such detail, for networks with back-projection."""
PLAIN_SCENE_FEATURES = 3
"""Numbers of the scene that a network sees by default: sharpness, ratio and shift."""

LOCAL_PRIOR = 0.1
"""Weight of the whole scene's statistics in the local regression; it keeps flat places sane."""

LARGEST_RATIO_GAIN = 4.0
"""Bound of `ratio_gain`, as a multiple of the scene's mean ratio."""

CORRECTION, LOG_SIGMA, MISSING, LOG_V, MAPS = INJECTIONS, INJECTIONS + 1, INJECTIONS + 2, INJECTIONS + 3, INJECTIONS + 4
"""Places of the maps after the injections' weights: correction, log sigma, weight of the back-projection, log v."""
ON_PAN = 3
"""Number of leading band features that are a smooth gain times the PAN's detail."""
CELLS = 4 * BAND_FEATURES
"""Numbers per band and 4 x 4 PAN pixels that are made of its features."""
LEAST_POWER = 1e-3
"""Power of the PAN's detail, in units of its contrast, below which gains fade to 0."""


@dataclass(frozen=True)
class StreamsConfig:
    """Widths of the student of two streams; the defaults take 25,224 multiply-adds per PAN pixel for four bands."""

    pan_width: int = field(default=24, metadata={"least": 1})
    """Channels of the PAN on the 2 x 2 grid."""
    trunk_width: int = field(default=64, metadata={"least": 1})
    """Channels of the trunk on the 4 x 4 grid."""
    band_width: int = field(default=32, metadata={"least": 1})
    """Channels per band on the 4 x 4 grid."""
    head_width: int = field(default=16, metadata={"least": 1})
    """Channels per band on the 2 x 2 grid."""
    trunk_blocks: int = 2
    """Residual blocks of the trunk."""
    band_blocks: int = 1
    """Residual blocks of each band, after the trunk's."""
    timesteps: int = field(default=TIMESTEPS, metadata={"least": 1})
    """Length of the noise schedule (scales the time embedding)."""
    scene_features: int = SCENE_FEATURES
    """Number of the scene's numbers that are inputs."""

    @property
    def reach(self) -> int:
        """PAN pixels around an output pixel that it depends on (an upper bound)."""
        cells = 1 + 2 * (self.trunk_blocks + self.band_blocks)
        # The last convolution reaches a neighbour on the 2 x 2 grid, which lies anywhere in its 4 x 4 cell.
        return math.ceil((4 * cells + 5) / 4) * 4


def condition_reach(statistics: SceneStatistics) -> int:
    """MS pixels around a pixel that its condition depends on."""
    psf = statistics.psf
    blur = degrade_reach(psf.sigma, psf.shift, statistics.ratio)
    moved = displacement_reach(statistics)
    windows = 2 * (DETAIL_WINDOW // 2)  # details are local themselves, and regressed locally
    return UPSAMPLE_REACH + blur + max(windows, UPSAMPLE_REACH + blur) + moved


def takes_softness(network: Mapping[str, Any]) -> bool:
    """Whether a network with this config has the result's softness as an input."""
    return network.get("scene_features") == SCENE_FEATURES


def local_gain(cross: Image, pan_power: Image, global_gain: Image) -> Image:
    """g_b(x) = (E[d_b d_pan] + p g_b) / (E[d_pan^2] + p) in a 5 x 5 window, p = `LOCAL_PRIOR`."""
    return (cross + LOCAL_PRIOR * global_gain) / (pan_power + LOCAL_PRIOR)


def local_correlation(cross: Image, pan_power: Image, ms_power: Image) -> Image:
    """E[d_b d_pan] / sqrt((E[d_pan^2] + 0.01) (E[d_b^2] + 0.01)) in a 5 x 5 window."""
    correlation: Image = cross / ((pan_power + 0.01) * (ms_power + 0.01)) ** 0.5
    return correlation


def ratio_gain(lms: Image, pan_low: Image, mean: Image, sign: int = 1) -> Image:
    """lms_b / pan_low, from 0 to `LARGEST_RATIO_GAIN` times the scene's mean ratio; sign: of the PAN's values.

    The quotient needs a zero level; the bound serves scenes without one.
    """
    mean_ratio = abs(mean[:-1] / abs(mean[-1]).clip(1e-6)).reshape(1, -1, 1, 1)
    floor = 0.05 * abs(mean[-1]) + 1e-6
    if sign < 0:
        lms, pan_low = -lms, -pan_low
    gain: Image = (lms / pan_low.clip(floor)).clip(0.0).clip(max=LARGEST_RATIO_GAIN * mean_ratio)
    return gain


def back_projection(x: Image, statistics: SceneStatistics, offset: float) -> Image:
    """x - degrade(upsample(x)) of (B, C, h, w), as one filter on the MS grid."""
    psf = statistics.psf
    rows, cols = _there_and_back(statistics.ratio, psf.sigma, psf.shift, offset)
    missing: Image = x - filtered(x, rows, cols, len(rows) // 2)
    return missing


@lru_cache(maxsize=64)
def _there_and_back(ratio: int, sigma: float, shift: tuple[float, float], offset: float) -> tuple[Array, Array]:
    """Taps along rows and columns of upsampling followed by degrading."""
    reach = UPSAMPLE_REACH + degrade_reach(sigma, shift, ratio)
    size = 4 * reach + 1  # borders stay away from the impulse's response
    impulse = np.zeros((1, 1, size, size), np.float32)
    impulse[..., size // 2, size // 2] = 1
    response = degrade(upsample(impulse, ratio, offset), ratio, sigma, shift)[0, 0]
    # The response to an impulse is the filter turned round.
    response = response[reach:-reach, reach:-reach][::-1, ::-1]
    return response.sum(1), response.sum(0)


def scene_numbers(statistics: SceneStatistics, offset: float, softness: float) -> Array:
    """(1, S): sharpness, ratio, shift, magnified sharpness, unexplained share, softness of the result.

    The blur of usual sensors spans a narrow range, hence the magnified copy. Blur beyond that range
    indicates how soft the truth is against its PAN.
    """
    psf, ratio = statistics.psf, statistics.ratio
    sharpness = psf.sigma / ratio * 4 - 2  # about -1 to 1
    beyond = (s - offset for s in psf.shift)  # the registration is no error of the scene
    shift = math.hypot(*beyond) / ratio  # its direction would not survive turned patches
    magnified = min(max(8 * sharpness, -6.0), 6.0)
    unexplained = 1 + 0.5 * math.log10(1 - psf.correlation + 1e-4)  # -1 (nothing) to 1 (all)
    soft = 4 * (softness - 0.5)  # -1.4 to 1.6
    return np.array([[sharpness, 4.0 / ratio - 1, shift, magnified, unexplained, soft]], np.float32)


def generic_condition(
    pan: Image,
    ms: Image,
    statistics: SceneStatistics,
    offset: float = 0.0,
    margin: int = 0,
    softness: float = USUAL_SOFTNESS,
    geometry: Geometry | None = None,
) -> Condition:
    """Features of one window of a scene.

    Args:
        pan: (B, 1, H, W), in the units that the statistics were made in.
        ms: (B, C, h, w), H = ratio * h.
        statistics: of the whole scene.
        offset: PAN pixels by which the MS samples lie beyond the nested centres, see
            `upsample`; the shift of `statistics.psf` contains it.
        margin: MS pixels on every side that the condition leaves out; with `condition_reach`
            the result is valid everywhere.
        softness: of the result against the PAN, sigma in PAN pixels; in training the truth's own.
        geometry: of a displaced MS, in place of `offset` and `margin`.

    Returns:
        A `Condition` whose outermost `condition_reach` MS pixels of the window are not valid: they
        depend on the window's border.
    """
    ratio, psf = statistics.ratio, statistics.psf
    scale = like(statistics.detail_std, pan)  # (C + 1,)
    band_scale, pan_scale = scale[:-1].reshape(1, -1, 1, 1), scale[-1]
    if geometry is None:
        geometry = Nested.without(margin * ratio, ratio, psf, offset)
    enlarged = geometry.enlarged
    pan_lr = geometry.degraded(pan)  # a displaced MS has one for each band
    lms, pan_low = enlarged(ms), enlarged(pan_lr)
    near = crop(pan, geometry.spare * ratio)
    high_pass = crop(near - box_mean(near, 5), geometry.rim) / pan_scale
    pan = crop(near, geometry.rim)
    detail = pan - pan_low
    detail_unit = detail / pan_scale

    # On the MS grid: local regression of each band on the degraded PAN.
    ms_detail = (ms - box_mean(ms, DETAIL_WINDOW)) / band_scale
    pan_detail = (pan_lr - box_mean(pan_lr, DETAIL_WINDOW)) / pan_scale
    cross = box_mean(ms_detail * pan_detail, DETAIL_WINDOW)
    pan_power = box_mean(pan_detail**2, DETAIL_WINDOW)
    ms_power = box_mean(ms_detail**2, DETAIL_WINDOW)
    global_gain = (like(statistics.detail_gain, pan) * pan_scale / scale[:-1]).reshape(1, -1, 1, 1)
    gain = local_gain(cross, pan_power, global_gain)
    # Injecting commutes with blurring where the gain hardly changes: the MS grid will do.
    missing = back_projection(ms, statistics, offset) / band_scale
    missing = missing - gain * back_projection(pan_lr, statistics, offset) / pan_scale
    correlation = local_correlation(cross, pan_power, ms_power)
    on_ms_grid = enlarged(joined([gain, ms_detail - gain * pan_detail, correlation, ms_detail, missing]))
    bands = ms.shape[1]
    gain_up, unexplained_up, correlation_up, own_up, missing_up = (
        on_ms_grid[:, k * bands : (k + 1) * bands] for k in range(5)
    )

    injected = by_ratio = global_gain * detail_unit
    if sign := statistics.pan_sign:
        by_ratio = ratio_gain(lms, pan_low, like(statistics.mean, pan), sign) * detail / band_scale
    band_features = [
        injected,
        gain_up * detail_unit,
        by_ratio,
        own_up,
        unexplained_up,
        correlation_up.clip(-1, 1),
        missing_up,
    ]
    made: Any = {
        "lms": lms,
        "pan": pan,
        "pan_features": joined([_mean(detail_unit), high_pass, _mean(enlarged(pan_detail))]),
        "band_features": joined([x[:, :, None] for x in band_features], 2),
        "scene": like(np.repeat(scene_numbers(statistics, offset, softness), len(pan), 0), pan),
    }
    return Condition(**made)


def _mean(x: Image) -> Image:
    """(B, 1, H, W) mean of the channels; of a single one, that one."""
    return x if x.shape[1] == 1 else x.mean(1)[:, None]
