"""SSDiff (NeurIPS 2024): a diffusion denoiser of two streams, spectral and spatial.

Both streams run through one U-Net of three resolutions. At each of its five stages both streams
are weighed in frequency (FMIM); then attention projects the spectral stream onto the spatial one
(`Apfm`). The release attends to whole images, 64 x 64 pixels always. Here attention and frequencies
are of windows: a tile may have any size, and time and memory grow with its pixels only.

METHODS section 3. Flags of the config bring the published form back.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.network import PixelNorm
from uknowpan.models.published.layers import check_images, unrounded, zeroed
from uknowpan.models.published.uknow.blocks import TimeEmbedding, box_highpass
from uknowpan.models.training.bounds import check_bounds, count
from uknowpan.models.types import Condition, Denoised

PATCHES = 16
"""Patches of an image that the network takes at once."""
STAGES = 5
LEVELS = (0, 1, 2, 1, 0)
"""Levels of the five stages; level 0 has the full resolution."""
SPECTRAL_BOOST = (1.2, 1.4, 1.6, 1.4, 1.2)
"""Factor of the first half of the spectral channels before each stage."""
SPATIAL_DAMPING = (0.9, 0.6, 0.3, 0.6, 0.9)
"""Factor of the lowest frequencies of the spatial stream, before attention."""


@dataclass(frozen=True)
class SSDiffConfig:
    """Shape of an `SSDiff`; the widths are the published ones."""

    bands: int = count()
    """C, the bands of the MS."""
    ratio: int = count(4)
    """PAN pixels per MS pixel along one axis."""
    width: int = count(32)
    """Channels of each stream at full resolution; twice and four times as many below."""
    head_width: int = count(16)
    """Channels of an attention head."""
    time_width: int = count(128)
    """Sines and cosines of the timestep; its embedding has four times as many numbers."""
    timesteps: int = count(1000)
    """Length of the noise schedule."""
    grid: int = count(1)
    """The network's pixels are grid x grid PAN pixels (pixel-unshuffle); published: 1."""
    window: int = 16
    """Tokens along a side of the windows that attention sees, at every level. 0: the whole image,
    as published, whose time grows with the square of the pixels."""
    frequency_window: int = 64
    """PAN pixels along a side of the windows whose lowest frequencies are damped: the training
    patch. 0: the whole image, as published."""
    detail_gain: float = 30.0
    """Factor of the details of lms and pan (less their 5 x 5 means) as they enter. Published: 1,
    hundredths of full scale beside noise of 1, from which a short training learns nothing."""
    noise_gain: float = 0.1
    """Factor of x_t as it enters; published: 1."""
    frequency_modulation: bool = True
    """FMIM: boost half of the spectral channels, damp the spatial lowest frequencies."""
    batch_norm: bool = False
    """Simulate the release, which normalises what enters both streams by batch statistics, over
    all timesteps at once (S5). By default each pixel is normalised over its channels."""
    group_norm: bool = False
    """Simulate the release, whose spatial blocks normalise each of 32 groups of channels over the
    whole image. Results then depend on how a scene is cut. By default as above."""
    measured_ms: bool = False
    """Simulate the release, whose skip is made from the MS as it was measured. In PanCollection
    files its samples lie half a PAN pixel from where those of a delivered scene lie. By default
    lms, averaged over the pixels of one MS sample, takes its place: it lies on the PAN in both."""

    patch: int = 0
    """Simulate the release, which cuts images into squares of this many PAN pixels, the size that it trains at, and
    sharpens each by itself. 0: the whole image at once."""

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("window", "frequency_window"):
            if getattr(self, name) == 1:
                raise ValueError(f"{name} must be 0 or at least 2, not {getattr(self, name)}")
        if self.width % self.head_width:
            raise ValueError(
                f"{self.width} channels do not divide into heads of {self.head_width}; choose a "
                "head_width that divides the width"
            )
        if self.group_norm and self.width % 32:
            raise ValueError(f"{self.width} channels do not divide into 32 groups")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of a stream at the five stages."""
        return tuple(self.width << level for level in LEVELS)

    @property
    def factor(self) -> int:
        """Heights and widths in PAN pixels must be multiples of this."""
        return math.lcm(self.grid << max(LEVELS), self.ratio, self.patch or 1)


def lowest_frequencies(x: Tensor, window: int = 0) -> Tensor:
    """The 2 x 2 lowest frequencies of FreeU (Si et al. 2024) of an image (B, C, H, W), float32.

    In each window those are the mean and, at half of their strength, the waves (0, 1), (1, 0) and (1, 1) in periods per
    window. Of the frequencies -1 and 0 along both axes the real part is taken; the other half belongs to frequency 1.
    Windows lie half a side apart and are blended by triangles, so that an image of several has no seams. One window,
    `window` 0 or more than H or W, is the published form.
    """
    axes = []
    for length in x.shape[-2:]:
        side = min(window or length, length)
        axes.append(_window_waves(length, side, x.device))
    (rows, rows_back), (cols, cols_back) = axes
    with torch.autocast(x.device.type, enabled=False):
        waves = rows @ x.float() @ cols.T
        waves = waves.unflatten(-1, (-1, 3)).unflatten(-3, (-1, 3))  # (B, C, n, 3, m, 3)
        kept = torch.einsum("bcnumv,uvpq->bcnpmq", waves, _coupling(x.device))
        return rows_back @ kept.flatten(-2).flatten(-3, -2) @ cols_back.T


@lru_cache
@torch.inference_mode(False)  # first made while sharpening it must serve training too
def _coupling(device: torch.device) -> Tensor:
    """(3, 3, 3, 3): the products of (1, cos, sin) along rows and columns that are kept.

    The wave (1, 1) is cos(i + j) and sin(i + j), two products each.
    """
    kept = torch.zeros(3, 3, 3, 3)
    for u, v in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2)):
        kept[u, v, u, v] = 1
    for products in (((1, 1, 1.0), (2, 2, -1.0)), ((1, 2, 1.0), (2, 1, 1.0))):
        for u, v, a in products:
            for p, q, b in products:
                kept[u, v, p, q] += a * b
    return kept.to(device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _window_waves(length: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(3n, length) means of an axis with 1, cos and sin in each of n windows, and (length, 3n):
    the waves, times the window's share of each place."""
    count = 1 + math.ceil(2 * (length - side) / side)
    starts = torch.linspace(0, length - side, count, dtype=torch.float64).round().long()
    within = torch.arange(length)[None] - starts[:, None]  # (n, length)
    inside = (within >= 0) & (within < side)
    angle = 2 * math.pi * within.double() / side
    waves = torch.stack([torch.ones_like(angle), angle.cos(), angle.sin()], 1)  # (n, 3, length)
    waves = waves * inside[:, None]
    share = (0.5 - ((within + 0.5) / side - 0.5).abs()) * inside
    share = share / share.sum(0)
    there = (waves / side).flatten(0, 1)
    back = (waves * share[:, None]).flatten(0, 1).T
    return there.float().to(device), back.contiguous().float().to(device)


class Apfm(nn.Module):
    """Alternating projections: the spectral stream projected onto the spatial one.

    For each head with d channels and a window of N tokens, y spatial and x spectral:
    S = softmax(y1 y2' / sqrt(d)), (N, N); E = softmax(x1' x2 / sqrt(d) / (N / d)), (d, d);
    x + Linear((S x1) * (y1 E)), then a feed-forward part with its residual.
    """

    def __init__(self, channels: int, head_width: int, window: int):
        super().__init__()
        self.head_width, self.window = head_width, window
        self.norm_x, self.norm_y = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.from_x = nn.Linear(channels, 2 * channels, bias=False)
        self.from_y = nn.Linear(channels, 2 * channels, bias=False)
        self.out = nn.Linear(channels, channels)
        self.feed = nn.Sequential(
            nn.Linear(channels, channels // 2), nn.LeakyReLU(), nn.Linear(channels // 2, channels)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x and y (B, a, H, W), of any H and W -> as x."""
        x, y = (v.permute(0, 2, 3, 1) for v in (x, y))  # free where the memory is channels_last
        parts = torch.cat([self.from_y(self.norm_y(y)), self.from_x(self.norm_x(x))], -1)
        x = x + self.out(self._in_windows(parts))
        return (x + self.feed(x)).permute(0, 3, 1, 2)

    def _in_windows(self, parts: Tensor) -> Tensor:
        """(B, H, W, 4 a): y1, y2, x1, x2 -> (B, H, W, a), window by window."""
        batch, height, width, channels = parts.shape
        rows, cols = (min(self.window or n, n) for n in (height, width))
        down, right = -height % rows, -width % cols
        tokens: Tensor | None = None
        counts: Tensor | float = rows * cols
        if down or right:  # the last windows are smaller: their empty places are no tokens
            inside = F.pad(parts.new_ones(1, height, width, 1), (0, 0, 0, right, 0, down))
            tokens = _windows(inside, rows, cols).flatten(-2).repeat(batch, 1)
            counts = tokens.sum(1)[:, None, None, None]
            parts = F.pad(parts, (0, 0, 0, right, 0, down))
        high, wide = parts.shape[1:3]
        parts = _windows(parts, rows, cols)  # (B n, N, 4 a)
        parts = parts.unflatten(-1, (4, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        y1, y2, x1, x2 = parts.contiguous()
        mixed = _projected(y1, y2, x1, x2, tokens, counts)
        mixed = mixed.transpose(1, 2).flatten(2)  # (B n, N, a)
        mixed = mixed.reshape(batch, high // rows, wide // cols, rows, cols, channels // 4)
        mixed = mixed.transpose(2, 3).reshape(batch, high, wide, channels // 4)
        return mixed[:, :height, :width]


def _windows(x: Tensor, rows: int, cols: int) -> Tensor:
    """(B, H, W, K) -> (B n, rows * cols, K)."""
    x = x.unflatten(2, (-1, cols)).unflatten(1, (-1, rows)).transpose(2, 3)
    return x.flatten(0, 2).flatten(1, 2)


def _projected(y1: Tensor, y2: Tensor, x1: Tensor, x2: Tensor, tokens: Tensor | None, counts: Tensor | float) -> Tensor:
    """(B, heads, N, d) each -> the same; `tokens` (B, N) and all four are 0 at empty places."""
    d = y1.shape[-1]
    mask = None if tokens is None else (tokens > 0)[:, None, None, :]
    spatial = F.scaled_dot_product_attention(y1, y2, x1, attn_mask=mask)
    spectral = (x1.transpose(-2, -1) @ x2) * (math.sqrt(d) / counts)
    return spatial * (y1 @ spectral.softmax(-1).to(y1.dtype))


class Stem(nn.Module):
    """The first block of a stream, conditioned on the timestep.

    The block adds to its input's convolution. Without that a stream whose last convolution starts
    at zero would ignore its input.
    """

    def __init__(self, in_channels: int, channels: int, embedding: int, norm: nn.Module):
        super().__init__()
        self.entry = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time = nn.Linear(embedding, channels)
        self.norm = norm
        self.out = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.entry(x)
        h = x + self.time(F.silu(time))[:, :, None, None]
        return x + self.out(F.silu(self.norm(h)))


class SpatialBlock(nn.Module):
    """Residual block of the spatial stream between two stages."""

    def __init__(self, channels: int, embedding: int, norm: nn.Module):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.LeakyReLU(),
            nn.Conv2d(channels // 2, channels, 3, padding=1),
        )
        self.time = nn.Linear(embedding, channels)
        self.norm = norm
        self.out = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, y: Tensor, time: Tensor) -> Tensor:
        h = self.body(y) + self.time(time)[:, :, None, None]
        return y + self.out(F.silu(self.norm(h)))


class Down(nn.Sequential):
    """Half the resolution, twice the channels; one for both streams."""

    def __init__(self, channels: int):
        wide = 2 * channels
        super().__init__(
            nn.Conv2d(channels, channels, 2, stride=2),
            nn.LeakyReLU(),
            nn.Conv2d(channels, wide, 1),
            nn.Conv2d(wide, wide, 3, padding=1, groups=wide),
            nn.LeakyReLU(),
        )


class Up(nn.Module):
    """Twice the resolution, half the channels, plus the skip; one for both streams."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.enlarge = nn.ConvTranspose2d(channels, half, 2, stride=2)
        self.mix = nn.Conv2d(half, half, 3, padding=1)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.leaky_relu(self.mix(F.leaky_relu(self.enlarge(x)) + skip))


class StreamTime(TimeEmbedding):
    """A timestep (B,) to (B, 4 * width)."""

    def __init__(self, width: int):
        super().__init__(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


def _weighted(*modules: Any) -> list[nn.Module]:
    return [layer for module in modules for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


class SSDiff(nn.Module):
    """Predicts the residual x0 from its noisy state x_t, lms and pan.

    With the published widths it has 1,300,024 parameters for 8 bands. The release counts 1,426,616, of which 126,592
    are never used: left out here. For 4 bands it has 1,288,500 (of 1,413,940; its unused ones then number 125,440).

    Source: SSDiff (NeurIPS 2024).
    """

    def __init__(self, config: SSDiffConfig):
        super().__init__()
        self.config = config
        self.pixel_multiple = config.factor
        width, bands, cell = config.width, config.bands, config.grid**2
        embedding = 4 * config.time_width
        entry: Callable[[int], nn.Module] = nn.BatchNorm2d if config.batch_norm else PixelNorm
        self.time = StreamTime(config.time_width)
        self.spectral_in = Stem(2 * bands * cell, width, embedding, entry(width))
        self.spatial_in = Stem((1 + bands) * cell, width, embedding, entry(width))
        self.downs = nn.ModuleList(Down(w) for w in config.widths[:2])
        self.ups = nn.ModuleList(Up(w) for w in config.widths[2:4])
        self.projections = nn.ModuleList(Apfm(w, config.head_width, config.window) for w in config.widths)
        self.spatial = nn.ModuleList(
            SpatialBlock(w, embedding, nn.GroupNorm(32, w) if config.group_norm else PixelNorm(w))
            for w in config.widths[:-1]
        )
        self.head = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(), zeroed(nn.Conv2d(width, bands * cell, 3, padding=1))
        )
        # Untrained, the answer is lms.
        self.skip = zeroed(nn.Conv2d(bands, bands * config.ratio**2, 3, padding=1, bias=False))

    def spectral_layers(self) -> list[nn.Module]:
        """Convolutions and linear layers of the spectral stream alone."""
        stages = [m for p in self.projections for m in (p.from_x, p.out, p.feed)]
        return _weighted(self.spectral_in, *stages, self.head)

    def spatial_layers(self) -> list[nn.Module]:
        """Convolutions and linear layers of the spatial stream alone."""
        return _weighted(self.spatial_in, *(p.from_y for p in self.projections), self.spatial)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
        """One evaluation of the denoiser.

        Args:
            x_t: (B, C, H, W) noisy residual, H and W multiples of `pixel_multiple`.
            t: (B,) timesteps of the training schedule, integer or not.
            condition: lms (B, C, H, W) and pan (B, 1, H, W), both about [0, 1]; with the flag
                `measured_ms` also ms (B, C, H / ratio, W / ratio).

        Returns:
            x0 (B, C, H, W).

        Raises:
            ValueError: shapes that do not fit the configuration or each other.
        """
        bands, grid = self.config.bands, self.config.grid
        others = {"lms": (condition.lms, bands), "pan": (condition.pan, 1)}
        check_images("network", bands, "x_t", x_t, others, self.pixel_multiple)
        if self.config.patch and max(x_t.shape[-2:]) > self.config.patch:
            return self._by_patches(x_t, t, condition)
        time = self.time(t)
        lms, pan = (self._amplified(v) for v in (condition.lms, condition.pan))
        noisy = self.config.noise_gain * x_t
        x, y = (
            F.pixel_unshuffle(torch.cat(parts, 1), grid).contiguous(memory_format=torch.channels_last)
            for parts in ((lms, noisy), (pan, noisy))
        )
        x, y = self.spectral_in(x, time), self.spatial_in(y, time)
        skips = []
        for stage in range(STAGES):
            x = self._project(stage, x, y)
            if stage == STAGES - 1:
                break
            y = self.spatial[stage](y, time)
            if stage < len(self.downs):
                skips.append((x, y))
                x, y = self.downs[stage](x), self.downs[stage](y)
            else:
                up = self.ups[stage - len(self.downs)]
                x, y = (up(v, skip) for v, skip in zip((x, y), skips.pop(), strict=True))
        detail = F.pixel_shuffle(unrounded(self.head, x), grid)
        coarse = F.pixel_shuffle(unrounded(self.skip, self._ms(condition)), self.config.ratio)
        return Denoised(x0=(detail + coarse).float())

    def _by_patches(self, x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
        """`forward` of every patch by itself; `PATCHES` at once, to bound memory."""
        rows, cols = (n // self.config.patch for n in x_t.shape[-2:])

        def cut(image: Tensor) -> Tensor:
            high, wide = image.shape[-2] // rows, image.shape[-1] // cols
            return image.unflatten(-1, (cols, wide)).unflatten(-3, (rows, high)).movedim((2, 4), (1, 2)).flatten(0, 2)

        noisy, times, parts = cut(x_t), t.repeat_interleave(rows * cols), condition.map_images(cut)
        done = [
            self(noisy[k : k + PATCHES], times[k : k + PATCHES], parts.map(lambda x, k=k: x[k : k + PATCHES])).x0  # type: ignore[misc]
            for k in range(0, len(noisy), PATCHES)
        ]
        x0 = torch.cat(done).unflatten(0, (len(x_t), rows, cols)).movedim((1, 2), (2, 4))
        return Denoised(x0=x0.flatten(2, 3).flatten(3, 4))

    def _amplified(self, image: Tensor) -> Tensor:
        """The image with its details brought to the size of x0."""
        gain = self.config.detail_gain - 1
        return image + gain * box_highpass(image) if gain else image

    def _project(self, stage: int, x: Tensor, y: Tensor) -> Tensor:
        """One stage: frequencies are weighed, then projected."""
        config = self.config
        if config.frequency_modulation:
            half, boost = x.shape[1] // 2, x.new_ones(x.shape[1])
            boost[:half] = SPECTRAL_BOOST[stage]
            x = x * boost[:, None, None]
            side = config.frequency_window // (config.grid << LEVELS[stage])
            low = lowest_frequencies(y, max(side, 2) if config.frequency_window else 0)
            y = y + (SPATIAL_DAMPING[stage] - 1) * low.to(y.dtype)
        return self.projections[stage](x, y)

    def _ms(self, condition: Condition) -> Tensor:
        """(B, C, h, w) input of the skip."""
        if not self.config.measured_ms:
            return F.avg_pool2d(condition.lms, self.config.ratio)
        if condition.ms is None:
            raise ValueError("a network with measured_ms needs the condition's ms")
        return condition.ms
