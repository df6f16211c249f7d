"""Cutting a frame into tiles; all numbers are MS pixels of the frame."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Tile:
    """The core of one tile: rows row..row+height, columns col..col+width of the frame."""

    row: int
    col: int
    height: int
    width: int


def plan_tiles(frame_shape: tuple[int, int], size: int, overlap: int = 0, multiple: int = 1) -> list[list[Tile]]:
    """Rows of tiles, top to bottom and left to right, that cover the frame.

    All tiles have one shape, so that any of them fit into one batch; the last ones may overhang
    the frame. Cores start at multiples of `multiple`.

    With overlap 0 the cores touch, and tiles are evened out (at most `size`) so that little is
    computed outside of the frame. With overlap > 0 every tile is `size` x `size` - networks with
    tile-wide statistics want the size they were trained on - and neighbours share exactly
    `overlap` pixels.

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
    """Tile rows to compute so that the strips `missing` come out: with overlap also the ones
    above, whose lower edge is feathered in."""
    wanted = set(missing)
    if overlap:
        wanted |= {i - 1 for i in wanted if i > 0}
    return sorted(wanted)
