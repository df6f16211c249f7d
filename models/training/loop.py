"""The training loop; a stage defines the network, its data and its losses.

Everything random is a function of (seed, step), so that a resumed run equals an unbroken one.
Under `torchrun` every process trains on its share of each batch (DistributedDataParallel), and the
first one writes. Noise and timesteps are drawn for the whole batch and then shared out. So the
number of processes changes the losses by rounding only; each process draws its own dropout.
"""

import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from uknowpan.errors import InputError, Interrupted
from uknowpan.models.architectures import name_of
from uknowpan.models.checkpoints import Card, load_model, save_checkpoint
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.training.bounds import count, share
from uknowpan.models.training.parallel import current_world
from uknowpan.models.training.run_folder import RunFolder, differences, plain, resolved_config


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run that every stage shares."""

    iterations: int = count(9000)
    batch_size: int = count(16)
    """Samples per step, of all processes together."""
    learning_rate: float = share(8e-4)
    warmup: int = 300
    """Steps over which the learning rate rises to its peak."""
    milestones: tuple[int, ...] = ()
    """Steps at which the learning rate is halved; none: a cosine down to 1 % of its peak."""
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Largest gradient norm; longer gradients are shortened to it."""
    ema: float = share(0.999)
    """Decay of the exponential moving average of the weights."""
    ema_start: int = 0
    """Step from which weights are averaged; before, the average is a copy."""
    seed: int = 0
    validate_every: int = count(500)
    validation_samples: int = count(256)
    """Largest number of validation patches, spread over the files."""
    checkpoint_every: int = count(250)
    log_every: int = count(50)
    amp: bool = True
    """Run the network in bf16 autocast; losses stay float32."""
    workers: int = 0
    """Processes that read ahead, per training process; 0: none."""
    compile: bool = False
    """Run the network through torch.compile: slow to begin, then faster, mostly on GPUs."""
    halved_share: float = share(0.0)
    """Share of scene variants whose truth and PAN are first averaged to half the resolution. The
    truth is then as sharp as its pixels allow, which no sensor's own MS is. Scenes files only."""


class Diverged(InputError):
    """A loss or its gradient is no longer finite."""


@dataclass(frozen=True)
class Examples:
    """Validation patches for a picture, divided by full scale: PAN (B, 1, H, W), the others (B, C, H, W)."""

    pan: Tensor
    lms: Tensor
    hrms: Tensor
    gt: Tensor
    sigma: Tensor | None = None
    """Predicted 1-sigma of hrms."""


class Stage(Protocol):
    """The network, data and losses that the loop trains."""

    name: str
    network: Any
    """Config dataclass of the network."""
    options: Any
    """Config dataclass of the stage: losses, flags."""
    notes: dict[str, Any]
    """Entries of the card on training: command, files, versions."""

    def data_identity(self) -> dict[str, Any]:
        """Names and sizes that distinguish the data, without paths; JSON values."""

    def build(self) -> nn.Module:
        """The network to train; only parameters that require gradients are."""

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """This process's share of the batches of steps `start` .. `stop` - 1, each a function of
        its step alone; a batch has `.to(device, non_blocking)`."""

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Named parts, whose sum is minimised. The batch is on the model's device; the generator
        is on the CPU and equal in each process, so that every device draws the same noise."""

    def deployed(self, model: nn.Module) -> nn.Module:
        """The part of the network that a checkpoint holds."""
        return model

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scores of a deployed network on the validation split; a lower "score" is better."""

    def examples(self, model: nn.Module) -> Examples | None:
        """A few validation patches, or None."""
        return None

    def card_fields(self) -> dict[str, Any]:
        """Fields of the card that data and options decide."""
        return {}

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
        """The card of a checkpoint after `step` steps."""
        return Card(
            name=name,
            architecture=name_of(self.network),
            config=asdict(self.network),
            stage=self.name,
            training={**self.notes, "iterations": step},
            scores={"validation_patches": scores},
            **self.card_fields(),
        )


def _start_from(init: Path, model: nn.Module, network: Any) -> None:
    """Load the weights of a checkpoint into a model."""
    source, card = load_model(init)
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        differing = differences(plain(card.config), plain(asdict(network))) or "another architecture"
        raise ModelMismatch(
            f"the weights of {init} ({card.architecture}: {differing}) do not fit the network to "
            "train; give both the same [network]."
        ) from error


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then halvings at the milestones or a cosine down to 1 % of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.milestones:
        return config.learning_rate * 0.5 ** sum(step >= m for m in config.milestones)
    done = (step - config.warmup) / max(config.iterations - config.warmup, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class _Run:
    """A network with its optimiser, its averaged weights and its run folder."""

    def __init__(self, stage: Stage, config: TrainConfig, folder: RunFolder, device: torch.device, init: Path | None):
        self.stage, self.config, self.folder, self.device = stage, config, folder, device
        self.world = current_world()
        self.step, self.best = 0, math.inf
        torch.manual_seed(config.seed)  # initial weights
        self.model = stage.build()
        if init is not None:
            _start_from(init, stage.deployed(self.model), stage.network)
        self.model.to(device)
        self.ema = AveragedModel(self.model, use_buffers=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=config.learning_rate, weight_decay=config.weight_decay, fused=device.type == "cuda"
        )
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self._began = time.monotonic()

    def restore(self) -> None:
        """Take up the saved state."""
        with self.folder.saved_state(self.device) as state:
            self.model.load_state_dict(state["model"])
            self.ema.load_state_dict(state["ema"])
            self.optimizer.load_state_dict(state["optimizer"])
            window, self._window_steps = state["window"]
            self._window = dict(window)
            self.step, self.best = int(state["step"]), float(state["best"])
            if not 0 <= self.step <= self.config.iterations:
                raise ValueError(f"step {self.step} of {self.config.iterations}")

    def prepare(self) -> None:
        """Make the network that steps go through; after the weights are in place."""
        forward: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.world.size > 1:
            places = [self.device] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=places)
        self.forward = forward

    def take(self, batch: Any) -> dict[str, float]:
        """Take one step; return its losses."""
        config, step = self.config, self.step
        seed = config.seed * 1_000_003 + step
        torch.manual_seed(seed + 7919 * self.world.rank)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        self.model.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.amp):
            parts = self.stage.losses(
                self.forward, batch.to(self.device, non_blocking=True), torch.Generator().manual_seed(seed)
            )
        loss = torch.stack(list(parts.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, config.clip)
        self.optimizer.step()
        self._average()
        values = {name: value.detach().double() for name, value in {**parts, "gradient_norm": norm}.items()}
        numbers = torch.stack(list(values.values())).cpu().tolist()  # the one wait of a step, when all of it is queued
        if not all(map(math.isfinite, numbers)):
            raise Diverged(
                f"step {step + 1} has a loss of {sum(numbers[:-1]):.4g} with a gradient of norm {numbers[-1]:.4g}; "
                "begin anew with a lower learning_rate, and look for values that are not finite in the scenes."
            )
        self.step += 1
        for name, value in values.items():
            self._window[name] = self._window.get(name, torch.zeros_like(value)) + value
        self._window_steps += 1
        return dict(zip(parts, numbers, strict=False))

    @torch.no_grad()
    def _average(self) -> None:
        """Update the averaged weights as `AveragedModel.update_parameters` does, without its wait for the device."""
        share = 1.0 if self.step < max(self.config.ema_start, 1) else 1 - self.config.ema
        ours, theirs = ([*model.parameters(), *model.buffers()] for model in (self.ema.module, self.model))
        real = [i for i, x in enumerate(ours) if x.is_floating_point()]
        torch._foreach_lerp_([ours[i] for i in real], [theirs[i] for i in real], share)
        for i in set(range(len(ours))).difference(real):  # counters
            ours[i].copy_(theirs[i])
        self.ema.n_averaged += 1

    def _shared_window(self) -> dict[str, Tensor]:
        """The sums for the next line of the log, as means over all processes."""
        if not self._window:
            return {}
        sums = self.world.mean(torch.stack(list(self._window.values())))
        return dict(zip(self._window, sums, strict=True))

    def entry(self) -> dict[str, Any]:
        """A line of the log: means since the line before, over all processes."""
        sums, steps = self._shared_window(), max(self._window_steps, 1)
        self._window, self._window_steps = {}, 0
        return {
            "step": self.step,
            "seconds": round(time.monotonic() - self._began, 1),
            "learning_rate": _learning_rate(self.config, self.step - 1),
            **{name: float(value / steps) for name, value in sums.items()},
        }

    def validate(self) -> dict[str, float]:
        """Score the averaged weights and save them."""
        out = self.folder.path
        averaged = self.stage.deployed(self.ema.module).eval()
        scores = self.stage.validate(averaged)
        card = self.stage.card(Path(os.path.realpath(out)).name, self.step, scores)
        save_checkpoint(out / "last.safetensors", averaged, card)
        if scores["score"] < self.best:
            self.best = scores["score"]
            save_checkpoint(out / "best.safetensors", averaged, card)
        return scores

    def report(
        self,
        scored: bool,
        on_log: Callable[[dict[str, Any]], None],
        on_examples: Callable[[int, Examples], None] | None,
    ) -> None:
        """Log the steps since the last line; the first process validates and writes."""
        entry = self.entry()
        if self.world.rank:
            return
        if scored:
            entry |= self.validate()
            shown = self.stage.examples(self.stage.deployed(self.ema.module))
            if shown is not None and on_examples is not None:
                on_examples(self.step, shown)
        self.folder.append(entry)
        on_log(entry)

    def save_state(self) -> None:
        """Write what resuming needs; the first process does."""
        window = self._shared_window()
        if self.world.rank == 0:
            state = {name: getattr(self, name).state_dict() for name in ("model", "ema", "optimizer")}
            self.folder.save_state(
                {**state, "step": self.step, "best": self.best, "window": (window, self._window_steps)}
            )


def train(
    stage: Stage,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    init: Path | None = None,
    device: str | torch.device = "cpu",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    on_log: Callable[[dict[str, Any]], None] = lambda entry: None,
    on_examples: Callable[[int, Examples], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Path:
    """Train a stage.

    Args:
        stage: network, data and losses.
        config: settings of the run.
        out: the run folder, made if need be; its name becomes the model's.
        resume: go on from the state in `out` if there is one.
        init: checkpoint whose weights a new run starts from; a resumed run has its own.
        device: where the network is trained.
        on_step: called with the step number and this process's losses after every step.
        on_log: called with every line of log.jsonl.
        on_examples: called with the step number and `Examples` after every validation.
        should_stop: asked after every step; True in any process saves the state and stops.

    Returns:
        Path of the best checkpoint; of the last one where no score was a number.

    Raises:
        Interrupted: `should_stop` returned True.
        ConfigMismatch: `resume` with another configuration or other data.
        ModelMismatch: `init` is of another network, or the batch cannot be shared out.
        CheckpointError: `init` or the state cannot be read.
        DataError: data cannot be read, the state cannot be written, or another run is in `out`.
        Diverged: a loss or its gradient is not finite; the last saved state stays.
    """
    device, folder = torch.device(device), RunFolder(out)
    resolved = resolved_config(stage.name, config, stage.network, stage.options, stage.data_identity())
    resumed = resume and folder.state.exists()
    if resumed:
        folder.check_config(resolved)
    torch.set_flush_denormal(True)
    run = _Run(stage, config, folder, device, None if resumed else init)
    run.world.share(config.batch_size)
    first = run.world.rank == 0
    with folder.locked() if first else nullcontext():
        if resumed:
            run.restore()
        run.world.barrier()  # every process has read what the first one now writes
        if first:
            folder.write_config(resolved)
            folder.trim_log(run.step)
        run.prepare()
        with closing(stage.batches(run.step, config.iterations)) as batches:
            for batch in batches:
                parts = run.take(batch)
                last = run.step == config.iterations
                if on_step is not None:
                    on_step(run.step, parts)
                scored = run.step % config.validate_every == 0 or last
                if scored or run.step % config.log_every == 0:
                    run.report(scored, on_log, on_examples)
                if run.step % config.checkpoint_every == 0 or last:
                    run.save_state()
                if not last and run.world.any(should_stop(), device):
                    run.save_state()
                    raise Interrupted(f"stopped after step {run.step}; --resume goes on from there")
        run.world.barrier()
    return out / ("best.safetensors" if run.best < math.inf else "last.safetensors")
