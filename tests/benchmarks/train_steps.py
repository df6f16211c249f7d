"""Seconds and memory of a training step of every stage; prints Markdown, stores JSON.

    python tests/benchmarks/train_steps.py --steps 6 --json runs/train_steps.json
    python tests/benchmarks/train_steps.py --only lite-student lite-teacher --bands 4

A step is that of `uknowpan train`: forward, loss, backward, clipping, AdamW, EMA; the batch of
64 x 64 patches waits in memory. Every row is a process of its own. Half of the steps of a network
with a slot for self-conditioning take one more evaluation: so many steps of either kind are
measured as asked for, and the mean of both medians is what a step costs. Memory is the peak beyond
what the process took before the stage was made: weights, optimiser, EMA, activations, teacher.

`paper-student-release` simulates the release, which evaluates the whole diffusion twice per step
and uses the second result only (B5).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from uknowpan.models.checkpoints import save_checkpoint
from uknowpan.models.devices import tune_cpu
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile, PatchBatch
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.published.stages import PatchData, PriorStage, TeacherStage
from uknowpan.models.published.uknow.distillation import CachedDataset, CacheFile, FrozenTeacher, write_cache
from uknowpan.models.published.uknow.student_stage import StudentStage
from uknowpan.models.training.loop import _Run
from uknowpan.models.training.presets import Settings, preset
from uknowpan.models.types import Condition, Denoised

SIZE, RATIO, FULL_SCALE = 64, 4, 2047.0


@dataclass(frozen=True)
class Case:
    """What is trained."""

    preset: str
    stage: str
    teacher: str = ""
    """"", "fly" (asked at every step) or "cache"."""
    release: bool = False


CASES = {
    "paper-prior": Case("paper", "prior"),
    "paper-teacher": Case("paper", "fsa-t"),
    "paper-student": Case("paper", "fsa-s"),
    "paper-student-fly": Case("paper", "fsa-s", "fly"),
    "paper-student-cache": Case("paper", "fsa-s", "cache"),
    "paper-student-release": Case("paper", "fsa-s", "cache", release=True),
    "lite-prior": Case("lite", "prior"),
    "lite-teacher": Case("lite", "fsa-t"),
    "lite-student": Case("lite", "fsa-s"),
    "lite-student-fly": Case("lite", "fsa-s", "fly"),
}
"""Name on the command line -> what is trained."""


@dataclass(frozen=True)
class Plan:
    """How all rows of one number of bands are measured."""

    folder: Path
    bands: int
    batch: int
    steps: int
    warmup: int
    device: str
    threads: int

    @property
    def data(self) -> Path:
        return self.folder / f"train{self.bands}.h5"

    def checkpoint(self, size: str, stage: str) -> Path:
        return self.folder / f"{size}-{stage}-{self.bands}.safetensors"

    def cache(self, size: str) -> Path:
        return self.folder / f"{size}-cache{self.bands}.h5"


@dataclass(frozen=True)
class Row:
    """What a step costs."""

    name: str
    bands: int
    parameters: int
    """That are trained."""
    seconds: float
    plain: float
    """Median of steps without an evaluation for self-conditioning."""
    conditioned: float | None
    """Median of those with it; None for networks without a slot."""
    memory_mb: float
    """10^6 bytes."""


# ------------------------------------------------------------------------------ made-up inputs


def write_data(plan: Plan) -> None:
    """One batch of random patches with the spectrum of noise at two scales."""
    g = torch.Generator().manual_seed(plan.bands)
    coarse = torch.rand(plan.batch, plan.bands, SIZE // RATIO, SIZE // RATIO, generator=g)
    fine = torch.rand(plan.batch, plan.bands, SIZE, SIZE, generator=g)
    gt = (F.interpolate(coarse, scale_factor=RATIO, mode="bicubic") + 0.2 * fine) * 1000
    ms = F.avg_pool2d(gt, RATIO)
    lms = F.interpolate(ms, scale_factor=RATIO, mode="bilinear")
    patches = PatchBatch(gt.mean(1, keepdim=True), ms, lms, gt)
    with PanCollectionWriter(plan.data) as writer:
        writer.append(patches, np.zeros((plan.batch, 3), np.int32))
        writer.finish({"max_value": FULL_SCALE, "registration": "area"})
        writer.publish()


def write_teacher(plan: Plan, size: str) -> None:
    """A PriorNet and a teacher that asks it, both untrained."""
    for stage_name in ("prior", "fsa-t"):
        torch.manual_seed(0)
        stage = make_stage(plan, Case(size, stage_name), settings_of(plan, size, stage_name))
        card = stage.card(f"untrained-{size}", 0, {})
        save_checkpoint(plan.checkpoint(size, stage_name), stage.build(), card)


def write_answers(plan: Plan, size: str) -> None:
    """The cache of the untrained teacher's answers."""
    tune_cpu(plan.threads)
    teacher = FrozenTeacher(plan.checkpoint(size, "fsa-t"), device=plan.device)
    write_cache(teacher, PanCollectionFile(plan.data), FULL_SCALE, plan.cache(size))


def settings_of(plan: Plan, size: str, stage: str) -> Settings:
    """The preset's, with the batch that is asked for."""
    found = preset(size, stage, plan.bands)
    return replace(found, train=replace(found.train, batch_size=plan.batch))


def make_stage(plan: Plan, case: Case, settings: Settings) -> Any:
    """The stage as `uknowpan train` makes it."""
    dataset: Any = PanCollectionDataset([PanCollectionFile(plan.data, needs_gt=True)])
    drawn = dataset
    if case.teacher == "cache":
        drawn = CachedDataset(dataset, [CacheFile(plan.cache(case.preset))])
    sampler = PatchSampler(len(dataset), batch_size=plan.batch, seed=0)
    data = PatchData(PatchBatches(drawn, sampler), dataset, device=plan.device)
    if case.stage == "prior":
        return PriorStage(settings.network, data, settings.options)
    if case.stage == "fsa-t":
        prior = plan.checkpoint(case.preset, "prior")
        return TeacherStage(settings.network, data, settings.options, prior)
    teacher = None
    if case.teacher == "fly":
        teacher = FrozenTeacher(plan.checkpoint(case.preset, "fsa-t"), device=plan.device)
    kind = ReleaseStudentStage if case.release else StudentStage
    return kind(settings.network, data, settings.options, teacher)


class ReleaseStudentStage(StudentStage):
    """The student as the release trains it."""

    def denoise(self, *arguments: Any) -> Denoised:
        super().denoise(*arguments)
        return super().denoise(*arguments)


# ---------------------------------------------------------------------------------- measuring


def evaluations(stage: Any, batch: Any, step: int) -> int:
    """How often a step evaluates the network, found by asking the stage without one."""
    if not hasattr(stage, "denoise"):
        return 1
    patches = getattr(batch, "patches", batch)
    network = getattr(stage.network, "teacher", stage.network)
    calls = 0

    def counted(x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
        nonlocal calls
        calls += 1
        return Denoised(x_t)

    # The generator of `_Run.take` at seed 0.
    generator = torch.Generator().manual_seed(step)
    slot = getattr(network, "self_conditioning", False)
    stage.denoise(counted, patches.lms, Condition(patches.lms, patches.pan), generator, slot)
    return calls


def choose_steps(stage: Any, batch: Any, start: int) -> tuple[Iterator[int], Iterator[int] | None]:
    """Step numbers with the fewest evaluations, and those with the most; None if all are alike."""
    known = {step: evaluations(stage, batch, step) for step in range(start, start + 64)}
    fewest, most = min(known.values()), max(known.values())

    def of(wanted: int) -> Iterator[int]:
        return (step for step in count(start) if evaluations(stage, batch, step) == wanted)

    return of(fewest), (of(most) if most > fewest else None)


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"the system does not say the {field} of a process")


def clock(run: Any, batch: Any, step: int) -> float:
    """Seconds of a step."""
    run.step = step
    began = time.perf_counter()
    run.take(batch)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - began


def measure(plan: Plan, name: str) -> Row:
    """One row; to be called in a process of its own."""
    tune_cpu(plan.threads)
    case, device = CASES[name], torch.device(plan.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.init()
    before = resident("VmRSS")
    settings = settings_of(plan, case.preset, case.stage)
    stage = make_stage(plan, case, settings)
    run = _Run(stage, settings.train, plan.folder, device, None)
    run.prepare()
    with closing(stage.batches(0, 1)) as batches:
        batch = next(batches)
    # In the middle of training, where weights are averaged.
    plain, conditioned = choose_steps(stage, batch, settings.train.iterations // 2)
    for step in islice(conditioned or plain, plan.warmup):
        clock(run, batch, step)
    medians = [
        statistics.median(clock(run, batch, step) for step in islice(kind, plan.steps))
        for kind in (plain, conditioned)
        if kind is not None
    ]
    used = torch.cuda.max_memory_allocated(device) if on_gpu else resident("VmHWM") - before
    return Row(
        name=name,
        bands=plan.bands,
        parameters=sum(p.numel() for p in run.trained),
        seconds=statistics.mean(medians),
        plain=medians[0],
        conditioned=medians[1] if conditioned else None,
        memory_mb=used / 1e6,
    )


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rows_of(plan: Plan, names: Sequence[str]) -> Iterator[Row]:
    """All rows of one number of bands; what they need is made first."""
    cases = [CASES[name] for name in names]
    alone(write_data, plan)
    for size in sorted({c.preset for c in cases if c.teacher or c.stage == "fsa-t"}):
        alone(write_teacher, plan, size)
    for size in sorted({c.preset for c in cases if c.teacher == "cache"}):
        alone(write_answers, plan, size)
    for name in names:
        yield alone(measure, plan, name)


def digits(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--steps", type=int, default=5, help="measured steps of either kind")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bands", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no CUDA device; use --device cpu")
    if min(arguments.steps, arguments.batch, arguments.threads) < 1 or arguments.warmup < 0:
        parser.error("--steps, --batch and --threads must be at least 1, --warmup at least 0")
    return arguments


def main() -> None:
    arguments = arguments_of()
    gpu = arguments.device.startswith("cuda")
    where = torch.cuda.get_device_name(arguments.device) if gpu else platform.machine()
    print(
        f"{where}, {arguments.threads} threads, PyTorch {torch.__version__}, batch "
        f"{arguments.batch} of {SIZE} x {SIZE}, {arguments.steps} steps of either kind\n"
    )
    memory = "peak CUDA MB" if gpu else "peak MB beyond the start"
    print(f"| stage | bands | parameters | s per step | plain | self-conditioned | {memory} |")
    print("|---|---|---|---|---|---|---|", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for bands in arguments.bands:
            plan = Plan(
                folder=Path(name),
                bands=bands,
                batch=arguments.batch,
                steps=arguments.steps,
                warmup=arguments.warmup,
                device=arguments.device,
                threads=arguments.threads,
            )
            for row in rows_of(plan, arguments.only):
                rows.append(row)
                times = " | ".join(map(digits, (row.seconds, row.plain, row.conditioned)))
                print(
                    f"| {row.name} | {row.bands} | {row.parameters:,} | {times} | {row.memory_mb:.0f} |",
                    flush=True,
                )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        stored = {
            "where": where,
            "device": arguments.device,
            "threads": arguments.threads,
            "torch": torch.__version__,
            "batch": arguments.batch,
            "steps": arguments.steps,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
