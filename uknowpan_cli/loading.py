"""A sharpener on its device, by the options of a model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from uknowpan.errors import OutOfMemory, UsageError, is_out_of_memory
from uknowpan.models.checkpoints import DEFAULT_MODEL
from uknowpan.models.devices import free_memory, has_torch, keep_memory, may_have_gpu, thread_count, tune_cpu, tune_gpu
from uknowpan.models.sharpeners import Sharpener, load_sharpener
from uknowpan.options import SharpenOptions

log = logging.getLogger("uknowpan")

LARGEST_BATCH = 64
"""Default limit of tiles at once on a GPU; larger batches bring nothing."""
SHARE_OF_MEMORY = 0.6
"""Share of a GPU's free memory that a batch may take."""


def load_for(options: SharpenOptions) -> Sharpener:
    """The sharpener of these options, on its device.

    Raises:
        UsageError: the device or the number of steps does not exist.
        ModelError: no such model, or its file is damaged.
    """
    if options.method is not None:
        keep_memory()
        idle = {
            "--seed": options.seed != 0,
            "--softness": options.softness is not None,
            "--dtype": options.dtype != "fp32",
            "--device": options.device not in ("auto", "cpu"),
            "--engine": options.engine != "auto",
        }
        for flag, given in idle.items():
            if given:
                log.warning("%s changes nothing for --method %s", flag, options.method)
        if idle["--device"]:
            choose_device(options.device)  # whether there is one
        weights: Any = options.weights
        return load_sharpener(None, options.method, weights=weights, consistency=options.consistency)
    own = _of_onnx(options) if _engine(options) == "onnx" else _of_torch(options)
    try:
        return load_sharpener(
            None if options.model is None else str(options.model),
            softness=options.softness,
            consistency=options.consistency,
            steps=options.steps,
            **own,
        )
    except ValueError as error:
        if options.steps is None:
            raise
        raise UsageError(f"--steps: {error}.") from error


def _engine(options: SharpenOptions) -> str:
    """The library that runs the network; `auto` is ONNX Runtime where PyTorch would do the same on the CPU."""
    if options.engine != "auto":
        return options.engine
    if not has_torch():
        return "onnx"
    if options.dtype != "fp32" or options.device not in ("auto", "cpu") or find_spec("onnxruntime") is None:
        return "torch"
    from uknowpan.models.onnx.sharpener import serves

    served = serves(DEFAULT_MODEL if options.model is None else str(options.model), options.steps)
    return "onnx" if served and choose_device(options.device) == "cpu" else "torch"


def _of_torch(options: SharpenOptions) -> dict[str, Any]:
    """PyTorch's own options of a network, and its set-up for this process.

    Raises:
        UsageError: it is not installed.
    """
    if not has_torch():
        raise UsageError("--engine torch: PyTorch is not installed; `pip install torch` brings it.")
    import torch

    tune_cpu(options.num_threads)
    dtype = torch.bfloat16 if options.dtype == "bf16" else torch.float32
    return {"seed": options.seed, "device": choose_device(options.device), "dtype": dtype}


def _of_onnx(options: SharpenOptions) -> dict[str, Any]:
    """ONNX Runtime's own options of a network, and the set-up of this process.

    Raises:
        UsageError: it cannot do what is asked.
    """
    if options.dtype != "fp32" or options.device not in ("auto", "cpu"):
        raise UsageError("--engine onnx computes in fp32 on the CPU; leave out --dtype and --device.")
    keep_memory()
    return {"engine": "onnx", "threads": thread_count(options.num_threads)}


@lru_cache(maxsize=1)
def load_once(of_model: tuple[tuple[str, Any], ...]) -> Sharpener:
    """The sharpener of `SharpenOptions.of_model`, loaded once in a process."""
    return load_for(SharpenOptions(**dict(of_model)))


@contextmanager
def memory_watched(remedy: str) -> Iterator[None]:
    """Turn exhausted memory into one sentence: "Memory ran out" and the remedy."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"Memory ran out {remedy}") from error


def tiles_at_once(device: str, tile_bytes: int) -> int:
    """Default batch: as many tiles as fit into the GPU's free memory, 1 on a CPU."""
    free = free_memory(device)
    if free is None:
        return 1
    return min(max(int(SHARE_OF_MEMORY * free / tile_bytes), 1), LARGEST_BATCH)


def choose_device(name: str) -> str:
    """The device of that name; `auto` is the GPU where there is one. A GPU is set up for this process.

    Raises:
        UsageError: the name is unknown or PyTorch has no such device.
    """
    if name == "cpu" or (name == "auto" and not may_have_gpu()):
        return "cpu"
    if not has_torch():
        raise UsageError(f"--device {name} needs PyTorch, which is not installed; `pip install torch` brings it.")
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device takes auto, cpu, cuda or cuda:N, not {name!r}.")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device {name}: PyTorch sees {count} CUDA devices here.")
    if device.type == "cuda":
        tune_gpu()
    return name
