"""The stationary Haar transform of images, with PyWavelets' filters, and the teacher's wavelets."""

import math
from collections.abc import Sequence

import pywt
import torch
from torch import Tensor

HAAR = pywt.Wavelet("haar")


def haar_swt2(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level of the undecimated Haar transform: each pixel with its right, lower and diagonal neighbour.

    Equals ``pywt.swt2(x, "haar", level=1)``, with its periodic border and orthonormal scaling (LL
    is twice the local mean), but takes odd sizes, batches and gradients too.

    Args:
        x: (..., H, W).

    Returns:
        LL, H, V, D, each (..., H, W): the local mean and the details between rows (H), between
        columns (V) and across (D).
    """
    (ll, h), (v, d) = (
        (_filtered(half, HAAR.dec_lo, -2), _filtered(half, HAAR.dec_hi, -2))
        for half in (_filtered(x, HAAR.dec_lo, -1), _filtered(x, HAAR.dec_hi, -1))
    )
    return ll, h, v, d


def _filtered(x: Tensor, taps: Sequence[float], dim: int) -> Tensor:
    """Convolution of x along `dim` with two taps of equal size, over each pixel and the next one."""
    here, following = (math.copysign(1.0, tap) for tap in reversed(taps))
    # The common factor comes last, so that sum and difference are rounded once.
    norm: float = sum(HAAR.dec_lo)
    return (here * x + following * x.roll(-1, dim)) / norm


def teacher_wavelets(lms: Tensor, pan: Tensor) -> Tensor:
    """LL of lms, then H, D and V of PAN: (B, C, H, W) and (B, 1, H, W) to (B, C + 3, H, W).

    Both images enter raw, PAN without the high-pass. Source: U-Know-DiffPAN (CVPR 2025), FSA-T.
    """
    _, h, v, d = haar_swt2(pan)
    return torch.cat([haar_swt2(lms)[0], h, d, v], dim=1)
