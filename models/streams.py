"""The student of two streams: a wide trunk, once per image, and a narrow stream for every band.

Every band passes the same weights. The trunk sees the PAN and the mean of the bands, the bands see
the trunk. So the network serves any number of bands, and permuting the bands permutes the result.
All operators are local: with a halo of `reach` pixels the result does not depend on how the scene
was cut. Most work is done on the grid of 4 x 4 PAN pixels.

The prediction D without x_t is combined with x_t as two measurements of one value (Karras et al.
2022, equation 7, with the variance of D for that of the data): x0 = D + c_skip (x_t - a D) with
c_skip = a v^2 / (a^2 v^2 + s^2). a and s are signal and noise of the timestep, v the error of D.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.diffusion import NoiseSchedule
from uknowpan.models.features import (
    BACK_PROJECTION,
    CELLS,
    CORRECTION,
    INJECTIONS,
    LEAST_POWER,
    LOG_SIGMA,
    LOG_V,
    MAPS,
    MISSING,
    ON_PAN,
    PAN_FEATURES,
    StreamsConfig,
)
from uknowpan.models.network import (
    PixelNorm,
    add_shared,
    band_mean,
    by_image,
    compress,
    features_of,
    time_features,
    to_grid,
)
from uknowpan.models.resample import PIECE, pieces
from uknowpan.models.types import Condition, Denoised


class StreamBlock(nn.Module):
    """Residual block of one stream that receives the other stream."""

    def __init__(self, channels: int, other: int, embedding: int):
        super().__init__()
        self.norm = PixelNorm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.context = nn.Conv2d(other, channels, 1)
        self.embed = nn.Linear(embedding, channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        self.second.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, embedding: Tensor, other: Tensor, bands: int = 1) -> Tensor:
        """x (B * bands, channels, h, w), embedding (B, E), other (B, other, h, w) -> as x."""
        shared = self.context(other) + self.embed(embedding)[:, :, None, None]
        y = add_shared(self.first(self.norm(x)), shared, bands)
        residual: Tensor = self.second(F.silu(y))
        return x + residual


class StreamsStudent(nn.Module):
    """x0-predicting denoiser (x_t, t, condition) -> `Denoised` for any number of bands.

    At the last timestep x_t is pure noise: the network takes zeros for it, whatever is handed in.
    """

    pixel_multiple = 4
    """Windows start and end at multiples of this number of PAN pixels."""
    starts_from_zeros = True
    """Whether x_t has no influence at the last timestep, so that one step needs no noise."""

    def __init__(self, config: StreamsConfig | None = None):
        super().__init__()
        self.config = config = config or StreamsConfig()
        pan, trunk, band, head = config.pan_width, config.trunk_width, config.band_width, config.head_width
        emb = 4 * pan
        self.schedule = NoiseSchedule.cosine(config.timesteps)
        self.embed = nn.Sequential(
            nn.Linear(32 + config.scene_features, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU()
        )
        self.pan_in = nn.Conv2d(4 * PAN_FEATURES, pan, 3, padding=1)
        self.down = nn.Conv2d(pan, trunk, 2, stride=2)
        self.band_in = nn.Conv2d(CELLS + 16, band, 3, padding=1)
        self.trunk_blocks = nn.ModuleList(StreamBlock(trunk, band, emb) for _ in range(config.trunk_blocks))
        self.band_blocks = nn.ModuleList(StreamBlock(band, trunk, emb) for _ in range(config.band_blocks))
        self.trunk_up = nn.Conv2d(trunk, 4 * head, 1)
        self.band_up = nn.Conv2d(band, 4 * head, 1)
        self.pan_out = nn.Conv2d(pan, head, 3, padding=1)
        self.norm_out = PixelNorm(head)
        self.out = nn.Conv2d(head, 4 * MAPS, 3, padding=1)
        self._start_as_local_injection()

    @property
    def reach(self) -> int:
        """PAN pixels around an output pixel that it depends on (an upper bound)."""
        return self.config.reach

    def _start_as_local_injection(self) -> None:
        """Untrained, the network predicts the local injection (band feature 1)."""
        nn.init.zeros_(self.out.weight)
        bias = torch.zeros(MAPS, 4)
        bias[1], bias[LOG_V] = 1.0, -1.0
        self.out.bias = nn.Parameter(bias.flatten())

    def forward(self, x_t: Tensor | None, t: Tensor, condition: Condition) -> Denoised:
        """Predict the clean standardised residual.

        Args:
            x_t: (B, C, H, W), H and W multiples of 4; None: all timesteps are the last.
            t: (B,) timesteps.
            condition: from `generic_condition`.

        Returns:
            `Denoised` with x0, log_sigma and, with x_t, emphasis (B, C, H, W).

        Raises:
            ValueError: H or W is no multiple of 4, or the condition has no features.
        """
        if x_t is None:
            return self.at_end(condition)
        band, pan, scene = features_of(condition)
        bands = band.shape[1]
        at_end = (t == self.config.timesteps - 1).view(-1, 1, 1, 1)
        joined, fine = self._streams(x_t.masked_fill(at_end, 0.0), t, band, pan, scene)
        maps = self._maps(by_image(joined, bands) + fine[:, None], MAPS)
        mean, log_sigma = _answer(maps, band)
        signal, noise = self.schedule.signal(t).masked_fill(at_end, 0.0), self.schedule.noise(t)
        variance = torch.exp(2 * maps[:, :, LOG_V].clamp(-5.0, 3.0))
        spread = signal**2 * variance + noise**2
        x0 = mean + signal * variance / spread * (x_t - signal * mean)
        return Denoised(x0=x0, log_sigma=log_sigma, emphasis=(spread.sqrt() / noise).detach())

    def at_end(self, condition: Condition, halo: int = 0) -> Denoised:
        """Predict at the last timestep, where no x_t is needed, without the outermost `halo` PAN pixels.

        On a CPU the maps are made in pieces that stay in a core's cache.

        Raises:
            ValueError: as `forward`.
        """
        band, pan, scene = features_of(condition)
        images, bands, _, height, width = band.shape
        last = torch.full((images,), self.config.timesteps - 1, device=band.device)
        joined, fine = self._streams(None, last, band, pan, scene)
        joined, size = by_image(joined, bands), (images, bands, height - 2 * halo, width - 2 * halo)
        x0, log_sigma = band.new_empty(size), band.new_empty(size)
        rows, each = (PIECE, 1) if band.device.type == "cpu" else (height, bands)
        for image, first, (down, across) in product(
            range(images), range(0, bands, each), pieces(height, width, halo, rows)
        ):
            one, some = slice(image, image + 1), slice(first, first + each)
            cells = down.cells(2), across.cells(2)
            own, shared = joined[one, some, :, *cells], fine[one, None, :, *cells]
            maps, place = self._maps(own + shared, LOG_V), (one, some, down.place, across.place)
            answer = _answer(maps[..., down.inner, across.inner], band[one, some, :, down.whole, across.whole])
            x0[place], log_sigma[place] = answer
        return Denoised(x0=x0, log_sigma=log_sigma)

    def _streams(
        self, x_t: Tensor | None, t: Tensor, band: Tensor, pan: Tensor, scene: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B * C, K, H / 2, W / 2) of both streams, and (B, K, H / 2, W / 2) of the PAN alone."""
        bands = band.shape[1]
        emb = self.embed(
            torch.cat([time_features(t, self.config.timesteps), scene[:, : self.config.scene_features]], 1)
        )
        fine = F.silu(self.pan_in(to_grid(compress(pan))))
        trunk = self.down(fine)
        cells = to_grid(compress(_cells(band, pan[:, :1])).flatten(0, 1))
        if x_t is None:
            y = F.conv2d(cells, self.band_in.weight[:, :CELLS], self.band_in.bias, padding=1)
        else:
            y = self.band_in(torch.cat([cells, F.pixel_unshuffle(x_t.flatten(0, 1)[:, None], 4)], 1))
        mean = band_mean(y, bands)
        for block in self.trunk_blocks:
            trunk = block(trunk, emb, mean)
        for block in self.band_blocks:
            y = block(y, emb, trunk, bands)
        up = add_shared(self.band_up(y), self.trunk_up(trunk), bands)
        return F.pixel_shuffle(up, 2), self.pan_out(fine)

    def _maps(self, head: Tensor, count: int) -> Tensor:
        """(B, C, K, h, w) -> the first maps (B, C, count, 2 h, 2 w), float32."""
        weight, bias = (part[: 4 * count] for part in self.out.parameters())
        maps = F.conv2d(F.silu(self.norm_out(head.flatten(0, 1))), weight, bias, padding=1)
        return by_image(F.pixel_shuffle(maps, 2).float(), head.shape[1])


def _answer(maps: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """x0 without x_t, and log sigma: band features (B, C, F, H, W) in the proportions of the maps."""
    mean = torch.addcmul(maps[:, :, CORRECTION], maps[:, :, MISSING], band[:, :, BACK_PROJECTION])
    for k in range(INJECTIONS):
        mean = torch.addcmul(mean, maps[:, :, k], band[:, :, k])
    return mean, maps[:, :, LOG_SIGMA].clamp(-8.0, 6.0)


def _cells(band: Tensor, detail: Tensor) -> Tensor:
    """Band features (B, C, F, H, W) on the 2 x 2 grid: the gain of those that follow the PAN's detail, the mean of
    the others, which are smooth."""
    gain = _mean_of_cells(band[:, :, :ON_PAN] * detail[:, None]) / (_mean_of_cells(detail**2)[:, None] + LEAST_POWER)
    return torch.cat([gain, _mean_of_cells(band[:, :, ON_PAN:])], 2)


def _mean_of_cells(x: Tensor) -> Tensor:
    """Mean over 2 x 2 pixels; torch's own pooling takes five times as long on a CPU."""
    rows = x[..., ::2, :] + x[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) / 4
