"""The forecast of a run: grid, tiles, memory, time; measured on a piece of the scene itself."""

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from math import ceil, gcd
from typing import TypeVar

import numpy as np

from uknowpan.models.devices import peak_mb
from uknowpan.scenes import BYTES_OF_STRIP, Scene, creation_of
from uknowpan.sharpening import Array, TileRow, layer_writer, sharpen_rows
from uknowpan.tiling import Grid, OutputError, StripStore, Tile, encode, sample_windows
from uknowpan.tiling.raster import GDAL_CACHE_BYTES

TILES_LOOKED_AT = 2000
"""Tiles that are looked at for data; of a larger scene every n-th."""
LOOKS = 9
"""Places at which a tile full of data is looked for."""
PROBE = 128
"""PAN pixels of a piece that is timed where a whole tile would take long."""
QUICK = 0.1
"""Seconds of such a piece below which a whole tile is timed."""
WRITTEN = 512
"""Rows and columns of a result whose writing is timed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Forecast:
    """The outcome of a run before it begins; its fields are keys of the JSON."""

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
    """Peak of the whole process."""
    seconds: float
    output_mb: float
    """Uncompressed."""
    disk_mb: float
    """Largest size of finished strips and files, as if uncompressed. Strips without data take no
    space, nor do empty parts of a compressed file."""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a person."""
        full = self.tiles_with_data
        empty = "" if full == self.tiles else f"; about {full} hold data, the others are skipped"
        lines = [
            f"output   {self.width} x {self.height} pixels, {self.bands} bands, "
            f"{self.output_mb:.0f} MB before compression",
            f"method   {self.method}, PAN/MS ratio {self.ratio}",
            f"tiles    {self.tiles} of {self.tile_pan_pixels[0]} x {self.tile_pan_pixels[1]} PAN "
            f"pixels, {self.margin_pan_pixels} pixels of context around each{empty}",
            f"memory   about {self.memory_mb:.0f} MB",
            f"disk     up to {self.disk_mb:.0f} MB while it runs",
            f"time     about {self.seconds:.0f} s (a piece of the scene was timed)",
        ]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


@dataclass(frozen=True)
class _Data:
    """The share of a scene that is computed."""

    tiles: int
    """Tiles with data, about."""
    strips: int
    """Strips with such a tile, at most about."""
    empty: Tile | None
    """A tile that is not computed, if there is one."""


def estimate(scene: Scene) -> Forecast:
    """Sharpen a piece full of data, write its result, and extrapolate.

    Tiles without data are counted and timed apart. The time up to here counts too: a run starts the same way.
    """
    pair, plan, grid = scene.pair, scene.plan, scene.pair.grid
    memory = peak_mb() * 1e6  # libraries, model and survey
    seconds = time.monotonic() - scene.began
    tile, data = _full_tile(scene), _data_of(scene)
    per_tile, row = _sharpening_seconds(scene, tile)
    seconds += per_tile * data.tiles + _passing_seconds(scene, data)
    notes = list(pair.notes)
    share = data.tiles / plan.count
    try:
        pixel = share * _writing_seconds(scene, row) if row.hrms[0] is not None else 0.0
        pixel += (1 - share) * _writing_seconds(scene, None) if share < 1 else 0.0
        seconds += pixel * grid.width * grid.height
    except (OSError, OutputError) as error:
        notes.append(f"writing is not in the time: {error}")
    height, width = (n * pair.ratio for n in (tile.height, tile.width))
    memory += scene.tile_bytes * scene.at_once + max(scene.bytes_across, GDAL_CACHE_BYTES)
    memory += scene.area(plan.strips[0]) * pair.bands * BYTES_OF_STRIP * len(scene.layers)
    itemsize = np.dtype(scene.options.output_dtype or pair.meta.dtype).itemsize
    image = grid.width * grid.height * pair.bands * itemsize
    written = image if scene.options.stretch is None else grid.width * grid.height * min(pair.bands, 3)
    return Forecast(
        width=grid.width,
        height=grid.height,
        bands=pair.bands,
        ratio=pair.ratio,
        method=scene.sharpener.name,
        tiles=plan.count,
        tiles_with_data=data.tiles,
        tile_pan_pixels=(height, width),
        margin_pan_pixels=plan.margin * pair.ratio,
        memory_mb=round(memory / 1e6, 1),
        seconds=round(seconds, 1),
        output_mb=round(written / 1e6, 1),
        disk_mb=round(_disk(scene, data, image, written) / 1e6, 1),
        notes=notes,
    )


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    began = time.monotonic()
    result = work()
    return time.monotonic() - began, result


def _sharpening_seconds(scene: Scene, tile: Tile) -> tuple[float, TileRow]:
    """Seconds for a tile among those beside it, and the result of the piece that was timed: on a CPU a small one for a
    slow method.

    The first call pays for the start and does not count.
    """
    plan, ratio = scene.plan, scene.pair.ratio
    whole = scene.sharpener.multiple // gcd(scene.sharpener.multiple, ratio)
    side = ceil(PROBE / ratio / whole) * whole
    piece = Tile(tile.row, tile.col, min(side, tile.height), min(side, tile.width))

    def sharpen(count: int) -> TileRow:
        [row] = sharpen_rows(scene, [[piece] * count])
        return row

    if plan.count == 1 and scene.sharpener.local:  # a quick one, whose start belongs to the run
        piece = tile
        return _timed(lambda: sharpen(1))
    seconds, _ = _timed(lambda: sharpen(1))
    at_once = scene.at_once
    if seconds < QUICK or scene.sharpener.device != "cpu":
        piece = tile
        sharpen(at_once)  # the shape is new to the device, and memory to the process
    seconds, row = _timed(lambda: sharpen(at_once))
    rim = 2 * plan.margin
    larger = (tile.height + rim) * (tile.width + rim) / ((piece.height + rim) * (piece.width + rim))
    return seconds / at_once * larger, row


def _passing_seconds(scene: Scene, data: _Data) -> float:
    """Seconds for the tiles that are looked at and left out."""
    tile, pair = data.empty, scene.pair
    if tile is None:
        return 0.0
    seconds, _ = _timed(lambda: pair.is_empty(*tile) or pair.read_frame(*tile, scene.plan.margin))
    return seconds * (scene.plan.count - data.tiles)


def _writing_seconds(scene: Scene, row: TileRow | None) -> float:
    """Seconds per output pixel to encode, keep, compress and read back the first tile of `row`.

    None: a tile without data.
    """
    if row is None:
        empty = np.zeros((scene.pair.bands, WRITTEN, WRITTEN), np.float32)
        row = TileRow([empty], [np.zeros((1, WRITTEN, WRITTEN), np.bool_)], [empty])
    arrays = {"image": row.hrms[0], "uncertainty": row.sigma[0] if scene.options.uncertainty is not None else None}
    layers = {name: _repeated(values) for name, values in arrays.items() if values is not None}
    assert row.valid[0] is not None
    valid = _repeated(row.valid[0])[0]
    return _timed(lambda: _write(scene, layers, valid))[0] / int(valid.size)


def _repeated(rows: Array) -> Array:
    """A piece of (C, H, W) cut and repeated to one block height and two blocks width."""
    rows = rows[:, :WRITTEN, :WRITTEN]
    down, across = (ceil(WRITTEN / n) for n in rows.shape[1:])
    return np.tile(rows, (1, down, 2 * across))


def _write(scene: Scene, layers: Mapping[str, Array], valid: Array) -> None:
    """The end of a run, with a scene of this size."""
    grid: Grid = replace(scene.pair.grid, height=valid.shape[0], width=valid.shape[1])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        writers = {
            name: stack.enter_context(layer_writer(scene, name, f"{folder}/{name}.tif", grid)) for name in layers
        }
        store = StripStore(f"{folder}/out", {}, list(layers), 1)
        stack.callback(store.remove)
        store.put(0, {name: encode(rows, valid, writers[name].encoding) for name, rows in layers.items()})
        store.assemble(writers)


def _disk(scene: Scene, data: _Data, image: int, written: int) -> float:
    """Bytes, see `Forecast.disk_mb`. A COG is a copy of a finished GeoTIFF."""
    pair, options = scene.pair, scene.options
    sigma = 0 if options.uncertainty is None else pair.grid.width * pair.grid.height * pair.bands * 4
    share = data.tiles / scene.plan.count
    plain = creation_of(options).get("COMPRESS", "").upper() == "NONE"
    strips = (image + sigma) * data.strips / len(scene.plan.strips)
    copied = written * share if options.format == "cog" else 0
    return strips + written * (1 if plain else share) + sigma * share + copied


def _data_of(scene: Scene) -> _Data:
    """Count tiles with data by the MS alone: its pixels are few."""
    pair, plan = scene.pair, scene.plan
    if not pair.may_have_invalid:
        return _Data(plan.count, len(plan.strips), None)
    tiles = [(i, tile) for i, strip in enumerate(plan.strips) for tile in strip]
    step = ceil(len(tiles) / TILES_LOOKED_AT)
    while gcd(step, sum(map(len, plan.strips[: plan.across]))) > 1:  # or some columns would never be met
        step += 1
    looked_at = tiles[::step]
    full, empty = set(), []
    for i, t in looked_at:
        if pair.is_empty(*t):
            empty.append(t)
        else:
            full.add(i)
    share = 1 - len(empty) / len(looked_at)
    strips = len(full)
    if step > 1 and full:  # the tiles between those looked at may hold data
        strips = min(max(full) - min(full) + 3, len(plan.strips))
    return _Data(max(1, round(share * plan.count)), max(1, strips), empty[0] if empty else None)


def _full_tile(scene: Scene) -> Tile:
    """The tile with most valid pixels among some spread over the frame and over the data."""
    pair = scene.pair
    tiles = [tile for strip in scene.plan.strips for tile in strip]
    if len(tiles) == 1 or not pair.may_have_invalid:
        return tiles[0]
    centres = [(r + h // 2, c + w // 2) for r, c, h, w in sample_windows(pair, LOOKS)]
    candidates = tiles[:: max(1, len(tiles) // LOOKS)] + [
        t for t in tiles if any(0 <= y - t.row < t.height and 0 <= x - t.col < t.width for y, x in centres)
    ]
    return max(candidates, key=lambda t: pair.valid_fraction(*t))
