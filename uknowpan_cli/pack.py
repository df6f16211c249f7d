"""`uknowpan pack`: gather scenes into one file that training streams from (no raster library
needed where it trains)."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

from uknowpan_models.errors import DataError

__all__ = ["PackedScene", "pack_scenes", "read_recipe"]


@dataclass(frozen=True)
class PackedScene:
    """One row of a recipe."""

    name: str
    kind: str
    """pair (PAN finer than MS), reduced (PAN on the MS's grid), ms (no PAN)."""
    pan: str
    ms: str
    """Several files of one grid are joined by a semicolon."""
    sensor: str
    licence: str
    split: str
    weight: float

    @property
    def files(self) -> list[str]:
        """All of its rasters."""
        return [path for path in (self.pan, *self.ms.split(";")) if path]


def read_recipe(path: Path) -> list[PackedScene]:
    """Rows of a recipe (CSV with the columns of `PackedScene`).

    Raises:
        DataError: no such table, or a row that makes no sense.
    """
    texts = ("name", "kind", "pan", "ms", "sensor", "licence", "split")
    try:
        with open(path, newline="") as file:
            scenes = [
                PackedScene(**{k: row[k] or "" for k in texts}, weight=float(row["weight"]))
                for row in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"{path} is no recipe, a CSV with the columns {','.join(texts)},weight: {error}."
        ) from error
    for scene in scenes:
        for word, value, known in (
            ("kind", scene.kind, ("pair", "reduced", "ms")),
            ("split", scene.split, ("train", "valid")),
        ):
            if value not in known:
                raise DataError(
                    f"{path}: {word} of scene {scene.name!r} is {value!r}, not {', '.join(known)}."
                )
    names = [scene.name for scene in scenes]
    if not names or "" in names or len(set(names)) < len(names):
        raise DataError(f"{path} must hold scenes, each with a name of its own.")
    return scenes


def pack_scenes(recipe: Path, root: Path, output: Path) -> list[str]:
    """Write the scenes file of a recipe.

    The PAN of a pair is brought onto the MS grid by an antialiased cubic at ratio : 1, moved by
    the shift that the pair itself shows, so that truth and PAN lie on each other.

    Args:
        recipe: CSV, see `PackedScene`.
        root: folder that the recipe's paths start from.
        output: the scenes file; written beside itself and renamed.

    Returns:
        One line per scene: what was measured.

    Raises:
        DataError, TilingError: see `read_recipe`, `uknowpan_tiling.open_pair`.
    """
    import h5py

    lines = []
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with h5py.File(temporary, "w") as file:
            for scene in read_recipe(recipe):
                gt, pan, note = _load(scene, root)
                group = file.create_group(scene.name)
                group.attrs.update(
                    sensor=scene.sensor,
                    licence=scene.licence,
                    split=scene.split,
                    weight=scene.weight,
                    note=note,
                )
                group.create_dataset("gt", data=gt, compression="gzip", shuffle=True)
                if pan is not None:
                    group.create_dataset("pan", data=pan, compression="gzip", shuffle=True)
                lines.append(f"{scene.name}: gt {gt.shape} {note}")
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return lines


def _load(scene: PackedScene, root: Path) -> tuple[np.ndarray, np.ndarray | None, str]:
    """(gt, PAN on the same grid or None, what was measured)."""
    import torch

    from uknowpan_models.psf import estimate_psf
    from uknowpan_models.resample import cubic, decimate
    from uknowpan_tiling import open_pair

    files = [str(root / path) for path in scene.ms.split(";")]
    if scene.kind == "ms":
        return _read(files[0]), None, "PAN is synthesised in training"
    if scene.kind == "reduced":
        gt, pan, ratio = _read(files[0]), _read(str(root / scene.pan)), 1
    else:
        with open_pair(str(root / scene.pan), files) as pair:
            arrays = pair.read_frame(0, 0, *pair.frame_shape)
            gt, pan, ratio = arrays.ms, arrays.pan, pair.ratio
            # Rows and columns of the frame that the PAN sticks out of the MS are of no use.
            rows, cols = arrays.ms_valid.any(1).sum(), arrays.ms_valid.any(0).sum()
            gt, pan = gt[:, :rows, :cols], pan[:, : rows * ratio, : cols * ratio]
            dtype = np.dtype(pair.meta.dtype)
            gt = gt.astype(dtype) if dtype.kind in "iu" and pair.nested else gt
    found = torch.from_numpy(pan.astype(np.float32))
    psf = estimate_psf([(found, torch.from_numpy(gt.astype(np.float32)))], ratio)
    reduced = decimate(found[None], ratio, cubic(ratio), psf.shift, 6)[0]
    note = (
        f"ratio {ratio}, PAN/MS shift ({psf.shift[0]:.2f}, {psf.shift[1]:.2f}) PAN px removed, "
        f"correlation {psf.correlation:.3f}"
    )
    digital = pan.dtype.kind in "iu" or float(np.abs(pan).max()) > 64
    return gt, np.round(reduced.numpy() * 8) / 8 if digital else reduced.numpy(), note


def _read(path: str) -> np.ndarray:
    with rasterio.open(path) as dataset:
        values = dataset.read()
    return values.astype(np.float32) if values.dtype.kind == "f" else values
