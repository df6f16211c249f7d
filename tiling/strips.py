"""Finished strips on disk, so that a killed run can go on where it was."""

import errno
import glob
import json
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from uknowpan.durable import Scratch, lock, parsed, sync_file, sync_folder, write_text
from uknowpan.tiling.errors import OutputBusy, OutputError, ResumeMismatch
from uknowpan.tiling.fill import AnyArray
from uknowpan.tiling.identity import contents
from uknowpan.tiling.output import SceneWriter

_STATE, _COMMIT = "state.json", "commit.json"
_OURS = re.compile(r"(state|survey|commit)\.json|.+-\d{6}\.(npy|tmp)|\..+\.tmp")
"""names of the files in a folder of strips"""
_SEAL = b"crc32"
"""begins what follows the array in the file of a strip"""
_KIND = "uknowpan strips 1"
OLD = 5.0
"""seconds after which a folder of strips without its final name belongs to no run"""
_LOOK = 1 << 16
"""values that are compared at once"""


def _packed(rows: AnyArray) -> AnyArray:
    """A strip (C, n, w) as it is kept: itself, or a record of its one value and its shape."""
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


def _checksum(kept: AnyArray) -> bytes:
    """The last bytes of a strip's file: a sum over dtype, shape and values."""
    head = repr((kept.dtype.descr, kept.shape)).encode()
    data = np.ascontiguousarray(kept).view(np.uint8).data if kept.size else b""
    return _SEAL + zlib.crc32(data, zlib.crc32(head)).to_bytes(4, "little")


def _load(path: Path) -> AnyArray:
    """The strip in a file. Raises OSError, and ValueError where the file is torn or damaged."""
    with open(path, "rb") as file:
        try:
            kept = np.load(file)
        except OSError:
            raise
        except Exception as error:  # a damaged header can be taken for anything
            raise ValueError(f"{path} is damaged") from error
        if file.read() != _checksum(kept):
            raise ValueError(f"{path} is damaged")
    return _unpacked(kept)


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

    The strips of a layer, row by row of strips, are the output. Each file is renamed into place when complete and on
    the disk, and ends with a checksum. A strip of one single value, as an empty part of a scene gives, is kept as that
    value and a shape. Only the folder's owner can look into it.
    """

    def __init__(
        self,
        output: str,
        fingerprint: Mapping[str, object],
        layers: Sequence[str],
        count: int,
        *,
        columns: Sequence[int] = (0,),
        resume: bool = False,
    ) -> None:
        """The fingerprint holds whatever decides about the pixels, JSON-serialisable; `columns` are where the strips
        of a row begin in the output.

        With resume, strips of an earlier run are taken over if its fingerprint is the same; without, they are removed.
        Raises ResumeMismatch, OutputError.
        """
        self.folder = Path(f"{output}.part")
        self.layers = tuple(layers)
        self.count = count
        self.columns = tuple(columns)
        self.dropped = 0
        """strips of an interrupted run that were thrown away because it was not resumed"""
        self._lock: IO[str] | None = None
        fields = {"kind": _KIND, "fingerprint": dict(fingerprint), "layers": list(layers), "count": count}
        fields["columns"] = list(columns)
        state = json.loads(json.dumps(fields))
        sweep_strips(output)
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
        try:
            lock(self._lock)
        except OSError as error:
            self.release()
            if isinstance(error, BlockingIOError):
                raise OutputBusy(
                    f"Another run is writing {self.folder}; wait for it, or name another output."
                ) from error
            text = f"{self.folder} cannot be locked ({error.strerror}); try again"
            raise OutputError(f"{text}, or name another output.") from error

    def release(self) -> None:
        """Let other runs have the folder; what is in it stays."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_over(self, state: dict[str, Any], resume: bool) -> bool:
        """Continue in the folder of an earlier run; False if there is none, or none any more."""
        earlier: Any = None
        try:
            ours = _is_own(self.folder)
            self._claim(self.folder)
            assert self._lock is not None
            if not os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.folder / _STATE)):
                return False  # removed, and made anew by another run, before we had the lock
            with suppress(ValueError):  # a power cut may have torn it
                earlier = parsed(self._lock.read())
            if earlier is None:
                ours &= self._holds_strips_alone()
            else:
                whole = isinstance(earlier["fingerprint"], dict) and {"layers", "count"} <= earlier.keys()
                ours &= earlier["kind"] == _KIND and whole
        except FileNotFoundError:
            if self._is_gone() or self._clear_stateless():
                return False
            ours = False
        except (OSError, KeyError, TypeError, AttributeError):
            ours = False
        if not ours:
            self.release()
            raise OutputError(
                f"{self.folder} is in the way and does not come from an interrupted run; move it or remove it."
            )
        if earlier is None:  # a power cut took the state: whose strips they are is not known
            resume = False
        if not resume:
            self._drop_all()
            return False
        if earlier == state:
            return True
        self.release()
        old, new = (
            {**item["fingerprint"], "layers": item["layers"], "tiles": [item["count"], item.get("columns")]}
            for item in (earlier, state)
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

    def _holds_strips_alone(self) -> bool:
        return all(_OURS.fullmatch(name) for name in os.listdir(self.folder))

    def _clear_stateless(self) -> bool:
        """Empty a folder whose state a power cut took; False where it holds other files too.

        A run that takes the place of the folder meanwhile has another one, which this handle does not reach.
        """
        try:
            handle = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            names = os.listdir(handle)
            if _STATE in names or not all(_OURS.fullmatch(name) for name in names):
                return _STATE in names  # it has just been made: look again
            for name in names:
                if name.startswith("."):
                    shutil.rmtree(name, ignore_errors=True, dir_fd=handle)
                else:
                    os.unlink(name, dir_fd=handle)
            return True
        except OSError:
            return False
        finally:
            os.close(handle)

    def _drop_all(self) -> None:
        self.dropped = len({path.stem.split("-")[-1] for path in self.folder.glob("*-*.npy")})
        try:
            self._delete()
        except OSError as error:
            self.release()
            raise OutputError(f"{self.folder} cannot be removed ({error.strerror}); remove it yourself.") from error

    def _delete(self) -> None:
        """Rename the folder, so that it is gone at once, then remove it."""
        gone = self._beside(".old")
        os.rename(self.folder, gone)
        sync_folder(self.folder.parent)
        # NFS removes a folder only once no file in it is open.
        self.release()
        shutil.rmtree(gone, ignore_errors=True)

    def _beside(self, suffix: str) -> Path:
        """A free name beside the folder, which only its owner can write to."""
        return Path(tempfile.mkdtemp(suffix, f".{self.folder.name}.", self.folder.parent))

    def _begin(self, state: dict[str, Any]) -> bool:
        """Make the folder, with its state and locked from the start; False if another run was faster."""
        temp = None
        try:
            temp = self._beside(".new")
            (temp / _STATE).write_text(json.dumps(state, indent=1))
            sync_file(temp / _STATE)
            sync_folder(temp)
            self._claim(temp)
            os.replace(temp, self.folder)
            sync_folder(self.folder.parent)
        except OSError as error:
            self.release()
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise OutputError(f"{self.folder} cannot be made ({error.strerror}); is the folder writable?") from error
        finally:
            if temp is not None:
                shutil.rmtree(temp, ignore_errors=True)
        return True

    def _drop_torn(self) -> None:
        """Remove strips that a power cut tore or a disk damaged: they are made again."""
        for index in range(self.count):
            for layer in self.layers:
                with suppress(FileNotFoundError):
                    try:
                        _load(self._path(layer, index))
                    except (OSError, ValueError):
                        self._path(layer, index).unlink()

    def drop_strips(self) -> None:
        """Remove all strips, where what they were made with is lost."""
        for path in self.folder.glob("*-*.npy"):
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
        """Keep strip `index`: encoded values (C, n, w) of the output for each layer."""
        if set(rows) != set(self.layers):
            raise ValueError(f"layers {sorted(rows)} where {sorted(self.layers)} are expected")
        for layer in self.layers:
            path = self._path(layer, index)
            temp = path.with_suffix(".tmp")
            try:
                kept = _packed(rows[layer])
                with open(temp, "wb") as file:
                    np.save(file, kept, allow_pickle=False)
                    file.write(_checksum(kept))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temp, path)
            except OSError as error:
                with suppress(OSError):
                    temp.unlink()
                free = shutil.disk_usage(self.folder).free / 2**20
                raise OutputError(
                    f"A strip cannot be kept in {self.folder} ({error.strerror}); {free:.0f} MiB "
                    "are free there, make room and resume."
                ) from error

    def _strip(self, layer: str, index: int) -> AnyArray:
        path = self._path(layer, index)
        try:
            return _load(path)
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is missing or damaged; resume the run.") from error

    def strips(self, layer: str) -> Iterator[tuple[int, int, AnyArray]]:
        """Row, column and values of the strips of a layer, row by row. Raises OutputError."""
        row = 0
        for index in range(self.count):
            values = self._strip(layer, index)
            place = index % len(self.columns)
            yield row, self.columns[place], values
            row += values.shape[1] if place + 1 == len(self.columns) else 0

    def assemble(
        self, writers: Mapping[str, SceneWriter], changed: Mapping[str, Callable[[AnyArray], AnyArray]] | None = None
    ) -> None:
        """Feed all strips to the writers, one for each layer, some of them changed before. Raises OutputError."""
        for layer in self.layers:
            writer, change = writers[layer], (changed or {}).get(layer)
            for left, right in writer.spans(self.columns):
                row = 0
                for first in range(0, self.count, len(self.columns)):
                    rows = self._between(left, right, layer, first)
                    writer.write_encoded(row, rows if change is None else change(rows), left)
                    row += rows.shape[1]

    def _between(self, left: int, right: int, layer: str, first: int) -> AnyArray:
        """Columns left to right of the output, (C, n, right - left), in the row of strips that begins with `first`."""
        starts = enumerate(zip(self.columns, (*self.columns[1:], right), strict=True), first)
        places = [(index, start) for index, (start, end) in starts if start < right and end > left]
        rows = None
        for index, start in places:
            part = self._strip(layer, index)[..., max(left - start, 0) : right - start]
            if len(places) == 1:
                return part
            rows = np.empty((*part.shape[:2], right - left), part.dtype) if rows is None else rows
            rows[..., max(start - left, 0) :][..., : part.shape[2]] = part
        assert rows is not None
        return rows

    def commit(self, files: Mapping[str, Scratch]) -> None:
        """Note that complete files are about to get their names, so that a resumed run may replace them."""
        stamps = {str(file.target): contents(file.path) for file in files.values()}
        write_text(self.folder / _COMMIT, json.dumps(stamps))

    def remove(self) -> None:
        """Remove the folder, once the output has its final name."""
        with suppress(OSError):
            self._delete()
        self.release()


def _is_own(folder: Path) -> bool:
    """Whether this user made a folder, and no link stands in its place. Raises OSError."""
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode):
        return False
    if not hasattr(os, "geteuid") or status.st_uid == os.geteuid():
        return True
    probe = tempfile.mkdtemp(dir=folder.parent)  # file systems may give users other numbers
    try:
        return os.lstat(probe).st_uid == status.st_uid
    finally:
        os.rmdir(probe)


def sweep_strips(output: str) -> None:
    """Remove folders that killed runs were about to make or to remove."""
    part = Path(f"{output}.part")
    for folder in part.parent.glob(f".{glob.escape(part.name)}.*"):
        with suppress(OSError):
            made = folder.suffix == ".new" and time.time() - folder.stat().st_mtime > OLD
            if made or folder.suffix == ".old":
                shutil.rmtree(folder, ignore_errors=True)


def placed_by_interrupted(output: str, paths: Sequence[str]) -> bool:
    """Whether a run that was killed while it named its outputs has put all files there that exist at `paths`."""
    try:
        stamps = parsed((Path(f"{output}.part") / _COMMIT).read_text())
        existing = [Path(os.path.realpath(path)) for path in paths if os.path.exists(path)]
        return bool(existing) and all(stamps.get(str(path)) == contents(path) for path in existing)
    except (OSError, ValueError, AttributeError):
        return False
