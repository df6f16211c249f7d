"""Whether CM3A or frequency modulation helps the `generic` student, at equal cost.

    python tests/benchmarks/generic_blocks.py runs/scenes.h5 --out runs/blocks --train control
    python tests/benchmarks/generic_blocks.py runs/scenes.h5 --out runs/blocks --train cm3a
    python tests/benchmarks/generic_blocks.py runs/scenes.h5 --out runs/blocks --train wide
    python tests/benchmarks/generic_blocks.py runs/scenes.h5 --out runs/blocks --train fmim
    python tests/benchmarks/generic_blocks.py runs/scenes.h5 --out runs/blocks --compare

Preparing the batches takes as long as learning from them or longer: the first training keeps them
in a folder batches-SEED (9 GB, to be deleted afterwards). Each `--train` goes on from the same
weights with the same batches (or resumes), with one part added before the blocks of the 4 x 4 grid;
the part says nothing at the start. `--compare` prints, as Markdown, what the weights at the end of
each training in the folder score and cost.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from grouped_bands import training_of
from safetensors.torch import load_file
from torch import Tensor, nn
from validate import Row, geometric_mean, measure, summary, unseen_degradations

from uknowpan.models.checkpoints import Card, find_checkpoint, load_model, read_card
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.devices import tune_cpu
from uknowpan.models.features import PAN_FEATURES
from uknowpan.models.network import BandBlock, FSAStudentLite, LiteConfig, PixelNorm, _add_shared, _compress
from uknowpan.models.published.pan_crafter.network import NeighbourhoodAttention
from uknowpan.models.published.stages import channels_last
from uknowpan.models.published.uknow.student_stage import GenericStudentStage
from uknowpan.models.resample import box_mean
from uknowpan.models.sharpeners import Sharpener, StudentSharpener, load_sharpener
from uknowpan.models.statistics import scene_statistics
from uknowpan.models.training.loop import TrainConfig, train
from uknowpan.models.training.scenes import TrainBatch, read_scenes
from uknowpan.models.types import Condition, Denoised
from uknowpan.training.jobs import make_job, resolve

RECIPE = Path(__file__).parents[2] / "docs/recipes/generic-softness.toml"
STEPS, LEARNING_RATE, WARMUP = 800, 4e-4, 50
AVERAGING = 0.99
"""Of the averaged weights: 0.999, as the recipe has it, would still be 45 % the start's."""
SEED = 31
DEGRADATIONS = 6
"""Of each scene, half of the usual: most of the time of 800 steps went into making them."""
SCENES = "rotterdam_2,henan,pleiades_urban,spot6_cropland,landsat8_float,landsat7_39,quickbird_0,gf2_4"
CELL = 4
"""PAN pixels per pixel of the grid that parts are added on."""
HEADS, HEAD_WIDTH = 1, 16
"""Of the attention; four heads, all that 64 channels hold, double the time of the whole network."""
OWN_DETAIL, LOW_PAN = 3, 2
"""Band feature and PAN feature: what lms and the degraded PAN show beside their local means."""
BOX = 17
"""Cells of the local mean that is damped, the side of a training patch."""
DAMPING_SPEED = 8.0
"""A step of the optimizer is at most the learning rate: so much faster, all can be damped."""
TILE, RATIO, BANDS = 512, 4, 4
ROUNDS = 7


# ------------------------------------------------------------------------------------- variants


class Control(FSAStudentLite):
    """The student with nothing added."""


class Added(FSAStudentLite):
    """The student with one more part before its deep blocks."""

    added_reach = 0
    """PAN pixels that the part adds to what an output pixel depends on."""

    def __init__(self, config: LiteConfig):
        super().__init__(config)
        self.deep_blocks.insert(0, self.part(config.deep_width, 4 * config.width))

    def part(self, channels: int, embedding: int) -> nn.Module:
        """What is added: (B * C, channels, h, w), (B, embedding), C -> as the first."""
        raise NotImplementedError

    @property
    def reach(self) -> int:
        return super().reach + self.added_reach

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The plain student's weights, its deep blocks behind the part."""
        return super().adopt({_behind_part(k): v for k, v in weights.items()})


def _behind_part(key: str) -> str:
    """The name of a weight once there is one deep block more before it."""
    head, _, rest = key.partition("deep_blocks.")
    if head or not rest:
        return key
    number, _, name = rest.partition(".")
    return f"deep_blocks.{int(number) + 1}.{name}"


class Wide(Added):
    """A residual block more, with the mean over the bands as context."""

    added_reach = 2 * CELL

    def part(self, channels: int, embedding: int) -> nn.Module:
        return BandBlock(channels, embedding)


class CrossModality(nn.Module):
    """CM3A for one band: each cell asks its 3 x 3 neighbours in its own lms and in the PAN.

    As `uknowpan.models.published.pan_crafter.network` builds it, with these differences: `HEADS` heads, not as many
    as the channels hold; gates by the embedding of timestep and scene in place of the mode;
    convolutions of 1 x 1, PAN-Crafter's of the coarsest scale; no MLP, as the deep blocks follow.
    """

    def __init__(self, channels: int, embedding: int):
        super().__init__()
        self.width = width = HEADS * HEAD_WIDTH
        self.norm = PixelNorm(channels)
        self.seen = nn.Conv2d(channels, 5 * width, 1)
        """Query, key and value for the lms, key and value for the PAN."""
        self.ms = nn.Conv2d(CELL**2, 2 * width, 1, bias=False)
        self.pan_key = nn.Conv2d(CELL**2, width, 1, bias=False)
        self.pan_value = nn.Conv2d(PAN_FEATURES * CELL**2, width, 1, bias=False)
        self.attention = NeighbourhoodAttention(HEAD_WIDTH)
        self.out_ms, self.out_pan = (nn.Conv2d(width, channels, 1) for _ in range(2))
        self.gates = nn.Linear(embedding, 2 * channels)
        nn.init.zeros_(self.gates.weight)
        nn.init.zeros_(self.gates.bias)
        self.guides: tuple[Tensor, Tensor] | None = None

    def see(self, condition: Condition) -> None:
        """Take what is asked of from the condition of the next call."""
        assert condition.band_features is not None and condition.pan_features is not None
        own = condition.band_features[:, :, OWN_DETAIL].flatten(0, 1)[:, None]
        self.guides = _to_cells(own), _to_cells(condition.pan_features)

    def forward(self, x: Tensor, embedding: Tensor, bands: int) -> Tensor:
        """x (B * C, channels, h, w), embedding (B, E) -> as x."""
        assert self.guides is not None
        (ms, pan), self.guides = self.guides, None
        low = pan[:, LOW_PAN * CELL**2 : (LOW_PAN + 1) * CELL**2]
        query, *seen = self.seen(self.norm(x)).chunk(5, 1)
        key_ms, value_ms = (torch.cat(seen[:2], 1) + self.ms(ms)).chunk(2, 1)
        of_pan = torch.cat([self.pan_key(low), self.pan_value(pan)], 1)
        key_pan, value_pan = _add_shared(torch.cat(seen[2:], 1), of_pan, bands).chunk(2, 1)
        gates = self.gates(embedding)[:, :, None, None].repeat_interleave(bands, 0)
        ms_gate, pan_gate = gates.chunk(2, 1)
        x = x + ms_gate * self.out_ms(self.attention(query, key_ms, value_ms))
        return x + pan_gate * self.out_pan(self.attention(query, key_pan, value_pan))


def _to_cells(x: Tensor) -> Tensor:
    """(B, K, H, W) -> (B, 16 K, H / 4, W / 4), a feature's 16 pixels side by side."""
    return F.pixel_unshuffle(_compress(x), CELL).contiguous(memory_format=torch.channels_last)


class Cm3a(Added):
    """PAN-Crafter's attention across modalities."""

    added_reach = CELL

    def part(self, channels: int, embedding: int) -> nn.Module:
        return CrossModality(channels, embedding)

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, with_features: bool = False) -> Denoised:
        part = self.deep_blocks[0]
        assert isinstance(part, CrossModality)
        part.see(condition)
        return super().forward(x_t, t, condition, with_features)


class LocalFrequencies(nn.Module):
    """SSDiff's damping of the lowest spatial frequencies, in a form that knows no tile.

    x - (1 - s) mean of x around, s per channel. The mean over a box stands for the 2 x 2 lowest
    frequencies of the whole feature map, which would change with how a scene is cut. The boost of
    half the channels is left out: any convolution that follows can learn it.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.damping = nn.Parameter(torch.zeros(channels))
        """(1 - s) / DAMPING_SPEED."""

    def forward(self, x: Tensor, embedding: Tensor, bands: int) -> Tensor:
        """x (B * C, channels, h, w) -> as x; the rest is not looked at."""
        return x - DAMPING_SPEED * self.damping[:, None, None] * box_mean(x, BOX)


class Fmim(Added):
    """Frequency modulation."""

    added_reach = BOX // 2 * CELL

    def part(self, channels: int, embedding: int) -> nn.Module:
        return LocalFrequencies(channels)


VARIANTS: dict[str, type[FSAStudentLite]] = {
    "control": Control,
    "cm3a": Cm3a,
    "wide": Wide,
    "fmim": Fmim,
}


# ------------------------------------------------------------------------------------- training


class VariantStage(GenericStudentStage):
    """Trains a variant as the plain student is trained."""

    variant = "control"
    store: Path
    """Folder of the batches."""

    def build(self) -> nn.Module:
        return channels_last(VARIANTS[self.variant](self.network))

    def batch(self, step: int) -> TrainBatch:
        file = self.store / f"{step}.pt"
        if file.exists():
            return torch.load(file, weights_only=False)  # of this script's own making
        made = super().batch(step)
        temporary = file.with_suffix(".tmp")
        torch.save(made, temporary)
        temporary.replace(file)
        return made

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
        return replace(super().card(name, step, scores), architecture=self.variant)


def stage_and_config(scenes: Path, init: Path, seed: int, steps: int) -> tuple[VariantStage, TrainConfig]:
    """How all variants are trained: by the recipe, with the network of `init`."""
    request = training_of(scenes, RECIPE, init)
    recipe = resolve(request)
    config = replace(
        recipe.train,
        iterations=steps,
        learning_rate=LEARNING_RATE,
        warmup=WARMUP,
        seed=seed,
        ema=AVERAGING,
        validate_every=steps,
    )
    settings = replace(recipe, train=config, network=LiteConfig(**read_card(init).config))
    job = make_job(request, settings)
    assert isinstance(job, GenericStudentStage)
    job.train_data.variants = DEGRADATIONS
    stage = VariantStage(settings.network, job.train_data, job.valid_data, options=job.options, notes=job.notes)
    return stage, config


def trained(folder: Path) -> StudentSharpener:
    """A variant as its training left it."""
    file = folder / "last.safetensors"
    card = read_card(file)
    model = VARIANTS[card.architecture](LiteConfig(**card.config))
    model.load_state_dict(load_file(file))
    return StudentSharpener(model.eval(), card)


# ------------------------------------------------------------------------------------ comparing


def seconds_per_mpx(students: dict[str, StudentSharpener]) -> dict[str, float]:
    """Of one thread and one tile, its features and its margin included; the least of `ROUNDS`.

    The networks take turns, so that what else the machine does hits all alike.
    """
    pan = torch.rand(1, 2 * TILE, 2 * TILE, generator=torch.Generator().manual_seed(0))
    ms = F.avg_pool2d(pan, RATIO).repeat(BANDS, 1, 1)
    statistics = scene_statistics([(pan, ms)], RATIO)
    found = dict.fromkeys(students, float("inf"))
    for _ in range(ROUNDS):
        for name, student in students.items():
            side = TILE // RATIO + 2 * student.margin(statistics)
            window = pan[None, :, : side * RATIO, : side * RATIO], ms[None, :, :side, :side]
            began = time.monotonic()
            student.sharpen(*window, statistics, [(0, 0)])
            found[name] = min(found[name], time.monotonic() - began)
    return {name: seconds / (TILE**2 / 1e6) for name, seconds in found.items()}


def print_scores(rows: Sequence[Row], students: dict[str, StudentSharpener]) -> None:
    """ERGAS and SAM ratios by kernels, and the cost."""
    unseen = [r for r in rows if r.degradation in unseen_degradations(RATIO)]
    seen = [r for r in rows if r.degradation not in unseen_degradations(RATIO)]
    seconds = seconds_per_mpx(students)
    sizes = {n: sum(p.numel() for p in s.model.parameters()) for n, s in students.items()}
    least = min(sizes.values())
    print(
        f"| | ERGAS ratio, seen kernels ({len(seen)} cases) | unseen ({len(unseen)}) "
        f"| SAM ratio, seen | unseen | lost of {len(rows)}, worst | seconds per Mpx "
        "| added parameters | reach, PAN pixels |"
    )
    print("|---" * 9 + "|")
    for name, student in students.items():
        of_seen, of_unseen, of_all = (summary(part, name) for part in (seen, unseen, rows))
        print(
            f"| {name} | {of_seen['ergas_ratio_geometric_mean']:.3f} "
            f"| {of_unseen['ergas_ratio_geometric_mean']:.3f} "
            f"| {of_seen['sam_ratio_geometric_mean']:.3f} "
            f"| {of_unseen['sam_ratio_geometric_mean']:.3f} "
            f"| {of_all['ergas_lost']}, {of_all['ergas_ratio_worst']:.2f} "
            f"| {seconds[name]:.2f} | {sizes[name] - least} | {student.model.reach} |"
        )


def print_against(rows: Sequence[Row], names: Sequence[str], base: str) -> None:
    """ERGAS over that of `base`, case by case: the mean and range, by scene, and how often less."""
    scenes = list(dict.fromkeys(r.scene for r in rows))
    print(f"| | all cases | lower in, of {len(rows)} | {' | '.join(scenes)} |")
    print("|---" * (len(scenes) + 3) + "|")
    for name in names:
        ratios = {
            scene: [r.scores[name].ergas / r.scores[base].ergas for r in rows if r.scene == scene] for scene in scenes
        }
        every = [v for values in ratios.values() for v in values]
        cells = [f"{geometric_mean(values):.3f}" for values in ratios.values()]
        print(
            f"| {name} | {geometric_mean(every):.4f} ({min(every):.3f} to {max(every):.3f}) "
            f"| {sum(v < 1 for v in every)} | {' | '.join(cells)} |"
        )


def compare(scenes_file: Path, init: Path, out: Path, only: str) -> None:
    """The start and every training in `out` that has come to its end."""
    students = {"start": StudentSharpener(*load_model(init))}
    order = list(VARIANTS)
    folders = [f for f in sorted(out.iterdir()) if (f / "last.safetensors").exists()]
    for folder in sorted(folders, key=lambda f: order.index(f.name.partition("-")[0])):
        students[folder.name] = trained(folder)
    scenes = [s for s in read_scenes(scenes_file, "valid") if s.name in only.split(",")]
    methods: dict[str, Sharpener] = {m: load_sharpener(None, m) for m in CLASSICAL_METHODS}
    rows = list(measure(scenes, {**methods, **students}))
    print_scores(rows, students)
    base = f"control-{SEED}"
    if base in students:
        print(f"\nERGAS over that of {base}:\n")
        print_against(rows, [n for n in students if n != base], base)
    for name, student in students.items():
        part = student.model.deep_blocks[0]  # type: ignore[union-attr, index]
        if isinstance(part, LocalFrequencies):
            kept = 1 - DAMPING_SPEED * part.damping.detach()
            print(f"\n{name}: s from {float(kept.min()):.2f} to {float(kept.max()):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run folders")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--train", choices=list(VARIANTS))
    what.add_argument("--compare", action="store_true")
    parser.add_argument("--init", default="generic", help="weights that all start from")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", default=SCENES, help="comma-separated names of scenes")
    arguments = parser.parse_args()
    tune_cpu(1)
    init, out = find_checkpoint(arguments.init), arguments.out
    if arguments.compare:
        compare(arguments.scenes, init, out, arguments.only)
        return
    stage, config = stage_and_config(arguments.scenes, init, arguments.seed, arguments.steps)
    stage.store = out / f"batches-{config.seed}"
    stage.store.mkdir(parents=True, exist_ok=True)
    stage.variant = arguments.train
    stage.name = f"fsa-s, {stage.variant}"  # none resumes another's training
    folder = out / f"{stage.variant}-{config.seed}"
    train(stage, config, folder, resume=True, init=init, on_log=lambda e: print(e, flush=True))


if __name__ == "__main__":
    main()
