"""A frozen teacher and its answers, from which a student learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uknowpan.models.checkpoints import load_model, sha256
from uknowpan.models.diffusion import NoiseSchedule, ddim_sample, position_noise
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.pancollection.file import PanCollectionFile, check_serves
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.teacher import TeacherConfig
from uknowpan.models.types import Bundle, Condition, PatchBatch


@dataclass(frozen=True)
class TeacherAnswer(Bundle):
    """The teacher's output for a batch of patches."""

    sr: Tensor
    """(B, C, H, W) the sharp image in the units of lms, about [0, 1], not clipped."""
    variance: Tensor
    """(B, C, H, W) of its error, in squared units of lms."""
    features: tuple[Tensor, ...]
    """Six tensors (B, c, h, w) of the last step, see `FSATeacher.forward`."""

    def __len__(self) -> int:
        return len(self.sr)

    def flip(self, axes: Sequence[int]) -> TeacherAnswer:
        """The answer flipped along rows (-2) and columns (-1)."""
        return self.map(lambda x: x.flip(list(axes)))


class FrozenTeacher:
    """A trained teacher that answers and does not learn.

    Every patch starts from the noise of the seed: its answer is the same in any batch and from a cache.

    Args:
        path: its checkpoint.
        steps: network evaluations per answer.
        seed: of the noise.
        device: where the network runs.

    Raises:
        CheckpointError: no readable checkpoint, or one whose card lacks the residual's scale.
        ModelMismatch: a checkpoint of something other than a teacher.
        ValueError: a number of steps that the schedule has not.
    """

    def __init__(self, path: str | Path, *, steps: int = 1, seed: int = 0, device: str = "cpu"):
        model, self.card = load_model(path)
        self.sha256 = sha256(path)
        if not isinstance(model, GuidedTeacher):
            raise ModelMismatch(
                f"{self.card.name} is of the architecture {self.card.architecture}, which teaches "
                "nobody; give a teacher (fsa-t)."
            )
        self.bands = model.config.teacher.bands
        if len(self.card.residual_std) != self.bands:
            raise CheckpointError(
                f"the card of {self.card.name} has {len(self.card.residual_std)} values of "
                f"residual_std, not one for each of {self.bands} bands; train the teacher anew."
            )
        self.schedule = NoiseSchedule.cosine()
        self.schedule.respace(steps)
        self.steps, self.seed, self.device = steps, seed, torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._unit = torch.tensor(self.card.residual_std, device=self.device)[:, None, None]

    @torch.no_grad()
    def answer(self, batch: PatchBatch, noise: Tensor | None = None) -> TeacherAnswer:
        """Answers to patches divided by full scale, on the teacher's device.

        In float32 even under autocast: the phases of the Fourier transforms jump at pi. A `noise`
        (B, C, H, W) takes the place of the seed's.

        Raises:
            ValueError: patches of other bands, or of a size that does not divide.
        """
        lms, pan = (x.to(self.device, torch.float32) for x in (batch.lms, batch.pan))
        count, bands, height, width = lms.shape
        if noise is None:
            noise = position_noise(self.seed, 0, 0, height, width, bands, self.device)
            noise = noise.expand(count, -1, -1, -1)
        with torch.autocast(self.device.type, enabled=False):
            condition, timesteps = Condition(lms, pan), self.schedule.respace(self.steps)
            denoiser, carried = self.model.denoiser(condition), self.card.self_conditioning
            output = ddim_sample(
                denoiser, noise.to(lms), timesteps, self.schedule, condition, self_conditioning=carried
            )
        assert output.log_sigma is not None
        sigma = self._unit * output.log_sigma.exp()
        return TeacherAnswer(lms + self._unit * output.x0, sigma.square(), output.features)

    def check_serves(self, file: PanCollectionFile) -> None:
        """Refuse data that the teacher was not trained for: a ModelMismatch."""
        check_serves(self.card, self.bands, self.model.config.teacher.factor, file.header, file.path)


def feature_shapes(config: TeacherConfig, height: int, width: int) -> list[tuple[int, int, int]]:
    """(c, h, w) of a teacher's six features, for patches of height x width PAN pixels."""
    last = len(config.multipliers) - 1
    levels = [*range(last), *range(last, 0, -1)]  # what enters each Down, then each Up
    h, w = height // config.patch, width // config.patch
    return [(config.width * config.multipliers[n], h >> n, w >> n) for n in levels]
