"""The further models beside the U-Know student and the classical methods (docs/models-further.md).

    sh docs/recipes/further-models.sh runs/three-stages
    python tests/benchmarks/further_models.py runs/scenes.h5 ../shared/imagery \\
        "U-Know student=runs/three-stages/student-alone/best.safetensors" \\
        "PAN-Crafter=runs/three-stages/pan-crafter/best.safetensors" \\
        "SSDiff=runs/three-stages/ssdiff/best.safetensors" \\
        "SSDiff, 10 steps=runs/three-stages/ssdiff/best.safetensors@10" \\
        generic=generic "generic, told=generic@told" \\
        --patches runs/three-stages/pairs_valid.h5 --patches runs/three-stages/qb_valid.h5 \\
        --picture docs/models-further/shifts.png

Models are NAME=CHECKPOINT, NAME=CHECKPOINT@STEPS or NAME=CHECKPOINT@told, which is told of each
scene how soft its truth is, as validate.py tells (of a pair without truth: as soft as its MS;
patches have no such number, it is left out there). Scenes are those of the split "valid" that
neither the files of docs/recipes/three-stages nor other areas of theirs hold. --only-reduced leaves
out full resolution, cost and shifts, for a quick look at more checkpoints. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench import run
from experiments import NOMINAL_GAIN, aligned_pairs, header, judged, own_gain
from experiments import row as print_row
from misregistration import inside
from three_stages import row as scores_row
from three_stages import table as scores_table
from torch import Tensor
from validate import BORDER, geometric_mean, prepare, softness_of, tell

from uknowpan.datasets.synthetic import make_scene
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.devices import tune_cpu
from uknowpan.models.metrics.indices import ergas, psnr, q2n, sam
from uknowpan.models.pancollection.condition import image_sharpener
from uknowpan.models.pancollection.dataset import PanCollectionDataset
from uknowpan.models.pancollection.file import PanCollectionFile, PatchBatch
from uknowpan.models.published.stages import patch_scores, validation_patches
from uknowpan.models.sharpeners import AS_MS, Sharpened, Sharpener, load_network, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import Degradation, degrade_truth
from uknowpan.models.training.scenes import Scene, read_scenes
from uknowpan.pictures import Stretch, enlarge, panels, stretch_from, write_png

RATIO, GAIN = 4, 0.30
SCENES = ("gf2_4", "quickbird_0", "rotterdam_1", "rotterdam_2", "rotterdam_3")
PAIRS = ("gf2_full_0", "gf2_full_2", "gf2_full_4")
SHIFTS = (0.0, 0.5, 1.0, 2.0, 3.0)
"""PAN pixels along both axes: an MS pixel shows what PAN shows so far down and right of it."""
WINDOW, REPEATS = 512, 2
COST = "--cost-of"
"""First word of a process that measures one method; `NOTHING` and `SCENE` are no methods."""
NOTHING, SCENE = "nothing", "scene"
TOLD = "told"

PICTURED, RGB, PICTURE_SIDE = "quickbird_toulouse_7", (2, 1, 0), 256
PICTURE_SHIFTS = (0.0, 1.0, 2.0, 3.0)
PICTURE_CROP, ZOOM, LOW, HIGH = (slice(88, 160), slice(88, 160)), 2, 2, 98
PICTURE_METHODS = ("bicubic", "gsa")
"""Of the classical ones."""
SIX_BITS = 0xFC

Scores = dict[str, float]


@dataclass(frozen=True)
class Entry:
    """A row of the tables."""

    label: str
    method: str | None = None
    """Classical."""
    model: str | None = None
    """Checkpoint or bundled name, where it is no classical method."""
    steps: int | None = None
    """None: the model's own."""
    told: bool = False
    """How soft the result is to be."""

    @staticmethod
    def parsed(word: str) -> Entry:
        """NAME=CHECKPOINT[@STEPS or @told]."""
        label, _, rest = word.partition("=")
        model, _, how = rest.partition("@")
        if not model or (how not in ("", TOLD) and not how.isdecimal()):
            raise argparse.ArgumentTypeError(f"{word} is not NAME=CHECKPOINT[@STEPS or @{TOLD}]")
        steps = int(how) if how.isdecimal() else None
        return Entry(label, model=model, steps=steps, told=how == TOLD)

    def sharpener(self) -> Sharpener:
        """Told that a result is to be as soft as its MS, until `informed`."""
        if self.method is not None:
            return load_sharpener(None, self.method)
        softness = {"softness": AS_MS} if self.told else {}
        return load_sharpener(self.model, steps=self.steps, **softness)


Methods = dict[str, tuple[Entry, Sharpener]]
"""By label."""


def informed(methods: Methods, scene: Scene) -> Iterator[tuple[str, Sharpener]]:
    """The methods, those to be told of the truth's softness told it."""
    for label, (entry, sharpener) in methods.items():
        if entry.told:
            tell(sharpener, softness_of(scene, RATIO))
        yield label, sharpener


def degradations(bands: int) -> dict[str, Degradation]:
    """Of the scenes; shifts have a table of their own."""
    return {
        "MTF 0.30, nested": Degradation(RATIO, "gaussian", (GAIN,) * bands),
        "cubic, nested": Degradation(RATIO, "cubic"),
    }


def unseen_scenes(path: Path) -> list[Scene]:
    return [scene for scene in read_scenes(path, "valid") if scene.name in SCENES]


# ------------------------------------------------------------------------------ reduced resolution


def scored(done: Sharpened, gt: Tensor) -> Scores:
    """Against the truth, validate.py's border left out."""
    inner = (..., slice(BORDER, -BORDER), slice(BORDER, -BORDER))
    fused, truth = done.hrms[inner].double(), gt[inner].double()
    scores = {
        "sam": float(sam(fused, truth)),
        "ergas": float(ergas(fused, truth, RATIO)),
        "psnr": float(psnr(fused, truth, float(truth.max()))),
        "q2n": float(q2n(fused, truth)),
    }
    if done.sigma is not None:
        within = (fused - truth).abs() < done.sigma[inner]
        scores["coverage_1_sigma"] = float(within.double().mean())
    return scores


def mean_of(found: Sequence[Scores]) -> Scores:
    """Geometric means of SAM and ERGAS, which differ tenfold between scenes; else arithmetic."""
    return {
        name: geometric_mean([s[name] for s in found])
        if name in ("sam", "ergas")
        else float(np.mean([s[name] for s in found]))
        for name in found[0]
    }


def reduced(scenes: Sequence[Scene], methods: Methods, max_value: float | None) -> dict[str, dict[str, list[Scores]]]:
    """Degradation -> method -> scores, one per scene."""
    found: dict[str, dict[str, list[Scores]]] = {}
    for scene in scenes:
        gt, pan = prepare(scene, RATIO)
        for name, degradation in degradations(len(gt)).items():
            ms = degrade_truth(gt, degradation)
            for label, sharpener in informed(methods, scene):
                done = sharpen_array(sharpener, pan, ms, max_value=max_value)
                found.setdefault(name, {}).setdefault(label, []).append(scored(done, gt))
    return found


def print_reduced(found: dict[str, dict[str, list[Scores]]], scenes: Sequence[Scene]) -> dict[str, Scores]:
    """All tables; returns the means of the first degradation."""
    means = {name: {label: mean_of(each) for label, each in by_method.items()} for name, by_method in found.items()}
    for name, by_method in means.items():
        rows = [scores_row(label, [scores]) for label, scores in by_method.items()]
        scores_table(f"Means over {len(scenes)} scenes, {name}", rows)
    for name, each in found.items():
        print(f"\n### ERGAS, SAM, scene by scene, {name}\n")
        header("", *(scene.name for scene in scenes))
        for label, all_scores in each.items():
            print_row(label, *(f"{s['ergas']:.2f}, {s['sam']:.2f}" for s in all_scores))
    return next(iter(means.values()))


# --------------------------------------------------------------------------------------- patches


def each_its_own(sharpener: Sharpener, patches: PatchBatch) -> Sharpened:
    """Every patch as a scene, which is all that a classical method can be shown of it."""
    pairs = zip(patches.pan, patches.ms, strict=True)
    return Sharpened(torch.stack([sharpen_array(sharpener, pan, ms).hrms for pan, ms in pairs]))


def patches_of(entry: Entry, files: Sequence[PanCollectionFile]) -> Scores:
    """Means over all patches of the files, no border cut, as docs/training.md has them."""
    found: dict[str, list[Tensor]] = {}
    for file in files:
        data = PanCollectionDataset([file])
        if entry.model is None:
            sharpen = partial(each_its_own, entry.sharpener())
        else:
            scale = data.scales[0]
            sharpen = image_sharpener(load_network(entry.model, needless=True, steps=entry.steps), file, scale)
        for _, patches, scale in validation_patches(data, len(data)):
            done = sharpen(patches)
            assert patches.gt is not None
            for name, values in patch_scores(done.hrms, patches, scale).items():
                found.setdefault(name, []).append(values)
            if done.sigma is not None:
                within = ((done.hrms - patches.gt).abs() < done.sigma).double().mean((1, 2, 3))
                found.setdefault("coverage_1_sigma", []).append(within)
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def print_patches(entries: Sequence[Entry], paths: Sequence[Path]) -> None:
    files = [PanCollectionFile(path, needs_gt=True) for path in paths]
    untold = [entry for entry in entries if not entry.told]
    rows = [scores_row(entry.label, [patches_of(entry, files)]) for entry in untold]
    scores_table(f"Means over {sum(map(len, files))} validation patches", rows)


# ------------------------------------------------------------------------------- full resolution


def full(images: Path, methods: Methods, max_value: float | None) -> dict[str, tuple[float, float]]:
    """Method -> HQNR with the nominal and with the pair's own MTF gain, means over `PAIRS`."""
    found: dict[str, list[list[float]]] = {}
    for pair in aligned_pairs(images, PAIRS):
        gains = (NOMINAL_GAIN, own_gain(pair))
        for label, (_, sharpener) in methods.items():
            hrms = sharpen_array(sharpener, pair.pan, pair.ms, max_value=max_value).hrms
            values = [float(s.hqnr) for s in judged(pair, hrms, gains)]
            found.setdefault(label, []).append(values)
    return {label: tuple(np.mean(each, 0)) for label, each in found.items()}


# ------------------------------------------------------------------------------------------ cost


@dataclass(frozen=True)
class Cost:
    """Of one window of `WINDOW` x `WINDOW` PAN pixels and 4 bands, on one thread."""

    steps: int | None
    """Network evaluations; None: no network."""
    parameters: int | None
    seconds_per_mpx: float
    """Of CPU time."""
    peak_mb: float
    """Beyond a process that has read the window and sharpens nothing."""


def cost_child(folder: Path, kind: str, name: str, steps: str) -> None:
    """What a process of its own does; prints what it found."""
    tune_cpu(1)
    store = folder / "window.npz"
    if kind == SCENE:
        scene = make_scene(WINDOW, seed=7)
        np.savez(store, pan=scene.pan, ms=scene.ms)
        return
    with np.load(store) as stored:
        pan, ms = (torch.from_numpy(stored[k].astype(np.float32)) for k in ("pan", "ms"))
    if kind == NOTHING:
        return
    method, model = (name, None) if kind == "method" else (None, name)
    sharpener = Entry(name, method, model, int(steps) if steps else None).sharpener()
    seconds = []
    for _ in range(REPEATS):
        began = time.process_time()
        sharpen_array(sharpener, pan, ms)
        seconds.append(time.process_time() - began)
    network = getattr(sharpener, "model", None)
    told = {
        "seconds": min(seconds),
        "steps": getattr(sharpener, "steps", None),
        "parameters": network and sum(p.numel() for p in network.parameters()),
    }
    print(json.dumps(told))


def costs(entries: Sequence[Entry]) -> dict[str, Cost]:
    """By label. To be called while this process is small: its peak counts as its children's."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:

        def child(kind: str, name: str = "", steps: int | None = None) -> tuple[float, str]:
            words = (COST, folder, kind, name, "" if steps is None else str(steps))
            return run([sys.executable, __file__, *words])[1:]

        child(SCENE)
        base, _ = child(NOTHING)
        for entry in entries:
            kind, name = ("method", entry.method) if entry.method else ("model", entry.model)
            peak, printed = child(kind, name or "", entry.steps)
            told = json.loads(printed)
            per_mpx = told["seconds"] / (WINDOW**2 / 1e6)
            found[entry.label] = Cost(told["steps"], told["parameters"], per_mpx, peak - base)
    return found


def print_whole(means: dict[str, Scores], hqnr: dict[str, tuple[float, float]], cost: dict[str, Cost]) -> None:
    """The one table."""
    print(f"\n### Reduced resolution ({next(iter(degradations(0)))}), full resolution, cost\n")
    header(
        *("", "SAM", "ERGAS", "PSNR", "Q4", f"HQNR, gain {NOMINAL_GAIN:.2f}", "HQNR, own gain"),
        *("steps", "parameters", "CPU s/Mpx", "peak MB"),
    )
    for label, scores in means.items():
        own = cost[label]
        print_row(
            label,
            *(f"{scores[k]:.{d}f}" for k, d in (("sam", 2), ("ergas", 2), ("psnr", 2), ("q2n", 3))),
            *(f"{value:.3f}" for value in hqnr[label]),
            own.steps or "-",
            f"{own.parameters:,}" if own.parameters else "-",
            *(f"{own.seconds_per_mpx:.3g}", f"{own.peak_mb:.0f}"),
        )


# ---------------------------------------------------------------------------------------- shifts


def displaced(gt: Tensor, shift: float) -> Tensor:
    """The MS, which lies off the truth and its PAN."""
    return degrade_truth(gt, Degradation(RATIO, "gaussian", (GAIN,) * len(gt), (shift, shift)))


def shifted(scenes: Sequence[Scene], methods: Methods, max_value: float | None) -> dict[str, dict[float, list[float]]]:
    """Method -> shift -> ERGAS against the truth, one per scene; the truth lies on the PAN."""
    found: dict[str, dict[float, list[float]]] = {label: {} for label in methods}
    for scene in scenes:
        gt, pan = prepare(scene, RATIO)
        for shift in SHIFTS:
            ms = displaced(gt, shift)
            for label, sharpener in informed(methods, scene):
                hrms = sharpen_array(sharpener, pan, ms, max_value=max_value).hrms
                value = float(ergas(inside(hrms), inside(gt), RATIO))
                found[label].setdefault(shift, []).append(value)
    return found


def print_shifted(found: dict[str, dict[float, list[float]]]) -> None:
    print("\n### PAN and MS apart: ERGAS; in brackets the worst scene's over its own at 0\n")
    columns = [f"{shift:g}" for shift in SHIFTS]
    header("", *columns, *(f"{column} over 0" for column in columns[1:]))
    for label, by_shift in found.items():
        own = by_shift[0.0]
        lost = [[a / b for a, b in zip(by_shift[s], own, strict=True)] for s in SHIFTS[1:]]
        print_row(
            label,
            *(f"{geometric_mean(by_shift[s]):.2f}" for s in SHIFTS),
            *(f"{geometric_mean(x):.2f} ({max(x):.2f})" for x in lost),
        )


def picture(scenes: Path, entries: Sequence[Entry], target: Path) -> None:
    """Crops of a scene that may be shown: rows are shifts, columns methods."""
    (scene,) = (s for s in read_scenes(scenes, "valid") if s.name == PICTURED)
    gt, pan = (x[:, :PICTURE_SIDE, :PICTURE_SIDE] for x in prepare(scene, RATIO))
    truth = gt.numpy()[:, *PICTURE_CROP]
    look = stretch_from(truth, low=LOW, high=HIGH, bands=RGB)
    grey = stretch_from(pan.numpy(), low=LOW, high=HIGH, bands=(0, 0, 0))

    def cell(image: Tensor, stretch: Stretch) -> np.ndarray:
        return enlarge(stretch.apply(image.numpy()[:, *PICTURE_CROP]), ZOOM)

    shown = [e for e in entries if (e.model and not e.told) or e.method in PICTURE_METHODS]
    rows = []
    for shift in PICTURE_SHIFTS:
        ms = displaced(gt, shift)
        row = [(f"PAN, MS off by {shift:g}", cell(pan, grey))]
        for entry in shown:
            row.append((entry.label, cell(sharpen_array(entry.sharpener(), pan, ms).hrms, look)))
        rows.append([*row, ("truth", cell(gt, look))])
    write_png(target, panels(rows) & SIX_BITS)


def arguments_of(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("models", nargs="+", type=Entry.parsed, help="see above")
    parser.add_argument("--patches", action="append", default=[], type=Path, help="h5, repeated")
    parser.add_argument("--picture", type=Path, help="draw this PNG as well")
    parser.add_argument("--only-reduced", action="store_true", help="no HQNR, cost, shifts")
    parser.add_argument("--max-value", type=float, help="full scale that scenes are divided by")
    return parser.parse_args(words)


def main() -> None:
    if sys.argv[1:2] == [COST]:
        folder, *words = sys.argv[2:]
        cost_child(Path(folder), *words)
        return
    arguments = arguments_of(sys.argv[1:])
    entries = [*(Entry(m, method=m) for m in CLASSICAL_METHODS), *arguments.models]
    cost = {} if arguments.only_reduced else costs(entries)
    tune_cpu()
    methods = {entry.label: (entry, entry.sharpener()) for entry in entries}
    scenes, max_value = unseen_scenes(arguments.scenes), arguments.max_value
    means = print_reduced(reduced(scenes, methods, max_value), scenes)
    if arguments.patches:
        print_patches(entries, arguments.patches)
    if not arguments.only_reduced:
        hqnr = full(arguments.images, {e.label: (e, e.sharpener()) for e in entries}, max_value)
        print_whole(means, hqnr, cost)
        print_shifted(shifted(scenes, methods, max_value))
    if arguments.picture:
        picture(arguments.scenes, entries, arguments.picture)


if __name__ == "__main__":
    main()
