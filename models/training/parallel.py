"""Several processes that train one model, each on its share of every batch, and those that read ahead for them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from uknowpan.models.devices import usable_cores
from uknowpan.models.errors import DataError, ModelMismatch


@dataclass(frozen=True)
class World:
    """The number of this process and the count of all that train together."""

    rank: int = 0
    size: int = 1

    def share(self, batch_size: int) -> int:
        """The number of samples of a batch that each process takes.

        Raises:
            ModelMismatch: the batch cannot be shared out evenly.
        """
        if batch_size % self.size:
            raise ModelMismatch(
                f"a batch of {batch_size} cannot be shared out evenly among {self.size} processes; "
                f"choose a batch_size that {self.size} divides"
            )
        return batch_size // self.size

    def own(self, whole: Tensor) -> Tensor:
        """This process's rows (B / size, ...) of a tensor (B, ...) that every process made alike."""
        if self.size == 1:
            return whole
        share = self.share(len(whole))
        return whole[self.rank * share : (self.rank + 1) * share]

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is true in any process."""
        if self.size == 1:
            return flag
        return bool(self.mean(torch.tensor(float(flag), device=device)) > 0)

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            torch.distributed.barrier()


def current_world() -> World:
    """The world that torch.distributed was set up with; one process where it was not."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return World()


def read_ahead(
    dataset: Any, wanted: Iterable[list[Any]], collate: Callable[[list[Any]], Any], *, workers: int, device: str
) -> Iterator[Any]:
    """Batches in order, made by worker processes; in page-locked memory for a GPU.

    Args:
        dataset: makes one sample of each entry of `wanted`.
        wanted: the entries of each batch.
        collate: makes a batch of samples.
        workers: processes, at most one for each core; 0: this one makes the batches, when they are asked for.
        device: where the batches go.

    Raises:
        DataError: a sample cannot be read, or the system killed a worker.
    """
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=wanted,
        collate_fn=collate,
        num_workers=min(workers, usable_cores()),
        pin_memory=torch.device(device).type == "cuda",
    )
    try:
        yield from loader
    except DataError as error:  # of a worker process: its traceback, then the sentence
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise DataError(
            "A process that reads training data ahead was killed, perhaps for lack of memory; set fewer workers."
        ) from error
