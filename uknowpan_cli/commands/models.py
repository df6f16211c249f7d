"""`uknowpan models`: the checkpoints and their cards."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from uknowpan.commands import shared as opt
from uknowpan.console import to_json

models_app = typer.Typer(help="Checkpoints: list, show, verify, export.", no_args_is_help=True, add_completion=False)

SHORT = 300
"""Characters of an entry that are shown without `--full`."""

NameArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Bundled name or a file.")]


@models_app.command("list")
def list_models(as_json: opt.JsonOption = False, verbose: opt.VerboseOption = 0) -> None:
    """The bundled models."""
    with opt.guarded(verbose):
        from uknowpan.models.checkpoints import bundled_models, read_card

        cards = {name: (path, read_card(path)) for name, path in bundled_models().items()}
        if as_json:
            entries = [{"name": n, "bytes": p.stat().st_size, "card": asdict(c)} for n, (p, c) in cards.items()]
            typer.echo(to_json(entries))
            return
        for name, (path, card) in cards.items():
            bands = "any bands" if card.bands is None else f"{card.bands} bands"
            ratios = f"ratio {min(card.ratios)} to {max(card.ratios)}"
            size = f"{path.stat().st_size / 1e6:.1f} MB"
            typer.echo(f"{name}  {card.architecture}, {bands}, {ratios}, {size}")


@models_app.command()
def show(
    model: NameArgument,
    full: Annotated[bool, typer.Option("--full", help="All entries, with every number of the training.")] = False,
    as_json: opt.JsonOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """The card of a checkpoint."""
    with opt.guarded(verbose):
        from uknowpan.models.checkpoints import find_checkpoint, read_card

        card = asdict(read_card(find_checkpoint(model)))
        if as_json:
            typer.echo(to_json(card))
            return
        for key, value in card.items():
            if not full and value in (None, "", {}, [], ()):
                continue
            text = json.dumps(value, indent=2 if full else None) if isinstance(value, dict) else str(value)
            typer.echo(f"{key}: {text if full or len(text) <= SHORT else f'{text[:SHORT]} ... (--full)'}")


@models_app.command()
def verify(model: NameArgument, as_json: opt.JsonOption = False, verbose: opt.VerboseOption = 0) -> None:
    """Load a checkpoint whole and print its SHA-256."""
    with opt.guarded(verbose):
        from uknowpan.models.checkpoints import find_checkpoint, load_model, sha256

        path = find_checkpoint(model)
        network, card = load_model(path)
        count = sum(p.numel() for p in network.parameters())
        digest = sha256(path)
        if as_json:
            typer.echo(json.dumps({"name": card.name, "sha256": digest, "parameters": count}))
        else:
            typer.echo(f"{digest}  {card.name}  {count} parameters")


@models_app.command()
def export(
    model: NameArgument,
    output: Annotated[Path, typer.Option("--output", "--out", "-o", metavar="FILE", help="ONNX file to write.")],
    overwrite: opt.OverwriteOption = False,
    verbose: opt.VerboseOption = 0,
) -> None:
    """Write the bundled model, or one like it, as an ONNX file with its card as metadata.

    Inputs are the features of uknowpan.models.features, outputs are x0 and log_sigma.
    """
    with opt.guarded(verbose):
        from uknowpan.durable import Scratch
        from uknowpan.files import check_outputs, check_suffix
        from uknowpan.models.checkpoints import find_checkpoint
        from uknowpan.models.onnx.sharpener import student_file

        path = find_checkpoint(model)
        check_suffix("--output", output, "an ONNX file", ".onnx")
        check_outputs({"--output": str(output)}, [str(path)], overwrite)
        _, content = student_file(path)
        with Scratch(output) as scratch:
            scratch.path.write_bytes(content)
            scratch.publish()
        typer.echo(output)
