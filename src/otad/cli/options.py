"""Options that several commands share."""

import math
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from otad.errors import DataError

__all__ = [
    "DATA_HELP",
    "Attacks",
    "Backbone",
    "Data",
    "DataDir",
    "Debug",
    "Device",
    "Encoder",
    "Index",
    "Interpolation",
    "Label",
    "Model",
    "Norm",
    "Part",
    "PartOption",
    "Quiet",
    "Radii",
    "Refinement",
    "Retrieval",
    "Seed",
    "attack_names",
    "given",
    "named_numbers",
    "numbers",
    "progress",
]


class Interpolation(StrEnum):
    """Ways to interpolate the transport map."""

    GLOBAL = "global"
    NEIGHBORHOOD = "neighborhood"
    NETWORK = "network"


class Backbone(StrEnum):
    """Networks that can be trained."""

    MLP = "mlp"
    RESNET = "resnet"
    TRANSFORMER = "transformer"


class Retrieval(StrEnum):
    """Metrics that choose the neighbours."""

    EUCLIDEAN = "euclidean"
    LEARNED = "learned"
    ROBUST = "robust"


class Encoder(StrEnum):
    """What is trained below cells."""

    DENSE = "dense"
    PATCHES = "patches"


class Refinement(StrEnum):
    """What is trained for a target radius."""

    CELLS = "cells"
    POTENTIAL = "potential"


class Norm(StrEnum):
    """Norms of attacks."""

    L2 = "l2"
    LINF = "linf"


class Part(StrEnum):
    """Which samples of DATA."""

    AUTO = "auto"
    ALL = "all"
    TEST = "test"


DATA_HELP = (
    "A file (.csv, .csv.gz, .parquet, .npz, .h5ad), a folder of images by class, cifar-10-batches-bin, "
    "or a name that `otad info` lists, such as mnist-5k."
)
Data = Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)]
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A run folder, or the model/ folder in it.")]
DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", envvar="OTAD_DATA", help="Folder in which named data sets lie.", show_default="none"),
]
Label = Annotated[str | None, typer.Option("--label", help="Label column of a table.", show_default="the model's")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of split, training and attacks.")]
Device = Annotated[
    str | None,
    typer.Option("--device", help="cpu or cuda.", show_default="the accelerator if there is one, else cpu"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr; results, warnings and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Radii = Annotated[
    str,
    typer.Option(
        "--radii",
        help="L2 radii at which certified accuracy is reported, separated by commas.",
        metavar="R,R,...",
    ),
]
Attacks = Annotated[
    str,
    typer.Option(
        "--attacks",
        help="quick, demo, standard, strong, none, or some of lines, nearest_cells, short_gradient, exact_gradient, "
        "targeted, retrieval, joint, transfer, bpda, autoattack, minimal_norm, decision_based, noise, with commas.",
        metavar="SUITE",
    ),
]
PartOption = Annotated[
    Part,
    typer.Option(
        "--part",
        help="Which samples: all, test (those the model was tested on), "
        "or auto: test for the named data set it was trained on, else all.",
    ),
]
Index = Annotated[
    int, typer.Option("--index", "-i", help="Position among the samples that --part chooses, counted from 0.")
]


def given(options: Mapping[str, object]) -> list[str]:
    """Options and values as words of a command line; those that are None were not given."""
    return [word for option, value in options.items() if value is not None for word in (option, str(value))]


def numbers(text: str, option: str) -> list[float]:
    """The text "0.5,1.0" as sorted positive numbers without repetition.

    Raises:
        typer.BadParameter: not numbers separated by commas.
        DataError: a number that is not positive and finite.
    """
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers separated by commas", param_hint=option) from None
    wrong = [v for v in values if not (math.isfinite(v) and v > 0)]
    if wrong:
        raise DataError(
            f"{option} must be positive finite numbers, got {wrong[0]:g}; give for instance {option} 0.5,1.0"
        )
    return sorted(set(values))


def named_numbers(texts: Sequence[str], option: str) -> dict[str, float]:
    """The texts "pieces=4", "noise=0.1" as numbers by name, whole ones as int.

    Raises:
        typer.BadParameter: not a name and a number, or a name given twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        try:
            number = float(value if name else "")
        except ValueError:
            raise typer.BadParameter(
                f"{text!r} is not a name and a number, such as noise=0.1", param_hint=option
            ) from None
        if name in found:
            raise typer.BadParameter(f"{name!r} is given twice", param_hint=option)
        found[name] = int(number) if number.is_integer() else number
    return found


def attack_names(text: str) -> str | list[str]:
    """The text "standard" as it is, "lines,transfer" as a list, "none" as no attack."""
    if text == "none":
        return []
    if text in ("quick", "demo", "standard", "strong"):
        return text
    return [part.strip() for part in text.split(",") if part.strip()]


def progress(quiet: bool) -> bool:
    """Whether progress bars are wanted: only where a person watches."""
    return sys.stderr.isatty() and not quiet
