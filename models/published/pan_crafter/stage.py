"""Training PAN-Crafter: modality-adaptive reconstruction (MARs) on PanCollection files."""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.errors import ModelMismatch
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.published.pan_crafter.network import MS_MODE, PAN_MODE, PanCrafter, PanCrafterConfig, low_pan
from uknowpan.models.published.stages import STATISTICS_SAMPLES, PatchData, ResidualStage, spread
from uknowpan.models.training.parallel import World
from uknowpan.models.training.stages import channels_last
from uknowpan.models.types import Condition, PatchBatch


@dataclass(frozen=True)
class PanCrafterOptions:
    """Options of the model `pan-crafter`."""

    pan_weight: float = 1.0
    """Weight of restoring the PAN from the degraded PAN (lambda of MARs); 0: the MS alone, at half
    the cost of a step."""
    raw_residual: bool = False
    """Simulate the release, which learns gt - lms as it is. By default it is divided, band by band, by its standard
    deviation in the training data, and the PAN's by its own. So bands of little contrast count as much as others."""
    flips: bool = True
    """Flip patches at random, see `PatchSampler`."""
    released_crops: bool = False
    """Simulate the release, which crops patches to 75 to 100 % of a side, enlarges them again by bicubic interpolation,
    flips both axes always, and turns by quarters. The MS then is less blurred than the sensor's."""


class PanCrafterStage(ResidualStage):
    """Model `pan-crafter`: mean|x0 - x0_MS| + pan_weight mean|x0_PAN - x0_PAN'|, one pass each."""

    name = "pan-crafter"
    network: PanCrafterConfig
    options: PanCrafterOptions

    def __init__(self, network: PanCrafterConfig, data: PatchData, options: PanCrafterOptions):
        super().__init__(network, data, options)
        if network.bicubic_base and not options.raw_residual:
            raise ModelMismatch(
                "bicubic_base adds to the MS in units of full scale; set raw_residual = true in [options]"
            )
        self.pan_std = 1.0 if options.raw_residual else _pan_std_of(data.dataset, network.ratio)
        """Standard deviation of PAN less degraded PAN."""

    def build(self) -> nn.Module:
        return channels_last(PanCrafter(self.network))

    def losses(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> dict[str, Tensor]:
        if self.options.released_crops:
            batch = released_crops(batch, generator, self.world)
        assert batch.gt is not None
        weight, count = self.options.pan_weight, len(batch)
        target = (batch.gt - batch.lms) / self.scale(batch.lms)
        condition = Condition(batch.lms, batch.pan, ms=batch.ms)
        mode = torch.full((count,), MS_MODE, device=batch.lms.device)
        if not weight:
            output = model(None, None, condition, mode)
            return {"ms": (output.x0 - target).abs().mean()}
        # Both modes in one batch, as published.
        mode = torch.cat([mode, torch.full_like(mode, PAN_MODE)])
        output = model(None, None, Condition.cat([condition, condition]), mode)
        with torch.autocast(batch.pan.device.type, enabled=False):
            pan_target = (batch.pan - low_pan(batch.pan, self.network.ratio)) / self.pan_std
        return {
            "ms": (output.x0[:count] - target).abs().mean(),
            "pan": weight * (output.x0[count:] - pan_target).abs().mean(),
        }

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        output = model(None, None, Condition(patches.lms, patches.pan, ms=patches.ms))
        return patches.lms + self.scale(patches.lms) * output.x0, None


def released_crops(batch: PatchBatch, generator: torch.Generator, world: World) -> PatchBatch:
    """The patches cropped, enlarged, flipped and turned, see `PanCrafterOptions.released_crops`; H must be W."""
    side = batch.ms.shape[-1]
    drawn = world.own(torch.rand((len(batch) * world.size, 4), generator=generator)).tolist()
    parts = []
    for i, (share, *place, turn) in enumerate(drawn):
        kept = round(side * (0.75 + 0.25 * share))
        top, left = (int(part * (side - kept + 1)) for part in place)
        changed = partial(_crop, index=i, corner=(top, left), kept=kept, side=side, turns=int(4 * turn))
        parts.append(replace(batch, origin=None).map(changed))
    return PatchBatch.cat(parts)


def _crop(x: Tensor, *, index: int, corner: tuple[int, int], kept: int, side: int, turns: int) -> Tensor:
    """One image of (B, C, H, W), `kept` of its `side` MS pixels enlarged to all of it; (1, C, H, W)."""
    step = x.shape[-1] // side
    rows, cols = (slice(first * step, (first + kept) * step) for first in corner)
    part = F.interpolate(x[index : index + 1, :, rows, cols], x.shape[-2:], mode="bicubic", align_corners=False)
    return part.flip(-2, -1).rot90(turns, (-2, -1))


def _pan_std_of(dataset: PanCollectionDataset, ratio: int) -> float:
    """Root mean square of PAN less degraded PAN, over patches spread evenly; 1 where that is 0."""
    details = [
        (pan - low_pan(pan, ratio)).double().square().mean()
        for pan in (dataset[i].pan for i in spread(len(dataset), STATISTICS_SAMPLES))
    ]
    return float(torch.stack(details).mean().sqrt()) or 1.0
