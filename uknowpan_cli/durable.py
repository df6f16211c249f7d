"""Files that get their names only when they are complete and on the disk.

This module imports the standard library alone, so that `tiling` and `models` can use it.
"""

import errno
import glob
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # not a POSIX system: processes are not kept apart
    fcntl = None  # type: ignore[assignment]

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES}
"""Answers of file systems that cannot wait for a folder."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""Answers of file systems without locks."""
_LONGEST = 120
"""Bytes of a name that the name of a scratch folder repeats; 255 are allowed in all."""
_FRESH = 60.0
"""Seconds in which an unlocked scratch folder may belong to a process that is about to lock it."""


def parsed(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def lock(file: int | IO[Any]) -> bool:
    """Lock an open file or folder until this process ends or closes it; False where there are no locks.

    Raises:
        BlockingIOError: another process has the lock.
        OSError: the file system refuses.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def sync_file(path: str | os.PathLike[str]) -> None:
    """Wait until the content of a closed file is on the disk. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: str | os.PathLike[str]) -> None:
    """Wait until the names in a folder are on the disk, where the file system can. Raises OSError."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def seal(path: Path, target: Path) -> None:
    """Give a complete file the permissions of the one that it replaces, and wait until it is on the disk."""
    with suppress(OSError):
        os.chmod(path, stat.S_IMODE(os.stat(target).st_mode) & 0o777)
    sync_file(path)


def place(path: Path, target: Path) -> None:
    """Give a sealed file its name, and wait until the name is on the disk."""
    os.replace(path, target)
    sync_folder(target.parent)


class Scratch(AbstractContextManager["Scratch"]):
    """A private folder beside a file, in which the file's next content is written.

    The folder has a random name and is its owner's alone, so that nobody can plant a link in it. A link at the
    file's place stays one: the file that it points to is replaced, and keeps its permissions. Leaving the context
    removes the folder. Raises OSError.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        self.target = Path(os.path.realpath(target))
        sweep(self.target)
        self.folder = Path(tempfile.mkdtemp(".tmp", f"{_stem(self.target)}{os.getpid()}.", self.target.parent))
        self.path = self.folder / f"new{self.target.suffix}"
        """where to write"""
        self._lock = _locked(self.folder)

    def seal(self, path: Path | None = None) -> None:
        """Choose the complete file, by default `path`, and wait until its content is on the disk."""
        self.path = path or self.path
        seal(self.path, self.target)

    def place(self) -> None:
        """Give the sealed file its name."""
        place(self.path, self.target)

    def publish(self) -> None:
        """Put what was written in place of the target."""
        self.seal()
        self.place()

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __exit__(self, *_: object) -> None:
        self.discard()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a small file by UTF-8 text. Raises OSError, which names it."""
    try:
        with Scratch(path) as scratch:
            scratch.path.write_text(text, encoding="utf-8")
            scratch.publish()
    except OSError as error:  # the system names no file when the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from error


def sweep(target: str | os.PathLike[str]) -> None:
    """Remove what killed runs on this machine left of a file that they were writing."""
    target = Path(os.path.realpath(target))
    stem = _stem(target)
    for old in target.parent.glob(f"{glob.escape(stem)}*.tmp"):
        pid = old.name[len(stem) :].split(".")[0]
        if pid.isdigit() and _is_dead(old, int(pid)):
            shutil.rmtree(old, ignore_errors=True)


def _stem(target: Path) -> str:
    host = re.sub(r"\W", "-", socket.gethostname())[:64]
    name = os.fsdecode(os.fsencode(target.name)[:_LONGEST])
    return f".{name}.{host}."


def _locked(folder: Path) -> Any:
    """A handle of a folder under a lock that ends with this process; None: there are no locks, or another has it."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if lock(handle):
            return handle
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass
    os.close(handle)
    return None


def _is_dead(folder: Path, pid: int) -> bool:
    """Whether the process that made a scratch folder has ended; a lock proves more than a number, which is reused."""
    try:
        handle = _locked(folder)
        old = time.time() - folder.stat().st_mtime > _FRESH
    except OSError:  # locked, or no folder
        return False
    if handle is not None:
        os.close(handle)
        if old:
            return True
    with suppress(PermissionError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
    return False
