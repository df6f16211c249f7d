"""Pairs in sensor geometry: the RPCs of PAN and MS, and the ground between them, place the MS on the PAN.

A point of the PAN is taken to the ground by the PAN's RPCs, and from there into the MS by those of the MS.
"""

import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from html import escape
from typing import TypeAlias

import numpy as np
from affine import Affine
from rasterio.enums import Resampling
from rasterio.errors import TransformWarning
from rasterio.transform import RPCTransformer

from uknowpan.tiling.errors import IncompatiblePair
from uknowpan.tiling.fill import DoubleArray
from uknowpan.tiling.raster import GDAL_ERRORS, Raster, as_floats, marked, open_raster, openable
from uknowpan.tiling.window import Grid

Points: TypeAlias = tuple[tuple[float, float, float, float], ...]
"""(column, row) in the MS and (column, row) in the PAN of points on the ground"""

_SIDE, _SIDE_ON_DEM = 5, 11
"""Points along each side of the PAN: RPCs are smooth, terrain is less so. Each adds 0.06 us to an MS pixel of a spline.
"""
_LEFT = 0.05
"""MS pixels that an affine map, or else a cubic one, may leave; beyond it a spline goes through all points."""
_MOST_LEFT = 0.02
"""Part of the MS that an affine map leaves at most where the RPCs of PAN and MS are good."""
_SOLVED = "1e-4"
"""Pixels to which GDAL inverts RPCs."""


@dataclass(frozen=True)
class Surface:
    """The ground that PAN and MS show, in metres above the ellipsoid."""

    height: float | None = None
    """One height everywhere; None: the offset in the PAN's RPCs."""
    dem: str | None = None
    """Instead, a raster of heights in its own CRS."""

    def at(self, pan: Raster) -> float:
        """The height everywhere; 0 where a DEM has the heights."""
        if self.dem is not None:
            return 0.0
        return float(pan.grid.rpcs.height_off) if self.height is None and pan.grid.rpcs else float(self.height or 0)


AT_OFFSET = Surface()
"""The height that the RPCs of the PAN name."""


@dataclass(frozen=True)
class SensorMap:
    """The way between MS and PAN, in pixels."""

    points: Points
    affine: Affine
    """MS (column, row) -> PAN (column, row), fitted to the points"""
    left: float
    """MS pixels that it leaves at most"""
    order: int
    """of the polynomial that follows the points: 1 or 3; 0: only a spline does"""


def map_by_rpcs(pan: Raster, ms: Raster, surface: Surface) -> SensorMap:
    """The map between two rasters with RPCs.

    Raises:
        InputUnreadable: the DEM cannot be opened.
        IncompatiblePair: the RPCs cannot be solved, or the DEM has no height under a part of the PAN.
    """
    side = _SIDE if surface.dem is None else _SIDE_ON_DEM
    (height, width), level = pan.grid.shape, surface.at(pan)
    rows, cols = (v.ravel() for v in np.mgrid[0 : height : side * 1j, 0 : width : side * 1j])
    if surface.dem is not None:
        _check_dem(surface.dem)
    there, back = _through(pan, ms, rows, cols, surface.dem, level)
    if surface.dem is not None and not np.isfinite(there).all():
        without = _through(pan, ms, rows, cols, None, AT_OFFSET.at(pan))[0]
        raise _no_height(surface.dem, pan) if np.isfinite(without).all() else _strange(pan, ms)
    if not np.isfinite(there).all() or np.abs(back - [rows, cols]).max() > 1:
        raise _strange(pan, ms)
    fit, left = _polynomial(cols, rows, there, 1)
    straight = Affine(*fit[[2, 1, 0]].T[::-1].ravel())
    if left > _MOST_LEFT * max(ms.grid.shape) or straight.is_degenerate:
        raise _strange(pan, ms)
    order = 1 if left < _LEFT else 3 if _polynomial(cols / width, rows / height, there, 3)[1] < _LEFT else 0
    points = tuple(zip(*(v.tolist() for v in (there[1], there[0], cols, rows)), strict=True))
    return SensorMap(points, ~straight, left, order)


def _polynomial(x: DoubleArray, y: DoubleArray, z: DoubleArray, order: int) -> tuple[DoubleArray, float]:
    """Coefficients (T, K) of the terms x^i y^j, i + j <= order, fitted to z (K, N), and the largest residual."""
    terms = np.stack([x**i * y**j for i in range(order + 1) for j in range(order + 1 - i)], axis=1)
    fit: DoubleArray = np.linalg.lstsq(terms, z.T, rcond=None)[0].astype(np.float64)
    return fit, float(np.abs(terms @ fit - z.T).max())


def _no_height(dem: str, pan: Raster) -> IncompatiblePair:
    return IncompatiblePair(f"{dem} has no height under a part of {pan.path}; take one without gaps, or give --height.")


def _strange(pan: Raster, ms: Raster) -> IncompatiblePair:
    return IncompatiblePair(
        f"The RPCs of {pan.path} and {ms.path} do not fit these images or each other; "
        "fetch both anew, or orthorectify both first: gdalwarp -rpc IN OUT."
    )


def _check_dem(path: str) -> None:
    with open_raster(path) as dem:
        if dem.crs is None or dem.transform.is_identity:
            raise IncompatiblePair(f"{path} is no map of heights: it has no CRS or no geotransform.")


def _through(
    pan: Raster, ms: Raster, rows: DoubleArray, cols: DoubleArray, dem: str | None, level: float
) -> tuple[DoubleArray, DoubleArray]:
    """(2, N) rows and columns, in the MS and again in the PAN, of what the PAN shows there; inf: not solved."""
    options = {"rpc_pixel_error_threshold": _SOLVED} | ({} if dem is None else {"rpc_dem": dem})
    levels = np.full(rows.size, level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TransformWarning)  # those points are inf
        try:
            with RPCTransformer(pan.grid.rpcs, **options) as one, RPCTransformer(ms.grid.rpcs, **options) as other:
                lon, lat = one.xy(rows, cols, levels, offset="ul")
                there, back = (np.stack(it.rowcol(lon, lat, levels, op=np.positive)) for it in (other, one))
                return there, back
        except GDAL_ERRORS:
            return np.full((2, rows.size), np.inf), np.full((2, rows.size), np.inf)


def curved(
    closing: ExitStack, raster: Raster, grid: Grid, way: SensorMap, scale: tuple[float, float], resampling: Resampling
) -> Raster:
    """The raster on a grid in pixels of the PAN, as `raster.warped` gives it; invalid pixels are NaN.

    scale: pixels of the grid per pixel of the raster (y, x).
    """
    source = closing.enter_context(marked(raster, openable(closing, raster)))
    points = "".join(
        f'<GCP Id="{i}" Pixel="{col!r}" Line="{row!r}" X="{x!r}" Y="{y!r}"/>'
        for i, (col, row, x, y) in enumerate(way.points)
    )
    kind, order = ("GCP", f"<Order>{way.order}</Order>") if way.order else ("TPS", "")
    algorithm = "NearestNeighbour" if resampling.name == "nearest" else resampling.name.title().replace("_", "")
    places = (", ".join(map(repr, place.to_gdal())) for place in (grid.transform, ~grid.transform))
    numbers = range(1, len(raster.bands) + 1)
    nan = "<{0}NoDataReal>nan</{0}NoDataReal><{0}NoDataImag>0</{0}NoDataImag>"
    view = (
        f'<VRTDataset rasterXSize="{grid.width}" rasterYSize="{grid.height}" subClass="VRTWarpedDataset">'
        + "".join(
            f'<VRTRasterBand dataType="Float32" band="{n}" subClass="VRTWarpedRasterBand">'
            "<NoDataValue>nan</NoDataValue></VRTRasterBand>"
            for n in numbers
        )
        + f"<GDALWarpOptions><ResampleAlg>{algorithm}</ResampleAlg><WorkingDataType>Float32</WorkingDataType>"
        '<Option name="INIT_DEST">NO_DATA</Option><Option name="UNIFIED_SRC_NODATA">YES</Option>'
        f'<Option name="YSCALE">{scale[0]!r}</Option><Option name="XSCALE">{scale[1]!r}</Option>'
        f'<SourceDataset relativeToVRT="0">{escape(source.name)}</SourceDataset><Transformer><GenImgProjTransformer>'
        f"<Src{kind}Transformer><{kind}Transformer>{order}<Reversed>0</Reversed><GCPList>{points}</GCPList>"
        f"</{kind}Transformer></Src{kind}Transformer>"
        "<DstGeoTransform>{}</DstGeoTransform><DstInvGeoTransform>{}</DstInvGeoTransform>".format(*places)
        + "</GenImgProjTransformer></Transformer><BandList>"
        + "".join(
            f'<BandMapping src="{n}" dst="{n}">{nan.format("Src")}{nan.format("Dst")}</BandMapping>' for n in numbers
        )
        + "</BandList></GDALWarpOptions></VRTDataset>"
    )
    return as_floats(raster, closing.enter_context(open_raster(view)), tuple(numbers))
