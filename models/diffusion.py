"""The diffusion of U-Know-DiffPAN: a cosine schedule, x0-prediction, DDIM, position noise.

METHODS section 1.1; Nichol and Dhariwal 2021 (schedule), Song et al. 2021 (DDIM, eta = 0). The
schedule never changes; taking fewer steps means choosing timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import Tensor

from uknowpan.models.architectures import TIMESTEPS
from uknowpan.models.types import Condition, Denoised

Denoiser = Callable[[Tensor | None, Tensor, Condition], Denoised]
"""x_t, t, condition; x_t is None at the last timestep of a network that starts from zeros."""


@dataclass(frozen=True)
class NoiseSchedule:
    """Share of the signal that is left at each timestep."""

    alphas_cumprod: Tensor
    """(T,) float64, falling."""
    _held: dict[torch.device, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """The same on each device that asked for it: a copy for every step would make the host wait for the device."""

    @staticmethod
    def cosine(timesteps: int = TIMESTEPS, s: float = 0.008) -> NoiseSchedule:
        """alpha_bar_t = f((t + 1) / T) / f(0), f(u) = cos^2((u + s) / (1 + s) * pi / 2)."""
        # On the CPU, also where a network is built without numbers: there torch imports a second of compilers.
        u = torch.arange(1, timesteps + 1, dtype=torch.float64, device="cpu") / timesteps

        def f(v: Tensor) -> Tensor:
            return torch.cos((v + s) / (1 + s) * math.pi / 2) ** 2

        ratio = f(u) / f(torch.cat([torch.zeros(1, dtype=torch.float64, device="cpu"), u[:-1]]))
        return NoiseSchedule(torch.cumprod(ratio.clamp_min(1 - 0.999), 0))

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def respace(self, steps: int) -> list[int]:
        """`steps` timesteps, falling, from the last one to near zero, evenly spaced.

        Raises:
            ValueError: fewer than one step or more than the schedule has.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps must be 1 to {len(self)}, not {steps}")
        return [(len(self) - 1) * (steps - i) // steps for i in range(steps)]

    def strided(self, steps: int) -> list[int]:
        """`steps` timesteps as the releases choose them: the multiples of the smallest stride that gives so many.

        25 of 500 are 480, 460 .. 0; sampling never begins at the last timestep.

        Raises:
            ValueError: no stride gives that number.
        """
        for stride in range(1, len(self) + 1):
            if len(chosen := range(0, len(self), stride)) == steps:
                return list(chosen)[::-1]
        raise ValueError(f"no stride takes {steps} of {len(self)} timesteps")

    def signal(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar_t), shaped to multiply (B, C, H, W)."""
        return self._on(t.device)[t].sqrt().float().view(-1, 1, 1, 1)

    def noise(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha_bar_t), shaped to multiply (B, C, H, W)."""
        return (1 - self._on(t.device)[t]).sqrt().float().view(-1, 1, 1, 1)

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._held:
            with torch.inference_mode(False):  # sharpening may ask first, training later
                self._held[device] = self.alphas_cumprod.to(device)
        return self._held[device]


def add_noise(schedule: NoiseSchedule, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise.

    Args:
        schedule: the noise schedule.
        x0: (B, C, H, W).
        t: (B,) int64 timesteps.
        noise: (B, C, H, W) standard normal.
    """
    return schedule.signal(t) * x0 + schedule.noise(t) * noise


def ddim_sample(
    denoise: Denoiser,
    x_t: Tensor,
    timesteps: Sequence[int],
    schedule: NoiseSchedule,
    condition: Condition,
    *,
    respaced_time_index: bool = False,
    self_conditioning: bool = False,
    clamped_unit: Tensor | None = None,
) -> Denoised:
    """DDIM with eta = 0 (Song et al. 2021, equation 12).

    Args:
        denoise: network (x_t, t, condition) -> `Denoised`.
        x_t: (B, C, H, W) standard normal noise.
        timesteps: falling; the last evaluation's x0 is the answer.
        schedule: the noise schedule.
        condition: of the scene.
        respaced_time_index: feed the network the step's number instead of its timestep, as the
            release does by mistake (METHODS B1); only to reproduce its numbers.
        self_conditioning: hand each step the x0 of the one before in the condition's `self_cond`
            (Chen et al. 2023). The release trains for it and never does it (METHODS B2).
        clamped_unit: unit of x0; clamps lms + x0 to [0, 1] at each step and goes on from that instead of the
            residual, as SSDiff's release does (METHODS S3); None: no clamping.

    Returns:
        The network's output at the last step.
    """
    from_zeros = getattr(denoise, "starts_from_zeros", False)
    result = None
    for i, step in enumerate(timesteps):
        t = torch.full((len(x_t),), step, dtype=torch.int64, device=x_t.device)
        fed = torch.full_like(t, len(timesteps) - 1 - i) if respaced_time_index else t
        result = denoise(None if from_zeros and step == len(schedule) - 1 else x_t, fed, condition)
        if self_conditioning:
            condition = replace(condition, self_cond=result.x0)
        if clamped_unit is not None:
            result = replace(result, x0=(condition.lms + clamped_unit * result.x0).clamp(0, 1) / clamped_unit)
        if i + 1 < len(timesteps):
            noise = (x_t - schedule.signal(t) * result.x0) / schedule.noise(t)
            after = torch.full_like(t, timesteps[i + 1])
            x_t = add_noise(schedule, result.x0, after, noise)
    if result is None:
        raise ValueError("no timesteps to sample at")
    if clamped_unit is not None:
        result = replace(result, x0=result.x0 - condition.lms / clamped_unit)
    return result


# ------------------------------------------------------------------------------ position noise
# Noise is a function of (seed, absolute position, band): a counter, not a stream. A tile's noise
# does not depend on how the scene was cut, and is the same on every device.

_TABLE_BITS = 16


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= (1 << 63) else value


_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_KEYS = tuple(_signed(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    shifted: Tensor = (x >> bits) & ((1 << (64 - bits)) - 1)
    return shifted


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@lru_cache
@torch.inference_mode(False)
def _normal_table(device: str) -> Tensor:
    """Quantiles of N(0, 1) at the middle of 2^16 equal probabilities, to unit variance."""
    p = (torch.arange(1 << _TABLE_BITS, dtype=torch.float64) + 0.5) / (1 << _TABLE_BITS)
    q = torch.special.ndtri(p)
    table: Tensor = (q / q.square().mean().sqrt()).float()
    return table.to(device)


def position_noise(
    seed: int,
    row: int,
    col: int,
    height: int,
    width: int,
    bands: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of a window.

    Args:
        seed: any integer of 64 bits.
        row: first row of the window in the scene's frame (may be negative).
        col: first column.
        height: rows.
        width: columns.
        bands: how many bands, numbered from 0.
        device: where the noise is made.

    Returns:
        (bands, height, width) float32.
    """
    y = torch.arange(row, row + height, dtype=torch.int64, device=device)
    x = torch.arange(col, col + width, dtype=torch.int64, device=device)
    b = torch.arange(bands, dtype=torch.int64, device=device)
    start = int(_mix(torch.tensor(_signed(seed % (1 << 64))) + _KEYS[0]))  # on the CPU, where nothing has to wait
    per_band = _mix(start + (b + 1) * _KEYS[1])
    per_row = _mix(per_band[:, None] + y[None, :] * _KEYS[2])
    bits = _mix(per_row[:, :, None] ^ _mix(x * _KEYS[0] + _KEYS[1])[None, None, :])
    return _normal_table(str(device))[_shift_right(bits, 64 - _TABLE_BITS)]
