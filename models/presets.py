"""Settings to begin with: the published ones (`paper`) and small ones for two CPU cores (`lite`).

Source of `paper`: U-Know-DiffPAN (CVPR 2025) and its release (METHODS 1.0 to 1.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import prior, teacher
from .guided import GuidedTeacherConfig
from .stages import PriorOptions, TeacherOptions
from .student import StudentConfig
from .student_lite import LiteConfig
from .student_stages import StudentOptions
from .training import TrainConfig

__all__ = ["PRESETS", "STAGES", "Settings", "preset"]

PRESETS = ("lite", "paper")
STAGES = ("prior", "fsa-t", "fsa-s")


@dataclass(frozen=True)
class Settings:
    """Everything that a run is configured by."""

    train: TrainConfig
    network: Any
    """PriorConfig, GuidedTeacherConfig, StudentConfig or LiteConfig."""
    options: Any
    """PriorOptions, TeacherOptions, StudentOptions or GenericOptions."""


def preset(name: str, stage: str, bands: int) -> Settings:
    """The settings of a preset for one stage.

    Args:
        name: one of `PRESETS`.
        stage: one of `STAGES`.
        bands: of the training files.

    Raises:
        KeyError: no such preset or stage.
    """
    if stage not in STAGES:
        raise KeyError(stage)
    return {"lite": _lite, "paper": _paper}[name](stage, bands)


PUBLISHED = TrainConfig(
    batch_size=32,
    learning_rate=1e-4,
    warmup=0,
    milestones=(100_000, 200_000, 350_000),
    ema=0.995,
    ema_start=20_000,
    validate_every=2500,
    checkpoint_every=1000,
    workers=4,
)
SMALL = TrainConfig(batch_size=16, warmup=100, validate_every=250, ema=0.99)


def _paper(stage: str, bands: int) -> Settings:
    if stage == "prior":  # its milestones are never reached in the release (B9), nor is an EMA
        config = replace(PUBLISHED, iterations=300_000, weight_decay=0.0, milestones=(300_000,))
        config = replace(config, ema=0.0, ema_start=0)
        return Settings(config, prior.presets["paper"](bands=bands), PriorOptions())
    if stage == "fsa-t":
        network = GuidedTeacherConfig(
            teacher.presets["paper"](bands=bands), prior.presets["paper"](bands=bands)
        )
        config = replace(PUBLISHED, iterations=400_000)
        return Settings(config, network, TeacherOptions(steps=25))
    config = replace(PUBLISHED, iterations=300_000, clip=0.003)
    return Settings(config, StudentConfig(bands=bands), StudentOptions(steps=25, flips=True))


def _lite(stage: str, bands: int) -> Settings:
    if stage == "prior":
        config = replace(SMALL, iterations=1500, learning_rate=2e-3)
        return Settings(config, prior.presets["lite"](bands=bands), PriorOptions())
    if stage == "fsa-t":
        network = GuidedTeacherConfig(
            teacher.presets["lite"](bands=bands), prior.presets["lite"](bands=bands)
        )
        config = replace(SMALL, iterations=1500, learning_rate=2e-3)
        return Settings(config, network, TeacherOptions(terminal_share=0.5))
    config = replace(SMALL, iterations=1500, learning_rate=1e-3)
    return Settings(config, LiteConfig(), StudentOptions(terminal_share=0.7, flips=True))
