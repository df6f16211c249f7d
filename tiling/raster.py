"""One raster seen on a pixel grid: opening, validity, reflection at its edges, warping."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from uknowpan.tiling.errors import IncompatiblePair, InputUnreadable
from uknowpan.tiling.fill import BoolArray, FloatArray, reflected_indices

GDAL_ERRORS = (RasterioError, CPLE_BaseError, OSError)
"""What rasterio raises when GDAL fails; some calls let its own classes through."""

# GDAL wants some CRS to warp; where neither file has one, both are put into this one.
_ANY_CRS = CRS.from_epsg(3857)
# Exact transformation (GDAL refuses 0): an approximated one depends on the window asked for.
_EXACT = 1e-9


def open_raster(path: str) -> rasterio.DatasetReader:
    """Open a raster, or say in one sentence why not."""
    try:
        with warnings.catch_warnings():
            # Judged, with a sentence of our own, when the pair is placed.
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(path)
    except GDAL_ERRORS as error:
        raise InputUnreadable(f"{path} cannot be opened as a raster: {reason(error)}.") from error
    if dataset.count == 0:
        parts = list(dataset.subdatasets)
        dataset.close()
        hint = f"; name one of its subdatasets, e.g. {parts[0]}" if parts else ""
        raise InputUnreadable(f"{path} has no raster bands of its own{hint}.")
    return dataset


def reason(error: BaseException) -> str:
    """What GDAL said, without its line breaks and full stop."""
    text = str(error.__cause__ or error).replace("\n", " ").strip()
    return text.rstrip(".") or type(error).__name__


def alpha_bands(dataset: rasterio.DatasetReader) -> list[int]:
    """1-based numbers of the bands marked alpha (never all of them)."""
    alpha = [i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c == ColorInterp.alpha]
    return alpha if len(alpha) < dataset.count else []


def holds_image(dataset: rasterio.DatasetReader, band: int) -> bool:
    """Whether a band marked alpha is no mask: most values are neither 0 nor full."""
    kind = np.dtype(dataset.dtypes[band - 1])
    full = [1, 255] if kind.kind == "f" else [1, 255, np.iinfo(kind).max]
    samples = []
    for i in range(1, 10, 2):
        for j in range(1, 10, 2):
            window = Window(dataset.width * j // 10, dataset.height * i // 10, 8, 8)
            try:
                samples.append(dataset.read(band, window=window).ravel())
            except GDAL_ERRORS:
                return False  # the read that matters says it better
    values = np.concatenate(samples)
    values = values[values != 0]
    return values.size > 0 and float(np.isin(values, full).mean()) < 0.5


def usable_nodata(value: float | None, dtype: str) -> float | None:
    """`value` if a pixel of `dtype` can hold it, else None (uint16 with nodata -9999)."""
    if value is None:
        return None
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return float(value)
    if not np.isfinite(value) or value != int(value):
        return None
    info = np.iinfo(kind)
    return value if info.min <= value <= info.max else None


def has_mask(dataset: rasterio.DatasetReader) -> bool:
    """Whether the file has a mask of its own, internal or .msk, apart from nodata and alpha."""
    return any(MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags for flags in dataset.mask_flag_enums)


@dataclass(frozen=True)
class BandSelection:
    """The bands taken from one file and what marks its pixels invalid."""

    path: str
    bands: tuple[int, ...]
    """1-based"""
    nodata: tuple[float | None, ...]
    """per band, already checked against the dtype"""
    mask: bool
    alpha: int | None
    """band used as mask; None where there is none or it was named as data"""

    @property
    def may_have_holes(self) -> bool:
        return self.mask or self.alpha is not None or any(n is not None for n in self.nodata)


class Source:
    """Selected bands of one dataset, placed at (row, col) of a larger grid of its own pixels."""

    def __init__(self, dataset: rasterio.DatasetReader, selection: BandSelection, row: int, col: int) -> None:
        self.dataset = dataset
        self.selection = selection
        self.row, self.col = row, col
        self.height, self.width = dataset.height, dataset.width

    def read(self, row: int, col: int, h: int, w: int) -> tuple[FloatArray, BoolArray, BoolArray]:
        """(values (C, h, w), data (h, w), inside (h, w)) at a window of the grid.

        Outside of the raster values and data are its reflection. `data`: no band is invalid;
        `values` may hold anything where it is not.
        """
        rows = reflected_indices(row - self.row, h, self.height)
        cols = reflected_indices(col - self.col, w, self.width)
        top, left = int(rows.min()), int(cols.min())
        window = Window(left, top, int(cols.max()) + 1 - left, int(rows.max()) + 1 - top)
        values, data = self._read_window(window)
        values = values[:, rows - top][:, :, cols - left]
        data = data[rows - top][:, cols - left]
        inside = _within(row - self.row, h, self.height)[:, None] & _within(col - self.col, w, self.width)
        return values, data, inside

    def _read_window(self, window: Window) -> tuple[FloatArray, BoolArray]:
        pick = self.selection
        try:
            raw = self.dataset.read(indexes=list(pick.bands), window=window)
            data = np.ones(raw.shape[1:], bool)
            if pick.mask:
                data &= self.dataset.read_masks(pick.bands[0], window=window) != 0
            if pick.alpha is not None:
                data &= self.dataset.read(pick.alpha, window=window) != 0
        except GDAL_ERRORS as error:
            raise InputUnreadable(
                f"{pick.path} cannot be read at rows {window.row_off} to "
                f"{window.row_off + window.height - 1} (truncated or corrupt?): {reason(error)}."
            ) from error
        for band, nodata in zip(raw, pick.nodata, strict=True):
            if nodata is not None:
                data &= ~_equals(band, nodata)
        # float64 beyond the float32 range becomes inf here and is invalid below.
        with np.errstate(over="ignore", invalid="ignore"):
            values = raw.astype(np.float32, copy=False)
        if values.dtype.kind == "f" and raw.dtype.kind == "f":
            data &= np.isfinite(values).all(axis=0)
        return values, data

    def close(self) -> None:
        self.dataset.close()


def _within(start: int, count: int, size: int) -> BoolArray:
    index = np.arange(start, start + count)
    return (index >= 0) & (index < size)


def _equals(band: npt.NDArray, nodata: float) -> BoolArray:
    """Float nodata is compared within two units of the last place: headers hold rounded text."""
    if band.dtype.kind != "f":
        return band == band.dtype.type(nodata)
    if np.isnan(nodata):
        return np.isnan(band)
    with np.errstate(over="ignore", invalid="ignore"):
        value = band.dtype.type(nodata)
        near = 2 * np.finfo(band.dtype).eps * np.abs(value)
        return (band == value) | (np.abs(band - value) <= near)


class WarpedSource(Source):
    """A raster seen through a WarpedVRT; validity is NaN there, so nothing bleeds into data."""

    def __init__(
        self,
        dataset: rasterio.DatasetReader,
        selection: BandSelection,
        row: int,
        col: int,
        *,
        crs: CRS | None,
        same_crs: bool,
        src_transform: Affine,
        transform: Affine,
        shape: tuple[int, int],
        scale: tuple[float, float],
        resampling: Resampling,
    ) -> None:
        """`transform`, `shape`: the grid to see it on; `scale`: its pixels per source pixel
        (y, x), given to GDAL because it would otherwise guess it anew for every window."""
        known = [n for n in selection.nodata if n is not None]
        kwargs: dict = {"nodata": float("nan"), "dtype": "float32", "tolerance": _EXACT}
        if known:
            kwargs["src_nodata"] = known[0]
        if selection.alpha is not None:
            kwargs["src_alpha"] = selection.alpha
        if same_crs:
            # One CRS object on both sides keeps PROJ out of it.
            kwargs["src_crs"] = kwargs["crs"] = crs or _ANY_CRS
        else:
            kwargs["crs"] = crs
        native = dataset
        if selection.alpha is None and alpha_bands(dataset):
            # An alpha band named as data: GDAL would weight the others by it.
            dataset = _without_alpha(dataset, selection.path)
        if src_transform != dataset.transform:
            kwargs["src_transform"] = src_transform
        try:
            vrt = WarpedVRT(
                dataset,
                transform=transform,
                height=shape[0],
                width=shape[1],
                resampling=resampling,
                YSCALE=repr(scale[0]),
                XSCALE=repr(scale[1]),
                **kwargs,
            )
        except (*GDAL_ERRORS, ValueError) as error:
            raise IncompatiblePair(
                f"{selection.path} cannot be resampled onto the PAN grid: {reason(error)}."
            ) from error
        self._opened = [dataset, native]
        kind = np.dtype(dataset.dtypes[selection.bands[0] - 1])
        self._limits = (np.iinfo(kind).min, np.iinfo(kind).max) if kind.kind in "iu" else None
        plain = BandSelection(selection.path, selection.bands, (None,) * len(selection.bands), False, None)
        super().__init__(vrt, plain, row, col)

    def _read_window(self, window: Window) -> tuple[FloatArray, BoolArray]:
        values, data = super()._read_window(window)
        if self._limits is not None:
            # Cubic overshoot must not leave the range of the sensor's integers.
            values = np.clip(values, *self._limits)
        return values, data

    def close(self) -> None:
        self.dataset.close()
        for dataset in self._opened:
            dataset.close()


def _without_alpha(dataset: rasterio.DatasetReader, path: str) -> rasterio.DatasetReader:
    """The same bands, none of them marked alpha."""
    bands = "".join(
        f'<VRTRasterBand dataType="{_gdal_name(dtype)}" band="{band}"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{escape(path)}</SourceFilename>'
        f"<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band, dtype in zip(dataset.indexes, dataset.dtypes, strict=True)
    )
    place = ", ".join(repr(v) for v in dataset.transform.to_gdal())
    srs = f"<SRS>{escape(dataset.crs.to_wkt())}</SRS>" if dataset.crs else ""
    return open_raster(
        f'<VRTDataset rasterXSize="{dataset.width}" rasterYSize="{dataset.height}">'
        f"{srs}<GeoTransform>{place}</GeoTransform>{bands}</VRTDataset>"
    )


def _gdal_name(dtype: str) -> str:
    """GDAL's name of a numpy dtype: uint16 -> UInt16, uint8 -> Byte."""
    if dtype == "uint8":
        return "Byte"
    return dtype.capitalize().replace("Uint", "UInt")


def read_stack(
    sources: Sequence[Source], row: int, col: int, h: int, w: int
) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Bands of all sources on one grid, (C, h, w); valid and inside where every source is."""
    parts = [source.read(row, col, h, w) for source in sources]
    values = parts[0][0] if len(parts) == 1 else np.concatenate([p[0] for p in parts])
    data, inside = parts[0][1].copy(), parts[0][2].copy()
    for _, more_data, more_inside in parts[1:]:
        data &= more_data
        inside &= more_inside
    return values, data, inside
