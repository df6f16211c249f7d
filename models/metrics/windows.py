"""Windows, masks and checks that the metrics share.

An image is float64 (B, C, H, W), and `keep` (H, W) is True where there is data.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_FLAT = 4e-14
"""Variance over power below which a window is flat.

The value exceeds float64's rounding of the sums and is below one DN on one pixel of a bright 16-bit window.
"""


def as_batch(x: Tensor) -> Tensor:
    """An image (C, H, W) or (B, C, H, W) as float64 (B, C, H, W)."""
    return x.to(torch.float64).reshape(-1, *x.shape[-3:])


def prepare(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both images as float64 (B, C, H, W) with 0 where masked, and (H, W) True where there is data."""
    if x.shape != y.shape or x.ndim not in (3, 4):
        raise ValueError(
            f"two images of one shape, (C, H, W) or (B, C, H, W), are needed, not"
            f" {tuple(x.shape)} and {tuple(y.shape)}; resample or crop one to the other"
        )
    x, y = as_batch(x), as_batch(y)
    if mask is None:
        return x, y, torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device)
    if mask.shape != x.shape[-2:] or mask.dtype != torch.bool:
        raise ValueError(
            f"the mask must be bool {tuple(x.shape[-2:])} like the image's height and width, not"
            f" {str(mask.dtype).removeprefix('torch.')} {tuple(mask.shape)}"
        )
    keep = ~mask.to(x.device)
    if not bool(keep.any()):
        raise ValueError(
            f"all {keep.numel()} pixels are masked, so there is nothing to measure; check the nodata value"
        )
    return torch.where(keep, x, 0.0), torch.where(keep, y, 0.0), keep


def require_window(shape: tuple[int, int], window: int) -> None:
    """Raise ValueError unless an image of that (height, width) holds a window."""
    if min(shape) < window:
        raise ValueError(
            f"{shape[0]} x {shape[1]} pixels are fewer than one window of {window} x {window}; take a larger image"
        )


def clean_windows(keep: Tensor, window: int, stride: int) -> Tensor:
    """(rows, cols) True where a whole window of (H, W) is kept; ValueError if the image is smaller than one."""
    height, width = keep.shape
    require_window((height, width), window)
    if bool(keep.all()):
        return keep.new_ones((height - window) // stride + 1, (width - window) // stride + 1)
    holes = F.max_pool2d((~keep).float()[None, None], (window, 1), (stride, 1))
    return F.max_pool2d(holes, (1, window), (1, stride))[0, 0] == 0


def dilate(mask: Tensor, reach: int, circular: bool = False) -> Tensor:
    """Grow the True area of (H, W) by `reach` pixels, across the image's borders if `circular`."""
    x = mask.float()[None, None]
    if circular:
        # A circular border wider than the image only repeats it.
        margins = [min(reach, n) for n in (mask.shape[1], mask.shape[0])]
        x = F.pad(x, (margins[0], margins[0], margins[1], margins[1]), mode="circular")
    else:
        x = F.pad(x, (reach,) * 4)
        margins = [reach, reach]
    x = F.max_pool2d(x, (2 * margins[1] + 1, 1), 1)
    return F.max_pool2d(x, (1, 2 * margins[0] + 1), 1)[0, 0] > 0


def window_quality(x: Tensor, y: Tensor, window: int, stride: int) -> Tensor:
    """Universal quality index (B, C, rows, cols) of each window of two images (B, C, H, W)."""
    n = window * window
    sx, sy = window_sum(x, window, stride), window_sum(y, window, stride)
    power = n * window_sum(x * x + y * y, window, stride)
    mean_power = sx * sx + sy * sy
    variance = power - mean_power
    variance = torch.where(variance > _FLAT * power, variance, 0.0)
    covariance = n * window_sum(x * y, window, stride) - sx * sy
    some_variance, some_mean = variance > 0, mean_power > 0
    luminance = 2 * sx * sy / torch.where(some_mean, mean_power, 1.0)
    structure = 2 * covariance / torch.where(some_variance, variance, 1.0)
    quality = torch.where(some_variance, structure * luminance, luminance)
    return torch.where(some_mean, quality, 1.0)


def window_sum(x: Tensor, window: int, stride: int = 1) -> Tensor:
    """Sum of each window x window pixels of (B, C, H, W)."""
    if stride == 1 and window & (window - 1) == 0:
        return _doubled_sum(_doubled_sum(x, window, -2), window, -1)
    rows = F.avg_pool2d(x, (window, 1), (stride, 1), divisor_override=1)
    return F.avg_pool2d(rows, (1, window), (1, stride), divisor_override=1)


def _doubled_sum(x: Tensor, window: int, axis: int) -> Tensor:
    """Sums over `window` (a power of two) neighbours, from sums over half as many."""
    width = 1
    while width < window:
        room = x.shape[axis] - width
        x = x.narrow(axis, 0, room) + x.narrow(axis, width, room)
        width *= 2
    return x


def separable(x: Tensor, taps: Tensor) -> Tensor:
    """Correlation of (..., H, W) with symmetric taps (k,) along rows and columns, whole overlaps only.

    Sums of shifted images are ten times as fast as a convolution in float64.
    """
    for axis in (-2, -1):
        room = x.shape[axis] - len(taps) + 1
        total = taps[0] * x.narrow(axis, 0, room)
        for place in range(1, len(taps)):
            total = total + taps[place] * x.narrow(axis, place, room)
        x = total
    return x
