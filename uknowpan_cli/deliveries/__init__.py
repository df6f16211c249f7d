"""Deliveries of vendors: a product in place of PAN and MS."""

import os
from collections.abc import Callable
from pathlib import Path

from uknowpan.deliveries import folder, landsat
from uknowpan.deliveries.delivery import Band as Band
from uknowpan.deliveries.delivery import Delivery as Delivery
from uknowpan.errors import InputError, UsageError

READERS: tuple[Callable[[Path], Delivery | None], ...] = (landsat.read, folder.read)
"""Each takes a folder or a metadata file, and returns None for what is not its own; the most general comes last."""


def understood(product: str | os.PathLike[str]) -> Delivery:
    """The delivery at a path.

    Raises:
        UsageError: it is a raster, or there is nothing.
        InputError: it is no product that a reader knows, or a part of it is missing.
    """
    place = Path(product)
    if not place.exists():
        raise InputError(f"{place}: there is no such file or folder.")
    for reader in READERS:
        delivery = reader(place)
        if delivery is not None:
            return delivery
    if place.is_dir():
        raise InputError(f"{place} holds no product that uknowpan knows; name the files of PAN and MS.")
    raise UsageError(f"{place} alone is no product; name PAN and MS, or the folder of a delivery.")
