"""Speed and memory of `uknowpan sharpen` on made-up scenes; prints Markdown, stores JSON.

    make bench          (or: python tests/benchmarks/bench.py --sizes 1024x1024 2048x2048)

Every run is a process of its own; its peak memory is what the operating system reports for it,
less that of a process that only imports torch. Sizes are rows x columns of the PAN; the scene has
4 bands, uint16, ratio 4.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from uknowpan_cli.demo_scene import make_demo_scene

TORCH_ONLY = "import torch, rasterio, numpy; torch.ones(8).sum()"


def run(command: list[str]) -> tuple[float, float, str]:
    """(seconds, peak MB, stdout) of a process; a failing one stops the benchmark."""
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"{' '.join(command)} failed")
        out.seek(0)
        return seconds, usage.ru_maxrss / 1024, out.read()


def write_scene(folder: Path, rows: int, cols: int) -> tuple[Path, Path]:
    """A PAN/MS pair of any size, the demo scene repeated; written strip by strip."""
    scene = make_demo_scene(size=512, seed=7)
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


def network_alone(threads: int, tile: int) -> float:
    """Mpx of PAN per second of the default student on one tile in memory."""
    code = f"""
import time, torch
torch.set_num_threads({threads}); torch.set_flush_denormal(True)
from uknowpan_models.pansharpener import load_sharpener
from uknowpan_models.statistics import scene_statistics
s = load_sharpener(None)
g = torch.Generator().manual_seed(0)
r = 4
pan = torch.rand(1, {tile} + 512, {tile} + 512, generator=g)
ms = torch.nn.functional.avg_pool2d(pan, r).repeat(4, 1, 1)
st = scene_statistics([(pan, ms)], r)
m = s.margin(st); n = {tile} // r + 2 * m
p, q = pan[None, :, :n * r, :n * r], ms[None, :, :n, :n]
s.sharpen(p, q, st, [(0, 0)])
k = 4; t = time.monotonic()
for _ in range(k): s.sharpen(p, q, st, [(0, 0)])
print(k * {tile} ** 2 / 1e6 / (time.monotonic() - t))
"""
    return float(run([sys.executable, "-c", code])[2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["2048x2048", "4096x4096", "16384x4096"])
    parser.add_argument("--tiles", nargs="+", type=int, default=[512])
    parser.add_argument("--methods", nargs="+", default=["student", "brovey"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--store", type=Path, default=Path("runs/bench.json"))
    arguments = parser.parse_args()
    _, base, _ = run([sys.executable, "-c", TORCH_ONLY])
    results = []
    print(f"{platform.machine()}, {arguments.threads} threads, Python {platform.python_version()}")
    print(f"importing torch and rasterio alone: {base:.0f} MB\n")
    print("| PAN rows x columns | method | tile | seconds | Mpx/s | peak MB beyond torch |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in arguments.sizes:
            rows, cols = (int(n) for n in size.split("x"))
            pan, ms = write_scene(folder, rows, cols)
            for method in arguments.methods:
                for tile in arguments.tiles:
                    target = folder / "out.tif"
                    command = [sys.executable, "-m", "uknowpan_cli", "sharpen", str(pan), str(ms)]
                    command += ["-o", str(target), "--overwrite", "-q", "--json"]
                    command += ["--tile", str(tile), "-j", str(arguments.threads)]
                    command += [] if method == "student" else ["--method", method]
                    seconds, peak, _ = run(command)
                    entry = {
                        "size": size,
                        "method": method,
                        "tile": tile,
                        "seconds": round(seconds, 2),
                        "mpx_per_second": round(rows * cols / 1e6 / seconds, 3),
                        "peak_mb_beyond_torch": round(peak - base, 1),
                    }
                    results.append(entry)
                    print("| " + " | ".join(str(v) for v in entry.values()) + " |", flush=True)
            pan.unlink()
            ms.unlink()
    alone = {tile: round(network_alone(arguments.threads, tile), 3) for tile in arguments.tiles}
    print(f"\nthe sharpener alone, one tile in memory, Mpx/s by tile: {alone}")
    arguments.store.parent.mkdir(parents=True, exist_ok=True)
    stored = {"threads": arguments.threads, "torch_mb": base, "runs": results, "alone": alone}
    arguments.store.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
