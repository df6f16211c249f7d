"""What a run would take: grid, tiles, memory, time. Measured on one tile of the scene itself."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import ceil, gcd
from pathlib import Path
from typing import TypeVar

import numpy as np

from uknowpan.models.sharpeners import Sharpener
from uknowpan.sharpening import SharpenOptions, TilePlan, TileRow, plan_scene, sharpen_row, survey_for
from uknowpan.tiling import (
    Grid,
    OutputError,
    OutputOptions,
    ScenePair,
    SceneWriter,
    StripStore,
    Tile,
    encode,
    sample_windows,
    uncertainty_meta,
)

TILES_LOOKED_AT = 2000
"""Tiles of which it is counted how many hold data; of a larger scene every n-th."""

LOOKS = 9
"""Places at which a tile full of data is looked for."""

WRITTEN = 512
"""Rows and columns of a tile's result whose writing is timed."""

LONGEST_START = 120.0
"""Seconds; a process that is older was not started for this scene."""

T = TypeVar("T")


@dataclass(frozen=True)
class Forecast:
    """What a run would do."""

    width: int
    height: int
    bands: int
    ratio: int
    method: str
    tiles: int
    tiles_with_data: int
    """About; the others are skipped."""
    tile_pan_pixels: tuple[int, int]
    margin_pan_pixels: int
    memory_mb: float
    """Of arrays, beyond what importing torch costs."""
    seconds: float
    output_mb: float
    """Uncompressed."""
    disk_mb: float
    """While it is made: finished strips and the files, what holds data as if uncompressed. Strips
    without any data take no space, nor do empty parts of a file that is compressed."""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a person."""
        lines = [
            f"output   {self.width} x {self.height} pixels, {self.bands} bands, "
            f"{self.output_mb:.0f} MB before compression",
            f"method   {self.method}, PAN/MS ratio {self.ratio}",
            f"tiles    {self.tiles} of {self.tile_pan_pixels[0]} x {self.tile_pan_pixels[1]} PAN "
            f"pixels, {self.margin_pan_pixels} pixels of context around each{self._empty_tiles()}",
            f"memory   about {self.memory_mb:.0f} MB beside torch itself",
            f"disk     up to {self.disk_mb:.0f} MB while it runs",
            f"time     about {self.seconds:.0f} s (one batch and its writing were timed)",
        ]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])

    def _empty_tiles(self) -> str:
        full = self.tiles_with_data
        return "" if full == self.tiles else f"; about {full} hold data, the others are skipped"


def estimate(pair: ScenePair, sharpener: Sharpener, options: SharpenOptions) -> Forecast:
    """Survey the scene, sharpen one batch of a tile full of data and write its result, each twice,
    and extrapolate; tiles without data are counted and timed apart. What this process took to come
    here counts too, unless it is an old one: a run starts the same way."""
    seconds = _start_seconds(options)
    found = options.survey or survey_for(pair, sharpener, options.max_value)
    plan = plan_scene(pair, sharpener, found.statistics, options)
    tile = _full_tile(pair, plan)
    batch = [tile] * min(options.batch_size, plan.count)

    def sharpen() -> TileRow:
        return sharpen_row(pair, sharpener, found, batch, plan.margin, options, lambda n: None)

    data = _data_of(pair, plan)
    per_batch_seconds, row = _warm(sharpen)
    seconds += found.seconds + per_batch_seconds / len(batch) * data.tiles
    seconds += _passing_seconds(pair, plan, data)
    notes = list(pair.notes)
    try:
        seconds += _end_seconds(pair, options, row, data.tiles / plan.count)
    except (OSError, OutputError) as error:
        notes.append(f"writing is not in the time: {error}")
    pixels = pair.grid.width * pair.grid.height
    height, width = (n * pair.ratio for n in (tile.height, tile.width))
    per_batch = plan.tile_bytes(pair) * len(batch)
    cache = pair.bytes_across(height // pair.ratio + 2 * plan.margin)
    strip = height * pair.grid.width * pair.bands * 4 * 4
    image = pixels * pair.bands * np.dtype(options.writing.dtype or pair.meta.dtype).itemsize
    return Forecast(
        width=pair.grid.width,
        height=pair.grid.height,
        bands=pair.bands,
        ratio=pair.ratio,
        method=sharpener.name,
        tiles=plan.count,
        tiles_with_data=data.tiles,
        tile_pan_pixels=(height, width),
        margin_pan_pixels=plan.margin * pair.ratio,
        memory_mb=round((per_batch + strip + cache) / 1e6, 1),
        seconds=round(seconds, 1),
        output_mb=round(image / 1e6, 1),
        disk_mb=round(_disk(pair, plan, options, data, image) / 1e6, 1),
        notes=notes,
    )


def _warm(work: Callable[[], T]) -> tuple[float, T]:
    """What the second time takes, and gives; the first one pays for start-up."""
    work()
    began = time.monotonic()
    done = work()
    return time.monotonic() - began, done


def _age() -> float:
    """Seconds since this process was started; 0 where nobody says."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        return 0.0


def _start_seconds(options: SharpenOptions) -> float:
    """What this process took up to now, but for the survey; 0 for an old one."""
    seconds = _age() - (0.0 if options.survey is None else options.survey.seconds)
    return seconds if 0 < seconds < LONGEST_START else 0.0


def _passing_seconds(pair: ScenePair, plan: TilePlan, data: _Data) -> float:
    """For the tiles that are looked at and left out."""
    tile = data.empty
    if tile is None:
        return 0.0
    place = (tile.row, tile.col, tile.height, tile.width)
    seconds, _ = _warm(lambda: pair.is_empty(*place) or pair.read_frame(*place, plan.margin))
    return seconds * (plan.count - data.tiles)


# Writing ------------------------------------------------------------------------------------------


def _end_seconds(pair: ScenePair, options: SharpenOptions, row: TileRow, share: float) -> float:
    """For all that comes after sharpening, where `share` of the scene holds data like `row`."""
    seconds = 0.0
    if row.hrms[0] is not None:  # else --bounds cut out a part without data
        seconds += share * _writing_seconds(pair, options, row)
    if share < 1:
        seconds += (1 - share) * _writing_seconds(pair, options, None)
    return seconds * pair.grid.width * pair.grid.height


def _writing_seconds(pair: ScenePair, options: SharpenOptions, row: TileRow | None) -> float:
    """What a pixel of the output takes from the sharpened tile to the finished file: encoding,
    keeping strips, compressing, reading back. Of the first tile of `row`; None: without data."""
    if row is None:
        hrms: np.ndarray | None = np.zeros((pair.bands, WRITTEN, WRITTEN), np.float32)
        valid: np.ndarray | None = np.zeros((1, WRITTEN, WRITTEN), np.bool_)
        sigma = hrms
    else:
        hrms, valid, sigma = row.hrms[0], row.valid[0], row.sigma[0]
    assert hrms is not None and valid is not None
    layers = {"image": _beside(hrms, options)}
    if options.uncertainty is not None and sigma is not None:
        layers["uncertainty"] = _beside(sigma, options)
    there = _beside(valid, options)[0]

    def write() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _write_there(folder, pair, options, layers, there)

    return _warm(write)[0] / there.size


def _beside(rows: np.ndarray, options: SharpenOptions) -> np.ndarray:
    """A piece of (C, H, W) several times side by side: blocks enough for all threads."""
    count = max(2, options.writing.num_threads)
    return np.tile(rows[:, :WRITTEN, :WRITTEN], (1, 1, count))


def _write_there(
    folder: str,
    pair: ScenePair,
    options: SharpenOptions,
    layers: Mapping[str, np.ndarray],
    valid: np.ndarray,
) -> None:
    """The end of a run, with a scene of this size."""
    grid: Grid = replace(pair.grid, height=valid.shape[0], width=valid.shape[1])
    with ExitStack() as stack:
        writers = {}
        for name in layers:
            plain = name == "image"
            writers[name] = SceneWriter(
                f"{folder}/{name}.tif",
                grid,
                pair.meta if plain else uncertainty_meta(pair.meta),
                options.writing if plain else OutputOptions(num_threads=options.writing.num_threads),
                may_have_invalid=pair.may_have_invalid or not plain,
            )
            stack.enter_context(writers[name])
        store = StripStore(f"{folder}/out", {}, list(layers), 1)
        stack.callback(store.remove)
        store.put(0, {name: encode(rows, valid, writers[name].encoding) for name, rows in layers.items()})
        store.assemble(writers)


def _disk(pair: ScenePair, plan: TilePlan, options: SharpenOptions, data: _Data, image: int) -> float:
    """Bytes, see `Forecast.disk_mb`. A COG is a copy of a finished GeoTIFF."""
    values = pair.grid.width * pair.grid.height * pair.bands
    sigma = 0 if options.uncertainty is None else values * 4
    share = data.tiles / plan.count
    creation = {key.upper(): value for key, value in options.writing.creation.items()}
    plain = creation.get("COMPRESS", "").upper() == "NONE"
    strips = (image + sigma) * data.rows / len(plan.rows)
    copied = image * share if options.writing.format == "cog" else 0
    return strips + image * (1 if plain else share) + sigma * share + copied


# Data ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """How much of a scene is computed."""

    tiles: int
    """About; those with a pixel valid in both."""
    rows: int
    """At most about; rows of tiles with such a tile."""
    empty: Tile | None
    """A tile that is not computed, if one was met."""


def _data_of(pair: ScenePair, plan: TilePlan) -> _Data:
    if not pair.may_have_invalid:
        return _Data(plan.count, len(plan.rows), None)
    tiles = [(i, tile) for i, row in enumerate(plan.rows) for tile in row]
    step = ceil(len(tiles) / TILES_LOOKED_AT)
    while gcd(step, len(plan.rows[0])) > 1:  # or some columns would never be met
        step += 1
    looked_at = tiles[::step]
    full, empty = set(), []
    for i, t in looked_at:
        if pair.valid_fraction(t.row, t.col, t.height, t.width):
            full.add(i)
        else:
            empty.append(t)
    share = 1 - len(empty) / len(looked_at)
    rows = len(full)
    if step > 1 and full:  # the tiles between those looked at may hold data
        rows = min(max(full) - min(full) + 3, len(plan.rows))
    return _Data(max(1, round(share * plan.count)), max(1, rows), empty[0] if empty else None)


def _full_tile(pair: ScenePair, plan: TilePlan) -> Tile:
    """The tile with most valid pixels among some spread over the frame and over the data: one
    without any takes no time and would pass for typical."""
    tiles = [tile for row in plan.rows for tile in row]
    centres = [(r + h // 2, c + w // 2) for r, c, h, w in sample_windows(pair, LOOKS)]
    candidates = tiles[:: max(1, len(tiles) // LOOKS)] + [
        t for t in tiles if any(0 <= y - t.row < t.height and 0 <= x - t.col < t.width for y, x in centres)
    ]
    return max(candidates, key=lambda t: pair.valid_fraction(t.row, t.col, t.height, t.width))
