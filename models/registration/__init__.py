"""Where the MS lies against the PAN: a displacement field from sample windows of one scene.

Each window compares its MS bands with the PAN, blurred and sampled as the MS is, at all places of the search;
its peak is a vote with a 2 x 2 information matrix. Votes are fitted robustly by a shift, an affine map and a
smooth field (cubic B-spline, bending energy), the simplest first. The result is sharpened on the PAN's gradients
(Gauss-Newton, Lucas and Kanade 1981) in the places of the field.

Sign: (dy, dx) in PAN pixels by which the MS content lies off the PAN, + is down and right. The MS shows at x + d(x)
what the PAN shows at x; x are PAN pixel indices of the frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from uknowpan.models.registration.consensus import Vote, consensus, refit
from uknowpan.models.registration.field import Array, Registration
from uknowpan.models.registration.windows import (
    PARTS,
    Bools,
    Sample,
    Window,
    cut_samples,
    gain_to_sigma,
    leave_bright,
    leave_clouds,
    margin_of,
)

LEAST_SHIFT = 0.3
"""PAN pixels (rms over scene and bands) below which a displacement is left alone."""
BAND_SHIFT = 0.25
"""PAN pixels by which a band must lie off the others to have a shift of its own."""
BAND_PRIOR = 1.0
"""PAN pixels by which bands lie off each other before anything is seen."""
BAND_RIDGE = 0.02
DAMPING = 0.7
"""Share of a band's step that is taken: bands are moved against each other at once."""
TURNS, PLAIN_TURNS = 6, 2
"""Refinements at most, and where bands have no shifts of their own."""


def register(
    pan: Array,
    ms: Array,
    ratio: int,
    *,
    valid_pan: Bools | None = None,
    valid_ms: Bools | None = None,
    sigma: float | None = None,
    max_shift: int = 8,
    least: float = LEAST_SHIFT,
) -> Registration:
    """Displacement field of a whole MS (C, h, w) against its PAN (ratio h, ratio w); see `register_samples`."""
    sigma = gain_to_sigma(0.3, ratio) if sigma is None else sigma
    h, w = ms.shape[-2:]
    size = int(np.clip(min(h, w) // 4, 12, 24))
    samples = cut_samples(
        pan.reshape(pan.shape[-2:]), ms, ratio, valid_pan, valid_ms, size, margin_of(ratio, sigma, max_shift)
    )
    return register_samples(samples, ratio, (h, w), sigma=sigma, max_shift=max_shift, least=least)


def register_samples(
    samples: Iterable[Sample],
    ratio: int,
    shape: tuple[int, int],
    *,
    sigma: float | None = None,
    max_shift: int = 8,
    richest: str = "local",
    least: float = LEAST_SHIFT,
) -> Registration:
    """Displacement field of the MS from windows of one scene.

    Args:
        samples: windows with `margin_of` MS pixels of context; only their insides are compared.
        ratio: PAN pixels per MS pixel.
        shape: (h, w) of the frame in MS pixels.
        sigma: blur of the MS against the PAN, PAN pixels; None: a gain of 0.3 at the MS Nyquist frequency.
        max_shift: PAN pixels that are searched on every side.
        richest: the last of `MODELS` that may be taken.
        least: PAN pixels (rms over scene and bands) below which the model is `none`.
    """
    sigma = gain_to_sigma(0.3, ratio) if sigma is None else sigma
    windows = [Window(s, ratio, sigma, max_shift) for s in samples]
    leave_clouds(windows)
    windows = [w for w in windows if w.usable]
    count = windows[0].bands.shape[0] if windows else 1
    none = Registration(
        "none", False, np.zeros((count, 2)), np.zeros((2, 3)), None,
        ((shape[0] * ratio - 1) / 2, (shape[1] * ratio - 1) / 2), max(shape) * ratio / 2,
        (float(shape[0] * ratio), float(shape[1] * ratio)),
    )  # fmt: skip
    best = _fitted(windows, none, richest)
    if best.model == "local":
        # A field does not depend on brightness. What only bright places show is a cloud that drifted.
        leave_bright(windows)
        darker = _fitted([w for w in windows if w.usable], none, richest)
        if darker.model in ("shift", "affine"):
            best = darker
    return replace(best, model="none") if best.size < least else best


def _fitted(windows: list[Window], none: Registration, richest: str) -> Registration:
    """The field that windows support; `none` where they support none."""
    peaks = [p for index, w in enumerate(windows) for p in w.peaks(index)]
    best = consensus(none, peaks, richest)
    if best.model == "none":
        return best
    for turn in range(TURNS):
        votes, step, doubt = _looks(windows, best)
        bands = best.bands + DAMPING * step
        bands = bands - bands.mean(0)
        sure = (np.abs(bands) > BAND_SHIFT) & (np.abs(bands) > 4 * doubt)
        own, had = bool(sure.any()) and richest == "local", best.own_bands
        best = refit(replace(best, own_bands=own, bands=bands if own else 0 * bands), votes, richest, PARTS)
        if best.model == "none" or (turn + 1 >= PLAIN_TURNS + (best.model == "local") and not (own or had)):
            break
    if best.model == "none":
        return best
    share = min(1.0, 2 * best.voters / len(windows)) * best.share
    return replace(best, measured=best.model, confidence=share)


def _looks(windows: list[Window], best: Registration) -> tuple[list[Vote], Array, Array]:
    """Votes about a registration; steps of the bands' own shifts (C, 2) beyond those in it, and their uncertainty."""
    common = replace(best, bands=np.zeros_like(best.bands))
    corners = np.stack([w.corners() for w in windows], 1)
    places = common.pan_places(corners[0], corners[1])
    fields = common.at(places[0], places[1])
    count = len(best.bands)
    votes, parts = [], []
    gram = np.zeros((count + 1, count + 1))
    for index, w in enumerate(windows):
        look = w.sampled(w.spread(places[:, index]))
        x = w.aligned(best.bands).reshape(count, -1)
        explained = None if look is None else w.explained(look, x)
        if look is None or explained is None:
            continue
        votes += w.votes(index, w.spread(fields[:, index]), explained)
        x = np.vstack([x, look[0]])
        parts.append((w, explained.trust, x))
        gram += (x * explained.trust) @ x.T
    step, doubt = np.zeros((count, 2)), np.full((count, 2), math.inf)
    for band in range(count) if count > 1 and parts else ():
        others = [k for k in range(count + 1) if k != band]
        power = gram[np.ix_(others, others)]
        gains = np.linalg.solve(power + np.diag(BAND_RIDGE * power.diagonal() + 1e-30), gram[others, band])
        equations = [w.band_equations(x[band], gains @ x[others], trust) for w, trust, x in parts]
        normal = sum(e[0] for e in equations) + np.eye(2) / BAND_PRIOR**2
        step[band] = np.linalg.solve(normal, sum(e[1] for e in equations))
        doubt[band] = np.sqrt(np.linalg.inv(normal).diagonal())
    return votes, np.clip(step, -0.7, 0.7), doubt
