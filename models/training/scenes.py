"""Training data of the generic student: whole scenes, degraded anew for every variant.

A scenes file (HDF5, made by ``uknowpan pack``) holds one group per scene with ``gt`` (C, H, W)
and, where the scene has one, ``pan`` (1, H, W) on the same grid. Every batch is a function of
(seed, step) alone, so that a resumed run goes on as an unbroken one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.blur import default_psf, estimate_psf, gain_to_sigma
from uknowpan.models.errors import DataError
from uknowpan.models.features import condition_reach, generic_condition
from uknowpan.models.pancollection.file import check_stored
from uknowpan.models.resample import degrade, like, mirrored
from uknowpan.models.statistics import SceneStatistics, scene_statistics
from uknowpan.models.training.bounds import FULL_SCALES
from uknowpan.models.training.degradations import degrade_truth, random_degradation, synthetic_pan
from uknowpan.models.training.parallel import World, read_ahead
from uknowpan.models.types import Bundle, Condition

RATIOS, RATIO_WEIGHTS = (2, 3, 4, 5, 6), (0.22, 0.1, 0.48, 0.08, 0.12)
BAND_COUNTS, BAND_COUNT_WEIGHTS = (1, 3, 4, 6, 8), (0.06, 0.16, 0.56, 0.14, 0.08)
LARGEST_VARIANT = 384
"""Largest side of a variant, in truth pixels."""
LEAST_HALVED = 192
"""Sides in truth pixels below which a scene is not halved."""
TRUTH_BLUR = (0.2, 0.9)
"""Sigma in pixels of the truth; pairs here have 0.5 (Landsat) to 0.8 (SPOT-6, GaoFen-2)."""


@dataclass(frozen=True)
class Scene:
    """A truth and (perhaps) a PAN on the same grid."""

    name: str
    sensor: str
    gt: Tensor
    """(C, H, W) float32, digital numbers."""
    pan: Tensor | None
    """(1, H, W) float32."""
    weight: float = 1.0
    """Frequency with which the scene is drawn, relative to the others."""
    licence: str = ""


@dataclass(frozen=True)
class TrainBatch(Bundle):
    """The patches of one training step, on the PAN grid."""

    condition: Condition
    x0: Tensor
    """(B, C, H, W) standardised residual (gt - lms) / scale."""
    scale: Tensor
    """(B, C, 1, 1) scale of the residual, in the scene's units."""


@dataclass(frozen=True)
class VariantShares:
    """Shares of the variants whose truth is changed before the scene is degraded."""

    halved: float = 0.0
    """Share with truth and PAN averaged to half the resolution: as sharp as pixels allow."""
    subsampled: float = 0.0
    """Share with every other pixel of the truth and a blurred PAN: a truth sharper than its PAN."""
    truth_blur: float = 0.0
    """Share with a blurred truth, as an MS is against its PAN."""


@dataclass(frozen=True)
class Variant:
    """A scene with one degradation."""

    pan: Tensor
    ms: Tensor
    gt: Tensor
    statistics: SceneStatistics
    softness: float
    """Blur of the truth against the PAN, sigma in pixels."""


def read_scenes(path: str | Path, split: str) -> list[Scene]:
    """Scenes of one split (train, valid or test) of a scenes file; DataError where there is none, or a damaged one."""
    import h5py

    scenes = []
    try:
        with h5py.File(path, "r") as file:
            for name, group in file.items():
                if not isinstance(group, h5py.Group) or str(group.attrs.get("split")) != split:
                    continue
                if "pan" in group and group["pan"].shape != (1, *group["gt"].shape[1:]):  # before a large one is read
                    raise ValueError(f"the PAN of scene {name} is {group['pan'].shape}, its truth {group['gt'].shape}")
                pan = _image(path, group["pan"]) if "pan" in group else None
                gt = _image(path, group["gt"])
                sensor, licence = (str(group.attrs[key]) for key in ("sensor", "licence"))
                weight = float(group.attrs["weight"])
                if not 0 < weight < math.inf:
                    raise ValueError(f"the weight of scene {name} is {weight:g}, not a number above 0")
                scenes.append(Scene(name, sensor, gt, pan, weight, licence))
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(f"{path} is not a scenes file made by `uknowpan pack`: {error}.") from error
    if not scenes:
        raise DataError(f"{path} holds no scene of the split {split!r}")
    return scenes


def _image(path: str | Path, data: Any) -> Tensor:
    """A (C, H, W) dataset as float32. Raises DataError, ValueError."""
    check_stored(path, data)
    if data.ndim != 3 or data.dtype.kind not in "iuf" or 0 in data.shape:
        raise ValueError(f"{data.name} is {data.shape} of {data.dtype}, not (C, H, W) numbers")
    image = torch.from_numpy(data[()].astype(np.float32))
    if not (image.abs() <= FULL_SCALES[1]).all():
        raise ValueError(f"{data.name} holds values that are not finite, or beyond {FULL_SCALES[1]:g}")
    return image


class GenericBatches:
    """Batches of patches as a function of the step.

    Args:
        scenes: the scenes.
        seed: of everything random.
        batch_size: patches per batch.
        patch: side of a patch in PAN pixels.
        variants: degradations per scene, of which `cache` stay in memory; scenes drawn often have more.
        patches_per_variant: patches cut from a variant that was drawn.
        shares: of the variants whose truth is changed.
        cache: variants kept.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        *,
        seed: int,
        batch_size: int = 16,
        patch: int = 64,
        variants: int = 6,
        patches_per_variant: int = 2,
        shares: VariantShares | None = None,
        cache: int = 1200,
    ):
        self.scenes, self.shares = list(scenes), shares or VariantShares()
        self.seed, self.batch_size, self.patch = seed, batch_size, patch
        self.per_variant = patches_per_variant
        mean = sum(scene.weight for scene in self.scenes) / len(self.scenes)
        self.variants = [max(2, round(variants * scene.weight / mean)) for scene in self.scenes]
        self._variant = lru_cache(maxsize=cache)(self._made_variant)

    def __call__(self, step: int, world: World | None = None) -> TrainBatch:
        """The batch of a step, or this process's share of it: conditions and x0 of patches."""
        world = world or World()
        rng = np.random.default_rng((self.seed, 1, step))
        bands = int(rng.choice(BAND_COUNTS, p=BAND_COUNT_WEIGHTS))
        bands = min(bands, max(len(s.gt) for s in self.scenes))
        usable = [i for i, s in enumerate(self.scenes) if len(s.gt) >= bands]
        weights = np.array([self.scenes[i].weight for i in usable])
        draws: list[tuple[int, int, np.ndarray]] = []
        while len(draws) < self.batch_size:
            scene = int(rng.choice(usable, p=weights / weights.sum()))
            number, order = int(rng.integers(self.variants[scene])), rng.permutation(len(self.scenes[scene].gt))[:bands]
            draws += [(scene, number, order)] * min(self.per_variant, self.batch_size - len(draws))
        share = world.share(self.batch_size)
        patches: list[tuple[Condition, Tensor, Tensor]] = []
        for place in range(world.rank * share, (world.rank + 1) * share):
            scene, number, order = draws[place]
            patches.append(
                self._patch(self._variant(scene, number), order, np.random.default_rng((self.seed, 3, step, place)))
            )
        conditions, targets, scales = zip(*patches, strict=True)
        return TrainBatch(Condition.cat(conditions), torch.cat(targets), torch.cat(scales))

    def stream(
        self, start: int, stop: int, world: World, *, workers: int = 0, device: str = "cpu"
    ) -> Iterator[TrainBatch]:
        """This process's shares of the batches of steps `start` .. `stop` - 1 in order; see `read_ahead`.

        Each worker makes and keeps variants of its own.
        """
        return read_ahead(
            _Steps(self, world), ([step] for step in range(start, stop)), itemgetter(0), workers=workers, device=device
        )

    def _made_variant(self, scene: int, number: int) -> Variant:
        rng = np.random.default_rng((self.seed, 2, scene, number))
        return make_variant(self.scenes[scene], rng, self.shares)

    def _patch(self, variant: Variant, order: np.ndarray, rng: np.random.Generator) -> tuple[Condition, Tensor, Tensor]:
        """One patch with its condition, turned and flipped at random."""
        for attempt in range(8):
            condition, x0, scale = cut_patch(variant, order, self.patch, rng)
            # Places without detail (sea, nodata) teach nothing; take them only now and then.
            if attempt == 7 or float(x0.abs().mean()) > 0.15 * rng.uniform():
                break
        turns, flip = int(rng.integers(4)), bool(rng.integers(2))

        def turn(x: Tensor) -> Tensor:
            x = torch.rot90(x, turns, (-2, -1))
            return x.flip(-1) if flip else x

        turned = condition.map_images(turn)
        return turned, turn(x0), scale


class _Steps:
    """Batches by number, as a DataLoader asks for them."""

    def __init__(self, batches: GenericBatches, world: World):
        self.batches, self.world = batches, world

    def __getitem__(self, step: int) -> TrainBatch:
        return self.batches(step, self.world)


def make_variant(scene: Scene, rng: np.random.Generator, shares: VariantShares | None = None) -> Variant:
    """Cut a scene to size and degrade it in a way drawn by `rng`."""
    shares = shares or VariantShares()
    if shares.halved + shares.subsampled > 0:
        drawn = rng.uniform()
        if min(scene.gt.shape[-2:]) < LEAST_HALVED:
            pass
        elif drawn < shares.halved:
            scene = halved(scene)
        elif drawn < shares.halved + shares.subsampled:
            scene = subsampled(scene)
    degradation = random_degradation(rng, len(scene.gt), RATIOS, RATIO_WEIGHTS)
    ratio = degradation.ratio
    height, width = scene.gt.shape[-2:]
    rows, cols = (min(n, LARGEST_VARIANT) // ratio * ratio for n in (height, width))
    top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - cols + 1))
    window = (slice(None), slice(top, top + rows), slice(left, left + cols))
    gt = scene.gt[window]
    pan = synthetic_pan(gt, rng) if scene.pan is None else scene.pan[window]
    if shares.truth_blur > 0 and rng.uniform() < shares.truth_blur:
        gt = degrade(gt[None], 1, float(rng.uniform(*TRUTH_BLUR)), (0.0, 0.0))[0]
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    ms = degrade_truth(gt, degradation, generator)
    psf = default_psf(ratio) if rng.uniform() < 0.05 else None
    statistics = scene_statistics([(pan, ms)], ratio, psf)
    softness = estimate_psf([(pan, gt)], 1).sigma
    return Variant(pan, ms, gt, statistics, softness)


def halved(scene: Scene) -> Scene:
    """The scene averaged to half its resolution: sharper than any sensor's MS."""
    rows, cols = (n // 2 * 2 for n in scene.gt.shape[-2:])

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x[:, :rows, :cols], 2)

    pan = None if scene.pan is None else average(scene.pan)
    return replace(scene, gt=average(scene.gt), pan=pan)


def subsampled(scene: Scene) -> Scene:
    """Every other pixel of the truth, and the PAN of those places at most as sharp as its grid
    allows: fine detail of the truth that PAN shows weakly."""
    rows, cols = (n // 2 * 2 for n in scene.gt.shape[-2:])
    pan = scene.pan
    if pan is not None:  # the pixels taken lie half a pixel before the middle of two
        pan = degrade(pan[None, :, :rows, :cols], 2, gain_to_sigma(0.3, 2), (-0.5, -0.5))[0]
    return replace(scene, gt=scene.gt[:, :rows:2, :cols:2], pan=pan)


def cut_patch(
    variant: Variant, order: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[Condition, Tensor, Tensor]:
    """A patch of `size` PAN pixels: its condition (batch of one), x0 and the scale of that."""
    statistics = variant.statistics.select(order.tolist())
    ratio, margin = statistics.ratio, condition_reach(statistics)
    ms, gt = variant.ms[order.copy()], variant.gt[order.copy()]
    h, w = ms.shape[-2:]
    need = -(-size // ratio) + 1
    row, col = (int(rng.integers(max(n - need, 0) + 1)) for n in (h, w))
    oy, ox = (int(rng.integers(ratio)) for _ in range(2))

    def window(x: Tensor, step: int) -> Tensor:
        """The place with its margin, mirrored at the borders; `step` pixels per MS pixel."""
        rows, cols = (
            mirrored((start - margin) * step, (need + 2 * margin) * step, n * step) for start, n in ((row, h), (col, w))
        )
        return x[:, rows][:, :, cols][None]

    condition = generic_condition(window(variant.pan, ratio), window(ms, 1), statistics, softness=variant.softness)
    inner = (slice(margin * ratio + o, margin * ratio + o + size) for o in (oy, ox))
    condition = condition.crop(*inner)
    gt_rows = mirrored(row * ratio + oy, size, h * ratio)
    gt_cols = mirrored(col * ratio + ox, size, w * ratio)
    truth = gt[:, gt_rows][:, :, gt_cols][None]
    scale = like(statistics.detail_std[:-1], gt).view(1, -1, 1, 1)
    return condition, (truth - condition.lms) / scale, scale
