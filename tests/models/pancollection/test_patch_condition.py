"""The lite student's condition for patches: where MS samples lie, whose statistics, which order."""

from functools import cache

import h5py
import numpy as np
import pytest
import torch
from textures import Texture

from uknowpan.models.blur import gain_to_sigma
from uknowpan.models.features import BAND_FEATURES, PAN_FEATURES, SCENE_FEATURES, condition_reach, generic_condition
from uknowpan.models.pancollection.condition import PatchConditioner
from uknowpan.models.pancollection.dataset import Draw, PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.pancollection.protocol import registration_of, wald_lms, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.resample import crop, mirrored, upsample
from uknowpan.models.statistics import scene_statistics
from uknowpan.models.types import PatchBatch

GAIN, FULL_SCALE = 0.3, 1000.0
FEATURES = ("lms", "pan", "pan_features", "band_features", "scene")
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@cache
def make_scene(ratio, bands, seed, blur=0.0, n=192):
    """pan, ms, lms, gt of a whole scene in DN, without a batch axis; rougher for larger seeds."""
    place = np.arange(n, dtype=float)
    shared = Texture(seed)(place, place, blur)
    own = [Texture((seed, band))(place, place, blur) for band in range(bands)]
    gain = 40 * (1 + 4 * seed) * np.linspace(0.6, 1.4, bands)[:, None, None]
    gt = torch.from_numpy(400 + gain * np.stack([shared + 0.4 * o for o in own]))
    ms = wald_ms(gt, [GAIN] * bands, ratio)
    return gt.mean(0, keepdim=True), ms, wald_lms(ms, ratio), gt


def write_file(path, *, ratio=4, bands=4, seeds=(0, 1), blur=0.0, patch=64, places=True):
    """Patches of several scenes without overlap."""
    with PanCollectionWriter(path) as writer:
        for number, seed in enumerate(seeds):
            pan, ms, lms, gt = make_scene(ratio, bands, seed, blur)
            n = pan.shape[-1] // patch
            corners = [(patch * i, patch * j) for i in range(n) for j in range(n)]

            def cut(x, corners=corners, size=pan.shape[-1]):
                step = size // x.shape[-1]
                p = patch // step
                return torch.stack([x[:, y // step :, z // step :][:, :p, :p] for y, z in corners])

            images = PatchBatch(cut(pan), cut(ms), cut(lms), cut(gt))
            writer.append(images, np.array([(number, y, x) for y, x in corners]))
        writer.finish({"max_value": FULL_SCALE, "registration": registration_of(ratio)})
        writer.publish()
    if not places:
        with h5py.File(path, "a") as file:
            del file["place"]
    return path


def opened(*paths):
    return PanCollectionDataset([PanCollectionFile(path) for path in paths])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return opened(write_file(tmp_path_factory.mktemp("patches") / "two.h5"))


@pytest.fixture(scope="module")
def conditioner(dataset):
    return PatchConditioner(dataset)


def drawn(dataset, draws):
    return PatchBatch.cat([dataset[d] for d in draws])


def rms(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize(("ratio", "bands"), [(4, 4), (2, 4), (4, 8), (2, 8), (3, 4)])
def test_lms_lies_on_the_stored_one(tmp_path, ratio, bands):
    """Nearly exactly so where nothing is too fine for either interpolator."""
    patch = 64 // ratio * ratio
    for blur, largest, times in ((0.0, 0.12, 2.5), (1.5 * ratio, 0.02, 10)):
        made = {"ratio": ratio, "bands": bands, "seeds": (1,), "blur": blur, "patch": patch}
        dataset = opened(write_file(tmp_path / f"{blur}.h5", **made))
        conditioner = PatchConditioner(dataset)
        assert conditioner.offset == (0.5 if ratio != 3 else 0.0)
        batch = drawn(dataset, range(9))
        condition, scale = conditioner.condition(batch)

        def error(lms, batch=batch, scale=scale, border=conditioner.border):
            return rms(crop((lms - batch.lms) / scale, border))

        here, centred = error(condition.lms), error(upsample(batch.ms, ratio))
        if ratio == 3:  # registration "area": the stored one is `upsample`'s, and centred
            assert here < 1e-4
        else:
            assert here < largest and centred > times * here


@pytest.mark.parametrize(("ratio", "bands"), [(4, 4), (2, 8)])
def test_local_injection_explains_most_of_x0(tmp_path, ratio, bands):
    dataset = opened(write_file(tmp_path / "a.h5", ratio=ratio, bands=bands))
    conditioner = PatchConditioner(dataset)
    batch = drawn(dataset, range(0, 18, 4))
    condition, scale = conditioner.condition(batch)
    size = batch.pan.shape[-2:]
    assert condition.lms.shape == (5, bands, *size) and scale.shape == (5, bands, 1, 1)
    assert condition.pan_features.shape == (5, PAN_FEATURES, *size)
    assert condition.band_features.shape == (5, bands, BAND_FEATURES, *size)
    assert condition.scene.shape == (5, SCENE_FEATURES)
    x0 = (batch.gt - condition.lms) / scale
    left = crop(x0 - condition.band_features[:, :, 1], conditioner.border)
    assert rms(left) < 0.4 * rms(x0)


def test_blur_and_shift_are_those_of_the_simulation(conditioner):
    for statistics in conditioner.statistics:
        assert statistics.psf.sigma == pytest.approx(gain_to_sigma(GAIN, 4), rel=0.04)
        assert statistics.psf.shift == pytest.approx((0.5, 0.5), abs=0.03)
        assert statistics.psf.correlation > 0.99


def test_patches_too_small_to_tell_have_the_shift_of_their_registration(tmp_path):
    dataset = opened(write_file(tmp_path / "small.h5", patch=32))
    conditioner = PatchConditioner(dataset)
    psf = conditioner.statistics[0].psf
    assert psf.shift == (0.5, 0.5) and psf.sigma == pytest.approx(gain_to_sigma(0.3, 4))
    condition, _ = conditioner.condition(drawn(dataset, [0]))
    assert float(condition.scene[0, 2]) == 0.0  # nothing beyond the registration


def test_statistics_are_those_of_each_scene(dataset, conditioner):
    assert len(conditioner.statistics) == 2
    for seed, statistics in enumerate(conditioner.statistics):
        pan, ms, *_ = (x.float() / FULL_SCALE for x in make_scene(4, 4, seed))
        whole = scene_statistics([(pan, ms)], 4, statistics.psf)
        torch.testing.assert_close(statistics.detail_std, whole.detail_std, rtol=0.05, atol=0)
        torch.testing.assert_close(statistics.mean, whole.mean, rtol=0.01, atol=0)
    _, scale = conditioner.condition(drawn(dataset, [0, 9]))
    assert torch.equal(scale[1, :, 0, 0], torch.from_numpy(conditioner.statistics[1].detail_std[:-1]).float())
    assert float((scale[1] / scale[0]).min()) > 3


def test_files_that_do_not_say_their_scenes_have_one_each(tmp_path):
    paths = [
        write_file(tmp_path / "1.h5", places=False),
        write_file(tmp_path / "2.h5", seeds=(2,), places=False),
        write_file(tmp_path / "3.h5"),
    ]
    dataset = opened(*paths)
    assert dataset.sources.tolist() == [0] * 18 + [1] * 9 + [2] * 9 + [3] * 9
    conditioner = PatchConditioner(dataset)
    assert len(conditioner.statistics) == 4
    dataset.close()
    for other in (np.ones((3, 3), int), np.ones((18, 3)), np.ones(18, int)):  # somebody else's
        with h5py.File(paths[0], "a") as file:
            file.pop("place", None)
            file["place"] = other
        assert PanCollectionFile(paths[0]).sources.tolist() == [0] * 18


def test_a_patch_does_not_depend_on_its_batch(dataset, conditioner):
    draws = [Draw(d, bool(d & 1), bool(d & 2)) for d in (12, 3, 9, 0, 17, 1, 3, 14)]
    together, scales = conditioner.condition(drawn(dataset, draws))
    for row, draw in enumerate(draws):
        alone, scale = conditioner.condition(drawn(dataset, [draw]))
        for name in FEATURES:
            found = getattr(together, name)[row : row + 1]
            torch.testing.assert_close(found, getattr(alone, name), **CLOSE)
        assert torch.equal(scales[row : row + 1], scale)
        assert torch.equal(together.pan[row], dataset[draw].pan[0])


def test_the_condition_of_a_flipped_patch_is_flipped(dataset, conditioner):
    """Though its samples then lie half a pixel short of the nested centres."""
    plain, _ = conditioner.condition(drawn(dataset, [5]))
    for draw in (Draw(5, True), Draw(5, False, True), Draw(5, True, True)):
        batch = drawn(dataset, [draw])
        turned, _ = conditioner.condition(batch)
        for name in FEATURES[:-1]:
            assert torch.equal(getattr(turned, name), getattr(plain, name).flip(draw.axes))
        assert torch.equal(turned.pan, batch.pan)


def test_it_is_the_condition_of_the_mirrored_patch(dataset, conditioner):
    batch = drawn(dataset, [4])
    statistics, n = conditioner.statistics[0], batch.ms.shape[-1]
    reach = condition_reach(statistics)

    def padded(x, step):
        index = mirrored(-reach * step, (n + 2 * reach) * step, n * step)
        return x[:, :, index][..., index]

    whole = generic_condition(padded(batch.pan, 4), padded(batch.ms, 1), statistics, 0.5)
    inner = slice(4 * reach, 4 * (reach + n))
    found, _ = conditioner.condition(batch)
    for name in FEATURES:
        torch.testing.assert_close(getattr(found, name), getattr(whole.crop(inner, inner), name), **CLOSE)


def test_a_patch_is_told_nearly_what_its_scene_would_tell(dataset, conditioner):
    pan, ms, *_ = (x.float()[None] / FULL_SCALE for x in make_scene(4, 4, 0))
    found, _ = conditioner.condition(drawn(dataset, [4]))  # the middle of 3 x 3
    whole = generic_condition(pan, ms, conditioner.statistics[0], 0.5)
    middle = slice(64, 128)
    expected = whole.crop(middle, middle)
    for name, tolerance in (("lms", 1e-5), ("pan_features", 0.05), ("band_features", 0.15)):
        a, b = (crop(getattr(c, name), conditioner.border) for c in (found, expected))
        assert rms(a - b) < tolerance * rms(b), name


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_a_stream_say_where_they_come_from(dataset, conditioner, workers):
    batches = PatchBatches(dataset, PatchSampler(18, batch_size=6, seed=1, flips=True))
    for step, batch in enumerate(batches.stream(0, 2, workers=workers)):
        draws = batches.sampler.draws(step)
        said = [[d.sample // 9, d.flip_rows, d.flip_columns] for d in draws]
        assert batch.origin.tolist() == said
        assert batch.to(torch.float64).map(lambda x: -x).origin.tolist() == said
        condition, _ = conditioner.condition(batch)
        assert torch.equal(condition.pan, batch.pan)


def test_batches_of_others_are_refused(tmp_path, dataset, conditioner):
    with pytest.raises(ValueError, match="does not hold the origin of its patches"):
        conditioner.condition(dataset.files[0].read([0]))
    alone = opened(write_file(tmp_path / "one.h5", seeds=(1,)))
    with pytest.raises(ValueError, match="scene 1, the dataset of this conditioner has 1 scenes"):
        PatchConditioner(alone).condition(drawn(dataset, [9]))
