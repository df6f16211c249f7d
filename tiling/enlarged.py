"""By which factor an MS was enlarged before it came here, as its own pixels show."""

from math import gcd, lcm

import numpy as np

from uknowpan.tiling.errors import InputUnreadable
from uknowpan.tiling.fill import FloatArray
from uknowpan.tiling.raster import GDAL_ERRORS, Raster, reason
from uknowpan.tiling.window import Window

MOST_REPEATS = 8
"""Largest factor that is looked for where pixels are repeated."""
_SIDE = 1024
"""Pixels; the middle of the first band up to this size is looked at."""
_MOST_INTERPOLATED = 6
"""Largest factor that is looked for where pixels are interpolated: JPEG repeats itself every 8 pixels."""
_BINS = 840
"""Frequencies per pixel: all simple fractions are among them."""
_BANDS, _LEAST_SIDE = 48, 192
"""Bands of the spectrum in which a gap is looked for, and the least side of an image that fills them."""
_DEEP, _BELOW_LOW, _BELOW_HIGH = 1.3, 1.5, 0.5
"""Decades by which a gap lies below its neighbours, below the strongest band before it, and after it."""
_CLEAR, _SHARE = 6.0, 0.25
"""Strength above the background that proves a period, and share of it that another frequency needs to count."""


def pixel_repeats(ms: Raster) -> int:
    """Factor by which repeated pixels enlarged this raster along each axis; 1 if none were repeated.

    Looks at the lengths of runs of equal values in the middle of the first band: an enlarged raster has hardly any run
    shorter than the factor, and runs of just the factor abound. Raises InputUnreadable.
    """
    data = ms.dataset
    h, w = min(data.height, 256), min(data.width, 256)
    top, left = (data.height - h) // 2, (data.width - w) // 2
    try:
        values = data.read(1, window=((top, top + h), (left, left + w)))
    except GDAL_ERRORS as error:
        raise InputUnreadable(f"{ms.path} cannot be read (truncated or corrupt?): {reason(error)}.") from error
    factors = set()
    for lines in (values, values.T):
        runs = np.concatenate([np.diff(np.flatnonzero(line[1:] != line[:-1])) for line in lines])
        if runs.size < 64:
            return 1
        counts = np.bincount(np.minimum(runs, MOST_REPEATS + 1), minlength=MOST_REPEATS + 2)
        factor = int(counts.argmax())
        short, exact = counts[:factor].sum() / runs.size, counts[factor] / runs.size
        factors.add(factor if factor <= MOST_REPEATS and short < 0.05 and exact > 0.5 else 1)
    return factors.pop() if len(factors) == 1 else 1


def interpolated_by(ms: Raster) -> int | None:
    """The factor by which this raster was enlarged by interpolation; None where it cannot be measured.

    Differences between neighbours vary with the period of the original pixels (Gallagher, Detection of linear and
    cubic interpolation in JPEG compressed images, CRV 2005), where that is a whole number. Else linear kernels leave a
    deep gap in the spectrum at the frequency of the original pixels. Both axes must agree. Raises InputUnreadable.
    """
    data = ms.dataset
    h, w = min(data.height, _SIDE), min(data.width, _SIDE)
    window = Window((data.height - h) // 2, (data.width - w) // 2, h, w)
    values, valid = ms.read(window)
    image = np.where(valid, values[0], np.nan)
    for measured in (_period, _gap):
        factor = measured(image)
        if 1 < factor <= _MOST_INTERPOLATED and factor == measured(image.T):
            return factor
    return None


def _period(image: FloatArray) -> int:
    """Pixels along a row after which the spread of differences repeats itself; 1: none is clear."""
    frequencies = sorted({_BINS * k // r for r in range(2, 9) for k in range(1, r // 2 + 1)})
    strength = dict.fromkeys(frequencies, 0.0)
    for order in (1, 2):
        steps = np.abs(np.diff(image, n=order, axis=1))
        known = np.isfinite(steps)
        spread = np.where(known, steps, 0).sum(axis=0, dtype=float) / np.maximum(known.sum(axis=0), 1)
        if spread.size < 64 or not spread.mean() > 0:
            return 1
        level = np.log(spread + 1e-6 * spread.mean())
        level -= np.convolve(np.pad(level, 4, mode="edge"), np.ones(9) / 9, "valid")
        turns = -(-level.size // _BINS)
        spectrum = np.abs(np.fft.rfft(level * np.hanning(level.size), _BINS * turns))[::turns]
        for k in frequencies:
            near = np.r_[max(0, k - 70) : max(k - 12, 0), min(k + 13, spectrum.size) : k + 71]
            background = float(np.median(spectrum[near[near < spectrum.size]]))
            strength[k] = max(strength[k], float(spectrum[k]) / max(background, 1e-12))
    top = max(strength.values())
    if top <= _CLEAR:
        return 1
    least = max(0.6 * _CLEAR, _SHARE * top)
    return lcm(*(_BINS // gcd(_BINS, k) for k, value in strength.items() if value > least))


def _gap(image: FloatArray) -> int:
    """The period, in pixels along a row, of the deepest gap in the spectrum; 1: none is deep."""
    if min(image.shape) < _LEAST_SIDE or not np.isfinite(image).any():
        return 1
    rows = np.where(np.isfinite(image), image, np.nanmean(image)).astype(float)
    rows = rows[: len(rows) // 8 * 8].reshape(-1, 8, rows.shape[1]).mean(axis=1)
    width = rows.shape[1]
    rows -= rows[:, :1] + np.linspace(0, 1, width) * (rows[:, -1:] - rows[:, :1])
    power = (np.abs(np.fft.rfft(rows * np.hanning(width))) ** 2).mean(axis=0)
    frequency = np.fft.rfftfreq(width)
    band = np.minimum((frequency * 2 * _BANDS).astype(int), _BANDS - 1)
    level = np.bincount(band, power * frequency**2, _BANDS) / np.bincount(band, minlength=_BANDS)
    if not level.min() > 0:
        return 1
    level = np.log10(level)
    deepest, period = _DEEP, 1.0
    for k in range(_BANDS * 2 // 7, _BANDS * 4 // 5):  # periods of 7 to 2.5 pixels
        sides = min(np.median(level[k - 5 : k - 2]), np.median(level[k + 3 : k + 6])) - level[k]
        before, after = level[2 : k - 2].max() - level[k], level[k + 3 :].max() - level[k]
        if sides > deepest and before > _BELOW_LOW and after > _BELOW_HIGH:
            deepest, period = sides, 2 * _BANDS / (k + 0.5)
    return round(period)
