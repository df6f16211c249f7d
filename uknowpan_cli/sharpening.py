"""One scene from file to file: statistics, tiles, sampling, blending, writing. No Typer here."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uknowpan import __version__
from uknowpan.errors import Interrupted, OutOfMemory, is_out_of_memory
from uknowpan.models.blur import Psf, default_psf
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.sharpeners import HIGH_PERCENTILE, Sharpened, Sharpener
from uknowpan.models.statistics import SceneStatistics, scene_statistics
from uknowpan.tiling import (
    Encoding,
    IncompatiblePair,
    MsMeta,
    OutputOptions,
    ScenePair,
    SceneWriter,
    StripBlender,
    StripStore,
    Tile,
    TileArrays,
    check_output,
    encode,
    output_encoding,
    plan_tiles,
    sample_windows,
    tile_rows_needed,
    uncertainty_meta,
)
from uknowpan.tiling.raster import bounded_gdal_cache

log = logging.getLogger("uknowpan")

SURVEY_WINDOWS, SURVEY_SIZE = 9, 512
"""Samples for the scene's statistics: how many, and PAN pixels along a side."""

FLOATS_PER_PIXEL = 110
"""float32 values per band and pixel of a tile with its margin: features, activations and their
copies. Measured with 4 bands and tiles of 512: a peak of 430 to 710 MB."""

SMALLEST_TILE = 64
"""PAN pixels; the back-off from memory shortage stops here."""


@dataclass(frozen=True)
class SharpenOptions:
    """What decides how a scene is sharpened, beside the sharpener; sizes in PAN pixels."""

    output: str
    tile: int = 512
    overlap: int | None = None
    """None: what the method needs (0 for local ones)."""
    batch_size: int = 1
    max_value: float | None = None
    """Digital number that stands for full scale; None: found out."""
    writing: OutputOptions = field(default_factory=OutputOptions)
    uncertainty: str | None = None
    resume: bool = False
    survey: Survey | None = None
    """Of this pair, for this sharpener and `max_value`, if it was made already."""
    overlapped: bool = False
    """Blend and keep rows of tiles in a thread, and fetch results one batch late: for devices that
    compute while the CPU does other things. Costs the memory of a row and a batch more."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """More tags for the files, written as UKNOWPAN_*; they go with the file, all or nothing."""


@dataclass(frozen=True)
class SceneScale:
    """Divisors that bring digital numbers to about [0, 1]."""

    pan: float
    ms: float
    source: str
    """Where they come from: "option", "bit depth", "percentile", or "model": from percentiles, by
    what the model was trained on."""


@dataclass(frozen=True)
class Survey:
    """What the first pass over the scene found."""

    scale: SceneScale
    statistics: SceneStatistics
    """In scaled units; their blur and shift are what the method reckons with."""
    measured: Psf | None = None
    """Blur and shift as the scene shows them, before any was removed; None: it does not tell, or
    nobody asked."""
    seconds: float = 0.0
    """What the pass took."""

    @property
    def offset(self) -> tuple[float, float] | None:
        """(dy, dx), PAN pixels: how far the MS lies off the PAN, + is down and right."""
        if self.measured is None:
            return None
        dy, dx = self.measured.shift
        return -dy, -dx


@dataclass(frozen=True)
class TilePlan:
    """How the scene is cut; sizes in MS pixels."""

    rows: list[list[Tile]]
    overlap: int
    margin: int

    @property
    def count(self) -> int:
        return sum(len(row) for row in self.rows)

    def tile_bytes(self, pair: ScenePair) -> int:
        """What sharpening one tile takes, about."""
        first, rim = self.rows[0][0], 2 * self.margin
        window = (first.height + rim) * (first.width + rim) * pair.ratio**2
        return window * pair.bands * FLOATS_PER_PIXEL * 4


@dataclass(frozen=True)
class SharpenReport:
    """What was done."""

    output: str
    width: int
    height: int
    bands: int
    ratio: int
    method: str
    scale: SceneScale
    sigma: float
    """Blur of the MS that the method reckoned with, PAN pixels."""
    shift: tuple[float, float] | None
    """(dy, dx), PAN pixels: how far the MS was found to lie off the PAN, + is down and right;
    None: not measured. The same in the tag MEASURED_SHIFT and in `info`."""
    applied_shift: tuple[float, float]
    """(dy, dx), PAN pixels: how far the MS was moved, + is down and right."""
    correlation: float | None
    """Of PAN and MS where the shift was measured; None: not measured."""
    tiles: int
    skipped_tiles: int
    seconds: float
    megapixels_per_second: float
    uncertainty: str | None = None
    notes: list[str] = field(default_factory=list)


def scene_scale(pair: ScenePair, samples: Sequence[TileArrays], max_value: float | None) -> SceneScale:
    """Full scale of PAN and MS: an option, the bit depth in the metadata, or the 99.5 percentile.

    Raises:
        ValueError: a sample without any valid pixel, or a scale that is not positive.
    """
    if max_value is not None:
        return SceneScale(max_value, max_value, "option")
    if pair.meta.nbits and pair.pan_meta.nbits:
        return SceneScale(2.0**pair.pan_meta.nbits - 1, 2.0**pair.meta.nbits - 1, "bit depth")
    pan = np.concatenate([s.pan[0][s.pan_valid] for s in samples])
    ms = np.concatenate([s.ms[:, s.ms_valid].ravel() for s in samples])
    values = []
    for name, pixels in (("PAN", pan), ("MS", ms)):
        if pixels.size == 0:
            raise ValueError(f"the {name} holds no valid pixel")
        high = float(np.percentile(np.abs(pixels), HIGH_PERCENTILE))
        values.append(high if high > 0 else 1.0)
    return SceneScale(values[0], values[1], "percentile")


def survey(
    pair: ScenePair,
    psf: Psf | None = None,
    max_value: float | None = None,
    *,
    measure: bool = False,
    soft: bool = False,
) -> Survey:
    """First pass: samples spread over the whole scene give scale, moments, blur and shift.

    Args:
        pair: the opened scene.
        psf: blur and shift, if they are to be assumed; else they are measured.
        max_value: full scale, if known.
        measure: measure blur and shift even where `psf` is assumed.
        soft: measure the MS's softness too, where blur and shift are measured.

    Raises:
        IncompatiblePair: nothing in the scene is valid.
    """
    began = time.monotonic()
    size = max(SURVEY_SIZE // pair.ratio, 32)
    windows = sample_windows(pair, SURVEY_WINDOWS, size)
    if not windows:
        raise IncompatiblePair("No pixel is valid in both PAN and MS; check nodata (--nodata) and that they overlap.")
    samples = [pair.read_frame(*window) for window in windows]
    try:
        scale = scene_scale(pair, samples, max_value)
        pieces, valid = [], []
        for s in samples:
            h, w = s.ms_valid.shape
            whole = s.pan_valid.reshape(h, pair.ratio, w, pair.ratio).all((1, 3)) & s.ms_valid
            pan, ms = torch.from_numpy(s.pan / scale.pan), torch.from_numpy(s.ms / scale.ms)
            for part in _clean_parts(whole):
                pieces.append((_cut(pan, part, pair.ratio), _cut(ms, part, 1)))
                valid.append(torch.from_numpy(whole[part]))
        measured = None
        if psf is None or measure:
            statistics = scene_statistics(pieces, pair.ratio, None, valid, soft=soft)
            found = statistics.psf
            measured = None if found == default_psf(pair.ratio) else found
        if psf is not None:
            statistics = scene_statistics(pieces, pair.ratio, psf, valid)
    except ValueError as error:
        raise IncompatiblePair(f"The scene cannot be sharpened: {error}.") from error
    return Survey(scale, statistics, measured, time.monotonic() - began)


def survey_for(pair: ScenePair, sharpener: Sharpener, max_value: float | None, *, measure: bool = False) -> Survey:
    """What a sharpener wants to know, see `survey`."""
    assumed, soft = sharpener.assumed_psf(pair.ratio), sharpener.wants_softness
    return survey(pair, assumed, max_value, measure=measure, soft=soft)


def suited(found: Survey, sharpener: Sharpener) -> Survey:
    """The survey in the scale that the sharpener wants; full scales that are known stand."""
    scale = found.scale
    wanted = sharpener.full_scale(scale.pan, scale.ms) if scale.source == "percentile" else None
    if wanted is None:
        return found
    pan, ms = wanted
    statistics = found.statistics
    gain = torch.full_like(statistics.mean, scale.ms / ms)
    gain[-1] = scale.pan / pan
    statistics = replace(
        statistics,
        mean=statistics.mean * gain,
        covariance=statistics.covariance * gain.outer(gain),
        detail=statistics.detail * gain.outer(gain),
    )
    return replace(found, scale=SceneScale(pan, ms, "model"), statistics=statistics)


FEW_LEVELS = 16
"""Whole numbers that a band's range must hold, or rounding to integers is worth a warning."""


def clipping_warning(meta: MsMeta, scale: SceneScale, dtype: str | None) -> str | None:
    """What another output dtype would do to the MS's values, where it would not do them justice."""
    if dtype is None or np.dtype(dtype).kind == "f":
        return None
    lost = None
    if scale.ms > np.iinfo(dtype).max:
        lost = f"{dtype} ends at {np.iinfo(dtype).max}, and values above are clipped, not rescaled"
    elif np.dtype(meta.dtype).kind == "f" and scale.ms < FEW_LEVELS:
        lost = f"{dtype} rounds them to whole numbers, and they are not rescaled"
    if lost is None:
        return None
    return f"the MS's values reach about {scale.ms:.4g}: {lost}; leave out --output-dtype"


Part = tuple[slice, slice]


def _clean_parts(valid: np.ndarray) -> list[Part]:
    """The sample without invalid borders where that is all valid, else its quarters: clean ones
    tell the blur."""
    (top, bottom), (left, right) = (_reach_of(np.any(valid, axis)) for axis in (1, 0))
    inner = valid[top:bottom, left:right]
    if inner.all() or min(inner.shape) < 64:
        return [(slice(top, bottom), slice(left, right))]
    middle, centre = (top + bottom) // 2, (left + right) // 2
    rows, cols = (
        (slice(top, middle), slice(middle, bottom)),
        (slice(left, centre), slice(centre, right)),
    )
    return [(r, c) for r in rows for c in cols if valid[r, c].any()]


def _reach_of(there: Any) -> tuple[int, int]:
    """Where the true values begin and end; all of it where there is none."""
    found = np.flatnonzero(there)
    return (int(found[0]), int(found[-1]) + 1) if found.size else (0, len(there))


def _cut(x: torch.Tensor, part: Part, factor: int) -> torch.Tensor:
    rows, cols = (slice(p.start * factor, p.stop * factor) for p in part)
    return x[:, rows, cols]


def plan_scene(pair: ScenePair, sharpener: Sharpener, statistics: SceneStatistics, options: SharpenOptions) -> TilePlan:
    """Cut the frame into tiles that suit the sharpener."""
    ratio = pair.ratio
    multiple = sharpener.multiple // math.gcd(sharpener.multiple, ratio)
    overlap_pan = options.overlap
    if overlap_pan is None:
        overlap_pan = 0 if sharpener.local else 32
    tile = max(round(options.tile / ratio / multiple), 1) * multiple
    overlap = math.ceil(overlap_pan / ratio / multiple) * multiple
    overlap = min(overlap, tile // 2 // multiple * multiple)
    if max(pair.frame_shape) <= tile:  # one tile, no larger than it must be
        overlap = 0
    rows = plan_tiles(pair.frame_shape, tile, overlap, multiple)
    return TilePlan(rows, overlap, sharpener.margin(statistics))


def _batches(
    pair: ScenePair, tiles: Sequence[Tile], margin: int, batch_size: int
) -> Iterator[list[tuple[int, TileArrays]]]:
    """Read tiles, leave out those without a valid pixel, and group the rest."""
    batch: list[tuple[int, TileArrays]] = []
    for index, tile in enumerate(tiles):
        if pair.is_empty(tile.row, tile.col, tile.height, tile.width):
            continue
        arrays = pair.read_frame(tile.row, tile.col, tile.height, tile.width, margin)
        if not _core(arrays.valid, margin * pair.ratio).any():
            continue
        batch.append((index, arrays))
        if len(batch) == batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _core(x: np.ndarray, margin: int) -> np.ndarray:
    return x[..., margin:-margin, margin:-margin] if margin else x


def _prefetched(iterator: Iterator[Any]) -> Iterator[Any]:
    """Read the next batch in a thread while the present one is computed."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, iterator, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, iterator, None)
            yield item


@dataclass(frozen=True)
class _Batch:
    """Tiles that were read, ready for the device."""

    items: list[tuple[int, TileArrays]]
    """(number in the row, what was read)."""
    pan: torch.Tensor
    ms: torch.Tensor


def _scaled(batches: Iterator[list[tuple[int, TileArrays]]], scale: SceneScale, pinned: bool) -> Iterator[_Batch]:
    """Tensors in the network's units; pinned ones are copied to a GPU while it computes."""
    for items in batches:
        pan = torch.from_numpy(np.stack([a.pan for _, a in items]) / np.float32(scale.pan))
        ms = torch.from_numpy(np.stack([a.ms for _, a in items]) / np.float32(scale.ms))
        if pinned:
            pan, ms = pan.pin_memory(), ms.pin_memory()
        yield _Batch(items, pan, ms)


@dataclass
class TileRow:
    """One row of tiles, sharpened: PAN-grid arrays per tile, None where nothing is valid."""

    hrms: list[np.ndarray | None]
    valid: list[np.ndarray | None]
    sigma: list[np.ndarray | None]


def sharpen_row(
    pair: ScenePair,
    sharpener: Sharpener,
    found: Survey,
    tiles: Sequence[Tile],
    margin: int,
    options: SharpenOptions,
    on_tile: Callable[[int], None],
) -> TileRow:
    """Read and sharpen one row of tiles in batches."""
    row = TileRow([None] * len(tiles), [None] * len(tiles), [None] * len(tiles))
    ratio, origin = pair.ratio, pair.origin

    def keep(batch: _Batch, done: Sharpened) -> None:
        hrms = (done.hrms * found.scale.ms).float().cpu()
        if not torch.isfinite(hrms).all():  # written, it would pass for nodata
            raise ModelMismatch(
                f"{sharpener.name} gives values that are not finite for this scene; use --dtype fp32 or another model."
            )
        if options.max_value is not None:
            hrms = hrms.clamp(max=options.max_value)
        sigma = None if done.sigma is None else (done.sigma * found.scale.ms).float().cpu()
        for k, (i, arrays) in enumerate(batch.items):
            row.hrms[i] = hrms[k].numpy()
            row.valid[i] = _core(arrays.valid, margin * ratio)[None]
            row.sigma[i] = None if sigma is None else sigma[k].numpy()
        on_tile(len(batch.items))

    read = _batches(pair, tiles, margin, options.batch_size)
    pinned = getattr(sharpener, "device", "cpu").startswith("cuda")
    late: tuple[_Batch, Sharpened] | None = None  # computed while the next one is launched
    for batch in _prefetched(_scaled(read, found.scale, pinned)):
        places = [((origin[0] + tiles[i].row) * ratio, (origin[1] + tiles[i].col) * ratio) for i, _ in batch.items]
        done = sharpener.sharpen(batch.pan, batch.ms, found.statistics, places)
        if late is not None:
            keep(*late)
        late = (batch, done)
        if not options.overlapped:
            keep(*late)
            late = None
    if late is not None:
        keep(*late)
    return row


def sharpen_scene(
    pair: ScenePair,
    sharpener: Sharpener,
    options: SharpenOptions,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SharpenReport:
    """Sharpen a scene into `options.output`.

    When memory runs out the batch is halved, then the tile.

    Args:
        pair: the opened scene.
        sharpener: a model or a classical method.
        options: sizes and output.
        on_progress: called with (tiles done, tiles in all).

    Raises:
        TilingError, ModelError: see their classes.
        OutOfMemory: not even the smallest tile fits.
    """
    warn_of_dropped = True
    while True:
        try:
            return _sharpen_scene(pair, sharpener, options, on_progress, warn_of_dropped)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            options = _smaller(options, error)
            warn_of_dropped = False  # from here on they are this run's own
            log.warning(
                "memory is short: going on with batches of %d and tiles of %d PAN pixels",
                options.batch_size,
                options.tile,
            )


def _smaller(options: SharpenOptions, error: BaseException) -> SharpenOptions:
    if options.batch_size > 1:  # the strips that are finished stay good
        return replace(options, batch_size=options.batch_size // 2, resume=True)
    if options.tile // 2 >= SMALLEST_TILE:  # they do not: strips are rows of tiles
        return replace(options, tile=options.tile // 2, resume=False)
    raise OutOfMemory(
        f"Memory ran out with tiles of {options.tile} PAN pixels, one at a time; "
        "free memory, or sharpen a part with --bounds."
    ) from error


def _sharpen_scene(
    pair: ScenePair,
    sharpener: Sharpener,
    options: SharpenOptions,
    on_progress: Callable[[int, int], None],
    warn_of_dropped: bool,
) -> SharpenReport:
    began = time.monotonic()
    sharpener.check(pair.bands, pair.ratio)
    outputs = {"image": options.output}
    if options.uncertainty is not None:
        outputs["uncertainty"] = options.uncertainty
    for path in outputs.values():
        check_output(path, pair.inputs, options.writing.overwrite)

    found = options.survey or survey_for(pair, sharpener, options.max_value)
    found = suited(found, sharpener)
    plan = plan_scene(pair, sharpener, found.statistics, options)
    encodings = {
        "image": output_encoding(pair.meta, options.writing.dtype, options.writing.nodata, pair.may_have_invalid),
        "uncertainty": output_encoding(uncertainty_meta(pair.meta), None, None, True),
    }
    fingerprint = {
        **pair.identity(),
        "version": __version__,
        "method": sharpener.provenance(),
        "tile": [plan.rows[0][0].height, plan.rows[0][0].width, plan.overlap],
        "max_value": options.max_value,
        "dtype": options.writing.dtype,
        "output_nodata": repr(options.writing.nodata),
    }
    store = StripStore(options.output, fingerprint, list(outputs), len(plan.rows), resume=options.resume)
    if store.dropped and warn_of_dropped:
        log.warning(
            "%d strips of an interrupted run of %s were dropped; --resume would have used them, "
            "if its options were the same",
            store.dropped,
            options.output,
        )
    across = pair.bytes_across(plan.rows[0][0].height + 2 * plan.margin)
    with _stopping_well(store), bounded_gdal_cache(across):
        found = _remembered(found, store.folder / "survey.json")
        skipped = _make_strips(pair, sharpener, options, found, plan, store, encodings, on_progress)
        _write(pair, sharpener, options, found, store, outputs)
    seconds = time.monotonic() - began
    pixels = pair.grid.width * pair.grid.height
    return SharpenReport(
        output=options.output,
        width=pair.grid.width,
        height=pair.grid.height,
        bands=pair.bands,
        ratio=pair.ratio,
        method=sharpener.name,
        scale=found.scale,
        sigma=found.statistics.psf.sigma,
        shift=found.offset,
        applied_shift=pair.shift,
        correlation=None if found.measured is None else found.measured.correlation,
        tiles=plan.count,
        skipped_tiles=skipped,
        seconds=round(seconds, 2),
        megapixels_per_second=round(pixels / 1e6 / max(seconds, 1e-9), 3),
        uncertainty=options.uncertainty,
        notes=list(pair.notes),
    )


@contextmanager
def _stopping_well(store: StripStore) -> Iterator[None]:
    """A run that stops half-way leaves strips that `--resume` takes up, or nothing."""
    try:
        yield
    except BaseException as error:
        finished = store.count - len(store.missing())
        if not finished:
            store.remove()
        if isinstance(error, KeyboardInterrupt):
            kept = f"{finished} of {store.count} strips are kept in {store.folder}, --resume goes on from there"
            text = f"Interrupted; {kept}." if finished else "Interrupted before the first strip."
            raise Interrupted(text) from error
        raise
    finally:
        store.release()


class _Behind:
    """Does work in a thread, one piece behind, or at once; an error in it comes with the next."""

    def __init__(self, threaded: bool):
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._last: Future[None] | None = None

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._pool is None:
            work(*arguments)
            return
        self._wait()
        self._last = self._pool.submit(work, *arguments)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._pool is None:
            return
        self._pool.shutdown()  # what was computed is kept, whatever happened
        if kind is None:
            self._wait()


def _make_strips(
    pair: ScenePair,
    sharpener: Sharpener,
    options: SharpenOptions,
    found: Survey,
    plan: TilePlan,
    store: StripStore,
    encodings: Mapping[str, Encoding],
    on_progress: Callable[[int, int], None],
) -> int:
    """Sharpen the strips that the store lacks; returns how many tiles were skipped."""
    shape = (plan.rows, pair.frame_shape, pair.bands, pair.ratio, plan.overlap)
    blenders = {name: StripBlender(*shape) for name in store.layers}
    validity = StripBlender(plan.rows, pair.frame_shape, 1, pair.ratio, plan.overlap, np.bool_)
    missing = set(store.missing())
    needed = tile_rows_needed(missing, plan.overlap)
    total, done, skipped = sum(len(plan.rows[i]) for i in needed), 0, 0
    on_progress(0, total)

    def finish(index: int, row: TileRow) -> None:
        """Blend a row with those before it and keep the strip."""
        tiles = plan.rows[index]
        _, valid = validity.add_row(tiles, row.valid)
        strips = {}
        for name, arrays in (("image", row.hrms), ("uncertainty", row.sigma)):
            if name in store.layers:
                first, values = blenders[name].add_row(tiles, arrays)
                _, cut_valid = pair.to_output(first, valid)
                _, cut_values = pair.to_output(first, values)
                strips[name] = encode(cut_values, cut_valid[0], encodings[name])
        if index in missing:
            store.put(index, strips)

    with _Behind(options.overlapped) as behind:
        for index in needed:
            tiles = plan.rows[index]
            before = done

            def count(tiles_done: int, before: int = before) -> None:
                nonlocal done
                done += tiles_done
                on_progress(done, total)

            row = sharpen_row(pair, sharpener, found, tiles, plan.margin, options, count)
            skipped += sum(array is None for array in row.hrms)
            done = before + len(tiles)
            on_progress(done, total)
            behind.do(finish, index, row)
    return skipped


def _remembered(found: Survey, path: Path) -> Survey:
    """The survey of the run that is resumed, to the last bit; else this one, kept for later."""
    if path.exists():
        data = json.loads(path.read_text())
        psf = data["measured"]
        return Survey(
            SceneScale(**data["scale"]),
            SceneStatistics.from_dict(data["statistics"]),
            None if psf is None else Psf(psf["sigma"], tuple(psf["shift"]), psf["correlation"]),
        )
    data = {
        "scale": asdict(found.scale),
        "statistics": found.statistics.as_dict(),
        "measured": None if found.measured is None else asdict(found.measured),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data))
    temporary.replace(path)
    return found


def _tags(sharpener: Sharpener, found: Survey, pair: ScenePair) -> dict[str, str]:
    tags = {
        "VERSION": __version__,
        **sharpener.provenance(),
        "RATIO": str(pair.ratio),
        "SCALE_PAN": f"{found.scale.pan:g}",
        "SCALE_MS": f"{found.scale.ms:g}",
        "BLUR_SIGMA": f"{found.statistics.psf.sigma:.3f}",
        "APPLIED_SHIFT": _two(pair.shift),
        "PAN": Path(pair.inputs[0]).name,
        "MS": " ".join(Path(p).name for p in pair.inputs[1:]),
    }
    if found.statistics.softness is not None:
        tags["MS_SOFTNESS"] = f"{found.statistics.softness:.3f}"
    if found.offset is not None:
        tags["MEASURED_SHIFT"] = _two(found.offset)
    return {f"UKNOWPAN_{key}": value for key, value in tags.items()}


def _two(shift: tuple[float, float]) -> str:
    return " ".join(f"{value:z.3f}" for value in shift)


def _write(
    pair: ScenePair,
    sharpener: Sharpener,
    options: SharpenOptions,
    found: Survey,
    store: StripStore,
    outputs: dict[str, str],
) -> None:
    """Strips to files; the files get their names when all of them are complete."""
    more = {f"UKNOWPAN_{key}": value for key, value in options.tags.items()}
    tags = _tags(sharpener, found, pair) | more
    writers: dict[str, SceneWriter] = {}
    try:
        for name, path in outputs.items():
            plain = name == "image"
            writing = options.writing
            if not plain:
                writing = OutputOptions(overwrite=options.writing.overwrite, num_threads=options.writing.num_threads)
            writers[name] = SceneWriter(
                path,
                pair.grid,
                pair.meta if plain else uncertainty_meta(pair.meta),
                writing,
                tags,
                may_have_invalid=pair.may_have_invalid or not plain,
                inputs=pair.inputs,
            )
        store.assemble(writers)
        for name in reversed(list(writers)):  # the image last: it says that all is there
            writers[name].close()
    finally:
        for writer in writers.values():
            writer.abort()
    store.remove()
