"""Finished strips on disk, so that a killed run can go on where it was."""

import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from uknowpan.tiling.errors import OutputError, ResumeMismatch
from uknowpan.tiling.fill import AnyArray
from uknowpan.tiling.output import SceneWriter

try:
    import fcntl
except ImportError:  # not a POSIX system: runs on one output are not kept apart
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""a file system without locks"""
_STATE = "state.json"
_KIND = "uknowpan strips 1"
_LOOK = 1 << 16
"""values that are compared at once"""


def _packed(rows: AnyArray) -> AnyArray:
    """A strip (C, n, W) as it is kept: itself, or a record of its one value and its shape."""
    rows = np.ascontiguousarray(rows)
    if not _is_constant(rows):
        return rows
    record = np.dtype([("value", rows.dtype), ("shape", np.int64, (rows.ndim,))])
    return np.array([(rows.flat[0], rows.shape)], record)


def _unpacked(kept: AnyArray) -> AnyArray:
    """The strip that `_packed` was given; a constant one takes no memory and is read-only."""
    if kept.dtype.names is None:
        return kept
    return np.broadcast_to(kept["value"][0], tuple(kept["shape"][0]))


def _is_constant(rows: AnyArray) -> bool:
    """Whether all values have the same bits, those of NaN too; stops near the first that differs."""
    if rows.size < 2:
        return False
    flat = rows.reshape(-1).view(f"u{rows.dtype.itemsize}")
    return flat[0] == flat[-1] and all(
        bool((flat[start : start + _LOOK] == flat[0]).all()) for start in range(0, len(flat), _LOOK)
    )


class StripStore:
    """`OUT.part/`: one .npy for each layer and strip, in the file's dtype, and `state.json`.

    Strip i is what tile row i completes; the strips of a layer, one below the other, are the output. Each file is
    renamed into place when complete, so what is there is finished. A strip of one single value, as an empty part of a
    scene gives, is kept as that value and a shape.
    """

    def __init__(
        self, output: str, fingerprint: Mapping[str, object], layers: Sequence[str], count: int, *, resume: bool = False
    ) -> None:
        """The fingerprint holds whatever decides about the pixels, JSON-serialisable.

        With resume, strips of an earlier run are taken over if its fingerprint is the same; without, they are removed.
        Raises ResumeMismatch, OutputError.
        """
        self.folder = Path(f"{output}.part")
        self.layers = tuple(layers)
        self.count = count
        self.dropped = 0
        """strips of an interrupted run that were thrown away because it was not resumed"""
        self._lock: IO[str] | None = None
        fields = {"kind": _KIND, "fingerprint": dict(fingerprint), "layers": list(layers), "count": count}
        state = json.loads(json.dumps(fields))
        # Another run may begin or end between the two looks at the folder; then look again.
        while not (self._take_over(state, resume) or self._begin(state)):
            pass
        self._drop_torn()

    def _claim(self, folder: Path) -> None:
        """Keep other runs off the folder for as long as this process lives (a killed one lets go). Raises OutputError
        if another run holds it, OSError if it has no state."""
        self.release()
        # Opened for writing, or NFS would not lock it.
        self._lock = open(folder / _STATE, "r+")  # noqa: SIM115 - held until `release`
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            self.release()
            if isinstance(error, BlockingIOError):
                text = f"Another run is writing {self.folder}; wait for it"
            else:
                text = f"{self.folder} cannot be locked ({error.strerror}); try again"
            raise OutputError(f"{text}, or name another output.") from error

    def release(self) -> None:
        """Let other runs have the folder; what is in it stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_over(self, state: dict[str, Any], resume: bool) -> bool:
        """Continue in the folder of an earlier run; False if there is none, or none any more."""
        try:
            self._claim(self.folder)
            assert self._lock is not None
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.folder / _STATE)):
                return False  # removed, and made anew by another run, before we had the lock
            earlier = json.load(self._lock)
            ours = earlier["kind"] == _KIND
        except FileNotFoundError:
            if self._is_gone():
                return False
            ours = False
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            self.release()
            raise OutputError(
                f"{self.folder} is in the way and does not come from an interrupted run; move it or remove it."
            )
        if not resume:
            self._drop_all()
            return False
        if earlier == state:
            return True
        self.release()
        old, new = (
            {**item["fingerprint"], "layers": item["layers"], "tiles": item["count"]} for item in (earlier, state)
        )
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raise ResumeMismatch(
            f"The strips in {self.folder} were made with other {', '.join(changed)}; "
            "run with the same inputs and options, or without resuming."
        )

    def _is_gone(self) -> bool:
        try:
            return not any(self.folder.iterdir())
        except FileNotFoundError:
            return True

    def _drop_all(self) -> None:
        self.dropped = len({path.stem.split("-")[-1] for path in self.folder.glob("*-*.npy")})
        try:
            self._delete()
        except OSError as error:
            self.release()
            raise OutputError(f"{self.folder} cannot be removed ({error.strerror}); remove it yourself.") from error

    def _delete(self) -> None:
        """Under the lock, and the state last: without it the folder would be refused."""
        for path in self.folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _STATE:
                path.unlink()
        (self.folder / _STATE).unlink()
        # Empty, anyone may have it; NFS removes a folder only once no file in it is open.
        self.release()
        with suppress(OSError):
            self.folder.rmdir()

    def _begin(self, state: dict[str, Any]) -> bool:
        """Make the folder, with its state and locked from the start; False if another run was faster."""
        temp = self.folder.with_name(f".{self.folder.name}.{os.urandom(4).hex()}.new")
        try:
            temp.mkdir()
            (temp / _STATE).write_text(json.dumps(state, indent=1))
            self._claim(temp)
            os.replace(temp, self.folder)
        except OSError as error:
            self.release()
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise OutputError(f"{self.folder} cannot be made ({error.strerror}); is the folder writable?") from error
        finally:
            shutil.rmtree(temp, ignore_errors=True)
        return True

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

    def put(self, index: int, rows: Mapping[str, AnyArray]) -> None:
        """Keep strip `index`: encoded rows (C, n, W) of the output for each layer."""
        if set(rows) != set(self.layers):
            raise ValueError(f"layers {sorted(rows)} where {sorted(self.layers)} are expected")
        for layer in self.layers:
            path = self._path(layer, index)
            temp = path.with_suffix(".tmp")
            try:
                with open(temp, "wb") as file:
                    np.save(file, _packed(rows[layer]), allow_pickle=False)
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
                    rows = _unpacked(np.load(path))
                except (OSError, ValueError, EOFError) as error:
                    raise OutputError(f"{path} is missing or damaged; resume the run.") from error
                writers[layer].write_encoded(row, rows)
                row += rows.shape[1]

    def remove(self) -> None:
        """Remove the folder, once the output has its final name."""
        with suppress(OSError):
            self._delete()
        self.release()
