"""Both students: any bands in any order, a bounded reach, and a start as the local injection."""

from dataclasses import replace

import pytest
import torch

from uknowpan.models.checkpoints import network_of
from uknowpan.models.features import BAND_FEATURES, PAN_FEATURES, SCENE_FEATURES, StreamsConfig
from uknowpan.models.network import LiteConfig, compress
from uknowpan.models.types import Condition

TINY = LiteConfig(width=8, deep_width=8, deep_blocks=1)
STREAMS = StreamsConfig(pan_width=8, trunk_width=8, band_width=8, head_width=4)
both = pytest.mark.parametrize("config", [TINY, STREAMS], ids=["lite", "streams"])


def student(config=TINY, seed=0):
    """Random weights everywhere, those that start at zero too."""
    torch.manual_seed(seed)
    model = network_of(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch=1, bands=3, size=(16, 24), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    condition = Condition(
        lms=normal(batch, bands, *size),
        pan=normal(batch, 1, *size),
        pan_features=normal(batch, PAN_FEATURES, *size),
        band_features=normal(batch, bands, BAND_FEATURES, *size),
        scene=normal(batch, SCENE_FEATURES),
    )
    t = torch.randint(0, 500, (batch,), generator=generator)
    return normal(batch, bands, *size), t, condition


def pick_bands(condition, order):
    return replace(condition, lms=condition.lms[:, order], band_features=condition.band_features[:, order])


@both
@pytest.mark.parametrize("bands", range(1, 9))
def test_any_number_of_bands_in_any_order(config, bands):
    model = student(config)
    x_t, t, condition = inputs(2, bands)
    order = torch.randperm(bands, generator=torch.Generator().manual_seed(bands)).tolist()
    with torch.no_grad():
        said = model(x_t, t, condition)
        other = model(x_t[:, order], t, pick_bands(condition, order))
    assert said.x0.shape == said.log_sigma.shape == x_t.shape
    torch.testing.assert_close(other.x0, said.x0[:, order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.log_sigma, said.log_sigma[:, order], rtol=1e-4, atol=1e-5)


@both
def test_bands_see_each_other(config):
    model = student(config)
    x_t, t, condition = inputs()
    changed = x_t.clone()
    changed[:, 2] += 1
    with torch.no_grad():
        difference = model(changed, t, condition).x0[:, 0] - model(x_t, t, condition).x0[:, 0]
    assert difference.abs().max() > 1e-4


@both
def test_the_context_is_a_mean(config):
    """Every band twice: nothing new is told, so the answers stay."""
    model = student(config)
    x_t, t, condition = inputs()
    twice = [0, 0, 1, 1, 2, 2]
    with torch.no_grad():
        once = model(x_t, t, condition).x0
        said = model(x_t[:, twice], t, pick_bands(condition, twice)).x0
    torch.testing.assert_close(said, once[:, twice], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [TINY, LiteConfig(8, 8, blocks=2, deep_blocks=2), LiteConfig(8, 8, 0, 0), STREAMS, StreamsConfig(8, 8, 8, 4, 1, 0)],
)
def test_nothing_beyond_the_reach_is_seen(config):
    model = student(config)
    n = 2 * model.reach + 8
    core = slice(model.reach, model.reach + 8)
    x_t, t, condition = inputs(1, 2, (n, n))
    # The reach must hold for pixels at any place in their 4 x 4 block: one at a time.
    for place in (0, 1, 2, 3):
        pixel = core.start + place
        near = slice(pixel - model.reach, pixel + model.reach + 1)
        other_x, _, other = inputs(1, 2, (n, n), seed=1)
        other = replace(other, scene=condition.scene)
        for mine, theirs in (
            (x_t, other_x),
            *((getattr(condition, k), getattr(other, k)) for k in ("pan_features", "band_features")),
        ):
            theirs[..., near, near] = mine[..., near, near]
        with torch.no_grad():
            here, there = model(x_t, t, condition), model(other_x, t, other)
        for name in ("x0", "log_sigma"):
            a, b = (getattr(d, name)[..., pixel, pixel] for d in (here, there))
            assert torch.equal(a, b)
        assert not torch.equal(here.x0[..., : core.start, :], there.x0[..., : core.start, :])


@both
def test_untrained_it_injects_locally(config):
    torch.manual_seed(0)
    x_t, t, condition = inputs(2)
    with torch.no_grad():
        said = network_of(config)(x_t, torch.full_like(t, 499), condition)
    torch.testing.assert_close(said.x0, condition.band_features[:, :, 1])
    assert said.log_sigma.abs().max() == 0


@pytest.mark.parametrize("size", [(16, 22), (18, 16), (13, 16)])
@both
def test_windows_of_multiples_of_four(size, config):
    with pytest.raises(ValueError, match=f"multiples of 4, not {size[0]} x {size[1]}"):
        student(config)(*inputs(size=size))


@pytest.mark.parametrize("missing", ["band_features", "pan_features", "scene"])
@both
def test_condition_without_features(missing, config):
    x_t, t, condition = inputs()
    with pytest.raises(ValueError, match="generic_condition"):
        student(config)(x_t, t, replace(condition, **{missing: None}))


@both
def test_gradients_reach_every_parameter(config):
    model = student(config).train()
    said = model(*inputs(2))
    (said.x0.square().mean() + said.log_sigma.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@both
def test_everything_that_goes_in_matters(config):
    model = student(config)
    x_t, t, condition = inputs()
    with torch.no_grad():
        base = model(x_t, t, condition).x0
        others = {"x_t": model(x_t + 0.1, t, condition), "t": model(x_t, (t + 250) % 500, condition)}
        for name in ("band_features", "pan_features", "scene"):
            moved = replace(condition, **{name: getattr(condition, name) + 0.1})
            others[name] = model(x_t, t, moved)
    for name, said in others.items():
        assert (said.x0 - base).abs().max() > 1e-4, name


def test_input_is_compressed_by_asinh():
    x = torch.linspace(-50, 50, 1001)
    torch.testing.assert_close(compress(x), torch.asinh(x), rtol=1e-5, atol=1e-6)
    assert torch.equal(compress(-x), -compress(x))


@both
def test_uncertainty_is_bounded(config):
    model = student(config)
    x_t, t, condition = inputs()
    with torch.no_grad():
        model.out.bias.mul_(0).add_(100)
        assert model(x_t, t, condition).log_sigma.max() == 6
        model.out.bias.mul_(-1)
        assert model(x_t, t, condition).log_sigma.min() == -8


def test_only_the_configured_numbers_of_the_scene_are_seen():
    x_t, t, condition = inputs()
    other = replace(condition, scene=condition.scene + torch.tensor([0, 0, 0, 1.0, 0, 0]))
    for config, equal in ((TINY, True), (replace(TINY, scene_features=SCENE_FEATURES), False)):
        model = student(config)
        with torch.no_grad():
            assert torch.equal(model(x_t, t, condition).x0, model(x_t, t, other).x0) == equal
