"""Kinds of files, names and streams that are not what they should be, and memory that runs out."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import rasterio
from affine import Affine
from rasters import UTM
from running import MakePair, Run, write_tiny_model
from testfiles import write_images

from uknowpan.errors import InputError, ModelError, exit_code, sentence
from uknowpan.models.checkpoints import Card, build_network, load_model
from uknowpan.models.errors import CheckpointError, DataError
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.published.uknow.prior import PriorConfig
from uknowpan.models.training.scenes import read_scenes
from uknowpan.tiling.raster import usable_nodata

QUICK = ("--method", "bicubic", "--coregister", "off", "-j", 1, "-q")


# Memory -------------------------------------------------------------------------------------------


def raised_from(cause: BaseException, error: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


class OutOfMemoryError(RuntimeError):
    """torch's class has this name."""


class CPLE_OutOfMemoryError(Exception):
    """GDAL's class has this name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA"),
        CPLE_OutOfMemoryError("block"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("could not create a primitive"),
        RuntimeError("can't start new thread"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
        OSError("Can't read data (memory allocation failed for raw data chunk)"),
        OSError(12, "Cannot allocate memory"),
        raised_from(MemoryError(), InputError("a.tif cannot be read (truncated or corrupt?).")),
        raised_from(RuntimeError("can't allocate memory"), ModelError("the weights do not fit.")),
    ],
    ids=lambda error: f"{type(error).__name__} {error}"[:40],
)
def test_full_memory_is_one_exit_code(error: BaseException) -> None:
    """Kind: memory that is full ends with the code of another fault, by the library that reports it."""
    assert exit_code(error) == 6
    assert sentence(error).startswith("Memory ran out")


LIMITED = """
import resource, sys
import rasterio, scipy.ndimage, torch  # OpenBLAS never returns where its first threads get no memory
from uknowpan import registering, sharpening
from uknowpan.commands.main import main
held = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 24 * 2**20,) * 2)
main()
"""


def test_a_limit_of_memory(make_pair: MakePair, tmp_path: Path) -> None:
    """Kind: the same, in a process that may take no more memory."""
    pair = make_pair(ms_shape=(160, 160))
    words = ["sharpen", pair.pan, *pair.ms, "-o", str(tmp_path / "o.tif"), "--method", "gsa", "-q", "-j", "1"]
    command = [sys.executable, "-c", LIMITED, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:  # another version may need less
        assert done.returncode == 6 and done.stderr.startswith("uknowpan: error: Memory ran out"), done.stderr


# Streams and names --------------------------------------------------------------------------------


@pytest.mark.parametrize(("closed", "code"), [("0<&- 1>&- 2>&-", 0), ("2>&-", 3), ("2>/dev/full", 3)])
def test_closed_streams_change_no_exit_code(make_pair: MakePair, tmp_path: Path, closed: str, code: int) -> None:
    """Kind: a stream is closed, and the exit code is another, or a file gets messages as content."""
    pair, output = make_pair(ms_shape=(16, 16)), tmp_path / "o.tif"
    pan = pair.pan if code == 0 else tmp_path / "none.tif"
    words = f"{sys.executable} -m uknowpan sharpen {pan} {pair.ms[0]} -o {output} --method bicubic -j 1 -v {closed}"
    done = subprocess.run(["bash", "-c", words], capture_output=True)
    assert done.returncode == code, done.stderr
    if code == 0:
        with rasterio.open(output) as dataset:
            assert dataset.read().any()


NOT_UTF8 = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize("which", ["pan", "ms", "output", "model", "preview", "folder"])
def test_names_that_are_not_utf8(uknowpan: Run, make_pair: MakePair, tmp_path: Path, which: str) -> None:
    """Kind: a name of bytes that are not UTF-8 ends with a traceback."""
    pair = make_pair(ms_shape=(16, 16))
    pan, ms, output = pair.pan, pair.ms[0], str(tmp_path / "o.tif")
    odd = str(tmp_path / f"{NOT_UTF8}.tif")
    words: tuple[object, ...] = QUICK
    if which == "pan":
        os.rename(pan, odd)
        pan = odd
    elif which == "ms":
        os.rename(ms, odd)
        ms = odd
    elif which == "model":
        words = ("--model", write_tiny_model(tmp_path / f"{NOT_UTF8}.safetensors"), *QUICK[2:])
    elif which == "folder":
        (tmp_path / NOT_UTF8).mkdir()
        output = str(tmp_path / NOT_UTF8 / "o.tif")
    elif which == "preview":
        words = (*QUICK, "--preview", str(tmp_path / f"{NOT_UTF8}.png"))
    else:
        output = odd
    outcome = uknowpan("sharpen", pan, ms, "-o", output, *words)
    assert outcome.code in ((0, 5) if which == "model" else (2, 3)), outcome.stderr
    assert "Traceback" not in outcome.stderr and ("UTF-8" in outcome.stderr or outcome.code == 0)


@pytest.mark.parametrize("which", ["pan", "output", "folder", "model", "config"])
def test_loops_of_links(uknowpan: Run, make_pair: MakePair, tmp_path: Path, which: str) -> None:
    """Kind: a link that leads to itself."""
    pair, loop = make_pair(ms_shape=(16, 16)), tmp_path / "loop.tif"
    loop.symlink_to(loop)
    pan, output, more = pair.pan, tmp_path / "o.tif", QUICK
    if which == "config":
        outcome = uknowpan("train", "--data", pan, "--out", tmp_path / "run", "--config", loop)
        assert outcome.code == 2 and "internal" not in outcome.stderr
        return
    pan = loop if which == "pan" else pan
    output = {"output": loop, "folder": loop / "o.tif"}.get(which, output)
    more = ("--model", loop, *QUICK[2:]) if which == "model" else more
    outcome = uknowpan("sharpen", pan, *pair.ms, "-o", output, *more)
    assert outcome.code in ((0, 3) if which == "output" else (3, 5)), outcome.stderr
    assert "internal" not in outcome.stderr


@pytest.mark.parametrize("name", ["x.png", "x.jp2", "x.JPG", "x.vrt"])
def test_a_name_promises_its_format(uknowpan: Run, make_pair: MakePair, tmp_path: Path, name: str) -> None:
    """Kind: a GeoTIFF gets the name of another format."""
    pair = make_pair(ms_shape=(16, 16))
    command = ("sharpen", pair.pan, *pair.ms, *QUICK)
    uknowpan(*command, "-o", tmp_path / name).fails(2, "a GeoTIFF is written; name it .tif")
    if name == "x.png":
        uknowpan(*command, "-o", tmp_path / "o.tif", "--preview", tmp_path / "p.tif").fails(2, "name it .png")
        assert uknowpan(*command, "-o", tmp_path / "o.TIFF", "--preview", tmp_path / "p.PNG").code == 0


# Contents -----------------------------------------------------------------------------------------


def with_card(path: Path, text: str) -> Path:
    """A checkpoint with another card."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["__metadata__"]["card"] = text
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[start:])
    return path


@pytest.mark.parametrize("kind", ["card", "manifest", "config"])
def test_nested_files(uknowpan: Run, tmp_path: Path, kind: str) -> None:
    """Kind: JSON or TOML that is nested too deeply ends with a traceback."""
    deep = '{"a":' * 100_000
    path = tmp_path / {"card": "m.safetensors", "manifest": "m.jsonl", "config": "c.toml"}[kind]
    if kind == "card":
        with_card(write_tiny_model(path), deep)
        uknowpan("models", "show", path).fails(5, "nested too deeply")
    elif kind == "manifest":
        path.write_text(deep)
        uknowpan("batch", path, "-o", tmp_path / "out").fails(2, "nested too deeply")
    else:
        path.write_text("a = " + "[" * 100_000)
        uknowpan("train", "--data", path, "--out", tmp_path / "run", "--config", path).fails(2, "nested too deeply")


@pytest.mark.parametrize("name", ["peak_mb", "seconds", "code", "message", "megapixels", "id"])
@pytest.mark.parametrize("value", [{"a": 1}, [[]], "9" * 5000, 10**30, float("nan"), True])
def test_fields_of_a_report(uknowpan: Run, tmp_path: Path, name: str, value: object) -> None:
    """Kind: a field of the wrong type in a line of a report, which counts as torn."""
    line = {"id": "a", "status": "failed", "code": 3, "message": "m", "seconds": 1.0, "megapixels": 2.0, "peak_mb": 1}
    text = json.dumps(line | {"id": "b"}) + "\n" + json.dumps(line | {name: value}) + "\n"
    (tmp_path / "report.jsonl").write_text(text)
    done = uknowpan("batch", "--report", tmp_path)
    is_text = isinstance(value, str) and name in ("id", "message")
    assert done.code == 7 and f"scenes  {2 if is_text else 1}: " in done.stdout


@pytest.mark.parametrize(
    "change", [{"variance_floor": [[]]}, {"variance_floor": "x"}, {"highpass_pan": 1}, {"width": 4.5}]
)
def test_a_config_of_other_types(change: dict[str, object]) -> None:
    """Kind: a field of the wrong type in a card's config, which shows only where the network runs."""
    card = Card("p", "prior", asdict(PriorConfig(4, width=4, blocks=1)) | change, "prior", bands=4, ratios=[4])
    with pytest.raises(CheckpointError, match="config does not fit"):
        build_network(card)


@pytest.mark.parametrize("change", [{"blocks": 10**6}, {"width": 10**9}, {"blocks": "x"}, {"width": []}])
def test_a_card_larger_than_its_weights(tmp_path: Path, change: dict[str, object]) -> None:
    """Kind: a small file describes a network that fills the memory."""
    path = write_tiny_model(tmp_path / "m.safetensors")
    data = path.read_bytes()
    card = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["card"])
    card["config"] |= change
    with pytest.raises(CheckpointError, match="config does not fit"):
        load_model(with_card(path, json.dumps(card)))


@pytest.mark.parametrize("field", ["name", "architecture", "ratios", "training", "residual_std", "stage"])
def test_fields_of_a_card(uknowpan: Run, tmp_path: Path, field: str) -> None:
    """Kind: a field of the wrong type."""
    path = write_tiny_model(tmp_path / "m.safetensors")
    data = path.read_bytes()
    card = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["card"])
    for value in ({"a": 1}, [{}], 3):
        if not isinstance(value, type(card[field])) or field != "training":
            with_card(path, json.dumps(card | {field: value}))
            uknowpan("models", "verify", path).fails(5)


@pytest.mark.parametrize("line", ["blocks = 2147483647", "width = 2147483647"])
def test_a_configuration_beyond_all_measure(uknowpan: Run, tmp_path: Path, line: str) -> None:
    """Kind: a number in a configuration describes a network that takes hours, or all memory, to build."""
    config = tmp_path / "c.toml"
    config.write_text(f"[network]\n{line}\n")
    command = (
        "train",
        "--data",
        scenes_file(tmp_path / "s.h5"),
        "--out",
        tmp_path / "run",
        "--config",
        config,
        "--dry-run",
    )
    uknowpan(*command).fails(2, "there is no such network")


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_values_that_nothing_can_be_learned_from(tmp_path: Path, value: float) -> None:
    """Kind: a scene for training whose squares overflow."""
    path = scenes_file(tmp_path / "s.h5")
    with h5py.File(path, "r+") as file:
        del file["a/gt"]
        file["a/gt"] = np.full((1, 8, 8), value, "f4")
    with pytest.raises(DataError, match="not finite, or beyond"):
        read_scenes(path, "train")


def test_a_message_that_is_not_utf8(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Kind: GDAL quotes bytes of a damaged file, which rasterio cannot read."""
    path = tmp_path / "a.vrt"
    path.write_bytes(b'<VRTDataset rasterXSize="8\xff\xff" rasterYSize="8"><\xff</VRTDataset>')
    outcome = uknowpan("info", make_pair(ms_shape=(16, 16)).pan, path)
    outcome.fails(3, "cannot be opened")


def test_a_small_file_that_declares_much(tmp_path: Path) -> None:
    """Kind: an HDF5 file of some kilobytes declares terabytes."""
    path = tmp_path / "s.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("a")
        group.attrs.update(sensor="s", licence="l", split="train", weight=1.0)
        group.create_dataset("gt", (4, 10**6, 10**6), "u2", chunks=(1, 64, 64))
        for name, shape in {"pan": (10**9, 1, 8, 8), "ms": (10**9, 4, 2, 2), "lms": (10**9, 4, 8, 8)}.items():
            file.create_dataset(name, shape, "f4", chunks=(1, *shape[1:]))
    with pytest.raises(DataError, match="declares 8e\\+03 GB, but only 0 bytes"):
        read_scenes(path, "train")
    with pytest.raises(DataError, match="declares"):
        PanCollectionFile(path)


def scenes_file(path: Path, weight: float = 1.0) -> Path:
    """A scenes file with a small truth for training."""
    with h5py.File(path, "w") as file:
        group = file.create_group("a")
        group.attrs.update(sensor="s", licence="l", split="train", weight=weight)
        group["gt"] = np.ones((1, 8, 8), "u2")
    return path


@pytest.mark.parametrize("weight", ["nan", "inf", "0", "-1"])
def test_weights_of_a_recipe(uknowpan: Run, tmp_path: Path, weight: str) -> None:
    """Kind: a weight with which nothing can be drawn."""
    recipe = tmp_path / "r.csv"
    recipe.write_text(f"name,kind,pan,ms,sensor,licence,split,weight\na,ms,,a.tif,s,l,train,{weight}\n")
    uknowpan("pack", recipe, "--root", tmp_path, "-o", tmp_path / "o.h5").fails(3, "not a number above 0")
    with pytest.raises(DataError, match="not a number above 0"):
        read_scenes(scenes_file(tmp_path / "s.h5", float(weight)), "train")


def test_a_file_of_a_recipe_with_a_null_character(uknowpan: Run, tmp_path: Path) -> None:
    """Kind: a name that no file can have."""
    recipe = tmp_path / "r.csv"
    recipe.write_text("name,kind,pan,ms,sensor,licence,split,weight\na,ms,,a\0.tif,s,l,train,1\n")
    uknowpan("pack", recipe, "--root", tmp_path, "-o", tmp_path / "o.h5").fails(3, "null character")


def test_a_scene_with_a_slash(uknowpan: Run, tmp_path: Path) -> None:
    """Kind: a scene becomes a folder in the file, and is lost."""
    recipe = tmp_path / "r.csv"
    recipe.write_text("name,kind,pan,ms,sensor,licence,split,weight\na/b,ms,,a.tif,s,l,train,1\n")
    uknowpan("pack", recipe, "--root", tmp_path, "-o", tmp_path / "o.h5").fails(3, "cannot name a scene")


def test_a_nodata_that_the_output_cannot_hold(uknowpan: Run, make_pair: MakePair, tmp_path: Path) -> None:
    """Kind: a nodata of float64 becomes infinite in float32, after the whole scene was computed."""
    lowest = float(np.finfo(np.float64).min)
    pair = make_pair(ms_shape=(16, 16), dtype="float64", nodata=lowest, holes=np.eye(16, dtype=bool))
    command = ("sharpen", pair.pan, *pair.ms, "-o", tmp_path / "o.tif", "--output-dtype", "float32", *QUICK)
    assert uknowpan(*command).code == 0
    with rasterio.open(tmp_path / "o.tif") as dataset:
        assert np.isnan(dataset.nodata)
        values, valid = dataset.read(), dataset.dataset_mask() > 0
    assert np.isfinite(values[:, valid]).all() and 0.9 < valid.mean() < 1
    uknowpan(*command, "--nodata", repr(lowest), "--overwrite").fails(3, "does not fit into float32")
    assert usable_nodata(-3.40282347e38, "float32") == -3.40282347e38


def test_blocks_larger_than_memory(uknowpan: Run, tmp_path: Path) -> None:
    """Kind: a file of some kilobytes declares 1e6 x 1e6 pixels, in blocks of 8192 x 8192."""
    for name, side, step in (("pan", 10**6, 1), ("ms", 250_000, 4)):
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", driver="GTiff", width=side, height=side, count=1, dtype="uint16", crs=UTM,
            transform=Affine(step, 0, 0, 0, -step, 0.5), tiled=True, blockxsize=8192, blockysize=8192,
            SPARSE_OK=True, compress="deflate",
        ):  # fmt: skip
            pass
    command = ("sharpen", tmp_path / "pan.tif", tmp_path / "ms.tif", "-o", tmp_path / "o.tif", *QUICK)
    uknowpan(*command, "--max-memory", 0.2).fails(6, "more than the .*--max-memory")


def test_a_damaged_table_of_an_h5(uknowpan: Run, tmp_path: Path) -> None:
    """Kind: HDF5 fails over a damaged header, in a class of its own."""
    path = scenes_file(tmp_path / "s.h5")
    path.write_bytes(path.read_bytes().replace(b"SNOD", b"XNOD"))  # the symbol table
    uknowpan("train", "--data", path, "--out", tmp_path / "run", "--device", "cpu").fails(3, "is damaged")
    patches = write_images(tmp_path / "e.h5", size=32, count=1)
    patches.write_bytes(patches.read_bytes().replace(b"SNOD", b"XNOD"))
    uknowpan("evaluate", patches, "--method", "gsa").fails(3, "is damaged")
