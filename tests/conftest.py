"""Fixtures shared by all tests."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.warp import transform as transform_points
from rasters import (
    ORIGIN,
    UTM,
    RasterPair,
    centres,
    gain,
    ground,
    reproject_transform,
    write_raster,
)

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
        ms_transform = pan_transform * Affine.translation(offset[1], offset[0]) * Affine.scale(ratio)
        if ms_crs:
            ms_transform = reproject_transform(ms_transform, crs, ms_crs, res * ratio)
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
        pan_path = write_raster(tmp_path / f"{name}_pan.tif", pan_values[None], pan_place, crs=crs, nodata=pan_nodata)
        common = {"crs": ms_crs or crs, "nodata": nodata, "tags": tags, **creation}
        if separate:
            paths = [
                write_raster(tmp_path / f"{name}_ms{b + 1}.tif", ms_values[b : b + 1], ms_place, **common)
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


@pytest.fixture(autouse=True)
def _denormals_again():
    """Sharpening and training flush denormals for the whole process; other tests want them."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)
