"""Checks of the shapes that a network is given."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
        image: (B, C, H, W).
        others: name -> (image or None, its bands).
        multiple: number that H and W must be multiples of.

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
