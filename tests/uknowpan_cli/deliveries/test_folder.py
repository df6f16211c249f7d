"""Folders with a PAN and an MS, and an MS in tiles."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import write_raster
from running import read

from uknowpan.tiling import open_pair

BROVEY = ("--method", "brovey", "--coregister", "off")


def cut(path, folder, rows, cols, name, **marks):
    """A part of a raster as a file of its own."""
    with rasterio.open(path) as source:
        window = rasterio.windows.Window.from_slices(rows, cols)
        place = source.window_transform(window)
        return write_raster(folder / name, source.read(window=window), place, nodata=source.nodata, **marks)


def tiles(path, folder, name, count=2):
    """A raster in columns side by side."""
    with rasterio.open(path) as source:
        edges = [source.width * i // count for i in range(count + 1)]
        height = source.height
    return [cut(path, folder, (0, height), edges[i : i + 2], f"{name}_R1C{i + 1}.tif") for i in range(count)]


def test_one_pan_and_one_ms(uknowpan, make_pair, tmp_path):
    pair = make_pair(descriptions=["b", "g", "r", "n"])
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "broken.tif").write_text("")
    for name in ("a", "b"):  # the second run sees the result of the first
        outcome = uknowpan("sharpen", tmp_path, "-o", tmp_path / f"{name}.tif", *BROVEY)
        assert outcome.code == 0, outcome.stderr
    assert "PAN scene_pan.tif, MS scene_ms.tif: b, g, r, n" in outcome.stderr
    assert "broken.tif (cannot be opened), a.tif (made by uknowpan)" in outcome.stderr
    assert uknowpan("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "c.tif", *BROVEY).code == 0
    with rasterio.open(tmp_path / "b.tif") as ours, rasterio.open(tmp_path / "c.tif") as plain:
        np.testing.assert_array_equal(ours.read(), plain.read())
        assert ours.descriptions == plain.descriptions
        assert (ours.nodata, ours.colorinterp) == (plain.nodata, plain.colorinterp)


@pytest.mark.parametrize("separate", [False, True])
def test_bands_in_files_and_chosen_bands(uknowpan, make_pair, tmp_path, separate):
    pair = make_pair(separate=separate)
    out = tmp_path / "out"
    out.mkdir()
    assert uknowpan("sharpen", tmp_path, "-o", out / "a.tif", "--bidx", "3,1", *BROVEY).code == 0
    assert uknowpan("sharpen", pair.pan, *pair.ms, "-o", out / "b.tif", "--bidx", "3,1", *BROVEY).code == 0
    np.testing.assert_array_equal(read(out / "a.tif"), read(out / "b.tif"))


@pytest.mark.parametrize("how", ["folder", "arguments"])
def test_tiles_are_one_image(uknowpan, make_pair, tmp_path, how):
    """Kind: tiles of an MS were stacked as bands, and no pixel was valid."""
    pair = make_pair(nodata=0, holes=np.eye(24, 20, dtype=bool))
    folder = tmp_path / "tiles"
    folder.mkdir()
    ms = tiles(pair.ms[0], folder, "ms", 3)
    pan = tiles(pair.pan, folder, "pan") if how == "folder" else [pair.pan]
    words = [folder] if how == "folder" else [*pan, *ms]
    outcome = uknowpan("sharpen", *words, "-o", tmp_path / "a.tif", *BROVEY)
    assert outcome.code == 0, outcome.stderr
    assert uknowpan("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "b.tif", *BROVEY).code == 0
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), read(tmp_path / "b.tif"))
    assert how != "folder" or "PAN pan_R1C1.tif in 2 tiles, MS ms_R1C1.tif in 3 tiles" in outcome.stderr


@pytest.mark.parametrize("mark", ["none", "mask", "alpha"])
def test_gaps_and_masks_of_tiles_hold(make_pair, tmp_path, mark):
    """Kind: the ground between tiles, or under a tile's own mask, passes for data."""
    holes = np.zeros((24, 20), bool)
    holes[2:5, 3:6] = mark != "none"
    pair = make_pair(holes=holes, mask="mask" if mark == "none" else mark)
    with rasterio.open(pair.ms[0]) as source:
        data, flags, interp = source.read(), source.read_masks(1), source.colorinterp
    places = {"west.tif": (slice(0, 24), slice(0, 9)), "east.tif": (slice(0, 24), slice(11, 20))}
    with rasterio.open(pair.ms[0]) as source:
        for name, (rows, cols) in places.items():
            window = rasterio.windows.Window.from_slices(rows, cols)
            marks = {"mask": flags[rows, cols]} if mark == "mask" else {"colorinterp": interp}
            write_raster(tmp_path / name, data[:, rows, cols], source.window_transform(window), **marks)
    wanted = ~holes
    wanted[:, 9:11] = False
    with open_pair(pair.pan, [str(tmp_path / name) for name in places]) as opened:
        np.testing.assert_array_equal(opened.read_frame(0, 0, 24, 20).ms_valid, wanted)
        named = {Path(str(entry[0])).name for entry in opened.identity()["inputs"]}
        assert named >= {"west.tif", "east.tif"}


def test_refusals(uknowpan, make_pair, tmp_path):
    """Kind: a folder that may be understood in two ways is refused in one sentence."""
    pair = make_pair()
    sharpen = ("sharpen", tmp_path, "-o", tmp_path / "out.tif", *BROVEY)
    make_pair(name="other")
    uknowpan(*sharpen).fails(3, "2 PANs .*other_pan.tif, scene_pan.tif")
    (tmp_path / "other_pan.tif").unlink()
    uknowpan(*sharpen).fails(3, "2 MS .*other_ms.tif, scene_ms.tif")
    (tmp_path / "other_ms.tif").unlink()
    west = cut(pair.ms[0], tmp_path, (0, 24), (0, 9), "west.tif")
    with rasterio.open(pair.ms[0]) as source:
        place = source.transform @ source.transform.translation(9.5, 0)
        east = write_raster(tmp_path / "east.tif", source.read()[:, :, 10:], place)
    uknowpan("sharpen", pair.pan, west, east, *sharpen[2:]).fails(3, "do not share one pixel grid")
