"""Scenes without pixels: sums of plane waves, whose blur and sampling are known in closed form."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F

from uknowpan.models.metrics.images import Images
from uknowpan.models.metrics.regions import Region


class Texture:
    """A random field with the 1/f spectrum of natural images, of about unit variance."""

    def __init__(self, seed, waves=250):
        rng = np.random.default_rng(seed)
        frequency = np.exp(rng.uniform(np.log(0.01), np.log(0.45), waves))  # cycles per PAN pixel
        angle = rng.uniform(0, np.pi, waves)
        self.fy, self.fx = frequency * np.sin(angle), frequency * np.cos(angle)
        self.amplitude = np.sqrt(2 / waves) * np.exp(2j * np.pi * rng.uniform(size=waves))

    def __call__(self, y, x, sigma=0.0):
        """Values (len(y), len(x)) behind a Gaussian of `sigma`, at PAN coordinates y and x."""
        mtf = np.exp(-2 * (np.pi * sigma) ** 2 * (self.fy**2 + self.fx**2))
        rows = np.exp(2j * np.pi * np.outer(y, self.fy)) * (self.amplitude * mtf)
        return (rows @ np.exp(2j * np.pi * np.outer(x, self.fx)).T).real


@dataclass(frozen=True)
class Pair:
    pan: torch.Tensor
    ms: torch.Tensor
    gt: torch.Tensor


@cache
def make_pair(ratio=4, size=(32, 32), bands=4, sigma=None, shift=(0.0, 0.0), seed=0, common=1.0):
    """PAN (1, H, W), MS (C, h, w) and truth (C, H, W), float32.

    sigma: of the MS's Gaussian in PAN pixels, default 0.5 * ratio. shift: see `Psf`. common: how
    much of what the bands show they share; PAN is the mean of the bands.
    """
    sigma = 0.5 * ratio if sigma is None else sigma
    shared = Texture(seed)
    own = [Texture((seed, b + 1)) for b in range(bands)]
    level = np.linspace(6, 9, bands)[:, None, None]
    gain = np.linspace(0.6, 1.4, bands)[:, None, None]

    def sample(y, x, blur):
        values = [common * shared(y, x, blur) + 0.4 * o(y, x, blur) for o in own]
        return torch.from_numpy(level + gain * np.stack(values))

    fine = [np.arange(n * ratio, dtype=float) for n in size]
    coarse = [ratio * np.arange(n) + (ratio - 1) / 2 + s for n, s in zip(size, shift, strict=True)]
    gt = sample(*fine, 0.0)
    return Pair(gt.mean(0, keepdim=True).float(), sample(*coarse, sigma).float(), gt.float())


def images_of(fused, pan, ms, mask=None):
    """`Images` from tensors: fused (C, H, W), pan (1, H, W), ms (C, h, w), mask (H, W) True at nodata."""
    ratio = fused.shape[-2] // ms.shape[-2]
    bad = torch.zeros(fused.shape[-2:], dtype=torch.bool) if mask is None else mask
    small = F.max_pool2d(bad[None].double(), ratio)[0] > 0

    def reader(x, nodata):
        x = torch.where(nodata, 0.0, x.double())

        def read(region):
            here = region.within(Region(0, 0, *nodata.shape))
            return x[..., *here], nodata[here]

        return read

    return Images(tuple(ms.shape[-2:]), len(ms), ratio, reader(fused, bad), reader(pan, bad), reader(ms, small))
