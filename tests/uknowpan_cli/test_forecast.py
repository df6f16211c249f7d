"""The forecast of `--dry-run`: sizes are exact, seconds only plausible."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasters import RasterPair
from running import MakePair, Outcome

from uknowpan import console
from uknowpan import forecast as estimate
from uknowpan.sharpening import TileRow

SIDE, RATIO, TILE = 96, 4, 32
"""MS pixels; tiles of 8 x 8 of them, 12 x 12 tiles."""

Sharpen = Callable[..., Outcome]


@pytest.fixture
def forecast(sharpen: Sharpen) -> Callable[..., dict[str, Any]]:
    def run(pair: RasterPair, *words: object) -> dict[str, Any]:
        return json.loads(sharpen(pair, "--tile", TILE, *words, "--dry-run", "--json").stdout)

    return run


Forecast = Callable[..., dict[str, Any]]


@pytest.fixture
def half_empty(make_pair: MakePair) -> RasterPair:
    """Data in the upper quarter of the rows of tiles, and there in the left half."""
    holes = np.ones((SIDE, SIDE), bool)
    holes[: SIDE // 4, : SIDE // 2] = False
    return make_pair(ms_shape=(SIDE, SIDE), nodata=0, holes=holes)


def test_text_and_nothing_written(sharpen: Sharpen, forecast: Forecast, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    before = sorted(tmp_path.iterdir())
    text = sharpen(pair, "--tile", 32, "--dry-run").stdout
    for word in ("80 x 96 pixels, 4 bands", "ratio 4", "tiles", "memory", "time"):
        assert word in text
    values = forecast(pair)
    assert (values["width"], values["height"], values["tiles"]) == (80, 96, 9)
    assert sorted(tmp_path.iterdir()) == before


def test_options_change_the_forecast(
    forecast: Forecast, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = forecast(make_pair(ms_shape=(64, 64)), "--tile", 64)
    monkeypatch.setattr(estimate, "peak_mb", lambda: 0.0)  # of this process, with all its tests
    pair, size = make_pair(ms_shape=(64, 64)), 256 * 256 * 4 / 1e6
    plain = forecast(pair, "--tile", 64, "--output-dtype", "int16")
    assert plain["output_mb"] == pytest.approx(2 * size, abs=0.1)
    assert plain["disk_mb"] == pytest.approx(4 * size, abs=0.1)
    words = ("--batch-size", 4, "--uncertainty", tmp_path / "sigma.tif", "-f", "cog")
    many = forecast(pair, "--tile", 64, "--output-dtype", "float64", *words)
    assert many["output_mb"] == pytest.approx(8 * size, abs=0.1)
    assert many["disk_mb"] == pytest.approx((8 + 4) * 2 * size + 8 * size, abs=0.1)
    assert many["memory_mb"] > 3 * plain["memory_mb"]
    # 75 values for each band and pixel of a tile with its margin.
    side = 64 + 2 * plain["margin_pan_pixels"]
    assert before["memory_mb"] > plain["memory_mb"] > side**2 * 4 * 75 * 4 / 1e6


def test_a_tile_with_data_is_timed(forecast: Forecast, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The middle of the scene is empty; the tile that is timed is not."""
    holes = np.zeros((48, 48), bool)
    holes[8:40, 8:40] = True
    timed: list[np.ndarray] = []
    sharpen_rows = estimate.sharpen_rows

    def watched(*arguments: object) -> Iterator[TileRow]:
        for row in sharpen_rows(*arguments):
            timed.extend(row.valid)
            yield row

    monkeypatch.setattr(estimate, "sharpen_rows", watched)
    forecast(make_pair(ms_shape=(48, 48), nodata=0, holes=holes), "--batch-size", 3)
    assert len(timed) >= 2
    assert all(valid is not None and valid.all() for valid in timed)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), 1 / 4 + 1 / 8),
        (("--co", "compress=none"), 1 / 4 + 1),
        (("-f", "cog"), 1 / 4 + 1 / 8 + 1 / 8),
        (("--uncertainty", "sigma.tif"), (1 / 4 + 1 / 8) * 3),
    ],
)
def test_empty_strips_and_blocks_take_no_disk(
    words: tuple[str, ...], parts: float, forecast: Forecast, half_empty: RasterPair, monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    values = forecast(half_empty, *words)
    assert (values["tiles"], values["tiles_with_data"]) == (144, 18)
    whole = (SIDE * RATIO) ** 2 * 4 * 2 / 1e6
    assert values["output_mb"] == pytest.approx(whole, abs=0.06)
    assert values["disk_mb"] == pytest.approx(whole * parts, abs=0.06)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name or "sigma" in path.name]


def test_rows_between_those_looked_at_count_as_full(
    forecast: Forecast, half_empty: RasterPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--method", "brovey", "--co", "COMPRESS=NONE")
    image = forecast(half_empty, *words)["output_mb"]
    monkeypatch.setattr(estimate, "TILES_LOOKED_AT", 30)
    assert 1 + 3 / 12 - 0.05 < forecast(half_empty, *words)["disk_mb"] / image < 1 + 5 / 12 + 0.05


def test_part_without_data(forecast: Forecast, half_empty: RasterPair) -> None:
    """The survey met data elsewhere; of the part nothing is computed."""
    with rasterio.open(half_empty.pan) as dataset:
        left, bottom, right, top = dataset.bounds
    low = bottom + (top - bottom) / 4
    values = forecast(half_empty, "--bounds", f"{left},{bottom},{right},{low}", "--method", "brovey")
    assert values["tiles_with_data"] == 1  # at least
    assert values["seconds"] >= 0


def test_start_and_writing_are_in_the_time(
    forecast: Forecast, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "_began", [time.monotonic() - 5000.0])
    monkeypatch.setattr(estimate, "_writing_seconds", lambda *rest: 1000 / (SIDE * RATIO) ** 2)
    values = forecast(make_pair(ms_shape=(SIDE, SIDE)), "--method", "brovey")
    assert 5900 < values["seconds"] < 6100
    assert not values["notes"]


def test_no_room_to_try_writing(forecast: Forecast, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(estimate, "_write", full)
    values = forecast(make_pair(), "--method", "brovey")
    assert values["notes"] == ["writing is not in the time: [Errno 28] No space left on device"]
