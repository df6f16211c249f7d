"""The scenes of a batch on a Dask cluster, each of them one task."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uknowpan.archive.manifest import Scene
from uknowpan.archive.run import BatchSettings, SceneOutcome, attempts, lost
from uknowpan.errors import UsageError
from uknowpan.loading import choose_device
from uknowpan.options import SharpenOptions

if TYPE_CHECKING:
    from distributed import Client, Future


log = logging.getLogger("uknowpan")

TIMEOUT = 15
"""Seconds in which a scheduler has to answer."""

LOCAL = "local"


class SchedulerLost(OSError):
    """The scheduler went away, and with it what became of the scenes."""


@dataclass(frozen=True)
class ClusterRequest:
    """Where scenes are to run."""

    where: str
    """Address of a scheduler, or "local": processes of this machine."""
    workers: int | None = None
    """How many of those; None: one per GPU, or per two cores."""


def cluster_request(where: str | None, workers: int | None) -> ClusterRequest | None:
    """What --dask and --dask-workers ask for; usage errors, and Dask missing, exit with 2."""
    if where is None:
        if workers is not None:
            raise UsageError("--dask-workers goes with --dask local.")
        return None
    if where != LOCAL and "://" not in where:
        raise UsageError(f"--dask takes local or tcp://HOST:PORT, not {where!r}.")
    if where != LOCAL and workers is not None:
        raise UsageError(f"--dask-workers goes with --dask local; {where} has its own.")
    try:
        import distributed  # noqa: F401 - only whether it is there
    except ImportError:
        raise UsageError("--dask needs Dask: pip install 'uknowpan[dask]'.") from None
    return ClusterRequest(where, workers)


def on_cluster(
    scenes: Sequence[Scene],
    settings: BatchSettings,
    request: ClusterRequest,
    note: Callable[[SceneOutcome], None],
) -> Generator[SceneOutcome, None, None]:
    """Run scenes on a cluster and tell how they ended, in the order in which they do.

    What a dead worker was at is given to another one, which goes on with the strips that are
    there; a scene at which more workers died than Dask allows has failed. Closing the generator
    takes back what waits; a local cluster is then ended, one with a scheduler of its own finishes
    the scenes that it is at.

    Args:
        scenes: what to do; the workers see the same files by the same paths.
        settings: for all of them.
        request: where.
        note: called with the outcome of each attempt, before that of the last one is yielded.

    Raises:
        OSError: the scheduler cannot be reached.
        SchedulerLost: or no longer.
    """
    settings = replace(settings, options=_anywhere(settings.options))
    if not log.isEnabledFor(logging.DEBUG):  # its tracebacks, beside our sentence
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if request.where == LOCAL:
            settings, client = stack.enter_context(_local(settings, request.workers))
        else:
            client = stack.enter_context(_reached(request.where))
        yield from _ended(client, scenes, settings, request, note)


def _anywhere(options: SharpenOptions) -> SharpenOptions:
    """The model by a path that holds in any folder."""
    if options.model is None or not Path(options.model).exists():
        return options
    return replace(options, model=str(Path(options.model).absolute()))


# Clusters -----------------------------------------------------------------------------------------


@contextmanager
def _reached(address: str) -> Iterator[Client]:
    from distributed import Client

    try:
        client = Client(address, timeout=TIMEOUT, set_as_default=False)
    except ValueError as error:
        raise UsageError(f"--dask {address}: {error}.") from error
    except OSError as error:
        raise OSError(f"No Dask scheduler answers at {address} within {TIMEOUT} s.") from error
    with client:
        threads = client.nthreads()
        if not threads:
            log.warning("the scheduler at %s has no workers yet; waiting for some", address)
        if any(count > 1 for count in threads.values()):
            log.warning(
                "workers at %s have several threads, but do one scene at a time; start them with "
                "--nthreads 1, or scenes wait for a worker while others are idle",
                address,
            )
        yield client


@contextmanager
def _local(settings: BatchSettings, workers: int | None) -> Iterator[tuple[BatchSettings, Client]]:
    """Processes with a share of the cores each, or a GPU. They die with this one."""
    import dask
    from distributed import Client, LocalCluster

    from uknowpan.models.devices import usable_cores

    choose_device(settings.options.device)  # only whether it is there
    cores = usable_cores()
    count = workers or _gpus(settings.options) or max(1, cores // 2)
    if settings.options.num_threads is None:
        settings = replace(settings, options=replace(settings.options, num_threads=max(1, cores // count)))
    configuration = {"distributed.scheduler.worker-saturation": 1.0}  # the others wait in no one's queue
    with (
        dask.config.set(configuration),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            memory_limit=0,  # strips bound what a scene takes; Dask would stop a worker above 80 %
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        log.info("%d workers with %d threads each", count, settings.options.num_threads)
        yield settings, client


def _gpus(options: SharpenOptions) -> int:
    """GPUs to share the scenes out to; 0: none, or not wanted."""
    if options.method is not None or options.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count() if options.device == "auto" else 1


# Tasks --------------------------------------------------------------------------------------------

_TURN = threading.Lock()
"""A worker with several threads does one scene after the other: threads and memory are meant for
one, and the kernel counts the memory of all."""


def _sharpen_here(scene: Scene, settings: BatchSettings, level: int, spread: bool) -> tuple[SceneOutcome, ...]:
    """What a worker does: all attempts at a scene.

    spread: the workers are 0, 1, ... of one machine and share its GPUs out.
    """
    logging.getLogger("uknowpan").setLevel(level)
    with _TURN:
        if spread:
            settings = replace(settings, options=_with_own_gpu(settings.options))
        return tuple(attempts(scene, settings))


def _with_own_gpu(options: SharpenOptions) -> SharpenOptions:
    from distributed import get_worker

    count = _gpus(options)
    if options.device != "auto" or not count:
        return options
    return replace(options, device=f"cuda:{int(get_worker().name) % count}")


def _ended(
    client: Client,
    scenes: Sequence[Scene],
    settings: BatchSettings,
    request: ClusterRequest,
    note: Callable[[SceneOutcome], None],
) -> Iterator[SceneOutcome]:
    from distributed import as_completed

    # Clients of one scheduler share tasks by their keys: another batch has an "a" too.
    keys = [f"sharpen-{uuid.uuid4().hex}-{scene.id}" for scene in scenes]
    of = dict(zip(keys, scenes, strict=True))
    client.forward_logging("uknowpan")
    futures = client.map(
        _sharpen_here,
        list(scenes),
        key=keys,
        pure=False,
        settings=settings,
        level=log.level,
        spread=request.where == LOCAL,
    )
    waiting = dict(zip(keys, futures, strict=True))
    del futures
    try:
        for future in as_completed(list(waiting.values()), loop=client.loop):
            outcomes = _outcomes(future, of[future.key])
            del waiting[future.key]
            for outcome in outcomes:
                note(outcome)
            yield outcomes[-1]
    finally:
        _take_back(client, list(waiting.values()))


def _outcomes(future: Future[Any], scene: Scene) -> tuple[SceneOutcome, ...]:
    """How the attempts ended. Raises SchedulerLost."""
    from distributed import CancelledError, KilledWorker

    try:
        outcomes: Any = future.result()
    except CancelledError as error:
        raise SchedulerLost(
            "The Dask scheduler is gone, or has dropped this batch; the same command goes on."
        ) from error
    except KilledWorker as error:
        return (lost(scene, " ".join(str(error).split())),)
    except Exception as error:  # the worker cannot make sense of the task
        log.debug("%s", scene.id, exc_info=True)
        text = " ".join(str(error).split())
        return (lost(scene, f"The worker cannot run it ({type(error).__name__}: {text})."),)
    return tuple(outcomes)


def _take_back(client: Client, futures: list[Future[Any]]) -> None:
    if client.status != "running":
        return
    if futures:
        client.cancel(futures)
    with suppress(OSError):  # a worker that dies now has nothing more to say
        client.unforward_logging("uknowpan")
