"""How this process uses the CPU."""

from __future__ import annotations

import ctypes
import os

import torch

__all__ = ["tune_cpu", "usable_cores"]

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


def usable_cores() -> int:
    """Cores that this process may use, where the system says; else all."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux says what this process may use
        return os.cpu_count() or 1
