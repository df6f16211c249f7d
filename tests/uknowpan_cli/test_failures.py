"""Full disks, signals, short memory and odd data: an error is one sentence, and `--resume` goes on."""

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from threading import current_thread, main_thread

import numpy as np
import pytest
import rasterio
from running import MakePair, Outcome, Run, flip_blocks, listing, read, spawn, truncate
from torch import Tensor

from uknowpan import surveying
from uknowpan.models.denoising import StudentSharpener
from uknowpan.tiling import SceneWriter, StripStore

Sharpen = Callable[..., Outcome]


@pytest.mark.parametrize("which", ["pan", "ms"])
def test_gdal_keeps_silent(which: str, make_pair: MakePair, tmp_path: Path) -> None:
    """In a process of its own, where no test harness catches logs and warnings."""
    pair = make_pair()
    truncate(Path({"pan": pair.pan, "ms": pair.ms[0]}[which]))
    spawn("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif").fails(3, f"scene_{which}.tif.*cannot be")


def test_block_that_fails_in_the_middle(
    sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first pass does not see all of a large scene: a bad block shows when its tile is read."""
    pair = make_pair(ms_shape=(48, 16), compress="deflate", blockysize=4)
    monkeypatch.setattr(surveying, "SURVEY_SIZE", 32)
    monkeypatch.setattr(surveying, "sample_windows", lambda pair, count, size: [(0, 0, 16, 16)])
    flip_blocks(Path(pair.ms[0]))
    before = listing(tmp_path)
    sharpen(pair, "--tile", 16, "--method", "bicubic", code=3).fails(3, "(cannot be read|IReadBlock)")
    kept = set(listing(tmp_path)) - set(before)
    assert all(name.startswith("out.tif.part") for name in kept)
    assert not [name for name in kept if name.endswith(("tmp", "tmp.tif"))]


def test_disk_full_while_strips_are_kept(make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    before = listing(tmp_path)
    arguments = ("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--tile", 32, "--method", "bicubic")
    spawn(*arguments, file_limit=4096).fails(3, "cannot be kept.*MiB are free.*resume")
    assert listing(tmp_path) == before


def test_disk_full_while_the_file_is_written(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """The strips survive it, so that `--resume` has only to write."""
    pair, output, undisturbed = make_pair(noise=50), tmp_path / "out.tif", tmp_path / "other.tif"
    common = ("--tile", 16, "--method", "bicubic", "--coregister", "off")
    arguments = ("sharpen", pair.pan, *pair.ms, "-o", output, *common)
    outcome = spawn(*arguments, file_limit=16_000)
    assert (outcome.code, outcome.stdout) == (3, "")
    # libtiff has its own line on stderr before ours, out of reach of GDAL's error handlers.
    last = outcome.stderr.splitlines()[-1]
    assert re.search("cannot be written.*MiB are free|does not hold what was written", last)
    assert not output.exists()
    assert not list(tmp_path.glob(".out*"))
    sharpen(pair, *common, output=undisturbed)
    sharpen(pair, *common, "--resume")
    assert read(output).tobytes() == read(undisturbed).tobytes()
    assert not (tmp_path / "out.tif.part").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o555)
    sharpen(make_pair(), output=tmp_path / "closed" / "out.tif", code=3).fails(3, "not writable")


def interrupting(patch: pytest.MonkeyPatch, owner: type, name: str, stop: Callable[[], None]) -> None:
    """Let a method be followed by an interruption."""
    step = getattr(owner, name)

    def interrupted(*arguments: object) -> object:
        result = step(*arguments)
        stop()
        return result

    patch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_interrupted_and_resumed(
    name: str, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, output, undisturbed = make_pair(), tmp_path / "out.tif", tmp_path / "other.tif"
    sharpen(pair, "--tile", 32, output=undisturbed)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupting(patch, StripStore, "put", lambda: os.kill(os.getpid(), getattr(signal, name)))
        # Tests that run in the background ignore Ctrl-C by default.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            outcome = sharpen(pair, "--tile", 32, code=130)
        finally:
            signal.signal(signal.SIGINT, before)
    outcome.fails(130, "1 of 3 strips are kept in .*--resume")
    assert not output.exists()
    assert signal.getsignal(signal.SIGTERM) is handler
    sharpen(pair, "--tile", 32, "--resume")
    assert read(output).tobytes() == read(undisturbed).tobytes()
    assert not (tmp_path / "out.tif.part").exists()


@pytest.mark.parametrize("stage", ["_create", "_flush", "_verify"])
def test_interrupted_while_the_file_is_written(
    stage: str, sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing under the final names, no temporary files, and `--resume` has only to write."""
    pair, sigma = make_pair(), tmp_path / "sigma.tif"
    common = ("--uncertainty", sigma, "--tile", 32)
    with monkeypatch.context() as patch:
        interrupting(patch, SceneWriter, stage, lambda: os.kill(os.getpid(), signal.SIGTERM))
        sharpen(pair, *common, code=130).fails(130, "3 of 3 strips are kept")
    assert {p.name for p in tmp_path.iterdir()} == {"scene_pan.tif", "scene_ms.tif", "out.tif.part"}

    def never(*arguments: object) -> None:
        raise AssertionError("a strip was made again")

    monkeypatch.setattr(StudentSharpener, "sharpen", never)
    sharpen(pair, *common, "--resume")
    assert read(tmp_path / "out.tif").shape == read(sigma).shape == (4, 96, 80)


def test_interrupted_before_the_first_strip(
    sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair()
    before = listing(tmp_path)
    monkeypatch.setattr(StripStore, "put", lambda *arguments: os.kill(os.getpid(), signal.SIGTERM))
    sharpen(pair, code=130).fails(130, "Interrupted before")
    assert listing(tmp_path) == before


def test_resume_with_other_options_is_refused(
    sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    pair = make_pair()
    with monkeypatch.context() as patch:
        interrupting(patch, StripStore, "put", stop)
        sharpen(pair, "--tile", 32, code=130)
    for other in (("--seed", 5), ("--steps", 2), ("--dtype", "bf16"), ("--bidx", "2,1")):
        sharpen(pair, "--tile", 32, "--resume", *other, code=3).fails(3, "were made with other")
    (tmp_path / "out.tif.part" / "state.json").write_text("{}")
    sharpen(pair, "--tile", 32, code=3).fails(3, "in the way")


def test_memory_shortage_backs_off(
    sharpen: Sharpen, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First the batch is halved, then the tile; finished strips are kept where they can be."""
    pair = make_pair(ms_shape=(64, 32))
    whole = StudentSharpener.sharpen
    sizes: list[int] = []

    def short(self: StudentSharpener, pan: Tensor, *more: object) -> object:
        sizes.append(len(pan))
        if len(pan) > 1 and len(sizes) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 GB")
        return whole(self, pan, *more)

    monkeypatch.setattr(StudentSharpener, "sharpen", short)
    assert "tiles of 64 PAN pixels, 1 at once" in sharpen(pair, "--tile", 64, "--batch-size", 2).stderr
    # One batch of the first row went through; it was not made again: 3 rows of 2 tiles are left.
    assert sizes == [2, 2, 1, 1, 1, 1, 1, 1]

    def never(self: StudentSharpener, pan: Tensor, *more: object) -> object:
        raise MemoryError

    monkeypatch.setattr(StudentSharpener, "sharpen", never)
    before = listing(tmp_path)
    sharpen(pair, "--overwrite", "-q", code=6).fails(6, "tiles of 64 PAN pixels.*--bounds")
    assert listing(tmp_path) == before


def test_short_memory_first_ends_the_work_side_by_side(
    sharpen: Sharpen, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kind of fault: the tile was halved at once, and all finished strips were lost."""
    pair, whole, alone = make_pair(ms_shape=(64, 32)), StudentSharpener.sharpen, []

    def short(self: StudentSharpener, *arguments: object) -> object:
        alone.append(current_thread() is main_thread())
        if len(alone) > 6 and not alone[-1]:
            raise MemoryError
        return whole(self, *arguments)

    monkeypatch.setattr(StudentSharpener, "sharpen", short)
    assert "tiles of 64 PAN pixels, 1 at once" in sharpen(pair, "--tile", 64, "-j", 2).stderr
    assert 1 <= sum(alone) <= 4  # of 8 tiles


def test_some_nan_and_inf(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(dtype="float32")
    for path, values in ((pair.pan, (np.nan, np.inf)), (pair.ms[0], (-np.inf, np.nan))):
        with rasterio.open(path, "r+") as dataset:
            data = dataset.read()
            data[:, 3, 4], data[:, 11, 7] = values
            dataset.write(data)
    assert sharpen(pair).messages == ""
    values = read(tmp_path / "out.tif")
    holes = np.zeros(pair.pan_values.shape, bool)
    for row, col in ((3, 4), (11, 7)):
        holes[row, col] = holes[4 * row : 4 * row + 4, 4 * col : 4 * col + 4] = True
    assert np.isnan(values[:, holes]).all()
    assert np.isfinite(values[:, ~holes]).all()


def test_ratio_four_and_a_half(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    """Worked on at ratio 4, with a remark on the resampled MS."""
    pair = make_pair(ratio=4.5)
    assert "4.5000" in sharpen(pair, "-v").stderr
    assert read(tmp_path / "out.tif").shape == (4, *pair.pan_values.shape)


def test_names_with_blanks_and_letters(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    pair = make_pair(name="Sète, été 2024 (сцена) 场景")
    output, preview, sigma = tmp_path / "Ergebnis für Köln.tif", tmp_path / "Bild ü.png", tmp_path / "σ 1.tif"
    words = ("--model", tiny_model, "--preview", preview, "--uncertainty", sigma)
    outcome = uknowpan("sharpen", pair.pan, f"{pair.ms[0]},band=2", "-o", output, *words)
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == f"{output}\n"
    assert read(output).shape[0] == 1
    assert preview.exists() and sigma.exists()


def test_relative_paths_and_dashes(
    uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pair(name="-x")
    monkeypatch.chdir(tmp_path)
    outcome = uknowpan("sharpen", "-o", "out.tif", "--model", tiny_model, "--", "-x_pan.tif", "-x_ms.tif")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == "out.tif\n"


def test_a_proj_database_of_another_proj(make_pair: MakePair, tmp_path: Path) -> None:
    """Kind: a variable that another program has set ends as an internal error."""
    outcome = spawn("info", make_pair().pan, environment=dict.fromkeys(("PROJ_LIB", "PROJ_DATA"), str(tmp_path)))
    assert outcome.code == 3 and "unset PROJ_LIB and PROJ_DATA" in outcome.stderr


def test_gdal_debugging_spares_stdout(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """CPL_DEBUG of the user must not get into the text that a script reads."""
    pair, output = make_pair(), tmp_path / "out.tif"
    arguments = ("sharpen", pair.pan, *pair.ms, "-o", output, "--model", tiny_model)
    outcome = spawn(*arguments, environment={"CPL_DEBUG": "ON"})
    assert (outcome.code, outcome.stdout) == (0, f"{output}\n")
