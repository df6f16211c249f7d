"""Any cut into tiles, any order and any interruption give the same file."""

import errno
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import ORIGIN
from running import STOPPING, MakePair, Outcome, read, spawn, write_tiny_model

from uknowpan import scenes, sharpening
from uknowpan.sharpening import TileRow
from uknowpan.tiling import Tile

Sharpen = Callable[..., Outcome]


def assert_equal_but_for_rounding(a: np.ndarray, b: np.ndarray) -> None:
    """At most 1 DN apart on a few values: batched convolutions add up in another order."""
    difference = np.abs(a.astype(float) - b.astype(float))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 5e-4


@pytest.mark.parametrize("steps", [1, 2])
def test_tiles_and_batches_do_not_show(steps: int, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair, results = make_pair(ms_shape=(33, 31), noise=40), []
    for tile, batch in ((64, 1), (64, 4), (96, 2), (1024, 1)):
        words = ("--model", "generic", "--coregister", "off", "--steps", steps)
        sharpen(pair, *words, "--tile", tile, "--batch-size", batch, "--overwrite")
        results.append(read(tmp_path / "out.tif"))
    for other in results[1:]:
        assert_equal_but_for_rounding(results[0], other)


@pytest.fixture
def overlapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: strips are made by a thread, results fetched a batch late."""
    monkeypatch.setattr(scenes.Scene, "overlapped", True)


def test_overlapping_does_not_show(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, request) -> None:
    pair = make_pair(ms_shape=(40, 36), noise=40)
    common, late_file, sigma = ("--tile", 32, "--batch-size", 2, "--json"), tmp_path / "late.tif", tmp_path / "s.tif"
    plain = sharpen(pair, *common)
    request.getfixturevalue("overlapped")
    late = sharpen(pair, *common, "--uncertainty", sigma, output=late_file)
    np.testing.assert_array_equal(read(tmp_path / "out.tif"), read(late_file))
    assert np.isfinite(read(sigma)).all()
    assert json.loads(plain.stdout)["tiles"] == json.loads(late.stdout)["tiles"] > 10


def test_a_second_core_does_not_show(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """A classical method with two threads: one of them blends and encodes."""
    pair, one = make_pair(ms_shape=(40, 36), noise=40), tmp_path / "one.tif"
    sharpen(pair, "--tile", 32, "--method", "brovey", "-j", 1, output=one)
    sharpen(pair, "--tile", 32, "--method", "brovey", "-j", 2)
    assert one.read_bytes() == (tmp_path / "out.tif").read_bytes()


@pytest.mark.parametrize("row", [0, 2, 4])
def test_error_of_the_thread_beside(
    row: int, overlapped: None, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of the last row, after which nothing is sharpened."""
    pair = make_pair(ms_shape=(40, 36))
    put = sharpening.StripStore.put

    def full(store: sharpening.StripStore, index: int, *rest: object) -> None:
        if index == row:
            raise OSError(errno.ENOSPC, "No space left on device")
        put(store, index, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(sharpening.StripStore, "put", full)
        assert "No space left" in sharpen(pair, "--tile", 32, code=3).stderr
    assert not (tmp_path / "out.tif").exists()
    sharpen(pair, "--tile", 32, "--resume")


def test_another_coverage_is_refused(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """Kind: strips of 1-sigma, kept by a killed run, become a part of 90 % intervals."""
    pair, output = make_pair(), tmp_path / "out.tif"
    model = write_tiny_model(tmp_path / "wide.safetensors", sigmas_90=2.0)
    words = ("--tile", 32, "--model", model, "--uncertainty", tmp_path / "s.tif")
    stop = STOPPING.format(strips=2, name="SIGKILL")
    assert spawn("sharpen", pair.pan, *pair.ms, "-o", output, *words, before=stop).code == -9
    assert "made with other coverage" in sharpen(pair, *words, "--coverage", 90, "--resume", code=3).stderr


def test_order_of_tiles_does_not_show(
    sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of tiles and the tiles within them in any order: the same file."""
    pair, mixed = make_pair(ms_shape=(40, 36), noise=40), tmp_path / "mixed.tif"
    sharpen(pair, "--tile", 32)
    seen: list[Tile] = []
    sharpen_rows, rows_needed = sharpening.sharpen_rows, sharpening.strips_needed
    chance = random.Random(5)

    def shuffled(items: Iterable) -> list:
        return chance.sample(list(items), k=len(list(items)))

    def permuted(scene: sharpening.Scene, rows: Sequence[Sequence[Tile]], *more: object) -> Iterator[TileRow]:
        orders = [shuffled(range(len(tiles))) for tiles in rows]
        mixed = [[tiles[i] for i in order] for tiles, order in zip(rows, orders, strict=True)]
        seen.extend(tile for tiles in mixed for tile in tiles)
        for order, row in zip(orders, sharpen_rows(scene, mixed, *more), strict=True):
            back = [order.index(i) for i in range(len(order))]
            yield TileRow(*([part[k] for k in back] for part in (row.hrms, row.valid, row.sigma)))

    monkeypatch.setattr(sharpening, "sharpen_rows", permuted)
    monkeypatch.setattr(sharpening, "strips_needed", lambda *arguments: shuffled(rows_needed(*arguments)))
    sharpen(pair, "--tile", 32, output=mixed)
    assert seen != sorted(seen, key=lambda tile: (tile.row, tile.col))
    assert read(tmp_path / "out.tif").tobytes() == read(mixed).tobytes()


@pytest.mark.parametrize("ratio", [3, 4])
def test_bounds_give_a_part_of_the_whole(ratio: int, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(40, 36), ratio=ratio, offset=(1, 2), noise=40)
    part = tmp_path / "part.tif"
    sharpen(pair, "--tile", 48)
    size = 0.5 * ratio  # metres of an MS pixel; the part begins beyond the first 12 of them
    left, top = ORIGIN[0] + 14.3 * size, ORIGIN[1] - 15.6 * size
    bounds = f"{left},{top - 14.1 * size},{left + 17.4 * size},{top}"
    sharpen(pair, "--tile", 48, "--bounds", bounds, output=part)
    with rasterio.open(part) as dataset, rasterio.open(tmp_path / "out.tif") as full:
        window = full.window(*dataset.bounds).round_lengths().round_offsets()
        assert (window.width, window.height) == (dataset.width, dataset.height)
        assert dataset.bounds.left <= left < dataset.bounds.left + 0.5
        assert dataset.bounds.top - 0.5 < top <= dataset.bounds.top
        assert_equal_but_for_rounding(dataset.read(), full.read(window=window))


def test_killed_again_and_again(sharpen: Sharpen, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """kill -9 after one strip, and after two more; the rest of the run gives the same bytes."""
    pair = make_pair(ms_shape=(40, 20), noise=40)
    output, undisturbed = tmp_path / "out.tif", tmp_path / "other.tif"
    sigma, other_sigma = tmp_path / "sigma.tif", tmp_path / "other_sigma.tif"
    common = ("--tile", 32, "--coregister", "off", "--model", tiny_model)
    sharpen(pair, *common, "--uncertainty", other_sigma, output=undisturbed)
    resumed = (*common, "--uncertainty", sigma, "--resume")
    for strips, finished in ((1, 1), (2, 3)):
        stop = STOPPING.format(strips=strips, name="SIGKILL")
        assert spawn("sharpen", pair.pan, *pair.ms, "-o", output, *resumed, before=stop).code == -9
        assert not output.exists()
        assert len(list((tmp_path / "out.tif.part").glob("image-*.npy"))) == finished
    sharpen(pair, *resumed)
    assert read(output).tobytes() == read(undisturbed).tobytes()
    assert read(sigma).tobytes() == read(other_sigma).tobytes()
    inputs = {Path(pair.pan), Path(pair.ms[0])}
    assert set(tmp_path.iterdir()) == {*inputs, output, undisturbed, sigma, other_sigma}


def test_dropped_strips_are_warned_of(sharpen: Sharpen, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair, output = make_pair(), tmp_path / "out.tif"
    common = ("--tile", 32, "--model", tiny_model)
    stop = STOPPING.format(strips=2, name="SIGKILL")
    for words, warning in (((), r"WARNING: 2 strips of an interrupted run .*--resume"), (("--resume",), "")):
        assert spawn("sharpen", pair.pan, *pair.ms, "-o", output, *common, before=stop).code == -9
        messages = sharpen(pair, *common, *words, "--overwrite").messages
        assert re.match(rf"uknowpan: {warning}", messages) if warning else messages == ""
        output.unlink()


def test_own_strips_are_dropped_in_silence(
    sharpen: Sharpen, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the second row of tiles: smaller ones start anew, which loses no other run's strips."""
    sharpen_rows = sharpening.sharpen_rows

    def greedy(scene: sharpening.Scene, rows: Sequence[Sequence[Tile]], *more: object) -> Iterator[TileRow]:
        for tiles, row in zip(rows, sharpen_rows(scene, rows, *more), strict=True):
            if tiles[0].height * 4 > 64 and tiles[0].row > 0:
                raise MemoryError
            yield row

    monkeypatch.setattr(sharpening, "sharpen_rows", greedy)
    outcome = sharpen(make_pair(ms_shape=(64, 64)), "--tile", 128)
    assert "memory is short" in outcome.stderr
    assert "were dropped" not in outcome.stderr


def test_sigterm_from_outside(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair()
    outcome = spawn(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model, "--tile", 32),
        before=STOPPING.format(strips=2, name="SIGTERM"),
    )
    assert outcome.code == 130
    last = outcome.stderr.splitlines()[-1]  # a slow machine prints progress before it
    assert last.startswith("uknowpan: error: Interrupted; 2 of 3 strips are kept in ")
    assert "Traceback" not in outcome.stderr
