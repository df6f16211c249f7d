"""Longitudes: bounds that meet after whole turns, and rasters around the globe, whose edge cuts nothing."""

from contextlib import ExitStack
from dataclasses import replace

from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import transform_bounds

from uknowpan.tiling.raster import GDAL_ERRORS, Raster, open_raster, openable
from uknowpan.tiling.vrt import mask_of, source, type_name, virtual
from uknowpan.tiling.window import Grid, same_crs

Bounds = tuple[float, float, float, float]
"""(left, bottom, right, top) in the units of a CRS"""
_CLOSED = 0.1
"""Pixels by which 360 degrees may differ from a whole number of them; headers hold rounded text."""


def beside(bounds: Bounds, crs: CRS | None, other: Bounds) -> Bounds:
    """Bounds in degrees turned by 360 to where `other` lies, west below east; bounds in other units as they are."""
    if crs is None or not crs.is_geographic:
        return bounds
    west, south, east, north = bounds
    if east < west:
        east += 360
    turn = 360 * round(((other[0] + other[2]) - (west + east)) / 720)
    return west + turn, south, east + turn, north


def cut_opposite(closing: ExitStack, pan: Grid, ms: Raster) -> Raster:
    """The MS; one around the globe whose edge would cut the PAN is cut open on the other side of the globe instead."""
    data, place = ms.dataset, ms.dataset.transform
    if data.crs is None or pan.crs is None or not data.crs.is_geographic or place.b or place.d or place.a <= 0:
        return ms
    turn = round(360 / place.a)
    if abs(turn * place.a - 360) > _CLOSED * place.a or data.width < turn:
        return ms
    try:
        bounds = pan.bounds if same_crs(pan.crs, data.crs) else transform_bounds(pan.crs, data.crs, *pan.bounds)
    except GDAL_ERRORS:
        return ms  # refused later, with numbers
    west, _, east, _ = beside(bounds, data.crs, data.bounds)
    if data.bounds.left <= west and east <= data.bounds.right:
        return ms
    first = round(((west + east) / 2 - 180 - data.bounds.left) / place.a)
    view = _turned(openable(closing, ms), ms, first, turn)
    return replace(ms, dataset=closing.enter_context(open_raster(view)))


def _turned(path: str, ms: Raster, first: int, turn: int) -> str:
    """A VRT of `turn` columns from column `first` on, counted around the globe; bands keep their numbers."""
    data, split = ms.dataset, first % turn
    height = data.height

    def sources(band: int | str) -> str:
        parts = ((split, turn - split, 0), (0, split, turn - split))
        return "".join(source(path, band, (start, 0, size, height), to, 0) for start, size, to in parts if size)

    bands = ""
    for band, dtype in zip(data.indexes, data.dtypes, strict=True):
        used = band in ms.bands or band in ms.alpha
        kind = type_name(dtype if used else "uint8")
        content = (sources(band) if used else "") + (mask_of(sources(f"mask,{band}")) if used and ms.masks else "")
        bands += f'<VRTRasterBand dataType="{kind}" band="{band}">{content}</VRTRasterBand>'
    return virtual(turn, height, data.crs, data.transform @ Affine.translation(first, 0), bands)
