"""Operations and memory of a published network in training, counted on one patch of random numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from uknowpan.models.checkpoints import network_of
from uknowpan.models.published.pan_crafter.network import PanCrafterConfig
from uknowpan.models.published.uknow.distillation import feature_shapes
from uknowpan.models.published.uknow.prior import PriorConfig
from uknowpan.models.published.uknow.teacher import TeacherConfig
from uknowpan.models.types import Condition

PATCH = 64
"""PAN pixels along a side of PanCollection's training patches."""


@dataclass(frozen=True)
class Cost:
    """Counts of a network, per patch of 64 x 64."""

    forward_flops: float
    """Floating-point operations of one evaluation; Fourier transforms are not counted."""
    training_flops: float
    """Those of a patch in a step: forward, backward, and the extra passes of the stage."""
    activation_bytes: float
    """float32 numbers that the backward pass keeps."""
    state_bytes: float
    """Weights, their average, gradients and the two moments of AdamW."""


def cost_of(network: Any, options: Any) -> Cost | None:
    """The counts of a network and its stage's options; None for the lite student, which sees features of a scene."""
    bands = getattr(network, "bands", None)
    if bands is None:
        return None
    model = network_of(network).train()
    kept = 0

    def keep(x: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if isinstance(x, torch.nn.Parameter) else x.numel() * 4
        return x

    lms, pan, ms = (torch.rand(1, c, PATCH // r, PATCH // r) for c, r in ((bands, 1), (1, 1), (bands, 4)))
    given: tuple[Any, ...] = (torch.randn_like(lms), torch.zeros(1, dtype=torch.int64), Condition(lms, pan, ms=ms))
    if isinstance(network, PriorConfig):
        given = (lms, pan)
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(*given)  # the counter does not know the fused attention
    with saved_tensors_hooks(keep, lambda x: x):
        model(*given)
    forward = counter.get_total_flops()
    # Both modes of PAN-Crafter, and the pass without gradients of self-conditioning for half of the batches.
    doubled = 2 if isinstance(network, PanCrafterConfig) and options.pan_weight else 1
    carried = getattr(getattr(network, "teacher", network), "self_conditioning", False)
    weights = sum(p.numel() for p in model.parameters())
    passes = doubled * (3 + (0.5 if carried else 0))
    return Cost(forward, passes * forward, float(doubled * kept), 20.0 * weights)


def cache_bytes(teacher: TeacherConfig) -> int:
    """Bytes of a patch's answers in a cache: image and variance in float32, features in float16."""
    features = sum(c * h * w for c, h, w in feature_shapes(teacher, PATCH, PATCH))
    return 2 * features + 2 * 4 * teacher.bands * PATCH**2
