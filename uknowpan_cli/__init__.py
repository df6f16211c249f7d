"""Pansharpening of real satellite scenes.

    report = uknowpan.sharpen("pan.tif", "ms.tif", "sharp.tif")
    hrms = uknowpan.sharpen_array(pan, ms)

Each name is imported when it is used first; `import uknowpan` alone loads neither torch nor rasterio.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from uknowpan.errors import Error, UknowpanWarning

if TYPE_CHECKING:
    from uknowpan.api import load as load
    from uknowpan.api import open_pair as open_pair
    from uknowpan.api import sharpen as sharpen
    from uknowpan.api import survey as survey
    from uknowpan.arrays import sharpen_array as sharpen_array
    from uknowpan.evaluation.api import evaluate as evaluate

__all__ = ["Error", "UknowpanWarning", "evaluate", "load", "open_pair", "sharpen", "sharpen_array", "survey"]

__version__ = "0.1.0"

_HOMES = {"sharpen_array": "uknowpan.arrays", "evaluate": "uknowpan.evaluation.api"}
"""Name -> its module, where that is not `uknowpan.api`."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'uknowpan' has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "uknowpan.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
