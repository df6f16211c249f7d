"""STAC items in place of PAN and MS."""

import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import rasterio
from products import stac
from running import read

from uknowpan.archive.discovery import by_folder
from uknowpan.deliveries import understood

BROVEY = ("--method", "brovey", "--coregister", "off")


class Silent(SimpleHTTPRequestHandler):
    """A server that prints nothing."""

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("named", ["item", "folder"])
@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
@pytest.mark.parametrize("stacked", [False, True])
def test_an_item_is_sharpened_as_its_files_are(uknowpan, tmp_path, named, version, stacked):
    item = stac(tmp_path, version=version, stacked=stacked)
    product = item if named == "item" else item.parent
    outcome = uknowpan("sharpen", product, "-o", tmp_path / "a.tif", *BROVEY)
    assert outcome.code == 0, outcome.stderr
    assert "is a STAC item of landsat-8: PAN pan.tif" in outcome.stderr
    files = ["ms.tif"] if stacked else ["blue.tif", "green.tif", "red.tif", "nir08.tif"]
    plain = [item.parent / file for file in ("pan.tif", *files)]
    assert uknowpan("sharpen", *plain, "-o", tmp_path / "b.tif", *BROVEY).code == 0
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), read(tmp_path / "b.tif"))
    with rasterio.open(tmp_path / "a.tif") as dataset:
        assert dataset.descriptions == ("blue", "green", "red", "nir")


def test_an_item_on_the_web(uknowpan, tmp_path):
    item = stac(tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(item.parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        delivery = understood(f"{base}/item.json")
        assert delivery.pan == ((f"/vsicurl/{base}/pan.tif", 1),)
        assert [band.name for band in delivery.ms] == ["coastal", "blue", "green", "red", "nir"]
        uknowpan("info", f"{base}/none.json").fails(3, "cannot be read as a STAC item")
        server.shutdown()


def test_collection(tmp_path):
    """A collection stands for the items that it links to."""
    item = stac(tmp_path)
    collection = tmp_path / "collection.json"
    links = [{"rel": "root", "href": "x.json"}, {"rel": "item", "href": "scene/item.json"}]
    collection.write_text(json.dumps({"type": "Collection", "stac_version": "1.0.0", "links": links}))
    assert understood(collection).pan[0][0] == str(item.with_name("pan.tif"))
    entries, _ = by_folder(tmp_path)
    assert [(entry.pan, entry.key) for entry in entries] == [(str(item), "scene-1")]


def test_refusals(uknowpan, tmp_path):
    """Kind: an item without a PAN, or with two, is refused in one sentence."""
    item = stac(tmp_path)
    whole = json.loads(item.read_text())
    cases = {"no asset of its PAN": ["pan"], "no asset of its MS": [key for key in whole["assets"] if key != "pan"]}
    for text, removed in cases.items():
        assets = {key: asset for key, asset in whole["assets"].items() if key not in removed}
        item.write_text(json.dumps(whole | {"assets": assets}))
        uknowpan("info", item).fails(3, text)
    item.write_text(json.dumps(whole | {"assets": whole["assets"] | {"pan2": whole["assets"]["pan"]}}))
    uknowpan("info", item).fails(3, "2 assets that are a PAN .pan, pan2")
    for odd in ({"assets": 3}, {"assets": {"pan": 3}}, {"assets": {"pan": {"href": "p.tif", "bands": [3, None]}}}):
        item.write_text(json.dumps(whole | odd))
        uknowpan("info", item).fails(3, "no asset of its (PAN|MS)")
    item.write_text("[1]")
    uknowpan("info", item).fails(2, "alone is no product")
