"""The last stage of training: the student FSA-S, taught by truth and teacher, or on whole scenes.

`StudentStage` learns from PanCollection files, `GenericStudentStage` from scenes of any sensor.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.checkpoints import Card
from uknowpan.models.diffusion import NoiseSchedule
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.network import FSAStudentLite, LiteConfig
from uknowpan.models.pancollection.condition import PatchConditioner
from uknowpan.models.pancollection.file import PatchBatch
from uknowpan.models.published.stages import (
    DiffusionOptions,
    DiffusionStage,
    PatchData,
    View,
    channels_last,
    noised,
    spread,
)
from uknowpan.models.published.uknow.distillation import CachedDataset, FrozenTeacher, TeacherAnswer
from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig
from uknowpan.models.training.loop import Examples
from uknowpan.models.training.losses import beta_nll, contrast_weighted_l1, contrast_weighted_rms
from uknowpan.models.training.parallel import current_world
from uknowpan.models.training.scenes import GenericBatches, TrainBatch
from uknowpan.models.types import Condition, Denoised

# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class StudentOptions(DiffusionOptions):
    """Of the stage `fsa-s`."""

    soft_weight: float = 0.1
    """Of the distance from the teacher's answer; 0 without a teacher."""
    feature_weight: float = 0.001
    """Of the distance from the teacher's features; 0 without a teacher."""
    variance_weight: float = 0.1
    """Of the likelihood that a variance head learns by, if the network has one."""
    raw_uncertainty: bool = False
    """Simulate the release, which weighs pixels by 1 +- the teacher's variance: about 1e-4, so
    that all weigh the same (B5 of the paper's form). By default the variance is brought to
    [0, 1): variance / (variance + its median in the training data)."""
    flips: bool = False
    """Turn patches over at random, see `PatchSampler`."""


ERRORS = {"l1": contrast_weighted_l1, "rms": contrast_weighted_rms}
"""What the mean of a student of whole scenes is trained by."""


@dataclass(frozen=True)
class GenericOptions:
    """Of the stage `fsa-s` on whole scenes, which knows no teacher."""

    terminal_share: float = 0.7
    """Share of samples trained at the last timestep, where sampling starts."""
    error: str = "l1"
    """l1 or rms, see `uknowpan.models.training.losses`."""
    variance_weight: float = 0.1
    """Of the likelihood that the variance head learns by."""
    subsampled_share: float = 0.0
    """Share of scene variants whose truth is sharper than their PAN."""
    truth_blur_share: float = 0.0
    """Share of scene variants whose truth is blurred as MS are against their PAN, see `Ways`."""

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise ValueError(f"error is {' or '.join(ERRORS)}, not {self.error!r}")


# ----------------------------------------------------------------------- learning from patches


@dataclass(frozen=True)
class StudentBatch:
    """Patches, and what the teacher says of them if it was asked before."""

    patches: PatchBatch
    answer: TeacherAnswer | None = None

    def to(self, *args: Any, **kwargs: Any) -> StudentBatch:
        """Both on another device."""
        answer = None if self.answer is None else self.answer.to(*args, **kwargs)
        return StudentBatch(self.patches.to(*args, **kwargs), answer)


class FeatureMatcher(nn.Module):
    """A student with 1x1 convolutions from its features to the teacher's (Romero et al. 2015).

    For students whose features have other shapes than the teacher's. Each of the teacher's is
    compared with the student's feature of the nearest resolution, both averaged to the coarser.
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
        said = self.student(x_t, t, condition, with_features=True)
        features = tuple(project(said.features[k]) for k, project in zip(self.chosen, self.project, strict=True))
        return Denoised(said.x0, said.log_sigma, features)


class StudentStage(DiffusionStage):
    """Stage `fsa-s`: the student learns from the truth and, where it has one, from a teacher.

    mean[(1 + theta) |x0 - x0_S|] + soft mean[(1 - theta) |x0_T - x0_S|]
      + feature sum_i mean sqrt((f_i^T - f_i^S)^2 + 1e-12)          (METHODS 1.5)

    with theta from the teacher's variance: where the teacher is unsure, the truth counts more. A
    variance head learns the error's likelihood beside it, and bends the answer in nothing.
    A `StudentConfig` is of the published form, a `LiteConfig` of the one for CPUs and any sensor.
    """

    name = "fsa-s"
    options: StudentOptions

    def __init__(
        self,
        network: StudentConfig | LiteConfig,
        data: PatchData,
        options: StudentOptions,
        teacher: FrozenTeacher | None = None,
    ):
        self.lite = isinstance(network, LiteConfig)
        self.architecture = "fsa-s-lite" if self.lite else "fsa-s"
        self.teacher = teacher
        self.cached = isinstance(data.train.dataset, CachedDataset)
        super().__init__(network, data, options)
        self.border = 0
        if self.lite:
            self.conditioner = PatchConditioner(data.dataset)
            self.valid_conditioner = PatchConditioner(data.valid)
            self.border = self.conditioner.border
            self._check_inner()
        self.probe = self._answers([0])
        """An answer, for the shapes of features; None without a teacher."""
        weighs = self.probe is not None and not options.raw_uncertainty
        self.median = self._median_variance() if weighs else None
        """(C,) of the teacher's variance in the training data, where weights are relative to it."""

    @property
    def factor(self) -> int:
        if isinstance(self.network, LiteConfig):
            return FSAStudentLite.pixel_multiple
        return 2 ** (len(self.network.multipliers) - 1)

    def _check_inner(self) -> None:
        """Something must be left of patches without their border."""
        file, edge = self.data.dataset.files[0], self.border
        height, width = file.header.height, file.header.width
        if min(height, width) <= 2 * edge:
            raise ModelMismatch(
                f"{file.path} has patches of {height} x {width} pixels, of which the lite student "
                f"leaves out {edge} along every edge; cut the data anew, in larger patches"
            )

    # ------------------------------------------------------------------ what the teacher says

    def _answers(self, indices: Sequence[int]) -> TeacherAnswer | None:
        """Of single training patches, without turning them."""
        cached = self.data.train.dataset
        if isinstance(cached, CachedDataset):
            return TeacherAnswer.cat([cached[i][1] for i in indices])
        if self.teacher is not None:
            patches = PatchBatch.cat([self.data.dataset[i] for i in indices])
            return self.teacher.answer(patches.to(self.teacher.device))
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
        """The weight's part that depends on the teacher's variance (B, C, H, W)."""
        if self.options.raw_uncertainty:
            return variance
        assert self.median is not None
        return variance / (variance + self.median.to(variance).view(1, -1, 1, 1))

    # ------------------------------------------------------------------------- what is trained

    def build(self) -> nn.Module:
        if not isinstance(self.network, LiteConfig):
            student: nn.Module = FSAStudent(self.network)
            self._check_features()
            return channels_last(student)
        lite = FSAStudentLite(self.network)
        if self.probe is None or not self.options.feature_weight:
            return channels_last(lite)
        height = self.data.dataset.files[0].header.height
        shapes = [(f.shape[1], height // f.shape[2]) for f in self.probe.features]
        return channels_last(FeatureMatcher(lite, *zip(*shapes, strict=True)))

    def _check_features(self) -> None:
        """Features that are compared as they are must have equal channels."""
        if self.probe is None or not self.options.feature_weight:
            return
        config = self.network
        widths = [config.width * m for m in config.multipliers]
        mine = [*widths[:-1], *widths[:0:-1]]
        theirs = [f.shape[1] for f in self.probe.features]
        if mine != theirs:
            raise ModelMismatch(
                f"the student's features have {mine} channels, the teacher's {theirs}; give both "
                "the same width and multipliers, or set feature_weight to 0"
            )

    def deployed(self, model: nn.Module) -> nn.Module:
        return model.student if isinstance(model, FeatureMatcher) else model

    def batches(self, start: int, stop: int) -> Generator[StudentBatch]:
        for item in self.data.batches(start, stop):
            yield StudentBatch(*item) if self.cached else StudentBatch(item)

    def view(self, patches: PatchBatch) -> View:
        if not self.lite:
            return super().view(patches)
        return View(*self.conditioner.condition(patches))

    def validation_view(self, patches: PatchBatch) -> View:
        if not self.lite:
            return super().validation_view(patches)
        # The statistics of the patches at hand, as `sharpen` takes a scene's own.
        return View(*self.valid_conditioner.condition(patches))

    def losses(self, model: nn.Module, batch: StudentBatch, generator: torch.Generator) -> dict[str, Tensor]:
        options, patches = self.options, batch.patches
        assert patches.gt is not None
        answer = batch.answer
        if answer is None and self.teacher is not None:
            answer = self.teacher.answer(patches)
        with torch.autocast(patches.gt.device.type, enabled=False):
            view = self.view(patches)
        lms = view.condition.lms
        x0 = (patches.gt - lms) / view.scale
        slot = not self.lite and self.network.self_conditioning
        said = self.denoise(model, x0, view.condition, generator, slot)
        inner = self._inner(x0)
        miss = (said.x0 - x0)[inner]
        if answer is None:
            parts = {"hard": miss.abs().mean()}
        else:
            theta = self.theta(answer.variance)[inner]
            soft = ((answer.sr - lms) / view.scale - said.x0)[inner]
            parts = {
                "hard": ((1 + theta) * miss.abs()).mean(),
                "soft": options.soft_weight * ((1 - theta) * soft.abs()).mean(),
            }
            if options.feature_weight:
                between = _feature_distance(said.features, answer.features)
                parts["features"] = options.feature_weight * between
        if said.log_sigma is not None:  # its gradient must not bend the mean
            nll = beta_nll(miss.detach(), said.log_sigma[inner])
            parts["variance"] = options.variance_weight * nll
        return parts

    def _inner(self, x: Tensor) -> tuple[Any, ...]:
        edge = self.border
        cut = slice(edge, -edge) if edge else slice(None)
        return (..., cut, cut)

    def _card_fields(self) -> dict[str, Any]:
        fields = super()._card_fields()
        if self.lite:
            ratio = self.data.dataset.files[0].header.ratio
            fields = {"steps": self.options.steps, "bands": None, "ratios": [ratio]}
        return fields

    def _notes(self) -> dict[str, Any]:
        cached = self.data.train.dataset
        if isinstance(cached, CachedDataset):
            return {"teacher": str(cached.caches[0].attributes["teacher"])}
        return {} if self.teacher is None else {"teacher": self.teacher.card.name}


def _feature_distance(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    """Sum over the features of the mean distance, each pair averaged to the coarser grid."""
    total = mine[0].new_zeros(())
    for a, b in zip(mine, theirs, strict=True):
        size = (min(a.shape[-2], b.shape[-2]), min(a.shape[-1], b.shape[-1]))
        a, b = (x if x.shape[-2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
        total = total + ((a.float() - b.float()) ** 2 + 1e-12).sqrt().mean()
    return total


# ------------------------------------------------------------------------ learning from scenes


class GenericStudentStage:
    """Stage `fsa-s` of the `lite` form on whole scenes, degraded anew at every step; the truth is
    the only target. It validates, and is meant to sharpen, in one step.
    """

    name = "fsa-s"
    border = 4
    """PAN pixels along a patch's edge that the loss leaves out (they saw zero padding)."""

    def __init__(
        self,
        network: LiteConfig,
        train: GenericBatches,
        valid: GenericBatches,
        *,
        options: GenericOptions | None = None,
        validation_batches: int = 12,
        notes: dict[str, Any] | None = None,
    ):
        self.network = network
        self.options = options or GenericOptions()
        self.schedule = NoiseSchedule.cosine(network.timesteps)
        self.train_data, self.valid_data = train, valid
        self.validation_batches, self.notes = validation_batches, notes or {}
        self.world = current_world()

    def data_identity(self) -> dict[str, Any]:
        return {
            split: {
                "scenes": [scene.name for scene in data.scenes],
                "sizes": [list(scene.gt.shape) for scene in data.scenes],
            }
            for split, data in (("train", self.train_data), ("valid", self.valid_data))
        }

    def build(self) -> nn.Module:
        return channels_last(FSAStudentLite(self.network))

    def batch(self, step: int) -> TrainBatch:
        """Of one step: this process's share."""
        batch = self.train_data(step)
        own = self.world.own
        condition = batch.condition._map(lambda name, x: own(x))
        return TrainBatch(condition, own(batch.x0), own(batch.scale))

    def batches(self, start: int, stop: int) -> Generator[TrainBatch]:
        for step in range(start, stop):
            yield self.batch(step)

    def deployed(self, model: nn.Module) -> nn.Module:
        return model

    def examples(self, model: nn.Module) -> Examples | None:
        return None

    def losses(self, model: nn.Module, batch: TrainBatch, generator: torch.Generator) -> dict[str, Tensor]:
        options, condition = self.options, batch.condition
        x_t, t = noised(self.schedule, batch.x0, options.terminal_share, generator, self.world)
        said = model(x_t, t, condition)
        inner = (..., slice(self.border, -self.border), slice(self.border, -self.border))
        x0, target = said.x0[inner], batch.x0[inner]
        assert said.log_sigma is not None
        error = (x0 - target).detach()  # the variance head must not bend the mean
        return {
            options.error: ERRORS[options.error](x0, target),
            "variance": options.variance_weight * beta_nll(error, said.log_sigma[inner]),
        }

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        score, rmse, local, coverage = 0.0, 0.0, 0.0, 0.0
        last, device = len(self.schedule) - 1, next(model.parameters()).device
        generator = torch.Generator().manual_seed(7)
        for step in range(self.validation_batches):
            batch = self.valid_data(step).to(device)
            t = torch.full((len(batch.x0),), last, device=device)
            x_t = torch.randn(batch.x0.shape, generator=generator).to(device)
            said = model(x_t, t, batch.condition)
            assert batch.condition.band_features is not None and said.log_sigma is not None
            error = said.x0 - batch.x0
            score += float(contrast_weighted_l1(said.x0, batch.x0))
            rmse += float(error.square().mean().sqrt())
            injected = batch.condition.band_features[:, :, 1]
            local += float((injected - batch.x0).square().mean().sqrt())
            coverage += float((error.abs() < said.log_sigma.exp()).float().mean())
        n = self.validation_batches
        return {
            "score": score / n,
            "rmse": rmse / n,
            "rmse_over_local_injection": rmse / local,
            "coverage_1_sigma": coverage / n,
        }

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
        return Card(
            name=name,
            architecture="fsa-s-lite",
            config=asdict(self.network),
            stage=self.name,
            residual_scale=self.train_data.residual_scale,
            training={**self.notes, "iterations": step},
            scores={"validation_patches": scores},
        )
