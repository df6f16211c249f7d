import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from uknowpan.models.published.uknow.student import FSAStudent, StudentConfig
from uknowpan.models.published.uknow.teacher import (
    DropPath,
    FrequencySelectiveAttention,
    FSATeacher,
    TeacherConfig,
    WaveletCrossAttention,
    _real_where_mirrored,
    _spectrum,
)
from uknowpan.models.published.uknow.wavelets import teacher_wavelets
from uknowpan.models.types import Condition

GOLDEN = Path(__file__).parents[3] / "golden"
SMALL = TeacherConfig(bands=2, width=8, blocks=1, heads=4, dropout=0.0, drop_path=0.0)


def _teacher(config=SMALL, train=False):
    torch.manual_seed(0)
    return FSATeacher(config).train(train)


def _inputs(bands=2, size=(16, 24)):
    generator = torch.Generator().manual_seed(1)
    x_t, lms, mean = (torch.randn(2, bands, *size, generator=generator) for _ in range(3))
    pan = torch.randn(2, 1, *size, generator=generator)
    variance = torch.rand(2, bands, *size, generator=generator)
    t = torch.randint(0, 500, (2,), generator=generator)
    return x_t, t, Condition(lms, pan), torch.stack([mean, variance])


def _answer(teacher, x_t, t, condition, prior, **options):
    return teacher(x_t, t, condition, teacher.encode_prior(*prior), **options)


def _loss(output):
    return output.x0.square().mean() + (output.log_sigma - output.x0.detach()).square().mean()


def _train(teacher, steps):
    """Gradients of the step after `steps` steps of AdamW."""
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=1e-2, weight_decay=1e-2)
    for step in range(steps + 1):
        optimizer.zero_grad()
        _loss(_answer(teacher, *_inputs())).backward()
        if step < steps:
            optimizer.step()
    return {n: p.grad for n, p in teacher.named_parameters()}


def _of_the_prior(name):
    return name.startswith("prior.") or (".inject." in name and ".inject.out." not in name)


@pytest.mark.parametrize("case", ["published", "folded"])
def test_forward_equals_golden(case, monkeypatch):
    monkeypatch.syspath_prepend(GOLDEN)
    script = importlib.import_module("make_golden_teacher")
    golden = np.load(GOLDEN / "teacher.npz")
    config = script.TEACHER_CASES[case]
    teacher = FSATeacher(config).eval().double()
    shapes = {k: v.shape for k, v in teacher.state_dict().items()}
    teacher.load_state_dict(script.seeded_state(shapes))
    inputs = script.seeded_inputs(config.bands)
    x_t = inputs.pop("x_t")
    with torch.no_grad():
        prior = (inputs.pop("prior_mean"), inputs.pop("prior_variance"))
        output = _answer(teacher, x_t, torch.tensor(script.TIMESTEPS), Condition(**inputs), prior)
    # Only the time embedding is float32. All of it would do on most machines, but rounding may
    # carry a phase from pi to -pi, and the published attention jumps there.
    assert np.abs(golden[f"{case}_x0"]).mean() > 0.1
    np.testing.assert_allclose(output.x0.numpy(), golden[f"{case}_x0"], atol=1e-5)
    np.testing.assert_allclose(output.log_sigma.numpy(), golden[f"{case}_log_sigma"], atol=1e-5)
    rms = [float(f.square().mean().sqrt()) for f in output.features]
    np.testing.assert_allclose(rms, golden[f"{case}_features"], rtol=1e-5)


def test_released_prior_is_dead():
    teacher = _teacher(replace(SMALL, dead_prior=True))
    gradients = _train(teacher, steps=3)
    dead = {n for n, g in gradients.items() if not g.any()}
    assert {n for n in gradients if _of_the_prior(n)} == dead
    x_t, t, c, prior = inputs = _inputs()
    other = torch.stack([c.lms, prior[1] + 1])
    assert torch.equal(_answer(teacher, *inputs).x0, _answer(teacher, x_t, t, c, other).x0)
    with torch.device("meta"):
        paper = FSATeacher(TeacherConfig(8))
    # As counted in the release.
    assert sum(p.numel() for n, p in paper.named_parameters() if _of_the_prior(n)) == 632_352


def test_our_prior_starts_neutral_and_comes_alive():
    teacher = _teacher()
    x_t, t, c, prior = inputs = _inputs()
    other = torch.stack([c.lms, prior[1] + 1])
    assert torch.equal(_answer(teacher, *inputs).x0, _answer(teacher, x_t, t, c, other).x0)
    gradients = _train(teacher, steps=3)
    assert [n for n, g in gradients.items() if _of_the_prior(n) and not g.any()] == []
    assert not torch.allclose(_answer(teacher, *inputs).x0, _answer(teacher, x_t, t, c, other).x0)


@pytest.mark.parametrize("patch", [1, 2])
def test_gradient_reaches_every_parameter(patch):
    teacher = _teacher(replace(SMALL, patch=patch), train=True)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # past the start, where one factor of the prior is zero
        for p in teacher.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    _loss(_answer(teacher, *_inputs(size=(32, 48)))).backward()
    sizes = {n: float(p.grad.abs().max()) for n, p in teacher.named_parameters()}
    # A softmax does not see what is added to all it compares: biases of keys and values.
    blind = {f"{kind}.1.bias" for kind in ("from_wavelets.features", "to_wavelets.wavelets")}
    reached = {n: s for n, s in sizes.items() if not n.endswith(tuple(blind))}
    assert 0 < len(sizes) - len(reached) == 2 * 6
    assert [n for n, s in reached.items() if s < 1e-6] == []


@pytest.mark.parametrize("train", [True, False])
def test_features_have_the_shapes_of_the_students(train):
    inputs = _inputs(size=(32, 16))
    output = _answer(_teacher(train=train), *inputs)
    student = FSAStudent(StudentConfig(bands=2, width=8, heads=4)).eval()
    expected = [f.shape for f in student(*inputs[:3]).features]
    assert [f.shape for f in output.features] == expected
    assert len(expected) == 6
    assert output.x0.shape == output.log_sigma.shape == inputs[0].shape


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("raw", [0.0, -300.0, 300.0])
def test_variance_is_positive_and_finite(amp, raw):
    teacher = _teacher(replace(SMALL, variance_floor=0.0), train=True)
    with torch.no_grad():
        teacher.head[2].bias[2:] += raw
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        output = _answer(teacher, *_inputs())
        loss = _loss(output)
    loss.backward()
    assert output.x0.dtype == output.log_sigma.dtype == torch.float32
    variance = torch.exp(2 * output.log_sigma)
    assert variance.isfinite().all() and (variance > 0).all()
    assert all(p.grad.isfinite().all() for p in teacher.parameters())


def test_variance_floor():
    teacher = _teacher(replace(SMALL, variance_floor=0.25))
    with torch.no_grad():
        teacher.head[2].bias[2:] -= 300
    log_sigma = _answer(teacher, *_inputs()).log_sigma
    torch.testing.assert_close(log_sigma, torch.full_like(log_sigma, np.log(0.5)))


def test_prior_and_wavelets_may_be_made_beforehand():
    teacher = _teacher()
    _train(teacher, steps=2)
    x_t, t, c, prior = _inputs()
    vector = teacher.encode_prior(*prior)
    assert vector.shape == (2, 32)
    expected = teacher(x_t, t, c, vector).x0
    assert not torch.allclose(teacher(x_t, t, c, -vector).x0, expected)
    made = teacher_wavelets(c.lms, c.pan)
    assert torch.equal(teacher(x_t, t, c, vector, made).x0, expected)
    assert not torch.allclose(teacher(x_t, t, c, vector, -made).x0, expected)


def test_slot_and_pan():
    x_t, t, c, prior = inputs = _inputs()
    teacher = _teacher()
    empty = _answer(teacher, *inputs).x0
    assert torch.equal(empty, _answer(teacher, x_t, t, replace(c, self_cond=x_t), prior).x0)
    assert not torch.allclose(empty, _answer(teacher, x_t, t, replace(c, self_cond=c.lms), prior).x0)
    brighter = replace(c, pan=c.pan + 1)
    assert not torch.allclose(_answer(teacher, x_t, t, brighter, prior).x0, empty)
    released = _teacher(replace(SMALL, highpass_pan=True)).double()
    output = [_answer(released, x_t.double(), t, k.to(torch.float64), prior.double()).x0 for k in (c, brighter)]
    torch.testing.assert_close(*output)


def test_images_of_a_batch_do_not_mix():
    teacher = _teacher()
    _train(teacher, steps=2)
    x_t, t, c, prior = _inputs()
    teacher, x_t, c, prior = teacher.double(), x_t.double(), c.to(torch.float64), prior.double()
    both = _answer(teacher, x_t, t, c, prior)
    for i in range(2):
        alone = _answer(teacher, x_t[[i]], t[[i]], Condition(c.lms[[i]], c.pan[[i]]), prior[:, [i]])
        torch.testing.assert_close(both.x0[[i]], alone.x0)


@pytest.mark.parametrize(
    ("size", "alone"), [((4, 6), {(0, 0), (2, 0), (0, 3), (2, 3)}), ((5, 4), {(0, 0), (0, 2)}), ((3, 7), {(0, 0)})]
)
def test_bins_that_mirror_themselves_have_a_definite_phase(size, alone):
    """Otherwise a negative mean is pi with one FFT library and -pi with another."""
    shape = (size[0], size[1] // 2 + 1)
    rounded = torch.complex(-torch.ones(shape), torch.full(shape, -1e-9))
    phase = _real_where_mirrored(rounded, size[1]).angle()
    assert {tuple(e) for e in (phase > 0).nonzero().tolist()} == alone
    assert (phase[phase > 0] == phase.new_tensor(np.pi)).all()


def test_spectrum_is_of_pixels_of_unit_length():
    x = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    full = torch.fft.fft2(x / x.norm(dim=1, keepdim=True), norm="ortho")
    torch.testing.assert_close(_spectrum(x), full[..., :3])


def test_frequency_attention_of_equal_channels_is_the_channel_itself():
    """Softmax weights sum to one: mixing equal amplitudes and phases leaves them as they are."""
    attention = FrequencySelectiveAttention(4, heads=2, drop_path=0.0)
    q, k = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    value = torch.randn(2, 1, 8, 6).expand(2, 4, 8, 6)
    unit = value / value.norm(dim=1, keepdim=True)
    torch.testing.assert_close(attention._mix(q, k, value), unit)


def test_linear_attention_against_its_formula():
    cross = WaveletCrossAttention(4, 4, 5, heads=2, drop_path=0.0, features_are="query")
    q, k, v = torch.randn(3, 1, 4, 3, 5).double()
    expected = torch.zeros(4, 3, 5).double()
    soft_k, soft_v = torch.softmax(k[0], 1), torch.softmax(v[0], 2) / 2**0.5
    for head in (0, 2):
        for e in range(head, head + 2):
            for d in range(head, head + 2):
                expected[e] += (q[0, d] * soft_k[e]).sum() * soft_v[d]
    torch.testing.assert_close(cross._attend(q, k, v)[0], expected)


def test_drop_path():
    torch.manual_seed(0)
    drop, x = DropPath(0.2), torch.ones(4000, 2, 1, 1)
    kept = drop(x)
    assert torch.equal(kept[:, 0], kept[:, 1])  # an image is kept or dropped as a whole
    assert set(kept.flatten().tolist()) == {0.0, 1.25}
    assert float(kept.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(drop.eval()(x), x)


def test_dropout_and_drop_path_only_in_training():
    for config in (replace(SMALL, drop_path=0.5), replace(SMALL, dropout=0.5)):
        teacher, inputs = _teacher(config), _inputs()
        assert torch.equal(*(_answer(teacher, *inputs).x0 for _ in range(2)))
        teacher.train()
        assert not torch.allclose(*(_answer(teacher, *inputs).x0 for _ in range(2)))


@pytest.mark.parametrize(
    ("patch", "size", "message"),
    [
        (1, (20, 16), "20 x 16 .* multiples of 8; pad it to 24 x 16"),
        (1, (8, 9), "8 x 9 .* multiples of 8; pad it to 8 x 16"),
        (2, (24, 16), "24 x 16 .* multiples of 16; pad it to 32 x 16"),
    ],
)
def test_size_that_does_not_halve(patch, size, message):
    with pytest.raises(ValueError, match=message):
        teacher = _teacher(replace(SMALL, patch=patch))
        teacher(*_inputs(size=size)[:3], torch.zeros(2, 32))


def test_shapes_that_do_not_fit():
    teacher = _teacher()
    x_t, t, c, _ = _inputs()
    vector = torch.zeros(2, 32)
    with pytest.raises(ValueError, match="3 bands, but this teacher was built for 2"):
        teacher(torch.cat([x_t, x_t[:, :1]], 1), t, c, vector)
    for name in ("lms", "pan", "self_cond"):
        with pytest.raises(ValueError, match=rf"{name} must be .*, not \(2, 2, 8, 24\)"):
            teacher(x_t, t, replace(c, **{name: x_t[:, :, :8]}), vector)
    with pytest.raises(ValueError, match=r"wavelets must be \(2, 5, 16, 24\), not \(2, 2, 8, 24\)"):
        teacher(x_t, t, c, vector, x_t[:, :, :8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bands": 0}, "bands must be at least 1, not 0"),
        ({"attention_level": 4}, "attention_level 4 .* 0 to 3"),
        ({"patch": 0}, "patch must be at least 1, not 0"),
        ({"heads": 16}, "do not divide into 16 attention heads"),
        ({"drop_path": 1.0}, "drop_path 1.0"),
    ],
)
def test_configurations_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        FSATeacher(replace(SMALL, **change))
