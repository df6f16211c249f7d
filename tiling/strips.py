"""Finished strips on disk, so that a killed run can go on where it was."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from .errors import OutputError, ResumeMismatch
from .write import SceneWriter

try:
    import fcntl
except ImportError:  # not a POSIX system: runs on one output are not kept apart
    fcntl = None  # type: ignore[assignment]

_STATE = "state.json"
_KIND = "uknowpan strips 1"


class StripStore:
    """`OUT.part/`: one .npy for each layer and strip, in the file's dtype, and `state.json`.

    Strip i is what tile row i completes; the strips of a layer, one below the other, are the
    output. Each file is renamed into place when complete, so what is there is finished.
    """

    def __init__(
        self,
        output: str,
        fingerprint: Mapping[str, object],
        layers: Sequence[str],
        count: int,
        *,
        resume: bool = False,
    ) -> None:
        """fingerprint: whatever decides about the pixels, JSON-serialisable.

        With resume, strips of an earlier run are taken over if its fingerprint is the same;
        without, they are removed. Raises ResumeMismatch, OutputError.
        """
        self.folder = Path(f"{output}.part")
        self.layers = tuple(layers)
        self.count = count
        state = json.loads(
            json.dumps(
                {
                    "kind": _KIND,
                    "fingerprint": dict(fingerprint),
                    "layers": list(layers),
                    "count": count,
                }
            )
        )
        self._lock: IO[str] | None = None
        if self.folder.exists():
            self._meet(state, resume)
        if not self.folder.exists():
            self._begin(state)
            self._claim()
        self._drop_torn()

    def _claim(self) -> None:
        """Keep other runs off the folder for as long as this process lives (a killed one lets
        go). Raises OutputError if another run holds it."""
        if fcntl is None:
            return
        try:
            self._lock = open(self.folder / _STATE)  # noqa: SIM115 - held until `remove`
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise OutputError(
                f"Another run is writing {self.folder}; wait for it, or name another output."
            ) from error
        except OSError:  # a file system without locks
            return

    def release(self) -> None:
        """Let other runs have the folder; what is in it stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _meet(self, state: dict, resume: bool) -> None:
        try:
            found = json.loads((self.folder / _STATE).read_text())
            ours = found["kind"] == _KIND
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise OutputError(
                f"{self.folder} is in the way and does not come from an interrupted run; "
                "move it or remove it."
            )
        self._claim()
        if not resume:
            self.release()
            shutil.rmtree(self.folder)
            return
        if found == state:
            return
        old, new = found["fingerprint"], state["fingerprint"]
        changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        if found["layers"] != state["layers"]:
            changed.append("layers")
        if found["count"] != state["count"]:
            changed.append("tiles")
        self.release()
        raise ResumeMismatch(
            f"The strips in {self.folder} were made with other {', '.join(changed)}; "
            "run with the same inputs and options, or without resuming."
        )

    def _begin(self, state: dict) -> None:
        try:
            # The state comes first, under a name that is ours: a folder without it is refused.
            temp = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.new")
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir()
            (temp / _STATE).write_text(json.dumps(state, indent=1))
            os.replace(temp, self.folder)
        except OSError as error:
            raise OutputError(
                f"{self.folder} cannot be made ({error.strerror}); is the folder writable?"
            ) from error

    def _drop_torn(self) -> None:
        """A power cut can leave a renamed file without its contents."""
        for index in range(self.count):
            for layer in self.layers:
                path = self._path(layer, index)
                try:
                    np.load(path, mmap_mode="r" if path.stat().st_size > 128 else None)
                except FileNotFoundError:
                    continue
                except (OSError, ValueError, EOFError):
                    with suppress(OSError):
                        path.unlink()

    def _path(self, layer: str, index: int) -> Path:
        return self.folder / f"{layer}-{index:06d}.npy"

    def has(self, index: int) -> bool:
        """Whether strip `index` is there in all layers."""
        return all(self._path(layer, index).exists() for layer in self.layers)

    def missing(self) -> list[int]:
        """Strips still to be made, in order."""
        return [i for i in range(self.count) if not self.has(i)]

    def put(self, index: int, rows: Mapping[str, npt.NDArray]) -> None:
        """Keep strip `index`: encoded rows (C, n, W) of the output for each layer."""
        if set(rows) != set(self.layers):
            raise ValueError(f"layers {sorted(rows)} where {sorted(self.layers)} are expected")
        for layer in self.layers:
            path = self._path(layer, index)
            temp = path.with_suffix(".tmp")
            try:
                with open(temp, "wb") as file:
                    np.save(file, np.ascontiguousarray(rows[layer]), allow_pickle=False)
                os.replace(temp, path)
            except OSError as error:
                with suppress(OSError):
                    temp.unlink()
                free = shutil.disk_usage(self.folder).free / 2**20
                raise OutputError(
                    f"A strip cannot be kept in {self.folder} ({error.strerror}); {free:.0f} MiB "
                    "are free there, make room and resume."
                ) from error

    def assemble(self, writers: Mapping[str, SceneWriter]) -> None:
        """Feed all strips to the writers, one for each layer. Raises OutputError."""
        for layer in self.layers:
            row = 0
            for index in range(self.count):
                path = self._path(layer, index)
                try:
                    rows = np.load(path)
                except (OSError, ValueError) as error:
                    raise OutputError(f"{path} is missing or damaged; resume the run.") from error
                writers[layer].write_encoded(row, rows)
                row += rows.shape[1]

    def remove(self) -> None:
        """Remove the folder, once the output has its final name."""
        self.release()
        shutil.rmtree(self.folder, ignore_errors=True)
