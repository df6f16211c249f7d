"""Longitudes: bounds that meet after whole turns, and rasters around the globe, whose edge cuts nothing."""

from contextlib import ExitStack
from dataclasses import replace
from xml.sax.saxutils import escape

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import transform_bounds

from uknowpan.tiling.raster import GDAL_ERRORS, Raster, open_raster, openable
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

    def sources(band: int | str) -> str:
        return "".join(
            f'<SimpleSource><SourceFilename relativeToVRT="0">{escape(path)}</SourceFilename>'
            f'<SourceBand>{band}</SourceBand><SrcRect xOff="{start}" yOff="0" xSize="{size}" ySize="{data.height}"/>'
            f'<DstRect xOff="{to}" yOff="0" xSize="{size}" ySize="{data.height}"/></SimpleSource>'
            for start, to, size in ((split, 0, turn - split), (0, turn - split, split))
            if size
        )

    bands = ""
    for band, dtype in zip(data.indexes, data.dtypes, strict=True):
        used = band in ms.bands or band == ms.alpha
        kind = np.dtype(dtype if used else "uint8")
        name = {"u": "UInt", "i": "Int", "f": "Float"}[kind.kind] + str(8 * kind.itemsize)
        name = "Byte" if name == "UInt8" else name
        bands += f'<VRTRasterBand dataType="{name}" band="{band}">{sources(band) if used else ""}</VRTRasterBand>'
    if ms.mask:
        bands += f'<MaskBand><VRTRasterBand dataType="Byte">{sources(f"mask,{ms.bands[0]}")}</VRTRasterBand></MaskBand>'
    place = ", ".join(repr(v) for v in (data.transform * Affine.translation(first, 0)).to_gdal())
    return (
        f'<VRTDataset rasterXSize="{turn}" rasterYSize="{data.height}"><SRS>{escape(data.crs.to_wkt())}</SRS>'
        f"<GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>"
    )
