"""Checks of shapes and layers that the published networks share."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def check_images(
    network: str,
    bands: int,
    name: str,
    image: Tensor,
    others: Mapping[str, tuple[Tensor | None, int]],
    multiple: int = 1,
) -> None:
    """Check an image (B, C, H, W) and others of the same size before a network takes them.

    Args:
        network: its name in a message.
        bands: C that the network was built for.
        name: name of the image in a message.
        image: (B, C, H, W), H and W multiples of `multiple`.
        others: name -> (image or None, its bands).
        multiple: 1, or a side that the network works on as a whole.

    Raises:
        ValueError: shapes that do not fit the network or each other.
    """
    batch, count, height, width = image.shape
    if count != bands:
        raise ValueError(
            f"{name} has {count} bands, but this {network} was built for {bands};"
            " use a checkpoint for this number of bands"
        )
    for other, (tensor, channels) in others.items():
        shape = (batch, channels, height, width)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(image.shape)}, so {other} must be {shape}, not"
                f" {tuple(tensor.shape)}; cut both from the same tile"
            )
    if height % multiple or width % multiple:
        rows, cols = (-(-n // multiple) * multiple for n in (height, width))
        raise ValueError(
            f"tile of {height} x {width} pixels, but this {network} needs multiples of {multiple};"
            f" pad it to {rows} x {cols}"
        )


def check_heads(channels: int, heads: int) -> None:
    """Check that the channels of an attention divide into its heads.

    Raises:
        ValueError: they do not.
    """
    if channels % heads:
        raise ValueError(
            f"{channels} channels do not divide into {heads} attention heads; choose a number"
            " of heads that divides the width"
        )


def normed_conv(in_channels: int, out_channels: int, groups: int = 1) -> nn.Sequential:
    """GroupNorm, SiLU and a 3x3 convolution."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.Sequential(nn.GroupNorm(groups, in_channels), nn.SiLU(), conv)


def unrounded(layer: nn.Module, x: Tensor) -> Tensor:
    """The answer of a last layer in the precision of its weights: bfloat16 would round x0 to 1 in 256."""
    with torch.autocast(x.device.type, enabled=False):
        answer: Tensor = layer(x.to(next(layer.parameters()).dtype))
    return answer


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
