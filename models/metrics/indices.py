"""Quality of a pansharpened image against a reference, as the DLPan-Toolbox defines it.

Images are (C, H, W), giving one number (a float64 tensor without axes), or (B, C, H, W), giving (B,) numbers.
Values are digital numbers (DN) of any dtype; all is computed in float64. Q2n rounds to uint16, so that images scaled
to [0, 1] must be multiplied first. The image to be judged, `fused`, comes first.

`mask` (H, W) is True where there is no data, as in numpy.ma. Masked pixels may hold anything, NaN included; pixels,
windows or tiles that depend on them are left out.

Every function raises ValueError where shapes do not fit or nothing is left to measure. A docstring states the result
where the toolbox divides 0 by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.metrics.q2n import fill_tiles, q2n_tiles
from uknowpan.models.metrics.windows import (
    clean_windows,
    dilate,
    mean_over,
    prepare,
    require_some,
    separable,
    window_quality,
)

BLOCK = 32
"""Width of the windows and tiles of Q, Q2n, D_lambda and D_s."""


@dataclass(frozen=True)
class ReducedResolution:
    """Scores against a reference; each () or (B,)."""

    q2n: Tensor
    """Q4, Q8, ...: best 1."""
    q: Tensor
    """Universal quality index, mean of the bands: best 1."""
    sam: Tensor
    """Spectral angle in degrees: best 0."""
    ergas: Tensor
    """Relative dimensionless error: best 0."""
    scc: Tensor
    """Spatial correlation: best 1."""
    psnr: Tensor
    """dB; infinite for equal images."""
    ssim: Tensor
    """Structural similarity: best 1."""


def crop_border(x: Tensor, cut: int = 21) -> Tensor:
    """Image or mask (..., H, W) without its border, cut as the toolbox does.

    `cut` - 1 rows and columns go at the top and left, `cut` at the bottom and right; 0 keeps all.

    Raises:
        ValueError: nothing would be left.
    """
    if cut == 0:
        return x
    height, width = x.shape[-2:]
    if cut < 0 or min(height, width) < 2 * cut:
        raise ValueError(f"a border of {cut} leaves nothing of {height} x {width} pixels; cut less, 0 for none")
    return x[..., cut - 1 : height - cut, cut - 1 : width - cut]


def reduced_resolution(
    fused: Tensor, gt: Tensor, *, ratio: float, peak: float, mask: Tensor | None = None
) -> ReducedResolution:
    """All scores against the reference; the protocol calls for `crop_border` first."""
    return ReducedResolution(
        q2n=q2n(fused, gt, mask=mask),
        q=q_index(fused, gt, mask=mask),
        sam=sam(fused, gt, mask=mask),
        ergas=ergas(fused, gt, ratio, mask=mask),
        scc=scc(fused, gt, mask=mask),
        psnr=psnr(fused, gt, peak, mask=mask),
        ssim=ssim(fused, gt, peak, mask=mask),
    )


# ------------------------------------------------------------------------- reduced resolution


def sam(fused: Tensor, gt: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spectral angle mapper: mean angle in degrees over the pixels whose two spectra are not zero."""
    f, g, keep = prepare(fused, gt, mask)
    norms = ((f * f).sum(1) * (g * g).sum(1)).sqrt()  # (B, H, W)
    has_angle = keep & (norms > 0)
    count = has_angle.sum((-2, -1))
    if bool((count == 0).any()):
        raise ValueError(
            "SAM needs at least one pixel whose spectra are not zero, and there is none among"
            f" {int(keep.sum())}; check the nodata value and the mask"
        )
    cosine = (f * g).sum(1) / torch.where(has_angle, norms, 1.0)
    angle = torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0)))
    total = torch.where(has_angle, angle, 0.0).sum((-2, -1))
    return (total / count).reshape(fused.shape[:-3])


def ergas(fused: Tensor, gt: Tensor, ratio: float = 4, *, mask: Tensor | None = None) -> Tensor:
    """Relative dimensionless global error (ERGAS), normalised by the band means of gt.

    A band of mean 0 counts 0 without an error, and makes ERGAS infinite with one.
    """
    f, g, keep = prepare(fused, gt, mask)
    mse = mean_over((f - g) ** 2, keep)  # (B, C)
    relative = torch.where(mse > 0, mse / mean_over(g, keep) ** 2, 0.0)
    return (100.0 / ratio * relative.mean(-1).sqrt()).reshape(fused.shape[:-3])


def psnr(fused: Tensor, gt: Tensor, peak: float, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, one MSE over all bands; `peak` is the largest possible DN."""
    f, g, keep = prepare(fused, gt, mask)
    mse = mean_over((f - g) ** 2, keep).mean(-1)
    return (10.0 * torch.log10(peak**2 / mse)).reshape(fused.shape[:-3])


def scc(fused: Tensor, gt: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spatial correlation: one cosine of the Sobel gradients' magnitudes over all bands.

    The outermost pixels are dropped, and zeros lie outside, as in the toolbox. Two images of zeros give 1; one gives 0.
    """
    f, g, keep = prepare(fused, gt, mask)
    if min(f.shape[-2:]) < 3:
        raise ValueError(f"SCC needs 3 x 3 pixels at least, not {f.shape[-2]} x {f.shape[-1]}")
    keep = ~dilate(~keep[1:-1, 1:-1], 1)
    require_some(keep, "pixels")
    a, b = (torch.where(keep, _gradient(x[..., 1:-1, 1:-1]), 0.0) for x in (f, g))
    power_a, power_b = a.square().sum((1, 2, 3)), b.square().sum((1, 2, 3))
    norm = (power_a * power_b).sqrt()
    cosine = (a * b).sum((1, 2, 3)) / torch.where(norm > 0, norm, 1.0)
    both_zero = (power_a == 0) & (power_b == 0)
    return torch.where(both_zero, 1.0, cosine).reshape(fused.shape[:-3])


def _gradient(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of each band, zeros outside the image."""
    sobel = x.new_tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    weight = torch.stack([sobel, sobel.T])[:, None]  # (2, 1, 3, 3)
    slopes = F.conv2d(x.flatten(0, 1)[:, None], weight, padding=1)  # (B C, 2, H, W)
    return slopes.square().sum(1).sqrt().reshape(x.shape)


def ssim(fused: Tensor, gt: Tensor, peak: float, *, mask: Tensor | None = None) -> Tensor:
    """Structural similarity: Gaussian windows 11 x 11 of sigma 1.5, K 0.01 and 0.03, no borders."""
    f, g, keep = prepare(fused, gt, mask)
    keep = clean_windows(keep, 11, 1)
    steps = torch.arange(-5, 6, dtype=f.dtype, device=f.device)
    taps = torch.exp(-(steps**2) / (2 * 1.5**2))
    taps = taps / taps.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_f, mean_g = separable(f, taps), separable(g, taps)
    variances = separable(f * f, taps) - mean_f**2 + separable(g * g, taps) - mean_g**2
    covariance = separable(f * g, taps) - mean_f * mean_g
    similarity = (2 * mean_f * mean_g + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_f**2 + mean_g**2 + c1) * (variances + c2))
    return mean_over(similarity, keep).mean(-1).reshape(fused.shape[:-3])


def q_index(fused: Tensor, gt: Tensor, *, window: int = BLOCK, mask: Tensor | None = None) -> Tensor:
    """Universal quality index (Wang and Bovik), mean over sliding windows and bands.

    A window flat in both images compares their means alone; two windows of mean 0 give 1.
    """
    f, g, keep = prepare(fused, gt, mask)
    keep = clean_windows(keep, window, 1)
    quality = window_quality(f, g, window, 1)
    return mean_over(quality, keep).mean(-1).reshape(fused.shape[:-3])


# --------------------------------------------------------------------------------------- Q2n


def q2n(fused: Tensor, gt: Tensor, *, block: int = BLOCK, mask: Tensor | None = None) -> Tensor:
    """Q2n (Q4 for 4 bands, Q8 for 8): mean of `q2n_map` over the tiles without a masked pixel."""
    f, g, keep = prepare(fused, gt, mask)
    keep = clean_windows(fill_tiles(keep, block), block, block)
    return mean_over(q2n_tiles(f, g, block), keep).reshape(fused.shape[:-3])


def q2n_map(fused: Tensor, gt: Tensor, *, block: int = BLOCK) -> Tensor:
    """Q2n of each tile: (rows, cols), or (B, rows, cols); an incomplete last tile is mirrored.

    Both images are rounded to uint16 first, halves away from zero. A tile with a flat reference gives about 0, as in
    the toolbox, unless the other image is flat too.
    """
    f, g, _ = prepare(fused, gt, None)
    tiles = q2n_tiles(f, g, block)
    return tiles.reshape(*fused.shape[:-3], *tiles.shape[-2:])
