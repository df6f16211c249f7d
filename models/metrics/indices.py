"""Quality of a pansharpened image against a reference, as the DLPan-Toolbox defines it.

Images are (C, H, W), giving one number (a float64 tensor without axes), or (B, C, H, W), giving (B,) numbers.
Values are digital numbers (DN) of any dtype; all is computed in float64. Q2n rounds to uint16, so that images scaled
to [0, 1] must be multiplied first. The image to be judged, `fused`, comes first.

`mask` (H, W) is True where there is no data, as in numpy.ma. Masked pixels may hold anything, NaN included; pixels,
windows or tiles that depend on them are left out.

Every function raises ValueError where shapes do not fit or nothing is left to measure. A docstring states the result
where the toolbox divides 0 by 0. `AgainstReference` measures images of any size by regions.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.metrics.q2n import fill_tiles, q2n_tiles
from uknowpan.models.metrics.regions import BLOCK, TILE, Mean, Region, Shape, require_shape
from uknowpan.models.metrics.windows import clean_windows, dilate, prepare, require_window, separable, window_quality

SSIM_WINDOW = 11


class ReducedResolution(NamedTuple):
    """Scores against a reference; each () or (B,)."""

    q2n: Tensor
    """Q4, Q8, ...: best 1."""
    q: Tensor
    """Universal quality index (Wang and Bovik), mean of sliding windows and bands: best 1.

    A window flat in both images compares their means alone; two windows of mean 0 give 1.
    """
    sam: Tensor
    """Spectral angle in degrees: best 0."""
    ergas: Tensor
    """Relative dimensionless error: best 0."""
    scc: Tensor
    """Spatial correlation, one cosine of the Sobel gradients' magnitudes over all bands: best 1.

    The outermost pixels are dropped, and zeros lie outside, as in the toolbox. Two images of zeros give 1; one gives 0.
    """
    psnr: Tensor
    """dB; infinite for equal images."""
    ssim: Tensor
    """Structural similarity: Gaussian windows 11 x 11 of sigma 1.5, K 0.01 and 0.03, no borders; best 1."""


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


class AgainstReference:
    """Scores against a reference, summed over regions; each (B,), B = 1 for images without that axis.

    Args:
        shape: (height, width) of the image after its border is cut.
        ratio: PAN pixels per MS pixel along one axis; only ERGAS depends on it.
        peak: largest possible DN; only PSNR and SSIM depend on it.
    """

    def __init__(self, shape: Shape, *, ratio: float = 4, peak: float = 1.0) -> None:
        self.shape, self.ratio, self.peak = shape, ratio, peak
        self._mse, self._level = Mean("pixel"), Mean("pixel")
        self._angle = Mean("pixel of non-zero spectra and")
        self._q, self._q2n = Mean(TILE), Mean(TILE)
        self._ssim, self._gradients = Mean(f"window of {SSIM_WINDOW} x {SSIM_WINDOW} pixels"), Mean("pixel")

    def needed(self, region: Region) -> Region:
        """The part of both images that `add` takes for a region."""
        return region.grown(1, BLOCK - 1, self.shape)

    def add(self, region: Region, fused: Tensor, gt: Tensor, mask: Tensor | None = None) -> None:
        """Add one region: `fused` and `gt` (..., C, h, w) in DN and `mask` (h, w) over `needed(region)`.

        Raises:
            ValueError: shapes that do not fit, or an image smaller than a window.
        """
        require_window(self.shape, BLOCK)
        require_shape(fused, self.needed(region))
        if mask is None or not bool(mask.all()):
            images = prepare(fused, gt, mask)
            for part in (self.add_errors, self.add_angles, self.add_q2n, self.add_q, self.add_ssim, self.add_gradients):
                part(*images, region)

    # Each of these takes both images (B, C, h, w) and `keep` (h, w), True where there is data, over `needed(region)`.

    def add_errors(self, f: Tensor, g: Tensor, keep: Tensor, region: Region) -> None:
        f, g, keep = self._core(region, f, g, keep)
        self._mse.add((f - g) ** 2, keep)
        self._level.add(g, keep)

    def add_angles(self, f: Tensor, g: Tensor, keep: Tensor, region: Region) -> None:
        f, g, keep = self._core(region, f, g, keep)
        angle, has_angle = spectral_angle(f, g)
        has_angle &= keep
        self._angle.add_sum(torch.where(has_angle, angle, 0.0).sum((-2, -1)), has_angle.sum((-2, -1)))

    def add_q2n(self, f: Tensor, g: Tensor, keep: Tensor, region: Region) -> None:
        f, g, keep = self._core(region, f, g, keep)
        self._q2n.add(q2n_tiles(f, g, BLOCK), clean_windows(fill_tiles(keep, BLOCK), BLOCK, BLOCK))

    def add_q(self, f: Tensor, g: Tensor, keep: Tensor, region: Region) -> None:
        f, g, keep = self._core(region, f, g, keep, BLOCK - 1)
        self._q.add(window_quality(f, g, BLOCK, 1), clean_windows(keep, BLOCK, 1))

    def add_ssim(self, f: Tensor, g: Tensor, keep: Tensor, region: Region) -> None:
        f, g, keep = self._core(region, f, g, keep, SSIM_WINDOW - 1)
        clean = clean_windows(keep, SSIM_WINDOW, 1)
        steps = torch.arange(-5, 6, dtype=f.dtype, device=f.device)
        taps = torch.exp(-(steps**2) / (2 * 1.5**2))
        taps = taps / taps.sum()
        c1, c2 = (0.01 * self.peak) ** 2, (0.03 * self.peak) ** 2
        mean_f, mean_g = separable(f, taps), separable(g, taps)
        variances = separable(f * f, taps) - mean_f**2 + separable(g * g, taps) - mean_g**2
        covariance = separable(f * g, taps) - mean_f * mean_g
        similarity = (2 * mean_f * mean_g + c1) * (2 * covariance + c2)
        self._ssim.add(similarity / ((mean_f**2 + mean_g**2 + c1) * (variances + c2)), clean)

    def add_gradients(self, f: Tensor, g: Tensor, keep: Tensor, region: Region) -> None:
        outer, around = self.needed(region), region.padded(1, 1).clipped(self.shape, 1)
        part, here = around.within(outer), region.clipped(self.shape, 1).within(around)
        kept = ~dilate(~keep[part], 1)[here]
        a, b = (torch.where(kept, _gradient(x[..., *part])[..., *here], 0.0) for x in (f, g))
        sums = [x.sum((1, 2, 3)) for x in (a * b, a.square(), b.square())]
        self._gradients.add_sum(torch.stack(sums), int(kept.sum()))

    def _core(self, region: Region, f: Tensor, g: Tensor, keep: Tensor, more: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """The region's own pixels, with `more` below and right where the image goes on."""
        part = region.grown(0, more, self.shape).within(self.needed(region))
        return f[..., *part], g[..., *part], keep[part]

    @property
    def q2n(self) -> Tensor:
        return self._q2n.value()

    @property
    def q(self) -> Tensor:
        return self._q.value().mean(-1)

    @property
    def sam(self) -> Tensor:
        return self._angle.value()

    @property
    def ergas(self) -> Tensor:
        return relative_error(self._mse.value(), self._level.value(), self.ratio)

    @property
    def psnr(self) -> Tensor:
        return 10.0 * torch.log10(self.peak**2 / self._mse.value().mean(-1))

    @property
    def ssim(self) -> Tensor:
        return self._ssim.value().mean(-1)

    @property
    def scc(self) -> Tensor:
        product, power_f, power_g = self._gradients.sum()
        norm = (power_f * power_g).sqrt()
        cosine = product / torch.where(norm > 0, norm, 1.0)
        return torch.where((power_f == 0) & (power_g == 0), 1.0, cosine)

    def scores(self) -> ReducedResolution:
        """Scores of all regions added; ValueError if nothing is left to measure."""
        self._mse.sum()  # refuses an image of nodata alone by its pixels, not by its windows
        return ReducedResolution(*(getattr(self, name) for name in ReducedResolution._fields))


def spectral_angle(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Angle (B, H, W) in degrees between the spectra of two images (B, C, H, W), and where neither spectrum is 0."""
    norms = ((f * f).sum(1) * (g * g).sum(1)).sqrt()
    has_angle = norms > 0
    cosine = (f * g).sum(1) / torch.where(has_angle, norms, 1.0)
    return torch.rad2deg(torch.acos(cosine.clamp(-1.0, 1.0))), has_angle


def relative_error(mse: Tensor, level: Tensor, ratio: float) -> Tensor:
    """ERGAS (...) from the mean square error and the mean (..., C) of each band."""
    relative = torch.where(mse > 0, mse / level**2, 0.0)
    return 100.0 / ratio * relative.mean(-1).sqrt()


def _gradient(x: Tensor) -> Tensor:
    """Magnitude of the Sobel gradient of each band, zeros outside the image."""
    sobel = x.new_tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]])
    weight = torch.stack([sobel, sobel.T])[:, None]  # (2, 1, 3, 3)
    slopes = F.conv2d(x.flatten(0, 1)[:, None], weight, padding=1)  # (B C, 2, H, W)
    return slopes.square().sum(1).sqrt().reshape(x.shape)


# -------------------------------------------------------------------------------- whole images


def reduced_resolution(
    fused: Tensor, gt: Tensor, *, ratio: float, peak: float, mask: Tensor | None = None
) -> ReducedResolution:
    """All scores against the reference; the protocol calls for `crop_border` first."""
    f, g, keep = prepare(fused, gt, mask)
    sums = AgainstReference((keep.shape[0], keep.shape[1]), ratio=ratio, peak=peak)
    sums.add(Region(0, 0, *sums.shape), f, g, ~keep)
    return ReducedResolution(*(score.reshape(fused.shape[:-3]) for score in sums.scores()))


Part = Callable[[AgainstReference, Tensor, Tensor, Tensor, Region], None]


def _index(
    name: str, part: Part, fused: Tensor, gt: Tensor, mask: Tensor | None, ratio: float = 4, peak: float = 1.0
) -> Tensor:
    """One index of a whole image."""
    f, g, keep = prepare(fused, gt, mask)
    sums = AgainstReference((keep.shape[0], keep.shape[1]), ratio=ratio, peak=peak)
    part(sums, f, g, keep, Region(0, 0, *sums.shape))
    score: Tensor = getattr(sums, name)
    return score.reshape(fused.shape[:-3])


def q2n(fused: Tensor, gt: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Q2n (Q4 for 4 bands, Q8 for 8): mean over the tiles without a masked pixel; incomplete last tiles are mirrored.

    Both images are rounded to uint16 first, halves away from zero. A tile with a flat reference gives about 0, as in
    the toolbox, unless the other image is flat too.
    """
    return _index("q2n", AgainstReference.add_q2n, fused, gt, mask)


def sam(fused: Tensor, gt: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Spectral angle mapper: mean angle in degrees over the pixels whose two spectra are not zero."""
    return _index("sam", AgainstReference.add_angles, fused, gt, mask)


def ergas(fused: Tensor, gt: Tensor, ratio: float = 4, *, mask: Tensor | None = None) -> Tensor:
    """Relative dimensionless global error (ERGAS), normalised by the band means of gt.

    A band of mean 0 counts 0 without an error, and makes ERGAS infinite with one.
    """
    return _index("ergas", AgainstReference.add_errors, fused, gt, mask, ratio)


def psnr(fused: Tensor, gt: Tensor, peak: float, *, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio in dB, one MSE over all bands; `peak` is the largest possible DN."""
    return _index("psnr", AgainstReference.add_errors, fused, gt, mask, peak=peak)
