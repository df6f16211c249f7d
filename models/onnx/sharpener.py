"""The student as a sharpener that ONNX Runtime runs, on the CPU and in one step."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

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
from uknowpan.models.devices import share_of_caller
from uknowpan.models.errors import CheckpointError, ModelMismatch
from uknowpan.models.features import StreamsConfig
from uknowpan.models.geometry import Origins
from uknowpan.models.onnx.streams import student_graph, student_parts
from uknowpan.models.registration.field import Registration
from uknowpan.models.resample import Array, crop, pieces
from uknowpan.models.sharpeners import Pixels, Sharpened, StudentWindows
from uknowpan.models.statistics import SceneStatistics

T = TypeVar("T")

SERVED = "fsa-s-streams"
"""Architecture that the engine runs."""


class OnnxSharpener(StudentWindows):
    """The `generic` student in ONNX Runtime; arrays in, arrays out."""

    multiple = 4

    def __init__(
        self,
        sessions: Callable[[int], tuple[Any, Any]],
        threads: int,
        card: Card,
        config: StreamsConfig,
        softness: float | str | None,
        digest: str,
    ):
        super().__init__(card, None, softness, digest)
        self.sessions, self.threads, self.config = sessions, threads, config

    @property
    def halo(self) -> int:
        return self.config.reach

    def floats_per_pixel(self, field: Registration | None) -> int:
        if field is None:
            return 32  # measured with tiles of 512: up to 27, 32 with a displacement, 68 with one for each band
        return 75 if field.own_bands else 38

    def staged(self, images: Array) -> Pixels:
        return images

    def sharpen(self, pan: Pixels, ms: Pixels, statistics: SceneStatistics, origins: Origins) -> Sharpened:
        """Sharpen windows, see `Sharpener`; the network takes one after the other."""
        made: Any = self.condition(np.asarray(pan), np.asarray(ms), statistics, origins)
        x0, log_sigma = np.stack(
            [
                self._answer(band, own[None], scene[None, : self.config.scene_features])
                for band, own, scene in zip(made.band_features, made.pan_features, made.scene, strict=True)
            ],
            axis=1,
        )
        unit = self.unit(statistics, made.pan)
        sigma = np.exp(log_sigma) * unit * np.float32(self.card.sigma_scale)
        return Sharpened(crop(made.lms, self.halo) + unit * x0, sigma)

    def _answer(self, band: Array, pan: Array, scene: Array) -> Array:
        """x0 and log sigma (2, C, H, W) of the core of one window."""
        (bands, _, height, width), (streams, maps) = band.shape, self.sessions(share_of_caller(self.threads))
        own, shared = _run(streams, band=band, pan=pan, scene=scene)
        answer = np.empty((2, bands, height - 2 * self.halo, width - 2 * self.halo), np.float32)
        for k, (down, across) in product(range(bands), pieces(height, width, self.halo)):
            made = _run(
                maps,
                own=own[k : k + 1, :, down.cells(4), across.cells(4)],
                shared=shared[:, :, down.cells(2), across.cells(2)],
                band=band[k : k + 1, :, down.read, across.read],
            )
            for whole, part in zip(answer, made, strict=True):
                whole[k, down.place, across.place] = part[0, 0, down.inner, across.inner]
        return answer

    def provenance(self) -> dict[str, str]:
        tags = {"MODEL": self.name, "SHA256": self.digest, "STEPS": "1", "PRECISION": "float32", "DEVICE": "cpu"}
        return {**tags, "ENGINE": "onnx"} | self.softness_tag()


def _run(session: Any, **inputs: Array) -> list[Array]:
    try:
        answer: list[Array] = session.run(None, inputs)
    except Exception as error:  # the runtime's errors have no base of their own; as PyTorch's for full memory
        raise RuntimeError(str(error)) from error
    return answer


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
        threads: where the calling thread took no share of the cores.

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
    card, parts = _made(path, lambda _, weights, config: student_parts(weights, config))
    if (card.steps if steps is None else steps) != 1:
        raise ModelMismatch(f"--engine onnx takes one step, not {steps or card.steps}; use --engine torch.")

    @lru_cache
    def sessions(count: int) -> tuple[Any, Any]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = count
        options.log_severity_level = 4  # its errors are raised besides
        options.enable_mem_pattern = False  # one block for all of a window would take twice the memory
        options.enable_cpu_mem_arena = False  # it would keep from NumPy what a smaller tile leaves
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning starves busy machines
        try:
            first, second = (
                onnxruntime.InferenceSession(part, options, providers=["CPUExecutionProvider"]) for part in parts
            )
        except Exception as error:  # the runtime's errors have no base of their own
            raise _misfit(path, error) from error
        return first, second

    sessions(threads)  # or a fault would show late
    return OnnxSharpener(sessions, threads, card, config_of(StreamsConfig, card.config), softness, sha256(path))


def student_file(path: Path) -> tuple[Card, bytes]:
    """The card of a checkpoint and its ONNX file, see `student_graph`; the metadata are those of the checkpoint.

    Raises:
        CheckpointError: the file is damaged.
        ModelMismatch: it has no graph.
    """
    return _made(path, lambda card, weights, config: student_graph(weights, config, metadata_of(card)))


def _made(path: Path, graph: Callable[[Card, dict[str, Array], StreamsConfig], T]) -> tuple[Card, T]:
    """The card of a checkpoint, and what is made of it, the weights and the config. Raises as `student_file`."""
    card = read_card(path)
    if card.architecture != SERVED:
        raise ModelMismatch(
            f"model {card.name} is {card.architecture}, and only {SERVED} has a graph of ONNX; take --engine torch"
        )
    weights = read_weights(path)
    try:
        return card, graph(card, weights, config_of(StreamsConfig, card.config))
    except (KeyError, ValueError) as error:
        raise _misfit(path, error) from error


def _misfit(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"the weights in {path} do not fit its card: {str(error).splitlines()[0]}")
