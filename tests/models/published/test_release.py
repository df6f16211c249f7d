"""The preset `release`: what the published code does, in shapes, sampling and augmentation."""

import importlib
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from patch_files import patch_data, stirred, write_patches
from safetensors.torch import load_file

from uknowpan.models.checkpoints import network_of
from uknowpan.models.diffusion import NoiseSchedule
from uknowpan.models.errors import ModelMismatch
from uknowpan.models.pancollection.condition import image_sharpener
from uknowpan.models.published.pan_crafter.network import PAN_MODE, PanCrafter
from uknowpan.models.published.pan_crafter.stage import PanCrafterOptions, PanCrafterStage, released_crops
from uknowpan.models.published.ssdiff.network import SSDiff
from uknowpan.models.published.ssdiff.stage import SSDiffStage
from uknowpan.models.training.loop import TrainConfig, train
from uknowpan.models.training.parallel import World
from uknowpan.models.training.presets import preset
from uknowpan.models.types import Condition, PatchBatch

STAGES = ("prior", "fsa-t", "fsa-s", "pan-crafter", "ssdiff")
COUNTS = {"prior": 457_616, "fsa-t": 25_491_576, "fsa-s": 9_714_600, "pan-crafter": 9_968_808, "ssdiff": 1_300_024}
"""Parameters for 8 bands; SSDiff's without those that the release never uses."""
RELEASED = ("highpass_pan", "dead_prior", "raw_prior", "respaced_time_index", "strided_timesteps", "raw_residual",
            "raw_uncertainty", "overwritten_pan_keys", "scrambled_ms_keys", "random_shifts", "bicubic_base",
            "released_crops", "batch_norm", "group_norm", "measured_ms", "clamped_hrms")  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_release_has_every_flag_and_the_published_parameters(stage):
    settings, paper = preset("release", stage, 8), preset("paper", stage, 8)
    with torch.device("meta"):
        network = network_of(settings.network)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == COUNTS[stage]
    parts = [settings.options, settings.network]
    parts += [getattr(settings.network, name) for name in ("teacher", "prior") if hasattr(settings.network, name)]
    flags = {f.name: getattr(part, f.name) for part in parts for f in fields(part) if f.name in RELEASED}
    assert all(flags.values()), flags
    assert getattr(settings.options, "self_conditioning", False) is False
    assert not settings.train.amp and paper.train.amp
    assert settings.train.clip == (0.003 if stage.startswith("fsa") else float("inf"))
    changed = {k for k, v in asdict(settings.train).items() if v != asdict(paper.train)[k]}
    assert changed <= {"amp", "ema", "ema_start"}


def test_the_golden_outputs_are_those_of_release(monkeypatch):
    """Kind of fault: an output counted as published, from a network that the preset does not build."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "golden")
    student, teacher, ssdiff = (importlib.import_module(f"make_golden{name}") for name in ("", "_teacher", "_ssdiff"))
    networks = {stage: preset("release", stage, 3).network for stage in STAGES}
    small = {"width": 8, "heads": 4}
    for shrunk, cases in (
        (replace(networks["prior"], width=8, blocks=2), teacher.PRIOR_CASES),
        (replace(networks["fsa-t"].teacher, **small, blocks=1), teacher.TEACHER_CASES),
        (replace(networks["fsa-s"], **small), student.CASES),
        (replace(networks["ssdiff"], patch=0), ssdiff.CASES),
    ):
        assert shrunk == cases["published"]


def test_timesteps_of_the_releases():
    """Kind of fault: no option reached 480, 460 .. 0."""
    assert NoiseSchedule.cosine(500).strided(25) == list(range(480, -1, -20))
    assert NoiseSchedule.cosine(1000).strided(10) == list(range(900, -1, -100))
    assert NoiseSchedule.cosine(500).strided(1) == [0]
    with pytest.raises(ValueError, match="no stride takes 400 of 500"):
        NoiseSchedule.cosine(500).strided(400)


@pytest.mark.parametrize("stage", STAGES[2:])
def test_x0_is_float32_under_autocast(stage):
    """Kind of fault: bfloat16 rounded x0 to one part in 256, however fine the network's sums were."""
    settings = preset("paper", stage, 4)
    shape = {"fsa-s": {"width": 8, "blocks": 1}, "ssdiff": {"width": 16, "time_width": 4}}
    changes = shape.get(stage, {"widths": (8, 8), "blocks": 1, "token_width": 8, "groups": 4, "head_width": 4})
    model = stirred(network_of(replace(settings.network, **changes)))
    lms, pan, ms, x_t = (torch.rand(1, c, 32 // r, 32 // r) for c, r in ((4, 1), (1, 1), (4, 4), (4, 1)))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        x0 = model(x_t, torch.tensor([3]), Condition(lms, pan, ms=ms)).x0
    assert x0.dtype == torch.float32
    assert (x0 != x0.bfloat16().float()).float().mean() > 0.9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [write_patches(folder / f"{name}.h5", seed=i) for i, name in enumerate(("train", "valid"))]
    return patch_data([paths[0]], [paths[1]], batch_size=2)


def test_a_checkpoint_samples_as_its_release_does(files, tmp_path):
    """Kind of fault: flags of sampling counted in validation, but not in evaluation and sharpening."""
    settings = preset("release", "ssdiff", 4)
    shape = {"width": 32, "head_width": 8, "time_width": 4, "patch": 16}
    options = replace(settings.options, steps=2)
    stage = SSDiffStage(replace(settings.network, **shape), files, options)
    config = TrainConfig(iterations=1, batch_size=2, amp=False, ema=0.0, validation_samples=2)
    path = train(stage, config, tmp_path / "run")
    from uknowpan.models.denoising import load_network

    sharpener = load_network(str(path))
    assert sharpener.timesteps == [500, 0] == stage.timesteps
    assert sharpener.card.sampling == ["strided_timesteps", "respaced_time_index", "clamped_hrms"]
    patches, noise = files.valid[0], torch.randn(1, 4, 32, 32)
    sharpener._noise = lambda *_: noise
    condition, _ = stage.view(patches)
    with torch.no_grad():
        wanted = patches.lms + stage.sample(sharpener.model, noise, condition).x0
    done = image_sharpener(sharpener, files.valid.files[0], 2047.0)(patches).hrms
    torch.testing.assert_close(done, wanted)


def test_patches_of_an_image_do_not_see_each_other():
    config = replace(preset("release", "ssdiff", 4).network, width=32, time_width=4, patch=16)
    model = stirred(SSDiff(config))
    lms, pan, ms, x_t = (torch.rand(2, c, 32 // r, 48 // r) for c, r in ((4, 1), (1, 1), (4, 4), (4, 1)))
    t = torch.tensor([3, 800])
    with torch.no_grad():
        whole = model(x_t, t, Condition(lms, pan, ms=ms)).x0
        part = (..., slice(16, 32), slice(32, 48))
        alone = model(x_t[part], t, Condition(lms[part], pan[part], ms=ms[..., 4:8, 8:12])).x0
    torch.testing.assert_close(whole[part], alone)
    assert model.pixel_multiple == 16


def small(**changes):
    shape = {"widths": (8, 8), "blocks": 1, "token_width": 8, "groups": 4, "head_width": 4, "dropout": 0.0}
    return replace(preset("release", "pan-crafter", 4).network, **shape, **changes)


def test_pan_crafter_adds_to_the_bicubic_ms(files):
    model = stirred(PanCrafter(small()))
    patches = files.valid[0]
    base = torch.nn.functional.interpolate(patches.ms, (32, 32), mode="bicubic", align_corners=False)
    condition = Condition(patches.lms, patches.pan, ms=patches.ms)
    other = replace(condition, lms=patches.lms + 0.1)
    with torch.no_grad():
        one, two = (c.lms + model(None, None, c).x0 for c in (condition, other))
        model.head[-1].weight.zero_()
        model.head[-1].bias.zero_()
        nothing = model(None, None, condition).x0
        of_pan = model(None, None, condition, torch.tensor([PAN_MODE])).x0
    torch.testing.assert_close(one, two)  # whatever the lms
    torch.testing.assert_close(patches.lms + nothing, base)
    assert not of_pan.any()
    with pytest.raises(ValueError, match="needs the condition's ms"):
        model(None, None, replace(condition, ms=None))
    with pytest.raises(ModelMismatch, match="raw_residual = true"):
        PanCrafterStage(small(), files, PanCrafterOptions())


def test_crops_are_alike_in_all_images_and_shared_out():
    ramp = torch.linspace(0, 1, 64).expand(4, 1, 64, 64)
    batch = PatchBatch(ramp, ramp[..., 1::4, 1::4], ramp, ramp.clone())
    whole = released_crops(batch, torch.Generator().manual_seed(1), World())
    assert [tuple(x.shape) for x in (whole.pan, whole.ms)] == [(4, 1, 64, 64), (4, 1, 16, 16)]
    assert torch.equal(whole.pan, whole.gt)
    spans = [float(x.max() - x.min()) for x in whole.pan]
    assert all(0.7 < span <= 1.05 for span in spans) and len(set(spans)) > 2
    halves = [
        released_crops(batch.map(lambda x, r=r: x[2 * r : 2 * r + 2]), torch.Generator().manual_seed(1), World(r, 2))
        for r in (0, 1)
    ]
    assert torch.equal(PatchBatch.cat(halves).ms, whole.ms)


def test_a_run_of_pan_crafter_as_released(files, tmp_path):
    """It computes in float32, and its checkpoint holds the weights of the last step, not an average."""
    rounded = []

    class Watched(PanCrafterStage):
        def losses(self, *given):
            rounded.append(torch.is_autocast_enabled("cpu"))
            return super().losses(*given)

    settings = preset("release", "pan-crafter", 4)
    config = replace(settings.train, iterations=2, batch_size=2, validation_samples=2)
    kept = load_file(train(Watched(small(), files, settings.options), config, tmp_path / "run"))
    last = torch.load(tmp_path / "run" / "state.pt", weights_only=True)["model"]
    assert rounded == [False] * 2 and all(torch.equal(kept[name], last[name]) for name in last)
