"""A made-up scene with a known truth: village, fields and a river at 0.5 m, for `uknowpan demo`.

The landscape is drawn as reflectance and height at half the PAN pixel size, lit by one sun with
cast shadows, seen through a light haze and averaged to the PAN grid. That is the truth; PAN and
MS are simulated from it by Wald's protocol.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import ColorInterp
from rasterio.transform import from_origin

BANDS = ("blue", "green", "red", "nir")
COVER = ("meadow", "field", "water", "road", "roof", "tree", "garden", "ground")
"""Names of the values in `DemoScene.cover`."""

PAN_METRES = 0.5
OVERSAMPLING = 2
CELL = PAN_METRES / OVERSAMPLING
"""Metres per drawn pixel."""
PAN_WEIGHTS = (0.12, 0.30, 0.33, 0.25)
"""Share of each band in PAN, like the broad panchromatic bands of 0.5 m sensors."""
MTF_GAIN = 0.28
"""Gain of the MS optics at the MS Nyquist frequency."""
NOISE_DN = 1.5
COLOUR_INTERPRETATION = {
    "pan": ColorInterp.gray,
    "blue": ColorInterp.blue,
    "green": ColorInterp.green,
    "red": ColorInterp.red,
    "nir": ColorInterp.undefined,
}
CRS, ORIGIN = "EPSG:32631", (464_000.0, 5_242_000.0)

# Digital numbers per unit of reflectance, and the haze (DN) that lies over everything.
GAIN = np.array([2500, 2600, 2700, 2750], np.float32)
HAZE = np.array([150, 105, 66, 34], np.float32)
# Skylight fills the shadows and is blue; the sun gives the rest of 1.
SKY = np.array([0.42, 0.35, 0.30, 0.25], np.float32)
SUN_AZIMUTH, SUN_ELEVATION = np.deg2rad(146), np.deg2rad(47)

Spectrum = tuple[float, float, float, float]
# Reflectance in blue, green, red, nir.
WATER: Spectrum = (0.034, 0.050, 0.024, 0.008)
SHALLOWS: Spectrum = (0.060, 0.092, 0.062, 0.030)
SAND: Spectrum = (0.19, 0.25, 0.30, 0.36)
MEADOW: Spectrum = (0.040, 0.082, 0.058, 0.38)
LAWN: Spectrum = (0.038, 0.090, 0.050, 0.46)
TREE: Spectrum = (0.028, 0.062, 0.036, 0.37)
SOIL: Spectrum = (0.085, 0.125, 0.175, 0.235)
ASPHALT: Spectrum = (0.098, 0.107, 0.112, 0.118)
CONCRETE: Spectrum = (0.20, 0.225, 0.235, 0.26)
GRAVEL: Spectrum = (0.16, 0.20, 0.23, 0.27)
PAINT: Spectrum = (0.42, 0.44, 0.44, 0.44)
CLAY_COURT: Spectrum = (0.075, 0.105, 0.235, 0.31)
POOL: Spectrum = (0.33, 0.34, 0.17, 0.04)
SOLAR: Spectrum = (0.055, 0.040, 0.034, 0.045)
BLUE_METAL: Spectrum = (0.33, 0.21, 0.115, 0.17)
LIGHT_METAL: Spectrum = (0.31, 0.335, 0.335, 0.32)
CROPS: tuple[tuple[Spectrum, float], ...] = (  # spectrum, contrast of the rows
    ((0.034, 0.082, 0.042, 0.48), 0.15),  # green wheat
    ((0.088, 0.150, 0.190, 0.33), 0.10),  # ripe barley
    ((0.062, 0.175, 0.160, 0.45), 0.09),  # rape in flower
    ((0.078, 0.110, 0.148, 0.20), 0.16),  # ploughed
    ((0.026, 0.055, 0.032, 0.52), 0.22),  # maize
    ((0.045, 0.098, 0.062, 0.43), 0.05),  # clover
    ((0.100, 0.150, 0.205, 0.28), 0.12),  # stubble
    ((0.042, 0.088, 0.086, 0.31), 0.34),  # vines
)
TILES: tuple[Spectrum, ...] = (
    (0.065, 0.095, 0.215, 0.29),  # red tile
    (0.080, 0.120, 0.250, 0.33),
    (0.072, 0.090, 0.150, 0.21),  # old tile
    (0.090, 0.095, 0.105, 0.115),  # slate
    (0.125, 0.130, 0.140, 0.155),
    (0.085, 0.105, 0.135, 0.19),  # brown
)
CARS: tuple[Spectrum, ...] = (
    (0.48, 0.50, 0.50, 0.48),
    (0.46, 0.48, 0.48, 0.46),
    (0.25, 0.26, 0.27, 0.27),
    (0.03, 0.03, 0.03, 0.04),
    (0.05, 0.06, 0.28, 0.32),
    (0.26, 0.13, 0.07, 0.20),
)


@dataclass(frozen=True)
class DemoScene:
    """A PAN/MS pair in DN (11 bit like), with the sharp MS that it was made from."""

    truth: np.ndarray
    """float32 (4, H, W): blue, green, red, nir on the PAN grid."""
    pan: np.ndarray
    """float32 (1, H, W)"""
    ms: np.ndarray
    """float32 (4, h, w); MS pixel i is centred on PAN index ratio*i + (ratio-1)/2."""
    ratio: int
    cover: np.ndarray
    """uint8 (H, W), what lies there: an index into `COVER`."""


@dataclass(frozen=True)
class DemoPaths:
    """GeoTIFFs of a written scene."""

    pan: Path
    ms: Path
    truth: Path


def make_demo_scene(size: int = 512, ratio: int = 4, seed: int = 7) -> DemoScene:
    """Draw the scene and simulate its PAN/MS pair; the same arguments give the same pixels.

    Args:
        size: PAN pixels (0.5 m) along each side.
        ratio: MS pixel size in PAN pixels.
        seed: another seed is another landscape of the same kind.

    Raises:
        ValueError: the size is below 64 or no multiple of the ratio.
    """
    if size < 64 or ratio < 1 or size % ratio:
        raise ValueError(
            f"a demo scene of {size} PAN pixels cannot have MS pixels of {ratio}; give a size of "
            "at least 64 that is a multiple of the ratio."
        )
    rng = np.random.default_rng(seed)
    land = _Land(size * OVERSAMPLING, rng)
    _draw(land, rng)
    truth = np.rint(np.clip(_optics(_illuminate(land)), 0, 2047)).astype(np.float32)
    weights = np.array(PAN_WEIGHTS, np.float32)
    pan = np.tensordot(weights, truth, axes=1)[None]
    return DemoScene(truth, _measure(pan, rng), _measure(_degrade(truth, ratio), rng), ratio, _cover(land))


def write_demo_scene(scene: DemoScene, folder: str | os.PathLike[str]) -> DemoPaths:
    """Write PAN, MS and truth as uint16 GeoTIFFs (UTM, areas nested from the same corner)."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = DemoPaths(out / "demo_pan.tif", out / "demo_ms.tif", out / "demo_truth.tif")
    _write(paths.pan, scene.pan, PAN_METRES, ("pan",))
    _write(paths.ms, scene.ms, PAN_METRES * scene.ratio, BANDS)
    _write(paths.truth, scene.truth, PAN_METRES, BANDS)
    return paths


def _write(path: Path, values: np.ndarray, metres: float, names: tuple[str, ...]) -> None:
    count, height, width = values.shape
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=width,
        height=height,
        count=count,
        dtype="uint16",
        crs=CRS,
        transform=from_origin(*ORIGIN, metres, metres),
        compress="deflate",
        predictor=2,
    ) as raster:
        raster.write(values.astype(np.uint16))
        raster.descriptions = names
        raster.colorinterp = [COLOUR_INTERPRETATION[n] for n in names]


# --- what the sensors see ---------------------------------------------------------------------


def _degrade(truth: np.ndarray, ratio: int) -> np.ndarray:
    """MS (C, h, w) as a sensor with Gaussian MTF sees the truth (C, H, W).

    The gain at the MS Nyquist frequency 1 / (2 ratio) is MTF_GAIN, hence
    sigma = ratio * sqrt(-2 ln g) / pi PAN pixels.
    """
    if ratio == 1:
        return truth
    rows, columns = (_degrading_matrix(n, ratio) for n in truth.shape[1:])
    return rows @ truth @ columns.T


def _degrading_matrix(size: int, ratio: int) -> np.ndarray:
    """(size/ratio, size): weights of the PAN pixels in each MS pixel; borders are replicated."""
    sigma = ratio * np.sqrt(-2 * np.log(MTF_GAIN)) / np.pi
    centres = ratio * np.arange(size // ratio) + (ratio - 1) / 2
    reach = int(np.ceil(4 * sigma))
    taps = np.floor(centres).astype(int)[:, None] + np.arange(-reach, reach + 2)
    weights = np.exp(-0.5 * ((taps - centres[:, None]) / sigma) ** 2)
    matrix = np.zeros((size // ratio, size))
    rows = np.broadcast_to(np.arange(size // ratio)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, size - 1)), weights / weights.sum(1, keepdims=True))
    return matrix.astype(np.float32)


def _measure(signal: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    noise = NOISE_DN * rng.standard_normal(signal.shape, np.float32)
    return np.rint(np.clip(signal + noise, 1, 2047)).astype(np.float32)


def _optics(radiance: np.ndarray) -> np.ndarray:
    """Drawn pixels -> PAN pixels: area average, then the slight blur of a real telescope."""
    count, n, _ = radiance.shape
    size = n // OVERSAMPLING
    mean = radiance.reshape(count, size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(2, 4))
    for axis in (1, 2):
        pad = [(0, 0)] * 3
        pad[axis] = (1, 1)
        wide = np.moveaxis(np.pad(mean, pad, mode="edge"), axis, 0)
        mean = np.moveaxis(0.14 * (wide[:-2] + wide[2:]) + 0.72 * wide[1:-1], 0, axis)
    return mean


def _illuminate(land: _Land) -> np.ndarray:
    """DN (4, n, n) under sun and sky, from reflectance, height and cast shadows."""
    towards_sun = np.array([-np.cos(SUN_AZIMUTH), np.sin(SUN_AZIMUTH)])  # rows, columns
    north_south, east_west = np.gradient(land.height, np.float32(CELL))
    slope = north_south * np.float32(towards_sun[0]) + east_west * np.float32(towards_sun[1])
    # A surface that falls towards the sun (height decreasing) is the bright one. Walls are
    # steeper than anything that can be seen from above, so slopes are limited.
    tilt = 1 - np.clip(slope, -0.75, 0.9) / np.float32(np.tan(SUN_ELEVATION))
    sunlight = np.clip(tilt, 0, 1.4) * (1 - _shadow(land.height, towards_sun))
    sky = SKY[:, None, None]
    light = sunlight * (1 - sky)
    light += sky
    light *= land.reflectance
    light *= GAIN[:, None, None]
    light += HAZE[:, None, None]
    return light


def _shadow(height: np.ndarray, towards_sun: np.ndarray) -> np.ndarray:
    """(n, n) in [0, 1]: how much of the sun is hidden, by walking from each pixel to the sun."""
    stride = 2
    rise = np.float32(stride * CELL * np.tan(SUN_ELEVATION))
    n = height.shape[0]
    hidden = np.zeros_like(height)
    for k in range(1, int(height.max() / rise) + 2):
        rows, columns = (round(stride * k * float(step)) for step in towards_sun)
        (to_r, from_r), (to_c, from_c) = _shifted(n, rows), _shifted(n, columns)
        above = height[from_r, from_c] - height[to_r, to_c]
        above -= k * rise - np.float32(0.15)
        np.maximum(hidden[to_r, to_c], above, out=hidden[to_r, to_c])
    return np.clip(hidden * np.float32(1.6), 0, 1)


def _shifted(n: int, by: int) -> tuple[slice, slice]:
    """Slices so that a[second] is a moved by `by` against a[first]."""
    return slice(max(0, -by), n - max(0, by)), slice(max(0, by), n - max(0, -by))


# --- the canvas -------------------------------------------------------------------------------


class _Land:
    """Reflectance and height that are drawn upon, n x n pixels of CELL metres."""

    def __init__(self, n: int, rng: np.random.Generator) -> None:
        self.n = n
        self.extent = n * CELL
        self.height = np.zeros((n, n), np.float32)
        self.cover = np.zeros((n, n), np.uint8)
        self.x = ((np.arange(n, dtype=np.float32) + 0.5) * np.float32(CELL))[None, :]
        """Metres east of the left border, (1, n)."""
        self.y = self.x.T
        """Metres south of the upper border, (n, 1)."""
        self.grain = _fractal(n, 1.0, 6.0, rng)
        """Texture of surfaces: decimetres to metres."""
        self.patches = _fractal(n, 1.9, 60.0, rng)
        """Texture of the ground: metres to tens of metres."""
        self.vigour = np.ascontiguousarray(self.patches[::-1, ::-1].T)
        """Another one, for how well plants do."""
        self.reflectance = np.empty((4, n, n), np.float32)
        self.reflectance[:] = _column(MEADOW)

    def paint(
        self,
        where: tuple[slice, slice],
        alpha: np.ndarray,
        spectrum: Spectrum | np.ndarray,
        cover: str | None = None,
    ) -> None:
        """Lay a material over a window; alpha (rows, columns) in [0, 1]."""
        colour = spectrum if isinstance(spectrum, np.ndarray) else _column(spectrum)
        under = self.reflectance[(slice(None), *where)]
        under += alpha * (colour - under)
        if cover:
            self.cover[where][alpha > 0.5] = COVER.index(cover)

    def whole(self) -> tuple[slice, slice]:
        return slice(0, self.n), slice(0, self.n)

    def around(self, x: float, y: float, reach: float) -> tuple[slice, slice] | None:
        """Window of everything within `reach` metres, None if that lies outside."""
        sides = []
        for centre in (y, x):
            first = max(0, int((centre - reach) / CELL))
            last = min(self.n, int((centre + reach) / CELL) + 2)
            if first >= last:
                return None
            sides.append(slice(first, last))
        return sides[0], sides[1]

    def local(self, where: tuple[slice, slice], x: float, y: float, angle: float) -> tuple[np.ndarray, np.ndarray]:
        """Metres along and across a direction from (x, y), each (rows, columns)."""
        dx, dy = self.x[:, where[1]] - np.float32(x), self.y[where[0]] - np.float32(y)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        return dx * cos + dy * sin, dy * cos - dx * sin

    def at(self, x: float, y: float) -> str | None:
        """Cover at a place, None outside."""
        row, column = int(y // CELL), int(x // CELL)
        inside = 0 <= row < self.n and 0 <= column < self.n
        return COVER[self.cover[row, column]] if inside else None


def _column(spectrum: Spectrum) -> np.ndarray:
    return np.array(spectrum, np.float32)[:, None, None]


def _edge(distance: np.ndarray, softness: float = CELL) -> np.ndarray:
    """1 inside (distance < 0), 0 outside, over `softness` metres."""
    return np.clip(0.5 - distance / np.float32(softness), 0, 1)


def _box(along: np.ndarray, across: np.ndarray, length: float, width: float) -> np.ndarray:
    """Metres outside (> 0) a rectangle of that length and width around the origin."""
    return np.maximum(np.abs(along) - length / 2, np.abs(across) - width / 2)


def _fractal(n: int, slope: float, longest: float, rng: np.random.Generator) -> np.ndarray:
    """float32 (n, n), zero mean, unit deviation: amplitude falls as frequency**-slope, flat
    beyond a wavelength of `longest` metres (so a small scene has the same texture)."""
    spectrum = np.fft.rfft2(rng.standard_normal((n, n), np.float32))
    fy, fx = np.fft.fftfreq(n, CELL)[:, None], np.fft.rfftfreq(n, CELL)[None, :]
    amplitude = np.hypot(np.hypot(fy, fx), 1 / longest) ** -slope
    amplitude[0, 0] = 0
    noise = np.fft.irfft2(spectrum * amplitude.astype(np.float32), (n, n)).astype(np.float32)
    return noise / noise.std()


def _cover(land: _Land) -> np.ndarray:
    return land.cover[::OVERSAMPLING, ::OVERSAMPLING].copy()


# --- the landscape ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where the large things lie, in metres."""

    river_x: np.ndarray
    """(n, 1): middle of the river per row."""
    river_width: float
    road_y: np.ndarray
    """(1, n): middle of the main road per column."""
    road_slope: float
    village_angle: float
    """Direction of the village's streets, radians clockwise from east."""


def _draw(land: _Land, rng: np.random.Generator) -> None:
    layout = _lay_out(land, rng)
    _texture_meadow(land)
    _draw_fields(land, layout, rng)
    _draw_village_ground(land, layout)
    _draw_river(land, layout)
    _draw_main_road(land, layout)
    _draw_farm(land, layout, rng)
    _draw_sports(land, layout)
    _draw_village(land, layout, rng)
    _draw_traffic(land, layout, rng)
    _draw_trees(land, layout, rng)
    land.reflectance *= 1 + np.float32(0.035) * land.grain
    np.clip(land.reflectance, 0.006, 0.62, out=land.reflectance)


def _lay_out(land: _Land, rng: np.random.Generator) -> _Layout:
    size = land.extent
    t, phase = land.y / size, rng.uniform(0, 0.5)
    river = 0.205 + 0.075 * np.sin(2 * np.pi * (1.05 * t + phase)) - 0.06 * (t - 0.5)
    slope = rng.uniform(-0.16, -0.08)
    u = land.x / size
    road = 0.405 + slope * (u - 0.5) + 0.022 * np.sin(2 * np.pi * (u + phase))
    return _Layout(
        river_x=(size * river).astype(np.float32),
        river_width=min(25.0, 0.11 * size),
        road_y=(size * road).astype(np.float32),
        road_slope=slope,
        village_angle=float(np.arctan(slope)) + rng.uniform(-0.03, 0.03),
    )


def _texture_meadow(land: _Land) -> None:
    dry = np.clip(0.35 + 0.3 * land.patches + 0.12 * land.grain, 0, 1)
    land.paint(land.whole(), 0.55 * dry, (0.075, 0.120, 0.125, 0.31))


def _plants(spectrum: Spectrum, vigour: np.ndarray) -> np.ndarray:
    """(4, rows, columns): where plants do better, nir rises and the visible bands fall."""
    response = np.array([-0.09, -0.05, -0.14, 0.09], np.float32)[:, None, None]
    return _column(spectrum) * (1 + response * vigour)


def _draw_fields(land: _Land, layout: _Layout, rng: np.random.Generator) -> None:
    """Parcels by repeated halving of a rectangle that is turned against north."""
    size = land.extent
    angle = layout.village_angle + rng.uniform(0.12, 0.2)
    along, across = land.local(land.whole(), size / 2, size / 2, angle)
    parcels = _halve((-0.75 * size, -0.75 * size, 0.75 * size, 0.75 * size), 38.0, rng)
    crop = int(rng.integers(len(CROPS)))
    for left, top, right, bottom in parcels:
        # Neighbours never get the same crop.
        crop = (crop + int(rng.integers(1, len(CROPS) - 1))) % len(CROPS)
        cos, sin = np.cos(angle), np.sin(angle)
        a, b = (left + right) / 2, (top + bottom) / 2
        x, y = size / 2 + a * cos - b * sin, size / 2 + a * sin + b * cos
        where = land.around(x, y, np.hypot(right - left, bottom - top) / 2)
        if where is None:
            continue
        lengthwise = right - left > bottom - top
        _draw_parcel(
            land,
            where,
            along[where] - np.float32(a),
            across[where] - np.float32(b),
            (right - left, bottom - top),
            lengthwise,
            CROPS[crop],
            rng,
        )


def _halve(
    box: tuple[float, float, float, float], smallest: float, rng: np.random.Generator
) -> list[tuple[float, float, float, float]]:
    """Rectangles (left, top, right, bottom) with sides of about `smallest` metres and more."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    longest = max(width, height)
    if longest < 2 * smallest or (longest < 2.6 * smallest and rng.random() < 0.4):
        return [box]
    cut = rng.uniform(0.36, 0.64)
    if width > height:
        middle = left + cut * width
        halves = ((left, top, middle, bottom), (middle, top, right, bottom))
    else:
        middle = top + cut * height
        halves = ((left, top, right, middle), (left, middle, right, bottom))
    return [part for half in halves for part in _halve(half, smallest, rng)]


def _draw_parcel(
    land: _Land,
    where: tuple[slice, slice],
    along: np.ndarray,
    across: np.ndarray,
    sides: tuple[float, float],
    lengthwise: bool,
    crop: tuple[Spectrum, float],
    rng: np.random.Generator,
) -> None:
    """One crop with its rows, tramlines and headlands; (along, across) from its middle."""
    spectrum, contrast = crop
    ragged = np.float32(0.25) * land.grain[where]
    inside = _box(along, across, sides[0] - 2.6, sides[1] - 2.6) + ragged
    if not lengthwise:
        along, across, sides = across, along, (sides[1], sides[0])
    # At the ends of the rows the tractor turns and works crosswise.
    headland = np.abs(along) > sides[0] / 2 - 7
    cross_rows = np.where(headland, along, across)
    spacing = 2.4 if contrast > 0.3 else rng.uniform(1.2, 1.7)
    bend = np.float32(0.12) * land.patches[where]
    rows = np.sin(np.float32(2 * np.pi / spacing) * (cross_rows + bend))
    tramline = np.abs(np.abs((cross_rows + 500) % 12 - 6) - 0.9) < 0.22
    vigour = 0.8 * land.vigour[where] + 0.5 * land.grain[where]
    colour = _plants(spectrum, vigour)
    colour *= 1 + np.float32(0.06) * land.patches[where]
    # Between the rows the soil shows.
    bare = np.clip(contrast * (1 - rows) + 0.45 * tramline, 0, 1)
    colour += bare * (_column(SOIL) * np.float32(0.8) - colour)
    if spectrum[3] < 0.3:  # on bare soil it is the furrows' own shadow
        colour *= 1 + np.float32(contrast) * rows * np.float32(0.7)
    land.paint(where, _edge(inside, 0.6), colour, "field")


def _south_of_road(land: _Land, layout: _Layout) -> np.ndarray:
    return land.y - layout.road_y


def _draw_village_ground(land: _Land, layout: _Layout) -> None:
    """Grass where the village will stand; the fields end at a ragged line."""
    outside = np.maximum(-_south_of_road(land, layout), layout.river_x + layout.river_width / 2 - land.x)
    colour = _plants(LAWN, 1.2 * land.vigour + 0.7 * land.grain)
    dry = np.clip(0.25 + 0.28 * land.patches, 0, 0.8)
    colour += dry * (_column((0.072, 0.122, 0.118, 0.33)) - colour)
    land.paint(land.whole(), _edge(outside, 2.0), colour, "garden")


def _draw_river(land: _Land, layout: _Layout) -> None:
    bend = np.gradient(layout.river_x, axis=0) / np.float32(CELL)
    curvature = np.gradient(bend, axis=0) / np.float32(CELL)
    offset = (land.x - layout.river_x) / np.sqrt(1 + bend**2)
    side = offset * np.tanh(curvature * 3 * land.extent)  # > 0 on the inner bank of a bend
    shore = np.abs(offset) - layout.river_width / 2 + 1.1 * land.patches
    bank = _plants((0.034, 0.068, 0.045, 0.33), land.vigour + land.grain)
    land.paint(land.whole(), _edge(shore - 7 + 0.8 * land.grain, 4.0), bank, "meadow")
    beach = _edge(shore - 3.2, 2.0) * np.clip(side * 0.4, 0, 1)
    land.paint(land.whole(), beach, _column(SAND) * (1 + 0.08 * land.grain), "ground")
    depth = np.clip(-(shore + np.clip(side * 0.55, 0, 4)) / (0.3 * layout.river_width), 0, 1)
    ripples = 1 + 0.05 * land.grain + 0.06 * land.patches
    water = _column(SHALLOWS) * (1 - depth) + _column(WATER) * depth
    land.paint(land.whole(), _edge(shore), water * ripples, "water")


def _draw_main_road(land: _Land, layout: _Layout) -> None:
    distance = np.abs(_south_of_road(land, layout)) / np.float32(np.hypot(1, layout.road_slope))
    bridge = np.abs(land.x - layout.river_x) < layout.river_width / 2 + 5
    verge = _edge(distance - 5.0 - 0.4 * land.patches, 1.0)
    land.paint(land.whole(), verge, (0.07, 0.115, 0.115, 0.29), "ground")
    land.paint(land.whole(), _edge(distance - 4.6) * bridge, CONCRETE, "road")
    worn = 1 + 0.05 * land.patches - 0.06 * np.cos(distance * 3.4)
    land.paint(land.whole(), _edge(distance - 3.5), _column(ASPHALT) * worn, "road")
    line = _edge(np.abs(distance - 3.2) - 0.1) * 0.8
    dashes = _edge(distance - 0.1) * (land.x % 9 < 4)
    land.paint(land.whole(), np.maximum(line, dashes), PAINT)
    # The deck stands above the water and shades it.
    land.height[(distance < 4.6) & bridge] = 2.2


def _rectangle(
    land: _Land,
    x: float,
    y: float,
    angle: float,
    sides: tuple[float, float],
    spectrum: Spectrum,
    cover: str | None = "ground",
    texture: float = 0.05,
    height: float = 0.0,
) -> None:
    """A flat rectangle of one material, lifted by `height` metres."""
    where = land.around(x, y, np.hypot(*sides) / 2 + 1)
    if where is None:
        return
    outside = _box(*land.local(where, x, y, angle), *sides)
    colour = _column(spectrum) * (1 + texture * (land.grain[where] + land.patches[where]))
    land.paint(where, _edge(outside), colour, cover)
    if height:
        land.height[where][outside < 0] += np.float32(height)


def _building(
    land: _Land,
    x: float,
    y: float,
    angle: float,
    sides: tuple[float, float],
    spectrum: Spectrum,
    eaves: float,
    pitch: float,
    *,
    hipped: bool = False,
    course: float = 0.0,
) -> None:
    """House with a ridge along its first side; `course` is the spacing of seams down the roof."""
    where = land.around(x, y, np.hypot(*sides) / 2 + 1)
    if where is None:
        return
    along, across = land.local(where, x, y, angle)
    outside = _box(along, across, *sides)
    run = sides[1] / 2 - np.abs(across)
    if hipped:
        run = np.minimum(run, sides[0] / 2 - np.abs(along))
    weathered = 1 + 0.07 * land.grain[where] + 0.05 * land.patches[where]
    if course:
        weathered = weathered * (1 + 0.09 * np.sin(2 * np.pi / course * along))
    ridge = 0.18 * (np.abs(across) < 0.22) * (pitch > 0.1)
    land.paint(where, _edge(outside), _column(spectrum) * (weathered + ridge), "roof")
    inside = outside < 0
    land.height[where][inside] = (eaves + pitch * run)[inside]


@dataclass(frozen=True)
class _Frame:
    """Local coordinates: a metres along a direction from (x, y), b to the right of it."""

    x: float
    y: float
    angle: float

    def place(self, a: float, b: float) -> tuple[float, float]:
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return self.x + a * cos - b * sin, self.y + a * sin + b * cos


def _on_road(land: _Land, layout: _Layout, share: float) -> _Frame:
    """Frame with its origin on the main road, at a share of the way from west to east."""
    x = land.extent * share
    y = float(np.interp(x, land.x[0], layout.road_y[0]))
    return _Frame(x, y, layout.village_angle)


def _draw_farm(land: _Land, layout: _Layout, rng: np.random.Generator) -> None:
    """Yard with a blue hall, a barn, a house and silos, north of the main road."""
    road = _on_road(land, layout, 0.80)
    yard = _Frame(*road.place(0, -33), road.angle)
    angle = yard.angle
    _rectangle(land, *yard.place(0, 0), angle, (66, 46), GRAVEL, texture=0.07)
    _rectangle(land, *yard.place(6, 26), angle + np.pi / 2, (14, 5), GRAVEL, "road")
    _rectangle(land, *yard.place(2, 8), angle, (54, 12), CONCRETE, texture=0.04)
    _building(land, *yard.place(-13, -9), angle, (32, 17), BLUE_METAL, 5.5, 0.22, course=1.6)
    _building(land, *yard.place(19, -10), angle, (22, 13), LIGHT_METAL, 4.5, 0.25, course=1.6)
    _building(land, *yard.place(-22, 16), angle, (13, 9), TILES[0], 4.2, 0.68, hipped=True)
    for a in (25, 29.5):
        _silo(land, *yard.place(a, 9))
    for a in np.linspace(-8, 16, 5):
        _car(land, *yard.place(a + rng.uniform(-1, 1), 10), angle + rng.uniform(1, 2), rng)


def _silo(land: _Land, x: float, y: float, radius: float = 2.0, height: float = 8.0) -> None:
    where = land.around(x, y, radius + 1)
    if where is None:
        return
    distance = np.hypot(*land.local(where, x, y, 0))
    land.paint(where, _edge(distance - radius), LIGHT_METAL, "roof")
    inside = distance < radius
    land.height[where][inside] = (height - 0.15 * distance**2)[inside]


def _car(land: _Land, x: float, y: float, angle: float, rng: np.random.Generator) -> None:
    spectrum = CARS[int(rng.integers(len(CARS)))]
    _rectangle(land, x, y, angle, (4.4, 1.9), spectrum, None, 0.0, 1.3)
    windscreen = _Frame(x, y, angle).place(0.8, 0)
    _rectangle(land, *windscreen, angle, (0.7, 1.6), SOLAR, None)


def _draw_sports(land: _Land, layout: _Layout) -> None:
    """Playing field with mowing stripes and lines, and two clay courts beside it."""
    road = _on_road(land, layout, 0.41)
    angle, middle, sides = road.angle, road.place(0, 35), (62.0, 40.0)
    where = land.around(*middle, 42)
    if where is not None:
        along, across = land.local(where, *middle, angle)
        outside = _box(along, across, *sides)
        mown = np.where(np.floor(along / 5.2) % 2 == 0, 1.08, 0.92)
        colour = _plants((0.036, 0.095, 0.045, 0.50), 0.7 * land.vigour[where]) * mown
        land.paint(where, _edge(outside), colour, "field")
        circle = np.abs(np.hypot(along, across) - 6)
        goals = np.abs(_box(np.abs(along) - sides[0] / 2 + 7.5, across, 10, 20))
        marks = np.minimum(np.minimum(np.abs(along), circle), goals)
        marks = np.where(outside < -2.5, marks, 9)
        marks = np.minimum(marks, np.abs(outside + 2.5))
        land.paint(where, 0.85 * _edge(marks - 0.16), PAINT)
    for a in (-15.5, 15.5):
        _draw_court(land, *road.place(a, 65.5), angle)


def _draw_court(land: _Land, x: float, y: float, angle: float) -> None:
    where = land.around(x, y, 17)
    if where is None:
        return
    _rectangle(land, x, y, angle, (28, 17), CLAY_COURT, "field", 0.03)
    along, across = land.local(where, x, y, angle)
    frame = np.abs(_box(along, across, 23.8, 11))
    service = np.abs(_box(along, across, 12.8, 8.2))
    land.paint(where, 0.85 * _edge(np.minimum(frame, service) - 0.12), PAINT)
    land.paint(where, _edge(_box(along, across, 0.4, 12)), (0.05, 0.06, 0.06, 0.08))


PLOT_DEPTH = 23.0
STREETS = (46.0, 102.0, 158.0)
"""Metres from the main road to the streets parallel to it."""


def _draw_village(land: _Land, layout: _Layout, rng: np.random.Generator) -> None:
    """A street across and several along the main road, with houses in gardens on both sides."""
    village = _on_road(land, layout, 0.575)
    angle, east = village.angle, 0.62 * land.extent
    streets = [(-0.32 * land.extent if b > 80 else 0.0, b) for b in STREETS]
    for width, spectrum in ((8.4, CONCRETE), (5.6, ASPHALT)):
        south = _Frame(*village.place(0.0, 100.0), angle + np.pi / 2)
        _rectangle(land, south.x, south.y, south.angle, (200, width), spectrum, "road", 0.04)
        for west, b in streets:
            middle = village.place((west + east) / 2, b)
            _rectangle(land, *middle, angle, (east - west, width), spectrum, "road", 0.04)
    _draw_store(land, _Frame(*village.place(8, 8), angle), rng)
    for west, b in streets:
        for side in (-1, 1):
            a = west if west < 0 else 9.0
            while a < east:
                width = float(rng.uniform(17, 23))
                at_store = b == STREETS[0] and side < 0 and a < 58
                at_crossing = a - 7 < 0 < a + width + 7
                if not (at_store or at_crossing):
                    _draw_plot(land, village, a + width / 2, b, side, width, rng)
                a += width if a > 0 or a + width + 7 < 0 else max(width, 9.0 - a)
        for _ in range(4):
            lane = float(rng.choice([-1.6, 1.6]))
            _car(land, *village.place(float(rng.uniform(12, east)), b + lane), angle, rng)


def _draw_store(land: _Land, corner: _Frame, rng: np.random.Generator) -> None:
    """A flat-roofed shop with its car park; the frame lies in its north-western corner."""
    angle = corner.angle
    if corner.y > land.extent:
        return
    _rectangle(land, *corner.place(23, 17), angle, (46, 30), ASPHALT, "road", 0.06)
    _rectangle(land, *corner.place(34, 17), angle, (21, 26), (0.27, 0.285, 0.29, 0.29), "roof")
    _rectangle(land, *corner.place(34, 17), angle, (21, 26), LIGHT_METAL, "roof", 0.0, 6.0)
    _rectangle(land, *corner.place(34, 17), angle, (20, 25), (0.24, 0.25, 0.255, 0.26), "roof")
    for vent in ((30, 10), (37, 10), (33, 22)):
        _rectangle(land, *corner.place(*vent), angle, (2.4, 1.8), PAINT, "roof", 0.0, 1.4)
    for b in (5.5, 17.0, 27.5):
        for k in range(8):
            bay = corner.place(1.5 + 2.6 * k, b)
            _rectangle(land, *bay, angle, (0.15, 5), PAINT, None)
            if k < 7 and rng.random() < 0.6:
                parked = corner.place(2.8 + 2.6 * k, b + rng.uniform(-0.3, 0.3))
                _car(land, *parked, angle + np.pi / 2 * float(rng.choice([-1, 1])), rng)


def _draw_plot(
    land: _Land,
    village: _Frame,
    a: float,
    street: float,
    side: int,
    width: float,
    rng: np.random.Generator,
) -> None:
    """House, drive, garden and hedge; `a` is the middle along the street, `side` -1 north."""
    angle = village.angle

    def place(along: float, from_street: float) -> tuple[float, float]:
        return village.place(a + along, street + side * from_street)

    spots = [place(s * width / 2, c) for s in (-1, 0, 1) for c in (5.5, 15, 4 + PLOT_DEPTH)]
    if {land.at(x, y) for x, y in spots} - {"garden", "meadow", None}:
        return  # something else lies there already
    middle = place(0, 4.6 + PLOT_DEPTH / 2)
    where = land.around(*middle, 18)
    if where is None:
        return
    lawn = _plants(LAWN, land.vigour[where] + 0.8 * land.grain[where])
    lawn += rng.uniform(0, 0.55) * (_column((0.080, 0.125, 0.120, 0.31)) - lawn)
    outside = _box(*land.local(where, *middle, angle), width - 0.6, PLOT_DEPTH)
    land.paint(where, _edge(outside), lawn, "garden")
    if rng.random() < 0.75:
        hedge = (np.abs(outside + 0.7) < 0.6 + 0.1 * land.grain[where]).astype(np.float32)
        land.paint(where, hedge, TREE)
        land.height[where] += hedge * (1.2 + 0.2 * land.grain[where])

    hand = float(rng.choice([-1, 1]))  # on which side of the house the drive is
    drive = hand * (width / 2 - 3)
    paving = CONCRETE if rng.random() < 0.5 else GRAVEL
    _rectangle(land, *place(drive, 9.5), angle + np.pi / 2, (10.5, 3.2), paving)
    _rectangle(land, *place(drive, 17), angle + np.pi / 2, (6, 3.6), TILES[4], "roof", 0.04, 2.7)
    if rng.random() < 0.6:
        _car(land, *place(drive, 9 + rng.uniform(-1, 1)), angle + np.pi / 2, rng)
    long, deep = float(rng.uniform(10.5, 12.5)), float(rng.uniform(8, 9.5))
    long = min(long, width - 7.5)
    house = place(-hand * (width / 2 - 1.6 - long / 2), 13 + rng.uniform(-1, 1.5))
    _rectangle(land, *place(-hand * 3, 19.5), angle, (6.5, 3.5), CONCRETE)
    _draw_house(land, house, angle, (long, deep), rng)
    if rng.random() < 0.22:
        basin = place(hand * 2.5, 23.3)
        _rectangle(land, *basin, angle, (9.4, 5.2), CONCRETE)
        _rectangle(land, *basin, angle, (7.6, 3.5), POOL, "water", 0.03)
    elif rng.random() < 0.5:
        _rectangle(land, *place(hand * 3, 23.5), angle, (7, 4.5), SOIL, texture=0.18)
    for _ in range(int(rng.integers(1, 4))):
        spot = place(float(rng.uniform(-0.45, 0.45)) * width, float(rng.uniform(20, 26)))
        _tree(land, *spot, float(rng.uniform(1.3, 2.8)), rng)
    if rng.random() < 0.5:
        _tree(land, *place(float(rng.uniform(-0.3, 0.3)) * width, 6), 1.5, rng)


def _draw_house(
    land: _Land,
    at: tuple[float, float],
    angle: float,
    sides: tuple[float, float],
    rng: np.random.Generator,
) -> None:
    roof = TILES[int(rng.choice(len(TILES), p=[0.28, 0.24, 0.16, 0.12, 0.08, 0.12]))]
    if rng.random() < 0.04:
        roof = BLUE_METAL
    if rng.random() < 0.25 and sides[1] > 8.4:
        angle, sides = angle + np.pi / 2, (sides[1] + 1, sides[0] - 1)
    frame = _Frame(*at, angle)
    hipped = bool(rng.random() < 0.35)
    _building(land, *at, angle, sides, roof, 4.2, 0.68, hipped=hipped, course=0.9)
    if rng.random() < 0.35:  # a wing across
        wing = frame.place(float(rng.choice([-1, 1])) * sides[0] / 4, sides[1] / 2)
        _building(land, *wing, angle + np.pi / 2, (5, 5), roof, 4.2, 0.68, course=0.9)
    sunny = np.sign(np.sin(SUN_AZIMUTH) * -np.sin(angle) - np.cos(SUN_AZIMUTH) * np.cos(angle))
    if rng.random() < 0.3:
        panel = frame.place(rng.uniform(-1, 1), sunny * sides[1] / 4)
        _rectangle(land, *panel, angle, (0.5 * sides[0], 2.6), SOLAR, None, 0.0)
    chimney = frame.place(rng.uniform(-0.3, 0.3) * sides[0], -sunny * 0.9)
    _rectangle(land, *chimney, angle, (0.9, 0.9), SOIL, None, 0.0, 1.2)


def _draw_traffic(land: _Land, layout: _Layout, rng: np.random.Generator) -> None:
    for k in range(max(2, int(land.extent / 22))):
        lane = 1.75 if k % 2 else -1.75
        frame = _on_road(land, layout, float(rng.uniform(0.02, 0.98)))
        index = min(land.n - 2, int(frame.x / CELL))
        road = layout.road_y[0]
        heading = float(np.arctan((road[index + 1] - road[index]) / CELL))
        lane_frame = _Frame(frame.x, frame.y, heading)
        _car(land, *lane_frame.place(0, lane), heading if lane > 0 else heading + np.pi, rng)


# --- trees ------------------------------------------------------------------------------------


def _draw_trees(land: _Land, layout: _Layout, rng: np.random.Generator) -> None:
    size = land.extent
    for x in np.arange(2, size, 11.0):  # an avenue along the south of the main road
        y = float(np.interp(x, land.x[0], layout.road_y[0])) + 8.3
        if rng.random() < 0.8:
            _tree(land, x + rng.uniform(-1, 1), y, float(rng.uniform(2.0, 2.9)), rng)
    for y in np.arange(0, size, 3.6):  # galleries along the banks, with gaps
        middle = float(np.interp(y, land.y[:, 0], layout.river_x[:, 0]))
        for side in (-1, 1):
            if rng.random() < 0.62:
                away = layout.river_width / 2 + float(rng.gamma(2.0, 2.2)) + 1
                _tree(land, middle + side * away, y, float(rng.uniform(1.6, 4.2)), rng)
    _draw_wood(land, layout, rng)
    for _ in range(int(size * size / 900)):  # single trees on grass
        x, y = rng.uniform(0, size, 2)
        if land.at(x, y) == "garden":
            _tree(land, x, y, float(rng.uniform(1.2, 3.2)), rng)


def _draw_wood(land: _Land, layout: _Layout, rng: np.random.Generator) -> None:
    """A closed wood in the south-west, west of the river, with a ragged rim."""
    size = land.extent
    reach = 0.36 * size
    from_shore = np.abs(land.x - layout.river_x) - layout.river_width / 2
    outside = np.maximum(size - land.y - 0.7 * reach, land.x - 0.95 * reach)
    outside = np.maximum(outside, 6 - from_shore) + 3 * land.patches
    litter = _column((0.045, 0.075, 0.062, 0.27)) * (1 + 0.12 * land.grain)
    land.paint(land.whole(), _edge(outside, 6.0), litter, "meadow")
    for _ in range(int(0.05 * reach * reach) + 8):
        x, y = -0.02 * size + reach * rng.random(), size * 1.02 - reach * rng.random()
        middle = float(np.interp(y, land.y[:, 0], layout.river_x[:, 0]))
        rim = 0.72 * reach + 5 * np.sin(x / 7) + 4 * np.sin(y / 5)
        if size - y < rim and abs(x - middle) > layout.river_width / 2 + 2:
            _tree(land, x, y, float(rng.uniform(2.2, 4.6)), rng)


def _tree(land: _Land, x: float, y: float, radius: float, rng: np.random.Generator) -> None:
    """A lumpy crown; none grows on roads, roofs and fields or in water."""
    lobes, turn = rng.uniform(0.05, 0.13, 3), rng.uniform(0, 2 * np.pi, 3)
    tone = rng.uniform(0.8, 1.25)
    leaf = _column(TREE) * _column(
        (tone, tone * rng.uniform(0.9, 1.2), tone * rng.uniform(0.85, 1.5), rng.uniform(0.75, 1.3))
    )
    where = land.around(x, y, 1.3 * radius)
    if where is None or land.at(x, y) in ("road", "roof", "water", "field"):
        return
    dx, dy = land.local(where, x, y, 0)
    direction = np.arctan2(dy, dx)
    waves = sum(lobe * np.sin(k * direction + t) for k, lobe, t in zip((3, 5, 8), lobes, turn, strict=True))
    inward = 1 - np.hypot(dx, dy) / (radius * (1 + waves)) + 0.07 * land.grain[where]
    crown = np.sqrt(np.clip(inward, 0, 1)) * 1.5 * radius + 0.9
    crown += 0.25 * land.grain[where] * np.clip(3 * inward, 0, 1)
    taller = (inward > 0) & (crown > land.height[where])
    land.height[where][taller] = crown[taller]
    shade = 0.8 + 0.3 * np.clip(inward, 0, 1) + 0.10 * land.grain[where]
    # Thin rims let the ground show, so that crowns have soft outlines.
    land.paint(where, taller * np.clip(4.5 * inward, 0, 1), leaf * shade, "tree")
