"""Kills commands at random moments, or cuts their power, and runs them again.

    python crashes.py FOLDER KILLS CUTS [LIBRARY]

PYTHONPATH names the folders of rasters.py and running.py.

Each trial is a child that is forked, so that libraries load once. A power cut is a kill after which the folder of
the outputs is what a disk is sure to hold: synced contents under the names of some moment since the last sync of
their folder; other files are empty, cut off or zeros. Prints one JSON line per fault, then the number of trials.
"""

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import rasterio
from forking import end_with, loaded
from rasters import write_pair
from running import write_tiny_model

KEPT = {"report.jsonl", "log.jsonl", "state.pt"}
"""Files that commands keep beside their outputs and folders' JSON."""

Command = tuple[str, list[str], set[str]]
"""Name, arguments with OUT for the folder, names of the outputs."""


def run(words: list[str], library: str | None = None, log: Path | None = None, at: int = -1, after: float = 0) -> int:
    """The exit code of a command in a child; -9: killed at an event or after so many seconds."""
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(str(log or os.devnull) + ".txt" if log else os.devnull, os.O_WRONLY | os.O_CREAT), 2)
        if library is not None:
            folder = next(str(Path(word)) for word in words if "/out" in word)
            root = folder[: folder.index("/out") + 4]
            ctypes.CDLL(library).powercut_begin(root.encode(), str(log).encode(), at)
        end_with(words)
    if after:
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def events(log: Path) -> list[list[str]]:
    return [line.split("\t") for line in log.read_text().split("\n") if line]


def cut(folder: Path, log: Path, chance: random.Random) -> None:
    """Leave in a folder what is sure to be on the disk, and some of what may be."""
    done = events(log)
    actual = {}  # inode -> content
    for path in folder.rglob("*"):
        if path.is_file():
            actual[str(path.stat().st_ino)] = path.read_bytes()
    sure = max((number for number, line in enumerate(done, 1) if line[1] == "syncdir"), default=0)
    lasting = chance.randint(sure, len(done))
    files, folders, held = {}, {str(folder)}, {}
    for number, kind, first, second in done:
        if kind == "create" and int(number) <= lasting:
            files[first] = second
        if kind == "create":
            held.pop(second, None)
        if kind == "sync":
            held[second] = Path(f"{log}.{number}").read_bytes()
        if int(number) > lasting:
            continue
        if kind == "mkdir":
            folders.add(first)
        elif kind == "remove":
            files.pop(first, None)
            folders.discard(first)
        elif kind == "rename":
            for names in (files, folders):
                for name in [n for n in names if n == first or n.startswith(first + "/")]:
                    moved = second + name[len(first) :]
                    if isinstance(names, dict):
                        names[moved] = names.pop(name)
                    else:
                        names.discard(name)
                        names.add(moved)
    shutil.rmtree(folder)
    for name in sorted(folders):
        Path(name).mkdir(parents=True, exist_ok=True)
    for name, inode in files.items():
        content = held.get(inode)
        if content is None:
            full = actual.get(inode, b"")
            content = chance.choice([b"", bytes(len(full)), full[: len(full) // 2], full])
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def pixels(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".safetensors":  # the card names the folder
        return data[8 + int.from_bytes(data[:8], "little") :]
    if path.suffix != ".tif":
        return data
    with rasterio.open(path) as dataset:
        return dataset.read().tobytes()


def train_words(folder: Path) -> list[str]:
    """A run of a few steps that is always resumed."""
    (folder / "c.toml").write_text(
        "[train]\niterations = 6\nbatch_size = 1\nwarmup = 1\namp = false\nvalidate_every = 6\ncheckpoint_every = 2\n"
        "[network]\nwidth = 4\ndeep_width = 4\nblocks = 1\ndeep_blocks = 1\n"
    )
    with h5py.File(folder / "s.h5", "w") as file:
        for number, split in enumerate(("train", "valid")):
            truth = np.random.default_rng(number).uniform(100, 900, (4, 18, 18)).repeat(4, 1).repeat(4, 2)
            group = file.create_group(split)
            group.attrs.update(sensor="s", licence="l", split=split, weight=1.0)
            group["gt"], group["pan"] = truth.astype("u2"), truth.mean(0, keepdims=True).astype("f4")
    given = ["--data", str(folder / "s.h5"), "--config", str(folder / "c.toml"), "--resume"]
    return ["train", *given, "--out", "OUT", "--device", "cpu", "-j", "1", "-q"]


def commands(folder: Path, slow: bool = False) -> list[Command]:
    """The commands; `slow`: also those that take seconds."""
    model = str(write_tiny_model(folder / "tiny.safetensors"))
    for name in "ab":
        write_pair(folder, name=name, ms_shape=(24, 20), noise=5 + ord(name))
    (folder / "large").mkdir()
    write_pair(folder / "large", name="c", ms_shape=(96, 96), noise=20)
    common = ["--model", model, "--tile", "32", "--coregister", "off", "--num-threads", "1", "-q"]
    pair = [str(folder / "a_pan.tif"), str(folder / "a_ms.tif")]
    globs = ["--pan-glob", str(folder / "*_pan.tif"), "--ms-glob", str(folder / "*_ms.tif")]
    recipe = folder / "recipe.csv"
    recipe.write_text(
        "name,kind,pan,ms,sensor,licence,split,weight\na,pair,large/c_pan.tif,large/c_ms.tif,s,l,train,1\n"
    )
    sharpen = ["sharpen", *pair, "-o", "OUT/x.tif", "--uncertainty", "OUT/s.tif", "--preview", "OUT/p.png"]
    batch = ["batch", *globs, "-o", "OUT", "--uncertainty", *common]
    pack = ["pack", str(recipe), "--root", str(folder), "-o", "OUT/p.h5"]
    simulate = ["simulate", "--ms-only", str(folder / "large" / "c_ms.tif"), "-o", "OUT/train.h5", "--patch", "32"]
    many = [("train", train_words(folder), {"last.safetensors", "best.safetensors"})] if slow else []
    return [
        ("sharpen", [*sharpen, "--resume", *common], {"x.tif", "s.tif", "p.png"}),
        ("batch", batch, {f"{name}_{kind}.tif" for name in "ab" for kind in ("sharp", "sigma")}),
        ("pack", pack, {"p.h5"}),
        ("simulate", [*simulate, "--overwrite", "-q"], {f"{name}.h5" for name in ("train", "valid", "test")}),
        *many,
    ]


def main(folder: Path, kills: int, cuts: int, library: str | None) -> int:
    loaded()
    faults, trials = 0, 0
    log = folder / "log"
    seed = int(os.environ.get("UKNOWPAN_CRASH_SEED", "0"))
    chance = random.Random(seed)
    made = commands(folder, slow=kills >= 100)
    wanted, spans = {}, {}
    for name, words, outputs in made:
        out = folder / f"out-{name}-whole"
        out.mkdir()
        began = time.monotonic()
        code = run([word.replace("OUT", str(out)) for word in words], library, log)
        assert code == 0, (name, code)
        spans[name] = (time.monotonic() - began, len(events(log)) if library else 0)
        wanted[name] = {output: pixels(out / output) for output in outputs}
    for trial in range(kills + cuts):
        # Half of the trials are of the command with the most to lose.
        name, words, outputs = made[0] if chance.random() < 0.5 else chance.choice(made[1:])
        out = folder / f"out-{name}-{trial}"
        out.mkdir()
        given = [word.replace("OUT", str(out)) for word in words]
        trials += 1
        if trial < kills:
            run(given, after=chance.uniform(0.001, spans[name][0]))
        else:
            for old in folder.glob("log*"):
                old.unlink()
            run(given, library, log, chance.randint(1, spans[name][1]))
            cut(out, log, chance)
        before = {path.name: pixels(path) for path in out.iterdir() if path.name in outputs}
        for left in out.glob(".*.new"):  # as old as it is when somebody comes back
            os.utime(left, (0, 0))
        code = run(given, log=folder / "again")
        there = {path.name for path in out.iterdir()}
        rest = {n for n in there - outputs if not n.endswith(".json") and n not in KEPT}
        # All outputs are in place: a second `sharpen` or `pack` refuses to replace them.
        complete = code == 0 or (code == 4 and before.keys() == outputs)
        equal = outputs <= there and {output: pixels(out / output) for output in outputs} == wanted[name]
        whole = all(before[output] == wanted[name][output] for output in before)
        if not (complete and equal and whole) or rest:
            faults += 1
            error = (folder / "again.txt").read_text()[-300:]
            print(
                json.dumps([trial, name, trial < kills, code, complete, equal, whole, sorted(rest), error]), flush=True
            )
        shutil.rmtree(out)
    print(json.dumps({"trials": trials, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None))
