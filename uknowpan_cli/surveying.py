"""The first pass over a scene: samples give scale, moments, blur and shift."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from uknowpan.durable import parsed, write_text
from uknowpan.models.blur import Psf, default_psf
from uknowpan.models.registration.field import Registration
from uknowpan.models.resample import Array
from uknowpan.models.sharpeners import HIGH_PERCENTILE, Sharpener
from uknowpan.models.statistics import SceneStatistics, scene_statistics
from uknowpan.registering import LEAST_LIKENESS, deceived, measured_field, moved_sample, wanted_field
from uknowpan.tiling import IncompatiblePair, MsMeta, ScenePair, TileArrays, sample_windows

log = logging.getLogger("uknowpan")

SURVEY_WINDOWS, SURVEY_SIZE = 9, 512
"""Number of samples, and their side in PAN pixels."""

FEW_LEVELS = 16
"""Whole numbers that a band's range must hold, or rounding to integers is worth a warning."""

FEW_STEPS = 256
"""Steps of 32-bit floats that the range of a band must hold."""

UNUSUAL = 30
"""A value this many usual ranges beyond the usual values is an outlier; moments leave it out."""

LEAST_VALUE = 1e-30
"""Values all below it come near those that processors take for 0."""

FILL_SHARE, FILL_COUNT, FILL_GAP = 0.002, 8, 0.05
"""A value in at least this share and number of the pixels, with hardly any other this near, in usual ranges, may be a
fill."""

Progress = Callable[[int, int], None]


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class SceneScale:
    """Divisors that bring digital numbers to about [0, 1]."""

    pan: float
    ms: float
    source: str
    """"option", "bit depth", "percentile", or "model": percentiles matched to the training data."""


@dataclass(frozen=True)
class Survey:
    """The facts about a scene that all of its tiles share."""

    scale: SceneScale
    statistics: SceneStatistics
    """In scaled units, with the blur and the shift that the method assumes."""
    measured: Psf | None = None
    """Blur and shift of the scene before any was removed; None: not measured or not measurable."""
    softness: float | None = None
    """Softness of the MS, sigma in MS pixels; None: not measured."""
    high: float = 0.0
    """Full scale or high percentile of the MS, digital numbers."""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    """Sentences about values that look like undeclared nodata."""
    displacement: Registration | None = None
    """Displacement of the MS before any was taken out; None: not looked for."""

    @property
    def field(self) -> Registration | None:
        """The displacement that is taken out."""
        return self.statistics.field

    @property
    def shift(self) -> tuple[float, float] | None:
        """(dy, dx), PAN pixels, from the PAN to the MS, + is down and right; None: not measured."""
        if self.displacement is not None and self.displacement.model != "none":
            return self.displacement.shift
        if self.measured is None:
            return None
        dy, dx = self.measured.shift
        return -dy, -dx


def survey(
    pair: ScenePair,
    sharpener: Sharpener | None = None,
    *,
    max_value: float | None = None,
    coregister: str = "check",
    softness: bool = False,
    windows: int = SURVEY_WINDOWS,
    on_progress: Progress = no_progress,
) -> Survey:
    """Survey a scene by samples spread over all of it.

    Args:
        pair: the opened scene.
        sharpener: the method whose assumptions and scale count; None: the scene's own.
        max_value: full scale in digital numbers, if it is known.
        coregister: see `SharpenOptions.coregister`. Without "off" the displacement is measured even where the
            sharpener assumes none.
        softness: measure the softness of the MS too, and its blur even where the sharpener assumes one.
        windows: largest number of samples.
        on_progress: called with (samples read, samples in all).

    Raises:
        IncompatiblePair: no pixel is valid in both PAN and MS.
    """
    began = time.monotonic()
    assumed = None if sharpener is None else sharpener.assumed_psf(pair.ratio)
    softness = softness or (sharpener is not None and sharpener.wants_softness)
    places = sample_windows(pair, windows, max(SURVEY_SIZE // pair.ratio, 32))
    if not places:
        raise IncompatiblePair("No pixel is valid in both PAN and MS; check nodata (--nodata) and that they overlap.")
    displacement = None if coregister == "off" else measured_field(pair, coregister)
    field = None if displacement is None else wanted_field(displacement, coregister)

    def look(field: Registration | None) -> _Look:
        samples: list[TileArrays] = []
        for place in places:
            on_progress(len(samples), len(places))
            samples.append(pair.read_frame(*place) if field is None else moved_sample(pair, place, field))
        known = scene_scale(pair, samples, max_value)
        pieces, valid = _pieces(samples, pair.ratio, known)
        own = None
        if assumed is None or softness:
            own = scene_statistics(pieces, pair.ratio, None, valid, soft=softness)
        if assumed is not None:
            statistics = replace(scene_statistics(pieces, pair.ratio, assumed, valid), field=field)
        else:
            assert own is not None
            statistics = own
            if field is not None:  # what is left of a shift is the error of its measure
                there = scene_statistics(pieces, pair.ratio, replace(own.psf, shift=(0.0, 0.0)), valid)
                statistics = replace(there, field=field, softness=own.softness)
        return _Look(samples, known, statistics, own)

    try:
        seen = look(field)
        if field is not None and coregister == "auto" and seen.statistics.likeness < LEAST_LIKENESS:
            field = None
            seen = look(None)
        elif field is None and coregister == "auto" and assumed is None and deceived(displacement, seen.statistics.psf):
            field = displacement
            seen = look(field)
        scale = _scale_for(sharpener, seen.known)
    except ValueError as error:
        raise IncompatiblePair(f"The scene cannot be sharpened: {error}.") from error
    on_progress(len(places), len(places))
    measured = None if seen.own is None or seen.own.psf == default_psf(pair.ratio) else seen.own.psf
    if field is not None and measured is not None:
        dy, dx = field.shift
        measured = replace(measured, shift=(-dy, -dx))
    return Survey(
        scale,
        _rescaled(seen.statistics, seen.known, scale),
        measured,
        None if seen.own is None else seen.own.softness,
        seen.known.ms,
        time.monotonic() - began,
        tuple(value_warnings(pair, seen.samples)),
        displacement,
    )


@dataclass(frozen=True)
class _Look:
    """Statistics and blur of the samples, with a displacement taken out or not."""

    samples: list[TileArrays]
    known: SceneScale
    statistics: SceneStatistics
    """with the blur that counts"""
    own: SceneStatistics | None
    """with the scene's own blur, where it is measured"""


def value_warnings(pair: ScenePair, samples: Sequence[TileArrays]) -> Iterator[str]:
    """Sentences about values that 32-bit floats hold too coarsely, or that are frequent and far from all others.

    The latter are probably nodata that is not declared.
    """
    bands = [("the PAN", [s.pan[0][s.pan_valid] for s in samples])]
    bands += [(f"band {b + 1} of the MS", [s.ms[b][s.ms_valid] for s in samples]) for b in range(pair.bands)]
    named: set[float] = set()
    for name, parts in bands:
        values = np.concatenate(parts)
        if values.size == 0:
            continue
        if 0 < np.ptp(values) < FEW_STEPS * np.spacing(np.abs(values).max()):
            yield f"{name} is computed in 32-bit floats, too coarse for its values: subtract a constant from it first"
            continue
        for value in (float(values.min()), float(values.max())):
            rest = values[values != value]
            share = 1 - rest.size / values.size
            rare = share < FILL_SHARE or values.size - rest.size < FILL_COUNT
            if rare or rest.size == 0 or value in named:
                continue
            low, high = np.percentile(rest, [0.5, 99.5])
            near = np.abs(rest - value) < FILL_GAP * (high - low)
            if high > low and near.sum() <= min(0.1 * share * values.size, FILL_SHARE * rest.size):
                named.add(value)
                yield (
                    f"{share:.1%} of the sampled pixels of {name} are {value:g}, far from all others: "
                    f"if {value:g} marks missing pixels, give --nodata {value:g}"
                )


def _usual(values: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Bounds of the values that are no outliers, far beyond any that a sensor gives."""
    if values.size == 0:
        return -np.inf, np.inf
    low, middle, high = (float(v) for v in np.percentile(values, [0.5, 50, 99.5]))
    spread = max(high - low, 0.1 * abs(middle))
    return (low - UNUSUAL * spread, high + UNUSUAL * spread) if spread > 0 else (-np.inf, np.inf)


def scene_scale(pair: ScenePair, samples: Sequence[TileArrays], max_value: float | None) -> SceneScale:
    """Full scale of PAN and MS: an option, the bit depth in the metadata, or the 99.5 percentile.

    Raises:
        ValueError: a sample without any valid pixel.
    """
    if max_value is not None:
        return SceneScale(max_value, max_value, "option")
    if pair.meta.nbits and pair.pan_meta.nbits:
        return SceneScale(2.0**pair.pan_meta.nbits - 1, 2.0**pair.meta.nbits - 1, "bit depth")
    pan = np.concatenate([s.pan[0][s.pan_valid] for s in samples])
    ms = np.concatenate([s.ms[:, s.ms_valid].ravel() for s in samples])
    values = []
    for name, pixels in (("PAN", pan), ("MS", ms)):
        if pixels.size == 0:
            raise ValueError(f"the {name} holds no valid pixel")
        if np.abs(pixels).max() < LEAST_VALUE and (pixels.view(np.uint32) & 0x7FFFFFFF).any():
            raise ValueError(f"the values of the {name} are below {LEAST_VALUE:g}; multiply them by a constant first")
        high = float(np.percentile(np.abs(pixels), HIGH_PERCENTILE))
        values.append(high if high > 0 else 1.0)
    return SceneScale(values[0], values[1], "percentile")


def _scale_for(sharpener: Sharpener | None, known: SceneScale) -> SceneScale:
    """The scale that the sharpener asks for; full scales that are known stand."""
    if sharpener is None or known.source != "percentile":
        return known
    wanted = sharpener.full_scale(known.pan, known.ms)
    return known if wanted is None else SceneScale(*wanted, "model")


def _rescaled(statistics: SceneStatistics, old: SceneScale, new: SceneScale) -> SceneStatistics:
    if new is old:
        return statistics
    gain = np.full_like(statistics.mean, old.ms / new.ms)
    gain[-1] = old.pan / new.pan
    return replace(
        statistics,
        mean=statistics.mean * gain,
        covariance=statistics.covariance * np.outer(gain, gain),
        detail=statistics.detail * np.outer(gain, gain),
        haze=None if statistics.haze is None else statistics.haze * gain[:-1],
    )


def _pieces(
    samples: Sequence[TileArrays], ratio: int, scale: SceneScale
) -> tuple[list[tuple[Array, Array]], list[Array]]:
    """Scaled (pan, ms) of the clean parts of the samples, and which of their MS pixels are valid and no outliers."""
    pieces, valid = [], []
    pan_usual = _usual(np.concatenate([s.pan[0][s.pan_valid] for s in samples]))
    usual = [_usual(np.concatenate([s.ms[b][s.ms_valid] for s in samples])) for b in range(len(samples[0].ms))]
    low, high = (np.array(bounds, np.float32)[:, None, None] for bounds in zip(*usual, strict=True))
    kept, wholes, parts = [], [], []
    for s in samples:
        h, w = s.ms_valid.shape
        kept_pan, kept_ms = s.pan.clip(*pan_usual), s.ms.clip(low, high)
        good = (s.pan_valid & (kept_pan == s.pan)[0]).reshape(h, ratio, w, ratio)
        good_ms = s.ms_valid & (kept_ms == s.ms).all(axis=0)
        kept.append((kept_pan, kept_ms))
        wholes.append(good.all((1, 3)) & good_ms)
        parts.append(good.any((1, 3)) & good_ms)
    for (kept_pan, kept_ms), whole in zip(kept, wholes if any(w.any() for w in wholes) else parts, strict=True):
        pan, ms = kept_pan / np.float32(scale.pan), kept_ms / np.float32(scale.ms)
        for part in _clean_parts(whole):
            rows, cols = (slice(p.start * ratio, p.stop * ratio) for p in part)
            pieces.append((pan[:, rows, cols], ms[:, part[0], part[1]]))
            valid.append(whole[part])
    return pieces, valid


def _clean_parts(valid: npt.NDArray[np.bool_]) -> list[tuple[slice, slice]]:
    """A sample without its invalid borders, or its quarters: blur is measured on clean parts only."""
    (top, bottom), (left, right) = (_extent(np.any(valid, axis)) for axis in (1, 0))
    inner = valid[top:bottom, left:right]
    if inner.all() or min(inner.shape) < 64:
        return [(slice(top, bottom), slice(left, right))]
    middle, centre = (top + bottom) // 2, (left + right) // 2
    rows, cols = (slice(top, middle), slice(middle, bottom)), (slice(left, centre), slice(centre, right))
    return [(r, c) for r in rows for c in cols if valid[r, c].any()]


def _extent(flags: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Start and stop of the true values; the whole length where there is none."""
    true = np.flatnonzero(flags)
    return (int(true[0]), int(true[-1]) + 1) if true.size else (0, len(flags))


def clipping_warning(meta: MsMeta, high: float, dtype: str | None) -> str | None:
    """A sentence where another output dtype would damage MS values that reach `high`."""
    if dtype is None or np.dtype(dtype).kind == "f":
        return None
    if high > np.iinfo(dtype).max:
        lost = f"{dtype} ends at {np.iinfo(dtype).max}, and values above are clipped, not rescaled"
    elif np.dtype(meta.dtype).kind == "f" and high < FEW_LEVELS:
        lost = f"{dtype} rounds them to whole numbers, and they are not rescaled"
    else:
        return None
    return f"the MS's values reach about {high:.4g}: {lost}; leave out --output-dtype"


def remembered(path: Path) -> Survey | None:
    """The survey that `remember` kept in a file, to the last bit; None where there is none, or it is damaged."""
    try:
        digest, _, text = path.read_text().partition("\n")
        if digest != hashlib.sha256(text.encode()).hexdigest():
            return None
        data = parsed(text)
        psf = data["measured"]
        return Survey(
            SceneScale(**data["scale"]),
            SceneStatistics.from_dict(data["statistics"]),
            None if psf is None else Psf(psf["sigma"], tuple(psf["shift"]), psf["correlation"]),
            displacement=None if data["displacement"] is None else Registration.from_dict(data["displacement"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(survey: Survey, path: Path) -> None:
    """Keep a survey in a file, below the SHA-256 of its text. Raises OSError."""
    data = {
        "scale": asdict(survey.scale),
        "statistics": survey.statistics.as_dict(),
        "measured": None if survey.measured is None else asdict(survey.measured),
        "displacement": None if survey.displacement is None else survey.displacement.as_dict(),
    }
    text = json.dumps(data)
    write_text(path, f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
