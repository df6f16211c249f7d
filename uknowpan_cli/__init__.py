"""The command line of uknowpan: the only folder that imports both maps and tensors."""

__version__ = "0.1.0"
