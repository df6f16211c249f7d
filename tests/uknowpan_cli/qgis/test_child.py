"""The part of the QGIS plugin that runs uknowpan; it needs no QGIS."""

import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from running import MakePair, read

FILE = Path(__file__).parents[3] / "uknowpan_cli" / "qgis" / "child.py"


@pytest.fixture(scope="module")
def child() -> Any:
    spec = importlib.util.spec_from_file_location("child_of_the_plugin", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Feedback:
    """A QgsProcessingFeedback that remembers, and is cancelled after the first sign of progress if it is asked to."""

    def __init__(self, cancels: bool = False):
        self.cancels, self.percents, self.infos, self.warnings = cancels, [], [], []
        self.setProgress, self.pushInfo, self.pushWarning = (
            self.percents.append, self.infos.append, self.warnings.append,
        )  # fmt: skip

    def isCanceled(self) -> bool:
        return self.cancels and bool(self.percents)


def test_a_run_reports_progress(child: Any, make_pair: MakePair, tmp_path: Path, monkeypatch: Any) -> None:
    pair, feedback = make_pair(), Feedback()
    monkeypatch.setattr(child, "OWN", ())  # the tests may find uknowpan by PYTHONPATH
    command = [sys.executable, "-m", "uknowpan", "sharpen", str(pair.pan), *map(str, pair.ms), "--method", "gsa"]
    command += ["-o", str(tmp_path / "out.tif"), "--log-json", "-"]
    assert child.run(command, feedback) == str(tmp_path / "out.tif")
    assert read(tmp_path / "out.tif").shape == (4, 96, 80)
    assert feedback.percents == sorted(feedback.percents)
    assert feedback.percents[-1] == 100
    assert "by gsa" in feedback.infos[-1]
    with pytest.raises(child.ChildFailed, match="exists and is kept"):
        child.run(command, feedback)


SLEEPER = """
import json, os, time
entry = {"time": "", "level": "debug", "message": "progress", "stage": "2/4 scene", "done": 1, "total": 2}
print(json.dumps(entry), flush=True)
open(os.environ["NUMBER"], "w").write(str(os.getpid()))
time.sleep(60)
"""


def test_cancel_ends_the_child(child: Any, tmp_path: Path, monkeypatch: Any) -> None:
    began, feedback = time.monotonic(), Feedback(cancels=True)
    monkeypatch.setenv("NUMBER", str(tmp_path / "number"))
    with pytest.raises(child.ChildFailed, match="Cancelled"):
        child.run([sys.executable, "-c", SLEEPER], feedback)
    assert feedback.percents == [100 * 1.5 / 4]
    assert time.monotonic() - began < 30
    if (tmp_path / "number").exists():
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "number").read_text()), 0)


def test_the_child_gets_none_of_the_paths_of_qgis(child: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")
    monkeypatch.setenv("PROJ_LIB", "/nowhere")
    code = "import os; print({'PYTHONHOME', 'PROJ_LIB'} & set(os.environ))"
    assert child.run([sys.executable, "-c", code], Feedback()) == "set()"


def test_folder_of_the_command(child: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The folder may be an environment or its bin; without one, PATH counts."""
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "uknowpan"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    assert child.executable(str(tmp_path)) == child.executable(str(tmp_path / "bin")) == str(command)
    assert child.executable("") is None
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert child.executable("") == str(command)
