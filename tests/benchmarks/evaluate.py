"""Seconds that the indices take; prints Markdown.

    python tests/benchmarks/evaluate.py
    python tests/benchmarks/evaluate.py --images 5 --threads 1

Random images (their values do not matter to the time): 256 x 256 x 8 at reduced resolution, where
the border of 21 is cut first, and 512 x 512 x 8 at full resolution, as PanCollection has them. The
file is written and read like a real one; only EXP is scored, so this is the time per method. CPU
seconds, of all threads together, tell more than those of the clock on a machine that others use.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import torch

from uknowpan.models.devices import tune_cpu
from uknowpan.models.metrics.evaluation import evaluate_file
from uknowpan.models.metrics.indices import crop_border, ergas, psnr, q2n, q_index, sam, scc, ssim
from uknowpan.models.metrics.sensors import find_sensor
from uknowpan.models.pancollection.file import PanCollectionFile

BANDS, PEAK = 8, 2047.0
ALONE = {
    "Q8": q2n,
    "Q": q_index,
    "SAM": sam,
    "ERGAS": ergas,
    "SCC": scc,
    "PSNR": lambda f, g: psnr(f, g, PEAK),
    "SSIM": lambda f, g: ssim(f, g, PEAK),
}


def write_file(path: Path, images: int, size: int, gt: bool) -> None:
    """Noise in digital numbers."""
    rng = np.random.default_rng(0)
    shapes = {"pan": (1, size), "ms": (BANDS, size // 4), "lms": (BANDS, size)}
    with h5py.File(path, "w") as file:
        for name, (bands, n) in (shapes | ({"gt": (BANDS, size)} if gt else {})).items():
            file[name] = rng.integers(1, 2047, (images, bands, n, n)).astype("f8")


Seconds = tuple[float, float]
"""Of the clock, and of the CPU."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(began: Seconds, repeats: float = 1) -> Seconds:
    clock, cpu = now()
    return (clock - began[0]) / repeats, (cpu - began[1]) / repeats


def whole(images: int, size: int, gt: bool) -> Seconds:
    """Of `evaluate_file`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.h5"
        write_file(path, images, size, gt)
        began = now()
        with PanCollectionFile(path) as file:
            evaluate_file(file, {}, scale=PEAK, sensor=find_sensor("WV3"))
        return since(began)


def single(images: int) -> dict[str, Seconds]:
    """Of each index of reduced resolution for so many images."""
    generator = torch.Generator().manual_seed(0)
    fused, gt = (crop_border(torch.randint(1, 2047, (BANDS, 256, 256), generator=generator).double()) for _ in range(2))
    seconds = {}
    for name, index in ALONE.items():
        began = now()
        for _ in range(3):
            index(fused, gt)
        seconds[name] = since(began, 3 / images)
    return seconds


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    threads, n = tune_cpu(options.threads), options.images
    print(f"{n} images of {BANDS} bands, {threads} threads, {platform.machine()}\n")
    print("| | seconds | CPU seconds |\n|---|---:|---:|")

    def row(name: str, seconds: Seconds) -> None:
        print(f"| {name} | {seconds[0]:.2f} | {seconds[1]:.2f} |", flush=True)

    row("reduced resolution, 256 x 256, all indices", whole(n, 256, True))
    for name, seconds in single(n).items():
        row(f"{name} alone", seconds)
    row("full resolution, 512 x 512, all indices", whole(n, 512, False))


if __name__ == "__main__":
    main()
