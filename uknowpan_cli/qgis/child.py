"""uknowpan as a child process: progress and messages from JSON lines, and its end on request. No QGIS is needed."""

import json
import os
import queue
import re
import shutil
import subprocess
import threading
from typing import Any, Protocol

OWN = ("PYTHONHOME", "PYTHONPATH", "GDAL_DATA", "GDAL_DRIVER_PATH", "PROJ_LIB", "PROJ_DATA", "GEOTIFF_CSV")
"""Variables that QGIS sets for its own Python, GDAL and PROJ; another Python would take the wrong files."""
PATIENCE = 20.0
"""Seconds after which a child that was asked to end is killed."""
SURVEY = 0.1
"""Share of a sharpening that its survey takes in the progress bar."""


class Feedback(Protocol):
    """The methods of QgsProcessingFeedback that a run uses."""

    def isCanceled(self) -> bool: ...
    def setProgress(self, percent: float) -> None: ...
    def pushInfo(self, text: str) -> None: ...
    def pushWarning(self, text: str) -> None: ...


class ChildFailed(Exception):
    """The command failed or was cancelled; the text is its own sentence."""


def executable(folder: str) -> str | None:
    """Path of the command in a folder, or in its bin or Scripts; without a folder, on PATH."""
    places = [os.path.join(folder, inner) for inner in ("", "bin", "Scripts")] if folder else []
    return shutil.which("uknowpan", path=os.pathsep.join(places) or None)


def share_done(entry: dict[str, Any]) -> float:
    """Share of a run that is done, from 0 to 1, by a JSON line on its progress."""
    share = entry["done"] / max(entry["total"], 1)
    scene = re.match(r"(\d+)/(\d+) ", entry["stage"])
    if scene:
        return (int(scene[1]) - 1 + share) / int(scene[2])
    first, width = {"survey": (0.0, SURVEY), "sharpen": (SURVEY, 1 - SURVEY)}.get(entry["stage"], (0.0, 1.0))
    return first + width * share


def run(command: list[str], feedback: Feedback) -> str:
    """Run a command of uknowpan until it ends, and return what it printed.

    Raises:
        ChildFailed: the exit code is not 0, or the feedback was cancelled.
    """
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONUTF8": "1"},
        encoding="utf-8",
        errors="replace",
        creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
    )
    with process:
        printed, sentence = _followed(process, feedback)
    if process.returncode:
        raise ChildFailed(sentence or printed or f"uknowpan ended with exit code {process.returncode}.")
    return printed


def _followed(process: "subprocess.Popen[str]", feedback: Feedback) -> tuple[str, str]:
    """Show what a child reports until it ends; returns what it printed, and the sentence that it failed with."""
    lines: queue.Queue[str | None] = queue.Queue()
    reader = threading.Thread(target=_read, args=(process, lines))
    reader.start()
    printed, sentence = [], ""
    while not feedback.isCanceled():
        try:
            line = lines.get(timeout=0.2)
        except queue.Empty:
            continue
        if line is None:
            return "\n".join(printed), sentence
        entry = _entry(line)
        if entry is None:
            printed.append(line)
        elif "exit_code" in entry:
            sentence = entry["message"]
        elif entry["message"] == "progress":
            feedback.setProgress(100 * share_done(entry))
        elif entry["level"] in ("warning", "error"):
            feedback.pushWarning(entry["message"])
        elif entry["level"] == "info":
            feedback.pushInfo(entry["message"])
    _end(process)
    reader.join()
    raise ChildFailed("Cancelled.")


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    for line in process.stdout or ():
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _entry(line: str) -> dict[str, Any] | None:
    """A JSON line of --log-json, or None for other text."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and {"time", "level", "message"} <= set(entry) else None


def _end(process: "subprocess.Popen[str]") -> None:
    """End a child: a scene keeps its finished strips, and leaves no other file."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
