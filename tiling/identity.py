"""The files that rasters are read from, and stamps that show when one of them changes."""

import hashlib
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from uknowpan.tiling.errors import InputUnreadable
from uknowpan.tiling.raster import GDAL_ERRORS, open_raster

_SIDECARS = (".msk", ".ovr", ".msk.ovr", ".aux.xml")
_PARTED = re.compile(r"(?i)\.(til|xml)$|^/vsi(zip|tar|gzip|7z|rar|subfile|sparse)|^[A-Z0-9_]{2,}:.")
"""names of rasters that are read from other files; so is a VRT"""
_BLOCK, _BLOCKS = 1 << 14, 16
"""bytes of a part of a file that is compared, and how many parts of a large file are"""

Stamp = list[object]
"""[path, bytes, time of modification in ns, digest of some blocks]; None where the file is not on this machine"""


def files_behind(inputs: Iterable[str]) -> list[str]:
    """The local files that rasters are read from: themselves, sources of a VRT, the archive of a /vsizip/, sidecars."""
    files: dict[str, None] = {}
    waiting = list(inputs)
    for name in waiting:
        local = _local(name)
        if not local or local in files:
            continue
        beside = (f"{local}{end}" for end in _SIDECARS)
        files |= dict.fromkeys([local, *(path for path in beside if os.path.isfile(path))])
        if _PARTED.search(name) or _is_vrt(local):
            with suppress(InputUnreadable, *GDAL_ERRORS), open_raster(name) as dataset:
                waiting += dataset.files  # of a VRT within a VRT GDAL lists the name alone
    return list(files)


def _is_vrt(path: str) -> bool:
    """Whether a file is a VRT, whatever its name."""
    with suppress(OSError), open(path, "rb") as file:
        return b"<VRTDataset" in file.read(1024)
    return False


def _local(name: str) -> str | None:
    """The file on this machine that a name of GDAL leads to."""
    plain = re.sub(r"^(/vsi[a-z0-9]+/)+\{?", "", name).split("}")[0]
    return next((str(place) for place in (Path(plain), *Path(plain).parents) if os.path.isfile(place)), None)


def stamp(path: str) -> Stamp:
    """A stamp of a file; another size, time or content gives another one."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            return [path, status.st_size, status.st_mtime_ns, sampled_digest(path)]
    except OSError:  # /vsi paths and URLs
        return [path, None, None, None]


def contents(path: str | os.PathLike[str]) -> list[object]:
    """[bytes, digest] of a file, which hold for any name and time; None for both where it cannot be read."""
    return stamp(str(path))[1::2]


def sampled_digest(path: str | os.PathLike[str]) -> str:
    """Digest of a file's first and last bytes and of blocks between them; of all bytes where there are few.

    Raises OSError.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        step = max((size - _BLOCK) // (_BLOCKS - 1), _BLOCK)
        for number in range(_BLOCKS):
            file.seek(min(number * step, max(size - _BLOCK, 0)))
            digest.update(file.read(_BLOCK))
    return digest.hexdigest()[:16]
