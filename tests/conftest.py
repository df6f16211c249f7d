"""Fixtures shared by all tests: tiny pairs, the command line inside this process, a tiny checkpoint."""

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from rasters import RasterPair, write_pair

PairFactory = Callable[..., RasterPair]


@pytest.fixture
def make_pair(tmp_path: Path) -> PairFactory:
    """Factory of tiny pairs, see `rasters.write_pair` for the options."""
    return partial(write_pair, tmp_path)


@pytest.fixture(autouse=True)
def _denormals_again():
    """Sharpening and training flush denormals for the whole process; other tests want them."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own settings stay out of the tests."""
    for name in list(os.environ):
        if name.startswith("UKNOWPAN_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _no_progress_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow machine would print progress between the lines that a test compares."""
    monkeypatch.setattr("uknowpan.console._plain_lines.__defaults__", (3600.0,))


@pytest.fixture
def uknowpan(capfd: pytest.CaptureFixture[str]):
    """`uknowpan(*arguments)` runs a command; streams are caught below Python, where GDAL and PROJ would write."""
    import torch
    from running import Outcome

    from uknowpan.commands.main import app

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
                torch.set_flush_denormal(False)  # set for the process; Hypothesis refuses to run with it
        sys.stdout.flush()
        out, err = capfd.readouterr()
        for warning in shown:  # outside of pytest they would be on stderr
            err += f"{warning.category.__name__}: {warning.message}\n"
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return run


@pytest.fixture
def sharpen(uknowpan, tiny_model: Path, tmp_path: Path):
    """`sharpen(pair, *words)` writes `output`, by the tiny model unless the words name another or a method."""

    def run(pair: RasterPair, *words: object, output: Path = tmp_path / "out.tif", code: int = 0):
        model = () if {"--model", "-m", "--method"} & set(words) else ("--model", tiny_model)
        outcome = uknowpan("sharpen", pair.pan, *pair.ms, "-o", output, *model, *words)
        assert outcome.code == code, outcome.stderr
        return outcome

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights that serves ratios 2 to 6 and any bands."""
    from running import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.safetensors")
