"""Work in threads, whose results come in order. Threads end with the generator: close it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from uknowpan.models.devices import share_cores, take_share

T = TypeVar("T")
R = TypeVar("R")


def prefetched(iterator: Iterator[T]) -> Generator[T]:
    """Read the next item in a thread while the present one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(next, iterator, None)
        while (item := waiting.result()) is not None:
            waiting = pool.submit(next, iterator, None)
            yield item


def launched_ahead(work: Callable[[T], R], items: Iterable[T]) -> Generator[tuple[T, R]]:
    """Launch work on a device, and hand on each item with its result once the next one is launched."""
    last: tuple[T, R] | None = None
    for item in items:
        result = work(item)
        if last is not None:
            yield last
        last = item, result
    if last is not None:
        yield last


def side_by_side(work: Callable[[T], R], items: Iterable[T], workers: int, cores: int) -> Generator[tuple[T, R]]:
    """Do work on items in so many threads, which share the cores; each item with its result, in order."""
    if workers == 1:
        for item in items:
            yield item, work(item)
        return
    late: deque[tuple[T, Future[R]]] = deque()
    share = cores // workers
    before, pool = share_cores(share), ThreadPoolExecutor(workers, initializer=take_share, initargs=(share,))
    try:
        for item in items:
            late.append((item, pool.submit(work, item)))
            if len(late) > workers:
                first, result = late.popleft()
                yield first, result.result()
        for first, result in late:
            yield first, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        share_cores(before)


class Background:
    """Does work in a thread, one piece late, or at once; an error in it comes with the next piece."""

    def __init__(self, threaded: bool):
        self._pool = ThreadPoolExecutor(1) if threaded else None
        self._last: Future[None] | None = None

    def do(self, work: Callable[..., None], *arguments: Any) -> None:
        if self._pool is None:
            work(*arguments)
            return
        if self._last is not None:
            self._last.result()
        self._last = self._pool.submit(work, *arguments)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # what was computed is kept, whatever happened
        if kind is None and self._last is not None:
            self._last.result()
