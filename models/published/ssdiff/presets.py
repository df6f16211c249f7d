"""Presets of SSDiff."""

from __future__ import annotations

import math
from dataclasses import replace

from uknowpan.models.published.ssdiff import network
from uknowpan.models.published.ssdiff.stage import SSDiffOptions
from uknowpan.models.training.presets import PUBLISHED, SMALL, Settings


def paper(bands: int) -> Settings:
    """Published settings (METHODS 3.1): a constant learning rate, gradients not clipped."""
    config = replace(PUBLISHED, iterations=300_000, batch_size=20, learning_rate=1e-3)
    config = replace(config, milestones=(300_000,), weight_decay=0.0, clip=math.inf, ema=0.9999, ema_start=0)
    return Settings(config, network.presets("paper", bands), SSDiffOptions(steps=10))


def lite(bands: int) -> Settings:
    """A small network."""
    options = SSDiffOptions(terminal_share=0.7, flips=True)
    return Settings(SMALL, network.presets("lite", bands), options)
