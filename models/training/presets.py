"""Settings to begin with: the published ones with corrections (`paper`) and without (`release`), and small ones for
two CPU cores (`lite`).

The presets of a network live beside it; `uknowpan.models.architectures` names them.
"""

from dataclasses import dataclass
from typing import Any

from uknowpan.models.architectures import ARCHITECTURES, resolve
from uknowpan.models.training.loop import TrainConfig

PRESETS = ("lite", "paper", "release")
"""Presets of PanCollection files; a scenes file has others."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run is configured by."""

    train: TrainConfig
    network: Any
    """Config of the network, see `Architecture.config`."""
    options: Any
    """Options of the training stage."""


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
"""Training of U-Know-DiffPAN (CVPR 2025), METHODS 1.0 to 1.5; presets change single fields."""
SMALL = TrainConfig(batch_size=16, iterations=1500, learning_rate=1e-3, warmup=100, validate_every=250, ema=0.99)
"""Training on two CPU cores."""


def preset(name: str, stage: str, bands: int) -> Settings:
    """The settings of a preset for one stage.

    Args:
        name: one of `PRESETS`.
        stage: a stage of `uknowpan.models.architectures`.
        bands: C, the bands of the training files.

    Raises:
        KeyError: no such preset or stage.
    """
    for entry in ARCHITECTURES.values():
        if entry.stage == stage and name in entry.presets:
            settings: Settings = resolve(entry.presets[name])(bands)
            return settings
    raise KeyError(f"preset {name} of stage {stage}")
