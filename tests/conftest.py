"""Fixtures shared by all tests."""

import sys
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
