"""Arrays to PNG pictures: common stretch, captioned panels, insets, error maps, previews of rasters.

A picture here is a uint8 array (3, H, W) in R, G, B order.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from uknowpan.durable import Scratch

BACKGROUND = (24, 26, 30)
"""Colour between panels."""
CAPTION = (235, 235, 235)
"""Colour of text and frames."""
INVALID = (58, 58, 62)
"""Colour of pixels without a value."""
GAMMA = 1.35
"""Midtones of a linear percentile stretch look too dark on a screen; this lifts them a little."""
PERCENTILE_SAMPLES = 1_000_000
"""Pixels that percentiles are taken from; more only costs time."""
SMALLEST_TEXT = 9
"""Pixels: no caption is shrunk below."""
HEAT = np.array([*bytes.fromhex("000000 100019 410035 79003c ae1d32 d35319 e98e29 f1c771 faf8d1")]).reshape(-1, 3)
"""Colours of error maps. Lightness rises evenly in Oklab (Ottosson, 2020): twice the error looks twice as bright."""

METRES_OF_A_DEGREE = 111_320.0

COLOURS = ("red", "green", "blue")
# Words that turn a colour name into another band: red edge, coastal blue, near infra red.
OTHER_BAND_WORDS = frozenset({"edge", "coastal", "deep", "near", "infra", "ir"})


def rgb_bands(descriptions: Sequence[str | None], colorinterp_names: Sequence[str], count: int) -> tuple[int, int, int]:
    """The bands to show as red, green and blue (0-based).

    Band descriptions decide ("Red", "B4 red"; not "red edge"), then colour interpretation. Else
    8 bands are in WorldView order (coastal, blue, green, yellow, red, ...) and 4 or more are
    blue, green, red, ... Three bands are red, green, blue; with fewer the first is shown as grey.

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
    """One look for all pictures of a scene, so that they can be compared."""

    bands: tuple[int, int, int]
    """Bands shown as red, green, blue (0-based)."""
    low: tuple[float, float, float]
    """Value per shown band that becomes black."""
    high: tuple[float, float, float]
    """Value per shown band that becomes white."""

    def apply(self, image: np.ndarray) -> np.ndarray:
        """The image (C, H, W) as uint8 (3, H, W); NaN gets the colour of missing values.

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
        unit = np.clip((shown - low) / (high - low), 0, 1) ** np.float32(1 / GAMMA)
        missing = ~np.isfinite(shown).all(axis=0)
        rgb: np.ndarray = np.rint(255 * np.where(missing, 0, unit)).astype(np.uint8)
        rgb[:, missing] = np.array(INVALID, np.uint8)[:, None]
        return rgb


def stretch_from(
    image: np.ndarray, valid: np.ndarray | None = None, *, bands: tuple[int, int, int] | None = None
) -> Stretch:
    """Stretch per shown band: the first percentile becomes black, the 99th white.

    Args:
        image: (C, H, W), any units.
        valid: (H, W) bool, pixels to count; NaN never counts.
        bands: bands to show; by default those of `rgb_bands` for an unnamed raster.
    """
    shown = bands or rgb_bands((), (), image.shape[0])
    lows, highs = zip(*(_limits(image[band], valid) for band in shown), strict=True)
    return Stretch(shown, lows, highs)


def _limits(band: np.ndarray, valid: np.ndarray | None) -> tuple[float, float]:
    counted = np.isfinite(band) if valid is None else np.isfinite(band) & valid
    values = band[counted]
    values = values[:: values.size // PERCENTILE_SAMPLES + 1]
    if not values.size:
        return 0.0, 1.0
    low, high = (float(v) for v in np.percentile(values, (1, 99)))
    # A flat band has no contrast to show: it becomes black, not a division by zero.
    return low, high if high > low else low + 1


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _caption(text: str, width: int, size: int) -> Image.Image:
    """A strip of that width; the text shrinks to fit, and is cut off where that is not enough."""
    strip = Image.new("RGB", (width, round(1.6 * size)), BACKGROUND)
    draw = ImageDraw.Draw(strip)
    fitted = next((n for n in range(size, SMALLEST_TEXT, -1) if _font(n).getlength(text) <= width), SMALLEST_TEXT)
    draw.text((0, 1.15 * size), text, CAPTION, _font(fitted), anchor="ls")
    return strip


def panels(rows: Sequence[Sequence[tuple[str, np.ndarray]]], gap: int = 8, text: int = 18) -> np.ndarray:
    """Pictures in a grid with a caption above each, uint8 (3, H, W).

    Args:
        rows: (caption, picture (3, h, w)) each. A column is as wide as its widest picture, a row
            as high as its highest; smaller ones are centred. Rows may differ in length.
        gap: pixels around and between the pictures.
        text: height of the captions in pixels; they shrink where they do not fit.

    Raises:
        ValueError: there is no picture at all.
    """
    if not any(rows):
        raise ValueError("panels need at least one picture, but every row is empty.")
    cells = [
        [np.concatenate([_array(_caption(words, p.shape[2], text)), p], axis=1) if words else p for words, p in row]
        for row in rows
    ]
    heights = [max((c.shape[1] for c in row), default=0) for row in cells]
    widths = [max(row[i].shape[2] for row in cells if i < len(row)) for i in range(max(map(len, cells)))]
    sheet = Image.new("RGB", (sum(widths) + gap * (len(widths) + 1), sum(heights) + gap * (len(rows) + 1)), BACKGROUND)
    top = gap
    for row, height in zip(cells, heights, strict=True):
        left = gap
        for cell, width in zip(row, widths, strict=False):
            place = (left + (width - cell.shape[2]) // 2, top + (height - cell.shape[1]) // 2)
            sheet.paste(_image(cell), place)
            left += width + gap
        top += height + gap
    return _array(sheet)


def add_inset(rgb: np.ndarray, source: tuple[int, int, int, int], factor: int) -> np.ndarray:
    """A copy of a picture (3, H, W) whose lower right corner shows a part of it enlarged.

    Args:
        rgb: the picture.
        source: row, column, height and width of the part, which gets a thin frame.
        factor: pixels of the inset per pixel of the picture.
    """
    row, column, height, width = source
    part = np.pad(
        enlarge(rgb[:, row : row + height, column : column + width], factor),
        ((0, 0), (2, 2), (2, 2)),
        constant_values=CAPTION[0],
    )
    framed = _image(rgb)
    ImageDraw.Draw(framed).rectangle((column - 1, row - 1, column + width, row + height), outline=CAPTION)
    framed.paste(_image(part), (rgb.shape[2] - part.shape[2], rgb.shape[1] - part.shape[1]))
    return _array(framed)


def enlarge(rgb: np.ndarray, factor: int) -> np.ndarray:
    """Each pixel of (C, H, W) as a block of factor x factor."""
    return rgb.repeat(factor, axis=1).repeat(factor, axis=2)


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
    heat = np.where(missing, 0, error) / limit * (len(HEAT) - 1)
    rgb = np.rint([np.interp(heat, range(len(HEAT)), colour) for colour in HEAT.T]).astype(np.uint8)
    rgb[:, missing] = np.array(INVALID, np.uint8)[:, None]
    return rgb


def quiver(fields: np.ndarray, step: int = 40) -> np.ndarray:
    """Arrows of displacements, uint8 (3, H, W); the longest reaches to the next arrow's beginning.

    Args:
        fields: (bands, 2, n, m) down and right; each band has a colour of its own, white where there is one.
        step: pixels from arrow to arrow.
    """
    _, _, n, m = fields.shape
    longest = float(np.hypot(fields[:, 0], fields[:, 1]).max())
    caption = _caption(f"MS off the PAN, up to {longest:.2f} PAN pixels", m * step, 14)
    image = Image.new("RGB", (m * step, n * step + caption.height), BACKGROUND)
    image.paste(caption, (0, 0))
    draw = ImageDraw.Draw(image)
    colours = (
        [CAPTION] if len(fields) == 1 else [tuple(map(int, c)) for c in HEAT[np.linspace(4, 8, len(fields), dtype=int)]]
    )
    for colour, field in zip(colours, fields, strict=True):
        for i, j in np.ndindex(n, m):
            down, right = field[:, i, j] / (longest or 1.0) * 0.9 * step
            start = np.array([(j + 0.5) * step, (i + 0.5) * step + caption.height]) - np.array([right, down]) / 2
            end = start + np.array([right, down])
            side = np.array([-down, right]) * 0.15
            barb = end - 0.3 * np.array([right, down])
            draw.line([*start, *end], colour, 2)
            draw.line([*(barb + side), *end, *(barb - side)], colour, 2)
    return _array(image)


def scale_bar(rgb: np.ndarray, pixel: float) -> np.ndarray:
    """A copy of a picture (3, H, W) with a bar of a round length in its lower left corner.

    Args:
        rgb: the picture; one that is too narrow for a bar stays as it is.
        pixel: metres per pixel of the picture.
    """
    _, height, width = rgb.shape
    if min(height, width) < 160:
        return rgb
    longest = 0.25 * width * pixel
    power = 10.0 ** math.floor(math.log10(longest))
    metres = max(step * power for step in (1, 2, 5) if step * power <= longest)
    words = f"{metres / 1000:g} km" if metres >= 1000 else f"{metres:g} m"
    size = max(SMALLEST_TEXT, round(min(height, width) / 40))
    image = _image(rgb)
    draw = ImageDraw.Draw(image)
    left, bottom, thick = size, height - size, max(2, size // 5)
    bar = (left, bottom - thick, left + round(metres / pixel), bottom)
    draw.rectangle((bar[0] - 1, bar[1] - 1, bar[2] + 1, bar[3] + 1), fill=BACKGROUND)
    draw.rectangle(bar, fill=CAPTION)
    at = (left, bottom - 1.5 * thick)
    draw.text(at, words, CAPTION, _font(size), anchor="ls", stroke_width=2, stroke_fill=BACKGROUND)
    return _array(image)


def write_png(path: str | os.PathLike[str], rgb: np.ndarray) -> None:
    """Write uint8 (3, H, W), or (4, H, W) with alpha, or (1, H, W) grey, as a PNG.

    The file appears under its name only when it is complete.

    Raises:
        ValueError: not uint8, or another number of bands.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"a PNG needs uint8 of shape (1, 3 or 4, H, W), got {rgb.dtype} {rgb.shape}; Stretch.apply makes one."
        )
    with Scratch(path) as scratch:
        _image(rgb).save(scratch.path, "PNG", optimize=True)
        scratch.publish()


def _image(rgb: np.ndarray) -> Image.Image:
    return Image.fromarray(rgb[0] if len(rgb) == 1 else np.ascontiguousarray(np.moveaxis(rgb, 0, 2)))


def _array(image: Image.Image) -> np.ndarray:
    return np.moveaxis(np.asarray(image), 2, 0)


def valid_mask(raster: Any, shape: tuple[int, int]) -> np.ndarray:
    """Mask of a raster at a size, 0 where pixels are invalid; GDAL takes alpha for one beside 1 or 3 bands alone."""
    names = [colour.name for colour in raster.colorinterp]
    if names[-1] == "alpha":
        alpha: np.ndarray = (raster.read(raster.count, out_shape=shape) > 0).astype(np.uint8)
        return alpha
    mask: np.ndarray = raster.dataset_mask(out_shape=shape)
    return mask


def _metres(raster: Any) -> float | None:
    """Metres per pixel in the middle of a raster; None without georeferencing."""
    if raster.crs is None or raster.transform.is_identity:
        return None
    across = math.hypot(raster.transform.a, raster.transform.d)
    if raster.crs.is_geographic:
        _, latitude = raster.transform @ (raster.width / 2, raster.height / 2)
        return across * METRES_OF_A_DEGREE * math.cos(math.radians(latitude))
    return float(across * raster.crs.linear_units_factor[1])


def preview_png(
    raster: str | os.PathLike[str], output: str | os.PathLike[str], max_size: int = 1024
) -> tuple[int, int]:
    """Picture of a finished raster, read from its overviews where it has them.

    Args:
        raster: path or URL that rasterio opens.
        output: PNG to write; pixels without data are transparent. A georeferenced one has a scale bar.
        max_size: longest side in pixels; a smaller raster keeps its size.

    Returns:
        (height, width) of the picture.
    """
    import rasterio
    from rasterio.enums import Resampling

    with rasterio.open(raster) as source:
        bands = rgb_bands(source.descriptions, [c.name for c in source.colorinterp], source.count)
        shrink = max(1.0, max(source.shape) / max_size)
        height, width = (max(1, round(n / shrink)) for n in source.shape)
        read = sorted(set(bands))
        image = source.read(
            [b + 1 for b in read],
            out_shape=(len(read), height, width),
            resampling=Resampling.average if shrink > 1 else Resampling.nearest,
        )
        valid = valid_mask(source, (height, width)) > 0
        metres = _metres(source)
    red, green, blue = (read.index(b) for b in bands)
    valid &= np.isfinite(image).all(axis=0)
    rgb = stretch_from(image, valid, bands=(red, green, blue)).apply(image)
    if metres is not None:
        rgb = scale_bar(rgb, metres * shrink)
    alpha = 255 * valid.astype(np.uint8)[None]
    write_png(output, rgb if valid.all() else np.concatenate([rgb, alpha]))
    return height, width
