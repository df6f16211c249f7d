"""SIGKILL of `uknowpan batch` at random moments, until all is done; prints a table.

    python tests/benchmarks/kill_20.py                  # the batch process, 20 times
    python tests/benchmarks/kill_20.py --dask --kills 5 # a worker of its LocalCluster

A moment is counted from the first strip or file of a run on: starting takes longer than the work.
Each kill is followed by a look at every file under a final name, which must be one of the
undisturbed run to the last bit. A run that has all files before the next kill does not count; it
is brought to its end and checked, and the next one begins in a new folder. Exit 1 if anything was
incomplete, different, or left over. The processes are found through /proc: Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import rasterio
from batch_200 import command, make_scene

SETTLED = 6.0
"""Seconds after which the batch takes what a killed run was about to begin for left over."""
LONGEST = 600.0
"""Seconds that a run may take."""


@dataclass(frozen=True)
class Found:
    """Content of an output folder."""

    files: dict[str, bytes]
    """Name -> pixels of all bands."""
    torn: list[str]
    """Under a final name, but not to be opened or read."""
    parts: int
    """Folders of strips."""
    temporary: int


def look(folder: Path) -> Found:
    """Open and read all that has a final name."""
    files, torn = {}, []
    for path in sorted(folder.glob("[!.]*.tif")):
        try:
            with rasterio.open(path) as dataset:
                files[path.name] = dataset.read().tobytes()
        except rasterio.errors.RasterioError:
            torn.append(path.name)
    for path in folder.glob("[!.]*.tif.json"):
        try:
            json.loads(path.read_text())
        except ValueError:
            torn.append(path.name)
    hidden = [path for path in folder.glob(".*") if path.name.startswith(".")]
    return Found(files, torn, len(list(folder.glob("[!.]*.part"))), len(hidden))


@dataclass
class Trial:
    """Batches over the same scenes, undisturbed and killed."""

    manifest: Path
    folder: Path
    words: Sequence[str]
    expected: dict[str, bytes] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    working: float = 0.0
    """Seconds of the undisturbed run from its first strip on."""
    bad: list[str] = field(default_factory=list)

    def start(self, output: Path) -> subprocess.Popen[bytes]:
        """A batch, and wait until it has begun to work (or has ended)."""
        before = self._state(output)
        process = subprocess.Popen(
            command(self.manifest, output, *self.words),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        until = time.monotonic() + LONGEST
        while self._state(output) == before and process.poll() is None:
            if time.monotonic() > until:
                process.kill()
                raise SystemExit(f"no strip within {LONGEST:.0f} s")
            time.sleep(0.01)
        return process

    @staticmethod
    def _state(output: Path) -> set[str]:
        strips = {f"{path.parent.name}/{path.name}" for path in output.glob("*.part/*.npy")}
        return strips | {path.name for path in output.glob("*.tif")}

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a run that must succeed."""
        _, text = process.communicate(timeout=LONGEST)
        if process.returncode:
            self.bad.append(f"exit {process.returncode}: {text.decode()[-500:]}")

    def undisturbed(self) -> None:
        output = self.folder / "undisturbed"
        process = self.start(output)
        began = time.monotonic()
        self.end(process)
        self.working = time.monotonic() - began
        found = look(output)
        self.expected, self.names = found.files, {path.name for path in output.iterdir()}
        if self.bad or not self.expected:
            raise SystemExit(f"the undisturbed run failed: {self.bad}")

    def check(self, output: Path, told: str) -> Found:
        """Look, and note what is wrong."""
        found = look(output)
        differ = [name for name, pixels in found.files.items() if pixels != self.expected.get(name)]
        self.bad += [f"{told}: {name} is incomplete" for name in found.torn]
        self.bad += [f"{told}: {name} differs" for name in differ]
        return found

    def finish(self, output: Path) -> None:
        """Run to the end, and once more, which sweeps away what is old enough by then."""
        self.end(self.start(output))
        time.sleep(SETTLED)
        self.end(self.start(output))
        found = self.check(output, "at the end")
        if found.files.keys() != self.expected.keys():
            self.bad.append(f"missing {sorted(self.expected.keys() - found.files.keys())}")
        there = {path.name for path in output.iterdir()}
        if there != self.names:
            self.bad.append(f"left over or missing: {sorted(there ^ self.names)}")


def row(number: int, seconds: float, found: Found, total: int) -> str:
    return (
        f"| {number} | {seconds:.2f} | {len(found.files)} of {total} | {len(found.torn)} | "
        f"{found.parts} | {found.temporary} |"
    )


def kill_processes(trial: Trial, kills: int, chance: random.Random) -> None:
    """SIGKILL of the whole batch."""
    done, round_ = 0, 0
    output = trial.folder / "killed-0"
    while done < kills:
        process = trial.start(output)
        seconds = chance.uniform(0, 2 * trial.working / kills)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
        found = trial.check(output, f"kill {done + 1}")
        if process.returncode == -signal.SIGKILL and found.files.keys() != trial.expected.keys():
            done += 1
            print(row(done, seconds, found, len(trial.expected)), flush=True)
            continue
        trial.finish(output)
        round_ += 1
        output = trial.folder / f"killed-{round_}"
    trial.finish(output)


def workers_of(pid: int) -> list[int]:
    """The worker processes of a LocalCluster: what its nannies have spawned."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = [int(word) for word in (task / "children").read_text().split()]
            commands = {child: Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0") for child in children}
        except OSError:
            continue
        found += [child for child, words in commands.items() if any(b"spawn_main" in word for word in words)]
    return sorted(found)


def kill_workers(trial: Trial, kills: int, chance: random.Random) -> None:
    """SIGKILL of one Dask worker while the batch lives on."""
    done, round_ = 0, 0
    while done < kills:
        output = trial.folder / f"killed-{round_}"
        process = trial.start(output)
        while done < kills and process.poll() is None:
            seconds = chance.uniform(0, trial.working / 2)
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                workers = workers_of(process.pid)
            if not workers:
                continue
            if look(output).files.keys() == trial.expected.keys():
                break
            os.kill(chance.choice(workers), signal.SIGKILL)
            done += 1
            found = trial.check(output, f"kill {done}")
            print(row(done, seconds, found, len(trial.expected)), flush=True)
        trial.end(process)
        trial.finish(output)
        round_ += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dask", action="store_true", help="kill a worker, not the batch")
    parser.add_argument("--workers", type=int, default=2, help="with --dask")
    parser.add_argument("--method", help="a classical one; default: the default model")
    parser.add_argument("-j", "--threads", type=int, default=1)
    arguments = parser.parse_args()
    words = ["-j", str(arguments.threads), "--shard", "none"]
    words += ["--method", arguments.method] if arguments.method else ["--uncertainty"]
    if arguments.dask:
        words += ["--dask", "local", "--dask-workers", str(arguments.workers)]
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scenes, manifest = folder / "in", folder / "scenes.jsonl"
        scenes.mkdir()
        rows = [make_scene(scenes, f"s{i:03}", i) for i in range(arguments.scenes)]
        manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
        trial = Trial(manifest, folder, words)
        trial.undisturbed()
        print(
            f"{arguments.scenes} scenes, {len(trial.expected)} files, {trial.working:.1f} s of "
            f"work undisturbed; seed {arguments.seed}.\n\n"
            "| kill | s after the first strip or the last kill | complete files | incomplete | "
            "strip folders | temporary |\n|---|---|---|---|---|---|"
        )
        (kill_workers if arguments.dask else kill_processes)(trial, arguments.kills, chance)
    print(
        f"\n{arguments.kills} kills of {'a worker' if arguments.dask else 'the batch'}; after the "
        "rerun: " + ("\n".join(trial.bad) or "all files complete and equal to the bit, nothing left over.")
    )
    sys.exit(1 if trial.bad else 0)


if __name__ == "__main__":
    main()
