"""Claims of the three papers, tested at `lite` size: each part of a network against the same network without it.

    uknowpan pack docs/recipes/scenes.csv --root IMAGERY -o runs/scenes.h5
    python tests/benchmarks/claims.py runs/scenes.h5 -o runs/claims          # the papers' parts
    python tests/benchmarks/claims.py runs/scenes.h5 -o runs/claims --flags  # the flags of the preset release

Trains on pairs of the splits "train" and "test", scores on those of "valid", and prints a row of Markdown as soon as
it is measured. A part is worth something where the mean gain over the seeds exceeds its spread (largest less smallest).
Run again, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import tomllib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.checkpoints import load_model
from uknowpan.models.pancollection.protocol import registration_of, wald_lms, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.published.pan_crafter.network import CrossModalityAttention, _pixel_norm
from uknowpan.models.published.ssdiff.network import Apfm
from uknowpan.models.published.stages import PatchStage
from uknowpan.models.published.uknow.teacher import FrequencySelectiveAttention
from uknowpan.models.training.scenes import Scene, read_scenes
from uknowpan.models.types import PatchBatch
from uknowpan.training.jobs import make_job, resolve
from uknowpan.training.options import TrainOptions
from uknowpan.training.run import run

RATIO, BANDS, PATCH, FULL_SCALE, FARTHEST = 4, 4, 32, 2047.0, 2
COARSE_PAN = ("Landsat", "Sentinel")

WITHOUT: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "frequency attention": (FrequencySelectiveAttention, "_mix", lambda self, query, key, value: 0 * value),
    "CM3A": (CrossModalityAttention, "forward", lambda self, x, token, guides: x + self.mlp(_pixel_norm(x))),
    "APFM": (Apfm, "_in_windows", lambda self, parts: parts.chunk(4, -1)[0] + parts.chunk(4, -1)[2]),
}
"""Parts that no option turns off: class, method, and what takes its place."""


@dataclass(frozen=True)
class Trial:
    """A network to train."""

    kind: str
    needs: tuple[str, ...] = ()
    """Trials of the same seed: the PriorNet of a teacher, or the teacher of a student."""
    settings: str = ""
    """TOML over the preset."""
    without: str = ""
    data: str = "plain"
    weights: str = ""
    """Trial whose weights are scored with these settings; "": the trial trains its own."""


FEWER = "train.validation_samples = 64\n"
TRIALS = {
    "prior": Trial("prior"),
    "teacher": Trial("fsa-t", ("prior",)),
    "teacher, no frequency attention": Trial("fsa-t", ("prior",), without="frequency attention"),
    "student": Trial("fsa-s"),
    "student, distilled": Trial("fsa-s", ("teacher",)),
    "student, distilled without theta": Trial("fsa-s", ("teacher",), "options.raw_uncertainty = true"),
    "pan-crafter": Trial("pan-crafter", data="displaced"),
    "pan-crafter, no MARs": Trial("pan-crafter", settings="options.pan_weight = 0.0", data="displaced"),
    "pan-crafter, no CM3A": Trial("pan-crafter", without="CM3A", data="displaced"),
    "ssdiff": Trial("ssdiff"),
    "ssdiff, no APFM": Trial("ssdiff", without="APFM"),
    "ssdiff, no FMIM": Trial("ssdiff", settings="network.frequency_modulation = false"),
    "teacher, 25 steps": Trial("fsa-t", ("prior",), f"{FEWER}options.steps = 25", weights="teacher"),
    "ssdiff, 10 steps": Trial("ssdiff", settings=f"{FEWER}options.steps = 10", weights="ssdiff"),
}
CLAIMS = [
    ("U-Know: distillation helps the student", "student, distilled", "student", "plain"),
    ("U-Know: uncertainty weights help it", "student, distilled", "student, distilled without theta", "plain"),
    ("U-Know: frequency attention helps it", "teacher", "teacher, no frequency attention", "plain"),
    ("U-Know: the student is as good as the teacher", "student, distilled", "teacher", "plain"),
    ("PAN-Crafter: MARs help, displaced pairs", "pan-crafter", "pan-crafter, no MARs", "displaced"),
    ("PAN-Crafter: CM3A helps, displaced pairs", "pan-crafter", "pan-crafter, no CM3A", "displaced"),
    ("PAN-Crafter: MARs help, aligned pairs", "pan-crafter", "pan-crafter, no MARs", "plain"),
    ("PAN-Crafter: CM3A helps, aligned pairs", "pan-crafter", "pan-crafter, no CM3A", "plain"),
    ("SSDiff: projections (APFM) beat a sum", "ssdiff", "ssdiff, no APFM", "plain"),
    ("SSDiff: frequency modulation (FMIM) helps", "ssdiff", "ssdiff, no FMIM", "plain"),
]
"""Claim, network with the part, network without it, validation pairs."""
FLAGS = [
    ("prior", "network.highpass_pan = true"),
    ("prior", "network.variance_floor = 0.0"),
    ("student", "train.ema = 0.0"),
    ("ssdiff, 10 steps", "options.strided_timesteps = true"),
    ("ssdiff, 10 steps", "options.respaced_time_index = true"),
    ("ssdiff, 10 steps", "options.clamped_hrms = true"),
    ("ssdiff", "network.noise_gain = 1.0"),
    ("pan-crafter", "options.raw_residual = true"),
    ("ssdiff", "network.detail_gain = 1.0"),
    ("pan-crafter, options.raw_residual = true", "network.bicubic_base = true"),
    ("ssdiff", "options.raw_residual = true"),
    ("pan-crafter", "options.released_crops = true"),
    ("ssdiff", "network.batch_norm = true"),
    ("pan-crafter", "network.overwritten_pan_keys = true"),
    ("teacher, 25 steps", "options.strided_timesteps = true"),
    ("teacher, 25 steps", "options.respaced_time_index = true"),
    ("teacher, 25 steps", "options.self_conditioning = false"),
    ("ssdiff", "network.group_norm = true"),
    ("ssdiff", "network.measured_ms = true"),
    ("ssdiff", "network.window = 0"),
    ("pan-crafter", "network.scrambled_ms_keys = true"),
    ("pan-crafter", "network.random_shifts = true"),
    ("teacher", "network.raw_prior = true"),
    ("teacher", "network.teacher.dead_prior = true"),
    ("ssdiff", "train.amp = false"),
    ("teacher", "options.raw_residual = true"),
]
"""Network without the flag, and the flag. Absent are flags without effect on patches of 32 x 32 pixels."""


def flag_rows() -> list[tuple[str, str, str, str]]:
    """`FLAGS` as rows like those of `CLAIMS`; adds their networks to `TRIALS`."""
    rows = []
    for base, flag in FLAGS:
        name, trial = f"{base}, {flag}", TRIALS[base]
        TRIALS[name] = replace(trial, settings=f"{trial.settings}\n{flag}")
        rows.append((name, name, base, trial.data))
    return rows


def write_patches(path: Path, scenes: Sequence[Scene], variants: int, displaced: bool) -> None:
    """Patches of pairs by Wald's protocol; displaced, each MS lies up to two PAN pixels off along each axis."""
    rng = np.random.default_rng(0)
    with PanCollectionWriter(path) as writer:
        for number, scene in enumerate(scenes):
            assert scene.pan is not None
            rows, cols = (n // RATIO * RATIO for n in scene.gt.shape[-2:])
            most = max(float(scene.gt.max()), float(scene.pan.max()))
            gt, pan = (x[:, :rows, :cols].double() * FULL_SCALE / most for x in (scene.gt, scene.pan))
            for _ in range(variants):
                dy, dx = rng.integers(-FARTHEST, FARTHEST + 1, 2) if displaced else (0, 0)
                wide = F.pad(gt[None], (FARTHEST,) * 4, mode="reflect")[0]
                there = wide[:, FARTHEST + dy :, FARTHEST + dx :][:, :rows, :cols]
                ms = wald_ms(there, [0.3] * BANDS, RATIO)
                whole = {"pan": pan, "ms": ms, "lms": wald_lms(ms, RATIO), "gt": gt}
                corners = list(product(range(0, rows - PATCH + 1, PATCH), range(0, cols - PATCH + 1, PATCH)))
                images = {name: torch.stack([_cut(v, rows, *c) for c in corners]) for name, v in whole.items()}
                writer.append(PatchBatch(**images), np.array([(number, y // RATIO, x // RATIO) for y, x in corners]))
        writer.finish({"max_value": FULL_SCALE, "registration": registration_of(RATIO)})
        writer.publish()


def _cut(image: Tensor, rows: int, y: int, x: int) -> Tensor:
    step = rows // image.shape[-2]
    return image[:, y // step : (y + PATCH) // step, x // step : (x + PATCH) // step]


def usable(scenes: Sequence[Scene]) -> list[Scene]:
    """Pairs of four bands at ratio 4 whose truth is the MS itself."""
    return [
        s
        for s in scenes
        if s.pan is not None and len(s.gt) == BANDS and min(s.gt.shape[-2:]) >= PATCH and s.weight >= 0.5
        if not s.name.endswith("_sharp") and not s.sensor.startswith(COARSE_PAN)
    ]


def score(folder: Path, name: str, seed: int, iterations: int) -> dict[str, float]:
    """ERGAS of a trained trial on both kinds of validation pairs; trains it, and what it needs, where it is missing."""
    trial = TRIALS[name]
    needs = [folder / f"{need} {seed}" for need in trial.needs]
    for need in trial.needs:
        score(folder, need, seed, iterations)
    if trial.weights:
        score(folder, trial.weights, seed, iterations)
    out, result = folder / f"{trial.weights or name} {seed}", folder / f"{name} {seed}.json"
    if result.exists():
        known: dict[str, float] = json.loads(result.read_text())
        return known
    kind_of = {"model" if trial.kind in ("pan-crafter", "ssdiff") else "stage": trial.kind}
    given: dict[str, Any] = {"prior" if trial.kind == "fsa-t" else "teacher": n / "last.safetensors" for n in needs}
    often = {"warmup": iterations // 10, "validate_every": iterations, "checkpoint_every": max(iterations // 4, 1)}
    train = {"iterations": iterations, "batch_size": 8, "seed": seed, **often}
    scores = {}
    with ExitStack() as stack:
        if trial.without:
            stack.enter_context(patch.object(*WITHOUT[trial.without]))
        for kind in ("displaced", "plain") if trial.data == "displaced" else ("plain",):
            valid = [folder / f"{kind}_valid.h5"]
            data = [folder / f"{trial.data}_train.h5"]
            options = TrainOptions(data=data, valid=valid, out=out, resume=True, device="cpu", **kind_of, **given)
            tables = tomllib.loads(trial.settings)
            settings = resolve(options, {**tables, "train": {**train, **tables.get("train", {})}})
            if kind == trial.data and not trial.weights:
                run(options, settings, quiet=True)
            stage = make_job(options, settings)
            assert isinstance(stage, PatchStage)
            scores[kind] = stage.validate(load_model(out / "last.safetensors")[0].eval())["ergas"]
    result.write_text(json.dumps(scores))
    return scores


def verdict(gains: Sequence[float]) -> str:
    """A word for gains in per cent, one for each seed."""
    mean, spread = sum(gains) / len(gains), max(gains) - min(gains)
    if abs(mean) <= spread or len(gains) < 2:
        return "not decided"
    return "holds" if mean > 0 else "does not hold"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes")
    parser.add_argument("-o", dest="folder", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", action="store_true")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    for split, kind in product(("train", "valid"), ("plain", "displaced")):
        path, displaced = folder / f"{kind}_{split}.h5", kind == "displaced"
        if not path.exists():
            splits = ("train", "test") if split == "train" else (split,)
            every = sorted((s for n in splits for s in read_scenes(arguments.scenes, n)), key=lambda s: s.name)
            scenes = usable(every)
            write_patches(path, scenes, 4 if displaced and split == "train" else 1, displaced)
    print("| claim | with | without | gain | spread | |\n|---|---|---|---|---|---|")
    for claim, with_part, without, kind in flag_rows() if arguments.flags else CLAIMS:
        pairs = [
            tuple(score(folder, name, seed, arguments.iterations)[kind] for name in (with_part, without))
            for seed in range(arguments.seeds)
        ]
        gains = [100 * (1 - one / other) for one, other in pairs]
        means = [f"{sum(column) / len(pairs):.2f}" for column in zip(*pairs, strict=True)]
        numbers = f"{sum(gains) / len(gains):+.1f} % | {max(gains) - min(gains):.1f}"
        print(f"| {claim} | {means[0]} | {means[1]} | {numbers} | {verdict(gains)} |", flush=True)


if __name__ == "__main__":
    main()
