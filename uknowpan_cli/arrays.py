"""`uknowpan.sharpen_array`: arrays take the same road as files, through GDAL's memory."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.io import MemoryFile

from uknowpan.api import loader, options_from, python_warnings
from uknowpan.errors import InputError
from uknowpan.options import MODEL, TILING, declared
from uknowpan.scenes import Scene, prepared
from uknowpan.sharpening import sharpen_strips, with_back_off
from uknowpan.tiling import Encoding, encode
from uknowpan.tiling.placing import MAX_RATIO
from uknowpan.tiling.raster import bounded_gdal_cache, usable_nodata

Array = npt.NDArray[Any]

ALLOWED = [
    *(name for name, (_, option) in declared().items() if option.group in (MODEL, TILING)),
    *("softness", "consistency", "coverage", "max_value", "bit_depth", "coregister", "resampling"),
]
"""Options that mean something without files."""


@dataclass(frozen=True)
class ArrayRaster:
    """An array of any kind as numpy, with which of its pixels are invalid."""

    given: Any
    values: Array
    """(C, H, W) in its own dtype."""
    invalid: npt.NDArray[np.bool_]
    """(C, H, W)."""


def sharpen_array(
    pan: Any, ms: Any, *, model: Any = None, nodata: float | None = None, uncertainty: bool = False, **options: Any
) -> Any:
    """Sharpen arrays that show the same area.

    Args:
        pan: (H, W) or (1, H, W), H = ratio * h: a numpy array of any dtype, a torch tensor or an
            xarray DataArray.
        ms: (C, h, w), of the same kinds.
        model: name of a bundled model, a checkpoint file, or the result of `load`.
        nodata: value of invalid pixels; NaN, infinities and masked pixels are always invalid.
        uncertainty: return 1-sigma per band too, or the half-width of another `coverage`.
        **options: fields of `uknowpan.options.SharpenOptions` that do not concern files.

    Returns:
        (C, H, W), of the MS's kind and dtype. Invalid pixels are `nodata`, else NaN; whole numbers
        without a nodata become a masked array where a pixel is invalid. With `uncertainty`, that
        and a float32 array of 1-sigma, NaN where invalid.

    Raises:
        Error: a subclass with one sentence.
    """
    load_model, name = loader(model, options)
    wanted = options_from({"model": name, **options}, ALLOWED)
    pan_raster, ms_raster = array_raster(pan, "PAN", nodata), array_raster(ms, "MS", nodata)
    ratio = _ratio(pan_raster.values.shape, ms_raster.values.shape)
    wanted = replace(wanted, ratio=ratio, uncertainty="sigma" if uncertainty else None)
    steps = ((pan_raster, 1), (ms_raster, ratio))
    with python_warnings(), ExitStack() as stack:
        names = [stack.enter_context(in_memory(r, Affine.scale(step, -step))) for r, step in steps]
        scene = stack.enter_context(
            prepared(names[0], names[1:], "", wanted, lambda: load_model(wanted), in_memory=True)
        )  # fmt: skip
        layers, valid = with_back_off(scene, lambda smaller, first: _sharpened(smaller))
    result = _as_given(layers["image"], valid, ms_raster, pan_raster, nodata)
    if not uncertainty:
        return result
    sigma = np.where(valid, layers["uncertainty"], np.float32(np.nan))
    return result, _wrapped(sigma, ms_raster.given, pan_raster.given, None)


def _sharpened(scene: Scene) -> tuple[dict[str, Array], Array]:
    """Layer -> (C, H, W) float32, and (H, W) valid."""
    pair = scene.pair
    shape = pair.grid.shape
    layers = {name: np.empty((pair.bands, *shape), np.float32) for name in scene.layers}
    valid = np.zeros(shape, np.bool_)

    def keep(index: int, top: int, left: int, strip: dict[str, Array], good: Array) -> None:
        place = slice(top, top + len(good)), slice(left, left + good.shape[1])
        valid[place] = good
        for name, values in strip.items():
            layers[name][:, *place] = values

    with bounded_gdal_cache(scene.bytes_across):
        sharpen_strips(scene, set(range(len(scene.plan.strips))), keep)
    return layers, valid


def array_raster(given: Any, name: str, nodata: float | None) -> ArrayRaster:
    """An array of any kind with its invalid pixels; `name` is for errors, and "PAN" may be (H, W)."""
    if nodata is not None and not isinstance(nodata, Real):
        raise InputError(f"nodata is a number, not {nodata!r}.")
    array = _to_numpy(given, name)
    if array.ndim == 2 and name == "PAN":
        array = array[None]
    if array.ndim != 3 or 0 in array.shape:
        wanted = "(H, W) or (1, H, W)" if name == "PAN" else "(bands, h, w)"
        raise InputError(f"The {name} must have the shape {wanted}, not {tuple(array.shape)}.")
    if name == "PAN" and len(array) != 1:
        raise InputError(f"The PAN has {len(array)} bands, not one; check that PAN and MS are not swapped.")
    invalid = np.zeros(array.shape, np.bool_) | np.ma.getmaskarray(array)
    values = np.asarray(array)
    if values.dtype.kind not in "iuf":
        raise InputError(f"The {name} holds {values.dtype}, not real numbers.")
    if values.dtype.kind == "f":
        invalid |= ~np.isfinite(values)
    if nodata is not None:
        if name != "PAN" and usable_nodata(nodata, values.dtype.name) is None:
            raise InputError(f"Nodata {nodata:g} does not fit into {values.dtype}; choose another value.")
        near = 2 * np.finfo(values.dtype).eps * abs(nodata) if values.dtype.kind == "f" else 0
        with np.errstate(invalid="ignore", over="ignore"):
            invalid |= (values == nodata) | (np.abs(values - values.dtype.type(nodata)) <= near if near else False)
    return ArrayRaster(given, values, invalid)


def _to_numpy(given: Any, name: str) -> Array:
    torch, xarray = sys.modules.get("torch"), sys.modules.get("xarray")
    if torch is not None and isinstance(given, torch.Tensor):
        tensor = given.detach().cpu()
        return np.asarray(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)
    if xarray is not None and isinstance(given, xarray.DataArray):
        return np.asarray(given.values)
    if not isinstance(given, np.ndarray):
        raise InputError(f"The {name} is a numpy array, a torch tensor or a DataArray, not {type(given).__name__}.")
    return given


def _ratio(pan: tuple[int, ...], ms: tuple[int, ...]) -> int:
    (height, width), (h, w) = pan[-2:], ms[-2:]
    ratio = height // h
    if (h * ratio, w * ratio) != (height, width) or not 1 <= ratio <= MAX_RATIO:
        raise InputError(
            f"The PAN's {height} x {width} pixels are no whole multiple, 1 to {MAX_RATIO}, of the MS's {h} x {w}; "
            "cut both to the same area."
        )
    return ratio


@contextmanager
def in_memory(
    raster: ArrayRaster, transform: Affine, crs: Any = "EPSG:3857", *, whole_numbers: bool = False
) -> Iterator[str]:
    """The name of a GeoTIFF in memory: float32, NaN where invalid.

    With `whole_numbers` integers without invalid pixels keep their dtype.
    """
    if whole_numbers and raster.values.dtype.kind in "iu" and not raster.invalid.any():
        values = raster.values.astype(raster.values.dtype.newbyteorder("="))
    else:
        with np.errstate(over="ignore"):
            values = raster.values.astype(np.float32)
        values[raster.invalid] = np.nan
    bands, height, width = values.shape
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with memory.open(
            driver="GTiff", count=bands, height=height, width=width, dtype=values.dtype.name, crs=crs,
            transform=transform, tiled=True, blockxsize=512, blockysize=512,
            bigtiff="IF_SAFER", photometric="MINISBLACK",
        ) as dataset:  # fmt: skip
            dataset.write(values)
        yield memory.name


def _as_given(image: Array, valid: Array, ms: ArrayRaster, pan: ArrayRaster, nodata: float | None) -> Any:
    """The result in the dtype of the MS, its invalid pixels marked."""
    dtype = ms.values.dtype
    whole = dtype.kind in "iu"
    fill = nodata if nodata is not None else (None if whole else float("nan"))
    info = np.iinfo(dtype) if whole else None
    low, high = (-np.inf, np.inf) if info is None else (float(info.min), float(info.max))
    native = dtype.newbyteorder("=")
    encoded = encode(image, valid, Encoding(native.name, fill, low, high)).astype(dtype, copy=False)
    masked = whole and nodata is None and (not valid.all() or isinstance(ms.given, np.ma.MaskedArray))
    return _wrapped(encoded, ms.given, pan.given, np.broadcast_to(~valid, encoded.shape) if masked else None)


def _wrapped(values: Array, ms: Any, pan: Any, mask: Array | None) -> Any:
    """The values as the kind of array that the MS is."""
    torch, xarray = sys.modules.get("torch"), sys.modules.get("xarray")
    if isinstance(ms, np.ndarray):
        return values if mask is None else np.ma.MaskedArray(values, mask)
    if mask is not None:
        raise InputError("Some pixels are invalid and whole numbers have no mask here; give nodata.")
    if torch is not None and isinstance(ms, torch.Tensor):
        dtype = ms.dtype if values.dtype != np.float32 or ms.dtype == torch.bfloat16 else torch.float32
        return torch.from_numpy(np.ascontiguousarray(values)).to(ms.device, dtype)
    assert xarray is not None
    grid = pan if isinstance(pan, xarray.DataArray) else None
    dims = (ms.dims[0], *(ms.dims[1:] if grid is None else grid.dims[-2:]))
    coords = {name: c for name, c in ms.coords.items() if c.dims in ((), (ms.dims[0],))}
    if grid is not None:
        coords |= {name: c for name, c in grid.coords.items() if set(c.dims) <= set(grid.dims[-2:])}
    if ms.dims[0] in ms.coords:
        coords[ms.dims[0]] = ms.coords[ms.dims[0]]
    return xarray.DataArray(values, dims=dims, coords=coords, name=ms.name, attrs=ms.attrs)
