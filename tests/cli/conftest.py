"""Running the command line inside the test process, and a tiny checkpoint."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from running import Outcome, Run, write_tiny_model

from uknowpan.commands.main import app


@pytest.fixture
def uknowpan(capfd: pytest.CaptureFixture[str]) -> Run:
    """`uknowpan(*arguments)`: runs a command; streams are caught below Python, where GDAL and
    PROJ would write."""

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("default")
            for kind in (DeprecationWarning, PendingDeprecationWarning, ResourceWarning):
                warnings.simplefilter("ignore", kind)  # as Python does
            try:
                app([str(a) for a in arguments], prog_name="uknowpan")
                code: object = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                torch.set_flush_denormal(False)  # set for the process; Hypothesis minds it
        sys.stdout.flush()
        out, err = capfd.readouterr()
        for warning in shown:  # outside of pytest they would be on stderr
            err += f"{warning.category.__name__}: {warning.message}\n"
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own settings stay out of the tests."""
    for name in list(os.environ):
        if name.startswith("UKNOWPAN_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights that serves ratios 2 to 6 and any bands."""
    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")
