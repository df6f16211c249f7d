"""Training files from the user's own scenes by Wald's protocol, in PanCollection's layout.

The MS of a scene becomes the truth, and a pair `ratio` times coarser is made from MS and PAN.
Scenes are read in blocks, so that their size does not matter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np

from uknowpan import __version__
from uknowpan.models.errors import DataError
from uknowpan.models.metrics.sensors import Sensor, find_sensor
from uknowpan.models.pancollection.file import PatchBatch, is_full_scale
from uknowpan.models.pancollection.protocol import registration_of, wald_lms, wald_margin, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.opening import NOTICEABLE_SHIFT
from uknowpan.options import Coregister

if TYPE_CHECKING:
    from types import TracebackType

    from torch import Tensor

    from uknowpan.tiling import ScenePair


SPLITS = ("train", "valid", "test")
BLOCK = 512
"""MS pixels along a side that are simulated at a time, without margins."""
LARGEST_TEST_PATCH = 256
"""As in PanCollection; several indices need a few windows of 32 pixels inside of a border."""
BIT_DEPTHS = (8, 10, 11, 12, 14, 16)


@dataclass(frozen=True)
class SceneFiles:
    """A scene: PAN and MS rasters, or MS alone."""

    pan: str | None
    """None: the PAN is a weighted sum of the MS bands."""
    ms: tuple[str, ...]
    """One multi-band raster, or several whose bands follow each other."""

    def __str__(self) -> str:
        return " + ".join([*([self.pan] if self.pan else []), *self.ms])


@dataclass(frozen=True)
class SimulationOptions:
    """How scenes become patches; sizes in MS pixels, which are the PAN pixels of the patches."""

    sensor: Sensor
    gains: tuple[float, ...] | None = None
    """MTF gains per band (or one for all) instead of the sensor's."""
    max_value: float | None = None
    """Full scale in DN instead of the sensor's."""
    pan_weights: tuple[float, ...] | None = None
    """Of the bands in the PAN of scenes that have none; None: equal."""
    ratio: int | None = None
    """None: that of the pairs, else the sensor's."""
    bands: tuple[int, ...] | None = None
    """MS bands to use, 1-based."""
    nodata: float | None = None
    coregister: Coregister = Coregister.check
    """Of pairs: leave the shift between PAN and MS, note it, or take the PAN where the MS lies."""
    patch: int | None = None
    """None: 64, or the next multiple of the ratio below."""
    stride: int | None = None
    """Between training patches; None: three quarters of a patch. Others do not overlap."""
    test_patch: int | None = None
    """None: the largest multiple of `patch` up to 256 that the test area has room for."""
    split: tuple[float, float, float] = (80.0, 10.0, 10.0)
    """Shares of the area for training, validation and test."""

    def __post_init__(self) -> None:
        if min(self.split) < 0 or not self.split[0] > 0:
            raise ValueError(f"a split of {self.split} leaves nothing to train on")
        if self.max_value is not None and not is_full_scale(self.max_value):
            raise ValueError(f"a full scale of {self.max_value:g} is not within 1e-9 to 1e12")
        if self.gains is not None and not all(0 < gain < 1 for gain in self.gains):
            raise ValueError(f"MTF gains lie between 0 and 1, not at {list(self.gains)}")
        if self.pan_weights is not None and not sum(self.pan_weights) > 0:
            raise ValueError(f"PAN weights of {list(self.pan_weights)} leave no PAN")


@dataclass(frozen=True)
class SimulatedFile:
    """One file that was written."""

    path: str
    patches: int
    size: int
    """PAN pixels along a side."""


@dataclass(frozen=True)
class Simulation:
    """What was made of the scenes."""

    files: dict[str, SimulatedFile]
    """By split; splits with a share of 0 are not there."""
    sensor: str
    bands: int
    ratio: int
    max_value: float
    gains: tuple[float, ...]
    left_out: int
    """Patches that touch nodata."""
    notes: tuple[str, ...]


def split_paths(output: Path, split: Sequence[float] = (1, 1, 1)) -> dict[str, Path]:
    """Files of the splits with a share: the last "train" in the name is replaced by each split's
    name; a name without it gets _train, _valid and _test before its extension."""
    head, found, tail = output.stem.rpartition("train")
    if not found:
        head, tail = f"{output.stem}_", ""
    return {
        name: output.with_name(f"{head}{name}{tail}{output.suffix}")
        for name, share in zip(SPLITS, split, strict=True)
        if share > 0
    }


def simulate_files(
    scenes: Sequence[SceneFiles],
    output: Path,
    options: SimulationOptions,
    *,
    names: Sequence[str] | None = None,
) -> Simulation:
    """Write the files of `split_paths`; none of them appears before all are complete.

    Args:
        scenes: of the same bands and ratio.
        output: where to, existing files are replaced.
        options: how.
        names: of the scenes, for the files' attribute `sources`; None: their rasters.

    Raises:
        DataError: scenes that do not fit each other or the options, or have no room for patches.
        TilingError: rasters that cannot be read, see `uknowpan.tiling.open_pair`.
    """
    if not scenes:
        raise DataError("No scene was given; name a PAN and an MS, or an MS alone.")
    with ExitStack() as stack:
        opened = [stack.enter_context(_Scene(files, options)) for files in scenes]
        plan = _plan(opened, options)
        areas = [_areas(scene, plan) for scene in opened]
        plan = replace(plan, sizes={**plan.sizes, "test": _test_size(opened, areas, plan)})
        writers = {
            name: stack.enter_context(PanCollectionWriter(path))
            for name, path in split_paths(output, options.split).items()
        }
        left_out, largest = 0, 0.0
        for number, (scene, own) in enumerate(zip(opened, areas, strict=True)):
            for name, writer in writers.items():
                if name not in own:
                    continue
                for made in _patches(scene, own[name], name, plan):
                    left_out += made.left_out
                    largest = max(largest, made.largest)
                    if made.patches is not None:
                        source = np.full((len(made.places), 1), number)
                        writer.append(made.patches, np.hstack([source, made.places]))
        empty = [name for name, writer in writers.items() if not writer.count]
        if empty:
            raise DataError(
                f"No patch of {plan.sizes[empty[0]]} valid MS pixels is left for {empty[0]}; give "
                "larger scenes, a smaller --patch, or --split 100,0,0."
            )
        max_value = _full_scale(opened, options, largest)
        notes = tuple(dict.fromkeys(note for scene in opened for note in scene.notes))
        said = list(names) if names is not None else [str(files) for files in scenes]
        for name, writer in writers.items():
            writer.finish(
                {
                    "sensor": options.sensor.name,
                    "max_value": max_value,
                    "ratio": plan.ratio,
                    "registration": registration_of(plan.ratio),
                    "mtf_gains": np.asarray(plan.gains),
                    "split": name,
                    "sources": json.dumps(said),
                    "areas": json.dumps([own.get(name) for own in areas]),
                    "notes": json.dumps(notes),
                    "code_version": __version__,
                }
            )
        for writer in writers.values():
            writer.publish()
    files = {name: SimulatedFile(str(writer.path), writer.count, plan.sizes[name]) for name, writer in writers.items()}
    return Simulation(
        files,
        options.sensor.name,
        plan.bands,
        plan.ratio,
        max_value,
        plan.gains,
        left_out,
        notes,
    )


def simulate_sample(folder: Path) -> Simulation:
    """A tiny data set of drawn scenes: FOLDER/train.h5, valid.h5 and test.h5; the folder is made if need be."""
    from uknowpan.datasets.synthetic import PAN_WEIGHTS, make_scene, write_scene

    folder.mkdir(parents=True, exist_ok=True)
    options = SimulationOptions(
        find_sensor("generic"),
        max_value=2047.0,
        pan_weights=PAN_WEIGHTS,
        split=(60.0, 20.0, 20.0),  # test images large enough for the border that `evaluate` cuts
    )
    seeds = (1, 2)
    with TemporaryDirectory() as drawn:
        scenes = []
        for seed in seeds:
            paths = write_scene(make_scene(384, seed=seed), Path(drawn) / str(seed))
            scenes.append(SceneFiles(None, (str(paths.truth),)))
        names = [f"drawn scene, seed {seed}" for seed in seeds]
        return simulate_files(scenes, folder / "train.h5", options, names=names)


# ------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class _Block:
    """A part of a scene on the grid of its MS."""

    gt: Tensor
    """(C, h, w) float32"""
    pan: Tensor
    """(1, h, w) float64, reduced to the MS grid"""
    valid: np.ndarray
    """(h, w)"""
    largest: float
    """DN, of valid MS and PAN pixels"""


class _Scene:
    """A pair, or an MS with a PAN made from its bands, read on the MS grid."""

    def __init__(self, files: SceneFiles, options: SimulationOptions):
        from uknowpan.tiling import open_pair

        # An MS alone is a pair with its own first band, which is then not looked at.
        self.pair: ScenePair = open_pair(
            files.pan or f"{files.ms[0]},band=1",
            list(files.ms),
            ms_bands=options.bands,
            nodata=options.nodata,
            ratio=options.ratio if files.pan else 1,
        )
        self.files = files
        self.notes = [f"{files}: {note}" for note in self.pair.notes]
        self.bands = self.pair.bands
        self.shape = self.pair.frame_shape
        self.ratio = self.pair.ratio if files.pan else None
        weights = options.pan_weights or (1 / self.bands,) * self.bands
        if files.pan is None and len(weights) != self.bands:
            self.pair.close()
            raise DataError(f"{len(weights)} PAN weights were given for the {self.bands} bands of {files}.")
        self.weights = weights
        self.shift = (0.0, 0.0)
        if files.pan is not None and options.coregister is not Coregister.off:
            try:
                self._measure_shift(options.coregister)
            except BaseException:
                self.pair.close()
                raise

    def _measure_shift(self, mode: Coregister) -> None:
        """Keep the shift that is to be removed, in PAN pixels, or note it."""
        from uknowpan.sharpening import survey

        found = survey(self.pair).measured
        if found is None:
            self.notes.append(f"{self.files}: PAN and MS resemble each other too little to measure a shift")
        elif max(map(abs, found.shift)) > NOTICEABLE_SHIFT or mode is Coregister.shift:
            dy, dx = (-value for value in found.shift)
            lies = f"the MS lies {dy:+.2f} rows and {dx:+.2f} columns (PAN pixels) off the PAN"
            if mode is Coregister.shift:
                self.shift = found.shift
                self.notes.append(f"{self.files}: {lies}; removed")
            else:
                self.notes.append(f"{self.files}: {lies}; --coregister shift removes it")

    def is_valid(self, row: int, col: int, size: int) -> bool:
        return self.pair.valid_fraction(row, col, size, size) == 1.0

    def read(self, row: int, col: int, h: int, w: int) -> _Block:
        import torch

        from uknowpan.models.metrics.toolbox import imresize
        from uknowpan.models.resample import cubic, decimate

        arrays = self.pair.read_frame(row, col, h, w)
        gt, r = torch.from_numpy(arrays.ms), self.pair.ratio
        valid = arrays.ms_valid & arrays.pan_valid.reshape(h, r, w, r).all((1, 3))
        largest = float(arrays.ms[:, arrays.ms_valid].max(initial=0))
        if self.files.pan is None:
            weights = torch.tensor(self.weights, dtype=torch.float64)
            pan = torch.einsum("c,chw->hw", weights, gt.double())[None]
        elif self.shift != (0.0, 0.0):
            reach = math.ceil(2.5 + max(map(abs, self.shift)) / r)
            whole = torch.from_numpy(arrays.pan).double()[None]
            pan = decimate(whole, r, cubic(r), self.shift, reach)[0]
        else:
            pan = imresize(torch.from_numpy(arrays.pan), r)
        if self.files.pan is not None:
            largest = max(largest, float(arrays.pan[0, arrays.pan_valid].max(initial=0)))
        return _Block(gt, pan, valid, largest)

    def __enter__(self) -> _Scene:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.pair.close()


# --------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class _Plan:
    """What is the same for all scenes."""

    ratio: int
    bands: int
    gains: tuple[float, ...]
    split: Mapping[str, float]
    sizes: Mapping[str, int]
    strides: Mapping[str, int]


def _plan(scenes: Sequence[_Scene], options: SimulationOptions) -> _Plan:
    """Sizes and gains, checked against the scenes."""
    bands = scenes[0].bands
    ratio = options.ratio or next((s.ratio for s in scenes if s.ratio), options.sensor.ratio)
    for scene in scenes:
        if scene.bands != bands:
            raise DataError(
                f"{scene.files} has {scene.bands} bands, {scenes[0].files} has {bands}; scenes of "
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
        strides={"train": stride},
    )


def _gains(options: SimulationOptions, bands: int) -> tuple[float, ...]:
    if options.gains is None:
        try:
            return options.sensor.for_bands(bands).mtf_ms
        except ValueError as error:
            raise DataError(f"{error}.") from error
    if len(options.gains) not in (1, bands):
        raise DataError(
            f"{len(options.gains)} MTF gains were given for {bands} bands; give one per band, or one for all."
        )
    return options.gains * (bands if len(options.gains) == 1 else 1)


def _full_scale(scenes: Sequence[_Scene], options: SimulationOptions, largest: float) -> float:
    """An option, the sensor's, or the smallest bit depth that holds what was seen."""
    if options.max_value is not None:
        return options.max_value
    known = options.sensor.max_value
    if known is not None:
        if largest > known:
            raise DataError(
                f"Values reach {largest:g}, beyond the {known:g} of {options.sensor.name}; give "
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

    Training has the beginning of the longer axis; the rest of it is divided along the shorter
    one. Shares are of the cells (as large as a patch) without nodata.
    """
    cell = plan.sizes["train"]
    h, w = scene.shape
    rows, columns = h // cell, w // cell
    valid = np.array(
        [[scene.is_valid(row * cell, column * cell, cell) for column in range(columns)] for row in range(rows)],
        dtype=bool,
    ).reshape(rows, columns)
    upright = h >= w
    parts = split_cells(valid if upright else valid.T, plan.split)
    if parts is None:
        wanted = " and ".join(name for name in SPLITS if plan.split[name] > 0)
        raise DataError(
            f"{scene.files} has no room for {wanted} apart: {int(valid.sum())} patches of {cell} "
            f"pixels without nodata in {h} x {w} MS pixels; give a larger scene, a smaller "
            "--patch, or --split 100,0,0."
        )

    def pixels(start: int, stop: int, cells: int, length: int) -> tuple[int, int]:
        end = length if stop == cells else stop * cell  # the last part has what is left over
        return start * cell, end - start * cell

    areas = {}
    for name, (first, second) in parts.items():
        down, across = (first, second) if upright else (second, first)
        row, height = pixels(*down, rows, h)
        column, width = pixels(*across, columns, w)
        areas[name] = (row, column, height, width)
    return areas


Span = tuple[int, int]


def split_cells(valid: np.ndarray, shares: Mapping[str, float]) -> dict[str, tuple[Span, Span]] | None:
    """Spans (rows, columns) of a grid of cells for each split with a share, as near to the shares
    as can be when each has at least one valid cell. None where that cannot be."""
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
            best = {name: ((cut, n), span) for name, span in zip(held, spans, strict=True)}
            best = {"train": ((0, cut), (0, m)), **best}
    return best


def _divide(counts: np.ndarray, shares: Sequence[float]) -> list[Span] | None:
    """The axis cut in one or two parts, each with something in it, as near to the shares as can
    be."""
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
    """The largest size up to `LARGEST_TEST_PATCH` of which there is a valid test patch."""
    patch = plan.sizes["train"]
    if plan.sizes["test"] or plan.split["test"] == 0:
        return plan.sizes["test"] or patch
    for size in range(max(LARGEST_TEST_PATCH // patch, 1) * patch, patch, -patch):
        for scene, own in zip(scenes, areas, strict=True):
            row, column, h, w = own["test"]
            places = ((r, c) for r in _starts(h, size, size) for c in _starts(w, size, size))
            if any(scene.is_valid(row + r, column + c, size) for r, c in places):
                return size
    return patch


def _starts(length: int, size: int, stride: int) -> list[int]:
    return list(range(0, length - size + 1, stride))


# ------------------------------------------------------------------------------------ patches


@dataclass(frozen=True)
class _Made:
    """Patches of one block."""

    patches: PatchBatch | None
    places: np.ndarray
    """(B, 2) row and column in the scene, MS pixels"""
    left_out: int
    largest: float


def _patches(scene: _Scene, area: Area, split: str, plan: _Plan) -> Iterator[_Made]:
    """The patches of an area, block by block."""
    size = plan.sizes[split]
    stride = plan.strides.get(split, size)
    row, column, h, w = area
    for rows in _groups(_starts(h, size, stride), size):
        for columns in _groups(_starts(w, size, stride), size):
            places = [(row + r, column + c) for r in rows for c in columns]
            yield _cut(scene, places, size, plan)


def _groups(starts: Sequence[int], size: int) -> list[Sequence[int]]:
    """Neighbouring starts whose patches lie within `BLOCK` (or one patch)."""
    bounds = [0]
    for i, start in enumerate(starts):
        if start + size - starts[bounds[-1]] > max(BLOCK, size):
            bounds.append(i)
    return [starts[a:b] for a, b in pairwise([*bounds, len(starts)]) if a < b]


def _cut(scene: _Scene, places: Sequence[tuple[int, int]], size: int, plan: _Plan) -> _Made:
    """Simulate the block that holds all places, with the margin that filters see, and cut it.

    The block ends where the scene ends, so that the toolbox's own border rules act there.
    """
    import torch

    ratio = plan.ratio
    margin = wald_margin(ratio) * ratio
    ends = [n // ratio * ratio for n in scene.shape]
    top, left = (max(min(p[i] for p in places) - margin, 0) for i in (0, 1))
    bottom, right = (min(max(p[i] for p in places) + size + margin, ends[i]) for i in (0, 1))
    block = scene.read(top, left, bottom - top, right - left)
    ms = wald_ms(block.gt, plan.gains, ratio)
    lms = wald_lms(ms, ratio)

    def window(row: int, column: int, step: int = 1) -> tuple[slice, slice]:
        y, x, n = (row - top) // step, (column - left) // step, size // step
        return slice(y, y + n), slice(x, x + n)

    kept = [place for place in places if block.valid[window(*place)].all()]
    out = len(places) - len(kept)
    if not kept:
        return _Made(None, np.empty((0, 2), int), out, block.largest)

    def stack(x: Tensor, step: int = 1) -> Tensor:
        return torch.stack([x[(..., *window(*place, step))] for place in kept]).float()

    patches = PatchBatch(pan=stack(block.pan), ms=stack(ms, ratio), lms=stack(lms), gt=stack(block.gt))
    return _Made(patches, np.array(kept), out, block.largest)
