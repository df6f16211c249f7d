"""How far the predicted 1-sigma can be trusted, on scenes never trained on.

    python tests/benchmarks/reliability.py runs/scenes.h5 --svg docs/reliability.svg [--model FILE]

Scenes and degradations are those of validate.py, the four degradations of a scene taken together.
Prints the Markdown tables of docs/uncertainty.md; `--svg` draws its diagram.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import cycle
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor
from validate import (
    BORDER,
    COARSE_PAN,
    degradations,
    geometric_mean,
    prepare,
    softness_of,
    tell,
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
CURVE = (*(n / 100 for n in range(10, 91, 5)), 0.95)
SHARES = (0.50, ONE_SIGMA, 0.80, 0.90, 0.95, 0.99)
DECILES = 10


@dataclass(frozen=True)
class SceneReport:
    """What the pixels of one scene say that were `measured`, all degradations together."""

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
    tell(sharpener, softness_of(scene, ratio))
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
    """What `validate.py --stamp` would multiply sigma by, had it not seen a sensor (nor blanks)."""
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
    """How many scene-bands meet the goal."""
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
    """Whether sigma tells where the errors are."""
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
    """What Gaussian intervals hold, and how wide they would have to be."""
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


COLOURS = ("#e69f00", "#0072b2", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6d1f", "#7b3294")
SIDE, LEFT, TOP, GAP = 300, 60, 40, 80
LEGEND_ROW = 18
LOGARITHMIC_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
INK = 'fill="#222"'
MIDDLE, END = (f'{INK} text-anchor="{anchor}"' for anchor in ("middle", "end"))


@dataclass(frozen=True)
class Panel:
    """A square of the diagram; both axes alike, so that its diagonal is what should be."""

    left: float
    low: float
    high: float
    logarithmic: bool
    ticks: tuple[float, ...]
    titles: tuple[str, str, str]
    """Above, below, at the left."""

    def place(self, value: float) -> float:
        """0 at the low end of the axis, 1 at the high one."""
        low, high = self.low, self.high
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)

    def point(self, x: float, y: float) -> str:
        return f"{self.left + SIDE * self.place(x):.1f},{TOP + SIDE * (1 - self.place(y)):.1f}"

    def frame(self) -> list[str]:
        """Box, diagonal, ticks and titles."""
        middle, bottom = self.left + SIDE / 2, TOP + SIDE
        above, below, beside = self.titles
        turned = f"{self.left - 42} {TOP + SIDE / 2}"
        start, end = self.point(self.low, self.low), self.point(self.high, self.high)
        parts = [
            f'<polyline points="{start} {end}" stroke="#999" stroke-dasharray="2 3"/>',
            f'<rect x="{self.left}" y="{TOP}" width="{SIDE}" height="{SIDE}" stroke="#555"/>',
            f'<text x="{middle}" y="{TOP - 14}" {MIDDLE} font-weight="bold">{above}</text>',
            f'<text x="{middle}" y="{bottom + 36}" {MIDDLE}>{below}</text>',
            f'<text transform="translate({turned}) rotate(-90)" {MIDDLE}>{beside}</text>',
        ]
        for tick in self.ticks:
            x, y = self.point(tick, tick).split(",")
            text = f"{tick:g}"
            parts += [
                f'<path d="M{x} {bottom}v-5M{self.left} {y}h5" stroke="#555"/>',
                f'<text x="{x}" y="{bottom + 16}" {MIDDLE}>{text}</text>',
                f'<text x="{self.left - 6}" y="{float(y) + 4:.1f}" {END}>{text}</text>',
            ]
        return parts

    def line(self, points: Line, colour: str, width: float) -> str:
        inside = [self.point(x, y) for x, y in points]
        return f'<polyline points="{" ".join(inside)}" stroke="{colour}" stroke-width="{width}"/>'


def axes(errors: Sequence[float]) -> tuple[Panel, Panel]:
    """The panel of the coverage and that of the deciles, whose values it is to show."""
    low, high = min(errors) / 1.15, max(errors) * 1.15
    return (
        Panel(
            *(LEFT, 0, 100, False, tuple(range(0, 101, 20))),
            ("How much the intervals hold", "nominal (Gaussian), %", "pixels within, %"),
        ),
        Panel(
            *(LEFT + SIDE + GAP, low, high, True),
            tuple(t for t in LOGARITHMIC_TICKS if low < t < high),
            ("Error by decile of sigma", "rms sigma / detail contrast", "rms error / contrast"),
        ),
    )


def draw(reports: Sequence[SceneReport], model: str) -> str:
    """The reliability diagram as SVG, on a white ground of its own."""
    sensors = list(dict.fromkeys(r.sensor for r in reports))
    held = [per_sensor(reports, partial(share_held, nominal=p)) for p in CURVE]
    coverage = [[(100 * p, 100 * h[s]) for p, h in zip(CURVE, held, strict=True)] for s in sensors]
    mean_held = [fmean(h.values()) for h in held]
    deciles = [decile_line([r for r in reports if r.sensor == s]) for s in sensors]
    panels = axes([v for line in deciles for point in line for v in point])
    curves = [
        *zip(sensors, cycle(COLOURS), coverage, deciles, strict=False),
        (
            *("all sensors", "#000"),
            [(100 * p, 100 * h) for p, h in zip(CURVE, mean_held, strict=True)],
            mean_line(deciles),
        ),
    ]
    parts = [part for panel in panels for part in panel.frame()]
    legend = LEFT + 2 * SIDE + GAP + 20
    for row, (name, colour, *lines) in enumerate(curves):
        width = 3 if name == "all sensors" else 1.5
        parts += [panel.line(x, colour, width) for panel, x in zip(panels, lines, strict=True)]
        y = TOP + 10 + LEGEND_ROW * row
        parts.append(f'<path d="M{legend} {y}h22" stroke="{colour}" stroke-width="{width}"/>')
        parts.append(f'<text x="{legend + 28}" y="{y + 4}" {INK}>{escape(name)}</text>')
    across, down = legend + 190, TOP + SIDE + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" width="{across}" '
        f'height="{down}" fill="none" font-family="sans-serif" font-size="12">\n'
        f"<title>Reliability of the predicted 1-sigma, model {model}</title>\n"
        f'<rect width="{across}" height="{down}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes")
    parser.add_argument("--model", default="generic")
    parser.add_argument("--only", help="comma-separated scene names")
    parser.add_argument("--svg", type=Path, help="write the diagram here")
    arguments = parser.parse_args()
    tune_cpu()
    sharpener = load_sharpener(arguments.model)
    scenes = read_scenes(arguments.scenes, "valid")
    if arguments.only:
        scenes = [s for s in scenes if s.name in arguments.only.split(",")]
    if len({s.sensor for s in scenes}) < 2:
        parser.error("scenes of at least two sensors are needed: each is left out in turn")
    reports = [report(scene, sharpener) for scene in scenes]
    print_coverage(reports)
    print_contrast(reports)
    print_shape(reports)
    print_deciles(reports)
    if arguments.svg:
        arguments.svg.write_text(draw(reports, sharpener.name))


if __name__ == "__main__":
    main()
