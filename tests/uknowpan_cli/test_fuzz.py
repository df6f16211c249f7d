"""Mutated inputs of all kinds: one sentence, never a traceback, a hang or 2 GB."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_mutated_inputs(tmp_path: Path) -> None:
    """Kind: a damaged file ends with exit code 1. `UKNOWPAN_FUZZ=2000` runs 2,000 trials, UKNOWPAN_FUZZ_SEED others."""
    trials, seed = os.environ.get("UKNOWPAN_FUZZ", "40"), os.environ.get("UKNOWPAN_FUZZ_SEED", "0")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    tool = Path(__file__).parents[1] / "tools" / "fuzz.py"
    done = subprocess.run(
        [sys.executable, tool, tmp_path, trials, seed],
        env=environment, capture_output=True, text=True, timeout=120 + 5 * int(trials),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["trials"] == int(trials)
