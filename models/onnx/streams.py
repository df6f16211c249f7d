"""The student of two streams as a graph: `uknowpan.models.streams` at the last timestep, where x_t is zeros.

The bands of one image are the first axis, of any length. The sine and cosine of the time are constants. Depth becomes
space, and space depth, by convolutions that move pixels: ONNX Runtime does them faster than its operators for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from uknowpan.models.features import (
    BACK_PROJECTION,
    BAND_FEATURES,
    CELLS,
    CORRECTION,
    INJECTIONS,
    LEAST_POWER,
    LOG_SIGMA,
    MAPS,
    MISSING,
    ON_PAN,
    PAN_FEATURES,
    StreamsConfig,
)
from uknowpan.models.onnx.graph import Graph
from uknowpan.models.resample import Array


class _Network(Graph):
    """Layers by the names of their weights."""

    def __init__(self, weights: Mapping[str, Array]):
        super().__init__()
        self.unused = dict(weights)

    def take(self, name: str, *shape: int) -> tuple[Array, Array]:
        """Weight and bias of a layer, whose first sizes are given."""
        weight, bias = (self.unused.pop(f"{name}.{part}") for part in ("weight", "bias"))
        if weight.shape[: len(shape)] != shape:
            raise ValueError(f"{name} has the shape {weight.shape}")
        return weight, bias

    def conv(self, x: str, weight: Array, bias: Array, stride: int = 1) -> str:
        side = weight.shape[-1]
        pads = [side // 2 if stride == 1 else 0] * 4
        return self("Conv", x, weight, bias, kernel_shape=[side] * 2, pads=pads, strides=[stride] * 2)

    def check(self) -> None:
        """Raise ValueError where a weight was not taken."""
        if self.unused:
            raise ValueError(f"there is no place for {next(iter(self.unused))}")

    def linear(self, x: str, name: str) -> str:
        return self("Gemm", x, *self.take(name), transB=1)

    def silu(self, x: str) -> str:
        return self("Mul", x, self("Sigmoid", x))

    def norm(self, x: str, name: str, centred: bool = False) -> str:
        """`uknowpan.models.network.PixelNorm`; centred: the mean over the channels of x is 0."""
        weight, bias = self.take(name)
        if not centred:
            x = self("Sub", x, self("ReduceMean", x, np.array([1])))
        power = self("ReduceSumSquare", x, np.array([1]))
        y = self("Div", x, self("Sqrt", self("Add", power, np.array(len(weight) * 1e-5))))
        scale = weight * math.sqrt(len(weight) * (1 + 1e-5))  # the operator's own epsilon
        return self("BatchNormalization", y, scale, bias, 0 * bias, 0 * bias + 1)

    def compress(self, x: str) -> str:
        """`uknowpan.models.network.compress`."""
        size = self("Abs", x)
        root = self("Sqrt", self("Add", self("Mul", size, size), np.array(1.0)))
        return self("Mul", self("Sign", x), self("Log", self("Add", size, root)))

    def mean_of_cells(self, x: str) -> str:
        return self("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])

    def to_space(self, x: str, weight: Array) -> str:
        """(N, K, h, w) -> (N, F, 2 h, 2 w) by weights (K, F, 2, 2): each pixel becomes four."""
        return self("ConvTranspose", x, weight, kernel_shape=[2, 2], strides=[2, 2])

    def block(self, x: str, name: str, embedding: str, other: str) -> str:
        """`uknowpan.models.streams.StreamBlock`."""
        embedded = self("Unsqueeze", self.linear(embedding, f"{name}.embed"), np.array([2, 3]))
        shared = self("Add", self.conv(other, *self.take(f"{name}.context")), embedded)
        y = self("Add", self.conv(self.norm(x, f"{name}.norm"), *self.take(f"{name}.first")), shared)
        return self("Add", x, self.conv(self.silu(y), *self.take(f"{name}.second")))


def student_graph(weights: Mapping[str, Array], config: StreamsConfig, metadata: Mapping[str, str]) -> bytes:
    """The ONNX file of a student.

    Args:
        weights: those of the checkpoint, by name.
        config: the card's.
        metadata: entries of the file, by name.

    Returns:
        A model of band (C, 7, H, W), pan (1, 3, H, W) and scene (1, S), H and W multiples of 4, that gives x0 and
        log_sigma, (C, 1, H, W).

    Raises:
        KeyError, ValueError: the weights are not those of the config.
    """
    net = _Network(weights)
    _mixed(net, *_streams(net, config))
    net.check()
    return net.model(_given(config), _ANSWER, metadata)


def student_parts(weights: Mapping[str, Array], config: StreamsConfig) -> tuple[bytes, bytes]:
    """The same in two files, of which the second serves pieces of a window.

    Returns:
        A model as that of `student_graph` that gives own (C, K, H / 4, W / 4) and shared (1, K, H / 2, W / 2), and one
        that takes these and band, or the same piece of all, and gives x0 and log_sigma.
    """
    net = _Network(weights)
    own, shared, up = _streams(net, config)
    net.many("Identity", [own], ["own"])
    net.many("Identity", [shared], ["shared"])
    between: dict[str, list[int | str]] = {
        "own": ["bands", config.band_width, "quarter_rows", "quarter_columns"],
        "shared": [1, config.head_width, "half_rows", "half_columns"],
    }
    streams = net.model(_given(config), between, {})
    maps = _Network(net.unused)
    _mixed(maps, "own", "shared", up)
    maps.check()
    return streams, maps.model(between | {"band": _given(config)["band"]}, _ANSWER, {})


_ANSWER: dict[str, list[int | str]] = {name: ["bands", 1, "rows", "columns"] for name in ("x0", "log_sigma")}


def _given(config: StreamsConfig) -> dict[str, list[int | str]]:
    return {
        "band": ["bands", BAND_FEATURES, "rows", "columns"],
        "pan": [1, PAN_FEATURES, "rows", "columns"],
        "scene": [1, config.scene_features],
    }


def _streams(net: _Network, config: StreamsConfig) -> tuple[str, str, Array]:
    """(C, K, H / 4, W / 4) of the bands, (1, K', H / 2, W / 2) of trunk and PAN, and weights that bring the first to
    the second; their sum has no mean over the channels."""
    embedding = _embedding(net, config)
    weight, bias = net.take("pan_in", config.pan_width)
    fine = net.silu(net.conv(_grid(net, "pan"), _of_grid(weight, PAN_FEATURES), bias))
    trunk = net.conv(fine, *net.take("down", config.trunk_width), stride=2)
    weight, bias = net.take("band_in", config.band_width)
    y = net.conv(_grid(net, _cells(net)), _of_grid(weight[:, :CELLS], BAND_FEATURES), bias)
    mean = net("ReduceMean", y, np.array([0]))
    for k in range(config.trunk_blocks):
        trunk = net.block(trunk, f"trunk_blocks.{k}", embedding, mean)
    for k in range(config.band_blocks):
        y = net.block(y, f"band_blocks.{k}", embedding, trunk)
    width = config.head_width
    up, shared = (net.take(name, 4 * width) for name in ("band_up", "trunk_up"))
    own, own_bias = (x - x.mean(0) for x in net.take("pan_out", width))
    up_weight, weight, bias = (x.reshape(width, 4, -1) for x in (up[0], shared[0], up[1] + shared[1]))
    up_weight, weight, bias = (x - x.mean(0) for x in (up_weight, weight, bias))
    places = weight.swapaxes(0, 1).reshape(4 * width, -1, 1, 1)  # in the order of DepthToSpace
    trunk = net("DepthToSpace", net.conv(trunk, places, bias[:, :, 0].T.reshape(-1)), blocksize=2)
    return y, net("Add", trunk, net.conv(fine, own, own_bias)), up_weight.transpose(2, 0, 1).reshape(-1, width, 2, 2)


def _embedding(net: _Network, config: StreamsConfig) -> str:
    """(1, E) of the scene's numbers and the last timestep, see `uknowpan.models.network.time_features`."""
    angle = np.float32((config.timesteps - 1) / config.timesteps) * 2.0 ** np.arange(16) * (math.pi / 64) * 8
    time = np.concatenate([np.sin(angle), np.cos(angle)])
    weight, bias = net.take("embed.0", 4 * config.pan_width, len(time) + config.scene_features)
    first = net("Gemm", "scene", weight[:, len(time) :], bias + weight[:, : len(time)] @ time, transB=1)
    return net.silu(net.linear(net.silu(first), "embed.2"))


def _cells(net: _Network) -> str:
    """(C, F, H / 2, W / 2) `uknowpan.models.streams._cells`."""
    on_pan, smooth = net.split("band", [ON_PAN, BAND_FEATURES - ON_PAN])
    detail = net.split("pan", [1, PAN_FEATURES - 1])[0]
    power = net("Add", net.mean_of_cells(net("Mul", detail, detail)), np.array(LEAST_POWER))
    gain = net("Div", net.mean_of_cells(net("Mul", on_pan, detail)), power)
    return net("Concat", gain, net.mean_of_cells(smooth), axis=1)


def _grid(net: _Network, x: str) -> str:
    return net("SpaceToDepth", net.compress(x), blocksize=2)


def _of_grid(weight: Array, channels: int) -> Array:
    """Weights for channels in the order of SpaceToDepth; PyTorch's has the four places of a channel side by side."""
    own = weight.reshape(len(weight), channels, 4, *weight.shape[2:])
    return own.swapaxes(1, 2).reshape(weight.shape)


def _mixed(net: _Network, own: str, shared: str, up: Array) -> None:
    """The outputs, of what `_streams` returns: band features in the proportions of the maps, and log sigma.

    A map and its feature meet on the 2 x 2 grid; correction and log sigma meet ones there.
    """
    order = [*range(INJECTIONS), MISSING, CORRECTION, LOG_SIGMA]
    features = [*range(INJECTIONS), BACK_PROJECTION]
    head = net.silu(net.norm(net("Add", net.to_space(own, up), shared), "norm_out", centred=True))
    weight, bias = (x.reshape(MAPS, 4, *x.shape[1:])[order].reshape(-1, *x.shape[1:]) for x in net.take("out"))
    places = np.zeros((len(order), 4, BAND_FEATURES, 4), np.float32)
    places[range(len(features)), :, features] = np.eye(4)
    ones = np.repeat(np.arange(len(order)) >= len(features), 4)
    grid = net.conv("band", places.reshape(-1, BAND_FEATURES, 2, 2), ones.astype(np.float32), stride=2)
    sums = np.zeros((len(order), 4, 2, 4), np.float32)
    sums[:-1, :, 0], sums[-1, :, 1] = np.eye(4), np.eye(4)
    both = net.to_space(net("Mul", net.conv(head, weight, bias), grid), sums.reshape(-1, 2, 2, 2))
    net.many("Split", [both, np.array([1, 1])], ["x0", "raw"], axis=1)
    net.many("Clip", ["raw", np.array(-8.0), np.array(6.0)], ["log_sigma"])
