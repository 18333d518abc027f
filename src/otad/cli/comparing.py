"""otad compare."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from otad.cli.failures import Interrupted, job
from otad.cli.options import DATA_HELP, Attacks, DataDir, Debug, Quiet, attack_names, given, numbers, progress

if TYPE_CHECKING:
    from otad.report.comparison import Comparison

__all__ = ["compare", "show"]


@job
def compare(
    data: Annotated[list[str], typer.Argument(metavar="DATA", help=f"One or more data sets. {DATA_HELP}")],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Methods separated by commas, or all. Known: otad-global, otad-neighborhood, otad-network, "
            "otad-cells, 1-nn, undefended, pgd, trades, lipschitz, smoothing. METHOD@resnet, METHOD@transformer: "
            "train that backbone in place of the residual MLP, where the method trains one.",
            metavar="METHOD,METHOD,...",
        ),
    ] = "all",
    budget: Annotated[
        float, typer.Option("--budget", help="Training time of every method at most, in minutes.", metavar="MINUTES")
    ] = 2.0,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for cells, tables and plots.")] = Path(
        "runs/compare"
    ),
    seeds: Annotated[
        int, typer.Option("--seeds", min=1, help="Number of seeds 0, 1, ..: of split, training and attacks.")
    ] = 1,
    eps: Annotated[
        str,
        typer.Option(
            "--eps",
            help="L2 budgets of the attacker, separated by commas. auto: 0.5,1,1.58 for grey images of 28 x 28, else "
            "where 1-NN certifies 90, 70 and 50 % of what it gets right of held-out training samples. Methods "
            "train, or choose settings, for the middle one, of an even number for the larger.",
            metavar="EPS,EPS,...",
        ),
    ] = "auto",
    attacks: Attacks = "quick",
    n_attacked: Annotated[
        int, typer.Option("--n-attacked", min=1, help="Attack the first so many test samples, the same for all.")
    ] = 200,
    n_train: Annotated[
        int | None, typer.Option("--n-train", help="Number of training samples.", show_default="all")
    ] = None,
    n_test: Annotated[int | None, typer.Option("--n-test", help="Number of test samples.", show_default="all")] = None,
    label: Annotated[str, typer.Option("--label", help="Label column of a table.")] = "label",
    data_dir: DataDir = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare OTAD with its rivals: same split, same training time, same attacks, one table a data set.

    A finished combination of data set, method and seed is kept in the folder and not run again, so the same
    command goes on after an interruption; commands for other data sets may share the folder.
    """
    budgets = None if eps == "auto" else numbers(eps, "--eps")
    from otad.runs import METHODS, method_named
    from otad.runs import compare as run

    chosen = list(METHODS) if methods == "all" else [part.strip() for part in methods.split(",") if part.strip()]
    try:
        fits = {name: method_named(name) for name in chosen or [methods]}
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--methods") from None
    try:
        comparisons = run(
            data,
            out,
            methods=fits,
            seeds=seeds,
            budget=budget,
            eps=budgets,
            attacks=attack_names(attacks),
            n_train=n_train,
            n_test=n_test,
            n_attacked=n_attacked,
            label=label,
            data_dir=data_dir,
            progress=progress(quiet),
        )
    except KeyboardInterrupt:
        options = {
            "--methods": methods,
            "--budget": f"{budget:g}",
            "--out": out,
            "--seeds": seeds,
            "--eps": eps,
            "--attacks": attacks,
            "--n-attacked": n_attacked,
            "--n-train": n_train,
            "--n-test": n_test,
            "--label": label,
            "--data-dir": data_dir,
        }
        again = shlex.join(["otad", "compare", *data, *given(options)])
        raise Interrupted(f"interrupted; finished cells are kept in {out / 'cells'}; go on with: {again}") from None
    show(comparisons)
    typer.echo(f"\n{out / 'report.html'} shows it with plots, {out / 'compare.json'} has the numbers.")


def show(comparisons: "list[Comparison]") -> None:
    """Tables in the terminal."""
    from rich.console import Console

    from otad.report.comparison_table import terminal_tables

    console = Console(highlight=False, markup=False, soft_wrap=True)
    # Narrower, the numbers of a row would be cut.
    console.width = max(console.width, 140)
    for one in comparisons:
        for part in terminal_tables(one):
            console.print(part)
        console.print()
