"""Pairs in sensor geometry, sharpened as delivered: against an orthorectified twin, and through the commands."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from products import in_sensor_geometry, maxar
from rasterio.warp import Resampling, reproject
from rasters import UTM, write_raster
from sensors import RATIO, write_sensor_pair

import uknowpan as package
from uknowpan.models.metrics.indices import ergas

EDGE = 48
"""Pixels of the map beyond which PAN and MS both show the ground."""


def orthorectified(source, path, place, size, dem):
    """A raster on the map, as `gdalwarp -rpc -r lanczos -et 0` makes it."""
    with rasterio.open(source) as data:
        out = np.zeros((data.count, size, size), "float32")
        reproject(
            data.read().astype("float32"), out, rpcs=data.rpcs, src_crs="EPSG:4326", dst_crs=UTM, dst_transform=place,
            resampling=Resampling.lanczos, RPC_DEM=dem, tolerance=0, dst_nodata=-1,
        )  # fmt: skip
    return write_raster(path, out, place, nodata=-1.0)


def block_shifts(a, b, side=56):
    """(N, 2) rows and columns by which b lies off a, block by block, by least squares on gradients."""
    found = []
    for row in range(0, a.shape[0] - side + 1, side):
        for col in range(0, a.shape[1] - side + 1, side):
            x, y = (v[row : row + side, col : col + side] for v in (a, b))
            slopes = np.stack([g.ravel() for g in np.gradient((x + y) / 2)], 1)
            found.append(np.linalg.lstsq(slopes, (x - y).ravel(), rcond=None)[0])
    return np.array(found)


@pytest.mark.parametrize(("method", "with_dem"), [("gsa", True), ("brovey", False)])
def test_sharpening_before_and_after_orthorectification_agree(tmp_path, method, with_dem):
    """A hill on a slope: within 0.3 PAN pixels of each other, and ERGAS within 5 %."""
    import torch

    made = write_sensor_pair(tmp_path, hill=15.0)
    size, heights = made.truth.shape[1], {"dem": made.dem} if with_dem else {}
    package.sharpen(made.pan, made.ms, tmp_path / "sensor.tif", method=method, **heights)
    first = orthorectified(tmp_path / "sensor.tif", tmp_path / "first.tif", made.place, size, made.dem)
    pan = orthorectified(made.pan, tmp_path / "pan.tif", made.place, size, made.dem)
    ms = orthorectified(made.ms, tmp_path / "ms.tif", made.place @ Affine.scale(RATIO), size // RATIO, made.dem)
    package.sharpen(pan, ms, tmp_path / "last.tif", method=method)
    images = []
    for path in (first, tmp_path / "last.tif"):
        with rasterio.open(path) as data:
            images.append(data.read()[:, EDGE:-EDGE, EDGE:-EDGE].astype(float))
            assert (images[-1] != -1).all()
    assert np.abs(block_shifts(*(image.mean(0) for image in images))).max() < 0.3
    truth = torch.tensor(made.truth[:, EDGE:-EDGE, EDGE:-EDGE])
    before, after = (float(ergas(torch.tensor(image), truth, RATIO)) for image in images)
    assert abs(before / after - 1) < 0.05
    assert before < 0.25


def test_commands_take_a_pair_in_sensor_geometry(uknowpan, tmp_path):
    """Kind: a height that the identity of a result leaves out, so that a batch keeps what another height gave."""
    made = write_sensor_pair(tmp_path)
    words = uknowpan("info", made.pan, made.ms, "--height", 90).stdout
    assert "by the RPCs of both, at a height of 90 m" in words
    (tmp_path / "list.csv").write_text(f"pan,ms\n{made.pan},{made.ms}\n")
    batch = ("batch", tmp_path / "list.csv", "-o", tmp_path / "out", "--method", "brovey", "--coregister", "off")
    for _ in range(2):
        outcome = uknowpan(*batch, "--height", 90)
        assert outcome.code == 0, outcome.stderr
    with rasterio.open(tmp_path / "out" / "s_pan_sharp.tif") as data:
        assert data.transform.is_identity and abs(data.rpcs.line_off - made.pan_rpcs.line_off) < 1e-9
    assert "was made from other inputs or options" in uknowpan(*batch, "--height", 160).stderr


def test_a_maxar_product_of_level_1b(uknowpan, tmp_path):
    product = in_sensor_geometry(maxar(tmp_path))
    outcome = uknowpan("sharpen", product, "-o", tmp_path / "out.tif", "--method", "brovey", "-v")
    assert outcome.code == 0, outcome.stderr
    assert "by the RPCs of both, at a height of 120 m" in outcome.stderr
    with rasterio.open(tmp_path / "out.tif") as data:
        assert data.shape == (96, 96) and data.rpcs.line_off == 47.5 and data.descriptions[1] == "blue"


@pytest.mark.parametrize("words", [("--height", 5, "--dem", "dem.tif"), ("--height", "nan")])
def test_refused_options(uknowpan, words):
    outcome = uknowpan("sharpen", "pan.tif", "ms.tif", "-o", "out.tif", *words)
    assert outcome.code == 2 and "--height is one number" in outcome.stderr
