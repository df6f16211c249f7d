"""Presets of PAN-Crafter."""

import math
from dataclasses import replace

from uknowpan.models.published.pan_crafter.network import PanCrafterConfig
from uknowpan.models.published.pan_crafter.stage import PanCrafterOptions
from uknowpan.models.training.presets import PUBLISHED, SMALL, Settings


def paper(bands: int) -> Settings:
    """Published settings (METHODS 2.4); the weights are not averaged."""
    config = replace(PUBLISHED, iterations=50_000, batch_size=48, weight_decay=1e-2, warmup=100)
    config = replace(config, milestones=(), ema=0.0, ema_start=0, clip=math.inf)
    return Settings(config, PanCrafterConfig(bands), PanCrafterOptions())


def release(bands: int) -> Settings:
    """`paper` with what the release does otherwise (METHODS 2.1, 2.5)."""
    network = PanCrafterConfig(
        bands, overwritten_pan_keys=True, scrambled_ms_keys=True, random_shifts=True, bicubic_base=True
    )
    options = PanCrafterOptions(raw_residual=True, flips=False, released_crops=True)
    return Settings(replace(paper(bands).train, amp=False), network, options)


def lite(bands: int) -> Settings:
    """A small network."""
    network = PanCrafterConfig(
        bands, widths=(16, 32, 32, 64), blocks=1, attention_from=2, token_width=32, groups=4, expansion=2, dropout=0.0
    )
    return Settings(SMALL, network, PanCrafterOptions())
