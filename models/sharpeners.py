"""From a window of a scene to its sharpened bands: the one object that inference needs.

Networks are run by `uknowpan.models.denoising`; PyTorch is imported only for them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from uknowpan.models.blur import Psf, default_psf
from uknowpan.models.checkpoints import DEFAULT_MODEL, Card
from uknowpan.models.classical import CLASSICAL_METHODS, classical_reach
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.features import condition_reach, generic_condition, takes_softness
from uknowpan.models.geometry import Origins, displacement_reach, geometry_of
from uknowpan.models.registration.field import Registration
from uknowpan.models.resample import UPSAMPLE_REACH, Array, Image, crop, degrade_reach, like, reflect
from uknowpan.models.statistics import USUAL_SOFTNESS, SceneStatistics, scene_statistics
from uknowpan.models.types import Condition

HIGH_PERCENTILE = 99.5
"""Percentile of the absolute values that `Sharpener.full_scale` takes."""

AS_MS = "ms"
"""Softness of a result that is as soft, pixel for pixel, as the scene's MS."""

Pixels = Any
"""float32 pixels: an array, or a tensor where a network takes or gives one."""


@dataclass(frozen=True)
class Sharpened:
    """The core of a window, in the units that came in."""

    hrms: Pixels
    """(B, C, H, W)."""
    sigma: Pixels | None = None
    """(B, C, H, W) 1-sigma of hrms, where the method has one."""


class Sharpener(Protocol):
    """A way to sharpen windows of a scene."""

    name: str
    device: str
    """Device that computes and holds the results."""
    multiple: int
    """Cores start and end at multiples of this number of PAN pixels in the scene's frame."""
    local: bool
    """True: a pixel's result depends on nothing beyond `margin`; tiles need no blending."""
    has_uncertainty: bool
    sigmas_90: float | None
    """Multiple of 1-sigma that holds 90 % of the errors; None: unknown."""
    wants_softness: bool
    """The result follows the softness of the scene's MS, which must be measured."""

    def floats_per_pixel(self, field: Registration | None) -> int:
        """Memory that `sharpen` takes with a displacement: float32 values per band and PAN pixel of a window."""

    def check(self, bands: int, ratio: int) -> None:
        """Raise `ModelMismatch` if this method does not serve such a scene."""

    def assumed_psf(self, ratio: int) -> Psf | None:
        """The blur that the method takes for granted; None: the method wants the scene's own."""

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        """Divisors of PAN and MS where the scene's full scale is unknown.

        Args:
            pan: `HIGH_PERCENTILE` of the PAN.
            ms: the same of the MS, all bands together.

        Returns:
            None: the percentiles themselves will do.
        """

    def margin(self, statistics: SceneStatistics) -> int:
        """MS pixels around a core that a window includes."""

    def staged(self, images: Array) -> Pixels:
        """Images as `sharpen` takes them, ready for their way to the device; called in another thread."""

    def sharpen(self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins) -> Sharpened:
        """Sharpen windows.

        Args:
            pan: (B, 1, H, W) with `margin` MS pixels on every side of the cores.
            ms: (B, C, h, w).
            statistics: of the scene, in the same units.
            origins: place of each core.

        Returns:
            The cores.
        """

    def provenance(self) -> dict[str, str]:
        """Tags of an output that name the method."""


class ClassicalSharpener:
    """One of `CLASSICAL_METHODS`; those with an intensity take proportions of the bands in it."""

    device = "cpu"
    multiple = 1
    local = True
    has_uncertainty = False
    sigmas_90 = None
    wants_softness = False

    def __init__(self, method: str, weights: Sequence[float] | None = None):
        self.name = method
        self._method = CLASSICAL_METHODS[method]
        self._weights = None if weights is None else np.array(weights)

    def floats_per_pixel(self, field: Registration | None) -> int:
        if field is None:
            return 5  # measured with 4 bands: up to 4, 18 with a displacement, 62 with one for each band
        return 64 if field.own_bands else 20

    def check(self, bands: int, ratio: int) -> None:
        if self._weights is not None and len(self._weights) != bands:
            raise ModelMismatch(f"--weights has {len(self._weights)} weights for {bands} bands; give one for each.")

    def assumed_psf(self, ratio: int) -> Psf | None:
        return default_psf(ratio)

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        return None

    def margin(self, statistics: SceneStatistics) -> int:
        return classical_reach(statistics)

    def staged(self, images: Array) -> Pixels:
        return images

    def sharpen(self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins) -> Sharpened:
        margin = self.margin(statistics)
        pan, ms = (np.asarray(x) for x in (pan, ms))
        statistics = replace(statistics, weights=self._weights)
        hrms = self._method(pan, ms, statistics, geometry_of(statistics, origins, margin, ms))
        return Sharpened(crop(hrms, margin * statistics.ratio))

    def provenance(self) -> dict[str, str]:
        weights = {} if self._weights is None else {"WEIGHTS": " ".join(f"{w:g}" for w in self._weights)}
        return {"METHOD": self.name} | weights


class CardedSharpener:
    """A model with its card: what all of them share, whatever runs them."""

    local = False
    has_uncertainty = False

    def __init__(self, card: Card, bands: int | None, softness: float | str | None, digest: str, device: str = "cpu"):
        self.name, self.card, self.bands, self.digest, self.device = card.name, card, bands, digest, device
        self.sigmas_90, self.takes_softness = card.sigmas_90, takes_softness(card.config)
        if softness is not None and not self.takes_softness:
            raise ModelMismatch(f"model {card.name} was not trained with the softness of its result as an input")
        self.softness = softness
        self.wants_softness = softness == AS_MS

    def floats_per_pixel(self, field: Registration | None) -> int:
        return 110

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
                f"{least if least == most else f'{least} to {most}'}; use --method or another model"
            )


class StudentWindows(CardedSharpener):
    """The windows of a `generic` student, which sees a scene's features."""

    local = True
    has_uncertainty = True

    @property
    def halo(self) -> int:
        """PAN pixels around the core that the network sees."""
        raise NotImplementedError

    def assumed_psf(self, ratio: int) -> Psf | None:
        return None

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        return None

    def margin(self, statistics: SceneStatistics) -> int:
        return condition_reach(statistics) + math.ceil(self.halo / statistics.ratio)

    def condition(
        self, pan: Any, ms: Any, statistics: SceneStatistics, origins: Origins, offset: float = 0.0
    ) -> Condition:
        """The features of windows, arrays or tensors as these are, with the halo around the cores."""
        margin = self.margin(statistics)
        border = margin * statistics.ratio - self.halo
        softness = USUAL_SOFTNESS if self.softness is None else self.softness
        if softness == AS_MS:
            softness = statistics.softness_of_result
        geometry = geometry_of(statistics, origins, margin, ms, border, offset)
        condition = generic_condition(pan, ms, statistics, offset, softness=float(softness), geometry=geometry)
        return condition.shrink(border - geometry.left_out)

    def unit(self, statistics: SceneStatistics, pixels: Any) -> Any:
        """(1, C, 1, 1) the unit of x0, of the kind of `pixels`."""
        return like(statistics.detail_std[:-1], pixels).reshape(1, -1, 1, 1) * self.card.residual_scale

    def softness_tag(self) -> dict[str, str]:
        """The tag of an output that names its softness."""
        softness = USUAL_SOFTNESS if self.softness is None else self.softness
        return {"SOFTNESS": str(softness)} if self.takes_softness else {}


class ConsistentSharpener:
    """Any sharpener, whose result is then made to agree with the MS.

    Each pass degrades the result as the scene's own blur and shift would, and compares it with the
    MS. The difference is interpolated and added (iterative back-projection, Irani and Peleg 1991).
    The result is as right as the blur: on Gaussian optics ERGAS falls, on others it may not.
    """

    def __init__(self, inner: Sharpener, passes: int):
        if passes < 1:
            raise ValueError(f"{passes} passes change nothing; take at least 1")
        self.inner, self.passes = inner, passes
        self.name, self.device, self.multiple, self.local = inner.name, inner.device, inner.multiple, inner.local
        self.floats_per_pixel = inner.floats_per_pixel
        self.has_uncertainty, self.sigmas_90 = inner.has_uncertainty, inner.sigmas_90
        self.wants_softness = inner.wants_softness
        self.check, self.assumed_psf, self.full_scale = inner.check, inner.assumed_psf, inner.full_scale
        self.staged = inner.staged

    def _rim(self, statistics: SceneStatistics) -> int:
        """MS pixels by which the inner sharpener's cores are larger; they keep to its multiple."""
        psf, ratio = statistics.psf, statistics.ratio
        blur = degrade_reach(psf.sigma, psf.shift, ratio)
        reach = UPSAMPLE_REACH + blur + displacement_reach(statistics)  # of a pixel in one pass
        whole = self.multiple // math.gcd(self.multiple, ratio)
        return -(-self.passes * reach // whole) * whole

    def margin(self, statistics: SceneStatistics) -> int:
        return self.inner.margin(statistics) + self._rim(statistics)

    def sharpen(self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins) -> Sharpened:
        """Sharpen windows, see `Sharpener`."""
        ratio, rim = statistics.ratio, self._rim(statistics)
        wide = [(row - rim * ratio, col - rim * ratio) for row, col in origins]
        done = self.inner.sharpen(pan, ms, statistics, wide)
        hrms = done.hrms
        given = like(crop(ms, self.inner.margin(statistics)), hrms)
        geometry = geometry_of(statistics, origins, rim, given)
        for _ in range(self.passes):
            hrms = hrms + geometry.enlarged(given - geometry.degraded(hrms))
        sigma = None if done.sigma is None else crop(done.sigma, rim * ratio)
        return Sharpened(crop(hrms, rim * ratio), sigma)

    def provenance(self) -> dict[str, str]:
        return {**self.inner.provenance(), "CONSISTENCY": str(self.passes)}


def load_sharpener(
    model: str | None,
    method: str | None = None,
    *,
    weights: Sequence[float] | None = None,
    consistency: int = 0,
    engine: str = "torch",
    **options: Any,
) -> Sharpener:
    """A sharpener by name: a classical `method`, else a model (bundled name or path).

    Args:
        model: bundled name or path; None: the bundled one.
        method: one of `CLASSICAL_METHODS` instead.
        weights: of the bands, for a method with an intensity.
        consistency: passes of `ConsistentSharpener` at the end.
        engine: "torch", or "onnx" for the student of two streams on a CPU.
        options: of a network: steps, seed, device, dtype (ONNX: steps, threads), and softness of the result (sigma in
            PAN pixels, or "ms": as soft as the MS) for those that were trained with one.

    Raises:
        CheckpointError: no such model, or its file is damaged.
        ModelMismatch: the model serves no scenes.
        ValueError: a number of steps that the schedule has not.
    """
    sharpener: Any
    if method is not None:
        sharpener = ClassicalSharpener(method, weights)
    elif engine == "onnx":
        from uknowpan.models.onnx.sharpener import load_student

        sharpener = load_student(model or DEFAULT_MODEL, **options)
    else:
        from uknowpan.models.denoising import load_scene_network

        sharpener = load_scene_network(model, **options)
    return ConsistentSharpener(sharpener, consistency) if consistency else sharpener


def sharpen_array(sharpener: Sharpener, pan: Image, ms: Image, *, max_value: float | None = None) -> Sharpened:
    """Sharpen a small scene that is in memory, in one piece.

    Args:
        sharpener: the method.
        pan: (1, H, W), H = ratio * h.
        ms: (C, h, w), any units.
        max_value: full scale of both, if it is known; a method that needs one guesses it.

    Returns:
        `Sharpened` with (C, H, W) pixels: tensors of a network, else of the kind of the PAN.

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
    ms = reflect(ms, margin, rows, cols)
    pan = reflect(pan, margin * ratio, rows * ratio, cols * ratio)
    done = sharpener.sharpen(pan[None], ms[None], statistics, [(0, 0)])
    hrms = like(done.hrms, pan) if isinstance(done.hrms, np.ndarray) else done.hrms
    sigma = None if done.sigma is None else done.sigma[0, :, :height, :width] * scale[1]
    return Sharpened(hrms[0, :, :height, :width] * scale[1], sigma)


def _high(x: Any) -> float:
    return float(np.percentile(np.abs(np.asarray(x)), HIGH_PERCENTILE)) or 1.0
