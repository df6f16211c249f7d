"""One scene of a batch: whether its output is there already, else made; how that ended.

`run_scene` takes and returns plain values that can be pickled, so that any process can run it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import rasterio

from uknowpan import __version__
from uknowpan import errors as exits
from uknowpan.archive.manifest import Scene
from uknowpan.console import to_json
from uknowpan.errors import UsageError
from uknowpan.models.sharpeners import Sharpener
from uknowpan.opening import open_request
from uknowpan.scene_job import LoadedMethod, MethodRequest, SceneRequest, opened
from uknowpan.sharpening import SharpenReport
from uknowpan.tiling import (
    InputUnreadable,
    OutputError,
    OutputExists,
    ResumeMismatch,
    ScenePair,
    StripStore,
    sweep_temporary,
)
from uknowpan.tiling.raster import GDAL_ERRORS, bounded_gdal_cache

log = logging.getLogger("uknowpan")

Progress = Callable[[int, int], None]

OLD = 5.0
"""Seconds after which a folder of strips that never got its name belongs to nobody: it gets it
within milliseconds."""


@dataclass(frozen=True)
class BatchSettings:
    """What all scenes of a batch have in common."""

    method: MethodRequest
    scene: SceneRequest
    """Its files are left empty; each scene has its own."""
    folder: str
    """Of the outputs; folders below it are made."""
    uncertainty: bool = False
    num_threads: int | None = None
    retries: int = 1
    """How often a scene is tried again whose failure may pass."""


@dataclass(frozen=True)
class SceneOutcome:
    """How one attempt at a scene ended."""

    id: str
    status: str
    """done, skipped (it was there already) or failed; of `check_scene`: todo, done or cannot."""
    code: int
    """Exit code that `sharpen` would have ended with."""
    message: str
    output: str
    seconds: float = 0.0
    megapixels: float | None = None
    """PAN pixels, millions; None: it was not opened."""
    megapixels_per_second: float | None = None
    """None: nothing was sharpened."""
    peak_mb: float = 0.0
    """Largest resident memory of the process while it was at the scene, 1e6 bytes; where the
    system cannot tell (not Linux), since the process began."""
    device: str = ""
    attempts: int = 1
    """Which attempt it was, from 1."""
    finished: str = ""
    """UTC, ISO 8601"""
    version: str = __version__
    may_pass: bool = False
    """Whether another attempt may end otherwise; not in the report."""

    def as_dict(self) -> dict[str, object]:
        """A line of the report."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "may_pass"}


@lru_cache(maxsize=1)
def load_method(method: MethodRequest, num_threads: int | None) -> LoadedMethod:
    """The sharpener, loaded once in a process. Raises ModelError; usage errors exit with 2."""
    return method.load(num_threads)


def attempts(
    scene: Scene, settings: BatchSettings, on_progress: Progress = lambda done, total: None
) -> Iterator[SceneOutcome]:
    """Run a scene, again while it fails for what may pass, at most `retries` times more."""
    for attempt in range(1, settings.retries + 2):
        outcome = run_scene(scene, settings, attempt, on_progress)
        yield outcome
        if not outcome.may_pass or attempt > settings.retries:
            return
        log.warning("%s: attempt %d: %s Trying again.", scene.id, attempt, outcome.message)


def run_scene(
    scene: Scene,
    settings: BatchSettings,
    attempt: int = 1,
    on_progress: Progress = lambda done, total: None,
) -> SceneOutcome:
    """One attempt at a scene; whatever goes wrong with it is in the outcome.

    Raises:
        Interrupted, KeyboardInterrupt: the process is to stop; finished strips are kept.
    """
    began = time.monotonic()
    _reset_peak()
    started = SceneOutcome(
        scene.id, "failed", exits.INTERNAL, "", scene.output, device=settings.method.device,
        attempts=attempt,
    )  # fmt: skip
    outcome = started
    error: Exception | None = None
    try:
        with _named(scene.id), bounded_gdal_cache():
            loaded = load_method(settings.method, settings.num_threads)
            started = replace(started, device=loaded.device)
            outcome = _run(scene, settings, loaded, started, on_progress)
    except (exits.Interrupted, KeyboardInterrupt):
        raise
    except Exception as caught:
        error = caught
        log.debug("%s", scene.id, exc_info=True)
    seconds = time.monotonic() - began
    if error is not None:
        code, message = _told(error)
        outcome = replace(started, code=code, message=message, may_pass=_may_pass(error, scene))
    elif outcome.status == "done" and outcome.megapixels is not None:
        speed = round(outcome.megapixels / max(seconds, 1e-9), 3)
        outcome = replace(outcome, megapixels_per_second=speed)
    return replace(outcome, seconds=round(seconds, 3), peak_mb=_peak_mb(), finished=_now())


def lost(scene: Scene, message: str) -> SceneOutcome:
    """The outcome where the process that ran a scene did not live to tell."""
    return SceneOutcome(scene.id, "failed", exits.INTERNAL, message, scene.output, finished=_now())


def check_scene(scene: Scene, settings: BatchSettings) -> SceneOutcome:
    """What `run_scene` would do: todo, done or cannot; writes nothing."""
    plan = SceneOutcome(scene.id, "todo", exits.OK, "", scene.output)
    try:
        with _named(scene.id), bounded_gdal_cache():
            loaded = load_method(settings.method, settings.num_threads)
            request = _request(scene, settings)
            found = _look(request, loaded.sharpener)
            if found.complete:
                return replace(plan, status="done", message="is there already")
            found.refuse_others(settings.scene.overwrite)
            request = replace(
                request,
                output=_stand_in(request.output),
                uncertainty=None if request.uncertainty is None else _stand_in(request.uncertainty),
            )
            with opened(request, lambda: loaded, model=settings.method.model, dry_run=True):
                return plan
    except (exits.Interrupted, KeyboardInterrupt):
        raise
    except Exception as error:
        log.debug("%s", scene.id, exc_info=True)
        code, message = _told(error)
        return replace(plan, status="cannot", code=code, message=message)


def _stand_in(path: str) -> str:
    """A file in the nearest folder that exists, where folders above `path` are yet to be made."""
    target = Path(path)
    folder = next(parent for parent in target.parents if parent.exists())
    return str(folder / target.name)


def _run(
    scene: Scene,
    settings: BatchSettings,
    loaded: LoadedMethod,
    started: SceneOutcome,
    on_progress: Progress,
) -> SceneOutcome:
    request = _request(scene, settings)
    found = _look(request, loaded.sharpener)
    outcome = replace(started, megapixels=found.megapixels, code=exits.OK)
    _sweep(scene)
    if found.complete:
        _drop_strips(request.output)
        if _read_sidecar(request.output, found.digest) is None:
            _write_sidecar(request, found, None)
        return replace(outcome, status="skipped", message="is there already")
    found.refuse_others(settings.scene.overwrite)
    folder = Path(request.output).parent
    if folder.is_relative_to(settings.folder):
        folder.mkdir(parents=True, exist_ok=True)
    request = replace(
        request,
        overwrite=bool(found.present) or settings.scene.overwrite,
        tags={"IDENTITY": found.digest},
    )
    with opened(request, lambda: loaded, model=settings.method.model) as ready:
        try:
            report = ready.sharpen(on_progress)
        except ResumeMismatch as error:
            log.warning("%s They are dropped.", str(error).partition(";")[0] + ".")
            _drop_strips(request.output)
            report = ready.sharpen(on_progress)
    _write_sidecar(request, found, report)
    return replace(outcome, status="done")


def _request(scene: Scene, settings: BatchSettings) -> SceneRequest:
    return replace(
        settings.scene,
        pair=replace(settings.scene.pair, pan=scene.pan, ms=scene.ms),
        output=scene.output,
        uncertainty=scene.sigma if settings.uncertainty else None,
        resume=True,
    )


# What is there already ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """What a scene's outputs would be made from, and what is in their places."""

    facts: dict[str, object]
    """All that decides about the outputs, JSON-ready."""
    megapixels: float
    wanted: tuple[str, ...]
    present: dict[str, str | None]
    """File that is there -> the identity it was made with; None: it says none."""

    @property
    def digest(self) -> str:
        """The identity: SHA-256 of the facts."""
        text = json.dumps(self.facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """Whether all outputs are there, made from the same."""
        return all(self.present.get(path) == self.digest for path in self.wanted)

    def refuse_others(self, overwrite: bool) -> None:
        """Raises OutputExists for a file that was made from something else."""
        for path, identity in self.present.items():
            if identity == self.digest or overwrite:
                continue
            made = "was not made by batch"
            if identity is not None:
                made = "was made from other inputs or options"
                changed = _changed(self.wanted[0], identity, self.facts)
                made += f" ({', '.join(changed)})" if changed else ""
            raise OutputExists(f"{path} {made}; --overwrite replaces it.")


def _look(request: SceneRequest, sharpener: Sharpener) -> _Found:
    """Open the inputs and the outputs that are there."""
    with open_request(request.pair) as pair:
        facts = _facts(pair, request, sharpener)
        megapixels = round(pair.grid.width * pair.grid.height / 1e6, 6)
    wanted = tuple(path for path in (request.output, request.uncertainty) if path is not None)
    present = {path: _identity_in(path) for path in wanted if os.path.exists(path)}
    return _Found(facts, megapixels, wanted, present)


def _facts(pair: ScenePair, request: SceneRequest, sharpener: Sharpener) -> dict[str, object]:
    """Batch size and threads are not among them: they change no more than rounding."""
    names = ("tile", "overlap", "max_value", "output_dtype", "format", "overviews")
    return {
        "pair": pair.identity(),
        "options": {
            **{name: getattr(request, name) for name in names},
            "coregister": request.coregister.value,
            "nodata": repr(request.pair.nodata),
            "creation": dict(request.creation),
        },
        "method": sharpener.provenance(),
        "version": __version__,
    }


def _identity_in(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    try:
        with rasterio.open(path) as dataset:
            identity = dataset.tags().get("UKNOWPAN_IDENTITY")
    except GDAL_ERRORS:
        return None
    return None if identity is None else str(identity)


def _sidecar(output: str) -> Path:
    return Path(f"{output}.json")


def _read_sidecar(output: str, identity: str) -> dict[str, Any] | None:
    """The sidecar if it is of that identity; a run may have ended before it was written."""
    try:
        content = json.loads(_sidecar(output).read_text())
        return content if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changed(output: str, identity: str, facts: Mapping[str, object]) -> list[str]:
    """Names of the facts that differ from those an output was made from, as its sidecar says."""
    sidecar = _read_sidecar(output, identity)
    if sidecar is None:
        return []
    old, new = _flat(sidecar["made_from"]), _flat(json.loads(to_json(facts)))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _flat(facts: Mapping[str, Any]) -> dict[str, object]:
    found: dict[str, object] = {"version": facts["version"]}
    for group in ("pair", "options", "method"):
        found |= {key.lower(): value for key, value in facts[group].items()}
    return found


def _write_sidecar(request: SceneRequest, found: _Found, report: SharpenReport | None) -> None:
    """OUT.json, for people: what the output was made from. report: None where it was made by a
    run that did not live to write this."""
    path = _sidecar(request.output)
    content = {
        "identity": found.digest,
        "output": request.output,
        "uncertainty": request.uncertainty,
        "pan": request.pair.pan,
        "ms": list(request.pair.ms),
        "made_from": found.facts,
        "megapixels": found.megapixels,
        "seconds": None if report is None else report.seconds,
        "report": None if report is None else asdict(report),
        "written": _now(),
    }
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(to_json(content) + "\n")
    os.replace(temporary, path)


def _drop_strips(output: str) -> None:
    """Remove the strips of an interrupted run, unless they are somebody else's."""
    if os.path.isdir(f"{output}.part"):
        with suppress(OutputError):
            StripStore(output, {}, ["image"], 0).remove()


def _sweep(scene: Scene) -> None:
    """Remove what killed runs left beside the outputs; strips stay."""
    for path in (Path(scene.output), Path(scene.sigma)):
        if not path.parent.is_dir():
            continue
        sweep_temporary(path.resolve())
        with suppress(OSError):
            path.with_name(f".{path.name}.json.tmp").unlink()
        for folder in path.parent.glob(f".{glob.escape(path.name)}.part.*.new"):
            with suppress(OSError):
                if time.time() - folder.stat().st_mtime > OLD:
                    shutil.rmtree(folder, ignore_errors=True)


# How it went --------------------------------------------------------------------------------------


def _told(error: Exception) -> tuple[int, str]:
    """Exit code and sentence."""
    return exits.exit_code(error), exits.sentence(error)


def _may_pass(error: Exception, scene: Scene) -> bool:
    """Whether trying again makes sense: a disk or a network may do better, the inputs, the model
    and the command line stay what they are."""
    if isinstance(error, UsageError | OutputExists):
        return False
    if isinstance(error, InputUnreadable):
        remote = ("/vsi", "http:", "https:", "s3:")
        return any(path.startswith(remote) for path in (scene.pan, *scene.ms))
    if isinstance(error, (OutputError, *GDAL_ERRORS)):
        return True
    return exits.exit_code(error) == exits.INTERNAL


@contextmanager
def _named(scene_id: str) -> Iterator[None]:
    """Messages of this thread say which scene they are about."""
    thread = threading.get_ident()

    def name(record: logging.LogRecord) -> bool:
        if record.thread == thread:
            record.msg, record.args = f"{scene_id}: {record.getMessage()}", ()
        return True

    log.addFilter(name)
    try:
        yield
    finally:
        log.removeFilter(name)


def _reset_peak() -> None:
    """Let the kernel count the process's largest memory anew, where it can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mb() -> float:
    with suppress(OSError):
        match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if match is not None:
            return round(int(match[1]) * 1024 / 1e6, 1)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
