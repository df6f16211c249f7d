"""Kinds of faults that a power cut, a kill or a second writer leaves."""

import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasters import RasterPair, write_vrt

from uknowpan import durable, sharpening
from uknowpan.archive import run as archive_run
from uknowpan.archive.report import append_line, merged_report
from uknowpan.tiling import InputUnreadable, OutputBusy, StripStore, open_pair

BROVEY = ("--method", "brovey", "--coregister", "off")


def pixels(path: Path) -> bytes:
    with rasterio.open(path) as dataset:
        return dataset.read().tobytes()


def words(pair: RasterPair, output: Path, *more: object) -> tuple[object, ...]:
    return ("sharpen", pair.pan, *pair.ms, "-o", output, *BROVEY, "--tile", 64, "-q", *more)


# Strips -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["zeros", "flipped", "torn", "empty"])
def test_damaged_strips_are_made_again(damage: str, tmp_path: Path) -> None:
    """A strip that a power cut or a disk damaged: it is missing, whatever its size."""
    rows = np.arange(2 * 16 * 50, dtype="uint16").reshape(2, 16, 50)
    store = StripStore(str(tmp_path / "a.tif"), {}, ["image"], 2)
    for index in range(2):
        store.put(index, {"image": rows})
    store.release()
    path = store.folder / "image-000001.npy"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    path.write_bytes(
        {"zeros": whole[:128] + bytes(len(whole) - 128), "flipped": flipped, "torn": whole[:-4], "empty": b""}[damage]
    )
    assert StripStore(str(tmp_path / "a.tif"), {}, ["image"], 2, resume=True).missing() == [1]


@pytest.mark.parametrize("name", ["state.json", "survey.json"])
@pytest.mark.parametrize("content", [None, b"", b"\0" * 200, b'{"kind": "uknow', "altered"])
def test_a_torn_state_does_not_block(
    name: str, content: bytes | str | None, uknowpan, make_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty or torn small file: the run begins anew and ends well."""
    pair, output = make_pair(ms_shape=(32, 20)), tmp_path / "out.tif"

    def fail(*_: object) -> None:
        raise OSError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(sharpening, "_assemble", fail)
        assert uknowpan(*words(pair, output)).code == 3
    path = tmp_path / "out.tif.part" / name
    if content == "altered":  # whole JSON with another value
        content = path.read_bytes().replace(b"1", b"0") if name == "survey.json" else b""
    path.unlink() if content is None else path.write_bytes(content)
    done = uknowpan(*words(pair, output, "--resume"))
    assert done.code == 0, done.stderr
    assert not (tmp_path / "out.tif.part").exists()


def test_a_kill_between_two_renames(
    uknowpan, make_pair, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some outputs of a scene have their names, others not: `--resume` completes them, and keeps a stranger's file."""
    pair, output, sigma, preview = (make_pair(ms_shape=(16, 16)), *(tmp_path / n for n in ("o.tif", "s.tif", "p.png")))
    command = ("sharpen", pair.pan, *pair.ms, "-o", output, "--uncertainty", sigma, "--preview", preview)
    command += ("--model", tiny_model, "--coregister", "off", "--resume", "-q")
    place, done = durable.Scratch.place, []

    def stop(scratch: durable.Scratch) -> None:
        if scratch.target.parent == tmp_path:
            if len(done) == 2:
                raise OSError("stopped")
            done.append(scratch.target.name)
        place(scratch)

    with monkeypatch.context() as patch:
        patch.setattr(durable.Scratch, "place", stop)
        assert uknowpan(*command).code == 3
    assert done == ["p.png", "s.tif"] and sigma.exists() and not output.exists()
    kept, other = sigma.read_bytes(), tmp_path / "kept.tif"
    shutil.move(sigma, other)
    sigma.write_bytes(b"somebody else's")
    assert uknowpan(*command).code == 4
    os.replace(other, sigma)
    ended = uknowpan(*command)
    assert ended.code == 0, ended.stderr
    assert sigma.read_bytes() == kept and output.exists() and preview.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"o.tif", "s.tif", "p.png", "scene_pan.tif", "scene_ms.tif"}


# Inputs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vrt", "vrt of a vrt", "vrt of any name", "zip", "mask"])
def test_files_behind_an_input_are_its_identity(kind: str, make_pair, tmp_path: Path) -> None:
    """A file that an input is read from changes, at the same size and time: another identity."""
    pair = make_pair(ms_shape=(16, 16))
    source = name = pair.ms[0]
    if kind.startswith("vrt"):
        for number in range(2 if kind == "vrt of a vrt" else 1):
            name = write_vrt(tmp_path / (f"{number}.vrt" if kind != "vrt of any name" else "vrt.xml"), name)
    elif kind == "zip":
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
            archive.write(source, "ms.tif")
        source, name = str(tmp_path / "z.zip"), f"/vsizip/{tmp_path}/z.zip/ms.tif"
    else:
        source = f"{name}.msk"
        with rasterio.open(source, "w", driver="GTiff", width=16, height=16, count=1, dtype="uint8") as mask:
            mask.update_tags(INTERNAL_MASK_FLAGS_1="2")
            mask.write(np.full((1, 16, 16), 255, "uint8"))
    with open_pair(pair.pan, [name]) as opened:
        before = opened.identity()
        opened.check_unchanged()
        status = os.stat(source)
        content = bytearray(Path(source).read_bytes())
        content[-1] ^= 1
        Path(source).write_bytes(content)
        os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(InputUnreadable, match="changed while it was read"):
            opened.check_unchanged()
    if kind != "zip":  # its sum protects the member
        with open_pair(pair.pan, [name]) as opened:
            assert opened.identity() != before


def test_an_input_that_changes_during_the_run(
    uknowpan, make_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MS rewritten during the run: exit code 3, no output, no strips of two states."""
    pair, output = make_pair(ms_shape=(16, 16)), tmp_path / "out.tif"
    assemble = StripStore.assemble

    def rewrite(*arguments: object) -> None:
        os.utime(pair.ms[0], ns=(1, 1))
        assemble(*arguments)

    monkeypatch.setattr(StripStore, "assemble", rewrite)
    done = uknowpan(*words(pair, output))
    assert done.code == 3 and "changed while it was read" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"scene_pan.tif", "scene_ms.tif"}


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sidecar", [True, False])
def test_an_output_without_its_end_is_not_skipped(sidecar: bool, uknowpan, make_pair, tmp_path: Path) -> None:
    """An output with a lost tail: `batch` makes it again; zeros in place of the tail show by the sidecar's sums."""
    make_pair(name="a", ms_shape=(32, 32), noise=50)
    command = ("batch", "--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif", *BROVEY)
    command += ("-o", tmp_path / "out")
    assert uknowpan(*command).code == 0
    output = tmp_path / "out" / "a_sharp.tif"
    whole = output.read_bytes()
    output.write_bytes(whole[:-3000] + bytes(3000 if sidecar else 0))
    if not sidecar:
        Path(f"{output}.json").unlink()
    again = uknowpan(*command)
    assert again.code == 0 and "it is made anew" in again.stderr
    assert output.read_bytes() == whole


def test_a_scene_of_another_run_does_not_fail(
    uknowpan, make_pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches on one folder: the scene that the other one is at comes last."""
    for name in "ab":
        make_pair(name=name, ms_shape=(12, 12))
    real, busy = sharpening.sharpen_scene, ["a", "a"]

    def occupied(scene, *arguments: object):
        if busy and Path(scene.output).name == "a_sharp.tif":
            busy.pop()
            raise OutputBusy("Another run is writing it.")
        return real(scene, *arguments)

    monkeypatch.setattr(archive_run, "sharpen_scene", occupied)
    monkeypatch.setattr(archive_run, "WAIT", 0.0)
    globs = ("--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif")
    done = uknowpan("batch", *globs, *BROVEY, "-o", tmp_path / "out", "-q")
    assert done.code == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()] == ["b_sharp.tif", "a_sharp.tif"]
    assert not busy and merged_report(tmp_path / "out").as_dict()["failed"] == 0


def test_the_report_after_a_run_that_skips(tmp_path: Path) -> None:
    """A clock set back, and a run that only skips: the line written last counts, with the figures of the making."""
    made = {"id": "a", "status": "done", "finished": "2026-02", "seconds": 2.0, "megapixels": 8.0,
            "megapixels_per_second": 4.0, "peak_mb": 5.0, "warnings": ["w"]}  # fmt: skip
    later = {"id": "a", "status": "skipped", "finished": "2026-01", "seconds": 0.1, "megapixels": 8.0,
             "megapixels_per_second": None, "peak_mb": 1.0}  # fmt: skip
    for line in (made | {"status": "failed", "finished": "2026-03"}, made, later, later):
        append_line(tmp_path / "report.jsonl", line)
    report = merged_report(tmp_path)
    assert [scene["status"] for scene in report.scenes] == ["skipped"]
    assert (report.as_dict()["megapixels_per_second"], report.as_dict()["peak_mb"]) == (4.0, 5.0)
    assert report.scenes[0]["warnings"] == ["w"]


def test_a_closed_pipe_does_not_stop_a_batch(make_pair, tmp_path: Path) -> None:
    """The reader of stdout goes away, as `head -1` does: all scenes are made, exit code 0."""
    for name in "abc":
        make_pair(name=name, ms_shape=(12, 12))
    globs = ["--pan-glob", str(tmp_path / "*_pan.tif"), "--ms-glob", str(tmp_path / "*_ms.tif")]
    reader, writer = os.pipe()
    os.close(reader)
    start = [sys.executable, "-c", "from uknowpan.commands.main import main; main()", "batch"]
    done = subprocess.run(
        [*start, *globs, *BROVEY, "-o", str(tmp_path / "out")], stdout=writer, stderr=subprocess.PIPE, timeout=120
    )
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "out").glob("*_sharp.tif"))) == 3


# Temporary files ----------------------------------------------------------------------------------


def test_temporary_files_are_private(tmp_path: Path) -> None:
    """Links planted at temporary names: names are random, folders exclusive and their owner's alone."""
    names = set()
    for _ in range(2):
        with durable.Scratch(tmp_path / "a.tif") as scratch:
            names.add(scratch.folder.name)
            assert stat.S_IMODE(scratch.folder.stat().st_mode) == 0o700
    assert len(names) == 2 and not list(tmp_path.iterdir())
    store = StripStore(str(tmp_path / "b.tif"), {}, ["image"], 1)
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700


def test_overwriting_keeps_permissions(uknowpan, make_pair, tmp_path: Path) -> None:
    """A file that is its owner's alone stays so."""
    pair, output = make_pair(ms_shape=(12, 12)), tmp_path / "out.tif"
    output.write_bytes(b"")
    output.chmod(0o600)
    assert uknowpan(*words(pair, output, "--overwrite")).code == 0
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


def test_kills_and_power_cuts(tmp_path: Path) -> None:
    """Kills and power cuts at random moments: the command completes, equal to the bit, and leaves nothing over."""
    tools = Path(__file__).parents[1] / "tools"
    compiler = shutil.which("gcc")
    many = int(os.environ.get("UKNOWPAN_CRASHES", "20"))
    counts, environment = [str(many), str(max(many // 2, 12))], dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    library = tmp_path / "powercut.so"
    if compiler is None:
        counts[1] = "0"
    else:
        build = [compiler, "-shared", "-fPIC", "-w", "-o", library, tools / "powercut.c", "-ldl", "-lpthread"]
        subprocess.run(build, check=True)
        environment["LD_PRELOAD"] = str(library)
    (tmp_path / "work").mkdir()
    command = [sys.executable, tools / "crashes.py", tmp_path / "work", *counts, *([library] if compiler else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 * many)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["trials"] == sum(map(int, counts))
    if compiler is None:
        pytest.skip("power cuts need gcc; the kills passed")
