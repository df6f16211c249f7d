from itertools import pairwise

import numpy as np
import pytest
import torch

from uknowpan.models.diffusion import NoiseSchedule, add_noise, ddim_sample, position_noise
from uknowpan.models.types import Condition, Denoised

SCHEDULE = NoiseSchedule.cosine()
NOTHING = Condition(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "t, published, half_digit",
    [(0, 0.99991, 5e-6), (20, 0.9941, 5e-5), (240, 0.522, 5e-4), (480, 0.0035, 5e-5)],
)
def test_schedule_is_the_published_one(t, published, half_digit):
    assert float(SCHEDULE.alphas_cumprod[t]) == pytest.approx(published, abs=half_digit)


def test_schedule_falls_and_keeps_variance():
    assert len(SCHEDULE) == 500
    assert (SCHEDULE.alphas_cumprod.diff() < 0).all()
    assert 0 < SCHEDULE.alphas_cumprod[-1] < 1e-7
    t = torch.arange(500)
    power = SCHEDULE.signal(t) ** 2 + SCHEDULE.noise(t) ** 2
    torch.testing.assert_close(power, torch.ones(500, 1, 1, 1))


def test_respaced_timesteps_start_at_the_end_and_fall_evenly():
    for steps in range(1, 501):
        timesteps = SCHEDULE.respace(steps)
        assert (len(timesteps), timesteps[0]) == (steps, 499)
        gaps = [a - b for a, b in pairwise(timesteps)]
        if steps < 500:
            gaps.append(timesteps[-1])  # x0 itself is timestep 0, as good as
        assert min(gaps) >= 1
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("steps", [0, -1, 501])
def test_steps_that_the_schedule_has_not(steps):
    with pytest.raises(ValueError, match=f"steps must be 1 to 500, not {steps}"):
        SCHEDULE.respace(steps)


def test_add_noise_has_the_mean_and_variance_of_each_image():
    t = torch.tensor([0, 240, 480])
    x0 = torch.tensor([3.0, -2.0, 5.0]).view(3, 1, 1, 1).expand(3, 2, 128, 128)
    x_t = add_noise(SCHEDULE, x0, t, normal(*x0.shape)).double()
    kept = SCHEDULE.alphas_cumprod[t]
    torch.testing.assert_close(x_t.mean((1, 2, 3)), kept.sqrt() * torch.tensor([3.0, -2.0, 5.0]), atol=0.025, rtol=0)
    torch.testing.assert_close(x_t.var((1, 2, 3)), 1 - kept, rtol=0.04, atol=0)


@pytest.mark.parametrize("steps", [1, 5, 25])
def test_perfect_denoiser(steps):
    x0, start = normal(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8, seed=2)
    timesteps = SCHEDULE.respace(steps)
    seen = []

    def perfect(x_t, t, condition):
        assert condition is NOTHING
        seen.append((t.tolist(), x_t))
        return Denoised(x0)

    said = ddim_sample(perfect, start, timesteps, SCHEDULE, NOTHING)
    assert torch.equal(said.x0, x0)
    assert [t for t, _ in seen] == [[t, t] for t in timesteps]
    # DDIM stays on the line between the truth and the noise that it began with.
    first = torch.full((2,), timesteps[0])
    noise = (start - SCHEDULE.signal(first) * x0) / SCHEDULE.noise(first)
    for t, x_t in seen:
        expected = add_noise(SCHEDULE, x0, torch.tensor(t), noise)
        torch.testing.assert_close(x_t, expected, atol=1e-4, rtol=0)


def test_samples_have_the_distribution_that_the_denoiser_knows():
    mean, std = 1.5, 0.5

    def posterior(x_t, t, condition):
        """E[x0 | x_t] of x0 ~ N(mean, std^2)."""
        s, n = SCHEDULE.signal(t), SCHEDULE.noise(t)
        return Denoised((mean * n**2 + s * x_t * std**2) / (n**2 + s**2 * std**2))

    start = normal(1, 1, 128, 128)
    many = ddim_sample(posterior, start, SCHEDULE.respace(250), SCHEDULE, NOTHING).x0
    assert float(many.mean()) == pytest.approx(mean, abs=0.02)
    assert float(many.std()) == pytest.approx(std, rel=0.03)
    one = ddim_sample(posterior, start, SCHEDULE.respace(1), SCHEDULE, NOTHING).x0
    torch.testing.assert_close(one, torch.full_like(one, mean), atol=1e-3, rtol=0)


def test_the_release_feeds_the_number_of_the_step():
    fed = []

    def denoise(x_t, t, condition):
        fed.append(int(t[0]))
        return Denoised(torch.zeros_like(x_t))

    timesteps = list(range(480, -1, -20))
    ddim_sample(denoise, normal(1, 1, 4, 4), timesteps, SCHEDULE, NOTHING, respaced_time_index=True)
    assert fed == list(range(24, -1, -1))


def test_no_timesteps():
    with pytest.raises(ValueError, match="no timesteps"):
        ddim_sample(lambda *a: Denoised(a[0]), normal(1, 1, 4, 4), [], SCHEDULE, NOTHING)


# ------------------------------------------------------------------------------ position noise

SIZE, BANDS = 256, 4
COUNT = SIZE * SIZE * BANDS


@pytest.fixture(scope="module")
def field():
    return position_noise(11, -100, 40, SIZE, SIZE, BANDS).double()


@pytest.mark.parametrize("row, col, height, width", [(-7, -5, 4, 9), (0, 0, 1, 1), (-3, 6, 13, 2)])
def test_a_window_is_a_part_of_a_larger_one(row, col, height, width):
    whole = position_noise(3, -10, -8, 40, 30, 3)
    rows, cols = slice(row + 10, row + 10 + height), slice(col + 8, col + 8 + width)
    assert torch.equal(position_noise(3, row, col, height, width, 3), whole[:, rows, cols])


def test_fewer_bands_are_the_first_ones():
    assert torch.equal(position_noise(3, 5, 5, 8, 8, 1), position_noise(3, 5, 5, 8, 8, 4)[:1])


def test_values_never_change():
    near = [
        [[0.112707876, -0.902826369, 0.263073832], [0.898236513, 0.348668694, -1.704274058]],
        [[-0.500950813, -3.166855812, 0.378334552], [1.605935693, 0.644051135, 0.881754458]],
    ]
    far = [[[0.693027794, 1.214894533, 1.390394330]]]
    close = {"rtol": 2e-6, "atol": 0}
    torch.testing.assert_close(position_noise(7, -3, 5, 2, 3, 2), torch.tensor(near), **close)
    seed = 2**63 + 5
    torch.testing.assert_close(position_noise(seed, 10**6, -(10**6), 1, 3, 1), torch.tensor(far), **close)
    assert torch.equal(position_noise(seed - 2**64, 0, 0, 4, 4, 1), position_noise(seed, 0, 0, 4, 4, 1))


def test_the_distribution_is_normal(field):
    share = torch.special.ndtr(field.flatten().sort().values)
    steps = (torch.arange(COUNT) + 0.5) / COUNT
    assert (share - steps).abs().max() < 1.95 / COUNT**0.5  # Kolmogorov-Smirnov, p = 0.001


@pytest.mark.parametrize("dy, dx", [(0, 1), (1, 0), (1, 1), (1, -1), (0, 2), (16, 0), (0, 64)])
def test_neighbours_are_uncorrelated(field, dy, dx):
    product = field * field.roll((dy, dx), (1, 2))
    assert abs(product.mean()) < 4 / COUNT**0.5
    # Nor do their sizes depend on each other.
    assert abs(product.square().mean() - 1) < 4 * (8 / COUNT) ** 0.5


def test_the_spectrum_has_no_line(field):
    power = torch.fft.rfft2(field).abs().square() / SIZE**2
    # Exponentially distributed where the noise is white: the largest of n is near log(n) = 12.
    assert power.max() < 24
    assert power.mean() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("seed", [12, 10, 11 + 2**32, -11])
def test_other_seeds_are_independent(field, seed):
    other = position_noise(seed, -100, 40, SIZE, SIZE, BANDS).double()
    assert abs((field * other).mean()) < 4 / COUNT**0.5


def test_bands_are_independent(field):
    correlation = torch.from_numpy(np.corrcoef(field.flatten(1).numpy()))
    assert (correlation - torch.eye(BANDS)).abs().max() < 4 / SIZE
