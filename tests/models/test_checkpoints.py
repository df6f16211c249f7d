import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from uknowpan.models.checkpoints import (
    FORMAT,
    Card,
    bundled_models,
    find_checkpoint,
    load_model,
    read_card,
    save_checkpoint,
    sha256,
)
from uknowpan.models.errors import CheckpointError
from uknowpan.models.network import FSAStudentLite, LiteConfig

TINY = LiteConfig(width=8, deep_width=8, deep_blocks=1)
CARD = Card(
    name="tiny",
    architecture="fsa-s-lite",
    config=asdict(TINY),
    stage="fsa-s",
    sensor="WorldView-3",
    bands=8,
    ratios=[2, 4],
    residual_scale=1.25,
    steps=2,
    sigma_scale=0.75,
    training={"iterations": 5, "licences": ["CC-BY-4.0"], "note": "Größe"},
    scores={"psnr": 31.25},
    limits="none known",
)


@pytest.fixture
def saved(tmp_path):
    """path, model"""
    torch.manual_seed(3)
    model = FSAStudentLite(TINY).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_checkpoint(tmp_path / "tiny.safetensors", model, CARD)
    return tmp_path / "tiny.safetensors", model


def refused(path, sentence):
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def with_card(path, **changes):
    """Rewrite the checkpoint with other fields in its card."""
    card = json.dumps({**asdict(CARD), **changes})
    save_file(load_file(path), path, metadata={"format": FORMAT, "card": card})
    return path


def test_card_and_weights_come_back(saved):
    path, model = saved
    assert read_card(path) == CARD
    loaded, card = load_model(path)
    assert card == CARD
    assert not loaded.training
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    assert os.listdir(path.parent) == [path.name]  # no temporary file stays


def test_the_same_model_makes_the_same_bytes(saved, tmp_path):
    path, model = saved
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    for number in range(8):  # safetensors alone writes one of two orders at random
        again = tmp_path / f"{number}.safetensors"
        save_checkpoint(again, model, CARD)
        assert sha256(again) == sha256(path)


def test_a_failed_save_leaves_what_was_there(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, model, replace(CARD, name="other"))
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_missing(tmp_path):
    refused(tmp_path / "none.safetensors", "there is no checkpoint at .*none.safetensors")
    refused(tmp_path, "there is no checkpoint at")


@pytest.mark.parametrize("keep", [0, 5, 200, -1, None])
def test_truncated_or_garbage(saved, keep):
    path, _ = saved
    path.write_bytes(bytes(range(256)) * 40 if keep is None else path.read_bytes()[:keep])
    refused(path, "tiny.safetensors is not a whole safetensors file")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_pickles_are_never_loaded(tmp_path, suffix):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    path = tmp_path / f"model{suffix}"
    torch.save({"weights": Evil()}, path)
    refused(path, r"pickles \(.pth, .pt\) are never loaded")
    assert not marker.exists()


@pytest.mark.parametrize(
    "metadata, sentence",
    [
        (None, "without an uknowpan card"),
        ({"format": FORMAT}, "the card of .* cannot be read"),
        *(
            ({"format": FORMAT, "card": card}, "the card of .* cannot be read")
            for card in ("{", "[]", '{"name": "x"}', json.dumps({**asdict(CARD), "new": 1}))
        ),
    ],
)
def test_damaged_card(saved, metadata, sentence):
    path, _ = saved
    save_file(load_file(path), path, metadata=metadata)
    refused(path, sentence)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratios", []),
        ("ratios", 4),
        ("ratios", [2.5]),
        ("steps", 0),
        ("steps", "one"),
        ("bands", "4"),
        ("residual_scale", "x"),
        ("sigma_scale", None),
        ("sigmas_90", 0),
        ("registration", "elsewhere"),
    ],
)
def test_card_with_a_field_that_cannot_be(saved, field, value):
    path, _ = saved
    refused(with_card(path, **{field: value}), "cannot be read")


def test_unknown_architecture(saved):
    refused(
        with_card(saved[0], architecture="fsa-x"),
        r"'fsa-x' is unknown to this version \(known: prior, fsa-t, fsa-s-lite, ",
    )


@pytest.mark.parametrize(
    "config",
    [{"depth": 3}, {"width": "wide"}, {"width": -8}, {"width": 2.5}, {"width": [8]}, [], None],
)
def test_config_that_does_not_fit(saved, config):
    refused(with_card(saved[0], config=config), "config does not fit architecture fsa-s-lite")


def test_config_of_the_paper_form_that_does_not_fit(saved):
    path = with_card(saved[0], architecture="fsa-s", config={"bands": 0})
    refused(path, "config does not fit architecture fsa-s: bands must be at least 1, not 0")


@pytest.mark.parametrize(
    "config, named",
    [(LiteConfig(width=16, deep_width=8, deep_blocks=1), "size mismatch"),
     (LiteConfig(width=8, deep_width=8, deep_blocks=2), "deep_blocks.1"),
     (LiteConfig(width=8, deep_width=8, deep_blocks=0), "deep_blocks.0")],
)  # fmt: skip
def test_weights_of_another_size(saved, config, named):
    path = with_card(saved[0], config=asdict(config))
    refused(path, f"the weights in .* do not fit its card: .*{named}")


def test_find_by_name_or_path(saved):
    assert find_checkpoint(str(saved[0])) == saved[0]
    bundled = bundled_models()
    assert "generic" in bundled
    for name, path in bundled.items():
        assert find_checkpoint(name) == path
        assert load_model(path)[1].name == name
    with pytest.raises(CheckpointError, match=r"no model 'gneric'.*bundled: .*generic"):
        find_checkpoint("gneric")


def test_loading_imports_no_compiler():
    """Sharpening a small scene would start a second later."""
    code = (
        "import sys; from uknowpan.models.checkpoints import find_checkpoint, load_model; "
        "load_model(find_checkpoint('generic')); assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
