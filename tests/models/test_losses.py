import math

import numpy as np
import pytest
import torch

from uknowpan_models.losses import (
    contrast_weighted_gradient,
    contrast_weighted_rms,
    spectral_angle,
)


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


def test_gradient_is_blind_to_levels_and_sees_edges():
    target, error = patches()
    assert float(contrast_weighted_gradient(target + 5, target)) == pytest.approx(0, abs=1e-5)
    e, t = error.double().numpy(), target.double().numpy()
    weight = 1 / (np.abs(t).mean((2, 3)) + 0.1)
    rows = np.abs(np.diff(e, axis=2)).mean((2, 3))
    cols = np.abs(np.diff(e, axis=3)).mean((2, 3))
    expected = (0.5 * (rows + cols) * weight).mean()
    found = float(contrast_weighted_gradient(target + error, target))
    assert found == pytest.approx(expected, rel=1e-4)


def test_spectral_angle_of_a_known_turn():
    truth = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1).expand(1, 2, 5, 5)
    turn = math.radians(2.0)
    turned = torch.stack(
        [
            truth[:, 0] * math.cos(turn) - truth[:, 1] * math.sin(turn),
            truth[:, 0] * math.sin(turn) + truth[:, 1] * math.cos(turn),
        ],
        1,
    )
    assert float(spectral_angle(7 * turned, truth)) == pytest.approx(turn, rel=2e-2)
    assert float(spectral_angle(7 * truth, truth)) < 2e-3  # the length does not matter


def test_spectral_angle_at_the_truth_has_a_slope():
    truth = torch.rand(1, 4, 6, 6, generator=torch.Generator().manual_seed(1)) + 0.1
    fused = truth.clone().requires_grad_()
    spectral_angle(fused, truth).backward()
    assert fused.grad.isfinite().all()
