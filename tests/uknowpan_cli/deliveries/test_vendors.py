"""Deliveries of Airbus and Maxar in place of PAN and MS."""

import shutil

import numpy as np
import pytest
import rasterio
from products import airbus, maxar

import uknowpan as api
from uknowpan.deliveries import understood
from uknowpan.models.metrics.sensors import find_sensor

BROVEY = ("--method", "brovey", "--coregister", "off")


def whole(folder, pattern):
    """Tiles of an image, put together by hand."""
    tiles = []
    for path in folder.rglob(pattern):
        with rasterio.open(path) as source:
            tiles.append((source.read(), source.bounds.left, -source.bounds.top))
    rows = sorted({row for *_, row in tiles})
    return np.concatenate(
        [np.concatenate([t for t, x, y in sorted(tiles, key=lambda t: t[1]) if y == row], 2) for row in rows], 1
    )


@pytest.mark.parametrize("indexed", [False, True])
def test_airbus_bundle(uknowpan, tmp_path, indexed):
    product = airbus(tmp_path, indexed=indexed)
    outcome = uknowpan("sharpen", product, "-o", tmp_path / "out.tif", *BROVEY)
    assert outcome.code == 0, outcome.stderr
    assert "is Pleiades 1A, ORTHO: PAN DIM_PHR1A_P" in outcome.stderr and ": red, green, blue, nir." in outcome.stderr
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.descriptions == ("red", "green", "blue", "nir")
        assert (dataset.nodata, dataset.shape) == (0, (96, 96))
        assert (dataset.read()[:, :, :4] == 0).all()
    with api.open_pair(product) as pair:
        assert (pair.ratio, pair.meta.nbits, pair.pan_meta.nbits) == (4, 12, 12)
        tile = pair.read_frame(0, 0, *pair.frame_shape)
        stamped = {str(entry[0]) for entry in pair.identity()["inputs"]}
    np.testing.assert_array_equal(tile.ms[:, :, 2:], whole(product, "IMG_*_MS_*.TIF")[:, :, 2:])
    np.testing.assert_array_equal(tile.pan[:, :, 8:], whole(product, "IMG_*_P_*.TIF")[:, :, 8:])
    assert stamped == {str(path) for path in product.rglob("*") if path.suffix == ".TIF" or path.name[:3] == "DIM"}


def test_airbus_refusals(uknowpan, tmp_path):
    """Kind: a bundle without an image, or without a tile, is refused before anything is computed."""
    product = airbus(tmp_path)
    info = ("info", product)
    (pan,) = product.rglob("DIM_*_P_*.XML")
    assert understood(pan).ms == understood(product).ms
    tile = next(product.rglob("IMG_*_MS_*R2C2.TIF"))
    tile.rename(tmp_path / "kept.tif")
    uknowpan(*info).fails(3, "lacks IMG_.*R2C2.TIF")
    shutil.move(tmp_path / "kept.tif", tile)
    text = pan.read_text()
    pan.write_text(text[:300])
    uknowpan(*info).fails(3, "no XML")
    pan.unlink()
    uknowpan(*info).fails(3, "its PAN; order the bundle")
    for name in ("a", "b"):
        pan.with_name(f"DIM_{name}.XML").write_text(text)
    uknowpan(*info).fails(3, "2 PANs .DIM_a.XML, DIM_b.XML")


def test_the_sensor_brings_its_gains(uknowpan, tmp_path):
    """Names of bands and gains are those of one table."""
    product = maxar(tmp_path)
    delivery, sensor = understood(product), find_sensor("WV2")
    assert tuple(band.name for band in delivery.ms) == sensor.bands
    assert delivery.gains() == {"PAN": sensor.mtf_pan, **dict(zip(sensor.bands, sensor.mtf_ms, strict=True))}
    text = uknowpan("info", product, "--bidx", "8,2").stdout
    assert "published MTF gains: PAN 0.11, nir 2 0.27, blue 0.35\n" in text


@pytest.mark.parametrize("tiled", [True, False])
def test_maxar_order(uknowpan, tmp_path, tiled):
    product = maxar(tmp_path, tiled=tiled)
    outcome = uknowpan("sharpen", product, "-o", tmp_path / "out.tif", "--bidx", "5,3,2,7", *BROVEY)
    assert outcome.code == 0, outcome.stderr
    assert "is WV02, level LV2A: PAN 12MAR28_P2AS" in outcome.stderr
    with rasterio.open(tmp_path / "out.tif") as dataset:
        assert dataset.descriptions == ("red", "green", "blue", "nir")
        assert (dataset.read()[:, :, :4] == 0).all()
    with api.open_pair(product) as pair:
        assert (pair.ratio, pair.bands, pair.meta.nbits) == (4, 8, 11)
        tile = pair.read_frame(0, 0, *pair.frame_shape)
        stamped = {str(entry[0]) for entry in pair.identity()["inputs"]}
    np.testing.assert_array_equal(tile.ms[:, :, 2:], whole(product, "*_M2AS*.TIF")[:, :, 2:])
    np.testing.assert_array_equal(tile.pan[:, :, 8:], whole(product, "*_P2AS*.TIF")[:, :, 8:])
    assert stamped == {str(path) for path in product.rglob("*") if path.is_file()}


def test_maxar_parts(uknowpan, tmp_path):
    """Kind: of two parts of an order the user names one, by any of its metadata files."""
    product = maxar(tmp_path)
    maxar(tmp_path, part="P002")
    uknowpan("info", product).fails(3, "2 products .*P001.*P002.*name one")
    (pan,) = product.rglob("*_P2AS-*P002.IMD")
    (ms,) = product.rglob("*_M2AS-*P002.TIL")
    assert understood(pan).pan == understood(ms).pan != ()
    assert "P002" in understood(pan).pan[0][0] and "P002" in understood(pan).ms[0].tiles[0][0]
    tile = next(ms.parent.glob("*R1C2*.TIF"))
    tile.rename(tmp_path / "kept.tif")
    uknowpan("info", ms).fails(3, "lacks 12MAR28_M2AS_R1C2.*TIF")
    shutil.move(tmp_path / "kept.tif", tile)
    shutil.rmtree(pan.parent)
    uknowpan("info", ms).fails(3, "has no PAN beside it")
