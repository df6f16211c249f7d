"""Checkpoints of every stage as sharpeners of PanCollection's images, to be measured.

Networks of the published form see what they were trained on: the stored lms and PAN divided by
full scale. The `lite` student makes its own condition, told where the file's MS samples lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from uknowpan.models.checkpoints import Card, find_checkpoint, load_model, sha256
from uknowpan.models.diffusion import NoiseSchedule, ddim_sample
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import minds_softness
from uknowpan.models.network import FSAStudentLite
from uknowpan.models.noise import position_noise
from uknowpan.models.pancollection.condition import PatchConditioner
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PanCollectionFile, PatchBatch
from uknowpan.models.published.pan_crafter.network import PanCrafter
from uknowpan.models.published.ssdiff.network import SSDiff
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.student import FSAStudent
from uknowpan.models.sharpeners import Sharpened
from uknowpan.models.statistics import USUAL_SOFTNESS
from uknowpan.models.types import Condition, Denoised

ONE_PASS = ("prior", "pan-crafter")
"""Architectures that diffuse nothing."""
OWN_SCENE = 64 * 64
"""MS pixels from which on an image is a scene of its own: so many tell blur and shift."""


@dataclass(frozen=True)
class PatchSharpener:
    """A checkpoint that sharpens the images of one file."""

    card: Card
    digest: str
    """SHA-256 of the checkpoint."""
    steps: int
    """Network evaluations per image."""
    sharpen: Callable[[PatchBatch], Sharpened]
    """Of patches divided by full scale; result and sigma in the same units, not clipped."""

    @property
    def minds_softness(self) -> bool:
        """Whether it was told a softness."""
        return minds_softness(self.card.config)

    def __call__(self, patches: PatchBatch) -> Tensor:
        """The sharpened patches (B, C, H, W) alone."""
        return self.sharpen(patches).hrms


@dataclass(frozen=True)
class _Setting:
    """What it takes to run any network."""

    card: Card
    file: PanCollectionFile
    scale: float
    steps: int
    seed: int
    device: str
    softness: float

    def sample(self, model: nn.Module, condition: Condition) -> Denoised:
        """DDIM from noise that is the same for every image."""
        bands, height, width = condition.lms.shape[1:]
        noise = position_noise(self.seed, 0, 0, height, width, bands, self.device)
        schedule = NoiseSchedule.cosine(self.card.timesteps)
        return ddim_sample(
            model,
            noise.expand(len(condition.lms), -1, -1, -1),
            schedule.respace(self.steps),
            schedule,
            condition,
            self_conditioning=self.card.self_conditioning,
        )

    def moved(self, patches: PatchBatch) -> PatchBatch:
        return patches.to(self.device, torch.float32)


def load_patch_sharpener(
    model: str,
    file: PanCollectionFile,
    scale: float,
    *,
    steps: int | None = None,
    seed: int = 0,
    softness: float = USUAL_SOFTNESS,
    device: str = "cpu",
) -> PatchSharpener:
    """A checkpoint of any stage, ready for the images of a file.

    Args:
        model: bundled name or path.
        file: whose images it is to sharpen.
        scale: full scale in DN that they are divided by.
        steps: network evaluations, if not as on the card; those of `ONE_PASS` take one.
        seed: of the noise, which is the same for every image.
        softness: of the results, for networks that mind it; sigma in PAN pixels.
        device: where the network runs.

    Raises:
        CheckpointError: no such model, or its file or card is damaged.
        ModelMismatch: it does not serve such images.
        ValueError: a number of steps that the schedule has not.
    """
    path = find_checkpoint(model)
    network, card = load_model(path)
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    taken = card.steps if steps is None else steps
    taken = 1 if card.architecture in ONE_PASS else taken
    setting = _Setting(card, file, scale, taken, seed, device, softness)
    _check(network, setting)
    NoiseSchedule.cosine(card.timesteps).respace(taken)
    return PatchSharpener(card, sha256(path), taken, _MAKERS[card.architecture](network, setting))


def _check(network: nn.Module, setting: _Setting) -> None:
    card, header = setting.card, setting.file.header
    # A student that takes any bands says None; the others' configs know better than their cards.
    if card.bands is not None and card.bands != header.bands:
        raise ModelMismatch(
            f"model {card.name} was trained for {card.bands} bands, but {setting.file.path} holds "
            f"{header.bands}; use one that was trained on such data."
        )
    if header.ratio not in card.ratios:
        known = ", ".join(map(str, card.ratios))
        raise ModelMismatch(
            f"model {card.name} serves the ratio {known}, but that of {setting.file.path} is "
            f"{header.ratio}; use one that was trained on such data."
        )
    multiple = _multiple(network)
    if header.height % multiple or header.width % multiple:
        raise ModelMismatch(
            f"model {card.name} takes multiples of {multiple} pixels, but the images of "
            f"{setting.file.path} have {header.height} x {header.width}; cut them anew."
        )
    if card.architecture not in ("fsa-s-lite", "prior") and len(card.residual_std) != header.bands:
        raise CheckpointError(
            f"the card of model {card.name} tells residual_std of {len(card.residual_std)} bands, "
            f"not {header.bands}; train it anew with `uknowpan train`."
        )


def _multiple(network: nn.Module) -> int:
    """Heights and widths must be multiples of it."""
    if isinstance(network, FSAStudentLite | PanCrafter | SSDiff):
        return network.pixel_multiple
    if isinstance(network, FSAStudent):
        return network.unet.factor
    return network.config.teacher.factor if isinstance(network, GuidedTeacher) else 1


def _prior(network: nn.Module, setting: _Setting) -> Callable[[PatchBatch], Sharpened]:
    @torch.no_grad()
    def sharpen(patches: PatchBatch) -> Sharpened:
        patches = setting.moved(patches)
        mean, variance = network(patches.lms, patches.pan)
        return Sharpened(mean, variance.sqrt())

    return sharpen


def _teacher(network: nn.Module, setting: _Setting) -> Callable[[PatchBatch], Sharpened]:
    teacher = FrozenTeacher(
        (cast(GuidedTeacher, network), setting.card),
        steps=setting.steps,
        seed=setting.seed,
        device=setting.device,
    )

    def sharpen(patches: PatchBatch) -> Sharpened:
        answer = teacher.answer(patches)
        return Sharpened(answer.sr, answer.variance.sqrt())

    return sharpen


def _student(network: nn.Module, setting: _Setting) -> Callable[[PatchBatch], Sharpened]:
    std = torch.tensor(setting.card.residual_std, device=setting.device).view(1, -1, 1, 1)

    @torch.no_grad()
    def sharpen(patches: PatchBatch) -> Sharpened:
        patches = setting.moved(patches)
        condition = Condition(patches.lms, patches.pan, ms=patches.ms)
        return Sharpened(condition.lms + std * setting.sample(network, condition).x0)

    return sharpen


def _lite_student(network: nn.Module, setting: _Setting) -> Callable[[PatchBatch], Sharpened]:
    card, header = setting.card, setting.file.header
    alone = header.height * header.width >= OWN_SCENE * header.ratio**2
    together = None if alone else _of_scenes(setting)

    @torch.no_grad()
    def sharpen(patches: PatchBatch) -> Sharpened:
        patches = patches.to(torch.float32)
        conditioner = together or _of_image(patches, setting)
        if together is None:
            patches = PatchBatch(patches.pan, patches.ms, patches.lms, origin=_here(patches))
        condition, scale = conditioner.condition(patches)
        condition, scale = condition.to(setting.device), scale.to(setting.device)
        said = setting.sample(network, condition)
        assert said.log_sigma is not None
        sigma = said.log_sigma.exp() * scale * card.sigma_scale
        return Sharpened(condition.lms + scale * said.x0, sigma)

    return sharpen


def _of_scenes(setting: _Setting) -> PatchConditioner:
    """With the statistics of the scenes that small patches were cut from."""
    dataset = PanCollectionDataset([setting.file], max_value=setting.scale)
    dataset.scales = [setting.scale]  # the file may say another
    return _conditioner(dataset, setting)


def _conditioner(dataset: PanCollectionDataset, setting: _Setting) -> PatchConditioner:
    scale = setting.card.residual_scale
    return PatchConditioner(dataset, residual_scale=scale, softness=setting.softness)


@dataclass(frozen=True)
class _Images:
    """Images as a dataset, each a scene of its own."""

    files: list[PanCollectionFile]
    patches: PatchBatch

    @property
    def sources(self) -> np.ndarray:
        return np.arange(len(self.patches))

    def __getitem__(self, index: int) -> PatchBatch:
        return self.patches.map(lambda x: x[index : index + 1])


def _of_image(patches: PatchBatch, setting: _Setting) -> PatchConditioner:
    images = cast(PanCollectionDataset, _Images([setting.file], patches))
    return _conditioner(images, setting)


def _here(patches: PatchBatch) -> Tensor:
    """The origin of each patch in `_Images`, not turned."""
    return torch.tensor([[i, 0, 0] for i in range(len(patches))])


_MAKERS: dict[str, Callable[[nn.Module, _Setting], Callable[[PatchBatch], Sharpened]]] = {
    "fsa-s-lite": _lite_student,
    "fsa-s": _student,
    "fsa-t": _teacher,
    "prior": _prior,
    "pan-crafter": _student,
    "ssdiff": _student,
}
"""Architecture -> function that makes its way to sharpen."""
