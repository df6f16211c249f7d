"""The student as a sharpener that ONNX Runtime runs, on the CPU and in one step."""

from pathlib import Path
from typing import Any

import numpy as np

from uknowpan.errors import ModelError
from uknowpan.models.checkpoints import (
    Card,
    config_of,
    find_checkpoint,
    metadata_of,
    read_card,
    read_weights,
    sha256,
)
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import StreamsConfig
from uknowpan.models.geometry import Origins
from uknowpan.models.onnx.streams import student_graph
from uknowpan.models.resample import Array, crop
from uknowpan.models.sharpeners import Pixels, Sharpened, StudentWindows
from uknowpan.models.statistics import SceneStatistics

SERVED = "fsa-s-streams"
"""Architecture that the engine runs."""


class OnnxSharpener(StudentWindows):
    """The `generic` student in ONNX Runtime; arrays in, arrays out."""

    multiple = 4

    def __init__(self, session: Any, card: Card, config: StreamsConfig, softness: float | str | None, digest: str):
        super().__init__(card, None, softness, digest)
        self.session, self.config = session, config

    @property
    def halo(self) -> int:
        return self.config.reach

    def staged(self, images: Array) -> Pixels:
        return images

    def sharpen(self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins) -> Sharpened:
        """Sharpen windows, see `Sharpener`; the network takes one after the other."""
        made: Any = self.condition(np.asarray(pan), np.asarray(ms), statistics, origins)
        answers = [
            self._run(band=band, pan=own[None], scene=scene[None, : self.config.scene_features])
            for band, own, scene in zip(made.band_features, made.pan_features, made.scene, strict=True)
        ]
        x0, log_sigma = (crop(np.stack(parts)[:, :, 0], self.halo) for parts in zip(*answers, strict=True))
        unit = self.unit(statistics, made.pan)
        sigma = np.exp(log_sigma) * unit * np.float32(self.card.sigma_scale)
        return Sharpened(crop(made.lms, self.halo) + unit * x0, sigma)

    def _run(self, **inputs: Array) -> list[Array]:
        try:
            answer: list[Array] = self.session.run(None, inputs)
        except Exception as error:  # the runtime's errors have no base of their own; as PyTorch's for full memory
            raise RuntimeError(str(error)) from error
        return answer

    def provenance(self) -> dict[str, str]:
        tags = {"MODEL": self.name, "SHA256": self.digest, "STEPS": "1", "PRECISION": "float32", "DEVICE": "cpu"}
        return {**tags, "ENGINE": "onnx"} | self.softness_tag()


def serves(model: str, steps: int | None) -> bool:
    """Whether the engine runs that model, by name or path, with so many steps (None: as its card declares)."""
    card = read_card(find_checkpoint(model))
    return card.architecture == SERVED and (card.steps if steps is None else steps) == 1


def load_student(
    model: str, *, steps: int | None = None, softness: float | str | None = None, threads: int = 1
) -> OnnxSharpener:
    """The sharpener of a checkpoint, whose graph is built from its weights.

    Args:
        model: bundled name or path.
        steps: 1 or None.
        softness: as of `uknowpan.models.sharpeners.load_sharpener`.
        threads: of the session.

    Raises:
        CheckpointError: no such model, or its file is damaged.
        ModelMismatch: the engine cannot run it.
        ModelError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ModelError("--engine onnx needs ONNX Runtime; `pip install onnxruntime` brings it.") from error
    path = find_checkpoint(model)
    card, graph = student_file(path)
    if (card.steps if steps is None else steps) != 1:
        raise ModelMismatch(f"--engine onnx takes one step, not {steps or card.steps}; use --engine torch.")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning starves busy machines
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no base of their own
        raise _misfit(path, error) from error
    return OnnxSharpener(session, card, config_of(StreamsConfig, card.config), softness, sha256(path))


def student_file(path: Path) -> tuple[Card, bytes]:
    """The card of a checkpoint and its ONNX file, see `student_graph`; the metadata are those of the checkpoint.

    Raises:
        CheckpointError: the file is damaged.
        ModelMismatch: it has no graph.
    """
    card = read_card(path)
    if card.architecture != SERVED:
        raise ModelMismatch(
            f"model {card.name} is {card.architecture}, and only {SERVED} has a graph of ONNX; take --engine torch"
        )
    weights = read_weights(path)
    try:
        return card, student_graph(weights, config_of(StreamsConfig, card.config), metadata_of(card))
    except (KeyError, ValueError) as error:
        raise _misfit(path, error) from error


def _misfit(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the weights in {path} do not fit its card: {str(error).splitlines()[0]}")
