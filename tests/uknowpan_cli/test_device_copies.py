"""Copies and waits of a sharpening on a pretended GPU, counted; skipped where the pretended GPU or g++ is absent."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import MakePair

PRETENDED = Path(__file__).parents[2] / ".." / "shared" / "tools" / "pretend_cuda"
pytestmark = [
    pytest.mark.skipif(not PRETENDED.is_dir(), reason="the shared tools are not beside this repository"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="no g++"),
]

COUNT = """
import json, sys
sys.path.insert(0, sys.argv[1])
import load, pretend_cuda
import torch
pretend_cuda.install()
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
    names = ("H2D", "D2H", "SYNC", "F64")
    counts.append({**{n: sum(getattr(pretend_cuda, n).values()) for n in names}, "waits": Event.waits})
print(json.dumps(counts))
"""


def test_a_batch_is_copied_twice_and_fetched_once(make_pair: MakePair, tmp_path: Path) -> None:
    """A copy from common memory makes the host wait for the network: constants of a scene stay on the device."""
    pairs = [make_pair(ms_shape=(rows, 32), name=f"{rows}") for rows in (32, 64)]
    words = [str(x) for i in (0, 1, 0, 1) for x in (pairs[i].pan, pairs[i].ms[0], tmp_path / "o.tif")]
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(PRETENDED.resolve()), *words],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    *_, short, long = json.loads(done.stdout.splitlines()[-1])
    batches = 2  # two more rows of two tiles
    more = {name: long[name] - short[name] for name in short}
    assert more == {"H2D": 2 * batches, "D2H": batches, "SYNC": 0, "F64": 0, "waits": batches}, done.stderr
