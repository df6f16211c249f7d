"""A graph of ONNX as bytes, so that no package but a runtime is needed.

The file is protobuf, of which a graph needs three kinds of fields: whole numbers, floats and bytes. Numbers of
fields are those of `onnx.proto`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import numpy as np

from uknowpan.models.resample import Array

IR_VERSION, OPSET = 9, 18
FLOAT, INT64 = 1, 7
"""Kinds of tensors, `TensorProto.DataType`."""


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first; a negative number as one of 64 bits."""
    value &= (1 << 64) - 1
    digits = bytearray()
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return bytes([*digits, value])


def _field(number: int, *values: int | float | str | bytes) -> bytes:
    """One field of a message, once for each value."""
    made = b""
    for value in values:
        if isinstance(value, int):
            made += _varint(number << 3) + _varint(value)
        elif isinstance(value, float):
            made += _varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            content = value.encode() if isinstance(value, str) else value
            made += _varint(number << 3 | 2) + _varint(len(content)) + content
    return made


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    """An `AttributeProto`: INT is kind 2 in field 3, INTS kind 7 in field 8."""
    kind, number, values = (2, 3, (value,)) if isinstance(value, int) else (7, 8, value)
    return _field(1, name) + _field(number, *values) + _field(20, kind)


class Graph:
    """Nodes and constants. A value is its name, and an array becomes a constant."""

    def __init__(self) -> None:
        self._nodes: list[bytes] = []
        self._constants: list[bytes] = []
        self._names = 0

    def _name(self) -> str:
        self._names += 1
        return f"v{self._names}"

    def _constant(self, values: Array) -> str:
        values = np.asarray(values)
        kind, dtype = (INT64, "<i8") if values.dtype.kind == "i" else (FLOAT, "<f4")
        name = self._name()
        content = _field(9, values.astype(dtype).tobytes())
        self._constants.append(_field(1, *values.shape) + _field(2, kind) + _field(8, name) + content)
        return name

    def many(self, kind: str, inputs: Sequence[str | Array], outputs: Sequence[str], **attributes: object) -> None:
        """A node of the operator `kind` with named outputs."""
        names = [x if isinstance(x, str) else self._constant(x) for x in inputs]
        own = [_attribute(name, value) for name, value in attributes.items()]  # type: ignore[arg-type]
        self._nodes.append(_field(1, *names) + _field(2, *outputs) + _field(4, kind) + _field(5, *own))

    def __call__(self, kind: str, *inputs: str | Array, **attributes: object) -> str:
        """The one output of the operator `kind`."""
        name = self._name()
        self.many(kind, inputs, [name], **attributes)
        return name

    def split(self, x: str, sizes: Sequence[int]) -> list[str]:
        """The channels of x (N, C, H, W) in parts."""
        names = [self._name() for _ in sizes]
        self.many("Split", [x, np.array(sizes)], names, axis=1)
        return names

    def model(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
        metadata: Mapping[str, str],
    ) -> bytes:
        """The whole file; sizes of its inputs and outputs are numbers, or names where they are free."""

        def declared(name: str, shape: Sequence[int | str]) -> bytes:
            sizes = [_field(1, _field(1 if isinstance(n, int) else 2, n)) for n in shape]
            kind = _field(1, _field(1, FLOAT) + _field(2, b"".join(sizes)))
            return _field(1, name) + _field(2, kind)

        graph = (
            _field(1, *self._nodes)
            + _field(2, "uknowpan")
            + _field(5, *self._constants)
            + _field(11, *(declared(*entry) for entry in inputs.items()))
            + _field(12, *(declared(*entry) for entry in outputs.items()))
        )
        entries = (_field(1, key) + _field(2, value) for key, value in metadata.items())
        return (
            _field(1, IR_VERSION)
            + _field(7, graph)
            + _field(8, _field(1, "") + _field(2, OPSET))
            + _field(14, *entries)
        )
