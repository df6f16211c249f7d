"""Scores of the three stages and their ablations on the validation patches, as Markdown.

    sh docs/recipes/three-stages/run.sh ../shared/imagery runs/three-stages
    python tests/benchmarks/three_stages.py runs/three-stages

Every row is measured anew from the run's best checkpoint (not read from its log), all on the same
patches. Rows of several seeds show mean and half the range.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uknowpan.models.checkpoints import load_model
from uknowpan.models.devices import tune_cpu
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.stages import PatchData, PriorStage, TeacherStage, patch_scores, validation_patches
from uknowpan.models.published.uknow.student_stage import StudentStage
from uknowpan.models.training.presets import preset

FILES = ("pairs", "qb")
COLUMNS = {"sam": "SAM", "ergas": "ERGAS", "psnr": "PSNR", "q2n": "Q4"}

STAGES = (
    ("PriorNet", "prior"),
    ("teacher FSA-T", "teacher"),
    ("student FSA-S, distilled", "student"),
    ("student FSA-S, truth alone", "student-alone"),
)
ABLATIONS = (
    ("teacher", "ablation-teacher"),
    ("prior dead (B0)", "dead-prior"),
    ("residual as it is (B4)", "raw-residual"),
    ("student, normalised uncertainty", "ablation-student"),
    ("uncertainty as it is", "raw-uncertainty"),
    ("truth alone", "ablation-alone"),
)
SAMPLINGS = [(steps, respaced) for steps in (1, 2, 4, 25) for respaced in (False, True)]


def dataset(runs: Path, split: str) -> PanCollectionDataset:
    return PanCollectionDataset([PanCollectionFile(runs / f"{f}_{split}.h5") for f in FILES])


def scores_of(path: Path, data: PatchData, **changes: Any) -> dict[str, float]:
    """Validation scores of a checkpoint; `changes` are of its stage's options."""
    model, card = load_model(path)
    settings = preset("lite", card.stage, data.bands)
    options = replace(settings.options, **card.training["config"]["options"])
    options = replace(options, **changes)
    if card.stage == "prior":
        return PriorStage(model.config, data, options).validate(model)
    if card.stage == "fsa-t":
        return TeacherStage(model.config, data, options, path).validate(model)
    return StudentStage(model.config, data, options).validate(model)


def scores_of_lms(valid: PanCollectionDataset) -> dict[str, float]:
    """What interpolation alone gives (EXP)."""
    sums: dict[str, float] = {}
    for _, patches, scale in validation_patches(valid, len(valid)):
        for name, values in patch_scores(patches.lms, patches, scale).items():
            sums[name] = sums.get(name, 0.0) + float(values.sum()) / len(valid)
    return sums


def row(label: str, found: Sequence[dict[str, float]]) -> str:
    cells = []
    for name in COLUMNS:
        values = [scores[name] for scores in found]
        digits = 4 if name == "q2n" else 3 if name != "psnr" else 2
        cell = f"{sum(values) / len(values):.{digits}f}"
        if len(values) > 1:
            cell += f" ± {(max(values) - min(values)) / 2:.{digits}f}"
        cells.append(cell)
    coverage = [s["coverage_1_sigma"] for s in found if "coverage_1_sigma" in s]
    cells.append(f"{sum(coverage) / len(coverage):.2f}" if coverage else "")
    return f"| {label} | {' | '.join(cells)} |"


def table(title: str, rows: Sequence[str]) -> None:
    print(f"\n### {title}\n")
    print(f"| | {' | '.join(COLUMNS.values())} | within 1 sigma |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    print("\n".join(rows), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--num-threads", type=int)
    arguments = parser.parse_args()
    tune_cpu(arguments.num_threads)
    runs = arguments.runs
    train, valid = dataset(runs, "train"), dataset(runs, "valid")
    batches = PatchBatches(train, PatchSampler(len(train), batch_size=1, seed=0))
    data = PatchData(batches, valid, validation_samples=len(valid))
    print(f"{len(train)} training, {len(valid)} validation patches.")

    def best(name: str) -> Path:
        return runs / name / "best.safetensors"

    rows = [row("EXP (LMS)", [scores_of_lms(valid)])]
    for label, name in STAGES:
        rows.append(row(label, [scores_of(best(name), data)]))
    table("The three stages", rows)
    table(
        "Sampling of the teacher",
        [
            row(
                f"{steps} steps, {'number of the step (B1)' if wrong else 'true timestep'}",
                [scores_of(best("teacher"), data, steps=steps, respaced_time_index=wrong)],
            )
            for steps, wrong in SAMPLINGS
        ],
    )
    table(
        "Ablations",
        [row(label, [scores_of(best(f"{name}-{seed}"), data) for seed in (0, 1)]) for label, name in ABLATIONS],
    )


if __name__ == "__main__":
    main()
