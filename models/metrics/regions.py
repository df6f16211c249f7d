"""Scores of images that do not fit into memory, summed over regions.

`AgainstReference` and `WithoutReference` give what `reduced_resolution` and `full_resolution` give of the whole
image, but for the order of the sums. The image is cut into `regions` that start at multiples of 32 pixels. `needed`
returns the part of the image to read for a region: the region and the halo of windows and filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from uknowpan.models.metrics.full_resolution import FullResolution, between_bands
from uknowpan.models.metrics.indices import BLOCK, ReducedResolution, _gradient, sam, ssim
from uknowpan.models.metrics.q2n import fill_tiles, q2n_tiles
from uknowpan.models.metrics.toolbox import INTERP23TAP_REACH, MTF_REACH, imresize, interp23tap, mtf_filter
from uknowpan.models.metrics.windows import clean_windows, dilate, prepare, require_window, window_quality
from uknowpan.models.resample import UPSAMPLE_REACH, crop, registration_offset, upsample

ROWS, COLS = 256, 640
"""Default size of a region: multiples of 32 that with the halo of the MTF filters suit an FFT."""

MANY_BANDS = 8
"""Number of bands above which regions become narrower, for the sake of memory."""

SSIM_WINDOW = 11
TILE = f"window of {BLOCK} x {BLOCK} pixels"

Shape = tuple[int, int]
"""(height, width)"""


@dataclass(frozen=True)
class Region:
    """A rectangle of an image, in pixels."""

    row: int
    col: int
    height: int
    width: int

    def grown(self, before: int, after: int, shape: Shape) -> Region:
        """The region with more pixels above and left, below and right, within an image of `shape`."""
        return self.padded(before, after).clipped(shape)

    def padded(self, before: int, after: int) -> Region:
        """The region with more pixels above and left, below and right, beyond the image too."""
        size = before + after
        return Region(self.row - before, self.col - before, self.height + size, self.width + size)

    def clipped(self, shape: Shape) -> Region:
        """The part of the region in an image of `shape`."""
        top, left = max(self.row, 0), max(self.col, 0)
        bottom, right = min(self.row + self.height, shape[0]), min(self.col + self.width, shape[1])
        return Region(top, left, bottom - top, right - left)

    def scaled(self, factor: int) -> Region:
        """The same area in pixels `factor` times as fine."""
        return Region(self.row * factor, self.col * factor, self.height * factor, self.width * factor)

    def within(self, outer: Region) -> tuple[slice, slice]:
        """Rows and columns of the region in the arrays of a region around it."""
        row, col = self.row - outer.row, self.col - outer.col
        return slice(row, row + self.height), slice(col, col + self.width)


def whole_tiles(shape: Shape) -> Shape:
    """Shape of the image without incomplete tiles at the bottom and the right; ValueError if no tile is complete."""
    require_window(shape, BLOCK)
    return shape[0] // BLOCK * BLOCK, shape[1] // BLOCK * BLOCK


def regions(shape: Shape, bands: int = MANY_BANDS, *, rows: int = ROWS, cols: int = COLS) -> Iterator[Region]:
    """Regions of `rows` x `cols` pixels, multiples of 32, row by row.

    An incomplete last tile belongs to the region before it, which mirrors it.
    """
    cols = max(cols * MANY_BANDS // max(bands, MANY_BANDS) // BLOCK, 1) * BLOCK
    for row, height in _cuts(shape[0], rows):
        for col, width in _cuts(shape[1], cols):
            yield Region(row, col, height, width)


def _cuts(length: int, step: int) -> list[tuple[int, int]]:
    starts = [s for s in range(0, length, step) if s == 0 or length - s >= BLOCK]
    return [(a, b - a) for a, b in zip(starts, [*starts[1:], length], strict=True)]


def circular_pieces(start: int, count: int, size: int) -> list[tuple[int, int]]:
    """Parts (start, length) of 0 .. size that follow each other from `start` on, circularly."""
    pieces = []
    while count:
        first = start % size
        length = min(count, size - first)
        pieces.append((first, length))
        start, count = start + length, count - length
    return pieces


def _clean(keep: Tensor, window: int, stride: int) -> Tensor:
    """(rows, cols) True where a whole window of (H, W) is kept; there may be none."""
    return clean_windows(keep, window, stride, required=False)


@dataclass
class Mean:
    """Mean of values that come in portions."""

    what: str
    total: Tensor | float = 0.0
    count: int = 0

    def add(self, values: Tensor, keep: Tensor) -> None:
        """Add the values (..., H, W) where `keep` (H, W) is True."""
        self.add_sum(values[..., keep].sum(-1), int(keep.sum()))

    def add_sum(self, total: Tensor, count: int) -> None:
        self.total = self.total + total
        self.count += count

    def value(self) -> Tensor:
        if not self.count:
            raise ValueError(
                f"no {self.what} without nodata is left to measure; check the nodata value or take a larger image"
            )
        return torch.as_tensor(self.total / self.count, dtype=torch.float64)


# ------------------------------------------------------------------------- reduced resolution


class AgainstReference:
    """Scores against a reference, as `reduced_resolution` gives them.

    Args:
        shape: (height, width) of the image after its border is cut.
        ratio: PAN pixels per MS pixel along one axis; only ERGAS depends on it.
        peak: largest possible DN.

    Raises:
        ValueError: an image smaller than one window.
    """

    def __init__(self, shape: Shape, *, ratio: float, peak: float) -> None:
        require_window(shape, BLOCK)
        self.shape, self.ratio, self.peak = shape, ratio, peak
        self._mse, self._level = Mean("pixel"), Mean("pixel")
        self._angle = Mean("pixel of non-zero spectra and")
        self._q, self._q2n = Mean(TILE), Mean(TILE)
        self._ssim, self._gradients = Mean("window of 11 x 11 pixels"), Mean("pixel")

    def needed(self, region: Region) -> Region:
        """The part of both images that `add` takes for a region."""
        return region.grown(1, BLOCK - 1, self.shape)

    def add(self, region: Region, fused: Tensor, gt: Tensor, mask: Tensor | None = None) -> None:
        """Add one region: `fused` and `gt` (C, h, w) in DN and `mask` (h, w) over `needed(region)`.

        Raises:
            ValueError: shapes that do not fit.
        """
        outer = self.needed(region)
        _require_shape(fused, outer)
        if mask is not None and bool(mask.all()):
            return
        f, g, keep = prepare(fused, gt, mask)
        here = region.within(outer)
        core = f[..., *here], g[..., *here], keep[here]
        self._add_pixels(*core)
        self._add_tiles(*core)
        self._add_windows(f, g, keep, here)
        self._add_gradients(f, g, keep, region, outer)

    def _add_pixels(self, f: Tensor, g: Tensor, keep: Tensor) -> None:
        self._mse.add((f - g)[0] ** 2, keep)
        self._level.add(g[0], keep)
        angled = keep & ((f * f).sum(1) * (g * g).sum(1) > 0)[0]
        count = int(angled.sum())
        if count:
            self._angle.add_sum(sam(f, g, mask=~angled)[0] * count, count)

    def _add_tiles(self, f: Tensor, g: Tensor, keep: Tensor) -> None:
        self._q2n.add(q2n_tiles(f, g, BLOCK)[0], _clean(fill_tiles(keep, BLOCK), BLOCK, BLOCK))

    def _add_windows(self, f: Tensor, g: Tensor, keep: Tensor, here: tuple[slice, slice]) -> None:
        """Add the sliding windows whose upper left pixel lies in the region."""
        part = _longer(here, BLOCK - 1)
        clean = _clean(keep[part], BLOCK, 1)
        self._q.add(window_quality(f[..., *part], g[..., *part], BLOCK, 1)[0], clean)
        part = _longer(here, SSIM_WINDOW - 1)
        count = int(_clean(keep[part], SSIM_WINDOW, 1).sum())
        if count:
            mean = ssim(f[..., *part], g[..., *part], self.peak, mask=~keep[part])[0]
            self._ssim.add_sum(mean * count, count)

    def _add_gradients(self, f: Tensor, g: Tensor, keep: Tensor, region: Region, outer: Region) -> None:
        """Add the Sobel gradients of the image without its outermost pixels, beyond which all is 0."""
        around, core = self._inner(region.grown(1, 1, self.shape)), self._inner(region)
        part, here = around.within(outer), core.within(around)
        kept = ~dilate(~keep[part], 1)[here]
        a, b = (_gradient(x[..., *part])[0][..., *here][:, kept] for x in (f, g))
        sums = torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()])
        self._gradients.add_sum(sums, int(kept.sum()))

    def _inner(self, region: Region) -> Region:
        """The region without the image's outermost pixels."""
        top, left = max(region.row, 1), max(region.col, 1)
        bottom = min(region.row + region.height, self.shape[0] - 1)
        right = min(region.col + region.width, self.shape[1] - 1)
        return Region(top, left, bottom - top, right - left)

    def scores(self) -> ReducedResolution:
        """Scores of all regions added, each without axes; ValueError if nothing is left to measure."""
        mse, level = self._mse.value(), self._level.value()
        relative = torch.where(mse > 0, mse / level**2, 0.0)
        return ReducedResolution(
            q2n=self._q2n.value(),
            q=self._q.value().mean(),
            sam=self._angle.value(),
            ergas=100.0 / self.ratio * relative.mean().sqrt(),
            scc=self._cosine(),
            psnr=10.0 * torch.log10(self.peak**2 / mse.mean()),
            ssim=self._ssim.value(),
        )

    def _cosine(self) -> Tensor:
        product, power_f, power_g = self._gradients.value()
        if power_f == 0 and power_g == 0:
            return torch.ones_like(product)
        norm = (power_f * power_g).sqrt()
        return product / norm if norm > 0 else torch.zeros_like(product)


def _longer(part: tuple[slice, slice], by: int) -> tuple[slice, slice]:
    """The part with `by` more rows and columns; indexing stops at the end by itself."""
    rows, cols = part
    return slice(rows.start, rows.stop + by), slice(cols.start, cols.stop + by)


def _require_shape(image: Tensor, region: Region) -> None:
    if image.ndim != 3 or image.shape[1:] != (region.height, region.width):
        raise ValueError(
            f"an image (C, {region.height}, {region.width}) is needed for this region, not"
            f" {tuple(image.shape)}; read what `needed` returns"
        )


# --------------------------------------------------------------------------- full resolution


@dataclass(frozen=True)
class Coarse:
    """MS and PAN at the MS's resolution, in DN and finite; masks are True at nodata or where it was mixed in.

    They lie on the MS grid, or on the PAN grid once `Enlargement` has enlarged them.
    """

    ms: Tensor
    """(C, h, w)"""
    ms_mask: Tensor
    """(h, w)"""
    pan: Tensor
    """(1, h, w)"""
    pan_mask: Tensor
    """(h, w)"""


class WithoutReference:
    """Scores without a reference, as `full_resolution` gives them.

    A tile counts for an index where every pixel that the index looks at holds data.

    Args:
        shape: (height, width) of the image, multiples of 32 (see `whole_tiles`).
        gains: MTF gains of the sensor's bands, or one for all.
        ratio: PAN pixels per MS pixel along one axis.

    Raises:
        ValueError: a shape with incomplete tiles.
    """

    def __init__(self, shape: Shape, gains: Sequence[float], *, ratio: int = 4) -> None:
        if whole_tiles(shape) != shape:
            raise ValueError(
                f"{shape[0]} x {shape[1]} pixels hold incomplete tiles; leave out what exceeds"
                f" {whole_tiles(shape)[0]} x {whole_tiles(shape)[1]}"
            )
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
            fused, fused_mask: (C, h', w') and (h', w'), over `needed(region)`.
            pan, pan_mask: (1, h, w) and (h, w).
            low: MS and reduced PAN, both enlarged to the region.

        Raises:
            ValueError: shapes that do not fit.
        """
        outer = self.needed(region)
        here = region.within(outer)
        _require_shape(fused, outer)
        for image in (pan, low.ms, low.pan):
            _require_shape(image, region)
        bad = fused_mask[here] | low.ms_mask
        if bool(bad.all()):
            return
        unclear = pan_mask | low.pan_mask
        fused = _zeroed(fused, fused_mask)
        f, m = fused[..., *here][None], _zeroed(low.ms, low.ms_mask)[None]
        p, small = (_zeroed(x, unclear)[None] for x in (pan, low.pan))

        blurred = mtf_filter(fused, self.gains, self.ratio)[..., *here][None]
        spoiled = dilate(fused_mask, MTF_REACH)[here] | low.ms_mask
        self._khan.add(q2n_tiles(blurred, m, BLOCK)[0], _clean(~spoiled, BLOCK, BLOCK))

        clean = _clean(~bad, BLOCK, BLOCK)
        self._between_fused.add(between_bands(f)[0], clean)
        self._between_lms.add(between_bands(m)[0], clean)
        clean = _clean(~(bad | unclear), BLOCK, BLOCK)
        self._to_pan.add(window_quality(f, p.expand_as(f), BLOCK, BLOCK)[0], clean)
        self._to_low.add(window_quality(m, small.expand_as(m), BLOCK, BLOCK)[0], clean)

    def scores(self) -> FullResolution:
        """Scores of all regions added, each without axes; ValueError if nothing is left to measure."""
        between = self._between_fused.value() - self._between_lms.value()
        return FullResolution(
            d_lambda_k=1 - self._khan.value(),
            d_lambda=between.abs().mean() if between.numel() else between.new_zeros(()),
            d_s=(self._to_pan.value() - self._to_low.value()).abs().mean(),
        )

    @property
    def tiles(self) -> int:
        """Number of tiles that counted for D_s, the most demanding index."""
        return self._to_pan.count


def _zeroed(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, 0.0, x.to(torch.float64))


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
    as `sharpen` does; right for georeferenced scenes.
    "pancollection": the toolbox's interp23tap, sample i at ``4 i + 2``, half a PAN pixel further down and right, as in
    published scores; for ratios 2, 4 and 8.

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
        images, masks = (window.ms, window.pan), (window.ms_mask, window.pan_mask)
        ms, pan = (self._image(x) for x in images)
        ms_mask, pan_mask = (self._mask(x) for x in masks)
        return Coarse(ms, ms_mask, pan, pan_mask)

    def _image(self, x: Tensor) -> Tensor:
        x = x.to(torch.float64)
        large = interp23tap(x, self.ratio) if self.circular else upsample(x[None], self.ratio)[0]
        return crop(large, self.margin * self.ratio)

    def _mask(self, mask: Tensor) -> Tensor:
        mixed = crop(dilate(mask, self.margin), self.margin)
        return mixed.repeat_interleave(self.ratio, 0).repeat_interleave(self.ratio, 1)
