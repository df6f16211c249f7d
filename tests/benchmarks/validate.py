"""Reduced-resolution validation of models against the classical methods, scene by scene.

    uknowpan pack docs/recipes/scenes.csv --root IMAGERY -o runs/scenes.h5
    python tests/benchmarks/validate.py runs/scenes.h5 --model generic

Every scene of the split "valid" (or "test", with --split test) is degraded in several ways (Wald's protocol), two of
them by kernels that training never draws, sharpened by every method and compared with the truth. PAN and
truth lie on each other (`uknowpan pack` removed the shift between them, for all methods alike).
With --sharp, the truths are those as sharp as their PAN, degraded in one way:

    python tests/benchmarks/validate.py runs/scenes.h5 --sharp --softness default

Prints Markdown; `--stamp FILE` writes the (one) model again with the measured calibration and
scores on its card.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from uknowpan.models.blur import estimate_psf
from uknowpan.models.checkpoints import find_checkpoint, load_model, save_checkpoint
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.denoising import StudentSharpener
from uknowpan.models.metrics.indices import ergas, psnr, sam
from uknowpan.models.resample import degrade
from uknowpan.models.sharpeners import Sharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import Degradation, degrade_truth
from uknowpan.models.training.scenes import Scene, read_scenes

COARSE_PAN = ("Landsat", "Sentinel")
"""Sensors whose MS pixel is two PAN pixels."""
LARGEST, BORDER = 512, 8
SHARP = "_sharp"
"""End of the names of scenes whose truth is as sharp as the PAN, see the kind `sharp` of `uknowpan pack`."""


@dataclass(frozen=True)
class Score:
    """One method on one degraded scene."""

    ergas: float
    sam: float
    psnr: float
    coverage: float
    """Share of pixels whose error is within the predicted 1-sigma."""


@dataclass(frozen=True)
class Row:
    """All methods on one degraded scene."""

    scene: str
    sensor: str
    degradation: str
    scores: dict[str, Score]

    def best(self) -> Score:
        """The best classical value of each index."""
        classical = [self.scores[m] for m in CLASSICAL_METHODS]
        return Score(
            min(s.ergas for s in classical),
            min(s.sam for s in classical),
            max(s.psnr for s in classical),
            math.nan,
        )


def degradations(ratio: int, bands: int) -> dict[str, Degradation]:
    """The four ways to degrade a scene; phases are in pixels of the truth."""
    return {
        "MTF 0.30, phase +0.5": Degradation(ratio, "gaussian", (0.30,) * bands, (0.5, 0.5)),
        "MTF 0.20, nested": Degradation(ratio, "gaussian", (0.20,) * bands),
        "box mean": Degradation(ratio, "box"),
        "cubic, phase -0.7/+0.4": Degradation(ratio, "cubic", (), (-0.7, 0.4)),
    }


def unseen_degradations(ratio: int) -> dict[str, Degradation]:
    """Kernels that training never draws, at phases of their own."""
    return {
        "tent, phase +1.3/-0.9": Degradation(ratio, "tent", (), (1.3, -0.9)),
        "Lanczos, phase -1.1/+0.6": Degradation(ratio, "lanczos", (), (-1.1, 0.6)),
    }


def seen_degradations(scene: Scene, ratio: int) -> dict[str, Degradation]:
    """Those of a scene by kernels that training draws; one for a truth as sharp as its PAN."""
    bands = len(scene.gt)
    if scene.name.endswith(SHARP):
        return {"MTF 0.30, nested": Degradation(ratio, "gaussian", (0.30,) * bands)}
    return degradations(ratio, bands)


def ratio_of(scene: Scene) -> int:
    """Ratio at which a scene is degraded."""
    return 2 if scene.sensor.startswith(COARSE_PAN) and not scene.name.endswith(SHARP) else 4


def prepare(scene: Scene, ratio: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Truth and PAN cut to whole MS pixels; a PAN from equal band weights where there is none."""
    rows, cols = (min(n, LARGEST) // (4 * ratio) * 4 * ratio for n in scene.gt.shape[-2:])
    gt = scene.gt[:, :rows, :cols]
    pan = gt.mean(0, keepdim=True) if scene.pan is None else scene.pan[:, :rows, :cols]
    return gt, pan


def score(sharpener: Sharpener, pan: torch.Tensor, ms: torch.Tensor, gt: torch.Tensor, ratio: int) -> Score:
    """Sharpen and compare, the border left out."""
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    done = sharpen_array(sharpener, pan, ms)
    fused, truth = done.hrms[inner].double(), gt[inner].double()
    coverage = math.nan
    if done.sigma is not None:
        coverage = float(((fused - truth).abs() < done.sigma[inner]).double().mean())
    peak = float(truth.max())
    return Score(
        float(ergas(fused, truth, ratio)),
        float(sam(fused, truth)),
        float(psnr(fused, truth, peak)),
        coverage,
    )


def set_softness(sharpener: Sharpener, softness: float) -> None:
    """Give a model the softness of the truth, if it takes one."""
    if isinstance(sharpener, StudentSharpener) and sharpener.takes_softness:
        sharpener.softness = softness


def softness_of(scene: Scene, ratio: int) -> float:
    """Softness of a scene's truth against its PAN, which `uknowpan info` measures on the original pair."""
    gt, pan = prepare(scene, ratio)
    return estimate_psf([(pan, gt)], 1).sigma


def better(one: Score, other: Score) -> Score:
    """The better value of each index."""
    return Score(min(one.ergas, other.ergas), min(one.sam, other.sam), max(one.psnr, other.psnr), math.nan)


def measure(
    scenes: Sequence[Scene], methods: dict[str, Sharpener], softness: str = "own", blur_pan: bool = False
) -> Iterator[Row]:
    """Scores of every method on every scene and degradation.

    Args:
        softness: "own" for that of each truth, "default", or a number.
        blur_pan: a classical method may also take the PAN blurred as soft as the truth; the better score counts.
    """
    for scene in scenes:
        ratio = ratio_of(scene)
        gt, pan = prepare(scene, ratio)
        known = softness_of(scene, ratio)
        if softness != "default":
            for sharpener in methods.values():
                set_softness(sharpener, known if softness == "own" else float(softness))
        soft_pan = degrade(pan[None], 1, known, (0.0, 0.0))[0]
        unseen = {} if scene.name.endswith(SHARP) else unseen_degradations(ratio)
        for name, degradation in (seen_degradations(scene, ratio) | unseen).items():
            ms = degrade_truth(gt, degradation)
            scores = {m: score(s, pan, ms, gt, ratio) for m, s in methods.items()}
            for m in CLASSICAL_METHODS if blur_pan else ():
                scores[m] = better(scores[m], score(methods[m], soft_pan, ms, gt, ratio))
            yield Row(scene.name, scene.sensor, name, scores)


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(rows: Sequence[Row], model: str) -> dict[str, float | int]:
    """A model against the best classical method, chosen anew for each row."""
    relative = [r.scores[model].ergas / r.best().ergas for r in rows]
    angles = [r.scores[model].sam / r.best().sam for r in rows]
    gains = [r.scores[model].psnr - r.best().psnr for r in rows]
    return {
        "cases": len(rows),
        "scenes": len({r.scene for r in rows}),
        "sensors": len({r.sensor for r in rows}),
        "ergas_ratio_geometric_mean": round(geometric_mean(relative), 3),
        "ergas_ratio_worst": round(max(relative), 3),
        "ergas_lost": sum(v > 1 for v in relative),
        "sam_ratio_geometric_mean": round(geometric_mean(angles), 3),
        "sam_lost": sum(v > 1 for v in angles),
        "psnr_gain_mean_db": round(sum(gains) / len(gains), 2),
        "coverage_1_sigma": round(sum(r.scores[model].coverage for r in rows) / len(rows), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes")
    parser.add_argument("--model", action="append", default=[], help="may be repeated")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--softness", default="own", help="own (that of each truth), default, or a number")
    parser.add_argument("--blur-pan", action="store_true", help="classical methods get a PAN as soft as the truth, too")
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    parser.add_argument("--sharp", action="store_true", help="truths as sharp as their PAN, instead of the others")
    parser.add_argument("--only", help="comma-separated scene names")
    parser.add_argument("--stamp", help="write the model with calibration and scores here")
    arguments = parser.parse_args()
    models = arguments.model or ["generic"]
    methods: dict[str, Sharpener] = {m: load_sharpener(None, m) for m in CLASSICAL_METHODS}
    methods |= {name: load_sharpener(name, steps=arguments.steps) for name in models}
    scenes = [s for s in read_scenes(arguments.scenes, arguments.split) if s.name.endswith(SHARP) == arguments.sharp]
    if arguments.only:
        scenes = [s for s in scenes if s.name in arguments.only.split(",")]

    rows = []
    print("| scene | degradation | " + " | ".join(methods) + " | ERGAS ratio | SAM ratio |")
    print("|" + "---|" * (len(methods) + 4))
    for row in measure(scenes, methods, arguments.softness, arguments.blur_pan):
        rows.append(row)
        best = row.best()
        cells = [f"{s.ergas:.2f} / {s.sam:.2f}" for s in row.scores.values()]
        cells.append(" / ".join(f"{row.scores[m].ergas / best.ergas:.3f}" for m in models))
        cells.append(" / ".join(f"{row.scores[m].sam / best.sam:.3f}" for m in models))
        print(f"| {row.scene} | {row.degradation} | {' | '.join(cells)} |", flush=True)
    print("\n| sensor | cases | " + " | ".join(f"ERGAS ratio, {m}" for m in models) + " |")
    print("|" + "---|" * (len(models) + 2))
    for sensor in dict.fromkeys(r.sensor for r in rows):
        own = [r for r in rows if r.sensor == sensor]
        cells = [f"{summary(own, m)['ergas_ratio_geometric_mean']:.3f}" for m in models]
        print(f"| {sensor} | {len(own)} | {' | '.join(cells)} |")
    unseen = [r for r in rows if r.degradation in unseen_degradations(4)]
    seen = [r for r in rows if r not in unseen]
    for kind, part in (("training's kernels", seen), ("kernels new to it", unseen)):
        print(f"\n{kind}")
        for model in models if part else ():
            print(f"{model}: {summary(part, model)}")
    if arguments.stamp:
        stamp(models[0], arguments.stamp, seen, unseen, scenes)


def stamp(model: str, target: str, seen: Sequence[Row], unseen: Sequence[Row], scenes: Sequence[Scene]) -> None:
    """Write the model with its scores, and with widths that hold 68 and 90 % of the pixels' errors.

    The widths are quantiles over the very validation scenes, so the coverage printed for them
    afterwards is no independent evidence.
    """
    network, card = load_model(find_checkpoint(model))
    sharpener = load_sharpener(model)
    factors: tuple[list[float], ...] = ([], [])
    for scene in scenes:
        ratio = ratio_of(scene)
        gt, pan = prepare(scene, ratio)
        set_softness(sharpener, softness_of(scene, ratio))
        for degradation in seen_degradations(scene, ratio).values():
            done = sharpen_array(sharpener, pan, degrade_truth(gt, degradation))
            assert done.sigma is not None
            relative = ((done.hrms - gt).abs() / done.sigma)[..., BORDER:-BORDER, BORDER:-BORDER]
            for found, share in zip(factors, (0.683, 0.90), strict=True):
                found.append(float(relative.flatten()[::7].quantile(share)))
    one, wide = (sorted(found)[len(found) // 2] for found in factors)
    scale, sigmas_90 = card.sigma_scale * one, wide / one
    scores = {
        "against": "best of bicubic, weighted Brovey, GSA, MTF-GLP, AWLP, case by case",
        "command": "python tests/benchmarks/validate.py runs/scenes.h5",
        "softness": "known: that of each truth against its PAN",
        **summary(seen, model),
        "unseen_kernels": summary(unseen, model),
    }
    save_checkpoint(
        target,
        network,
        replace(
            card,
            name=Path(target).stem,
            sigma_scale=round(scale, 4),
            sigmas_90=round(sigmas_90, 3),
            scores={"reduced_resolution": scores},
            limits=(
                "Trained on reduced-resolution simulations. Colours that PAN does not show keep the MS's sharpness. "
                "Moving objects and clouds show the time lag between the bands. Look before measuring: sharpened "
                "bands are no calibrated radiometry."
            ),
        ),
    )
    print(f"\nwritten: {target}, sigma scale {scale:.3f}, 90 % within {sigmas_90:.2f} sigma")


if __name__ == "__main__":
    main()
