"""Small test files in PanCollection's layout, for tests of `evaluate`."""

from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from uknowpan.models.metrics.toolbox import interp23tap
from uknowpan.models.pancollection.protocol import wald_ms


def draw_truth(seed: int, bands: int = 4, size: int = 64) -> Tensor:
    """(C, H, W) float64, about 200 to 1400: waves that the bands share, and some of their own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]

    def waves(count: int) -> np.ndarray:
        terms = [
            np.sin(fy * y + fx * x + phase) for fy, fx, phase in rng.uniform((-0.9, -0.9, 0), (0.9, 0.9, 6), (count, 3))
        ]
        return np.sum(terms, 0) / np.sqrt(count / 2)

    shared = waves(12)
    images = [700 + 60 * b + 110 * (1 + b / 8) * (shared + 0.5 * waves(6)) for b in range(bands)]
    return torch.from_numpy(np.stack(images))


def store(path: Path, images: dict[str, np.ndarray | Tensor], **attributes: object) -> Path:
    """Images (N, C, H, W) or (C, H, W) under the keys of the layout."""
    with h5py.File(path, "w") as file:
        for name, values in images.items():
            file[name] = np.asarray(values)[None] if values.ndim == 3 else np.asarray(values)
        file.attrs.update(attributes)
    return path


def write_images(
    path: Path, *, count: int = 2, bands: int = 4, size: int = 64, gt: bool = True, seed: int = 0, **attributes: object
) -> Path:
    """Drawn images whose MS is degraded by gains of 0.3; without truth PAN and MS are the same."""
    truth = torch.stack([draw_truth(seed + i, bands, size) for i in range(count)])
    ms = torch.stack([wald_ms(x, [0.3] * bands, 4) for x in truth])
    images = {"pan": truth.mean(1, keepdim=True), "ms": ms, "lms": interp23tap(ms, 4)}
    return store(path, images | ({"gt": truth} if gt else {}), **attributes)
