"""Training data for the stages: small PanCollection files of plane waves, and what they train."""

from dataclasses import asdict

import numpy as np
import torch
from textures import make_pair

from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.pancollection.dataset import PanCollectionDataset, PatchBatches, PatchSampler
from uknowpan.models.pancollection.file import PanCollectionFile, PatchBatch
from uknowpan.models.pancollection.protocol import wald_lms, wald_ms
from uknowpan.models.pancollection.writer import PanCollectionWriter
from uknowpan.models.published.stages import PatchData
from uknowpan.models.published.uknow.cache import CachedDataset, CacheFile
from uknowpan.models.published.uknow.guided import GuidedTeacher, GuidedTeacherConfig
from uknowpan.models.published.uknow.prior import PriorConfig, PriorNet
from uknowpan.models.published.uknow.teacher import TeacherConfig

PIXELS = 96


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
    told = CachedDataset(dataset, [CacheFile(p) for p in caches]) if caches else dataset
    return PatchData(PatchBatches(told, sampler), checked, validation_samples=samples, workers=workers)


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


def assert_same_state(a, b):
    """Two run folders hold the same state, bit for bit."""
    one, two = (torch.load(p / "state.pt", weights_only=True) for p in (a, b))
    assert (one["step"], one["best"]) == (two["step"], two["best"])
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(one[part][k], two[part][k]) for k in one[part])
    for moments, others in zip(one["optimizer"]["state"].values(), two["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(moments[k], others[k]) for k in ("step", "exp_avg", "exp_avg_sq"))
