"""Reduced-resolution validation of a model against the classical methods, scene by scene.

    uknowpan pack docs/recipes/generic-scenes.csv --root ../shared/imagery -o runs/scenes.h5
    python tests/benchmarks/validate.py runs/scenes.h5 --model generic

Every scene of the split "valid" is degraded in several ways (Wald's protocol), sharpened by every
method, and compared with the truth. PAN and truth lie on each other (`uknowpan pack` removed
the shift between them for all methods alike). Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict

import torch

from uknowpan_models.classical import CLASSICAL_METHODS
from uknowpan_models.data import Scene, read_scenes
from uknowpan_models.metrics import ergas, psnr, sam
from uknowpan_models.pansharpener import load_sharpener, sharpen_array
from uknowpan_models.simulate import Degradation, degrade_truth

LANDSAT_LIKE = ("Landsat", "Sentinel")
LARGEST = 512
BORDER = 8


def degradations(ratio: int, bands: int) -> dict[str, Degradation]:
    """What each scene goes through; shifts are in PAN pixels."""
    return {
        "MTF 0.30, phase +0.5": Degradation(ratio, "gaussian", (0.30,) * bands, (0.5, 0.5)),
        "MTF 0.20, nested": Degradation(ratio, "gaussian", (0.20,) * bands),
        "box mean": Degradation(ratio, "box"),
        "cubic, phase -0.7/+0.4": Degradation(ratio, "cubic", (), (-0.7, 0.4)),
    }


def prepare(scene: Scene, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth and PAN cut to whole MS pixels; a PAN from equal band weights where there is none."""
    rows, cols = (min(n, LARGEST) // (4 * ratio) * 4 * ratio for n in scene.gt.shape[-2:])
    gt = scene.gt[:, :rows, :cols]
    pan = gt.mean(0, keepdim=True) if scene.pan is None else scene.pan[:, :rows, :cols]
    return gt, pan


def inner(x: torch.Tensor) -> torch.Tensor:
    return x[..., BORDER:-BORDER, BORDER:-BORDER].double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--steps", type=int)
    parser.add_argument("--only", help="comma-separated scene names")
    arguments = parser.parse_args()
    models = arguments.model or ["generic"]
    methods = {name: load_sharpener(None, name) for name in CLASSICAL_METHODS}
    methods |= {name: load_sharpener(name, steps=arguments.steps) for name in models}

    ratios: dict[str, list[float]] = defaultdict(list)
    head = " | ".join([*(f"{m} ERGAS/SAM" for m in CLASSICAL_METHODS), *models])
    print(f"| scene | degradation | {head} | ERGAS ratio | SAM ratio | PSNR gain, dB |")
    print("|" + "---|" * (len(methods) + 5))
    for scene in read_scenes(arguments.scenes, "valid"):
        if arguments.only and scene.name not in arguments.only.split(","):
            continue
        ratio = 2 if scene.sensor.startswith(LANDSAT_LIKE) or "WorldView" in scene.sensor else 4
        gt, pan = prepare(scene, ratio)
        for name, degradation in degradations(ratio, len(gt)).items():
            ms = degrade_truth(gt, degradation)
            scores = {}
            for method, sharpener in methods.items():
                fused = inner(sharpen_array(sharpener, pan, ms).hrms)
                truth = inner(gt)
                peak = float(truth.max())
                scores[method] = tuple(
                    float(v)
                    for v in (
                        ergas(fused, truth, ratio),
                        sam(fused, truth),
                        psnr(fused, truth, peak),
                    )
                )
            best = [
                f(scores[m][i] for m in CLASSICAL_METHODS) for i, f in enumerate((min, min, max))
            ]
            relative = [scores[m][0] / best[0] for m in models]
            angles = [scores[m][1] / best[1] for m in models]
            gains = [scores[m][2] - best[2] for m in models]
            for model, r in zip(models, relative, strict=True):
                ratios[model].append(r)
            cells = [f"{scores[m][0]:.2f}/{scores[m][1]:.2f}" for m in methods]
            cells += ["/".join(f"{v:.3f}" for v in relative), "/".join(f"{v:.3f}" for v in angles)]
            cells += ["/".join(f"{v:+.2f}" for v in gains)]
            print(f"| {scene.name} | {name} | {' | '.join(cells)} |", flush=True)
    print()
    for model, values in ratios.items():
        mean = math.exp(sum(map(math.log, values)) / len(values))
        lost = sum(v > 1 for v in values)
        print(
            f"{model}: geometric mean of ERGAS / best classical ERGAS {mean:.3f}, "
            f"worst {max(values):.3f}, lost {lost} of {len(values)}"
        )


if __name__ == "__main__":
    main()
