"""One raster seen on a pixel grid: opening, bands, validity, reflection at its edges, warping, GDAL's cache."""

import os
import re
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from html import escape
from typing import TypeAlias
from uuid import uuid4

import numpy as np
import rasterio
from affine import Affine
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.shutil import copy as raster_copy
from rasterio.shutil import delete as delete_raster
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as GdalWindow

from uknowpan.tiling.errors import IncompatiblePair, InputUnreadable
from uknowpan.tiling.fill import AnyArray, BoolArray, FloatArray, reflected_indices
from uknowpan.tiling.vrt import virtual
from uknowpan.tiling.window import Box, Grid, Window

GDAL_ERRORS = (RasterioError, CPLE_BaseError, OSError, UnicodeDecodeError)
"""Errors that rasterio raises when GDAL fails; some calls let GDAL's own through, or cannot read its message."""


@dataclass(frozen=True)
class Assembly:
    """Bands and tiles of files as one raster, from `uknowpan.tiling.assembly`."""

    name: str
    """its name in messages"""
    vrt: str
    """the text that GDAL opens"""
    files: tuple[str, ...]
    """the files that decide about it"""


RasterLike: TypeAlias = str | os.PathLike[str] | DatasetReader | Assembly
"""A file that GDAL opens, `FILE,band=N`, an assembly of files, or an open dataset, which stays open."""

GDAL_CACHE_BYTES, MOST_GDAL_CACHE_BYTES = 16 * 2**20, 512 * 2**20
"""Blocks that GDAL keeps; its own default is 5 % of the machine's memory, which adds to ours. Tiles overlap by their
margins only, so little is read twice, but for files in wide strips."""

MOST_MEASURED = 3.4e37
"""Floats beyond it, such as an undeclared -3.4e38, count as invalid, as infinities do: no sensor measures them."""

try:
    # GDAL wants some CRS to warp; where neither file has one, both are put into this one.
    _ANY_CRS = CRS.from_epsg(3857)
except CRSError as error:  # without its database results would lose the code of their CRS
    raise InputUnreadable(
        f"PROJ cannot read its database ({error}); unset PROJ_LIB and PROJ_DATA, which lead to another PROJ's."
    ) from error
# Exact transformation (GDAL refuses 0): an approximated one depends on the window asked for.
_EXACT = 1e-9


@contextmanager
def bounded_gdal_cache(wanted: int = 0) -> Iterator[None]:
    """GDAL with a small block cache, so that memory is as forecast on any machine.

    Args:
        wanted: bytes without which blocks would be read again and again.
    """
    with rasterio.Env(GDAL_CACHEMAX=min(max(wanted, GDAL_CACHE_BYTES), MOST_GDAL_CACHE_BYTES)):
        yield


class Remarks:
    """The sentences about rasters that collect while they are opened."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.assumptions: list[str] = []

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def assume(self, sentence: str) -> None:
        """Add a guess; it is a note too."""
        self.note(sentence)
        if sentence not in self.assumptions:
            self.assumptions.append(sentence)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings about rasters without georeferencing: they get sentences of our own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def open_raster(path: str) -> DatasetReader:
    """Open a raster. Raises InputUnreadable."""
    with suppress(OSError, ValueError):
        if stat.S_ISFIFO(os.stat(path).st_mode):  # GDAL would wait for a writer for ever
            raise InputUnreadable(f"{path} is a pipe; save it as a file first.")
    try:
        with quiet():
            dataset = rasterio.open(path)
    except UnicodeEncodeError as error:
        raise InputUnreadable(f"The name {path!a} is not UTF-8; rename the file or folder.") from error
    except GDAL_ERRORS as error:
        raise InputUnreadable(f"{path} cannot be opened as a raster: {reason(error)}.") from error
    if dataset.count == 0:
        parts = list(dataset.subdatasets)
        dataset.close()
        hint = f"; name one of its subdatasets, e.g. {parts[0]}" if parts else ""
        raise InputUnreadable(f"{path} has no raster bands of its own{hint}.")
    return dataset


def reason(error: BaseException) -> str:
    """GDAL's message without its line breaks and full stop."""
    text = str(error.__cause__ or error).replace("\n", " ").strip()
    return text.rstrip(".") or type(error).__name__


def parse_band_spec(spec: str) -> tuple[str, int | None]:
    """`FILE,band=2` -> (FILE, 2); anything else, also with commas, is a path.

    Raises IncompatiblePair for a band that is no positive number.
    """
    match = None if os.path.exists(spec) else re.fullmatch(r"(.+),band=(.*)", spec)
    if match is None:
        return spec, None
    path, band = match.groups()
    if not re.fullmatch(r"[1-9][0-9]*", band):
        raise IncompatiblePair(f"{spec}: band must be a number from 1, as in FILE,band=2.")
    return path, int(band)


class Opener:
    """Opens each file once and closes those it opened with `closing`."""

    def __init__(self, closing: ExitStack) -> None:
        self.closing = closing
        self._opened: dict[str, DatasetReader] = {}

    def __call__(self, spec: RasterLike) -> tuple[DatasetReader, str, int | None]:
        """(dataset, name, band that the argument names). Raises InputUnreadable, IncompatiblePair."""
        if isinstance(spec, DatasetReader | DatasetWriter | WarpedVRT):
            return spec, spec.name, None
        if isinstance(spec, Assembly):
            return self._open(spec.vrt), spec.name, None
        if not isinstance(spec, str | os.PathLike):
            raise IncompatiblePair(f"A raster is a path or an open rasterio dataset, not {type(spec).__name__}.")
        path, band = parse_band_spec(os.fspath(spec))
        return self._open(path), path, band

    def _open(self, path: str) -> DatasetReader:
        if path not in self._opened:
            self._opened[path] = self.closing.enter_context(open_raster(path))
        return self._opened[path]


def alpha_bands(dataset: DatasetReader) -> list[int]:
    """1-based numbers of the bands marked alpha (never all of them)."""
    alpha = [i for i, c in zip(dataset.indexes, dataset.colorinterp, strict=True) if c == ColorInterp.alpha]
    return alpha if len(alpha) < dataset.count else []


def holds_image(dataset: DatasetReader, band: int) -> bool:
    """Whether a band marked alpha is no mask: most values are neither 0 nor full."""
    kind = np.dtype(dataset.dtypes[band - 1])
    full = [1, 255] if kind.kind == "f" else [1, 255, np.iinfo(kind).max]
    samples = []
    for i in range(1, 10, 2):
        for j in range(1, 10, 2):
            window = GdalWindow(dataset.width * j // 10, dataset.height * i // 10, 8, 8)
            try:
                samples.append(dataset.read(band, window=window).ravel())
            except GDAL_ERRORS:
                return False  # the read that matters raises a better error
    values = np.concatenate(samples)
    values = values[values != 0]
    return values.size > 0 and float(np.isin(values, full).mean()) < 0.5


def usable_nodata(value: float | None, dtype: str) -> float | None:
    """`value` if a pixel of `dtype` can hold it, else None (uint16 with nodata -9999)."""
    if value is None:
        return None
    kind = np.dtype(dtype)
    if kind.kind == "f":
        with np.errstate(over="ignore"):
            holds = not np.isfinite(value) or np.isfinite(kind.type(value))
        return float(value) if holds else None
    if not np.isfinite(value) or value != int(value):
        return None
    info = np.iinfo(kind)
    return value if info.min <= value <= info.max else None


def has_mask(dataset: DatasetReader) -> bool:
    """Whether the file has masks of its own, internal or .msk, apart from nodata and alpha."""
    return bool(masks_of(dataset, dataset.indexes))


def masks_of(dataset: DatasetReader, bands: Sequence[int]) -> tuple[int, ...]:
    """The bands whose masks count: one where all share a mask, else those with a mask of their own.

    rasterio has no number for the largest nodata of 64-bit integers, which GDAL's mask leaves out.
    """
    flags = dataset.mask_flag_enums
    if any(MaskFlags.per_dataset in of_band and MaskFlags.alpha not in of_band for of_band in flags):
        return (bands[0],)
    unnamed = [MaskFlags.nodata in of_band and dataset.nodatavals[k] is None for k, of_band in enumerate(flags)]
    return tuple(band for band in bands if not flags[band - 1] or unnamed[band - 1])


@dataclass(frozen=True)
class Raster:
    """The bands taken from one open dataset, and what marks their pixels invalid."""

    dataset: DatasetReader
    path: str
    bands: tuple[int, ...]
    """1-based"""
    nodata: tuple[float | None, ...]
    """per band, already checked against the dtype"""
    masks: tuple[int, ...]
    """bands whose masks in the file apply"""
    alpha: tuple[int, ...]
    """bands used as masks; none that was named as data"""
    limits: FloatArray | None = None
    """(2, C, 1, 1) range that values are clipped to: cubic overshoot must not leave that of the sensor's integers"""

    @property
    def grid(self) -> Grid:
        data = self.dataset
        kind = data.tags().get("AREA_OR_POINT", "Area")
        try:
            rpcs = data.rpcs if data.transform.is_identity else None
        except (KeyError, ValueError, IndexError) as error:
            raise IncompatiblePair(
                f"{self.path} has RPCs that cannot be read ({error}); fetch its metadata."
            ) from error
        return Grid(data.crs, data.transform, data.width, data.height, kind, rpcs)

    @property
    def dtypes(self) -> list[str]:
        return [self.dataset.dtypes[band - 1] for band in self.bands]

    @property
    def may_have_holes(self) -> bool:
        """Whether a pixel may be invalid, by the header alone; floats need no announcement of NaN."""
        declared = self.masks or self.alpha or any(n is not None for n in self.nodata)
        return bool(declared) or any(np.dtype(dtype).kind == "f" for dtype in self.dtypes)

    def single_bands(self) -> list["Raster"]:
        """Each band as a raster of its own."""
        return [
            replace(self, bands=(b,), nodata=(n,), masks=masks_of(self.dataset, [b]))
            for b, n in zip(self.bands, self.nodata, strict=True)
        ]

    def _raw(self, place: GdalWindow) -> AnyArray:
        """(C, h, w) as stored, in the one dtype that holds the dtypes of all bands."""
        if len(set(self.dtypes)) == 1:
            raw: AnyArray = self.dataset.read(indexes=list(self.bands), window=place)
            return raw
        kind = np.result_type(*(np.dtype(dtype) for dtype in self.dtypes))
        return np.stack([self.dataset.read(band, window=place).astype(kind) for band in self.bands])

    def read(self, window: Window) -> tuple[FloatArray, BoolArray]:
        """Values (C, h, w) and validity (h, w) in a window inside the file; a pixel is valid where all bands are.

        Values may be anything where they are invalid. Raises InputUnreadable.
        """
        place = GdalWindow(window.col, window.row, window.width, window.height)
        try:
            raw = self._raw(place)
            data = np.ones(raw.shape[1:], bool)
            for band in self.masks:
                data &= self.dataset.read_masks(band, window=place) != 0
            for band in self.alpha:
                data &= self.dataset.read(band, window=place) != 0
        except GDAL_ERRORS as error:
            raise InputUnreadable(
                f"{self.path} cannot be read at rows {window.row} to {window.row + window.height - 1} "
                f"(truncated or corrupt?): {reason(error)}."
            ) from error
        for band, nodata in zip(raw, self.nodata, strict=True):
            if nodata is not None:
                data &= ~_equals(band, nodata)
        with np.errstate(over="ignore", invalid="ignore"):
            values = raw.astype(np.float32, copy=False)
            if raw.dtype.kind == "f":
                data &= (np.abs(values) <= MOST_MEASURED).all(axis=0)
        return values if self.limits is None else np.clip(values, *self.limits), data


def select_bands(
    dataset: DatasetReader, path: str, bands: Sequence[int], nodata: float | None, remarks: Remarks
) -> Raster:
    """Bands of a file with the nodata that applies to each. Raises IncompatiblePair."""
    values: list[float | None] = []
    for band in bands:
        if not 1 <= band <= dataset.count:
            raise IncompatiblePair(f"{path} has no band {band}; it has bands 1 to {dataset.count}.")
        dtype = dataset.dtypes[band - 1]
        if dtype.startswith("complex"):
            raise IncompatiblePair(f"Band {band} of {path} is complex ({dtype}); take its magnitude first.")
        if dataset.colorinterp[band - 1] == ColorInterp.palette:
            raise IncompatiblePair(
                f"Band {band} of {path} is a colour table, not an image; expand it first: gdal_translate -expand rgb."
            )
        value = usable_nodata(nodata, dtype)
        if value is None:
            value = usable_nodata(dataset.nodatavals[band - 1], dtype)
            if nodata is not None:
                remarks.note(
                    f"Nodata {nodata:g} does not fit into {path} ({dtype}): "
                    f"{'none' if value is None else f'its own, {value:g},'} is used there."
                )
        values.append(value)
    alpha = tuple(b for b in alpha_bands(dataset) if b not in bands)
    return Raster(dataset, path, tuple(bands), tuple(values), masks_of(dataset, bands), alpha)


def _equals(band: AnyArray, nodata: float) -> BoolArray:
    """Float nodata is compared within two units of the last place: headers hold rounded text.

    That of 64-bit integers comes as a float, which is rounded, too.
    """
    equal: BoolArray
    if band.dtype.kind != "f":
        equal = band == (nodata if band.dtype.itemsize == 8 else band.dtype.type(nodata))
    elif not np.isfinite(nodata):
        equal = np.isnan(band) if np.isnan(nodata) else band == nodata
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            value = band.dtype.type(nodata)
            near = 2 * np.finfo(band.dtype).eps * np.abs(value)
            equal = (band == value) | (np.abs(band - value) <= near)
    return equal


@dataclass(frozen=True)
class Source:
    """A raster placed at (row, col) of a larger grid of its own pixels, which it reflects beyond its edges."""

    raster: Raster
    row: int
    col: int
    extent: Box
    """where the raster may give output, in pixels of the larger grid"""
    may_have_holes: bool
    """whether a pixel inside may be invalid"""
    warped: bool = False
    """whether pixels are resampled"""
    points: tuple[tuple[float, ...], ...] = ()
    """by which RPCs placed it: `uknowpan.tiling.rpcs.Points`"""

    @staticmethod
    def native(raster: Raster, row: int = 0, col: int = 0) -> "Source":
        """The raster as it is; it gives output up to half a pixel beyond its edges."""
        height, width = raster.dataset.height, raster.dataset.width
        extent = Box(row - 0.5, col - 0.5, row + height + 0.5, col + width + 0.5)
        return Source(raster, row, col, extent, raster.may_have_holes)

    def read(self, window: Window) -> tuple[FloatArray, BoolArray, BoolArray]:
        """(values (C, h, w), data (h, w), inside (h, w)) at a window of the grid.

        Outside of the raster values and data are its reflection. `data`: no band is invalid; `values` may hold anything
        where it is not.
        """
        height, width = self.raster.dataset.height, self.raster.dataset.width
        row, col = window.row - self.row, window.col - self.col
        rows, inside_y = reflected_indices(row, window.height, height)
        cols, inside_x = reflected_indices(col, window.width, width)
        top, left = int(rows.min()), int(cols.min())
        values, data = self.raster.read(Window(top, left, int(rows.max()) + 1 - top, int(cols.max()) + 1 - left))
        values, data = values[:, rows - top][:, :, cols - left], data[rows - top][:, cols - left]
        return values, data, inside_y[:, None] & inside_x


def read_stack(sources: Sequence[Source], window: Window) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Bands of all sources on one grid, (C, h, w), and for each source, (S, h, w), where it is data and inside."""
    values, data, inside = zip(*(source.read(window) for source in sources), strict=True)
    stacked = values[0] if len(values) == 1 else np.concatenate(values)
    return stacked, np.stack(data), np.stack(inside)


def warped(
    closing: ExitStack,
    raster: Raster,
    grid: Grid,
    *,
    src_transform: Affine,
    same_crs: bool,
    scale: tuple[float, float],
    resampling: Resampling,
) -> Raster:
    """The raster through a WarpedVRT on another grid; validity is NaN there, so nothing bleeds into data.

    A pixel is invalid where its centre lies in an invalid source pixel. GDAL promises that for single bands only:
    several bands with holes are warped one by one.

    scale: pixels of the grid per source pixel (y, x), given to GDAL because it would otherwise guess it
        anew for every window.

    Raises IncompatiblePair.
    """
    options: dict[str, object] = {"nodata": float("nan"), "dtype": "float32", "tolerance": _EXACT, "crs": grid.crs}
    if same_crs:
        # One CRS object on both sides keeps PROJ out of it.
        options["src_crs"] = options["crs"] = grid.crs or _ANY_CRS
    elif raster.dataset.crs.is_geographic and max(map(abs, raster.dataset.bounds)) > 180:
        # PROJ ends longitudes at 180 degrees, and the raster goes on.
        middle = sum(raster.dataset.bounds[::2]) / 2
        options["src_crs"] = f"{raster.dataset.crs.to_proj4()} +lon_wrap={middle:.6f}"
    dataset, bands = raster.dataset, raster.bands
    if raster.may_have_holes or alpha_bands(dataset):
        dataset, bands = (
            closing.enter_context(marked(raster, openable(closing, raster))),
            tuple(range(1, len(bands) + 1)),
        )
        options["src_nodata"] = float("nan")
    if src_transform != dataset.transform:
        options["src_transform"] = src_transform
    try:
        vrt = WarpedVRT(
            dataset,
            transform=grid.transform,
            height=grid.height,
            width=grid.width,
            resampling=resampling,
            YSCALE=repr(scale[0]),
            XSCALE=repr(scale[1]),
            **options,
        )
    except (*GDAL_ERRORS, ValueError) as error:
        raise IncompatiblePair(f"{raster.path} cannot be resampled onto the PAN grid: {reason(error)}.") from error
    return as_floats(raster, closing.enter_context(vrt), bands)


def as_floats(raster: Raster, view: DatasetReader, bands: tuple[int, ...]) -> Raster:
    """Bands of a resampled view of the raster, NaN where they are invalid, in the range of the raster's integers."""
    ranges = [np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else None for dtype in raster.dtypes]
    lows = [-np.inf if known is None else known.min for known in ranges]
    highs = [np.inf if known is None else known.max for known in ranges]
    return Raster(
        view, raster.path, bands, (None,) * len(bands), masks=(), alpha=(),
        limits=np.array([lows, highs], np.float32)[..., None, None],
    )  # fmt: skip


def openable(closing: ExitStack, raster: Raster) -> str:
    """A name by which GDAL opens the raster anew; an open dataset without such a name is copied into memory."""
    dataset = raster.dataset
    path = dataset.name if dataset.name.startswith("<VRTDataset") else raster.path
    with suppress(InputUnreadable), open_raster(path) as again:
        if (again.shape, again.count) == (dataset.shape, dataset.count):
            return path
    driver = "VRT" if isinstance(dataset, WarpedVRT) else "GTiff"
    name = f"/vsimem/{uuid4().hex}.{driver.lower()}"
    raster_copy(dataset, name, driver=driver)
    closing.callback(delete_raster, name)
    return name


def marked(raster: Raster, path: str) -> DatasetReader:
    """The bands as floats that are NaN where they are invalid, for whatever reason; they do not form an alpha.

    Each band is a sum of sources that are left out, as NaN, at their nodata. Zero times the alpha or the mask gives 0
    or NaN; two opposite products that overflow give NaN for infinities and fill values. The value is added last, to 0.
    """
    dataset = raster.dataset
    kind = np.result_type(*(np.dtype(dtype) for dtype in raster.dtypes))
    name, overflow = ("Float64", 5e270) if kind.itemsize >= 4 and kind != np.float32 else ("Float32", 10.0)

    def source(band: int | str, nodata: float | None, ratio: float = 1.0) -> str:
        return (
            f'<ComplexSource><SourceFilename relativeToVRT="0">{escape(path)}</SourceFilename>'
            f"<SourceBand>{band}</SourceBand>"
            + (f"<ScaleOffset>0</ScaleOffset><ScaleRatio>{ratio!r}</ScaleRatio>" if ratio != 1 else "")
            + (f"<NODATA>{float(nodata)!r}</NODATA>" if nodata is not None else "")
            + "</ComplexSource>"
        )

    marks = [source(band, 0, 0.0) for band in raster.alpha]
    marks += [source(f"mask,{band}", 0, 0.0) for band in raster.masks]
    bands = "".join(
        f'<VRTRasterBand dataType="{name}" band="{number}" subClass="VRTDerivedRasterBand"><NoDataValue>nan'
        "</NoDataValue><PixelFunctionType>sum</PixelFunctionType>"
        f"<SourceTransferType>{name}</SourceTransferType>"
        + "".join([*(source(band, nodata, sign * overflow) for sign in (1, -1)), *marks, source(band, nodata)])
        + "</VRTRasterBand>"
        for number, (band, nodata) in enumerate(zip(raster.bands, raster.nodata, strict=True), 1)
    )
    return open_raster(virtual(dataset.width, dataset.height, dataset.crs, dataset.transform, bands))
