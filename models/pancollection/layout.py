"""Arrays of HDF5 and MATLAB files as images (N, C, H, W), whatever the order of their axes.

MATLAB stores the first axis fastest. So HDF5 files of MATLAB 7.3 hold every array with its axes reversed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from uknowpan.models.errors import DataError

ORDERS = ("NCHW", "NHWC", "HWCN")
"""Orders of the axes, the published one first; MATLAB drops a last axis of one image."""
TOOLBOX_NAMES = {"I_PAN": "pan", "I_MS_LR": "ms", "I_MS": "lms", "I_GT": "gt"}
"""Names of the DLPan-Toolbox's scenes -> those of PanCollection."""


@dataclass(frozen=True)
class Stack:
    """An array as (N, C, H, W); images are read one by one."""

    data: Any
    """HDF5 dataset or NumPy array."""
    axes: str
    """Letters of its axes; N and C may be missing where they are 1."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        sizes = dict(zip(self.axes, self.data.shape, strict=True))
        return tuple(sizes.get(axis, 1) for axis in "NCHW")

    def __getitem__(self, index: int) -> np.ndarray:
        """The image (C, H, W) of a number."""
        chosen = tuple(index if axis == "N" else slice(None) for axis in self.axes)
        image = np.asarray(self.data[chosen])
        left = self.axes.replace("N", "")
        image = image.transpose([left.index(axis) for axis in "CHW" if axis in left])
        return image if "C" in left else image[None]


class MatlabFile(dict[str, Any]):
    """The arrays of a MATLAB file up to version 7.2, read as a whole; has the `attrs` and `close` of HDF5 files."""

    def __init__(self, path: str):
        from scipy.io import loadmat

        try:
            found = loadmat(path, variable_names=[*TOOLBOX_NAMES.values(), *TOOLBOX_NAMES])
        except MemoryError:
            raise
        except Exception as error:  # of a damaged file: errors of zlib, struct and SciPy's own
            raise DataError(f"{path} is no MATLAB file that can be read ({error}); get the file anew.") from error
        super().__init__({name: value for name, value in found.items() if isinstance(value, np.ndarray)})
        self.attrs: dict[str, Any] = {}

    def close(self) -> None:
        """Let the arrays go."""
        self.clear()


def named(file: Any) -> dict[str, Any]:
    """The arrays of a file under PanCollection's names: those of HDF5 datasets, or of a `MatlabFile`."""
    arrays = {TOOLBOX_NAMES.get(name, name): file[name] for name in file}
    return {name: array for name, array in arrays.items() if hasattr(array, "dtype") and hasattr(array, "shape")}


def arranged(arrays: Mapping[str, Any], check: Callable[[dict[str, tuple[int, ...]]], None]) -> dict[str, Stack]:
    """The arrays as stacks of images, in the first order of `ORDERS` that serves all of them.

    Args:
        arrays: by name; pan may lack its axis of one band, all may lack that of one image.
        check: raises DataError where shapes (N, C, H, W) do not fit each other.

    Raises:
        DataError: no order serves; the text is that of the published order.
    """
    refusals = []
    for stacks in _candidates(arrays):
        try:
            check({name: stack.shape for name, stack in stacks.items()})
            return stacks
        except DataError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]
    name = next(name for name, array in arrays.items() if len(array.shape) != 4)
    shape = tuple(arrays[name].shape)
    raise DataError(f"{name} has {len(shape)} axes {shape}, not the 4 of (N, C, H, W)")


def _candidates(arrays: Mapping[str, Any]) -> Iterator[dict[str, Stack]]:
    for order in ORDERS:
        for axes in (order, order.replace("N", "")):
            stacks = {}
            for name, array in arrays.items():
                own = axes.replace("C", "") if name == "pan" and array.ndim == len(axes) - 1 else axes
                if len(own) == array.ndim:
                    stacks[name] = Stack(array, own[::-1] if _is_reversed(array) else own)
            if len(stacks) == len(arrays):
                yield stacks


def _is_reversed(array: Any) -> bool:
    """Whether MATLAB 7.3 wrote a dataset."""
    return "MATLAB_class" in getattr(array, "attrs", ())


def is_old_matlab(path: str | os.PathLike[str]) -> bool:
    """Whether a file is named .mat and is no HDF5."""
    import h5py

    return str(path).lower().endswith(".mat") and os.path.isfile(path) and not h5py.is_hdf5(path)
