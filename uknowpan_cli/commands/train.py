"""`uknowpan train`: train a stage, or a further model."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uknowpan import errors as exits
from uknowpan import options as opt
from uknowpan.errors import OutputExists, UsageError
from uknowpan.models.architectures import TIMESTEPS, stage_names

if TYPE_CHECKING:
    StageName = StrEnum
    ModelName = StrEnum
else:  # the table of networks has the names
    StageName = StrEnum("StageName", {name: name for name in stage_names("--stage")})
    ModelName = StrEnum("ModelName", {name: name for name in stage_names("--model")})


class PresetName(StrEnum):
    lite = "lite"
    paper = "paper"


def train(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            help="PanCollection h5 for training, may be repeated; or a scenes file of `uknowpan pack` (stage fsa-s).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder; its name becomes the model's.")],
    stage: Annotated[
        StageName | None,
        typer.Option("--stage", help="What to train of U-Know-DiffPAN; default: fsa-s."),
    ] = None,
    model: Annotated[
        ModelName | None,
        typer.Option("--model", help="Another model to train instead, in one stage."),
    ] = None,
    valid: Annotated[
        list[Path] | None,
        typer.Option(
            "--valid",
            help="PanCollection h5 for validation, one for each --data; default: its name with valid for train.",
        ),
    ] = None,
    prior: Annotated[Path | None, typer.Option("--prior", help="PriorNet checkpoint, for the stage fsa-t.")] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", help="Teacher checkpoint that the stage fsa-s asks about every batch."),
    ] = None,
    cache: Annotated[
        list[Path] | None,
        typer.Option("--cache", help="Its answers from `uknowpan distill-cache`, one for each --data."),
    ] = None,
    teacher_steps: Annotated[
        int,
        typer.Option("--teacher-steps", min=1, max=TIMESTEPS, help="Evaluations of --teacher per answer."),
    ] = 1,
    preset: Annotated[
        PresetName | None,
        typer.Option("--preset", help="Settings to begin with: lite (default) or paper."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="TOML: preset, and the tables [train], [network] and [options]."),
    ] = None,
    max_value: Annotated[
        float | None,
        typer.Option(
            "--max-value",
            min=1,
            help="Full scale in DN of files that do not say: 2047 (WV2, WV3, QB), 1023 (GF2).",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder.")] = False,
    init: Annotated[Path | None, typer.Option("--init", help="Checkpoint whose weights a new run starts from.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the configuration and the parameters, and stop."),
    ] = False,
    device: opt.DeviceOption = "auto",
    num_threads: opt.ThreadsOption = None,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Train one of the three stages: PriorNet, the teacher FSA-T, the student FSA-S.

    Or, with --model, another network on the same data: PAN-Crafter or SSDiff.

    Run with `torchrun --nproc-per-node N -m uknowpan train ...` to use several GPUs.
    """
    with opt.guarded(-1 if quiet else verbose):
        import json

        from uknowpan.models.devices import tune_cpu
        from uknowpan.models.training.loop import train as run
        from uknowpan.models.training.run_folder import ConfigMismatch, resolved_config
        from uknowpan.opening import choose_device
        from uknowpan.stopping import stop_requests
        from uknowpan.training.jobs import TrainRequest, make_job, resolve
        from uknowpan.training.settings import read_config
        from uknowpan.training.show import TrainShow

        if stage is not None and model is not None:
            raise UsageError(f"--model {model.value} is trained in one stage of its own; leave --stage out.")
        kind = model or stage or StageName("fsa-s")
        settings = read_config(config, tuple(PresetName))
        request = TrainRequest(
            stage=kind.value,
            data=data,
            valid=valid or [],
            prior=prior,
            teacher=teacher,
            cache=cache or [],
            teacher_steps=teacher_steps,
            max_value=max_value,
            preset=preset.value if preset else settings.get("preset", PresetName.lite.value),
            config=settings,
            init=init,
            device=_own_device(choose_device(device)),
            command=_command(
                *(("--data", path) for path in data),
                *(("--valid", path) for path in valid or []),
                *(("--out", out), ("--config", config), ("--init", init)),
                *(("--prior", prior), ("--teacher", teacher)),
                *(("--cache", path) for path in cache or []),
                **{
                    "--model" if model else "--stage": kind.value,
                    "--preset": preset,
                    "--teacher-steps": teacher_steps if teacher_steps > 1 else None,
                    "--max-value": max_value,
                },
            ),
        )
        found = resolve(request)
        resolved = resolved_config(kind.value, found.train, found.network, found.options)
        parameters = _parameters(found.network)
        if dry_run:
            counted = {**resolved, "parameters": parameters}
            typer.echo(json.dumps(counted, indent=2))
            return
        if not resume and (out / "state.pt").exists():
            raise OutputExists(f"{out} holds a run already; --resume goes on with it, or choose another folder.")
        tune_cpu(num_threads or _threads_of_one())
        with _processes(request.device) as first, _memory_watched(found.train.batch_size):
            job = make_job(request, found)
            show = TrainShow(out, found.train.iterations, quiet=quiet or not first, writes=first)
            try:
                with stop_requests() as stopping:
                    best = run(
                        job,
                        found.train,
                        out,
                        resume=resume,
                        init=init,
                        device=request.device,
                        on_step=show.step,
                        on_log=show.log,
                        on_examples=show.examples,
                        should_stop=lambda: bool(stopping),
                    )
            except ConfigMismatch as error:
                raise UsageError(str(error)) from error
            finally:
                show.close()
            if first:
                typer.echo(best)


@contextmanager
def _memory_watched(batch_size: int) -> Iterator[None]:
    """Say in one sentence that memory ran out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not exits.is_out_of_memory(error):
            raise
        raise exits.OutOfMemory(
            f"Memory ran out with a batch_size of {batch_size}; begin anew with a lower one in [train] of --config."
        ) from error


def _command(*files: tuple[str, Path | None], **values: object) -> str:
    """What was typed, for the card; of a file its name only, not where this machine keeps it."""
    words = ["uknowpan", "train"]
    for option, value in values.items():
        words += [] if value is None else [option, str(value)]
    for option, path in files:
        words += [] if path is None else [option, path.name]
    return shlex.join(words)


def _parameters(network: Any) -> int:
    """How many numbers the stage trains; exits with 2 if there is no such network."""
    import torch

    from uknowpan.models.checkpoints import network_of

    try:
        with torch.device("meta"):
            made = network_of(network)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"[network]: there is no such network ({error}).") from error
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------ torchrun


def _own_device(device: str) -> str:
    """Under torchrun every process of a machine has a GPU of its own."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def _threads_of_one() -> int | None:
    """The cores are shared by the processes of a machine."""
    from uknowpan.models.devices import usable_cores

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if processes == 1 else max(1, usable_cores() // processes)


@contextmanager
def _processes(device: str) -> Iterator[bool]:
    """Join the others that torchrun started; yields whether this process is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    from datetime import timedelta

    import torch.distributed

    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    # The others wait while the first one validates, which may take longer than torch's 10 minutes.
    torch.distributed.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    try:
        yield torch.distributed.get_rank() == 0
    finally:
        torch.distributed.destroy_process_group()
