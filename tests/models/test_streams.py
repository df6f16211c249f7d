"""The student of two streams: its cost, and how it combines its prediction with x_t."""

import pytest
import torch
from test_network import STREAMS, inputs, student
from torch.utils.flop_counter import FlopCounterMode

from uknowpan.models import resample
from uknowpan.models.diffusion import NoiseSchedule, add_noise, ddim_sample
from uknowpan.models.features import LOG_V, MAPS, StreamsConfig
from uknowpan.models.streams import StreamsStudent

LAST = 499


def multiply_adds(bands):
    """Multiply-adds of the convolutions per PAN pixel."""
    with FlopCounterMode(display=False) as counter:
        StreamsStudent()(*inputs(1, bands, (32, 32)))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2 / 32**2


@pytest.mark.parametrize("bands, expected", [(4, 25_224), (8, 38_696)])
def test_multiply_adds_per_pixel(bands, expected):
    assert multiply_adds(bands) == expected


def test_at_the_last_timestep_nothing_of_x_t_is_seen():
    """c_skip is 0 and x_t counts as zeros, alone and in a batch with other timesteps."""
    model = student(STREAMS)
    x_t, _, condition = inputs(2)
    with torch.no_grad():
        alone = model(x_t, torch.tensor([LAST, LAST]), condition)
        other = model(x_t + 7, torch.tensor([LAST, LAST]), condition)
        mixed = model(x_t + 7, torch.tensor([LAST, 100]), condition)
    assert torch.equal(alone.x0, other.x0)
    torch.testing.assert_close(mixed.x0[0], alone.x0[0], rtol=1e-4, atol=1e-5)
    assert (mixed.x0[1] - alone.x0[1]).abs().max() > 0.1


@pytest.mark.parametrize("halo", [0, 4, 36])
def test_pieces_of_the_answer_are_those_of_the_whole(halo, monkeypatch):
    """With one step, as with two, the core alone, however its rows are cut."""
    model = student(STREAMS)
    _, t, condition = inputs(2, 3, (96, 88))
    with torch.no_grad():
        whole = model(torch.zeros_like(condition.lms), torch.full_like(t, LAST), condition).shrink(halo)
        for rows in (4, 20, 1000):
            monkeypatch.setattr(resample, "PIECE", rows)
            core = model.at_end(condition, halo)
            torch.testing.assert_close(core.x0, whole.x0, rtol=0, atol=5e-5)
            torch.testing.assert_close(core.log_sigma, whole.log_sigma, rtol=0, atol=5e-5)


@pytest.mark.parametrize("t", [5, 100, 250, 400])
def test_prediction_and_x_t_are_weighed_by_their_variances(t):
    """Untrained, D is the local injection and v a constant: x0 is the mean of the two by inverse variance."""
    schedule, model = NoiseSchedule.cosine(), StreamsStudent(STREAMS)
    v = 0.4
    with torch.no_grad():
        model.out.bias.view(MAPS, 4)[LOG_V] = torch.tensor(v).log()
        x_t, _, condition = inputs(1)
        time = torch.tensor([t])
        made = model(x_t, time, condition)
    a, s = schedule.signal(time), schedule.noise(time)
    mean = condition.band_features[:, :, 1]
    precision = 1 / v**2, (a / s) ** 2
    expected = (mean * precision[0] + x_t / a * precision[1]) / sum(precision)
    torch.testing.assert_close(made.x0, expected, rtol=1e-4, atol=1e-4)
    c_out = s * v / (a**2 * v**2 + s**2).sqrt()
    torch.testing.assert_close(made.emphasis, (v / c_out).expand_as(made.x0), rtol=1e-4, atol=1e-4)


def test_the_end_of_sampling_keeps_what_x_t_shows():
    """Fault of the network before: below t = 50 it answered up to 13 times worse than x_t itself."""
    schedule, model = NoiseSchedule.cosine(), StreamsStudent(STREAMS)
    noise, _, condition = inputs(1)
    truth = condition.band_features[:, :, 1] + 0.5 * torch.randn(
        noise.shape, generator=torch.Generator().manual_seed(3)
    )
    for t in (5, 20, 50):
        time = torch.tensor([t])
        x_t = add_noise(schedule, truth, time, noise)
        with torch.no_grad():
            error = (model(x_t, time, condition).x0 - truth).square().mean().sqrt()
        assert error < 1.05 * (x_t / schedule.signal(time) - truth).square().mean().sqrt()


def test_samples_differ_by_their_noise_from_the_second_step_on():
    schedule, model = NoiseSchedule.cosine(), student(STREAMS)
    x_t, _, condition = inputs(1)
    with torch.no_grad():
        one, two = (
            [ddim_sample(model, n, schedule.respace(steps), schedule, condition).x0 for n in (x_t, x_t.flip(-1))]
            for steps in (1, 2)
        )
    assert torch.equal(*one)
    assert not torch.equal(*two)


def test_weights_fit_the_wheel():
    assert sum(p.numel() for p in StreamsStudent(StreamsConfig()).parameters()) * 4 < 1.5e6
