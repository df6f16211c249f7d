"""Sharpen the six folders of real scenes and draw PAN, MS, Brovey and uknowpan side by side.

    python tests/benchmarks/scenes.py ../shared/imagery/scenes --out runs/scenes

The imagery's licences do not allow its pictures in the repository: they are for looking at.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

from uknowpan.pictures import enlarge, panels, stretch_from, write_png

SIDE, ZOOM = 240, 2


@dataclass(frozen=True)
class Case:
    """A scene, the bands to show, and where to look (row, column of the crop)."""

    folder: str
    pan: str
    ms: tuple[str, ...]
    rgb: tuple[int, int, int]
    corners: tuple[tuple[int, int], ...]


CASES = (
    Case("vhr_henan_4band", "pan", ("ms",), (2, 1, 0), ((0, 0), (300, 300), (560, 560))),
    Case(
        "landsat8_separate_bands",
        "l8_B8",
        ("l8_B2", "l8_B3", "l8_B4", "l8_B5"),
        (2, 1, 0),
        ((0, 0), (300, 300), (960, 1000)),
    ),
    Case(
        "landsat8_float_nodata",
        "pan_example",
        ("ms_example",),
        (2, 1, 0),
        ((0, 0), (200, 300), (380, 559)),
    ),
    Case("landsat8_offset_extents_3band", "pan", ("ms",), (0, 1, 2), ((0, 0), (60, 100))),
    Case(
        "quickbird_toulouse_ms_on_pan_grid",
        "QB_Toulouse_Ortho_PAN",
        ("QB_Toulouse_Ortho_XS",),
        (2, 1, 0),
        ((0, 0), (100, 100)),
    ),
    Case("rotterdam_ratio2_float64", "pan1", ("ms1",), (2, 1, 0), ((180, 180),)),
    Case("rotterdam_ratio2_float64", "pan3", ("ms3",), (2, 1, 0), ((180, 180),)),
)


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read(masked=True).astype(np.float32).filled(np.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--model", default="generic")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        files = [arguments.scenes / case.folder / f"{n}.tif" for n in (case.pan, *case.ms)]
        results = {}
        for name, option in (("uknowpan", "--model"), ("brovey", "--method")):
            target = arguments.out / f"{case.folder}_{case.pan}_{name}.tif"
            command = [sys.executable, "-m", "uknowpan", "sharpen", *map(str, files)]
            command += ["-o", str(target), "--overwrite", "--coregister", "off", "-v"]
            chosen = arguments.model if name == "uknowpan" else name
            subprocess.run([*command, option, chosen], check=True)
            results[name] = read(target)
        with rasterio.open(files[0]) as dataset:
            grid = {"dst_transform": dataset.transform, "dst_crs": dataset.crs}
            shape = dataset.shape
        bands = []
        for path in files[1:]:
            with rasterio.open(path) as dataset:
                for index in dataset.indexes:
                    band = np.full(shape, np.nan, np.float32)
                    reproject(
                        rasterio.band(dataset, index),
                        band,
                        resampling=Resampling.nearest,
                        dst_nodata=np.nan,
                        **grid,
                    )
                    bands.append(band)
        ms, pan = np.stack(bands), np.repeat(read(files[0]), 3, axis=0)
        valid = np.isfinite(ms).all(0)
        look = stretch_from(ms, valid, bands=case.rgb)
        grey = stretch_from(pan, np.isfinite(pan).all(0))
        for row, col in case.corners:
            window = (slice(None), slice(row, row + SIDE), slice(col, col + SIDE))
            sheet = [
                [("PAN", grey.apply(pan[window])), ("MS", look.apply(ms[window]))],
                [(n, look.apply(results[n][window])) for n in ("brovey", "uknowpan")],
            ]
            picture = panels([[(t, enlarge(c, ZOOM)) for t, c in line] for line in sheet])
            write_png(arguments.out / f"{case.folder}_{case.pan}_{row}_{col}.png", picture)


if __name__ == "__main__":
    main()
