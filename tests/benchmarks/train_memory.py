"""Peak memory of `uknowpan train` on a file that is larger than it may use; one line per stage.

    python tests/benchmarks/train_memory.py --gigabytes 12 --workers 2

The file has the layout of PanCollection's: 8 bands, patches of 64 x 64, float64, one chunk per
sample. Its patches are tiles of noise, which gzip stores in a thirtieth of their size, so that a
disk holds them; reading a sample unpacks all of it. Samples are drawn at random from the whole
file; without --steps one epoch reads every byte of it. Memory is the sum over all processes of the
run, of PSS (pages that several share count once), looked at five times a second. Exits with 1
above the limit.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

BANDS, SIZE, RATIO = 8, 64, 4
TILE = 16
"""Pixels after which a patch repeats itself."""
DISTINCT = 64
"""Patches that differ; the file repeats them."""
VALIDATION_SAMPLES = 32
SHAPES = {
    "gt": (BANDS, SIZE, SIZE),
    "lms": (BANDS, SIZE, SIZE),
    "ms": (BANDS, SIZE // RATIO, SIZE // RATIO),
    "pan": (1, SIZE, SIZE),
}
SAMPLE = sum(int(np.prod(shape)) for shape in SHAPES.values()) * 8
"""Bytes."""


@dataclass(frozen=True)
class Peak:
    """The most that a run took."""

    size: int
    """Bytes."""
    processes: int
    """That were running then."""
    seconds: float
    """That the run took."""


# ------------------------------------------------------------------------------------ the file


def make_patch(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Whole digital numbers of 11 bits in gt; lms is its MS enlarged, so that they differ."""
    repeats = (1, SIZE // TILE, SIZE // TILE)
    gt = np.tile(rng.integers(100, 1900, (BANDS, TILE, TILE)), repeats).astype(np.float64)
    blocks = gt.reshape(BANDS, SIZE // RATIO, RATIO, SIZE // RATIO, RATIO)
    ms = blocks.mean((2, 4))
    lms = ms.repeat(RATIO, 1).repeat(RATIO, 2)
    return {"gt": gt, "lms": lms, "ms": ms, "pan": gt.mean(0, keepdims=True)}


def write_file(path: Path, count: int) -> None:
    """A file of so many samples; every distinct patch is packed once."""
    rng = np.random.default_rng(0)
    patches = [make_patch(rng) for _ in range(min(DISTINCT, count))]
    packed = [{k: zlib.compress(v.tobytes(), 4) for k, v in patch.items()} for patch in patches]
    with h5py.File(path, "w", libver="latest") as file:
        for name, shape in SHAPES.items():
            stored = file.create_dataset(name, (count, *shape), np.float64, chunks=(1, *shape), compression="gzip")
            for i in range(count):
                stored.id.write_direct_chunk((i, 0, 0, 0), packed[i % len(packed)][name])


# ---------------------------------------------------------------------------------- measuring


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            children = (task / "children").read_text().split()
        except OSError:  # it has just ended
            continue
        for child in children:
            found += family(int(child))
    return found


def proportional(pid: int) -> int:
    """PSS of a process in bytes; 0 for one that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def watch(command: list[str], log: Path, interval: float = 0.2) -> Peak:
    """Run a command and look at its memory until it ends; a failing one stops the benchmark."""
    began, size, processes = time.monotonic(), 0, 0
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                sizes = [proportional(pid) for pid in family(process.pid)]
                if sum(sizes) > size:
                    size, processes = sum(sizes), len(sizes)
                time.sleep(interval)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return Peak(size, processes, time.monotonic() - began)


def run_stage(folder: Path, stage: str, steps: int, batch: int, workers: int, threads: int | None) -> Peak:
    """Train a stage of the preset `lite` on the file in the folder; validates once, at the end."""
    config = folder / f"{stage}.toml"
    config.write_text(
        f"[train]\niterations = {steps}\nbatch_size = {batch}\nworkers = {workers}\nvalidate_every = {steps}\n"
    )
    command = [sys.executable, "-m", "uknowpan", "train", "--stage", stage, "-q"]
    command += ["--preset", "lite", "--config", str(config), "--device", "cpu"]
    command += ["--data", str(folder / "train.h5"), "--max-value", "2047"]
    command += ["--out", str(folder / f"run-{stage}")]
    command += [] if threads is None else ["--num-threads", str(threads)]
    return watch(command, folder / f"{stage}.log")


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=12.0, help="10^9 bytes, unpacked")
    parser.add_argument("--limit", type=float, default=4.0, help="10^9 bytes of memory")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=("prior", "fsa-s"), default=["prior", "fsa-s"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, help="default: one epoch")
    parser.add_argument("--threads", type=int, help="of the training process")
    parser.add_argument("--folder", type=Path, help="where the file is made; default: temporary")
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    count = max(int(arguments.gigabytes * 1e9) // SAMPLE, arguments.batch)
    steps = arguments.steps or -(-count // arguments.batch)
    read = min(steps * arguments.batch / count, 1.0)
    above = False
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write_file(folder / "train.h5", count)
        write_file(folder / "valid.h5", VALIDATION_SAMPLES)
        for stage in arguments.stages:
            peak = run_stage(folder, stage, steps, arguments.batch, arguments.workers, arguments.threads)
            above |= peak.size > arguments.limit * 1e9
            print(
                f"{stage}, lite, batch {arguments.batch}, {arguments.workers} workers: file of "
                f"{count * SAMPLE / 1e9:.1f} GB, {read:.0%} of its samples read in {steps} steps "
                f"({peak.seconds:.0f} s); peak {peak.size / 1e9:.2f} GB in {peak.processes} "
                f"processes, limit {arguments.limit:g} GB",
                flush=True,
            )
    raise SystemExit(int(above))


if __name__ == "__main__":
    main()
