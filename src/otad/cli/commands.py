"""All commands, and the entry point."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from otad.cli.comparing import compare
from otad.cli.info import info, version
from otad.cli.reporting import report
from otad.cli.training import demo, train
from otad.cli.using import attack, certify, explain, predict

__all__ = ["app", "main"]

app = typer.Typer(
    name="otad",
    help="Classifiers that fit their training data exactly and come with a proof of robustness.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"otad {version('otad')}")
        raise typer.Exit
    return wanted


@app.callback()
def _otad(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _command in (demo, train, predict, certify, attack, explain, compare, report, info):
    app.command()(_command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns 0 (done), 1 (failed), 2 (wrong usage) or 130 (interrupted)."""
    try:
        app(list(arguments) if arguments is not None else None, prog_name="otad")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    except KeyboardInterrupt:
        # Between two commands' own handlers, for instance while modules load.
        sys.stderr.write("otad: interrupted\n")
        return 130
    return 0
