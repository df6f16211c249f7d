"""Scores of whole rasters, read by windows: a scene of any size in the same memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from uknowpan.datasets.simulate import BIT_DEPTHS
from uknowpan.models.metrics.evaluation import FULL_INDICES, Results
from uknowpan.models.metrics.regions import (
    COLS,
    REDUCE_MARGIN,
    ROWS,
    AgainstReference,
    Coarse,
    Enlargement,
    Region,
    SceneWindow,
    WithoutReference,
    reduce_pan,
    regions,
    whole_tiles,
)
from uknowpan.models.metrics.sensors import Sensor
from uknowpan.models.resample import crop
from uknowpan.sharpening import FEW_LEVELS
from uknowpan.tiling import Grid, IncompatiblePair, ScenePair, Window, open_pair, parse_band_spec, sample_windows
from uknowpan.tiling.metadata import declared_bits
from uknowpan.tiling.raster import (
    GDAL_CACHE_BYTES,
    Remarks,
    Source,
    alpha_bands,
    bounded_gdal_cache,
    holds_image,
    open_raster,
    select_bands,
)
from uknowpan.tiling.window import crs_name, same_crs

log = logging.getLogger("uknowpan")

METHOD = "result"
"""The method's name in the `Results`."""

LEVELS = 10_000
"""What floating-point values of a small range are multiplied by: Q2n and D_lambda of Khan round to
whole numbers, and all indices else are the same in any unit."""

SAME_GRID = 0.01
"""Pixels that two grids may differ by at any corner."""

Progress = Callable[[int, int], None]


def evaluate_against(
    result: str,
    reference: str,
    *,
    ratio: float = 4,
    max_value: float | None = None,
    cut: int = 21,
    nodata: float | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Scores of a raster against a reference on the same grid.

    Args:
        result, reference: anything GDAL opens, in the same units.
        ratio: of PAN and MS pixels; ERGAS depends on it.
        max_value: full scale in DN for PSNR and SSIM; None: by the reference's bit depth, else the
            smallest usual one that holds its largest value.
        cut: border to take off first, see `metrics.crop_border`.
        nodata: instead of what the files say.
        on_progress: called with (windows done, windows).

    Raises:
        TilingError: rasters that cannot be read, do not fit, or hold nothing to measure.
    """
    with ExitStack() as stack:
        stack.enter_context(_cache_for([result, reference]))
        fused, gt = (stack.enter_context(_open(path, nodata)) for path in (result, reference))
        _require_same_grid(fused, gt.grid, reference)
        _require_same_bands(fused, gt.bands, reference)
        inside = _without_border(fused.shape, cut, result)
        peak = _peak(gt, max_value)
        unit = _unit(gt.is_float, peak)
        with _measured(result):
            sums = AgainstReference((inside.height, inside.width), ratio=ratio, peak=peak * unit)
            for region in _reported(list(regions(sums.shape, gt.bands)), on_progress):
                outer = _moved(sums.needed(region), inside.row, inside.col)
                f, f_mask = fused.read(outer)
                g, g_mask = gt.read(outer)
                sums.add(region, f * unit, g * unit, f_mask | g_mask)
            scores = sums.scores()
    values = {entry.name: getattr(scores, entry.name).reshape(1) for entry in fields(scores)}
    return Results(kind="reduced", images=1, scores={METHOD: values})


def evaluate_without(
    result: str,
    pan: str,
    ms: Sequence[str],
    *,
    sensor: Sensor,
    registration: str = "area",
    pan_band: int | None = None,
    ms_bands: Sequence[int] | None = None,
    nodata: float | None = None,
    ratio: int | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Scores of a raster on the PAN's grid without a reference.

    Incomplete tiles of 32 pixels at the bottom and the right are left out.

    Args:
        result: anything GDAL opens, in the MS's units.
        pan, ms, pan_band, ms_bands, nodata, ratio: see `uknowpan.tiling.open_pair`; `nodata` is
            also that of the result.
        sensor: whose MTF gains Khan's D_lambda takes.
        registration: how the MS is enlarged, see `Enlargement`. "area" follows the
            georeferencing; "pancollection" gives the toolbox's numbers of a scene of whole tiles
            whose MS and PAN begin at the same corner.
        on_progress: called with (windows done, windows).

    Raises:
        TilingError: rasters that cannot be read, do not fit, or hold nothing to measure.
    """
    paths = [result, *(parse_band_spec(spec)[0] for spec in [pan, *ms])]
    with ExitStack() as stack:
        stack.enter_context(_cache_for(paths))
        pair = stack.enter_context(open_pair(pan, ms, pan_band=pan_band, ms_bands=ms_bands, nodata=nodata, ratio=ratio))
        fused = stack.enter_context(_open(result, nodata))
        for note in pair.notes:
            log.log(logging.WARNING if note in pair.assumptions else logging.INFO, note)
        _require_same_grid(fused, pair.grid, pan)
        _require_same_bands(fused, pair.bands, ", ".join(ms))
        with _measured(result):
            enlargement = Enlargement(pair.ratio, registration)
            shape = whole_tiles(fused.shape)
            gains = sensor.for_bands(pair.bands).mtf_ms
            sums = WithoutReference(shape, gains, ratio=pair.ratio)
        if enlargement.circular:
            _require_common_corner(pair)
        below, right = fused.shape[0] - shape[0], fused.shape[1] - shape[1]
        if below or right:
            log.warning(
                "tiles of 32 x 32 pixels are measured: the last %d rows and %d columns of the "
                "scene fill none and are left out",
                *(below, right),
            )
        unit = _unit(np.dtype(pair.meta.dtype).kind == "f", _largest(pair))
        scene = _Scene(pair, enlargement, shape, unit)
        with _measured(result):
            for region in _reported(list(regions(shape, pair.bands)), on_progress):
                f, f_mask = fused.read(sums.needed(region))
                if not f_mask.all():
                    sums.add(region, scene.window(region, f * unit, f_mask))
            scores = sums.scores()
        tiles = shape[0] * shape[1] // 32**2
        log.info("%d of %d tiles hold data throughout and count", sums.tiles, tiles)
    values = {name: getattr(scores, name).reshape(1) for name in FULL_INDICES}
    return Results(kind="full", images=1, scores={METHOD: values})


# ------------------------------------------------------------------------------------- rasters


@dataclass(frozen=True)
class _Raster:
    """An opened image; all its bands but a mask."""

    path: str
    source: Source
    grid: Grid
    dtype: np.dtype
    nbits: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.grid.height, self.grid.width

    @property
    def bands(self) -> int:
        return len(self.source.raster.bands)

    @property
    def is_float(self) -> bool:
        return self.dtype.kind == "f"

    def read(self, region: Region) -> tuple[Tensor, Tensor]:
        """Values (C, h, w), float64, 0 where there is no data, and (h, w) True there."""
        values, data, _ = self.source.read(Window(region.row, region.col, region.height, region.width))
        mask = torch.from_numpy(~data)
        return torch.where(mask, 0.0, torch.from_numpy(values).to(torch.float64)), mask


@contextmanager
def _open(path: str, nodata: float | None) -> Iterator[_Raster]:
    with open_raster(path) as data:
        masks = [band for band in alpha_bands(data) if not holds_image(data, band)]
        bands = [band for band in data.indexes if band not in masks]
        raster = select_bands(data, path, bands, nodata, Remarks())
        dtype = np.result_type(*map(np.dtype, raster.dtypes))
        yield _Raster(path, Source.native(raster), raster.grid, dtype, declared_bits(data, bands[0]))


def _require_same_grid(raster: _Raster, wanted: Grid, name: str) -> None:
    """Both rasters must have the same pixels: nothing is resampled before it is measured."""
    grid = raster.grid
    if (grid.height, grid.width) != (wanted.height, wanted.width):
        raise IncompatiblePair(
            f"{raster.path} has {grid.width} x {grid.height} pixels and {name} has {wanted.width} "
            f"x {wanted.height}; both must lie on one grid: gdalwarp -te -tr, or crop."
        )
    placed = [g.is_placed for g in (grid, wanted)]
    if not all(placed):
        if any(placed):
            lost = name if placed[0] else raster.path
            log.warning("%s is not georeferenced; the other raster's place is assumed", lost)
        return
    if not same_crs(grid.crs, wanted.crs):
        raise IncompatiblePair(
            f"{raster.path} is in {crs_name(grid.crs)} and {name} in {crs_name(wanted.crs)}; "
            "both must lie on one grid: gdalwarp -t_srs."
        )
    there = ~wanted.transform * grid.transform
    corners = [(0, 0), (grid.width, 0), (0, grid.height), (grid.width, grid.height)]
    off = max(abs(a - b) for corner in corners for a, b in zip(there * corner, corner, strict=True))
    if off > SAME_GRID:
        raise IncompatiblePair(
            f"{raster.path} lies up to {off:.2f} pixels off the grid of {name}; both must lie on "
            "one grid: gdalwarp -te -tr."
        )


def _require_same_bands(raster: _Raster, bands: int, name: str) -> None:
    if raster.bands != bands:
        raise IncompatiblePair(
            f"{raster.path} has {raster.bands} bands and {name} has {bands}; select those that "
            "belong together: gdal_translate -b."
        )


@contextmanager
def _cache_for(paths: Sequence[str]) -> Iterator[None]:
    """GDAL's cache large enough that a row of windows reads each strip of a raster once."""
    wanted = GDAL_CACHE_BYTES
    for path in paths:
        with open_raster(path) as data:
            height, width = data.block_shapes[0]
            if width > COLS:
                pixel = sum(np.dtype(dtype).itemsize for dtype in data.dtypes)
                wanted += (ROWS + 2 * height + 128) * data.width * pixel
    with bounded_gdal_cache(wanted):
        yield


@contextmanager
def _measured(result: str) -> Iterator[None]:
    """What the scores refuse is the input's fault."""
    try:
        yield
    except ValueError as error:
        raise IncompatiblePair(f"{result} cannot be measured: {error}.") from error


def _reported(todo: Sequence[Region], on_progress: Progress | None) -> Iterator[Region]:
    for done, region in enumerate(todo, 1):
        yield region
        if on_progress is not None:
            on_progress(done, len(todo))


# ------------------------------------------------------------------------- against a reference


def _without_border(shape: tuple[int, int], cut: int, path: str) -> Region:
    """What `metrics.crop_border` keeps."""
    if cut == 0:
        return Region(0, 0, *shape)
    if cut < 0 or min(shape) < 2 * cut:
        raise IncompatiblePair(
            f"A border of {cut} leaves nothing of the {shape[1]} x {shape[0]} pixels of {path}; cut less, 0 for none."
        )
    return Region(cut - 1, cut - 1, shape[0] - 2 * cut + 1, shape[1] - 2 * cut + 1)


def _moved(region: Region, rows: int, cols: int) -> Region:
    return Region(region.row + rows, region.col + cols, region.height, region.width)


def _peak(gt: _Raster, max_value: float | None) -> float:
    """Full scale of the reference in DN."""
    if max_value is not None:
        return max_value
    if not gt.is_float:
        bits = gt.nbits or (8 if gt.dtype.itemsize == 1 else None)
        if bits is not None:
            return 2.0**bits - 1
    largest = -np.inf
    for region in regions(gt.shape, gt.bands):
        values, mask = gt.read(region)
        if not mask.all():
            largest = max(largest, float(values[:, ~mask].max()))
    if largest <= 0:
        raise IncompatiblePair(f"{gt.path} holds no valid pixel above 0; check its nodata value (--nodata).")
    if gt.is_float and largest < FEW_LEVELS:
        peak = max(largest, 1.0)
    else:
        peak = next((p for p in (2.0**n - 1 for n in BIT_DEPTHS) if p >= largest), largest)
    log.warning(
        "PSNR and SSIM take %g for full scale, as %s reaches %g; --max-value says it better",
        *(peak, gt.path, largest),
    )
    return peak


def _unit(is_float: bool, largest: float) -> float:
    """Factor to DN for values that whole numbers cannot hold, such as reflectances."""
    if not is_float or largest >= FEW_LEVELS:
        return 1.0
    log.warning(
        "values reach %.4g and are multiplied by %d, because Q2n and D_lambda round to whole "
        "numbers; the other indices stay as they are",
        *(largest, LEVELS),
    )
    return float(LEVELS)


# -------------------------------------------------------------------------- without a reference


def _largest(pair: ScenePair) -> float:
    """Of the MS, as samples show it."""
    samples = [pair.read_frame(*window) for window in sample_windows(pair, 9, 64)]
    highest = [float(s.ms[:, s.ms_valid].max()) for s in samples if s.ms_valid.any()]
    if not highest:
        raise IncompatiblePair("No pixel is valid in both PAN and MS; check nodata (--nodata) and that they overlap.")
    return max(highest)


@dataclass(frozen=True)
class _Scene:
    """PAN and MS as `WithoutReference` takes them."""

    pair: ScenePair
    enlargement: Enlargement
    shape: tuple[int, int]
    """PAN pixels that are measured."""
    unit: float

    def window(self, region: Region, fused: Tensor, fused_mask: Tensor) -> SceneWindow:
        """One region; `fused` as it is needed there."""
        r, (oy, ox), margin = self.pair.ratio, self.pair.offset, self.enlargement.margin
        row, col = (region.row + oy) // r, (region.col + ox) // r
        h = -(-(region.row + oy + region.height) // r) - row
        w = -(-(region.col + ox + region.width) // r) - col
        around = Region(row - margin, col - margin, h + 2 * margin, w + 2 * margin)
        coarse = self._wrapped(around) if self.enlargement.circular else self._coarse(around)
        enlarged = self.enlargement(coarse)
        _, _, pan, pan_mask = self._read(Region(row, col, h, w))
        here = region.within(Region(row * r - oy, col * r - ox, h * r, w * r))
        return SceneWindow(
            fused=fused,
            fused_mask=fused_mask,
            lms=enlarged.lms[:, *here],
            lms_mask=enlarged.lms_mask[here],
            pan=pan[:, *here],
            pan_low=enlarged.pan_low[:, *here],
            pan_mask=(pan_mask | enlarged.pan_mask)[here],
        )

    def _coarse(self, window: Region) -> Coarse:
        """MS and reduced PAN in a window of MS pixels."""
        ms, ms_mask, pan, pan_mask = self._read(window, REDUCE_MARGIN)
        ms, ms_mask = crop(ms, REDUCE_MARGIN), crop(ms_mask, REDUCE_MARGIN)
        return Coarse(ms, ms_mask, *reduce_pan(pan, pan_mask, self.pair.ratio))

    def _wrapped(self, window: Region) -> Coarse:
        """The same; outside of what is measured its opposite side, as the toolbox has it."""
        height, width = (n // self.pair.ratio for n in self.shape)
        lines = [
            [self._coarse(Region(row, col, h, w)) for col, w in _pieces(window.col, window.width, width)]
            for row, h in _pieces(window.row, window.height, height)
        ]
        return Coarse(
            *(
                torch.cat([torch.cat([getattr(p, f.name) for p in line], -1) for line in lines], -2)
                for f in fields(Coarse)
            )
        )

    def _read(self, window: Region, margin: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """MS, its mask, PAN and its mask; True where data is lacking within the scene.

        Beyond the scene lies its reflection, which lacks nothing that the scene has.
        """
        pair, r, (oy, ox) = self.pair, self.pair.ratio, self.pair.offset
        found = pair.read_frame(window.row, window.col, window.height, window.width, margin)
        top, left = window.row - margin, window.col - margin
        h, w = found.ms_valid.shape
        in_ms = _inside(top, h, 0, pair.frame_shape[0])[:, None]
        in_ms = in_ms & _inside(left, w, 0, pair.frame_shape[1])
        in_pan = _inside(top * r, h * r, oy, oy + pair.grid.height)[:, None]
        in_pan = in_pan & _inside(left * r, w * r, ox, ox + pair.grid.width)
        ms, pan = (torch.from_numpy(x).to(torch.float64) * self.unit for x in (found.ms, found.pan))
        ms_mask, pan_mask = ~found.ms_valid & in_ms, ~found.pan_valid & in_pan
        return ms, torch.from_numpy(ms_mask), pan, torch.from_numpy(pan_mask)


def _require_common_corner(pair: ScenePair) -> None:
    if not pair.nested or pair.offset != (0, 0):
        raise IncompatiblePair(
            "The toolbox's enlargement needs an MS that begins at the PAN's corner and whose "
            "pixels nest in the PAN's; measure by area."
        )


def _inside(start: int, count: int, low: int, high: int) -> np.ndarray:
    index = np.arange(start, start + count)
    return (index >= low) & (index < high)


def _pieces(start: int, count: int, size: int) -> list[tuple[int, int]]:
    """Parts (start, length) of 0 .. size that follow each other from `start` on, circularly."""
    pieces = []
    while count:
        first = start % size
        length = min(count, size - first)
        pieces.append((first, length))
        start, count = start + length, count - length
    return pieces
