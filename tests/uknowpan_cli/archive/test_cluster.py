"""`uknowpan batch --dask`: clusters of real processes, and the death of some."""

import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from running import MakePair, Run, pixels

from uknowpan.archive import cluster as batch_dask
from uknowpan.archive.report import append_line, merged_report
from uknowpan.commands import batch
from uknowpan.loading import load_once
from uknowpan.options import SharpenOptions

needs_dask = pytest.mark.skipif(
    importlib.util.find_spec("distributed") is None, reason="distributed is not installed (uknowpan[dask])"
)
needs_certificates = pytest.mark.skipif(
    importlib.util.find_spec("cryptography") is None, reason="cryptography is not installed (uknowpan[dask])"
)
SCENES = "abcdef"


@pytest.fixture(autouse=True)
def _no_model_from_before() -> None:
    load_once.cache_clear()


@pytest.fixture
def words(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> tuple[object, ...]:
    """The command line for some tiny scenes of three strips each."""
    for number, name in enumerate(SCENES):
        offset = (0.5, 0) if name == "f" else (0, 0)  # is resampled, and says so
        make_pair(name=name, ms_shape=(24, 12), noise=5.0 + number, offset=offset)
    return (
        *("batch", "--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif"),
        *("--model", tiny_model, "--tile", 32, "--coregister", "off", "--shard", "none"),
        *("-j", 1, "-o"),
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


DEADLY = """
import os, signal
from uknowpan.tiling import StripStore
put = getattr(StripStore.put, "before", StripStore.put)
def deadly(self, index, rows):
    if "deadly" in self.folder.name:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, index, rows)
deadly.before = put
StripStore.put = deadly
"""


@needs_dask
@needs_certificates
def test_local_cluster(words: tuple[object, ...], uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Two processes make the same bits as one; a broken and a deadly scene fail without harm to the others."""
    import dask
    import distributed  # noqa: F401 - before dask.config.set, which would undo its defaults

    serial, output = tmp_path / "serial", tmp_path / "out"
    assert uknowpan(*words, serial).code == 0
    make_pair(name="broken", ms_shape=(24, 12))
    (tmp_path / "broken_ms.tif").write_text("no raster")
    make_pair(name="deadly", ms_shape=(24, 12))
    preload = tmp_path / "deadly.py"
    preload.write_text(DEADLY)
    options = {"distributed.worker.preload": [str(preload)], "distributed.scheduler.allowed-failures": 0}
    with dask.config.set(options):
        outcome = uknowpan(*words, output, "--dask", "local", "--dask-workers", 2, "-v")
    assert outcome.code == 7, outcome.stderr
    assert "INFO: 2 workers with 1 threads each" in outcome.stderr
    assert "error: 2 of 8 scenes failed; see" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert sorted(outcome.stdout.split()) == [f"{output}/{name}_sharp.tif" for name in SCENES]
    assert pixels(output) == pixels(serial)
    last = {line["id"]: line for line in merged_report(output).scenes}
    assert (last["broken"]["code"], last["deadly"]["code"]) == (3, 1)
    assert "broken_ms.tif cannot be opened as a raster" in last["broken"]["message"]
    assert re.match("Attempted to run task .*deadly", last["deadly"]["message"])
    assert re.search(r"^\d/8 [a-f]: done in [\d.]+ s, [\d.e-]+ Mpx/s, \d+ MB$", outcome.stderr, re.M)
    assert re.search("INFO: f: .*cubic", outcome.stderr)  # what a worker says comes here


MORTAL = """
import os, signal, time
from uknowpan.tiling import StripStore
put = getattr(StripStore.put, "before", StripStore.put)
def mortal(self, index, rows):
    put(self, index, rows)
    with open({log!r}, "a") as log:
        print(os.getpid(), self.folder.name, index, file=log)
    time.sleep(0.1)
    if index == 1:
        try:
            os.close(os.open({marker!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
mortal.before = put
StripStore.put = mortal
"""
"""The worker that first has two strips of a scene is killed."""


@dataclass
class Cluster:
    """`dask scheduler` and two `dask worker`."""

    folder: Path
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    address: str = ""

    def start(self) -> None:
        file, preload = self.folder / "scheduler.json", self.folder / "mortal.py"
        marker, log = self.folder / "killed", self.folder / "strips"
        preload.write_text(MORTAL.format(log=str(log), marker=str(marker)))
        common = ("--no-dashboard", "--scheduler-file", file)
        self._start("scheduler", "--host", "127.0.0.1", "--port", 0, *common)
        for _ in range(2):
            self._start("worker", "--no-nanny", "--nthreads", 1, "--preload", preload, *common)
        until = time.monotonic() + 60
        while not file.exists() or not file.read_text().strip():
            assert time.monotonic() < until and self.alive() == [True] * 3
            time.sleep(0.1)
        self.address = json.loads(file.read_text())["address"]

    def _start(self, *arguments: object) -> None:
        with open(self.folder / "dask.log", "ab") as log:
            command = [sys.executable, "-m", "dask", *map(str, arguments)]
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))

    def alive(self) -> list[bool]:
        return [process.poll() is None for process in self.processes]

    def strips(self) -> list[tuple[str, ...]]:
        """(process, folder, index), as they were made."""
        return [tuple(line.split()) for line in (self.folder / "strips").read_text().splitlines()]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("dask"))
    try:
        made.start()
        yield made
    finally:
        made.stop()


@needs_dask
def test_deaths(
    words: tuple[object, ...], cluster: Cluster, uknowpan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker is killed in the middle of a scene, then the client is interrupted, then the
    scheduler is killed; whatever happens, the same command makes the rest."""
    serial, output = tmp_path / "serial", tmp_path / "out"
    assert uknowpan(*words, serial).code == 0
    outcome = uknowpan(*words, output, "--dask", cluster.address)
    assert outcome.code == 0, outcome.stderr
    assert sorted(cluster.alive()) == [False, True, True]
    assert pixels(output) == pixels(serial)
    assert names(output) == names(serial)
    assert {line["status"] for line in merged_report(output).scenes} == {"done"}
    made = cluster.strips()
    assert len({process for process, _, _ in made}) == 2
    # The other worker went on with the strips that the dead one had left.
    parts = [(folder, index) for _, folder, index in made]
    assert len(set(parts)) == len(parts)
    assert {(f"{n}_sharp.tif.part", str(i)) for n in SCENES for i in range(3)} <= set(parts)

    again = uknowpan(*words, output, "--dask", cluster.address, "--json")
    assert again.code == 0, again.stderr
    printed = [json.loads(line) for line in again.stdout.splitlines()]
    assert sorted(line["id"] for line in printed) == list(SCENES)
    assert {line["status"] for line in printed} == {"skipped"}

    def interrupt(path: Path, line: object) -> None:
        raise KeyboardInterrupt

    other = tmp_path / "other"
    monkeypatch.setattr(batch, "append_line", interrupt)
    outcome = uknowpan(*words, other, "--dask", cluster.address)
    assert outcome.code == 130, outcome.stderr
    assert outcome.stderr.endswith("after 0 of 6 scenes; the same command goes on from there.\n")
    settled = None
    while settled != (settled := names(other)):
        time.sleep(2)
    assert 1 <= len(pixels(other)) < len(SCENES)

    def end(path: Path, line: dict[str, object]) -> None:
        append_line(path, line)
        cluster.processes[0].kill()

    monkeypatch.setattr(batch, "append_line", end)
    outcome = uknowpan(*words, other, "--dask", cluster.address)
    assert outcome.code == 3
    assert outcome.stderr.splitlines()[-1] == (
        "uknowpan: error: The Dask scheduler is gone, or has dropped this batch; the same command goes on."
    )
    assert "Traceback" not in outcome.stderr


@needs_dask
@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--dask", "tcp://127.0.0.1:9"), 3, "No Dask scheduler answers at tcp://127.0.0.1:9 with"),
        (("--dask", "cat://127.0.0.1:9"), 2, "--dask cat://127.0.0.1:9: "),
        (("--dask", "here"), 2, r"--dask takes local or tcp://HOST:PORT, not 'here'\."),
        (("--dask-workers", 2), 2, r"--dask-workers goes with --dask local\."),
        (("--dask", "tcp://h:1", "--dask-workers", 2), 2, "--dask-workers goes with --dask local;"),
        (("--dask", "local", "--device", "tpu"), 2, "--device takes auto"),
    ],
)
def test_refused(
    options: Sequence[object],
    code: int,
    says: str,
    words: tuple[object, ...],
    uknowpan: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batch_dask, "TIMEOUT", 1)
    outcome = uknowpan(*words, tmp_path / "out", *options)
    outcome.fails(code, says)


def test_without_dask(
    words: tuple[object, ...], uknowpan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    needs = r"needs {}: pip install 'uknowpan\[dask\]'\."
    uknowpan(*words, tmp_path / "out", "--dask", "local").fails(2, needs.format("Dask"))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "cryptography", None)
    uknowpan(*words, tmp_path / "out", "--dask", "local").fails(2, needs.format("cryptography"))


@needs_dask
@needs_certificates
def test_a_local_cluster_takes_no_orders_of_others() -> None:
    """Kind: another user of the machine sends code to an open port."""
    from distributed import Client
    from distributed.security import Security

    settings = batch_dask.BatchSettings(SharpenOptions(device="cpu"), "out")
    with batch_dask._local(settings, 1) as (_, client):
        address = client.scheduler.address
        assert address.startswith("tls://127.0.0.1:")
        assert all(worker.startswith("tls://") for worker in client.scheduler_info()["workers"])
        assert client.submit(int, "7").result() == 7
        for stranger in (None, Security.temporary()):
            where = address if stranger else address.replace("tls://", "tcp://")
            with pytest.raises(OSError, match=r"."):
                Client(where, security=stranger, timeout=3, set_as_default=False)


@needs_dask
def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker 5 of a machine with four GPUs takes the second, if nobody says which."""
    import distributed

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(distributed, "get_worker", lambda: type("Worker", (), {"name": 5}))
    for asked, count, own in (
        (SharpenOptions(), 4, "cuda:1"),
        (SharpenOptions(device="cuda:3"), 1, "cuda:3"),
        (SharpenOptions(device="cpu"), 0, "cpu"),
        (SharpenOptions(method="gsa"), 0, "auto"),
    ):
        assert batch_dask._gpus(asked) == count
        assert batch_dask._with_own_gpu(asked).device == own


def test_model_by_any_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file is named by its whole path; a bundled model has none."""
    monkeypatch.chdir(tmp_path)
    Path("mine.safetensors").touch()
    for asked, path in (("mine.safetensors", str(tmp_path / "mine.safetensors")), ("generic", "generic"), (None, None)):
        assert batch_dask._anywhere(SharpenOptions(model=asked)).model == path
