"""Losses of the stages."""

import torch
from torch import Tensor


def contrast_weighted_l1(x0: Tensor, target: Tensor, floor: float = 0.1) -> Tensor:
    """Mean absolute error, each band of each patch divided by its detail contrast.

    Without the division the few busiest patches would decide what is learnt.

    Args:
        x0: (B, C, H, W) prediction.
        target: (B, C, H, W) truth.
        floor: contrast (units of x0) below which patches count as flat.
    """
    contrast = target.abs().mean((-2, -1)) + floor
    return ((x0 - target).abs().mean((-2, -1)) / contrast).mean()


def contrast_weighted_rms(x0: Tensor, target: Tensor, floor: float = 0.1) -> Tensor:
    """Root mean square error, each band of each patch divided by its RMS detail contrast.

    ERGAS measures the same. A few large errors count fully, and the best prediction is the mean
    of the possible truths (with `contrast_weighted_l1` their median). Arguments as there.
    """
    contrast = target.square().mean((-2, -1)).sqrt() + floor
    error = (x0 - target).square().mean((-2, -1))
    return ((error + 1e-8).sqrt() / contrast).mean()  # its slope at 0 would be infinite


def beta_nll(error: Tensor, log_sigma: Tensor, beta: float = 0.5) -> Tensor:
    """sg(sigma^2)^beta * (error^2 / sigma^2 + log sigma^2) / 2 (Seitzer et al. 2022, equation 5).

    Args:
        error: (B, C, H, W) prediction less truth.
        log_sigma: (B, C, H, W) natural logarithm of the predicted 1-sigma.
        beta: 0 is the plain Gaussian likelihood; 1 weighs all pixels alike.
    """
    variance = torch.exp(2 * log_sigma)
    nll = 0.5 * (error**2 / variance + 2 * log_sigma)
    return (variance.detach() ** beta * nll).mean()
