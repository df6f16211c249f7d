"""What `--dry-run` says of disk and time; sizes are exact, seconds only plausible."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasters import RasterPair
from running import MakePair, Run

from uknowpan import console
from uknowpan import forecast as estimate

SIDE, RATIO, TILE = 96, 4, 32
"""MS pixels; tiles of 8 x 8 of them, 12 x 12 tiles."""


@pytest.fixture
def half_empty(make_pair: MakePair) -> RasterPair:
    """Data in the upper quarter of the rows of tiles, and there in the left half."""
    holes = np.ones((SIDE, SIDE), bool)
    holes[: SIDE // 4, : SIDE // 2] = False
    return make_pair(ms_shape=(SIDE, SIDE), nodata=0, holes=holes)


def forecast(uknowpan: Run, pair: RasterPair, *words: object) -> dict[str, Any]:
    outcome = uknowpan("sharpen", pair.pan, *pair.ms, *words, "--tile", TILE, "--dry-run", "--json")
    assert outcome.code == 0, outcome.stderr
    return json.loads(outcome.stdout)


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
    words: tuple[str, ...],
    parts: float,
    uknowpan: Run,
    half_empty: RasterPair,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = forecast(uknowpan, half_empty, "-o", "out.tif", "--model", tiny_model, *words)
    assert (said["tiles"], said["tiles_with_data"]) == (144, 18)
    whole = (SIDE * RATIO) ** 2 * 4 * 2 / 1e6
    assert said["output_mb"] == pytest.approx(whole, abs=0.06)
    assert said["disk_mb"] == pytest.approx(whole * parts, abs=0.06)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name or "sigma" in path.name]


def test_rows_between_those_looked_at_count_as_full(
    uknowpan: Run, half_empty: RasterPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("-o", tmp_path / "out.tif", "--method", "brovey", "--co", "COMPRESS=NONE")
    image = forecast(uknowpan, half_empty, *words)["output_mb"]
    monkeypatch.setattr(estimate, "TILES_LOOKED_AT", 30)
    said = forecast(uknowpan, half_empty, *words)
    assert 1 + 3 / 12 - 0.05 < said["disk_mb"] / image < 1 + 5 / 12 + 0.05


def test_part_without_data(uknowpan: Run, half_empty: RasterPair, tmp_path: Path) -> None:
    """The survey met data elsewhere; of the part nothing is computed."""
    with rasterio.open(half_empty.pan) as dataset:
        left, bottom, right, top = dataset.bounds
    low = bottom + (top - bottom) / 4
    words = ("--bounds", f"{left},{bottom},{right},{low}", "--method", "brovey")
    said = forecast(uknowpan, half_empty, "-o", tmp_path / "out.tif", *words)
    assert said["tiles_with_data"] == 1  # at least
    assert said["seconds"] >= 0


def test_start_and_writing_are_in_the_time(
    uknowpan: Run, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(ms_shape=(SIDE, SIDE))
    words = ("-o", tmp_path / "out.tif", "--method", "brovey")
    monkeypatch.setattr(console, "_began", [time.monotonic() - 5000.0])
    monkeypatch.setattr(estimate, "_writing_seconds", lambda *rest: 1000 / (SIDE * RATIO) ** 2)
    values = forecast(uknowpan, pair, *words)
    assert 5900 < values["seconds"] < 6100
    assert not values["notes"]


def test_no_room_to_try_writing(
    uknowpan: Run, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(estimate, "_write_to", full)
    pair = make_pair()
    said = forecast(uknowpan, pair, "-o", tmp_path / "out.tif", "--method", "brovey")
    assert said["notes"] == ["writing is not in the time: [Errno 28] No space left on device"]


def test_age_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_began", [])
    before = time.monotonic()
    assert console.run_began() >= before
    console.own_process()
    assert before - 36_000 < console.run_began() < before
