"""`--engine`: who runs the network, and an installation without PyTorch."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rasterio
import torch
from running import STOPPING, MakePair, Run, read, spawn, write_tiny_model

from uknowpan import loading
from uknowpan.models.checkpoints import find_checkpoint, load_model
from uknowpan.models.types import Condition
from uknowpan.options import SharpenOptions

WITHOUT_TORCH = """
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = lambda name, *a: None if name.partition(".")[0] == "torch" else real(name, *a)
"""
"""Python that runs first: PyTorch is not installed."""


def test_without_torch(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Pixels of several tiles, with holes, eight bands and the uncertainty, are those of PyTorch within 1 DN."""
    holes = np.zeros((24, 24), bool)
    holes[5:9, 7:14] = True
    pair = make_pair(ms_shape=(24, 24), ratio=3, bands=8, noise=40, nodata=0, holes=holes)
    words = ("sharpen", pair.pan, *pair.ms, "--tile", 36)
    files = {name: (tmp_path / f"{name}.tif", tmp_path / f"{name}_sigma.tif") for name in ("onnx", "torch")}
    ours, theirs = ((*words, "-o", image, "--uncertainty", sigma) for image, sigma in files.values())
    assert spawn(*ours, before=WITHOUT_TORCH).code == 0
    assert uknowpan(*theirs, "--engine", "torch").code == 0
    for mine, other in zip(*files.values(), strict=True):
        np.testing.assert_allclose(read(mine).astype(float), read(other), rtol=0, atol=1)  # NaN where the other has it
    assert (read(files["onnx"][0]) == 0).any()
    with rasterio.open(files["onnx"][0]) as dataset:
        assert dataset.tags()["UKNOWPAN_ENGINE"] == "onnx"


def test_what_needs_torch_names_it(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(16, 16))
    words = ("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif")
    for needing in ((*words, "--engine", "torch"), ("models", "verify", "generic")):
        spawn(*needing, before=WITHOUT_TORCH).fails(2, "pip install torch")
    uknowpan(*words, "--engine", "onnx", "--dtype", "bf16").fails(2, "fp32 on the CPU")
    uknowpan(*words, "--engine", "onnx", "--steps", 2).fails(5, "one step")


def test_memory_that_is_full_is_no_damaged_model(
    uknowpan: Run, make_pair: MakePair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = make_pair(ms_shape=(16, 16))

    def full(*arguments: object, **options: object) -> None:
        raise onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException("std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", full)
    uknowpan("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif").fails(6, "Memory ran out")


def test_an_archive_keeps_its_engine(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Results of one engine are not taken for those of the other."""
    make_pair(ms_shape=(16, 16))
    words = ("batch", "--pan-glob", tmp_path / "*_pan.tif", "--ms-glob", tmp_path / "*_ms.tif", "-o", tmp_path / "out")
    assert uknowpan(*words, "--engine", "torch").code == 0
    again = uknowpan(*words)
    assert again.code == 7 and "other inputs or options (engine, seed)" in again.stderr


AT_EXIT = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_on_a_cpu_pytorch_is_not_imported(make_pair: MakePair, tmp_path: Path, more: tuple[str, ...]) -> None:
    """Kind of fault: half of a short run was the import of PyTorch."""
    pair = make_pair(ms_shape=(16, 16))
    done = spawn(
        *("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", *more), before=AT_EXIT,
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.code == 0 and done.stderr.endswith("False\n")


def test_who_runs_the_network_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch runs on GPUs, in bf16, with more steps and other models; ONNX Runtime runs the rest."""

    def engine(**options: object) -> str:
        return loading._engine(SharpenOptions(**options))  # type: ignore[arg-type]

    assert {engine(), engine(device="cpu"), engine(steps=1, model="generic", seed=3)} == {"onnx"}
    assert {engine(dtype="bf16"), engine(steps=2), engine(model=write_tiny_model(tmp_path / "m.safetensors"))} == {
        "torch"
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (engine(), engine(device="cuda"), engine(device="cpu")) == ("torch", "torch", "onnx")
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert engine(device="cpu") == "torch"


def test_an_exported_model_gives_the_networks_answer(uknowpan: Run, tmp_path: Path) -> None:
    file, tiny = tmp_path / "student.onnx", write_tiny_model(tmp_path / "tiny.safetensors")
    words = ("models", "export")
    assert uknowpan(*words, "generic", "-o", file).stdout == f"{file}\n"
    network, _ = load_model(find_checkpoint("generic"))
    rng, session = np.random.default_rng(0), onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["card"])["name"] == "generic"
    inputs = {"band": (3, 7, 32, 48), "pan": (1, 3, 32, 48), "scene": (1, 6)}
    band, pan, scene = (torch.from_numpy(rng.standard_normal(size, np.float32)) for size in inputs.values())
    condition = Condition(pan[:, :1], pan[:, :1], pan_features=pan, band_features=band[None], scene=scene)
    with torch.inference_mode():
        expected = network.at_end(condition)
    made = session.run(None, {name: x.numpy() for name, x in zip(inputs, (band, pan, scene), strict=True)})
    for ours, theirs in zip(made, (expected.x0, expected.log_sigma), strict=True):
        assert np.abs(ours[:, 0] - theirs[0].numpy()).max() < 1e-4
    uknowpan(*words, "generic", "-o", file).fails(4, "--overwrite")
    assert uknowpan(*words, "generic", "-o", file, "--overwrite").code == 0
    uknowpan(*words, "generic", "-o", tmp_path / "student.h5").fails(2, "name it .onnx")
    uknowpan(*words, tiny, "-o", tmp_path / "tiny.onnx").fails(5, "fsa-s-lite, and only fsa-s-streams has a graph")


def test_a_run_is_resumed_by_the_engine_that_began_it(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    pair = make_pair(ms_shape=(32, 16))
    words = ("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "out.tif", "--tile", 64)
    before = STOPPING.format(strips=1, name="SIGTERM")
    assert spawn(*words, "--engine", "torch", before=before).code == 130
    uknowpan(*words, "--resume").fails(3, "made with other method")
    assert uknowpan(*words, "--resume", "--engine", "torch").code == 0
