"""Training SSDiff: L1 on the residual at random timesteps, and L-BAF, fine-tuning by branches.

METHODS section 3.1. L-BAF is in the paper, not in its release. The two streams are fine-tuned in
turns, each by low-rank additions to its weights (LoRA, Hu et al. 2021); all other weights are
frozen. The additions are merged into the checkpoint, whose architecture stays plain `ssdiff`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from uknowpan.models.errors import ModelMismatch
from uknowpan.models.published.ssdiff.network import SSDiff, SSDiffConfig
from uknowpan.models.published.stages import DiffusionOptions, DiffusionStage
from uknowpan.models.training.bounds import check_bounds, count
from uknowpan.models.training.parallel import World, current_world
from uknowpan.models.training.stages import channels_last
from uknowpan.models.types import Bundle, Condition, Denoised, PatchBatch

BRANCHES = ("spectral", "spatial")
"""The branches, in the order in which L-BAF takes turns."""


@dataclass(frozen=True)
class SSDiffOptions(DiffusionOptions):
    """Options of the stage `ssdiff`."""

    self_conditioning: bool = False
    """Has no effect: the network has no slot for it."""
    clamped_hrms: bool = False
    """Simulate the release, which clamps lms + x0 to [0, 1] at each sampling step and goes on from
    that instead of the residual (S3). By default nothing is clamped, in validation as
    in `sharpen`, where the range of a scene's values is unknown."""
    flips: bool = False
    """Flip patches at random, see `PatchSampler`."""
    lbaf_rank: int = 0
    """Rank of L-BAF's additions; 0: all weights are trained. Begin such a run with --init."""
    lbaf_period: int = count(100)
    """Steps of a branch's turn."""

    def __post_init__(self) -> None:
        check_bounds(self)


class LowRank(nn.Module):
    """An addition B A to a weight; B starts at zero."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        wide, inner = weight.flatten(1).shape
        rank = min(rank, wide, inner)
        self.first = nn.Parameter(torch.randn(rank, inner) / math.sqrt(inner))
        self.second = nn.Parameter(torch.zeros(wide, rank))

    def forward(self, learns: bool) -> Tensor:
        """(out, in * k * k)."""
        first, second = self.first, self.second
        return second @ first if learns else second.detach() @ first.detach()


class LowRankBranches(nn.Module):
    """A frozen `SSDiff` with low-rank additions to the layers of its two branches.

    A weight W, convolutions' as a matrix (out, in * k * k), counts as W + B A with B (out, r) and
    A (r, in * k * k). B starts at zero: the network begins as it was. Shared layers (Down,
    Up, timesteps, the skip), norms and biases stay as they are.
    """

    def __init__(self, base: SSDiff, rank: int, world: World | None = None):
        super().__init__()
        self.base = base.requires_grad_(False)
        names = {id(module): f"{name}.weight" for name, module in base.named_modules()}
        layers = zip(BRANCHES, (base.spectral_layers(), base.spatial_layers()), strict=True)
        self.places = [(branch, names[id(layer)]) for branch, own in layers for layer in own]
        """(branch, name of the weight) of each addition."""
        self.additions = nn.ModuleList(LowRank(base.get_parameter(name), rank) for _, name in self.places)
        world = world or current_world()
        if world.size > 1:
            # DistributedDataParallel would want every parameter to take part in every step.
            for parameter in self.additions.parameters():
                parameter.register_hook(world.mean)

    def train(self, mode: bool = True) -> LowRankBranches:
        """The frozen network keeps its running statistics, if it has any."""
        super().train(mode)
        self.base.eval()
        return self

    def weights(self, branch: str | None = None) -> dict[str, Tensor]:
        """The base's weights with their additions, by name; only those of `branch` get gradients."""
        made = {}
        for (own, name), addition in zip(self.places, self.additions, strict=True):
            weight = self.base.get_parameter(name)
            with torch.autocast(weight.device.type, enabled=False):  # as it will be merged
                made[name] = weight + addition(own == branch).view_as(weight)
        return made

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, branch: str | None = None) -> Denoised:
        """`SSDiff.forward` with the additions; `branch` gets gradients."""
        return functional_call(self.base, self.weights(branch), (x_t, t, condition))

    @torch.no_grad()
    def merged(self) -> SSDiff:
        """An equal plain network: the base itself while all additions are zero."""
        if not any(bool(addition(False).any()) for addition in self.additions):
            return self.base
        plain = copy.deepcopy(self.base)
        plain.load_state_dict(self.weights(), strict=False)
        return plain


@dataclass(frozen=True)
class TurnBatch(Bundle):
    """Patches, and the branch whose turn it is; None trains all."""

    patches: PatchBatch
    branch: str | None = field(default=None, metadata={"fixed": True})


class SSDiffStage(DiffusionStage):
    """Stage `ssdiff`."""

    name = "ssdiff"
    network: SSDiffConfig
    options: SSDiffOptions

    def build(self) -> nn.Module:
        base = SSDiff(self.network)
        rank = self.options.lbaf_rank
        return channels_last(LowRankBranches(base, rank) if rank else base)

    def deployed(self, model: nn.Module) -> nn.Module:
        # At the beginning that is the base itself, which --init writes to.
        return model.merged() if isinstance(model, LowRankBranches) else model

    def batches(self, start: int, stop: int) -> Generator[TurnBatch]:
        for step, patches in enumerate(super().batches(start, stop), start):
            branch = BRANCHES[step // self.options.lbaf_period % len(BRANCHES)]
            yield TurnBatch(patches, branch if self.options.lbaf_rank else None)

    def view(self, patches: PatchBatch) -> tuple[Condition, Tensor]:
        return Condition(patches.lms, patches.pan, ms=patches.ms), self.scale(patches.lms)

    def losses(self, model: nn.Module, batch: TurnBatch, generator: torch.Generator) -> dict[str, Tensor]:
        condition, x0, _ = self.target(batch.patches)
        denoiser: Any = model
        if batch.branch is not None:
            alone: Any = model.module if isinstance(model, DistributedDataParallel) else model
            # The last layer of an untrained network is zero.
            if not bool(getattr(alone, "_orig_mod", alone).base.head[-1].weight.any()):
                raise ModelMismatch(
                    "lbaf_rank fine-tunes a trained network; give its checkpoint with --init, or set lbaf_rank to 0"
                )

            def denoiser(x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
                return alone(x_t, t, condition, batch.branch)

        output = self.denoise(denoiser, x0, condition, generator)
        return {"l1": (output.x0 - x0).abs().mean()}
