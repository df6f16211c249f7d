"""kill -9 of `uknowpan batch` at any moment."""

import json
import os
import random
import re
from pathlib import Path

import pytest
import rasterio
from running import MakePair, Run, pixels, read, spawn

from uknowpan.archive.report import merged_report

COUNTING = """
import os, signal, sys
OURS = ("uknowpan.commands.batch", "uknowpan.sharpening", "uknowpan.tiling.strips",
        "uknowpan.tiling.output")
calls = 0
def count(frame, event, argument):
    global calls
    name = frame.f_globals.get("__name__", "")
    if name.startswith(OURS) and frame.f_code.co_name != "<module>":
        calls += 1
        if calls == {calls}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.setprofile(count)
"""
"""Python for `spawn`: the process is killed between any two calls and returns of the code that
decides, writes and renames; the first some thousand of them, up to the end of a run."""

TELLING = """
import atexit
atexit.register(lambda: (sys.setprofile(None), print("calls", calls, file=sys.stderr)))
"""

MOMENTS = 4


@pytest.mark.parametrize("format", ["gtiff", "cog"])
def test_killed_at_random(format: str, uknowpan: Run, make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """Whatever a kill leaves, outputs are whole or not there, and the same command makes them
    all, without a trace of what went before."""
    for name in "abc":
        make_pair(name=name, ms_shape=(24, 12), noise=ord(name))
    words = (
        *("batch", "--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif"),
        *("--model", tiny_model, "--tile", 32, "--coregister", "off", "--uncertainty"),
        *("-f", format, "-o"),
    )
    output, undisturbed = tmp_path / "out", tmp_path / "other"
    counted = spawn(*words, undisturbed, before=COUNTING.format(calls=-1) + TELLING)
    assert counted.code == 0, counted.stderr
    total = int(re.findall(r"^calls (\d+)$", counted.stderr, re.MULTILINE)[-1])
    expected = pixels(undisturbed)
    assert len(expected) == 6
    chance = random.Random(format)
    for _ in range(MOMENTS):
        # Later runs skip what is there and end earlier; a moment after their end kills nothing.
        moment = chance.randrange(1, total // 2)
        killed = spawn(*words, output, before=COUNTING.format(calls=moment))
        assert killed.code in (-9, 0), killed.stderr
        for path in output.glob("[!.]*.tif"):
            assert read(path).tobytes() == expected[path.name]
    for path in output.glob(".*.new"):  # as old as it will be when somebody comes back
        os.utime(path, (0, 0))
    outcome = uknowpan(*words, output)
    assert outcome.code == 0, outcome.stderr
    assert pixels(output) == expected
    assert {p.name for p in output.iterdir()} == {p.name for p in undisturbed.iterdir()}
    assert [scene["id"] for scene in merged_report(output).scenes] == ["a", "b", "c"]
    assert not merged_report(output).of("failed")
    for name in "abc":
        sidecar = json.loads((output / f"{name}_sharp.tif.json").read_text())
        with rasterio.open(output / f"{name}_sharp.tif") as dataset:
            assert dataset.tags()["UKNOWPAN_IDENTITY"] == sidecar["identity"]
