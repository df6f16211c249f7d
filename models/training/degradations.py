"""Wald's protocol with random blur, sampling phase and noise.

A truth ``gt`` and a PAN on the same grid become a reduced-resolution pair. The MS is the truth,
blurred, sampled with an offset and noisy. The degradation is drawn anew for every variant of a
scene, so that a network cannot rely on one sensor's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from uknowpan.models.blur import Psf, gain_to_sigma
from uknowpan.models.resample import (
    Kernel,
    box,
    crop,
    cubic,
    decimate,
    degrade,
    degrade_reach,
    gaussian,
    lanczos,
    tent,
)

SHARP_STEP, SHARP_GAIN = 2, 0.2
"""MS pixels per pixel of a truth as sharp as its PAN, and the gain of both at the Nyquist frequency of that grid."""
SOFTEST = 0.94
"""Blur of an MS in its own pixels from which on `estimate_psf` is near its bound, so that the true blur is unknown."""
LEAST_SHARP = 16
"""Least side of such a truth."""


@dataclass(frozen=True)
class Degradation:
    """The blur, sampling and noise that make a low-resolution MS of a truth."""

    ratio: int
    kind: str
    """"gaussian", "box", "cubic" (antialiased), "cubic-sharp" (not antialiased); "tent" and
    "lanczos" (antialiased) never occur in training, so that benchmarks can test on unseen blurs."""
    gains: tuple[float, ...] = ()
    """MTF gain at the MS Nyquist frequency per band ("gaussian" only)."""
    shift: tuple[float, float] = (0.0, 0.0)
    """(dy, dx) of the sampling positions in pixels of the truth."""
    noise: float = 0.0
    """Standard deviation of the MS noise, as a share of the band's detail contrast."""


def _kernel(degradation: Degradation, band: int) -> tuple[Kernel, int]:
    """(profile, reach in MS pixels)."""
    ratio, kind = degradation.ratio, degradation.kind
    offset = max(map(abs, degradation.shift)) / ratio
    if kind == "gaussian":
        sigma = gain_to_sigma(degradation.gains[band], ratio)
        return gaussian(sigma), math.ceil(3.5 * sigma / ratio + offset + 0.5)
    if kind == "cubic-sharp":
        return cubic(1.0), math.ceil(1.5 + offset)
    others = {"box": (box, 1.0), "cubic": (cubic, 2.5), "tent": (tent, 1.5), "lanczos": (lanczos, 3.5)}
    if kind not in others:
        raise ValueError(f"no degradation is called {kind!r}")
    kernel, reach = others[kind]
    return kernel(ratio), math.ceil(reach + offset)


def degrade_truth(gt: Tensor, degradation: Degradation, generator: torch.Generator | None = None) -> Tensor:
    """The low-resolution MS (C, H / ratio, W / ratio) of a truth (C, H, W); without a generator no noise is added."""
    bands = []
    for index, band in enumerate(gt):
        kernel, reach = _kernel(degradation, index)
        bands.append(decimate(band[None, None], degradation.ratio, kernel, degradation.shift, reach)[0, 0])
    ms = torch.stack(bands)
    if generator is not None and degradation.noise > 0:
        contrast = (ms[:, 1:] - ms[:, :-1]).std((1, 2), keepdim=True)
        ms = ms + degradation.noise * contrast * torch.randn(ms.shape, generator=generator)
    return ms


def random_degradation(
    rng: np.random.Generator, bands: int, ratios: Sequence[int], weights: Sequence[float]
) -> Degradation:
    """Draw a degradation: ratio, kernel, gains, sampling phase, noise."""
    ratio = int(rng.choice(ratios, p=np.asarray(weights) / np.sum(weights)))
    kind = str(rng.choice(["gaussian", "box", "cubic", "cubic-sharp"], p=[0.6, 0.15, 0.15, 0.1]))
    common = rng.uniform(0.12, 0.5)
    gains = tuple(float(np.clip(common + rng.normal(0, 0.03), 0.08, 0.6)) for _ in range(bands))
    reach = rng.choice([0.0, 0.6, 1.0, 2.0], p=[0.25, 0.4, 0.25, 0.1])
    shift = (float(rng.uniform(-reach, reach)), float(rng.uniform(-reach, reach)))
    noise = float(rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.15)], p=[0.5, 0.35, 0.15]))
    return Degradation(ratio, kind, gains, shift, noise)


def synthetic_pan(gt: Tensor, rng: np.random.Generator) -> Tensor:
    """A PAN (1, H, W) of a random spectral response from the bands (C, H, W) of a scene that has none.

    It has noise of a few percent of its detail contrast.
    """
    weights = rng.dirichlet(np.full(len(gt), 1.5))
    mean = gt.mean((1, 2)).clamp_min(1e-6)
    weights = weights / mean.numpy() * float(mean.mean())  # no band dominates by its gain alone
    pan = torch.einsum("c,chw->hw", torch.from_numpy(weights).to(gt), gt)[None]
    contrast = float((pan[:, :, 1:] - pan[:, :, :-1]).std())
    noise = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.05) * contrast, pan.shape))
    return pan + noise.to(gt)


def sharp_truth(pan: Tensor, ms: Tensor, ratio: int, psf: Psf) -> tuple[Tensor, Tensor]:
    """A truth as sharp as its PAN, made of a real pair, and that PAN: their pixel is `SHARP_STEP` MS pixels.

    Both are blurred to `SHARP_GAIN`; the MS by as much less as it is softer than the PAN already. The shift between
    the two is taken out. Pixels that depend on what lies beyond the images are cut.

    Args:
        pan: (1, H, W), H = ratio * h.
        ms: (C, h, w).
        ratio: PAN pixels per MS pixel.
        psf: blur and shift of the MS against the PAN.

    Returns:
        Truth (C, h', w') and PAN (1, h', w').

    Raises:
        ValueError: the MS is softer than the truth is to be, or the pair is too small.
    """
    wanted, own = gain_to_sigma(SHARP_GAIN, SHARP_STEP), psf.sigma / ratio  # MS pixels
    if own >= SOFTEST:
        raise ValueError(f"its MS is too soft: its blur is {SOFTEST} MS pixels or more")
    rows, cols = (n // SHARP_STEP * SHARP_STEP for n in ms.shape[-2:])
    step, missing = SHARP_STEP * ratio, math.sqrt(wanted**2 - own**2)
    truth = degrade(ms[None, :, :rows, :cols], SHARP_STEP, missing)
    fine = degrade(pan[None, :, : rows * ratio, : cols * ratio], step, wanted * ratio, psf.shift)
    margin = degrade_reach(wanted * ratio, psf.shift, step)
    if min(truth.shape[-2:]) < LEAST_SHARP + 2 * margin:
        raise ValueError(f"it is too small for {LEAST_SHARP} x {LEAST_SHARP} pixels of {SHARP_STEP} MS pixels")
    return crop(truth, margin)[0], crop(fine, margin)[0]
