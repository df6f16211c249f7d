"""One training loop; a stage says what is trained on what.

Everything random is a function of (seed, step): a run that was interrupted and resumed equals one
that was not. The run folder holds config.json, log.jsonl, state.pt (for resuming) and the
checkpoints last.safetensors and best.safetensors (EMA weights).
"""

from __future__ import annotations

import json
import math
import os
import pickle
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
from .errors import CheckpointError, ModelError, ModelMismatch
from .losses import beta_nll, contrast_weighted_l1
from .student_lite import FSAStudentLite, LiteConfig

__all__ = [
    "ConfigMismatch",
    "Diverged",
    "GenericStudentStage",
    "Interrupted",
    "Stage",
    "TrainConfig",
    "resolved_config",
    "train",
]


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
    halved_share: float = 0.0
    """Share of scene variants whose truth and PAN are first averaged to half the resolution: a
    truth as sharp as its pixels allow, which no sensor's own MS is."""


class Interrupted(Exception):
    """A stop was asked for; the state is saved."""


class ConfigMismatch(ModelError):
    """A run is to go on with another configuration than it began with."""


class Diverged(ModelError):
    """A loss or its gradient is not finite any more."""


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str
    network: Any
    """Config dataclass of the network."""

    def build(self) -> nn.Module:
        """The network to train."""

    def batch(self, step: int) -> Any:
        """Training data of a step, a function of the step alone; has `.to(device)`."""

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Named parts; their sum is minimised. The batch is on the model's device, the generator
        on the CPU, so that every device sees the same noise."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scores on the validation split; lower "score" is better."""

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
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
        device = batch.x0.device
        t = self._timesteps(len(batch.x0), generator).to(device)
        noise = torch.randn(batch.x0.shape, generator=generator).to(device)
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


def resolved_config(stage: str, config: TrainConfig, network: Any) -> dict[str, Any]:
    """Everything that was configured, as config.json holds it."""
    return {"stage": stage, "train": asdict(config), "network": asdict(network)}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Fields that differ; those that only one side knows are another version's."""
    shared = [k for k in there if k in here and there[k] != here[k]]
    return ", ".join(f"{k} {there[k]} (here {here[k]})" for k in shared)


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"stage": s, "train": {"seed": 0}} -> {"stage": s, "train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= {f"{key}.{k}": v for k, v in value.items()} if type(value) is dict else {key: value}
    return flat


def _refuse_other_config(path: Path, resolved: dict[str, Any]) -> None:
    """A resumed run must be configured as it was begun."""
    try:
        there = _flat(json.loads(path.read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), so --resume cannot tell how the run was configured; "
            "begin anew in another folder."
        ) from error
    differing = _differences(there, _flat(resolved))
    if differing:
        raise ConfigMismatch(
            f"the run in {path.parent} was begun with {differing}; --resume needs the same "
            "configuration, another one a folder of its own."
        )


def _start_from(init: Path, model: nn.Module, network: Any) -> None:
    """Take the weights of a checkpoint."""
    source, card = load_model(init)
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        differing = _differences(card.config, asdict(network)) or "another architecture"
        raise ModelMismatch(
            f"the weights of {init} ({card.architecture}: {differing}) do not fit the network to "
            "train; give both the same [network]."
        ) from error


def _go_on_from(
    path: Path,
    model: nn.Module,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
) -> tuple[int, float]:
    """(steps done, best score) of a saved state."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"]), float(state["best"])
    except (
        *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError),
        *(TypeError, ValueError, AttributeError),
    ) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}), so the run cannot go on; begin another "
            "folder, with --init and a checkpoint of this one to keep its weights."
        ) from error


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
    device: str | torch.device = "cpu",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train a stage.

    Args:
        stage: what is trained.
        config: how.
        out: the run folder, made if need be; its name becomes the model's.
        resume: go on from `out`'s state.pt if there is one.
        init: checkpoint whose weights a new run starts from.
        device: where the network is trained.
        on_step: called with the step number and its losses (floats) after every step.
        should_stop: asked after every step; True saves the state and raises `Interrupted`.

    Returns:
        Path of the best checkpoint; of the last one where no score was a number.

    Raises:
        Interrupted: `should_stop` said so.
        ConfigMismatch: `resume` with another configuration.
        ModelMismatch: `init` is of another network.
        CheckpointError: `init` or the state cannot be read.
        Diverged: a loss or its gradient is not finite; the last saved state stays.
    """
    device, resolved = torch.device(device), resolved_config(stage.name, config, stage.network)
    resumed = resume and (out / "state.pt").exists()
    if resumed:
        _refuse_other_config(out / "config.json", resolved)
    torch.set_flush_denormal(True)
    torch.manual_seed(config.seed)  # initial weights
    model = stage.build()
    if init is not None:
        _start_from(init, model, stage.network)
    model.to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    start, best = 0, math.inf
    if resumed:
        start, best = _go_on_from(out / "state.pt", model, ema, optimizer, device)
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(resolved, indent=2) + "\n")

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
        batch = stage.batch(step).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.amp):
            parts = stage.losses(model, batch, generator)
        loss = torch.stack(list(parts.values())).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        if not math.isfinite(float(loss.detach())) or not math.isfinite(float(norm)):
            raise Diverged(
                f"step {step + 1} has a loss of {float(loss.detach()):.4g} with a gradient of "
                f"norm {float(norm):.4g}; begin anew with a lower learning_rate, and look for "
                "values that are not finite in the scenes."
            )
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
            card = stage.card(out.resolve().name, done, scores)
            save_checkpoint(out / "last.safetensors", ema.module, card)
            if scores["score"] < best:
                best = scores["score"]
                save_checkpoint(out / "best.safetensors", ema.module, card)
        if done % config.checkpoint_every == 0 or last:
            save_state(done)
        if not last and should_stop():
            save_state(done)
            raise Interrupted(f"stopped after step {done}; --resume goes on from there")
    return out / ("best.safetensors" if best < math.inf else "last.safetensors")
