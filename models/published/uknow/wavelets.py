"""One level of the stationary Haar transform, and the wavelets that the teacher is shown."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def haar_swt2(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Undecimated Haar ("db1") transform: each pixel with its neighbours right, below and diagonal.

    The same numbers as ``pywt.swt2(x, "db1", level=1)``, with its periodic border and orthonormal
    scaling (LL is twice the local mean), but for odd sizes too.

    Args:
        x: (..., H, W).

    Returns:
        LL, H, V, D, each (..., H, W): the local mean and the details between rows (H), between
        columns (V) and across (D).
    """
    low, high = _haar(x, -1)
    (ll, h), (v, d) = _haar(low, -2), _haar(high, -2)
    return ll, h, v, d


def _haar(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Low and high pass of each pixel with the next one along `dim`."""
    following = x.roll(-1, dim)
    return (x + following) / math.sqrt(2), (x - following) / math.sqrt(2)


def teacher_wavelets(lms: Tensor, pan: Tensor) -> Tensor:
    """LL of lms, then H, D and V of PAN: (B, C, H, W) and (B, 1, H, W) to (B, C + 3, H, W).

    Both as they are, PAN without the high-pass. Source: U-Know-DiffPAN (CVPR 2025), FSA-T.
    """
    _, h, v, d = haar_swt2(pan)
    return torch.cat([haar_swt2(lms)[0], h, d, v], dim=1)
