"""Writing PanCollection's HDF5 files, patch by patch."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from uknowpan.durable import Scratch
from uknowpan.models.errors import DataError
from uknowpan.models.pancollection.file import IMAGES, reason_of
from uknowpan.models.types import PatchBatch


class _Disk(io.FileIO):
    """A new file that HDF5 may write to on a full disk.

    HDF5 crashes the process when closing fails to write. So the first failure is kept in `error`,
    and nothing more is written.
    """

    def __init__(self, path: Path):
        super().__init__(path, "w+")
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += super().write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell() if size is None else size


class PanCollectionWriter:
    """Appends patches to a new file: float32, compressed, one chunk per sample.

    All is written beside the target until it is published. Leaving the context before that removes everything.

    Raises:
        DataError: the file cannot be written, or the patches hold values that are not finite.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self._scratch: Scratch | None = None
        self._disk: _Disk | None = None
        self._file: Any = None

    def append(self, patches: PatchBatch, places: np.ndarray) -> None:
        """Add patches in DN; `places` (B, 3) holds each one's source, and row and column in MS pixels."""
        import h5py

        images = {name: getattr(patches, name) for name in IMAGES}
        arrays = {name: value.numpy().astype(np.float32) for name, value in images.items() if value is not None}
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"{self.path} cannot be written: {name} would hold values that are not finite; "
                    "check the scenes' values and the PAN weights."
                )
        arrays["place"] = np.asarray(places, np.int32)
        with self._explained():
            if self._file is None:
                self._scratch = Scratch(self.path)
                self._disk = _Disk(self._scratch.path)
                self._file = h5py.File(self._disk, "w")
            for name, values in arrays.items():
                self._extend(name, values)
        self.count += len(patches)

    def _extend(self, name: str, values: np.ndarray) -> None:
        one = values.shape[1:]
        if name not in self._file:
            chunk = 256 if name == "place" else 1  # places are not worth a chunk for each sample
            layout = {"maxshape": (None, *one), "chunks": (chunk, *one), "compression": "gzip", "shuffle": True}
            self._file.create_dataset(name, shape=(0, *one), dtype=values.dtype, **layout)
        stored = self._file[name]
        stored.resize(self.count + len(values), axis=0)
        stored[self.count :] = values

    def finish(self, attributes: dict[str, Any]) -> None:
        """Complete the file under its temporary name."""
        with self._explained():
            self._file.attrs.update(attributes)
            self._let_go()
            assert self._scratch is not None
            self._scratch.seal()

    def publish(self) -> None:
        """Put the finished file in place of the target."""
        with self._explained():
            assert self._scratch is not None
            self._scratch.place()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
            if self._disk is not None and self._disk.error is not None:
                raise self._disk.error
        except (OSError, RuntimeError) as error:
            raise DataError(f"{self.path} cannot be written ({reason_of(error)}).") from error

    def _let_go(self) -> None:
        if self._disk is not None:
            if self._file is not None:
                self._file.close()
            self._disk.close()

    def __enter__(self) -> PanCollectionWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError, RuntimeError):  # the disk may be full
            self._let_go()
        if self._scratch is not None:
            self._scratch.discard()
