"""Training data for the stages: small PanCollection files of plane waves, and the stages and runs on them."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from textures import make_pair

from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.network import LiteConfig
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.pancollection.protocol import wald_lms, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.published.stages import PatchData
from uknowpan.models.published.uknow.cache import CachedDataset, CacheFile, write_cache
from uknowpan.models.published.uknow.distillation import FrozenTeacher
from uknowpan.models.published.uknow.guided import GuidedTeacher, GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.published.uknow.stages import (
    LiteStudentStage,
    PriorOptions,
    PriorStage,
    StudentOptions,
    StudentStage,
    TeacherOptions,
    TeacherStage,
)
from uknowpan.models.published.uknow.student import StudentConfig
from uknowpan.models.published.uknow.teacher import TeacherConfig
from uknowpan.models.training.loop import Interrupted, TrainConfig, train
from uknowpan.models.types import PatchBatch

PIXELS = 96
QUICK = TrainConfig(
    iterations=4, warmup=1, validate_every=2, checkpoint_every=2, log_every=2, batch_size=4, ema=0.5, amp=False
)
PAPER = StudentConfig(4, width=4, blocks=1, heads=2, dropout=0.0)
LITE = LiteConfig(width=8, deep_width=8, deep_blocks=1)

TINY_NETWORKS = {
    "prior": "[network]\nwidth = 4\nblocks = 1\n",
    "fsa-t": "[network.teacher]\nwidth = 4\nheads = 2\n[network.prior]\nwidth = 4\nblocks = 1\n[options]\n",
    "fsa-s": "[network]\nwidth = 8\ndeep_width = 8\ndeep_blocks = 1\n",
}
"""Tables of `train --config` for the smallest networks, by stage; that of fsa-t ends within [options]."""


def write_patches(path, *, bands=4, size=32, full_scale=2047.0, seed=0, ratio=4):
    """Patches without overlap of one scene of 96 x 96 pixels: 9 of 32, 36 of 16."""
    gt = make_pair(1, (PIXELS, PIXELS), bands=bands, seed=seed + 50).gt.double() / 16 * full_scale
    ms = wald_ms(gt, [0.3] * bands, ratio)
    whole = {"pan": gt.mean(0, keepdim=True), "ms": ms, "lms": wald_lms(ms, ratio), "gt": gt}
    corners = [(y, x) for y in range(0, PIXELS, size) for x in range(0, PIXELS, size)]

    def cut(image):
        step = PIXELS // image.shape[-1]
        n = size // step
        parts = [image[:, y // step :, x // step :][:, :n, :n] for y, x in corners]
        return torch.stack(parts)

    with PanCollectionWriter(path) as writer:
        images = PatchBatch(**{name: cut(image) for name, image in whole.items()})
        writer.append(images, np.array([(0, y, x) for y, x in corners]))
        writer.finish({"max_value": full_scale, "registration": "pancollection"})
        writer.publish()
    return path


def patch_data(train, valid, *, batch_size=4, seed=0, flips=False, caches=(), workers=0, samples=6):
    """`PatchData` of files' paths."""
    dataset, checked = (
        PanCollectionDataset([PanCollectionFile(p, needs_gt=True) for p in paths]) for paths in (train, valid)
    )
    sampler = PatchSampler(len(dataset), batch_size=batch_size, seed=seed, flips=flips)
    drawn = CachedDataset(dataset, [CacheFile(p) for p in caches]) if caches else dataset
    return PatchData(PatchBatches(drawn, sampler), checked, validation_samples=samples, workers=workers)


def guided_config(bands=4, **changes):
    """A tiny teacher with its PriorNet."""
    shape = {"width": 4, "blocks": 1, "heads": 2, "dropout": 0.0, "drop_path": 0.0, **changes}
    prior = PriorConfig(bands, width=4, blocks=1, highpass_pan=shape.get("highpass_pan", False))
    return GuidedTeacherConfig(TeacherConfig(bands, **shape), prior)


def stirred(model, size=0.1):
    """Every layer has a say; untrained ones may start at zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def write_prior(path, config):
    """A PriorNet's checkpoint with random weights."""
    card = Card("p", "prior", asdict(config), "prior", bands=config.bands, ratios=[4])
    save_checkpoint(path, stirred(PriorNet(config), 0.02), card)
    return path


def write_teacher(path, config, std=0.03):
    """A teacher's checkpoint with random weights."""
    model, bands = stirred(GuidedTeacher(config)), config.teacher.bands
    model.residual_std.fill_(std)
    card = Card("t", "fsa-t", asdict(config), "fsa-t", bands=bands, ratios=[4], residual_std=[std] * bands)
    save_checkpoint(path, model, card)
    return path


def run(stage, out, config=QUICK, **options):
    """Train; the losses of every step."""
    losses = {}
    train(stage, config, out, on_step=losses.__setitem__, **options)
    return losses


def story(out):
    """The log without its clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_resumes(make_stage, folder, config=QUICK, **options):
    """A run that is stopped after its third step and resumed ends as an unbroken one; returns that one's folder."""
    whole, broken = folder / "whole" / "run", folder / "broken" / "run"
    losses = run(make_stage(), whole, config, **options)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="stopped after step 3; --resume"):
        run(make_stage(), broken, config, should_stop=lambda: next(asked), **options)
    assert torch.load(broken / "state.pt", weights_only=True)["step"] == 3
    rest = run(make_stage(), broken, config, resume=True)
    assert rest == {step: losses[step] for step in range(4, config.iterations + 1)}
    assert_same_state(whole, broken)
    for name in ("last.safetensors", "best.safetensors"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes()
    assert story(whole) == story(broken)
    return whole


def assert_same_state(a, b):
    """Two run folders hold the same state, bit for bit."""
    one, two = (torch.load(p / "state.pt", weights_only=True) for p in (a, b))
    assert (one["step"], one["best"]) == (two["step"], two["best"])
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    for moments, others in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(moments[k], others[k]) for k in ("step", "exp_avg", "exp_avg_sq"))


class Files:
    """Training and validation files, and the networks that they are trained with."""

    def __init__(self, folder, bands=4, full_scale=2047.0, size=32):
        self.folder, self.size = folder, size
        form = {"bands": bands, "full_scale": full_scale, "size": size}
        self.train = [write_patches(folder / "train.h5", **form)]
        self.valid = [write_patches(folder / "valid.h5", seed=1, **form)]
        self.config = guided_config(bands)
        self.prior = write_prior(folder / "prior.safetensors", self.config.prior)
        self.teacher = write_teacher(folder / "teacher.safetensors", self.config)
        self.paper = replace(PAPER, bands=bands)

    def data(self, **options):
        return patch_data(self.train, self.valid, **options)

    def cache(self, dtype):
        out = self.folder / f"{dtype}.h5"
        if not out.exists():
            with PanCollectionFile(self.train[0]) as file:
                scale = file.header.max_value
                write_cache(FrozenTeacher(self.teacher), file, scale, out, batch_size=4, dtype=dtype)
        return out


def prior_stage(files, options=None, config=None, **data):
    return PriorStage(config or files.config.prior, files.data(**data), options or PriorOptions())


def teacher_stage(files, options=None, config=None, prior=None, **data):
    return TeacherStage(config or files.config, files.data(**data), options or TeacherOptions(), prior or files.prior)


def student_stage(files, options=None, config=PAPER, teacher=None, **data):
    asked = teacher and FrozenTeacher(teacher)
    kind = LiteStudentStage if isinstance(config, LiteConfig) else StudentStage
    return kind(config, files.data(**data), options or StudentOptions(), asked)
