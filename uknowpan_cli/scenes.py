"""A scene that is ready: opened, surveyed and planned for a sharpener."""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from uknowpan.deliveries import understood
from uknowpan.errors import OutOfMemory, UsageError
from uknowpan.files import check_outputs, check_suffixes, try_creation
from uknowpan.loading import tiles_at_once
from uknowpan.models.devices import machine_memory, thread_count
from uknowpan.models.sharpeners import Sharpener
from uknowpan.options import SharpenOptions
from uknowpan.registering import report
from uknowpan.surveying import SURVEY_WINDOWS, Progress, Survey, clipping_warning, no_progress
from uknowpan.surveying import survey as survey_pair
from uknowpan.tiling import ScenePair, Tile, cut_strips, open_pair, placed_by_interrupted, plan_tiles
from uknowpan.tiling.raster import RasterLike, bounded_gdal_cache
from uknowpan.tiling.rpcs import Surface

log = logging.getLogger("uknowpan")

BYTES_OF_STRIP = 14
"""Bytes per value of a strip: blended, kept, encoded and written."""

STRIP_WIDTH = 8192
"""PAN columns of a strip, about; memory follows them, not the width of a scene."""

MOST_WORKERS = 4
"""Tiles that a CPU sharpens at once; each takes memory."""

DRY_WINDOWS = 3
"""Number of samples where nothing is sharpened."""


@dataclass(frozen=True)
class TilePlan:
    """The cut of the frame into tiles; sizes in MS pixels."""

    strips: list[list[Tile]]
    """Tiles of each strip, row by row of strips."""
    across: int
    """Strips in a row."""
    overlap: int
    margin: int

    @property
    def count(self) -> int:
        return sum(map(len, self.strips))


@dataclass(frozen=True)
class Scene:
    """A scene that was opened, surveyed and planned for a sharpener."""

    pair: ScenePair
    sharpener: Sharpener
    options: SharpenOptions
    output: str
    survey: Survey
    plan: TilePlan
    batch_size: int
    began: float
    """Monotonic time from which the report counts."""
    most_workers: int = MOST_WORKERS

    @property
    def tile_bytes(self) -> int:
        """Memory that sharpening one tile takes, about."""
        first, rim = self.plan.strips[0][0], 2 * self.plan.margin
        window = (first.height + rim) * (first.width + rim) * self.pair.ratio**2
        return window * self.pair.bands * self.sharpener.floats_per_pixel(self.survey.field) * 4

    @property
    def workers(self) -> int:
        """Batches that are sharpened side by side. Two tiles on a core each take less time than one on two cores."""
        if self.sharpener.device != "cpu" or not self.sharpener.local:
            return 1
        return min(thread_count(self.options.num_threads), self.plan.count, self.most_workers)

    @property
    def at_once(self) -> int:
        """Tiles that are sharpened at one time."""
        return min(self.batch_size * self.workers, self.plan.count)

    @property
    def overlapped(self) -> bool:
        """Read, blend, encode and keep in threads, and fetch results late: a device, or another core, computes
        meanwhile."""
        return self.sharpener.device != "cpu" or thread_count(self.options.num_threads) > 1

    @property
    def layers(self) -> dict[str, str]:
        """Layer -> its file."""
        files = {"image": self.output}
        return files if self.options.uncertainty is None else files | {"uncertainty": str(self.options.uncertainty)}

    @property
    def columns(self) -> list[int]:
        """Where the strips of a row begin in the output."""
        pair = self.pair
        return [max(strip[0].col * pair.ratio - pair.offset[1], 0) for strip in self.plan.strips[: self.plan.across]]

    @property
    def bytes_across(self) -> int:
        """Bytes of input blocks that a row of tiles reads again and again."""
        return self.pair.bytes_across(self.plan.strips[0][0].height + 2 * self.plan.margin)

    def area(self, tiles: Sequence[Tile]) -> int:
        """PAN pixels of tiles."""
        return sum(t.height * t.width for t in tiles) * self.pair.ratio**2


def open_scene(
    pan: RasterLike,
    ms: RasterLike | Sequence[RasterLike],
    options: SharpenOptions,
) -> ScenePair:
    """Open the pair as the options ask; without an MS, `pan` is a product."""
    bounds: Any = options.bounds
    bands: Any = options.bidx
    delivery = understood(pan) if isinstance(pan, str | os.PathLike) and not ms else None
    if delivery is not None:
        line, (pan, ms), bands = delivery.line(bands), delivery.rasters(bands), None
    clouds = None if delivery is None else delivery.clouds
    if options.mask_clouds and clouds is None:
        raise UsageError("--mask-clouds needs a product with flags of clouds (Landsat's QA_PIXEL); leave it out.")
    pair = open_pair(
        pan,
        ms,
        pan_band=options.pan_bidx,
        ms_bands=bands,
        nodata=options.nodata,
        ratio=options.ratio,
        resampling=options.resampling,
        valid=options.valid,
        bounds=bounds,
        clouds=clouds,
        mask_clouds=options.mask_clouds,
        surface=Surface(options.height, None if options.dem is None else str(options.dem)),
    )
    if delivery is not None:
        pair.notes.insert(0, line)
        pair.pan_meta = replace(pair.pan_meta, acquired=delivery.acquired or pair.pan_meta.acquired)
    return pair


@contextmanager
def prepared(
    pan: RasterLike,
    ms: RasterLike | Sequence[RasterLike],
    output: str,
    options: SharpenOptions,
    load: Callable[[], Sharpener],
    *,
    opened: ScenePair | None = None,
    in_memory: bool = False,
    dry_run: bool = False,
    began: float | None = None,
    on_progress: Progress = no_progress,
) -> Iterator[Scene]:
    """Open a scene and check that it can be sharpened as asked, before anything is computed.

    Args:
        pan, ms: the rasters; without an MS, `pan` is a product.
        output: the file to write.
        options: the options of the run.
        load: returns the sharpener; called when the files are in order.
        opened: from `open_scene`, if the rasters are open already; it is closed at the end.
        in_memory: no file is written.
        dry_run: outputs may exist, and fewer samples are taken.
        began: monotonic time at which the run began; None: now.
        on_progress: called with (samples read, samples in all).

    Raises:
        TilingError, ModelError, UsageError: see their classes.
    """
    began = time.monotonic() if began is None else began
    with ExitStack() as stack:
        stack.enter_context(bounded_gdal_cache())
        pair = opened or open_scene(pan, ms, options)
        stack.callback(pair.close)
        check_memory(pair, options)
        if options.stac is not None and pair.grid.crs is None:
            raise UsageError("--stac needs a scene with a CRS; leave it out.")
        if not in_memory:
            named = {
                "--output": output,
                "--uncertainty": options.uncertainty,
                "--preview": options.preview,
                "--stac": options.stac,
            }
            inputs = [*pair.inputs, *([str(options.model)] if options.model else [])]
            paths = {flag: str(path) for flag, path in named.items() if path is not None}
            if options.resume and placed_by_interrupted(output, list(paths.values())):
                options = replace(options, overwrite=True)
            check_outputs(paths, inputs, options.overwrite or dry_run)
            check_suffixes(paths)
            try_creation(creation_of(options), options.format, options.output_dtype or pair.meta.dtype)
        sharpener = load()
        check_uncertainty(sharpener, options.uncertainty is not None, options.coverage)
        sharpener.check(pair.bands, pair.ratio)
        survey = survey_pair(
            pair,
            sharpener,
            max_value=options.max_value,
            coregister=options.coregister,
            windows=DRY_WINDOWS if dry_run else SURVEY_WINDOWS,
            on_progress=on_progress,
        )
        pair.displacement = survey.field
        scene = Scene(pair, sharpener, options, output, survey, plan_scene(pair, sharpener, survey, options), 1, began)
        _warn_of(scene)
        yield replace(scene, batch_size=options.batch_size or tiles_at_once(sharpener.device, scene.tile_bytes))


def _warn_of(scene: Scene) -> None:
    """Log what was assumed about the scene and what may look odd in the result."""
    pair, plan, sharpener = scene.pair, scene.plan, scene.sharpener
    for note in pair.notes:
        log.log(logging.WARNING if note in pair.assumptions else logging.INFO, note)
    if scene.survey.displacement is not None:
        report(scene.survey.displacement, scene.survey.field, scene.options.coregister)
    clipped = clipping_warning(pair.meta, scene.survey.high, scene.options.output_dtype)
    for sentence in (*scene.survey.warnings, *([] if clipped is None else [clipped])):
        log.warning(sentence)
    if not sharpener.local and plan.count > 1:
        log.warning(
            "the result of model %s depends on how the scene is cut, here into %d tiles "
            "that overlap by %d PAN pixels (--tile, --overlap)",
            *(sharpener.name, plan.count, plan.overlap * pair.ratio),
        )


def check_memory(pair: ScenePair, options: SharpenOptions) -> None:
    """Raise OutOfMemory where blocks of the files and strips cannot fit into memory."""
    rows = min(options.tile, pair.grid.height)
    values = rows * min(pair.grid.width, max(STRIP_WIDTH, options.tile)) * pair.bands
    needed = pair.block_bytes + values * BYTES_OF_STRIP
    limit = machine_memory() if options.max_memory is None else options.max_memory * 1e9
    if limit is not None and needed > limit:
        raise OutOfMemory(
            f"The scene takes at least {needed / 1e9:.3g} GB, more than the {limit / 1e9:.3g} GB that it may; "
            "take a smaller --tile, a part (--bounds), or a larger --max-memory."
        )


def check_uncertainty(sharpener: Sharpener, wanted: bool, coverage: int) -> None:
    """Raise UsageError where a method has no uncertainty, or none that holds this percentage of the errors."""
    if not wanted and coverage != 68:
        raise UsageError(f"--coverage {coverage} is for --uncertainty; give both or none.")
    if wanted and not sharpener.has_uncertainty:
        raise UsageError(
            f"--uncertainty: {sharpener.name} has none; use a model of the form fsa-s-lite, like the bundled one."
        )
    if coverage == 90 and sharpener.sigmas_90 is None:
        raise UsageError(f"--coverage 90: the card of {sharpener.name} has no such width; leave it out.")


def plan_scene(pair: ScenePair, sharpener: Sharpener, survey: Survey, options: SharpenOptions) -> TilePlan:
    """Cut the frame into tiles whose sides are multiples that the sharpener takes."""
    ratio = pair.ratio
    multiple = sharpener.multiple // math.gcd(sharpener.multiple, ratio)
    overlap_pan = options.overlap if options.overlap is not None else 0 if sharpener.local else 32
    tile = max(round(options.tile / ratio / multiple), 1) * multiple
    overlap = math.ceil(overlap_pan / ratio / multiple) * multiple
    overlap = min(overlap, tile // 2 // multiple * multiple)
    if max(pair.frame_shape) <= tile:  # one tile, no larger than it must be
        overlap = 0
    rows = plan_tiles(pair.frame_shape, tile, overlap, multiple)
    strips, across = cut_strips(rows, math.ceil(pair.grid.width / STRIP_WIDTH))
    return TilePlan(strips, across, overlap, sharpener.margin(survey.statistics))


def creation_of(options: SharpenOptions) -> dict[str, str]:
    """The creation options, which `SharpenOptions` has brought into a mapping."""
    creation: Any = options.creation
    return dict(creation)
