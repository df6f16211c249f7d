"""Presets of SSDiff."""

import math
from dataclasses import replace

from uknowpan.models.published.ssdiff.network import SSDiffConfig
from uknowpan.models.published.ssdiff.stage import SSDiffOptions
from uknowpan.models.training.presets import PUBLISHED, SMALL, Settings


def paper(bands: int) -> Settings:
    """Published settings (METHODS 3.1): a constant learning rate, gradients not clipped."""
    config = replace(PUBLISHED, iterations=300_000, batch_size=20, learning_rate=1e-3)
    config = replace(config, milestones=(300_000,), weight_decay=0.0, clip=math.inf, ema=0.9999, ema_start=0)
    return Settings(config, SSDiffConfig(bands), SSDiffOptions(steps=10))


def release(bands: int) -> Settings:
    """`paper` with what the release does otherwise (METHODS 3.1 to 3.3)."""
    network = SSDiffConfig(
        bands,
        window=0,
        frequency_window=0,
        detail_gain=1.0,
        noise_gain=1.0,
        batch_norm=True,
        group_norm=True,
        measured_ms=True,
        patch=64,
    )
    options = SSDiffOptions(
        steps=10, strided_timesteps=True, respaced_time_index=True, raw_residual=True, clamped_hrms=True
    )
    return Settings(replace(paper(bands).train, amp=False), network, options)


def lite(bands: int) -> Settings:
    """A network of about the cost of `FSAStudentLite`."""
    network = SSDiffConfig(bands, width=32, time_width=16, grid=2, window=8)
    return Settings(SMALL, network, SSDiffOptions(terminal_share=0.7, flips=True))
