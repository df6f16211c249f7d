"""The diffusion of U-Know-DiffPAN: a cosine schedule, x0-prediction, DDIM.

METHODS section 1.1; Nichol and Dhariwal 2021 (schedule), Song et al. 2021 (DDIM, eta = 0). The
schedule never changes; taking fewer steps means choosing timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from uknowpan.models.architectures import TIMESTEPS
from uknowpan.models.types import Condition, Denoised

Denoiser = Callable[[Tensor, Tensor, Condition], Denoised]


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of the signal is left at each timestep."""

    alphas_cumprod: Tensor
    """(T,) float64, falling."""

    @staticmethod
    def cosine(timesteps: int = TIMESTEPS, s: float = 0.008) -> NoiseSchedule:
        """alpha_bar_t = f((t + 1) / T) / f(0), f(u) = cos^2((u + s) / (1 + s) * pi / 2)."""
        u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps

        def f(v: Tensor) -> Tensor:
            return torch.cos((v + s) / (1 + s) * math.pi / 2) ** 2

        ratio = f(u) / f(torch.cat([torch.zeros(1, dtype=torch.float64), u[:-1]]))
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

    def respace_stride(self, steps: int) -> list[int]:
        """The release's timesteps: multiples of one stride, falling (25 of 500: 480, 460 ... 0)."""
        for stride in range(1, len(self)):
            if len(range(0, len(self), stride)) == steps:
                return list(range(0, len(self), stride))[::-1]
        raise ValueError(f"{len(self)} timesteps cannot be cut into {steps} equal strides")

    def signal(self, t: Tensor) -> Tensor:
        """sqrt(alpha_bar_t), shaped to multiply (B, C, H, W)."""
        return self.alphas_cumprod.to(t.device)[t].sqrt().float().view(-1, 1, 1, 1)

    def noise(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha_bar_t), shaped to multiply (B, C, H, W)."""
        return (1 - self.alphas_cumprod.to(t.device)[t]).sqrt().float().view(-1, 1, 1, 1)


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

    Returns:
        What the network said at the last step.
    """
    batch = x_t.shape[0]
    result = None
    for i, step in enumerate(timesteps):
        t = torch.full((batch,), step, dtype=torch.int64, device=x_t.device)
        fed = torch.full_like(t, len(timesteps) - 1 - i) if respaced_time_index else t
        result = denoise(x_t, fed, condition)
        if self_conditioning:
            condition = replace(condition, self_cond=result.x0)
        if i + 1 < len(timesteps):
            noise = (x_t - schedule.signal(t) * result.x0) / schedule.noise(t)
            after = torch.full_like(t, timesteps[i + 1])
            x_t = add_noise(schedule, result.x0, after, noise)
    if result is None:
        raise ValueError("no timesteps to sample at")
    return result
