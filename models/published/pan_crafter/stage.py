"""Training PAN-Crafter: modality-adaptive reconstruction (MARs) on PanCollection files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uknowpan.models.errors import ModelMismatch
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PatchBatch
from uknowpan.models.published.pan_crafter.network import MS_MODE, PAN_MODE, PanCrafter, PanCrafterConfig, low_pan
from uknowpan.models.published.stages import (
    STATISTICS_SAMPLES,
    PatchData,
    PatchStage,
    channels_last,
    residual_std_of,
    spread,
)
from uknowpan.models.types import Condition


@dataclass(frozen=True)
class PanCrafterOptions:
    """Of the model `pan-crafter`."""

    pan_weight: float = 1.0
    """Of bringing back the PAN from the degraded PAN (lambda of MARs); 0: the MS alone, at half
    the cost of a step."""
    raw_residual: bool = False
    """Simulate the release, which learns gt - lms as it is. By default it is divided, band by band,
    by its standard deviation in the training data, and the PAN's by its own: bands of little
    contrast count as much as others."""
    flips: bool = True
    """Turn patches over at random, see `PatchSampler`. The release turns all of them, and rotates
    and rescales at random."""


class PanCrafterStage(PatchStage):
    """Model `pan-crafter`: mean|x0 - x0_MS| + pan_weight mean|x0_PAN - x0_PAN'|, one pass each."""

    name = architecture = "pan-crafter"
    network: PanCrafterConfig
    options: PanCrafterOptions

    def __init__(self, network: PanCrafterConfig, data: PatchData, options: PanCrafterOptions):
        super().__init__(network, data, options)
        ratio = data.dataset.files[0].header.ratio
        if ratio != network.ratio:
            raise ModelMismatch(
                f"the network takes the ratio {network.ratio}, that of the files is {ratio}; set "
                f"ratio = {ratio} in [network]"
            )
        raw = options.raw_residual
        self.residual_std = torch.ones(data.bands) if raw else residual_std_of(data.dataset)
        self.pan_std = 1.0 if raw else _pan_std_of(data.dataset, ratio)
        """Of PAN less degraded PAN."""

    @property
    def factor(self) -> int:
        return self.network.factor

    def build(self) -> nn.Module:
        return channels_last(PanCrafter(self.network))

    def _scale(self, like: Tensor) -> Tensor:
        return self.residual_std.to(like).view(1, -1, 1, 1)

    def losses(self, model: nn.Module, batch: PatchBatch, generator: torch.Generator) -> dict[str, Tensor]:
        assert batch.gt is not None
        weight, count = self.options.pan_weight, len(batch)
        target = (batch.gt - batch.lms) / self._scale(batch.lms)
        condition = Condition(batch.lms, batch.pan)
        mode = torch.full((count,), MS_MODE, device=batch.lms.device)
        if not weight:
            said = model(None, None, condition, mode)
            return {"ms": (said.x0 - target).abs().mean()}
        # Both modes in one batch, as published.
        mode = torch.cat([mode, torch.full_like(mode, PAN_MODE)])
        said = model(None, None, Condition.stack([condition, condition]), mode)
        with torch.autocast(batch.pan.device.type, enabled=False):
            pan_target = (batch.pan - low_pan(batch.pan, self.network.ratio)) / self.pan_std
        return {
            "ms": (said.x0[:count] - target).abs().mean(),
            "pan": weight * (said.x0[count:] - pan_target).abs().mean(),
        }

    def predict(self, model: nn.Module, patches: PatchBatch, place: int) -> tuple[Tensor, Tensor | None]:
        said = model(None, None, Condition(patches.lms, patches.pan))
        return patches.lms + self._scale(patches.lms) * said.x0, None

    def _card_fields(self) -> dict[str, Any]:
        return {"residual_std": [round(v, 9) for v in self.residual_std.tolist()], "steps": 1}


def _pan_std_of(dataset: PanCollectionDataset, ratio: int) -> float:
    """Root mean square of PAN less degraded PAN, over patches spread evenly."""
    details = [
        (pan - low_pan(pan, ratio)).double().square().mean()
        for pan in (dataset[i].pan for i in spread(len(dataset), STATISTICS_SAMPLES))
    ]
    # A PAN without details has none to bring back: any scale will do.
    return float(torch.stack(details).mean().sqrt()) or 1.0
