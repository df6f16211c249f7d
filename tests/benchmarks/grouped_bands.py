"""Bands one at a time with their mean as context, as FSA-S lite has them, against groups of four.

    python tests/benchmarks/grouped_bands.py runs/scenes.h5 \\
        --band-wise runs/leave-one-out/all/last.safetensors --out runs/leave-one-out/grouped

Trains (or goes on training) a network that sees four bands side by side as channels, by the
recipe, the seed and the batches of the band-wise one (docs/recipes/leave-one-out.sh made it), and
prints the multiply-adds of both, then their scores as Markdown.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from validate import COARSE_PAN, Row, degradations, geometric_mean, measure, prepare, summary

from uknowpan.models.checkpoints import Card, load_model, read_card
from uknowpan.models.classical import CLASSICAL_METHODS
from uknowpan.models.devices import tune_cpu
from uknowpan.models.features import BACK_PROJECTION, BAND_FEATURES, INJECTIONS, PAN_FEATURES, SCENE_FEATURES
from uknowpan.models.metrics.indices import ergas
from uknowpan.models.network import FSAStudentLite, LiteConfig, _add_shared, _compress, _time_features, _to_grid
from uknowpan.models.published.stages import channels_last
from uknowpan.models.published.uknow.student_stage import GenericStudentStage
from uknowpan.models.sharpeners import Sharpener, StudentSharpener, load_sharpener, sharpen_array
from uknowpan.models.training.degradations import degrade_truth
from uknowpan.models.training.loop import train
from uknowpan.models.training.scenes import Scene, read_scenes
from uknowpan.models.types import Condition, Denoised
from uknowpan.training.jobs import TrainRequest, make_job, resolve
from uknowpan.training.settings import read_config

GROUP = 4
"""Bands side by side."""
WIDTHS = {"width": 48, "deep_width": 108}
"""With which four bands cost what they cost band by band with the bundled widths."""
RECIPE = Path(__file__).parents[2] / "docs/recipes/short.toml"
ORDERS = 3
"""Random orders of the bands that each scene is sharpened in."""


class GroupedStudent(FSAStudentLite):
    """FSA-S lite with groups of `GROUP` bands in place of bands.

    What is a band's there (features, noise, answer) is a group's here, side by side as channels;
    the context is the mean over the groups. Bands are repeated to fill the last group.
    """

    def __init__(self, config: LiteConfig):
        super().__init__(config)
        seen, said = 4 * (config.band_features + 1), 4 * config.maps
        self.band_in = nn.Conv2d(GROUP * seen, config.width, 3, padding=1)
        self.out = nn.Conv2d(config.width, GROUP * said, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        bias = torch.zeros(GROUP, config.maps, 4)
        bias[:, 1] = 1.0  # untrained: the local injection, as band by band
        self.out.bias = nn.Parameter(bias.flatten())

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, with_features: bool = False) -> Denoised:
        """As `FSAStudentLite.forward`, without features."""
        batch, bands, height, width = x_t.shape
        band, pan, scene = condition.band_features, condition.pan_features, condition.scene
        assert band is not None and pan is not None and scene is not None
        groups = -(-bands // GROUP)
        filled = torch.arange(groups * GROUP) % bands
        scene = scene[:, : self.config.scene_features]
        emb = self.embed(torch.cat([_time_features(t, self.config.timesteps), scene], 1))

        seen = _compress(band[:, :, : self.config.band_features])
        seen = torch.cat([seen, x_t[:, :, None]], 2)[:, filled]
        x = self.band_in(_to_grid(seen.reshape(batch * groups, -1, height, width)))
        x = _add_shared(x, self.pan_in(_to_grid(_compress(pan))), groups)
        for block in self.head_blocks:
            x = block(x, emb, groups)
        y = self.down(x)
        for block in self.deep_blocks:
            y = block(y, emb, groups)
        x = x + F.pixel_shuffle(self.up(y), 2)
        for block in self.tail_blocks:
            x = block(x, emb, groups)
        maps = F.pixel_shuffle(self.out(F.silu(self.norm_out(x))), 2).float()
        maps = maps.reshape(batch, groups * GROUP, -1, height, width)[:, :bands]
        x0 = maps[:, :, INJECTIONS] + (maps[:, :, :INJECTIONS] * band[:, :, :INJECTIONS]).sum(2)
        if self.config.back_projection:
            x0 = x0 + maps[:, :, INJECTIONS + 2] * band[:, :, BACK_PROJECTION]
        return Denoised(x0=x0, log_sigma=maps[:, :, INJECTIONS + 1].clamp(-8.0, 6.0))


class GroupedStage(GenericStudentStage):
    """Trains a `GroupedStudent` as the band-wise student is trained."""

    def build(self) -> nn.Module:
        return channels_last(GroupedStudent(self.network))

    def card(self, name: str, step: int, scores: dict[str, float]) -> Card:
        return replace(super().card(name, step, scores), architecture="grouped")


def training_of(scenes: Path, recipe: Path, init: Path | None = None) -> TrainRequest:
    """A student on a scenes file by a recipe, as the command line would ask for it."""
    return TrainRequest(
        stage="fsa-s",
        data=[scenes],
        valid=[],
        prior=None,
        teacher=None,
        cache=[],
        teacher_steps=1,
        max_value=None,
        preset="lite",
        config=read_config(recipe, ("lite",)),
        init=init,
        device="cpu",
        command="",
    )


def trained(scenes: Path, recipe: Path, out: Path) -> StudentSharpener:
    """The grouped network after its training, which goes on if there is some already."""
    request = training_of(scenes, recipe)
    settings = resolve(request)
    job = make_job(request, settings)
    assert isinstance(job, GenericStudentStage)
    network = replace(settings.network, **WIDTHS)
    stage = GroupedStage(network, job.train_data, job.valid_data, options=job.options)
    train(stage, settings.train, out, resume=True, on_log=lambda e: print(e, flush=True))
    model = GroupedStudent(network)
    model.load_state_dict(load_file(out / "last.safetensors"))
    return StudentSharpener(model, read_card(out / "last.safetensors"))


# --------------------------------------------------------------------------------- measuring


def multiply_adds(model: nn.Module, bands: int, side: int = 64) -> float:
    """Of all convolutions, per PAN pixel."""
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d)
        total += output.numel() * module.weight[0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    empty = torch.zeros(1, bands, side, side)
    condition = Condition(
        lms=empty,
        pan=empty[:, :1],
        pan_features=torch.zeros(1, PAN_FEATURES, side, side),
        band_features=torch.zeros(1, bands, BAND_FEATURES, side, side),
        scene=torch.zeros(1, SCENE_FEATURES),
    )
    with torch.inference_mode():
        model(empty, torch.zeros(1), condition)
    for hook in hooks:
        hook.remove()
    return total / side**2


class Reordered(nn.Module):
    """A student that is given the bands, with the noise of each, in another order."""

    def __init__(self, student: FSAStudentLite, order: Tensor):
        super().__init__()
        self.student, self.order, self.back = student, order, order.argsort()
        self.pixel_multiple, self.reach = student.pixel_multiple, student.reach

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition) -> Denoised:
        assert condition.band_features is not None
        features = condition.band_features[:, self.order]
        turned = replace(condition, lms=condition.lms[:, self.order], band_features=features)
        said = self.student(x_t[:, self.order], t, turned)
        assert said.log_sigma is not None
        return Denoised(said.x0[:, self.back], said.log_sigma[:, self.back])


@dataclass(frozen=True)
class OrderEffect:
    """What other orders of the bands do to one degraded scene."""

    sensor: str
    change: float
    """RMS of the change over the RMS error of the order as it is, all bands and orders."""
    ergas: tuple[float, ...]
    """Of each order over that of the order as it is."""


def order_effects(student: StudentSharpener, scenes: Sequence[Scene]) -> Iterator[OrderEffect]:
    """Every scene in the first degradation; change and error are over each band's contrast."""
    for scene in scenes:
        ratio = 2 if scene.sensor.startswith(COARSE_PAN) else 4
        gt, pan = prepare(scene, ratio)
        ms = degrade_truth(gt, next(iter(degradations(ratio, len(gt)).values())))
        contrast = gt.flatten(1).std(1).view(-1, 1, 1)
        plain = sharpen_array(student, pan, ms).hrms
        error, base = rms((plain - gt) / contrast), float(ergas(plain, gt, ratio))
        changes, values = [], []
        for seed in range(ORDERS):
            order = torch.randperm(len(gt), generator=torch.Generator().manual_seed(seed))
            reordered = Reordered(student.model, order)  # type: ignore[arg-type]
            done = sharpen_array(StudentSharpener(reordered, student.card), pan, ms).hrms
            changes.append((done - plain) / contrast)
            values.append(float(ergas(done, gt, ratio)) / base)
        yield OrderEffect(scene.sensor, rms(torch.stack(changes)) / error, tuple(values))


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


# ---------------------------------------------------------------------------------- printing


def print_scores(rows: Sequence[Row], names: Sequence[str]) -> None:
    """Models against the best classical method, by sensor."""
    columns = [f"{index}, {name}" for index in ("ERGAS ratio", "SAM ratio") for name in names]
    print(f"| sensor | cases | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for sensor in (*dict.fromkeys(r.sensor for r in rows), "all"):
        own = [r for r in rows if sensor in (r.sensor, "all")]
        found = [summary(own, name) for name in names]
        cells = [f"{s['ergas_ratio_geometric_mean']:.3f}" for s in found]
        cells += [f"{s['sam_ratio_geometric_mean']:.3f}" for s in found]
        print(f"| {sensor} | {len(own)} | {' | '.join(cells)} |")
    for name in names:
        print(f"\n{name}: {summary(rows, name)}")


def print_order_effects(students: dict[str, StudentSharpener], scenes: Sequence[Scene]) -> None:
    print("| network | change over error | largest | ERGAS over that before | from | to |")
    print("|---" * 6 + "|")
    for name, student in students.items():
        effects = list(order_effects(student, scenes))
        changes = [e.change for e in effects]
        values = [v for e in effects for v in e.ergas]
        print(
            f"| {name} | {sum(changes) / len(changes):.2g} | {max(changes):.2g} "
            f"| {geometric_mean(values):.4f} | {min(values):.4f} | {max(values):.4f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenes", type=Path)
    parser.add_argument("--band-wise", required=True, help="checkpoint to compare with")
    parser.add_argument("--out", type=Path, required=True, help="run folder of the training")
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--only", help="comma-separated names of validation scenes")
    arguments = parser.parse_args()
    tune_cpu()
    students = {
        "band-wise": StudentSharpener(*load_model(arguments.band_wise)),
        "groups of four": trained(arguments.scenes, arguments.recipe, arguments.out),
    }
    scenes = read_scenes(arguments.scenes, "valid")
    if arguments.only:
        scenes = [s for s in scenes if s.name in arguments.only.split(",")]
    print("| network | parameters | multiply-adds per PAN pixel, 3 bands | 4 bands | 6 bands |")
    print("|---" * 5 + "|")
    for name, student in students.items():
        parameters = sum(p.numel() for p in student.model.parameters())
        costs = " | ".join(f"{multiply_adds(student.model, bands):.0f}" for bands in (3, 4, 6))
        print(f"| {name} | {parameters} | {costs} |")
    classical: dict[str, Sharpener] = {m: load_sharpener(None, m) for m in CLASSICAL_METHODS}
    print("\nAll bands:\n")
    print_scores(list(measure(scenes, {**classical, **students})), list(students))
    print("\nThe first three bands:\n")
    three = [replace(scene, gt=scene.gt[:3]) for scene in scenes]
    print_scores(list(measure(three, {**classical, **students})), list(students))
    print(f"\n{ORDERS} random orders of the bands, the noise with them:\n")
    print_order_effects(students, scenes)


if __name__ == "__main__":
    main()
