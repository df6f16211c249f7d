"""`uknowpan train`: train a stage of U-Know-DiffPAN, or another network."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from uknowpan.commands import shared as opt
from uknowpan.errors import UsageError
from uknowpan.models.architectures import TIMESTEPS, stage_names
from uknowpan.options import INPUT, RESULT, RUN

if TYPE_CHECKING:
    StageName = StrEnum
    ModelName = StrEnum
else:  # the table of networks has the names
    StageName = StrEnum("StageName", {name: name for name in stage_names("--stage")})
    ModelName = StrEnum("ModelName", {name: name for name in stage_names("--model")})

TRAINING, TEACHER = "Training", "Prior and teacher"
"""Groups of options in the help, beside those of `uknowpan.options`."""


class PresetName(StrEnum):
    lite = "lite"
    paper = "paper"
    streams = "streams"


def train(
    data: Annotated[
        list[Path],
        opt.option(
            "--data", INPUT, "PanCollection h5, may be repeated; or, for fsa-s, a file of `uknowpan pack`.", "FILE"
        ),
    ],
    out: Annotated[
        Path, opt.option("--output -o --out", RESULT, "Run folder; its name becomes the model's.", "FOLDER")
    ],
    stage: Annotated[
        StageName | None, opt.option("--stage", TRAINING, "What to train of U-Know-DiffPAN; default: fsa-s.")
    ] = None,
    model: Annotated[
        ModelName | None, opt.option("--model", TRAINING, "Another model to train instead, in one stage.")
    ] = None,
    valid: Annotated[
        list[Path] | None,
        opt.option(
            "--valid", INPUT, "h5 for validation, one per --data; default: its name with valid for train.", "FILE"
        ),
    ] = None,
    prior: Annotated[
        Path | None, opt.option("--prior", TEACHER, "PriorNet checkpoint, for the stage fsa-t.", "FILE")
    ] = None,
    teacher: Annotated[
        Path | None,
        opt.option("--teacher", TEACHER, "Teacher checkpoint that the stage fsa-s asks about every batch.", "FILE"),
    ] = None,
    cache: Annotated[
        list[Path] | None,
        opt.option("--cache", TEACHER, "Its answers from `uknowpan distill-cache`, one for each --data.", "FILE"),
    ] = None,
    teacher_steps: Annotated[
        int, opt.option("--teacher-steps", TEACHER, "Evaluations of --teacher per answer.", "N", 1, TIMESTEPS)
    ] = 1,
    preset: Annotated[
        PresetName | None,
        opt.option("--preset", TRAINING, "Settings to begin with: lite (default), paper, or streams (scenes)."),
    ] = None,
    config: Annotated[
        Path | None,
        opt.option("--config", TRAINING, "TOML file: preset, and the tables train, network and options.", "FILE"),
    ] = None,
    max_value: Annotated[
        float | None,
        opt.option(
            "--max-value", INPUT, "Full scale of files without one: 2047 (WV2, WV3, QB), 1023 (GF2).", "VALUE", 1
        ),
    ] = None,
    resume: Annotated[bool, opt.option("--resume", RUN, "Go on from the run folder.")] = False,
    init: Annotated[
        Path | None, opt.option("--init", TRAINING, "Checkpoint whose weights a new run starts from.", "FILE")
    ] = None,
    dry_run: Annotated[bool, opt.option("--dry-run", RUN, "Print configuration and parameters, and stop.")] = False,
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
        words = {
            "--model" if model else "--stage": kind.value,
            "--preset": preset,
            "--teacher-steps": teacher_steps if teacher_steps > 1 else None,
            "--max-value": max_value,
            **{"--data": data, "--valid": valid, "--out": out, "--config": config, "--init": init},
            **{"--prior": prior, "--teacher": teacher, "--cache": cache},
        }
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
            command=_command(words),
        )
        settings = resolve(request)
        description = described(kind.value, settings)
        if dry_run:
            typer.echo(json.dumps(description, indent=2))
            return
        best = run(request, settings, out, resume=resume, quiet=quiet, num_threads=num_threads)
        if best is not None:
            typer.echo(best)


def _command(options: dict[str, Any]) -> str:
    """The command line for the card; files by name only, without this machine's folders."""
    words = ["uknowpan", "train"]
    for option, given in options.items():
        for value in given if isinstance(given, list) else [given]:
            if value is not None:
                words += [option, value.name if isinstance(value, Path) else str(value)]
    return shlex.join(words)
