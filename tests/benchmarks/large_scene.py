"""`uknowpan sharpen` on very large scenes: the plan, a part, the whole width; prints Markdown.

    python tests/benchmarks/large_scene.py --folder DIR [--size 60000] [--data ROW,COL,ROWS,COLUMNS]
    python tests/benchmarks/large_scene.py --folder DIR --size 20000 --whole
    python tests/benchmarks/large_scene.py --folder DIR --heights 1024 8192 --width 1024

The scene is a sparse tiled BigTIFF: a drawn scene repeated over --data (PAN pixels), declared
nodata 0 and no blocks on the disk elsewhere. MS at a quarter of it, 4 bands, uint16. The last rows
of the table are 1024 PAN rows of all columns: a full run takes as much memory.
--whole runs all of the scene; a strip of results takes its uncompressed size on the disk, so mind
the forecast. --heights compares the peaks of fully textured scenes. Every command is a process of
its own, as in bench.py, and "beyond torch" means what it means there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import rasterio
from bench import TORCH_ONLY, run, write_scene
from rasterio import Affine
from rasterio.windows import Window

from uknowpan.datasets.synthetic import make_scene

RATIO, BLOCK = 4, 512
METRES, LEFT, TOP = 0.5, 4e5, 5e6
PART = (2048, 4096)
"""PAN rows and columns of the part that is sharpened."""
WIDTH_ROWS = 1024
"""PAN rows that are sharpened over the whole width."""

Area = tuple[int, int, int, int]
"""Row, column, rows and columns of the PAN."""
Pair = tuple[Path, Path]
HEADER = "| what | method | seconds | Mpx/s | MB beyond torch | `--dry-run` said, in all |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Measured:
    """One command."""

    what: str
    method: str
    seconds: float
    pixels: int
    """Size of the PAN that was written; 0: none."""
    peak: float
    """MB beyond torch."""
    forecast: dict[str, float]
    """Forecast of `--dry-run` for the same command; empty: not asked."""

    def row(self) -> str:
        speed = f"{self.pixels / 1e6 / self.seconds:.3g}" if self.pixels else "-"
        said = "-"
        if self.forecast:
            said = f"{self.forecast['seconds']:.0f} s, {self.forecast['memory_mb']:.0f} MB"
        cells = (self.what, self.method, f"{self.seconds:.1f}", speed, f"{self.peak:.0f}", said)
        return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------------ the scene


def write_sparse(folder: Path, size: int, data: Area, texture: int = BLOCK) -> Pair:
    """A PAN of size x size and its MS, with a drawn scene (`texture` pixels wide) over `data`.

    Raises ValueError where `data` does not lie on blocks of the texture within the scene.
    """
    row, col, rows, cols = data
    if any(n % texture for n in (rows, cols)) or row % RATIO or col % RATIO or size % RATIO:
        raise ValueError(f"data {data} in a scene of {size}: sides must be multiples of {texture}")
    if row < 0 or col < 0 or row + rows > size or col + cols > size:
        raise ValueError(f"data {data} reach beyond a scene of {size}")
    scene = make_scene(texture)
    paths = []
    for name, values, factor in (("pan", scene.pan, 1), ("ms", scene.ms, RATIO)):
        path = folder / f"sparse_{name}.tif"
        block = np.maximum(values, 1).astype(np.uint16)
        side = block.shape[1]
        wide = np.tile(block, (1, 1, cols // texture))
        place = Affine(METRES * factor, 0, LEFT, 0, -METRES * factor, TOP)
        with (
            rasterio.Env(GDAL_CACHEMAX=64 * 2**20),
            rasterio.open(
                path, "w", driver="GTiff", width=size // factor, height=size // factor,
                count=len(block), dtype="uint16", nodata=0, crs="EPSG:32631", transform=place,
                tiled=True, blockxsize=BLOCK, blockysize=BLOCK, bigtiff="YES", SPARSE_OK="TRUE",
            ) as target,
        ):  # fmt: skip
            for top in range(row // factor, (row + rows) // factor, side):
                target.write(wide, window=Window(col // factor, top, wide.shape[2], side))
        paths.append(path)
    return paths[0], paths[1]


def bounds_of(area: Area) -> str:
    """The area for `--bounds`."""
    row, col, rows, cols = area
    left, top = LEFT + col * METRES, TOP - row * METRES
    return f"{left},{top - rows * METRES},{left + cols * METRES},{top}"


# ---------------------------------------------------------------------------------- measuring


class Bench:
    """Runs `uknowpan sharpen` on a pair, in processes of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.target = folder / "large_out.tif"
        self.threads = threads
        self.base = self._peak([sys.executable, "-c", TORCH_ONLY])[1]

    def _peak(self, command: list[str]) -> tuple[float, float, str]:
        seconds, peak, text = run(command)
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if peak <= 1.02 * own:  # a child begins with the peak of its parent
            raise SystemExit(f"{peak:.0f} MB is the peak of this script: nothing was measured")
        return seconds, peak, text

    def sharpen(
        self,
        what: str,
        pair: Pair,
        method: str,
        *words: str,
        pixels: int = 0,
        forecast: bool = False,
    ) -> tuple[Measured, dict[str, float]]:
        """A command and what it reported; with `forecast` it is asked for first."""
        command = [sys.executable, "-m", "uknowpan", "sharpen", *map(str, pair)]
        command += ["-o", str(self.target), "--overwrite", "-q", "--json", "-j", str(self.threads)]
        command += [] if method == "student" else ["--method", method]
        command += words
        said = json.loads(self._peak([*command, "--dry-run"])[2]) if forecast else {}
        seconds, peak, text = self._peak(command)
        self.target.unlink(missing_ok=True)
        done = Measured(what, method, seconds, pixels, peak - self.base, said)
        return done, json.loads(text)


def parts(bench: Bench, pair: Pair, size: int, data: Area, method: str) -> Iterator[Measured]:
    """The plan of all, a part that is full of data, and a strip of the whole width."""
    plan, said = bench.sharpen("plan of all", pair, method, "--dry-run")
    yield replace(plan, forecast=said)
    row, col, rows, cols = data
    full = (row, col, min(rows, PART[0]), min(cols, PART[1]))
    wide = (row, 0, min(rows, WIDTH_ROWS), size)
    for what, area in ((f"{full[2]} x {full[3]} of it", full), (f"{wide[2]} x {size}", wide)):
        words = ("--bounds", bounds_of(area))
        pixels = area[2] * area[3]
        yield bench.sharpen(what, pair, method, *words, pixels=pixels, forecast=True)[0]


def measure_sparse(bench: Bench, folder: Path, size: int, data: Area, methods: Sequence[str], whole: bool) -> None:
    """Print the table of the sparse scene."""
    pair = write_sparse(folder, size, data)
    on_disk = sum(path.stat().st_blocks * 512 for path in pair) / 1e6
    print(
        f"PAN {size} x {size}, data in {data[2]} x {data[3]} from row {data[0]}, column {data[1]}; "
        f"both files {on_disk:.0f} MB on the disk.\n\n{HEADER}"
    )
    lines = []
    for method in methods:
        if whole:
            done, report = bench.sharpen("all of it", pair, method, pixels=size**2, forecast=True)
            print(done.row(), flush=True)
            skipped, tiles = report["skipped_tiles"], report["tiles"]
            lines.append(f"{method}: {skipped:.0f} of {tiles:.0f} tiles were skipped.")
            continue
        for done in parts(bench, pair, size, data, method):
            print(done.row(), flush=True)
            if done.pixels == 0:
                said = done.forecast
                lines.append(
                    f"{method}, all of it: {said['tiles']:.0f} tiles, about "
                    f"{said['tiles_with_data']:.0f} with data, {said['disk_mb'] / 1e3:.1f} GB of "
                    "disk while it runs."
                )
    print("\n" + "\n".join(lines))
    for path in pair:
        path.unlink()


def measure_heights(
    bench: Bench,
    folder: Path,
    heights: Sequence[int],
    width: int,
    methods: Sequence[str],
    repeats: int,
) -> None:
    """Print the peaks of scenes full of data, and the last one's median over the first one's."""
    print(f"PAN {' and '.join(map(str, heights))} x {width}, all of it data.\n\n{HEADER}")
    peaks: dict[str, list[list[float]]] = {method: [] for method in methods}
    for height in heights:
        pair = write_scene(folder, height, width)
        for method in methods:
            runs = []
            for _ in range(repeats):
                what, pixels = f"{height} x {width}", height * width
                done, _ = bench.sharpen(what, pair, method, pixels=pixels)
                print(done.row(), flush=True)
                runs.append(done.peak)
            peaks[method].append(runs)
        for path in pair:
            path.unlink()
    print()
    for method, by_height in peaks.items():
        first, last = median(by_height[0]), median(by_height[-1])
        whole = (last + bench.base) / (first + bench.base)
        print(
            f"{method}, medians: {heights[-1] / heights[0]:g} times the height takes "
            f"{last / first:.3f} times the memory beyond torch, {whole:.3f} times that of the "
            "whole process."
        )


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for scenes and outputs")
    parser.add_argument("--size", type=int, default=60000, help="PAN pixels along a side")
    parser.add_argument(
        "--data",
        type=lambda text: tuple(int(n) for n in text.split(",")),
        help="default: 4096 x 8192 in the middle; 3072,5632,4096,4096 of 60000 is met by no sample",
    )
    parser.add_argument("--whole", action="store_true", help="run all of it, instead of parts")
    parser.add_argument("--heights", type=int, nargs="+", help="PAN rows, instead of a sparse scene")
    parser.add_argument("--repeats", type=int, default=3, help="of every run, with --heights")
    parser.add_argument("--width", type=int, default=2048, help="PAN columns, with --heights")
    parser.add_argument("--methods", nargs="+", default=["brovey", "student"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(arguments.folder, arguments.threads)
    print(
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}; "
        f"importing torch and rasterio alone: {bench.base:.0f} MB.\n"
    )
    if arguments.heights:
        measure_heights(
            bench,
            arguments.folder,
            arguments.heights,
            arguments.width,
            arguments.methods,
            arguments.repeats,
        )
        return
    size = arguments.size
    middle = (size // 2 // BLOCK * BLOCK - 2048, size // 2 // BLOCK * BLOCK - 4096)
    data = arguments.data or (*middle, 4096, 8192)
    measure_sparse(bench, arguments.folder, size, data, arguments.methods, arguments.whole)


if __name__ == "__main__":
    main()
