"""Scores of whole rasters, read by windows: a scene of any size in the same memory."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from uknowpan.datasets.simulate import BIT_DEPTHS
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.reading import (
    Scene,
    cache_bytes,
    image_dtype,
    open_image,
    read_image,
    require_same_bands,
    require_same_grid,
    unit_of,
)
from uknowpan.evaluation.report import Report
from uknowpan.evaluation.reprojection import SecondJudge, second_judge
from uknowpan.models.metrics.evaluation import FULL_INDICES, Results
from uknowpan.models.metrics.full_resolution import Enlargement, WithoutReference
from uknowpan.models.metrics.indices import AgainstReference
from uknowpan.models.metrics.regions import ROWS, Region, regions, whole_tiles
from uknowpan.options import band_numbers
from uknowpan.surveying import FEW_LEVELS, Progress, Survey
from uknowpan.tiling import IncompatiblePair, ScenePair, open_pair, sample_windows
from uknowpan.tiling.globe import Bounds
from uknowpan.tiling.metadata import declared_bits
from uknowpan.tiling.raster import Opener, Raster, RasterLike, bounded_gdal_cache

log = logging.getLogger("uknowpan")

METHOD = "result"
"""Name of the result among the methods of the `Results`."""

DEFAULT_RATIO = 4
"""Ratio of ERGAS against a reference where none is given."""


def evaluate_against(
    result: RasterLike, reference: RasterLike, options: EvaluateOptions, on_progress: Progress | None = None
) -> Results:
    """Scores of a raster against a reference on the same grid.

    Args:
        result, reference: files that GDAL opens, or open datasets, in the same unit.
        options: ratio, full scale, border and nodata. Without a full scale the reference's bit depth counts, else the
            smallest usual one that holds its largest value.
        on_progress: called with (windows done, windows).

    Raises:
        TilingError: rasters that cannot be read, do not fit, or hold nothing to measure.
    """
    with ExitStack() as stack:
        fused, gt = (open_image(Opener(stack), file, options.nodata) for file in (result, reference))
        require_same_grid(fused, gt.grid, gt.path)
        require_same_bands(fused, len(gt.bands), gt.path)
        inside = _without_border(fused.grid.shape, options.cut, fused.path)
        stack.enter_context(bounded_gdal_cache(cache_bytes([fused, gt])))
        peak = _peak(gt, options.full_scale)
        unit = unit_of(image_dtype(gt).kind == "f", peak)
        with _measured(fused.path):
            ratio = options.ratio or DEFAULT_RATIO
            sums = AgainstReference((inside.height, inside.width), ratio=ratio, peak=peak * unit)
            for region in _reported(list(regions(sums.shape, len(gt.bands))), on_progress):
                outer = sums.needed(region)
                (f, f_mask), (g, g_mask) = (read_image(image, outer, inside.row, inside.col) for image in (fused, gt))
                sums.add(region, f * unit, g * unit, f_mask | g_mask)
            scores = sums.scores()
    values = {name: score.reshape(1) for name, score in scores._asdict().items()}
    return Results(kind="reduced", images=1, scores={METHOD: values})


def evaluate_without(
    result: RasterLike,
    pan: RasterLike,
    ms: Sequence[RasterLike],
    options: EvaluateOptions,
    *,
    bounds: Bounds | None = None,
    known: Survey | None = None,
    brief: bool = False,
    on_progress: Progress | None = None,
) -> tuple[Results, SecondJudge | None]:
    """Scores of a raster on the PAN's grid without a reference, and those by reprojection.

    Incomplete tiles of 32 pixels at the bottom and the right are left out.

    Args:
        result: a file that GDAL opens, or an open dataset, in the MS's unit.
        pan, ms, bounds: see `uknowpan.tiling.open_pair`.
        options: bands, nodata, ratio, sensor and registration, see `Enlargement`. "area" follows the georeferencing;
            "pancollection" gives the toolbox's numbers if MS and PAN begin at the same corner. Without `reprojection`,
            and where the scene is too small for it, the second result is None.
        known: survey of the scene with the displacement that was taken out; None: it is made.
        brief: measure by reprojection in the registered way alone.
        on_progress: called with (windows done, windows), again from the start by the reprojection.

    Raises:
        TilingError: rasters that cannot be read, do not fit, or hold nothing to measure.
    """
    nodata = options.nodata
    bands: dict[str, Any] = {"pan_band": options.pan_bidx, "ms_bands": band_numbers(options.bidx)}
    with ExitStack() as stack:
        pair = stack.enter_context(open_pair(pan, ms, nodata=nodata, ratio=options.ratio, bounds=bounds, **bands))
        fused = open_image(Opener(stack), result, nodata)
        for note in pair.notes:
            log.log(logging.WARNING if note in pair.assumptions else logging.INFO, note)
        require_same_grid(fused, pair.grid, pair.inputs[0])
        require_same_bands(fused, pair.bands, ", ".join(pair.inputs[1:]))
        with _measured(fused.path):
            enlargement = Enlargement(pair.ratio, options.registration)
            shape = whole_tiles(fused.grid.shape)
            gains = options.used_sensor.for_bands(pair.bands).mtf_ms
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
        stack.enter_context(bounded_gdal_cache(cache_bytes([fused]) + pair.bytes_across(ROWS // pair.ratio + 32)))
        scene = Scene(pair, enlargement, shape, unit_of(np.dtype(pair.meta.dtype).kind == "f", _largest(pair)))
        with _measured(fused.path):
            for region in _reported(list(regions(shape, pair.bands)), on_progress):
                f, f_mask = read_image(fused, sums.needed(region))
                if not f_mask.all():
                    sums.add(region, f * scene.unit, f_mask, *scene.window(region))
            scores = sums.scores()
        log.info("%d of %d tiles hold data throughout and count", sums.tiles, shape[0] * shape[1] // 32**2)
        judge = None
        if options.reprojection:
            try:
                judge = second_judge(
                    scene, fused, gains, float(scores.d_lambda_k), known, brief=brief, on_progress=on_progress
                )
            except ValueError as error:
                log.info("%s is not measured by reprojection: %s", fused.path, error)
    values = {name: getattr(scores, name).reshape(1) for name in FULL_INDICES}
    return Results(kind="full", images=1, scores={METHOD: values}), judge


def measure_raster(target: str, options: EvaluateOptions, on_progress: Progress | None = None) -> Report:
    """Scores of a result raster with what `evaluate` shows beside them."""
    about: dict[str, Any] = {"file": target, "nodata": options.nodata}
    name, used = Path(target).name, options.used_sensor
    if options.reference is not None:
        results = evaluate_against(target, options.reference, options, on_progress)
        ratio = options.ratio or DEFAULT_RATIO
        title = f"{name} against {Path(options.reference).name}: border {options.cut} cut, ratio {ratio}"
        about |= {"reference": options.reference, "ratio": ratio, "cut": options.cut, "max_value": options.full_scale}
        return Report(results, title, None, about)
    assert options.pan is not None
    results, judge = evaluate_without(target, options.pan, options.ms, options, on_progress=on_progress)
    notes = []
    if options.sensor is None:
        notes.append(
            f"No --sensor is given: D_lambda_K and HQNR assume an MTF of {used.mtf_ms[0]:.2f} at "
            "the MS's Nyquist frequency for every band."
        )
    title = f"{name} without truth: {used.name} MTF, MS enlarged by {options.registration}"
    about |= {"pan": options.pan, "ms": list(options.ms), "sensor": used.name, "registration": options.registration}
    return Report(results, title, None, about, notes, {} if judge is None else {METHOD: [judge]})


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
    dtype = image_dtype(gt)
    if dtype.kind != "f":
        bits = declared_bits(gt.dataset, gt.bands[0]) or (8 if dtype.itemsize == 1 else None)
        if bits is not None:
            return 2.0**bits - 1
    largest = -np.inf
    for region in regions(gt.grid.shape, len(gt.bands)):
        values, mask = read_image(gt, region)
        if not mask.all():
            largest = max(largest, float(values[:, ~mask].max()))
    if largest <= 0:
        raise IncompatiblePair(f"{gt.path} holds no valid pixel above 0; check its nodata value (--nodata).")
    if dtype.kind == "f" and largest < FEW_LEVELS:
        peak = max(largest, 1.0)
    else:
        peak = next((p for p in (2.0**n - 1 for n in BIT_DEPTHS) if p >= largest), largest)
    log.warning("PSNR and SSIM take %g for full scale, as %s reaches %g; give --max-value", peak, gt.path, largest)
    return peak


def _largest(pair: ScenePair) -> float:
    """Largest value of the MS in sample windows."""
    samples = [pair.read_frame(*window) for window in sample_windows(pair, 9, 64)]
    highest = [float(s.ms[:, s.ms_valid].max()) for s in samples if s.ms_valid.any()]
    if not highest:
        raise IncompatiblePair("No pixel is valid in both PAN and MS; check nodata (--nodata) and that they overlap.")
    return max(highest)
