"""What the tests of the command line share beside fixtures."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rasters import RasterPair

from uknowpan.models.checkpoints import Card, save_checkpoint
from uknowpan.models.network import FSAStudentLite, LiteConfig


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> str:
        """stderr without progress and the line that sums a run up."""
        return re.sub(r"(?m)^(survey|sharpen): .* s left\n|^.*: \d+ x \d+ pixels, .* Mpx/s\n", "", self.stderr)


Run = Callable[..., Outcome]
MakePair = Callable[..., RasterPair]


def write_tiny_model(path: Path, bands: int | None = None, **changes: object) -> Path:
    """A quick student whose every layer has a say (untrained ones start at zero)."""
    torch.manual_seed(1)
    config = {"width": 4, "deep_width": 8, "blocks": 1, "deep_blocks": 1}
    network = FSAStudentLite(LiteConfig(**config))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    card = {
        "name": "tiny", "architecture": "fsa-s-lite", "config": config, "stage": "fsa-s",
        "bands": bands,
    }  # fmt: skip
    save_checkpoint(path, network, Card(**(card | changes)))
    return path


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
"""Python for `spawn`: the process sends itself a signal once so many strips are finished."""


def spawn(
    *arguments: object,
    before: str = "",
    file_limit: int | None = None,
    environment: dict[str, str] | None = None,
    inherited: tuple[int, ...] = (),
) -> Outcome:
    """A command in a process of its own.

    before: Python that runs first. file_limit: bytes that no file may exceed: beyond it writing
    fails as on a full disk. inherited: file descriptors that the process may use.
    """

    def prepare() -> None:
        # A test run in the background ignores Ctrl-C, and so would its children.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    done = subprocess.run(
        [
            *(sys.executable, "-c", f"{before}\nfrom uknowpan.commands.main import main\nmain()"),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        pass_fds=inherited,
        env={**os.environ, **(environment or {})},
        preexec_fn=prepare,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)
