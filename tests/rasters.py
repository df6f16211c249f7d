"""Tiny georeferenced rasters for tests; `conftest.make_pair` puts them together."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.warp import transform as transform_points

from uknowpan.tiling import Grid, MsMeta

UTM = "EPSG:32631"
ORIGIN = (500_000.0, 5_000_000.0)


@dataclass(frozen=True)
class RasterPair:
    """Paths of a written pair and the values in it."""

    pan: str
    ms: list[str]
    pan_values: np.ndarray
    """(H, W)"""
    ms_values: np.ndarray
    """(C, h, w)"""
    ratio: int


def ground(x: np.ndarray, y: np.ndarray, res: float) -> np.ndarray:
    """A smooth landscape as a function of map position, so that a misplaced pixel shows."""
    u, v = (x - ORIGIN[0]) / res, (y - ORIGIN[1]) / res
    return 1000 + 300 * np.sin(u / 9) + 200 * np.cos(v / 11) + u


def gain(band: int) -> float:
    return 1 + 0.25 * band


def centres(transform: Affine, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.mgrid[: shape[0], : shape[1]] + 0.5
    return (
        transform.a * cols + transform.b * rows + transform.c,
        transform.d * cols + transform.e * rows + transform.f,
    )


def write_raster(
    path: Path,
    values: np.ndarray,
    transform: Affine | None,
    *,
    crs: str | None = UTM,
    nodata: float | None = None,
    descriptions: Sequence[str] | None = None,
    colorinterp: Sequence[ColorInterp] | None = None,
    mask: np.ndarray | None = None,
    tags: dict[str, str] | None = None,
    **creation: object,
) -> str:
    """Write (C, H, W) values as a GeoTIFF and return its path."""
    place = (
        {"transform": transform, "crs": crs} if transform is not None else {"crs": crs} if "gcps" in creation else {}
    )
    count, height, width = values.shape
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width,
            dtype=values.dtype, nodata=nodata, **place, **creation,
        ) as dataset,
    ):  # fmt: skip
        if descriptions:
            dataset.descriptions = descriptions
        if colorinterp:  # before the pixels: a GeoTIFF fixes its extra samples then
            dataset.colorinterp = colorinterp
        dataset.write(values)
        if mask is not None:
            dataset.write_mask(mask)
        if tags:
            dataset.update_tags(**tags)
    return str(path)


def reproject_transform(transform: Affine, crs: str | None, to: str, res: float) -> Affine:
    """A north-up grid in another CRS with the same corner, pixels about as large."""
    step = 100 * res
    xs, ys = transform_points(crs, to, [transform.c, transform.c + step], [transform.f, transform.f])
    size = np.hypot(xs[1] - xs[0], ys[1] - ys[0]) / 100
    return Affine.translation(xs[0], ys[0]) * Affine.scale(size, -size)


def plain_grid(height: int = 70, width: int = 50, **changes: str) -> Grid:
    return Grid(CRS.from_epsg(32631), Affine(0.5, 0, ORIGIN[0], 0, -0.5, ORIGIN[1]), width, height, **changes)


def plain_meta(bands: int = 4, dtype: str = "uint16", nodata: float | None = None, **changes: object) -> MsMeta:
    """Metadata of an MS that declares nothing but what is given."""
    none, grey = (None,) * bands, (ColorInterp.gray,) + (ColorInterp.undefined,) * (bands - 1)
    values = {"descriptions": none, "colorinterp": grey, "scales": (1.0,) * bands, "offsets": (0.0,) * bands,
              "units": none, "band_tags": ({},) * bands, "tags": {}, "nbits": None}  # fmt: skip
    return MsMeta(dtype=dtype, nodata=nodata, **{**values, **changes})
