"""Fixtures shared by all tests: tiny georeferenced PAN/MS pairs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.warp import transform as transform_points

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
    place = {} if transform is None else {"transform": transform, "crs": crs}
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


PairFactory = Callable[..., RasterPair]


@pytest.fixture
def make_pair(tmp_path: Path) -> PairFactory:
    """Factory of tiny pairs, see `_make` for the options."""

    def _make(
        *,
        name: str = "scene",
        ratio: float = 4,
        ms_shape: tuple[int, int] = (24, 20),
        pan_shape: tuple[int, int] | None = None,
        bands: int = 4,
        dtype: str = "uint16",
        pan_dtype: str | None = None,
        nodata: float | None = None,
        pan_nodata: float | None = None,
        holes: np.ndarray | None = None,
        pan_holes: np.ndarray | None = None,
        mask: str | None = None,
        offset: tuple[float, float] = (0, 0),
        res: float = 0.5,
        crs: str | None = UTM,
        ms_crs: str | None = None,
        rotation: float = 0,
        georeferenced: tuple[bool, bool] = (True, True),
        separate: bool = False,
        descriptions: Sequence[str] | None = None,
        colorinterp: Sequence[ColorInterp] | None = None,
        tags: dict[str, str] | None = None,
        noise: float = 0,
        **creation: object,
    ) -> RasterPair:
        """Write NAME_pan.tif and NAME_ms.tif (or NAME_ms1.tif ... if separate).

        offset: PAN pixels (dy, dx) from the PAN's corner to the MS's. holes: (h, w) bool, set to
        nodata, or with mask="mask"|"alpha" marked there. georeferenced: (PAN, MS).
        """
        kind, pan_kind = np.dtype(dtype), np.dtype(pan_dtype or dtype)
        if pan_shape is None:
            pan_shape = (round(ms_shape[0] * ratio), round(ms_shape[1] * ratio))
        corner = Affine.translation(*ORIGIN) * Affine.rotation(rotation)
        pan_transform = corner * Affine.scale(res, -res)
        ms_transform = (
            pan_transform * Affine.translation(offset[1], offset[0]) * Affine.scale(ratio)
        )
        if ms_crs:
            ms_transform = _reproject_transform(ms_transform, crs, ms_crs, res * ratio)
        rng = np.random.default_rng(0)

        def sample(transform: Affine, shape: tuple[int, int], own_crs: str | None) -> np.ndarray:
            x, y = centres(transform, shape)
            if own_crs != crs:
                xs, ys = transform_points(own_crs, crs, x.ravel(), y.ravel())
                x, y = np.reshape(xs, shape), np.reshape(ys, shape)
            return ground(x, y, res) + noise * rng.normal(size=shape)

        def typed(values: np.ndarray, to: np.dtype) -> np.ndarray:
            if to.itemsize == 1:
                values = values / 16
            return (np.rint(values) if to.kind in "iu" else values).astype(to)

        pan_values = typed(sample(pan_transform, pan_shape, crs), pan_kind)
        level = sample(ms_transform, ms_shape, ms_crs or crs)
        ms_values = np.stack([typed(gain(b) * level, kind) for b in range(bands)])
        if pan_holes is not None:
            pan_values[pan_holes] = pan_nodata
        flags = None
        if holes is not None and mask:
            flags = np.where(holes, 0, 255).astype("uint8")
        elif holes is not None:
            ms_values[:, holes] = nodata

        pan_place = pan_transform if georeferenced[0] else None
        ms_place = ms_transform if georeferenced[1] else None
        pan_path = write_raster(
            tmp_path / f"{name}_pan.tif", pan_values[None], pan_place, crs=crs, nodata=pan_nodata
        )
        common = {"crs": ms_crs or crs, "nodata": nodata, "tags": tags, **creation}
        if separate:
            paths = [
                write_raster(
                    tmp_path / f"{name}_ms{b + 1}.tif", ms_values[b : b + 1], ms_place, **common
                )
                for b in range(bands)
            ]
        else:
            stack = ms_values
            if mask == "alpha":
                top = np.iinfo(kind).max if kind.kind in "iu" else 255
                alpha = (flags if flags is not None else np.full(ms_shape, 255)) > 0
                stack = np.concatenate([ms_values, (alpha * top)[None].astype(kind)])
                colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (bands - 1)
                colorinterp = [*colorinterp, ColorInterp.alpha]
            paths = [
                write_raster(
                    tmp_path / f"{name}_ms.tif",
                    stack,
                    ms_place,
                    descriptions=descriptions,
                    colorinterp=colorinterp,
                    mask=flags if mask == "mask" else None,
                    **common,
                )
            ]
        return RasterPair(pan_path, paths, pan_values, ms_values, round(ratio))

    return _make


def _reproject_transform(transform: Affine, crs: str | None, to: str, res: float) -> Affine:
    """A north-up grid in another CRS with the same corner, pixels about as large."""
    step = 100 * res
    xs, ys = transform_points(
        crs, to, [transform.c, transform.c + step], [transform.f, transform.f]
    )
    size = np.hypot(xs[1] - xs[0], ys[1] - ys[0]) / 100
    return Affine.translation(xs[0], ys[0]) * Affine.scale(size, -size)
