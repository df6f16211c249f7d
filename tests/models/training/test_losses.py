import numpy as np
import pytest
import torch

from uknowpan.models.training.losses import contrast_weighted_rms


def patches():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 8, 8, generator=generator)
    return target, 0.1 * torch.randn(2, 3, 8, 8, generator=generator)


def test_rms_counts_every_band_alike():
    target, error = patches()
    found = float(contrast_weighted_rms(target + error, target))
    e, t = error.double().numpy(), target.double().numpy()
    rms = np.sqrt((e**2).mean((2, 3))) / (np.sqrt((t**2).mean((2, 3))) + 0.1)
    assert found == pytest.approx(rms.mean(), rel=1e-4)


def test_rms_is_least_at_the_mean_of_what_is_possible():
    """L1 is least at the median: of 0, 0, 3 it would answer 0."""
    target = torch.tensor([0.0, 0.0, 3.0]).view(1, 1, 1, 3)
    answer = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([answer], lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        contrast_weighted_rms(answer.expand(1, 1, 1, 3), target).backward()
        optimizer.step()
    assert float(answer.detach()) == pytest.approx(1.0, abs=1e-3)


def test_rms_of_a_perfect_answer_has_a_slope():
    target, _ = patches()
    x0 = target.clone().requires_grad_()
    contrast_weighted_rms(x0, target).backward()
    assert x0.grad.isfinite().all()
