"""Made-up pairs in sensor geometry: a known ground, seen through RPCs whose polynomials are evaluated here."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from affine import Affine
from rasterio.rpc import RPC
from rasterio.warp import transform
from rasters import UTM, write_raster
from scipy.ndimage import gaussian_filter, map_coordinates

PIXEL, RATIO, SIZE = 0.5, 4, 320
"""Metres of a PAN pixel; PAN pixels of an MS pixel; PAN pixels of a side."""
SIGMA = 1.9
"""Blur of the MS in PAN pixels: a gain of 0.3 at its Nyquist frequency, as that of satellites."""
LON, LAT, LEVEL = 3.0, 45.0, 120.0
DEGREES = 1 / 111_320
"""A metre towards the north."""


def rpcs(
    size: int, pixel: float, tilt: tuple[float, float], turn: float = 0.0, bend: float = 0.0, off: float = 0.0
) -> RPC:
    """RPCs of a square image around LON, LAT.

    tilt: (down, right) pixels that a point moves for each metre of height.
    turn: columns that a row moves for each column, and the other way round.
    bend: pixels by which the left and right edge lie to the right of a straight map.
    off: pixels by which the image lies down and right.
    """
    half = size / 2
    line, samp, one = [0.0] * 20, [0.0] * 20, [1.0] + [0.0] * 19
    line[1:4] = [turn, -1.0, 100 * tilt[0] / half]
    samp[1:4] = [1.0, turn, 100 * tilt[1] / half]
    samp[7] = bend / half
    return RPC(
        height_off=LEVEL, height_scale=100.0, lat_off=LAT, lat_scale=half * pixel * DEGREES, long_off=LON,
        long_scale=half * pixel * DEGREES / np.cos(np.radians(LAT)), line_off=half - 0.5 + off, line_scale=half,
        samp_off=half - 0.5 + off, samp_scale=half, line_num_coeff=line, line_den_coeff=one, samp_num_coeff=samp,
        samp_den_coeff=one,
    )  # fmt: skip


def seen(it: RPC, lon, lat, height):
    """(row, column), in pixels from the corner, of points on the ground; RPCs count from the first pixel's centre."""
    x, y = (lon - it.long_off) / it.long_scale, (lat - it.lat_off) / it.lat_scale
    z = (height - it.height_off) / it.height_scale

    def value(c):
        return c[0] + c[1] * x + c[2] * y + c[3] * z + c[7] * x * x

    rows = it.line_off + it.line_scale * value(it.line_num_coeff)
    return rows + 0.5, it.samp_off + it.samp_scale * value(it.samp_num_coeff) + 0.5


def heights(lon, lat, hill: float = 0.0):
    """A slope of 1 in 5 to the north-east, and a round hill in the middle of the scene."""
    east, north = (lon - LON) / DEGREES * np.cos(np.radians(LAT)), (lat - LAT) / DEGREES
    return LEVEL + 0.14 * (east + north) + hill * np.exp(-(east**2 + north**2) / (2 * 25.0**2))


def on_ground(it: RPC, rows, cols, hill: float = 0.0):
    """(lon, lat) of pixels on the ground, by steps of Newton."""
    lon, lat = np.full(np.shape(rows), LON), np.full(np.shape(rows), LAT)
    for _ in range(12):
        r, c = seen(it, lon, lat, heights(lon, lat, hill))
        lon = lon + (cols - c) / it.samp_scale * it.long_scale
        lat = lat - (rows - r) / it.line_scale * it.lat_scale
    return lon, lat


@dataclass(frozen=True)
class SensorPair:
    """Files of a pair, and the ground that they show."""

    pan: str
    ms: str
    dem: str
    truth: np.ndarray
    """(4, H, W) on the map"""
    place: Affine
    """of the truth, in UTM"""
    pan_rpcs: RPC
    ms_rpcs: RPC


def write_sensor_pair(
    folder: Path, *, hill: float = 0.0, pan_rpcs: RPC | None = None, ms_rpcs: RPC | None = None, **creation: object
) -> SensorPair:
    """Write a pair whose MS looks from a slightly other place, and the DEM of its ground."""
    pan_rpcs = pan_rpcs or rpcs(SIZE, PIXEL, (0.3, -0.2), bend=0.4)
    ms_rpcs = ms_rpcs or rpcs(SIZE // RATIO, PIXEL * RATIO, (0.07, -0.06), turn=0.002, off=0.4)
    wide = SIZE + 64
    (x,), (y,) = transform("EPSG:4326", UTM, [LON], [LAT])
    place = Affine.translation(x - wide * PIXEL / 2, y + wide * PIXEL / 2) @ Affine.scale(PIXEL, -PIXEL)
    random = np.random.default_rng(5)
    fields = [gaussian_filter(random.normal(size=(wide, wide)), s) * s for s in (1, 2, 5, 12) for _ in range(2)]
    shared = sum(fields[::2])
    truth = np.stack([1000 + 150 * shared + 40 * (band + 1) * sum(fields[3::2]) for band in range(4)])

    def looked(it: RPC, size: int, bands: np.ndarray, fine: int, sigma: float) -> np.ndarray:
        """Bands at pixels of size x size, blurred by `sigma` of the points that each pixel has along a side."""
        rim = 4 * fine
        rows, cols = (np.mgrid[-rim : size * fine + rim, -rim : size * fine + rim] + 0.5) / fine
        lon, lat = (v.ravel() for v in on_ground(it, rows, cols, hill))
        xs, ys = transform("EPSG:4326", UTM, lon, lat)
        px, py = ~place @ (np.array(xs), np.array(ys))
        values = [map_coordinates(band, [py - 0.5, px - 0.5], order=3, mode="nearest") for band in bands]
        blurred = gaussian_filter(np.reshape(values, (-1, *rows.shape)), (0, sigma, sigma))[:, rim:-rim, rim:-rim]
        parts = blurred.reshape(-1, size, fine, size, fine)[:, :, (fine - 1) // 2 : fine // 2 + 1]
        return parts[..., (fine - 1) // 2 : fine // 2 + 1].mean((2, 4)).round().astype("uint16")

    images = {
        "pan": (looked(pan_rpcs, SIZE, truth.mean(0)[None], 1, 0.0), pan_rpcs),
        "ms": (looked(ms_rpcs, SIZE // RATIO, truth, RATIO, SIGMA), ms_rpcs),
    }
    pan, ms = (
        write_raster(folder / f"s_{name}.tif", values, None, crs=None, rpcs=its, **creation)
        for name, (values, its) in images.items()
    )
    step, side = 4 * DEGREES, 120
    dem_place = Affine.translation(LON - side / 2 * step, LAT + side / 2 * step) @ Affine.scale(step, -step)
    lon, lat = dem_place @ (np.mgrid[:side, :side][::-1] + 0.5)
    dem = write_raster(folder / "dem.tif", heights(lon, lat, hill)[None].astype("float32"), dem_place, crs="EPSG:4326",
                       nodata=-9999.0)  # fmt: skip
    return SensorPair(pan, ms, dem, truth, place, pan_rpcs, ms_rpcs)
