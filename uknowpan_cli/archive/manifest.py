"""The scenes of a batch, from a manifest or from patterns, and the share of this process."""

import csv
import glob
import hashlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from uknowpan.durable import parsed
from uknowpan.errors import UsageError

log = logging.getLogger("uknowpan")

SHOWN = 3
"""Scenes that a message names."""


@dataclass(frozen=True)
class Scene:
    """One scene of a batch; paths are absolute, or what GDAL takes for files elsewhere."""

    id: str
    pan: str
    ms: tuple[str, ...]
    output: str
    sigma: str
    """File for 1-sigma, if it is asked for."""


@dataclass(frozen=True)
class Entry:
    """One scene as a manifest or a pattern gives it."""

    pan: str
    ms: tuple[str, ...]
    key: str
    """The scene's id where it was given none."""
    id: str | None = None
    output: str | None = None


@dataclass(frozen=True)
class Shard:
    """Share `index` (from 1) of `count`."""

    index: int = 1
    count: int = 1
    source: str = ""
    """The option or variable that it was read from."""

    def share(self, ids: Sequence[str]) -> set[str]:
        """The ids of its scenes, of all ids of a batch.

        In the order of a hash each id goes to the next shard: shards differ by at most one scene. They agree whenever
        and wherever they start, as long as the manifest is the same.
        """
        ordered = sorted(ids, key=lambda name: hashlib.sha256(name.encode()).digest())
        return set(ordered[self.index - 1 :: self.count])

    @property
    def suffix(self) -> str:
        """The end of the names of this shard's own files."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


def read_manifest(source: str, skip_missing: bool = False) -> list[Entry]:
    """Scenes of a CSV or JSON lines file, "-" for stdin; JSON begins with a brace.

    Relative paths start from the file's folder, from stdin in the working directory.

    Raises:
        OSError: the file cannot be read.
        UsageError: a line of it is wrong.
    """
    name = "the manifest from stdin" if source == "-" else source
    raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
    folder = Path.cwd() if source == "-" else Path(source).absolute().parent
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is no UTF-8 text ({error}).") from error
    begins = text.lstrip()[:1]
    if begins == "[":
        raise UsageError(f"{name} is a JSON list; write one object per line instead.")
    rows = _json_rows(text, name) if begins == "{" else _csv_rows(text, name)
    entries, lonely = [], []
    for place, row in rows:
        pan, ms = _text(row, "pan", place), _ms_files(row, place)
        if not pan or not ms:
            lonely.append(place)
            continue
        files = tuple(_resolved(file, folder) for file in ms)
        key, output = safe_name(Path(_without_band(pan)).stem), _text(row, "output", place) or None
        entries.append(Entry(_resolved(pan, folder), files, key, _given_id(row, place), output))
    _without_partner(lonely, "has no pan or no ms", "have no pan or no ms", skip_missing)
    return entries


COLUMNS = ("pan", "ms", "id", "output")


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            place = f"{name}, line {reader.line_num}"
            if not header:
                header = [cell.lower() for cell in cells]
                _check_header(header, name)
            elif len(cells) > len(header):
                raise UsageError(f"{place}: {len(cells)} cells, but {len(header)} columns.")
            else:
                yield place, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise UsageError(f"{name}, line {reader.line_num}: no CSV ({error}).") from error


def _check_header(header: Sequence[str], name: str) -> None:
    for column in ("pan", "ms"):
        if column not in header:
            raise UsageError(f"{name} has no column {column!r} in its first line ({', '.join(header)}).")
    for column in COLUMNS:
        if header.count(column) > 1:
            raise UsageError(f"{name} has the column {column!r} more than once.")
    unknown = [column for column in header if column not in COLUMNS]
    if unknown:
        log.info("columns %s of %s are not used", ", ".join(unknown), name)


def _json_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, object]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{name}, line {number}"
        try:
            row = parsed(line)
        except ValueError as error:
            raise UsageError(f"{place}: no JSON ({error}).") from error
        if not isinstance(row, dict):
            raise UsageError(f"{place}: no JSON object.")
        yield place, row


def _text(row: Mapping[str, object], key: str, place: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise UsageError(f"{place}: {key} must be text, not {value!r}.")
    return value.strip()


def _ms_files(row: Mapping[str, object], place: str) -> list[str]:
    value = row.get("ms")
    if isinstance(value, list):
        return [file for part in value if (file := _text({"ms": part}, "ms", place))]
    return [file for part in _text(row, "ms", place).split(";") if (file := part.strip())]


def _given_id(row: Mapping[str, object], place: str) -> str | None:
    value = row.get("id")
    given = str(value) if type(value) is int else _text(row, "id", place)
    if not given.isprintable():
        raise UsageError(f"{place}: the id {given!r} holds what cannot be printed.")
    return given or None


ELSEWHERE = re.compile(r"/vsi|[A-Za-z][A-Za-z0-9_+.-]+:")
"""Begins a name that GDAL does not look up as a path: /vsis3/..., https://..., HDF5:..."""


def _resolved(path: str, folder: Path) -> str:
    here = folder / path
    return path if ELSEWHERE.match(path) and not here.exists() else str(here)


def _without_band(path: str) -> str:
    return re.sub(r",band=[^,]*$", "", path)


def safe_name(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^\w.+=@-]+", "_", text).lstrip(".") or "scene"


def by_patterns(pan_glob: str, ms_glob: str, skip_missing: bool = False) -> list[Entry]:
    """Scenes by the names of their files: the text that `*` stands for in the PAN's name is the key.

    The MS of a scene has the same key. Several MS files with one key are bands, by name. `?` and
    `[...]` are no part of the key.

    Raises:
        UsageError: the patterns differ in their `*`, or a PAN or MS has no partner.
    """
    stars = [len(re.findall(r"\*+", pattern)) for pattern in (pan_glob, ms_glob)]
    if stars[0] != stars[1] or not stars[0]:
        raise UsageError(
            f"--pan-glob {pan_glob} and --ms-glob {ms_glob} must have equally many *, at least "
            "one; ? and [...] match what distinguishes bands."
        )
    pans, ms = _keyed(pan_glob), _keyed(ms_glob)
    double = {key: files for key, files in pans.items() if len(files) > 1}
    if double:
        names = _few([" and ".join(files) for files in double.values()])
        raise UsageError(f"--pan-glob {pan_glob} gives several PANs for one scene: {names}.")
    lonely = sorted(pans.keys() ^ ms.keys())
    named = [(pans.get(key) or ms[key])[0] for key in lonely]
    _without_partner(named, "has no partner", "have no partner", skip_missing)
    return [
        Entry(
            pan=os.path.abspath(pans[key][0]),
            ms=tuple(os.path.abspath(file) for file in ms[key]),
            key=safe_name("_".join(part.strip("/") for part in key if part.strip("/"))),
        )
        for key in sorted(pans.keys() & ms.keys())
    ]


def _keyed(pattern: str) -> dict[tuple[str, ...], list[str]]:
    """Key -> files, sorted by name."""
    pattern = re.sub(r"(?<!^)/+", "/", os.path.expanduser(pattern))
    taken = re.compile(_as_regex(pattern), re.DOTALL)
    files: dict[tuple[str, ...], list[str]] = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        match = taken.fullmatch(path)
        if match is not None and os.path.isfile(path):
            files.setdefault(match.groups(), []).append(path)
    return files


def _as_regex(pattern: str) -> str:
    """A glob as a regular expression with a group for every `*`."""
    tokens = {"**/": r"((?:[^/]+/)*)", "*": r"([^/]*)", "?": r"[^/]"}
    parts = []
    for token in re.findall(r"(?:(?<=/)|^)\*\*/|\*+|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        if token in tokens:
            parts.append(tokens[token])
        elif token.startswith("*"):  # within a name ** means no more than *
            parts.append(tokens["*"])
        elif token.startswith("[") and len(token) > 1:
            inner = token[1:-1].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            parts.append(f"[{'^' + inner[1:] if inner.startswith('!') else inner}]")
        else:
            parts.append(re.escape(token))
    return "".join(parts)


def scenes_of(entries: Sequence[Entry], folder: Path, suffix: str = "_sharp", uncertainty: bool = False) -> list[Scene]:
    """Scenes with their outputs in `folder`: FOLDER/ID_sharp.tif and ID_sigma.tif beside it.

    Raises:
        UsageError: two scenes share an id or an output, or an output is an input.
    """
    folder = folder.absolute()
    scenes = []
    for entry in entries:
        name = entry.id or entry.key
        output = Path(os.path.normpath(folder / (entry.output or f"{safe_name(name)}{suffix}.tif")))
        if not os.path.isabs(entry.output or "") and not output.is_relative_to(os.path.normpath(folder)):
            raise UsageError(f"The output {entry.output} of scene {name} leaves {folder}; give its full path instead.")
        sigma = output.with_name(f"{safe_name(name)}_sigma.tif")
        scenes.append(Scene(name, entry.pan, entry.ms, str(output), str(sigma)))
    _refuse_shared([(scene.id, scene) for scene in scenes], "id")
    names = ("output", "sigma") if uncertainty else ("output",)
    paths = [(os.path.realpath(getattr(scene, name)), scene) for name in names for scene in scenes]
    _refuse_shared(paths, "output")
    _refuse_inputs(dict(paths), scenes)
    return scenes


def _refuse_inputs(outputs: Mapping[str, Scene], scenes: Sequence[Scene]) -> None:
    """Refuse outputs, by their real paths, that a scene is read from: its files, and those behind or beside them."""
    from uknowpan.tiling.identity import files_behind

    for name in dict.fromkeys(_without_band(path) for scene in scenes for path in (scene.pan, *scene.ms)):
        named = [] if ELSEWHERE.match(name) else [name]
        for file in (*named, *files_behind([name])):
            if scene := outputs.get(os.path.realpath(file)):
                what = "the input" if file == name else f"{file}, a part of the input"
                raise UsageError(f"The output of scene {scene.id} is {what} {name}; name another folder or --suffix.")


def _refuse_shared(named: Sequence[tuple[str, Scene]], what: str) -> None:
    first: dict[str, Scene] = {}
    clashes = []
    for value, scene in named:
        if value in first:
            clashes.append(f"{value} ({first[value].pan} and {scene.pan})")
        first[value] = scene
    if clashes:
        raise UsageError(f"Scenes share one {what}: {_few(clashes)}; give them ids of their own.")


def _without_partner(names: Sequence[str], has: str, have: str, skip: bool) -> None:
    if not names:
        return
    text = f"{names[0]} {has}" if len(names) == 1 else f"{len(names)} scenes {have}: {_few(names)}"
    if not skip:
        raise UsageError(f"{text}; --skip-missing goes on without.")
    log.warning("left out: %s", text)


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def choose_shard(text: str, environment: Mapping[str, str]) -> Shard:
    """The share of this process: "K/N" with K from 1, "none" for all, or "auto" by a scheduler's environment.

    Raises:
        UsageError: the text or the environment gives no share.
    """
    if text == "none":
        return Shard(source="--shard")
    if text != "auto":
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise UsageError(f"--shard takes K/N, auto or none, not {text!r}.")
        return _checked(int(match[1]), int(match[2]), "--shard", text)
    set_here = {name: value for name, value in environment.items() if value.strip()}
    present = [variable for variable in _SCHEDULERS if variable in set_here]
    if not present:
        return Shard()
    shard = _SCHEDULERS[present[0]](set_here)
    unused = f"; {', '.join(present[1:])} is not used" if present[1:] else ""
    log.info("shard %d of %d, from %s%s", shard.index, shard.count, shard.source, unused)
    return shard


def _checked(index: int, count: int, source: str, text: str) -> Shard:
    if not 1 <= index <= count:
        raise UsageError(f"{source}: {text} is no share; K of K/N goes from 1 to N.")
    return Shard(index, count, source)


def _whole(environment: Mapping[str, str], name: str) -> int | None:
    value = environment.get(name)
    if value is None:
        return None
    if not re.fullmatch(r"\s*\d+\s*", value):
        raise UsageError(f"{name} is {value!r}, not a whole number; give --shard K/N.")
    return int(value)


def _indexed(environment: Mapping[str, str], index: str, size: str) -> Shard:
    """A share by an index from 0 and a size."""
    at, count = _whole(environment, index), _whole(environment, size)
    assert at is not None
    if count is None:
        raise _sizeless(index, size)
    return _checked(at + 1, count, index, f"{at} (from 0) of {size}={count}")


def _sizeless(index: str, size: str) -> UsageError:
    return UsageError(f"{index} is set, but not {size}: give --shard K/N, or --shard none.")


def _slurm(environment: Mapping[str, str]) -> Shard:
    """The position of a task in its array, which must be a range (with a step)."""
    name = "SLURM_ARRAY_TASK_ID"
    task = _whole(environment, name)
    low, high, step, count = (_whole(environment, f"SLURM_ARRAY_TASK_{x}") for x in ("MIN", "MAX", "STEP", "COUNT"))
    assert task is not None
    step = step or 1
    if count is None and low is not None and high is not None:
        count = (high - low) // step + 1
    if count is None:
        raise _sizeless(name, "SLURM_ARRAY_TASK_COUNT")
    low = 0 if low is None else low
    position, rest = divmod(task - low, step)
    irregular = high is not None and high != low + (count - 1) * step
    if rest or irregular:
        raise UsageError(f"{name}={task} is of an array that is no range of {count} numbers; give --shard K/N.")
    return _checked(position + 1, count, name, f"{task} of an array of {count} from {low} in steps of {step}")


_SIZES = {
    "AWS_BATCH_JOB_ARRAY_INDEX": "AWS_BATCH_JOB_ARRAY_SIZE",
    "JOB_COMPLETION_INDEX": "UKNOWPAN_SHARDS",
    "RANK": "WORLD_SIZE",
}
_SCHEDULERS: dict[str, Callable[[Mapping[str, str]], Shard]] = {
    "SLURM_ARRAY_TASK_ID": _slurm,
    **{index: partial(_indexed, index=index, size=size) for index, size in _SIZES.items()},
}
"""Variable with a scheduler's index -> a function that reads the share; the first one set wins."""
