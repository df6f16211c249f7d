"""The folder of a training run: configuration, log, state, and the lock that keeps others out.

Files: config.json, log.jsonl, state.pt (for resuming), last.safetensors and best.safetensors.
"""

import json
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch

from uknowpan.durable import Scratch, lock, parsed, write_text
from uknowpan.errors import ModelError
from uknowpan.models.errors import CheckpointError, DataError


class ConfigMismatch(ModelError):
    """A run would be resumed with another configuration or other data."""


def resolved_config(
    stage: str, config: Any, network: Any, options: Any, data: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The whole configuration as config.json holds it; `data` is `Stage.data_identity`."""
    tables = {"stage": stage, "train": asdict(config), "network": asdict(network), "options": asdict(options)}
    if data is not None:
        tables["data"] = data
    return plain(tables)


def plain(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as JSON returns it: tuples become lists."""
    restored: dict[str, Any] = json.loads(json.dumps(config))
    return restored


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The fields of two configurations that differ; fields of only one side belong to another version."""
    before, now = _flat(before), _flat(now)
    shared = [key for key in before if key in now and before[key] != now[key]]
    return ", ".join(f"{key} {_short(before[key])} (here {_short(now[key])})" for key in shared)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"stage": s, "train": {"seed": 0}} -> {"stage": s, "train.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = {f"{key}.{k}": v for k, v in _flat(value).items()} if isinstance(value, dict) else {key: value}
        flat |= inner
    return flat


def _iterations(config: dict[str, Any]) -> float:
    value = config.get("train", {}).get("iterations") if isinstance(config.get("train"), dict) else None
    return value if isinstance(value, int) else math.inf


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path):
        self.path = path
        self.state = path / "state.pt"
        self._config, self._log = path / "config.json", path / "log.jsonl"

    def check_config(self, resolved: dict[str, Any]) -> None:
        """Refuse to resume a run that was begun with another configuration; more iterations are none."""
        try:
            stored = parsed(self._config.read_text())
            if missing := sorted(resolved.keys() - stored.keys()):
                raise ValueError(f"it lacks {' and '.join(missing)}")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self._config} cannot be read ({error}), so --resume cannot check the configuration; "
                "begin anew in another folder."
            ) from error
        if _iterations(stored) < _iterations(resolved):
            stored = {**stored, "train": {**stored["train"], "iterations": _iterations(resolved)}}
        if differing := differences(stored, resolved):
            raise ConfigMismatch(
                f"the run in {self.path} was begun with {differing}; --resume needs the same "
                "configuration and data, others a folder of their own."
            )

    def write_config(self, resolved: dict[str, Any]) -> None:
        """Replace config.json."""
        write_text(self._config, json.dumps(resolved, indent=2) + "\n")

    def trim_log(self, step: int) -> None:
        """Drop the log's lines after a step: a run may die after its last state and repeat steps."""
        if self._log.exists():
            lines = self._log.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if kept != lines:
                write_text(self._log, b"".join(kept).decode())

    def append(self, entry: dict[str, Any]) -> None:
        """Append a line to log.jsonl."""
        with open(self._log, "a") as log:
            log.write(json.dumps(entry) + "\n")

    def save_state(self, state: dict[str, Any]) -> None:
        """Write state.pt, beside the old one first: that stays if the new one cannot be written."""
        try:
            with Scratch(self.state) as scratch:
                torch.save(state, scratch.path)
                scratch.publish()
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
            raise DataError(
                f"{self.state} cannot be written ({str(error).splitlines()[0]}); make room, then "
                "--resume goes on from the state before."
            ) from error

    @contextmanager
    def saved_state(self, device: torch.device) -> Iterator[dict[str, Any]]:
        """The content of state.pt; any failure of the body that restores it is a `CheckpointError`."""
        try:
            yield torch.load(self.state, map_location=device, weights_only=True)
        except torch.OutOfMemoryError:  # a RuntimeError, but not the file's fault
            raise
        except (
            *(RuntimeError, pickle.UnpicklingError, EOFError, LookupError, OSError),
            *(TypeError, ValueError, ArithmeticError, AttributeError),
        ) as error:
            raise CheckpointError(
                f"{self.state} is damaged or cannot be read ({type(error).__name__}), so the run cannot "
                "go on; begin another folder, with --init and a checkpoint of this one for its weights."
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder if need be, and keep other runs out of it."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / ".lock"
        with _locked(path):
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # still locked: nobody else's


def _step_of(line: bytes) -> float:
    """The step of a line of the log; infinity for a line that was cut off or is no text."""
    try:
        return int(parsed(line)["step"])
    except (ValueError, LookupError, TypeError, OverflowError):
        return math.inf


def _locked(path: Path) -> IO[str]:
    """The file, made if need be and locked until it is closed."""
    while True:
        file = open(path, "w")  # noqa: SIM115 - for writing, or NFS would not lock it
        try:
            if not lock(file):
                return file
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError):
                text = f"Another run is training in {path.parent}; wait for it"
            else:
                text = f"{path.parent} cannot be locked ({error.strerror}); try again"
            raise DataError(f"{text}, or choose another folder.") from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()  # its owner removed the file before we had it; look again
