"""From the transport map to the defended classifier, and how well that fits the training set."""

import torch
from torch import nn

from otad.cip import BrenierPotential
from otad.defense import OTAD, CellInterpolation, GlobalInterpolation, NeighborhoodInterpolation
from otad.fitting.parameters import Parameters, fixed_regularity
from otad.nn import Backbone, EncodedStem
from otad.retrieval import Retrieval
from otad.transport import TransportMap

__all__ = ["interpolated", "training_fit"]

AT_ONCE = 256


def interpolated(
    parameters: Parameters,
    backbone: Backbone,
    transport: TransportMap,
    retrieval: Retrieval | None = None,
    potential: BrenierPotential | None = None,
) -> OTAD:
    """The backbone with an interpolation of its transport map in place of the trunk.

    Args:
        parameters: of `OTADClassifier`.
        backbone: trained.
        transport: read off it.
        retrieval: the metric of the neighbours; None for stem units.
        potential: the global potential, where it was fitted before.

    Raises:
        InfeasibleError: no potential of the asked regularity fits.
    """
    bounds, ratio, branch = fixed_regularity(parameters), parameters["ratio"], parameters["branch"]
    interpolation: nn.Module
    if parameters["interpolation"] == "global":
        if potential is None:
            searched = -1.0 if ratio is None else ratio
            potential = BrenierPotential.fit(transport.x, transport.z, searched, regularity=bounds)
        interpolation = GlobalInterpolation(potential, branch or "mean")
    else:
        interpolation = NeighborhoodInterpolation(
            transport.x,
            transport.z,
            k=parameters["n_neighbors"],
            retrieval=retrieval,
            regularity=bounds,
            ratio=0.0 if ratio is None else ratio,
            factor=parameters["smoothness_factor"],
            branch=branch or "lower",
            infeasible=parameters["infeasible"],
        )
    return OTAD(backbone.stem, interpolation, backbone.head)


def training_fit(module: OTAD, backbone: Backbone, transport: TransportMap) -> dict[str, float]:
    """How well a module fits the training set, beside its backbone.

    Args:
        module: made from the transport map, or refined.
        backbone: that the transport map was read off.
        transport: the transport map.

    Returns:
        "agreement", the share of training points that both label alike; "train_accuracy", "backbone_train_accuracy";
        and where the transport map is interpolated, "feature_error", the largest |z(x_i) - z_i| in any coordinate.
    """
    stem = module.stem
    retrieval = module.interpolation.retrieval
    with torch.no_grad():
        points = stem.encoded(transport.x) if isinstance(stem, EncodedStem) else transport.x
        parts = points.split(AT_ONCE)
        where = retrieval.points.split(AT_ONCE) if isinstance(retrieval, Retrieval) else [None] * len(parts)
        z = torch.cat([module.interpolation(part, at).value for part, at in zip(parts, where)])
        ours, theirs = module.head(z).argmax(1), backbone.head(transport.z).argmax(1)
    weight = transport.counts.double() / transport.counts.sum()
    fit = {
        "agreement": float((weight * (ours == theirs)).sum()),
        "train_accuracy": float((weight * (ours == transport.y)).sum()),
        "backbone_train_accuracy": float((weight * (theirs == transport.y)).sum()),
    }
    if isinstance(stem, EncodedStem) or isinstance(module.interpolation, CellInterpolation):  # refined: other features
        return fit
    return {"feature_error": float((z - transport.z).abs().amax())} | fit
