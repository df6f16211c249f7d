"""Settings to begin with: the published ones (`paper`) and small ones for two CPU cores (`lite`).

Source of `paper`: U-Know-DiffPAN (CVPR 2025) and its release (METHODS 1.0 to 1.5) for the stages;
for further models the publication that their entry in `MODELS` names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from uknowpan.models.network import LiteConfig
from uknowpan.models.published.pan_crafter.network import PanCrafterConfig
from uknowpan.models.published.pan_crafter.stage import PanCrafterOptions, PanCrafterStage
from uknowpan.models.published.ssdiff import network as ssdiff
from uknowpan.models.published.ssdiff.stage import SSDiffOptions, SSDiffStage
from uknowpan.models.published.stages import PatchStage, PriorOptions, TeacherOptions
from uknowpan.models.published.uknow import prior, teacher
from uknowpan.models.published.uknow.guided import GuidedTeacherConfig
from uknowpan.models.published.uknow.student import StudentConfig
from uknowpan.models.published.uknow.student_stage import StudentOptions
from uknowpan.models.training.loop import TrainConfig

PRESETS = ("lite", "paper")
STAGES = ("prior", "fsa-t", "fsa-s")


@dataclass(frozen=True)
class Settings:
    """Everything that a run is configured by."""

    train: TrainConfig
    network: Any
    """PriorConfig, GuidedTeacherConfig, StudentConfig, LiteConfig or a further model's."""
    options: Any
    """PriorOptions, TeacherOptions, StudentOptions, GenericOptions or a further model's."""


@dataclass(frozen=True)
class Model:
    """A further model, trained in one stage of its own."""

    presets: dict[str, Callable[[int], Settings]]
    """Of `PRESETS`: bands -> settings."""
    stage: Callable[[Any, Any, Any], PatchStage]
    """(network, data, options) -> the stage."""


def preset(name: str, stage: str, bands: int) -> Settings:
    """The settings of a preset for one stage.

    Args:
        name: one of `PRESETS`.
        stage: one of `STAGES` or of `MODELS`.
        bands: of the training files.

    Raises:
        KeyError: no such preset or stage.
    """
    if stage in MODELS:
        return MODELS[stage].presets[name](bands)
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
        network = GuidedTeacherConfig(teacher.presets["paper"](bands=bands), prior.presets["paper"](bands=bands))
        config = replace(PUBLISHED, iterations=400_000)
        return Settings(config, network, TeacherOptions(steps=25))
    config = replace(PUBLISHED, iterations=300_000, clip=0.003)
    return Settings(config, StudentConfig(bands=bands), StudentOptions(steps=25, flips=True))


def _lite(stage: str, bands: int) -> Settings:
    if stage == "prior":
        config = replace(SMALL, iterations=1500, learning_rate=2e-3)
        return Settings(config, prior.presets["lite"](bands=bands), PriorOptions())
    if stage == "fsa-t":
        network = GuidedTeacherConfig(teacher.presets["lite"](bands=bands), prior.presets["lite"](bands=bands))
        config = replace(SMALL, iterations=1500, learning_rate=2e-3)
        return Settings(config, network, TeacherOptions(terminal_share=0.5))
    config = replace(SMALL, iterations=1500, learning_rate=1e-3)
    return Settings(config, LiteConfig(), StudentOptions(terminal_share=0.7, flips=True))


# ------------------------------------------------------------------------------ further models


def _pan_crafter_paper(bands: int) -> Settings:
    """METHODS 2.4; the weights are not averaged."""
    config = replace(PUBLISHED, iterations=50_000, batch_size=48, weight_decay=1e-2, warmup=100)
    config = replace(config, milestones=(), ema=0.0, ema_start=0)
    return Settings(config, PanCrafterConfig(bands), PanCrafterOptions())


def _pan_crafter_lite(bands: int) -> Settings:
    network = PanCrafterConfig(
        bands,
        widths=(16, 32, 32, 64),
        blocks=1,
        attention_from=2,
        token_width=32,
        groups=4,
        expansion=2,
        dropout=0.0,
    )
    config = replace(SMALL, iterations=1500, learning_rate=1e-3)
    return Settings(config, network, PanCrafterOptions())


def _ssdiff_paper(bands: int) -> Settings:
    """METHODS 3.1; neither is the learning rate lowered nor the gradient clipped."""
    config = replace(PUBLISHED, iterations=300_000, batch_size=20, learning_rate=1e-3)
    config = replace(config, milestones=(300_000,), weight_decay=0.0, clip=math.inf)
    config = replace(config, ema=0.9999, ema_start=0)
    return Settings(config, ssdiff.presets("paper", bands), SSDiffOptions(steps=10))


def _ssdiff_lite(bands: int) -> Settings:
    config = replace(SMALL, iterations=1500, learning_rate=1e-3)
    options = SSDiffOptions(terminal_share=0.7, flips=True)
    return Settings(config, ssdiff.presets("lite", bands), options)


MODELS: dict[str, Model] = {
    "pan-crafter": Model({"lite": _pan_crafter_lite, "paper": _pan_crafter_paper}, PanCrafterStage),
    "ssdiff": Model({"lite": _ssdiff_lite, "paper": _ssdiff_paper}, SSDiffStage),
}
"""Name, which is the checkpoint's architecture and what `--model` of `uknowpan train` takes ->
what there is to it. Its network is in `checkpoint`, its sharpener in `pansharpener` and
`patch_sharpener`."""
