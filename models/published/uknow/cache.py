"""A teacher's answers kept in a file, so that training a student need not ask again.

A cache is an HDF5 file with the keys of U-Know-DiffPAN (CVPR 2025): ``sr`` and ``var_map``
(N, C, H, W) and ``dist_feat0`` .. ``dist_feat5`` (N, c, h, w), one chunk per sample in the order
of the data file. `sr` and `var_map` are float32, since float16 holds neither a variance of 1e-6
nor 11 bits. The features, nearly all of the bytes, are float16 by default.
"""

import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from uknowpan.durable import place, seal
from uknowpan.models.errors import DataError
from uknowpan.models.pancollection.dataset import Draw, PanCollectionDataset
from uknowpan.models.pancollection.file import (
    HDF5Reader,
    PanCollectionFile,
    PanCollectionHeader,
    check_stored,
    damage_explained,
    reason_of,
)
from uknowpan.models.published.uknow.distillation import FrozenTeacher, TeacherAnswer, feature_shapes
from uknowpan.models.types import PatchBatch

log = logging.getLogger("uknowpan")

FORMAT = "uknowpan-distill-1"
NAMES = ("sr", "var_map", *(f"dist_feat{i}" for i in range(6)))
ATTRIBUTES = ("teacher", "teacher_sha256", "steps", "seed", "scale", "data", "data_file")
"""Attributes of a cache, beside its format and its counts of samples."""
OVERHEAD = 2**16
"""Bytes of a small cache beside its samples."""
FeatureDtype = Literal["float16", "float32"]
Layout = dict[str, tuple[tuple[int, ...], np.dtype]]
"""Dataset -> shape and type of one sample."""


def _layout(teacher: FrozenTeacher, header: PanCollectionHeader, dtype: FeatureDtype) -> Layout:
    image = (header.bands, header.height, header.width), np.dtype(np.float32)
    shapes = feature_shapes(teacher.model.config.teacher, header.height, header.width)
    parts = [image, image, *((shape, np.dtype(dtype)) for shape in shapes)]
    return dict(zip(NAMES, parts, strict=True))


def bytes_per_sample(teacher: FrozenTeacher, header: PanCollectionHeader, dtype: FeatureDtype = "float16") -> int:
    """Bytes of a sample in a cache."""
    layout = _layout(teacher, header, dtype).values()
    return sum(int(np.prod(shape)) * kind.itemsize for shape, kind in layout)


def part_of(out: Path) -> Path:
    """Path of an unfinished cache; where `out` is a link, beside the file that it points to."""
    out = Path(os.path.realpath(out))
    return out.with_name(f".{out.name}.part")


def _fingerprint(file: PanCollectionFile) -> str:
    """A text that distinguishes data files, from their header, first and last sample."""
    header, crc = file.header, 0
    ends = file.read([0, len(file) - 1])
    for field in fields(ends):
        if (value := getattr(ends, field.name)) is not None:
            crc = zlib.crc32(value.numpy().tobytes(), crc)
    size = f"{header.bands} x {header.height} x {header.width}"
    return f"{header.count} x {size}, ratio {header.ratio}, crc {crc:08x}"


def write_cache(
    teacher: FrozenTeacher,
    file: PanCollectionFile,
    scale: float,
    out: Path,
    *,
    batch_size: int = 16,
    dtype: FeatureDtype = "float16",
    resume: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Write the teacher's answers to all samples of a file.

    The cache grows as `part_of(out)`, a batch at a time, and is renamed when it is complete. The
    samples counted as done are whole however a run ends. A run with `resume` goes on after them,
    and with the same batch size arrives at the same numbers.

    Args:
        teacher: the frozen teacher.
        file: the training data.
        scale: full scale in DN that samples are divided by, see `PanCollectionDataset.scales`.
        out: the cache; an existing one is replaced.
        batch_size: samples per batch, which memory depends on.
        dtype: type of the features.
        resume: go on with an unfinished cache, if there is one.
        on_progress: called with (samples done, all samples) after every batch.
        should_stop: asked after every batch; True keeps the unfinished cache and returns.

    Returns:
        The number of samples done: fewer than the file has after a stop.

    Raises:
        DataError: the data cannot be read, the cache cannot be written or was begun with other
            data or settings, or the features' type cannot hold the answers.
        ModelMismatch: the teacher was not trained for such data.
    """
    teacher.check_serves(file)
    layout, count = _layout(teacher, file.header, dtype), len(file)
    settings = {
        **{"format": FORMAT, "teacher_sha256": teacher.digest, "steps": teacher.steps, "seed": teacher.seed},
        **{"scale": scale, "feature_dtype": dtype, "data": _fingerprint(file)},
    }
    names = {"teacher": teacher.card.name, "data_file": Path(file.path).name, "count": count}
    part = part_of(out)
    with _explained(part):
        store = _unfinished(part, resume, layout, count, settings)
        if store is None:
            _reserve(part, count * bytes_per_sample(teacher, file.header, dtype) + OVERHEAD, anew=True)
            store = _begun(part, layout, count, {**names, **settings})
        try:
            _reserve(part, part.stat().st_size)
            for done in _batches(store, layout, teacher, file, batch_size):
                if on_progress is not None:
                    on_progress(done, count)
                if done < count and should_stop():
                    return done
        finally:
            with suppress(OSError, RuntimeError):  # the disk may be full
                store.close()
        target = Path(os.path.realpath(out))
        seal(part, target)
        place(part, target)
    return count


def _batches(
    store: Any, layout: Layout, teacher: FrozenTeacher, file: PanCollectionFile, batch_size: int
) -> Iterator[int]:
    """Write the missing samples batch by batch; yields the number of samples done."""
    done, count, scale = int(store.attrs["done"]), len(file), float(store.attrs["scale"])
    while done < count:
        stop = min(done + batch_size, count)
        patches = file.read(range(done, stop)).map(lambda x: x / scale)
        _put(store, layout, done, teacher.answer(patches))
        # Samples must be in the file before they are counted.
        store.flush()
        store.attrs.modify("done", np.int64(stop))
        store.flush()
        done = stop
        yield done


@contextmanager
def _explained(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{part} cannot be written ({reason_of(error)}); make room or choose another folder."
        ) from error


def _reserve(part: Path, size: int, anew: bool = False) -> None:
    """Reserve the bytes of a file on the disk: HDF5 crashes the process on a full one.

    anew: the file is made, so that a link that somebody put in its place is not followed.
    """
    if anew:
        part.unlink(missing_ok=True)
    if not hasattr(os, "posix_fallocate"):  # Windows, macOS
        return
    descriptor = os.open(part, os.O_RDWR | (os.O_CREAT | os.O_EXCL if anew else 0), 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        if anew:
            part.unlink()
        raise
    finally:
        os.close(descriptor)


def _unfinished(part: Path, resume: bool, layout: Layout, count: int, settings: dict[str, Any]) -> Any:
    """An unfinished cache to go on with, opened for writing; None: begin anew."""
    import h5py

    if part.is_symlink() or not part.exists():
        return None
    store = None
    try:
        store = h5py.File(part, "r+")
        if not resume:
            store.close()
            return None
        if store.attrs.get("format") != FORMAT or "done" not in store.attrs:
            raise ValueError("it never got as far as a first sample")
        _refuse_other(part, dict(store.attrs), settings)
        for name, (shape, kind) in layout.items():
            if store[name].shape != (count, *shape) or store[name].dtype != kind:
                raise ValueError(f"{name} is {store[name].dtype} {store[name].shape}")
        if not 0 <= int(store.attrs["done"]) <= count:
            raise ValueError(f"{store.attrs['done']} of {count} samples are done")
        return store
    except BaseException as error:
        if store is not None:
            store.close()
        if isinstance(error, BlockingIOError):
            raise DataError(
                f"{part} is being written by another process; wait for it, or name another file."
            ) from error
        if not isinstance(error, (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)):
            raise
        log.warning("%s is damaged (%s) and is begun anew", part, error)
        return None


def _begun(part: Path, layout: Layout, count: int, attributes: dict[str, Any]) -> Any:
    """An empty cache for `count` samples, which can be opened even if it is killed at any moment.

    The place of every chunk is fixed and on disk before the first sample comes. This version of the
    format marks no file as being written.
    """
    import h5py

    store = h5py.File(part, "w", libver=("earliest", "v108"))
    try:
        for name, (shape, kind) in layout.items():
            early = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            early.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            store.create_dataset(name, (count, *shape), kind, chunks=(1, *shape), dcpl=early, fill_time="never")
        store.flush()
        store.attrs.update(attributes)
        store.attrs["done"] = np.int64(0)
        store.flush()
    except BaseException:
        store.close()
        raise
    return store


def _refuse_other(part: Path, stored: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, here in settings.items():
        if stored.get(name) != here:
            raise DataError(
                f"{part} was begun with {name} {stored.get(name)}, not {here}; go on with what it "
                "was begun with, or begin anew without --resume."
            )


def _put(store: Any, layout: Layout, start: int, answer: TeacherAnswer) -> None:
    tensors = (answer.sr, answer.variance, *answer.features)
    for (name, (_, kind)), tensor in zip(layout.items(), tensors, strict=True):
        with np.errstate(over="ignore"):
            values = tensor.cpu().numpy().astype(kind)
        if not np.isfinite(values).all():
            whole = bool(tensor.isfinite().all())
            hint = "they are too large: use --dtype float32" if whole else "train it anew"
            raise DataError(
                f"the teacher's {name} of samples {start} to {start + len(values) - 1} is not finite in {kind}; {hint}."
            )
        store[name][start : start + len(values)] = values


class CacheFile(HDF5Reader):
    """Random access to a teacher's answers.

    Raises:
        DataError: the file is no cache, or an unfinished or damaged one.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        with damage_explained(path):
            self._read_header(self._file())
        self.close()  # before worker processes are forked

    def _read_header(self, file: Any) -> None:
        """Attributes and shapes, checked."""
        path = self.path
        self.attributes: dict[str, Any] = dict(file.attrs)
        if self.attributes.get("format") != FORMAT:
            raise DataError(f"{path} is no cache made by `uknowpan distill-cache`.")
        missing = [n for n in NAMES if getattr(file.get(n), "dtype", np.dtype("V1")).kind != "f"]
        missing += [name for name in ATTRIBUTES if name not in self.attributes]
        if not isinstance(self.attributes.get("scale", 1.0), int | float | np.number):
            missing.append("a scale")
        if missing:
            raise DataError(f"{path} lacks {' and '.join(missing)}; write the cache anew.")
        for name in NAMES:
            check_stored(path, file[name])
        self.shapes: dict[str, tuple[int, ...]] = {n: file[n].shape for n in NAMES}
        numbers = [self.attributes.get(name) for name in ("count", "done")]
        count, done = (int(n) if isinstance(n, int | np.integer) else -1 for n in numbers)
        for name, shape in self.shapes.items():
            if len(shape) != 4 or shape[0] != count or 0 in shape:
                raise DataError(
                    f"{self.path}: {name} has the shape {shape}, not (N, C, H, W) of {count} "
                    "samples; write the cache anew."
                )
        if self.shapes["sr"] != self.shapes["var_map"]:
            raise DataError(
                f"{self.path}: sr is {self.shapes['sr']}, var_map {self.shapes['var_map']}; write the cache anew."
            )
        if any(n > m for shape in self.shapes.values() for n, m in zip(shape[2:], self.shapes["sr"][2:], strict=True)):
            raise DataError(f"{self.path}: features are larger than the images; write the cache anew.")
        if done != count:
            raise DataError(
                f"{self.path} has {done} of {count} samples; let `uknowpan distill-cache --resume` complete it."
            )

    def __len__(self) -> int:
        return self.shapes["sr"][0]

    def read(self, indices: Sequence[int]) -> TeacherAnswer:
        """Answers in float32, in the order of `indices`; DataError where a sample is damaged or not finite."""
        stacks = self._samples(NAMES, indices, len(self), "write the cache anew").values()
        sr, variance, *features = (torch.from_numpy(v.astype(np.float32)) for v in stacks)
        return TeacherAnswer(sr, variance, tuple(features))

    def check_matches(self, file: PanCollectionFile) -> None:
        """Refuse data that the cache was not made from."""
        here, made_from = _fingerprint(file), self.attributes.get("data")
        file.close()
        shape = (file.header.count, file.header.bands, file.header.height, file.header.width)
        if here != made_from or self.shapes["sr"] != shape:
            raise DataError(
                f"{self.path} was made from {self.attributes.get('data_file')} ({made_from}), not from "
                f"{file.path} ({here}); write a cache of this file."
            )


class CachedDataset(Dataset[tuple[PatchBatch, TeacherAnswer]]):
    """Samples with the teacher's answers to them; a flip applies to both.

    The teacher answered patches as they are stored: a flipped answer differs from the answer to a flipped patch.

    Args:
        patches: the samples.
        caches: one for each file of the samples, in the same order.

    Raises:
        DataError: caches of other data, of another full scale, or of different teachers.
    """

    def __init__(self, patches: PanCollectionDataset, caches: Sequence[CacheFile]):
        self.patches, self.caches = patches, list(caches)
        if len(caches) != len(patches.files):
            raise DataError(
                f"{len(caches)} caches for {len(patches.files)} training files; give one for each, in the same order."
            )
        for file, scale, cache in zip(patches.files, patches.scales, self.caches, strict=True):
            cache.check_matches(file)
            if cache.attributes["scale"] != scale:
                raise DataError(
                    f"{cache.path} was made at a full scale of {cache.attributes['scale']:g}, but "
                    f"{file.path} is used at {scale:g}; give the same maximal value."
                )
            for name in ("teacher_sha256", "steps", "seed"):
                first, here = self.caches[0].attributes[name], cache.attributes[name]
                if first != here:
                    raise DataError(
                        f"{self.caches[0].path} and {cache.path} cannot be mixed: {name} is {first} and {here}."
                    )

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, draw: Draw | int) -> tuple[PatchBatch, TeacherAnswer]:
        if isinstance(draw, int):
            draw = Draw(draw)
        file, index = self.patches.place(draw.sample)
        return self.patches[draw], self.caches[file].read([index]).flip(draw.axes)

    @staticmethod
    def collate(items: Sequence[tuple[PatchBatch, TeacherAnswer]]) -> tuple[PatchBatch, TeacherAnswer]:
        """One batch of several samples."""
        patches, answers = zip(*items, strict=True)
        return PatchBatch.cat(patches), TeacherAnswer.cat(answers)

    def close(self) -> None:
        """Let go of all files; the next read opens them again."""
        self.patches.close()
        for cache in self.caches:
            cache.close()
