"""One scene sharpened: rows of tiles, strips, files, report."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from uknowpan import __version__
from uknowpan.durable import Scratch
from uknowpan.errors import Interrupted, OutOfMemory, is_out_of_memory
from uknowpan.files import check_outputs
from uknowpan.mapping import EightBit, eight_bit
from uknowpan.models.devices import thread_count
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.registration.field import Registration
from uknowpan.models.sharpeners import Pixels, Sharpened
from uknowpan.scenes import Scene, creation_of, plan_scene
from uknowpan.surveying import Progress, SceneScale, no_progress, remember, remembered
from uknowpan.threads import Background, launched_ahead, prefetched, side_by_side
from uknowpan.tiling import (
    Grid,
    InputUnreadable,
    OutputOptions,
    SceneWriter,
    StripBlender,
    StripStore,
    Tile,
    TileArrays,
    encode,
    output_encoding,
    strips_needed,
    uncertainty_meta,
)
from uknowpan.tiling.errors import InvalidResult
from uknowpan.tiling.metadata import rgb_meta
from uknowpan.tiling.raster import bounded_gdal_cache

log = logging.getLogger("uknowpan")

SMALLEST_TILE = 64
"""PAN pixels; the back-off from memory shortage stops here."""

Array = npt.NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class SharpenReport:
    """The account of a finished run; its fields are keys of the JSON."""

    output: str
    width: int
    height: int
    bands: int
    ratio: int
    method: str
    scale: SceneScale
    sigma: float
    """Blur of the MS that the method assumed, PAN pixels."""
    shift: tuple[float, float] | None
    """(dy, dx), PAN pixels, from the PAN to the MS, + is down and right; None: not measured."""
    applied_shift: tuple[float, float]
    """(dy, dx), PAN pixels, by which the MS was moved in the mean, + is down and right."""
    registration: str
    """Displacement that was taken out: none, shift, affine or local, and bands."""
    largest_displacement: float
    """PAN pixels that were taken out at most."""
    correlation: float | None
    """Correlation of PAN and MS where the shift was measured; None: not measured."""
    tiles: int
    skipped_tiles: int
    seconds: float
    megapixels_per_second: float
    uncertainty: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Batch:
    """Tiles that were read, in the units and of the kind that the sharpener takes."""

    items: list[tuple[int, int, TileArrays]]
    """(number of the row, number in the row, pixels)."""
    pan: Pixels
    ms: Pixels
    rows_done: int
    """Rows whose tiles are all in this batch or those before."""


def _batches(scene: Scene, rows: Sequence[Sequence[Tile]]) -> Iterator[_Batch]:
    """Read tiles, leave out those without a valid pixel, and group the rest of each row.

    A batch spans no rows: its size may show in the last bit, and a resumed run lacks some rows.
    """
    pair, margin, items = scene.pair, scene.plan.margin, []
    for number, tiles in enumerate(rows):
        for index, tile in enumerate(tiles):
            last = index == len(tiles) - 1
            if not pair.is_empty(tile.row, tile.col, tile.height, tile.width):
                arrays = pair.read_frame(tile.row, tile.col, tile.height, tile.width, margin)
                if _core(arrays.valid, margin * pair.ratio).any():
                    items.append((number, index, arrays))
            if items and (last or len(items) == scene.batch_size):
                yield _scaled(items, scene, number + last)
                items = []


def _scaled(items: list[tuple[int, int, TileArrays]], scene: Scene, rows_done: int) -> _Batch:
    scale, staged = scene.survey.scale, scene.sharpener.staged
    pan = staged(np.stack([a.pan for *_, a in items]) / np.float32(scale.pan))
    ms = staged(np.stack([a.ms for *_, a in items]) / np.float32(scale.ms))
    return _Batch(items, pan, ms, rows_done)


class _Fetched:
    """A result on its way to the host: copied while the device computes the next batch."""

    def __init__(self, done: Sharpened, scale: float):
        self._arrived: Any = None
        if isinstance(done.hrms, np.ndarray):
            self._parts = [x * np.float32(scale) for x in (done.hrms, done.sigma) if x is not None]
            return
        import torch

        both = done.hrms if done.sigma is None else torch.cat([done.hrms, done.sigma], 1)
        both = (both * scale).float()
        if both.device.type == "cuda":
            here = torch.empty(both.shape, pin_memory=True)
            both = here.copy_(both, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        self._parts = [part.numpy() for part in both.split(done.hrms.shape[1], 1)]

    def arrays(self) -> tuple[Array, Array | None]:
        """hrms and sigma, in the scene's units; waits for them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._parts[0], self._parts[1] if len(self._parts) > 1 else None


def _core(x: Array, margin: int) -> Array:
    return x[..., margin:-margin, margin:-margin] if margin else x


@dataclass
class TileRow:
    """The tiles of a strip, sharpened: PAN-grid arrays per tile, None where nothing is valid."""

    hrms: list[Array | None]
    valid: list[Array | None]
    sigma: list[Array | None]

    @staticmethod
    def empty(tiles: Sequence[Tile]) -> TileRow:
        nothing: list[Array | None] = [None] * len(tiles)
        return TileRow(nothing, nothing[:], nothing[:])


def sharpen_rows(
    scene: Scene, rows: Sequence[Sequence[Tile]], on_area: Callable[[int], None] = lambda area: None
) -> Iterator[TileRow]:
    """Read and sharpen strips' tiles in batches, in order; `on_area` gets the PAN pixels of each batch."""
    ratio, (top, left) = scene.pair.ratio, scene.pair.origin
    done = deque(map(TileRow.empty, rows))
    first = 0

    def keep(batch: _Batch, fetched: _Fetched) -> Iterator[TileRow]:
        """Put the tiles of a batch in their places; the rows that are now complete."""
        nonlocal first
        _place(scene, batch, fetched, done, first)
        on_area(scene.area([rows[r][i] for r, i, _ in batch.items]))
        while first < batch.rows_done:
            first += 1
            yield done.popleft()

    def sharpened(batch: _Batch) -> _Fetched:
        tiles = [rows[r][i] for r, i, _ in batch.items]
        places = [((top + tile.row) * ratio, (left + tile.col) * ratio) for tile in tiles]
        answer = scene.sharpener.sharpen(batch.pan, batch.ms, scene.survey.statistics, places)
        if "uncertainty" not in scene.layers:
            answer = replace(answer, sigma=None)
        return _Fetched(answer, scene.survey.scale.ms)

    on_cpu, cores = scene.sharpener.device == "cpu", thread_count(scene.options.num_threads)
    with (
        closing(prefetched(_batches(scene, rows))) as batches,
        closing(
            side_by_side(sharpened, batches, scene.workers, cores) if on_cpu else launched_ahead(sharpened, batches)
        ) as results,
    ):
        for batch, fetched in results:
            yield from keep(batch, fetched)
    yield from done


def _place(scene: Scene, batch: _Batch, fetched: _Fetched, rows: deque[TileRow], first: int) -> None:
    """Put the tiles of a batch into their rows, of which number `first` is the first one here."""
    hrms, sigma = fetched.arrays()
    if sigma is not None and scene.options.coverage == 90:
        sigma = sigma * np.float32(scene.sharpener.sigmas_90)
    rim = scene.plan.margin * scene.pair.ratio
    wanted = np.stack([_core(a.valid, rim) for *_, a in batch.items])[:, None]
    unusable = sigma is not None and not (np.isfinite(sigma) | ~wanted).all()
    if unusable or not np.isfinite(hrms).all():  # written, they would pass for nodata
        raise ModelMismatch(
            f"{scene.sharpener.name} gives {'uncertainties' if unusable else 'values'} that are not finite "
            "for this scene; use --dtype fp32 or another model."
        )
    if scene.options.max_value is not None:
        hrms = np.minimum(hrms, np.float32(scene.options.max_value))
    for k, (number, i, arrays) in enumerate(batch.items):
        row = rows[number - first]
        row.hrms[i] = hrms[k]
        row.valid[i] = _core(arrays.valid[None] if arrays.band_valid is None else arrays.band_valid, rim)
        row.sigma[i] = None if sigma is None else sigma[k]


Keep = Callable[[int, int, int, dict[str, Array], Array], None]
"""Takes a strip: its number, its first row and column in the output, layer -> (C, n, w) values, (n, w)
valid, or (C, n, w) where bands are valid each by itself."""


def sharpen_strips(scene: Scene, wanted: set[int], keep: Keep, on_progress: Progress = no_progress) -> int:
    """Sharpen strips and hand them to `keep`.

    Args:
        scene: the scene.
        wanted: numbers of the strips; those that they blend with are sharpened too.
        keep: takes each wanted strip.
        on_progress: called with (PAN pixels done, PAN pixels in all).

    Returns:
        The number of tiles without a valid pixel.
    """
    plan, pair = scene.plan, scene.pair
    shape = (pair.ratio, plan.overlap)
    blender = partial(StripBlender, plan.strips, pair.frame_shape, across=plan.across)
    blenders = {name: blender(pair.bands, *shape) for name in scene.layers}
    validity = blender(pair.bands if pair.each_band else 1, *shape, np.bool_)
    needed = strips_needed(wanted, plan.across, plan.overlap)
    total, done, skipped = sum(scene.area(plan.strips[i]) for i in needed), 0, 0
    on_progress(0, total)

    def finish(index: int, row: TileRow) -> None:
        """Blend a strip with those before it."""
        first, col, valid = validity.add(index, row.valid)
        top, cut = pair.to_output(first, valid, col)
        strip = {}
        for name, arrays in (("image", row.hrms), ("uncertainty", row.sigma)):
            if name in blenders:
                _, _, values = blenders[name].add(index, arrays)
                _, strip[name] = pair.to_output(first, values, col)
        if index in wanted:
            keep(index, top, scene.columns[index % plan.across], strip, cut if pair.each_band else cut[0])

    def count(area: int) -> None:
        nonlocal done
        done += area
        on_progress(done, total)

    with Background(scene.overlapped) as background:
        for index, row in zip(needed, sharpen_rows(scene, [plan.strips[i] for i in needed], count), strict=True):
            tiles = plan.strips[index]
            skipped += sum(array is None for array in row.hrms)
            count(scene.area([tile for tile, array in zip(tiles, row.hrms, strict=True) if array is None]))
            background.do(finish, index, row)
    return skipped


def with_back_off(scene: Scene, work: Callable[[Scene, bool], T]) -> T:
    """Do work on a scene; when memory runs out one worker goes on, then the batch is halved, then the tile.

    Args:
        scene: the scene.
        work: called with the scene and whether this is the first attempt.

    Raises:
        OutOfMemory: not even the smallest tile fits.
    """
    first = True
    while True:
        try:
            return work(scene, first)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            scene, first = _smaller(scene, error), False
            log.warning(
                "memory is short: going on with tiles of %d PAN pixels, %d at once",
                *(scene.options.tile, scene.batch_size * scene.workers),
            )


def _smaller(scene: Scene, error: BaseException) -> Scene:
    options = scene.options
    if scene.workers > 1 or scene.batch_size > 1:  # the strips that are finished stay good
        size = scene.batch_size if scene.workers > 1 else scene.batch_size // 2
        return replace(scene, most_workers=1, batch_size=size, options=replace(options, resume=True))
    if options.tile // 2 >= SMALLEST_TILE:  # they do not: strips are rows of tiles
        options = replace(options, tile=options.tile // 2, resume=False)
        return replace(scene, options=options, plan=plan_scene(scene.pair, scene.sharpener, scene.survey, options))
    raise OutOfMemory(
        f"Memory ran out with tiles of {options.tile} PAN pixels, one at a time; "
        "free memory, or sharpen a part with --bounds."
    ) from error


def sharpen_scene(
    scene: Scene, on_progress: Progress = no_progress, tags: Mapping[str, str] | None = None
) -> SharpenReport:
    """Sharpen a scene into its files.

    Args:
        scene: from `prepared`.
        on_progress: called with (PAN pixels done, PAN pixels in all).
        tags: more tags for the files, written as UKNOWPAN_*.

    Raises:
        TilingError, ModelError, OutOfMemory, Interrupted: see their classes.
    """
    return with_back_off(scene, lambda smaller, first: _to_files(smaller, on_progress, tags or {}, first))


def _to_files(scene: Scene, on_progress: Progress, tags: Mapping[str, str], first: bool) -> SharpenReport:
    pair, options, plan = scene.pair, scene.options, scene.plan
    check_outputs({f"--{name}": path for name, path in scene.layers.items()}, pair.inputs, options.overwrite)
    encodings = {
        "image": output_encoding(pair.meta, options.output_dtype, options.nodata, pair.may_have_invalid),
        "uncertainty": output_encoding(uncertainty_meta(pair.meta), None, None, True),
    }
    fingerprint = {
        **pair.identity(),
        "version": __version__,
        "method": scene.sharpener.provenance(),
        "tile": [plan.strips[0][0].height, plan.strips[0][0].width, plan.overlap],
        "max_value": options.max_value,
        "dtype": options.output_dtype,
        "output_nodata": repr(options.nodata),
        "coregister": options.coregister,
        "coverage": options.coverage,
    }
    nodata = encodings["image"].nodata
    count, columns = len(plan.strips), scene.columns
    store = StripStore(scene.output, fingerprint, list(scene.layers), count, columns=columns, resume=options.resume)
    if store.dropped and first:  # later they are this run's own
        log.warning(
            "%d strips of an interrupted run of %s were dropped; --resume would have used them, "
            "if its options were the same",
            *(store.dropped, scene.output),
        )

    def keep(index: int, top: int, left: int, strip: dict[str, Array], valid: Array) -> None:
        store.put(index, {name: encode(values, valid, encodings[name]) for name, values in strip.items()})

    with _ends_in_order(store), bounded_gdal_cache(scene.bytes_across):
        scene = _with_survey_of(store, scene)
        skipped = sharpen_strips(scene, set(store.missing()), keep, on_progress)
        _assemble(scene, store, tags, nodata)
    return _report(scene, skipped)


def _with_survey_of(store: StripStore, scene: Scene) -> Scene:
    """The scene with the survey that the strips were made with; strips go where it is lost."""
    path = store.folder / "survey.json"
    survey = remembered(path)
    if survey is None:
        store.drop_strips()
        survey = scene.survey
        remember(survey, path)
    scene.pair.displacement = survey.field
    plan = plan_scene(scene.pair, scene.sharpener, survey, scene.options)
    return replace(scene, survey=survey, plan=plan)


def _report(scene: Scene, skipped: int) -> SharpenReport:
    pair, survey = scene.pair, scene.survey
    seconds = time.monotonic() - scene.began
    pixels = pair.grid.width * pair.grid.height
    return SharpenReport(
        output=scene.output,
        width=pair.grid.width,
        height=pair.grid.height,
        bands=pair.bands,
        ratio=pair.ratio,
        method=scene.sharpener.name,
        scale=survey.scale,
        sigma=survey.statistics.psf.sigma,
        shift=survey.shift,
        **_applied(survey.field),
        correlation=None if survey.measured is None else survey.measured.correlation,
        tiles=scene.plan.count,
        skipped_tiles=skipped,
        seconds=round(seconds, 2),
        megapixels_per_second=round(pixels / 1e6 / max(seconds, 1e-9), 3),
        uncertainty=scene.layers.get("uncertainty"),
        notes=list(pair.notes),
    )


def _applied(field: Registration | None) -> dict[str, Any]:
    """Name, in the report, of the displacement that was taken out."""
    if field is None:
        return {"applied_shift": (0.0, 0.0), "registration": "none", "largest_displacement": 0.0}
    dy, dx = (-round(value, 3) for value in field.shift)
    name = f"{field.model}, bands" if field.own_bands else field.model
    return {"applied_shift": (dy, dx), "registration": name, "largest_displacement": round(field.largest, 3)}


@contextmanager
def _ends_in_order(store: StripStore) -> Iterator[None]:
    """A run that stops half-way leaves strips that `--resume` takes up, or nothing."""
    try:
        yield
    except BaseException as error:
        finished = store.count - len(store.missing())
        if not finished or isinstance(error, ModelMismatch | InvalidResult):  # another attempt would end alike
            store.remove()
        if isinstance(error, KeyboardInterrupt):
            kept = f"{finished} of {store.count} strips are kept in {store.folder}, --resume goes on from there"
            text = f"Interrupted; {kept}." if finished else "Interrupted before the first strip."
            raise Interrupted(text) from error
        raise
    finally:
        store.release()


def layer_writer(
    scene: Scene,
    layer: str,
    path: str,
    grid: Grid,
    tags: Mapping[str, str] | None = None,
    inputs: Sequence[str] = (),
    look: EightBit | None = None,
) -> SceneWriter:
    """The writer of a layer, "image" or "uncertainty", of this scene or of a piece of its size, maybe in 8 bits."""
    options, threads = scene.options, thread_count(scene.options.num_threads)
    plain = layer == "image"
    writing = OutputOptions(overwrite=options.overwrite, num_threads=threads)
    if plain:
        writing = OutputOptions(
            format=options.format,
            dtype=options.output_dtype,
            nodata=options.nodata,
            creation=creation_of(options),
            overviews=options.overviews,
            mask=options.mask,
            overwrite=options.overwrite,
            num_threads=threads,
        )
    meta = scene.pair.meta if plain else uncertainty_meta(scene.pair.meta, options.coverage)
    if not plain:
        tags = {**(tags or {}), "UKNOWPAN_COVERAGE": str(options.coverage)}
    return SceneWriter(
        path,
        grid,
        meta if look is None else rgb_meta(meta, look.bands),
        writing,
        tags,
        may_have_invalid=scene.pair.may_have_invalid or not plain,
        inputs=inputs,
    )


def _assemble(scene: Scene, store: StripStore, tags: Mapping[str, str], nodata: float | None) -> None:
    """Strips to files; the files get their names when all of them are complete and on the disk."""
    pair, options = scene.pair, scene.options
    look = None
    if options.stretch is not None:
        look = eight_bit(store.strips("image"), pair.grid, pair.meta, nodata, str(options.stretch))
        tags = {"STRETCH": look.tag, **tags}
    named = {f"UKNOWPAN_{key}": value for key, value in (_tags(scene) | dict(tags)).items()}
    extras = {"preview": options.preview, "stac": options.stac}
    with ExitStack() as stack:
        writers: dict[str, SceneWriter] = {}
        for name, path in scene.layers.items():
            own = look if name == "image" else None
            writers[name] = layer_writer(scene, name, path, pair.grid, named, pair.inputs, own)
            stack.callback(writers[name].abort)
        store.assemble(writers, {} if look is None else {"image": look})
        files = {name: writer.finish() for name, writer in writers.items()}
        for name, extra in extras.items():
            if extra is not None:
                files[name] = stack.enter_context(Scratch(extra))
                _write_extra(name, files["image"].path, files[name], scene)
                files[name].seal()
        try:
            pair.check_unchanged()
        except InputUnreadable:
            store.drop_strips()
            raise
        store.commit(files)
        for name in extras:
            if name in files:
                files[name].place()
        for name in reversed(list(writers)):  # the image last: with it all is there
            writers[name].place()
    store.remove()


def _write_extra(name: str, image: Path, file: Scratch, scene: Scene) -> None:
    """Make a preview or a STAC item from the finished image, under the file's temporary name."""
    if name == "preview":
        from uknowpan.pictures import preview_png

        preview_png(image, file.path)
        return
    from uknowpan.footprint import stac_item

    href = os.path.relpath(os.path.realpath(scene.output), file.target.parent)
    if scene.pair.pan_meta.acquired is None:
        log.warning("the PAN declares no time of acquisition; the STAC item has the time of processing")
    item = stac_item(image, file.target.stem, href, scene.pair.pan_meta.acquired, scene.pair.inputs)
    file.path.write_text(json.dumps(item, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tags(scene: Scene) -> dict[str, str]:
    pair, survey, applied = scene.pair, scene.survey, _applied(scene.survey.field)
    tags = {
        "VERSION": __version__,
        **scene.sharpener.provenance(),
        "RATIO": str(pair.ratio),
        "SCALE_PAN": f"{survey.scale.pan:g}",
        "SCALE_MS": f"{survey.scale.ms:g}",
        "BLUR_SIGMA": f"{survey.statistics.psf.sigma:.3f}",
        "APPLIED_SHIFT": " ".join(f"{value:z.3f}" for value in applied["applied_shift"]),
        "REGISTRATION": applied["registration"],
        "LARGEST_DISPLACEMENT": f"{applied['largest_displacement']:.3f}",
        "PAN": Path(pair.inputs[0]).name,
        "MS": " ".join(Path(p).name for p in pair.inputs[1:]),
    }
    if survey.statistics.softness is not None:
        tags["MS_SOFTNESS"] = f"{survey.statistics.softness:.3f}"
    if survey.shift is not None:
        tags["MEASURED_SHIFT"] = " ".join(f"{value:z.3f}" for value in survey.shift)
    return tags
