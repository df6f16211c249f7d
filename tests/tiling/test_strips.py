"""Strips survive a kill and give the same file."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import plain_grid, plain_meta, write_rows

from uknowpan.tiling import OutputError, ResumeMismatch, SceneWriter, StripStore, encode, uncertainty_meta

META = plain_meta(2, nodata=0)
ROWS = [0, 16, 16, 40, 70]
"""where strips begin; one of them is empty, as bounds can make it"""


def strip(index):
    rng = np.random.default_rng(index)
    n = ROWS[index + 1] - ROWS[index]
    return rng.uniform(0, 4000, (2, n, 50)).astype(np.float32), rng.random((n, 50)) < 0.8


def finish(path, store):
    grid = plain_grid()
    image = SceneWriter(str(path), grid, META)
    sigma = SceneWriter(f"{path}.u.tif", grid, uncertainty_meta(META))
    for index in store.missing():
        values, valid = strip(index)
        rows = {"image": encode(values, valid, image.encoding), "sigma": encode(values / 10, valid, sigma.encoding)}
        store.put(index, rows)
    with image, sigma:
        store.assemble({"image": image, "sigma": sigma})
    store.remove()


def open_store(path, resume=False, before=None, **changes):
    """A store; `before` is one of an earlier run, which has ended."""
    if before is not None:
        before.release()
    fingerprint = {"seed": 1, "inputs": [["a.tif", 5, 6]], "model": "m"} | changes
    return StripStore(str(path), fingerprint, ["image", "sigma"], 4, resume=resume)


def test_store_gives_what_direct_writing_gives(tmp_path):
    finish(tmp_path / "a.tif", open_store(tmp_path / "a.tif"))
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "a.tif.u.tif"]
    grid = plain_grid()
    with SceneWriter(str(tmp_path / "b.tif"), grid, META) as out:
        for index in range(4):
            write_rows(out, ROWS[index], *strip(index))
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    with rasterio.open(tmp_path / "a.tif.u.tif") as sigma:
        assert sigma.dtypes[0] == "float32" and np.isnan(sigma.nodata)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
from pathlib import Path
import test_strips as t
store = t.open_store(Path(sys.argv[1]))
put = store.put
def put_and_die(index, rows):
    if index == 3:
        (store.folder / "image-000003.tmp").write_bytes(b"torn")
        os.kill(os.getpid(), signal.SIGKILL)
    put(index, rows)
store.put = put_and_die
t.finish(Path(sys.argv[1]), store)
"""


def test_kill_and_resume(tmp_path):
    path = tmp_path / "a.tif"
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", KILLED, path, here, here.parent], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    store = open_store(path, resume=True)
    assert store.missing() == [3]
    finish(path, store)
    assert sorted(os.listdir(tmp_path)) == ["a.tif", "a.tif.u.tif"]
    finish(tmp_path / "b.tif", open_store(tmp_path / "b.tif"))
    assert path.read_bytes() == (tmp_path / "b.tif").read_bytes()


def test_without_resume_old_strips_go(tmp_path):
    path = tmp_path / "a.tif"
    store = open_store(path)
    store.put(0, {"image": np.zeros((2, 16, 50), "uint16"), "sigma": np.zeros((2, 16, 50))})
    store = open_store(path, resume=True, before=store)
    assert store.missing() == [1, 2, 3] and store.dropped == 0
    (store.folder / "survey.json").write_text("{}")
    store = open_store(path, before=store)
    assert store.missing() == [0, 1, 2, 3] and store.dropped == 1
    assert os.listdir(store.folder) == ["state.json"]
    assert os.listdir(tmp_path) == ["a.tif.part"]
    assert open_store(path, before=store).dropped == 0


@pytest.mark.parametrize("folder", [False, True], ids=["nothing", "empty folder"])
def test_resume_without_anything_starts_afresh(tmp_path, folder):
    """An empty folder remains where a removal was killed at its very end."""
    if folder:
        (tmp_path / "a.tif.part").mkdir()
    assert open_store(tmp_path / "a.tif", resume=True).missing() == [0, 1, 2, 3]


def test_other_parameters_do_not_mix(tmp_path):
    path = tmp_path / "a.tif"
    open_store(path)
    with pytest.raises(ResumeMismatch, match="other model, seed;"):
        open_store(path, resume=True, seed=2, model="n")
    with pytest.raises(ResumeMismatch, match="other layers, tiles;"):
        StripStore(str(path), {"seed": 1, "inputs": [["a.tif", 5, 6]], "model": "m"}, ["image"], 3, resume=True)
    # NumPy tuples and such are compared as JSON sees them.
    open_store(path, resume=True, inputs=(("a.tif", 5, 6),))


@pytest.mark.parametrize("state", [None, "not json", json.dumps({"kind": "other"}), "[]"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_is_not_ours_is_left_alone(tmp_path, state, resume):
    folder = tmp_path / "a.tif.part"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    if state is not None:
        (folder / "state.json").write_text(state)
    with pytest.raises(OutputError, match="in the way"):
        open_store(tmp_path / "a.tif", resume=resume)
    assert (folder / "thesis.txt").read_text() == "precious"


def test_layers_must_be_complete(tmp_path):
    with pytest.raises(ValueError, match="layers"):
        open_store(tmp_path / "a.tif").put(0, {"image": np.zeros((2, 1, 1))})


def test_two_runs_on_one_output_are_kept_apart(tmp_path):
    first = open_store(tmp_path / "a.tif")
    for resume in (False, True):
        with pytest.raises(OutputError, match="Another run is writing"):
            open_store(tmp_path / "a.tif", resume=resume)
    assert first.missing() == [0, 1, 2, 3]
    first.release()
    finish(tmp_path / "a.tif", open_store(tmp_path / "a.tif", resume=True))
    assert not (tmp_path / "a.tif.part").exists()


@contextlib.contextmanager
def meanwhile(monkeypatch, owner, name, act, after=False):
    """Runs `act` once, right before (or after) the next call of owner.name."""
    original = getattr(owner, name)
    acts = [act]

    def wrapped(*args, **kwargs):
        if acts and not after:
            acts.pop()()
        result = original(*args, **kwargs)
        if acts:
            acts.pop()()
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrapped)
        yield
    assert not acts


def refused(path):
    def intrude():
        with pytest.raises(OutputError, match="Another run is writing"):
            open_store(path, resume=True)

    return intrude


@pytest.mark.parametrize("end", ["remove", "again"])
def test_nobody_gets_a_folder_that_is_being_removed(tmp_path, monkeypatch, end):
    path = tmp_path / "a.tif"
    store = open_store(path)
    store.put(0, {"image": np.zeros((2, 16, 50), "uint16"), "sigma": np.zeros((2, 16, 50))})
    with meanwhile(monkeypatch, os, "rename", refused(path)):
        if end == "remove":
            store.remove()
        else:
            again = open_store(path, before=store)
    assert (tmp_path / "a.tif.part").exists() == (end == "again")
    if end == "again":
        assert again.missing() == [0, 1, 2, 3]
        refused(path)()


def test_a_new_folder_is_locked_from_the_start(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    with meanwhile(monkeypatch, os, "replace", refused(path), after=True):
        store = open_store(path)
    refused(path)()
    assert store.missing() == [0, 1, 2, 3]


def test_of_two_runs_that_begin_at_once_one_is_refused(tmp_path, monkeypatch):
    path, faster = tmp_path / "a.tif", []
    with (
        meanwhile(monkeypatch, os, "replace", lambda: faster.append(open_store(path))),
        pytest.raises(OutputError, match="Another run is writing"),
    ):
        open_store(path)
    assert faster[0].missing() == [0, 1, 2, 3]
    assert os.listdir(tmp_path) == ["a.tif.part"]


@pytest.mark.parametrize("another", [False, True])
def test_the_owner_removes_the_folder_while_it_is_taken_over(tmp_path, monkeypatch, another):
    """Between opening the state and locking it; a third run may begin there, too."""
    path, third = tmp_path / "a.tif", []
    store = open_store(path)
    store.release()

    def vanish():
        shutil.rmtree(store.folder)
        if another:
            third.append(open_store(path))

    refusal = pytest.raises(OutputError, match="Another run is writing")
    with meanwhile(monkeypatch, fcntl, "flock", vanish), refusal if another else contextlib.nullcontext():
        store = open_store(path, resume=True)
    refused(path)()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_file_systems_without_locks_are_taken_others_not(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    if number == errno.EIO:
        with pytest.raises(OutputError, match="cannot be locked"):
            open_store(tmp_path / "a.tif")
        assert os.listdir(tmp_path) == []
    else:
        finish(tmp_path / "a.tif", open_store(tmp_path / "a.tif"))
        assert sorted(os.listdir(tmp_path)) == ["a.tif", "a.tif.u.tif"]


# Strips of one value ------------------------------------------------------------------------------


def alone(path, rows, resume=False):
    """A store of one layer with the strips `rows`; those that it lacks are put."""
    store = StripStore(str(path), {}, ["image"], len(rows), resume=resume)
    for index in store.missing():
        store.put(index, {"image": rows[index]})
    return store


class Collector:
    """Stands in for a SceneWriter."""

    def __init__(self):
        self.strips = []

    def spans(self, starts):
        return [(0, 700)]

    def write_encoded(self, row, rows, left):
        assert row == sum(strip.shape[1] for strip in self.strips)
        self.strips.append(rows)


def collected(store):
    collector = Collector()
    store.assemble({"image": collector})
    return collector.strips


def almost(value, dtype, place):
    rows = np.full((3, 40, 700), value, dtype)
    rows.flat[place] = 1
    return rows


@pytest.mark.parametrize(
    ("dtype", "value"), [("uint8", 255), ("uint16", 0), ("int16", -32768), ("float32", np.nan), ("float64", -0.0)]
)
def test_strips_of_one_value_take_no_space(tmp_path, dtype, value):
    """They come back to the bit; one value that differs, wherever it is, keeps the array."""
    places = (0, 1, 65535, 65536, 70000, 83999)
    rows = [np.full((3, 40, 700), value, dtype), *(almost(value, dtype, i) for i in places)]
    rows += [np.zeros((3, 0, 700), dtype), np.ones((1, 1, 1), dtype)]
    if rows[0].dtype.kind == "f":  # zeros of both signs are not one value
        rows[1][rows[1] != 1] = -0.0
        rows[1].flat[0] = 0.0
    store = alone(tmp_path / "a.tif", rows)
    sizes = [(store.folder / f"image-{i:06d}.npy").stat().st_size for i in range(len(rows))]
    assert sizes[0] < 512
    assert all(size > 84000 * rows[0].itemsize for size in sizes[1:-2])
    for got, expected in zip(collected(store), rows, strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.tobytes() == expected.tobytes()
    assert np.signbit(collected(store)[0].flat[0]) == np.signbit(rows[0].flat[0])


def test_strips_of_one_value_are_resumed(tmp_path):
    """Together with others, and without any of them being made again."""
    path = tmp_path / "a.tif"
    rows = [np.full((2, 16, 50), 7, "uint16"), almost(0, "uint16", 9), np.zeros((2, 9, 50))]
    alone(path, rows).release()
    store = StripStore(str(path), {}, ["image"], 3, resume=True)
    assert store.missing() == []
    assert [got.tobytes() for got in collected(store)] == [kept.tobytes() for kept in rows]


@pytest.mark.parametrize("keep", [0, 20, 127, -1])
@pytest.mark.parametrize("constant", [False, True])
def test_torn_strips_are_made_again(tmp_path, keep, constant):
    """A power cut can leave a renamed file without its contents."""
    path = tmp_path / "a.tif"
    rows = [np.full((2, 16, 50), 7, "uint16"), np.full((2, 9, 50), 8, "uint16"), np.zeros((2, 0, 50), "uint16")]
    rows[1].flat[3] = 8 if constant else 9
    store = alone(path, rows)
    store.release()
    file = store.folder / "image-000001.npy"
    os.truncate(file, keep if keep >= 0 else file.stat().st_size + keep)
    store = StripStore(str(path), {}, ["image"], 3, resume=True)
    assert store.missing() == [1]
    store.release()
    assert collected(alone(path, rows, resume=True))[1].tobytes() == rows[1].tobytes()


def test_file_of_strips_of_one_value(tmp_path):
    """The strips' file equals one that is written directly, blocks that are cut across included."""
    grid = plain_grid(1300, 600)
    height, empty = 300, np.zeros((2, 300, 600), np.float32)
    full = np.random.default_rng(0).uniform(1, 4000, (2, 300, 600)).astype(np.float32)
    strips = [empty, empty, full, empty, empty[:, :100]]
    with SceneWriter(str(tmp_path / "a.tif"), grid, META) as out:
        rows = [encode(values, values[0] > 0, out.encoding) for values in strips]
        store = alone(tmp_path / "a.tif", rows)
        store.assemble({"image": out})
    taken = sum(path.stat().st_size for path in store.folder.glob("*.npy"))
    assert rows[2].nbytes < taken < rows[2].nbytes + 4096
    with SceneWriter(str(tmp_path / "b.tif"), grid, META) as out:
        for index, values in enumerate(strips):
            write_rows(out, index * height, values, values[0] > 0)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
