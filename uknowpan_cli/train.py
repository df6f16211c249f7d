"""`uknowpan train`: train a stage."""

from __future__ import annotations

import shlex
import signal
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__, exits
from . import options as opt

if TYPE_CHECKING:
    from uknowpan_models.data import Scene

__all__ = ["train"]


_COUNTS = frozenset(
    {
        *("iterations", "batch_size", "validate_every", "checkpoint_every"),
        *("width", "deep_width", "timesteps"),
    }
)


class StageName(StrEnum):
    fsa_s = "fsa-s"


def train(
    data: Annotated[Path, typer.Option("--data", help="Scenes file made by `uknowpan pack`.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder.")],
    stage: Annotated[StageName, typer.Option("--stage", help="What to train.")] = StageName.fsa_s,
    config: Annotated[
        Path | None, typer.Option("--config", help="TOML with the tables [train] and [network].")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder.")] = False,
    init: Annotated[
        Path | None, typer.Option("--init", help="Checkpoint whose weights a new run starts from.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the configuration and stop.")
    ] = False,
    device: opt.DeviceOption = "auto",
    num_threads: opt.ThreadsOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Train the `lite` student on whole scenes, degraded anew at every step."""
    with opt.guarded(-1 if quiet else verbose):
        import json

        from uknowpan_models.checkpoint import read_card
        from uknowpan_models.data import GenericBatches, read_scenes
        from uknowpan_models.runtime import tune_cpu
        from uknowpan_models.student_lite import LiteConfig
        from uknowpan_models.training import (
            ConfigMismatch,
            GenericStudentStage,
            TrainConfig,
            resolved_config,
        )
        from uknowpan_models.training import train as run

        from .opening import choose_device

        settings = _read_config(config)
        unknown = sorted(set(settings) - {"train", "network"})
        if unknown:
            opt.fail(f"--config has [train] and [network], not {', '.join(unknown)}.", exits.USAGE)
        train_config = _build(TrainConfig, settings.get("train", {}))
        network = _build(LiteConfig, settings.get("network", {}))
        resolved = resolved_config(stage.value, train_config, network)
        device = choose_device(device)
        if dry_run:
            typer.echo(json.dumps(resolved, indent=2))
            return
        if not resume and (out / "state.pt").exists():
            opt.fail(
                f"{out} holds a run already; --resume goes on with it, or choose another folder.",
                exits.EXISTS,
            )
        tune_cpu(num_threads)
        batches = GenericBatches(
            read_scenes(data, "train"),
            seed=train_config.seed,
            batch_size=train_config.batch_size,
            halved_share=train_config.halved_share,
        )
        valid = GenericBatches(
            read_scenes(data, "valid"), seed=train_config.seed + 1, patches_per_variant=4
        )
        notes = {
            "code_version": __version__,
            "command": _command(stage.value, data=data, out=out, config=config, init=init),
            "seed": train_config.seed,
            "config": resolved,
            "started_from": None if init is None else read_card(init).training,
            "scenes_by_licence": _by_licence(batches.scenes),
            "validation_scenes_by_licence": _by_licence(valid.scenes),
        }
        job = GenericStudentStage(network, batches, valid, notes=notes)

        def show(step: int, parts: dict[str, float]) -> None:
            if not quiet and step % 25 == 0:
                values = ", ".join(f"{k} {v:.4f}" for k, v in parts.items())
                print(
                    f"step {step}/{train_config.iterations}: {values}", file=sys.stderr, flush=True
                )

        try:
            with _stop_requests() as stopping:
                best = run(
                    job,
                    train_config,
                    out,
                    resume=resume,
                    init=init,
                    device=device,
                    on_step=show,
                    should_stop=lambda: bool(stopping),
                )
        except ConfigMismatch as error:
            opt.fail(str(error), exits.USAGE)
        typer.echo(best)


def _command(stage: str, **files: Path | None) -> str:
    """What was typed, for the card; of a file its name only, not where this machine keeps it."""
    words = ["uknowpan", "train", "--stage", stage]
    for option, path in files.items():
        words += [] if path is None else [f"--{option}", path.name]
    return shlex.join(words)


def _by_licence(scenes: Sequence[Scene]) -> dict[str, list[str]]:
    """Licence -> names of the scenes under it."""
    found: dict[str, list[str]] = {}
    for scene in scenes:
        found.setdefault(scene.licence, []).append(scene.name)
    return found


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that arrived: SIGTERM and Ctrl-C wait for the end of a step."""
    stopping: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [
        signal.signal(number, lambda received, frame: stopping.append(received))
        for number in numbers
    ]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        opt.fail(f"--config {path} cannot be read: {error}.", exits.USAGE)


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """A config dataclass with fields overridden; unknown ones are refused with the valid ones."""
    valid = {f.name: f.default for f in fields(kind)}
    unknown = sorted(set(values) - set(valid))
    if unknown:
        opt.fail(
            f"{kind.__name__} has no field {', '.join(unknown)}; valid are {', '.join(valid)}.",
            exits.USAGE,
        )
    for name, value in values.items():
        wanted = type(valid[name])
        numeric = wanted is float and type(value) is int
        if type(value) is not wanted and not numeric:
            opt.fail(f"{name} takes {wanted.__name__}, not {value!r}.", exits.USAGE)
        if name in _COUNTS and value < 1:
            opt.fail(f"{name} must be at least 1, not {value}.", exits.USAGE)
    return kind(**values)
