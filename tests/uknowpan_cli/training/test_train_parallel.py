"""`train` under torchrun: two processes learn what one does, and only the first one writes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from patch_files import TINY_NETWORKS, story
from running import Outcome, Run

from uknowpan.models.checkpoints import read_card

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no gloo, by which processes without a GPU talk to each other",
)

TRAIN = """
[train]
iterations = 6
batch_size = 4
warmup = 2
learning_rate = 1e-4
validate_every = 6
validation_samples = 2
checkpoint_every = 6
log_every = 2
ema = 0.5
amp = false
"""
CONFIGS = TINY_NETWORKS | {
    "fsa-t": TINY_NETWORKS["fsa-t"] + "terminal_share = 0.3\n",
    "pan-crafter": "[network]\nwidths = [8, 8]\nblocks = 1\nattention_from = 1\ntoken_width = 8\ngroups = 4\n"
    "head_width = 4\n[options]\nreleased_crops = true\n",
    "ssdiff": "[network]\nwidth = 8\nhead_width = 4\ntime_width = 4\nwindow = 4\n",
}
LOSSES = ("nll", "hard", "soft", "features", "variance", "ms", "l1", "score")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configurations, and files of 32 x 32 pixels with details that PAN shares."""
    made, rng = tmp_path_factory.mktemp("parallel"), np.random.default_rng(0)
    for split, count in (("train", 12), ("valid", 2)):
        rough = rng.uniform(200, 900, (count, 4, 8, 8)).repeat(4, 2).repeat(4, 3)
        # Noise, as spectra of flat blocks are zero, where no phase is near any other.
        rough = rough + rng.normal(0, 10, rough.shape)
        gt = rough + rng.normal(0, 40, (count, 1, 32, 32))
        with h5py.File(made / f"{split}.h5", "w") as file:
            file["gt"], file["lms"] = gt.astype("f4"), rough.astype("f4")
            file["pan"] = gt.mean(1, keepdims=True).astype("f4")
            file["ms"] = rough[:, :, ::4, ::4].astype("f4")
            file.attrs["max_value"] = 1023.0
    for name, text in CONFIGS.items():
        (made / f"{name}.toml").write_text(TRAIN + text)
    return made


def arguments(folder: Path, stage: str, sources: Path, **changes: str) -> list[str]:
    """Arguments of `train` without --out; prior and teacher lie in `sources`."""
    text = (folder / f"{stage}.toml").read_text()
    for name, value in changes.items():
        text = re.sub(rf"(?m)^{name} = .*$", f"{name} = {value}", text)
    config = sources / f"{stage}.toml"
    sources.mkdir(exist_ok=True)
    config.write_text(text)
    more = {
        "fsa-t": ["--prior", sources / "prior" / "last.safetensors"],
        "fsa-s": ["--teacher", sources / "fsa-t" / "last.safetensors"],
    }.get(stage, [])
    words = [
        "train",
        "--stage" if stage in TINY_NETWORKS else "--model",
        stage,
        "--data",
        folder / "train.h5",
        "--config",
        config,
        *more,
    ]
    return [str(word) for word in (*words, "--device", "cpu", "-j", 1, "-q")]


def torchrun(*words: object, term_when: Path | None = None) -> Outcome:
    """Two processes; `term_when`: once this file is there, torchrun gets a SIGTERM."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    started = subprocess.Popen(
        [sys.executable, *launcher, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        waited = 0.0
        while term_when is not None and not term_when.exists() and waited < 100:
            assert started.poll() is None, started.communicate()[1]
            time.sleep(0.05)
            waited += 0.05
        if term_when is not None:
            started.send_signal(signal.SIGTERM)
        out, err = started.communicate(timeout=120)
    finally:
        started.kill()
    return Outcome(started.returncode, out, err)


def same_story(one: Path, other: Path, later: float) -> None:
    """The first line agrees to rounding, `later` ones to what is made of it."""
    ours, theirs = story(one), story(other)
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] == [2, 4, 6]
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys()
        for name in set(LOSSES) & mine.keys():
            assert mine[name] == pytest.approx(its[name], rel=later), name
    for name in set(LOSSES) & ours[0].keys():
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name
    # Of the mean over the processes; the mean of their norms is larger.
    assert ours[0]["gradient_norm"] == pytest.approx(theirs[0]["gradient_norm"], rel=2e-3)


IN_TURN = """
import json, sys
import torch.distributed as together
from uknowpan.commands.main import app
join, leave = together.init_process_group, together.destroy_process_group
together.init_process_group = lambda *a, **k: together.is_initialized() or join(*a, **k)
together.destroy_process_group = lambda: None
for words in json.load(open(sys.argv[1])):
    try:
        app(words, prog_name="uknowpan")
    except SystemExit as stop:
        if stop.code:
            raise
leave()
"""
"""Several commands in the same processes: to begin takes longer than to train."""


def test_two_processes_learn_what_one_does(folder: Path, uknowpan: Run, tmp_path: Path) -> None:
    """Every stage: prior, teacher, the lite student with its adapters, PAN-Crafter and SSDiff."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    commands = {}
    for stage in CONFIGS:
        commands[stage] = [*arguments(folder, stage, alone), "--out", str(both / stage)]
        done = uknowpan(*arguments(folder, stage, alone), "--out", alone / stage)
        assert done.code == 0, done.stderr
    (tmp_path / "words.json").write_text(json.dumps(list(commands.values())))
    (tmp_path / "in_turn.py").write_text(IN_TURN)
    done = torchrun(tmp_path / "in_turn.py", tmp_path / "words.json")
    assert done.code == 0, done.stderr
    # The first process alone speaks and writes.
    assert done.stdout.split() == [str(both / stage / "best.safetensors") for stage in CONFIGS]
    for stage in CONFIGS:
        # The phases of the teacher's attention make ten times as much of a rounding at each step,
        # in one process as well.
        same_story(both / stage, alone / stage, later=5e-3 if stage == "fsa-t" else 1e-4)
        # TensorBoard's file has a time and a process in its name.
        ours, theirs = (sorted(p.name.split(".tfevents")[0] for p in (d / stage).iterdir()) for d in (both, alone))
        assert ours == theirs
        cards = [read_card(d / stage / "last.safetensors") for d in (both, alone)]
        one, other = (replace(card, scores={}, training={}) for card in cards)
        assert one == other


def test_terminated_together_and_resumed(folder: Path, uknowpan: Run, tmp_path: Path) -> None:
    out, alone = tmp_path / "prior", tmp_path / "alone"
    # So many steps that the signal comes before the last of them.
    words = arguments(folder, "prior", tmp_path, iterations="100000", milestones="[4]")
    words = ["-m", "uknowpan", *words, "--out", str(out)]
    stopped = torchrun(*words, term_when=out / "log.jsonl")
    assert stopped.code != 0 and stopped.stdout == ""
    assert "; --resume goes on from there" in stopped.stderr
    step = torch.load(out / "state.pt", weights_only=True)["step"]
    assert 2 <= step < 100_000
    assert f"stopped after step {step};" in stopped.stderr
    log = story(out)
    assert [entry["step"] for entry in log] == list(range(2, step + 1, 2))
    # Going on, it says what one process says that goes on from there.
    alone.mkdir()
    for file in ("state.pt", "config.json", "log.jsonl"):
        (alone / file).write_bytes((out / file).read_bytes())
    for folder_of in (out, alone):
        config = json.loads((folder_of / "config.json").read_text())
        config["train"]["iterations"] = step + 4
        (folder_of / "config.json").write_text(json.dumps(config))
    arguments(folder, "prior", tmp_path, iterations=str(step + 4))
    resumed = torchrun(*words, "--resume")
    assert resumed.code == 0, resumed.stderr
    assert resumed.stdout == f"{out / 'best.safetensors'}\n"
    done = uknowpan(*words[2:-2], "--out", alone, "--resume")
    assert done.code == 0, done.stderr
    ours, theirs = story(out), story(alone)
    assert [e["step"] for e in ours] == [e["step"] for e in theirs]
    assert ours[-1]["step"] == step + 4 and len(ours) > len(log)
    for mine, its in zip(ours, theirs, strict=True):
        for name in set(LOSSES) & mine.keys():
            assert mine[name] == pytest.approx(its[name], rel=1e-3), name


def test_a_batch_that_cannot_be_shared_out(folder: Path, tmp_path: Path) -> None:
    words = arguments(folder, "prior", tmp_path, batch_size="3")
    done = torchrun("-m", "uknowpan", *words, "--out", tmp_path / "run")
    assert done.code != 0 and done.stdout == ""
    sentence = (
        "uknowpan: error: a batch of 3 cannot be shared out evenly among 2 processes; choose a "
        "batch_size that 2 divides"
    )
    # Two processes write to one stream, now and then on one line.
    assert done.stderr.count(sentence) == done.stderr.count("uknowpan: error:") > 0
    assert not (tmp_path / "run").exists()
