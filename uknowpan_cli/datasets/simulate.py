"""Training files from the user's own scenes by Wald's protocol, in PanCollection's layout.

The MS of a scene becomes the truth, and a pair `ratio` times coarser is made from MS and PAN.
Scenes are read in blocks, so that their size does not matter.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from uknowpan import __version__
from uknowpan.datasets.options import SimulationOptions
from uknowpan.datasets.synthetic import PAN_WEIGHTS, make_scene, write_scene
from uknowpan.models.errors import DataError
from uknowpan.models.metrics.toolbox import imresize
from uknowpan.models.pancollection.protocol import registration_of, wald_lms, wald_margin, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.registration.field import Registration
from uknowpan.models.types import PatchBatch
from uknowpan.registering import moved_truth, outcome
from uknowpan.surveying import survey
from uknowpan.tiling import ScenePair, open_pair
from uknowpan.tiling.window import Window

SPLITS = ("train", "valid", "test")
BLOCK = 512
"""MS pixels along a side that are simulated at once, without margins."""
LARGEST_TEST_PATCH = 256
"""MS pixels, as in PanCollection; several indices need a few windows of 32 pixels within a border."""
BIT_DEPTHS = (8, 10, 11, 12, 14, 16)


@dataclass(frozen=True)
class SceneFiles:
    """A scene: PAN and MS rasters, or MS alone."""

    pan: str | None
    """None: the PAN is a weighted sum of the MS bands."""
    ms: tuple[str, ...]
    """One raster of several bands, or several rasters in the order of their bands."""

    def __str__(self) -> str:
        return " + ".join([*([self.pan] if self.pan else []), *self.ms])


@dataclass(frozen=True)
class SimulatedFile:
    """One written file."""

    path: str
    patches: int
    size: int
    """PAN pixels along a side."""


@dataclass(frozen=True)
class Simulation:
    """Report of a simulation."""

    files: dict[str, SimulatedFile]
    """Files by split; a split with a share of 0 has none."""
    sensor: str
    bands: int
    ratio: int
    max_value: float
    gains: tuple[float, ...]
    left_out: int
    """Patches that touch nodata."""
    notes: tuple[str, ...]


def split_paths(output: Path, split: Sequence[float] = (1, 1, 1)) -> dict[str, Path]:
    """Paths of the splits with a share.

    Each split's name replaces the last "train" in the file name; a name without it gets _train,
    _valid and _test before its extension.
    """
    head, train, tail = output.stem.rpartition("train")
    if not train:
        head, tail = f"{output.stem}_", ""
    return {
        name: output.with_name(f"{head}{name}{tail}{output.suffix}")
        for name, share in zip(SPLITS, split, strict=True)
        if share > 0
    }


def simulate_files(
    scenes: Sequence[SceneFiles], output: Path, options: SimulationOptions, *, names: Sequence[str] | None = None
) -> Simulation:
    """Write the files of `split_paths`; none of them appears before all are complete.

    Args:
        scenes: scenes of the same bands and ratio.
        output: path that `split_paths` starts from; existing files are replaced.
        options: sizes, sensor, shares.
        names: names of the scenes for the files' attribute `sources`; None: their rasters.

    Raises:
        DataError: scenes that do not fit each other or the options, or have no room for patches.
        TilingError: rasters that cannot be read, see `uknowpan.tiling.open_pair`.
    """
    if not scenes:
        raise DataError("No scene was given; name a PAN and an MS, or an MS alone.")
    with ExitStack() as stack:
        opened = [_open(files, options, stack) for files in scenes]
        plan = _plan(opened, options)
        areas = [_areas(scene, plan) for scene in opened]
        plan.sizes["test"] = _test_size(opened, areas, plan)
        writers = {
            name: stack.enter_context(PanCollectionWriter(path))
            for name, path in split_paths(output, options.split).items()
        }
        left_out, largest = 0, 0.0
        for (number, own), (name, writer) in product(enumerate(areas), writers.items()):
            size = plan.sizes[name]
            for places in _blocks(own[name], size, plan.stride if name == "train" else size):
                patches, kept, highest = _simulate(opened[number], places, size, plan)
                left_out += len(places) - len(kept)
                largest = max(largest, highest)
                if patches is not None:
                    writer.append(patches, np.array([(number, *place) for place in kept]))
        for name, writer in writers.items():
            if not writer.count:
                raise DataError(
                    f"No patch of {plan.sizes[name]} valid MS pixels is left for {name}; give "
                    "larger scenes, a smaller --patch, or --split 100,0,0."
                )
        max_value = _full_scale(opened, options, largest)
        notes = tuple(dict.fromkeys(note for scene in opened for note in scene.notes))
        for name, writer in writers.items():
            writer.finish(
                {
                    "sensor": options.optics.name,
                    "max_value": max_value,
                    "ratio": plan.ratio,
                    "registration": registration_of(plan.ratio),
                    "mtf_gains": np.asarray(plan.gains),
                    "split": name,
                    "sources": json.dumps(names or [str(files) for files in scenes]),
                    "areas": json.dumps([own[name] for own in areas]),
                    "notes": json.dumps(notes),
                    "code_version": __version__,
                }
            )
        for writer in writers.values():
            writer.publish()
    files = {name: SimulatedFile(str(writer.path), writer.count, plan.sizes[name]) for name, writer in writers.items()}
    sensor = options.optics.name
    return Simulation(files, sensor, plan.bands, plan.ratio, max_value, plan.gains, left_out, notes)


def simulate_sample(folder: Path) -> Simulation:
    """A tiny data set of drawn scenes: FOLDER/train.h5, valid.h5 and test.h5; the folder is made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    # Shares that make test images large enough for the border that `evaluate` cuts.
    options = SimulationOptions(max_value=2047.0, pan_weights=PAN_WEIGHTS, split=(60.0, 20.0, 20.0))
    with TemporaryDirectory() as drawn:
        truths = [write_scene(make_scene(384, seed=seed), Path(drawn) / str(seed)).truth for seed in (1, 2)]
        scenes = [SceneFiles(None, (str(truth),)) for truth in truths]
        names = [f"drawn scene, seed {seed}" for seed in (1, 2)]
        return simulate_files(scenes, folder / "train.h5", options, names=names)


# ------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class _Scene:
    """An open pair, or an MS with a PAN made from its bands, on the MS grid."""

    files: SceneFiles
    pair: ScenePair
    weights: tuple[float, ...]
    """Share of each band in a PAN made from them."""
    field: Registration | None
    """Displacement of the MS that is taken out."""
    notes: tuple[str, ...]

    @property
    def ratio(self) -> int | None:
        """None where the PAN is made from the bands."""
        return self.pair.ratio if self.files.pan else None

    def is_valid(self, row: int, col: int, size: int) -> bool:
        """Whether no pixel of a square is nodata."""
        return self.pair.valid_fraction(row, col, size, size) == 1.0


def _open(files: SceneFiles, options: SimulationOptions, stack: ExitStack) -> _Scene:
    # An MS alone is a pair with its own first band, which is then not looked at.
    pan, ratio = (files.pan, options.ratio) if files.pan else (f"{files.ms[0]},band=1", 1)
    pair = stack.enter_context(
        open_pair(pan, list(files.ms), ms_bands=options.bidx, nodata=options.nodata, ratio=ratio)
    )
    weights = options.pan_weights or (1 / pair.bands,) * pair.bands
    if files.pan is None and len(weights) != pair.bands:
        raise DataError(f"{len(weights)} PAN weights were given for the {pair.bands} bands of {files}.")
    field, notes = None, list(pair.notes)
    if files.pan is not None and options.coregister != "off":
        overview = survey(pair, coregister=options.coregister)
        field = overview.field
        if overview.displacement is not None:
            level, sentence = outcome(overview.displacement, field, options.coregister)
            notes += [sentence] if field is not None or level > logging.INFO else []
    return _Scene(files, pair, weights, field, tuple(f"{files}: {note}" for note in notes))


# --------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class _Plan:
    """Sizes and gains, the same for all scenes."""

    ratio: int
    bands: int
    gains: tuple[float, ...]
    split: Mapping[str, float]
    sizes: dict[str, int]
    """MS pixels of a patch, by split."""
    stride: int
    """MS pixels between training patches."""


def _plan(scenes: Sequence[_Scene], options: SimulationOptions) -> _Plan:
    """Sizes and gains, checked against the scenes."""
    bands = scenes[0].pair.bands
    ratio = options.ratio or next((s.ratio for s in scenes if s.ratio), options.optics.ratio)
    for scene in scenes:
        if scene.pair.bands != bands:
            raise DataError(
                f"{scene.files} has {scene.pair.bands} bands, {scenes[0].files} has {bands}; scenes of "
                "one file need the same ones (--bidx)."
            )
        if (scene.ratio or ratio) != ratio:
            raise DataError(
                f"{scene.files} has a ratio of {scene.ratio}, other scenes have {ratio}; make one file for each ratio."
            )
    if ratio < 2:
        raise DataError(f"A ratio of {ratio} leaves nothing to simulate; give --ratio from 2 on.")
    patch = options.patch or 64 // ratio * ratio
    stride = options.stride or max(patch * 3 // 4 // ratio, 1) * ratio
    for name, value in (("patch", patch), ("stride", stride), ("test patch", options.test_patch)):
        if value is not None and (value < ratio or value % ratio):
            raise DataError(f"A {name} of {value} pixels is no multiple of the ratio {ratio}.")
    return _Plan(
        ratio=ratio,
        bands=bands,
        gains=_gains(options, bands),
        split=dict(zip(SPLITS, options.split, strict=True)),
        sizes={"train": patch, "valid": patch, "test": options.test_patch or 0},
        stride=stride,
    )


def _gains(options: SimulationOptions, bands: int) -> tuple[float, ...]:
    if options.mtf is None:
        try:
            return options.optics.for_bands(bands).mtf_ms
        except ValueError as error:
            raise DataError(f"{error}.") from error
    if len(options.mtf) not in (1, bands):
        raise DataError(
            f"{len(options.mtf)} MTF gains were given for {bands} bands; give one per band, or one for all."
        )
    gains: tuple[float, ...] = options.mtf * (bands if len(options.mtf) == 1 else 1)
    return gains


def _full_scale(scenes: Sequence[_Scene], options: SimulationOptions, largest: float) -> float:
    """The option, the sensor's full scale, or the smallest bit depth that holds the largest value."""
    if options.max_value is not None:
        return options.max_value
    known = options.optics.max_value
    if known is not None:
        if largest > known:
            raise DataError(
                f"Values reach {largest:g}, beyond the {known:g} of {options.optics.name}; give "
                "their full scale with --max-value."
            )
        return known
    integer = all(np.dtype(scene.pair.meta.dtype).kind in "iu" for scene in scenes)
    depths = [2.0**bits - 1 for bits in BIT_DEPTHS if 2.0**bits - 1 >= largest]
    if not integer or not depths:
        raise DataError(f"The full scale of these values (up to {largest:g}) is not known; give --max-value.")
    return depths[0]


# -------------------------------------------------------------------------------------- areas

Area = tuple[int, int, int, int]
"""(row, column, height, width) in MS pixels"""


def _areas(scene: _Scene, plan: _Plan) -> dict[str, Area]:
    """Contiguous parts of a scene, one per split, without a common pixel.

    Training has the beginning of the longer axis; the rest is divided along the shorter one.
    Shares count the cells, as large as a patch, without nodata.
    """
    cell = plan.sizes["train"]
    h, w = scene.pair.frame_shape
    rows, columns = h // cell, w // cell
    cells = product(range(0, rows * cell, cell), range(0, columns * cell, cell))
    valid = np.array([scene.is_valid(*place, cell) for place in cells], dtype=bool).reshape(rows, columns)
    upright = h >= w
    parts = split_cells(valid if upright else valid.T, plan.split)
    if parts is None:
        wanted = " and ".join(name for name in SPLITS if plan.split[name] > 0)
        raise DataError(
            f"{scene.files} has no room for {wanted} apart: {int(valid.sum())} patches of {cell} "
            f"pixels without nodata in {h} x {w} MS pixels; give a larger scene, a smaller --patch, or --split 100,0,0."
        )

    areas = {}
    for name, spans in parts.items():
        (top, bottom), (left, right) = spans if upright else spans[::-1]
        # The last part has the pixels that are left over.
        end, edge = (h if bottom == rows else bottom * cell), (w if right == columns else right * cell)
        areas[name] = (top * cell, left * cell, end - top * cell, edge - left * cell)
    return areas


Span = tuple[int, int]


def split_cells(valid: np.ndarray, shares: Mapping[str, float]) -> dict[str, tuple[Span, Span]] | None:
    """Spans (rows, columns) of a grid of cells for each split with a share.

    They come as near to the shares as can be when each has a valid cell. None: there is no such cut.
    """
    n, m = valid.shape
    held = [name for name in SPLITS[1:] if shares[name] > 0]
    if not held:
        return {"train": ((0, n), (0, m))} if valid.any() else None
    wanted = sum(shares[name] for name in held) / sum(shares.values()) * valid.sum()
    best: dict[str, tuple[Span, Span]] | None = None
    off = np.inf
    for cut in range(1, n):
        rest = valid[cut:]
        spans = _divide(rest.sum(0), [shares[name] for name in held])
        if spans is not None and valid[:cut].any() and abs(rest.sum() - wanted) < off:
            off = abs(rest.sum() - wanted)
            best = {"train": ((0, cut), (0, m)), **{name: ((cut, n), s) for name, s in zip(held, spans, strict=True)}}
    return best


def _divide(counts: np.ndarray, shares: Sequence[float]) -> list[Span] | None:
    """The axis in one or two parts, none of them empty, as near to the shares as can be."""
    m = len(counts)
    if len(shares) == 1:
        return [(0, m)] if counts.any() else None
    before = np.cumsum(counts)[:-1]
    possible = np.nonzero((before > 0) & (before < counts.sum()))[0]
    if not len(possible):
        return None
    ideal = shares[0] / sum(shares) * counts.sum()
    cut = int(possible[np.abs(before[possible] - ideal).argmin()]) + 1
    return [(0, cut), (cut, m)]


def _test_size(scenes: Sequence[_Scene], areas: Sequence[Mapping[str, Area]], plan: _Plan) -> int:
    """The largest size up to `LARGEST_TEST_PATCH` at which there is a valid test patch."""
    patch = plan.sizes["train"]
    if plan.sizes["test"] or plan.split["test"] == 0:
        return plan.sizes["test"] or patch
    for size in range(max(LARGEST_TEST_PATCH // patch, 1) * patch, patch, -patch):
        for scene, own in zip(scenes, areas, strict=True):
            if any(scene.is_valid(*place, size) for block in _blocks(own["test"], size, size) for place in block):
                return size
    return patch


# ------------------------------------------------------------------------------------ patches

Place = tuple[int, int]
"""Row and column of a patch in the scene, MS pixels."""


def _blocks(area: Area, size: int, stride: int) -> Iterator[list[Place]]:
    """Places of the patches of an area, grouped so that each group lies within `BLOCK` (or one patch)."""
    row, column, h, w = area
    for rows in _groups(row, h, size, stride):
        for columns in _groups(column, w, size, stride):
            yield [(r, c) for r in rows for c in columns]


def _groups(origin: int, length: int, size: int, stride: int) -> Iterator[range]:
    starts = range(origin, origin + length - size + 1, stride)
    step = max(BLOCK - size, 0) // stride + 1
    return (starts[i : i + step] for i in range(0, len(starts), step))


def _simulate(
    scene: _Scene, places: Sequence[Place], size: int, plan: _Plan
) -> tuple[PatchBatch | None, list[Place], float]:
    """(valid patches of a block, their places, its largest value in DN)

    The block holds all places and the margin that filters see. It ends where the scene ends, so that the toolbox's
    own border rules act there.
    """
    ratio = plan.ratio
    margin = wald_margin(ratio) * ratio
    ends = [n // ratio * ratio for n in scene.pair.frame_shape]
    top, left = (max(min(p[i] for p in places) - margin, 0) for i in (0, 1))
    bottom, right = (min(max(p[i] for p in places) + size + margin, ends[i]) for i in (0, 1))
    h, w = bottom - top, right - left
    arrays, valid = moved_truth(scene.pair, Window(top, left, h, w), scene.field)
    largest = float(arrays.ms[:, arrays.ms_valid].max(initial=0))
    if scene.files.pan is not None:
        largest = max(largest, float(arrays.pan[0, arrays.pan_valid].max(initial=0)))
    gt = torch.from_numpy(arrays.ms)
    pan = _reduced_pan(scene, arrays.pan, gt)
    ms = wald_ms(gt, plan.gains, ratio)
    lms = wald_lms(ms, ratio)

    def window(row: int, column: int, step: int = 1) -> tuple[slice, slice]:
        y, x, n = (row - top) // step, (column - left) // step, size // step
        return slice(y, y + n), slice(x, x + n)

    def stack(x: Tensor, step: int = 1) -> Tensor:
        return torch.stack([x[(..., *window(*place, step))] for place in kept]).float()

    kept = [place for place in places if valid[window(*place)].all()]
    patches = PatchBatch(pan=stack(pan), ms=stack(ms, ratio), lms=stack(lms), gt=stack(gt)) if kept else None
    return patches, kept, largest


def _reduced_pan(scene: _Scene, pan: np.ndarray, gt: Tensor) -> Tensor:
    """float64 (1, h, w): the PAN (1, H, W), or the weighted sum of the bands, on the MS grid."""
    if scene.files.pan is None:
        return torch.einsum("c,chw->hw", torch.tensor(scene.weights, dtype=torch.float64), gt.double())[None]
    return imresize(torch.from_numpy(pan), scene.pair.ratio)
