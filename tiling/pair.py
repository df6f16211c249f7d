"""A PAN/MS pair on one frame: opening, reading, and windows for scene statistics."""

import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, zip_longest
from math import ceil, sqrt
from typing import Protocol

import numpy as np
from rasterio.enums import Resampling
from rasterio.io import DatasetReader

from uknowpan.tiling.assembly import joined
from uknowpan.tiling.errors import IncompatiblePair, InputUnreadable
from uknowpan.tiling.fill import (
    FILL_REACH,
    AnyArray,
    BoolArray,
    DoubleArray,
    FloatArray,
    TileArrays,
    fill_invalid,
    output_valid,
)
from uknowpan.tiling.globe import Bounds, cut_opposite
from uknowpan.tiling.identity import files_behind, stamp
from uknowpan.tiling.metadata import MsMeta, PanMeta, ms_meta, pan_meta
from uknowpan.tiling.placing import (
    MAX_RATIO,
    Target,
    bounds_window,
    choose_ratio,
    place_on_pan,
    refuse_unplaced,
)
from uknowpan.tiling.raster import (
    GDAL_ERRORS,
    Assembly,
    Opener,
    Raster,
    RasterLike,
    Remarks,
    Source,
    alpha_bands,
    holds_image,
    read_stack,
    reason,
    select_bands,
)
from uknowpan.tiling.rpcs import AT_OFFSET, Surface
from uknowpan.tiling.window import Frame, Grid, Window

_SEARCH_BLOCK = 512
"""MS pixels; blocks of this side are searched for data where samples met none."""


class Displacement(Protocol):
    """Where an MS lies off its PAN, in PAN pixels: it shows at x + d(x) what the PAN shows at x."""

    @property
    def own_bands(self) -> bool:
        """Whether each band has a displacement of its own."""

    @property
    def bound(self) -> float:
        """A number that no displacement exceeds along an axis."""

    def over(self, row: int, col: int, height: int, width: int, band: int | None = None) -> DoubleArray:
        """(2, height, width) of a window of the full scene's frame; None: the bands' common displacement."""


@dataclass(eq=False)
class ScenePair(AbstractContextManager["ScenePair"]):
    """An opened pair; made by `open_pair`, used as a context manager. Reads are serialised."""

    grid: Grid
    """the output: the PAN grid, cut by bounds"""
    frame: Frame
    """the MS pixels that hold the output; noise is a function of its origin + position in it"""
    pan_source: Source
    ms_sources: Sequence[Source]
    pan_meta: PanMeta
    meta: MsMeta
    resampling: str
    notes: list[str]
    """what was assumed or done, one sentence each"""
    assumptions: list[str]
    """those of the notes that are guesses and may be wrong"""
    closing: ExitStack
    inputs: list[str]
    """the files that were given, and those behind assemblies"""
    clouds: tuple[Source, int] | None = None
    """flags on the frame and the bits of clouds and shadows, which registration and statistics leave out"""
    each_band: bool = False
    """an output pixel is valid band by band, not only where all bands are"""
    mask_clouds: bool = False
    """clouds and shadows are invalid in the output too"""

    def __post_init__(self) -> None:
        frame = self.frame
        self.ratio, self.offset, self.origin = frame.ratio, frame.offset, frame.origin
        self.frame_shape, self.full_shape = frame.shape, frame.full_shape
        self.bands = len(self.meta.descriptions)
        self.nested = not any(source.warped for source in self.ms_sources)
        """the MS is read as it is, without resampling"""
        self._sources = [self.pan_source, *self.ms_sources]
        self.may_have_invalid = (
            self.mask_clouds or any(source.may_have_holes for source in self._sources) or self._extrapolates()
        )
        """whether an output pixel can come out invalid, as far as headers and geometry show"""
        self._stamps = [stamp(path) for path in dict.fromkeys([*self.inputs, *files_behind(self.inputs)])]
        self._lock = threading.RLock()
        self.displacement: Displacement | None = None
        """where the MS lies off the PAN; validity follows it"""

    def _extrapolates(self) -> bool:
        """Whether the output holds pixels for which the MS is too far away."""
        start = [o * self.ratio + inner for o, inner in zip(self.origin, self.offset, strict=True)]
        first = [(s + 0.5) / self.ratio for s in start]
        last = [(s + n - 0.5) / self.ratio for s, n in zip(start, self.grid.shape, strict=True)]
        return any(
            first[0] < top or first[1] < left or last[0] > bottom or last[1] > right
            for top, left, bottom, right in (source.extent for source in self.ms_sources)
        )

    def read_frame(self, row: int, col: int, height: int, width: int, margin: int = 0) -> TileArrays:
        """Read height x width MS pixels at (row, col) of the frame and `margin` more on every side.

        The arrays cover (height + 2 margin, width + 2 margin) MS pixels. Any position may be asked for: outside of
        bounds it is the scene's own data, outside of the scene its reflection. Invalid pixels take neighbouring values
        `FILL_REACH` MS pixels deep, beyond that the scene's mean (`fill_values`). Raises InputUnreadable.
        """
        window = self.frame.in_scene(Window(row, col, height, width).grown(margin))
        pan_window = self.frame.on_pan(window)
        with self._lock:  # no closing between the two
            pan, pan_data, pan_inside = self._read([self.pan_source], pan_window)
            ms, ms_data, ms_inside = read_stack(self.ms_sources, window)
        if not pan_data.all():
            pan = self._filled([self.pan_source], pan_window, FILL_REACH * self.ratio, self.fill_values[0])
        pan_valid = pan_data & pan_inside
        clear = self._clear(window)
        shown = clear if self.mask_clouds else np.True_
        ms_valid = np.logical_and.reduce(ms_data & ms_inside) & clear
        if self.each_band:  # a source is a band
            for band, source in enumerate(self.ms_sources):
                if not ms_data[band].all():
                    ms[band] = self._filled([source], window, FILL_REACH, self.fill_values[1][band : band + 1])[0]
            each = [
                self._valid(pan_valid, data & shown, window, band) & self._within_extents([source], window)
                for band, (data, source) in enumerate(zip(ms_data, self.ms_sources, strict=True))
            ]
            return TileArrays(pan, ms, pan_valid, ms_valid, np.logical_or.reduce(each), np.stack(each))
        if not ms_data.all():
            ms = self._filled(self.ms_sources, window, FILL_REACH, self.fill_values[1])
        valid = self._valid(pan_valid, np.logical_and.reduce(ms_data) & shown, window)
        return TileArrays(pan, ms, pan_valid, ms_valid, valid & self._within_extents(self.ms_sources, window))

    def _clear(self, window: Window) -> BoolArray | np.bool_:
        """(h, w): neither cloud nor shadow is flagged; True where nothing is known of clouds."""
        if self.clouds is None:
            return np.True_
        source, bits = self.clouds
        flags, known, _ = self._read([source], window)
        clear: BoolArray = np.where(known, flags[0], 0).astype(np.int64) & bits == 0
        return clear

    def _valid(self, pan_valid: BoolArray, ms_data: BoolArray, window: Window, band: int | None = None) -> BoolArray:
        """(H, W): PAN and MS are valid where they show the same place; None: all bands together."""
        field = self.displacement
        if field is None or ms_data.all():
            return output_valid(pan_valid, ms_data, self.ratio)
        bands = [None] if not field.own_bands else range(self.bands) if band is None else [band]
        fields = (field.over(*window.scaled(self.ratio), b) for b in bands)
        valid: BoolArray = np.logical_and.reduce([output_valid(pan_valid, ms_data, self.ratio, off) for off in fields])
        return valid

    def _read(self, sources: Sequence[Source], window: Window) -> tuple[FloatArray, BoolArray, BoolArray]:
        """Values (C, h, w), and data and inside (h, w) of all sources together."""
        with self._lock:
            values, data, inside = read_stack(sources, window)
        return values, np.logical_and.reduce(data), np.logical_and.reduce(inside)

    def _filled(self, sources: Sequence[Source], window: Window, reach: int, constants: FloatArray) -> FloatArray:
        """Reads `reach` pixels more on every side, so that filling does not depend on the tile."""
        values, data, _ = self._read(sources, window.grown(reach))
        filled = fill_invalid(values, data, reach, constants)
        return np.ascontiguousarray(filled[:, reach:-reach, reach:-reach])

    def _within_extents(self, sources: Sequence[Source], window: Window) -> BoolArray:
        y = window.row + (np.arange(window.height * self.ratio) + 0.5) / self.ratio
        x = window.col + (np.arange(window.width * self.ratio) + 0.5) / self.ratio
        inside = np.ones((y.size, x.size), bool)
        for top, left, bottom, right in (source.extent for source in sources):
            inside &= ((y >= top) & (y <= bottom))[:, None] & ((x >= left) & (x <= right))
        return inside

    @cached_property
    def fill_values(self) -> tuple[FloatArray, FloatArray]:
        """Means of valid pixels, (1,) of the PAN and (C,) of the MS, over a few sample windows of the full scene (so
        that bounds do not change them); 0 where nothing is valid."""
        sums, counts = np.zeros(1 + self.bands), np.zeros(1 + self.bands)
        for sample in sample_windows(self, 9, 32):
            window = self.frame.in_scene(sample)
            pan, pan_data, _ = self._read([self.pan_source], self.frame.on_pan(window))
            sums[0] += pan[0][pan_data].sum(dtype=float)
            counts[0] += pan_data.sum()
            band = 1
            for sources in [[s] for s in self.ms_sources] if self.each_band else [self.ms_sources]:
                ms, ms_data, _ = self._read(sources, window)
                sums[band : band + len(ms)] += ms[:, ms_data].sum(axis=1, dtype=float)
                counts[band : band + len(ms)] += ms_data.sum()
                band += len(ms)
        means = (sums / np.maximum(counts, 1)).astype(np.float32)
        return means[:1], means[1:]

    def valid_fraction(self, row: int, col: int, height: int, width: int, whole: bool = True) -> float:
        """Share of the MS pixels in a window of the frame where MS and PAN are both valid; cheaper than `read_frame`,
        nothing is filled.

        whole: all of an MS pixel's PAN pixels must be valid, not just any.
        """
        window, r = self.frame.in_scene(Window(row, col, height, width)), self.ratio
        _, data, inside = self._read(self.ms_sources, window)
        valid = data & inside & self._clear(window)
        if valid.any():
            _, data, inside = self._read([self.pan_source], self.frame.on_pan(window))
            blocks = (data & inside).reshape(height, r, width, r)
            valid &= blocks.all(axis=(1, 3)) if whole else blocks.any(axis=(1, 3))
        return float(valid.mean())

    def is_empty(self, row: int, col: int, height: int, width: int) -> bool:
        """Whether the MS alone shows that no output pixel of a window of the frame is valid."""
        if not self.may_have_invalid:
            return False
        beyond = 0 if self.displacement is None else ceil(self.displacement.bound / self.ratio) + 1
        window = self.frame.in_scene(Window(row, col, height, width).grown(beyond))
        with self._lock:
            _, data, _ = read_stack(self.ms_sources, window)
        return not (data.any() if self.each_band else data.all(axis=0).any())

    def bytes_across(self, rows: int) -> int:
        """Bytes under `rows` MS rows of the frame that GDAL's cache should hold while tiles are read one after the
        other: all blocks of files whose blocks are as wide as they are."""
        total = 0
        for source in {id(source.raster.dataset): source for source in self._sources}.values():
            data = source.raster.dataset
            height, width = data.block_shapes[0]
            if width >= data.width:
                itemsize = max(np.dtype(dtype).itemsize for dtype in data.dtypes)
                own_rows = rows * (self.ratio if source is self.pan_source else 1)
                total += (own_rows + 2 * height) * data.width * data.count * itemsize
        return total

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of each file, which GDAL reads whole."""
        total = 0
        for data in {id(source.raster.dataset): source.raster.dataset for source in self._sources}.values():
            height, width = data.block_shapes[0]
            total += height * width * data.count * max(np.dtype(dtype).itemsize for dtype in data.dtypes)
        return total

    def blocks_with_data(self, whole: bool = True) -> list[Window]:
        """Blocks of the *full* scene's frame, MS pixels, that hold a pixel valid in both; reads all of the MS."""
        height, width = self.full_shape
        blocks = [
            Window(row, col, min(_SEARCH_BLOCK, height - row), min(_SEARCH_BLOCK, width - col))
            for row in range(0, height, _SEARCH_BLOCK)
            for col in range(0, width, _SEARCH_BLOCK)
        ]
        return [block for block in blocks if self.valid_fraction(*self.from_scene(block), whole) > 0]

    def from_scene(self, window: Window) -> Window:
        """A window of the full scene's frame as one of this frame."""
        return window.moved(-self.origin[0], -self.origin[1])

    def to_output(self, row: int, rows: AnyArray, col: int = 0) -> tuple[int, AnyArray]:
        """Cut a strip (..., n, w) beginning at PAN row `row`, column `col` of the frame to the output grid.

        Returns (row of the output, rows); n and w may become 0 where bounds cut the strip away.
        """
        oy, ox = self.offset
        start = max(row, oy)
        stop = max(start, min(row + rows.shape[-2], oy + self.grid.height))
        return start - oy, rows[..., start - row : stop - row, max(ox - col, 0) : ox + self.grid.width - col]

    def identity(self) -> dict[str, object]:
        """Everything that decides about the pixels read, JSON-ready: for fingerprints of resumed runs."""
        return {
            "inputs": self._stamps,
            "sources": [[s.raster.path, list(s.raster.bands), s.row, s.col, *s.points] for s in self._sources],
            "grid": [self.grid.height, self.grid.width, *self.grid.transform[:6]],
            "rpcs": None if self.grid.rpcs is None else self.grid.rpcs.to_dict(),
            "frame": [*self.frame_shape, *self.offset, *self.origin],
            "ratio": self.ratio,
            "resampling": self.resampling,
            "clouds": None if self.clouds is None else self.clouds[1],
            "mask_clouds": self.mask_clouds,
            "valid": "any" if self.each_band else "all",
            "nodata": None if self.meta.nodata is None else repr(self.meta.nodata),
            "pan_nodata": None if self.pan_meta.nodata is None else repr(self.pan_meta.nodata),
        }

    def check_unchanged(self) -> None:
        """Raise InputUnreadable where an input is no longer the file that was opened."""
        for before in self._stamps:
            if stamp(str(before[0])) != before:
                raise InputUnreadable(f"{before[0]} changed while it was read; run again once it is complete.")

    def close(self) -> None:
        """Close the rasters, after a read that is under way in another thread."""
        with self._lock:
            self.closing.close()

    def __exit__(self, *_: object) -> None:
        self.close()


def open_pair(
    pan: RasterLike,
    ms: RasterLike | Sequence[RasterLike],
    *,
    pan_band: int | None = None,
    ms_bands: Sequence[int] | None = None,
    nodata: float | None = None,
    ratio: int | None = None,
    resampling: str = "cubic",
    bounds: Bounds | None = None,
    valid: str = "all",
    clouds: tuple[str, int] | None = None,
    mask_clouds: bool = False,
    surface: Surface = AT_OFFSET,
) -> ScenePair:
    """Open a PAN and one or several MS rasters and place them on one frame.

    Args:
        pan, ms: anything GDAL opens, `FILE,band=N`, or open datasets, which are not closed; several MS
            rasters are stacked in order, or joined where they are tiles that lie side by side.
        pan_band: 1-based.
        ms_bands: 1-based numbers in the stack of all bands of all files, alpha included: an alpha band
            that is named is data, otherwise it is the mask.
        nodata: overrides what the files declare, except of a file whose dtype cannot hold it.
        ratio: overrides the rounded one, 1 to 8.
        resampling: name of a `rasterio.enums.Resampling`, for an MS that does not nest.
        bounds: (left, bottom, right, top) in the PAN's CRS, widened to whole PAN pixels.
        valid: an output pixel is valid where "all" bands are, or, band by band, where "any" is.
        clouds: a raster of flags, and the bits of clouds and shadows. Registration and statistics leave these out;
            the output has them.
        mask_clouds: they are invalid in the output too.
        surface: the ground of a pair in sensor geometry.

    Raises:
        InputUnreadable, IncompatiblePair: files that cannot be opened, or do not fit.
    """
    specs: list[RasterLike] = list(ms) if isinstance(ms, Sequence) and not isinstance(ms, str) else [ms]
    if not specs:
        raise IncompatiblePair("No MS raster was given; name one file, or one for each band.")
    if resampling not in Resampling.__members__:
        raise IncompatiblePair(f"Resampling {resampling!r} is unknown; use e.g. cubic or bilinear.")
    if valid not in ("all", "any"):
        raise IncompatiblePair(f"A pixel is valid where all or any of its bands are, not {valid!r}.")
    if ratio is not None and not 1 <= ratio <= MAX_RATIO:
        raise IncompatiblePair(f"Ratio {ratio} is outside of 1 to {MAX_RATIO}.")
    try:
        with ExitStack() as closing:
            opener, remarks = Opener(closing), Remarks()
            specs = joined(specs, nodata)
            pan_raster = _open_pan(opener, pan, pan_band, nodata, remarks)
            rasters = _open_ms(opener, specs, ms_bands, nodata, remarks)
            refuse_unplaced(pan_raster, rasters)
            each = valid == "any"
            target, sources = _on_one_frame(closing, pan_raster, rasters, ratio, resampling, each, remarks, surface)
            flags = None if clouds is None else (_flags(opener, pan_raster, target, clouds[0]), clouds[1])
            whole = target.pan
            window = Window(0, 0, *whole.shape) if bounds is None else bounds_window(whole, bounds)
            return ScenePair(
                grid=whole.cut(window),
                frame=target.frame.cut(window),
                pan_source=Source.native(pan_raster),
                ms_sources=sources,
                pan_meta=pan_meta(pan_raster),
                meta=ms_meta(rasters, nodata),
                resampling=resampling,
                notes=remarks.notes,
                assumptions=remarks.assumptions,
                closing=closing.pop_all(),
                inputs=_files([pan, *specs], [pan_raster, *rasters], clouds and clouds[0], surface.dem),
                clouds=flags,
                mask_clouds=mask_clouds,
                each_band=valid == "any",
            )
    except GDAL_ERRORS as error:
        # Even reading a header item raises what an earlier read left behind in GDAL.
        names = [str(spec) if isinstance(spec, str | os.PathLike) else spec.name for spec in [pan, *specs]]
        raise InputUnreadable(
            f"{names[0]} or {', '.join(names[1:])} cannot be read (truncated or corrupt?): {reason(error)}."
        ) from error


def _files(specs: Sequence[RasterLike], rasters: Sequence[Raster], *more: str | None) -> list[str]:
    """The files that the rasters in use depend on, and others that are not None."""
    behind = {spec.name: spec.files for spec in specs if isinstance(spec, Assembly)}
    files = dict.fromkeys(file for raster in rasters for file in behind.get(raster.path, (raster.path,)))
    return [*files, *(path for path in more if path is not None)]


def _on_one_frame(
    closing: ExitStack,
    pan: Raster,
    rasters: Sequence[Raster],
    wanted_ratio: int | None,
    resampling: str,
    each: bool,
    remarks: Remarks,
    surface: Surface,
) -> tuple[Target, list[Source]]:
    """The full scene's frame, and each MS raster on it."""
    if wanted_ratio != 1:  # a ratio of 1 sharpens nothing: the images are wanted side by side
        _refuse_same(pan, rasters)
    whole = pan.grid
    rasters = [cut_opposite(closing, whole, raster) for raster in rasters]
    places = [place_on_pan(whole, pan, raster, remarks, surface) for raster in rasters]
    ratio = choose_ratio(places[0], rasters[0], wanted_ratio, remarks)
    offsets = [place.nested_offset(raster, ratio) for place, raster in zip(places, rasters, strict=True)]
    full_offset = next((offset for offset in offsets if offset is not None), places[0].phase(rasters[0], ratio))
    target = Target(whole, Frame.full(whole.shape, full_offset, ratio), resampling)
    sources = [
        source
        for raster, place, own in zip(rasters, places, offsets, strict=True)
        for source in target.sources(closing, raster, place, own == full_offset, each, remarks)
    ]
    return target, sources


def _flags(opener: Opener, pan: Raster, target: Target, path: str) -> Source:
    """A raster of flags on the frame of the full scene, where each pixel has the flags at its centre."""
    data, path, _ = opener(path)
    raster = select_bands(data, path, [1], None, Remarks())
    place = place_on_pan(target.pan, pan, raster, Remarks())
    nested = place.nested_offset(raster, target.frame.ratio) == target.frame.offset
    (source,) = replace(target, resampling="nearest").sources(opener.closing, raster, place, nested, False, Remarks())
    return source


def _open_pan(opener: Opener, spec: RasterLike, pan_band: int | None, nodata: float | None, remarks: Remarks) -> Raster:
    data, path, band = opener(spec)
    band = pan_band if pan_band is not None else band
    if band is None:
        plain = [i for i in data.indexes if i not in alpha_bands(data)]
        if len(plain) > 1:
            raise IncompatiblePair(
                f"The PAN {path} has {len(plain)} bands; choose one with {path},band=N "
                "(or the PAN band option), or check that PAN and MS are not swapped."
            )
        band = plain[0]
    return select_bands(data, path, [band], nodata, remarks)


def _open_ms(
    opener: Opener, specs: Sequence[RasterLike], ms_bands: Sequence[int] | None, nodata: float | None, remarks: Remarks
) -> list[Raster]:
    """Rasters with the bands taken from each, in the order of the stack."""
    stack: list[tuple[DatasetReader, str, int]] = []
    named: set[tuple[DatasetReader, int]] = set()
    for spec in specs:
        data, path, band = opener(spec)
        if band is not None:
            named.add((data, band))
        stack += [(data, path, b) for b in ([band] if band is not None else data.indexes)]
    if ms_bands is not None:
        wrong = [b for b in ms_bands if not 1 <= b <= len(stack)]
        if wrong or not ms_bands:
            raise IncompatiblePair(
                f"MS band {wrong[0] if wrong else 'list is empty and'} does not exist; "
                f"there are bands 1 to {len(stack)}."
            )
        stack = [stack[b - 1] for b in ms_bands]
        named |= {(data, band) for data, _, band in stack}

    rasters = []
    for (data, path), members in groupby(stack, key=lambda item: item[:2]):
        alpha = []
        for band in alpha_bands(data):
            if (data, band) in named:
                continue
            if holds_image(data, band):
                # Software marks the fourth of four 8-bit bands alpha by itself.
                remarks.assume(
                    f"Band {band} of {path} is marked alpha but holds an image: it is taken as a band like the others."
                )
                continue
            alpha.append(band)
            remarks.note(f"Band {band} of {path} is marked alpha: it masks the others.")
        bands = [b for *_, b in members if b not in alpha]
        if bands:
            rasters.append(select_bands(data, path, bands, nodata, remarks))
    return rasters


def _refuse_same(pan: Raster, rasters: Sequence[Raster]) -> None:
    """Refuse a band that is both PAN and MS."""
    for ms in rasters:
        same = pan.dataset is ms.dataset
        with suppress(OSError):
            same = same or os.path.samefile(pan.path, ms.path)
        if same and pan.bands[0] in ms.bands:
            raise IncompatiblePair(f"{ms.path} is given as PAN and as MS; name two files, or other bands of it.")


def sample_windows(pair: ScenePair, count: int = 16, size: int = 64) -> list[Window]:
    """Up to `count` windows, MS pixels of the frame, for scene statistics.

    They lie on a fixed lattice over the *full* scene - with bounds some or all lie outside of the frame, at negative
    positions even - so that a trial run on bounds takes the same scale as the full run. Windows less than half valid
    are passed over; a finer lattice is searched before fewer windows, or mostly invalid ones, are returned. Where no
    lattice meets a valid pixel - little data in a very large scene - all of the scene is searched. Where no MS pixel
    has all of its PAN pixels - scattered nodata - any of them will do.
    """
    windows = _sampled(pair, count, size, whole=True) or _sampled(pair, count, size, whole=False)
    if not windows and pair.clouds is not None and not pair.mask_clouds:  # what is under clouds is all that there is
        pair.clouds = None
        return sample_windows(pair, count, size)
    return windows


def _sampled(pair: ScenePair, count: int, size: int, whole: bool) -> list[Window]:
    """The windows of `sample_windows`, where valid pixels are `whole` or not."""
    h, w = (min(size, n) for n in pair.full_shape)
    poor: list[tuple[float, Window]] = []
    seen: set[tuple[int, int]] = set()
    good: list[Window] = []

    def look(places: Sequence[tuple[int, int]], stride: int = 1) -> bool:
        """Judge the windows there; True once there are enough."""
        for i in range(len(places)):
            place = places[i * stride % len(places)]
            if place in seen:
                continue
            seen.add(place)
            window = pair.from_scene(Window(*place, h, w))
            share = pair.valid_fraction(*window, whole)
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
    if not poor:
        look(_within_blocks(pair.blocks_with_data(whole), h, w, count))
    if good:
        return sorted(good)
    poor.sort(key=lambda item: (-item[0], item[1]))
    return sorted(window for _, window in poor[:count])


def _within_blocks(blocks: Sequence[Window], h: int, w: int, count: int) -> list[tuple[int, int]]:
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
