"""The stages of training: what each network learns, from what, and how it is scored.

U-Know-DiffPAN (CVPR 2025) in three stages: a PriorNet, the teacher FSA-T that is told what the
PriorNet expects, the student FSA-S that learns from truth and teacher. The defects of the release
are mended by default; each flag of the options brings one of them back, to be measured.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import Card, load_model
from .data import GenericBatches, TrainBatch
from .diffusion import NoiseSchedule, add_noise, ddim_sample
from .distillation import CachedDataset, FrozenTeacher, TeacherAnswer
from .errors import DataError, ModelMismatch
from .guided import GuidedTeacher, GuidedTeacherConfig
from .losses import beta_nll, contrast_weighted_l1
from .metrics import ergas, psnr, q2n, sam
from .noise import position_noise
from .pancollection import PanCollectionDataset, PatchBatch, PatchBatches
from .parallel import World, current_world
from .patch_condition import PatchConditioner
from .prior import PriorConfig, PriorNet
from .student import FSAStudent, StudentConfig
from .student_lite import FSAStudentLite, LiteConfig
from .training import Examples
from .types import Condition, Denoised

__all__ = [
    "GenericStudentStage",
    "PatchData",
    "PriorOptions",
    "PriorStage",
    "StudentOptions",
    "StudentStage",
    "TeacherOptions",
    "TeacherStage",
    "patch_scores",
    "residual_std_of",
    "validation_patches",
]

TIMESTEPS = 500
"""Length of the published noise schedule."""
VALIDATION_BATCH = 32
EXAMPLES = 4
STATISTICS_SAMPLES = 512
"""Training patches that the residual's standard deviation is taken from."""


# ------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class PriorOptions:
    """Of the stage `prior`."""

    beta: float = 0.0
    """Of the beta-NLL; published: 0, the plain Gaussian likelihood."""


@dataclass(frozen=True)
class DiffusionOptions:
    """What teacher and student stages share."""

    steps: int = 1
    """Network evaluations when validating, and by default when sharpening; published: 25."""
    terminal_share: float = 0.0
    """Share of samples trained at the last timestep, where sampling starts; the others are drawn
    evenly, as published."""
    self_conditioning: bool = True
    """Sampling hands each step the prediction of the one before, as training does for half of the
    batches. The release trains for it and never does it (B2). Networks with a slot for it only."""
    respaced_time_index: bool = False
    """Simulate the release, which tells the network the number of the sampling step instead of
    its timestep (B1)."""
    raw_residual: bool = False
    """Simulate the release, which diffuses the residual gt - lms as it is, about 0.03 beside noise
    of 1 (B4). By default it is divided by its standard deviation in the training data."""


@dataclass(frozen=True)
class TeacherOptions(DiffusionOptions):
    """Of the stage `fsa-t`."""

    beta: float = 0.5
    """Of the beta-NLL."""


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


GENERIC_OPTIONS = StudentOptions(terminal_share=0.7, soft_weight=0.0, feature_weight=0.0)
"""Of the stage on whole scenes, which knows no teacher."""


# ---------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class PatchData:
    """PanCollection files to train on and to validate on."""

    train: PatchBatches
    valid: PanCollectionDataset
    validation_samples: int = 256
    workers: int = 0
    device: str = "cpu"
    """Where the network is trained: batches bound for a GPU are read into pinned memory."""
    notes: dict[str, Any] = field(default_factory=dict)
    """For the card: command, files, versions."""

    @property
    def dataset(self) -> PanCollectionDataset:
        """The training patches."""
        found = self.train.dataset
        found = found.dataset if isinstance(found, CachedDataset) else found
        assert isinstance(found, PanCollectionDataset)
        return found

    @property
    def bands(self) -> int:
        return self.valid.files[0].header.bands

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """Training batches of the steps."""
        pinned = torch.device(self.device).type == "cuda"
        try:
            yield from self.train.stream(start, stop, workers=self.workers, pin_memory=pinned)
        except DataError as error:  # of a worker process: its traceback, then the sentence
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error

    def card_fields(self) -> dict[str, Any]:
        """What the data decide of a card."""
        headers = [file.header for file in self.dataset.files]
        scales = set(self.dataset.scales)
        sensors = {header.sensor for header in headers}
        return {
            "sensor": sensors.pop() or "generic" if len(sensors) == 1 else "generic",
            "ratios": [headers[0].ratio],
            "registration": headers[0].registration,
            "max_value": scales.pop() if len(scales) == 1 else None,
        }


def residual_std_of(dataset: PanCollectionDataset, samples: int = STATISTICS_SAMPLES) -> Tensor:
    """(C,) root mean square of gt - lms per band, over patches spread evenly.

    Raises:
        DataError: a band without any residual.
    """
    squares, count = torch.zeros(0), 0
    for index in _spread(len(dataset), samples):
        patch = dataset[index]
        assert patch.gt is not None
        power = (patch.gt - patch.lms).double().square().mean((0, 2, 3))
        squares = power if count == 0 else squares + power
        count += 1
    std = (squares / count).sqrt()
    if not bool((std > 0).all()):
        raise DataError(
            f"In band {int(std.argmin()) + 1} of the training data truth and LMS are the same, so "
            "there is nothing to learn; leave that band out."
        )
    return std.float()


def _spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, spread evenly."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


# --------------------------------------------------------------------------------------- stages


class _PatchStage:
    """What the stages on PanCollection files share: batches, validation, cards."""

    name = ""
    architecture = ""

    def __init__(self, network: Any, data: PatchData, options: Any):
        if network is not None and getattr(network, "bands", data.bands) != data.bands:
            raise ModelMismatch(
                f"the network takes {network.bands} bands, the files hold {data.bands}; give both "
                "the same"
            )
        self.network, self.data, self.options = network, data, options
        self.world: World = current_world()
        for file in (*data.dataset.files, *data.valid.files):
            height, width = file.header.height, file.header.width
            if height % self.factor or width % self.factor:
                raise ModelMismatch(
                    f"{file.path} has patches of {height} x {width} pixels, but the network needs "
                    f"multiples of {self.factor}; cut the data anew"
                )

    @property
    def factor(self) -> int:
        """Heights and widths of patches must be multiples of it."""
        return 1

    def batches(self, start: int, stop: int) -> Generator[Any]:
        yield from self.data.batches(start, stop)

    def deployed(self, model: nn.Module) -> nn.Module:
        return model

    def predict(
        self, model: nn.Module, patches: PatchBatch, place: int
    ) -> tuple[Tensor, Tensor | None]:
        """The sharpened patches and their 1-sigma, both in the units of lms; `place` is the
        number of the first patch, which fixes the noise."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        device, valid = next(model.parameters()).device, self.data.valid
        found: dict[str, list[Tensor]] = {}
        held: list[Tensor] = []
        for place, patches, scale in validation_patches(valid, self.data.validation_samples):
            patches = patches.to(device)
            hrms, sigma = self.predict(model, patches, place)
            assert patches.gt is not None
            if sigma is not None:
                held.append(((hrms - patches.gt).abs() < sigma).float().mean((1, 2, 3)))
            for name, value in patch_scores(hrms, patches, scale).items():
                found.setdefault(name, []).append(value)
        scores = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        if held:
            scores["coverage_1_sigma"] = float(torch.cat(held).mean())
        return {"score": scores["ergas"], **scores}

    @torch.no_grad()
    def examples(self, model: nn.Module) -> Examples | None:
        device, valid = next(model.parameters()).device, self.data.valid
        parts = [valid[i] for i in _spread(len(valid), EXAMPLES)]
        patches = PatchBatch.cat(parts).to(device)
        hrms, sigma = self.predict(model, patches, 0)
        assert patches.gt is not None
        return Examples(patches.pan, patches.lms, hrms, patches.gt, sigma)

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
        return Card(
            name=name,
            architecture=self.architecture,
            config=asdict(self.network),
            stage=self.name,
            training={**self.data.notes, **self._notes(), "iterations": step},
            scores={"validation_patches": scores},
            **{**self.data.card_fields(), "bands": self.data.bands, **self._card_fields()},
        )

    def _card_fields(self) -> dict[str, Any]:
        return {}

    def _notes(self) -> dict[str, Any]:
        return {}


def patch_scores(hrms: Tensor, patches: PatchBatch, scale: float) -> dict[str, Tensor]:
    """SAM, ERGAS, PSNR and Q2n of each patch, (B,); `scale` is their full scale in DN."""
    assert patches.gt is not None
    # As published, results are clipped to what digital numbers can be.
    fused, gt = hrms.clamp(0, 1).double() * scale, patches.gt.double() * scale
    ratio = patches.pan.shape[-1] / patches.ms.shape[-1]
    return {
        "sam": sam(fused, gt),
        "ergas": ergas(fused, gt, ratio),
        "psnr": psnr(fused, gt, scale),
        "q2n": q2n(fused, gt),
    }


def validation_patches(
    valid: PanCollectionDataset, most: int
) -> Iterator[tuple[int, PatchBatch, float]]:
    """At most so many patches, spread evenly: (number of the first, patches of one file, their
    full scale in DN)."""
    chosen = _spread(len(valid), most)
    for number, scale in enumerate(valid.scales):
        first, after = int(valid.starts[number]), int(valid.starts[number + 1])
        own = [i for i in chosen if first <= i < after]
        for k in range(0, len(own), VALIDATION_BATCH):
            part = own[k : k + VALIDATION_BATCH]
            yield part[0], PatchBatch.cat([valid[i] for i in part]), scale


class PriorStage(_PatchStage):
    """Stage `prior`: a PriorNet learns mean and variance of the truth by their likelihood."""

    name = architecture = "prior"

    def __init__(self, network: PriorConfig, data: PatchData, options: PriorOptions):
        super().__init__(network, data, options)

    def build(self) -> nn.Module:
        return _channels_last(PriorNet(self.network))

    def losses(
        self, model: nn.Module, batch: PatchBatch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert batch.gt is not None
        mean, variance = model(batch.lms, batch.pan)
        return {"nll": beta_nll(mean - batch.gt, 0.5 * variance.log(), self.options.beta)}

    def predict(
        self, model: nn.Module, patches: PatchBatch, place: int
    ) -> tuple[Tensor, Tensor | None]:
        mean, variance = model(patches.lms, patches.pan)
        return mean, variance.sqrt()


def _noised(
    schedule: NoiseSchedule,
    x0: Tensor,
    terminal_share: float,
    generator: torch.Generator,
    world: World,
) -> tuple[Tensor, Tensor]:
    """(x_t, t): a share of the samples at the last timestep, the others anywhere; drawn for the
    batch of all processes."""
    count, last = len(x0) * world.size, len(schedule) - 1
    t = torch.randint(0, last + 1, (count,), generator=generator)
    at_end = torch.rand(count, generator=generator) < terminal_share
    t = world.own(torch.where(at_end, torch.full_like(t, last), t)).to(x0.device)
    noise = world.own(torch.randn((count, *x0.shape[1:]), generator=generator)).to(x0.device)
    return add_noise(schedule, x0, t, noise), t


@dataclass(frozen=True)
class View:
    """Patches as a denoiser sees them."""

    condition: Condition
    scale: Tensor
    """(B or 1, C, 1, 1): x0 = (gt - condition.lms) / scale."""


class _DiffusionStage(_PatchStage):
    """What teacher and student share: x0-prediction at random timesteps, sampling by DDIM."""

    options: DiffusionOptions

    def __init__(self, network: Any, data: PatchData, options: DiffusionOptions):
        super().__init__(network, data, options)
        self.schedule = NoiseSchedule.cosine(getattr(network, "timesteps", TIMESTEPS))
        if not 1 <= options.steps <= len(self.schedule):
            raise ModelMismatch(
                f"{options.steps} sampling steps do not fit {len(self.schedule)} timesteps; choose "
                f"steps from 1 to {len(self.schedule)}"
            )
        bands = data.bands
        raw = options.raw_residual
        self.residual_std = torch.ones(bands) if raw else residual_std_of(data.dataset)

    def view(self, patches: PatchBatch) -> View:
        scale = self.residual_std.to(patches.lms).view(1, -1, 1, 1)
        return View(Condition(patches.lms, patches.pan), scale)

    def denoise(
        self,
        model: nn.Module,
        x0: Tensor,
        condition: Condition,
        generator: torch.Generator,
        slot: bool,
    ) -> Denoised:
        """Train at random timesteps; with a `slot`, half of the batches are self-conditioned
        (Chen et al. 2023): the network sees what it predicts without."""
        share = self.options.terminal_share
        x_t, t = _noised(self.schedule, x0, share, generator, self.world)
        again = float(torch.rand(1, generator=generator)) < 0.5
        if slot and again:
            with torch.no_grad():
                said = model(x_t, t, condition)
            condition = replace(condition, self_cond=said.x0.detach())
        return model(x_t, t, condition)

    def predict(
        self, model: nn.Module, patches: PatchBatch, place: int
    ) -> tuple[Tensor, Tensor | None]:
        view = self.view(patches)
        count, bands, height, width = patches.lms.shape
        noise = torch.stack(
            [position_noise(7, (place + i) * height, 0, height, width, bands) for i in range(count)]
        ).to(patches.lms)
        said = self.sample(model, noise, view.condition)
        sigma = None if said.log_sigma is None else said.log_sigma.exp() * view.scale
        return view.condition.lms + view.scale * said.x0, sigma

    def sample(self, model: nn.Module, noise: Tensor, condition: Condition) -> Denoised:
        """DDIM from pure noise."""
        return ddim_sample(
            model,
            noise,
            self.schedule.respace(self.options.steps),
            self.schedule,
            condition,
            respaced_time_index=self.options.respaced_time_index,
            self_conditioning=self.options.self_conditioning,
        )

    def _card_fields(self) -> dict[str, Any]:
        return {
            "residual_std": [round(v, 9) for v in self.residual_std.tolist()],
            "steps": self.options.steps,
            "self_conditioning": self.options.self_conditioning,
        }


class TeacherStage(_DiffusionStage):
    """Stage `fsa-t`: the diffusion teacher, told of PriorNet's expectation and of wavelets."""

    name = architecture = "fsa-t"
    options: TeacherOptions

    def __init__(
        self, network: GuidedTeacherConfig, data: PatchData, options: TeacherOptions, prior: Path
    ):
        super().__init__(network, data, options)
        self.prior = prior
        if network.teacher.bands != data.bands:
            raise ModelMismatch(
                f"the teacher takes {network.teacher.bands} bands, the files hold {data.bands}; "
                "give both the same"
            )

    @property
    def factor(self) -> int:
        return self.network.teacher.factor

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
        return _channels_last(model)

    def losses(
        self, model: nn.Module, batch: PatchBatch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        assert batch.gt is not None
        view = self.view(batch)
        x0 = (batch.gt - batch.lms) / view.scale
        slot = self.network.teacher.self_conditioning
        said = self.denoise(model, x0, view.condition, generator, slot)
        assert said.log_sigma is not None
        return {"nll": beta_nll(said.x0 - x0, said.log_sigma, self.options.beta)}

    def sample(self, model: nn.Module, noise: Tensor, condition: Condition) -> Denoised:
        assert isinstance(model, GuidedTeacher)
        prior = model.encode_prior(condition)
        return super().sample(
            lambda x_t, t, known: model(x_t, t, known, prior),  # type: ignore[arg-type]
            noise,
            condition,
        )


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
        features = tuple(
            project(said.features[k]) for k, project in zip(self.chosen, self.project, strict=True)
        )
        return Denoised(said.x0, said.log_sigma, features)


class StudentStage(_DiffusionStage):
    """Stage `fsa-s`: the student learns from the truth and, where it has one, from a teacher.

    mean[(1 + theta) |x0 - x0_S|] + soft mean[(1 - theta) |x0_T - x0_S|]
      + feature sum_i mean sqrt((f_i^T - f_i^S)^2 + 1e-12)          (METHODS 1.5)

    with theta from the teacher's variance: where the teacher is unsure, the truth counts more.
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
        self.probe = self._probe()
        self.median = None if self.probe is None else self._median_variance()

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

    def _probe(self) -> TeacherAnswer | None:
        """An answer, for the shapes of features."""
        return self._answers([0])

    def _median_variance(self) -> Tensor:
        """(C,) of the teacher's variance in the training data."""
        rows = []
        chosen = _spread(len(self.data.dataset), 128)
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
            self._check_features(student)
            return _channels_last(student)
        lite = FSAStudentLite(self.network)
        if self.probe is None or not self.options.feature_weight:
            return _channels_last(lite)
        height = self.data.dataset.files[0].header.height
        shapes = [(f.shape[1], height // f.shape[2]) for f in self.probe.features]
        return _channels_last(FeatureMatcher(lite, *zip(*shapes, strict=True)))

    def _check_features(self, student: nn.Module) -> None:
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

    def losses(
        self, model: nn.Module, batch: StudentBatch, generator: torch.Generator
    ) -> dict[str, Tensor]:
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

    def predict(
        self, model: nn.Module, patches: PatchBatch, place: int
    ) -> tuple[Tensor, Tensor | None]:
        if self.lite:  # the statistics of the patches at hand, as `sharpen` takes a scene's own
            mine, self.conditioner = self.conditioner, self.valid_conditioner
            try:
                return super().predict(model, patches, place)
            finally:
                self.conditioner = mine
        return super().predict(model, patches, place)

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


def _channels_last(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class GenericStudentStage:
    """Stage `fsa-s` of the `lite` form on whole scenes, degraded anew at every step; the truth is
    the only target."""

    name = "fsa-s"
    border = 4
    """PAN pixels along a patch's edge that the loss leaves out (they saw zero padding)."""

    def __init__(
        self,
        network: LiteConfig,
        train: GenericBatches,
        valid: GenericBatches,
        *,
        options: StudentOptions | None = None,
        validation_batches: int = 12,
        notes: dict[str, Any] | None = None,
    ):
        self.network = network
        self.options = options or GENERIC_OPTIONS
        self.schedule = NoiseSchedule.cosine(network.timesteps)
        self.train_data, self.valid_data = train, valid
        self.validation_batches, self.notes = validation_batches, notes or {}
        self.world = current_world()

    def build(self) -> nn.Module:
        return _channels_last(FSAStudentLite(self.network))

    def batch(self, step: int) -> TrainBatch:
        """Of one step: this process's share."""
        batch = self.train_data(step)
        own = self.world.own
        condition = batch.condition._map(lambda name, x: own(x))
        return TrainBatch(condition, own(batch.x0))

    def batches(self, start: int, stop: int) -> Generator[TrainBatch]:
        for step in range(start, stop):
            yield self.batch(step)

    def deployed(self, model: nn.Module) -> nn.Module:
        return model

    def examples(self, model: nn.Module) -> Examples | None:
        return None

    def losses(
        self, model: nn.Module, batch: TrainBatch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        share = self.options.terminal_share
        x_t, t = _noised(self.schedule, batch.x0, share, generator, self.world)
        said = model(x_t, t, batch.condition)
        inner = (..., slice(self.border, -self.border), slice(self.border, -self.border))
        x0, target = said.x0[inner], batch.x0[inner]
        assert said.log_sigma is not None
        error = (x0 - target).detach()  # the variance head must not bend the mean
        return {
            "l1": contrast_weighted_l1(x0, target),
            "variance": self.options.variance_weight * beta_nll(error, said.log_sigma[inner]),
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
