"""PanCollection's HDF5 files: reading, writing, drawing batches, and the protocol behind them.

A file holds ``ms`` (N, C, h, w), ``pan`` (N, 1, H, W), ``lms`` (N, C, H, W) and, at reduced
resolution, the truth ``gt`` (N, C, H, W), all in digital numbers (DN), H = ratio * h. Files are
never loaded whole: a sample is read when it is asked for.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from uknowpan.models.errors import DataError
from uknowpan.models.metrics.toolbox import MTF_REACH, interp23tap, mirror_index, mtf_filter
from uknowpan.models.resample import upsample
from uknowpan.models.training.degradations import Degradation, degrade_truth

T = TypeVar("T")

KEYS = ("pan", "ms", "lms")
IMAGES = (*KEYS, "gt")
PROBES = 8
"""Samples that opening a file looks into."""
REGISTRATIONS = ("area", "pancollection")
FULL_SCALES = (1e-9, 1e12)
"""What a full scale may be; float32 holds neither squares nor scores of the others."""
CHUNK_CACHE = 4 * 2**20
"""Bytes of HDF5 chunks kept per dataset and process; samples are drawn at random, so few help."""


@dataclass(frozen=True)
class PatchBatch:
    """Patches of reduced or full resolution."""

    pan: Tensor
    """(B, 1, H, W)"""
    ms: Tensor
    """(B, C, h, w)"""
    lms: Tensor
    """(B, C, H, W) MS interpolated to the PAN grid."""
    gt: Tensor | None = None
    """(B, C, H, W) truth; None at full resolution."""
    origin: Tensor | None = None
    """(B, 3) int64, on the CPU: the scene of each patch as numbered by
    `PanCollectionDataset.sources`, whether its rows and whether its columns were flipped; None
    for patches that no dataset drew."""

    def __len__(self) -> int:
        return len(self.pan)

    def map(self, function: Callable[[Tensor], Tensor]) -> PatchBatch:
        """The batch with every image replaced; `origin` stays."""
        there = {name: getattr(self, name) for name in IMAGES}
        return replace(self, **{k: function(v) for k, v in there.items() if v is not None})

    def to(self, *args: Any, **kwargs: Any) -> PatchBatch:
        """`torch.Tensor.to` for every image."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> PatchBatch:
        """In page-locked memory; a DataLoader asks for it."""
        return self.map(lambda x: x.pin_memory())

    @staticmethod
    def cat(items: Sequence[PatchBatch]) -> PatchBatch:
        """One batch of several; all with a truth or all without."""
        names = [f.name for f in fields(PatchBatch) if getattr(items[0], f.name) is not None]
        return PatchBatch(**{n: torch.cat([getattr(i, n) for i in items]) for n in names})


# ------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PanCollectionHeader:
    """What a file says of itself."""

    count: int
    bands: int
    ratio: int
    height: int
    """Of PAN, LMS and truth, in PAN pixels."""
    width: int
    has_gt: bool
    max_value: float | None
    """Full scale in DN; files of others do not say."""
    sensor: str | None
    registration: str
    """"pancollection" or "area", see `registration_of`."""


class HDF5Reader:
    """An HDF5 file that every process opens for itself, when it first reads."""

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
            self._handle, self._owner = _opened(self.path), os.getpid()
        return self._handle

    def _stacked(self, names: Iterable[str], indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Samples of several datasets; DataError where they cannot be read."""
        file = self._file()
        try:
            return {name: np.stack([np.asarray(file[name][index]) for index in indices]) for name in names}
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{self.path} is damaged, samples {list(indices)} cannot be read ({error}); get the file anew."
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class PanCollectionFile(HDF5Reader):
    """Random access to the samples of a file.

    Opening checks the header and looks into `PROBES` samples.

    Args:
        path: the file; entries other than those of the layout are passed over.
        needs_gt: refuse a file without truth.

    Attributes:
        header: what the file says of itself.
        sources: (N,) int64, the number of the scene that each sample was cut from; all 0 in files
            that do not say.

    Raises:
        DataError: no HDF5 file, a truncated one, or one of another layout.
    """

    def __init__(self, path: str | Path, *, needs_gt: bool = False):
        super().__init__(path)
        with _opened(self.path) as file:
            self.header = _header(self.path, file, needs_gt)
            self.sources = _sources(file, self.header.count)
        for probe in np.unique(np.linspace(0, self.header.count - 1, PROBES).astype(int)):
            self.read([int(probe)])
        self.close()  # before worker processes are forked

    def __len__(self) -> int:
        return self.header.count

    def read(self, indices: Sequence[int], dtype: torch.dtype = torch.float32) -> PatchBatch:
        """Samples in DN, in the order asked for.

        Raises:
            DataError: a sample is damaged or holds values that are not finite.
            IndexError: no such sample.
        """
        for index in indices:
            if not 0 <= index < len(self):
                raise IndexError(f"{self.path} holds samples 0 to {len(self) - 1}, not {index}")
        names = (*KEYS, "gt") if self.header.has_gt else KEYS
        stacks = self._stacked(names, indices)
        for name, values in stacks.items():
            bad = ~np.isfinite(values).all((1, 2, 3))
            if bad.any():
                raise DataError(
                    f"{self.path}: {name} of sample {indices[int(bad.argmax())]} holds NaN or "
                    "infinite values; leave such samples out."
                )
        return PatchBatch(**{name: torch.from_numpy(_plain(v)).to(dtype) for name, v in stacks.items()})


def _plain(values: np.ndarray) -> np.ndarray:
    """Of a type that torch has, in the machine's byte order."""
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def is_full_scale(value: float) -> bool:
    """Whether values can be divided by it: no NaN, no infinity, nothing absurd."""
    return FULL_SCALES[0] <= value <= FULL_SCALES[1]


def reason_of(error: BaseException) -> str:
    """Why HDF5 failed: the system's word for it where there is one, without HDF5's own details."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)


def _opened(path: str) -> Any:
    import h5py

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


def _header(path: str, file: Any, needs_gt: bool) -> PanCollectionHeader:
    """Everything that can be told without reading samples; DataError where it does not fit."""
    import h5py

    has_gt = "gt" in file
    names = (*KEYS, "gt") if has_gt or needs_gt else KEYS
    missing = [n for n in names if not isinstance(file.get(n), h5py.Dataset)]
    if missing:
        found = ", ".join(file) or "nothing"
        full = missing == ["gt"] and not has_gt
        why = " (a full-resolution file has no truth to learn from)" if full else ""
        raise DataError(f"{path} lacks {' and '.join(missing)}{why}; it holds {found}.")
    shapes = {name: file[name].shape for name in names}
    for name, shape in shapes.items():
        if len(shape) != 4:
            raise DataError(f"{path}: {name} has {len(shape)} axes {shape}, not the 4 of (N, C, H, W).")
        if file[name].dtype.kind not in "fiu":
            raise DataError(f"{path}: {name} holds {file[name].dtype}, not real numbers.")
    _check_shapes(path, shapes)
    count, bands, height, width = shapes["lms"]
    max_value = _number(file.attrs.get("max_value"))
    if max_value is not None and not is_full_scale(max_value):
        raise DataError(f"{path}: its max_value is {max_value:g}, which is no full scale.")
    registration = _text(file.attrs.get("registration", "pancollection"))
    if registration not in REGISTRATIONS:
        raise DataError(f"{path}: its registration is {registration!r}, not {' or '.join(REGISTRATIONS)}.")
    sensor = file.attrs.get("sensor")
    return PanCollectionHeader(
        count=count,
        bands=bands,
        ratio=height // shapes["ms"][2],
        height=height,
        width=width,
        has_gt=has_gt,
        max_value=max_value,
        sensor=None if sensor is None else _text(sensor),
        registration=registration,
    )


def _sources(file: Any, count: int) -> np.ndarray:
    """The first column of `place`, which `PanCollectionWriter` stores."""
    import h5py

    place = file.get("place")
    known = isinstance(place, h5py.Dataset) and place.dtype.kind in "iu" and place.ndim == 2
    if not known or len(place) != count or not place.shape[1]:
        return np.zeros(count, np.int64)
    return place[:, 0].astype(np.int64)


def _check_shapes(path: str, shapes: dict[str, tuple[int, ...]]) -> None:
    counts = {name: shape[0] for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise DataError(f"{path} holds different numbers of samples: {said}.")
    if min(min(shape) for shape in shapes.values()) == 0:
        raise DataError(f"{path} is empty: ms is {shapes['ms']}, pan is {shapes['pan']}.")
    if shapes["pan"][1] != 1:
        raise DataError(
            f"{path}: pan {shapes['pan']} has {shapes['pan'][1]} bands, not 1; the axes must be (N, C, H, W)."
        )
    for name in ("ms", "gt"):
        if name in shapes and shapes[name][1] != shapes["lms"][1]:
            raise DataError(f"{path}: {name} has {shapes[name][1]} bands, lms has {shapes['lms'][1]}.")
    size = shapes["pan"][2:]
    for name in ("lms", "gt"):
        if name in shapes and shapes[name][2:] != size:
            raise DataError(f"{path}: {name} is {_by(shapes[name])} pixels, pan is {_by(shapes['pan'])}.")
    h, w = shapes["ms"][2:]
    if size[0] % h or size[1] % w or size[0] // h != size[1] // w or size[0] // h < 2:
        raise DataError(
            f"{path}: pan is {_by(shapes['pan'])} pixels, ms is {_by(shapes['ms'])}, and their "
            "ratio is no whole number from 2 on, the same for rows and columns."
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


# ------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Draw:
    """A sample to be taken, and how it is turned."""

    sample: int
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def axes(self) -> list[int]:
        """The axes of (B, C, H, W) to turn over."""
        turns = ((-2, self.flip_rows), (-1, self.flip_columns))
        return [axis for axis, turn in turns if turn]


class PanCollectionDataset(Dataset[PatchBatch]):
    """The samples of one or several files as batches of one, divided by full scale.

    Args:
        files: alike in bands, ratio, patch size, registration and whether there is a truth.
        max_value: full scale in DN for files that do not say theirs; 2047 for 11 bits.

    Attributes:
        sources: (N,) int64, from 0: samples of one number were cut from the same scene, or lie in
            the same file if that does not say.

    Raises:
        DataError: files that differ, or a full scale that nobody said or that is none.
    """

    def __init__(self, files: Sequence[PanCollectionFile], *, max_value: float | None = None):
        if not files:
            raise DataError("No training file was given.")
        self.files = list(files)
        self.scales: list[float] = []
        for file in files:
            scale = file.header.max_value or max_value
            if scale is None:
                raise DataError(
                    f"{file.path} does not say its full scale; give the maximal value: 2047 for "
                    "WV2, WV3 and QB, 1023 for GF2."
                )
            if not is_full_scale(scale):
                raise DataError(f"{scale:g} is no full scale to divide {file.path} by.")
            self.scales.append(scale)
            for name in ("bands", "ratio", "height", "width", "has_gt", "registration"):
                first, here = getattr(files[0].header, name), getattr(file.header, name)
                if first != here:
                    raise DataError(f"{files[0].path} and {file.path} cannot be mixed: {name} is {first} and {here}.")
        self.starts = np.cumsum([0, *map(len, files)])
        numbers = [np.stack([np.full(len(f), i), f.sources], 1) for i, f in enumerate(files)]
        self.sources = np.unique(np.concatenate(numbers), axis=0, return_inverse=True)[1].ravel()

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, sample: int) -> tuple[int, int]:
        """Number of the file that a sample is in, and its number there.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"there are samples 0 to {len(self) - 1}, not {sample}")
        file = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return file, sample - int(self.starts[file])

    def __getitem__(self, draw: Draw | int) -> PatchBatch:
        if isinstance(draw, int):
            draw = Draw(draw)
        file, index = self.place(draw.sample)
        patch = self.files[file].read([index])
        turned = patch.map(lambda x: (x / self.scales[file]).flip(draw.axes))
        numbers = (self.sources[draw.sample], draw.flip_rows, draw.flip_columns)
        return replace(turned, origin=torch.tensor([[int(n) for n in numbers]]))

    @staticmethod
    def collate(items: Sequence[PatchBatch]) -> PatchBatch:
        """One batch of several samples."""
        return PatchBatch.cat(items)

    def close(self) -> None:
        """Let go of all files; the next read opens them again."""
        for file in self.files:
            file.close()


class PatchSampler:
    """Which samples a step takes: a function of (seed, step) alone, so that resuming is exact.

    The samples of all epochs, each epoch shuffled by (seed, epoch), form one endless row; step s
    takes the s-th `batch_size * world` of them. No sample is dropped: a batch may span epochs.

    Args:
        count: samples there are.
        batch_size: of one process.
        seed: of order and flips.
        flips: turn samples over at random. In the registration "pancollection" this moves the
            MS by one PAN pixel against LMS and truth, since its samples do not lie centred.
        rank: of this process.
        world: number of processes that share each step.
    """

    def __init__(
        self,
        count: int,
        *,
        batch_size: int,
        seed: int,
        flips: bool = False,
        rank: int = 0,
        world: int = 1,
    ):
        if min(count, batch_size, world) < 1 or not 0 <= rank < world:
            raise ValueError(f"{count} samples in batches of {batch_size} for process {rank} of {world}")
        self.count, self.batch_size, self.seed, self.flips = count, batch_size, seed, flips
        self.rank, self.world = rank, world
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def draws(self, step: int) -> list[Draw]:
        """The batch of a step."""
        first = (step * self.world + self.rank) * self.batch_size
        return [self._draw(place) for place in range(first, first + self.batch_size)]

    def _draw(self, place: int) -> Draw:
        order, turns = self._epoch(place // self.count)
        here = place % self.count
        return Draw(int(order[here]), bool(turns[here] & 1), bool(turns[here] & 2))

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)
        turns = rng.integers(4, size=self.count, dtype=np.uint8)
        return order, turns if self.flips else np.zeros_like(turns)


class Drawable(Protocol[T]):
    """A dataset that `PatchBatches` draws from."""

    def __getitem__(self, draw: Draw) -> T: ...

    def collate(self, items: Sequence[T]) -> T:
        """One batch of several samples."""

    def close(self) -> None:
        """Let go of all files; the next read opens them again."""


class PatchBatches(Generic[T]):
    """Batches as a function of the step, read here or by worker processes: the same ones."""

    def __init__(self, dataset: Drawable[T], sampler: PatchSampler):
        self.dataset, self.sampler = dataset, sampler

    def __call__(self, step: int) -> T:
        """The batch of a step, float32, divided by full scale."""
        return self.dataset.collate([self.dataset[draw] for draw in self.sampler.draws(step)])

    def stream(self, start: int, stop: int, *, workers: int = 0, pin_memory: bool = False) -> Iterator[T]:
        """The batches of steps `start` .. `stop` - 1 in order, read ahead by `workers`.

        Raises:
            DataError: a sample cannot be read, or the system killed a worker.
        """
        self.dataset.close()  # HDF5 must not be open across a fork
        steps: Iterable[list[Draw]] = _Steps(self.sampler, range(start, stop))
        loader: DataLoader[T] = DataLoader(
            self.dataset,  # type: ignore[arg-type]
            batch_sampler=steps,  # type: ignore[arg-type]
            collate_fn=self.dataset.collate,
            num_workers=workers,
            pin_memory=pin_memory,
        )
        try:
            yield from loader
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker (pid"):
                raise
            raise DataError(
                "A process that reads training data ahead was killed, perhaps for lack of memory; set fewer workers."
            ) from error


@dataclass(frozen=True)
class _Steps:
    sampler: PatchSampler
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(self.sampler.draws, self.steps)


# ------------------------------------------------------------------------------------- writing


class _Disk(io.RawIOBase):
    """A new file that HDF5 may write to on a full disk.

    HDF5 crashes the process when it cannot write what it must when closing. So what fails is kept
    in `error`, and nothing more is written.
    """

    def __init__(self, path: Path):
        self._raw = open(path, "w+b", buffering=0)  # noqa: SIM115
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view) and self.error is None:
            try:
                done += self._raw.write(view[done:])
            except OSError as error:
                self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return self._raw.truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self._raw.tell() if size is None else size

    def readinto(self, buffer: Any) -> int:
        return self._raw.readinto(buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def close(self) -> None:
        self._raw.close()
        super().close()


class PanCollectionWriter:
    """Appends patches to a new file: float32, compressed, one chunk per sample.

    All is written beside the target until it is published. Leaving the context before that
    removes everything.

    Raises:
        DataError: the file cannot be written, or the patches hold values that are not finite.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.count = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._disk: _Disk | None = None
        self._file: Any = None

    def append(self, patches: PatchBatch, places: np.ndarray) -> None:
        """Add patches in DN; `places` (B, 3) says of each (source, row, column), MS pixels."""
        import h5py

        arrays = {
            name: value.numpy().astype(np.float32) for name in IMAGES if (value := getattr(patches, name)) is not None
        }
        for name, values in arrays.items():
            if not np.isfinite(values).all():
                raise DataError(
                    f"{self.path} cannot be written: {name} would hold values that are not finite; "
                    "check the scenes' values and the PAN weights."
                )
        arrays["place"] = np.asarray(places, np.int32)
        with self._explained():
            if self._file is None:
                self._disk = _Disk(self._temporary)
                self._file = h5py.File(self._disk, "w")
            for name, values in arrays.items():
                self._extend(name, values)
        self.count += len(patches)

    def _extend(self, name: str, values: np.ndarray) -> None:
        one = values.shape[1:]
        if name not in self._file:
            small = name == "place"  # not worth a chunk for each sample
            self._file.create_dataset(
                name,
                shape=(0, *one),
                maxshape=(None, *one),
                dtype=values.dtype,
                chunks=(256 if small else 1, *one),
                compression="gzip",
                shuffle=True,
            )
        stored = self._file[name]
        stored.resize(self.count + len(values), axis=0)
        stored[self.count :] = values

    def finish(self, attributes: dict[str, Any]) -> None:
        """Complete the file under its temporary name."""
        with self._explained():
            self._file.attrs.update(attributes)
            self._let_go()

    def publish(self) -> None:
        """Put the finished file in place of the target."""
        with self._explained():
            os.replace(self._temporary, self.path)

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
        self._temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------ Wald's protocol

LMS_REACH = 10
"""MS pixels that an interpolated pixel depends on, at ratio 8 and below."""


def registration_of(ratio: int) -> str:
    """Where the MS lies in simulated data, as a checkpoint's card names it.

    "pancollection": MS sample i at truth index ratio * i + ratio // 2, for powers of two, which
    the toolbox's interpolator enlarges by. "area": at ratio * i + (ratio - 1) / 2.
    """
    return "pancollection" if ratio & (ratio - 1) == 0 else "area"


def wald_margin(ratio: int) -> int:
    """Reduced MS pixels around it that a simulated patch depends on."""
    return LMS_REACH + -(-MTF_REACH // ratio) + 1


def wald_ms(gt: Tensor, gains: Sequence[float], ratio: int) -> Tensor:
    """The reduced MS of a truth: blurred by the sensor's MTF and sampled.

    Args:
        gt: (C, H, W), multiples of the ratio.
        gains: MTF gain at the MS Nyquist frequency, one per band.
        ratio: of the registration that `registration_of` says.

    Returns:
        (C, H / ratio, W / ratio) float64.
    """
    if registration_of(ratio) == "area":
        return degrade_truth(gt.double(), Degradation(ratio, "gaussian", tuple(gains)))
    first = ratio // 2
    return mtf_filter(gt, gains, ratio)[..., first::ratio, first::ratio]


def wald_lms(ms: Tensor, ratio: int) -> Tensor:
    """The reduced MS enlarged again: `interp23tap`, or cubic for ratios that it does not know.

    The toolbox's interpolator wraps around at the borders of a scene; here they are mirrored.

    Args:
        ms: (C, h, w).

    Returns:
        (C, ratio * h, ratio * w) float64.
    """
    if registration_of(ratio) == "area":
        return upsample(ms.double()[None], ratio)[0]
    rows, columns = (mirror_index(n, LMS_REACH, LMS_REACH) for n in ms.shape[-2:])
    # Band by band: the convolutions of all at once took a gigabyte for 8 x 640 x 640.
    wide = torch.stack([interp23tap(band[rows][:, columns], ratio) for band in ms])
    inner = slice(LMS_REACH * ratio, -LMS_REACH * ratio)
    return wide[..., inner, inner]
