"""Does the result depend on how the scene was cut, or on being killed? On a real scene.

    python tests/benchmarks/invariance.py PAN.tif MS.tif --kills 6

Sharpens with tiles of 128, 256 and 512 PAN pixels and batches of 1 and 8 and compares pixel by
pixel; then kills runs with SIGKILL at moments spread over their duration, resumes them, and
compares the files' pixels with those of the undisturbed run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import rasterio


def command(pan: str, ms: str, target: Path, *options: str) -> list[str]:
    base = [sys.executable, "-m", "uknowpan", "sharpen", pan, ms, "-o", str(target), "-q"]
    return [*base, *options]


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read().astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pan")
    parser.add_argument("ms")
    parser.add_argument("--kills", type=int, default=6)
    arguments = parser.parse_args()
    pair = (arguments.pan, arguments.ms)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference, first = None, ""
        for tile in (128, 256, 512):
            for batch in (1, 8):
                target = folder / f"{tile}_{batch}.tif"
                options = ("--tile", str(tile), "--batch-size", str(batch))
                subprocess.run(command(*pair, target, *options), check=True)
                image = read(target)
                if reference is None:
                    reference, first = image, f"tile {tile}, batch {batch}"
                    continue
                apart = np.abs(image - reference)
                print(
                    f"tile {tile}, batch {batch} against {first}: largest difference "
                    f"{apart.max():g}, differing {np.count_nonzero(apart.max(0))} of "
                    f"{apart[0].size} pixels",
                    flush=True,
                )
        options = ("--tile", "128")
        began = time.monotonic()
        subprocess.run(command(*pair, folder / "whole.tif", *options), check=True)
        duration, whole = time.monotonic() - began, read(folder / "whole.tif")
        for i in range(arguments.kills):
            target = folder / f"killed_{i}.tif"
            moment = duration * (i + 1) / (arguments.kills + 1)
            run = subprocess.Popen(command(*pair, target, *options))
            time.sleep(moment)
            run.kill()
            run.wait()
            early = target.exists()
            strips = len(list(Path(f"{target}.part").glob("image-*.npy")))
            resumed = command(*pair, target, *options, "--resume", "--overwrite")
            subprocess.run(resumed, check=True)
            same = np.array_equal(read(target), whole)
            left = [p.name for p in folder.iterdir() if p.name.startswith((".", f"{target.name}."))]
            print(
                f"killed after {moment:.1f} of {duration:.1f} s with {strips} strips kept, file "
                f"there then: {early}; resumed result identical: {same}; left over: {left}",
                flush=True,
            )


if __name__ == "__main__":
    main()
