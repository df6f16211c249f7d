"""Every option of `train`, once. This module needs neither Typer nor PyTorch."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from uknowpan.errors import UsageError
from uknowpan.models.architectures import TIMESTEPS, stage_names
from uknowpan.options import INPUT, RESULT, RUN, Option, check_full_scale, shared

if TYPE_CHECKING:
    StageName: TypeAlias = str
    ModelName: TypeAlias = str
else:  # the table of networks has the names
    StageName, ModelName = (Literal[stage_names(option)] for option in ("--stage", "--model"))

TRAINING, TEACHER = "Training", "Prior and teacher"
"""Groups of options in the help, beside those of `uknowpan.options`."""


@dataclass(frozen=True)
class TrainOptions:
    """Options of `train`.

    Raises:
        UsageError: files that the stage has no use for or lacks, or two values that exclude each other.
    """

    data: Annotated[
        Sequence[Path],
        Option(
            "--data",
            INPUT,
            "PanCollection h5, may be repeated; or, for fsa-s, a file of `uknowpan pack`.",
            "FILE",
            cli=list[Path],
        ),
    ]
    out: Annotated[Path, Option("--output -o --out", RESULT, "Run folder; its name becomes the model's.", "FOLDER")]
    stage: Annotated[
        StageName | None, Option("--stage", TRAINING, "What to train of U-Know-DiffPAN; default: fsa-s.")
    ] = None
    model: Annotated[ModelName | None, Option("--model", TRAINING, "Another model to train instead, in one stage.")] = (
        None
    )
    valid: Annotated[
        Sequence[Path],
        Option(
            "--valid",
            INPUT,
            "h5 for validation, one per --data; default: its name with valid for train.",
            "FILE",
            cli=list[Path] | None,
        ),
    ] = ()
    prior: Annotated[Path | None, Option("--prior", TEACHER, "PriorNet checkpoint, for the stage fsa-t.", "FILE")] = (
        None
    )
    teacher: Annotated[
        Path | None,
        Option("--teacher", TEACHER, "Teacher checkpoint that the stage fsa-s asks about every batch.", "FILE"),
    ] = None
    cache: Annotated[
        Sequence[Path],
        Option(
            "--cache",
            TEACHER,
            "Its answers from `uknowpan distill-cache`, one for each --data.",
            "FILE",
            cli=list[Path] | None,
        ),
    ] = ()
    teacher_steps: Annotated[
        int | None,
        Option(
            "--teacher-steps",
            TEACHER,
            "Evaluations of --teacher per answer; default: as it declares.",
            "N",
            1,
            TIMESTEPS,
        ),
    ] = None
    preset: Annotated[
        Literal["lite", "paper", "release", "streams"] | None,
        Option(
            "--preset",
            TRAINING,
            "Settings to begin with: lite (default), paper (published, corrected), release (as the published code), "
            "or streams (scenes).",
        ),
    ] = None
    config: Annotated[
        Path | None,
        Option("--config", TRAINING, "TOML file: preset, and the tables train, network and options.", "FILE"),
    ] = None
    max_value: Annotated[
        float | None,
        Option(
            "--max-value",
            INPUT,
            "Full scale of files without one: 2047 (WV2, WV3, QB), 1023 (GF2).",
            "VALUE",
            1,
        ),
    ] = None
    resume: Annotated[bool, Option("--resume", RUN, "Go on from the run folder.")] = False
    profile: Annotated[
        bool, Option("--profile", RUN, "Time the operations of 20 steps, after 10 others; written to OUT/profile.txt.")
    ] = False
    init: Annotated[
        Path | None, Option("--init", TRAINING, "Checkpoint whose weights a new run starts from.", "FILE")
    ] = None
    device: Annotated[str, shared("device")] = "auto"
    num_threads: Annotated[int | None, shared("num_threads")] = None

    def __post_init__(self) -> None:
        for name in ("valid", "cache"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        if self.stage is not None and self.model is not None:
            raise UsageError(f"--model {self.model} is trained in one stage of its own; leave --stage out.")
        if self.kind == "fsa-t" and self.prior is None:
            raise UsageError("The stage fsa-t needs --prior, a checkpoint of `uknowpan train --stage prior`.")
        for name, stage in (("prior", "fsa-t"), ("teacher", "fsa-s"), ("cache", "fsa-s")):
            if getattr(self, name) and self.kind != stage:
                raise UsageError(f"--{name} is of the stage {stage}, not of {self.kind}.")
        check_full_scale(self.max_value)
        if self.teacher is not None and self.cache:
            raise UsageError("Give --teacher or --cache, not both.")
        for name in ("valid", "cache"):
            given = getattr(self, name)
            if given and len(given) != len(self.data):
                raise UsageError(
                    f"{len(given)} --{name} for {len(self.data)} --data; give one for each, in the same order."
                )

    @property
    def kind(self) -> str:
        """The stage to train, one of `uknowpan.models.architectures`."""
        return self.model or self.stage or "fsa-s"

    @property
    def command(self) -> str:
        """The command line for the card; files by name only, without this machine's folders."""
        words = ["uknowpan", "train", "--model" if self.model else "--stage", self.kind]
        for name in (
            *("preset", "teacher_steps", "max_value", "data", "valid", "out", "config", "init"),
            *("prior", "teacher", "cache"),
        ):
            given = getattr(self, name)
            if given != getattr(TrainOptions, name, None):
                for value in given if isinstance(given, Sequence) and not isinstance(given, str) else [given]:
                    words += [f"--{name.replace('_', '-')}", value.name if isinstance(value, Path) else str(value)]
        return shlex.join(words)
