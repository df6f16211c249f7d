"""Pairs in sensor geometry: the place of the MS by RPCs, and what is refused."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasters import UTM, write_raster
from sensors import LAT, LON, PIXEL, RATIO, SIZE, heights, on_ground, rpcs, seen, write_sensor_pair

from uknowpan.tiling import IncompatiblePair, SceneWriter, open_pair
from uknowpan.tiling.rpcs import Surface
from uknowpan.tiling.vrt import virtual

SMALL = SIZE // RATIO


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {hill: write_sensor_pair(tmp_path_factory.mktemp("pair"), hill=hill) for hill in (0.0, 15.0)}


@pytest.mark.parametrize(("hill", "most"), [(0.0, 0.02), (15.0, 0.05)])
def test_the_ms_lies_where_rpcs_and_heights_put_it(made, tmp_path, hill, most):
    """Kind: pairs in sensor geometry were refused. The values of this MS are its own columns and rows."""
    pair = made[hill]
    own = np.stack(np.mgrid[:SMALL, :SMALL][::-1] + 0.5).astype("float32")
    ms = write_raster(tmp_path / "own.tif", own, None, crs=None, rpcs=pair.ms_rpcs)
    with open_pair(pair.pan, ms, surface=Surface(dem=pair.dem)) as opened:
        (oy, ox), tile = opened.offset, opened.read_frame(0, 0, *opened.frame_shape)
    rows, cols = (np.mgrid[: tile.ms.shape[1], : tile.ms.shape[2]] + 0.5) * RATIO
    lon, lat = on_ground(pair.pan_rpcs, rows - oy, cols - ox, hill)
    down, right = seen(pair.ms_rpcs, lon, lat, heights(lon, lat, hill))
    inner = (slice(4, -4), slice(4, -4))
    assert np.abs(tile.ms - [right, down])[:, *inner].max() < most


def test_rpcs_that_nest_leave_the_ms_as_it_is(made, tmp_path):
    values = np.random.default_rng(1).integers(1, 999, (3, SMALL, SMALL)).astype("uint16")
    nested = rpcs(SMALL, PIXEL * RATIO, (0.3 / RATIO, -0.2 / RATIO), bend=0.4 / RATIO)
    ms = write_raster(tmp_path / "nested.tif", values, None, crs=None, rpcs=nested)
    with open_pair(made[0.0].pan, ms) as opened:
        assert opened.nested and opened.ratio == RATIO
        np.testing.assert_array_equal(opened.read_frame(0, 0, SMALL, SMALL).ms, values)


def test_rpcs_of_a_part_show_the_same_ground(made, tmp_path):
    """Kind: a part with a geotransform in pixels, which would go before its RPCs."""
    out = str(tmp_path / "part.tif")
    with (
        open_pair(made[0.0].pan, made[0.0].ms, bounds=(40, 60, 200, 220)) as opened,
        SceneWriter(out, opened.grid, opened.meta) as writer,
    ):
        writer.write_encoded(0, np.ones((4, 160, 160), "uint16"))
    with rasterio.open(out) as part:
        assert part.transform.is_identity
        row, col = seen(part.rpcs, LON, LAT, 150.0)
    assert np.allclose((row + 60, col + 40), seen(made[0.0].pan_rpcs, LON, LAT, 150.0))


def moved(it, **changes):
    return rasterio.rpc.RPC(**{**it.to_dict(), **changes})


BAD_RPCS = {
    "do not overlap by their RPCs": lambda it: {"rpcs": moved(it, long_off=LON + 0.01)},
    "do not fit these images or each other": lambda it: {"rpcs": moved(it, samp_num_coeff=[1.0] * 20)},
    "and .*pan.tif is not; orthorectify it first": lambda it: {"pan": True, "rpcs": it},
    "pan.tif is placed by RPCs and": lambda it: {},
}


@pytest.mark.parametrize("words", BAD_RPCS)
def test_refused_rpcs(made, tmp_path, words):
    given = BAD_RPCS[words](made[0.0].ms_rpcs)
    pan = made[0.0].pan
    if given.pop("pan", False):
        pan = write_raster(tmp_path / "pan.tif", np.ones((1, SIZE, SIZE), "uint16"), made[0.0].place, crs=UTM)
    ms = write_raster(tmp_path / "odd.tif", np.ones((2, SMALL, SMALL), "uint16"), None, crs=None, **given)
    with pytest.raises(IncompatiblePair, match=words):
        open_pair(pan, ms)


def test_rpcs_that_cannot_be_read(made):
    """Kind: RPCs without one of their items, which raise KeyError in rasterio."""
    items = list(made[0.0].ms_rpcs.to_gdal().items())[1:]
    lines = "".join(f'<MDI key="{key}">{value}</MDI>' for key, value in items)
    band = '<VRTRasterBand dataType="UInt16" band="1"></VRTRasterBand>'
    ms = virtual(SMALL, SMALL, None, Affine.identity(), f'<Metadata domain="RPC">{lines}</Metadata>{band}')
    with pytest.raises(IncompatiblePair, match="has RPCs that cannot be read"):
        open_pair(made[0.0].pan, ms)


def test_a_geotransform_goes_before_rpcs(made, tmp_path):
    place = Affine.translation(*(made[0.0].place @ (0, 0))) @ Affine.scale(PIXEL, -PIXEL)
    pan = write_raster(tmp_path / "pan.tif", np.ones((1, SIZE, SIZE), "uint16"), place, rpcs=made[0.0].pan_rpcs)
    ms = write_raster(tmp_path / "ms.tif", np.ones((2, SMALL, SMALL), "uint16"), place @ Affine.scale(RATIO))
    with open_pair(pan, ms, surface=Surface(height=5.0)) as opened:
        assert opened.nested and opened.grid.rpcs is None and "no height is needed" in " ".join(opened.notes)


@pytest.mark.parametrize("what", ["elsewhere", "hole", "no CRS"])
def test_refused_heights(made, tmp_path, what):
    with rasterio.open(made[0.0].dem) as dem:
        values, place = dem.read(), dem.transform
    if what == "hole":
        values[:, 50:70, 50:70] = -9999
    place = Affine.translation(0.1, 0) @ place if what == "elsewhere" else place
    path = write_raster(
        tmp_path / "dem.tif", values, place, crs=None if what == "no CRS" else "EPSG:4326", nodata=-9999
    )
    words = "is no map of heights" if what == "no CRS" else "has no height under a part of"
    with pytest.raises(IncompatiblePair, match=words):
        open_pair(made[0.0].pan, made[0.0].ms, surface=Surface(dem=path))
