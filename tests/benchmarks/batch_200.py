"""`uknowpan batch` over 200 small scenes of which 10 are broken, each in its own way.

    python tests/benchmarks/batch_200.py --scenes 200 --kills 8

Runs the batch, checks how many scenes failed and why, and runs it again, which skips what is
there; then kills (SIGKILL) two shards that run at once, again and again at random moments, lets
them finish, and compares all pixels with those of the undisturbed run. --killed-scenes is how many
scenes that part takes.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine

MS_SIDE, RATIO, BANDS = 32, 4, 4
GRID = Affine.translation(500_000, 5_000_000) * Affine.scale(0.5, -0.5)

BROKEN = {
    "gone": (3, "No such file"),
    "cut": (3, "truncated or corrupt"),
    "text": (3, "cannot be opened as a raster"),
    "far": (3, "overlap"),
    "swapped": (3, f"{BANDS} bands"),
    "empty": (3, "valid"),
    "band": (3, "band"),
    "ratio": (5, "ratio"),
    "taken": (4, "was not made by batch"),
    "file": (3, "file"),
}
"""Scene -> exit code and words of its message."""


def write(path: Path, values: np.ndarray, transform: Affine, nodata: float | None = None) -> str:
    count, height, width = values.shape
    with rasterio.open(
        path, "w", driver="GTiff", count=count, height=height, width=width, dtype="uint16",
        crs="EPSG:32631", transform=transform, nodata=nodata,
    ) as dataset:  # fmt: skip
        dataset.write(values)
    return str(path)


def make_scene(
    folder: Path, name: str, seed: int, ratio: int = RATIO, far: int = 0, level: int = 200
) -> dict[str, object]:
    """Write a pair and return its row of the manifest."""
    rng = np.random.default_rng(seed)
    fine = MS_SIDE * ratio
    pan = level * 3 + rng.integers(0, level, (1, fine, fine)) if level else np.zeros((1, fine, fine))
    ms = pan.reshape(1, MS_SIDE, ratio, MS_SIDE, ratio).mean((2, 4)) * np.ones((BANDS, 1, 1))
    coarse = GRID * Affine.translation(far, far) * Affine.scale(ratio)
    nodata = None if level else 0
    return {
        "id": name,
        "pan": write(folder / f"{name}_pan.tif", pan.astype("uint16"), GRID, nodata),
        "ms": write(folder / f"{name}_ms.tif", ms.astype("uint16"), coarse, nodata),
    }


def make_broken(folder: Path, output: Path) -> list[dict[str, object]]:
    """The rows of BROKEN."""
    options = {"far": {"far": 10**5}, "empty": {"level": 0}, "ratio": {"ratio": 8}}
    rows = {name: make_scene(folder, name, 0, **options.get(name, {})) for name in BROKEN}
    Path(str(rows["gone"]["pan"])).unlink()
    cut = Path(str(rows["cut"]["ms"]))
    cut.write_bytes(cut.read_bytes()[:4000])
    Path(str(rows["text"]["ms"])).write_text("no raster")
    rows["swapped"] |= {"pan": rows["swapped"]["ms"], "ms": rows["swapped"]["pan"]}
    rows["band"]["ms"] = f"{rows['band']['ms']},band=9"
    output.mkdir()
    (output / "taken_sharp.tif").write_text("somebody's work")
    (output / "file").write_text("in the way")
    rows["file"]["output"] = "file/sharp.tif"
    return list(rows.values())


def command(manifest: Path, output: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "uknowpan", "batch", str(manifest), "-o", str(output)]
    return [*start, "-q", "--tile", "64", *more]


def run(what: str, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True)
    print(f"{what}: exit {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    return done


def pixels(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("[!.]*.tif")):
        if path.name != "taken_sharp.tif":
            with rasterio.open(path) as dataset:
                found[path.name] = dataset.read().tobytes()
    return found


def check_report(folder: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "uknowpan", "batch", "--report", str(folder)],
        capture_output=True,
        text=True,
    )
    print(told.stdout.replace(str(folder.parent), "..."), flush=True)
    lines = (folder / "report.jsonl").read_text().splitlines()
    last = {line["id"]: line for line in map(json.loads, lines)}
    wrong = [
        name
        for name, (code, words) in BROKEN.items()
        if last[name]["code"] != code or not re.search(words, last[name]["message"])
    ]
    others = [n for n, line in last.items() if n not in BROKEN and line["status"] == "failed"]
    print(f"other reasons than expected: {wrong}; others that failed: {others}", flush=True)


def killed(manifest: Path, output: Path, kills: int, expected: dict[str, bytes]) -> None:
    chance = random.Random(0)
    shards = ["1/2", "2/2"]
    for _ in range(kills):
        runs = [subprocess.Popen(command(manifest, output, "--shard", k), stdout=subprocess.DEVNULL) for k in shards]
        time.sleep(chance.uniform(5, 40))
        for process in runs:
            process.kill()
            process.wait()
        there = pixels(output)
        torn = [name for name, values in there.items() if values != expected[name]]
        parts = len(list(output.glob("*.part")))
        print(f"killed: {len(there)} files, torn {torn}, {parts} .part folders", flush=True)
    time.sleep(6)  # what never got its name is swept away once it is a few seconds old
    for k in shards:
        run(f"shard {k} to the end", command(manifest, output, "--shard", k))
    kept = {p.name for p in output.iterdir()}
    wanted = set(expected) | {f"{name}.json" for name in expected}
    wanted |= {"report-1-of-2.jsonl", "report-2-of-2.jsonl"}
    print(f"pixels as undisturbed: {pixels(output) == expected}; left over: {kept ^ wanted}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=200)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--killed-scenes", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, output = folder / "in", folder / "out"
        inputs.mkdir()
        good = [make_scene(inputs, f"s{i:03}", i) for i in range(arguments.scenes - len(BROKEN))]
        rows = [*good[:20], *make_broken(inputs, output), *good[20:]]
        manifests = {}
        for what, chosen in (("all", rows), ("few", good[: arguments.killed_scenes])):
            manifests[what] = folder / f"{what}.jsonl"
            manifests[what].write_text("".join(json.dumps(row) + "\n" for row in chosen))
        run("first run", command(manifests["all"], output))
        check_report(output)
        run("second run", command(manifests["all"], output))
        check_report(output)
        left = [p.name for p in output.iterdir() if p.name.startswith(".") or p.suffix == ".part"]
        print(f"left over: {left}", flush=True)
        names = {f"{row['id']}_sharp.tif" for row in good[: arguments.killed_scenes]}
        expected = {name: values for name, values in pixels(output).items() if name in names}
        killed(manifests["few"], folder / "killed", arguments.kills, expected)


if __name__ == "__main__":
    main()
