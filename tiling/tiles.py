"""Cutting a frame into tiles, and blending their results in a moving strip of rows.

All numbers are MS pixels of the frame. Memory does not depend on the scene's height.
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


def strip_rows(plan: list[list[Tile]], index: int, frame_shape: tuple[int, int]) -> tuple[int, int]:
    """MS rows [first, last) of the frame that are final once tile row `index` is blended in."""
    first = plan[index][0].row
    last = plan[index + 1][0].row if index + 1 < len(plan) else frame_shape[0]
    return first, min(last, frame_shape[0])


def tile_rows_needed(missing: Iterable[int], overlap: int) -> list[int]:
    """Tile rows to compute so that the strips `missing` come out: with overlap also the ones above, whose lower edge is
    feathered in."""
    wanted = set(missing)
    if overlap:
        wanted |= {i - 1 for i in wanted if i > 0}
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
    """Blends tile rows into strips; strip i is final when tile row i was added.

    With overlap 0 values are copied, bit for bit. With dtype bool overlapping tiles are OR-ed (validity masks do not
    depend on the tile, so they agree).
    """

    plan: list[list[Tile]]
    frame_shape: tuple[int, int]
    bands: int
    ratio: int
    overlap: int = 0
    dtype: npt.DTypeLike = np.float32

    def __post_init__(self) -> None:
        self._index_of = {row[0].row: i for i, row in enumerate(self.plan)}
        # Weighted lower edge of the last tile row: (its index, (C, overlap * ratio, W)).
        self._carry: tuple[int, AnyArray] | None = None

    def add_row(self, tiles: Sequence[Tile], arrays: Sequence[AnyArray | None]) -> tuple[int, AnyArray]:
        """Blend one tile row; arrays are (C, height * ratio, width * ratio), one for each tile; None for a tile that
        was skipped because nothing in it is valid (zeros).

        Returns (first row, rows (C, n, W)) in PAN pixels of the frame, cut to the frame. Tile rows may be skipped
        (`--resume`); with overlap > 0 the strip right after a skipped row lacks its upper edge and is to be thrown away
        (`tile_rows_needed` plans for that).
        """
        index = self._index_of[tiles[0].row]
        strip = self._join(tiles, arrays, index)
        if self.overlap and self._carry is not None and self._carry[0] == index - 1:
            above = self._carry[1]
            if np.dtype(self.dtype) == np.bool_:
                strip[:, : above.shape[1]] |= above
            else:
                strip[:, : above.shape[1]] += above
        first, last = (r * self.ratio for r in strip_rows(self.plan, index, self.frame_shape))
        n = last - first
        if self.overlap and index + 1 < len(self.plan):
            self._carry = (index, strip[:, n:].copy())
        return first, strip[:, :n]

    def _join(self, tiles: Sequence[Tile], arrays: Sequence[AnyArray | None], index: int) -> AnyArray:
        """One tile row, weighted, as (C, height * ratio, frame width * ratio)."""
        r = self.ratio
        width = self.frame_shape[1] * r
        strip = np.zeros((self.bands, tiles[0].height * r, width), self.dtype)
        down = feather(tiles[0].height, self.overlap, r, index == 0, index + 1 == len(self.plan))
        for i, (tile, array) in enumerate(zip(tiles, arrays, strict=True)):
            if array is None:
                continue
            left = tile.col * r
            right = min(left + tile.width * r, width)
            part = array[:, :, : right - left]
            if np.dtype(self.dtype) == np.bool_:
                strip[:, :, left:right] |= part
            elif self.overlap == 0:
                strip[:, :, left:right] = part
            else:
                across = feather(tile.width, self.overlap, r, i == 0, i + 1 == len(tiles))
                strip[:, :, left:right] += part * (down[:, None] * across[None, : right - left])
        return strip
