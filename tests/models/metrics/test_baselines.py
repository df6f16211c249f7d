import numpy as np
import pytest
import torch
from scipy.optimize import lsq_linear, nnls
from textures import make_pair

from uknowpan.models.metrics.baselines import BASELINES, MAX_MODULATION, _nonnegative_least_squares
from uknowpan.models.metrics.indices import ergas
from uknowpan.models.metrics.sensors import find_sensor
from uknowpan.models.metrics.toolbox import interp23tap, mtf_filter
from uknowpan.models.pancollection.protocol import wald_lms, wald_ms
from uknowpan.models.resample import crop
from uknowpan.models.types import PatchBatch

QB = find_sensor("QB")
GAINS = QB.mtf_ms
ALL = list(BASELINES)


def simulate(gt, pan, gains=GAINS, ratio=4):
    """One image by Wald's protocol, LMS as test files have it."""
    ms = wald_ms(gt.double(), gains, ratio)
    lms = interp23tap(ms, ratio) if ratio != 3 else wald_lms(ms, ratio)
    return PatchBatch(pan.double()[None], ms[None], lms[None], gt.double()[None])


def image(seed=0, ratio=4, size=(20, 24), bands=4):
    """A textured scene between 0 and 1; the PAN is the mean of the bands."""
    pair = make_pair(ratio, size, bands, seed=seed)
    return simulate(pair.gt / 16, pair.pan / 16, (GAINS * 2)[:bands], ratio)


def multiples_of_pan(gain):
    pan = make_pair(4, (20, 24), 4).pan.double() / 16
    factors = torch.tensor([0.3, 0.7, 1.0, 1.6]).view(-1, 1, 1)
    return simulate(factors * pan, pan, (gain,) * 4)


# ---------------------------------------------------------------------- each method's definition


def _flat(x):
    return x.numpy().reshape(-1)


def _gsa(p, low, gains):
    ms, lms, pan = p.ms[0].numpy(), p.lms[0].numpy(), p.pan[0, 0].numpy()
    target = _flat(wald_ms(p.pan[0], [np.mean(gains)], 4))
    design = np.stack([*ms.reshape(len(ms), -1), np.ones(target.size)], 1)
    weights = np.linalg.lstsq(design, target, rcond=None)[0][:-1]
    intensity = np.tensordot(weights, lms, 1)
    detail = pan - pan.mean() - intensity + intensity.mean()
    moments = [np.cov(band.ravel(), intensity.ravel()) for band in lms]
    return np.stack([b + c[0, 1] / c[1, 1] * detail for b, c in zip(lms, moments, strict=True)])


def _mtf_glp_fs(p, low, gains):
    pan = _flat(p.pan)
    ratios = [
        np.cov(_flat(lms), pan)[0, 1] / np.cov(_flat(near), pan)[0, 1] for lms, near in zip(p.lms[0], low, strict=True)
    ]
    return p.lms[0].numpy() + np.reshape(ratios, (-1, 1, 1)) * (p.pan[0] - low).numpy()


def _mtf_glp_hpm_r(p, low, gains):
    bands = []
    for lms, near in zip(p.lms[0], low, strict=True):
        slope, offset = np.polyfit(_flat(near), _flat(lms), 1)
        quotient = (slope * p.pan[0, 0] + offset) / (slope * near + offset)
        bands.append((lms * quotient).numpy())
    return np.stack(bands)


def _bdsd_pc(p, low, gains):
    below = mtf_filter(p.ms[0], gains, 4)
    pan = wald_ms(p.pan[0], [QB.mtf_pan], 4)
    design = torch.cat([below, pan]).flatten(1).T.numpy()
    full = torch.cat([p.lms[0], p.pan[0]]).numpy()
    bounds = ([-np.inf] * len(below) + [0], [0] * len(below) + [np.inf])
    bands = []
    for ms, blurred, lms in zip(p.ms[0], below, p.lms[0], strict=True):
        found = lsq_linear(design, _flat(ms - blurred), bounds, tol=1e-14, max_iter=500)
        bands.append(lms.numpy() + np.tensordot(found.x, full, 1))
    return np.stack(bands)


def _brovey(p, low, gains):
    intensity, pan = p.lms[0].mean(0), p.pan[0, 0]
    blurred = mtf_filter(p.pan[0], [float(np.mean(gains))], 4)
    matched = (pan - pan.mean()) * intensity.std() / blurred.std() + intensity.mean()
    return (p.lms[0] * matched / intensity).numpy()


REFERENCE = {
    "Brovey": _brovey,
    "GSA": _gsa,
    "MTF-GLP-FS": _mtf_glp_fs,
    "MTF-GLP-HPM-R": _mtf_glp_hpm_r,
    "BDSD-PC": _bdsd_pc,
}


@pytest.mark.parametrize("name", ALL)
def test_methods_are_as_their_papers_define_them(name):
    patches = image(3)
    low = interp23tap(wald_ms(patches.pan[0].expand(4, -1, -1), GAINS, 4), 4)
    expected = REFERENCE[name](patches, low, GAINS)
    found = BASELINES[name](patches, GAINS, 4, QB.mtf_pan)[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 if name == "BDSD-PC" else 1e-10)


# ----------------------------------------------------------------------------- what they achieve


@pytest.mark.parametrize("name", ALL)
def test_bands_that_are_multiples_of_pan_come_out_true(name):
    patches = multiples_of_pan(0.3)
    error = BASELINES[name](patches, [0.3], 4, pan_gain=0.3) - patches.gt
    if name == "GSA":  # gives each band the LMS's mean
        error = error - error.mean((-2, -1), keepdim=True)
    # Brovey takes the contrast from a PAN that was blurred but not sampled.
    before = (patches.lms - patches.gt).square().mean().sqrt()
    limit = 0.1 * float(before) if name == "Brovey" else 1e-9
    assert error.square().mean().sqrt() < limit


@pytest.mark.parametrize("ratio, bands", [(2, 4), (3, 4), (4, 4), (4, 8)])
@pytest.mark.parametrize("name", ALL)
def test_details_of_pan_bring_bands_nearer_to_the_truth(name, ratio, bands):
    patches = image(5, ratio, bands=bands)
    hrms = BASELINES[name](patches, (GAINS * 2)[:bands], ratio)
    fused, lms, gt = (crop(x, 12) for x in (hrms, patches.lms, patches.gt))
    assert ergas(fused, gt, ratio) < 0.85 * ergas(lms, gt, ratio)


# ------------------------------------------------------------------------------------ properties


@pytest.mark.parametrize("name", ALL)
def test_batch_unit_order_of_bands_and_dtype_do_not_matter(name):
    patches, order = image(1), [2, 0, 3, 1]
    plain = BASELINES[name](patches, GAINS, 4)
    both = BASELINES[name](PatchBatch.cat([image(2), patches]), GAINS, 4)
    torch.testing.assert_close(both[1:], plain, rtol=0, atol=1e-12)
    bands = {k: getattr(patches, k)[:, order] * 2047 for k in ("ms", "lms", "gt")}
    other = BASELINES[name](PatchBatch(pan=patches.pan * 2047, **bands), [GAINS[i] for i in order], 4)
    torch.testing.assert_close(other / 2047, plain[:, order], rtol=0, atol=1e-9)
    single = patches.map(lambda x: x.float())
    assert torch.equal(BASELINES[name](single, GAINS, 4), BASELINES[name](single.map(lambda x: x.double()), GAINS, 4))


@pytest.mark.parametrize("value", [0.0, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_flat_images_stay_flat(name, value):
    gt = torch.full((4, 64, 64), value)
    patches = simulate(gt, gt[:1])
    # The toolbox's filters sum to 0.9984 at the least.
    torch.testing.assert_close(BASELINES[name](patches, GAINS, 4), patches.gt, rtol=0, atol=0.005 * value)


@pytest.mark.parametrize("name", ["Brovey", "MTF-GLP-HPM-R"])
def test_dark_pixels_do_not_blow_up(name):
    patches = image(1)
    dark = patches.map(lambda x: x - x.min())
    dark.pan[..., 30:40, 30:40] = 2.0
    dark.lms[..., 30:35, 30:40] = 1e-9
    hrms = BASELINES[name](dark, GAINS, 4)
    assert bool(hrms.isfinite().all())
    assert float((hrms.abs() - MAX_MODULATION * dark.lms.abs()).max()) <= 1e-12


# ----------------------------------------------------------------- non-negative least squares


@pytest.mark.parametrize("seed", range(20))
def test_nonnegative_least_squares_equals_scipy(seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(60, 9)) + 3 * rng.normal(size=(60, 1)) * rng.uniform(size=9)
    y = a @ rng.normal(size=(9, 4)) + rng.normal(size=(60, 4))
    found = _nonnegative_least_squares(torch.from_numpy(a), torch.from_numpy(y))
    expected = np.stack([nnls(a, column)[0] for column in y.T], 1)
    assert (expected == 0).any()
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_nonnegative_least_squares_with_columns_that_are_alike():
    rng = np.random.default_rng(0)
    a = np.repeat(rng.normal(size=(50, 3)), 3, axis=1)
    a[:, -1] = 0
    y = rng.normal(size=(50, 5))
    found = _nonnegative_least_squares(torch.from_numpy(a), torch.from_numpy(y)).numpy()
    assert (found >= 0).all()
    errors = np.linalg.norm(y - a @ found, axis=0)
    np.testing.assert_allclose(errors, [nnls(a, column)[1] for column in y.T], rtol=1e-9)


# ------------------------------------------------------------------------------------- bad input


def test_wrong_gains_and_ratio_are_refused():
    patches, name = image(1), "GSA"
    with pytest.raises(ValueError, match="3 MTF gains for an image of 4 bands"):
        BASELINES[name](patches, GAINS[:3], 4)
    with pytest.raises(ValueError, match="20 x 24 pixels at ratio 2 needs PAN and LMS of 40 x 48"):
        BASELINES[name](patches, GAINS, 2)
