"""`batch FOLDER`: scenes by product, by name, and by footprint."""

from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from products import airbus, landsat, maxar
from rasters import ORIGIN, reproject_transform, write_raster

from uknowpan.archive.discovery import by_folder

BROVEY = ("--method", "brovey", "--coregister", "off")


def raster(path, bands, res, corner=(0, 0), size=48, crs=None):
    """A small image of `size` metres whose corner lies (east, south) of the origin."""
    path.parent.mkdir(exist_ok=True)
    place = Affine.translation(ORIGIN[0] + corner[0], ORIGIN[1] - corner[1]) @ Affine.scale(res, -res)
    side = round(size / res)
    values = np.random.default_rng(1).integers(100, 200, (bands, side, side)).astype("uint16")
    marks = {}
    if crs:
        place, marks = reproject_transform(place, "EPSG:32631", crs, res), {"crs": crs}
    return write_raster(path, values, place, **marks)


def found(folder):
    entries, left_out = by_folder(folder)
    rows = {e.key: (str(Path(e.pan).relative_to(folder)), [str(Path(f).relative_to(folder)) for f in e.ms])
            for e in entries}  # fmt: skip
    return rows, left_out


def test_products_and_pairs_of_an_archive(uknowpan, tmp_path):
    archive = tmp_path / "in"
    archive.mkdir()
    product, bundle, order = landsat(archive), airbus(archive), maxar(archive)
    level2 = landsat(archive, level="L2SP")
    raster(archive / "more" / "a_pan.tif", 1, 1)
    raster(archive / "more" / "a_ms.tif", 4, 4)
    raster(archive / "more" / "lonely.tif", 4, 4, corner=(900, 0))
    batch = ("batch", archive, "-o", archive / "out", *BROVEY)
    for status in ("done", "skipped"):  # the second run sees the results of the first
        outcome = uknowpan(*batch)
        assert outcome.code == 0, outcome.stderr
        assert outcome.stderr.count(status) == 4
    names = {product.name, bundle.name, f"{order.name}_P001", "a"}
    assert {path.name for path in (archive / "out").glob("*.tif")} == {f"{name}_sharp.tif" for name in names}
    assert f"left out: {level2} is level 2" in outcome.stderr
    assert "lonely.tif has no partner" in outcome.stderr
    assert "3 other results of uknowpan" in outcome.stderr
    next(product.glob("*_B3.TIF")).touch()
    assert "was made from other inputs" in uknowpan(*batch).stderr


def test_pairs_by_name(tmp_path):
    for name in ("x/GF2_L1A-PAN1.tif", "x/scene_P.tif", "y/scene_P.tif"):
        raster(tmp_path / name, 1, 1)
    raster(tmp_path / "x/GF2_L1A-MSS1.tif", 4, 4)
    raster(tmp_path / "pans/u_pan.tif", 1, 1)
    raster(tmp_path / "ms/u_ms.tif", 4, 4)
    raster(tmp_path / "x/scene_XS.tif", 3, 4)
    for band in (1, 2):
        raster(tmp_path / f"x/t_ms{band}.tif", 1, 4)
    raster(tmp_path / "x/t_pan.tif", 1, 1)
    for band in (2, 3, 8):
        raster(tmp_path / f"z/l8_B{band}.tif", 1, 1 if band == 8 else 2)
    rows, left_out = found(tmp_path)
    assert rows["l8_B8"] == ("z/l8_B8.tif", ["z/l8_B2.tif", "z/l8_B3.tif"])
    assert rows["GF2_L1A"] == ("x/GF2_L1A-PAN1.tif", ["x/GF2_L1A-MSS1.tif"])
    assert rows["t"] == ("x/t_pan.tif", ["x/t_ms1.tif", "x/t_ms2.tif"])
    assert rows["scene"] == ("x/scene_P.tif", ["x/scene_XS.tif"])
    assert rows["u"] == ("pans/u_pan.tif", ["ms/u_ms.tif"])
    assert [Path(text.split()[0]).parts[-2:] for text in left_out] == [("y", "scene_P.tif")]


@pytest.mark.parametrize("crs", [None, "EPSG:4326"])
def test_pairs_by_footprint(tmp_path, crs):
    """The names say nothing; the MS of `b` comes in two tiles, that of `c` exists twice."""
    for index, name in enumerate("abc"):
        raster(tmp_path / f"{name}.tif", 1, 1, corner=(100 * index, 0))
    raster(tmp_path / "coarse" / "k1.tif", 4, 4, corner=(4, 0), crs=crs)
    raster(tmp_path / "coarse" / "k2.tif", 4, 4, corner=(100, 0), size=24)
    raster(tmp_path / "coarse" / "k3.tif", 4, 4, corner=(124, 0), size=24)
    for name in ("k4", "k5"):
        raster(tmp_path / "coarse" / f"{name}.tif", 4, 4, corner=(200, 0))
    raster(tmp_path / "coarse" / "far.tif", 4, 4, corner=(300, 0))
    rows, left_out = found(tmp_path)
    assert rows == {"a": ("a.tif", ["coarse/k1.tif"]), "b": ("b.tif", ["coarse/k2.tif", "coarse/k3.tif"])}
    assert sorted(Path(text.split()[0]).name for text in left_out) == ["c.tif", "far.tif", "k4.tif", "k5.tif"]
    assert any("c.tif has 2 MS on its ground" in text for text in left_out)


def test_a_folder_without_scenes(uknowpan, tmp_path):
    uknowpan("batch", tmp_path, "-o", tmp_path / "out", *BROVEY).fails(3, "no product and no pair")
