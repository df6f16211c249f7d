"""Helpers of the command line's tests, beside fixtures."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasters import RasterPair

from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.network import FSAStudentLite, LiteConfig


@dataclass(frozen=True)
class Outcome:
    """The exit code and the streams of a command."""

    code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> str:
        """stderr without progress and the line that sums a run up."""
        return re.sub(r"(?m)^(survey|sharpen): .* s left\n|^.*: \d+ x \d+ pixels, .* Mpx/s\n", "", self.stderr)

    def fails(self, code: int, text: str = "") -> None:
        """Check that the command failed with one sentence that holds a pattern, and printed nothing else."""
        assert (self.code, self.stdout) == (code, ""), self.stderr
        assert re.fullmatch(rf"uknowpan: error: (?=\S).*{text}.*\n", self.messages), self.stderr


Run = Callable[..., Outcome]
MakePair = Callable[..., RasterPair]


def read(path: Path | str) -> np.ndarray:
    with rasterio.open(path) as dataset:
        return dataset.read()


def pixels(folder: Path) -> dict[str, bytes]:
    """Name of each GeoTIFF in a folder -> its pixels."""
    return {path.name: read(path).tobytes() for path in folder.glob("*.tif")}


def write_tiny_model(path: Path, bands: int | None = None, **changes: object) -> Path:
    """A quick student whose every layer has a say (untrained ones start at zero)."""
    torch.manual_seed(1)
    config = {"width": 4, "deep_width": 8, "blocks": 1, "deep_blocks": 1}
    network = FSAStudentLite(LiteConfig(**config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    card = {"name": "tiny", "architecture": "fsa-s-lite", "config": config, "stage": "fsa-s", "bands": bands}
    save_checkpoint(path, network, Card(**(card | changes)))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_blocks(path: Path) -> None:
    """Spoil the compressed data, not the header: the file opens and fails in the middle."""
    with rasterio.open(path) as dataset:
        places = [
            int(dataset.get_tag_item(f"BLOCK_OFFSET_0_{y}", "TIFF", 1))
            for y in range(-(-dataset.height // dataset.block_shapes[0][0]))
        ]
    data = bytearray(path.read_bytes())
    for place in places[len(places) // 2 :]:
        data[place : place + 40] = b"\xff" * 40
    path.write_bytes(bytes(data))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, hidden files too, with size and time."""
    return {
        str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns)
        for p in sorted(folder.rglob("*"))
        if not p.is_dir()
    } | {str(p.relative_to(folder)): (0, 0) for p in folder.rglob("*") if p.is_dir()}


STOPPING = """
import os, signal
from uknowpan.tiling import StripStore
put, done = StripStore.put, []
def stopping(self, index, rows):
    put(self, index, rows)
    done.append(index)
    if len(done) == {strips}:
        os.kill(os.getpid(), signal.{name})
StripStore.put = stopping
"""
"""Python for `spawn`: the process sends itself a signal once a number of strips is finished."""


def spawn(
    *arguments: object,
    before: str = "",
    file_limit: int | None = None,
    environment: dict[str, str] | None = None,
    inherited: tuple[int, ...] = (),
) -> Outcome:
    """A command in a process of its own.

    before: Python that runs first. file_limit: bytes beyond which writing a file fails, as on a full
    disk. inherited: file descriptors that the process may use.
    """

    def prepare() -> None:
        # A test run in the background ignores Ctrl-C, and so would its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        [sys.executable, "-c", f"{before}\nfrom uknowpan.commands.main import main\nmain()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        pass_fds=inherited,
        env={**os.environ, **(environment or {})},
        preexec_fn=prepare,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
