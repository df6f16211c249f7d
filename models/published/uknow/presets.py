"""Presets of U-Know-DiffPAN's three stages (CVPR 2025 and its release, METHODS 1.0 to 1.5)."""

from __future__ import annotations

from dataclasses import replace

from uknowpan.models.network import LiteConfig
from uknowpan.models.published.uknow import prior, teacher
from uknowpan.models.published.uknow.guided import GuidedTeacherConfig
from uknowpan.models.published.uknow.stages import PriorOptions, StudentOptions, TeacherOptions
from uknowpan.models.published.uknow.student import StudentConfig
from uknowpan.models.training.presets import PUBLISHED, SMALL, Settings


def prior_paper(bands: int) -> Settings:
    """The release never reaches its milestones and averages no weights (B9)."""
    config = replace(PUBLISHED, iterations=300_000, weight_decay=0.0, milestones=(300_000,), ema=0.0, ema_start=0)
    return Settings(config, prior.presets["paper"](bands=bands), PriorOptions())


def prior_lite(bands: int) -> Settings:
    """A small PriorNet."""
    return Settings(replace(SMALL, learning_rate=2e-3), prior.presets["lite"](bands=bands), PriorOptions())


def _guided(name: str, bands: int) -> GuidedTeacherConfig:
    return GuidedTeacherConfig(teacher.presets[name](bands=bands), prior.presets[name](bands=bands))


def teacher_paper(bands: int) -> Settings:
    """The published teacher."""
    return Settings(replace(PUBLISHED, iterations=400_000), _guided("paper", bands), TeacherOptions(steps=25))


def teacher_lite(bands: int) -> Settings:
    """A small teacher."""
    config = replace(SMALL, learning_rate=2e-3)
    return Settings(config, _guided("lite", bands), TeacherOptions(terminal_share=0.5))


def student_paper(bands: int) -> Settings:
    """The published student."""
    config = replace(PUBLISHED, iterations=300_000, clip=0.003)
    return Settings(config, StudentConfig(bands=bands), StudentOptions(steps=25, flips=True))


def student_lite(bands: int) -> Settings:
    """The any-sensor student, which serves any number of bands."""
    return Settings(SMALL, LiteConfig(), StudentOptions(terminal_share=0.7, flips=True))
