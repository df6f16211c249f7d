"""Pixel arithmetic: windows, grids and the frame. Nothing is read here.

The output grid is the PAN grid. The MS is worked on in a *frame* of MS pixels, each ratio x ratio PAN pixels, areas
nested. The full scene's frame begins (oy, ox) PAN pixels above and left of the PAN, 0 <= o < ratio, chosen so that a
native MS that nests is read without resampling. With bounds the frame of a pair is a part of the full scene's frame.

Three distances have names, and there is no fourth:
    halo: pixels around a result that its computation looks at, such as a receptive field.
    margin: MS pixels read on every side of a tile and cut off its result; a margin covers the halo.
    reach: how deep values spread into invalid areas when these are filled.
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from affine import Affine
from rasterio.crs import CRS
from rasterio.rpc import RPC

ORIGIN_STEP = 12
"""MS pixels; frames begin at multiples of it: divisible by 1, 2, 3, 4 and 6, the strides of the networks."""


class Window(NamedTuple):
    """A rectangle of whole pixels of some grid; it may reach beyond the grid."""

    row: int
    col: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    def moved(self, rows: int, cols: int) -> "Window":
        return Window(self.row + rows, self.col + cols, self.height, self.width)

    def grown(self, by: int) -> "Window":
        return Window(self.row - by, self.col - by, self.height + 2 * by, self.width + 2 * by)

    def scaled(self, factor: int) -> "Window":
        """The same area in pixels `factor` times as fine."""
        return Window(self.row * factor, self.col * factor, self.height * factor, self.width * factor)


class Box(NamedTuple):
    """A rectangle in fractions of pixels of some grid."""

    top: float
    left: float
    bottom: float
    right: float


@dataclass(frozen=True)
class Grid:
    """Georeferencing and size of a raster."""

    crs: CRS | None
    transform: Affine
    width: int
    height: int
    area_or_point: str = "Area"
    """only what the file declares; `transform` is that of pixel areas in either case"""
    rpcs: RPC | None = None
    """place a raster in sensor geometry; its `transform` is that of pixels"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def is_placed(self) -> bool:
        """Whether the raster is georeferenced; a CRS alone places nothing."""
        return not self.transform.is_identity

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in the units of the CRS, smaller value first."""
        corners = [(0, 0), (self.width, 0), (0, self.height), (self.width, self.height)]
        xs, ys = zip(*(self.transform @ corner for corner in corners), strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def cut(self, window: Window) -> "Grid":
        """The part of the grid under a window."""
        transform, rpcs = self.transform @ Affine.translation(window.col, window.row), self.rpcs
        if rpcs is not None:
            rpcs = RPC(
                **{**rpcs.to_dict(), "line_off": rpcs.line_off - window.row, "samp_off": rpcs.samp_off - window.col}
            )
        return Grid(self.crs, transform, window.width, window.height, self.area_or_point, rpcs)


def same_crs(a: CRS | None, b: CRS | None) -> bool:
    """Whether two CRS are equal as far as they are known: a missing one equals any."""
    if a is None or b is None or a == b:
        return True
    code = a.to_epsg()
    return code is not None and code == b.to_epsg()


def crs_name(crs: CRS | None) -> str:
    """A short name for messages."""
    if crs is None:
        return "no CRS"
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else "a custom CRS"


@dataclass(frozen=True)
class Frame:
    """The MS pixels that hold an output grid, and where they lie in the full scene; pairs are (y, x)."""

    ratio: int
    """PAN pixels per MS pixel"""
    shape: tuple[int, int]
    """(h, w) in MS pixels"""
    offset: tuple[int, int]
    """(oy, ox): PAN pixels from the frame's corner to the first output pixel"""
    origin: tuple[int, int]
    """(row, col) of this frame within the full scene's frame, MS pixels; (0, 0) without bounds"""
    full_shape: tuple[int, int]
    """(h, w) of the full scene's frame"""
    full_offset: tuple[int, int]
    """(oy, ox) of the full scene's frame"""

    @staticmethod
    def full(pan_shape: tuple[int, int], offset: tuple[int, int], ratio: int) -> "Frame":
        """The frame of a whole scene."""
        shape = ceil((pan_shape[0] + offset[0]) / ratio), ceil((pan_shape[1] + offset[1]) / ratio)
        return Frame(ratio, shape, offset, (0, 0), shape, offset)

    def cut(self, window: Window) -> "Frame":
        """The part of a full frame that holds a window of the PAN."""
        oy, ox = self.full_offset
        top, y, height = self._along(window.row + oy, window.height)
        left, x, width = self._along(window.col + ox, window.width)
        return Frame(self.ratio, (height, width), (y, x), (top, left), self.full_shape, self.full_offset)

    def _along(self, start: int, length: int) -> tuple[int, int, int]:
        """(origin, offset, size) along one axis."""
        first = start // self.ratio // ORIGIN_STEP * ORIGIN_STEP
        offset = start - first * self.ratio
        return first, offset, ceil((offset + length) / self.ratio)

    def in_scene(self, window: Window) -> Window:
        """A window of this frame as one of the full scene's frame."""
        return window.moved(*self.origin)

    def on_pan(self, window: Window) -> Window:
        """A window of the full scene's frame as one of the whole PAN."""
        return window.scaled(self.ratio).moved(-self.full_offset[0], -self.full_offset[1])
