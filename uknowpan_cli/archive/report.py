"""The report of a batch: JSON lines of each shard, and all of them merged."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uknowpan.archive.manifest import Shard
from uknowpan.console import to_json
from uknowpan.durable import parsed


def report_path(folder: Path, shard: Shard) -> Path:
    """The file in which a shard notes how its scenes ended."""
    return folder / f"report{shard.suffix}.jsonl"


def append_line(path: Path, line: Mapping[str, object]) -> None:
    """Add a line in one write: a killed run tears no other. A line torn before is ended first."""
    data = to_json(dict(line)).encode() + b"\n"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            data = b"\n" + data
        written = os.write(handle, data)
        if written != len(data):
            raise OSError(f"{path} took {written} of {len(data)} bytes; is the disk full?")
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Report:
    """The state of the scenes of a batch."""

    scenes: Sequence[dict[str, Any]]
    """The last line of each, by id."""

    def of(self, status: str) -> list[dict[str, Any]]:
        """The scenes with a status: done, skipped or failed."""
        return [scene for scene in self.scenes if scene["status"] == status]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        measured = [s for s in self.scenes if s["status"] == "done" or s.get("megapixels_per_second") is not None]
        seconds = sum(scene.get("seconds") or 0.0 for scene in measured)
        megapixels = sum(scene.get("megapixels") or 0.0 for scene in measured)
        return {
            "scenes": len(self.scenes),
            **{status: len(self.of(status)) for status in ("done", "skipped", "failed")},
            "seconds": round(seconds, 3),
            "megapixels": round(megapixels, 6),
            "megapixels_per_second": round(megapixels / seconds, 3) if seconds else None,
            "peak_mb": max((scene.get("peak_mb") or 0.0 for scene in self.scenes), default=0.0),
            "failures": self.of("failed"),
        }

    def text(self) -> str:
        """For people: the sums, then what failed."""
        sums = self.as_dict()
        speed = sums["megapixels_per_second"]
        lines = [
            f"scenes  {sums['scenes']}: {sums['done']} done, {sums['skipped']} skipped, {sums['failed']} failed",
            f"pixels  {sums['megapixels']:.3g} Mpx in {sums['seconds']:.1f} s"
            + ("" if speed is None else f", {speed:.3g} Mpx/s"),
            f"memory  at most {sums['peak_mb']:.0f} MB",
        ]
        if sums["failures"]:
            width = max(len("failed"), *(len(scene["id"]) for scene in sums["failures"]))
            lines += ["", f"{'failed':<{width}}  code  attempts  message"]
            lines += [
                f"{scene['id']:<{width}}  {scene.get('code', ''):>4}  "
                f"{scene.get('attempts', ''):>8}  {scene.get('message', '')}"
                for scene in sums["failures"]
            ]
        return "\n".join(lines)


def merged_report(folder: Path) -> Report:
    """The reports of all shards in a folder; of each scene the line written last.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(folder.glob("report*.jsonl"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no report of a batch (report*.jsonl).")
    last: dict[str, dict[str, Any]] = {}
    for path in paths:
        for name, line in _last_lines(path).items():
            if name not in last or str(line.get("finished", "")) >= str(last[name].get("finished", "")):
                last[name] = line
    return Report([last[name] for name in sorted(last)])


NUMBERS = ("seconds", "megapixels", "megapixels_per_second", "peak_mb", "code", "attempts")
TEXTS = ("id", "status", "message", "finished")
MOST = 1e15
"""A figure beyond it, or NaN, was not measured."""


def _is_outcome(line: dict[str, Any]) -> bool:
    """Whether a line's fields have their types; a damaged line counts as torn."""
    numbers = (line[name] for name in NUMBERS if line.get(name) is not None)
    texts = all(isinstance(line.get(name, ""), str) for name in TEXTS)
    named = "id" in line and "status" in line
    return named and texts and all(type(n) in (int, float) and abs(n) < MOST for n in numbers)


FIGURES = ("seconds", "megapixels", "megapixels_per_second", "peak_mb", "device", "warnings")
"""Keys that a scene that was skipped has from the run that made its output."""


def _last_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Scene -> its last line in a report, whatever its clock shows; a skipped one keeps the figures of its making."""
    last: dict[str, dict[str, Any]] = {}
    for raw in path.read_bytes().split(b"\n"):
        try:
            line = parsed(raw)
        except ValueError:  # a killed run tore it
            continue
        if not isinstance(line, dict) or not _is_outcome(line):
            continue
        before = last.get(line["id"], {})
        if line["status"] == "skipped" and before.get("status") in ("done", "skipped"):
            line = line | {key: before[key] for key in FIGURES if key in before}
        last[line["id"]] = line
    return last
