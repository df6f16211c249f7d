"""From a window of a scene to its sharpened bands: the one object that inference needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .checkpoint import Card, find_checkpoint, load_model, sha256
from .classical import CLASSICAL_METHODS, classical_reach
from .condition import condition_reach, generic_condition
from .diffusion import NoiseSchedule, ddim_sample
from .errors import ModelMismatch
from .noise import position_noise
from .psf import Psf, default_psf
from .resample import crop, mirrored
from .statistics import SceneStatistics, scene_statistics

__all__ = [
    "ClassicalSharpener",
    "Sharpened",
    "Sharpener",
    "StudentSharpener",
    "load_sharpener",
    "sharpen_array",
]


@dataclass(frozen=True)
class Sharpened:
    """The core of a window, in the units that came in."""

    hrms: Tensor
    """(B, C, H, W)."""
    sigma: Tensor | None = None
    """(B, C, H, W) 1-sigma of hrms, where the method has one."""


class Sharpener(Protocol):
    """A way to sharpen windows."""

    name: str
    multiple: int
    """Windows start and end at multiples of so many PAN pixels of the scene's frame."""
    local: bool
    """True: a pixel's result depends on nothing beyond `margin`; tiles need no blending."""
    has_uncertainty: bool

    def check(self, bands: int, ratio: int) -> None:
        """Raise `ModelMismatch` if this method does not serve such a scene."""

    def assumed_psf(self, ratio: int) -> Psf | None:
        """The blur that the method takes for granted; None: it wants the scene's own."""

    def margin(self, statistics: SceneStatistics) -> int:
        """MS pixels around a window that are to be read with it."""

    def sharpen(
        self,
        pan: Tensor,
        ms: Tensor,
        statistics: SceneStatistics,
        origins: Sequence[tuple[int, int]],
    ) -> Sharpened:
        """Sharpen windows that were read with their margin; see `StudentSharpener.sharpen`."""

    def provenance(self) -> dict[str, str]:
        """What an output's tags say of the method."""


class ClassicalSharpener:
    """One of `CLASSICAL_METHODS`."""

    multiple = 1
    local = True
    has_uncertainty = False

    def __init__(self, method: str):
        self.name = method
        self._method = CLASSICAL_METHODS[method]

    def check(self, bands: int, ratio: int) -> None:
        return None

    def assumed_psf(self, ratio: int) -> Psf | None:
        return default_psf(ratio)

    def margin(self, statistics: SceneStatistics) -> int:
        return classical_reach(statistics)

    @torch.inference_mode()
    def sharpen(
        self,
        pan: Tensor,
        ms: Tensor,
        statistics: SceneStatistics,
        origins: Sequence[tuple[int, int]],
    ) -> Sharpened:
        hrms = self._method(pan, ms, statistics)
        return Sharpened(crop(hrms, self.margin(statistics) * statistics.ratio))

    def provenance(self) -> dict[str, str]:
        return {"METHOD": self.name}


class StudentSharpener:
    """The `generic` diffusion student."""

    local = True
    has_uncertainty = True

    def __init__(
        self,
        model: nn.Module,
        card: Card,
        *,
        steps: int | None = None,
        seed: int = 0,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        digest: str = "",
    ):
        self.name, self.card = card.name, card
        self.steps = card.steps if steps is None else steps
        self.seed, self.device, self.dtype, self.digest = seed, device, dtype, digest
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.multiple = int(model.pixel_multiple)  # type: ignore[arg-type]
        self.schedule = NoiseSchedule.cosine(int(card.config.get("timesteps", 500)))
        self.timesteps = self.schedule.respace(self.steps)

    def check(self, bands: int, ratio: int) -> None:
        if self.card.bands is not None and bands != self.card.bands:
            raise ModelMismatch(
                f"the MS has {bands} bands, but model {self.name} was trained for "
                f"{self.card.bands}; choose bands with --bidx or another model"
            )
        if ratio not in self.card.ratios:
            raise ModelMismatch(
                f"the PAN/MS ratio is {ratio}, but model {self.name} serves "
                f"{min(self.card.ratios)} to {max(self.card.ratios)}; use --method or another model"
            )

    def assumed_psf(self, ratio: int) -> Psf | None:
        return None

    def _network_halo(self, ratio: int) -> int:
        """PAN pixels around the core that the network sees."""
        return self.steps * int(self.model.reach)  # type: ignore[arg-type]

    def margin(self, statistics: SceneStatistics) -> int:
        network = math.ceil(self._network_halo(statistics.ratio) / statistics.ratio)
        return condition_reach(statistics) + network

    @torch.inference_mode()
    def sharpen(
        self,
        pan: Tensor,
        ms: Tensor,
        statistics: SceneStatistics,
        origins: Sequence[tuple[int, int]],
    ) -> Sharpened:
        """Sharpen windows.

        Args:
            pan: (B, 1, H, W) with `margin` MS pixels on every side of the cores.
            ms: (B, C, h, w).
            statistics: of the scene, in the same units.
            origins: (row, col) of each core in PAN pixels of the scene's frame, multiples of
                `multiple`: they fix the noise.

        Returns:
            The cores.
        """
        ratio = statistics.ratio
        halo = self._network_halo(ratio)
        outer = self.margin(statistics) * ratio
        condition = generic_condition(pan, ms, statistics)
        rows = slice(outer - halo, pan.shape[-2] - outer + halo)
        cols = slice(outer - halo, pan.shape[-1] - outer + halo)
        condition = condition.crop(rows, cols).to(self.device)
        height, width = condition.pan.shape[-2:]
        noise = torch.stack(
            [
                position_noise(
                    self.seed, r - halo, c - halo, height, width, ms.shape[1], self.device
                )
                for r, c in origins
            ]
        )
        with torch.autocast(
            torch.device(self.device).type, dtype=self.dtype, enabled=self.dtype != torch.float32
        ):
            said = ddim_sample(self.model, noise, self.timesteps, self.schedule, condition)
        scale = statistics.detail_std[:-1].float().view(1, -1, 1, 1).to(self.device)
        scale = scale * self.card.residual_scale
        hrms = crop(condition.lms + scale * said.x0, halo)
        sigma = None
        if said.log_sigma is not None:
            sigma = crop(said.log_sigma, halo).exp() * scale * self.card.sigma_scale
        return Sharpened(hrms, sigma)

    def provenance(self) -> dict[str, str]:
        return {
            "MODEL": self.name,
            "SHA256": self.digest,
            "STEPS": str(self.steps),
            "SEED": str(self.seed),
            "PRECISION": str(self.dtype).removeprefix("torch."),
            "DEVICE": torch.device(self.device).type,
        }


def load_sharpener(
    model: str | None, method: str | None = None, **options: Any
) -> ClassicalSharpener | StudentSharpener:
    """A sharpener by name: a classical `method`, else a model (bundled name or path).

    Raises:
        CheckpointError: no such model, or its file is damaged.
        ModelMismatch: a model of the paper's form, which takes whole images only.
    """
    if method is not None:
        return ClassicalSharpener(method)
    from .checkpoint import DEFAULT_MODEL

    path = find_checkpoint(model or DEFAULT_MODEL)
    network, card = load_model(path)
    if card.architecture != "fsa-s-lite":
        raise ModelMismatch(
            f"model {card.name} is of architecture {card.architecture}, whose answer depends on "
            "how a scene is cut; sharpen with a checkpoint of fsa-s-lite"
        )
    if card.registration != "area":
        raise ModelMismatch(
            f"model {card.name} was trained with the registration {card.registration}, half a PAN "
            "pixel off the georeferenced one; sharpen with a checkpoint of registration area"
        )
    return StudentSharpener(network, card, digest=sha256(path), **options)


def sharpen_array(sharpener: Sharpener, pan: Tensor, ms: Tensor) -> Sharpened:
    """Sharpen a small scene that is in memory, in one piece.

    Args:
        sharpener: the method.
        pan: (1, H, W), H = ratio * h.
        ms: (C, h, w), any units.

    Returns:
        `Sharpened` with (C, H, W) arrays.

    Raises:
        ValueError: the PAN's size is not a whole multiple of the MS's.
    """
    (height, width), (h, w) = pan.shape[-2:], ms.shape[-2:]
    ratio = height // h
    if ratio < 1 or (h * ratio, w * ratio) != (height, width):
        raise ValueError(f"PAN of {height} x {width} is no whole multiple of MS of {h} x {w}")
    sharpener.check(len(ms), ratio)
    statistics = scene_statistics([(pan, ms)], ratio, sharpener.assumed_psf(ratio))
    margin = sharpener.margin(statistics)
    whole = sharpener.multiple // math.gcd(sharpener.multiple, ratio)
    rows, cols = (-(-n // whole) * whole for n in (h, w))
    ms = ms[:, mirrored(-margin, rows + 2 * margin, h)]
    ms = ms[:, :, mirrored(-margin, cols + 2 * margin, w)]
    pan = pan[:, mirrored(-margin * ratio, (rows + 2 * margin) * ratio, height)]
    pan = pan[:, :, mirrored(-margin * ratio, (cols + 2 * margin) * ratio, width)]
    done = sharpener.sharpen(pan[None], ms[None], statistics, [(0, 0)])
    sigma = None if done.sigma is None else done.sigma[0, :, :height, :width]
    return Sharpened(done.hrms[0, :, :height, :width], sigma)
