"""A PAN/MS pair on one frame: the working geometry everything else hangs on.

Output grid = PAN grid. The MS is worked on in a *frame* of MS pixels, each ratio x ratio PAN
pixels, areas nested. The full scene's frame begins (oy, ox) PAN pixels above and left of the PAN,
0 <= o < ratio, chosen so that a native MS that nests is read without resampling. With bounds the
frame of the pair is a part of the full scene's frame, beginning at a multiple of `ORIGIN_STEP`
MS pixels, so that tiles, noise and results inside are those of the full run.
"""

import os
import re
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, zip_longest
from math import ceil, floor, hypot, isfinite, sqrt
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Resampling
from rasterio.warp import transform as transform_points
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from uknowpan.tiling.errors import IncompatiblePair, InputUnreadable
from uknowpan.tiling.fill import FILL_REACH, BoolArray, FloatArray, TileArrays, fill_invalid, output_valid
from uknowpan.tiling.raster import (
    GDAL_ERRORS,
    BandSelection,
    Source,
    WarpedSource,
    alpha_bands,
    has_mask,
    holds_image,
    open_raster,
    read_stack,
    reason,
    usable_nodata,
)

ORIGIN_STEP = 12
"""MS pixels; divisible by 1, 2, 3, 4 and 6, the strides of the networks."""
MAX_RATIO = 8
DEFAULT_RATIO = 4
"""Taken where the MS lies on the PAN grid and its own ratio is lost."""
_NEST_TOLERANCE = 0.01
"""PAN pixels; offsets and drift over the scene below it count as nested."""
_SEARCH_BLOCK = 512
"""MS pixels; blocks of this side are searched for data where samples met none."""
_CONTEXT = 64
"""MS pixels around the frame up to which a resampled MS is looked at."""

Box = tuple[float, float, float, float]
"""(top, left, bottom, right)"""


@dataclass(frozen=True)
class Grid:
    """Georeferencing and size of a raster."""

    crs: CRS | None
    transform: Affine
    width: int
    height: int
    area_or_point: str = "Area"
    """only what the file says of itself; `transform` is that of pixel areas in either case"""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in the units of the CRS, smaller value first."""
        corners = [
            self.transform * corner for corner in [(0, 0), (self.width, 0), (0, self.height), (self.width, self.height)]
        ]
        xs, ys = [c[0] for c in corners], [c[1] for c in corners]
        return min(xs), min(ys), max(xs), max(ys)


@dataclass(frozen=True)
class MsMeta:
    """What is kept of the MS: one entry per band in the tuples."""

    dtype: str
    nodata: float | None
    descriptions: tuple[str | None, ...]
    colorinterp: tuple[ColorInterp, ...]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    units: tuple[str | None, ...]
    band_tags: tuple[dict[str, str], ...]
    tags: dict[str, str]
    nbits: int | None
    """significant bits if the file says so (IMAGE_STRUCTURE NBITS)"""


@dataclass(frozen=True)
class PanMeta:
    """What is asked of the PAN besides its grid."""

    dtype: str
    nodata: float | None
    nbits: int | None
    tags: dict[str, str]


def parse_band_spec(spec: str) -> tuple[str, int | None]:
    """`FILE,band=2` -> (FILE, 2); anything else, also with commas, is a path.

    Raises IncompatiblePair for a band that is no positive number.
    """
    if os.path.exists(spec):
        return spec, None
    match = re.fullmatch(r"(.+),band=(.*)", spec)
    if match is None:
        return spec, None
    path, band = match.groups()
    if not re.fullmatch(r"[1-9][0-9]*", band):
        raise IncompatiblePair(f"{spec}: band must be a number from 1, as in FILE,band=2.")
    return path, int(band)


class ScenePair:
    """An opened pair; made by `open_pair`, used as a context manager. Reads are serialised."""

    grid: Grid
    """the output: the PAN grid, cut by bounds"""
    ratio: int
    offset: tuple[int, int]
    """(oy, ox): PAN pixels from the frame's corner to the first output pixel"""
    frame_shape: tuple[int, int]
    """(h, w) in MS pixels"""
    origin: tuple[int, int]
    """(row0, col0) of this frame within the full scene's frame, MS pixels; (0, 0) without bounds.
    Noise is a function of origin + position in the frame."""
    full_shape: tuple[int, int]
    """(h, w) of the full scene's frame"""
    bands: int
    meta: MsMeta
    pan_meta: PanMeta
    shift: tuple[float, float]
    """(dy, dx) PAN pixels the MS content was moved"""
    resampling: str
    nested: bool
    """the MS is read as it is, without resampling"""
    may_have_invalid: bool
    """whether an output pixel can come out invalid, as far as headers and geometry tell"""
    notes: list[str]
    """what was assumed or done, one sentence each"""
    assumptions: list[str]
    """those of the notes that are guesses and may be wrong"""
    inputs: list[str]

    def __init__(
        self,
        *,
        grid: Grid,
        ratio: int,
        offset: tuple[int, int],
        frame_shape: tuple[int, int],
        origin: tuple[int, int],
        full_shape: tuple[int, int],
        full_offset: tuple[int, int],
        pan: Source,
        ms: Sequence[Source],
        extents: Sequence[Box],
        meta: MsMeta,
        pan_meta: PanMeta,
        shift: tuple[float, float],
        resampling: str,
        may_have_invalid: bool,
        notes: list[str],
        assumptions: list[str],
        inputs: list[str],
    ) -> None:
        self.grid = grid
        self.ratio = ratio
        self.offset = offset
        self.frame_shape = frame_shape
        self.origin = origin
        self.full_shape = full_shape
        self.bands = len(meta.descriptions)
        self.meta = meta
        self.pan_meta = pan_meta
        self.shift = shift
        self.resampling = resampling
        self.nested = not any(isinstance(source, WarpedSource) for source in ms)
        self.may_have_invalid = may_have_invalid
        self.notes = notes
        self.assumptions = assumptions
        self.inputs = inputs
        self._full_offset = full_offset
        self._pan = pan
        self._ms = list(ms)
        # Where each MS file may give output, in MS pixels of the full scene's frame.
        self._extents = list(extents)
        self._lock = threading.Lock()
        self._stamps = [_stamp(path) for path in inputs]

    def read_frame(self, row: int, col: int, h: int, w: int, margin: int = 0) -> TileArrays:
        """Read h x w MS pixels at (row, col) of the frame and `margin` more on every side.

        The arrays cover (h + 2 margin, w + 2 margin) MS pixels. Any position may be asked for:
        outside of bounds it is the scene's own data, outside of the scene its reflection.
        Invalid pixels take neighbouring values `FILL_REACH` MS pixels deep, beyond that the
        scene's mean (`fill_values`).
        Raises InputUnreadable.
        """
        r = self.ratio
        top, left = self.origin[0] + row - margin, self.origin[1] + col - margin
        h, w = h + 2 * margin, w + 2 * margin
        window = (top, left, h, w)
        pan_window = (top * r - self._full_offset[0], left * r - self._full_offset[1], h * r, w * r)
        with self._lock:
            pan, pan_data, pan_inside = read_stack([self._pan], *pan_window)
            ms, ms_data, ms_inside = read_stack(self._ms, *window)
        if not pan_data.all():
            pan = self._filled([self._pan], pan_window, FILL_REACH * r, self.fill_values[0])
        if not ms_data.all():
            ms = self._filled(self._ms, window, FILL_REACH, self.fill_values[1])
        pan_valid = pan_data & pan_inside
        valid = output_valid(pan_valid, ms_data, r) & self._within_extents(window)
        return TileArrays(pan, ms, pan_valid, ms_data & ms_inside, valid)

    def _filled(
        self,
        sources: Sequence[Source],
        window: tuple[int, int, int, int],
        reach: int,
        constants: FloatArray,
    ) -> FloatArray:
        """Reads `reach` pixels more on every side, so that filling does not depend on the tile."""
        row, col, h, w = window
        with self._lock:
            values, data, _ = read_stack(sources, row - reach, col - reach, h + 2 * reach, w + 2 * reach)
        filled = fill_invalid(values, data, reach, constants)
        return np.ascontiguousarray(filled[:, reach : reach + h, reach : reach + w])

    def _within_extents(self, window: tuple[int, int, int, int]) -> BoolArray:
        row, col, h, w = window
        y = row + (np.arange(h * self.ratio) + 0.5) / self.ratio
        x = col + (np.arange(w * self.ratio) + 0.5) / self.ratio
        inside = np.ones((y.size, x.size), bool)
        for top, left, bottom, right in self._extents:
            inside &= ((y >= top) & (y <= bottom))[:, None] & ((x >= left) & (x <= right))
        return inside

    @cached_property
    def fill_values(self) -> tuple[FloatArray, FloatArray]:
        """Means of valid pixels, (1,) of the PAN and (C,) of the MS, over a few sample windows
        of the full scene (so that bounds do not change them); 0 where nothing is valid."""
        r = self.ratio
        sums = np.zeros(1 + self.bands)
        counts = np.zeros(1 + self.bands)
        for row, col, h, w in sample_windows(self, 9, 32):
            top, left = self.origin[0] + row, self.origin[1] + col
            with self._lock:
                pan, pan_data, _ = read_stack(
                    [self._pan],
                    top * r - self._full_offset[0],
                    left * r - self._full_offset[1],
                    h * r,
                    w * r,
                )
                ms, ms_data, _ = read_stack(self._ms, top, left, h, w)
            sums[0] += pan[0][pan_data].sum(dtype=float)
            counts[0] += pan_data.sum()
            sums[1:] += ms[:, ms_data].sum(axis=1, dtype=float)
            counts[1:] += ms_data.sum()
        means = (sums / np.maximum(counts, 1)).astype(np.float32)
        return means[:1], means[1:]

    def valid_fraction(self, row: int, col: int, h: int, w: int) -> float:
        """Share of the MS pixels in a window of the frame where MS and PAN are both valid;
        cheaper than `read_frame`, nothing is filled."""
        r = self.ratio
        top, left = self.origin[0] + row, self.origin[1] + col
        with self._lock:
            _, data, inside = read_stack(self._ms, top, left, h, w)
            valid = data & inside
            if valid.any():
                _, data, inside = read_stack(
                    [self._pan],
                    top * r - self._full_offset[0],
                    left * r - self._full_offset[1],
                    h * r,
                    w * r,
                )
                valid &= (data & inside).reshape(h, r, w, r).all(axis=(1, 3))
        return float(valid.mean())

    def is_empty(self, row: int, col: int, h: int, w: int) -> bool:
        """Whether the MS alone says that no output pixel of a window of the frame is valid."""
        if not self.may_have_invalid:
            return False
        with self._lock:
            _, data, _ = read_stack(self._ms, self.origin[0] + row, self.origin[1] + col, h, w)
        return not data.any()

    def bytes_across(self, rows: int) -> int:
        """What of so many MS rows of the frame is to stay in GDAL's cache while tiles are read one
        after the other: all blocks of files whose blocks are as wide as they are."""
        total = 0
        for source, factor in ((self._pan, self.ratio), *((ms, 1) for ms in self._ms)):
            data = source.dataset
            height, width = data.block_shapes[0]
            if width >= data.width:
                itemsize = max(np.dtype(dtype).itemsize for dtype in data.dtypes)
                total += (rows * factor + 2 * height) * data.width * data.count * itemsize
        return total

    @cached_property
    def blocks_with_data(self) -> list[tuple[int, int, int, int]]:
        """(row, col, h, w) of the blocks of the *full* scene's frame, MS pixels, that hold a
        pixel valid in both; reads all of the MS."""
        height, width = self.full_shape
        blocks = [
            (row, col, min(_SEARCH_BLOCK, height - row), min(_SEARCH_BLOCK, width - col))
            for row in range(0, height, _SEARCH_BLOCK)
            for col in range(0, width, _SEARCH_BLOCK)
        ]
        oy, ox = self.origin
        return [b for b in blocks if self.valid_fraction(b[0] - oy, b[1] - ox, b[2], b[3]) > 0]

    def to_output(self, row: int, rows: npt.NDArray) -> tuple[int, npt.NDArray]:
        """Cut a strip (..., n, W) beginning at PAN row `row` of the frame to the output grid.

        Returns (row of the output, rows); n may become 0 where bounds cut the strip away.
        """
        oy, ox = self.offset
        start = max(row, oy)
        stop = max(start, min(row + rows.shape[-2], oy + self.grid.height))
        cut = rows[..., start - row : stop - row, ox : ox + self.grid.width]
        return start - oy, cut

    def identity(self) -> dict[str, object]:
        """What decides about the pixels read, JSON-ready: for fingerprints of resumed runs."""
        sources = [[s.selection.path, list(s.selection.bands), s.row, s.col] for s in [self._pan, *self._ms]]
        return {
            "inputs": self._stamps,
            "sources": sources,
            "grid": [self.grid.height, self.grid.width, *self.grid.transform[:6]],
            "frame": [*self.frame_shape, *self.offset, *self.origin],
            "ratio": self.ratio,
            "shift": list(self.shift),
            "resampling": self.resampling,
            "nodata": None if self.meta.nodata is None else repr(self.meta.nodata),
            "pan_nodata": None if self.pan_meta.nodata is None else repr(self.pan_meta.nodata),
        }

    def close(self) -> None:
        """Close the rasters, after a read that is under way in another thread."""
        with self._lock:
            for source in [self._pan, *self._ms]:
                source.close()

    def __enter__(self) -> "ScenePair":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _stamp(path: str) -> list[object]:
    try:
        stat = os.stat(path)
    except OSError:  # /vsi paths and URLs
        return [path, None, None]
    return [path, stat.st_size, stat.st_mtime_ns]


def sample_windows(pair: ScenePair, count: int = 16, size: int = 64) -> list[tuple[int, int, int, int]]:
    """Up to `count` windows (row, col, h, w), MS pixels of the frame, for scene statistics.

    They lie on a fixed lattice over the *full* scene - with bounds some or all lie outside of
    the frame, at negative positions even - so that a trial run on bounds takes the same scale as
    the full run. Windows less than half valid are passed over; a finer lattice is searched
    before fewer windows, or mostly invalid ones, are returned. Where no lattice meets a valid
    pixel - little data in a very large scene - all of the scene is searched.
    """
    h, w = (min(size, n) for n in pair.full_shape)
    poor: list[tuple[float, tuple[int, int, int, int]]] = []
    seen: set[tuple[int, int]] = set()
    good: list[tuple[int, int, int, int]] = []

    def look(places: Sequence[tuple[int, int]], stride: int = 1) -> bool:
        """Judge the windows there; True once there are enough."""
        for i in range(len(places)):
            place = places[i * stride % len(places)]
            if place in seen:
                continue
            seen.add(place)
            window = (place[0] - pair.origin[0], place[1] - pair.origin[1], h, w)
            share = pair.valid_fraction(*window)
            if share >= 0.5:
                good.append(window)
            elif share > 0:
                poor.append((share, window))
            if len(good) == count:
                return True
        return False

    steps = max(1, ceil(sqrt(count)))
    for lattice in (steps, 2 * steps, 4 * steps):
        places = [
            (top, left)
            for top in _spread(pair.full_shape[0] - h, lattice)
            for left in _spread(pair.full_shape[1] - w, lattice)
        ]
        # A stride coprime to the lattice mixes rows and columns: a cut after `count` still covers.
        if look(places, 2 * lattice + 1 if len(places) == lattice**2 else 1) or good:
            return sorted(good)
    if not poor and look(_within_blocks(pair.blocks_with_data, h, w, count)):
        return sorted(good)
    if good:
        return sorted(good)
    poor.sort(key=lambda item: (-item[0], item[1]))
    return sorted(window for _, window in poor[:count])


def _within_blocks(blocks: Sequence[tuple[int, int, int, int]], h: int, w: int, count: int) -> list[tuple[int, int]]:
    """Starts of windows h x w in up to `count` of the blocks, the middle of each block first."""
    chosen = [blocks[i] for i in _spread(len(blocks), count) if i < len(blocks)]
    inside = [
        [(row + top, col + left) for top in _from_middle(height, h) for left in _from_middle(width, w)]
        for row, col, height, width in chosen
    ]
    return [place for places in zip_longest(*inside) for place in places if place is not None]


def _from_middle(length: int, size: int) -> list[int]:
    """Starts that cover `length` with windows of `size`, those nearest to the middle first."""
    room = max(length - size, 0)
    return sorted({*range(0, room, size), room}, key=lambda start: (abs(start - room / 2), start))


def _spread(room: int, count: int) -> list[int]:
    """Up to `count` different starts in 0..room, cell centres of an even division."""
    return sorted({int(room * (2 * i + 1) / (2 * count)) for i in range(count)})


# ---------------------------------------------------------------------------------------------
# Opening


@dataclass(frozen=True)
class _Placement:
    """Where an MS raster lies, in PAN pixels of the whole PAN."""

    scale: tuple[float, float]
    """PAN pixels per MS pixel (y, x), positive"""
    box: Box
    affine: Affine | None
    """MS (col, row) -> PAN (col, row); None if the CRS differ"""
    transform: Affine
    """of the MS, as read or as assumed"""
    shift: tuple[float, float] = (0.0, 0.0)
    """(dy, dx) PAN pixels by which box and affine were moved, the transform not"""


class _Remarks:
    """Collects the sentences about a pair while it is opened."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.assumptions: list[str] = []

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)

    def assume(self, sentence: str) -> None:
        """A guess; it is a note too."""
        self.note(sentence)
        if sentence not in self.assumptions:
            self.assumptions.append(sentence)


def open_pair(
    pan: str,
    ms: Sequence[str],
    *,
    pan_band: int | None = None,
    ms_bands: Sequence[int] | None = None,
    nodata: float | None = None,
    ratio: int | None = None,
    resampling: str = "cubic",
    shift: tuple[float, float] = (0.0, 0.0),
    bounds: tuple[float, float, float, float] | None = None,
) -> ScenePair:
    """Open a PAN and one or several MS rasters and place them on one frame.

    pan, ms: anything GDAL opens, or `FILE,band=N`; several MS files are stacked in order.
    pan_band: 1-based. ms_bands: 1-based numbers in the stack of all bands of all files, alpha
    included: an alpha band that is named is data, otherwise it is the mask.
    nodata: overrides what the files say, except of a file whose dtype cannot hold it.
    ratio: overrides the rounded one, 1 to 8.
    resampling: name of a `rasterio.enums.Resampling`, for an MS that does not nest.
    shift: (dy, dx) PAN pixels to move the MS content down and right; an MS that nests is moved by
        whole ones and not resampled.
    bounds: (left, bottom, right, top) in the PAN's CRS, widened to whole PAN pixels.

    Raises InputUnreadable, IncompatiblePair.
    """
    if not ms:
        raise IncompatiblePair("No MS raster was given; name one file, or one for each band.")
    if resampling not in Resampling.__members__:
        raise IncompatiblePair(f"Resampling {resampling!r} is unknown; use e.g. cubic or bilinear.")
    if ratio is not None and not 1 <= ratio <= MAX_RATIO:
        raise IncompatiblePair(f"Ratio {ratio} is outside of 1 to {MAX_RATIO}.")
    try:
        with ExitStack() as on_error:
            pair = _open(on_error, pan, ms, pan_band, ms_bands, nodata, ratio, resampling, shift, bounds)
            on_error.pop_all()
    except GDAL_ERRORS as error:
        # Even reading a header item raises what an earlier read left behind in GDAL.
        raise InputUnreadable(
            f"{pan} or {', '.join(ms)} cannot be read (truncated or corrupt?): {reason(error)}."
        ) from error
    return pair


def _open(
    on_error: ExitStack,
    pan: str,
    ms: Sequence[str],
    pan_band: int | None,
    ms_bands: Sequence[int] | None,
    nodata: float | None,
    wanted_ratio: int | None,
    resampling: str,
    shift: tuple[float, float],
    bounds: tuple[float, float, float, float] | None,
) -> ScenePair:
    remarks = _Remarks()
    shift = (float(shift[0]), float(shift[1]))
    pan_data, pan_pick = _open_pan(on_error, pan, pan_band, nodata, remarks)
    groups = _open_ms(on_error, ms, ms_bands, nodata, remarks)
    whole = Grid(
        pan_data.crs,
        pan_data.transform,
        pan_data.width,
        pan_data.height,
        pan_data.tags().get("AREA_OR_POINT", "Area"),
    )
    _refuse_unplaced(pan_data, [data for data, _ in groups])

    places = [_place(whole, pan_data, data, remarks) for data, _ in groups]
    ratio = _choose_ratio(places[0], groups[0][0], groups[0][1].path, wanted_ratio, remarks)
    nesting = [_nested_offset(place, data, ratio) for place, (data, _) in zip(places, groups, strict=True)]
    if shift != (0.0, 0.0) and None not in nesting and len(set(nesting)) == 1:
        # By whole pixels nothing need be resampled, which costs more than half a pixel does.
        shift = (float(round(shift[0])), float(round(shift[1])))
        places = [_moved(place, shift) for place in places]
        nesting = [_nested_offset(place, data, ratio) for place, (data, _) in zip(places, groups, strict=True)]
    full_offset = next((o for o in nesting if o is not None), (0, 0))
    full_shape = (
        ceil((whole.height + full_offset[0]) / ratio),
        ceil((whole.width + full_offset[1]) / ratio),
    )

    sources: list[Source] = []
    extents: list[Box] = []
    for (data, pick), place, own in zip(groups, places, nesting, strict=True):
        _refuse_apart(whole, place, data, pick.path)
        if own == full_offset and place.affine is not None and place.shift == shift:
            source: Source = Source(
                data,
                pick,
                round((place.affine.f + own[0]) / ratio),
                round((place.affine.c + own[1]) / ratio),
            )
            extent = _grown(source, 0.5)
        else:
            source, extent = _warped(
                data, pick, place, whole, ratio, full_offset, full_shape, shift, resampling, remarks
            )
        on_error.callback(source.close)
        sources.append(source)
        extents.append(extent)

    window = (0, 0, whole.height, whole.width)
    if bounds is not None:
        window = _bounds_window(whole, bounds)
    origin, offset, frame_shape = _frame_of(window, full_offset, ratio)
    top, left, height, width = window
    grid = replace(
        whole,
        transform=whole.transform * Affine.translation(left, top),
        width=width,
        height=height,
    )
    return ScenePair(
        grid=grid,
        ratio=ratio,
        offset=offset,
        frame_shape=frame_shape,
        origin=origin,
        full_shape=full_shape,
        full_offset=full_offset,
        pan=Source(pan_data, pan_pick, 0, 0),
        ms=sources,
        extents=extents,
        meta=_ms_meta(groups, nodata),
        pan_meta=_pan_meta(pan_data, pan_pick),
        shift=shift,
        resampling=resampling,
        # Through another CRS the outline of the MS is only roughly known.
        may_have_invalid=any(place.affine is None for place in places)
        or _may_have_invalid(pan_data, pan_pick, groups, extents, window, full_offset, ratio),
        notes=remarks.notes,
        assumptions=remarks.assumptions,
        inputs=list(dict.fromkeys([pan_pick.path, *(pick.path for _, pick in groups)])),
    )


def _open_pan(
    on_error: ExitStack,
    spec: str,
    pan_band: int | None,
    nodata: float | None,
    remarks: _Remarks,
) -> tuple[rasterio.DatasetReader, BandSelection]:
    path, band = parse_band_spec(spec)
    data = on_error.enter_context(open_raster(path))
    band = pan_band if pan_band is not None else band
    if band is None:
        plain = [i for i in data.indexes if i not in alpha_bands(data)]
        if len(plain) > 1:
            raise IncompatiblePair(
                f"The PAN {path} has {len(plain)} bands; choose one with {path},band=N "
                "(or the PAN band option), or check that PAN and MS are not swapped."
            )
        band = plain[0]
    return data, _select(data, path, [band], nodata, remarks)


def _open_ms(
    on_error: ExitStack,
    specs: Sequence[str],
    ms_bands: Sequence[int] | None,
    nodata: float | None,
    remarks: _Remarks,
) -> list[tuple[rasterio.DatasetReader, BandSelection]]:
    """Datasets with the bands taken from each, in the order of the stack."""
    stack: list[tuple[str, int]] = []
    named: set[tuple[str, int]] = set()
    for spec in specs:
        path, band = parse_band_spec(spec)
        with open_raster(path) as data:
            count = data.count
        if band is not None:
            named.add((path, band))
            stack.append((path, band))
        else:
            stack += [(path, i + 1) for i in range(count)]
    if ms_bands is not None:
        wrong = [b for b in ms_bands if not 1 <= b <= len(stack)]
        if wrong or not ms_bands:
            raise IncompatiblePair(
                f"MS band {wrong[0] if wrong else 'list is empty and'} does not exist; "
                f"there are bands 1 to {len(stack)}."
            )
        stack = [stack[b - 1] for b in ms_bands]
        named |= set(stack)

    groups = []
    for path, members in groupby(stack, key=lambda item: item[0]):
        data = on_error.enter_context(open_raster(path))
        alpha = []
        for band in alpha_bands(data):
            if (path, band) in named:
                continue
            if holds_image(data, band):
                # Software marks the fourth of four 8-bit bands alpha by itself.
                remarks.assume(
                    f"Band {band} of {path} is marked alpha but holds an image: it is taken as a band like the others."
                )
                continue
            alpha.append(band)
            remarks.note(f"Band {band} of {path} is marked alpha: it masks the others.")
        bands = [b for _, b in members if b not in alpha]
        if bands:
            groups.append((data, _select(data, path, bands, nodata, remarks)))
    return groups


def _select(
    data: rasterio.DatasetReader,
    path: str,
    bands: Sequence[int],
    nodata: float | None,
    remarks: _Remarks,
) -> BandSelection:
    values: list[float | None] = []
    for band in bands:
        if not 1 <= band <= data.count:
            raise IncompatiblePair(f"{path} has no band {band}; it has bands 1 to {data.count}.")
        dtype = data.dtypes[band - 1]
        if dtype.startswith("complex"):
            raise IncompatiblePair(f"Band {band} of {path} is complex ({dtype}); take its magnitude first.")
        if data.colorinterp[band - 1] == ColorInterp.palette:
            raise IncompatiblePair(
                f"Band {band} of {path} is a colour table, not an image; expand it first: gdal_translate -expand rgb."
            )
        value = usable_nodata(nodata, dtype)
        if value is None:
            value = usable_nodata(data.nodatavals[band - 1], dtype)
            if nodata is not None:
                remarks.note(
                    f"Nodata {nodata:g} does not fit into {path} ({dtype}): "
                    f"{'none' if value is None else f'its own, {value:g},'} is used there."
                )
        values.append(value)
    alpha = [b for b in alpha_bands(data) if b not in bands]
    return BandSelection(path, tuple(bands), tuple(values), has_mask(data), alpha[0] if alpha else None)


def _is_placed(data: rasterio.DatasetReader) -> bool:
    return data.crs is not None or not data.transform.is_identity


def _refuse_unplaced(pan: rasterio.DatasetReader, ms: Sequence[rasterio.DatasetReader]) -> None:
    for data in [pan, *ms]:
        if not data.transform.is_identity:
            continue
        points = len(data.gcps[0])
        if points or data.rpcs is not None:
            what = f"{points} ground control points" if points else "RPCs"
            how = "-tps" if points else "-rpc"
            raise IncompatiblePair(
                f"{data.name} is placed by {what} only; orthorectify it first: gdalwarp {how} IN OUT."
            )
    placed = [_is_placed(data) for data in [pan, *ms]]
    if any(placed) and not all(placed):
        lost = [d.name for d, p in zip([pan, *ms], placed, strict=True) if not p]
        raise IncompatiblePair(
            f"{lost[0]} has no georeferencing but the other raster has; "
            "give it one: gdal_edit.py -a_srs CRS -a_ullr LEFT TOP RIGHT BOTTOM."
        )


def _place(whole: Grid, pan: rasterio.DatasetReader, ms: rasterio.DatasetReader, remarks: _Remarks) -> _Placement:
    if not _is_placed(ms):
        return _place_by_size(pan, ms, remarks)
    if _same_crs(pan.crs, ms.crs):
        if pan.crs is None and ms.crs is None:
            remarks.assume(f"Neither the PAN nor {ms.name} names a CRS; one and the same is assumed.")
        elif pan.crs is None or ms.crs is None:
            lost, other = (pan, ms) if pan.crs is None else (ms, pan)
            remarks.assume(f"{lost.name} names no CRS; that of {other.name} is assumed.")
        affine = ~whole.transform * ms.transform
        skew = max(abs(affine.b) * ms.height, abs(affine.d) * ms.width)
        if skew > _NEST_TOLERANCE:
            raise IncompatiblePair(
                f"PAN and {ms.name} are rotated against each other ({skew:.2f} PAN pixels over "
                "the scene); warp both to a north-up grid first: gdalwarp IN OUT."
            )
        return _Placement((abs(affine.e), abs(affine.a)), _box_through(affine, ms), affine, ms.transform)
    rotated = [d.name for d in (pan, ms) if abs(d.transform.b) + abs(d.transform.d) > 1e-9 * d.res[0]]
    if rotated:
        raise IncompatiblePair(
            f"{rotated[0]} is rotated and the CRS differ; warp it to a north-up grid first: gdalwarp IN OUT."
        )
    remarks.note(
        f"{ms.name} is in {_crs_name(ms.crs)}, the PAN in {_crs_name(pan.crs)}: the MS is resampled to the PAN's."
    )
    return _place_by_crs(whole, pan, ms)


def _place_by_size(pan: rasterio.DatasetReader, ms: rasterio.DatasetReader, remarks: _Remarks) -> _Placement:
    """No georeferencing at all: the same corner, if the sizes are exact multiples."""
    ry, rx = pan.height / ms.height, pan.width / ms.width
    if ry != rx or ry != int(ry):
        raise IncompatiblePair(
            f"Neither raster is georeferenced and the PAN's {pan.width} x {pan.height} pixels are "
            f"no exact multiple of the MS's {ms.width} x {ms.height}; georeference both."
        )
    remarks.assume(f"Neither raster is georeferenced: the same corner and a ratio of {int(ry)} are assumed.")
    affine = Affine.scale(ry)
    return _Placement((ry, rx), _box_through(affine, ms), affine, affine)


def _box_through(affine: Affine, ms: rasterio.DatasetReader) -> Box:
    (x0, y0), (x1, y1) = affine * (0, 0), affine * (ms.width, ms.height)
    return min(y0, y1), min(x0, x1), max(y0, y1), max(x0, x1)


def _place_by_crs(whole: Grid, pan: rasterio.DatasetReader, ms: rasterio.DatasetReader) -> _Placement:
    """Outline and pixel size of an MS in another CRS, through the inverse PAN transform."""
    try:
        back = transform_bounds(pan.crs, ms.crs, *whole.bounds)
        west, south, east, north = _common(back, ms.bounds)
        x, y = (west + east) / 2, (south + north) / 2
        steps = ms.transform
        xs, ys = transform_points(ms.crs, pan.crs, [x, x + steps.a, x], [y, y, y + steps.e])
        box = transform_bounds(ms.crs, pan.crs, west, south, east, north)
    except GDAL_ERRORS as error:
        raise IncompatiblePair(
            f"{ms.name} in {_crs_name(ms.crs)} cannot be transformed to the PAN's "
            f"{_crs_name(pan.crs)}; warp it first: gdalwarp -t_srs."
        ) from error
    cells = [~whole.transform * p for p in zip(xs, ys, strict=True)]
    corners = [~whole.transform * p for p in [(box[0], box[3]), (box[2], box[1])]]
    numbers = [v for p in [*cells, *corners] for v in p]
    if not all(isfinite(v) for v in numbers):
        raise _apart(whole, ms.name, ms.bounds, ms.crs)
    (x0, y0), (xa, ya), (xb, yb) = cells
    ys_, xs_ = [c[1] for c in corners], [c[0] for c in corners]
    return _Placement(
        (hypot(xb - x0, yb - y0), hypot(xa - x0, ya - y0)),
        (min(ys_), min(xs_), max(ys_), max(xs_)),
        None,
        ms.transform,
    )


def _common(
    a: tuple[float, float, float, float], b: tuple[float, float, float, float]
) -> tuple[float, float, float, float]:
    """Intersection of two bounds, or `b` where there is none (refused later, with numbers)."""
    west, south, east, north = (max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    return (west, south, east, north) if west < east and south < north else b


def _same_crs(a: CRS | None, b: CRS | None) -> bool:
    if a is None or b is None or a == b:
        return True
    code = a.to_epsg()
    return code is not None and code == b.to_epsg()


def _crs_name(crs: CRS | None) -> str:
    if crs is None:
        return "no CRS"
    code = crs.to_epsg()
    return f"EPSG:{code}" if code else "a custom CRS"


def _choose_ratio(
    place: _Placement,
    ms: rasterio.DatasetReader,
    path: str,
    wanted: int | None,
    remarks: _Remarks,
) -> int:
    ry, rx = place.scale
    mean = sqrt(ry * rx)
    size = f"{path}: an MS pixel is {ry:.4g} x {rx:.4g} PAN pixels"
    if mean < 0.75:
        raise IncompatiblePair(f"{size}; the MS is finer than the PAN: are the two files swapped?")
    if wanted is None:
        if round(ry) != round(rx) and place.affine is not None:
            raise IncompatiblePair(
                f"{size}, which differs between rows and columns; resample the MS to square "
                "pixels or give the ratio to work at."
            )
        wanted = round(mean)
        repeats = _pixel_repeats(ms)
        if repeats > 1 and 1 < wanted * repeats <= MAX_RATIO:
            remarks.assume(
                f"{path} was enlarged by repeating every pixel {repeats} times; it is averaged "
                f"back to ratio {wanted * repeats}, give the true ratio if it is another."
            )
            return wanted * repeats
        if wanted > MAX_RATIO:
            raise IncompatiblePair(f"{size}; ratios up to {MAX_RATIO} are supported, give a ratio to resample to.")
        if wanted <= 1:
            wanted = DEFAULT_RATIO
            remarks.assume(
                f"{path} lies on the PAN grid already; it is averaged back to ratio {wanted}, "
                "give the true ratio if it is another."
            )
    elif round(mean) != wanted:
        remarks.note(f"{size}; it is resampled to the given ratio {wanted}.")
    return wanted


def _pixel_repeats(ms: rasterio.DatasetReader) -> int:
    """How often pixels were repeated along each axis to enlarge this raster; 1 if they were not.

    Looks at the lengths of runs of equal values in the middle of the first band: an enlarged
    raster has hardly any run shorter than the factor, and runs of just the factor abound.
    """
    h, w = min(ms.height, 256), min(ms.width, 256)
    window = Window((ms.width - w) // 2, (ms.height - h) // 2, w, h)
    try:
        values = ms.read(1, window=window)
    except GDAL_ERRORS as error:
        raise InputUnreadable(f"{ms.name} cannot be read (truncated or corrupt?): {reason(error)}.") from error
    found: list[int] = []
    for lines in (values, values.T):
        changes = [np.flatnonzero(line[1:] != line[:-1]) for line in lines]
        runs = np.concatenate([np.diff(c) for c in changes])
        if runs.size < 64:
            return 1
        counts = np.bincount(np.minimum(runs, MAX_RATIO + 1), minlength=MAX_RATIO + 2)
        factor = int(counts.argmax())
        short, exact = counts[:factor].sum() / runs.size, counts[factor] / runs.size
        found.append(factor if factor <= MAX_RATIO and short < 0.05 and exact > 0.5 else 1)
    return found[0] if found[0] == found[1] else 1


def _nested_offset(place: _Placement, ms: rasterio.DatasetReader, ratio: int) -> tuple[int, int] | None:
    """(oy, ox) of the full frame under which this MS needs no resampling, or None."""
    a = place.affine
    if a is None:
        return None
    drift = max(abs(a.a - ratio) * ms.width, abs(a.e - ratio) * ms.height)
    off = max(abs(a.f - round(a.f)), abs(a.c - round(a.c)))
    if drift > _NEST_TOLERANCE or off > _NEST_TOLERANCE:
        return None
    return -round(a.f) % ratio, -round(a.c) % ratio


def _moved(place: _Placement, shift: tuple[float, float]) -> _Placement:
    """Placed so many PAN pixels further down and right."""
    assert place.affine is not None
    top, left, bottom, right = place.box
    dy, dx = shift
    box = (top + dy, left + dx, bottom + dy, right + dx)
    return replace(place, box=box, affine=Affine.translation(dx, dy) * place.affine, shift=shift)


def _grown(source: Source, by: float) -> Box:
    return (
        source.row - by,
        source.col - by,
        source.row + source.height + by,
        source.col + source.width + by,
    )


def _warped(
    data: rasterio.DatasetReader,
    pick: BandSelection,
    place: _Placement,
    whole: Grid,
    ratio: int,
    offset: tuple[int, int],
    full_shape: tuple[int, int],
    shift: tuple[float, float],
    resampling: str,
    remarks: _Remarks,
) -> tuple[Source, Box]:
    """The MS through a WarpedVRT on the full frame's grid, and where it may give output."""
    top, bottom = ((v + offset[0] + shift[0]) / ratio for v in (place.box[0], place.box[2]))
    left, right = ((v + offset[1] + shift[1]) / ratio for v in (place.box[1], place.box[3]))
    if place.affine is not None:
        # Pixels whose centres lie inside: outside of them GDAL gives nothing.
        t, b = ceil(top - 0.5 + 1e-6), floor(bottom - 0.5 - 1e-6) + 1
        l_, r = ceil(left - 0.5 + 1e-6), floor(right - 0.5 - 1e-6) + 1
    else:
        t, b, l_, r = floor(top), ceil(bottom), floor(left), ceil(right)
    t, b = max(t, -_CONTEXT), min(b, full_shape[0] + _CONTEXT)
    l_, r = max(l_, -_CONTEXT), min(r, full_shape[1] + _CONTEXT)
    if b <= t or r <= l_:
        raise _apart(whole, pick.path, data.bounds, data.crs)
    scale = (place.scale[0] / ratio, place.scale[1] / ratio)
    finer = sqrt(scale[0] * scale[1]) < 0.75
    method = Resampling.average if finer else Resampling[resampling]
    source = WarpedSource(
        data,
        pick,
        t,
        l_,
        crs=whole.crs or data.crs,
        same_crs=place.affine is not None,
        src_transform=place.transform,
        transform=whole.transform
        * Affine.translation(l_ * ratio - offset[1] - shift[1], t * ratio - offset[0] - shift[0])
        * Affine.scale(ratio),
        shape=(b - t, r - l_),
        scale=scale,
        resampling=method,
    )
    why = (
        "moved by ({:+.2f}, {:+.2f}) PAN pixels (y, x)".format(*shift)
        if any(shift)
        else (
            f"{place.scale[0]:.4f} x {place.scale[1]:.4f} PAN pixels large, at offset "
            f"({place.box[0]:.2f}, {place.box[1]:.2f})"
        )
    )
    remarks.note(f"{pick.path} is resampled ({method.name}) to nest in the PAN grid: {why}.")
    if place.affine is None:
        return source, _grown(source, 0.0)
    return source, (top - 0.5, left - 0.5, bottom + 0.5, right + 0.5)


def _refuse_apart(whole: Grid, place: _Placement, ms: rasterio.DatasetReader, path: str) -> None:
    top, left, bottom, right = place.box
    if bottom <= 0 or right <= 0 or top >= whole.height or left >= whole.width:
        raise _apart(whole, path, ms.bounds, ms.crs)


def _apart(whole: Grid, path: str, bounds: Sequence[float], crs: CRS | None) -> IncompatiblePair:
    def show(values: Sequence[float]) -> str:
        return "(" + ", ".join(f"{v:.10g}" for v in values) + ")"

    return IncompatiblePair(
        f"PAN and {path} do not overlap: bounds {show(whole.bounds)} in {_crs_name(whole.crs)} "
        f"and {show(bounds)} in {_crs_name(crs)}; check that they show the same place."
    )


def _bounds_window(whole: Grid, bounds: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """(row, col, height, width) in PAN pixels, widened to whole pixels and cut to the PAN."""
    left, bottom, right, top = bounds
    if not (left < right and bottom < top):
        raise IncompatiblePair(
            f"Bounds {left:g} {bottom:g} {right:g} {top:g} are empty; the order is left bottom right top."
        )
    corners = [~whole.transform * (x, y) for x in (left, right) for y in (bottom, top)]
    xs, ys = [c[0] for c in corners], [c[1] for c in corners]
    c0, c1 = max(0, floor(min(xs) + 1e-6)), min(whole.width, ceil(max(xs) - 1e-6))
    r0, r1 = max(0, floor(min(ys) + 1e-6)), min(whole.height, ceil(max(ys) - 1e-6))
    if c0 >= c1 or r0 >= r1:
        raise IncompatiblePair(
            f"Bounds {left:.10g} {bottom:.10g} {right:.10g} {top:.10g} lie outside of the PAN "
            "({:.10g} {:.10g} {:.10g} {:.10g}); give them in the PAN's CRS.".format(*whole.bounds)
        )
    return r0, c0, r1 - r0, c1 - c0


def _frame_of(
    window: tuple[int, int, int, int], full_offset: tuple[int, int], ratio: int
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """(origin, offset, frame shape) of an output window of the PAN."""
    origin, offset, shape = [], [], []
    for start, length, o in zip(window[:2], window[2:], full_offset, strict=True):
        first = (start + o) // ratio // ORIGIN_STEP * ORIGIN_STEP
        origin.append(first)
        offset.append(start + o - first * ratio)
        shape.append(ceil((offset[-1] + length) / ratio))
    return (origin[0], origin[1]), (offset[0], offset[1]), (shape[0], shape[1])


def _may_have_invalid(
    pan: rasterio.DatasetReader,
    pan_pick: BandSelection,
    groups: Sequence[tuple[rasterio.DatasetReader, BandSelection]],
    extents: Sequence[Box],
    window: tuple[int, int, int, int],
    offset: tuple[int, int],
    ratio: int,
) -> bool:
    if any(pick.may_have_holes for pick in [pan_pick, *(pick for _, pick in groups)]):
        return True
    dtypes = [pan.dtypes[pan_pick.bands[0] - 1]]
    dtypes += [data.dtypes[b - 1] for data, pick in groups for b in pick.bands]
    if any(np.dtype(dtype).kind == "f" for dtype in dtypes):
        return True  # NaN and inf need no announcement
    first = [(start + o + 0.5) / ratio for start, o in zip(window[:2], offset, strict=True)]
    last = [(start + size + o - 0.5) / ratio for start, size, o in zip(window[:2], window[2:], offset, strict=True)]
    return any(
        first[0] < top or first[1] < left or last[0] > bottom or last[1] > right for top, left, bottom, right in extents
    )


# ---------------------------------------------------------------------------------------------
# Metadata


def _nbits(data: rasterio.DatasetReader, band: int) -> int | None:
    text = data.tags(band, ns="IMAGE_STRUCTURE").get("NBITS")
    text = text or data.tags(ns="IMAGE_STRUCTURE").get("NBITS")
    return int(text) if text and text.isdigit() else None


def _pan_meta(data: rasterio.DatasetReader, pick: BandSelection) -> PanMeta:
    band = pick.bands[0]
    return PanMeta(data.dtypes[band - 1], pick.nodata[0], _nbits(data, band), dict(data.tags()))


def _ms_meta(groups: Sequence[tuple[rasterio.DatasetReader, BandSelection]], nodata: float | None) -> MsMeta:
    each = [(data, pick, b) for data, pick in groups for b in pick.bands]
    dtype = str(np.result_type(*(np.dtype(data.dtypes[b - 1]) for data, _, b in each)))
    values = [nodata, *(n for _, p in groups for n in p.nodata)]
    usable = [n for n in (usable_nodata(v, dtype) for v in values) if n is not None]
    bits = [_nbits(data, b) for data, _, b in each]
    known_bits = [b for b in bits if b is not None]
    separate = len(groups) > 1
    tags: dict[str, str] = {}
    for data, _ in groups:
        tags = {**data.tags(), **tags}
    colorinterp = [data.colorinterp[b - 1] for data, _, b in each]
    return MsMeta(
        dtype=dtype,
        nodata=usable[0] if usable else None,
        descriptions=tuple(
            # Separate band files are told apart by their names.
            data.descriptions[b - 1] or (Path(pick.path).stem if separate and len(pick.bands) == 1 else None)
            for data, pick, b in each
        ),
        colorinterp=tuple(
            ColorInterp.undefined if c == ColorInterp.alpha or (i > 0 and c == ColorInterp.gray) else c
            for i, c in enumerate(colorinterp)
        ),
        scales=tuple(data.scales[b - 1] for data, _, b in each),
        offsets=tuple(data.offsets[b - 1] for data, _, b in each),
        units=tuple(data.units[b - 1] or None for data, _, b in each),
        band_tags=tuple(dict(data.tags(b)) for data, _, b in each),
        tags=tags,
        nbits=max(known_bits) if len(known_bits) == len(bits) else None,
    )
