"""What a run would take: grid, tiles, memory, time. Measured on one tile of the scene itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import ceil, gcd

import numpy as np

from uknowpan_models.pansharpener import Sharpener
from uknowpan_tiling import ScenePair, Tile, sample_windows

from .pipeline import SharpenOptions, TilePlan, plan_scene, sharpen_row, survey

__all__ = ["Forecast", "estimate"]

FLOATS_PER_PIXEL = 110
"""float32 values per band and pixel of a tile with its margin: features, activations and their
copies. Measured with 4 bands and tiles of 512: a peak of 430 to 710 MB."""

TILES_LOOKED_AT = 2000
"""Tiles of which it is counted how many hold data; of a larger scene every n-th."""

LOOKS = 9
"""Places at which a tile full of data is looked for."""


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
    """Beside the output while it is made: finished strips and the files, as if uncompressed."""
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
            f"time     about {self.seconds:.0f} s (one batch was timed)",
        ]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])

    def _empty_tiles(self) -> str:
        full = self.tiles_with_data
        return "" if full == self.tiles else f"; about {full} hold data, the others are skipped"


def estimate(pair: ScenePair, sharpener: Sharpener, options: SharpenOptions) -> Forecast:
    """Survey the scene, sharpen one batch of a tile full of data twice, and extrapolate; tiles
    without data are counted and timed apart."""
    assumed = sharpener.assumed_psf(pair.ratio)
    found = options.survey or survey(pair, assumed, options.max_value)
    plan = plan_scene(pair, sharpener, found.statistics, options)
    tile = _full_tile(pair, plan)
    batch = [tile] * min(options.batch_size, plan.count)

    def sharpen() -> object:
        return sharpen_row(pair, sharpener, found, batch, plan.margin, options, lambda n: None)

    full, empty = _tiles_with_data(pair, plan)
    seconds = found.seconds + _warm_seconds(sharpen) / len(batch) * full
    if empty is not None:  # read and left out
        place = (empty.row, empty.col, empty.height, empty.width, plan.margin)
        seconds += _warm_seconds(lambda: pair.read_frame(*place)) * (plan.count - full)
    height, width = (n * pair.ratio for n in (tile.height, tile.width))
    window = (height + 2 * plan.margin * pair.ratio) * (width + 2 * plan.margin * pair.ratio)
    per_batch = window * pair.bands * FLOATS_PER_PIXEL * 4 * len(batch)
    strip = height * pair.grid.width * pair.bands * 4 * 4
    values = pair.grid.width * pair.grid.height * pair.bands
    image = values * np.dtype(options.writing.dtype or pair.meta.dtype).itemsize
    files = image if options.uncertainty is None else image + values * 4
    # A COG is a copy of a finished GeoTIFF.
    disk = 2 * files + (image if options.writing.format == "cog" else 0)
    return Forecast(
        width=pair.grid.width,
        height=pair.grid.height,
        bands=pair.bands,
        ratio=pair.ratio,
        method=sharpener.name,
        tiles=plan.count,
        tiles_with_data=full,
        tile_pan_pixels=(height, width),
        margin_pan_pixels=plan.margin * pair.ratio,
        memory_mb=round((per_batch + strip) / 1e6, 1),
        seconds=round(seconds, 1),
        output_mb=round(image / 1e6, 1),
        disk_mb=round(disk / 1e6, 1),
        notes=list(pair.notes),
    )


def _warm_seconds(work: Callable[[], object]) -> float:
    """What the second time takes; the first one pays for start-up."""
    work()
    began = time.monotonic()
    work()
    return time.monotonic() - began


def _tiles_with_data(pair: ScenePair, plan: TilePlan) -> tuple[int, Tile | None]:
    """How many tiles are computed (those with a pixel valid in both; at least 1), and one that is
    not, if one was met."""
    if not pair.may_have_invalid:
        return plan.count, None
    tiles = [tile for row in plan.rows for tile in row]
    step = ceil(len(tiles) / TILES_LOOKED_AT)
    while gcd(step, len(plan.rows[0])) > 1:  # or some columns would never be met
        step += 1
    looked_at = tiles[::step]
    empty = [t for t in looked_at if not pair.valid_fraction(t.row, t.col, t.height, t.width)]
    share = 1 - len(empty) / len(looked_at)
    return max(1, round(share * plan.count)), empty[0] if empty else None


def _full_tile(pair: ScenePair, plan: TilePlan) -> Tile:
    """The tile with most valid pixels among some spread over the frame and over the data: one
    without any takes no time and would pass for typical."""
    tiles = [tile for row in plan.rows for tile in row]
    centres = [(r + h // 2, c + w // 2) for r, c, h, w in sample_windows(pair, LOOKS)]
    candidates = tiles[:: max(1, len(tiles) // LOOKS)] + [
        t
        for t in tiles
        if any(0 <= y - t.row < t.height and 0 <= x - t.col < t.width for y, x in centres)
    ]
    return max(candidates, key=lambda t: pair.valid_fraction(t.row, t.col, t.height, t.width))
