"""The terminal: progress, messages, logs and signals. stdout is kept for the result."""

import gc
import json
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_json: list[logging.StreamHandler[Any]] = []
"""Handler of the JSON lines, where --log-json asked for them."""


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level, facts = record.levelname.lower(), getattr(record, "facts", {})
        return to_json({"time": self.formatTime(record), "level": level, "message": record.getMessage(), **facts})


def set_up_logging(verbosity: int, log_json: Path | None = None) -> None:
    """Messages to stderr: errors only at -1 (-q), warnings at 0, infos at 1 (-v), all at 2 (-vv).

    A file `log_json` gets all of them at any verbosity, and progress; "-" is stderr, which then has nothing else.
    """
    logger = logging.getLogger("uknowpan")
    logger.handlers.clear()
    _json.clear()
    levels = {-1: logging.ERROR, 0: logging.WARNING, 1: logging.INFO}
    logger.setLevel(logging.DEBUG if log_json else levels.get(verbosity, logging.DEBUG))
    plain = logging.StreamHandler(sys.stderr)
    plain.setLevel(levels.get(verbosity, logging.DEBUG))
    plain.setFormatter(logging.Formatter("uknowpan: %(levelname)s: %(message)s"))
    if log_json:
        lines = logging.StreamHandler(sys.stderr) if str(log_json) == "-" else logging.FileHandler(log_json)
        lines.setFormatter(_JsonLines())
        _json.append(lines)
    logger.handlers = [*([] if _json_on_stderr() else [plain]), *_json]
    logger.propagate = False


def _json_on_stderr() -> bool:
    return any(handler.stream is sys.stderr for handler in _json)


def note(message: str, level: int = logging.DEBUG, **facts: object) -> None:
    """An entry of the JSON lines alone; facts are keys beside time, level and message."""
    for handler in _json:
        name = logging.getLevelName(level)
        handler.handle(logging.makeLogRecord({"msg": message, "levelno": level, "levelname": name, "facts": facts}))


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def collected(name: str) -> Iterator[list[str]]:
    """The texts of the warnings that a logger gets meanwhile."""
    collector, logger = _Collector(), logging.getLogger(name)
    logger.addHandler(collector)
    try:
        yield collector.texts
    finally:
        logger.removeHandler(collector)


def to_json(value: object) -> str:
    """JSON as other programs read it: NaN and infinities, which it lacks, become null."""

    def plain(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: plain(entry) for key, entry in x.items()}
        if isinstance(x, list | tuple):
            return [plain(entry) for entry in x]
        if isinstance(x, os.PathLike):
            return os.fspath(x)
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(plain(value), allow_nan=False)


class Progress:
    """A callable (done, total) that shows how far a stage of a run is."""

    def __init__(self, label: str, unit: str, show: Callable[[str, int, int, str], None]):
        self._label, self._unit, self._show, self._noted = label, unit, show, -math.inf

    def __call__(self, done: int, total: int) -> None:
        if (now := time.monotonic()) - self._noted >= 0.3 or done == total:
            self._noted = now
            note("progress", stage=self._label, done=done, total=total)
        factor = 1e6 if self._unit == "Mpx" else 1
        self._show(self._label, done, total, f"{done / factor:.4g}/{total / factor:.4g} {self._unit}")

    def stage(self, label: str, unit: str) -> "Progress":
        """Another stage, shown in the same place; the unit Mpx is counted in pixels."""
        return Progress(label, unit, self._show)


@contextmanager
def progress(label: str, quiet: bool, unit: str = "tiles") -> Iterator[Progress]:
    """A bar on a terminal, a line every few seconds elsewhere; JSON lines have it in any case."""
    if quiet or _json_on_stderr():
        yield Progress(label, unit, lambda *state: None)
    elif sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress as Bar, TextColumn, TimeRemainingColumn  # isort: skip

        texts = (TextColumn("{task.description}"), TextColumn("{task.fields[amount]}"))
        columns = (texts[0], BarColumn(), texts[1], TimeRemainingColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=None, amount="")

            def show(stage: str, done: int, total: int, amount: str) -> None:
                bar.update(task, description=stage, completed=done, total=total, amount=amount)

            yield Progress(label, unit, show)
    else:
        yield Progress(label, unit, _plain_lines())


def _plain_lines(every: float = 5.0) -> Callable[[str, int, int, str], None]:
    began = last = time.monotonic()
    current = ""

    def show(stage: str, done: int, total: int, amount: str) -> None:
        nonlocal began, last, current
        now = time.monotonic()
        if stage != current:
            current, began = stage, now
        if now - last >= every and done:
            left = (now - began) / done * (total - done)
            say(f"{stage}: {amount}, {left:.0f} s left")
            last = now

    return show


def open_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr ones that lead nowhere.

    Else a file of ours would get the number of the missing one, and the messages of a library with it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115


def say(line: str, level: int = logging.INFO, **facts: object) -> None:
    """A line on stderr; where it takes none, as on a full disk, later ones go nowhere."""
    note(line, level, **facts)
    if _json_on_stderr():
        return
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.close(nowhere)


_began: list[float] = []
"""Monotonic time at which this process began, where a command owns the process."""


def own_process() -> None:
    """Let the seconds of reports count from the start of this process, and threads sleep while they wait.

    Spinning threads starve beside busy processes: OpenBLAS took six times as long as with one thread, and PyTorch's
    OpenMP 1.6 times as long as with sleeping ones. Python looks for garbage less often: while libraries are imported,
    the search took 0.1 s.
    """
    gc.set_threshold(50_000)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):  # not Linux
        age = time.process_time()
    _began[:] = [time.monotonic() - max(age, 0.0)]


def run_began() -> float:
    """Monotonic time from which the seconds of a run count."""
    return _began[0] if _began else time.monotonic()


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The signals that arrived: SIGTERM and Ctrl-C wait for the end of a step."""
    stopping: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, lambda received, frame: stopping.append(received)) for number in numbers]
    try:
        yield stopping
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
