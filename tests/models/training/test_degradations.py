import numpy as np
import pytest
import torch

from uknowpan.models.resample import crop
from uknowpan.models.training.degradations import Degradation, degrade_truth, random_degradation, synthetic_pan

KINDS = ["gaussian", "box", "cubic", "cubic-sharp"]
UNSEEN = ["tent", "lanczos"]
"""Training draws none of these."""


@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.7, -0.6)])
@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("kind", [*KINDS, *UNSEEN])
def test_samples_lie_where_they_should(kind, ratio, shift):
    n = 20
    y, x = torch.meshgrid(*[torch.arange(n * ratio, dtype=torch.float64)] * 2, indexing="ij")
    gt = torch.stack([5 + 0.3 * y - 0.2 * x, 0.4 * x])
    ms = degrade_truth(gt, Degradation(ratio, kind, (0.25, 0.3), shift))
    assert ms.shape == (2, n, n)
    centre = ratio * torch.arange(n, dtype=torch.float64) + (ratio - 1) / 2
    row, col = torch.meshgrid(centre + shift[0], centre + shift[1], indexing="ij")
    expected = torch.stack([5 + 0.3 * row - 0.2 * col, 0.4 * col])
    assert crop(ms - expected, 6).abs().max() < 2e-3


@pytest.mark.parametrize("ratio", [2, 4, 6])
def test_each_band_has_its_gain_at_nyquist(ratio):
    gains = (0.15, 0.3, 0.45)
    x = torch.arange(24 * ratio, dtype=torch.float64)
    wave = torch.cos(torch.pi * (x - (ratio - 1) / 2) / ratio)  # period: two MS pixels
    gt = wave.expand(3, 24 * ratio, -1)
    ms = degrade_truth(gt, Degradation(ratio, "gaussian", gains))
    kept = crop(ms, 5).abs().mean((1, 2))
    torch.testing.assert_close(kept, torch.tensor(gains, dtype=torch.float64), rtol=0, atol=0.01)


def test_noise_is_a_share_of_the_detail_contrast():
    gt = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    gt = gt * torch.tensor([1.0, 50.0]).view(2, 1, 1)
    degradation = Degradation(2, "box", noise=0.1)
    clean = degrade_truth(gt, degradation)
    noise = degrade_truth(gt, degradation, torch.Generator().manual_seed(1)) - clean
    contrast = (clean[:, :, 1:] - clean[:, :, :-1]).std((1, 2))
    torch.testing.assert_close(noise.std((1, 2)) / contrast, torch.full((2,), 0.1), rtol=0.05, atol=0)
    again = degrade_truth(gt, degradation, torch.Generator().manual_seed(1)) - clean
    assert torch.equal(noise, again)


def test_unknown_kind():
    with pytest.raises(ValueError, match="'median'"):
        degrade_truth(torch.zeros(1, 8, 8), Degradation(2, "median"))


def test_degradations_vary_within_bounds():
    rng = np.random.default_rng(0)
    drawn = [random_degradation(rng, 3, (2, 4), (1.0, 3.0)) for _ in range(600)]
    assert np.mean([d.ratio == 4 for d in drawn]) == pytest.approx(0.75, abs=0.06)
    assert {d.kind for d in drawn} == set(KINDS)
    gains = np.array([d.gains for d in drawn])
    assert gains.shape == (600, 3)
    assert 0.08 <= gains.min() < 0.15 < 0.45 < gains.max() <= 0.6
    shifts = np.array([d.shift for d in drawn])
    assert 1.5 < np.abs(shifts).max() <= 2
    assert np.abs(shifts.mean(0)).max() < 0.15
    noise = np.array([d.noise for d in drawn])
    assert 0.4 < np.mean(noise == 0) < 0.6
    assert 0.1 < noise.max() <= 0.15
    again = np.random.default_rng(0)
    assert [random_degradation(again, 3, (2, 4), (1.0, 3.0)) for _ in range(600)] == drawn


def test_synthetic_pan_is_a_mixture_of_the_bands():
    generator = torch.Generator().manual_seed(0)
    gt = torch.randn(3, 64, 64, generator=generator).double()
    gt = gt * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1) * 0.1
    gt = gt + torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1)
    shares = []
    for seed in range(20):
        pan = synthetic_pan(gt, np.random.default_rng(seed))
        assert pan.shape == (1, 64, 64)
        bands, level = gt.flatten(1).T.numpy(), pan.flatten().numpy()
        weights, residual, *_ = np.linalg.lstsq(bands, level, rcond=None)
        assert (weights > -0.05).all()
        assert np.sqrt(residual[0] / level.size) < 0.06 * np.diff(pan.numpy()).std()
        shares.append(weights * [1, 10, 100] / np.sum(weights * [1, 10, 100]))
    assert np.allclose(np.mean(shares, 0), 1 / 3, atol=0.15)  # whatever the bands' gains are
    assert torch.equal(pan, synthetic_pan(gt, np.random.default_rng(19)))
