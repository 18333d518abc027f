"""The discrete transport map that a trained backbone leaves behind: points, features, labels."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from otad.cip import smallest_smoothness
from otad.neighbors import nearest_neighbors
from otad.nn.backbone import Backbone

__all__ = ["TransportMap", "health", "read_transport_map"]


@dataclass(frozen=True)
class TransportMap:
    """z_i = trunk(x_i) for every distinct training point.

    Attributes:
        x: points, shape (n, d), in stem units.
        z: features, shape (n, d).
        y: class indices, shape (n,); the most frequent label where merged samples disagree.
        samples: index of the first training sample at each point, shape (n,).
        counts: training samples merged into each point, shape (n,).
        conflicts: points whose merged samples carry different labels.
    """

    x: Float[Tensor, "n d"]
    z: Float[Tensor, "n d"]
    y: Int[Tensor, " n"]
    samples: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    conflicts: int


def read_transport_map(
    backbone: Backbone, inputs: Float[Tensor, "n ..."], y: Int[Tensor, " n"], batch_size: int = 1024
) -> TransportMap:
    """Push the training set through a trained backbone, merging samples that are the same point.

    Args:
        backbone: in eval mode.
        inputs: training inputs.
        y: class indices.
        batch_size: inputs pushed at a time.
    """
    with torch.no_grad():
        x = torch.cat([backbone.stem(part) for part in inputs.split(batch_size)])
        points, group, counts = torch.unique(x, dim=0, return_inverse=True, return_counts=True)
        first = torch.full_like(counts, len(x)).scatter_reduce(0, group, torch.arange(len(x)), "amin")
        # Points in the order of the training set, not the lexicographic one of `unique`.
        order = first.argsort()
        votes = torch.zeros(len(points), int(y.max()) + 1, dtype=torch.long).index_put(
            (group, y), torch.ones_like(y), accumulate=True
        )
        samples = first[order]
        z = torch.cat([backbone.transport(part)[0] for part in x[samples].split(batch_size)])
        conflicts = int(((votes > 0).sum(1) > 1).sum())
        return TransportMap(x[samples], z, votes.argmax(1)[order], samples, counts[order], conflicts)


def health(transport: TransportMap, k: int = 10, ratio: float = 0.0, n_points: int = 1000) -> dict[str, float]:
    """How close the map is to an optimal-transport map: the smallest feasible L over its neighbourhoods.

    Each neighbourhood is a training point and its k - 1 nearest. An optimal transport that moves little has L near 1.

    Args:
        transport: the map.
        k: points in a neighbourhood.
        ratio: l / L.
        n_points: neighbourhoods looked at, evenly spaced over the training set.

    Returns:
        "median", "quartile_1", "quartile_3", "maximum" of the smallest L (inf where none is feasible),
        "feasible" share of neighbourhoods with a finite L (for ratio 0: cyclically monotone), "k", "ratio",
        "neighborhoods".

    Source: docs/method.md, "Transport map".
    """
    k = min(k, len(transport.x))
    step = max(1, len(transport.x) // n_points)
    _, neighbors = nearest_neighbors(transport.x[::step][:n_points], transport.x, k)
    # A few neighbourhoods at a time: all of them at d = 24,960 would take gigabytes.
    parts = neighbors.split(max(1, NUMBERS_AT_ONCE // (k * transport.x.shape[1])))
    ordered = torch.cat([_smoothness(transport, part, ratio) for part in parts]).sort().values
    at = {name: float(ordered[round(q * (len(ordered) - 1))]) for name, q in QUANTILES.items()}
    feasible = float(ordered.isfinite().double().mean())
    return at | {"feasible": feasible, "k": k, "ratio": ratio, "neighborhoods": len(ordered)}


def _smoothness(transport: TransportMap, neighbors: Int[Tensor, "m k"], ratio: float) -> Float[Tensor, " m"]:
    return smallest_smoothness(transport.x[neighbors].double(), transport.z[neighbors].double(), ratio, 1e-4)


NUMBERS_AT_ONCE = 2**24
QUANTILES = {"quartile_1": 0.25, "median": 0.5, "quartile_3": 0.75, "maximum": 1.0}
