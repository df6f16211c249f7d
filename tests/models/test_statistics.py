import json

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from textures import make_pair

from uknowpan.models.blur import DETAIL_WINDOW, Psf, estimate_psf
from uknowpan.models.resample import degrade
from uknowpan.models.statistics import SceneStatistics, scene_statistics

PSF = Psf(2.1, (0.4, -0.9), 0.95)


def local_mean(x):
    inside = uniform_filter(np.ones_like(x[0]), DETAIL_WINDOW, mode="constant")
    means = [uniform_filter(band, DETAIL_WINDOW, mode="constant") for band in x]
    return np.stack(means) / inside


def stacked(pair):
    """(C + 1, h, w) float64: MS, and PAN degraded."""
    low = degrade(pair.pan[None], 4, PSF.sigma, PSF.shift)[0]
    return torch.cat([pair.ms, low]).double().numpy()


def assert_same(a, b, **close):
    assert (a.ratio, a.psf) == (b.ratio, b.psf)
    for name in ("mean", "covariance", "detail"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **close)


def test_moments_are_the_textbook_ones():
    pairs = [make_pair(4, (20, 24), seed=1), make_pair(4, (18, 30), seed=2)]
    statistics = scene_statistics([(p.pan, p.ms) for p in pairs], 4, PSF)
    images = [stacked(p) for p in pairs]
    values = np.concatenate([x.reshape(5, -1) for x in images], 1)
    details = np.concatenate([(x - local_mean(x)).reshape(5, -1) for x in images], 1)
    np.testing.assert_allclose(statistics.mean, values.mean(1), rtol=1e-5)
    np.testing.assert_allclose(statistics.covariance, np.cov(values, bias=True), rtol=1e-4, atol=1e-4)
    power = details @ details.T / details.shape[1]
    np.testing.assert_allclose(statistics.detail, power, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(statistics.detail_std, np.sqrt(power.diagonal()), rtol=1e-4)
    slopes = [np.sum(d * details[4]) / np.sum(details[4] ** 2) for d in details[:4]]
    np.testing.assert_allclose(statistics.detail_gain, slopes, rtol=1e-4)
    assert (statistics.ratio, statistics.psf, statistics.bands) == (4, PSF, 4)


def test_bands_in_another_order():
    pair = make_pair(4, (20, 24), seed=1)
    statistics = scene_statistics([(pair.pan, pair.ms)], 4, PSF)
    order = [2, 0, 3]
    chosen = scene_statistics([(pair.pan, pair.ms[order])], 4, PSF)
    assert_same(statistics.select(order), chosen, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (7.0, -5.0)])
def test_invalid_pixels_and_what_touches_them_are_left_out(shift):
    pair = make_pair(4, (36, 40), seed=3)
    valid = torch.ones(36, 40, dtype=torch.bool)
    valid[20:23, 11:14] = False
    valid[0, 30:] = False
    psf = Psf(2.1, shift, 0.95)

    def measured(junk):
        pan, ms = pair.pan.clone(), pair.ms.clone()
        ms[:, ~valid] = junk
        pan[:, ~valid.repeat_interleave(4, 0).repeat_interleave(4, 1)] = junk
        return scene_statistics([(pan, ms)], 4, psf, [valid])

    assert_same(measured(-9999.0), measured(1e5), rtol=0, atol=0)
    assert np.isfinite(measured(float("nan")).detail).all()


def test_blur_is_estimated_where_all_is_valid():
    clean = make_pair(4, (40, 44), sigma=2.4, shift=(1.0, -2.0))
    dirty = make_pair(4, (40, 44), sigma=1.2, shift=(-3.0, 2.0), seed=5)
    hole = torch.ones(40, 44, dtype=torch.bool)
    hole[3, 3] = False
    masks = [torch.ones(40, 44, dtype=torch.bool), hole]
    windows = [(clean.pan, clean.ms), (dirty.pan, dirty.ms)]
    statistics = scene_statistics(windows, 4, valid=masks)
    assert statistics.psf == estimate_psf(windows[:1], 4)


def test_nothing_valid():
    pair = make_pair(4, (20, 20))
    with pytest.raises(ValueError, match="no pixel where PAN and all MS bands are valid"):
        scene_statistics([(pair.pan, pair.ms)], 4, PSF, [torch.zeros(20, 20, dtype=torch.bool)])


def test_json_round_trip_is_exact():
    pair = make_pair(4, (20, 24), seed=1)
    statistics = scene_statistics([(pair.pan, pair.ms)], 4)
    back = SceneStatistics.from_dict(json.loads(json.dumps(statistics.as_dict())))
    assert_same(back, statistics, rtol=0, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.3, 5000.0])
def test_flat_scene_stays_finite(value):
    window = (torch.full((1, 80, 80), value), torch.full((3, 20, 20), value))
    statistics = scene_statistics([window], 4)
    assert np.isfinite(statistics.detail_gain).all()
    assert (statistics.detail_std > 0).all()
    assert statistics.detail_std.max() <= 1e-3 * value + 1e-9
