"""What the teacher tells the student: asked on the fly, or answered once and kept in a file.

A cache is an HDF5 file with the keys of U-Know-DiffPAN (CVPR 2025): ``sr`` and ``var_map``
(N, C, H, W) and ``dist_feat0`` .. ``dist_feat5`` (N, c, h, w), one chunk per sample in the order
of the data file. `sr` and `var_map` are float32, since float16 holds neither a variance of 1e-6
nor 11 bits; the features, nearly all of the bytes, are float16 unless told otherwise.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from uknowpan.models.checkpoints import Card, load_model, sha256
from uknowpan.models.diffusion import NoiseSchedule, position_noise
from uknowpan.models.errors import CheckpointError, DataError, ModelMismatch
from uknowpan.models.pancollection.dataset import Draw, PanCollectionDataset
from uknowpan.models.pancollection.file import HDF5Reader, PanCollectionFile, PanCollectionHeader, PatchBatch, reason_of
from uknowpan.models.published.uknow.guided import GuidedTeacher
from uknowpan.models.published.uknow.teacher import TeacherConfig

log = logging.getLogger("uknowpan")

FORMAT = "uknowpan-distill-1"
ATTRIBUTES = ("teacher", "teacher_sha256", "steps", "seed", "scale", "data", "data_file")
"""What a cache says of itself beside its format, and how many samples it has and will have."""
OVERHEAD = 2**16
"""Bytes of a small cache beside its samples."""
FeatureDtype = Literal["float16", "float32"]


@dataclass(frozen=True)
class TeacherAnswer:
    """What the teacher says of a batch of patches."""

    sr: Tensor
    """(B, C, H, W) the sharp image in the units of lms, about [0, 1], not clipped."""
    variance: Tensor
    """(B, C, H, W) of its error, in their square."""
    features: tuple[Tensor, ...]
    """Six tensors (B, c, h, w), see `FSATeacher.forward`; of the last step."""

    def __len__(self) -> int:
        return len(self.sr)

    def map(self, function: Callable[[Tensor], Tensor]) -> TeacherAnswer:
        """The answer with every tensor replaced."""
        features = tuple(function(x) for x in self.features)
        return TeacherAnswer(function(self.sr), function(self.variance), features)

    def to(self, *args: Any, **kwargs: Any) -> TeacherAnswer:
        """`torch.Tensor.to` for every tensor."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def pin_memory(self) -> TeacherAnswer:
        """In page-locked memory; a DataLoader asks for it."""
        return self.map(lambda x: x.pin_memory())

    def flip(self, axes: Sequence[int]) -> TeacherAnswer:
        """Turned over along rows (-2) and columns (-1)."""
        return self.map(lambda x: x.flip(list(axes)))

    @staticmethod
    def cat(items: Sequence[TeacherAnswer]) -> TeacherAnswer:
        """One batch of several."""
        features = zip(*(item.features for item in items), strict=True)
        return TeacherAnswer(
            torch.cat([item.sr for item in items]),
            torch.cat([item.variance for item in items]),
            tuple(torch.cat(same) for same in features),
        )


# ------------------------------------------------------------------------------------- asking


class FrozenTeacher:
    """A trained teacher that answers and learns no more.

    Every patch starts from the same noise, a function of the seed: it gets the same answer at
    any step, in any batch and from a cache.

    Args:
        source: a checkpoint file, or a network with its card; the network is moved and frozen.
        steps: network evaluations per answer.
        seed: of the noise.
        device: where it runs.

    Raises:
        CheckpointError: no readable checkpoint, or one whose card lacks the residual's scale.
        ModelMismatch: a checkpoint of something other than a teacher.
        ValueError: a number of steps that the schedule has not.
    """

    def __init__(
        self,
        source: str | Path | tuple[GuidedTeacher, Card],
        *,
        steps: int = 1,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.path = None if isinstance(source, tuple) else Path(source)
        model, self.card = source if isinstance(source, tuple) else load_model(source)
        if not isinstance(model, GuidedTeacher):
            raise ModelMismatch(
                f"{self.card.name} is of the architecture {self.card.architecture}, which teaches "
                "nobody; give a teacher (fsa-t)."
            )
        self.bands = model.config.teacher.bands
        if len(self.card.residual_std) != self.bands:
            raise CheckpointError(
                f"the card of {self.card.name} has {len(self.card.residual_std)} values of "
                f"residual_std, not one for each of {self.bands} bands; train the teacher anew."
            )
        self.schedule = NoiseSchedule.cosine()
        self.schedule.respace(steps)
        self.steps, self.seed, self.device = steps, seed, torch.device(device)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._unit = torch.tensor(self.card.residual_std, device=self.device)[:, None, None]

    @cached_property
    def sha256(self) -> str:
        """Digest of the checkpoint file; without one, of card and weights."""
        if self.path is not None:
            return sha256(self.path)
        digest = hashlib.sha256(json.dumps(asdict(self.card), sort_keys=True).encode())
        for name, weight in self.model.state_dict().items():
            digest.update(name.encode() + weight.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def answer(self, batch: PatchBatch, noise: Tensor | None = None) -> TeacherAnswer:
        """What it says of patches divided by full scale, on its own device.

        In float32 even under autocast: the phases of its Fourier transforms jump at pi.

        Args:
            batch: B patches; pan and lms are looked at.
            noise: (B, C, H, W) standard normal, in place of its own.

        Raises:
            ModelMismatch: patches of other bands, or of a size that it cannot take.
        """
        lms, pan = (x.to(self.device, torch.float32) for x in (batch.lms, batch.pan))
        count, bands, height, width = lms.shape
        self._check(bands, height, width)
        if noise is None:
            noise = position_noise(self.seed, 0, 0, height, width, bands, self.device)
            noise = noise.expand(count, -1, -1, -1)
        with torch.autocast(self.device.type, enabled=False):
            said = self.model.sample(
                lms,
                pan,
                steps=self.steps,
                schedule=self.schedule,
                noise=noise.to(lms),
                self_conditioning=self.card.self_conditioning,
            )
        assert said.log_sigma is not None
        sigma = self._unit * said.log_sigma.exp()
        return TeacherAnswer(lms + self._unit * said.x0, sigma.square(), said.features)

    def check_serves(self, header: PanCollectionHeader) -> None:
        """Refuse data of a kind that the teacher never saw.

        Raises:
            ModelMismatch: other bands, another ratio, or a size that it cannot take.
        """
        self._check(header.bands, header.height, header.width)
        if header.ratio not in self.card.ratios:
            known = ", ".join(map(str, self.card.ratios))
            raise ModelMismatch(
                f"the teacher {self.card.name} serves the ratio {known}, but the data's is "
                f"{header.ratio}; use one that was trained on such data."
            )

    def _check(self, bands: int, height: int, width: int) -> None:
        if bands != self.bands:
            raise ModelMismatch(
                f"the teacher {self.card.name} serves {self.bands} bands, but the patches have "
                f"{bands}; use one that was trained on such data."
            )
        factor = self.model.config.teacher.factor
        if height % factor or width % factor:
            raise ModelMismatch(
                f"patches of {height} x {width} pixels, but the teacher {self.card.name} needs "
                f"multiples of {factor}; cut the data anew."
            )


def feature_shapes(config: TeacherConfig, height: int, width: int) -> list[tuple[int, int, int]]:
    """(c, h, w) of a teacher's features for patches of so many PAN pixels."""
    last = len(config.multipliers) - 1
    levels = [*range(last), *range(last, 0, -1)]  # what enters each Down, then each Up
    h, w = height // config.patch, width // config.patch
    return [(config.width * config.multipliers[n], h >> n, w >> n) for n in levels]


# ------------------------------------------------------------------------------------- writing

Layout = dict[str, tuple[tuple[int, ...], np.dtype]]


def _layout(teacher: FrozenTeacher, header: PanCollectionHeader, dtype: FeatureDtype) -> Layout:
    """Dataset -> shape and type of one sample."""
    image = (header.bands, header.height, header.width), np.dtype(np.float32)
    shapes = feature_shapes(teacher.model.config.teacher, header.height, header.width)
    features = {f"dist_feat{i}": (shape, np.dtype(dtype)) for i, shape in enumerate(shapes)}
    return {"sr": image, "var_map": image, **features}


def bytes_per_sample(teacher: FrozenTeacher, header: PanCollectionHeader, dtype: FeatureDtype = "float16") -> int:
    """What a sample takes in a cache."""
    layout = _layout(teacher, header, dtype).values()
    return sum(int(np.prod(shape)) * kind.itemsize for shape, kind in layout)


def part_of(out: Path) -> Path:
    """Where a cache grows until it is complete."""
    return out.with_name(f".{out.name}.part")


def _fingerprint(file: PanCollectionFile) -> str:
    """What tells a data file from others without reading all of it."""
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

    The cache grows under the name that `part_of` says, a batch at a time, and gets its own when
    it is complete. However a run ends, what it had counted as done is whole: with `resume` a
    later one goes on there, and with the same batch size arrives at the same numbers.

    Args:
        teacher: who is asked.
        file: the training data.
        scale: full scale in DN that samples are divided by, see `PanCollectionDataset.scales`.
        out: the cache; one that is there is replaced.
        batch_size: samples per batch, which memory depends on.
        dtype: of the features.
        resume: go on with what an earlier run left; without it, or with nothing there, begin.
        on_progress: called with (samples done, all samples) after every batch.
        should_stop: asked after every batch; True keeps the part and returns.

    Returns:
        How many samples are done: fewer than the file has after a stop.

    Raises:
        DataError: data that cannot be read, a cache that cannot be written or was begun with
            other data or settings, or answers that the features' type cannot hold.
        ModelMismatch: the teacher does not serve such data.
    """
    teacher.check_serves(file.header)
    layout, count = _layout(teacher, file.header, dtype), len(file)
    settings = {
        "format": FORMAT,
        "teacher_sha256": teacher.sha256,
        "steps": teacher.steps,
        "seed": teacher.seed,
        "scale": scale,
        "feature_dtype": dtype,
        "data": _fingerprint(file),
    }
    names = {"teacher": teacher.card.name, "data_file": Path(file.path).name, "count": count}
    part = part_of(out)
    with _explained(part):
        store = _left(part)
        if store is not None and not resume:
            store.close()
            store = None
        if store is None:
            _reserve(part, count * bytes_per_sample(teacher, file.header, dtype) + OVERHEAD)
            store = _begun(part, layout, count, {**names, **settings})
        try:
            _refuse_other(part, dict(store.attrs), settings)
            _reserve(part, part.stat().st_size)
            done = int(store.attrs["done"])
            while done < count:
                stop = min(done + batch_size, count)
                patches = file.read(range(done, stop)).map(lambda x: x / scale)
                _put(store, layout, done, teacher.answer(patches))
                # What is counted must be in the file before the count is.
                store.flush()
                store.attrs.modify("done", np.int64(stop))
                store.flush()
                done = stop
                if on_progress is not None:
                    on_progress(done, count)
                if done < count and should_stop():
                    return done
        finally:
            with suppress(OSError, RuntimeError):  # the disk may be full
                store.close()
        os.replace(part, out)
    return count


@contextmanager
def _explained(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{part} cannot be written ({reason_of(error)}); make room or choose another folder."
        ) from error


def _reserve(part: Path, size: int) -> None:
    """Have the disk keep so many bytes for a file: HDF5 crashes the process on one that is full."""
    if not hasattr(os, "posix_fallocate"):  # Windows, macOS
        return
    new = not part.exists()
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError:
        if new:
            part.unlink()
        raise
    finally:
        os.close(descriptor)


def _left(part: Path) -> Any:
    """What an earlier run left, opened for writing; None without it or if it is damaged."""
    import h5py

    if not part.exists():
        return None
    try:
        store = h5py.File(part, "r+")
    except BlockingIOError as error:
        raise DataError(f"{part} is being written by another process; wait for it, or name another file.") from error
    except (OSError, RuntimeError) as error:
        log.warning("%s is damaged (%s) and is begun anew", part, error)
        return None
    if store.attrs.get("format") == FORMAT and "done" in store.attrs:
        return store
    store.close()
    log.warning("%s never got as far as a first sample and is begun anew", part)
    return None


def _begun(part: Path, layout: Layout, count: int, attributes: dict[str, Any]) -> Any:
    """An empty cache for `count` samples.

    The place of every chunk is fixed and on disk before the first sample comes, and this version
    of the format marks no file as being written: killed at any moment, it can be opened.
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


def _refuse_other(part: Path, there: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, here in settings.items():
        if there.get(name) != here:
            raise DataError(
                f"{part} was begun with {name} {there.get(name)}, not {here}; go on with what it "
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


# ------------------------------------------------------------------------------------- reading


class CacheFile(HDF5Reader):
    """Random access to a teacher's answers.

    Raises:
        DataError: no cache, an unfinished one, or one with a damaged layout.
    """

    def __init__(self, path: str | Path):
        super().__init__(path)
        file = self._file()
        self.attributes: dict[str, Any] = dict(file.attrs)
        if self.attributes.get("format") != FORMAT:
            raise DataError(f"{path} is no cache made by `uknowpan distill-cache`.")
        self.names = ["sr", "var_map", *(f"dist_feat{i}" for i in range(6))]
        missing = [n for n in self.names if getattr(file.get(n), "dtype", np.dtype("V1")).kind != "f"]
        missing += [name for name in ATTRIBUTES if name not in self.attributes]
        if not isinstance(self.attributes.get("scale", 1.0), int | float | np.number):
            missing.append("a scale")
        if missing:
            raise DataError(f"{path} lacks {' and '.join(missing)}; write the cache anew.")
        self.shapes: dict[str, tuple[int, ...]] = {n: file[n].shape for n in self.names}
        self._check()
        self.close()  # before worker processes are forked

    def _check(self) -> None:
        count, done = (_whole(self.attributes.get(name)) for name in ("count", "done"))
        for name, shape in self.shapes.items():
            if len(shape) != 4 or shape[0] != count:
                raise DataError(
                    f"{self.path}: {name} has the shape {shape}, not (N, C, H, W) of {count} "
                    "samples; write the cache anew."
                )
        if self.shapes["sr"] != self.shapes["var_map"]:
            raise DataError(
                f"{self.path}: sr is {self.shapes['sr']}, var_map {self.shapes['var_map']}; write the cache anew."
            )
        if done != count:
            raise DataError(
                f"{self.path} has {done} of {count} samples; let `uknowpan distill-cache --resume` complete it."
            )

    def __len__(self) -> int:
        return self.shapes["sr"][0]

    def read(self, indices: Sequence[int]) -> TeacherAnswer:
        """Answers in float32, in the order asked for.

        Raises:
            DataError: a sample is damaged or holds values that are not finite.
            IndexError: no such sample.
        """
        found = self._samples(self.names, indices, len(self), "write the cache anew")
        stacks = found.values()
        sr, variance, *features = (torch.from_numpy(v.astype(np.float32)) for v in stacks)
        return TeacherAnswer(sr, variance, tuple(features))

    def check_matches(self, file: PanCollectionFile) -> None:
        """Refuse to be used with other data than it was made from.

        Raises:
            DataError: the data differ.
        """
        here, there = _fingerprint(file), self.attributes.get("data")
        file.close()
        shape = (file.header.count, file.header.bands, file.header.height, file.header.width)
        if here != there or self.shapes["sr"] != shape:
            raise DataError(
                f"{self.path} was made from {self.attributes.get('data_file')} ({there}), not from "
                f"{file.path} ({here}); write a cache of this file."
            )


def _whole(value: Any) -> int:
    """An attribute as a whole number; -1 where it is none."""
    return int(value) if isinstance(value, int | np.integer) else -1


class CachedDataset(Dataset[tuple[PatchBatch, TeacherAnswer]]):
    """Samples with the teacher's answers to them; a flip turns over both.

    The teacher was asked about patches as they are stored: turning its answer over is not asking
    it about a patch turned over.

    Args:
        dataset: the samples.
        caches: one for each of its files, in their order.

    Raises:
        DataError: caches of other data, of another full scale, or of different teachers.
    """

    def __init__(self, dataset: PanCollectionDataset, caches: Sequence[CacheFile]):
        self.patches, self.caches = dataset, list(caches)
        if len(self.caches) != len(dataset.files):
            raise DataError(
                f"{len(self.caches)} caches for {len(dataset.files)} training files; give one for "
                "each, in the same order."
            )
        for file, scale, cache in zip(dataset.files, dataset.scales, self.caches, strict=True):
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
    def collate(
        items: Sequence[tuple[PatchBatch, TeacherAnswer]],
    ) -> tuple[PatchBatch, TeacherAnswer]:
        """One batch of several samples."""
        patches, answers = zip(*items, strict=True)
        return PatchBatch.cat(patches), TeacherAnswer.cat(answers)

    def close(self) -> None:
        """Let go of all files; the next read opens them again."""
        self.patches.close()
        for cache in self.caches:
            cache.close()
