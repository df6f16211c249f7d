"""The condition of the `generic` student: dimensionless features of a scene, band by band.

Everything is divided by the scene's own detail contrast, so that gain, offset and bit depth do
not matter. The features offer the network what classical methods would inject, made with the
blur and shift that the scene itself shows (`uknowpan.models.blur`); the network decides how much
of each to take where, and adds what none of them has.

Band features (F = 7), in units of the band's detail contrast r_b:
    0 global injection  g_b (pan - pan_low)           g_b: regression of details, whole scene
    1 local injection   g_b(x) (pan - pan_low)        g_b(x): the same in a 5 x 5 MS window
    2 ratio injection   lms_b / pan_low (pan - pan_low)     high-pass modulation
    3 own detail        lms_b - local mean
    4 unexplained       the part of 3 that PAN's detail does not explain
    5 correlation       of the band's and PAN's details in that window, -1 to 1
    6 back-projection   what the MS shows and the local injection, blurred and sampled, does not
PAN features (P = 3), in units of PAN's detail contrast: pan - pan_low, pan - 5 x 5 box mean
(the high-pass of U-Know-DiffPAN), pan_low - local mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.blur import DETAIL_WINDOW
from uknowpan.models.resample import UPSAMPLE_REACH, box_mean, crop, degrade, degrade_reach, upsample, upsample_small
from uknowpan.models.statistics import USUAL_SOFTNESS, SceneStatistics
from uknowpan.models.types import Condition

BAND_FEATURES = 7
INJECTIONS = 5
"""The first so many band features are details that the network may mix into its answer."""
BACK_PROJECTION = 6
"""The band feature that is one more such detail; networks trained before there was it have none."""
PAN_FEATURES = 3
SCENE_FEATURES = 6
PLAIN_SCENE_FEATURES = 3
"""Networks trained before there were the other three see these."""

LOCAL_PRIOR = 0.1
"""Weight of the whole scene's statistics in the local regression (keeps flat places sane)."""

LARGEST_RATIO_GAIN = 4.0
"""Bound of feature 2's gain, as a multiple of the scene's mean ratio."""


def condition_reach(statistics: SceneStatistics) -> int:
    """MS pixels around it that a pixel's condition depends on."""
    psf = statistics.psf
    blur = degrade_reach(psf.sigma, psf.shift, statistics.ratio)
    windows = 2 * (DETAIL_WINDOW // 2)  # details are local themselves, and regressed locally
    return UPSAMPLE_REACH + blur + max(windows, UPSAMPLE_REACH + blur)


def minds_softness(network: Mapping[str, Any]) -> bool:
    """Whether a network with such a config was trained to be told a softness."""
    return network.get("scene_features") == SCENE_FEATURES


def generic_condition(
    pan: Tensor,
    ms: Tensor,
    statistics: SceneStatistics,
    offset: float = 0.0,
    margin: int = 0,
    softness: float = USUAL_SOFTNESS,
) -> Condition:
    """Features of one window of a scene.

    Args:
        pan: (B, 1, H, W), in the units that the statistics were made in.
        ms: (B, C, h, w), H = ratio * h.
        statistics: of the whole scene.
        offset: PAN pixels by which the MS samples lie beyond the nested centres, see
            `upsample`; the shift of `statistics.psf` contains it.
        margin: MS pixels on every side that the condition leaves out; with `condition_reach`
            it is done where it may be used.
        softness: of the result against the PAN, sigma in PAN pixels; in training the truth's own.

    Returns:
        A `Condition` whose outermost `condition_reach` MS pixels of the window are not to be used
        (they saw its border).
    """
    ratio, psf = statistics.ratio, statistics.psf
    scale = statistics.detail_std.to(pan)  # (C + 1,)
    band_scale, pan_scale = scale[:-1].view(1, -1, 1, 1), scale[-1]
    pan_lr = degrade(pan, ratio, psf.sigma, psf.shift)
    spare = max(margin - UPSAMPLE_REACH, 0)
    rim = (margin - spare) * ratio

    def enlarged(x: Tensor) -> Tensor:
        way = upsample_small if margin else upsample
        return crop(way(crop(x, spare), ratio, offset), rim)

    lms, pan_low = enlarged(ms), enlarged(pan_lr)
    near = crop(pan, spare * ratio)
    high_pass = crop(near - box_mean(near, 5), rim) / pan_scale
    pan = crop(near, rim)
    detail = pan - pan_low

    # Local regression of each band on the degraded PAN, on the MS grid.
    ms_detail = (ms - box_mean(ms, DETAIL_WINDOW)) / band_scale
    pan_detail = (pan_lr - box_mean(pan_lr, DETAIL_WINDOW)) / pan_scale
    cross = box_mean(ms_detail * pan_detail, DETAIL_WINDOW)
    pan_power = box_mean(pan_detail**2, DETAIL_WINDOW)
    ms_power = box_mean(ms_detail**2, DETAIL_WINDOW)
    global_gain = (statistics.detail_gain.to(pan) * pan_scale / scale[:-1]).view(1, -1, 1, 1)
    local_gain = (cross + LOCAL_PRIOR * global_gain) / (pan_power + LOCAL_PRIOR)
    correlation = cross / ((pan_power + 0.01) * (ms_power + 0.01)).sqrt()
    unexplained = ms_detail - local_gain * pan_detail

    # Ratio injection needs a zero level; where the scene has none its gain is bounded.
    mean = statistics.mean.to(pan)
    mean_ratio = (mean[:-1] / mean[-1].abs().clamp_min(1e-6)).view(1, -1, 1, 1).abs()
    floor = 0.05 * mean[-1].abs() + 1e-6
    ratio_gain = lms / pan_low.clamp_min(floor)
    ratio_gain = torch.minimum(ratio_gain.clamp_min(0.0), LARGEST_RATIO_GAIN * mean_ratio)

    # Injecting commutes with blurring where the gain hardly changes: no need to do it on the PAN.
    missing = _lost(ms, statistics, offset) / band_scale
    missing = missing - local_gain * _lost(pan_lr, statistics, offset) / pan_scale

    on_ms_grid = torch.cat([local_gain, unexplained, correlation, ms_detail, missing], 1)
    local_up, unexplained_up, correlation_up, own_up, missing_up = enlarged(on_ms_grid).chunk(5, 1)
    detail_unit = detail / pan_scale
    band_features = torch.stack(
        [
            global_gain * detail_unit,
            local_up * detail_unit,
            ratio_gain * detail / band_scale,
            own_up,
            unexplained_up,
            correlation_up.clamp(-1, 1),
            missing_up,
        ],
        2,
    )
    low_detail = enlarged(pan_detail)
    return Condition(
        lms=lms,
        pan=pan,
        pan_features=torch.cat([detail_unit, high_pass, low_detail], 1),
        band_features=band_features,
        scene=_scene_numbers(statistics, offset, softness).to(pan).expand(len(pan), -1),
    )


def _lost(x: Tensor, statistics: SceneStatistics, offset: float) -> Tensor:
    """What of (B, C, h, w) interpolating, blurring and sampling does not give back.

    All three together are one filter on the MS grid.
    """
    psf = statistics.psf
    rows, cols = _there_and_back(statistics.ratio, psf.sigma, psf.shift, offset)
    b, c, h, w = x.shape
    reach = len(rows) // 2
    y = F.pad(x.reshape(b * c, 1, h, w), (reach,) * 4, mode="replicate")
    y = F.conv2d(y, rows.to(x)[None, None, :, None])
    y = F.conv2d(y, cols.to(x)[None, None, None, :])
    return x - y.reshape(b, c, h, w)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # first made while sharpening it must serve training too
def _there_and_back(ratio: int, sigma: float, shift: tuple[float, float], offset: float) -> tuple[Tensor, Tensor]:
    """Taps along rows and columns of upsampling followed by degrading."""
    reach = UPSAMPLE_REACH + degrade_reach(sigma, shift, ratio)
    size = 4 * reach + 1  # borders stay away from the impulse's answer
    impulse = torch.zeros(1, 1, size, size)
    impulse[..., size // 2, size // 2] = 1
    answer = degrade(upsample(impulse, ratio, offset), ratio, sigma, shift)[0, 0]
    # The answer to an impulse is the filter turned round.
    answer = answer[reach:-reach, reach:-reach].flip(0, 1)
    return answer.sum(1), answer.sum(0)


def _scene_numbers(statistics: SceneStatistics, offset: float, softness: float) -> Tensor:
    """(1, S): blur, ratio, shift; the blur again, magnified, and how well it explains the MS; how
    soft the result is to be.

    Optics of a usual sensor lie so close together in the blur that what is beyond them tells how
    soft the truth is against its PAN.
    """
    psf, ratio = statistics.psf, statistics.ratio
    sharpness = psf.sigma / ratio * 4 - 2  # about -1 to 1
    beyond = (s - offset for s in psf.shift)  # what the registration does not say
    shift = math.hypot(*beyond) / ratio  # its direction would not survive turned patches
    magnified = min(max(8 * sharpness, -6.0), 6.0)
    unexplained = 1 + 0.5 * math.log10(1 - psf.correlation + 1e-4)  # -1 (nothing) to 1 (all)
    soft = 4 * (softness - 0.5)  # -1.4 to 1.6
    numbers = [sharpness, 4.0 / ratio - 1, shift, magnified, unexplained, soft]
    return torch.tensor([numbers])
