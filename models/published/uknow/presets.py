"""Presets of U-Know-DiffPAN's three stages (CVPR 2025 and its release, METHODS 1.0 to 1.5)."""

from dataclasses import replace

from uknowpan.models.network import LiteConfig
from uknowpan.models.published.uknow.guided import GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig
from uknowpan.models.published.uknow.stages import PriorOptions, StudentOptions, TeacherOptions
from uknowpan.models.published.uknow.student import StudentConfig
from uknowpan.models.published.uknow.teacher import TeacherConfig
from uknowpan.models.training.presets import PUBLISHED, SMALL, Settings


def prior_paper(bands: int) -> Settings:
    """The release never reaches its milestones and averages no weights (B9)."""
    config = replace(PUBLISHED, iterations=300_000, weight_decay=0.0, milestones=(300_000,), ema=0.0, ema_start=0)
    return Settings(config, PriorConfig(bands), PriorOptions())


def prior_lite(bands: int) -> Settings:
    """A small PriorNet."""
    return Settings(replace(SMALL, learning_rate=2e-3), PriorConfig(bands, width=16, blocks=2), PriorOptions())


def teacher_paper(bands: int) -> Settings:
    """The published teacher."""
    network = GuidedTeacherConfig(TeacherConfig(bands), PriorConfig(bands))
    return Settings(replace(PUBLISHED, iterations=400_000), network, TeacherOptions(steps=25))


def teacher_lite(bands: int) -> Settings:
    """A small teacher."""
    teacher = TeacherConfig(bands, width=8, blocks=1, heads=4, patch=2, dropout=0.0, drop_path=0.0)
    network = GuidedTeacherConfig(teacher, PriorConfig(bands, width=16, blocks=2))
    return Settings(replace(SMALL, learning_rate=2e-3), network, TeacherOptions(terminal_share=0.5))


def student_paper(bands: int) -> Settings:
    """The published student."""
    config = replace(PUBLISHED, iterations=300_000, clip=0.003)
    return Settings(config, StudentConfig(bands=bands), StudentOptions(steps=25, flips=True))


def student_lite(bands: int) -> Settings:
    """The any-sensor student, which serves any number of bands."""
    return Settings(SMALL, LiteConfig(), StudentOptions(terminal_share=0.7, flips=True))
