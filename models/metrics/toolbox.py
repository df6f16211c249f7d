"""Filters and resampling of the DLPan-Toolbox, to the last digit, for measuring.

They keep the toolbox's quirks (filters that do not sum to 1, half-pixel shifts), because published scores contain
them. Models use `resample` instead. All results are float64.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.resample import HALF_OF_23_TAPS, keys, like, mirrored

MTF_REACH = 20
"""Reach of `mtf_filter` in pixels: the kernels are 41 x 41."""

INTERP23TAP_REACH = 11
"""Reach of one x 2 stage of `interp23tap`, in pixels of its output."""

_KAISER_BETA = 0.5


def mtf_kernel(gain: float, ratio: int = 4) -> Tensor:
    """Low-pass filter (41, 41) whose amplitude at the MS grid's Nyquist frequency is `gain`.

    The kernel is a Gaussian frequency response with peak 1, times a Kaiser window rotated about the centre (Huang's
    method). The sum is about 0.9988, not 1, as in the toolbox. A gain outside (0, 1) raises ValueError.
    """
    steps = torch.arange(-MTF_REACH, MTF_REACH + 1, dtype=torch.float64)
    radius = (steps[:, None] ** 2 + steps[None, :] ** 2).sqrt()
    return response_kernel(gain, ratio) * _rotate(kaiser_window(), radius)


def response_kernel(gain: float, ratio: int, least: float = 0.0) -> Tensor:
    """Kernel (41, 41) of the Gaussian frequency response that is `gain` at the MS grid's Nyquist frequency.

    Values of the response below `least` become 0.
    """
    if not 0.0 < gain < 1.0:
        raise ValueError(f"an MTF gain lies between 0 and 1, not at {gain}; take the sensor's own")
    alpha = MTF_REACH / ratio / math.sqrt(-2.0 * math.log(gain))
    steps = torch.arange(-MTF_REACH, MTF_REACH + 1, dtype=torch.float64)
    response = torch.exp(-(steps[:, None] ** 2 + steps[None, :] ** 2) / (2.0 * alpha**2))
    response = torch.where(response < least, 0.0, response)
    kernel: Tensor = torch.fft.fftshift(torch.fft.ifft2(torch.fft.ifftshift(response))).real
    return kernel


def kaiser_window() -> Tensor:
    """Kaiser window (41,) of the toolbox."""
    return torch.kaiser_window(2 * MTF_REACH + 1, periodic=False, beta=_KAISER_BETA, dtype=torch.float64)


def _rotate(window: Tensor, radius: Tensor) -> Tensor:
    """The one-dimensional window at each radius, interpolated linearly; 0 beyond its end."""
    below = radius.floor().long().clamp(max=MTF_REACH - 1)
    right_half = window[MTF_REACH:]
    value = torch.lerp(right_half[below], right_half[below + 1], radius - below)
    return torch.where(radius <= MTF_REACH, value, 0.0)


def mtf_filter(x: Tensor, gains: Sequence[float], ratio: int = 4) -> Tensor:
    """Blur each band of (C, H, W) or (B, C, H, W) by its `mtf_kernel`, borders replicated; the size stays.

    There is one gain per band, or one for all; another number of gains raises ValueError.
    """
    bands = x.shape[-3]
    if len(gains) not in (1, bands):
        raise ValueError(f"{len(gains)} MTF gains for an image of {bands} bands; give one per band, or one")
    each = gains if len(gains) == bands else [gains[0]] * bands
    pairs = zip(x.to(torch.float64).unbind(-3), each, strict=True)
    return torch.stack([_blur(band, mtf_kernel(g, ratio).to(band)) for band, g in pairs], dim=-3)


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolution of (..., H, W) with (41, 41), borders replicated."""
    height, width = x.shape[-2:]
    padded = F.pad(x.reshape(-1, 1, height, width), (MTF_REACH,) * 4, mode="replicate")
    return convolve(padded, kernel).reshape(x.shape)


def convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolution of (..., H, W) with (k, k), whole overlaps only: (..., H - k + 1, W - k + 1).

    A direct convolution in float64 took half a minute for 8 x 512 x 512; this one is by Fourier transform.
    """
    size, lost = x.shape[-2:], len(kernel) - 1
    blurred: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * torch.fft.rfft2(kernel, s=size), s=size)
    # Elsewhere the circular convolution mixes in pixels from across the border.
    return blurred[..., lost:, lost:]


def interp23tap(x: Tensor, ratio: int = 4) -> Tensor:
    """Enlarge with the toolbox's 23-tap interpolator, borders circular: the field's ``lms``.

    Sample i of (..., h, w) lands on output index ``2 i + 1`` at ratio 2 and ``4 i + 2`` at ratio 4. The result
    (..., ratio * h, ratio * w) may leave the range of x. A ratio that is no power of two raises ValueError.
    """
    if ratio < 1 or ratio & (ratio - 1):
        raise ValueError(f"interp23tap enlarges by powers of two, not by {ratio}; use `upsample`")
    y = x.to(torch.float64)
    for stage in range(ratio.bit_length() - 1):
        # Samples go to odd positions in the first stage and to even ones in the later stages.
        odd = 1 if stage == 0 else 0
        y = _double(_double(y, odd).mT, odd).mT
    return y


def _double(x: Tensor, first: int) -> Tensor:
    """Rows twice as long: samples at `first`, first + 2, ..., interpolated values between them."""
    half = 2 * torch.tensor(HALF_OF_23_TAPS, dtype=x.dtype, device=x.device)
    taps = torch.cat([half[1:].flip(0), half])
    stuffed = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    stuffed[..., first::2] = x
    length = stuffed.shape[-1]
    around = torch.arange(-INTERP23TAP_REACH, length + INTERP23TAP_REACH, device=x.device)
    wrapped = stuffed[..., around % length].reshape(-1, 1, len(around))
    return F.conv1d(wrapped, taps[None, None]).reshape(stuffed.shape)


def imresize(x: Tensor, ratio: int = 4) -> Tensor:
    """Shrink by antialiased bicubic interpolation (a = -0.5), borders mirrored with the edge.

    Output pixel i of (..., H / ratio, W / ratio) is centred on input index ``ratio * i + (ratio - 1) / 2``.
    ValueError if H or W is not a multiple of the ratio, a whole number.
    """
    height, width = x.shape[-2:]
    if height % ratio or width % ratio:
        raise ValueError(
            f"{height} x {width} pixels cannot be reduced by {ratio}; crop to"
            f" {height - height % ratio} x {width - width % ratio}"
        )
    return _shrink(_shrink(x.to(torch.float64), ratio).mT, ratio).mT


def _shrink(x: Tensor, ratio: int) -> Tensor:
    """Rows `ratio` times shorter."""
    reach = 2 * ratio
    weights = keys((np.arange(-reach, reach + ratio) - (ratio - 1) / 2) / ratio)
    taps = like(weights / weights.sum(), x)
    index = mirrored(-reach, x.shape[-1] + 2 * reach, x.shape[-1])
    return F.conv1d(x[..., index].reshape(-1, 1, len(index)), taps[None, None], stride=ratio).reshape(*x.shape[:-1], -1)
