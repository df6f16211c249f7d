"""Presets of U-Know-DiffPAN's three stages (CVPR 2025 and its release, METHODS 1.0 to 1.5)."""

import math
from dataclasses import replace
from typing import Any

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
    config = replace(config, clip=math.inf)
    return Settings(config, PriorConfig(bands), PriorOptions())


RELEASED: dict[str, Any] = {
    "steps": 25,
    "strided_timesteps": True,
    "respaced_time_index": True,
    "raw_residual": True,
    "self_conditioning": False,
}
"""Sampling and residual of the release (B1, B2, B4)."""


def prior_release(bands: int) -> Settings:
    """`prior_paper` with what the release does otherwise (B3)."""
    network = PriorConfig(bands, highpass_pan=True, variance_floor=0.0)
    return Settings(replace(prior_paper(bands).train, amp=False), network, PriorOptions())


def teacher_release(bands: int) -> Settings:
    """`teacher_paper` with what the release does otherwise (B0 to B4)."""
    teacher = TeacherConfig(bands, highpass_pan=True, variance_floor=0.0, dead_prior=True)
    network = GuidedTeacherConfig(teacher, prior_release(bands).network, raw_prior=True)
    return Settings(replace(teacher_paper(bands).train, amp=False), network, TeacherOptions(**RELEASED))


def student_release(bands: int) -> Settings:
    """`student_paper` with what the release does otherwise; its test loads weights that are not averaged (B9)."""
    config = replace(student_paper(bands).train, amp=False, ema=0.0, ema_start=0)
    options = StudentOptions(**RELEASED, raw_uncertainty=True, flips=True)
    return Settings(config, StudentConfig(bands=bands, highpass_pan=True), options)


def prior_lite(bands: int) -> Settings:
    """A small PriorNet."""
    return Settings(replace(SMALL, learning_rate=2e-3), PriorConfig(bands, width=16, blocks=2), PriorOptions())


def teacher_paper(bands: int) -> Settings:
    """The published teacher."""
    network = GuidedTeacherConfig(TeacherConfig(bands), PriorConfig(bands))
    return Settings(replace(PUBLISHED, iterations=400_000, clip=0.003), network, TeacherOptions(steps=25))


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
