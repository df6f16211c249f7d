"""Resampling between the MS and the PAN grid, of arrays and tensors alike.

Pixel areas nest: the centre of MS pixel ``i`` lies at PAN index ``ratio * i + (ratio - 1) / 2``.
Borders are replicated; callers that must not see them read a margin.

All filters are separable. Their weights are computed once, by NumPy. Arrays are filtered by matrix products over
strided views, tensors by convolutions with the same weights, on any device and with gradients. PyTorch is imported
only where a tensor comes in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Array = npt.NDArray[Any]
Image = TypeVar("Image", npt.NDArray[Any], "Tensor")
"""An array or a tensor; a function returns what it was given."""

UPSAMPLE_REACH = 2
"""MS pixels around an interpolated pixel that it depends on."""


def like(values: Any, image: Image) -> Image:
    """An array or a tensor as the kind of `image`, in its dtype and on its device.

    A GPU keeps what it was once given: a copy from common memory makes the host wait for all work before it.
    """
    if isinstance(image, np.ndarray):
        return np.asarray(values, image.dtype)
    import torch

    if image.device.type == "cpu" or isinstance(values, torch.Tensor):
        return torch.as_tensor(values).to(image)
    values = np.asarray(values)
    return _on_device(values.tobytes(), values.dtype.str, values.shape, image.dtype, image.device)


@lru_cache(maxsize=256)
def _on_device(content: bytes, kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    import torch

    with torch.inference_mode(False):  # what sharpening puts there must serve training too
        return torch.from_numpy(np.frombuffer(content, kind).reshape(shape).copy()).to(device, dtype)


def keys(x: Array, a: float = -0.5) -> Array:
    """Cubic convolution kernel (Keys 1981, a = -1/2)."""
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


HALF_OF_23_TAPS = (
    *(0.5, 0.305334091185, 0.0, -0.072698593239, 0.0, 0.021809577942),
    *(0.0, -0.005192756653, 0.0, 0.000807762146, 0.0, -0.000060081482),
)
"""Taps of the DLPan-Toolbox's interpolator from the centre outwards; all 23 sum to 1."""
_FINE = 64
"""Places per MS pixel at which `taps23` is tabulated."""


@lru_cache(maxsize=1)
def _table23() -> Array:
    """`taps23` at 0, 1 / 64, 2 / 64 ..: the answer to an impulse, doubled again and again."""
    half = 2 * np.array(HALF_OF_23_TAPS)
    taps, answer = np.concatenate([half[:0:-1], half]), np.ones(1)
    for _ in range(_FINE.bit_length() - 1):
        stuffed = np.zeros(2 * len(answer) - 1)
        stuffed[::2] = answer
        answer = np.convolve(stuffed, taps)
    return answer[len(answer) // 2 :]


def taps23(x: Array) -> Array:
    """The kernel that the toolbox's 23 taps make, at distances of MS pixels; exact at multiples of 1 / 64."""
    table = _table23()
    weights: Array = np.interp(np.abs(x) * _FINE, np.arange(len(table)), table, right=0.0)
    return weights


KERNELS = {"keys": (keys, UPSAMPLE_REACH), "23 taps": (taps23, 10)}
"""Name -> kernel of the enlarged MS, and MS pixels that an interpolated pixel depends on."""


@lru_cache(maxsize=64)
def _phase_taps(ratio: int, offset: float, kernel: str = "keys") -> Array:
    """(ratio, 2 reach + 1) taps over MS pixels i - reach .. i + reach for each of the PAN pixels inside MS pixel i.

    Half a PAN pixel of offset is the most that they hold. PAN pixels then lie within half an
    MS pixel of the sample i.
    """
    centre = (np.arange(ratio) - (ratio - 1) / 2 - offset) / ratio
    weigh, reach = KERNELS[kernel]
    return weigh(centre[:, None] - np.arange(-reach, reach + 1)).astype(np.float32)


def registration_offset(registration: str, ratio: int) -> float:
    """PAN pixels by which MS samples lie beyond the nested centres, along rows and columns.

    Raises:
        ValueError: a registration that is neither "area" nor "pancollection".
    """
    if registration not in ("area", "pancollection"):
        raise ValueError(f"registration {registration!r} is unknown; take area or pancollection")
    return ratio // 2 - (ratio - 1) / 2 if registration == "pancollection" else 0.0


def _rows(x: Array, taps: Array, reach: int, step: int = 1) -> Array:
    """(..., n, W) filtered along its rows' axis: (P, K) taps give P rows for every `step` rows; borders replicated."""
    length = x.shape[-2]
    x = x.take(np.arange(-reach, length + reach).clip(0, length - 1), axis=-2)
    windows = sliding_window_view(x, taps.shape[1], axis=-2)[..., ::step, :, :].swapaxes(-1, -2)
    y: Array = taps.astype(x.dtype, copy=False) @ windows
    return y.reshape(*x.shape[:-2], -1, x.shape[-1])


def upsample(ms: Image, ratio: int, offset: float = 0.0, kernel: str = "keys") -> Image:
    """Interpolate MS to the PAN grid by cubic convolution, or another of `KERNELS`: ``lms``.

    Args:
        ms: (B, C, h, w).
        ratio: PAN pixels per MS pixel.
        offset: PAN pixels by which the MS samples lie beyond the nested centres, for rows and
            columns alike; at most half a pixel either way.
        kernel: a name of `KERNELS`.

    Returns:
        (B, C, ratio * h, ratio * w).

    Raises:
        ValueError: an offset of more than half a pixel.
    """
    if not abs(offset) <= 0.5:
        raise ValueError(f"MS samples {offset:g} PAN pixels off; resample them to 0.5 or less")
    taps, (_, reach) = _phase_taps(ratio, float(offset), kernel), KERNELS[kernel]
    if isinstance(ms, np.ndarray):
        for _ in range(2):  # columns first: what is turned is small then
            ms = _rows(ms.swapaxes(-1, -2), taps, reach)
        return ms
    from torch.nn import functional

    b, c, h, w = ms.shape
    weights = like(taps, ms)
    x = functional.pad(ms.reshape(b * c, 1, h, w), (reach,) * 4, mode="replicate")
    x = functional.conv2d(x, weights[:, None, :, None])  # (BC, ratio, h, w + 2 reach)
    x = x.transpose(1, 2).reshape(b * c, 1, h * ratio, w + 2 * reach)
    x = functional.conv2d(x, weights[:, None, None, :])  # (BC, ratio, H, w)
    return x.permute(0, 2, 3, 1).reshape(b, c, h * ratio, w * ratio)


@lru_cache(maxsize=64)
def _upsample_matrix(length: int, ratio: int, offset: float) -> Array:
    """(ratio * length, length) matrix of `upsample` along one axis."""
    return _rows(np.eye(length, dtype=np.float32), _phase_taps(ratio, offset), UPSAMPLE_REACH)


def upsample_small(ms: Image, ratio: int, offset: float = 0.0) -> Image:
    """`upsample` by matrix products; the results differ by rounding only.

    Ten times as fast on tensors of a few dozen MS pixels; the cost per pixel grows with the window.
    """
    rows, cols = (like(_upsample_matrix(n, ratio, float(offset)), ms) for n in ms.shape[-2:])
    lms: Image = rows @ (ms @ cols.T)
    return lms


def degrade_reach(sigma: float, shift: tuple[float, float], ratio: int) -> int:
    """MS pixels around a degraded pixel that it depends on."""
    return math.ceil((3.0 * sigma + max(abs(shift[0]), abs(shift[1]))) / ratio + 0.5)


Kernel = Callable[[Array], Array]
"""Weight as a function of the distance (PAN pixels) from the sampling position."""


def gaussian(sigma: float) -> Kernel:
    """Gaussian of standard deviation `sigma` PAN pixels."""
    return lambda x: np.exp(-0.5 * (x / sigma) ** 2)


def box(width: float) -> Kernel:
    """Mean over `width` PAN pixels; pixels at the edge have partial weight."""
    return lambda x: np.clip(width / 2 + 0.5 - np.abs(x), 0, 1)


def cubic(stretch: float) -> Kernel:
    """Cubic convolution stretched by `stretch` (the ratio: antialiased; 1: not)."""
    return lambda x: keys(x / stretch)


def tent(width: float) -> Kernel:
    """Linear from the middle to 0 at `width` PAN pixels: a box blurred by itself."""
    return lambda x: np.maximum(1 - np.abs(x) / width, 0)


def lanczos(stretch: float) -> Kernel:
    """Lanczos of three lobes, stretched by `stretch` (the ratio: antialiased)."""
    return lambda x: np.where(np.abs(x) < 3 * stretch, np.sinc(x / stretch) * np.sinc(x / (3 * stretch)), 0.0)


def _taps(kernel: Kernel, shift: float, ratio: int, reach: int) -> Array:
    offsets = np.arange(-reach * ratio, (reach + 1) * ratio, dtype=np.float64)
    taps = kernel(offsets - (ratio - 1) / 2 - shift)
    weights: Array = (taps / taps.sum()).astype(np.float32)
    return weights


def filtered(x: Image, down: Array, across: Array, reach: int, step: int = 1) -> Image:
    """Every `step`-th pixel of (B, C, H, W) after a separable filter; borders replicated.

    Args:
        x: the images.
        down: (K,) taps along the rows' axis.
        across: (K,) taps along the columns' axis.
        reach: pixels beyond a border that the first taps lie on.
        step: divisor of H and W.
    """
    if isinstance(x, np.ndarray):
        turned = _rows(x, down[None], reach, step).swapaxes(-1, -2)
        return np.ascontiguousarray(_rows(turned, across[None], reach, step).swapaxes(-1, -2))
    from torch.nn import functional

    b, c, height, width = x.shape
    y = functional.pad(x.reshape(b * c, 1, height, width), (reach,) * 4, mode="replicate")
    y = functional.conv2d(y, like(down, x)[None, None, :, None], stride=(step, 1))
    y = functional.conv2d(y, like(across, x)[None, None, None, :], stride=(1, step))
    return y.reshape(b, c, height // step, width // step)


def joined(parts: Sequence[Image], axis: int = 1) -> Image:
    """Arrays or tensors side by side along an axis."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts, axis)
    import torch

    return torch.cat(list(parts), axis)


def decimate(x: Image, ratio: int, kernel: Kernel, shift: tuple[float, float], reach: int) -> Image:
    """Filter by a separable kernel and sample at the MS pixels' centres.

    Args:
        x: (B, C, H, W), H and W multiples of the ratio.
        ratio: PAN pixels per MS pixel.
        kernel: 1-D profile of the filter; normalised here.
        shift: (dy, dx) in PAN pixels, added to the sampling positions.
        reach: MS pixels on either side that the filter spans.

    Returns:
        (B, C, H / ratio, W / ratio).
    """
    down, across = (_taps(kernel, s, ratio, reach) for s in shift)
    return filtered(x, down, across, reach * ratio, ratio)


def degrade(pan: Image, ratio: int, sigma: float, shift: tuple[float, float] = (0.0, 0.0)) -> Image:
    """`decimate` with a Gaussian of `sigma` PAN pixels: the action of a `Psf` on the PAN."""
    return decimate(pan, ratio, gaussian(sigma), shift, degrade_reach(sigma, shift, ratio))


def box_mean(x: Image, size: int) -> Image:
    """Mean of (B, C, h, w) over an odd size x size window; at borders over the pixels that exist."""
    half = size // 2
    if isinstance(x, np.ndarray):
        for axis in (-2, -1):
            total = x.copy()
            a, b = (y.swapaxes(0, axis) for y in (x, total))
            for k in range(1, half + 1):
                b[k:] += a[:-k]
                b[:-k] += a[k:]
            at, last = np.arange(len(a)), len(a) - 1
            count = np.minimum(at + half, last) - np.maximum(at - half, 0) + 1
            b *= (1 / count).astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            x = total
        return x
    from torch.nn import functional

    x = functional.avg_pool2d(x, (size, 1), 1, (half, 0), count_include_pad=False)
    return functional.avg_pool2d(x, (1, size), 1, (0, half), count_include_pad=False)


def crop(x: Image, margin: int) -> Image:
    """Take `margin` pixels off every side."""
    return x if margin == 0 else x[..., margin:-margin, margin:-margin]


def mirrored(start: int, count: int, length: int) -> npt.NDArray[np.int64]:
    """Indices start .. start + count, reflected about the edges of 0 .. length (edge repeated)."""
    index = np.arange(start, start + count) % (2 * length)
    return np.where(index < length, index, 2 * length - 1 - index)


def reflect(x: Image, margin: int, height: int | None = None, width: int | None = None) -> Image:
    """Images (..., h, w) with `margin` mirrored pixels on every side.

    Args:
        x: the images.
        margin: pixels before the first row and column, and after the last.
        height: rows between the margins; None: h. More than h are mirrored, too.
        width: columns between the margins; None: w.
    """
    h, w = x.shape[-2:]
    rows, cols = (-margin, (height or h) + 2 * margin, h), (-margin, (width or w) + 2 * margin, w)
    if isinstance(x, np.ndarray):
        return x[..., mirrored(*rows), :][..., mirrored(*cols)]
    return x[..., _mirrored_on(*rows, x.device), :][..., _mirrored_on(*cols, x.device)]


@lru_cache(maxsize=64)
def _mirrored_on(start: int, count: int, length: int, device: torch.device) -> Tensor:
    """`mirrored` on a device: a copy for every image would make the host wait."""
    import torch

    with torch.inference_mode(False):
        return torch.from_numpy(mirrored(start, count, length)).to(device)


PIECE = 128
"""PAN rows of a piece of a window; what is made of it stays in a core's cache."""
PIECE_BORDER = 4
"""PAN pixels on every side that are read besides, where there are any."""


@dataclass(frozen=True)
class Span:
    """PAN pixels from `start` to `end` along one axis of a window of `size`, which has a halo."""

    start: int
    end: int
    size: int
    halo: int

    @property
    def read(self) -> slice:
        """The pixels in the window, with the border."""
        return slice(max(self.start - PIECE_BORDER, 0), min(self.end + PIECE_BORDER, self.size))

    def cells(self, size: int) -> slice:
        """The same in cells of 2 or 4 pixels."""
        return slice(self.read.start // size, self.read.stop // size)

    @property
    def inner(self) -> slice:
        """The pixels among those that are read."""
        return slice(self.start - self.read.start, self.end - self.read.start)

    @property
    def whole(self) -> slice:
        """The pixels in the window."""
        return slice(self.start, self.end)

    @property
    def place(self) -> slice:
        """The pixels in the window without its halo."""
        return slice(self.start - self.halo, self.end - self.halo)


def pieces(height: int, width: int, halo: int, rows: int = PIECE) -> Iterator[tuple[Span, Span]]:
    """The spans (down, across) that cover a window without its halo; sizes are multiples of 4."""
    for top in range(halo, height - halo, rows):
        bottom = min(top + rows, height - halo)
        yield Span(top, bottom, height, halo), Span(halo, width - halo, width, halo)
