"""The scenes of a batch on a Dask cluster, each of them one task."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uknowpan.archive.manifest import Scene
from uknowpan.archive.run import BatchSettings, SceneOutcome, attempts, lost
from uknowpan.errors import UsageError
from uknowpan.loading import choose_device
from uknowpan.models.devices import gpu_count
from uknowpan.options import SharpenOptions

if TYPE_CHECKING:
    from distributed import Client, Future

log = logging.getLogger("uknowpan")

TIMEOUT = 15
"""Seconds in which a scheduler has to answer."""

LOCAL = "local"


class SchedulerLost(OSError):
    """The scheduler is gone, and with it the outcomes of the scenes."""


def check_cluster(where: str | None, workers: int | None) -> None:
    """Refuse values of --dask and --dask-workers that make no sense, or --dask without Dask."""
    if where is None:
        raise UsageError("--dask-workers goes with --dask local.")
    if where != LOCAL and "://" not in where:
        raise UsageError(f"--dask takes local or tcp://HOST:PORT, not {where!r}.")
    if where != LOCAL and workers is not None:
        raise UsageError(f"--dask-workers goes with --dask local; {where} has its own.")
    try:
        import distributed  # noqa: F401 - only whether it is there

        if where == LOCAL:
            import cryptography  # noqa: F401 - for certificates
    except ImportError as error:
        missing = "cryptography" if error.name == "cryptography" else "Dask"
        raise UsageError(f"--dask {where} needs {missing}: pip install 'uknowpan[dask]'.") from None


def on_cluster(
    scenes: Sequence[Scene],
    settings: BatchSettings,
    where: str,
    workers: int | None,
    note: Callable[[SceneOutcome], None],
) -> Generator[SceneOutcome, None, None]:
    """Run scenes on a cluster and yield their outcomes, in the order in which they end.

    Another worker takes over the scene of a dead one, with the strips that are there. A scene at
    which more workers died than Dask allows has failed. Closing the generator takes back the scenes
    that wait. A local cluster then ends; another one finishes the scenes that it has begun.

    Args:
        scenes: the workers see the same files by the same paths.
        settings: for all of them.
        where: address of a scheduler, or "local": processes of this machine.
        workers: number of these processes; None: one per GPU, or per two cores.
        note: called with the outcome of each attempt, before that of the last one is yielded.

    Raises:
        OSError: the scheduler cannot be reached.
        SchedulerLost: or no longer.
    """
    settings = replace(settings, options=_anywhere(settings.options))
    if not log.isEnabledFor(logging.DEBUG):  # its tracebacks, beside our sentence
        logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        if where == LOCAL:
            settings, client = stack.enter_context(_local(settings, workers))
        else:
            client = stack.enter_context(_reached(where))
        yield from _ended(client, scenes, settings, where == LOCAL, note)


def _anywhere(options: SharpenOptions) -> SharpenOptions:
    """The model by a path that holds in any folder."""
    if options.model is None or not Path(options.model).exists():
        return options
    return replace(options, model=str(Path(options.model).absolute()))


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
    """Processes with a share of the cores each, or a GPU. They die with this one.

    A scheduler and its workers run what anyone sends them: only holders of a certificate that is made for this run,
    and never leaves its processes, may.
    """
    import dask
    from distributed import Client, LocalCluster
    from distributed.security import Security

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
            dashboard_address=None,
            security=Security.temporary(),
            memory_limit=0,  # strips bound what a scene takes; Dask would stop a worker above 80 %
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        log.info("%d workers with %d threads each", count, settings.options.num_threads)
        yield settings, client


def _gpus(options: SharpenOptions) -> int:
    """Number of GPUs that the scenes are spread over; 0: none, or not wanted."""
    if options.method is not None or options.device == "cpu" or options.engine == "onnx":
        return 0
    return gpu_count() if options.device == "auto" else 1


_TURN = threading.Lock()
"""A worker with several threads sharpens one scene after the other: threads and memory suffice for one."""


def _sharpen_here(scene: Scene, settings: BatchSettings, level: int, spread: bool) -> tuple[SceneOutcome, ...]:
    """All attempts at a scene, in a worker; with `spread` the workers of a machine share its GPUs."""
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
    client: Client, scenes: Sequence[Scene], settings: BatchSettings, spread: bool, note: Callable[[SceneOutcome], None]
) -> Iterator[SceneOutcome]:
    from distributed import as_completed

    # Clients of one scheduler share tasks by their keys: another batch has an "a" too.
    keys = [f"sharpen-{uuid.uuid4().hex}-{scene.id}" for scene in scenes]
    of = dict(zip(keys, scenes, strict=True))
    client.forward_logging("uknowpan")
    futures = client.map(
        _sharpen_here, list(scenes), key=keys, pure=False, settings=settings, level=log.level, spread=spread
    )
    waiting = dict(zip(keys, futures, strict=True))
    del futures  # a future that someone holds keeps its result on the cluster
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
    """The outcomes of all attempts."""
    from distributed import CancelledError, KilledWorker

    try:
        outcomes: Any = future.result()
    except CancelledError as error:
        raise SchedulerLost(
            "The Dask scheduler is gone, or has dropped this batch; the same command goes on."
        ) from error
    except Exception as error:
        text = " ".join(str(error).split())
        if not isinstance(error, KilledWorker):  # the worker cannot make sense of the task
            log.debug("%s", scene.id, exc_info=True)
            text = f"The worker cannot run it ({type(error).__name__}: {text})."
        return (lost(scene, text),)
    return tuple(outcomes)


def _take_back(client: Client, futures: list[Future[Any]]) -> None:
    if client.status != "running":
        return
    if futures:
        client.cancel(futures)
    with suppress(OSError):  # a worker that dies now has no more messages
        client.unforward_logging("uknowpan")
