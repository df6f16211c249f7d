"""stdout is the result; progress, logs and the age of the process."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from running import MakePair, Outcome, read, spawn

from uknowpan import console

Sharpen = Callable[..., Outcome]


def test_stdout_is_the_path(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair()
    for words in ((), ("-v",), ("-vv",), ("-q",)):
        outcome = sharpen(pair, "--overwrite", *words)
        assert outcome.stdout == f"{tmp_path / 'out.tif'}\n"
        assert words != ("-q",) or outcome.stderr == ""


def test_progress_without_a_terminal(sharpen: Sharpen, make_pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines, not a bar, and none with -q."""
    monkeypatch.setattr(console._plain_lines, "__defaults__", (0.0,))
    pair = make_pair()
    lines = sharpen(pair, "--tile", 32).stderr.splitlines()
    assert lines[0].startswith("survey: ")
    assert lines[-2].startswith("sharpen: 0.008064/0.008064 Mpx, ")  # tiles overhang the scene
    assert re.search(r"out.tif: 80 x 96 pixels, 4 bands, by tiny in [\d.]+ s, [\d.e-]+ Mpx/s$", lines[-1])
    assert sharpen(pair, "--tile", 32, "--overwrite", "-q").stderr == ""


def test_log_json(sharpen: Sharpen, make_pair: MakePair, tmp_path: Path) -> None:
    pair, log = make_pair(ratio=4.5), tmp_path / "log.jsonl"
    sharpen(pair, "--log-json", log, "-q")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(e["level"] == "info" and "4.5000" in e["message"] for e in entries)
    assert all(list(e)[:3] == ["time", "level", "message"] for e in entries)
    assert entries[0]["options"]["log_json"] == str(log)
    assert {e["stage"] for e in entries if e["message"] == "progress"} == {"survey", "sharpen"}
    (report,) = [e["report"] for e in entries if e["message"] == "report"]
    assert (report["width"], report["height"]) == (90, 108)
    sharpen(pair, "--log-json", log, "-q", code=4)
    last = json.loads(log.read_text().splitlines()[-1])
    assert "exists and is kept" in last["message"]
    assert last["exit_code"] == 4


def test_json_lines_on_stderr(sharpen: Sharpen, make_pair: MakePair) -> None:
    """Another program reads progress and the error from stderr, which has nothing but JSON lines."""
    pair = make_pair()
    for code in (0, 4):
        entries = [json.loads(line) for line in sharpen(pair, "--log-json", "-", code=code).stderr.splitlines()]
        assert entries[-1]["level"] == ("error" if code else "info")
        shares = [e["done"] / e["total"] for e in entries if e.get("stage") == "sharpen"]
        assert shares == ([] if code else sorted(shares))
        assert code or shares[-1] == 1


def test_reader_that_goes_away(make_pair: MakePair, tiny_model: Path, tmp_path: Path) -> None:
    """`uknowpan sharpen ... | true`: the result is there, without a complaint."""
    pair = make_pair()
    reading, writing = os.pipe()
    os.close(reading)
    outcome = spawn(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--model", tiny_model),
        before=f"import os\nos.dup2({writing}, 1)",
        inherited=(writing,),
    )
    os.close(writing)
    assert outcome.messages == ""
    assert read(tmp_path / "out.tif").shape == (4, 96, 80)


def test_age_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_began", [])
    before = time.monotonic()
    assert console.run_began() >= before
    console.own_process()
    assert before - 36_000 < console.run_began() < before


@pytest.mark.parametrize(("given", "counts"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep(given: str | None, counts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spinning threads starved beside busy processes; what the user asks for counts."""
    monkeypatch.setattr(console, "_began", [])
    monkeypatch.setenv("OMP_WAIT_POLICY", given or "")
    if given is None:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    console.own_process()
    assert os.environ["OMP_WAIT_POLICY"] == counts
