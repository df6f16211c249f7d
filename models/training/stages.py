"""The stage of the product's own student: whole scenes, degraded anew at every step."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uknowpan.models.checkpoints import network_of
from uknowpan.models.devices import sent
from uknowpan.models.diffusion import NoiseSchedule, add_noise
from uknowpan.models.features import StreamsConfig
from uknowpan.models.network import LiteConfig
from uknowpan.models.training.bounds import share
from uknowpan.models.training.loop import Stage
from uknowpan.models.training.losses import beta_nll, contrast_weighted_l1, contrast_weighted_rms
from uknowpan.models.training.parallel import World, current_world
from uknowpan.models.training.scenes import GenericBatches, TrainBatch
from uknowpan.models.types import Condition

ERRORS = {"l1": contrast_weighted_l1, "rms": contrast_weighted_rms}
"""Losses of the predicted mean."""


@dataclass(frozen=True)
class GenericOptions:
    """Options of the stage `fsa-s` on whole scenes."""

    terminal_share: float = share(0.7)
    """Share of samples trained at the last timestep, where sampling starts."""
    error: str = "l1"
    """l1 or rms, see `uknowpan.models.training.losses`."""
    variance_weight: float = 0.1
    """Weight of the likelihood that trains the variance head."""
    soft_weight: float = 1.0
    """Weight of the distance from the teacher's prediction; unused without a teacher."""
    subsampled_share: float = share(0.0)
    """Share of scene variants whose truth is sharper than their PAN."""
    truth_blur_share: float = share(0.0)
    """Share of scene variants whose truth is blurred, see `VariantShares`."""

    def __post_init__(self) -> None:
        if self.error not in ERRORS:
            raise ValueError(f"error is {' or '.join(ERRORS)}, not {self.error!r}")


def channels_last(model: nn.Module) -> nn.Module:
    """The network with its weights in the memory format that convolutions are fastest in."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def noised(
    schedule: NoiseSchedule, x0: Tensor, terminal_share: float, generator: torch.Generator, world: World
) -> tuple[Tensor, Tensor]:
    """(x_t, t) for training: a share of the samples at the last timestep, the others anywhere.

    Timesteps and noise are drawn for the batch of all processes.
    """
    count, last = len(x0) * world.size, len(schedule) - 1
    t = torch.randint(0, last + 1, (count,), generator=generator)
    at_end = torch.rand(count, generator=generator) < terminal_share
    t = sent(world.own(torch.where(at_end, torch.full_like(t, last), t)), x0.device)
    noise = sent(world.own(torch.randn((count, *x0.shape[1:]), generator=generator)), x0.device)
    return add_noise(schedule, x0, t, noise), t


class GenericStudentStage(Stage):
    """Stage `fsa-s` on whole scenes; the targets are the truth and the prediction of a teacher, if there is one.

    A teacher predicts without x_t, so it teaches the samples at the last timestep alone.
    Validation takes one sampling step, as sharpening does by default.
    """

    name = "fsa-s"
    border = 4
    """PAN pixels along a patch's edge that the loss leaves out (they saw zero padding)."""

    def __init__(
        self,
        network: LiteConfig | StreamsConfig,
        train: GenericBatches,
        valid: GenericBatches,
        *,
        options: GenericOptions | None = None,
        teacher: nn.Module | None = None,
        validation_batches: int = 12,
        workers: int = 0,
        device: str = "cpu",
        notes: dict[str, Any] | None = None,
    ):
        self.network = network
        self.options = options or GenericOptions()
        self.teacher = None if teacher is None else channels_last(teacher).eval().requires_grad_(False)
        self.schedule = NoiseSchedule.cosine(network.timesteps)
        self.train_data, self.valid_data = train, valid
        self.validation_batches, self.notes = validation_batches, notes or {}
        self.workers, self.device = workers, device
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
        return channels_last(network_of(self.network))

    def batches(self, start: int, stop: int) -> Generator[TrainBatch]:
        yield from self.train_data.stream(start, stop, self.world, workers=self.workers, device=self.device)

    def losses(self, model: nn.Module, batch: TrainBatch, generator: torch.Generator) -> dict[str, Tensor]:
        options = self.options
        x_t, t = noised(self.schedule, batch.x0, options.terminal_share, generator, self.world)
        output = model(x_t, t, batch.condition)
        inner = (..., slice(self.border, -self.border), slice(self.border, -self.border))
        x0, target = output.x0[inner], batch.x0[inner]
        error = (x0 - target).detach()  # the variance head must not bend the mean
        if output.emphasis is not None:
            x0 = target + output.emphasis[inner] * (x0 - target)
        parts = {
            options.error: ERRORS[options.error](x0, target),
            "variance": options.variance_weight * beta_nll(error, output.log_sigma[inner]),
        }
        at_end = t == len(self.schedule) - 1
        if self.teacher is not None and bool(at_end.any()):
            soft = self._taught(batch.condition.map(lambda x: x[at_end]), t[at_end])[inner]
            parts["soft"] = options.soft_weight * ERRORS[options.error](output.x0[inner][at_end], soft)
        return parts

    @torch.no_grad()
    def _taught(self, condition: Condition, t: Tensor) -> Tensor:
        """The teacher's x0 of samples at the last timestep; zeros in place of noise are its best start."""
        assert self.teacher is not None
        x0: Tensor = self.teacher.to(t.device)(torch.zeros_like(condition.lms), t, condition).x0
        return x0

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        score, rmse, local, coverage = 0.0, 0.0, 0.0, 0.0
        last, device = len(self.schedule) - 1, next(model.parameters()).device
        generator = torch.Generator().manual_seed(7)
        for step in range(self.validation_batches):
            batch = self.valid_data(step).to(device)
            t = torch.full((len(batch.x0),), last, device=device)
            x_t = torch.randn(batch.x0.shape, generator=generator).to(device)
            output = model(x_t, t, batch.condition)
            assert batch.condition.band_features is not None
            error = output.x0 - batch.x0
            score += float(contrast_weighted_l1(output.x0, batch.x0))
            rmse += float(error.square().mean().sqrt())
            injected = batch.condition.band_features[:, :, 1]
            local += float((injected - batch.x0).square().mean().sqrt())
            coverage += float((error.abs() < output.log_sigma.exp()).float().mean())
        n = self.validation_batches
        return {
            "score": score / n,
            "rmse": rmse / n,
            "rmse_over_local_injection": rmse / max(local, 1e-9),  # 0 where the scenes are flat
            "coverage_1_sigma": coverage / n,
        }
