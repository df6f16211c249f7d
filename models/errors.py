"""Errors of models and their data. The text of each is one sentence for the user."""

from uknowpan.errors import InputError, ModelError


class CheckpointError(ModelError):
    """A checkpoint is missing, damaged, or of an unknown architecture."""


class ModelMismatch(ModelError):
    """The checkpoint does not serve this scene (bands, ratio)."""


class DataError(InputError):
    """A training file is not what it should be."""
