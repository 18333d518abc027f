"""The parameters of `OTADClassifier`: which values go, and which go together."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch

from otad.cip import Regularity
from otad.nn import BACKBONES
from otad.nn.cip_net import CIPNet
from otad.train import USUAL_POSES

__all__ = ["Parameters", "check_parameters", "fixed_regularity", "training_options"]

Parameters = Mapping[str, Any]  # of the constructor, by name

ALLOWED = {
    "interpolation": ("global", "neighborhood", "network"),
    "backbone": tuple(BACKBONES),
    "branch": (None, "lower", "upper", "mean"),
    "infeasible": ("relax", "raise"),
    "refinement": ("cells", "potential"),
    "encoder": (None, "dense", "patches"),
    "retrieval": ("euclidean", "learned", "robust"),
    "device": (None, "cpu", "cuda"),
}
WHOLE = ("batch_size", "n_neighbors", "network_width", "network_layers", "network_heads", "network_problems")
WHOLE_OR_NONE = ("components", "epochs", "n_blocks", "embedding_epochs", "embedding_width")
# And the least of each.
REFINEMENT_OPTIONS = {
    "pieces": 1,
    "poses": 1,
    "temperature": 1e-6,
    "ramp": -math.inf,
    "noise": 0,
    "learning_rate": 1e-9,
    "epochs": 1,
}
AT_LEAST = {"alpha": 0, "margin": 0, "smoothness_factor": 1}


def check_parameters(parameters: Parameters) -> None:
    """Refuse what `fit` could not use.

    Raises:
        ValueError: naming the parameter, what was expected and what came.
    """
    _check_values(parameters)
    _check_interpolation(parameters)
    _check_retrieval(parameters)
    _check_target_radius(parameters)
    fixed_regularity(parameters)


def fixed_regularity(parameters: Parameters) -> Regularity | None:
    """The bounds l and L where they were given; None where the smallest L is to be searched.

    Raises:
        ValueError: bounds that no function has.
    """
    l, L = parameters["strong_convexity"], parameters["smoothness"]
    return None if L is None else Regularity(0.0 if l is None else l, L)


def training_options(parameters: Parameters, seed: int) -> dict[str, Any]:
    """Keywords of every training loop."""
    folder = parameters["checkpoint"]
    return {
        "seed": seed,
        "checkpoint": None if folder is None else Path(folder),
        "progress": parameters["verbose"],
        **{name: parameters[name] for name in ("resume", "device", "mixed_precision")},
    }


def _check_values(parameters: Parameters) -> None:
    """Each by itself."""
    for name, allowed in ALLOWED.items():
        if parameters[name] not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {parameters[name]!r}")
    for name in (*WHOLE, *WHOLE_OR_NONE):
        value = parameters[name]
        if value is None and name in WHOLE_OR_NONE:
            continue
        if not (isinstance(value, Integral) and int(value) >= 1):
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    for name, least in AT_LEAST.items():
        if not least <= parameters[name] < math.inf:
            raise ValueError(f"{name} must be a number of at least {least}; got {parameters[name]!r}")
    if parameters["width"] is not None and not parameters["width"] >= 1:
        raise ValueError(f"width must be at least 1; got {parameters['width']!r}")
    if not parameters["learning_rate"] > 0:
        raise ValueError(f"learning_rate must be positive; got {parameters['learning_rate']!r}")
    if parameters["ratio"] is not None and not -math.inf < parameters["ratio"] <= 0:
        raise ValueError(f"ratio = l / L must be a number of at most 0; got {parameters['ratio']!r}")
    if parameters["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch finds no CUDA device; leave it out or use 'cpu'")


def _check_interpolation(parameters: Parameters) -> None:
    if parameters["smoothness"] is None and parameters["strong_convexity"] is not None:
        raise ValueError("strong_convexity needs smoothness beside it; or give ratio = l / L to search the smallest L")
    if parameters["interpolation"] == "global" and parameters["smoothness_factor"] != 1:
        raise ValueError("smoothness_factor belongs to interpolation='neighborhood'; give smoothness for 'global'")
    if parameters["interpolation"] == "network":
        with torch.device("meta"):  # for its checks alone
            CIPNet(parameters["network_width"], parameters["network_layers"], parameters["network_heads"])
        convex = parameters["ratio"] in (None, 0) and parameters["strong_convexity"] in (None, 0)
        if parameters["branch"] not in (None, "lower") or not convex:
            raise ValueError("interpolation='network' imitates branch 'lower' with l = 0: leave branch, ratio out")


def _check_retrieval(parameters: Parameters) -> None:
    retrieval, width = parameters["retrieval"], parameters["embedding_width"]
    if parameters["interpolation"] == "global" and retrieval != "euclidean":
        raise ValueError(
            f"retrieval={retrieval!r} chooses neighbours, and interpolation='global' has none; "
            "give interpolation='neighborhood' or 'network'"
        )
    if retrieval == "euclidean" and (parameters["embedding_epochs"], width) != (None, None):
        raise ValueError("embedding_epochs and embedding_width belong to retrieval='learned' or 'robust'")
    if retrieval == "robust" and (width or 2) % 2:
        raise ValueError(f"embedding_width must be even for retrieval='robust'; got {width!r}")


def _check_target_radius(parameters: Parameters) -> None:
    radius, options = parameters["target_radius"], parameters["refinement_options"] or {}
    for name in ("encoder", "components", "refinement_options"):
        if parameters[name] and (radius is None or parameters["refinement"] != "cells"):
            raise ValueError(f"{name} needs target_radius with refinement='cells'; leave it out, or give these")
    if not isinstance(options, Mapping):
        raise ValueError(f"refinement_options must be a dict of {', '.join(REFINEMENT_OPTIONS)}; got {options!r}")
    if options.get("noise") and parameters["components"]:
        raise ValueError("refinement_options: noise is of all columns and does not go with components; leave one out")
    for name, value in options.items():
        if name not in REFINEMENT_OPTIONS:
            raise ValueError(f"refinement_options: no {name!r}; known: {', '.join(REFINEMENT_OPTIONS)}")
        least = REFINEMENT_OPTIONS[name]
        kind = Integral if name in ("epochs", "poses") else Real
        if not (isinstance(value, kind) and least <= value < math.inf):
            bound = "" if least == -math.inf else f" of at least {least}"
            number = "a whole number" if kind is Integral else "a number"
            raise ValueError(f"refinement_options: {name} must be {number}{bound}; got {value!r}")
    if options.get("poses", 1) > len(USUAL_POSES):
        raise ValueError(f"refinement_options: there are {len(USUAL_POSES)} poses; got {options['poses']}")
    if options.get("poses", 1) > 1 and parameters["encoder"]:
        raise ValueError("refinement_options: poses are of pieces without an encoder; leave one out")
    if radius is None:
        return
    if not 0 < radius < math.inf:
        raise ValueError(f"target_radius must be a positive number or None; got {radius!r}")
    chosen = parameters["interpolation"], parameters["branch"], parameters["smoothness"]
    if chosen not in (("global", None, None), ("global", "lower", None)):
        raise ValueError("target_radius needs interpolation='global', branch None or 'lower', smoothness None")
    if parameters["refinement"] == "cells" and parameters["backbone"] != "mlp":
        raise ValueError(
            "refinement='cells' works on the inputs as they are: backbone='mlp', or refinement='potential'"
        )
