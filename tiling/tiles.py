"""Cutting a frame into tiles, and blending their results strip by strip.

A strip is some neighbouring tiles of a row. Strips come row by row, `across` of them in each. All numbers are MS
pixels of the frame. Memory does not depend on the scene's height, and with overlap hardly on its width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from uknowpan.tiling.fill import AnyArray
from uknowpan.tiling.window import Window

Tile = Window
"""The core of a tile: the part of the frame whose result is kept."""


def plan_tiles(frame_shape: tuple[int, int], size: int, overlap: int = 0, multiple: int = 1) -> list[list[Tile]]:
    """Rows of tiles, top to bottom and left to right, that cover the frame.

    All tiles have one shape, so that any of them fit into one batch; the last ones may overhang the frame. Cores start
    at multiples of `multiple`.

    With overlap 0 the cores touch, and tiles are evened out (at most `size`) so that little is computed outside of the
    frame. With overlap > 0 every tile is `size` x `size` - networks with tile-wide statistics want the size they were
    trained on - and neighbours share exactly `overlap` pixels.

    Raises ValueError for sizes that cannot work.
    """
    h, w = frame_shape
    if h < 1 or w < 1 or size < 1 or multiple < 1 or overlap < 0:
        raise ValueError(f"frame {h} x {w}, size {size}, overlap {overlap}, multiple {multiple}")
    if size % multiple or overlap % multiple:
        raise ValueError(f"tile size {size} and overlap {overlap} must be multiples of {multiple} MS pixels")
    if 2 * overlap > size:
        raise ValueError(f"overlap {overlap} is more than half the tile size {size}")
    height, rows = _cut(h, size, overlap, multiple)
    width, cols = _cut(w, size, overlap, multiple)
    return [[Tile(row, col, height, width) for col in cols] for row in rows]


def _cut(length: int, size: int, overlap: int, multiple: int) -> tuple[int, list[int]]:
    """Tile length and starts along one axis."""
    if overlap == 0:
        count = ceil(length / size)
        even = ceil(ceil(length / count) / multiple) * multiple
        return even, list(range(0, length, even))
    stride = size - overlap
    count = 1 + max(0, ceil((length - size) / stride))
    return size, [i * stride for i in range(count)]


def cut_strips(rows: list[list[Tile]], across: int) -> tuple[list[list[Tile]], int]:
    """Cut each row of tiles into about `across` strips; returns these and their number in a row."""
    count = ceil(len(rows[0]) / across)
    starts = range(0, len(rows[0]), count)
    return [row[i : i + count] for row in rows for i in starts], len(starts)


def strip_window(strips: Sequence[Sequence[Tile]], across: int, index: int, frame_shape: tuple[int, int]) -> Window:
    """The part of the frame that is final once strip `index` is blended in."""
    row, col = strips[index][0][:2]
    bottom, right = frame_shape
    if index + across < len(strips):
        bottom = strips[index + across][0].row
    if (index + 1) % across:
        right = strips[index + 1][0].col
    return Window(row, col, bottom - row, right - col)


def strips_needed(missing: Iterable[int], across: int, overlap: int) -> list[int]:
    """Strips to compute so that those `missing` come out: with overlap also those above and on the left, whose edges
    are feathered in."""
    wanted = set(missing)
    if overlap:
        wanted |= {i - 1 for i in wanted if i % across}
        wanted |= {i - across for i in wanted if i >= across}
    return sorted(wanted)


def feather(size: int, overlap: int, ratio: int, first: bool, last: bool) -> npt.NDArray[np.float32]:
    """Weights (size * ratio,) along one axis of a tile; size and overlap in MS pixels.

    A raised-cosine ramp over the overlap, complementary to the neighbour's: the two sum to 1. No ramp where the tile is
    the `first` or `last` of its row or column: at the edge of a scene nobody would fill the gap.
    """
    weights = np.ones(size * ratio, np.float32)
    n = overlap * ratio
    if n:
        ramp = (0.5 - 0.5 * np.cos(np.pi * (np.arange(n) + 0.5) / n)).astype(np.float32)
        if not first:
            weights[:n] = ramp
        if not last:
            # 1 - ramp, not its mirror: exactly what the neighbour leaves.
            weights[-n:] = 1 - ramp
    return weights


@dataclass
class StripBlender:
    """Blends tiles into strips; a strip is final when it was added after those above it and on its left.

    With overlap 0 values are copied, bit for bit. With dtype bool overlapping tiles are OR-ed (validity masks do not
    depend on the tile, so they agree). The cut into strips does not show in the values.
    """

    strips: Sequence[Sequence[Tile]]
    frame_shape: tuple[int, int]
    bands: int
    ratio: int
    overlap: int = 0
    dtype: npt.DTypeLike = np.float32
    across: int = 1

    def __post_init__(self) -> None:
        # Weighted edges beyond what is final, and the strips that they are for.
        self._lower: dict[int, tuple[int, AnyArray]] = {}  # column of strips -> (C, overlap * ratio, W)
        self._right: tuple[int, AnyArray] | None = None

    def add(self, index: int, arrays: Sequence[AnyArray | None]) -> tuple[int, int, AnyArray]:
        """Blend one strip; arrays are (C, height * ratio, width * ratio), one for each tile; None for a tile that was
        skipped because nothing in it is valid (zeros).

        Returns (row, column, values (C, n, W)) in PAN pixels of the frame, cut to the frame. Strips may be skipped
        (`--resume`); with overlap > 0 those right after a skipped one lack an edge and are to be thrown away
        (`strips_needed` plans for that).
        """
        row, col, height, width = strip_window(self.strips, self.across, index, self.frame_shape).scaled(self.ratio)
        strip = self._join(index, arrays)
        if self.overlap:
            self._add_edge(strip, index, self._right)
            self._right = (index + 1, strip[:, :, width:].copy()) if strip.shape[2] > width else None
            self._add_edge(strip, index, self._lower.get(index % self.across))
            if index + self.across < len(self.strips):
                self._lower[index % self.across] = (index + self.across, strip[:, height:, :width].copy())
        return row, col, strip[:, :height, :width]

    def _add_edge(self, strip: AnyArray, index: int, edge: tuple[int, AnyArray] | None) -> None:
        if edge is None or edge[0] != index:
            return
        part = strip[:, : edge[1].shape[1], : edge[1].shape[2]]
        if part.dtype == np.bool_:
            part |= edge[1]
        else:
            part += edge[1]

    def _join(self, index: int, arrays: Sequence[AnyArray | None]) -> AnyArray:
        """The tiles of a strip, weighted, as (C, height * ratio, width of all within the frame * ratio)."""
        r, tiles, place = self.ratio, self.strips[index], index % self.across
        start, end = tiles[0].col, min(tiles[-1].col + tiles[-1].width, self.frame_shape[1])
        strip = np.zeros((self.bands, tiles[0].height * r, (end - start) * r), self.dtype)
        down = feather(tiles[0].height, self.overlap, r, index < self.across, index + self.across >= len(self.strips))
        for i, (tile, array) in enumerate(zip(tiles, arrays, strict=True)):
            if array is None:
                continue
            left = (tile.col - start) * r
            right = min(left + tile.width * r, strip.shape[2])
            part = array[:, :, : right - left]
            if strip.dtype == np.bool_:
                strip[:, :, left:right] |= part
            elif self.overlap == 0:
                strip[:, :, left:right] = part
            else:
                last = i + 1 == len(tiles) and place + 1 == self.across
                across = feather(tile.width, self.overlap, r, i + place == 0, last)
                strip[:, :, left:right] += part * (down[:, None] * across[None, : right - left])
        return strip
