"""One training loop; a stage says what is trained on what.

Everything random is a function of (seed, step): a run that was interrupted and resumed equals one
that was not. The run folder holds config.json, log.jsonl, state.pt (for resuming) and the
checkpoints last.safetensors and best.safetensors (EMA weights).

Under `torchrun` every process trains on its share of each batch (DistributedDataParallel); the
first one writes. Noise and timesteps are drawn for the whole batch and then shared out, so that
the number of processes changes the losses by rounding only; dropout is drawn by each process.
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from uknowpan.errors import InputError, Interrupted, ModelError
from uknowpan.models.checkpoints import Card, load_model, save_checkpoint
from uknowpan.models.errors import CheckpointError, DataError, ModelMismatch
from uknowpan.models.training.parallel import current_world

try:
    import fcntl
except ImportError:  # not a POSIX system: runs in one folder are not kept apart
    fcntl = None  # type: ignore[assignment]


_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""A file system without locks."""
_LONGEST_VALUE = 80
"""Characters of a value that differs, as the user reads it."""


@dataclass(frozen=True)
class TrainConfig:
    """How a stage is trained."""

    iterations: int = 9000
    batch_size: int = 16
    """Of all processes together."""
    learning_rate: float = 8e-4
    warmup: int = 300
    milestones: tuple[int, ...] = ()
    """Steps at which the learning rate is halved; none: a cosine down to 1 % of it."""
    weight_decay: float = 1e-4
    clip: float = 1.0
    """Gradient norm is clipped to this."""
    ema: float = 0.999
    ema_start: int = 0
    """Step from which weights are averaged; before, the average is a copy."""
    seed: int = 0
    validate_every: int = 500
    validation_samples: int = 256
    """At most so many patches of the validation files are looked at, spread over them."""
    checkpoint_every: int = 250
    log_every: int = 50
    amp: bool = True
    """bf16 autocast of the network; losses stay float32."""
    workers: int = 0
    """Processes that read ahead, of each training process; 0: none."""
    compile: bool = False
    """torch.compile of the network: slow to begin, then faster, mostly on GPUs."""
    halved_share: float = 0.0
    """Share of scene variants whose truth and PAN are first averaged to half the resolution: a
    truth as sharp as its pixels allow, which no sensor's own MS is. Scenes files only."""


class ConfigMismatch(ModelError):
    """A run is to go on with another configuration than it began with."""


class Diverged(InputError):
    """A loss or its gradient is not finite any more."""


@dataclass(frozen=True)
class Examples:
    """Validation patches to look at; values divided by full scale."""

    pan: Tensor
    """(B, 1, H, W)"""
    lms: Tensor
    """(B, C, H, W)"""
    hrms: Tensor
    """(B, C, H, W) what the network makes of them."""
    gt: Tensor
    """(B, C, H, W)"""
    sigma: Tensor | None = None
    """(B, C, H, W) the 1-sigma that it claims."""


class Stage(Protocol):
    """What the loop needs to know of a stage."""

    name: str
    network: Any
    """Config dataclass of the network."""
    options: Any
    """Config dataclass of the stage: losses, flags."""

    def data_identity(self) -> dict[str, Any]:
        """What tells the data from others, without paths; as JSON holds it."""

    def build(self) -> nn.Module:
        """The network to train; only parameters that require gradients are."""

    def batches(self, start: int, stop: int) -> Generator[Any]:
        """Training data of steps `start` .. `stop` - 1, each a function of its step alone: this
        process's share; has `.to(device)`."""

    def losses(self, model: nn.Module, batch: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Named parts; their sum is minimised. The batch is on the model's device, the generator
        on the CPU and the same in each process, so that every device sees the same noise."""

    def deployed(self, model: nn.Module) -> nn.Module:
        """The part of the network that a checkpoint holds."""

    def validate(self, model: nn.Module) -> dict[str, float]:
        """Scores of a deployed network on the validation split; lower "score" is better."""

    def examples(self, model: nn.Module) -> Examples | None:
        """A few validation patches, if the stage has some to show."""

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
        """The card of a checkpoint made now."""


def resolved_config(
    stage: str,
    config: TrainConfig,
    network: Any,
    options: Any,
    data: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that was configured, as config.json holds it; `data` as `Stage.data_identity`."""
    plain = {
        "stage": stage,
        "train": asdict(config),
        "network": asdict(network),
        "options": asdict(options),
    } | ({} if data is None else {"data": data})
    return json.loads(json.dumps(plain))  # tuples become lists, as in the file


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Fields that differ; those that only one side knows are another version's."""
    shared = [k for k in there if k in here and there[k] != here[k]]
    return ", ".join(f"{k} {_short(there[k])} (here {_short(here[k])})" for k in shared)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"stage": s, "train": {"seed": 0}} -> {"stage": s, "train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = _flat(value) if type(value) is dict else None
        flat |= {key: value} if inner is None else {f"{key}.{k}": v for k, v in inner.items()}
    return flat


def _refuse_other_config(path: Path, resolved: dict[str, Any]) -> None:
    """A resumed run must be configured as it was begun, and on the same data."""
    here = _flat(resolved)
    try:
        there = _flat(json.loads(path.read_text()))
        tables, found = ({key.partition(".")[0] for key in flat} for flat in (here, there))
        # Runs of earlier versions did not tell their data.
        if missing := sorted(tables - found - {"data"}):
            raise ValueError(f"it lacks {' and '.join(missing)}")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), so --resume cannot tell how the run was configured; "
            "begin anew in another folder."
        ) from error
    differing = _differences(there, here)
    if differing:
        raise ConfigMismatch(
            f"the run in {path.parent} was begun with {differing}; --resume needs the same "
            "configuration and data, others a folder of their own."
        )


def _start_from(init: Path, model: nn.Module, network: Any) -> None:
    """Take the weights of a checkpoint."""
    source, card = load_model(init)
    try:
        model.load_state_dict(source.state_dict())
    except RuntimeError as error:
        there, here = (_flat(json.loads(json.dumps(c))) for c in (card.config, asdict(network)))
        differing = _differences(there, here) or "another architecture"
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
    iterations: int,
) -> tuple[int, float, dict[str, Tensor], int]:
    """(steps done, best score, sums for the next line of the log, steps in them) of a saved
    state."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        window, window_steps = state.get("window", ({}, 0))  # states of earlier versions have none
        step = int(state["step"])
        if not 0 <= step <= iterations:
            raise ValueError(f"step {step} of {iterations}")
        return step, float(state["best"]), dict(window), int(window_steps)
    except torch.OutOfMemoryError:  # a RuntimeError, but not the file's fault
        raise
    except (
        *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, OSError),
        *(TypeError, ValueError, ArithmeticError, AttributeError),
    ) as error:
        raise CheckpointError(
            f"{path} is damaged or cannot be read ({type(error).__name__}), so the run cannot go "
            "on; begin another folder, with --init and a checkpoint of this one for its weights."
        ) from error


def _trim_log(path: Path, step: int) -> None:
    """Drop the lines of steps that are done anew: a run may die after its last state."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _step_of(line) <= step]
    if kept != lines:
        _write_whole(path, b"".join(kept))


def _write_whole(path: Path, content: bytes) -> None:
    """Beside the file first: killed at any moment, it leaves the old one or the new one."""
    temporary = path.with_name(f".{path.stem}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _step_of(line: bytes) -> float:
    """The step of a line of the log; infinity for one that was cut off or is no text."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError, OverflowError):
        return math.inf


@contextmanager
def _only_run_in(out: Path) -> Iterator[None]:
    """Make a run folder, if need be, and keep other runs out of it.

    Raises:
        DataError: another run is in it.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = out / ".lock"
    lock = _locked(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # still locked: nobody else's
        lock.close()


def _locked(path: Path) -> IO[str]:
    """The file, made if need be and locked until it is closed."""
    while True:
        lock = open(path, "w")  # noqa: SIM115 - for writing, or NFS would not lock it
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return lock
            lock.close()
            if isinstance(error, BlockingIOError):
                text = f"Another run is training in {path.parent}; wait for it"
            else:
                text = f"{path.parent} cannot be locked ({error.strerror}); try again"
            raise DataError(f"{text}, or choose another folder.") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                return lock
        lock.close()  # removed by its owner before we had it; look again


def _learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then halvings at the milestones or a cosine down to 1 % of the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.milestones:
        return config.learning_rate * 0.5 ** sum(step >= m for m in config.milestones)
    done = (step - config.warmup) / max(config.iterations - config.warmup, 1)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


class _Run:
    """A network with what trains it, and the files that it leaves."""

    def __init__(self, stage: Stage, config: TrainConfig, out: Path, device: torch.device, init: Path | None):
        self.stage, self.config, self.out, self.device = stage, config, out, device
        self.world = current_world()
        self.step, self.best = 0, math.inf
        torch.manual_seed(config.seed)  # initial weights
        self.model = stage.build()
        if init is not None:
            _start_from(init, stage.deployed(self.model), stage.network)
        self.model.to(device)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=device.type == "cuda",
        )
        self._window: dict[str, Tensor] = {}
        self._window_steps = 0
        self._began = time.monotonic()

    def go_on(self) -> None:
        """Take up the saved state."""
        self.step, self.best, self._window, self._window_steps = _go_on_from(
            self.out / "state.pt",
            self.model,
            self.ema,
            self.optimizer,
            self.device,
            self.config.iterations,
        )

    def prepare(self) -> None:
        """Make the network that steps go through; after the weights are in place."""
        forward: Any = torch.compile(self.model) if self.config.compile else self.model
        if self.world.size > 1:
            places = [self.device] if self.device.type == "cuda" else None
            forward = DistributedDataParallel(forward, device_ids=places)
        self.forward = forward

    def take(self, batch: Any) -> dict[str, Tensor]:
        """One step; its losses.

        Raises:
            Diverged: they or their gradient are not finite.
        """
        config, step = self.config, self.step
        seed = config.seed * 1_000_003 + step
        torch.manual_seed(seed + 7919 * self.world.rank)  # dropout
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(config, step)
        self.model.train()
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=config.amp):
            parts = self.stage.losses(self.forward, batch.to(self.device), torch.Generator().manual_seed(seed))
        loss = torch.stack(list(parts.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, config.clip)
        if not bool(torch.isfinite(loss.detach() + norm)):
            raise Diverged(
                f"step {step + 1} has a loss of {float(loss.detach()):.4g} with a gradient of "
                f"norm {float(norm):.4g}; begin anew with a lower learning_rate, and look for "
                "values that are not finite in the scenes."
            )
        self.optimizer.step()
        if step < config.ema_start:
            self.ema.n_averaged.zero_()  # the next update copies
        self.ema.update_parameters(self.model)
        self.step += 1
        self._remember({**parts, "gradient_norm": norm})
        return parts

    def _remember(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self._window[name] = self._window.get(name, torch.zeros_like(value)) + value
        self._window_steps += 1

    def _shared_window(self) -> dict[str, Tensor]:
        """The sums for the next line of the log, as means over all processes."""
        if not self._window:
            return {}
        sums = self.world.mean(torch.stack(list(self._window.values())))
        return dict(zip(self._window, sums, strict=True))

    def entry(self) -> dict[str, Any]:
        """A line of the log: means since the one before, over all processes."""
        sums, steps = self._shared_window(), max(self._window_steps, 1)
        means = {name: float(value / steps) for name, value in sums.items()}
        self._window, self._window_steps = {}, 0
        return {
            "step": self.step,
            "seconds": round(time.monotonic() - self._began, 1),
            "learning_rate": _learning_rate(self.config, self.step - 1),
            **means,
        }

    def write(self, entry: dict[str, Any]) -> None:
        """Append a line to log.jsonl."""
        with open(self.out / "log.jsonl", "a") as log:
            log.write(json.dumps(entry) + "\n")

    def validate(self) -> dict[str, float]:
        """Score the averaged weights and save them."""
        averaged = self.stage.deployed(self.ema.module).eval()
        scores = self.stage.validate(averaged)
        card = self.stage.card(self.out.resolve().name, self.step, scores)
        save_checkpoint(self.out / "last.safetensors", averaged, card)
        if scores["score"] < self.best:
            self.best = scores["score"]
            save_checkpoint(self.out / "best.safetensors", averaged, card)
        return scores

    def save_state(self) -> None:
        """Write what resuming needs, beside the old state first; the first process does.

        Raises:
            DataError: it cannot be written; the old state stays.
        """
        window = self._shared_window()
        if self.world.rank:
            return
        path, temporary = self.out / "state.pt", self.out / ".state.tmp"
        state = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "best": self.best,
            "window": (window, self._window_steps),
        }
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch says RuntimeError of a full disk
            temporary.unlink(missing_ok=True)
            raise DataError(
                f"{path} cannot be written ({str(error).splitlines()[0]}); make room, then "
                "--resume goes on from the state before."
            ) from error


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
        stage: what is trained.
        config: how.
        out: the run folder, made if need be; its name becomes the model's.
        resume: go on from `out`'s state.pt if there is one.
        init: checkpoint whose weights a new run starts from; a resumed one has its own.
        device: where the network is trained.
        on_step: called with the step number and this process's losses (floats) after every step.
        on_log: called with every line of log.jsonl.
        on_examples: called with the step number and `Examples` after every validation.
        should_stop: asked after every step; True in any process saves the state and raises
            `Interrupted`.

    Returns:
        Path of the best checkpoint; of the last one where no score was a number.

    Raises:
        Interrupted: `should_stop` said so.
        ConfigMismatch: `resume` with another configuration or other data.
        ModelMismatch: `init` is of another network, or the batch cannot be shared out.
        CheckpointError: `init` or the state cannot be read.
        DataError: training data cannot be read, the state cannot be written, or another run is in
            `out`.
        Diverged: a loss or its gradient is not finite; the last saved state stays.
    """
    device = torch.device(device)
    resolved = resolved_config(stage.name, config, stage.network, stage.options, stage.data_identity())
    resumed = resume and (out / "state.pt").exists()
    if resumed:
        _refuse_other_config(out / "config.json", resolved)
    torch.set_flush_denormal(True)
    run = _Run(stage, config, out, device, None if resumed else init)
    run.world.share(config.batch_size)
    first = run.world.rank == 0
    with _only_run_in(out) if first else nullcontext():
        if resumed:
            run.go_on()
        run.world.barrier()  # every process has read what the first one now writes
        if first:
            _write_whole(out / "config.json", (json.dumps(resolved, indent=2) + "\n").encode())
            _trim_log(out / "log.jsonl", run.step)
        run.prepare()
        with closing(stage.batches(run.step, config.iterations)) as batches:
            for batch in batches:
                parts = run.take(batch)
                last = run.step == config.iterations
                if on_step is not None:
                    on_step(run.step, {k: float(v.detach()) for k, v in parts.items()})
                scored = run.step % config.validate_every == 0 or last
                if scored or run.step % config.log_every == 0:
                    entry = run.entry()
                    if scored and first:
                        entry |= run.validate()
                        shown = stage.examples(stage.deployed(run.ema.module))
                        if shown is not None and on_examples is not None:
                            on_examples(run.step, shown)
                    if first:
                        run.write(entry)
                        on_log(entry)
                if run.step % config.checkpoint_every == 0 or last:
                    run.save_state()
                if not last and run.world.any(should_stop(), device):
                    run.save_state()
                    raise Interrupted(f"stopped after step {run.step}; --resume goes on from there")
        run.world.barrier()
    return out / ("best.safetensors" if run.best < math.inf else "last.safetensors")
