"""Experiments of docs/experiments.md that need the bundled model and no training.

    python tests/benchmarks/experiments.py consistency runs/scenes.h5
    python tests/benchmarks/experiments.py steps runs/scenes.h5
    python tests/benchmarks/experiments.py flips runs/scenes.h5
    python tests/benchmarks/experiments.py blur runs/scenes.h5
    python tests/benchmarks/experiments.py full-resolution ../shared/imagery
    python tests/benchmarks/experiments.py sharpness ../shared/imagery   # or runs/scenes.h5

Each takes [--model FILE] [--only NAMES] and prints Markdown; what it measures stands at its
function.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from validate import BORDER, COARSE_PAN, degradations, geometric_mean, prepare

from uknowpan.models.blur import Psf, default_psf, estimate_psf, gain_to_sigma
from uknowpan.models.checkpoints import Card, find_checkpoint, load_model, read_card
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.devices import tune_cpu
from uknowpan.models.features import takes_softness
from uknowpan.models.metrics.full_resolution import FullResolution, full_resolution
from uknowpan.models.metrics.indices import ergas, psnr
from uknowpan.models.resample import upsample
from uknowpan.models.sharpeners import AS_MS, Sharpener, StudentSharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import Degradation, degrade_truth
from uknowpan.models.training.scenes import read_scenes
from uknowpan.sharpening import survey
from uknowpan.tiling import open_pair

SIDE = 256
ONE_EACH = (
    *("gf2_4", "landsat8_float", "pleiades_urban", "quickbird_0", "rotterdam_1"),
    "spot6_cropland",
)
"""One scene of each of six sensors."""
GAUSSIAN_AND_CUBIC = ("MTF 0.30, phase +0.5", "cubic, phase -0.7/+0.4")

MANY_STEPS, STEPS, STEPS_SEEDS, STEPS_SIDE = 25, (1, 2, 4, 8), 4, 128
NEAR_HALO = 24
"""PAN pixels around the crop in place of the network's reach times the steps (1000 for 25)."""
WITHIN = 0.05

FLIPS_SIDE = 192

SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)

MS_SIDE, RIM = 128, 32
LEAST_VALUE = 300
"""Values below are multiplied by 8: Q2n rounds to whole numbers."""
NOMINAL_GAIN, LEAST_GAIN, MOST_GAIN = 0.30, 0.03, 0.60

PAIRS = (
    *("spot6_cropland", "pleiades_urban", "vhr_melbourne_2"),
    *("gf2_full_0", "gf2_full_2", "gf2_full_4", "landsat7_37"),
)
HENAN = "scenes/vhr_henan_4band"


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: Path
    model: str
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One degraded scene."""

    scene: str
    name: str
    degradation: Degradation
    ratio: int
    pan: Tensor
    ms: Tensor
    gt: Tensor


class Variation(StudentSharpener):
    """A student whose halo or whose idea of the scene's blur is fixed."""

    def __init__(
        self,
        model: nn.Module,
        card: Card,
        *,
        halo: int | None = None,
        psf: Psf | None = None,
        **options: Any,
    ):
        super().__init__(model, card, **options)
        self.halo, self.psf = halo, psf

    def assumed_psf(self, ratio: int) -> Psf | None:
        return self.psf

    def _network_halo(self) -> int:
        whole = super()._network_halo()
        return whole if self.halo is None else min(whole, self.halo)


def row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    print("|---" * len(cells) + "|")


def cases(options: Options, side: int, scenes: Sequence[str] = (), names: Sequence[str] = ()) -> Iterator[Case]:
    """Validation scenes, cropped, in the degradations called `names`; none named: all.

    `scenes` are taken where the command line names none.
    """
    only = options.only or scenes
    for scene in read_scenes(options.data, "valid"):
        if only and scene.name not in only:
            continue
        ratio = 2 if scene.sensor.startswith(COARSE_PAN) else 4
        gt, pan = (x[:, :side, :side] for x in prepare(scene, ratio))
        for name, degradation in degradations(ratio, len(gt)).items():
            if not names or name in names:
                ms = degrade_truth(gt, degradation)
                yield Case(scene.name, name, degradation, ratio, pan, ms, gt)


def sharpened(sharpener: Sharpener, case: Case) -> Tensor:
    return sharpen_array(sharpener, case.pan, case.ms).hrms


def scores(hrms: Tensor, case: Case) -> tuple[float, float]:
    """(ERGAS, PSNR), the border left out, as validate.py has them."""
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    fused, truth = hrms[inner].double(), case.gt[inner].double()
    return float(ergas(fused, truth, case.ratio)), float(psnr(fused, truth, float(truth.max())))


def over(found: tuple[float, float], base: tuple[float, float]) -> tuple[float, float]:
    """(ERGAS ratio, PSNR difference)."""
    return found[0] / base[0], found[1] - base[1]


def summary(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Geometric mean of the ERGAS ratios, mean of the PSNR differences."""
    return geometric_mean([p[0] for p in pairs]), sum(p[1] for p in pairs) / len(pairs)


def cell(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f}, {pair[1]:+.2f}"


def consistency(options: Options) -> None:
    """ERGAS after one, two, three passes of `sharpen --consistency` over that before."""
    sharpeners = [load_sharpener(options.model, consistency=passes) for passes in range(4)]
    for case in cases(options, SIDE):
        found = [scores(sharpened(s, case), case)[0] for s in sharpeners]
        row(case.scene, case.name, ", ".join(f"{value / found[0]:.2f}" for value in found[1:]))


def steps(options: Options) -> None:
    """Fewer DDIM steps, and the mean of several samples, against one sample of many steps.

    The halo is cut short: with all of it 25 steps of 128 x 128 pixels would be computed on
    2128 x 2128. The last line says what the cut changes.
    """
    network, card = load_model(find_checkpoint(options.model))

    def student(count: int, seed: int = 0, halo: int | None = NEAR_HALO) -> Variation:
        return Variation(network, card, steps=count, seed=seed, halo=halo)

    columns = [f"{n} step" + "s" * (n > 1) for n in STEPS]
    columns.append(f"mean of {STEPS_SEEDS} samples of {MANY_STEPS}")
    header("scene", "degradation", f"{MANY_STEPS} steps: ERGAS, PSNR", *columns)
    found: dict[str, list[tuple[float, float]]] = {c: [] for c in columns}
    check = ""
    for case in cases(options, STEPS_SIDE, ONE_EACH, GAUSSIAN_AND_CUBIC):
        few = [sharpened(student(n), case) for n in STEPS]
        many = [sharpened(student(MANY_STEPS, seed), case) for seed in range(STEPS_SEEDS)]
        base = scores(many[0], case)
        results = [*few, torch.stack(many).mean(0)]
        for column, hrms in zip(columns, results, strict=True):
            found[column].append(over(scores(hrms, case), base))
        cells = [cell(found[c][-1]) for c in columns]
        row(case.scene, case.name, f"{base[0]:.2f}, {base[1]:.2f}", *cells)
        if not check:
            whole = scores(sharpened(student(STEPS[-1], halo=None), case), case)
            ratio, difference = over(scores(few[-1], case), whole)
            check = f"{STEPS[-1]} steps, first case: ERGAS x {ratio:.5f}, {difference:+.5f} dB"
    row("all", "", "", *(cell(summary(found[c])) for c in columns))
    for c in columns:
        worst, near = min(p[1] for p in found[c]), sum(p[1] >= -WITHIN for p in found[c])
        print(f"{c}: within {WITHIN} dB or above in {near} of {len(found[c])}, worst {worst:+.2f}")
    print(f"short halo against the whole, {check}")


def turn(x: Tensor, k: int) -> Tensor:
    """The k-th of the eight flips and turns of (C, H, W)."""
    x = torch.rot90(x, k % 4, (1, 2))
    return (x.flip(2) if k >= 4 else x).contiguous()


def turn_back(x: Tensor, k: int) -> Tensor:
    return torch.rot90(x.flip(2) if k >= 4 else x, -(k % 4), (1, 2))


def turned(sharpener: Sharpener, case: Case, k: int) -> Tensor:
    """The k-th turn of PAN and MS sharpened, turned back; the statistics are the turned scene's."""
    done = sharpen_array(sharpener, turn(case.pan, k), turn(case.ms, k))
    return turn_back(done.hrms, k)


def flips(options: Options) -> None:
    """Mean over the eight flips and turns, beside the mean over eight seeds, against the plain.

    The eight turns have other noise each, so the seeds say how much of the gain is the noise's.
    MS pixel areas nest in the PAN's, which turning a whole scene leaves so; the last line says
    how exactly: what MTF-GLP, which is symmetric, makes of turned scenes.
    """
    network, card = load_model(find_checkpoint(options.model))
    symmetric = load_sharpener(None, "mtf-glp")
    header("scene", "degradation", "plain: ERGAS, PSNR", "8 turns", "8 seeds")
    found: list[list[tuple[float, float]]] = [[], []]
    seconds, off = [0.0, 0.0], 0.0
    for case in cases(options, FLIPS_SIDE, ONE_EACH, GAUSSIAN_AND_CUBIC):
        began = time.process_time()
        plain = sharpened(Variation(network, card), case)
        between = time.process_time()
        turns = torch.stack([turned(Variation(network, card), case, k) for k in range(8)]).mean(0)
        seconds = [seconds[0] + between - began, seconds[1] + time.process_time() - between]
        seeds = torch.stack([sharpened(Variation(network, card, seed=seed), case) for seed in range(8)]).mean(0)
        base = scores(plain, case)
        for kept, hrms in zip(found, (turns, seeds), strict=True):
            kept.append(over(scores(hrms, case), base))
        row(
            *(case.scene, case.name, f"{base[0]:.2f}, {base[1]:.2f}"),
            *(cell(kept[-1]) for kept in found),
        )
        same = sharpened(symmetric, case)
        for k in range(1, 8):
            worst = (turned(symmetric, case, k) - same).abs().max() / same.abs().max()
            off = max(off, float(worst))
    row("all", "", "", *(cell(summary(kept)) for kept in found))
    better = sum(p[0] < 1 for p in found[0])
    print(f"8 turns: ERGAS lower in {better} of {len(found[0])}")
    print(f"CPU seconds, all cases: plain {seconds[0]:.1f}, 8 turns {seconds[1]:.1f}")
    print(f"MTF-GLP turned and back: off by at most {off:.1e} of the largest value")


def true_psf(case: Case) -> Psf | None:
    """The blur that made this MS of the truth, where it is a Gaussian."""
    made = case.degradation
    if made.kind != "gaussian":
        return None
    return Psf(gain_to_sigma(made.gains[0], case.ratio), made.shift, 1.0)


def with_truth(psf: Psf, case: Case) -> Psf:
    """The same after the blur and shift of the truth itself against the PAN."""
    own = estimate_psf([(case.pan, case.gt)], 1)
    if own.correlation == 0:  # the scene does not tell
        return psf
    shift = (psf.shift[0] + own.shift[0], psf.shift[1] + own.shift[1])
    return Psf(math.hypot(psf.sigma, own.sigma), shift, 1.0)


def blur(options: Options) -> None:
    """ERGAS with other ideas of the scene's blur and shift over that with the estimated ones."""
    network, card = load_model(find_checkpoint(options.model))

    def measured(psf: Psf, case: Case) -> float:
        return scores(sharpened(Variation(network, card, psf=psf), case), case)[0]

    columns = ("MTF 0.30, no shift", "the kernel", "the kernel after the truth's blur")
    header("scene", "degradation", "sigma: estimated, kernel, with truth's", *columns)
    ratios: dict[str, dict[str, list[float]]] = {}
    for case in cases(options, SIDE):
        estimated = estimate_psf([(case.pan, case.ms)], case.ratio)
        known = [default_psf(case.ratio)]
        if (true := true_psf(case)) is not None:
            known += [true, with_truth(true, case)]
        base = measured(estimated, case)
        relative = [measured(psf, case) / base for psf in known]
        kept = ratios.setdefault(case.name, {c: [] for c in columns})
        for column, value in zip(columns, relative, strict=False):
            kept[column].append(value)
        sigmas = ", ".join(f"{p.sigma:.2f}" for p in (estimated, *known[1:]))
        cells = [f"{value:.3f}" for value in relative] + ["-"] * (len(columns) - len(relative))
        row(case.scene, case.name, sigmas, *cells)
    print()
    header("degradation", *columns)
    for name, kept in ratios.items():
        row(name, *(spread(kept[c]) for c in columns))


def spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{geometric_mean(values):.3f} ({min(values):.2f} to {max(values):.2f})"


@dataclass(frozen=True)
class Pair:
    """The middle of a scene at full resolution, its shift removed."""

    name: str
    pan: Tensor
    ms: Tensor
    ratio: int


def aligned_pairs(images: Path, only: Sequence[str]) -> Iterator[Pair]:
    files = {name: (f"{images}/pairs/{name}_pan.tif", f"{images}/pairs/{name}_ms.tif") for name in PAIRS}
    files["henan"] = (f"{images}/{HENAN}/pan.tif", f"{images}/{HENAN}/ms.tif")
    for name, (pan_file, ms_file) in files.items():
        if only and name not in only:
            continue
        with open_pair(pan_file, [ms_file]) as pair:
            dy, dx = survey(pair).offset or (0.0, 0.0)
        with open_pair(pan_file, [ms_file], shift=(round(-dy, 3), round(-dx, 3))) as pair:
            h, w = pair.frame_shape
            side = min(h, w, MS_SIDE) // 32 * 32
            arrays = pair.read_frame((h - side) // 2, (w - side) // 2, side, side)
            pan, ms = torch.from_numpy(arrays.pan).float(), torch.from_numpy(arrays.ms).float()
            yield Pair(name, pan, ms, pair.ratio)


def own_gain(pair: Pair) -> float:
    """MTF gain at the MS Nyquist frequency of the blur that the pair itself shows."""
    sigma = estimate_psf([(pair.pan, pair.ms)], pair.ratio).sigma
    gain = math.exp(-((sigma * math.pi / pair.ratio) ** 2) / 2)
    return min(max(gain, LEAST_GAIN), MOST_GAIN)


def judged(pair: Pair, fused: Tensor, gains: Sequence[float]) -> list[FullResolution]:
    """The scores with each of the gains for the filter of HQNR."""
    lms = upsample(pair.ms[None], pair.ratio)[0]
    unit = 8 if max(float(pair.pan.max()), float(pair.ms.max())) < LEAST_VALUE else 1
    inner = (slice(None), slice(RIM, -RIM), slice(RIM, -RIM))
    f, m, p = (x[inner] * unit for x in (fused.clamp_min(0), lms, pair.pan))
    return [full_resolution(f, m, p, [gain], ratio=pair.ratio) for gain in gains]


AS_SOFT = "student, --softness ms"


def full(options: Options) -> None:
    """HQNR of pairs at full resolution, with the nominal and with the scene's own MTF gain."""
    methods = {name: load_sharpener(None, name) for name in CLASSICAL_METHODS}
    told = takes_softness(read_card(find_checkpoint(options.model)).config)
    students = {
        "student": load_sharpener(options.model),
        **({AS_SOFT: load_sharpener(options.model, softness=AS_MS)} if told else {}),
        "student, --consistency 1": load_sharpener(options.model, consistency=1),
    }
    methods |= students
    own: dict[str, float] = {}
    found: dict[str, dict[str, list[FullResolution]]] = {}
    for pair in aligned_pairs(options.data, options.only):
        own[pair.name] = own_gain(pair)
        found[pair.name] = {
            name: judged(pair, sharpen_array(m, pair.pan, pair.ms).hrms, (NOMINAL_GAIN, own[pair.name]))
            for name, m in methods.items()
        }
    filters = (f"gain {NOMINAL_GAIN:.2f}", "the scene's own gain")
    for index, what in enumerate(filters):
        print(f"HQNR, {what}:\n")
        header("scene", "gain", *methods)
        for name, by_method in found.items():
            gain = own[name] if index else NOMINAL_GAIN
            values = (f"{float(s[index].hqnr):.3f}" for s in by_method.values())
            row(name, f"{gain:.2f}", *values)
        means = (sum(float(s[m][index].hqnr) for s in found.values()) / len(found) for m in methods)
        row("mean", "", *(f"{mean:.3f}" for mean in means))
        print()
    print("D_lambda_K at both gains, D_S (the same at both):\n")
    header("scene", *methods)
    for name, by_method in found.items():
        parts = (
            ", ".join(f"{float(x):.3f}" for x in (*(s.d_lambda_k for s in both), both[0].d_s))
            for both in by_method.values()
        )
        row(name, *parts)
    print()
    for student in students:
        for index, what in enumerate(filters):
            print(f"{student}, {what}: {ranked(found, student, index)}")


def ranked(found: dict[str, dict[str, list[FullResolution]]], student: str, index: int) -> str:
    """On how many scenes the student is above the classical methods, as far as the table shows."""
    above = dict.fromkeys((False, True), 0)
    for by_method in found.values():
        hqnr = {m: round(float(s[index].hqnr), 3) for m, s in by_method.items()}
        for with_bicubic in above:
            rivals = [m for m in CLASSICAL_METHODS if with_bicubic or m != "bicubic"]
            above[with_bicubic] += hqnr[student] > max(hqnr[m] for m in rivals)
    return (
        f"above the best of brovey, gsa, mtf-glp on {above[False]} of {len(found)} scenes, "
        f"of those and bicubic on {above[True]}"
    )


def sharpness(options: Options) -> None:
    """A share of the student's detail only: HQNR of pairs (a folder), or ERGAS (a scenes file)."""
    student = load_sharpener(options.model)
    header("scene", "", *(f"{share:.0%}" for share in SHARES))
    if options.data.is_dir():
        for pair in aligned_pairs(options.data, options.only):
            lms = upsample(pair.ms[None], pair.ratio)[0]
            detail = sharpen_array(student, pair.pan, pair.ms).hrms - lms
            gains = NOMINAL_GAIN, own_gain(pair)
            each = [judged(pair, lms + share * detail, gains) for share in SHARES]
            for index, gain in enumerate(gains):
                row(pair.name, f"gain {gain:.2f}", *(f"{float(s[index].hqnr):.3f}" for s in each))
        return
    found: list[list[float]] = []
    for case in cases(options, FLIPS_SIDE, ONE_EACH, GAUSSIAN_AND_CUBIC):
        lms = upsample(case.ms[None], case.ratio)[0]
        detail = sharpened(student, case) - lms
        values = [scores(lms + share * detail, case)[0] for share in SHARES]
        found.append([value / values[-1] for value in values])
        row(case.scene, case.name, *(f"{value:.3f}" for value in found[-1]))
    means = (geometric_mean(values) for values in zip(*found, strict=True))
    row("all", "", *(f"{mean:.3f}" for mean in means))


EXPERIMENTS: dict[str, Callable[[Options], None]] = {
    "consistency": consistency,
    "steps": steps,
    "flips": flips,
    "blur": blur,
    "full-resolution": full,
    "sharpness": sharpness,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(EXPERIMENTS))
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="generic")
    parser.add_argument("--only", default="", help="comma-separated scene names")
    arguments = parser.parse_args()
    tune_cpu()
    only = tuple(name for name in arguments.only.split(",") if name)
    EXPERIMENTS[arguments.what](Options(arguments.data, arguments.model, only))


if __name__ == "__main__":
    main()
