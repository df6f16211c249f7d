"""FSA-T, the published diffusion teacher: the student's U-Net with a prior and wavelets."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.published.layers import check_heads, normed_conv, unrounded, zeroed
from uknowpan.models.published.uknow.blocks import ResnetBlock, SelfAttention, TimeEmbedding, UNet
from uknowpan.models.published.uknow.student import ResnetStack, StudentConfig, checked_inputs
from uknowpan.models.published.uknow.wavelets import teacher_wavelets
from uknowpan.models.training.bounds import count, share
from uknowpan.models.types import Condition, Denoised


@dataclass(frozen=True)
class TeacherConfig(StudentConfig):
    """Shape of an `FSATeacher`; the defaults are the published widths.

    The fields that it shares with the student's shape the same skeleton. Equal widths and
    multipliers give features of equal shapes, whatever the number of blocks.
    """

    blocks: int = 3
    """Encoder blocks per level; the decoder has one more."""
    patch: int = count(1)
    """The network works on squares of patch x patch pixels folded into channels; the resolution of
    every feature falls by this factor."""
    drop_path: float = share(0.2)
    """Probability that training leaves out the feed-forward branch of an attention, per image."""
    variance_floor: float = 1e-6
    """Added to the predicted variance, in squared units of x0. The release has none (0)."""
    dead_prior: bool = False
    """Simulate the release, which multiplies two zero-initialised factors where the prior enters:
    both have zero gradient forever, so that the prior never changes anything. By default only one
    starts at zero: the prior enters gently, but it does."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_path == 1:
            raise ValueError("drop_path 1.0 is not a probability below 1; choose 0 to 0.9")

    @property
    def factor(self) -> int:
        """Heights and widths must be multiples of this."""
        return self.patch * super().factor


class FSATeacher(nn.Module):
    """Predict the residual x0 and its variance from x_t, lms, pan, a prior and wavelets.

    As published (`highpass_pan=True`) it has 25,491,576 parameters for 8 bands and 25,461,136 for 4; the raw PAN of the
    default adds 9 * width, that is 288. Where the student has two ResnetBlocks, encoder and middle have one; the
    decoder puts three attentions between its two. GroupNorm, attention, the Fourier transform and the prior's pooling
    span the whole image: results depend on how a scene is cut.

    Source: U-Know-DiffPAN (CVPR 2025), FSA-T.
    """

    def __init__(self, config: TeacherConfig):
        super().__init__()
        self.config = config
        deepest = config.width * config.multipliers[-1]
        self.time = TimeEmbedding(config.width)
        pixels = config.patch**2
        self.prior = PriorEncoder(2 * config.bands * pixels, config.width)
        self.unet = UNet(
            config.in_channels * pixels,
            config.width,
            config.multipliers,
            config.blocks,
            encoder=lambda a, b, level: EncoderBlock(config, a, b, level),
            decoder=lambda d, b, level: (
                ResnetStack(config, [d, b, b], level)
                if level == config.attention_level
                else DecoderBlock(config, d, b, level)
            ),
            middle=[ResnetStack(config, [deepest] * 2, level) for level in (config.attention_level, None)],
        )
        self.head = normed_conv(config.width, 2 * config.bands * pixels)

    def encode_prior(self, mean: Tensor, variance: Tensor) -> Tensor:
        """PriorNet's mean and variance, (B, C, H, W) each, to a vector (B, 4 * width), the same at each timestep."""
        return self.prior(self._fold(torch.cat([mean, variance], dim=1)))

    def _fold(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(x, self.config.patch)

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, prior: Tensor, wavelets: Tensor | None = None
    ) -> Denoised:
        """One evaluation of the denoiser.

        Args:
            x_t, t, condition: as in `FSAStudent.forward`.
            prior: (B, 4 * width) from `encode_prior`.
            wavelets: (B, C + 3, H, W) from `teacher_wavelets`; None computes them.

        Returns:
            x0 and log_sigma (B, C, H, W), and six features; with `patch` 1 of the shapes of the student's.

        Raises:
            ValueError: shapes that do not fit the configuration or each other.
        """
        inputs = checked_inputs("teacher", self.config, x_t, condition, wavelets=(wavelets, self.config.bands + 3))
        if wavelets is None:
            wavelets = teacher_wavelets(condition.lms, condition.pan)
        h = self._fold(inputs)
        # Each level's wavelets are resized from the whole ones, not from the level before.
        sizes = [[n >> level for n in h.shape[-2:]] for level in range(len(self.config.multipliers))]
        levels = [F.interpolate(wavelets, size, mode="bilinear") for size in sizes]
        h, features = self.unet(h, self.time(t), prior, *levels)
        # Back to the precision of x_t: autocast's bfloat16 has 8 bits for x0 and variance.
        answer = F.pixel_shuffle(unrounded(self.head, h), self.config.patch).to(x_t.dtype)
        x0, raw = answer.chunk(2, dim=1)
        variance = F.softplus(raw) + self.config.variance_floor
        tiny = torch.finfo(variance.dtype).tiny  # without a floor softplus may underflow
        return Denoised(x0=x0, log_sigma=0.5 * torch.log(variance + tiny), features=features)


class PriorEncoder(nn.Module):
    """Mean and variance (B, 2C, H, W), stacked, to one vector (B, 4 * width) for the image."""

    def __init__(self, in_channels: int, width: int):
        super().__init__()
        self.entry = _leaky(in_channels, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
            )
            for _ in range(3)
        )
        self.exit = nn.Sequential(_leaky(width, 2 * width), _leaky(2 * width, 2 * width), _leaky(2 * width, 2 * width))
        self.project = nn.Sequential(nn.SiLU(), nn.Linear(2 * width, 4 * width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.entry(x)
        for block in self.blocks:
            h = h + block(h)
        return self.project(self.exit(h).mean((-2, -1)))


def _leaky(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1))


class PriorInjection(nn.Module):
    """Adds a product of two convolutions of the features, which the prior's vector modulates.

    (B, a, H, W) to (B, b, H, W). At the start nothing is added, since the first factor is zero.
    With `dead` the second one is zero too, as released, and nothing is ever added.
    """

    def __init__(self, a: int, b: int, prior_width: int, dead: bool):
        super().__init__()
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(prior_width, 2 * a, bias=False))
        self.value, self.gate = (_separable(a, 2 * a, a) for _ in range(2))
        self.out = nn.Conv2d(a, b, 1)
        for module in (self.modulate, self.value[1], *([self.gate[1]] if dead else [])):
            zeroed(module)

    def forward(self, x: Tensor, prior: Tensor) -> Tensor:
        shift, scale = self.modulate(prior)[:, :, None, None].chunk(2, dim=1)
        u = (1 + scale) * x + shift
        return self.out(self.value(u) * F.gelu(self.gate(u)) + x)


def _separable(a: int, middle: int, b: int) -> nn.Sequential:
    """Depth-wise 3x3 without bias, then 1x1."""
    return nn.Sequential(nn.Conv2d(a, middle, 3, padding=1, groups=a, bias=False), nn.Conv2d(middle, b, 1))


class EncoderBlock(nn.Module):
    """Prior injection, a ResnetBlock, and attention at the attention level."""

    def __init__(self, config: TeacherConfig, a: int, b: int, level: int):
        super().__init__()
        self.inject = PriorInjection(a, b, 4 * config.width, config.dead_prior)
        self.resnet = ResnetBlock(b, b, config.width, config.dropout)
        attend = level == config.attention_level
        self.attention = SelfAttention(b, config.heads) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor, prior: Tensor, *wavelets: Tensor) -> Tensor:
        return self.attention(self.resnet(self.inject(x, prior), time))


class DecoderBlock(nn.Module):
    """A ResnetBlock, attention over frequencies and over wavelets (twice), a ResnetBlock."""

    def __init__(self, config: TeacherConfig, d: int, b: int, level: int):
        super().__init__()
        self.level = level
        heads, drop_path, wavelets = config.heads, config.drop_path, config.bands + 3
        self.skip = nn.Conv2d(d, b, 1)
        self.first = ResnetBlock(d, d, config.width, config.dropout)
        self.frequency = FrequencySelectiveAttention(d, heads, drop_path)
        self.from_wavelets = WaveletCrossAttention(d, d, wavelets, heads, drop_path, "value")
        self.to_wavelets = WaveletCrossAttention(d, b, wavelets, heads, drop_path, "query")
        self.second = ResnetBlock(b, b, config.width, config.dropout)

    def forward(self, x: Tensor, time: Tensor, prior: Tensor, *wavelets: Tensor) -> Tensor:
        h = self.frequency(self.first(x, time))
        h = self.from_wavelets(h, wavelets[self.level])
        h = self.to_wavelets(h, wavelets[self.level])
        return self.second(h + self.skip(x), time)


class DropPath(nn.Module):
    """Leaves out a branch for some images of the batch in training (stochastic depth)."""

    def __init__(self, probability: float):
        super().__init__()
        self.keep = 1.0 - probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep == 1.0:
            return x
        kept = x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(self.keep)
        return x * (kept / self.keep)


class FeedForward(nn.Module):
    """Convolutions behind an attention, added to the attention's result."""

    def __init__(self, channels: int, drop_path: float):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False),
            nn.SiLU(),
            nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False),
            nn.Conv2d(channels, channels, 1),
            DropPath(drop_path),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class FrequencySelectiveAttention(nn.Module):
    """Attention between channels over all frequencies, of amplitudes and of phases apart.

    (B, d, H, W) to (B, d, H, W). The residual is the normalised input, as published, and so is the mixing of phases as
    plain numbers, although they are angles. The scale is one over the square root of a head's channels.
    """

    def __init__(self, channels: int, heads: int, drop_path: float):
        super().__init__()
        check_heads(channels, heads)
        self.heads = heads
        self.norm = nn.GroupNorm(1, channels)
        self.qkv = _separable(channels, channels, 3 * channels)
        self.out = nn.Conv2d(channels, channels, 1)
        self.feed_forward = FeedForward(channels, drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        mixed = self._mix(*self.qkv(x).chunk(3, dim=1)).to(x.dtype)
        return self.feed_forward(self.out(mixed) + x)

    def _mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # There is no Fourier transform of bfloat16.
        with torch.autocast(query.device.type, enabled=False):
            parts = [_spectrum(x) for x in (query, key, value)]
            amplitude = self._attend(*(z.abs() for z in parts))
            phase = self._attend(*(z.angle() for z in parts))
            mixed = _real_where_mirrored(torch.polar(amplitude, phase), query.shape[-1])
            return torch.fft.irfft2(mixed, s=query.shape[-2:], norm="ortho")

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, c, h, w = query.shape
        query, key, value = (x.reshape(b, self.heads, -1, h * w) for x in (query, key, value))
        weights = torch.softmax(query @ key.mT * (c // self.heads) ** -0.5, dim=-1)
        return (weights @ value).reshape(b, c, h, w)


def _spectrum(x: Tensor) -> Tensor:
    """Half spectrum (B, c, H, W // 2 + 1) of x, scaled to unit length over its channels."""
    x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    return _real_where_mirrored(torch.fft.rfft2(F.normalize(x, dim=1), norm="ortho"), x.shape[-1])


def _real_where_mirrored(z: Tensor, width: int) -> Tensor:
    """Zero the imaginary part of the (at most four) bins that mirror themselves.

    Rounding leaves them +-0 or a little more, as each FFT library pleases; the phase of a negative
    bin would be pi with one and -pi with another.
    """
    rows, cols = (torch.arange(n, device=z.device) for n in z.shape[-2:])
    alone = (2 * rows % z.shape[-2] == 0)[:, None] & (2 * cols % width == 0)
    return torch.complex(z.real, z.imag.masked_fill(alone, 0.0))


class WaveletCrossAttention(nn.Module):
    """Linear attention between channels of the features and of the wavelets.

    (B, d, H, W) and (B, K, H, W) to (B, b, H, W). `features_are` names the role of the features:
    "value" (query and key are wavelets) or "query" (key and value are). Keys are softmaxed
    down each column and values along each row, so that the biases of their projections change
    nothing; the published counts include them. The residual is the normalised input.
    """

    def __init__(self, d: int, b: int, wavelets: int, heads: int, drop_path: float, features_are: str):
        super().__init__()
        check_heads(d, heads)
        self.heads, self.features_are = heads, features_are
        self.norm = nn.GroupNorm(1, d)
        self.features = _separable(d, d, d)
        self.wavelets = _separable(wavelets, wavelets, 2 * d)
        self.out = nn.Conv2d(d, b, 1)
        self.skip = nn.Identity() if d == b else nn.Conv2d(d, b, 1)
        self.feed_forward = FeedForward(b, drop_path)

    def forward(self, x: Tensor, wavelets: Tensor) -> Tensor:
        x = self.norm(x)
        one, (first, second) = self.features(x), self.wavelets(wavelets).chunk(2, dim=1)
        if self.features_are == "value":
            mixed = self._attend(first, second, one)
        else:
            mixed = self._attend(one, first, second)
        return self.feed_forward(self.out(mixed) + self.skip(x))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        b, c, h, w = query.shape
        key = key.softmax(dim=-2)
        value = value.softmax(dim=-1) / math.sqrt(c // self.heads)
        query, key, value = (x.reshape(b, self.heads, -1, h * w) for x in (query, key, value))
        between = query @ key.mT  # (B, heads, d, e)
        return (between.mT @ value).reshape(b, c, h, w)
