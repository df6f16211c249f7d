"""Make ssdiff.npz: what `SSDiff` answers today, so that no change of it goes unnoticed.

Not an independent check, as student.npz is: the network's parts are compared with formulas in
numpy in tests/models/published/ssdiff/test_ssdiff.py. Run this file to write the golden file anew, only if the
network is meant to change.
"""

from pathlib import Path

import numpy as np
import torch
from make_golden import seeded_state

from uknowpan.models.published.ssdiff.network import SSDiff, SSDiffConfig
from uknowpan.models.types import Condition, Denoised

SEED, SIZE, RATIO, TIMESTEPS = 7, (64, 96), 4, (3, 900)
CASES = {
    "ours": SSDiffConfig(bands=3, width=16, window=8, detail_gain=1.0, noise_gain=1.0),
    "coarse": SSDiffConfig(bands=3, width=16, window=8, grid=2),
    "published": SSDiffConfig(
        bands=3, width=32, window=0, frequency_window=0, batch_norm=True, group_norm=True,
        detail_gain=1.0, noise_gain=1.0, measured_ms=True,
    ),
}  # fmt: skip


def answer(config: SSDiffConfig) -> Denoised:
    """The answer of a network with seeded weights to seeded inputs of two images."""
    network = SSDiff(config).double().eval()
    made = seeded_state({k: v.shape for k, v in network.named_parameters()})
    network.load_state_dict(made, strict=False)
    rng = np.random.default_rng(SEED)

    def drawn(channels: int, factor: int = 1) -> torch.Tensor:
        shape = (2, channels, SIZE[0] // factor, SIZE[1] // factor)
        return torch.from_numpy(rng.standard_normal(shape))

    condition = Condition(lms=drawn(config.bands), pan=drawn(1), ms=drawn(config.bands, RATIO))
    with torch.no_grad():
        return network(drawn(config.bands), torch.tensor(TIMESTEPS), condition)


if __name__ == "__main__":
    found = {name: answer(config).x0[:, :, ::4, ::4].numpy() for name, config in CASES.items()}
    np.savez_compressed(Path(__file__).parent / "ssdiff.npz", **found)
