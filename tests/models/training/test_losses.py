import numpy as np
import pytest
import torch

from uknowpan.models.training.losses import beta_nll, contrast_weighted_l1, contrast_weighted_rms


def patches():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 8, 8, generator=generator)
    return target, 0.1 * torch.randn(2, 3, 8, 8, generator=generator)


def test_every_band_counts_alike():
    target, error = patches()
    e, t = error.double().numpy(), target.double().numpy()
    rms = np.sqrt((e**2).mean((2, 3))) / (np.sqrt((t**2).mean((2, 3))) + 0.1)
    assert float(contrast_weighted_rms(target + error, target)) == pytest.approx(rms.mean(), rel=1e-4)
    l1 = np.abs(e).mean((2, 3)) / (np.abs(t).mean((2, 3)) + 0.1)
    assert float(contrast_weighted_l1(target + error, target)) == pytest.approx(l1.mean(), rel=1e-4)


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


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_beta_nll_is_least_at_the_size_of_the_error(beta):
    error = torch.tensor([0.1, 1.0, 7.0]).view(1, 1, 1, 3)
    log_sigma = error.log().requires_grad_()
    value = beta_nll(error, log_sigma, beta)
    expected = np.mean(error.numpy() ** (2 * beta) * (0.5 + np.log(error.numpy())))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
    (at_size,) = torch.autograd.grad(value, log_sigma)
    assert at_size.abs().max() < 1e-5
    wide = (2 * error).log().requires_grad_()
    (slope,) = torch.autograd.grad(beta_nll(error, wide, beta), wide)
    # d/d log_sigma = sigma^(2 beta) (1 - error^2 / sigma^2), a third of it for the mean of three
    torch.testing.assert_close(slope, (2 * error) ** (2 * beta) * 0.75 / 3)
