"""PanCollection's files: layout, checks and random access to samples.

A file, HDF5 or MATLAB's, holds ``ms`` (N, C, h, w), ``pan`` (N, 1, H, W), ``lms`` (N, C, H, W) and, at reduced
resolution, the truth ``gt`` (N, C, H, W), all in digital numbers (DN), with H = ratio * h.
Samples are read one by one: a file may be larger than memory.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from uknowpan.models.checkpoints import Card
from uknowpan.models.errors import DataError, ModelMismatch
from uknowpan.models.metrics.sensors import sensor_in_name
from uknowpan.models.pancollection.layout import MatlabFile, Stack, arranged, is_old_matlab, named
from uknowpan.models.training.bounds import is_full_scale
from uknowpan.models.types import PatchBatch

KEYS = ("pan", "ms", "lms")
IMAGES = (*KEYS, "gt")
PROBES = 8
"""Samples that are read when a file is opened."""
REGISTRATIONS = ("area", "pancollection")
DAMAGE = (OSError, RuntimeError, LookupError, TypeError, ValueError)
"""Errors that h5py raises where a file is damaged."""
ABOVE = 1.05
"""Share of full scale that filtered images may reach: interpolation overshoots."""
CHUNK_CACHE = 4 * 2**20
"""Bytes of HDF5 chunks kept per dataset and process; samples are drawn at random, so few help."""


@dataclass(frozen=True)
class PanCollectionHeader:
    """Shape and attributes of a file."""

    count: int
    bands: int
    ratio: int
    height: int
    """PAN pixels; LMS and truth are as high."""
    width: int
    has_gt: bool
    max_value: float | None
    """Full scale in DN; None where the file declares none."""
    sensor: str | None
    by_name: bool
    """Sensor and full scale are not declared, but those of the sensor that the file's name holds, as in `_wv3_`."""
    registration: str
    """"pancollection" or "area", see `protocol.registration_of`."""


def check_serves(card: Card, bands: int | None, multiple: int, header: PanCollectionHeader, path: str) -> None:
    """Refuse a file whose images a network cannot take.

    Args:
        card: the network's card.
        bands: C that the network takes; None: any number.
        multiple: divides the heights and widths that the network takes.
        header: the file's.
        path: the file's name in a message.

    Raises:
        ModelMismatch: other bands, another ratio, or a size that does not divide.
    """
    if bands is not None and bands != header.bands:
        raise ModelMismatch(
            f"model {card.name} was trained for {bands} bands, but {path} holds {header.bands}; use one that was "
            "trained on such data."
        )
    if header.ratio not in card.ratios:
        raise ModelMismatch(
            f"model {card.name} serves the ratio {', '.join(map(str, card.ratios))}, but that of {path} is "
            f"{header.ratio}; use one that was trained on such data."
        )
    if header.height % multiple or header.width % multiple:
        raise ModelMismatch(
            f"model {card.name} takes multiples of {multiple} pixels, but the images of {path} have {header.height} x "
            f"{header.width}; cut them anew."
        )


class HDF5Reader:
    """An HDF5 file of samples that every process opens for itself at its first read."""

    def __init__(self, path: str | Path):
        self.path = str(path)
        self._handle: Any = None
        self._owner = -1

    def close(self) -> None:
        """Let go of the file; the next read opens it again."""
        if self._handle is not None and self._owner == os.getpid():
            self._handle.close()
        self._handle = None

    def _file(self) -> Any:
        if self._handle is None or self._owner != os.getpid():
            self._handle, self._owner = self._open(), os.getpid()
        return self._handle

    def _open(self) -> Any:
        """The file as a mapping of names to arrays that are read by the number of a sample."""
        return _opened(self.path)

    def _samples(self, names: Iterable[str], indices: Sequence[int], count: int, remedy: str) -> dict[str, np.ndarray]:
        """The samples `indices` of several datasets (N, C, H, W) of `count` samples.

        Raises:
            DataError: a sample is damaged, or holds values that are not finite; `remedy` ends its text.
            IndexError: no such sample.
        """
        for index in indices:
            if not 0 <= index < count:
                raise IndexError(f"{self.path} holds samples 0 to {count - 1}, not {index}")
        file = self._file()
        try:
            stacks = {name: np.stack([np.asarray(file[name][index]) for index in indices]) for name in names}
        except DAMAGE as error:
            raise DataError(
                f"{self.path} is damaged, samples {list(indices)} cannot be read ({error}); get the file anew."
            ) from error
        for name, values in stacks.items():
            bad = ~np.isfinite(values).all((1, 2, 3))
            if bad.any():
                sample = indices[int(bad.argmax())]
                raise DataError(f"{self.path}: {name} of sample {sample} holds NaN or infinite values; {remedy}.")
        return stacks

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PanCollectionFile(HDF5Reader):
    """Random access to the samples of a file.

    Opening checks the header and reads `PROBES` samples.

    Args:
        path: the file; entries outside the layout are ignored.
        needs_gt: refuse a file without truth.

    Attributes:
        header: shape and attributes.
        sources: (N,) int64, the number of the scene that each sample was cut from; 0 where the
            file does not declare it.
        largest: DN of PAN, MS and truth in the probes.

    Raises:
        DataError: the file is no HDF5, truncated, or of another layout.
    """

    def __init__(self, path: str | Path, *, needs_gt: bool = False):
        super().__init__(path)
        with closing(_opened(self.path)) as file, damage_explained(self.path):
            self.header = _header(self.path, file, needs_gt)
            self.sources = _sources(file, self.header.count)
        probes = [self.read([int(i)]) for i in np.unique(np.linspace(0, self.header.count - 1, PROBES).astype(int))]
        images = [image for probe in probes for image in (probe.pan, probe.ms, probe.gt) if image is not None]
        self.largest = max(float(image.max()) for image in images)
        self.close()  # before worker processes are forked

    def _open(self) -> Any:
        return _Images(self.path)

    def __len__(self) -> int:
        return self.header.count

    def check_scale(self, scale: float) -> None:
        """Refuse a full scale in DN that the file does not declare and the probes contradict: a DataError."""
        if scale == self.header.max_value and not self.header.by_name:
            return
        origin = " that its name stands for" if self.header.by_name and scale == self.header.max_value else ""
        if self.largest > ABOVE * scale:
            raise DataError(
                f"{self.path} holds values up to {self.largest:g}, above the full scale of {scale:g}{origin}; "
                "give the right one with --max-value: 2047 for WV2, WV3 and QB, 1023 for GF2."
            )
        if self.largest <= 1 and origin:
            raise DataError(
                f"{self.path} holds values up to {self.largest:g} only, not digital numbers of the full scale of "
                f"{scale:g}{origin}; give --max-value 1 if it was divided already."
            )

    def read(self, indices: Sequence[int], dtype: torch.dtype = torch.float32) -> PatchBatch:
        """Samples in DN, in the order of `indices`.

        Raises:
            DataError: a sample is damaged or holds values that are not finite.
            IndexError: no such sample.
        """
        names = IMAGES if self.header.has_gt else KEYS
        stacks = self._samples(names, indices, len(self), "leave such samples out")
        return PatchBatch(**{name: torch.from_numpy(_native(v)).to(dtype) for name, v in stacks.items()})


class _Images(dict[str, Stack]):
    """The open images of a file by name."""

    def __init__(self, path: str):
        self._opened = _opened(path)
        super().__init__(_stacks(path, named(self._opened)))

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def _stacks(path: str, arrays: dict[str, Any]) -> dict[str, Stack]:
    """The images among the arrays as stacks."""
    images = {name: arrays[name] for name in IMAGES if name in arrays}
    try:
        return arranged(images, _check_shapes)
    except DataError as error:
        raise DataError(f"{path}: {error}.") from error


def _native(values: np.ndarray) -> np.ndarray:
    """The values in a type and byte order that torch has."""
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


MOST_COMPRESSED = 1100
"""Bytes that a byte of a compressed file can stand for; gzip reaches 1032."""


def reason_of(error: BaseException) -> str:
    """Why HDF5 failed: the system's sentence where there is one, without HDF5's own details."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)


@contextmanager
def damage_explained(path: str | Path) -> Iterator[None]:
    """Turn what HDF5 raises where a header is damaged into DataError."""
    try:
        yield
    except DAMAGE as error:
        raise DataError(f"{path} is damaged ({reason_of(error)}); get the file anew.") from error


def _opened(path: str) -> Any:
    import h5py

    if is_old_matlab(path):
        return MatlabFile(path)
    try:
        # Locks fail on many network file systems, and nothing is written here.
        return h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE, locking="best-effort")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist.") from error
    except OSError as error:
        text = str(error)
        cut = re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", text)
        if cut:
            raise DataError(f"{path} is truncated: {cut[1]} of {cut[2]} bytes are there; get the file anew.") from error
        if "signature not found" in text:
            raise DataError(f"{path} is no HDF5 file.") from error
        raise DataError(f"{path} cannot be opened ({reason_of(error)}).") from error


def check_stored(path: str | Path, data: Any) -> None:
    """Refuse a dataset that declares far more than the file can hold, before memory is taken. Raises DataError."""
    held = data.id.get_storage_size()
    if data.size * data.dtype.itemsize > MOST_COMPRESSED * (held + 2**20):
        size = data.size * data.dtype.itemsize
        raise DataError(f"{path}: {data.name} declares {size / 1e9:.3g} GB, but only {held} bytes of it are stored.")


def _header(path: str, file: Any, needs_gt: bool) -> PanCollectionHeader:
    """The header, from shapes and attributes alone; DataError where they do not fit the layout."""
    arrays = named(file)
    has_gt = "gt" in arrays
    names = IMAGES if has_gt or needs_gt else KEYS
    missing = [n for n in names if n not in arrays]
    if missing:
        full = missing == ["gt"] and not has_gt
        why = " (a full-resolution file has no truth to learn from)" if full else ""
        raise DataError(f"{path} lacks {' and '.join(missing)}{why}; it holds {', '.join(file) or 'nothing'}.")
    for name in names:
        if not isinstance(arrays[name], np.ndarray):
            check_stored(path, arrays[name])
        if arrays[name].dtype.kind not in "fiu":
            raise DataError(f"{path}: {name} holds {arrays[name].dtype}, not real numbers.")
    shapes = {name: stack.shape for name, stack in _stacks(path, arrays).items()}
    count, bands, height, width = shapes["lms"]
    max_value = _number(file.attrs.get("max_value"))
    if max_value is not None and not is_full_scale(max_value):
        raise DataError(f"{path}: its max_value is {max_value:g}, which is no full scale.")
    registration = _text(file.attrs.get("registration", "pancollection"))
    if registration not in REGISTRATIONS:
        raise DataError(f"{path}: its registration is {registration!r}, not {' or '.join(REGISTRATIONS)}.")
    sensor = file.attrs.get("sensor")
    by_name = sensor is None and max_value is None and (guess := sensor_in_name(Path(path).stem)) is not None
    if by_name:
        assert guess is not None
        sensor, max_value = guess.name, guess.max_value
    return PanCollectionHeader(
        count=count,
        bands=bands,
        ratio=height // shapes["ms"][2],
        height=height,
        width=width,
        has_gt=has_gt,
        max_value=max_value,
        sensor=None if sensor is None else _text(sensor),
        by_name=by_name,
        registration=registration,
    )


def _sources(file: Any, count: int) -> np.ndarray:
    """(N,) the first column of `place`, which `PanCollectionWriter` stores; zeros without it."""
    import h5py

    place = file.get("place")
    known = isinstance(place, h5py.Dataset) and place.dtype.kind in "iu" and place.ndim == 2
    if not known or len(place) != count or not place.shape[1]:
        return np.zeros(count, np.int64)
    sources: np.ndarray = place[:, 0].astype(np.int64)
    return sources


def _check_shapes(shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse shapes (N, C, H, W) that do not fit each other, in a text without the file's name and full stop."""
    counts = {name: shape[0] for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise DataError(f"it holds different numbers of samples: {listed}")
    pan, ms, lms = (shapes[name] for name in KEYS)
    if min(min(shape) for shape in shapes.values()) == 0:
        raise DataError(f"it is empty: ms is {ms}, pan is {pan}")
    if pan[1] != 1:
        raise DataError(f"pan {pan} has {pan[1]} bands, not 1; the axes must be (N, C, H, W)")
    for name, shape in shapes.items():
        if name != "pan" and shape[1] != lms[1]:
            raise DataError(f"{name} has {shape[1]} bands, lms has {lms[1]}")
        if name != "ms" and shape[2:] != pan[2:]:
            raise DataError(f"{name} is {_by(shape)} pixels, pan is {_by(pan)}")
    (height, width), (h, w) = pan[2:], ms[2:]
    if height % h or width % w or height // h != width // w or height // h < 2:
        raise DataError(
            f"pan is {_by(pan)} pixels, ms is {_by(ms)}, and their "
            "ratio is no whole number from 2 on, the same for rows and columns"
        )


def _by(shape: tuple[int, ...]) -> str:
    return f"{shape[2]} x {shape[3]}"


def _number(value: Any) -> float | None:
    try:
        return None if value is None else float(np.asarray(value).reshape(-1)[0])
    except (TypeError, ValueError, IndexError):
        return None


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
