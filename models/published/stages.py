"""Stages on PanCollection files: data, validation and sampling that the published networks share.

By default the defects of the releases are mended; each flag of the options brings one back.
"""

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from uknowpan.models.architectures import TIMESTEPS
from uknowpan.models.checkpoints import RELEASED_SAMPLING
from uknowpan.models.diffusion import Denoiser, NoiseSchedule, ddim_sample, position_noise
from uknowpan.models.errors import DataError, ModelMismatch
from uknowpan.models.metrics.indices import ergas, psnr, q2n, sam
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches
from uknowpan.models.training.bounds import count, share
from uknowpan.models.training.loop import Examples, Stage
from uknowpan.models.training.parallel import World, current_world
from uknowpan.models.training.stages import noised
from uknowpan.models.types import Condition, Denoised, PatchBatch

VALIDATION_BATCH = 32
EXAMPLES = 4
STATISTICS_SAMPLES = 512
"""Training patches that the residual's standard deviation is taken from."""


@dataclass(frozen=True)
class DiffusionOptions:
    """Options that the stages of all diffusion networks share."""

    steps: int = count(1)
    """Network evaluations in validation, and by default in sharpening; published: 25."""
    terminal_share: float = share(0.0)
    """Share of samples trained at the last timestep, where sampling starts; the others are drawn
    evenly, as published."""
    self_conditioning: bool = True
    """Sampling hands each step the prediction of the one before, as training does for half of the
    batches. The release trains for it and never does it (B2). Networks with a slot for it only."""
    strided_timesteps: bool = False
    """Simulate the release, which samples at 480, 460 .. 0 of 500 timesteps and never at the last one, see
    `NoiseSchedule.strided`."""
    respaced_time_index: bool = False
    """Simulate the release, which gives the network the number of the sampling step instead of its timestep (B1)."""
    raw_residual: bool = False
    """Simulate the release, which diffuses the residual gt - lms as it is, about 0.03 beside noise
    of 1 (B4). By default it is divided by its standard deviation in the training data. The lite
    student ignores this: its residual is in units of the scene's contrast."""


@dataclass(frozen=True)
class PatchData:
    """PanCollection files to train on and to validate on."""

    train: PatchBatches
    valid: PanCollectionDataset
    validation_samples: int = 256
    workers: int = 0
    device: str = "cpu"
    """Device that trains the network; batches for a GPU are read into pinned memory."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Entries of the card: command, files, versions."""

    @property
    def dataset(self) -> PanCollectionDataset:
        """The training patches."""
        return self.train.dataset.patches

    @property
    def bands(self) -> int:
        """C, the bands of every file."""
        return self.valid.files[0].header.bands

    @property
    def ratio(self) -> int:
        """PAN pixels per MS pixel of every file."""
        return self.dataset.files[0].header.ratio


def residual_std_of(dataset: PanCollectionDataset, samples: int = STATISTICS_SAMPLES) -> Tensor:
    """(C,) root mean square of gt - lms per band, over patches spread evenly; DataError where it is 0."""
    chosen = spread(len(dataset), samples)
    squares = torch.zeros((), dtype=torch.float64)
    for index in chosen:
        patch = dataset[index]
        assert patch.gt is not None
        squares = squares + (patch.gt - patch.lms).double().square().mean((0, 2, 3))
    std = (squares / len(chosen)).sqrt()
    if not bool((std > 0).all()):
        raise DataError(
            f"In band {int(std.argmin()) + 1} of the training data truth and LMS are the same, so "
            "there is nothing to learn; leave that band out."
        )
    return std.float()


def spread(total: int, most: int) -> list[int]:
    """At most `most` of the indices 0 .. `total` - 1, spread evenly."""
    most = min(total, most)
    return [i * total // most for i in range(most)]


class PatchStage(Stage):
    """The common part of the stages on PanCollection files: batches, validation, cards."""

    def __init__(self, network: Any, data: PatchData, options: Any):
        bands, ratio = getattr(network, "bands", data.bands), getattr(network, "ratio", data.ratio)
        if bands != data.bands:
            raise ModelMismatch(f"the network takes {bands} bands, the files hold {data.bands}; give both the same")
        if ratio != data.ratio:
            raise ModelMismatch(
                f"the network takes the ratio {ratio}, that of the files is {data.ratio}; set "
                f"ratio = {data.ratio} in [network]"
            )
        self.network, self.data, self.options, self.notes = network, data, options, data.notes
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
        """Heights and widths of patches must be multiples of this."""
        return getattr(self.network, "factor", 1)

    def data_identity(self) -> dict[str, Any]:
        return {
            split: {
                "files": [Path(file.path).name for file in dataset.files],
                "samples": [len(file) for file in dataset.files],
                "full_scales": list(dataset.scales),
            }
            for split, dataset in (("train", self.data.dataset), ("valid", self.data.valid))
        }

    def batches(self, start: int, stop: int) -> Generator[Any]:
        yield from self.data.train.stream(start, stop, workers=self.data.workers, device=self.data.device)

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        """Results (B, C, H, W) and their 1-sigma, in the units of lms; the first patch's number fixes the noise."""
        raise NotImplementedError

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        device, valid = next(model.parameters()).device, self.data.valid
        values: dict[str, list[Tensor]] = {}
        finite = True
        for place, patches, scale in validation_patches(valid, self.data.validation_samples):
            patches = patches.to(device)
            hrms, sigma = self.predict(model, patches, place)
            assert patches.gt is not None
            finite &= not bool(hrms.isnan().any())
            scores = patch_scores(hrms, patches, scale)
            if sigma is not None:
                scores["coverage_1_sigma"] = ((hrms - patches.gt).abs() < sigma).float().mean((1, 2, 3))
            for name, value in scores.items():
                values.setdefault(name, []).append(value)
        # NaN is a network's fault, which no mean may skip.
        means = {name: float(torch.cat(v).nanmean()) if finite else math.nan for name, v in values.items()}
        return {"score": means["ergas"], **means}

    @torch.no_grad()
    def examples(self, model: nn.Module) -> Examples | None:
        device, valid = next(model.parameters()).device, self.data.valid
        patches = PatchBatch.cat([valid[i] for i in spread(len(valid), EXAMPLES)]).to(device)
        hrms, sigma = self.predict(model, patches, 0)
        assert patches.gt is not None
        return Examples(patches.pan, patches.lms, hrms, patches.gt, sigma)

    def card_fields(self) -> dict[str, Any]:
        headers, scales = [file.header for file in self.data.dataset.files], set(self.data.dataset.scales)
        sensors = {header.sensor for header in headers}
        return {
            "sensor": sensors.pop() or "generic" if len(sensors) == 1 else "generic",
            "bands": self.data.bands,
            "ratios": [self.data.ratio],
            "registration": headers[0].registration,
            "max_value": scales.pop() if len(scales) == 1 else None,
        }


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
    has_angle = ((fused * fused).sum(1) * (gt * gt).sum(1) > 0).flatten(1).any(1)
    angles = fused.new_full((len(fused),), math.nan)
    if bool(has_angle.any()):
        angles[has_angle] = sam(fused[has_angle], gt[has_angle])
    return {
        "sam": angles,
        "ergas": relative.masked_fill(relative.isinf(), math.nan),
        "psnr": peak.masked_fill(dark & peak.isinf(), math.nan),
        "q2n": q2n(fused, gt),
    }


def validation_patches(valid: PanCollectionDataset, most: int) -> Iterator[tuple[int, PatchBatch, float]]:
    """At most `most` patches in batches of one file: (number of the first, the patches, their full scale in DN)."""
    chosen = spread(len(valid), most)
    for number, scale in enumerate(valid.scales):
        first, after = int(valid.starts[number]), int(valid.starts[number + 1])
        own = [i for i in chosen if first <= i < after]
        for k in range(0, len(own), VALIDATION_BATCH):
            part = own[k : k + VALIDATION_BATCH]
            yield part[0], PatchBatch.cat([valid[i] for i in part]), scale


class ResidualStage(PatchStage):
    """A stage whose network predicts the residual gt - lms in units of its standard deviation."""

    def __init__(self, network: Any, data: PatchData, options: Any):
        super().__init__(network, data, options)
        self.residual_std = torch.ones(data.bands) if options.raw_residual else residual_std_of(data.dataset)

    def scale(self, like: Tensor) -> Tensor:
        """(1, C, 1, 1) `residual_std`, which stays on the device of the tensor."""
        self.residual_std = self.residual_std.to(like)
        return self.residual_std.view(1, -1, 1, 1)

    def card_fields(self) -> dict[str, Any]:
        return {**super().card_fields(), "residual_std": [round(v, 9) for v in self.residual_std.cpu().tolist()]}


class DiffusionStage(ResidualStage):
    """A stage that predicts x0 at random timesteps and samples by DDIM."""

    options: DiffusionOptions
    slot = False
    """Whether the network has a slot of self-conditioning."""

    def __init__(self, network: Any, data: PatchData, options: DiffusionOptions):
        self.schedule = NoiseSchedule.cosine(getattr(network, "timesteps", TIMESTEPS))
        super().__init__(network, data, options)
        if not 1 <= options.steps <= len(self.schedule):
            raise ModelMismatch(
                f"{options.steps} sampling steps do not fit {len(self.schedule)} timesteps; choose "
                f"steps from 1 to {len(self.schedule)}"
            )
        self.timesteps = (self.schedule.strided if options.strided_timesteps else self.schedule.respace)(options.steps)

    def view(self, patches: PatchBatch) -> tuple[Condition, Tensor]:
        """The condition of training patches, and the scale (B or 1, C, 1, 1): x0 = (gt - condition.lms) / scale."""
        return Condition(patches.lms, patches.pan), self.scale(patches.lms)

    def validation_view(self, patches: PatchBatch) -> tuple[Condition, Tensor]:
        """`view` of validation patches."""
        return self.view(patches)

    def target(self, patches: PatchBatch) -> tuple[Condition, Tensor, Tensor]:
        """The condition of training patches, their x0 and its scale."""
        assert patches.gt is not None
        with torch.autocast(patches.gt.device.type, enabled=False):
            condition, scale = self.view(patches)
        return condition, (patches.gt - condition.lms) / scale, scale

    def denoise(self, model: Denoiser, x0: Tensor, condition: Condition, generator: torch.Generator) -> Denoised:
        """The network's prediction at random timesteps.

        With a `slot`, half of the batches are self-conditioned (Chen et al. 2023): the network is
        given its own prediction without.
        """
        x_t, t = noised(self.schedule, x0, self.options.terminal_share, generator, self.world)
        again = float(torch.rand(1, generator=generator)) < 0.5
        if self.slot and again:
            with torch.no_grad():
                first = model(x_t, t, condition)
            condition = replace(condition, self_cond=first.x0.detach())
        return model(x_t, t, condition)

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        condition, scale = self.validation_view(patches)
        count, bands, height, width = patches.lms.shape
        noise = torch.stack(
            [position_noise(7, (place + i) * height, 0, height, width, bands) for i in range(count)]
        ).to(patches.lms)
        output = self.sample(model, noise, condition)
        sigma = None if output.log_sigma is None else output.log_sigma.exp() * scale
        return condition.lms + scale * output.x0, sigma

    def sample(self, model: Denoiser, noise: Tensor, condition: Condition) -> Denoised:
        """The prediction at the last step of DDIM from pure noise."""
        return ddim_sample(
            model,
            noise,
            self.timesteps,
            self.schedule,
            condition,
            respaced_time_index=self.options.respaced_time_index,
            self_conditioning=self.options.self_conditioning,
            clamped_unit=self.scale(noise) if getattr(self.options, "clamped_hrms", False) else None,
        )

    def card_fields(self) -> dict[str, Any]:
        options = self.options
        return {
            **super().card_fields(),
            "sampling": [way for way in RELEASED_SAMPLING if getattr(options, way, False)],
            "steps": options.steps,
            "self_conditioning": options.self_conditioning,
        }
