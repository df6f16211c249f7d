"""Values that travel between the parts of a model.

Shapes: B images, C bands; ``H, W`` on the PAN grid, ``h, w`` on the MS grid (``H = ratio * h``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Self, cast

if TYPE_CHECKING:
    from torch import Tensor


class Bundle:
    """The base of dataclasses whose tensors travel together; fields with the metadata "fixed" stay where they are."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` applied to every tensor, also to those of a tuple or of a bundle within."""
        names = [entry.name for entry in fields(cast(Any, self)) if "fixed" not in entry.metadata]
        mapped: Self = replace(cast(Any, self), **{name: _mapped(getattr(self, name), function) for name in names})
        return mapped

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """`torch.Tensor.to` for every tensor."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> Self:
        """The same in page-locked memory; a DataLoader calls this."""
        return self.map(lambda x: x.pin_memory())

    @classmethod
    def cat(cls, items: Sequence[Self]) -> Self:
        """One batch of several; each tensor is there in all of them or in none."""
        import torch

        def joined(values: list[Any]) -> Any:
            if isinstance(values[0], tuple):
                return tuple(torch.cat(same) for same in zip(*values, strict=True))
            return None if values[0] is None else torch.cat(values)

        names = [entry.name for entry in fields(cast(Any, cls))]
        return cls(**{name: joined([getattr(item, name) for item in items]) for name in names})


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Bundle):
        return value.map(function)
    if isinstance(value, tuple):
        return tuple(map(function, value))
    return value if value is None else function(value)


@dataclass(frozen=True)
class Condition(Bundle):
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

        def part(x: Tensor) -> Tensor:
            ratio = self.pan.shape[-1] // x.shape[-1]
            own = [slice(*(None if i is None else i // ratio for i in (s.start, s.stop))) for s in (rows, cols)]
            return x[..., own[0], own[1]]

        return self.map_images(part)

    def shrink(self, border: int) -> Condition:
        """The same condition without `border` PAN pixels on every side."""
        height, width = self.pan.shape[-2:]
        return self.crop(slice(border, height - border), slice(border, width - border))

    def map_images(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """The condition with `function` applied to every tensor but `scene`."""
        return replace(replace(self, scene=None).map(function), scene=self.scene)


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

    def shrink(self, border: int) -> Denoised:
        """The same, x0 and log sigma without `border` PAN pixels on every side."""
        inner = slice(border, -border or None)
        sigma = self.log_sigma
        return replace(
            self, x0=self.x0[..., inner, inner], log_sigma=None if sigma is None else sigma[..., inner, inner]
        )


@dataclass(frozen=True)
class PatchBatch(Bundle):
    """Patches of reduced or full resolution."""

    pan: Tensor
    """(B, 1, H, W)"""
    ms: Tensor
    """(B, C, h, w)"""
    lms: Tensor
    """(B, C, H, W) MS interpolated to the PAN grid."""
    gt: Tensor | None = None
    """(B, C, H, W) truth; None at full resolution."""
    origin: Tensor | None = field(default=None, metadata={"fixed": True})
    """(B, 3) int64, on the CPU: the number of each patch's scene in `PanCollectionDataset.sources`,
    whether its rows are flipped, and whether its columns are; None outside a dataset."""

    def __len__(self) -> int:
        return len(self.pan)
