"""`uknowpan pack`: scenes of a recipe into one training file."""

from pathlib import Path
from typing import Annotated

import typer

from uknowpan.commands import shared as opt


def pack(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="CSV: name,kind,pan,ms,sensor,licence,split,weight[,nodata].")
    ],
    output: Annotated[
        Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="Scenes file (HDF5) to write.")
    ],
    root: Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder the recipe's paths start from.")],
    overwrite: opt.OverwriteOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Gather the scenes of a recipe into one file that `train` reads.

    Example: uknowpan pack scenes.csv --root imagery -o scenes.h5
    """
    with opt.guarded(-1 if quiet else verbose):
        from uknowpan.datasets.pack import pack_scenes, read_recipe
        from uknowpan.files import HDF5, check_outputs, check_suffix

        files = [str(root / name) for scene in read_recipe(recipe) for name in scene.files]
        check_outputs({"--output": str(output)}, [str(recipe), *files], overwrite)
        check_suffix("--output", output, "HDF5", *HDF5)
        for line in pack_scenes(recipe, root, output):
            if not quiet:
                typer.echo(line, err=True)
        typer.echo(output)
