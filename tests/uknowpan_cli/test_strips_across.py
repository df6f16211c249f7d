"""Scenes whose strips lie side by side, as in very wide ones: the same pixels as in one strip for each row."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import ORIGIN, RasterPair
from running import STOPPING, MakePair, Outcome, listing, pixels, read, spawn
from test_sharpen_student import write_paper_model

import uknowpan as package
from uknowpan import forecast, scenes

Sharpen = Callable[..., Outcome]

TILE, WIDTH = ("--tile", 64), 100
"""Tiles of 64 PAN pixels, strips of about 100 columns: their borders meet no blocks."""
NARROW = f"import uknowpan.scenes\nuknowpan.scenes.STRIP_WIDTH = {WIDTH}\n"


@pytest.fixture
def pair(make_pair: MakePair) -> RasterPair:
    """A scene of 200 x 296 PAN pixels, with holes that differ between bands of the MS."""
    holes = np.zeros((50, 74), bool)
    holes[5:30, 12:33] = holes[40:, 60:] = True
    made = make_pair(ms_shape=(50, 74), noise=40, nodata=0, holes=holes)
    with rasterio.open(made.ms[0], "r+") as dataset:
        values = dataset.read()
        values[1, 30:45, :70] = 0
        dataset.write(values)
    return made


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    return lambda: monkeypatch.setattr(scenes, "STRIP_WIDTH", WIDTH)


LEFT, TOP = ORIGIN[0] + 31.3, ORIGIN[1] - 8.6
CASES = {
    "sigma": ("--uncertainty", "sigma.tif", "--preview", "look.png"),
    "blended": ("--model", "paper", "--overlap", 24),
    "any": ("--valid", "any"),
    "part": ("--bounds", f"{LEFT},{TOP - 60},{LEFT + 110},{TOP}"),
    "cog": ("-f", "cog", "--co", "blocksize=128", "--stac", "item.json"),
    "small blocks": ("--co", "blockxsize=32", "--co", "blockysize=48", "--overviews"),
    "rows": ("--co", "tiled=no", "--mask", "file"),
    "map": ("--stretch", "2%,98%", "--mask", "alpha", "--co", "blockxsize=48", "--co", "blockysize=16"),
    "mask": ("--mask", "internal", "--co", "blockxsize=64", "--co", "blockysize=64", "--method", "brovey", "-j", 2),
}


@pytest.mark.parametrize("case", CASES)
def test_strips_side_by_side_do_not_show(
    case: str, sharpen: Sharpen, pair: RasterPair, narrow: Callable[[], None], tmp_path: Path, monkeypatch
) -> None:
    model = write_paper_model(tmp_path) if "paper" in CASES[case] else ""
    words = [model if word == "paper" else word for word in CASES[case]]
    folders = [tmp_path / name for name in ("one", "many")]
    for folder in folders:
        folder.mkdir()
        monkeypatch.chdir(folder)
        sharpen(pair, *TILE, *words, output=folder / "out.tif")
        narrow()
    one, many = (pixels(folder) for folder in folders)
    assert one == many and len(many) == 1 + (case == "sigma")
    assert sorted(listing(folders[0])) == sorted(listing(folders[1]))
    for name in ("look.png", "out.tif.msk"):
        if (folders[0] / name).exists():
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    if case == "cog":
        items = [json.loads((folder / "item.json").read_text()) for folder in folders]
        assert items[0]["geometry"] == items[1]["geometry"]
    masks = []
    for folder in folders:
        with rasterio.open(folder / "out.tif") as out:
            masks.append(out.read_masks())
    assert (masks[0] == masks[1]).all()
    # A block that is written twice stays in the file twice.
    sizes = [(folder / "out.tif").stat().st_size for folder in folders]
    assert abs(sizes[0] - sizes[1]) < 64


def test_killed_between_strips_of_a_row(
    sharpen: Sharpen, pair: RasterPair, narrow: Callable[[], None], tmp_path: Path
) -> None:
    """Blended tiles: those above and on the left of the first missing strip are sharpened again."""
    common = (*TILE, "--model", write_paper_model(tmp_path), "--overlap", 24, "--coregister", "off")
    other, output = tmp_path / "other.tif", tmp_path / "out.tif"
    sharpen(pair, *common, output=other)
    stop = NARROW + STOPPING.format(strips=5, name="SIGKILL")
    assert spawn("sharpen", pair.pan, *pair.ms, "-o", output, *common, before=stop).code == -9
    (tmp_path / "out.tif.part" / "image-000001.npy").write_bytes(b"torn")
    assert "were made with other tiles;" in sharpen(pair, *common, "--resume", code=3).stderr
    narrow()
    sharpen(pair, *common, "--resume")
    assert read(output).tobytes() == read(other).tobytes()


def test_arrays_and_forecast(
    pair: RasterPair, sharpen: Sharpen, narrow: Callable[[], None], tiny_model: Path, monkeypatch
) -> None:
    monkeypatch.setattr(forecast, "peak_mb", lambda: 0.0)
    pan, ms = read(pair.pan), read(pair.ms[0])
    words = {"model": tiny_model, "tile": 64, "uncertainty": True, "nodata": 0}
    whole = package.sharpen_array(pan, ms, **words)
    before = json.loads(sharpen(pair, *TILE, "--dry-run", "--json").stdout)
    narrow()
    for one, many in zip(whole, package.sharpen_array(pan, ms, **words), strict=True):
        assert one.tobytes() == many.tobytes()
    after = json.loads(sharpen(pair, *TILE, "--dry-run", "--json").stdout)
    same = ("tiles", "tiles_with_data", "disk_mb", "output_mb")
    assert [before[key] for key in same] == [after[key] for key in same]
    assert after["memory_mb"] < before["memory_mb"]
