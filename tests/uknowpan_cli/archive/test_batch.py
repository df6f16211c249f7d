"""`uknowpan batch`: many scenes, some of them broken."""

import json
import mmap
import os
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from rasters import RasterPair
from running import STOPPING, MakePair, Outcome, Run, pixels, read, spawn, write_tiny_model

from uknowpan import sharpening as pipeline
from uknowpan.archive import run as batch_run
from uknowpan.archive.manifest import Scene, Shard
from uknowpan.archive.report import append_line, merged_report
from uknowpan.loading import load_once
from uknowpan.options import SharpenOptions
from uknowpan.tiling import OutputError, StripStore


@pytest.fixture(autouse=True)
def _no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """No array job or torchrun that the tests themselves run in; and no model from before."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "AWS_BATCH_", "JOB_COMPLETION_")) or name.endswith("RANK"):
            monkeypatch.delenv(name)
    load_once.cache_clear()


@dataclass
class Archive:
    """Scenes in a folder, and the command line for them."""

    folder: Path
    make: MakePair
    uknowpan: Run
    rows: list[dict[str, object]] = field(default_factory=list)

    def add(self, name: str, **options: object) -> RasterPair:
        """A scene, unlike the others; tiny."""
        options = {"ms_shape": (12, 12), "noise": 5.0 + len(self.rows), **options}
        pair = self.make(name=name, **options)
        self.rows.append({"id": name, "pan": pair.pan, "ms": pair.ms})
        return pair

    def manifest(self) -> Path:
        path = self.folder / "scenes.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        return path

    @property
    def words(self) -> tuple[object, ...]:
        return ("batch", self.manifest(), "--method", "brovey", "--coregister", "off")

    def run(self, output: Path, *words: object) -> Outcome:
        return self.uknowpan(*self.words, "-o", output, *words)


@pytest.fixture
def archive(tmp_path: Path, make_pair: MakePair, uknowpan: Run) -> Archive:
    return Archive(tmp_path, make_pair, uknowpan)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(folder.glob("report*.jsonl")) for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def touch_again(path: str) -> None:
    """Another time of modification, by which files are told apart."""
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_patterns_from_file_to_file(uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """The pixels of `sharpen`, with sigma, tags and sidecar; stdout is the paths."""
    for name in ("a", "b"):
        make_pair(name=name, separate=name == "b", noise=20)
    options = ("--model", tiny_model, "--seed", 3, "--coregister", "off", "-f", "cog")
    globs = ("--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif")
    output = tmp_path / "out"
    outcome = uknowpan("batch", *globs, "-o", output, *options, "--uncertainty", "--skip-missing")
    assert outcome.code == 0, outcome.stderr
    assert outcome.stdout == f"{output}/a_sharp.tif\n"
    assert re.search(r"WARNING: left out: .*b_pan.tif has no partner\n", outcome.stderr)
    assert re.search(r"^1/1 a: done in [\d.]+ s, [\d.e-]+ Mpx/s, \d+ MB$", outcome.stderr, re.M)
    globs = ("--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms[0-9].tif")
    outcome = uknowpan("batch", *globs, "-o", output, *options, "--skip-missing", "--suffix", "_s")
    assert outcome.code == 0, outcome.stderr
    made = ["a_sharp.tif", "a_sharp.tif.json", "a_sigma.tif", "b_s.tif", "b_s.tif.json", "report.jsonl"]
    assert names(output) == made
    single, sigma = tmp_path / "single.tif", tmp_path / "sigma.tif"
    pair = (tmp_path / "a_pan.tif", tmp_path / "a_ms.tif")
    assert uknowpan("sharpen", *pair, "-o", single, *options, "--uncertainty", sigma).code == 0
    assert (read(single) == read(output / "a_sharp.tif")).all()
    assert (read(sigma) == read(output / "a_sigma.tif")).all()
    sidecar = json.loads((output / "a_sharp.tif.json").read_text())
    with rasterio.open(output / "a_sharp.tif") as dataset, rasterio.open(single) as other:
        assert dataset.tags()["UKNOWPAN_IDENTITY"] == sidecar["identity"]
        assert "UKNOWPAN_IDENTITY" not in other.tags()
    assert sidecar["made_from"]["method"]["SEED"] == "3"
    assert sidecar["report"]["tiles"] == 1


def test_shards_make_what_one_process_makes(archive: Archive, tiny_model: Path) -> None:
    """Two shards by a scheduler's variables, one after the other, equal one run."""
    for i in range(10):
        archive.add(f"s{i}")
    words = (*archive.words[:2], "--model", tiny_model, "--tile", 32)
    whole, parts = archive.folder / "whole", archive.folder / "parts"
    assert archive.uknowpan(*words, "-o", whole).code == 0
    printed = []
    for rank in ("1", "0"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", rank)
            patch.setenv("WORLD_SIZE", "2")
            outcome = archive.uknowpan(*words, "-o", parts, "--json")
        assert outcome.code == 0, outcome.stderr
        printed += [json.loads(line) for line in outcome.stdout.splitlines()]
    assert sorted(line["id"] for line in printed) == sorted(f"s{i}" for i in range(10))
    assert pixels(parts) == pixels(whole)
    assert len(set(pixels(whole).values())) == 10
    assert {p.name for p in parts.glob("*.jsonl")} == {f"report-{k}-of-2.jsonl" for k in (1, 2)}
    first = Shard(1, 2).share([f"s{i}" for i in range(10)])
    assert lines(parts) == sorted(printed, key=lambda line: line["id"] not in first)
    assert archive.uknowpan(*words, "-o", whole, "--shard", "2/2").stdout.count("\n") == 5


def test_line_of_the_report(archive: Archive) -> None:
    archive.add("a", ms_shape=(50, 40))
    output = archive.folder / "out"
    assert archive.run(output).code == 0
    (line,) = lines(output)
    assert line["megapixels"] == 0.032
    assert line["megapixels_per_second"] == pytest.approx(0.032 / line["seconds"], rel=0.05)
    assert 50 < line["peak_mb"] < 20_000
    assert (line["status"], line["code"], line["attempts"]) == ("done", 0, 1)
    assert (line["device"], line["output"]) == ("cpu", f"{output}/a_sharp.tif")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT[\d:.]+\+00:00", line["finished"])


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="not this kernel")
def test_peak_memory_is_of_the_scene(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scene that needs much does not show in the line of the next one."""
    archive.add("a")
    archive.add("b")
    sharpen_rows = pipeline.sharpen_rows

    def greedy(scene: pipeline.Scene, *rest: object) -> object:
        if "a_pan" in str(scene.pair.inputs[0]):
            with mmap.mmap(-1, 400 * 2**20) as block:  # which goes back to the system
                for page in range(0, len(block), mmap.PAGESIZE):
                    block[page] = 1
        return sharpen_rows(scene, *rest)

    monkeypatch.setattr(pipeline, "sharpen_rows", greedy)
    assert archive.run(archive.folder / "out").code == 0
    a, b = lines(archive.folder / "out")
    assert a["peak_mb"] > b["peak_mb"] + 300


def spoil(archive: Archive, output: Path) -> dict[str, tuple[int, str]]:
    """Eight scenes, each with an error of its own: id -> (code, words)."""
    (archive.folder / "gone_pan.tif").unlink(missing_ok=True)
    archive.add("gone")
    Path(archive.rows[-1]["pan"]).unlink()
    cut = Path(archive.add("cut", ms_shape=(64, 64)).ms[0])
    cut.write_bytes(cut.read_bytes()[:6000])
    Path(archive.add("text").ms[0]).write_text("no raster")
    archive.add("far", offset=(9000, 9000))
    swapped = archive.add("swapped")
    archive.rows[-1] |= {"pan": swapped.ms[0], "ms": [swapped.pan]}
    archive.add("empty", nodata=0, holes=np.ones((12, 12), bool))
    archive.add("taken")
    output.mkdir()
    (output / "taken_sharp.tif").write_text("somebody's work")
    archive.add("file")
    archive.rows[-1]["output"] = "file/sharp.tif"
    (output / "file").write_text("in the way")
    return {
        "gone": (3, "gone_pan.tif cannot be opened as a raster: .*No such file"),
        "cut": (3, "cannot be read .*truncated or corrupt"),
        "text": (3, "text_ms.tif cannot be opened as a raster"),
        "far": (3, "overlap"),
        "swapped": (3, "4 bands"),
        "empty": (3, "valid"),
        "taken": (4, "taken_sharp.tif was not made by batch; --overwrite replaces it"),
        "file": (3, "file"),
    }


def test_broken_scenes_do_not_stop_the_rest(archive: Archive, uknowpan: Run) -> None:
    output = archive.folder / "out"
    for i in range(16):
        archive.add(f"a{i}")
    broken = spoil(archive, output)
    for i in range(16):
        archive.add(f"z{i}")
    plan = archive.run(output, "--dry-run", "--json")
    assert plan.code == 7
    outcome = archive.run(output)
    assert outcome.code == 7
    assert outcome.stdout.count("_sharp.tif\n") == 32
    assert f"error: 8 of 40 scenes failed; see {output}/report.jsonl.\n" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    last = {line["id"]: line for line in lines(output)}
    planned = {line["id"]: line for line in map(json.loads, plan.stdout.splitlines())}
    assert {name for name, line in last.items() if line["status"] == "failed"} == set(broken)
    for name, (code, says) in broken.items():
        assert last[name]["code"] == code, last[name]
        assert re.search(says, last[name]["message"]), last[name]
        assert last[name]["output"] not in outcome.stdout
        assert re.search(rf"ERROR: \d+/40 {name} failed \({code}", outcome.stderr)
        assert (planned[name]["status"], planned[name]["code"]) == ("cannot", code)
    assert (output / "taken_sharp.tif").read_text() == "somebody's work"
    left = [name for name in names(output) if ".part" in name or "tmp" in name]
    assert left == []

    table = uknowpan("batch", "--report", output)
    assert table.code == 7
    assert "scenes  40: 32 done, 0 skipped, 8 failed" in table.stdout
    assert re.search(r"^taken +4 +1  .*was not made by batch", table.stdout, re.M)
    sums = json.loads(uknowpan("batch", "--report", output, "--json").stdout)
    assert (sums["done"], sums["failed"], len(sums["failures"])) == (32, 8, 8)

    again = archive.run(output, "-q")
    assert again.code == 7
    assert again.stdout == outcome.stdout
    assert len(re.findall(r"ERROR: \d+/40 \w+ failed", again.stderr)) == 8
    assert "done in" not in again.stderr
    last = {line["id"]: line for line in lines(output)}
    assert sum(line["status"] == "skipped" for line in last.values()) == 32


def test_fail_fast(archive: Archive) -> None:
    for name in ("a", "b", "c"):
        archive.add(name)
    Path(archive.rows[1]["pan"]).unlink()
    output = archive.folder / "out"
    outcome = archive.run(output, "--fail-fast")
    assert outcome.code == 7
    assert "1 of 3 scenes failed and 1 were not tried (--fail-fast)" in outcome.stderr
    assert [line["status"] for line in lines(output)] == ["done", "failed"]


def failing(error: Exception, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many scenes fail."""
    put, left = StripStore.put, [times]

    def sometimes(self: StripStore, *rest: object) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        put(self, *rest)

    monkeypatch.setattr(StripStore, "put", sometimes)


@pytest.mark.parametrize(
    ("error", "words", "ends"),
    [
        (OutputError("The disk is full."), (), "done"),
        (OSError(5, "Input/output error"), (), "done"),
        (RuntimeError("a bug"), (), "done"),
        (OutputError("The disk is full."), ("--retries", 0), "failed"),
        (MemoryError(), (), "failed"),
    ],
)
def test_retries(
    error: Exception, words: Sequence[object], ends: str, archive: Archive, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scene is tried once more where the failure may pass; memory was backed off from already."""
    archive.add("a")
    failing(error, 9 if isinstance(error, MemoryError) else 1, monkeypatch)
    output = archive.folder / "out"
    outcome = archive.run(output, *words)
    passed = ends == "done"
    attempts = [(line["status"], line["attempts"]) for line in lines(output)]
    assert attempts == [("failed", 1), *([("done", 2)] if passed else [])]
    assert outcome.code == (0 if passed else 7)
    assert ("WARNING: a: attempt 1: " in outcome.stderr) == passed
    assert merged_report(output).as_dict()[ends] == 1


def test_retries_come_to_an_end(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.add("a")
    failing(ValueError("a bug"), 99, monkeypatch)
    outcome = archive.run(archive.folder / "out", "--retries", 2)
    assert outcome.code == 7
    assert [line["attempts"] for line in lines(archive.folder / "out")] == [1, 2, 3]
    assert re.search(r"a failed \(1, 3 attempts\): internal error, .*a bug", outcome.stderr)


def test_what_is_there_is_skipped(archive: Archive) -> None:
    archive.add("a")
    archive.add("b")
    output = archive.folder / "out"
    assert archive.run(output).code == 0
    before = {p: p.stat().st_mtime_ns for p in output.glob("*.tif*")}
    (output / "a_sharp.tif.json").unlink()
    (output / "b_sharp.tif.json").write_text('{"identity": "of the file before"}')
    outcome = archive.run(output, "--overwrite")
    assert outcome.code == 0
    assert [line["status"] for line in lines(output)] == ["done"] * 2 + ["skipped"] * 2
    for path in output.glob("*.tif"):
        assert path.stat().st_mtime_ns == before[path]
        with rasterio.open(path) as dataset:
            identity = dataset.tags()["UKNOWPAN_IDENTITY"]
        assert json.loads(Path(f"{path}.json").read_text())["identity"] == identity


CHANGED: dict[Sequence[object] | str, str] = {
    ("--tile", 64): "tile",
    ("--max-value", 2000): "max_value",
    ("--nodata", 3): "nodata, pan_nodata",
    ("--output-dtype", "float32"): "output_dtype",
    ("--co", "COMPRESS=LZW"): "creation",
    ("--bidx", "2,1"): "sources",
    ("--overviews",): "overviews",
    ("--method", "gsa"): "method",
    ("--coregister", "shift"): "coregister",
    ("-f", "cog"): "format",
    ("--resampling", "lanczos"): "resampling",
    "pan": "inputs",
    "ms": "inputs",
}
"""Options, or the file that changed -> what the message names."""


@pytest.mark.parametrize("words", list(CHANGED), ids=str)
def test_other_inputs_or_options(words: Sequence[object] | str, archive: Archive) -> None:
    pair = archive.add("a")
    output = archive.folder / "out"
    assert archive.run(output).code == 0
    before, changed = (output / "a_sharp.tif").read_bytes(), CHANGED[words]
    if isinstance(words, str):
        touch_again({"pan": pair.pan, "ms": pair.ms[0]}[words])
        words = ()
    outcome = archive.run(output, *words)
    assert outcome.code == 7
    (line,) = [line for line in lines(output) if line["status"] == "failed"]
    assert line["code"] == 4
    assert line["message"] == (
        f"{output}/a_sharp.tif was made from other inputs or options ({changed}); --overwrite replaces it."
    )
    assert (output / "a_sharp.tif").read_bytes() == before
    assert archive.run(output, *words, "--dry-run").code == 7
    again = archive.run(output, *words, "--overwrite")
    assert again.code == 0 and f"other inputs or options ({changed}); it is made anew." in again.stderr
    same = archive.run(output, *words, "--overwrite")
    assert same.code == 0 and "anew" not in same.stderr
    assert [line["status"] for line in lines(output)] == ["done", "failed", "done", "skipped"]


def test_another_model_is_named(archive: Archive, uknowpan: Run) -> None:
    """Kind: a scene is sharpened again without a word on why."""
    archive.add("a")
    output, words = archive.folder / "out", [word for word in archive.words if word not in ("--method", "brovey")]
    for name in ("one", "two"):
        model = write_tiny_model(archive.folder / f"{name}.safetensors", name=name)
        done = uknowpan(*words, "-o", output, "--model", model, "--overwrite")
        assert done.code == 0
        assert ("other inputs or options (model, sha256); it is made anew" in done.stderr) is (name == "two")


def test_sidecar_is_not_needed(archive: Archive) -> None:
    """The identity is in the file itself."""
    archive.add("a")
    output = archive.folder / "out"
    assert archive.run(output).code == 0
    (output / "a_sharp.tif.json").unlink()
    assert archive.run(output, "--method", "gsa").code == 7
    assert lines(output)[-1]["message"].endswith("other inputs or options; --overwrite replaces it.")


def test_threads_and_batches_do_not_matter(archive: Archive) -> None:
    archive.add("a")
    output = archive.folder / "out"
    assert archive.run(output).code == 0
    load_once.cache_clear()
    assert archive.run(output, "--batch-size", 3, "--num-threads", torch.get_num_threads()).code == 0
    assert [line["status"] for line in lines(output)] == ["done", "skipped"]


def test_sigma_is_part_of_it(archive: Archive, tiny_model: Path) -> None:
    """A file without its sigma is made again for --uncertainty; a sigma of others is refused."""
    archive.add("a")
    words = (*archive.words[:2], "--model", tiny_model, "-o", archive.folder / "out")
    sigma = archive.folder / "out" / "a_sigma.tif"
    assert archive.uknowpan(*words).code == 0
    assert archive.uknowpan(*words, "--uncertainty").code == 0
    made = read(sigma).tobytes()
    assert archive.uknowpan(*words, "--uncertainty").code == 0
    sigma.write_text("somebody's")
    assert archive.uknowpan(*words).code == 0
    assert archive.uknowpan(*words, "--uncertainty").code == 7
    assert archive.uknowpan(*words, "--uncertainty", "--overwrite").code == 0
    assert read(sigma).tobytes() == made
    assert archive.uknowpan(*words, "--coverage", 90).code == 2  # without --uncertainty
    wider = write_tiny_model(tiny_model.with_name("wide.safetensors"), sigmas_90=2.0)
    words = (*archive.words[:2], "--model", wider, "-o", archive.folder / "wide", "--uncertainty")
    assert [archive.uknowpan(*words, *more).code for more in ((), ("--coverage", 90))] == [0, 7]  # another identity
    ends = [line["status"] for line in lines(archive.folder / "out")]
    assert ends == ["done", "done", "skipped", "skipped", "failed", "done"]


def test_interrupted(archive: Archive, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM in the second scene: 130, its strips stay, the same command goes on with them."""
    for name in ("a", "b", "c"):
        archive.add(name, ms_shape=(24, 12))
    common = (*archive.words[:2], "--model", tiny_model, "--tile", 32, "-o")
    output, undisturbed = archive.folder / "out", archive.folder / "other"
    assert archive.uknowpan(*common, undisturbed).code == 0
    stopped = spawn(*common, output, before=STOPPING.format(strips=5, name="SIGTERM"))
    assert stopped.code == 130
    assert stopped.stderr.endswith("error: Interrupted after 1 of 3 scenes; the same command goes on from there.\n")
    assert len(list((output / "b_sharp.tif.part").glob("image-*.npy"))) == 2
    put, made = StripStore.put, []

    def counting(self: StripStore, index: int, rows: object) -> None:
        made.append((self.folder.name[0], index))
        put(self, index, rows)

    monkeypatch.setattr(StripStore, "put", counting)
    assert archive.uknowpan(*common, output).code == 0
    assert made == [("b", 2), ("c", 0), ("c", 1), ("c", 2)]
    assert pixels(output) == pixels(undisturbed)
    assert [line["status"] for line in lines(output)] == ["done", "skipped", "done", "done"]


def test_strips_of_other_options_are_dropped(archive: Archive, tiny_model: Path) -> None:
    archive.add("a", ms_shape=(24, 12))
    common = (*archive.words[:2], "--model", tiny_model, "--tile", 32)
    output, undisturbed = archive.folder / "out", archive.folder / "other"
    stop = STOPPING.format(strips=2, name="SIGKILL")
    assert spawn(*common, "-o", output, before=stop).code == -9
    outcome = archive.uknowpan(*common, "-o", output, "--max-value", 1500)
    assert outcome.code == 0
    assert re.search(r"WARNING: a: The strips in .*other max_value\. They are drop", outcome.stderr)
    assert archive.uknowpan(*common, "-o", undisturbed, "--max-value", 1500).code == 0
    assert pixels(output) == pixels(undisturbed)
    assert not (output / "a_sharp.tif.part").exists()


def test_dry_run(archive: Archive, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.add("a")
    archive.add("b")
    archive.rows[1]["output"] = "deep/down/b.tif"
    output = archive.folder / "new" / "out"
    manifest = archive.manifest()
    before = names(archive.folder)
    monkeypatch.setattr(StripStore, "__init__", None)
    words = ("batch", manifest, "--method", "gsa", "-o", output)
    outcome = archive.uknowpan(*words, "--dry-run")
    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout == (f"a: to do: {output}/a_sharp.tif\nb: to do: {output}/deep/down/b.tif\n")
    assert names(archive.folder) == before
    monkeypatch.undo()
    assert archive.uknowpan(*words, "--shard", "none").code == 0
    assert archive.uknowpan(*words, "--dry-run").stdout.count(": done already: ") == 2
    archive.rows.append(archive.rows[0] | {"id": "c", "ms": ["nowhere.tif"]})
    archive.manifest()
    outcome = archive.uknowpan(*words, "--dry-run")
    assert outcome.code == 7
    assert "c: cannot (3): " in outcome.stdout
    assert outcome.stderr.endswith("error: 1 of 3 scenes cannot be sharpened.\n")


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "-o names the folder for the results; it is missing"),
        (("-o", "out"), 2, "Give either a MANIFEST or a folder, or --pan-glob and --ms-glob"),
        (("m.csv", "-o", "out", "--pan-glob", "*"), 2, "Give either a MANIFEST"),
        (("-o", "out", "--pan-glob", "*_pan.tif"), 2, "Give either a MANIFEST"),
        (("-o", "out", "--pan-glob", "*_x.tif", "--ms-glob", "*_y.tif"), 3, "No scene matches"),
        (("none.csv", "-o", "out"), 3, "none.csv: No such file"),
        (("empty.csv", "-o", "out"), 3, "empty.csv names no scene"),
        (("header.csv", "-o", "out"), 3, "header.csv names no scene"),
        (("m.csv", "-o", "m.csv"), 3, "-o: m.csv is a file; name a folder"),
        (("m.csv", "-o", "out", "--shard", "3/2"), 2, "3/2 is no share"),
        (("m.csv", "-o", "out", "--model", "none"), 5, "no model 'none'"),
        (("m.csv", "-o", "out", "--method", "gsa", "--uncertainty"), 2, "gsa has none"),
        (("m.csv", "-o", "out", "--method", "gsa", "--steps", 2), 2, "exclude each other"),
        (("m.csv", "-o", "out", "--co", "X"), 2, "--co takes KEY=VALUE"),
        (("m.csv", "-o", "out", "--device", "tpu"), 2, "--device takes auto"),
        (("--report", "."), 3, r"holds no report of a batch \(report\*\.jsonl\)"),
    ],
)
def test_refusals(
    words: Sequence[object], code: int, says: str, uknowpan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence, before anything is made."""
    monkeypatch.chdir(tmp_path)
    Path("m.csv").write_text("pan,ms\np.tif,m.tif\n")
    Path("empty.csv").write_text(" \n")
    Path("header.csv").write_text("pan,ms\n")
    before = names(tmp_path)
    outcome = uknowpan("batch", *words)
    outcome.fails(code, says)
    assert names(tmp_path) == before


def test_shard_without_scenes(archive: Archive) -> None:
    archive.add("a")
    k = 1 if Shard(2, 2).share(["a"]) else 2
    outcome = archive.run(archive.folder / "out", "--shard", f"{k}/2")
    assert (outcome.code, outcome.stdout) == (0, "")
    assert f"none of the 1 scenes is in shard {k}-of-2" in outcome.stderr


def test_scene_without_a_command(archive: Archive) -> None:
    """As in other processes: plain values in, plain values out."""
    pair = archive.add("a")
    output = archive.folder / "out"
    settings = batch_run.BatchSettings(SharpenOptions(method="gsa"), str(output))
    scene = Scene("a", pair.pan, tuple(pair.ms), f"{output}/a.tif", f"{output}/s.tif")
    scene, settings = pickle.loads(pickle.dumps((scene, settings)))
    outcomes = [pickle.loads(pickle.dumps(batch_run.run_scene(scene, settings))) for _ in range(2)]
    assert [outcome.status for outcome in outcomes] == ["done", "skipped"]
    outcome = batch_run.run_scene(replace(scene, pan="nowhere"), settings, attempt=2)
    assert (outcome.status, outcome.code, outcome.attempts) == ("failed", 3, 2)
    wrong = replace(settings, options=SharpenOptions(model="none"))
    assert batch_run.run_scene(scene, wrong).code == 5


def test_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from uknowpan.commands.batch import _own_device

    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert _own_device("auto") == "auto"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (_own_device("auto"), _own_device("cpu")) == ("cuda:1", "cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert _own_device("auto") == "auto"


def test_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "report.jsonl"
    entry = {"id": "a", "status": "failed", "finished": "1"}
    append_line(path, entry)
    append_line(path, {**entry, "id": "b"})
    path.write_bytes(path.read_bytes()[:-9])
    assert [scene["id"] for scene in merged_report(tmp_path).scenes] == ["a"]
    append_line(path, {**entry, "id": "c", "seconds": float("nan")})
    append_line(path, {**entry, "id": "a", "status": "done", "finished": "2"})
    merged = merged_report(tmp_path)
    assert [(scene["id"], scene["status"]) for scene in merged.scenes] == [("a", "done"), ("c", "failed")]
    assert path.read_bytes().count(b"\n") == 4


def test_reports_of_all_shards(uknowpan: Run, tmp_path: Path) -> None:
    """The line written last counts, in whichever file it is."""
    for name, status, when, file in (
        *(("a", "failed", "3", "report-2-of-2"), ("b", "done", "1", "report-1-of-2")),
        *(("a", "done", "2", "report-1-of-2"), ("b", "failed", "0", "report")),
    ):
        append_line(
            tmp_path / f"{file}.jsonl",
            {"id": name, "status": status, "finished": when, "code": 3, "attempts": 2,
             "message": "The end.", "seconds": 2.0, "megapixels": 5.0, "peak_mb": 7.0},
        )  # fmt: skip
    outcome = uknowpan("batch", "--report", tmp_path)
    assert (outcome.code, outcome.stderr) == (7, "")
    assert outcome.stdout.splitlines() == [
        "scenes  2: 1 done, 0 skipped, 1 failed",
        "pixels  5 Mpx in 2.0 s, 2.5 Mpx/s",
        "memory  at most 7 MB",
        "",
        "failed  code  attempts  message",
        "a          3         2  The end.",
    ]
