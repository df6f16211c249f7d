"""What `bench.py` runs in processes of their own.

    python bench_inside.py run TOLD.json sharpen PAN MS -o OUT ...
    python bench_inside.py profile TOLD.json sharpen PAN MS -o OUT ...
    python bench_inside.py alone TOLD.json '{"device": "cpu", ...}'

`run` and `profile` do what `uknowpan` does, and tell more than it in TOLD.json; `alone` sharpens
one batch in memory again and again.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

RATIO, BANDS = 4, 4
ALONE_SECONDS, ALONE_CALLS = 2.0, 3
"""`alone` goes on for at least so long and so often."""
PROFILED = range(1, 4)
"""Calls of the network that are looked at operator by operator; the first one warms up."""

NORMALISATION = ("norm", "moments", "var_mean", "rsqrt")
KINDS = {
    "convolutions": ("conv",),
    "normalisation": NORMALISATION,
    "copying and layout": ("copy", "cat", "contiguous", "clone", "pad", "shuffle", "stack", "to"),
    "element by element": ("mul", "add", "sub", "div", "silu", "sigmoid", "exp", "clamp", "pow"),
}
"""Kind of operator -> parts of its name, the first that fits; all others are "other"."""


def device_mb() -> float | None:
    """Peak of what torch has allocated on the GPU; None: there was none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return torch.cuda.max_memory_allocated() / 2**20


def synchronise() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def sharpen(words: list[str]) -> None:
    """The command line, in this process; failing, it exits as that does."""
    from uknowpan.commands.main import main

    sys.argv = ["uknowpan", *words]
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise


# Profile ------------------------------------------------------------------------------------------


class Clock:
    """Seconds by part; what a part calls counts there and no longer here."""

    def __init__(self) -> None:
        self.main: dict[str, float] = {}
        self.beside: dict[str, float] = {}
        """In other threads than the main one."""
        self._inner = threading.local()

    @contextmanager
    def part(self, name: str) -> Any:
        outer = getattr(self._inner, "seconds", 0.0)
        self._inner.seconds = 0.0
        began = time.monotonic()
        try:
            yield
        finally:
            whole = time.monotonic() - began
            main = threading.current_thread() is threading.main_thread()
            table = self.main if main else self.beside
            table[name] = table.get(name, 0.0) + whole - self._inner.seconds
            self._inner.seconds = outer + whole

    def wrap(self, owner: Any, attribute: str, name: str, *, device: bool = False) -> None:
        """Count the calls of owner.attribute; with `device` until the GPU has done its part."""
        inner = getattr(owner, attribute)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                result = inner(*args, **kwargs)
                if device:
                    synchronise()
                return result

        setattr(owner, attribute, timed)


class Operators:
    """Looks into some calls of the network with torch.profiler."""

    def __init__(self) -> None:
        self.calls = 0
        self.by_name: dict[str, float] = {}

    def wrap(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(inner)
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            with self._profiler() if self.calls - 1 in PROFILED else nullcontext() as profiler:
                result = inner(*args, **kwargs)
                synchronise()
            if profiler is not None:
                self._count(profiler)
            return result

        return watched

    @staticmethod
    def _profiler() -> Any:
        import torch
        from torch.profiler import ProfilerActivity, profile

        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_initialized() else []
        return profile(activities=[ProfilerActivity.CPU, *cuda], acc_events=True)

    def _count(self, profiler: Any) -> None:
        events = profiler.key_averages()
        device = sum(event.self_device_time_total for event in events)
        for event in events:
            own = event.self_device_time_total if device else event.self_cpu_time_total
            # Kernels appear beside the operators that started them.
            if own and event.key.startswith(("aten::", "mkldnn")):
                self.by_name[event.key] = self.by_name.get(event.key, 0.0) + own / 1e6

    def by_kind(self) -> dict[str, float]:
        """Shares of the network's time."""
        whole = sum(self.by_name.values())
        found: dict[str, float] = {}
        for name, seconds in self.by_name.items():
            kind = kind_of(name)
            found[kind] = found.get(kind, 0.0) + seconds / whole
        return found


def kind_of(operator: str) -> str:
    name = operator.partition("::")[2].strip("_") or operator
    for kind, parts in KINDS.items():
        if any(name == part or (len(part) > 2 and part in name) for part in parts):
            return kind
    return "other"


def profile_run(words: list[str], began: float) -> dict[str, Any]:
    """Where the time of one run goes, by part."""
    from concurrent.futures import Future

    import torch  # noqa: F401 - its import is part of the start

    from uknowpan import sharpening as pipeline
    from uknowpan.models import sharpeners as pansharpener
    from uknowpan.tiling import ScenePair, SceneWriter, StripBlender, StripStore

    clock, operators = Clock(), Operators()
    started = time.time() - began
    pansharpener.ddim_sample = operators.wrap(pansharpener.ddim_sample)
    clock.wrap(pansharpener, "load_sharpener", "loading the model")
    clock.wrap(pipeline, "survey", "survey, without reading")
    clock.wrap(ScenePair, "read_frame", "reading")
    clock.wrap(ScenePair, "is_empty", "reading")
    clock.wrap(ScenePair, "valid_fraction", "reading")
    clock.wrap(Future, "result", "waiting for the reader")
    clock.wrap(pansharpener, "generic_condition", "features of the network's input", device=True)
    clock.wrap(pansharpener, "position_noise", "noise", device=True)
    clock.wrap(pansharpener, "ddim_sample", "network", device=True)
    clock.wrap(StripBlender, "add_row", "blending")
    clock.wrap(pipeline, "encode", "encoding")
    clock.wrap(StripStore, "put", "keeping strips")
    clock.wrap(StripStore, "assemble", "reading strips, compressing")
    clock.wrap(SceneWriter, "close", "closing the file")
    clock.wrap(SceneWriter, "_verify", "reading the file back")
    sharpen(words)
    whole = time.time() - began
    parts = {"start and imports": started, **clock.main}
    parts["rest"] = whole - sum(parts.values())
    return {
        "seconds": whole,
        "parts": parts,
        "beside": clock.beside,
        "network": operators.by_kind(),
        "operators": dict(sorted(operators.by_name.items(), key=lambda pair: -pair[1])[:12]),
    }


# Network alone ------------------------------------------------------------------------------------


def alone(setting: dict[str, Any]) -> dict[str, Any]:
    """Mpx of PAN per second of a sharpener with batches that are in memory."""
    import torch

    from uknowpan.models.statistics import scene_statistics
    from uknowpan.scene_job import MethodRequest
    from uknowpan.sharpening import FLOATS_PER_PIXEL

    loaded = MethodRequest(steps=setting["steps"], device=setting["device"], dtype=setting["dtype"]).load(
        setting["threads"]
    )
    sharpener, tile = loaded.sharpener, setting["tile"] // RATIO * RATIO
    window = (tile + 200) ** 2  # with its margin, about
    batch = setting["batch"] or loaded.batch_size(window * BANDS * FLOATS_PER_PIXEL * 4)
    generator = torch.Generator().manual_seed(0)
    pan = torch.rand(1, tile + 512, tile + 512, generator=generator)
    ms = torch.nn.functional.avg_pool2d(pan, RATIO).repeat(BANDS, 1, 1)
    statistics = scene_statistics([(pan, ms)], RATIO)
    side = tile // RATIO + 2 * sharpener.margin(statistics)
    if side * RATIO > pan.shape[-1]:
        raise SystemExit(f"a margin of {sharpener.margin(statistics)} MS pixels is too much")
    pans = pan[None, :, : side * RATIO, : side * RATIO].repeat(batch, 1, 1, 1).to(loaded.device)
    mss = ms[None, :, :side, :side].repeat(batch, 1, 1, 1).to(loaded.device)

    def once() -> None:
        sharpener.sharpen(pans, mss, statistics, [(0, 0)] * batch)
        synchronise()

    for _ in range(2 if loaded.device != "cpu" else 1):
        once()
    calls, began = 0, time.monotonic()
    while calls < ALONE_CALLS or time.monotonic() - began < ALONE_SECONDS:
        once()
        calls += 1
    seconds = time.monotonic() - began
    return {"mpx_per_second": calls * batch * tile**2 / 1e6 / seconds, "batch": batch}


def main() -> None:
    what, told, *words = sys.argv[1:]
    found: dict[str, Any] = {}
    if what == "alone":
        found = alone(json.loads(words[0]))
    elif what == "profile":
        found = profile_run(words, float(os.environ["BENCH_BEGAN"]))
    else:
        sharpen(words)
    Path(told).write_text(json.dumps(found | {"device_mb": device_mb()}))


if __name__ == "__main__":
    main()
