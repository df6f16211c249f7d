"""A lock on an open file; it keeps two runs from writing one folder."""

import errno
from typing import IO

try:
    import fcntl
except ImportError:  # not a POSIX system: runs are not kept apart
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}
"""Errors of a file system without locks."""


def lock_file(file: IO[str]) -> None:
    """Lock a file until it is closed; a killed process lets go. Nothing happens where there are no locks.

    The file must be open for writing, or NFS would not lock it.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file cannot be locked.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
