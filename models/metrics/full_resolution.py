"""Quality of a pansharpened image without a reference, as the DLPan-Toolbox defines it.

Images, masks and errors are those of `indices`. `WithoutReference` measures images of any size by regions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from uknowpan.models.metrics.q2n import fill_tiles, q2n_tiles
from uknowpan.models.metrics.regions import BLOCK, TILE, Mean, Region, Shape, require_shape
from uknowpan.models.metrics.toolbox import INTERP23TAP_REACH, MTF_REACH, imresize, interp23tap, mtf_filter
from uknowpan.models.metrics.windows import as_batch, clean_windows, dilate, prepare, window_quality
from uknowpan.models.resample import UPSAMPLE_REACH, crop, registration_offset, upsample


class FullResolution(NamedTuple):
    """Scores without a reference; each () or (B,)."""

    d_lambda_k: Tensor
    """Spectral distortion of Khan, 1 - Q2n of the MTF-blurred result against lms: best 0."""
    d_lambda: Tensor
    """Spectral distortion of QNR, how much the likeness between bands differs from that in lms: best 0.

    One band alone has none.
    """
    d_s: Tensor
    """Spatial distortion, how much the bands' likeness to PAN differs from lms's to blurred PAN: best 0.

    Tiles flat in both images, NaN in the toolbox, compare their means alone.
    """

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
    """All scores without a reference. Incomplete tiles at the bottom and the right count for Khan's index alone.

    Args:
        fused: (C, H, W) or (B, C, H, W), H and W multiples of the ratio.
        lms: MS enlarged to the shape of fused, by `interp23tap` for published numbers. The mask should cover
            what the enlargement mixed with nodata.
        pan: (1, H, W) or (B, 1, H, W).
        gains: MTF gains of the sensor's bands, or one for all.
        ratio: PAN pixels per MS pixel along one axis, a power of two.
        mask: (H, W), True where there is no data.
    """
    if pan.shape != (*fused.shape[:-3], 1, *fused.shape[-2:]):
        raise ValueError(
            f"an image {tuple(fused.shape)} needs a PAN of one band on the same grid, not {tuple(pan.shape)}"
        )
    f, m, keep = prepare(fused, lms, mask)
    gone, p = ~keep, torch.where(keep, as_batch(pan), 0.0)
    low = interp23tap(imresize(p, ratio), ratio)
    mixed = dilate(gone, 2 * ratio + 1 + INTERP23TAP_REACH * (ratio - 1), circular=True)
    sums = WithoutReference((keep.shape[0], keep.shape[1]), gains, ratio=ratio)
    sums.add(Region(0, 0, *sums.shape), f, gone, p, gone, Coarse(m, gone, low, mixed))
    return FullResolution(*(score.reshape(fused.shape[:-3]) for score in sums.scores()))


def between_bands(x: Tensor) -> Tensor:
    """Quality index of each two bands of (B, C, H, W) per tile: (B, C (C - 1) / 2, rows, cols)."""
    parts = [x.new_zeros(len(x), 0, x.shape[-2] // BLOCK, x.shape[-1] // BLOCK)]
    for i in range(x.shape[1] - 1):
        others = x[:, i + 1 :]
        parts.append(window_quality(x[:, i : i + 1].expand_as(others), others, BLOCK, BLOCK))
    return torch.cat(parts, 1)


class Coarse(NamedTuple):
    """MS and PAN at the MS's resolution, in DN and finite; masks are True at nodata or where it was mixed in.

    They lie on the MS grid, or on the PAN grid once `Enlargement` has enlarged them.
    """

    ms: Tensor
    """(..., C, h, w)"""
    ms_mask: Tensor
    """(h, w)"""
    pan: Tensor
    """(..., 1, h, w)"""
    pan_mask: Tensor
    """(h, w)"""


class WithoutReference:
    """Scores without a reference, summed over regions; each (B,), B = 1 for images without that axis.

    A tile counts for an index where every pixel that the index looks at holds data.

    Args:
        shape: (height, width) of the image, see `whole_tiles`.
        gains: MTF gains of the sensor's bands, or one for all.
        ratio: PAN pixels per MS pixel along one axis.
    """

    def __init__(self, shape: Shape, gains: Sequence[float], *, ratio: int = 4) -> None:
        self.shape, self.gains, self.ratio = shape, gains, ratio
        self._khan = Mean(TILE)
        self._to_pan, self._to_low = Mean(TILE), Mean(TILE)
        self._between_fused, self._between_lms = Mean(TILE), Mean(TILE)

    def needed(self, region: Region) -> Region:
        """The part of the fused image that `add` takes for a region."""
        return region.grown(MTF_REACH, MTF_REACH, self.shape)

    def add(
        self, region: Region, fused: Tensor, fused_mask: Tensor, pan: Tensor, pan_mask: Tensor, low: Coarse
    ) -> None:
        """Add one region of h x w pixels; images in DN, masks True at nodata.

        Args:
            region: one of `regions`.
            fused, fused_mask: (..., C, h', w') and (h', w'), over `needed(region)`.
            pan, pan_mask: (..., 1, h, w) and (h, w).
            low: MS and reduced PAN, both enlarged to the region.

        Raises:
            ValueError: shapes that do not fit.
        """
        outer = self.needed(region)
        here = region.within(outer)
        require_shape(fused, outer)
        for image in (pan, low.ms, low.pan):
            require_shape(image, region)
        bad = fused_mask[here] | low.ms_mask
        if bool(bad.all()):
            return
        unclear = pan_mask | low.pan_mask
        fused = _zeroed(fused, fused_mask)
        f, m = fused[..., *here], _zeroed(low.ms, low.ms_mask)
        p, small = (_zeroed(x, unclear) for x in (pan, low.pan))

        blurred = mtf_filter(fused, self.gains, self.ratio)[..., *here]
        spoiled = fill_tiles(dilate(fused_mask, MTF_REACH)[here] | low.ms_mask, BLOCK)
        self._khan.add(q2n_tiles(blurred, m, BLOCK), clean_windows(~spoiled, BLOCK, BLOCK))

        clean = clean_windows(~bad, BLOCK, BLOCK)
        self._between_fused.add(between_bands(f), clean)
        self._between_lms.add(between_bands(m), clean)
        clean = clean_windows(~(bad | unclear), BLOCK, BLOCK)
        self._to_pan.add(window_quality(f, p.expand_as(f), BLOCK, BLOCK), clean)
        self._to_low.add(window_quality(m, small.expand_as(m), BLOCK, BLOCK), clean)

    def scores(self) -> FullResolution:
        """Scores of all regions added; ValueError if nothing is left to measure."""
        between = self._between_fused.value() - self._between_lms.value()
        return FullResolution(
            d_lambda_k=1 - self._khan.value(),
            d_lambda=between.abs().mean(-1) if between.numel() else between.sum(-1),
            d_s=(self._to_pan.value() - self._to_low.value()).abs().mean(-1),
        )

    @property
    def tiles(self) -> int:
        """Number of tiles that counted for D_s, the most demanding index."""
        return int(self._to_pan.count)


def _zeroed(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, as_batch(x))


REDUCE_MARGIN = 2
"""MS pixels on every side of a window that `reduce_pan` reads and does not return."""


def reduce_pan(pan: Tensor, mask: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """PAN reduced to the MS grid by `imresize`, and a mask that is True where nodata was mixed in.

    `pan` (1, ratio * h, ratio * w) is finite; the results are (1, h - 4, w - 4) and (h - 4, w - 4).
    """
    bad = max_pool2d(mask.float()[None], ratio)[0] > 0
    small = imresize(pan, ratio)
    return crop(small, REDUCE_MARGIN), crop(dilate(bad, REDUCE_MARGIN), REDUCE_MARGIN)


@dataclass(frozen=True)
class Enlargement:
    """The way in which MS and reduced PAN are enlarged to the PAN grid.

    "area": cubic convolution that puts sample i at the centre of its area, PAN index ``ratio * i + (ratio - 1) / 2``,
    as `sharpen` does; right for georeferenced scenes. "pancollection": the toolbox's interp23tap, sample i at ``4 i +
    2``, half a PAN pixel further down and right, as in published scores; for ratios 2, 4 and 8.

    Raises:
        ValueError: an unknown registration, or a ratio that it does not serve.
    """

    ratio: int
    registration: str = "area"

    def __post_init__(self) -> None:
        registration_offset(self.registration, self.ratio)
        if self.circular and self.ratio & (self.ratio - 1):
            raise ValueError(
                f"the toolbox's interp23tap enlarges by powers of two, not by {self.ratio}; measure by area"
            )

    @property
    def circular(self) -> bool:
        """Whether the image continues at its opposite side beyond a border, not as a reflection."""
        return self.registration == "pancollection"

    @property
    def margin(self) -> int:
        """MS pixels on every side of a window that are read and not enlarged."""
        if self.circular:
            return math.ceil(INTERP23TAP_REACH * (self.ratio - 1) / self.ratio)
        return UPSAMPLE_REACH

    def __call__(self, window: Coarse) -> Coarse:
        """A window of h x w MS pixels as ratio * (h - 2 margin) x ratio * (w - 2 margin) PAN pixels, float64."""
        ms, pan = (self._image(x.to(torch.float64)) for x in (window.ms, window.pan))
        ms_mask, pan_mask = (self._mask(x) for x in (window.ms_mask, window.pan_mask))
        return Coarse(ms, ms_mask, pan, pan_mask)

    def _image(self, x: Tensor) -> Tensor:
        large = interp23tap(x, self.ratio) if self.circular else upsample(x[None], self.ratio)[0]
        return crop(large, self.margin * self.ratio)

    def _mask(self, mask: Tensor) -> Tensor:
        mixed = crop(dilate(mask, self.margin), self.margin)
        return mixed.repeat_interleave(self.ratio, 0).repeat_interleave(self.ratio, 1)
