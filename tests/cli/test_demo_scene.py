"""The made-up demo scene: repeatable, plausible, and degraded as it says."""

import numpy as np
import pytest
import rasterio

from uknowpan.datasets import demo_scene
from uknowpan.datasets.demo_scene import BANDS, COVER, DemoScene, make_demo_scene, write_demo_scene


@pytest.fixture(scope="module")
def scene() -> DemoScene:
    return make_demo_scene(size=256)


def where(scene: DemoScene, cover: str) -> np.ndarray:
    found = scene.cover == COVER.index(cover)
    assert found.sum() > 50, f"hardly any {cover} in the scene"
    return found


def ndvi(scene: DemoScene) -> np.ndarray:
    _, _, red, nir = scene.truth
    return (nir - red) / (nir + red)


def test_same_arguments_same_pixels_another_seed_another_scene():
    first, again, other = (make_demo_scene(96, 4, seed) for seed in (5, 5, 6))
    for name in ("truth", "pan", "ms", "cover"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert (getattr(first, name) != getattr(other, name)).mean() > 0.1


@pytest.mark.parametrize(("size", "ratio"), [(64, 1), (96, 2), (96, 3), (90, 6), (256, 4)])
def test_shapes_and_ranges(size, ratio):
    scene = make_demo_scene(size, ratio)
    assert scene.truth.shape == (4, size, size)
    assert scene.pan.shape == (1, size, size)
    assert scene.ms.shape == (4, size // ratio, size // ratio)
    assert scene.cover.shape == (size, size) and scene.ratio == ratio
    for image in (scene.truth, scene.pan, scene.ms):
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image, np.rint(image))  # digital numbers
        assert image.min() >= 1 and image.max() <= 2047


@pytest.mark.parametrize(("size", "ratio"), [(63, 1), (128, 3), (128, 0)])
def test_refuses_sizes_that_cannot_be(size, ratio):
    with pytest.raises(ValueError, match=f"{size} PAN pixels cannot have MS pixels of {ratio}"):
        make_demo_scene(size, ratio)


def test_uses_the_range_of_an_11_bit_sensor(scene):
    low, high = np.percentile(scene.truth, [0.1, 99.9])
    assert 30 < low < 150 and 1200 < high < 2047
    assert (scene.truth == 2047).mean() < 0.001  # hardly anything saturates


def test_materials_have_the_spectra_of_what_they_are(scene):
    plants, roofs, water = ndvi(scene), where(scene, "roof"), where(scene, "water")
    for cover in ("tree", "garden", "field"):
        assert np.median(plants[where(scene, cover)]) > np.median(plants[roofs]) + 0.3
    assert np.median(plants[water]) < 0.1
    green, red, nir = (np.median(b[water]) for b in scene.truth[1:])
    assert nir < red < green and nir < 0.3 * np.median(scene.truth[3])
    assert abs(np.median(plants[where(scene, "road")])) < 0.2


def test_bands_do_not_scale_each_other(scene):
    """Otherwise PAN alone would explain all bands, and any method would look good."""
    correlation = np.corrcoef(scene.truth.reshape(4, -1))
    assert correlation[3, :3].max() < 0.6
    assert 0.6 < correlation[0, 2] < 0.97
    blue, _, red, _ = scene.truth
    coloured = (red / blue)[where(scene, "roof")]
    assert np.percentile(coloured, 95) > 3 * np.percentile(coloured, 5)  # tiles and blue metal


def test_pan_is_the_weighted_truth_with_little_noise(scene):
    difference = scene.pan[0] - np.tensordot(demo_scene.PAN_WEIGHTS, scene.truth, axes=1)
    assert abs(difference.mean()) < 0.1
    # noise and rounding to integers
    assert difference.std() == pytest.approx(np.hypot(demo_scene.NOISE_DN, 12**-0.5), rel=0.05)


@pytest.mark.parametrize("ratio", [2, 3, 4, 6])
def test_mtf_gain_at_the_ms_nyquist_frequency(ratio):
    size = 40 * ratio
    centres = np.arange(size) - (ratio - 1) / 2
    stripes = np.broadcast_to(np.cos(np.pi * centres / ratio), (1, size, size)).astype(np.float32)
    seen = demo_scene._degrade(stripes, ratio)[0, 10:-10, 10:-10]
    expected = demo_scene.MTF_GAIN * np.cos(np.pi * np.arange(10, 30))
    # at ratio 2 the sampled Gaussian is narrow enough for its alias to show
    np.testing.assert_allclose(seen, np.broadcast_to(expected, seen.shape), rtol=0.03)


@pytest.mark.parametrize("ratio", [2, 3, 4])
def test_ms_areas_nest_in_the_pan_grid(ratio):
    """A ramp is its own blur: MS pixel i must show it at ratio*i + (ratio-1)/2."""
    size = 24 * ratio
    rows, columns = np.mgrid[:size, :size].astype(np.float32)
    seen = demo_scene._degrade(np.stack([rows, columns]), ratio)[:, 6:-6, 6:-6]
    centres = ratio * np.arange(6, 18) + (ratio - 1) / 2
    np.testing.assert_allclose(seen[0], np.broadcast_to(centres[:, None], (12, 12)), atol=1e-3)
    np.testing.assert_allclose(seen[1], np.broadcast_to(centres, (12, 12)), atol=1e-3)


def test_ms_keeps_the_mean_and_lies_on_the_truth(scene):
    np.testing.assert_allclose(scene.ms.mean((1, 2)), scene.truth.mean((1, 2)), rtol=0.01)
    area_mean = scene.truth.reshape(4, 64, 4, 64, 4).mean((2, 4))
    for ms, mean in zip(scene.ms, area_mean, strict=True):
        here = np.corrcoef(ms[1:-1, 1:-1].ravel(), mean[1:-1, 1:-1].ravel())[0, 1]
        moved = [
            np.corrcoef(ms[1:-1, 1:-1].ravel(), np.roll(mean, by, axis)[1:-1, 1:-1].ravel())[0, 1]
            for by in (-1, 1)
            for axis in (0, 1)
        ]
        assert here > 0.97 and here > max(moved)


def test_houses_and_trees_cast_shadows_away_from_the_sun():
    height = np.zeros((80, 80), np.float32)
    height[40:44, 40:44] = 5  # a tower; the sun stands in the south-east
    towards_sun = np.array([1.0, 0.5])
    shadow = demo_scene._shadow(height, towards_sun / np.hypot(*towards_sun))
    rows, columns = np.nonzero(shadow > 0.5)
    assert rows.max() < 44 and columns.max() < 44
    length = 5 / np.tan(demo_scene.SUN_ELEVATION) / demo_scene.CELL
    reached = np.hypot(40 - rows.min(), 40 - columns.min())
    assert reached == pytest.approx(length, abs=2.5)
    assert shadow[41, 41] == 0 and shadow[60, 60] == 0


def test_written_scene_is_a_georeferenced_nested_pair(scene, tmp_path):
    paths = write_demo_scene(scene, tmp_path / "new" / "folder")
    with (
        rasterio.open(paths.pan) as pan,
        rasterio.open(paths.ms) as ms,
        rasterio.open(paths.truth) as truth,
    ):
        assert pan.crs == ms.crs == truth.crs == "EPSG:32631"
        assert pan.res == truth.res == (0.5, 0.5) and ms.res == (2, 2)
        assert pan.bounds == ms.bounds == truth.bounds
        assert {d for raster in (pan, ms, truth) for d in raster.dtypes} == {"uint16"}
        assert ms.descriptions == truth.descriptions == BANDS
        assert [c.name for c in ms.colorinterp] == ["blue", "green", "red", "undefined"]
        for raster, image in ((pan, scene.pan), (ms, scene.ms), (truth, scene.truth)):
            np.testing.assert_array_equal(raster.read(), image)
