"""How this process uses CPU and GPU."""

from __future__ import annotations

import ctypes
import os

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


def tune_cpu(threads: int | None = None) -> int:
    """Set torch's threads, flush denormals, and keep freed memory in the process.

    Denormals made published networks of this kind ten times slower. By default glibc gives every
    large tensor back to the system as soon as it is freed; fetching the pages anew took five
    times as long as an element-wise operation itself.

    Args:
        threads: how many; None: one for each core that the process may use.

    Returns:
        The number of threads.
    """
    count = threads or usable_cores()
    torch.set_num_threads(count)
    torch.set_flush_denormal(True)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
    except (OSError, AttributeError):
        pass  # another C library: slower, not wrong
    return count


def tune_gpu() -> None:
    """Let cuDNN look for its fastest convolutions, all tiles being of one shape, and keep float32
    what it says: by default convolutions round their inputs to 10 bits (TF32)."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False


def free_memory(device: str) -> int | None:
    """Bytes that are free on a GPU; None: not a GPU."""
    if not device.startswith("cuda"):
        return None
    return int(torch.cuda.mem_get_info(device)[0])


def usable_cores() -> int:
    """Cores that this process may use, where the system says; else all."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux says what this process may use
        return os.cpu_count() or 1
