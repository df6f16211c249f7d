"""Values that travel between the parts of a model.

Shapes: B images, C bands; ``H, W`` on the PAN grid, ``h, w`` on the MS grid (``H = ratio * h``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Input of a denoiser besides the noisy residual and the timestep."""

    lms: Tensor
    """(B, C, H, W) MS interpolated to the PAN grid."""
    pan: Tensor
    """(B, 1, H, W) PAN."""
    self_cond: Tensor | None = None
    """(B, C, H, W) slot of self-conditioning, for networks that have one."""
    pan_features: Tensor | None = None
    """(B, P, H, W) see `uknowpan.models.features`; networks of the `lite` form."""
    band_features: Tensor | None = None
    """(B, C, F, H, W) see `uknowpan.models.features`; networks of the `lite` form."""
    scene: Tensor | None = None
    """(B, S) numbers of the whole scene, see `uknowpan.models.features.scene_numbers`."""
    ms: Tensor | None = None
    """(B, C, h, w) MS on its own grid; for networks that use it beside lms."""

    def crop(self, rows: slice, cols: slice) -> Condition:
        """The same condition for a window of the PAN grid; with ms, one of whole MS pixels."""

        def part(name: str, x: Tensor) -> Tensor:
            ratio = self.pan.shape[-1] // x.shape[-1] if name == "ms" else 1
            own = [slice(*(None if i is None else i // ratio for i in (s.start, s.stop))) for s in (rows, cols)]
            return x if name == "scene" else x[..., own[0], own[1]]

        return self._map(part)

    def shrink(self, border: int) -> Condition:
        """The same condition without `border` PAN pixels on every side."""
        height, width = self.pan.shape[-2:]
        return self.crop(slice(border, height - border), slice(border, width - border))

    def to(self, *args: Any, **kwargs: Any) -> Condition:
        """`torch.Tensor.to` for every tensor."""
        return self._map(lambda name, x: x.to(*args, **kwargs))

    @staticmethod
    def stack(items: list[Condition]) -> Condition:
        """One batch of several conditions of equal shapes."""
        names = [f.name for f in fields(Condition) if getattr(items[0], f.name) is not None]
        return Condition(**{n: torch.cat([getattr(i, n) for i in items]) for n in names})

    def _map(self, function: Any) -> Condition:
        changed = {
            f.name: function(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None
        }
        return replace(self, **changed)


@dataclass(frozen=True)
class Denoised:
    """Output of a denoiser."""

    x0: Tensor
    """(B, C, H, W) the predicted standardised residual gt - lms."""
    log_sigma: Tensor | None = None
    """(B, C, H, W) natural logarithm of the predicted error's 1-sigma, in units of x0."""
    features: tuple[Tensor, ...] = ()
    """Intermediate activations, compared in distillation."""
    emphasis: Tensor | None = None
    """(B, C, H, W) factor of the error of x0 in training: small timesteps count like large ones; None: 1."""
