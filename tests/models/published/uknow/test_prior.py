import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.training.losses import beta_nll

GOLDEN = Path(__file__).parents[3] / "golden"
SMALL = PriorConfig(bands=2, width=8, blocks=2)


def _inputs(size=(12, 9), bands=2):
    generator = torch.Generator().manual_seed(1)
    lms = torch.rand(2, bands, *size, generator=generator)
    return lms, torch.rand(2, 1, *size, generator=generator)


def _net(config=SMALL, head=0.0):
    """Untrained; its head is zero then, unless noise of that size is put in."""
    torch.manual_seed(0)
    net = PriorNet(config)
    with torch.no_grad():
        net.head.weight.add_(head * torch.randn_like(net.head.weight))
    return net


@pytest.mark.parametrize("case", ["published", "ours"])
def test_forward_equals_golden(case, monkeypatch):
    monkeypatch.syspath_prepend(GOLDEN)
    script = importlib.import_module("make_golden_teacher")
    golden = np.load(GOLDEN / "teacher.npz")
    net = PriorNet(script.PRIOR_CASES[case])
    shapes = {k: v.shape for k, v in net.state_dict().items()}
    net.load_state_dict(script.seeded_state(shapes))
    inputs = script.seeded_inputs(3)
    with torch.no_grad():
        mean, variance = net(inputs["lms"].float(), inputs["pan"].float())
    np.testing.assert_allclose(mean.numpy(), golden[f"prior_{case}_mean"], atol=2e-5)
    np.testing.assert_allclose(variance.numpy(), golden[f"prior_{case}_variance"], atol=2e-5)


def test_untrained_it_expects_the_lms():
    net, (lms, pan) = _net(), _inputs()
    mean, variance = net(lms, pan)
    assert torch.equal(mean, lms)
    torch.testing.assert_close(variance, torch.full_like(variance, 1e-3 + 1e-6))


def test_gradient_reaches_every_parameter():
    net, (lms, pan) = _net(head=0.1), _inputs()
    mean, variance = net(lms, pan)
    (mean.square().sum() + variance.sum()).backward()
    assert [n for n, p in net.named_parameters() if not p.grad.abs().max()] == []


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("floor", [1e-6, 1e-2])
def test_variance_is_positive_however_sure_the_net_is(amp, floor):
    net, (lms, pan) = _net(replace(SMALL, variance_floor=floor)), _inputs()
    with torch.no_grad():
        net.head.bias[2:] = -200.0
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        mean, variance = net(lms, pan)
    assert mean.dtype == variance.dtype == torch.float32
    assert mean.isfinite().all()
    torch.testing.assert_close(variance, torch.full_like(variance, floor))
    assert beta_nll(lms - mean, 0.5 * variance.log(), beta=0).isfinite()


def test_convolutions_start_with_the_variance_of_their_fan_in():
    net = _net(PriorConfig(8))
    for name, weight in net.named_parameters():
        if name.startswith("head"):
            continue
        if name.endswith("bias"):
            assert not weight.any(), name
        else:
            expected = (2 / weight[0].numel()) ** 0.5
            assert float(weight.detach().std()) == pytest.approx(expected, rel=0.05), name


def _noise_found(seed: int) -> float:
    """Learnt variance of a noisy right half over that of a clean left half."""
    torch.manual_seed(seed)
    net = PriorNet(SMALL)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    lms, pan = torch.rand(4, 2, 8, 16), torch.zeros(4, 1, 8, 16)
    pan[..., 8:] = 1
    for _ in range(250):
        gt = lms + 0.2 * pan * torch.randn_like(lms)
        mean, variance = net(lms, pan)
        loss = beta_nll(gt - mean, 0.5 * variance.log(), beta=0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    variance = net(lms, pan)[1].detach()
    return float(variance[..., 10:].mean() / variance[..., :6].mean())


def test_learns_where_it_errs():
    """One start in six or so ends in a flat variance, so the best of three counts."""
    assert max(_noise_found(seed) for seed in range(3)) > 3


@pytest.mark.parametrize("highpass_pan", [True, False])
def test_only_the_release_is_blind_to_the_brightness_of_pan(highpass_pan):
    net, (lms, pan) = _net(replace(SMALL, highpass_pan=highpass_pan), head=0.1), _inputs()
    same = torch.allclose(net(lms, pan)[0], net(lms, pan + 1)[0], atol=1e-4)
    assert same == highpass_pan


def test_a_pixel_depends_on_its_surroundings_only():
    net, (lms, pan) = _net(head=0.1), _inputs((41, 41))
    reach = 3 * SMALL.blocks + 2 + 2  # the high-pass takes the last two
    changed = lms.clone()
    changed[..., 20, 20] += 1
    differs = (net(lms, pan)[0] != net(changed, pan)[0]).any(1).any(0)
    rows = differs.any(1).nonzero().flatten()
    assert rows.min() == 20 - (reach - 2) and rows.max() == 20 + (reach - 2)
    brighter = pan.clone()
    brighter[..., 20, 20] += 1
    rows = (net(lms, pan)[0] != net(lms, brighter)[0]).any(1).any(0).any(1).nonzero().flatten()
    assert rows.min() == 20 - reach and rows.max() == 20 + reach


def test_what_does_not_fit():
    net, (lms, pan) = _net(), _inputs()
    with pytest.raises(ValueError, match="3 bands, but this PriorNet was built for 2"):
        net(torch.cat([lms, pan], 1), pan)
    with pytest.raises(ValueError, match=r"pan must be \(2, 1, 12, 9\), not \(2, 1, 8, 9\)"):
        net(lms, pan[:, :, :8])
    with pytest.raises(ValueError, match="bands must be at least 1, not 0"):
        PriorConfig(0)
