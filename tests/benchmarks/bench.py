"""Speed and memory of `uknowpan sharpen` on drawn scenes; prints Markdown, stores JSON.

    make bench          (or: python tests/benchmarks/bench.py --sizes 1024x1024 2048x2048)
    python tests/benchmarks/bench.py --sizes 4096x4096 --dtypes fp32 --methods student

Every run is a process of its own, and the operating system reports its time and its peak memory.
Memory is given beyond that of a process that only imports torch, rasterio and numpy.
Sizes are rows x columns of the PAN; the scene has 4 bands, uint16, ratio 4.
With several devices or dtypes the outputs are compared in digital numbers.
At the end uknowpan runs beside GDAL (weighted Brovey) and the Orfeo ToolBox (Bayes), where these are installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from uknowpan.datasets.synthetic import make_scene

TORCH_ONLY = "import torch, rasterio, numpy; torch.ones(8).sum()"


RELAY = """
import os, sys, time
began = time.monotonic()
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), 0)
os.write(2, f"\\n{time.monotonic() - began} {usage.ru_maxrss}".encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""
"""A small process between this one and a measured one: a child begins with the peak memory of its parent."""


def run(command: list[str]) -> tuple[float, float, str]:
    """(seconds, peak MB, stdout) of a process; a failing one stops the benchmark."""
    done = subprocess.run([sys.executable, "-I", "-S", "-c", RELAY, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    seconds, peak = done.stderr.rpartition("\n")[2].split()
    return float(seconds), float(peak) / 1024, done.stdout


def write_scene(folder: Path, rows: int, cols: int) -> tuple[Path, Path]:
    """A PAN/MS pair of any size, one drawn scene repeated; written strip by strip."""
    scene = make_scene(size=512, seed=7)
    paths = []
    for name, data, factor in (("pan", scene.pan, 1), ("ms", scene.ms, scene.ratio)):
        path = folder / f"{name}_{rows}x{cols}.tif"
        h, w = rows // factor, cols // factor
        block = data.astype(np.uint16)
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            height=h,
            width=w,
            count=len(block),
            dtype="uint16",
            crs="EPSG:32631",
            transform=rasterio.Affine(0.5 * factor, 0, 4e5, 0, -0.5 * factor, 5e6),
            tiled=True,
            blockxsize=512,
            blockysize=512,
            bigtiff="IF_SAFER",
        ) as target:
            step = block.shape[1]
            wide = np.tile(block, (1, 1, -(-w // block.shape[2])))[:, :, :w]
            for top in range(0, h, step):
                n = min(step, h - top)
                target.write(wide[:, :n], window=Window(0, top, w, n))
        paths.append(path)
    return paths[0], paths[1]


STUDENT = "student"
CUDA_THERE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
HEADER = """\
| PAN rows x columns | method | device | dtype | tile | batch | steps | seconds | Mpx/s | \
peak MB beyond torch |
|---|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class Setting:
    """One way to sharpen a scene."""

    method: str
    device: str
    dtype: str
    tile: int
    batch: int
    """0: by device."""
    steps: int
    """0: the model's."""

    @property
    def classical(self) -> bool:
        return self.method != STUDENT

    def words(self, threads: int) -> list[str]:
        """Options of `uknowpan sharpen`."""
        words = ["--tile", str(self.tile), "-j", str(threads)]
        words += ["--batch-size", str(self.batch)] if self.batch else []
        if self.classical:
            return [*words, "--method", self.method]
        words += ["--device", self.device, "--dtype", self.dtype]
        return words + (["--steps", str(self.steps)] if self.steps else [])

    def text(self) -> str:
        """The columns of the setting."""
        auto = {0: "-" if self.classical else "auto"}
        method = (self.method, self.device, "-" if self.classical else self.dtype)
        numbers = (self.tile, self.batch or "auto", auto.get(self.steps, self.steps))
        return " | ".join(map(str, (*method, *numbers)))


@dataclass(frozen=True)
class Measured:
    """One run."""

    size: str
    setting: Setting
    seconds: float
    mpx_per_second: float
    peak_mb_beyond_torch: float

    def row(self) -> str:
        size, setting = self.size.replace("x", " x "), self.setting.text()
        speed, peak = f"{self.mpx_per_second:.3g}", f"{self.peak_mb_beyond_torch:.0f}"
        return f"| {size} | {setting} | {self.seconds:.2f} | {speed} | {peak} |"


class Bench:
    """Runs the command line in processes of its own."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        _, self.base, _ = run([sys.executable, "-c", TORCH_ONLY])

    def measure(self, size: str, pair: tuple[Path, Path], setting: Setting, output: Path) -> Measured:
        rows, cols = shape_of(size)
        command = [sys.executable, "-P", "-m", "uknowpan", "sharpen", *map(str, pair), "-o", str(output)]
        seconds, peak, _ = run([*command, "--overwrite", "-q", *setting.words(self.threads)])
        speed = rows * cols / 1e6 / seconds
        return Measured(size, setting, round(seconds, 3), speed, round(peak - self.base, 1))


def shape_of(size: str) -> tuple[int, int]:
    rows, _, cols = size.partition("x")
    return int(rows), int(cols)


def settings_of(arguments: argparse.Namespace, devices: Sequence[str]) -> list[Setting]:
    """All combinations; a classical method has the CPU, one dtype and no steps."""
    table = itertools.product(
        *(arguments.methods, devices, arguments.dtypes),
        *(arguments.tiles, arguments.batches, arguments.steps),
    )
    settings = [Setting(*line) for line in table]
    settings = [replace(s, device="cpu", dtype="fp32", steps=0) if s.classical else s for s in settings]
    return list(dict.fromkeys(settings))


# Differences --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Differences of two outputs of one scene, digital numbers, all bands."""

    size: str
    setting: Setting
    reference: Setting
    median: float
    high: float
    """99.9 percentile."""
    largest: float

    def row(self) -> str:
        one, other = (f"{s.dtype} on {s.device}" for s in (self.setting, self.reference))
        s = self.setting
        return (
            f"| {self.size.replace('x', ' x ')} | {one} | {other} | {s.tile} | "
            f"{s.batch or 'auto'} | {s.steps or 'auto'} | {self.median:g} | {self.high:g} | "
            f"{self.largest:g} |"
        )


def reference_of(setting: Setting) -> Setting | None:
    """The result to compare with: fp32 on the same device, or on the CPU."""
    if setting.classical:
        return None
    if setting.dtype != "fp32":
        return replace(setting, dtype="fp32")
    return None if setting.device == "cpu" else replace(setting, device="cpu")


def counted_differences(path: Path, reference: Path) -> np.ndarray:
    """Counts of the values that differ by 0, 1, 2, ... DN; block by block, as the memory of this process
    would count as that of its children."""
    counts = np.zeros(2**16, np.int64)
    with rasterio.open(path) as one, rasterio.open(reference) as other:
        for top in range(0, one.height, 512):
            window = Window(0, top, one.width, min(512, one.height - top))
            a, b = (d.read(window=window).astype(np.int32) for d in (one, other))
            counts += np.bincount(np.abs(a - b).ravel(), minlength=len(counts))
    return counts


def difference(size: str, setting: Setting, reference: Setting, counts: np.ndarray) -> Difference:
    reached = np.cumsum(counts) / counts.sum()
    median, high = (int(np.searchsorted(reached, share)) for share in (0.5, 0.999))
    return Difference(size, setting, reference, median, high, int(np.flatnonzero(counts)[-1]))


# Other programs -----------------------------------------------------------------------------------

GDAL, OTB = "GDAL Brovey", "Orfeo Bayes"
BESIDE = {"default": OTB, "brovey": GDAL, "gsa": GDAL}
"""Method -> the program that its time is divided by."""


def others(pair: Sequence[Path], output: Path, threads: int) -> dict[str, list[str]]:
    """Commands of the other programs that are installed; they write deflated uint16 as uknowpan does."""
    pan, ms = map(str, pair)
    commands = {
        GDAL: ["gdal_pansharpen.py", "-q", "-threads", str(threads), pan, ms, str(output)],
        OTB: ["otbcli_BundleToPerfectSensor", "-inp", pan, "-inxs", ms, "-method", "bayes", "-progress", "0"],
    }
    commands[GDAL] += [word for key in ("COMPRESS=DEFLATE", "TILED=YES") for word in ("-co", key)]
    commands[OTB] += ["-out", f"{output}?&gdal:co:COMPRESS=DEFLATE&gdal:co:TILED=YES", "uint16"]
    return {name: command for name, command in commands.items() if shutil.which(command[0])}


def medians(commands: Mapping[str, list[str]], output: Path, runs: int) -> dict[str, tuple[float, float]]:
    """Name -> median (seconds, peak MB); the programs take turns, as other load comes and goes."""
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _, name in itertools.product(range(runs), commands):
        output.unlink(missing_ok=True)
        measured[name].append(run(commands[name])[:2])
    return {
        name: (statistics.median(s for s, _ in lines), statistics.median(mb for _, mb in lines))
        for name, lines in measured.items()
    }


def beside(bench: Bench, size: str, runs: int) -> dict[str, tuple[float, float]]:
    """Print time and memory of uknowpan and of other programs on one scene, and the ratios of the times."""
    pair, output = write_scene(bench.folder, *shape_of(size)), bench.folder / "beside.tif"
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(bench.threads)
    commands = others(pair, output, bench.threads)
    start = [sys.executable, "-P", "-m", "uknowpan", "sharpen", *map(str, pair), "-o", str(output), "-q"]
    for method in BESIDE:
        wanted = [] if method == "default" else ["--method", method]
        commands[method] = [*start, "-j", str(bench.threads), *wanted]
    done = medians(commands, output, runs)
    print(f"\n{size}, median of {runs}:\n\n| program | seconds | peak MB | ratio |\n|---|---|---|---|")
    for name, (seconds, peak) in done.items():
        other = BESIDE.get(name, "")
        ratio = f"{seconds / done[other][0]:.2f} of {other}" if other in done else "-"
        print(f"| {name} | {seconds:.2f} | {peak:.0f} | {ratio} |", flush=True)
    return done


# Tables -------------------------------------------------------------------------------------------


def measured_size(bench: Bench, size: str, settings: Sequence[Setting]) -> Iterator[Measured | Difference]:
    """All settings on a scene of one size, then how far their outputs lie apart."""
    pair = write_scene(bench.folder, *shape_of(size))
    outputs = {setting: bench.folder / f"out_{i}.tif" for i, setting in enumerate(settings)}
    for setting, output in outputs.items():
        yield bench.measure(size, pair, setting, output)
    for setting, output in outputs.items():
        reference = reference_of(setting)
        if reference in outputs:
            counts = counted_differences(output, outputs[reference])
            yield difference(size, setting, reference, counts)
    for path in (*pair, *outputs.values()):
        path.unlink()


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=["2048x2048", "4096x4096"])
    parser.add_argument("--methods", nargs="+", default=[STUDENT, "brovey"])
    parser.add_argument("--devices", nargs="+", help="default: cpu, and cuda where there is one")
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--tiles", nargs="+", type=int, default=[512])
    parser.add_argument("--batches", nargs="+", type=int, default=[0], help="0: by device")
    parser.add_argument("--steps", nargs="+", type=int, default=[0], help="0: the model's")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--beside", default="3840x3840", help="size of the scene for other programs; none: leave out")
    parser.add_argument("--runs", type=int, default=3, help="runs beside other programs; their median counts")
    parser.add_argument("--store", type=Path, default=Path("runs/bench.json"))
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of()
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), arguments.threads)
        # Not imported here: torch would take memory beside the measured processes.
        gpu = run([sys.executable, "-c", CUDA_THERE])[2].strip()
        devices = arguments.devices or (["cpu", "cuda"] if gpu else ["cpu"])
        settings = settings_of(arguments, devices)
        print(
            f"{platform.machine()}, {arguments.threads} threads, {gpu or 'no GPU'}, Python "
            f"{platform.python_version()}; importing torch and rasterio alone: {bench.base:.0f} "
            f"MB\n\n{HEADER}"
        )
        runs: list[Measured] = []
        differences: list[Difference] = []
        for size in arguments.sizes:
            for item in measured_size(bench, size, settings):
                if isinstance(item, Measured):
                    print(item.row(), flush=True)
                    runs.append(item)
                else:
                    differences.append(item)
        if differences:
            print(
                "\n| PAN rows x columns | output | against | tile | batch | steps | median DN | "
                "99.9 % DN | largest DN |\n|---|---|---|---|---|---|---|---|---|"
            )
            print("\n".join(item.row() for item in differences))
        compared = {} if arguments.beside == "none" else beside(bench, arguments.beside, arguments.runs)
    arguments.store.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "threads": arguments.threads,
        "gpu": gpu,
        "torch_mb": bench.base,
        "runs": [asdict(item) for item in runs],
        "differences": [asdict(item) for item in differences],
        "beside": compared,
    }
    arguments.store.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
