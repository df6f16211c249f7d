"""Scores of whole rasters, read by windows: a scene of any size in the same memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uknowpan.datasets.simulate import BIT_DEPTHS
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.report import Report
from uknowpan.models.metrics.evaluation import FULL_INDICES, Results
from uknowpan.models.metrics.regions import (
    COLS,
    REDUCE_MARGIN,
    ROWS,
    AgainstReference,
    Coarse,
    Enlargement,
    Region,
    WithoutReference,
    circular_pieces,
    reduce_pan,
    regions,
    whole_tiles,
)
from uknowpan.models.metrics.sensors import SENSORS, Sensor
from uknowpan.models.resample import crop
from uknowpan.surveying import FEW_LEVELS
from uknowpan.tiling import Grid, IncompatiblePair, ScenePair, Window, open_pair, sample_windows
from uknowpan.tiling.metadata import declared_bits
from uknowpan.tiling.raster import (
    GDAL_CACHE_BYTES,
    Opener,
    Raster,
    RasterLike,
    Remarks,
    alpha_bands,
    bounded_gdal_cache,
    holds_image,
    select_bands,
)
from uknowpan.tiling.window import crs_name, same_crs

log = logging.getLogger("uknowpan")

METHOD = "result"
"""Name of the result among the methods of the `Results`."""

DEFAULT_RATIO = 4
"""Ratio of ERGAS against a reference where none is given."""

LEVELS = 10_000
"""Factor for floating-point values of a small range, because Q2n and D_lambda of Khan round to whole numbers."""

SAME_GRID = 0.01
"""Largest distance of the corners of two grids, in pixels, at which they count as one grid."""

Progress = Callable[[int, int], None]


def evaluate_against(
    result: RasterLike,
    reference: RasterLike,
    *,
    ratio: float = 4,
    max_value: float | None = None,
    cut: int = 21,
    nodata: float | None = None,
    on_progress: Progress | None = None,
) -> Results:
    """Scores of a raster against a reference on the same grid.

    Args:
        result, reference: files that GDAL opens, or open datasets, in the same unit.
        ratio: PAN pixels per MS pixel along one axis; only ERGAS depends on it.
        max_value: full scale in DN for PSNR and SSIM. Without it the reference's bit depth counts, else the
            smallest usual one that holds its largest value.
        cut: border to leave out, see `crop_border`.
        nodata: value of invalid pixels; None: as the files declare.
        on_progress: called with (windows done, windows).

    Raises:
        TilingError: rasters that cannot be read, do not fit, or hold nothing to measure.
    """
    with ExitStack() as stack:
        fused, gt = (_open(Opener(stack), file, nodata) for file in (result, reference))
        _require_same_grid(fused, gt.grid, gt.path)
        _require_same_bands(fused, len(gt.bands), gt.path)
        inside = _without_border(fused.grid.shape, cut, fused.path)
        stack.enter_context(bounded_gdal_cache(_cache_bytes([fused, gt])))
        peak = _peak(gt, max_value)
        unit = _unit(_dtype(gt).kind == "f", peak)
        with _measured(fused.path):
            sums = AgainstReference((inside.height, inside.width), ratio=ratio, peak=peak * unit)
            for region in _reported(list(regions(sums.shape, len(gt.bands))), on_progress):
                outer = sums.needed(region)
                (f, f_mask), (g, g_mask) = (_read(image, outer, inside.row, inside.col) for image in (fused, gt))
                sums.add(region, f * unit, g * unit, f_mask | g_mask)
            scores = sums.scores()
    values = {entry.name: getattr(scores, entry.name).reshape(1) for entry in fields(scores)}
    return Results(kind="reduced", images=1, scores={METHOD: values})


def evaluate_without(
    result: RasterLike,
    pan: RasterLike,
    ms: Sequence[RasterLike],
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
        result: a file that GDAL opens, or an open dataset, in the MS's unit.
        pan, ms, pan_band, ms_bands, ratio: see `uknowpan.tiling.open_pair`.
        nodata: value of invalid pixels in all rasters; None: as the files declare.
        sensor: sensor whose MTF gains Khan's D_lambda uses.
        registration: place of the enlarged MS, see `Enlargement`. "area" follows the georeferencing;
            "pancollection" gives the toolbox's numbers if MS and PAN begin at the same corner.
        on_progress: called with (windows done, windows).

    Raises:
        TilingError: rasters that cannot be read, do not fit, or hold nothing to measure.
    """
    with ExitStack() as stack:
        pair = stack.enter_context(open_pair(pan, ms, pan_band=pan_band, ms_bands=ms_bands, nodata=nodata, ratio=ratio))
        fused = _open(Opener(stack), result, nodata)
        for note in pair.notes:
            log.log(logging.WARNING if note in pair.assumptions else logging.INFO, note)
        _require_same_grid(fused, pair.grid, pair.inputs[0])
        _require_same_bands(fused, pair.bands, ", ".join(pair.inputs[1:]))
        with _measured(fused.path):
            enlargement = Enlargement(pair.ratio, registration)
            shape = whole_tiles(fused.grid.shape)
            gains = sensor.for_bands(pair.bands).mtf_ms
            sums = WithoutReference(shape, gains, ratio=pair.ratio)
        if enlargement.circular and (not pair.nested or pair.offset != (0, 0)):
            raise IncompatiblePair(
                "The toolbox's enlargement needs an MS that begins at the PAN's corner and whose "
                "pixels nest in the PAN's; measure by area."
            )
        if shape != fused.grid.shape:
            log.warning(
                "tiles of 32 x 32 pixels are measured: the last %d rows and %d columns of the "
                "scene fill none and are left out",
                *(whole - part for whole, part in zip(fused.grid.shape, shape, strict=True)),
            )
        stack.enter_context(bounded_gdal_cache(_cache_bytes([fused]) + pair.bytes_across(ROWS // pair.ratio + 32)))
        scene = _Scene(pair, enlargement, shape, _unit(np.dtype(pair.meta.dtype).kind == "f", _largest(pair)))
        with _measured(fused.path):
            for region in _reported(list(regions(shape, pair.bands)), on_progress):
                f, f_mask = _read(fused, sums.needed(region))
                if not f_mask.all():
                    sums.add(region, f * scene.unit, f_mask, *scene.window(region))
            scores = sums.scores()
        log.info("%d of %d tiles hold data throughout and count", sums.tiles, shape[0] * shape[1] // 32**2)
    values = {name: getattr(scores, name).reshape(1) for name in FULL_INDICES}
    return Results(kind="full", images=1, scores={METHOD: values})


def measure_raster(target: str, options: EvaluateOptions, on_progress: Progress | None = None) -> Report:
    """Scores of a result raster with what `evaluate` shows beside them."""
    about: dict[str, Any] = {"file": target, "nodata": options.nodata}
    name, sensor = Path(target).name, options.known_sensor
    if options.reference is not None:
        ratio = options.ratio or DEFAULT_RATIO
        max_value = options.max_value or (None if sensor is None else sensor.max_value)
        results = evaluate_against(
            target,
            options.reference,
            ratio=ratio,
            max_value=max_value,
            cut=options.cut,
            nodata=options.nodata,
            on_progress=on_progress,
        )
        title = f"{name} against {Path(options.reference).name}: border {options.cut} cut, ratio {ratio}"
        about |= {"reference": options.reference, "ratio": ratio, "cut": options.cut, "max_value": max_value}
        return Report(results, title, None, about)
    assert options.pan is not None
    used = sensor or SENSORS["generic"]
    results = evaluate_without(
        target,
        options.pan,
        options.ms,
        sensor=used,
        registration=options.registration,
        pan_band=options.pan_bidx,
        ms_bands=options.bidx,
        nodata=options.nodata,
        ratio=options.ratio,
        on_progress=on_progress,
    )
    notes = []
    if sensor is None:
        notes.append(
            f"No --sensor is given: D_lambda_K and HQNR assume an MTF of {used.mtf_ms[0]:.2f} at "
            "the MS's Nyquist frequency for every band."
        )
    title = f"{name} without truth: {used.name} MTF, MS enlarged by {options.registration}"
    about |= {
        "pan": options.pan,
        "ms": list(options.ms),
        "sensor": used.name,
        "registration": options.registration,
    }
    return Report(results, title, None, about, notes)


# ------------------------------------------------------------------------------------- rasters


def _open(opener: Opener, file: RasterLike, nodata: float | None) -> Raster:
    """An image with all its bands but a mask."""
    data, path, _ = opener(file)
    masks = [band for band in alpha_bands(data) if not holds_image(data, band)]
    return select_bands(data, path, [band for band in data.indexes if band not in masks], nodata, Remarks())


def _dtype(raster: Raster) -> np.dtype:
    return np.result_type(*map(np.dtype, raster.dtypes))


def _read(raster: Raster, region: Region, down: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Values (C, h, w), float64, 0 where there is no data, and (h, w) True there."""
    values, data = raster.read(Window(region.row + down, region.col + right, region.height, region.width))
    mask = torch.from_numpy(~data)
    return torch.where(mask, 0.0, torch.from_numpy(values).to(torch.float64)), mask


def _require_same_grid(raster: Raster, wanted: Grid, name: str) -> None:
    """Refuse rasters of different pixels: nothing is resampled before it is measured."""
    grid = raster.grid
    if grid.shape != wanted.shape:
        raise IncompatiblePair(
            f"{raster.path} has {grid.width} x {grid.height} pixels and {name} has {wanted.width} "
            f"x {wanted.height}; both must lie on one grid: gdalwarp -te -tr, or crop."
        )
    if not (grid.is_placed and wanted.is_placed):
        if grid.is_placed or wanted.is_placed:
            lost = name if grid.is_placed else raster.path
            log.warning("%s is not georeferenced; the other raster's place is assumed", lost)
        return
    if not same_crs(grid.crs, wanted.crs):
        raise IncompatiblePair(
            f"{raster.path} is in {crs_name(grid.crs)} and {name} in {crs_name(wanted.crs)}; "
            "both must lie on one grid: gdalwarp -t_srs."
        )
    to_wanted = ~wanted.transform * grid.transform
    corners = [(0, 0), (grid.width, 0), (0, grid.height), (grid.width, grid.height)]
    off = max(abs(a - b) for corner in corners for a, b in zip(to_wanted * corner, corner, strict=True))
    if off > SAME_GRID:
        raise IncompatiblePair(
            f"{raster.path} lies up to {off:.2f} pixels off the grid of {name}; both must lie on "
            "one grid: gdalwarp -te -tr."
        )


def _require_same_bands(raster: Raster, bands: int, name: str) -> None:
    if len(raster.bands) != bands:
        raise IncompatiblePair(
            f"{raster.path} has {len(raster.bands)} bands and {name} has {bands}; select those that "
            "belong together: gdal_translate -b."
        )


def _cache_bytes(rasters: Sequence[Raster]) -> int:
    """Bytes of GDAL's cache with which a row of windows reads each strip of a raster once."""
    wanted = GDAL_CACHE_BYTES
    for data in (raster.dataset for raster in rasters):
        height, width = data.block_shapes[0]
        if width > COLS:
            wanted += (ROWS + 2 * height + 128) * data.width * sum(np.dtype(dtype).itemsize for dtype in data.dtypes)
    return wanted


@contextmanager
def _measured(path: str) -> Iterator[None]:
    """Turn a refusal by the scores into an error about the input."""
    try:
        yield
    except ValueError as error:
        raise IncompatiblePair(f"{path} cannot be measured: {error}.") from error


def _reported(todo: Sequence[Region], on_progress: Progress | None) -> Iterator[Region]:
    for done, region in enumerate(todo, 1):
        yield region
        if on_progress is not None:
            on_progress(done, len(todo))


# ------------------------------------------------------------------------- against a reference


def _without_border(shape: tuple[int, int], cut: int, path: str) -> Region:
    """The part of an image that `crop_border` keeps."""
    if cut == 0:
        return Region(0, 0, *shape)
    if cut < 0 or min(shape) < 2 * cut:
        raise IncompatiblePair(
            f"A border of {cut} leaves nothing of the {shape[1]} x {shape[0]} pixels of {path}; cut less, 0 for none."
        )
    return Region(cut - 1, cut - 1, shape[0] - 2 * cut + 1, shape[1] - 2 * cut + 1)


def _peak(gt: Raster, max_value: float | None) -> float:
    """Full scale of the reference in DN."""
    if max_value is not None:
        return max_value
    dtype = _dtype(gt)
    if dtype.kind != "f":
        bits = declared_bits(gt.dataset, gt.bands[0]) or (8 if dtype.itemsize == 1 else None)
        if bits is not None:
            return 2.0**bits - 1
    largest = -np.inf
    for region in regions(gt.grid.shape, len(gt.bands)):
        values, mask = _read(gt, region)
        if not mask.all():
            largest = max(largest, float(values[:, ~mask].max()))
    if largest <= 0:
        raise IncompatiblePair(f"{gt.path} holds no valid pixel above 0; check its nodata value (--nodata).")
    if dtype.kind == "f" and largest < FEW_LEVELS:
        peak = max(largest, 1.0)
    else:
        peak = next((p for p in (2.0**n - 1 for n in BIT_DEPTHS) if p >= largest), largest)
    log.warning(
        "PSNR and SSIM take %g for full scale, as %s reaches %g; --max-value says it better", peak, gt.path, largest
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
    """Largest value of the MS in sample windows."""
    samples = [pair.read_frame(*window) for window in sample_windows(pair, 9, 64)]
    highest = [float(s.ms[:, s.ms_valid].max()) for s in samples if s.ms_valid.any()]
    if not highest:
        raise IncompatiblePair("No pixel is valid in both PAN and MS; check nodata (--nodata) and that they overlap.")
    return max(highest)


@dataclass(frozen=True)
class _Scene:
    """PAN and MS of a pair, read as `WithoutReference` takes them."""

    pair: ScenePair
    enlargement: Enlargement
    shape: tuple[int, int]
    """PAN pixels that are measured."""
    unit: float

    def window(self, region: Region) -> tuple[Tensor, Tensor, Coarse]:
        """PAN (1, h, w), its mask (h, w), and the enlarged MS and reduced PAN of a region."""
        r, (oy, ox), margin = self.pair.ratio, self.pair.offset, self.enlargement.margin
        row, col = (region.row + oy) // r, (region.col + ox) // r
        h = -(-(region.row + oy + region.height) // r) - row
        w = -(-(region.col + ox + region.width) // r) - col
        around = Region(row - margin, col - margin, h + 2 * margin, w + 2 * margin)
        low = self.enlargement(self._wrapped(around) if self.enlargement.circular else self._coarse(around))
        _, _, pan, pan_mask = self._read(Region(row, col, h, w))
        rows, cols = region.within(Region(row * r - oy, col * r - ox, h * r, w * r))
        cut = Coarse(*(getattr(low, field.name)[..., rows, cols] for field in fields(Coarse)))
        return pan[..., rows, cols], pan_mask[rows, cols], cut

    def _coarse(self, window: Region) -> Coarse:
        """MS and reduced PAN in a window of MS pixels."""
        ms, ms_mask, pan, pan_mask = self._read(window, REDUCE_MARGIN)
        ms, ms_mask = crop(ms, REDUCE_MARGIN), crop(ms_mask, REDUCE_MARGIN)
        return Coarse(ms, ms_mask, *reduce_pan(pan, pan_mask, self.pair.ratio))

    def _wrapped(self, window: Region) -> Coarse:
        """The same with the opposite side beyond the border of what is measured, as in the toolbox."""
        height, width = (n // self.pair.ratio for n in self.shape)
        lines = [
            [self._coarse(Region(row, col, h, w)) for col, w in circular_pieces(window.col, window.width, width)]
            for row, h in circular_pieces(window.row, window.height, height)
        ]

        def joined(name: str) -> Tensor:
            return torch.cat([torch.cat([getattr(piece, name) for piece in line], -1) for line in lines], -2)

        return Coarse(*(joined(field.name) for field in fields(Coarse)))

    def _read(self, window: Region, margin: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """MS, its mask, PAN and its mask in a window of MS pixels; masks are True at nodata within the scene.

        Beyond the scene lies its reflection, whose nodata is that of the scene and counts once.
        """
        pair, r, (oy, ox) = self.pair, self.pair.ratio, self.pair.offset
        tile = pair.read_frame(window.row, window.col, window.height, window.width, margin)
        top, left = window.row - margin, window.col - margin
        h, w = tile.ms_valid.shape
        in_ms = _inside(top, h, 0, pair.frame_shape[0])[:, None] & _inside(left, w, 0, pair.frame_shape[1])
        in_pan = _inside(top * r, h * r, oy, oy + pair.grid.height)[:, None]
        in_pan = in_pan & _inside(left * r, w * r, ox, ox + pair.grid.width)
        ms, pan = (torch.from_numpy(x).to(torch.float64) * self.unit for x in (tile.ms, tile.pan))
        ms_mask, pan_mask = ~tile.ms_valid & in_ms, ~tile.pan_valid & in_pan
        return ms, torch.from_numpy(ms_mask), pan, torch.from_numpy(pan_mask)


def _inside(start: int, count: int, low: int, high: int) -> np.ndarray:
    index = np.arange(start, start + count)
    return (index >= low) & (index < high)
