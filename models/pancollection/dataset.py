"""Drawing batches from PanCollection's files, as a function of the training step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from uknowpan.models.errors import DataError
from uknowpan.models.pancollection.file import PanCollectionFile
from uknowpan.models.training.bounds import is_full_scale
from uknowpan.models.training.parallel import read_ahead
from uknowpan.models.types import PatchBatch


@dataclass(frozen=True)
class Draw:
    """The number of a sample, and how it is flipped."""

    sample: int
    flip_rows: bool = False
    flip_columns: bool = False

    @property
    def axes(self) -> list[int]:
        """The axes of (B, C, H, W) to flip."""
        flips = ((-2, self.flip_rows), (-1, self.flip_columns))
        return [axis for axis, flip in flips if flip]


class PanCollectionDataset(Dataset[PatchBatch]):
    """The samples of one or several files as batches of one, divided by full scale.

    Args:
        files: alike in bands, ratio, patch size, registration and whether there is a truth.
        max_value: full scale in DN for files that declare none, also in place of that of the sensor in their name.

    Attributes:
        sources: (N,) int64, from 0: samples of one number were cut from the same scene, or lie in
            the same file where the file does not declare scenes.

    Raises:
        DataError: files that differ, or a full scale that is missing, none, or contradicted by a file.
    """

    def __init__(self, files: Sequence[PanCollectionFile], *, max_value: float | None = None):
        if not files:
            raise DataError("No training file was given.")
        self.files = list(files)
        self.scales: list[float] = []
        for file in files:
            header = file.header
            scale = max_value if header.by_name and max_value else header.max_value or max_value
            if scale is None:
                raise DataError(
                    f"{file.path} does not declare its full scale; give the maximal value: 2047 for "
                    "WV2, WV3 and QB, 1023 for GF2."
                )
            if not is_full_scale(scale):
                raise DataError(f"{scale:g} is no full scale to divide {file.path} by.")
            file.check_scale(scale)
            self.scales.append(scale)
            for name in ("bands", "ratio", "height", "width", "has_gt", "registration"):
                first, here = getattr(files[0].header, name), getattr(file.header, name)
                if first != here:
                    raise DataError(f"{files[0].path} and {file.path} cannot be mixed: {name} is {first} and {here}.")
        if max_value is not None and max_value not in self.scales:
            raise DataError(
                f"{files[0].path} declares a full scale of {self.scales[0]:g}, not {max_value:g}; "
                "leave --max-value out."
            )
        self.starts = np.cumsum([0, *map(len, files)])
        numbers = [np.stack([np.full(len(f), i), f.sources], 1) for i, f in enumerate(files)]
        self.sources = np.unique(np.concatenate(numbers), axis=0, return_inverse=True)[1].ravel()

    @property
    def patches(self) -> PanCollectionDataset:
        """The patches alone: this dataset."""
        return self

    def __len__(self) -> int:
        return int(self.starts[-1])

    def place(self, sample: int) -> tuple[int, int]:
        """(number of the file that holds a sample, number of the sample there)."""
        if not 0 <= sample < len(self):
            raise IndexError(f"there are samples 0 to {len(self) - 1}, not {sample}")
        file = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return file, sample - int(self.starts[file])

    def __getitem__(self, draw: Draw | int) -> PatchBatch:
        if isinstance(draw, int):
            draw = Draw(draw)
        file, index = self.place(draw.sample)
        patch = self.files[file].read([index])
        flipped = patch.map(lambda x: (x / self.scales[file]).flip(draw.axes))
        numbers = (self.sources[draw.sample], draw.flip_rows, draw.flip_columns)
        return replace(flipped, origin=torch.tensor([[int(n) for n in numbers]]))

    collate = staticmethod(PatchBatch.cat)

    def close(self) -> None:
        """Let go of all files; the next read opens them again."""
        for file in self.files:
            file.close()


class PatchSampler:
    """The samples that a step takes: a function of (seed, step) alone, so that resuming is exact.

    The samples of all epochs, each epoch shuffled by (seed, epoch), form one endless row. Step s
    takes the s-th `batch_size * world` of them. No sample is dropped: a batch may span epochs.

    Args:
        count: samples of the dataset.
        batch_size: samples per step and process.
        seed: of order and flips.
        flips: flip samples at random. In the registration "pancollection" a flip moves the MS by
            one PAN pixel against LMS and truth, since its samples do not lie centred.
        rank: number of this process.
        world: number of processes that share each step.
    """

    def __init__(self, count: int, *, batch_size: int, seed: int, flips: bool = False, rank: int = 0, world: int = 1):
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
        order, flips = self._epoch(place // self.count)
        here = place % self.count
        return Draw(int(order[here]), bool(flips[here] & 1), bool(flips[here] & 2))

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.count)
        flips = rng.integers(4, size=self.count, dtype=np.uint8)
        return order, flips if self.flips else np.zeros_like(flips)


class PatchBatches:
    """Batches as a function of the step; worker processes read the same ones ahead.

    Args:
        dataset: `PanCollectionDataset`, or another with its `patches`, `collate` and `close`.
        sampler: which samples a step takes.
    """

    def __init__(self, dataset: Any, sampler: PatchSampler):
        self.dataset, self.sampler = dataset, sampler

    def stream(self, start: int, stop: int, *, workers: int = 0, device: str = "cpu") -> Iterator[Any]:
        """The batches of steps `start` .. `stop` - 1 in order, float32, divided by full scale; see `read_ahead`."""
        self.dataset.close()  # HDF5 must not be open across a fork
        wanted = map(self.sampler.draws, range(start, stop))
        return read_ahead(self.dataset, wanted, self.dataset.collate, workers=workers, device=device)
