"""Work in threads."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from running import MakePair

import uknowpan
from uknowpan.models.sharpeners import ClassicalSharpener, Sharpened
from uknowpan.threads import side_by_side


def test_cores_are_shared_and_given_back() -> None:
    """Kind of fault: after a run, new threads of the caller's program had one core in PyTorch."""

    def cores(item: int = 0) -> int:
        return torch.get_num_threads()

    before = cores()
    torch.set_num_threads(3)
    assert list(side_by_side(cores, range(5), 2, 4)) == [(item, 2) for item in range(5)]
    with ThreadPoolExecutor(1) as pool:
        assert (cores(), pool.submit(cores).result()) == (3, 3)
    torch.set_num_threads(before)


def test_no_thread_outlives_an_error(make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind of fault: idle threads for as long as the caller kept the exception."""
    pair, before = make_pair(ms_shape=(32, 32)), threading.active_count()
    real = ClassicalSharpener.sharpen
    for odd in (lambda *given: Sharpened(real(*given).hrms * np.nan), lambda *given: None):
        monkeypatch.setattr(ClassicalSharpener, "sharpen", odd)
        with pytest.raises((uknowpan.Error, TypeError, AttributeError)) as kept:
            uknowpan.sharpen(pair.pan, pair.ms, tmp_path / "out.tif", method="bicubic", tile=32, num_threads=2)
        assert threading.active_count() == before, kept
