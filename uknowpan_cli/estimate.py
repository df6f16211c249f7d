"""What a run would take: grid, tiles, memory, time. Measured on one tile of the scene itself."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from uknowpan_models.pansharpener import Sharpener
from uknowpan_tiling import ScenePair

from .pipeline import SharpenOptions, plan_scene, sharpen_row, survey

__all__ = ["Forecast", "estimate"]


@dataclass(frozen=True)
class Forecast:
    """What a run would do."""

    width: int
    height: int
    bands: int
    ratio: int
    method: str
    tiles: int
    tile_pan_pixels: tuple[int, int]
    margin_pan_pixels: int
    memory_mb: float
    """Of arrays, beyond what importing torch costs."""
    seconds: float
    output_mb: float
    """Uncompressed."""
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """For a person."""
        lines = [
            f"output   {self.width} x {self.height} pixels, {self.bands} bands, "
            f"{self.output_mb:.0f} MB before compression",
            f"method   {self.method}, PAN/MS ratio {self.ratio}",
            f"tiles    {self.tiles} of {self.tile_pan_pixels[0]} x {self.tile_pan_pixels[1]} PAN "
            f"pixels, {self.margin_pan_pixels} pixels of context around each",
            f"memory   about {self.memory_mb:.0f} MB beside torch itself",
            f"time     about {self.seconds:.0f} s (one tile was timed)",
        ]
        return "\n".join([*lines, *(f"note     {note}" for note in self.notes)])


def estimate(pair: ScenePair, sharpener: Sharpener, options: SharpenOptions) -> Forecast:
    """Survey the scene, sharpen the tile in its middle twice, and extrapolate."""
    began = time.monotonic()
    psf = sharpener.assumed_psf(pair.ratio) or options.psf
    found = survey(pair, psf, options.max_value)
    surveyed = time.monotonic() - began
    plan = plan_scene(pair, sharpener, found.statistics, options)
    row = plan.rows[len(plan.rows) // 2]
    tile = [row[len(row) // 2]]
    times = []
    for _ in range(2):  # the first one pays for start-up
        began = time.monotonic()
        sharpen_row(pair, sharpener, found, tile, plan.margin, options, lambda n: None)
        times.append(time.monotonic() - began)
    height, width = (n * pair.ratio for n in (tile[0].height, tile[0].width))
    window = (height + 2 * plan.margin * pair.ratio) * (width + 2 * plan.margin * pair.ratio)
    # Features, activations and their copies: about 40 float32 values per band and window pixel.
    per_tile = window * (pair.bands * 40 + 20) * 4 * options.batch_size
    strip = height * pair.grid.width * pair.bands * 4 * 4
    itemsize = {"8": 1, "6": 2, "2": 4, "4": 8}.get(pair.meta.dtype[-1], 4)
    pixels = pair.grid.width * pair.grid.height
    return Forecast(
        width=pair.grid.width,
        height=pair.grid.height,
        bands=pair.bands,
        ratio=pair.ratio,
        method=sharpener.name,
        tiles=plan.count,
        tile_pan_pixels=(height, width),
        margin_pan_pixels=plan.margin * pair.ratio,
        memory_mb=round((per_tile + strip) / 1e6, 1),
        seconds=round(surveyed + times[-1] * plan.count, 1),
        output_mb=round(pixels * pair.bands * itemsize / 1e6, 1),
        notes=list(pair.notes),
    )
