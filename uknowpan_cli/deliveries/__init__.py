"""Deliveries of vendors: a product in place of PAN and MS."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from uknowpan.deliveries import airbus, folder, landsat, maxar
from uknowpan.deliveries.delivery import Band as Band
from uknowpan.deliveries.delivery import Delivery as Delivery
from uknowpan.deliveries.delivery import only
from uknowpan.errors import InputError, UsageError

Reader = Callable[[Path], list[Delivery]]
"""From a folder, or a metadata file, to the deliveries in it; none where it is not the reader's own."""

READERS: tuple[Reader, ...] = (landsat.read, airbus.read, maxar.read)
"""Of vendors; what none of them knows may still be a folder with one PAN and one MS."""


def understood(product: str | os.PathLike[str]) -> Delivery:
    """The one delivery at a path, which is a folder or a metadata file.

    Raises:
        UsageError: it is a file of another kind.
        InputError: it is no product that a reader knows, it holds several, or a part is missing.
    """
    place = Path(product)
    if not place.exists():
        raise InputError(f"{place}: there is no such file or folder.")
    for reader in (*READERS, folder.read):
        deliveries = {delivery.product: delivery for delivery in reader(place)}
        if deliveries:
            return replace(deliveries[only(list(deliveries), "products", str(place))], product=str(place))
    if place.is_dir():
        raise InputError(f"{place} holds no product that uknowpan knows; name the files of PAN and MS.")
    raise UsageError(f"{place} alone is no product; name PAN and MS, or the folder of a delivery.")
