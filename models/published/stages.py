"""The stages of training: what each network learns, from what, and how it is scored.

U-Know-DiffPAN (CVPR 2025) in three stages: a PriorNet, the teacher FSA-T that is told what the
PriorNet expects, the student FSA-S that learns from truth and teacher. Here are the first two and
what all share; the third is in `student_stages`. The defects of the release are mended by default;
each flag of the options brings one of them back, to be measured.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uknowpan.models.architectures import TIMESTEPS
from uknowpan.models.checkpoints import Card, load_model
from uknowpan.models.diffusion import NoiseSchedule, add_noise, ddim_sample, position_noise
from uknowpan.models.errors import DataError, ModelMismatch
from uknowpan.models.metrics.indices import ergas, psnr, q2n, sam
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches
from uknowpan.models.pancollection.file import PatchBatch
from uknowpan.models.published.uknow.guided import GuidedTeacher, GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.training.loop import Examples
from uknowpan.models.training.losses import beta_nll
from uknowpan.models.training.parallel import World, current_world
from uknowpan.models.types import Condition, Denoised

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
    of 1 (B4). By default it is divided by its standard deviation in the training data. Networks of
    the published form only: the lite student's residual is in units of the scene's contrast."""


@dataclass(frozen=True)
class TeacherOptions(DiffusionOptions):
    """Of the stage `fsa-t`."""

    beta: float = 0.5
    """Of the beta-NLL."""


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
        return self.train.dataset.patches

    @property
    def bands(self) -> int:
        """C, of every file."""
        return self.valid.files[0].header.bands

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """Training batches of the steps `start` .. `stop` - 1.

        Raises:
            DataError: samples that cannot be read, in one sentence from worker processes too.
        """
        pinned = torch.device(self.device).type == "cuda"
        try:
            yield from self.train.stream(start, stop, workers=self.workers, pin_memory=pinned)
        except DataError as error:  # of a worker process: its traceback, then the sentence
            raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error

    def identity(self) -> dict[str, Any]:
        """Names, counts and full scales of the files."""
        return {
            split: {
                "files": [Path(file.path).name for file in dataset.files],
                "samples": [len(file) for file in dataset.files],
                "full_scales": list(dataset.scales),
            }
            for split, dataset in (("train", self.dataset), ("valid", self.valid))
        }

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
    for index in spread(len(dataset), samples):
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


def spread(count: int, most: int) -> list[int]:
    """At most so many of `count` indices, spread evenly."""
    most = min(count, most)
    return [i * count // most for i in range(most)]


# --------------------------------------------------------------------------------------- stages


def channels_last(model: nn.Module) -> nn.Module:
    """The network with its weights in the memory format that convolutions are fastest in."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class PatchStage:
    """What the stages on PanCollection files share: batches, validation, cards."""

    name = ""
    architecture = ""

    def __init__(self, network: Any, data: PatchData, options: Any):
        if getattr(network, "bands", data.bands) != data.bands:
            raise ModelMismatch(
                f"the network takes {network.bands} bands, the files hold {data.bands}; give both the same"
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

    def data_identity(self) -> dict[str, Any]:
        return self.data.identity()

    def batches(self, start: int, stop: int) -> Generator[Any]:
        yield from self.data.batches(start, stop)

    def deployed(self, model: nn.Module) -> nn.Module:
        return model

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        """The sharpened patches and their 1-sigma, both in the units of lms; `place` is the
        number of the first patch, which fixes the noise."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        device, valid = next(model.parameters()).device, self.data.valid
        found: dict[str, list[Tensor]] = {}
        held: list[Tensor] = []
        numbers = True
        for place, patches, scale in validation_patches(valid, self.data.validation_samples):
            patches = patches.to(device)
            hrms, sigma = self.predict(model, patches, place)
            assert patches.gt is not None
            numbers &= not bool(hrms.isnan().any())
            if sigma is not None:
                held.append(((hrms - patches.gt).abs() < sigma).float().mean((1, 2, 3)))
            for name, value in patch_scores(hrms, patches, scale).items():
                found.setdefault(name, []).append(value)
        scores = {name: float(torch.cat(values).nanmean()) for name, values in found.items()}
        if held:
            scores["coverage_1_sigma"] = float(torch.cat(held).mean())
        if not numbers:  # a network's fault, which no mean may pass over
            scores = dict.fromkeys(scores, math.nan)
        return {"score": scores["ergas"], **scores}

    @torch.no_grad()
    def examples(self, model: nn.Module) -> Examples | None:
        device, valid = next(model.parameters()).device, self.data.valid
        parts = [valid[i] for i in spread(len(valid), EXAMPLES)]
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
    """SAM, ERGAS, PSNR and Q2n of each patch, (B,); `scale` is their full scale in DN.

    NaN where a score is undefined: SAM of a patch of zeros only, ERGAS where a band of the truth
    is zero, PSNR of two patches of zeros.
    """
    assert patches.gt is not None
    # As published, results are clipped to what digital numbers can be.
    fused, gt = hrms.clamp(0, 1).double() * scale, patches.gt.double() * scale
    ratio = patches.pan.shape[-1] / patches.ms.shape[-1]
    relative, peak = ergas(fused, gt, ratio), psnr(fused, gt, scale)
    dark = (gt == 0).flatten(1).all(1)
    return {
        "sam": _sam_where_defined(fused, gt),
        "ergas": relative.masked_fill(relative.isinf(), math.nan),
        "psnr": peak.masked_fill(dark & peak.isinf(), math.nan),
        "q2n": q2n(fused, gt),
    }


def _sam_where_defined(fused: Tensor, gt: Tensor) -> Tensor:
    """SAM of each patch, (B,); NaN where no pixel has an angle."""
    norms = ((fused * fused).sum(1) * (gt * gt).sum(1)).sqrt()
    has_angle = (norms > 0).flatten(1).any(1)
    angles = fused.new_full((len(fused),), math.nan)
    if bool(has_angle.any()):
        angles[has_angle] = sam(fused[has_angle], gt[has_angle])
    return angles


def validation_patches(valid: PanCollectionDataset, most: int) -> Iterator[tuple[int, PatchBatch, float]]:
    """At most so many patches, spread evenly: (number of the first, patches of one file, their
    full scale in DN)."""
    chosen = spread(len(valid), most)
    for number, scale in enumerate(valid.scales):
        first, after = int(valid.starts[number]), int(valid.starts[number + 1])
        own = [i for i in chosen if first <= i < after]
        for k in range(0, len(own), VALIDATION_BATCH):
            part = own[k : k + VALIDATION_BATCH]
            yield part[0], PatchBatch.cat([valid[i] for i in part]), scale


class PriorStage(PatchStage):
    """Stage `prior`: a PriorNet learns mean and variance of the truth by their likelihood."""

    name = architecture = "prior"

    def __init__(self, network: PriorConfig, data: PatchData, options: PriorOptions):
        super().__init__(network, data, options)

    def build(self) -> nn.Module:
        return channels_last(PriorNet(self.network))

    def losses(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> dict[str, Tensor]:
        assert batch.gt is not None
        mean, variance = model(batch.lms, batch.pan)
        return {"nll": beta_nll(mean - batch.gt, 0.5 * variance.log(), self.options.beta)}

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        mean, variance = model(patches.lms, patches.pan)
        return mean, variance.sqrt()


def noised(
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
    """What it is told of them."""
    scale: Tensor
    """(B or 1, C, 1, 1): x0 = (gt - condition.lms) / scale."""


class DiffusionStage(PatchStage):
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
        """Training patches, in the units of `residual_std`."""
        scale = self.residual_std.to(patches.lms).view(1, -1, 1, 1)
        return View(Condition(patches.lms, patches.pan), scale)

    def validation_view(self, patches: PatchBatch) -> View:
        """Validation patches."""
        return self.view(patches)

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
        x_t, t = noised(self.schedule, x0, share, generator, self.world)
        again = float(torch.rand(1, generator=generator)) < 0.5
        if slot and again:
            with torch.no_grad():
                said = model(x_t, t, condition)
            condition = replace(condition, self_cond=said.x0.detach())
        return model(x_t, t, condition)

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        view = self.validation_view(patches)
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


class TeacherStage(DiffusionStage):
    """Stage `fsa-t`: the diffusion teacher, told of PriorNet's expectation and of wavelets."""

    name = architecture = "fsa-t"
    options: TeacherOptions

    def __init__(self, network: GuidedTeacherConfig, data: PatchData, options: TeacherOptions, prior: Path):
        super().__init__(network, data, options)
        self.prior = prior

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
        return channels_last(model)

    def losses(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> dict[str, Tensor]:
        assert batch.gt is not None
        view = self.view(batch)
        x0 = (batch.gt - batch.lms) / view.scale
        slot = self.network.teacher.self_conditioning
        said = self.denoise(model, x0, view.condition, generator, slot)
        assert said.log_sigma is not None
        return {"nll": beta_nll(said.x0 - x0, said.log_sigma, self.options.beta)}

    def sample(self, model: nn.Module, noise: Tensor, condition: Condition) -> Denoised:
        assert isinstance(model, GuidedTeacher)
        return model.sample(
            condition.lms,
            condition.pan,
            steps=self.options.steps,
            schedule=self.schedule,
            noise=noise,
            respaced_time_index=self.options.respaced_time_index,
            self_conditioning=self.options.self_conditioning,
        )
