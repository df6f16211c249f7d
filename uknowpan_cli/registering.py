"""The displacement of an MS against its PAN: measured on the scene, judged, and put into words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from math import ceil, hypot

import numpy as np

from uknowpan.models.registration import LEAST_SHIFT, register_samples
from uknowpan.models.registration.field import Registration
from uknowpan.models.registration.moved import moved_window
from uknowpan.models.registration.windows import Sample, gain_to_sigma, lattice, margin_of
from uknowpan.tiling import ScenePair, TileArrays
from uknowpan.tiling.window import Window

log = logging.getLogger("uknowpan")

MAX_SHIFT = 8
"""PAN pixels that are searched on every side."""

MOST_WINDOWS = 10
"""Windows along each side of the scene."""

NOTICEABLE_SHIFT = 0.5
"""PAN pixels above which a displacement that is left is worth a warning."""

LEAST_LIKENESS = 0.7
"""Multiple correlation of the details of PAN and registered MS below which `auto` leaves a pair alone.

Displaced pairs of one date have 0.88 and more, noisy ones included. NAIP images of other years have 0.44 to 0.59."""

RICHEST = {"check": "local", "global": "affine", "local": "local", "auto": "local"}
"""`--coregister` -> the last of the models that is measured."""


def measured_field(pair: ScenePair, mode: str) -> Registration:
    """The displacement of the MS, measured over the full scene, whatever its bounds."""
    ratio = pair.ratio
    sigma = gain_to_sigma(0.3, ratio)
    windows = _samples(pair, margin_of(ratio, sigma, MAX_SHIFT))
    return register_samples(
        windows, ratio, pair.full_shape, sigma=sigma, max_shift=MAX_SHIFT, richest=RICHEST[mode], least=0.0
    )


def _samples(pair: ScenePair, margin: int) -> Iterator[Sample]:
    size = int(np.clip(min(pair.full_shape) // 4, 12, 24))
    rows, cols = (lattice(n, size, MOST_WINDOWS) for n in pair.full_shape)
    for row in rows:
        for col in cols:
            window = pair.from_scene(Window(row, col, size, size))
            if pair.is_empty(*window):
                continue
            a = pair.read_frame(*window, margin)
            yield Sample(row - margin, col - margin, a.pan[0], a.ms, a.pan_valid, a.ms_valid)


def wanted_field(measured: Registration, mode: str) -> Registration | None:
    """The part of a measured displacement that a mode takes out; None: nothing."""
    if mode == "check" or measured.model == "none":
        return None
    return None if mode == "auto" and measured.size < LEAST_SHIFT else measured


def moved_sample(pair: ScenePair, place: Window, field: Registration) -> TileArrays:
    """A sample of the scene whose PAN lies on the MS, and whose bands lie on each other."""
    margin = ceil(field.bound / pair.ratio) + 2
    a = pair.read_frame(*place, margin)
    row, col = place.row + pair.origin[0] - margin, place.col + pair.origin[1] - margin
    pan, ms, valid = moved_window(field, a.pan[0], a.ms, a.pan_valid, row, col, pair.ratio, margin)
    inner = slice(margin, -margin)
    return replace(a, pan=pan[None], ms=ms, pan_valid=valid, ms_valid=a.ms_valid[inner, inner])


def report(measured: Registration, field: Registration | None, mode: str) -> None:
    """Log what was measured and taken out, and warn of what is left and can be acted on."""
    if measured.model == "none":
        log.info("PAN and MS resemble each other too little to measure how they lie on each other")
        return
    lies = in_words(measured)
    if field is not None:
        log.info("%s off the PAN; %s taken out", lies, _kind(field))
        if mode == "global" and field.residual > NOTICEABLE_SHIFT:
            log.warning("places still differ by %.1f PAN pixels; --coregister local follows them", field.residual)
    elif mode == "auto" and measured.size >= LEAST_SHIFT:
        log.warning(
            "%s off the PAN, but the two resemble each other too little to be sure; check that they show one place "
            "and one date, or take it out with --coregister global",
            lies,
        )
    elif mode == "check" and measured.largest > NOTICEABLE_SHIFT:
        log.warning("%s off the PAN; --coregister auto takes it out", lies)
    else:
        log.info("%s off the PAN and is left there", lies)


def in_words(measured: Registration) -> str:
    """Where the MS lies, for messages."""
    dy, dx = measured.shift
    text = f"the MS lies {dy:+.2f} rows and {dx:+.2f} columns (PAN pixels, + is down and right)"
    if measured.largest > hypot(dy, dx) + 0.1:
        text += f", and up to {measured.largest:.2f} pixels in places,"
    return text


def _kind(field: Registration) -> str:
    name = {"shift": "a shift", "affine": "an affine displacement", "local": "a local displacement"}[field.model]
    return f"{name} and shifts of the bands are" if field.own_bands else f"{name} is"
