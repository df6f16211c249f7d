"""Quality of a pansharpened image, as the DLPan-Toolbox defines it.

Images are (C, H, W), giving one number (a float64 tensor without axes), or (B, C, H, W), giving
(B,) numbers, one per image. Values are digital numbers (DN), of any dtype; all is computed in
float64. Q2n (also inside D_lambda of Khan) rounds to uint16, so images scaled to [0, 1] must be
multiplied first. The image to be judged, `fused`, always comes first.

`mask` (H, W) is True where there is no data (as in numpy.ma, unlike a GDAL mask); such pixels may
hold anything, NaN included, and what depends on them is left out: pixels, windows or tiles.

Every function raises ValueError where shapes do not fit or nothing is left to measure. Where the
toolbox divides 0 by 0 the answer is said in the function's docstring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.metrics.q2n import fill_tiles, q2n_tiles
from uknowpan.models.metrics.toolbox import INTERP23TAP_REACH, MTF_REACH, imresize, interp23tap, mtf_filter
from uknowpan.models.metrics.windows import (
    as_batch,
    clean_windows,
    dilate,
    mean_over,
    prepare,
    require_some,
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


def crop_border(x: Tensor, cut: int = 21) -> Tensor:
    """Take off the border as the toolbox does: `cut` - 1 rows and columns at the top and left,
    `cut` at the bottom and right (256 to 215 pixels at 21); 0 keeps all.

    Args:
        x: (..., H, W), a mask as well as an image.

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
    """All scores against the reference; `crop_border` comes before, as the protocol has it."""
    return ReducedResolution(
        q2n=q2n(fused, gt, mask=mask),
        q=q_index(fused, gt, mask=mask),
        sam=sam(fused, gt, mask=mask),
        ergas=ergas(fused, gt, ratio, mask=mask),
        scc=scc(fused, gt, mask=mask),
        psnr=psnr(fused, gt, peak, mask=mask),
        ssim=ssim(fused, gt, peak, mask=mask),
    )


def full_resolution(
    fused: Tensor,
    lms: Tensor,
    pan: Tensor,
    gains: Sequence[float],
    *,
    ratio: int = 4,
    mask: Tensor | None = None,
) -> FullResolution:
    """All scores without a reference; arguments as `d_lambda_khan` and `d_s` have them."""
    return FullResolution(
        d_lambda_k=d_lambda_khan(fused, lms, gains, ratio, mask=mask),
        d_lambda=d_lambda(fused, lms, mask=mask),
        d_s=d_s(fused, lms, pan, ratio, mask=mask),
    )


# ------------------------------------------------------------------------- reduced resolution


def sam(fused: Tensor, gt: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spectral angle mapper in degrees, mean over the pixels.

    Pixels where either spectrum is zero have no angle and are left out; an image of such pixels
    only raises ValueError.
    """
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

    A band without error counts 0 even if its mean is 0; with an error ERGAS is then infinite.
    """
    f, g, keep = prepare(fused, gt, mask)
    mse = mean_over((f - g) ** 2, keep)  # (B, C)
    relative = torch.where(mse > 0, mse / mean_over(g, keep) ** 2, 0.0)
    return (100.0 / ratio * relative.mean(-1).sqrt()).reshape(fused.shape[:-3])


def psnr(fused: Tensor, gt: Tensor, peak: float, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, one MSE over all bands; infinite for equal images.

    Args:
        peak: largest possible DN, 2^bits - 1.
    """
    f, g, keep = prepare(fused, gt, mask)
    mse = mean_over((f - g) ** 2, keep).mean(-1)
    return (10.0 * torch.log10(peak**2 / mse)).reshape(fused.shape[:-3])


def scc(fused: Tensor, gt: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spatial correlation: one cosine of the Sobel gradients' magnitudes over all bands.

    The outermost pixels are dropped first, what lies outside counts 0, as in the toolbox. Two
    images of zeros give 1, one of zeros and another give 0.
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
    """Structural similarity: Gaussian windows 11 x 11 of sigma 1.5, K 0.01 and 0.03, no borders.

    Args:
        peak: largest possible DN, 2^bits - 1.
    """
    f, g, keep = prepare(fused, gt, mask)
    keep = clean_windows(keep, 11, 1)
    steps = torch.arange(-5, 6, dtype=f.dtype, device=f.device)
    taps = torch.exp(-(steps**2) / (2 * 1.5**2))
    taps = taps / taps.sum()

    def blur(x: Tensor) -> Tensor:
        # Sums of shifted images: ten times as fast as a convolution in float64.
        for axis in (-2, -1):
            room = x.shape[axis] - len(taps) + 1
            x = sum(tap * x.narrow(axis, place, room) for place, tap in enumerate(taps))
        return x

    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    mean_f, mean_g = blur(f), blur(g)
    variances = blur(f * f) - mean_f**2 + blur(g * g) - mean_g**2
    covariance = blur(f * g) - mean_f * mean_g
    similarity = (2 * mean_f * mean_g + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_f**2 + mean_g**2 + c1) * (variances + c2))
    return mean_over(similarity, keep).mean(-1).reshape(fused.shape[:-3])


def q_index(fused: Tensor, gt: Tensor, *, window: int = BLOCK, mask: Tensor | None = None) -> Tensor:
    """Universal quality index (Wang and Bovik) in a sliding window, mean over windows and bands.

    Where both images are flat their means alone are compared; where both means are 0 it is 1.
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

    Both images are rounded to uint16 first, halves away from zero. Tiles where the reference is
    flat have the toolbox's answer: about 0 unless the other image is flat too.
    """
    f, g, _ = prepare(fused, gt, None)
    tiles = q2n_tiles(f, g, block)
    return tiles.reshape(*fused.shape[:-3], *tiles.shape[-2:])


# --------------------------------------------------------------------------- full resolution


def d_lambda_khan(
    fused: Tensor,
    lms: Tensor,
    gains: Sequence[float],
    ratio: int = 4,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Spectral distortion of Khan et al.: 1 - Q2n of MTF-blurred `fused` against `lms`.

    Args:
        fused: (C, H, W) or (B, C, H, W).
        lms: as fused; the MS enlarged, by `interp23tap` for published numbers. The mask should
            cover what the enlargement mixed with nodata.
        gains: MTF gains of the sensor's bands, or one for all.
        ratio: PAN pixels per MS pixel along one axis.
    """
    f, m, _ = prepare(fused, lms, mask)
    blurred = mtf_filter(f, gains, ratio)
    spoiled = None if mask is None else dilate(mask, MTF_REACH)
    return (1 - q2n(blurred, m, mask=spoiled)).reshape(fused.shape[:-3])


def d_lambda(fused: Tensor, lms: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spectral distortion of QNR: how much the likeness between bands differs from that in lms.

    Incomplete tiles at the bottom and the right are left out. One band alone has no distortion.
    """
    f, m, keep = prepare(fused, lms, mask)
    keep = clean_windows(keep, BLOCK, BLOCK)
    pairs = list(combinations(range(f.shape[1]), 2))
    if not pairs:
        return f.new_zeros(fused.shape[:-3])
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))

    def likeness(x: Tensor) -> Tensor:
        return mean_over(window_quality(x[:, first], x[:, second], BLOCK, BLOCK), keep)

    return (likeness(f) - likeness(m)).abs().mean(-1).reshape(fused.shape[:-3])


def d_s(fused: Tensor, lms: Tensor, pan: Tensor, ratio: int = 4, *, mask: Tensor | None = None) -> Tensor:
    """Spatial distortion: how much the bands' likeness to PAN differs from lms's to blurred PAN.

    Incomplete tiles at the bottom and the right are left out; tiles flat in both images, NaN in
    the toolbox, compare their means alone.

    Args:
        fused: (C, H, W) or (B, C, H, W), H and W multiples of the ratio.
        lms: as fused.
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

    distortion = (likeness(f, p) - likeness(m, blurred)).abs().mean(-1)
    return distortion.reshape(fused.shape[:-3])
