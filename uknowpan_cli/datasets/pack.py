"""Gather scenes into one file that training streams from, without a raster library."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import torch

from uknowpan.durable import Scratch
from uknowpan.models.blur import Psf, estimate_psf, pan_on_ms_grid
from uknowpan.models.errors import DataError
from uknowpan.models.training.degradations import sharp_truth
from uknowpan.registering import in_words, moved_truth
from uknowpan.surveying import survey
from uknowpan.tiling import open_pair
from uknowpan.tiling.window import Window

LEAST_SIDE = 16
"""MS pixels along a side below which blur and shift cannot be measured."""


@dataclass(frozen=True)
class PackedScene:
    """One row of a recipe."""

    name: str
    kind: str
    """pair (PAN finer than MS), reduced (PAN on the MS's grid), ms (no PAN); sharp (of a pair)
    and reduced-sharp (of a reduced one): on a grid of twice the MS pixel, the truth as sharp as the PAN."""
    pan: str
    ms: str
    """Several files of one grid are joined by a semicolon."""
    sensor: str
    licence: str
    split: str
    """train, valid, test, or skip (not packed)."""
    weight: float
    nodata: float | None = None
    """Nodata of both rasters where they declare none; the column may be left out."""

    @property
    def ms_files(self) -> list[str]:
        """Rasters of the MS bands, in order."""
        return [path.strip() for path in self.ms.split(";")]

    @property
    def files(self) -> list[str]:
        """All rasters."""
        return [path for path in (self.pan, *self.ms_files) if path]


def read_recipe(path: Path) -> list[PackedScene]:
    """Rows of a recipe, a CSV with the columns of `PackedScene`.

    Raises:
        DataError: no such table, or a row with an unknown kind or split, or a name twice.
    """
    texts = ("name", "kind", "pan", "ms", "sensor", "licence", "split")
    try:
        with open(path, newline="") as file:
            scenes = [
                PackedScene(
                    **{k: row[k] or "" for k in texts},
                    weight=float(row["weight"]),
                    nodata=float(row["nodata"]) if row.get("nodata") else None,
                )
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(f"{path} is no recipe, a CSV with the columns {','.join(texts)},weight: {error}.") from error
    for scene in scenes:
        if any("\0" in file for file in scene.files):
            raise DataError(f"{path}: scene {scene.name!r} names a file with a null character.")
        for word, value, known in (
            ("kind", scene.kind, ("pair", "reduced", "ms", "sharp", "reduced-sharp")),
            ("split", scene.split, ("train", "valid", "test", "skip")),
        ):
            if value not in known:
                raise DataError(f"{path}: {word} of scene {scene.name!r} is {value!r}, not {', '.join(known)}.")
        if not 0 < scene.weight < math.inf:
            raise DataError(f"{path}: weight of scene {scene.name!r} is {scene.weight:g}, not a number above 0.")
        if "/" in scene.name or scene.name == "." or not scene.name.isprintable():
            raise DataError(
                f"{path}: {scene.name!r} cannot name a scene in a file; leave out / and what is not printed."
            )
    names = [scene.name for scene in scenes]
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{path} must hold scenes, each with a name of its own.")
    return scenes


def pack_scenes(recipe: Path, root: Path, output: Path) -> list[str]:
    """Write the scenes file of a recipe.

    The PAN of a pair is resampled to the MS grid by an antialiased cubic. The displacement that `sharpen` would
    take out, and the shift that is left, are removed, so that PAN and truth lie on each other. A scene with
    invalid pixels is cut to its largest rectangle without any. `sharp_truth` makes the truth of kind sharp.

    Args:
        recipe: CSV, see `PackedScene`.
        root: folder that the recipe's paths start from.
        output: the scenes file, written beside its place and renamed.

    Returns:
        One line of measurements per scene.

    Raises:
        DataError: no recipe, or a scene that has hardly a valid pixel, whose files do not lie on
            one grid, or whose PAN and MS do not resemble each other.
        TilingError: see `uknowpan.tiling.open_pair`.
    """
    lines = []
    with Scratch(output) as scratch:
        with h5py.File(scratch.path, "w") as file:
            for scene in read_recipe(recipe):
                if scene.split == "skip":
                    continue
                gt, pan, note = _load(scene, root)
                group = file.create_group(scene.name)
                facts = {name: getattr(scene, name) for name in ("sensor", "licence", "split", "weight")}
                group.attrs.update(facts, note=note)
                for name, image in (("gt", gt), ("pan", pan)):
                    if image is not None:
                        group.create_dataset(name, data=image, compression="gzip", shuffle=True)
                lines.append(f"{scene.name}: gt {gt.shape} {note}")
        scratch.publish()
    return lines


def _load(scene: PackedScene, root: Path) -> tuple[np.ndarray, np.ndarray | None, str]:
    """(gt, PAN on the same grid or None, measurements)"""
    files = [str(root / path) for path in scene.ms_files]
    # The first band stands in for a missing PAN, so that grid and validity are read alike.
    pan, band = (files[0], 1) if scene.kind == "ms" else (str(root / scene.pan), None)
    ratio = None if scene.kind in ("pair", "sharp") else 1
    with open_pair(pan, files, pan_band=band, ratio=ratio, nodata=scene.nodata) as pair:
        if ratio == 1 and not pair.nested:
            raise DataError(
                f"the files of scene {scene.name!r} (kind {scene.kind}) do not lie on one grid: {' '.join(pair.notes)}"
            )
        everything = Window(0, 0, *pair.frame_shape)
        arrays, valid = moved_truth(pair, everything, None)
        field, whole = None, largest_rectangle(valid)
        if whole is not None and pair.ratio > 1:
            field = survey(pair, coregister="auto").field
            arrays, valid = moved_truth(pair, everything, field)
            whole = largest_rectangle(valid)
    ratio, (h, w) = pair.ratio, pair.frame_shape
    if whole is None:
        raise DataError(
            f"of scene {scene.name!r} {valid.mean():.1%} of {h} x {w} MS pixels are valid in all "
            f"files, and no {LEAST_SIDE} x {LEAST_SIDE} of them without a gap; crop or skip it."
        )
    rows, cols = whole
    gt, dtype = arrays.ms[:, rows, cols], np.dtype(pair.meta.dtype)
    gt = gt.astype(dtype) if dtype.kind in "iu" and pair.nested else gt
    part = f", {gt[0].size / valid.size:.1%} of it without invalid pixels" if gt[0].size < h * w else ""
    if scene.kind == "ms":
        return gt, None, f"PAN is synthesised in training{part}"
    reduce = _sharp_truth if "sharp" in scene.kind else _reduced_pan
    gt, reduced, note = reduce(scene, arrays.pan, gt, whole, ratio)
    if field is not None:
        part = f"; {in_words(field)} off the PAN before, taken out{part}"
    digital = np.dtype(pair.pan_meta.dtype).kind in "iu" or float(np.abs(reduced).max()) > 64
    return gt, np.round(reduced * 8) / 8 if digital else reduced, f"ratio {ratio}, {note}{part}"


def _reduced_pan(
    scene: PackedScene, pan: np.ndarray, gt: np.ndarray, window: tuple[slice, slice], ratio: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """(`gt`, PAN on its grid without the shift between the two, measurements)

    `pan` (1, H, W) covers the whole frame, `gt` a window of it in MS pixels.
    """
    whole = torch.from_numpy(pan.astype(np.float32))
    psf = _psf_of(scene, _windowed(pan, window, ratio), gt, ratio)
    reduced = pan_on_ms_grid(whole, ratio, psf.shift)
    return gt, reduced[:, window[0], window[1]].numpy(), _removed(psf)


def _sharp_truth(
    scene: PackedScene, pan: np.ndarray, gt: np.ndarray, window: tuple[slice, slice], ratio: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """(truth, PAN, measurements), see `sharp_truth`; arguments as in `_reduced_pan`."""
    pan = _windowed(pan, window, ratio)
    psf = _psf_of(scene, pan, gt, ratio)
    try:
        fine, truth = (torch.from_numpy(x.astype(np.float32)) for x in (pan, gt))
        truth, fine = sharp_truth(fine, truth, ratio, psf)
    except ValueError as error:
        raise DataError(f"scene {scene.name!r} gives no truth as sharp as its PAN; skip it: {error}.") from error
    return truth.numpy(), fine.numpy(), f"MS blur {psf.sigma / ratio:.2f} MS px, {_removed(psf)}"


def _windowed(pan: np.ndarray, window: tuple[slice, slice], ratio: int) -> np.ndarray:
    """The PAN (1, H, W) of a window in MS pixels."""
    rows, cols = (slice(s.start * ratio, s.stop * ratio) for s in window)
    return pan[:, rows, cols]


def _removed(psf: Psf) -> str:
    return f"PAN/MS shift ({psf.shift[0]:.2f}, {psf.shift[1]:.2f}) PAN px removed, correlation {psf.correlation:.3f}"


def _psf_of(scene: PackedScene, pan: np.ndarray, gt: np.ndarray, ratio: int) -> Psf:
    """Blur and shift of a truth against its PAN; DataError where the two do not resemble each other."""
    fine, truth = (torch.from_numpy(x.astype(np.float32)) for x in (pan, gt))
    psf = estimate_psf([(fine, truth)], ratio)
    if psf.correlation == 0:
        raise DataError(
            f"PAN and MS of scene {scene.name!r} do not resemble each other, so neither can be the "
            "other's truth; check its files, or make it kind ms to do without the PAN."
        )
    return psf


def largest_rectangle(valid: npt.NDArray[np.bool_]) -> tuple[slice, slice] | None:
    """Rows and columns of the largest window of true pixels, at least `LEAST_SIDE` along a side.

    Each row is the base of a histogram of the true pixels above it. A stack of the histogram's
    rising steps gives the largest rectangle below each step.
    """
    best, area = None, 0
    heights = np.zeros(valid.shape[1] + 1, np.int64)  # the last stays 0: it closes every step
    for bottom, row in enumerate(valid, 1):
        heights[:-1] = (heights[:-1] + 1) * row
        steps: list[tuple[int, int]] = []
        for right, height in enumerate(heights.tolist()):
            left = right
            while steps and steps[-1][1] >= height:
                left, tall = steps.pop()
                if tall * (right - left) > area and min(tall, right - left) >= LEAST_SIDE:
                    area = tall * (right - left)
                    best = slice(bottom - tall, bottom), slice(left, right)
            steps.append((left, height))
    return best
