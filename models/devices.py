"""Settings of CPU and GPU for this process."""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DRIVEN = ("nvidia*", "nvhost*", "nvgpu*", "kfd", "dxg")
"""Devices in /dev of NVIDIA's drivers (nvhost, nvgpu: Jetson), AMD's, and of Windows beneath a Linux."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc

_caller = threading.local()


def thread_count(threads: int | None = None) -> int:
    """Threads to use: as many as given, else `OMP_NUM_THREADS`, else one for each core that the process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return threads or (int(wanted) if wanted.isdigit() and int(wanted) > 0 else usable_cores())


def has_torch() -> bool:
    """Whether PyTorch is installed; looking for it takes no import."""
    return find_spec("torch") is not None


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; the host does not wait for what the device has to do."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def may_have_gpu() -> bool:
    """Whether PyTorch may see a GPU. Its import takes seconds: on Linux a driver without devices needs none."""
    if "torch" in sys.modules:
        return True
    hidden = any(os.environ.get(name) in ("", "-1") for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"))
    driven = sys.platform != "linux" or any(next(Path("/dev").glob(name), None) for name in _DRIVEN)
    return driven and not hidden and has_torch()


def gpu_count() -> int:
    """GPUs that PyTorch sees; 0 where it is not installed."""
    if not may_have_gpu():
        return 0
    import torch

    return torch.cuda.device_count()


def tune_cpu(threads: int | None = None) -> int:
    """Set torch's threads, see `thread_count`, flush denormals, and `keep_memory`; return the number of threads.

    Denormals made published networks of this kind ten times slower.
    """
    import torch

    count = thread_count(threads)
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)
    keep_memory()
    return count


def share_cores(threads: int) -> int:
    """Let PyTorch, where it is in use, take so many threads for the calling one and new ones; their number before."""
    torch = sys.modules.get("torch")
    before = threads if torch is None else int(torch.get_num_threads())
    if torch is not None:
        torch.set_num_threads(threads)
    return before


def take_share(threads: int) -> None:
    """Make so many the threads that work of the calling one may take."""
    _caller.threads = threads
    share_cores(threads)


def share_of_caller(threads: int) -> int:
    """Threads that work of the calling one may take; those given, unless it took a share."""
    share: int = getattr(_caller, "threads", threads)
    return share


def keep_memory() -> None:
    """Keep freed memory in the process, in one arena for all threads.

    By default glibc returns every freed large array to the system; fetching the pages anew took five times as long
    as an element-wise operation.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_M_ARENA_MAX, 1)  # others return large blocks
    except (OSError, AttributeError):
        pass  # another C library: slower, not wrong


def tune_gpu() -> None:
    """Let cuDNN choose its fastest convolutions, as all tiles have one shape, in true float32.

    By default convolutions round their inputs to 10 bits (TF32).
    """
    import torch

    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False


def free_memory(device: str) -> int | None:
    """Bytes that are free on a GPU; None: not a GPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


def machine_memory() -> int | None:
    """Bytes of memory that this process may ever have; None: unknown."""
    try:
        held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return held
    return min(held, int(allowed)) if allowed.isdigit() else held


def peak_mb() -> float:
    """MB that this process has taken at most; 0: unknown."""
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match is not None:
            return round(int(match[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        return os.cpu_count() or 1
