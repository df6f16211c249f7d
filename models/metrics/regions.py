"""The cut of an image into regions, so that images that do not fit into memory are measured by sums over them.

A whole image is one region. Regions start at multiples of 32 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from uknowpan.models.metrics.windows import require_window

BLOCK = 32
"""Width of the windows and tiles of Q, Q2n, D_lambda and D_s."""

ROWS, COLS = 256, 640
"""Default size of a region: multiples of 32 that with the halo of the MTF filters suit an FFT."""

MANY_BANDS = 8
"""Number of bands above which regions become narrower, for the sake of memory."""

TILE = f"window of {BLOCK} x {BLOCK} pixels"

Shape = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class Region:
    """A rectangle of an image, in pixels."""

    row: int
    col: int
    height: int
    width: int

    def grown(self, before: int, after: int, shape: Shape) -> Region:
        """The region with more pixels above and left, below and right, within an image of `shape`."""
        return self.padded(before, after).clipped(shape)

    def padded(self, before: int, after: int) -> Region:
        """The region with more pixels above and left, below and right, beyond the image too."""
        size = before + after
        return Region(self.row - before, self.col - before, self.height + size, self.width + size)

    def clipped(self, shape: Shape, border: int = 0) -> Region:
        """The part of the region in an image of `shape` without the image's `border`."""
        top, left = max(self.row, border), max(self.col, border)
        bottom, right = min(self.row + self.height, shape[0] - border), min(self.col + self.width, shape[1] - border)
        return Region(top, left, bottom - top, right - left)

    def scaled(self, factor: int) -> Region:
        """The same area in pixels `factor` times as fine."""
        return Region(self.row * factor, self.col * factor, self.height * factor, self.width * factor)

    def within(self, outer: Region) -> tuple[slice, slice]:
        """Rows and columns of the region in the arrays of a region around it."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.height), slice(col, col + self.width)


def whole_tiles(shape: Shape) -> Shape:
    """Shape of the image without incomplete tiles at the bottom and the right; ValueError if no tile is complete."""
    require_window(shape, BLOCK)
    return shape[0] // BLOCK * BLOCK, shape[1] // BLOCK * BLOCK


def regions(shape: Shape, bands: int = MANY_BANDS, *, rows: int = ROWS, cols: int = COLS) -> Iterator[Region]:
    """Regions of `rows` x `cols` pixels, multiples of 32, row by row.

    An incomplete last tile belongs to the region before it, which mirrors it.
    """
    cols = max(cols * MANY_BANDS // max(bands, MANY_BANDS) // BLOCK, 1) * BLOCK
    for row, height in _cuts(shape[0], rows):
        for col, width in _cuts(shape[1], cols):
            yield Region(row, col, height, width)


def _cuts(length: int, step: int) -> list[tuple[int, int]]:
    starts = [s for s in range(0, length, step) if s == 0 or length - s >= BLOCK]
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def read_circular(read: Callable[[Region], Iterable[Tensor]], region: Region, shape: Shape) -> tuple[Tensor, ...]:
    """Tensors (..., h, w) of a region; beyond a border the image of `shape` goes on at its opposite side."""
    lines = []
    for row, height in _circular(region.row, region.height, shape[0]):
        parts = [read(Region(row, col, height, width)) for col, width in _circular(region.col, region.width, shape[1])]
        lines.append([torch.cat(pieces, -1) for pieces in zip(*parts, strict=True)])
    return tuple(torch.cat(pieces, -2) for pieces in zip(*lines, strict=True))


def _circular(start: int, count: int, size: int) -> list[tuple[int, int]]:
    """Parts (start, length) of 0 .. size that follow each other from `start` on, circularly."""
    pieces = []
    while count:
        first = start % size
        length = min(count, size - first)
        pieces.append((first, length))
        start, count = start + length, count - length
    return pieces


def require_shape(image: Tensor, region: Region) -> None:
    """Raise ValueError unless an image (..., H, W) is as large as the region."""
    if image.shape[-2:] != (region.height, region.width):
        raise ValueError(
            f"an image (C, {region.height}, {region.width}) is needed for this region, not"
            f" {tuple(image.shape)}; read what `needed` returns"
        )


@dataclass
class Mean:
    """Mean of values that come in portions."""

    what: str
    total: Tensor | float = 0.0
    count: Tensor | int = 0

    def add(self, values: Tensor, keep: Tensor) -> None:
        """Add the values (..., H, W) where `keep` (H, W) is True."""
        self.add_sum(values[..., keep].sum(-1), int(keep.sum()))

    def add_sum(self, total: Tensor, count: Tensor | int) -> None:
        """Add a sum of that many values."""
        self.total, self.count = self.total + total, self.count + count

    def sum(self) -> Tensor:
        """Sum of all values; ValueError if there are none."""
        if not bool(torch.as_tensor(self.count).all()):
            raise ValueError(
                f"no {self.what} without nodata is left to measure; check the nodata value or take a larger image"
            )
        return torch.as_tensor(self.total, dtype=torch.float64)

    def value(self) -> Tensor:
        """Mean of all values; ValueError if there are none."""
        return self.sum() / self.count
