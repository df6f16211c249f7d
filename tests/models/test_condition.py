import pytest
import torch
from textures import make_pair

from uknowpan.models.blur import Psf, default_psf
from uknowpan.models.features import (
    BACK_PROJECTION,
    BAND_FEATURES,
    PAN_FEATURES,
    SCENE_FEATURES,
    condition_reach,
    generic_condition,
)
from uknowpan.models.resample import crop, degrade, upsample
from uknowpan.models.statistics import USUAL_SOFTNESS, scene_statistics

FEATURES = ("lms", "pan", "pan_features", "band_features")


def conditioned(pan, ms, ratio=4, psf=None, offset=0.0):
    statistics = scene_statistics([(pan, ms)], ratio, psf or default_psf(ratio))
    return generic_condition(pan[None], ms[None], statistics, offset), statistics


@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 8])
def test_shapes(ratio):
    pair = make_pair(ratio, (16, 20), bands=3)
    condition, _ = conditioned(pair.pan, pair.ms, ratio)
    grid = (16 * ratio, 20 * ratio)
    assert condition.pan_features.shape == (1, PAN_FEATURES, *grid)
    assert condition.band_features.shape == (1, 3, BAND_FEATURES, *grid)
    assert condition.scene.shape == (1, SCENE_FEATURES)
    assert torch.equal(condition.pan[0], pair.pan)
    assert torch.equal(condition.lms, upsample(pair.ms[None], ratio))


@pytest.mark.parametrize("gain, offset", [(10000.0, 0.0), (0.02, 0.0), (255.0, 300.0)])
def test_gain_and_offset_leave_the_features(gain, offset):
    pair = make_pair(4, (24, 24))
    per_band = torch.tensor([1.0, 0.3, 2.0, 7.0]).view(-1, 1, 1)
    plain, _ = conditioned(pair.pan, pair.ms)
    pan, ms = gain * pair.pan + offset, gain * per_band * pair.ms + offset * per_band
    other, _ = conditioned(pan, ms)
    close = {"rtol": 0, "atol": 5e-3}  # of the detail contrast
    torch.testing.assert_close(other.pan_features, plain.pan_features, **close)
    kept = [0, 1, 3, 4, 5] if offset else list(range(BAND_FEATURES))  # 2 needs a zero level
    torch.testing.assert_close(other.band_features[:, :, kept], plain.band_features[:, :, kept], **close)
    assert torch.equal(other.scene, plain.scene)


@pytest.mark.parametrize(
    "ratio, bands, offset, margin", [(2, 3, 0.0, 0), (4, 1, 0.5, 0), (4, 8, 0.0, 3), (3, 4, 0.0, 1)]
)
def test_arrays_and_tensors_give_the_same_features(ratio, bands, offset, margin):
    """A CPU makes features in NumPy, a GPU in PyTorch."""
    pair = make_pair(ratio, (24, 28), bands=bands)
    statistics = scene_statistics([(pair.pan, pair.ms)], ratio, Psf(0.4 * ratio, (0.7, -0.3), 0.9))
    given = pair.pan[None], pair.ms[None]
    tensors = generic_condition(*given, statistics, offset, margin)
    arrays = generic_condition(*(x.numpy() for x in given), statistics, offset, margin)
    assert arrays.band_features.dtype == "float32"
    for name in (*FEATURES, "scene"):
        torch.testing.assert_close(
            torch.from_numpy(getattr(arrays, name)), getattr(tensors, name), rtol=1e-5, atol=5e-5
        )


def test_features_are_of_the_order_of_one():
    pair = make_pair(4, (32, 32))
    condition, _ = conditioned(pair.pan, pair.ms)
    inner = crop(condition.band_features, 24)[0].transpose(0, 1).flatten(1)
    spread = inner.square().mean(1).sqrt()
    assert ((spread > 0.05) & (spread < 5)).all()
    assert inner[5].abs().max() <= 1


@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_where_bands_are_multiples_of_pan_every_injection_is_right(offset):
    pair = make_pair(4, (32, 32), bands=1, shift=(offset, offset))
    gains = torch.tensor([0.5, 1.0, 3.0]).view(-1, 1, 1)
    psf = Psf(2.0, (offset, offset), 1.0)
    condition, statistics = conditioned(pair.pan, gains * pair.ms, psf=psf, offset=offset)
    scale = torch.from_numpy(statistics.detail_std[:-1]).float().view(1, -1, 1, 1)
    residual = (gains * pair.gt)[None] - condition.lms
    for feature in (0, 1, 2):
        error = crop(residual - scale * condition.band_features[:, :, feature], 24)
        assert error.std() < 0.03 * crop(residual, 24).std()
    assert crop(condition.band_features[:, :, 4], 24).abs().max() < 0.1  # nothing unexplained
    assert crop(condition.band_features[:, :, 5], 24).median() > 0.95  # correlation


def test_bands_do_not_see_each_other():
    pair = make_pair(4, (20, 20))
    together, statistics = conditioned(pair.pan, pair.ms)
    chosen = generic_condition(pair.pan[None], pair.ms[None, [2]], statistics.select([2]))
    torch.testing.assert_close(chosen.band_features[:, 0], together.band_features[:, 2])


def test_scene_numbers_say_ratio_blur_and_shift():
    numbers, usual = {}, pytest.approx(4 * (USUAL_SOFTNESS - 0.5), abs=1e-6)
    for name, ratio, psf in (
        ("plain", 4, Psf(2.0, (0.0, 0.0), 1.0)),
        ("ratio", 2, Psf(1.0, (0.0, 0.0), 1.0)),
        ("blur", 4, Psf(3.0, (0.0, 0.0), 1.0)),
        ("shift", 4, Psf(2.0, (3.0, -4.0), 1.0)),
        ("mirrored shift", 4, Psf(2.0, (-4.0, 3.0), 1.0)),
        ("bit of blur", 4, Psf(1.9, (0.0, 0.0), 1.0)),
        ("unlike", 4, Psf(2.0, (0.0, 0.0), 0.0)),
        ("alike", 4, Psf(2.0, (0.0, 0.0), 0.99)),
    ):
        pair = make_pair(ratio, (16, 16))
        numbers[name] = conditioned(pair.pan, pair.ms, ratio, psf)[0].scene[0].tolist()
    assert numbers["plain"] == [0.0, 0.0, 0.0, 0.0, -1.0, usual]
    assert numbers["ratio"] == [0.0, 1.0, 0.0, 0.0, -1.0, usual]
    assert numbers["blur"] == [1.0, 0.0, 0.0, 6.0, -1.0, usual]
    assert numbers["shift"] == numbers["mirrored shift"] == [0.0, 0.0, 1.25, 0.0, -1.0, usual]
    assert numbers["bit of blur"] == pytest.approx([-0.1, 0.0, 0.0, -0.8, -1.0, 4 * (USUAL_SOFTNESS - 0.5)], abs=1e-6)
    assert numbers["unlike"][4] == pytest.approx(1.0, abs=1e-4)
    assert numbers["alike"][4] == pytest.approx(0.0, abs=1e-2)
    pair = make_pair(4, (16, 16))
    registered, _ = conditioned(pair.pan, pair.ms, psf=Psf(2.0, (3.5, -3.5), 1.0), offset=0.5)
    assert registered.scene[0, :3].tolist() == [0.0, 0.0, 1.25]


def test_softness_is_the_last_number_of_the_scene():
    pair = make_pair(4, (16, 16))
    statistics = scene_statistics([(pair.pan, pair.ms)], 4, default_psf(4))
    usual = generic_condition(pair.pan[None], pair.ms[None], statistics)
    soft = generic_condition(pair.pan[None], pair.ms[None], statistics, softness=0.75)
    assert torch.equal(soft.scene[:, :-1], usual.scene[:, :-1])
    assert soft.scene[0, -1] == 1.0 > usual.scene[0, -1]
    assert torch.equal(soft.band_features, usual.band_features)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("margin", [0, 1, 5, 9])
@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_a_margin_is_left_out(ratio, margin, offset):
    pair = make_pair(ratio, (24, 20))
    statistics = scene_statistics([(pair.pan, pair.ms)], ratio, default_psf(ratio))
    whole = generic_condition(pair.pan[None], pair.ms[None], statistics, offset)
    inner = generic_condition(pair.pan[None], pair.ms[None], statistics, offset, margin)
    rows, cols = (slice(margin * ratio, (n - margin) * ratio) for n in (24, 20))
    for name in FEATURES:
        expected = getattr(whole.crop(rows, cols), name)
        torch.testing.assert_close(getattr(inner, name), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(inner.scene, whole.scene)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("shift", [(0.0, 0.0), (3.1, -2.0)])
@pytest.mark.parametrize("ratio", [1, 2, 3, 4, 5, 6, 8])
def test_nothing_beyond_the_reach_is_seen(ratio, shift, offset):
    n, core = 40, slice(18, 22)
    pair = make_pair(ratio, (n, n), seed=1)
    statistics = scene_statistics([(pair.pan, pair.ms)], ratio, Psf(0.5 * ratio, shift, 1.0))
    reach = condition_reach(statistics)

    def fine(s):
        return slice(s.start * ratio, s.stop * ratio)

    near = slice(core.start - reach, core.stop + reach)
    assert near.start >= 0
    pan, ms = 100 - 3 * pair.pan, 50 + 2 * pair.ms.flip(-1)  # elsewhere all is different
    pan[:, fine(near), fine(near)] = pair.pan[:, fine(near), fine(near)]
    ms[:, near, near] = pair.ms[:, near, near]

    def made(pan, ms):
        return generic_condition(pan[None], ms[None], statistics, offset)

    here = made(pair.pan, pair.ms).crop(fine(core), fine(core))
    there = made(pan, ms).crop(fine(core), fine(core))
    window = made(pair.pan[:, fine(near), fine(near)], pair.ms[:, near, near])
    inner = slice(reach * ratio, (reach + 4) * ratio)
    window = window.crop(inner, inner)
    for name in FEATURES:
        assert torch.equal(getattr(here, name), getattr(there, name)), name
        torch.testing.assert_close(getattr(window, name), getattr(here, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_back_projection_is_what_the_local_injection_misses(ratio, offset):
    pair = make_pair(ratio, (60, 48), bands=3, sigma=0.45 * ratio, shift=(0.8, -0.4), seed=3)
    statistics = scene_statistics([(pair.pan, pair.ms)], ratio)
    condition = generic_condition(pair.pan[None], pair.ms[None], statistics, offset)
    scale = torch.from_numpy(statistics.detail_std[:-1]).float().view(1, -1, 1, 1)
    injected = condition.lms + scale * condition.band_features[:, :, 1]
    psf = statistics.psf
    degraded = degrade(injected, ratio, psf.sigma, psf.shift)
    wanted = crop(upsample(pair.ms - degraded, ratio, offset), 10 * ratio)
    made = crop(scale * condition.band_features[:, :, BACK_PROJECTION], 10 * ratio)
    assert (made - wanted).square().mean() < 0.12**2 * wanted.square().mean()
    if offset == 0:  # the scene's own registration: what is missing is really missing
        error = crop(pair.gt - injected, 10 * ratio)
        assert (error - made).square().mean() < 0.95 * error.square().mean()


def test_flat_scene_stays_finite():
    for value in (0.0, 0.4):
        condition, _ = conditioned(torch.full((1, 64, 64), value), torch.full((3, 16, 16), value))
        assert torch.isfinite(condition.band_features).all()
        assert condition.band_features.abs().max() < 1
