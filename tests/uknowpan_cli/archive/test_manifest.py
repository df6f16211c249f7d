"""The scenes of a batch: manifests, patterns, outputs, shards."""

import io
import logging
import os
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasters import write_raster, write_vrt

from uknowpan.archive.manifest import Entry, Scene, Shard, by_patterns, choose_shard, read_manifest, scenes_of
from uknowpan.errors import UsageError


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages, as they are logged."""
    texts: list[str] = []
    log = logging.getLogger("uknowpan")
    listener = logging.Handler()
    monkeypatch.setattr(listener, "emit", lambda record: texts.append(record.getMessage()))
    for name, value in {"handlers": [listener], "propagate": False, "level": logging.INFO, "_cache": {}}.items():
        monkeypatch.setattr(log, name, value)
    return texts


def written(folder: Path, text: str | bytes) -> str:
    path = folder / "manifest"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def refused(text: str, work: Callable[..., object], *arguments: object, **options: object) -> None:
    """A usage error of one line that holds a pattern."""
    with pytest.raises(UsageError, match=text) as failure:
        work(*arguments, **options)
    assert failure.value.exit_code == 2
    assert "\n" not in str(failure.value)


def touched(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_csv(tmp_path: Path) -> None:
    """Columns in any order and case, blank lines, quotes, a byte order mark, files elsewhere."""
    text = (
        '\ufeffID, ms ,PAN,output,cloud\n\n7,m1.tif; m2.tif,"a,b_pan.tif",,0.1\n'
        ',/vsis3/bucket/m.tif,/abs/p.tif,2024/x.tif,\n,"sub/m.tif,band=2",q.tif\n'
    )
    first, second, third = read_manifest(written(tmp_path, text))
    assert first == Entry(f"{tmp_path}/a,b_pan.tif", (f"{tmp_path}/m1.tif", f"{tmp_path}/m2.tif"), "a_b_pan", "7")
    assert second == Entry("/abs/p.tif", ("/vsis3/bucket/m.tif",), "p", None, "2024/x.tif")
    assert third == Entry(f"{tmp_path}/q.tif", (f"{tmp_path}/sub/m.tif,band=2",), "q")


def test_json_lines(tmp_path: Path) -> None:
    text = '{"pan": "p.tif", "ms": ["a;1.tif", "b.tif"], "id": 5}\n\n{"ms": "m.tif", "pan": "q.tif"}'
    first, second = read_manifest(written(tmp_path, text))
    assert (first.id, first.ms) == ("5", (f"{tmp_path}/a;1.tif", f"{tmp_path}/b.tif"))
    assert second == Entry(f"{tmp_path}/q.tif", (f"{tmp_path}/m.tif",), "q")


@pytest.mark.parametrize("text", ["pan,ms\np.tif,m.tif\n", '{"pan": "p.tif", "ms": "m.tif"}'])
def test_stdin(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    (entry,) = read_manifest("-")
    assert (entry.pan, entry.ms) == (f"{tmp_path}/p.tif", (f"{tmp_path}/m.tif",))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pan,id\np,1\n", r"no column 'ms' in its first line \(pan, id\)"),
        ("pan;ms\np;m\n", r"no column 'pan' in its first line \(pan;ms\)"),
        ("p.tif,m.tif\n", "no column 'pan'"),
        ("pan,ms,ms\n", "the column 'ms' more than once"),
        ("pan,ms\np,m,x\n", "line 2: 3 cells, but 2 columns"),
        ('pan,ms\n"p,m\n', "line 2: no CSV"),
        ("pan,ms\n,m\n", "line 2 has no pan or no ms; --skip-missing goes on"),
        ("pan,ms\np,\np\n,m\n,n\n", r"4 scenes have no pan .*line 2, .*line 4 and 1 more; --skip"),
        ("pan,ms,id\np,m,a\tb\n", r"line 2: the id 'a\\tb' holds what cannot be printed"),
        ('[{"pan": "p"}]', "is a JSON list; write one object per line"),
        ('{"pan": "p"\n', "line 1: no JSON"),
        ('{"pan": "p", "ms": "m"}\n7\n', "line 2: no JSON object"),
        ('{"pan": "p", "ms": 3}', "line 1: ms must be text, not 3"),
        ('{"pan": "p", "ms": ["m", null, 3]}', "line 1: ms must be text, not 3"),
        ('{"pan": "p", "ms": "m", "id": true}', "line 1: id must be text, not True"),
        (b"pan,ms\n\xff\xfe,m\n", "is no UTF-8 text"),
    ],
)
def test_bad_manifests(text: str | bytes, says: str, tmp_path: Path) -> None:
    refused(says, read_manifest, written(tmp_path, text))


def test_incomplete_rows_may_be_left_out(tmp_path: Path, messages: list[str]) -> None:
    entries = read_manifest(written(tmp_path, "pan,ms\np,m\nq,\n"), skip_missing=True)
    assert [entry.key for entry in entries] == ["p"]
    (message,) = messages
    assert re.fullmatch(r"left out: .*line 3 has no pan or no ms", message)


def keys(folder: Path, pan: str, ms: str, **options: bool) -> dict[str, list[str]]:
    entries = by_patterns(f"{folder}/{pan}", f"{folder}/{ms}", **options)
    assert all(entry.pan.startswith(str(folder)) for entry in entries)
    return {entry.key: [str(Path(m).relative_to(folder)) for m in entry.ms] for entry in entries}


def test_star_is_the_key(tmp_path: Path) -> None:
    touched(tmp_path, "a_pan.tif", "a_ms.tif", "b.1_pan.tif", "b.1_ms.tif", "notes.txt")
    assert keys(tmp_path, "*_pan.tif", "*_ms.tif") == {"a": ["a_ms.tif"], "b.1": ["b.1_ms.tif"]}


def test_bands_in_files_of_their_own(tmp_path: Path) -> None:
    names = [f"{s}_B{b}.tif" for s in ("x", "y_B2") for b in (8, 4, 3, 2, 9)]
    touched(tmp_path, *names)
    assert keys(tmp_path, "*_B8.tif", "*_B[!89].tif") == {
        "x": ["x_B2.tif", "x_B3.tif", "x_B4.tif"],
        "y_B2": ["y_B2_B2.tif", "y_B2_B3.tif", "y_B2_B4.tif"],
    }


def test_folders(tmp_path: Path) -> None:
    """`**` tells scenes of one name apart, and may stand for no folder."""
    touched(tmp_path, "pan/2024/a.tif", "ms/2024/a.tif", "pan/a.tif", "ms/a.tif")
    touched(tmp_path, "pan/2024/07/a.tif", "ms/2024/07/a.tif")
    assert keys(tmp_path, "pan/**/*.tif", "ms/**/*.tif") == {
        "a": ["ms/a.tif"],
        "2024_a": ["ms/2024/a.tif"],
        "2024_07_a": ["ms/2024/07/a.tif"],
    }
    assert keys(tmp_path, "pan/*/*.tif", "ms//*/*.tif") == {"2024_a": ["ms/2024/a.tif"]}


def test_scenes_without_partner(tmp_path: Path) -> None:
    touched(tmp_path, "a_pan.tif", "a_ms.tif", "b_pan.tif", "c_ms.tif")
    patterns = (f"{tmp_path}/*_pan.tif", f"{tmp_path}/*_ms.tif")
    text = f"2 scenes have no partner: {tmp_path}/b_pan.tif, {tmp_path}/c_ms.tif; --skip-missing goes on without."
    refused(f"^{re.escape(text)}$", by_patterns, *patterns)
    assert keys(tmp_path, "*_pan.tif", "*_ms.tif", skip_missing=True) == {"a": ["a_ms.tif"]}


@pytest.mark.parametrize(
    ("pan", "ms", "says"),
    [
        ("a_pan.tif", "a_ms.tif", r"must have equally many \*, at least one"),
        ("*_pan.tif", "*_ms_*.tif", r"equally many \*.*\? and \[\.\.\.\] match"),
        ("*_pa?.tif", "*_ms.tif", "several PANs for one scene: .*a_pam.tif and .*a_pan.tif"),
    ],
)
def test_bad_patterns(pan: str, ms: str, says: str, tmp_path: Path) -> None:
    touched(tmp_path, "a_pan.tif", "a_pam.tif", "a_ms.tif")
    refused(says, by_patterns, f"{tmp_path}/{pan}", f"{tmp_path}/{ms}")


def test_outputs(tmp_path: Path) -> None:
    entries = [
        Entry("/in/p", ("/in/m",), "a"),
        Entry("/in/q", ("/in/m",), "k", id="../b c"),
        Entry("/in/r", ("/in/m",), "d", output="2024/d.tif"),
    ]
    scenes = scenes_of(entries, tmp_path, "_ps")
    assert scenes[0] == Scene("a", "/in/p", ("/in/m",), f"{tmp_path}/a_ps.tif", f"{tmp_path}/a_sigma.tif")
    assert (scenes[1].id, scenes[1].output) == ("../b c", f"{tmp_path}/_b_c_ps.tif")
    assert scenes[2].output == f"{tmp_path}/2024/d.tif"
    assert scenes[2].sigma == f"{tmp_path}/2024/d_sigma.tif"


@pytest.mark.parametrize(
    ("entries", "suffix", "says"),
    [
        ([Entry("/x/p", ("m",), "p"), Entry("/y/p", ("m",), "p")], "", r"one id: p \(/x/p and /y"),
        ([Entry("p", ("m",), "p", "a/b"), Entry("q", ("m",), "q", "a_b")], "", "share one output"),
        ([Entry("p", ("m",), "p"), Entry("q", ("m",), "q", None, "p_s.tif")], "_s", "one output"),
        ([Entry("p", ("m",), "p")], "_sigma", "share one output"),
        ([Entry("p", ("m",), "p", None, "../../x.tif")], "", "leaves .*; give its full path"),
        ([Entry("p", ("m",), "p", None, "link.tif"), Entry("victim", ("m",), "q")], "", "is the input .*victim"),
        ([Entry("p", ("OUT/q.tif,band=1",), "q")], "", "output of scene q is the input .*q.tif"),
    ],
)
def test_clashes(entries: list[Entry], suffix: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "link.tif").symlink_to("victim")
    here = str(tmp_path)
    entries = [
        Entry(e.pan.replace("victim", f"{here}/victim"), (e.ms[0].replace("OUT", here),), e.key, e.id, e.output)
        for e in entries
    ]
    refused(says, scenes_of, entries, tmp_path, suffix, uncertainty=True)


@pytest.mark.parametrize("kind", ["vrt", "zip", "mask"])
def test_outputs_that_other_scenes_are_read_from(kind: str, tmp_path: Path) -> None:
    """Kind: `--overwrite` destroys a file behind the input of another scene."""
    victim = tmp_path / "out" / "a_sharp.tif"
    victim.parent.mkdir()
    write_raster(victim, np.ones((1, 8, 8), "uint16"), Affine.scale(2, -2))
    if kind == "vrt":
        ms = write_vrt(tmp_path / "b.vrt", write_vrt(tmp_path / "inner.xml", str(victim)))
    elif kind == "zip":
        with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
            archive.write(victim, "ms.tif")
        os.replace(tmp_path / "z.zip", victim)
        ms = f"/vsizip/{{{victim}}}/ms.tif"
    else:
        ms = write_raster(tmp_path / "ms.tif", np.ones((1, 8, 8), "uint16"), Affine.scale(2, -2))
        os.replace(victim, f"{ms}.msk")
        victim.symlink_to(f"{ms}.msk")
    entries = [Entry("p", ("m",), "a"), Entry("q", (f"{ms},band=1",), "b")]
    refused("output of scene a is .*a part of the input .*name another folder", scenes_of, entries, victim.parent)


IDS = st.lists(st.text(max_size=12), unique=True, max_size=40)


def slurm(k: int, count: int, low: int, step: int) -> dict[str, str]:
    values = {"ID": low + k * step, "MIN": low, "MAX": low + (count - 1) * step, "STEP": step}
    return {f"SLURM_ARRAY_TASK_{key}": str(v) for key, v in (values | {"COUNT": count}).items()}


def environment(scheduler: str, k: int, count: int, low: int = 0, step: int = 1) -> dict[str, str]:
    """The variables of process k (from 0) of several."""
    if scheduler == "slurm":
        return slurm(k, count, low, step)
    if scheduler == "slurm without count":
        return {n: v for n, v in slurm(k, count, low, step).items() if not n.endswith("COUNT")}
    index, size = {
        "aws": ("AWS_BATCH_JOB_ARRAY_INDEX", "AWS_BATCH_JOB_ARRAY_SIZE"),
        "kubernetes": ("JOB_COMPLETION_INDEX", "UKNOWPAN_SHARDS"),
        "torchrun": ("RANK", "WORLD_SIZE"),
    }[scheduler]
    return {index: str(k), size: str(count)}


SCHEDULERS = ["slurm", "slurm without count", "aws", "kubernetes", "torchrun"]


@given(
    ids=IDS,
    scheduler=st.sampled_from([*SCHEDULERS, "--shard"]),
    count=st.integers(1, 30),
    low=st.integers(0, 50),
    step=st.integers(1, 7),
)
def test_every_scene_is_in_one_shard(ids: list[str], scheduler: str, count: int, low: int, step: int) -> None:
    if scheduler == "--shard":
        shards = [choose_shard(f"{k}/{count}", {"RANK": "x"}) for k in range(1, count + 1)]
    else:
        shards = [choose_shard("auto", environment(scheduler, k, count, low, step)) for k in range(count)]
    assert [(shard.index, shard.count) for shard in shards] == [(k, count) for k in range(1, count + 1)]
    shares = [shard.share(ids) for shard in shards]
    assert sorted(name for share in shares for name in share) == sorted(ids)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    names = {shard.suffix for shard in shards}
    assert names == ({""} if count == 1 else {f"-{k}-of-{count}" for k in range(1, count + 1)})


def test_shards_stay_what_they_are() -> None:
    """A shard that starts tomorrow, with another version, must agree with today's."""
    scenes = [f"scene{i}" for i in range(12)]
    assert [[s for s in scenes if s in Shard(k, 3).share(scenes)] for k in (1, 2, 3)] == [
        ["scene1", "scene3", "scene5", "scene8"],
        ["scene4", "scene6", "scene7", "scene11"],
        ["scene0", "scene2", "scene9", "scene10"],
    ]


@pytest.mark.parametrize(
    ("text", "variables", "says"),
    [
        ("0/3", {}, "0/3 is no share; K of K/N goes from 1 to N"),
        ("4/3", {}, "4/3 is no share"),
        ("1/0", {}, "1/0 is no share"),
        ("2", {}, "--shard takes K/N, auto or none, not '2'"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3"}, "is set, but not SLURM_ARRAY_TASK_COUNT"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "x"}, "is 'x', not a whole number"),
        ("auto", slurm(1, 4, 1, 2) | {"SLURM_ARRAY_TASK_ID": "4"}, "no range of 4 numbers"),
        ("auto", slurm(0, 3, 1, 1) | {"SLURM_ARRAY_TASK_MAX": "9"}, "no range of 3 numbers"),
        ("auto", slurm(0, 3, 1, 1) | {"SLURM_ARRAY_TASK_ID": "4"}, "is no share"),
        ("auto", {"AWS_BATCH_JOB_ARRAY_INDEX": "0"}, "but not AWS_BATCH_JOB_ARRAY_SIZE"),
        ("auto", environment("aws", 5, 5), r"5 \(from 0\) of AWS_BATCH_JOB_ARRAY_SIZE=5 is no"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "is set, but not UKNOWPAN_SHARDS"),
        ("auto", {"RANK": "0"}, "RANK is set, but not WORLD_SIZE: give --shard K/N"),
        ("auto", {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is '-1', not a whole number"),
    ],
)
def test_bad_shards(text: str, variables: Mapping[str, str], says: str) -> None:
    refused(says, choose_shard, text, variables)


def test_who_wins(messages: list[str]) -> None:
    both = environment("torchrun", 3, 4) | environment("slurm", 1, 5)
    shard = choose_shard("auto", both)
    assert (shard.index, shard.count) == (2, 5)
    assert messages == ["shard 2 of 5, from SLURM_ARRAY_TASK_ID; RANK is not used"]
    for words, variables in (("none", both), ("auto", {}), ("auto", {"RANK": "", "UKNOWPAN_SHARDS": "3"})):
        shard = choose_shard(words, variables)
        assert (shard.index, shard.count) == (1, 1)
