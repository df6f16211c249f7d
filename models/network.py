"""FSA-S in its `lite` form: the distilled student for CPUs and for any sensor.

Every band passes the same weights, with the mean over all bands as context. So the network serves
any number of bands, and permuting the bands permutes the result. All operators are local: with a
halo of `reach` pixels the result does not depend on how the scene was cut. Most work is done on
grids of 2 x 2 and 4 x 4 PAN pixels (pixel-unshuffle).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.architectures import TIMESTEPS
from uknowpan.models.features import BACK_PROJECTION, INJECTIONS, PAN_FEATURES, PLAIN_SCENE_FEATURES
from uknowpan.models.types import Condition, Denoised

LITE_MAPS = INJECTIONS + 2
"""The injections' weights, the correction, the log-sigma."""


@dataclass(frozen=True)
class LiteConfig:
    """Widths of the `lite` student; the defaults are those of the bundled `generic` model."""

    width: int = field(default=24, metadata={"least": 1})
    """Channels per band on the 2 x 2 grid."""
    deep_width: int = field(default=64, metadata={"least": 1})
    """Channels per band on the 4 x 4 grid."""
    blocks: int = 1
    """Residual blocks on the 2 x 2 grid, before and again after the deep part."""
    deep_blocks: int = 3
    """Residual blocks on the 4 x 4 grid."""
    timesteps: int = field(default=TIMESTEPS, metadata={"least": 1})
    """Length of the noise schedule (scales the time embedding)."""
    scene_features: int = PLAIN_SCENE_FEATURES
    """Number of the scene's numbers that are inputs."""


class PixelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel: local, unlike GroupNorm."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)  # free where the memory is channels_last
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias).permute(0, 3, 1, 2)


class BandBlock(nn.Module):
    """Residual block on every band, with the mean of all bands as context."""

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.norm = PixelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.context = nn.Conv2d(channels, channels, 1)
        self.embed = nn.Linear(embedding, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        self.second.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, embedding: Tensor, bands: int) -> Tensor:
        """x (B * C, channels, h, w), embedding (B, E) -> as x."""
        y = self.norm(x)
        shared = self.context(band_mean(y, bands)) + self.embed(embedding)[:, :, None, None]
        y = add_shared(self.first(y), shared, bands)
        residual: Tensor = self.second(F.silu(y))
        return x + residual


def band_mean(x: Tensor, bands: int) -> Tensor:
    """(B * C, K, h, w) -> (B, K, h, w)."""
    if bands == 1:
        return x
    first, *others = by_image(x, bands).unbind(1)
    total: Tensor = first + others[0]
    for other in others[1:]:
        total = total + other
    return total / bands


def add_shared(x: Tensor, shared: Tensor, bands: int) -> Tensor:
    """(B * C, K, h, w) + (B, K, h, w) of the image that the band belongs to; overwrites x."""
    by_image(x, bands).add_(shared[:, None])
    return x


def by_image(x: Tensor, bands: int) -> Tensor:
    """(B * C, K, h, w) seen as (B, C, K, h, w)."""
    return x.view(-1, bands, *x.shape[1:])


class FSAStudentLite(nn.Module):
    """x0-predicting denoiser (x_t, t, condition) -> `Denoised` for any number of bands."""

    pixel_multiple = 4
    """Windows start and end at multiples of this number of PAN pixels."""

    def __init__(self, config: LiteConfig | None = None):
        super().__init__()
        self.config = config = config or LiteConfig()
        width, deep, emb = config.width, config.deep_width, 4 * config.width
        self.embed = nn.Sequential(
            nn.Linear(32 + config.scene_features, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU()
        )
        self.band_in = nn.Conv2d(4 * (BACK_PROJECTION + 1), width, 3, padding=1)
        self.pan_in = nn.Conv2d(4 * PAN_FEATURES, width, 3, padding=1)
        self.head_blocks = nn.ModuleList(BandBlock(width, emb) for _ in range(config.blocks))
        self.down = nn.Conv2d(width, deep, 2, stride=2)
        self.deep_blocks = nn.ModuleList(BandBlock(deep, emb) for _ in range(config.deep_blocks))
        self.up = nn.Conv2d(deep, 4 * width, 1)
        self.tail_blocks = nn.ModuleList(BandBlock(width, emb) for _ in range(config.blocks))
        self.norm_out = PixelNorm(width)
        self.out = nn.Conv2d(width, 4 * LITE_MAPS, 3, padding=1)
        self._start_as_local_injection()

    @property
    def reach(self) -> int:
        """PAN pixels around an output pixel that it depends on (an upper bound)."""
        shallow = 2 * (1 + 4 * self.config.blocks + 1)
        deep = 4 * 2 * self.config.deep_blocks
        total = shallow + deep + 4
        return math.ceil(total / self.pixel_multiple) * self.pixel_multiple

    @property
    def feature_shapes(self) -> tuple[tuple[int, int], ...]:
        """(channels, PAN pixels per pixel along one axis) of the features."""
        return (self.config.width, 2), (self.config.deep_width, 4)

    def _start_as_local_injection(self) -> None:
        """Untrained, the network predicts the local injection (band feature 1)."""
        nn.init.zeros_(self.out.weight)
        bias = torch.zeros(LITE_MAPS, 4)
        bias[1] = 1.0
        self.out.bias = nn.Parameter(bias.flatten())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, with_features: bool = False) -> Denoised:
        """Predict the clean standardised residual.

        Args:
            x_t: (B, C, H, W), H and W multiples of 4.
            t: (B,) timesteps.
            condition: from `generic_condition`.
            with_features: also return features for distillation: outputs of the last blocks of the
                2 x 2 and of the 4 x 4 grid, each the mean over the bands.

        Returns:
            `Denoised` with x0 and log_sigma (B, C, H, W).

        Raises:
            ValueError: H or W is no multiple of 4, or the condition has no features.
        """
        bands = x_t.shape[1]
        band, pan, scene = features_of(condition)
        injections = band[:, :, :INJECTIONS]
        band = band[:, :, :BACK_PROJECTION]
        scene = scene[:, : self.config.scene_features]
        emb = self.embed(torch.cat([time_features(t, self.config.timesteps), scene], 1))

        inputs = torch.cat([compress(band), x_t[:, :, None]], 2).flatten(0, 1)
        x = self.band_in(to_grid(inputs))
        x = add_shared(x, self.pan_in(to_grid(compress(pan))), bands)
        for block in self.head_blocks:
            x = block(x, emb, bands)
        y = self.down(x)
        for block in self.deep_blocks:
            y = block(y, emb, bands)
        x = x + F.pixel_shuffle(self.up(y), 2)
        for block in self.tail_blocks:
            x = block(x, emb, bands)
        features = (band_mean(x, bands), band_mean(y, bands)) if with_features else ()
        maps = F.pixel_shuffle(self.out(F.silu(self.norm_out(x))), 2).float()
        maps = by_image(maps, bands)  # (B, C, maps, H, W)
        x0 = maps[:, :, INJECTIONS]
        for k in range(INJECTIONS):
            x0 = torch.addcmul(x0, maps[:, :, k], injections[:, :, k])
        log_sigma = maps[:, :, INJECTIONS + 1].clamp(-8.0, 6.0)
        return Denoised(x0=x0, log_sigma=log_sigma, features=features)


def features_of(condition: Condition) -> tuple[Tensor, Tensor, Tensor]:
    """Features of bands, PAN and scene. Raises ValueError where the window or the condition is not fit."""
    height, width = condition.lms.shape[-2:]
    if height % 4 or width % 4:
        raise ValueError(f"the student needs windows of multiples of 4, not {height} x {width}")
    band, pan, scene = condition.band_features, condition.pan_features, condition.scene
    if band is None or pan is None or scene is None:
        raise ValueError("the student needs the condition made by generic_condition")
    return band, pan, scene


def compress(x: Tensor) -> Tensor:
    """asinh(x), so that strong edges do not drown the rest; torch's own takes five times as long on a CPU."""
    size = x.abs()
    return torch.log(size + torch.sqrt(size * size + 1)).copysign(x)


def to_grid(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)


def time_features(t: Tensor, timesteps: int) -> Tensor:
    """(B,) -> (B, 32) sines and cosines of t / T."""
    frequency = 2.0 ** torch.arange(16, device=t.device) * (math.pi / 64)
    angle = (t.float() / timesteps)[:, None] * frequency[None, :] * 8
    return torch.cat([angle.sin(), angle.cos()], 1)
