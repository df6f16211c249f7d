"""Both judges on real pairs at their own resolution, and what they make of more or less detail.

    python tests/benchmarks/judges.py IMAGERY [--model NAME] [--sweep]

IMAGERY holds pairs/NAME_pan.tif and pairs/NAME_ms.tif. The middle of each pair is sharpened by every classical method
and the model. Prints the indices by reprojection (registered, the scene's own blur) and the errors on the coarse twin,
as `uknowpan compare` does. --sweep scores the model's result with 60 to 120 % of the detail that it injected.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import rasterio
from rasterio.windows import Window

import uknowpan
from uknowpan.evaluation.comparing import Comparison, compare
from uknowpan.options import SharpenOptions

PAIRS = (
    *("pleiades_urban", "spot6_cropland", "gf2_full_4", "landsat7_37", "landsat7_38", "landsat7_39"),
    *("vhr_melbourne_2", "vhr_rural_u8_1", "wv3_shanghai"),
)
SIDE = 512
"""PAN pixels along a side of the part that is scored."""
INDICES = ("sharp_ergas", "sharp_sam", "hqnr", "r_ergas", "r_sam", "r_q2n", "d_rho", "d_rho_excess", "colour_grain")
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def crop(source: Path, target: Path, side: int) -> None:
    """Write the middle of a raster, `side` pixels along each side."""
    with rasterio.open(source) as dataset:
        shape = [min(side, n) for n in dataset.shape]
        row, col = ((n - part) // 2 // 8 * 8 * side // SIDE for n, part in zip(dataset.shape, shape, strict=True))
        window = Window(col, row, shape[1], shape[0])
        profile = dataset.profile | {"height": shape[0], "width": shape[1], "tiled": False}
        profile["transform"] = dataset.window_transform(window)
        for key in ("blockxsize", "blockysize"):
            profile.pop(key, None)
        with rasterio.open(target, "w", **profile) as out:
            out.write(dataset.read(window=window))


def sweep(comparison: Comparison, pan: str, ms: str) -> list[tuple[float, float, float]]:
    """(share of the detail, R-Q2n, d_rho_excess) of the model's result."""
    lms, hrms = comparison.entries[0].hrms, comparison.entries[-1].hrms
    rows = []
    for share in SHARES:
        scores = uknowpan.evaluate(lms + share * (hrms - lms), pan=pan, ms=ms, reprojection=True)
        scores = scores["reprojection"].get("registered", scores["reprojection"]["registered_nominal"])
        rows.append((share, scores["r_q2n"], scores["d_rho_excess"]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("imagery", type=Path)
    parser.add_argument("--model", default="generic")
    parser.add_argument("--only", nargs="*", default=PAIRS)
    parser.add_argument("--sweep", action="store_true")
    asked = parser.parse_args()
    print(f"| pair | method | {' | '.join(INDICES)} |\n|{'---|' * (len(INDICES) + 2)}")
    ratios: dict[str, list[float]] = {}
    sweeps = {}
    for name in asked.only:
        with TemporaryDirectory() as folder:
            paths = [str(Path(folder) / f"{kind}.tif") for kind in ("pan", "ms")]
            sources = [asked.imagery / "pairs" / f"{name}_{kind}.tif" for kind in ("pan", "ms")]
            with rasterio.open(sources[0]) as fine, rasterio.open(sources[1]) as coarse:
                ratio = round(fine.width / coarse.width)
            for source, path, side in zip(sources, paths, (SIDE, SIDE // ratio), strict=True):
                crop(source, Path(path), side)
            with rasterio.open(paths[0]) as fine:
                whole = SharpenOptions(bounds=tuple(fine.bounds))
            comparison = compare(paths[0], paths[1:], whole, [asked.model], lambda *state: None)
            if asked.sweep:
                sweeps[name] = sweep(comparison, *paths)
        for entry in comparison.entries:
            cells = [f"{entry.scores[index]:.3f}" if index in entry.scores else "" for index in INDICES]
            print(f"| {name} | {entry.name} | {' | '.join(cells)} |", flush=True)
        gsa = next(entry for entry in comparison.entries if entry.name == "gsa").scores["r_ergas"]
        for entry in comparison.entries:
            ratios.setdefault(entry.name, []).append(entry.scores["r_ergas"] / gsa)
    print("\nR-ERGAS over GSA's, geometric mean of the pairs:")
    for method, values in ratios.items():
        print(f"  {method}: {np.exp(np.mean(np.log(values))):.3f} (best {min(values):.2f}, worst {max(values):.2f})")
    for name, rows in sweeps.items():
        best = max(rows, key=lambda row: row[1] * (1 - row[2]))[0]
        cells = " ".join(f"{share:.0%}: {q:.4f}/{excess:.4f}" for share, q, excess in rows)
        print(f"{name}: R-Q2n/d_rho_excess {cells}; their product peaks at {best:.0%}")


if __name__ == "__main__":
    main()
