"""The facts of docs/models.md: a model's card, its scores on scenes that may be shown, pictures.

    uknowpan pack docs/recipes/generic-scenes.csv --root ../shared/imagery -o runs/scenes.h5
    python tests/benchmarks/cards.py runs/scenes.h5 --out docs/models [--model generic]

Draws one picture per scene of `SHOWN` into --out and prints Markdown: the card, what it was trained
on by licence, ERGAS and SAM of the scenes shown, what noise does to them, and eight bands. With
`--into docs/models.md` the same replaces what stands between that file's two marks.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from validate import COARSE_PAN, Score, degradations, prepare, score, softness_of, tell

from uknowpan.models.checkpoints import Card, find_checkpoint, load_model
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.devices import tune_cpu
from uknowpan.models.sharpeners import Sharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import Degradation, degrade_truth
from uknowpan.models.training.scenes import Scene, read_scenes
from uknowpan.pictures import enlarge, error_map, panels, stretch_from, write_png

SIDE, ZOOM = 92, 2
LOW, HIGH = 2, 98
SIX_BITS = 0xFC
"""Of eight are kept per colour: nobody sees it, and the file shrinks by a quarter."""
LIMIT_PERCENTILE = 99
"""Of Brovey's error in the crop, which is drawn brightest."""
DEGRADATION = "MTF 0.30, phase +0.5"
BEGIN, END = "<!-- printed by cards.py -->\n", "<!-- end -->\n"
STUDENT = "uknowpan"
NOT_PACKED = "not in this scenes file"
DRAWN = ("bicubic", "brovey", STUDENT)
NOISE_LEVELS = (0.0, 0.15, 0.5)
"""Times the contrast of neighbouring pixels; training goes up to 0.15 (in the MS)."""
EIGHT_BANDS = "worldview2_100"
SEEN_BY_PAN = slice(1, 6)
"""Blue to red edge: those bands that WorldView-2's PAN sees at about half strength or more."""


@dataclass(frozen=True)
class Shown:
    """A scene whose licence allows a picture."""

    name: str
    rgb: tuple[int, int, int]
    """Bands shown as red, green, blue."""
    corner: tuple[int, int]
    """Row and column of the crop's first pixel, in the truth."""


SHOWN = (
    Shown("landsat7_39", (0, 1, 2), (184, 90)),
    Shown("landsat8", (2, 1, 0), (408, 280)),
    Shown("quickbird_toulouse_7", (2, 1, 0), (88, 88)),
)


@dataclass(frozen=True)
class Case:
    """A scene brought to reduced resolution."""

    ratio: int
    gt: torch.Tensor
    """(C, H, W)."""
    pan: torch.Tensor
    """(1, H, W)."""
    ms: torch.Tensor
    """(C, H / ratio, W / ratio)."""
    softness: float
    """Of the truth; the student is told."""

    def scores(self, methods: Mapping[str, Sharpener]) -> dict[str, Score]:
        tell(methods[STUDENT], self.softness)
        return {m: score(s, self.pan, self.ms, self.gt, self.ratio) for m, s in methods.items()}


def degraded(scene: Scene, noise: float = 0.0, *, noisy_pan: bool = False) -> Case:
    """The first degradation of validate.py, noise of a fixed seed on MS or PAN."""
    ratio = 2 if scene.sensor.startswith(COARSE_PAN) else 4
    gt, pan = prepare(scene, ratio)
    generator = torch.Generator().manual_seed(0)
    how: Degradation = degradations(ratio, len(gt))[DEGRADATION]
    if noisy_pan:
        spread = (pan[:, 1:] - pan[:, :-1]).std()
        pan = pan + noise * spread * torch.randn(pan.shape, generator=generator)
    else:
        how = replace(how, noise=noise)
    softness = softness_of(scene, ratio)
    return Case(ratio, gt, pan, degrade_truth(gt, how, generator), softness)


@dataclass(frozen=True)
class Sheet:
    """The picture of a scene, and what it shows in numbers."""

    picture: np.ndarray
    """uint8 (3, H, W): PAN, MS, bicubic, Brovey, student, truth and two errors, labels below."""
    limit: float
    """Error in DN, mean of all bands, that is drawn brightest."""
    errors: dict[str, float]
    """Method -> mean error in the crop, DN."""
    contrasts: dict[str, float]
    """Method -> contrast of neighbouring pixels over the truth's: below 1 is softer than it."""
    band_contrasts: list[float]
    """The student's, band by band."""
    worse: float
    """Share of the pixels where the student errs more than Brovey."""


def sheet(case: Case, shown: Shown, methods: Mapping[str, Sharpener]) -> Sheet:
    top, left = shown.corner

    def cut(image: torch.Tensor | np.ndarray) -> np.ndarray:
        return np.asarray(image)[:, top : top + SIDE, left : left + SIDE]

    tell(methods[STUDENT], case.softness)
    fused = {m: cut(sharpen_array(methods[m], case.pan, case.ms).hrms) for m in DRAWN}
    truth, pan = cut(case.gt), cut(case.pan)
    ms = cut(enlarge(np.asarray(case.ms), case.ratio))
    errors = {m: np.abs(x - truth).mean(0) for m, x in fused.items()}
    limit = float(np.percentile(errors["brovey"], LIMIT_PERCENTILE))
    look = stretch_from(truth, low=LOW, high=HIGH, bands=shown.rgb)
    grey = stretch_from(pan, low=LOW, high=HIGH, bands=(0, 0, 0))
    row = [("PAN", grey.apply(pan)), ("MS", look.apply(ms))]
    row += [(m, look.apply(x)) for m, x in (*fused.items(), ("truth", truth))]
    row += [(f"error {m}", error_map(fused[m], truth, limit)) for m in DRAWN[1:]]
    picture = panels([[(text, enlarge(image, ZOOM)) for text, image in row]])
    return Sheet(
        picture & SIX_BITS,
        limit,
        {m: float(e.mean()) for m, e in errors.items()},
        {m: contrast(x) / contrast(truth) for m, x in fused.items()},
        [contrast(x[None]) / contrast(t[None]) for x, t in zip(fused[STUDENT], truth, strict=True)],
        float((errors[STUDENT] > errors["brovey"]).mean()),
    )


def contrast(image: np.ndarray) -> float:
    """Mean over the bands of (C, H, W) of the spread between vertical and horizontal neighbours."""
    spreads = [np.diff(image, axis=axis).std(axis=(1, 2)).mean() for axis in (1, 2)]
    return float(np.mean(spreads))


def lineage(training: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The training runs behind a checkpoint, the first one first."""
    before = training.get("started_from")
    return [*(lineage(before) if before else []), training]


def trained_on(runs: Sequence[Mapping[str, Any]], key: str) -> dict[str, set[str]]:
    """Licence -> scenes, of all runs together."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for licence, names in run.get(key, {}).items():
            found.setdefault(licence, set()).update(names)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
    yield ""


def licence_rows(by_licence: Mapping[str, set[str]], packed: Mapping[str, Scene]) -> Iterator[list[object]]:
    """Licence, sensor, number of scenes, and their share of what is drawn."""
    total = sum(packed[n].weight for names in by_licence.values() for n in names if n in packed)
    for licence, names in sorted(by_licence.items()):
        sensors = Counter(packed[n].sensor if n in packed else NOT_PACKED for n in names)
        for sensor, count in sorted(sensors.items()):
            own = [packed[n].weight for n in names if n in packed and packed[n].sensor == sensor]
            yield [licence, sensor, count, f"{sum(own) / total:.0%}"]


def card_lines(model: str, packed: Mapping[str, Scene]) -> Iterator[str]:
    """The card as Markdown.

    Args:
        model: bundled name or file.
        packed: the scenes of the scenes file, by name.
    """
    path = find_checkpoint(model)
    network, card = load_model(path)
    yield f"### `{card.name}`\n"
    yield from table(("", ""), list(facts(card, path, sum(p.numel() for p in network.parameters()))))
    runs = lineage(card.training)
    yield from table(
        ("run", "iterations", "seed", "command"),
        [
            (i, run.get("iterations", "?"), run.get("seed", "?"), f"`{run.get('command', '?')}`")
            for i, run in enumerate(runs, 1)
        ],
    )
    seen = list(licence_rows(trained_on(runs, "scenes_by_licence"), packed))
    yield from table(("trained on: licence", "sensor", "scenes", "weight"), seen)
    chosen = licence_rows(trained_on(runs, "validation_scenes_by_licence"), packed)
    yield from table(("validated on: licence", "sensor", "scenes"), [row[:-1] for row in chosen])
    yield f"Limits, as the card says: {card.limits}\n"


def facts(card: Card, path: Path, parameters: int) -> Iterator[tuple[str, object]]:
    yield "architecture", card.architecture
    yield "parameters", f"{parameters:,}"
    yield "file", f"{path.stat().st_size / 1e6:.2f} MB"
    yield "bands", "any" if card.bands is None else card.bands
    yield "ratios", f"{min(card.ratios)} to {max(card.ratios)}"
    yield "steps by default", card.steps
    yield "sigma_scale", card.sigma_scale
    for name, values in card.scores.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            yield f"{name}: {key}".replace("_", " "), value


def cells(scores: Mapping[str, Score]) -> list[str]:
    """ERGAS / SAM of every method, the best ERGAS and the best SAM in bold."""
    least = (min(s.ergas for s in scores.values()), min(s.sam for s in scores.values()))

    def mark(value: float, best: float, digits: int = 2) -> str:
        return f"**{value:.{digits}f}**" if value == best else f"{value:.{digits}f}"

    return [f"{mark(s.ergas, least[0])} / {mark(s.sam, least[1])}" for s in scores.values()]


def noise_rows(scene: Scene, methods: Mapping[str, Sharpener]) -> Iterator[list[object]]:
    """The student's ERGAS, and the best classical one, as noise grows."""
    for noisy_pan in (False, True):
        found = []
        for level in NOISE_LEVELS:
            scores = degraded(scene, level, noisy_pan=noisy_pan).scores(methods)
            best = min(scores[m].ergas for m in CLASSICAL_METHODS)
            found.append(f"{scores[STUDENT].ergas:.2f} / {best:.2f}")
        yield [scene.name, "PAN" if noisy_pan else "MS", *found]


def eight_band_rows(scene: Scene, methods: Mapping[str, Sharpener]) -> Iterator[list[object]]:
    """ERGAS / SAM on eight bands, for two PANs made of them."""
    pans = {
        "mean of all bands": scene.gt.mean(0, keepdim=True),
        "mean of blue to red edge": scene.gt[SEEN_BY_PAN].mean(0, keepdim=True),
    }
    for name, pan in pans.items():
        yield [name, *cells(degraded(replace(scene, pan=pan)).scores(methods))]


def report(model: str, packed: Mapping[str, Scene], out: Path) -> Iterator[str]:
    """The Markdown, line by line; the pictures are written on the way."""
    methods: dict[str, Sharpener] = {m: load_sharpener(None, m) for m in CLASSICAL_METHODS}
    methods[STUDENT] = load_sharpener(model)
    yield from card_lines(model, packed)
    scores: list[list[object]] = []
    pictures: list[list[object]] = []
    bands: list[list[object]] = []
    noise: list[list[object]] = []
    for shown in SHOWN:
        scene = packed[shown.name]
        case = degraded(scene)
        scores.append([shown.name, scene.sensor, case.ratio, *cells(case.scores(methods))])
        drawn = sheet(case, shown, methods)
        target = out / f"{shown.name}.png"
        write_png(target, drawn.picture)
        both = [f"{drawn.errors[m]:.3g} / {drawn.contrasts[m]:.2f}" for m in DRAWN]
        size = f"{target.stat().st_size / 1000:.0f} kB"
        corner = f"row {shown.corner[0]}, column {shown.corner[1]}"
        pictures.append([shown.name, corner, *both, f"{drawn.limit:.3g}", scene.licence, size])
        each = ", ".join(f"{value:.2f}" for value in drawn.band_contrasts)
        bands.append([shown.name, each, f"{drawn.worse:.0%}"])
        noise += noise_rows(scene, methods)
    yield f"ERGAS / SAM in degrees of the whole scenes, {DEGRADATION}:\n"
    yield from table(("scene", "sensor", "ratio", *methods), scores)
    yield "Mean error in the crop, DN / contrast of neighbouring pixels over the truth's:\n"
    about = ("picture", "crop from", *DRAWN, "brightest error, DN", "licence", "file")
    yield from table(about, pictures)
    each_band = f"{STUDENT}'s contrast over the truth's, band by band"
    yield from table(("picture", each_band, "pixels where it errs more than Brovey"), bands)
    yield f"ERGAS of {STUDENT} / of the best classical method under noise:\n"
    yield from table(("scene", "noise in", *map(str, NOISE_LEVELS)), noise)
    yield "ERGAS / SAM on eight bands:\n"
    eight = list(eight_band_rows(packed[EIGHT_BANDS], methods))
    yield from table((f"PAN made of {EIGHT_BANDS}", *methods), eight)


def renew(page: Path, text: str) -> None:
    """Put the text between the marks of a page.

    Raises:
        ValueError: the page has no such marks.
    """
    before, _, rest = page.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} lacks the lines {BEGIN.strip()} and {END.strip()}")
    page.write_text(f"{before}{BEGIN}\n{text.strip()}\n\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes")
    parser.add_argument("--out", type=Path, default=Path("docs/models"))
    parser.add_argument("--model", default="generic")
    parser.add_argument("--into", type=Path, help="page that takes the text between its marks")
    arguments = parser.parse_args()
    tune_cpu()
    arguments.out.mkdir(parents=True, exist_ok=True)
    packed = {s.name: s for split in ("train", "valid") for s in read_scenes(arguments.scenes, split)}
    lines = []
    for line in report(arguments.model, packed, arguments.out):
        print(line, flush=True)
        lines.append(line)
    if arguments.into:
        renew(arguments.into, "\n".join(lines))


if __name__ == "__main__":
    main()
