"""Reading of a result, its reference, PAN and MS as the scores take them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from uknowpan.models.metrics.full_resolution import REDUCE_MARGIN, Coarse, Enlargement, reduce_pan
from uknowpan.models.metrics.images import Images
from uknowpan.models.metrics.regions import COLS, ROWS, Region, read_circular
from uknowpan.models.resample import crop
from uknowpan.surveying import FEW_LEVELS
from uknowpan.tiling import Grid, IncompatiblePair, ScenePair, Window
from uknowpan.tiling.raster import (
    GDAL_CACHE_BYTES,
    Opener,
    Raster,
    RasterLike,
    Remarks,
    alpha_bands,
    holds_image,
    select_bands,
)
from uknowpan.tiling.window import crs_name, same_crs

log = logging.getLogger("uknowpan")

LEVELS = 10_000
"""Factor for floating-point values of a small range, because Q2n and D_lambda of Khan round to whole numbers."""

SAME_GRID = 0.01
"""Largest distance of the corners of two grids, in pixels, at which they count as one grid."""


def open_image(opener: Opener, file: RasterLike, nodata: float | None) -> Raster:
    """An image with all its bands but a mask."""
    data, path, _ = opener(file)
    masks = [band for band in alpha_bands(data) if not holds_image(data, band)]
    return select_bands(data, path, [band for band in data.indexes if band not in masks], nodata, Remarks())


def image_dtype(raster: Raster) -> np.dtype[Any]:
    return np.result_type(*map(np.dtype, raster.dtypes))


def read_image(raster: Raster, region: Region, down: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Values (C, h, w), float64, 0 where there is no data, and (h, w) True there."""
    values, data = raster.read(Window(region.row + down, region.col + right, region.height, region.width))
    mask = torch.from_numpy(~data)
    return torch.where(mask, 0.0, torch.from_numpy(values).to(torch.float64)), mask


def require_same_grid(raster: Raster, wanted: Grid, name: str) -> None:
    """Refuse rasters of different pixels: nothing is resampled before it is measured."""
    grid = raster.grid
    if grid.shape != wanted.shape:
        raise IncompatiblePair(
            f"{raster.path} has {grid.width} x {grid.height} pixels and {name} has {wanted.width} "
            f"x {wanted.height}; both must lie on one grid: gdalwarp -te -tr, or crop."
        )
    if not (grid.is_placed and wanted.is_placed):
        if grid.is_placed or wanted.is_placed:
            lost = name if grid.is_placed else raster.path
            log.warning("%s is not georeferenced; the other raster's place is assumed", lost)
        return
    if not same_crs(grid.crs, wanted.crs):
        raise IncompatiblePair(
            f"{raster.path} is in {crs_name(grid.crs)} and {name} in {crs_name(wanted.crs)}; "
            "both must lie on one grid: gdalwarp -t_srs."
        )
    to_wanted = ~wanted.transform @ grid.transform
    corners = [(0, 0), (grid.width, 0), (0, grid.height), (grid.width, grid.height)]
    off = max(abs(a - b) for corner in corners for a, b in zip(to_wanted * corner, corner, strict=True))
    if off > SAME_GRID:
        raise IncompatiblePair(
            f"{raster.path} lies up to {off:.2f} pixels off the grid of {name}; both must lie on "
            "one grid: gdalwarp -te -tr."
        )


def require_same_bands(raster: Raster, bands: int, name: str) -> None:
    if len(raster.bands) != bands:
        raise IncompatiblePair(
            f"{raster.path} has {len(raster.bands)} bands and {name} has {bands}; select those that "
            "belong together: gdal_translate -b."
        )


def cache_bytes(rasters: Sequence[Raster]) -> int:
    """Bytes of GDAL's cache with which a row of windows reads each strip of a raster once."""
    wanted = GDAL_CACHE_BYTES
    for data in (raster.dataset for raster in rasters):
        height, width = data.block_shapes[0]
        if width > COLS:
            wanted += (ROWS + 2 * height + 128) * data.width * sum(np.dtype(dtype).itemsize for dtype in data.dtypes)
    return wanted


def unit_of(is_float: bool, largest: float) -> float:
    """Factor to DN for values that whole numbers cannot hold, such as reflectances."""
    if not is_float or largest >= FEW_LEVELS:
        return 1.0
    log.warning(
        "values reach %.4g and are multiplied by %d, because Q2n and D_lambda round to whole "
        "numbers; the other indices stay as they are",
        *(largest, LEVELS),
    )
    return float(LEVELS)


@dataclass(frozen=True)
class Scene:
    """PAN and MS of a pair, read as `WithoutReference` takes them."""

    pair: ScenePair
    enlargement: Enlargement
    shape: tuple[int, int]
    """PAN pixels that are measured."""
    unit: float

    def window(self, region: Region) -> tuple[Tensor, Tensor, Coarse]:
        """PAN (1, h, w), its mask (h, w), and the enlarged MS and reduced PAN of a region."""
        r, (oy, ox), margin = self.pair.ratio, self.pair.offset, self.enlargement.margin
        row, col = (region.row + oy) // r, (region.col + ox) // r
        h = -(-(region.row + oy + region.height) // r) - row
        w = -(-(region.col + ox + region.width) // r) - col
        around = Region(row - margin, col - margin, h + 2 * margin, w + 2 * margin)
        if self.enlargement.circular:  # beyond the border of what is measured, as in the toolbox
            coarse = Coarse(*read_circular(self._coarse, around, (self.shape[0] // r, self.shape[1] // r)))
        else:
            coarse = self._coarse(around)
        low = self.enlargement(coarse)
        _, _, pan, pan_mask = self._read(Region(row, col, h, w))
        rows, cols = region.within(Region(row * r - oy, col * r - ox, h * r, w * r))
        return pan[..., rows, cols], pan_mask[rows, cols], Coarse(*(x[..., rows, cols] for x in low))

    def images(self, fused: Raster) -> Images:
        """Result, PAN and MS over the MS pixels that lie within the PAN."""
        pair, r = self.pair, self.pair.ratio
        first = [-(-offset // r) for offset in pair.offset]
        down, right = (n * r - offset for n, offset in zip(first, pair.offset, strict=True))
        shape = (pair.grid.height - down) // r, (pair.grid.width - right) // r

        def result(region: Region) -> tuple[Tensor, Tensor]:
            values, mask = read_image(fused, region, down, right)
            return values * self.unit, mask

        def ms(region: Region) -> tuple[Tensor, Tensor]:
            here = Region(region.row + first[0], region.col + first[1], region.height, region.width)
            values, mask, _, _ = self._read(here)
            return values, mask

        def pan(region: Region) -> tuple[Tensor, Tensor]:
            row, col = region.row // r, region.col // r
            h, w = -(-(region.row + region.height) // r) - row, -(-(region.col + region.width) // r) - col
            _, _, values, mask = self._read(Region(row + first[0], col + first[1], h, w))
            rows, cols = region.within(Region(row * r, col * r, h * r, w * r))
            return values[..., rows, cols], mask[rows, cols]

        return Images(shape, pair.bands, r, result, pan, ms)

    def _coarse(self, window: Region) -> Coarse:
        """MS and reduced PAN in a window of MS pixels."""
        ms, ms_mask, pan, pan_mask = self._read(window, REDUCE_MARGIN)
        ms, ms_mask = crop(ms, REDUCE_MARGIN), crop(ms_mask, REDUCE_MARGIN)
        return Coarse(ms, ms_mask, *reduce_pan(pan, pan_mask, self.pair.ratio))

    def _read(self, window: Region, margin: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """MS, its mask, PAN and its mask in a window of MS pixels; masks are True at nodata within the scene.

        Beyond the scene lies its reflection, whose nodata is that of the scene and counts once.
        """
        pair, r, (oy, ox) = self.pair, self.pair.ratio, self.pair.offset
        tile = pair.read_frame(window.row, window.col, window.height, window.width, margin)
        top, left = window.row - margin, window.col - margin
        h, w = tile.ms_valid.shape
        in_ms = _inside(top, h, 0, pair.frame_shape[0])[:, None] & _inside(left, w, 0, pair.frame_shape[1])
        in_pan = _inside(top * r, h * r, oy, oy + pair.grid.height)[:, None]
        in_pan = in_pan & _inside(left * r, w * r, ox, ox + pair.grid.width)
        ms, pan = (torch.from_numpy(x).to(torch.float64) * self.unit for x in (tile.ms, tile.pan))
        ms_mask, pan_mask = ~tile.ms_valid & in_ms, ~tile.pan_valid & in_pan
        return ms, torch.from_numpy(ms_mask), pan, torch.from_numpy(pan_mask)


def _inside(start: int, count: int, low: int, high: int) -> npt.NDArray[np.bool_]:
    index = np.arange(start, start + count)
    inside: npt.NDArray[np.bool_] = (index >= low) & (index < high)
    return inside
