"""The teacher with its prior: what it is shown, what learns, and what a file brings back."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from patch_files import guided_config, stirred

from uknowpan.models.checkpoints import Card, build_network, load_model, save_checkpoint
from uknowpan.models.diffusion import NoiseSchedule, ddim_sample
from uknowpan.models.errors import CheckpointError
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.prior import PriorNet
from uknowpan.models.types import Condition

CONFIG = guided_config(patch=2)
STD = [0.02, 0.03, 0.04, 0.05]


def guided(config=CONFIG):
    torch.manual_seed(0)
    model = stirred(GuidedTeacher(config))
    model.residual_std.copy_(torch.tensor(STD))
    return model


def inputs(count=2, size=16):
    generator = torch.Generator().manual_seed(1)
    lms, pan = (torch.rand(count, c, size, size, generator=generator) for c in (4, 1))
    x_t = torch.randn(count, 4, size, size, generator=generator)
    return x_t, torch.tensor([499, 20])[:count], Condition(lms, pan)


def card_of(config, architecture="fsa-t"):
    return Card("t", architecture, config, "fsa-t", bands=4, residual_std=STD)


def same(a, b):
    tensors = zip((a.x0, a.log_sigma, *a.features), (b.x0, b.log_sigma, *b.features), strict=True)
    return all(torch.equal(x, y) for x, y in tensors)


def test_a_file_brings_back_both_networks_and_the_scale(tmp_path):
    model = guided()
    config = json.loads(json.dumps(asdict(CONFIG)))
    assert config["teacher"]["multipliers"] == [1, 2, 2, 4] and config["raw_prior"] is False
    save_checkpoint(tmp_path / "t.safetensors", model, card_of(config))
    loaded, card = load_model(tmp_path / "t.safetensors")
    assert card.config == config and loaded.config == CONFIG
    assert loaded.residual_std.tolist() == pytest.approx(STD)
    assert same(loaded(*inputs()), model(*inputs()))


def test_a_prior_is_a_checkpoint_of_its_own(tmp_path):
    net = PriorNet(CONFIG.prior)
    save_checkpoint(tmp_path / "p.safetensors", net, card_of(asdict(CONFIG.prior), "prior"))
    loaded, _ = load_model(tmp_path / "p.safetensors")
    known = inputs()[2]
    for x, y in zip(loaded(known.lms, known.pan), net(known.lms, known.pan), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "config",
    [
        {"teacher": {"bands": 4, "colour": 1}, "prior": {"bands": 4}},
        {"teacher": 4, "prior": {"bands": 4}},
        {"teacher": {"bands": 4}},
        {"teacher": {"bands": 4}, "prior": {"bands": 8}},
    ],
    ids=["unknown field", "a number", "no prior", "other bands"],
)
def test_configs_that_fit_no_teacher_are_refused(config):
    with pytest.raises(CheckpointError, match="config does not fit architecture fsa-t"):
        build_network(card_of(config))


@pytest.mark.parametrize("raw", [False, True], ids=["standardised", "raw"])
def test_what_the_teacher_is_shown_of_the_prior(raw):
    model = guided(replace(CONFIG, raw_prior=raw))
    x_t, t, known = inputs()
    mean, variance = model.prior_net(known.lms, known.pan)
    if not raw:
        unit = torch.tensor(STD).view(4, 1, 1)
        mean, variance = (mean - known.lms) / unit, 2 * (variance.sqrt() / unit).log()
    vector = model.teacher.encode_prior(mean, variance)
    torch.testing.assert_close(model.encode_prior(known), vector)
    expected = model.teacher(x_t, t, known, vector)
    output = model(x_t, t, known)
    torch.testing.assert_close(output.x0, expected.x0)
    assert same(output, model(x_t, t, known, model.encode_prior(known)))
    assert not same(output, model(x_t, t, known, torch.zeros_like(vector)))


def test_the_teacher_learns_to_read_a_prior_that_does_not_change():
    model = guided().train()
    assert model.training and model.teacher.training and not model.prior_net.training
    output = model(*inputs())
    (output.x0.square().mean() + output.log_sigma.square().mean()).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("prior_net."):
            assert parameter.grad is None, name
        elif name.startswith("teacher.prior."):
            assert parameter.grad.abs().max() > 0, name


def test_under_autocast_the_prior_keeps_its_precision():
    model, outputs = guided(), []
    model.prior_net.register_forward_hook(lambda net, args, output: outputs.append(output))
    model(*inputs())
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs())
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_variance_of_zero_has_a_logarithm():
    model = guided(replace(CONFIG, prior=replace(CONFIG.prior, variance_floor=0.0)))
    with torch.no_grad():
        model.prior_net.head.bias[4:] = -1e4
    known = inputs()[2]
    assert (model.prior_net(known.lms, known.pan)[1] == 0).all()
    assert model.encode_prior(known).isfinite().all()


@pytest.mark.parametrize("mistaken", [False, True])
@pytest.mark.parametrize("carried", [False, True])
def test_a_denoiser_looks_at_the_prior_once(carried, mistaken):
    model, asked = guided(), []
    noise, _, known = inputs()
    options = {"respaced_time_index": mistaken, "self_conditioning": carried}
    schedule = NoiseSchedule.cosine()
    steps = schedule.respace(3)
    with torch.no_grad():
        expected = ddim_sample(model, noise, steps, schedule, known, **options)
        model.prior_net.register_forward_hook(lambda *call: asked.append(call))
        sampled = ddim_sample(model.denoiser(known), noise, steps, schedule, known, **options)
        assert len(asked) == 1
        torch.testing.assert_close(sampled.x0, expected.x0)
        assert len(sampled.features) == 6
        changed = options | {"self_conditioning": not carried}
        other = ddim_sample(model, noise, steps, schedule, known, **changed)
    assert not torch.allclose(other.x0, sampled.x0, atol=1e-4)
