"""Indices by reprojection: the published tool's values, regions, nodata, displacements, and known answers."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter, map_coordinates, uniform_filter
from textures import images_of

from uknowpan.models.metrics.images import gaussian_kernel, mtf_kernel, sample
from uknowpan.models.metrics.reprojection import (
    Published,
    Registered,
    detail,
    find_phases,
    local_correlation,
    pearson,
)
from uknowpan.models.metrics.reprojection import measure as measure_modes

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden" / "fullres"
UNPUBLISHED = ROOT.parent / "shared" / "golden" / "fullres"
SYNTHETIC = ["synth_4band", "synth_8band", "synth_4band_shift", "synth_odd"]
REAL = ["real_spot6", "real_wv3"]  # imagery without a clear licence
RATIO, SMALL = 4, {"rows": 32, "cols": 32}


def measure(images, mode, **size):
    """Scores in one mode."""
    return measure_modes(images, [mode], **size)[0]


def load(name):
    path = (UNPUBLISHED if name in REAL else GOLDEN) / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"{path.name} is not here: its imagery may not be copied into the repository")
    with np.load(path) as file:
        return dict(file)


def tensor(values):
    return torch.from_numpy(values.astype("f8"))


# ----------------------------------------------------------------------------- published values


def test_kernels_equal_the_published_tool():
    data = load("kernels")
    kernels = np.stack([mtf_kernel(float(gain), RATIO).numpy() for gain in data["gains"]])
    np.testing.assert_allclose(kernels, data["expected_kernels"], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("name", [*SYNTHETIC, *REAL])
def test_the_published_mode_equals_the_tool(name):
    data = load(name)
    gains = [float(gain) for gain in data["gains"]]
    for product in ("bicubic", "hpf"):
        images = images_of(tensor(data[f"fused_{product}"]), tensor(data["pan"]), tensor(data["ms"]))
        if product == "bicubic":
            phases, scores = find_phases(images, gains[0], rows=32, cols=64)
            assert phases == list(zip(data["expected_r"], data["expected_c"], strict=True))
            np.testing.assert_allclose(scores.numpy(), data["expected_phase_score"], rtol=1e-9)
        found = measure(images, Published(gains, phases), rows=32, cols=64)
        for index in (
            *("r_q2n", "r_q", "r_sam", "r_ergas", "d_lambda_align", "d_rho", "d_rho_thr"),
            *("d_sr", "d_sr_intercept", "rqnr_align"),
        ):
            expected = pytest.approx(float(data[f"expected_{product}_{index}"]), rel=1e-9, abs=1e-12)
            assert getattr(found, index) == expected, (product, index)
        if f"expected_{product}_rqnr" in data:
            d_lambda_k = float(data[f"expected_{product}_d_lambda_k"])
            assert found.rqnr(d_lambda_k) == pytest.approx(float(data[f"expected_{product}_rqnr"]), rel=1e-9)


# --------------------------------------------------------------------------- regions and nodata


def scene(seed=0, height=96, width=128, bands=3, ratio=RATIO):
    """Textured result, PAN and MS whose place is that of the pixel areas."""
    rng = np.random.default_rng(seed)
    common = gaussian_filter(rng.normal(size=(height * ratio, width * ratio)), 1.5)
    own = np.stack([gaussian_filter(rng.normal(size=common.shape), 4) for _ in range(bands)])
    truth = 800 + 900 * common + 1500 * own
    low = np.stack([gaussian_filter(band, 1.7) for band in truth])
    ms = low.reshape(bands, height, ratio, width, ratio).mean((2, 4))
    pan = truth.mean(0, keepdims=True) + 5 * rng.normal(size=(1, *common.shape))
    fused = truth + 20 * rng.normal(size=truth.shape)
    return [torch.from_numpy(x) for x in (fused, pan, ms)]


def wavy(rows, cols):
    """A smooth displacement field of two pixels, with its own constant for each band."""
    y, x = torch.meshgrid(rows, cols, indexing="ij")
    field = torch.stack([1.5 * torch.sin(x / 90), torch.cos(y / 70) - 0.3])
    return torch.stack([field, field + 0.4, field - 0.2])


MODES = {
    "published": Published([0.3, 0.28, 0.33], [(2, 2), (1, 2), (3, 0)]),
    "registered": Registered([gaussian_kernel(1.9)] * 3),
    "displaced": Registered([mtf_kernel(0.3, RATIO)] * 3, wavy),
}


def same(one, other, rel=1e-8):
    for name, value in asdict(one).items():
        if name != "phases":
            assert getattr(other, name) == pytest.approx(value, rel=rel, nan_ok=True), name


@pytest.mark.parametrize("mode", MODES)
def test_regions_equal_the_whole_image(mode):
    images = images_of(*scene())
    same(measure(images, MODES[mode], rows=96, cols=128), measure(images, MODES[mode], **SMALL))


def test_what_is_read_at_once_does_not_grow_with_the_image():
    arrays, sizes = scene(height=160, width=192), []

    def recorded(read):
        return lambda region: sizes.append(region.height * region.width) or read(region)

    images = images_of(*arrays)
    images = replace(images, **{name: recorded(getattr(images, name)) for name in ("fused", "pan", "ms")})
    find_phases(images, 0.3, **SMALL)
    measure_modes(images, list(MODES.values()), **SMALL)
    # 32 MS pixels and the windows that begin in them, the filter, and the displacement; the image has 491,520 pixels.
    assert max(sizes) < (4 * (32 + 31) + 2 * 20 + 10) ** 2


@pytest.mark.parametrize("mode", MODES)
def test_nodata_does_not_count(mode):
    arrays, mask = scene(), torch.zeros(384, 512, dtype=torch.bool)
    mask[100:108, 300:304] = mask[-3:, :9] = True
    answers = []
    for value in (0.0, 60_000.0, torch.nan):
        spoiled = [torch.where(mask, value, image) for image in arrays[:2]]
        ms = torch.where(F.max_pool2d(mask[None].double(), RATIO)[0] > 0, value, arrays[2])
        answers.append(measure(images_of(*spoiled, ms, mask), MODES[mode], **SMALL))
    same(answers[0], answers[1], rel=1e-12)
    same(answers[0], answers[2], rel=1e-12)
    whole = measure(images_of(*arrays), MODES[mode], **SMALL)
    assert answers[0].r_ergas != whole.r_ergas
    same(answers[0], whole, rel=0.2)


def test_flat_nodata_free_areas_give_finite_scores():
    fused, pan, ms = scene()
    flat = torch.zeros(384, 512, dtype=torch.bool)
    flat[100:300, 200:400] = True
    images = images_of(torch.where(flat, 700.0, fused), torch.where(flat, 700.0, pan), ms)
    found = measure(images, MODES["registered"])
    assert all(np.isfinite(value) for name, value in asdict(found).items() if name != "phases")
    assert 0 <= found.d_rho <= 2 and 0 <= found.d_rho_thr <= 2


# -------------------------------------------------------------------------------- known answers


def test_a_result_that_was_moved_onto_the_pan_is_judged_there():
    """The MS lies (2, -1) PAN pixels off; a truth on the PAN's place is right only for who knows that."""
    fused, pan, _ = scene(height=64, width=64)
    moved = torch.roll(fused, (2, -1), (1, 2))
    low = torch.stack([torch.from_numpy(gaussian_filter(band.numpy(), 1.9, mode="nearest")) for band in moved])
    ms = sample(low, *(torch.arange(64.0).double()[a] * 4 + 1.5 for a in ((None, slice(None), None), (None, None))))
    images = images_of(fused, pan, ms[:, :, :])

    def constant(rows, cols):
        return torch.tensor([2.0, -1.0]).double()[None, :, None, None].expand(1, 2, len(rows), len(cols))

    kernels = [gaussian_kernel(1.9)] * 3
    registered, plain = measure_modes(images, [Registered(kernels, field) for field in (constant, None)])
    assert registered.r_ergas < 0.2 * plain.r_ergas
    assert registered.r_q2n > 0.99 > plain.r_q2n
    assert registered.d_rho == plain.d_rho and registered.d_rho_excess != plain.d_rho_excess


def test_sampling_is_exact_at_pixels_and_near_a_spline_between_them():
    image = torch.from_numpy(gaussian_filter(np.random.default_rng(0).normal(size=(2, 40, 50)), (0, 3, 3)))
    rows, cols = torch.meshgrid(torch.arange(5.0, 30.0).double(), torch.arange(4.0, 40.0).double(), indexing="ij")
    for cubic in (True, False):
        assert torch.equal(sample(image, rows[None], cols[None], cubic=cubic), image[:, 5:30, 4:40])
    places = rows + 0.3, cols - 0.6
    expected = np.stack([map_coordinates(band, [p.numpy() for p in places], order=3) for band in image.numpy()])
    np.testing.assert_allclose(sample(image, places[0][None], places[1][None]), expected, atol=1e-3)


def test_local_correlation_is_that_of_a_direct_sum():
    a, b = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 1, 20, 24)) + 5)
    half = 2
    pads = (2 * half - 2, 2 * half) * 2
    inside = F.pad(torch.ones(20, 24, dtype=torch.bool), pads)
    rho = local_correlation(F.pad(a, pads), F.pad(b, pads), inside, half)[0].numpy()

    def sums(x):
        return 16 * uniform_filter(x, 4, mode="constant", origin=-1)

    x, y = (image[0].numpy() - sums(image[0].numpy()) / 16 for image in (a, b))
    np.testing.assert_allclose(rho, sums(x * y) / np.sqrt(sums(x * x) * sums(y * y)), rtol=1e-9)


def test_pearson_is_numpy_s_and_0_where_a_window_is_flat():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 5, 5))
    b += a
    expected = np.corrcoef(a.ravel(), b.ravel())[0, 1]
    assert float(pearson(torch.from_numpy(a)[None], torch.from_numpy(b)[None], 5)) == pytest.approx(expected)
    assert float(pearson(torch.full((1, 5, 5), 0.1).double(), torch.from_numpy(b)[None], 5)) == 0


def test_excess_and_grain_by_hand():
    """The definitions, written out with scipy for a scene without displacement."""
    fused, pan, ms = scene(height=64, width=64)
    found = measure(images_of(fused, pan, ms), MODES["registered"])

    def correlation(x, y):
        mean = lambda z: uniform_filter(z, 5, mode="constant")  # noqa: E731
        covariance = mean(x * y) - mean(x) * mean(y)
        return covariance / np.sqrt((mean(x * x) - mean(x) ** 2) * (mean(y * y) - mean(y) ** 2))

    p, excess = pan[0].numpy(), []
    kernel = gaussian_kernel(1.9)
    padded = F.pad(pan, (20,) * 4, mode="replicate")[None]
    low = F.conv2d(padded, kernel[None, None])
    grid = (1.5 + 4 * torch.arange(64.0).double()).expand(1, 64, 64)
    small = sample(low[0], grid.mT, grid)[0].numpy()
    place = np.clip((np.arange(256) - 1.5) / 4, 0, 63)
    for f, m in zip(fused.numpy(), ms.numpy(), strict=True):
        coarse = map_coordinates(correlation(m, small), np.meshgrid(place, place, indexing="ij"), order=1)
        # Windows at the border are not whole: 2 MS pixels, and one more for the interpolation.
        excess.append(np.maximum(0, coarse - correlation(f, p))[10:-10, 10:-10])
    assert found.d_rho_excess == pytest.approx(np.mean(excess), rel=1e-6)

    smooth = np.stack([gaussian_filter(f, 3, mode="nearest") for f in fused.numpy()])
    detail = fused.numpy() / smooth - 1
    common = detail.mean(0)
    expected = np.sqrt(((detail - common) ** 2).mean() / (common**2).mean())
    assert found.colour_grain == pytest.approx(expected, rel=1e-6)


def test_the_same_grey_detail_in_all_bands_has_neither_excess_nor_grain():
    _, pan, ms = scene(height=64, width=64)
    smooth = F.interpolate(ms[None], scale_factor=4, mode="bilinear")[0]
    flat = smooth.mean((1, 2), keepdim=True).expand_as(smooth)
    grey = flat * (1 + (pan - pan.mean()) / pan.mean())
    found = measure(images_of(grey, pan, ms), MODES["registered"])
    assert found.colour_grain < 1e-9 and found.d_rho_excess < 1e-9 and found.d_sr < 1e-9
    assert found.r_ergas > 1


def test_the_scores_of_detail_are_those_of_all_scores():
    images = images_of(*scene(height=64, width=64))
    found, whole = detail(images, MODES["displaced"], **SMALL), measure(images, MODES["displaced"])
    for name, value in asdict(found).items():
        assert value == pytest.approx(getattr(whole, name), rel=1e-9), name
    assert detail(images_of(*scene(height=12, width=16)), MODES["registered"]).d_rho > 0  # less than one window


def test_bad_input():
    fused, pan, ms = scene(height=40, width=40)
    with pytest.raises(ValueError, match="40 x 20 pixels are fewer than one window"):
        measure(images_of(fused[..., :80], pan[..., :80], ms[..., :20]), MODES["registered"])
    nodata = torch.ones(160, 160, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"no (window|pixel) .*without nodata"):
        measure(images_of(fused, pan, ms, nodata), MODES["registered"])
