"""Networks as sharpeners: a window becomes a condition, the condition is denoised, the residual joins the lms."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from uknowpan.models.architectures import ARCHITECTURES, resolve
from uknowpan.models.blur import Psf, default_psf
from uknowpan.models.checkpoints import DEFAULT_MODEL, Card, find_checkpoint, load_model, read_card, sha256
from uknowpan.models.diffusion import Denoiser, NoiseSchedule, ddim_sample, position_noise
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import takes_softness
from uknowpan.models.geometry import Origins, displacement_reach, geometry_of
from uknowpan.models.registration.field import Registration
from uknowpan.models.resample import KERNELS, Array, crop, reflect
from uknowpan.models.sharpeners import CardedSharpener, Pixels, Sharpened, StudentWindows
from uknowpan.models.statistics import SceneStatistics
from uknowpan.models.types import Condition, Denoised, PatchBatch

HALO_STEPS = 2
"""Steps whose reach a student's window has around its core. A step's answer hardly depends on x_t of far pixels: beyond
two of them, more steps change nothing but the last bit (one of them: 0.003 of 255 with `generic` 3)."""


class NetworkSharpener(CardedSharpener):
    """A network with its card, and how PyTorch runs it: what all networks share.

    Besides windows of a scene, networks sharpen images of test files (`sharpen_images`).
    """

    one_pass = False
    """Whether the network diffuses nothing."""
    needs_statistics = False
    """Whether `sharpen_images` needs the scene's statistics."""
    needs_residual_std = True
    """Whether the card must hold the scale of x0, one number per band."""

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
        bands = getattr(getattr(model, "config", None), "bands", card.bands)
        super().__init__(card, bands, softness, digest, device)
        self.steps = card.steps if steps is None else steps
        self.seed, self.dtype = seed, dtype
        self.model: Any = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.multiple = int(self.model.pixel_multiple)
        self.schedule = NoiseSchedule.cosine(card.timesteps)
        strided = "strided_timesteps" in card.sampling
        self.timesteps = self.schedule.strided(self.steps) if strided else self.schedule.respace(self.steps)
        if self.needs_residual_std and len(card.residual_std) != self.bands:
            raise CheckpointError(
                f"the card of model {card.name} has residual_std of {len(card.residual_std)} "
                f"bands, but its network has {self.bands}; train it anew with `uknowpan train`"
            )

    def staged(self, images: Array) -> Pixels:
        """On a GPU, tensors in page-locked memory, which are copied while it computes."""
        return torch.from_numpy(images).pin_memory() if self.device.startswith("cuda") else images

    def sharpen_images(
        self, images: PatchBatch, statistics: SceneStatistics | None = None, offset: float = 0.0
    ) -> Sharpened:
        """Sharpen whole images of a test file; all start at the scene's origin and get the same noise.

        Args:
            images: divided by full scale, float32.
            statistics: of the images' scene, for networks with `needs_statistics`.
            offset: PAN pixels by which MS samples lie beyond the nested centres, see `upsample`.
        """
        raise NotImplementedError

    def _precision(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def _sample(self, condition: Condition, origins: Origins, halo: int) -> Denoised:
        """Denoise windows that reach `halo` PAN pixels beyond their cores; of the cores alone."""
        with self._precision():
            return self._ddim(self.model, condition, self._noise(condition, origins, halo)).shrink(halo)

    def _ddim(self, denoiser: Denoiser, condition: Condition, noise: Tensor) -> Denoised:
        """DDIM as the card declares it."""
        return ddim_sample(
            denoiser,
            noise,
            self.timesteps,
            self.schedule,
            condition,
            respaced_time_index="respaced_time_index" in self.card.sampling,
            self_conditioning=self.card.self_conditioning,
            clamped_unit=self._residual_unit if "clamped_hrms" in self.card.sampling else None,
        )

    @cached_property
    def _residual_unit(self) -> Tensor:
        """(1, C, 1, 1) the unit of x0."""
        return torch.tensor(self.card.residual_std, device=self.device).view(1, -1, 1, 1)

    def _noise(self, condition: Condition, origins: Origins, halo: int) -> Tensor:
        bands, height, width = condition.lms.shape[1:]
        return torch.stack(
            [position_noise(self.seed, r - halo, c - halo, height, width, bands, self.device) for r, c in origins]
        )

    def _run(self, condition: Condition, origins: Origins, halo: int, scale: Tensor) -> Sharpened:
        """hrms = lms + scale x0, without the halo; `scale` (1, C, 1, 1) is one unit of x0."""
        answer = self._sample(condition, origins, halo)
        hrms = crop(condition.lms, halo) + scale * answer.x0
        if answer.log_sigma is None:
            return Sharpened(hrms)
        return Sharpened(hrms, answer.log_sigma.exp() * scale * self.card.sigma_scale)

    def provenance(self) -> dict[str, str]:
        return {
            "MODEL": self.name,
            "SHA256": self.digest,
            "STEPS": str(self.steps),
            "SEED": str(self.seed),
            "PRECISION": str(self.dtype).removeprefix("torch."),
            "DEVICE": torch.device(self.device).type,
        }


class StudentSharpener(StudentWindows, NetworkSharpener):
    """The `generic` diffusion student."""

    needs_statistics = True
    needs_residual_std = False

    @property
    def halo(self) -> int:
        """PAN pixels around the core that the network sees; see `HALO_STEPS`."""
        return min(self.steps, HALO_STEPS) * int(self.model.reach)

    def floats_per_pixel(self, field: Registration | None) -> int:
        if self.device != "cpu" or (field is not None and field.own_bands):
            return 110
        return 40 if self._in_pieces else 75  # measured with tiles of 512 and 4 bands: up to 38 and 70

    @property
    def _in_pieces(self) -> bool:
        """Whether one step from zeros makes the network's last maps piece by piece."""
        return self.steps == 1 and getattr(self.model, "starts_from_zeros", False)

    @torch.inference_mode()
    def sharpen(
        self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins, offset: float = 0.0
    ) -> Sharpened:
        """Sharpen windows, see `Sharpener`; `offset` as in `upsample`."""
        if self.device == "cpu":  # NumPy's features take a third of the time of tensors' there
            pan, ms = np.asarray(pan), np.asarray(ms)
        else:
            pan, ms = (torch.as_tensor(x).to(self.device, non_blocking=True) for x in (pan, ms))
        condition = self.condition(pan, ms, statistics, origins, offset).map(torch.as_tensor)
        return self._run(condition, origins, self.halo, self.unit(statistics, condition.pan))

    def _sample(self, condition: Condition, origins: Origins, halo: int) -> Denoised:
        if not self._in_pieces:
            return super()._sample(condition, origins, halo)
        with self._precision():
            answer: Denoised = self.model.at_end(condition, halo)
        return answer

    def sharpen_images(
        self, images: PatchBatch, statistics: SceneStatistics | None = None, offset: float = 0.0
    ) -> Sharpened:
        """Sharpen whole images, mirrored at their edges as a scene is; `lms` is not used."""
        assert statistics is not None
        margin = self.margin(statistics)
        window = reflect(images.pan, margin * statistics.ratio), reflect(images.ms, margin)
        return self.sharpen(*window, statistics, [(0, 0)] * len(images), offset)

    def provenance(self) -> dict[str, str]:
        return super().provenance() | self.softness_tag()


class UNetSharpener(NetworkSharpener):
    """A student of the published form, `FSAStudent`, or another U-Net that sees PAN and lms.

    Its GroupNorm and its attention span the whole window, so a pixel's result depends somewhat on
    how the scene is cut: `local` is False, neighbouring tiles overlap and are blended.

    It was trained on PAN and MS divided by one full scale, and its residual is a fixed number of
    that: unlike the `generic` student it depends on the gain. `--max-value` and the bit depth in
    the metadata are full scales; without them `full_scale` finds one. The LMS lies on the PAN, as
    that of the training files lies on the truth, whatever their registration.
    """

    context = 8
    """MS pixels around the core, at least, that the network sees in place of its zero padding."""
    fill = 0.5
    """Share of full scale at which the high percentile of PAN and MS lies. Of ten scenes of GF2
    (1023) and one of QuickBird (2047), the larger of the two lay at 0.37 to 0.52."""
    largest_contrast = 4.0
    """Ratio of the percentiles of PAN and MS beyond which they are not the same digital numbers.
    As delivered (GF2, QuickBird, Pleiades, SPOT) it was 1.1 to 2.3."""

    def assumed_psf(self, ratio: int) -> Psf | None:
        return default_psf(ratio)

    def full_scale(self, pan: float, ms: float) -> tuple[float, float] | None:
        """One divisor for PAN and MS, such that the scene looks like the training data.

        The training data's own full scale serves a scene that fills between a quarter and all of
        it: the same sensor, whose brightness counts as in training. Any other scene is made to fill
        `fill`. PAN and MS of different digital numbers (8-bit PAN, reflectance MS) do so each for
        itself.
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
        halo = self._network_halo(statistics.ratio) // statistics.ratio
        return halo + KERNELS[self.kernel][1] + displacement_reach(statistics)

    @property
    def kernel(self) -> str:
        """Kernel of the enlarged MS: that of the training files' lms."""
        return "23 taps" if self.card.registration == "pancollection" else "keys"

    @torch.inference_mode()
    def sharpen(self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins) -> Sharpened:
        """Sharpen windows, see `Sharpener`; without sigma.

        Raises:
            ValueError: cores whose PAN pixels are no multiple of `multiple`.
        """
        ratio, margin = statistics.ratio, self.margin(statistics)
        pan, ms = torch.as_tensor(pan), torch.as_tensor(ms)
        lms = geometry_of(statistics, origins, margin, ms, kernel=self.kernel).enlarged(ms)
        condition = Condition(lms=lms, pan=pan, ms=ms)
        condition = condition.shrink(margin * ratio - self._network_halo(ratio)).to(self.device)
        return self._run(condition, origins, self._network_halo(ratio), self._residual_unit)

    @torch.inference_mode()
    def sharpen_images(
        self, images: PatchBatch, statistics: SceneStatistics | None = None, offset: float = 0.0
    ) -> Sharpened:
        """Sharpen whole images as in training: from the stored lms, with nothing around them."""
        condition = Condition(images.lms, images.pan, ms=images.ms).to(self.device)
        return self._run(condition, [(0, 0)] * len(images), 0, self._residual_unit)


class OnePassSharpener(UNetSharpener):
    """A network of the same kind that diffuses nothing: `PanCrafter`."""

    one_pass = True

    def __init__(self, model: nn.Module, card: Card, *, steps: int | None = None, **options: Any):
        if steps is not None and steps != 1:
            raise ModelMismatch(
                f"model {card.name} answers in one pass, so {steps} steps mean nothing to it; leave --steps out"
            )
        super().__init__(model, card, steps=1, **options)

    def _sample(self, condition: Condition, origins: Origins, halo: int) -> Denoised:
        with self._precision():
            answer: Denoised = self.model(None, None, condition)
        return answer.shrink(halo)

    def provenance(self) -> dict[str, str]:
        return {k: v for k, v in super().provenance().items() if k != "SEED"}


def load_scene_network(model: str | None, **options: Any) -> NetworkSharpener:
    """The sharpener of a checkpoint that serves scenes; see `uknowpan.models.sharpeners.load_sharpener`."""
    card = read_card(find_checkpoint(model or DEFAULT_MODEL))
    entry = ARCHITECTURES.get(card.architecture)
    if entry is not None and entry.unfit_for_scenes:
        raise ModelMismatch(f"model {card.name} is {entry.unfit_for_scenes}")
    return load_network(model or DEFAULT_MODEL, **options)


def load_network(model: str, *, needless: bool = False, **options: Any) -> NetworkSharpener:
    """The sharpener of any checkpoint, those included that serve images only.

    Args:
        model: bundled name or path.
        needless: leave out steps and softness where the network has no use for them.
        options: see `uknowpan.models.sharpeners.load_sharpener`.

    Raises:
        CheckpointError: no such model, or its file is damaged.
        ValueError: a number of steps that the schedule has not.
    """
    path = find_checkpoint(model)
    network, card = load_model(path)
    kind = resolve(ARCHITECTURES[card.architecture].sharpener)
    if needless:
        options["steps"] = None if kind.one_pass else options.get("steps")
        options["softness"] = options.get("softness") if takes_softness(card.config) else None
    sharpener: NetworkSharpener = kind(network, card, digest=sha256(path), **options)
    return sharpener
