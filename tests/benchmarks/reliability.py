"""Trust in the predicted 1-sigma, on scenes never trained on.

    python tests/benchmarks/reliability.py runs/scenes.h5 [--model FILE]

Scenes and degradations are those of validate.py, the four degradations of a scene taken together.
Prints the Markdown tables behind docs/how-good.md.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median

import torch
from torch import Tensor
from validate import (
    BORDER,
    COARSE_PAN,
    SHARP,
    degradations,
    geometric_mean,
    prepare,
    set_softness,
    softness_of,
)

from uknowpan.models.blur import DETAIL_WINDOW
from uknowpan.models.devices import tune_cpu
from uknowpan.models.resample import box_mean
from uknowpan.models.sharpeners import Sharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import degrade_truth
from uknowpan.models.training.scenes import Scene, read_scenes

ONE_SIGMA = 0.683
"""As `validate.py --stamp` has it."""
GOAL = (0.60, 0.76)
"""Share of the pixels that 1-sigma is to hold, in every band of every scene."""
LEAST_CONTRAST = 3.0
"""Error where sigma is largest over that where it is small, see `contrast`."""
SHARES = (0.50, ONE_SIGMA, 0.80, 0.90, 0.95, 0.99)
DECILES = 10


@dataclass(frozen=True)
class SceneReport:
    """Errors and sigmas of the `measured` pixels of one scene, all degradations together."""

    name: str
    sensor: str
    relative: Tensor
    """(C, N) ascending: absolute error over predicted 1-sigma."""
    factors: tuple[float, ...]
    """By what sigma would have to be multiplied to be 1-sigma, all bands; one per degradation."""
    mean_error: Tensor
    """(C, 10) mean absolute error per decile of sigma, over the detail contrast of the truth."""
    rms_error: Tensor
    """(C, 10) root mean square error of the same."""
    rms_sigma: Tensor
    """(C, 10) root mean square sigma of the same."""

    def held(self, multiple: float) -> Tensor:
        """(C,) share of the pixels whose error is within so many sigma."""
        bounds = torch.full((len(self.relative), 1), multiple)
        return torch.searchsorted(self.relative, bounds)[:, 0] / self.relative.shape[1]

    def needed(self, share: float) -> float:
        """Multiple of sigma that holds a share of the pixels, mean over the bands."""
        return float(self.relative[:, math.ceil(share * self.relative.shape[1]) - 1].mean())


Figure = Callable[[SceneReport], float]
Line = list[tuple[float, float]]


def multiple_of(nominal: float) -> float:
    """Sigmas within which a Gaussian error lies with the nominal probability."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(nominal, dtype=torch.float64)))


def contrast(errors: Tensor, power: int) -> Tensor:
    """(C,) error in the top decile of sigma over that in its lower half.

    Args:
        errors: (C, 10) as in `SceneReport`.
        power: 1 for mean absolute, 2 for root mean square errors.
    """
    low = (errors[:, : DECILES // 2] ** power).mean(1) ** (1 / power)
    return errors[:, -1] / low


def measured(gt: Tensor) -> Tensor:
    """(H, W) bool: neither border nor blank (0 in all bands), nor as near to blank as a border."""
    blank = (gt == 0).all(0, keepdim=True).float()
    near = torch.nn.functional.max_pool2d(blank, 2 * BORDER + 1, 1, BORDER)[0] > 0
    inner = torch.zeros_like(near)
    inner[BORDER:-BORDER, BORDER:-BORDER] = True
    return inner & ~near


def report(scene: Scene, sharpener: Sharpener) -> SceneReport:
    """Sharpen a scene after each degradation and compare with the truth."""
    ratio = 2 if scene.sensor.startswith(COARSE_PAN) else 4
    gt, pan = prepare(scene, ratio)
    set_softness(sharpener, softness_of(scene, ratio))
    keep = measured(gt)
    errors, sigmas = [], []
    for degradation in degradations(ratio, len(gt)).values():
        done = sharpen_array(sharpener, pan, degrade_truth(gt, degradation))
        if done.sigma is None:
            raise SystemExit(f"{sharpener.name} predicts no sigma")
        errors.append((done.hrms - gt).abs()[:, keep])
        sigmas.append(done.sigma[:, keep])
    factors = [float((e / s).flatten()[::7].quantile(ONE_SIGMA)) for e, s in zip(errors, sigmas, strict=True)]
    error, sigma = torch.cat(errors, 1), torch.cat(sigmas, 1)
    detail = gt - box_mean(gt[None], DETAIL_WINDOW * ratio // 2 * 2 + 1)[0]
    unit = detail[:, keep].std(1, keepdim=True)
    order = sigma.argsort(1)

    def per_decile(x: Tensor, power: int) -> Tensor:
        parts = (x / unit).gather(1, order).double().tensor_split(DECILES, 1)
        return torch.stack([(part**power).mean(1) ** (1 / power) for part in parts], 1)

    return SceneReport(
        name=scene.name,
        sensor=scene.sensor,
        relative=(error / sigma).sort(1).values,
        factors=tuple(factors),
        mean_error=per_decile(error, 1),
        rms_error=per_decile(error, 2),
        rms_sigma=per_decile(sigma, 2),
    )


def scale_without(reports: Sequence[SceneReport], sensor: str) -> float:
    """Factor that `validate.py --stamp` would give sigma without the scenes of a sensor."""
    factors = sorted(f for r in reports if r.sensor != sensor for f in r.factors)
    return factors[len(factors) // 2]


def per_sensor(reports: Sequence[SceneReport], figure: Figure) -> dict[str, float]:
    """A figure of the scenes, averaged over those of each sensor."""
    sensors = dict.fromkeys(r.sensor for r in reports)
    return {s: fmean(figure(r) for r in reports if r.sensor == s) for s in sensors}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"| {' | '.join(header)} |\n{'|---' * len(header)}|")
    print("".join(f"| {' | '.join(row)} |\n" for row in rows), flush=True)


def percent(shares: Tensor) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares.tolist())


def judged(shares: Tensor) -> str:
    """As `percent` with a decimal, bold where the goal is missed."""
    cells = ((f"{100 * s:.1f}", GOAL[0] <= s <= GOAL[1]) for s in shares.tolist())
    return " ".join(text if met else f"**{text}**" for text, met in cells)


def verdict(shares: Sequence[Tensor]) -> str:
    """Number of scene-bands that meet the goal."""
    every = torch.cat(list(shares))
    low, high = GOAL
    met = (every >= low) & (every <= high)
    return (
        f"{int(met.sum())} of {len(every)} bands within {low:.0%} to {high:.0%}, "
        f"{int((every < low).sum())} below, {int((every > high).sum())} above; "
        f"from {float(every.min()):.1%} to {float(every.max()):.1%}, "
        f"mean {float(every.mean()):.1%}"
    )


def print_coverage(reports: Sequence[SceneReport]) -> None:
    """Shares within 1 and 2 sigma, with the card's scale and with one blind to the sensor."""
    scales = {r.sensor: scale_without(reports, r.sensor) for r in reports}
    own, blind = (
        multiple_of(ONE_SIGMA),
        [scales[r.sensor] * multiple_of(ONE_SIGMA) for r in reports],
    )
    header = (
        *("scene", "sensor", "within 1 sigma, %", "within 2 sigma, %"),
        *("scale without the sensor", "within 1 sigma then, %", "scale it needs"),
    )
    rows = [
        [
            *(r.name, r.sensor, judged(r.held(own)), percent(r.held(2 * own))),
            *(f"{scales[r.sensor]:.3f}", judged(r.held(wide)), f"{median(r.factors):.2f}"),
        ]
        for r, wide in zip(reports, blind, strict=True)
    ]
    table(header, rows)
    print(f"1 sigma, the card's scale: {verdict([r.held(own) for r in reports])}.\n")
    without = [r.held(wide) for r, wide in zip(reports, blind, strict=True)]
    print(f"1 sigma, the scale without the sensor: {verdict(without)}.\n")
    print(f"The median case needs {scale_without(reports, ''):.3f} times the card's scale.\n")


def print_contrast(reports: Sequence[SceneReport]) -> None:
    """Print how well sigma ranks the pixels by error."""
    rows = []
    for r in reports:
        mean, rms = contrast(r.mean_error, 1), contrast(r.rms_error, 2)
        cells = [f"{v:.1f}" for v in (mean.median(), mean.min(), rms.median(), rms.min())]
        rows.append([r.name, r.sensor, *cells])
    header = ("mean error, median band", "worst band", "rms error, median band", "worst band")
    table(("scene", "sensor", *header), rows)
    for name, found in (
        ("mean", [contrast(r.mean_error, 1) for r in reports]),
        ("rms", [contrast(r.rms_error, 2) for r in reports]),
    ):
        bands = torch.cat(found)
        print(
            f"Top decile over lower half, {name} error: at least {LEAST_CONTRAST:.0f} in "
            f"{int((bands >= LEAST_CONTRAST).sum())} of {len(bands)} bands and in the median band "
            f"of {sum(float(f.median()) >= LEAST_CONTRAST for f in found)} of {len(found)} scenes; "
            f"geometric mean {geometric_mean(bands.tolist()):.2f}.\n"
        )


def print_shape(reports: Sequence[SceneReport]) -> None:
    """Print the shares that Gaussian intervals hold, and the widths that they would need."""
    held = [per_sensor(reports, partial(share_held, nominal=p)) for p in SHARES]
    rows = [[s, *(f"{100 * column[s]:.1f}" for column in held)] for s in held[0]]
    rows.append(["mean of the sensors", *(f"{100 * fmean(c.values()):.1f}" for c in held)])
    table(("sensor: held, %, by nominal", *(f"{p:.1%}" for p in SHARES)), rows)
    wide = [fmean(per_sensor(reports, partial(SceneReport.needed, share=p)).values()) for p in SHARES]
    table(
        ("share of the pixels", *(f"{p:.1%}" for p in SHARES)),
        [
            ["sigmas that hold it", *(f"{w:.2f}" for w in wide)],
            ["were the errors Gaussian", *(f"{multiple_of(p):.2f}" for p in SHARES)],
        ],
    )


def share_held(r: SceneReport, nominal: float) -> float:
    return float(r.held(multiple_of(nominal)).mean())


def print_deciles(reports: Sequence[SceneReport]) -> None:
    """Rms error over rms sigma along the deciles of sigma."""
    sensors = dict.fromkeys(r.sensor for r in reports)
    lines = {s: decile_line([r for r in reports if r.sensor == s]) for s in sensors}
    lines["mean of the sensors"] = mean_line(list(lines.values()))
    rows = [[s, *(f"{error / sigma:.2f}" for sigma, error in line)] for s, line in lines.items()]
    table(("sensor: rms error / rms sigma", *map(str, range(1, DECILES + 1))), rows)


def decile_line(reports: Sequence[SceneReport]) -> Line:
    """(rms sigma, rms error) per decile, geometric means over all bands."""
    sigma, error = (
        torch.cat([getattr(r, name) for r in reports]).log().mean(0).exp().tolist()
        for name in ("rms_sigma", "rms_error")
    )
    return list(zip(sigma, error, strict=True))


def mean_line(lines: Sequence[Line]) -> Line:
    """Geometric means, point by point."""
    return [
        (geometric_mean([p[0] for p in points]), geometric_mean([p[1] for p in points]))
        for points in zip(*lines, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes")
    parser.add_argument("--model", default="generic")
    parser.add_argument("--only", help="comma-separated scene names")
    arguments = parser.parse_args()
    tune_cpu()
    sharpener = load_sharpener(arguments.model)
    scenes = [s for s in read_scenes(arguments.scenes, "valid") if not s.name.endswith(SHARP)]
    if arguments.only:
        scenes = [s for s in scenes if s.name in arguments.only.split(",")]
    if len({s.sensor for s in scenes}) < 2:
        parser.error("scenes of at least two sensors are needed: each is left out in turn")
    reports = [report(scene, sharpener) for scene in scenes]
    print_coverage(reports)
    print_contrast(reports)
    print_shape(reports)
    print_deciles(reports)


if __name__ == "__main__":
    main()
