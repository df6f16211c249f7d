"""The published teacher with its PriorNet: one network, one file."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uknowpan.models.diffusion import Denoiser
from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.published.uknow.teacher import FSATeacher, TeacherConfig
from uknowpan.models.published.uknow.wavelets import teacher_wavelets
from uknowpan.models.types import Condition, Denoised


@dataclass(frozen=True)
class GuidedTeacherConfig:
    """Shapes of both networks; `dataclasses.asdict` makes a card's config of it."""

    teacher: TeacherConfig
    prior: PriorConfig
    raw_prior: bool = False
    """Simulate the release, which gives the teacher PriorNet's mean and variance as they are. At
    [0, 1] a variance is about 1e-4, too small to matter. By default both are in units of x0, the
    mean as a residual and the variance as its logarithm."""

    @property
    def bands(self) -> int:
        """C, the bands of the MS."""
        return self.teacher.bands

    @property
    def factor(self) -> int:
        """Heights and widths must be multiples of this."""
        return self.teacher.factor

    def __post_init__(self) -> None:
        if self.teacher.bands != self.prior.bands:
            raise ValueError(
                f"the teacher takes {self.teacher.bands} bands, its PriorNet {self.prior.bands}; give both the same"
            )


class GuidedTeacher(nn.Module):
    """An `FSATeacher` with its own, frozen `PriorNet`.

    PriorNet gets no gradients, and stays in evaluation mode and in the precision of its weights. So
    training and sampling see the same prior. The buffer `residual_std` (C,), ones at first, is the
    unit of x0: the standard deviation of gt - lms per band, in the units of lms.

    Source: U-Know-DiffPAN (CVPR 2025), FSA-T and its prior.
    """

    residual_std: Tensor

    def __init__(self, config: GuidedTeacherConfig):
        super().__init__()
        self.config = config
        self.pixel_multiple = config.factor
        self.teacher = FSATeacher(config.teacher)
        self.prior_net = PriorNet(config.prior).requires_grad_(False).eval()
        self.register_buffer("residual_std", torch.ones(config.teacher.bands))

    def train(self, mode: bool = True) -> GuidedTeacher:
        super().train(mode)
        self.prior_net.eval()
        return self

    def encode_prior(self, condition: Condition) -> Tensor:
        """PriorNet's prediction for lms and pan as the teacher's vector (B, 4 * width), the same at each timestep."""
        lms = condition.lms
        with torch.no_grad(), torch.autocast(lms.device.type, enabled=False):
            mean, variance = self.prior_net(lms, condition.pan)
            if not self.config.raw_prior:
                unit = self.residual_std[:, None, None]
                tiny = torch.finfo(variance.dtype).tiny  # without a floor softplus may underflow
                mean, variance = (mean - lms) / unit, (variance / unit**2 + tiny).log()
        return self.teacher.encode_prior(mean, variance)

    def forward(
        self, x_t: Tensor, t: Tensor, condition: Condition, prior: Tensor | None = None, wavelets: Tensor | None = None
    ) -> Denoised:
        """`FSATeacher.forward`; a `prior` of None is that of `encode_prior`."""
        if prior is None:
            prior = self.encode_prior(condition)
        return self.teacher(x_t, t, condition, prior, wavelets)

    def denoiser(self, condition: Condition) -> Denoiser:
        """The network for all steps of one condition: prior and wavelets are computed once, here."""
        prior, wavelets = self.encode_prior(condition), teacher_wavelets(condition.lms, condition.pan)
        return lambda x_t, t, carried: self(x_t, t, carried, prior, wavelets)
