"""Writing the result: metadata, rounding, nodata, and files that exist only when complete."""

import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.enums import ColorInterp, Resampling
from rasterio.shutil import copy as raster_copy
from rasterio.windows import Window as GdalWindow

from uknowpan.durable import Scratch
from uknowpan.tiling.errors import InvalidResult, OutputError, OutputExists, TilingError
from uknowpan.tiling.fill import AnyArray, BoolArray
from uknowpan.tiling.metadata import MsMeta, with_alpha
from uknowpan.tiling.raster import GDAL_ERRORS, quiet, reason, usable_nodata
from uknowpan.tiling.window import Grid

_BLOCK = 512
_ROWS = 16
"""Rows that are encoded at once: what lies between stays in the processor's cache."""
_DEFLATE_LEVEL = "2"
"""0.3 of the time of GDAL's own 6, for 2 % more bytes of 16-bit results; 8-bit ones grow by up to 6 %."""
_LOSSLESS = {"NONE", "DEFLATE", "LZW", "ZSTD", "LZMA", "PACKBITS"}
_WITH_PREDICTOR = {"DEFLATE", "LZW", "ZSTD"}
_STALE_TAG = re.compile(r"STATISTICS_|TIFFTAG_[XY]RESOLUTION$|TIFFTAG_RESOLUTIONUNIT$|AREA_OR_POINT$")
_SIDECARS = (".aux.xml", ".msk", ".msk.ovr", ".ovr")
_LONGEST_NAME = 240
"""Bytes; 255 are allowed, and names of strips and sidecars are longer."""
_EXACT = 2.0**53
"""Largest nodata of integers; GDAL would read one of -9.2e18 as -9."""
# GDAL takes floats within 10 units of the last place for equal to nodata.
_NODATA_ULPS = 32


@dataclass(frozen=True)
class OutputOptions:
    """Settings of an output; None stands for the MS's own."""

    format: str = "gtiff"
    """gtiff or cog"""
    dtype: str | None = None
    nodata: float | None = None
    creation: Mapping[str, str] = field(default_factory=dict)
    """GDAL creation options; they override every default of ours"""
    overviews: bool = False
    """a COG has them always"""
    mask: str | None = None
    """internal, alpha, or file for a .msk beside it; None: nodata marks invalid pixels"""
    overwrite: bool = False
    num_threads: int = 1
    """for compression"""


@dataclass(frozen=True)
class Encoding:
    """The rule by which values become pixels of the file."""

    dtype: str
    nodata: float | None
    low: float
    high: float


def output_encoding(
    meta: MsMeta, dtype: str | None = None, nodata: float | None = None, may_have_invalid: bool = False
) -> Encoding:
    """Decide dtype, nodata and range before the header is written.

    Nodata is the one asked for, else the MS's own if the dtype can hold it, else - only if
    invalid pixels are possible - NaN for floats, 0 for unsigned and the minimum for signed
    integers. Integers are clipped to their dtype, or to NBITS where the MS declares it.
    Raises OutputError for a nodata or dtype that cannot be written.
    """
    name = dtype or meta.dtype
    try:
        kind = np.dtype(name)
    except TypeError:
        kind = np.dtype(object)
    if kind.kind not in "iuf":
        raise OutputError(f"Output dtype {name!r} is unknown; use uint8, uint16, int16 or float32.")
    if nodata is not None:
        chosen = usable_nodata(nodata, name)
        if chosen is None:
            raise OutputError(f"Nodata {nodata:g} does not fit into {name}; choose another value.")
    else:
        chosen = usable_nodata(meta.nodata, name)
        if chosen is None and may_have_invalid:
            chosen = float("nan") if kind.kind == "f" else float(np.iinfo(kind).min)
    if kind.kind == "f":
        return Encoding(kind.name, chosen, -np.inf, np.inf)
    if chosen is not None:
        chosen = max(-_EXACT, min(chosen, _EXACT))
    info = np.iinfo(kind)
    low, high = float(info.min), float(info.max)
    if meta.nbits and name == meta.dtype and kind.kind == "u" and meta.nbits < info.bits:
        low, high = 0.0, float(2**meta.nbits - 1)
    return Encoding(kind.name, chosen, low, high)


def encode(values: npt.NDArray[np.floating], valid: BoolArray, encoding: Encoding) -> AnyArray:
    """(C, n, W) and (n, W) -> (C, n, W) in the file's dtype.

    Rounds half to even and clips; invalid pixels become nodata (0 if there is none); a valid pixel that would equal
    nodata moves to the next value. `valid` (C, n, W) holds for each band.

    Raises InvalidResult where a valid pixel is not finite: in the file it would pass for nodata.
    """
    out = np.empty(values.shape, encoding.dtype)
    for top in range(0, values.shape[1], _ROWS):
        rows = slice(top, top + _ROWS)
        out[:, rows] = _encoded(values[:, rows], valid[..., rows, :], encoding)
    return out


def _encoded(values: npt.NDArray[np.floating], valid: BoolArray, encoding: Encoding) -> AnyArray:
    kind = np.dtype(encoding.dtype)
    with np.errstate(over="ignore"):
        held = values.astype(kind) if kind.kind == "f" else values
    whole = bool(valid.all())  # most strips: nothing is to be replaced
    finite = np.isfinite(held)
    if not (finite if whole else finite | ~valid).all():
        raise InvalidResult(f"A valid pixel of the result is no finite {kind}; use another model or output dtype.")
    nodata = 0 if encoding.nodata is None else encoding.nodata
    if kind.kind == "f":
        out = held
        if encoding.nodata is not None and np.isfinite(nodata):
            tolerance = _NODATA_ULPS * float(np.finfo(kind).eps)
            with np.errstate(over="ignore"):
                near = np.abs(out - kind.type(nodata)) <= tolerance * abs(nodata)
            out[near] = kind.type(nodata * (1 - 2 * tolerance)) if nodata else np.finfo(kind).tiny
        return out if whole else np.where(valid, out, kind.type(nodata))
    # float32 cannot hold the limits of 32-bit integers.
    wide = values.astype(np.float64) if kind.itemsize >= 4 else values
    limits = wide.dtype.type(encoding.low), wide.dtype.type(encoding.high)
    out = np.rint(wide if whole else np.where(valid, wide, 0))
    out = np.clip(out, *limits, out=out)
    if kind.itemsize == 8:
        out = np.minimum(out, np.nextafter(encoding.high, 0))
    out = out.astype(kind)
    if encoding.nodata is not None:
        taken = out == kind.type(nodata)
        out[taken] = kind.type(nodata + 1 if nodata < encoding.high else nodata - 1)
    return out if whole else np.where(valid, out, kind.type(nodata))


def is_valid(values: AnyArray, nodata: float | None) -> BoolArray:
    """Mask of the encoded values that are not nodata."""
    if nodata is None:
        return np.ones(values.shape, bool)
    valid: BoolArray = ~np.isnan(values) if np.isnan(nodata) else values != values.dtype.type(nodata)
    return valid


def check_output(path: str, inputs: Sequence[str] = (), overwrite: bool | None = False) -> None:
    """Refuse early what would fail late; overwrite None: the command cannot. Raises OutputError, OutputExists."""
    target = Path(path)
    if not path.isascii() and any("\ud800" <= letter <= "\udfff" for letter in path):
        raise OutputError(f"The name {path!a} is not UTF-8; choose another one.")
    if path.startswith("/vsi") or "://" in path:
        raise OutputError(f"{path} is no local file; write to a local one and copy it.")
    if path == "-":
        raise OutputError("- is no file, and results do not go to stdout; name a file.")
    if len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise OutputError(f"The name {target.name} is too long; choose one of at most {_LONGEST_NAME} bytes.")
    if target.is_dir():
        raise OutputError(f"{path} is a folder; name a file in it.")
    if target.exists() and not target.is_file():  # the rename would put a file in its place
        raise OutputError(f"{path} is a device or pipe; name a file.")
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        raise OutputError(f"The folder {folder} does not exist; create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {folder} is not writable; choose another one.")
    for name in inputs:
        with suppress(OSError):
            if os.path.realpath(path) == os.path.realpath(name) or os.path.samefile(path, name):
                raise OutputError(f"The output {path} is one of the inputs; name another file.")
    if target.exists() and not overwrite:
        way_out = "choose" if overwrite is None else "use --overwrite or"
        raise OutputExists(f"{path} exists and is kept; {way_out} another name.")


class SceneWriter(AbstractContextManager["SceneWriter"]):
    """Writes rows top to bottom into a temporary file beside the target; `close` renames it.

    Use as a context manager: an exception removes everything, the end of the block completes the file. Before the
    rename the file is read back and compared with what was written, as GDAL does not report a disk that fills up while
    it closes. Its content is on the disk before its name is. Memory: one row of blocks of a span.

    Raises OutputError, OutputExists.
    """

    def __init__(
        self,
        path: str,
        grid: Grid,
        meta: MsMeta,
        options: OutputOptions | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        may_have_invalid: bool = False,
        inputs: Sequence[str] = (),
    ) -> None:
        options = options or OutputOptions()
        if options.format not in ("gtiff", "cog"):
            raise OutputError(f"Format {options.format!r} is unknown; use gtiff or cog.")
        check_output(path, inputs, options.overwrite)
        self.path = path
        self.encoding = output_encoding(meta, options.dtype, options.nodata, may_have_invalid)
        self._grid = grid
        self._options = options
        self._creation = {k.upper(): str(v) for k, v in options.creation.items()}
        self._next = self._left = self._right = 0
        self._pending: list[AnyArray] = []
        self._sums: list[tuple[GdalWindow, int, int]] = []
        self._dataset: rasterio.io.DatasetWriter | None = None
        with self._explained():
            self.scratch = Scratch(path)
        self._temp, self._temp_cog = self.scratch.folder / "new.tif", self.scratch.folder / "cog.tif"
        try:
            with self._explained():
                self._dataset = self._create(meta)
                self._block_rows, self._block_cols = map(int, self._dataset.block_shapes[0])
                self._describe(meta, dict(tags or {}))
        except BaseException:
            self.abort()
            raise

    def _create(self, meta: MsMeta) -> rasterio.io.DatasetWriter:
        grid = self._grid
        place = {"transform": grid.transform} if grid.is_placed else {}
        if grid.rpcs is not None:
            place = {"rpcs": grid.rpcs}
        # MINISBLACK, because GDAL makes RGBA of four 8-bit bands by itself.
        rgb = meta.colorinterp[:3] == (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
        alpha = self._options.mask == "alpha"
        creation = {
            "TILED": "YES",
            "BLOCKXSIZE": str(min(_BLOCK, -(-grid.width // 16) * 16)),
            "BLOCKYSIZE": str(min(_BLOCK, -(-grid.height // 16) * 16)),
            "COMPRESS": "DEFLATE",
            "BIGTIFF": "IF_SAFER",
            "PHOTOMETRIC": "RGB" if rgb else "MINISBLACK",
            "NUM_THREADS": str(self._options.num_threads),
        } | ({"ALPHA": "YES"} if alpha else {})
        if self._options.format == "cog":
            creation["ZLEVEL"] = "1"  # thrown away after the copy
        else:
            if self._creation.get("TILED", "YES").upper() in ("NO", "FALSE", "OFF"):
                del creation["BLOCKXSIZE"], creation["BLOCKYSIZE"]
            creation |= self._creation
        _compress(creation, "3" if np.dtype(self.encoding.dtype).kind == "f" else "2", "ZLEVEL")
        with quiet():
            return rasterio.open(
                self._temp, "w", driver="GTiff", width=grid.width, height=grid.height,
                count=len(meta.descriptions) + alpha, dtype=self.encoding.dtype,
                nodata=None if self._options.mask else self.encoding.nodata, crs=grid.crs, **place,
                **{k.lower(): v for k, v in creation.items()},
            )  # fmt: skip

    def _describe(self, meta: MsMeta, tags: dict[str, str]) -> None:
        dataset = self._dataset
        assert dataset is not None
        if self._options.mask == "alpha":
            meta = with_alpha(meta)
        dataset.descriptions = meta.descriptions
        dataset.colorinterp = meta.colorinterp
        if any(s != 1 for s in meta.scales) or any(o != 0 for o in meta.offsets):
            dataset.scales = meta.scales
            dataset.offsets = meta.offsets
        if any(meta.units):
            dataset.units = [unit or "" for unit in meta.units]
        for band, own in enumerate(meta.band_tags, 1):
            if kept := _lasting(own):
                dataset.update_tags(band, **kept)
        dataset.update_tags(**_lasting(meta.tags) | tags, AREA_OR_POINT=self._grid.area_or_point)

    def spans(self, starts: Sequence[int]) -> list[tuple[int, int]]:
        """Columns [left, right) of whole blocks that begin near `starts`: a block written twice stays in the file
        twice."""
        lefts = sorted({0, *(start // self._block_cols * self._block_cols for start in starts)})
        return list(pairwise([*lefts, self._grid.width]))

    def write_encoded(self, row: int, rows: AnyArray, left: int = 0) -> None:
        """Write rows (C, n, w) that `encode` made. Rows of a span come in order, without gaps; spans do too."""
        if self._next == self._grid.height and left == self._right > self._left:
            self._left, self._next = left, 0
        if (row, left) != (self._next, self._left) or rows.dtype != np.dtype(self.encoding.dtype):
            raise ValueError(f"row {row} ({rows.dtype}) where {self._next} is next in {self.path}")
        if rows.shape[1] == 0:
            return
        self._next, self._right = row + rows.shape[1], left + rows.shape[2]
        self._pending.append(rows)
        # Whole rows of blocks only: a block written twice stays in the file twice.
        waiting = sum(part.shape[1] for part in self._pending)
        if waiting >= self._block_rows or self._next == self._grid.height:
            self._flush()

    def _flush(self) -> None:
        assert self._dataset is not None
        buffer = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending, axis=1)
        n = buffer.shape[1]
        first = self._next - n
        if self._next < self._grid.height:
            n -= self._next % self._block_rows
        self._pending = [buffer[:, n:]] if n < buffer.shape[1] else []
        for top in range(0, n, self._block_rows):
            part = np.ascontiguousarray(buffer[:, top : min(top + self._block_rows, n)])
            window = GdalWindow(self._left, first + top, part.shape[2], part.shape[1])
            shown = None
            if self._options.mask is not None:
                valid = is_valid(part[0], self.encoding.nodata)
                if self._options.mask == "alpha":
                    full = np.iinfo(part.dtype).max if part.dtype.kind in "iu" else 255
                    part = np.concatenate([part, np.where(valid, full, 0).astype(part.dtype)[None]])
                else:
                    shown = 255 * valid.astype(np.uint8)
            with self._explained(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=self._options.mask == "internal"):
                self._dataset.write(part, window=window)
                if shown is not None:
                    self._dataset.write_mask(shown, window=window)
            mask = 0 if shown is None else zlib.crc32(shown.data)
            self._sums.append((window, zlib.crc32(part.data), mask))

    def finish(self) -> Scratch:
        """Complete the file under its temporary name; `place` renames it."""
        if (self._next, self._right) != self._grid.shape:
            raise ValueError(f"{self._next} of {self._grid.height} rows written: {self.path}")
        assert self._dataset is not None
        with self._explained():
            self._dataset.close()
            self._dataset = None
            final = self._temp
            if self._options.format == "cog":
                self._verify(self._temp, exactly=True)
                self._copy_to_cog()
                final = self._temp_cog
            elif self._options.overviews:
                self._build_overviews()
            compress = self._creation.get("COMPRESS", "DEFLATE").upper()
            self._verify(final, compress in _LOSSLESS and "NBITS" not in self._creation)
            self.scratch.seal(final)
        return self.scratch

    def place(self) -> None:
        """Give the finished file its name, and remove what belongs to the file that it replaces."""
        own = [end for end in _SIDECARS if self._options.mask == "file" and os.path.exists(f"{self.scratch.path}{end}")]
        with self._explained():
            for end in own:
                os.replace(f"{self.scratch.path}{end}", f"{self.scratch.target}{end}")
            self.scratch.place()
        # Statistics, overviews and mask of the file that was overwritten.
        for end in (end for end in _SIDECARS if end not in own):
            for path in (self.scratch.target, self.path):
                with suppress(OSError):
                    os.remove(f"{path}{end}")

    def close(self) -> None:
        """Complete the file and give it its final name."""
        try:
            self.finish()
            self.place()
        finally:
            self.abort()

    def _verify(self, path: Path, exactly: bool) -> None:
        with quiet(), rasterio.open(path, num_threads=str(self._options.num_threads)) as dataset:
            for window, checksum, mask in self._sums:
                rows = dataset.read(window=window)
                lost = mask and zlib.crc32(dataset.read_masks(1, window=window).data) != mask
                if lost or (exactly and zlib.crc32(rows.data) != checksum):
                    raise OutputError(
                        f"{self.path} does not hold what was written at row {window.row_off}; "
                        "is the disk full or broken?"
                    )

    def _build_overviews(self) -> None:
        levels: list[int] = []
        while max(self._grid.shape) >> len(levels) > 256:
            levels.append(2 ** (len(levels) + 1))
        if not levels:
            return
        threads = str(self._options.num_threads)
        with (
            rasterio.Env(GDAL_NUM_THREADS=threads, BIGTIFF_OVERVIEW="IF_SAFER"),
            rasterio.open(self._temp, "r+") as dataset,
        ):
            dataset.build_overviews(levels, Resampling.average)
        with quiet(), rasterio.open(self._temp) as dataset:
            made = len(dataset.overviews(1))
        if made != len(levels) or not all(self._is_complete(i) for i in range(made)):
            raise OutputError(f"Overviews of {self.path} are incomplete; is the disk full?")

    def _is_complete(self, level: int) -> bool:
        """Whether all blocks of an overview are in the file: missing ones read as zeros."""
        size = self._temp.stat().st_size
        with rasterio.open(self._temp, overview_level=level) as small:
            height, width = small.block_shapes[0]
            columns, rows = -(-small.width // width), -(-small.height // height)
        with quiet(), rasterio.open(self._temp) as dataset:
            for band, y, x in product(dataset.indexes, range(rows), range(columns)):
                start, length = (
                    dataset.get_tag_item(f"BLOCK_{item}_{x}_{y}", "TIFF", band, level) for item in ("OFFSET", "SIZE")
                )
                if start is None or length is None or int(start) + int(length) > size:
                    return False
        return True

    def _copy_to_cog(self) -> None:
        creation = {
            "COMPRESS": "DEFLATE",
            "BLOCKSIZE": str(_BLOCK),
            "BIGTIFF": "IF_SAFER",
            "OVERVIEW_RESAMPLING": "AVERAGE",
            "NUM_THREADS": str(self._options.num_threads),
        } | self._creation
        _compress(creation, "YES", "LEVEL")
        with quiet():
            raster_copy(self._temp, self._temp_cog, driver="COG", **creation)

    def abort(self) -> None:
        """Remove everything unfinished. Harmless after `close`."""
        if self._dataset is not None:
            with suppress(*GDAL_ERRORS):
                self._dataset.close()
            self._dataset = None
        self._pending = []
        self.scratch.discard()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TilingError:
            raise
        except (*GDAL_ERRORS, SystemError) as error:  # the latter where GDAL fails without a word
            free = shutil.disk_usage(Path(os.path.realpath(self.path)).parent).free / 2**20
            raise OutputError(
                f"{self.path} cannot be written ({reason(error)}); "
                f"{free:.0f} MiB are free there, check space and creation options."
            ) from error

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _lasting(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags that are true of the output too."""
    return {key: value for key, value in tags.items() if not _STALE_TAG.match(key)}


def _compress(creation: dict[str, str], predictor: str, level: str) -> None:
    """Set the default predictor and level of a compression that has them."""
    kind = creation["COMPRESS"].upper()
    if kind in _WITH_PREDICTOR and "NBITS" not in creation:
        creation.setdefault("PREDICTOR", predictor)
    if kind == "DEFLATE":
        creation.setdefault(level, _DEFLATE_LEVEL)
