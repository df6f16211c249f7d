"""`uknowpan train`: train a stage of U-Know-DiffPAN, or another network."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.errors import UsageError
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
    out: Annotated[
        Path,
        typer.Option("--output", "-o", "--out", metavar="FOLDER", help="Run folder; its name becomes the model's."),
    ],
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
        typer.Option("--config", help="TOML file: preset, and the tables train, network and options."),
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

        from uknowpan.loading import choose_device
        from uknowpan.training.jobs import TrainRequest, resolve
        from uknowpan.training.run import described, own_device, run
        from uknowpan.training.settings import read_config

        if stage is not None and model is not None:
            raise UsageError(f"--model {model.value} is trained in one stage of its own; leave --stage out.")
        kind = model or stage or StageName("fsa-s")
        tables = read_config(config, tuple(PresetName))
        command = _command(
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
        )
        request = TrainRequest(
            stage=kind.value,
            data=data,
            valid=valid or [],
            prior=prior,
            teacher=teacher,
            cache=cache or [],
            teacher_steps=teacher_steps,
            max_value=max_value,
            preset=preset.value if preset else tables.get("preset", PresetName.lite.value),
            config=tables,
            init=init,
            device=own_device(choose_device(device)),
            command=command,
        )
        settings = resolve(request)
        description = described(kind.value, settings)
        if dry_run:
            typer.echo(json.dumps(description, indent=2))
            return
        best = run(request, settings, out, resume=resume, quiet=quiet, num_threads=num_threads)
        if best is not None:
            typer.echo(best)


def _command(*files: tuple[str, Path | None], **values: object) -> str:
    """The command line for the card; files by name only, without this machine's folders."""
    words = ["uknowpan", "train"]
    for option, value in values.items():
        words += [] if value is None else [option, str(value)]
    for option, path in files:
        words += [] if path is None else [option, path.name]
    return shlex.join(words)
