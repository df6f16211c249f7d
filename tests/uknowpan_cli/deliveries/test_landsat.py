"""Landsat products in place of PAN and MS."""

import json

import numpy as np
import pytest
import rasterio
from products import landsat
from running import read

import uknowpan as api

BROVEY = ("--method", "brovey", "--coregister", "off")


@pytest.mark.parametrize("text", [False, True], ids=["json", "txt"])
@pytest.mark.parametrize("named", ["folder", "metadata"])
def test_a_folder_is_sharpened_as_its_files_are(uknowpan, tmp_path, text, named):
    product = landsat(tmp_path, text=text)
    next(product.glob("*_QA_PIXEL.TIF")).unlink()  # clouds change the statistics
    (metadata,) = list(product.glob("*_MTL.json")) or list(product.glob("*_MTL.txt"))
    outcome = uknowpan("sharpen", product if named == "folder" else metadata, "-o", tmp_path / "a.tif", *BROVEY)
    assert outcome.code == 0, outcome.stderr
    assert "is Landsat 8, level L1TP: PAN " in outcome.stderr and "_B1.TIF: blue, green, red, nir;" in outcome.stderr
    files = [next(product.glob(f"*_B{number}.TIF")) for number in (8, 2, 3, 4, 5)]
    assert uknowpan("sharpen", *files, "-o", tmp_path / "b.tif", "--nodata", 0, *BROVEY).code == 0
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), read(tmp_path / "b.tif"))
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.descriptions == ("blue", "green", "red", "nir")
        assert dataset.nodata == 0
        assert (dataset.read(1)[:, :4] == 0).all() and (dataset.read(1)[:, 8:] > 0).all()


def test_landsat_7_and_chosen_bands(uknowpan, tmp_path):
    product = landsat(tmp_path, craft=7)
    facts = json.loads(uknowpan("info", product, "--bidx", "6,5", "--json").stdout)
    assert facts["product"]["ms_bands"] == "1 blue, 2 green, 3 red, 4 nir, 5 swir 1, 6 swir 2"
    assert facts["descriptions"] == ["swir 2", "swir 1"]
    assert "1 blue, 2 green" in uknowpan("info", product).stdout


def test_refusals(uknowpan, tmp_path):
    """Kind: a product without what is needed is refused in one sentence."""
    product = landsat(tmp_path)
    sharpen = ("sharpen", product, "-o", tmp_path / "out.tif", *BROVEY)
    uknowpan(*sharpen, "--bidx", "9").fails(2, "--bidx 9: .*1 coastal, 2 blue")
    next(product.glob("*_B6.TIF")).unlink()
    uknowpan(*sharpen, "--bidx", "6").fails(3, r"lacks .*_B6\.TIF \(swir 1\)")
    assert uknowpan(*sharpen).code == 0
    again = next(product.glob("*_MTL.json"))
    again.with_name("LC09_MTL.json").write_text(again.read_text())
    uknowpan(*sharpen).fails(3, "2 products .*name one of them")
    again.write_text("{")
    uknowpan("info", again).fails(3, "no JSON")
    uknowpan("sharpen", landsat(tmp_path, level="L2SP"), *sharpen[2:]).fails(3, "level 2, which has no PAN")
    (tmp_path / "empty").mkdir()
    uknowpan("sharpen", tmp_path / "empty", *sharpen[2:]).fails(3, "no product")
    uknowpan("sharpen", tmp_path / "nowhere", *sharpen[2:]).fails(3, "no such file")


def test_identity_counts_all_files_of_the_product(tmp_path):
    """Kind: a band or the metadata changes, and a run goes on as if nothing had."""
    product = landsat(tmp_path)

    def identity():
        with api.open_pair(product) as pair:
            return [entry[0] for entry in pair.identity()["inputs"]], str(pair.identity())

    names, before = identity()
    ends = ("_B8", "_B2", "_B3", "_B4", "_B5", "MTL", "XEL")
    used = {file for file in product.iterdir() if file.stem[-3:] in ends}
    assert set(names) == {str(file) for file in used if file.suffix != ".txt"}
    for file in names:
        with open(file, "r+b") as opened:
            opened.seek(0, 2)
            opened.write(b" ")
        names, after = identity()
        assert after != before
        before = after


def test_clouds_count_in_the_result_alone(tmp_path):
    """Kind: clouds draw the statistics and the registration to them, or holes are cut where they are."""
    product = landsat(tmp_path, size=96)
    (quality,) = product.glob("*_QA_PIXEL.TIF")
    for band in product.glob("*_B?.TIF"):  # clouds of the right half are ten times as bright
        with rasterio.open(band, "r+") as dataset:
            values = dataset.read()
            values[:, :, values.shape[2] // 2 :] *= 10
            dataset.write(values)
    with api.open_pair(product) as pair:
        assert "clouds by LC08_L1TP_021039_20200411_20200822_02_T1_QA_PIXEL.TIF" in pair.notes[0]
        tile = pair.read_frame(0, 0, *pair.frame_shape)
        clear, scale = tile.ms_valid, api.survey(pair).scale.ms
    assert not clear[:, 50:].any() and clear[2:-2, 6:46].all()
    assert tile.valid[8:-8, 16:-8].all()
    with rasterio.open(quality, "r+") as dataset:  # all is cloud: then clouds count
        dataset.write(np.full((1, 96, 96), 22280, "uint16"))
    with api.open_pair(product) as pair:
        clouded = api.survey(pair).scale.ms
    quality.unlink()
    with api.open_pair(product) as pair:
        assert pair.read_frame(0, 0, *pair.frame_shape).ms_valid[2:-2, 6:-2].all()
        assert api.survey(pair).scale.ms == clouded > 5 * scale


def test_from_python(tmp_path):
    report = api.sharpen(landsat(tmp_path), output=tmp_path / "out.tif", method="brovey", coregister="off")
    assert (report.bands, report.ratio) == (4, 2)
    with pytest.raises(api.Error, match="output"):
        api.sharpen(tmp_path)
