"""Resampling between the MS and the PAN grid.

Pixel areas nest: the centre of MS pixel ``i`` lies at PAN index ``ratio * i + (ratio - 1) / 2``.
Borders are replicated; callers that must not see them read a margin.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

UPSAMPLE_REACH = 2
"""MS pixels around an interpolated pixel that it depends on."""


def _cubic(x: Tensor, a: float = -0.5) -> Tensor:
    """Cubic convolution kernel (Keys 1981, a = -1/2)."""
    x = x.abs()
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a kernel first made while sharpening must serve training too
def _phase_kernels(ratio: int, offset: float) -> Tensor:
    """(ratio, 5) taps over MS pixels i-2..i+2 for each of the PAN pixels inside MS pixel i.

    Half a PAN pixel of offset is the most that five taps hold. PAN pixels then lie within half an
    MS pixel of the sample i.
    """
    centre = (torch.arange(ratio, dtype=torch.float64) - (ratio - 1) / 2 - offset) / ratio
    taps = torch.arange(-2, 3, dtype=torch.float64)
    return _cubic(centre[:, None] - taps[None, :]).float()


def registration_offset(registration: str, ratio: int) -> float:
    """PAN pixels by which MS samples lie beyond the nested centres, along rows and columns.

    Raises:
        ValueError: a registration that is neither "area" nor "pancollection".
    """
    if registration not in ("area", "pancollection"):
        raise ValueError(f"registration {registration!r} is unknown; take area or pancollection")
    return ratio // 2 - (ratio - 1) / 2 if registration == "pancollection" else 0.0


def upsample(ms: Tensor, ratio: int, offset: float = 0.0) -> Tensor:
    """Interpolate MS to the PAN grid by cubic convolution: ``lms``.

    Args:
        ms: (B, C, h, w).
        ratio: PAN pixels per MS pixel along one axis.
        offset: PAN pixels by which the MS samples lie beyond the nested centres, for rows and
            columns alike; at most half a pixel either way.

    Returns:
        (B, C, ratio * h, ratio * w).

    Raises:
        ValueError: an offset of more than half a pixel.
    """
    if not abs(offset) <= 0.5:
        raise ValueError(f"MS samples {offset:g} PAN pixels off; resample them to 0.5 or less")
    b, c, h, w = ms.shape
    kernel = _phase_kernels(ratio, float(offset)).to(ms)
    x = F.pad(ms.reshape(b * c, 1, h, w), (2, 2, 2, 2), mode="replicate")
    x = F.conv2d(x, kernel[:, None, :, None])  # (BC, ratio, h, w + 4)
    x = x.transpose(1, 2).reshape(b * c, 1, h * ratio, w + 4)
    x = F.conv2d(x, kernel[:, None, None, :])  # (BC, ratio, H, w)
    return x.permute(0, 2, 3, 1).reshape(b, c, h * ratio, w * ratio)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _upsample_matrix(length: int, ratio: int, offset: float) -> Tensor:
    """(ratio * length, length) matrix of `upsample` along one axis."""
    return upsample(torch.eye(length)[:, None, :, None], ratio, offset)[:, 0, :, 0].T.contiguous()


def upsample_small(ms: Tensor, ratio: int, offset: float = 0.0) -> Tensor:
    """`upsample` by matrix products; the results differ by rounding only.

    Ten times as fast for windows of a few dozen MS pixels; the cost per pixel grows with the window.
    """
    rows, cols = (_upsample_matrix(n, ratio, float(offset)).to(ms) for n in ms.shape[-2:])
    return rows @ (ms @ cols.T)


def degrade_reach(sigma: float, shift: tuple[float, float], ratio: int) -> int:
    """MS pixels around a degraded pixel that it depends on."""
    return math.ceil((3.0 * sigma + max(abs(shift[0]), abs(shift[1]))) / ratio + 0.5)


Kernel = Callable[[Tensor], Tensor]
"""Weight as a function of the distance (PAN pixels) from the sampling position."""


def gaussian(sigma: float) -> Kernel:
    """Gaussian of standard deviation `sigma` PAN pixels."""
    return lambda x: torch.exp(-0.5 * (x / sigma) ** 2)


def box(width: float) -> Kernel:
    """Mean over `width` PAN pixels; pixels at the edge have partial weight."""
    return lambda x: (width / 2 + 0.5 - x.abs()).clamp(0, 1)


def cubic(stretch: float) -> Kernel:
    """Cubic convolution stretched by `stretch` (the ratio: antialiased; 1: not)."""
    return lambda x: _cubic(x / stretch)


def tent(width: float) -> Kernel:
    """Linear from the middle to 0 at `width` PAN pixels: a box blurred by itself."""
    return lambda x: (1 - x.abs() / width).clamp_min(0)


def lanczos(stretch: float) -> Kernel:
    """Lanczos of three lobes, stretched by `stretch` (the ratio: antialiased)."""
    return lambda x: torch.where(x.abs() < 3 * stretch, torch.sinc(x / stretch) * torch.sinc(x / (3 * stretch)), 0.0)


def _taps(kernel: Kernel, shift: float, ratio: int, reach: int) -> Tensor:
    offsets = torch.arange(-reach * ratio, (reach + 1) * ratio, dtype=torch.float64)
    taps = kernel(offsets - (ratio - 1) / 2 - shift)
    return (taps / taps.sum()).float()


def decimate(x: Tensor, ratio: int, kernel: Kernel, shift: tuple[float, float], reach: int) -> Tensor:
    """Filter by a separable kernel and sample at the MS pixels' centres.

    Args:
        x: (B, C, H, W), H and W multiples of the ratio.
        ratio: PAN pixels per MS pixel.
        kernel: 1-D profile of the filter; normalised here.
        shift: (dy, dx) in PAN pixels, added to the sampling positions.
        reach: MS pixels on either side that the filter spans.

    Returns:
        (B, C, H / ratio, W / ratio).
    """
    b, c, height, width = x.shape
    pad = reach * ratio
    y = F.pad(x.reshape(b * c, 1, height, width), (pad, pad, pad, pad), mode="replicate")
    rows = _taps(kernel, shift[0], ratio, reach).to(x)
    cols = _taps(kernel, shift[1], ratio, reach).to(x)
    y = F.conv2d(y, rows[None, None, :, None], stride=(ratio, 1))
    y = F.conv2d(y, cols[None, None, None, :], stride=(1, ratio))
    return y.reshape(b, c, height // ratio, width // ratio)


def degrade(pan: Tensor, ratio: int, sigma: float, shift: tuple[float, float] = (0.0, 0.0)) -> Tensor:
    """`decimate` with a Gaussian of `sigma` PAN pixels: the action of a `Psf` on the PAN."""
    return decimate(pan, ratio, gaussian(sigma), shift, degrade_reach(sigma, shift, ratio))


def box_mean(x: Tensor, size: int) -> Tensor:
    """Mean of (B, C, h, w) over an odd size x size window; at borders over the pixels that exist."""
    pad = size // 2
    x = F.avg_pool2d(x, (size, 1), 1, (pad, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, size), 1, (0, pad), count_include_pad=False)


def crop(x: Tensor, margin: int) -> Tensor:
    """Take `margin` pixels off every side."""
    return x if margin == 0 else x[..., margin:-margin, margin:-margin]


def mirrored(start: int, count: int, length: int) -> Tensor:
    """Indices start .. start + count, reflected about the edges of 0 .. length (edge repeated)."""
    index = torch.arange(start, start + count) % (2 * length)
    return torch.where(index < length, index, 2 * length - 1 - index)


def reflect(x: Tensor, margin: int, height: int | None = None, width: int | None = None) -> Tensor:
    """Images (..., h, w) with `margin` mirrored pixels on every side.

    Args:
        x: the images.
        margin: pixels before the first row and column, and after the last.
        height: rows between the margins; None: h. More than h are mirrored, too.
        width: columns between the margins; None: w.
    """
    h, w = x.shape[-2:]
    x = x[..., mirrored(-margin, (height or h) + 2 * margin, h), :]
    return x[..., mirrored(-margin, (width or w) + 2 * margin, w)]
