"""`--engine`: who runs the network, and an installation without PyTorch."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from running import MakePair, Run, read, spawn

pytest.importorskip("onnxruntime")

WITHOUT_TORCH = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = lambda name, *a: None if name.partition(".")[0] == "torch" else real(name, *a)
"""
"""Python that runs first: PyTorch is not installed."""


def test_without_torch(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair, ours, theirs = make_pair(ms_shape=(24, 24), noise=40), tmp_path / "onnx.tif", tmp_path / "torch.tif"
    words = ("sharpen", pair.pan, *pair.ms, "--tile", 64, "-o")
    done = spawn(*words, ours, "--uncertainty", tmp_path / "sigma.tif", before=WITHOUT_TORCH)
    assert done.code == 0, done.stderr
    assert uknowpan(*words, theirs).code == 0
    assert np.abs(read(ours).astype(float) - read(theirs)).max() <= 1
    assert (read(tmp_path / "sigma.tif") > 0).all()
    with rasterio.open(ours) as dataset:
        assert dataset.tags()["UKNOWPAN_ENGINE"] == "onnx"


def test_what_needs_torch_names_it(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(16, 16))
    words = ("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif")
    spawn(*words, "--engine", "torch", before=WITHOUT_TORCH).fails(2, "pip install torch")
    uknowpan(*words, "--engine", "onnx", "--dtype", "bf16").fails(2, "fp32 on the CPU")
    uknowpan(*words, "--engine", "onnx", "--steps", 2).fails(5, "one step")


def test_an_archive_keeps_its_engine(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Results of one engine are not taken for those of the other."""
    make_pair(ms_shape=(16, 16))
    words = ("batch", "--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif", "-o", tmp_path / "out")
    assert uknowpan(*words).code == 0
    again = uknowpan(*words, "--engine", "onnx")
    assert again.code == 7 and "other inputs or options (engine, seed)" in again.stderr
