"""Normal noise as a function of (seed, absolute position, band): a counter, not a stream.

A tile's noise does not depend on how the scene was cut, and is the same on every device: the
generator is integer arithmetic and a look-up in one table.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_TABLE_BITS = 16


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= (1 << 63) else value


_MIX_1, _MIX_2 = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)
_KEYS = tuple(_signed(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9))


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (unsigned) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


@lru_cache(maxsize=1)
def _normal_table() -> Tensor:
    """Quantiles of N(0, 1) at the middle of 2^16 equal probabilities, to unit variance."""
    p = (torch.arange(1 << _TABLE_BITS, dtype=torch.float64) + 0.5) / (1 << _TABLE_BITS)
    q = torch.special.ndtri(p)
    return (q / q.square().mean().sqrt()).float()


def position_noise(
    seed: int,
    row: int,
    col: int,
    height: int,
    width: int,
    bands: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise of a window.

    Args:
        seed: any integer of 64 bits.
        row: first row of the window in the scene's frame (may be negative).
        col: first column.
        height: rows.
        width: columns.
        bands: how many bands, numbered from 0.
        device: where the noise is made.

    Returns:
        (bands, height, width) float32.
    """
    keys = torch.tensor(_KEYS, dtype=torch.int64, device=device)
    y = torch.arange(row, row + height, dtype=torch.int64, device=device)
    x = torch.arange(col, col + width, dtype=torch.int64, device=device)
    b = torch.arange(bands, dtype=torch.int64, device=device)
    start = _mix(torch.tensor(_signed(seed % (1 << 64)), device=device) + keys[0])
    per_band = _mix(start + (b + 1) * keys[1])
    per_row = _mix(per_band[:, None] + y[None, :] * keys[2])
    bits = _mix(per_row[:, :, None] ^ _mix(x * keys[0] + keys[1])[None, None, :])
    return _normal_table().to(device)[_shift_right(bits, 64 - _TABLE_BITS)]
