"""The condition of the `lite` student for patches of PanCollection's files.

The student is told of a whole scene by its statistics; a patch belongs to one, but is all of it
that is at hand. The statistics come from patches spread over the scene that it was cut from, and
its surroundings are mirrored, as at the borders of a scene.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from uknowpan.models.blur import Psf, Window, default_psf, estimate_psf
from uknowpan.models.features import condition_reach, generic_condition
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PatchBatch
from uknowpan.models.resample import UPSAMPLE_REACH, mirrored, registration_offset
from uknowpan.models.statistics import USUAL_SOFTNESS, SceneStatistics, scene_statistics
from uknowpan.models.types import Condition

PSF_PATCHES = 16
"""So many patches tell blur and shift: of 16 x 16 MS pixels, to 3 % and 0.01 PAN pixels."""


class PatchConditioner:
    """Makes conditions for the batches of one dataset (another dataset needs its own).

    Args:
        dataset: where batches come from, flipped or not; its scenes are those of
            `PanCollectionDataset.sources`.
        samples: so many patches of each scene, evenly spread, make its statistics.
        residual_scale: what x0 is divided by besides the details' contrast, as on the card.
        softness: of the results against the PAN, sigma in PAN pixels.

    Attributes:
        statistics: of each scene, in units of full scale.
        offset: PAN pixels by which MS samples lie beyond the nested centres.
        border: PAN pixels at a patch's edge whose lms has seen what was mirrored; leave them out
            of a loss.
    """

    def __init__(
        self,
        dataset: PanCollectionDataset,
        *,
        samples: int = 256,
        residual_scale: float = 1.0,
        softness: float = USUAL_SOFTNESS,
    ):
        self.softness = softness
        header = dataset.files[0].header
        self.ratio, self.residual_scale = header.ratio, residual_scale
        self.offset = registration_offset(header.registration, header.ratio)
        self.border = UPSAMPLE_REACH * header.ratio
        self.statistics = tuple(
            self._of_scene(dataset, np.flatnonzero(dataset.sources == source), samples)
            for source in range(int(dataset.sources.max()) + 1)
        )

    def _of_scene(self, dataset: PanCollectionDataset, members: np.ndarray, samples: int) -> SceneStatistics:
        chosen = members[_spread(len(members), samples)]
        patches = [dataset[int(index)] for index in chosen]
        windows = [(patch.pan[0], patch.ms[0]) for patch in patches]
        return scene_statistics(windows, self.ratio, self._psf(windows))

    def _psf(self, windows: list[Window]) -> Psf:
        few = [windows[i] for i in _spread(len(windows), PSF_PATCHES)]
        psf = estimate_psf(few, self.ratio)
        if psf == default_psf(self.ratio):  # the patches do not tell, but the registration does
            psf = Psf(psf.sigma, (self.offset, self.offset), psf.correlation)
        return psf

    def condition(self, batch: PatchBatch) -> tuple[Condition, Tensor]:
        """What the student is told of a batch.

        Args:
            batch: drawn from the dataset.

        Returns:
            The `Condition` of whole patches, and the scale (B, C, 1, 1) of their residuals:
            x0 = (gt - condition.lms) / scale.

        Raises:
            ValueError: a batch that no dataset drew, or not this one.
        """
        origin = self._origin(batch)
        turns = origin[:, 1:].bool()
        pan, ms = _turned(batch.pan, turns), _turned(batch.ms, turns)
        scenes, members = origin[:, 0].unique(return_inverse=True)
        parts, scales, order = [], [], []
        for number, scene in enumerate(scenes.tolist()):
            own = (members == number).nonzero()[:, 0]
            statistics = self.statistics[scene]
            parts.append(self._of_patches(pan[own], ms[own], statistics))
            scale = self.residual_scale * statistics.detail_std[:-1].to(ms)
            scales.append(scale.view(1, -1, 1, 1).expand(len(own), -1, -1, -1))
            order.append(own)
        back = torch.cat(order).argsort()
        condition, scale = Condition.stack(parts), torch.cat(scales)
        if len(parts) > 1:
            condition, scale = condition._map(lambda _, x: x[back]), scale[back]
        turned = condition._map(lambda name, x: x if name == "scene" else _turned(x, turns))
        return turned, scale

    def _origin(self, batch: PatchBatch) -> Tensor:
        if batch.origin is None or len(batch.origin) != len(batch):
            raise ValueError("the batch does not say where its patches come from; draw it from the dataset")
        largest = int(batch.origin[:, 0].max())
        if largest >= len(self.statistics):
            raise ValueError(
                f"the batch has patches of scene {largest}, the dataset of this conditioner has "
                f"{len(self.statistics)} scenes; make one for the other dataset"
            )
        return batch.origin

    def _of_patches(self, pan: Tensor, ms: Tensor, statistics: SceneStatistics) -> Condition:
        ratio, margin = self.ratio, condition_reach(statistics)
        h, w = ms.shape[-2:]
        rows, cols = (mirrored(-margin, n + 2 * margin, n) for n in (h, w))
        pan_rows, pan_cols = (mirrored(-margin * ratio, (n + 2 * margin) * ratio, n * ratio) for n in (h, w))
        return generic_condition(
            pan[:, :, pan_rows][..., pan_cols],
            ms[:, :, rows][..., cols],
            statistics,
            self.offset,
            margin,
            self.softness,
        )


def _spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of the indices 0 .. count - 1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Images (B, ..., H, W) whose rows or columns are flipped where `turns` (B, 2) says so."""
    for axis in (0, 1):
        some = turns[:, axis].nonzero()[:, 0]
        if len(some):
            x = x.index_copy(0, some.to(x.device), x[some].flip(axis - 2))
    return x
