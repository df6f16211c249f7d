"""Result, PAN and MS read by regions, with the borders, low-pass filters and interpolation of the indices."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.metrics.regions import Region, Shape
from uknowpan.models.metrics.toolbox import MTF_REACH, convolve, kaiser_window, response_kernel
from uknowpan.models.metrics.windows import clean_windows

Read = Callable[[Region], tuple[Tensor, Tensor]]
"""Values (C, h, w) float64, finite, and nodata (h, w) of a region within the image."""


@dataclass(frozen=True)
class Images:
    """A result with its PAN and MS; PAN pixel 0 and MS pixel 0 begin at the same corner."""

    shape: Shape
    """(h, w) of the MS; PAN and result are `ratio` times as large."""
    bands: int
    ratio: int
    fused: Read
    pan: Read
    ms: Read

    @property
    def large(self) -> Shape:
        """(H, W) of the PAN and the result."""
        return self.shape[0] * self.ratio, self.shape[1] * self.ratio


def whole_images(fused: Tensor, pan: Tensor, ms: Tensor) -> Images:
    """Images that are in memory, without nodata: fused (C, H, W), pan (1, H, W), ms (C, h, w), finite."""

    def reader(image: Tensor) -> Read:
        values = image.to(torch.float64)

        def read(region: Region) -> tuple[Tensor, Tensor]:
            part = values[..., *region.within(Region(0, 0, *values.shape[-2:]))]
            return part, torch.zeros(part.shape[-2:], dtype=torch.bool)

        return read

    shape = (ms.shape[-2], ms.shape[-1])
    return Images(shape, len(ms), fused.shape[-2] // shape[0], reader(fused), reader(pan), reader(ms))


def fill(x: Tensor, inner: Region, outer: Region, border: str = "constant") -> Tensor:
    """An image over a region as one over a larger region; `border` fills the rest as in `F.pad`."""
    top, left = inner.row - outer.row, inner.col - outer.col
    pads = (left, outer.width - inner.width - left, top, outer.height - inner.height - top)
    return F.pad(x, pads, mode=border) if any(pads) else x


def read_region(read: Read, region: Region, shape: Shape, border: str = "constant") -> tuple[Tensor, Tensor]:
    """Values and nodata of a region that may leave the image, where nothing is nodata."""
    inner = region.clipped(shape)
    values, mask = read(inner)
    return fill(values, inner, region, border), fill(mask, inner, region)


def inside_of(region: Region, shape: Shape) -> Tensor:
    """(h, w) True where a region lies in the image."""
    inner = region.clipped(shape)
    return fill(torch.ones(inner.height, inner.width, dtype=torch.bool), inner, region)


def clean(mask: Tensor, before: int, after: int) -> Tensor:
    """(h, w) True where no nodata lies up to `before` pixels above and left and `after` below and right.

    The mask has as many pixels more on these sides.
    """
    return clean_windows(~mask, before + after + 1, 1)


def mtf_kernel(gain: float, ratio: int) -> Tensor:
    """Low-pass filter (41, 41) of the published tool: sum 1, a Kaiser window along the columns only."""
    kernel = response_kernel(gain, ratio, torch.finfo(torch.float64).eps) * kaiser_window()
    kernel = kernel.clamp_min(0.0)
    return kernel / kernel.sum()


def gaussian_kernel(sigma: float) -> Tensor:
    """Gaussian (41, 41) of a standard deviation in PAN pixels, with sum 1."""
    taps = gaussian_taps(sigma, MTF_REACH)
    return taps[:, None] * taps


def gaussian_taps(sigma: float, reach: int) -> Tensor:
    steps = torch.arange(-reach, reach + 1, dtype=torch.float64)
    taps = torch.exp(-(steps**2) / (2 * sigma**2))
    return taps / taps.sum()


def blurred(
    read: Read, region: Region, shape: Shape, kernels: Sequence[Tensor], border: str = "replicate"
) -> tuple[Tensor, Tensor]:
    """A region filtered by a kernel per band, and where that mixed in nodata; one band serves all kernels."""
    values, mask = read_region(read, region.padded(MTF_REACH, MTF_REACH), shape, border)
    bands = values.expand(len(kernels), *values.shape[1:])
    low = torch.stack([convolve(band, kernel) for band, kernel in zip(bands, kernels, strict=True)])
    return low, ~clean(mask, MTF_REACH, MTF_REACH)


def box_around(y: Tensor, x: Tensor, before: int = 1, after: int = 2) -> Region:
    """The region of whole pixels around fractional places that `sample` takes, cubic by default."""
    top, left = math.floor(float(y.min())) - before, math.floor(float(x.min())) - before
    bottom, right = math.floor(float(y.max())) + after, math.floor(float(x.max())) + after
    return Region(top, left, bottom + 1 - top, right + 1 - left)


def sample(image: Tensor, rows: Tensor, cols: Tensor, *, cubic: bool = True) -> Tensor:
    """Values of (C, H, W) at fractional places (C or 1, h, w), by Keys' cubic convolution or linearly."""
    (top, by_row), (left, by_col) = _taps(rows, cubic), _taps(cols, cubic)
    height, width = image.shape[-2:]
    shape = torch.broadcast_shapes((len(image), 1, 1), rows.shape, cols.shape)
    flat, total = image.flatten(1).expand(shape[0], -1), image.new_zeros(shape)
    for i, weight in enumerate(by_row):
        row = (top + i).clamp(0, height - 1) * width
        for j, other in enumerate(by_col):
            place = (row + (left + j).clamp(0, width - 1)).expand(shape).flatten(1)
            total += weight * other * flat.gather(1, place).reshape(shape)
    return total


def _taps(place: Tensor, cubic: bool) -> tuple[Tensor, list[Tensor]]:
    """Index of the first sample that counts, and the weights of it and those that follow."""
    whole = place.floor()
    t = place - whole
    if not cubic:
        return whole.long(), [1 - t, t]
    two, three = t * t, t * t * t
    weights = [-0.5 * three + two - 0.5 * t, 1.5 * three - 2.5 * two + 1, -1.5 * three + 2 * two + 0.5 * t]
    return whole.long() - 1, [*weights, 0.5 * (three - two)]
