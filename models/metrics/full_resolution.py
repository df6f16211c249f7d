"""Quality of a pansharpened image without a reference, as the DLPan-Toolbox defines it.

Images, masks and errors are those of `indices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from uknowpan.models.metrics.indices import BLOCK, q2n
from uknowpan.models.metrics.toolbox import INTERP23TAP_REACH, MTF_REACH, imresize, interp23tap, mtf_filter
from uknowpan.models.metrics.windows import as_batch, clean_windows, dilate, mean_over, prepare, window_quality


@dataclass(frozen=True)
class FullResolution:
    """Scores without a reference; each () or (B,)."""

    d_lambda_k: Tensor
    """Spectral distortion of Khan: best 0."""
    d_lambda: Tensor
    """Spectral distortion of QNR: best 0."""
    d_s: Tensor
    """Spatial distortion: best 0."""

    @property
    def hqnr(self) -> Tensor:
        """Hybrid quality with no reference: best 1."""
        return (1 - self.d_lambda_k) * (1 - self.d_s)

    @property
    def qnr(self) -> Tensor:
        """Quality with no reference: best 1."""
        return (1 - self.d_lambda) * (1 - self.d_s)


def full_resolution(
    fused: Tensor, lms: Tensor, pan: Tensor, gains: Sequence[float], *, ratio: int = 4, mask: Tensor | None = None
) -> FullResolution:
    """All scores without a reference; the arguments are those of `d_lambda_khan` and `d_s`."""
    return FullResolution(
        d_lambda_k=d_lambda_khan(fused, lms, gains, ratio, mask=mask),
        d_lambda=d_lambda(fused, lms, mask=mask),
        d_s=d_s(fused, lms, pan, ratio, mask=mask),
    )


def d_lambda_khan(
    fused: Tensor, lms: Tensor, gains: Sequence[float], ratio: int = 4, *, mask: Tensor | None = None
) -> Tensor:
    """Spectral distortion of Khan et al.: 1 - Q2n of MTF-blurred `fused` against `lms`.

    Args:
        fused: (C, H, W) or (B, C, H, W).
        lms: MS enlarged to the shape of fused, by `interp23tap` for published numbers. The mask should cover
            what the enlargement mixed with nodata.
        gains: MTF gains of the sensor's bands, or one for all.
        ratio: PAN pixels per MS pixel along one axis.
    """
    f, m, _ = prepare(fused, lms, mask)
    spoiled = None if mask is None else dilate(mask, MTF_REACH)
    return (1 - q2n(mtf_filter(f, gains, ratio), m, mask=spoiled)).reshape(fused.shape[:-3])


def d_lambda(fused: Tensor, lms: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spectral distortion of QNR: how much the likeness between bands differs from that in lms.

    Incomplete tiles at the bottom and the right are left out. One band alone has no distortion.
    """
    f, m, keep = prepare(fused, lms, mask)
    keep = clean_windows(keep, BLOCK, BLOCK)
    if f.shape[1] == 1:
        return f.new_zeros(fused.shape[:-3])
    likeness = [mean_over(between_bands(x), keep) for x in (f, m)]
    return (likeness[0] - likeness[1]).abs().mean(-1).reshape(fused.shape[:-3])


def between_bands(x: Tensor) -> Tensor:
    """Quality index of each two bands of (B, C, H, W) per tile: (B, C (C - 1) / 2, rows, cols)."""
    parts = [x.new_zeros(len(x), 0, x.shape[-2] // BLOCK, x.shape[-1] // BLOCK)]
    for i in range(x.shape[1] - 1):
        others = x[:, i + 1 :]
        parts.append(window_quality(x[:, i : i + 1].expand_as(others), others, BLOCK, BLOCK))
    return torch.cat(parts, 1)


def d_s(fused: Tensor, lms: Tensor, pan: Tensor, ratio: int = 4, *, mask: Tensor | None = None) -> Tensor:
    """Spatial distortion: how much the bands' likeness to PAN differs from lms's to blurred PAN.

    Incomplete tiles at the bottom and the right are left out. Tiles flat in both images, NaN in the toolbox,
    compare their means alone.

    Args:
        fused: (C, H, W) or (B, C, H, W), H and W multiples of the ratio.
        lms: MS enlarged to the shape of fused.
        pan: (1, H, W) or (B, 1, H, W).
        ratio: a power of two.
    """
    if pan.shape != (*fused.shape[:-3], 1, *fused.shape[-2:]):
        raise ValueError(
            f"an image {tuple(fused.shape)} needs a PAN of one band on the same grid, not {tuple(pan.shape)}"
        )
    f, m, keep = prepare(fused, lms, mask)
    p = torch.where(keep, as_batch(pan), 0.0)
    blurred = interp23tap(imresize(p, ratio), ratio)
    if mask is not None:
        reach = 2 * ratio + 1 + INTERP23TAP_REACH * (ratio - 1)
        keep = ~dilate(~keep, reach, circular=True)
    keep = clean_windows(keep, BLOCK, BLOCK)

    def likeness(x: Tensor, y: Tensor) -> Tensor:
        return mean_over(window_quality(x, y.expand_as(x), BLOCK, BLOCK), keep)

    return (likeness(f, p) - likeness(m, blurred)).abs().mean(-1).reshape(fused.shape[:-3])
