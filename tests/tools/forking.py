"""Commands in forked children: libraries load and the command line is built once, in their parent."""

import importlib
import os
import pkgutil
from contextlib import redirect_stdout, suppress

import torch
import torch._dynamo  # optimisers import it where they are made first
from typer.main import get_command

import uknowpan
from uknowpan.commands.main import app
from uknowpan.models.training.stages import GenericStudentStage


def loaded() -> None:
    """Import all of the package, in one thread, and let training validate on a single batch."""
    torch.set_num_threads(1)
    for module in pkgutil.walk_packages(uknowpan.__path__, "uknowpan."):
        if not module.name.endswith("__main__") and ".qgis" not in module.name:  # a plugin of QGIS's own Python
            importlib.import_module(module.name)
    defaults = GenericStudentStage.__init__.__kwdefaults__
    defaults["validation_batches"] = 1
    with suppress(SystemExit), redirect_stdout(None):
        _COMMAND.main(["models", "list"], prog_name="uknowpan")


_COMMAND = get_command(app)


def end_with(words: list[str]) -> None:
    """Run a command in this child, and end the child with its exit code."""
    code = 1
    try:
        _COMMAND.main(words, prog_name="uknowpan")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)
