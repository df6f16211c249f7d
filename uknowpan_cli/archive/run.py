"""One scene of a batch: skipped where its output is there already, else sharpened.

`run_scene` takes and returns plain values that can be pickled, so that any process can run it.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import rasterio

from uknowpan import __version__
from uknowpan import errors as exits
from uknowpan.archive.manifest import Scene
from uknowpan.console import to_json
from uknowpan.durable import parsed, sweep, write_text
from uknowpan.errors import UsageError
from uknowpan.loading import load_once
from uknowpan.models.devices import peak_mb
from uknowpan.models.sharpeners import Sharpener
from uknowpan.options import SharpenOptions
from uknowpan.scenes import open_scene, prepared
from uknowpan.sharpening import SharpenReport, sharpen_scene
from uknowpan.surveying import Progress, no_progress
from uknowpan.tiling import (
    InputUnreadable,
    OutputBusy,
    OutputError,
    OutputExists,
    ResumeMismatch,
    ScenePair,
    StripStore,
    sweep_strips,
)
from uknowpan.tiling.identity import contents
from uknowpan.tiling.raster import GDAL_ERRORS, bounded_gdal_cache

log = logging.getLogger("uknowpan")

WAIT = 1.0
"""Seconds between two looks at a scene that another run is at."""


@dataclass(frozen=True)
class BatchSettings:
    """The settings that all scenes of a batch share."""

    options: SharpenOptions
    folder: str
    """Folder of the outputs; folders below it are made."""
    uncertainty: bool = False
    retries: int = 1
    """Number of further attempts where a failure may pass."""


@dataclass(frozen=True)
class SceneOutcome:
    """The end of one attempt at a scene."""

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
    """Largest resident memory of the process during the scene, 1e6 bytes; not on Linux: since the process began."""
    device: str = ""
    attempts: int = 1
    """Number of the attempt, from 1."""
    finished: str = ""
    """UTC, ISO 8601"""
    version: str = __version__
    warnings: tuple[str, ...] = ()
    """Remarks on the scene; none where nothing was sharpened."""
    may_pass: bool = False
    """Whether another attempt may end otherwise; not in the report."""
    busy: bool = False
    """Whether another run is at the scene; not in the report."""

    def as_dict(self) -> dict[str, object]:
        """A line of the report."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("may_pass", "busy")}


def attempts(
    scene: Scene, settings: BatchSettings, on_progress: Progress = no_progress, wait: bool = True
) -> Iterator[SceneOutcome]:
    """Run a scene, again while it fails for what may pass, at most `retries` times more.

    wait: where another run is at the scene, wait for its end; else yield nothing.
    """
    for attempt in range(1, settings.retries + 2):
        outcome = run_scene(scene, settings, attempt, on_progress)
        while outcome.busy and wait:
            time.sleep(WAIT)
            outcome = run_scene(scene, settings, attempt, on_progress)
        if outcome.busy:
            return
        yield outcome
        if not outcome.may_pass or attempt > settings.retries:
            return
        log.warning("%s: attempt %d: %s Trying again.", scene.id, attempt, outcome.message)


def run_scene(
    scene: Scene, settings: BatchSettings, attempt: int = 1, on_progress: Progress = no_progress
) -> SceneOutcome:
    """One attempt at a scene; whatever goes wrong with it is in the outcome.

    Raises:
        Interrupted, KeyboardInterrupt: the process is to stop; finished strips are kept.
    """
    began, device = time.monotonic(), settings.options.device
    _reset_peak()
    started = SceneOutcome(scene.id, "failed", exits.INTERNAL, "", scene.output, device=device, attempts=attempt)
    try:
        with _named(scene.id), bounded_gdal_cache():
            sharpener = load_once(settings.options.of_model)
            started = replace(started, device=sharpener.device)
            with open_scene(scene.pan, scene.ms, settings.options) as pair:
                outcome = _run(pair, scene, settings, sharpener, started, on_progress)
    except exits.Interrupted:
        raise
    except Exception as error:
        log.debug("%s", scene.id, exc_info=True)
        code, message = exits.exit_code(error), exits.sentence(error)
        busy = isinstance(error, OutputBusy)
        outcome = replace(started, code=code, message=message, may_pass=_may_pass(error, scene), busy=busy)
    seconds = time.monotonic() - began
    if outcome.status == "done" and outcome.megapixels is not None:
        speed = round(outcome.megapixels / max(seconds, 1e-9), 3)
        outcome = replace(outcome, megapixels_per_second=speed)
    return replace(outcome, seconds=round(seconds, 3), peak_mb=peak_mb(), finished=_now())


def lost(scene: Scene, message: str) -> SceneOutcome:
    """The outcome where the process that ran a scene has died."""
    return SceneOutcome(scene.id, "failed", exits.INTERNAL, message, scene.output, finished=_now())


def check_scene(scene: Scene, settings: BatchSettings) -> SceneOutcome:
    """The outcome that `run_scene` would have: todo, done or cannot; writes nothing."""
    plan = SceneOutcome(scene.id, "todo", exits.OK, "", scene.output)
    try:
        with _named(scene.id), bounded_gdal_cache(), open_scene(scene.pan, scene.ms, settings.options) as pair:
            sharpener, options = load_once(settings.options.of_model), _options(scene, settings)
            state = _look(pair, scene, options, sharpener)
            if state.complete:
                return replace(plan, status="done", message="is there already")
            state.refuse_others(settings.options.overwrite)
            if options.uncertainty is not None:
                options = replace(options, uncertainty=_stand_in(scene.sigma))
            output = _stand_in(scene.output)
            with prepared(scene.pan, scene.ms, output, options, lambda: sharpener, opened=pair, dry_run=True):
                return plan
    except Exception as error:
        log.debug("%s", scene.id, exc_info=True)
        return replace(plan, status="cannot", code=exits.exit_code(error), message=exits.sentence(error))


def _stand_in(path: str) -> str:
    """A file in the nearest folder that exists, where folders above `path` are yet to be made."""
    target = Path(path)
    folder = next(parent for parent in target.parents if parent.exists())
    return str(folder / target.name)


def _run(
    pair: ScenePair,
    scene: Scene,
    settings: BatchSettings,
    sharpener: Sharpener,
    started: SceneOutcome,
    on_progress: Progress,
) -> SceneOutcome:
    options = _options(scene, settings)
    state = _look(pair, scene, options, sharpener)
    outcome = replace(started, megapixels=state.megapixels, code=exits.OK)
    _sweep(scene)
    if state.complete:
        _drop_strips(scene.output)
        if _read_sidecar(scene.output, state.digest) is None:
            _write_sidecar(scene, options, state, None)
        return replace(outcome, status="skipped", message="is there already")
    state.refuse_others(options.overwrite)
    if set(state.present.values()) == {state.digest}:
        log.warning("%s is damaged, or a file beside it is missing; it is made anew.", scene.output)
    folder = Path(scene.output).parent
    if Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(settings.folder)):
        folder.mkdir(parents=True, exist_ok=True)
    options = replace(options, overwrite=bool(state.present) or options.overwrite)
    tags = {"IDENTITY": state.digest}
    with prepared(scene.pan, scene.ms, scene.output, options, lambda: sharpener, opened=pair) as ready:
        try:
            report = sharpen_scene(ready, on_progress, tags)
        except ResumeMismatch as error:
            log.warning("%s They are dropped.", str(error).partition(";")[0] + ".")
            _drop_strips(scene.output)
            report = sharpen_scene(ready, on_progress, tags)
    _write_sidecar(scene, options, state, report)
    return replace(outcome, status="done", warnings=tuple(report.notes))


def _options(scene: Scene, settings: BatchSettings) -> SharpenOptions:
    return replace(settings.options, uncertainty=scene.sigma if settings.uncertainty else None, resume=True)


@dataclass(frozen=True)
class _State:
    """The facts that a scene's outputs are made from, and the files in their places."""

    facts: dict[str, object]
    """Everything that decides about the outputs, JSON-ready."""
    megapixels: float
    wanted: tuple[str, ...]
    present: dict[str, str | None]
    """File that is there -> the identity it was made with; None: it declares none."""

    @property
    def digest(self) -> str:
        """The identity: SHA-256 of the facts."""
        text = json.dumps(self.facts, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def complete(self) -> bool:
        """Whether all outputs are there, made from the same and whole."""
        if not all(self.present.get(path) == self.digest for path in self.wanted):
            return False
        sidecar = _read_sidecar(self.wanted[0], self.digest) or {}
        stamps = sidecar.get("files")
        if isinstance(stamps, dict) and all(Path(path).name in stamps for path in self.wanted):
            return all(stamps[Path(path).name] == contents(path) for path in self.wanted)
        return all(_is_readable(path) for path in self.wanted)

    def refuse_others(self, overwrite: bool) -> None:
        """Raises OutputExists for a file that was made from something else; `overwrite`: logs why it is made anew."""
        for path, identity in self.present.items():
            if identity == self.digest:
                continue
            made = "was not made by batch"
            if identity is not None:
                made = "was made from other inputs or options"
                changed = _changed(self.wanted[0], identity, self.facts)
                made += f" ({', '.join(changed)})" if changed else ""
            if not overwrite:
                raise OutputExists(f"{path} {made}; --overwrite replaces it.")
            log.warning("%s %s; it is made anew.", path, made)


def _look(pair: ScenePair, scene: Scene, options: SharpenOptions, sharpener: Sharpener) -> _State:
    """The state of a scene whose inputs are open, by the outputs that are there."""
    facts = _facts(pair, options, sharpener)
    megapixels = round(pair.grid.width * pair.grid.height / 1e6, 6)
    wanted = (scene.output,) if options.uncertainty is None else (scene.output, scene.sigma)
    present = {path: _identity_in(path) for path in wanted if os.path.exists(path)}
    return _State(facts, megapixels, wanted, present)


def _facts(pair: ScenePair, options: SharpenOptions, sharpener: Sharpener) -> dict[str, object]:
    """The facts of an identity. Batch size and threads change no more than rounding."""
    names = ("tile", "overlap", "max_value", "output_dtype", "stretch", "mask", "format", "overviews", "coregister",
             "coverage")  # fmt: skip
    return {
        "pair": pair.identity(),
        "options": {
            **{name: getattr(options, name) for name in names},
            "nodata": repr(options.nodata),
            "creation": options.creation,
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


def _is_readable(path: str) -> bool:
    """Whether a raster can be read to its end."""
    try:
        with rasterio.open(path) as dataset:
            for _, window in dataset.block_windows(1):
                dataset.read(window=window)
    except GDAL_ERRORS:
        return False
    return True


def _read_sidecar(output: str, identity: str) -> dict[str, Any] | None:
    """The sidecar if it is of that identity; a run may have ended before it was written."""
    try:
        content = parsed(Path(f"{output}.json").read_text())
        return content if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _changed(output: str, identity: str, facts: Mapping[str, object]) -> list[str]:
    """Names of the facts that differ from those in an output's sidecar."""
    sidecar = _read_sidecar(output, identity)
    if sidecar is None:
        return []
    old, new = _flat(sidecar["made_from"]), _flat(json.loads(to_json(facts)))
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _flat(facts: Mapping[str, Any]) -> dict[str, object]:
    groups = {key.lower(): value for group in ("pair", "options", "method") for key, value in facts[group].items()}
    return {"version": facts["version"]} | groups


def _write_sidecar(scene: Scene, options: SharpenOptions, state: _State, report: SharpenReport | None) -> None:
    """OUT.json, for people; report: None where the run that made the output was killed before this."""
    content = {
        "identity": state.digest,
        "output": scene.output,
        "uncertainty": options.uncertainty,
        "pan": scene.pan,
        "ms": list(scene.ms),
        "made_from": state.facts,
        "megapixels": state.megapixels,
        "seconds": None if report is None else report.seconds,
        "report": None if report is None else asdict(report),
        "files": {Path(file).name: contents(file) for file in state.wanted},
        "written": _now(),
    }
    write_text(f"{scene.output}.json", to_json(content) + "\n")


def _drop_strips(output: str) -> None:
    """Remove the strips of an interrupted run, unless they are somebody else's."""
    if os.path.isdir(f"{output}.part"):
        with suppress(OutputError):
            StripStore(output, {}, ["image"], 0).remove()


def _sweep(scene: Scene) -> None:
    """Remove what killed runs left beside the outputs; strips stay."""
    for path in (scene.output, scene.sigma, f"{scene.output}.json"):
        if Path(path).parent.is_dir():
            sweep(path)
            sweep_strips(path)


def _may_pass(error: Exception, scene: Scene) -> bool:
    """Whether another attempt may succeed: a disk or a network may; inputs, model and options stay as they are."""
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
    """Begin messages of this thread with the id of the scene."""
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
