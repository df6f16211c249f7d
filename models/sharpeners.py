"""From a window of a scene to its sharpened bands: the one object that inference needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from uknowpan.models.architectures import ARCHITECTURES, resolve
from uknowpan.models.blur import Psf, default_psf
from uknowpan.models.checkpoints import DEFAULT_MODEL, Card, find_checkpoint, load_model, read_card, sha256
from uknowpan.models.classical import CLASSICAL_METHODS, classical_reach
from uknowpan.models.diffusion import NoiseSchedule, ddim_sample
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import condition_reach, generic_condition, minds_softness
from uknowpan.models.noise import position_noise
from uknowpan.models.resample import UPSAMPLE_REACH, crop, degrade, degrade_reach, mirrored, upsample
from uknowpan.models.statistics import USUAL_SOFTNESS, SceneStatistics, scene_statistics
from uknowpan.models.types import Condition, Denoised

HIGH_PERCENTILE = 99.5
"""Of the absolute values; what `Sharpener.full_scale` goes by."""


AS_MS = "ms"
"""In the place of a softness: as soft, pixel for pixel, as the scene's MS is."""


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
    wants_softness: bool
    """The result goes by how soft the scene's MS is, which is to be measured."""

    def check(self, bands: int, ratio: int) -> None:
        """Raise `ModelMismatch` if this method does not serve such a scene."""

    def assumed_psf(self, ratio: int) -> Psf | None:
        """The blur that the method takes for granted; None: it wants the scene's own."""

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        """Divisors of PAN and MS where nobody knows the scene's full scale.

        Args:
            pan: `HIGH_PERCENTILE` of the PAN.
            ms: the same of the MS, all bands together.

        Returns:
            None: the percentiles themselves will do.
        """

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
    wants_softness = False

    def __init__(self, method: str):
        self.name = method
        self._method = CLASSICAL_METHODS[method]

    def check(self, bands: int, ratio: int) -> None:
        return None

    def assumed_psf(self, ratio: int) -> Psf | None:
        return default_psf(ratio)

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        return None

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


class _DiffusionSharpener:
    """What the students share: a network with its card, and how it is sampled."""

    multiple: int

    def __init__(
        self,
        model: nn.Module,
        card: Card,
        *,
        steps: int | None = None,
        seed: int = 0,
        softness: float | str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        digest: str = "",
    ):
        self.name, self.card, self.bands = card.name, card, card.bands
        self.minds_softness = minds_softness(card.config)
        if softness is not None and not self.minds_softness:
            raise ModelMismatch(f"model {card.name} was not trained to be told how soft its result is to be")
        self.softness = softness
        self.wants_softness = softness == AS_MS
        self.steps = card.steps if steps is None else steps
        self.seed, self.device, self.dtype, self.digest = seed, device, dtype, digest
        self.model = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.schedule = NoiseSchedule.cosine(card.timesteps)
        self.timesteps = self.schedule.respace(self.steps)

    def check(self, bands: int, ratio: int) -> None:
        if self.bands is not None and bands != self.bands:
            raise ModelMismatch(
                f"the MS has {bands} bands, but model {self.name} was trained for "
                f"{self.bands}; choose bands with --bidx or another model"
            )
        if ratio not in self.card.ratios:
            least, most = min(self.card.ratios), max(self.card.ratios)
            raise ModelMismatch(
                f"the PAN/MS ratio is {ratio}, but model {self.name} serves "
                f"{least if least == most else f'{least} to {most}'}; use --method or another "
                "model"
            )

    def _precision(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _sample(self, condition: Condition, origins: Sequence[tuple[int, int]], halo: int) -> Denoised:
        """Denoise windows that reach `halo` PAN pixels beyond their cores."""
        bands, height, width = condition.lms.shape[1:]
        noise = torch.stack(
            [position_noise(self.seed, r - halo, c - halo, height, width, bands, self.device) for r, c in origins]
        )
        with self._precision():
            return ddim_sample(
                self.model,
                noise,
                self.timesteps,
                self.schedule,
                condition,
                self_conditioning=self.card.self_conditioning,
            )

    def provenance(self) -> dict[str, str]:
        return {
            "MODEL": self.name,
            "SHA256": self.digest,
            "STEPS": str(self.steps),
            "SEED": str(self.seed),
            "PRECISION": str(self.dtype).removeprefix("torch."),
            "DEVICE": torch.device(self.device).type,
        }


class StudentSharpener(_DiffusionSharpener):
    """The `generic` diffusion student."""

    local = True
    has_uncertainty = True

    def __init__(self, model: nn.Module, card: Card, **options: Any):
        super().__init__(model, card, **options)
        self.multiple = int(model.pixel_multiple)  # type: ignore[arg-type]

    def assumed_psf(self, ratio: int) -> Psf | None:
        return None

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        return None

    def _network_halo(self) -> int:
        """PAN pixels around the core that the network sees."""
        return self.steps * int(self.model.reach)  # type: ignore[arg-type]

    def margin(self, statistics: SceneStatistics) -> int:
        return condition_reach(statistics) + math.ceil(self._network_halo() / statistics.ratio)

    def _softness_for(self, statistics: SceneStatistics) -> float:
        if self.softness == AS_MS:
            return statistics.softness_of_result
        return USUAL_SOFTNESS if self.softness is None else float(self.softness)

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
        halo = self._network_halo()
        outer = self.margin(statistics) * statistics.ratio
        pan, ms = (x.to(self.device, non_blocking=True) for x in (pan, ms))
        condition = generic_condition(pan, ms, statistics, softness=self._softness_for(statistics))
        condition = _shrunk(condition, outer - halo)
        said = self._sample(condition, origins, halo)
        scale = statistics.detail_std[:-1].float().view(1, -1, 1, 1).to(self.device)
        scale = scale * self.card.residual_scale
        hrms = crop(condition.lms + scale * said.x0, halo)
        sigma = None
        if said.log_sigma is not None:
            sigma = crop(said.log_sigma, halo).exp() * scale * self.card.sigma_scale
        return Sharpened(hrms, sigma)

    def provenance(self) -> dict[str, str]:
        if not self.minds_softness:
            return super().provenance()
        softness = USUAL_SOFTNESS if self.softness is None else self.softness
        return {**super().provenance(), "SOFTNESS": str(softness)}


class UNetSharpener(_DiffusionSharpener):
    """A student of the published form, `FSAStudent`, or another U-Net that sees PAN and lms.

    Its GroupNorm and its attention span the whole window, so a pixel's result depends somewhat on
    how the scene is cut: `local` is False, neighbouring tiles overlap and are blended.

    It was trained on PAN and MS divided by one full scale, and its residual is a fixed number of
    it: unlike the `generic` student it minds the gain. `--max-value` and the bit depth in the
    metadata are full scales; where there are none, `full_scale` finds one. The LMS lies on the
    PAN, as that of the training files lies on the truth, whatever their registration.
    """

    local = False
    has_uncertainty = False
    context = 8
    """MS pixels around the core, at least, that the network sees in place of its zero padding."""
    fill = 0.5
    """Where the high percentile of PAN and MS lies in full scale. Of ten scenes of GF2 (1023) and
    one of QuickBird (2047), the larger of the two lay at 0.37 to 0.52."""
    largest_contrast = 4.0
    """Of the percentiles of PAN and MS, beyond which they are not the same digital numbers. As
    delivered (GF2, QuickBird, Pleiades, SPOT) it was 1.1 to 2.3."""

    def __init__(self, model: nn.Module, card: Card, **options: Any):
        super().__init__(model, card, **options)
        self.bands = int(model.config.bands)  # type: ignore[union-attr, arg-type]
        multiple = getattr(model, "pixel_multiple", None) or model.unet.factor  # type: ignore[union-attr]
        self.multiple = int(multiple)  # type: ignore[arg-type]
        if len(card.residual_std) != self.bands:
            raise CheckpointError(
                f"the card of model {card.name} tells residual_std of {len(card.residual_std)} "
                f"bands, but its network has {self.bands}; train it anew with `uknowpan train`"
            )

    def assumed_psf(self, ratio: int) -> Psf | None:
        return default_psf(ratio)

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        """One divisor for PAN and MS, such that the scene looks like the training data.

        The training data's own full scale, if the scene fills between a quarter and all of it
        (half is usual, see `fill`): a scene of the same sensor, whose brightness then counts as
        it did in training. Else the scene is made to fill `fill` of it. PAN and MS that are not
        of the same digital numbers (8-bit PAN, reflectance MS) do so each for itself.
        """
        high, low = max(pan, ms), min(pan, ms)
        if high > self.largest_contrast * low:
            return pan / self.fill, ms / self.fill
        known = self.card.max_value
        if known is not None and known / 4 <= high <= known:
            return known, known
        return high / self.fill, high / self.fill

    def _network_halo(self, ratio: int) -> int:
        """PAN pixels around the core that the network sees: windows keep to its multiple."""
        whole = self.multiple // math.gcd(self.multiple, ratio)
        return -(-self.context // whole) * whole * ratio

    def margin(self, statistics: SceneStatistics) -> int:
        return self._network_halo(statistics.ratio) // statistics.ratio + UPSAMPLE_REACH

    @torch.inference_mode()
    def sharpen(
        self,
        pan: Tensor,
        ms: Tensor,
        statistics: SceneStatistics,
        origins: Sequence[tuple[int, int]],
    ) -> Sharpened:
        """Sharpen windows; arguments and result as in `StudentSharpener.sharpen`, without sigma.

        Raises:
            ValueError: cores whose PAN pixels are no multiple of `multiple`.
        """
        ratio = statistics.ratio
        condition = Condition(lms=upsample(ms, ratio), pan=pan, ms=ms)
        condition = _shrunk(condition, UPSAMPLE_REACH * ratio).to(self.device)
        halo = self._network_halo(ratio)
        x0 = self._sample(condition, origins, halo).x0
        std = torch.tensor(self.card.residual_std, device=self.device).view(1, -1, 1, 1)
        return Sharpened(crop(condition.lms + std * x0, halo))


class OnePassSharpener(UNetSharpener):
    """A network of the same kind that diffuses nothing: `PanCrafter`."""

    def __init__(self, model: nn.Module, card: Card, *, steps: int | None = None, **options: Any):
        if steps is not None and steps != 1:
            raise ModelMismatch(
                f"model {card.name} answers in one pass, so {steps} steps mean nothing to it; leave --steps out"
            )
        super().__init__(model, card, steps=1, **options)

    def _sample(self, condition: Condition, origins: Sequence[tuple[int, int]], halo: int) -> Denoised:
        with self._precision():
            return self.model(None, None, condition)

    def provenance(self) -> dict[str, str]:
        return {k: v for k, v in super().provenance().items() if k != "SEED"}


class ConsistentSharpener:
    """Any sharpener, whose result is then made to agree with the MS that it was made from.

    Each pass degrades the result as the scene's own blur and shift would, compares it with the
    MS and adds what is missing, interpolated (iterative back-projection, Irani and Peleg 1991).
    It is as right as the blur: on Gaussian optics it lowers ERGAS, on others it may not
    (docs/experiments.md).
    """

    def __init__(self, inner: Sharpener, passes: int):
        if passes < 1:
            raise ValueError(f"{passes} passes change nothing; take at least 1")
        self.inner, self.passes = inner, passes
        self.name, self.multiple, self.local = inner.name, inner.multiple, inner.local
        self.has_uncertainty = inner.has_uncertainty
        self.wants_softness = inner.wants_softness

    def check(self, bands: int, ratio: int) -> None:
        self.inner.check(bands, ratio)

    def assumed_psf(self, ratio: int) -> Psf | None:
        return self.inner.assumed_psf(ratio)

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        return self.inner.full_scale(pan, ms)

    def _reach(self, statistics: SceneStatistics) -> int:
        """MS pixels around it that one pass of a pixel depends on."""
        psf = statistics.psf
        return UPSAMPLE_REACH + degrade_reach(psf.sigma, psf.shift, statistics.ratio)

    def _rim(self, statistics: SceneStatistics) -> int:
        """MS pixels by which the inner sharpener's cores are larger; they keep to its multiple."""
        whole = self.multiple // math.gcd(self.multiple, statistics.ratio)
        return -(-self.passes * self._reach(statistics) // whole) * whole

    def margin(self, statistics: SceneStatistics) -> int:
        return self.inner.margin(statistics) + self._rim(statistics)

    @torch.inference_mode()
    def sharpen(
        self,
        pan: Tensor,
        ms: Tensor,
        statistics: SceneStatistics,
        origins: Sequence[tuple[int, int]],
    ) -> Sharpened:
        """Sharpen windows, see `StudentSharpener.sharpen`."""
        ratio, psf, rim = statistics.ratio, statistics.psf, self._rim(statistics)
        wide = [(row - rim * ratio, col - rim * ratio) for row, col in origins]
        done = self.inner.sharpen(pan, ms, statistics, wide)
        hrms = done.hrms
        given = crop(ms, self.inner.margin(statistics)).to(hrms)
        for _ in range(self.passes):
            missing = given - degrade(hrms, ratio, psf.sigma, psf.shift)
            hrms = hrms + upsample(missing, ratio)
        sigma = None if done.sigma is None else crop(done.sigma, rim * ratio)
        return Sharpened(crop(hrms, rim * ratio), sigma)

    def provenance(self) -> dict[str, str]:
        return {**self.inner.provenance(), "CONSISTENCY": str(self.passes)}


def _shrunk(condition: Condition, border: int) -> Condition:
    """Without `border` PAN pixels on every side."""
    height, width = condition.pan.shape[-2:]
    return condition.crop(slice(border, height - border), slice(border, width - border))


def load_sharpener(model: str | None, method: str | None = None, *, consistency: int = 0, **options: Any) -> Sharpener:
    """A sharpener by name: a classical `method`, else a model (bundled name or path).

    Args:
        model: of a student; None: the bundled one.
        method: one of `CLASSICAL_METHODS` instead.
        consistency: passes of `ConsistentSharpener` at the end.
        options: of a student: steps, seed, device, dtype, and softness of the result (sigma in
            PAN pixels, or `AS_MS`) for those that were trained to be told one.

    Raises:
        CheckpointError: no such model, or its file is damaged.
        ModelMismatch: the model is no student.
    """
    sharpener = _load(model, options) if method is None else ClassicalSharpener(method)
    return ConsistentSharpener(sharpener, consistency) if consistency else sharpener


def _load(model: str | None, options: dict[str, Any]) -> StudentSharpener | UNetSharpener:
    path = find_checkpoint(model or DEFAULT_MODEL)
    card = read_card(path)
    entry = ARCHITECTURES.get(card.architecture)
    if entry is not None and entry.unfit_for_scenes:
        raise ModelMismatch(f"model {card.name} is {entry.unfit_for_scenes}")
    network, card = load_model(path)
    entry = ARCHITECTURES[card.architecture]
    sharpener: StudentSharpener | UNetSharpener = resolve(entry.sharpener)(
        network, card, digest=sha256(path), **options
    )
    return sharpener


def sharpen_array(sharpener: Sharpener, pan: Tensor, ms: Tensor, *, max_value: float | None = None) -> Sharpened:
    """Sharpen a small scene that is in memory, in one piece.

    Args:
        sharpener: the method.
        pan: (1, H, W), H = ratio * h.
        ms: (C, h, w), any units.
        max_value: full scale of both, if it is known; a method that needs one guesses it.

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
    scale = sharpener.full_scale(_high(pan), _high(ms)) or (1.0, 1.0)
    if max_value is not None:
        scale = (max_value, max_value)
    pan, ms = pan / scale[0], ms / scale[1]
    assumed, soft = sharpener.assumed_psf(ratio), sharpener.wants_softness
    statistics = scene_statistics([(pan, ms)], ratio, assumed, soft=soft)
    margin = sharpener.margin(statistics)
    whole = sharpener.multiple // math.gcd(sharpener.multiple, ratio)
    rows, cols = (-(-n // whole) * whole for n in (h, w))
    ms = ms[:, mirrored(-margin, rows + 2 * margin, h)]
    ms = ms[:, :, mirrored(-margin, cols + 2 * margin, w)]
    pan = pan[:, mirrored(-margin * ratio, (rows + 2 * margin) * ratio, height)]
    pan = pan[:, :, mirrored(-margin * ratio, (cols + 2 * margin) * ratio, width)]
    done = sharpener.sharpen(pan[None], ms[None], statistics, [(0, 0)])
    sigma = None if done.sigma is None else done.sigma[0, :, :height, :width] * scale[1]
    return Sharpened(done.hrms[0, :, :height, :width] * scale[1], sigma)


def _high(x: Tensor) -> float:
    return float(np.percentile(x.abs().cpu().numpy(), HIGH_PERCENTILE)) or 1.0
