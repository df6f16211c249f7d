"""What a person sees: progress, messages, logs. stdout is kept for the result."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        return json.dumps(entry)


def set_up_logging(verbosity: int, log_json: Path | None = None) -> None:
    """Messages to stderr: errors only at -1 (-q), warnings at 0, infos at 1 (-v), all at 2 (-vv).

    A file `log_json` gets all of them at any verbosity.
    """
    logger = logging.getLogger("uknowpan")
    logger.handlers.clear()
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    logger.setLevel(logging.DEBUG if log_json else levels.get(verbosity, logging.DEBUG))
    plain = logging.StreamHandler(sys.stderr)
    plain.setLevel(levels.get(verbosity, logging.DEBUG))
    plain.setFormatter(logging.Formatter("uknowpan: %(levelname)s: %(message)s"))
    logger.addHandler(plain)
    if log_json:
        lines = logging.FileHandler(log_json)
        lines.setFormatter(_JsonLines())
        logger.addHandler(lines)
    logger.propagate = False


def to_json(value: object) -> str:
    """JSON as other programs read it: NaN and infinities, which it lacks, become null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(entry) for key, entry in x.items()}
        if isinstance(x, list | tuple):
            return [plain(entry) for entry in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), allow_nan=False)


@contextmanager
def progress(label: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total): a bar on a terminal, a line every few seconds elsewhere."""
    if quiet:
        yield lambda done, total: None
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} tiles"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _plain_lines(label)


def _plain_lines(label: str, every: float = 5.0) -> Callable[[int, int], None]:
    began = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every and done:
            left = (now - began) / done * (total - done)
            print(f"{label}: {done}/{total} tiles, {left:.0f} s left", file=sys.stderr, flush=True)
            last = now

    return show
