"""What can go wrong with models and their data; every message is one sentence for the user."""

__all__ = ["CheckpointError", "DataError", "ModelError", "ModelMismatch"]


class ModelError(Exception):
    """Root of the errors of this package."""


class CheckpointError(ModelError):
    """A checkpoint is missing, damaged, or of an unknown architecture."""


class ModelMismatch(ModelError):
    """The checkpoint does not serve this scene (bands, ratio)."""


class DataError(ModelError):
    """A training file is not what it should be."""
