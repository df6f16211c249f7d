"""Files that `train` writes for other tools: TensorBoard's events, and the time of each operation."""

from pathlib import Path

import pytest
from patch_files import TINY_NETWORKS, write_patches
from running import Run

TRAIN = "[train]\niterations = {}\nbatch_size = 2\nvalidate_every = 20\nvalidation_samples = 2\namp = false\n"


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """`train` of a tiny PriorNet."""
    data = [write_patches(tmp_path / f"{split}.h5", size=16) for split in ("train", "valid")]
    (tmp_path / "c.toml").write_text(TRAIN.format(31) + TINY_NETWORKS["prior"])
    given = ["train", "--stage", "prior", "--data", data[0], "--config", tmp_path / "c.toml"]
    return [*given, *("--device", "cpu", "-j", 1, "-o", tmp_path / "run")]


def test_tensorboard_reads_losses_scores_and_pictures(uknowpan: Run, tmp_path: Path, words: list[object]) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra tensorboard"
    )
    done = uknowpan(*words, "-q")
    assert done.code == 0, done.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    assert {"nll", "ergas", "learning_rate"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("ergas")] == [20, 31]
    assert [e.step for e in events.Images("examples")] == [20, 31]


def test_profile_lists_the_operations(uknowpan: Run, tmp_path: Path, words: list[object]) -> None:
    done = uknowpan(*words, "--profile")
    assert done.code == 0, done.stderr
    table = (tmp_path / "run" / "profile.txt").read_text()
    assert "Self CPU" in table and "aten::convolution" in table
    assert "profile.txt: the operations of 20 steps" in done.stderr
