"""The Typer commands, one module each. Only this folder imports Typer."""
