"""Arrays to PNG pictures: common stretch, labelled panels, error maps, previews of rasters.

A picture here is a uint8 array (3, H, W) in R, G, B order. Only numpy and rasterio's PNG driver
are used, so that looking at a result needs no plotting library.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile

BACKGROUND = (24, 26, 30)
"""Colour between panels."""
INVALID = (58, 58, 62)
"""Colour of pixels without a value."""
GAMMA = 1.35
"""Midtones of a linear percentile stretch look too dark on a screen; this lifts them a little."""
PERCENTILE_SAMPLES = 1_000_000
"""Pixels that percentiles are taken from; more only costs time."""

COLOURS = ("red", "green", "blue")
# Words that turn a colour name into another band: red edge, coastal blue, near infra red.
OTHER_BAND_WORDS = frozenset({"edge", "coastal", "deep", "near", "infra", "ir"})


def rgb_bands(descriptions: Sequence[str | None], colorinterp_names: Sequence[str], count: int) -> tuple[int, int, int]:
    """Which bands to show as red, green and blue (0-based).

    Band descriptions decide ("Red", "B4 red"; not "red edge"), then colour interpretation. A
    raster that names neither is assumed to be in wavelength order, as sensors deliver it: 4 and
    more bands blue, green, red, ... -> (2, 1, 0); 8 bands in WorldView order (coastal, blue,
    green, yellow, red, ...) -> (4, 2, 1). 3 bands are assumed to be R, G, B already; with fewer
    the first is shown as grey.

    Args:
        descriptions: one per band, None or "" where there is none; may be empty.
        colorinterp_names: names as in `rasterio.enums.ColorInterp`; may be empty.
        count: number of bands.
    """
    described = [_position(descriptions, colour, count) for colour in COLOURS]
    interpreted = [_position(colorinterp_names, colour, count) for colour in COLOURS]
    for red, green, blue in (described, interpreted):
        if red is not None and green is not None and blue is not None:
            return red, green, blue
    if count < 3:
        return 0, 0, 0
    if count == 3:
        return 0, 1, 2
    return (4, 2, 1) if count == 8 else (2, 1, 0)


def _position(names: Sequence[str | None], colour: str, count: int) -> int | None:
    words = [re.findall("[a-z]+", (name or "").lower()) for name in names[:count]]
    exact = [i for i, w in enumerate(words) if w == [colour]]
    partial = [i for i, w in enumerate(words) if colour in w and not OTHER_BAND_WORDS & set(w)]
    return next(iter(exact + partial), None)


@dataclass(frozen=True)
class Stretch:
    """One look, to be applied to every picture of a scene so that they can be compared."""

    bands: tuple[int, int, int]
    """Bands shown as red, green, blue (0-based)."""
    low: tuple[float, float, float]
    """Value per shown band that becomes black."""
    high: tuple[float, float, float]
    """Value per shown band that becomes white."""
    gamma: float = GAMMA

    def apply(self, image: np.ndarray) -> np.ndarray:
        """uint8 (3, H, W) of an image (C, H, W) in the units the stretch was made in; NaN is
        drawn in the colour of missing values.

        Raises:
            ValueError: the image lacks a band that the stretch shows.
        """
        if image.ndim != 3 or image.shape[0] <= max(self.bands):
            raise ValueError(
                f"this stretch shows bands {self.bands} (0-based), but the image has shape "
                f"{image.shape}; make one for it with stretch_from."
            )
        shown = image[list(self.bands)].astype(np.float32)
        low, high = (np.array(v, np.float32)[:, None, None] for v in (self.low, self.high))
        unit = np.clip((shown - low) / (high - low), 0, 1) ** np.float32(1 / self.gamma)
        missing = ~np.isfinite(shown).all(axis=0)
        rgb = np.rint(255 * np.where(missing, 0, unit)).astype(np.uint8)
        rgb[:, missing] = np.array(INVALID, np.uint8)[:, None]
        return rgb


def stretch_from(
    image: np.ndarray,
    valid: np.ndarray | None = None,
    low: float = 1,
    high: float = 99,
    *,
    bands: tuple[int, int, int] | None = None,
    gamma: float = GAMMA,
) -> Stretch:
    """Percentile stretch per shown band.

    Args:
        image: (C, H, W), any units.
        valid: (H, W) bool, pixels to count; NaN never counts.
        low: percentile that becomes black.
        high: percentile that becomes white.
        bands: bands to show; by default those of `rgb_bands` for an unnamed raster.
        gamma: above 1 lifts the midtones.
    """
    shown = bands or rgb_bands((), (), image.shape[0])
    limits = [_limits(image[band], valid, (low, high)) for band in shown]
    lows, highs = zip(*limits, strict=True)
    return Stretch(shown, lows, highs, gamma)


def _limits(band: np.ndarray, valid: np.ndarray | None, percentiles: tuple[float, float]) -> tuple[float, float]:
    counted = np.isfinite(band) if valid is None else np.isfinite(band) & valid
    values = band[counted]
    values = values[:: values.size // PERCENTILE_SAMPLES + 1]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, percentiles))
    # A flat band has no contrast to show: it becomes black, not a division by zero.
    return low, high if high > low else low + 1


# One glyph per character: seven rows of five pixels, "#" is ink.
FONT_ROWS = """
A .###. #...# #...# ##### #...# #...# #...#
B ####. #...# #...# ####. #...# #...# ####.
C .###. #...# #.... #.... #.... #...# .###.
D ####. #...# #...# #...# #...# #...# ####.
E ##### #.... #.... ####. #.... #.... #####
F ##### #.... #.... ####. #.... #.... #....
G .###. #...# #.... #.### #...# #...# .####
H #...# #...# #...# ##### #...# #...# #...#
I .###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.
J ..### ...#. ...#. ...#. ...#. #..#. .##..
K #...# #..#. #.#.. ##... #.#.. #..#. #...#
L #.... #.... #.... #.... #.... #.... #####
M #...# ##.## #.#.# #.#.# #...# #...# #...#
N #...# ##..# ##..# #.#.# #..## #..## #...#
O .###. #...# #...# #...# #...# #...# .###.
P ####. #...# #...# ####. #.... #.... #....
Q .###. #...# #...# #...# #.#.# #..#. .##.#
R ####. #...# #...# ####. #.#.. #..#. #...#
S .#### #.... #.... .###. ....# ....# ####.
T ##### ..#.. ..#.. ..#.. ..#.. ..#.. ..#..
U #...# #...# #...# #...# #...# #...# .###.
V #...# #...# #...# #...# #...# .#.#. ..#..
W #...# #...# #...# #.#.# #.#.# ##.## #...#
X #...# #...# .#.#. ..#.. .#.#. #...# #...#
Y #...# #...# .#.#. ..#.. ..#.. ..#.. ..#..
Z ##### ....# ...#. ..#.. .#... #.... #####
0 .###. #...# #..## #.#.# ##..# #...# .###.
1 ..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.
2 .###. #...# ....# ..##. .#... #.... #####
3 ####. ....# ....# .###. ....# ....# ####.
4 ...#. ..##. .#.#. #..#. ##### ...#. ...#.
5 ##### #.... ####. ....# ....# #...# .###.
6 ..##. .#... #.... ####. #...# #...# .###.
7 ##### ....# ...#. ..#.. ..#.. .#... .#...
8 .###. #...# #...# .###. #...# #...# .###.
9 .###. #...# #...# .#### ....# ...#. .##..
. ..... ..... ..... ..... ..... .##.. .##..
, ..... ..... ..... ..... .##.. ..#.. .#...
- ..... ..... ..... .###. ..... ..... .....
+ ..... ..#.. ..#.. ##### ..#.. ..#.. .....
/ ....# ....# ...#. ..#.. .#... #.... #....
% ##..# ##..# ...#. ..#.. .#... #..## #..##
: ..... .##.. .##.. ..... .##.. .##.. .....
( ...#. ..#.. .#... .#... .#... ..#.. ...#.
) .#... ..#.. ...#. ...#. ...#. ..#.. .#...
= ..... ..... ##### ..... ##### ..... .....
_ ..... ..... ..... ..... ..... ..... #####
? .###. #...# ....# ...#. ..#.. ..... ..#..
"""
GLYPH_HEIGHT, GLYPH_WIDTH = 7, 5


@cache
def _font() -> dict[str, np.ndarray]:
    glyphs = {" ": np.zeros((GLYPH_HEIGHT, GLYPH_WIDTH), bool)}
    for line in FONT_ROWS.strip().splitlines():
        character, *rows = line.split()
        glyphs[character] = np.array([[dot == "#" for dot in row] for row in rows])
    return glyphs


def _ink(text: str, scale: int) -> np.ndarray:
    """bool (7*scale, W): the text in capitals; a character the font lacks is drawn as "?"."""
    font = _font()
    glyphs = [np.pad(font.get(c, font["?"]), ((0, 0), (0, 1))) for c in text.upper()]
    return np.kron(np.hstack(glyphs)[:, :-1], np.ones((scale, scale), bool))


def label(rgb: np.ndarray, text: str, scale: int = 2) -> np.ndarray:
    """Copy of a picture (3, H, W) with the text on a darkened plate in its upper left corner.

    `scale` is the size of a font dot in pixels; it shrinks where the text would not fit, and what
    does not fit even at 1 is cut off.
    """
    if not text:
        return rgb.copy()
    dots = (GLYPH_WIDTH + 1) * len(text) + 5
    scale = max(1, min(scale, rgb.shape[2] // dots))
    ink = np.pad(_ink(text, scale), 3 * scale)[: rgb.shape[1], : rgb.shape[2]]
    labelled = rgb.copy()
    plate = labelled[:, : ink.shape[0], : ink.shape[1]]
    plate[:] = np.where(ink, 255, plate * 0.3).astype(np.uint8)
    return labelled


def enlarge(rgb: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel of (C, H, W) as a block of factor x factor: shows what the sensor saw."""
    return rgb.repeat(factor, axis=1).repeat(factor, axis=2)


def panels(
    rows: Sequence[Sequence[tuple[str, np.ndarray]]],
    gap: int = 6,
    background: tuple[int, int, int] = BACKGROUND,
    scale: int = 2,
) -> np.ndarray:
    """Labelled pictures in a grid, uint8 (3, H, W).

    Args:
        rows: of (label, picture (3, h, w)); a column is as wide as its widest picture, a row as
            high as its highest, smaller ones are centred in their cell. Rows may differ in length.
        gap: pixels around and between the pictures.
        background: R, G, B between the pictures.
        scale: size of a font dot, see `label`.

    Raises:
        ValueError: there is no picture at all.
    """
    if not any(rows):
        raise ValueError("panels need at least one picture, but every row is empty.")
    heights = [max((p.shape[1] for _, p in row), default=0) for row in rows]
    columns = max(len(row) for row in rows)
    widths = [max(row[c][1].shape[2] for row in rows if c < len(row)) for c in range(columns)]
    size = (sum(heights) + gap * (len(rows) + 1), sum(widths) + gap * (columns + 1))
    sheet = np.empty((3, *size), np.uint8)
    sheet[:] = np.array(background, np.uint8)[:, None, None]
    for r, row in enumerate(rows):
        for c, (text, picture) in enumerate(row):
            height, width = picture.shape[1:]
            top = sum(heights[:r]) + gap * (r + 1) + (heights[r] - height) // 2
            left = sum(widths[:c]) + gap * (c + 1) + (widths[c] - width) // 2
            sheet[:, top : top + height, left : left + width] = label(picture, text, scale)
    return sheet


def error_map(fused: np.ndarray, truth: np.ndarray, limit: float) -> np.ndarray:
    """uint8 (3, H, W): absolute error averaged over the bands; black is 0, pale yellow `limit`.

    Args:
        fused: (C, H, W).
        truth: same shape and units.
        limit: error shown brightest; give the same to all maps that stand side by side.

    Raises:
        ValueError: shapes differ, or the limit is not above 0.
    """
    if fused.shape != truth.shape:
        raise ValueError(
            f"fused has shape {fused.shape} but truth {truth.shape}; an error map needs the same "
            "bands on the same grid."
        )
    if not limit > 0:
        raise ValueError(f"limit is {limit}; give an error above 0 to be shown brightest.")
    error = np.abs(fused.astype(np.float32) - truth.astype(np.float32)).mean(axis=0)
    missing = ~np.isfinite(error)
    index = np.rint(255 * np.clip(np.where(missing, 0, error) / limit, 0, 1)).astype(np.intp)
    rgb = np.ascontiguousarray(np.moveaxis(_heat_ramp()[index], 2, 0))
    rgb[:, missing] = np.array(INVALID, np.uint8)[:, None]
    return rgb


@cache
def _heat_ramp() -> np.ndarray:
    """uint8 (256, 3): black, violet, red, orange, pale yellow, evenly spaced in lightness.

    Lightness rises linearly in Oklab (B. Ottosson, 2020, bottomosson.github.io/posts/oklab), so
    that twice the error looks about twice as bright, for colour-blind readers as well.
    """
    t = np.linspace(0, 1, 256)
    lightness = 0.97 * t
    chroma = 0.165 * np.sin(np.pi * t) ** 0.8 + 0.05 * t**2
    hue = np.deg2rad(-65 + 170 * t)
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    # Oklab -> cone responses (cube roots) -> linear sRGB
    cones = lightness[:, None] + np.outer(a, [0.3963377774, -0.1055613458, -0.0894841775])
    cones += np.outer(b, [0.2158037573, -0.0638541728, -1.2914855480])
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip(cones**3 @ to_rgb.T, 0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


def write_png(path: str | os.PathLike[str], rgb: np.ndarray) -> None:
    """Write uint8 (3, H, W), or (4, H, W) with alpha, or (1, H, W) grey, as a PNG.

    The file appears under its name only when it is complete, and alone: GDAL's side files stay in
    memory.

    Raises:
        ValueError: not uint8, or another number of bands.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"a PNG needs uint8 of shape (1, 3 or 4, H, W), got {rgb.dtype} {rgb.shape}; Stretch.apply makes one."
        )
    count, height, width = rgb.shape
    with warnings.catch_warnings(), MemoryFile(ext=".png") as memory:
        warnings.simplefilter("ignore", NotGeoreferencedWarning)  # a picture has no place
        with memory.open(driver="PNG", width=width, height=height, count=count, dtype="uint8") as png:
            png.write(rgb)
        content = memory.read()
    target = Path(path)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        beside.write_bytes(content)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def preview_png(
    raster: str | os.PathLike[str], output: str | os.PathLike[str], max_size: int = 1024
) -> tuple[int, int]:
    """Picture of a finished raster; pixels without data are transparent.

    Overviews are used where the raster has them; it is never held at full size.

    Args:
        raster: path or URL that rasterio opens.
        output: PNG to write.
        max_size: longest side in pixels; a smaller raster keeps its size.

    Returns:
        (height, width) of the picture.
    """
    with rasterio.open(raster) as source:
        interpretations = [c.name for c in source.colorinterp]
        bands = rgb_bands(source.descriptions, interpretations, source.count)
        shrink = max(1.0, max(source.shape) / max_size)
        height, width = (max(1, round(n / shrink)) for n in source.shape)
        read = sorted(set(bands))
        image = source.read(
            [b + 1 for b in read],
            out_shape=(len(read), height, width),
            resampling=Resampling.average if shrink > 1 else Resampling.nearest,
        )
        valid = source.dataset_mask(out_shape=(height, width)) > 0
    red, green, blue = (read.index(b) for b in bands)
    valid &= np.isfinite(image).all(axis=0)
    rgb = stretch_from(image, valid, bands=(red, green, blue)).apply(image)
    alpha = 255 * valid.astype(np.uint8)[None]
    write_png(output, rgb if valid.all() else np.concatenate([rgb, alpha]))
    return height, width
