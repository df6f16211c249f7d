"""Presets: the published shapes and settings, and that every one of them can be built."""

from dataclasses import asdict, replace

import pytest
import torch

from uknowpan.models.architectures import stage_names
from uknowpan.models.checkpoints import network_of
from uknowpan.models.network import LiteConfig
from uknowpan.models.published.uknow.guided import GuidedTeacherConfig
from uknowpan.models.training.presets import preset

PUBLISHED = {
    ("prior", 4): 450_696,
    ("prior", 8): 457_616,
    ("fsa-t", 4): 25_461_136,
    ("fsa-t", 8): 25_491_576,
    ("fsa-s", 4): 9_709_988,
    ("fsa-s", 8): 9_714_600,
}
"""METHODS 1.2 to 1.4."""


def highpass(network):
    """The network with nothing but the release's input."""
    if isinstance(network, GuidedTeacherConfig):
        return replace(network, teacher=highpass(network.teacher), prior=highpass(network.prior))
    return replace(network, highpass_pan=True)


def built(network):
    with torch.device("meta"):
        return network_of(network)


def trained(network):
    return sum(p.numel() for p in built(network).parameters() if p.requires_grad)


@pytest.mark.parametrize(("stage", "bands"), PUBLISHED)
def test_paper_has_the_published_parameters(stage, bands):
    network = preset("paper", stage, bands).network
    width = 64 if stage == "prior" else 32
    assert trained(highpass(network)) == PUBLISHED[stage, bands]
    # Raw PAN is one more channel of the first 3 x 3 convolution; a slot is `bands` of them.
    assert trained(network) == PUBLISHED[stage, bands] + 9 * width
    if stage == "fsa-s":
        assert trained(replace(network, self_conditioning=False)) == trained(network) - bands * 9 * width


@pytest.mark.parametrize("name", ["lite", "paper"])
@pytest.mark.parametrize("stage", [*stage_names("--stage"), *stage_names("--model")])
@pytest.mark.parametrize("bands", [1, 4, 8])
def test_every_preset_builds_for_its_bands(name, stage, bands):
    settings = preset(name, stage, bands)
    made = built(settings.network)
    parameters = sum(p.numel() for p in made.parameters())
    assert parameters < 1_000_000 if name == "lite" else parameters > 400_000
    if not isinstance(settings.network, LiteConfig):
        shape = getattr(settings.network, "teacher", settings.network)
        assert shape.bands == bands


def test_what_is_not_there():
    for name, stage in (("huge", "prior"), ("lite", "fsa"), ("paper", "")):
        with pytest.raises(KeyError):
            preset(name, stage, 4)


SCHEDULE = {
    "batch_size": 32, "learning_rate": 1e-4, "warmup": 0, "validate_every": 2500,
}  # fmt: skip
AVERAGED = {"ema": 0.995, "ema_start": 20_000, "weight_decay": 1e-4}
FALLING = {"milestones": (100_000, 200_000, 350_000)}


@pytest.mark.parametrize(
    ("stage", "train", "options"),
    [
        # Adam without decay or averaging; the milestones of its schedule are never reached (B9).
        ("prior", {"iterations": 300_000, "weight_decay": 0.0, "ema": 0.0, "milestones": (300_000,)}, {"beta": 0.0}),
        ("fsa-t", {"iterations": 400_000, **AVERAGED, **FALLING}, {"beta": 0.5, "steps": 25}),
        (
            "fsa-s",
            {"iterations": 300_000, **AVERAGED, **FALLING},
            {"soft_weight": 0.1, "feature_weight": 0.001, "steps": 25, "flips": True},
        ),
        (
            "pan-crafter",
            {"iterations": 50_000, "batch_size": 48, "weight_decay": 0.01, "warmup": 100, "milestones": (), "ema": 0.0},
            {},
        ),
    ],
)
def test_paper_is_trained_as_published(stage, train, options):
    settings = preset("paper", stage, 8)
    wanted = SCHEDULE | train
    assert {k: v for k, v in asdict(settings.train).items() if k in wanted} == wanted
    found = asdict(settings.options)
    assert {k: found[k] for k in options} == options
    if "terminal_share" in found:  # timesteps are drawn evenly, and the defects of the release are off
        assert found["terminal_share"] == 0 and found["self_conditioning"]
        assert not any(found[k] for k in ("respaced_time_index", "raw_residual"))


@pytest.mark.parametrize("bands", [4, 8])
@pytest.mark.parametrize("name", ["lite", "paper"])
def test_a_teacher_takes_the_prior_of_its_preset(name, bands):
    prior = built(preset(name, "prior", bands).network)
    teacher = built(preset(name, "fsa-t", bands).network)
    ours, theirs = (
        {key: weight.shape for key, weight in model.state_dict().items()} for model in (prior, teacher.prior_net)
    )
    assert ours == theirs
