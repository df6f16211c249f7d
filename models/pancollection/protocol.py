"""Wald's protocol as PanCollection's files follow it: the reduced MS, and the LMS made of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from uknowpan.models.metrics.toolbox import MTF_REACH, interp23tap, mtf_filter
from uknowpan.models.resample import crop, reflect, upsample
from uknowpan.models.training.degradations import Degradation, degrade_truth

LMS_REACH = 10
"""MS pixels that an interpolated pixel depends on, at ratio 8 and below."""


def registration_of(ratio: int) -> str:
    """Place of the MS in simulated data, as a checkpoint's card names it.

    "pancollection": MS sample i at truth index ratio * i + ratio // 2, for powers of two, by which
    the toolbox's interpolator enlarges. "area": at ratio * i + (ratio - 1) / 2.
    """
    return "pancollection" if ratio & (ratio - 1) == 0 else "area"


def wald_margin(ratio: int) -> int:
    """Margin in reduced MS pixels that a simulated patch depends on."""
    return LMS_REACH + -(-MTF_REACH // ratio) + 1


def wald_ms(gt: Tensor, gains: Sequence[float], ratio: int) -> Tensor:
    """The reduced MS of a truth (C, H, W): blurred by the sensor's MTF and sampled, float64.

    `gains` are those at the MS Nyquist frequency, one per band; `registration_of` gives the registration.
    """
    if registration_of(ratio) == "area":
        return degrade_truth(gt.double(), Degradation(ratio, "gaussian", tuple(gains)))
    first = ratio // 2
    return mtf_filter(gt, gains, ratio)[..., first::ratio, first::ratio]


def wald_lms(ms: Tensor, ratio: int) -> Tensor:
    """The reduced MS enlarged again: by `interp23tap` for powers of two, else by cubic convolution.

    (C, h, w) to (C, ratio * h, ratio * w) float64. The toolbox's interpolator wraps around at the
    borders of a scene; here they are mirrored.
    """
    if registration_of(ratio) == "area":
        return upsample(ms.double()[None], ratio)[0]
    # Band by band: the convolutions of all at once took a gigabyte for 8 x 640 x 640.
    wide = torch.stack([interp23tap(reflect(band, LMS_REACH), ratio) for band in ms])
    return crop(wide, LMS_REACH * ratio)
