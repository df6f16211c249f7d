"""Q2n of tiles by hypercomplex algebra (Garzelli and Nencini, GRSL 2009), in the toolbox's variant."""

import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.resample import reflect


def q2n_tiles(fused: Tensor, gt: Tensor, block: int) -> Tensor:
    """Quality (B, rows, cols) of each tile of two images (B, C, H, W) in DN, rounded and mirrored to whole tiles."""
    # Negative values are lost in the toolbox, too.
    fused, gt = (fill_tiles(torch.floor(x + 0.5).clamp(0, 65535), block) for x in (fused, gt))
    return tile_quality(fused, gt, block, torch.finfo(fused.dtype).eps)


def tile_quality(fused: Tensor, gt: Tensor, block: int, least_deviation: float) -> Tensor:
    """Quality (B, rows, cols) of each tile of two images (B, C, H, W), H and W multiples of `block`.

    `least_deviation` stands for the standard deviation of a flat band of the reference.
    """
    a, b = _tiles(gt, block), _tiles(fused, block)  # (n, B, rows, cols, M)
    pixels = a.shape[-1]
    unbias = pixels / (pixels - 1)
    a, b = _normalise(a, b, least_deviation)
    b = _conjugate(b)
    mean_a, mean_b = a.mean(-1), b.mean(-1)  # (n, B, rows, cols)
    power_a, power_b = mean_a.square().sum(0), mean_b.square().sum(0)
    bias = 2 * (power_a * power_b).sqrt() / (power_a + power_b)
    variance = unbias * (a.square().sum(0) + b.square().sum(0)).mean(-1)
    variance = variance - unbias * (power_a + power_b)
    product = _product(a, b).mean(-1) - _product(mean_a, mean_b)
    size = (unbias * product).square().sum(0).sqrt()
    flat = variance == 0
    return torch.where(flat, bias, size * bias * 2 / torch.where(flat, 1.0, variance))


def _tiles(x: Tensor, block: int) -> Tensor:
    """Tiles (n, B, rows, cols, M), n the next power of two, of (B, C, H, W)."""
    bands = x.shape[1]
    x = F.pad(x, (0, 0, 0, 0, 0, (1 << (bands - 1).bit_length()) - bands))
    b, n, height, width = x.shape
    x = x.reshape(b, n, height // block, block, width // block, block)
    return x.permute(1, 0, 2, 4, 3, 5).flatten(-2)


def fill_tiles(x: Tensor, block: int) -> Tensor:
    """Mirror the bottom and the right until whole tiles cover all of (..., H, W)."""
    height, width = (-(-n // block) * block for n in x.shape[-2:])
    return reflect(x, 0, height, width)


def _normalise(a: Tensor, b: Tensor, least_deviation: float) -> tuple[Tensor, Tensor]:
    """Each band by mean and deviation of the reference's tile `a`, plus 1."""
    mean = a.mean(-1, keepdim=True)
    deviation = (a - mean).square().sum(-1, keepdim=True).div(a.shape[-1] - 1).sqrt()
    deviation = torch.where(deviation == 0, least_deviation, deviation)
    # A band of zeros in the reference: the toolbox leaves the other image's band undivided.
    return (a - mean) / deviation + 1, (b - mean) / torch.where(mean == 0, 1.0, deviation) + 1


def _conjugate(x: Tensor) -> Tensor:
    """Hypercomplex conjugate; components on the first axis."""
    return torch.cat([x[:1], -x[1:]])


def _product(x: Tensor, y: Tensor) -> Tensor:
    """Hypercomplex product (Cayley-Dickson); 1, 2, 4, ... components on the first axis."""
    n = len(x)
    if n == 1:
        return x * y
    a, b, c, d = x[: n // 2], x[n // 2 :], y[: n // 2], y[n // 2 :]
    if n == 2:
        return torch.cat([a * c - d * b, a * d + c * b])
    d = _conjugate(d)
    first = _product(a, c) - _product(d, b)
    return torch.cat([first, _product(_conjugate(a), d) + _product(c, _conjugate(b))])
