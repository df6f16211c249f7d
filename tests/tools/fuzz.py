"""Runs commands on mutated inputs of all kinds.

    python fuzz.py FOLDER TRIALS [SEED [FIRST]]

PYTHONPATH names the folders of rasters.py and patch_files.py. Each trial, from number FIRST on, is a child that is
forked, so that libraries load once. Faults are an exit code that no document names, exit code 1, a signal, a traceback,
20 s of a core, 120 s by the clock, and 2 GB in memory. Prints one JSON line per fault, then a summary.
"""

import csv
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import rasterio
from forking import end_with, loaded
from patch_files import TINY_NETWORKS, guided_config, write_teacher
from rasters import write_pair, write_vrt
from running import write_tiny_model
from testfiles import write_images

from uknowpan import sharpening
from uknowpan.models.training.loop import _Run

SECONDS, CLOCK, BYTES, WALL = 20, 120, 2 * 10**9, 8 * 10**9
"""Seconds of a core, and by the clock; bytes in memory, and bytes of addresses, which protect the machine."""
KNOWN = {0, 2, 3, 4, 5, 6, 7, 130}
VALUES = [
    None,
    True,
    "",
    "x",
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**30,
    -1e308,
    1e308,
    0.5,
    float("nan"),
    float("inf"),
    [],
    {},
]
VALUES += [[1, 2], {"a": 1}, "a/b", "../x", "\0", "\ud800", "é" * 300, "9" * 5000, [[]] * 3]


@dataclass(frozen=True)
class Kind:
    """A kind of input: the file that is mutated, how, and the command that reads it. F stands for the folder."""

    file: str
    mutate: Callable[[bytes, random.Random], bytes]
    words: str


def bytes_of(data: bytes, chance: random.Random) -> bytes:
    """A few bytes flipped, zeroed, cut, doubled or replaced by extreme numbers."""
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        # Headers decide more than pixels do.
        at = chance.randrange(min(len(out), chance.choice([16, 512, 4096, 10**9]))) if out else 0
        how = chance.randrange(6)
        if how == 0 and out:
            out[at] ^= 1 << chance.randrange(8)
        elif how == 1:
            out[at : at + 4] = chance.choice([b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x40"])
        elif how == 2:
            del out[at:]
        elif how == 3:
            out[at : at + 64] = bytes(len(out[at : at + 64]))
        elif how == 4:
            out[at:at] = out[at : at + chance.randrange(1, 200)]
        else:
            del out[at : at + chance.randrange(1, 40)]
    return bytes(out)


def altered(value: object, chance: random.Random) -> object:
    """A JSON value with one part replaced, removed or nested deeply."""
    if isinstance(value, dict | list) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(list(keys))
        out = value.copy()
        if chance.random() < 0.15:
            del out[key]  # type: ignore[arg-type]
        else:
            out[key] = altered(value[key], chance)  # type: ignore[index]
        return out
    return chance.choice(VALUES)


def json_of(data: bytes, chance: random.Random) -> bytes:
    """The last line of JSON with a value replaced, nested too deeply, or with bytes of it mutated."""
    *first, last = data.rstrip(b"\n").split(b"\n") if b"\n{" in data else [data]
    drawn = chance.random()
    if drawn < 0.1:
        last = b"[" * 100_000
    elif drawn < 0.2:
        last = bytes_of(last, chance)
    else:
        last = json.dumps(altered(json.loads(last), chance)).encode()
    return b"\n".join([*first, last, b""])


def card_of(data: bytes, chance: random.Random) -> bytes:
    """A checkpoint whose card, or header, is altered."""
    if chance.random() < 0.3:
        return bytes_of(data, chance)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    if chance.random() < 0.8:
        card = json.loads(header["__metadata__"]["card"])
        if chance.random() < 0.4:
            card["config"] = altered(card["config"], chance)
        else:
            card = altered(card, chance)
        header["__metadata__"]["card"] = "{" * 50_000 if chance.random() < 0.05 else json.dumps(card)
    else:
        header = altered(header, chance)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def table_of(data: bytes, chance: random.Random) -> bytes:
    """A CSV with a cell replaced."""
    if chance.random() < 0.3:
        return bytes_of(data, chance)
    rows = list(csv.reader(io.StringIO(data.decode())))
    row = chance.choice(rows)
    row[chance.randrange(len(row))] = str(chance.choice(VALUES)).encode("utf-8", "replace").decode()
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode()


def toml_of(data: bytes, chance: random.Random) -> bytes:
    """A TOML with a value replaced."""
    if chance.random() < 0.3:
        return bytes_of(data, chance)
    lines = data.decode().split("\n")
    at = chance.choice([i for i, line in enumerate(lines) if "=" in line])
    words = ["-1", "0", "1e400", "nan", "99999999", "2147483647", "'x'", "[]", "[1, 2]", "{a = 1}", "true", "0.5"]
    lines[at] = lines[at].partition("=")[0] + "= " + chance.choice([*words, "[" * 5000])
    return "\n".join(lines).encode()


def h5_of(data: bytes, chance: random.Random) -> bytes:
    """An HDF5 file with a dataset or an attribute of another type, shape or size."""
    if chance.random() < 0.4:
        return bytes_of(data, chance)
    memory = io.BytesIO(data)
    with h5py.File(memory, "r+") as file:
        nodes: list[h5py.Group | h5py.Dataset] = [file]
        file.visititems(lambda _, node: nodes.append(node))
        node = chance.choice([node for node in nodes if node is not file or node.attrs])
        if node.attrs and chance.random() < 0.5:
            value = chance.choice([-1, 0, 1e308, float("nan"), "x", b"\xff", np.zeros((2, 2)), h5py.Empty("f"), 2**62])
            node.attrs[chance.choice(list(node.attrs))] = value
        elif isinstance(node, h5py.Dataset):
            name, shape = node.name, list(node.shape)
            del file[name]
            how = chance.randrange(5)
            if how == 0:
                file.create_group(name)
            elif how == 1:
                shape[chance.randrange(len(shape))] = chance.choice([0, 1, 3, 10**6, 10**12])
                chunks = tuple(min(n, 16) for n in shape) if all(shape) else None
                file.create_dataset(name, shape, chance.choice(["f4", "u2"]), chunks=chunks)
            elif how == 2:
                file.create_dataset(name, shape, chance.choice(["S5", "c8", "i8", "f8", h5py.string_dtype()]))
            elif how == 3:
                file[name] = np.full(shape, chance.choice([np.nan, np.inf, 1e38]), "f4")
            else:
                file[name] = np.zeros(shape[: chance.randrange(len(shape))])
        elif node is not file:
            del file[node.name]
    return memory.getvalue()


SHARPEN = "sharpen F/a_pan.tif F/a_ms.tif -o F/o.tif --coregister off -j 1 -q --tile 64"
BATCH = "batch {} -o F/out --method bicubic --coregister off -j 1 -q --shard none"
TRAIN = "train --data F/{} --out F/{} --config F/t.toml -q -j 1 --device cpu"
STUDENT = TRAIN.format("train.h5", "new").replace("t.toml", "u.toml") + " --max-value 2047 --valid F/valid.h5"
DISTILL = "distill-cache --teacher F/teacher.safetensors --data F/train.h5 -o F/{} -q -j 1 --max-value 2047"
JUDGE = "evaluate F/out/a_sharp.tif --pan F/a_pan.tif --ms F/a_ms.tif --reprojection -j 1 -q"
KINDS = {
    "pan": Kind("a_pan.tif", bytes_of, f"{SHARPEN} --method brovey"),
    "ms": Kind("a_ms.tif", bytes_of, f"{SHARPEN} --method gsa --preview F/p.png"),
    "vrt": Kind("a.vrt", bytes_of, "info F/a_pan.tif F/a.vrt -j 1"),
    "card": Kind("m.safetensors", card_of, f"{SHARPEN} --model F/m.safetensors"),
    "shown card": Kind("m.safetensors", card_of, "models verify F/m.safetensors"),
    "state": Kind("r.tif.part/state.json", json_of, f"{SHARPEN.replace('o.tif', 'r.tif')} --method brovey --resume"),
    "survey": Kind("r.tif.part/survey.json", bytes_of, f"{SHARPEN.replace('o.tif', 'r.tif')} --method brovey --resume"),
    "strip": Kind(
        "r.tif.part/image-000000.npy", bytes_of, f"{SHARPEN.replace('o.tif', 'r.tif')} --method brovey --resume"
    ),
    "manifest": Kind("m.csv", table_of, BATCH.format("F/m.csv")),
    "lines": Kind("m.jsonl", json_of, BATCH.format("F/m.jsonl")),
    "sidecar": Kind("out/a_sharp.tif.json", json_of, BATCH.format("F/m.csv")),
    "output": Kind("out/a_sharp.tif", bytes_of, BATCH.format("F/m.csv")),
    "report": Kind("out/report.jsonl", json_of, "batch --report F/out"),
    "recipe": Kind("s.csv", table_of, "pack F/s.csv --root F -o F/p.h5"),
    "scenes": Kind("s.h5", h5_of, TRAIN.format("s.h5", "new")),
    "patches": Kind("e.h5", h5_of, "evaluate F/e.h5 --method gsa -j 1 -q --sensor WV3 --cut 0"),
    "config": Kind("t.toml", toml_of, TRAIN.format("s.h5", "new") + " --dry-run"),
    "run config": Kind("run/config.json", json_of, TRAIN.format("s.h5", "run") + " --resume"),
    "run log": Kind("run/log.jsonl", json_of, TRAIN.format("s.h5", "run") + " --resume"),
    "run state": Kind("run/state.pt", bytes_of, TRAIN.format("s.h5", "run") + " --resume"),
    "zip": Kind("a.zip", bytes_of, SHARPEN.replace("F/a_ms", "/vsizip/F/a.zip/a_ms") + " --method brovey"),
    "mask": Kind("a_ms.tif.msk", bytes_of, f"{SHARPEN} --method brovey --valid any"),
    "statistics": Kind("a_ms.tif.aux.xml", bytes_of, f"{SHARPEN} --method brovey"),
    "displaced": Kind("a_ms.tif", bytes_of, "info F/a_pan.tif F/a_ms.tif -j 1 --displacement F/d.tif"),
    "compared": Kind(
        "a_pan.tif", bytes_of, "compare F/a_pan.tif F/a_ms.tif -o F/c.html -j 1 -q -m F/m.safetensors --coregister off"
    ),
    "judged": Kind("out/a_sharp.tif", bytes_of, JUDGE),
    "simulated": Kind("a_ms.tif", bytes_of, "simulate F/a_pan.tif F/a_ms.tif -o F/x.h5 --patch 16 -q"),
    "patches to train": Kind("train.h5", h5_of, STUDENT),
    "cache": Kind("cache.h5", h5_of, f"{STUDENT} --cache F/cache.h5"),
    "part": Kind(".half.h5.part", h5_of, DISTILL.format("half.h5") + " --resume"),
    "teacher": Kind("teacher.safetensors", card_of, DISTILL.format("new.h5")),
    "start": Kind("run/last.safetensors", card_of, TRAIN.format("s.h5", "run") + " --resume"),
}
MASK = {"driver": "GTiff", "width": 32, "height": 32, "count": 1, "dtype": "uint8"}
TOML = "[train]\niterations = 2\nbatch_size = 1\nwarmup = 1\namp = false\nvalidate_every = 1\ncheckpoint_every = 1\n"


def prepare(folder: Path) -> None:
    """Good inputs of all kinds, and what runs leave that were stopped half-way."""
    write_tiny_model(folder / "m.safetensors")
    pair = write_pair(folder, name="a", ms_shape=(32, 32), noise=30, compress="deflate")
    shutil.copy(pair.ms[0], folder / "b_ms.tif")
    write_vrt(folder / "a.vrt", f"{folder}/b_ms.tif")
    (folder / "m.csv").write_text("pan,ms,id,output\na_pan.tif,a_ms.tif,a,\n")
    (folder / "m.jsonl").write_text('{"pan": "a_pan.tif", "ms": ["a_ms.tif,band=1", "a_ms.tif,band=2"], "id": "b"}\n')
    header = "name,kind,pan,ms,sensor,licence,split,weight,nodata\n"
    (folder / "s.csv").write_text(f"{header}a,pair,a_pan.tif,a_ms.tif,s,l,train,1,\nb,ms,,a_ms.tif,s,l,valid,2,0\n")
    rng = np.random.default_rng(2)
    with h5py.File(folder / "s.h5", "w") as file:
        for split in ("train", "valid"):
            gt = rng.uniform(100, 900, (4, 18, 18)).repeat(4, 1).repeat(4, 2)
            group = file.create_group(f"scene-{split}")
            group.attrs.update(sensor="made up", licence="none", split=split, weight=1.0)
            group.create_dataset("gt", data=gt.astype("uint16"), compression="gzip")
            group.create_dataset("pan", data=gt.mean(0, keepdims=True).astype("float32"))
    write_images(folder / "e.h5", count=1, size=32, max_value=2047.0)
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(pair.ms[0], "a_ms.tif")
    with rasterio.open(folder / "a_ms.tif.msk", "w", **MASK) as mask:
        mask.write(np.full((1, 32, 32), 255, "u1"))
        mask.update_tags(INTERNAL_MASK_FLAGS_1="2")
    statistics = "".join(f'<MDI key="STATISTICS_{name}">1</MDI>' for name in ("MAXIMUM", "MEAN", "MINIMUM", "STDDEV"))
    (folder / "a_ms.tif.aux.xml").write_text(
        f'<PAMDataset><PAMRasterBand band="1"><NoDataValue>0</NoDataValue><Metadata>{statistics}</Metadata>'
        "</PAMRasterBand></PAMDataset>"
    )
    write_images(folder / "train.h5", count=3, size=32, max_value=2047.0)
    write_images(folder / "valid.h5", count=1, size=32, max_value=2047.0)
    write_teacher(folder / "teacher.safetensors", guided_config(patch=2))
    succeed(DISTILL.format("cache.h5"), folder)
    shutil.copy(folder / "cache.h5", folder / ".half.h5.part")
    with h5py.File(folder / ".half.h5.part", "r+") as file:
        file.attrs.modify("done", np.int64(1))
    (folder / "t.toml").write_text(TOML + "[network]\nwidth = 4\ndeep_width = 4\nblocks = 1\ndeep_blocks = 1\n")
    (folder / "u.toml").write_text(TOML + TINY_NETWORKS["fsa-s"])
    assert forked(TRAIN.format("s.h5", "run"), folder, stopped=True)[0] == 3, (folder / "stderr").read_text()
    succeed(BATCH.format("F/m.csv"), folder)
    assert forked(f"{SHARPEN.replace('o.tif', 'r.tif')} --method brovey", folder, stopped=True)[0] == 3


def succeed(words: str, folder: Path) -> None:
    assert forked(words, folder)[0] == 0, (folder / "stderr").read_text()


def stop(*_: object) -> None:
    raise OSError("stopped")


def stop_half_way() -> None:
    """Let this child stop before a scene is assembled from its strips, and after the first state of a run."""
    saved = _Run.save_state
    sharpening._assemble = stop
    _Run.save_state = lambda run: stop(saved(run))


def forked(words: str, folder: Path, stopped: bool = False) -> tuple[int, float, int]:
    """Exit code, or minus a signal, seconds of a core, and bytes of memory of a command in a child."""
    child = os.fork()
    if child == 0:
        try:
            streams = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(streams, 2)
            resource.setrlimit(resource.RLIMIT_AS, (WALL, WALL))
            resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            signal.alarm(CLOCK)
            if stopped:
                stop_half_way()
            end_with([str(folder) if word == "F" else word.replace("F/", f"{folder}/") for word in words.split()])
        finally:
            os._exit(1)
    _, status, used = os.wait4(child, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def fresh(good: Path, work: Path) -> Path:
    """A copy of the good inputs, in place of the last one."""
    shutil.rmtree(work, ignore_errors=True)
    return Path(shutil.copytree(good, work))


def main(folder: Path, trials: int, seed: int = 0, first: int = 0) -> int:
    loaded()
    good, work = folder / "good", folder / "work"
    work.mkdir()
    prepare(work)
    shutil.copytree(work, good)
    for kind in KINDS.values():  # a command that fails without a mutation would show nothing
        succeed(kind.words, fresh(good, work))
    faults, codes = 0, Counter[int]()
    names = list(KINDS)
    most = (0.0, 0)
    for trial in range(first, first + trials):
        name = names[trial % len(names)]
        kind, chance = KINDS[name], random.Random(f"{seed} {trial}")
        target = fresh(good, work) / kind.file
        target.write_bytes(kind.mutate(target.read_bytes(), chance))
        code, seconds, size = forked(kind.words, work)
        codes[code] += 1
        most = max(most[0], seconds), max(most[1], size)
        error = (work / "stderr").read_text(errors="replace")
        if code not in KNOWN or "Traceback" in error or "internal error" in error or size > BYTES:
            faults += 1
            kept = folder / f"fault-{trial}"
            kept.mkdir()
            shutil.copy(target, kept)
            print(json.dumps([trial, name, code, round(seconds, 1), size, error[-600:]]), flush=True)
    ended = {str(k): n for k, n in sorted(codes.items())}
    print(json.dumps({"trials": trials, "faults": faults, "codes": ended, "seconds": most[0], "bytes": most[1]}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(int, sys.argv[2:])))
