"""GDAL's virtual rasters: XML that GDAL opens in place of a file name, and that is never written to one."""

from html import escape

from affine import Affine
from rasterio.crs import CRS
from rasterio.dtypes import dtype_rev, typename_fwd

Rectangle = tuple[int, int, int, int]
"""(column, row, width, height)"""


def virtual(width: int, height: int, crs: CRS | None, transform: Affine, content: str) -> str:
    """A raster of bands, masks and metadata; the identity as transform places nothing."""
    placed = f"<SRS>{escape(crs.to_wkt())}</SRS>" if crs else ""
    if not transform.is_identity:
        placed += f"<GeoTransform>{', '.join(repr(value) for value in transform.to_gdal())}</GeoTransform>"
    return f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">{placed}{content}</VRTDataset>'


def source(path: str, band: int | str, read: Rectangle, col: int, row: int) -> str:
    """A rectangle of a file's band, placed at (col, row); the band may be `mask,1`."""
    size = f'xSize="{read[2]}" ySize="{read[3]}"'
    return (
        f'<SimpleSource><SourceFilename relativeToVRT="0">{escape(path)}</SourceFilename><SourceBand>{band}'
        f'</SourceBand><SrcRect xOff="{read[0]}" yOff="{read[1]}" {size}/><DstRect xOff="{col}" yOff="{row}" {size}/>'
        "</SimpleSource>"
    )


def mask_of(sources: str) -> str:
    """The mask of all bands, or inside of a band its own."""
    return f'<MaskBand><VRTRasterBand dataType="Byte">{sources}</VRTRasterBand></MaskBand>'


def type_name(dtype: str) -> str:
    """GDAL's name of a NumPy type."""
    return str(typename_fwd[dtype_rev[dtype]])
