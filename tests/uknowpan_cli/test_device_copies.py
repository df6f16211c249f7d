"""Copies and waits of sharpening and training on a pretended GPU, counted; skipped where it or g++ is absent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patch_files import TINY_NETWORKS, Files
from running import MakePair

PRETENDED = Path(__file__).parents[2] / ".." / "shared" / "tools" / "pretend_cuda"
pytestmark = [
    pytest.mark.skipif(not PRETENDED.is_dir(), reason="the shared tools are not beside this repository"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

BEGIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
import load, pretend_cuda
import torch
pretend_cuda.install()
def counted():
    return {name: sum(getattr(pretend_cuda, name).values()) for name in ("H2D", "D2H", "SYNC", "F64")}
"""

SHARPEN = """
# The pretended device does not see copies of tensors that were made in inference mode.
torch.inference_mode = lambda mode=True: torch.no_grad() if mode else torch.enable_grad()

class Event:
    waits = 0
    def record(self): pass
    def synchronize(self): Event.waits += 1

torch.cuda.Event = Event
from uknowpan.commands.main import app
counts = []
for pan, ms, out in zip(*[iter(sys.argv[2:])] * 3):
    pretend_cuda.clear()
    Event.waits = 0
    words = "--device cuda --tile 64 --batch-size 2 --coregister off --overwrite".split()
    with pretend_cuda.Mode():
        app(["sharpen", pan, ms, "-o", out, *words], standalone_mode=False)
    counts.append({**counted(), "waits": Event.waits})
print(json.dumps(counts))
"""

TRAIN = """
import tomllib
from pathlib import Path
from uknowpan.models.training import loop
from uknowpan.training.jobs import make_job, resolve
from uknowpan.training.options import TrainOptions

copy = pretend_cuda.run
def run(function, given, named):  # copies that nobody waits for do not count
    before = pretend_cuda.H2D.copy()
    done = copy(function, given, named)
    if named.get("non_blocking"):
        pretend_cuda.H2D.clear()
        pretend_cuda.H2D.update(before)
    return done

pretend_cuda.run = run
# The pretended device cannot pickle; validation is not counted.
loop.RunFolder.save_state = loop._Run.report = lambda *given: None
folder = Path(sys.argv[2])
more = {}
for kind, toml, option, value in json.loads(sys.argv[3]):
    options = TrainOptions(
        data=[folder / "train.h5"], valid=[folder / "valid.h5"], out=folder / f"{kind}{option}", device="cuda",
        **{"model" if kind in ("pan-crafter", "ssdiff") else "stage": kind},
        **({option: folder / value} if option else {}))
    train = {"iterations": 3, "batch_size": 2, "validation_samples": 1, "log_every": 9}
    settings = resolve(options, {**tomllib.loads(toml), "train": train})
    found = {}
    pretend_cuda.clear()
    with pretend_cuda.Mode():
        loop.train(make_job(options, settings), settings.train, options.out, device="cuda",
                   on_step=lambda step, parts: found.update({step: counted()}))
    more[f"{kind} {option}"] = {name: found[3][name] - found[2][name] for name in found[3]}
print(json.dumps(more))
"""


def run(code: str, *words: object) -> Any:
    """The JSON that a process prints last."""
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + code, str(PRETENDED.resolve()), *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_batch_is_copied_twice_and_fetched_once(make_pair: MakePair, tmp_path: Path) -> None:
    """A copy from common memory makes the host wait for the network: constants of a scene stay on the device."""
    pairs = [make_pair(ms_shape=(rows, 32), name=f"{rows}") for rows in (32, 64)]
    *_, short, long = run(
        SHARPEN, *(x for i in (0, 1, 0, 1) for x in (pairs[i].pan, pairs[i].ms[0], tmp_path / "o.tif"))
    )
    batches = 2  # two more rows of two tiles
    more = {name: long[name] - short[name] for name in short}
    assert more == {"H2D": 2 * batches, "D2H": batches, "SYNC": 0, "F64": 0, "waits": batches}


def test_a_training_step_waits_once(tmp_path: Path) -> None:
    """Kind of fault: constants, indices and noise from common memory, and a wait for every loss: up to 31 a step."""
    Files(tmp_path)
    jobs = [
        ("prior", TINY_NETWORKS["prior"], "", ""),
        ("fsa-t", TINY_NETWORKS["fsa-t"], "prior", "prior.safetensors"),
        ("fsa-s", TINY_NETWORKS["fsa-s"], "teacher", "teacher.safetensors"),
        ("pan-crafter", "[network]\nwidths = [8, 8, 8]\nblocks = 1\nhead_width = 4\n", "", ""),
        ("ssdiff", "[network]\nwidth = 16\ntime_width = 8\n", "", ""),
    ]
    counts = run(TRAIN, tmp_path, json.dumps(jobs))
    once = {"H2D": 0, "D2H": 1, "SYNC": 0, "F64": 0}
    assert counts == dict.fromkeys(counts, once) and len(counts) == len(jobs)
