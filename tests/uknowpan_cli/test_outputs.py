"""Results as people want them: masks, 8-bit maps, footprints in STAC items, clouds left out, weights of bands."""

import json

import numpy as np
import pytest
import rasterio
import shapely
from products import landsat
from rasterio.warp import transform_geom
from running import read

GSA = ("--method", "gsa", "--coregister", "off")
HOLES = np.zeros((24, 20), bool)
HOLES[:4, :5] = True


@pytest.mark.parametrize("format", ["gtiff", "cog"])
@pytest.mark.parametrize("mask", ["internal", "alpha", "file"])
def test_masks_mark_what_nodata_marks(make_pair, sharpen, tmp_path, mask, format):
    """Kind: a value in the data that stands for nodata hides pixels of a map, or invalid ones show."""
    pair = make_pair(nodata=0, holes=HOLES)
    sharpen(pair, *GSA, output=tmp_path / "plain.tif")
    if (mask, format) == ("file", "cog"):
        sharpen(pair, *GSA, "--mask", mask, "-f", format, code=2)
        return
    sharpen(pair, *GSA, "--mask", mask, "-f", format)
    with rasterio.open(tmp_path / "plain.tif") as plain, rasterio.open(tmp_path / "out.tif") as masked:
        assert masked.nodata is None and masked.count == plain.count + (mask == "alpha")
        np.testing.assert_array_equal(masked.read(range(1, plain.count + 1)), plain.read())
        valid = (masked.read(5) if mask == "alpha" else masked.dataset_mask()) > 0
        np.testing.assert_array_equal(valid, plain.dataset_mask() > 0)
        assert not valid[:12, :16].any() and valid[20:, 24:].all()
    assert (tmp_path / "out.tif.msk").exists() == (mask == "file")
    sharpen(pair, *GSA, "--overwrite")
    assert not (tmp_path / "out.tif.msk").exists()


def test_a_map_is_stretched_by_the_whole_scene(make_pair, sharpen, tmp_path):
    """Kind: a stretch by tile leaves seams, or its extremes follow invalid pixels."""
    pair = make_pair(nodata=0, holes=HOLES)
    sharpen(pair, *GSA, output=tmp_path / "plain.tif")
    sharpen(pair, *GSA, "--stretch", "2%,98%", "--tile", "32")
    with rasterio.open(tmp_path / "plain.tif") as plain, rasterio.open(tmp_path / "out.tif") as shown:
        assert shown.transform == plain.transform and shown.crs == plain.crs and shown.nodata == 0
        assert [c.name for c in shown.colorinterp] == ["red", "green", "blue"] and set(shown.dtypes) == {"uint8"}
        values, valid, rgb = plain.read(), plain.dataset_mask() > 0, shown.read()
    assert not rgb[:, ~valid].any() and rgb[:, valid].all()
    for colour, band in zip(rgb, (2, 1, 0), strict=True):
        low, high = np.percentile(values[band][valid], [2, 98])
        expected = np.rint(1 + 254 * np.clip((values[band] - low) / (high - low), 0, 1))
        np.testing.assert_array_equal(colour[valid], expected[valid])


def test_a_map_with_a_given_range_and_alpha(make_pair, sharpen, tmp_path):
    sharpen(make_pair(), *GSA, "--stretch", "500,2500", "--mask", "alpha")
    with rasterio.open(tmp_path / "out.tif") as shown:
        assert [c.name for c in shown.colorinterp] == ["red", "green", "blue", "alpha"]
        assert "500 to 2500" in shown.tags()["UKNOWPAN_STRETCH"]


def test_refusals(make_pair, sharpen):
    """Kind: an option that would have no meaning is refused in one sentence."""
    pair = make_pair()
    for words, text in (
        (("--stretch", "98%,2%"), "LOW below HIGH"),
        (("--stretch", "2%,98"), "LOW%,HIGH%"),
        (("--stretch", "1,2", "--output-dtype", "uint8"), "leave out"),
        (("--mask", "alpha", "--valid", "any"), "--valid any"),
        (("-w", "1,1"), "2 weights for 4 bands"),
        (("-w", "-1,1,1,1"), "from 0 on"),
        (("--mask-clouds",), "QA_PIXEL"),
    ):
        assert text in sharpen(pair, *GSA, *words, code=5 if text.startswith("2 w") else 2).stderr
    sharpen(pair, "--method", "bicubic", "-w", "1,1,1,1", code=2)


def test_proportions_of_bands_count_alone(make_pair, sharpen, tmp_path):
    """Kind: weights with another sum change the level of the result."""
    pair = make_pair()
    with rasterio.open(pair.ms[0], "r+") as dataset:
        dataset.write(dataset.read(4)[::-1, ::-1], 4)
    for name, words in (("a", ("-w", "1,1,1,0")), ("b", ("-w", "5,5,5,0")), ("c", ("-w", "0,0,0,1"))):
        sharpen(pair, "--method", "brovey", "--coregister", "off", *words, output=tmp_path / f"{name}.tif")
    a, b, c = (read(tmp_path / f"{name}.tif").astype(float) for name in "abc")
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 5


def test_clouds_become_invalid_where_they_are_masked(uknowpan, tmp_path):
    product = landsat(tmp_path, size=32)
    for name, words in (("all", ()), ("clear", ("--mask-clouds",))):
        outcome = uknowpan("sharpen", product, "-o", tmp_path / f"{name}.tif", *GSA, *words)
        assert outcome.code == 0, outcome.stderr
    whole, clear = read(tmp_path / "all.tif"), read(tmp_path / "clear.tif")
    assert whole[:, :, 34:60].all() and not clear[:, :, 34:60].any()
    np.testing.assert_array_equal(clear[:, :, 10:30], whole[:, :, 10:30])


def test_the_item_is_the_footprint_and_valid(make_pair, sharpen, tmp_path):
    """Kind: an outline of the file, not of its valid pixels; an item that STAC's own schema refuses."""
    sharpen(make_pair(nodata=0, holes=HOLES), *GSA, "--stac", tmp_path / "item.json")
    item = json.loads((tmp_path / "item.json").read_text())
    with rasterio.open(tmp_path / "out.tif") as image:
        back = shapely.geometry.shape(transform_geom("EPSG:4326", image.crs, item["geometry"]))
        share = (image.dataset_mask() > 0).mean()
        whole = shapely.box(*image.bounds)
        pixel = abs(image.transform.a)
    assert abs(back.area / whole.area - share) < 1e-3 and back.within(whole.buffer(0.1 * pixel))
    assert (item["assets"]["image"]["href"], item["properties"]["proj:code"]) == ("out.tif", "EPSG:32631")
    pystac = pytest.importorskip("pystac", reason="pystac validates items; it is not installed")
    read_back = pystac.Item.from_dict(item)
    assert read_back.bbox == item["bbox"] and read_back.datetime is not None
    pytest.importorskip("jsonschema", reason="pystac validates by jsonschema; it is not installed")
    read_back.stac_extensions = []  # their schemas lie on the web
    read_back.validate()


def test_the_time_of_an_item_is_that_of_the_image(uknowpan, tmp_path):
    product = landsat(tmp_path)
    for metadata in product.glob("*_MTL.json"):
        facts = json.loads(metadata.read_text())
        times = {"DATE_ACQUIRED": "2020-04-11", "SCENE_CENTER_TIME": "15:46:27.4823Z"}
        facts["LANDSAT_METADATA_FILE"]["IMAGE_ATTRIBUTES"] |= times
        metadata.write_text(json.dumps(facts))
    outcome = uknowpan("sharpen", product, "-o", tmp_path / "out.tif", *GSA, "--stac", tmp_path / "item.json")
    assert outcome.code == 0, outcome.stderr
    item = json.loads((tmp_path / "item.json").read_text())
    assert item["properties"]["datetime"] == "2020-04-11T15:46:27Z"
    assert [band["eo:common_name"] for band in item["assets"]["image"]["bands"]] == ["blue", "green", "red", "nir"]


def test_names_that_promise_another_format(uknowpan, make_pair, tmp_path):
    """HDF5 was written as x.tif, a page as x.txt, and a file named -."""
    pair = make_pair(ms_shape=(16, 16))
    scene = (pair.pan, *pair.ms)
    uknowpan("simulate", *scene, "-o", tmp_path / "train.tif").fails(2, "HDF5 is written; name it .h5")
    uknowpan("compare", *scene, "-o", tmp_path / "page.txt").fails(2, "a page of HTML is written; name it .html")
    uknowpan("compare", *scene, "-o", tmp_path / "p.html", "--png", tmp_path / "p.jpg").fails(2, "name it .png")
    uknowpan("sharpen", *scene, "-o", "-").fails(3, "results do not go to stdout")


def test_a_displacement_that_is_there_is_kept(uknowpan, make_pair, tmp_path):
    """`info` has no --overwrite, which its message advised."""
    pair, file = make_pair(ms_shape=(48, 48), noise=40), tmp_path / "field.tif"
    file.write_text("kept")
    uknowpan("info", pair.pan, *pair.ms, "--displacement", file).fails(4, "is kept; choose another name")
