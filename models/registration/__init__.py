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

from uknowpan.models.blur import gain_to_sigma
from uknowpan.models.registration.consensus import consensus, refit
from uknowpan.models.registration.field import Array, Registration
from uknowpan.models.registration.samples import (
    Bools,
    Sample,
    margin_of,
    pixels_of,
    whole_sample,
)
from uknowpan.models.registration.windows import PARTS, Windows

LEAST_SHIFT = 0.3
"""PAN pixels (rms over scene and bands) below which a displacement is left alone."""
BAND_SHIFT = 0.25
"""PAN pixels by which a band must lie off the others to have a shift of its own."""
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
    margin = margin_of(ratio, sigma, max_shift)
    sample = whole_sample(pan.reshape(pan.shape[-2:]), ms, ratio, valid_pan, valid_ms, size, margin)
    return register_samples([sample], ratio, (h, w), sigma=sigma, max_shift=max_shift, least=least)


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
    margin = margin_of(ratio, sigma, max_shift)
    pixels = pixels_of(samples, ratio, sigma, margin, rim=min(margin, math.ceil(max_shift / ratio) + 1))
    none = Registration(
        "none", False, np.zeros((1 if pixels is None else pixels.ms.shape[1], 2)), np.zeros((2, 3)), None,
        ((shape[0] * ratio - 1) / 2, (shape[1] * ratio - 1) / 2), max(shape) * ratio / 2,
        (float(shape[0] * ratio), float(shape[1] * ratio)),
    )  # fmt: skip
    if pixels is None:
        return none
    windows = Windows(pixels, ratio, max_shift).without_clouds()
    best = _fitted(windows, none, richest)
    if best.model == "local":
        # A field does not depend on brightness. What only bright places show is a cloud that drifted.
        darker = _fitted(windows.without_bright(), none, richest)
        if darker.model in ("shift", "affine"):
            best = darker
    return replace(best, model="none") if best.size < least else best


def _fitted(windows: Windows, none: Registration, richest: str) -> Registration:
    """The field that windows support; `none` where they support none."""
    best = consensus(none, windows.peaks(), richest) if len(windows) else none
    if best.model == "none":
        return best
    corners = windows.corners()
    for turn in range(TURNS):
        common = replace(best, bands=np.zeros_like(best.bands))
        places = common.pan_places(*corners)
        look = windows.look(windows.spread(places), best.bands)
        if look is None:
            return none
        step, doubt = windows.band_steps(look)
        bands = best.bands + DAMPING * step
        bands = bands - bands.mean(0)
        sure = (np.abs(bands) > BAND_SHIFT) & (np.abs(bands) > 4 * doubt)
        own, had = bool(sure.any()) and richest == "local", best.own_bands
        votes = windows.votes(look, windows.spread(common.at(*places)))
        best = refit(replace(best, own_bands=own, bands=bands if own else 0 * bands), votes, richest, PARTS)
        if best.model == "none" or (turn + 1 >= PLAIN_TURNS + (best.model == "local") and not (own or had)):
            break
    if best.model == "none":
        return best
    share = min(1.0, 2 * best.voters / len(windows)) * best.share
    return replace(best, measured=best.model, confidence=share)
