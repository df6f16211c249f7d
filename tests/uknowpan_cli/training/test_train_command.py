"""`uknowpan train` of the product's student: configuration, interruption, resumption."""

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from patch_files import write_patches
from running import Run
from safetensors.numpy import load_file

from uknowpan.models.checkpoints import load_model
from uknowpan.models.network import FSAStudentLite, LiteConfig
from uknowpan.models.streams import StreamsStudent
from uknowpan.models.training.stages import GenericStudentStage

CONFIG = """
[train]
iterations = 2
batch_size = 2
warmup = 1
amp = false

[network]
width = 4
deep_width = 4
blocks = 1
deep_blocks = 1
"""


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A scenes file with one scene for training and one for validation."""
    path = tmp_path / "scenes.h5"
    rng = np.random.default_rng(2)
    with h5py.File(path, "w") as file:
        for split in ("train", "valid"):
            blocks = rng.uniform(100, 900, (6, 24, 24)).repeat(4, 1).repeat(4, 2)
            gt = blocks + rng.normal(0, 20, blocks.shape)
            group = file.create_group(f"scene-{split}")
            group.attrs.update(sensor="made up", licence="none", split=split, weight=1.0)
            group.create_dataset("gt", data=gt.astype("uint16"))
            group.create_dataset("pan", data=gt.mean(0, keepdims=True).astype("float32"))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


def test_train_dry_run(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path) -> None:
    out = tmp_path / "run"
    outcome = uknowpan("train", "--data", scenes, "--out", out, "--config", config, "--dry-run")
    assert outcome.code == 0, outcome.stderr
    resolved = json.loads(outcome.stdout)
    assert resolved["stage"] == "fsa-s"
    assert resolved["train"]["iterations"] == 2
    assert resolved["train"]["ema"] == 0.999
    assert resolved["network"]["width"] == 4
    network = FSAStudentLite(LiteConfig(**resolved["network"]))
    assert resolved["parameters"] == sum(p.numel() for p in network.parameters())
    assert not out.exists()


def test_train_makes_the_student_of_two_streams(uknowpan: Run, tmp_path: Path, scenes: Path) -> None:
    config, out = tmp_path / "streams.toml", tmp_path / "run"
    config.write_text(
        'preset = "streams"\n[train]\niterations = 1\nbatch_size = 2\n'
        "[network]\npan_width = 4\ntrunk_width = 4\nband_width = 4\nhead_width = 4\n"
    )
    outcome = uknowpan("train", "--data", scenes, "--out", out, "--config", config, "-q", "-j", 1)
    assert outcome.code == 0, outcome.stderr
    model, card = load_model(out / "best.safetensors")
    assert type(model) is StreamsStudent and card.architecture == "fsa-s-streams"
    patches = write_patches(tmp_path / "train.h5")
    outcome = uknowpan("train", "--stage", "prior", "--data", patches, "--preset", "streams", "-o", out)
    outcome.fails(2, "The preset streams takes a scenes file")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[train]\niteration = 2", "no field iteration; valid are iterations"),
        ("[network]\ndepth = 2", "no field depth"),
        ("[trian]\niterations = 2", "not trian"),
        ("[train]\niterations = 'many'", "iterations takes int, not 'many'"),
        ("[train]\nbatch_size = 0", "batch_size must be at least 1"),
        ("[train]\nvalidate_every = 0", "validate_every must be at least 1"),
        ("[train", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_train_refuses_configs(text: str | None, says: str, uknowpan: Run, tmp_path: Path, scenes: Path) -> None:
    path = tmp_path / "config.toml"
    if text is not None:
        path.write_text(text)
    out = tmp_path / "run"
    uknowpan("train", "--data", scenes, "--out", out, "--config", path).fails(2, says)
    assert not out.exists()


def test_train_refuses_data(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path) -> None:
    text = tmp_path / "text.h5"
    text.write_text("no scenes")
    only_train = tmp_path / "train.h5"
    with h5py.File(scenes) as source, h5py.File(only_train, "w") as file:
        source.copy("scene-train", file)
    for path, says in (
        (tmp_path / "none.h5", "none.h5 does not exist"),
        (text, "text.h5 is no HDF5 file"),
        (only_train, "no scene of the split 'valid'"),
    ):
        uknowpan("train", "--data", path, "--out", tmp_path / "run", "--config", config).fails(3, says)


def test_train_interrupted_and_resumed(
    uknowpan: Run, tmp_path: Path, config: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM after the first step: exit 130, and --resume ends where an unbroken run does."""
    monkeypatch.setattr(GenericStudentStage.__init__, "__kwdefaults__", {
        **(GenericStudentStage.__init__.__kwdefaults__ or {}), "validation_batches": 1,
    })  # fmt: skip
    common = ("train", "--data", scenes, "--config", config, "-q", "-j", 1)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert uknowpan(*common, "--out", unbroken).code == 0

    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    batches = GenericStudentStage.batches

    def interrupted(stage: GenericStudentStage, start: int, stop: int) -> Iterator[object]:
        for batch in batches(stage, start, stop):
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(GenericStudentStage, "batches", interrupted)
        outcome = uknowpan(*common, "--out", broken)
    assert outcome.code == 130
    assert outcome.stdout == ""
    assert re.fullmatch(r"uknowpan: error: stopped after step 1; --resume goes on from there\n", outcome.stderr)
    assert not (broken / "best.safetensors").exists()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == handlers

    again = uknowpan(*common, "--out", broken)
    assert again.code == 4
    assert "holds a run already; --resume" in again.stderr

    resumed = uknowpan(*common, "--out", broken, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert resumed.stdout == f"{broken / 'best.safetensors'}\n"
    wanted, found = (load_file(folder / "last.safetensors") for folder in (unbroken, broken))
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert (weight == found[name]).all(), name
    assert not list(broken.glob(".*"))
    # What it made is a model like any other.
    assert uknowpan("models", "verify", broken / "best.safetensors").code == 0


def test_train_goes_on_only_as_configured(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path) -> None:
    out = tmp_path / "my model"
    common = ("train", "--data", scenes, "--out", out, "-q", "-j", 1, "--config", config)
    assert uknowpan(*common, "--device", "cpu").code == 0
    config.write_text(CONFIG.replace("warmup = 1", "warmup = 2"))
    uknowpan(*common, "--resume").fails(2, r"my model was begun with train\.warmup 1 \(here 2\); --resume")
    # A card names the data of its weights, and not where this machine keeps them.
    card = json.loads(uknowpan("models", "show", out / "best.safetensors", "--json").stdout)
    assert card["name"] == "my model"
    training = card["training"]
    assert training["seed"] == 0
    assert training["command"] == ("uknowpan train --stage fsa-s --data scenes.h5 --out 'my model' --config tiny.toml")
    assert training["scenes_by_licence"] == {"none": ["scene-train"]}
    assert training["validation_scenes_by_licence"] == {"none": ["scene-valid"]}
    assert training["code_version"] in uknowpan("--version").stdout
    assert str(tmp_path) not in json.dumps(card)


def test_train_from_other_weights(uknowpan: Run, tmp_path: Path, config: Path, scenes: Path, tiny_model: Path) -> None:
    out = tmp_path / "run"
    outcome = uknowpan("train", "--data", scenes, "--out", out, "--config", config, "--init", tiny_model)
    outcome.fails(5, r"the weights of .* deep_width 8 \(here 4\)\) do not fit")
    assert not out.exists()


@pytest.mark.parametrize(("device", "says"), [("tpu", "takes auto, cpu, cuda"), ("cuda:99", "PyTorch sees")])
def test_train_refuses_devices(
    device: str, says: str, uknowpan: Run, tmp_path: Path, config: Path, scenes: Path
) -> None:
    words = ("train", "--data", scenes, "--out", tmp_path / "run", "--config", config, "--device", device)
    uknowpan(*words).fails(2, f"--device .*{says}")
