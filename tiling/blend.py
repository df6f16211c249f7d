"""Putting tiles together in a moving strip of rows; memory does not depend on scene height."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from uknowpan.tiling.tiles import Tile, strip_rows


def feather(size: int, overlap: int, ratio: int, first: bool, last: bool) -> npt.NDArray[np.float32]:
    """Weights (size * ratio,) along one axis of a tile; size and overlap in MS pixels.

    A raised-cosine ramp over the overlap, complementary to the neighbour's: the two sum to 1.
    No ramp where the tile is the `first` or `last` of its row or column: at the edge of a scene
    nobody would fill the gap.
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


class StripBlender:
    """Blends tile rows into strips; strip i is final when tile row i was added.

    With overlap 0 values are copied, bit for bit. With dtype bool overlapping tiles are OR-ed
    (validity masks do not depend on the tile, so they agree).
    """

    def __init__(
        self,
        plan: list[list[Tile]],
        frame_shape: tuple[int, int],
        bands: int,
        ratio: int,
        overlap: int = 0,
        dtype: npt.DTypeLike = np.float32,
    ) -> None:
        self._plan = plan
        self._frame = frame_shape
        self._bands = bands
        self._ratio = ratio
        self._overlap = overlap
        self._dtype = np.dtype(dtype)
        self._index_of = {row[0].row: i for i, row in enumerate(plan)}
        # Weighted lower edge of the last tile row: (its index, (C, overlap * ratio, W)).
        self._carry: tuple[int, npt.NDArray] | None = None

    def add_row(self, tiles: Sequence[Tile], arrays: Sequence[npt.NDArray | None]) -> tuple[int, npt.NDArray]:
        """Blend one tile row; arrays are (C, height * ratio, width * ratio), one for each tile;
        None for a tile that was skipped because nothing in it is valid (zeros).

        Returns (first row, rows (C, n, W)) in PAN pixels of the frame, cut to the frame.
        Tile rows may be skipped (`--resume`); with overlap > 0 the strip right after a skipped
        row lacks its upper edge and is to be thrown away (`tile_rows_needed` plans for that).
        """
        index = self._index_of[tiles[0].row]
        strip = self._join(tiles, arrays, index)
        if self._overlap and self._carry is not None and self._carry[0] == index - 1:
            above = self._carry[1]
            if self._dtype == np.bool_:
                strip[:, : above.shape[1]] |= above
            else:
                strip[:, : above.shape[1]] += above
        first, last = (r * self._ratio for r in strip_rows(self._plan, index, self._frame))
        n = last - first
        if self._overlap and index + 1 < len(self._plan):
            height = tiles[0].height * self._ratio
            self._carry = (index, strip[:, n:height].copy())
        return first, strip[:, :n]

    def _join(self, tiles: Sequence[Tile], arrays: Sequence[npt.NDArray | None], index: int) -> npt.NDArray:
        """One tile row, weighted, as (C, height * ratio, frame width * ratio)."""
        r = self._ratio
        width = self._frame[1] * r
        strip = np.zeros((self._bands, tiles[0].height * r, width), self._dtype)
        down = feather(tiles[0].height, self._overlap, r, index == 0, index + 1 == len(self._plan))
        for i, (tile, array) in enumerate(zip(tiles, arrays, strict=True)):
            if array is None:
                continue
            left = tile.col * r
            right = min(left + tile.width * r, width)
            part = array[:, :, : right - left]
            if self._dtype == np.bool_:
                strip[:, :, left:right] |= part
            elif self._overlap == 0:
                strip[:, :, left:right] = part
            else:
                across = feather(tile.width, self._overlap, r, i == 0, i + 1 == len(tiles))
                weights = down[:, None] * across[None, : right - left]
                strip[:, :, left:right] += part * weights
        return strip
