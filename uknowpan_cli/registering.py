"""The displacement of an MS against its PAN: measured on the scene, judged, and put into words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from math import ceil, hypot
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine

from uknowpan.durable import Scratch
from uknowpan.files import check_outputs
from uknowpan.models.blur import Psf, gain_to_sigma
from uknowpan.models.registration import LEAST_SHIFT, register_samples
from uknowpan.models.registration.field import Registration
from uknowpan.models.registration.moved import moved_window
from uknowpan.models.registration.samples import Sample, margin_of, starts
from uknowpan.tiling import ScenePair, TileArrays
from uknowpan.tiling.window import Window

log = logging.getLogger("uknowpan")

Bools = npt.NDArray[np.bool_]

MAX_SHIFT = 8
"""PAN pixels that are searched on every side."""

ROWS = 512
"""MS rows of a field that are written at once."""

ARROWS = 14
"""Arrows along the longer side of a picture."""

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
    """Windows all over the scene: of one read where they overlap so much that it is the smaller one."""
    (h, w), size = pair.full_shape, int(np.clip(min(pair.full_shape) // 4, 12, 24))
    places = [(row, col) for row in starts(h, size, MOST_WINDOWS) for col in starts(w, size, MOST_WINDOWS)]
    if (h + 2 * margin) * (w + 2 * margin) < len(places) * (size + 2 * margin) ** 2:
        a = pair.read_frame(*pair.from_scene(Window(0, 0, h, w)), margin)
        yield Sample(-margin, -margin, a.pan[0], a.ms, a.pan_valid, a.ms_valid, places, size)
        return
    for row, col in places:
        window = pair.from_scene(Window(row, col, size, size))
        if not pair.is_empty(*window):
            a = pair.read_frame(*window, margin)
            yield Sample(row - margin, col - margin, a.pan[0], a.ms, a.pan_valid, a.ms_valid)


def wanted_field(measured: Registration, mode: str) -> Registration | None:
    """The part of a measured displacement that a mode takes out; None: nothing."""
    if mode == "check" or measured.model == "none":
        return None
    return None if mode == "auto" and measured.size < LEAST_SHIFT else measured


def deceived(measured: Registration | None, psf: Psf) -> bool:
    """Whether the shift that goes with the blur is not that of the ground: a cloud that drifted decides it."""
    if measured is None or measured.model == "none":
        return False
    return hypot(*(a + b for a, b in zip(measured.shift, psf.shift, strict=True))) > NOTICEABLE_SHIFT


def moved_sample(pair: ScenePair, place: Window, field: Registration) -> TileArrays:
    """A part of the scene whose PAN lies on the MS, and whose bands lie on each other: for moments and truths."""
    margin = ceil(field.bound / pair.ratio) + 2
    a = pair.read_frame(*place, margin)
    row, col = place.row + pair.origin[0] - margin, place.col + pair.origin[1] - margin
    pan, ms, valid = moved_window(field, a.pan[0], a.ms, a.pan_valid, row, col, pair.ratio, margin)
    inner = slice(margin, -margin)
    return replace(a, pan=pan[None], ms=ms, pan_valid=valid, ms_valid=a.ms_valid[inner, inner])


def moved_truth(pair: ScenePair, place: Window, field: Registration | None) -> tuple[TileArrays, Bools]:
    """A part of the scene as a truth and its PAN, and which of its MS pixels (h, w) are valid with all of their PAN.

    At the border of the scene, as far as the displacement reaches, the PAN is mirrored and counts as valid.
    """

    def seen(a: TileArrays) -> Bools:
        whole: Bools = np.all(a.pan_valid.reshape(place.height, pair.ratio, place.width, pair.ratio), axis=(1, 3))
        return whole

    arrays = pair.read_frame(*place)
    valid = arrays.ms_valid & seen(arrays)
    if field is None:
        return arrays, valid
    moved, reach = moved_sample(pair, place, field), ceil(field.bound / pair.ratio)
    inner = np.zeros(pair.frame_shape, bool)
    inner[reach:-reach, reach:-reach] = True
    rows, cols = slice(place.row, place.row + place.height), slice(place.col, place.col + place.width)
    if field.own_bands and np.dtype(pair.meta.dtype).kind in "iu":
        limits = np.iinfo(pair.meta.dtype)
        moved = replace(moved, ms=np.rint(moved.ms).clip(limits.min, limits.max))
    return moved, valid & (seen(moved) | ~inner[rows, cols])


def report(measured: Registration, field: Registration | None, mode: str) -> None:
    """Log what was measured and taken out, and warn of what is left and can be acted on."""
    level, sentence = outcome(measured, field, mode)
    log.log(level, "%s", sentence)
    if mode == "global" and field is not None and field.residual > NOTICEABLE_SHIFT:
        log.warning("places still differ by %.1f PAN pixels; --coregister local follows them", field.residual)


def outcome(measured: Registration, field: Registration | None, mode: str) -> tuple[int, str]:
    """The displacement that was measured and taken out, as the level and the sentence of a log."""
    if measured.model == "none":
        return logging.INFO, "PAN and MS resemble each other too little to measure how they lie on each other"
    lies = f"{in_words(measured)} off the PAN"
    if field is not None:
        return logging.INFO, f"{lies}; {_kind(field)} taken out"
    if mode == "auto" and measured.size >= LEAST_SHIFT:
        return logging.WARNING, (
            f"{lies}, but the two resemble each other too little to be sure; check that they show one place "
            "and one date, or take it out with --coregister global"
        )
    if mode == "check" and measured.largest > NOTICEABLE_SHIFT:
        return logging.WARNING, f"{lies}; --coregister auto takes it out"
    return logging.INFO, f"{lies} and is left there"


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


def write_field(pair: ScenePair, field: Registration, path: str) -> None:
    """Write a displacement as a GeoTIFF, float32 in PAN pixels, one value for each MS pixel of the frame.

    Bands: down and right; where bands of the MS have displacements of their own, those two for each. Arrows are drawn
    beside it, in a PNG of the same name.

    Raises:
        OutputError: a file exists, or is an input.
    """
    from uknowpan.pictures import quiver, write_png

    picture = str(Path(path).with_suffix(".png"))
    check_outputs({"--displacement": path, "its picture": picture}, pair.inputs, overwrite=None)
    ratio, (height, width) = pair.ratio, pair.frame_shape
    corner = Affine.translation(-pair.offset[1], -pair.offset[0]) @ Affine.scale(ratio)
    bands: list[int | None] = list(range(pair.bands)) if field.own_bands else [None]
    cols = (pair.origin[1] + np.arange(width, dtype=float)) * ratio + (ratio - 1) / 2
    with Scratch(path) as scratch:
        with rasterio.open(
            scratch.path, "w", driver="GTiff", dtype="float32", count=2 * len(bands), height=height, width=width,
            crs=pair.grid.crs, transform=pair.grid.transform @ corner, compress="deflate", bigtiff="IF_SAFER",
        ) as dataset:  # fmt: skip
            for top in range(0, height, ROWS):
                count = min(ROWS, height - top)
                rows = (pair.origin[0] + top + np.arange(count, dtype=float)) * ratio + (ratio - 1) / 2
                values = np.concatenate([field.at(rows[:, None], cols[None, :], band) for band in bands])
                window = rasterio.windows.Window(0, top, width, count)
                dataset.write(values.astype(np.float32), window=window)
            for k, band in enumerate(bands):
                of = "" if band is None else f" of band {band + 1}"
                dataset.set_band_description(2 * k + 1, f"down{of}, PAN pixels")
                dataset.set_band_description(2 * k + 2, f"right{of}, PAN pixels")
            dataset.update_tags(UKNOWPAN_REGISTRATION=field.model)
        scratch.publish()
    counts = (max(2, round(ARROWS * n / max(height, width))) for n in (height, width))
    down, across = (
        (o + (np.arange(k) + 0.5) / k * n) * ratio for o, k, n in zip(pair.origin, counts, (height, width), strict=True)
    )
    write_png(picture, quiver(np.stack([field.at(down[:, None], across[None, :], band) for band in bands])))
