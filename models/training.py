"""One training loop; a stage says what is trained on what.

Everything random is a function of (seed, step): a run that was interrupted and resumed equals one
that was not. The run folder holds config.json, log.jsonl, state.pt (for resuming) and the
checkpoints last.safetensors and best.safetensors (EMA weights).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .checkpoint import Card, load_model, save_checkpoint
from .data import GenericBatches, TrainBatch
from .diffusion import NoiseSchedule, add_noise
from .losses import beta_nll, contrast_weighted_l1
from .student_lite import FSAStudentLite, LiteConfig

__all__ = ["GenericStudentStage", "Interrupted", "Stage", "TrainConfig", "train"]


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained."""

    iterations: int = 9000
    batch_size: int = 16
    learning_rate: float = 8e-4
    warmup: int = 300
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    ema: float = 0.999
    seed: int = 0
    validate_every: int = 500
    checkpoint_every: int = 250
    amp: bool = True
    """bf16 autocast of the network; losses stay float32."""
    contrast_share: float = 0.0
    """Share of scene variants whose detail contrast is misjudged on purpose."""


class Interrupted(Exception):
    """A stop was asked for; the state is saved."""


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str

    def build(self) -> nn.Module:
        """The network to train."""

    def batch(self, step: int) -> Any:
        """Training data of a step: a function of the step alone."""

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Named parts; their sum is minimised."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scores on the validation split; lower "score" is better."""

    def card(self, model: nn.Module, step: int, scores: dict[str, float]) -> Card:
        """The card of a checkpoint made now."""


class GenericStudentStage:
    """Stage `fsa-s` of the `lite` form without a teacher: the truth is the only target."""

    name = "fsa-s"
    border = 4
    """PAN pixels along a patch's edge that the loss leaves out (they saw zero padding)."""

    def __init__(
        self,
        network: LiteConfig,
        train: GenericBatches,
        valid: GenericBatches,
        *,
        terminal_share: float = 0.7,
        variance_weight: float = 0.1,
        validation_batches: int = 12,
        notes: dict[str, Any] | None = None,
    ):
        self.network = network
        self.schedule = NoiseSchedule.cosine(network.timesteps)
        self.train_data, self.valid_data = train, valid
        self.terminal_share, self.variance_weight = terminal_share, variance_weight
        self.validation_batches, self.notes = validation_batches, notes or {}

    def build(self) -> nn.Module:
        model = FSAStudentLite(self.network)
        return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def batch(self, step: int) -> TrainBatch:
        return self.train_data(step)

    def _timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Most samples at the last timestep, where one-step sampling starts; the rest anywhere."""
        last = len(self.schedule) - 1
        anywhere = torch.randint(0, last + 1, (count,), generator=generator)
        at_end = torch.rand(count, generator=generator) < self.terminal_share
        return torch.where(at_end, torch.full_like(anywhere, last), anywhere)

    def losses(
        self, model: nn.Module, batch: TrainBatch, generator: torch.Generator
    ) -> dict[str, Tensor]:
        t = self._timesteps(len(batch.x0), generator)
        noise = torch.randn(batch.x0.shape, generator=generator)
        x_t = add_noise(self.schedule, batch.x0, t, noise)
        said = model(x_t, t, batch.condition)
        inner = (..., slice(self.border, -self.border), slice(self.border, -self.border))
        x0, target = said.x0[inner], batch.x0[inner]
        assert said.log_sigma is not None
        error = (x0 - target).detach()  # the variance head must not bend the mean
        return {
            "l1": contrast_weighted_l1(x0, target),
            "variance": self.variance_weight * beta_nll(error, said.log_sigma[inner]),
        }

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        score, rmse, local, coverage = 0.0, 0.0, 0.0, 0.0
        last = len(self.schedule) - 1
        generator = torch.Generator().manual_seed(7)
        for step in range(self.validation_batches):
            batch = self.valid_data(step)
            t = torch.full((len(batch.x0),), last)
            x_t = torch.randn(batch.x0.shape, generator=generator)
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

    def card(self, model: nn.Module, step: int, scores: dict[str, float]) -> Card:
        return Card(
            name="generic",
            architecture="fsa-s-lite",
            config=asdict(self.network),
            stage=self.name,
            residual_scale=self.train_data.residual_scale,
            training={**self.notes, "iterations": step},
            scores={"validation_patches": scores},
        )


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    done = (step - config.warmup) / max(config.iterations - config.warmup, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def train(
    stage: Stage,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    init: Path | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train a stage and return the best checkpoint's path.

    Args:
        stage: what is trained.
        config: how.
        out: the run folder; made if need be.
        resume: go on from `out`'s state.pt if there is one.
        init: checkpoint whose weights a new run starts from.
        on_step: called with the step number and its losses (floats) after every step.
        should_stop: asked after every step; True saves the state and raises `Interrupted`.

    Raises:
        Interrupted: `should_stop` said so.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)  # initial weights
    model = stage.build()
    if init is not None:
        model.load_state_dict(load_model(init)[0].state_dict())
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    start, best = 0, math.inf
    if resume and (out / "state.pt").exists():
        state = torch.load(out / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        start, best = state["step"], state["best"]
    (out / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    def save_state(step: int) -> None:
        state = {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
            "best": best,
        }
        torch.save(state, out / ".state.tmp")
        os.replace(out / ".state.tmp", out / "state.pt")

    began = time.monotonic()
    for step in range(start, config.iterations):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        batch = stage.batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.amp):
            parts = stage.losses(model, batch, generator)
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        ema.update_parameters(model)
        if on_step is not None:
            on_step(step + 1, {k: float(v.detach()) for k, v in parts.items()})

        done = step + 1
        last = done == config.iterations
        if done % config.validate_every == 0 or last:
            ema.module.eval()
            scores = stage.validate(ema.module)
            with open(out / "log.jsonl", "a") as log:
                entry = {
                    "step": done,
                    "seconds": round(time.monotonic() - began, 1),
                    "learning_rate": _learning_rate(config, step),
                    "gradient_norm": float(norm),
                    **{k: float(v.detach()) for k, v in parts.items()},
                    **scores,
                }
                log.write(json.dumps(entry) + "\n")
            card = stage.card(ema.module, done, scores)
            save_checkpoint(out / "last.safetensors", ema.module, card)
            if scores["score"] < best:
                best = scores["score"]
                save_checkpoint(out / "best.safetensors", ema.module, card)
        if done % config.checkpoint_every == 0 or last:
            save_state(done)
        if not last and should_stop():
            save_state(done)
            raise Interrupted(f"stopped after step {done}; --resume goes on from there")
    return out / "best.safetensors"
