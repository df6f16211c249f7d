"""Changes of scenes before they are degraded."""

import numpy as np
import pytest
import torch

from uknowpan.models.resample import degrade
from uknowpan.models.training.scenes import Scene, VariantShares, make_variant, subsampled


@pytest.fixture(scope="module")
def scene():
    """Waves, so that halves of a pixel can be told; PAN is the mean of the bands."""
    y, x = torch.meshgrid(torch.arange(200.0), torch.arange(208.0), indexing="ij")
    bands = [torch.sin(y / a + k) + torch.cos(x / b - k) for k, (a, b) in enumerate([(5, 7)] * 3)]
    gt = 100 + 10 * torch.stack(bands)
    return Scene("waves", "none", gt, gt.mean(0, keepdim=True))


def sharpness(x: torch.Tensor) -> float:
    return float((x[..., 1:] - x[..., :-1]).std())


def test_subsampled_truth_and_pan_lie_on_each_other(scene):
    found = subsampled(scene)
    assert torch.equal(found.gt, scene.gt[:, ::2, ::2])
    inner = (..., slice(4, -4), slice(4, -4))
    aligned = (found.pan - found.gt.mean(0, keepdim=True))[inner].abs().mean()
    off = (found.pan[..., 1:, :] - found.gt.mean(0, keepdim=True)[..., :-1, :])[inner].abs().mean()
    assert aligned < 0.3 * off


def test_subsampled_truth_keeps_what_the_pan_loses():
    noise = torch.randn(4, 200, 200, generator=torch.Generator().manual_seed(0))
    scene = Scene("noise", "none", noise, noise.mean(0, keepdim=True))
    found = subsampled(scene)
    assert found.pan.std() < 0.7 * found.gt.mean(0, keepdim=True).std()
    without = subsampled(Scene("noise", "none", noise, None))
    assert without.pan is None and torch.equal(without.gt, found.gt)


def test_shares_say_how_often_a_scene_is_changed(scene):
    def sizes(shares):
        made = (make_variant(scene, np.random.default_rng(seed), shares) for seed in range(12))
        return [max(v.gt.shape[-2:]) for v in made]

    assert min(sizes(VariantShares())) > 104
    assert max(sizes(VariantShares(halved=1.0))) <= 104
    assert max(sizes(VariantShares(subsampled=1.0))) <= 104
    assert len({s <= 104 for s in sizes(VariantShares(halved=0.2, subsampled=0.3))}) == 2


def test_truths_are_blurred_against_their_pan():
    noise = 100 + 10 * torch.randn(4, 96, 96, generator=torch.Generator().manual_seed(0))
    alone = Scene("noise", "none", noise, None)
    blurred = make_variant(alone, np.random.default_rng(3), VariantShares(truth_blur=1.0))
    plain = make_variant(alone, np.random.default_rng(3), VariantShares())
    assert torch.equal(blurred.pan, plain.pan)  # the PAN stays as sharp as the truth was
    assert sharpness(blurred.gt) < 0.95 * sharpness(plain.gt)
    assert sharpness(blurred.ms) < 0.99 * sharpness(plain.ms)
    assert blurred.softness > plain.softness + 0.05


@pytest.mark.parametrize("sigma", [0.4, 0.6, 0.8])
def test_softness_is_that_of_the_truth_against_its_pan(sigma):
    noise = 100 + 10 * torch.randn(3, 128, 128, generator=torch.Generator().manual_seed(0))
    soft = degrade(noise[None], 1, sigma, (0.0, 0.0))[0]
    for seed in range(3):
        scene = Scene("soft", "none", soft, noise.mean(0, keepdim=True))
        found = make_variant(scene, np.random.default_rng(seed), VariantShares()).softness
        assert found == pytest.approx(sigma, abs=0.04)
