"""`distill-cache`: what it writes, says and refuses, and how it stops."""

import json
import os
import re
import signal
import socket
import stat
from dataclasses import asdict

import h5py
import numpy as np
import pytest
import torch
from patch_files import guided_config
from running import spawn

from uknowpan.console import stop_requests
from uknowpan.models.checkpoints import Card, save_checkpoint, sha256
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.uknow.cache import CacheFile, part_of
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.published.uknow.guided import GuidedTeacher


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A teacher's checkpoint and a training file of 5 samples that does not declare its scale."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    config = guided_config(patch=2)
    card = Card(
        "tiny", "fsa-t", asdict(config), "fsa-t",
        bands=4, ratios=[4], residual_std=[0.02] * 4, max_value=1023.0,
    )  # fmt: skip
    save_checkpoint(folder / "teacher.safetensors", GuidedTeacher(config), card)
    rng = np.random.default_rng(0)
    with h5py.File(folder / "train.h5", "w") as file:
        for name, (bands, n) in {"pan": (1, 16), "ms": (4, 4), "lms": (4, 16)}.items():
            file[name] = rng.integers(0, 1023, (5, bands, n, n)).astype("f4")
    return folder / "teacher.safetensors", folder / "train.h5"


@pytest.fixture
def distill(uknowpan, files, tmp_path):
    """`distill(*more)`: the command on those files, writing cache.h5."""

    def run(*more, teacher=files[0], data=files[1]):
        given = ("--teacher", teacher, "--data", data, "-o", tmp_path / "cache.h5")
        return uknowpan("distill-cache", *given, "--device", "cpu", "-j", 1, *more)

    return run


def datasets(path):
    with h5py.File(path) as file:
        return {name: file[name][()].tobytes() for name in file}


def test_the_cache_is_the_result(distill, files, tmp_path):
    out = tmp_path / "cache.h5"
    done = distill("--batch-size", 2, "--steps", 2, "--seed", 3)
    assert (done.code, done.stdout) == (0, f"{out}\n")
    assert done.stderr.startswith("5 samples of ") and done.stderr.count("\n") == 1
    cache, asked = CacheFile(out), FrozenTeacher(files[0], steps=2, seed=3)
    with PanCollectionFile(files[1]) as data:
        cache.check_matches(data)
        expected = asked.answer(data.read([2, 3]).map(lambda x: x / 1023))
    torch.testing.assert_close(cache.read([2, 3]).sr, expected.sr)
    assert cache.attributes["scale"] == 1023  # of the teacher, since the data do not say


def test_json_and_silence(distill, files, tmp_path):
    done = distill("--json", "-q", "--max-value", 2047, "--dtype", "float32")
    assert done.code == 0 and done.stderr == ""
    assert json.loads(done.stdout) == {
        "path": str(tmp_path / "cache.h5"),
        "samples": 5,
        "bytes": (tmp_path / "cache.h5").stat().st_size,
        "teacher": "tiny",
        "teacher_sha256": sha256(files[0]),
        "steps": 1,
        "seed": 0,
        "scale": 2047.0,
    }
    with h5py.File(tmp_path / "cache.h5") as file:
        assert file["dist_feat0"].dtype == np.float32


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--max-value", "nan"], "--max-value: nan is no full scale"),
        (["--max-value", "1e300"], r"--max-value: 1e\+300 is no full scale"),
        (["--seed", 2**63], "--seed"),
        (["--seed", -1], "--seed"),
    ],
)
def test_numbers_that_are_none(distill, tmp_path, more, says):
    done = distill(*more)
    assert (done.code, done.stdout) == (2, "") and re.search(says, done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_said_before_the_teacher_is_asked(files, tmp_path):
    """HDF5 would crash the process."""
    done = spawn(
        *("distill-cache", "--teacher", files[0], "--data", files[1], "-q"),
        *("-o", tmp_path / "cache.h5", "--device", "cpu", "-j", 1),
        file_limit=20_000,
    )
    assert (done.code, done.stdout) == (3, "")
    assert re.fullmatch(
        r"uknowpan: error: \S+/\.cache\.h5\.part cannot be written \(File too large\); make room "
        r"or choose another folder\.\n",
        done.stderr,
    )
    assert not list(tmp_path.iterdir())


def test_an_existing_cache_is_kept(distill, tmp_path):
    out = tmp_path / "cache.h5"
    out.write_bytes(b"mine")
    refused = distill()
    assert refused.code == 4 and "exists and is kept" in refused.stderr
    assert out.read_bytes() == b"mine"
    assert distill("--overwrite").code == 0
    assert len(CacheFile(out)) == 5


def test_overwriting_a_private_cache_behind_a_link(distill, tmp_path):
    """Kinds: `--overwrite` opens a private file to others, or replaces a link by a file; scratch of killed runs."""
    (tmp_path / "there").mkdir()
    target, left = tmp_path / "there" / "c.h5", tmp_path / "there" / f".c.h5.{socket.gethostname()}.999999999.x.tmp"
    target.write_bytes(b"")
    target.chmod(0o600)
    left.mkdir()
    os.utime(left, (0, 0))
    (tmp_path / "cache.h5").symlink_to(target)
    assert distill("--overwrite").code == 0
    assert (tmp_path / "cache.h5").is_symlink() and stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == ["c.h5"] and len(CacheFile(target)) == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_batch(distill, tmp_path, monkeypatch, number):
    out = tmp_path / "cache.h5"
    assert distill("--batch-size", 2).code == 0
    whole = datasets(out)
    out.unlink()
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    answer = FrozenTeacher.answer

    def signalled(self, patches):
        os.kill(os.getpid(), number)
        return answer(self, patches)

    with monkeypatch.context() as patched:
        patched.setattr(FrozenTeacher, "answer", signalled)
        stopped = distill("--batch-size", 2)
    assert stopped.code == 130 and stopped.stdout == ""
    assert "stopped after 2 of 5 samples; --resume goes on from there" in stopped.stderr
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    forgotten = distill("--batch-size", 2)
    assert forgotten.code == 4 and "--resume goes on with it" in forgotten.stderr
    assert part_of(out).exists() and not out.exists()
    other = distill("--resume", "--steps", 2)
    assert other.code == 3 and "was begun with steps 1, not 2" in other.stderr
    assert distill("--batch-size", 2, "--resume").code == 0
    assert datasets(out) == whole
    assert os.listdir(tmp_path) == ["cache.h5"]


def test_running_out_of_memory(distill, monkeypatch):
    def full(self, patches):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FrozenTeacher, "answer", full)
    done = distill("--batch-size", 4)
    assert done.code == 6 and "Memory ran out with 4 samples at once" in done.stderr


def test_wrong_teachers_and_data(distill, files, tiny_model, tmp_path):
    student = distill(teacher=tiny_model)
    assert student.code == 5 and "fsa-s-lite, which teaches nobody" in student.stderr
    nobody = distill(teacher="nobody")
    assert nobody.code == 5 and "no model 'nobody'" in nobody.stderr
    missing = distill(data=tmp_path / "none.h5")
    assert missing.code == 3 and "none.h5 does not exist" in missing.stderr
    foreign = distill(data=files[0])
    assert foreign.code == 3 and "is no HDF5 file" in foreign.stderr
    with h5py.File(tmp_path / "three.h5", "w") as file:
        for name, (bands, n) in {"pan": (1, 16), "ms": (3, 4), "lms": (3, 16)}.items():
            file[name] = np.ones((1, bands, n, n))
    other = distill(data=tmp_path / "three.h5")
    assert other.code == 5 and "was trained for 4 bands, but" in other.stderr
    assert distill("--max-value", 0).code == 2
    assert not (tmp_path / "cache.h5").exists()


def test_signals_are_noted_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as stopping:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopping == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
