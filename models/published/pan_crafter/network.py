"""PAN-Crafter (ICCV 2025): a U-Net that sharpens in one pass and learns on PAN and MS alike.

Built from METHODS section 2. Modality-adaptive reconstruction (MARs) trains one network to restore the sharp PAN from
the degraded PAN, and the sharp MS from the MS; a token selects the mode. In cross-modality alignment-aware attention
(CM3A) each pixel attends to its 3 x 3 neighbours in PAN and in MS. So either may lie a pixel off.

The degraded PAN is computed (`low_pan`), since the recipe of the release's files is unknown. MS,
PAN and degraded PAN are sampled from the PAN grid at each scale. So the position of a file's MS
samples does not matter: lms lies on the PAN in every file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.blur import default_psf
from uknowpan.models.published.layers import check_images, normed_conv, unrounded, zeroed
from uknowpan.models.resample import degrade, upsample
from uknowpan.models.training.bounds import check_bounds, count, share
from uknowpan.models.types import Condition, Denoised

PAN_MODE, MS_MODE = 0, 1
"""Modes: the image to reconstruct."""
NEIGHBOURS = 9
"""A pixel and the eight around it, row by row."""


@dataclass(frozen=True)
class PanCrafterConfig:
    """Shape of a `PanCrafter`; the defaults are the published widths.

    Each of the three flags brings back a defect of the release, to be measured.
    """

    bands: int = count()
    """C, the bands of the MS."""
    ratio: int = count(4)
    """PAN pixels per MS pixel; the degraded PAN depends on it."""
    widths: tuple[int, ...] = count((128, 128, 128, 128))
    """Channels of each scale; each scale halves the resolution."""
    blocks: int = 2
    """ResBlocks per scale of the encoder, and of the decoder."""
    attention_from: int = 1
    """First scale with attention, counted from 0, the PAN's own; all coarser ones have it."""
    token_width: int = count(128)
    """Length of the token of the mode."""
    head_width: int = count(16)
    """Channels of an attention head."""
    groups: int = count(32)
    """Groups of every GroupNorm."""
    expansion: int = count(4)
    """Width of the MLP behind the attention, in units of its scale's."""
    dropout: float = share(0.2)
    """Dropout in the second half of each ResBlock."""
    overwritten_pan_keys: bool = False
    """Simulate the release, where a slip in an assignment puts the MS keys in place of the PAN's. The attention to the
    PAN then looks for what resembles the MS. The PAN keys, 611,584 parameters, never learn (P1)."""
    scrambled_ms_keys: bool = False
    """Simulate the release, which lays the MS keys out channels last and reads them as channels
    first: what a pixel is compared with comes from other channels and other places (P2)."""
    random_shifts: bool = False
    """Simulate the release, which never calls the initialisation that makes the nine copies of keys
    and values the nine neighbours; they begin as random 3 x 3 filters (P3)."""

    bicubic_base: bool = False
    """Simulate the release, which adds half of its answer (images run from -1 to 1) to the MS, enlarged by bicubic
    interpolation with pixels nested in the PAN's. By default it is added to lms."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.ratio < 2:
            raise ValueError(f"PAN-Crafter needs a ratio of at least 2, not {self.ratio}")
        if len(self.widths) < 2 or self.blocks < 1:
            raise ValueError("PAN-Crafter needs at least 2 widths and 1 block per scale")
        if not 0 <= self.attention_from < len(self.widths):
            raise ValueError(
                f"attention_from {self.attention_from} is none of the {len(self.widths)} scales; "
                f"choose 0 to {len(self.widths) - 1}"
            )
        for width in self.widths:
            for name in ("groups", "head_width"):
                if width % getattr(self, name):
                    raise ValueError(
                        f"{name} {getattr(self, name)} does not divide the width {width}; choose one that does"
                    )

    @property
    def factor(self) -> int:
        """Heights and widths in PAN pixels must be multiples of this, and of the ratio."""
        return 1 << (len(self.widths) - 1)


def low_pan(pan: Tensor, ratio: int) -> Tensor:
    """The PAN as sharp as the MS, on the PAN grid: (B, 1, H, W), H and W multiples of the ratio.

    Degraded by the Gaussian of MTF gain 0.3 at the MS's Nyquist frequency, sampled at the MS
    pixels' centres and interpolated again. The recipe of the release is unknown; others inferred a
    Gaussian of 1.98 PAN pixels for ratio 4 (here: 1.98).
    """
    return upsample(degrade(pan, ratio, default_psf(ratio).sigma), ratio)


class Guides(NamedTuple):
    """The images that an attention block sees, all of one scale and about -1 to 1."""

    wanted: Tensor
    """(B, C, h, w) MS, or in PAN mode the degraded PAN in all bands."""
    ms: Tensor
    """(B, C, h, w)"""
    low: Tensor
    """(B, 1, h, w) degraded PAN."""
    pan: Tensor
    """(B, 1, h, w)"""

    def at(self, factor: int) -> Guides:
        """The guides `factor` times as coarse, by bicubic interpolation as published."""
        size = [n // factor for n in self.pan.shape[-2:]]
        return Guides(*(F.interpolate(x, size, mode="bicubic", align_corners=False) for x in self))


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the second scaled and shifted by the mode; untrained, it is its skip.

    (B, a, h, w), (B, T) activated token -> (B, b, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, config: PanCrafterConfig):
        super().__init__()
        self.first = normed_conv(in_channels, out_channels, config.groups)
        self.modulation = zeroed(nn.Linear(config.token_width, 2 * out_channels))
        self.norm = nn.GroupNorm(config.groups, out_channels)
        self.second = nn.Sequential(
            nn.SiLU(), nn.Dropout(config.dropout), zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        )
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        scale, shift = self.modulation(token)[:, :, None, None].chunk(2, 1)
        h = self.norm(self.first(x)) * (1 + scale) + shift
        return self.second(h) + self.skip(x)


def _pixel_norm(x: Tensor) -> Tensor:
    """LayerNorm over the channels of each pixel, without weights."""
    x = x.permute(0, 2, 3, 1)
    return F.layer_norm(x, x.shape[-1:]).permute(0, 3, 1, 2)


class NeighbourhoodAttention(nn.Module):
    """Softmax attention of each pixel to its 3 x 3 neighbours.

    The neighbours are nine copies of keys and values, made by a depth-wise 3x3 convolution. It begins as nine shifts
    and may learn other filters. All heads, keys and values share it. The copies are zero beyond the border.
    """

    def __init__(self, head_width: int, random_shifts: bool = False):
        super().__init__()
        self.head_width = head_width
        self.weight = nn.Parameter(torch.empty(head_width, NEIGHBOURS, NEIGHBOURS))
        """(channel, copy, place in its 3 x 3 window)."""
        self.bias = nn.Parameter(torch.empty(head_width, NEIGHBOURS))
        if random_shifts:  # as any convolution of 9 places
            nn.init.uniform_(self.weight, -1 / 3, 1 / 3)
            nn.init.uniform_(self.bias, -1 / 3, 1 / 3)
        else:
            nn.init.zeros_(self.bias)
            with torch.no_grad():
                self.weight.copy_(torch.eye(NEIGHBOURS).expand_as(self.weight))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Each (B, heads * head_width, h, w), heads first -> the same.

        a_j = softmax_j(q . k_j / sqrt(head_width)), y = sum_j a_j v_j. The copies k_j and v_j would take nine times the
        image. So sums over channels and places are exchanged, and matrix products replace the convolution.
        """
        query, key, value = (self._heads(x) for x in (query, key, value))
        shape = query.shape
        logits = query @ self.bias
        for place, shifted in enumerate(_neighbours(key)):
            logits = logits + (query * shifted) @ self.weight[:, :, place]
        share = (logits * self.head_width**-0.5).softmax(-1)
        mixed = share @ self.bias.T
        for place, shifted in enumerate(_neighbours(value)):
            mixed = mixed + (share @ self.weight[:, :, place].T) * shifted
        return mixed.reshape(*shape[:3], -1).permute(0, 3, 1, 2)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, heads * d, h, w) -> (B, h, w, heads, d); free where the memory is channels_last."""
        return x.permute(0, 2, 3, 1).unflatten(-1, (-1, self.head_width))


def _neighbours(x: Tensor) -> Iterator[Tensor]:
    """(B, h, w, heads, d) seen from each pixel's nine neighbours, row by row."""
    height, width = x.shape[1:3]
    padded = F.pad(x, (0, 0, 0, 0, 1, 1, 1, 1))
    for row in range(3):
        for col in range(3):
            yield padded[:, row : row + height, col : col + width]


class CrossModalityAttention(nn.Module):
    """CM3A: every pixel attends to its neighbours in the MS and in the PAN.

    The query comes from the image to reconstruct; two gates, which depend on the mode, weigh both
    results. Untrained, the gates are zero.
    """

    def __init__(self, width: int, kernel: int, config: PanCrafterConfig):
        super().__init__()
        self.overwritten_pan_keys = config.overwritten_pan_keys
        self.scrambled_ms_keys = config.scrambled_ms_keys
        bands = config.bands

        def conv(guides: int, out: int) -> nn.Conv2d:
            return nn.Conv2d(width + guides, out, kernel, padding=kernel // 2)

        self.query = conv(bands, width)
        self.key_pan = conv(1, width)
        self.value_pan = conv(3, width)
        self.key_value_ms = conv(bands, 2 * width)
        self.attention = NeighbourhoodAttention(config.head_width, config.random_shifts)
        self.out_ms, self.out_pan = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.gates = zeroed(nn.Linear(config.token_width, 2 * width))
        wide = config.expansion * width
        self.mlp = nn.Sequential(nn.Conv2d(width, wide, 1), nn.GELU(approximate="tanh"), nn.Conv2d(wide, width, 1))

    def forward(self, x: Tensor, token: Tensor, guides: Guides) -> Tensor:
        """(B, width, h, w), (B, T) activated token -> (B, width, h, w)."""
        seen, ms, low, pan = _pixel_norm(x), guides.ms, guides.low, guides.pan
        query = self.query(torch.cat([seen, guides.wanted], 1))
        key_ms, value_ms = self.key_value_ms(torch.cat([seen, ms], 1)).chunk(2, 1)
        value_pan = self.value_pan(torch.cat([seen, low, pan, pan - low], 1))
        if self.scrambled_ms_keys:
            key_ms = key_ms.permute(0, 2, 3, 1).reshape(key_ms.shape)
        key_pan = self._pan_keys(seen, low, key_ms)
        ms_gate, pan_gate = self.gates(token)[:, :, None, None].chunk(2, 1)
        x = x + ms_gate * self.out_ms(self.attention(query, key_ms, value_ms))
        x = x + pan_gate * self.out_pan(self.attention(query, key_pan, value_pan))
        return x + self.mlp(_pixel_norm(x))

    def _pan_keys(self, seen: Tensor, low: Tensor, key_ms: Tensor) -> Tensor:
        if not self.overwritten_pan_keys:
            return self.key_pan(torch.cat([seen, low], 1))
        # DistributedDataParallel wants a gradient of every parameter, if only of zeros.
        return key_ms + 0.0 * sum(p.sum() for p in self.key_pan.parameters())


class Scale(nn.Module):
    """ResBlocks through the given widths, then attention if there is a kernel for it."""

    def __init__(self, widths: Sequence[int], config: PanCrafterConfig, kernel: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(a, b, config) for a, b in pairwise(widths))
        self.attention = CrossModalityAttention(widths[-1], kernel, config) if kernel else None

    def forward(self, x: Tensor, token: Tensor, guides: Guides) -> Tensor:
        for block in self.blocks:
            x = block(x, token)
        return x if self.attention is None else self.attention(x, token, guides)


class PanCrafter(nn.Module):
    """Predicts the standardised residual from lms and pan, in one pass.

    It has 9,968,808 parameters for 8 bands and 9,902,756 for 4, as the release has. The 611,584 that never learn there
    (P1) learn here. GroupNorm spans the whole image: results depend somewhat on how a scene is cut.

    Source: PAN-Crafter (ICCV 2025), METHODS 2.3.
    """

    def __init__(self, config: PanCrafterConfig):
        super().__init__()
        self.config = config
        self.pixel_multiple = config.factor
        widths, last = config.widths, len(config.widths) - 1
        self.tokens = nn.Parameter(0.02 * torch.randn(2, config.token_width))
        self.entry = nn.Conv2d(config.bands + 3, widths[0], 3, padding=1)
        # The kernels of the attention's convolutions; the coarsest scale's see single pixels.
        kernels = [0 if k < config.attention_from else 3 for k in range(last)] + [1]
        self.encoder = nn.ModuleList(
            Scale([w] * (config.blocks + 1), config, k) for w, k in zip(widths, kernels, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(
            Scale([2 * w, *[w] * config.blocks], config, k) for w, k in zip(widths[:-1], kernels[:-1], strict=True)
        )
        self.head = normed_conv(widths[0], config.bands, config.groups)
        zeroed(self.head[-1])

    def forward(
        self, x_t: Tensor | None, t: Tensor | None, condition: Condition, mode: Tensor | None = None
    ) -> Denoised:
        """Reconstruct once.

        Args:
            x_t: ignored, nothing is diffused; present so that all denoisers are called alike.
            t: ignored.
            condition: lms (B, C, H, W) and pan (B, 1, H, W), both about [0, 1], H and W multiples
                of `pixel_multiple` and of the ratio; with `bicubic_base` also ms.
            mode: (B,) int64, `MS_MODE` or `PAN_MODE` of each image; None: `MS_MODE` for all.

        Returns:
            x0 (B, C, H, W): gt - lms, in PAN mode pan - `low_pan`, in units that the stage chooses.

        Raises:
            ValueError: shapes that do not fit the configuration or each other.
        """
        config, lms = self.config, condition.lms
        step = math.lcm(config.factor, config.ratio)
        check_images("PAN-Crafter", config.bands, "lms", lms, {"pan": (condition.pan, 1)}, step)
        if mode is None:
            mode = torch.full((len(lms),), MS_MODE, device=lms.device)
        token = F.silu(self.tokens[mode])
        base = self._base(condition)
        guides = self._guides(condition.pan, base, mode)
        high = guides.pan - guides.low
        scales = [guides, *(guides.at(2**k) for k in range(1, len(config.widths)))]
        h = self.entry(torch.cat([guides.pan, guides.ms, guides.low, high], 1))
        skips = []
        for k, scale in enumerate(self.encoder):
            h = scale(h, token, scales[k])
            if k < len(self.downs):
                skips.append(h)
                h = self.downs[k](h)
        for k in reversed(range(len(self.decoder))):
            h = torch.cat([self.ups[k](h), skips[k]], 1)
            h = self.decoder[k](h, token, scales[k])
        x0 = unrounded(self.head, h).to(lms.dtype)
        if config.bicubic_base:
            x0 = 0.5 * x0 + torch.where((mode == MS_MODE).view(-1, 1, 1, 1), base - lms, 0.0)
        return Denoised(x0=x0)

    def _base(self, condition: Condition) -> Tensor:
        """(B, C, H, W) the enlarged MS that the answer is added to."""
        if not self.config.bicubic_base:
            return condition.lms
        if condition.ms is None:
            raise ValueError("a network with bicubic_base needs the condition's ms")
        with torch.autocast(condition.ms.device.type, enabled=False):
            return F.interpolate(condition.ms, condition.lms.shape[-2:], mode="bicubic", align_corners=False)

    def _guides(self, pan: Tensor, ms: Tensor, mode: Tensor) -> Guides:
        """The guides on the PAN grid, in float32: bfloat16 would lose PAN's faint details."""
        with torch.autocast(pan.device.type, enabled=False):
            pan, ms = (2 * x - 1 for x in (pan, ms))
            low = low_pan(pan, self.config.ratio)
            wanted = torch.where((mode == MS_MODE).view(-1, 1, 1, 1), ms, low)
            return Guides(wanted, ms, low, pan)
