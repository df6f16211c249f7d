"""Scenes with a known truth: repeatable, of any size, degraded as declared."""

import resource

import numpy as np
import pytest
import rasterio

from uknowpan.datasets import synthetic
from uknowpan.datasets.synthetic import BANDS, load_demo_scene, make_scene, write_scene
from uknowpan.errors import InputError
from uknowpan.tiling.raster import GDAL_ERRORS


def test_equal_arguments_give_equal_pixels_and_another_seed_another_scene():
    first, again, other = (make_scene(96, seed=seed) for seed in (5, 5, 6))
    for name in ("truth", "pan", "ms"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert (getattr(first, name) != getattr(other, name)).mean() > 0.1


@pytest.mark.parametrize(
    ("size", "ratio", "bands", "dtype", "full"),
    [(64, 1, 4, "uint16", 2047), (96, 3, 1, "uint8", 255), (90, 6, 8, "uint16", 2047), (256, 4, 4, "float32", 1)],
)
def test_shapes_and_ranges(size, ratio, bands, dtype, full):
    scene = make_scene(size, ratio, bands=bands, dtype=dtype)
    assert scene.truth.shape == (bands, size, size) and scene.pan.shape == (1, size, size)
    assert scene.ms.shape == (bands, size // ratio, size // ratio)
    for image in (scene.truth, scene.pan, scene.ms):
        assert image.dtype == np.float32 and image.min() >= (1 if full > 1 else 0) and image.max() <= full
        assert full == 1 or (image == np.rint(image)).all()
        assert image.std() > 0.03 * full
    assert (scene.truth == full).mean() < 0.05  # little saturates


def test_the_pan_alone_does_not_explain_the_bands():
    """Otherwise any method would look good."""
    scene = make_scene(256)
    pan = scene.pan.ravel()
    explained = [np.corrcoef(pan, band.ravel())[0, 1] for band in scene.truth]
    assert all(0.4 < share < 0.98 for share in explained)


@pytest.mark.parametrize("scene", [make_scene(256), load_demo_scene(256)], ids=["drawn", "real"])
def test_the_pair_shows_its_truth(scene):
    pan = np.tensordot(synthetic.PAN_WEIGHTS, scene.truth, axes=1)
    assert abs(scene.pan[0] - pan).mean() < 0.6 * abs(np.diff(pan)).mean()
    assert np.diff(scene.pan[0]).std() < np.diff(pan).std()  # softer, by its optics
    means = scene.truth.reshape(4, 64, 4, 64, 4).mean((2, 4))
    for ms, mean in zip(scene.ms, means, strict=True):

        def likeness(by, axis, ms=ms, mean=mean):
            return np.corrcoef(ms[1:-1, 1:-1].ravel(), np.roll(mean, by, axis)[1:-1, 1:-1].ravel())[0, 1]

        here = likeness(0, 0)
        assert here > 0.95 and here > max(likeness(by, axis) for by in (-1, 1) for axis in (0, 1))
        assert ms.mean() == pytest.approx(mean.mean(), rel=0.02)


@pytest.mark.parametrize("scene", [make_scene(96, bands=8), load_demo_scene(128)], ids=["drawn", "real"])
def test_a_written_scene_is_a_georeferenced_nested_pair(scene, tmp_path):
    paths = write_scene(scene, tmp_path / "new" / "folder")
    with rasterio.open(paths.pan) as pan, rasterio.open(paths.ms) as ms, rasterio.open(paths.truth) as truth:
        assert pan.crs == ms.crs == truth.crs == scene.crs
        assert pan.res == truth.res == (scene.metres,) * 2 and ms.res == (4 * scene.metres,) * 2
        assert pan.bounds == ms.bounds == truth.bounds
        assert {d for raster in (pan, ms, truth) for d in raster.dtypes} == {scene.dtype}
        assert ms.descriptions == truth.descriptions
        assert (ms.descriptions == BANDS) == (ms.count == 4)
        for raster, image in ((pan, scene.pan), (ms, scene.ms), (truth, scene.truth)):
            np.testing.assert_array_equal(raster.read(), image)


def test_a_full_disk_leaves_no_torn_raster(tmp_path):
    """Kind: `demo` on a full disk leaves torn rasters under their final names."""
    drawn, (soft, hard) = make_scene(96, seed=5), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises((InputError, *GDAL_ERRORS)):
            write_scene(drawn, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_demo_scene_lies_where_it_was_taken():
    whole, part = load_demo_scene(4096), load_demo_scene(128)
    assert whole.truth.shape == (4, 304, 304) and whole.crs == "EPSG:26917"
    np.testing.assert_array_equal(part.truth, whole.truth[:, 88:216, 88:216])
    assert part.corner == (whole.corner[0] + 88, whole.corner[1] - 88)
    blue, green, red, nir = whole.truth
    assert ((nir - red) / (nir + red)).mean() > 0.2 and green.mean() > max(blue.mean(), red.mean())  # a wood
