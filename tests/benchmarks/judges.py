"""Both judges on real pairs at their own resolution, and what they make of more or less detail.

    python tests/benchmarks/judges.py IMAGERY [--model NAME] [--sweep]

IMAGERY holds pairs/NAME_pan.tif and pairs/NAME_ms.tif. The middle of each pair is sharpened by every classical method
and the model. Prints the indices by reprojection (registered, the scene's own blur) and the scores on the coarse twin
with those of its truth, as `uknowpan compare` does. --sweep scores the model's result with 60 to 120 % of the detail
that it injected.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.windows import Window

from uknowpan.evaluation.comparing import Comparison, compare
from uknowpan.evaluation.reprojection import ways_of_image
from uknowpan.models.metrics.images import whole_images
from uknowpan.options import SharpenOptions

PAIRS = (
    *("pleiades_urban", "spot6_cropland", "gf2_full_4", "landsat7_37", "landsat7_38", "landsat7_39"),
    *("vhr_melbourne_2", "vhr_rural_u8_1", "wv3_shanghai"),
)
SIDE = 512
"""PAN pixels along a side of the part that is scored."""
TWIN = ("sharp_ergas", "sharp_sam", "sharp_d_rho", "sharp_d_rho_excess", "sharp_colour_grain")
INDICES = (*TWIN, "hqnr", "r_ergas", "r_sam", "r_q2n", "d_rho", "d_rho_excess", "colour_grain")
NOMINAL = 0.3
"""MTF gain where a pair does not show its blur."""
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)


def middle(pan: Path) -> tuple[Window, tuple[float, float, float, float]]:
    """The middle of a raster, up to `SIDE` pixels along each side, and its bounds."""
    with rasterio.open(pan) as dataset:
        shape = [min(SIDE, n) for n in dataset.shape]
        row, col = ((n - part) // 2 // 8 * 8 for n, part in zip(dataset.shape, shape, strict=True))
        window = Window(col, row, shape[1], shape[0])
        return window, rasterio.windows.bounds(window, dataset.transform)


def read(path: Path, window: Window, ratio: int) -> torch.Tensor:
    """A window of PAN pixels of a raster whose pixels are `ratio` times as large."""
    part = Window(*(value // ratio for value in (window.col_off, window.row_off, window.width, window.height)))
    with rasterio.open(path) as dataset:
        return torch.from_numpy(dataset.read(window=part).astype(np.float64))


def sweep(comparison: Comparison, pan: torch.Tensor, ms: torch.Tensor) -> list[tuple[float, float, float]]:
    """(share of the detail, R-Q2n, d_rho_excess) of the model's result."""
    lms, hrms = (torch.from_numpy(entry.hrms) for entry in (comparison.entries[0], comparison.entries[-1]))
    ways = ways_of_image(pan, ms, [NOMINAL] * len(lms), brief=True)
    rows = []
    for share in SHARES:
        (scores,) = ways.judge(whole_images(lms + share * (hrms - lms), pan, ms)).scores.values()
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
        pan, ms = (asked.imagery / "pairs" / f"{name}_{kind}.tif" for kind in ("pan", "ms"))
        window, bounds = middle(pan)
        comparison = compare(str(pan), [str(ms)], SharpenOptions(bounds=bounds), [asked.model], lambda *state: None)
        if asked.sweep:
            sweeps[name] = sweep(comparison, read(pan, window, 1), read(ms, window, comparison.ratio))
        for method, scores in {"truth": comparison.truth, **{e.name: e.scores for e in comparison.entries}}.items():
            cells = [f"{scores[index]:.3f}" if index in scores else "" for index in INDICES]
            print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)
        for share, q, excess in sweeps.get(name, []):
            print(f"{name} {share:.0%}: R-Q2n {q:.4f}, excess {excess:.4f}, product {q * (1 - excess):.4f}", flush=True)
        gsa = next(entry for entry in comparison.entries if entry.name == "gsa").scores["r_ergas"]
        for entry in comparison.entries:
            ratios.setdefault(entry.name, []).append(entry.scores["r_ergas"] / gsa)
    print("\nR-ERGAS over GSA's, geometric mean of the pairs:")
    for method, values in ratios.items():
        print(f"  {method}: {np.exp(np.mean(np.log(values))):.3f} (best {min(values):.2f}, worst {max(values):.2f})")
    for name, rows in sweeps.items():
        peaks = [max(rows, key=lambda row: key(row))[0] for key in (lambda r: r[1], lambda r: r[1] * (1 - r[2]))]
        print(f"{name}: R-Q2n peaks at {peaks[0]:.0%}, R-Q2n (1 - d_rho_excess) at {peaks[1]:.0%}")


if __name__ == "__main__":
    main()
