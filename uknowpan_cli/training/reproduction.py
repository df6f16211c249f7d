"""A paper run again: its stages, the teacher's cache, the scores, and the published ones beside them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import h5py

from uknowpan.console import say
from uknowpan.durable import parsed, write_text
from uknowpan.errors import InputError, Interrupted, UsageError
from uknowpan.evaluation.h5 import measure_file
from uknowpan.evaluation.options import EvaluateOptions
from uknowpan.evaluation.report import INDICES
from uknowpan.models.metrics.sensors import Sensor
from uknowpan.models.published.costs import Cost, cache_bytes, cost_of
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.training.presets import Settings, preset
from uknowpan.models.training.run_folder import RunFolder, resolved_config
from uknowpan.training.caching import CacheRun, cache_answers
from uknowpan.training.options import TrainOptions
from uknowpan.training.run import run
from uknowpan.training.settings import TABLES, overridden, read_toml

STAGES = {"u-know": ("prior", "fsa-t", "fsa-s"), "pan-crafter": ("pan-crafter",), "ssdiff": ("ssdiff",)}
"""System -> stages of `uknowpan train`, in their order."""
PUBLISHED = {
    ("pan-crafter", "WV3"): {"sam": 2.787, "ergas": 2.040, "hqnr": 0.958},
    ("u-know", "WV3"): {"psnr": 37.93},
    ("u-know", "GF2"): {"psnr": 44.76},
}
"""Means of the papers' own tables, as far as we hold them."""
RATE = 1e13
"""Floating-point operations per second that the hours of a dry run assume; a GPU in float32 has about that."""


@dataclass(frozen=True)
class Reproduction:
    """A paper to repeat, and its files."""

    system: str
    data: Path
    sensor: Sensor
    out: Path
    preset: Literal["release", "paper", "lite"] = "release"
    tables: dict[str, Any] = field(default_factory=dict)
    """Stage -> tables of `uknowpan train --config`."""
    device: str = "cpu"
    num_threads: int | None = None

    def file(self, split: str) -> Path:
        """Path of train, valid, test (with a truth) or full (without)."""
        name = self.sensor.name.lower()
        return (
            self.data
            / {
                "train": f"training_data/train_{name}.h5",
                "valid": f"training_data/valid_{name}.h5",
                "test": f"test_data/test_{name}_multiExm1.h5",
                "full": f"test_data/test_{name}_OrigScale_multiExm1.h5",
            }[split]
        )

    def settings(self, stage: str) -> Settings:
        """The preset with the tables of the stage."""
        return overridden(preset(self.preset, stage, len(self.sensor.bands)), self.tables.get(stage, {}))

    def best(self, stage: str) -> Path:
        """Checkpoint of a stage."""
        return self.out / stage / "best.safetensors"

    @property
    def cache(self) -> Path:
        """The teacher's answers."""
        return self.out / "answers.h5"

    def is_done(self, stage: str) -> bool:
        """Whether the stage has taken its last step; ConfigMismatch where it took it with other settings."""
        settings, log = self.settings(stage), self.out / stage / "log.jsonl"
        lines = log.read_text().splitlines() if self.best(stage).exists() and log.exists() else []
        if not lines or int(parsed(lines[-1]).get("step", 0)) < settings.train.iterations:
            return False
        wanted = resolved_config(stage, settings.train, settings.network, settings.options)
        RunFolder(self.out / stage).check_config(wanted)
        return True


def read_stages(path: Path | None, system: str) -> dict[str, Any]:
    """Stage -> its tables, from a TOML with tables like [prior.train]. Raises UsageError."""
    tables = {} if path is None else read_toml(path)
    for stage, own in tables.items():
        if stage not in STAGES[system] or not isinstance(own, dict) or set(own) - set(TABLES):
            stages, inner = ", ".join(STAGES[system]), ", ".join(TABLES)
            raise UsageError(f"--config of {system} has tables of {stages}, and in them {inner}; not [{stage}].")
    return tables


def planned(job: Reproduction) -> dict[str, Any]:
    """Plan of a run: steps, missing files, expected hours and memory; JSON values."""
    count = _samples(job.file("train"))
    steps: list[dict[str, Any]] = []
    for stage in STAGES[job.system]:
        settings = job.settings(stage)
        if stage == "fsa-s":
            steps.append({"step": "cache", "done": job.cache.exists(), **_cache_cost(job, count)})
        cost = cost_of(settings.network, settings.options)
        entry = {"step": stage, "done": job.is_done(stage), "iterations": settings.train.iterations}
        steps.append(entry | _training_cost(cost, settings))
    steps += [{"step": split, "file": str(job.file(split)), "runs": job.file(split).exists()} for split in SCORED]
    return {
        **{"system": job.system, "sensor": job.sensor.name, "preset": job.preset, "out": str(job.out)},
        **{"device": job.device, "hours_assume_flops_per_second": RATE, "steps": steps, "missing": missing(job)},
    }


SCORED = {"test": "reduced", "full": "full"}
"""Test file -> kind of its scores."""


def _samples(path: Path) -> int | None:
    if not path.exists():
        return None
    with h5py.File(path, "r", locking="best-effort") as file:
        return int(file["ms"].shape[0]) if "ms" in file else None


def _training_cost(cost: Cost | None, settings: Settings) -> dict[str, Any]:
    if cost is None:
        return {}
    config = settings.train
    flops = cost.training_flops * config.batch_size * config.iterations
    memory = cost.state_bytes + cost.activation_bytes * config.batch_size
    return {"hours": _rounded(flops / RATE / 3600), "memory_gb": _rounded(memory / 1e9)}


def _cache_cost(job: Reproduction, count: int | None) -> dict[str, Any]:
    settings = job.settings("fsa-t")
    cost = cost_of(settings.network, settings.options)
    if count is None or cost is None:
        return {}
    hours = cost.forward_flops * settings.options.steps * count / RATE / 3600
    return {"hours": _rounded(hours), "disk_gb": _rounded(cache_bytes(settings.network.teacher) * count / 1e9)}


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")


def missing(job: Reproduction) -> list[str]:
    """Files that are not there although something needs them."""
    trains = not all(job.is_done(stage) for stage in STAGES[job.system])
    needed = (*(("train", "valid") if trains else ()), *SCORED)
    return [str(job.file(split)) for split in needed if not job.file(split).exists()]


def reproduce(job: Reproduction, *, quiet: bool) -> dict[str, Any]:
    """Run all that is not done; returns the scores beside the published ones, also written to OUT/scores.json.

    Raises:
        InputError: files for training are missing, or both test files.
        Interrupted: Ctrl-C or SIGTERM; the same call goes on.
    """
    absent = missing(job)
    training = [path for path in absent if "training_data" in path]
    if training or len([path for path in absent if path not in training]) == len(SCORED):
        raise InputError(f"{' and '.join(absent)} are missing; --dry-run lists what a run needs.")
    job.out.mkdir(parents=True, exist_ok=True)
    try:
        for stage in STAGES[job.system]:
            _train(job, stage, quiet)
    except Interrupted as error:
        raise Interrupted(f"{str(error).partition(';')[0]}; the same command goes on from there") from error
    rows = list(_scores(job, quiet))
    result = {"system": job.system, "sensor": job.sensor.name, "preset": job.preset, "scores": rows}
    write_text(job.out / "scores.json", json.dumps(result, indent=2) + "\n")
    return result


def _train(job: Reproduction, stage: str, quiet: bool) -> None:
    if job.is_done(stage):
        return
    if not quiet:
        say(f"{job.system}: {stage}")
    known: dict[str, Any] = {"stage": stage} if stage in STAGES["u-know"] else {"model": stage}
    if stage == "fsa-t":
        known["prior"] = job.best("prior")
    if stage == "fsa-s":
        if not job.cache.exists():
            teacher = FrozenTeacher(job.best("fsa-t"), device=job.device)
            cache_answers(teacher, job.file("train"), CacheRun(job.cache, resume=True, quiet=quiet))
        known["cache"] = [job.cache]
    options = TrainOptions(
        data=[job.file("train")],
        valid=[job.file("valid")],
        out=job.out / stage,
        preset=job.preset,
        resume=True,
        device=job.device,
        num_threads=job.num_threads,
        **known,
    )
    run(options, job.settings(stage), quiet=quiet)


def _scores(job: Reproduction, quiet: bool) -> Iterator[dict[str, Any]]:
    """A row for each index of each test file that is there."""
    published = PUBLISHED.get((job.system, job.sensor.name), {})
    for split in SCORED:
        path = job.file(split)
        if not path.exists():
            continue
        model = str(job.best(STAGES[job.system][-1]))
        options = EvaluateOptions(model=[model], sensor=job.sensor.name, device=job.device, num_threads=job.num_threads)
        results = measure_file(str(path), options, quiet=quiet).results
        mine = next(name for name in results.scores if name != "EXP")
        for index in results.scores[mine]:
            own = {name: round(results.mean(name, index), 5) for name in ("EXP", mine)}
            row = {"file": path.name, "images": results.images, "index": INDICES[index].label}
            yield {**row, "EXP": own["EXP"], "here": own[mine], "published": published.get(index)}


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """The scores as text, a line for each index."""
    lines = [f"{'index':<14}{'EXP':>12}{'here':>12}{'published':>12}  file"]
    for row in rows:
        published = "" if row["published"] is None else f"{row['published']:.4f}"
        lines.append(f"{row['index']:<14}{row['EXP']:>12.4f}{row['here']:>12.4f}{published:>12}  {row['file']}")
    return "\n".join(lines)
