"""A training run on the terminal and on disk: lines, a bar, pictures, TensorBoard."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from uknowpan.console import say
from uknowpan.durable import write_text
from uknowpan.models.training.loop import Examples
from uknowpan.pictures import enlarge, error_map, panels, rgb_bands, stretch_from, write_png

log = logging.getLogger("uknowpan")

PROFILE_AFTER, PROFILED = 10, 20
"""Steps before those that `--profile` times, in which caches fill, and steps that it times."""
QUIET_FIELDS = frozenset({"step", "seconds", "score"})


class TrainShow:
    """Shows a run: a bar on a terminal, a line per entry of the log elsewhere; for every validation
    OUT/pictures/step_*.png; TensorBoard events in OUT if it is installed (the extra `tensorboard`)."""

    def __init__(self, out: Path, iterations: int, *, quiet: bool, writes: bool):
        self.out, self.iterations, self.quiet = out, iterations, quiet
        self._writes = writes
        self._bar: Any = None
        self._began = time.monotonic()
        self._first = 0  # steps that an earlier run took
        if not quiet and sys.stderr.isatty():
            self._bar = tqdm(total=iterations, unit="step", file=sys.stderr, dynamic_ncols=True)

    @cached_property
    def _events(self) -> Any:
        """Opened with the first entry: a run that is refused leaves no folder."""
        return _tensorboard(self.out) if self._writes else None

    def step(self, step: int, parts: dict[str, float]) -> None:
        """After every step; the first one gives a line at once."""
        if not self._first:
            self._began, self._first = time.monotonic(), step
            if not self.quiet and self._bar is None:
                values = ", ".join(f"{name} {value:.4g}" for name, value in parts.items())
                say(f"step {step}/{self.iterations}: {values}")
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def log(self, entry: dict[str, Any]) -> None:
        """After every entry of the log."""
        step = entry["step"]
        if self._events is not None:
            for name, value in entry.items():
                if name not in ("step", "seconds"):
                    self._events.add_scalar(name, value, step)
            self._events.flush()
        if self.quiet:
            return
        values = ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k not in QUIET_FIELDS)
        line = f"step {step}/{self.iterations}: {values}{self._pace(step)}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            say(line)

    def _pace(self, step: int) -> str:
        """Steps per second since the first one, validation included, and the time that is left."""
        done, seconds = step - self._first, time.monotonic() - self._began
        if done < 1 or seconds <= 0:
            return ""
        left = timedelta(seconds=round((self.iterations - step) * seconds / done))
        return f", {done / seconds:.3g} it/s, {left} left"

    def examples(self, step: int, shown: Examples) -> None:
        """After every validation."""
        sheet = example_sheet(shown)
        folder = self.out / "pictures"
        try:
            folder.mkdir(exist_ok=True)
            write_png(folder / f"step_{step:06d}.png", sheet)
        except OSError as error:  # no reason to end a run of days
            log.warning("no picture of step %d in %s: %s", step, folder, error.strerror or error)
        if self._events is not None:
            self._events.add_image("examples", sheet, step)

    def close(self) -> None:
        """Finish bar and events."""
        if self._bar is not None:
            self._bar.close()
        if (events := self.__dict__.get("_events")) is not None:
            events.close()


def _tensorboard(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out))


@contextmanager
def profiled(path: Path) -> Iterator[Callable[[], None]]:
    """A function to call after every step, which times steps 11 to 30; a table of the dearest operations at `path`."""
    from torch import profiler

    def write(done: profiler.profile) -> None:
        own = "self_device_time_total" if profiler.ProfilerActivity.CUDA in done.activities else "self_cpu_time_total"
        write_text(path, done.key_averages().table(sort_by=own, row_limit=30) + "\n")
        say(f"{path}: the operations of {PROFILED} steps")

    steps = profiler.schedule(wait=PROFILE_AFTER - 1, warmup=1, active=PROFILED, repeat=1)
    with profiler.profile(schedule=steps, on_trace_ready=write, acc_events=True) as running:
        yield running.step


def example_sheet(shown: Examples) -> np.ndarray:
    """uint8 (3, H, W): a row for each patch of PAN, LMS, result, truth, error and, where predicted, 1-sigma."""
    rows = []
    for i in range(len(shown.pan)):
        pan, lms, hrms, gt = (x[i].float().cpu().numpy() for x in (shown.pan, shown.lms, shown.hrms, shown.gt))
        look = stretch_from(gt, bands=rgb_bands((), (), len(gt)))
        grey = stretch_from(pan, bands=(0, 0, 0))
        limit = max(float(np.percentile(np.abs(lms - gt).mean(0), 99)), 1e-6)
        row = [
            ("PAN", grey.apply(pan)),
            ("LMS", look.apply(lms)),
            ("result", look.apply(hrms)),
            ("truth", look.apply(gt)),
            ("error LMS", error_map(lms, gt, limit)),
            ("error", error_map(hrms, gt, limit)),
        ]
        if shown.sigma is not None:
            sigma = shown.sigma[i].float().cpu().numpy()
            row.append(("1-sigma", error_map(sigma, np.zeros_like(sigma), limit)))
        rows.append([(text, enlarge(picture, 3)) for text, picture in row])
    return panels(rows, text=14)
