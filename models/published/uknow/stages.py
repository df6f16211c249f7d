"""The three stages of U-Know-DiffPAN (CVPR 2025): PriorNet, teacher FSA-T, student FSA-S.

The teacher is conditioned on PriorNet's expectation; the student learns from truth and teacher.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.checkpoints import load_model
from uknowpan.models.diffusion import Denoiser
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.network import FSAStudentLite
from uknowpan.models.pancollection.condition import PatchConditioner
from uknowpan.models.published.stages import DiffusionOptions, DiffusionStage, PatchData, PatchStage, spread
from uknowpan.models.published.uknow.cache import CachedDataset
from uknowpan.models.published.uknow.distillation import FrozenTeacher, TeacherAnswer
from uknowpan.models.published.uknow.guided import GuidedTeacher, GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.published.uknow.student import FSAStudent
from uknowpan.models.training.losses import beta_nll
from uknowpan.models.training.stages import channels_last
from uknowpan.models.types import Bundle, Condition, Denoised, PatchBatch


@dataclass(frozen=True)
class PriorOptions:
    """Options of the stage `prior`."""

    beta: float = 0.0
    """Exponent of the beta-NLL; published: 0, the plain Gaussian likelihood."""


@dataclass(frozen=True)
class TeacherOptions(DiffusionOptions):
    """Options of the stage `fsa-t`."""

    beta: float = 0.5
    """Exponent of the beta-NLL."""


@dataclass(frozen=True)
class StudentOptions(DiffusionOptions):
    """Options of the stage `fsa-s`."""

    soft_weight: float = 0.1
    """Weight of the distance from the teacher's image; unused without a teacher."""
    feature_weight: float = 0.001
    """Weight of the distance from the teacher's features; unused without a teacher."""
    variance_weight: float = 0.1
    """Weight of the likelihood that trains a variance head, if the network has one."""
    raw_uncertainty: bool = False
    """Simulate the release, which weighs pixels by 1 +- the teacher's variance: about 1e-4, so that all weigh the same
    (B5). By default the variance is brought to [0, 1): variance / (variance + its median in the training data)."""
    flips: bool = False
    """Flip patches at random, see `PatchSampler`."""


class PriorStage(PatchStage):
    """Stage `prior`: a PriorNet learns mean and variance of the truth by their likelihood."""

    name = "prior"
    network: PriorConfig
    options: PriorOptions

    def build(self) -> nn.Module:
        return channels_last(PriorNet(self.network))

    def losses(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> dict[str, Tensor]:
        mean, variance = model(batch.lms, batch.pan)
        return {"nll": beta_nll(mean - batch.gt, 0.5 * variance.log(), self.options.beta)}

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        mean, variance = model(patches.lms, patches.pan)
        return mean, variance.sqrt()


class TeacherStage(DiffusionStage):
    """Stage `fsa-t`: the diffusion teacher, conditioned on PriorNet's expectation and on wavelets."""

    name = "fsa-t"
    network: GuidedTeacherConfig
    options: TeacherOptions

    def __init__(self, network: GuidedTeacherConfig, data: PatchData, options: TeacherOptions, prior: Path):
        super().__init__(network, data, options)
        self.prior = prior
        self.slot = network.teacher.self_conditioning

    def build(self) -> nn.Module:
        model = GuidedTeacher(self.network)
        prior, card = load_model(self.prior)
        try:
            model.prior_net.load_state_dict(prior.state_dict())
        except RuntimeError as error:
            raise ModelMismatch(
                f"{self.prior} ({card.architecture}) is not the PriorNet that is configured here; "
                "give a checkpoint of `uknowpan train --stage prior` on the same bands"
            ) from error
        model.residual_std.copy_(self.residual_std)
        return channels_last(model)

    def losses(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> dict[str, Tensor]:
        condition, x0, _ = self.target(batch)
        output = self.denoise(model, x0, condition, generator)
        assert output.log_sigma is not None
        return {"nll": beta_nll(output.x0 - x0, output.log_sigma, self.options.beta)}

    def sample(self, model: Denoiser, noise: Tensor, condition: Condition) -> Denoised:
        assert isinstance(model, GuidedTeacher)
        return super().sample(model.denoiser(condition), noise, condition)


@dataclass(frozen=True)
class StudentBatch(Bundle):
    """Patches, and the teacher's answers to them where a cache holds them."""

    patches: PatchBatch
    answer: TeacherAnswer | None = None


class StudentStage(DiffusionStage):
    """Stage `fsa-s`: the published student learns from the truth and from a teacher, if there is one.

    mean[(1 + theta) |x0 - x0_S|] + soft mean[(1 - theta) |x0_T - x0_S|]
      + feature sum_i mean sqrt((f_i^T - f_i^S)^2 + 1e-12)          (METHODS 1.5)

    with theta from the teacher's variance: where the teacher is unsure, the truth counts more. A
    variance head learns the error's likelihood, without a gradient to the mean.
    """

    name = "fsa-s"
    network: Any
    options: StudentOptions
    border = 0
    """PAN pixels along a patch's edge that the losses leave out."""

    def __init__(self, network: Any, data: PatchData, options: StudentOptions, teacher: FrozenTeacher | None = None):
        self.teacher = teacher
        super().__init__(network, data, options)
        if isinstance(cached := data.train.dataset, CachedDataset):
            self.notes = {**data.notes, "teacher": str(cached.caches[0].attributes["teacher"])}
        elif teacher is not None:
            self.notes = {**data.notes, "teacher": teacher.card.name}
        self.slot = getattr(network, "self_conditioning", False)
        probe = self._answers([0])
        self.features = probe.features if probe is not None and options.feature_weight else ()
        """The features of an answer, for their shapes; () where none are compared."""
        weighs = probe is not None and not options.raw_uncertainty
        self.median = self._median_variance() if weighs else None
        """(C,) median of the teacher's variance in the training data, the unit of weights."""

    def _answers(self, indices: Sequence[int]) -> TeacherAnswer | None:
        """The teacher's answers to training patches as they are stored."""
        cached = self.data.train.dataset
        if isinstance(cached, CachedDataset):
            return TeacherAnswer.cat([cached[i][1] for i in indices])
        if self.teacher is not None:
            return self.teacher.answer(PatchBatch.cat([self.data.dataset[i] for i in indices]))
        return None

    def _median_variance(self) -> Tensor:
        rows = []
        chosen = spread(len(self.data.dataset), 128)
        for k in range(0, len(chosen), 16):
            answer = self._answers(chosen[k : k + 16])
            assert answer is not None
            rows.append(answer.variance.transpose(0, 1).flatten(1)[:, ::16].cpu())
        return torch.cat(rows, 1).median(1).values

    def theta(self, variance: Tensor) -> Tensor:
        """The part of the weight that depends on the teacher's variance (B, C, H, W)."""
        if self.options.raw_uncertainty:
            return variance
        assert self.median is not None
        self.median = self.median.to(variance)
        return variance / (variance + self.median.view(1, -1, 1, 1))

    def build(self) -> nn.Module:
        student = FSAStudent(self.network)
        if self.features:  # compared as they are
            widths = [self.network.width * m for m in self.network.multipliers]
            mine, theirs = [*widths[:-1], *widths[:0:-1]], [f.shape[1] for f in self.features]
            if mine != theirs:
                raise ModelMismatch(
                    f"the student's features have {mine} channels, the teacher's {theirs}; give both "
                    "the same width and multipliers, or set feature_weight to 0"
                )
        return channels_last(student)

    def batches(self, start: int, stop: int) -> Generator[StudentBatch]:
        cached = isinstance(self.data.train.dataset, CachedDataset)
        for item in super().batches(start, stop):
            yield StudentBatch(*item) if cached else StudentBatch(item)

    def losses(self, model: nn.Module, batch: StudentBatch, generator: torch.Generator) -> dict[str, Tensor]:
        options, answer = self.options, batch.answer
        if answer is None and self.teacher is not None:
            answer = self.teacher.answer(batch.patches)
        condition, x0, scale = self.target(batch.patches)
        output = self.denoise(model, x0, condition, generator)
        inside = slice(self.border, -self.border) if self.border else slice(None)
        inner = (..., inside, inside)
        miss = (output.x0 - x0)[inner]
        if answer is None:
            parts = {"hard": miss.abs().mean()}
        else:
            theta = self.theta(answer.variance)[inner]
            soft = ((answer.sr - condition.lms) / scale - output.x0)[inner]
            parts = {
                "hard": ((1 + theta) * miss.abs()).mean(),
                "soft": options.soft_weight * ((1 - theta) * soft.abs()).mean(),
            }
            if options.feature_weight:
                parts["features"] = options.feature_weight * _feature_distance(output.features, answer.features)
        if output.log_sigma is not None:  # its gradient must not bend the mean
            parts["variance"] = options.variance_weight * beta_nll(miss.detach(), output.log_sigma[inner])
        return parts


def _feature_distance(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Sum over the features of the mean distance, each pair averaged to the coarser grid."""
    total = mine[0].new_zeros(())
    for a, b in zip(mine, theirs, strict=True):
        size = (min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1]))
        a, b = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
        total = total + ((a.float() - b.float()) ** 2 + 1e-12).sqrt().mean()
    return total


class FeatureMatcher(nn.Module):
    """A lite student with 1x1 convolutions from its features to the teacher's (Romero et al. 2015).

    Each of the teacher's features is compared with the student's feature of the nearest
    resolution, both averaged to the coarser grid.
    """

    def __init__(self, student: FSAStudentLite, channels: Sequence[int], factors: Sequence[int]):
        super().__init__()
        self.student = student
        own = student.feature_shapes  # (channels, PAN pixels per feature pixel)
        self.chosen = [min(range(len(own)), key=lambda k: abs(own[k][1] - f)) for f in factors]
        self.project = nn.ModuleList(
            nn.Conv2d(own[k][0], wide, 1) for k, wide in zip(self.chosen, channels, strict=True)
        )

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
        output = self.student(x_t, t, condition, with_features=True)
        features = tuple(project(output.features[k]) for k, project in zip(self.chosen, self.project, strict=True))
        return Denoised(output.x0, output.log_sigma, features)


class LiteStudentStage(StudentStage):
    """Stage `fsa-s` of the `lite` form: conditions from scene statistics, adapters to the features."""

    def __init__(self, network: Any, data: PatchData, options: StudentOptions, teacher: FrozenTeacher | None = None):
        super().__init__(network, data, options, teacher)
        self.conditioner = PatchConditioner(data.dataset)
        self.valid_conditioner = PatchConditioner(data.valid)
        self.border = self.conditioner.border
        file = data.dataset.files[0]
        height, width = file.header.height, file.header.width
        if min(height, width) <= 2 * self.border:
            raise ModelMismatch(
                f"{file.path} has patches of {height} x {width} pixels, of which the lite student "
                f"leaves out {self.border} along every edge; cut the data anew, in larger patches"
            )

    @property
    def factor(self) -> int:
        return FSAStudentLite.pixel_multiple

    def build(self) -> nn.Module:
        student = FSAStudentLite(self.network)
        if not self.features:
            return channels_last(student)
        height = self.data.dataset.files[0].header.height
        shapes = [(f.shape[1], height // f.shape[2]) for f in self.features]
        return channels_last(FeatureMatcher(student, *zip(*shapes, strict=True)))

    def deployed(self, model: nn.Module) -> nn.Module:
        return model.student if isinstance(model, FeatureMatcher) else model

    def view(self, patches: PatchBatch) -> tuple[Condition, Tensor]:
        return self.conditioner.condition(patches)

    def validation_view(self, patches: PatchBatch) -> tuple[Condition, Tensor]:
        # The statistics of the patches at hand, as `sharpen` takes a scene's own.
        return self.valid_conditioner.condition(patches)

    def card_fields(self) -> dict[str, Any]:
        return {**PatchStage.card_fields(self), "steps": self.options.steps, "bands": None}
