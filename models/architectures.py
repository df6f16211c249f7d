"""The table of networks: dotted names of everything that one needs, imported when needed.

A new network is one entry here and its own files. Nothing else names networks one by one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

TIMESTEPS = 500
"""Default length of the noise schedule (U-Know-DiffPAN, METHODS 1.1)."""


@dataclass(frozen=True)
class Architecture:
    """One network. Classes and functions are dotted names: `package.module:Name`."""

    network: str
    """Class of the network: takes its config, has `config`, and `pixel_multiple` in PAN pixels."""
    config: str
    """Dataclass of the network's shapes, stored in the checkpoint's card."""
    sharpener: str
    """Class that runs the network, see `uknowpan.models.sharpeners.Sharpener`."""
    stage: str
    """Name of the training stage, as `uknowpan train` takes it."""
    trainer: str
    """Class of the training stage; takes network config, data and options."""
    presets: Mapping[str, str] = field(default_factory=dict)
    """Preset name -> function (bands) -> `uknowpan.models.training.presets.Settings`."""
    option: str = "--stage"
    """Option of `uknowpan train` that names the stage; --model: a network with one stage of its own."""
    unfit_for_scenes: str = ""
    """Reason why `sharpen` refuses the network, with the way out; empty: it serves scenes."""


_MODELS = "uknowpan.models."
_UKNOW = _MODELS + "published.uknow."
_PAN_CRAFTER = _MODELS + "published.pan_crafter."
_SSDIFF = _MODELS + "published.ssdiff."

ARCHITECTURES: dict[str, Architecture] = {
    "prior": Architecture(
        network=_UKNOW + "prior:PriorNet",
        config=_UKNOW + "prior:PriorConfig",
        sharpener=_UKNOW + "sharpeners:PriorSharpener",
        stage="prior",
        trainer=_UKNOW + "stages:PriorStage",
        presets={
            "lite": _UKNOW + "presets:prior_lite",
            "paper": _UKNOW + "presets:prior_paper",
            "release": _UKNOW + "presets:prior_release",
        },
        unfit_for_scenes="the prior of a teacher (prior); train the teacher and its student with `uknowpan "
        "train` and sharpen with the student",
    ),
    "fsa-t": Architecture(
        network=_UKNOW + "guided:GuidedTeacher",
        config=_UKNOW + "guided:GuidedTeacherConfig",
        sharpener=_UKNOW + "sharpeners:TeacherSharpener",
        stage="fsa-t",
        trainer=_UKNOW + "stages:TeacherStage",
        presets={
            "lite": _UKNOW + "presets:teacher_lite",
            "paper": _UKNOW + "presets:teacher_paper",
            "release": _UKNOW + "presets:teacher_release",
        },
        unfit_for_scenes="a teacher (fsa-t); distil a student with `uknowpan train --stage fsa-s --teacher` "
        "and sharpen with that",
    ),
    "fsa-s-lite": Architecture(
        network=_MODELS + "network:FSAStudentLite",
        config=_MODELS + "network:LiteConfig",
        sharpener=_MODELS + "denoising:StudentSharpener",
        stage="fsa-s",
        trainer=_UKNOW + "stages:LiteStudentStage",
        presets={"lite": _UKNOW + "presets:student_lite"},
    ),
    "fsa-s-streams": Architecture(
        network=_MODELS + "streams:StreamsStudent",
        config=_MODELS + "features:StreamsConfig",
        sharpener=_MODELS + "denoising:StudentSharpener",
        stage="fsa-s",
        trainer=_MODELS + "training.stages:GenericStudentStage",
    ),
    "fsa-s": Architecture(
        network=_UKNOW + "student:FSAStudent",
        config=_UKNOW + "student:StudentConfig",
        sharpener=_MODELS + "denoising:UNetSharpener",
        stage="fsa-s",
        trainer=_UKNOW + "stages:StudentStage",
        presets={
            "paper": _UKNOW + "presets:student_paper",
            "release": _UKNOW + "presets:student_release",
        },
    ),
    "pan-crafter": Architecture(
        network=_PAN_CRAFTER + "network:PanCrafter",
        config=_PAN_CRAFTER + "network:PanCrafterConfig",
        sharpener=_MODELS + "denoising:OnePassSharpener",
        stage="pan-crafter",
        trainer=_PAN_CRAFTER + "stage:PanCrafterStage",
        presets={
            "lite": _PAN_CRAFTER + "presets:lite",
            "paper": _PAN_CRAFTER + "presets:paper",
            "release": _PAN_CRAFTER + "presets:release",
        },
        option="--model",
    ),
    "ssdiff": Architecture(
        network=_SSDIFF + "network:SSDiff",
        config=_SSDIFF + "network:SSDiffConfig",
        sharpener=_MODELS + "denoising:UNetSharpener",
        stage="ssdiff",
        trainer=_SSDIFF + "stage:SSDiffStage",
        presets={
            "lite": _SSDIFF + "presets:lite",
            "paper": _SSDIFF + "presets:paper",
            "release": _SSDIFF + "presets:release",
        },
        option="--model",
    ),
}
"""Name of a network, as cards store it -> its entry."""


def resolve(dotted: str) -> Any:
    """The class or function of a dotted name, `package.module:Name`."""
    module, name = dotted.split(":")
    return getattr(import_module(module), name)


def name_of(config: object) -> str:
    """The name of the network that a config describes.

    Raises:
        KeyError: the config is of no network in the table.
    """
    kind = type(config)
    dotted = f"{kind.__module__}:{kind.__qualname__}"
    for name, entry in ARCHITECTURES.items():
        if entry.config == dotted:
            return name
    raise KeyError(dotted)


def architecture_of(config: object) -> Architecture:
    """The entry of a network's config; KeyError as `name_of`."""
    return ARCHITECTURES[name_of(config)]


def stage_names(option: str) -> tuple[str, ...]:
    """Stages that an option of `uknowpan train` (--stage or --model) offers."""
    return tuple(dict.fromkeys(entry.stage for entry in ARCHITECTURES.values() if entry.option == option))
