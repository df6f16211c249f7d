"""Teacher and prior as sharpeners of test images; scenes are sharpened by their students."""

import torch

from uknowpan.models.denoising import OnePassSharpener, UNetSharpener
from uknowpan.models.geometry import Origins
from uknowpan.models.sharpeners import Sharpened
from uknowpan.models.statistics import SceneStatistics
from uknowpan.models.types import Condition, Denoised, PatchBatch


class TeacherSharpener(UNetSharpener):
    """FSA-T with its PriorNet; prior and wavelets are computed once for all steps."""

    has_uncertainty = True

    def _sample(self, condition: Condition, origins: Origins, halo: int) -> Denoised:
        # In float32 always: the phases of its Fourier transforms jump at pi.
        return self._ddim(self.model.denoiser(condition), condition, self._noise(condition, origins, halo)).shrink(halo)


class PriorSharpener(OnePassSharpener):
    """PriorNet, which predicts mean and variance of the sharp image itself."""

    has_uncertainty = True
    needs_residual_std = False

    @torch.inference_mode()
    def sharpen_images(
        self, images: PatchBatch, statistics: SceneStatistics | None = None, offset: float = 0.0
    ) -> Sharpened:
        """See `UNetSharpener.sharpen_images`."""
        mean, variance = self.model(images.lms.to(self.device), images.pan.to(self.device))
        return Sharpened(mean, variance.sqrt())
