"""Deliveries of vendors: a product in place of PAN and MS."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from uknowpan.deliveries import airbus, folder, landsat, maxar, stac
from uknowpan.deliveries.delivery import Band as Band
from uknowpan.deliveries.delivery import Delivery as Delivery
from uknowpan.deliveries.delivery import only
from uknowpan.errors import InputError, UsageError


@dataclass(frozen=True)
class Reader:
    """The reader of a vendor's products."""

    find: Callable[[Path], list[list[Path]]]
    """From a folder or a metadata file to the metadata files of each product in it."""
    read: Callable[[Sequence[Path]], Delivery]
    """From such files to the delivery; raises InputError."""


READERS = tuple(Reader(vendor.find, vendor.read) for vendor in (landsat, airbus, maxar, stac))
"""Readers in the order that they are asked: the metadata of a vendor go before a STAC item beside them."""
FOLDER = Reader(folder.find, folder.read)
"""The last one: a folder with one PAN and one MS."""


def understood(product: str | os.PathLike[str]) -> Delivery:
    """The one delivery at a path, which is a folder or a metadata file, or at the URL of a STAC item.

    Raises:
        UsageError: it is a file of another kind.
        InputError: it is no product that a reader knows, it holds several, or a part is missing.
    """
    if re.match(r"https?://", str(product)):
        return stac.from_url(str(product))
    place = Path(product)
    if not place.exists():
        raise InputError(f"{place}: there is no such file or folder.")
    for reader in (*READERS, FOLDER):
        groups = reader.find(place)
        if groups:
            only([files[0] for files in groups], "products", str(place))
            return replace(reader.read(groups[0]), product=str(place))
    if place.is_dir():
        raise InputError(f"{place} holds no product that uknowpan knows; name the files of PAN and MS.")
    raise UsageError(f"{place} alone is no product; name PAN and MS, or the folder of a delivery.")
