"""Two of the experiments of docs/experiments.md.

    python tests/benchmarks/experiments.py consistency runs/scenes.h5 [--model FILE] [--only NAMES]
    python tests/benchmarks/experiments.py full-resolution ../shared/imagery [--model FILE]

The first prints ERGAS after one, two, three passes of `sharpen --consistency` over that before,
the second HQNR of pairs at full resolution whose shift was removed before, for all methods alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from validate import COARSE_PAN, degradations, prepare

from uknowpan_cli.pipeline import survey
from uknowpan_models.classical import CLASSICAL_METHODS
from uknowpan_models.data import read_scenes
from uknowpan_models.metrics import ergas, full_resolution
from uknowpan_models.pansharpener import load_sharpener, sharpen_array
from uknowpan_models.resample import upsample
from uknowpan_models.runtime import tune_cpu
from uknowpan_models.simulate import degrade_truth
from uknowpan_tiling import open_pair

SIDE, BORDER = 256, 8
MS_SIDE, RIM = 128, 32
LEAST_VALUE = 300
"""Values below are multiplied by 8: Q2n rounds to whole numbers."""

PAIRS = (
    *("spot6_cropland", "pleiades_urban", "vhr_melbourne_2"),
    *("gf2_full_0", "gf2_full_2", "gf2_full_4", "landsat7_37"),
)
HENAN = "scenes/vhr_henan_4band"


def consistency(path: str, model: str, only: list[str] | None) -> None:
    sharpeners = [load_sharpener(model, consistency=passes) for passes in range(4)]
    for scene in read_scenes(path, "valid"):
        if only and scene.name not in only:
            continue
        ratio = 2 if scene.sensor.startswith(COARSE_PAN) else 4
        gt, pan = (x[:, :SIDE, :SIDE] for x in prepare(scene, ratio))
        for name, degradation in degradations(ratio, len(gt)).items():
            ms = degrade_truth(gt, degradation)
            inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
            found = [
                float(ergas(sharpen_array(s, pan, ms).hrms[inner].double(), gt[inner].double()))
                for s in sharpeners
            ]
            passes = ", ".join(f"{value / found[0]:.2f}" for value in found[1:])
            print(f"| {scene.name} | {name} | {passes} |", flush=True)


def full(images: Path, model: str) -> None:
    methods = {name: load_sharpener(None, name) for name in CLASSICAL_METHODS}
    methods["student"] = load_sharpener(model)
    methods["student, --consistency 1"] = load_sharpener(model, consistency=1)
    print(f"| scene | {' | '.join(methods)} |")
    print("|---" * (len(methods) + 1) + "|")
    files = {
        name: (f"{images}/pairs/{name}_pan.tif", f"{images}/pairs/{name}_ms.tif") for name in PAIRS
    }
    files["henan"] = (f"{images}/{HENAN}/pan.tif", f"{images}/{HENAN}/ms.tif")
    for name, (pan_file, ms_file) in files.items():
        with open_pair(pan_file, [ms_file]) as pair:
            dy, dx = survey(pair).offset or (0.0, 0.0)
        with open_pair(pan_file, [ms_file], shift=(round(-dy, 3), round(-dx, 3))) as pair:
            h, w = pair.frame_shape
            side = min(h, w, MS_SIDE) // 32 * 32
            arrays = pair.read_frame((h - side) // 2, (w - side) // 2, side, side)
            ratio = pair.ratio
        pan, ms = torch.from_numpy(arrays.pan).float(), torch.from_numpy(arrays.ms).float()
        lms = upsample(ms[None], ratio)[0]
        unit = 8 if max(float(pan.max()), float(ms.max())) < LEAST_VALUE else 1
        inner = (slice(None), slice(RIM, -RIM), slice(RIM, -RIM))
        cells = []
        for method in methods.values():
            fused = sharpen_array(method, pan, ms).hrms.clamp_min(0)
            scores = full_resolution(
                fused[inner] * unit, lms[inner] * unit, pan[inner] * unit, [0.3] * len(ms),
                ratio=ratio,
            )  # fmt: skip
            cells.append(f"{float(scores.hqnr):.3f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["consistency", "full-resolution"])
    parser.add_argument("data")
    parser.add_argument("--model", default="generic")
    parser.add_argument("--only", help="comma-separated scene names")
    arguments = parser.parse_args()
    tune_cpu()
    if arguments.what == "consistency":
        only = arguments.only.split(",") if arguments.only else None
        consistency(arguments.data, arguments.model, only)
    else:
        full(Path(arguments.data), arguments.model)


if __name__ == "__main__":
    main()
