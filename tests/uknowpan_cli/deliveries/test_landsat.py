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
    used = {file for file in product.iterdir() if file.stem[-3:] in ("_B8", "_B2", "_B3", "_B4", "_B5", "MTL")}
    assert set(names) == {str(file) for file in used if file.suffix != ".txt"}
    for file in names:
        with open(file, "r+b") as opened:
            opened.seek(0, 2)
            opened.write(b" ")
        names, after = identity()
        assert after != before
        before = after


def test_from_python(tmp_path):
    report = api.sharpen(landsat(tmp_path), output=tmp_path / "out.tif", method="brovey", coregister="off")
    assert (report.bands, report.ratio) == (4, 2)
    with pytest.raises(api.Error, match="output"):
        api.sharpen(tmp_path)
