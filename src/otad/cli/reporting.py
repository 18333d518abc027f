"""otad report."""

from pathlib import Path
from typing import Annotated

import typer

from otad.cli.comparing import show
from otad.cli.failures import job
from otad.cli.options import Debug, Quiet
from otad.errors import DataError

__all__ = ["report"]


@job
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder that otad demo, train, attack or compare wrote.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Write a page from metrics.json alone, without the pictures of report.html.",
            show_default="none",
        ),
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what is in a run folder; of a comparison make tables, plots and page anew from all finished cells.

    So cells that several machines made can be put into one folder and shown together.
    """
    from otad.files import write_text
    from otad.report import Report
    from otad.runs import write_comparison

    metrics = folder / "metrics.json"
    if (folder / "cells").is_dir():
        if out is not None:
            raise typer.BadParameter("a comparison writes into its own folder; leave it out", param_hint="--out")
        show(write_comparison(folder))
        typer.echo(f"\n{folder / 'report.html'} shows it with plots, {folder / 'compare.json'} has the numbers.")
        return
    if not metrics.is_file():
        raise DataError(
            f"{folder}: neither metrics.json nor cells/ there; name a folder that otad train or compare wrote"
        )
    try:
        found = Report.from_json(metrics.read_text("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{metrics}: damaged ({error}); run the job again") from error
    if out is not None:
        write_text(out, found.to_html())
    typer.echo(found.table())
