"""Teacher and prior as sharpeners of test images; scenes are sharpened by their students."""

from __future__ import annotations

import torch

from uknowpan.models.sharpeners import Images, OnePassSharpener, Origins, Sharpened, UNetSharpener
from uknowpan.models.types import Condition, Denoised


class TeacherSharpener(UNetSharpener):
    """FSA-T with its PriorNet; prior and wavelets are computed once for all steps."""

    has_uncertainty = True

    def _sample(self, condition: Condition, origins: Origins, halo: int) -> Denoised:
        # In float32 always: the phases of its Fourier transforms jump at pi.
        answer: Denoised = self.model.sample(
            condition.lms,
            condition.pan,
            steps=self.steps,
            schedule=self.schedule,
            noise=self._noise(condition, origins, halo),
            self_conditioning=self.card.self_conditioning,
        )
        return answer


class PriorSharpener(OnePassSharpener):
    """PriorNet, which predicts mean and variance of the sharp image itself."""

    has_uncertainty = True
    needs_residual_std = False

    @torch.inference_mode()
    def sharpen_images(self, images: Images) -> Sharpened:
        """See `UNetSharpener.sharpen_images`."""
        mean, variance = self.model(images.lms.to(self.device), images.pan.to(self.device))
        return Sharpened(mean, variance.sqrt())
