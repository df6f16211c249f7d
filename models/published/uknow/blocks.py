"""Building blocks of the published U-Nets (U-Know-DiffPAN, CVPR 2025), teacher and student alike.

Both networks are the same `UNet` around different encoder and decoder blocks. Every block takes ``(x, time,
*context)``: features (B, a, H, W), the embedded timestep (B, E) and further inputs of the network. It returns (B, b, H,
W). GroupNorm has one group here, over channels and the whole image: results depend on how a scene is cut.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.published.layers import check_heads, normed_conv

BlockFactory = Callable[[int, int, int], nn.Module]
"""(in_channels, out_channels, level) -> a block; level 0 has the full resolution."""


def box_highpass(pan: Tensor, size: int = 5) -> Tensor:
    """PAN (B, 1, H, W) less its mean over a box of odd width, borders mirrored without repeating the edge."""
    margin = size // 2
    padded = F.pad(pan, (margin, margin, margin, margin), mode="reflect")
    return pan - F.avg_pool2d(padded, size, stride=1)


class TimeEmbedding(nn.Module):
    """Timesteps (B,), integer or not, to (B, width): sines, cosines and a two-layer MLP."""

    def __init__(self, width: int):
        super().__init__()
        if width % 2:
            raise ValueError(f"the time embedding is half sines, half cosines: its width {width} must be even")
        self.waves = width // 2
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, t: Tensor) -> Tensor:
        # In float32 whatever the weights are: bfloat16 has one number for timesteps 498 and 499.
        exponent = torch.arange(self.waves, dtype=torch.float32, device=t.device) / self.waves
        angles = t.float()[:, None] * 10000.0**-exponent  # (B, width / 2)
        embedded = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.mlp(embedded.to(next(self.mlp.parameters()).dtype))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions behind GroupNorm and SiLU; the timestep shifts the first one's result.

    Dropout acts in the second half only.
    """

    def __init__(self, in_channels: int, out_channels: int, time_width: int, dropout: float):
        super().__init__()
        self.first = normed_conv(in_channels, out_channels)
        self.time = nn.Linear(time_width, out_channels)
        self.second = nn.Sequential(
            nn.GroupNorm(1, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor, *context: Tensor) -> Tensor:
        h = self.first(x) + self.time(time)[:, :, None, None]
        return self.second(h) + self.skip(x)


class SelfAttention(nn.Module):
    """Softmax attention between all pixels, added to its input.

    The scale is 1 / sqrt(channels), the full width and not the head's, as published. Memory grows
    with the number of pixels, time with its square. The projection's channels are laid out head
    by head, each head's query, key and value together.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.scale = 1.0 / math.sqrt(channels)
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, self.heads, 3 * (c // self.heads), h * w)
        # The fused kernels need the head's channels to be the contiguous axis: (B, heads, HW, d).
        query, key, value = qkv.transpose(2, 3).contiguous().chunk(3, dim=3)
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return x + self.out(mixed.transpose(2, 3).reshape(b, c, h, w))


def down(channels: int) -> nn.Sequential:
    """Halve the resolution: 3x3 convolution with stride 2."""
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(channels, channels, 3, stride=2, padding=1)))


def up(channels: int) -> nn.Sequential:
    """Double the resolution: nearest neighbour, then a 3x3 convolution."""
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(OrderedDict(enlarge=nn.Upsample(scale_factor=2), conv=conv))


class UNet(nn.Module):
    """The published skeleton: the blocks, their skips and their widths.

    Each level has `blocks` encoder and `blocks` + 1 decoder blocks. The result of the input convolution, of each
    encoder block and of each `down` is kept. In reverse order each is appended to the input of one decoder block.

    Args:
        in_channels: channels of the input.
        width: channels of level 0.
        multipliers: channels of each level, in units of `width`.
        blocks: encoder blocks per level.
        encoder: makes the block of an encoder level.
        decoder: makes the block of a decoder level; its input holds the skip.
        middle: blocks at the lowest resolution between the two.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        multipliers: Sequence[int],
        blocks: int,
        encoder: BlockFactory,
        decoder: BlockFactory,
        middle: Sequence[nn.Module],
    ):
        super().__init__()
        self.entry = nn.Conv2d(in_channels, width, 3, padding=1)
        widths = [width * m for m in multipliers]
        skips, current = [width], width
        self.encoder, self.downs = nn.ModuleList(), nn.ModuleList()
        for level, wide in enumerate(widths):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(encoder(current, wide, level))
                current = wide
                skips.append(current)
            self.encoder.append(stage)
            if level < len(widths) - 1:
                self.downs.append(down(current))
                skips.append(current)
        self.middle = nn.ModuleList(middle)
        # Decoder and ups are kept in the order of use: lowest resolution first.
        self.decoder, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            stage = nn.ModuleList()
            for _ in range(blocks + 1):
                stage.append(decoder(current + skips.pop(), wide, level))
                current = wide
            self.decoder.append(stage)
            if level > 0:
                self.ups.append(up(current))

    def forward(self, x: Tensor, time: Tensor, *context: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, in_channels, H, W) to (B, width, H, W) and features: the inputs of each Down, then of each Up."""
        h = self.entry(x)
        skips, features = [h], []
        for level, stage in enumerate(self.encoder):
            for block in stage:  # type: ignore[attr-defined]
                h = block(h, time, *context)
                skips.append(h)
            if level < len(self.downs):
                features.append(h)
                h = self.downs[level](h)
                skips.append(h)
        for block in self.middle:
            h = block(h, time, *context)
        for level, stage in enumerate(self.decoder):
            for block in stage:  # type: ignore[attr-defined]
                h = block(torch.cat([h, skips.pop()], dim=1), time, *context)
            if level < len(self.ups):
                features.append(h)
                h = self.ups[level](h)
        return h, tuple(features)
