"""Scenes with a known truth: drawn ones of any size, and a real one that is degraded.

The sharp bands are the truth. PAN and MS are made from them by Wald's protocol.
"""

import os
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.enums import ColorInterp

from uknowpan.durable import Scratch
from uknowpan.errors import InputError
from uknowpan.models.blur import gain_to_sigma
from uknowpan.models.resample import degrade
from uknowpan.models.training.degradations import Degradation, degrade_truth

BANDS = ("blue", "green", "red", "nir")
"""Band names of the demo scene, and of drawn scenes with four bands."""
PAN_WEIGHTS = (0.12, 0.30, 0.33, 0.25)
"""Share of each band in the PAN, like the broad panchromatic bands of 0.5 m sensors."""
MS_GAIN, PAN_GAIN = 0.28, 0.5
"""MTF gains of the simulated optics at the Nyquist frequency of the MS and of the PAN."""
FULL_SCALES = {"uint8": 255.0, "uint16": 2047.0, "float32": 1.0}
"""Largest value of a drawn scene by the dtype of its files; uint16 holds 11 bits."""
NOISE = 1 / 1500
"""Standard deviation of the sensor noise, as a share of the full scale."""
CRS, CORNER = "EPSG:32631", (464_000.0, 5_242_000.0)
"""Nominal place of a drawn scene."""


@dataclass(frozen=True)
class SyntheticScene:
    """A PAN/MS pair in DN, with the truth that it was made from."""

    truth: np.ndarray
    """float32 (C, H, W), on the PAN grid."""
    pan: np.ndarray
    """float32 (1, H, W)"""
    ms: np.ndarray
    """float32 (C, h, w); MS pixel i is centred on PAN index ratio*i + (ratio-1)/2."""
    ratio: int
    dtype: str = "uint16"
    """dtype of the files."""
    crs: str = CRS
    corner: tuple[float, float] = CORNER
    """Map position of the upper left corner."""
    metres: float = 0.5
    """PAN pixel size."""


@dataclass(frozen=True)
class ScenePaths:
    """GeoTIFFs of a written scene."""

    pan: Path
    ms: Path
    truth: Path


def make_scene(
    size: int = 512, ratio: int = 4, *, bands: int = 4, seed: int = 7, dtype: str = "uint16"
) -> SyntheticScene:
    """Draw fields, roads, roofs and trees with texture; equal arguments give equal pixels.

    Args:
        size: PAN pixels along each side, a multiple of the ratio.
        ratio: PAN pixels per MS pixel.
        bands: number of MS bands.
        seed: another seed gives another landscape.
        dtype: a key of `FULL_SCALES`.
    """
    rng = np.random.default_rng(seed)
    cover = _draw_cover(2 * size, rng)
    # Neighbouring bands resemble each other; the later half, like the infrared, differs more.
    steps = rng.normal(0, 0.2, (bands, cover.max() + 1)) * np.linspace(0.6, 1.8, bands)[:, None]
    spectra = 0.22 * np.exp(rng.normal(0, 0.45, cover.max() + 1) + np.cumsum(steps, axis=0))
    relief, grain = (_fractal(2 * size, slope, rng) for slope in (1.8, 0.9))
    truth = np.empty((bands, size, size), np.float32)
    for band, spectrum in zip(truth, spectra, strict=True):
        light = np.exp(rng.uniform(0.06, 0.12) * relief + rng.uniform(0.05, 0.08) * grain)
        band[:] = (0.04 + spectrum[cover] * light).reshape(size, 2, size, 2).mean((1, 3))
    full = FULL_SCALES[dtype]
    truth = _quantized(full * truth, full)
    weights = PAN_WEIGHTS if bands == len(PAN_WEIGHTS) else (1 / bands,) * bands
    return SyntheticScene(truth, *observe(truth, ratio, weights, full, rng), ratio, dtype)


def load_demo_scene(size: int = 304, ratio: int = 4, seed: int = 7) -> SyntheticScene:
    """Aerial imagery of a pond in a wood in Virginia, degraded: USDA NAIP, 1 m, public domain.

    Args:
        size: PAN pixels along each side around the middle; at most the whole image is taken.
        ratio: PAN pixels per MS pixel.
        seed: seed of the sensor noise.
    """
    with as_file(files("uknowpan") / "data" / "demo_naip.tif") as path, rasterio.open(path) as dataset:
        size = min(size, *dataset.shape) // ratio * ratio
        top, left = ((n - size) // 2 for n in dataset.shape)
        truth = dataset.read(window=((top, top + size), (left, left + size))).astype(np.float32)
        corner, crs = dataset.transform @ (left, top), dataset.crs.to_string()
    pan, ms = observe(truth, ratio, PAN_WEIGHTS, 255.0, np.random.default_rng(seed))
    return SyntheticScene(truth, pan, ms, ratio, "uint8", crs, corner, 1.0)


def observe(
    truth: np.ndarray, ratio: int, weights: tuple[float, ...], full: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """PAN (1, H, W) and MS (C, h, w) of a truth (C, H, W), by Wald's protocol with sensor noise.

    The PAN is the weighted sum of the bands, blurred by its own optics. The MS is each band,
    blurred by the optics of the MS and sampled in the middle of ratio x ratio PAN pixels.
    """
    sharp = torch.from_numpy(np.tensordot(np.array(weights, np.float32), truth, axes=1)[None, None])
    pan = degrade(sharp, 1, gain_to_sigma(PAN_GAIN, 1))[0].numpy()
    ms = degrade_truth(torch.from_numpy(truth), Degradation(ratio, "gaussian", (MS_GAIN,) * len(truth))).numpy()
    noisy = (image + NOISE * full * rng.standard_normal(image.shape, np.float32) for image in (pan, ms))
    pan, ms = (_quantized(image, full) for image in noisy)
    return pan, ms


def write_scene(scene: SyntheticScene, folder: str | os.PathLike[str]) -> ScenePaths:
    """Write demo_pan.tif, demo_ms.tif and demo_truth.tif, areas nested from the same corner."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    paths = ScenePaths(*(out / f"demo_{name}.tif" for name in ("pan", "ms", "truth")))
    names = BANDS if len(scene.truth) == len(BANDS) else tuple(f"band {b + 1}" for b in range(len(scene.truth)))
    for path, values, factor in (
        (paths.pan, scene.pan, 1),
        (paths.ms, scene.ms, scene.ratio),
        (paths.truth, scene.truth, 1),
    ):
        metres = scene.metres * factor
        with Scratch(path) as scratch:
            with rasterio.open(
                scratch.path,
                "w",
                driver="GTiff",
                count=len(values),
                height=values.shape[1],
                width=values.shape[2],
                dtype=scene.dtype,
                crs=scene.crs,
                transform=rasterio.transform.from_origin(*scene.corner, metres, metres),
                compress="deflate",
            ) as raster:
                raster.descriptions = ("pan",) if len(values) == 1 else names
                raster.colorinterp = [ColorInterp.gray, *[ColorInterp.undefined] * (len(values) - 1)]
                raster.write(values.astype(scene.dtype))
            with rasterio.open(scratch.path) as raster:  # GDAL does not report a disk that fills up while it closes
                if not np.array_equal(raster.read(), values.astype(scene.dtype)):
                    raise InputError(f"{path} does not hold what was written; is the disk full?")
            scratch.publish()
    return paths


def _quantized(values: np.ndarray, full: float) -> np.ndarray:
    """Values within 0 and the full scale; digital numbers are whole and at least 1."""
    limited: np.ndarray = np.rint(np.clip(values, 1, full)) if full > 1 else np.clip(values, 0, full)
    return limited


def _fractal(n: int, slope: float, rng: np.random.Generator) -> np.ndarray:
    """float32 (n, n), zero mean, unit deviation: amplitude falls as frequency**-slope."""
    spectrum = np.fft.rfft2(rng.standard_normal((n, n), np.float32))
    frequency = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.rfftfreq(n)[None])
    noise: np.ndarray = np.fft.irfft2(spectrum * np.maximum(frequency, 1 / 200) ** -slope * (frequency > 0), (n, n))
    normed: np.ndarray = (noise / noise.std()).astype(np.float32)
    return normed


def _draw_cover(n: int, rng: np.random.Generator) -> np.ndarray:
    """int (n, n): which material lies where. Fields first, then roads, roofs and trees on them."""
    rows, columns = np.mgrid[:n, :n].astype(np.float32)
    materials, nearest = 24, np.full((n, n), np.inf, np.float32)
    cover = np.zeros((n, n), np.intp)
    for y, x in rng.uniform(0, n, (max(6, min(n // 16, 64)), 2)):
        distance = (rows - y) ** 2 + (columns - x) ** 2
        closer = distance < nearest
        nearest[closer], cover[closer] = distance[closer], rng.integers(materials)
    shapes = [(rng.uniform(3, 8), np.inf) for _ in range(4)]
    shapes += [tuple(rng.uniform(4, 16, 2)) for _ in range(n * n // 1500)]
    for across, along in shapes:
        (y, x), angle, disc = rng.uniform(0, n, 2), rng.uniform(0, np.pi), rng.random() < 0.4
        reach = int(min(np.hypot(across, along), n))
        window = tuple(slice(max(int(c) - reach, 0), int(c) + reach + 1) for c in (y, x))
        dy, dx = rows[window] - y, columns[window] - x
        u, v = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
        inside = np.hypot(u, v) < across if disc and along < np.inf else (np.abs(v) < across) & (np.abs(u) < along)
        cover[window][inside] = rng.integers(materials)
    return cover
