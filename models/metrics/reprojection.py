"""Quality at full resolution by reprojection: a result is blurred and sampled as the sensor sees the MS.

R-Q2n, R-Q, R-SAM, R-ERGAS and D_rho follow Scarpa and Ciotola, "Full-Resolution Quality Assessment for
Pansharpening", Remote Sens. 2022, 14(8):1808. The thresholded D_rho and D_sR follow Ciotola, Poggi and Scarpa
(lambda-PNN), IEEE TGRS 2023. `d_rho_excess` and `colour_grain` are the product's own.

There are two modes. `Published` samples each band at the whole PAN pixel, 0 to 3, at which MS and PAN correlate best.
It keeps the slips of the published tool. `Registered` samples each band where a displacement puts it, and clips
correlations to [-1, 1].

`measure` reads images by `regions`, so that a scene of any size needs bounded memory. Pixels, windows and tiles that
depend on nodata are left out. All is float64.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.metrics.images import (
    Images,
    Read,
    blurred,
    box_around,
    clean,
    fill,
    gaussian_taps,
    inside_of,
    mtf_kernel,
    read_region,
    sample,
)
from uknowpan.models.metrics.indices import relative_error, spectral_angle
from uknowpan.models.metrics.q2n import tile_quality
from uknowpan.models.metrics.regions import BLOCK, TILE, Mean, Region, read_circular, regions
from uknowpan.models.metrics.toolbox import INTERP23TAP_REACH, interp23tap
from uknowpan.models.metrics.windows import clean_windows, dilate, require_window, separable, window_quality, window_sum

ROWS, COLS = 64, 160
"""Default size of a region in MS pixels: multiples of 32."""

PHASES = 4
"""Number of whole PAN pixels along an axis that the published registration tries, whatever the ratio."""

THRESHOLD_WINDOW = 8
"""Half of the window in which the threshold of the thresholded D_rho is taken."""

EXCESS_WINDOW = 5
"""Window of the correlations of `d_rho_excess`, in MS pixels for the MS and in PAN pixels for the result."""

GRAIN_SIGMA, GRAIN_REACH = 3.0, 12
"""Gaussian that `colour_grain` takes detail off with, and its reach in PAN pixels."""

LEAST_STD = 1e-10
"""Standard deviation that stands for a flat band of a tile."""

TINY = 1e-20
"""Floor of the powers in a local correlation."""

FLAT = 1e-12
"""Variance over power below which a window has no correlation."""

Displacement = Callable[[Tensor, Tensor], Tensor]
"""PAN rows (h,) and columns (w,) to displacements (C or 1, 2, h, w) in PAN pixels, + is down and right.

The MS shows at x + d(x) what the PAN shows at x, as `registration` measures it.
"""


@dataclass(frozen=True)
class Reprojection:
    """Scores by reprojection."""

    r_q2n: float
    """Q2n of the reprojected result and the MS: best 1."""
    r_q: float
    """Universal quality index, mean of the bands: best 1."""
    r_sam: float
    """Spectral angle in degrees."""
    r_ergas: float
    """Relative dimensionless error."""
    d_rho: float
    """1 - local correlation of each band with the PAN."""
    d_rho_thr: float
    """D_rho of the pixels whose value exceeds that of MS and low-pass PAN; NaN for a published ratio without U."""
    d_sr: float
    """Share of the PAN's variance that no linear combination of the bands explains."""
    d_sr_intercept: float
    """The same for combinations with a constant."""
    d_rho_excess: float
    """Mean of max(0, rho(MS, low-pass PAN) - rho(result, PAN)); NaN in the published mode."""
    colour_grain: float
    """rms of the bands' own fine detail over that of their common detail."""
    phases: tuple[tuple[int, int], ...] | None = None
    """(row, column) of each band in the published mode."""

    @property
    def d_lambda_align(self) -> float:
        """Spectral distortion 1 - R-Q2n."""
        return 1 - self.r_q2n

    @property
    def rqnr_align(self) -> float:
        """R-Q2n (1 - D_sR): best 1."""
        return self.r_q2n * (1 - self.d_sr)

    def rqnr(self, d_lambda_k: float) -> float:
        """(1 - D_lambda of Khan) (1 - D_sR): best 1."""
        return (1 - d_lambda_k) * (1 - self.d_sr)


# -------------------------------------------------------------------------------- correlations


def _margins(half: int) -> tuple[int, int]:
    """Pixels before and after a region that `local_correlation` takes."""
    return 2 * half - 2, 2 * half


def local_correlation(a: Tensor, b: Tensor, inside: Tensor, half: int) -> Tensor:
    """Correlation (C, h, w) in windows of 2 half x 2 half pixels, rows y - half + 1 to y + half, not clipped.

    Each pixel has the mean of its own window taken off; outside of the image all is 0.

    Args:
        a, b: (C or 1, ., .) with `_margins` around the h x w pixels, 0 outside of the image.
        inside: (., .), True within the image.
        half: half the side of a window.
    """
    side, part = 2 * half, (..., slice(half - 1, -half), slice(half - 1, -half))
    x, y = (
        torch.where(inside[part], image[part] - window_sum(image[:, None], side)[:, 0] / side**2, 0.0)[:, None]
        for image in (a, b)
    )
    power = window_sum(x * x, side).clamp_min(TINY) * window_sum(y * y, side).clamp_min(TINY)
    return (window_sum(x * y, side) / (power.sqrt() + TINY))[:, 0]


def pearson(a: Tensor, b: Tensor, window: int) -> Tensor:
    """Correlation of two images (C or 1, H, W) in each whole window, within [-1, 1]; 0 where one is flat."""
    n = window**2
    a, b = ((x - x.mean())[:, None] for x in (a, b))
    sum_a, sum_b = window_sum(a, window), window_sum(b, window)
    power_a, power_b = n * window_sum(a * a, window), n * window_sum(b * b, window)
    var_a, var_b = power_a - sum_a**2, power_b - sum_b**2
    textured = (var_a > FLAT * power_a) & (var_b > FLAT * power_b)
    norm = torch.where(textured, var_a * var_b, torch.inf).sqrt()
    return ((n * window_sum(a * b, window) - sum_a * sum_b) / norm).clamp(-1.0, 1.0)[:, 0]


def find_phases(
    images: Images,
    gain: float,
    *,
    rows: int = ROWS,
    cols: int = COLS,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[tuple[int, int]], Tensor]:
    """Phase (row, column) of each band by the published registration, and its scores (C, 4, 4).

    The PAN is low-passed by the MTF gain of the first band. The score of (i, j) is the mean correlation of the band
    with every ratio-th of its pixels from (i, j) on. Nothing beyond 0 to 3, or the ratio, is looked at.
    """
    r, half = images.ratio, images.ratio // 2
    before, after = _margins(half)
    tried = min(PHASES, r)
    means = [[Mean("pixel") for _ in range(tried)] for _ in range(tried)]
    todo = list(regions(images.shape, images.bands, rows=rows, cols=cols))
    for done, region in enumerate(todo, 1):
        outer = region.padded(before, after)
        inner = outer.clipped(images.shape)
        ms, ms_mask = read_region(images.ms, outer, images.shape)
        low, low_mask = blurred(images.pan, inner.scaled(r), images.large, [mtf_kernel(gain, r)])
        inside = inside_of(outer, images.shape)
        for i in range(tried):
            for j in range(tried):
                rho = local_correlation(ms, fill(low[:, i::r, j::r], inner, outer), inside, half)
                keep = clean(ms_mask | fill(low_mask[i::r, j::r], inner, outer), before, after)
                means[i][j].add(rho, keep)
        if on_progress is not None:
            on_progress(done, len(todo))
    scores = torch.stack([torch.stack([mean.value() for mean in line], -1) for line in means], -2)
    best = [int(np.argmax(band.flatten().numpy())) for band in scores]  # the first of equals
    return [divmod(index, tried) for index in best], scores


# --------------------------------------------------------------------------------------- modes


@dataclass(frozen=True)
class Published:
    """The published protocol: whole phases, a fixed frame, filters of the sensor's MTF."""

    gains: Sequence[float]
    """MTF gain of each band."""
    phases: Sequence[tuple[int, int]]
    """(row, column) of each band, see `find_phases`."""

    def reprojected(self, images: Images, region: Region) -> tuple[Tensor, Tensor]:
        """The result (C, h, w) in a region of MS pixels as the sensor sees it, and its nodata (h, w)."""
        r = images.ratio
        low, mask = blurred(images.fused, region.scaled(r), images.large, [mtf_kernel(g, r) for g in self.gains])
        x = torch.stack([low[band, i::r, j::r] for band, (i, j) in enumerate(self.phases)])
        return x, torch.stack([mask[i::r, j::r] for i, j in set(self.phases)]).any(0)

    def at_low_resolution(self, images: Images, region: Region) -> tuple[Tensor, Tensor, Tensor]:
        """Low-pass PAN (1, h, w), enlarged MS (C, h, w) and their nodata (h, w) in a region of PAN pixels.

        The PAN continues as its mirror image without the edge, the MS at its opposite side.
        """
        r = images.ratio
        low, mask = blurred(images.pan, region, images.large, [mtf_kernel(self.gains[0], r)], "reflect")
        margin = math.ceil(INTERP23TAP_REACH * (r - 1) / r)
        row, col = region.row // r, region.col // r
        height, width = -(-(region.row + region.height) // r) - row, -(-(region.col + region.width) // r) - col
        outer = Region(row, col, height, width).padded(margin, margin)
        ms, ms_mask = read_circular(images.ms, outer, images.shape)
        here = region.within(outer.scaled(r))
        mixed = dilate(ms_mask, margin).repeat_interleave(r, 0).repeat_interleave(r, 1)
        return low, interp23tap(ms, r)[..., *here], mask | mixed[here]


@dataclass(frozen=True)
class Registered:
    """The measured protocol: each band is sampled where its displacement puts it."""

    kernels: Sequence[Tensor]
    """Low-pass filter (41, 41) of each band."""
    displacement: Displacement | None = None
    """None: the MS lies where its pixel areas are."""

    def _moved(self, rows: Tensor, cols: Tensor, sign: float) -> tuple[Tensor, Tensor]:
        """PAN rows (h,) and columns (w,) plus or minus the displacement there: twice (C or 1, h, w)."""
        y, x = torch.meshgrid(rows, cols, indexing="ij")
        if self.displacement is None:
            return y[None], x[None]
        field = self.displacement(rows, cols)
        return y + sign * field[:, 0], x + sign * field[:, 1]

    def at_ms(self, images: Images, read: Read, region: Region) -> tuple[Tensor, Tensor]:
        """An image (C, h, w), low-passed, at the places of a region of MS pixels, and its nodata (h, w).

        Places outside of the image are nodata.
        """
        rows, cols = (
            images.ratio * (first + torch.arange(count, dtype=torch.float64)) + (images.ratio - 1) / 2
            for first, count in ((region.row, region.height), (region.col, region.width))
        )
        y, x = self._moved(rows, cols, -1.0)
        (height, width), (y_in, x_in) = images.large, (y.clamp(0, images.large[0] - 1), x.clamp(0, images.large[1] - 1))
        outside = (y < 0) | (y > height - 1) | (x < 0) | (x > width - 1)
        box = box_around(y_in, x_in)
        low, mask = blurred(read, box, images.large, self.kernels)
        gone = sample(dilate(mask, 2)[None].double(), y_in - box.row, x_in - box.col, cubic=False) > 0
        return sample(low, y_in - box.row, x_in - box.col), (outside | gone).any(0)

    def reprojected(self, images: Images, region: Region) -> tuple[Tensor, Tensor]:
        """The result (C, h, w) in a region of MS pixels as the sensor sees it, and its nodata (h, w)."""
        return self.at_ms(images, images.fused, region)

    def on_ms(self, images: Images, region: Region) -> tuple[Tensor, Tensor]:
        """Fractional MS rows and columns (C or 1, h, w) of a region of PAN pixels, kept within the MS."""
        rows, cols = (
            first + torch.arange(count, dtype=torch.float64)
            for first, count in ((region.row, region.height), (region.col, region.width))
        )
        y, x = ((place - (images.ratio - 1) / 2) / images.ratio for place in self._moved(rows, cols, 1.0))
        return y.clamp(0, images.shape[0] - 1), x.clamp(0, images.shape[1] - 1)

    def at_low_resolution(self, images: Images, region: Region) -> tuple[Tensor, Tensor, Tensor]:
        """Low-pass PAN (1, h, w), enlarged MS (C, h, w) and their nodata (h, w) in a region of PAN pixels."""
        low, mask = blurred(images.pan, region, images.large, self.kernels[:1])
        y, x = self.on_ms(images, region)
        box = box_around(y, x)
        ms, ms_mask = read_region(images.ms, box, images.shape, "replicate")
        gone = sample(dilate(ms_mask, 2)[None].double(), y - box.row, x - box.col, cubic=False) > 0
        return low, sample(ms, y - box.row, x - box.col), mask | gone.any(0)

    def excess(self, images: Images, region: Region) -> tuple[Tensor, Tensor]:
        """max(0, rho(MS, low-pass PAN) - rho(result, PAN)) (C, H, W) of a region of PAN pixels, and where it counts.

        The first correlation, taken on the MS grid, is enlarged linearly.
        """
        side = EXCESS_WINDOW // 2
        outer = region.padded(side, side)
        (f, f_mask), (p, p_mask) = (read_region(read, outer, images.large) for read in (images.fused, images.pan))
        keep = clean(f_mask | p_mask | ~inside_of(outer, images.large), side, side)
        y, x = self.on_ms(images, region)
        box = box_around(y, x, 0, 1)
        around = box.padded(side, side)
        ms, ms_mask = read_region(images.ms, around, images.shape)
        low, low_mask = self.at_ms(images, images.pan, around)
        bad = ~clean(ms_mask | low_mask | ~inside_of(around, images.shape), side, side)
        y, x = y - box.row, x - box.col
        coarse = sample(pearson(ms, low, EXCESS_WINDOW), y, x, cubic=False)
        keep &= ~(sample(bad[None].double(), y, x, cubic=False) > 0).any(0)
        return (coarse - pearson(f, p, EXCESS_WINDOW)).clamp_min(0.0), keep


# ------------------------------------------------------------------------------------- measure


def measure(
    images: Images,
    modes: Sequence[Published | Registered],
    *,
    rows: int = ROWS,
    cols: int = COLS,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Reprojection]:
    """All scores of a result, in each of the modes.

    Args:
        images: result, PAN and MS.
        modes: the ways in which the three are brought together.
        rows, cols: size of a region in MS pixels, multiples of 32.
        on_progress: called with (regions done, regions).

    Raises:
        ValueError: an MS smaller than one window of 32 x 32 pixels, or nothing left to measure.
    """
    require_window(images.shape, BLOCK)
    shared = _SharedSums(images)
    sums = [_Sums(images, mode) for mode in modes]
    todo = list(regions(images.shape, images.bands, rows=rows, cols=cols))
    for done, region in enumerate(todo, 1):
        correlation = shared.add(region.scaled(images.ratio))
        for own in sums:
            own.add(region, *correlation)
        if on_progress is not None:
            on_progress(done, len(todo))
    return [own.scores(shared) for own in sums]


@dataclass(frozen=True)
class Detail:
    """The scores of `Reprojection` that depend on fine detail alone."""

    d_rho: float
    d_rho_excess: float
    colour_grain: float
    """NaN without any detail."""


def detail(images: Images, mode: Registered, *, rows: int = ROWS, cols: int = COLS) -> Detail:
    """The scores of fine detail, for images of any size; arguments and errors as in `measure`."""
    shared, excess = _SharedSums(images), Mean("window")
    for region in regions(images.shape, images.bands, rows=rows, cols=cols):
        core = region.scaled(images.ratio)
        shared.add(core)
        excess.add(*mode.excess(images, core))
    return Detail(float(shared.d_rho.value().mean()), float(excess.value().mean()), shared.colour_grain())


class _SharedSums:
    """Sums over regions of the scores that are the same in all modes."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.d_rho, self.moments, self.grain = Mean("window"), Mean("pixel"), Mean("pixel")

    def add(self, core: Region) -> tuple[Tensor, Tensor]:
        """Add a region of PAN pixels; its correlation with the PAN (C, H, W), and where it is free of nodata."""
        images, half = self.images, math.ceil(self.images.ratio / 2)
        reach = max(GRAIN_REACH, *_margins(half))
        outer = core.padded(reach, reach)
        (f, f_mask), (p, p_mask) = (
            read_region(read, outer, images.large, "replicate") for read in (images.fused, images.pan)
        )
        self._add_grain(f, f_mask, core, outer)
        here = core.within(outer)
        valid = ~(f_mask | p_mask)[here]
        rows = torch.cat([f[..., *here], p[..., *here], torch.ones_like(p[..., *here])])[:, valid]
        self.moments.add_sum(rows @ rows.T, int(valid.sum()))
        before, after = _margins(half)
        part = core.padded(before, after).within(outer)
        inside = inside_of(core.padded(before, after), images.large)
        f, p = (torch.where(inside, image[..., *part], 0.0) for image in (f, p))
        rho = local_correlation(f, p, inside, half)
        keep = clean((f_mask | p_mask)[part], before, after)
        self.d_rho.add(1 - rho.clamp(-1.0, 1.0), keep)
        return rho, keep

    def _add_grain(self, f: Tensor, mask: Tensor, core: Region, outer: Region) -> None:
        """Add the powers of the bands' own and of their common fine detail."""
        part = core.padded(GRAIN_REACH, GRAIN_REACH).within(outer)
        smooth = separable(f[..., *part], gaussian_taps(GRAIN_SIGMA, GRAIN_REACH))
        keep = clean(mask[part], GRAIN_REACH, GRAIN_REACH) & (smooth > 0).all(0)
        detail = f[..., *core.within(outer)] / torch.where(smooth > 0, smooth, 1.0) - 1
        common = detail.mean(0)
        self.grain.add(torch.stack([(detail - common).square().mean(0), common.square()]), keep)

    def colour_grain(self) -> float:
        """Grain of all regions added; NaN without any detail."""
        own, common = self.grain.value()
        return float((own / common).sqrt()) if float(common) > 0 else math.nan


class _Sums:
    """Sums over regions of the scores of one mode."""

    def __init__(self, images: Images, mode: Published | Registered) -> None:
        self.images, self.mode = images, mode
        self.published = isinstance(mode, Published)
        self.has_threshold = not self.published or images.ratio & (images.ratio - 1) == 0
        self._mse, self._level, self._angle = Mean("pixel"), Mean("pixel"), Mean("pixel of non-zero spectra and")
        self._q, self._q2n = Mean(TILE), Mean(TILE)
        self._d_rho_thr, self._excess = Mean("window"), Mean("window")

    def add(self, region: Region, rho: Tensor, clear: Tensor) -> None:
        """Add a region of MS pixels and the PAN pixels in it, whose correlation with the PAN is `rho`."""
        outer = region.grown(0, BLOCK - 1, self.images.shape)
        x, x_mask = self.mode.reprojected(self.images, outer)
        m, m_mask = self.images.ms(outer)
        keep = ~(x_mask | m_mask)
        x, m = (torch.where(keep, image, 0.0) for image in (x, m))
        here = (..., slice(region.height), slice(region.width))
        self._add_pixels(x[here], m[here], keep[here])
        self._add_tiles(x[here], m[here], keep[here])
        self._add_windows(x, m, keep, outer)
        core = region.scaled(self.images.ratio)
        if self.has_threshold:
            self._add_threshold(core, rho, clear)
        if isinstance(self.mode, Registered):
            self._excess.add(*self.mode.excess(self.images, core))

    def _add_pixels(self, x: Tensor, m: Tensor, keep: Tensor) -> None:
        self._mse.add((x - m) ** 2, keep)
        self._level.add(m, keep)
        angle, has_angle = (part[0] for part in spectral_angle(x[None], m[None]))
        angle = torch.where(has_angle, angle, 0.0)
        self._angle.add(angle, keep if self.published else keep & has_angle)

    def _add_tiles(self, x: Tensor, m: Tensor, keep: Tensor) -> None:
        pads = (0, -keep.shape[1] % BLOCK, 0, -keep.shape[0] % BLOCK)
        whole = not (self.images.shape[0] % BLOCK or self.images.shape[1] % BLOCK)
        x, m = (F.pad(image, pads, mode="reflect")[None] for image in (x, m))
        if self.published and not whole:
            x, m = x.trunc(), m.trunc()
        filled = F.pad(keep[None].double(), pads, mode="reflect")[0] > 0
        self._q2n.add(tile_quality(x, m, BLOCK, LEAST_STD)[0], clean_windows(filled, BLOCK, BLOCK))

    def _add_windows(self, x: Tensor, m: Tensor, keep: Tensor, outer: Region) -> None:
        """Add the windows that begin in the region; the published tool has one more than fits at the far edges."""
        if self.published:
            ends = outer.row + outer.height, outer.col + outer.width
            more = [int(end == size) for end, size in zip(ends, self.images.shape, strict=True)]
            x, m, edge = (F.pad(y, (0, more[1], 0, more[0]), mode="replicate") for y in (x, m, keep[None].double()))
            keep = edge[0] > 0
        clean = clean_windows(keep, BLOCK, 1)
        self._q.add(window_quality(x[None], m[None], BLOCK, 1)[0], clean)

    def _add_threshold(self, core: Region, rho: Tensor, clear: Tensor) -> None:
        """Add 1 - rho where it exceeds that of the low-pass PAN and the enlarged MS."""
        large, (before, after) = self.images.large, _margins(THRESHOLD_WINDOW)
        outer = core.padded(before, after)
        inner = outer.clipped(large)
        pan, ms, mask = (fill(x, inner, outer) for x in self.mode.at_low_resolution(self.images, inner))
        low = local_correlation(ms, pan, inside_of(outer, large), THRESHOLD_WINDOW)
        distance, limit = 1 - rho.clamp_min(-1.0), 1 - low
        if not self.published:
            distance, limit = distance.clamp_min(0.0), limit.clamp(0.0, 2.0)
        self._d_rho_thr.add(torch.where(distance > limit, distance, 0.0), clear & clean(mask, before, after))

    def scores(self, shared: _SharedSums) -> Reprojection:
        """Scores of all regions added; ValueError if nothing is left to measure."""
        moments = shared.moments.value()
        return Reprojection(
            r_q2n=float(self._q2n.value()),
            r_q=float(self._q.value().mean()),
            r_sam=float(self._angle.value()),
            r_ergas=float(relative_error(self._mse.value(), self._level.value(), self.images.ratio)),
            d_rho=float(shared.d_rho.value().mean()),
            d_rho_thr=float(self._d_rho_thr.value().mean()) if self.has_threshold else math.nan,
            d_sr=_unexplained(moments, constant=False),
            d_sr_intercept=_unexplained(moments, constant=True),
            d_rho_excess=math.nan if self.published else float(self._excess.value().mean()),
            colour_grain=shared.colour_grain(),
            phases=tuple(self.mode.phases) if isinstance(self.mode, Published) else None,
        )


def _unexplained(moments: Tensor, constant: bool) -> float:
    """Variance of the PAN that a regression on the bands leaves, over its variance.

    `moments` (C + 2, C + 2) holds the mean products of C bands, PAN and 1.
    """
    bands = len(moments) - 2
    chosen = [*range(bands), bands + 1] if constant else list(range(bands))
    gram, cross = moments[chosen][:, chosen], moments[chosen, bands]
    unit = gram.diagonal().clamp_min(TINY).rsqrt()
    weights = unit * (torch.linalg.pinv(unit[:, None] * gram * unit, rtol=1e-13, hermitian=True) @ (unit * cross))
    mean = moments[bands, -1] - weights @ moments[chosen, -1]
    square = moments[bands, bands] - 2 * weights @ cross + weights @ gram @ weights
    variance = moments[bands, bands] - moments[bands, -1] ** 2
    return max(float((square - mean**2) / variance), 0.0) if float(variance) > 0 else 0.0
