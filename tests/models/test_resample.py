import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from textures import Texture

from uknowpan.models.metrics.toolbox import interp23tap
from uknowpan.models.resample import (
    UPSAMPLE_REACH,
    box,
    box_mean,
    crop,
    cubic,
    decimate,
    degrade,
    degrade_reach,
    gaussian,
    mirrored,
    reflect,
    registration_offset,
    upsample,
    upsample_small,
)

RATIOS = [1, 2, 3, 4, 5, 6, 8]
SHIFTS = [(0.0, 0.0), (0.5, -1.0), (-1.3, 2.7)]


def grids(ratio, n=12, shift=(0.0, 0.0)):
    """Coordinates y, x (float64) of the PAN pixels, and of the MS pixels' centres."""
    fine = torch.arange(n * ratio, dtype=torch.float64)
    coarse = [ratio * torch.arange(n, dtype=torch.float64) + (ratio - 1) / 2 + s for s in shift]
    return torch.meshgrid(fine, fine, indexing="ij"), torch.meshgrid(*coarse, indexing="ij")


def plane(y, x):
    return (3 + 0.2 * y - 0.7 * x)[None, None]


@pytest.mark.parametrize("offset", [0.0, 0.5, -0.5, 0.2])
@pytest.mark.parametrize("ratio", RATIOS)
def test_upsample_reproduces_polynomials(ratio, offset):
    fine, coarse = grids(ratio, shift=(offset, offset))

    def quadratic(y, x):
        return plane(y, x) + ((0.1 * y) ** 2 - 0.03 * x * y)[None, None]

    for function in (lambda y, x: torch.full_like(y, 7.0)[None, None], plane, quadratic):
        lms = upsample(function(*coarse), ratio, offset)
        assert lms.shape == (1, 1, 12 * ratio, 12 * ratio)
        inner = crop(lms - function(*fine), UPSAMPLE_REACH * ratio)
        assert inner.abs().max() < 1e-4 * function(*fine).abs().max()


@pytest.mark.parametrize("ratio", RATIOS)
def test_upsample_keeps_images_and_bands_apart(ratio):
    ms = torch.randn(2, 3, 7, 9)
    together = upsample(ms, ratio)
    for i in range(2):
        for c in range(3):
            alone = upsample(ms[i : i + 1, c : c + 1], ratio)[0, 0]
            torch.testing.assert_close(together[i, c], alone)


@pytest.mark.parametrize("offset", [0.0, 0.5, -0.5])
@pytest.mark.parametrize("ratio", RATIOS)
def test_upsample_reaches_no_further_than_it_says(ratio, offset):
    impulse = torch.zeros(1, 1, 13, 13)
    impulse[..., 6, 6] = 1
    lms = upsample(impulse, ratio, offset)
    touched = lms[0, 0].nonzero() // ratio
    assert (touched - 6).abs().max() <= UPSAMPLE_REACH
    assert float(lms.sum()) == pytest.approx(ratio**2, rel=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_without_an_offset_nothing_has_changed(ratio):
    """To the bit the formula that was there before offsets were."""
    ms = torch.randn(2, 3, 9, 11)
    x = (torch.arange(ratio, dtype=torch.float64) - (ratio - 1) / 2) / ratio
    x = (x[:, None] - torch.arange(-2, 3, dtype=torch.float64)).abs()
    far = torch.where(x < 2, -0.5 * (x**3 - 5 * x**2 + 8 * x - 4), 0.0)
    taps = torch.where(x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, far).float()
    y = F.pad(ms.reshape(6, 1, 9, 11), (2, 2, 2, 2), mode="replicate")
    y = F.conv2d(y, taps[:, None, :, None]).transpose(1, 2).reshape(6, 1, 9 * ratio, 15)
    y = F.conv2d(y, taps[:, None, None, :]).permute(0, 2, 3, 1)
    assert torch.equal(upsample(ms, ratio), y.reshape(2, 3, 9 * ratio, 11 * ratio))


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("ratio", RATIOS)
def test_small_windows_are_upsampled_alike(ratio, offset):
    ms = torch.randn(2, 3, 7, 9)
    expected = upsample(ms, ratio, offset)
    torch.testing.assert_close(upsample_small(ms, ratio, offset), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("ratio", [2, 3, 4, 5, 6, 8])
def test_offsets_of_the_registrations(ratio):
    assert registration_offset("area", ratio) == 0
    centre, sample = (ratio - 1) / 2, ratio // 2
    assert centre + registration_offset("pancollection", ratio) == sample
    with pytest.raises(ValueError, match="'nested' is unknown"):
        registration_offset("nested", ratio)
    with pytest.raises(ValueError, match=r"0\.6 PAN pixels off"):
        upsample(torch.ones(1, 1, 4, 4), ratio, 0.6)


@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_the_23_taps_are_those_of_the_toolbox_wherever_the_samples_lie(ratio):
    ms = torch.randn(1, 2, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = (..., slice(10 * ratio, -10 * ratio), slice(10 * ratio, -10 * ratio))
    offset = registration_offset("pancollection", ratio)
    made = upsample(ms, ratio, offset, "23 taps")
    torch.testing.assert_close(made[inside], interp23tap(ms, ratio)[inside], rtol=0, atol=1e-6)
    nested = upsample(ms, ratio, 0.0, "23 taps")
    torch.testing.assert_close(nested[inside], interp23tap(ms, 2 * ratio)[..., 1::2, 1::2][inside], rtol=0, atol=1e-6)
    assert np.allclose(upsample(ms.numpy(), ratio, 0.0, "23 taps"), nested.numpy(), atol=1e-6)


def test_upsample_can_be_trained_through_after_sharpening():
    with torch.inference_mode():
        upsample(torch.ones(1, 1, 4, 4), 7)
    ms = torch.ones(1, 1, 4, 4, requires_grad=True)
    upsample(ms, 7).sum().backward()
    assert float(ms.grad.sum()) == pytest.approx(28 * 28, rel=1e-5)


def kernels(ratio):
    """name -> (kernel, reach in MS pixels for shifts up to 2.7 PAN pixels)."""
    extra = int(np.ceil(2.7 / ratio))
    return {
        "gaussian": (gaussian(max(0.45 * ratio, 0.9)), 5 + extra),
        "box": (box(ratio), 1 + extra),
        "cubic": (cubic(ratio), 3 + extra),
        "cubic-sharp": (cubic(1.0), 2 + extra),
    }


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", ["gaussian", "box", "cubic", "cubic-sharp"])
@pytest.mark.parametrize("ratio", RATIOS)
def test_kernels_are_normalised_and_sample_at_the_right_place(ratio, kind, shift):
    kernel, reach = kernels(ratio)[kind]
    n = 2 * reach + 4
    fine, coarse = grids(ratio, n, shift)
    flat = decimate(torch.full((1, 1, n * ratio, n * ratio), 5.0), ratio, kernel, shift, reach)
    torch.testing.assert_close(flat, torch.full((1, 1, n, n), 5.0))
    slope = crop(decimate(plane(*fine), ratio, kernel, shift, reach) - plane(*coarse), reach)
    assert slope.abs().max() < 2e-3  # of 0.7 per PAN pixel


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
def test_degrade_is_a_gaussian_blur(ratio, shift):
    texture, n = Texture(5), 24
    fine = np.arange(n * ratio, dtype=float)
    coarse = [ratio * np.arange(n) + (ratio - 1) / 2 + s for s in shift]
    sigma = 0.5 * ratio
    pan = torch.from_numpy(texture(fine, fine))[None, None]
    truth = torch.from_numpy(texture(*coarse, sigma))[None, None]
    reach = degrade_reach(sigma, shift, ratio)
    error = crop(degrade(pan, ratio, sigma, shift) - truth, reach)
    assert error.std() < 0.01 * truth.std()


def test_box_is_the_mean_of_areas():
    x = torch.arange(36.0).square().reshape(1, 1, 6, 6)
    torch.testing.assert_close(decimate(x, 3, box(3), (0.0, 0.0), 1), F.avg_pool2d(x, 3))
    # Half a pixel to the right, a box of two pixels halves the pixels at its ends.
    moved = decimate(x, 2, box(2), (0.0, 0.5), 1)[0, 0]
    rows = x[0, 0].reshape(3, 2, 6).mean(1)
    torch.testing.assert_close(moved[:, 0], rows[:, :3] @ torch.tensor([0.25, 0.5, 0.25]))
    torch.testing.assert_close(moved[:, 1], rows[:, 2:5] @ torch.tensor([0.25, 0.5, 0.25]))


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_degrade_reaches_no_further_than_it_says(ratio, shift):
    reach = degrade_reach(0.5 * ratio, shift, ratio)
    n = 2 * reach + 5
    impulse = torch.zeros(1, 1, n * ratio, n * ratio)
    middle = n // 2
    impulse[..., middle * ratio : (middle + 1) * ratio, middle * ratio : (middle + 1) * ratio] = 1
    touched = degrade(impulse, ratio, 0.5 * ratio, shift)[0, 0].nonzero()
    assert (touched - middle).abs().max() <= reach


@pytest.mark.parametrize("ratio", RATIOS)
def test_arrays_are_filtered_as_tensors_are(ratio):
    x = np.random.default_rng(1).normal(size=(2, 3, 7 * ratio, 9 * ratio)).astype(np.float32)
    for function in (
        lambda y: upsample(y, ratio, 0.25),
        lambda y: upsample_small(y, ratio),
        lambda y: degrade(y, ratio, 0.5 * ratio, (0.7, -1.2)),
        lambda y: box_mean(y, 5),
        lambda y: reflect(y, 3),
    ):
        array, tensor = function(x), function(torch.from_numpy(x))
        assert isinstance(array, np.ndarray)
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=5e-6)


@pytest.mark.parametrize("size", [1, 3, 5, 11])
def test_box_mean_counts_the_pixels_that_exist(size):
    x = np.random.default_rng(0).normal(size=(9, 7))
    inside = uniform_filter(np.ones_like(x), size, mode="constant")
    expected = uniform_filter(x, size, mode="constant") / inside
    got = box_mean(torch.from_numpy(x)[None, None], size)[0, 0]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("before, after", [(0, 0), (3, 2), (5, 5), (13, 17)])
def test_mirrored_reflects_with_the_edge_repeated(before, after):
    expected = np.pad(np.arange(5), (before, after), mode="symmetric")
    assert mirrored(-before, 5 + before + after, 5).tolist() == expected.tolist()
