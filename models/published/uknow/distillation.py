"""A frozen teacher and its answers, from which a student learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from uknowpan.models.checkpoints import load_model, sha256
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.pancollection.file import PanCollectionFile, check_serves
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.sharpeners import TeacherSharpener
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


class FrozenTeacher(TeacherSharpener):
    """A trained teacher that answers and does not learn.

    Every patch starts from the noise of the seed: its answer is the same in any batch and from a cache.

    Args:
        path: its checkpoint.
        steps: network evaluations per answer; None: as its card declares.
        seed: of the noise.
        device: where the network runs.

    Raises:
        CheckpointError: no readable checkpoint, or one whose card lacks the residual's scale.
        ModelMismatch: a checkpoint of something other than a teacher.
        ValueError: a number of steps that the schedule has not.
    """

    def __init__(self, path: str | Path, *, steps: int | None = None, seed: int = 0, device: str = "cpu"):
        model, card = load_model(path)
        if not isinstance(model, GuidedTeacher):
            raise ModelMismatch(
                f"{card.name} is of the architecture {card.architecture}, which teaches nobody; give a teacher (fsa-t)."
            )
        model.requires_grad_(False)
        super().__init__(model, card, steps=steps, seed=seed, device=device, digest=sha256(path))
        # Rounding depends on the layout of the weights, and a cache may be resumed.
        self.model.to(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def answer(self, batch: PatchBatch) -> TeacherAnswer:
        """Answers to patches divided by full scale, on the teacher's device; in float32 even under autocast.

        Raises:
            ValueError: patches of other bands, or of a size that does not divide.
        """
        condition = Condition(batch.lms, batch.pan).to(self.device, torch.float32)
        with torch.autocast(torch.device(self.device).type, enabled=False):
            output = self._sample(condition, [(0, 0)] * len(batch), 0)
        assert output.log_sigma is not None
        sigma = self._residual_unit * output.log_sigma.exp()
        return TeacherAnswer(condition.lms + self._residual_unit * output.x0, sigma.square(), output.features)

    def check_serves(self, file: PanCollectionFile) -> None:
        """Refuse data that the teacher was not trained for: a ModelMismatch."""
        check_serves(self.card, self.bands, self.multiple, file.header, file.path)


def feature_shapes(config: TeacherConfig, height: int, width: int) -> list[tuple[int, int, int]]:
    """(c, h, w) of a teacher's six features, for patches of height x width PAN pixels."""
    last = len(config.multipliers) - 1
    levels = [*range(last), *range(last, 0, -1)]  # what enters each Down, then each Up
    h, w = height // config.patch, width // config.patch
    return [(config.width * config.multipliers[n], h >> n, w >> n) for n in levels]
