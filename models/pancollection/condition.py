"""Patches and images of PanCollection's files as a scene: statistics, conditions, sharpening.

A patch belongs to a whole scene, but is all of the scene that is at hand. The statistics come from
patches spread over the scene, and a patch's surroundings are mirrored, as at a scene's borders.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from uknowpan.models.blur import Psf, default_psf, estimate_psf
from uknowpan.models.denoising import NetworkSharpener
from uknowpan.models.devices import sent
from uknowpan.models.features import condition_reach, generic_condition
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PanCollectionFile, PanCollectionHeader, check_serves
from uknowpan.models.resample import UPSAMPLE_REACH, like, reflect, registration_offset
from uknowpan.models.sharpeners import Sharpened
from uknowpan.models.statistics import SceneStatistics, scene_statistics
from uknowpan.models.types import Condition, PatchBatch

SCENE_PATCHES = 256
"""Patches of a scene, evenly spread, that its statistics come from."""
PSF_PATCHES = 16
"""Patches that blur and shift are estimated from: of 16 x 16 MS pixels, to 3 % and 0.01 PAN pixels."""
OWN_SCENE = 64 * 64
"""MS pixels from which on an image is a scene of its own: enough to estimate blur and shift."""


def header_offset(header: PanCollectionHeader) -> float:
    """PAN pixels by which the file's MS samples lie beyond the nested centres."""
    return registration_offset(header.registration, header.ratio)


def patch_statistics(patches: Sequence[PatchBatch], header: PanCollectionHeader) -> SceneStatistics:
    """Statistics of a scene from patches of one image each, in units of full scale."""
    windows = [(patch.pan[0], patch.ms[0]) for patch in patches]
    psf = estimate_psf([windows[i] for i in _spread(len(windows), PSF_PATCHES)], header.ratio)
    if psf == default_psf(header.ratio):  # not measurable: the shift of the registration is known
        psf = Psf(psf.sigma, (header_offset(header),) * 2, psf.correlation)
    return scene_statistics(windows, header.ratio, psf)


def scenes_of(dataset: PanCollectionDataset) -> tuple[SceneStatistics, ...]:
    """Statistics of each scene of `PanCollectionDataset.sources`."""
    header, made = dataset.files[0].header, []
    for source in range(int(dataset.sources.max()) + 1):
        members = np.flatnonzero(dataset.sources == source)
        chosen = members[_spread(len(members), SCENE_PATCHES)]
        made.append(patch_statistics([dataset[int(index)] for index in chosen], header))
    return tuple(made)


def image_sharpener(
    sharpener: NetworkSharpener, file: PanCollectionFile, scale: float
) -> Callable[[PatchBatch], Sharpened]:
    """A network for the images of a test file, divided by full scale.

    Large images are scenes of their own; small ones have the statistics of the scene that they were cut from.

    Args:
        sharpener: from `uknowpan.models.denoising.load_network`.
        file: where the images come from.
        scale: full scale in DN.

    Returns:
        Function (images) -> results in the same units, not clipped.

    Raises:
        ModelMismatch: the network does not serve such images.
    """
    header = file.header
    check_serves(sharpener.card, sharpener.bands, sharpener.multiple, header, file.path)
    alone = header.height * header.width >= OWN_SCENE * header.ratio**2
    scenes: tuple[SceneStatistics, ...] = ()
    if sharpener.needs_statistics and not alone:
        scenes = scenes_of(PanCollectionDataset([file], max_value=scale))

    def sharpen(batch: PatchBatch) -> Sharpened:
        batch = batch.to(torch.float32)
        if not sharpener.needs_statistics:
            return sharpener.sharpen_images(batch)
        done = []
        for i in range(len(batch)):
            one = _single(batch, i)
            scene = patch_statistics([one], header) if alone else scenes[int(_origin(batch, scenes)[i, 0])]
            done.append(sharpener.sharpen_images(one, scene, header_offset(header)))
        sigmas = [part.sigma for part in done if part.sigma is not None]
        return Sharpened(torch.cat([part.hrms for part in done]), torch.cat(sigmas) if sigmas else None)

    return sharpen


def _single(batch: PatchBatch, index: int) -> PatchBatch:
    return batch.map(lambda x: x[index : index + 1])


class PatchConditioner:
    """Makes the student's conditions for the batches of one dataset.

    Args:
        dataset: source of the batches, flipped or not. Another dataset needs its own conditioner.

    Attributes:
        statistics: of each scene, in units of full scale.
        offset: PAN pixels by which MS samples lie beyond the nested centres.
        border: PAN pixels at a patch's edge whose lms depends on mirrored pixels; a loss leaves them out.
    """

    def __init__(self, dataset: PanCollectionDataset):
        header = dataset.files[0].header
        self.ratio, self.offset = header.ratio, header_offset(header)
        self.border = UPSAMPLE_REACH * header.ratio
        self.statistics = scenes_of(dataset)

    def condition(self, batch: PatchBatch) -> tuple[Condition, Tensor]:
        """The condition of a batch, and the scale (B, C, 1, 1): x0 = (gt - condition.lms) / scale.

        Raises:
            ValueError: the batch was drawn from no dataset, or from another.
        """
        origin, device = _origin(batch, self.statistics), batch.ms.device
        turns = sent(origin[:, 1:].bool(), device)
        pan, ms = _turned(batch.pan, turns), _turned(batch.ms, turns)
        parts, scales, order = [], [], []
        for scene in sorted(set(origin[:, 0].tolist())):
            own = sent((origin[:, 0] == scene).nonzero()[:, 0], device)
            statistics = self.statistics[scene]
            margin = condition_reach(statistics)
            window = reflect(pan[own], margin * self.ratio), reflect(ms[own], margin)
            parts.append(generic_condition(*window, statistics, self.offset, margin))
            scale = like(statistics.detail_std[:-1], ms)
            scales.append(scale.view(1, -1, 1, 1).expand(len(own), -1, -1, -1))
            order.append(own)
        back = torch.cat(order).argsort()
        condition, scale = Condition.cat(parts), torch.cat(scales)
        if len(parts) > 1:
            condition, scale = condition.map(lambda x: x[back]), scale[back]
        return condition.map_images(lambda x: _turned(x, turns)), scale


def _origin(batch: PatchBatch, scenes: Sequence[SceneStatistics]) -> Tensor:
    """The batch's `origin`, which must lie in these scenes."""
    if batch.origin is None or len(batch.origin) != len(batch):
        raise ValueError("the batch does not hold the origin of its patches; draw it from the dataset")
    largest = int(batch.origin[:, 0].max())
    if largest >= len(scenes):
        raise ValueError(
            f"the batch has patches of scene {largest}, the dataset of this conditioner has "
            f"{len(scenes)} scenes; make one for the other dataset"
        )
    return batch.origin


def _spread(count: int, wanted: int) -> np.ndarray:
    """Up to `wanted` of the indices 0 .. count - 1, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Images (B, ..., H, W) whose rows or columns are flipped where `turns` (B, 2) is True."""
    for axis in (0, 1):
        x = torch.where(turns[:, axis].view(-1, *[1] * (x.ndim - 1)), x.flip(axis - 2), x)
    return x
