"""otad demo, otad train."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from otad.cli.failures import Interrupted, job
from otad.cli.options import (
    Attacks,
    Backbone,
    Data,
    DataDir,
    Debug,
    Device,
    Encoder,
    Interpolation,
    Norm,
    Quiet,
    Refinement,
    Retrieval,
    Seed,
    attack_names,
    given,
    named_numbers,
    numbers,
    progress,
)

if TYPE_CHECKING:
    from otad.data import Dataset

__all__ = ["demo", "train"]

Resume = Annotated[
    bool, typer.Option("--resume", help="Continue from the checkpoint in the run folder, training and attacks.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Run folder to write.")]
DEMO_RADIUS = 1.2  # chosen on a fifth of the training digits
N_ATTACK_HELP = "Attack at most so many test samples, drawn with the seed."
Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs",
        help="Passes over the training data, of the backbone; refinement has its own number.",
        show_default="the estimator's",
    ),
]


@job
def demo(
    out: Out = Path("runs/demo"),
    seed: Seed = 0,
    n_train: Annotated[int, typer.Option("--n-train", help="Number of training digits.")] = 4000,
    n_test: Annotated[int, typer.Option("--n-test", help="Number of test digits.")] = 1000,
    n_attack: Annotated[int | None, typer.Option("--n-attack", min=1, help=N_ATTACK_HELP, show_default="all")] = None,
    epochs: Epochs = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A first look in about a minute: few digits, few epochs, quick attacks."),
    ] = False,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train, interpolate, refine, certify, attack and report on 5,000 real MNIST digits that ship in a package."""
    from otad.data import load

    settings: dict[str, Any] = {"interpolation": "global", "target_radius": DEMO_RADIUS}
    if quick:
        n_train, n_test, epochs = min(n_train, 1000), min(n_test, 100), epochs or 15
    data = load("mnist-5k", n_train=n_train, n_test=n_test, seed=seed)
    options = {"--out": out, "--seed": seed, "--n-train": n_train, "--n-test": n_test, "--n-attack": n_attack}
    command = ["otad", "demo", *given(options), *(["--quick"] if quick else [])]
    _run(
        data,
        out,
        command,
        settings=settings,
        epochs=epochs,
        device=device,
        resume=resume,
        quiet=quiet,
        radii=[0.5, 1.0, 1.5],
        norm="l2",
        attacks="quick" if quick else "demo",
        n_attack=n_attack,
        seed=seed,
        compare_health=5 if quick else 12,
    )


@job
def train(
    data: Data,
    out: Out,
    interpolation: Annotated[
        Interpolation, typer.Option("--interpolation", help="How features between training points are made.")
    ] = (Interpolation.GLOBAL),
    backbone: Annotated[
        Backbone, typer.Option("--backbone", help="The network: resnet for images only, the others for tables too.")
    ] = Backbone.MLP,
    retrieval: Annotated[
        Retrieval,
        typer.Option(
            "--retrieval", help="Metric that chooses neighbours, with --interpolation neighborhood or network."
        ),
    ] = Retrieval.EUCLIDEAN,
    network_problems: Annotated[
        int | None,
        typer.Option(
            "--network-problems",
            min=1,
            help="Solved problems that the network of --interpolation network learns from.",
            show_default="the estimator's",
        ),
    ] = None,
    target_radius: Annotated[
        float | None,
        typer.Option(
            "--target-radius",
            help="Train for certificates of this L2 radius, instead of interpolating the map.",
            show_default="none",
        ),
    ] = None,
    refinement: Annotated[
        Refinement | None,
        typer.Option(
            "--refinement",
            help="What is trained for --target-radius; cells need --backbone mlp.",
            show_default="cells",
        ),
    ] = None,
    encoder: Annotated[
        Encoder | None,
        typer.Option(
            "--encoder",
            help="With --target-radius: orthogonal layers below the cells, trained along.",
            show_default="none",
        ),
    ] = None,
    components: Annotated[
        int | None,
        typer.Option(
            "--components",
            min=1,
            help="With --target-radius: train cells of a table in so many principal components, such as 50.",
            show_default="all columns",
        ),
    ] = None,
    refinement_option: Annotated[
        list[str] | None,
        typer.Option(
            "--refinement-option",
            help="With --target-radius, any number of times: what else cells are trained with: pieces (of a class), "
            "poses (of each, for images), noise (on tables), temperature, ramp, learning_rate, epochs; "
            "otad compare says what it chose.",
            metavar="NAME=NUMBER",
            show_default="the estimator's",
        ),
    ] = None,
    deform: Annotated[
        bool | None,
        typer.Option(
            "--deform/--no-deform",
            help="With --target-radius: deform images a little, and give pieces of grey ones nine poses: "
            "digits, not clothes.",
            show_default="deform",
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option("--alpha", help="Weight of the transport cost.", show_default="the estimator's"),
    ] = None,
    epochs: Epochs = None,
    seed: Seed = 0,
    label: Annotated[str, typer.Option("--label", help="Label column of a table.")] = "label",
    n_train: Annotated[
        int | None, typer.Option("--n-train", help="Number of training samples.", show_default="all")
    ] = None,
    n_test: Annotated[int | None, typer.Option("--n-test", help="Number of test samples.", show_default="all")] = None,
    radii: Annotated[
        str,
        typer.Option(
            "--radii",
            help="Budgets of the attacks, separated by commas, and under l2 the radii of certified accuracy.",
            metavar="R,R,...",
        ),
    ] = "0.5,1.0,1.5",
    norm: Annotated[Norm, typer.Option("--norm", help="Norm of the attacks.")] = Norm.L2,
    attacks: Attacks = "quick",
    n_attack: Annotated[int, typer.Option("--n-attack", min=1, help=N_ATTACK_HELP)] = 200,
    data_dir: DataDir = None,
    resume: Resume = False,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train on DATA, then certify and attack; --attacks none leaves the attacks out."""
    from otad.data import load

    budgets = numbers(radii, "--radii")
    options_of_cells = named_numbers(refinement_option or [], "--refinement-option")
    read = load(data, data_dir=data_dir, n_train=n_train, n_test=n_test, seed=seed, label=label)
    settings: dict[str, Any] = {
        "interpolation": str(interpolation),
        "backbone": str(backbone),
        "retrieval": str(retrieval),
    }
    chosen = {
        "encoder": encoder and str(encoder),
        "components": components,
        "refinement_options": options_of_cells or None,
        "alpha": alpha,
        "network_problems": network_problems,
        "target_radius": target_radius,
    }
    if target_radius is None:
        for option, value in {"--refinement": refinement, "--deform/--no-deform": deform}.items():
            if value is not None:
                raise typer.BadParameter("needs --target-radius", param_hint=option)
    chosen |= {"refinement": refinement and str(refinement), "deform": deform}
    settings |= {k: v for k, v in chosen.items() if v is not None}
    options = {
        "--out": out,
        "--interpolation": interpolation,
        "--backbone": backbone,
        "--retrieval": retrieval if retrieval is not Retrieval.EUCLIDEAN else None,
        "--network-problems": network_problems,
        "--target-radius": target_radius,
        "--refinement": refinement,
        "--encoder": encoder,
        "--components": components,
        "--seed": seed,
        "--radii": radii,
        "--norm": norm,
        "--attacks": attacks,
        "--alpha": alpha,
        "--n-train": n_train,
        "--n-test": n_test,
        "--n-attack": n_attack,
        "--data-dir": data_dir,
        "--label": label if label != "label" else None,
    }
    command = ["otad", "train", data, *given(options), *(["--no-deform"] if deform is False else [])]
    command += [word for option in refinement_option or [] for word in ("--refinement-option", option)]
    _run(
        read,
        out,
        command,
        settings=settings,
        epochs=epochs,
        device=device,
        resume=resume,
        quiet=quiet,
        radii=budgets,
        norm=str(norm),
        attacks=attack_names(attacks),
        n_attack=n_attack,
        seed=seed,
        label=label,
    )


def _run(
    data: "Dataset",
    out: Path,
    command: list[str],
    *,
    settings: dict[str, Any],
    epochs: int | None,
    device: str | None,
    resume: bool,
    quiet: bool,
    **job: Any,
) -> None:
    """Run the job and print its table; on Ctrl-C say what is kept."""
    from otad.runs import run

    settings |= {k: v for k, v in {"epochs": epochs, "device": device}.items() if v is not None}
    again = shlex.join([*command, *given({"--device": device, "--epochs": epochs})])
    try:
        report = run(data, out, classifier=settings, resume=resume, progress=progress(quiet), reproduce=[again], **job)
    except KeyboardInterrupt:
        raise Interrupted(_kept(out, again)) from None
    typer.echo(report.table())
    typer.echo(
        f"\n{out / 'report.html'} shows it with pictures; "
        f"{out / 'metrics.json'} has the numbers, {out / 'model'} the model."
    )


def _kept(out: Path, command: str) -> str:
    checkpoint = out / "checkpoint"
    if checkpoint.is_dir() and any(checkpoint.iterdir()):
        return f"interrupted; the last checkpoint is kept in {checkpoint}; continue with: {command} --resume"
    return f"interrupted before the first checkpoint; start again with: {command}"
