"""FSA-S, the published diffusion student: a plain U-Net conditioned on lms and pan."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from uknowpan.models.published.layers import check_images, normed_conv, unrounded
from uknowpan.models.published.uknow.blocks import ResnetBlock, SelfAttention, TimeEmbedding, UNet, box_highpass
from uknowpan.models.training.bounds import check_bounds, count, share
from uknowpan.models.types import Condition, Denoised


@dataclass(frozen=True)
class StudentConfig:
    """Shape of an `FSAStudent`; the defaults are the published widths."""

    bands: int = count()
    """C, the bands of the MS."""
    width: int = count(32)
    """Channels at full resolution, and of the time embedding."""
    multipliers: tuple[int, ...] = count((1, 2, 2, 4))
    """Channels of each level in units of `width`; each level halves the resolution."""
    blocks: int = 2
    """Encoder blocks per level; the decoder has one more."""
    dropout: float = share(0.2)
    """Dropout in the second half of each ResnetBlock."""
    attention_level: int = 3
    """Level, counted from 0, whose blocks end with self-attention."""
    heads: int = count(8)
    """Heads of the self-attention."""
    self_conditioning: bool = True
    """The input has a slot of C channels for an earlier prediction of x0 (or else x_t)."""
    highpass_pan: bool = False
    """Simulate the release, whose in-place 5x5 high-pass overwrites the PAN, so that the network
    never sees its brightness. By default PAN enters raw and high-pass, one more channel."""

    def __post_init__(self) -> None:
        check_bounds(self)
        levels = len(self.multipliers)
        if not 0 <= self.attention_level < levels:
            raise ValueError(
                f"attention_level {self.attention_level} is none of the {levels} levels; choose 0 to {levels - 1}"
            )

    @property
    def factor(self) -> int:
        """Heights and widths must be multiples of this."""
        return 1 << (len(self.multipliers) - 1)

    @property
    def in_channels(self) -> int:
        """Channels of the network's input; 3C + 1 as published."""
        slots = 3 if self.self_conditioning else 2
        return slots * self.bands + (1 if self.highpass_pan else 2)


class ResnetStack(nn.Module):
    """ResnetBlocks through the given widths, then attention at the attention level."""

    def __init__(self, config: StudentConfig, widths: Sequence[int], level: int | None):
        super().__init__()
        self.blocks = nn.ModuleList(ResnetBlock(a, b, config.width, config.dropout) for a, b in pairwise(widths))
        attends = level == config.attention_level
        self.attention = SelfAttention(widths[-1], config.heads) if attends else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, *context: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, time)
        return self.attention(x)


def checked_inputs(
    network: str, config: StudentConfig, x_t: Tensor, condition: Condition, **others: tuple[Tensor | None, int]
) -> Tensor:
    """(B, in_channels, H, W): slot, lms, PAN high-pass (and raw), x_t, as both networks take them (METHODS 1.1).

    The slot of self-conditioning holds x_t where there is no earlier prediction. ValueError: shapes
    that do not fit; `others` are further images with their bands.
    """
    bands, lms, pan, carried = config.bands, condition.lms, condition.pan, condition.self_cond
    images = {"lms": (lms, bands), "pan": (pan, 1), "self_cond": (carried, bands), **others}
    check_images(network, bands, "x_t", x_t, images, config.factor)
    slot = [x_t if carried is None else carried] if config.self_conditioning else []
    pans = [box_highpass(pan)] if config.highpass_pan else [box_highpass(pan), pan]
    return torch.cat([*slot, lms, *pans, x_t], dim=1)


class FSAStudent(nn.Module):
    """Predict the residual x0 from its noisy state x_t, lms and pan.

    As published (`highpass_pan=True`) it has 9,714,600 parameters for 8 bands and 9,709,988 for
    4; the raw PAN of the default adds 9 * width, that is 288. GroupNorm and attention span the
    whole image: results depend on how a scene is cut.

    Source: U-Know-DiffPAN (CVPR 2025), FSA-S.
    """

    def __init__(self, config: StudentConfig):
        super().__init__()
        self.config = config
        self.pixel_multiple = config.factor
        self.time = TimeEmbedding(config.width)
        deepest = config.width * config.multipliers[-1]
        self.unet = UNet(
            config.in_channels,
            config.width,
            config.multipliers,
            config.blocks,
            encoder=lambda a, b, level: ResnetStack(config, [a, b, b], level),
            # Published: only blocks without attention first mix the skip at full width d.
            decoder=lambda d, b, level: ResnetStack(
                config, [d, b, b] if level == config.attention_level else [d, d, b, b], level
            ),
            middle=[ResnetStack(config, [deepest] * 3, level) for level in (config.attention_level, None)],
        )
        self.head = normed_conv(config.width, config.bands)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
        """One evaluation of the denoiser.

        Args:
            x_t: (B, C, H, W) noisy residual, H and W multiples of 8 (with four levels).
            t: (B,) timesteps of the training schedule, integer or not.
            condition: lms (B, C, H, W) and pan (B, 1, H, W), both about [0, 1]; without `self_cond` its slot holds x_t.

        Returns:
            x0 (B, C, H, W) and the features that distillation compares, see `UNet.forward`. With four levels
            they have (1, 2, 2, 4, 2, 2) * width channels on 1, 1/2, 1/4, 1/8, 1/4 and 1/2 of H and W.

        Raises:
            ValueError: shapes that do not fit the configuration or each other.
        """
        h, features = self.unet(checked_inputs("student", self.config, x_t, condition), self.time(t))
        return Denoised(x0=unrounded(self.head, h), features=features)
