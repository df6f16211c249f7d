import numpy as np
import pytest
import torch

from uknowpan.models.noise import position_noise

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


def test_moments_are_normal(field):
    # four standard errors of each estimate
    assert abs(field.mean()) < 4 / COUNT**0.5
    assert abs(field.var() - 1) < 4 * (2 / COUNT) ** 0.5
    assert abs((field**3).mean()) < 4 * (15 / COUNT) ** 0.5
    assert abs((field**4).mean() - 3) < 4 * (96 / COUNT) ** 0.5
    assert 4 < field.abs().max() < 4.5  # the table ends at the 2^-17 quantile


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
