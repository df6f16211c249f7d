"""A checkpoint is one safetensors file whose header carries a JSON card. No pickle is loaded."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from uknowpan.durable import Scratch, parsed
from uknowpan.models.architectures import ARCHITECTURES, TIMESTEPS, architecture_of, resolve
from uknowpan.models.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_MODEL = "generic"
FORMAT = "uknowpan-1"
RELEASED_SAMPLING = ("strided_timesteps", "respaced_time_index", "clamped_hrms")
"""Options of a diffusion stage that bring back a release's sampler, in sharpening as in validation."""


@dataclass(frozen=True)
class Card:
    """Description of a checkpoint, stored in its header."""

    name: str
    architecture: str
    """Key of `uknowpan.models.architectures.ARCHITECTURES`."""
    config: dict[str, Any]
    """Fields of the network's config."""
    stage: str
    sensor: str = "generic"
    bands: int | None = None
    """Number of bands that the network takes; None: any number."""
    ratios: list[int] = field(default_factory=lambda: [2, 3, 4, 5, 6])
    registration: str = "area"
    """Place of the MS in the training data: "area" or "pancollection". Either way the LMS in training
    lay on the truth, as `sharpen` lays it on the PAN."""
    residual_scale: float = 1.0
    """x0 = (gt - lms) / (residual_scale * detail contrast of the scene's band); "fsa-s-lite"."""
    residual_std: list[float] = field(default_factory=list)
    """x0 = (gt - lms) / residual_std, one per band, values divided by full scale; all but
    "fsa-s-lite" and "prior"."""
    max_value: float | None = None
    """Full scale of the training data in DN, where all of it had one."""
    self_conditioning: bool = False
    """Whether sampling feeds each step the prediction of the step before."""
    sampling: list[str] = field(default_factory=list)
    """Ways of a release's sampler, see `RELEASED_SAMPLING`; empty: ours."""
    steps: int = 1
    """Network evaluations taken by default."""
    sigma_scale: float = 1.0
    """Calibration: factor of the predicted 1-sigma, from validation scenes."""
    sigmas_90: float | None = None
    """Multiple of 1-sigma that holds 90 % of the errors, from the same scenes; None: not measured."""
    training: dict[str, Any] = field(default_factory=dict)
    """Data with licences, iterations, seed, code version, command."""
    scores: dict[str, Any] = field(default_factory=dict)
    """Measured results and the command that produced them."""
    limits: str = ""
    """Known failures."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            ValueError: a field of the wrong kind or out of range.
        """
        for name, kind in (("name", str), ("architecture", str), ("stage", str), ("sensor", str), ("limits", str),
                           ("training", dict), ("scores", dict), ("ratios", list),
                           ("residual_std", list), ("sampling", list), ("self_conditioning", bool)):  # fmt: skip
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be of type {kind.__name__}, not {getattr(self, name)!r}")
        whole = {"steps": self.steps, "bands": self.bands, **{f"ratio {i}": r for i, r in enumerate(self.ratios)}}
        for name, value in whole.items():
            if (name, value) != ("bands", None) and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number above 0, not {value!r}")
        if not self.ratios:
            raise ValueError("no ratios")
        optional = [n for n in ("max_value", "sigmas_90") if getattr(self, n) is not None]
        positive = {n: getattr(self, n) for n in ("residual_scale", "sigma_scale", *optional)}
        positive |= {f"residual_std {i}": v for i, v in enumerate(self.residual_std)}
        for name, value in positive.items():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, not {value!r}")
        if self.steps > self.timesteps:
            raise ValueError(f"steps must be at most its {self.timesteps} timesteps, not {self.steps}")
        if unknown := [way for way in self.sampling if way not in RELEASED_SAMPLING]:
            raise ValueError(f"sampling {unknown[0]!r} is unknown")
        if self.registration not in ("area", "pancollection"):
            raise ValueError(f"registration {self.registration!r} is unknown")

    @property
    def timesteps(self) -> int:
        """Length of the noise schedule that the network was trained with."""
        stored = self.config.get("timesteps", TIMESTEPS) if isinstance(self.config, dict) else TIMESTEPS
        return int(stored)


def config_of(kind: Any, values: Any) -> Any:
    """A config dataclass from JSON, which has no tuples and no nested dataclasses."""
    kinds = get_type_hints(kind)

    def field_of(name: str, value: Any) -> Any:
        if is_dataclass(kinds.get(name)):
            return config_of(kinds[name], value)
        given = tuple(value) if isinstance(value, list) else value
        if name in kinds and not _is_of(kinds[name], given):
            raise TypeError(f"{name} is {value!r}")
        return given

    return kind(**{name: field_of(name, value) for name, value in values.items()})


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value has the type of a config's field: bool, int, finite float, or several whole numbers."""
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if kind in (int, bool):
        return type(value) is kind
    return not isinstance(value, tuple) or all(type(number) is int for number in value)


def network_of(config: object) -> nn.Module:
    """The network that a config dataclass describes, with random weights."""
    network: nn.Module = resolve(architecture_of(config).network)(config)
    return network


SLACK = 4
"""Parameters made for one that stays, at most, while a network is built."""


@contextmanager
def at_most(tensors: int, numbers: int) -> Iterator[None]:
    """Stop building a network (ValueError) that has about more parameters than that, before memory is taken."""
    from torch.nn.modules.module import register_module_parameter_registration_hook as watch

    made = [0, 0]

    def count(module: nn.Module, name: str, parameter: Tensor | None) -> None:
        if parameter is None:
            return
        made[0], made[1] = made[0] + 1, made[1] + parameter.numel()
        if made[0] > SLACK * tensors or made[1] > SLACK * numbers:
            raise ValueError("the weights do not fit its card, whose network is far larger")

    handle: Any = watch(count)
    try:
        yield
    finally:
        handle.remove()


def build_network(card: Card, held: tuple[int, int] | None = None) -> nn.Module:
    """The network that a card describes, with random weights.

    Args:
        card: the card.
        held: tensors and numbers in them that the checkpoint's file holds; larger networks are refused unbuilt.

    Raises:
        CheckpointError: unknown architecture or config fields.
    """
    import torch

    entry = ARCHITECTURES.get(card.architecture)
    if entry is None:
        raise CheckpointError(
            f"the checkpoint's architecture {card.architecture!r} is unknown to this version "
            f"(known: {', '.join(ARCHITECTURES)})"
        )
    try:
        config = config_of(resolve(entry.config), card.config)
        if held is not None:
            with at_most(*held), torch.device("meta"):
                resolve(entry.network)(config)
        network: nn.Module = resolve(entry.network)(config)
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"the checkpoint's config does not fit architecture {card.architecture}: {error}"
        ) from error
    return network


def save_checkpoint(path: str | Path, model: nn.Module, card: Card) -> None:
    """Write weights and card to a temporary file beside the target, then rename it."""
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with Scratch(path) as scratch:
        scratch.path.write_bytes(_serialised(weights, metadata_of(card)))
        scratch.publish()


def metadata_of(card: Card) -> dict[str, str]:
    """The metadata of a file that holds the model of a card."""
    return {"format": FORMAT, "card": json.dumps(asdict(card), sort_keys=True)}


def _serialised(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file whose header is sorted, so that equal models have equal digests.

    safetensors itself writes metadata in the random order of a hash table.
    """
    from safetensors.torch import save

    raw = save(weights, metadata=metadata)
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:start]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors stay aligned
    return len(header).to_bytes(8, "little") + header + raw[start:]


def read_card(path: str | Path) -> Card:
    """The card of a checkpoint; reads the header only.

    Raises:
        CheckpointError: missing, truncated, not safetensors, or without a card.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({str(error).splitlines()[0]}); pickles "
            "(.pth, .pt) are never loaded"
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is a safetensors file without an uknowpan card")
    try:
        return Card(**parsed(metadata["card"]))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"the card of {path} cannot be read: {error}") from error


def read_weights(path: str | Path, library: str = "numpy") -> dict[str, Any]:
    """The weights of a checkpoint by name, as arrays of "numpy" or tensors of "torch".

    Raises:
        CheckpointError: they cannot be read.
    """
    from safetensors import SafetensorError

    try:
        weights: dict[str, Any] = resolve(f"safetensors.{library}:load_file")(path)
    except (SafetensorError, RuntimeError, OSError, KeyError) as error:
        raise CheckpointError(f"the weights in {path} cannot be read: {str(error).splitlines()[0]}") from error
    return weights


def load_model(path: str | Path) -> tuple[nn.Module, Card]:
    """Network with its weights (evaluation mode, CPU), and the card.

    Raises:
        CheckpointError: as `read_card`, or the weights do not fit the architecture.
    """
    card = read_card(path)
    weights = read_weights(path, "torch")
    model = build_network(card, (len(weights), sum(x.numel() for x in weights.values())))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1 if "\n" in str(error) else 0].strip()
        raise CheckpointError(f"the weights in {path} do not fit its card: {first}") from error
    return model.eval(), card


def bundled_models() -> dict[str, Path]:
    """Name -> file of the checkpoints inside the package."""
    folder = Path(str(resources.files("uknowpan.models"))) / "weights"
    return {stem: folder / f"{stem}.safetensors" for stem in sorted(p.stem for p in folder.glob("*.safetensors"))}


def find_checkpoint(name_or_path: str) -> Path:
    """A bundled model's name, or a path, to a file.

    Raises:
        CheckpointError: neither.
    """
    bundled = bundled_models()
    if name_or_path in bundled:
        return bundled[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise CheckpointError(
        f"no model {name_or_path!r}: neither a file nor bundled "
        f"(bundled: {', '.join(bundled) or 'none'}; see `uknowpan models list`)"
    )


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
