from dataclasses import astuple

import pytest
import torch
from textures import make_pair

from uknowpan.models.blur import default_psf, estimate_psf, gain_to_sigma, pan_on_ms_grid, softness_of_ms
from uknowpan.models.resample import degrade, upsample

SIZE = (40, 44)


def assert_found(psf, sigma, shift):
    assert psf.sigma == pytest.approx(sigma, rel=0.1)
    assert psf.shift == pytest.approx(shift, abs=0.15)
    assert psf.correlation > 0.9


@pytest.mark.parametrize("share", [0.35, 0.45, 0.6])
@pytest.mark.parametrize("ms_shift", [(0.0, 0.0), (0.13, -0.21), (-0.5, 0.5), (1.2, -0.9), (-2.3, 2.1)])
@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
def test_blur_and_shift_are_recovered(ratio, ms_shift, share):
    shift = (ms_shift[0] * ratio, ms_shift[1] * ratio)
    pair = make_pair(ratio, SIZE, sigma=share * ratio, shift=shift, seed=3)
    assert_found(estimate_psf([(pair.pan, pair.ms)], ratio), share * ratio, shift)


def test_moved_objects_do_not_blur() -> None:
    """Twelve cars that moved by 6 PAN pixels: they raised the blur of the whole scene by a third."""
    pair = make_pair(4, (64, 64), sigma=1.9, seed=5)
    cars = torch.zeros(2, 1, 256, 256)
    for k in range(12):
        row, col = 20 + k // 4 * 90, 20 + k % 4 * 60
        cars[0, 0, row : row + 3, col : col + 7] = 8
        cars[1, 0, row : row + 3, col + 6 : col + 13] = 8
    ms = pair.ms + degrade(cars[1:], 4, 1.9)[0] * pair.ms.std((1, 2), keepdim=True)
    psf = estimate_psf([(pair.pan + cars[0] * pair.pan.std(), ms)], 4)
    assert psf.sigma == pytest.approx(1.9, rel=0.03) and psf.shift == pytest.approx((0, 0), abs=0.05)


def test_noise_is_survived():
    pair = make_pair(4, SIZE, sigma=1.8, shift=(1.5, -0.6), seed=4)
    noise = torch.randn(pair.ms.shape, generator=torch.Generator().manual_seed(0))
    ms = pair.ms + 0.05 * pair.ms.std((1, 2), keepdim=True) * noise
    psf = estimate_psf([(pair.pan, ms)], 4)
    assert psf.shift == pytest.approx((1.5, -0.6), abs=0.15)
    assert psf.sigma == pytest.approx(1.8, rel=0.1)


@pytest.mark.parametrize("size, bands, samples", [(SIZE, 1, 1), (SIZE, 8, 1), ((20, 18), 4, 4), ((16, 16), 4, 1)])
def test_any_bands_and_samples(size, bands, samples):
    pairs = [make_pair(4, size, bands=bands, sigma=2.0, shift=(-1.1, 0.7), seed=5 + k) for k in range(samples)]
    assert_found(estimate_psf([(p.pan, p.ms) for p in pairs], 4), 2.0, (-1.1, 0.7))


@pytest.mark.parametrize("pan_gain, pan_offset", [(2000.0, 0.0), (0.01, 3.0), (-5.0, 90.0)])
def test_gain_and_offset_do_not_matter(pan_gain, pan_offset):
    pair = make_pair(4, SIZE, sigma=1.9, shift=(0.9, -1.4), seed=6)
    plain = estimate_psf([(pair.pan, pair.ms)], 4)
    gain = torch.tensor([1.0, 4.0, 0.5, -2.0]).view(-1, 1, 1)  # one band with reversed contrast
    offset = torch.tensor([0.0, 20.0, -3.0, 100.0]).view(-1, 1, 1)
    other = estimate_psf([(pan_gain * pair.pan + pan_offset, gain * pair.ms + offset)], 4)
    assert other.shift == pytest.approx(plain.shift, abs=0.02)
    assert other.sigma == pytest.approx(plain.sigma, rel=0.01)


@pytest.mark.parametrize("bands", [1, 4, 8])
@pytest.mark.parametrize("size", [(16, 16), (24, 24), SIZE])
def test_unrelated_images_say_nothing(size, bands):
    for seed in range(4):
        here, there = (make_pair(4, size, bands, seed=s) for s in (seed, seed + 100))
        assert estimate_psf([(here.pan, there.ms)], 4) == default_psf(4)


def test_flat_or_small_scenes_say_nothing():
    flat = (torch.full((1, 96, 96), 7.0), torch.full((3, 24, 24), 9.0))
    small = make_pair(4, (15, 40), seed=9)
    assert estimate_psf([flat], 4) == default_psf(4)
    assert estimate_psf([(small.pan, small.ms)], 4) == default_psf(4)
    assert estimate_psf([], 4) == default_psf(4)


def test_ms_that_pan_was_made_from_has_no_blur_but_a_shift():
    pair = make_pair(4, SIZE, seed=10)
    pan = upsample(pair.ms.mean(0, keepdim=True)[None], 4)[0]
    psf = estimate_psf([(pan, pair.ms)], 4)
    assert psf.shift == pytest.approx((0, 0), abs=0.15)
    assert psf.sigma < 1.2


@pytest.mark.parametrize("ratio", [2, 4, 6])
def test_gain_at_nyquist(ratio):
    frequency = torch.tensor(1 / (2 * ratio))
    for gain in (0.15, 0.3, 0.5):
        sigma = gain_to_sigma(gain, ratio)
        mtf = torch.exp(-2 * (torch.pi * sigma * frequency) ** 2)
        assert float(mtf) == pytest.approx(gain, rel=1e-5)
    assert astuple(default_psf(ratio)) == (gain_to_sigma(0.3, ratio), (0.0, 0.0), 0.0)


@pytest.mark.parametrize("sigma", [0.4, 0.7])
@pytest.mark.parametrize("ratio", [2, 4])
def test_softness_of_ms_is_that_on_its_own_grid(sigma, ratio):
    noise = 100 + 10 * torch.randn(1, 128 * ratio, 128 * ratio, generator=torch.manual_seed(0))
    shift = (1.2, -0.7)
    ms = degrade(pan_on_ms_grid(noise, ratio, shift)[None], 1, sigma, (0.0, 0.0))[0]
    found = softness_of_ms([(noise, torch.cat([ms, 0.5 * ms + 7]))], ratio, shift)
    assert found == pytest.approx(sigma, abs=0.04)


def test_softness_of_ms_that_is_unlike_the_pan_is_unknown():
    generator = torch.manual_seed(0)
    pan, ms = torch.randn(1, 256, 256, generator=generator), torch.randn(2, 64, 64)
    assert softness_of_ms([(pan, ms)], 4, (0.0, 0.0)) is None
