"""Trust in `--uncertainty`: the share of the errors that its half-widths hold, on scenes never trained on.

    python tests/benchmarks/reliability.py runs/scenes.h5 [--split test] [--softness default] [--sharp]

Scenes are those of validate.py; the degradations of a scene that training draws are taken together.
Prints the Markdown tables behind docs/how-good.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from scipy.stats import norm
from scipy.stats import t as student_t
from torch import Tensor
from validate import (
    BORDER,
    SHARP,
    geometric_mean,
    prepare,
    ratio_of,
    seen_degradations,
    set_softness,
    softness_of,
)

from uknowpan.models.devices import tune_cpu
from uknowpan.models.sharpeners import Sharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import degrade_truth
from uknowpan.models.training.scenes import Scene, read_scenes

COVERAGES = (0.683, 0.90)
"""As `validate.py --stamp` has them."""
GOALS = ((0.64, 0.72), (0.87, 0.93))
"""Share of the pixels that 1-sigma, and a 90 % interval, are to hold in every band of every scene."""
LOOSE = ((0.60, 0.76), (0.80, 0.96))
"""The same for sensors that had no say in the widths."""
SHARES = (0.50, *COVERAGES, 0.95, 0.99)
DEGREES = 5
"""Degrees of freedom of the Student t distribution that the errors resemble."""


@dataclass(frozen=True)
class SceneReport:
    """Errors and sigmas of the `measured` pixels of one scene, all degradations together."""

    name: str
    sensor: str
    relative: Tensor
    """(C, N) ascending: absolute error over predicted 1-sigma."""
    factors: tuple[tuple[float, ...], ...]
    """Per degradation: multiples of sigma that hold the `COVERAGES`, all bands together."""
    contrast: Tensor
    """(C,) mean error where sigma is in its top tenth, over that in its lower half."""

    def held(self, multiple: float) -> Tensor:
        """(C,) share of the pixels whose error is within so many sigma."""
        bounds = torch.full((len(self.relative), 1), multiple)
        return torch.searchsorted(self.relative, bounds)[:, 0] / self.relative.shape[1]

    def needed(self, share: float) -> float:
        """Multiple of sigma that holds a share of the pixels, mean over the bands."""
        return float(self.relative[:, math.ceil(share * self.relative.shape[1]) - 1].mean())


def measured(gt: Tensor) -> Tensor:
    """(H, W) bool: neither border nor blank (0 in all bands), nor as near to blank as a border."""
    blank = (gt == 0).all(0, keepdim=True).float()
    near = torch.nn.functional.max_pool2d(blank, 2 * BORDER + 1, 1, BORDER)[0] > 0
    inner = torch.zeros_like(near)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return inner & ~near


def report(scene: Scene, sharpener: Sharpener, known: bool) -> SceneReport:
    """Sharpen a scene after each degradation, its softness known or by default, and compare with the truth."""
    ratio = ratio_of(scene)
    gt, pan = prepare(scene, ratio)
    if known:
        set_softness(sharpener, softness_of(scene, ratio))
    keep = measured(gt)
    errors, sigmas = [], []
    for degradation in seen_degradations(scene, ratio).values():
        done = sharpen_array(sharpener, pan, degrade_truth(gt, degradation))
        if done.sigma is None:
            raise SystemExit(f"{sharpener.name} predicts no sigma")
        errors.append((done.hrms - gt).abs()[:, keep])
        sigmas.append(done.sigma[:, keep])
    relative = [(e / s).flatten()[::7] for e, s in zip(errors, sigmas, strict=True)]
    error, sigma = torch.cat(errors, 1), torch.cat(sigmas, 1)
    ranked = error.gather(1, sigma.argsort(1))
    tenth, half = ranked.shape[1] // 10, ranked.shape[1] // 2
    return SceneReport(
        name=scene.name,
        sensor=scene.sensor,
        relative=(error / sigma).sort(1).values,
        factors=tuple(tuple(float(r.quantile(share)) for share in COVERAGES) for r in relative),
        contrast=ranked[:, -tenth:].mean(1) / ranked[:, :half].mean(1),
    )


def widths_by(reports: Sequence[SceneReport]) -> list[float]:
    """Multiples of sigma that `validate.py --stamp` would choose by these scenes."""
    columns = zip(*(f for r in reports for f in r.factors), strict=True)
    return [sorted(column)[len(column) // 2] for column in columns]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    print("".join(f"| {' | '.join(row)} |\n" for row in rows), flush=True)


def judged(shares: Tensor, goal: tuple[float, float]) -> str:
    """In percent, bold where the goal is missed."""
    cells = ((f"{100 * s:.1f}", goal[0] <= s <= goal[1]) for s in shares.tolist())
    return " ".join(text if met else f"**{text}**" for text, met in cells)


def verdict(shares: Sequence[Tensor], goal: tuple[float, float], loose: tuple[float, float]) -> str:
    """Number of scene-bands that meet the goals."""
    every = torch.cat(list(shares))
    counts = [f"{int(((every >= a) & (every <= b)).sum())} within {a:.0%} to {b:.0%}" for a, b in (goal, loose)]
    spread = f"from {float(every.min()):.1%} to {float(every.max()):.1%}, mean {float(every.mean()):.1%}"
    return f"of {len(every)} bands {', '.join(counts)}; {spread}"


def print_coverage(reports: Sequence[SceneReport], card: Sequence[float]) -> None:
    """Shares that the half-widths hold: the card's, those that are blind to the sensor, and the best to be had."""
    widths = {
        "the card's widths": [card for _ in reports],
        "widths without the sensor": [widths_by([o for o in reports if o.sensor != r.sensor]) for r in reports],
        "each sensor's own widths": [widths_by([o for o in reports if o.sensor == r.sensor]) for r in reports],
        "each scene's own widths": [widths_by([r]) for r in reports],
    }
    held = {k: [[r.held(m) for m in own] for r, own in zip(reports, w, strict=True)] for k, w in widths.items()}
    cells = [
        [judged(share, goal) for shares in columns for share, goal in zip(shares, GOALS, strict=True)]
        for columns in zip(*list(held.values())[:2], strict=True)
    ]
    header = ("scene", "sensor", "1-sigma holds, %", "90 % interval", "1-sigma without the sensor", "90 % interval")
    table(header, [[r.name, r.sensor, *row] for r, row in zip(reports, cells, strict=True)])
    for kind, shares in held.items():
        for name, column, goal, loose in zip(("1-sigma", "90 %"), zip(*shares, strict=True), GOALS, LOOSE, strict=True):
            print(f"{name}, {kind}: {verdict(column, goal, loose)}.\n")
    print(f"The median case needs {' and '.join(f'{m:.3f}' for m in widths_by(reports))} times the 1-sigma.\n")


def print_shape(reports: Sequence[SceneReport]) -> None:
    """Print means of the sensors: what 1-sigma holds, the widths that shares need, and how sigma ranks the errors."""
    sensors = {s: [r for r in reports if r.sensor == s] for s in dict.fromkeys(r.sensor for r in reports)}
    table(("sensor", "1-sigma holds, %"), [[s, f"{100 * fmean(float(r.held(1).mean()) for r in own):.0f}"]
                                           for s, own in sensors.items()])  # fmt: skip
    wide = [fmean(fmean(r.needed(p) for r in own) for own in sensors.values()) for p in SHARES]
    one = SHARES.index(COVERAGES[0])
    two_sided = [(1 + p) / 2 for p in SHARES]
    shapes = {"sigmas that hold it": wide, "a Gaussian's": norm.ppf(two_sided), f"Student t, {DEGREES} degrees":
              student_t.ppf(two_sided, DEGREES)}  # fmt: skip
    rows = [[name, *(f"{w / widths[one]:.2f}" for w in widths)] for name, widths in shapes.items()]
    table(("share of the pixels, over 1-sigma's", *(f"{p:.1%}" for p in SHARES)), rows)
    contrast = geometric_mean(torch.cat([r.contrast for r in reports]).tolist())
    print(f"The error where sigma is in its top tenth is {contrast:.2f} times that in the lower half.\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes")
    parser.add_argument("--model", default="generic")
    parser.add_argument("--split", default="valid", choices=("valid", "test"))
    parser.add_argument("--softness", default="own", choices=("own", "default"))
    parser.add_argument("--sharp", action="store_true", help="truths as sharp as their PAN, instead of the others")
    parser.add_argument("--only", help="comma-separated scene names")
    arguments = parser.parse_args()
    tune_cpu()
    sharpener = load_sharpener(arguments.model)
    scenes = [s for s in read_scenes(arguments.scenes, arguments.split) if s.name.endswith(SHARP) == arguments.sharp]
    if arguments.only:
        scenes = [s for s in scenes if s.name in arguments.only.split(",")]
    if len({s.sensor for s in scenes}) < 2 or sharpener.sigmas_90 is None:
        parser.error("scenes of at least two sensors are needed, and a card with both widths")
    reports = [report(scene, sharpener, arguments.softness == "own") for scene in scenes]
    print_coverage(reports, (1.0, sharpener.sigmas_90))
    print_shape(reports)


if __name__ == "__main__":
    main()
